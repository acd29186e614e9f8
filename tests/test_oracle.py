"""The oracle against the released functions' own numbers, plain Python in float64, and what must hold of any merge."""

from __future__ import annotations

import math
import random
from functools import partial
from pathlib import Path

import oracle
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from torch import Tensor

GOLDEN = sorted((Path(__file__).parent / "data").glob("*_r*.safetensors"))
VARIANTS = ["released", "pairwise", "paper"]
CLIPPED = ["released", "pairwise"]
PREFIX = {"released": "reference", "pairwise": "vision"}

quick = settings(max_examples=60, deadline=None, derandomize=True)


def pcb(tau, variant="pairwise", r=0.5, base=None, weights=None, lambda_=1.0):
    """merge_pcb on models that differ from the base by tau exactly, whatever the base."""
    tau_ND = torch.as_tensor(tau, dtype=torch.float32)
    base_D = torch.zeros(tau_ND.shape[1]) if base is None else torch.as_tensor(base, dtype=torch.float32)
    weights = [1.0] * len(tau_ND) if weights is None else weights
    models_ND = base_D + tau_ND
    return oracle.merge_pcb(base_D, models_ND, variant=variant, density=r, weights=weights, lambda_=lambda_, taus=tau_ND)


def same_bits(a: Tensor, b: Tensor) -> bool:
    assert a.dtype == b.dtype
    return a.shape == b.shape and torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


# --- the released functions -------------------------------------------------------------------------------------


def test_there_are_golden_files():
    assert len(GOLDEN) == 6


@pytest.mark.parametrize("variant", CLIPPED)
@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_the_text_reproduces_the_released_functions(path, variant):
    with safe_open(path, "pt") as file:
        density = float(file.metadata()["mask_ratio"])
        tau_ND = file.get_tensor("tau")
        clamped_ND, scale_ND, merged_D = (file.get_tensor(f"{PREFIX[variant]}.{key}") for key in ("clamped", "scale", "merged"))
    N, D = tau_ND.shape
    ours = oracle.merge_pcb(torch.zeros(D), tau_ND, variant=variant, density=density, weights=[1.0] * N)
    assert torch.equal(ours.kept_ND, scale_ND > 0)
    assert torch.equal(ours.tauc_ND, clamped_ND)
    assert (ours.scale_ND - scale_ND).abs().max() <= 1e-6
    assert (ours.merged_D - merged_D).abs().max() <= 3e-7 * merged_D.abs().max()


# --- plain Python, float64, lists -------------------------------------------------------------------------------


def plain_minmax(x):
    low, high = min(x), max(x)
    return [(v - low) / (high - low) for v in x]


def plain_softmax(x):
    total = math.fsum(math.exp(v) for v in x)
    return [math.exp(v) / total for v in x]


def plain_pcb(base, tau, variant, r, weights, lambda_):
    """(merged, scale) of tau without ties or constants."""
    N, D = len(tau), len(base)
    c = {"released": 0.0001, "pairwise": 0.01, "paper": None}[variant]
    used, z, scale = [], [], []
    for task in tau:
        ranked = sorted(abs(v) for v in task)
        low, high = (0.0, ranked[-1]) if c is None else (ranked[int(D * c)], ranked[int(D * (1 - c) - 1)])
        size = [min(max(abs(v), low), high) for v in task]
        used.append(list(task) if c is None else [math.copysign(s, v) for s, v in zip(size, task, strict=True)])
        z.append([(s - low) / (high - low) for s in size])
    for i in range(N):
        if variant == "paper":
            intra = plain_softmax([N * v for v in plain_minmax([t * t for t in tau[i]])])
            pairs = [plain_softmax(plain_minmax([a * b for a, b in zip(tau[i], tau[j], strict=True)])) for j in range(N)]
            inter = [sum(column) for column in zip(*pairs, strict=True)]
        else:
            intra = [math.exp(N * (v * v - 1)) for v in z[i]]
            inter = [
                math.tanh(tau[i][d] * sum(task[d] for task in tau))
                if variant == "released"
                else sum(math.tanh(math.copysign(z[i][d], tau[i][d]) * math.copysign(z[j][d], tau[j][d])) for j in range(N))
                for d in range(D)
            ]
        beta = [a * b for a, b in zip(intra, inter, strict=True)]
        t, top = sorted(beta)[min(int(D * (1 - r[i])), D - 1)], max(beta)
        if variant == "paper":
            scale.append([b if b >= t else 0.0 for b in beta])
        else:
            scale.append([(max(b, t) - t) / (top - t) for b in beta])
    merged = []
    for d in range(D):
        total = sum(scale[i][d] for i in range(N))
        weighted = sum(scale[i][d] * weights[i] * used[i][d] for i in range(N))
        merged.append(base[d] + lambda_ * weighted / total if total > 0 else base[d])
    return merged, scale


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("N", "r"), [(1, [0.4]), (2, [0.5, 0.5]), (3, [0.9, 0.7, 0.2]), (5, [1.0] * 5)])
def test_lambda_weights_densities_and_base_enter_as_in_plain_python(variant, N, r):
    rng = random.Random(f"{N}")
    D = 250  # 1 % of it clips 2 elements below and 3 above
    base = [rng.randrange(-64, 64) / 64 for _ in range(D)]  # few bits, so that models - base is tau exactly
    tau = [[rng.choice([-1, 1]) * rng.randrange(1, 2**14) / 2**13 for _ in range(D)] for _ in range(N)]
    weights, lambda_ = [0.5 + i for i in range(N)], 0.7
    merged, scale = plain_pcb(base, tau, variant, r, weights, lambda_)

    base_D, tau_ND = torch.tensor(base), torch.tensor(tau)
    ours = oracle.merge_pcb(base_D, base_D + tau_ND, variant=variant, density=r, weights=weights, lambda_=lambda_)
    expected_ND = torch.tensor(scale, dtype=torch.float64)
    if variant == "paper":
        assert torch.equal(ours.kept_ND, expected_ND > 0)
        torch.testing.assert_close(ours.scale_ND, expected_ND * D * D, rtol=1e-12, atol=0)
    else:
        assert torch.equal(ours.scale_ND > 1e-6, expected_ND > 1e-6)
        torch.testing.assert_close(ours.scale_ND.double(), expected_ND, rtol=0, atol=2e-6)
    # Where all scales are tiny their quotient is all rounding; nearly all elements are clear of that.
    clear_D = expected_ND.amax(dim=0) > (0 if variant == "paper" else 1e-2)
    clear_D |= (expected_ND == 0).all(dim=0)
    assert clear_D.sum() > 0.8 * D
    torch.testing.assert_close(ours.merged_D[clear_D], torch.tensor(merged)[clear_D], rtol=1e-5, atol=1e-5)
    assert ours.merged_D.dtype == torch.float32


def test_paper_is_equations_1_to_3_on_three_elements():
    e = math.exp
    ours = pcb([[0.0, 1.0, 2.0]], "paper", r=0.5)  # tau^2 = 0 1 4; minmax = 0 1/4 1; t is the middle one
    soft = [w / (1 + e(0.25) + e(1)) for w in (1, e(0.25), e(1))]
    expected = [[0.0, 9 * soft[1] ** 2, 9 * soft[2] ** 2]]
    torch.testing.assert_close(ours.scale_ND, torch.tensor(expected, dtype=torch.float64))
    assert ours.merged_D.tolist() == [0.0, 1.0, 2.0]
    assert sorted(ours.thresholds) == ["beta_max", "t"]
    assert ours.thresholds["t"] == pytest.approx([expected[0][1]])


def test_paper_takes_a_constant_pair_product_as_a_uniform_softmax():
    e = math.exp
    ours = pcb([[1.0, 2.0, 4.0], [4.0, 2.0, 1.0]], "paper", r=1.0)  # products: 1 4 16 | 4 4 4 | 16 4 1
    own = [w / (1 + e(0.2) + e(1)) for w in (1, e(0.2), e(1))]
    intra = [w / (1 + e(0.4) + e(2)) for w in (1, e(0.4), e(2))]
    beta = [9 * a * (b + 1 / 3) for a, b in zip(intra, own, strict=True)]
    torch.testing.assert_close(ours.beta_ND, torch.tensor([beta, beta[::-1]], dtype=torch.float64))
    middle = (2.0 * beta[1] + 2.0 * beta[1]) / (beta[1] + beta[1])
    end = (1.0 * beta[0] + 4.0 * beta[2]) / (beta[0] + beta[2])
    torch.testing.assert_close(ours.merged_D, torch.tensor([end, middle, end]))


def test_paper_keeps_the_elements_at_the_threshold():
    ours = pcb([[0.0, 1.0, 2.0, 3.0]], "paper", r=0.25)  # t is the maximum itself
    assert ours.kept_ND.tolist() == [[False, False, False, True]]


def test_paper_in_float64_tells_apart_what_float32_ties():
    tau_D = torch.cat([torch.tensor([1e4]), 1 + torch.arange(1000) / 1000])
    beta_D = pcb(tau_D[None], "paper").beta_ND[0]
    assert len(beta_D.unique()) == 1001 > 10 * len(beta_D.float().unique())


BASE = [10.0, 20.0, 30.0, 40.0]
MODELS = [
    [11.0, 18.0, 30.0, 40.0],
    [14.0, 19.0, 33.0, 40.0],
    [8.0, 24.0, 30.0, 40.0],
]  # tau: 1 -2 0 0 | 4 -1 3 0 | -2 4 0 0


def test_linear_is_the_weighted_mean_and_does_not_look_at_the_base():
    merged = oracle.merge_linear(torch.tensor(MODELS), [1.0, 2.0, 5.0])
    assert merged.tolist() == [(11 + 28 + 40) / 8, (18 + 38 + 120) / 8, (30 + 66 + 150) / 8, 40.0]
    with pytest.raises(ValueError, match="sum to 0"):
        oracle.merge_linear(torch.tensor(MODELS), [1.0, 1.0, -2.0])


def test_task_arithmetic_adds_weighted_task_vectors():
    merged = oracle.merge_task_arithmetic(torch.tensor(BASE), torch.tensor(MODELS), [1.0, 2.0, 0.5], 0.5)
    assert merged.tolist() == [10 + 0.5 * (1 + 8 - 1), 20 + 0.5 * (-2 - 2 + 2), 30 + 0.5 * 6, 40.0]


def test_ties_trims_elects_and_averages_the_agreeing():
    # r = 0.25, D = 4: the threshold is sorted(|tau|)[4 - 1 - 1], the third of four.
    # |tau| sorted: 0 0 1 2 -> 1 | 0 1 3 4 -> 3 | 0 0 2 4 -> 2. Kept: 1 -2 . . | 4 . 3 . | -2 4 . .
    # Sums of the kept: 3 2 3 0 -> all +. Agreeing: elements {1, 2}, {3}, {2}, none.
    merged = oracle.merge_ties(torch.tensor(BASE), torch.tensor(MODELS), [1.0, 2.0, 0.5], 0.5, 0.25)
    assert merged.tolist() == [10 + 0.5 * (1 * 1 + 2 * 4) / 2, 20 + 0.5 * (0.5 * 4) / 1, 30 + 0.5 * (2 * 3) / 1, 40.0]


def test_ties_elects_without_the_weights_and_counts_a_zero_sum_as_plus():
    base = torch.zeros(3)
    models = torch.tensor([[3.0, -2.0, 1.0], [-1.0, 2.0, -4.0]])  # sums 2 0 -3
    merged = oracle.merge_ties(base, models, [1.0, 100.0], 1.0, 1.0)
    assert merged.tolist() == [3.0, 200.0, -400.0]


def test_ties_elects_from_what_is_kept_alone():
    models = torch.tensor([[3.0, 1.0], [-4.0, 8.0]])  # each keeps its larger: the -4 has no vote
    assert oracle.merge_ties(torch.zeros(2), models, [1.0, 1.0], 1.0, 0.01).tolist() == [3.0, 8.0]


def test_ties_keeps_equal_magnitudes_at_the_threshold_but_never_zeros():
    models = torch.tensor([[0.0, 0.0, 0.0, 2.0, -2.0, 2.0]])
    merged = oracle.merge_ties(torch.ones(6), models + 1, [1.0], 1.0, 0.01)
    assert merged.tolist() == [1.0, 1.0, 1.0, 3.0, -1.0, 3.0]
    assert oracle.ties_agreement(models, 1.0).tolist() == [[False, False, False, True, True, True]]


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_hundred_tasks_do_not_overflow(variant):
    ours = pcb(torch.arange(-150.0, 150.0).repeat(100, 1) / 100, variant)
    assert ours.beta_ND.isfinite().all()
    assert ours.merged_D.isfinite().all()
    if variant == "pairwise":
        assert ours.thresholds["beta_max"] == pytest.approx([100 * math.tanh(1)] * 100)  # z = 1: exp(0) * sum tanh(1)


# --- ranks and degenerate tasks ---------------------------------------------------------------------------------


def test_ranks_are_float_expressions_truncated_as_written():
    counting_ND = torch.arange(1.0, 11.0)[None]
    assert 10 * (1 - 0.9) < 1  # so t is the smallest beta, not the second: 9 are kept, the smallest is not
    assert pcb(counting_ND, "pairwise", r=0.9).kept_ND.sum() == 9
    assert 100 * 0.29 < 29  # so the threshold of ties is sorted[100 - 28 - 1]
    assert oracle.ties_agreement(torch.arange(1.0, 101.0)[None], 0.29).sum() == 29


@pytest.mark.parametrize(("variant", "low", "high"), [("pairwise", 3.0, 296.0), ("released", 0.0, 298.0)])
def test_low_and_high_are_the_ranks_of_the_text(variant, low, high):
    D = 300  # int(300 * 0.01) = 3, int(300 * 0.99 - 1) = 296; int(0.03) = 0, int(299.97 - 1) = 298
    tau = [d * (-1) ** d for d in range(D)]
    random.Random(0).shuffle(tau)
    ours = pcb([tau], variant)
    assert ours.thresholds["low"] == [low]
    assert ours.thresholds["high"] == [high]
    assert ours.tauc_ND.abs().max() == high


@pytest.mark.parametrize("r", [0.0, -0.1, 1.5, 1e-18, math.nan])
def test_a_density_that_keeps_nothing_is_refused(r):
    with pytest.raises(ValueError, match="density"):
        pcb([[1.0, 2.0, 3.0]], r=r)
    with pytest.raises(ValueError, match="density"):
        oracle.merge_ties(torch.zeros(3), torch.ones(1, 3), [1.0], 1.0, r)


def test_one_density_per_task_is_one_per_task():
    with pytest.raises(ValueError, match="2 densities for 1"):
        pcb([[1.0, 2.0, 3.0]], r=[0.5, 0.5])


def test_an_unknown_variant_is_refused():
    with pytest.raises(ValueError, match="paired"):
        pcb([[1.0, 2.0]], "paired")


@pytest.mark.parametrize("variant", CLIPPED)
def test_a_task_of_one_magnitude_is_scaled_to_zero_and_leaves_the_others_finite(variant):
    signs = [1.0, -1.0] * 100
    other = [d - 100 + 0.5 for d in range(200)]
    ours = pcb([signs, other], variant)
    assert not ours.kept_ND[0].any()
    assert ours.kept_ND[1].any()
    assert ours.merged_D.isfinite().all()
    assert ours.thresholds["low"][0] == ours.thresholds["high"][0] == 1.0
    assert ours.thresholds["t"][0] == ours.thresholds["beta_max"][0] == 0.0


def test_a_task_of_one_magnitude_counts_as_z_zero_in_the_pairs_of_others():
    other = [d - 100 + 0.5 for d in range(200)]
    beside_signs = pcb([[1.0, -1.0] * 100, other]).beta_ND[1]
    beside_base = pcb([[0.0] * 200, other]).beta_ND[1]
    assert same_bits(beside_signs, beside_base)


def test_paper_scores_a_task_of_one_magnitude_uniformly():
    ours = pcb([[1.0, -1.0, 1.0, -1.0]], "paper", r=0.5)
    assert ours.beta_ND.tolist() == [[1.0] * 4]
    assert ours.kept_ND.all()  # all are at the threshold


def test_where_max_beta_is_the_threshold_the_scale_is_zero():
    tau = [[float(d) for d in range(10)]]
    for variant in CLIPPED:
        ours = pcb(tau, variant, r=0.05, base=[-0.0] * 10)  # int(10 * 0.95) = 9: the maximum
        assert ours.thresholds["t"] == ours.thresholds["beta_max"]
        assert not ours.kept_ND.any()
        assert same_bits(ours.merged_D, torch.tensor([-0.0] * 10))


# --- what holds of any merge ------------------------------------------------------------------------------------


@st.composite
def tasks(draw, N=None, D=None):
    """tau [N, D] of few distinct values, as bfloat16 leaves them: zeros and ties are the normal case, tiny D too."""
    N = draw(st.integers(1, 4)) if N is None else N
    D = draw(st.integers(1, 12) | st.integers(13, 400)) if D is None else D
    top = draw(st.sampled_from([1, 3, 24]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    return torch.randint(-top, top + 1, (N, D), generator=generator) / 16  # sums and products are exact in float32


variants = st.sampled_from(VARIANTS)
ratios = st.sampled_from([0.05, 0.1, 0.3, 0.5, 0.9, 1.0])
two_tasks = tasks(N=2)


@quick
@given(tasks(), variants, ratios)
def test_no_merge_has_a_nan_and_kept_means_above_the_threshold(tau_ND, variant, r):
    ours = pcb(tau_ND, variant, r)
    assert ours.merged_D.isfinite().all()
    assert ours.scale_ND.isfinite().all()
    assert (ours.scale_ND >= 0).all()
    for i, (t, beta_max) in enumerate(zip(ours.thresholds["t"], ours.thresholds["beta_max"], strict=True)):
        beta_D = ours.beta_ND[i]
        index = min(int(len(beta_D) * (1 - r)), len(beta_D) - 1)
        assert (beta_D < t).sum() <= index < (beta_D <= t).sum()  # t has the rank `index`
        assert beta_max == beta_D.max()
        if variant != "paper":
            assert torch.equal(ours.kept_ND[i], beta_D > t)
            assert ours.scale_ND[i].max() in ([0.0] if t == beta_max else [1.0])
        elif tau_ND[i].any():
            assert torch.equal(ours.kept_ND[i], beta_D >= t)
            assert torch.equal(ours.scale_ND[i][beta_D >= t], beta_D[beta_D >= t])


@quick
@given(two_tasks, variants, ratios)
def test_the_order_of_two_models_does_not_matter(tau_ND, variant, r):
    one = pcb(tau_ND, variant, r, weights=[1.5, 0.5])
    other = pcb(tau_ND.flip(0), variant, r, weights=[0.5, 1.5])
    assert torch.equal(one.scale_ND, other.scale_ND.flip(0))
    assert torch.equal(one.merged_D, other.merged_D)


@quick
@given(tasks(), ratios, st.randoms(use_true_random=False))
def test_the_order_of_models_changes_ties_only_in_rounding(tau_ND, r, rng):
    order = rng.sample(range(len(tau_ND)), len(tau_ND))
    weights = [1.0 + i for i in range(len(tau_ND))]
    base_D = torch.zeros(tau_ND.shape[1])
    one = oracle.merge_ties(base_D, tau_ND, weights, 1.0, r)
    other = oracle.merge_ties(base_D, tau_ND[order], [weights[i] for i in order], 1.0, r)
    torch.testing.assert_close(one, other)


@quick
@given(tasks(), st.sampled_from(CLIPPED), ratios, st.randoms(use_true_random=False))
def test_the_order_of_elements_does_not_matter(tau_ND, variant, r, rng):
    order = rng.sample(range(tau_ND.shape[1]), tau_ND.shape[1])
    one, other = pcb(tau_ND, variant, r), pcb(tau_ND[:, order], variant, r)
    assert one.thresholds == other.thresholds
    assert torch.equal(one.scale_ND[:, order], other.scale_ND)
    assert torch.equal(one.merged_D[order], other.merged_D)


@quick
@given(tasks(), variants, ratios)
def test_negated_task_vectors_give_the_negated_update(tau_ND, variant, r):
    one, other = pcb(tau_ND, variant, r), pcb(-tau_ND, variant, r)
    assert torch.equal(one.scale_ND, other.scale_ND)
    assert torch.equal(one.merged_D, -other.merged_D)


@quick
@given(tasks(), variants, ratios)
def test_the_sign_of_a_zero_does_not_matter(tau_ND, variant, r):
    one, other = pcb(tau_ND, variant, r), pcb(torch.where(tau_ND == 0, -0.0, tau_ND), variant, r)
    assert repr(one.thresholds) == repr(other.thresholds)
    assert torch.equal(one.scale_ND, other.scale_ND)
    assert torch.equal(one.merged_D, other.merged_D)


@quick
@given(two_tasks, st.sampled_from(["pairwise", "paper"]), ratios, st.integers(-8, 8))
def test_the_scales_do_not_see_the_length_of_a_task_vector(tau_ND, variant, r, exponent):
    longer_ND = tau_ND * torch.tensor([[1.0], [2.0**exponent]])  # a power of two loses no bit
    assert torch.equal(pcb(tau_ND, variant, r).scale_ND, pcb(longer_ND, variant, r).scale_ND)


def test_the_released_scales_do_see_the_length():
    tau_ND = torch.tensor([[0.25 * d for d in range(20)]])
    assert not torch.equal(pcb(tau_ND, "released").scale_ND, pcb(tau_ND * 2, "released").scale_ND)


@quick
@given(two_tasks, variants, ratios)
def test_lambdas_do_not_enter_the_scales_and_a_zero_weight_still_competes(tau_ND, variant, r):
    one = pcb(tau_ND, variant, r)
    other = pcb(tau_ND, variant, r, weights=[0.0, 3.0], lambda_=0.25)
    assert one.thresholds == other.thresholds
    assert torch.equal(one.scale_ND, other.scale_ND)


@quick
@given(tasks(), variants, ratios)
def test_doubling_the_weights_is_doubling_lambda(tau_ND, variant, r):
    weights = [1.0 + i for i in range(len(tau_ND))]
    one = pcb(tau_ND, variant, r, weights=[2 * w for w in weights])
    other = pcb(tau_ND, variant, r, weights=weights, lambda_=2.0)
    assert torch.equal(one.merged_D, other.merged_D)


@quick
@given(tasks(N=1), variants, ratios, st.integers(1, 4))
def test_copies_of_one_model_merge_to_its_clipped_self_where_it_is_kept(tau_1D, variant, r, N):
    ours = pcb(tau_1D.repeat(N, 1), variant, r)
    assert torch.equal(ours.scale_ND, ours.scale_ND[:1].expand(N, -1))
    sure_D = ours.scale_ND[0] > 1e-12
    torch.testing.assert_close(ours.merged_D[sure_D], ours.tauc_ND[0][sure_D])
    assert torch.equal(ours.merged_D[~ours.kept_ND[0]], torch.zeros(int((~ours.kept_ND[0]).sum())))


@quick
@given(tasks(), st.integers(0, 3), variants, ratios)
def test_a_model_equal_to_the_base_counts_but_keeps_nothing(tau_ND, where, variant, r):
    tau_ND = tau_ND.clone()
    i = where % len(tau_ND)
    tau_ND[i] = 0
    ours = pcb(tau_ND, variant, r)
    assert not ours.kept_ND[i].any()
    assert not ours.beta_ND[i].any()
    assert ours.thresholds["t"][i] == ours.thresholds["beta_max"][i] == 0


@quick
@given(tasks(D=150), variants)
def test_at_density_one_all_but_the_lowest_scores_are_kept(tau_ND, variant):
    ours = pcb(tau_ND, variant, 1.0)
    for i in range(len(tau_ND)):
        if ours.thresholds["t"][i] != ours.thresholds["beta_max"][i]:
            lowest_D = ours.beta_ND[i] == ours.beta_ND[i].min()
            assert torch.equal(ours.kept_ND[i], torch.ones_like(lowest_D) if variant == "paper" else ~lowest_D)


@quick
@given(tasks(), variants, st.sampled_from([(0.1, 0.3), (0.3, 0.9), (0.5, 1.0)]))
def test_a_higher_density_keeps_all_that_a_lower_one_keeps(tau_ND, variant, ratios):
    less, more = (pcb(tau_ND, variant, r).kept_ND for r in ratios)
    assert (more | ~less).all()


@quick
@given(tasks(), ratios, st.sampled_from([*VARIANTS, "ties"]))
def test_where_no_task_keeps_an_element_the_base_stays_bit_for_bit(tau_ND, r, method):
    base_D = torch.tensor([-0.0, 0.0, 1e-45, -1e38, 0.1]).repeat(80)[: tau_ND.shape[1]]
    if method == "ties":
        tau_ND = (base_D + tau_ND) - base_D
        untouched_D = ~oracle.ties_agreement(tau_ND, r).any(dim=0)
        merged_D = oracle.merge_ties(base_D, base_D + tau_ND, [0.5] * len(tau_ND), -1.0, r)
    else:
        ours = pcb(tau_ND, method, r, base=base_D, lambda_=-1.0)
        untouched_D, merged_D = ~ours.kept_ND.any(dim=0), ours.merged_D
    assume(untouched_D.any())
    assert same_bits(merged_D[untouched_D], base_D[untouched_D])


@quick
@given(tasks(), ratios)
def test_every_ties_update_has_the_elected_sign(tau_ND, r):
    update_D = oracle.merge_ties(torch.zeros(tau_ND.shape[1]), tau_ND, [1.0] * len(tau_ND), 1.0, r)
    agrees_ND = oracle.ties_agreement(tau_ND, r)
    assert torch.equal(update_D != 0, agrees_ND.any(dim=0))
    assert torch.equal(agrees_ND, agrees_ND & (tau_ND.sign() == update_D.sign()))


# --- whole models -----------------------------------------------------------------------------------------------


def family(N=3, dtype=torch.bfloat16):
    generator = torch.Generator().manual_seed(5)
    shapes = {"b.weight": (40, 7), "a.bias": (33,), "c.norm": (1,), "a.scalar": ()}
    base = {name: torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for name, shape in shapes.items()}
    models = [
        {name: (t + 0.05 * torch.randn(t.shape, generator=generator)).to(dtype) for name, t in base.items()} for _ in range(N)
    ]
    return base, models


METHODS = {
    "pcb": lambda base, models, w: oracle.merge_pcb(base, models, variant="pairwise", density=0.3, weights=w, lambda_=0.8).merged_D,
    "ties": lambda base, models, w: oracle.merge_ties(base, models, w, 0.8, 0.3),
    "task_arithmetic": lambda base, models, w: oracle.merge_task_arithmetic(base, models, w, 0.8),
    "linear": lambda _base, models, w: oracle.merge_linear(models, w),
}
merge = partial(oracle.merge_state_dicts, density=0.3, lambda_=0.8)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [None, torch.float16, torch.float32])
def test_a_model_is_merged_as_one_float32_vector_and_rounded_once(method, dtype):
    base, models = family()
    weights = [1.0, 0.5, 2.0]
    names = ["a.bias", "a.scalar", "b.weight", "c.norm"]
    flat = [torch.cat([state[name].float().flatten() for name in names]) for state in (base, *models)]
    expected_D = METHODS[method](flat[0], torch.stack(flat[1:]), weights).to(dtype or torch.bfloat16)

    merged = merge(base, models, method, weights=weights, dtype=dtype)
    assert list(merged) == list(base)
    assert all(merged[name].shape == base[name].shape for name in base)
    assert same_bits(torch.cat([merged[name].flatten() for name in names]), expected_D)


def test_integers_excluded_and_tied_tensors_do_not_count():
    base, models = family()
    expected = merge(base, models)
    extra = {"ids": torch.tensor([3]), "mask": torch.tensor([True]), "rope.inv_freq": torch.tensor([1.0])}
    base = base | extra | {"head.weight": base["b.weight"]}
    models = [model | {"ids": torch.tensor([i]), "rope.inv_freq": torch.ones(2)} for i, model in enumerate(models)]
    merged = merge(base, models, exclude=["*.inv_freq"], tied={"head.weight": "b.weight"})
    assert all(same_bits(merged[name], tensor) for name, tensor in (expected | extra).items())
    assert merged["head.weight"] is merged["b.weight"]


def test_a_weight_may_differ_by_tensor():
    base, models = family(N=2)
    by_name = dict.fromkeys(base, 0.0) | {"b.weight": 2.0}
    merged = merge(base, models, "task_arithmetic", weights=[by_name, 0.0])
    only = merge(base, models, "task_arithmetic", weights=[2.0, 0.0])
    assert same_bits(merged["b.weight"], only["b.weight"])
    assert same_bits(merged["a.bias"], base["a.bias"])


@pytest.mark.parametrize("method", ["pcb", "ties"])
def test_an_untouched_float64_base_keeps_its_bits(method):
    base, models = family(dtype=torch.float64)
    as_float = {name: t.float() for name, t in base.items()}
    untouched, bits = 0, 0
    merged = merge(base, models, method, density=0.1)
    in_float32 = merge(as_float, [{n: t.float() for n, t in m.items()} for m in models], method, density=0.1)
    for name, theta in base.items():
        same = in_float32[name] == as_float[name]
        untouched += int(same.sum())
        bits += int((merged[name] == theta)[same].sum())
        assert torch.equal(merged[name].float(), in_float32[name])
    assert untouched == bits > 100
    assert any((theta != theta.float()).any() for theta in base.values())


def test_what_cannot_be_merged_is_refused():
    base, models = family(N=1)
    with pytest.raises(ValueError, match=r"c\.norm: model 0"):
        merge(base, [{name: t for name, t in models[0].items() if name != "c.norm"}])
    with pytest.raises(ValueError, match=r"a\.bias: model 0"):
        merge(base, [models[0] | {"a.bias": torch.ones(32)}])
    with pytest.raises(ValueError, match=r"a\.bias: .*not finite"):
        merge(base, [models[0] | {"a.bias": torch.full((33,), math.nan)}])
    with pytest.raises(ValueError, match=r"c\.norm: .*overflows torch\.float16"):
        merge(base, [models[0] | {"c.norm": torch.tensor([1e6])}], "linear", dtype=torch.float16)
    with pytest.raises(ValueError, match="mean"):
        merge(base, models, "mean")
