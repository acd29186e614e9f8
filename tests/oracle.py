"""Section 2 of DESIGN, equation by equation, on whole vectors: every element in memory, every rank by a full sort.

It is the measure of all other tests and the dense program of the benchmark, so it shares no code with `pcb_ray`
and knows nothing of blocks. N tasks, D elements of the whole model; `_ND`, `_D` and so on tell the shape.
Everything is float32, but for the scores of `paper` (float64). Sums over tasks run in task order.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor

CLIP = {"released": 1e-4, "pairwise": 1e-2}  # c; `paper` does not clip
FLOOR = 1e-12

Weights = Sequence[float | Tensor]  # lambda_i: one number, or one for each element [D]


@dataclass(frozen=True)
class Result:
    """One merge and all that led to it. For `paper`, scale and beta (and t, beta_max) are float64 and times D^2."""

    merged_D: Tensor
    scale_ND: Tensor
    beta_ND: Tensor
    tauc_ND: Tensor  # tau itself in `paper`
    kept_ND: Tensor  # bool: scale > 0
    thresholds: dict[str, list[float]]  # low, high, t, beta_max, one a task; `paper` has no low and high


def merge_pcb(
    base_D: Tensor,
    models_ND: Tensor | Sequence[Tensor],
    *,
    variant: str,
    density: float | Sequence[float],
    weights: Weights,
    lambda_: float = 1.0,
    taus: Tensor | None = None,
) -> Result:
    """theta_pre + lambda * sum_i(scale_i * lambda_i * tauc_i) / max(sum_i scale_i, 1e-12); the base where none is kept.

    `taus` [N, D], if given, stands for models - base. ValueError: unknown variant, or a density that keeps nothing.
    """
    tau_ND = task_vectors(base_D, models_ND) if taus is None else taus
    N, D = tau_ND.shape
    r_N = densities(density, N, D)
    thresholds: dict[str, list[float]] = {}

    if variant == "paper":
        tauc_ND = tau_ND
        beta_ND = paper_scores(tau_ND)
    elif variant in CLIP:
        tauc_ND, z_ND, low_N, high_N = clip(tau_ND, CLIP[variant])
        thresholds.update(low=low_N, high=high_N)
        beta_ND = released_scores(tau_ND, z_ND) if variant == "released" else pairwise_scores(tau_ND, z_ND)
        del z_ND
        for i in range(N):
            if low_N[i] == high_N[i]:
                beta_ND[i] = 0  # and so max beta = t = 0, and scale 0
    else:
        raise ValueError(f"variant {variant!r} is not one of released, pairwise, paper")

    t_N = [sorted_(beta_ND[i])[min(int(D * (1 - r_N[i])), D - 1)] for i in range(N)]
    max_N = [beta_ND[i].max() for i in range(N)]
    thresholds.update(t=numbers(t_N), beta_max=numbers(max_N))

    scale_ND = torch.zeros_like(beta_ND)
    for i, (t, beta_max) in enumerate(zip(t_N, max_N, strict=True)):
        if variant == "paper":
            scale_ND[i] = torch.where(beta_ND[i] >= t, beta_ND[i], 0)
        elif beta_max != t:
            scale_ND[i] = (torch.maximum(beta_ND[i], t) - t) / (beta_max - t)
    kept_ND = scale_ND > 0

    weighted_D = add_up(scale_ND[i] * weights[i] * tauc_ND[i] for i in range(N))
    total_D = add_up(scale_ND)
    if variant != "paper":
        total_D = total_D.clamp(min=FLOOR)
    update_D = (lambda_ * weighted_D / total_D).float()
    merged_D = torch.where(kept_ND.any(dim=0), base_D + update_D, base_D)  # 0 / 0 in `paper` is not looked at
    return Result(merged_D, scale_ND, beta_ND, tauc_ND, kept_ND, thresholds)


def clip(tau_ND: Tensor, c: float) -> tuple[Tensor, Tensor, list[float], list[float]]:
    """tauc and z = minmax(clamp(|tau|, low, high)), with low and high; z is 0 for a task whose low is its high."""
    N, D = tau_ND.shape
    tauc_ND, z_ND = torch.empty_like(tau_ND), torch.zeros_like(tau_ND)
    low_N, high_N = [], []
    for i in range(N):
        magnitude_D = tau_ND[i].abs()
        ranked_D = sorted_(magnitude_D)
        low, high = ranked_D[int(D * c)].clone(), ranked_D[int(D * (1 - c) - 1)].clone()
        del ranked_D
        clamped_D = magnitude_D.clamp(low, high)
        tauc_ND[i] = tau_ND[i].sign() * clamped_D
        if low != high:
            z_ND[i] = (clamped_D - low) / (high - low)
        low_N.append(low)
        high_N.append(high)
    return tauc_ND, z_ND, numbers(low_N), numbers(high_N)


def released_scores(tau_ND: Tensor, z_ND: Tensor) -> Tensor:
    """beta_i = exp(N (z_i^2 - 1)) * tanh(tau_i * sum_j tau_j), tau unclipped."""
    sum_D = add_up(tau_ND)
    beta_ND = torch.empty_like(tau_ND)
    for i in range(len(tau_ND)):
        inter_D = torch.tanh(tau_ND[i] * sum_D)
        beta_ND[i] = intra(z_ND, i) * inter_D
    return beta_ND


def pairwise_scores(tau_ND: Tensor, z_ND: Tensor) -> Tensor:
    """beta_i = exp(N (z_i^2 - 1)) * sum_j tanh(s_i z_i * s_j z_j), s = sign(tau), j = i included."""
    N = len(tau_ND)
    sz_ND = tau_ND.sign() * z_ND
    beta_ND = torch.empty_like(tau_ND)
    for i in range(N):
        inter_D = add_up(torch.tanh(sz_ND[i] * sz_ND[j]) for j in range(N))
        beta_ND[i] = intra(z_ND, i) * inter_D
    return beta_ND


def intra(z_ND: Tensor, i: int) -> Tensor:
    return torch.exp(len(z_ND) * (z_ND[i] * z_ND[i] - 1))


def paper_scores(tau_ND: Tensor) -> Tensor:
    """D^2 beta_i = D Softmax_D(N minmax(tau_i^2)) * sum_j D Softmax_D(minmax(tau_i tau_j)); 0 for tau_i = 0.

    In float64, where the product of two float32 is exact.
    """
    N, D = tau_ND.shape
    beta_ND = torch.zeros((N, D), dtype=torch.float64, device=tau_ND.device)
    for i in range(N):
        tau_D = tau_ND[i].double()
        if not tau_D.any():
            continue  # equal to the base
        intra_D = D * torch.softmax(N * minmax(tau_D * tau_D), dim=0)
        inter_D = add_up(D * torch.softmax(minmax(tau_D * tau_ND[j]), dim=0) for j in range(N))
        beta_ND[i] = intra_D * inter_D
    return beta_ND


def minmax(x_D: Tensor) -> Tensor:
    """(x - min) / (max - min); 0 for a constant x, whose softmax is then uniform."""
    low, high = x_D.min(), x_D.max()
    return torch.zeros_like(x_D) if low == high else (x_D - low) / (high - low)


def merge_linear(models_ND: Tensor | Sequence[Tensor], weights: Weights) -> Tensor:
    """sum(lambda_i theta_i) / sum(lambda_i). ValueError where the lambda_i sum to 0."""
    total = sum(weights)
    if not torch.as_tensor(total).all():
        raise ValueError("the weights of a linear merge sum to 0")
    return add_up(weights[i] * models_ND[i] for i in range(len(models_ND))) / total


def merge_task_arithmetic(base_D: Tensor, models_ND: Tensor | Sequence[Tensor], weights: Weights, lambda_: float = 1.0) -> Tensor:
    """theta_pre + lambda * sum(lambda_i tau_i)."""
    tau_ND = task_vectors(base_D, models_ND)
    return base_D + lambda_ * add_up(weights[i] * tau_ND[i] for i in range(len(tau_ND)))


def merge_ties(
    base_D: Tensor,
    models_ND: Tensor | Sequence[Tensor],
    weights: Weights,
    lambda_: float,
    density: float | Sequence[float],
) -> Tensor:
    """theta_pre + lambda * (sum of lambda_i tau_i over the agreeing tasks) / their number; the base where none."""
    tau_ND = task_vectors(base_D, models_ND)
    agrees_ND = ties_agreement(tau_ND, density)
    agreed_D = add_up(torch.where(agrees_ND[i], weights[i] * tau_ND[i], 0) for i in range(len(tau_ND)))
    number_D = agrees_ND.sum(dim=0)
    return torch.where(number_D > 0, base_D + lambda_ * agreed_D / number_D, base_D)


def merge_ties_as_mergekit(
    base_D: Tensor,
    models_ND: Tensor | Sequence[Tensor],
    weights: Weights,
    lambda_: float,
    density: float | Sequence[float],
    *,
    mean: bool,
) -> Tensor:
    """mergekit's `normalize`: theta_pre + lambda * (sum of lambda_i tau_i over the agreeing tasks), over the sum of their lambda_i
    if `mean` (over 1 where that is 0)."""
    tau_ND = task_vectors(base_D, models_ND)
    agrees_ND = ties_agreement(tau_ND, density, weights)
    agreed_D = add_up(torch.where(agrees_ND[i], weights[i] * tau_ND[i], 0) for i in range(len(tau_ND)))
    total_D = add_up(torch.where(agrees_ND[i], weights[i] * torch.ones_like(tau_ND[i]), 0) for i in range(len(tau_ND)))
    divisor_D = torch.where(total_D == 0, 1, total_D) if mean else torch.ones_like(total_D)
    return torch.where(agrees_ND.any(dim=0), base_D + lambda_ * agreed_D / divisor_D, base_D)


def ties_agreement(tau_ND: Tensor, density: float | Sequence[float], weights: Weights | None = None) -> Tensor:
    """bool [N, D]: the task keeps the element, and its tau (times lambda_i, if weights are given) has the sign of the sum of what
    all tasks keep (0 is +)."""
    N, D = tau_ND.shape
    r_N = densities(density, N, D)
    kept_ND = torch.empty_like(tau_ND, dtype=torch.bool)
    for i in range(N):
        magnitude_D = tau_ND[i].abs()
        t = sorted_(magnitude_D)[max(D - int(D * r_N[i]) - 1, 0)]
        kept_ND[i] = (magnitude_D >= t) & (tau_ND[i] != 0)
    voting_ND = tau_ND if weights is None else torch.stack([weights[i] * tau_ND[i] for i in range(N)])
    elected_D = torch.where(add_up(torch.where(kept_ND[i], voting_ND[i], 0) for i in range(N)) >= 0, 1.0, -1.0)
    return kept_ND & (voting_ND.sign() == elected_D)


def merge_state_dicts(
    base: Mapping[str, Tensor],
    models: Sequence[Mapping[str, Tensor]],
    method: str = "pcb",
    *,
    variant: str = "pairwise",
    density: float | Sequence[float] = 0.1,
    weights: Sequence[float | Mapping[str, float]] | None = None,
    lambda_: float = 1.0,
    dtype: torch.dtype | None = None,
    exclude: Sequence[str] = (),
    tied: Mapping[str, str] | None = None,
) -> dict[str, Tensor]:
    """The merge of whole models: their floating tensors as one vector in sorted-name order, rounded once at the end.

    `weights[i]` is a number or {tensor name: number}. `dtype` is by default the base's, tensor by tensor. Integer and
    boolean tensors and those that an `exclude` pattern names are the base's. `tied` maps the name of a copy to the
    name of its twin, which alone counts. ValueError where models differ in shape, or a value is not finite.
    """
    twin = dict(tied or {})
    own = sorted(name for name, tensor in base.items() if tensor.is_floating_point() and name not in twin)
    names = [name for name in own if not any(fnmatchcase(name, pattern) for pattern in exclude)]
    for name in names:
        for i, model in enumerate(models):
            if name not in model or model[name].shape != base[name].shape:
                raise ValueError(f"{name}: model {i} does not have it in the base's shape")

    def flat(state: Mapping[str, Tensor]) -> Tensor:
        return torch.cat([finite(name, state[name].float()).reshape(-1) for name in names])

    def lambda_D(weight: float | Mapping[str, float]) -> float | Tensor:
        if not isinstance(weight, Mapping):
            return weight
        return torch.cat([torch.full((base[name].numel(),), float(weight[name])) for name in names])

    base_D, models_ND = flat(base), torch.stack([flat(model) for model in models])
    lambdas = [lambda_D(weight) for weight in (weights if weights is not None else [1.0] * len(models))]
    touched_D = torch.ones_like(base_D, dtype=torch.bool)
    if method == "pcb":
        result = merge_pcb(base_D, models_ND, variant=variant, density=density, weights=lambdas, lambda_=lambda_)
        merged_D, touched_D = result.merged_D, result.kept_ND.any(dim=0)
    elif method == "ties" and variant in ("weighted_mean", "weighted_sum"):
        merged_D = merge_ties_as_mergekit(base_D, models_ND, lambdas, lambda_, density, mean=variant == "weighted_mean")
        touched_D = ties_agreement(models_ND - base_D, density, lambdas).any(dim=0)
    elif method == "ties":
        merged_D = merge_ties(base_D, models_ND, lambdas, lambda_, density)
        touched_D = ties_agreement(models_ND - base_D, density).any(dim=0)
    elif method == "task_arithmetic":
        merged_D = merge_task_arithmetic(base_D, models_ND, lambdas, lambda_)
    elif method == "linear":
        merged_D = merge_linear(models_ND, lambdas)
    else:
        raise ValueError(f"method {method!r} is not one of pcb, ties, task_arithmetic, linear")

    out: dict[str, Tensor] = {}
    sizes = [base[name].numel() for name in names]
    for name, merged, touched in zip(names, merged_D.split(sizes), touched_D.split(sizes), strict=True):
        theta = base[name]
        rounded = finite(name, merged.view(theta.shape).to(dtype or theta.dtype))
        # The base's own value, not its float32: these differ if it is float64.
        out[name] = torch.where(touched.view(theta.shape), rounded, theta.to(rounded.dtype))
    for name, tensor in base.items():
        if name in twin:
            out[name] = out[twin[name]]
        elif name not in out:
            out[name] = tensor.to(dtype) if dtype and tensor.is_floating_point() else tensor
    return {name: out[name] for name in base}


def task_vectors(base_D: Tensor, models_ND: Tensor | Sequence[Tensor]) -> Tensor:
    """tau_i = theta_i - theta_pre."""
    return (models_ND if isinstance(models_ND, Tensor) else torch.stack(list(models_ND))) - base_D


def densities(density: float | Sequence[float], N: int, D: int) -> list[float]:
    """r of each task; ValueError for one outside (0, 1] or one that keeps nothing."""
    r_N = list(density) if isinstance(density, Sequence) else [density] * N
    if len(r_N) != N:
        raise ValueError(f"{len(r_N)} densities for {N} tasks")
    for r in r_N:
        if not 0 < r <= 1 or int(D * (1 - r)) >= D:
            raise ValueError(f"density {r} keeps nothing of {D} elements, or is not in (0, 1]")
    return r_N


def sorted_(x_D: Tensor) -> Tensor:
    return torch.sort(x_D).values


def add_up(terms: Iterable[Tensor]) -> Tensor:
    """The sum, one term after another: `sum(dim=0)` would add in an order that depends on the width."""
    return functools.reduce(torch.add, terms)


def numbers(scalars: Sequence[Tensor]) -> list[float]:
    return [float(x) + 0.0 for x in scalars]  # + 0.0: a rank among zeros is 0, whatever their signs


def finite(name: str, tensor: Tensor) -> Tensor:
    if not tensor.isfinite().all():
        raise ValueError(f"{name}: a value is not finite, or overflows {tensor.dtype}")
    return tensor
