"""Exact order statistics of an array that nobody holds whole, from counts that add up.

The element of rank k (0-based, ascending) of D values is found without sorting or moving them:

1. Values become integer *keys* that sort alike (`kernels.reference.keys`; -0 and +0 share one key).
2. A deterministic sample proposes a `Bracket` [lo, hi] that should hold the wanted key (`Sample.bracket`).
3. One sweep counts, against the bracket, how many keys lie below lo, at lo, below hi and at hi, and collects the few strictly
between as
   (key, count): a `Tally`. Tallies of disjoint parts add up to the same total in any order and any grouping.
4. `Tally.select` proves the answer by counting - or, when the sample misled, returns a narrower bracket for another sweep.

Ties are counted, never collected: an endpoint has its own counters, and equal keys between the endpoints share one entry. A tally
that would outgrow its bound drops low bits of its keys (`shift`) and leaves the rest to another sweep; so memory is bounded for any
data, and the answer is exact for any data.

Only numpy: the driver of a merge holds no tensor.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Keys = NDArray[np.int64]

ADDED_AT_ONCE = 1 << 16  # entries of a tally
MAX_PENDING = 4096  # arrays of keys that wait to be added up: each takes some memory of its own
# Groups of interleaved sample runs: their spread shows how far the sample's ranks can be trusted on data that varies along the
# model.
GROUP_BITS = 4
SAMPLE_GROUPS = 1 << GROUP_BITS
SAMPLE_PENDING = 1 << 16  # entries that a sample collects before it adds them up, or as many as it has


@dataclasses.dataclass(frozen=True)
class Bracket:
    """The wanted key is believed to lie in lo..hi, both included."""

    lo: int
    hi: int


def add_up(keys: Keys, counts: Keys) -> tuple[Keys, Keys]:
    """Sorted distinct keys with their summed counts."""
    order = np.argsort(keys, kind="stable")
    keys, counts = keys[order], counts[order]
    first = np.flatnonzero(np.concatenate(([True], keys[1:] != keys[:-1]))) if len(keys) else np.zeros(0, dtype=np.int64)
    return keys[first], np.add.reduceat(counts, first) if len(first) else counts


def tally_bytes(max_entries: int) -> int:
    """The most memory of a tally: its entries, and the keys that wait to be added up."""
    return max_entries * 16 + max_entries // 4 * 8


def adding_bytes(max_entries: int) -> int:
    """The most memory that a process takes beside its tallies while it adds to one of them."""
    return max_entries * 16 + ADDED_AT_ONCE * 128


class _Entries(NamedTuple):
    """Ascending keys with their counts, and how many low bits the keys are yet to lose."""

    keys: Keys
    counts: Keys
    drop: int


def _sum_of(one: _Entries, other: _Entries, max_entries: int) -> tuple[Keys, Keys] | None:
    """The entries of both, added up; nothing if they are too many. They are taken a run at a time, so that little more than the
    result takes memory."""
    size = min(max_entries, len(one.keys) + len(other.keys))
    keys, counts, at = np.empty(size, dtype=np.int64), np.empty(size, dtype=np.int64), 0
    # A run begins at a key as it is after the drop: none is cut in two.
    cuts = np.sort(np.concatenate([part.keys[ADDED_AT_ONCE::ADDED_AT_ONCE] >> part.drop for part in (one, other)]))
    bounds = [[0, *np.searchsorted(part.keys, cuts << part.drop).tolist(), len(part.keys)] for part in (one, other)]
    for (a, b), (c, d) in zip(*map(itertools.pairwise, bounds), strict=True):
        run_keys, run_counts = add_up(
            np.concatenate((one.keys[a:b] >> one.drop, other.keys[c:d] >> other.drop)),
            np.concatenate((one.counts[a:b], other.counts[c:d])),
        )
        stop = at + len(run_keys)
        if stop > size:
            return None
        keys[at:stop], counts[at:stop], at = run_keys, run_counts, stop
    return keys[:at], counts[:at]


class Tally:
    """Counts of keys against a bracket: below lo, up to lo, below hi, up to hi, and (key, count) strictly between.

    It has at most `max_entries` of these; beyond that its keys lose low bits."""

    def __init__(self, bracket: Bracket, max_entries: int) -> None:
        self.bracket = bracket
        self.max_entries = max_entries
        self.below_lo = self.upto_lo = self.below_hi = self.upto_hi = 0
        self.shift = 0  # low bits dropped from the keys between
        self.keys: Keys = np.zeros(0, dtype=np.int64)
        self.counts: Keys = np.zeros(0, dtype=np.int64)
        self._pending: list[NDArray[np.signedinteger]] = []
        self._pending_size = 0

    def add(self, below_lo: int, upto_lo: int, below_hi: int, upto_hi: int, inside: NDArray[np.signedinteger]) -> None:
        """Count one part of the data; `inside` are its keys strictly between lo and hi (kept, not copied)."""
        self.below_lo += below_lo
        self.upto_lo += upto_lo
        self.below_hi += below_hi
        self.upto_hi += upto_hi
        if len(inside):
            self._collect([inside])

    def _collect(self, parts: list[NDArray[np.signedinteger]]) -> None:
        self._pending += parts
        self._pending_size += sum(map(len, parts))
        if self._pending_size > self.max_entries // 4 or len(self._pending) > MAX_PENDING:
            self._compact()

    def merge(self, other: Tally) -> None:
        """Add the counts of another part of the data, taken against the same bracket."""
        if self.bracket != other.bracket:
            raise AssertionError(f"counts against {other.bracket} are no part of those against {self.bracket}")
        self.below_lo += other.below_lo
        self.upto_lo += other.upto_lo
        self.below_hi += other.below_hi
        self.upto_hi += other.upto_hi
        self._collect(other._pending)
        self._put(other.keys, other.counts, other.shift)

    def _put(self, keys: Keys, counts: Keys, lost: int) -> None:
        """Add entries whose keys have lost so many low bits already."""
        shift = max(self.shift, lost)
        while True:
            mine, theirs = _Entries(self.keys, self.counts, shift - self.shift), _Entries(keys, counts, shift - lost)
            if (found := _sum_of(mine, theirs, self.max_entries)) is not None:
                break
            shift += 1
        (self.keys, self.counts), self.shift = found, shift

    def _compact(self) -> None:
        if self._pending:
            keys, counts = np.unique(np.concatenate(self._pending), return_counts=True)
            self._pending, self._pending_size = [], 0
            self._put(keys.astype(np.int64), counts.astype(np.int64), 0)

    def __getstate__(self) -> dict[str, object]:
        self._compact()
        return self.__dict__

    def select(self, rank: int, smallest: int, largest: int) -> int | Bracket:
        """The key of this 0-based rank, proved by the counts; or, if they don't decide it, a bracket in which it does lie.

        `smallest` and `largest` bound all keys of the data type."""
        self._compact()
        lo, hi = self.bracket.lo, self.bracket.hi
        if rank < self.below_lo:
            return Bracket(smallest, lo - 1)
        if rank < self.upto_lo:
            return lo
        if rank < self.below_hi:
            upto = self.upto_lo + np.cumsum(self.counts)
            key = int(self.keys[np.searchsorted(upto, rank, side="right")])
            if self.shift == 0:
                return key
            return Bracket(max(key << self.shift, lo + 1), min(((key + 1) << self.shift) - 1, hi - 1))
        if rank < self.upto_hi:
            return hi
        if hi >= largest:
            raise AssertionError(f"rank {rank} of {self.upto_hi} values")
        return Bracket(hi + 1, largest)


class Sample:
    """Where the keys of a sample lie: for each group of sample runs, how many keys fall in each bin of 2^shift keys."""

    def __init__(self, shift: int) -> None:
        self.shift = shift
        self.bins: Keys = np.zeros(0, dtype=np.int64)  # (bin, group) as bin << GROUP_BITS | group, ascending
        self.counts: Keys = np.zeros(0, dtype=np.int64)
        self._pending: list[tuple[Keys, Keys]] = []

    def add(self, keys: NDArray[np.signedinteger], runs: NDArray[np.signedinteger]) -> None:
        """Count keys [B]; `runs` [B] are the numbers of the sample runs that they belong to."""
        groups = (runs & (SAMPLE_GROUPS - 1)).astype(keys.dtype)
        bins, counts = np.unique(keys >> self.shift << GROUP_BITS | groups, return_counts=True)
        self._collect([(bins.astype(np.int64), counts.astype(np.int64))])

    def merge(self, other: Sample) -> None:
        if self.shift != other.shift:
            raise AssertionError(f"bins of 2^{other.shift} keys are none of 2^{self.shift}")
        self._collect([*other._pending, (other.bins, other.counts)])

    def _collect(self, parts: list[tuple[Keys, Keys]]) -> None:
        self._pending += parts
        if sum(len(bins) for bins, _ in self._pending) > max(SAMPLE_PENDING, len(self.bins)):
            self._compact()

    def _compact(self) -> None:
        parts = [(self.bins, self.counts), *self._pending]
        self.bins, self.counts = add_up(*(np.concatenate(column) for column in zip(*parts, strict=True)))
        self._pending = []

    def __getstate__(self) -> dict[str, object]:
        self._compact()
        return self.__dict__

    def bracket(self, rank: int, D: int, smallest: int, largest: int, tally_entries: int) -> Bracket:
        """A bracket for the key of this rank among all D, wide enough that missing it is rare; any answer is safe."""
        self._compact()
        bin_of, group_of = self.bins >> GROUP_BITS, self.bins & (SAMPLE_GROUPS - 1)
        bins, counts = add_up(bin_of, self.counts)
        total = int(counts.sum())
        if total == 0:
            return Bracket(smallest, largest)
        upto = np.cumsum(counts)
        q = (rank + 0.5) / D
        centre = bins[min(int(np.searchsorted(upto, q * total, side="left")), len(bins) - 1)]
        # Two reasons for a wrong rank: chance within the sample, and runs that differ from the model's average. The second is
        # estimated from how the groups disagree about the share of keys below the centre.
        of_group, below_of_group = (
            np.bincount(group_of[part], weights=self.counts[part], minlength=SAMPLE_GROUPS)
            for part in (slice(None), bin_of < centre)
        )
        below = below_of_group[of_group > 0] / of_group[of_group > 0]
        spread = float(np.std(below, ddof=1)) / math.sqrt(len(below)) if len(below) > 1 else 0.1
        margin = 6.0 * max(spread, math.sqrt(q * (1.0 - q) / total)) + 4.0 / total
        # A wider bracket is free as long as its keys surely fit in a tally.
        margin = max(margin, 0.125 * tally_entries / D)
        first = bins[min(int(np.searchsorted(upto, (q - margin) * total, side="left")), len(bins) - 1)] if q > margin else None
        last_at = int(np.searchsorted(upto, (q + margin) * total, side="left"))
        lo = smallest if first is None else int(first) << self.shift
        hi = largest if last_at >= len(bins) else ((int(bins[last_at]) + 1) << self.shift) - 1
        return Bracket(max(lo, smallest), min(hi, largest))
