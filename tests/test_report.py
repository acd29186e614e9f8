"""What a search leaves for people and their tools, made from records of searches that never ran. No Ray."""

from __future__ import annotations

import dataclasses
import html.parser
import itertools
import math
import random
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import pyarrow.parquet
import pytest

from pcb_ray.cli import main
from pcb_ray.recipe import Recipe
from pcb_ray.searching.report import files_of_search, files_of_sweep, notes_of, notes_of_sweep
from pcb_ray.searching.request import Bounds, Search, Space, weight_name
from pcb_ray.searching.results import Found
from pcb_ray.searching.tables import error_table, grid_table, scoreboard, shown_score, winner_tables

NAN = math.nan
LONG = (
    "Meta-Llama-3.1-70B-Instruct-abliterated-math-v2.1_final_checkpoint-12000",
    "_$x$ <b>&'bold'",
    "deepseek-r1-distill-70b-code",
)


def request_of(mode: str = "max", metric: str = "accuracy", **more: Any) -> Search:
    return Search("my_eval.py:Accuracy", {}, metric, mode, scale="lambda", share="density", **more)


def space_of(
    labels: Sequence[str] = ("math", "code"),
    groups: Sequence[str] = ("rest",),
    *,
    shared: Sequence[str] = (),
    variants: Sequence[str] = (),
) -> Space:
    recipe = Recipe.from_dict({"merge_method": "pcb", "base_model": "/base", "models": [{"model": f"/m/{n}"} for n in labels]})
    bounds = {weight_name(label, group, groups): Bounds(0.0, 2.0, 1.0) for label in labels for group in groups}
    bounds |= {name: {"lambda": Bounds(0.5, 2.0, 1.0), "density": Bounds(0.02, 0.4, 0.1, is_log=True)}[name] for name in shared}
    names = tuple(f"model.{group}.weight" for group in groups)
    return Space(
        recipe=recipe,
        bounds=bounds,
        variants=tuple(variants),
        labels=tuple(labels),
        groups=tuple(groups),
        group_of=tuple(range(len(groups))),
        names=names,
        weights=((1.0,) * len(labels),) * len(names),
        scale="lambda",
        share="density",
    )


def record(number: int, config: dict[str, Any], metric: str, score: float, error: str = "") -> dict[str, Any]:
    """As `tune.Ledger` keeps it; one that failed has been in no process, say."""
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
) -> tuple[list[dict[str, Any]], Found]:
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
    return records, Found(
        request=request,
        space=space,
        best=best["config"],
        recipe=space.recipe_of(space.candidate(best["config"])),
        scores=scores_of(request, space, base=0.9 * good, experts=0.95 * good, start=0.97 * good, winner=good),
        trials=count,
        failed=sum(bool(r["error"]) for r in records),
        elapsed_s=4000.0,
    )


def scores_of(request: Search, space: Space, *, experts: float, **others: float) -> dict[str, Any]:
    """The same on both splits."""
    values = {"base": others.pop("base"), **dict.fromkeys(space.labels, experts), **others}
    return {name: {split: {request.metric: value} for split in ("val", "test")} for name, value in values.items()}


def notes(best: dict[str, Any] | None = None, mode: str = "max", failed: int = 0, **scores: float) -> list[str]:
    request, space = request_of(mode), space_of(("math", "code", "chat"), shared=("density",))
    best = space.start | {"weight.math": 1.3} | (best or {})
    scored = scores_of(request, space, **({"base": 0.5, "experts": 0.6, "start": 0.65, "winner": 0.7} | scores))
    return notes_of(
        Found(
            request=request,
            space=space,
            best=best,
            recipe=space.recipe_of(space.candidate(best)),
            scores=scored,
            trials=60,
            failed=failed,
            elapsed_s=1.0,
        )
    )


# --- notes ------------------------------------------------------------------------------------------------------------------------


def test_a_winner_that_beats_all_within_its_ranges_needs_no_note():
    assert notes() == []
    assert notes(mode="min", base=5.0, experts=4.9, start=4.8, winner=4.7) == []
    assert notes(failed=15) == ["15 of 60 candidates failed; the report lists their errors"]


def test_a_winner_that_is_the_start_is_told():
    space = space_of(("math", "code", "chat"), shared=("density",))
    [note] = notes(space.start, start=0.7)
    assert "no candidate beat the start: the winner is the start" in note


@pytest.mark.parametrize(
    ("mode", "scores", "note"),
    [
        ("max", {"base": 0.7}, "on test the winner (accuracy 0.7000) is no better than the base (0.7000)"),
        ("max", {"experts": 0.71}, "on test the winner (accuracy 0.7000) is no better than the best expert, math (0.7100)"),
        ("max", {"start": 0.72}, "on test the winner (accuracy 0.7000) is no better than the start (0.7200)"),
        (
            "min",
            {"base": 4.6, "experts": 4.9, "start": 4.8, "winner": 4.7},
            "on test the winner (accuracy 4.7000) is no better than the base (4.6000)",
        ),
        ("max", {"winner": NAN}, "the winner has no score on test"),
    ],
)
def test_a_winner_that_a_split_does_not_confirm_is_told(mode, scores, note):
    assert notes(mode=mode, **scores) == [note.replace("on test", "on val"), note]


def test_scores_that_are_missing_are_compared_with_nothing():
    request, space = request_of(), space_of()
    _, found = searched(request, space)
    found = dataclasses.replace(
        found, scores=dict(found.scores) | {name: {"val": {}, "test": {}} for name in ("math", "code", "start")}
    )
    assert notes_of(found) == []
    found.scores["code"]["test"] = {"accuracy": 0.99}
    assert "the best expert, code (0.9900)" in notes_of(found)[0]


@pytest.mark.parametrize(
    ("best", "note"),
    [
        ({"weight.math": 1.99}, "weight.math is at its upper bound 2: widen it"),
        ({"weight.math": 2.0, "weight.chat": 1.985}, "weight.math, weight.chat are at their upper bound 2: widen them"),
        ({"weight.code": 0.0}, "weight.code is at its lower bound 0: the winner does without it"),
        ({"density": 0.0202}, "density is at its lower bound 0.02: widen it"),
    ],
)
def test_a_coefficient_at_a_bound_of_its_range_is_told(best, note):
    assert notes(best) == [note]


def test_many_coefficients_at_a_bound_are_one_note():
    request, space = request_of(), space_of(("a", "b"), [f"layers{k}" for k in range(10)])
    _, found = searched(request, space)
    found = dataclasses.replace(found, best=dict.fromkeys(space.bounds, 2.0))
    [note] = notes_of(found)
    assert note.endswith("weight.a.layers3 and 16 more are at their upper bound 2: widen them")


def test_a_density_of_all_and_values_inside_are_at_no_bound():
    space = space_of(shared=("density",))
    space = dataclasses.replace(space, bounds=space.bounds | {"density": Bounds(0.02, 1.0, 0.1, is_log=True)})
    _, found = searched(request_of(), space)
    found = dataclasses.replace(found, best={"weight.math": 1.95, "weight.code": 0.05, "density": 1.0})
    assert notes_of(found) == []


def test_scores_that_never_change_are_told():
    [first, second, *_] = notes(base=0.5, experts=0.5, start=0.5, winner=0.5)
    assert "does score() use the module that load() returned?" in first
    assert "no better than the base" in second


def test_failures_are_told():
    assert notes(failed=16) == ["16 of 60 candidates failed; the report lists their errors"]


def test_a_sweep_whose_best_is_at_its_edge_or_not_above_the_base_is_told():
    points = [{"density": d, "lambda": k} for d in (0.1, 0.2, 0.4) for k in (0.8, 1.0)]
    records = [record(n, p, "accuracy", p["density"] * (p["lambda"] == 1.0)) for n, p in enumerate(points)]
    assert notes_of_sweep(request_of(), records, 0.5) == [
        "no point is better than the base (accuracy 0.5000)",
        "the best density, 0.4, is the highest of the grid: widen it",
        "the best lambda, 1, is the highest of the grid: widen it",
    ]
    assert notes_of_sweep(request_of("min"), [record(0, {"density": 0.1, "lambda": 1.0}, "loss", 4.7)], 4.8) == []


def test_the_command_prints_the_table_then_the_notes(monkeypatch, capsys):
    request, space = request_of(), space_of()
    _, found = searched(request, space)
    found = dataclasses.replace(found, best=space.start)
    found = dataclasses.replace(found, notes=tuple(notes_of(found)))
    monkeypatch.setattr(sys.modules["pcb_ray.searching.run"], "search", lambda *args, **options: found)
    assert main(["search", "recipe.yaml", "out"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["accuracy", "base", "math", "code", "start", "winner", "note:", "out:"]
    assert "the winner is the start" in lines[-2]


def write_search(folder, *found):
    written(folder, files_of_search(*found))


def write_sweep(folder, *found):
    written(folder, files_of_sweep(*found))


def written(folder, files):
    for name, content in files.items():
        (folder / name).write_bytes(content)


# --- tables -----------------------------------------------------------------------------------------------------------------------


def test_columns_of_the_table_have_types_that_do_not_depend_on_their_values(tmp_path):
    space = space_of(shared=("lambda", "density"), variants=("pairwise", "released"))
    write_search(tmp_path, *searched(request_of(), space, 12, error=lambda n: "loss is nan" if n % 2 else ""))
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


# --- pages ------------------------------------------------------------------------------------------------------------------------


class Page(html.parser.HTMLParser):
    """What a browser would see. Fails on tags that do not match, and on whatever is not in the page itself."""

    EMPTY = ("meta", "img")

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.open, self.tags, self.images, self.words = list[str](), set[str](), list[dict[str, str | None]](), ""
        self.feed(path.read_text(encoding="utf-8"))
        self.close()
        assert self.open == []
        assert not self.tags & {"script", "link", "iframe", "a"}
        assert all((image["src"] or "").startswith("data:image/png;base64,") for image in self.images)
        assert all(len(image["alt"] or "") > 40 for image in self.images)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        assert not {name for name, _ in attrs} & {"href", "onclick", "onload"}
        if tag == "img":
            self.images.append(dict(attrs))
        if tag not in self.EMPTY:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words += data


def page_of(folder: Path) -> Page:
    text = (folder / "report.html").read_text(encoding="utf-8")
    assert "://" not in text, "nothing from elsewhere"
    assert "name=viewport" in text
    return Page(folder / "report.html")


SPACES = {
    "three models": space_of(("math", "code", "chat")),
    "groups and all else": space_of(
        groups=("attention", "mlp", "embed", "rest"), shared=("lambda", "density"), variants=("pairwise", "released")
    ),
    "25 coefficients": space_of(("a", "b", "c"), [f"layers{k}" for k in range(8)], shared=("density",)),
    "80 coefficients": space_of(
        groups=[f"mlp.layers{k}" for k in range(39)], shared=("lambda", "density"), variants=("pairwise", "paper")
    ),
    "11 models": space_of([f"model{k}" for k in range(11)]),
    "groups with the names of other things": space_of(
        groups=("lambda", "variant", "score"), shared=("lambda",), variants=("pairwise", "paper")
    ),
    "long names": space_of(LONG, ("attention", "rest"), shared=("lambda",)),
}


@pytest.mark.parametrize("mode", ["max", "min"])
@pytest.mark.parametrize("name", SPACES)
def test_every_kind_of_space_gives_a_page_with_its_plots(tmp_path, name, mode):
    request, space = request_of(mode, population=8), SPACES[name]
    write_search(tmp_path, *searched(request, space, 20, error=lambda n: "loss is nan" if n == 3 else ""))
    page = page_of(tmp_path)
    assert len(page.images) == 3
    assert all(
        (tmp_path / f"{plot}.png").read_bytes().startswith(b"\x89PNG") for plot in ("best_so_far", "coefficients", "parallel")
    )
    assert "loss is nan" in page.words
    assert all(label in page.words for label in space.labels), "whole, and escaped"
    assert "b" not in page.tags


@pytest.mark.parametrize(
    ("mode", "how"),
    [
        ("max", {"error": lambda n: "" if n == 17 else f"ValueError: {n}"}),
        ("min", {"score": lambda n: 7.0 + 0.01 * (n % 9) + 1e9 * (n % 7 == 3)}),
        ("max", {"score": lambda n: 0.5 - 40 * (n % 3)}),
        ("max", {"score": lambda n: 0.0}),
        ("min", {"score": lambda n: 4.87 + 1e-9 * n}),
        ("max", {"score": lambda n: 123456.789 + n, "count": 3}),
    ],
    ids=["all but one failed", "ruined", "a third is ruined", "all equal", "all nearly equal", "one generation"],
)
def test_scores_of_any_kind_give_a_page(tmp_path, mode, how):
    request = request_of(mode, population=3)
    records, found = searched(request, SPACES["three models"], **how)
    write_search(tmp_path, records, found)
    assert len(page_of(tmp_path).images) == 3


def test_references_without_a_score_give_a_page(tmp_path):
    request, space = request_of(), SPACES["three models"]
    records, found = searched(request, space)
    found = dataclasses.replace(
        found, scores=dict(found.scores) | {name: {"val": {}, "test": {}} for name in ("math", "code", "chat", "start")}
    )
    found.scores["winner"]["test"] = {}
    write_search(tmp_path, records, found)
    assert "the winner has no score on test" in page_of(tmp_path).words


def test_a_winner_that_is_a_start_whose_trial_failed_gives_a_page(tmp_path):
    """It is scored again with the other references."""
    request, space = request_of(), SPACES["groups and all else"]
    records, found = searched(request, space, error=lambda n: "" if n else "loss is nan")
    found = dataclasses.replace(found, best=space.start)
    write_search(tmp_path, records, found)
    assert "no candidate beat the start" in page_of(tmp_path).words


GRID = {"density": (0.05, 0.1, 0.2), "lambda": (0.8, 1.0, 1.2, 1.4), "variant": ("pairwise", "released", "paper")}


@pytest.mark.parametrize("mode", ["max", "min"])
@pytest.mark.parametrize("axes", [names for count in (1, 2, 3) for names in itertools.combinations(GRID, count)])
def test_a_sweep_over_any_axes_gives_a_page_with_its_failures(tmp_path, axes, mode):
    points = [dict(zip(axes, point, strict=True)) for point in itertools.product(*(GRID[name] for name in axes))]
    score = {0: 0.7, 2: 40.0 if mode == "min" else -40.0}
    records = [record(n, p, "accuracy", score.get(n, 0.6), "<b>no</b>" if n == 1 else "") for n, p in enumerate(points)]
    write_sweep(tmp_path, request_of(mode), points, records, {"val": {"accuracy": 0.5}})
    page = page_of(tmp_path)
    assert len(page.images) == 1
    assert "<b>no</b>" in page.words
    assert f"{len(points)} points over {', '.join(axes)}, 1 of them failed" in str(page.images[0]["alt"])


@pytest.mark.parametrize("points", [[{"density": 0.1, "lambda": 1.0}], [{"lambda": 0.1 * k, "density": 0.1} for k in range(1, 31)]])
def test_a_sweep_of_a_point_or_of_many_gives_a_page(tmp_path, points):
    records = [record(n, p, "accuracy", 0.5 + 0.01 * n) for n, p in enumerate(points)]
    write_sweep(tmp_path, request_of(), points, records, {"val": {"accuracy": 0.5}})
    assert len(page_of(tmp_path).images) == 1


def test_plots_leave_the_settings_of_matplotlib_and_its_pyplot_alone(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)  # an import of it would fail
    before = matplotlib.rcParams.copy()
    write_search(tmp_path, *searched(request_of(), space_of(), 8))
    assert matplotlib.rcParams.copy() == before
