"""What a search leaves for people and for their tools: a table of all candidates, plots, and one page that shows both."""

from __future__ import annotations

import base64
import html
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pcb_ray.search import plots
from pcb_ray.search.request import Config, Search, Space
from pcb_ray.search.tables import Record, error_table, grid_table, scoreboard, shown_score, winner_tables, write_table

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 70em; padding: 0 1em; color: #222; }
table { border-collapse: collapse; margin: 1em 0; } th, td { padding: .25em .8em; text-align: right; border-bottom: 1px solid #ddd; }
th:first-child { text-align: left; } td.best { font-weight: bold; }
img { max-width: 100%; } pre { background: #f6f6f6; padding: 1em; }
"""


def write_search(folder: Path, request: Search, space: Space, records: Sequence[Record], found: Mapping[str, Any]) -> None:
    """trials.parquet, the plots as PNG, and report.html."""
    write_table(folder / "trials.parquet", records)
    best, scores, split = found["best"], found["scores"], request.search_split
    count = f"{found['trials']} candidates" + (f", {found['failed']} of them failed" if found["failed"] else "")
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
    for name, (_, data, _) in told.items():
        (folder / name).write_bytes(data)
    errors = error_table(records)
    sections = [
        f"<p>{count}, {found['elapsed_s']:.0f} s.</p>",
        scoreboard(request, found["scores"]).as_html(),
        "<h2>Coefficients of the winner</h2>",
        *(f"<p>{html.escape(about)}</p>{table.as_html()}" for about, table in winner_tables(space, found["best"])),
        *(f"<h2>{title}</h2>{_image(data, text)}" for title, data, text in told.values()),
        *(["<h2>Errors</h2>", errors.as_html()] if errors else []),
        f"<h2>Recipe of the winner</h2><pre>{html.escape(found['recipe'].to_yaml())}</pre>",
    ]
    _write_page(folder, "Search of merge coefficients", sections)


def write_sweep(
    folder: Path, request: Search, points: Sequence[Config], records: Sequence[Record], base: Mapping[str, Any]
) -> None:
    """sweep.parquet, sweep.png (a heat map, or a line for one axis), and report.html."""
    write_table(folder / "sweep.parquet", records)
    on_base = base[request.search_split][request.metric]
    plot = plots.sweep(request, records, on_base)
    (folder / "sweep.png").write_bytes(plot)
    table, errors = grid_table(request, records), error_table(records)
    failed = sum(bool(r["error"]) for r in records)
    count = f"{len(records)} points over {', '.join(points[0])}" + (f", {failed} of them failed" if failed else "")
    best, (score,) = next(iter(table.rows.items()))
    text = (
        f"{request.metric} on {request.search_split} of {count}. Best: {best}, with {score}; the base has {shown_score(on_base)}."
    )
    sections = [
        f"<p>{html.escape(text)}</p>",
        _image(plot, text),
        table.as_html(),
        *(["<h2>Errors</h2>", errors.as_html()] if errors else []),
    ]
    _write_page(folder, "Sweep", sections)


# --- the page -----------------------------------------------------------------------------------------------------------------------


def _image(png: bytes, alt: str) -> str:
    return f"<div class=wide><img alt='{html.escape(alt)}' src='data:image/png;base64,{base64.b64encode(png).decode()}'></div>"


def _write_page(folder: Path, title: str, sections: Sequence[str]) -> None:
    page = f"<!doctype html><html lang=en><meta charset=utf-8><title>{title}</title><style>{_STYLE}</style><h1>{title}</h1>"
    (folder / "report.html").write_text(page + "\n".join(sections) + "</html>\n", encoding="utf-8")
