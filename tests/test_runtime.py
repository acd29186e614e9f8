"""Who does what, whose answer counts, who is late: claims about the schedule, owners in this process, and the addresses of
clusters."""

from __future__ import annotations

import dataclasses
import itertools
import os
import random
import threading
from collections.abc import Sequence
from typing import Any, NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pcb_ray.cluster import is_same_cluster
from pcb_ray.errors import RunError
from pcb_ray.local import LocalOwners
from pcb_ray.questions import OwnerState
from pcb_ray.runtime import IN_FLIGHT
from pcb_ray.schedule import MAX_BATCH, Pace, PartialTotal, Patience, Schedule, Standing, Subtotal, Verdict, proved


@dataclasses.dataclass
class Count:
    """How often each item was counted."""

    of_item: dict[int, int]

    @classmethod
    def of(cls, items: Sequence[int]) -> Count:
        return cls(dict.fromkeys(items, 1))

    def merge(self, other: Count) -> None:
        for item, times in other.of_item.items():
            self.of_item[item] = self.of_item.get(item, 0) + times


HERE = dict.fromkeys(range(3), "here")  # owners that all are on one node


def schedule_of(items: Sequence[int], owners: Sequence[int], *, keeps: bool) -> Schedule:
    return Schedule(items, {owner: HERE[owner] for owner in owners}, keeps=keeps, numbers=itertools.count(1))


# --- who is late ------------------------------------------------------------------------------------------------------------------


def test_deadlines_follow_from_the_speed_measured_so_far() -> None:
    pace, patience = Pace(), Patience()
    ten = range(10)
    assert pace.usual_s(ten) is None
    assert patience.standing(patience.unknown_s - 1, pace.usual_s(ten)) == Standing.PUNCTUAL
    pace.learn(range(4), 100.0)
    pace.learn(range(6), 200.0)
    assert pace.usual_s(ten) == 300.0
    for silent_s, standing in ((599, Standing.PUNCTUAL), (600, Standing.SLOW), (3000, Standing.LATE), (9000, Standing.LOST)):
        assert patience.standing(silent_s, pace.usual_s(ten)) == standing


def test_fast_answers_leave_everyone_a_least_time() -> None:
    patience = Patience()
    assert patience.standing(patience.slow_least_s - 0.01, 1e-6) == Standing.PUNCTUAL
    assert patience.standing(patience.late_least_s - 0.01, 1e-6) == Standing.SLOW
    assert patience.standing(patience.lost * patience.late_least_s - 0.01, 1e-6) == Standing.LATE
    assert patience.sync_late_after(1.0) == patience.sync_least_s
    assert patience.sync_late_after(10_000.0) == 20_000.0


def test_items_that_differ_are_late_by_what_was_expected_of_them() -> None:
    pace = Pace([1.0, 1.0, 1000.0].__getitem__)
    assert pace.usual_s([2]) == 1000.0
    pace.learn([0, 1], 0.02)
    assert pace.usual_s([2]) == pytest.approx(10.0)


def test_the_most_costly_items_come_first_and_owners_have_about_alike() -> None:
    cost = [1.0, 9.0, 2.0, 8.0, 3.0, 7.0, 5.0, 5.0]
    schedule = Schedule(range(8), {0: "a", 1: "a"}, keeps=False, numbers=itertools.count(1), expected_s=cost.__getitem__)
    able = {0: "a", 1: "a"}
    first = [schedule.take(owner, able) for owner in (0, 1)]
    assert [list(schedule.batches[batch]) for batch in first if batch is not None] == [[1], [3]]
    taken = {0: 9.0, 1: 8.0}
    while (owner := min(taken, key=lambda one: taken[one])) in taken and (batch := schedule.take(owner, able)) is not None:
        taken[owner] += cost[schedule.batches[batch][0]]
    assert sum(taken.values()) == sum(cost)
    assert abs(taken[0] - taken[1]) <= 2.0


@given(st.floats(0, 1e5), st.floats(0, 1e5), st.one_of(st.none(), st.floats(0, 1e4)))
def test_who_waits_longer_is_never_better_off(one_s: float, other_s: float, usual_s: float | None) -> None:
    patience = Patience()
    assert patience.standing(min(one_s, other_s), usual_s) <= patience.standing(max(one_s, other_s), usual_s)


# --- who does what ----------------------------------------------------------------------------------------------------------------


def test_batches_are_runs_of_a_shard_and_cover_all_items() -> None:
    schedule = schedule_of(range(1000), [0, 1, 2], keeps=False)
    assert [item for batch in schedule.batches for item in batch] == list(range(1000))
    assert max(map(len, schedule.batches)) <= MAX_BATCH
    first = [schedule.batches[schedule.take(owner, HERE) or 0] for owner in range(3)]
    assert [batch[0] for batch in first] == [0, 333, 666]


def test_an_owner_without_work_takes_from_the_end_of_the_longest_run() -> None:
    schedule = schedule_of(range(8), [0, 1], keeps=False)
    for _ in range(4):
        schedule.take(0, HERE)
    assert schedule.take(0, HERE) == len(schedule.batches) - 1
    assert schedule.take(1, HERE) == 4


def test_only_what_none_but_slow_owners_have_is_doubled_and_the_first_answer_counts() -> None:
    schedule = schedule_of(range(3), [0, 1, 2], keeps=True)
    assert [schedule.take(owner, HERE) for owner in range(3)] == [0, 1, 2]
    assert schedule.answered(2, 2, schedule.number_of(2))
    assert schedule.double(2, slow=[]) is None
    assert schedule.double(2, slow=[1]) == 1
    assert schedule.double(2, slow=[0, 1]) == 0
    assert schedule.double(2, slow=[0, 1, 2]) is None  # it has them all
    assert schedule.answered(2, 1, schedule.number_of(2))
    assert not schedule.answered(1, 1, schedule.number_of(1))
    assert schedule.answered(0, 0, schedule.number_of(0))
    assert schedule.done
    assert not schedule.answered(2, 0, schedule.number_of(2))
    assert schedule.verdict(2)[1:] == ([2, 1], [0])
    assert schedule.verdict(2)[1:] == ([], [])
    assert schedule.last_verdict(2)[1:] == ([2, 1], [])


def test_what_a_lost_owner_held_is_done_again_and_what_was_safe_is_not() -> None:
    schedule = schedule_of(range(4), [0, 1], keeps=True)
    for owner in (0, 0, 1, 1):
        batch = schedule.take(owner, HERE)
        assert batch is not None
        assert schedule.answered(owner, batch, schedule.number_of(owner))
    schedule.safe(0)
    schedule.lost(0)
    assert schedule.done
    assert schedule.holders() == [1]
    assert len(schedule.items_held(1)) == 2
    schedule.lost(1)
    assert not schedule.done
    assert {schedule.take(0, HERE), schedule.take(0, HERE)} == {2, 3}
    assert schedule.take(0, HERE) is None


def test_what_another_still_has_at_hand_is_not_given_out_when_its_answer_is_lost() -> None:
    schedule = schedule_of(range(1), [0, 1], keeps=True)
    assert schedule.take(0, HERE) == 0
    assert schedule.double(1, slow=[0]) == 0
    assert schedule.answered(1, 0, schedule.number_of(1))
    schedule.lost(1)
    assert schedule.take(1, HERE) is None
    schedule.in_vain(0, 0)
    assert schedule.take(1, HERE) == 0


# --- on which node ----------------------------------------------------------------------------------------------------------------


def test_items_stay_on_the_nodes_of_their_bytes_and_others_are_for_everyone() -> None:
    nodes = {0: "a", 1: "b", 2: "a"}
    homes = ["a"] * 4 + ["b"] * 4 + ["gone", ""] + ["a"] * 2
    schedule = Schedule(range(12), nodes, homes, keeps=False, numbers=itertools.count(1))
    taken: dict[int, list[int]] = {owner: [] for owner in nodes}
    for owner in 3 * [0, 1, 2]:
        batch = schedule.take(owner, nodes)
        assert batch is not None
        taken[owner] += schedule.batches[batch]
    assert taken == {0: [0, 1, 2], 1: [4, 5, 6], 2: [3, 10, 11]}


def test_work_of_another_node_is_taken_last_and_only_what_it_would_not_begin_soon() -> None:
    nodes = {0: "a", 1: "a", 2: "b", 3: "b"}
    schedule = Schedule(range(10), nodes, ["a"] * 4 + ["b"] * 6, keeps=False, numbers=itertools.count(1))
    assert [schedule.take(0, nodes) for _ in range(4)] == [0, 1, 3, 2], "its own, then from the end of its neighbour's"
    assert [schedule.take(0, nodes) for _ in range(3)] == [6, 9, None]
    assert schedule.take(0, {0: "a", 2: "b"}) == 5, "one of the two who should begin it is stuck"
    assert [schedule.take(0, {0: "a", 2: "b"}) for _ in range(2)] == [8, None]
    assert schedule.take(0, {0: "a"}) == 4, "nobody is there to do it"


def test_an_owner_is_told_what_comes_next_of_its_own_run() -> None:
    schedule = schedule_of(range(6), [0, 1], keeps=False)
    assert [(schedule.take(0, HERE), schedule.following(0)) for _ in range(4)] == [
        (0, [1]),
        (1, [2]),
        (2, ()),
        (5, ()),  # of the other's run, from its end
    ]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 4), min_size=1, max_size=4), st.integers(0, 700), st.integers(0, 1 << 32))
def test_owners_of_one_speed_leave_the_work_of_other_nodes_alone(owners_of: list[int], items: int, seed: int) -> None:
    """Each answers a batch a round, in any order; in later sweeps all is answered again where it was answered first."""
    choose = random.Random(seed)
    names = [f"n{k}" for k, count in enumerate(owners_of) for _ in range(count)]
    nodes = dict(enumerate(names))
    homes, before = [""] * items, None
    for _ in range(3):
        schedule = Schedule(range(items), nodes, homes, keeps=False, numbers=itertools.count(1))
        hands: dict[int, list[int]] = {owner: [] for owner in nodes}
        for _ in range(10_000):
            for owner in choose.sample(list(nodes), len(nodes)):
                while len(hands[owner]) < IN_FLIGHT and (batch := schedule.take(owner, nodes)) is not None:
                    hands[owner].append(batch)
                    homes[schedule.batches[batch][0] : schedule.batches[batch][-1] + 1] = [nodes[owner]] * len(
                        schedule.batches[batch]
                    )
            for owner, hand in hands.items():
                if hand:
                    assert schedule.answered(owner, hand.pop(0), schedule.number_of(owner))
            if schedule.done:
                break
        assert schedule.done
        assert before in (None, homes)
        assert [node for node, _ in itertools.groupby(homes)] == [f"n{k}" for k in range(len(owners_of)) if f"n{k}" in homes]
        before = list(homes)


# --- whose answer counts ----------------------------------------------------------------------------------------------------------


def test_an_answer_to_a_subtotal_that_was_given_away_is_of_no_use() -> None:
    schedule = schedule_of(range(2), [0], keeps=True)
    first, second = schedule.take(0, HERE), schedule.take(0, HERE)
    assert first is not None
    assert second is not None
    number = schedule.number_of(0)
    assert schedule.answered(0, first, number)
    assert schedule.last_verdict(0) == (number, [first], [])
    assert not schedule.answered(0, second, number)
    assert schedule.take(0, HERE) == second


def test_nothing_counts_until_the_driver_says_so() -> None:
    subtotal: Subtotal[Count] = Subtotal()
    for batch in range(4):
        assert subtotal.settle(Verdict(1, [], []))
        subtotal.keep(1, batch, PartialTotal.of([batch], Count.of([batch])))
    for _ in range(2):
        subtotal.settle(Verdict(1, [0], [1]))
    part = subtotal.give(Verdict(1, [0, 2], []))
    assert part is not None
    assert part.items == {0, 2}
    assert part.total.of_item == {0: 1, 2: 1}


def test_an_answer_that_comes_when_its_subtotal_was_given_away_counts_nowhere() -> None:
    subtotal: Subtotal[Count] = Subtotal()
    assert subtotal.settle(Verdict(1, [], []))
    assert subtotal.give(Verdict(1, [], [])) is None
    subtotal.keep(1, 0, PartialTotal.of([0], Count.of([0])))
    assert not subtotal.settle(Verdict(1, [0], []))
    assert subtotal.give(Verdict(2, [0], [])) is None
    assert subtotal.settle(Verdict(7, [0], []))
    assert subtotal.give(Verdict(7, [0], [])) is None


def test_a_total_proves_that_each_item_was_counted_once() -> None:
    part = PartialTotal.of([1, 2], Count.of([1, 2]))
    with pytest.raises(RunError, match=r"each item counted once, found 1 counted twice, 2 among them.*Fix:"):
        part.merge(PartialTotal.of([2, 3], Count.of([2, 3])))
    with pytest.raises(RunError, match=r"3 items counted, found 2 of them and 0 others"):
        proved(part, [1, 2, 3])
    with pytest.raises(RunError, match=r"1 items counted, found 0 of them"):
        proved(None, [1])
    assert proved(part, [2, 1]) is part.total


class SimulatedCall(NamedTuple):
    schedule: Schedule
    verdict: Verdict
    batch: int


class SimulatedOwner:
    """An owner with its calls in order; the first may be under way while its subtotal is given away or added to."""

    def __init__(self) -> None:
        self.subtotal: Subtotal[Count] = Subtotal()
        self.calls: list[SimulatedCall] = []
        self.at_work = False
        self.replies: list[SimulatedCall] = []  # on their way to the driver

    def go_on(self) -> None:
        """Begin the first call, or finish it."""
        if not self.calls:
            return
        if not self.at_work:
            self.at_work = self.subtotal.settle(self.calls[0].verdict)
            if self.at_work:
                return
        else:
            _, verdict, batch = self.calls[0]
            items = self.calls[0].schedule.batches[batch]
            self.subtotal.keep(verdict.number, batch, PartialTotal.of(items, Count.of(items)))
            self.at_work = False
        self.replies.append(self.calls.pop(0))


class Simulation:
    """A driver that folds, over owners that are slow, answer and die in any order; totals get lost on their way, too."""

    def __init__(self, owners: int, deaths: int, choose: random.Random) -> None:
        self.owners = {number: SimulatedOwner() for number in range(owners)}
        self.nodes = {number: choose.choice("abc") for number in self.owners}
        self.homes: dict[int, str] = {}
        self.numbers, self.names = itertools.count(1), itertools.count(owners)
        self.deaths, self.choose = deaths, choose

    def fold(self, items: Sequence[int]) -> Count:
        known = {number: node for number, node in self.nodes.items() if self.choose.random() < 0.9}  # the others come late
        homes = [self.homes.get(item, "") for item in items]
        schedule = Schedule(items, known, homes, keeps=True, numbers=self.numbers)
        for _ in range(100_000):
            if self.deaths and self.choose.random() < 0.02:
                self.deaths -= 1
                self.die(schedule, self.choose.choice(list(self.owners)))
            if not schedule.done:
                step = self.choose.choice([self.send, self.hear, lambda _, number: self.owners[number].go_on()])
                step(schedule, self.choose.choice(list(self.owners)))
            elif len(schedule.holders()) > 1:
                self.add_up(schedule, *self.choose.sample(schedule.holders(), 2))
            else:
                (holder,) = schedule.holders()
                return proved(self.owners[holder].subtotal.give(schedule.last_verdict(holder)), items)
        raise AssertionError("it does not end")

    def send(self, schedule: Schedule, number: int) -> None:
        owner = self.owners[number]
        if len(owner.calls) + len(owner.replies) == IN_FLIGHT:
            return
        able = {n: node for n, node in self.nodes.items() if n == number or self.choose.random() < 0.8}
        batch = schedule.take(number, able)
        if batch is None:
            batch = schedule.double(number, [n for n in self.owners if self.choose.random() < 0.7])
        if batch is not None:
            owner.calls.append(SimulatedCall(schedule, schedule.verdict(number), batch))

    def hear(self, schedule: Schedule, number: int) -> None:
        replies = self.owners[number].replies
        if replies:
            of, verdict, batch = replies.pop(0)
            if of is schedule and schedule.answered(number, batch, verdict.number):
                self.homes |= dict.fromkeys(schedule.batches[batch], self.nodes[number])

    def die(self, schedule: Schedule, number: int) -> None:
        del self.owners[number], self.nodes[number]
        born = next(self.names)
        self.owners[born], self.nodes[born] = SimulatedOwner(), self.choose.choice("abcd")
        schedule.lost(number)

    def add_up(self, schedule: Schedule, giver: int, taker: int) -> None:
        part = self.owners[giver].subtotal.give(schedule.last_verdict(giver))
        fate = self.choose.random()
        if fate < 0.6:
            self.owners[taker].subtotal.absorb(schedule.number_of(taker), part)
            schedule.moved(giver, taker)
            return
        schedule.forgotten(giver)
        if fate < 0.8:
            schedule.forgotten(taker)
        else:
            self.die(schedule, taker)


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 40), st.integers(1, 5), st.integers(0, 6), st.integers(0, 1 << 32))
def test_totals_are_equal_for_any_schedule(items: int, owners: int, deaths: int, seed: int) -> None:
    world = Simulation(owners, deaths, random.Random(seed))
    for _ in range(3):  # what is late for one question comes while the next one is asked
        assert world.fold(range(items)).of_item == dict.fromkeys(range(items), 1)


# --- owners in this process -------------------------------------------------------------------------------------------------------


class FakeOwner:
    """What a question is put to, in place of the owner of a model."""

    def __init__(self, plan: Any, store: Any, **_: Any) -> None:
        self.synced = 0

    def state(self) -> OwnerState:
        return OwnerState("none", "cpu", 0, 0, os.getpid(), "here")

    def sync(self) -> None:
        self.synced += 1


@dataclasses.dataclass(frozen=True)
class WhichItems:
    """Counts the items."""

    def answer(self, owner: object, items: Sequence[int]) -> Count:
        return Count.of(items)


@dataclasses.dataclass(frozen=True)
class Barrier:
    """Answers when so many owners are at work at once."""

    barrier: threading.Barrier

    def answer(self, owner: object, items: Sequence[int]) -> int:
        return self.barrier.wait(60)


@dataclasses.dataclass
class FakePlan:
    chunks: int = 5


@pytest.fixture
def local(monkeypatch: pytest.MonkeyPatch) -> LocalOwners:
    monkeypatch.setattr("pcb_ray.owner.Owner", FakeOwner)
    return LocalOwners(FakePlan(), object(), threads=3)  # type: ignore[arg-type]


@pytest.mark.parametrize("count", [1, 2, 100, 1000])
def test_owners_in_this_process_answer_each_item_once(local: LocalOwners, count: int) -> None:
    question = WhichItems()
    for answers in (local.ask(question, range(count)), local.store(question, range(count))):
        seen = [item for batch, answer in answers for item in batch if answer.of_item[item] == 1]
        assert sorted(seen) == list(range(count))
    told: list[int] = []
    assert local.fold(question, range(count), told.extend).of_item == dict.fromkeys(range(count), 1)
    assert sorted(told) == list(range(count))
    assert local.deaths == 0
    assert [state.pid for state in local.states] == [os.getpid()] * 3


def test_owners_in_this_process_work_at_the_same_time_and_make_durable_what_they_wrote(local: LocalOwners) -> None:
    assert sorted(answer for _, answer in local.store(Barrier(threading.Barrier(3)), range(3))) == [0, 1, 2]
    assert [owner.synced for owner in local._owners] == [1, 1, 1]  # type: ignore[attr-defined]


# --- which cluster ----------------------------------------------------------------------------------------------------------------


def test_addresses_are_compared_by_what_they_name() -> None:
    assert is_same_cluster("auto", "10.0.0.5:6379")
    assert is_same_cluster("10.0.0.5:6379", "10.0.0.5:6379")
    assert is_same_cluster("localhost:6379", "127.0.0.1:6379")
    assert is_same_cluster("127.0.0.2:6379", "127.0.0.1:6379")  # both are this machine
    assert not is_same_cluster("localhost:6380", "127.0.0.1:6379")
    assert not is_same_cluster("10.0.0.6:6379", "10.0.0.5:6379")
    assert not is_same_cluster("no-such-host.invalid:6379", "10.0.0.5:6379")
    assert not is_same_cluster("local", "127.0.0.1:6379")
    assert not is_same_cluster("ray://127.0.0.1:10001", "127.0.0.1:6379")
