"""What a search leaves for people: what to know of its winner, and one page with the tables and plots."""

from __future__ import annotations

import base64
import html
import math
from collections.abc import Mapping, Sequence
from typing import Any

from pcb_ray.searching import plots
from pcb_ray.searching.request import Config, Search, Space, share_of
from pcb_ray.searching.results import Found
from pcb_ray.searching.tables import (
    Record,
    Table,
    direction,
    error_table,
    grid_table,
    scoreboard,
    shown_score,
    table_of,
    winner_tables,
)

PAGE = "report.html"
AT_BOUND = 0.02  # of a range: CMA-ES comes near a bound, and seldom to it
MOST_NAMED = 4  # coefficients in one note

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 64em; padding: 0 1em; color: #222; }
h1, h2 { line-height: 1.2; } h2 { margin-top: 2em; } p, li { max-width: 46em; }
.notes { background: #fff6e6; border-left: 4px solid #e69f00; padding: .7em 1em .7em 2em; }
.wide { overflow-x: auto; margin: 1em 0; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .25em .8em; text-align: right; vertical-align: top; font-weight: normal; border-bottom: 1px solid #ddd; }
thead th { font-weight: 600; vertical-align: bottom; } th { overflow-wrap: anywhere; min-width: 5em; }
th:first-child { text-align: left; min-width: 7em; } td { white-space: nowrap; }
td.best { font-weight: bold; } .scores tbody tr:last-child { background: #eef5fa; }
img { width: 100%; min-width: 44em; height: auto; }
pre { background: #f6f6f6; padding: 1em; overflow-x: auto; }
@media print {
  body { max-width: none; margin: 0; padding: 0; font-size: 11px; } h2 { break-after: avoid; } img, tr { break-inside: avoid; }
  img { min-width: 0; max-height: 24cm; object-fit: contain; } .wide { overflow: visible; }
  pre { white-space: pre-wrap; overflow-wrap: anywhere; }
  th, td { padding: .2em .4em; } .notes, .scores tr { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
}
"""


def files_of_search(records: Sequence[Record], found: Found) -> dict[str, bytes]:
    """trials.parquet, the plots as PNG, and report.html."""
    request, space = found.request, found.space
    best, scores, split = found.best, found.scores, request.search_split
    count = f"{found.trials} candidates" + (f", {found.failed} of them failed" if found.failed else "")
    on_split = ", ".join(
        f"{name} {shown_score(scores[name][split].get(request.metric, math.nan))}" for name in ("base", "start", "winner")
    )
    told = {
        "best_so_far.png": (
            "Best so far",
            plots.best_so_far(request, records, found),
            f"{request.metric} on {split} of each of {count}, in the order asked, and the best so far: {on_split}.",
        ),
        "coefficients.png": (
            "Coefficients over time",
            plots.coefficients(request, space, records, best),
            f"How the {len(best)} coefficients changed from generation to generation, from the start to the winner.",
        ),
        "parallel.png": (
            "All candidates",
            plots.parallel(request, space, records, found),
            f"A line for each of {count}, across its {len(best)} coefficients and its score; the winner's stands out.",
        ),
    }
    board, errors = scoreboard(request, scores), error_table(records)
    sections = [
        f"<p>{html.escape(f'{count}, in {_duration(found.elapsed_s)}; {request.metric} on {split} decided.')}</p>",
        _notes(notes_of(found)),
        f"<div class=scores>{board.as_html()}</div><p>{html.escape(_marked(request, scores))}</p>",
        "<h2>Coefficients of the winner</h2>",
        *(f"<p>{html.escape(about)}</p>{table.as_html()}" for about, table in winner_tables(space, best)),
        *(f"<h2>{title}</h2>{_image(data, text)}" for title, data, text in told.values()),
        *_errors(errors),
        f"<h2>Recipe of the winner</h2><pre>{html.escape(found.recipe.to_yaml())}</pre>",
    ]
    plotted = {name: data for name, (_, data, _) in told.items()}
    return {"trials.parquet": table_of(records), **plotted, PAGE: _page("Search of merge coefficients", sections)}


def files_of_sweep(
    request: Search, points: Sequence[Config], records: Sequence[Record], base: Mapping[str, Any]
) -> dict[str, bytes]:
    """sweep.parquet, sweep.png (a heat map, or lines for one axis), and report.html."""
    on_base = base[request.search_split][request.metric]
    plot = plots.sweep(request, records, on_base)
    table, errors = grid_table(request, records), error_table(records)
    failed = sum(bool(r["error"]) for r in records)
    count = f"{len(records)} points over {', '.join(points[0])}" + (f", {failed} of them failed" if failed else "")
    best, (score,) = next(iter(table.rows.items()))
    text = (
        f"{request.metric} on {request.search_split} of {count}. Best: {best}, with {score}; the base has {shown_score(on_base)}."
    )
    sections = [
        f"<p>{html.escape(text)}</p>",
        _notes(notes_of_sweep(request, records, on_base)),
        _image(plot, text),
        table.as_html(),
        *_errors(errors),
    ]
    return {"sweep.parquet": table_of(records), "sweep.png": plot, PAGE: _page("Sweep", sections)}


# --- what to know -----------------------------------------------------------------------------------------------------------------


def notes_of(found: Found) -> list[str]:
    """What a reader of the scores might overlook: a winner that is none, or that the ranges held back."""
    request, space = found.request, found.space
    best, scores = found.best, found.scores
    of = {split: {n: s[split].get(request.metric, math.nan) for n, s in scores.items()} for split in request.splits.values()}
    notes = []
    if best == space.start:
        notes.append("no candidate beat the start: the winner is the start. A larger budget or other ranges may find better")
    if all(len(set(v.values())) == 1 for v in of.values()):
        notes.append("all models have one score: does score() use the module that load() returned?")
    for split, values in of.items():
        if not math.isfinite(values["winner"]):
            notes.append(f"the winner has no score on {split}")
        expert = max((n for n in space.labels if math.isfinite(values[n])), key=lambda n: request.better * values[n], default=None)
        rivals = {"base": "the base"} | ({expert: f"the best expert, {expert}"} if expert else {})
        rivals |= {"start": "the start"} if best != space.start else {}
        for name, who in rivals.items():
            if request.better * (values["winner"] - values[name]) <= 0:
                winners, others = shown_score(values["winner"]), shown_score(values[name])
                notes.append(f"on {split} the winner ({request.metric} {winners}) is no better than {who} ({others})")
    notes += _at_bounds(space, best)
    if found.failed:
        notes.append(f"{found.failed} of {found.trials} candidates failed; the report lists their errors")
    return notes


def notes_of_sweep(request: Search, records: Sequence[Record], base: float) -> list[str]:
    """What a reader of a grid might overlook: that it misses the best, or that nothing in it is any good."""
    best = max((r for r in records if not r["error"]), key=lambda r: request.better * r["objective"])
    notes = []
    if request.better * (best["objective"] - base) <= 0:
        notes.append(f"no point is better than the base ({request.metric} {shown_score(base)})")
    for name in [name for name in (request.share, request.scale) if name in best["config"]]:
        values = sorted({r["config"][name] for r in records})
        value = best["config"][name]
        if len(values) > 1 and value in (values[0], values[-1]) and (name, value) != (request.share, 1.0):
            end = "lowest" if value == values[0] else "highest"
            notes.append(f"the best {name}, {value:g}, is the {end} of the grid: widen it")
    return notes


def _at_bounds(space: Space, best: Config) -> list[str]:
    """A note for each bound that coefficients of the winner lie at."""
    held: dict[tuple[str, float, str], list[str]] = {}
    for name, b in space.bounds.items():
        share = share_of(b, best[name])
        if share <= AT_BOUND:
            held.setdefault(("lower", b.lower, name.split(".")[0]), []).append(name)
        elif share >= 1 - AT_BOUND and not (b.is_log and b.upper == 1):
            held.setdefault(("upper", b.upper, name.split(".")[0]), []).append(name)
    notes = []
    for (side, bound, kind), names in held.items():
        more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
        verb, it = ("is at its", "it") if len(names) == 1 else ("are at their", "them")
        # A weight of 0 is an answer: the search did without the model.
        fix = f"the winner does without {it}" if kind == "weight" and bound == 0 else f"widen {it}"
        notes.append(f"{', '.join(names[:MOST_NAMED])}{more} {verb} {side} bound {bound:g}: {fix}")
    return notes


# --- the page ---------------------------------------------------------------------------------------------------------------------


def _notes(notes: Sequence[str]) -> str:
    return f"<ul class=notes>{''.join(f'<li>{html.escape(note)}</li>' for note in notes)}</ul>" if notes else ""


def _errors(errors: Table | None) -> list[str]:
    return ["<h2>Errors</h2>", errors.as_html()] if errors else []


def _marked(request: Search, scores: Mapping[str, Any]) -> str:
    """What is taken to be best in the columns of the scoreboard."""
    metrics = dict.fromkeys([request.metric, *scores["base"][request.report_split]])
    high, low = ([m for m in metrics if direction(request, m) == sign] for sign in (1.0, -1.0))
    kinds = [f"the {end} {', '.join(names)}" for end, names in (("highest", high), ("lowest", low)) if names]
    return f"Bold: best of its column ({'; '.join(kinds)})."


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    if minutes < 2:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60:02} min"


def _image(png: bytes, alt: str) -> str:
    return f"<div class=wide><img alt='{html.escape(alt)}' src='data:image/png;base64,{base64.b64encode(png).decode()}'></div>"


def _page(title: str, sections: Sequence[str]) -> bytes:
    """One file that needs no other, and no network."""
    head = f"<meta charset=utf-8><meta name=viewport content='width=device-width, initial-scale=1'><title>{title}</title>"
    page = f"<!doctype html><html lang=en><head>{head}<style>{_STYLE}</style></head><body><h1>{title}</h1>"
    return (page + "\n".join(sections) + "</body></html>\n").encode()
