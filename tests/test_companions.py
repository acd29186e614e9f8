"""The files beside the tensors: with everything that loaders want, and no path of this machine where they are published."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import families
import pytest
import torch
import yaml
from families import Family
from test_output import into_subfolders, planned

from pcb_ray import Recipe, RunError
from pcb_ray.files.checkpoint import open_checkpoint
from pcb_ray.files.store import LocalStore
from pcb_ray.methods import names
from pcb_ray.output.companions import model_card, side_files, write_side_files
from pcb_ray.planning import open_inputs, plan, plan_of


def sides(family: Family, tokenizer: str = "base", **changes: Any) -> dict[str, bytes]:
    """The files beside the tensors, as they will be."""
    shard = changes.pop("max_shard_bytes", 10**9)
    source = {} if tokenizer == "base" else {"tokenizer_source": str(family.folder / tokenizer)}
    recipe = Recipe.from_dict(family.recipe(**source, **changes))
    inputs = open_inputs(recipe)
    files = side_files(recipe, plan_of(recipe, inputs, max_shard_bytes=shard), inputs.base, inputs.tokenizer)
    return {name: Path(one).read_bytes() if isinstance(one, str) else one for name, one in files.items()}


def add_tokenizer(folder: Path, vocabulary: dict[str, int], added: str = "<s>") -> None:
    content = {"model": {"vocab": vocabulary}, "added_tokens": [{"content": added, "id": 9}]}
    (folder / "tokenizer.json").write_text(json.dumps(content))
    (folder / "tokenizer_config.json").write_text(json.dumps({"from": folder.name}))
    (folder / "chat_template.jinja").write_text(f"template of {folder.name}")
    (folder / "additional_chat_templates").mkdir(exist_ok=True)
    (folder / "additional_chat_templates" / "tool.jinja").write_text("tool")
    (folder / "generation_config.json").write_text("{}")
    (folder / "preprocessor_config.json").write_text(json.dumps({"from": folder.name}))
    (folder / "modeling.py").write_text("raise SystemExit('never run')")


def test_config_tokenizer_recipe_and_whatever_else_lies_beside_the_tensors_are_written(family):
    one = family(1)
    add_tokenizer(one.folder / "base", {"a": 0})
    files = sides(one)
    assert set(files) == {
        *("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"),
        *("additional_chat_templates/tool.jinja", "preprocessor_config.json", "pcb_recipe.yaml", "modeling.py"),
    }
    assert files["tokenizer.json"] == (one.folder / "base" / "tokenizer.json").read_bytes()
    assert Recipe.from_yaml(files["pcb_recipe.yaml"].decode(), Path("/")) == Recipe.from_dict(one.recipe())


def test_the_tokenizer_may_come_from_a_model_that_shares_the_vocabulary(family):
    one = family(2)
    add_tokenizer(one.folder / "base", {"a": 0, "b": 1})
    add_tokenizer(one.folder / "model1", {"a": 0, "b": 1})
    files = sides(one, "model1")
    assert json.loads(files["tokenizer_config.json"]) == {"from": "model1"}
    assert files["chat_template.jinja"] == b"template of model1"
    assert json.loads(files["preprocessor_config.json"]) == {"from": "base"}
    assert sides(one, chat_template="{{ own }}")["chat_template.jinja"] == b"{{ own }}"


def test_the_config_names_the_dtype_of_the_output(family):
    config = families.CONFIG | {"torch_dtype": "bfloat16", "vision_config": {"dtype": "bfloat16", "n": 1}, "text_config": {"n": 2}}
    one = family(1, config=config)
    written = json.loads(sides(one, dtype="float16")["config.json"])
    assert written == config | {"torch_dtype": "float16", "vision_config": {"dtype": "float16", "n": 1}}
    assert json.loads(sides(one)["config.json"]) == config
    silent = family(1)
    assert json.loads(sides(silent)["config.json"])["dtype"] == "bfloat16"
    wide = family(1, dtype=torch.float64)
    assert json.loads(sides(wide)["config.json"])["dtype"] == "float32"


def test_shards_have_the_index_that_transformers_reads(family):
    one = family(1)
    one.base |= {"ids": torch.arange(3), "none": torch.empty(0, 2)}
    one.models[0]["none"] = torch.empty(0, 2)
    one = Family(one.folder, one.base, one.models)
    made = planned(one, max_shard_bytes=5000)
    index = json.loads(sides(one, max_shard_bytes=5000)["model.safetensors.index.json"])
    assert set(index["weight_map"]) == set(one.base), "every tensor, empty ones too"
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in one.base.values())
    assert set(index["weight_map"].values()) == {f.name for f in made.files}
    families.merge_locally(made, one.folder / "out")
    (one.folder / "out" / "model.safetensors.index.json").write_text(json.dumps(index))
    assert set(open_checkpoint(str(one.folder / "out")).tensors) == set(one.base)
    assert "model.safetensors.index.json" not in sides(one)


def test_where_the_shards_of_the_inputs_lie_does_not_show_in_the_output(family):
    one = family(1, shards=3)
    flat = families.merge_locally(planned(one, max_shard_bytes=5000), one.folder / "flat").files
    sides_of_flat = sides(one, max_shard_bytes=5000)
    for name in ("base", "model0"):
        into_subfolders(one.folder / name)
    assert families.merge_locally(planned(one, max_shard_bytes=5000), one.folder / "nested").files == flat
    assert sides(one, max_shard_bytes=5000) == sides_of_flat
    assert "model.safetensors.index.json" in sides_of_flat


@pytest.mark.parametrize("method", names())
def test_the_model_card_begins_with_valid_metadata_and_names_all_models(family, method):
    one = family(2)
    made = planned(one, merge_method=method)
    text = model_card(made, "1.2.3").decode()
    _, front, body = text.split("---\n", 2)
    metadata = yaml.safe_load(front)
    assert metadata["library_name"] == "transformers"
    assert "merge" in metadata["tags"]
    assert "base_model" not in metadata, "local paths are no Hub ids"
    for name in ("base", "model0", "model1"):
        assert f"| {name} |" in body
    assert "pcb_ray 1.2.3" in body
    there = {"base_model": "base", "models": [{"model": "model0"}, {"model": "model1"}]}
    assert recipe_in(text) == Recipe.from_dict(one.recipe(merge_method=method) | there)


def recipe_in(card: str) -> Recipe:
    return Recipe.from_yaml(card.split("```yaml\n")[1].split("```")[0], Path("/"))


def test_the_model_card_tells_nothing_of_the_machine(family, tmp_path):
    one = family(3, folder=tmp_path / "home")
    for k, folder in enumerate(("a", "b", "c/base")):
        (tmp_path / "home" / folder).mkdir(parents=True, exist_ok=True)
        (tmp_path / "home" / f"model{k}").rename(tmp_path / "home" / folder / "last")
    models = [str(tmp_path / "home" / "a/last"), "b/../b/last", "c/base/last"]
    source = "./c/base/last"
    (tmp_path / "home" / source / "tokenizer.json").write_text("{}")
    recipe = Recipe.from_dict(one.recipe(models=models, tokenizer_source=source), tmp_path / "home")
    text = model_card(plan(recipe), "1.2.3").decode()
    assert not [part for part in (str(tmp_path), "home", "a/last", "b/last") if part in text]
    for row in ("| base | base |", "| last | model |", "| last (2) | model |", "| last (3) | model |"):
        assert row in text
    assert recipe_in(text).tokenizer_source == "last (3)"


def test_a_model_that_is_called_base_is_not_taken_for_the_base(family, tmp_path):
    one = family(1, folder=tmp_path / "family")
    (one.folder / "base").rename(one.folder / "first")
    (one.folder / "model0").rename(one.folder / "base")
    (one.folder / "base" / "tokenizer.json").write_text("{}")
    where = {"base_model": str(one.folder / "first"), "models": [str(one.folder / "base")]}
    made = plan(Recipe.from_dict(one.recipe(**where, tokenizer_source=str(one.folder / "base"))))
    shown = recipe_in(model_card(made, "1.2.3").decode())
    assert (shown.base_model, shown.models[0].source, shown.tokenizer_source) == ("first", "base (2)", "base (2)")


def test_the_model_card_names_models_of_the_hub_with_their_commits(family):
    one = family(2)
    made = planned(one)
    commit = "0123456789" * 4

    def link(name: str) -> str:
        return f"[{name}@{commit}](https://huggingface.co/{name}/tree/{commit})"

    sources = ["org/base@main", "org/expert", made.inputs[2].source]
    recipe = dataclasses.replace(
        made.recipe,
        base_model=sources[0],
        models=tuple(dataclasses.replace(m, source=s) for m, s in zip(made.recipe.models, sources[1:], strict=True)),
    )
    inputs = [
        dataclasses.replace(i, source=s, commit=commit if s.startswith("org/") else None)
        for i, s in zip(made.inputs, sources, strict=True)
    ]
    text = model_card(dataclasses.replace(made, recipe=recipe, inputs=tuple(inputs)), "1.2.3").decode()
    assert yaml.safe_load(text.split("---\n")[1])["base_model"] == ["org/base", "org/expert"]
    for row in (f"| {link('org/base')} | base |", f"| {link('org/expert')} | model |", "| model1 | model |"):
        assert row in text
    assert [m.source for m in recipe_in(text).models] == [f"org/expert@{commit}", "model1"]


def test_files_that_cannot_be_written_are_told(tmp_path):
    (tmp_path / "config.json").mkdir()
    with pytest.raises(RunError, match=r"config\.json: wanted to write 2 bytes, found: Is a directory\. Fix:"):
        write_side_files(tmp_path, {"config.json": b"{}"}, LocalStore())


@pytest.mark.parametrize(
    ("weight", "shown"),
    [
        (0.5, "weight 0.5"),
        ([0.1, 0.9], "weight by layer"),
        ([{"filter": "mlp", "value": [0.1, 1]}, {"value": 1}], "weight by tensor"),
    ],
)
def test_the_card_and_the_output_of_a_gradient(family, tmp_path, weight, shown):
    one = family(2)
    models = [{"model": str(one.folder / "model0"), "parameters": {"weight": weight}}, str(one.folder / "model1")]
    out = families.merged_to(tmp_path / "out", Recipe.from_dict(one.recipe(merge_method="ties", models=models)))
    assert f"| model0 | model | {shown}" in (out / "README.md").read_text()
