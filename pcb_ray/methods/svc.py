"""Singular Value Calibration (Li et al., *Singular Value Calibration*, ICML 2026): after another method, directions that several
tasks have in common, and that a sum counts several times, are scaled back."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from pcb_ray.methods.dense import Array, product, row_products
from pcb_ray.methods.spectra import Doubles, cut, spectrum, spectrum_bytes


def calibrated(delta: Array, tasks: Iterable[Array]) -> NDArray[np.float32]:
    """U diag(gamma sigma) V^T [m, n], of Delta = U diag(sigma) V^T and the T_i: tasks with T_i = 0 are left out, and N counts the
    others.

    s_ki    = <u_k^T Delta, u_k^T T_i> / ||u_k^T T_i||^2, 0 where u_k^T T_i = 0
    gamma_k = N / sum_i max(1 / N, s_ki)

    Directions whose sigma differ by less than the cut of present ones span one space, in which U is arbitrary: they share one
    s_i = <P Delta, P T_i> / ||P T_i||^2, P the projector on it."""
    u, sigma, _ = spectrum(delta)
    if not len(sigma):
        return np.zeros(delta.shape, dtype=np.float32)
    of_delta = product(u.T, delta)
    group_of = _groups(sigma, cut(float(sigma[0]), (delta.shape[0], delta.shape[1])))
    shares: list[Doubles] = []  # s_ki, of tasks that have a part here
    for task in tasks:
        if not task.any():
            continue
        of_task = product(u.T, task)
        inner = _by_group(row_products(of_delta, of_task), group_of)
        size = _by_group(row_products(of_task, of_task), group_of)
        shares.append(np.divide(inner, size, out=np.zeros_like(inner), where=size > 0.0))
    if not shares:
        return delta.astype(np.float32)
    n = len(shares)
    total = np.zeros(len(sigma))
    for share in shares:
        total += np.maximum(1.0 / n, share)
    return product(u * (n / total), of_delta).astype(np.float32)


def svc_bytes(m: int, n: int) -> int:
    """Memory of `calibrated` for a matrix [m, n], beside Delta and a task vector."""
    r = min(m, n)
    return spectrum_bytes(m, n) + 8 * r * (2 * n + m + n)


def _groups(sigma: Doubles, differ_by: float) -> list[int]:
    """For each direction the first one of its group."""
    found: list[int] = []
    for k in range(len(sigma)):
        found.append(found[-1] if k and sigma[k - 1] - sigma[k] < differ_by else k)
    return found


def _by_group(values: Doubles, group_of: list[int]) -> Doubles:
    """The sum over each direction's group."""
    members: dict[int, list[float]] = {}
    for group, value in zip(group_of, values.tolist(), strict=True):
        members.setdefault(group, []).append(value)
    sums = {group: math.fsum(of_group) for group, of_group in members.items()}
    return np.array([sums[group] for group in group_of])
