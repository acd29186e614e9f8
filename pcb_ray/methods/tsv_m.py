"""Task singular vectors (Gargiulo et al., *Task Singular Vectors: Reducing Task Interference in Model Merging*, CVPR 2025)."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from pcb_ray.methods.dense import Array, product
from pcb_ray.methods.method import Method, lambda_parameter
from pcb_ray.methods.rest import REST, merge_rest
from pcb_ray.methods.spectra import Doubles, polar, spectrum, spectrum_bytes


def tsv_m(tasks: Iterable[Array], n_tasks: int, shape: tuple[int, int]) -> Doubles:
    """polar(U) diag(sigma) polar(V)^T [m, n] of the first floor(r / N) directions of each T_i, side by side."""
    each = min(shape) // n_tasks
    parts = [spectrum(task, each) for task in tasks if task.any()]
    if not parts:
        return np.zeros(shape)
    u, v = (polar(np.hstack([part[side] for part in parts]))[0] for side in (0, 2))
    return product(u * np.concatenate([part.sigma for part in parts]), v.T)


TSV_M = Method(
    name="tsv_m",
    merge=merge_rest,
    of_matrix=lambda matrix, _settings: tsv_m(matrix.tasks(), matrix.N, matrix.shape),
    fits=lambda shape, n: min(shape) >= n,
    matrix_bytes=lambda m, n, _models: 8 * m * n + 2 * spectrum_bytes(m, n) + 16 * min(m, n) * (m + n),
    formula="the first singular directions of each task, made orthogonal to each other",
    source="Gargiulo et al., Task Singular Vectors: Reducing Task Interference in Model Merging, CVPR 2025",
    parameters={"lambda": lambda_parameter(), "rest": REST},
)
