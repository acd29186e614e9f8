"""Owners at work: one question after another about one plan after another, with progress, and what of it is worth a receipt."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence

from pcb_ray.errors import InputError
from pcb_ray.methods import Known
from pcb_ray.planning import Copied, Plan
from pcb_ray.progress import ByteBar
from pcb_ray.questions import Answer, ChunksOf, Digest, Gram, Owners, Question, TotalT
from pcb_ray.receipt import Sweep
from pcb_ray.relation import Relation, relation_from

UNKNOWN_RATE = 50e6
"""Bytes that a worker surely reads in a second, where no sweep has told."""


class Session:
    """What several steps, and several merges of the same models, share.

    `owners_for` gives the owners that answer questions about a plan. What was found out about the models holds for all plans that
    read the same tensors of them, so several recipes over one session are a loop over `begin` and the steps."""

    def __init__(
        self,
        plan: Plan,
        owners_for: Callable[[Plan], Owners],
        *,
        worker_bytes: int = 0,
        quiet: bool = True,
        relate: bool = False,
    ) -> None:
        """`relate`: the first sweep also finds how the models stand to the base, for a receipt."""
        self._owners_for, self.quiet, self._relate = owners_for, quiet, relate
        self.worker_bytes = worker_bytes
        """The memory that each worker was announced to take."""
        self.plan, self.owners = plan, owners_for(plan)
        self.sweeps: list[Sweep] = []
        """Of the plan that was begun last."""
        self.inputs: tuple[Digest, ...] = ()
        """A digest of each input, once a sweep has seen them whole."""
        self.relation: Relation | None = None
        """How the models stand to the base, likewise."""
        self.found: dict[object, Known] = {}
        """What passes have found, by all that decides it: see `analysis`."""

    def begin(self, plan: Plan) -> None:
        """Go on with another plan."""
        if plan is self.plan:
            return
        if plan.reads != self.plan.reads:
            self.inputs, self.relation, self.found = (), None, {}
        self.plan, self.owners, self.sweeps = plan, self._owners_for(plan), []

    def take_over(self, earlier: Session) -> None:
        """Know what an earlier session has found out, if its plan was about the same models."""
        if earlier.plan.reads == self.plan.reads:
            self.inputs, self.relation, self.found = earlier.inputs, earlier.relation, earlier.found

    # --- sweeps -------------------------------------------------------------------------------------------------------------------

    def total(self, name: str, question: Question[TotalT], share: float = 1.0) -> TotalT:
        """The answers about all chunks, added up; `share` of each chunk's bytes is read."""
        chunks = range(self.plan.chunks)
        with _Sweep(self, name, chunks, self._bytes_of_chunk(share)) as sweep:
            return self.owners.fold(question, chunks, sweep.advance)

    def ask_parts(
        self, name: str, question: Question[Answer], parts: Sequence[int], bytes_of: Callable[[int], int] | None = None
    ) -> Iterator[tuple[Sequence[int], Answer]]:
        """The answers about these parts of the output, as they come. What is read for a part are its inputs, unless it is told how
        many bytes that are."""
        with _Sweep(self, name, parts, bytes_of or self._bytes_of_part) as sweep:
            for batch, answer in self.owners.ask(question, parts, self.plan.chunks_of_part):
                sweep.advance(batch)
                yield batch, answer

    def store(
        self,
        name: str,
        question: Question[Answer],
        items: Sequence[int],
        bytes_of: Callable[[int], int] | None = None,
        chunks_of: ChunksOf | None = None,
    ) -> Iterator[tuple[Sequence[int], Answer]]:
        """The same for questions that write: about parts, unless it is told how many bytes, and which chunks, are read for an
        item."""
        doubles = self.plan.method.tolerance == 0  # else it may write other bits over those whose digest counts
        with _Sweep(self, name, items, bytes_of or self._bytes_of_part) as sweep:
            expected_s = self.plan.expected_s if bytes_of is None and self.plan.views else None
            chunks_of = chunks_of or self.plan.chunks_of_part
            for batch, answer in self.owners.store(question, items, chunks_of, doubles=doubles, expected_s=expected_s):
                sweep.advance(batch)
                yield batch, answer

    def store_files(
        self,
        name: str,
        question: Question[Answer],
        files: Sequence[int],
        bytes_of: Callable[[int], int] | None = None,
        chunks_of: ChunksOf | None = None,
    ) -> Iterator[tuple[Sequence[int], Answer]]:
        """The same for whole files, each of which has one writer at a time: those of the output, unless it is told."""
        bytes_of, chunks_of = bytes_of or self._bytes_of_file, chunks_of or self.plan.chunks_of_file
        with _Sweep(self, name, files, bytes_of) as sweep:
            expected = {file: self._expected_s(file, bytes_of(file)) for file in files}
            for batch, answer in self.owners.ask(question, files, chunks_of, doubles=False, expected_s=expected.__getitem__):
                sweep.advance(batch)
                yield batch, answer

    def _expected_s(self, file: int, read: int) -> float:
        """How long one worker takes for a file for which so many bytes are read: by the last sweep, and by what matrices cost."""
        return self._usual_s(read) + (sum(map(self.plan.expected_s, self.plan.parts_of(file))) if self.plan.views else 0.0)

    def _usual_s(self, read: int) -> float:
        """How long one worker takes for what reads so many bytes, by the last sweep."""
        last = next((one for one in reversed(self.sweeps) if one.bytes and one.elapsed_s), None)
        return 2 * (read / UNKNOWN_RATE if last is None else read * last.elapsed_s * max(1, self.owners.most) / last.bytes)

    def _bytes_of_file(self, number: int) -> int:
        return sum(map(self._bytes_of_part, self.plan.parts_of(number)))

    def _bytes_of_chunk(self, share: float) -> Callable[[int], int]:
        plan = self.plan
        per_element = share * plan.sweep_bytes / plan.D
        # Rounded up to each bound and not chunk by chunk, so that they add up to the whole.
        return lambda chunk: round(per_element * plan.bounds[chunk + 1]) - round(per_element * plan.bounds[chunk])

    def _bytes_of_part(self, number: int) -> int:
        """What is read of the inputs for a part of the output."""
        size = 0
        for segment in self.plan.parts[number].segments:
            if isinstance(segment, Copied):
                copy = self.plan.copies[segment.copy]
                size += copy.read_bytes * (segment.stop - segment.start) // copy.written_bytes
            else:
                sources = self.plan.tensors[segment.tensor].sources
                size += sum(t.nbytes * (segment.stop - segment.start) // t.numel for t in sources if t is not None)
        return size

    # --- the inputs stay what they are --------------------------------------------------------------------------------------------

    @property
    def relates(self) -> bool:
        """Whether a sweep is yet to find how the models stand to the base."""
        return self._relate and self.relation is None and self.plan.method.has_base

    def saw_inputs(self, digests: Sequence[Digest], sweep: str, gram: Gram | None = None) -> None:
        """A sweep has read all inputs. Raises InputError if they are no longer what an earlier one has read."""
        if gram is not None:
            self.relation = relation_from(self.plan.D, gram)
        if not self.inputs:
            self.inputs = tuple(digests)
            return
        problems = [
            f"{one.source}: wanted the bytes that the first sweep read, found others in the sweep `{sweep}`: it was changed "
            "during the run. Fix: let nothing write to the models while they are merged, and start afresh."
            for one, before, now in zip(self.plan.inputs, self.inputs, digests, strict=True)
            if before != now
        ]
        if problems:
            raise InputError(problems)


class _Sweep:
    """The progress of one pass; a record of it when it ends well."""

    def __init__(self, session: Session, name: str, items: Sequence[int], bytes_of: Callable[[int], int]) -> None:
        self._session, self._name, self._bytes_of = session, name, bytes_of
        self._start = time.monotonic()
        self._last = self._start
        self._done: set[int] = set()
        self._bar = ByteBar(name, sum(map(bytes_of, items)), quiet=session.quiet)

    def advance(self, items: Sequence[int]) -> None:
        """These are done; some may be done again, since their owner was lost."""
        new = set(items) - self._done
        self._done |= new
        self._bar.advance(sum(map(self._bytes_of, new)))
        self._last = time.monotonic()  # the wait for the disk that may follow is no part of the sweep

    def __enter__(self) -> _Sweep:
        self._bar.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.__exit__(*error)  # type: ignore[arg-type]
        if error[0] is None:
            self._session.sweeps.append(Sweep(self._name, self._last - self._start, self._bar.done))
