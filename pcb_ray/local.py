"""Owners in this process, a thread each: for models in memory and for `verify`. The kernels leave the interpreter lock free."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from typing import TYPE_CHECKING

from pcb_ray.planning import Plan
from pcb_ray.questions import Answer, ChunksOf, OwnerState, Question, TotalT
from pcb_ray.schedule import MAX_BATCH, ExpectedS, PartialTotal, batches_of, proved

if TYPE_CHECKING:
    from pcb_ray.files.store import Store

BATCHES_PER_THREAD = 8


class LocalOwners:
    """Owners of one plan that share one store, with one thread for each of them."""

    deaths = 0

    def __init__(self, plan: Plan, store: Store, *, threads: int | None = None, block_elements: int | None = None) -> None:
        from pcb_ray.owner import Owner  # with torch, which takes seconds

        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        self._owners = [Owner(plan, store, block_elements=block_elements) for _ in range(min(threads or cores, plan.chunks))]

    @property
    def states(self) -> Sequence[OwnerState]:
        """Of all owners."""
        return [owner.state() for owner in self._owners]

    @property
    def most(self) -> int:
        """How many there are."""
        return len(self._owners)

    def ask(
        self,
        question: Question[Answer],
        items: Sequence[int],
        chunks_of: ChunksOf | None = None,  # noqa: ARG002 - all is in one place
        *,
        doubles: bool = True,  # noqa: ARG002 - it does everything once
        expected_s: ExpectedS | None = None,  # noqa: ARG002 - and waits for ever
    ) -> Iterator[tuple[Sequence[int], Answer]]:
        """(some items, the answer about them), as answers come, in no order; each item once. Raises what an owner raises."""
        import torch

        def answer(owner: int, batch: Sequence[int]) -> tuple[int, Sequence[int], Answer]:
            return owner, batch, question.answer(self._owners[owner], batch)

        size = max(1, min(MAX_BATCH, len(items) // (BATCHES_PER_THREAD * len(self._owners))))
        batches = iter(batches_of(items, size))
        before = torch.get_num_threads()
        try:
            # One torch thread each: a block is too small to be shared.
            with ThreadPoolExecutor(len(self._owners), initializer=torch.set_num_threads, initargs=(1,)) as pool:
                running = {pool.submit(answer, n, batch) for n, batch in zip(range(len(self._owners)), batches, strict=False)}
                while running:
                    done, running = wait(running, return_when=FIRST_COMPLETED)
                    for owner, batch, result in (future.result() for future in done):
                        if (following := next(batches, None)) is not None:
                            running.add(pool.submit(answer, owner, following))
                        yield batch, result
        finally:
            torch.set_num_threads(before)

    def fold(self, question: Question[TotalT], chunks: Sequence[int], done: Callable[[Sequence[int]], None]) -> TotalT:
        """The sum of the answers about all these chunks; `done` is called with chunks as they are counted."""
        total: PartialTotal[TotalT] | None = None
        for batch, answer in self.ask(question, chunks):
            if total is None:
                total = PartialTotal.of(batch, answer)
            else:
                total.merge(PartialTotal.of(batch, answer))
            done(batch)
        return proved(total, chunks)

    def store(
        self,
        question: Question[Answer],
        items: Sequence[int],
        chunks_of: ChunksOf | None = None,  # noqa: ARG002
        *,
        doubles: bool = True,  # noqa: ARG002 - it does everything once
        expected_s: ExpectedS | None = None,  # noqa: ARG002
    ) -> Iterator[tuple[Sequence[int], Answer]]:
        """As `ask`, for questions that write: when it ends, all of that is durable."""
        yield from self.ask(question, items)
        for owner in self._owners:
            owner.sync()
