"""Owner: holds one shard and answers questions about it, sweep by sweep. A plain class; `runtime` makes it a Ray actor.

An answer is a function of the plan and the question alone, so a lost owner can be replaced and asked again, and it does not
matter who answers. Memory is bounded by the block: an owner reads one block of the base and of every model, works on it, and forgets it.
"""

from __future__ import annotations

import itertools
import math
import os
import re
import socket
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray
from torch import Tensor

from pcb_ray.answers import LARGEST_KEY, MAGNITUDE, SAMPLE_SHIFT, Counted, Digest, Extrema, Sampled, Sums, Thresholds
from pcb_ray.errors import InputError, RequestError, RunError
from pcb_ray.files.checkpoint import DTYPE_BYTES
from pcb_ray.files.store import fsync_file
from pcb_ray.kernels import DTYPES, choose_kernel, keys
from pcb_ray.planning import MIN_BLOCK, SAMPLE_RUN, Plan, Segment, choose_block
from pcb_ray.searching.basis import Writer, chunk_file, digest_of
from pcb_ray.selection import Bracket, Sample, Tally

# Float sums are taken over fixed runs of this many elements and then exactly over the runs, so that no block size can show in them.
SUM_RUN = 1 << 12
NOTE_MEMORY_S = 0.02  # to ask the system takes up to a millisecond


class Bytes:
    """Reads and writes byte ranges of files, each opened once; files named in `memory` are arrays in memory instead."""

    def __init__(self, memory: dict[str, NDArray[np.uint8]] | None = None) -> None:
        self.memory = memory or {}
        self._readers: dict[str, int] = {}
        self._writers: dict[str, int] = {}
        self.bytes_read = 0

    def read(self, file: str, start: int, out: memoryview) -> None:
        self.bytes_read += len(out)
        if file in self.memory:
            out[:] = self.memory[file].data[start : start + len(out)]
            return
        if file not in self._readers:
            self._readers[file] = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
        got = 0
        while got < len(out):
            count = os.preadv(self._readers[file], [out[got:]], start + got)
            if count == 0:
                raise RunError(
                    f"{file}: ends at byte {start + got}, but its header promises data up to byte {start + len(out)}; it was changed during the merge"
                )
            got += count

    def write(self, file: str, start: int, data: memoryview) -> None:
        if file in self.memory:
            self.memory[file].data[start : start + len(data)] = data
            return
        if file not in self._writers:
            # Not O_RDWR: a network file system would fetch whole pages, and write them back over a neighbour's bytes.
            self._writers[file] = os.open(file, os.O_WRONLY | os.O_CLOEXEC)
        put = 0
        while put < len(data):
            put += os.pwrite(self._writers[file], data[put:], start + put)

    def sync(self) -> None:
        """Make durable what was written."""
        for fd in self._writers.values():
            os.fsync(fd)

    def close(self) -> None:
        for fd in (*self._readers.values(), *self._writers.values()):
            os.close(fd)
        self._readers, self._writers = {}, {}

    def __del__(self) -> None:
        self.close()  # owners in this process come and go


class _Buffer:
    """Room for a block of one source, seen as bytes and as the dtypes that it comes in."""

    def __init__(self, elements: int, dtypes: set[str], device: torch.device) -> None:
        widest = max(DTYPE_BYTES[dtype] for dtype in dtypes)
        raw = torch.empty(elements * widest, dtype=torch.uint8, pin_memory=device.type == "cuda")
        self.view = raw.numpy().data
        self.typed = {dtype: raw.view(DTYPES[dtype]) for dtype in dtypes}


class Owner:
    def __init__(
        self,
        plan: Plan,
        out_dir: str = "",
        *,
        device: str = "cpu",
        block_elements: int | None = None,
        memory: dict[str, NDArray[np.uint8]] | None = None,
    ) -> None:
        self.plan = plan
        self.out_dir = out_dir
        self.device = torch.device(device)
        self.kernel = choose_kernel(plan.method, plan.N, plan.D, self.device)
        self.block_elements = block_elements or choose_block(plan, self.device.type, None)
        assert self.block_elements % MIN_BLOCK == 0, self.block_elements
        self.bytes = Bytes(memory)
        self._check_files()
        dtypes = [plan.dtypes_of(source) for source in range(plan.N + 1)]
        self._raw = [_Buffer(self.block_elements, of_source, self.device) if of_source else None for of_source in dtypes]
        self._saved: list[Path] = []  # files of the basis, not yet durable
        self.peak_bytes, self._noted = 0, -math.inf

    # --- questions ----------------------------------------------------------------------------------------------------------------

    def sample(self, chunks: Sequence[int], quantity: str, thresholds: Thresholds) -> Sampled:
        """For each task, where the keys of |tau| or beta lie in the sample runs that start in these chunks."""
        bits = 32 if quantity == MAGNITUDE else self.kernel.key_bits
        samples = [Sample(SAMPLE_SHIFT[bits]) for _ in range(self.plan.N)]
        for segments, runs in self._sample_blocks(chunks):
            scores_NB = self.kernel.scores(self._load(segments), quantity, thresholds)
            for sample, x_B in zip(samples, scores_NB, strict=True):
                sample.add(keys(x_B, quantity == MAGNITUDE).cpu().numpy(), runs)
        return Sampled(samples)

    def count(
        self, chunks: Sequence[int], quantity: str, thresholds: Thresholds, brackets: Sequence[Sequence[Bracket]], first_sweep: bool
    ) -> Counted:
        """Counts of |tau| or beta against each task's brackets. The first sweep over the inputs also checks and digests them."""
        result = Counted([[Tally(b) for b in of_task] for of_task in brackets], [-(1 << 63)] * self.plan.N, 0, {})
        for chunk in chunks:
            digests = self._digests() if first_sweep else None
            for segments in self._blocks(chunk):
                largest, counted = self.kernel.count(self._load(segments, digests), quantity, thresholds, brackets)
                for i in range(self.plan.N):
                    result.largest[i] = max(result.largest[i], largest[i])
                    for tally, (counts, inside) in zip(result.tallies[i], counted[i], strict=True):
                        tally.add(*counts, inside)
                if quantity == MAGNITUDE and max(largest) >= LARGEST_KEY[32]:  # an infinity or a NaN
                    self._refuse_non_finite(segments)
            if digests is not None:
                result.digests[chunk] = tuple(d.digest() for d in digests)
            result.chunks += 1
        self._note_memory()
        return result

    def extrema(self, chunks: Sequence[int]) -> Extrema:
        """The smallest and largest tau_i tau_j of each pair, exact in float64. A first sweep: it checks and digests the inputs."""
        pairs = self.plan.N * (self.plan.N + 1) // 2
        result = Extrema([math.inf] * pairs, [-math.inf] * pairs, {})
        for chunk in chunks:
            digests = self._digests()
            for segments in self._blocks(chunk):
                if not self.kernel.extrema(self._load(segments, digests), result.low, result.high):
                    self._refuse_non_finite(segments)
            result.digests[chunk] = tuple(d.digest() for d in digests)
        self._note_memory()
        return result

    def sums(self, chunks: Sequence[int], thresholds: Thresholds) -> Sums:
        """The sums of `paper`'s softmax numerators chunk by chunk, float64, the same for any block size."""
        result = Sums({})
        for chunk in chunks:
            runs: list[list[float]] = [[] for _ in range(self.plan.N * (self.plan.N + 3) // 2)]
            for segments in self._blocks(chunk):
                for total, x_B in zip(runs, self.kernel.exponentials(self._load(segments), thresholds), strict=True):
                    total += _sums_of_runs(x_B)
            result.of_chunk[chunk] = [math.fsum(run) for run in runs]
        self._note_memory()
        return result

    def write(
        self, chunks: Sequence[int], thresholds: Thresholds, digest_inputs: bool
    ) -> dict[int, tuple[Digest, tuple[Digest, ...]]]:
        """Merge these chunks into the output files; for each the digest of what was written (and, for methods of one sweep, of its inputs)."""
        result = {}
        for chunk in chunks:
            written = xxhash.xxh3_128()
            digests = self._digests() if digest_inputs else None
            for segments, data in self._merged(chunk, thresholds, digests):
                written.update(data)
                at = 0
                for segment in segments:
                    slot = self.plan.tensors[segment.tensor].slot
                    itemsize = DTYPE_BYTES[slot.dtype]
                    stop = at + (segment.stop - segment.start) * itemsize
                    self.bytes.write(self._out_file(slot.file), slot.start + segment.start * itemsize, data[at:stop])
                    at = stop
            result[chunk] = (written.digest(), tuple(d.digest() for d in digests or ()))
        self._note_memory()
        return result

    def basis(self, chunks: Sequence[int], thresholds: Thresholds, scored: bool) -> dict[int, tuple[int, Digest]]:
        """Save the basis of these chunks, one file each; with the betas if `scored` (for pcb variants). The entries and the digest of each."""
        result = {}
        for chunk in chunks:
            writer = Writer()
            for segments in self._blocks(chunk):
                sources = self._load(segments)
                if scored:
                    values_NB, scores_NB, kept_NB = self.kernel.scored(sources, thresholds)
                    scores = scores_NB.cpu().numpy()
                else:
                    values_NB, finite = self.kernel.basis(sources, thresholds)
                    if not finite:
                        self._refuse_non_finite(segments)
                    scores, kept_NB = None, values_NB != 0.0
                values, kept, at = values_NB.cpu().numpy(), kept_NB.cpu().numpy(), 0
                for segment in segments:
                    part = np.s_[:, at : at + segment.stop - segment.start]
                    writer.add(segment, values[part], kept[part], None if scores is None else scores[part])
                    at += segment.stop - segment.start
            result[chunk] = writer.save(chunk_file(self.out_dir, chunk))
            self._saved.append(chunk_file(self.out_dir, chunk))
        self._note_memory()
        return result

    def basis_digests(self, chunks: Sequence[int]) -> dict[int, Digest]:
        """The digests of the basis files that are there."""
        paths = {chunk: chunk_file(self.out_dir, chunk) for chunk in chunks}
        return {chunk: digest_of(path.read_bytes()) for chunk, path in paths.items() if path.is_file()}

    def merged_digests(self, chunks: Sequence[int], thresholds: Thresholds) -> dict[int, Digest]:
        """What `write` would digest for these chunks, recomputed from the inputs without writing."""
        result = {}
        for chunk in chunks:
            digest = xxhash.xxh3_128()
            for _, data in self._merged(chunk, thresholds, None):
                digest.update(data)
            result[chunk] = digest.digest()
        return result

    def written_digests(self, chunks: Sequence[int]) -> dict[int, Digest]:
        """The digests of what the output files hold for these chunks."""
        result = {}
        for chunk in chunks:
            digest = xxhash.xxh3_128()
            for segments in self._blocks(chunk):
                for segment in segments:
                    slot = self.plan.tensors[segment.tensor].slot
                    itemsize = DTYPE_BYTES[slot.dtype]
                    data = memoryview(bytearray((segment.stop - segment.start) * itemsize))
                    self.bytes.read(self._out_file(slot.file), slot.start + segment.start * itemsize, data)
                    digest.update(data)
            result[chunk] = digest.digest()
        return result

    def copy(self, pieces: Sequence[tuple[int, int, int]]) -> list[Digest]:
        """Copy byte ranges of copied tensors from the base to the output; their digests."""
        return [self._copy(piece, write=True) for piece in pieces]

    def copied_digests(self, pieces: Sequence[tuple[int, int, int]]) -> list[Digest]:
        """The digests of what the output files hold for these byte ranges."""
        return [self._copy(piece, write=False) for piece in pieces]

    def _copy(self, piece: tuple[int, int, int], write: bool) -> Digest:
        index, start, stop = piece
        copied = self.plan.copies[index]
        digest = xxhash.xxh3_128()
        for at in range(start, stop, 1 << 20):
            data = memoryview(bytearray(min(1 << 20, stop - at)))
            if write:
                self.bytes.read(copied.source.file, copied.source.start + at, data)
                self.bytes.write(self._out_file(copied.slot.file), copied.slot.start + at, data)
            else:
                self.bytes.read(self._out_file(copied.slot.file), copied.slot.start + at, data)
            digest.update(data)
        return digest.digest()

    def sync(self) -> None:
        """Make durable what was written so far."""
        self.bytes.sync()
        while self._saved:
            fsync_file(self._saved.pop())

    def differing_twins(self, numbers: Sequence[int]) -> list[str]:
        """Which of these stored copies of tied tensors differ from their originals."""
        problems = []
        for index, copied, original in (self.plan.twins[number] for number in numbers):
            at, size = 0, min(copied.nbytes, original.nbytes)
            same = copied.dtype == original.dtype and copied.nbytes == original.nbytes
            while same and at < size:
                parts = [memoryview(bytearray(min(1 << 20, size - at))) for _ in range(2)]
                for tensor, part in zip((copied, original), parts, strict=True):
                    self.bytes.read(tensor.file, tensor.start + at, part)
                same = parts[0] == parts[1]
                at += len(parts[0])
            if not same:
                problems.append(
                    f"{self.plan.inputs[index].source}: config.json ties {copied.name} to {original.name}, but the stored copies differ; "
                    'set "tie_word_embeddings": false in its config if they are meant to differ, or remove the copy that is wrong'
                )
        return problems

    def state(self) -> dict[str, Any]:
        """What the receipt tells of an owner."""
        self._note_memory()
        return {
            "kernel": self.kernel.name,
            "device": str(self.device),
            "bytes_read": self.bytes.bytes_read,
            "peak_bytes": self.peak_bytes,
            "pid": os.getpid(),
        }

    # --- blocks -------------------------------------------------------------------------------------------------------------------

    def _blocks(self, chunk: int) -> Iterator[list[Segment]]:
        first = chunk * self.plan.chunk_elements
        stop = min(first + self.plan.chunk_elements, self.plan.D)
        for at in range(first, stop, self.block_elements):
            yield list(self.plan.segments(at, min(at + self.block_elements, stop)))

    def _sample_blocks(self, chunks: Sequence[int]) -> Iterator[tuple[list[Segment], NDArray[np.int64]]]:
        """The sample runs that start in these chunks, many to a block, with the number of each element's run.

        Their places depend on the plan alone."""
        stride = self.plan.sample_stride
        segments: list[Segment] = []
        numbers: list[tuple[int, int]] = []
        for chunk in chunks:
            first = chunk * self.plan.chunk_elements
            stop = min(first + self.plan.chunk_elements, self.plan.D)
            for run in range(-(-first // stride), -(-stop // stride)):
                # A hashed place within the stride: equal steps would hit the same columns of every row.
                at = run * stride + (run * 0x9E3779B97F4A7C15 % (1 << 64) >> 40) % (stride - SAMPLE_RUN + 1)
                end = min(at + SAMPLE_RUN, self.plan.D)
                if end <= at:
                    continue
                segments += self.plan.segments(at, end)
                numbers.append((run, end - at))
                if (len(numbers) + 1) * SAMPLE_RUN > self.block_elements:
                    yield segments, np.repeat(*np.transpose(numbers))
                    segments, numbers = [], []
        if numbers:
            yield segments, np.repeat(*np.transpose(numbers))

    def _digests(self) -> list[Any]:
        """One running digest per source; the bytes of a chunk count in the order of its elements."""
        return [xxhash.xxh3_128() for _ in range(self.plan.N + 1)]

    def _load(self, segments: Sequence[Segment], digests: Sequence[Any] | None = None) -> list[Tensor | None]:
        """A block as its files hold it: the base's elements [B] and each model's, in the file's dtype. Valid until the next call."""
        return [self._load_source(segments, k, digests[k] if digests else None) for k in range(self.plan.N + 1)]

    def _load_source(self, segments: Sequence[Segment], source: int, digest: Any) -> Tensor | None:
        buffer, at = self._raw[source], 0
        if buffer is None:
            return None
        pieces = list(self._pieces(segments, source))
        if len(pieces) == 1 and (in_memory := self.bytes.memory.get(pieces[0][0])) is not None:
            _, dtype, start, stop = pieces[0]  # used where it lies
            if digest is not None:
                digest.update(in_memory[start:stop])
            return torch.from_numpy(in_memory[start:stop]).view(DTYPES[dtype]).to(self.device)
        mixed = any(dtype != pieces[0][1] for _, dtype, _, _ in pieces)
        converted = []
        for file, dtype, start, stop in pieces:
            view = buffer.view[at : at + stop - start]
            self.bytes.read(file, start, view)
            if digest is not None:
                digest.update(view)
            if mixed:  # the next piece takes the same bytes of the buffer
                converted.append(
                    buffer.typed[dtype][: (stop - start) // DTYPE_BYTES[dtype]].to(self.device, torch.float32, copy=True)
                )
            else:
                at += stop - start
        # To a GPU the copy is synchronous, so that the buffer is free again; on a CPU there is none.
        return torch.cat(converted) if mixed else buffer.typed[dtype][: at // DTYPE_BYTES[dtype]].to(self.device)

    def _pieces(self, segments: Sequence[Segment], source: int) -> Iterator[tuple[str, str, int, int]]:
        """File, dtype, and first and last byte of these segments in one source; neighbours in the file are one piece."""
        piece: tuple[str, str, int, int] | None = None
        for segment in segments:
            tensor = self.plan.tensors[segment.tensor].sources[source]
            assert tensor is not None
            itemsize = DTYPE_BYTES[tensor.dtype]
            start, stop = tensor.start + segment.start * itemsize, tensor.start + segment.stop * itemsize
            if piece is not None and (tensor.file, tensor.dtype, start) == (piece[0], piece[1], piece[3]):
                piece = (*piece[:3], stop)
                continue
            if piece is not None:
                yield piece
            piece = (tensor.file, tensor.dtype, start, stop)
        if piece is not None:
            yield piece

    def _merged(
        self, chunk: int, thresholds: Thresholds, digests: Sequence[Any] | None
    ) -> Iterator[tuple[list[Segment], memoryview]]:
        """The output bytes of a chunk, in runs of segments that are written alike; valid until the next run is asked for."""
        for segments in self._blocks(chunk):
            sources, at = self._load(segments, digests), 0
            for run in _runs_written_alike(self.plan, segments):
                stop = at + sum(s.stop - s.start for s in run)
                part = [x if x is None else x[at:stop] for x in sources]
                tensor = self.plan.tensors[run[0].tensor]
                dtype = DTYPES[tensor.slot.dtype]
                rounded_B, finite = self.kernel.merge(part, thresholds, tensor.lambdas, self.plan.recipe.lambda_, dtype)
                if not finite:
                    self._refuse_overflow(run, rounded_B)
                yield run, rounded_B.cpu().view(torch.uint8).numpy().data
                at = stop

    def _out_file(self, index: int) -> str:
        name = self.plan.files[index].name
        return name if name in self.bytes.memory else os.path.join(self.out_dir, name)

    # --- complaints ---------------------------------------------------------------------------------------------------------------

    def _refuse_non_finite(self, segments: Sequence[Segment]) -> None:
        problems = []
        for segment in segments:
            for source in range(self.plan.N + 1):
                tensor, x_B = self.plan.tensors[segment.tensor].sources[source], self._load_source([segment], source, None)
                if tensor is None or x_B is None:
                    continue
                bad = torch.nonzero(~torch.isfinite(x_B.float()))
                if len(bad):
                    at = int(bad[0])
                    problems.append(
                        f"{self._source(source)}: tensor {tensor.name} holds {x_B[at].item()} at index "
                        f"{self._index(segment, at)} ({tensor.dtype}); "
                        "a merge needs finite numbers: repair the checkpoint, or keep the base's tensor with `exclude`"
                    )
        if not problems:
            _, tau_NB = self.kernel.load(self._load(segments))
            model, at = torch.nonzero(~torch.isfinite(tau_NB))[0].tolist()
            segment, at = _segment_at(segments, at)
            problems.append(
                f"{self._source(model + 1)}: tensor {self.plan.tensors[segment.tensor].name}: the difference to the base overflows "
                f"float32 at index {self._index(segment, at)}; repair the checkpoint, or keep the base's tensor with `exclude`"
            )
        raise InputError(problems)

    def _refuse_overflow(self, segments: Sequence[Segment], rounded_B: Tensor) -> None:
        segment, at = _segment_at(segments, int(torch.nonzero(~torch.isfinite(rounded_B))[0]))
        if self.plan.sweeps == 1:
            # No earlier sweep has looked at the inputs: blame them first.
            _, tau_NB = self.kernel.load(self._load(segments))
            if not bool(torch.isfinite(tau_NB).all()):
                self._refuse_non_finite(segments)
        tensor = self.plan.tensors[segment.tensor]
        raise InputError(
            f"the output: tensor {tensor.name} overflows {tensor.slot.dtype} at index {self._index(segment, at)}; "
            "ask for a wider `dtype` (bfloat16 or float32), or for smaller weights or lambda"
        )

    def _index(self, segment: Segment, at: int) -> list[int]:
        """Where element `at` of a segment lies in its tensor."""
        shape = self.plan.tensors[segment.tensor].shape
        return [int(k) for k in np.unravel_index(segment.start + at, shape)] if shape else []

    def _source(self, source: int) -> str:
        return self.plan.inputs[source].source

    def _check_files(self) -> None:
        """Every machine that owns a shard must see the same inputs and the same output folder."""
        node, problems = socket.gethostname(), []
        for one in self.plan.inputs:
            for file in one.files:
                if file.path in self.bytes.memory:
                    continue
                try:
                    size = os.stat(file.path).st_size
                except OSError as error:
                    problems.append(
                        f"{file.path}: node {node} can't read it ({error.strerror}); put the models on a file system that all nodes share"
                    )
                    continue
                if size != file.size:
                    problems.append(
                        f"{file.path}: {size} bytes on node {node}, {file.size} bytes in the plan; all nodes must see the same files"
                    )
        if self.out_dir and not os.path.isdir(self.out_dir):
            problems.append(
                f"{self.out_dir}: node {node} doesn't see the folder of the output; choose one on a file system that all nodes share"
            )
        if problems:
            raise RequestError(problems)

    def _note_memory(self) -> None:
        if time.monotonic() - self._noted >= NOTE_MEMORY_S:
            self._noted, self.peak_bytes = time.monotonic(), max(self.peak_bytes, anonymous_bytes())


def anonymous_bytes() -> int:
    """Memory of this process that the kernel can't take back: private and shared anonymous pages. 0 where /proc is missing."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return 0
    return sum(1024 * int(kib) for kib in re.findall(r"^Rss(?:Anon|Shmem):\s+(\d+) kB", status, flags=re.MULTILINE))


def _runs_written_alike(plan: Plan, segments: Sequence[Segment]) -> Iterator[list[Segment]]:
    """Neighbours of the same weights and the same output dtype."""

    def alike(segment: Segment) -> tuple[tuple[float, ...], str]:
        tensor = plan.tensors[segment.tensor]
        return tensor.lambdas, tensor.slot.dtype

    return (list(run) for _, run in itertools.groupby(segments, alike))


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
