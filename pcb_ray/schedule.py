"""Who does which part of a sweep, whose answer counts, and who is late: decisions only, without Ray and without a clock.

The items of a question are cut into batches. Each owner works through a contiguous run of them; one that is done takes from the end of the longest
run left, and one that finds nothing left *doubles* what a slow owner has at hand. The first answer counts.

Answers that add up stay with the owners, and there a batch that two have answered must count once. So **nothing counts until the driver says so**:
an owner keeps each answer apart (`Subtotal`) until it hears, with its next call, whether it counts. The driver (`Schedule`) says so of one answer to
each batch, and takes it back only by giving up all that this owner has counted. A total carries the numbers of its items from the first addition to
the last (`Part`), so that the end is proved and not assumed.
"""

from __future__ import annotations

import collections
import enum
import itertools
import threading
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Generic

from pcb_ray.errors import RunError
from pcb_ray.questions import TotalT

BATCHES_PER_OWNER = 32  # an owner's run is asked for in about so many batches: progress, and work for those who finish early
MAX_BATCH = 64


def batches_of(items: Sequence[int], size: int) -> list[Sequence[int]]:
    """The items in runs of at most `size`."""
    return [items[at : at + size] for at in range(0, len(items), size)]


# --- time ---------------------------------------------------------------------------------------------------------------------------


class Standing(enum.IntEnum):
    """What to think of an owner that has not answered for a while."""

    PUNCTUAL = 0
    SLOW = 1  # an idle owner may do its work too
    LATE = 2  # worth a warning
    LOST = 3  # to be replaced, as if it were dead


@dataclass(frozen=True)
class Patience:
    """How long an owner may take for a call. What is usual follows from the batches that were answered; times are in seconds.

    Time in which the driver itself did not wait (because it was stopped, or busy with an answer) counts against nobody.
    """

    slow: float = 2.0  # it is slow after so many times the usual time,
    slow_least_s: float = 2.0  # but not sooner than this
    late: float = 10.0  # it is late after so many times the usual time,
    late_least_s: float = 60.0  # but not sooner than this,
    unknown_s: float = 600.0  # and after this where nothing is known yet of what is usual
    lost: float = 2.0  # it is lost after so many times the time until it was late
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

    def __init__(self) -> None:
        self._items, self._seconds = 0, 0.0

    def learn(self, items: int, seconds: float) -> None:
        """So many items took so long."""
        self._items += items
        self._seconds += seconds

    def usual_s(self, items: int) -> float | None:
        """What so many items take; nothing is known before the first answer."""
        return items * self._seconds / self._items if self._items else None


# --- who does what ------------------------------------------------------------------------------------------------------------------


class Schedule:
    """Which batches of one question are to do, at hand, and answered; and by whom. Batches and owners are numbers.

    With `keeps`, answers stay with their owners (in totals, or in files that are not yet durable) and are lost with them.
    """

    def __init__(self, items: Sequence[int], owners: Sequence[int], *, keeps: bool) -> None:
        size = max(1, min(MAX_BATCH, len(items) // max(1, len(owners) * BATCHES_PER_OWNER)))
        self.batches: list[Sequence[int]] = []
        self._todo: dict[int, collections.deque[int]] = {}
        cuts = [len(items) * k // len(owners) for k in range(len(owners) + 1)]
        for owner, (start, stop) in zip(owners, itertools.pairwise(cuts), strict=True):
            first = len(self.batches)
            self.batches += batches_of(items[start:stop], size)
            self._todo[owner] = collections.deque(range(first, len(self.batches)))
        self._keeps = keeps
        self._at: dict[int, set[int]] = {}  # batch -> the owners that have it at hand
        self._answered: dict[int, int] = {}  # batch -> the owner whose answer counts
        self._holder: dict[
            int, int
        ] = {}  # batch -> the owner with which the answer would be lost; another's once totals were added up

    @property
    def done(self) -> bool:
        """Whether every batch has an answer that counts."""
        return len(self._answered) == len(self.batches)

    def is_answered(self, batch: int) -> bool:
        """Whether this batch has an answer that counts."""
        return batch in self._answered

    def take(self, owner: int) -> int | None:
        """The next batch of this owner's run, or the last one of the longest run: it is at its hand now."""
        if self._todo.get(owner):
            batch = self._todo[owner].popleft()
        else:
            longest = max(self._todo.values(), key=len, default=None)
            if not longest:
                return None
            batch = longest.pop()
        self._at[batch] = {owner}
        return batch

    def double(self, owner: int, slow: Collection[int]) -> int | None:
        """A batch that only slow owners have at hand: now this owner has it as well. The one goes first that the fewest have."""
        candidates = [b for b, at in self._at.items() if at and b not in self._answered and owner not in at and at.issubset(slow)]
        if not candidates:
            return None
        batch = min(candidates, key=lambda b: (len(self._at[b]), b))
        self._at[batch].add(owner)
        return batch

    def answered(self, owner: int, batch: int) -> bool:
        """This owner has answered; whether its answer counts, which it does if it is the first."""
        self._at[batch].discard(owner)
        if batch in self._answered:
            return False
        self._answered[batch] = owner
        if self._keeps:
            self._holder[batch] = owner
        return True

    def in_vain(self, owner: int, batch: int) -> None:
        """This owner has answered, but its answer is of no use."""
        self._at[batch].discard(owner)
        self._put_back(owner, batch)

    def lost(self, owner: int) -> None:
        """This owner is gone: what it had at hand, and what it held, is to do again unless another has it at hand."""
        self.forgotten(owner)
        for batch in [b for b, at in self._at.items() if owner in at]:
            self.in_vain(owner, batch)

    def forgotten(self, owner: int) -> None:
        """What this owner held is gone, and to do again."""
        for batch in self.held(owner):
            del self._holder[batch], self._answered[batch]
            self._put_back(owner, batch)

    def safe(self, owner: int) -> None:
        """What this owner held can't be lost any more."""
        for batch in self.held(owner):
            del self._holder[batch]

    def moved(self, giver: int, taker: int) -> None:
        """What one owner held is now held by another."""
        self._holder.update(dict.fromkeys(self.held(giver), taker))

    def held(self, owner: int) -> list[int]:
        """The batches that would be lost with this owner."""
        return [batch for batch, holder in self._holder.items() if holder == owner]

    def counting(self, owner: int) -> list[int]:
        """The batches that this owner has answered itself, whose answers count, and which it holds."""
        return [batch for batch in self.held(owner) if self._answered[batch] == owner]

    def items_of(self, batches: Iterable[int]) -> int:
        """How many items these batches have."""
        return sum(len(self.batches[b]) for b in batches)

    def holders(self) -> list[int]:
        """The owners that hold something, in the order in which they came to it."""
        return list(dict.fromkeys(self._holder.values()))

    def _put_back(self, owner: int, batch: int) -> None:
        if batch not in self._answered and not self._at[batch]:
            self._todo.setdefault(owner, collections.deque()).appendleft(batch)


# --- totals -------------------------------------------------------------------------------------------------------------------------


@dataclass
class Part(Generic[TotalT]):
    """A total of some answers, and the items that it counts."""

    total: TotalT
    items: set[int]

    @classmethod
    def of(cls, items: Iterable[int], answer: TotalT) -> Part[TotalT]:
        """One answer, about these items."""
        return cls(answer, set(items))

    def merge(self, other: Part[TotalT]) -> None:
        """Add the answers about other items. Raises RunError if one of them is counted already."""
        if twice := self.items & other.items:
            raise _miscounted(f"each item counted once, found {len(twice)} counted twice, {min(twice)} among them")
        self.total.merge(other.total)
        self.items |= other.items


def proved(part: Part[TotalT] | None, items: Iterable[int]) -> TotalT:
    """The total, if it counts exactly these items. Raises RunError if it does not."""
    wanted, found = set(items), part.items if part else set()
    if part is None or wanted != found:
        raise _miscounted(f"{len(wanted)} items counted, found {len(wanted & found)} of them and {len(found - wanted)} others")
    return part.total


class Subtotal(Generic[TotalT]):
    """What one owner has counted: a part, and apart from it the answers of which the driver has not said yet whether they count.

    Subtotals of an owner have growing numbers. The driver names one with each call, and a greater number begins the next one; an answer that comes
    when its subtotal was given away counts nowhere. The part may be given and added to while an answer is computed: by another thread.
    """

    def __init__(self) -> None:
        self._number = 0
        self._part: Part[TotalT] | None = None
        self._apart: dict[int, Part[TotalT]] = {}
        self._lock = threading.Lock()

    def settle(self, number: int, counting: Iterable[int], dropping: Iterable[int] = ()) -> bool:
        """Count the answers to some batches and forget those to others; to hear again what was settled before does nothing. Returns whether an
        answer that is computed now could count."""
        with self._lock:
            if number > self._number:
                self._number, self._part, self._apart = number, None, {}
            if number == self._number:
                self._settle(counting, dropping)
            return number == self._number

    def keep(self, number: int, batch: int, answer: Part[TotalT]) -> None:
        """Keep an answer apart, if its subtotal is still here."""
        with self._lock:
            if number == self._number:
                self._apart[batch] = answer

    def give(self, number: int, counting: Iterable[int]) -> Part[TotalT] | None:
        """The part with exactly the answers that count. What else comes to this subtotal counts nowhere."""
        with self._lock:
            if number != self._number:
                return None
            self._settle(counting)
            part = self._part
            self._number, self._part, self._apart = number + 1, None, {}
            return part

    def absorb(self, number: int, part: Part[TotalT] | None) -> None:
        """Add what another owner has counted. Raises RunError if that is nothing."""
        if part is None:
            raise _miscounted("the total of an owner that has counted, found none")
        with self._lock:
            if number > self._number:
                self._number, self._part, self._apart = number, None, {}
            if number == self._number:
                self._add(part)

    def _settle(self, counting: Iterable[int], dropping: Iterable[int] = ()) -> None:
        for batch in dropping:
            self._apart.pop(batch, None)
        for batch in counting:
            if (answer := self._apart.pop(batch, None)) is not None:
                self._add(answer)

    def _add(self, part: Part[TotalT]) -> None:
        if self._part is None:
            self._part = part
        else:
            self._part.merge(part)


def _miscounted(what: str) -> RunError:
    return RunError(
        f"a total over the model: wanted {what}. Fix: this is an error of pcb-ray; please report it, with the log of -v"
    )
