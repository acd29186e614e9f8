"""The plots of a search and of a sweep, as PNG: all of matplotlib, and none of pyplot, whose state belongs to the caller."""

from __future__ import annotations

import functools
import io
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from pcb_ray.searching.request import Bounds, Config, Search, Space, share_of, weight_name
from pcb_ray.searching.results import Found
from pcb_ray.searching.tables import Record, shown_score

# Told apart by colour-blind readers (Okabe and Ito). A colour per model; more models than colours are not drawn as lines.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
BLUE, ORANGE, GREY = COLOURS[0], COLOURS[1], "#8a8a8a"
_STAR = {"marker": "*", "ms": 13, "mec": "black", "mew": 0.8, "clip_on": False, "zorder": 4, "color": ORANGE}  # what won
MOST_PANELS = 6  # of groups, with a line per model in each; more are a heat map
MOST_AXES = 12  # of parallel coordinates side by side; more go on below
WIDTH = 9.0  # inches, of all plots: their letters are of one size on the page


def _plot(draw: Callable[..., Figure]) -> Callable[..., bytes]:
    """What it draws, as PNG. A `$` in a name of a model is no mathematics."""

    @functools.wraps(draw)
    def drawn(*args: Any, **kwargs: Any) -> bytes:
        buffer = io.BytesIO()
        with matplotlib.rc_context({"text.parse_math": False}):
            draw(*args, **kwargs).savefig(buffer, format="png", dpi=130)
        return buffer.getvalue()

    return drawn


@_plot
def best_so_far(request: Search, records: Sequence[Record], found: Found) -> Figure:
    """The scores in the order asked, and the best so far. Ruined merges stand at the edge."""
    figure, [[axis]] = _figure(3.6)
    scored = [r for r in records if not r["error"]]
    split, good = request.search_split, request.better
    lines = {name: found.scores[name][split].get(request.metric, math.nan) for name in ("base", "start")}
    experts = {name: s[split].get(request.metric, math.nan) for name, s in found.scores.items() if name not in (*lines, "winner")}
    expert = max((n for n, v in experts.items() if math.isfinite(v)), key=lambda n: good * experts[n], default=None)
    lines |= {} if expert is None else {f"best expert {expert}": experts[expert]}
    edge, top = _range(request, [r["objective"] for r in scored], lines.values())

    within, beyond = ([r for r in scored if (good * (r["objective"] - edge) >= 0) == is_within] for is_within in (True, False))
    failed = [r for r in records if r["error"]]
    axis.plot([r["number"] for r in within], [r["objective"] for r in within], "o", ms=4, color=GREY, label="candidate")
    down, at_edge = "v" if good > 0 else "^", {"clip_on": False, "ls": "", "zorder": 3}
    for rows, marker, what in (beyond, down, "worse than is shown"), (failed, "x", "failed"):
        if rows:
            numbers = [r["number"] for r in rows]
            axis.plot(numbers, [edge] * len(rows), marker=marker, color=GREY, label=f"{len(rows)} {what}", **at_edge)
    best, line = -math.inf, []
    for r in scored:
        best = max(best, good * r["objective"])
        line.append(good * best)
    axis.step(
        [*(r["number"] for r in scored), records[-1]["number"]],
        [*line, good * best],
        where="post",
        color=BLUE,
        label=f"best so far {shown_score(good * best)}",
    )
    if (winner := _number_of(records, found.best)) is not None:
        score = found.scores["winner"][split][request.metric]
        axis.plot(winner, score, label=f"winner {shown_score(score)}", ls="", **_STAR)
    for (name, value), style, colour in zip(lines.items(), (":", "--", "-."), (ORANGE, ORANGE, COLOURS[2]), strict=False):
        _reference(axis, name, value, (edge, top), ls=style, color=colour)
    axis.set(xlabel="candidate", ylabel=_score_name(request))
    axis.set_ylim(*sorted((edge, top)))
    axis.ticklabel_format(axis="y", useOffset=False)
    axis.xaxis.get_major_locator().set_params(integer=True)
    _legend(figure, axis)
    return figure


@_plot
def coefficients(request: Search, space: Space, records: Sequence[Record], best: Config) -> Figure:
    """The candidates in the order asked: few models and groups as lines, many as a heat map of what generations were like."""
    lines = len(space.labels) <= len(COLOURS) and len(space.groups) <= MOST_PANELS
    return (_coefficient_lines if lines else _coefficient_heat)(request, space, records, best)


def _parameters(space: Space) -> list[str]:
    """The method's parameters that are searched."""
    return [name for name in (space.scale, space.share) if name in space.bounds]


def _coefficient_lines(request: Search, space: Space, records: Sequence[Record], best: Config) -> Figure:
    """A panel per group with a line per model, and one for each parameter of the method and the variant."""
    panels = [(g, {label: weight_name(label, g, space.groups) for label in space.labels}) for g in space.groups]
    panels = panels if len(panels) > 1 else [("lambda_i", panels[0][1])]
    panels += [(name, {"": name}) for name in _parameters(space)]
    panels += [("variant", {})] if space.variants else []
    columns = min(2, len(panels))
    figure, grid = _figure(3.6 if columns == 1 else 0.3 + 2.2 * math.ceil(len(panels) / 2), math.ceil(len(panels) / 2), columns)
    axes = [axis for row in grid for axis in row]
    for axis in axes[len(panels) :]:
        axis.remove()
    winner, parts = _number_of(records, best), _generations(request, records)
    middles = [(part[0]["number"] + part[-1]["number"]) / 2 for part in parts]
    for axis, (title, names) in zip(axes, panels, strict=False):
        axis.set_title(_text(title, 60), loc="left", fontsize=10)
        if not names:
            _variants_over_time(axis, space, records, best)
            continue
        for (label, name), colour in zip(names.items(), [GREY] if "" in names else COLOURS, strict=False):
            b = space.bounds[name]
            for marker, rows in _by_outcome(records):
                values = [r["config"][name] for r in rows]
                axis.plot([r["number"] for r in rows], values, marker, ms=3, alpha=0.4, color=colour, clip_on=False)
            means = [math.fsum(r["config"][name] for r in part) / len(part) for part in parts]
            axis.plot(middles, means, color=colour, lw=1.8, label=_text(label, 40) if label else None)
            if winner is not None:
                axis.plot(winner, best[name], **_STAR | {"color": colour})
        axis.axhline(b.init, color=GREY, ls="--", lw=0.8)
        if b.is_log:
            axis.set_yscale("log", subs=())
            axis.set_yticks(ticks := sorted({b.lower, b.init, b.upper}), [f"{t:g}" for t in ticks])
        axis.set_ylim(b.lower, b.upper)
        axis.set_xlim(-1, len(records))
    for axis in axes[len(panels) - columns : len(panels)]:  # the lowest of each column
        axis.set_xlabel("candidate")
    _legend(figure, axes[0], title="line: mean of a generation; dashed: the start; star: the winner; x: failed")
    return figure


def _coefficient_heat(request: Search, space: Space, records: Sequence[Record], best: Config) -> Figure:
    """A panel per model with a row per group, a panel for what models share; the winner's values at the right."""
    panels = [(label, {g: weight_name(label, g, space.groups) for g in space.groups}) for label in space.labels]
    if len(space.groups) == 1:
        panels = [("lambda_i", {label: weight_name(label, space.groups[0], space.groups) for label in space.labels})]
    shared = {name: name for name in _parameters(space)}
    panels += [("all models", shared)] if shared else []
    heights = [len(names) for _, names in panels] + [len(space.variants)] * bool(space.variants)
    figure, grid = _figure(1.2 + 0.3 * len(heights) + 0.17 * sum(heights), len(heights), 1, height_ratios=heights, sharex=True)
    parts = _generations(request, records)
    edges = [part[0]["number"] for part in parts] + [records[-1]["number"] + 1]
    for [axis], (title, names) in zip(grid, panels, strict=False):
        axis.spines[:].set_visible(False)
        drift = [[sum(_drift(space.bounds[n], r["config"][n]) for r in part) / len(part) for part in parts] for n in names.values()]
        rows = range(len(names))
        image = axis.pcolormesh(edges, [k - 0.5 for k in range(len(names) + 1)], drift, vmin=-1, vmax=1, cmap="RdBu")
        axis.set_yticks(rows, [_text(label, 60) for label in names], fontsize=7)
        axis.invert_yaxis()
        axis.tick_params(length=0)
        axis.set_title(_text(title, 70), loc="left", fontsize=9)
        for y, name in zip(rows, names.values(), strict=True):
            axis.text(1.01, y, f"{best[name]:.3g}", transform=axis.get_yaxis_transform(), va="center", fontsize=7)
    grid[0][0].set_title("winner", loc="right", fontsize=9)
    if space.variants:
        grid[-1][0].set_title("variant", loc="left", fontsize=9)
        _variants_over_time(grid[-1][0], space, records, best)
    grid[-1][0].set_xlabel("candidate (colour: mean of a generation)")
    bar = figure.colorbar(image, ax=[row[0] for row in grid], location="bottom", aspect=60, pad=0.01)
    bar.set_ticks([-1, 0, 1], labels=["lower bound", "start", "upper bound"])
    bar.ax.tick_params(labelsize=8)
    bar.outline.set_visible(False)
    return figure


def _variants_over_time(axis: Any, space: Space, records: Sequence[Record], best: Config) -> None:
    for marker, rows in _by_outcome(records):
        places = [space.variants.index(r["config"]["variant"]) for r in rows]
        axis.plot([r["number"] for r in rows], places, marker, ms=3.5, color=GREY)
    if (winner := _number_of(records, best)) is not None:
        axis.plot(winner, space.variants.index(best["variant"]), **_STAR | {"color": GREY})
    axis.set_yticks(range(len(space.variants)), space.variants)
    axis.set_ylim(-0.5, len(space.variants) - 0.5)
    axis.set_xlim(-1, len(records))


@_plot
def parallel(request: Search, space: Space, records: Sequence[Record], found: Found) -> Figure:
    """Parallel coordinates: a line per candidate, the better the darker; the last axis is the score."""
    scored = sorted((r for r in records if not r["error"]), key=lambda r: request.better * r["objective"])
    edge, top = _range(request, [r["objective"] for r in scored], ())
    names = [*space.bounds, *(["variant"] if space.variants else []), "score"]
    of_winner = found.scores["winner"][request.search_split].get(request.metric, math.nan)

    def heights(config: Config, score: float) -> list[float]:
        where = {name: share_of(b, config[name]) for name, b in space.bounds.items()}
        if space.variants:
            where["variant"] = space.variants.index(config["variant"]) / (len(space.variants) - 1)
        share = (score - edge) / (top - edge)
        return [*where.values(), 0.0 if share < 0 else share]  # NaN, of one that failed, is not drawn

    colours = matplotlib.colormaps["viridis_r"]
    lines: list[tuple[list[float], dict[str, Any]]] = [
        (heights(r["config"], math.nan), {"color": GREY, "lw": 0.8, "ls": ":"}) for r in records if r["error"]
    ]
    for place, r in enumerate(scored):
        share = place / max(1, len(scored) - 1)
        lines.append((heights(r["config"], r["objective"]), {"color": colours(share), "lw": 0.9, "alpha": 0.3 + 0.5 * share}))
    lines.append((heights(found.best, of_winner), {"color": ORANGE, "lw": 2.5}))

    count = math.ceil(len(names) / MOST_AXES)
    per_row = math.ceil(len(names) / count)
    shown = [_wrapped(_score_name(request) if n == "score" else n.removeprefix("weight."), 130 // per_row) for n in names]
    of_names = 0.14 * (1 + max(label.count("\n") for label in shown))
    figure, grid = _figure(0.4 + (3.2 if count == 1 else 2.4) * count + of_names * count, count)
    for row, [axis] in enumerate(grid):
        part = slice(row * per_row, (row + 1) * per_row)
        here = names[part]
        axis.spines[:].set_visible(False)
        for line, style in lines:
            axis.plot(line[part], marker="." if len(here) == 1 else "", **style)
        axis.set_xticks(range(len(here)), shown[part], fontsize=8)
        axis.set(xlim=(-0.3, per_row - 0.7), ylim=(-0.06, 1.06), yticks=[])
        axis.tick_params(length=0)
        for x, name in enumerate(here):
            axis.plot([x, x], [0, 1], color="black", lw=0.8, zorder=3)
            for y, text in _marks(space, name, (edge, top)):
                axis.annotate(text, (x, y), **_beside(y, is_inner=name == "variant"))
    figure.suptitle("orange: the winner; darker: better; dotted: failed", fontsize=9, x=0.01, ha="left")
    return figure


def _marks(space: Space, name: str, of_score: tuple[float, float]) -> Iterable[tuple[float, str]]:
    """What stands at the ends of an axis of parallel coordinates; of variants, at each."""
    if name == "variant":
        return [(k / (len(space.variants) - 1), text) for k, text in enumerate(space.variants)]
    if name == "score":
        return [(0.0, shown_score(of_score[0])), (1.0, shown_score(of_score[1]))]
    return [(0.0, f"{space.bounds[name].lower:g}"), (1.0, f"{space.bounds[name].upper:g}")]


def _beside(y: float, *, is_inner: bool) -> dict[str, Any]:
    """Where a text stands: below an end, above an end; right of the axis where there may be others."""
    x, up, ha, va = (4, 0, "left", "center") if is_inner else (0, -3, "center", "top") if y == 0 else (0, 3, "center", "bottom")
    box = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.8}
    return {"xytext": (x, up), "textcoords": "offset points", "ha": ha, "va": va, "fontsize": 8, "bbox": box, "zorder": 5}


@_plot
def sweep(request: Search, records: Sequence[Record], base: float) -> Figure:
    """Over share and scale, a heat map per variant; over one of them, a line per variant; over variants alone, points."""
    axes = {name: sorted({r["config"][name] for r in records if name in r["config"]}) for name in (request.share, request.scale)}
    axes = {name: values for name, values in axes.items() if len(values) > 1}
    variants = list(dict.fromkeys(r["config"].get("variant", "") for r in records))
    at = {(r["config"].get("variant", ""), *(r["config"][name] for name in axes)): r["objective"] for r in records}
    return (_heat_maps if len(axes) == 2 else _grid_lines)(request, axes, variants, at, base)


def _heat_maps(
    request: Search, axes: Mapping[str, Sequence[float]], variants: Sequence[str], at: Mapping[tuple[Any, ...], float], base: float
) -> Figure:
    densities, lambdas = axes.values()
    fit = max(1, min(len(variants), int((WIDTH - 1) // (0.5 + 0.65 * len(densities)))))
    rows = math.ceil(len(variants) / fit)
    figure, grid = _figure(rows * (1.2 + 0.32 * max(4, len(lambdas))), rows, fit, sharex=True, sharey=True)
    panels = [axis for row in grid for axis in row]
    for axis in panels[len(variants) :]:
        axis.remove()
    finite = [v for v in at.values() if math.isfinite(v)]
    worst, _ = _range(request, finite, ())
    best_at = _best_of(request, at)
    best = at[best_at]
    lowest, highest = (max(worst, min(finite)), best) if request.better > 0 else (best, min(worst, max(finite)))
    clipped = "neither" if lowest <= min(finite) and max(finite) <= highest else "min" if request.better > 0 else "max"
    norm = Normalize(lowest, highest if highest > lowest else lowest + 1)
    colours = matplotlib.colormaps["viridis_r" if request.better > 0 else "viridis"]
    size = min(8.0, 15 * ((WIDTH - 1) / fit - 0.5) / len(densities))  # points, so that eight letters fit into a cell
    for axis, variant in zip(panels, variants, strict=False):
        values = [[at[variant, d, k] for d in densities] for k in lambdas]
        axis.patch.set(hatch="////", facecolor="#f4f4f4", edgecolor="#cccccc")  # where nothing is drawn: failed
        axis.imshow(values, origin="lower", aspect="auto", norm=norm, cmap=colours)
        for y, row in enumerate(values):
            for x, value in enumerate(row):
                is_best, failed = (variant, densities[x], lambdas[y]) == best_at, not math.isfinite(value)
                r, g, b, _ = colours(norm(value))
                colour = "#555555" if failed else "white" if 0.3 * r + 0.6 * g + 0.1 * b < 0.5 else "black"
                text = "failed" if failed else shown_score(value)
                axis.text(x, y, text, ha="center", va="center", color=colour, fontsize=size, weight="bold" if is_best else "normal")
                if is_best:
                    axis.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, fill=False, edgecolor=ORANGE, lw=3, clip_on=False, zorder=4))
        axis.set_xticks(range(len(densities)), [f"{d:g}" for d in densities])
        axis.set_yticks(range(len(lambdas)), [f"{k:g}" for k in lambdas])
        axis.set(xlabel=request.share, ylabel=request.scale, title=variant)
        axis.label_outer()
    image = ScalarMappable(norm, colours)
    figure.colorbar(image, ax=panels[: len(variants)], label=_score_name(request), extend=clipped)
    figure.suptitle(f"orange: the best; darker: better; base {shown_score(base)}", fontsize=9, x=0.01, ha="left")
    return figure


def _grid_lines(
    request: Search, axes: Mapping[str, Sequence[float]], variants: Sequence[str], at: Mapping[tuple[Any, ...], float], base: float
) -> Figure:
    figure, [[axis]] = _figure(3.6)
    edge, top = _range(request, [v for v in at.values() if math.isfinite(v)], [base])
    name, places = next(iter(axes.items()), ("variant" if any(variants) else "", range(len(variants))))
    series = {v: [at[v, x] for x in places] for v in variants} if axes else {"": [at[v,] for v in variants]}
    for (variant, values), colour in zip(series.items(), COLOURS, strict=False):
        axis.plot(places, values, "o-" if axes else "o", color=colour, label=variant or None)
        for x, value in zip(places, values, strict=True):
            ruined = request.better * (value - edge) < 0
            if ruined or not math.isfinite(value):
                marker = "x" if not ruined else "v" if request.better > 0 else "^"
                axis.plot(x, edge, marker, color=colour, clip_on=False, zorder=3)
                text = shown_score(value) if ruined else "failed"
                axis.annotate(text, (x, edge), xytext=(0, 6), textcoords="offset points", ha="center", fontsize=8)
    best = _best_of(request, at)
    x = best[1] if axes else variants.index(best[0])
    axis.plot(x, at[best], ls="", label=f"best {shown_score(at[best])}", **_STAR)
    _reference(axis, "base", base, (edge, top), ls=":", color=ORANGE)
    if name and name == request.share:
        axis.set_xscale("log", subs=())
    axis.set_xticks(places, [f"{x:g}" for x in places] if axes else variants)
    axis.set(xlabel=name, ylabel=_score_name(request), ylim=sorted((edge, top)))
    axis.ticklabel_format(axis="y", useOffset=False)
    _legend(figure, axis)
    return figure


def _best_of(request: Search, at: Mapping[tuple[Any, ...], float]) -> tuple[Any, ...]:
    return max((point for point, v in at.items() if math.isfinite(v)), key=lambda point: request.better * at[point])


# --- what plots share -------------------------------------------------------------------------------------------------------------


def _figure(height: float, rows: int = 1, columns: int = 1, **shared: Any) -> tuple[Figure, Any]:
    """A figure, and its axes as rows of columns."""
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    FigureCanvasAgg(figure)
    grid: Any = figure.subplots(rows, columns, squeeze=False, **shared)
    for axis in grid.flat:
        axis.spines[["top", "right"]].set_visible(False)
    return figure, grid


def _reference(axis: Any, name: str, value: float, limits: tuple[float, float], **style: Any) -> None:
    """A score to compare with, as a line; one that is out of sight is named in the legend all the same."""
    if math.isfinite(value):
        aside = "" if min(limits) <= value <= max(limits) else " (not shown)"
        axis.axhline(value, lw=1.2, label=f"{_text(name, 60)} {shown_score(value)}{aside}", **style)


def _legend(figure: Figure, axis: Any, title: str | None = None) -> None:
    """Put a legend below the plots, which keep their size: the figure grows. Long names take fewer columns."""
    handles, labels = axis.get_legend_handles_labels()
    columns = max(1, min(len(labels), int(105 // (8 + max(map(len, labels), default=0)))))
    figure.set_figheight(figure.get_figheight() + 0.22 * (math.ceil(len(labels) / columns) + bool(title)))
    figure.legend(
        handles, labels, loc="outside lower center", frameon=False, ncols=columns, fontsize=9, title=title, title_fontsize=8
    )


def _score_name(request: Search) -> str:
    return f"{request.metric} ({request.search_split})"


def _range(request: Search, scores: Sequence[float], lines: Iterable[float]) -> tuple[float, float]:
    """The worst and the best score that a plot has room for. Ruined merges, far below the lower quartile, would leave the others
    none; nor is it for lines far away from the better ones."""
    goodness = sorted(request.better * s for s in scores)
    quartile, best = goodness[len(goodness) // 4], goodness[-1]
    span = best - quartile or abs(best) or 1.0
    near = [x for x in (request.better * line for line in lines) if quartile - 3 * span <= x <= best + 3 * span]  # not NaN
    low, high = min(quartile, *near, best), max(best, *near, quartile)
    room = 0.25 * (high - low or span)
    return request.better * max(low - room, min(low, goodness[0]) - room / 4), request.better * (high + room / 4)


def _generations(request: Search, records: Sequence[Record]) -> list[Sequence[Record]]:
    return [records[at : at + request.population] for at in range(0, len(records), request.population)]


def _by_outcome(records: Sequence[Record]) -> Iterable[tuple[str, Sequence[Record]]]:
    """A marker, and the candidates that have it: with a score and without.

    It is None without any, since a line of no points upsets the layout."""
    parts = [("o", [r for r in records if not r["error"]]), ("x", [r for r in records if r["error"]])]
    return [(marker, part) for marker, part in parts if part]


def _number_of(records: Sequence[Record], config: Config) -> int | None:
    return next((r["number"] for r in records if r["config"] == config), None)


def _drift(b: Bounds, value: float) -> float:
    """How far a value is from the start: -1 at the lower bound, 1 at the upper."""
    of_start = share_of(b, b.init)
    moved = share_of(b, value) - of_start
    return moved / (of_start if moved < 0 else 1 - of_start) if moved else 0.0


def _text(name: str, most: int) -> str:
    """A name as matplotlib takes it: what begins with an underscore would not be in a legend. A long one loses its middle."""
    name = name if len(name) <= most else f"{name[: most // 2]}…{name[-(most // 2 - 1) :]}"
    return f" {name}" if name.startswith("_") else name


def _wrapped(name: str, width: int) -> str:
    """A text in lines of at most `width`, broken after the punctuation of names where there is some."""
    lines = [""]
    for piece in re.findall(rf"[^-_./ ]{{1,{width - 1}}}[-_./ ]?|[-_./ ]", name):
        lines = [*lines[:-1], lines[-1] + piece] if len(lines[-1] + piece) <= width else [*lines, piece]
    return "\n".join(lines)
