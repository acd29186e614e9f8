"""The native kernel and torch give the same bits, and keys sort like the values that they stand for."""

from __future__ import annotations

import importlib.util
import math
import shutil
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pcb_ray.kernels import choose_kernel
from pcb_ray.kernels.native import NativeKernel
from pcb_ray.kernels.reference import Loaded, TorchKernel, keys
from pcb_ray.methods import MAGNITUDE, METHODS, Extrema, Known, Method, Quantity, Settings, Sums, pcb
from pcb_ray.questions import LARGEST_KEY, value_of_key
from pcb_ray.selection import Bracket

quick = settings(max_examples=60, deadline=None, derandomize=True)
CPU = torch.device("cpu")
built = importlib.util.find_spec("pcb_ray.kernels._native") is not None
needs_native = pytest.mark.skipif(not built, reason="the native extension was not built: no C compiler at installation")
RECORDS = {record.full_name: record for record in METHODS}
# Scored in float32 by thresholds on |tau| and beta; and the methods without scores.
FUSED = [name for name, record in RECORDS.items() if record.scored is not None and record.scored.scores.bits == 32]
BASELINES = [name for name, record in RECORDS.items() if record.scored is None and record.of_matrix is None]

SMALLEST, HUGE = 2.0**-149, 8e37  # the smallest subnormal; four times HUGE is still finite
SPECIAL = (0.0, -0.0, SMALLEST, -SMALLEST, 1e-40, -1e-40, 2.0**-126, 1e-20, 0.5, 1.0, -1.0, 1.0000001, 3.0, 9.0, 20.0, HUGE, -HUGE)


def bits(x: Tensor) -> Tensor:
    return x.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])


def assert_same_bits(a: Tensor, b: Tensor) -> None:
    assert a.dtype == b.dtype
    assert a.shape == b.shape
    differ = torch.nonzero((bits(a) != bits(b)).reshape(-1)).reshape(-1)
    assert not len(differ), [(int(k), a.reshape(-1)[k].item(), b.reshape(-1)[k].item()) for k in differ[:5]]
    assert not a.isnan().any()


@st.composite
def blocks(draw: st.DrawFn, most_tasks: int = 6) -> list[Tensor]:
    """A base and some models [B], as slices of wider buffers; often the base is 0, so that tau is exactly what was drawn."""
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
    theta = np.zeros_like(buffer[0])
    if draw(st.booleans()):
        theta = generator.choice([0.0, -0.0, SMALLEST, 1e-40, 1.0, 0.1, -0.3], size=theta.shape).astype(np.float32)
    dtypes = [draw(st.sampled_from([torch.float32, torch.float32, torch.bfloat16, torch.float64])) for _ in range(n + 1)]
    rows = [torch.from_numpy(theta), *(torch.from_numpy(row) for row in buffer)]
    return [row.to(dtype)[offset : offset + B] for row, dtype in zip(rows, dtypes, strict=True)]


def tau_of(sources: list[Tensor]) -> Tensor:
    """Of exact operands, rounded once."""
    return torch.stack([(x.float().double() - sources[0].float().double()).float() for x in sources[1:]])


def settings_of(n: int, D: int = 1, lambda_: float = 1.0) -> Settings:
    parameters = {"density": 0.1, "lambda": lambda_}
    return Settings(n, D, 1, parameters, (parameters,) * n)


def kernel_of(kind: type[TorchKernel], method: str, n: int, D: int = 1, lambda_: float = 1.0) -> TorchKernel:
    return kind(RECORDS[method], settings_of(n, D, lambda_), CPU)


def kernels_for(method: str, n: int, D: int = 1, lambda_: float = 1.0) -> tuple[NativeKernel, TorchKernel]:
    return NativeKernel(RECORDS[method], settings_of(n, D, lambda_), CPU), kernel_of(TorchKernel, method, n, D, lambda_)


def beta_of(method: str) -> Quantity:
    scored = RECORDS[method].scored
    assert scored is not None
    return scored.scores


def values(kernel: TorchKernel, block: Sequence[Tensor | None], quantity: Quantity, known: Known) -> Tensor:
    return kernel.values(Loaded(block), quantity, known)


def passes_of(method: Method) -> tuple[Extrema, Sums]:
    extrema, sums, _ = method.passes
    assert isinstance(extrema, Extrema)
    assert isinstance(sums, Sums)
    return extrema, sums


@st.composite
def known_for(draw: st.DrawFn, sources: list[Tensor], method: str) -> dict[str, tuple[float, ...]]:
    """low and high from the data or far from it; t below, among and above the scores."""
    low, high = [], []
    for x_B in tau_of(sources):
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
    result = {"low": tuple(low), "high": tuple(high)}
    beta_NB = values(kernel_of(TorchKernel, method, len(low)), sources, beta_of(method), result)
    t, top = [], []
    for beta_B in beta_NB:
        ranked = beta_B.sort().values
        rank = draw(st.integers(0, len(ranked) - 1))
        t.append(draw(st.sampled_from([ranked[rank].item(), 0.0, -0.5, ranked[-1].item()])) + 0.0)
        top.append(ranked[-1].item() + 0.0)
    return result | {"t": tuple(t), "beta_max": tuple(top)}


def test_the_native_kernel_was_built_where_there_is_a_compiler():
    if shutil.which("gcc"):
        assert built, "gcc is here, so installing pcb_ray must build pcb_ray.kernels._native"


@needs_native
def test_the_native_kernel_is_chosen_on_a_cpu_and_torch_on_request(monkeypatch):
    monkeypatch.delenv("PCB_RAY_KERNEL", raising=False)
    assert choose_kernel(pcb.PAIRWISE, settings_of(2), CPU).name == "native"
    assert choose_kernel(pcb.PAPER, settings_of(700), CPU).name == "native"
    assert choose_kernel(pcb.PAPER, settings_of(701), CPU).name == "torch", "its exp would meet subnormal numbers"
    monkeypatch.setenv("PCB_RAY_KERNEL", "torch")
    assert choose_kernel(pcb.PAIRWISE, settings_of(2), CPU).name == "torch"
    assert choose_kernel(pcb.PAIRWISE, settings_of(2), torch.device("meta")).name == "torch"


@needs_native
@quick
@given(block=blocks())
def test_native_task_vectors_have_the_bits_of_torch(block):
    native, plain = kernels_for("pcb-pairwise", len(block) - 1)
    assert_same_bits(values(plain, block, MAGNITUDE, {}), tau_of(block))
    assert_same_bits(values(native, block, MAGNITUDE, {}), tau_of(block))


@needs_native
@pytest.mark.parametrize("method", FUSED)
@quick
@given(data=st.data(), block=blocks())
def test_native_scores_have_the_bits_of_torch(method, data, block):
    known = data.draw(known_for(block, method))
    native, plain = kernels_for(method, len(block) - 1)
    assert_same_bits(values(native, block, beta_of(method), known), values(plain, block, beta_of(method), known))


given_a_merge = given(
    data=st.data(),
    block=blocks(),
    lambda_=st.sampled_from([1.0, 0.3, -2.5, 0.0]),
    weights=st.lists(st.sampled_from([1.0, 0.7, -0.3, 0.0]), min_size=6, max_size=6),
)


def assert_same_merges(method: str, block: Sequence[Tensor | None], known: Known, weights: list[float], lambda_: float) -> None:
    n = len(block) - 1
    native, plain = kernels_for(method, n, lambda_=lambda_)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        a, b = (kernel.merge(Loaded(block), known, weights[:n], kernel.settings.lambda_, dtype) for kernel in (native, plain))
        assert a[1] == b[1]
        if a[1]:
            assert_same_bits(a[0], b[0])


@needs_native
@pytest.mark.parametrize("method", FUSED)
@quick
@given_a_merge
def test_a_native_merge_has_the_bits_of_torch(method, data, block, lambda_, weights):
    assert_same_merges(method, block, data.draw(known_for(block, method)), weights, lambda_)


@needs_native
@pytest.mark.parametrize("method", BASELINES)
@quick
@given_a_merge
def test_a_native_baseline_has_the_bits_of_torch(method, data, block, lambda_, weights):
    """With ties in size, zeros of both signs in tau and theta, zero and negative weights."""
    low = tuple(data.draw(st.sampled_from([0.0, *x_B.abs().tolist()])) for x_B in tau_of(block))
    if not RECORDS[method].has_base:
        block = [None, *block[1:]]
        weights = [1.0, *weights[1:]]
        if sum(weights[: len(block) - 1]) == 0.0:
            weights[0] = 2.0
    assert_same_merges(method, block, {"low": low}, weights, lambda_)


@pytest.mark.parametrize("kernel", [TorchKernel, pytest.param(NativeKernel, marks=needs_native)])
@pytest.mark.parametrize("method", FUSED)
@quick
@given(data=st.data(), block=blocks(4), cut=st.integers(0, 1537))
def test_a_cut_block_merges_to_the_bits_of_the_whole(kernel, method, data, block, cut):
    known = data.draw(known_for(block, method))
    n, B = len(block) - 1, len(block[0])
    one = kernel_of(kernel, method, n, lambda_=0.7)
    arguments = (known, [1.0, -0.5, 0.0, 2.0][:n], 0.7, torch.float32)
    whole = one.merge(Loaded(block), *arguments)[0].clone()  # a kernel's answer is valid until the next call
    cut %= B
    parts = [[x[p] for x in block] for p in (slice(0, cut), slice(cut, None)) if len(block[0][p])]
    assert_same_bits(torch.cat([one.merge(Loaded(part), *arguments)[0].clone() for part in parts]), whole)
    beta_NB = values(one, block, beta_of(method), known).clone()
    assert_same_bits(values(one, parts[-1], beta_of(method), known), beta_NB[:, cut:])


@needs_native
@quick
@given(block=blocks(5), D=st.integers(1, 10**11), weights=st.lists(st.sampled_from([1.0, -0.3, 0.0]), min_size=5, max_size=5))
def test_native_paper_has_the_bits_of_torch(block, D, weights):
    """Its extrema, softmax numerators, scores and merges, also where a product is constant or overflows nothing but float32."""
    n, tau_NB = len(block) - 1, tau_of(block)
    native, plain = kernels_for("pcb-paper", n, D, lambda_=0.7)
    extrema, numerators = passes_of(pcb.PAPER)
    ends: dict[str, tuple[list[float], list[float]]] = {kernel.name: ([], []) for kernel in (native, plain)}
    for kernel in (native, plain):
        assert kernel.extremes(Loaded([x[:3] for x in block]), extrema, {}, *ends[kernel.name])
        assert kernel.extremes(Loaded(block), extrema, {}, *ends[kernel.name])
    assert ends["native"] == ends["torch"]
    exact = [[(a * b).item() for a, b in zip(tau_NB[i].double(), tau_NB[j].double(), strict=True)] for i, j in pcb.pairs(n)]
    assert ends["torch"] == ([min(p) for p in exact], [max(p) for p in exact])
    low, high = ends["native"]
    known = {"pair_min": tuple(low), "pair_max": tuple(high)}
    e_native, e_torch = native.rows(Loaded(block), numerators, known), plain.rows(Loaded(block), numerators, known)
    assert_same_bits(e_native, e_torch)
    sums = e_torch.sum(dim=1).tolist()
    known = known | {"intra_sum": tuple(sums[:n]), "pair_sum": tuple(sums[n:])}
    beta_NB = values(plain, block, beta_of("pcb-paper"), known)
    assert_same_bits(values(native, block, beta_of("pcb-paper"), known), beta_NB)
    known = known | {"t": tuple(x_B.median().item() for x_B in beta_NB), "beta_max": tuple(beta_NB.amax(1).tolist())}
    for dtype in (torch.float32, torch.bfloat16):
        a, b = (kernel.merge(Loaded(block), known, weights[:n], kernel.settings.lambda_, dtype) for kernel in (native, plain))
        assert a[1] == b[1]
        if a[1]:
            assert_same_bits(a[0], b[0])


@needs_native
@pytest.mark.parametrize("n", [80, 81, 90, 120])
def test_native_scores_of_many_tasks_have_the_bits_of_torch(n):
    """Where exp comes to the subnormal numbers, C takes another path."""
    block = [torch.zeros(37), *torch.randn(n, 37, generator=torch.Generator().manual_seed(n))]
    known = {"low": (0.1,) * n, "high": (2.0,) * n}
    for method in FUSED:
        native, plain = kernels_for(method, n, 10)
        assert_same_bits(values(native, block, beta_of(method), known), values(plain, block, beta_of(method), known))


def written(kernel: TorchKernel, x_B: Tensor, dtype: torch.dtype) -> tuple[Tensor, bool]:
    """x as a merge writes it: the linear merge of one model of weight 1."""
    return kernel.merge(Loaded([None, x_B]), {}, [1.0], 1.0, dtype)


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
    native, plain = (written(kernel, x_B, dtype) for kernel in kernels_for("linear", 1))
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
        _, finite = written(kernel_of(kernel, "linear", 1), x_B, dtype)
        assert finite == (pattern == 0x7F7FFFFF and dtype == torch.float32)
    paper, (extrema, _) = kernel_of(kernel, "pcb-paper", 1), passes_of(pcb.PAPER)
    assert paper.extremes(Loaded([torch.zeros(9), x_B]), extrema, {}, [0.0], [0.0]) == (pattern == 0x7F7FFFFF)
    assert paper.are_finite(Loaded([torch.zeros(9), x_B])) == (pattern == 0x7F7FFFFF)


# --- counting -------------------------------------------------------------------------------------------------------------------


@quick
@given(block=blocks(3), data=st.data())
def test_all_kernels_count_as_numpy_does(block, data):
    quantity = data.draw(st.sampled_from([MAGNITUDE, beta_of("pcb-pairwise")]))
    n, magnitude = len(block) - 1, quantity.magnitude
    known = data.draw(known_for(block, "pcb-pairwise"))
    scores_NB = values(kernel_of(TorchKernel, "pcb-pairwise", n), block, quantity, known)
    k_NB = keys(scores_NB, magnitude).numpy().astype(np.int64)
    smallest, largest = (0 if magnitude else -LARGEST_KEY[32]), LARGEST_KEY[32]
    brackets = []
    for k_B in k_NB:
        ends = st.one_of(st.sampled_from([smallest, largest, 0, *k_B[:20].tolist()]), st.integers(smallest, largest))
        brackets.append([Bracket(*sorted((data.draw(ends), data.draw(ends)))) for _ in range(data.draw(st.integers(1, 3)))])
    for kernel in (TorchKernel, NativeKernel) if built else (TorchKernel,):
        top, counted = kernel_of(kernel, "pcb-pairwise", n).count(Loaded(block), quantity, known, brackets)
        assert top == k_NB.max(axis=1).tolist()
        for k_B, of_task, counted_of_task in zip(k_NB, brackets, counted, strict=True):
            for b, (counts, inside) in zip(of_task, counted_of_task, strict=True):
                assert counts == tuple(int(c.sum()) for c in (k_B < b.lo, k_B <= b.lo, k_B < b.hi, k_B <= b.hi)), kernel
                assert sorted(inside.tolist()) == sorted(k_B[(k_B > b.lo) & (k_B < b.hi)].tolist()), kernel


@quick
@given(block=blocks(3), data=st.data())
def test_float64_scores_are_counted_by_all_kernels_alike(block, data):
    n = len(block) - 1
    low: list[float] = []
    high: list[float] = []
    plain, beta = kernel_of(TorchKernel, "pcb-paper", n, 5), beta_of("pcb-paper")
    plain.extremes(Loaded(block), passes_of(pcb.PAPER)[0], {}, low, high)
    known = {"pair_min": tuple(low), "pair_max": tuple(high), "intra_sum": (2.0,) * n, "pair_sum": (3.0,) * len(low)}
    k_NB = keys(values(plain, block, beta, known), False).numpy()
    brackets = [
        [Bracket(*sorted((data.draw(st.sampled_from(k_B)).item(), data.draw(st.sampled_from(k_B)).item())))] for k_B in k_NB
    ]
    for kernel in (TorchKernel, NativeKernel) if built else (TorchKernel,):
        top, counted = kernel_of(kernel, "pcb-paper", n, 5).count(Loaded(block), beta, known, brackets)
        assert top == k_NB.max(axis=1).tolist()
        for k_B, [b], [(counts, inside)] in zip(k_NB, brackets, counted, strict=True):
            assert counts == tuple(int(c.sum()) for c in (k_B < b.lo, k_B <= b.lo, k_B < b.hi, k_B <= b.hi)), kernel
            assert sorted(inside.tolist()) == sorted(k_B[(k_B > b.lo) & (k_B < b.hi)].tolist()), kernel


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
    theta_B = torch.tensor([-0.0, 1.0, 2.0, 4.0])
    block = [theta_B, theta_B + torch.tensor([0.5, -0.5, 0.5, 0.5]), theta_B + torch.tensor([0.125, 0.25, -0.25, 0.5])]
    known = {"low": (0.5, 0.125), "high": (0.5, 0.5), "t": (-1.0, 0.7), "beta_max": (1.0, 0.7)}
    assert pcb.spans(known) == [math.inf, math.inf]
    for method in FUSED:
        merged_B, finite = kernel_of(kernel, method, 2, 4).merge(Loaded(block), known, (1.0, 1.0), 1.0, torch.float32)
        assert finite
        assert_same_bits(merged_B, theta_B)


@pytest.mark.parametrize("kernel", [TorchKernel, pytest.param(NativeKernel, marks=needs_native)])
@pytest.mark.parametrize("n", [1, 2, 3, 4, 7, 8, 20])
@pytest.mark.parametrize("size", [1, 15, 16, 511, 513, 20_000])
def test_products_and_zeros_are_those_of_numpy(kernel, n, size):
    generator = torch.Generator().manual_seed(n * size)
    theta_B = torch.randn(size, generator=generator).bfloat16()
    models = [(theta_B.float() + 0.1 * (torch.rand(size, generator=generator) > 0.4)).bfloat16() for _ in range(n)]
    gram, zeros = kernel_of(kernel, "task_arithmetic", n, size).gram(Loaded([theta_B, *models]))
    theta = theta_B.double().numpy()
    rows = np.stack([theta, *(model.double().numpy() - theta for model in models)])
    np.testing.assert_allclose(gram, (rows @ rows.T)[np.triu_indices(n + 1)], rtol=2e-6, atol=2e-6 * size)
    assert zeros == (rows[1:] == 0).sum(axis=1).tolist()
