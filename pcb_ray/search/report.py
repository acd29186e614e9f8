"""What a search leaves for people and for their tools: a table of all candidates, plots, and one page that shows both."""

from __future__ import annotations

import base64
import html
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from pcb_ray.search.request import Config, Search, Space
from pcb_ray.search.tables import Record, error_table, grid_table, scoreboard, shown_score, winner_tables, write_table

BLUE, ORANGE, GREY = "#0072b2", "#d55e00", "#8a8a8a"  # told apart by colour-blind readers (Okabe and Ito)

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 70em; padding: 0 1em; color: #222; }
table { border-collapse: collapse; margin: 1em 0; } th, td { padding: .25em .8em; text-align: right; border-bottom: 1px solid #ddd; }
th:first-child { text-align: left; } td.best { font-weight: bold; }
img { max-width: 100%; } pre { background: #f6f6f6; padding: 1em; }
"""


def write_search(folder: Path, request: Search, space: Space, records: Sequence[Record], found: Mapping[str, Any]) -> None:
    """trials.parquet, the plots as PNG, and report.html."""
    write_table(folder / "trials.parquet", records)
    plots = {
        "best_so_far.png": ("Best so far", _best_so_far(request, records, found)),
        "coefficients.png": ("Coefficients over time", _coefficients(request, space, records)),
        "parallel.png": ("All candidates", _parallel(request, space, records)),
    }
    for name, (_, data) in plots.items():
        (folder / name).write_bytes(data)
    errors = error_table(records)
    sections = [
        f"<p>{found['trials']} candidates, {found['failed']} failed, {found['elapsed_s']:.0f} s.</p>",
        scoreboard(request, found["scores"]).as_html(),
        "<h2>Coefficients of the winner</h2>",
        *(f"<p>{html.escape(about)}</p>{table.as_html()}" for about, table in winner_tables(space, found["best"])),
        *(
            f"<h2>{title}</h2><img alt='{title}' src='data:image/png;base64,{base64.b64encode(data).decode()}'>"
            for title, data in plots.values()
        ),
        *(["<h2>Errors</h2>", errors.as_html()] if errors else []),
        f"<h2>Recipe of the winner</h2><pre>{html.escape(found['recipe'].to_yaml())}</pre>",
    ]
    _write_page(folder, "Search of merge coefficients", sections)


def write_sweep(
    folder: Path, request: Search, points: Sequence[Config], records: Sequence[Record], base: Mapping[str, Any]
) -> None:
    """sweep.parquet, sweep.png (a heat map, or a line for one axis), and report.html."""
    write_table(folder / "sweep.parquet", records)
    plot = _heat_map(request, points, records)
    (folder / "sweep.png").write_bytes(plot)
    errors = error_table(records)
    on_base = base[request.search_split][request.metric]
    sections = [
        f"<p>{len(records)} points, {request.metric} on {html.escape(request.search_split)}; base {shown_score(on_base)}.</p>",
        f"<img alt='heat map' src='data:image/png;base64,{base64.b64encode(plot).decode()}'>",
        grid_table(request, records).as_html(),
        *(["<h2>Errors</h2>", errors.as_html()] if errors else []),
    ]
    _write_page(folder, "Sweep", sections)


# --- the page -----------------------------------------------------------------------------------------------------------------------


def _write_page(folder: Path, title: str, sections: Sequence[str]) -> None:
    page = f"<!doctype html><html lang=en><meta charset=utf-8><title>{title}</title><style>{_STYLE}</style><h1>{title}</h1>"
    (folder / "report.html").write_text(page + "\n".join(sections) + "</html>\n", encoding="utf-8")


# --- plots --------------------------------------------------------------------------------------------------------------------------


def _figure(width: float, height: float, columns: int = 1) -> Any:
    """A figure and its axes; without pyplot, whose state belongs to the caller."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, columns, squeeze=False)[0]
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    return buffer.getvalue()


def _best_so_far(request: Search, records: Sequence[Record], found: Mapping[str, Any]) -> bytes:
    """The scores, and the best so far. Far below base and lower quartile they stand at the edge: ruined merges would leave the others no room."""
    figure, (axis,) = _figure(8, 4)
    scored = [r for r in records if not r["error"]]
    lines = {name: found["scores"][name][request.search_split].get(request.metric, math.nan) for name in ("base", "start")}
    goodness = sorted(request.better * r["objective"] for r in scored)
    shown = [goodness[-1], goodness[len(goodness) // 4], *(request.better * x for x in (lines["base"],) if math.isfinite(x))]
    room = (max(shown) - min(shown) or abs(max(shown)) or 1.0) * 0.25
    edge = request.better * max(min(shown) - room, min(*shown, *goodness) - room / 4)
    beyond = [r for r in scored if request.better * (r["objective"] - edge) < 0]
    within = [r for r in scored if r not in beyond]
    axis.plot([r["number"] for r in within], [r["objective"] for r in within], "o", ms=4, color=GREY, label="candidates")
    if beyond:
        marker = "v" if request.better > 0 else "^"
        label = f"{len(beyond)} worse than is shown"
        axis.plot([r["number"] for r in beyond], [edge] * len(beyond), marker, ms=6, color=GREY, clip_on=False, label=label)
    best, line = -math.inf, []
    for r in scored:
        best = max(best, request.better * r["objective"])
        line.append(request.better * best)
    axis.step([r["number"] for r in scored], line, where="post", color=BLUE, label="best so far")
    for (name, value), style in zip(lines.items(), (":", "--"), strict=True):
        axis.axhline(value, ls=style, lw=1, color=ORANGE, label=f"{name} {value:.5g}")
    axis.set(xlabel="candidate", ylabel=f"{request.metric} ({request.search_split})")
    axis.set_ylim(*sorted((edge, request.better * (max(shown) + room / 4))))
    axis.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return _png(figure)


def _coefficients(request: Search, space: Space, records: Sequence[Record]) -> bytes:
    figure, (axis,) = _figure(8, 4)
    numbers = [r["number"] for r in records]
    names = list(space.bounds)
    for name in names:
        axis.plot(numbers, [r["config"][name] for r in records], "o", ms=2.5, alpha=0.35)
        colour = axis.lines[-1].get_color()
        means = [sum(r["config"][name] for r in part) / len(part) for part in _generations(records, request.population)]
        middles = [sum(r["number"] for r in part) / len(part) for part in _generations(records, request.population)]
        axis.plot(middles, means, color=colour, lw=1.6, label=name if len(names) <= 16 else None)
    axis.set(xlabel="candidate", ylabel="coefficient (line: mean of a generation)")
    if len(names) <= 16:
        axis.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return _png(figure)


def _generations(records: Sequence[Record], size: int) -> list[Sequence[Record]]:
    return [records[at : at + size] for at in range(0, len(records), size)]


def _parallel(request: Search, space: Space, records: Sequence[Record]) -> bytes:
    """Parallel coordinates: a line per candidate, the better the darker."""
    names = list(space.bounds)
    figure, (axis,) = _figure(max(6.0, 1.1 * len(names) + 2), 4.5)
    scored = sorted((r for r in records if not r["error"]), key=lambda r: request.better * r["objective"])
    colours = colormaps["viridis_r"]
    for place, r in enumerate(scored):
        heights = [(r["config"][n] - space.bounds[n].lower) / (space.bounds[n].upper - space.bounds[n].lower) for n in names]
        share = place / max(1, len(scored) - 1)
        last = place == len(scored) - 1
        axis.plot(
            heights, color=ORANGE if last else colours(share), lw=2.5 if last else 0.9, alpha=1.0 if last else 0.3 + 0.5 * share
        )
    axis.set_xticks(range(len(names)), [f"{n}\n[{space.bounds[n].lower:g}, {space.bounds[n].upper:g}]" for n in names], fontsize=8)
    if len(names) > 8:
        axis.tick_params(axis="x", rotation=60)
    axis.set_yticks([])
    axis.set_title("orange: the best candidate; darker: better", fontsize=9, loc="left")
    return _png(figure)


def _heat_map(request: Search, points: Sequence[Config], records: Sequence[Record]) -> bytes:
    """One panel per variant: density across, lambda upwards; with one of them alone, a line per variant."""
    axes_of = {name: sorted({p[name] for p in points if name in p}) for name in ("density", "lambda")}
    variants = list(dict.fromkeys(p.get("variant", "") for p in points))
    value = {
        (r["config"].get("variant", ""), r["config"].get("density"), r["config"].get("lambda")): r["objective"] for r in records
    }
    names = [name for name, values in axes_of.items() if values]
    if len(names) == 2:
        figure, axes = _figure(4.2 * len(variants) + 1, 3.8, len(variants))
        finite = [v for v in value.values() if math.isfinite(v)]
        for axis, variant in zip(axes, variants, strict=True):
            rows = [[value.get((variant, d, k), math.nan) for d in axes_of["density"]] for k in axes_of["lambda"]]
            image = axis.imshow(
                rows, origin="lower", aspect="auto", vmin=min(finite, default=0), vmax=max(finite, default=1), cmap="viridis"
            )
            for y, row in enumerate(rows):
                for x, cell in enumerate(row):
                    axis.text(x, y, f"{cell:.4g}", ha="center", va="center", color="white", fontsize=8)
            axis.set_xticks(range(len(axes_of["density"])), [f"{d:g}" for d in axes_of["density"]])
            axis.set_yticks(range(len(axes_of["lambda"])), [f"{k:g}" for k in axes_of["lambda"]])
            axis.set(xlabel="density", ylabel="lambda", title=variant)
        figure.colorbar(image, ax=list(axes), label=f"{request.metric} ({request.search_split})")
        return _png(figure)
    figure, (axis,) = _figure(7, 4)
    if not names:
        axis.bar(variants, [value[variant, None, None] for variant in variants], color=BLUE)
    for variant in variants if names else ():
        xs = axes_of[names[0]]
        keys = [(variant, x, None) if names[0] == "density" else (variant, None, x) for x in xs]
        axis.plot(xs, [value.get(key, math.nan) for key in keys], "o-", label=variant or None)
    axis.set(xlabel=names[0] if names else "variant", ylabel=f"{request.metric} ({request.search_split})")
    if any(variants) and names:
        axis.legend(frameon=False)
    return _png(figure)
