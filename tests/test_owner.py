"""What an owner answers is a function of the plan and the question: no block size, order or kernel shows in the bytes, and it reads
what it must."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from families import Local, merge_locally

from pcb_ray import Recipe, RequestError
from pcb_ray.analysis import analyse
from pcb_ray.budget import MIN_BLOCK
from pcb_ray.errors import InputError
from pcb_ray.files.store import LocalStore
from pcb_ray.methods import METHODS as RECORDS
from pcb_ray.methods import Ranks
from pcb_ray.owner import Owner
from pcb_ray.planning import Copied, Plan, plan
from pcb_ray.questions import CompareParts, CountKeys, SampleKeys, WriteParts
from pcb_ray.selection import Bracket
from pcb_ray.session import Session

METHODS = tuple(record.full_name for record in RECORDS if record.of_matrix is None)  # the others: test_by_matrix.py


def planned(recipe: dict[str, object], name: str, **changes: object) -> Plan:
    method, _, variant = name.partition("-")
    parameters = {"variant": variant} if variant else {}
    return plan(Recipe.from_dict(recipe | {"merge_method": method, "parameters": parameters} | changes))


def owner_of(made: Plan, **options: Any) -> Owner:
    return Owner(made, LocalStore(), **options)


class OneOwner:
    """The smallest thing that a session can ask."""

    deaths = 0

    def __init__(self, owner: Owner) -> None:
        self.owner, self.states = owner, []

    def ask(self, question: Any, items: Sequence[int], chunks_of: Any = None) -> Iterator[tuple[Sequence[int], Any]]:
        for item in items:
            yield [item], question.answer(self.owner, [item])

    def store(
        self, question: Any, items: Sequence[int], chunks_of: Any = None, **options: Any
    ) -> Iterator[tuple[Sequence[int], Any]]:
        return self.ask(question, items)

    def fold(self, question: Any, items: Sequence[int], done: Callable[[Sequence[int]], None]) -> Any:
        answer = question.answer(self.owner, items)
        done(items)
        return answer


def input_digests(made: Plan, out: Path) -> tuple[int, ...]:
    """The sums that the first sweep takes; a method of one sweep takes them while it writes."""
    local = merge_locally(made, out)
    written = owner_of(made).write(range(len(made.parts)), WriteParts(local.known, str(out))).values()
    sums = tuple(sum(one.inputs[source] for one in written) % (1 << 128) for source in range(made.N + 1))
    if made.method.passes:
        assert local.session.inputs == sums, "all sweeps digest alike, in whatever order they read"
    return sums


# --- the bytes --------------------------------------------------------------------------------------------------------------------


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
    parts = list(range(len(made.parts)))
    return merge_locally(made, out, block_elements=block_elements, parts=parts[::-1] if block_elements else parts)


@pytest.mark.parametrize("dtype", [None, "float32"])
@pytest.mark.parametrize("name", METHODS)
def test_bytes_do_not_depend_on_block_size_order_or_kernel(mixed, name, dtype, tmp_path, monkeypatch):
    changes = {} if dtype is None else {"dtype": dtype}
    first = merged(mixed, name, tmp_path / "a", **changes)
    assert first.session.plan.chunks >= 3
    for block_elements in (MIN_BLOCK, 3 * MIN_BLOCK, 1 << 18):
        other = merged(mixed, name, tmp_path / "b", block_elements=block_elements, **changes)
        assert other.known == first.known
        assert other.files == first.files, block_elements
        assert other.session.inputs == first.session.inputs
    monkeypatch.setenv("PCB_RAY_KERNEL", "torch")
    plain = merged(mixed, name, tmp_path / "c", block_elements=2 * MIN_BLOCK, **changes)
    assert {state.kernel for state in plain.session.owners.states} == {"torch"}
    assert plain.known == first.known
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


def test_a_part_can_be_asked_again_by_another_owner(mixed, tmp_path):
    first = merged(mixed, "pcb-pairwise", tmp_path)
    made, known, order = first.session.plan, first.known, range(len(first.session.plan.parts))
    there = owner_of(made).digest_parts(order, str(tmp_path))
    for options in ({}, {"block_elements": MIN_BLOCK}):
        assert owner_of(made, **options).compare_parts(order[::-1], CompareParts(known, str(tmp_path))) == {}
    again = owner_of(made).write(order[:2], WriteParts(known, str(tmp_path)))
    assert {number: one.digest for number, one in again.items()} == {number: there[number] for number in order[:2]}
    assert owner_of(made).digest_parts(order, str(tmp_path)) == there


def test_parts_are_the_output_files_from_the_first_byte_to_the_last(mixed, tmp_path):
    made = merged(mixed, "ties", tmp_path, exclude=["*norm*"]).session.plan
    assert len(made.parts) > len(made.files) > 0
    for number, file in enumerate(made.files):
        parts = [part for part in made.parts if part.file == number]
        assert [parts[0].start, parts[-1].stop] == [0, file.size]
        assert [one.stop for one in parts[:-1]] == [one.start for one in parts[1:]]
    segments = [segment for part in made.parts for segment in part.segments]
    copied = {segment.copy for segment in segments if isinstance(segment, Copied)}
    assert copied == {k for k, copy in enumerate(made.copies) if copy.source.nbytes}, "a copied tensor is a segment like any other"
    merged_elements = sum(segment.stop - segment.start for segment in segments if not isinstance(segment, Copied))
    assert merged_elements == made.D


def test_a_changed_byte_of_the_output_changes_the_digest_of_its_part_and_is_told_with_its_tensor(mixed, tmp_path):
    local = merged(mixed, "linear", tmp_path)
    made, parts = local.session.plan, range(len(local.session.plan.parts))
    before = owner_of(made).digest_parts(parts, str(tmp_path))
    tensor = made.tensors[3]
    at, path = tensor.slot.start + 1, tmp_path / made.files[tensor.slot.file].name
    with path.open("r+b") as stream:
        stream.seek(at)
        byte = stream.read(1)
        stream.seek(at)
        stream.write(bytes([byte[0] ^ 1]))
    after = owner_of(made).digest_parts(parts, str(tmp_path))
    (changed,) = [number for number in before if before[number] != after[number]]
    part = made.parts[changed]
    assert part.file == tensor.slot.file
    assert part.start <= at < part.stop
    differences = owner_of(made).compare_parts(parts, CompareParts(local.known, str(tmp_path)))
    assert list(differences) == [changed]
    assert differences[changed] == f"{made.files[part.file].name}, byte {at}: {tensor.name}"


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


@pytest.mark.parametrize("step", [0, 1])
def test_a_sample_does_not_depend_on_who_takes_it(mixed, step, tmp_path):
    first = merged(mixed, "pcb-pairwise", tmp_path)
    made, question = first.session.plan, SampleKeys(step, first.known)
    whole = owner_of(made).sample(range(made.chunks), question).of_model
    parts = [
        owner_of(made, block_elements=MIN_BLOCK).sample(chunks, question).of_model
        for chunks in ([made.chunks - 1], range(1, made.chunks - 1), [0])
    ]
    for task in range(made.N):
        total = parts[0][task]
        total.merge(parts[1][task])
        total.merge(parts[2][task])
        for rank in range(0, made.D, made.D // 7):
            one, other = (sample.bracket(rank, made.D, -(1 << 30), 1 << 30, 1 << 19) for sample in (total, whole[task]))
            assert one == other
        assert 0 < int(total.counts.sum()) <= made.D


# --- what is read -----------------------------------------------------------------------------------------------------------------


SWEEPS = {"pcb-released": 3, "pcb-pairwise": 3, "pcb-paper": 4, "ties": 2}


@pytest.mark.parametrize("name", METHODS)
def test_a_model_larger_than_a_tally_takes_the_announced_number_of_sweeps(family, tmp_path, name):
    sweeps = SWEEPS.get(name, 2 if name.startswith("ties") else 1)
    made = planned(family(2, scale=30).recipe(), name)
    assert made.sizes.tally_entries < made.D
    assert made.method.sweeps == sweeps
    local = merge_locally(made, tmp_path)
    full = [s for s in local.session.sweeps if s.bytes >= made.sweep_bytes]
    assert len(full) == sweeps
    assert all(s.bytes == made.sweep_bytes for s in full)
    samples = local.bytes_read - sweeps * made.sweep_bytes
    quantities = sum(isinstance(one, Ranks) for one in made.method.passes)
    assert 0 <= samples <= quantities * made.sweep_bytes / 14
    assert (samples > 0) == (quantities > 0)


def test_a_sweep_that_reads_all_counts_as_full_whatever_the_dtypes(mixed, tmp_path):
    """Bytes per element are no whole number here: rounding batch by batch must not lose any."""
    local = merged(mixed, "pcb-pairwise", tmp_path)
    made = local.session.plan
    assert made.sweep_bytes % made.D
    assert [s.bytes for s in local.session.sweeps] == [made.sweep_bytes] * 3
    assert local.bytes_read == 3 * made.sweep_bytes + made.copied_bytes


@pytest.mark.parametrize("name", METHODS)
def test_what_is_not_finite_is_found_in_the_first_sweep_and_named_by_file(family, tmp_path, name):
    one = family(2, scale=30)
    one.models[1]["model.layers.1.input_layernorm.weight"][17] = math.nan
    families.write(one.folder / "model1", one.models[1])
    made, out = planned(one.recipe(), name), tmp_path / "out"
    out.mkdir()
    owner = owner_of(made)
    for file in made.files:
        owner.store.create(str(out / file.name), file.size)
    session = Session(made, lambda _plan: OneOwner(owner))
    with pytest.raises(RequestError) as told:
        list(session.store("write", WriteParts(analyse(session), str(out)), range(len(made.parts))))
    assert str(told.value).startswith(
        f"{one.folder / 'model1'}: tensor model.layers.1.input_layernorm.weight: wanted finite numbers, found nan at index [17] "
        "(BF16)"
    )
    assert owner.state().bytes_read <= made.sweep_bytes * 1.15
    assert not [s for s in session.sweeps if s.bytes >= made.sweep_bytes]


# --- files ------------------------------------------------------------------------------------------------------------------------


def test_a_file_that_shrank_after_the_plan_is_named(family, tmp_path):
    one = family(2)
    made = plan(Recipe.from_dict(one.recipe()))
    path = one.folder / "model1" / "model.safetensors"
    whole = path.stat().st_size
    with path.open("r+b") as stream:
        stream.truncate(whole // 2)
    with pytest.raises(RequestError, match=rf"model1.*: wanted {whole} bytes, as planned, found {whole // 2} on node "):
        owner_of(made)
    path.unlink()
    with pytest.raises(RequestError, match=r"wanted a file that node .* can read, found: No such file"):
        owner_of(made)
    with pytest.raises(RequestError, match="nowhere: wanted the output's folder, found none on node"):
        owner_of(made, writes_to=str(tmp_path / "nowhere"))


def test_a_file_cut_while_it_is_read_is_named(family, tmp_path):
    one = family(1)
    made = plan(Recipe.from_dict(one.recipe()))
    owner = owner_of(made)
    with (one.folder / "model0" / "model.safetensors").open("r+b") as stream:
        stream.truncate(20000)
    with pytest.raises(InputError, match=r"model0/model\.safetensors: wanted .*, found its end at byte 20000: it was changed"):
        owner.count([0], CountKeys(0, {}, ((Bracket(0, 1),),)))
