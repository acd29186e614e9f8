"""The Basis: what remains of N models once their thresholds are known, sparse, in files that all processes of a node map and share.

A merge is linear in the coefficients, if its method says so (`Method.linear`):

    theta_m = theta_pre + lambda sum_i lambda_i C_i

For a method that drops elements, C_i is 0 wherever task i keeps nothing: a share r of the model. So a candidate of a search costs
one pass over the base and over r N D entries in memory; no model is read again. A basis holds one of two things for each element
that a task keeps:

    combined   C_i: 4 bytes. One density.
    scored     what is merged of the task, and its score: 8 bytes (scores in float64: 12), for methods with a `Scored` record. Any
               density up to the one it was made for: the threshold of each is an exact order statistic of the scores that are
               here, and the candidate has the bytes of the merge.

Where the entries lie is a bit per element and task: 1 / (8 r) bytes each. The chunks of the plan lie one after another in a few
files, `volumes`: one owner writes each from its first byte to its last.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import json
import math
import mmap
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray
from torch import Tensor

from pcb_ray.errors import RunError
from pcb_ray.files.checkpoint import DTYPE_BYTES
from pcb_ray.files.objects import CutOff
from pcb_ray.files.store import Range, Store, is_remote
from pcb_ray.kernels.native import STRIP, KnownInC, load_native
from pcb_ray.kernels.reference import keys
from pcb_ray.methods import Known, Ranks
from pcb_ray.methods.method import Scored
from pcb_ray.owner import FILE_TRIES
from pcb_ray.planning import Plan, Segment
from pcb_ray.questions import SAMPLE_SHIFT, Written, value_of_key
from pcb_ray.searching.volumes import chunks_of_volume, volume_bytes, volume_file, volumes_of
from pcb_ray.selection import add_up
from pcb_ray.sources import DTYPES, CellDigests, Reader, Wanted

if TYPE_CHECKING:
    from pcb_ray.owner import Owner

ARRAYS = {"U8": np.uint8, "I64": np.int64, "F32": np.float32, "F64": np.float64}
# How _native.c puts out a value that is written in one dtype and held by a parameter in another; WIDE, NARROW and ROUNDED there.
WAYS = {
    (torch.float32, torch.float32): 0,
    (torch.bfloat16, torch.bfloat16): 1,
    (torch.bfloat16, torch.float32): 2,
}
COPIED_AT_ONCE = 1 << 20  # elements
ALIGNMENT = 64  # of an array in a volume
PADDING = 16  # values beyond the last: _native.c reads them in vectors
# Scores that are brought together to be ranked. Where more agree in their upper bits, they are counted by the next so many bits of
# their keys.
GATHERED, NARROWING_BITS = 1 << 20, 16


def mask_of(kept: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """A bit for each element, the lowest of a byte first; in whole strips."""
    mask = np.packbits(kept, bitorder="little")
    return np.pad(mask, (0, -len(mask) % (STRIP // 8)))


def positions_of(mask: Tensor) -> Tensor:
    """The positions whose bits are set, int64, on the device of the mask."""
    bits = mask[:, None] >> torch.arange(8, device=mask.device, dtype=torch.uint8) & 1
    return bits.view(-1).nonzero()[:, 0]


def keys_of(scores: NDArray[Any]) -> NDArray[np.int64]:
    """`keys` of float32 or float64 scores, as int64."""
    found: NDArray[np.int64] = keys(torch.from_numpy(scores), magnitude=False).to(torch.int64).numpy()
    return found


class Piece(NamedTuple):
    """What one task has in one segment."""

    mask: NDArray[np.uint8]
    values: NDArray[np.float32]
    scores: NDArray[Any] | None


class Writer:
    """Gathers the basis of one chunk, block by block, and saves it."""

    def __init__(self) -> None:
        self._segments: list[Segment] = []
        # Of each (segment, task) the parts that the blocks gave: which elements are kept, their values and their scores.
        self._kept: list[list[NDArray[np.bool_]]] = []
        self._values: list[list[NDArray[np.float32]]] = []
        self._scores: list[list[NDArray[Any]]] = []
        # Of a task the bins of its scores (`_count`), and how many are in each.
        self._histogram: dict[int, tuple[NDArray[np.int64], NDArray[np.int64]]] = {}

    def add(
        self, segment: Segment, values_NB: NDArray[np.float32], kept_NB: NDArray[np.bool_], scores_NB: NDArray[Any] | None
    ) -> None:
        """The entries of all tasks in a segment: `values` (and `scores`) [N, B] where `kept`. One that goes on where the last ended
        joins it."""
        n = len(values_NB)
        last = self._segments[-1] if self._segments else None
        if last is not None and (last.tensor, last.stop) == (segment.tensor, segment.start):
            self._segments[-1] = Segment(last.tensor, last.start, segment.stop)
        else:
            self._segments.append(segment)
            for parts in (self._kept, self._values, self._scores):
                parts += [[] for _ in range(n)]
        for i, kept_B in enumerate(kept_NB):
            self._kept[i - n].append(kept_B.copy())
            self._values[i - n].append(values_NB[i, kept_B])
            if scores_NB is not None:
                self._scores[i - n].append(scores := scores_NB[i, kept_B])
                if len(scores):
                    self._count(i, keys_of(scores) >> SAMPLE_SHIFT[8 * scores.itemsize])

    def _count(self, task: int, bins: NDArray[np.int64]) -> None:
        lowest = int(bins.min())
        counts = np.bincount(bins - lowest)
        new = np.flatnonzero(counts)
        old_bins, old_counts = self._histogram.get(task, (new[:0], counts[:0]))
        self._histogram[task] = add_up(np.concatenate([old_bins, new + lowest]), np.concatenate([old_counts, counts[new]]))

    def arrays(self) -> dict[str, NDArray[Any]]:
        """What was gathered, by name."""
        entries = [sum(map(len, parts)) for parts in self._values]
        masks = [mask_of(np.concatenate(parts)) for parts in self._kept]
        self._kept = []  # each array is let go once it has its place
        bounds = np.cumsum([[0, 0], *zip(map(len, masks), entries, strict=True)], axis=0, dtype=np.int64)
        arrays = {"starts": bounds, "segments": np.array([(s.tensor, s.start, s.stop) for s in self._segments])}
        if any(self._scores):
            arrays["histogram"] = np.concatenate(
                [np.empty((0, 3), dtype=np.int64)]
                + [np.stack([np.full(len(bins), i), bins, counts], axis=1) for i, (bins, counts) in sorted(self._histogram.items())]
            )
            arrays["scores"], self._scores = _joined(self._scores), []
        arrays["values"], self._values = _joined(self._values), []
        arrays["masks"] = np.concatenate(masks)
        return arrays


def build_volume(owner: Owner, volume: int, known: Known, scored: Scored | None, file: str, tries: int = FILE_TRIES) -> Written:
    """Gather the basis of a volume's chunks, and write the file, which is there, durably, when it is whole. Raises OSError.

    The file holds the chunks' arrays one after another; then, as JSON, dtype, shape and first byte of each; then the first byte
    of that text. What a store calls it tells later whether it is still this one."""
    names = {np.dtype(kind): name for name, kind in ARRAYS.items()}
    digest, at, index = xxhash.xxh3_128(), 0, list[dict[str, Any]]()
    of_inputs = [CellDigests() for _ in range(owner.plan.N + 1)]
    try:
        with owner.store.whole(file, volume_bytes(owner.plan, scored is not None)) as target:

            def put(data: Any) -> int:
                target.write(data)
                digest.update(data)
                return memoryview(data).nbytes

            for chunk in owner.chunks_ahead(chunks_of_volume(owner.plan, volume)):
                of_chunk = {}
                for name, array in _gather(owner, chunk, known, scored, of_inputs).items():
                    of_chunk[name] = (names[array.dtype], array.shape, at)
                    at += put(np.ascontiguousarray(array))
                    at += put(bytes(-at % ALIGNMENT))
                index.append(of_chunk)
            size = at + put(json.dumps(index).encode())
            size += put(np.array([at], dtype=np.int64))
    except CutOff:
        if tries == 1:
            raise
        return build_volume(owner, volume, known, scored, file, tries - 1)
    tag = ""
    if is_remote(file):
        stamp = owner.store.stamp(file)
        if stamp.size != size:
            raise RunError(
                f"{file}: wanted {size} bytes, as they were sent, found {stamp.size}. Fix: let nothing else write there."
            )
        tag = stamp.tag
    return Written(digest.intdigest(), tuple(one.total() for one in of_inputs), tag=tag)


def _gather(
    owner: Owner, chunk: int, known: Known, scored: Scored | None, of_inputs: Sequence[CellDigests]
) -> dict[str, NDArray[Any]]:
    writer = Writer()
    for segments in owner.blocks(chunk):
        loaded = owner.load(segments, of_inputs)
        if scored is not None:
            values_NB, scores_NB, kept_NB = owner.kernel.scored(loaded, scored, known)
            scores = scores_NB.cpu().numpy()
        else:
            values_NB, finite = owner.kernel.basis(loaded, known)
            if not finite:
                owner.refuse_non_finite(segments, "the basis")
            scores, kept_NB = None, values_NB != 0.0
        values, kept, at = values_NB.cpu().numpy(), kept_NB.cpu().numpy(), 0
        for segment in segments:
            part = np.s_[:, at : at + segment.stop - segment.start]
            writer.add(segment, values[part], kept[part], None if scores is None else scores[part])
            at += segment.stop - segment.start
    return writer.arrays()


def _joined(parts: Iterable[Sequence[NDArray[Any]]]) -> NDArray[Any]:
    """All in order, and room for C to read beyond them."""
    arrays = [array for of_task in parts for array in of_task]
    return np.concatenate([*arrays, np.zeros(PADDING, dtype=arrays[0].dtype)])


@functools.cache
def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int64]
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    return libc


class _Mapped:
    """A file's bytes for numpy, read-only, shared with all who map it, until no array needs them.

    Python's own map would hold a descriptor for each volume too, and a search may have several variants."""

    def __init__(self, path: str) -> None:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            self._size = os.fstat(descriptor).st_size
            self._address = _libc().mmap(None, self._size, mmap.PROT_READ, mmap.MAP_SHARED, descriptor, 0)
        finally:
            os.close(descriptor)
        if self._address == ctypes.c_void_p(-1).value:
            self._size, code = 0, ctypes.get_errno()
            raise OSError(code, os.strerror(code), path)
        self.__array_interface__ = {"shape": (self._size,), "typestr": "|u1", "data": (self._address, True), "version": 3}
        self._unmap = _libc().munmap

    def __del__(self) -> None:
        if getattr(self, "_size", 0):
            self._unmap(self._address, self._size)


def _open_volume(path: str, n: int) -> list[_Chunk]:
    """The chunks of a volume, mapped."""
    mapped = np.asarray(_Mapped(path))
    (at,) = np.frombuffer(mapped[-8:].tobytes(), dtype=np.int64).tolist()
    return [_Chunk(mapped, of_chunk, n) for of_chunk in json.loads(mapped[at:-8].tobytes())]


class _Chunk:
    """The arrays of one chunk; the pieces of N tasks in each segment."""

    def __init__(self, mapped: NDArray[np.uint8], index: Mapping[str, tuple[str, Sequence[int], int]], n: int) -> None:
        arrays: dict[str, NDArray[Any]] = {}
        for name, (dtype, shape, start) in index.items():
            stop = start + math.prod(shape) * np.dtype(ARRAYS[dtype]).itemsize
            arrays[name] = mapped[start:stop].view(ARRAYS[dtype]).reshape(shape)
        self.nbytes, self.n = sum(array.nbytes for array in arrays.values()), n
        self.segments = [Segment(*row) for row in arrays["segments"].tolist()]
        self.masks, self.values, self.scores = arrays["masks"], arrays["values"], arrays.get("scores")
        self.starts, self.histogram = arrays["starts"], arrays.get("histogram")
        self.entries = int(self.starts[-1, 1])
        # Where C finds the pieces: _Sparse of each (segment, task).
        self._addresses = np.zeros((len(self.starts) - 1, 3), dtype=np.uintp)
        for column, array in enumerate([self.masks, self.values, self.scores]):
            if array is not None:
                offsets = self.starts[:-1, min(column, 1)] * array.itemsize
                self._addresses[:, column] = array.ctypes.data + offsets.astype(np.uintp)

    def in_c(self, number: int) -> NDArray[np.uintp]:
        """Of segment `number`, an array of `struct Sparse`, one per task, that C may change."""
        return self._addresses[number * self.n : (number + 1) * self.n].copy()

    def piece(self, number: int, task: int) -> Piece:
        (m, e), (m_stop, e_stop) = self.starts[number * self.n + task : number * self.n + task + 2].tolist()
        return Piece(self.masks[m:m_stop], self.values[e:e_stop], None if self.scores is None else self.scores[e:e_stop])

    def scores_between(self, task: int, low: float, high: float) -> NDArray[Any]:
        """The scores of a task from low to high, both included."""
        scores = [self.piece(number, task).scores for number in range(len(self.segments))]
        return np.concatenate([x[(x >= low) & (x <= high)] for x in scores if x is not None])

    def counts_between(self, task: int, low: int, width: int, shift: int, bits: int) -> NDArray[np.int64]:
        """How many scores of a task have each value of their keys' bits from `shift` on, among the 2^width keys from `low` on."""
        first, last = value_of_key(low, bits), value_of_key(low + (1 << width) - 1, bits)
        bins = keys_of(self.scores_between(task, first, last)) - low >> shift
        return np.bincount(bins, minlength=1 << width - shift)


def _bin_of(counts: NDArray[np.int64], rank: int) -> tuple[int, int]:
    """The bin that holds the rank-th largest of what was counted, and its rank in there, both from 1 for the largest."""
    at_least = np.cumsum(counts[::-1])
    above = int(np.searchsorted(at_least, rank))
    return len(counts) - 1 - above, rank - int(at_least[above - 1] if above else 0)


def copy_input(plan: Plan, source: int, parameters: Mapping[str, Tensor], store: Store, path: Callable[[str], str] = str) -> None:
    """Write the base (0) or a model (1..N) as its files hold it into `parameters`, in place, each in its own dtype. `path` says
    where a file of the base lies here."""
    reader = Reader(store, COPIED_AT_ONCE, plan.dtypes_of(source), torch.device("cpu"))
    for tensor in plan.tensors:
        held = tensor.sources[source]
        if held is not None and tensor.name in parameters:
            held = held if source else dataclasses.replace(held, file=path(held.file))
            store.expect([Range(held.file, held.start, held.stop)])
            parameter = parameters[tensor.name].detach()
            whole = torch.empty(tensor.numel, dtype=DTYPES[held.dtype])
            for start in range(0, tensor.numel, COPIED_AT_ONCE):
                stop = min(start + COPIED_AT_ONCE, tensor.numel)
                whole[start:stop] = reader.block([Wanted(held, start, stop, cell=-1)])
            parameter.copy_(whole.view(parameter.shape))
    store.expect(())


class Basis:
    """The basis in `folder`, made for `plan`'s inputs and what was `known` of them; read-only, and shared with all who map it on
    this machine. `path` says where a file, of it and of the base, lies here."""

    def __init__(self, plan: Plan, folder: str, known: Known, path: Callable[[str], str] = str) -> None:
        self.plan, self.made_for = plan, known
        volumes = (path(volume_file(folder, volume)) for volume in range(volumes_of(plan)))
        self._chunks = [chunk for volume in volumes for chunk in _open_volume(volume, plan.N)]
        self.entries = sum(c.entries for c in self._chunks)
        self.nbytes = sum(c.nbytes for c in self._chunks)
        self.scored = self._chunks[0].scores is not None
        if any((c.scores is not None) != self.scored for c in self._chunks):
            raise RunError(f"{folder}: wanted files of one basis, found two kinds. Fix: start afresh with --overwrite.")
        self._base = {
            file: np.memmap(path(file), dtype=np.uint8, mode="r")
            for file in {t.sources[0].file for t in plan.tensors if t.sources[0] is not None}
        }
        self._known: dict[float, Known] = {}

    def known(self, density: float | None, *, threads: int = 1) -> Known:
        """What is known with this density for all tasks, at most the one that this (scored) basis was made for; None: that one.

        Exact: the drop threshold of a smaller density is the element of the same rank among the kept scores."""
        if density is None:
            return self.made_for
        if density not in self._known:
            scored, D = self._scored, self.plan.D
            of_model = ({**own, scored.share: density} for own in self.plan.settings.of_model)
            kept = [D - self._place(D, own) for own in of_model]  # the threshold is the kept-th largest score
            with ThreadPoolExecutor(threads) as pool:
                found = tuple(self._largest(i, rank, pool) for i, rank in enumerate(kept))
            self._known[density] = {**self.made_for, scored.threshold: found}
        return self._known[density]

    @property
    def _scored(self) -> Scored:
        scored = self.plan.method.scored
        if scored is None or not self.scored:
            raise ValueError(f"a basis of one density: it holds no scores of {self.plan.method.full_name}")
        return scored

    @property
    def _place(self) -> Callable[[int, Mapping[str, Any]], int]:
        """The rank of the threshold."""
        threshold = self._scored.threshold
        return next(p.places[threshold] for p in self.plan.method.passes if isinstance(p, Ranks) and threshold in p.places)

    @functools.cached_property
    def _histograms(self) -> NDArray[np.int64]:
        """How many scores of each task have each value of their keys' upper bits, all chunks together; the lowest key first."""
        half = 1 << (self._score_bits - 1 - SAMPLE_SHIFT[self._score_bits])
        counts = np.zeros((self.plan.N, 2 * half), dtype=np.int64)
        for chunk in self._chunks:
            if chunk.histogram is None:
                raise ValueError("a basis of one density: it holds no scores")
            task, upper, count = chunk.histogram.T
            np.add.at(counts, (task, upper + half), count)
        return counts

    @property
    def _score_bits(self) -> int:
        return self._scored.scores.bits

    def _largest(self, task: int, rank: int, pool: ThreadPoolExecutor) -> float:
        """The rank-th largest score of a task; the threshold this was made for if fewer lie above it (they are tied with it)."""
        counts, bits = self._histograms[task], self._score_bits
        if rank > counts.sum():
            return self.made_for[self._scored.threshold][task]
        shift = SAMPLE_SHIFT[bits]
        low = -(len(counts) // 2) << shift  # a key, as all below
        while True:
            at, rank = _bin_of(counts, rank)
            low += at << shift
            if counts[at] <= GATHERED or shift == 0:
                break
            # Scores of `paper` in a large model may nearly all agree in their upper bits.
            width, shift = shift, max(0, shift - NARROWING_BITS)
            count = functools.partial(_Chunk.counts_between, task=task, low=low, width=width, shift=shift, bits=bits)
            counts = sum(pool.map(count, self._chunks), np.zeros(1 << width - shift, dtype=np.int64))
        if shift == 0:
            return value_of_key(low, bits)
        first, last = value_of_key(low, bits), value_of_key(low + (1 << shift) - 1, bits)
        scores = np.concatenate(list(pool.map(lambda chunk: chunk.scores_between(task, first, last), self._chunks)))
        return float(np.partition(scores, len(scores) - rank)[len(scores) - rank]) + 0.0  # -0 is 0

    def apply(
        self,
        parameters: Mapping[str, Tensor],
        lambdas: Sequence[Sequence[float]],
        lambda_: float,
        known: Known | None = None,
        *,
        threads: int = 1,
    ) -> None:
        """Write the merge into `parameters` (name -> tensor of the merged tensor's shape), in place, as its output would hold it.

        lambdas: for each of the plan's tensors its lambda_i [N]. known: of a scored basis, what `known` returned.
        The arithmetic is float32, rounded once to the output's dtype, also for wider parameters; and again for narrower ones.
        Tensors that `parameters` lacks are passed over."""
        known = known or self.made_for
        flat: dict[int, Tensor] = {}
        apart: list[tuple[Tensor, Tensor]] = []
        for index, tensor in enumerate(self.plan.tensors):
            if tensor.name in parameters:
                parameter = parameters[tensor.name].detach()
                whole = (
                    parameter
                    if parameter.is_contiguous()
                    else torch.empty(parameter.shape, dtype=parameter.dtype, device=parameter.device)
                )
                flat[index] = whole.view(-1)
                if whole is not parameter:
                    apart.append((parameter, whole))
        work = [(c, k, s) for c in self._chunks for k, s in enumerate(c.segments) if s.tensor in flat]
        update = functools.partial(self._update, flat, lambdas, lambda_, self._in_c(known), known)

        def update_all(part: Sequence[tuple[_Chunk, int, Segment]]) -> None:
            for one in part:
                update(*one)

        if threads > 1:  # in parts of some pieces each: to hand one over takes as long as a small piece
            with ThreadPoolExecutor(threads) as pool:
                for _ in pool.map(update_all, [work[k :: 2 * threads] for k in range(2 * threads)]):
                    pass
        else:
            update_all(work)
        for parameter, whole in apart:
            parameter.copy_(whole)

    def _in_c(self, known: Known) -> KnownInC | None:
        """What C must know of a scored basis."""
        return KnownInC(self.plan.method, known, self.plan.settings) if self.scored else None

    def _update(
        self,
        flat: Mapping[int, Tensor],
        lambdas: Sequence[Sequence[float]],
        lambda_: float,
        in_c: KnownInC | None,
        known: Known,
        chunk: _Chunk,
        number: int,
        segment: Segment,
    ) -> None:
        out_B, (base_B, base_dtype) = flat[segment.tensor][segment.start : segment.stop], self._base_of(segment)
        weights = np.array(lambdas[segment.tensor], dtype=np.float32)
        in_native = self.plan.method.native
        native = load_native() if out_B.device.type == "cpu" and (in_c is None or in_native is not None) else None
        written = DTYPES[self.plan.tensors[segment.tensor].slot.dtype]  # a candidate is what its merge would be
        way = WAYS.get((written, out_B.dtype))
        if native is None or way is None or base_dtype not in (torch.float32, torch.bfloat16):
            theta_B = torch.from_numpy(base_B.copy()).view(base_dtype).to(out_B.device).float()  # the narrow type travels
            pieces = [chunk.piece(number, task) for task in range(self.plan.N)]
            out_B.copy_(self._updated(theta_B, pieces, weights, lambda_, known).to(written))
            return
        tasks = chunk.in_c(number)
        native.pcb_apply(
            base_B.ctypes.data,
            base_dtype == torch.bfloat16,
            len(out_B),
            tasks.ctypes.data,
            len(tasks),
            weights.ctypes.data,
            lambda_,
            None if in_c is None else in_c.pointer,
            self.scored and self._score_bits == 64,
            0.0 if in_native is None else in_native.floor,
            way,
            out_B.data_ptr(),
        )

    def _base_of(self, segment: Segment) -> tuple[NDArray[np.uint8], torch.dtype]:
        """The bytes of the base where they are mapped, and their dtype."""
        tensor = self.plan.tensors[segment.tensor].sources[0]
        if tensor is None:
            raise ValueError(f"{self.plan.method.full_name} has no base to be searched from")
        itemsize = DTYPE_BYTES[tensor.dtype]
        start, stop = tensor.start + segment.start * itemsize, tensor.start + segment.stop * itemsize
        raw = np.asarray(self._base[tensor.file][start:stop])
        if len(raw) != stop - start:
            raise RunError(
                f"{tensor.file}: wanted {stop} bytes or more, found its end: it was changed during the search. "
                "Fix: let nothing write to the models while they are searched, and start afresh."
            )
        return raw if raw.ctypes.data % itemsize == 0 else raw.copy(), DTYPES[tensor.dtype]

    def _updated(
        self, theta_B: Tensor, pieces: Sequence[Piece], weights: NDArray[np.float32], lambda_: float, known: Known
    ) -> Tensor:
        """What _native.c computes, in torch and on any device: the specification."""
        device, size = theta_B.device, len(theta_B)
        dense = torch.zeros(len(pieces), size, device=device)
        double = self.scored and self._score_bits == 64
        scores = torch.full((len(pieces), size), -torch.inf, device=device, dtype=torch.float64 if double else None)
        for i, piece in enumerate(pieces):
            at = positions_of(torch.tensor(piece.mask, device=device))
            dense[i, at] = torch.tensor(piece.values, device=device)
            if piece.scores is not None:
                scores[i, at] = torch.tensor(piece.scores, device=device)
        if self.scored:
            return self._scored.combine(theta_B, dense, scores, known, weights.tolist(), lambda_)
        sum_B = torch.zeros_like(theta_B)
        for x_B, weight in zip(dense, torch.from_numpy(weights).to(device), strict=True):
            sum_B.add_(x_B * weight)
        return torch.where(sum_B != 0.0, (sum_B * lambda_).add_(theta_B), theta_B)
