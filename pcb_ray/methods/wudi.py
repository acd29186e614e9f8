"""WUDI (Cheng et al., *Whoever Started the Interference Should End It: Guiding Data-Free Model Merging via Task Vectors*, ICML
2025) in closed form: the published objective, whose minimum the authors look for by 300 steps of Adam, held to the sum of the task
vectors by a ridge of ours."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np

from pcb_ray.methods.dense import Array, gram, product, solve
from pcb_ray.methods.method import Method, Parameter, fraction, lambda_parameter
from pcb_ray.methods.rest import REST, merge_rest
from pcb_ray.methods.spectra import Doubles


def wudi(tasks: Iterable[Array], shape: tuple[int, int], ridge: float) -> Doubles:
    """(D + rho h S) (H + rho h I)^-1 [m, n], rho the ridge, which minimises
    sum_i w_i ||(Delta - T_i) T_i^T||^2 + rho h ||Delta - S||^2 with w_i = 1 / ||T_i||^2:

    H = sum w_i T_i^T T_i,  D = sum w_i T_i T_i^T T_i,  h = trace(H) / n. Tasks with T_i = 0 are left out."""
    m, n = shape
    h_nn, d_mn, s_mn = np.zeros((n, n)), np.zeros((m, n)), np.zeros((m, n))
    for task in tasks:
        gram_nn = gram(task)
        if (size := _trace(gram_nn)) > 0.0:
            h_nn += gram_nn / size
            d_mn += product(task, gram_nn) / size
            s_mn += task
    held = ridge * _trace(h_nn) / n
    if held == 0.0:
        return np.zeros(shape)
    h_nn[np.diag_indices(n)] += held
    return np.ascontiguousarray(solve(h_nn, (d_mn + held * s_mn).T).T)


def _trace(x_nn: Doubles) -> float:
    return math.fsum(np.diagonal(x_nn).tolist())


WUDI = Method(
    name="wudi",
    merge=merge_rest,
    of_matrix=lambda matrix, settings: wudi(matrix.tasks(), matrix.shape, settings["ridge"]),
    matrix_bytes=lambda m, n, _models: 8 * (4 * m * n + 3 * n * n),
    formula="least interference with each task's inputs, in closed form",
    source="Cheng et al., Whoever Started the Interference Should End It, ICML 2025; the ridge is ours",
    parameters={
        "lambda": lambda_parameter(),
        "ridge": Parameter(0.1, fraction, "how firmly the merge is held to the sum of the task vectors"),
        "rest": REST,
    },
)
