"""What the driver asks for and owners answer, in numbers alone: the driver of a merge needs no torch."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from pcb_ray.selection import Sample, Tally

Digest = bytes

# The two quantities whose order statistics are wanted.
MAGNITUDE, BETA = "|tau|", "beta"

# Keys are integers that sort like float32 (32 bits) or float64 (64 bits) values. Infinity has the largest:
LARGEST_KEY = {32: 0x7F800000, 64: 0x7FF0000000000000}
# A sample forgets this many low bits of a key, and still tells values apart to 1 part in 256.
SAMPLE_SHIFT = {32: 15, 64: 44}


def value_of_key(key: int, bits: int) -> float:
    """The value whose key this is."""
    size = np.array([abs(key)], dtype=np.uint32 if bits == 32 else np.uint64)
    value = float(size.view(np.float32 if bits == 32 else np.float64)[0])
    return -value if key < 0 else value


@dataclasses.dataclass(frozen=True)
class Thresholds:
    """What the whole model knows about each task; one entry per task (per pair i <= j, row by row, in `pair_*`).

    released, pairwise: `low` and `high` clip |tau|; `t` is the drop threshold on beta, `beta_max` its largest value.
    ties: `low` is the smallest |tau| that is kept. paper: `pair_min` and `pair_max` of tau_i tau_j, `intra_sum` and
    `pair_sum` the softmax denominators, `t` the drop threshold on beta D^2. Fields that a method has no use for stay empty.
    """

    low: tuple[float, ...] = ()
    high: tuple[float, ...] = ()
    t: tuple[float, ...] = ()
    beta_max: tuple[float, ...] = ()
    pair_min: tuple[float, ...] = ()
    pair_max: tuple[float, ...] = ()
    intra_sum: tuple[float, ...] = ()
    pair_sum: tuple[float, ...] = ()

    def replace(self, **changes: Any) -> Thresholds:
        return dataclasses.replace(self, **changes)

    def to_json(self) -> dict[str, list[float]]:
        """The fields that are in use; Python writes and reads floats exactly."""
        return {name: list(values) for name, values in dataclasses.asdict(self).items() if values}

    @classmethod
    def from_json(cls, fields: dict[str, list[float]]) -> Thresholds:
        return cls(**{name: tuple(values) for name, values in fields.items()})


@dataclasses.dataclass
class Sampled:
    """For each task where the keys of the sample lie."""

    of_task: list[Sample]

    def merge(self, other: Sampled) -> None:
        for mine, theirs in zip(self.of_task, other.of_task, strict=True):
            mine.merge(theirs)


@dataclasses.dataclass
class Counted:
    """For each task its tallies (one per bracket) and largest key; how many chunks were counted; for each of them the digests of its
    inputs, base first, if it was asked for them."""

    tallies: list[list[Tally]]
    largest: list[int]
    chunks: int
    digests: dict[int, tuple[Digest, ...]]

    def merge(self, other: Counted) -> None:
        for mine, theirs in zip(self.tallies, other.tallies, strict=True):
            for tally, part in zip(mine, theirs, strict=True):
                tally.merge(part)
        self.largest = [max(pair) for pair in zip(self.largest, other.largest, strict=True)]
        self.chunks += other.chunks
        self.digests.update(other.digests)


@dataclasses.dataclass
class Extrema:
    """The smallest and largest tau_i tau_j of each pair, and digests as in `Counted`."""

    low: list[float]
    high: list[float]
    digests: dict[int, tuple[Digest, ...]]

    def merge(self, other: Extrema) -> None:
        self.low = [min(pair) for pair in zip(self.low, other.low, strict=True)]
        self.high = [max(pair) for pair in zip(self.high, other.high, strict=True)]
        self.digests.update(other.digests)


@dataclasses.dataclass
class Sums:
    """For each chunk the sums of `paper`'s softmax numerators: the tasks' intra, then the pairs'."""

    of_chunk: dict[int, list[float]]

    def merge(self, other: Sums) -> None:
        self.of_chunk.update(other.of_chunk)
