"""What a normalisation has counted of its data is averaged over the models, whatever lambda: no variance falls below 0."""

from __future__ import annotations

from pathlib import Path

import families
import numpy as np
import pytest
import torch
from families import Family, StateDict, merge_locally, merged_to, small_engine

from pcb_ray import Recipe, RequestError, merge_state_dicts, verify
from pcb_ray.errors import InputError
from pcb_ray.methods import names
from pcb_ray.planning import MEAN, open_inputs, plan_of
from pcb_ray.searching.run import check_follows

SIZE = 100


def networks(n: int = 3, dtype: torch.dtype = torch.float32) -> tuple[StateDict, list[StateDict]]:
    """A convolution with BatchNorm; each model saw narrower data than the base."""
    base, models = families.fine_tuned(n, shapes={"conv.weight": (8, 4, 3, 3), "bn.weight": (SIZE,)}, dtype=torch.float32)
    generator = torch.Generator().manual_seed(3)
    for k, state in enumerate((base, *models)):
        state["bn.running_mean"] = torch.randn(SIZE, generator=generator).to(dtype)
        state["bn.running_var"] = (torch.rand(SIZE, generator=generator) + 0.1).to(dtype) * (9.0 if k == 0 else 1.0)
        state["bn.num_batches_tracked"] = torch.tensor(100 + k)
    return base, models


def mean_of(models: list[StateDict], name: str, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """In numpy: float32, added in order, divided once."""
    total = np.zeros(SIZE, dtype=np.float32)
    for model in models:
        if name in model:
            total = total + model[name].float().numpy()
    having = sum(name in model for model in models)
    return torch.from_numpy(total / np.float32(having)).to(dtype)


@pytest.mark.parametrize("method", names())
@pytest.mark.parametrize("lambda_", [1.0, 2.5, -1.0])
def test_statistics_are_the_mean_over_the_models_whatever_lambda_and_weights(tmp_path: Path, method: str, lambda_: float) -> None:
    base, models = networks()
    one = Family(tmp_path, base, models)
    weighted = [{"model": str(one.folder / f"model{k}"), "parameters": {"weight": w}} for k, w in enumerate((1.0, 0.25, 2.0))]
    parameters = {} if method == "linear" else {"parameters": {"lambda": lambda_}}
    recipe = Recipe.from_dict(one.recipe(merge_method=method, models=weighted, **parameters))
    made = plan_of(recipe, open_inputs(recipe))
    assert base["conv.weight"].numel() + SIZE == made.D, "they leave D"
    assert {c.source.name: c.why for c in made.copies} == {
        **dict.fromkeys(("bn.running_mean", "bn.running_var"), MEAN),
        "bn.num_batches_tracked": "integer",
    }
    out = merged_to(tmp_path / "out", recipe)
    merged = families.load(out)
    for name in ("bn.running_mean", "bn.running_var"):
        assert torch.equal(merged[name], mean_of(models, name)), name
    assert (merged["bn.running_var"] > 0).all()
    assert torch.equal(merged["bn.num_batches_tracked"], base["bn.num_batches_tracked"])
    assert verify(out, quiet=True).ok


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("written", [None, "float16"])
def test_they_are_rounded_once_to_the_dtype_of_the_output(tmp_path: Path, dtype: torch.dtype, written: str | None) -> None:
    base, models = networks(dtype=dtype)
    one = Family(tmp_path, base, models)
    recipe = Recipe.from_dict(one.recipe(**({"dtype": written} if written else {})))
    with small_engine(tally_entries=512):  # copies in pieces of 64 bytes
        merge_locally(plan_of(recipe, open_inputs(recipe)), tmp_path / "out")
    merged = families.load(tmp_path / "out")["bn.running_var"]
    kind = torch.float16 if written else torch.float32 if dtype == torch.float64 else dtype
    assert torch.equal(merged, mean_of(models, "bn.running_var", kind))


def test_a_model_that_lacks_one_is_left_out_of_its_mean(tmp_path: Path) -> None:
    base, models = networks()
    del models[1]["bn.running_var"]
    merged = families.load(merged_to(tmp_path / "out", Recipe.from_dict(Family(tmp_path / "a", base, models).recipe())))
    assert torch.equal(merged["bn.running_var"], mean_of(models, "bn.running_var"))
    for model in models:
        model.pop("bn.running_var", None)
    merged = families.load(merged_to(tmp_path / "none", Recipe.from_dict(Family(tmp_path / "b", base, models).recipe())))
    assert torch.equal(merged["bn.running_var"], base["bn.running_var"])


def test_excluded_ones_are_the_bases_and_those_of_another_shape_are_told(tmp_path: Path) -> None:
    base, models = networks()
    one = Family(tmp_path, base, models)
    merged = families.load(merged_to(tmp_path / "out", Recipe.from_dict(one.recipe(exclude=["*.running_*"]))))
    assert torch.equal(merged["bn.running_var"], base["bn.running_var"])
    models[0]["bn.running_mean"] = torch.ones(3)
    with pytest.raises(RequestError, match=r"bn\.running_mean: shape \[100\] in .* but \[3\] in"):
        Recipe.from_dict(Family(tmp_path / "b", base, models).recipe())
        recipe = Recipe.from_dict(Family(tmp_path / "b", base, models).recipe())
        plan_of(recipe, open_inputs(recipe))


def test_a_mean_that_is_not_finite_is_refused_by_name(tmp_path: Path) -> None:
    base, models = networks()
    models[1]["bn.running_var"][7] = float("nan")
    recipe = Recipe.from_dict(Family(tmp_path, base, models).recipe())
    with pytest.raises(InputError, match=r"tensor bn\.running_var: wanted statistics whose mean"):
        merged_to(tmp_path / "out", recipe)


def test_the_same_in_memory() -> None:
    base, models = networks()
    merged = merge_state_dicts(base, models, method="task_arithmetic", weights=[1.0, 0.5, 2.0])
    assert torch.equal(merged["bn.running_mean"], mean_of(models, "bn.running_mean"))


def test_a_search_is_refused_with_exclude_lines_that_help(tmp_path: Path) -> None:
    one = Family(tmp_path, *networks())
    recipe = Recipe.from_dict(one.recipe())
    with pytest.raises(RequestError, match=r"found 2 tensors of statistics") as caught:
        check_follows(plan_of(recipe, open_inputs(recipe)))
    lines = str(caught.value).split("exclude:\n")[1].splitlines()
    exclude = [line.strip().removeprefix("- ").strip('"') for line in lines]
    recipe = Recipe.from_dict(one.recipe(exclude=exclude))
    check_follows(plan_of(recipe, open_inputs(recipe)))
