"""What methods on whole matrices share: singular values and vectors, and the polar factor.

Names in this family of modules:
    X    a matrix of m rows (outputs) and n columns (inputs), r = min(m, n)
    T_i  lambda_i tau_i, the task vector of model i in one matrix, and S their sum
    sigma, u, v    singular values, from the largest on, and vectors

A direction is *present* if its sigma is above 2^-23 max(m, n) sigma_1: below that is what rounding in float32 leaves of zeros. All
is found from the Gram matrix of the smaller side, in float64, whose eigenvalues are sigma^2: the square of the cut is well above
what rounding in float64 leaves there."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pcb_ray.methods.dense import Array, eigen, eigenvalues, gram, product

Doubles = NDArray[np.float64]


def cut(sigma_1: float, shape: tuple[int, int]) -> float:
    """What a singular value must exceed for its direction to be present."""
    return 2.0**-23 * max(shape) * sigma_1


class Spectrum(NamedTuple):
    """X = U diag(sigma) V^T, of present directions."""

    u: Doubles
    """[m, k]"""
    sigma: Doubles
    """[k]"""
    v: Doubles
    """[n, k]"""


def spectrum(x: Array, most: int | None = None, floor: float | None = None) -> Spectrum:
    """The first so many present directions of X. `floor` is another cut than X's own."""
    sigma, vectors = _of_smaller_side(x, floor)
    sigma, vectors = sigma[:most], vectors[:, :most]
    if x.shape[0] < x.shape[1]:
        return Spectrum(vectors, sigma, product(x.T, vectors) / sigma)
    return Spectrum(product(x, vectors) / sigma, sigma, vectors)


def spectrum_bytes(m: int, n: int) -> int:
    """Memory of `spectrum`, and nearly that of `polar`, for a matrix [m, n] and beside it."""
    r = min(m, n)
    return 8 * (5 * r * r + (m + n) * r)  # the Gram matrix thrice, reflectors, vectors; u and v


def polar(x: Array) -> tuple[Doubles, Doubles]:
    """U V^T [m, n] over the present directions of X, and their sigma: X (X^T X)^-1/2."""
    sigma, vectors = _of_smaller_side(x, None)
    inverse_root = product(vectors / sigma, vectors.T)
    return (product(inverse_root, x) if x.shape[0] < x.shape[1] else product(x, inverse_root)), sigma


def largest_sigma(x: Array) -> float:
    """sigma_1."""
    return float(np.sqrt(max(eigenvalues(gram(_tall(x)))[0], 0.0)))


def _of_smaller_side(x: Array, floor: float | None) -> tuple[Doubles, Doubles]:
    """sigma [k] of the present directions, and the vectors [r, k] of the side that is smaller."""
    values, vectors = eigen(gram(_tall(x)))
    sigma = np.sqrt(np.maximum(values, 0.0))
    present = int(np.sum(sigma > (cut(float(sigma[0]), (x.shape[0], x.shape[1])) if floor is None else floor)))
    return sigma[:present], vectors[:, :present]


def _tall(x: Array) -> Array:
    return x.T if x.shape[0] < x.shape[1] else x


def total(tasks: Iterable[NDArray[np.float32]], shape: tuple[int, int]) -> NDArray[np.float32]:
    """S [m, n] in float32, one task after another: what task arithmetic adds."""
    s = np.zeros(shape, dtype=np.float32)
    for task in tasks:
        s += task
    return s
