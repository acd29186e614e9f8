"""Tensors that are the same under other names are recognised; what has no counterpart is told with a reason and with advice that
helps."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import families
import numpy as np
import pytest
import torch
from families import Family, StateDict, merged_to

from pcb_ray import Recipe, RequestError
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
