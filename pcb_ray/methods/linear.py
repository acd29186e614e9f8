"""The weighted mean of the models (Wortsman et al., *Model Soups*, ICML 2022): no task vectors, and the base only if it is
listed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from pcb_ray.lazy import LazyModule
from pcb_ray.methods.ieee import sum_over_tasks
from pcb_ray.methods.method import Method, Native, Normalize, column

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = LazyModule("torch")


def linear(theta_NB: Tensor, lambdas: Sequence[float]) -> Tensor:
    """sum_i(lambda_i theta_i) / sum_i(lambda_i)."""
    total = torch.tensor(math.fsum(lambdas), dtype=theta_NB.dtype, device=theta_NB.device)
    return sum_over_tasks(theta_NB * column(lambdas, theta_NB)).div_(total)


def _no_mean(weights: Sequence[float]) -> str:
    return "the weights sum to 0, and the method divides by the sum" if sum(weights) == 0 else ""


LINEAR = Method(
    name="linear",
    merge=lambda block, _known, _settings: linear(block.tau, block.weights),
    formula="weighted mean of the models",
    source="Wortsman et al., Model Soups, ICML 2022",
    unit="element",
    has_base=False,
    native=Native(6, factor=lambda weights, _lambda: math.fsum(weights)),
    nearest_to=("slerp", "nuslerp", "multislerp", "karcher", "model_stock", "nearswap"),
    normalize=Normalize(True, "remove it; for a sum of task vectors use `merge_method: task_arithmetic`"),
    wrong_weights=_no_mean,
)
