"""Tensors that are the same under other names are recognised; what has no counterpart is told with a reason and with advice that
helps."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import families
import numpy as np
import pytest
import torch
from families import Family, StateDict, merged_to

from pcb_ray import Recipe, RequestError, verify
from pcb_ray.conversions import conversions_of
from pcb_ray.files.checkpoint import Checkpoint, Tensor
from pcb_ray.files.store import MemoryStore
from pcb_ray.matching import match
from pcb_ray.planning import Plan, open_inputs, plan_of
from pcb_ray.tied import Samples


def recipe(one: Family, **changes: object) -> Recipe:
    return Recipe.from_dict(one.recipe(merge_method="task_arithmetic", parameters={"lambda": 0.5}, **changes))


def planned(one: Family, **changes: object) -> Plan:
    asked = recipe(one, **changes)
    return plan_of(asked, open_inputs(asked))


def problems_of(one: Family, **changes: object) -> str:
    with pytest.raises(RequestError) as caught:
        planned(one, **changes)
    return "\n".join(caught.value.problems)


def renamed(state: StateDict, rename: Callable[[str], str]) -> StateDict:
    return {rename(name): tensor for name, tensor in state.items()}


# A model of text and pictures, as the Hub has its names.
VLM = {
    "language_model.model.embed_tokens.weight": (64, 16),
    "language_model.model.layers.0.q.weight": (16, 16),
    "language_model.model.norm.weight": (16,),
    "vision_tower.patch.weight": (16, 12),
    "multi_modal_projector.linear.weight": (16, 16),
}
BERT = {"bert.embeddings.weight": (64, 16), "bert.LayerNorm.weight": (16,), "bert.LayerNorm.bias": (16,), "cls.bias": (64,)}


def nested(name: str) -> str:
    return f"model.{name}".replace("model.language_model.model.", "model.language_model.")


def gammas(name: str) -> str:
    return name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")


RENAMINGS: dict[str, tuple[dict[str, tuple[int, ...]] | None, Callable[[str], str]]] = {
    "torch.compile": (None, lambda name: f"_orig_mod.{name}"),
    "torch.compile of a part": (None, lambda name: name.replace("layers.0.", "layers.0._orig_mod.")),
    "DataParallel": (None, lambda name: f"module.{name}"),
    "both": (None, lambda name: f"module._orig_mod.{name}"),
    "peft": (None, lambda name: f"base_model.model.{name}"),
    "FSDP": (None, lambda name: name.replace("layers.0.", "layers.0._fsdp_wrapped_module.")),
    "a prefix less": (None, lambda name: name.removeprefix("model.")),
    "a prefix of nobody we know": (None, lambda name: f"student.net.{name}"),
    "gamma and beta": (BERT, gammas),
    "gamma and beta, and a prefix less": (BERT, lambda name: gammas(name).removeprefix("bert.")),
    "modules of a vision-language model": (VLM, nested),
    "the same, compiled": (VLM, lambda name: f"_orig_mod.{nested(name)}"),
}


@pytest.mark.parametrize("name", RENAMINGS)
@pytest.mark.parametrize("which", ["base", "model1", "models"])
def test_the_same_tensors_under_other_names_are_merged_under_the_bases(tmp_path: Path, name: str, which: str) -> None:
    shapes, rename = RENAMINGS[name]
    base, models = families.fine_tuned(2, shapes=shapes)
    plain = merged_to(tmp_path / "plain", recipe(Family(tmp_path / "a", base, models)))
    if which == "base":
        one = Family(tmp_path / "b", renamed(base, rename), models)
    elif which == "models":
        one = Family(tmp_path / "b", base, [renamed(model, rename) for model in models])
    else:
        one = Family(tmp_path / "b", base, [models[0], renamed(models[1], rename)])
    made = planned(one)
    assert sum(t.numel() for t in base.values()) == made.D
    assert len(made.notes) == (1 if which == "model1" else 2)
    assert "tensors are taken under the base's names, as" in made.notes[0]
    out = families.load(merged_to(tmp_path / "out", recipe(one)))
    wanted = families.load(plain)
    named = rename if which == "base" else str
    assert {n: t.tolist() for n, t in out.items()} == {named(n): t.tolist() for n, t in wanted.items()}


@pytest.mark.parametrize("prefixed", ["base", "models"])
def test_a_prefix_is_found_though_one_side_has_a_head(tmp_path: Path, prefixed: str) -> None:
    shapes = {f"roberta.encoder.layer.{k}.weight": (16, 16) for k in range(3)} | {
        "lm_head.bias": (8,),
        "lm_head.dense.weight": (8, 16),
    }
    base, models = families.fine_tuned(1, shapes=shapes)

    def plain(state: StateDict) -> StateDict:
        return {name.removeprefix("roberta."): t for name, t in state.items() if not name.startswith("lm_head")}

    one = Family(tmp_path, base, [plain(models[0])]) if prefixed == "base" else Family(tmp_path, plain(base), models)
    made = planned(one, exclude=["lm_head.*"])
    assert made.D == 3 * 256
    assert "3 tensors are taken under the base's names" in made.notes[0]


@pytest.mark.very_slow
def test_fifty_thousand_names_are_matched_and_complained_of() -> None:
    """In quadratic time it would take longer than a test may."""

    def model(stem: str, count: int = 50_000) -> Checkpoint:
        tensors = {
            n: Tensor(n, "BF16", (4, 4), "f", 32 * k) for k, n in enumerate(f"l.{k % 60}.{stem}.{k}.w" for k in range(count))
        }
        return Checkpoint(stem, None, tensors, {}, (), None, None)

    samples = Samples(MemoryStore({"f": np.random.default_rng(0).integers(0, 255, 32 * 50_000, dtype=np.uint8)}))
    with pytest.raises(RequestError):
        match([model("mlp.experts"), model("moe.experts")], (), samples, (), [])
    with pytest.raises(RequestError):
        match([model("mlp.experts"), model("mlp.experts", 25_000)], (), samples, (), [])
    assert len(match([model("a"), model("a")], (), samples, (), []).merged) == 50_000


def test_a_renaming_in_which_a_tensor_would_take_anothers_place_is_none(tmp_path: Path) -> None:
    base, models = families.fine_tuned(1, shapes={f"model.layers.{k}.w.weight": (8, 8) for k in range(3)})
    stray = {"model.layers.1.w.weight": models[0]["model.layers.1.w.weight"].clone()}
    told = problems_of(Family(tmp_path, base, [renamed(models[0], lambda name: f"model.{name}") | stray]))
    assert "model.layers.0.w.weight: is in" in told


@pytest.mark.parametrize("seed", range(6))
def test_which_prefix_is_taken_does_not_depend_on_chance(tmp_path: Path, seed: int) -> None:
    """Names in sets come in the order of their hashes, which differ from run to run."""
    shapes = {f"{tower}.encoder.layer.{k}.weight": (8, 8) for tower in ("query", "doc") for k in range(4)}
    base, models = families.fine_tuned(1, shapes=shapes)
    models = [{name.removeprefix("query."): t for name, t in models[0].items() if name.startswith("query.")}]
    path = Family(tmp_path, base, models).recipe_file(merge_method="linear", exclude=["doc.*"])
    command = [sys.executable, "-m", "pcb_ray", "plan", str(path)]
    done = subprocess.run(command, env=os.environ | {"PYTHONHASHSEED": str(seed)}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "4 tensors are taken under the base's names" in done.stdout


def test_names_that_agree_are_left_alone(tmp_path: Path) -> None:
    assert planned(Family(tmp_path, *families.fine_tuned(2))).notes == ()


def test_a_renaming_that_would_make_two_tensors_one_is_none(tmp_path: Path) -> None:
    base, models = families.fine_tuned(1, shapes={"a.weight": (8, 8), "b.weight": (8, 8)})
    models[0] = {"module.a.weight": models[0]["a.weight"], "a.weight": models[0]["b.weight"]}
    told = problems_of(Family(tmp_path, base, models))
    assert "b.weight: is in" in told


def test_masks_and_tables_that_only_some_save_are_no_mismatch(tmp_path: Path) -> None:
    shapes = {"h.0.attn.c_attn.weight": (16, 48), "h.0.attn.c_attn.bias": (48,), "ln.weight": (16,)}
    base, models = families.fine_tuned(2, shapes=shapes)
    masks = {"h.0.attn.bias": torch.ones(1, 1, 8, 8), "h.0.attn.masked_bias": torch.tensor(-1e4), "rotary.inv_freq": torch.ones(4)}
    made = planned(Family(tmp_path / "a", base | masks, models))
    assert {c.source.name: c.why for c in made.copies} == dict.fromkeys(masks, "buffer")
    made = planned(Family(tmp_path / "b", base, [models[0] | masks, models[1]]))
    assert (made.copies, made.dropped) == ((), ())
    everywhere = planned(Family(tmp_path / "c", base | masks, [model | masks for model in models]))
    assert made.D + sum(t.numel() for t in masks.values()) == everywhere.D, "what all save is merged, as it always was"


def test_gpt2_as_the_hub_has_it_and_as_it_is_saved(tmp_path: Path) -> None:
    shapes = {"transformer.wte.weight": (64, 16), "transformer.h.0.attn.c_attn.weight": (16, 48), "transformer.ln_f.weight": (16,)}
    base, models = families.fine_tuned(2, shapes=shapes)
    mask = {"h.0.attn.bias": torch.ones(1, 1, 8, 8).tril()}
    one = Family(tmp_path, renamed(base, lambda name: name.removeprefix("transformer.")) | mask, models)
    out = families.load(merged_to(tmp_path / "out", recipe(one)))
    assert out.keys() == {"wte.weight", "h.0.attn.c_attn.weight", "ln_f.weight", *mask}
    assert torch.equal(out["h.0.attn.bias"], mask["h.0.attn.bias"])


# --- advice -----------------------------------------------------------------------------------------------------------------------


def test_to_exclude_is_no_advice_where_no_matrix_would_be_left(tmp_path: Path) -> None:
    base, models = families.fine_tuned(1)
    other = {name.replace("proj", "linear").replace("weight", "w") if t.ndim == 2 else name: t for name, t in models[0].items()}
    told = problems_of(Family(tmp_path / "a", base, [other]))
    assert "exclude:" not in told
    assert "hardly a matrix has the same name and shape in all" in told
    told = problems_of(Family(tmp_path / "b", base, [{f"x{k}": t for k, t in enumerate(models[0].values())}]))
    assert "have no tensor name in common. Is it of the same architecture?" in told
    wide = {name: torch.cat([t, t]) for name, t in models[0].items()}
    told = problems_of(Family(tmp_path / "c", base, [wide]))
    assert "Are they of the same architecture and size?" in told


def test_what_a_model_has_trained_and_loses_by_exclusion_is_said(tmp_path: Path) -> None:
    base, models = families.fine_tuned(2)
    head = base.pop("lm_head.weight")
    del models[0]["lm_head.weight"]
    assert head.shape != base["model.embed_tokens.weight"].shape
    told = problems_of(Family(tmp_path, base, models))
    assert "lm_head.weight: is in" in told
    assert 'exclude:\n  - "lm_head.weight"' in told
    assert "lose what a model has trained in these" in told
    planned(Family(tmp_path / "b", base, models), exclude=["lm_head.weight"])


# --- what transformers renames and packs ------------------------------------------------------------------------------------------


PACKED = ("mixtral", "qwen3 moe", "nomic bert")


def mixture(kind: str) -> Any:
    import transformers as t

    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    if kind == "mixtral":
        return t.MixtralForCausalLM(t.MixtralConfig(**sizes, num_key_value_heads=2, num_local_experts=3))
    if kind == "qwen3 moe":
        return t.Qwen3MoeForCausalLM(t.Qwen3MoeConfig(**sizes, num_key_value_heads=2, num_experts=3, moe_intermediate_size=8))
    if kind == "vit":
        image = {"image_size": 8, "patch_size": 4}
        return t.ViTForImageClassification(t.ViTConfig(**{k: v for k, v in sizes.items() if k != "vocab_size"}, **image))
    if kind == "nomic bert":  # q, k and v are one tensor in files, and three in memory
        return t.NomicBertForMaskedLM(t.NomicBertConfig(**sizes, pad_token_id=0))
    vision = {k: v for k, v in sizes.items() if k != "vocab_size"} | {"image_size": 28, "patch_size": 14}
    text = sizes | {"num_key_value_heads": 2, "head_dim": 8}
    return t.Gemma3ForConditionalGeneration(t.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4))


def saved_in_two_ways(folder: Path, kind: str, as_in_memory: tuple[str, ...]) -> Any:
    """A family, of which these lie in files as they do in memory."""
    model = mixture(kind)
    for k, name in enumerate(("base", "model0", "model1")):
        if k:
            torch.manual_seed(k)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(torch.randn(parameter.shape) * 0.02)
        for form in ("files", "memory"):
            model.save_pretrained(folder / form / name, save_original_format=form == "files")
        (folder / "mixed").mkdir(exist_ok=True)
        (folder / "mixed" / name).symlink_to(folder / ("memory" if name in as_in_memory else "files") / name)
    return type(model)


@pytest.mark.parametrize("kind", ["mixtral", "qwen3 moe", "gemma3", "vit", "nomic bert"])
@pytest.mark.parametrize("as_in_memory", [("model1",), ("base",), ("base", "model0")])
def test_what_transformers_renames_and_packs_is_one_model(tmp_path: Path, kind: str, as_in_memory: tuple[str, ...]) -> None:
    loader = saved_in_two_ways(tmp_path, kind, as_in_memory)
    content = {
        "merge_method": "task_arithmetic",
        "base_model": "base",
        "models": ["model0", "model1"],
        "parameters": {"lambda": 0.5},
    }
    mixed = Recipe.from_dict(content, folder=tmp_path / "mixed")
    inputs = open_inputs(mixed)
    made = plan_of(mixed, inputs)
    assert any("packed tensors are taken in their parts" in note for note in made.notes) == (kind in PACKED)
    out = merged_to(tmp_path / "out", mixed)
    plain = merged_to(tmp_path / "plain", Recipe.from_dict(content, folder=tmp_path / "files"))
    assert families.load(out).keys() == inputs.base.tensors.keys()
    merged, expected = (loader.from_pretrained(folder, output_loading_info=True) for folder in (out, plain))
    assert not any(merged[1].values())
    own = expected[0].state_dict()
    for name, tensor in merged[0].state_dict().items():
        assert torch.equal(tensor, own[name]), name
    assert verify(out, quiet=True).ok


def test_the_share_that_is_kept_is_one_of_the_whole_model_however_it_is_packed(tmp_path: Path) -> None:
    """Also in parts of the output so small that they cut packed tensors, and in several files."""
    loader = saved_in_two_ways(tmp_path, "mixtral", ("base", "model1"))
    content = {"merge_method": "pcb", "base_model": "base", "models": ["model0", "model1"], "parameters": {"density": 0.3}}
    states = []
    with families.small_engine():
        for form in ("mixed", "files"):
            asked = Recipe.from_dict(content, folder=tmp_path / form)
            out = merged_to(tmp_path / f"out-{form}", asked)
            states.append(loader.from_pretrained(out).state_dict())
            assert verify(out, quiet=True).ok
            made = plan_of(asked, open_inputs(asked), max_shard_bytes=4000)
            assert len(made.files) > 4
            families.merge_locally(made, tmp_path / f"cut-{form}")
            whole = families.load(out)
            assert all(torch.equal(tensor, whole[name]) for name, tensor in families.load(tmp_path / f"cut-{form}").items())
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())


@pytest.mark.parametrize("as_in_memory", [("model1",), ("base",), ("base", "model0")])
def test_packed_experts_of_a_model_without_its_head_fit_one_with_it(tmp_path: Path, as_in_memory: tuple[str, ...]) -> None:
    """The base is saved by AutoModel: its names lack the prefix too."""
    saved_in_two_ways(tmp_path, "mixtral", as_in_memory)
    for form in ("files", "memory"):
        folder = tmp_path / form / "base"
        state = {n.removeprefix("model."): t for n, t in families.load(folder).items() if n != "lm_head.weight"}
        config = json.loads((folder / "config.json").read_text()) | {"architectures": ["MixtralModel"]}
        families.write(folder, state, config=config)
    content = {"merge_method": "linear", "base_model": "base", "models": ["model0", "model1"], "exclude": ["lm_head.weight"]}
    out = merged_to(tmp_path / "out", Recipe.from_dict(content, folder=tmp_path / "mixed"))
    plain = merged_to(tmp_path / "plain", Recipe.from_dict(content, folder=tmp_path / "files"))
    kind = type(mixture("mixtral").model)
    merged, info = kind.from_pretrained(out, output_loading_info=True)
    assert not any(info.values())
    own = kind.from_pretrained(plain).state_dict()
    assert all(torch.equal(tensor, own[name]) for name, tensor in merged.state_dict().items())


@pytest.mark.parametrize("as_in_memory", [("model1",), ("base",)])
def test_packed_experts_are_excluded_by_the_names_of_the_base(tmp_path: Path, as_in_memory: tuple[str, ...]) -> None:
    saved_in_two_ways(tmp_path, "mixtral", as_in_memory)
    content = {"merge_method": "linear", "base_model": "base", "models": ["model0", "model1"], "exclude": ["*.experts.*"]}
    asked = Recipe.from_dict(content, folder=tmp_path / "mixed")
    out = families.load(merged_to(tmp_path / "out", asked))
    base = families.load(tmp_path / "mixed" / "base")
    assert out.keys() == base.keys()
    for name, tensor in base.items():
        assert torch.equal(out[name], tensor) == (".experts." in name), name


def test_weights_by_name_hold_for_packed_tensors(tmp_path: Path) -> None:
    saved_in_two_ways(tmp_path, "mixtral", ("base",))
    weight = [{"filter": "experts.gate_up_proj", "value": 0.25}, {"value": 1.0}]
    models = [{"model": "model0", "parameters": {"weight": weight}}, {"model": "model1"}]
    asked = Recipe.from_dict({"merge_method": "linear", "base_model": "base", "models": models}, folder=tmp_path / "mixed")
    weights = {tensor.part_of or tensor.name: tensor.weights for tensor in plan_of(asked, open_inputs(asked)).tensors}
    assert weights["model.layers.1.mlp.experts.gate_up_proj"] == (0.25, 1.0)
    assert weights["model.layers.1.mlp.experts.down_proj"] == (1.0, 1.0)


def test_experts_in_two_forms_are_told_as_that_where_nobody_knows_the_model(tmp_path: Path) -> None:
    saved_in_two_ways(tmp_path, "mixtral", ("model1",))
    for name in ("base", "model0", "model1"):
        (tmp_path / "mixed" / name / "config.json").unlink()
    content = {"merge_method": "linear", "base_model": "base", "models": ["model0", "model1"]}
    asked = Recipe.from_dict(content, folder=tmp_path / "mixed")
    with pytest.raises(RequestError, match=r"experts packed \(model\.layers\.0\.mlp\.experts\.down_proj\)") as caught:
        plan_of(asked, open_inputs(asked))
    assert "exclude" not in str(caught.value)


LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}


@pytest.mark.parametrize(
    "config",
    [None, {}, {"model_type": 3}, LLAMA | {"architectures": ["os.system"]}, LLAMA | {"architectures": ["LlamaConfig"]},
     LLAMA | {"hidden_size": "wide"}, LLAMA | {"model_type": "nobody's"}, LLAMA | {"architectures": []}],
)  # fmt: skip
def test_a_config_that_transformers_does_not_know_gives_no_conversions(config: dict[str, object] | None) -> None:
    assert conversions_of(config) is None
