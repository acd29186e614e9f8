"""The equations on one block: the released functions' own numbers, the oracle, and exp and tanh within the errors that they
claim."""

from __future__ import annotations

import math
from pathlib import Path

import mpmath
import numpy as np
import oracle
import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from pcb_ray.methods import ieee, pcb
from pcb_ray.methods.linear import linear
from pcb_ray.methods.task_arithmetic import task_arithmetic
from pcb_ray.methods.ties import ties

GOLDEN = sorted((Path(__file__).parent / "data").glob("*_r*.safetensors"))
PREFIX = {"released": "reference", "pairwise": "vision"}
CLIP = {"released": 1e-4, "pairwise": 1e-2}
BETA = {"released": pcb.beta_released, "pairwise": pcb.beta_pairwise}


def known_by_sort(tau_NB: Tensor, variant: str, r: float) -> dict[str, tuple[float, ...]]:
    """What is known of a model that is one block."""
    D = tau_NB.shape[1]
    known: dict[str, tuple[float, ...]] = {}
    if variant == "paper":
        products = pcb.pair_products(tau_NB)
        known = {"pair_min": tuple(products.amin(dim=1).tolist()), "pair_max": tuple(products.amax(dim=1).tolist())}
        intra_NB, pair_PB = pcb.paper_exponentials(tau_NB, known)
        known |= {"intra_sum": tuple(intra_NB.sum(dim=1).tolist()), "pair_sum": tuple(pair_PB.sum(dim=1).tolist())}
        beta_NB = pcb.beta_paper(tau_NB, known, D)
    else:
        ranked, c = tau_NB.abs().sort(dim=1).values, CLIP[variant]
        known = {"low": tuple(ranked[:, int(D * c)].tolist()), "high": tuple(ranked[:, int(D * (1 - c) - 1)].tolist())}
        beta_NB = BETA[variant](tau_NB, known)
    ranked = beta_NB.sort(dim=1).values
    return known | {"t": tuple(ranked[:, min(int(D * (1 - r)), D - 1)].tolist()), "beta_max": tuple(ranked[:, -1].tolist())}


# --- the released functions -------------------------------------------------------------------------------------------------------


def test_there_are_golden_files():
    assert len(GOLDEN) == 6


@pytest.mark.parametrize("variant", ["released", "pairwise"])
@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_the_released_functions_are_reproduced(path, variant):
    with safe_open(path, "pt") as file:
        r, tau_NB = float(file.metadata()["mask_ratio"]), file.get_tensor("tau")
        clamped_NB, scale_NB, merged_B = (file.get_tensor(f"{PREFIX[variant]}.{key}") for key in ("clamped", "scale", "merged"))
    known = known_by_sort(tau_NB, variant, r)
    _, tauc_NB = pcb.clip(tau_NB, known)
    ours_NB = pcb.scale_of(BETA[variant](tau_NB, known), known)
    assert torch.equal(tauc_NB, clamped_NB)
    assert torch.equal(ours_NB > 0, scale_NB > 0), "an element is kept differently"
    assert (ours_NB - scale_NB).abs().max() <= 1e-6
    theta_B = torch.zeros_like(merged_B)
    ours_B = pcb.combine(theta_B, tauc_NB, ours_NB, [1.0] * len(tau_NB), 1.0, pcb.FLOOR)
    assert (ours_B - merged_B).abs().max() <= 3e-7 * merged_B.abs().max()


# --- the oracle -------------------------------------------------------------------------------------------------------------------


def task_vectors(n: int, B: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    tau_NB = torch.randn(n, B, generator=generator) * torch.rand(n, B, generator=generator) ** 3
    return tau_NB * (torch.rand(n, B, generator=generator) < 0.8)


@pytest.mark.parametrize("n", [1, 2, 5, 12])
@pytest.mark.parametrize("variant", ["released", "pairwise", "paper"])
def test_scores_scales_and_merge_are_the_oracles(n, variant):
    tau_NB, r = task_vectors(n, 4001, seed=n), 0.13
    theta_B = torch.randn(4001, generator=torch.Generator().manual_seed(99))
    lambdas = [1.0, -0.5, 2.0, 0.0, 0.3, 1.0, 1.0, 0.7, 1.0, 1.0, 1.0, 1.0][:n]
    want = oracle.merge_pcb(theta_B, theta_B + tau_NB, variant=variant, density=r, weights=lambdas, lambda_=0.8, taus=tau_NB)
    known = known_by_sort(tau_NB, variant, r)
    if variant == "paper":
        beta_NB = pcb.beta_paper(tau_NB, known, 4001)
        scale_NB, tauc_NB, floor = pcb.scale_of_paper(beta_NB, known), tau_NB, 0.0
        torch.testing.assert_close(beta_NB, want.beta_ND, rtol=1e-13, atol=0)
        torch.testing.assert_close(scale_NB, want.scale_ND.float(), rtol=1e-6, atol=0)
    else:
        beta_NB = BETA[variant](tau_NB, known)
        scale_NB, (z_NB, tauc_NB), floor = (
            pcb.scale_of(beta_NB, known),
            pcb.clip(tau_NB, known),
            pcb.FLOOR,
        )
        assert list(known["low"]) == want.thresholds["low"]
        assert list(known["high"]) == want.thresholds["high"]
        assert torch.equal(tauc_NB, want.tauc_ND)
        assert z_NB.min() == 0
        assert z_NB.max() == 1
        torch.testing.assert_close(beta_NB, want.beta_ND, rtol=1e-6, atol=1e-6 if variant == "pairwise" else 1e-30)
        torch.testing.assert_close(scale_NB, want.scale_ND, rtol=0, atol=2e-6)
    assert torch.equal(scale_NB > 0, want.kept_ND)
    merged_B = pcb.combine(theta_B, tauc_NB, scale_NB, lambdas, 0.8, floor)
    torch.testing.assert_close(merged_B, want.merged_D, rtol=1e-5, atol=2e-6)
    untouched_B = ~want.kept_ND.any(dim=0)
    assert torch.equal(merged_B[untouched_B], theta_B[untouched_B])


@pytest.mark.parametrize("n", [1, 2, 5])
def test_the_baselines_are_the_oracles(n):
    tau_NB, lambdas = task_vectors(n, 2000, seed=n), [1.0, -0.4, 0.0, 2.0, 0.7][:n]
    theta_B = torch.randn(2000, generator=torch.Generator().manual_seed(98))
    models_NB = theta_B + tau_NB
    tau_NB = models_NB - theta_B
    ranked = tau_NB.abs().sort(dim=1).values
    low = tuple(ranked[:, max(2000 - int(2000 * 0.3) - 1, 0)].tolist())
    close = {"rtol": 1e-6, "atol": 1e-6}
    torch.testing.assert_close(linear(models_NB, lambdas), oracle.merge_linear(models_NB, lambdas), **close)
    torch.testing.assert_close(
        task_arithmetic(theta_B, tau_NB, lambdas, 0.6), oracle.merge_task_arithmetic(theta_B, models_NB, lambdas, 0.6), **close
    )
    want_B = oracle.merge_ties(theta_B, models_NB, lambdas, 0.6, 0.3)
    got_B = ties(theta_B, tau_NB, low, lambdas, 0.6)
    torch.testing.assert_close(got_B, want_B, **close)
    untouched_B = ~oracle.ties_agreement(tau_NB, 0.3).any(dim=0)
    assert torch.equal(got_B[untouched_B], theta_B[untouched_B])


def test_ties_gives_each_task_a_threshold_of_its_own_and_never_keeps_a_zero():
    tau_NB = torch.tensor([[3.0, 0.0, -1.0, 0.5], [1.0, 0.0, -3.0, -0.5]])
    merged_B = ties(torch.zeros(4), tau_NB, (0.0, 1.0), [1.0, 1.0], 1.0)
    assert merged_B.tolist() == [2.0, 0.0, -2.0, 0.5]


def test_a_hundred_tasks_neither_overflow_nor_vanish():
    tau_NB = task_vectors(100, 500)
    for variant, beta in BETA.items():
        known = known_by_sort(tau_NB, variant, 0.1)
        beta_NB = beta(tau_NB, known)
        assert beta_NB.isfinite().all()
        assert (pcb.scale_of(beta_NB, known) > 0).sum() > 1000


def test_pairs_are_numbered_row_by_row():
    assert pcb.pairs(3) == [(0, 0), (0, 1), (0, 2), (1, 1), (1, 2), (2, 2)]


# --- exp and tanh -----------------------------------------------------------------------------------------------------------------


def ulps(got: Tensor, exact: np.ndarray) -> float:
    """The largest error in units of the last place of the exact value (of a wider type), over normal results."""
    got_64, info = got.double().numpy(), torch.finfo(got.dtype)
    size = np.maximum(np.abs(exact.astype(np.float64)), info.tiny)
    unit = np.exp2(np.floor(np.log2(size))) * info.eps
    return float(np.max(np.abs(got_64.astype(exact.dtype) - exact) / unit))


def test_exp_is_within_one_ulp_in_float32():
    x = torch.cat([torch.linspace(-87.3, 20.0, 1_000_001), torch.linspace(-1, 1, 200_001), -torch.logspace(-30, 1.9, 10_001)])
    assert ulps(ieee.exp(x), np.exp(x.double().numpy())) <= 1.0
    assert (ieee.exp(torch.tensor([0.0, -0.0, -1e-30])) == 1.0).all()


def test_exp_fades_through_the_subnormal_numbers_to_zero():
    x = torch.linspace(-110.0, -87.0, 100_001)
    got, exact = ieee.exp(x).double().numpy(), np.exp(x.double().numpy())
    assert np.abs(got - exact).max() <= 2.0**-149 * 1.01
    assert ieee.exp(torch.tensor([-200.0, -1e30, -math.inf])).tolist() == [0.0, 0.0, 0.0]
    assert ieee.exp(torch.tensor([-800.0, -1e300], dtype=torch.float64)).tolist() == [0.0, 0.0]


def test_exp_is_within_one_ulp_in_float64():
    x = torch.cat([torch.linspace(-700.0, 20.0, 1501), torch.linspace(-1.0, 1.0, 1500)]).double() + 0.1234567890123e-3
    with mpmath.workprec(120):
        errors = []
        for value, got in zip(x.tolist(), ieee.exp(x).tolist(), strict=True):
            exact = mpmath.exp(mpmath.mpf(value))
            errors.append(abs(mpmath.mpf(got) - exact) / mpmath.mpf(math.ulp(float(exact))))
    assert max(errors) <= 1.0


def test_tanh_unit_is_within_its_claim_and_odd():
    """Over all numbers of this range: 1.11 ulp."""
    x = torch.cat([torch.linspace(-1.0, 1.0, 1_000_001), torch.logspace(-36, 0, 10_001)])
    assert ulps(ieee.tanh_unit(x), np.tanh(x.double().numpy())) <= 1.2
    assert torch.equal(ieee.tanh_unit(-x), -ieee.tanh_unit(x))
    tiny = torch.tensor([0.0, 1e-45, -1e-40])
    assert torch.equal(ieee.tanh_unit(tiny), tiny)


def test_tanh_is_within_two_ulp_everywhere_and_ends_at_one():
    x = torch.cat([torch.linspace(-12.0, 12.0, 1_000_001), torch.logspace(-36, 38, 20_001), -torch.logspace(0, 38, 1001)])
    got = ieee.tanh(x)
    assert ulps(got, np.tanh(x.double().numpy())) <= 2.0
    assert got.abs().max() <= 1.0
    assert torch.equal(ieee.tanh(-x), -got)
    assert ieee.tanh(torch.tensor([math.inf, -math.inf, 3e38])).tolist() == [1.0, -1.0, 1.0]
