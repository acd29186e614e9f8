"""Dense linear algebra in float64 with the same bits everywhere: products, eigenvalues and -vectors of symmetric matrices, positive
definite systems (`_dense.c`).

Libraries add in an order that depends on their version, the processor and the number of threads, and an eigenvector of theirs may
differ by far more than rounding. Here every sum has one order and every operation is rounded on its own. A product of two float32
is exact in float64, so that of Gram matrices only the order of the additions matters.

Arrays are of numpy, float32 or float64 and with any strides where they are only read."""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pcb_ray.errors import RequestError, RunError

Array = NDArray[Any]


class _Matrix(ctypes.Structure):
    """struct Matrix of _dense.c."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("is_double", ctypes.c_int64),
        ("down", ctypes.c_int64),
        ("along", ctypes.c_int64),
    )

    @classmethod
    def of(cls, x: Array) -> _Matrix:
        if x.ndim != 2 or x.dtype not in (np.float32, np.float64):
            raise ValueError(f"wanted a matrix of float32 or float64, found {x.ndim} dimensions of {x.dtype}")
        down, along = (stride // x.itemsize for stride in x.strides)
        return cls(x.ctypes.data, x.dtype == np.float64, down, along)


def product(a: Array, b: Array) -> NDArray[np.float64]:
    """A B [m, n] in float64: each element a sum of k terms, one after another."""
    return _product(a, b, lower=False)


def gram(x: Array) -> NDArray[np.float64]:
    """X^T X [n, n] in float64, symmetric."""
    lower = _product(x.T, x, lower=True)
    return np.asarray(np.tril(lower) + np.tril(lower, -1).T)


def row_products(x: Array, y: Array) -> NDArray[np.float64]:
    """The inner products [m] of the rows of two matrices [m, n] with each other."""
    x, y = (np.ascontiguousarray(one, dtype=np.float64) for one in (x, y))
    if x.shape != y.shape:
        raise ValueError(f"wanted two matrices of one shape, found {x.shape} and {y.shape}")
    out = np.empty(len(x))
    _library().pcb_row_products(out.ctypes.data, x.ctypes.data, y.ctypes.data, *x.shape)
    return out


def eigen(a: Array) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The eigenvalues [n] of a symmetric matrix [n, n] from the largest to the smallest, and their vectors [n, n], one in each
    column. Equal values come in an order that the matrix alone decides."""
    vectors = np.empty((len(a), len(a)))
    values = _eigen(a, vectors)
    order = np.argsort(-values, kind="stable")
    return values[order], vectors[order].T


def eigenvalues(a: Array) -> NDArray[np.float64]:
    """The same values alone, for half of the work."""
    return np.sort(_eigen(a, None))[::-1]


def _eigen(a: Array, vectors: NDArray[np.float64] | None) -> NDArray[np.float64]:
    """In no order."""
    n = len(a)
    scale = math.ldexp(1.0, math.frexp(float(np.abs(a).max(initial=0.0)))[1])  # exact; 1 for a matrix of zeros
    scaled, values = np.array(a, dtype=np.float64, order="C") / scale, np.empty(n)
    to = None if vectors is None else vectors.ctypes.data
    _check(_library().pcb_eigen(scaled.ctypes.data, n, values.ctypes.data, to), "eigenvalues", n)
    return values * scale


def solve(a: Array, b: Array) -> NDArray[np.float64]:
    """A^-1 B [n, m] of a symmetric positive definite A [n, n] (Cholesky)."""
    a, b = (np.array(one, dtype=np.float64, order="C") for one in (a, b))
    _check(_library().pcb_solve(a.ctypes.data, b.ctypes.data, *b.shape), "a positive definite system", len(a))
    return b


def _product(a: Array, b: Array, *, lower: bool) -> NDArray[np.float64]:
    if a.shape[1] != b.shape[0]:
        raise ValueError(f"wanted matrices that can be multiplied, found {a.shape} and {b.shape}")
    out = np.zeros((a.shape[0], b.shape[1]))
    left, right = _Matrix.of(a), _Matrix.of(b.T)
    pointers = (ctypes.byref(left), ctypes.byref(right))
    failed = _library().pcb_product(out.ctypes.data, out.shape[1], *out.shape, a.shape[1], *pointers, lower)
    _check(failed, "a product", len(out))
    return out


def _check(failed: int, what: str, n: int) -> None:
    if failed == 1:
        raise MemoryError(f"no memory for {what} of {n:,} rows")
    if failed:
        raise RunError(f"{what} of {n:,} rows: wanted a result, found none. Fix: please report it, with the tensor.")


@functools.cache
def _library() -> Any:
    spec = importlib.util.find_spec("pcb_ray.methods._dense")
    if spec is None or spec.origin is None:
        raise RequestError(
            "merge_method: wanted the compiled part of pcb_ray for methods on whole matrices, found none: there was no C compiler "
            "when it was installed. Fix: install one (`apt install gcc python3-dev`), then pcb_ray once more, with "
            "`pip install --force-reinstall --no-deps`."
        )
    library, pointer, integer = ctypes.CDLL(spec.origin), ctypes.c_void_p, ctypes.c_int64
    signatures: dict[str, tuple[Any, list[Any]]] = {
        # out, its step, m, n, k, a, b^T, whether only what is below the diagonal
        "pcb_product": (integer, [pointer, integer, integer, integer, integer, pointer, pointer, integer]),
        "pcb_row_products": (None, [pointer, pointer, pointer, integer, integer]),
        "pcb_eigen": (integer, [pointer, integer, pointer, pointer]),
        "pcb_solve": (integer, [pointer, pointer, integer, integer]),
    }
    for name, (result, arguments) in signatures.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library
