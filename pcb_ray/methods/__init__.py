"""The merge methods: one record each. Whoever needs to know something of a method reads its record; no other module knows one's
name.

`METHODS` is the table of those that come with pcb_ray; a recipe may name another of the user's own (`my_methods.py:trimmed_mean`).
"""

from __future__ import annotations

import functools
from pathlib import Path

from pcb_ray.errors import RequestError
from pcb_ray.methods.ieee import exp, sum_over_tasks, tanh
from pcb_ray.methods.linear import LINEAR
from pcb_ray.methods.method import (
    MAGNITUDE,
    Block,
    Extrema,
    Known,
    Method,
    Parameter,
    Quantity,
    Ranks,
    Settings,
    Sums,
    column,
    fraction,
    lambda_parameter,
    number,
)
from pcb_ray.methods.pcb import PAIRWISE, PAPER, RELEASED
from pcb_ray.methods.task_arithmetic import TASK_ARITHMETIC
from pcb_ray.methods.ties import TIES
from pcb_ray.user_code import UserCode, load_object

__all__ = [
    "MAGNITUDE", "METHODS", "Block", "Extrema", "Known", "Method", "Parameter", "Quantity", "Ranks", "Settings", "Sums", "column",
    "exp", "fraction", "lambda_parameter", "names", "number", "own_method", "sum_over_tasks", "tanh", "variants_of",
]  # fmt: skip

METHODS: tuple[Method, ...] = (PAIRWISE, RELEASED, PAPER, TIES, TASK_ARITHMETIC, LINEAR)


def names() -> tuple[str, ...]:
    """What `merge_method` may be, but for methods of one's own."""
    return tuple(dict.fromkeys(method.name for method in METHODS))


def variants_of(name: str) -> dict[str, Method]:
    """The methods of one name by variant, the default first; a method without variants has the empty one."""
    return {method.variant: method for method in METHODS if method.name == name}


@functools.cache
def own_method(code: UserCode, folder: Path) -> Method:
    """The record that the user's code defines. Raises RequestError."""
    found = load_object(code, folder, "merge_method")
    if not isinstance(found, Method):
        raise RequestError(
            f"merge_method: wanted a pcb_ray.methods.Method, found {code.name} to be a {type(found).__name__}. "
            "Fix: name a record, such as `trimmed_mean = Method(name=..., merge=...)`; see docs/how-to-add-a-method.md."
        )
    return found
