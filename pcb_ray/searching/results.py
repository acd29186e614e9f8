"""What searches and sweeps return, and the record of it that lies in their output: by that a search that is asked again knows that
it is done."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pcb_ray.claims import wrong_files
from pcb_ray.files.objects import Storage
from pcb_ray.files.stores import open_store, size_of_file
from pcb_ray.output.folder import Folder
from pcb_ray.output.prefix import Prefix
from pcb_ray.output.state import differences_of
from pcb_ray.receipt import RECEIPT, Receipt, read_small
from pcb_ray.recipe import Recipe
from pcb_ray.searching.request import Config, Search, Space

FOUND = "pcb_search.json"

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


# --- the record -------------------------------------------------------------------------------------------------------------------


def as_json(asked: Mapping[str, Any], found: Found | Swept) -> bytes:
    """The record: what was asked, as JSON values, and what was found."""
    if isinstance(found, Found):
        own = {"scores": found.scores, "trials": found.trials, "failed": found.failed, "notes": found.notes}
        own |= {"elapsed_s": found.elapsed_s}
    else:
        own = {"scores": {"base": found.base}, "records": found.records}
    return (json.dumps({**asked, "found": _without_nan({"best": found.best, **own})}, indent=1, allow_nan=False) + "\n").encode()


def found_of(record: Mapping[str, Any], request: Search, space: Space, receipt: Receipt) -> Found:
    found = _with_nan(record["found"])
    return Found(
        request=request,
        space=space,
        best=found["best"],
        recipe=space.recipe_of(space.candidate(found["best"])),
        scores=found["scores"],
        trials=found["trials"],
        failed=found["failed"],
        elapsed_s=found["elapsed_s"],
        notes=tuple(found["notes"]),
        receipt=receipt,
    )


def swept_of(record: Mapping[str, Any], request: Search, space: Space) -> Swept:
    found = _with_nan(record["found"])
    winner = space.recipe_of(space.candidate(found["best"]))
    return Swept(request, found["best"], winner, found["scores"]["base"], tuple(found["records"]))


def record_in(place: Folder | Prefix, storage: Storage) -> dict[str, Any] | None:
    """The record of an output that is whole, empty if it can't be read; None if there is none. What a killed run has left beside it
    goes."""
    if not place.is_there or (place.is_unfinished and not place.is_left_over):
        return None
    store = open_store(storage=storage)
    if size_of_file(store, f"{place.reads}/{FOUND}") is None:
        return None
    try:
        record = dict(json.loads(read_small(place.reads, FOUND, store)))
        complete = {"asked", "budget", "points", "scored_by", "found"} <= record.keys()
    except (ValueError, TypeError):
        complete = False
    if place.is_left_over:
        place.tidy()
    return record if complete else {}


def differences(record: Mapping[str, Any], asked: Mapping[str, Any], place: Folder | Prefix, storage: Storage) -> list[str]:
    """Why what lies in the output is not what is asked for, or not whole."""
    out, store = place.reads, open_store(storage=storage)
    if not record:
        return [f"{out}/{FOUND}: can't be read as it was written: wanted the record of a search. Fix: choose another OUT."]
    asked = json.loads(json.dumps(asked))
    if record["scored_by"] != asked["scored_by"]:
        return [f"--resume: {out} is not this very search: another evaluator has scored its candidates. Fix: choose another OUT."]
    found = list(differences_of({k: record[k] for k in asked}, asked))
    if found:
        return [f"--resume: {out} is not this very search: {one}. Fix: ask for the same, or choose another OUT." for one in found]
    if size_of_file(store, f"{out}/{RECEIPT}") is None:
        return []  # a sweep has no model
    return [f"--resume: {one}" for one in wrong_files(store, out, Receipt.of(out, store))]


def _without_nan(value: Any) -> Any:
    """JSON has no NaN."""
    if isinstance(value, Mapping):
        return {key: _without_nan(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _with_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _with_nan(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_with_nan(one) for one in value]
    return math.nan if value is None else value
