"""The native kernel and torch give the same bits, and keys sort like the values that they stand for."""

from __future__ import annotations

import importlib.util
import math
import shutil

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pcb_ray import pcb
from pcb_ray.answers import LARGEST_KEY, Thresholds, value_of_key
from pcb_ray.kernels import NativeKernel, TorchKernel, choose_kernel, keys
from pcb_ray.selection import Bracket

quick = settings(max_examples=60, deadline=None, derandomize=True)
CPU = torch.device("cpu")
built = importlib.util.find_spec("pcb_ray._native") is not None
needs_native = pytest.mark.skipif(not built, reason="the native extension was not built: no C compiler at installation")
FUSED = ("pcb-released", "pcb-pairwise")

SMALLEST, HUGE = 2.0**-149, 8e37  # the smallest subnormal; four times HUGE is still finite
SPECIAL = (0.0, -0.0, SMALLEST, -SMALLEST, 1e-40, -1e-40, 2.0**-126, 1e-20, 0.5, 1.0, -1.0, 1.0000001, 3.0, 9.0, 20.0, HUGE, -HUGE)


def bits(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.int32 if x.dtype == torch.float32 else torch.int64)


def assert_same_bits(a: Tensor, b: Tensor) -> None:
    assert a.dtype == b.dtype
    assert a.shape == b.shape
    differ = torch.nonzero((bits(a) != bits(b)).reshape(-1)).reshape(-1)
    assert not len(differ), [(int(k), a.reshape(-1)[k].item(), b.reshape(-1)[k].item()) for k in differ[:5]]
    assert not a.isnan().any()


@st.composite
def blocks(draw: st.DrawFn, most_tasks: int = 6) -> tuple[Tensor, Tensor]:
    """theta [B] and tau [N, B], tau as rows of a wider buffer from some offset on."""
    n, B = draw(st.integers(1, most_tasks)), draw(st.sampled_from([1, 2, 3, 7, 63, 511, 512, 513, 1000, 1024, 1537]))
    offset, gap = draw(st.integers(0, 9)), draw(st.integers(0, 9))
    generator = np.random.default_rng(draw(st.integers(0, 2**32)))
    buffer = np.empty((n, offset + B + gap), dtype=np.float32)
    for row in buffer:
        kind = draw(st.sampled_from(["normal", "large", "few values", "special", "constant", "bits"]))
        if kind == "normal":
            row[:] = generator.normal(size=len(row)) * 10.0 ** draw(st.integers(-6, 1))
        elif kind == "large":
            row[:] = generator.normal(size=len(row)) * 10.0 ** generator.integers(-44, 37, size=len(row))
        elif kind == "few values":
            row[:] = generator.integers(-3, 4, size=len(row)) * 0.125
        elif kind == "special":
            row[:] = generator.choice(SPECIAL, size=len(row))
        elif kind == "constant":
            row[:] = draw(st.sampled_from(SPECIAL))
        else:  # any finite bits, up to HUGE
            row[:] = generator.integers(0, np.float32(HUGE).view(np.int32), size=len(row)).astype(np.int32).view(np.float32)
            row[:] *= generator.choice([-1.0, 1.0], size=len(row))
    if n == 6:
        buffer /= 2  # the sum over tasks must be finite
    theta = generator.choice([*SPECIAL, 0.1, -0.3], size=B).astype(np.float32)
    return torch.from_numpy(theta), torch.from_numpy(buffer)[:, offset : offset + B]


@st.composite
def thresholds_for(draw: st.DrawFn, tau_NB: Tensor, method: str) -> Thresholds:
    """low and high from the data or far from it; t below, among and above the scores."""
    low, high = [], []
    for x_B in tau_NB:
        ranked = x_B.abs().sort().values
        a, b = sorted((draw(st.integers(0, len(ranked) - 1)), draw(st.integers(0, len(ranked) - 1))))
        choice = draw(st.sampled_from(["ranks", "equal", "apart", "close"]))
        low_i, high_i = {
            "ranks": (ranked[a].item(), ranked[b].item()),
            "equal": (ranked[a].item(), ranked[a].item()),
            "apart": (0.0, 2 * HUGE),
            "close": (0.25, float(np.nextafter(np.float32(0.25), np.float32(1)))),
        }[choice]
        low.append(low_i)
        high.append(high_i)
    result = Thresholds(low=tuple(low), high=tuple(high))
    beta_NB = TorchKernel(method, len(tau_NB), 1, CPU).beta(tau_NB, result)
    t, top = [], []
    for beta_B in beta_NB:
        ranked = beta_B.sort().values
        rank = draw(st.integers(0, len(ranked) - 1))
        t.append(draw(st.sampled_from([ranked[rank].item(), 0.0, -0.5, ranked[-1].item()])) + 0.0)
        top.append(ranked[-1].item() + 0.0)
    return result.replace(t=tuple(t), beta_max=tuple(top))


def test_the_native_kernel_was_built_where_there_is_a_compiler():
    if shutil.which("gcc"):
        assert built, "gcc is here, so installing pcb_ray must build pcb_ray._native"


@needs_native
def test_the_native_kernel_is_chosen_on_a_cpu_and_torch_on_request(monkeypatch):
    monkeypatch.delenv("PCB_RAY_KERNEL", raising=False)
    assert choose_kernel("pcb-pairwise", 2, 10, CPU).name == "native"
    monkeypatch.setenv("PCB_RAY_KERNEL", "torch")
    assert choose_kernel("pcb-pairwise", 2, 10, CPU).name == "torch"
    assert choose_kernel("pcb-pairwise", 2, 10, torch.device("meta")).name == "torch"


@needs_native
@pytest.mark.parametrize("method", FUSED)
@quick
@given(data=st.data(), block=blocks())
def test_native_scores_have_the_bits_of_torch(method, data, block):
    _, tau_NB = block
    thresholds = data.draw(thresholds_for(tau_NB, method))
    native, plain = (kind(method, len(tau_NB), 1, CPU) for kind in (NativeKernel, TorchKernel))
    assert_same_bits(native.beta(tau_NB, thresholds), plain.beta(tau_NB, thresholds))


@needs_native
@pytest.mark.parametrize("method", FUSED)
@quick
@given(
    data=st.data(),
    block=blocks(),
    lambda_=st.sampled_from([1.0, 0.3, -2.5, 0.0]),
    weights=st.lists(st.sampled_from([1.0, 0.7, -0.3, 0.0]), min_size=6, max_size=6),
)
def test_a_native_merge_has_the_bits_of_torch(method, data, block, lambda_, weights):
    theta_B, tau_NB = block
    thresholds = data.draw(thresholds_for(tau_NB, method))
    native, plain = (kind(method, len(tau_NB), 1, CPU) for kind in (NativeKernel, TorchKernel))
    arguments = (thresholds, weights[: len(tau_NB)], lambda_)
    assert_same_bits(native.merge(theta_B, tau_NB, *arguments), plain.merge(theta_B, tau_NB, *arguments))


@pytest.mark.parametrize("kernel", [TorchKernel, pytest.param(NativeKernel, marks=needs_native)])
@pytest.mark.parametrize("method", FUSED)
@quick
@given(data=st.data(), block=blocks(4), cut=st.integers(0, 1537))
def test_a_cut_block_merges_to_the_bits_of_the_whole(kernel, method, data, block, cut):
    theta_B, tau_NB = block
    thresholds = data.draw(thresholds_for(tau_NB, method))
    one = kernel(method, len(tau_NB), 1, CPU)
    weights = [1.0, -0.5, 0.0, 2.0][: len(tau_NB)]
    whole = one.merge(theta_B, tau_NB, thresholds, weights, 0.7).clone()  # a kernel's answer is valid until the next call
    cut %= len(theta_B)
    parts = [
        one.merge(theta_B[p], tau_NB[:, p], thresholds, weights, 0.7).clone()
        for p in (slice(0, cut), slice(cut, None))
        if len(theta_B[p])
    ]
    assert_same_bits(torch.cat(parts), whole)
    beta_NB = one.beta(tau_NB, thresholds).clone()
    assert_same_bits(one.beta(tau_NB[:, cut:], thresholds), beta_NB[:, cut:])


@needs_native
@quick
@given(block=blocks(5), D=st.integers(1, 10**11))
def test_native_paper_has_the_bits_of_torch(block, D):
    """Its extrema, softmax numerators and scores in float64, also where a product is constant or overflows nothing but float32."""
    _, tau_NB = block
    n = len(tau_NB)
    native, plain = (kind("pcb-paper", n, D, CPU) for kind in (NativeKernel, TorchKernel))
    pairs = n * (n + 1) // 2
    ends = {kernel.name: ([math.inf] * pairs, [-math.inf] * pairs) for kernel in (native, plain)}
    for kernel in (native, plain):
        kernel.extrema(tau_NB[:, :3], *ends[kernel.name])
        kernel.extrema(tau_NB, *ends[kernel.name])
    assert ends["native"] == ends["torch"]
    exact = [[(a * b).item() for a, b in zip(tau_NB[i].double(), tau_NB[j].double(), strict=True)] for i, j in pcb.pairs(n)]
    assert ends["torch"] == ([min(p) for p in exact], [max(p) for p in exact])
    low, high = ends["native"]
    thresholds = Thresholds(pair_min=tuple(low), pair_max=tuple(high))
    e_native, e_torch = native.exponentials(tau_NB, thresholds), plain.exponentials(tau_NB, thresholds)
    assert_same_bits(e_native, e_torch)
    sums = e_torch.sum(dim=1).tolist()
    thresholds = thresholds.replace(intra_sum=tuple(sums[:n]), pair_sum=tuple(sums[n:]))
    assert_same_bits(native.beta(tau_NB, thresholds), plain.beta(tau_NB, thresholds))


@needs_native
@pytest.mark.parametrize("n", [80, 81, 90, 120])
def test_native_scores_of_many_tasks_have_the_bits_of_torch(n):
    """Where exp comes to the subnormal numbers, C takes another path."""
    tau_NB = torch.randn(n, 37, generator=torch.Generator().manual_seed(n))
    thresholds = Thresholds(low=(0.1,) * n, high=(2.0,) * n)
    for method in FUSED:
        native, plain = (kind(method, n, 10, CPU) for kind in (NativeKernel, TorchKernel))
        assert_same_bits(native.beta(tau_NB, thresholds), plain.beta(tau_NB, thresholds))


@needs_native
@quick
@given(block=blocks(1), dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32, torch.float64]))
def test_native_task_vectors_have_the_bits_of_torch(block, dtype):
    theta_B, tau_NB = block
    raw_B = tau_NB[0].clamp(-6e4, 6e4).to(dtype)
    native, plain = torch.empty_like(theta_B), torch.empty_like(theta_B)
    NativeKernel("ties", 1, 1, CPU).tau(raw_B, theta_B, native)
    TorchKernel("ties", 1, 1, CPU).tau(raw_B, theta_B, plain)
    assert_same_bits(native, plain)
    assert_same_bits(plain, (raw_B.double().float().double() - theta_B.double()).float())  # of exact operands, rounded once


@needs_native
@quick
@given(
    seed=st.integers(0, 2**32),
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
    most=st.sampled_from([1.0, 6e4, 1e39]),
)
def test_native_rounding_has_the_bits_of_torch_and_misses_nothing_that_is_not_finite(seed, dtype, most):
    x_B = torch.from_numpy(np.random.default_rng(seed).integers(-(2**31), 2**31, size=1000).astype(np.int32)).view(torch.float32)
    x_B = torch.where(x_B.abs() < most, x_B, 0.5)
    x_B[::7] = x_B[::7].to(dtype).float() * (1 + 2.0**-9)  # ties
    native, plain = (kind("linear", 1, 1, CPU).round(x_B, dtype) for kind in (NativeKernel, TorchKernel))
    assert native[1] == plain[1] == bool(x_B.to(dtype).isfinite().all())
    if plain[1]:
        integers = torch.int32 if dtype == torch.float32 else torch.int16
        assert torch.equal(native[0].view(integers), x_B.to(dtype).view(integers))


@pytest.mark.parametrize("kernel", [TorchKernel, pytest.param(NativeKernel, marks=needs_native)])
@pytest.mark.parametrize(
    "pattern", [0x7F800000, 0xFF800000, 0x7FC00000, 0xFFC00000, 0x7F800001, 0x7FFFFFFF, 0xFFFFFFFF, 0x7F7FFFFF]
)
def test_no_infinity_and_no_kind_of_nan_is_rounded_silently(kernel, pattern):
    x_B = torch.zeros(9)
    x_B.view(torch.int32)[4] = pattern - (1 << 32 if pattern >> 31 else 0)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        _, finite = kernel("linear", 1, 1, CPU).round(x_B, dtype)
        assert finite == (pattern == 0x7F7FFFFF and dtype == torch.float32)


# --- counting -------------------------------------------------------------------------------------------------------------------


@quick
@given(block=blocks(1), data=st.data())
def test_all_kernels_count_as_numpy_does(block, data):
    x_B = block[1][0]
    magnitude = data.draw(st.booleans())
    k_B = keys(x_B, magnitude).numpy().astype(np.int64)
    smallest, largest = (0 if magnitude else -LARGEST_KEY[32]), LARGEST_KEY[32]
    ends = st.one_of(st.sampled_from([smallest, largest, 0, *k_B[:20].tolist()]), st.integers(smallest, largest))
    brackets = [Bracket(*sorted((data.draw(ends), data.draw(ends)))) for _ in range(data.draw(st.integers(1, 3)))]
    for kernel in (TorchKernel, NativeKernel) if built else (TorchKernel,):
        top, counted = kernel("pcb-pairwise", 1, 1, CPU).count(x_B, magnitude, brackets)
        assert top == k_B.max()
        for b, (counts, inside) in zip(brackets, counted, strict=True):
            assert counts == tuple(int(c.sum()) for c in (k_B < b.lo, k_B <= b.lo, k_B < b.hi, k_B <= b.hi)), kernel
            assert sorted(inside.tolist()) == sorted(k_B[(k_B > b.lo) & (k_B < b.hi)].tolist()), kernel


def test_float64_scores_are_counted_by_all_kernels_alike():
    x_B = torch.tensor([0.0, -0.0, -1e-300, 2.5, 1e-320, -7.0, 2.5], dtype=torch.float64)
    k_B = keys(x_B, False).numpy()
    bracket = Bracket(int(k_B[2]), int(k_B[3]))
    for kernel in (TorchKernel, NativeKernel) if built else (TorchKernel,):
        top, [(counts, inside)] = kernel("pcb-paper", 1, 1, CPU).count(x_B, False, [bracket])
        assert top == k_B[3]
        assert counts == (1, 2, 5, 7)
        assert sorted(inside.tolist()) == sorted([0, 0, int(k_B[4])])


# --- keys -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "width"), [(torch.float32, 32), (torch.float64, 64)])
@quick
@given(data=st.data())
def test_keys_sort_like_values_and_give_them_back(dtype, width, data):
    values = data.draw(
        st.lists(st.one_of(st.floats(width=width, allow_nan=False), st.sampled_from(SPECIAL)), min_size=1, max_size=50)
    )
    x = torch.tensor(values, dtype=dtype)
    k = keys(x, False)
    smaller, smaller_key = x[:, None] < x[None, :], k[:, None] < k[None, :]
    assert torch.equal(smaller, smaller_key)
    assert torch.equal(keys(x, True), keys(x.abs(), False))
    for value, key in zip(x.tolist(), k.tolist(), strict=True):
        back = value_of_key(key, width)
        assert back == value
        assert math.copysign(1, back) == (math.copysign(1, value) if value else 1), "a zero comes back as +0"
    assert keys(torch.tensor([math.inf], dtype=dtype), False).item() == LARGEST_KEY[width]


@pytest.mark.parametrize("kernel", [TorchKernel, pytest.param(NativeKernel, marks=needs_native)])
def test_a_task_that_does_not_vary_or_has_no_score_above_t_contributes_nothing(kernel):
    tau_NB = torch.tensor([[0.5, -0.5, 0.5, 0.5], [0.1, 0.2, -0.3, 0.4]])
    theta_B = torch.tensor([-0.0, 1.0, 2.0, 3.0])
    thresholds = Thresholds(low=(0.5, 0.1), high=(0.5, 0.4), t=(-1.0, 0.7), beta_max=(1.0, 0.7))
    assert pcb.spans(thresholds) == [math.inf, math.inf]
    for method in FUSED:
        assert_same_bits(kernel(method, 2, 4, CPU).merge(theta_B, tau_NB, thresholds, (1.0, 1.0), 1.0), theta_B)


@needs_native
def test_a_native_ties_block_has_the_bits_of_torch():
    """With ties in size, both zeros in tau and theta, zero and negative weights, and thresholds of 0."""
    random = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.rand(*shape, generator=random)

    for trial in range(200):
        n, size = 1 + trial % 5, 1 + int(1500 * draw(1))
        tau = torch.randn(n, size, generator=random).mul_(1e-2).bfloat16().float()
        tau[draw(n, size) < 0.4], tau[draw(n, size) < 0.1] = 0.0, -0.0
        if trial % 7 == 0:
            tau = tau.sign() * 0.5
        theta = torch.randn(size, generator=random)
        theta[::7] = -0.0
        thresholds = Thresholds(low=tuple((draw(n) * 0.02 * (trial % 3 > 0)).tolist()))
        lambdas = [(1.0, 0.5, 0.0, -0.3, 2.0)[int(5 * draw(1))] for _ in range(n)]
        torch_B, native_B = (
            kernel("ties", n, size, torch.device("cpu")).merge(theta, tau, thresholds, lambdas, 0.7)
            for kernel in (TorchKernel, NativeKernel)
        )
        assert torch.equal(torch_B.view(torch.int32), native_B.view(torch.int32)), trial
