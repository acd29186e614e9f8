"""Who does what, whose answer counts, who is late: claims about the schedule, owners in this process, and the addresses of clusters."""

from __future__ import annotations

import dataclasses
import os
import random
import threading
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pcb_ray.cluster import is_same_cluster
from pcb_ray.errors import RunError
from pcb_ray.local import LocalOwners
from pcb_ray.questions import OwnerState
from pcb_ray.schedule import MAX_BATCH, Pace, Part, Patience, Schedule, Standing, Subtotal, proved


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


# --- who is late ------------------------------------------------------------------------------------------------------------------


def test_deadlines_follow_from_the_speed_measured_so_far() -> None:
    pace, patience = Pace(), Patience()
    assert pace.usual_s(10) is None
    assert patience.standing(patience.unknown_s - 1, pace.usual_s(10)) == Standing.PUNCTUAL
    pace.learn(4, 100.0)
    pace.learn(6, 200.0)
    assert pace.usual_s(10) == 300.0
    for silent_s, standing in ((599, Standing.PUNCTUAL), (600, Standing.SLOW), (3000, Standing.LATE), (6000, Standing.LOST)):
        assert patience.standing(silent_s, pace.usual_s(10)) == standing


def test_fast_answers_leave_everyone_a_least_time() -> None:
    patience = Patience()
    assert patience.standing(patience.slow_least_s - 0.01, 1e-6) == Standing.PUNCTUAL
    assert patience.standing(patience.late_least_s - 0.01, 1e-6) == Standing.SLOW
    assert patience.standing(patience.lost * patience.late_least_s - 0.01, 1e-6) == Standing.LATE
    assert patience.sync_late_after(1.0) == patience.sync_least_s
    assert patience.sync_late_after(10_000.0) == 20_000.0


@given(st.floats(0, 1e5), st.floats(0, 1e5), st.one_of(st.none(), st.floats(0, 1e4)))
def test_who_waits_longer_is_never_better_off(one_s: float, other_s: float, usual_s: float | None) -> None:
    patience = Patience()
    assert patience.standing(min(one_s, other_s), usual_s) <= patience.standing(max(one_s, other_s), usual_s)


# --- who does what ------------------------------------------------------------------------------------------------------------------


def test_batches_are_runs_of_a_shard_and_cover_all_items() -> None:
    schedule = Schedule(range(1000), [0, 1, 2], keeps=False)
    assert [item for batch in schedule.batches for item in batch] == list(range(1000))
    assert max(map(len, schedule.batches)) <= MAX_BATCH
    first = [schedule.batches[schedule.take(owner) or 0] for owner in range(3)]
    assert [batch[0] for batch in first] == [0, 333, 666]


def test_an_owner_without_work_takes_from_the_end_of_the_longest_run() -> None:
    schedule = Schedule(range(8), [0, 1], keeps=False)
    for _ in range(4):
        schedule.take(0)
    assert schedule.take(0) == len(schedule.batches) - 1
    assert schedule.take(1) == 4


def test_only_what_none_but_slow_owners_have_is_doubled_and_the_first_answer_counts() -> None:
    schedule = Schedule(range(3), [0, 1, 2], keeps=True)
    assert [schedule.take(owner) for owner in range(3)] == [0, 1, 2]
    assert schedule.answered(2, 2)
    assert schedule.double(2, slow=[]) is None
    assert schedule.double(2, slow=[1]) == 1
    assert schedule.double(2, slow=[0, 1]) == 0
    assert schedule.double(2, slow=[0, 1, 2]) is None  # it has them all
    assert schedule.answered(2, 1)
    assert not schedule.answered(1, 1)
    assert schedule.answered(0, 0)
    assert schedule.done
    assert not schedule.answered(2, 0)
    assert schedule.counting(2) == [2, 1]


def test_what_a_lost_owner_held_is_done_again_and_what_was_safe_is_not() -> None:
    schedule = Schedule(range(4), [0, 1], keeps=True)
    for owner in (0, 0, 1, 1):
        batch = schedule.take(owner)
        assert batch is not None
        assert schedule.answered(owner, batch)
    schedule.safe(0)
    schedule.lost(0)
    assert schedule.done
    schedule.moved(1, 2)
    schedule.lost(1)
    assert schedule.done
    schedule.lost(2)
    assert not schedule.done
    assert {schedule.take(0), schedule.take(0)} == {2, 3}
    assert schedule.take(0) is None


def test_what_another_still_has_at_hand_is_not_given_out_when_its_answer_is_lost() -> None:
    schedule = Schedule(range(1), [0, 1], keeps=True)
    assert schedule.take(0) == 0
    assert schedule.double(1, slow=[0]) == 0
    assert schedule.answered(1, 0)
    schedule.lost(1)
    assert schedule.take(1) is None
    schedule.in_vain(0, 0)
    assert schedule.take(1) == 0


# --- whose answer counts --------------------------------------------------------------------------------------------------------------


def test_nothing_counts_until_the_driver_says_so() -> None:
    subtotal: Subtotal[Count] = Subtotal()
    for batch in range(4):
        assert subtotal.settle(1, [], [])
        subtotal.keep(1, batch, Part.of([batch], Count.of([batch])))
    subtotal.settle(1, [0], [1])
    subtotal.settle(1, [0], [1])
    part = subtotal.give(1, [0, 2])
    assert part is not None
    assert part.items == {0, 2}
    assert part.total.of_item == {0: 1, 2: 1}


def test_an_answer_to_a_subtotal_that_was_given_away_counts_nowhere() -> None:
    subtotal: Subtotal[Count] = Subtotal()
    assert subtotal.settle(1, [], [])
    assert subtotal.give(1, []) is None
    subtotal.keep(1, 0, Part.of([0], Count.of([0])))
    assert not subtotal.settle(1, [0])
    assert subtotal.settle(7, [0])
    assert subtotal.give(7, [0]) is None


def test_a_total_proves_that_each_item_was_counted_once() -> None:
    part = Part.of([1, 2], Count.of([1, 2]))
    with pytest.raises(RunError, match=r"each item counted once, found 1 counted twice, 2 among them.*Fix:"):
        part.merge(Part.of([2, 3], Count.of([2, 3])))
    with pytest.raises(RunError, match=r"3 items counted, found 2 of them and 0 others"):
        proved(part, [1, 2, 3])
    with pytest.raises(RunError, match=r"1 items counted, found 0 of them"):
        proved(None, [1])
    assert proved(part, [2, 1]) is part.total


class Simulation:
    """The driver's side of a fold, as RayOwners does it, over owners that answer, are slow, and die in any order."""

    def __init__(self, items: int, owners: int, choose: random.Random) -> None:
        self.items, self.choose = range(items), choose
        self.schedule = Schedule(self.items, range(owners), keeps=True)
        self.subtotals: dict[int, Subtotal[Count]] = {n: Subtotal() for n in range(owners)}
        self.numbers = dict.fromkeys(range(owners), 1)
        self.last = 1
        self.verdicts: dict[int, tuple[list[int], list[int]]] = {n: ([], []) for n in range(owners)}
        self.calls: dict[int, list[tuple[int, int, tuple[list[int], list[int]]]]] = {n: [] for n in range(owners)}
        self.computing: dict[int, bool] = dict.fromkeys(range(owners), False)
        self.replies: list[tuple[int, int, int]] = []  # (owner, number, batch), on their way to the driver
        self.most_apart = 0

    def next_number(self, owner: int) -> None:
        self.last += 1
        self.numbers[owner], self.verdicts[owner] = self.last, ([], [])

    def send(self, owner: int) -> None:
        if len(self.calls[owner]) + sum(r[0] == owner for r in self.replies) >= 2:
            return
        batch = self.schedule.take(owner)
        if batch is None:
            slow = [n for n in self.subtotals if self.choose.random() < 0.7]
            batch = self.schedule.double(owner, slow)
        if batch is not None:
            self.calls[owner].append((self.numbers[owner], batch, self.verdicts[owner]))
            self.verdicts[owner] = ([], [])

    def work(self, owner: int) -> None:
        """The owner's first thread goes on: it begins its next call, or finishes it."""
        if not self.calls[owner]:
            return
        number, batch, verdicts = self.calls[owner][0]
        if not self.computing[owner]:
            self.subtotals[owner].settle(number, *verdicts)
            self.computing[owner] = True
            return
        items = self.schedule.batches[batch]
        self.subtotals[owner].keep(number, batch, Part.of(items, Count.of(items)))
        self.most_apart = max(self.most_apart, len(self.subtotals[owner]._apart))
        self.calls[owner].pop(0)
        self.computing[owner] = False
        self.replies.append((owner, number, batch))

    def hear(self, owner: int) -> None:
        reply = next((r for r in self.replies if r[0] == owner), None)
        if reply is None:
            return
        self.replies.remove(reply)
        _, number, batch = reply
        if number != self.numbers[owner]:
            self.schedule.in_vain(owner, batch)
        else:
            self.verdicts[owner][0 if self.schedule.answered(owner, batch) else 1].append(batch)

    def die(self, owner: int) -> None:
        self.schedule.lost(owner)
        new = max(self.subtotals) + 1
        for of_owner in (self.subtotals, self.calls, self.computing, self.numbers, self.verdicts):
            del of_owner[owner]  # type: ignore[attr-defined]
        self.replies = [r for r in self.replies if r[0] != owner]
        self.subtotals[new], self.calls[new], self.computing[new] = Subtotal(), [], False
        self.next_number(new)

    def give(self, owner: int) -> Part[Count] | None:
        number, counting = self.numbers[owner], self.schedule.counting(owner)
        self.next_number(owner)
        return self.subtotals[owner].give(number, counting)

    def add_up(self) -> None:
        holders = self.schedule.holders()
        self.choose.shuffle(holders)
        giver, taker = holders[:2]
        part = self.give(giver)
        match self.choose.randrange(4):
            case 0:  # the total is lost on its way
                self.schedule.forgotten(giver)
                self.schedule.forgotten(taker)
                self.next_number(taker)
            case 1:  # the taker dies with both
                self.schedule.forgotten(giver)
                self.die(taker)
            case _:
                self.subtotals[taker].absorb(self.numbers[taker], part)
                self.schedule.moved(giver, taker)


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 40), st.integers(1, 5), st.integers(0, 6), st.integers(0, 1 << 32))
def test_totals_are_equal_for_any_schedule(items: int, owners: int, deaths: int, seed: int) -> None:
    choose = random.Random(seed)
    world = Simulation(items, owners, choose)
    steps = [world.send, world.work, world.hear]
    for _ in range(100_000):
        if deaths and choose.random() < 0.02:
            deaths -= 1
            world.die(choose.choice(list(world.subtotals)))
        if not world.schedule.done:
            choose.choice(steps)(choose.choice(list(world.subtotals)))
            continue
        holders = world.schedule.holders()
        if len(holders) > 1:
            world.add_up()
            continue
        total = proved(world.give(holders[0]), world.items)
        assert total.of_item == dict.fromkeys(range(items), 1)
        assert world.most_apart <= 2
        return
    raise AssertionError("it does not end")


# --- owners in this process -----------------------------------------------------------------------------------------------------------


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


# --- which cluster ----------------------------------------------------------------------------------------------------------------------


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
