"""Claims about recipes: what is read, what is refused and how it is said."""

from __future__ import annotations

import copy
import dataclasses
import os
import random
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from pcb_ray import methods
from pcb_ray.errors import RequestError
from pcb_ray.recipe import DTYPES, Model, Recipe, depths_of

METHODS = methods.names()
WITH_BASE = [name for name in METHODS if all(record.has_base for record in methods.variants_of(name).values())]
VARIANTS = tuple(methods.variants_of("pcb"))

EXAMPLE = """\
merge_method: pcb            # pcb | ties | task_arithmetic | linear
base_model: models/base
models:
  - model: models/math
    parameters: {weight: 1.0}
  - model: models/code
    parameters:
      weight:
        - {filter: self_attn, value: 1.2}
        - {value: 0.9}
parameters:
  density: 0.2
  lambda: 0.7
  variant: released
dtype: bfloat16
exclude: ["*.inv_freq"]
tokenizer_source: base
"""


def layout(**changes: Any) -> dict[str, Any]:
    """A small valid recipe's mapping; a change to None removes the key."""
    whole = {"base_model": "base", "models": ["a", "b"], "merge_method": "pcb", "parameters": {}} | changes
    return {key: value for key, value in whole.items() if value is not None}


def read(**changes: Any) -> Recipe:
    return Recipe.from_dict(layout(**changes))


def problems(text: str | dict[str, Any]) -> tuple[str, ...]:
    with pytest.raises(RequestError) as caught:
        Recipe.from_yaml(text, ".") if isinstance(text, str) else Recipe.from_dict(text)
    for problem in caught.value.problems:
        assert "\n" not in problem
        assert "Fix: " in problem
        assert len(problem) < 700
    return caught.value.problems


def the_problem(text: str | dict[str, Any]) -> str:
    (problem,) = problems(text)
    return problem


# ------------------------------------------------------------------------------------------ what is read


def test_the_example_of_the_design_is_read_as_it_says():
    recipe = Recipe.from_yaml(EXAMPLE, "/somewhere")
    assert recipe.merge_method == "pcb"
    assert recipe.base_model == "models/base"
    assert [model.source for model in recipe.models] == ["models/math", "models/code"]
    assert recipe.parameters == {"density": 0.2, "lambda": 0.7, "variant": "released"}
    assert (recipe.dtype, recipe.exclude, recipe.tokenizer_source) == ("bfloat16", ("*.inv_freq",), "base")
    assert recipe.folder == Path("/somewhere")
    assert recipe.notes == ()
    assert recipe.weight(0, "model.layers.0.self_attn.q_proj.weight") == 1.0
    assert recipe.weight(1, "model.layers.0.self_attn.q_proj.weight") == 1.2
    assert recipe.weight(1, "model.layers.0.mlp.up_proj.weight") == 0.9


def test_what_is_left_out_has_the_defaults_of_the_design():
    recipe = Recipe.from_yaml("{base_model: b, models: [a]}", ".")
    expected = ("pcb", 0.1, 1.0, "pairwise", None, (), "base", None)
    assert expected == (
        recipe.merge_method, *recipe.parameters.values(), recipe.dtype, recipe.exclude, recipe.tokenizer_source,
        recipe.chat_template,
    )  # fmt: skip
    assert recipe.models == (Model("a", ((None, 1.0),), {}),)
    assert recipe.notes == ()


def test_a_recipe_is_frozen_and_hashable():
    recipe = read()
    with pytest.raises(dataclasses.FrozenInstanceError):
        recipe.dtype = "float32"  # type: ignore[misc]
    assert len({recipe, read(), read(merge_method="ties")}) == 2


def test_folder_and_notes_do_not_tell_recipes_apart():
    assert Recipe.from_dict(layout(search={}), "/x") == Recipe.from_dict(layout(), "/y")


@pytest.mark.parametrize("written", ["1e-3", "'0.001'", "0.001", "1.0e-3", "1E-3", "+1e-3", "' 1e-3 '"])
def test_numbers_are_read_as_people_write_them(written: str):
    text = f"{{base_model: b, models: [{{model: a, parameters: {{weight: {written}}}}}]}}"
    assert Recipe.from_yaml(text, ".").weight(0, "x") == 0.001


def test_negative_and_zero_weights_are_allowed():
    weights = [{"model": "a", "parameters": {"weight": -1}}, {"model": "b", "parameters": {"weight": 0}}]
    recipe = read(models=weights)
    assert [recipe.weight(i, "t") for i in (0, 1)] == [-1.0, 0.0]


@pytest.mark.parametrize("long_name", DTYPES)
def test_a_dtype_may_be_written_in_its_usual_forms(long_name: str):
    short = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}[long_name]
    for written in (long_name, short, f"torch.{long_name}", short.upper()):
        assert read(dtype=written).dtype == long_name


def test_each_model_may_have_its_own_density():
    recipe = read(models=["a", {"model": "b", "parameters": {"density": 0.5}}], parameters={"density": 0.3})
    assert [{**recipe.parameters, **model.parameters}["density"] for model in recipe.models] == [0.3, 0.5]


def test_the_recipes_weight_serves_models_and_names_that_have_none_of_their_own():
    own = {"model": "b", "parameters": {"weight": [{"filter": "mlp", "value": 3}]}}
    whole = {"model": "c", "parameters": {"weight": 4}}
    rules = [{"filter": "mlp.up", "value": 7}, {"filter": "norm", "value": 5}, {"value": 2}]
    recipe = read(models=["a", own, whole], parameters={"weight": rules})
    assert [recipe.weight(0, name) for name in ("mlp.up", "norm", "x")] == [7, 5, 2]
    assert [recipe.weight(1, name) for name in ("mlp.up", "norm", "x")] == [3, 5, 2]
    assert [recipe.weight(2, name) for name in ("mlp.up", "norm", "x")] == [4, 4, 4]


@given(
    st.lists(st.tuples(st.sampled_from(["attn", "mlp", "norm", "q", "up"]), st.floats(-2, 2)), unique_by=lambda r: r[0]),
    st.floats(-2, 2),
    st.text("atnmlpqu.", max_size=12),
)
@settings(max_examples=100, deadline=None, derandomize=True)
def test_the_first_rule_whose_filter_is_in_the_name_wins(rules: list[tuple[str, float]], rest: float, name: str):
    recipe = Recipe(models=(Model("a", (*rules, ("*", rest))),), base_model="b")
    matching = [value for part, value in rules if name.find(part) >= 0]
    assert recipe.weight(0, name) == (matching[0] if matching else rest)


@pytest.mark.parametrize("name", ["1e3", "2024-13-45", "2024-01-01", "0x_", "=", "a:b", "y", "-", "模型/a", "a b"])
def test_names_that_look_like_something_else_stay_names(name: str):
    recipe = Recipe.from_dict(layout(models=[name]))
    assert recipe.models[0].source == name
    assert Recipe.from_yaml(recipe.to_yaml(), ".") == recipe
    if name in ("1e3", "a:b", "y"):
        assert Recipe.from_yaml(f"base_model: b\nmodels:\n- model: {name}\n", ".").models[0].source == name


@pytest.mark.parametrize("name", ["123", "0.5", "true", "null", "~", "no"])
def test_quotes_make_any_value_a_name(name: str):
    assert Recipe.from_yaml(f"{{base_model: b, models: ['{name}']}}", ".").models[0].source == name
    assert "models[0]" in problems(f"{{base_model: b, models: [{name}]}}")[0]


def test_the_base_may_be_left_out_for_linear_only():
    assert read(merge_method="linear", base_model=None).base_model is None
    for method in WITH_BASE:
        assert "base_model" in the_problem(layout(merge_method=method, base_model=None))


@pytest.mark.parametrize("spelling", ["base", "./base", "base/", "base/.", "/w/base"])
def test_a_model_that_names_the_base_is_left_out_with_a_note(spelling: str):
    recipe = Recipe.from_dict(layout(models=[spelling, "a"], tokenizer_source=spelling), "/w")
    assert [model.source for model in recipe.models] == ["a"]
    assert recipe.tokenizer_source == "base"
    assert any("is the base model" in note for note in recipe.notes)


def test_linear_keeps_a_listed_base_since_it_averages_what_is_listed():
    recipe = read(merge_method="linear", models=["base", "a"])
    assert [model.source for model in recipe.models] == ["base", "a"]
    assert recipe.notes == ()


def test_the_tokenizer_may_come_from_one_of_the_models():
    assert read(tokenizer_source="b").tokenizer_source == "b"
    assert read(tokenizer_source="./b/").tokenizer_source == "./b/"
    assert read(tokenizer_source="base").tokenizer_source == "base"


def test_a_chat_template_may_be_given_inline():
    template = "{% for m in messages %}\n  {{ m.content }}\n\n{% endfor %} "
    recipe = read(chat_template=template)
    assert recipe.chat_template == template
    assert Recipe.from_yaml(recipe.to_yaml(), ".") == recipe


def test_a_recipe_made_in_python_is_brought_into_the_same_form_as_one_from_a_file():
    made = Recipe(
        models=[Model(Path("a"), 2), Model("b", [(Path("mlp"), "0.5")])],  # type: ignore[arg-type]
        base_model="base",
        dtype="bf16",
        exclude="*.inv_freq",  # type: ignore[arg-type]
    )
    rules = [{"filter": "mlp", "value": 0.5}, {"value": 1.0}]
    models = [{"model": "a", "parameters": {"weight": 2}}, {"model": "b", "parameters": {"weight": rules}}]
    assert made == read(models=models, dtype="bfloat16", exclude=["*.inv_freq"])


def test_the_file_is_found_from_anywhere_and_its_folder_is_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "r.yaml").write_bytes(b"\xef\xbb\xbf" + EXAMPLE.encode())
    monkeypatch.chdir(tmp_path)
    recipe = Recipe.from_file("deep/r.yaml")
    assert recipe == Recipe.from_yaml(EXAMPLE, ".")
    assert recipe.folder == tmp_path / "deep"


def test_an_import_of_the_recipe_module_brings_no_heavy_library():
    heavy = ("torch", "ray", "transformers", "huggingface_hub")
    code = f"import sys, pcb_ray.recipe; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"


# ------------------------------------------------------------------------------------------------- notes


def notes(**changes: Any) -> str:
    return "\n".join(read(**changes).notes)


def weighted(*values: object) -> list[dict[str, Any]]:
    return [{"model": f"m{i}", "parameters": {"weight": value}} for i, value in enumerate(values)]


@pytest.mark.parametrize("method", WITH_BASE)
def test_weights_that_sum_to_about_one_are_noted(method: str):
    assert "not normalised" in notes(merge_method=method, models=weighted(0.5, 0.5))
    assert "not normalised" in notes(merge_method=method, models=weighted(0.33, 0.33, 0.33))
    for total, is_noted in ((0.94, False), (0.96, True), (1.04, True), (1.06, False)):
        assert ("not normalised" in notes(merge_method=method, models=weighted(0.5, total - 0.5))) == is_noted


def test_no_note_on_weights_that_cannot_be_meant_as_shares():
    for values in ([1.0], [1, 1], [0.5, 0.4], [0.5, [{"filter": "a", "value": 0.5}, {"value": 0.5}]]):
        assert notes(models=weighted(*values)) == ""
    assert notes(merge_method="linear", models=weighted(0.5, 0.5)) == ""


WITHOUT_EFFECT = {
    "pcb": set(),
    "ties": {"variant"},
    "task_arithmetic": {"variant", "density"},
    "linear": {"variant", "density", "lambda"},
    **{name: {"variant", "density"} for name in ("iso_c", "iso_cts", "tsv_m", "wudi")},
}


@pytest.mark.parametrize("method", METHODS)
def test_a_setting_without_effect_is_noted(method: str):
    without_effect = WITHOUT_EFFECT[method]
    parameters = {"density": 0.5, "lambda": 2.0, "variant": "paper"}
    found = read(merge_method=method, parameters=parameters).notes
    assert {note.split("`")[1] for note in found} == without_effect
    assert len(found) == len(without_effect)
    made = Recipe(models=(Model("a"),), base_model="b", merge_method=method, parameters=parameters)
    assert {note.split("`")[1] for note in made.notes} == without_effect


def test_a_models_own_density_without_effect_is_noted():
    assert "density" in notes(merge_method="linear", models=[{"model": "a", "parameters": {"density": 0.5}}])


def test_settings_that_every_model_overrides_are_noted():
    own = [{"model": "a", "parameters": {"weight": 2, "density": 0.3}}]
    assert "`parameters.weight` has no effect" in notes(models=own, parameters={"weight": 5})
    assert "`parameters.density` has no effect" in notes(models=own, parameters={"density": 0.5})
    assert notes(models=[*own, "b"], parameters={"weight": 5, "density": 0.5}) == ""


def test_tensors_that_no_filter_matches_get_weight_one_and_a_note():
    recipe = read(models=weighted([{"filter": "mlp", "value": 3}]))
    assert (recipe.weight(0, "mlp.up"), recipe.weight(0, "norm")) == (3.0, 1.0)
    assert "get 1.0" in "\n".join(recipe.notes)


def test_what_mergekit_knows_and_has_no_effect_here_is_noted():
    assert "int8_mask" in notes(parameters={"int8_mask": True})
    assert "int8_mask" in notes(models=[{"model": "a", "parameters": {"int8_mask": True}}])


def test_out_dtype_decides_and_differing_dtypes_are_noted():
    recipe = read(dtype="float32", out_dtype="bf16")
    assert recipe.dtype == "bfloat16"
    assert "float32 always" in "\n".join(recipe.notes)
    assert read(out_dtype="fp16").dtype == "float16"


def test_a_model_in_parts_as_mergekit_has_it_is_the_same_as_one_line():
    parts = layout(
        base_model={"model": {"path": "org/base", "revision": "main"}},
        models=[{"model": {"model": "org/a", "revision": "v1"}}, {"model": {"path": "org/b"}}, "c"],
        tokenizer_source={"model": "org/b"},
    )
    line = layout(base_model="org/base@main", models=["org/a@v1", "org/b", "c"], tokenizer_source="org/b")
    assert Recipe.from_dict(parts) == Recipe.from_dict(line)
    spelled = {"model": {"path": "org/a", "revision": None}, "lora": None, "override_architecture": None}
    assert Recipe.from_dict(layout(models=[{"model": spelled}])).models[0].source == "org/a"
    assert Recipe.from_dict(layout(models=[{"model": {"model": "a", "lora": {"path": "l"}}}])).models[0].source == "a+l"


def test_what_a_merge_key_brings_may_be_overridden_and_merged_again():
    text = """
    merge_method: ties
    base_model: base
    models:
      - {model: a, parameters: &p {weight: 0.5, density: 0.2}}
      - {model: b, parameters: &q {<<: *p, weight: 0.7}}
      - {model: c, parameters: {<<: *q}}
    """
    assert [(m.weight[0][1], m.parameters["density"]) for m in Recipe.from_yaml(text).models] == [
        (0.5, 0.2),
        (0.7, 0.2),
        (0.7, 0.2),
    ]
    assert "key 'weight' is given twice" in the_problem(text.replace("weight: 0.7}", "weight: 0.7, weight: 0.8}"))


@pytest.mark.parametrize(
    ("layers", "gradient", "wanted"),
    [
        (5, [0.0, 1.0, 4.0], [0.0, 0.5, 1.0, 2.5, 4.0]),
        (3, [1.0, 0.5], [1.0, 0.75, 0.5]),
        (1, [1.0, 0.5], [0.5]),
        (4, [0.7], [0.7] * 4),
        (2, [1.0, 2.0, 3.0, 4.0], [1.0, 4.0]),
    ],
)
def test_a_list_of_numbers_is_a_gradient_over_the_layers_as_in_mergekit(layers: int, gradient: list[float], wanted: list[float]):
    """There: t = layer / (layers - 1), 1 in the only layer and 0 outside of layers; between two numbers it is interpolated."""
    names = [f"model.layers.{k}.mlp.experts.{e}.weight" for k in range(layers) for e in range(3)]
    depths = depths_of([*names, "model.embed_tokens.weight", "lm_head.weight"])
    for weight in (gradient, [{"value": gradient}], [{"filter": "mlp", "value": gradient}, {"value": 9.0}]):
        recipe = Recipe.from_dict(layout(models=[{"model": "a", "parameters": {"weight": weight}}]))
        found = [recipe.weight(0, name, depths[name]) for name in names]
        assert found == pytest.approx([value for value in wanted for _ in range(3)])
        outside = 9.0 if isinstance(weight[0], dict) and "filter" in weight[0] else gradient[0]
        assert recipe.weight(0, "lm_head.weight", depths["lm_head.weight"]) == pytest.approx(outside)
        assert Recipe.from_yaml(recipe.to_yaml()) == recipe


def test_stacks_of_layers_have_depths_of_their_own():
    found = depths_of(["vision.blocks.0.w", "vision.blocks.1.w", "text.h.0.w", "text.h.1.w", "text.h.2.w", "norm.w"])
    assert list(found.values()) == [0.0, 1.0, 0.0, 0.5, 1.0, 0.0]


@pytest.mark.parametrize("density", [[0.1, 0.5], [{"filter": "mlp", "value": 0.5}, {"value": 0.1}]])
@pytest.mark.parametrize("method", ["pcb", "ties"])
def test_a_density_by_layer_or_name_is_refused_with_the_reason(method: str, density: object):
    for asked in ({"parameters": {"density": density}}, {"models": [{"model": "a", "parameters": {"density": density}}]}):
        assert "the threshold is one over the whole model" in the_problem(layout(merge_method=method, **asked))


def test_anchors_and_merge_keys_are_read():
    text = """
    base_model: b
    name: my-merge
    models:
      - model: a
        parameters: &own {weight: 0.5}
      - model: c
        parameters: {<<: *own}
      - {model: d, parameters: *own}
    """
    recipe = Recipe.from_yaml(text)
    assert [model.weight for model in recipe.models] == [((None, 0.5),)] * 3
    assert any("`name` has no effect" in note for note in recipe.notes)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("value", [False, True])
def test_normalize_is_what_mergekit_means_by_it_or_is_refused(method: str, value: bool):
    asked = layout(merge_method=method, parameters={"normalize": value})
    if method == "ties":
        assert Recipe.from_dict(asked).method.variant == ("weighted_mean" if value else "weighted_sum")
    elif value == (method == "linear"):
        assert "normalize" in "\n".join(Recipe.from_dict(asked).notes)
    else:
        assert "normalize" in the_problem(asked)
    for wrong in ("yes", 1, [True]):
        assert "normalize: wanted true or false, found" in the_problem(asked | {"parameters": {"normalize": wrong}})


def test_normalize_of_ties_and_a_variant_may_not_contradict_each_other():
    same = Recipe.from_dict(layout(merge_method="ties", parameters={"normalize": True, "variant": "weighted_mean"}))
    assert same == Recipe.from_dict(layout(merge_method="ties", parameters={"variant": "weighted_mean"}))
    assert Recipe.from_yaml(same.to_yaml()) == same
    asked = layout(merge_method="ties", parameters={"normalize": True, "variant": "weighted_sum"})
    assert "wanted `variant: weighted_mean`, which `normalize: true` asks for, found 'weighted_sum'" in the_problem(asked)
    assert "wanted weighted_mean | weighted_sum, found 'median'" in the_problem(
        layout(merge_method="ties", parameters={"variant": "median"})
    )


def test_ties_without_normalize_says_how_it_differs_from_mergekits():
    weighted = [{"model": "a", "parameters": {"weight": 0.5}}, {"model": "b"}]
    note = "In mergekit `normalize: true` (its default) divides by the sum of their weights"
    assert note in "\n".join(Recipe.from_dict(layout(merge_method="ties", models=weighted)).notes)
    halves = [{"model": name, "parameters": {"weight": 0.5}} for name in "ab"]
    for value in (True, False):
        asked = {"normalize": value, "density": 0.2}
        assert Recipe.from_dict(layout(merge_method="ties", models=halves, parameters=asked)).notes == ()
    for models, parameters in ((weighted, {"normalize": True}), (weighted, {"normalize": False}), (["a", "b"], {})):
        recipe = Recipe.from_dict(layout(merge_method="ties", models=models, parameters=parameters))
        assert note not in "\n".join(recipe.notes)
    assert "variant" not in Recipe.from_dict(layout(merge_method="ties")).parameters


# --------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize("density", [0, -0.1, 1.0001, "2", float("nan"), float("inf"), True, "much", [0.1, 0.2], {}])
def test_a_density_outside_0_1_is_refused(density: object):
    assert "density" in the_problem(layout(parameters={"density": density}))
    assert "density" in the_problem(layout(models=[{"model": "a", "parameters": {"density": density}}]))
    with pytest.raises(RequestError, match="density"):
        Recipe(models=(Model("a"),), base_model="b", parameters={"density": density})


def test_a_density_of_one_keeps_all():
    assert read(parameters={"density": 1}).parameters["density"] == 1.0


@pytest.mark.parametrize("value", [float("nan"), float("-inf"), 1e39, 10**400, True, "x", "nan", "1e999", "", {}, b"1"])
def test_a_number_that_is_not_a_finite_float32_is_refused(value: object):
    assert "weight" in the_problem(layout(models=weighted(value)))
    assert "lambda" in the_problem(layout(parameters={"lambda": value}))


def test_no_models_are_refused():
    for models in (None, [], ()):
        assert the_problem(layout(models=models)).startswith("models")
    with pytest.raises(RequestError, match="models"):
        Recipe(models=(), base_model="b")


def test_the_base_as_the_only_model_is_refused():
    assert "only the base" in the_problem(layout(models=["./base"]))


@pytest.mark.parametrize(("one", "two"), [("a", "./a"), ("a", "a/"), ("a", "/w/a"), ("x/y@r", "x/y@r"), ("s3://b/m", "s3://b/m/")])
def test_a_model_given_twice_is_refused_whatever_its_spelling(one: str, two: str):
    with pytest.raises(RequestError, match="twice"):
        Recipe.from_dict(layout(models=[one, two]), "/w")


def test_models_that_only_look_alike_are_both_taken():
    assert len(read(models=["a", "b/a", "A", "../a", "org/m@1", "org/m@2", "s3://x/a"]).models) == 7


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("merge_metod", "merge_method"),
        ("basemodel", "base_model"),
        ("Models", "models"),
        ("tokeniser_source", "tokenizer_source"),
        ("chattemplate", "chat_template"),
    ],
)
def test_an_unknown_key_is_answered_with_the_nearest_known_one(wrong: str, right: str):
    assert f"`{right}`" in the_problem(layout() | {wrong: 1})


def test_unknown_keys_are_found_in_every_section():
    models = [{"modle": "x", "model": "a", "parameters": {"wieght": 1}}]
    rules = [{"filtre": "x", "value": 1}]
    found = problems(layout(models=models, parameters={"densty": 1, "weight": rules}))
    for wrong, right in [("modle", "model"), ("wieght", "weight"), ("densty", "density"), ("filtre", "filter")]:
        assert sum(wrong in problem and f"`{right}`" in problem for problem in found) == 1
    assert len(found) == 4


@pytest.mark.parametrize(
    ("asked", "fix"),
    [
        (layout(density=0.3), "in `parameters`"),
        (layout(parameters={"dtype": "bf16"}), "top level"),
        (layout(models=[{"model": "a", "weight": 1}]), "in `parameters`"),
        (layout(slices=[]), "unknown"),
    ],
)
def test_a_key_in_the_wrong_place_is_told_where_it_belongs(asked: dict[str, Any], fix: str):
    assert fix in the_problem(asked)


@pytest.mark.parametrize(
    ("asked", "fix"),
    [
        (layout(slices=[{"sources": []}]), "layers.0."),
        (layout(modules={}), "a recipe for each"),
        (layout(tokenizer={"source": "union"}), "tokenizer_source"),
        (layout(tokenizer_source="union"), "`base`"),
        (layout(tokenizer_source="model:a"), "`models`"),
        (layout(tokenizer_source="c"), "`models`"),
        (layout(chat_template="auto"), "remove the line"),
        (layout(chat_template="chatml"), "remove the line"),
        (layout(parameters={"rescale": True}), "lambda"),
        (layout(models=weighted([0, "half", 1])), "layers.0."),
        (layout(dtype="float64"), "float32"),
        (layout(out_dtype="float64"), "float32"),
        (layout(dtype="int8"), "bfloat16"),
        (layout(base_model={"name": "x"}), "write it as text, such as `model: org/name@revision`"),
        (layout(models=[{"model": {"path": "x", "model": "y"}}]), "write it as text"),
        (layout(merge_method="dare_ties"), "`ties` is the nearest"),
        (layout(merge_method="slerp"), "`linear` is the nearest"),
        (layout(merge_method="linaer"), "`linear`"),
        (layout(parameters={"variant": "relased"}), "`released`"),
    ],
)
def test_what_mergekit_has_and_we_do_not_is_refused_with_the_nearest_equivalent(asked: dict[str, Any], fix: str):
    assert fix in the_problem(asked).partition("Fix: ")[2]


def test_the_methods_and_variants_that_exist_are_all_accepted_and_listed():
    for method in METHODS:
        assert read(merge_method=method).merge_method == method
    for variant in VARIANTS:
        assert read(parameters={"variant": variant}).method.variant == variant
    refusal = the_problem(layout(merge_method="zzz"))
    assert all(method in refusal for method in METHODS)


@pytest.mark.parametrize(
    ("rules", "at"),
    [
        ([{"value": 1}, {"filter": "a", "value": 2}], 1),
        ([{"filter": "*", "value": 1}, {"value": 2}], 1),
        ([{"filter": "a", "value": 1}, {"value": 1}, {"value": 3}], 2),
    ],
)
def test_a_rule_that_no_name_can_reach_is_refused(rules: list[dict[str, Any]], at: int):
    problem = the_problem(layout(models=weighted(rules)))
    assert f"weight[{at}]" in problem
    assert "never reached" in problem


@pytest.mark.parametrize(
    "rules",
    [[], [{"filter": "a"}], [{}], [{"filter": "*.mlp", "value": 1}], [{"filter": "", "value": 1}], [[1, 2]], [None]],
)
def test_a_rule_that_says_nothing_is_refused(rules: list[Any]):
    assert "weight" in the_problem(layout(models=weighted(rules)))


def test_linear_refuses_weights_whose_sum_is_zero():
    def asked(*values: object) -> dict[str, Any]:
        return layout(merge_method="linear", models=weighted(*values))

    assert "sum to 0" in the_problem(asked(1, -1))
    Recipe.from_dict(asked(1, -0.5))
    Recipe.from_dict(asked(1, -1) | {"merge_method": "task_arithmetic"})


def test_everything_that_is_wrong_is_listed_at_once():
    text = """
merge_method: linaer
base_model: base
models:
  - 3
  - model: a
    parameters: {weight: [0, one], density: 0, wieght: 2}
  - ./a
density: 0.3
slices: 1
parameters: {densty: 0.1, variant: relased}
dtype: float64
tokenizer_source: union
chat_template: auto
"""
    found = problems(text)
    for part in (
        "'density'", "'slices'", "'densty'", "models[0]", "'wieght'", "'linaer'",
        "models[1].parameters.weight", "models[1].parameters.density", "./a", "'relased'", "'float64'", "'union'",
        "'auto'",
    ):  # fmt: skip
        assert sum(part in problem for problem in found) == 1, part
    assert len(found) == 13


def test_all_that_is_wrong_in_a_recipe_made_in_python_is_listed_at_once():
    with pytest.raises(RequestError) as caught:
        Recipe(
            models=(Model("", "x"), Model("a", parameters={"density": 7}), "b"),  # type: ignore[arg-type]
            merge_method="x",
            parameters={"density": True, "lambda": float("nan"), "variant": "y"},
            dtype="z",
            exclude=(3,),  # type: ignore[arg-type]
            tokenizer_source="q",
            chat_template="w",
        )
    assert len(caught.value.problems) == 11


def test_problems_name_the_entry_as_it_stands_in_the_file():
    found = problems(layout(models=[3, "base", {"model": "c", "parameters": {"weight": "x"}}]))
    assert sorted(problem.split(":")[0] for problem in found) == ["models[0].model", "models[2].parameters.weight"]


@pytest.mark.parametrize("source", ["", "  ", "a\0b", "a\nb", 3, None, True, ["a"], b"a", "\ud800"])
def test_a_source_that_cannot_be_a_path_or_an_id_is_refused(source: object):
    assert problems(layout(models=[{"model": source}]))
    with pytest.raises(RequestError):
        Recipe(models=(Model(source),), base_model="b")  # type: ignore[arg-type]


def test_messages_show_neither_huge_values_nor_secrets():
    recursive: list[Any] = []
    recursive.append(recursive)
    for value in ("x" * 100_000, recursive, {"a": recursive}, 10**5000, ["x" * 1000] * 1000, "\U0001f600" * 1000):
        for key in ("merge_method", "tokenizer_source", "dtype", "chat_template", "models", "parameters"):
            problems(layout() | {key: value})
        problems(layout(parameters={"weight": value, "density": value, "lambda": value, "variant": value}))
    token = "hf_" + "aB3" * 12
    asked = layout(models=[f"s3://me:{token}@bucket/a", f"s3://me:{token}@bucket/a", token, token])
    assert token not in "".join(problems(asked | {token[:2]: 1}))


# ------------------------------------------------------------------------------------------- YAML and files


@pytest.mark.parametrize(
    ("text", "line", "column"),
    [
        ("a: [1", 2, 1),
        ("base_model: b\nmodels:\n\t- a\n", 3, 1),
        ("a: b: c", 1, 5),
        ("a: 'x", 1, 6),
        ("a: *x", 1, 4),
        ("x: 1\na: &a [*a]", 2, 8),
        ("a: &a [*a]", 1, 8),
        ("b: *a", 1, 4),
        ("models: [a]\nx: !!python/object/apply:os.system [ls]", 2, 4),
        ("x: !!set {a}", 1, 4),
        ("x: !!binary aGk=", 1, 4),
        ("x: !!timestamp 2024-99-99", 1, 4),
        ("x: !me 1", 1, 4),
        ("a: 1\n---\nb: 2\n", 2, 1),
        ("? [a]\n: 1", 1, 3),
        ("[a, " + "b," * 80_000 + "]", 1, 99_999),
        ("[" * 100_000, 1, 33),
        ("base_model: b\nmodels: [a]\nparameters: {density: 0.1,\n  density: 0.2}", 4, 3),
    ],
)
def test_bad_yaml_is_refused_with_its_line_and_column(text: str, line: int, column: int):
    assert f"line {line}, column {column}:" in the_problem(text)


@pytest.mark.parametrize(
    "text", ["x: 2024-99-99", "x: 0x_", "x: " + "1" * 5000, "x: 1" + ":59" * 999 + ".0", "a: b\0", "a: \ud800"]
)
def test_values_that_the_yaml_library_fails_on_are_refused(text: str):
    assert the_problem(text).startswith("recipe: ")


def test_without_libyaml_the_same_is_read_and_refused():
    code = f"""if True:
        import yaml
        del yaml.CSafeLoader
        from pcb_ray.recipe import Recipe, RequestError
        assert Recipe.from_yaml({EXAMPLE!r}).parameters["density"] == 0.2
        for text in ("a: [1", "a: 1\\na: 2", "a: *x", "a: &a [*a]", "!!set {{a}}", "[" * 10_000, "? [a]\\n: 1", "\\ud800"):
            try:
                Recipe.from_yaml(text)
            except RequestError:
                print("refused", end=" ")
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.split() == ["refused"] * 8


@pytest.mark.parametrize("text", ["", "# nothing", "null", "hello", "3", "- a\n- b", "[]", "~"])
def test_a_text_without_settings_is_refused(text: str):
    assert the_problem(text).startswith("recipe: wanted")


def bomb(first: str, wrap: str, levels: int) -> str:
    """Levels of nine aliases each to the level before."""
    above = (f"a{level}: &a{level} " + wrap % ", ".join([f"*a{level - 1}"] * 9) for level in range(1, levels))
    return "\n".join([f"a0: &a0 {first}", *above])


@pytest.mark.parametrize(
    "text",
    [
        bomb("[lol, lol]", "[%s]", 12),
        bomb("{x: 1}", "{<<: [%s]}", 12),
        "base_model: b\nmodels: &m [" + "a, " * 30_000 + "]\nx: [" + "*m, " * 9_000 + "]",
        "models: [" + "a," * 400_000 + "]",
        "models: [" + "{model: a}," * 2_000 + "]",
        "x: " + "1" * 900_000,
        "x: 1" + ":59" * 300_000,
        "weight: " + "{" * 500_000,
        "- " * 300_000,
        "? " * 300_000,
        "&a " * 200_000,
        "\n".join(f"key{i}: 1" for i in range(9_000)),
        "base_model: b\nmodels: [a]\nparameters:\n  weight: [" + "{filter: x, value: 1}," * 9_000 + "]",
        "base_model: b\nmodels: [" + ", ".join(f"{{model: {i}, modle: x, z{i}: y}}" for i in range(990)) + "]",
        "a: '" + "x" * (2 << 20),
        "#" * (1 << 20),
        '"' + "\\x41" * 200_000 + '": 1',
    ],
    ids=lambda text: text[:12],
)
def test_bombs_are_refused_within_seconds(text: str):
    start_s = time.perf_counter()
    assert problems(text)
    assert time.perf_counter() - start_s < 3.0


def test_a_large_recipe_is_read_within_seconds():
    rules = "[" + ", ".join(f"{{filter: layers.{i}., value: 0.5}}" for i in range(200)) + "]"
    entries = ", ".join(f"{{model: m{i}, parameters: {{weight: {rules}}}}}" for i in range(16))
    start_s = time.perf_counter()
    assert len(Recipe.from_yaml(f"merge_method: linear\nmodels: [{entries}]\n", ".").models) == 16
    assert time.perf_counter() - start_s < 3.0


def test_a_file_that_cannot_be_a_recipe_is_refused(tmp_path: Path):
    def refusal(path: str | Path) -> str:
        with pytest.raises(RequestError, match="Fix: ") as caught:
            Recipe.from_file(path)
        return str(caught.value)

    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "none.yaml", "a\0b", tmp_path, tmp_path / "pipe"):
        assert "not a regular file, or not there" in refusal(path)
    assert "File name too long" in refusal(tmp_path / ("x" * 5000))
    (tmp_path / "latin").write_bytes("base_model: modèle".encode("latin-1"))
    assert "UTF-8" in refusal(tmp_path / "latin")
    (tmp_path / "utf16").write_bytes(EXAMPLE.encode("utf-16"))
    assert Recipe.from_file(tmp_path / "utf16") == Recipe.from_yaml(EXAMPLE)


def test_a_huge_file_is_refused_without_being_read(tmp_path: Path):
    with (tmp_path / "big").open("wb") as stream:
        stream.truncate(1 << 40)
    tracemalloc.start()
    try:
        with pytest.raises(RequestError, match="at most 524288 bytes"):
            Recipe.from_file(tmp_path / "big")
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak_bytes < 8 << 20


# ---------------------------------------------------------------------------------------------- round trip

TEXTS = st.text(st.characters(exclude_categories=["C", "Z"]) | st.just(" "), min_size=1, max_size=20).filter(
    lambda text: text.isprintable() and text.strip()
)
NUMBERS = st.floats(-1e30, 1e30, allow_nan=False)
DENSITIES = st.floats(0, 1, exclude_min=True)
PARTS = TEXTS.filter(lambda text: "*" not in text)


@st.composite
def weights(draw: st.DrawFn) -> tuple[tuple[str | None, float], ...]:
    rules = draw(st.lists(st.tuples(PARTS, NUMBERS), max_size=3))
    return (*rules, (None, draw(NUMBERS))) if not rules or draw(st.booleans()) else tuple(rules)


@st.composite
def recipes(draw: st.DrawFn) -> Recipe:
    sources = draw(st.lists(TEXTS, min_size=2, max_size=5, unique_by=lambda text: str(Path(text)).rstrip("/")))
    method = draw(st.sampled_from([record for record in methods.METHODS if record.has_base]))
    values = {"density": DENSITIES, "lambda": NUMBERS, "common": DENSITIES, "ridge": DENSITIES}
    values["rest"] = st.sampled_from(["mean", "base"])
    parameters = {name: draw(values[name]) for name in method.parameters} | ({"variant": method.variant} if method.variant else {})
    own = st.fixed_dictionaries({}, optional={name: values[name] for name, known in method.parameters.items() if known.per_model})
    models = tuple(draw(st.builds(Model, st.just(source), weights(), own)) for source in sources[1:])
    rules = draw(st.just(()) | weights()) if method.scale else ()
    template = st.text(st.characters(exclude_categories=["Cs"]) | st.sampled_from("\n\t\r "), max_size=40)
    return Recipe(
        models=models,
        base_model=sources[0],
        merge_method=method.name,
        parameters={name: value for name, value in parameters.items() if not rules or name != "lambda"},
        lambda_by_tensor=rules,
        dtype=draw(st.none() | st.sampled_from(list(DTYPES))),
        exclude=tuple(draw(st.lists(TEXTS, max_size=3))),
        calibrate="" if method.is_flat else draw(st.sampled_from(["", "svc"])),
        transpose=tuple(draw(st.lists(TEXTS, max_size=2))),
        rest_tensors=tuple(draw(st.lists(TEXTS, max_size=2))),
        split=tuple(draw(st.dictionaries(TEXTS, st.lists(st.integers(1, 10**6), min_size=1).map(tuple), max_size=2)).items()),
        tokenizer_source=draw(st.sampled_from(["base", *(source for source in sources[1:] if source != "union")])),
        chat_template=draw(st.none() | template.map(lambda text: text + "{{ x }}" + text)),
    )


@given(recipes())
@settings(max_examples=150, deadline=None, derandomize=True)
def test_a_recipe_written_and_read_again_is_equal(recipe: Recipe):
    text = recipe.to_yaml()
    again = Recipe.from_yaml(text, recipe.folder)
    assert again == recipe
    assert again.to_yaml() == text
    assert Recipe.from_dict(yaml.safe_load(text), recipe.folder) == recipe  # any reader of YAML gets the same


def test_the_written_recipe_spells_out_its_defaults():
    text = Recipe(models=(Model("a"),), base_model="b").to_yaml()
    assert yaml.safe_load(text) == {
        "merge_method": "pcb",
        "base_model": "b",
        "models": [{"model": "a", "parameters": {"weight": 1.0}}],
        "parameters": {"density": 0.1, "lambda": 1.0, "variant": "pairwise"},
        "exclude": [],
        "tokenizer_source": "base",
    }
    linear = Recipe(models=(Model("a"),), merge_method="linear")
    assert Recipe.from_yaml(linear.to_yaml(), ".").notes == ()


def test_a_resolved_recipe_can_be_read_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name in ("deep/models/base", "deep/a", "org/name", "home/c"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "deep" / "b.safetensors").touch()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    sources = ["./a", "../deep/b.safetensors", "~/c", "org/name@main", "org/name", str(tmp_path / "org" / "name")]
    models = [{"model": source, "parameters": {"weight": i, "density": 0.5}} for i, source in enumerate(sources)]
    recipe = Recipe.from_dict(layout(base_model="models/base", models=models, tokenizer_source="a/"), "deep")
    resolved = recipe.resolved()
    assert resolved.base_model == str(tmp_path / "deep/models/base")
    assert resolved.tokenizer_source == resolved.models[0].source == str(tmp_path / "deep/a")
    assert [os.path.relpath(os.path.realpath(model.source)) for model in resolved.models[:3]] == [
        "deep/a",
        "deep/b.safetensors",
        "home/c",
    ]
    assert all(os.path.isabs(model.source) for model in resolved.models[:3])
    assert [model.source for model in resolved.models[3:]] == sources[3:]  # there is no deep/org/name: a Hub id stays
    assert [dataclasses.replace(new, source="") for new in resolved.models] == [
        dataclasses.replace(old, source="") for old in recipe.models
    ]
    assert resolved == resolved.resolved() == Recipe.from_yaml(resolved.to_yaml(), "/")
    assert resolved.notes == recipe.notes
    (tmp_path / "deep/org/name").mkdir(parents=True)
    assert recipe.resolved().models[4].source == str(tmp_path / "deep/org/name")  # a folder wins over a Hub id


def test_a_resolved_recipe_keeps_base_as_the_word_for_the_base(tmp_path: Path):
    (tmp_path / "base").mkdir()
    recipe = Recipe(models=(Model("a"),), base_model="base", folder=tmp_path).resolved()
    assert (recipe.base_model, recipe.tokenizer_source) == (str(tmp_path / "base"), "base")
    assert Recipe(models=(Model("a"),), merge_method="linear", folder=tmp_path).resolved().base_model is None


def test_a_setting_without_effect_is_noted_and_not_part_of_the_recipe():
    recipe = Recipe(models=(Model("a"),), base_model="b", merge_method="linear", parameters={"density": 0.5, "lambda": 2.0})
    assert len(recipe.notes) == 2
    assert recipe == Recipe(models=(Model("a"),), base_model="b", merge_method="linear")
    again = Recipe.from_yaml(recipe.to_yaml(), ".")
    assert again == recipe
    assert again.notes == ()


# ---------------------------------------------------------------------------------------------------- fuzz

SEEDS = [
    EXAMPLE,
    "merge_method: linear\nmodels:\n- a\n- {model: b, parameters: {weight: -0.5}}\nout_dtype: fp16\n",
    "merge_method: task_arithmetic\nbase_model: org/base@main\nmodels:\n"
    "- {model: &x s3://b/m, parameters: {density: .5}}\n- {model: c, parameters: {<<: {density: .4}, weight: 1e-3}}\n"
    "parameters: {normalize: false, int8_mask: true}\nsearch: {n: 3}\n",
    'base_model: "b"\nmodels:\n  - model: a\nchat_template: |\n  {% if x %}\n  {{ y }}\ntokenizer_source: ./a\n',
]
TOKENS = (
    "{", "}", "[", "]", ":", ": ", "- ", "\n", "\n  ", "\t", "#", "&a ", "*a", "*p", "<<: ", "!!set ", "!", "|\n",
    "'", '"', ">\n", "---\n", "...\n", "%YAML 1.1\n", "? ", ", ", "~", "null", "true", ".nan", ".inf", "1e400", "0x_",
    "0b_", "1:59", "2024-99-99", "=", "\0", "\x85", "\u2028", "\ufeff", "\ud800", "\U0001f600", "\\", "\x1b",
    "models", "model", "parameters", "weight", "filter", "value", "density", "lambda", "slices", "union", "base",
    "1" * 200, "9" * 5000, "[" * 50,
)  # fmt: skip
VALUES = (
    None, True, False, 0, 1, -1, 10**400, 2**70, 0.5, 1j, float("nan"), float("inf"), "", "a", "base", "union", "*",
    "1e-3", "\0", "\ud800", "x" * 10_000, b"x", [], {}, [[]], [{}], [None], [0.1, 0.9], (1, 2), {1, 2}, {None: 1},
    {1: 2}, object(), Path("p"), {"model": "a"}, {"value": 1}, [{"value": 1}], {"filter": "x"},
    {"weight": [{"filter": "x", "value": "y"}]},
)  # fmt: skip


def mutated_text(random_: random.Random) -> str:
    text = random_.choice(SEEDS)
    for _ in range(random_.choice((1, 1, 2, 4))):
        at = random_.randrange(len(text) + 1)
        to = min(len(text), at + random_.choice((0, 1, 1, 2, 8, 40)))
        kind = random_.randrange(5)
        if kind == 0:
            text = text[:at] + chr(random_.randrange(256)) + text[to:]
        elif kind == 1:
            text = text[:at] + text[to:]
        elif kind == 2:
            text = text[:at] + random_.choice(TOKENS) + text[to:]
        elif kind == 3:
            other = random_.choice(SEEDS)
            start = random_.randrange(len(other))
            text = text[:at] + other[start : start + random_.choice((1, 5, 20, 80))] + text[to:]
        else:
            text = text[:to] + text[at:to] * random_.choice((1, 3, 200)) + text[to:]
    return text


LAYOUTS = [yaml.safe_load(seed) for seed in SEEDS]


def mutated_layout(random_: random.Random) -> Any:
    """The parsed recipe with some of its values or keys exchanged."""
    whole = copy.deepcopy(random_.choice(LAYOUTS))
    for _ in range(random_.choice((1, 1, 2, 4))):
        places: list[tuple[Any, Any]] = []
        waiting = [whole]
        for node in waiting:
            inside = list(node.items()) if isinstance(node, dict) else list(enumerate(node))
            places += [(node, key) for key, _ in inside]
            waiting += [value for _, value in inside if isinstance(value, (dict, list)) and len(waiting) < 200]
        if not places:
            break
        node, key = random_.choice(places)
        kind = random_.randrange(4)
        if kind == 0 and isinstance(node, dict):
            node[random_.choice([*TOKENS, None, 3, True])] = node.pop(key)
        elif kind == 1:
            other_node, other_key = random_.choice(places)
            node[key] = other_node[other_key]  # also makes a value hold itself
        else:
            value = random_.choice(VALUES)
            node[key] = value.copy() if isinstance(value, (dict, list)) else value
    return whole


def read_or_refused(make: Callable[[], Recipe]) -> Recipe | None:
    """The recipe, or None if it was refused by an error of ours; either comes within a second."""
    recipe, refused = None, ("",)
    start_s = time.perf_counter()
    try:
        recipe = make()
    except RequestError as error:
        refused = error.problems
    assert time.perf_counter() - start_s < 1.0
    assert all(len(problem) < 1000 and "\n" not in problem for problem in refused)
    if recipe is not None:
        assert Recipe.from_yaml(recipe.to_yaml(), recipe.folder) == recipe
    return recipe


@pytest.mark.parametrize("seed", SEEDS)
def test_what_is_mutated_is_read_when_it_is_whole(seed: str):
    assert read_or_refused(lambda: Recipe.from_yaml(seed, "."))


def test_mutated_texts_are_read_right_or_refused():
    random_ = random.Random(20240)
    read_count = 0
    for _ in range(7_000):
        text = mutated_text(random_)
        recipe = read_or_refused(lambda text=text: Recipe.from_yaml(text, "."))
        if recipe is None:
            continue
        read_count += 1
        assert recipe == Recipe.from_dict(yaml.load(text, Loader=yaml.CSafeLoader))
    assert 500 < read_count < 6_000  # the mutations are neither harmless nor all deadly


def test_mutated_values_are_read_right_or_refused():
    random_ = random.Random(20241)
    read_count = 0
    for _ in range(5_000):
        whole = mutated_layout(random_)
        read_count += read_or_refused(lambda whole=whole: Recipe.from_dict(whole, ".")) is not None
    assert 300 < read_count < 4_500


def test_mutated_bytes_of_a_file_are_read_right_or_refused(tmp_path: Path):
    random_ = random.Random(20242)
    file = tmp_path / "r.yaml"
    read_count = 0
    for _ in range(1_500):
        data = bytearray(random_.choice(SEEDS).encode())
        for _ in range(random_.choice((1, 1, 2, 4))):
            data[random_.randrange(len(data))] = random_.choice((random_.randrange(32, 127), random_.randrange(256)))
        file.write_bytes(data)
        read_count += read_or_refused(lambda: Recipe.from_file(file)) is not None
    assert 50 < read_count < 1_400


# --- lambda by tensor or layer ----------------------------------------------------------------------------------------------------


BY_TENSOR = [{"filter": "mlp", "value": 0.5}, {"filter": "attn", "value": [0.0, 2.0]}, {"value": 0.9}]


@pytest.mark.parametrize("value", [BY_TENSOR, [0.1, 0.9], {"filter": "mlp", "value": 2.0}, [{"value": 0.3}]])
def test_lambda_may_be_given_by_tensor_and_by_layer_as_in_mergekit(value: object):
    recipe = Recipe.from_dict(layout(parameters={"lambda": value}))
    assert Recipe.from_yaml(recipe.to_yaml()) == recipe
    assert Recipe.from_yaml(recipe.to_yaml()).to_yaml() == recipe.to_yaml()
    if value is BY_TENSOR:
        assert [recipe.lambda_("x.mlp.w"), recipe.lambda_("x.attn.w", 0.75), recipe.lambda_("norm")] == [0.5, 1.5, 0.9]
    if isinstance(value, dict):
        assert [recipe.lambda_("x.mlp.w"), recipe.lambda_("norm")] == [2.0, 1.0]


def test_lambda_of_a_recipe_without_one_by_tensor_is_its_number_or_one():
    assert Recipe.from_dict(layout(parameters={"lambda": 0.7})).lambda_("any") == 0.7
    assert Recipe.from_dict(layout(merge_method="linear")).lambda_("any") == 1.0


@pytest.mark.parametrize("value", [[], {}, [{"filter": "a"}], [{"value": "x"}], {"value": float("nan")}, [1.0, "x"], [[1.0]]])
def test_a_lambda_by_tensor_that_is_none_is_refused(value: object):
    assert "parameters.lambda" in the_problem(layout(parameters={"lambda": value}))


def test_lambda_by_tensor_has_no_effect_where_lambda_has_none():
    recipe = Recipe.from_dict(layout(merge_method="linear", parameters={"lambda": BY_TENSOR}))
    assert recipe.lambda_by_tensor == ()
    assert any("`lambda` has no effect" in note for note in recipe.notes)


def test_other_parameters_may_take_the_place_of_a_lambda_by_tensor():
    recipe = Recipe.from_dict(layout(parameters={"lambda": BY_TENSOR}))
    assert recipe.with_parameters({"lambda": 0.5}).lambda_("x.mlp.w") == 0.5
    assert recipe.with_parameters({"density": 0.5}).lambda_by_tensor == recipe.lambda_by_tensor


def test_a_ties_without_density_is_told_that_the_default_is_another_in_mergekit():
    """There it is 1, which trims nothing."""
    told = "`density` is 0.1 where a recipe does not give it; in mergekit it is 1."
    assert told in Recipe.from_dict(layout(merge_method="ties")).notes
    given = Recipe.from_dict(layout(merge_method="ties", parameters={"density": 1.0}))
    assert told not in given.notes
    assert told not in Recipe.from_yaml(Recipe.from_dict(layout(merge_method="ties")).to_yaml()).notes
    assert told not in Recipe.from_dict(layout()).notes
