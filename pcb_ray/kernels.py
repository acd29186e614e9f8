"""The arithmetic of a block behind one interface: in torch on any device, or in C on CPUs (`_native.c`), the same bits from both.

A kernel is chosen per owner by what its machine offers. Since both round alike, a cluster may mix them; receipts name what was used.
"""

from __future__ import annotations

import ctypes
import importlib.util
import math
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pcb_ray import pcb
from pcb_ray.answers import Thresholds
from pcb_ray.selection import Bracket

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
STRIP = 512  # of _native.c
MAX_NATIVE_PAPER = 700  # tasks up to which exp64 of _native.c needs no care for subnormal numbers


# The largest key, and for each bracket the counts (< lo, <= lo, < hi, <= hi) and the keys strictly between.
Counts = tuple[int, list[tuple[tuple[int, int, int, int], NDArray[Any]]]]


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

    def tau(self, raw: Tensor, theta_B: Tensor, out_B: Tensor) -> None:
        """out = float32(raw) - theta."""
        torch.sub(raw.float(), theta_B, out=out_B)

    def beta(self, tau_NB: Tensor, thresholds: Thresholds) -> Tensor:
        """Scores [N, B], valid until the next call: float32, for `paper` float64 and times D^2."""
        if self.method == "pcb-paper":
            return pcb.beta_paper(tau_NB, thresholds, self.D)
        return (pcb.beta_pairwise if self.method == "pcb-pairwise" else pcb.beta_released)(tau_NB, thresholds)

    def extrema(self, tau_NB: Tensor, low: list[float], high: list[float]) -> None:
        """Widen low and high, one entry per pair i <= j, to hold all tau_i tau_j of this block."""
        for p, (i, j) in enumerate(pcb.pairs(self.n)):
            least, most = torch.aminmax(tau_NB[i].double() * tau_NB[j].double())
            low[p], high[p] = min(low[p], least.item()), max(high[p], most.item())

    def exponentials(self, tau_NB: Tensor, thresholds: Thresholds) -> Tensor:
        """The softmax numerators of `paper`: N rows of intra, then one per pair; float64, valid until the next call."""
        return torch.cat(pcb.paper_exponentials(tau_NB, thresholds))

    def count(self, x_B: Tensor, magnitude: bool, brackets: Sequence[Bracket]) -> Counts:
        """The largest key, and for each bracket the counts (< lo, <= lo, < hi, <= hi) and the keys strictly between."""
        k_B = keys(x_B, magnitude)
        result = []
        for bracket in brackets:
            below_hi_B, above_lo_B = k_B < bracket.hi, k_B > bracket.lo
            counts = ((k_B < bracket.lo).sum(), len(k_B) - above_lo_B.sum(), below_hi_B.sum(), (k_B <= bracket.hi).sum())
            below_lo, upto_lo, below_hi, upto_hi = torch.stack([torch.as_tensor(c, device=k_B.device) for c in counts]).tolist()
            inside = k_B[above_lo_B & below_hi_B] if below_hi > upto_lo else k_B[:0]
            result.append(((below_lo, upto_lo, below_hi, upto_hi), inside.cpu().numpy()))
        return int(k_B.max()), result

    def merge(self, theta_B: Tensor, tau_NB: Tensor, thresholds: Thresholds, lambdas: Sequence[float], lambda_: float) -> Tensor:
        """The merged block, float32 [B], valid until the next call. For `linear`, tau holds the models themselves."""
        if self.method == "linear":
            return pcb.linear(tau_NB, lambdas)
        if self.method == "task_arithmetic":
            return pcb.task_arithmetic(theta_B, tau_NB, lambdas, lambda_)
        if self.method == "ties":
            return pcb.ties(theta_B, tau_NB, thresholds, lambdas, lambda_)
        beta_NB = self.beta(tau_NB, thresholds)
        if self.method == "pcb-paper":
            return pcb.combine(theta_B, tau_NB, pcb.scale_of_paper(beta_NB, thresholds), lambdas, lambda_, floor=0.0)
        _, tauc_NB = pcb.clip(tau_NB, thresholds)
        return pcb.combine(theta_B, tauc_NB, pcb.scale_of(beta_NB, thresholds), lambdas, lambda_, floor=pcb.DENOMINATOR_FLOOR)

    def round(self, merged_B: Tensor, dtype: torch.dtype) -> tuple[Tensor, bool]:
        """The block in the output's dtype (nearest, ties to even), and whether all of it is finite."""
        rounded_B = merged_B.to(dtype, copy=True)  # a block may be merged in parts, and the next one takes the same buffer
        return rounded_B, bool(torch.isfinite(rounded_B).all())


class _Scores(ctypes.Structure):
    """struct Scores of _native.c."""

    _fields_ = [(name, ctypes.c_int64) for name in ("n", "stride", "pairwise")] + [
        (name, ctypes.c_void_p) for name in ("low", "high", "range", "t", "span", "scratch")
    ]


class _Bracket(ctypes.Structure):
    """struct Bracket of _native.c."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("lo", "hi", "below_lo", "upto_lo", "below_hi", "upto_hi")),
        ("inside", ctypes.c_void_p),
        ("found", ctypes.c_int64),
    ]


class NativeKernel(TorchKernel):
    """The same on CPUs in C, for float32 blocks that lie row by row in memory; what C does not have is left to torch."""

    name = "native"

    def __init__(self, method: str, n: int, D: int, device: torch.device) -> None:
        super().__init__(method, n, D, device)
        self._library = _load_native()
        self._scratch = torch.empty(2 * n * STRIP)
        # Buffers that are made once: the system hands out and takes back memory of this size page by page.
        self._inside: list[NDArray[Any]] = [np.empty((0, 0)), np.empty((0, 0))]  # for keys of 32 and of 64 bits
        self._beta = torch.empty(n, 0)
        self._merged = torch.empty(0)
        self._exponentials = torch.empty(0, 0)
        self._scores_of: tuple[Thresholds | None, list[Tensor]] = (None, [])

    @property
    def _fused(self) -> bool:
        return self.method in ("pcb-released", "pcb-pairwise")

    def _scores(self, tau_NB: Tensor, thresholds: Thresholds) -> _Scores:
        if self._scores_of[0] is not thresholds:
            low, high = torch.tensor(thresholds.low), torch.tensor(thresholds.high)
            zeros = (0.0,) * self.n
            t = torch.tensor(thresholds.t or zeros)
            span = torch.tensor(pcb.spans(thresholds) if thresholds.t else zeros)
            self._scores_of = thresholds, [low, high, torch.where(high > low, high - low, math.inf), t, span, self._scratch]
        pointers = [x.data_ptr() for x in self._scores_of[1]]
        return _Scores(self.n, tau_NB.stride(0), int(self.method == "pcb-pairwise"), *pointers)

    def tau(self, raw: Tensor, theta_B: Tensor, out_B: Tensor) -> None:
        if raw.dtype == torch.bfloat16:
            self._library.pcb_tau_bfloat16(raw.data_ptr(), theta_B.data_ptr(), raw.numel(), out_B.data_ptr())
        else:
            super().tau(raw, theta_B, out_B)

    def _paper_range(self, thresholds: Thresholds) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        low, high = np.array(thresholds.pair_min), np.array(thresholds.pair_max)
        return low, np.where(high > low, high - low, np.inf)

    def extrema(self, tau_NB: Tensor, low: list[float], high: list[float]) -> None:
        least, most = np.array(low), np.array(high)
        self._library.pcb_extrema(tau_NB.data_ptr(), self.n, tau_NB.stride(0), tau_NB.shape[1], least.ctypes.data, most.ctypes.data)
        low[:], high[:] = least.tolist(), most.tolist()

    def exponentials(self, tau_NB: Tensor, thresholds: Thresholds) -> Tensor:
        if self.n > MAX_NATIVE_PAPER:
            return super().exponentials(tau_NB, thresholds)
        stride, rows = tau_NB.stride(0), self.n * (self.n + 3) // 2
        if self._exponentials.shape != (rows, stride):
            self._exponentials = torch.empty(rows, stride, dtype=torch.float64)
        low, span = self._paper_range(thresholds)
        self._library.pcb_paper_exponentials(
            *(tau_NB.data_ptr(), self.n, stride, tau_NB.shape[1], low.ctypes.data, span.ctypes.data),
            *(self._exponentials.data_ptr(), self._exponentials[self.n :].data_ptr()),
        )
        return self._exponentials[:, : tau_NB.shape[1]]

    def beta(self, tau_NB: Tensor, thresholds: Thresholds) -> Tensor:
        paper = self.method == "pcb-paper"
        if not self._fused and (not paper or self.n > MAX_NATIVE_PAPER):
            return super().beta(tau_NB, thresholds)
        stride, size = tau_NB.stride(0), tau_NB.shape[1]
        if self._beta.shape[1] != stride:
            self._beta = torch.empty(self.n, stride, dtype=torch.float64 if paper else torch.float32)
        beta_NB = self._beta[:, :size]
        if paper:
            low, span = self._paper_range(thresholds)
            intra, pair = (np.array([self.D / total for total in sums]) for sums in (thresholds.intra_sum, thresholds.pair_sum))
            self._library.pcb_beta_paper(
                *(tau_NB.data_ptr(), self.n, stride, size, low.ctypes.data, span.ctypes.data),
                *(intra.ctypes.data, pair.ctypes.data, beta_NB.data_ptr()),
            )
        else:
            self._library.pcb_beta(ctypes.byref(self._scores(tau_NB, thresholds)), tau_NB.data_ptr(), size, beta_NB.data_ptr())
        return beta_NB

    def count(self, x_B: Tensor, magnitude: bool, brackets: Sequence[Bracket]) -> Counts:
        size, wide = x_B.numel(), x_B.dtype == torch.float64
        inside_of = self._inside[wide]
        if inside_of.shape[0] < len(brackets) or inside_of.shape[1] < size:
            inside_of = self._inside[wide] = np.empty((len(brackets), size), dtype=np.int64 if wide else np.int32)
        asked = (_Bracket * len(brackets))()
        for one, bracket, inside in zip(asked, brackets, inside_of, strict=False):
            one.lo, one.hi, one.inside = bracket.lo, bracket.hi, inside.ctypes.data
        count = self._library.pcb_count64 if wide else self._library.pcb_count32
        largest = count(x_B.data_ptr(), size, magnitude, asked, len(brackets))
        return largest, [
            ((one.below_lo, one.upto_lo, one.below_hi, one.upto_hi), inside[: one.found].copy())
            for one, inside in zip(asked, inside_of, strict=False)
        ]

    def merge(self, theta_B: Tensor, tau_NB: Tensor, thresholds: Thresholds, lambdas: Sequence[float], lambda_: float) -> Tensor:
        if not self._fused and self.method != "ties":
            return super().merge(theta_B, tau_NB, thresholds, lambdas, lambda_)
        if self._merged.numel() < theta_B.numel():
            self._merged = torch.empty_like(theta_B)
        merged_B, weights_N = self._merged[: theta_B.numel()], torch.tensor(lambdas, dtype=torch.float32)
        if self.method == "ties":
            low_N = torch.tensor(thresholds.low)
            self._library.pcb_ties(
                *(theta_B.data_ptr(), tau_NB.data_ptr(), self.n, tau_NB.stride(0), tau_NB.shape[1], low_N.data_ptr()),
                *(weights_N.data_ptr(), lambda_, merged_B.data_ptr()),
            )
            return merged_B
        self._library.pcb_merge(
            *(ctypes.byref(self._scores(tau_NB, thresholds)), theta_B.data_ptr(), tau_NB.data_ptr(), tau_NB.shape[1]),
            *(weights_N.data_ptr(), lambda_, pcb.DENOMINATOR_FLOOR, merged_B.data_ptr()),
        )
        return merged_B

    def round(self, merged_B: Tensor, dtype: torch.dtype) -> tuple[Tensor, bool]:
        if dtype != torch.bfloat16:
            return super().round(merged_B, dtype)
        rounded_B = torch.empty_like(merged_B, dtype=dtype)
        return rounded_B, not self._library.pcb_round_bfloat16(merged_B.data_ptr(), merged_B.numel(), rounded_B.data_ptr())


def _load_native() -> Any:
    spec = importlib.util.find_spec("pcb_ray._native")
    assert spec is not None
    assert spec.origin is not None
    library = ctypes.CDLL(spec.origin)
    pointer, integer, real = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
    signatures: dict[str, tuple[Any, list[Any]]] = {
        "pcb_tau_bfloat16": (None, [pointer, pointer, integer, pointer]),
        "pcb_round_bfloat16": (integer, [pointer, integer, pointer]),
        "pcb_beta": (None, [pointer, pointer, integer, pointer]),
        "pcb_merge": (None, [pointer, pointer, pointer, integer, pointer, real, real, pointer]),
        "pcb_ties": (None, [pointer, pointer, integer, integer, integer, pointer, pointer, real, pointer]),
        "pcb_count32": (integer, [pointer, integer, integer, pointer, integer]),
        "pcb_count64": (integer, [pointer, integer, integer, pointer, integer]),
        "pcb_extrema": (None, [pointer, integer, integer, integer, pointer, pointer]),
        "pcb_paper_exponentials": (None, [pointer, integer, integer, integer, pointer, pointer, pointer, pointer]),
        "pcb_beta_paper": (None, [pointer, integer, integer, integer, pointer, pointer, pointer, pointer, pointer]),
    }
    for name, (result, arguments) in signatures.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


def choose_kernel(method: str, n: int, D: int, device: torch.device) -> TorchKernel:
    """The fastest kernel for this device: native on a CPU where it was built, torch otherwise or if PCB_RAY_KERNEL=torch."""
    wanted = os.environ.get("PCB_RAY_KERNEL", "native")
    if device.type == "cpu" and wanted != "torch" and importlib.util.find_spec("pcb_ray._native") is not None:
        return NativeKernel(method, n, D, device)
    return TorchKernel(method, n, D, device)
