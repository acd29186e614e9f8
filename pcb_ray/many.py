"""`merge_many`: several recipes, and grids of them, each to a folder of its own, by one pool of owners.

Each merge is what `merge` makes of its recipe: it has a state, a lock and a receipt of its own, and none takes another along. What
costs is shared: models are opened and compared once, and merges that read the same follow each other, so that what the analysis of
one has found serves all that it holds for."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pcb_ray.budget import choose_block, worker_bytes
from pcb_ray.cluster import check_cluster, cluster
from pcb_ray.errors import RequestError, RunError
from pcb_ray.files.foreign import some
from pcb_ray.files.room import Room
from pcb_ray.files.store import as_path, is_remote
from pcb_ray.files.stores import open_store
from pcb_ray.grid import MAX_POINTS, points_of
from pcb_ray.merging import merged, merged_before, needs_room, opened, writer_bytes
from pcb_ray.nodes import Needs, Pool, autoscales, choose_device, choose_workers
from pcb_ray.output.folder import Folder, existing_parent
from pcb_ray.output.place import check_into, inside, place_of
from pcb_ray.output.state import Place, State, asked_of
from pcb_ray.planning import DEFAULT_SHARD_BYTES, Inputs, Plan
from pcb_ray.receipt import Receipt
from pcb_ray.recipe import Recipe
from pcb_ray.session import Session
from pcb_ray.steps import ARITHMETIC, check_unchanged, placed

log = logging.getLogger("pcb_ray")

Asked = Recipe | Mapping[str, Any] | str | os.PathLike[str]


@dataclass(frozen=True)
class Merged:
    """What became of one of several merges: it has a receipt, or it failed."""

    receipt: Receipt | None = None
    failure: RequestError | RunError | None = None
    before: bool = False
    """It lay there already, and nothing was done."""
    elapsed_s: float = 0.0
    bytes_read: int = 0
    """Of the inputs, in this run."""

    @property
    def state(self) -> str:
        if self.failure is None:
            return "done before" if self.before else "done"
        return "wrong" if isinstance(self.failure, RequestError) else "failed"


def merge_many(
    recipes: Mapping[str, Asked] | Sequence[str | os.PathLike[str]] | str | os.PathLike[str],
    into: str | os.PathLike[str],
    *,
    workers: int | None = None,
    device: str = "cpu",
    address: str | None = None,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
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
) -> dict[str, Merged]:
    """Merge each recipe into `into`/NAME (`into` is a folder, or a prefix in an object store), and each point of a recipe's grid
    into `into`/NAME/KEY=VALUE,...; what became of them by NAME or NAME/KEY=VALUE,..., in sorted order. Names are those of a
    mapping, or those of the files without their endings.

    All is as in `merge`, for each of them. What is wrong with one is told before anything is computed, and the others are merged
    nevertheless.

    Raises RequestError if names are equal or not all fits on the disk, RunError if there is no cluster."""
    start = time.monotonic()
    if isinstance(recipes, str | os.PathLike):
        recipes = [recipes]
    into, pool = as_path(os.fspath(into)), Pool(labels or {}, resources or {})
    check_into(into)
    check_cluster(address)
    room = Room.for_a_run(cache, scratch, scratch_bytes)
    how = _How(into, max_shard_bytes, memory, device, workers, pool, room, resume=resume, overwrite=overwrite, quiet=quiet)
    results, told = dict[str, Merged](), set[str]()
    todo = _ordered(_opened(_recipes(recipes, allow_code, results), how, results))
    _check_room(todo, into)
    with _begun(todo, how, results) as begun:
        _tell(results, told)
        if begun:
            with cluster(address):
                fitting = _with_room(begun, how, results)
                _tell(results, told)
                _merge_all(fitting, how, results, start)
    return dict(sorted(results.items()))


@dataclass(frozen=True)
class _How:
    into: str
    max_shard_bytes: int
    memory: int | None
    device: str
    workers: int | None
    pool: Pool
    room: Room
    resume: bool
    overwrite: bool
    quiet: bool


@dataclass
class _One:
    """A merge that is to be done."""

    name: str
    place: Place
    inputs: Inputs
    plan: Plan
    state: State[Place] | None = None


# --- before anything is computed --------------------------------------------------------------------------------------------------


def _tell(results: Mapping[str, Merged], told: set[str]) -> None:
    """Say which of them can't be merged, and why: once for all that have the same reason."""
    names: dict[str, list[str]] = {}
    for name, one in results.items():
        if name not in told and one.failure is not None:
            names.setdefault(f"{one.state}: {one.failure}", []).append(name)
    for reason, of in names.items():
        log.warning("%s: %s", some(of), reason)
    told |= set(results)


def _recipes(
    recipes: Mapping[str, Asked] | Sequence[str | os.PathLike[str]], allow_code: bool, results: dict[str, Merged]
) -> dict[str, Recipe]:
    """All recipes by name, in sorted order; those that are wrong are among the results."""
    named = list(recipes.items()) if isinstance(recipes, Mapping) else [(Path(one).stem, one) for one in recipes]
    names = [name for name, _ in named]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise RequestError(
            f"{', '.join(twice)}: wanted recipes of different names, found {names.count(twice[0])} of {twice[0]!r}, which would be "
            "merged into one folder. Fix: rename a file, or merge them into different folders."
        )
    if odd := [name for name in names if not name or name in (".", "..") or "/" in name or "\0" in name]:
        raise RequestError(f"{odd[0]!r}: wanted a name for a folder, found none. Fix: rename it.")
    found: dict[str, Recipe] = {}
    for name, asked in sorted(named, key=lambda one: one[0]):
        try:
            for point, recipe in sorted(points_of(asked, allow_code=allow_code).items()):
                full = f"{name}/{point}" if point else name
                if isinstance(recipe, RequestError):
                    results[full] = Merged(failure=recipe)
                else:
                    found[full] = recipe
        except RequestError as error:
            results[name] = Merged(failure=error)
    if len(found) > MAX_POINTS:
        raise RequestError(f"wanted at most {MAX_POINTS} merges in one job, found {len(found)}. Fix: do it in several jobs.")
    return found


def _opened(recipes: Mapping[str, Recipe], how: _How, results: dict[str, Merged]) -> list[_One]:
    """Those that are to be merged, with their plans. Those that are wrong, or there already, are among the results."""
    found: list[_One] = []
    like: dict[object, tuple[Inputs, Plan]] = {}
    told: set[str] = set()
    for name, recipe in recipes.items():
        try:
            place = place_of(inside(how.into, name), recipe.storage, overwrite=how.overwrite, beside=recipe.prefix or recipe.folder)
            before = merged_before(recipe, place, how.max_shard_bytes) if how.resume else ()
            if isinstance(before, Receipt):
                results[name] = Merged(before, before=True)
                continue

            def check(plan: Plan, place: Place = place, before: tuple[str, ...] = before) -> None:
                try:
                    place.check(plan, resume=how.resume)
                except RequestError as error:
                    raise RequestError([*error.problems, *before]) from None

            models = _models_of(recipe)
            like[models] = inputs, plan = opened(recipe, how.max_shard_bytes, check, like.get(models))
            if how.memory is not None:
                choose_block(plan, "cpu", how.memory, writer_bytes(plan, place, how.room.scratch))
        except RequestError as error:
            results[name] = Merged(failure=error)
            continue
        found.append(_One(name, place, inputs, plan))
        notes = () if how.resume and place.is_unfinished else plan.notes  # told when it began
        for note in notes:
            if note not in told:
                log.warning("note: %s: %s", name, note)
        told.update(notes)
    return found


def _models_of(recipe: Recipe) -> object:
    """What decides which checkpoints are opened, and what is noted of them."""
    sources = recipe.base_model, tuple(model.source for model in recipe.models), recipe.tokenizer_source
    return recipe.folder.absolute(), sources, recipe.method.has_base, recipe.allow_unrelated


def _ordered(todo: Sequence[_One]) -> list[_One]:
    """Those that read the same one after another: a session forgets what it has found when it goes on to other models."""
    groups: list[tuple[object, list[_One]]] = []
    for one in todo:
        read = one.plan.reads
        group = next((group for of_group, group in groups if of_group == read), None)
        if group is None:
            groups.append((read, group := []))
        group.append(one)
    return [one for _, group in groups for one in group]


def _check_room(todo: Sequence[_One], into: str) -> None:
    """Raises RequestError if all of them together don't fit on a disk."""
    if is_remote(into):
        return
    needed = sum(one.plan.written_bytes + sum(file.size for file in one.plan.along) for one in todo)
    there = sum(one.place.bytes_there for one in todo if isinstance(one.place, Folder))
    parent = existing_parent((Path(into) / "any").resolve())
    free = shutil.disk_usage(parent).free
    if free + there < needed:
        raise RequestError(
            f"{into}: the {len(todo)} merges need {needed:,} bytes, found {free:,} free in {parent}. Fix: free some, write "
            "elsewhere, or merge fewer of them."
        )


@contextlib.contextmanager
def _begun(todo: Sequence[_One], how: _How, results: dict[str, Merged]) -> Iterator[list[_One]]:
    """Those whose state could be begun, and is locked until they are done. What had no turn leaves nothing behind."""
    begun: list[_One] = []
    try:
        for one in todo:
            stamps = one.plan.stamps
            asked = asked_of(one.plan, ARITHMETIC, stamps)
            try:
                one.state = State(one.place, asked, stamps, [file.name for file in one.plan.files], resume=how.resume)
            except RequestError as error:
                results[one.name] = Merged(failure=error)
            else:
                begun.append(one)
        yield list(begun)
    finally:
        for one in begun:
            if one.state is not None and one.name not in results:
                if one.state.found or one.state.journal:
                    one.state.close()
                else:
                    one.state.discard()
            if "/" in one.name and isinstance(one.place, Folder):
                with contextlib.suppress(OSError):
                    Path(one.place.out).parent.rmdir()  # of a grid of which nothing is there


# --- the merges -------------------------------------------------------------------------------------------------------------------


def _with_room(todo: Sequence[_One], how: _How, results: dict[str, Merged]) -> list[_One]:
    """Those whose workers the cluster has room for; the others are among the results."""
    found = []
    for one in todo:
        try:
            device = choose_device(how.device, how.pool)
            beside = writer_bytes(one.plan, one.place, how.room.scratch)
            needed = worker_bytes(one.plan, choose_block(one.plan, device, how.memory, beside)) + beside
            if not autoscales():
                choose_workers(how.workers, Needs(device, needed, how.pool), one.plan.chunks)
        except RequestError as error:
            results[one.name] = _given_up(one, error)
        else:
            found.append(one)
    return found


def _merge_all(todo: Sequence[_One], how: _How, results: dict[str, Merged], start: float) -> None:
    """Merge them in this order. A run that fails ends its owners, and the next merge gets new ones."""
    left, earlier = list(todo), None
    while left:
        try:
            with placed(
                [one.plan for one in left],
                workers=how.workers,
                device=how.device,
                memory=how.memory,
                pool=how.pool,
                beside=max(writer_bytes(one.plan, one.place, how.room.scratch) for one in left),
                writes_to=lambda: _state_of(left[0]).place,
                room=how.room if any(needs_room(one.plan, one.place) for one in left) else None,
                quiet=how.quiet,
            ) as session:
                if earlier is not None:
                    session.take_over(earlier)
                earlier, sound = session, True
                while left and sound:
                    name = left[0].name
                    level = logging.INFO if how.quiet else logging.WARNING
                    log.log(level, "%s: merge %d of %d", name, len(todo) - len(left) + 1, len(todo))
                    results[name] = found = _merged(left[0], session, how, start)
                    left.pop(0)
                    _tell({name: found}, set())
                    start, sound = time.monotonic(), not isinstance(found.failure, RunError)
        except (RequestError, RunError) as error:  # what owners found when they were placed for the first one
            one = left.pop(0)
            results[one.name] = _given_up(one, error)
            _tell({one.name: results[one.name]}, set())


def _state_of(one: _One) -> State[Place]:
    if one.state is None:
        raise AssertionError(f"{one.name} was not begun")
    return one.state


def _given_up(one: _One, failure: RequestError | RunError) -> Merged:
    """It had no turn. Its state goes, unless there is work in it."""
    with contextlib.suppress(RequestError, RunError), _state_of(one):
        raise failure
    return Merged(failure=failure)


def _merged(one: _One, session: Session, how: _How, start: float) -> Merged:
    """Merge it, whatever comes of it."""
    receipt, failure = None, None
    try:
        with _state_of(one) as state:
            session.begin(one.plan)
            check_unchanged(open_store(storage=one.plan.recipe.storage), state.stamps)  # the merges before it may have taken hours
            receipt = merged(session, state, one.inputs, how.max_shard_bytes, start)
    except (RequestError, RunError) as error:
        failure = error
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        failure = RunError(f"{where}{error.strerror or error}. Fix: look after the disk and the rights there, then --resume.")
    read = sum(state.bytes_read for state in session.owners.states)
    return Merged(receipt, failure, elapsed_s=time.monotonic() - start, bytes_read=read)
