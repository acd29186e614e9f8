"""Isotropic merging (Marczak et al., *No Task Left Behind: Isotropic Model Merging with Common and Task-Specific Subspaces*, ICML
2025): all directions of the merge get one singular value."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import numpy as np

from pcb_ray.methods.dense import Array, product
from pcb_ray.methods.method import Matrix, Method, Parameter, fraction, lambda_parameter
from pcb_ray.methods.rest import REST, merge_rest
from pcb_ray.methods.spectra import Doubles, cut, largest_sigma, polar, spectrum, spectrum_bytes, total


def iso_c(s: Array) -> Doubles:
    """mean(sigma) polar(S) [m, n]; 0 for S = 0."""
    factor, sigma = polar(s)
    return _mean(sigma) * factor


def iso_cts(s: Array, tasks: Callable[[], Iterable[Array]], n_tasks: int, common: float) -> Doubles:
    """mean(all sigma) polar(U) polar(V)^T [m, n], where U, V and sigma are, side by side, the d first directions of each
    T_i - U_c U_c^T T_i, in the order of the tasks, and the k common ones U_c, V_c, sigma_c of S.

    d = min(r // N, round((r - int(common r)) / N)), k = r - N d. A direction of a task is present by the cut of T_i itself."""
    r = min(s.shape)
    each = min(r // n_tasks, round((r - int(common * r)) / n_tasks))
    of_all = spectrum(s, r - n_tasks * each)
    parts = []
    for task in tasks():
        if each and task.any():
            residual = task - product(of_all.u, product(of_all.u.T, task))
            parts.append(spectrum(residual, each, cut(largest_sigma(task), (s.shape[0], s.shape[1]))))
    parts.append(of_all)
    sigma = np.concatenate([part.sigma for part in parts])
    if not len(sigma):
        return np.zeros(s.shape)
    u, v = (polar(np.hstack([part[side] for part in parts]))[0] for side in (0, 2))
    return _mean(sigma) * product(u, v.T)


def _mean(sigma: Doubles) -> float:
    return math.fsum(sigma.tolist()) / len(sigma) if len(sigma) else 0.0


SOURCE = "Marczak et al., No Task Left Behind: Isotropic Model Merging with Common and Task-Specific Subspaces, ICML 2025"


def _sum(matrix: Matrix) -> Array:
    return total(matrix.tasks(), matrix.shape)


ISO_C = Method(
    name="iso_c",
    merge=merge_rest,
    of_matrix=lambda matrix, _settings: iso_c(_sum(matrix)),
    matrix_bytes=lambda m, n, _models: 12 * m * n + spectrum_bytes(m, n),
    formula="mean(sigma) U V^T of the sum of the task vectors",
    source=SOURCE,
    parameters={"lambda": lambda_parameter(2.0), "rest": REST},
    is_flat=True,
)

ISO_CTS = Method(
    name="iso_cts",
    merge=merge_rest,
    of_matrix=lambda matrix, settings: iso_cts(_sum(matrix), matrix.tasks, matrix.N, settings["common"]),
    matrix_bytes=lambda m, n, _models: 28 * m * n + 2 * spectrum_bytes(m, n) + 16 * min(m, n) * (m + n),
    formula="the same of common directions and of each task's own",
    source=SOURCE,
    parameters={
        "lambda": lambda_parameter(4.0),
        "common": Parameter(0.8, fraction, "the share of directions that the tasks have in common"),
        "rest": REST,
    },
    is_flat=True,
)
