"""The arithmetic of a block behind one interface: in torch on any device, or in C on CPUs (`_native.c`), the same bits from both.

A block comes as it was read: `sources`, one tensor [B] of the file's dtype for the base (None: zeros, for `linear`) and for each model.
A kernel is chosen per owner by what its machine offers. Since both round alike, a cluster may mix them; receipts name what was used.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import math
import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pcb_ray import pcb
from pcb_ray.answers import BETA, MAGNITUDE, Thresholds
from pcb_ray.selection import Bracket

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
STRIP = 512  # of _native.c
MAX_NATIVE_PAPER = 700  # tasks up to which exp64 of _native.c needs no care for subnormal numbers
# What is asked of a block, in the order of _native.c.
QUESTIONS = [MAGNITUDE, "pcb-released", "pcb-pairwise", "pcb-paper", "ties", "task_arithmetic", "linear"]

Sources = Sequence[Tensor | None]
# For one bracket the counts (< lo, <= lo, < hi, <= hi) and the keys strictly between.
Counts = tuple[tuple[int, int, int, int], NDArray[Any]]


def keys(x: Tensor, magnitude: bool) -> Tensor:
    """Integers that sort like x (or |x|); -0 and +0 are one key."""
    bits = x.view(torch.int32 if x.dtype == torch.float32 else torch.int64)
    size = bits & (0x7FFFFFFF if x.dtype == torch.float32 else 0x7FFFFFFFFFFFFFFF)
    return size if magnitude else torch.where(bits >= 0, size, -size)


class TorchKernel:
    """The specification: pcb.py on whole blocks, on any device."""

    name = "torch"

    def __init__(self, method: str, n: int, D: int, device: torch.device) -> None:
        self.method, self.n, self.D, self.device = method, n, D, device

    @property
    def key_bits(self) -> int:
        """Bits of the keys of beta."""
        return 64 if self.method == "pcb-paper" else 32

    def load(self, sources: Sources) -> tuple[Tensor, Tensor]:
        """theta [B] and tau [N, B], float32; for `linear` 0 and the models themselves."""
        base, *models = sources
        tau_NB = torch.stack([x.float() for x in models if x is not None])
        theta_B = torch.zeros_like(tau_NB[0]) if base is None else base.float()
        return theta_B, tau_NB.sub_(theta_B)

    def scores(self, sources: Sources, quantity: str, thresholds: Thresholds) -> Tensor:
        """tau or beta [N, B], float32; beta of `paper` in float64 and times D^2."""
        return self._scores(self.load(sources)[1], quantity, thresholds)

    def _scores(self, tau_NB: Tensor, quantity: str, thresholds: Thresholds) -> Tensor:
        if quantity == MAGNITUDE:
            return tau_NB
        if self.method == "pcb-paper":
            return pcb.beta_paper(tau_NB, thresholds, self.D)
        return (pcb.beta_pairwise if self.method == "pcb-pairwise" else pcb.beta_released)(tau_NB, thresholds)

    def count(
        self, sources: Sources, quantity: str, thresholds: Thresholds, brackets: Sequence[Sequence[Bracket]]
    ) -> tuple[list[int], list[list[Counts]]]:
        """For each task the largest key of |tau| or beta, and its counts against each of the task's brackets."""
        magnitude, largest, result = quantity == MAGNITUDE, [], []
        for x_B, of_task in zip(self.scores(sources, quantity, thresholds), brackets, strict=True):
            k_B = keys(x_B, magnitude)
            largest.append(int(k_B.max()))
            result.append([self._count(k_B, bracket) for bracket in of_task])
        return largest, result

    def _count(self, k_B: Tensor, bracket: Bracket) -> Counts:
        below_hi_B, above_lo_B = k_B < bracket.hi, k_B > bracket.lo
        counts = ((k_B < bracket.lo).sum(), len(k_B) - above_lo_B.sum(), below_hi_B.sum(), (k_B <= bracket.hi).sum())
        below_lo, upto_lo, below_hi, upto_hi = torch.stack([torch.as_tensor(c, device=k_B.device) for c in counts]).tolist()
        inside = k_B[above_lo_B & below_hi_B] if below_hi > upto_lo else k_B[:0]
        return (below_lo, upto_lo, below_hi, upto_hi), inside.cpu().numpy()

    def extrema(self, sources: Sources, low: list[float], high: list[float]) -> bool:
        """Widen low and high, one entry per pair i <= j, to hold all tau_i tau_j of this block, exact in float64; whether all tau are finite."""
        _, tau_NB = self.load(sources)
        for p, (i, j) in enumerate(pcb.pairs(self.n)):
            least, most = torch.aminmax(tau_NB[i].double() * tau_NB[j].double())
            low[p], high[p] = min(low[p], least.item()), max(high[p], most.item())
        return bool(torch.isfinite(tau_NB).all())

    def exponentials(self, sources: Sources, thresholds: Thresholds) -> Tensor:
        """The softmax numerators of `paper`: N rows of intra, then one per pair; float64."""
        return torch.cat(pcb.paper_exponentials(self.load(sources)[1], thresholds))

    def merge(
        self, sources: Sources, thresholds: Thresholds, lambdas: Sequence[float], lambda_: float, dtype: torch.dtype
    ) -> tuple[Tensor, bool]:
        """The merged block [B], rounded once to dtype (nearest, ties to even), and whether all of it is finite."""
        theta_B, tau_NB = self.load(sources)
        rounded_B = self._merger(tau_NB, thresholds)(theta_B, lambdas, lambda_).to(dtype)
        return rounded_B, bool(torch.isfinite(rounded_B).all())

    def basis(self, sources: Sources, thresholds: Thresholds) -> tuple[Tensor, bool]:
        """C [N, B], float32: row i is what the merge with the i-th unit vector adds to the base; and whether all of it is finite."""
        theta_B, tau_NB = self.load(sources)
        merged, zero_B = self._merger(tau_NB, thresholds), torch.zeros_like(theta_B)
        C_NB = torch.stack([merged(zero_B, unit, 1.0) for unit in np.eye(self.n).tolist()])
        return C_NB, bool(torch.isfinite(C_NB).all())

    def scored(self, sources: Sources, thresholds: Thresholds) -> tuple[Tensor, Tensor, Tensor]:
        """tauc (for `paper` tau) [N, B], beta [N, B], and where it is kept: of the pcb variants."""
        tau_NB, beta_NB = (self.scores(sources, quantity, thresholds) for quantity in (MAGNITUDE, BETA))
        if self.method == "pcb-paper":
            return tau_NB, beta_NB, beta_NB >= pcb.column(pcb.paper_t(thresholds, self.n), beta_NB)
        return pcb.clip(tau_NB, thresholds)[1], beta_NB, beta_NB > pcb.column(thresholds.t, beta_NB)

    def _merger(self, tau_NB: Tensor, thresholds: Thresholds) -> Callable[[Tensor, Sequence[float], float], Tensor]:
        """The method on this block: a function of theta [B], the lambda_i and lambda."""
        if self.method == "linear":
            return lambda _, lambdas, __: pcb.linear(tau_NB, lambdas)
        if self.method == "task_arithmetic":
            return lambda theta_B, lambdas, lambda_: pcb.task_arithmetic(theta_B, tau_NB, lambdas, lambda_)
        if self.method == "ties":
            return lambda theta_B, lambdas, lambda_: pcb.ties(theta_B, tau_NB, thresholds, lambdas, lambda_)
        beta_NB = self._scores(tau_NB, self.method, thresholds)
        if self.method == "pcb-paper":
            x_NB, scale_NB = tau_NB, pcb.scale_of_paper(beta_NB, thresholds)
        else:
            x_NB, scale_NB = pcb.clip(tau_NB, thresholds)[1], pcb.scale_of(beta_NB, thresholds)
        return lambda theta_B, lambdas, lambda_: pcb.combine(theta_B, x_NB, scale_NB, lambdas, lambda_, pcb.floor_of(self.method))


class _Block(ctypes.Structure):
    """struct Block of _native.c."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("n", "size")),
        *((name, ctypes.c_void_p) for name in ("data", "bfloat16", "scratch")),
    )


_THRESHOLDS = ("low", "high", "range", "t", "span", "paper_t", "pair_low", "pair_range", "intra_factor", "pair_factor")


class _Thresholds(ctypes.Structure):
    """struct Thresholds of _native.c."""

    _fields_ = tuple((name, ctypes.c_void_p) for name in _THRESHOLDS)


# struct Bracket of _native.c
_BRACKET = np.dtype([("lo", "i8"), ("hi", "i8"), ("counts", "i8", 4), ("inside", "u8"), ("found", "i8")])


def thresholds_in_c(thresholds: Thresholds, n: int, D: int) -> tuple[_Thresholds, list[NDArray[Any] | None]]:
    """The thresholds as _native.c takes them, and the arrays that it points to."""
    arrays = _arrays_of(thresholds, n, D)
    return _Thresholds(*(None if a is None else a.ctypes.data for a in arrays)), arrays


class NativeKernel(TorchKernel):
    """The same on CPUs in C, strip by strip. What it returns is valid until the next call."""

    name = "native"

    def __init__(self, method: str, n: int, D: int, device: torch.device) -> None:
        super().__init__(method, n, D, device)
        self._library = load_native()
        self._question = QUESTIONS.index(method)
        # Buffers that are made once: the system hands out and takes back memory of this size page by page.
        self._scratch = torch.empty((3 * n + 1) * STRIP)
        self._data, self._bfloat16 = (ctypes.c_void_p * (n + 1))(), (ctypes.c_int64 * (n + 1))()
        self._block = _Block(n, 0, *(ctypes.addressof(a) for a in (self._data, self._bfloat16)), self._scratch.data_ptr())
        self._inside: NDArray[Any] = np.empty(0)
        self._rounded = torch.empty(0)
        self._known: tuple[Thresholds | None, _Thresholds, list[NDArray[Any] | None]] = (None, _Thresholds(), [])

    def _in_c(self, sources: Sources) -> Any:
        """The block for C, which reads float32 and bfloat16."""
        # Kept, so that what was converted outlives the call.
        self._kept = [x if x is None or x.dtype in (torch.float32, torch.bfloat16) else x.float() for x in sources]
        for k, x in enumerate(self._kept):
            self._data[k] = None if x is None else x.data_ptr()
            self._bfloat16[k] = x is not None and x.dtype == torch.bfloat16
        self._block.size = next(len(x) for x in reversed(self._kept) if x is not None)
        return ctypes.byref(self._block)

    def _thresholds_in_c(self, thresholds: Thresholds) -> Any:
        if self._known[0] is not thresholds:
            self._known = thresholds, *thresholds_in_c(thresholds, self.n, self.D)
        return ctypes.byref(self._known[1])

    def scores(self, sources: Sources, quantity: str, thresholds: Thresholds) -> Tensor:
        block = self._in_c(sources)
        question = 0 if quantity == MAGNITUDE else self._question
        dtype = torch.float64 if question and self.method == "pcb-paper" else torch.float32
        out_NB = torch.empty(self.n, self._block.size, dtype=dtype)
        self._library.pcb_scores(block, self._thresholds_in_c(thresholds), question, out_NB.data_ptr())
        return out_NB

    def count(
        self, sources: Sources, quantity: str, thresholds: Thresholds, brackets: Sequence[Sequence[Bracket]]
    ) -> tuple[list[int], list[list[Counts]]]:
        block = self._in_c(sources)
        question, size, each = 0 if quantity == MAGNITUDE else self._question, self._block.size, max(map(len, brackets))
        key = np.int64 if question and self.method == "pcb-paper" else np.int32
        if self._inside.dtype != key or self._inside.size < self.n * each * size:
            self._inside = np.empty(self.n * each * size, dtype=key)
        inside = self._inside[: self.n * each * size].reshape(self.n, each, size)
        asked = np.zeros((self.n, each), dtype=_BRACKET)
        for i, of_task in enumerate(brackets):
            asked["lo"][i, : len(of_task)] = [b.lo for b in of_task]
            asked["hi"][i, : len(of_task)] = [b.hi for b in of_task]
        asked["inside"] = self._inside.ctypes.data + size * self._inside.itemsize * np.arange(self.n * each).reshape(self.n, each)
        largest = np.full(self.n, -(1 << 63))
        self._library.pcb_count(block, self._thresholds_in_c(thresholds), question, asked.ctypes.data, each, largest.ctypes.data)
        counts, found = asked["counts"].tolist(), asked["found"].tolist()
        return largest.tolist(), [
            [(tuple(counts[i][e]), inside[i, e, : found[i][e]].copy()) for e in range(len(of_task))]
            for i, of_task in enumerate(brackets)
        ]

    def extrema(self, sources: Sources, low: list[float], high: list[float]) -> bool:
        block = self._in_c(sources)
        least, most = np.array(low), np.array(high)
        infinite = self._library.pcb_extrema(block, least.ctypes.data, most.ctypes.data)
        low[:], high[:] = least.tolist(), most.tolist()
        return not infinite

    def exponentials(self, sources: Sources, thresholds: Thresholds) -> Tensor:
        block = self._in_c(sources)
        out = torch.empty(self.n * (self.n + 3) // 2, self._block.size, dtype=torch.float64)
        self._library.pcb_paper_exponentials(block, self._thresholds_in_c(thresholds), out.data_ptr())
        return out

    def merge(
        self, sources: Sources, thresholds: Thresholds, lambdas: Sequence[float], lambda_: float, dtype: torch.dtype
    ) -> tuple[Tensor, bool]:
        block = self._in_c(sources)
        size, bfloat16 = self._block.size, dtype == torch.bfloat16
        if self._rounded.numel() < size or (self._rounded.dtype == torch.bfloat16) != bfloat16:
            self._rounded = torch.empty(size, dtype=torch.bfloat16 if bfloat16 else torch.float32)
        rounded_B, weights_N = self._rounded[:size], torch.tensor(lambdas, dtype=torch.float32)
        factor = math.fsum(lambdas) if self.method == "linear" else lambda_
        infinite = self._library.pcb_merge(
            *(block, self._thresholds_in_c(thresholds), self._question, weights_N.data_ptr()),
            *(factor, pcb.floor_of(self.method), bfloat16, rounded_B.data_ptr()),
        )
        if dtype in (torch.bfloat16, torch.float32):
            return rounded_B, not infinite
        rounded_B = rounded_B.to(dtype)
        return rounded_B, bool(torch.isfinite(rounded_B).all())

    def basis(self, sources: Sources, thresholds: Thresholds) -> tuple[Tensor, bool]:
        block = self._in_c(sources)
        out_NB = torch.empty(self.n, self._block.size)
        infinite = self._library.pcb_basis(
            block, self._thresholds_in_c(thresholds), self._question, pcb.floor_of(self.method), out_NB.data_ptr()
        )
        return out_NB, not infinite


def _arrays_of(thresholds: Thresholds, n: int, D: int) -> list[NDArray[Any] | None]:
    """The fields of _Thresholds, in order."""

    def array(values: Sequence[float], dtype: Any = np.float32) -> NDArray[Any] | None:
        return np.array(values, dtype=dtype) if len(values) else None

    low, high = array(thresholds.low), array(thresholds.high)
    result = dict.fromkeys(_THRESHOLDS, None) | {"low": low, "high": high, "t": array(thresholds.t)}
    if low is not None and high is not None:
        result["range"] = np.where(high > low, high - low, np.float32(np.inf))
        result["span"] = array(pcb.spans(thresholds) if thresholds.t else ())
    if thresholds.pair_max:
        least, most = np.array(thresholds.pair_min), np.array(thresholds.pair_max)
        result |= {"pair_low": least, "pair_range": np.where(most > least, most - least, np.inf)}
        result["intra_factor"] = array([D / total for total in thresholds.intra_sum], np.float64)
        result["pair_factor"] = array([D / total for total in thresholds.pair_sum], np.float64)
        result["paper_t"] = array(pcb.paper_t(thresholds, n) if thresholds.t else (), np.float64)
    return list(result.values())


def load_native() -> Any:
    """The library of _native.c; None where it was not built, or with PCB_RAY_KERNEL=torch in the environment."""
    return None if os.environ.get("PCB_RAY_KERNEL") == "torch" else _native_library()


@functools.cache
def _native_library() -> Any:
    spec = importlib.util.find_spec("pcb_ray._native")
    if spec is None or spec.origin is None:
        return None
    library = ctypes.CDLL(spec.origin)
    pointer, integer, real = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
    signatures: dict[str, tuple[Any, list[Any]]] = {
        "pcb_scores": (None, [pointer, pointer, integer, pointer]),
        "pcb_count": (None, [pointer, pointer, integer, pointer, integer, pointer]),
        "pcb_extrema": (integer, [pointer, pointer, pointer]),
        "pcb_paper_exponentials": (None, [pointer, pointer, pointer]),
        "pcb_merge": (integer, [pointer, pointer, integer, pointer, real, real, integer, pointer]),
        "pcb_basis": (integer, [pointer, pointer, integer, real, pointer]),
        "pcb_apply": (
            None,
            [*(pointer, integer, integer, pointer, integer, pointer, real), *(pointer, integer, real, integer, pointer)],
        ),
    }
    for name, (result, arguments) in signatures.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


def choose_kernel(method: str, n: int, D: int, device: torch.device) -> TorchKernel:
    """The fastest kernel for this device: native on a CPU where it was built, torch otherwise or if PCB_RAY_KERNEL=torch."""
    able = device.type == "cpu" and not (method == "pcb-paper" and n > MAX_NATIVE_PAPER)
    return (NativeKernel if able and load_native() is not None else TorchKernel)(method, n, D, device)
