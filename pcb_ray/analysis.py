"""The sweeps in order: from owners that answer questions to the thresholds of the whole model."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import xxhash

from pcb_ray.answers import BETA, LARGEST_KEY, MAGNITUDE, Thresholds, value_of_key
from pcb_ray.errors import InputError
from pcb_ray.planning import CLIP, SAMPLE_RUN, Plan
from pcb_ray.progress import Progress
from pcb_ray.questions import Owners
from pcb_ray.selection import TALLY_ENTRIES, Bracket

log = logging.getLogger("pcb_ray")

FLOAT32_MAX = 3.4028234663852886e38


@dataclass
class Sweep:
    """One pass over the inputs, as the receipt tells of it."""

    name: str
    elapsed_s: float
    bytes: int


class Run:
    """One merge under way: asks the owners sweep by sweep, and remembers what is worth a receipt."""

    def __init__(self, plan: Plan, owners: Owners, *, quiet: bool) -> None:
        self.plan, self.owners, self.quiet = plan, owners, quiet
        self.sweeps: list[Sweep] = []
        self.inputs: list[str] = []  # a digest of each input, once a sweep has seen them whole

    def sweep(
        self, name: str, question: str, *args: Any, chunks: Sequence[int] | None = None, share: float = 1.0, how: str = "ask"
    ) -> Iterator[tuple[Sequence[int], Any]]:
        """Ask about all chunks with a progress bar; `how` is `Owners`' way (ask, fold, store), `share` of each chunk's bytes is read."""
        plan = self.plan
        todo = list(range(plan.chunks)) if chunks is None else list(chunks)
        per_element = plan.sweep_bytes / plan.D
        start, done, elements, elapsed_s = time.monotonic(), set[int](), 0, 0.0
        with Progress(name, round(share * per_element * self._elements(todo)), quiet=self.quiet) as progress:
            for batch, answer in getattr(self.owners, how)(question, todo, *args):
                elements += self._elements(set(batch) - done)
                done.update(batch)
                progress.advance(round(share * per_element * elements) - progress.done)
                elapsed_s = time.monotonic() - start  # the wait for the disk that may follow is no part of the sweep
                yield batch, answer
        self.sweeps.append(Sweep(name, elapsed_s, progress.done))

    def total(self, name: str, question: str, *args: Any, share: float = 1.0) -> Any:
        """The answers about all chunks, added up."""
        *_, (_, total) = self.sweep(name, question, *args, share=share, how="fold")
        return total

    def _elements(self, chunks: Collection[int]) -> int:
        size, last = self.plan.chunk_elements, self.plan.chunks - 1
        return sum(size if chunk < last else self.plan.D - last * size for chunk in chunks)


def check_twins(run: Run) -> None:
    """Stored copies of tied tensors must equal their originals. Raises InputError that names all that do not."""
    problems = [p for _, answer in run.owners.ask("differing_twins", range(len(run.plan.twins))) for p in answer]
    if problems:
        raise InputError(problems)


def thresholds_of(run: Run, known: Thresholds | None = None, keep: Callable[[Thresholds], None] = lambda _: None) -> Thresholds:
    """The analysis: everything that the method must know of the whole model before a block can be merged.

    What is `known` already is not found again; `keep` is called after each sweep that found something.
    """
    plan, D = run.plan, run.plan.D
    result = known or Thresholds()
    if plan.method in CLIP and not result.low:
        c = CLIP[plan.method]
        values, largest = order_statistics(run, MAGNITUDE, result, [[int(D * c), int(D * (1 - c) - 1)]] * plan.N)
        if plan.method == "pcb-released" and sum(largest) > FLOAT32_MAX:
            # It multiplies by the sum of all tau; an infinite one times 0 is no number, and has no rank.
            raise InputError(
                f"{plan.recipe.models[i].source}: differs from the base by up to {x:g}; the sum over all models may overflow float32: "
                "exclude the tensor that holds such values, or use `variant: pairwise`"
                for i, x in enumerate(largest)
                if x > FLOAT32_MAX / (2 * plan.N)
            )
        result = result.replace(low=tuple(v[0] for v in values), high=tuple(v[1] for v in values))
        keep(result)
    if plan.method == "ties" and not result.low:
        values, _ = order_statistics(run, MAGNITUDE, result, [[max(D - int(D * r) - 1, 0)] for r in plan.densities])
        result = result.replace(low=tuple(v[0] for v in values))
        keep(result)
    if plan.method == "pcb-paper" and not result.pair_max:
        extrema = run.total("pair products", "extrema")
        run.inputs = digests_of_inputs(plan, extrema.digests)
        result = result.replace(pair_min=tuple(extrema.low), pair_max=tuple(extrema.high))
        keep(result)
    if plan.method == "pcb-paper" and not result.pair_sum:
        of_chunk = run.total("softmax sums", "sums", result).of_chunk
        sums = [math.fsum(values) for values in zip(*of_chunk.values(), strict=True)]  # fsum is exact: no order shows
        result = result.replace(intra_sum=tuple(sums[: plan.N]), pair_sum=tuple(sums[plan.N :]))
        keep(result)
    if plan.method.startswith("pcb") and not result.t:
        values, largest = order_statistics(run, BETA, result, [[min(int(D * (1 - r)), D - 1)] for r in plan.densities])
        result = result.replace(t=tuple(v[0] for v in values), beta_max=tuple(largest))
        keep(result)
    return result


def order_statistics(
    run: Run, quantity: str, thresholds: Thresholds, ranks: Sequence[Sequence[int]]
) -> tuple[list[list[float]], list[float]]:
    """For each task the values of these ranks of |tau| or beta over the whole model, exactly, and the largest value."""
    plan, magnitude = run.plan, quantity == MAGNITUDE
    bits = 64 if plan.method == "pcb-paper" and not magnitude else 32
    largest_key = LARGEST_KEY[bits]
    smallest_key = 0 if magnitude else -largest_key
    open_ranks = {(i, rank): Bracket(smallest_key, largest_key) for i, of_task in enumerate(ranks) for rank in of_task}
    if plan.D > TALLY_ENTRIES:
        sampled = run.total(f"sample of {quantity}", "sample", quantity, thresholds, share=SAMPLE_RUN / plan.sample_stride)
        open_ranks = {(i, rank): sampled.of_task[i].bracket(rank, plan.D, smallest_key, largest_key) for i, rank in open_ranks}
    found: dict[tuple[int, int], int] = {}
    largest: list[float] = []
    while open_ranks:
        asked = [sorted({b for (i, _), b in open_ranks.items() if i == task}, key=lambda b: (b.lo, b.hi)) for task in range(plan.N)]
        first_sweep = not run.inputs
        counted = run.total(f"ranks of {quantity}", "count", quantity, thresholds, asked, first_sweep)
        assert counted.chunks == plan.chunks, f"{counted.chunks} chunks were counted, the model has {plan.chunks}"
        if first_sweep:
            run.inputs = digests_of_inputs(plan, counted.digests)
        if not largest:
            largest = [value_of_key(key, bits) for key in counted.largest]
        for (i, rank), bracket in list(open_ranks.items()):
            answer = counted.tallies[i][asked[i].index(bracket)].select(rank, smallest_key, largest_key)
            if isinstance(answer, Bracket):
                log.info("the sample misjudged rank %d of %s of model %d; one more sweep finds it", rank, quantity, i)
                open_ranks[i, rank] = answer
            else:
                found[i, rank] = answer
                del open_ranks[i, rank]
    return [[value_of_key(found[i, rank], bits) for rank in of_task] for i, of_task in enumerate(ranks)], largest


def warnings_of(plan: Plan, thresholds: Thresholds) -> list[str]:
    """What the thresholds say about inputs that were hardly meant."""
    result = []
    for i in range(len(thresholds.t)):
        name, t = plan.recipe.models[i].source, thresholds.t[i]
        if plan.method in CLIP and thresholds.high[i] == 0.0:
            result.append(
                f"{name}: equals the base but for at most {CLIP[plan.method]:g} of all parameters, "
                "which clipping levels; it counts as a task and contributes nothing"
            )
        elif plan.method in CLIP and thresholds.low[i] == thresholds.high[i]:
            result.append(
                f"{name}: all its clipped differences to the base have one size, {thresholds.low[i]}; it contributes nothing"
            )
        elif plan.method in CLIP and thresholds.beta_max[i] == t:
            result.append(f"{name}: its drop threshold is its largest score, {t}; it contributes nothing: raise its density")
        elif plan.method == "pcb-paper" and thresholds.pair_max[_diagonal(i, plan.N)] == 0.0:
            result.append(f"{name}: equals the base; it counts as a task and contributes nothing")
        elif t <= 0.0:
            result.append(
                f"{name}: its drop threshold is {t}: density {plan.densities[i]} also keeps parameters that conflict or were not touched; lower it"
            )
    return result


def _diagonal(i: int, n: int) -> int:
    """Where pair (i, i) lies among the pairs i <= j of n tasks."""
    return i * n - i * (i - 1) // 2


def digest_of(digests: Sequence[str]) -> str:
    """One digest of many, in the order of the plan."""
    return str(xxhash.xxh3_128(b"".join(bytes.fromhex(d) for d in digests)).hexdigest())


def digests_of_inputs(plan: Plan, of_chunk: Mapping[int, Sequence[bytes]]) -> list[str]:
    return [digest_of([of_chunk[chunk][source].hex() for chunk in range(plan.chunks)]) for source in range(plan.N + 1)]
