"""Merging a tensor by its matrices, each whole: for methods on matrices, and to calibrate what other methods make.

Models come one after another, so that memory does not grow with their number: the result and one task vector are in memory, and
what the method needs beside them. The inputs are read once to look at them, and once more for each time that the method goes
through the models."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.lib.stride_tricks import as_strided
from numpy.typing import NDArray
from torch import Tensor

from pcb_ray.matrices import View, together
from pcb_ray.methods import Known
from pcb_ray.methods.method import Matrix
from pcb_ray.methods.svc import calibrated
from pcb_ray.planning import Segment
from pcb_ray.questions import Gram
from pcb_ray.sources import CellDigests

if TYPE_CHECKING:
    from pcb_ray.owner import Owner

Floats = NDArray[np.float32]


def merged(
    owner: Owner,
    segment: Segment,
    known: Known,
    lambda_: float,
    dtype: torch.dtype,
    digests: Sequence[CellDigests] | None,
    gram: Gram | None,
) -> Iterator[tuple[list[Segment], Tensor, bool]]:
    """A whole tensor block by block, rounded once to dtype, and whether the block is finite."""
    plan = owner.plan
    tensor, views = plan.tensors[segment.tensor], plan.views[segment.tensor]
    if segment.stop - segment.start != tensor.numel:
        raise AssertionError(f"{tensor.name} was cut")
    for block in owner.cut([segment]):  # what is not finite anywhere would be everywhere
        loaded = owner.load(block, digests)
        owner.relate(loaded, gram)
        if not owner.kernel.are_finite(loaded):
            owner.refuse_non_finite(block, "the merge")
    for group in together(views):
        hull = replace(segment, start=group[0].first, stop=max(view.stop for view in group))
        delta_H = torch.from_numpy(_delta(owner, hull, group, known))
        for block in owner.cut([hull]):
            theta_B = owner.load_source(block, 0, None)
            if theta_B is None:
                raise AssertionError(f"{plan.method.name} has no base")
            of_block = delta_H[block[0].start - hull.start : block[0].stop - hull.start]
            merged_B = of_block.mul(torch.tensor(lambda_, dtype=torch.float32)).add_(theta_B.float().cpu())
            rounded_B = merged_B.to(dtype)
            yield block, rounded_B, bool(torch.isfinite(rounded_B).all())


def _delta(owner: Owner, hull: Segment, group: Sequence[View], known: Known) -> Floats:
    """Delta of these elements, which hold the matrices of the group."""
    plan, method = owner.plan, owner.plan.method
    tensor = plan.tensors[hull.tensor]
    delta_H = np.zeros(hull.stop - hull.start, dtype=np.float32)
    if method.of_matrix is None:
        for block in owner.cut([hull]):
            of_block = slice(block[0].start - hull.start, block[0].stop - hull.start)
            delta_H[of_block] = owner.kernel.delta(owner.load(block), known, tensor.weights).cpu().numpy()
    for view in group:

        def tasks(view: View = view) -> Iterator[Floats]:
            for i in range(plan.N):
                yield _in(_task(owner, hull, i), view, hull)

        delta_mn = _in(delta_H, view, hull)
        if method.of_matrix is not None:
            delta_mn[...] = method.of_matrix(Matrix(tensor.name, view.shape, plan.N, tasks), plan.settings)
        if plan.recipe.calibrate:
            delta_mn[...] = calibrated(delta_mn, tasks())
    return delta_H


def _task(owner: Owner, hull: Segment, i: int) -> Floats:
    """lambda_i tau_i of these elements."""
    task_H = np.empty(hull.stop - hull.start, dtype=np.float32)
    weight = torch.tensor(owner.plan.tensors[hull.tensor].weights[i], dtype=torch.float32)
    for block in owner.cut([hull]):
        theta_B, of_model_B = owner.load_source(block, 0, None), owner.load_source(block, i + 1, None)
        if theta_B is None or of_model_B is None:
            raise AssertionError(f"{owner.plan.method.name} has no base")
        tau_B = of_model_B.float() - theta_B.float()
        task_H[block[0].start - hull.start : block[0].stop - hull.start] = tau_B.mul_(weight.to(tau_B.device)).cpu().numpy()
    return task_H


def _in(elements_H: Floats, view: View, hull: Segment) -> Floats:
    """A matrix in the elements of its hull."""
    at, size = elements_H[view.first - hull.start :], elements_H.itemsize
    return as_strided(at, view.shape, (view.down * size, view.along * size))
