"""What is asked of owners, and what they answer: typed, and in numbers alone, so that the driver of a merge needs no torch.

A *question* is a frozen dataclass that says what is wanted; `owners.ask(question, items)` puts it to whoever holds the items. Its answer is a
function of plan, question and items, so it does not matter who gives it. Answers that add up (`Total`) stay with the owners until one is asked for
the sum of all.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Protocol, Self, TypeVar

if TYPE_CHECKING:
    from pcb_ray.owner import Owner

Answer = TypeVar("Answer")
Answer_co = TypeVar("Answer_co", covariant=True)


class Question(Protocol[Answer_co]):
    """One question about items (chunks of the model, parts of the output, ...), given by their numbers."""

    def answer(self, owner: Owner, items: Sequence[int]) -> Answer_co:
        """What this owner answers about these items."""
        ...


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


class Owners(Protocol):
    """Whoever answers questions about the items of one plan."""

    @property
    def states(self) -> Sequence[OwnerState]:
        """Of all owners there were, the dead included, as of their last answer."""
        ...

    @property
    def deaths(self) -> int:
        """How many owners were lost and replaced."""
        ...

    def ask(self, question: Question[Answer], items: Sequence[int]) -> Iterator[tuple[Sequence[int], Answer]]:
        """(some items, the answer about them), as answers come, in no order; each item once."""
        ...

    def fold(self, question: Question[TotalT], items: Sequence[int], done: Callable[[Sequence[int]], None]) -> TotalT:
        """The sum of the answers about all items. `done` is called with items as they are counted - again, if their owner was lost."""
        ...

    def store(self, question: Question[Answer], items: Sequence[int]) -> Iterator[tuple[Sequence[int], Answer]]:
        """As `ask`, for questions that write: when it ends, all of that is durable. What a lost owner wrote is written, and yielded, again."""
        ...
