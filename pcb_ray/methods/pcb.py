"""PCB-Merging on one block of parameters (Du et al., *Parameter Competition Balancing for Model Merging*, NeurIPS 2024).

One equation a line, no state. The equations are functions of a block and of what is known of the whole model; the three records at
the end say which passes find that.

Shapes:
    N    tasks (fine-tuned models)
    B    elements of one block
    P    pairs i <= j of tasks, N (N + 1) / 2
    D    merged elements of the whole model
    _NB  tensor [N, B], _N1 tensor [N, 1] (one number per task), _B tensor [B]

What is known, by name, a number for each task (for each pair, row by row, in `pair_*`):
    low, high           between which |tau| is clipped
    tau_max             the largest |tau| (released)
    t, beta_max         the drop threshold on beta, and beta's largest value
    pair_min, pair_max  of tau_i tau_j over the model (paper)
    intra_sum, pair_sum the softmax denominators (paper)

Arithmetic: float32 (the scores of `paper`: float64), built from the operations that IEEE 754 rounds correctly - add, subtract,
multiply, divide, compare, shift - each rounded on its own, and sums over tasks taken one task after another (`ieee`). So a block
has the same bits on any CPU and any GPU, at any block size, and the native kernel (`_native.c`), which repeats these lines in C,
agrees with them bit for bit."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pcb_ray.lazy import LazyModule
from pcb_ray.methods.ieee import exp, sum_over_tasks, tanh, tanh_unit
from pcb_ray.methods.method import (
    MAGNITUDE,
    Block,
    Extrema,
    Known,
    Method,
    Native,
    Parameter,
    Pass,
    Quantity,
    Ranks,
    Scored,
    Settings,
    Sums,
    column,
    lambda_parameter,
    share_of_model,
    spans_of,
)

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = LazyModule("torch")

FLOAT32_MAX = 3.4028234663852886e38
FLOOR = 1e-12  # the least denominator of the merge in the release; the paper's formula has none
CLIP_RELEASED, CLIP_PAIRWISE = 1e-4, 1e-2  # the fraction c that is clipped at each end


# --- the paper on one block -------------------------------------------------------------------------------------------------------
def _minmax(x: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """(x - low) / (high - low), and 0 where high = low."""
    return (x - low).div_(torch.where(high > low, high - low, math.inf))


def clip(tau_NB: Tensor, known: Known) -> tuple[Tensor, Tensor]:
    """z = minmax(clamp(|tau|, low, high)) and tauc = sign(tau) clamp(|tau|, low, high), both [N, B]."""
    low_N1, high_N1 = column(known["low"], tau_NB), column(known["high"], tau_NB)
    size_NB = tau_NB.abs().clamp_(min=low_N1, max=high_N1)
    return _minmax(size_NB, low_N1, high_N1), tau_NB.sign().mul_(size_NB)


def _intra(z_NB: Tensor) -> Tensor:
    """exp(N (z^2 - 1)): the intra-balancing of the release; the -1 keeps large N from overflowing and cancels in `scale`."""
    return exp((z_NB * z_NB).sub_(1.0).mul_(float(len(z_NB))))


def beta_released(tau_NB: Tensor, known: Known) -> Tensor:
    """beta_i = intra_i tanh(tau_i sum_j tau_j), as pcb-merging.py of the release has it: the products take tau unclipped."""
    z_NB, _ = clip(tau_NB, known)
    return tanh(tau_NB * sum_over_tasks(tau_NB)).mul_(_intra(z_NB))


def beta_pairwise(tau_NB: Tensor, known: Known) -> Tensor:
    """beta_i = intra_i sum_j tanh(s_i z_i s_j z_j), s = sign(tau), j = i included: equation 2 as the release's vision search has
    it."""
    z_NB, _ = clip(tau_NB, known)
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
    """The pairs i <= j of n tasks, in the order of `pair_*`."""
    return [(i, j) for i in range(n) for j in range(i, n)]


def pair_products(tau_NB: Tensor) -> Tensor:
    """tau_i tau_j of each pair [P, B], exact in float64."""
    return torch.stack([tau_NB[i].double() * tau_NB[j].double() for i, j in pairs(len(tau_NB))])


def _paper_pair(tau_NB: Tensor, i: int, j: int, known: Known) -> Tensor:
    """minmax(tau_i tau_j) over the model, float64 [B]; 0 where the product is constant."""
    p = i * len(tau_NB) - i * (i - 1) // 2 + j - i  # of `pairs`, i <= j
    low, high = (torch.tensor(known[name][p], dtype=torch.float64, device=tau_NB.device) for name in ("pair_min", "pair_max"))
    return _minmax(tau_NB[i].double() * tau_NB[j].double(), low, high)


def paper_exponentials(tau_NB: Tensor, known: Known) -> tuple[Tensor, Tensor]:
    """The numerators of equation 1's and 2's softmaxes, float64: exp(N (minmax(tau_i^2) - 1)) [N, B] and exp(minmax(tau_i tau_j) -
    1) [P, B]."""
    n = len(tau_NB)
    intra = [exp(_paper_pair(tau_NB, i, i, known).sub_(1.0).mul_(float(n))) for i in range(n)]
    inter = [exp(_paper_pair(tau_NB, i, j, known).sub_(1.0)) for i, j in pairs(n)]
    return torch.stack(intra), torch.stack(inter)


def beta_paper(tau_NB: Tensor, known: Known, D: int) -> Tensor:
    """D^2 beta_i = D Softmax_D(N minmax(tau_i^2)) * sum_j D Softmax_D(minmax(tau_i tau_j)): equations 1-3, float64 [N, B]."""
    n = len(tau_NB)
    intra_NB, exponential_PB = paper_exponentials(tau_NB, known)
    inter_NB = torch.zeros_like(intra_NB)
    for (i, j), exponential_B, total in zip(pairs(n), exponential_PB, known["pair_sum"], strict=True):
        pair_B = exponential_B.mul_(D / total)
        inter_NB[i].add_(pair_B)
        if j != i:
            inter_NB[j].add_(pair_B)
    return inter_NB.mul_(intra_NB.mul_(column([D / total for total in known["intra_sum"]], intra_NB)))


def scale_of(beta_NB: Tensor, known: Known) -> Tensor:
    """(max(beta, t) - t) / (max beta - t); 0 for a task whose |tau| or beta does not vary (high = low, max beta = t)."""
    t_N1, span_N1 = column(known["t"], beta_NB), column(spans(known), beta_NB)
    return beta_NB.clamp(min=t_N1).sub_(t_N1).div_(span_N1)


def spans(known: Known) -> list[float]:
    """max beta - t of each task, rounded to float32; infinite, which makes every scale 0, where the task has nothing to rank."""
    varies = np.array(known["high"]) > np.array(known["low"])
    return [float(x) for x in np.where(varies, spans_of(known["t"], known["beta_max"]), np.float32(np.inf))]


def scale_of_paper(beta_NB: Tensor, known: Known) -> Tensor:
    """beta where beta >= t, else 0, float32; 0 for a task that equals the base."""
    return torch.where(kept_by_paper(beta_NB, known), beta_NB, 0.0).float()


def kept_by_paper(beta_NB: Tensor, known: Known) -> Tensor:
    return beta_NB >= column(paper_t(known, len(beta_NB)), beta_NB)


def paper_t(known: Known, n: int) -> list[float]:
    """t of each task; infinite, which makes every scale 0, where the task equals the base."""
    diagonal = [known["pair_max"][p] for p, (i, j) in enumerate(pairs(n)) if i == j]
    return [t if largest > 0.0 else math.inf for t, largest in zip(known["t"], diagonal, strict=True)]


def combine(theta_B: Tensor, tauc_NB: Tensor, scale_NB: Tensor, lambdas: Sequence[float], lambda_: float, floor: float) -> Tensor:
    """theta + lambda sum_i(scale_i lambda_i tauc_i) / max(sum_i scale_i, floor).

    theta stays bit for bit where no task keeps the element, and where what they keep adds up to 0: adding that 0 would change a
    theta of -0."""
    total_B = sum_over_tasks(scale_NB)
    sum_B = sum_over_tasks((scale_NB * column(lambdas, scale_NB)).mul_(tauc_NB))
    changed_B = (total_B > 0.0) & (sum_B != 0.0)
    merged_B = sum_B.mul_(lambda_).div_(total_B.clamp(min=floor)).add_(theta_B)
    return torch.where(changed_B, merged_B, theta_B)


# --- the three variants as records ------------------------------------------------------------------------------------------------
def _clip_ranks(c: float, largest: str = "") -> Ranks:
    """low and high are order statistics of |tau|; the index expressions decide which element, exactly as written."""
    places = {"low": lambda D, _: int(D * c), "high": lambda D, _: int(D * (1 - c) - 1)}
    return Ranks(MAGNITUDE, places, largest)


def _drop_ranks(beta: Quantity) -> Ranks:
    """t = sorted(beta)[min(int(D (1 - r)), D - 1)], r the density."""
    return Ranks(beta, {"t": lambda D, own: min(int(D * (1 - own["density"])), D - 1)}, "beta_max")


def _keeps_nothing(settings: Settings, names: Sequence[str]) -> list[str]:
    D = settings.D
    return [
        f"{name}: wanted a density that keeps at least one of {D} merged elements, found {r}. Fix: the smallest that keeps some "
        f"is about {2 / D:.3g}."
        for name, r in zip(names, settings.each("density"), strict=True)
        if int(D * (1 - r)) >= D
    ]


def _may_overflow(known: Known, _settings: Settings, names: Sequence[str]) -> list[str]:
    """`released` multiplies by the sum of all tau; an infinite one times 0 is no number, and has no rank."""
    largest = known.get("tau_max", ())
    if sum(largest) <= FLOAT32_MAX:
        return []
    return [
        f"{name}: wanted differences to the base whose sum over all models is finite in float32, found one of {x:g}. "
        "Fix: exclude the tensor that holds it, or use `variant: pairwise`."
        for name, x in zip(names, largest, strict=True)
        if x > FLOAT32_MAX / (2 * len(names))
    ]


def _nothing_to_rank(known: Known, settings: Settings, names: Sequence[str], c: float) -> list[str]:
    found = []
    for name, r, low, high, t, top in zip(
        names, settings.each("density"), known["low"], known["high"], known["t"], known["beta_max"], strict=True
    ):
        if high == 0.0:
            found.append(
                f"{name}: equals the base but for at most {c:g} of all parameters, which clipping levels; "
                "it counts as a task and contributes nothing"
            )
        elif low == high:
            found.append(f"{name}: all its clipped differences to the base have one size, {low}; it contributes nothing")
        elif top == t:
            found.append(f"{name}: its drop threshold is its largest score, {t}; it contributes nothing: raise its density")
        elif t <= 0.0:
            found.append(_keeps_too_much(name, t, r))
    return found


def _paper_warnings(known: Known, settings: Settings, names: Sequence[str]) -> list[str]:
    found = []
    diagonal = [known["pair_max"][p] for p, (i, j) in enumerate(pairs(settings.N)) if i == j]
    for name, r, t, largest in zip(names, settings.each("density"), known["t"], diagonal, strict=True):
        if largest == 0.0:
            found.append(f"{name}: equals the base; it counts as a task and contributes nothing")
        elif t <= 0.0:
            found.append(_keeps_too_much(name, t, r))
    return found


def _keeps_too_much(name: str, t: float, density: float) -> str:
    return f"{name}: its drop threshold is {t}: density {density} also keeps parameters that conflict or were not touched; lower it"


def _clipped_arrays(known: Known, _settings: Settings) -> Mapping[str, NDArray[Any]]:
    """For _native.c, as far as the passes have come."""
    found = {name: np.array(known[name], dtype=np.float32) for name in ("low", "high", "t") if name in known}
    if "low" in known:
        found["range"] = spans_of(known["low"], known["high"])
    if "t" in known:
        found["span"] = np.array(spans(known), dtype=np.float32)
    return found


def _paper_arrays(known: Known, settings: Settings) -> Mapping[str, NDArray[Any]]:
    found: dict[str, NDArray[Any]] = {}
    if "pair_max" in known:
        least, most = np.array(known["pair_min"]), np.array(known["pair_max"])
        found |= {"pair_low": least, "pair_range": np.where(most > least, most - least, np.inf)}
    if "pair_sum" in known:
        found |= {
            "intra_factor": settings.D / np.array(known["intra_sum"]),
            "pair_factor": settings.D / np.array(known["pair_sum"]),
        }
    if "t" in known:
        found["paper_t"] = np.array(paper_t(known, settings.N))
    return found


PARAMETERS = {
    "density": Parameter(
        0.1, share_of_model, "the fraction of all parameters that is kept", True, searched="share", range=(0.01, 0.5)
    ),
    "lambda": lambda_parameter(),
}


def _clipped(variant: str, formula: str, beta: Quantity, clip_ranks: Ranks, c: float, question: int) -> Method:
    """`released` and `pairwise` differ in beta and in the clip alone."""

    def merge(block: Block, known: Known, settings: Settings) -> Tensor:
        tauc_NB, scale_NB = clip(block.tau, known)[1], scale_of(beta.of(block, known, settings), known)
        return combine(block.theta, tauc_NB, scale_NB, block.weights, settings.lambda_, FLOOR)

    def basis(block: Block, known: Known, settings: Settings) -> Tensor:
        tauc_NB, scale_NB = clip(block.tau, known)[1], scale_of(beta.of(block, known, settings), known)
        return _units(tauc_NB, scale_NB, FLOOR)

    return Method(
        name="pcb",
        variant=variant,
        merge=merge,
        formula=formula,
        source="Du et al., Parameter Competition Balancing for Model Merging, NeurIPS 2024",
        parameters=PARAMETERS,
        passes=(clip_ranks, _drop_ranks(beta)),
        unit="element",
        linear=True,
        basis=basis,
        scored=Scored(
            values=lambda block, known, _settings: clip(block.tau, known)[1],
            scores=beta,
            kept=lambda beta_NB, known: beta_NB > column(known["t"], beta_NB),
            threshold="t",
            share="density",
            combine=lambda theta_B, tauc_NB, beta_NB, known, lambdas, lambda_: combine(
                theta_B, tauc_NB, scale_of(beta_NB, known), lambdas, lambda_, FLOOR
            ),
        ),
        native=Native(question, _clipped_arrays, floor=FLOOR),
        refuse=_may_overflow,
        warnings=partial(_nothing_to_rank, c=c),
        impossible=_keeps_nothing,
        nearest_to=("sce",),
        hub_tag="pcb-merging",
    )


def _units(x_NB: Tensor, scale_NB: Tensor, floor: float) -> Tensor:
    """C [N, B]: row i is what the merge with the i-th unit vector adds to the base."""
    zero_B = torch.zeros_like(x_NB[0])
    return torch.stack([combine(zero_B, x_NB, scale_NB, unit, 1.0, floor) for unit in np.eye(len(x_NB)).tolist()])


BETA_RELEASED = Quantity("beta", lambda block, known, _settings: beta_released(block.tau, known), parameters=(), native=1)
BETA_PAIRWISE = Quantity("beta", lambda block, known, _settings: beta_pairwise(block.tau, known), parameters=(), native=2)
BETA_PAPER = Quantity("beta", lambda block, known, settings: beta_paper(block.tau, known, settings.D), 64, parameters=(), native=3)

PAIRWISE = _clipped(
    "pairwise",
    "intra = exp(N (z² - 1)), inter = sum_j tanh(s_i z_i s_j z_j), z the clipped, min-max scaled size of tau (1 % at each end), "
    "s its sign",
    BETA_PAIRWISE,
    _clip_ranks(CLIP_PAIRWISE),
    CLIP_PAIRWISE,
    question=2,
)
RELEASED = _clipped(
    "released",
    "the release's formula: inter = tanh(tau_i sum_j tau_j), clipped at 0.01 %",
    BETA_RELEASED,
    _clip_ranks(CLIP_RELEASED, "tau_max"),
    CLIP_RELEASED,
    question=1,
)


def _merge_paper(block: Block, known: Known, settings: Settings) -> Tensor:
    scale_NB = scale_of_paper(beta_paper(block.tau, known, settings.D), known)
    return combine(block.theta, block.tau, scale_NB, block.weights, settings.lambda_, 0.0)


def _combine_paper(
    theta_B: Tensor, tau_NB: Tensor, beta_NB: Tensor, known: Known, lambdas: Sequence[float], lambda_: float
) -> Tensor:
    return combine(theta_B, tau_NB, scale_of_paper(beta_NB, known), lambdas, lambda_, 0.0)


_PAPER_PASSES: tuple[Pass, ...] = (
    Extrema("pair products", lambda block, _known, _settings: pair_products(block.tau), "pair_min", "pair_max", (), "pcb_extrema"),
    Sums(
        "softmax sums",
        lambda block, known, _settings: torch.cat(paper_exponentials(block.tau, known)),
        {"intra_sum": lambda n: slice(0, n), "pair_sum": lambda n: slice(n, None)},
        parameters=(),
        native="pcb_paper_exponentials",
    ),
    _drop_ranks(BETA_PAPER),
)
PAPER = Method(
    name="pcb",
    variant="paper",
    merge=_merge_paper,
    formula="the paper's equations 1-3: products of softmaxes over the whole model, scored in float64",
    source=PAIRWISE.source,
    parameters=PARAMETERS,
    passes=_PAPER_PASSES,
    unit="element",
    element_bytes=lambda n: 8 * (6 * n + n * (n + 1)),
    linear=True,
    basis=lambda block, known, settings: _units(block.tau, scale_of_paper(beta_paper(block.tau, known, settings.D), known), 0.0),
    scored=Scored(
        values=lambda block, _known, _settings: block.tau,
        scores=BETA_PAPER,
        kept=kept_by_paper,
        threshold="t",
        share="density",
        combine=_combine_paper,
    ),
    # Beyond so many tasks exp64 of _native.c would need care for subnormal numbers.
    native=Native(3, _paper_arrays, most_models=700),
    warnings=_paper_warnings,
    impossible=_keeps_nothing,
    hub_tag="pcb-merging",
)
