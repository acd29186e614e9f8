"""merge_state_dicts against the dense oracle: every method, dtype, shape and degenerate input; and non-finite numbers by name."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import families
import oracle
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from pcb_ray import RequestError, merge_state_dicts
from pcb_ray.methods import METHODS as RECORDS
from pcb_ray.planning import Sizes

METHODS = tuple(record.full_name for record in RECORDS if record.of_matrix is None)  # the others have tests of their own
WITH_BASE = tuple(record.full_name for record in RECORDS if record.has_base)
# A density decides what is kept; a score, what has a part in it: a task without one is warned of.
KEEPING = tuple(record.full_name for record in RECORDS if "density" in record.parameters)
SCORING = tuple(record.full_name for record in RECORDS if record.scored is not None)
DTYPES = {torch.bfloat16: "bfloat16", torch.float16: "float16", torch.float32: "float32"}
EPS32 = 2.0**-24
quick = settings(max_examples=45, deadline=None, derandomize=True)

StateDict = dict[str, Tensor]


def method_of(name: str) -> dict[str, str]:
    """The arguments of merge_state_dicts (and of the oracle's) for one of METHODS."""
    method, _, variant = name.partition("-")
    return {"method": method, **({"variant": variant} if variant else {})}


def same_bits(a: Tensor, b: Tensor) -> bool:
    return (
        a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))
    )


# --- the comparison ---------------------------------------------------------------------------------------------------------------


def flat(state: Mapping[str, Tensor], names: Sequence[str]) -> Tensor:
    return torch.cat([state[name].float().reshape(-1) for name in names])


def score_errors(result: oracle.Result, variant: str, tau_ND: Tensor) -> Tensor:
    """How far a beta may be off when exp and tanh are within 2 ulp: the engine and the oracle may differ by twice that."""
    if variant == "paper":
        return 1e-12 * result.beta_ND.abs()
    if variant == "released":
        return 16 * EPS32 * result.beta_ND.abs().double()
    low, high = (torch.tensor(result.thresholds[k], dtype=torch.float64)[:, None] for k in ("low", "high"))
    z_ND = torch.where(high > low, (result.tauc_ND.abs() - low) / (high - low), 0.0) * (tau_ND != 0)
    terms_ND = z_ND * z_ND.sum(dim=0)  # sum_j |tanh(..)| is less; the terms may cancel, their errors don't
    return 16 * EPS32 * torch.exp(len(z_ND) * (z_ND * z_ND - 1)) * terms_ND


def assert_is_the_pcb_merge(
    merged_D: Tensor,
    base_D: Tensor,
    models_ND: Tensor,
    *,
    variant: str,
    density: Sequence[float],
    weights: Tensor,
    lambda_: float,
    ulp: Tensor,
) -> None:
    """`merged_D` is the oracle's merge of these vectors, but for the errors that its arithmetic allows, and then `ulp` for
    rounding.

    The elements that no task keeps have the base's value; those at the threshold are among them (or, in `paper`, are not)."""
    tau_ND = models_ND - base_D
    want = oracle.merge_pcb(base_D, models_ND, variant=variant, density=density, weights=weights, lambda_=lambda_)
    t_N1, top_N1 = (torch.tensor(want.thresholds[k], dtype=torch.float64)[:, None] for k in ("t", "beta_max"))
    beta_ND, error_ND = want.beta_ND.double(), score_errors(want, variant, tau_ND)
    t_error_N1 = torch.where((beta_ND - t_N1).abs() <= 4 * error_ND, error_ND, 0.0).amax(dim=1, keepdim=True)
    # Where beta is the very t, both must agree that it is; next to it rounding may decide.
    unsure_ND = ((beta_ND - t_N1).abs() <= error_ND + t_error_N1) & (beta_ND != t_N1)
    unsure_D = unsure_ND.any(dim=0)
    assert unsure_D.sum() <= max(3, 0.1 * len(base_D)), "this data is no test"

    untouched_D = ~want.kept_ND.any(dim=0) & ~unsure_D
    assert torch.equal(merged_D[untouched_D].view(torch.int32), base_D[untouched_D].view(torch.int32))

    span_N1 = torch.where(top_N1 > t_N1, top_N1 - t_N1, math.inf)
    scale_ND = want.scale_ND.double()
    if variant == "paper":
        scale_error_ND = error_ND + 2.0**-23 * scale_ND  # the engine divides in float32
    else:
        scale_error_ND = (error_ND + t_error_N1 + error_ND.amax(dim=1, keepdim=True) * scale_ND) / span_N1 + 4 * EPS32 * scale_ND
    scale_error_ND = torch.where(want.kept_ND, scale_error_ND, 0.0)
    terms_ND = weights.double() * want.tauc_ND.double()
    kept_terms = torch.where(want.kept_ND, terms_ND, math.nan)
    spread_D = kept_terms.nan_to_num(nan=-math.inf).amax(dim=0) - kept_terms.nan_to_num(nan=math.inf).amin(dim=0)
    total_D = scale_ND.sum(dim=0).clamp(min=1e-300)
    size_D = torch.where(want.kept_ND, terms_ND.abs(), 0.0).amax(dim=0)
    share_D = (4 * scale_error_ND.sum(dim=0) / total_D).clamp(max=1.0)
    share_D[(total_D < 1e-9) | (total_D < 4 * scale_error_ND.sum(dim=0))] = 1.0  # next to the floor of the denominator
    tolerance_D = abs(lambda_) * (spread_D.nan_to_num(neginf=0.0) * share_D + 16 * EPS32 * size_D)
    tolerance_D = torch.where(total_D < 1e-9, abs(lambda_) * 2 * size_D, tolerance_D)
    tolerance_D = tolerance_D + 4 * EPS32 * (want.merged_D.abs() + base_D.abs()).double() + ulp
    sure_D = want.kept_ND.any(dim=0) & ~unsure_D
    wrong_D = sure_D & ((merged_D - want.merged_D).abs().double() > tolerance_D)
    assert not wrong_D.any(), [
        (d, merged_D[d].item(), want.merged_D[d].item(), tolerance_D[d].item()) for d in torch.nonzero(wrong_D)[:5, 0].tolist()
    ]


def assert_is_the_merge(
    out: Mapping[str, Tensor],
    base: StateDict,
    models: Sequence[StateDict],
    name: str,
    *,
    density: Sequence[float],
    weights: Sequence[float | Mapping[str, float]],
    lambda_: float = 1.0,
    dtype: torch.dtype | None = None,
) -> None:
    """All of the base's floating tensors, merged as the oracle merges them; float64 is written as float32 unless `dtype` says
    otherwise."""
    method, _, variant = name.partition("-")
    assert list(out) == list(base)
    names = sorted(n for n in base if base[n].is_floating_point())
    for n in names:
        wanted = dtype or (torch.float32 if base[n].dtype == torch.float64 else base[n].dtype)
        assert out[n].dtype == wanted
        assert out[n].shape == base[n].shape
    base_D, models_ND, merged_D = flat(base, names), torch.stack([flat(m, names) for m in models]), flat(out, names)
    # Rounding to the output's dtype, at most one unit in its last place where the two round differently.
    eps = {n: torch.finfo(out[n].dtype) for n in names}
    ulp = torch.cat(
        [
            torch.maximum(out[n].double().abs() * eps[n].eps, torch.tensor(eps[n].smallest_normal * eps[n].eps)).reshape(-1)
            for n in names
        ]
    )
    ulp = torch.where(torch.cat([torch.full((base[n].numel(),), out[n].dtype == torch.float32) for n in names]), 0.0, ulp)
    weights_ND = torch.stack(
        [torch.cat([torch.full((base[n].numel(),), float(w[n] if isinstance(w, Mapping) else w)) for n in names]) for w in weights]
    )

    if method == "pcb":
        rounded_D = torch.cat([base[n].to(out[n].dtype).float().reshape(-1) for n in names])
        if not torch.equal(rounded_D, base_D):  # a narrower output: what is untouched is the base rounded
            ulp = torch.maximum(ulp, (rounded_D - base_D).abs().double() * 2)
            merged_D = torch.where(merged_D == rounded_D, base_D, merged_D)
        assert_is_the_pcb_merge(
            merged_D, base_D, models_ND, variant=variant, density=density, weights=weights_ND, lambda_=lambda_, ulp=ulp
        )
        return
    terms_ND = weights_ND.double() * (models_ND if method == "linear" else models_ND - base_D)
    if method == "linear":
        want_D = oracle.merge_linear(models_ND, weights_ND)
        size_D = terms_ND.abs().sum(dim=0) / weights_ND.sum(dim=0).abs()
    elif method == "task_arithmetic":
        want_D = oracle.merge_task_arithmetic(base_D, models_ND, weights_ND, lambda_)
        size_D = base_D.abs() + abs(lambda_) * terms_ND.abs().sum(dim=0)
    else:
        size_D = base_D.abs() + abs(lambda_) * terms_ND.abs().sum(dim=0)
        if variant:
            is_mean = variant == "weighted_mean"
            want_D = oracle.merge_ties_as_mergekit(base_D, models_ND, weights_ND, lambda_, density, mean=is_mean)
            agrees_ND = oracle.ties_agreement(models_ND - base_D, density, weights_ND)
            if is_mean:  # weights of unlike signs may nearly cancel
                total_D = torch.where(agrees_ND, weights_ND, 0.0).sum(dim=0).abs()
                size_D = size_D / torch.where(total_D == 0, 1.0, total_D).clamp(max=1.0)
        else:
            want_D = oracle.merge_ties(base_D, models_ND, weights_ND, lambda_, density)
            agrees_ND = oracle.ties_agreement(models_ND - base_D, density)
        untouched_D = ~agrees_ND.any(dim=0)
        rounded_D = torch.cat([base[n].to(out[n].dtype).float().reshape(-1) for n in names])
        assert torch.equal(merged_D[untouched_D].view(torch.int32), rounded_D[untouched_D].view(torch.int32))
    assert ((merged_D - want_D).abs() <= 16 * EPS32 * size_D + ulp + 1e-44).all()


def run(base: StateDict, models: Sequence[StateDict], name: str, **options: object) -> StateDict:
    return merge_state_dicts(base, models, **method_of(name), **options)


# --- any small models -------------------------------------------------------------------------------------------------------------


@st.composite
def small_models(draw: st.DrawFn) -> tuple[StateDict, list[StateDict]]:
    """One to five models of a few tensors: scalars, empty tensors, matrices; dtypes mixed within and between models; task vectors
    with ties, of one size, zero, sparse."""
    n = draw(st.integers(1, 5))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**40)))
    shapes = draw(st.lists(st.sampled_from([(), (1,), (3,), (0, 4), (40,), (7, 5), (2, 3, 4), (60, 9)]), min_size=1, max_size=5))
    shapes.append(draw(st.sampled_from([(1,), (), (300,), (16, 33)])))  # not all empty
    one_dtype = draw(st.sampled_from([None, torch.float32, torch.bfloat16]))
    kinds = [draw(st.sampled_from(["normal", "grid", "constant", "base", "sparse", "copy"])) for _ in range(n)]
    floats = st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64])
    base, models = {}, [{} for _ in range(n)]
    for k, shape in enumerate(shapes):
        name = f"{'zyx'[k % 3]}.{k}.weight"
        theta = torch.randn(shape, generator=generator, dtype=torch.float64) * 0.1
        if {"grid", "constant"} & set(kinds):
            theta = torch.round(theta * 512) / 512  # differences are then equal and not only nearly so
        theta = torch.where(torch.rand(shape, generator=generator) < 0.1, -0.0, theta)
        base[name] = theta.to(one_dtype or draw(floats))
        previous = None
        for i, kind in enumerate(kinds):
            tau = {
                "normal": lambda shape=shape: torch.randn(shape, generator=generator) * 0.01,
                "grid": lambda shape=shape: torch.randint(-3, 4, shape, generator=generator) / 64,
                "constant": lambda shape=shape: torch.full(shape, 0.125),
                "base": lambda shape=shape: torch.zeros(shape),
                "sparse": lambda shape=shape: (
                    torch.randn(shape, generator=generator) * (torch.rand(shape, generator=generator) < 0.05)
                ),
                "copy": lambda shape=shape, p=previous: p if p is not None else torch.randn(shape, generator=generator),
            }[kind]()
            previous = tau
            models[i][name] = (base[name].double() + tau).to(one_dtype or draw(floats)) if kind != "base" else base[name].clone()
    return base, models


@pytest.mark.parametrize("name", METHODS)
@quick
@given(
    data=st.data(),
    family=small_models(),
    lambda_=st.sampled_from([1.0, 0.3, -1.5, 0.0]),
    dtype=st.sampled_from([None, *DTYPES]),
    small=st.booleans(),
)
def test_any_models_are_merged_as_the_oracle_merges_them(name, data, family, lambda_, dtype, small):
    base, models = family
    n = len(models)
    r = data.draw(
        st.one_of(st.sampled_from([0.05, 0.1, 0.5, 1.0]), st.lists(st.sampled_from([0.02, 0.1, 0.3, 0.9]), min_size=n, max_size=n))
    )
    weights = data.draw(st.lists(st.sampled_from([1.0, 0.5, -0.25, 0.0, 2.0]), min_size=n, max_size=n))
    if name not in WITH_BASE:
        assume(abs(sum(weights)) >= 0.2)
        lambda_, r = 1.0, 0.1
    options = {"density": r, "weights": weights, "lambda_": lambda_, "dtype": DTYPES.get(dtype)}
    out = run(base, models, name, **options)
    ratios = r if isinstance(r, list) else [r] * n
    assert_is_the_merge(out, base, models, name, density=ratios, weights=weights, lambda_=lambda_, dtype=dtype)
    if small:
        with families.small_engine():
            again = run(base, models, name, **options)
        assert all(same_bits(out[k], again[k]) for k in out if name != "pcb-paper")
        assert_is_the_merge(again, base, models, name, density=ratios, weights=weights, lambda_=lambda_, dtype=dtype)


@pytest.mark.parametrize("name", METHODS)
def test_a_family_that_needs_sampling_is_merged_as_the_oracle_merges_it(name):
    """D beyond what one tally holds: brackets from a sample, for values that drift along the model and are half ties."""
    base, models = families.fine_tuned(3, scale=4, dtype=torch.float32)
    base["odd"] = torch.randn(5, 7, generator=torch.Generator().manual_seed(1)).half()
    for model in models:
        model["odd"] = base["odd"] + 0.01
    D = sum(t.numel() for t in base.values())
    assert D > 70_000
    with families.small_engine(tally_entries=5000, chunk_elements=1 << 13, sample_run=256):
        assert Sizes.of(D).tally_entries < D
        out = run(base, models, name, density=0.1, weights=[1.0, 0.5, 2.0], lambda_=0.7)
    lambda_ = 0.7 if name in WITH_BASE else 1.0
    assert_is_the_merge(out, base, models, name, density=[0.1] * 3, weights=[1.0, 0.5, 2.0], lambda_=lambda_)


@pytest.mark.parametrize("name", KEEPING)
def test_where_no_task_keeps_an_element_the_base_stays_bit_for_bit(name):
    base, models = families.fine_tuned(2, seed=3, touched=0.3)
    base["zeros"] = torch.tensor([0.0, -0.0] * 50, dtype=torch.bfloat16)
    for model in models:
        model["zeros"] = -base["zeros"]
    out = run(base, models, name, density=0.02)
    assert same_bits(out["zeros"], base["zeros"])
    same = torch.cat([(out[k] == base[k]).reshape(-1) for k in base]).float().mean()
    assert 0.95 <= same < 1.0


@pytest.mark.parametrize("name", KEEPING)
def test_models_equal_to_the_base_leave_it_bit_for_bit_and_warn(name, caplog):
    base, _ = families.fine_tuned(1)
    out = run(base, [{k: t.clone() for k, t in base.items()} for _ in range(2)], name)
    assert all(same_bits(out[k], base[k]) for k in base)
    if name in SCORING:
        for i in range(2):
            assert f"models[{i}]" in caplog.text
            assert "contributes nothing" in caplog.text


@pytest.mark.parametrize("name", ["pcb-released", "pcb-pairwise"])
def test_a_model_that_differs_by_one_size_everywhere_contributes_nothing_and_warns(name, caplog):
    base, [model] = families.fine_tuned(1, dtype=torch.float32)
    base = {k: torch.round(t * 64) / 64 for k, t in base.items()}
    shifted = {k: t + 0.25 for k, t in base.items()}
    out = run(base, [shifted], name)
    assert all(same_bits(out[k], base[k]) for k in base)
    assert "models[0]: all its clipped differences to the base have one size, 0.25" in caplog.text
    alone, both = run(base, [model, base], name), run(base, [model, shifted], name)
    assert any(not same_bits(alone[k], base[k]) for k in base)
    assert all(t.isfinite().all() for t in both.values())


def test_a_density_that_keeps_untouched_elements_warns(caplog):
    base, models = families.fine_tuned(2, touched=0.3)
    run(base, models, "pcb-pairwise", density=0.9)
    assert "density 0.9 also keeps parameters that conflict or were not touched" in caplog.text


def test_integers_and_excluded_tensors_are_the_bases_bit_for_bit():
    base, models = families.fine_tuned(2)
    base |= {
        "ids": torch.arange(7),
        "mask": torch.tensor([True, False]),
        "rope.inv_freq": torch.tensor([1.0, math.nan, -0.0]),
        "small": torch.tensor(3, dtype=torch.int8),
    }
    for model in models:
        model |= {"ids": torch.arange(7) + 1, "rope.inv_freq": torch.zeros(9), "only.here": torch.arange(3)}
    out = run(base, models, "pcb-pairwise", exclude=["*.inv_freq"], dtype="float32")
    assert list(out) == list(base)
    for name in ("ids", "mask", "rope.inv_freq", "small"):
        assert same_bits(out[name], base[name]), name
        assert out[name].data_ptr() != base[name].data_ptr()
    without = {k: v for k, v in base.items() if v.dtype == torch.bfloat16}
    plain = run(without, [{k: m[k] for k in without} for m in models], "pcb-pairwise", dtype="float32")
    assert all(same_bits(out[k], plain[k]) for k in without)


def test_tensors_that_share_storage_count_once_and_share_it_again():
    base, models = families.fine_tuned(2)
    for state in (base, *models):
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    out = run(base, models, "pcb-pairwise")
    assert list(out) == list(base)
    assert out["lm_head.weight"].data_ptr() == out["model.embed_tokens.weight"].data_ptr()
    once = [{k: t for k, t in state.items() if k != "lm_head.weight"} for state in (base, *models)]
    plain = run(once[0], once[1:], "pcb-pairwise")
    assert all(same_bits(out[k], plain[k]) for k in plain)


@pytest.mark.parametrize("first", ["lm_head.weight", "shared.weight", "encoder.embed_tokens.weight", "other.name"])
def test_four_names_of_one_storage_count_once_whichever_comes_first(first):
    names = ["shared.weight", "encoder.embed_tokens.weight", "lm_head.weight", "other.name", "decoder.embed_tokens.weight"]
    names.sort(key=lambda name: name != first)
    embeddings = [torch.randn(40, 8, generator=torch.Generator().manual_seed(k)) for k in range(3)]
    rest = [torch.randn(30, generator=torch.Generator().manual_seed(k)) for k in range(3)]
    base, *models = ({**dict.fromkeys(names, e), "rest": r} for e, r in zip(embeddings, rest, strict=True))
    out = run(base, models, "pcb-pairwise")
    assert list(out) == list(base)
    assert len({out[name].data_ptr() for name in names}) == 1
    plain = run(*(lambda b, *m: (b, m))(*({"e": e, "rest": r} for e, r in zip(embeddings, rest, strict=True))), "pcb-pairwise")
    assert same_bits(out[first], plain["e"])
    assert same_bits(out["rest"], plain["rest"])


def test_the_inputs_are_left_alone_and_may_lie_in_memory_in_any_way():
    base, models = families.fine_tuned(2, dtype=torch.float32)
    strided = [
        {k: t.t().contiguous().t().requires_grad_() if t.dim() == 2 else t for k, t in state.items()} for state in (base, *models)
    ]
    copies = [{k: t.clone() for k, t in state.items()} for state in (base, *models)]
    out = run(strided[0], strided[1:], "ties")
    plain = run(base, models, "ties")
    assert all(same_bits(out[k], plain[k]) for k in base)
    assert not any(t.requires_grad for t in out.values())
    for state, copied in zip((base, *models), copies, strict=True):
        assert all(same_bits(state[k], copied[k]) for k in state)


def test_one_number_too_few_is_told():
    base, models = families.fine_tuned(2)
    with pytest.raises(RequestError) as told:
        merge_state_dicts(base, models, weights=[1.0], density=[0.1, 0.1, 0.1])
    assert len(told.value.problems) == 2
    assert "weights: wanted one for each of 2 models, found 1." in str(told.value)
    assert "density: wanted one for each of 2 models, found 3." in str(told.value)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"weight": 0.5}, "weight: wanted a parameter of pcb, found 0.5. Fix: give `weights=`, one for each model."),
        ({"merge_method": "ties"}, "merge_method: wanted a parameter of pcb, found 'ties'. Fix: give `method=`."),
        ({"densty": 0.1}, "densty: wanted a parameter of pcb, found 0.1. Fix: write `density`."),
        (
            {"normalize": True},
            "normalize: wanted a parameter of pcb, found true. Fix: give one of density, lambda, variant.",
        ),
        ({"foo": 1, "method": "linear"}, "foo: wanted a parameter of linear, found 1. Fix: leave it out."),
    ],
)
def test_a_name_that_no_method_has_is_told_with_what_to_write(given, message):
    base, models = families.fine_tuned(2)
    with pytest.raises(RequestError) as told:
        merge_state_dicts(base, models, **given)
    assert told.value.problems == (message,)


# --- what is not finite -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", METHODS)
def test_a_value_that_is_not_finite_is_named_with_model_tensor_and_first_index(name, value):
    base, models = families.fine_tuned(3)
    models[1]["model.layers.1.mlp.up_proj.weight"][5, 7] = value
    models[1]["model.layers.1.mlp.up_proj.weight"][6, 1] = value
    with pytest.raises(RequestError) as told:
        run(base, models, name)
    (problem,) = told.value.problems
    assert problem.startswith(
        f"models[1]: tensor model.layers.1.mlp.up_proj.weight: wanted finite numbers, found {value} at index [5, 7] (BF16)."
    ), problem
    assert "exclude" in problem


@pytest.mark.parametrize("name", WITH_BASE)
def test_a_base_that_is_not_finite_is_named(name):
    base, models = families.fine_tuned(2)
    base["model.norm.weight"][3] = math.inf
    models[0]["model.norm.weight"][4] = math.nan
    with pytest.raises(RequestError) as told:
        run(base, models, name)
    text = str(told.value)
    assert "base: tensor model.norm.weight: wanted finite numbers, found inf at index [3]" in text
    assert "models[0]: tensor model.norm.weight: wanted finite numbers, found nan at index [4]" in text


@pytest.mark.parametrize("name", METHODS)
def test_an_output_that_overflows_its_dtype_is_named(name):
    base, models = families.fine_tuned(2, dtype=torch.float32)
    where = "model.layers.0.self_attn.o_proj.weight"
    for model in models:
        model[where][2, 3:] = 1e6
        model[where][3:] = 1e6  # so many that clipping does not touch them
    with pytest.raises(RequestError) as told:
        run(base, models, name, dtype="float16")
    (problem,) = told.value.problems
    assert f"tensor {where}, index [2, 3]: wanted a number that F16 can hold, found one that overflows it" in problem
    assert "bfloat16 or float32" in problem


@pytest.mark.parametrize("name", WITH_BASE)
def test_a_difference_that_overflows_float32_is_named(name):
    base, models = families.fine_tuned(2, dtype=torch.float32)
    base["model.norm.weight"][1], models[1]["model.norm.weight"][1] = 3e38, -3e38
    with pytest.raises(RequestError, match=r"models\[1\]: tensor model\.norm\.weight: .* overflows float32 at index \[1\]"):
        run(base, models, name)


def test_a_float64_value_beyond_float32_is_named():
    base, models = families.fine_tuned(2, dtype=torch.float64)
    models[0]["model.norm.weight"][1] = 1e300
    with pytest.raises(
        RequestError, match=r"models\[0\]: tensor model\.norm\.weight: wanted finite numbers, found 1e\+300 at index \[1\] \(F64\)"
    ):
        run(base, models, "pcb-pairwise")


@pytest.mark.timeout(20)
@pytest.mark.parametrize("density", [0.3, 0.9, 1.0])
def test_scores_that_are_no_numbers_are_refused_and_do_not_hang(density):
    """released multiplies tau by the sum of all, and 0 * infinity is no number."""
    base, odd = {"w": torch.zeros(100)}, torch.arange(100) % 2
    models = [{"w": 3e38 * odd} for _ in range(3)] + [{"w": 1.0 - odd}]
    with pytest.raises(RequestError, match=r"models\[0\]: wanted .* finite in float32, found one of 3e\+38"):
        run(base, models, "pcb-released", density=density)
