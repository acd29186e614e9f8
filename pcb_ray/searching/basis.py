"""The Basis: what remains of N models once their thresholds are known, sparse, in files that the workers of a node map and share.

The merge is linear in the coefficients (pcb.combine):

    theta_m = theta_pre + lambda sum_i lambda_i C_i        C_i = scale_i tauc_i / max(sum_j scale_j, floor)

and C_i is 0 wherever task i keeps nothing: a share r of the model. So a candidate of a search costs one pass over the base and over
r N D entries in memory; no model is read again. A basis holds one of two things for each element that a task keeps:

    combined   C_i: 4 bytes. One mask ratio.
    scored     tauc_i and beta_i: 8 bytes (`paper`: 12). Any mask ratio up to the one it was made for: the threshold of each is an exact
               order statistic of the betas that are here, and the candidate has the bytes of the merge.

Where the entries lie is a bit per element and task: 1 / (8 r) bytes each. A chunk of the plan has a file of its own.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import os
import secrets
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray
from torch import Tensor

from pcb_ray import kernels, pcb
from pcb_ray.answers import SAMPLE_SHIFT, Digest, Thresholds, value_of_key
from pcb_ray.errors import RunError
from pcb_ray.files.checkpoint import DTYPE_BYTES, read_header, safetensors_header
from pcb_ray.planning import Plan, Segment
from pcb_ray.selection import add_up

ARRAYS = {"U8": np.uint8, "I64": np.int64, "F32": np.float32, "F64": np.float64}
# How _native.c puts out a value that is written in one dtype and held by a parameter in another; WIDE, NARROW and ROUNDED there.
WAYS = {
    (torch.float32, torch.float32): 0,
    (torch.bfloat16, torch.bfloat16): 1,
    (torch.bfloat16, torch.float32): 2,
}
PADDING = 16  # values beyond the last: _native.c reads them in vectors
# Scores that are brought together to be ranked. Where more agree in their upper bits, they are counted by the next so many bits of their keys.
GATHERED, NARROWING_BITS = 1 << 20, 16


def mask_of(kept: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """A bit for each element, the lowest of a byte first; in whole strips."""
    mask = np.packbits(kept, bitorder="little")
    return np.pad(mask, (0, -len(mask) % (kernels.STRIP // 8)))


def positions_of(mask: Tensor) -> Tensor:
    """The positions whose bits are set, int64, on the device of the mask."""
    bits = mask[:, None] >> torch.arange(8, device=mask.device, dtype=torch.uint8) & 1
    return bits.view(-1).nonzero()[:, 0]


def keys_of(scores: NDArray[Any]) -> NDArray[np.int64]:
    """`kernels.keys` of float32 or float64 scores, as int64."""
    keys: NDArray[np.int64] = kernels.keys(torch.from_numpy(scores), magnitude=False).to(torch.int64).numpy()
    return keys


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
        """The entries of all tasks in a segment: `values` (and `scores`) [N, B] where `kept`. One that goes on where the last ended joins it."""
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

    def save(self, path: Path) -> tuple[int, Digest]:
        """Write the file aside and give it its name; how many entries it has, and its digest. Raises OSError."""
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
        # The widest first: each then lies where its type wants it. C reads masks by 64 bits.
        ordered = sorted(arrays, key=lambda name: -8 if name == "masks" else -arrays[name].itemsize)
        of_dtype = {np.dtype(kind): name for name, kind in ARRAYS.items()}
        header = safetensors_header([(name, of_dtype[arrays[name].dtype], arrays[name].shape) for name in ordered], {})
        digest = xxhash.xxh3_128()
        aside = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
        try:
            with open(aside, "wb") as file:
                data: Any  # what has bytes
                for data in (header, *(np.ascontiguousarray(arrays[name]) for name in ordered)):
                    file.write(data)
                    digest.update(data)
            os.replace(aside, path)
        except BaseException:
            aside.unlink(missing_ok=True)
            raise
        return sum(entries), digest.digest()


def _joined(parts: Iterable[Sequence[NDArray[Any]]]) -> NDArray[Any]:
    """All in order, and room for C to read beyond them."""
    arrays = [array for of_task in parts for array in of_task]
    return np.concatenate([*arrays, np.zeros(PADDING, dtype=arrays[0].dtype)])


def digest_of(data: Any) -> Digest:
    return xxhash.xxh3_128_digest(data)


@functools.cache
def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int64]
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    return libc


class _Mapped:
    """A file's bytes for numpy, read-only, shared with all who map it, until no array needs them. Python's own map would hold a descriptor too,
    and a basis of a large model has thousands of files."""

    def __init__(self, path: Path) -> None:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            self._size = os.fstat(descriptor).st_size
            self._address = _libc().mmap(None, self._size, mmap.PROT_READ, mmap.MAP_SHARED, descriptor, 0)
        finally:
            os.close(descriptor)
        if self._address == ctypes.c_void_p(-1).value:
            self._size, code = 0, ctypes.get_errno()
            raise OSError(code, os.strerror(code), str(path))
        self.__array_interface__ = {"shape": (self._size,), "typestr": "|u1", "data": (self._address, True), "version": 3}
        self._unmap = _libc().munmap

    def __del__(self) -> None:
        if getattr(self, "_size", 0):
            self._unmap(self._address, self._size)


def chunk_file(folder: str | os.PathLike[str], chunk: int) -> Path:
    return Path(folder) / f"{chunk:06d}.safetensors"


class _Chunk:
    """The arrays of one chunk's file, mapped; the pieces of N tasks in each segment."""

    def __init__(self, path: Path, n: int) -> None:
        tensors, _, _ = read_header(path)
        mapped = np.asarray(_Mapped(path))
        arrays: dict[str, NDArray[Any]] = {
            name: np.asarray(mapped[t.start : t.stop]).view(ARRAYS[t.dtype]).reshape(t.shape) for name, t in tensors.items()
        }
        self.nbytes, self.n = mapped.nbytes, n
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


def copy_input(plan: Plan, source: int, parameters: Mapping[str, Tensor]) -> None:
    """Write the base (0) or a model (1..N) as its files hold it into `parameters`, in place, each in its own dtype."""
    for tensor in plan.tensors:
        held = tensor.sources[source]
        if held is not None and tensor.name in parameters:
            parameter = parameters[tensor.name].detach()
            raw = np.fromfile(held.file, dtype=np.uint8, count=held.nbytes, offset=held.start)
            parameter.copy_(torch.from_numpy(raw).view(kernels.DTYPES[held.dtype]).view(parameter.shape))


class Basis:
    """The basis in `folder`, made for `plan`'s inputs and `thresholds`; read-only, and shared with all who map it on this machine."""

    def __init__(self, plan: Plan, folder: str | os.PathLike[str], thresholds: Thresholds) -> None:
        self.plan, self.made_for = plan, thresholds
        self._chunks = [_Chunk(chunk_file(folder, chunk), plan.N) for chunk in range(plan.chunks)]
        self.entries = sum(c.entries for c in self._chunks)
        self.nbytes = sum(c.nbytes for c in self._chunks)
        self.scored = self._chunks[0].scores is not None
        assert all((c.scores is not None) == self.scored for c in self._chunks), f"{folder}: holds files of two kinds of basis"
        self._base = {
            tensor.file: np.memmap(tensor.file, dtype=np.uint8, mode="r") for t in plan.tensors if (tensor := t.sources[0])
        }
        self._known: dict[float, Thresholds] = {}

    def thresholds(self, mask_ratio: float | None, *, threads: int = 1) -> Thresholds:
        """The thresholds of a mask ratio for all tasks, at most the one that this (scored) basis was made for; None: those it was made for.

        Exact: the drop threshold of a smaller ratio is the element of the same rank among the kept betas."""
        if mask_ratio is None:
            return self.made_for
        if mask_ratio not in self._known:
            D = self.plan.D
            kept = D - min(int(D * (1 - mask_ratio)), D - 1)  # the threshold is the kept-th largest score
            with ThreadPoolExecutor(threads) as pool:
                found = tuple(self._largest(i, kept, pool) for i in range(self.plan.N))
            self._known[mask_ratio] = self.made_for.replace(t=found)
        return self._known[mask_ratio]

    @functools.cached_property
    def _histograms(self) -> NDArray[np.int64]:
        """How many scores of each task have each value of their keys' upper bits, all chunks together; the lowest key first."""
        half = 1 << (self._score_bits - 1 - SAMPLE_SHIFT[self._score_bits])
        counts = np.zeros((self.plan.N, 2 * half), dtype=np.int64)
        for chunk in self._chunks:
            assert chunk.histogram is not None, "one mask ratio only: this basis holds no scores"
            task, upper, count = chunk.histogram.T
            np.add.at(counts, (task, upper + half), count)
        return counts

    @property
    def _score_bits(self) -> int:
        return 64 if self._paper else 32

    def _largest(self, task: int, rank: int, pool: ThreadPoolExecutor) -> float:
        """The rank-th largest score of a task; the threshold this was made for if fewer lie above it (they are tied with it)."""
        counts, bits = self._histograms[task], self._score_bits
        if rank > counts.sum():
            return self.made_for.t[task]
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
        thresholds: Thresholds | None = None,
        *,
        threads: int = 1,
    ) -> None:
        """Write the merge into `parameters` (name -> tensor of the merged tensor's shape), in place, as its output would hold it.

        lambdas: for each of the plan's tensors its lambda_i [N]. thresholds: of a scored basis, what `thresholds` returned.
        The arithmetic is float32, rounded once to the output's dtype, also for wider parameters; and again for narrower ones.
        Tensors that `parameters` lacks are passed over."""
        thresholds = thresholds or self.made_for
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
        update = functools.partial(self._update, flat, lambdas, lambda_, self._in_c(thresholds), thresholds)

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

    def _in_c(self, thresholds: Thresholds) -> Any:
        """The thresholds for C (None for a combined basis), with what they point to."""
        return kernels.thresholds_in_c(thresholds, self.plan.N, self.plan.D) if self.scored else None

    def _update(
        self,
        flat: Mapping[int, Tensor],
        lambdas: Sequence[Sequence[float]],
        lambda_: float,
        in_c: Any,
        thresholds: Thresholds,
        chunk: _Chunk,
        number: int,
        segment: Segment,
    ) -> None:
        out_B, (base_B, base_dtype) = flat[segment.tensor][segment.start : segment.stop], self._base_of(segment)
        weights = np.array(lambdas[segment.tensor], dtype=np.float32)
        native = kernels.load_native() if out_B.device.type == "cpu" else None
        written = kernels.DTYPES[self.plan.tensors[segment.tensor].slot.dtype]  # a candidate is what its merge would be
        way = WAYS.get((written, out_B.dtype))
        if native is None or way is None or base_dtype not in (torch.float32, torch.bfloat16):
            theta_B = torch.from_numpy(base_B.copy()).view(base_dtype).to(out_B.device).float()  # the narrow type travels
            pieces = [chunk.piece(number, task) for task in range(self.plan.N)]
            out_B.copy_(self._updated(theta_B, pieces, weights, lambda_, thresholds).to(written))
            return
        tasks = chunk.in_c(number)
        native.pcb_apply(
            *(
                base_B.ctypes.data,
                base_dtype == torch.bfloat16,
                len(out_B),
                tasks.ctypes.data,
                len(tasks),
                weights.ctypes.data,
                lambda_,
            ),
            *(None if in_c is None else ctypes.byref(in_c[0]), self._paper, pcb.floor_of(self.plan.method)),
            *(way, out_B.data_ptr()),
        )

    @property
    def _paper(self) -> bool:
        return self.plan.method == "pcb-paper"

    def _base_of(self, segment: Segment) -> tuple[NDArray[np.uint8], torch.dtype]:
        """The bytes of the base where they are mapped, and their dtype."""
        tensor = self.plan.tensors[segment.tensor].sources[0]
        assert tensor is not None
        itemsize = DTYPE_BYTES[tensor.dtype]
        start, stop = tensor.start + segment.start * itemsize, tensor.start + segment.stop * itemsize
        raw = np.asarray(self._base[tensor.file][start:stop])
        if len(raw) != stop - start:
            raise RunError(f"{tensor.file}: ends before byte {stop}; it was changed during the search")
        return raw if raw.ctypes.data % itemsize == 0 else raw.copy(), kernels.DTYPES[tensor.dtype]

    def _updated(
        self, theta_B: Tensor, pieces: Sequence[Piece], weights: NDArray[np.float32], lambda_: float, thresholds: Thresholds
    ) -> Tensor:
        """What _native.c computes, in torch and on any device: the specification."""
        device, size = theta_B.device, len(theta_B)
        dense = torch.zeros(len(pieces), size, device=device)
        scores = torch.full((len(pieces), size), -torch.inf, device=device, dtype=torch.float64 if self._paper else None)
        for i, piece in enumerate(pieces):
            at = positions_of(torch.tensor(piece.mask, device=device))
            dense[i, at] = torch.tensor(piece.values, device=device)
            if piece.scores is not None:
                scores[i, at] = torch.tensor(piece.scores, device=device)
        if self.scored:
            scale_of = pcb.scale_of_paper if self._paper else pcb.scale_of
            return pcb.combine(
                theta_B, dense, scale_of(scores, thresholds), weights.tolist(), lambda_, pcb.floor_of(self.plan.method)
            )
        sum_B = torch.zeros_like(theta_B)
        for x_B, weight in zip(dense, torch.from_numpy(weights).to(device), strict=True):
            sum_B.add_(x_B * weight)
        return torch.where(sum_B != 0.0, (sum_B * lambda_).add_(theta_B), theta_B)
