"""The kernel in C (`_native.c`), through ctypes: the interpreter lock is free meanwhile. What a method has not written there, torch
does."""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pcb_ray.errors import InputError
from pcb_ray.kernels.reference import Counts, Loaded, TorchKernel
from pcb_ray.methods import Extrema, Known, Method, Quantity, Settings, Sums
from pcb_ray.selection import Bracket

STRIP, LANES = 512, 16  # of _native.c


class _Block(ctypes.Structure):
    """struct Block of _native.c."""

    _fields_ = (
        ("n", ctypes.c_int64),
        ("size", ctypes.c_int64),
        ("data", ctypes.c_void_p),
        ("bfloat16", ctypes.c_void_p),
        ("scratch", ctypes.c_void_p),
    )


class _Thresholds(ctypes.Structure):
    """struct Thresholds of _native.c."""

    _fields_ = tuple(
        (name, ctypes.c_void_p)
        for name in ("low", "high", "range", "t", "span", "paper_t", "pair_low", "pair_range", "intra_factor", "pair_factor")
    )


_PER_PAIR = ("pair_low", "pair_range", "pair_factor")

# struct Bracket of _native.c
_BRACKET = np.dtype([("lo", "i8"), ("hi", "i8"), ("counts", "i8", 4), ("inside", "u8"), ("found", "i8")])


class KnownInC:
    """What a method knows, as _native.c takes it; it keeps the arrays that C points to."""

    def __init__(self, method: Method, known: Known, settings: Settings) -> None:
        self.known = known
        arrays: Mapping[str, NDArray[Any]] = {} if method.native is None else method.native.arrays(known, settings)
        self._kept = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
        n = settings.N
        for name, array in self._kept.items():  # C believes that they are that long
            wanted = n * (n + 1) // 2 if name in _PER_PAIR else n
            if array.shape != (wanted,):
                raise InputError(
                    f"thresholds: {name} of {method.full_name}: wanted {wanted} numbers, found {array.size}. Fix: merge again."
                )
        self._struct = _Thresholds(**{name: array.ctypes.data for name, array in self._kept.items()})
        self.pointer = ctypes.byref(self._struct)


class NativeKernel(TorchKernel):
    """What it returns is valid until the next call."""

    name = "native"

    def __init__(self, method: Method, settings: Settings, device: torch.device) -> None:
        super().__init__(method, settings, device)
        self._library = load_native()
        n = settings.N
        # Buffers are made once: the system hands out and takes back memory of this size page by page.
        self._scratch = torch.empty((3 * n + 1) * STRIP)
        self._data, self._bfloat16 = (ctypes.c_void_p * (n + 1))(), (ctypes.c_int64 * (n + 1))()
        self._block = _Block(n, 0, ctypes.addressof(self._data), ctypes.addressof(self._bfloat16), self._scratch.data_ptr())
        self._inside: NDArray[Any] = np.empty(0)
        self._rounded = torch.empty(0)
        self._known: KnownInC | None = None

    def _in_c(self, loaded: Loaded) -> Any:
        """The block for C, which reads float32 and bfloat16."""
        # It is kept, so that what was converted outlives the call.
        self._kept = [x if x is None or x.dtype in (torch.float32, torch.bfloat16) else x.float() for x in loaded.sources]
        for k, x in enumerate(self._kept):
            self._data[k] = None if x is None else x.data_ptr()
            self._bfloat16[k] = x is not None and x.dtype == torch.bfloat16
        self._block.size = next(len(x) for x in reversed(self._kept) if x is not None)
        return ctypes.byref(self._block)

    def _known_in_c(self, known: Known) -> Any:
        if self._known is None or self._known.known is not known:
            self._known = KnownInC(self.method, known, self.settings)
        return self._known.pointer

    def are_finite(self, loaded: Loaded) -> bool:
        pairs = self.settings.N * (self.settings.N + 1) // 2
        least, most = np.full(pairs, np.inf), np.full(pairs, -np.inf)
        return not self._library.pcb_extrema(self._in_c(loaded), least.ctypes.data, most.ctypes.data)

    def gram(self, loaded: Loaded) -> tuple[NDArray[np.float64], list[int]]:
        n = self.settings.N
        gram, zeros = np.zeros((n + 1) * (n + 2) // 2), np.zeros(n, dtype=np.int64)
        lanes = np.empty((gram.size, LANES), dtype=np.float32)
        self._library.pcb_gram(self._in_c(loaded), lanes.ctypes.data, gram.ctypes.data, zeros.ctypes.data)
        return gram, zeros.tolist()

    def values(self, loaded: Loaded, quantity: Quantity, known: Known) -> Tensor:
        if quantity.native is None:
            return super().values(loaded, quantity, known)
        block = self._in_c(loaded)
        out_NB = torch.empty(self.settings.N, self._block.size, dtype=torch.float64 if quantity.bits == 64 else torch.float32)
        self._library.pcb_scores(block, self._known_in_c(known), quantity.native, out_NB.data_ptr())
        return out_NB

    def count(
        self, loaded: Loaded, quantity: Quantity, known: Known, brackets: Sequence[Sequence[Bracket]]
    ) -> tuple[list[int], list[list[Counts]]]:
        if quantity.native is None:
            return super().count(loaded, quantity, known, brackets)
        block, n = self._in_c(loaded), self.settings.N
        size, each = self._block.size, max(map(len, brackets))
        key = np.int64 if quantity.bits == 64 else np.int32
        if self._inside.dtype != key or self._inside.size < n * each * size:
            self._inside = np.empty(n * each * size, dtype=key)
        inside = self._inside[: n * each * size].reshape(n, each, size)
        asked = np.zeros((n, each), dtype=_BRACKET)
        for i, of_model in enumerate(brackets):
            asked["lo"][i, : len(of_model)] = [b.lo for b in of_model]
            asked["hi"][i, : len(of_model)] = [b.hi for b in of_model]
        asked["inside"] = self._inside.ctypes.data + size * self._inside.itemsize * np.arange(n * each).reshape(n, each)
        largest = np.full(n, -(1 << 63))
        self._library.pcb_count(block, self._known_in_c(known), quantity.native, asked.ctypes.data, each, largest.ctypes.data)
        counts, found = asked["counts"].tolist(), asked["found"].tolist()
        return largest.tolist(), [
            [(tuple(counts[i][e]), inside[i, e, : found[i][e]].copy()) for e in range(len(of_model))]
            for i, of_model in enumerate(brackets)
        ]

    def extremes(self, loaded: Loaded, wanted: Extrema, known: Known, smallest: list[float], largest: list[float]) -> bool:
        if not wanted.native:
            return super().extremes(loaded, wanted, known, smallest, largest)
        block, pairs = self._in_c(loaded), self.settings.N * (self.settings.N + 1) // 2
        least, most = np.array(smallest or [np.inf] * pairs), np.array(largest or [-np.inf] * pairs)
        infinite = getattr(self._library, wanted.native)(block, least.ctypes.data, most.ctypes.data)
        smallest[:], largest[:] = least.tolist(), most.tolist()
        return not infinite

    def rows(self, loaded: Loaded, wanted: Sums, known: Known) -> Tensor:
        if not wanted.native:
            return super().rows(loaded, wanted, known)
        block, n = self._in_c(loaded), self.settings.N
        out = torch.empty(n * (n + 3) // 2, self._block.size, dtype=torch.float64)
        getattr(self._library, wanted.native)(block, self._known_in_c(known), out.data_ptr())
        return out

    def merge(
        self, loaded: Loaded, known: Known, weights: Sequence[float], lambda_: float, dtype: torch.dtype
    ) -> tuple[Tensor, bool]:
        native = self.method.native
        if native is None:
            return super().merge(loaded, known, weights, lambda_, dtype)
        block = self._in_c(loaded)
        size, bfloat16 = self._block.size, dtype == torch.bfloat16
        if self._rounded.numel() < size or (self._rounded.dtype == torch.bfloat16) != bfloat16:
            self._rounded = torch.empty(size, dtype=torch.bfloat16 if bfloat16 else torch.float32)
        rounded_B, weights_N = self._rounded[:size], torch.tensor(weights, dtype=torch.float32)
        infinite = self._library.pcb_merge(
            block,
            self._known_in_c(known),
            native.question,
            weights_N.data_ptr(),
            native.factor(weights, lambda_),
            native.floor,
            bfloat16,
            rounded_B.data_ptr(),
        )
        if dtype in (torch.bfloat16, torch.float32):
            return rounded_B, not infinite
        rounded_B = rounded_B.to(dtype)
        return rounded_B, bool(torch.isfinite(rounded_B).all())

    def basis(self, loaded: Loaded, known: Known) -> tuple[Tensor, bool]:
        native = self.method.native
        if native is None:
            return super().basis(loaded, known)
        block = self._in_c(loaded)
        out_NB = torch.empty(self.settings.N, self._block.size)
        infinite = self._library.pcb_basis(block, self._known_in_c(known), native.question, native.floor, out_NB.data_ptr())
        return out_NB, not infinite


def load_native() -> Any:
    """The library of _native.c; None where it was not built, or with PCB_RAY_KERNEL=torch in the environment."""
    return None if os.environ.get("PCB_RAY_KERNEL") == "torch" else _native_library()


@functools.cache
def _native_library() -> Any:
    spec = importlib.util.find_spec("pcb_ray.kernels._native")
    if spec is None or spec.origin is None:
        return None
    library = ctypes.CDLL(spec.origin)
    pointer, integer, real = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
    signatures: dict[str, tuple[Any, list[Any]]] = {
        "pcb_scores": (None, [pointer, pointer, integer, pointer]),
        "pcb_count": (None, [pointer, pointer, integer, pointer, integer, pointer]),
        "pcb_extrema": (integer, [pointer, pointer, pointer]),
        "pcb_gram": (None, [pointer, pointer, pointer, pointer]),
        "pcb_paper_exponentials": (None, [pointer, pointer, pointer]),
        "pcb_merge": (integer, [pointer, pointer, integer, pointer, real, real, integer, pointer]),
        "pcb_basis": (integer, [pointer, pointer, integer, real, pointer]),
        "pcb_apply": (
            None,
            # base, is bfloat16, size, tasks, n, weights, lambda, known, is paper, floor, as, out
            [pointer, integer, integer, pointer, integer, pointer, real, pointer, integer, real, integer, pointer],
        ),
    }
    for name, (result, arguments) in signatures.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library
