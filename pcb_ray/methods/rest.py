"""What methods on whole matrices do with what is no matrix."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pcb_ray import checks
from pcb_ray.methods.ieee import sum_over_tasks
from pcb_ray.methods.method import Block, Known, Parameter, Settings, column

if TYPE_CHECKING:
    from torch import Tensor


def _check(raw: object, where: str, problems: list[str]) -> str:
    return checks.choice(raw, where, ("mean", "base"), problems)


REST = Parameter("mean", _check, "vectors, embeddings and heads: the mean of the models, or the base's; lambda does not scale them")


def merge_rest(block: Block, _known: Known, settings: Settings) -> Tensor:
    """theta + sum_i(lambda_i tau_i) / N, or theta: `rest`."""
    if settings["rest"] == "base":
        return block.theta.clone()
    total_B = sum_over_tasks(block.tau * column(block.weights, block.tau))
    return total_B.div_(column([float(settings.N)], block.tau)[0]).add_(block.theta)
