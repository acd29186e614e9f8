"""Task arithmetic (Ilharco et al., *Editing Models with Task Arithmetic*, ICLR 2023)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pcb_ray.methods.ieee import sum_over_tasks
from pcb_ray.methods.method import Method, Native, column, lambda_parameter

if TYPE_CHECKING:
    from torch import Tensor


def task_arithmetic(theta_B: Tensor, tau_NB: Tensor, lambdas: Sequence[float], lambda_: float) -> Tensor:
    """theta + lambda sum_i(lambda_i tau_i)."""
    return sum_over_tasks(tau_NB * column(lambdas, tau_NB)).mul_(lambda_).add_(theta_B)


TASK_ARITHMETIC = Method(
    name="task_arithmetic",
    merge=lambda block, _known, settings: task_arithmetic(block.theta, block.tau, block.weights, settings.lambda_),
    formula="base + lambda sum lambda_i tau_i",
    source="Ilharco et al., Editing Models with Task Arithmetic, ICLR 2023",
    parameters={"lambda": lambda_parameter()},
    unit="element",
    linear=True,
    native=Native(5),
    nearest_to=("dare_linear", "della_linear", "breadcrumbs"),
)
