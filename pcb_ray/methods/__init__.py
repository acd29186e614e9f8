"""The merge methods: one record each. Whoever needs to know something of a method reads its record; no other module knows one's
name.

`METHODS` is the table of those that come with pcb_ray; a recipe may name another of the user's own (`my_methods.py:trimmed_mean`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import ParamSpec, TypeVar

from pcb_ray.errors import InputError, RequestError, with_place
from pcb_ray.methods.ieee import exp, sum_over_tasks, tanh
from pcb_ray.methods.iso import ISO_C, ISO_CTS
from pcb_ray.methods.linear import LINEAR
from pcb_ray.methods.method import (
    MAGNITUDE,
    Block,
    Extrema,
    Known,
    Method,
    Native,
    Parameter,
    Pass,
    Quantity,
    Ranks,
    Scored,
    Settings,
    Sums,
    column,
    fraction,
    lambda_parameter,
    number,
)
from pcb_ray.methods.pcb import PAIRWISE, PAPER, RELEASED
from pcb_ray.methods.task_arithmetic import TASK_ARITHMETIC
from pcb_ray.methods.ties import TIES, TIES_MEAN, TIES_SUM
from pcb_ray.methods.tsv_m import TSV_M
from pcb_ray.methods.wudi import WUDI
from pcb_ray.user_code import UserCode, load_object

__all__ = [
    "MAGNITUDE", "METHODS", "Block", "Extrema", "Known", "Method", "Native", "Parameter", "Quantity", "Ranks", "Scored",
    "Settings", "Sums", "column", "exp", "fraction", "lambda_parameter", "names", "number", "own_method",
    "sum_over_tasks", "tanh", "variants_of",
]  # fmt: skip

METHODS: tuple[Method, ...] = (
    PAIRWISE, RELEASED, PAPER, TIES, TIES_MEAN, TIES_SUM, TASK_ARITHMETIC, LINEAR,
    ISO_C, ISO_CTS, TSV_M, WUDI,
)  # fmt: skip


def names() -> tuple[str, ...]:
    """What `merge_method` may be, but for methods of one's own."""
    return tuple(dict.fromkeys(method.name for method in METHODS))


def variants_of(name: str) -> dict[str, Method]:
    """The methods of one name by variant, the default first; a method without variants has the empty one."""
    return {method.variant: method for method in METHODS if method.name == name}


@functools.cache
def own_method(code: UserCode) -> Method:
    """The record that the user's code defines. Raises RequestError."""
    found = load_object(code, "merge_method")
    if not isinstance(found, Method):
        raise RequestError(
            f"merge_method: wanted a pcb_ray.methods.Method, found {code.name} to be a {type(found).__name__}. "
            "Fix: name a record, such as `trimmed_mean = Method(name=..., merge=...)`; see docs/how-to-add-a-method.md."
        )
    return _guarded(found)


P = ParamSpec("P")
R = TypeVar("R")


def _guarded(method: Method) -> Method:
    """The record with functions that tell what the user's code raises, and in which line, as an InputError."""

    def told(name: str, function: Callable[P, R], kind: type = object) -> Callable[P, R]:
        def call(*arguments: P.args, **options: P.kwargs) -> R:
            try:
                found = function(*arguments, **options)
            except (Exception, SystemExit) as error:
                # Whatever the user's code raises is theirs, and is told as it is.
                raise InputError(f"merge_method: {name} of {method.name} raised {with_place(error)}. Fix: mend it.") from error
            if not isinstance(found, kind):
                wanted, got = kind.__name__, type(found).__name__
                raise InputError(f"merge_method: {name} of {method.name}: wanted a {wanted}, found a {got}. Fix: mend it.")
            return found

        return call

    def of_pass(one: Pass) -> Pass:
        if isinstance(one, Ranks):
            places = {name: told(f"the rank of {name}", place) for name, place in one.places.items()}
            return replace(one, quantity=of_quantity(one.quantity), places=places)
        one = replace(one, of=told(one.title, one.of))
        if isinstance(one, Extrema):
            return one
        return replace(one, names={name: told(f"the rows of {name}", rows, slice) for name, rows in one.names.items()})

    def of_quantity(quantity: Quantity) -> Quantity:
        return replace(quantity, of=told(quantity.name, quantity.of))

    scored = method.scored and replace(
        method.scored,
        values=told("scored.values", method.scored.values),
        scores=of_quantity(method.scored.scores),
        kept=told("scored.kept", method.scored.kept),
        combine=told("scored.combine", method.scored.combine),
    )
    return replace(
        method,
        merge=told("merge", method.merge),
        parameters={name: replace(p, check=told(f"the check of {name}", p.check)) for name, p in method.parameters.items()},
        passes=tuple(map(of_pass, method.passes)),
        element_bytes=told("element_bytes", method.element_bytes, int),
        basis=method.basis and told("basis", method.basis),
        scored=scored,
        refuse=told("refuse", method.refuse, list),
        warnings=told("warnings", method.warnings, list),
        impossible=told("impossible", method.impossible, list),
        wrong_weights=told("wrong_weights", method.wrong_weights, str),
    )
