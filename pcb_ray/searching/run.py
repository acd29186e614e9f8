"""A search from its request to its output: dry score, analysis, basis, trials, winner, report."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import inspect
import json
import logging
import math
import os
import shutil
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pcb_ray import checks
from pcb_ray.budget import choose_block, worker_bytes
from pcb_ray.cluster import check_cluster, cluster, watched_head
from pcb_ray.errors import InputError, RequestError, RunError, with_place
from pcb_ray.files.foreign import some
from pcb_ray.files.room import KeptHere, Room
from pcb_ray.files.store import Stamp, Store, is_remote
from pcb_ray.files.stores import open_store
from pcb_ray.local import LocalOwners
from pcb_ray.merging import Kept, needs_room, opened, settled
from pcb_ray.merging import writer_bytes as output_bytes
from pcb_ray.methods import Known
from pcb_ray.nodes import Pool, nodes
from pcb_ray.output.companions import SideFile, check_side_files, side_files, write_side_files
from pcb_ray.output.folder import STATE, Folder
from pcb_ray.output.place import place_of_search
from pcb_ray.output.prefix import Prefix
from pcb_ray.output.state import State, asked_of
from pcb_ray.planning import DEFAULT_SHARD_BYTES, Inputs, Plan, plan_of
from pcb_ray.progress import readable_bytes
from pcb_ray.questions import Written, inputs_of
from pcb_ray.receipt import RECEIPT, Receipt
from pcb_ray.recipe import Recipe
from pcb_ray.searching import results
from pcb_ray.searching.building import BuildVolumes, CheckLinear, DigestVolumes
from pcb_ray.searching.evaluators import check_evaluator, check_here
from pcb_ray.searching.nearby import Material, kept_on, make_model_dir, model_files
from pcb_ray.searching.references import dry_score, known_of, references
from pcb_ray.searching.request import Config, Search, Space, grid_of
from pcb_ray.searching.results import FOUND, Found, Scores, Swept
from pcb_ray.searching.scorer import Arm, Job
from pcb_ray.searching.volumes import basis_bytes, chunks_of_volume, volume_file, volumes_of, writer_bytes
from pcb_ray.session import Session
from pcb_ray.steps import ARITHMETIC, AT_ONCE, check_unchanged, placed, publish, write_from
from pcb_ray.user_code import UserCode

log = logging.getLogger("pcb_ray")

BEST = "best_recipe.yaml"
TUNE = "tune"
PICKLED = ".pkl"  # what Tune leaves to go on with: it holds the evaluator's options, whatever these may be
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
    cache: int | None = None,
    scratch: str = "",
    scratch_bytes: int | None = None,
    allow_code: bool = False,
    quiet: bool = False,
) -> Found:
    """Search the coefficients that the recipe's `search:` section opens, and merge the best candidate into `out`, a directory that
    all nodes see or a prefix in an object store.

    `evaluator` is an object with `load` and `score` (see `searching.evaluators`), instead of the one that the recipe names.
    `workers`, `address` and `memory` are for the analysis, as in `merge`; `labels` and `resources` hold for workers and trials;
    `allow_code` counts for the evaluator too. What trials read of a store, the base and the basis, each node fetches once, and
    keeps as `cache`, `scratch` and `scratch_bytes` say. `out` also holds best_recipe.yaml, trials.parquet, report.html and the Tune
    experiment.

    Raises RequestError if the request, an input or the evaluator is wrong (before the first trial, unless an input is edited
    later), RunError if the run can't be finished; `resume` goes on with it, from any machine that sees `out`.
    """
    start = time.monotonic()
    recipe = Recipe.of(recipe, allow_code=allow_code)
    place = place_of_search(out, recipe.storage, RECEIPT, overwrite=overwrite)
    request = Search.of(recipe, has_evaluator=evaluator is not None)
    how = _How(
        workers,
        address,
        memory,
        Pool(labels or {}, resources or {}),
        max_shard_bytes,
        resume,
        Room.for_a_run(cache, scratch, scratch_bytes),
        quiet,
    )
    report, tune = _tools()
    variants = request.variants or (_variant(recipe),)
    asked = _asked(recipe, request, place, variants, evaluator, how, model=True)
    if asked.record is not None:
        log.warning("%s: is this very search already, and nothing was done", place.out)
        return results.found_of(asked.record, request, asked.space, Receipt.of(place.reads, open_store(storage=recipe.storage)))
    with _prepared(asked) as run:
        state, job = run.state, run.job
        progress, known = _progress(request.budget, job, state, quiet=quiet)
        records, best_trial = _tried(
            job, run.shelf, tune.Generations(job.search, job.space, progress), progress, request.budget, known
        )
        with watched_head():
            scores, best = references(job, state, run.base, records, best_trial, quiet=quiet)
        winner = job.space.recipe_of(job.space.candidate(best))
        found = Found(
            request=job.search,
            space=job.space,
            best=best,
            recipe=winner,
            scores=scores,
            trials=len(records),
            failed=sum(bool(r["error"]) for r in records),
            elapsed_s=time.monotonic() - start,
        )
        found = dataclasses.replace(found, notes=tuple(report.notes_of(found)))
        files = report.files_of_search(records, found)
        files |= {BEST: winner.resolved().to_yaml().encode(), FOUND: results.as_json(_record_of(asked), found)}
        receipt = _write_winner(run, winner, best, files)
        state.commit()
    return dataclasses.replace(found, receipt=receipt)


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
    cache: int | None = None,
    scratch: str = "",
    scratch_bytes: int | None = None,
    allow_code: bool = False,
    quiet: bool = False,
) -> Swept:
    """Score the grid of the recipe's `sweep:` section by the evaluator of its `search:` section.

    There is one analysis per variant, and nothing is read again.
    `out` gets sweep.parquet, a table, a heat map and best_recipe.yaml. Arguments and errors are those of `search`.
    """
    recipe = Recipe.of(recipe, allow_code=allow_code)
    place = place_of_search(out, recipe.storage, FOUND, overwrite=overwrite)
    points = grid_of(recipe)
    asked_for = Search.of(recipe, has_evaluator=evaluator is not None)
    # Without an optimizer there are no generations: all points are one. And nothing is reported on a split of its own.
    request = dataclasses.replace(asked_for, parameters={}, variants=(), optimizer="", population=len(points), report_split="")
    how = _How(
        workers,
        address,
        memory,
        Pool(labels or {}, resources or {}),
        DEFAULT_SHARD_BYTES,
        resume,
        Room.for_a_run(cache, scratch, scratch_bytes),
        quiet,
    )
    report, tune = _tools()
    variants = tuple(dict.fromkeys(p.get("variant", _variant(recipe)) for p in points))
    largest = max((p[request.share] for p in points if request.share in p), default=None)
    swept = recipe if largest is None else recipe.with_parameters({request.share: largest})
    asked = _asked(swept, request, place, variants, evaluator, how, model=False, scored=largest is not None, points=points)
    if asked.record is not None:
        log.warning("%s: is this very sweep already, and nothing was done", place.out)
        return results.swept_of(asked.record, request, asked.space)
    with _prepared(asked) as run:
        state, job = run.state, run.job
        progress, known = _progress(len(points), job, state, quiet=quiet)
        records, best_trial = _tried(job, run.shelf, tune.Listed(points, request.mode, progress), progress, len(points), known)
        best = best_trial["config"]
        winner = job.space.recipe_of(job.space.candidate(best))
        store = _store_of(run)
        with _trials_kept(state, "the sweep is worth nothing, since its models did not stay what they were"):
            touched = check_unchanged(store, state.stamps)
        for file in touched:
            log.warning("%s: touched during the sweep, its time of writing apart: if its content was changed, sweep again", file)
        found = Swept(job.search, best, winner, run.base, tuple(records))
        files = report.files_of_sweep(job.search, points, records, run.base) | {BEST: winner.resolved().to_yaml().encode()}
        write_side_files(state.place.beside, files, store)
        state.place.take_along(run.shelf / TUNE, but=PICKLED)
        write_side_files(state.place.beside, {FOUND: results.as_json(_record_of(asked), found)}, store)  # it says that all is there
        state.commit()
    return found


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
    room: Room
    quiet: bool


Lasting = Folder | Prefix
"""Where a search goes."""


@dataclass(frozen=True)
class _Run:
    """A search whose bases are made: all that is left is to try candidates."""

    how: _How
    state: State[Lasting]
    job: Job
    inputs: Inputs
    base: Scores
    shelf: Path
    """The folder, on this machine, where Tune keeps its experiment."""


@dataclass(frozen=True)
class _Asked:
    """A search that can be run, and of which nothing is done yet."""

    recipe: Recipe
    request: Search
    place: Lasting
    how: _How
    inputs: Inputs
    plan: Plan
    plans: Mapping[str, Plan]
    """By variant."""
    space: Space
    files: Mapping[str, SideFile]
    evaluator: Any
    code: UserCode | None
    scored: bool
    """Whether the share that is kept differs."""
    model: bool
    """Whether the output is to have one."""
    points: Sequence[Config]
    """Of a sweep."""
    record: Mapping[str, Any] | None
    """What an earlier search has found that lies in OUT, whole, and was asked the same."""

    @property
    def basis_bytes(self) -> int:
        return sum(basis_bytes(plan, self.scored) for plan in self.plans.values())


def _asked(
    recipe: Recipe,
    request: Search,
    place: Lasting,
    variants: tuple[str, ...],
    evaluator: Any,
    how: _How,
    *,
    model: bool,
    scored: bool | None = None,
    points: Sequence[Config] = (),
) -> _Asked:
    """Everything is checked. `scored` says whether the share that is kept will differ, if the request does not say so.

    Raises RequestError with all that is wrong."""
    from pcb_ray.searching import tune

    scored = request.scored if scored is None else scored
    code, of_code = (None, []) if evaluator is not None else _code_of(request, recipe)
    check_cluster(how.address)
    before = results.record_in(place, recipe.storage) if how.resume else None

    def check(plan: Plan, beside: int = 0) -> None:
        check_follows(plan)
        if before is None:
            place.check(plan, resume=how.resume, model=model, beside=beside)

    first = _analysed(recipe, request, variants[0])
    inputs, plan = opened(first, how.max_shard_bytes, check)
    if not all(twin.declared for twin in plan.twins):  # what they are decides what a candidate is
        store = open_store(plan.stamps, recipe.storage)
        session = Session(plan, lambda plan: LocalOwners(plan, store), quiet=how.quiet)
        inputs = settled(session, inputs, lambda inputs: plan_of(first, inputs, max_shard_bytes=how.max_shard_bytes))
        plan = session.plan
        check(plan)
    plans = {v: plan_of(_analysed(recipe, request, v), inputs, max_shard_bytes=how.max_shard_bytes) for v in variants}
    space = Space.of(request, recipe, plan)
    files = side_files(recipe, plan, inputs.base, inputs.tokenizer)
    asked = _Asked(recipe, request, place, how, inputs, plan, plans, space, files, evaluator, code, scored, model, points, before)
    if before is not None:
        problems = results.differences(before, _record_of(asked), place, recipe.storage)
        if not problems:
            return asked
        before, asked = None, dataclasses.replace(asked, record=None)  # with --overwrite it may be replaced
        try:
            check(plan)
        except RequestError as error:
            raise RequestError([*error.problems, *problems]) from None
    check(plan, asked.basis_bytes)
    for one in plans.values():  # a wrong bound is told before a cluster starts
        choose_block(one, "cpu", how.memory, writer_bytes(one, scored, place.notes))
    tune.check_optimizer(request, space)
    _check_picklable(evaluator)
    for note in (*plan.notes, *space.notes, *of_code):
        log.warning("note: %s", note)
    if len(space.groups) > 1:
        sizes = Counter(space.group_of)
        log.info("groups: %s", ", ".join(f"{name} {sizes[k]} tensors" for k, name in enumerate(space.groups)))
    if request.optimizer == "CMA" and request.budget <= request.population:
        log.warning("note: the budget is one generation, which is spread over uniform coefficients: CMA-ES begins with the second")
    return asked


def _fingerprint(asked: _Asked) -> dict[str, Any]:
    """What decides which candidates are asked, and what their merges are."""
    request = asked.request
    return {
        **asked_of(asked.plan, ARITHMETIC, asked.plan.stamps),
        "search": {k: v for k, v in asdict(request).items() if k not in _may_differ(request)},
    }


@contextlib.contextmanager
def _prepared(asked: _Asked) -> Iterator[_Run]:
    """What searches and sweeps have in common: the base is scored, each variant has its basis."""
    from pcb_ray.searching import tune

    recipe, request, place, how = asked.recipe, asked.request, asked.place, asked.how
    names = [file.name for file in asked.plan.files] if asked.model else []
    with State(place, _fingerprint(asked), asked.plan.stamps, names, resume=how.resume) as state:
        material = _material(asked)
        with cluster(how.address):
            if request.memory is None and not request.gpu:
                request = dataclasses.replace(request, memory=model_bytes(asked.plan))
            at_a_time = tune.check_resources(request, how.pool)
            shown = tune.shown_resources(request, how.pool)
            log.info("trials: up to %d at a time, each with %s", min(at_a_time, request.population), shown)
            tune.check_loggers(request)
            kind = "scored" if asked.scored else "combined"
            arms = {v: Arm(p, f"{place.notes}/basis-{v or 'only'}-{kind}", {}) for v, p in asked.plans.items()}
            scored_by = _identity(request, asked.evaluator, asked.code)
            folder = str(recipe.folder.absolute() if asked.evaluator is None else Path.cwd())
            job = Job(request, asked.space, arms, material, folder, scored_by, asked.evaluator, asked.code, how.pool)
            scoring = [node for node in nodes() if how.pool.places([node], request.amounts)]
            reads = (f"{place.notes}/{STATE}", *(file.path for file in asked.inputs.base.files))
            check = functools.partial(check_here, request.evaluator, request.options, folder)
            with kept_on(scoring, material, reads, check), _shelf(place, how.room) as shelf:
                with watched_head():
                    base = dry_score(job, state, quiet=how.quiet)
                yield _Run(how, state, _with_bases(job, state, asked.scored, how), asked.inputs, base, shelf)


def _material(asked: _Asked) -> Material:
    """What trials read. Where all of it is on a disk that all nodes see, it is made here once."""
    recipe, place, stored = asked.recipe, asked.place, asked.inputs.base.files
    model = model_files(asked.inputs.base, asked.files)
    pins = {path: stamp for path, stamp in asked.plan.stamps.items() if is_remote(path)}
    of_base = sum(file.size for file in stored if is_remote(file.path))
    if isinstance(place, Folder) and not of_base:
        made = place.folder / "model"
        shutil.rmtree(made, ignore_errors=True)
        made.mkdir()
        make_model_dir(made, model, open_store(storage=recipe.storage))
        return Material(model, str(made.absolute()), pins, recipe.storage)
    of_basis = asked.basis_bytes if isinstance(place, Prefix) else 0
    return Material(model, "", pins, recipe.storage, asked.how.room, of_base + of_basis)


@contextlib.contextmanager
def _shelf(place: Lasting, room: Room) -> Iterator[Path]:
    """A folder on this machine: trials leave nothing in it themselves."""
    if isinstance(place, Folder):
        yield place.folder
        return
    with contextlib.closing(KeptHere(room)) as kept, kept.workplace() as folder:
        yield folder


def check_follows(plan: Plan) -> None:
    """Raises RequestError if a merge has tensors that a candidate, which is the loaded base with an update, would not have."""
    if plan.untied:
        lines = "\n".join(f"  - {json.dumps(name)}" for name in plan.untied)
        raise RequestError(
            f"search: wanted a model whose candidates are the base with an update, found {some(plan.untied)} merged apart from the "
            "embedding to which the base ties it. Fix: keep them tied, which loses what was trained there, with\n"
            f"exclude:\n{lines}"
        )
    if plan.recipe.calibrate:
        raise RequestError(
            "search: wanted candidates that are the base with an update linear in their coefficients, found `calibrate: svc`. Fix: "
            "remove it from `parameters`; merge the winner with it, whose lambda is then near 1."
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
    of_base = sum(file.size for file in plan.inputs[0].files if is_remote(file.path) and file.stamp is not None)
    nearby = f"each node that runs trials fetches the base, {readable_bytes(of_base)}, and a basis whose OUT is in a store"
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
        "notes": [*space.notes, *of_code, *([nearby] if of_base else [])],
    }


def _record_of(asked: _Asked) -> dict[str, Any]:
    """What a search that is asked again must share with the one that has been done."""
    return {
        "asked": _fingerprint(asked),
        "budget": asked.request.budget,
        "points": list(asked.points),
        "scored_by": _identity(asked.request, asked.evaluator, asked.code),
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


# --- the steps --------------------------------------------------------------------------------------------------------------------


def _with_bases(job: Job, state: State[Lasting], scored: bool, how: _How) -> Job:
    """The job with the basis of each variant: analysed and built, or taken from an earlier run."""
    arms = job.arms
    plans = [arm.plan for arm in arms.values()]
    for arm in arms.values():
        if not is_remote(arm.folder):
            os.makedirs(arm.folder, exist_ok=True)
    beside = max(writer_bytes(plan, scored, state.place.notes) for plan in plans)
    with placed(
        plans,
        workers=how.workers,
        memory=how.memory,
        pool=how.pool,
        beside=beside,
        writes_to=lambda: state.place,
        room=_room_for_reading(how.room) if plans[0].is_remote else None,
        quiet=how.quiet,
    ) as session:
        built = {variant: _with_basis(arm, session, state, variant, scored) for variant, arm in arms.items()}
    pins = {uri: stamp for _, stamps in built.values() for uri, stamp in stamps.items()}
    material = dataclasses.replace(job.material, pins={**job.material.pins, **pins})
    return dataclasses.replace(job, material=material, arms={variant: arm for variant, (arm, _) in built.items()})


def _room_for_reading(room: Room) -> Room:
    """As much room again, for what one merge or analysis fetches of the models: it goes when that has ended."""
    return Room.for_a_run(room.memory, room.scratch, room.scratch_bytes)


def _with_basis(arm: Arm, session: Session, state: State[Lasting], variant: str, scored: bool) -> tuple[Arm, dict[str, Stamp]]:
    """And what its files in a store are."""
    plan = arm.plan
    session.begin(plan)
    kept = Kept(state.found.setdefault("arms", {}).setdefault(variant, {}), session, time.monotonic())
    known = kept.analysed(state)
    if plan.recipe.code is not None:
        _check_linear(session, known, scored)
    store = open_store(storage=plan.recipe.storage, pins=state.stamps)
    names = {volume: f"{os.path.basename(arm.folder)} {volume}" for volume in range(volumes_of(plan))}
    claimed = state.claimed(names)
    written = {volume: claimed[volume] for volume in _still_there(arm, session, claimed, store)}

    def bytes_of(volume: int) -> int:
        chunks = chunks_of_volume(plan, volume)
        return plan.sweep_bytes * (plan.bounds[chunks.stop] - plan.bounds[chunks.start]) // plan.D

    def build(volumes: Sequence[int]) -> None:
        question = BuildVolumes(known, arm.folder, scored)
        chunks_of = functools.partial(chunks_of_volume, plan)
        ask = session.store_files if is_remote(arm.folder) else session.store
        for _, built in ask("basis", question, volumes, bytes_of, chunks_of):
            written.update(built)
            state.wrote({names[volume]: one.to_text() for volume, one in built.items()})
        session.saw_inputs(inputs_of(written.values()), "basis")

    if missing := [volume for volume in names if volume not in written]:
        build(missing)
        if touched := check_unchanged(store, state.stamps):  # before trials take hours
            log.warning("%s: touched during the run, its time of writing apart: the basis is built again", touched[0])
            build(list(names))
        kept.keep_inputs(state)
    stamps = _stamps_of(arm, names, store)
    log.info(
        "basis %s: %s for %d models of %d elements",
        plan.method.full_name,
        readable_bytes(sum(stamp.size for stamp in stamps.values())),
        plan.N,
        plan.D,
    )
    store.close()
    if not is_remote(arm.folder):
        return dataclasses.replace(arm, known=known), {}
    if lost := [volume_file(arm.folder, v) for v in names if v not in stamps or stamps[v].tag != written[v].tag]:
        raise RunError(
            f"{arm.folder}: wanted the basis as it was written, found other objects, or none, in the place of {some(lost)}. "
            "Fix: let nothing else write there, and go on with --resume."
        )
    return dataclasses.replace(arm, known=known), {volume_file(arm.folder, v): stamp for v, stamp in stamps.items()}


def _still_there(arm: Arm, session: Session, claimed: Mapping[int, Written], store: Store) -> list[int]:
    """Which of the volumes that an earlier run has written are what it wrote."""
    if not is_remote(arm.folder):
        answers = session.owners.ask(DigestVolumes(arm.folder), list(claimed))
        here = {volume: digest for _, answer in answers for volume, digest in answer.items()}
        return [volume for volume, one in claimed.items() if here.get(volume) == one.digest]
    return [volume for volume, stamp in _stamps_of(arm, claimed, store).items() if stamp.tag == claimed[volume].tag]


def _stamps_of(arm: Arm, volumes: Iterable[int], store: Store) -> dict[int, Stamp]:
    """Of those that are there."""

    def stamp_of(volume: int) -> Stamp | None:
        try:
            return store.stamp(volume_file(arm.folder, volume))
        except FileNotFoundError:
            return None

    with ThreadPoolExecutor(AT_ONCE) as pool:
        found = dict(zip(volumes, pool.map(stamp_of, volumes), strict=True))
    return {volume: stamp for volume, stamp in found.items() if stamp is not None}


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
    job: Job, shelf: Path, asker: Any, progress: Any, total: int, known: Mapping[str, Any]
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The records of all trials, and the best. Raises RunError if there is none with a score."""
    from pcb_ray.searching import tune

    shutil.rmtree(shelf / TUNE, ignore_errors=True)
    with watched_head():
        records = tune.run_trials(job, asker, progress, total, shelf=shelf, known=known, name=TUNE)
    if progress.best is None:
        raise RunError(
            f"search: wanted a trial with a score, found none among {len(records)}; the last: {records[-1]['error']}. "
            "Fix: mend the evaluator, then go on with --resume."
        )
    return records, progress.best


@contextlib.contextmanager
def _trials_kept(state: State[Lasting], wanted: str) -> Iterator[None]:
    """Inputs that prove wrong now cost no trials: they took long, and may tell what the user wants to know."""
    try:
        yield
    except InputError as error:
        log.warning("%s; what the trials found is kept in %s", wanted, state.place.notes)
        raise RequestError(error.problems) from error


def _store_of(run: _Run) -> Store:
    """By which the driver reads inputs and writes the output."""
    return open_store(run.state.stamps, run.job.material.storage, fence=run.state.place.fence)


def _progress(total: int, job: Job, state: State[Lasting], *, quiet: bool) -> tuple[Any, dict[str, Any]]:
    """What keeps a record of each trial as it ends, and the records of an earlier run."""
    from pcb_ray.searching import tune

    def keep(key: str, record: Mapping[str, Any]) -> None:
        state.wrote({f"trial {job.scored_by} {key}": json.dumps(record)})

    known = _known_trials(job, state)
    base = state.found["base"]["scores"][job.search.search_split][job.search.metric]
    room = tune.check_resources(job.search, job.pool)
    return tune.Ledger(total, job.search, keep, known, base=base, room=room, quiet=quiet), known


def _known_trials(job: Job, state: State[Lasting]) -> dict[str, Any]:
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


def _write_winner(run: _Run, winner: Recipe, best: Config, report: Mapping[str, bytes]) -> Receipt:
    """Merge the winner, with what is known, and put the report and all else beside it. A part that an interrupted run has written
    stays."""
    start, state, job, how = time.monotonic(), run.state, run.job, run.how
    place, arm = state.place, job.arms[_variant(winner)]
    with watched_head():
        known = arm.known if job.space.candidate(best).density is None else known_of(job, best)
    plan = plan_of(winner, run.inputs, max_shard_bytes=how.max_shard_bytes)
    label = "winner " + hashlib.sha256(json.dumps([winner.to_yaml(), known], sort_keys=True).encode()).hexdigest()[:16]
    if state.found.get("winner") != label:  # another one may have been written before the evaluator was changed
        place.start_over()
        state.found["winner"] = label
        state.save()
    store = _store_of(run)
    with placed(
        [plan],
        workers=how.workers,
        memory=how.memory,
        pool=how.pool,
        beside=output_bytes(plan, place, how.room.scratch),
        writes_to=lambda: place,
        room=_room_for_reading(how.room) if needs_room(plan, place) else None,
        quiet=how.quiet,
    ) as session:
        kept = Kept(state.found["arms"][_variant(winner)], session, start)
        with _trials_kept(state, "the winner could not be merged"):
            files = side_files(winner, plan, run.inputs.base, run.inputs.tokenizer)
            check_side_files(files, store)
            output = write_from(state.stamps, session, store, known, place.files, state, label)
            write_side_files(place.beside, report, store)
            place.take_along(run.shelf / TUNE, but=PICKLED)
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
