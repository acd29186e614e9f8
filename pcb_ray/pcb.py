"""PCB-Merging on one block of parameters (Du et al., *Parameter Competition Balancing for Model Merging*, NeurIPS 2024).

One equation a line, no state. Everything here is a function of a block and of the per-task `Thresholds`, which
belong to the whole model; finding those is the business of `selection` and `analysis`.

Shapes:
    N    tasks (fine-tuned models)
    B    elements of one block
    D    merged elements of the whole model
    _NB  tensor [N, B], _N1 tensor [N, 1] (one number per task), _B tensor [B]

Arithmetic: float32 (the scores of `paper`: float64), built from the operations that IEEE 754 rounds correctly - add, subtract, multiply,
divide, compare, shift - each rounded on its own, and sums over tasks taken one task after another. `exp` and `tanh` are therefore
written out below instead of taken from a library. So a block has the same bits on any CPU and any GPU, at any block size, and the
native kernel (`_native.c`), which repeats these lines in C, agrees with them bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from pcb_ray.answers import Thresholds

# --- exp and tanh in IEEE operations ----------------------------------------------------------------------------------------------
# Minimax polynomials of our own fit (Remez, relative error): exp(r) = 1 + r + r^2 q(r) on |r| <= ln(2)/2, within 0.05 (float32) and 0.001
# (float64) of half an ulp before rounding; tanh(x) = x + x^3 q(x^2) on [0, 1], 0.08. All float32 constants are exact in float32.
EXP32 = ("0x1.fffffcp-2", "0x1.555492p-3", "0x1.5558f2p-5", "0x1.123a20p-7", "0x1.6a23d0p-10")
EXP64 = (
    *("0x1.0000000000000p-1", "0x1.555555555555bp-3", "0x1.5555555555503p-5", "0x1.111111110ec3fp-7"),
    *("0x1.6c16c16c305ddp-10", "0x1.a01a01b38a16dp-13", "0x1.a01a01364e078p-16", "0x1.71ddf00282b2ap-19"),
    *("0x1.27e5b493405efp-22", "0x1.af6c1db77d1aap-26", "0x1.1e3d06ff62840p-29"),
)
TANH32 = (
    *("-0x1.55553cp-2", "0x1.110be2p-3", "-0x1.b96222p-5", "0x1.600994p-6"),
    *("-0x1.0460c8p-7", "0x1.2da504p-9", "-0x1.77dd4ep-12"),
)
# ln 2 in two parts, the first with enough trailing zeros that k * LN2_HIGH is exact.
LN2 = {torch.float32: ("0x1.62e000p-1", "0x1.0bfbe8p-15"), torch.float64: ("0x1.62e42fefa0000p-1", "0x1.cf79abc9e3b3ap-40")}
LOG2_E = {torch.float32: "0x1.715476p+0", torch.float64: "0x1.71547652b82fep+0"}
# Below this exp is 0 (float32: half the smallest subnormal is e^-103.97); the bound keeps the exponent arithmetic in range.
EXP_MIN = {torch.float32: -104.0, torch.float64: -746.0}


def _horner(x: Tensor, coefficients: Sequence[str]) -> Tensor:
    result = torch.full_like(x, float.fromhex(coefficients[-1]))
    for c in reversed(coefficients[:-1]):
        result.mul_(x).add_(float.fromhex(c))
    return result


def _power_of_two(k: Tensor, dtype: torch.dtype) -> Tensor:
    """2^k for an integer tensor k in the range of normal numbers, put together from its bits."""
    if dtype == torch.float32:
        return ((k + 127) << 23).view(torch.float32)
    return ((k.to(torch.int64) + 1023) << 52).view(torch.float64)


def exp(x: Tensor) -> Tensor:
    """e^x for x <= 20 in float32 or float64, within 1 ulp, the same bits on every device."""
    dtype = x.dtype
    high, low = (float.fromhex(part) for part in LN2[dtype])
    x = x.clamp(min=EXP_MIN[dtype])
    k = (x * float.fromhex(LOG2_E[dtype])).round_()
    r = (x - k * high).sub_(k * low)
    q = _horner(r, EXP32 if dtype == torch.float32 else EXP64)
    result = (r * r).mul_(q).add_(r).add_(1.0)
    # Two factors, since 2^k itself may lie below the normal numbers.
    k = k.to(torch.int32)
    half = k >> 1
    return result.mul_(_power_of_two(half, dtype)).mul_(_power_of_two(k - half, dtype))


def tanh_unit(x: Tensor) -> Tensor:
    """tanh for |x| <= 1, float32, within 1.2 ulp, the same bits on every device."""
    square = x * x
    return _horner(square, TANH32).mul_(square).mul_(x).add_(x)


def tanh(x: Tensor) -> Tensor:
    """tanh of any float32 x, within 2 ulp, the same bits on every device."""
    size = x.abs()
    tail = 1.0 - 2.0 / (exp(size.clamp(max=10.0).mul_(2.0)).add_(1.0))
    return torch.where(size <= 1.0, tanh_unit(x.clamp(-1.0, 1.0)), tail.copysign_(x))


# --- PCB-Merging -------------------------------------------------------------------------------------------------------------------
def column(values: Sequence[float], like: Tensor) -> Tensor:
    """One number per task as a tensor [N, 1] of the block's device and dtype."""
    # A tensor and not a Python number: a GPU divides by a number by multiplying with its reciprocal, which rounds differently.
    return torch.tensor(values, dtype=like.dtype, device=like.device)[:, None]


def _sum_over_tasks(x_NB: Tensor) -> Tensor:
    # One after another: torch's sum over a dimension adds in an order that depends on the block's width.
    total_B = x_NB[0].clone()
    for x_B in x_NB[1:]:
        total_B.add_(x_B)
    return total_B


def _minmax(x: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """(x - low) / (high - low), and 0 where high = low."""
    return (x - low).div_(torch.where(high > low, high - low, math.inf))


def clip(tau_NB: Tensor, thresholds: Thresholds) -> tuple[Tensor, Tensor]:
    """z = minmax(clamp(|tau|, low, high)) and tauc = sign(tau) clamp(|tau|, low, high), both [N, B]."""
    low_N1, high_N1 = column(thresholds.low, tau_NB), column(thresholds.high, tau_NB)
    size_NB = tau_NB.abs().clamp_(min=low_N1, max=high_N1)
    return _minmax(size_NB, low_N1, high_N1), tau_NB.sign().mul_(size_NB)


def _intra(z_NB: Tensor) -> Tensor:
    """exp(N (z^2 - 1)): the intra-balancing of the release; the -1 keeps large N from overflowing and cancels in `scale`."""
    return exp((z_NB * z_NB).sub_(1.0).mul_(float(len(z_NB))))


def beta_released(tau_NB: Tensor, thresholds: Thresholds) -> Tensor:
    """beta_i = intra_i tanh(tau_i sum_j tau_j), as pcb-merging.py of the release has it: the products take tau unclipped."""
    z_NB, _ = clip(tau_NB, thresholds)
    return tanh(tau_NB * _sum_over_tasks(tau_NB)).mul_(_intra(z_NB))


def beta_pairwise(tau_NB: Tensor, thresholds: Thresholds) -> Tensor:
    """beta_i = intra_i sum_j tanh(s_i z_i s_j z_j), s = sign(tau), j = i included: equation 2 as the release's vision search has it."""
    z_NB, _ = clip(tau_NB, thresholds)
    u_NB = tau_NB.sign().mul_(z_NB)
    inter_NB = torch.zeros_like(u_NB)
    for i in range(len(u_NB)):
        for j in range(i, len(u_NB)):  # each pair once; every task still receives its terms in the order j = 0, 1, ...
            pair_B = tanh_unit(u_NB[i] * u_NB[j])
            inter_NB[i].add_(pair_B)
            if j != i:
                inter_NB[j].add_(pair_B)
    return inter_NB.mul_(_intra(z_NB))


def pairs(n: int) -> list[tuple[int, int]]:
    """The pairs i <= j of n tasks in the order of `Thresholds.pair_*`."""
    return [(i, j) for i in range(n) for j in range(i, n)]


def paper_pair(tau_NB: Tensor, i: int, j: int, thresholds: Thresholds) -> Tensor:
    """minmax(tau_i tau_j) over the model, float64 [B]; 0 where the product is constant. The product is exact in float64."""
    p = i * len(tau_NB) - i * (i - 1) // 2 + j - i  # of `pairs`, i <= j
    low, high = (torch.tensor(x[p], dtype=torch.float64, device=tau_NB.device) for x in (thresholds.pair_min, thresholds.pair_max))
    return _minmax(tau_NB[i].double() * tau_NB[j].double(), low, high)


def paper_exponentials(tau_NB: Tensor, thresholds: Thresholds) -> tuple[Tensor, Tensor]:
    """The numerators of equation 1's and 2's softmaxes, float64: exp(N (minmax(tau_i^2) - 1)) [N, B] and exp(minmax(tau_i tau_j) - 1)
    for each pair i <= j [N (N + 1) / 2, B]."""
    n = len(tau_NB)
    intra = [exp(paper_pair(tau_NB, i, i, thresholds).sub_(1.0).mul_(float(n))) for i in range(n)]
    inter = [exp(paper_pair(tau_NB, i, j, thresholds).sub_(1.0)) for i, j in pairs(n)]
    return torch.stack(intra), torch.stack(inter)


def beta_paper(tau_NB: Tensor, thresholds: Thresholds, D: int) -> Tensor:
    """D^2 beta_i = D Softmax_D(N minmax(tau_i^2)) * sum_j D Softmax_D(minmax(tau_i tau_j)): equations 1-3, float64 [N, B]."""
    n = len(tau_NB)
    intra_NB, exponential_PB = paper_exponentials(tau_NB, thresholds)
    inter_NB = torch.zeros_like(intra_NB)
    for (i, j), exponential_B, total in zip(pairs(n), exponential_PB, thresholds.pair_sum, strict=True):
        pair_B = exponential_B.mul_(D / total)
        inter_NB[i].add_(pair_B)
        if j != i:
            inter_NB[j].add_(pair_B)
    return inter_NB.mul_(intra_NB.mul_(column([D / total for total in thresholds.intra_sum], intra_NB)))


def scale_of(beta_NB: Tensor, thresholds: Thresholds) -> Tensor:
    """(max(beta, t) - t) / (max beta - t); 0 for a task whose |tau| or beta does not vary (high = low, max beta = t)."""
    t_N1, span_N1 = column(thresholds.t, beta_NB), column(spans(thresholds), beta_NB)
    return beta_NB.clamp(min=t_N1).sub_(t_N1).div_(span_N1)


def spans(thresholds: Thresholds) -> list[float]:
    """max beta - t of each task, rounded to float32; infinite, which makes every scale 0, where the task has nothing to rank."""
    result = []
    for low, high, t, top in zip(thresholds.low, thresholds.high, thresholds.t, thresholds.beta_max, strict=True):
        difference = torch.tensor(top) - torch.tensor(t)  # float32, like the elements it divides
        result.append(difference.item() if high > low and top > t else math.inf)
    return result


def scale_of_paper(beta_NB: Tensor, thresholds: Thresholds) -> Tensor:
    """beta where beta >= t, else 0, float32; 0 for a task that equals the base."""
    return torch.where(beta_NB >= column(paper_t(thresholds, len(beta_NB)), beta_NB), beta_NB, 0.0).float()


def paper_t(thresholds: Thresholds, n: int) -> list[float]:
    """t of each task; infinite, which makes every scale 0, where the task equals the base."""
    diagonal = [thresholds.pair_max[p] for p, (i, j) in enumerate(pairs(n)) if i == j]
    return [t if largest > 0.0 else math.inf for t, largest in zip(thresholds.t, diagonal, strict=True)]


def floor_of(method: str) -> float:
    """The least denominator of `combine`: the release's, which the paper's formula does not have."""
    return 0.0 if method == "pcb-paper" else 1e-12


def combine(theta_B: Tensor, tauc_NB: Tensor, scale_NB: Tensor, lambdas: Sequence[float], lambda_: float, floor: float) -> Tensor:
    """theta + lambda sum_i(scale_i lambda_i tauc_i) / max(sum_i scale_i, floor).

    theta stays bit for bit where no task keeps the element, and where what they keep adds up to 0: adding that 0 would change a theta of -0."""
    total_B = _sum_over_tasks(scale_NB)
    sum_B = _sum_over_tasks((scale_NB * column(lambdas, scale_NB)).mul_(tauc_NB))
    changed_B = (total_B > 0.0) & (sum_B != 0.0)
    merged_B = sum_B.mul_(lambda_).div_(total_B.clamp(min=floor)).add_(theta_B)
    return torch.where(changed_B, merged_B, theta_B)


# --- Baselines --------------------------------------------------------------------------------------------------------------------
def linear(theta_NB: Tensor, lambdas: Sequence[float]) -> Tensor:
    """sum_i(lambda_i theta_i) / sum_i(lambda_i)."""
    total = torch.tensor(math.fsum(lambdas), dtype=theta_NB.dtype, device=theta_NB.device)
    return _sum_over_tasks(theta_NB * column(lambdas, theta_NB)).div_(total)


def task_arithmetic(theta_B: Tensor, tau_NB: Tensor, lambdas: Sequence[float], lambda_: float) -> Tensor:
    """theta + lambda sum_i(lambda_i tau_i) (Ilharco et al., 2023)."""
    return _sum_over_tasks(tau_NB * column(lambdas, tau_NB)).mul_(lambda_).add_(theta_B)


def ties(theta_B: Tensor, tau_NB: Tensor, thresholds: Thresholds, lambdas: Sequence[float], lambda_: float) -> Tensor:
    """Trim, elect, disjoint mean (Yadav et al., 2023): the mean of lambda_i tau_i over the tasks whose kept tau has the elected sign."""
    kept_NB = (tau_NB.abs() >= column(thresholds.low, tau_NB)) & (tau_NB != 0.0)
    elected_B = torch.where(_sum_over_tasks(torch.where(kept_NB, tau_NB, 0.0)) >= 0.0, 1.0, -1.0)
    agree_NB = kept_NB & (tau_NB.sign() == elected_B)
    count_B = agree_NB.sum(dim=0).to(tau_NB.dtype)  # a count of integers: exact in any order
    sum_B = _sum_over_tasks(torch.where(agree_NB, tau_NB * column(lambdas, tau_NB), 0.0))
    merged_B = sum_B.div_(count_B.clamp(min=1.0)).mul_(lambda_).add_(theta_B)
    return torch.where(count_B > 0.0, merged_B, theta_B)
