"""What a search is to do: the `search:` and `sweep:` sections of a recipe, checked, and the coefficients that they open."""

from __future__ import annotations

import dataclasses
import fnmatch
import heapq
import itertools
import json
import math
import re
import statistics
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

from pcb_ray.checks import choice, number, section, shown, size_of, text, whole, wrong
from pcb_ray.errors import RequestError
from pcb_ray.methods import METHODS, Method, variants_of
from pcb_ray.planning import Plan
from pcb_ray.recipe import Recipe

BUILT_IN = ("causal_lm", "classification", "lm_eval", "command")
LOGGERS = ("tensorboard", "wandb", "mlflow")
SMALLEST_POPULATION = 3  # that CMA-ES works with
REST = "rest"  # the group of what no pattern matches
RESERVED = {"base", "start", "winner"}  # names of the report, beside those of the models
DEFAULTS_TRIED = 4  # groups that may be the default of a recipe's rules
LONGEST_S = 1e8  # three years
LEAST_SHARE = 1e-4  # of a CPU or GPU that Ray tells from none

_KEYS = (
    "evaluator",
    "split",
    "metric",
    "mode",
    "space",
    "optimizer",
    "budget",
    "population",
    "concurrency",
    "resources_per_trial",
    "seed",
    "trial_timeout",
    "loggers",
)
_SECRETS = {"api_key": "WANDB_API_KEY", "tracking_token": "MLFLOW_TRACKING_TOKEN"}

Config = Mapping[str, Any]
"""The coefficients of one candidate by name, as Tune and Nevergrad see them."""


@dataclass(frozen=True)
class Bounds:
    lower: float
    upper: float
    init: float
    is_log: bool = False
    """Whether it is the logarithm that is searched evenly, as that of a share is."""


@dataclass(frozen=True)
class Range:
    """Bounds as they are asked for."""

    lower: float
    upper: float
    init: float | None = None
    """None stands for what the recipe says, if it lies within, or else for the middle."""

    def bounds(self, of_recipe: float = math.nan, *, is_log: bool = False) -> Bounds:
        middle = of_recipe if self.lower <= of_recipe <= self.upper else (self.lower + self.upper) / 2
        return Bounds(self.lower, self.upper, middle if self.init is None else self.init, is_log)


@dataclass(frozen=True)
class Candidate:
    """One point of the space."""

    lambdas: tuple[tuple[float, ...], ...] | None
    """lambda_i by group, then model; None stands for the recipe's."""
    lambda_: float
    """What multiplies the change of the base; 1 for a method without such a parameter."""
    density: float | None
    """The share that is kept of all models; None stands for the recipe's."""
    variant: str | None
    """None stands for the recipe's."""


@dataclass(frozen=True)
class Search:
    """A valid `search:` section. Raises RequestError with all that is wrong with one that is not."""

    evaluator: str
    """A built-in name, `module:object` or `file.py:object`; empty: an object that Python code gave."""
    options: Mapping[str, Any]
    metric: str
    mode: str
    search_split: str = "val"
    report_split: str = "test"
    weight: Range = Range(0.0, 2.0)
    groups: tuple[tuple[str, tuple[str, ...]], ...] = ()
    """(name, patterns of tensor names); the first that matches wins."""
    layers: int = 1
    """Parts into which the stack of layers is cut, each with coefficients of its own."""
    parameters: Mapping[str, Range] = dataclasses.field(default_factory=dict)
    """Those of the method's parameters that are searched, by name."""
    scale: str = ""
    """The name of the method's parameter that multiplies the change of the base; empty if it has none."""
    share: str = ""
    """The name of the one that says how much is kept."""
    variants: tuple[str, ...] = ()
    optimizer: str = "CMA"
    budget: int = 100
    population: int = 8
    concurrency: int | None = None
    """How many trials run at a time; None stands for as many as the cluster holds."""
    cpu: float = 1.0
    gpu: float = 0.0
    memory: int | None = None
    """The bytes that a trial is given; None stands for the model's in float32 where it is on a CPU."""
    seed: int = 0
    trial_timeout_s: float | None = None
    loggers: tuple[tuple[str, Mapping[str, Any]], ...] = ()

    @classmethod
    def of(cls, recipe: Recipe, *, has_evaluator: bool) -> Search:
        """The recipe's `search:` section; with `has_evaluator` it need not name one."""
        if recipe.search is None:
            fix = "add `search: {evaluator: ..., metric: ..., budget: 100}`; see pcb-ray search --help"
            raise RequestError(wrong("search", "what to search, and by which score", None, fix))
        problems: list[str] = []
        top = section(recipe.search, "search", _KEYS, problems)
        evaluator, options = _evaluator(top.get("evaluator"), has_evaluator, problems)
        split = section(top.get("split", {}), "search.split", ("search", "report"), problems)
        method = recipe.method
        searched = searchable(method)
        known = ("weight", "groups", *dict.fromkeys((*searched, *_SEARCHED_ANYWHERE)))
        space = section(top.get("space", {}), "search.space", known, problems)
        _check_searched(space, "search.space", method, problems)
        weight = section(space.get("weight", {}), "search.space.weight", ("lower", "upper", "init", "groups"), problems)
        groups, layers = _groups(weight.pop("groups", space.get("groups", {})), problems)
        resources = section(top.get("resources_per_trial", {}), "search.resources_per_trial", ("cpu", "gpu", "memory"), problems)
        metric = (
            text(top.get("metric"), "search.metric", problems) if "metric" in top else _DEFAULT_METRIC.get(evaluator, ("", ""))[0]
        )
        if not metric:
            problems.append(wrong("search.metric", "a key of what the evaluator returns", None, "name it: `metric: accuracy`"))
        budget = whole(top.get("budget", cls.budget), "search.budget", SMALLEST_POPULATION, problems)
        population = whole(top.get("population", min(cls.population, budget)), "search.population", SMALLEST_POPULATION, problems)
        concurrency = top.get("concurrency", "auto")
        found = cls(
            evaluator=evaluator,
            options=options,
            metric=metric,
            mode=choice(top.get("mode", _DEFAULT_METRIC.get(evaluator, ("", "max"))[1]), "search.mode", ("max", "min"), problems),
            search_split=text(split.get("search", cls.search_split), "search.split.search", problems),
            report_split=text(split.get("report", cls.report_split), "search.split.report", problems),
            weight=_bounds(weight, "search.space.weight", problems, cls.weight),
            groups=groups,
            layers=layers,
            parameters={
                name: _searched(space[name], f"search.space.{name}", method, name, problems) for name in searched if name in space
            },
            scale=method.scale,
            share=method.share,
            variants=_variants(space.get("variant", ()), "search.space.variant", method, problems),
            optimizer=text(top.get("optimizer", cls.optimizer), "search.optimizer", problems),
            budget=budget,
            population=population,
            concurrency=None if concurrency == "auto" else whole(concurrency, "search.concurrency", 1, problems),
            cpu=_share(resources.get("cpu", cls.cpu), "search.resources_per_trial.cpu", problems),
            gpu=_share(resources.get("gpu", cls.gpu), "search.resources_per_trial.gpu", problems),
            memory=_size(resources.get("memory"), "search.resources_per_trial.memory", problems),
            seed=whole(top.get("seed", cls.seed), "search.seed", 0, problems, most=2**32 - 1),
            trial_timeout_s=None if "trial_timeout" not in top else number(top["trial_timeout"], "search.trial_timeout", problems),
            loggers=_loggers(top.get("loggers", ()), problems),
        )
        if not found.cpu and not found.gpu:
            problems.append("search.resources_per_trial: wanted a CPU or a GPU, found neither. Fix: ask for one at least.")
        if found.trial_timeout_s is not None and not 0 < found.trial_timeout_s <= LONGEST_S:
            wanted = f"seconds above 0 and up to {LONGEST_S:g}"
            problems.append(wrong("search.trial_timeout", wanted, top["trial_timeout"], "remove it, or write one such as 600"))
        problems += [
            wrong("search.space.groups", "names without a `/`", name, "rename the group") for name, _ in found.groups if "/" in name
        ]
        if budget < population:
            problems.append(
                f"search.budget: wanted at least one generation, a population of {population}, found {budget}. "
                "Fix: ask for one generation or several."
            )
        if not is_searched(method):
            able = ", ".join(dict.fromkeys(m.name for m in METHODS if is_searched(m)))
            problems.append(
                f"merge_method: wanted a method with a base that says it is linear in the weights, found {recipe.merge_method}. "
                f"Fix: use one of {able}, or, if your own is linear, set `linear=True` in its record."
            )
        if moved := method.moved_by_scale:
            problems.append(
                f"merge_method: wanted passes whose results serve every {method.scale}, found that `{', '.join(moved)}` of "
                f"{recipe.merge_method} may depend on it. Fix: name in its `parameters` those that it does depend on, () if none."
            )
        if problems:
            raise RequestError(problems)
        return found

    @property
    def splits(self) -> dict[str, str]:
        """Those that are scored, by their place in the recipe; a sweep has no report."""
        named = {"search.split.search": self.search_split, "search.split.report": self.report_split}
        return {place: split for place, split in named.items() if split}

    @property
    def amounts(self) -> dict[str, float]:
        """What a trial takes of its node, by Ray's names."""
        asked = {"CPU": self.cpu, "GPU": self.gpu, "memory": self.memory or 0}
        return {name: amount for name, amount in asked.items() if amount}

    @property
    def scored(self) -> bool:
        """Whether candidates differ in the share that is kept."""
        return self.share in self.parameters

    @property
    def better(self) -> float:
        """The sign that makes a score one to maximise."""
        return 1.0 if self.mode == "max" else -1.0


def is_searched(method: Method) -> bool:
    """Whether a search can vary the weights without reading a model again."""
    return method.linear and method.has_base


def searchable(method: Method) -> tuple[str, ...]:
    """The parameters that a search can vary without reading a model again."""
    return tuple(name for name, parameter in method.parameters.items() if parameter.searched)


_SEARCHED_ANYWHERE = tuple(dict.fromkeys(name for method in METHODS for name in (*searchable(method), "variant")))


def _check_searched(asked: Mapping[str, Any], where: str, method: Method, problems: list[str]) -> None:
    """Complain of keys that a search of another method has, and one of this method has not."""
    able = _able(method)
    problems += [
        f"{where}.{name}: wanted what a search of {method.name} can vary ({', '.join(able) or 'its weights alone'}), "
        f"found what {', '.join(dict.fromkeys(m.name for m in METHODS if name in _able(m)))} has. Fix: remove it."
        for name in asked
        if name in _SEARCHED_ANYWHERE and name not in able
    ]


def _able(method: Method) -> tuple[str, ...]:
    """What a search of the method can vary beside the weights."""
    return (*searchable(method), *(["variant"] if method.variant else []))


_DEFAULT_METRIC = {"causal_lm": ("loss", "min"), "classification": ("accuracy", "max")}


def _evaluator(raw: object, has_evaluator: bool, problems: list[str]) -> tuple[str, Mapping[str, Any]]:
    options: Mapping[str, Any] = {}
    if raw is None and has_evaluator:
        return "", options
    if isinstance(raw, Mapping) and len(raw) == 1:
        ((raw, given),) = raw.items()
        if isinstance(given, Mapping):
            options = given
        elif given is not None:
            problems.append(wrong(f"search.evaluator.{raw}", "`option: value` lines", given, "write its options below its name"))
    if not (isinstance(raw, str) and (raw in BUILT_IN or re.fullmatch(r"(?:[a-z0-9]+://)?[^:]+:[A-Za-z_][\w.]*", raw))):
        wanted = f"{' | '.join(BUILT_IN)}, file.py:object or module:object"
        problems.append(
            wrong("search.evaluator", wanted, raw, "name one, with its options below: `causal_lm: {data: {val: val.txt}}`")
        )
        return "", options
    return raw, options


def _amount(raw: object, where: str, problems: list[str]) -> float:
    value = number(raw, where, problems)
    if value < 0:
        problems.append(wrong(where, "a number that is not negative", raw, "write one such as 1"))
    return value


def _share(raw: object, where: str, problems: list[str]) -> float:
    """A share of CPUs or GPUs, as Ray knows it."""
    value = _amount(raw, where, problems)
    if 0 < value < LEAST_SHARE:
        problems.append(wrong(where, f"0, or at least {LEAST_SHARE}", raw, "write one such as 1 or 0.5"))
    if value > 1 and value != int(value):
        problems.append(wrong(where, "a whole number where it is above 1, as Ray does", raw, f"write {math.ceil(value)}"))
    return value


def _size(raw: object, where: str, problems: list[str]) -> int | None:
    value = None if raw is None else size_of(raw)
    if raw is not None and value is None:
        problems.append(wrong(where, "a size", raw, "write one such as 16GB"))
    return value


def _bounds(raw: Mapping[str, Any], where: str, problems: list[str], default: Range, *, is_fraction: bool = False) -> Range:
    def value(key: str) -> float:
        return number(raw.get(key, getattr(default, key)), f"{where}.{key}", problems, is_fraction=is_fraction)

    before = len(problems)
    found = Range(value("lower"), value("upper"), value("init") if "init" in raw else None)
    init = found.bounds().init
    if len(problems) == before and not (found.lower <= init <= found.upper and found.lower < found.upper):
        values = f"lower {found.lower:g}, init {init:g}, upper {found.upper:g}"
        problems.append(
            f"{where}: wanted lower <= init <= upper, and lower < upper, found {values}. Fix: widen the bounds or move init."
        )
    return found


def _searched(raw: object, where: str, method: Method, name: str, problems: list[str]) -> Range:
    """The range of one of the method's parameters."""
    parameter = method.parameters[name]
    bounds = section(raw, where, ("lower", "upper", "init"), problems)
    return _bounds(bounds, where, problems, Range(*parameter.range), is_fraction=parameter.searched == "share")


def _groups(raw: object, problems: list[str]) -> tuple[tuple[tuple[str, tuple[str, ...]], ...], int]:
    where = "search.space.groups"
    if not isinstance(raw, Mapping):
        fix = 'write {attention: "*self_attn*", mlp: "*mlp*", layers: 4}'
        problems.append(wrong(where, "`name: pattern` lines", raw, fix))
        return (), 1
    groups, layers = [], 1
    for name, patterns in raw.items():
        if name == "layers":
            layers = whole(patterns, f"{where}.layers", 1, problems)
            continue
        listed = patterns if isinstance(patterns, list | tuple) else [patterns]
        if name == REST:
            problems.append(
                f"{where}: wanted names of your own, found `{REST}`, the group of all that no pattern matches. Fix: rename it."
            )
        groups.append((text(name, where, problems), tuple(text(p, f"{where}.{name}", problems) for p in listed)))
    return tuple(groups), layers


def _variants(raw: object, where: str, method: Method, problems: list[str]) -> tuple[str, ...]:
    listed = raw if isinstance(raw, list | tuple) else [raw]
    return tuple(dict.fromkeys(choice(v, where, tuple(variants_of(method.name)), problems) for v in listed))


def _loggers(raw: object, problems: list[str]) -> tuple[tuple[str, Mapping[str, Any]], ...]:
    """`loggers: [tensorboard, {wandb: {project: merges}}]`."""
    found = []
    for one in raw if isinstance(raw, list | tuple) else [raw]:
        name, options = next(iter(one.items())) if isinstance(one, Mapping) and len(one) == 1 else (one, {})
        options = options if isinstance(options, Mapping) else {}
        problems += [
            f"search.loggers.{name}.{key}: wanted no secret here, found one, which would be kept with the output. "
            f"Fix: set {variable} in the environment."
            for key, variable in _SECRETS.items()
            if key in options
        ]
        found.append((choice(name, "search.loggers", LOGGERS, problems), options))
    return tuple(found)


# --- the space --------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Space:
    """The coefficients by name, and what a value of each means for each tensor of the plan."""

    recipe: Recipe
    bounds: Mapping[str, Bounds]
    """The bounds of the numbers: `weight.MODEL[.GROUP]`, and the method's parameters that are searched."""
    variants: tuple[str, ...]
    """The values of `variant`, where there is a choice."""
    labels: tuple[str, ...]
    """A short name for each model."""
    groups: tuple[str, ...]
    group_of: tuple[int, ...]
    """The group of each of the plan's tensors."""
    names: tuple[str, ...]
    """Of these, as the base has them."""
    weights: tuple[tuple[float, ...], ...]
    """The recipe's own lambda_i of each."""
    scale: str
    share: str
    """Names of the method's parameters; see `Search`."""
    notes: tuple[str, ...] = ()
    """What of the recipe does not show in the start."""

    @classmethod
    def of(cls, search: Search, recipe: Recipe, plan: Plan) -> Space:
        """Raises RequestError for patterns that match nothing, and for a space that the optimizer can't search."""
        names = tuple(t.part_of or t.name for t in plan.tensors)
        labels = _labels([m.source for m in recipe.models])
        group_names = _group_names(search, names)
        groups = tuple(dict.fromkeys(group_names))
        matched = {_group(search, name) for name in names}
        problems = [
            f"search.space.groups.{name}: wanted patterns of some of the {len(names)} merged tensors, such as {names[0]}, that no "
            f"group above it has taken, found {shown(', '.join(patterns))}. "
            "Fix: write patterns like *self_attn*; the first that matches wins."
            for name, patterns in search.groups
            if name not in matched
        ]
        if search.layers > (stack := _stack(names)):
            problems.append(
                f"search.space.groups.layers: wanted at most {stack} parts, one for each layer, found {search.layers}. "
                f"Fix: write {stack} or less."
            )
        if recipe.lambda_by_tensor:
            problems.append(
                "parameters.lambda: wanted one number in a recipe that is searched, found one by tensor. Fix: write one number; "
                "`space.groups` gives groups of tensors weights of their own."
            )
        notes = [
            f"the {name} of {label} is not used: one is searched for all models"
            for label, model in zip(labels, recipe.models, strict=True)
            for name in search.parameters
            if name in model.parameters
        ]
        bounds: dict[str, Bounds] = {}
        outside: list[str] = []

        def search_for(name: str, within: Range, of_recipe: float) -> None:
            bounds[name] = within.bounds(of_recipe, is_log=name == search.share)
            if within.init is None and not within.lower <= of_recipe <= within.upper:
                outside.append(name)

        for i, label in enumerate(labels):
            of_group: dict[str, list[float]] = {group: [] for group in groups}
            for tensor, group in zip(plan.tensors, group_names, strict=True):
                of_group[group].append(tensor.weights[i])
            for group, weights in of_group.items():
                mean = weights[0] if len(set(weights)) == 1 else statistics.fmean(weights)
                search_for(weight_name(label, group, groups), search.weight, mean)
        for name, within in search.parameters.items():
            search_for(name, within, recipe.parameters[name])
        if outside:
            notes.append(f"the recipe's {', '.join(outside)} lies outside its range: the search starts in the middle")
        if search.variants and recipe.parameters["variant"] not in search.variants:
            recipe = recipe.with_parameters({"variant": search.variants[0]})
        variants = search.variants if len(search.variants) > 1 else ()
        if len(bounds) + bool(variants) < 2 and search.optimizer == "CMA":
            problems.append(
                f"search.space: wanted at least two coefficients for CMA, found one. Fix: add `{search.scale or 'groups'}`, or use "
                "`optimizer: OnePlusOne`."
            )
        if problems:
            raise RequestError(problems)
        return cls(
            recipe=recipe,
            bounds=bounds,
            variants=variants,
            labels=labels,
            groups=groups,
            group_of=tuple(groups.index(g) for g in group_names),
            names=names,
            weights=tuple(tensor.weights for tensor in plan.tensors),
            scale=search.scale,
            share=search.share,
            notes=tuple(notes),
        )

    @property
    def start(self) -> dict[str, Any]:
        """The candidate that the search begins with."""
        return {name: b.init for name, b in self.bounds.items()} | (
            {"variant": self.recipe.parameters["variant"]} if self.variants else {}
        )

    def first_generation(self, count: int, seed: int) -> list[dict[str, Any]]:
        """The start, and with it a Latin hypercube over what acts on all tensors alike: one lambda_i for all models and groups,
        lambda, and the logarithm of a share. The variants take turns."""
        random = Random(seed)
        values: dict[str, list[float]] = {}
        for name, b in self.bounds.items():
            to, back = (math.log, math.exp) if b.is_log else (float, float)
            low, width = to(b.lower), (to(b.upper) - to(b.lower)) / count
            of_start = min(int((to(b.init) - low) / width), count - 1)
            values[_axis(name)] = [back(low + (k + 0.5) * width) for k in range(count) if k != of_start]
        for of_axis in values.values():
            random.shuffle(of_axis)
        others = [{name: values[_axis(name)][k] for name in self.bounds} for k in range(count - 1)]
        turns = [{"variant": self.variants[k % len(self.variants)]} if self.variants else {} for k in range(count - 1)]
        return [self.start, *(point | turn for point, turn in zip(others, turns, strict=True))]

    def candidate(self, config: Config) -> Candidate:
        """The point that a config describes; what it does not name is the recipe's."""
        weights = any(name.startswith("weight.") for name in config)

        def of_models(group: str) -> tuple[float, ...]:
            return tuple(float(config[weight_name(label, group, self.groups)]) for label in self.labels)

        return Candidate(
            lambdas=tuple(map(of_models, self.groups)) if weights else None,
            lambda_=float(config.get(self.scale, self.recipe.parameters.get(self.scale, 1.0))),
            density=config.get(self.share),
            variant=config.get("variant"),
        )

    def lambdas(self, candidate: Candidate) -> list[tuple[float, ...]]:
        """lambda_i of each tensor of the plan."""
        if candidate.lambdas is None:
            return list(self.weights)
        return [candidate.lambdas[g] for g in self.group_of]

    def recipe_of(self, candidate: Candidate) -> Recipe:
        """An ordinary recipe of the candidate, with `filter` rules where the groups differ."""
        rules = [] if candidate.lambdas is None else _rules(self.names, self.group_of)
        models = self.recipe.models
        if candidate.lambdas is not None:
            models = tuple(
                dataclasses.replace(model, weight=tuple((part, candidate.lambdas[group][i]) for part, group in rules))
                for i, model in enumerate(models)
            )
        changes: dict[str, Any] = {self.scale: candidate.lambda_} if self.scale else {}
        if candidate.density is not None:
            changes[self.share] = candidate.density
        if candidate.variant is not None:
            changes["variant"] = candidate.variant
        recipe = dataclasses.replace(self.recipe, models=models, search=None, sweep=None, notes=())
        return recipe.with_parameters(changes)


def weight_name(label: str, group: str, groups: Sequence[str]) -> str:
    """The name of the coefficient of a model in a group; where there is but one, it goes without saying."""
    return f"weight.{label}.{group}" if len(groups) > 1 else f"weight.{label}"


def share_of(bounds: Bounds, value: float) -> float:
    """Where a value lies between its bounds, from 0 to 1, as it is searched."""
    to = math.log if bounds.is_log else float
    return (to(value) - to(bounds.lower)) / (to(bounds.upper) - to(bounds.lower))


def _axis(name: str) -> str:
    """What a coefficient varies with when all models and groups are treated alike."""
    return name.split(".")[0]


def _labels(sources: Sequence[str]) -> tuple[str, ...]:
    """The last part of each source, or as many parts as tell them apart, and from the other rows of a report."""
    parts = [re.sub(r"\.safetensors$", "", s.rstrip("/").split("@")[0]).split("/") for s in sources]
    for count in range(1, max(map(len, parts)) + 1):
        labels = ["_".join(p[-count:]) for p in parts]
        if len(set(labels)) == len(labels) and RESERVED.isdisjoint(labels):
            return tuple(labels)
    return tuple(f"{i}_{p[-1]}" for i, p in enumerate(parts))


def _layer(name: str) -> int | None:
    """The number of the layer that a tensor belongs to: the first number among the parts of its name."""
    return next((int(part) for part in name.split(".") if part.isdecimal()), None)


def _stack(names: Sequence[str]) -> int:
    """How many layers the model has."""
    return 1 + max((k for k in map(_layer, names) if k is not None), default=0)


def _group(search: Search, name: str) -> str:
    """The first group with a pattern that matches a tensor."""
    return next((g for g, patterns in search.groups if any(fnmatch.fnmatchcase(name, p) for p in patterns)), REST)


def _group_names(search: Search, names: Sequence[str]) -> list[str]:
    """The group of each tensor; within that, the part of the stack of layers."""
    stack, result = _stack(names), []
    for name in names:
        group, layer = _group(search, name), _layer(name)
        if search.layers > 1 and layer is not None:
            part = layer * search.layers // stack
            group = f"layers{part}" if group == REST else f"{group}.layers{part}"
        result.append(group)
    return result


def _rules(names: Sequence[str], groups: Sequence[int]) -> list[tuple[str | None, int]]:
    """(filter, group): the first filter that is part of a name tells its group; the last is None. As few as are easily found."""
    of_name = dict(zip(names, groups, strict=True))
    # Stretches of whole parts of names, and the names that have them: a mixture of experts has 20,000 names and as many stretches,
    # so that to look for each of them in each name would take minutes.
    having: dict[str, list[str]] = {}
    for name in names:
        for stretch in _stretches(name):
            having.setdefault(stretch, []).append(name)
    useful = {stretch: hit for stretch, hit in having.items() if len({of_name[name] for name in hit}) == 1}
    frequent = [group for group, _ in Counter(groups).most_common(DEFAULTS_TRIED)]
    return min((_rules_but_for(default, of_name, useful) for default in frequent), key=len)


def _rules_but_for(default: int, of_name: Mapping[str, int], useful: Mapping[str, Sequence[str]]) -> list[tuple[str | None, int]]:
    """Rules for what is not in the default group, each of a stretch that serves many names, all of one group."""
    names = list(of_name)
    left = {name for name in names if of_name[name] != default}
    queue = [(-len(hit), len(stretch), stretch) for stretch, hit in useful.items() if of_name[hit[0]] != default]
    heapq.heapify(queue)
    rules: list[tuple[str | None, int]] = []
    while queue and left:  # the one that serves most names next; of these the shortest
        served, length, stretch = heapq.heappop(queue)
        still = -len(left.intersection(useful[stretch]))
        if served != still:  # others have taken some of its names
            if still:
                heapq.heappush(queue, (still, length, stretch))
            continue
        hit = [name for name in names if stretch in name]  # `1.mlp.` is in `11.mlp.` too
        if len({of_name[name] for name in hit}) == 1:
            rules.append((stretch, of_name[hit[0]]))
            left.difference_update(hit)
    # Names that are part of other names: whole, longest first, before all others.
    hiding = [name for name in names if any(other in name for other in left)]
    return [*((name, of_name[name]) for name in sorted(hiding, key=len, reverse=True)), *rules, (None, default)]


def _stretches(name: str) -> Iterator[str]:
    pieces = name.split(".")
    for start, stop in itertools.combinations(range(len(pieces) + 1), 2):
        yield ".".join(pieces[start:stop]) + ("." if stop < len(pieces) else "")


# --- the grid ---------------------------------------------------------------------------------------------------------------------


def grid_of(recipe: Recipe) -> list[dict[str, Any]]:
    """The points of the recipe's `sweep:` section, in order. Raises RequestError."""
    if recipe.sweep is None:
        fix = "add `sweep: {density: [0.05, 0.1, 0.2], lambda: [0.8, 1.0, 1.2]}`"
        raise RequestError(wrong("sweep", "lists of values", None, fix))
    problems: list[str] = []
    axes: dict[str, tuple[Any, ...]] = {}
    method = recipe.method
    asked = section(recipe.sweep, "sweep", tuple(dict.fromkeys((*_able(method), *_SEARCHED_ANYWHERE))), problems)
    _check_searched(asked, "sweep", method, problems)
    for name, values in asked.items():
        if name not in _able(method):
            continue
        listed = values if isinstance(values, list | tuple) else [values]
        if not listed:
            problems.append(wrong(f"sweep.{name}", "a list of values", listed, "give one at least, or remove the line"))
        if name == "variant":
            axes[name] = _variants(listed, "sweep.variant", method, problems)
        else:
            is_fraction = method.parameters[name].searched == "share"
            axes[name] = tuple(dict.fromkeys(number(v, f"sweep.{name}", problems, is_fraction=is_fraction) for v in listed))
    if not axes and not problems:
        problems.append(wrong("sweep", "lists of values", recipe.sweep, f"give some of {', '.join(_able(method))}"))
    if problems:
        raise RequestError(problems)
    return [dict(zip(axes, point, strict=True)) for point in itertools.product(*axes.values())]


def key_of(config: Config) -> str:
    """A config as text: equal configs have equal keys."""
    return json.dumps(dict(config), sort_keys=True)
