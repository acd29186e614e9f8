"""What recipes of mergekit mean there they mean here: held against values that mergekit 0.1.5 computed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from families import Family, StateDict, merged_to
from safetensors import safe_open
from safetensors.torch import load_file

import pcb_ray
from pcb_ray import Recipe, RequestError, merge_state_dicts, verify
from pcb_ray.recipe import depths_of

# Its `ties` at density 1, where the scope of the threshold does not matter; int8_mask changed none of these values.
VALUES = Path(__file__).parent / "data" / "mergekit_0.1.5_ties.safetensors"
with safe_open(VALUES, "pt") as _file:
    CASES: list[dict[str, Any]] = json.loads(_file.metadata()["cases"])
TENSORS = load_file(VALUES)


@pytest.mark.parametrize("number", range(len(CASES)), ids=lambda k: json.dumps(CASES[k]))
def test_normalize_of_ties_gives_the_values_of_mergekit(number: int) -> None:
    case = CASES[number]
    merged = merge_state_dicts(
        {"w": TENSORS["base"]},
        [{"w": model} for model in TENSORS["models"]],
        method="ties",
        variant="weighted_mean" if case["normalize"] else "weighted_sum",
        density=1.0,
        weights=case["weights"],
        lambda_=case["lambda"],
    )["w"]
    torch.testing.assert_close(merged, TENSORS[f"out.{number}"], rtol=1e-6, atol=1e-6)


def test_a_recipe_of_mergekit_with_normalize_false_sums_the_agreeing_models(tmp_path: Path) -> None:
    def full(value: float) -> families.StateDict:
        return {"w": torch.full((256, 256), value)}

    one = Family(tmp_path, full(0.0), [full(1.0), full(1.0)])
    half = {"density": 1.0, "weight": 0.5}
    models = [{"model": str(one.folder / f"model{k}"), "parameters": half} for k in range(2)]
    parameters = {"normalize": False, "int8_mask": True}
    out = merged_to(tmp_path / "out", Recipe.from_dict(one.recipe(merge_method="ties", models=models, parameters=parameters)))
    assert torch.equal(load_file(out / "model.safetensors")["w"], torch.ones(256, 256))


@pytest.mark.parametrize(
    ("method", "variant"),
    [("task_arithmetic", ""), ("pcb", "pairwise"), ("pcb", "paper"), ("ties", ""), ("ties", "weighted_mean")],
)
@pytest.mark.parametrize("value", [[{"filter": "mlp", "value": 0.5}, {"filter": "self_attn", "value": [0.25, 2.0]}], [0.5, 1.5]])
def test_lambda_by_tensor_is_the_merge_with_that_lambda_tensor_by_tensor(
    tmp_path: Path, method: str, variant: str, value: list[Any]
) -> None:
    one = Family(tmp_path / "f", *families.fine_tuned(3))
    own = {"variant": variant} if variant else {}

    def merged(lambda_: object, name: str) -> StateDict:
        asked = Recipe.from_dict(one.recipe(merge_method=method, parameters={**own, "lambda": lambda_}))
        return families.load(merged_to(tmp_path / name, asked))

    found = merged(value, "by-tensor")
    assert verify(tmp_path / "by-tensor", quiet=True).ok
    recipe = Recipe.from_dict(one.recipe(merge_method=method, parameters={**own, "lambda": value}))
    depths = depths_of(found)
    lambdas = {name: recipe.lambda_(name, depths[name]) for name in found}
    assert len(set(lambdas.values())) >= 2
    for lambda_ in set(lambdas.values()):
        plain = merged(lambda_, f"plain-{lambda_}")
        assert all(torch.equal(found[name], plain[name]) for name in found if lambdas[name] == lambda_)


@pytest.mark.parametrize("command", ["search", "sweep"])
def test_a_recipe_whose_lambda_is_no_number_is_not_searched(tmp_path: Path, command: str) -> None:
    one = Family(tmp_path / "f", *families.fine_tuned(2))
    section = {"density": [0.1, 0.2]} if command == "sweep" else {}
    path = one.recipe_file(
        parameters={"lambda": [0.5, 1.0]},
        search={"evaluator": {"command": {"run": "echo {model}"}}, "metric": "x"},
        **({"sweep": section} if section else {}),
    )
    with pytest.raises(RequestError, match="wanted one number in a recipe that is searched"):
        getattr(pcb_ray, command)(path, tmp_path / "out", quiet=True)


def test_a_layer_that_is_excluded_counts_among_the_layers(tmp_path: Path) -> None:
    shapes = {f"model.layers.{k}.w.weight": (8, 8) for k in range(4)}
    one = Family(tmp_path, *families.fine_tuned(1, shapes=shapes))
    models = [{"model": str(one.folder / "model0"), "parameters": {"weight": [0.0, 3.0]}}]
    made = pcb_ray.plan(one.recipe(models=models, parameters={"lambda": [0.0, 3.0]}, exclude=["model.layers.3.*"]))
    assert [(t.lambda_, t.weights) for t in made.tensors] == [(k, (k,)) for k in (0.0, 1.0, 2.0)]
