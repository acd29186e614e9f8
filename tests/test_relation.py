"""Models that are no fine-tunes of the base are refused before anything is computed; a later ancestor of all is named."""

from __future__ import annotations

import json
from pathlib import Path

import families
import numpy as np
import pytest
import torch
from families import Family, StateDict

from pcb_ray import Recipe, RequestError
from pcb_ray.cli import main
from pcb_ray.planning import Plan, plan

NAMES = ("base", "model0", "model1")


def noise(state: StateDict, scale: float, seed: int) -> StateDict:
    """Every tensor with noise of this share of its own spread."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: (t.float() + scale * t.float().std() * torch.randn(t.shape, generator=generator)).to(t.dtype)
        for name, t in state.items()
    }


def planned(folder: Path, base: StateDict, models: list[StateDict], **changes: object) -> Plan:
    return plan(Recipe.from_dict(Family(folder, base, models).recipe(merge_method="task_arithmetic", **changes)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_the_numbers_are_those_of_the_weights(tmp_path: Path, dtype: torch.dtype) -> None:
    """The matrices are smaller than the sample, which then is all of them."""
    shapes = {"a.weight": (40, 100), "b.weight": (4, 1000), "norm.weight": (64,), "c": ()}
    base, models = families.fine_tuned(2, shapes=shapes, dtype=dtype)
    found = planned(tmp_path, base, models).relation
    assert found is not None
    theta, *others = (torch.cat([s[n].double().flatten() for n in ("a.weight", "b.weight")]).numpy() for s in (base, *models))
    tau = [other - theta for other in others]
    assert found.untouched == pytest.approx([float((t == 0).mean()) for t in tau])
    (_, cosine), (also, _) = found.cosines
    assert cosine == also
    assert cosine == pytest.approx(float(tau[0] @ tau[1] / (np.linalg.norm(tau[0]) * np.linalg.norm(tau[1]))))
    by_tensor = [(theta[:4000], [t[:4000] for t in tau]), (theta[4000:], [t[4000:] for t in tau])]
    for k in range(2):
        each = [float(np.linalg.norm(of[k]) / np.linalg.norm(base_part)) for base_part, of in by_tensor]
        assert found.change[k] == pytest.approx(float(np.median(each)))


def test_the_sample_of_a_large_model_is_small_and_near_the_truth(tmp_path: Path) -> None:
    base, _ = families.fine_tuned(1, shapes={"a.weight": (2000, 500), "b.weight": (500, 2000)})
    made = planned(tmp_path, base, [noise(base, 0.1, 1), noise(base, 0.2, 2)])
    assert made.relation is not None
    assert made.relation.change == pytest.approx((0.1, 0.2), rel=0.05)
    assert made.notes == ()


@pytest.mark.parametrize("which", [0, 1])
def test_an_unrelated_model_is_refused_unless_it_is_allowed(tmp_path: Path, which: int) -> None:
    base, models = families.fine_tuned(2)
    stranger, _ = families.fine_tuned(1, seed=77)
    models[which] = stranger
    with pytest.raises(RequestError) as caught:
        planned(tmp_path, base, models)
    (problem,) = caught.value.problems
    assert f"/model{which}: wanted a fine-tune of" in problem
    assert "times as long as the base's weights (unrelated models: 1.41)" in problem
    made = planned(tmp_path, base, models, allow_unrelated=True)
    assert Recipe.from_yaml(made.recipe.to_yaml()).allow_unrelated
    assert made.relation is not None
    assert made.relation.change[which] == pytest.approx(2**0.5, rel=0.1)
    assert "allow_unrelated: wanted true or false" in str(refusal(made.recipe.to_yaml().replace("true", "yes please")))


def refusal(text: str) -> RequestError:
    with pytest.raises(RequestError) as caught:
        Recipe.from_yaml(text)
    return caught.value


def test_a_plan_and_a_merge_say_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, _ = families.fine_tuned(1)
    one = Family(tmp_path, base, [families.fine_tuned(1, seed=9)[0]])
    recipe = one.recipe_file(merge_method="task_arithmetic")
    told = []
    for command in (["plan", str(recipe)], ["merge", str(recipe), str(tmp_path / "out")]):
        assert main(command) == 2
        told.append(capsys.readouterr().err)
    assert told[0] == told[1]
    assert not (tmp_path / "out").exists()


def test_models_that_share_a_later_ancestor_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As experts that were tuned from the -Instruct model, merged over the plain base."""
    base, _ = families.fine_tuned(1, dtype=torch.float32)
    instruct = noise(base, 0.2, 1)
    models = [noise(instruct, 0.03, seed) for seed in (2, 3)]
    (note,) = planned(tmp_path, base, models).notes
    assert "all task vectors point the same way (cosines of 0.9" in note
    assert "which should be `base_model`" in note
    assert planned(tmp_path / "right", instruct, models).notes == ()
    assert main(["plan", "--json", str(Family(tmp_path / "json", base, models).recipe_file())]) == 0
    assert json.loads(capsys.readouterr().out)["relation"]["cosines"][0][1] > 0.9


def test_a_base_of_zeros_constants_and_what_is_not_finite_decide_nothing(tmp_path: Path) -> None:
    base, models = families.fine_tuned(1)
    zeros = {name: torch.zeros_like(t) for name, t in base.items()}
    assert planned(tmp_path / "zeros", zeros, models).relation is None
    broken = {name: torch.full_like(t, float("nan")) for name, t in models[0].items()}
    assert planned(tmp_path / "nan", base, [broken]).relation is None, "whoever reads all of it tells the place"
    assert planned(tmp_path / "same", base, [dict(base)]).relation.change == (0.0,)
    linear = Recipe.from_dict(Family(tmp_path / "linear", base, models).recipe(merge_method="linear"))
    assert plan(linear).relation is None, "nothing is merged over a base"


def test_of_a_few_elements_nothing_is_concluded(tmp_path: Path) -> None:
    base, _ = families.fine_tuned(1, shapes={"w": (63, 65)})
    stranger, _ = families.fine_tuned(1, shapes={"w": (63, 65)}, seed=5)
    made = planned(tmp_path / "few", base, [stranger])
    assert made.relation is not None
    assert made.relation.elements == 4095
    assert made.relation.change[0] > 1.2
    base, _ = families.fine_tuned(1, shapes={"w": (64, 64)})
    stranger, _ = families.fine_tuned(1, shapes={"w": (64, 64)}, seed=5)
    with pytest.raises(RequestError, match="wanted a fine-tune of"):
        planned(tmp_path / "enough", base, [stranger])
