"""The Basis: what remains of N models once their thresholds are known, sparse, in files that the workers of a node map and share.

The merge is linear in the coefficients (pcb.combine):

    theta_m = theta_pre + lambda sum_i lambda_i C_i        C_i = scale_i tauc_i / max(sum_j scale_j, floor)

and C_i is 0 wherever task i keeps nothing: a share r of the model. So a candidate of a search costs one pass over the base and over
r N D entries in memory; no model is read again. A basis holds one of two things for each element that a task keeps:

    combined   C_i: 4 bytes. One mask ratio.
    scored     tauc_i and beta_i: 8 bytes (`paper`: 12). Any mask ratio up to the one it was made for: the threshold of each is an exact
               order statistic of the betas that are here, and the candidate has the bytes of the merge.

Positions take about one byte each, as gaps. A chunk of the plan has a file of its own, written aside and renamed: it is there when it is whole.
"""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pcb_ray import kernels, pcb
from pcb_ray.answers import SAMPLE_SHIFT, Thresholds, value_of_key
from pcb_ray.checkpoint import DTYPE_BYTES, read_header
from pcb_ray.errors import RunError
from pcb_ray.plan import Plan, Segment

SKIP = 255  # in `gaps`: so many elements without an entry
ARRAYS = {"U8": np.uint8, "I64": np.int64, "F32": np.float32, "F64": np.float64}


def gaps_of(positions: NDArray[np.int64]) -> NDArray[np.uint8]:
    """Ascending positions as bytes: g < 255 moves on by g + 1 and is an entry, 255 moves on by 255 and is none."""
    gaps = np.diff(positions, prepend=-1) - 1
    skips = gaps // SKIP
    result = np.full(len(gaps) + int(skips.sum()), SKIP, dtype=np.uint8)
    result[np.cumsum(skips + 1) - 1] = gaps % SKIP
    return result


def positions_of(gaps: Tensor) -> Tensor:
    """The positions that `gaps_of` encoded, int64, on the device of `gaps`."""
    is_entry = gaps != SKIP
    return (torch.cumsum(gaps.long() + is_entry, 0) - 1)[is_entry]


def keys_of(scores: NDArray[Any]) -> NDArray[np.int64]:
    """`kernels.keys` of float32 or float64 scores, as int64."""
    signed, largest = (np.int32, 0x7FFFFFFF) if scores.itemsize == 4 else (np.int64, 0x7FFFFFFFFFFFFFFF)
    bits = scores.view(signed).astype(np.int64)
    keys: NDArray[np.int64] = np.where(bits >= 0, bits, -(bits & largest))
    return keys


class Piece(NamedTuple):
    """What one task has in one segment."""

    gaps: NDArray[np.uint8]
    values: NDArray[np.float32]
    scores: NDArray[Any] | None


class Writer:
    """Gathers the basis of one chunk, segment by segment, and saves it."""

    def __init__(self) -> None:
        self._segments: list[Segment] = []
        self._pieces: list[Piece] = []

    def add(
        self, segment: Segment, values_NB: NDArray[np.float32], kept_NB: NDArray[np.bool_], scores_NB: NDArray[Any] | None
    ) -> None:
        """The entries of all tasks in a segment: `values` (and `scores`) [N, B] where `kept`."""
        self._segments.append(segment)
        for i, kept_B in enumerate(kept_NB):
            at = np.flatnonzero(kept_B)
            self._pieces.append(Piece(gaps_of(at), values_NB[i, at], None if scores_NB is None else scores_NB[i, at]))

    def save(self, path: Path, n: int) -> int:
        """Write the file aside, make it durable, give it its name; its entries. Raises OSError."""
        from safetensors.numpy import save_file

        gaps, values = (np.concatenate([p[k] for p in self._pieces]) for k in (0, 1))
        starts = np.cumsum([[0, 0]] + [[len(p.gaps), len(p.values)] for p in self._pieces], axis=0, dtype=np.int64)
        arrays = {
            "gaps": gaps,
            "values": values,
            "starts": starts,
            "segments": np.array([(s.tensor, s.start, s.stop) for s in self._segments]),
        }
        if self._pieces[0].scores is not None:
            scores = [[p.scores for p in self._pieces[i::n] if p.scores is not None] for i in range(n)]
            arrays["scores"] = np.concatenate([p.scores for p in self._pieces if p.scores is not None])
            shift = SAMPLE_SHIFT[8 * arrays["scores"].itemsize]
            binned = [np.unique(keys_of(np.concatenate(of_task)) >> shift, return_counts=True) for of_task in scores]
            tasks = [np.full(len(bins), i) for i, (bins, _) in enumerate(binned)]
            arrays["histogram"] = np.concatenate([np.stack([t, *b], axis=1) for t, b in zip(tasks, binned, strict=True)]).astype(
                np.int64
            )
        aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            save_file(arrays, aside)
            with open(aside, "rb") as file:
                os.fsync(file.fileno())
            os.replace(aside, path)
        except BaseException:
            aside.unlink(missing_ok=True)
            raise
        return len(values)


def chunk_file(folder: str | os.PathLike[str], chunk: int) -> Path:
    return Path(folder) / f"{chunk:06d}.safetensors"


class _Sparse(ctypes.Structure):
    """struct Sparse of _native.c."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("gaps", "values", "scores")),
        *((name, ctypes.c_int64) for name in ("left", "next")),
    )


class _Chunk:
    """The arrays of one chunk's file, mapped."""

    def __init__(self, path: Path) -> None:
        tensors, _, _ = read_header(path)
        mapped = np.memmap(path, dtype=np.uint8, mode="r")
        arrays: dict[str, NDArray[Any]] = {
            name: np.asarray(mapped[t.start : t.stop]).view(ARRAYS[t.dtype]).reshape(t.shape) for name, t in tensors.items()
        }
        self.segments = [Segment(*row) for row in arrays["segments"].tolist()]
        self.gaps, self.values, self.starts = arrays["gaps"], arrays["values"], arrays["starts"].tolist()
        self.scores, self.histogram = arrays.get("scores"), arrays.get("histogram")
        self.nbytes = mapped.nbytes

    def pieces(self, number: int, n: int) -> Iterator[Piece]:
        """What each of n tasks has in segment `number`."""
        for k in range(number * n, (number + 1) * n):
            (g, e), (g_stop, e_stop) = self.starts[k], self.starts[k + 1]
            yield Piece(self.gaps[g:g_stop], self.values[e:e_stop], None if self.scores is None else self.scores[e:e_stop])

    def scores_of(self, task: int, n: int) -> Iterator[NDArray[Any]]:
        for number in range(len(self.segments)):
            (_, e), (_, e_stop) = self.starts[number * n + task], self.starts[number * n + task + 1]
            assert self.scores is not None
            yield self.scores[e:e_stop]


class Basis:
    """The basis in `folder`, made for `plan`'s inputs and `thresholds`; read-only, and shared with all who map it on this machine."""

    def __init__(self, plan: Plan, folder: str | os.PathLike[str], thresholds: Thresholds) -> None:
        self.plan, self.made_for = plan, thresholds
        self._chunks = [_Chunk(chunk_file(folder, chunk)) for chunk in range(plan.chunks)]
        self.entries = sum(len(c.values) for c in self._chunks)
        self.nbytes = sum(c.nbytes for c in self._chunks)
        self.scored = self._chunks[0].scores is not None
        self._base = {
            tensor.file: np.memmap(tensor.file, dtype=np.uint8, mode="r") for t in plan.tensors if (tensor := t.sources[0])
        }
        self._thresholds_at = functools.lru_cache(maxsize=64)(self._find_thresholds)

    def thresholds(self, mask_ratio: float | None) -> Thresholds:
        """The thresholds of a mask ratio for all tasks, at most the one that this (scored) basis was made for; None: those it was made for.

        Exact: the drop threshold of a smaller ratio is the element of the same rank among the kept betas."""
        return self.made_for if mask_ratio is None else self._thresholds_at(mask_ratio)

    def _find_thresholds(self, mask_ratio: float) -> Thresholds:
        D = self.plan.D
        kept = D - min(int(D * (1 - mask_ratio)), D - 1)  # the threshold is the kept-th largest score
        return self.made_for.replace(t=tuple(self._largest(i, kept) for i in range(self.plan.N)))

    def _largest(self, task: int, rank: int) -> float:
        """The rank-th largest score of a task; the threshold this was made for if fewer lie above it (they are tied with it)."""
        n, scores = self.plan.N, self._chunks[0].scores
        assert scores is not None, "one mask ratio only: this basis holds no scores"
        bits = 8 * scores.itemsize
        table = np.concatenate([c.histogram[c.histogram[:, 0] == task, 1:] for c in self._chunks if c.histogram is not None])
        bins, where = np.unique(table[:, 0], return_inverse=True)
        above = np.cumsum(np.bincount(where, weights=table[:, 1], minlength=len(bins))[::-1]) if len(bins) else np.zeros(0)
        if not len(above) or rank > above[-1]:
            return self.made_for.t[task]
        at = int(np.searchsorted(above, rank))
        wanted, rank = bins[::-1][at], rank - int(above[at - 1] if at else 0)
        found = [k[k >> SAMPLE_SHIFT[bits] == wanted] for c in self._chunks for x in c.scores_of(task, n) if len(k := keys_of(x))]
        keys = np.concatenate(found)
        return value_of_key(int(np.partition(keys, len(keys) - rank)[len(keys) - rank]), bits)

    def apply(
        self,
        parameters: Mapping[str, Tensor],
        lambdas: Sequence[Sequence[float]],
        lambda_: float,
        thresholds: Thresholds | None = None,
        *,
        threads: int = 1,
    ) -> None:
        """Write the merge into `parameters` (name -> tensor of the merged tensor's shape), in place, each rounded to its own dtype.

        lambdas: for each of the plan's tensors its lambda_i [N]. thresholds: of a scored basis, what `thresholds` returned.
        The arithmetic is float32, one rounding at the end. Tensors that `parameters` lacks are passed over."""
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
        if threads > 1:
            with ThreadPoolExecutor(threads) as pool:
                for _ in pool.map(lambda one: update(*one), work):
                    pass
        else:
            for one in work:
                update(*one)
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
        pieces = list(chunk.pieces(number, self.plan.N))
        weights = np.array(lambdas[segment.tensor], dtype=np.float32)
        native = kernels.load_native() if out_B.device.type == "cpu" else None
        known = (torch.float32, torch.bfloat16)
        if native is None or out_B.dtype not in known or base_dtype not in known:
            theta_B = torch.from_numpy(base_B.copy()).view(base_dtype).to(out_B.device, torch.float32)
            out_B.copy_(self._updated(theta_B, pieces, weights, lambda_, thresholds))
            return
        tasks = (_Sparse * len(pieces))()
        for task, piece in zip(tasks, pieces, strict=True):
            task.gaps, task.values, task.left, task.next = piece.gaps.ctypes.data, piece.values.ctypes.data, len(piece.values), -1
            task.scores = None if piece.scores is None else piece.scores.ctypes.data
        native.pcb_apply(
            *(base_B.ctypes.data, base_dtype == torch.bfloat16, len(out_B), tasks, len(tasks), weights.ctypes.data, lambda_),
            *(None if in_c is None else ctypes.byref(in_c[0]), self._paper, self._floor),
            *(out_B.dtype == torch.bfloat16, out_B.data_ptr()),
        )

    @property
    def _paper(self) -> bool:
        return self.plan.method == "pcb-paper"

    @property
    def _floor(self) -> float:
        return 0.0 if self._paper else pcb.DENOMINATOR_FLOOR

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
            at = positions_of(torch.tensor(piece.gaps, device=device))
            dense[i, at] = torch.tensor(piece.values, device=device)
            if piece.scores is not None:
                scores[i, at] = torch.tensor(piece.scores, device=device)
        if self.scored:
            scale_of = pcb.scale_of_paper if self._paper else pcb.scale_of
            return pcb.combine(theta_B, dense, scale_of(scores, thresholds), weights.tolist(), lambda_, self._floor)
        sum_B = torch.zeros_like(theta_B)
        for x_B, weight in zip(dense, torch.from_numpy(weights).to(device), strict=True):
            sum_B.add_(x_B * weight)
        return torch.where(sum_B != 0.0, (sum_B * lambda_).add_(theta_B), theta_B)
