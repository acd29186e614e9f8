"""The `grid:` of a recipe: several recipes in one, which differ in the method or its parameters."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pcb_ray import methods
from pcb_ray.checks import nearest, shown, wrong
from pcb_ray.errors import RequestError
from pcb_ray.methods.method import SHARED_PARAMETERS
from pcb_ray.recipe import Read, Recipe, read_file
from pcb_ray.user_code import names_code

GRID, METHOD, VARIANT = "grid", "method", "variant"
MAX_POINTS = 500
"""And so many merges of one job: each holds a lock, which is an open file."""
_PARAMETERS = tuple(dict.fromkeys(name for method in methods.METHODS for name in method.parameters))

Point = Mapping[str, Any]
"""Values by the keys of a grid."""


def points_of(
    recipe: Recipe | Mapping[str, Any] | str | os.PathLike[str], *, allow_code: bool = False
) -> dict[str, Recipe | RequestError]:
    """The recipe of each point of a recipe's grid, or what is wrong with it, by `key=value,...` in the order of the keys. A recipe
    without a grid is its only point, and has an empty name.

    A value of the grid counts for all models, whatever they have for themselves. A method is combined with those values only that
    it knows. Raises RequestError if the recipe can't be read, or the grid is none."""
    if isinstance(recipe, Recipe):
        return {"": recipe}
    read = Read(recipe, Path.cwd()) if isinstance(recipe, Mapping) else read_file(recipe, allow_code=allow_code)
    mapping, folder, prefix = read
    allow_code = allow_code or isinstance(recipe, Mapping)  # the caller's own
    if not isinstance(mapping, Mapping) or mapping.get(GRID) is None:
        return {"": Recipe.from_dict(mapping, folder, allow_code=allow_code, prefix=prefix)}
    named = mapping.get("merge_method", Recipe.merge_method)
    axes = _axes(mapping[GRID], named)
    found: dict[str, Recipe | RequestError] = {}
    for point in _points(axes, named):
        name = ",".join(f"{key}={_text(value)}" for key, value in sorted(point.items()))
        try:
            found[name] = Recipe.from_dict(_at(mapping, point), folder, allow_code=allow_code, prefix=prefix)
        except RequestError as error:
            found[name] = error
    return found


def _axes(raw: object, named: Any) -> dict[str, list[Any]]:
    """The values of each key, which are of different names. Raises RequestError."""
    if not isinstance(raw, Mapping) or not raw:
        raise RequestError(wrong(GRID, "keys with lists of values", raw, "write such as `grid: {lambda: [0.5, 1.0]}`"))
    problems, axes = [], dict[str, list[Any]]()
    known = (METHOD, VARIANT, *_PARAMETERS)
    asked = raw.get(METHOD)
    has_own = any(map(names_code, asked if isinstance(asked, list | tuple) else [named]))  # which may have other parameters
    for key, values in raw.items():
        where = f"{GRID}.{key}"
        if key not in known and (not has_own or not isinstance(key, str) or key in ("merge_method", *SHARED_PARAMETERS)):
            fix = f"write `{METHOD}`" if key == "merge_method" else nearest(key, known)
            problems.append(wrong(GRID, f"some of {', '.join(known)}", key, fix))
        elif not isinstance(values, list | tuple) or not values:
            problems.append(wrong(where, "a list of values", values, "write such as `[0.5, 1.0]`"))
        elif odd := [value for value in values if isinstance(value, bool) or not isinstance(value, str | int | float)]:
            problems.append(wrong(where, "numbers or names", odd[0], "give a recipe of its own to what is neither"))
        elif twice := _twice([_text(value) for value in values]):
            problems.append(wrong(where, "values of different names", f"{twice} twice", "remove one"))
        else:
            axes[key] = list(values)
    if not problems and (number := math.prod(map(len, axes.values()))) > MAX_POINTS:
        problems.append(wrong(GRID, f"at most {MAX_POINTS} points", number, "give several recipes, or fewer values"))
    if problems:
        raise RequestError(problems)
    return axes


def _twice(names: Sequence[str]) -> str:
    return next((name for k, name in enumerate(names) if name in names[:k]), "")


def _points(axes: Mapping[str, list[Any]], named: Any) -> Iterator[Point]:
    """All combinations that methods know. Raises RequestError for values that none of the methods does."""
    points: list[Point] = []
    for method in axes.get(METHOD, [named]):
        others = {key: _known_to(method, key, values) for key, values in axes.items() if key != METHOD}
        own = {key: values for key, values in others.items() if values} | ({METHOD: [method]} if METHOD in axes else {})
        points += [dict(zip(own, values, strict=True)) for values in itertools.product(*own.values())]
    problems = [
        wrong(f"{GRID}.{key}", f"what {_list(axes.get(METHOD, [named]))} can be given", value, "remove it")
        for key, values in axes.items()
        for value in values
        if not any(point.get(key) == value for point in points)
    ]
    if problems:
        raise RequestError(problems)
    yield from points


def _known_to(method: Any, key: str, values: list[Any]) -> list[Any]:
    """Those values that a method takes, as far as that can be told: a method of the user's own says itself what it takes."""
    variants = methods.variants_of(method) if isinstance(method, str) else {}
    if names_code(method) or not variants:
        return values
    if key == VARIANT:
        return [value for value in values if value and value in variants]
    return values if key not in _PARAMETERS or any(key in record.parameters for record in variants.values()) else []


def _list(names: Sequence[Any]) -> str:
    return " or ".join(shown(str(name)) for name in names)


def _text(value: Any) -> str:
    """The value as part of a name: numbers as short as they can be told apart, and of a method's file no folder."""
    try:
        number = float(value)
    except (ValueError, OverflowError):  # a whole number may be too large for it
        return str(value).rpartition("/")[2]
    return f"{number:g}" if float(f"{number:g}") == number else repr(number)


def _at(mapping: Mapping[str, Any], point: Point) -> dict[str, Any]:
    """The recipe at a point of its grid, as a file of its own would have it."""
    values = {key: value for key, value in point.items() if key != METHOD}
    found = {key: value for key, value in mapping.items() if key != GRID}
    parameters = found.get("parameters")
    if parameters is None or isinstance(parameters, Mapping):  # what else it is the recipe tells
        found["parameters"] = {**(parameters or {}), **values}
    models = found.get("models")
    if isinstance(models, list | tuple):
        found["models"] = [_without(model, values) for model in models]
    return found | ({"merge_method": point[METHOD]} if METHOD in point else {})


def _without(model: Any, values: Point) -> Any:
    """A model's entry without values of its own for these keys."""
    own = model.get("parameters") if isinstance(model, Mapping) else None
    if not isinstance(own, Mapping):
        return model
    return {**model, "parameters": {key: value for key, value in own.items() if key not in values}}
