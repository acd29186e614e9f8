"""The plan: which tensors are merged, copied, tied or in the way; where the output lies; what it costs. All from headers."""

from __future__ import annotations

import json
import math
import os
import pickle
import re
import struct
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import families
import pytest
import torch
import yaml
from families import Family, MakeFamily, merge_locally
from safetensors import safe_open

from pcb_ray import Recipe, RequestError
from pcb_ray.budget import CPU_BLOCK, CUDA_BLOCK, MIN_BLOCK, choose_block, worker_bytes
from pcb_ray.files.checkpoint import DTYPE_BYTES
from pcb_ray.methods import names, variants_of
from pcb_ray.planning import Plan, Sizes, plan


def planned(family: Family, *, max_shard_bytes: int = 10**9, **changes: Any) -> Plan:
    return plan(Recipe.from_dict(family.recipe(**changes)), max_shard_bytes=max_shard_bytes)


def problems_of(family: Family, **changes: Any) -> tuple[str, ...]:
    with pytest.raises(RequestError) as told:
        planned(family, **changes)
    return told.value.problems


def rewritten(family: Family) -> Family:
    """The same folder with what was changed in memory."""
    return Family(family.folder, family.base, family.models, family.shards, family.config)


# --- what counts ------------------------------------------------------------------------------------------------------------------


def test_all_floating_elements_count_and_lie_by_name(family):
    one = family(2)
    made = planned(one)
    assert made.N == 2
    assert sum(t.numel() for t in one.base.values()) == made.D
    assert [t.name for t in made.tensors] == sorted(one.base)
    assert [t.first for t in made.tensors] == [sum(one.base[n].numel() for n in sorted(one.base)[:k]) for k in range(len(one.base))]
    assert made.copies == made.tied == made.twins == made.dropped == ()


def test_equal_plans_are_equal_whatever_the_shards_and_survive_pickling(family):
    one = family(2)
    made = planned(one)
    assert made == planned(one)
    assert hash(made.tensors) == hash(planned(one).tensors)
    list(made.segments(0, 5))  # leaves a cache behind
    assert pickle.loads(pickle.dumps(made)) == made
    assert json.loads(json.dumps(made.fingerprint())) == json.loads(json.dumps(planned(one).fingerprint()))
    assert made != planned(one, parameters={"density": 0.2})
    assert made != planned(one, max_shard_bytes=10_000)


def test_segments_cover_every_element_once_in_order(family):
    made = planned(family(1, shapes={"a": (5,), "b": (), "c": (0, 3), "d": (7, 3), "e": (1,)}))
    assert made.D == 28
    for first in range(made.D):
        for stop in range(first + 1, made.D + 1):
            at = first
            for segment in made.segments(first, stop):
                tensor = made.tensors[segment.tensor]
                assert tensor.first + segment.start == at
                assert 0 <= segment.start < segment.stop <= tensor.numel
                at = tensor.first + segment.stop
            assert at == stop


def empties(state: dict[str, torch.Tensor], shape: tuple[int, ...] = (0,)) -> dict[str, torch.Tensor]:
    """What ZeRO-3 saves of what was not gathered."""
    return {name: torch.empty(shape, dtype=t.dtype) if t.ndim == 2 else t for name, t in state.items()}


@pytest.mark.parametrize("method", names())
@pytest.mark.parametrize("broken", ["base", "model1"])
@pytest.mark.parametrize("shape", [(0,), (0, 32)])
def test_tensors_without_elements_are_a_broken_checkpoint(tmp_path, method, broken, shape):
    base, models = families.fine_tuned(2)
    if broken == "base":
        base = empties(base, shape)
    else:
        models[1] = empties(models[1], shape)
    one = Family(tmp_path, base, models)
    with pytest.raises(RequestError) as caught:
        plan(one.recipe(merge_method=method))
    (problem,) = caught.value.problems
    assert f"/{broken}: wanted whole tensors, found 8 of 11 without elements (" in problem
    assert "it is broken. Fix: gather its weights and save it again" in problem
    assert "exclude" not in problem


def test_a_whole_family_saved_without_gathering_is_broken_too(tmp_path):
    base, models = families.fine_tuned(2)
    one = Family(tmp_path, empties(base), [empties(model) for model in models])
    with pytest.raises(RequestError, match="it is broken") as caught:
        plan(one.recipe())
    assert len(caught.value.problems) == 3
    plan(one.recipe(exclude=["*proj*", "*embed*", "*head*"]))  # who says that they are to stay as they are, may


def test_integers_excluded_and_empty_tensors_are_copied_and_told_apart(family, tmp_path):
    one = family(2)
    one.base |= {
        "ids": torch.arange(5),
        "flag": torch.tensor([True]),
        "x.inv_freq": torch.tensor([math.nan, -0.0]),
        "none": torch.empty(0, 4),
    }
    for model in one.models:
        model |= {"ids": torch.arange(5) + 1, "none": torch.empty(0, 4, dtype=torch.bfloat16)}
    made = planned(rewritten(one), exclude=["*.inv_freq"], dtype="float32", max_shard_bytes=20_000)
    assert made.summary()["tensors_copied"] == {"integer": 2, "excluded": 1, "empty": 1}
    assert sum(t.numel() for n, t in one.base.items() if "proj" in n or "norm" in n or "embed" in n or "head" in n) == made.D
    merge_locally(made, tmp_path / "out")
    out = families.load(tmp_path / "out")
    assert set(out) == set(one.base)
    for name in ("ids", "flag", "x.inv_freq"):
        assert out[name].dtype == one.base[name].dtype
        assert torch.equal(out[name].view(torch.uint8), one.base[name].view(torch.uint8)), name
    assert out["none"].shape == (0, 4)
    assert out["none"].dtype == out["lm_head.weight"].dtype == torch.float32


def test_float64_is_written_as_float32_with_a_note(family):
    made = planned(family(1, dtype=torch.float64))
    assert {t.slot.dtype for t in made.tensors} == {"F32"}
    assert any("float64" in note for note in made.notes)
    assert {t.slot.dtype for t in planned(family(1, dtype=torch.float64), dtype="bfloat16").tensors} == {"BF16"}


def test_weights_follow_the_first_filter_that_matches(family):
    one = family(2)
    recipe = one.recipe()
    recipe["models"][1]["parameters"] = {
        "weight": [{"filter": "self_attn", "value": 1.2}, {"filter": "layers.0", "value": 0.3}, {"value": 0.9}]
    }
    lambdas = {t.name: t.weights for t in plan(Recipe.from_dict(recipe)).tensors}
    assert lambdas["model.layers.0.self_attn.q_proj.weight"] == (1.0, 1.2)
    assert lambdas["model.layers.0.mlp.up_proj.weight"] == (1.0, 0.3)
    assert lambdas["model.layers.1.mlp.up_proj.weight"] == (1.0, 0.9)


def test_a_linear_merge_reads_the_base_only_if_it_is_listed(family):
    one = family(2)
    alone = planned(one, merge_method="linear")
    assert all(t.sources[0] is None for t in alone.tensors)
    assert alone.sweep_bytes == 2 * alone.D * 2
    without = plan(Recipe.from_dict({k: v for k, v in one.recipe(merge_method="linear").items() if k != "base_model"}))
    assert without.N == 2
    assert [t.sources[1:] for t in without.tensors] == [t.sources[1:] for t in alone.tensors]


# --- what is wrong ----------------------------------------------------------------------------------------------------------------


def apply_fix(problems: Sequence[str]) -> list[str]:
    """The exclude lines that an error proposes, read as the YAML that they are."""
    (fix,) = [p for p in problems if p.startswith("Fix:")]
    lines = yaml.safe_load(fix[fix.index("exclude:") :])["exclude"]
    assert lines
    return lines


def broken(family: MakeFamily) -> Family:
    one = family(2)
    one.base |= {
        "a[0].weight": torch.ones(3),
        "what?.weight": torch.ones(2),
        "only.base": torch.ones(1),
        "as.integer": torch.ones(4),
    }
    for model in one.models:
        model |= {
            "a[0].weight": torch.ones(3),
            "what?.weight": torch.ones(2),
            "only.base": torch.ones(1),
            "as.integer": torch.ones(4),
        }
    del one.models[0]["only.base"]
    one.models[0]["a[0].weight"] = torch.ones(4)
    one.models[1]["what?.weight"] = torch.ones(2, 1)
    one.models[1]["as.integer"] = torch.ones(4, dtype=torch.int32)
    one.models[1]["value_head.weight"] = torch.ones(8)
    one.models[1]["model.layers.1.input_layernorm.weight"] = torch.ones(31, dtype=torch.bfloat16)
    return rewritten(one)


def test_all_mismatches_are_reported_at_once_with_both_values(family):
    one = broken(family)
    text = "\n".join(problems_of(one))
    base, first, second = (str(one.folder / k) for k in ("base", "model0", "model1"))
    for line in (
        f"only.base: is in {base} with shape [1] but not in {first}",
        f"a[0].weight: shape [3] in {base} but [4] in {first}",
        f"what?.weight: shape [2] in {base} but [2, 1] in {second}",
        f"as.integer: dtype F32 in {base} but I32 in {second}",
        f"value_head.weight: is in {second} with shape [8] but not in {base}",
        f"model.layers.1.input_layernorm.weight: shape [32] in {base} but [31] in {second}",
    ):
        assert line in text


def test_the_proposed_exclude_lines_make_the_plan_succeed_and_exclude_no_more_than_needed(family):
    one = broken(family)
    lines = apply_fix(problems_of(one))
    made = planned(one, exclude=lines)
    assert {c.source.name for c in made.copies} == {
        "only.base",
        "a[0].weight",
        "what?.weight",
        "as.integer",
        "model.layers.1.input_layernorm.weight",
    }
    assert made.dropped == ("value_head.weight",)
    assert not [note for note in made.notes if "matches no tensor" in note]


def test_a_hundred_mismatches_still_show_the_lines_that_mend_them(family):
    shapes = {f"layers.{k}.{part}.weight": (4,) for k in range(50) for part in ("q", "k")}
    one = family(1, shapes=shapes | {f"layers.{k}.v.weight": (2, 2) for k in range(50)})
    for k in range(50):
        del one.models[0][f"layers.{k}.q.weight"]
        one.models[0][f"layers.{k}.k.weight"] = torch.ones(5)
    one = rewritten(one)
    with pytest.raises(RequestError) as told:
        planned(one)
    assert "82 more" in str(told.value)
    assert 'exclude:\n  - "layers.*.k.weight"\n  - "layers.*.q.weight"' in str(told.value), "what is printed, not what is kept"
    assert planned(one, exclude=apply_fix(told.value.problems)).D == 200


def test_models_that_cannot_be_opened_are_all_named(family):
    one = family(3)
    for k in (0, 2):
        (one.folder / f"model{k}" / "model.safetensors").unlink()
    found = problems_of(one)
    assert len(found) == 2
    assert "model0" in found[0]
    assert "model2" in found[1]


def test_models_of_integers_alone_have_nothing_to_merge(family):
    one = family(1)
    for state in (one.base, *one.models):
        state.clear()
        state["ids"] = torch.arange(3)
    (problem,) = problems_of(rewritten(one))
    assert "wanted floating-point tensors to merge, found 1 tensors" in problem
    (problem,) = problems_of(family(1), exclude=["*"])
    assert "wanted floating-point tensors to merge, found 11 tensors" in problem


def test_a_density_that_keeps_nothing_is_a_wrong_request(family):
    one = family(2)
    recipe = one.recipe()
    recipe["models"][1]["parameters"] = {"density": 1e-17}
    with pytest.raises(
        RequestError, match=r"model1: wanted a density that keeps at least one of 19552 merged elements, found 1e-17"
    ):
        plan(Recipe.from_dict(recipe))
    recipe["models"][1]["parameters"] = {"density": 1e-9}
    assert plan(Recipe.from_dict(recipe)).settings.each("density") == (0.1, 1e-9)


def test_linear_weights_that_cancel_in_one_tensor_are_named(family):
    recipe = family(2).recipe(merge_method="linear")
    recipe["models"][1]["parameters"] = {"weight": [{"filter": "q_proj", "value": -1.0}, {"value": 1.0}]}
    with pytest.raises(RequestError, match="weights"):
        plan(Recipe.from_dict(recipe))


def test_a_search_in_the_recipe_of_a_merge_is_noted(family):
    family = family(2)
    made = plan(Recipe.from_dict(family.recipe(search={"budget": 3})))
    assert any("`search` has no effect on a merge" in note for note in made.notes)
    assert made == plan(Recipe.from_dict(family.recipe()))


def test_an_exclude_pattern_that_matches_nothing_is_noted(family):
    made = planned(family(1), exclude=["rotary.*", "lm_head.*"])
    assert [note for note in made.notes if "exclude" in note] == ["exclude: 'rotary.*' matches no tensor"]


# --- tied embeddings --------------------------------------------------------------------------------------------------------------

TIED = families.CONFIG | {"tie_word_embeddings": True}
TIED_SHAPES = {"model.embed_tokens.weight": (64, 16), "model.norm.weight": (16,), "lm_head.weight": (64, 16)}


def tied_family(family: MakeFamily, *, copies: bool, config: dict[str, Any] = TIED) -> Family:
    one = family(2, shapes=TIED_SHAPES, config=config)
    for state in (one.base, *one.models):
        del state["lm_head.weight"]
        if copies:
            state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
    for path in one.folder.rglob("*.safetensors"):
        path.unlink()
    return rewritten(one)


@pytest.mark.parametrize("copies", [False, True])
def test_embeddings_that_the_config_ties_count_once_stored_once_or_twice(family, tmp_path, copies):
    made = planned(tied_family(family, copies=copies))
    assert made.D == 64 * 16 + 16
    assert made.tied == ((("lm_head.weight", "model.embed_tokens.weight"),) if copies else ())
    assert [(twin.input, twin.copy.name, twin.original.name, twin.declared) for twin in made.twins] == [
        (k, "lm_head.weight", "model.embed_tokens.weight", True) for k in range(3 * copies)
    ]
    merge_locally(made, tmp_path / "out")
    assert set(families.load(tmp_path / "out")) == {"model.embed_tokens.weight", "model.norm.weight"}


def test_a_tie_in_a_text_config_counts(family):
    config = {"model_type": "gemma3", "text_config": {"tie_word_embeddings": True}}
    assert planned(tied_family(family, copies=True, config=config)).D == 64 * 16 + 16


def write_bin(folder: Path, state: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(state, folder / "pytorch_model.bin")
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("order", ["head first", "embedding first"])
def test_names_that_share_storage_in_a_bin_count_once_under_the_embeddings_name(tmp_path, order):
    config = {"model_type": "t5"}
    for k, folder in enumerate(("base", "model0")):
        shared = torch.randn(32, 8, generator=torch.Generator().manual_seed(0)) * (1 + k / 10)
        names = ["lm_head.weight", "decoder.embed_tokens.weight", "shared.weight", "encoder.embed_tokens.weight"]
        state = dict.fromkeys(names if order == "head first" else names[::-1], shared)
        write_bin(tmp_path / folder, state | {"norm.weight": torch.ones(8) * k}, config)
    recipe = {"merge_method": "pcb", "base_model": str(tmp_path / "base"), "models": [{"model": str(tmp_path / "model0")}]}
    made = plan(Recipe.from_dict(recipe))
    assert made.D == 32 * 8 + 8
    merged = {t.name for t in made.tensors}
    assert len(merged & set(names)) == 1
    assert {name for name, _ in made.tied} | merged == {*names, "norm.weight"}
    assert {original for _, original in made.tied} <= merged
    assert "lm_head.weight" not in merged


# --- the output -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_shard_bytes", [1, 5000, 10**9])
def test_the_output_is_cut_at_the_wanted_size_and_read_by_the_safetensors_library(family, tmp_path, max_shard_bytes):
    one = family(2)
    one.base["counter"] = torch.tensor(7)
    for model in one.models:
        model["counter"] = torch.tensor(8)
    made = planned(rewritten(one), max_shard_bytes=max_shard_bytes, dtype="float16")
    merge_locally(made, tmp_path)
    held: dict[str, str] = {}
    for file in made.files:
        path = tmp_path / file.name
        assert path.stat().st_size == file.size
        with safe_open(path, "pt") as stream:
            assert stream.metadata() == {"format": "pt"}
            sizes = [stream.get_tensor(name).nbytes for name in stream.keys()]  # noqa: SIM118
            assert sum(sizes) <= max_shard_bytes or len(sizes) == 1
            assert sum(sizes) + len(file.header) == file.size
            held |= dict.fromkeys(stream.keys(), file.name)
    assert set(held) == set(one.base)
    if len(made.files) == 1:
        assert made.files[0].name == "model.safetensors"
    else:
        count = len(made.files)
        assert [f.name for f in made.files] == [f"model-{k + 1:05d}-of-{count:05d}.safetensors" for k in range(count)]
    assert made.written_bytes == sum(f.size for f in made.files)
    for tensor in made.tensors:
        assert tensor.slot.start % DTYPE_BYTES[tensor.slot.dtype] == 0, "aligned to its type"
    if max_shard_bytes == 5000:
        assert len(made.files) > 3


def test_tensors_stay_in_the_bases_order_from_file_to_file(family):
    one = family(1)
    made = planned(one, max_shard_bytes=3000)
    files = {t.name: t.slot.file for t in made.tensors}
    in_file_order = [files[name] for name in one_by_offset(one)]
    assert in_file_order == sorted(in_file_order)


def one_by_offset(family: Family) -> list[str]:
    raw = (family.folder / "base" / "model.safetensors").read_bytes()
    header = json.loads(raw[8 : 8 + struct.unpack("<Q", raw[:8])[0]])
    return sorted((n for n in header if n != "__metadata__"), key=lambda n: header[n]["data_offsets"])


# --- what it costs ----------------------------------------------------------------------------------------------------------------


def write_sparse(path: Path, tensors: dict[str, tuple[int, ...]]) -> None:
    """A safetensors file of bfloat16 zeros that takes no disk: a header and a hole."""
    table, at = {}, 0
    for name, shape in tensors.items():
        table[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [at, at + 2 * math.prod(shape)]}
        at += 2 * math.prod(shape)
    header = json.dumps(table).encode()
    header += b" " * (-len(header) % 8)
    with path.open("wb") as stream:
        stream.write(struct.pack("<Q", len(header)) + header)
        stream.truncate(8 + len(header) + at)


def seventy_billion() -> dict[str, tuple[int, ...]]:
    hidden, kv, wide, vocabulary = 8192, 1024, 28672, 128256
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, hidden)}
    for k in range(80):
        layer = f"model.layers.{k}"
        shapes |= {f"{layer}.self_attn.{p}_proj.weight": (hidden if p in "qo" else kv, hidden) for p in "qkv"}
        shapes[f"{layer}.self_attn.o_proj.weight"] = (hidden, hidden)
        shapes |= {f"{layer}.mlp.{p}_proj.weight": (wide, hidden) for p in ("gate", "up")}
        shapes[f"{layer}.mlp.down_proj.weight"] = (hidden, wide)
        shapes |= {f"{layer}.{p}_layernorm.weight": (hidden,) for p in ("input", "post_attention")}
    return shapes | {"model.norm.weight": (hidden,), "lm_head.weight": (vocabulary, hidden)}


@pytest.fixture(scope="module")
def ten_large_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base and ten models of 70 B parameters in 30 shards each, sparse; the recipe's path."""
    folder, shapes = tmp_path_factory.mktemp("large"), seventy_billion()
    names = list(shapes)
    for model in ("base", *(f"model{k}" for k in range(10))):
        (folder / model).mkdir()
        weight_map = {}
        for k in range(30):
            file = f"model-{k + 1:05d}-of-00030.safetensors"
            part = {n: shapes[n] for n in names[k * len(names) // 30 : (k + 1) * len(names) // 30]}
            write_sparse(folder / model / file, part)
            weight_map |= dict.fromkeys(part, file)
        (folder / model / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
        (folder / model / "config.json").write_text(json.dumps(families.CONFIG))
    recipe = {"merge_method": "pcb", "base_model": "base", "models": [{"model": f"model{k}"} for k in range(10)]}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder / "recipe.yaml"


def test_ten_models_of_70_billion_are_planned_in_seconds_and_little_memory(ten_large_models):
    program = (
        "import json, sys, time\n"
        "start = time.monotonic()\n"
        "from pcb_ray.cli import main\n"
        "code = main(['plan', sys.argv[1], '--json'])\n"
        "peak = next(line for line in open('/proc/self/status') if line.startswith('VmHWM'))\n"
        "print(json.dumps([code, time.monotonic() - start, int(peak.split()[1]) * 1024, 'torch' in sys.modules]), "
        "file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", program, str(ten_large_models)], capture_output=True, text=True, timeout=100)
    code, elapsed_s, peak_bytes, torch_loaded = json.loads(done.stderr.splitlines()[-1])
    facts = json.loads(done.stdout)
    assert code == 0
    assert facts["D"] == sum(math.prod(shape) for shape in seventy_billion().values()) == 70_553_706_496
    assert facts["N"] == 10
    assert facts["bytes_per_sweep"] == 11 * 2 * facts["D"]
    assert facts["bytes_read"] == 3 * facts["bytes_per_sweep"]
    assert elapsed_s < 20
    assert peak_bytes < 500e6
    assert not torch_loaded, "headers need no torch"


def test_a_worker_for_ten_large_models_stays_under_two_gigabytes(ten_large_models):
    recipe = Recipe.from_file(ten_large_models)
    for variant in variants_of(recipe.merge_method):
        made = plan(recipe.with_parameters({"variant": variant}))
        assert max(t.numel for t in made.tensors) >= 128256 * 8192
        block = choose_block(made, "cpu", 2 * 10**9)
        assert worker_bytes(made, block) <= 2 * 10**9
        assert block == CPU_BLOCK, "no smaller than without a bound"
        size = made.sizes.chunk_elements
        assert made.chunks * size >= made.D > (made.chunks - 1) * size
        assert len(made.parts) <= made.chunks + len(made.files)


def test_memory_grows_with_the_block_and_a_bound_chooses_it(family):
    made = planned(family(3))
    assert choose_block(made, "cpu", None) == CPU_BLOCK
    assert choose_block(made, "cuda", None) == CUDA_BLOCK
    sizes = [worker_bytes(made, block) for block in (MIN_BLOCK, CPU_BLOCK, CUDA_BLOCK)]
    assert sizes == sorted(set(sizes))
    assert choose_block(made, "cuda", sizes[1]) == CPU_BLOCK
    assert choose_block(made, "cpu", sizes[0]) == MIN_BLOCK
    with pytest.raises(
        RequestError, match=re.escape(f"wanted at least {sizes[0]:,} bytes for a worker of 3 models, found {sizes[0] - 1:,}")
    ):
        choose_block(made, "cpu", sizes[0] - 1)


def test_the_summary_is_json_and_counts_what_the_plan_does(family):
    one = family(2)
    one.base["ids"] = torch.arange(3)
    made = planned(rewritten(one))
    facts = json.loads(json.dumps(made.summary()))
    assert facts["D"] == made.D
    assert facts["bytes_written"] == sum(f["bytes"] for f in facts["output_files"])
    assert facts["bytes_per_sweep"] == 3 * 2 * made.D
    assert facts["bytes_read"] == 3 * facts["bytes_per_sweep"] + 24
    assert facts["copied"] == [{"name": "ids", "why": "integer", "bytes": 24}]
    assert [i["bytes"] for i in facts["inputs"]] == [
        os.path.getsize(p) for p in (one.folder / n / "model.safetensors" for n in ("base", "model0", "model1"))
    ]


def test_a_plan_takes_a_recipe_its_file_or_a_dictionary(family):
    one = family(2)
    made = plan(Recipe.from_dict(one.recipe()))
    assert plan(one.recipe()) == plan(one.recipe_file()) == plan(str(one.recipe_file())) == made


def test_a_sample_is_a_sixteenth_of_a_small_model_and_a_128th_of_a_large_one():
    sizes = [Sizes.of(D) for D in (10**5, 10**8, 10**9, 7 * 10**10)]
    assert [round(one.sample_stride / one.sample_run) for one in sizes] == [16, 23, 128, 128]
