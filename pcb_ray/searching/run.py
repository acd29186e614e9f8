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
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pcb_ray import runtime
from pcb_ray.analysis import Run, check_twins, thresholds_of
from pcb_ray.answers import Thresholds
from pcb_ray.errors import InputError, RequestError, RunError, with_place
from pcb_ray.files.checkpoint import Checkpoint
from pcb_ray.merging import ARITHMETIC, companions, fetched_plan, merge
from pcb_ray.output.companions import RECIPE, side_files, write_side_files
from pcb_ray.output.place import check_out, check_place
from pcb_ray.output.state import State, asked_of, state_folder
from pcb_ray.planning import DEFAULT_SHARD_BYTES, Plan, basis_bytes, choose_block, method_of, worker_bytes, writer_bytes
from pcb_ray.progress import readable_bytes
from pcb_ray.recipe import Recipe
from pcb_ray.searching.evaluators import check_evaluator
from pcb_ray.searching.references import dry_score, references
from pcb_ray.searching.request import Config, Search, Space, grid_of
from pcb_ray.searching.worker import Arm, Job

log = logging.getLogger("pcb_ray")

BEST = "best_recipe.yaml"


def search(
    recipe: Recipe | Mapping[str, Any] | str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    evaluator: Any = None,
    workers: int | None = None,
    address: str | None = None,
    memory: int | None = None,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    resume: bool = False,
    overwrite: bool = False,
    quiet: bool = False,
) -> dict[str, Any]:
    """Search the coefficients that the recipe's `search:` section opens, and merge the best candidate into the directory `out`.

    `evaluator` is an object with `load` and `score` (see `search.evaluators`), instead of the one that the recipe names. `workers`, `address` and
    `memory` are for the analysis, as in `merge`. `out` also holds best_recipe.yaml, trials.parquet, report.html and the Tune experiment.

    Returns what was found: the best config, its recipe, and the scores of base, experts, start and winner on both splits. Raises RequestError if
    the request, an input or the evaluator is wrong (before the first trial), RunError if the run can't be finished; `resume` goes on with it.
    """
    start = time.monotonic()
    recipe, out = Recipe.of(recipe), Path(out)
    request = Search.of(recipe, has_evaluator=evaluator is not None)
    check_evaluator(request.evaluator, request.options, recipe.folder, request.splits)
    report, tune = _tools()

    variants = request.variants or (recipe.variant,)
    scored = request.density is not None
    how: dict[str, Any] = {
        "scored": scored,
        "address": address,
        "memory": memory,
        "resume": resume,
        "overwrite": overwrite,
        "model": True,
    }
    with _prepared(recipe, request, out, variants, evaluator, max_shard_bytes, **how) as (
        state,
        job,
    ):
        request = job.search
        tune.check_loggers(request)
        base = dry_score(job, state, quiet=quiet)
        job = _with_bases(job, state, scored, workers=workers, memory=memory, quiet=quiet)
        progress, known = _progress(request.budget, job, state, quiet=quiet)
        records, best_trial = _tried(job, state, tune.Generations(request, job.space, progress), progress, request.budget, known)
        scores, best = references(job, state, base, records, best_trial, quiet=quiet)
        winner = job.space.recipe_of(job.space.candidate(best))
        _merge_winner(winner, job, best, state, workers=workers, memory=memory, max_shard_bytes=max_shard_bytes, quiet=quiet)
        found = {
            "request": request,
            "space": job.space,
            "best": best,
            "recipe": winner,
            "scores": scores,
            "trials": len(records),
            "failed": sum(bool(r["error"]) for r in records),
            "elapsed_s": time.monotonic() - start,
        }
        found["notes"] = report.notes_of(request, job.space, found)
        report.write_search(state.staging, request, job.space, records, found)
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
    resume: bool = False,
    overwrite: bool = False,
    quiet: bool = False,
) -> dict[str, Any]:
    """Score the grid of the recipe's `sweep:` section by the evaluator of its `search:` section: one analysis per variant, nothing read again.

    `out` gets sweep.parquet, a table, a heat map and best_recipe.yaml. Returns the best point and all records. Raises as `search` does.
    """
    recipe, out = Recipe.of(recipe), Path(out)
    points = grid_of(recipe)
    asked = Search.of(recipe, has_evaluator=evaluator is not None)
    # Without an optimizer there are no generations: all points are one. And nothing is reported on a split of its own.
    request = dataclasses.replace(
        asked, lambda_=None, density=None, variants=(), optimizer="", population=len(points), report_split=""
    )
    check_evaluator(request.evaluator, request.options, recipe.folder, request.splits)
    report, tune = _tools()
    variants = tuple(dict.fromkeys(p.get("variant", recipe.variant) for p in points))
    largest = max((p["density"] for p in points if "density" in p), default=None)
    swept = recipe if largest is None else _at_density(recipe, largest)
    scored = largest is not None
    how: dict[str, Any] = {
        "scored": scored,
        "address": address,
        "memory": memory,
        "resume": resume,
        "overwrite": overwrite,
        "model": False,
    }
    with _prepared(swept, request, out, variants, evaluator, DEFAULT_SHARD_BYTES, **how) as (
        state,
        job,
    ):
        request = job.search
        tune.check_loggers(request)
        base = dry_score(job, state, quiet=quiet)
        job = _with_bases(job, state, scored, workers=workers, memory=memory, quiet=quiet)
        progress, known = _progress(len(points), job, state, quiet=quiet)
        records, best_trial = _tried(job, state, tune.Listed(points, request.mode, progress), progress, len(points), known)
        best = best_trial["config"]
        winner = job.space.recipe_of(job.space.candidate(best))
        found = {"request": request, "best": best, "recipe": winner, "base": base, "records": records}
        report.write_sweep(state.staging, request, points, records, base)
        _commit(state, winner)
    return found


def _tools() -> tuple[Any, Any]:
    """Two modules with seconds of imports, for when the request is known to be right. Raises RequestError if a library is not installed."""
    try:
        from pcb_ray.searching import report, tune
    except ImportError as error:
        raise RequestError(f"search: {error}. Fix: pip install 'pcb-ray[search]'.") from error
    return report, tune


@contextlib.contextmanager
def _prepared(
    recipe: Recipe,
    request: Search,
    out: Path,
    variants: tuple[str, ...],
    evaluator: Any,
    max_shard_bytes: int,
    *,
    scored: bool,
    resume: bool,
    overwrite: bool,
    model: bool,
    address: str | None,
    memory: int | None,
) -> Iterator[tuple[State, Job]]:
    """The state on disk, the cluster, and a job whose bases are yet to be made. `model`: whether the output is to have one."""
    from pcb_ray.searching import tune

    check_place(out)
    if (address or os.environ.get("RAY_ADDRESS") or "").startswith("ray://"):
        raise RequestError(
            "--address ray://...: a search can't run through Ray Client. Fix: `ray job submit`, or HOST:6379 on a node of the cluster."
        )
    plans = {v: fetched_plan(_analysed(recipe, request, v), max_shard_bytes) for v in variants}
    plan = next(iter(plans.values()))
    beside = sum(basis_bytes(p, scored) for p in plans.values())
    check_out(out, plan, overwrite=overwrite, resume=resume, model=model, beside=beside)
    for one in plans.values():
        choose_block(one, "cpu", memory, writer_bytes(one, scored))  # a wrong bound is told before a cluster starts
    space = Space.of(request, recipe, plan)
    tune.check_optimizer(request, space)
    _check_picklable(evaluator)
    base, tokenizer = companions(recipe)
    files = side_files(recipe, plan, base, tokenizer)
    for note in (*plan.notes, *space.notes):
        log.warning("note: %s", note)
    if len(space.groups) > 1:
        sizes = Counter(space.group_of)
        log.info("groups: %s", ", ".join(f"{name} {sizes[k]} tensors" for k, name in enumerate(space.groups)))
    if request.optimizer == "CMA" and request.budget <= request.population:
        log.warning("note: the budget is one generation, which is spread over uniform coefficients: CMA-ES begins with the second")
    asked = {
        **asked_of(plan, ARITHMETIC),
        "search": {k: v for k, v in asdict(request).items() if k not in _may_differ(request)},
    }
    with contextlib.ExitStack() as stack:
        state = stack.enter_context(State(out, asked, resume=resume, overwrite=overwrite))
        model_dir = state.folder / "model"
        _make_model_dir(model_dir, base, files)
        stack.enter_context(runtime.cluster(address))
        if request.memory is None and not request.gpu:
            request = dataclasses.replace(request, memory=model_bytes(plan))
        at_a_time = tune.check_resources(request)
        log.info("trials: up to %d at a time, each with %s", min(at_a_time, request.population), tune.shown_resources(request))
        kind = "scored" if scored else "combined"
        arms = {v: Arm(p, str(state.folder / f"basis-{v}-{kind}"), Thresholds()) for v, p in plans.items()}
        scored_by = _identity(request, recipe, evaluator)
        folder = recipe.folder.absolute() if evaluator is None else Path.cwd()
        yield state, Job(request, space, arms, str(model_dir.absolute()), str(folder), scored_by, evaluator)


def model_bytes(plan: Plan) -> int:
    """Of the model in float32, as a trial on CPUs holds it."""
    return 4 * (plan.D + sum(math.prod(c.source.shape) for c in plan.copies))


def announced(plan: Plan) -> dict[str, Any]:
    """What a search of the plan's recipe will be, as far as that is known before it: for `pcb-ray plan`. Raises RequestError."""
    recipe, section = plan.recipe, plan.recipe.search
    request = Search.of(recipe, has_evaluator=not (isinstance(section, Mapping) and "evaluator" in section))
    check_evaluator(request.evaluator, request.options, recipe.folder, request.splits)
    space = Space.of(request, recipe, plan)
    scored = request.density is not None
    recipes = [_analysed(recipe, request, variant) for variant in request.variants or (recipe.variant,)]
    plans = [dataclasses.replace(plan, recipe=one, method=method_of(one)) for one in recipes]
    return {
        "coefficients": [*space.bounds, *["variant"] * bool(space.variants)],
        "optimizer": request.optimizer,
        "budget": request.budget,
        "population": request.population,
        "basis_bytes": sum(basis_bytes(one, scored) for one in plans),
        "worker_bytes": max(worker_bytes(one, choose_block(one, "cpu", None)) + writer_bytes(one, scored) for one in plans),
        "trial_bytes": request.memory or (None if request.gpu else model_bytes(plan)),
        "notes": list(space.notes),
    }


def _may_differ(request: Search) -> tuple[str, ...]:
    """Of a request that is resumed. The candidates do not depend on it; or, of the evaluator, they are scored again."""
    budget = ("budget",) if request.optimizer == "CMA" else ()
    return (*budget, "concurrency", "cpu", "gpu", "memory", "trial_timeout_s", "loggers", "evaluator", "options")


def _analysed(recipe: Recipe, request: Search, variant: str) -> Recipe:
    """The recipe whose thresholds serve all candidates: at the largest mask ratio."""
    if request.density is not None:
        recipe = _at_density(recipe, request.density.upper)
    return dataclasses.replace(recipe, search=None, sweep=None, variant=variant)


def _at_density(recipe: Recipe, density: float) -> Recipe:
    """The recipe with one mask ratio for all models."""
    return dataclasses.replace(recipe, models=tuple(dataclasses.replace(m, density=None) for m in recipe.models), density=density)


def _identity(request: Search, recipe: Recipe, evaluator: Any) -> str:
    """Tells an evaluator from what it was before it was changed, as far as its name, its options and its own source do."""
    if evaluator is not None:
        name = type(evaluator).__qualname__
        try:
            source = inspect.getsource(type(evaluator))
        except (OSError, TypeError):
            source = ""  # typed into a prompt
    else:
        name, file = request.evaluator, request.evaluator.rpartition(":")[0]
        path = recipe.folder / (file if file.endswith(".py") else file.replace(".", "/") + ".py")
        source = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    # On a GPU models are scored in another dtype.
    told = json.dumps([name, request.options, source, bool(request.gpu)], sort_keys=True, default=str)
    return hashlib.sha256(told.encode()).hexdigest()[:16]


def _check_picklable(evaluator: Any) -> None:
    """Raises RequestError for an evaluator that can't be sent to workers."""
    from ray import cloudpickle

    try:
        cloudpickle.dumps(evaluator)
    except Exception as error:  # whatever its __getstate__ raises
        raise RequestError(
            f"search.evaluator: {type(evaluator).__name__} can't be sent to the workers: {with_place(error)}. Fix: open files, "
            "connections and models in `load`, which each worker calls."
        ) from error


def _make_model_dir(folder: Path, base: Checkpoint, files: Mapping[str, bytes]) -> None:
    """The base as an evaluator loads it: its weights by link, with the config and tokenizer that the merge will have."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    weights = [Path(f.path) for f in base.files]
    if base.folder is None:
        (folder / f"model{weights[0].suffix}").symlink_to(weights[0].absolute())
    else:
        for path in (*weights, *base.folder.glob("*.index.json")):
            link = folder / path.relative_to(base.folder)  # where the index says; that may be in a subfolder
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(path.absolute())
    write_side_files(folder, {n: d for n, d in files.items() if n != RECIPE and not n.endswith(".index.json")})


# --- the steps ----------------------------------------------------------------------------------------------------------------------


def _with_bases(job: Job, state: State, scored: bool, *, workers: int | None, memory: int | None, quiet: bool) -> Job:
    """The job with a basis for each variant: analysed and built, or taken from an earlier run."""
    arms = {v: _with_basis(arm, state, v, scored, workers=workers, memory=memory, quiet=quiet) for v, arm in job.arms.items()}
    return dataclasses.replace(job, arms=arms)


def _with_basis(arm: Arm, state: State, variant: str, scored: bool, *, workers: int | None, memory: int | None, quiet: bool) -> Arm:
    from pcb_ray.searching.basis import chunk_file

    plan, folder = arm.plan, Path(arm.folder)
    folder.mkdir(exist_ok=True)
    found: dict[str, Any] = state.found.setdefault("arms", {}).setdefault(variant, {})
    beside = writer_bytes(plan, scored)
    block = choose_block(plan, "cpu", memory, beside)
    needed = worker_bytes(plan, block) + beside
    owners = runtime.RayOwners(
        *(plan, str(folder)),
        workers=runtime.choose_workers(workers, "cpu", needed, plan.chunks),
        device="cpu",
        worker_bytes=needed,
        block_elements=block,
    )
    try:
        owners.wait_until_ready()
        run = Run(plan, owners, quiet=quiet)
        run.inputs = found.get("inputs", [])
        if not found:
            check_twins(run)

        def keep(thresholds: Thresholds) -> None:
            found.update(
                thresholds=thresholds.to_json(), inputs=run.inputs, sweeps=found.get("sweeps", []) + [asdict(s) for s in run.sweeps]
            )
            run.sweeps.clear()
            state.save()

        thresholds = thresholds_of(run, Thresholds.from_json(found.get("thresholds", {})), keep)
        names = {chunk: f"{folder.name} {chunk}" for chunk in range(plan.chunks)}
        earlier = [chunk for chunk, name in names.items() if name in state.journal]
        here = {chunk: digest.hex() for _, part in owners.ask("basis_digests", earlier) for chunk, digest in part.items()}
        missing = [chunk for chunk, name in names.items() if chunk not in here or state.journal[name] != here[chunk]]
        for _, built in run.sweep("basis", "basis", thresholds, scored, chunks=missing, how="store") if missing else ():
            state.wrote({names[chunk]: digest.hex() for chunk, (_, digest) in built.items()})
    finally:
        owners.close()
    size = sum(chunk_file(folder, chunk).stat().st_size for chunk in range(plan.chunks))
    log.info("basis %s: %s for %d models of %d elements", variant, readable_bytes(size), plan.N, plan.D)
    return dataclasses.replace(arm, thresholds=thresholds)


def _tried(
    job: Job, state: State, asker: Any, progress: Any, total: int, known: Mapping[str, Any]
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The records of all trials, and the best. Raises RunError if there is none with a score."""
    from pcb_ray.searching import tune

    shutil.rmtree(state.folder / "tune", ignore_errors=True)
    records = tune.run_trials(job, asker, progress, total, storage=state.folder, known=known, name="tune")
    if progress.best is None:
        raise RunError(f"none of {len(records)} trials has a score; the last: {records[-1]['error']}")
    return records, progress.best


def _commit(state: State, winner: Recipe) -> None:
    """Add what search and sweep both leave, and give the output its name."""
    (state.staging / BEST).write_text(winner.resolved().to_yaml())
    for pickled in (state.folder / "tune").rglob("*.pkl"):
        pickled.unlink()  # for Tune to go on with; they hold the evaluator's options, whatever these may be
    shutil.rmtree(state.staging / "tune", ignore_errors=True)  # of an earlier run, whose output could not have its name
    (state.folder / "tune").rename(state.staging / "tune")
    state.commit()


def _progress(total: int, job: Job, state: State, *, quiet: bool) -> tuple[Any, dict[str, Any]]:
    """What keeps a record of each trial as it ends, and the records of an earlier run."""
    from pcb_ray.searching import tune

    def keep(key: str, record: Mapping[str, Any]) -> None:
        state.wrote({f"trial {job.scored_by} {key}": json.dumps(record)})

    known = _known_trials(job, state)
    base = state.found["base"]["scores"][job.search.search_split][job.search.metric]
    return tune.Progress(total, job.search, keep, known, base=base, room=tune.check_resources(job.search), quiet=quiet), known


def _known_trials(job: Job, state: State) -> dict[str, Any]:
    """The trials of an earlier run that had a score, and those without one that later generations have been told of: scored now, they would change
    what was asked since. What the evaluator scored before it was changed is not known any more."""
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


def _merge_winner(winner: Recipe, job: Job, best: Config, state: State, *, max_shard_bytes: int, **options: Any) -> None:
    """The ordinary merge of the winner into the staging folder. It knows the thresholds already, as a resumed merge does."""
    from pcb_ray.searching.basis import Basis

    place = state.folder / "winner"
    for leftover in (place, state_folder(place)):
        shutil.rmtree(leftover, ignore_errors=True)
    candidate = job.space.candidate(best)
    arm = job.arms[winner.variant]
    thresholds = Basis(arm.plan, arm.folder, arm.thresholds).thresholds(candidate.density)
    found = state.found["arms"][winner.variant]
    plan = fetched_plan(winner, max_shard_bytes)
    if found:
        with State(place, asked_of(plan, ARITHMETIC), resume=False) as merging:
            merging.found = {"thresholds": thresholds.to_json(), "inputs": found["inputs"], "sweeps": found["sweeps"]}
            merging.save()
    try:
        merge(winner, place, max_shard_bytes=max_shard_bytes, resume=bool(found), **options)
    except InputError as error:  # that would forget all trials
        raise RunError(f"the winner can't be merged: {error}. What the trials found is kept in {state.folder}") from error
    shutil.rmtree(state.staging, ignore_errors=True)
    place.rename(state.staging)
