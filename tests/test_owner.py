"""What an owner answers is a function of the plan and the question: no block size, order or kernel shows in the bytes, and it reads what it must."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from families import Local, merge_locally
from pcb_ray.answers import BETA, MAGNITUDE, Thresholds

from pcb_ray import Recipe, RequestError, RunError
from pcb_ray.analysis import Run, thresholds_of
from pcb_ray.owner import Bytes, Owner
from pcb_ray.planning import MIN_BLOCK, Plan, plan
from pcb_ray.selection import TALLY_ENTRIES

METHODS = ("pcb-released", "pcb-pairwise", "pcb-paper", "ties", "task_arithmetic", "linear")


def planned(recipe: dict[str, object], name: str, **changes: object) -> Plan:
    method, _, variant = name.partition("-")
    parameters = {"variant": variant} if variant else {}
    return plan(Recipe.from_dict(recipe | {"merge_method": method, "parameters": parameters} | changes))


class OneOwner:
    """The smallest thing that a Run can ask."""

    deaths = 0

    def __init__(self, owner: Owner) -> None:
        self.owner, self.stats = owner, {}

    def ask(self, question: str, items: Sequence[Any], *args: Any) -> Iterator[tuple[Sequence[Any], Any]]:
        for item in items:
            yield [item], getattr(self.owner, question)([item], *args)

    def fold(self, question: str, items: Sequence[Any], *args: Any) -> Iterator[tuple[Sequence[Any], Any]]:
        yield items, None
        yield (), getattr(self.owner, question)(items, *args)


def digests(owner: Owner, thresholds: Thresholds, order: list[int]) -> dict[int, bytes]:
    return {chunk: digest for at in order for chunk, digest in owner.merged_digests([at], thresholds).items()}


def input_digests(made: Plan, out: Path) -> list[str]:
    local = merge_locally(made, out)
    if made.sweeps > 1:
        return local.run.inputs
    chunks = Owner(made, str(out)).write(range(made.chunks), local.thresholds, True)
    return [b"".join(chunks[k][1][source] for k in sorted(chunks)).hex() for source in range(made.N + 1)]


# --- the bytes ------------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> families.Family:
    """150,000 elements: bfloat16, float16 and float32, a scalar, an empty tensor, lengths that no power of two divides."""
    base, models = families.fine_tuned(3, scale=6)
    generator = torch.Generator().manual_seed(5)
    for state in (base, *models):
        shift = torch.randn(7777, generator=generator) * 0.01
        state |= {
            "a.odd": (torch.linspace(-1, 1, 7777) + shift).half(),
            "m.wide": torch.linspace(0, 1, 20011) + shift[0],
            "scalar": torch.tensor(0.5) + shift[1],
            "none": torch.empty(0, 8),
        }
    return families.Family(tmp_path_factory.mktemp("mixed"), base, models, shards=3)


def merged(family: families.Family, name: str, out: Path, *, block_elements: int | None = None, **changes: object) -> Local:
    weights = [{"filter": "mlp", "value": 0.5}, {"filter": "layers.1", "value": 2.0}, {"value": 1.0}]
    recipe = family.recipe()
    recipe["models"][1]["parameters"] = {"weight": weights}
    made = planned(recipe, name, **changes)
    chunks = list(range(made.chunks))
    return merge_locally(made, out, block_elements=block_elements, chunks=chunks[::-1] if block_elements else chunks)


@pytest.mark.parametrize("dtype", [None, "float32"])
@pytest.mark.parametrize("name", METHODS)
def test_bytes_do_not_depend_on_block_size_order_or_kernel(mixed, name, dtype, tmp_path, monkeypatch):
    changes = {} if dtype is None else {"dtype": dtype}
    first = merged(mixed, name, tmp_path / "a", **changes)
    assert first.run.plan.chunks >= 3
    for block_elements in (MIN_BLOCK, 3 * MIN_BLOCK, 1 << 18):
        other = merged(mixed, name, tmp_path / "b", block_elements=block_elements, **changes)
        assert other.thresholds == first.thresholds
        assert other.files == first.files, block_elements
        assert other.run.inputs == first.run.inputs
    monkeypatch.setenv("PCB_RAY_KERNEL", "torch")
    plain = merged(mixed, name, tmp_path / "c", block_elements=2 * MIN_BLOCK, **changes)
    assert {s["kernel"] for s in plain.run.owners.stats.values()} == {"torch"}
    assert plain.thresholds == first.thresholds
    assert plain.files == first.files


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_weight_by_tensor_name_is_the_weight_of_that_tensor_alone(family, tmp_path, dtype):
    """Several small tensors of different weights share one block."""
    one = family(2)
    recipe = one.recipe(merge_method="task_arithmetic", dtype=dtype)
    recipe["models"][0]["parameters"] = {
        "weight": [{"filter": "q_proj", "value": 0.25}, {"filter": "mlp", "value": -1.0}, {"value": 3.0}]
    }
    made = plan(Recipe.from_dict(recipe))
    merge_locally(made, tmp_path / "out")
    out = families.load(tmp_path / "out")
    for name, theta in one.base.items():
        weight = 0.25 if "q_proj" in name else -1.0 if "mlp" in name else 3.0
        tau = [m[name].float() - theta.float() for m in one.models]
        want = theta.float() + (weight * tau[0] + tau[1])
        assert torch.equal(out[name], want.to(out[name].dtype)), name


def test_a_chunk_can_be_asked_again_by_another_owner(mixed, tmp_path):
    first = merged(mixed, "pcb-pairwise", tmp_path)
    made, thresholds = first.run.plan, first.thresholds
    order = list(range(made.chunks))
    there = Owner(made, str(tmp_path))
    written = there.written_digests(order)
    assert digests(Owner(made, str(tmp_path)), thresholds, order) == written
    assert digests(Owner(made, str(tmp_path), block_elements=MIN_BLOCK), thresholds, order[::-1]) == written
    assert {k: d for k, (d, _) in there.write(order[:2], thresholds, False).items()} == {k: written[k] for k in order[:2]}


def test_a_changed_byte_of_the_output_changes_its_digest(mixed, tmp_path):
    made = merged(mixed, "linear", tmp_path).run.plan
    before = Owner(made, str(tmp_path)).written_digests(range(made.chunks))
    tensor = made.tensors[3]
    path = tmp_path / made.files[tensor.slot.file].name
    with path.open("r+b") as stream:
        stream.seek(tensor.slot.start + 1)
        byte = stream.read(1)
        stream.seek(tensor.slot.start + 1)
        stream.write(bytes([byte[0] ^ 1]))
    after = Owner(made, str(tmp_path)).written_digests(range(made.chunks))
    assert [chunk for chunk in before if before[chunk] != after[chunk]] == [tensor.first // made.chunk_elements]


@pytest.mark.parametrize("name", ["pcb-pairwise", "pcb-paper", "linear"])
def test_one_changed_element_of_an_input_changes_the_digest_of_that_input_alone(family, tmp_path, name):
    one = family(2)
    made = planned(one.recipe(), name)
    before = input_digests(made, tmp_path / "a")
    one.models[1]["lm_head.weight"][95, 31] += 1
    families.write(one.folder / "model1", one.models[1])
    after = input_digests(planned(one.recipe(), name), tmp_path / "b")
    assert len(before) == len(after) == 3
    assert [a == b for a, b in zip(before, after, strict=True)] == [True, True, False]
    assert len(set(before)) == 3


@pytest.mark.parametrize("quantity", [MAGNITUDE, BETA])
def test_a_sample_does_not_depend_on_who_takes_it(mixed, quantity, tmp_path):
    first = merged(mixed, "pcb-pairwise", tmp_path)
    made, thresholds = first.run.plan, first.thresholds
    whole = Owner(made, str(tmp_path)).sample(range(made.chunks), quantity, thresholds).of_task
    parts = [
        Owner(made, str(tmp_path), block_elements=MIN_BLOCK).sample(chunks, quantity, thresholds).of_task
        for chunks in ([made.chunks - 1], range(1, made.chunks - 1), [0])
    ]
    for task in range(made.N):
        total = parts[0][task]
        total.merge(parts[1][task])
        total.merge(parts[2][task])
        for rank in range(0, made.D, made.D // 7):
            assert total.bracket(rank, made.D, -(1 << 30), 1 << 30) == whole[task].bracket(rank, made.D, -(1 << 30), 1 << 30)
        assert 0 < int(total.counts.sum()) <= made.D


# --- what is read ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "sweeps"),
    [("pcb-released", 3), ("pcb-pairwise", 3), ("pcb-paper", 4), ("ties", 2), ("task_arithmetic", 1), ("linear", 1)],
)
def test_a_model_larger_than_a_tally_takes_the_announced_number_of_sweeps(family, tmp_path, name, sweeps):
    made = planned(family(2, scale=30).recipe(), name)
    assert made.D > TALLY_ENTRIES
    assert made.sweeps == sweeps
    local = merge_locally(made, tmp_path)
    full = [s for s in local.run.sweeps if s.bytes >= made.sweep_bytes]
    assert len(full) == sweeps
    assert all(s.bytes == made.sweep_bytes for s in full)
    samples = local.bytes_read - sweeps * made.sweep_bytes
    quantities = {"pcb-paper": 1, "ties": 1}.get(name, 2 if sweeps == 3 else 0)
    assert 0 <= samples <= quantities * made.sweep_bytes / 14
    assert (samples > 0) == (quantities > 0)


def test_a_sweep_that_reads_all_counts_as_full_whatever_the_dtypes(mixed, tmp_path):
    """Bytes per element are no whole number here: rounding batch by batch must not lose any."""
    local = merged(mixed, "pcb-pairwise", tmp_path)
    made = local.run.plan
    assert made.sweep_bytes % made.D
    assert [s.bytes for s in local.run.sweeps] == [made.sweep_bytes] * 3
    assert local.bytes_read == 3 * made.sweep_bytes + made.copied_bytes


@pytest.mark.parametrize("name", METHODS)
def test_what_is_not_finite_is_found_in_the_first_sweep_and_named_by_file(family, tmp_path, name):
    one = family(2, scale=30)
    one.models[1]["model.layers.1.input_layernorm.weight"][17] = math.nan
    families.write(one.folder / "model1", one.models[1])
    made = planned(one.recipe(), name)
    merge_files = tmp_path / "out"
    merge_files.mkdir()
    for file in made.files:
        (merge_files / file.name).write_bytes(b"")
    owner = Owner(made, str(merge_files))
    run = Run(made, OneOwner(owner), quiet=True)
    with pytest.raises(RequestError) as told:
        list(run.sweep("write", "write", thresholds_of(run), True))
    assert str(told.value).startswith(
        f"{one.folder / 'model1'}: tensor model.layers.1.input_layernorm.weight holds nan at index [17] (BF16)"
    )
    assert owner.bytes.bytes_read <= made.sweep_bytes * 1.15
    assert not [s for s in run.sweeps if s.bytes >= made.sweep_bytes]


# --- files ----------------------------------------------------------------------------------------------------------------------------


def test_a_file_that_shrank_after_the_plan_is_named(family, tmp_path):
    one = family(2)
    made = plan(Recipe.from_dict(one.recipe()))
    path = one.folder / "model1" / "model.safetensors"
    whole = path.stat().st_size
    with path.open("r+b") as stream:
        stream.truncate(whole // 2)
    with pytest.raises(RequestError, match=rf"model1.*: {whole // 2} bytes on node .*, {whole} bytes in the plan"):
        Owner(made, str(tmp_path))
    path.unlink()
    with pytest.raises(RequestError, match=r"can't read it .*No such file"):
        Owner(made, str(tmp_path))
    with pytest.raises(RequestError, match="doesn't see the folder of the output"):
        Owner(made, str(tmp_path / "nowhere"))


def test_a_file_cut_while_it_is_read_is_named(family, tmp_path):
    one = family(1)
    made = plan(Recipe.from_dict(one.recipe()))
    owner = Owner(made, str(tmp_path))
    with (one.folder / "model0" / "model.safetensors").open("r+b") as stream:
        stream.truncate(20000)
    with pytest.raises(RunError, match=r"model0/model\.safetensors: ends at byte 20000, .*changed during the merge"):
        owner.merged_digests([0], Thresholds((0.0,), (1.0,), (0.0,), (1.0,)))


def test_bytes_reads_and_writes_ranges(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(bytes(range(100)))
    there = Bytes()
    there.write(str(path), 10, memoryview(b"abc"))
    out = memoryview(bytearray(5))
    there.read(str(path), 9, out)
    assert bytes(out) == bytes([9]) + b"abc" + bytes([13])
    assert there.bytes_read == 5
    there.close()


def test_twins_that_differ_are_told_before_anything_is_computed(family, tmp_path):
    config = families.CONFIG | {"tie_word_embeddings": True}
    shapes = {"model.embed_tokens.weight": (64, 16), "lm_head.weight": (64, 16), "model.norm.weight": (16,)}
    one = family(2, shapes=shapes, config=config)
    for state in (one.base, *one.models):
        state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
    one.models[1]["lm_head.weight"][63, 15] += 1
    one = families.Family(one.folder, one.base, one.models, config=config)
    made = plan(Recipe.from_dict(one.recipe()))
    assert len(made.twins) == 3
    (problem,) = Owner(made, str(tmp_path)).differing_twins(range(3))
    assert problem.startswith(
        f"{one.folder / 'model1'}: config.json ties lm_head.weight to model.embed_tokens.weight, but the stored copies differ"
    )
    assert "tie_word_embeddings" in problem
