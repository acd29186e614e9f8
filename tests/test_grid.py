"""The grid of a recipe: each point is the recipe that one would have written by hand, under a name that tells which."""

from __future__ import annotations

import pytest
import yaml

from pcb_ray import Recipe, RequestError
from pcb_ray.grid import MAX_POINTS, points_of

MODELS = [{"model": "a"}, {"model": "b"}]
ONE = {"base_model": "base", "models": MODELS}


def points(grid: object, **recipe: object) -> dict[str, Recipe | RequestError]:
    return points_of({**ONE, **recipe, "grid": grid})


def by_hand(**recipe: object) -> Recipe:
    return Recipe.of({**ONE, **recipe})


def test_each_point_is_the_recipe_that_one_would_write():
    found = points({"lambda": [0.5, 1], "density": [0.1, "1e-3"]}, dtype="float16")
    assert found == {
        f"density={d:g},lambda={x:g}": by_hand(parameters={"density": d, "lambda": x}, dtype="float16")
        for d in (0.1, 1e-3)
        for x in (0.5, 1.0)
    }


def test_a_recipe_without_a_grid_is_its_only_point(tmp_path):
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(ONE))
    assert points_of(ONE) == points_of(by_hand()) == {"": by_hand()}
    assert points_of(tmp_path / "r.yaml") == {"": Recipe.from_file(tmp_path / "r.yaml")}


def test_relative_paths_are_resolved_against_the_folder_of_the_file(tmp_path):
    (tmp_path / "r.yaml").write_text(yaml.safe_dump({**ONE, "grid": {"lambda": [1]}}))
    (found,) = points_of(tmp_path / "r.yaml").values()
    assert isinstance(found, Recipe)
    assert found.folder == tmp_path


def test_a_value_of_the_grid_counts_for_all_models():
    models = [{"model": "a", "parameters": {"density": 0.5, "weight": 0.3}}, {"model": "b"}]
    found = points({"density": [0.2]}, models=models, parameters={"density": 0.7})
    models = [{"model": "a", "parameters": {"weight": 0.3}}, {"model": "b"}]
    assert found == {"density=0.2": by_hand(models=models, parameters={"density": 0.2})}


def test_a_method_is_combined_with_the_values_that_it_knows():
    grid = {"method": ["pcb", "ties", "linear"], "variant": ["released", "weighted_mean"], "density": [0.1, 0.2]}
    assert sorted(points(grid)) == [
        "density=0.1,method=pcb,variant=released",
        "density=0.1,method=ties,variant=weighted_mean",
        "density=0.2,method=pcb,variant=released",
        "density=0.2,method=ties,variant=weighted_mean",
        "method=linear",
    ]
    assert points(grid)["method=linear"] == by_hand(merge_method="linear")


def test_a_method_of_ones_own_has_what_parameters_it_says(tmp_path):
    (tmp_path / "mine.py").write_text(
        "from pcb_ray.methods import Method, Parameter, fraction\n"
        "parameters = {'trim': Parameter(0.1, fraction, 'a share')}\n"
        "mine = Method(name='mine', merge=lambda block, known, settings: block.theta, parameters=parameters)\n"
    )
    (tmp_path / "r.yaml").write_text(yaml.safe_dump({**ONE, "grid": {"method": ["./mine.py:mine"], "trim": [0.25, 0.5]}}))
    found = points_of(tmp_path / "r.yaml")
    assert list(found) == ["method=mine.py:mine,trim=0.25", "method=mine.py:mine,trim=0.5"]
    assert [one.parameters["trim"] for one in found.values() if isinstance(one, Recipe)] == [0.25, 0.5]


def test_numbers_are_written_as_short_as_they_can_be_told_apart():
    values = [1, 0.5, 1e-7, 0.1234567, 0.12345671, "0.25", 100000000]
    names = ["1", "0.5", "1e-07", "0.1234567", "0.12345671", "0.25", "1e+08"]
    assert list(points({"lambda": values})) == [f"lambda={name}" for name in names]


def test_a_point_that_is_wrong_is_told_apart_from_those_that_are_right():
    found = points({"density": [0.1, 2.0]})
    assert isinstance(found["density=0.1"], Recipe)
    assert "density: wanted a number in (0, 1], found 2.0" in str(found["density=2"])


@pytest.mark.parametrize(
    ("grid", "problem"),
    [
        ([0.1], "grid: wanted keys with lists of values, found"),
        ({}, "grid: wanted keys with lists of values"),
        ({"lambda": 0.5}, "grid.lambda: wanted a list of values, found 0.5"),
        ({"lambda": []}, "grid.lambda: wanted a list of values"),
        ({"lambda": [[0.1, 0.2]]}, "grid.lambda: wanted numbers or names, found"),
        ({"lambda": [True]}, "grid.lambda: wanted numbers or names, found true"),
        ({"lambda": [1, 1.0]}, "grid.lambda: wanted values of different names, found '1 twice'"),
        ({"lamda": [1]}, "grid: wanted some of .*, found 'lamda'. Fix: write `lambda`"),
        ({"weight": [1]}, "grid: wanted some of .*, found 'weight'"),
        ({"merge_method": ["pcb"]}, "grid: wanted some of .*, found 'merge_method'. Fix: write `method`"),
        ({3: [1]}, "grid: wanted some of .*, found 3"),
        ({"variant": ["weighted_mean"]}, "grid.variant: wanted what 'pcb' can be given, found 'weighted_mean'. Fix: remove it"),
        ({"method": ["linear"], "lambda": [1]}, "grid.lambda: wanted what 'linear' can be given, found 1"),
        ({"lambda": list(range(MAX_POINTS + 1))}, f"grid: wanted at most {MAX_POINTS} points, found {MAX_POINTS + 1}"),
    ],
)
def test_what_is_no_grid_is_refused_in_one_line(grid, problem):
    with pytest.raises(RequestError, match=f"^{problem}") as told:
        points(grid)
    assert len(told.value.problems) == 1


def test_one_merge_of_a_recipe_with_a_grid_is_refused_with_advice():
    with pytest.raises(
        RequestError, match="unknown key 'grid'. Fix: merge each of its points with `pcb-ray merge RECIPE --into DIR`"
    ):
        Recipe.of({**ONE, "grid": {"lambda": [1]}})
