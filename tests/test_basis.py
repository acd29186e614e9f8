"""The basis: what a search updates a loaded model with is the merge, for any coefficients and any density, without a model being
read."""

from __future__ import annotations

import ctypes
import os
import tracemalloc
from pathlib import Path
from types import SimpleNamespace

import families
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pcb_ray import Recipe, RunError, merge_state_dicts
from pcb_ray.analysis import analyse
from pcb_ray.files.checkpoint import Checkpoint
from pcb_ray.files.checkpoint import Tensor as Stored
from pcb_ray.files.store import LocalStore
from pcb_ray.kernels.native import load_native
from pcb_ray.local import LocalOwners
from pcb_ray.methods import METHODS as RECORDS
from pcb_ray.planning import Inputs, Plan, Segment, plan, plan_of
from pcb_ray.questions import inputs_of
from pcb_ray.searching import basis as basis_module
from pcb_ray.searching.basis import Basis, Writer, mask_of, positions_of
from pcb_ray.searching.building import BuildVolumes, DigestVolumes
from pcb_ray.searching.volumes import MOST_VOLUMES, basis_bytes, chunks_of_volume, volume_file, volumes_of, writer_bytes
from pcb_ray.session import Session

METHODS = tuple(record.full_name for record in RECORDS if record.linear)
SCORED = tuple(record.full_name for record in RECORDS if record.scored is not None)
WEIGHTS = [1.3, 0.0, -0.4]
LAMBDA = 0.7


def build(
    family: families.Family, folder: Path, method: str, *, scored: bool = False, block: int | None = None, **parameters: object
) -> Basis:
    """The basis of a family in `folder`."""
    merge_method, _, variant = method.partition("-")
    parameters = ({"variant": variant} if variant else {}) | parameters
    made = plan(family.recipe(merge_method=merge_method, parameters=parameters))
    folder.mkdir()
    session = session_of(made, block)
    known, volumes = analyse(session), range(volumes_of(made))
    built = {
        v: one
        for _, answer in session.store("basis", BuildVolumes(known, str(folder), scored), volumes)
        for v, one in answer.items()
    }
    here = {v: digest for _, answer in session.owners.ask(DigestVolumes(str(folder)), volumes) for v, digest in answer.items()}
    assert here == {v: one.digest for v, one in built.items()}
    session.saw_inputs(inputs_of(built.values()), "basis")  # it read what the analysis has read
    basis = Basis(made, folder, known)
    assert basis.scored == scored
    return basis


def session_of(made: Plan, block: int | None = None) -> Session:
    store = LocalStore()
    return Session(made, lambda plan: LocalOwners(plan, store, block_elements=block))


def applied(basis: Basis, like: dict[str, Tensor], *, threads: int = 1, density: float | None = None) -> dict[str, Tensor]:
    state = {name: torch.full_like(t, torch.nan) for name, t in like.items()}
    lambdas = [WEIGHTS[: basis.plan.N]] * len(basis.plan.tensors)
    basis.apply(state, lambdas, LAMBDA, basis.known(density), threads=threads)
    return state


def merged(family: families.Family, method: str, **options: object) -> dict[str, Tensor]:
    merge_method, _, variant = method.partition("-")
    named = {"method": merge_method, "variant": variant or "pairwise", "weights": WEIGHTS[: len(family.models)], "lambda_": LAMBDA}
    return merge_state_dicts(family.base, family.models, **named, **options)


def assert_within_one_rounding(found: dict[str, Tensor], wanted: dict[str, Tensor], family: families.Family) -> None:
    """Apart by no more than a unit in the last place of the output's dtype, and what float32 loses on the way."""
    assert found.keys() == wanted.keys()
    for name, x in found.items():
        y = wanted[name]
        assert x.dtype == y.dtype
        seen = sum(state[name].double().abs() for state in (family.base, *family.models))
        one_rounding = (
            torch.finfo(x.dtype).eps * torch.maximum(x.double().abs(), y.double().abs()) if x.dtype != torch.float32 else 0.0
        )
        assert ((x.double() - y.double()).abs() <= one_rounding + 4 * 2.0**-24 * seen).all(), name


@given(st.sets(st.integers(0, 1999)))
def test_positions_survive_their_encoding(positions: set[int]):
    mask = mask_of(np.isin(np.arange(2000), list(positions)))
    assert positions_of(torch.from_numpy(mask)).tolist() == sorted(positions)
    assert len(mask) == 2048 // 8


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_candidate_is_the_merge_within_one_rounding(tmp_path, method, dtype):
    family = families.Family(tmp_path, *families.fine_tuned(3, dtype=dtype))
    with families.small_engine(chunk_elements=4096):
        basis = build(family, tmp_path / "basis", method)
    found, wanted = applied(basis, family.base), merged(family, method)
    assert_within_one_rounding(found, wanted, family)
    differing = sum(int((found[name] != wanted[name]).sum()) for name in wanted)
    assert dtype == torch.float32 or differing <= 0.01 * basis.plan.D
    assert any(not torch.equal(wanted[name], family.base[name]) for name in wanted)


@pytest.mark.parametrize("method", SCORED)
@pytest.mark.parametrize("ratio", [0.3, 0.1, 0.02, 1e-4])
def test_a_scored_basis_gives_the_bits_of_the_merge_at_any_smaller_density(tmp_path, method, ratio):
    family = families.Family(tmp_path, *families.fine_tuned(3))
    with families.small_engine(chunk_elements=4096):
        basis = build(family, tmp_path / "basis", method, scored=True, density=0.3)
    found, wanted = applied(basis, family.base, density=ratio), merged(family, method, density=ratio)
    for name in wanted:
        assert torch.equal(found[name], wanted[name]), name


@settings(max_examples=25, deadline=None, derandomize=True)
@given(data=st.data())
@pytest.mark.parametrize("method", SCORED)
def test_thresholds_from_a_scored_basis_are_those_of_an_analysis(tmp_path_factory, method, data):
    """With ties, zeros and constant tensors: few distinct values."""
    values = st.sampled_from([0.0, -0.0, 0.5, -0.5, 1.0, 2.0])
    state = st.lists(values, min_size=40, max_size=40).map(lambda x: {"w": torch.tensor(x)})
    folder = tmp_path_factory.mktemp("ties")
    family = families.Family(folder, {"w": torch.zeros(40)}, data.draw(st.lists(state, min_size=1, max_size=3)))
    largest = data.draw(st.sampled_from([0.1, 0.5, 1.0]))
    with families.small_engine(chunk_elements=16):
        basis = build(family, folder / "basis", method, scored=True, density=largest)
        for ratio in (0.03, 0.1, 0.3, 0.7, 1.0):
            if ratio <= largest:
                made = plan(family.recipe(parameters={"density": ratio, "variant": method.removeprefix("pcb-")}))
                expected = analyse(session_of(made))
                assert basis.known(ratio) == {**expected, "beta_max": basis.made_for["beta_max"]}
                assert expected["beta_max"] == basis.made_for["beta_max"]
    for name, x in applied(basis, family.base, density=0.1).items():
        assert torch.equal(x, merged(family, method, density=0.1)[name])


@pytest.mark.parametrize("method", SCORED)
def test_scores_that_agree_in_their_upper_bits_are_told_apart_by_the_lower_ones(tmp_path, monkeypatch, method):
    """As those of `paper` in a large model do. Also down to the last bit, where only ties are left."""
    family = families.Family(tmp_path, *families.fine_tuned(2))
    with families.small_engine(chunk_elements=4096):
        basis = build(family, tmp_path / "basis", method, scored=True, density=0.9)
    ratios = (0.8, 0.5, 0.1, 1e-3)
    expected = [basis.known(ratio)["t"] for ratio in ratios]
    scores = [np.concatenate([chunk.scores_between(i, -np.inf, np.inf) for chunk in basis._chunks]) for i in range(2)]
    for ratio, t in zip(ratios, expected, strict=True):
        kept = basis.plan.D - int(basis.plan.D * (1 - ratio))
        assert t == tuple(float(np.sort(x)[len(x) - kept]) for x in scores)
    for gathered in (0, 1, 20):
        monkeypatch.setattr(basis_module, "GATHERED", gathered)
        monkeypatch.setattr(basis_module, "NARROWING_BITS", 5)
        again = Basis(basis.plan, tmp_path / "basis", basis.made_for)
        assert [again.known(ratio, threads=2)["t"] for ratio in ratios] == expected


def test_a_basis_holds_no_descriptor_and_lets_its_files_go(tmp_path):
    family = families.Family(tmp_path, *families.fine_tuned(2))
    with families.small_engine(chunk_elements=256):
        basis = build(family, tmp_path / "basis", "pcb-pairwise")
    assert basis.plan.chunks > 70

    def maps() -> int:
        return Path("/proc/self/maps").read_text().count(str(tmp_path / "basis"))

    def descriptors() -> int:
        return sum(str(tmp_path / "basis") in os.path.realpath(one) for one in Path("/proc/self/fd").iterdir())

    assert (maps(), descriptors()) == (volumes_of(basis.plan), 0)
    piece = basis._chunks[3].piece(0, 1)
    expected = piece.values.copy()
    del basis
    assert maps() == 1
    assert np.array_equal(piece.values, expected)


def test_a_basis_has_few_files_whatever_the_number_of_chunks(tmp_path):
    family = families.Family(tmp_path, *families.fine_tuned(2))
    with families.small_engine(chunk_elements=16):
        basis = build(family, tmp_path / "basis", "pcb-pairwise", scored=True)
    assert basis.plan.chunks > 4 * MOST_VOLUMES
    assert len(list((tmp_path / "basis").iterdir())) == MOST_VOLUMES
    assert [k for v in range(MOST_VOLUMES) for k in chunks_of_volume(basis.plan, v)] == list(range(basis.plan.chunks))
    wanted = merged(family, "pcb-pairwise", density=0.05)
    assert all(torch.equal(x, wanted[name]) for name, x in applied(basis, family.base, density=0.05).items())


def test_files_of_two_kinds_of_basis_are_not_mixed(tmp_path):
    family = families.Family(tmp_path, *families.fine_tuned(2))
    with families.small_engine(chunk_elements=4096):
        basis = build(family, tmp_path / "basis", "pcb-pairwise")
        build(family, tmp_path / "scored", "pcb-pairwise", scored=True)
    os.replace(volume_file(tmp_path / "scored", 1), volume_file(tmp_path / "basis", 1))
    with pytest.raises(RunError, match="files of one basis, found two kinds"):
        Basis(basis.plan, tmp_path / "basis", basis.made_for)


@pytest.mark.parametrize("block", [1 << 12, 1 << 17])
@pytest.mark.parametrize(("method", "scored"), [("pcb-pairwise", False), ("pcb-pairwise", True), ("pcb-paper", True)])
def test_a_writer_takes_no_more_memory_than_announced_also_where_all_is_kept(tmp_path, method, scored, block):
    record = next(record for record in RECORDS if record.full_name == method)
    settings_of = SimpleNamespace(each=lambda _name: (1.0,) * 3)
    made = SimpleNamespace(method=record, N=3, bounds=[0, 1 << 20], D=1 << 20, chunks=1, settings=settings_of)
    random = np.random.default_rng(0)
    values = random.standard_normal((3, block), dtype=np.float32)
    scores = values.astype(np.float64 if method == "pcb-paper" else np.float32) if scored else None
    kept = np.ones((3, block), dtype=np.bool_)
    tracemalloc.start()
    try:
        writer = Writer()
        for k in range((1 << 20) // block):
            writer.add(Segment(0, k * block, (k + 1) * block), values, kept, scores)
        arrays = writer.arrays()
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert int(arrays["starts"][-1, 1]) == 3 << 20
    assert 0.6 * writer_bytes(made, scored) < peak <= writer_bytes(made, scored)
    size = sum(array.nbytes for array in arrays.values())
    assert 0.9 * basis_bytes(made, scored) < size <= basis_bytes(made, scored) + 1000


def test_the_basis_of_a_huge_model_has_as_few_files_and_does_not_shape_its_chunks():
    """70 B, 405 B and 1 T elements, in a plan of one tensor."""
    for D in (70 * 10**9, 405 * 10**9, 10**12):
        tensors = {"w": Stored("w", "BF16", (D,), "model.safetensors", 0)}
        checkpoint = Checkpoint("m", None, tensors, {}, (), None, None)
        made = plan_of(Recipe(models=("m",), base_model="b"), Inputs(checkpoint, (checkpoint,), checkpoint))
        assert volumes_of(made) == MOST_VOLUMES
        assert made.sizes.chunk_elements == 1 << 22


@pytest.mark.parametrize("scored", [False, True])
@pytest.mark.parametrize("method", SCORED)
def test_neither_kernel_nor_threads_nor_blocks_show_in_a_candidate(tmp_path, monkeypatch, method, scored):
    family = families.Family(tmp_path, *families.fine_tuned(3, scale=8))
    basis = build(family, tmp_path / "basis", method, scored=scored)
    found = applied(basis, family.base)
    several = applied(basis, family.base, threads=3)
    monkeypatch.setenv("PCB_RAY_KERNEL", "torch")
    torch_basis = build(family, tmp_path / "torch", method, scored=scored, block=1 << 12)
    for file in (tmp_path / "basis").iterdir():
        assert file.read_bytes() == (tmp_path / "torch" / file.name).read_bytes()
    for other in several, applied(basis, family.base), applied(torch_basis, family.base):
        for name, x in found.items():
            assert torch.equal(x, other[name]), name


@pytest.mark.parametrize("scored", [False, True])
@pytest.mark.parametrize("method", SCORED)
@pytest.mark.parametrize("n", [1, 2, 4, 5, 9])
def test_a_candidate_has_the_same_bits_on_any_processor(tmp_path, monkeypatch, method, scored, n):
    """The native path for new processors, that for others and torch: any number of tasks, dense and sparse stretches, any dtypes,
    ends that fill no vector, parameters that lie nowhere in particular."""
    shapes = {"a": (3, 341), "b": (513,), "c": (64,), "d": (7, 300), "e": (1,)}
    dtypes = {name: (torch.bfloat16, torch.float32)[k % 2] for k, name in enumerate(shapes)}
    base, models = families.fine_tuned(n, shapes=shapes, dtype=torch.float32)
    for state in (base, *models):
        state |= {name: state[name].to(dtype) for name, dtype in dtypes.items()}
        state["b"][5] = -0.0
    for model in models:
        model["d"] = model["d"] + 0.5 * torch.rand(7, 300)  # all of it is kept
    basis = build(families.Family(tmp_path, base, models), tmp_path / "basis", method, scored=scored, density=0.3)
    lambdas = [(np.linspace(-0.5, 1.5, n)).tolist()] * len(basis.plan.tensors)

    def states() -> list[dict[str, Tensor]]:
        result = []
        for dtype in (torch.bfloat16, torch.float32):
            rooms = {name: torch.full((t.numel() + 3,), torch.nan, dtype=dtype) for name, t in base.items()}
            for first in (0, 3):
                state = {name: room[first : first + base[name].numel()].view(base[name].shape) for name, room in rooms.items()}
                basis.apply(state, lambdas, LAMBDA, basis.known(0.2 if scored else None))
                result.append({name: t.clone() for name, t in state.items()})
                assert all(torch.isnan(room).sum() == 3 for room in rooms.values()) or first, "nothing beyond it is touched"
        return result

    if (native := load_native()) is None:
        pytest.skip("no C compiler")
    found = states()
    for name, dtype in dtypes.items():  # a wider parameter holds what is written
        assert torch.equal(found[2][name], found[0][name].float()) == (dtype == torch.bfloat16), name
        assert found[2][name].to(dtype).float().equal(found[2][name])
    switch = ctypes.c_int.in_dll(native, "pcb_avx512")
    assert switch.value == 1
    switch.value = 0
    try:
        others = [states()]
    finally:
        switch.value = 1
    monkeypatch.setenv("PCB_RAY_KERNEL", "torch")
    others.append(states())
    for other in others:
        for one, same in zip(found, other, strict=True):
            for name in base:
                assert torch.equal(one[name].contiguous().view(torch.uint8), same[name].contiguous().view(torch.uint8)), name


def test_parameters_of_another_dtype_layout_or_part_of_the_model_are_updated(tmp_path):
    family = families.Family(tmp_path, *families.fine_tuned(2))
    basis = build(family, tmp_path / "basis", "pcb-pairwise")
    exact = applied(basis, {name: t.float() for name, t in family.base.items()})
    name = "model.layers.0.mlp.up_proj.weight"
    transposed = torch.zeros(family.base[name].shape[::-1], dtype=torch.float64).t()
    basis.apply({name: transposed}, [WEIGHTS[:2]] * len(basis.plan.tensors), LAMBDA)
    assert torch.equal(transposed.float(), exact[name])
    for name, x in applied(basis, family.base).items():
        assert torch.equal(x, exact[name].to(torch.bfloat16))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data())
@pytest.mark.parametrize("method", SCORED)
def test_a_candidate_has_the_bytes_of_the_merge_down_to_the_signs_of_zeros(tmp_path_factory, method, data):
    """With bases of +-0, weights of 0 and task vectors that cancel. In torch as in C."""
    draw, zeros = data.draw, st.sampled_from([0.0, -0.0, 1.0])
    n, folder = draw(st.integers(1, 3)), tmp_path_factory.mktemp("zeros")
    base = torch.tensor(draw(st.lists(zeros, min_size=40, max_size=40)))
    changes = st.lists(st.sampled_from([0.0, 0.5, -0.5, 1e-30, -1e-30]), min_size=40, max_size=40)
    family = families.Family(folder, {"w": base}, [{"w": base + torch.tensor(draw(changes))} for _ in range(n)])
    weights, lambda_ = (
        draw(st.lists(st.sampled_from([0.0, 1.0, -1.0]), min_size=n, max_size=n)),
        draw(st.sampled_from([0.0, 1.0, -0.5])),
    )
    basis = build(family, folder / "basis", method, scored=True, density=0.6)
    wanted = merge_state_dicts(
        family.base, family.models, variant=method.removeprefix("pcb-"), weights=weights, lambda_=lambda_, density=0.5
    )
    for kernel in ("", "torch"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("PCB_RAY_KERNEL", kernel)
            state = {"w": torch.full((40,), torch.nan)}
            basis.apply(state, [weights], lambda_, basis.known(0.5))
        assert torch.equal(state["w"].view(torch.int32), wanted["w"].view(torch.int32))


def test_lambda_zero_gives_the_base_back_bit_for_bit(tmp_path):
    family = families.Family(tmp_path, *families.fine_tuned(2))
    family.base["model.norm.weight"][0] = -0.0
    basis = build(families.Family(tmp_path, family.base, family.models), tmp_path / "basis", "pcb-pairwise")
    state = {name: torch.ones_like(t) for name, t in family.base.items()}
    basis.apply(state, [[0.0, 0.0]] * len(basis.plan.tensors), 1.0)
    for name, x in state.items():
        assert torch.equal(x.view(torch.int16), family.base[name].view(torch.int16)), name


def test_a_basis_is_compact(tmp_path):
    """Bytes per entry: 4 for the value, 1 / (8 r) for the position; and as many entries as the density says."""
    family = families.Family(tmp_path, *families.fine_tuned(4, scale=32))
    basis = build(family, tmp_path / "basis", "pcb-pairwise", density=0.1)
    D, N = basis.plan.D, basis.plan.N
    assert 0.09 * N * D < basis.entries <= 0.1 * N * D + N
    assert basis.nbytes < 5.25 * N * 0.1 * D + 3000 * basis.plan.chunks
