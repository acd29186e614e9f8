"""A search's request: what a `search:` section may say, the coefficients it opens, and the recipe that a candidate is."""

from __future__ import annotations

import dataclasses
import math
import signal
import sys
from types import SimpleNamespace
from typing import Any

import families
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from junk import junk, places, replaced

from pcb_ray import Recipe, RequestError
from pcb_ray.methods import Method, Parameter, number
from pcb_ray.planning import Plan, plan
from pcb_ray.searching.request import Range, Search, Space, _labels, _rules, grid_of, key_of
from pcb_ray.searching.run import _tools

NAN = math.nan
VALID: dict[str, Any] = {"evaluator": "my_eval.py:Accuracy", "metric": "accuracy"}


def searched(family: families.Family, **search: Any) -> tuple[Search, Plan]:
    recipe = Recipe.from_dict(family.recipe(search=VALID | search))
    return Search.of(recipe, has_evaluator=False), plan(recipe)


def problems_of(recipe: dict[str, Any]) -> str:
    with pytest.raises(RequestError) as caught:
        Search.of(Recipe.from_dict(recipe), has_evaluator=False)
    return "\n".join(caught.value.problems)


def test_a_library_that_is_missing_is_told_with_the_fix(monkeypatch):
    monkeypatch.delattr(sys.modules["pcb_ray.searching"], "report", raising=False)
    monkeypatch.setitem(sys.modules, "pcb_ray.searching.report", None)  # as if what it imports were not there
    with pytest.raises(RequestError, match=r"Fix: pip install 'pcb-ray\[search\]'"):
        _tools()


def test_defaults_are_a_search_of_one_weight_per_model(family):
    search, made = searched(family(3))
    assert (search.budget, search.population, search.optimizer, search.mode, search.seed) == (100, 8, "CMA", "max", 0)
    assert (search.search_split, search.report_split) == ("val", "test")
    space = Space.of(search, made.recipe, made)
    assert space.start == {"weight.model0": 1.0, "weight.model1": 1.0, "weight.model2": 1.0}
    assert set(space.lambdas(space.candidate(space.start))) == {(1.0, 1.0, 1.0)}


def test_built_in_evaluators_know_their_metric(family):
    search, _ = searched(family(2), evaluator={"causal_lm": {"data": {"val": "v.txt"}}}, metric=None)
    assert (search.metric, search.mode, search.options) == ("loss", "min", {"data": {"val": "v.txt"}})


@pytest.mark.parametrize(
    ("wrong", "complaint"),
    [
        ({"evaluator": None}, "search.evaluator"),
        ({"evaluator": "accuracy"}, "file.py:object"),
        ({"evaluator": {"causal_lm": 3}}, "option"),
        ({"metric": None}, "search.metric"),
        ({"mode": "maximum"}, "write `max`"),
        ({"budgets": 3}, "write `budget`"),
        ({"budget": 4, "population": 8}, "wanted at least one generation, a population of 8, found 4"),
        ({"budget": 2}, "search.budget: wanted a whole number of at least 3"),
        ({"population": 2}, "search.population: wanted a whole number of at least 3"),
        ({"space": {"weight": {"lower": 1.5, "init": 1.0}}}, "lower <= init <= upper"),
        ({"space": {"weight": {"lower": 1.2, "upper": 1.1, "init": 1.15}}}, "lower < upper"),
        ({"space": {"weight": {"lower": "low"}}}, "search.space.weight.lower"),
        ({"space": {"density": {"lower": 0.0, "upper": 0.4}}}, "search.space.density.lower"),
        ({"space": {"density": {"lower": 0.1, "upper": 1.4}}}, "search.space.density.upper"),
        ({"space": {"lamda": {"lower": 0.1}}}, "write `lambda`"),
        ({"loggers": [{"wandb": {"api_key": "s3cret"}}]}, "set WANDB_API_KEY in the environment"),
        ({"space": {"variant": ["pairwise", "release"]}}, "write `released`"),
        ({"space": {"groups": ["*mlp*"]}}, "search.space.groups"),
        ({"space": {"groups": {"rest": "*mlp*"}}}, "found `rest`, the group of all that no pattern matches. Fix: rename it"),
        ({"space": {"groups": {"layers": 0}}}, "search.space.groups.layers"),
        ({"resources_per_trial": {"cpus": 1}}, "write `cpu`"),
        ({"resources_per_trial": {"cpu": -1}}, "not negative"),
        ({"resources_per_trial": {"memory": "much"}}, "wanted a size"),
        ({"resources_per_trial": {"cpu": 0}}, "wanted a CPU or a GPU, found neither"),
        ({"trial_timeout": 0}, "search.trial_timeout: wanted seconds above 0"),
        ({"trial_timeout": 1e30}, "search.trial_timeout: wanted seconds above 0"),
        ({"space": {"groups": {"a/b": "*mlp*"}}}, "rename the group"),
        ({"concurrency": "all"}, "search.concurrency"),
        ({"trial_timeout": "an hour"}, "search.trial_timeout"),
        ({"loggers": ["wandbs"]}, "write `wandb`"),
        ({"seed": -1}, "search.seed"),
        ({"seed": 2**32}, "search.seed: wanted a whole number of at least 0 and at most 4294967295"),
        ({"resources_per_trial": {"cpu": 1e-50}}, "search.resources_per_trial.cpu: wanted 0, or at least 0.0001"),
        ({"resources_per_trial": {"gpu": 1.5}}, "write 2"),
    ],
)
def test_what_is_wrong_is_said_with_its_place_and_a_fix(family, wrong, complaint):
    search = {k: v for k, v in (VALID | wrong).items() if v is not None}
    found = problems_of(family(2).recipe(search=search))
    assert complaint in found
    assert "Fix:" in found


FULL: dict[str, Any] = {
    "evaluator": {"causal_lm": {"data": {"val": "val.txt", "test": "test.txt"}}},
    "split": {"search": "val", "report": "test"},
    "metric": "loss",
    "mode": "min",
    "space": {
        "weight": {"lower": 0.0, "upper": 2.0, "init": 1.0},
        "groups": {"attention": "*self_attn*", "mlp": ["*mlp*"], "layers": 4},
        "lambda": {"lower": 0.5, "upper": 2.0},
        "density": {"lower": 0.02, "upper": 0.4},
        "variant": ["pairwise", "released"],
    },
    "optimizer": "CMA",
    "budget": 100,
    "population": 8,
    "concurrency": "auto",
    "resources_per_trial": {"cpu": 1, "gpu": 0, "memory": "4GB"},
    "seed": 0,
    "trial_timeout": 60,
    "loggers": ["tensorboard", {"wandb": {"project": "merges"}}],
}


@given(place=st.sampled_from(places(FULL)[1:]), value=junk)
@settings(max_examples=400, deadline=None)
def test_whatever_stands_in_a_section_is_taken_or_refused_with_a_fix(place, value):
    asked = {"base_model": "b", "models": ["m", "n"], "merge_method": "pcb", "search": replaced(FULL, place, value)}
    problems: list[str] = []
    try:
        Search.of(Recipe.from_dict(asked), has_evaluator=False)
    except RequestError as error:
        problems = error.problems
    assert all("Fix:" in problem for problem in problems)


def test_init_moves_into_bounds_that_leave_it_out(family):
    search, _ = searched(family(2), space={"weight": {"lower": 1.2, "upper": 1.6}})
    assert search.weight.bounds(1.0).init == pytest.approx(1.4)


def test_a_search_starts_from_the_recipe_where_no_init_is_given(family):
    made = family(3)
    asked = made.recipe(
        models=[
            {"model": str(made.folder / "model0"), "parameters": {"weight": 0.7}},
            {
                "model": str(made.folder / "model1"),
                "parameters": {"weight": [{"filter": "self_attn", "value": 0.3}, {"value": 1.1}]},
            },
            {"model": str(made.folder / "model2"), "parameters": {"weight": 9.0}},
        ],
        parameters={"density": 0.2, "lambda": 0.8, "variant": "released"},
        search=VALID
        | {"space": {"groups": {"attention": "*self_attn*"}, "density": {}, "lambda": {}, "variant": ["paper", "released"]}},
    )
    recipe = Recipe.from_dict(asked)
    search = Search.of(recipe, has_evaluator=False)
    analysed = plan(recipe.with_parameters({"variant": "paper", "density": 0.5}))  # as a search does it
    start = Space.of(search, recipe, analysed).start
    assert start == {
        **{"weight.model0.attention": 0.7, "weight.model0.rest": 0.7},
        **{"weight.model1.attention": 0.3, "weight.model1.rest": 1.1},
        **{"weight.model2.attention": 1.0, "weight.model2.rest": 1.0},  # 9 lies without: the middle
        **{"lambda": 0.8, "density": 0.2, "variant": "released"},
    }
    notes = Space.of(search, recipe, analysed).notes
    assert notes == (
        "the recipe's weight.model2.rest, weight.model2.attention lies outside its range: the search starts in the middle",
    )
    own = dataclasses.replace(
        recipe, models=(dataclasses.replace(recipe.models[0], parameters={"density": 0.5}), *recipe.models[1:])
    )
    assert "the density of model0 is not used" in Space.of(search, own, analysed).notes[0]
    others = dataclasses.replace(search, weight=Range(0.0, 2.0, 0.6), variants=("paper", "pairwise"))
    space = Space.of(others, recipe, analysed)
    assert {v for k, v in space.start.items() if k.startswith("weight")} == {0.6}
    assert space.start["variant"] == "paper", "the recipe's is not among those searched"
    only = Space.of(dataclasses.replace(search, variants=("pairwise",)), recipe, analysed)
    assert only.recipe_of(only.candidate(only.start)).method.variant == "pairwise"


def test_all_that_is_wrong_is_said_at_once(family):
    found = problems_of(family(2).recipe(search={"evaluator": "x", "mode": "up", "budget": -1}))
    assert all(place in found for place in ("search.evaluator", "search.metric", "search.mode", "search.budget"))


@pytest.mark.parametrize("method", ["ties", "task_arithmetic"])
def test_density_and_variant_are_searched_for_pcb_only(family, method):
    found = problems_of(family(2).recipe(merge_method=method, search=VALID | {"space": {"density": {}, "variant": ["paper"]}}))
    assert "search.space.density" in found
    assert "search.space.variant" in found


def test_linear_is_refused_with_what_reaches_the_same_merges(family):
    assert "task_arithmetic" in problems_of(family(2).recipe(merge_method="linear", search=VALID))


@pytest.mark.parametrize(
    ("depends_on", "refused"),
    [("", True), (", parameters=('lambda',)", True), (", parameters=('lambda', 'keep')", True), (", parameters=()", False)],
)
def test_a_method_of_ones_own_whose_analysis_may_move_with_lambda_is_refused(family, depends_on, refused):
    """The thresholds serve all candidates: a merge by best_recipe.yaml would find others."""
    one = family(2)
    (one.folder / "own.py").write_text(
        "from pcb_ray.methods import Extrema, Method, Parameter, fraction, lambda_parameter\n"
        "parameters = {'lambda': lambda_parameter(), 'keep': Parameter(0.5, fraction, '')}\n"
        f"ends = Extrema('ends', lambda block, *_: block.tau, 'least', 'most'{depends_on})\n"
        "own = Method(name='own', merge=lambda block, *_: block.theta, linear=True, parameters=parameters, passes=(ends,))\n"
    )
    recipe = one.recipe(merge_method=f"{one.folder / 'own.py'}:own", search=VALID)
    if refused:
        assert "found that `ends` of" in problems_of(recipe)
        assert "Fix: name in its `parameters` those that it does depend on, () if none." in problems_of(recipe)
    else:
        Search.of(Recipe.from_dict(recipe), has_evaluator=False)


def test_a_method_of_ones_own_without_a_base_is_refused(family):
    one = family(2)
    (one.folder / "own.py").write_text(
        "from pcb_ray.methods import Method\nown = Method(name='own', merge=lambda *_: None, has_base=False, linear=True)\n"
    )
    found = problems_of(one.recipe(merge_method=f"{one.folder / 'own.py'}:own", search=VALID))
    assert "merge_method: wanted a method with a base" in found


@pytest.mark.parametrize(
    "parameters",
    [{"a": ("scale", (0.0, 1.0)), "b": ("scale", (0.0, 1.0))}, {"a": ("share", (0.1, 0.5))}],
)
def test_a_record_that_a_search_would_misread_is_refused(parameters):
    """Two scales, of which it would know one; a share of which there is no basis."""
    searched = {name: Parameter(1.0, number, "", searched=kind, range=within) for name, (kind, within) in parameters.items()}
    with pytest.raises(ValueError, match=r"own: wanted at most one .*found .*'a'.*"):
        Method(name="own", merge=lambda *_: None, parameters=searched, linear=True)


def test_no_section_says_what_one_looks_like(family):
    assert "search" in problems_of(family(2).recipe())
    assert "search" in problems_of(family(2).recipe(search=[1]))


def test_cma_needs_two_coefficients(family):
    search, made = searched(family(1))
    with pytest.raises(RequestError, match="at least two coefficients"):
        Space.of(search, made.recipe, made)
    assert Space.of(searched(family(1), optimizer="OnePlusOne")[0], made.recipe, made).start == {"weight.model0": 1.0}


# --- groups -----------------------------------------------------------------------------------------------------------------------


def test_groups_are_patterns_cut_along_the_layers(family):
    search, made = searched(family(2), space={"groups": {"attention": "*self_attn*", "mlp": ["*mlp*"], "layers": 2}})
    space = Space.of(search, made.recipe, made)
    of_name = {name: space.groups[g] for name, g in zip(space.names, space.group_of, strict=True)}
    assert of_name["model.layers.0.self_attn.q_proj.weight"] == "attention.layers0"
    assert of_name["model.layers.1.self_attn.q_proj.weight"] == "attention.layers1"
    assert of_name["model.layers.1.mlp.up_proj.weight"] == "mlp.layers1"
    assert of_name["model.layers.0.input_layernorm.weight"] == "layers0"
    assert of_name["lm_head.weight"] == "rest"
    assert len(space.bounds) == 2 * len(set(of_name.values()))


@pytest.mark.parametrize(
    ("groups", "complaint"),
    [
        ({"experts": "*experts*"}, r"groups.experts: wanted patterns of some .*found '.experts.'"),
        ({"all": "*", "mlp": "*mlp*"}, r"groups.mlp.*no group above it has taken"),
        ({"layers": 9}, r"groups.layers: wanted at most 2 parts, .*found 9. Fix: write 2 or less"),
    ],
)
def test_a_group_that_would_have_no_tensor_is_refused(family, groups, complaint):
    search, made = searched(family(2), space={"groups": groups})
    with pytest.raises(RequestError, match=complaint):
        Space.of(search, made.recipe, made)


def test_the_recipe_of_a_candidate_gives_each_tensor_its_weight(family):
    search, made = searched(
        family(2),
        space={"groups": {"attention": "*self_attn*", "layers": 2}, "lambda": {}, "density": {}, "variant": ["paper", "released"]},
    )
    space = Space.of(search, made.recipe, made)
    config = {name: 0.1 + 0.01 * k for k, name in enumerate(space.bounds)} | {"variant": "released"}
    candidate = space.candidate(config)
    recipe = space.recipe_of(candidate)
    assert recipe.parameters == {"lambda": config["lambda"], "density": config["density"], "variant": "released"}
    for name, weights in zip(space.names, space.lambdas(candidate), strict=True):
        assert tuple(recipe.weight(i, name) for i in range(2)) == weights
    assert Recipe.from_yaml(recipe.to_yaml()) == recipe
    assert recipe.search is None


parts = st.sampled_from(["a", "b", "ab", "layers", "0", "1", "10", "weight", "bias"])
tensor_names = st.lists(st.lists(parts, min_size=1, max_size=4).map(".".join), min_size=1, max_size=12, unique=True)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(names=tensor_names, data=st.data())
def test_filter_rules_give_any_names_any_weights(names, data):
    weights = [data.draw(st.sampled_from([0, 1, 2])) for _ in names]
    rules = _rules(names, weights)
    for name, weight in zip(names, weights, strict=True):
        assert next(value for part, value in rules if part is None or part in name) == weight


def test_rules_are_few_where_names_are_alike():
    names = [f"model.layers.{k}.{part}.weight" for k in range(30) for part in ("self_attn.q_proj", "self_attn.o_proj", "mlp.up")]
    assert len(_rules(names, ["self_attn" in name for name in names])) == 2
    # Whichever is most frequent: what matches no pattern is best told as the default.
    names += ["embed_tokens.weight", "norm.weight", "lm_head.weight"]
    rules = _rules(names, [1 if "self_attn" in name else 2 if "mlp" in name else 0 for name in names])
    assert len(rules) == 3
    assert rules[-1] == (None, 0)


def test_rules_of_a_large_mixture_of_experts_are_few():
    """19,000 tensors; found in seconds, since no stretch of a name is looked for in all names but those that are chosen."""
    names = [
        f"model.layers.{k}.mlp.experts.{e}.{part}_proj.weight"
        for k in range(25)
        for e in range(256)
        for part in ("gate", "up", "down")
    ]
    names += [f"model.layers.{k}.self_attn.{part}_proj.weight" for k in range(25) for part in "qkvo"] + ["lm_head.weight"]
    weights = [10 * (int(n.split(".")[2]) * 4 // 25) + ("self_attn" in n) if "layers" in n else 99 for n in names]
    rules = _rules(names, weights)
    assert len(rules) < 60
    for name, weight in zip(names[::97], weights[::97], strict=True):
        assert next(value for part, value in rules if part is None or part in name) == weight


def test_the_winner_of_a_large_search_is_a_recipe_that_can_be_read():
    """80 layers of a 70 B model, attention, mlp and the rest, in four parts; 16 experts."""
    parts = [f"self_attn.{p}_proj" for p in "qkvo"] + [f"mlp.{p}_proj" for p in ("gate", "up", "down")] + ["input_layernorm"]
    names = [f"model.layers.{k}.{part}.weight" for k in range(80) for part in parts] + [
        "model.embed_tokens.weight",
        "lm_head.weight",
    ]
    recipe = Recipe.from_dict({"base_model": "models/base", "models": [f"models/expert-{k}" for k in range(16)]})
    made = SimpleNamespace(tensors=[SimpleNamespace(name=name, part_of="", weights=(1.0,) * 16) for name in names])
    search = Search.of(
        Recipe.from_dict(
            {
                "base_model": "models/base",
                "models": ["m", "n"],
                "search": VALID | {"space": {"groups": {"attention": "*self_attn*", "mlp": "*mlp*", "layers": 4}}},
            }
        ),
        has_evaluator=False,
    )
    space = Space.of(search, recipe, made)
    assert len(space.bounds) == 13 * 16
    winner = space.recipe_of(space.candidate({name: 0.5 + 1 / (3 + k) for k, name in enumerate(space.bounds)}))
    text = winner.resolved().to_yaml()
    assert len(text) > 1 << 17
    assert Recipe.from_yaml(text) == winner.resolved()


def test_labels_are_as_short_as_tells_models_apart():
    assert _labels(["models/base", "models/code"]) == ("models_base", "models_code")
    assert _labels(["winner", "start"]) == ("0_winner", "1_start")
    assert _labels(["models/math", "models/code"]) == ("math", "code")
    assert _labels(["a/math", "b/math/"]) == ("a_math", "b_math")
    assert _labels(["org/name@main", "org/name2"]) == ("name", "name2")


def test_equal_configs_have_equal_keys():
    assert key_of({"b": 1.0, "a": 0.1}) == key_of({"a": 0.1, "b": 1.0})


@given(count=st.integers(2, 20), seed=st.integers(0, 9), lower=st.floats(-1.0, 0.9), upper=st.floats(1.1, 3.0))
@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_the_first_generation_is_a_latin_hypercube_of_uniform_coefficients_with_the_start_in_it(family, count, seed, lower, upper):
    asked = {
        "weight": {"lower": lower, "upper": upper},
        "lambda": {"lower": 0.5, "upper": 2.0},
        "density": {"lower": 0.02, "upper": 0.4},
        "groups": {"attention": "*self_attn*"},
        "variant": ["paper", "pairwise"],
    }
    search, made = searched(family(2), space=asked)
    space = Space.of(search, made.recipe, made)
    start, *others = space.first_generation(count, seed)
    assert start == space.start
    assert space.first_generation(count, seed) == [start, *others]
    for point in others:
        assert len({v for k, v in point.items() if k.startswith("weight.")}) == 1
        assert point.keys() == start.keys()
    bounds = {"weight.model0.attention": (lower, upper), "lambda": (0.5, 2.0), "density": (math.log(0.02), math.log(0.4))}
    for name, (least, most) in bounds.items():
        values = np.array([math.log(p[name]) if name == "density" else p[name] for p in (start, *others)])
        parts = ((values - least) / (most - least) * count).astype(int).clip(max=count - 1)
        assert np.array_equal(np.sort(parts), np.arange(count)), "one in each part"
    assert [p["variant"] for p in others] == [asked["variant"][k % 2] for k in range(count - 1)]


# --- the grid ---------------------------------------------------------------------------------------------------------------------


def test_a_grid_is_the_product_of_its_axes(family):
    recipe = Recipe.from_dict(family(2).recipe(sweep={"density": [0.1, 0.2], "lambda": [0.5, 1], "variant": ["paper"]}))
    points = grid_of(recipe)
    assert len(points) == 4
    assert points[0] == {"density": 0.1, "lambda": 0.5, "variant": "paper"}


@pytest.mark.parametrize(
    ("sweep", "complaint"),
    [
        (None, "sweep"),
        ({}, "sweep"),
        ({"density": [0.0]}, "sweep.density"),
        ({"lambdas": [1]}, "write `lambda`"),
        ({"variant": "x"}, "variant"),
        ({"density": []}, "sweep.density: wanted a list of values"),
        ({"variant": []}, "sweep.variant: wanted a list of values"),
    ],
)
def test_a_wrong_grid_is_refused(family, sweep, complaint):
    with pytest.raises(RequestError, match=complaint):
        grid_of(Recipe.from_dict(family(2).recipe(sweep=sweep)))


# --- what the optimizer is told ---------------------------------------------------------------------------------------------------


def asked(search: Search, made: Plan) -> Any:
    """A searcher, and its progress."""
    from pcb_ray.searching.tune import Generations, Ledger

    progress = Ledger(search.budget, search, lambda key, record: None, {}, base=math.inf, room=8, quiet=True)
    return Generations(search, Space.of(search, made.recipe, made), progress), progress


def score(asker: Any, progress: Any, scores: list[float]) -> list[dict[str, Any]]:
    """A whole generation: its configs."""
    names = [f"{len(progress.records)}+{k}" for k in range(len(scores))]
    configs = [asker.suggest(name) for name in names]
    for name, value in zip(names, scores, strict=True):
        result = {"metrics": {}, "objective": value, "error": "" if value == value else "failed"}
        asker.on_trial_result(name, result)
        progress.on_trial_result(0, [], SimpleNamespace(trial_id=name), result)
    return configs


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_logger_that_is_not_installed_or_not_reached_is_told(family, name, monkeypatch):
    from pcb_ray.searching import tune

    search, _ = searched(family(2), loggers=["tensorboard", name])
    with pytest.raises(RequestError, match=f"search.loggers: wanted {name}, found .*Fix: pip install"):
        tune.check_loggers(search)

    class Unreached(tune.tune.Callback):
        def setup(self, *_: object, **__: object) -> None:
            raise ConnectionError("http://127.0.0.1:9: refused")

    monkeypatch.setattr(tune, "_loggers", lambda _: [tune.tune.Callback(), Unreached()])
    with pytest.raises(
        RequestError, match=f"search.loggers.{name}: wanted its service, found ConnectionError: http://127.0.0.1:9: refused. Fix"
    ):
        tune.check_loggers(search)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize(
    ("name", "complaint"),
    [("CMAs", "Fix: write "), ("BayesOptimBO", "bayes_optim"), ("NelderMead", "does not support parallelization")],
)
def test_an_optimizer_that_cant_search_here_is_told_with_the_reason(family, name, complaint):
    from pcb_ray.searching import tune

    search, made = searched(family(2), optimizer=name)
    with pytest.raises(RequestError, match=f"search.optimizer.*{complaint}"):
        tune.check_optimizer(search, Space.of(search, made.recipe, made))
    for good in ("CMA", "DE", "PSO", "RandomSearch"):
        tune.check_optimizer(dataclasses.replace(search, optimizer=good), Space.of(search, made.recipe, made))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("scores", [[0.5] * 8, [0.5] * 7 + [0.6]])
def test_scores_that_never_change_are_told_after_a_generation(family, caplog, scores):
    """As where score() uses another module than the one that load() returned."""
    from pcb_ray.searching.tune import Generations, Ledger

    search, made = searched(family(2))
    progress = Ledger(search.budget, search, lambda key, record: None, {}, base=0.5, room=8, quiet=True)
    score(Generations(search, Space.of(search, made.recipe, made), progress), progress, scores)
    assert ("all candidates score as the base, 0.5" in caplog.text) == (scores[-1] == 0.5)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_grid_stops_when_more_than_a_quarter_fails_in_a_row(family):
    from pcb_ray.searching.tune import Ledger, Listed, Searcher

    search, _ = searched(family(2))
    points = [{"lambda": 0.1 * k} for k in range(20)]
    progress = Ledger(20, search, lambda key, record: None, {}, base=math.inf, room=8, quiet=True)
    asker = Listed(points, "max", progress)
    for k, value in enumerate([NAN, NAN, NAN, 0.5, NAN, NAN, NAN, NAN, NAN, NAN]):
        assert asker.suggest(str(k)) == points[k]
        asker.on_trial_result(str(k), {"objective": value})
        asker.on_trial_complete(str(k), None, error=True)  # its process died after it: told already
        progress.on_trial_result(
            0, [], SimpleNamespace(trial_id=str(k)), {"metrics": {}, "objective": value, "error": "no" * (value != value)}
        )
    assert asker.stopped
    assert asker.suggest("more") == Searcher.FINISHED


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("scores", [[0.1, 0.3, 0.9, NAN], [NAN, NAN, 0.0, 0.0], [NAN] * 4])
def test_nevergrad_begins_at_the_best_of_the_first_generation_or_at_the_start_if_all_of_it_failed(family, scores):
    space = {"density": {"lower": 0.02, "upper": 0.4}, "variant": ["paper", "released", "pairwise"]}
    search, made = searched(family(2), budget=40, population=4, space=space)
    asker, progress = asked(search, made)
    configs = score(asker, progress, scores)
    assert configs == Space.of(search, made.recipe, made).first_generation(4, search.seed)
    wanted = configs[max((k for k in range(4) if not math.isnan(scores[k])), key=lambda k: scores[k], default=0)]
    found = asker._nevergrad_opt.parametrization.value
    assert found["variant"] == wanted["variant"]
    assert {k: v for k, v in found.items() if k != "variant"} == pytest.approx({k: v for k, v in wanted.items() if k != "variant"})
    assert all(config not in configs for config in score(asker, progress, [0.5] * 4))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("space", [{}, {"groups": {"layers": 2, "attention": "*self_attn*"}}, {"variant": ["paper", "pairwise"]}])
def test_cma_begins_with_a_standard_deviation_of_10_percent_of_the_range(family, space):
    search, made = searched(family(5), budget=500, population=200, space=space)
    asker, progress = asked(search, made)
    progress.room = 500
    score(asker, progress, [1.0] * 200)
    drawn = [[v for k, v in config.items() if k != "variant"] for config in score(asker, progress, [0.5] * 200)]
    assert np.std(drawn) == pytest.approx(0.1 * 2.0, rel=0.08)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("population", [3, 4, 5, 8])
def test_cma_comes_nearer_generation_by_generation_also_in_small_ones(family, population):
    """And without a warning: what CMA asks comes back to it as it was."""
    search, made = searched(family(2), budget=40 * population, population=population)
    asker, progress = asked(search, made)
    progress.room = 40 * population
    for generation in range(40):
        names = [f"{generation}+{k}" for k in range(population)]
        distances = [sum((x - 1.7) ** 2 for x in asker.suggest(name).values()) for name in names]
        for name, distance in zip(names, distances, strict=True):
            asker.on_trial_result(name, {"objective": -distance})
            progress.on_trial_result(0, [], SimpleNamespace(trial_id=name), {"metrics": {}, "objective": -distance, "error": ""})
    assert min(distances) < 1e-3


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(("mode", "scores"), [("min", [None, 4.8, 5.1, 4.9]), ("max", [None, 0.7, None, 0.2])])
def test_a_trial_that_failed_is_told_as_the_worst_also_when_it_was_asked_first(family, monkeypatch, mode, scores):
    search, made = searched(family(2), mode=mode, budget=8, population=4)
    asker, progress = asked(search, made)
    score(asker, progress, [5.0] * 4)
    told: list[float] = []
    monkeypatch.setattr(asker._nevergrad_opt, "tell", lambda candidate, loss: told.append(loss))
    for k in range(4):
        asker.suggest(str(k))
    for k in (2, 0, 3, 1):
        asker.on_trial_result(str(k), {"objective": float("nan") if scores[k] is None else scores[k]})
    asker.on_trial_complete("2", {"objective": scores[2]})  # when the process goes to another trial: nothing is told twice
    signed = [None if x is None else x if mode == "min" else -x for x in scores]
    worst = max(x for x in signed if x is not None)
    assert told == [worst if x is None else x for x in signed]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_candidate_of_a_trial_process_that_died_goes_to_another_unless_it_was_at_work_twice(family, monkeypatch):
    search, made = searched(family(2), budget=6, population=3)
    asker, progress = asked(search, made)
    score(asker, progress, [1.0] * 3)
    told: list[float] = []
    monkeypatch.setattr(asker._nevergrad_opt, "tell", lambda candidate, loss: told.append(loss))

    def trial(name: str) -> SimpleNamespace:
        return SimpleNamespace(trial_id=name, error_file=None)

    def dies(name: str, *, at_work: bool) -> None:
        if at_work:
            progress.on_trial_start(0, [], trial(name))
        asker.on_trial_complete(name, None, error=True)
        progress.on_trial_error(0, [], trial(name))

    first, *others = asker.suggest("a"), asker.suggest("b"), asker.suggest("c")
    assert asker.suggest("none") is None
    for k in range(4):  # four processes that had died while they were idle
        dies("a" if k == 0 else f"a{k - 1}", at_work=False)
        assert asker.suggest(f"a{k}") == first
    dies("a3", at_work=True)
    assert asker.suggest("again") == first
    for name, value in (("b", 0.5), ("c", 0.6)):
        asker.on_trial_result(name, {"objective": value})
        progress.on_trial_result(0, [], trial(name), {"metrics": {}, "objective": value, "error": ""})
    assert told == []
    dies("again", at_work=True)
    assert told == [-0.5, -0.5, -0.6]
    assert progress.is_over
    assert [progress.records[k]["config"] for k in (3, 4, 5)] == [first, *others]
    assert "died" in progress.records[3]["error"]


# --- Ctrl-C -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_interrupt_waits_for_a_safe_place_and_the_second_does_not(family, number: signal.Signals) -> None:
    """Raised anywhere, it was dropped by a destructor, or left the lock of a logger's queue taken, and the process hung at its
    end."""
    from pcb_ray.searching.tune import StayingTrials, _noted

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    asker, ledger = asked(*searched(family(2)))
    before = signal.signal(number, interrupt)
    reached: list[str] = []
    try:
        with pytest.raises(KeyboardInterrupt), _noted(ledger):
            signal.raise_signal(number)
            reached.append("after the first")
            StayingTrials(asker, ledger).choose_trial_to_run(None)
            reached.append("after a look for a trial")
        assert (reached, signal.getsignal(number)) == (["after the first"], interrupt)
        with pytest.raises(KeyboardInterrupt), _noted(ledger):
            pass  # also where Tune was at its end
        ledger.interrupted = False
        with pytest.raises(KeyboardInterrupt), _noted(ledger):
            signal.raise_signal(number)
            signal.raise_signal(number)
            reached.append("after the second")
        assert reached == ["after the first"]
    finally:
        signal.signal(number, before)
