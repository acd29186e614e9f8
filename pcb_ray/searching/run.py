"""A search from its request to its output: dry score, analysis, basis, trials, winner, report."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import inspect
import json
import logging
import math
import os
import shutil
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pcb_ray import checks
from pcb_ray.budget import choose_block, worker_bytes
from pcb_ray.cluster import check_cluster, cluster
from pcb_ray.errors import InputError, RequestError, RunError, with_place
from pcb_ray.files.beside import WEIGHT_SUFFIXES
from pcb_ray.files.checkpoint import Checkpoint
from pcb_ray.files.foreign import some
from pcb_ray.files.objects import HUB_SCHEME
from pcb_ray.files.stores import open_store
from pcb_ray.local import LocalOwners
from pcb_ray.merging import Kept, opened, settled
from pcb_ray.methods import Known
from pcb_ray.nodes import Pool
from pcb_ray.output.companions import RECIPE, SideFile, check_side_files, side_files, write_side_files
from pcb_ray.output.folder import Folder
from pcb_ray.output.place import folder_of
from pcb_ray.output.state import State, asked_of
from pcb_ray.planning import DEFAULT_SHARD_BYTES, Inputs, Plan, plan_of
from pcb_ray.progress import readable_bytes
from pcb_ray.questions import inputs_of
from pcb_ray.receipt import Receipt
from pcb_ray.recipe import Recipe
from pcb_ray.searching.building import BuildVolumes, CheckLinear, DigestVolumes
from pcb_ray.searching.evaluators import check_evaluator
from pcb_ray.searching.references import dry_score, references
from pcb_ray.searching.request import Config, Search, Space, grid_of
from pcb_ray.searching.results import Found, Scores, Swept
from pcb_ray.searching.scorer import Arm, Job
from pcb_ray.searching.volumes import basis_bytes, chunks_of_volume, volume_file, volumes_of, writer_bytes
from pcb_ray.session import Session
from pcb_ray.steps import ARITHMETIC, check_unchanged, placed, publish, write_from
from pcb_ray.user_code import UserCode

log = logging.getLogger("pcb_ray")

BEST = "best_recipe.yaml"
BLOCKS_LOOKED_AT = 4  # for whether a method is linear in the weights
LINEAR_WITHIN = 1e-4  # of the largest change: far more than rounding in float32 gives


def search(
    recipe: Recipe | Mapping[str, Any] | str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    evaluator: Any = None,
    workers: int | None = None,
    address: str | None = None,
    memory: int | None = None,
    labels: Mapping[str, str] | None = None,
    resources: Mapping[str, float] | None = None,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    resume: bool = False,
    overwrite: bool = False,
    allow_code: bool = False,
    quiet: bool = False,
) -> Found:
    """Search the coefficients that the recipe's `search:` section opens, and merge the best candidate into the directory `out`.

    `evaluator` is an object with `load` and `score` (see `searching.evaluators`), instead of the one that the recipe names.
    `workers`, `address`, `memory`, `labels` and `resources` are for the analysis, as in `merge`; `allow_code` counts for the
    evaluator too. `out` also holds best_recipe.yaml, trials.parquet, report.html and the Tune experiment.

    Raises RequestError if the request, an input or the evaluator is wrong (before the first trial, unless an input is edited
    later), RunError if the run can't be finished; `resume` goes on with it.
    """
    start = time.monotonic()
    recipe, place = Recipe.of(recipe, allow_code=allow_code), Folder(folder_of(out), overwrite=overwrite)
    request = Search.of(recipe, has_evaluator=evaluator is not None)
    how = _How(workers, address, memory, Pool(labels or {}, resources or {}), max_shard_bytes, resume, overwrite, quiet)
    report, tune = _tools()
    variants = request.variants or (_variant(recipe),)
    with _prepared(recipe, request, place, variants, evaluator, how, model=True) as run:
        state, job = run.state, run.job
        progress, known = _progress(request.budget, job, state, quiet=quiet)
        records, best_trial = _tried(job, state, tune.Generations(job.search, job.space, progress), progress, request.budget, known)
        scores, best = references(job, state, run.base, records, best_trial, quiet=quiet)
        winner = job.space.recipe_of(job.space.candidate(best))
        receipt = _write_winner(run, winner, best)
        found = Found(
            request=job.search,
            space=job.space,
            best=best,
            recipe=winner,
            scores=scores,
            trials=len(records),
            failed=sum(bool(r["error"]) for r in records),
            elapsed_s=time.monotonic() - start,
            receipt=receipt,
        )
        found = dataclasses.replace(found, notes=tuple(report.notes_of(found)))
        report.write_search(state.place.staging, records, found)
        _commit(state, winner)
    return found


def sweep(
    recipe: Recipe | Mapping[str, Any] | str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    evaluator: Any = None,
    workers: int | None = None,
    address: str | None = None,
    memory: int | None = None,
    labels: Mapping[str, str] | None = None,
    resources: Mapping[str, float] | None = None,
    resume: bool = False,
    overwrite: bool = False,
    allow_code: bool = False,
    quiet: bool = False,
) -> Swept:
    """Score the grid of the recipe's `sweep:` section by the evaluator of its `search:` section.

    There is one analysis per variant, and nothing is read again.
    `out` gets sweep.parquet, a table, a heat map and best_recipe.yaml. Raises as `search` does.
    """
    recipe, place = Recipe.of(recipe, allow_code=allow_code), Folder(folder_of(out), overwrite=overwrite)
    points = grid_of(recipe)
    asked = Search.of(recipe, has_evaluator=evaluator is not None)
    # Without an optimizer there are no generations: all points are one. And nothing is reported on a split of its own.
    request = dataclasses.replace(asked, parameters={}, variants=(), optimizer="", population=len(points), report_split="")
    how = _How(workers, address, memory, Pool(labels or {}, resources or {}), DEFAULT_SHARD_BYTES, resume, overwrite, quiet)
    report, tune = _tools()
    variants = tuple(dict.fromkeys(p.get("variant", _variant(recipe)) for p in points))
    largest = max((p[request.share] for p in points if request.share in p), default=None)
    swept = recipe if largest is None else recipe.with_parameters({request.share: largest})
    with _prepared(swept, request, place, variants, evaluator, how, model=False, scored=largest is not None) as run:
        state, job = run.state, run.job
        progress, known = _progress(len(points), job, state, quiet=quiet)
        records, best_trial = _tried(job, state, tune.Listed(points, request.mode, progress), progress, len(points), known)
        best = best_trial["config"]
        winner = job.space.recipe_of(job.space.candidate(best))
        with _trials_kept(state, "the sweep is worth nothing, since its models did not stay what they were"):
            touched = check_unchanged(open_store(), state.stamps)
        for file in touched:
            log.warning("%s: touched during the sweep, its time of writing apart: if its content was changed, sweep again", file)
        report.write_sweep(state.place.staging, job.search, points, records, run.base)
        _commit(state, winner)
    return Swept(job.search, best, winner, run.base, tuple(records))


def _variant(recipe: Recipe) -> str:
    return str(recipe.parameters.get("variant", ""))


def _tools() -> tuple[Any, Any]:
    """The modules `report` and `tune`, whose imports take seconds: for when the request is known to be right.

    Raises RequestError if a library is not installed."""
    try:
        from pcb_ray.searching import report, tune
    except ImportError as error:
        raise RequestError(f"search: wanted its libraries, found {error}. Fix: pip install 'pcb-ray[search]'.") from error
    return report, tune


@dataclass(frozen=True)
class _How:
    """How a search is run, whatever it searches."""

    workers: int | None
    address: str | None
    memory: int | None
    pool: Pool
    max_shard_bytes: int
    resume: bool
    overwrite: bool
    quiet: bool


@dataclass(frozen=True)
class _Run:
    """A search whose bases are made: all that is left is to try candidates."""

    how: _How
    state: State[Folder]
    job: Job
    inputs: Inputs
    base: Scores


@contextlib.contextmanager
def _prepared(
    recipe: Recipe,
    request: Search,
    place: Folder,
    variants: tuple[str, ...],
    evaluator: Any,
    how: _How,
    *,
    model: bool,
    scored: bool | None = None,
) -> Iterator[_Run]:
    """What searches and sweeps have in common: everything is checked, the base is scored, each variant has its basis.

    `model` says whether the output is to have one, and `scored` whether the share that is kept will differ, if the request does
    not say so."""
    from pcb_ray.searching import tune

    scored = request.scored if scored is None else scored
    code, of_code = (None, []) if evaluator is not None else _code_of(request, recipe)
    check_cluster(how.address)

    def check(plan: Plan) -> None:
        check_follows(plan)
        place.check(plan, resume=how.resume, model=model)

    first = _analysed(recipe, request, variants[0])
    inputs, plan = opened(first, how.max_shard_bytes, check)
    if inputs.base.prefix is not None:
        source, fix = inputs.base.source, "copy the base to a folder"
        if inputs.base.commit is not None:
            fix = f"write {source.removeprefix(HUB_SCHEME)}, which is downloaded into the Hub's cache"
        raise RequestError(
            f"base_model {source}: wanted a base on a disk, which trials map, found one in a store. "
            f"Fix: {fix}; the models may stay where they are."
        )
    if not all(twin.declared for twin in plan.twins):  # what they are decides what a candidate is
        store = open_store(plan.stamps, recipe.storage)
        session = Session(plan, lambda plan: LocalOwners(plan, store), quiet=how.quiet)
        inputs = settled(session, inputs, lambda inputs: plan_of(first, inputs, max_shard_bytes=how.max_shard_bytes))
        plan = session.plan
        check(plan)
    plans = {v: plan_of(_analysed(recipe, request, v), inputs, max_shard_bytes=how.max_shard_bytes) for v in variants}
    beside = sum(basis_bytes(p, scored) for p in plans.values())
    place.check(plan, resume=how.resume, model=model, beside=beside)
    for one in plans.values():
        choose_block(one, "cpu", how.memory, writer_bytes(one, scored))  # a wrong bound is told before a cluster starts
    space = Space.of(request, recipe, plan)
    tune.check_optimizer(request, space)
    _check_picklable(evaluator)
    files = side_files(recipe, plan, inputs.base, inputs.tokenizer)
    for note in (*plan.notes, *space.notes, *of_code):
        log.warning("note: %s", note)
    if len(space.groups) > 1:
        sizes = Counter(space.group_of)
        log.info("groups: %s", ", ".join(f"{name} {sizes[k]} tensors" for k, name in enumerate(space.groups)))
    if request.optimizer == "CMA" and request.budget <= request.population:
        log.warning("note: the budget is one generation, which is spread over uniform coefficients: CMA-ES begins with the second")
    stamps = plan.stamps
    asked = {
        **asked_of(plan, ARITHMETIC, stamps),
        "search": {k: v for k, v in asdict(request).items() if k not in _may_differ(request)},
    }
    with State(place, asked, stamps, resume=how.resume) as state:
        model_dir = state.place.folder / "model"
        _make_model_dir(model_dir, inputs.base, files)
        with cluster(how.address):
            if request.memory is None and not request.gpu:
                request = dataclasses.replace(request, memory=model_bytes(plan))
            at_a_time = tune.check_resources(request)
            shown = tune.shown_resources(request)
            log.info("trials: up to %d at a time, each with %s", min(at_a_time, request.population), shown)
            tune.check_loggers(request)
            kind = "scored" if scored else "combined"
            arms = {v: Arm(p, str(state.place.folder / f"basis-{v or 'only'}-{kind}"), {}) for v, p in plans.items()}
            scored_by = _identity(request, evaluator, code)
            folder = recipe.folder.absolute() if evaluator is None else Path.cwd()
            job = Job(request, space, arms, str(model_dir.absolute()), str(folder), scored_by, evaluator, code)
            base = dry_score(job, state, quiet=how.quiet)
            job = dataclasses.replace(job, arms=_with_bases(arms, state, scored, how))
            yield _Run(how, state, job, inputs, base)


def check_follows(plan: Plan) -> None:
    """Raises RequestError if a merge has tensors that a candidate, which is the loaded base with an update, would not have."""
    if plan.untied:
        lines = "\n".join(f"  - {json.dumps(name)}" for name in plan.untied)
        raise RequestError(
            f"search: wanted a model whose candidates are the base with an update, found {some(plan.untied)} merged apart from the "
            "embedding to which the base ties it. Fix: keep them tied, which loses what was trained there, with\n"
            f"exclude:\n{lines}"
        )
    averaged = [copy.source.name for copy in plan.copies if copy.models]
    if averaged:
        lines = "\n".join(f"  - {json.dumps(line)}" for line in sorted({f"*.{name.rpartition('.')[2]}" for name in averaged}))
        raise RequestError(
            f"search: wanted a model whose candidates are the base with an update, found {len(averaged)} tensors of statistics "
            f"({some(averaged)}), which are averaged over the models. Fix: keep the base's with\nexclude:\n{lines}"
        )


def model_bytes(plan: Plan) -> int:
    """The bytes of the model in float32, as a trial on CPUs holds it."""
    again = sum(plan.tensors[one.tensor].numel for one in plan.again)
    return 4 * (plan.D + again + sum(math.prod(c.source.shape) for c in plan.copies))


def announced(plan: Plan) -> dict[str, Any]:
    """What a search of the plan's recipe will be, as far as that is known before it: for `pcb-ray plan`. Raises RequestError."""
    recipe, section = plan.recipe, plan.recipe.search
    request = Search.of(recipe, has_evaluator=not (isinstance(section, Mapping) and "evaluator" in section))
    _, of_code = _code_of(request, recipe)
    check_follows(plan)
    space = Space.of(request, recipe, plan)
    scored = request.scored
    recipes = [_analysed(recipe, request, variant) for variant in request.variants or (_variant(recipe),)]
    plans = [dataclasses.replace(plan, recipe=one) for one in recipes]
    return {
        "coefficients": [*space.bounds, "variant"] if space.variants else list(space.bounds),
        "optimizer": request.optimizer,
        "budget": request.budget,
        "population": request.population,
        "basis_bytes": sum(basis_bytes(one, scored) for one in plans),
        "worker_bytes": max(worker_bytes(one, choose_block(one, "cpu", None)) + writer_bytes(one, scored) for one in plans),
        "trial_bytes": request.memory or (None if request.gpu else model_bytes(plan)),
        "notes": [*space.notes, *of_code],
    }


def _may_differ(request: Search) -> tuple[str, ...]:
    """What of a request may differ when it is resumed: no candidate depends on it, or all are scored again (the evaluator)."""
    budget = ("budget",) if request.optimizer == "CMA" else ()
    return (*budget, "concurrency", "cpu", "gpu", "memory", "trial_timeout_s", "loggers", "evaluator", "options")


def _analysed(recipe: Recipe, request: Search, variant: str) -> Recipe:
    """The recipe whose thresholds serve all candidates: where the largest share is kept."""
    changes: dict[str, Any] = {"variant": variant} if variant else {}
    if request.scored:
        changes[request.share] = request.parameters[request.share].upper
    return dataclasses.replace(recipe.with_parameters(changes), search=None, sweep=None)


def _code_of(request: Search, recipe: Recipe) -> tuple[UserCode | None, list[str]]:
    """The code of the evaluator that the recipe names, if it names one of the user's own, and what to announce of what will be run.
    Raises RequestError for a wrong evaluator."""
    name, options = request.evaluator, request.options
    code = check_evaluator(name, options, recipe.folder, request.splits, allow_code=recipe.allow_code) if name else None
    if code is not None:
        return code, [f"search.evaluator runs {code.told}."]
    return None, [f"search.evaluator runs a shell command: {checks.shown(options['run'])}."] if name == "command" else []


def _identity(request: Search, evaluator: Any, code: UserCode | None) -> str:
    """What tells an evaluator from what it was before it was changed, as far as its name, its options and its own source do."""
    if evaluator is not None:
        name = type(evaluator).__qualname__
        try:
            source = inspect.getsource(type(evaluator))
        except (OSError, TypeError):
            source = ""  # typed into a prompt
    else:
        name, source = request.evaluator, code.sha256 if code else ""
    # On a GPU models are scored in another dtype.
    told = json.dumps([name, request.options, source, bool(request.gpu)], sort_keys=True, default=str)
    return hashlib.sha256(told.encode()).hexdigest()[:16]


def _check_picklable(evaluator: Any) -> None:
    """Raises RequestError for an evaluator that can't be sent to trial processes."""
    from ray import cloudpickle

    try:
        cloudpickle.dumps(evaluator)
    except Exception as error:  # whatever its __getstate__ raises
        raise RequestError(
            f"search.evaluator: wanted an object that can be sent to trial processes, found that {type(evaluator).__name__} can't: "
            f"{with_place(error)}. Fix: open files, connections and models in `load`, which each process calls."
        ) from error


def _make_model_dir(folder: Path, base: Checkpoint, files: Mapping[str, SideFile]) -> None:
    """The base as an evaluator loads it: its tensors by link, with the config and tokenizer that the merge will have."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    stored = [Path(f.path) for f in base.files]
    if base.folder is None:
        (folder / f"model{stored[0].suffix}").symlink_to(stored[0].absolute())
    else:
        parts = [Path(path) for path in files.values() if isinstance(path, str) and path.endswith(WEIGHT_SUFFIXES)]
        for path in (*stored, *(base.folder / base.inner).glob("*.index.json"), *parts):
            link = folder / path.relative_to(base.folder)  # where the index says; that may be in a subfolder
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(path.absolute())
    others = {name: content for name, content in files.items() if name != RECIPE and not (folder / name).is_symlink()}
    write_side_files(folder, {name: content for name, content in others.items() if not name.endswith(".index.json")}, open_store())


# --- the steps --------------------------------------------------------------------------------------------------------------------


def _with_bases(arms: Mapping[str, Arm], state: State[Folder], scored: bool, how: _How) -> dict[str, Arm]:
    """Each variant's arm with its basis: analysed and built, or taken from an earlier run."""
    plans = [arm.plan for arm in arms.values()]
    for arm in arms.values():
        Path(arm.folder).mkdir(exist_ok=True)
    beside = max(writer_bytes(plan, scored) for plan in plans)
    place = placed(
        plans, workers=how.workers, memory=how.memory, pool=how.pool, beside=beside, writes_to=lambda: state.place, quiet=how.quiet
    )
    with place as session:
        return {variant: _with_basis(arm, session, state, variant, scored) for variant, arm in arms.items()}


def _with_basis(arm: Arm, session: Session, state: State[Folder], variant: str, scored: bool) -> Arm:
    plan, folder = arm.plan, Path(arm.folder)
    session.begin(plan)
    kept = Kept(state.found.setdefault("arms", {}).setdefault(variant, {}), session, time.monotonic())
    known = kept.analysed(state)
    if plan.recipe.code is not None:
        _check_linear(session, known, scored)
    names = {volume: f"{folder.name} {volume}" for volume in range(volumes_of(plan))}
    claimed = state.claimed(names)
    answers = session.owners.ask(DigestVolumes(arm.folder), list(claimed))
    here = {volume: digest for _, answer in answers for volume, digest in answer.items()}
    written = {volume: one for volume, one in claimed.items() if here.get(volume) == one.digest}

    def bytes_of(volume: int) -> int:
        chunks = chunks_of_volume(plan, volume)
        return plan.sweep_bytes * (plan.bounds[chunks.stop] - plan.bounds[chunks.start]) // plan.D

    def build(volumes: Sequence[int]) -> None:
        for _, built in session.store("basis", BuildVolumes(known, arm.folder, scored), volumes, bytes_of):
            written.update(built)
            state.wrote({names[volume]: one.to_text() for volume, one in built.items()})
        session.saw_inputs(inputs_of(written.values()), "basis")

    if missing := [volume for volume in names if volume not in written]:
        build(missing)
        if touched := check_unchanged(open_store(), state.stamps):  # before trials take hours
            log.warning("%s: touched during the run, its time of writing apart: the basis is built again", touched[0])
            build(list(names))
        kept.keep_inputs(state)
    size = sum(volume_file(folder, volume).stat().st_size for volume in names)
    log.info("basis %s: %s for %d models of %d elements", plan.method.full_name, readable_bytes(size), plan.N, plan.D)
    return dataclasses.replace(arm, known=known)


def _check_linear(session: Session, known: Known, scored: bool) -> None:
    """A method of the user's own says that it is linear in the weights: some blocks are looked at for that. Raises InputError."""
    recipe = session.plan.recipe
    chunks = session.plan.chunks
    some = sorted({chunks * k // BLOCKS_LOOKED_AT for k in range(BLOCKS_LOOKED_AT)})
    departure = max(found for _, found in session.owners.ask(CheckLinear(known, scored), some))
    if departure > LINEAR_WITHIN:
        raise InputError(
            f"merge_method: wanted {recipe.merge_method} linear in the weights, as its record says, found a block whose merge "
            f"departs from that by {departure:.2g} of the largest change. "
            "Fix: set `linear=False`, which can be merged and not searched, or let what the weights multiply depend on neither the "
            "weights nor the base, and `scored`, if there is one, give what `merge` gives."
        )


def _tried(
    job: Job, state: State[Folder], asker: Any, progress: Any, total: int, known: Mapping[str, Any]
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The records of all trials, and the best. Raises RunError if there is none with a score."""
    from pcb_ray.searching import tune

    shutil.rmtree(state.place.folder / "tune", ignore_errors=True)
    records = tune.run_trials(job, asker, progress, total, storage=state.place.folder, known=known, name="tune")
    if progress.best is None:
        raise RunError(
            f"search: wanted a trial with a score, found none among {len(records)}; the last: {records[-1]['error']}. "
            "Fix: mend the evaluator, then go on with --resume."
        )
    return records, progress.best


@contextlib.contextmanager
def _trials_kept(state: State[Folder], wanted: str) -> Iterator[None]:
    """Inputs that prove wrong now cost no trials: they took long, and may tell what the user wants to know."""
    try:
        yield
    except InputError as error:
        log.warning("%s; what the trials found is kept in %s", wanted, state.place.folder)
        raise RequestError(error.problems) from error


def _commit(state: State[Folder], winner: Recipe) -> None:
    """Add what search and sweep both leave, and give the output its name."""
    (state.place.staging / BEST).write_text(winner.resolved().to_yaml())
    for pickled in (state.place.folder / "tune").rglob("*.pkl"):
        pickled.unlink()  # for Tune to go on with; they hold the evaluator's options, whatever these may be
    shutil.rmtree(state.place.staging / "tune", ignore_errors=True)  # of an earlier run that could not be committed
    (state.place.folder / "tune").rename(state.place.staging / "tune")
    state.commit()


def _progress(total: int, job: Job, state: State[Folder], *, quiet: bool) -> tuple[Any, dict[str, Any]]:
    """What keeps a record of each trial as it ends, and the records of an earlier run."""
    from pcb_ray.searching import tune

    def keep(key: str, record: Mapping[str, Any]) -> None:
        state.wrote({f"trial {job.scored_by} {key}": json.dumps(record)})

    known = _known_trials(job, state)
    base = state.found["base"]["scores"][job.search.search_split][job.search.metric]
    return tune.Ledger(total, job.search, keep, known, base=base, room=tune.check_resources(job.search), quiet=quiet), known


def _known_trials(job: Job, state: State[Folder]) -> dict[str, Any]:
    """The trials of an earlier run that had a score, and those without one that later generations have been told of: scored now,
    they would change what was asked since. What the evaluator scored before it was changed is not known any more."""
    of_trials = {key: text for key, text in state.journal.items() if key.startswith("trial ")}
    mine = f"trial {job.scored_by} "
    records = {key.removeprefix(mine): json.loads(text) for key, text in of_trials.items() if key.startswith(mine)}
    changed = sum(not json.loads(text)["error"] for key, text in of_trials.items() if not key.startswith(mine))
    if changed:
        log.warning("the evaluator has changed: %d candidates that were scored before count no more", changed)
    generation = {key: record["number"] // job.search.population for key, record in records.items()}
    last = max((generation[key] for key, record in records.items() if not record["error"]), default=0)
    known = {key: record for key, record in records.items() if not record["error"] or generation[key] < last}
    if known:
        log.warning("%d candidates were tried before and are not scored again", len(known))
    return known


def _write_winner(run: _Run, winner: Recipe, best: Config) -> Receipt:
    """Merge the winner into the staging folder, with what is known. A part that an interrupted run has written stays."""
    from pcb_ray.searching.basis import Basis

    start, state, job, how = time.monotonic(), run.state, run.job, run.how
    arm = job.arms[_variant(winner)]
    density = job.space.candidate(best).density
    known = arm.known if density is None else Basis(arm.plan, arm.folder, arm.known).known(density)
    plan = plan_of(winner, run.inputs, max_shard_bytes=how.max_shard_bytes)
    label = "winner " + hashlib.sha256(json.dumps([winner.to_yaml(), known], sort_keys=True).encode()).hexdigest()[:16]
    if state.found.get("winner") != label:  # another one may have been written before the evaluator was changed
        shutil.rmtree(state.place.staging)
        state.place.staging.mkdir()
        state.found["winner"] = label
        state.save()
    store = open_store(plan.stamps, winner.storage)
    with placed(
        [plan], workers=how.workers, memory=how.memory, pool=how.pool, writes_to=lambda: state.place, quiet=how.quiet
    ) as session:
        kept = Kept(state.found["arms"][_variant(winner)], session, start)
        with _trials_kept(state, "the winner could not be merged"):
            files = side_files(winner, plan, run.inputs.base, run.inputs.tokenizer)
            check_side_files(files, store)
            output = write_from(state.stamps, session, store, known, state.place.files, state, label)
            return publish(
                session,
                state,
                store,
                known,
                output,
                files,
                sweeps=kept.sweeps(),
                spent=kept.spent(),
                max_shard_bytes=how.max_shard_bytes,
                startup_s=0.0,
                resumed=state.resumed,
                commit=False,
            )
