"""Who does which part of a sweep, whose answer counts, and who is late: decisions only, without Ray and without a clock.

The items of a question are cut into batches. Each owner works through a run of them whose bytes lie on its node, as far as that is
known; one that is done takes from the end of the longest run left on its node, then of another, and one that finds nothing left
*doubles* what a slow owner has at hand. The first answer counts.

Answers that add up stay with the owners, and there a batch that two have answered must count once. So **nothing counts until the
driver says so**: an owner keeps each answer apart (`Subtotal`) until it hears, with its next call, whether it counts. The driver
(`Schedule`) says so of one answer to each batch, and takes it back only by giving up all that this owner has counted. A total
carries the numbers of its items from the first addition to the last (`PartialTotal`), so that the end is proved and not assumed."""

from __future__ import annotations

import collections
import enum
import heapq
import itertools
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, NamedTuple, TypeVar

from pcb_ray.errors import RunError
from pcb_ray.questions import TotalT

BATCHES_PER_OWNER = 32  # an owner's run is asked for in about so many batches: progress, and work for those who finish early
MAX_BATCH = 64
WORTH_MOVING = 2  # on another node a batch takes about so much longer, since its bytes must get there first
NOBODY = -1  # whose run it is before there are owners


_Thing = TypeVar("_Thing")


def batches_of(items: Sequence[int], size: int) -> list[Sequence[int]]:
    """The items in runs of at most `size`."""
    return [items[at : at + size] for at in range(0, len(items), size)]


ExpectedS = Callable[[int], float]
"""How many seconds one owner may take for an item, where items differ much. Only the proportions must be about right."""


# --- time -------------------------------------------------------------------------------------------------------------------------


class Standing(enum.IntEnum):
    """What to think of an owner that has not answered for a while."""

    PUNCTUAL = 0
    SLOW = 1  # an idle owner may do its work too
    LATE = 2  # worth a warning
    LOST = 3  # to be replaced, as if it were dead


@dataclass(frozen=True)
class Patience:
    """How long an owner may take for a call, in seconds.

    What is usual follows from the batches of the same question that were answered, by their numbers of items: items should cost
    about alike. Time in which the driver itself did not wait (it was stopped, or busy with an answer) counts against nobody. The
    least times are generous: a file server that starts anew keeps its clients waiting for minutes, and nothing is wrong with them.
    """

    slow: float = 2.0  # it is slow after so many times the usual time,
    slow_least_s: float = 2.0  # but not sooner than this
    late: float = 10.0  # it is late after so many times the usual time,
    late_least_s: float = 120.0  # but not sooner than this,
    unknown_s: float = 600.0  # and after this where nothing is known yet of what is usual
    lost: float = 3.0  # it is lost after so many times the time until it was late
    start_s: float = 600.0  # an owner that opens its files is late after this,
    exchange_s: float = 120.0  # one that gives its total, or adds another's to it, after this,
    sync: float = 2.0  # and one that makes durable what it wrote after so many times the time that writing took,
    sync_least_s: float = 600.0  # but not sooner than this
    placement_s: float = 120.0  # a cluster that finds no place for any owner is given up after this

    def late_after(self, usual_s: float | None) -> float:
        """When an answer is late that usually takes so long."""
        return self.unknown_s if usual_s is None else max(self.late_least_s, self.late * usual_s)

    def sync_late_after(self, written_s: float | None) -> float:
        """When it is late to be durable, if the writing took so long."""
        return max(self.sync_least_s, self.sync * (written_s or 0.0))

    def slow_after(self, usual_s: float | None) -> float:
        """When an idle owner should do the same work, if it usually takes so long."""
        late_s = self.late_after(usual_s)
        return late_s if usual_s is None else min(late_s, max(self.slow_least_s, self.slow * usual_s))

    def standing(self, silent_s: float, usual_s: float | None) -> Standing:
        """Of an owner that has been at a batch for `silent_s`."""
        if silent_s < self.slow_after(usual_s):
            return Standing.PUNCTUAL
        return max(Standing.SLOW, self.standing_at(silent_s, self.late_after(usual_s)))

    def standing_at(self, silent_s: float, late_s: float) -> Standing:
        """The same for a call that nobody doubles and that is late after `late_s`."""
        if silent_s < late_s:
            return Standing.PUNCTUAL
        return Standing.LATE if silent_s < self.lost * late_s else Standing.LOST


class Pace:
    """How long items of one question take."""

    def __init__(self, expected_s: ExpectedS | None = None) -> None:
        self._expected_s = expected_s
        self._learned_s, self._took_s = 0.0, 0.0

    def learn(self, items: Sequence[int], seconds: float) -> None:
        """These items took so long."""
        self._learned_s += self._expected(items)
        self._took_s += seconds

    def usual_s(self, items: Sequence[int]) -> float | None:
        """What these items take: as was expected of them, by how that was wrong of others. Where nothing was expected, items should
        cost about alike, and before the first answer nothing is known."""
        if self._learned_s:
            return self._expected(items) * self._took_s / self._learned_s
        return None if self._expected_s is None else self._expected(items)

    def _expected(self, items: Sequence[int]) -> float:
        return float(len(items)) if self._expected_s is None else sum(map(self._expected_s, items))


# --- who does what ----------------------------------------------------------------------------------------------------------------


class Verdict(NamedTuple):
    """What an owner hears of its answers to batches: those that count in its subtotal of this number, and those to forget."""

    number: int
    counting: list[int]
    dropping: list[int]


def _shares(run: Sequence[int], count: int, expected_s: ExpectedS | None) -> list[Sequence[int]]:
    """A run of items for each of so many owners: equal numbers, or about equal times, the longest first."""
    if expected_s is None:
        cuts = [len(run) * k // count for k in range(count + 1)]
        return [run[start:stop] for start, stop in itertools.pairwise(cuts)]
    shares: list[list[int]] = [[] for _ in range(count)]
    loads = [(0.0, k) for k in range(count)]
    for item in sorted(run, key=expected_s, reverse=True):
        load, k = loads[0]
        shares[k].append(item)
        heapq.heapreplace(loads, (load + expected_s(item), k))
    return list(shares)


class Schedule:
    """Which batches of one question are to do, at hand, and answered; and by whom. Batches and owners are numbers.

    With `keeps`, answers stay with their owners (in totals, or in files that are not yet durable) and are lost with them. `numbers`
    are those of their subtotals: they grow from question to question."""

    def __init__(
        self,
        items: Sequence[int],
        owners: Mapping[int, str],
        homes: Sequence[str] = (),
        *,
        keeps: bool,
        numbers: Iterator[int],
        expected_s: ExpectedS | None = None,
    ) -> None:
        """`owners` and the nodes that they are on; `homes` are the nodes where the bytes of the items lie, empty where nobody knows
        or cares. Where it is said what items cost, the most costly come first, each to who has least to do."""
        size = 1 if expected_s else max(1, min(MAX_BATCH, len(items) // max(1, len(owners) * BATCHES_PER_OWNER)))
        self.batches: list[Sequence[int]] = []
        self._nodes = dict(owners)  # of all owners there were
        self._todo: dict[int, collections.deque[int]] = {}  # by the owner whose run it is, who may be gone
        of_node = _grouped(owners, owners.values())
        known = [home if home in of_node else "" for home in homes] or [""] * len(items)
        everyone = list(itertools.chain.from_iterable(of_node.values())) or [NOBODY]
        for home, run in _grouped(items, known).items():
            sharing = of_node[home] if home else everyone
            for owner, share in zip(sharing, _shares(run, len(sharing), expected_s), strict=True):
                first = len(self.batches)
                self.batches += batches_of(share, size)
                self._todo.setdefault(owner, collections.deque()).extend(range(first, len(self.batches)))
        self._keeps, self._numbers = keeps, numbers
        self._news: dict[int, Verdict] = {}  # owner -> what it has not heard yet
        self._at: dict[int, set[int]] = {}  # batch -> the owners that have it at hand, if there are any
        self._answered: dict[int, int] = {}  # batch -> the owner whose answer counts
        self._held: dict[int, list[int]] = {}  # owner -> the batches whose answers would be lost with it

    @property
    def done(self) -> bool:
        """Whether every batch has an answer that counts."""
        return len(self._answered) == len(self.batches)

    def is_answered(self, batch: int) -> bool:
        """Whether this batch has an answer that counts."""
        return batch in self._answered

    def take(self, owner: int, able: Mapping[int, str]) -> int | None:
        """The next batch of this owner's run, or the last one of the longest run on its node, or else on a node that would not
        begin it soon: for each owner there who is `able` to (they are given with their nodes) it has more than WORTH_MOVING left.
        The batch is at its hand now."""
        self._nodes[owner] = able[owner]
        if self._todo.get(owner):
            batch = self._todo[owner].popleft()
        else:
            longest = max(self._runs_for(owner, able), key=len, default=None)
            if longest is None:
                return None
            batch = longest.pop()
        self._at[batch] = {owner}
        return batch

    def following(self, owner: int) -> Sequence[int]:
        """What this owner is asked for next, as far as that is known."""
        run = self._todo.get(owner)
        return self.batches[run[0]] if run else ()

    def _runs_for(self, owner: int, able: Mapping[int, str]) -> list[collections.deque[int]]:
        """The runs from which this owner may take."""
        left = {whose: run for whose, run in self._todo.items() if run}
        of_node = _grouped(left.values(), [self._nodes.get(whose, "") for whose in left])
        if here := of_node.get(able[owner]):
            return here
        there = collections.Counter(able.values())
        return [run for node, runs in of_node.items() if sum(map(len, runs)) > WORTH_MOVING * there[node] for run in runs]

    def double(self, owner: int, slow: Collection[int]) -> int | None:
        """A batch that only slow owners have at hand: now this owner has it as well. The one goes first that the fewest have."""
        candidates = [b for b, at in self._at.items() if b not in self._answered and owner not in at and at.issubset(slow)]
        if not candidates:
            return None
        batch = min(candidates, key=lambda b: (len(self._at[b]), b))
        self._at[batch].add(owner)
        return batch

    def answered(self, owner: int, batch: int, number: int) -> bool:
        """This owner has answered for its subtotal of this number; whether its answer counts, which it does if it is the first. An
        answer that came when its subtotal was given away is of no use."""
        news = self._news_for(owner)
        if number != news.number:
            self.in_vain(owner, batch)
            return False
        self._let_go(owner, batch)
        if batch in self._answered:
            news.dropping.append(batch)
            return False
        self._answered[batch] = owner
        news.counting.append(batch)
        if self._keeps:
            self._held.setdefault(owner, []).append(batch)
        return True

    def in_vain(self, owner: int, batch: int) -> None:
        """This owner is done with a batch, but its answer is of no use."""
        self._let_go(owner, batch)
        self._put_back(owner, batch)

    def lost(self, owner: int) -> None:
        """This owner is gone: what it had at hand, and what it held, is to do again unless another has it at hand."""
        self.forgotten(owner)
        for batch in [b for b, at in self._at.items() if owner in at]:
            self.in_vain(owner, batch)

    def forgotten(self, owner: int) -> None:
        """What this owner held is gone, and to do again; it begins another subtotal."""
        self._news.pop(owner, None)
        for batch in self._held.pop(owner, []):
            del self._answered[batch]
            self._put_back(owner, batch)

    def safe(self, owner: int) -> None:
        """What this owner held can't be lost any more."""
        self._held.pop(owner, None)

    def moved(self, giver: int, taker: int) -> None:
        """What one owner held is now held by another."""
        self._held.setdefault(taker, []).extend(self._held.pop(giver))

    def holders(self) -> list[int]:
        """The owners that hold something."""
        return list(self._held)

    def items_held(self, owner: int) -> list[int]:
        """The items that would be lost with this owner."""
        return [item for batch in self._held.get(owner, ()) for item in self.batches[batch]]

    def verdict(self, owner: int) -> Verdict:
        """What this owner is to hear with its next batch."""
        news = self._news_for(owner)
        self._news[owner] = Verdict(news.number, [], [])
        return news

    def number_of(self, owner: int) -> int:
        """The number of this owner's subtotal."""
        return self._news_for(owner).number

    def last_verdict(self, owner: int) -> Verdict:
        """What this owner is to hear when it gives its subtotal away, whether it heard of it before or not; it begins another
        one."""
        number = self._news_for(owner).number
        del self._news[owner]
        return Verdict(number, [batch for batch in self._held.get(owner, ()) if self._answered[batch] == owner], [])

    def _news_for(self, owner: int) -> Verdict:
        if owner not in self._news:
            self._news[owner] = Verdict(next(self._numbers), [], [])
        return self._news[owner]

    def _let_go(self, owner: int, batch: int) -> None:
        self._at[batch].remove(owner)
        if not self._at[batch]:
            del self._at[batch]

    def _put_back(self, owner: int, batch: int) -> None:
        if batch not in self._answered and batch not in self._at:
            self._todo.setdefault(owner, collections.deque()).appendleft(batch)


def _grouped(things: Iterable[_Thing], keys: Iterable[str]) -> dict[str, list[_Thing]]:
    """The things that have the same key, in their order."""
    found: dict[str, list[_Thing]] = {}
    for thing, key in zip(things, keys, strict=True):
        found.setdefault(key, []).append(thing)
    return found


# --- totals -----------------------------------------------------------------------------------------------------------------------


@dataclass
class PartialTotal(Generic[TotalT]):
    """A total of some answers, and the items that it counts."""

    total: TotalT
    items: set[int]

    @classmethod
    def of(cls, items: Iterable[int], answer: TotalT) -> PartialTotal[TotalT]:
        """One answer, about these items."""
        return cls(answer, set(items))

    def merge(self, other: PartialTotal[TotalT]) -> None:
        """Add the answers about other items. Raises RunError if one of them is counted already."""
        if twice := self.items & other.items:
            raise _miscounted(f"each item counted once, found {len(twice)} counted twice, {min(twice)} among them")
        self.total.merge(other.total)
        self.items |= other.items


def proved(part: PartialTotal[TotalT] | None, items: Iterable[int]) -> TotalT:
    """The total, if it counts exactly these items. Raises RunError if it does not."""
    wanted, found = set(items), part.items if part else set()
    if part is None or wanted != found:
        raise _miscounted(f"{len(wanted)} items counted, found {len(wanted & found)} of them and {len(found - wanted)} others")
    return part.total


class Subtotal(Generic[TotalT]):
    """What one owner has counted: a part, and apart from it the answers of which the driver has not said yet whether they count.

    Subtotals of an owner have growing numbers. The driver names one with each call, and a greater number begins the next one; an
    answer that comes when its subtotal was given away counts nowhere. The part may be given and added to while an answer is
    computed: by another thread."""

    def __init__(self) -> None:
        self._number = 0
        self._part: PartialTotal[TotalT] | None = None
        self._apart: dict[int, PartialTotal[TotalT]] = {}
        self._lock = threading.Lock()

    def settle(self, verdict: Verdict) -> bool:
        """Count answers and forget others; to hear again what was settled before does nothing. Returns whether an answer that is
        computed now could count."""
        with self._lock:
            if verdict.number > self._number:
                self._begin(verdict.number)
            if verdict.number == self._number:
                self._settle(verdict)
            return verdict.number == self._number

    def keep(self, number: int, batch: int, answer: PartialTotal[TotalT]) -> None:
        """Keep an answer apart, if its subtotal is still here."""
        with self._lock:
            if number == self._number:
                self._apart[batch] = answer

    def give(self, verdict: Verdict) -> PartialTotal[TotalT] | None:
        """The part with exactly the answers that count. What else comes to this subtotal counts nowhere."""
        with self._lock:
            if verdict.number != self._number:
                return None
            self._settle(verdict)
            part = self._part
            self._begin(self._number + 1)
            return part

    def absorb(self, number: int, part: PartialTotal[TotalT] | None) -> None:
        """Add what another owner has counted. Raises RunError if there is nothing to add, or no subtotal to add it to."""
        with self._lock:
            if number > self._number:
                self._begin(number)
            if part is None or number != self._number:
                raise _miscounted("two subtotals to add up, found one at most")
            self._add(part)

    def _begin(self, number: int) -> None:
        self._number, self._part, self._apart = number, None, {}

    def _settle(self, verdict: Verdict) -> None:
        for batch in verdict.dropping:
            self._apart.pop(batch, None)
        for batch in verdict.counting:
            if (answer := self._apart.pop(batch, None)) is not None:
                self._add(answer)

    def _add(self, part: PartialTotal[TotalT]) -> None:
        if self._part is None:
            self._part = part
        else:
            self._part.merge(part)


def _miscounted(what: str) -> RunError:
    return RunError(
        f"a total over the model: wanted {what}. Fix: this is an error of pcb-ray; please report it, with the log of -v"
    )
