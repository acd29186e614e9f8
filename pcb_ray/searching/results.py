"""What searches and sweeps return."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pcb_ray.receipt import Receipt
from pcb_ray.recipe import Recipe
from pcb_ray.searching.request import Config, Search, Space

Scores = dict[str, dict[str, Any]]
"""Metrics by split."""


@dataclass(frozen=True)
class Found:
    """What a search has found."""

    request: Search
    space: Space
    best: Config
    """The coefficients of the winner by name."""
    recipe: Recipe
    """An ordinary recipe of the winner."""
    scores: Mapping[str, Scores]
    """The metrics of base, experts, start and winner, by split."""
    trials: int
    failed: int
    elapsed_s: float
    notes: tuple[str, ...] = ()
    """What a reader of the scores should doubt."""
    receipt: Receipt | None = None
    """The receipt of the winner's merge."""


@dataclass(frozen=True)
class Swept:
    """What a sweep has found."""

    request: Search
    best: Config
    recipe: Recipe
    """An ordinary recipe of the best point."""
    base: Scores
    records: tuple[dict[str, Any], ...]
    """What became of each point, in order."""
