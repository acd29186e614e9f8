"""TIES (Yadav et al., *TIES-Merging: Resolving Interference When Merging Models*, NeurIPS 2023), trimmed over the whole model as
its release does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pcb_ray.lazy import LazyModule
from pcb_ray.methods.ieee import sum_over_tasks
from pcb_ray.methods.method import (
    MAGNITUDE,
    Block,
    Known,
    Method,
    Native,
    Normalize,
    Parameter,
    Ranks,
    Settings,
    column,
    lambda_parameter,
    share_of_model,
)

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = LazyModule("torch")


def ties(theta_B: Tensor, tau_NB: Tensor, low: Sequence[float], lambdas: Sequence[float], lambda_: float) -> Tensor:
    """Trim, elect, disjoint mean: the mean of lambda_i tau_i over the tasks whose kept tau, |tau| >= low, has the elected sign."""
    kept_NB = (tau_NB.abs() >= column(low, tau_NB)) & (tau_NB != 0.0)
    elected_B = torch.where(sum_over_tasks(torch.where(kept_NB, tau_NB, 0.0)) >= 0.0, 1.0, -1.0)
    agree_NB = kept_NB & (tau_NB.sign() == elected_B)
    count_B = agree_NB.sum(dim=0).to(tau_NB.dtype)  # a count of integers is exact in any order
    sum_B = sum_over_tasks(torch.where(agree_NB, tau_NB * column(lambdas, tau_NB), 0.0))
    merged_B = sum_B.div_(count_B.clamp(min=1.0)).mul_(lambda_).add_(theta_B)
    return torch.where(count_B > 0.0, merged_B, theta_B)


def ties_weighted(
    theta_B: Tensor, tau_NB: Tensor, low: Sequence[float], lambdas: Sequence[float], lambda_: float, *, mean: bool
) -> Tensor:
    """The same as mergekit has it: signs are elected by the sum of what is kept of lambda_i tau_i, and those that agree are added;
    `mean` divides by the sum of their lambda_i (by 1 where that is 0)."""
    weights_N1 = column(lambdas, tau_NB)
    kept_NB = torch.where(tau_NB.abs() >= column(low, tau_NB), tau_NB * weights_N1, 0.0)
    elected_B = torch.where(sum_over_tasks(kept_NB) >= 0.0, 1.0, -1.0)
    agree_NB = kept_NB.sign() == elected_B  # what is 0 agrees with neither sign
    sum_B = sum_over_tasks(torch.where(agree_NB, kept_NB, 0.0))
    if mean:
        total_B = sum_over_tasks(torch.where(agree_NB, weights_N1, 0.0))
        sum_B = sum_B.div_(torch.where(total_B == 0.0, 1.0, total_B))
    return torch.where(agree_NB.any(dim=0), sum_B.mul_(lambda_).add_(theta_B), theta_B)


def _arrays(known: Known, _settings: Settings) -> Mapping[str, NDArray[Any]]:
    """For _native.c."""
    return {"low": np.array(known["low"], dtype=np.float32)} if "low" in known else {}


TIES = Method(
    name="ties",
    merge=lambda block, known, settings: ties(block.theta, block.tau, known["low"], block.weights, settings.lambda_),
    formula="trim by size over the whole model, elect signs, disjoint mean",
    source="Yadav et al., TIES-Merging: Resolving Interference When Merging Models, NeurIPS 2023",
    parameters={
        "density": Parameter(
            0.1,
            share_of_model,
            "the fraction of all parameters that is kept",
            per_model=True,
            unasked="`density` is 0.1 where a recipe does not give it; in mergekit it is 1.",
        ),
        "lambda": lambda_parameter(),
    },
    passes=(Ranks(MAGNITUDE, {"low": lambda D, own: max(D - int(D * own["density"]) - 1, 0)}),),
    unit="element",
    linear=True,
    native=Native(4, _arrays),
    nearest_to=("dare_ties", "della", "breadcrumbs_ties"),
    normalize=Normalize(
        None,
        variants={True: "weighted_mean", False: "weighted_sum"},
        unasked="`ties` elects signs without the weights and divides by how many models agree, as its release does. In mergekit "
        "`normalize: true` (its default) divides by the sum of their weights, false does not divide, and signs are elected on "
        "weighted values: write `normalize` to have that.",
    ),
)


def _as_mergekit(variant: str, formula: str, *, mean: bool) -> Method:
    def merge(block: Block, known: Known, settings: Settings) -> Tensor:
        return ties_weighted(block.theta, block.tau, known["low"], block.weights, settings.lambda_, mean=mean)

    # Which sign is elected depends on the weights, so it is not linear in them.
    return replace(TIES, variant=variant, merge=merge, formula=formula, linear=False, native=None)


TIES_MEAN = _as_mergekit(
    "weighted_mean", "mergekit's `normalize: true`: elect on weighted values, weighted mean of those that agree", mean=True
)
TIES_SUM = _as_mergekit(
    "weighted_sum", "mergekit's `normalize: false`: elect on weighted values, weighted sum of those that agree", mean=False
)
