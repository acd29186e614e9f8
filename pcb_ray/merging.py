"""`merge`: the models of a recipe into one directory."""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from typing import Any

from pcb_ray.analysis import analyse, differing
from pcb_ray.budget import choose_block
from pcb_ray.claims import differences
from pcb_ray.cluster import check_cluster, cluster
from pcb_ray.errors import RequestError
from pcb_ray.files.objects import HUB_SCHEME, upload_bytes
from pcb_ray.files.room import Room
from pcb_ray.files.store import is_remote
from pcb_ray.files.stores import open_store
from pcb_ray.methods import Known
from pcb_ray.nodes import Pool
from pcb_ray.output.companions import check_side_files, side_files
from pcb_ray.output.place import place_of
from pcb_ray.output.state import Place, State, asked_of
from pcb_ray.planning import DEFAULT_SHARD_BYTES, Inputs, Plan, fetched, open_inputs, plan_of, related
from pcb_ray.questions import shown_digest
from pcb_ray.receipt import Receipt, Sweep
from pcb_ray.recipe import Recipe
from pcb_ray.relation import Relation, notes_on
from pcb_ray.session import Session
from pcb_ray.steps import ARITHMETIC, Spent, placed, publish, write_from
from pcb_ray.tied import Apart

log = logging.getLogger("pcb_ray")


def merge(
    recipe: Recipe | Mapping[str, Any] | str | os.PathLike[str],
    out: str | os.PathLike[str],
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
    state: str = "",
    pull_request: bool = False,
    quiet: bool = False,
) -> Receipt:
    """Merge the recipe's models into `out` on Ray, a directory, a prefix in an object store (`s3://bucket/merged`) or a repository
    on the Hub (`hf://org/name@branch`), and return the receipt (also in `out`/pcb_receipt.json).

    The output's bytes are a function of the inputs and the recipe: neither `workers`, `memory` (bytes of anonymous memory per
    worker), `device` nor a lost worker shows in them. A directory appears only when whole; what lies in a store is whole when its
    receipt is there; on the Hub it is one commit, or with `pull_request` a pull request. A run that was killed goes on with
    `resume=True`. Its state lies beside `out`; of one to the Hub in `state`, a folder or a prefix (else beside the recipe).

    Without `workers` there is one for each core (GPU) of the cluster, and more as nodes join. `labels` say which nodes may work,
    with values as Ray's label selectors have them; `resources` are what of custom ones each worker takes.

    What is fetched from object stores each node keeps for later sweeps: in `cache` bytes of memory (None: half of what is free),
    then in at most `scratch_bytes` of the folder `scratch`, if one is named.

    A method of one's own that a recipe's file names is run if it is a file in or below the recipe's folder; with `allow_code` it
    may lie anywhere, or be a module. What a mapping or a Recipe names is the caller's own.

    Raises RequestError if the request or an input is wrong (before anything is written), RunError if the run can't be finished.
    """
    start = time.monotonic()
    recipe, pool = Recipe.of(recipe, allow_code=allow_code), Pool(labels or {}, resources or {})
    near = recipe.prefix or recipe.folder
    place = place_of(out, recipe.storage, overwrite=overwrite, state=state, beside=near, pull_request=pull_request)
    room = Room.for_a_run(cache, scratch, scratch_bytes)
    check_cluster(address)
    before = merged_before(recipe, place, max_shard_bytes) if resume else ()
    if isinstance(before, Receipt):
        return before

    def check(plan: Plan) -> None:
        try:
            place.check(plan, resume=resume)
        except RequestError as error:
            raise RequestError([*error.problems, *before]) from None

    inputs, plan = opened(recipe, max_shard_bytes, check)
    beside = writer_bytes(plan, place, scratch)
    if memory is not None:
        choose_block(plan, "cpu", memory, beside)  # a wrong bound is told before a cluster starts
    for note in () if resume and place.is_unfinished else plan.notes:  # told when it began
        log.warning("note: %s", note)
    stamps = plan.stamps
    asked, files = asked_of(plan, ARITHMETIC, stamps), [file.name for file in plan.files]
    with (
        State(place, asked, stamps, files, resume=resume) as begun,
        cluster(address),
        placed(
            [plan],
            workers=workers,
            device=device,
            memory=memory,
            pool=pool,
            beside=beside,
            writes_to=lambda: place,
            room=room if needs_room(plan, place) else None,
            quiet=quiet,
        ) as session,
    ):
        return merged(session, begun, inputs, max_shard_bytes, start)


def merged(session: Session, state: State[Place], inputs: Inputs, max_shard_bytes: int, start: float) -> Receipt:
    """Take the steps of the plan that the session has begun, from the analysis to the published output. `start` is when the merge
    was asked for, on the monotonic clock."""
    startup_s = time.monotonic() - start
    recipe = session.plan.recipe
    store = open_store(session.plan.stamps, recipe.storage, fence=state.place.fence)
    kept = Kept(state.found, session, start)
    kept.settle(inputs, lambda inputs: plan_of(recipe, inputs, max_shard_bytes=max_shard_bytes), state)
    files = side_files(recipe, session.plan, inputs.base, inputs.tokenizer)
    check_side_files(files, store)
    known = kept.analysed(state)
    output = write_from(state.stamps, session, store, known, state.place.files, state)
    return publish(
        session,
        state,
        store,
        known,
        output,
        files,
        sweeps=kept.sweeps(),
        spent=kept.spent(),
        max_shard_bytes=max_shard_bytes,
        startup_s=startup_s,
        resumed=state.resumed,
    )


def merged_before(recipe: Recipe, place: Place, max_shard_bytes: int) -> Receipt | tuple[str, ...]:
    """The receipt of the output if this very merge lies there already, which is said; else why what is there is another one."""
    if not place.is_there or (place.is_unfinished and not place.is_left_over):
        return ()
    out, store = place.reads, open_store(storage=recipe.storage)
    try:
        receipt = Receipt.of(out, store)
        found = differences(recipe, out, receipt, max_shard_bytes, store)
    except RequestError as error:
        found = list(error.problems)
    if found:
        return tuple(f"--resume: {out} is not this very merge: {one}" for one in found)
    if place.is_left_over:
        place.tidy()
    log.warning("%s: is this very merge already, and nothing was done", out)
    return receipt


def opened(
    recipe: Recipe, max_shard_bytes: int, check: Callable[[Plan], None], like: tuple[Inputs, Plan] | None = None
) -> tuple[Inputs, Plan]:
    """The inputs and the plan; if it is sound, and stands a check, with the models of the Hub fetched. `like` is the answer for a
    recipe of the same models: they are not opened again, nor compared where the plans read the same."""
    inputs = like[0] if like else open_inputs(recipe)
    plan = plan_of(recipe, inputs, max_shard_bytes=max_shard_bytes)
    check(plan)
    if like and (relation := like[1].relation) and plan.reads == like[1].reads:
        return inputs, replace(plan, relation=relation, notes=(*plan.notes, *notes_on(plan, relation)))
    if inputs.on_hub and not like:
        inputs = fetched(recipe, inputs)
        plan = plan_of(recipe, inputs, max_shard_bytes=max_shard_bytes)
    with contextlib.closing(open_store(storage=recipe.storage)) as store:
        return inputs, related(plan, store)


def settled(session: Session, inputs: Inputs, replan: Callable[[Inputs], Plan]) -> Inputs:
    """The inputs with the copies that differ after all, which the sample of the plan has missed. If there are any, the session goes
    on with a plan that has them apart, and says so. Raises InputError, or RequestError if they can't be merged so."""
    while found := differing(session):
        before = session.plan
        for one in sorted(found):
            source = before.inputs[one.input].source
            log.warning("note: %s: %s differs from %s after all: they are merged apart", source, one.copy, one.original)
        inputs = replace(inputs, apart=inputs.apart | found)
        session.begin(replace(replan(inputs), relation=before.relation))
        for note in session.plan.notes:
            if note not in before.notes:
                log.warning("note: %s", note)
    return inputs


def needs_room(plan: Plan, place: Place) -> bool:
    """Whether machines keep anything for a while: what they have fetched, or a file that is yet to be sent to the Hub."""
    return plan.is_remote or place.files.startswith(HUB_SCHEME)


def writer_bytes(plan: Plan, place: Place, scratch: str) -> int:
    """What a worker takes to write there, beside the work itself. A file for the Hub lies in memory whole, if there is no
    scratch."""
    largest = max(file.size for file in plan.files)
    if place.files.startswith(HUB_SCHEME):
        return 0 if scratch else largest
    return upload_bytes(largest) if is_remote(place.files) else 0


class Kept:
    """What the analysis of a plan has found and taken, in a table that the state keeps: a run that is resumed goes on from
    there."""

    def __init__(self, found: dict[str, Any], session: Session, start: float) -> None:
        self._found, self._session, self._start = found, session, start
        self._earlier = [Sweep(**sweep) for sweep in found.get("sweeps", [])]
        self._spent = Spent(**found.get("spent", {}))
        if "inputs" in found:
            session.inputs = tuple(int(digest, 16) for digest in found["inputs"])
        if (one := found.get("relation")) is not None:
            session.relation = Relation.from_json(one)

    def settle(self, inputs: Inputs, replan: Callable[[Inputs], Plan], state: State[Place]) -> None:
        """`settled`, as far as an earlier run has not; what it reads counts."""

        def replanned(inputs: Inputs) -> Plan:
            spent = self._spent.with_session(self._session, self._start)  # the session forgets it with the plan
            self._spent = replace(spent, elapsed_s=self._spent.elapsed_s)
            return replan(inputs)

        if "thresholds" not in self._found and "apart" not in self._found:
            known = settled(self._session, inputs, replanned)
            if known.apart:
                state.found["apart"] = [asdict(one) for one in sorted(known.apart)]
                state.save()
        elif apart := frozenset(Apart(**one) for one in self._found.get("apart", ())):
            self._session.begin(replace(replan(replace(inputs, apart=apart)), relation=self._session.plan.relation))

    def analysed(self, state: State[Place]) -> Known:
        """What the method must know; each pass is kept as soon as it is found. Raises InputError as `analyse` does."""
        known = {name: tuple(values) for name, values in self._found.get("thresholds", {}).items()}

        def keep(known: Known) -> None:
            self._found.update(
                thresholds=dict(known),
                inputs=[shown_digest(digest) for digest in self._session.inputs],
                relation=None if self._session.relation is None else asdict(self._session.relation),
                sweeps=[asdict(sweep) for sweep in self.sweeps()],
                spent=asdict(self.spent()),
            )
            state.save()

        return analyse(self._session, known, keep)

    def keep_inputs(self, state: State[Place]) -> None:
        """Keep what a sweep has seen of the inputs, which may be the first one."""
        self._found["inputs"] = [shown_digest(digest) for digest in self._session.inputs]
        state.save()

    def sweeps(self) -> list[Sweep]:
        return self._earlier + self._session.sweeps

    def spent(self) -> Spent:
        return self._spent.with_session(self._session, self._start)
