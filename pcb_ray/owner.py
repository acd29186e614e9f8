"""Owner: answers questions about chunks of the model and parts of the output. A plain class; `runtime` makes it a Ray actor.

An answer is a function of the plan, the question and the items alone, so a lost owner can be replaced and asked again, and it does
not matter who answers. Memory is bounded by the block: an owner reads one block of the base and of every model, works on it, and
forgets it."""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
import re
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray
from torch import Tensor

from pcb_ray import by_matrix
from pcb_ray.budget import MIN_BLOCK, choose_block
from pcb_ray.errors import InputError, RequestError, RunError
from pcb_ray.files.hub import hub_id
from pcb_ray.files.hub_commit import Branch
from pcb_ray.files.objects import HUB_SCHEME, UPLOAD_TRIES, CutOff, container_of, object_problem
from pcb_ray.files.store import PartWriter, Range, Store, is_remote
from pcb_ray.kernels import choose_kernel
from pcb_ray.kernels.reference import Loaded, keys
from pcb_ray.methods import Extrema, Known, Ranks, Sums
from pcb_ray.methods.method import TensorPlace
from pcb_ray.planning import Copied, CopiedTensor, Part, Plan, Segment
from pcb_ray.questions import (
    LARGEST_KEY,
    SAMPLE_SHIFT,
    AddUp,
    CompareParts,
    Counted,
    CountKeys,
    Digest,
    Extremes,
    FindExtremes,
    Gram,
    OwnerState,
    Sampled,
    SampleKeys,
    Summed,
    WriteFiles,
    WriteParts,
    Written,
)
from pcb_ray.selection import Sample, Tally
from pcb_ray.sources import DTYPES, CellDigests, Reader, Wanted
from pcb_ray.tied import Twin

PassT = TypeVar("PassT", Ranks, Extrema, Sums)

# Float sums are taken over fixed runs of this many elements and then exactly over the runs, so that no block size can show in them.
SUM_RUN = 1 << 12
COPIED_AT_ONCE = 1 << 20
FILE_TRIES = UPLOAD_TRIES
TRIED = b"written to see whether this machine may write here\n"
NOTE_MEMORY_S = 0.02  # to ask the system takes up to a millisecond


class _Output(NamedTuple):
    """Bytes of a part, one after another. They are valid until the next ones are asked for."""

    data: memoryview
    segments: Sequence[Segment]
    """What they were merged from; nothing for a header and for what is copied."""


class Owner:
    def __init__(
        self, plan: Plan, store: Store, *, device: str = "cpu", block_elements: int | None = None, writes_to: str = ""
    ) -> None:
        """`writes_to` is a folder that this machine must see, or a prefix where it must be able to write. Raises RequestError if it
        is not so, or if an input is not there or not the same."""
        self.plan, self.store = plan, store
        self.device = torch.device(device)
        self.kernel = choose_kernel(plan.method, plan.settings, self.device)
        self.block_elements = block_elements or choose_block(plan, self.device.type, None)
        if self.block_elements % MIN_BLOCK:
            raise ValueError(f"blocks of {self.block_elements} elements: a multiple of {MIN_BLOCK} is needed")
        largest = max(tensor.numel for tensor in plan.tensors)
        if plan.method.unit == "tensor" and self.block_elements < largest:
            raise ValueError(f"blocks of {self.block_elements} elements: {largest} are needed, so that no tensor is cut")
        self._check_files(writes_to)
        dtypes = [plan.dtypes_of(source) for source in range(plan.N + 1)]
        self._readers = [Reader(store, self.block_elements, of_source, self.device) if of_source else None for of_source in dtypes]
        self.then: Sequence[int] | None = None
        """What is asked for next; None: probably the items that follow."""
        self._read_apart = 0  # bytes that no reader has read: what is copied or only digested
        self.peak_bytes, self._noted = 0, -math.inf

    def state(self) -> OwnerState:
        self.note_memory()
        traffic = self.store.traffic
        read = self._read_apart + sum(reader.bytes_read for reader in self._readers if reader is not None)
        return OwnerState(
            kernel=self.kernel.name,
            device=str(self.device),
            bytes_read=read,
            peak_bytes=self.peak_bytes,
            fetched=traffic.fetched,
            retries=traffic.retries,
            room=traffic.room,
            pid=os.getpid(),
            node=socket.gethostname(),
        )

    def sync(self) -> None:
        """Make durable what was written so far."""
        self.store.sync()

    def close(self) -> None:
        """Let go of all files, and of what this node keeps for the run."""
        self.store.close()

    # --- sweeps over the chunks ---------------------------------------------------------------------------------------------------

    def sample(self, chunks: Sequence[int], question: SampleKeys) -> Sampled:
        quantity = self._pass(question.step, Ranks).quantity
        samples = [Sample(SAMPLE_SHIFT[quantity.bits]) for _ in range(self.plan.N)]
        for segments, runs in self._sample_blocks(self.chunks_ahead(chunks)):
            values_NB = self.kernel.values(self.load(segments), quantity, question.known)
            for sample, x_B in zip(samples, values_NB, strict=True):
                sample.add(keys(x_B, quantity.magnitude).cpu().numpy(), runs)
        return Sampled(samples)

    def count(self, chunks: Sequence[int], question: CountKeys) -> Counted:
        quantity, entries = self._pass(question.step, Ranks).quantity, self.plan.sizes.tally_entries
        tallies = [[Tally(b, entries) for b in of_model] for of_model in question.brackets]
        largest, digests, gram = [-(1 << 63)] * self.plan.N, self._digests(), self._gram(question.relate)
        for segments in itertools.chain.from_iterable(map(self.blocks, self.chunks_ahead(chunks))):
            loaded = self.load(segments, digests)
            self.relate(loaded, gram)
            of_block, counted = self.kernel.count(loaded, quantity, question.known, question.brackets)
            for i in range(self.plan.N):
                largest[i] = max(largest[i], of_block[i])
                for tally, (counts, inside) in zip(tallies[i], counted[i], strict=True):
                    tally.add(*counts, inside)
            if max(of_block) >= LARGEST_KEY[quantity.bits]:  # an infinity or a NaN
                self.refuse_non_finite(segments, quantity.name)
        self.note_memory()
        return Counted(tallies, largest, _totals(digests), gram)

    def extremes(self, chunks: Sequence[int], question: FindExtremes) -> Extremes:
        wanted, digests, gram = self._pass(question.step, Extrema), self._digests(), self._gram(question.relate)
        smallest: list[float] = []
        largest: list[float] = []
        for segments in itertools.chain.from_iterable(map(self.blocks, self.chunks_ahead(chunks))):
            loaded = self.load(segments, digests)
            self.relate(loaded, gram)
            if not self.kernel.extremes(loaded, wanted, question.known, smallest, largest):
                self.refuse_non_finite(segments, wanted.title)
        self.note_memory()
        return Extremes(smallest, largest, _totals(digests), gram)

    def sums(self, chunks: Sequence[int], question: AddUp) -> Summed:
        wanted, digests, gram = self._pass(question.step, Sums), self._digests(), self._gram(question.relate)
        is_first = question.step == 0  # then nobody has looked at the inputs yet
        of_piece: dict[int, tuple[float, ...]] = {}
        for chunk in self.chunks_ahead(chunks):
            pieces = {chunk: self.blocks(chunk)}
            if wanted.per == "tensor":
                pieces = {self.plan.cell_of(cell): self.cut([cell]) for cell in self.plan.cells_of(chunk)}
            for piece, blocks in pieces.items():
                runs: list[list[float]] = []
                for segments in blocks:
                    loaded = self.load(segments, digests)
                    self.relate(loaded, gram)
                    if is_first and not self.kernel.are_finite(loaded):
                        self.refuse_non_finite(segments, wanted.title)
                    found = [_sums_of_runs(x_B) for x_B in self.kernel.rows(loaded, wanted, question.known)]
                    runs = [before + more for before, more in zip(runs, found, strict=True)] if runs else found
                of_piece[piece] = tuple(math.fsum(run) for run in runs)
        self.note_memory()
        return Summed(of_piece, _totals(digests), gram)

    # --- the output ---------------------------------------------------------------------------------------------------------------

    def write(self, parts: Sequence[int], question: WriteParts) -> dict[int, Written]:
        result = {}
        for number in self._parts_ahead(parts):
            part = self.plan.parts[number]
            with self.store.part(self._out_file(question.folder, part), part.start, part.stop) as out:
                result[number] = self._write_part(number, out, question)
        self.note_memory()
        return result

    def write_files(self, files: Sequence[int], question: WriteFiles) -> dict[int, Written]:
        return {number: self._write_file(number, question) for number in files}

    def _write_file(self, number: int, question: WriteFiles, tries: int = FILE_TRIES) -> Written:
        """One file of the output, by one upload; it is begun anew if it was lost on the way."""
        file = self.plan.files[number]
        path = os.path.join(question.folder, file.name)
        try:
            with self.store.part(path, 0, file.size) as out:
                parts = [self._write_part(part, out, question) for part in self._parts_ahead(self.plan.parts_of(number))]
        except CutOff:
            if tries == 1:
                raise
            return self._write_file(number, question, tries - 1)
        self.note_memory()
        stamp = self.store.stamp(path)
        if stamp.size != file.size:
            raise RunError(
                f"{path}: wanted {file.size} bytes, as they were sent, found {stamp.size}. Fix: let nothing else write there, and "
                "merge to another prefix."
            )
        return Written.together(parts, stamp.tag)

    def _write_part(self, number: int, out: PartWriter, question: WriteParts | WriteFiles) -> Written:
        part, digests, digest = self.plan.parts[number], self._digests(), xxhash.xxh3_128(seed=number)
        gram = self._gram(question.relate)
        for data, _ in self._outputs(part, question.known, digests, gram):
            out.write(data)
            digest.update(data)
        return Written(digest.intdigest(), _totals(digests), gram)

    def digest_parts(self, parts: Sequence[int], folder: str) -> dict[int, Digest]:
        result = {}
        for k, number in enumerate(parts):
            part, digest = self.plan.parts[number], xxhash.xxh3_128(seed=number)
            if is_remote(folder):
                near = (self.plan.parts[one] for one in parts[k : k + 2])
                self.store.expect(Range(self._out_file(folder, one), one.start, one.stop) for one in near)
            for data in self._bytes_of(self._out_file(folder, part), part.start, part.stop):
                digest.update(data)
            result[number] = digest.intdigest()
        return result

    def compare_parts(self, parts: Sequence[int], question: CompareParts) -> dict[int, str]:
        result = {}
        for number in self._parts_ahead(parts):
            part = self.plan.parts[number]
            file, at = self._out_file(question.folder, part), part.start
            for data, segments in self._outputs(part, question.known, None):
                held = memoryview(bytearray(len(data)))
                self.store.read(file, at, held)
                if held != data and (not segments or not self._are_close(data, held, segments, question.folder)):
                    byte = int(np.argmax(np.frombuffer(held, np.uint8) != np.frombuffer(data, np.uint8)))
                    what = self._tensor_at(segments, byte) if segments else "what is copied from the base"
                    result[number] = f"{self.plan.files[part.file].name}, byte {at + byte}: {what}"
                    break
                at += len(data)
        return result

    def differing_twins(self, numbers: Sequence[int]) -> list[int]:
        return [number for number in numbers if not self._are_equal(self.plan.twins[number])]

    def _are_equal(self, twin: Twin) -> bool:
        copy, original = twin.copy, twin.original
        if copy.dtype != original.dtype or copy.nbytes != original.nbytes:
            return False
        pairs = zip(
            self._bytes_of(copy.file, copy.start, copy.stop),
            self._bytes_of(original.file, original.start, original.stop),
            strict=True,
        )
        return all(one == other for one, other in pairs)

    def _outputs(
        self, part: Part, known: Known, digests: Sequence[CellDigests] | None, gram: Gram | None = None
    ) -> Iterator[_Output]:
        """The bytes of a part, made from the inputs."""
        if part.start == 0:
            yield _Output(memoryview(self.plan.files[part.file].header), ())
        for (_, lambda_, dtype, again), run in itertools.groupby(part.segments, self._alike):
            segments = list(run)
            for one in segments:
                if isinstance(one, Copied) and self.plan.copies[one.copy].models:
                    yield _Output(self._mean(self.plan.copies[one.copy], one), ())
                elif isinstance(one, Copied):
                    source = self.plan.copies[one.copy].source
                    yield from (
                        _Output(data, ()) for data in self._bytes_of(source.file, source.start + one.start, source.start + one.stop)
                    )
            noted = (digests, gram) if again < 0 else (None, None)  # what is written twice is read twice, and counts once
            merged = [one for one in segments if isinstance(one, Segment)]
            for has_matrices, alike in itertools.groupby(merged, self.plan.has_matrices):
                made: Iterator[tuple[list[Segment], Tensor, bool]]
                if has_matrices:
                    made = (found for one in alike for found in by_matrix.merged(self, one, known, lambda_, DTYPES[dtype], *noted))
                else:
                    made = self._by_block(list(alike), known, lambda_, DTYPES[dtype], *noted)
                for block, rounded_B, finite in made:
                    if not finite:
                        self._refuse_output(block, rounded_B)
                    yield _Output(rounded_B.cpu().view(torch.uint8).numpy().data, block)

    def _by_block(
        self,
        segments: Sequence[Segment],
        known: Known,
        lambda_: float,
        dtype: torch.dtype,
        digests: Sequence[CellDigests] | None,
        gram: Gram | None,
    ) -> Iterator[tuple[list[Segment], Tensor, bool]]:
        for block in self.cut(segments):
            loaded = self.load(block, digests)
            self.relate(loaded, gram)
            yield block, *self.kernel.merge(loaded, known, self.plan.tensors[block[0].tensor].weights, lambda_, dtype)

    def _mean(self, tensor: CopiedTensor, part: Copied) -> memoryview:
        """These bytes of the mean of statistics over the models."""
        written = DTYPES[tensor.slot.dtype]
        first, stop = part.start // written.itemsize, part.stop // written.itemsize
        sum_B = torch.zeros(stop - first)
        for source in tensor.models:
            size = DTYPES[source.dtype].itemsize
            pieces = self._bytes_of(source.file, source.start + first * size, source.start + stop * size)
            sum_B += torch.cat([torch.frombuffer(piece, dtype=DTYPES[source.dtype]).float() for piece in pieces])
        mean_B = (sum_B / torch.tensor(float(len(tensor.models)))).to(written)
        if not bool(torch.isfinite(mean_B).all()):
            raise InputError(
                f"tensor {tensor.source.name}: wanted statistics whose mean over the models is a number that {tensor.slot.dtype} "
                "can hold, found one that is not finite. Fix: repair the checkpoints, or keep the base's tensor with `exclude`."
            )
        return mean_B.view(torch.uint8).numpy().data

    def _alike(self, segment: Segment | Copied) -> tuple[tuple[float, ...], float, str, int]:
        """What neighbours must share to be merged at once: the coefficients, the output dtype, and whether it is once more; what is
        copied has none of them."""
        if isinstance(segment, Copied):
            return (), 0.0, "", -1
        tensor = self.plan.tensors[segment.tensor]
        return tensor.weights, tensor.lambda_, tensor.slot.dtype, segment.again

    def _are_close(self, data: memoryview, held: memoryview, segments: Sequence[Segment], folder: str) -> bool:
        """Whether merged bytes are the held ones within the method's tolerance."""
        tolerance = self.plan.method.tolerance
        if tolerance == 0:
            return False
        dtype = DTYPES[self.plan.tensors[segments[0].tensor].slot.dtype]
        made_B, found_B = (torch.frombuffer(bytearray(part), dtype=dtype).double() for part in (data, held))
        sizes = [segment.stop - segment.start for segment in segments]
        return all(
            bool(off_B.max() <= tolerance * self._largest(segment.tensor, folder))
            for segment, off_B in zip(segments, torch.split((made_B - found_B).abs(), sizes), strict=True)
        )

    def _largest(self, index: int, folder: str) -> float:
        """The size of the largest value that the output holds of a merged tensor."""
        tensor = self.plan.tensors[index]
        file, dtype = os.path.join(folder, self.plan.files[tensor.slot.file].name), DTYPES[tensor.slot.dtype]
        pieces = self._bytes_of(file, tensor.slot.start, tensor.slot.start + tensor.numel * dtype.itemsize)
        return max(float(torch.frombuffer(piece, dtype=dtype).abs().max()) for piece in pieces)

    def _tensor_at(self, segments: Sequence[Segment], byte: int) -> str:
        """The name of the output's tensor that holds this byte of these segments."""
        itemsize = DTYPES[self.plan.tensors[segments[0].tensor].slot.dtype].itemsize
        segment = _segment_at(segments, byte // itemsize)[0]
        tensor = self.plan.tensors[segment.tensor]
        return self.plan.again[segment.again].name if segment.again >= 0 else tensor.part_of or tensor.name

    def _bytes_of(self, file: str, start: int, stop: int) -> Iterator[memoryview]:
        for at in range(start, stop, COPIED_AT_ONCE):
            data = memoryview(bytearray(min(COPIED_AT_ONCE, stop - at)))
            self.store.read(file, at, data)
            self._read_apart += len(data)
            yield data

    def _out_file(self, folder: str, part: Part) -> str:
        return os.path.join(folder, self.plan.files[part.file].name)

    # --- what is needed next ------------------------------------------------------------------------------------------------------

    def chunks_ahead(self, chunks: Sequence[int]) -> Iterator[int]:
        return self._ahead(chunks, self.plan.chunks, self.plan.cells_of)

    def _parts_ahead(self, parts: Sequence[int]) -> Iterator[int]:
        return self._ahead(parts, len(self.plan.parts), lambda number: self.plan.parts[number].segments)

    def _ahead(self, items: Sequence[int], end: int, segments_of: Callable[[int], Sequence[Segment | Copied]]) -> Iterator[int]:
        """The items one after another, while what they and the next ones are made from is on its way."""
        if not self.plan.is_remote:
            yield from items
            return
        ahead = self.plan.ahead
        following = range(items[-1] + 1, min(items[-1] + 1 + ahead, end)) if items else ()
        run = [*items, *(following if self.then is None else self.then)]
        for k, item in enumerate(items):
            coming = itertools.chain.from_iterable(segments_of(one) for one in run[k : k + 1 + ahead])
            self.store.expect(self.plan.ranges_of(coming))
            yield item

    # --- blocks -------------------------------------------------------------------------------------------------------------------

    def blocks(self, chunk: int) -> Iterator[list[Segment]]:
        """The chunk in blocks."""
        first, stop = self.plan.bounds[chunk], self.plan.bounds[chunk + 1]
        if self.plan.method.unit == "element":
            for at in range(first, stop, self.block_elements):
                yield list(self.plan.segments(at, min(at + self.block_elements, stop)))
        else:
            yield from self.cut(self.plan.cells_of(chunk))

    def cut(self, segments: Sequence[Segment]) -> Iterator[list[Segment]]:
        """Segments in blocks; each of one tensor only if the method must know it."""
        shares = self.plan.method.unit == "element"
        block: list[Segment] = []
        size = 0
        for segment in segments:
            start = segment.start
            while start < segment.stop:
                stop = min(segment.stop, start + self.block_elements - size)
                block.append(dataclasses.replace(segment, start=start, stop=stop))
                size, start = size + stop - start, stop
                if size == self.block_elements or (not shares and start == segment.stop):
                    yield block
                    block, size = [], 0
        if block:
            yield block

    def _sample_blocks(self, chunks: Iterable[int]) -> Iterator[tuple[list[Segment], NDArray[np.int64]]]:
        """The sample runs that start in these chunks, many to a block, with the number of each element's run.

        Their places depend on the plan alone."""
        run_elements, stride = self.plan.sizes.sample_run, self.plan.sizes.sample_stride
        shares = self.plan.method.unit == "element"
        segments: list[Segment] = []
        numbers: list[tuple[int, int]] = []
        for chunk in chunks:
            first, stop = self.plan.bounds[chunk], self.plan.bounds[chunk + 1]
            for run in range(-(-first // stride), -(-stop // stride)):
                # A hashed place within the stride: equal steps would hit the same columns of every row.
                at = run * stride + (run * 0x9E3779B97F4A7C15 % (1 << 64) >> 40) % (stride - run_elements + 1)
                for segment in self.plan.segments(at, min(at + run_elements, self.plan.D)):
                    segments.append(segment)
                    numbers.append((run, segment.stop - segment.start))
                    if not shares:
                        yield segments, np.repeat(*np.transpose(numbers))
                        segments, numbers = [], []
                if sum(size for _, size in numbers) + run_elements > self.block_elements:
                    yield segments, np.repeat(*np.transpose(numbers))
                    segments, numbers = [], []
            if numbers and self.plan.is_remote:  # what is fetched for a chunk is given up with it
                yield segments, np.repeat(*np.transpose(numbers))
                segments, numbers = [], []
        if numbers:
            yield segments, np.repeat(*np.transpose(numbers))

    def load(self, segments: Sequence[Segment], digests: Sequence[CellDigests] | None = None) -> Loaded:
        """A block as its files hold it: the base's elements [B] and each model's, in the file's dtype. It is valid until the next
        call."""
        sources = [self.load_source(segments, k, digests[k] if digests else None) for k in range(self.plan.N + 1)]
        if self.plan.method.unit == "element":
            return Loaded(sources)
        (segment,) = segments
        tensor = self.plan.tensors[segment.tensor]
        place = TensorPlace(tensor.name, tensor.shape, segment.tensor, segment.start)
        return Loaded(sources, tensor.first + segment.start, place)

    def load_source(self, segments: Sequence[Segment], source: int, digests: CellDigests | None) -> Tensor | None:
        reader = self._readers[source]
        if reader is None:
            return None
        wanted = []
        for segment in segments:
            tensor = self.plan.tensors[segment.tensor].sources[source]
            if tensor is not None:
                cell = self.plan.cell_of(segment) if digests is not None else -1
                wanted.append(Wanted(tensor, segment.start, segment.stop, cell))
        return reader.block(wanted, digests)

    def _gram(self, relate: bool) -> Gram | None:
        n = self.plan.N
        return Gram(np.zeros((n + 1) * (n + 2) // 2), [0] * n) if relate else None

    def relate(self, loaded: Loaded, gram: Gram | None) -> None:
        """Add a block to what is found of how the models stand to the base, if that is asked for."""
        if gram is not None:
            gram.merge(Gram(*self.kernel.gram(loaded)))

    def _digests(self) -> list[CellDigests]:
        return [CellDigests() for _ in range(self.plan.N + 1)]

    def _pass(self, step: int, kind: type[PassT]) -> PassT:
        found = self.plan.method.passes[step]
        if not isinstance(found, kind):
            raise TypeError(f"pass {step} of {self.plan.method.name} is no {kind.__name__}")
        return found

    # --- complaints ---------------------------------------------------------------------------------------------------------------

    def refuse_non_finite(self, segments: Sequence[Segment], what: str) -> None:
        """Raise InputError that names model, tensor and first index of what is not finite in a block, of which `what` is not."""
        problems = []
        for segment in segments:
            for source in range(self.plan.N + 1):
                tensor, x_B = self.plan.tensors[segment.tensor].sources[source], self.load_source([segment], source, None)
                if tensor is None or x_B is None:
                    continue
                bad = torch.nonzero(~torch.isfinite(x_B.float()))
                if len(bad):
                    at = int(bad[0])
                    problems.append(
                        f"{self._source(source)}: tensor {tensor.name}: wanted finite numbers, found {x_B[at].item()} at index "
                        f"{self._index(segment, at)} ({tensor.dtype}). "
                        "Fix: repair the checkpoint, or keep the base's tensor with `exclude`."
                    )
        if not problems:
            bad = torch.nonzero(~torch.isfinite(self.kernel.load(self.load(segments)).tau))
            if not len(bad):
                raise InputError(
                    f"merge_method: {what} of {self.plan.method.full_name}: wanted finite values, found an infinite one in tensor "
                    f"{self.plan.tensors[segments[0].tensor].name}. Fix: mend the method, or exclude the tensor."
                )
            model, at = bad[0].tolist()
            segment, at = _segment_at(segments, at)
            problems.append(
                f"{self._source(model + 1)}: tensor {self.plan.tensors[segment.tensor].name}: wanted a finite difference to the "
                f"base, found one that overflows float32 at index {self._index(segment, at)}. "
                "Fix: repair the checkpoint, or keep the base's tensor with `exclude`."
            )
        raise InputError(problems)

    def _refuse_output(self, segments: Sequence[Segment], rounded_B: Tensor) -> None:
        segment, at = _segment_at(segments, int(torch.nonzero(~torch.isfinite(rounded_B))[0]))
        # Without an earlier sweep nobody has looked at the inputs, and a method of the user's may have looked past what is wrong
        # with them: they are to blame first.
        if not self.kernel.are_finite(self.load(segments)):
            self.refuse_non_finite(segments, "the merge")
        tensor = self.plan.tensors[segment.tensor]
        place = f"the output: tensor {tensor.name}, index {self._index(segment, at)}"
        if bool(torch.isnan(rounded_B).any()):
            raise InputError(
                f"{place}: wanted a number, found NaN, which {self.plan.method.full_name} gave for finite inputs. Fix: mend the "
                "method."
            )
        raise InputError(
            f"{place}: wanted a number that {tensor.slot.dtype} can hold, found one that overflows it. "
            "Fix: ask for a wider `dtype` (bfloat16 or float32), or for smaller weights or lambda."
        )

    def _index(self, segment: Segment, at: int) -> list[int]:
        """Where element `at` of a segment lies in its tensor."""
        shape = self.plan.tensors[segment.tensor].shape
        return [int(k) for k in np.unravel_index(segment.start + at, shape)] if shape else []

    def _source(self, source: int) -> str:
        return self.plan.inputs[source].source

    def _check_files(self, writes_to: str) -> None:
        """Every machine must see the same inputs and the same output folder."""
        node, problems = socket.gethostname(), []
        shared = "a file system that all nodes share"
        problems += self._unreachable()
        for one in self.plan.inputs:
            for file in one.files:
                if is_remote(file.path):  # each read of it is checked
                    continue
                try:
                    size = self.store.stamp(file.path).size
                except OSError as error:
                    fix = f"put the models on {shared}"
                    if one.commit is not None:
                        at = f"{HUB_SCHEME}{hub_id(one.source)}"
                        how = "unset HF_HUB_OFFLINE" if one.source.startswith(HUB_SCHEME) else f"name it {at}"
                        fix = f"{how}, so that each node reads it from the Hub itself, or let HF_HOME be a folder on {shared}"
                    problems.append(f"{file.path}: wanted a file that node {node} can read, found: {error.strerror}. Fix: {fix}.")
                    continue
                if size != file.size:
                    problems.append(
                        f"{file.path}: wanted {file.size} bytes, as planned, found {size} on node {node}. "
                        f"Fix: let all nodes see the same files, on {shared}."
                    )
        if is_remote(writes_to):
            problems += self._unwritable(writes_to)
        elif writes_to and not os.path.isdir(writes_to):
            problems.append(f"{writes_to}: wanted the output's folder, found none on node {node}. Fix: choose one on {shared}.")
        if problems:
            raise RequestError(problems)

    def _unreachable(self) -> list[str]:
        """Stores that this machine can't read, by one byte of each: credentials are each machine's own."""
        node, problems = socket.gethostname(), []
        files = [file.path for one in self.plan.inputs for file in one.files if is_remote(file.path) and file.size]
        for file in {container_of(file): file for file in files}.values():
            try:
                self.store.read(file, 0, memoryview(bytearray(1)))
            except OSError as error:
                problems.append(f"node {node}: {object_problem(file, error)}")
        return problems

    def _unwritable(self, prefix: str) -> list[str]:
        """Whether this machine may write there, by one object; its own credentials may be others than the driver's."""
        node = socket.gethostname()
        try:
            if prefix.startswith(HUB_SCHEME):
                Branch.of(prefix).may_write()
                return []
            with self.store.part(f"{prefix}/tried/{node}-{os.getpid()}", 0, len(TRIED)) as out:
                out.write(TRIED)
        except OSError as error:
            return [f"node {node}: {object_problem(prefix, error, 'write')}"]
        return []

    def note_memory(self) -> None:
        if time.monotonic() - self._noted >= NOTE_MEMORY_S:
            self._noted, self.peak_bytes = time.monotonic(), max(self.peak_bytes, anonymous_bytes())


def anonymous_bytes() -> int:
    """Memory of this process that the kernel can't take back: private and shared anonymous pages. 0 where /proc is missing."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return 0
    return sum(1024 * int(kib) for kib in re.findall(r"^Rss(?:Anon|Shmem):\s+(\d+) kB", status, flags=re.MULTILINE))


def _totals(digests: Sequence[CellDigests]) -> tuple[Digest, ...]:
    return tuple(one.total() for one in digests)


def _segment_at(segments: Sequence[Segment], at: int) -> tuple[Segment, int]:
    """The segment that holds element `at` of these, and its place in the segment."""
    for segment in segments:
        if at < segment.stop - segment.start:
            break
        at -= segment.stop - segment.start
    return segment, at


def _sums_of_runs(x_B: Tensor) -> list[float]:
    """Sums of x over runs of SUM_RUN elements, each folded in halves: one order of additions, on any device."""
    padded = torch.nn.functional.pad(x_B, (0, -len(x_B) % SUM_RUN)).view(-1, SUM_RUN)
    width = SUM_RUN
    while width > 1:
        width //= 2
        padded = padded[:, :width] + padded[:, width : 2 * width]
    return [float(x) for x in padded[:, 0].tolist()]
