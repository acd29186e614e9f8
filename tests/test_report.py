"""What a search leaves for people and their tools, made from records of searches that never ran. No Ray."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from typing import Any

import pyarrow.parquet

from pcb_ray.recipe import Recipe
from pcb_ray.search.report import write_search, write_sweep
from pcb_ray.search.request import Bounds, Search, Space, weight_name
from pcb_ray.search.tables import error_table, grid_table, scoreboard, shown_score, winner_tables

NAN = math.nan


def request_of(mode: str = "max", metric: str = "accuracy", **more: Any) -> Search:
    return Search("my_eval.py:Accuracy", {}, metric, mode, **more)


def space_of(
    labels: Sequence[str] = ("math", "code"),
    groups: Sequence[str] = ("rest",),
    *,
    shared: Sequence[str] = (),
    variants: Sequence[str] = (),
) -> Space:
    recipe = Recipe.from_dict({"merge_method": "pcb", "base_model": "/base", "models": [{"model": f"/m/{n}"} for n in labels]})
    bounds = {weight_name(label, group, groups): Bounds(0.0, 2.0, 1.0) for label in labels for group in groups}
    bounds |= {name: {"lambda": Bounds(0.5, 2.0, 1.0), "density": Bounds(0.02, 0.4, 0.1)}[name] for name in shared}
    names = tuple(f"model.{group}.weight" for group in groups)
    return Space(recipe, bounds, tuple(variants), tuple(labels), tuple(groups), tuple(range(len(groups))), names)


def record(number: int, config: dict[str, Any], metric: str, score: float, error: str = "") -> dict[str, Any]:
    """As `tune.Progress` keeps it; one that failed has been in no worker, say."""
    found = {"number": number, "config": config, "ended": 1.8e9 + number, "error": error}
    if error:
        return {**found, "metrics": {}, "objective": NAN, "node": "", "seconds": NAN}
    timed = {"node": "10.0.0.1", "pid": 7, "seconds": 2.0, "load_s": 0.0, "apply_s": 0.5, "score_s": 1.5}
    return {**found, "metrics": {metric: score}, "objective": score, **timed}


def searched(
    request: Search,
    space: Space,
    count: int = 60,
    score: Callable[[int], float] | None = None,
    error: Callable[[int], str] = lambda number: "",
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Records of a random search, and what `search` returns of it."""
    rng = random.Random(0)
    records = []
    for number in range(count):
        config: dict[str, Any] = {name: rng.uniform(b.lower, b.upper) for name, b in space.bounds.items()}
        config |= {"variant": rng.choice(space.variants)} if space.variants else {}
        value = score(number) if score else rng.uniform(0.5, 0.7)
        records.append(record(number, config if number else space.start, request.metric, value, error(number)))
    best = max((r for r in records if not r["error"]), key=lambda r: request.better * r["objective"])
    good = best["objective"]
    return records, {
        "request": request,
        "space": space,
        "best": best["config"],
        "recipe": space.recipe_of(space.candidate(best["config"])),
        "scores": scores_of(request, space, base=0.9 * good, experts=0.95 * good, start=0.97 * good, winner=good),
        "trials": count,
        "failed": sum(bool(r["error"]) for r in records),
        "elapsed_s": 4000.0,
    }


def scores_of(request: Search, space: Space, *, experts: float, **others: float) -> dict[str, Any]:
    """The same on both splits."""
    values = {"base": others.pop("base"), **dict.fromkeys(space.labels, experts), **others}
    return {name: {split: {request.metric: value} for split in ("val", "test")} for name, value in values.items()}


# --- tables -------------------------------------------------------------------------------------------------------------------------


def test_columns_of_the_table_have_types_that_do_not_depend_on_their_values(tmp_path):
    space = space_of(shared=("lambda", "density"), variants=("pairwise", "released"))
    write_search(tmp_path, request_of(), space, *searched(request_of(), space, 12, error=lambda n: "loss is nan" if n % 2 else ""))
    table = pyarrow.parquet.read_table(tmp_path / "trials.parquet")
    doubles = (
        "weight.math",
        "weight.code",
        "lambda",
        "density",
        "metric.accuracy",
        "objective",
        "seconds",
        "load_s",
        "apply_s",
        "score_s",
    )
    assert {f.name: str(f.type) for f in table.schema} == {
        "number": "int64",
        **dict.fromkeys(doubles, "double"),
        "variant": "string",
        "ended": "timestamp[ms, tz=UTC]",
        "node": "string",
        "error": "string",
    }
    rows = table.to_pylist()
    assert [row["number"] for row in rows] == list(range(12))
    assert [row["error"] for row in rows] == ["", "loss is nan"] * 6
    assert [row["objective"] is None for row in rows] == [False, True] * 6, "null, not NaN: in SQL that would be above all numbers"
    assert rows[3]["ended"].timestamp() == 1.8e9 + 3


def test_whole_numbers_and_nothing_at_all_are_doubles_too(tmp_path):
    points = [{"lambda": 1}, {"lambda": 2}]  # as YAML gives them
    records = [record(0, points[0], "m", 1), record(1, points[1], "m", NAN, "ValueError: no")]
    for r in records:
        r["seconds"] = NAN
    write_sweep(tmp_path, request_of(metric="m"), points, records, {"val": {"m": 0.5}})
    table = pyarrow.parquet.read_table(tmp_path / "sweep.parquet")
    assert {str(table.schema.field(name).type) for name in ("lambda", "metric.m", "objective", "seconds", "load_s")} == {"double"}
    assert table["seconds"].null_count == 2


def test_scores_have_the_digits_that_tell_them_apart():
    values = (4.86981, 0.5, 0.0, -0.25, 12.34567, 1034.2345, 123456.789, 1.5e12, 3.21e-6, NAN)
    assert [shown_score(v) for v in values] == (
        ["4.8698", "0.5000", "0.0000", "-0.2500", "12.3457", "1034.23", "123457", "1.5e+12", "3.21e-06", "-"]
    )


def test_the_scoreboard_marks_the_best_of_each_column_also_where_less_is_better():
    of = {"base": (0.5, 3.0, 20.0), "math": (0.7, 2.0, 9.0), "winner": (0.8, 2.5, 8.0)}
    scores = {
        name: {s: dict(zip(("accuracy", "loss", "perplexity_code"), v, strict=True)) for s in ("val", "test")}
        for name, v in of.items()
    }
    scores["start"] = {"val": {}, "test": {}}
    board = scoreboard(request_of(), scores)
    assert board.header == ["accuracy (val)", "accuracy (test)", "loss (test)", "perplexity_code (test)"]
    assert board.best == {("winner", 0), ("winner", 1), ("math", 2), ("winner", 3)}
    assert board.rows["start"] == ["-"] * 4
    assert board.as_text().splitlines()[3].split() == ["winner", "0.8000*", "0.8000*", "2.5000", "8.0000*"]
    assert board.as_html().count("<td class=best>") == 4


def test_a_metric_whose_name_says_nothing_is_taken_to_be_like_the_one_searched_by():
    scores = {name: {s: {"mean": v, "cpp": v} for s in ("val", "test")} for name, v in {"base": 5.0, "winner": 4.0}.items()}
    assert scoreboard(request_of("min", "mean"), scores).best == {("winner", k) for k in range(3)}


def test_lines_of_a_table_for_terminals_are_as_wide_as_their_cells():
    text = grid_table(request_of(), [record(k, {"lambda": v}, "accuracy", v / 2) for k, v in enumerate((0.5, 1.0))]).as_text()
    assert text.splitlines() == ["            accuracy", "lambda 1      0.5000*", "lambda 0.5    0.2500"]


def test_the_winners_coefficients_stand_by_group_and_model():
    space = space_of(("math", "code"), ("attention", "mlp"), shared=("density",), variants=("pairwise", "released"))
    best = {"weight.math.attention": 0.12345, "weight.code.attention": 1.0, "weight.math.mlp": 2.0, "weight.code.mlp": 0.5}
    (about, by_group), (_, others) = winner_tables(space, best | {"density": 0.05, "variant": "released"})
    assert "start 1, range 0 to 2" in about
    assert (by_group.header, by_group.rows) == (("math", "code"), {"attention": ["0.1235", "1"], "mlp": ["2", "0.5"]})
    assert others.rows == {"density": ["0.05", "0.1", "0.02 to 0.4"], "variant": ["released", "pairwise", "pairwise, released"]}


def test_errors_that_differ_in_numbers_only_are_one_row():
    errors = [
        "",
        "OutOfMemory: tried 20.00 MiB at 0x7f3a",
        "loss is nan",
        "OutOfMemory: tried 4.5 MiB at 0x11",
        "loss is nan",
        "loss is nan",
    ]
    table = error_table([record(n, {}, "loss", 1.0, e) for n, e in enumerate(errors)])
    assert table is not None
    assert table.rows == {"loss is nan": ["3", "2"], "OutOfMemory: tried 20.00 MiB at 0x7f3a": ["2", "1"]}
    assert list(table.rows) == ["loss is nan", "OutOfMemory: tried 20.00 MiB at 0x7f3a"], "the most frequent first"
    assert error_table([record(0, {}, "loss", 1.0)]) is None
