"""A merge method of one's own: the mean of the task vectors without their largest elements, which a threshold over the whole model
tells. In a recipe: `merge_method: trimmed_mean.py:trimmed_mean`."""

import torch

from pcb_ray.methods import MAGNITUDE, Method, Parameter, Ranks, column, fraction, lambda_parameter


def merge(block, known, settings):
    kept_NB = block.tau.abs() <= column(known["limit"], block.tau)
    total_B = torch.zeros_like(block.theta)
    for tau_B, kept_B, weight in zip(block.tau, kept_NB, block.weights, strict=True):  # in order: the same bits always
        total_B += torch.where(kept_B, tau_B, 0.0) * weight
    return block.theta + total_B / settings.N * settings.lambda_


trimmed_mean = Method(
    name="trimmed_mean",
    merge=merge,
    parameters={"keep": Parameter(0.99, fraction, "the share that is kept"), "lambda": lambda_parameter()},
    passes=(Ranks(MAGNITUDE, {"limit": lambda D, own: min(int(D * own["keep"]), D - 1)}),),
    linear=True,
)
