"""Owners as Ray actors: placing them, asking them, replacing the dead and the silent. Who does what is decided in `schedule`.

`ask` sends one question about many items to all owners and yields answers as they come, in no order: answers are such that order
does not matter. `fold` is for answers that add up: each owner keeps the sum of its own, and the owners then add up in pairs, as a
tree, so that the driver receives one answer whatever their number. `store` is for questions that write: it ends when all is
durable.

An owner dies with its process or node, which Ray tells. If Ray knows before that a node is about to go, what its owners hold is
taken over while they live, and that is no failure. Or an owner is stopped, or waits for a file system that does not answer, which
nobody tells. So every call has a deadline (`Patience`): an owner that is slow has its work done by idle ones too, one that is late
is warned of, and one that is lost is killed and replaced. What it had at hand and what it alone held is asked for again.

An owner that runs out of memory says so, or Ray does, or the kernel counts on its node that it has killed somebody. What it had at
hand is done again with smaller blocks, once, and owners that are placed from then on have smaller ones for everything."""

from __future__ import annotations

import collections
import contextlib
import errno
import itertools
import logging
import os
import socket
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pcb_ray.budget import smaller_block
from pcb_ray.cluster import HEAD_LOOK_S, Head
from pcb_ray.errors import RunError, reason_in
from pcb_ray.files.objects import object_problem
from pcb_ray.files.store import is_remote
from pcb_ray.nodes import Needs, Node, draining, nodes, shown_nodes
from pcb_ray.planning import Plan
from pcb_ray.questions import Answer, ChunksOf, OwnerState, Question, TotalT
from pcb_ray.schedule import ExpectedS, Pace, PartialTotal, Patience, Schedule, Standing, Subtotal, Verdict, batches_of, proved

if TYPE_CHECKING:
    from pcb_ray.files.objects import Fence
    from pcb_ray.files.room import Room
    from pcb_ray.owner import Owner

log = logging.getLogger("pcb_ray")

# Batches that an owner has at hand, so that it need not wait for the driver; and so many answers it may keep apart from its total.
IN_FLIGHT = 2
MAX_DEATHS_OF_BATCH = 3
ASIDE = {"concurrency_group": "aside"}
LEAVE_S = 10.0
TICK_S = 1.0  # how often the driver looks who is late
LOOK_S = 2.0  # and which nodes have come, or are about to go: of that some have 30 s notice
ADVICE = "Fix: if they ran out of memory, lower --workers; finished work is kept: --resume goes on"
ADVICE_ON_MEMORY = (
    "Fix: lower --workers, so that fewer share the memory of a node, or --memory, which bounds each, or give the nodes more; "
    "finished work is kept: --resume goes on"
)
ADVICE_ON_SILENCE = (
    "Fix: look whether the file systems of the inputs and the output answer on the nodes (a dead mount makes readers wait for "
    "ever); finished work is kept: --resume goes on"
)


class Options(NamedTuple):
    """How owners work, whatever the plan."""

    device: str
    block_elements: int
    writes_to: str = ""
    """A folder that each must see, or a prefix where it must be able to write."""
    fence: Fence | None = None
    """What says that the run may still write to stores."""
    room: Room | None = None
    """Where a node may keep what it fetched."""


def make_owner(plan: Plan, options: Options) -> Owner:
    """What an actor holds."""
    import torch

    from pcb_ray.files.stores import open_store
    from pcb_ray.owner import Owner

    torch.set_num_threads(1)  # one owner per core
    store = open_store(plan.stamps, plan.recipe.storage, options.room, options.fence)
    return Owner(plan, store, device=options.device, block_elements=options.block_elements, writes_to=options.writes_to)


class _Actor:
    """An owner as Ray runs it. Its owner is made by `use` and not by the constructor, since what a constructor raises is lost.

    It has two threads. One makes the owner and answers questions, in the order in which they were asked. The other (the group
    `aside`) gives and adds up totals and makes files durable: it works while the first one is stuck in a read."""

    def __init__(self) -> None:
        self.subtotal: Subtotal[Any] = Subtotal()

    def where(self) -> tuple[str, str, int]:
        """How a person finds this process, the node that it is on, and how many processes its kernel has killed for memory."""
        import ray

        return f"pid {os.getpid()} on {socket.gethostname()}", ray.get_runtime_context().get_node_id(), _killed_for_memory()

    def use(self, make: Callable[[Plan, Options], Owner], plan: Plan, options: Options) -> OwnerState:
        """Be the owner of this plan from now on."""
        before = getattr(self, "owner", None)
        with _shortage_as_memory_error():
            self.owner = make(plan, options)
        if before is not None:
            before.close()  # after the other has come, so that what both keep on this node stays
        return self.owner.state()

    def ask(
        self, question: Question[Answer], items: Sequence[int], then: Sequence[int], block_elements: int
    ) -> tuple[Answer, OwnerState, float]:
        """The answer, and how long it took. `then` is what is asked for next; blocks are of so many elements."""
        start = time.monotonic()
        answer = self._answer(question, items, then, block_elements)
        return answer, self.owner.state(), time.monotonic() - start

    def add(
        self, verdict: Verdict, batch: int, question: Question[Any], items: Sequence[int], then: Sequence[int], block_elements: int
    ) -> tuple[None, OwnerState, float]:
        """Settle earlier answers, and keep this one apart until it is settled too."""
        start = time.monotonic()
        if self.subtotal.settle(verdict):
            answer = self._answer(question, items, then, block_elements)
            self.subtotal.keep(verdict.number, batch, PartialTotal.of(items, answer))
        return None, self.owner.state(), time.monotonic() - start

    def _answer(self, question: Question[Answer], items: Sequence[int], then: Sequence[int], block_elements: int) -> Answer:
        self.owner.then, self.owner.block_elements = then, block_elements
        with _shortage_as_memory_error():
            return question.answer(self.owner, items)

    def give(self, verdict: Verdict) -> tuple[bool, PartialTotal[Any] | None]:
        """The total of the answers that count; before it, alone, a word that it is there."""
        return True, self.subtotal.give(verdict)

    def absorb(self, number: int, part: PartialTotal[Any] | None) -> None:
        """Add what another owner has counted."""
        self.subtotal.absorb(number, part)

    def sync(self) -> None:
        """Make durable what was written so far."""
        self.owner.sync()

    def leave(self) -> None:
        """Let go of what this node keeps for the run."""
        self.owner.close()


@dataclass
class _Job:
    """One question under way."""

    question: Any  # a reference to it: it travels once to each node, and not with each batch
    schedule: Schedule
    chunks_of: ChunksOf | None
    adds_up: bool
    doubles: bool  # two owners may do the same batch
    pace: Pace
    deaths: collections.Counter[int] = field(default_factory=collections.Counter)  # of owners at work on a batch
    short: dict[int, int] = field(default_factory=dict)  # batch -> elements of the blocks with which it ran out of memory


@dataclass(frozen=True)
class _Call:
    """What an owner is asked for, in the order of its thread."""

    job: _Job | None  # none: it is being placed, or opens its files
    batch: int = -1
    number: int = 0  # of the subtotal that the answer belongs to
    block: int = 0  # elements of a block

    @property
    def usual_s(self) -> float | None:
        """How long it usually takes."""
        return self.job.pace.usual_s(self.job.schedule.batches[self.batch]) if self.job else None


@dataclass
class _Worker:
    """An actor as the driver knows it."""

    number: int
    actor: Any
    since_s: float = 0.0  # when it could begin the first of its calls
    calls: dict[Any, _Call] = field(default_factory=dict)  # by the reference to their results, in the order of its thread
    place: str = ""  # where it was placed
    node: str = ""
    block: int = 0  # elements of the largest block that it has room for
    opening: int = 0  # how often it is yet to open its files
    warned: bool = False
    leaves: bool = False  # its node is about to go, and another owner was placed for it

    def __str__(self) -> str:
        return f"worker {self.number} ({self.place or 'not yet placed'})"

    @property
    def ready(self) -> bool:
        """Whether it can be asked."""
        return bool(self.place) and not self.opening


class RayOwners:
    """Owners as Ray actors, spread over the nodes. `use` says of which plan."""

    def __init__(
        self,
        *,
        workers: int,
        needs: Needs,
        at_most: int = 0,
        patience: Patience = Patience(),  # noqa: B008 - it is frozen
        room: Room | None = None,
        make_owner: Callable[[Plan, Options], Owner] = make_owner,
    ) -> None:
        """`workers` to begin with, and up to `at_most` when nodes join that have room for them."""
        import ray

        actor = ray.remote(concurrency_groups={"aside": 1})(_Actor)  # type: ignore[call-overload]  # its types lack it
        self._remote = actor.options(scheduling_strategy="SPREAD", max_restarts=0, **needs.options)
        self._needs, self._make_owner, self._patience, self._room = needs, make_owner, patience, room
        self._at_most = max(workers, at_most)
        self._head = Head()
        self._most = 0
        self._plan: Plan | None = None
        self._arguments: tuple[Any, ...] = ()  # of `use`
        self._shrunk = 0  # how often blocks were made smaller
        self._killed: dict[str, int] = {}  # node -> processes that its kernel has killed for memory
        self._unexplained: dict[str, tuple[_Job, _Call, str]] = {}  # node -> an owner that died there at work, nobody knows why
        self._workers: dict[int, _Worker] = {}  # by number; a replacement has a new one
        self._states: dict[int, OwnerState] = {}
        self._homes: dict[int, str] = {}  # chunk -> the node that answered for it last: there its bytes are
        self._reads: object = None  # what these chunks are of
        self._numbers = itertools.count(1)  # of subtotals, in all owners
        self._born = 0
        self._deaths = 0
        self._fruitless = 0  # deaths since the last answer
        self._clock_s = 0.0  # how long the driver has waited
        self._last_sign_s = 0.0  # when it last heard of an owner
        self._looked_s = 0.0  # and looked at the nodes, on the monotonic clock
        self._tick_s = min(TICK_S, patience.slow_least_s / 2)
        for _ in range(workers):
            self._place()

    @property
    def states(self) -> Sequence[OwnerState]:
        """Of all owners there were of this plan, the dead included, as of their last answer."""
        return list(self._states.values())

    @property
    def most(self) -> int:
        """How many owners there were at most at a time."""
        return self._most

    @property
    def deaths(self) -> int:
        """How many owners of this plan were lost and replaced."""
        return self._deaths

    def use(self, plan: Plan, block_elements: int, writes_to: str = "", fence: Fence | None = None) -> None:
        """All questions from now on are about this plan. The actors stay, and get new owners; so do their replacements."""
        import ray

        for _ in range(self._shrunk):
            block_elements = smaller_block(plan, block_elements)
        options = Options(self._needs.device, block_elements, writes_to, fence, self._room)
        self._plan, self._arguments = plan, (self._make_owner, ray.put(plan), options)
        self._states, self._deaths = {}, 0
        if plan.reads != self._reads:
            self._homes, self._reads = {}, plan.reads
        for worker in self._workers.values():
            if worker.place:  # else it does so when it has one
                self._open(worker)

    def wait_until_ready(self) -> None:
        """Wait for all owners to have opened their files, but not for ever: `ask` works with those there are. Raises what an owner
        raised."""
        until_s = self._clock_s + self._patience.placement_s / 4
        while self._clock_s < until_s and not all(worker.ready for worker in self._workers.values()):
            self._turn(None)

    def close(self) -> None:
        """Let the actors go; a local cluster ends with the driver, another one goes on."""
        import ray

        if Head.is_lost:  # they go with their nodes
            self._workers = {}
            return
        if self._room is not None:
            leaving = [worker.actor.leave.options(**ASIDE).remote() for worker in self._workers.values() if worker.ready]
            ray.wait(leaving, num_returns=len(leaving), timeout=LEAVE_S)  # what stays behind, the next run there removes
        for worker in self._workers.values():
            ray.kill(worker.actor)
        self._workers = {}

    # --- questions ----------------------------------------------------------------------------------------------------------------

    def ask(
        self,
        question: Question[Answer],
        items: Sequence[int],
        chunks_of: ChunksOf | None = None,
        *,
        doubles: bool = True,
        expected_s: ExpectedS | None = None,
    ) -> Iterator[tuple[Sequence[int], Answer]]:
        """(some items, the answer about them), as answers come, in no order; each item once.

        Raises what an owner raised, or RunError if items keep killing owners.
        """
        job = self._job(question, items, chunks_of, keeps=False, doubles=doubles, expected_s=expected_s)
        yield from self._work(job)

    def store(
        self,
        question: Question[Answer],
        items: Sequence[int],
        chunks_of: ChunksOf | None = None,
        *,
        doubles: bool = True,
        expected_s: ExpectedS | None = None,
    ) -> Iterator[tuple[Sequence[int], Answer]]:
        """As `ask`, for questions that write: when it ends, all of that is durable. What a lost owner wrote is written, and
        yielded, again. `doubles`: two may write the same at once, since they write the same bytes."""
        job = self._job(question, items, chunks_of, keeps=True, doubles=doubles, expected_s=expected_s)
        schedule = job.schedule
        while not schedule.done:
            yield from self._work(job)
            for number in self._synced(job, schedule.holders()):
                schedule.safe(number)

    def fold(self, question: Question[TotalT], chunks: Sequence[int], done: Callable[[Sequence[int]], None]) -> TotalT:
        """The sum of the answers about all these chunks. `done` is called with chunks as they are counted - again, if their owner
        was lost.

        Raises as `ask` does.
        """
        job = self._job(question, chunks, lambda chunk: (chunk,), keeps=True, adds_up=True)
        setbacks = 0
        while setbacks <= 3 * (len(self._workers) + 1):
            for batch, _ in self._work(job):
                done(batch)
            holders = job.schedule.holders()
            if len(holders) > 1:
                setbacks += self._add_up(job, holders)
                continue
            part: PartialTotal[TotalT] | None = self._total_of(job, holders[0]) if holders else None
            if part is not None or not chunks:
                return proved(part, chunks)
            setbacks += 1
        raise RunError(f"the workers: wanted the sum of what they had counted, found that {setbacks} additions failed. {ADVICE}")

    def _job(
        self,
        question: Question[Any],
        items: Sequence[int],
        chunks_of: ChunksOf | None,
        *,
        keeps: bool,
        adds_up: bool = False,
        doubles: bool = True,
        expected_s: ExpectedS | None = None,
    ) -> _Job:
        import ray

        self._fruitless = 0
        self._look_at_nodes(None)
        placed = {worker.number: worker.node for worker in self._workers.values() if worker.place}
        homes = [self._home(chunks_of(item)) for item in items] if chunks_of else ()
        schedule = Schedule(items, placed, homes, keeps=keeps, numbers=self._numbers, expected_s=expected_s)
        return _Job(ray.put(question), schedule, chunks_of, adds_up, doubles, Pace(expected_s))

    def _home(self, chunks: Iterable[int]) -> str:
        """The node where most of these chunks have their bytes."""
        counted = collections.Counter(self._homes.get(chunk, "") for chunk in chunks)
        return counted.most_common(1)[0][0] if counted else ""

    # --- the first thread of the owners: batches ----------------------------------------------------------------------------------

    def _work(self, job: _Job) -> Iterator[tuple[Sequence[int], Any]]:
        """Have all batches answered; yields the answers that count."""
        while not job.schedule.done:
            self._hand_out(job)
            yield from self._turn(job)

    def _hand_out(self, job: _Job) -> None:
        """Give each owner as much to do as it should have at hand. Those that find nothing left double what slow ones have."""
        able = [one for one in self._workers.values() if one.ready and self._standing(one) < Standing.SLOW]
        nodes_of = {worker.number: worker.node for worker in able}
        idle = []
        for worker in able:
            while len(worker.calls) < IN_FLIGHT and (batch := job.schedule.take(worker.number, nodes_of)) is not None:
                self._send(job, worker, batch)
            if not worker.calls:
                idle.append(worker)
        slow = {worker.number for worker in self._workers.values() if self._standing(worker) >= Standing.SLOW} if idle else ()
        if slow and job.doubles:
            for worker in idle:
                if (batch := job.schedule.double(worker.number, slow)) is not None:
                    log.info("%s also does what a slow one has at hand", worker)
                    self._send(job, worker, batch)

    def _send(self, job: _Job, worker: _Worker, batch: int) -> None:
        items, verdict, block = job.schedule.batches[batch], job.schedule.verdict(worker.number), worker.block
        if batch in job.short and self._plan is not None:
            block = min(block, smaller_block(self._plan, job.short[batch]))
        asked = job.question, items, job.schedule.following(worker.number), block
        actor = worker.actor
        reference = actor.add.remote(verdict, batch, *asked) if job.adds_up else actor.ask.remote(*asked)
        self._expect(worker, reference, _Call(job, batch, verdict.number, block))

    def _turn(self, job: _Job | None) -> list[tuple[Sequence[int], Any]]:
        """Wait for a sign of any owner, but not long, and look who is late. Returns what was answered of this job and counts."""
        worker_of = {reference: worker for worker in self._workers.values() for reference in worker.calls}
        ready = self._wait(list(worker_of))
        if ready:
            self._last_sign_s = self._clock_s
        elif not any(worker.place for worker in self._workers.values()):
            self._check_placement()
        answers = []
        for reference in ready:
            worker = worker_of[reference]
            if self._workers.get(worker.number) is worker:  # else it was lost by an earlier one of its calls
                answers += self._hear(job, worker, reference)
        self._look_after(job)
        return answers

    def _hear(self, job: _Job | None, worker: _Worker, reference: Any) -> list[tuple[Sequence[int], Any]]:
        """Take what an owner says to one of its calls. Returns it, if it is an answer of this job and counts."""
        import ray

        call = worker.calls[reference]
        try:
            answer = ray.get(reference, timeout=self._patience.exchange_s)
        except ray.exceptions.RayError as error:  # a large answer is lost with the node that keeps it
            if _is_loss(error) or _is_shortage(error):
                self._lose(worker, job, reason_in(error), preempted=_is_preempted(error), short=_is_shortage(error))
                return []
            if call.job is None or (call.job is job and not job.schedule.is_answered(call.batch)):
                raise _ours(error) from None
            answer = None  # another has answered
        del worker.calls[reference]
        worker.since_s, worker.warned = self._clock_s, False
        if call.job is None:
            self._placed_or_opened(worker, answer)
            return []
        self._fruitless = 0
        if answer is None:
            if call.job is job:
                job.schedule.in_vain(worker.number, call.batch)
            return []
        result, self._states[worker.number], seconds = answer
        if call.job is not job or not job.schedule.answered(worker.number, call.batch, call.number):
            return []
        items = job.schedule.batches[call.batch]
        job.pace.learn(items, seconds)
        if job.chunks_of is not None:
            self._homes.update((chunk, worker.node) for item in items for chunk in job.chunks_of(item))
        return [(items, result)]

    # --- the second thread of the owners: totals and files ------------------------------------------------------------------------

    def _synced(self, job: _Job, holders: Iterable[int]) -> set[int]:
        """Have what these wrote made durable. Returns the numbers of those that did it; the lost are replaced."""
        written_s = {number: job.pace.usual_s(job.schedule.items_held(number)) for number in holders}
        limits = {number: self._patience.sync_late_after(seconds) for number, seconds in written_s.items()}
        syncs = {number: self._workers[number].actor.sync.options(**ASIDE).remote() for number in limits}
        return self._aside(job, "make durable what it wrote", syncs, limits)

    def _aside(self, job: _Job, what: str, calls: Mapping[int, Any], limits: Mapping[int, float]) -> set[int]:
        """Wait for calls to some owners. Returns the numbers of those that did it; the lost are replaced."""
        import ray

        begin_s, warned, did = self._clock_s, set[int](), set[int]()
        waiting = {reference: number for number, reference in calls.items()}
        while waiting:
            for reference in self._wait(list(waiting)):
                number = waiting.pop(reference)
                try:
                    ray.get(reference, timeout=self._patience.exchange_s)
                except ray.exceptions.RayError as error:
                    short = _is_shortage(error)
                    if not _is_loss(error) and not short:
                        raise _ours(error) from None
                    # What it should have added may be lost, while it lives.
                    if short or not isinstance(error, ray.exceptions.RayTaskError):
                        self._lose(self._workers[number], job, reason_in(error), preempted=_is_preempted(error), short=short)
                else:
                    did.add(number)
            silent_s = self._clock_s - begin_s
            for reference, number in list(waiting.items()):
                standing, worker = self._patience.standing_at(silent_s, limits[number]), self._workers[number]
                if standing == Standing.LOST:
                    del waiting[reference]
                    self._lose(worker, job, f"it did not {what} in {silent_s:.0f} s", silent=True)
                elif standing == Standing.LATE and number not in warned:
                    warned.add(number)
                    replaced_s = self._patience.lost * limits[number]
                    log.warning("%s did not yet %s in %.0f s; after %.0f s it is replaced", worker, what, silent_s, replaced_s)
        return did

    def _add_up(self, job: _Job, holders: Sequence[int]) -> int:
        """One level of the tree: half of those who hold a total add another's to their own. Returns how many could not."""
        ordered = sorted(holders, key=lambda number: len(self._workers[number].calls))  # those still at work give theirs away
        half = (len(ordered) + 1) // 2
        return self._move(job, dict(zip(ordered[half:], ordered[:half], strict=False)))

    def _move(self, job: _Job, taker_of: Mapping[int, int]) -> int:
        """Have owners add others' totals to their own, each one. Returns how many could not."""
        limits = dict.fromkeys([*taker_of, *taker_of.values()], self._patience.exchange_s)
        given, parts = {}, {}
        for giver in taker_of:
            given[giver], parts[giver] = self._give(job, self._workers[giver])
        gave = self._aside(job, "give its total", given, limits)
        additions = {}
        for giver in gave:
            taker = self._workers[taker_of[giver]]
            additions[taker.number] = taker.actor.absorb.options(**ASIDE).remote(job.schedule.number_of(taker.number), parts[giver])
        added = self._aside(job, "add up totals", additions, limits)
        for giver in gave:
            taken = taker_of[giver]
            if taken in added:
                job.schedule.moved(giver, taken)
            else:  # nobody knows what has become of the two totals
                job.schedule.forgotten(giver)
                job.schedule.forgotten(taken)
        return len(taker_of) - len(added)

    def _total_of(self, job: _Job, holder: int) -> PartialTotal[Any] | None:
        """The total that this owner holds; none if it was lost, and must be found again."""
        import ray

        given, part = self._give(job, self._workers[holder])
        if self._aside(job, "give its total", {holder: given}, {holder: self._patience.exchange_s}):
            try:
                total: PartialTotal[Any] | None = ray.get(part, timeout=self._patience.exchange_s)
                return total
            except ray.exceptions.RayError as error:
                if not _is_loss(error):
                    raise _ours(error) from None
                job.schedule.forgotten(holder)
        return None

    def _give(self, job: _Job, worker: _Worker) -> tuple[Any, Any]:
        """References to a word that the total was given, and to the total. What this owner counts from now on is another one."""
        give = worker.actor.give.options(**ASIDE, num_returns=2)
        given, part = give.remote(job.schedule.last_verdict(worker.number))
        return given, part

    # --- coming and going ---------------------------------------------------------------------------------------------------------

    def _place(self) -> None:
        worker = _Worker(self._born, self._remote.remote())
        self._born += 1
        self._workers[worker.number] = worker
        self._most = max(self._most, sum(not one.leaves for one in self._workers.values()))
        self._expect(worker, worker.actor.where.remote(), _Call(None))

    def _look_at_nodes(self, job: _Job | None) -> None:
        if (found := self._head.ask(lambda: (draining(), nodes()))) is not None:
            going, there = found
            self._let_leave(job, going)
            self._grow(there)
        self._looked_s = time.monotonic()

    def _grow(self, there: Sequence[Node]) -> None:
        """Place more owners, if nodes have joined since."""
        staying = sum(not worker.leaves for worker in self._workers.values())
        if staying < self._at_most:
            more = min(self._at_most, self._needs.places(there)) - staying
            for _ in range(more):
                self._place()
            if more > 0:
                log.info("nodes have joined: %d workers more", more)

    def _let_leave(self, job: _Job | None, going: Collection[str]) -> None:
        """Replace owners whose nodes are about to go. As soon as there are others, these take over what they hold, and what they
        have at hand is done by others: they may go."""
        leaving = [worker for worker in self._workers.values() if worker.node in going]
        for worker in leaving:
            if not worker.leaves:
                log.warning("%s leaves with its node; others take over what it has", worker)
                worker.leaves = True
                self._place()
        staying = [worker.number for worker in self._workers.values() if worker.ready and worker.node not in going]
        if not staying:
            return  # it is better to work until the end than to wait
        if job is not None:
            self._take_over(job, [worker for worker in leaving if job.schedule.items_held(worker.number)], staying)
        for worker in leaving:
            if worker.number in self._workers:
                self._dismiss(worker, job)

    def _take_over(self, job: _Job, leaving: Sequence[_Worker], staying: Sequence[int]) -> None:
        """Make sure of what these hold: in the totals of others, or in files that are durable."""
        if job.adds_up:
            for group in batches_of([worker.number for worker in leaving], len(staying)):
                self._move(job, dict(zip(group, staying, strict=False)))
            return
        for number in self._synced(job, [worker.number for worker in leaving]):
            job.schedule.safe(number)

    def _dismiss(self, worker: _Worker, job: _Job | None) -> None:
        """Let an owner go. What it has at hand, or still holds, is done again."""
        import ray

        with contextlib.suppress(ray.exceptions.RayError, ValueError):
            ray.kill(worker.actor)  # a process that is stopped or stuck gets SIGKILL a few seconds later, and its place is free
        del self._workers[worker.number]
        if job is not None:
            job.schedule.lost(worker.number)

    def _open(self, worker: _Worker) -> None:
        worker.opening += 1
        worker.block = self._arguments[-1].block_elements
        self._expect(worker, worker.actor.use.remote(*self._arguments), _Call(None, block=worker.block))

    def _placed_or_opened(self, worker: _Worker, answer: Any) -> None:
        if not worker.place:
            worker.place, worker.node, killed = answer
            dead, before = self._unexplained.pop(worker.node, None), self._killed.get(worker.node)
            self._killed[worker.node] = killed
            if dead is not None and before is not None and killed > before:
                job, call, who = dead
                self._ran_short(job, call, who, "the kernel of its node has killed a process for want of memory")
            if self._arguments:
                self._open(worker)
        else:
            worker.opening -= 1
            self._states[worker.number] = answer

    def _expect(self, worker: _Worker, reference: Any, call: _Call) -> None:
        if not worker.calls:
            worker.since_s, worker.warned = self._clock_s, False
        worker.calls[reference] = call

    def _wait(self, references: list[Any]) -> list[Any]:
        """Those that are ready, after a moment at most. The clock counts this time and no other: nobody is late because the driver
        was."""
        import ray

        self._head.look_at_times()
        begin = time.monotonic()
        ready, _ = ray.wait(references, num_returns=1, timeout=min(self._tick_s, HEAD_LOOK_S))
        self._clock_s += min(time.monotonic() - begin, 2 * self._tick_s)
        return list(ray.wait(references, num_returns=len(references), timeout=0.0)[0]) if ready else []

    def _standing(self, worker: _Worker) -> Standing:
        """What to think of this owner, by the first of its calls."""
        call = next(iter(worker.calls.values()), None)
        if call is None or not worker.place:
            return Standing.PUNCTUAL
        silent_s = self._clock_s - worker.since_s
        if call.job is None:
            return self._patience.standing_at(silent_s, self._patience.start_s)
        return self._patience.standing(silent_s, call.usual_s)

    def _look_after(self, job: _Job | None) -> None:
        """Warn of owners that are late, replace those that are lost, and see which nodes come and go."""
        if time.monotonic() - self._looked_s > LOOK_S:
            self._look_at_nodes(job)
        for worker in list(self._workers.values()):
            standing, silent_s = self._standing(worker), self._clock_s - worker.since_s
            if standing == Standing.LOST:
                self._lose(worker, job, f"it did not answer for {silent_s:.0f} s", silent=True)
            elif standing == Standing.LATE and not worker.warned:
                worker.warned = True
                log.warning(
                    "%s has not answered for %.0f s: idle workers do its part too, and if it goes on it is replaced",
                    worker,
                    silent_s,
                )

    def _lose(
        self,
        worker: _Worker,
        job: _Job | None,
        reason: str,
        *,
        silent: bool = False,
        preempted: bool = False,
        short: bool = False,
    ) -> None:
        """Replace an owner that died (or ran out of memory: `short`) or does not answer. Raises RunError if that happens too
        often."""
        if preempted or worker.leaves:
            log.warning("%s has left with its node; what it had is done again by another", worker)
            self._dismiss(worker, job)
            if not worker.leaves:
                self._place()
            return
        self._fruitless, self._last_sign_s = self._fruitless + 1, self._clock_s
        if worker.place:  # else it has never lived: Ray sends one to a node that has died while it doesn't know yet
            self._deaths += 1
        short = short and worker.block > 0  # else it has not begun, and has no blocks
        if not short:
            log.warning("%s %s (%s); its part is done again by another", worker, "is given up" if silent else "died", reason)
        first, same_part = next(iter(worker.calls.values()), None), 0
        if job is not None and first is not None and first.job is job:
            job.deaths[first.batch] += 1
            same_part = job.deaths[first.batch]
            if not silent and not short:
                self._unexplained[worker.node] = job, first, str(worker)
        self._dismiss(worker, job)
        if short:
            self._ran_short(job, first or _Call(None, block=worker.block), str(worker), reason)
        if same_part >= MAX_DEATHS_OF_BATCH or self._fruitless > 3 * (len(self._workers) + 1):
            raise RunError(
                f"{max(self._deaths, self._fruitless)} workers {'were lost' if silent else 'died'}, {same_part} of them on the "
                f"same part of the model; the last one was {worker}: {reason}. {ADVICE_ON_SILENCE if silent else ADVICE}"
            )
        self._place()

    def _ran_short(self, job: _Job | None, call: _Call, who: str, reason: str) -> None:
        """An owner ran out of memory at this: owners to come get smaller blocks, and its batch is to be done with smaller ones by
        whomever. Raises RunError if it was."""
        if self._plan is None:
            return
        if job is not None and call.job is job and not job.schedule.is_answered(call.batch):
            if call.batch in job.short:
                raise RunError(
                    f"the workers: wanted memory for a part of the model, found that one ran out of it with blocks of "
                    f"{job.short[call.batch]:,} elements, and {who} with blocks of {call.block:,}: {reason}. {ADVICE_ON_MEMORY}"
                )
            job.short[call.batch] = call.block
        make, plan, options = self._arguments
        smaller = smaller_block(self._plan, call.block)
        if smaller < options.block_elements:
            self._arguments, self._shrunk = (make, plan, options._replace(block_elements=smaller)), self._shrunk + 1
        log.warning(
            "%s ran out of memory with blocks of %s elements (%s); its part is done again by another, with blocks of %s",
            who,
            f"{call.block:,}",
            reason,
            f"{smaller:,}" if smaller < call.block else "that size, which is the smallest",
        )

    def _check_placement(self) -> None:
        waited_s = self._clock_s - self._last_sign_s
        if waited_s > self._patience.placement_s:
            there = shown_nodes(self._head.ask(nodes) or ())
            raise RunError(
                f"the cluster: wanted a place for a worker, found none in {waited_s:.0f} s: it has {there}; other "
                "jobs, or workers that a dead mount keeps from ending, may hold its cores or memory. Fix: free some, then --resume"
            )


def _is_loss(error: Exception) -> bool:
    """Whether an owner, or the node that keeps its answer, is gone."""
    from ray.exceptions import GetTimeoutError, ObjectLostError, OutOfMemoryError, RayActorError

    return isinstance(error, RayActorError | ObjectLostError | OutOfMemoryError | GetTimeoutError)


def _is_shortage(error: Exception) -> bool:
    """Whether an owner ran out of memory, as it says itself or as Ray does, which has killed it."""
    from ray.exceptions import OutOfMemoryError, RayTaskError

    return isinstance(error.cause if isinstance(error, RayTaskError) else error, OutOfMemoryError | MemoryError)


@contextlib.contextmanager
def _shortage_as_memory_error() -> Iterator[None]:
    """What libraries raise where memory is short, as a plain MemoryError: torch has others, on a CPU and on a GPU."""
    try:
        yield
    except (MemoryError, RuntimeError, OSError) as error:  # numpy's own can't be sent
        is_torchs = type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error)
        if isinstance(error, MemoryError) or is_torchs or getattr(error, "errno", None) == errno.ENOMEM:
            raise MemoryError(reason_in(error)) from None
        raise


def _killed_for_memory() -> int:
    """How many processes the kernel here has killed for want of memory, in containers too; 0 where it doesn't tell."""
    try:
        lines = Path("/proc/vmstat").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), 0)


def _is_preempted(error: Exception) -> bool:
    """Whether an owner died since its node was to go."""
    from ray.exceptions import RayActorError

    return isinstance(error, RayActorError) and error.preempted


def _ours(error: Exception) -> Exception:
    """What an owner raised, as one of our errors where that is possible."""
    from ray.exceptions import RayError, RayTaskError

    cause = error.cause if isinstance(error, RayTaskError) and isinstance(error.cause, Exception) else error
    if isinstance(cause, OSError) and is_remote(str(cause.filename)):
        return RunError(f"{object_problem(cause.filename, cause)} Finished work is kept: --resume goes on.")
    if isinstance(cause, OSError):
        where = f"{cause.filename}: " if cause.filename else ""
        return RunError(
            f"{where}{cause.strerror or cause}. Fix: free space or mend the disk; finished work is kept: --resume goes on"
        )
    if isinstance(cause, RayError | MemoryError):
        return RunError(f"a worker failed: {reason_in(cause)}. {ADVICE}")
    return cause
