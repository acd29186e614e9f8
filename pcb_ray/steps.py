"""A merge in steps that can be taken one at a time:

    open_inputs  recipe                -> Inputs    (planning)  every checkpoint, headers only
    plan_of      recipe, inputs        -> Plan      (planning)  what will happen
    analyse      session               -> Known     (analysis)  what the method must know of the whole model
    write        session, known        -> Output                the tensors of the output, part by part
    publish      state, output, files  -> Receipt               the files beside them, and the output's name

`merge`, `verify`, `search`, `sweep` and `merge_state_dicts` are made from these. Several recipes over one session share what their
plans share:

    with cluster(address), placed([plan_of(r, inputs) for r in recipes], ...) as session:
        for recipe in recipes:
            session.begin(plan_of(recipe, inputs))
            known = analyse(session)
            write(session, open_store(), known, folder_of(recipe))
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import logging
import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace

from pcb_ray.budget import choose_block, worker_bytes
from pcb_ray.errors import InputError, RunError
from pcb_ray.files.objects import is_object
from pcb_ray.files.room import Room
from pcb_ray.files.store import Pins, Stamp, Store, changed, is_remote
from pcb_ray.methods import Known
from pcb_ray.nodes import Needs, Pool, choose_device, choose_workers, enough_nodes
from pcb_ray.output.companions import CARD, SideFile, model_card, write_side_files
from pcb_ray.output.state import Place, State
from pcb_ray.planning import Plan
from pcb_ray.progress import ByteBar, readable_bytes
from pcb_ray.questions import (
    Digest,
    DigestParts,
    Gram,
    OwnerState,
    WriteFiles,
    WriteParts,
    Written,
    gram_of,
    inputs_of,
    shown_digest,
    sum_of,
)
from pcb_ray.receipt import RECEIPT, VERSION, Receipt, Sweep, WrittenFile, inputs_of_receipt, names_of_inputs
from pcb_ray.session import Session

log = logging.getLogger("pcb_ray")

AT_ONCE = 16  # files that are looked at: over a network each takes a while

# The arithmetic of the methods: receipts name it, and a resumed or verified merge must have been made with the same one.
ARITHMETIC = "ieee-2"


@contextlib.contextmanager
def placed(
    plans: Sequence[Plan],
    *,
    workers: int | None,
    device: str = "cpu",
    memory: int | None = None,
    pool: Pool = Pool(),  # noqa: B008 - it is frozen
    beside: int = 0,
    writes_to: Callable[[], Place],
    room: Room | None = None,
    quiet: bool,
) -> Iterator[Session]:
    """Owners on the cluster that was joined, with room for each of the plans and `beside` more bytes; the session begins with the
    first plan. `writes_to` gives the place of the output whenever a plan is begun, which owners must be able to write to.

    Raises RequestError if the cluster has no room for them."""
    from pcb_ray.runtime import RayOwners  # and Ray

    device = choose_device(device, pool)
    blocks = {id(plan): choose_block(plan, device, memory, beside) for plan in plans}
    needed = max(worker_bytes(plan, blocks[id(plan)]) for plan in plans) + beside
    needs, chunks = Needs(device, needed, pool), max(plan.chunks for plan in plans)
    with enough_nodes(workers, needs):
        chosen = choose_workers(workers, needs, chunks)
        log.info("%d workers on %s, at most %s each", chosen, device, readable_bytes(needed))
        owners = RayOwners(workers=chosen, needs=needs, at_most=workers or chunks, room=room)

        def owners_for(plan: Plan) -> RayOwners:
            place = writes_to()
            owners.use(plan, blocks.get(id(plan)) or choose_block(plan, device, memory, beside), place.tried, place.fence)
            return owners

        try:
            session = Session(plans[0], owners_for, worker_bytes=needed, quiet=quiet, relate=True)
            owners.wait_until_ready()
            announced: dict[str, int] = {}
            if room is not None and plans[0].is_remote:
                announced = {state.node: state.room for state in owners.states}
                _tell_of_room(plans[0], announced)
            yield session
            _tell_of_full_nodes(announced, owners.states)
        finally:
            owners.close()


def _tell_of_room(plan: Plan, of_node: Mapping[str, int]) -> None:
    """Whether each byte of the inputs crosses the network once."""
    kept, wanted = sum(of_node.values()), plan.sweep_bytes
    log.info("inputs of %s are fetched; %d nodes keep up to %s of them", readable_bytes(wanted), len(of_node), readable_bytes(kept))
    if kept < wanted:
        log.warning(
            "note: inputs of %s are fetched, and the nodes have room for %s: the rest is fetched again by each of %d passes. "
            "--scratch DIR (a folder on a disk of each node) or more nodes make room",
            readable_bytes(wanted),
            readable_bytes(kept),
            plan.method.passes_over_inputs,
        )


def _tell_of_full_nodes(announced: Mapping[str, int], states: Sequence[OwnerState]) -> None:
    """Which nodes could keep less than they had room for when the run began."""
    for node, room in announced.items():
        kept = min((state.room for state in states if state.node == node and state.fetched), default=room)
        if kept == room:
            continue
        log.warning(
            "note: node %s could keep %s of what was fetched, not %s, since its memory or --scratch was filled by others: the rest "
            "was fetched again",
            node,
            readable_bytes(kept),
            readable_bytes(room),
        )


@dataclass(frozen=True)
class Output:
    """What was written: the digest of all parts, and of each input that of the bytes that they were made from; of files that were
    written whole, what the store calls them."""

    digest: Digest
    inputs: tuple[Digest, ...]
    tags: Mapping[str, str] = field(default_factory=dict)


def write(
    session: Session, store: Store, known: Known, folder: str, state: State[Place] | None = None, label: str = "part"
) -> Output:
    """Merge into the files of `folder`, or below a prefix of an object store. The journal of `state`, if there is one, remembers
    each part (or file) under `label`, and what it remembers is not written again if it is still there.

    Raises InputError if the inputs are no longer what the analysis has read."""
    if is_remote(folder):
        written, gram = _write_files(session, known, folder, state, label)
    else:
        written, gram = _write_parts(session, store, known, folder, state, label)
    inputs = inputs_of(written)
    session.saw_inputs(inputs, "write", gram)
    tags = {file.name: one.tag for file, one in zip(session.plan.files, written, strict=False) if one.tag}
    return Output(sum_of(one.digest for one in written), inputs, tags)


def _write_parts(
    session: Session, store: Store, known: Known, folder: str, state: State[Place] | None, label: str
) -> tuple[list[Written], Gram | None]:
    """In a folder: files are made at their full size, and whoever is free writes a part."""
    plan = session.plan
    for file in plan.files:
        store.create(os.path.join(folder, file.name), file.size)
    written = {} if state is None else _written_before(session, folder, state, label)
    todo = [number for number in range(len(plan.parts)) if number not in written]
    relates = session.relates and not written  # of parts that are there already nothing is known
    for _, answer in session.store("write", WriteParts(known, folder, relates), todo):
        written |= answer  # some come again, if their owner was lost
        if state is not None:
            state.wrote({f"{label} {number}": one.to_text() for number, one in answer.items()})
    ordered = [one for _, one in sorted(written.items())]
    return ordered, gram_of(ordered) if relates else None


def _written_before(session: Session, folder: str, state: State[Place], label: str) -> dict[int, Written]:
    """The parts that the journal of an earlier run names, as far as the files hold just those bytes."""
    names = {number: f"{label} {number}" for number in range(len(session.plan.parts))}
    claimed = state.claimed(names)
    if not claimed:
        return {}
    log.info("%d of %d parts were written before; checking them", len(claimed), len(names))
    good: dict[int, Written] = {}
    size_of = session.plan.part_bytes
    with ByteBar("check what was written", sum(map(size_of, claimed)), quiet=session.quiet) as bar:  # no sweep over the inputs
        for batch, digests in session.owners.ask(DigestParts(folder), sorted(claimed)):
            bar.advance(sum(map(size_of, batch)))
            good |= {number: claimed[number] for number, digest in digests.items() if claimed[number].digest == digest}
    return good


def _write_files(
    session: Session, known: Known, folder: str, state: State[Place] | None, label: str
) -> tuple[list[Written], Gram | None]:
    """In an object store: each file has one writer, and is there when it is whole. What it then is called tells later whether it is
    still the one that was written."""
    plan = session.plan
    names = {number: f"{label} of {file.name}" for number, file in enumerate(plan.files)}
    claimed = {} if state is None else state.claimed(names)
    written = {number: claimed[number] for number in _still_there(session, state, claimed)}
    if claimed:
        log.info("%d of %d files were written before", len(written), len(names))
    todo = [number for number in names if number not in written]
    relates = session.relates and not written
    for _, answer in session.store_files("write", WriteFiles(known, folder, relates), todo):
        written |= answer
        if state is not None:
            state.wrote({names[number]: one.to_text() for number, one in answer.items()})
    there = _still_there(session, state, written) if is_object(folder) else written  # of the Hub its commit asks that
    if lost := [plan.files[number].name for number in set(written) - set(there)]:
        raise RunError(
            f"{folder}: wanted the files as they were written, found others or none in the place of {', '.join(sorted(lost))}. "
            "Fix: let nothing else write there, and write them again with --resume."
        )
    ordered = [one for _, one in sorted(written.items())]
    return ordered, gram_of(ordered) if relates else None


def _still_there(session: Session, state: State[Place] | None, written: Mapping[int, Written]) -> list[int]:
    """The numbers of those files that are still what was written, as far as the place can be asked."""
    if state is None:
        return list(written)
    files, place = session.plan.files, state.place
    with ThreadPoolExecutor(AT_ONCE) as pool:
        found = pool.map(lambda number: place.holds(files[number].name, files[number].size, written[number].tag), written)
        return [number for number, is_there in zip(written, found, strict=True) if is_there]


def write_from(
    stamps: Pins,
    session: Session,
    store: Store,
    known: Known,
    folder: str,
    state: State[Place] | None = None,
    label: str = "part",
) -> Output:
    """`write`, and a proof that the inputs stayed what they were when they had these stamps. Raises InputError if they did not."""
    output = write(session, store, known, folder, state, label)
    if touched := check_unchanged(store, stamps):
        log.warning("%s: touched during the run, its time of writing apart: all is written again, to see what it gives", touched[0])
        before, output = output, write(session, store, known, folder)
        # What is copied is in no other digest. A method that does not promise the same bits may write others.
        if output.digest != before.digest and session.plan.method.tolerance == 0:
            raise InputError(
                f"{', '.join(touched)}: wanted what was written first once more, found other bytes: it was changed during the run, "
                "and its time put back. Fix: let nothing write to the models while they are merged, and start afresh."
            )
    return output


def check_unchanged(store: Store, before: Pins) -> list[str]:
    """Raises InputError if a file of the inputs has another size or time of writing than it had. Returns the files of which only
    the time of their last change differs: their mode or their names changed, or their content did and somebody put its time
    back."""
    problems: list[str] = []
    touched: list[str] = []

    def look(path: str) -> object:
        try:
            return store.stamp(path)
        except OSError as error:
            return error.strerror

    with ThreadPoolExecutor(AT_ONCE) as pool:
        found = list(pool.map(look, before))
    for (path, stamp), now in zip(before.items(), found, strict=True):
        if isinstance(now, Stamp) and now.content == stamp.content:
            touched += [path] if now.changed_ns != stamp.changed_ns else []
        else:
            problems += changed(path, stamp, now).problems
    if problems:
        raise InputError(problems)
    return touched


@dataclass
class Spent:
    """What a merge took so far: all runs of it, of one that was killed up to its last finished sweep."""

    elapsed_s: float = 0.0
    bytes_read: int = 0
    bytes_fetched: int = 0
    retries: int = 0
    workers_lost: int = 0
    peak_worker_bytes: int = 0
    kernels: list[str] = field(default_factory=list)

    def with_session(self, session: Session, start: float) -> Spent:
        """What it took with what this session has spent since `start`."""
        states, owners = session.owners.states, session.owners
        return Spent(
            elapsed_s=round(self.elapsed_s + time.monotonic() - start, 3),
            bytes_read=self.bytes_read + sum(state.bytes_read for state in states),
            bytes_fetched=self.bytes_fetched + sum(state.fetched for state in states),
            retries=self.retries + sum(state.retries for state in states),
            workers_lost=self.workers_lost + owners.deaths,
            peak_worker_bytes=max([self.peak_worker_bytes, *(state.peak_bytes for state in states)]),
            kernels=sorted({*self.kernels, *(f"{state.kernel} on {state.device.split(':')[0]}" for state in states)}),
        )


def publish(
    session: Session,
    state: State[Place],
    store: Store,
    known: Known,
    output: Output,
    files: Mapping[str, SideFile],
    *,
    sweeps: Sequence[Sweep],
    spent: Spent,
    max_shard_bytes: int,
    startup_s: float,
    resumed: bool,
    commit: bool = True,
) -> Receipt:
    """Put the files beside the tensors, the card, and the receipt last, and give the output its name (unless it is part of a larger
    one)."""
    plan = session.plan
    receipt = Receipt(
        version=VERSION,
        versions=versions(),
        arithmetic=ARITHMETIC,
        method=plan.method.full_name,
        code_sha256=None if plan.recipe.code is None else plan.recipe.code.sha256,
        N=plan.N,
        D=plan.D,
        thresholds=dict(known),
        warnings=tuple(plan.method.warnings(known, plan.settings, names_of_inputs(plan)[1:])),
        sweeps=tuple(sweeps),
        full_sweeps=1 + sum(s.bytes >= plan.sweep_bytes for s in sweeps if s.name != "write"),  # the write may be in several goes
        kernels=tuple(spent.kernels),
        bytes_read=spent.bytes_read,
        bytes_fetched=spent.bytes_fetched,
        retries=spent.retries,
        bytes_written=plan.written_bytes,
        workers=session.owners.most,
        workers_lost=spent.workers_lost,
        announced_worker_bytes=session.worker_bytes,
        peak_worker_bytes=spent.peak_worker_bytes,
        sizes=asdict(plan.sizes),
        max_shard_bytes=max_shard_bytes,
        inputs=inputs_of_receipt(plan, [shown_digest(d) for d in session.inputs]),
        relation=session.relation or plan.relation,
        apart=plan.apart,
        tensors_sha256=plan.tensors_sha256,
        outputs=tuple(WrittenFile(f.name, f.size, hashlib.sha256(f.header).hexdigest()) for f in plan.files),
        output_digest=shown_digest(output.digest),
        files_sha256={},
        resumed=resumed,
        startup_s=round(startup_s, 3),
        elapsed_s=spent.elapsed_s,
    )
    folder, card = state.place.beside, model_card(plan, receipt.versions["pcb_ray"])
    receipt = replace(receipt, files_sha256=write_side_files(folder, {**files, CARD: card}, store))
    write_side_files(folder, {RECEIPT: receipt.to_json().encode()}, store)
    if commit:
        state.commit(output.tags)
    for warning in receipt.warnings:
        log.warning("warning: %s", warning)
    return receipt


def versions() -> dict[str, str]:
    """What made an output: for the receipt."""
    names = {"pcb_ray": "pcb-ray", "torch": "torch", "ray": "ray", "numpy": "numpy"}
    found = {key: importlib.metadata.version(name) for key, name in names.items()}
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):  # whose tables may have told what is packed
        found["transformers"] = importlib.metadata.version("transformers")
    return found | {
        "python": platform.python_version(),
        "machine": platform.machine(),
    }
