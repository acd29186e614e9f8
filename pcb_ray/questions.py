"""What is asked of owners, and what they answer: typed, and in numbers alone, so that the driver of a merge needs no torch.

A *question* is a frozen dataclass that says what is wanted; `owners.ask(question, items)` puts it to whoever holds the items. Its
answer is a function of plan, question and items, so it does not matter who gives it. Answers that add up (`Total`) stay with the
owners until one is asked for the sum of all."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Protocol, Self, TypeVar

import numpy as np
from numpy.typing import NDArray

from pcb_ray.methods import Known
from pcb_ray.selection import Bracket, Sample, Tally

if TYPE_CHECKING:
    from pcb_ray.owner import Owner

Answer = TypeVar("Answer")
Answer_co = TypeVar("Answer_co", covariant=True)


class Question(Protocol[Answer_co]):
    """One question about items (chunks of the model, parts of the output, ...), given by their numbers."""

    def answer(self, owner: Owner, items: Sequence[int]) -> Answer_co:
        """What this owner answers about these items."""
        ...


ChunksOf = Callable[[int], Iterable[int]]
"""The chunks that an item is made from: who answers for it best is who had them before."""


class Total(Protocol):
    """An answer that adds up: the sum over all items is the same in any order and any grouping."""

    def merge(self, other: Self) -> None:
        """Add the answer about other items."""
        ...


TotalT = TypeVar("TotalT", bound=Total)


@dataclasses.dataclass(frozen=True)
class OwnerState:
    """What a receipt tells of an owner."""

    kernel: str
    device: str
    bytes_read: int
    peak_bytes: int
    pid: int
    node: str
    fetched: int = 0
    """Bytes that came over a network: of stores, not of file systems."""
    retries: int = 0
    """Requests to stores that were made again."""
    room: int = 0
    """What its node keeps at most of what was fetched."""


class Owners(Protocol):
    """Whoever answers questions about the items of one plan."""

    @property
    def states(self) -> Sequence[OwnerState]:
        """Of all owners there were of this plan, the dead included, as of their last answer."""
        ...

    @property
    def most(self) -> int:
        """How many owners there were at most at a time."""
        ...

    @property
    def deaths(self) -> int:
        """How many owners of this plan were lost and replaced."""
        ...

    def ask(
        self,
        question: Question[Answer],
        items: Sequence[int],
        chunks_of: ChunksOf | None = None,
        *,
        doubles: bool = True,
        expected_s: Callable[[int], float] | None = None,
    ) -> Iterator[tuple[Sequence[int], Answer]]:
        """(some items, the answer about them), as answers come, in no order; each item once.

        `doubles`: two may be at the same item at once, when one of them is slow. `expected_s`: how long an item may take,
        where they differ much."""
        ...

    def fold(self, question: Question[TotalT], chunks: Sequence[int], done: Callable[[Sequence[int]], None]) -> TotalT:
        """The sum of the answers about all these chunks. `done` is called with chunks as they are counted - again, if their owner
        was lost."""
        ...

    def store(
        self,
        question: Question[Answer],
        items: Sequence[int],
        chunks_of: ChunksOf | None = None,
        *,
        doubles: bool = True,
        expected_s: Callable[[int], float] | None = None,
    ) -> Iterator[tuple[Sequence[int], Answer]]:
        """As `ask`, for questions that write: when it ends, all of that is durable. What a lost owner wrote is written, and
        yielded, again. `doubles`: two may write the same at once, since they write the same bytes."""
        ...


# --- digests ----------------------------------------------------------------------------------------------------------------------

Digest = int
"""128 bits. Digests of disjoint pieces, each seeded by its place, add up modulo 2^128: like a count, the sum does not depend on
their order."""


def sum_of(digests: Iterable[Digest]) -> Digest:
    """The digest of all together, in whatever order they come."""
    return sum(digests) % (1 << 128)


def add_digests(one: Sequence[Digest], other: Sequence[Digest]) -> tuple[Digest, ...]:
    return tuple(map(sum_of, zip(one, other, strict=True)))


def shown_digest(digest: Digest) -> str:
    return f"{digest:032x}"


# --- what sweeps over the chunks find ---------------------------------------------------------------------------------------------

# Keys are integers that sort like float32 (32 bits) or float64 (64 bits) values. Infinity has the largest:
LARGEST_KEY = {32: 0x7F800000, 64: 0x7FF0000000000000}
# A sample forgets this many low bits of a key, and still tells values apart to 1 part in 256.
SAMPLE_SHIFT = {32: 15, 64: 44}


def value_of_key(key: int, bits: int) -> float:
    """The value whose key this is."""
    size = np.array([abs(key)], dtype=np.uint32 if bits == 32 else np.uint64)
    value = float(size.view(np.float32 if bits == 32 else np.float64)[0])
    return -value if key < 0 else value


@dataclasses.dataclass
class Sampled:
    """For each model where the keys of the sample lie."""

    of_model: list[Sample]

    def merge(self, other: Sampled) -> None:
        for mine, theirs in zip(self.of_model, other.of_model, strict=True):
            mine.merge(theirs)


@dataclasses.dataclass(frozen=True)
class SampleKeys:
    """Where the keys of the quantity of pass `step` lie, in the sample runs that begin in these chunks."""

    step: int
    known: Known

    def answer(self, owner: Owner, items: Sequence[int]) -> Sampled:
        return owner.sample(items, self)


@dataclasses.dataclass
class Gram:
    """The products of theta and the tau_i with each other, summed over some elements: each with itself and those after it, row by
    row; and how many elements of each tau_i are 0."""

    products: NDArray[np.float64]
    zeros: list[int]

    def merge(self, other: Gram) -> None:
        self.products = self.products + other.products
        self.zeros = [sum(pair) for pair in zip(self.zeros, other.zeros, strict=True)]


def merged_gram(one: Gram | None, other: Gram | None) -> Gram | None:
    """Both together; None if it was not asked for."""
    if one is not None and other is not None:
        one.merge(other)
    return one


@dataclasses.dataclass
class Counted:
    """For each model its tallies (one per bracket) and largest key; of each input (base first) the sum of its cells' digests."""

    tallies: list[list[Tally]]
    largest: list[int]
    digests: tuple[Digest, ...]
    gram: Gram | None

    def merge(self, other: Counted) -> None:
        for mine, theirs in zip(self.tallies, other.tallies, strict=True):
            for tally, part in zip(mine, theirs, strict=True):
                tally.merge(part)
        self.largest = [max(pair) for pair in zip(self.largest, other.largest, strict=True)]
        self.digests = add_digests(self.digests, other.digests)
        self.gram = merged_gram(self.gram, other.gram)


@dataclasses.dataclass(frozen=True)
class CountKeys:
    """Counts of the keys of the quantity of pass `step` against each model's brackets; with `relate` also how the models stand to
    the base."""

    step: int
    known: Known
    brackets: tuple[tuple[Bracket, ...], ...]
    relate: bool = False

    def answer(self, owner: Owner, items: Sequence[int]) -> Counted:
        return owner.count(items, self)


@dataclasses.dataclass
class Extremes:
    """The smallest and largest value of each row; digests as in `Counted`."""

    smallest: list[float]
    largest: list[float]
    digests: tuple[Digest, ...]
    gram: Gram | None

    def merge(self, other: Extremes) -> None:
        self.smallest = [min(pair) for pair in zip(self.smallest, other.smallest, strict=True)]
        self.largest = [max(pair) for pair in zip(self.largest, other.largest, strict=True)]
        self.digests = add_digests(self.digests, other.digests)
        self.gram = merged_gram(self.gram, other.gram)


@dataclasses.dataclass(frozen=True)
class FindExtremes:
    """The extremes of the rows of pass `step`."""

    step: int
    known: Known
    relate: bool = False

    def answer(self, owner: Owner, items: Sequence[int]) -> Extremes:
        return owner.extremes(items, self)


@dataclasses.dataclass
class Summed:
    """The sums of each row, by the chunk or, for sums per tensor, by the cell that they were taken over: exact sums of these come
    last, so that no order of additions shows. Digests as in `Counted`."""

    of_piece: dict[int, tuple[float, ...]]
    digests: tuple[Digest, ...]
    gram: Gram | None

    def merge(self, other: Summed) -> None:
        self.of_piece.update(other.of_piece)
        self.digests = add_digests(self.digests, other.digests)
        self.gram = merged_gram(self.gram, other.gram)


@dataclasses.dataclass(frozen=True)
class AddUp:
    """The sums of the rows of pass `step`."""

    step: int
    known: Known
    relate: bool = False

    def answer(self, owner: Owner, items: Sequence[int]) -> Summed:
        return owner.sums(items, self)


# --- the output, part by part -----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Written:
    """A part of the output, or a volume of a basis: the digest of its bytes, and of each input the sum of the digests of the cells
    that it was made from."""

    digest: Digest
    inputs: tuple[Digest, ...]
    gram: Gram | None = dataclasses.field(default=None, compare=False)
    """Of a part, if it was asked for; the journal does not keep it."""
    tag: str = ""
    """What the store calls the object that was written."""

    def to_text(self) -> str:
        digests = " ".join(shown_digest(d) for d in (self.digest, *self.inputs))
        return f"{digests} ={self.tag}" if self.tag else digests

    @classmethod
    def from_text(cls, text: str) -> Written:
        """Raises ValueError for what `to_text` has not written."""
        digests, _, tag = text.partition(" =")
        digest, *inputs = (int(part, 16) for part in digests.split())
        return cls(digest, tuple(inputs), tag=tag)

    @classmethod
    def together(cls, written: Iterable[Written], tag: str) -> Written:
        """Several parts as one."""
        parts = list(written)
        return cls(sum_of(one.digest for one in parts), inputs_of(parts), gram_of(parts), tag)


def gram_of(written: Sequence[Written]) -> Gram | None:
    """Of all that was written, if it was asked for: added in their order, which shows in the last bits."""
    grams = [one.gram for one in written if one.gram is not None]
    if not grams:
        return None
    total = dataclasses.replace(grams[0])
    for one in grams[1:]:
        total.merge(one)
    return total


def inputs_of(written: Iterable[Written]) -> tuple[Digest, ...]:
    """The digest of each input, from all that was written."""
    return tuple(map(sum_of, zip(*(one.inputs for one in written), strict=True)))


@dataclasses.dataclass(frozen=True)
class WriteParts:
    """Merge these parts into the files of `folder`."""

    known: Known
    folder: str
    relate: bool = False

    def answer(self, owner: Owner, items: Sequence[int]) -> dict[int, Written]:
        return owner.write(items, self)


@dataclasses.dataclass(frozen=True)
class WriteFiles:
    """Merge these files of the output into the folder of a store, each whole: there a file has one writer."""

    known: Known
    folder: str
    relate: bool = False

    def answer(self, owner: Owner, items: Sequence[int]) -> dict[int, Written]:
        return owner.write_files(items, self)


@dataclasses.dataclass(frozen=True)
class DigestParts:
    """The digests of what the files of `folder` hold for these parts."""

    folder: str

    def answer(self, owner: Owner, items: Sequence[int]) -> dict[int, Digest]:
        return owner.digest_parts(items, self.folder)


@dataclasses.dataclass(frozen=True)
class CompareParts:
    """Where what the files of `folder` hold for these parts differs from what the inputs give: nothing for a part that is right."""

    known: Known
    folder: str

    def answer(self, owner: Owner, items: Sequence[int]) -> dict[int, str]:
        return owner.compare_parts(items, self)


@dataclasses.dataclass(frozen=True)
class DifferingTwins:
    """Which of these stored copies of tied tensors (their numbers in `plan.twins`) differ from their originals."""

    def answer(self, owner: Owner, items: Sequence[int]) -> list[int]:
        return owner.differing_twins(items)
