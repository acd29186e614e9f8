"""What a search leaves as rows: all candidates for tools, in parquet; what matters for people, in a terminal and on a page."""

from __future__ import annotations

import html
import io
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pcb_ray.searching.request import Config, Search, Space, weight_name

Record = Mapping[str, Any]

_TYPES = {
    "number": pa.int64(),
    "variant": pa.string(),
    "ended": pa.timestamp("ms", tz="UTC"),
    "node": pa.string(),
    "error": pa.string(),
}
_LOWER_IS_BETTER = re.compile(r"loss|perplexity|ppl|error|bits_per", re.IGNORECASE)
_HIGHER_IS_BETTER = re.compile(r"acc|f1|exact_match|bleu|rouge|mcc", re.IGNORECASE)


def table_of(records: Sequence[Record]) -> bytes:
    """A row for each candidate, in parquet.

    number (int64, in the order asked), the coefficients by name (doubles; variant: text), metric.NAME for each that the evaluator
    gave, objective (the one searched by), seconds in all and load_s, apply_s, score_s of them (doubles), ended (UTC, to the
    millisecond), node and error (text; no error is empty). What a candidate that failed lacks is null, as in SQL, where NaN would
    be a score above all others."""
    rows = [
        {
            "number": r["number"],
            **r["config"],
            **{f"metric.{name}": value for name, value in r["metrics"].items()},
            **{k: r.get(k) for k in ("objective", "seconds", "load_s", "apply_s", "score_s")},
            "ended": datetime.fromtimestamp(r["ended"], UTC),
            "node": r.get("node", ""),
            "error": r["error"],
        }
        for r in records
    ]
    names = dict.fromkeys(name for row in rows for name in row)
    columns = {name: [_no_nan(row.get(name)) for row in rows] for name in names}
    # Types by name: guessed from values, a column without any would have none, and one of 0 and 1 would be whole numbers.
    schema = pa.schema([(name, _TYPES.get(name, pa.float64())) for name in names])
    written = io.BytesIO()
    pq.write_table(pa.table(columns, schema=schema), written)
    return written.getvalue()


def _no_nan(value: Any) -> Any:
    return None if isinstance(value, float) and math.isnan(value) else value


@dataclass(frozen=True)
class Table:
    """Texts, for people."""

    header: Sequence[str]
    rows: Mapping[str, Sequence[str]]
    best: frozenset[tuple[str, int]] = frozenset()
    """(row, column) of the cells to mark."""

    def as_text(self) -> str:
        """The table for a terminal; what is best has a star."""
        marked = {column for _, column in self.best}
        rows = {
            name: [cell + ("*" if (name, k) in self.best else " " if k in marked else "") for k, cell in enumerate(row)]
            for name, row in self.rows.items()
        }
        header = [h + (" " if k in marked else "") for k, h in enumerate(self.header)]
        widths = [max(map(len, column)) for column in zip(header, *rows.values(), strict=True)]
        first = max(map(len, rows))
        return "\n".join(
            f"{name:{first}}  {'  '.join(f'{cell:>{w}}' for cell, w in zip(cells, widths, strict=True))}".rstrip()
            for name, cells in [("", header), *rows.items()]
        )

    def as_html(self) -> str:
        head = "".join(f"<th>{html.escape(h)}</th>" for h in ("", *self.header))
        body = "".join(
            f"<tr><th>{html.escape(name)}</th>"
            + "".join(
                f"<td{' class=best' if (name, k) in self.best else ''}>{html.escape(cell)}</td>" for k, cell in enumerate(cells)
            )
            + "</tr>"
            for name, cells in self.rows.items()
        )
        return f"<div class=wide><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"


def shown_score(value: float) -> str:
    """Four decimals, or as many significant digits as serve for what is larger or smaller."""
    if math.isnan(value):
        return "-"
    return f"{value:.4f}" if 0.01 <= abs(value) < 100 or value == 0 else f"{value:.6g}" if abs(value) >= 100 else f"{value:.3g}"


def shown_config(config: Config) -> str:
    return ", ".join(f"{name} {shown_coefficient(value)}" for name, value in config.items())


def shown_coefficient(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:.4g}"


def scoreboard(request: Search, scores: Mapping[str, Mapping[str, Mapping[str, float]]]) -> Table:
    """Base, experts, start and winner: the metric on both splits, and all others on the report split; the best of each column is
    marked."""
    splits = (request.search_split, request.report_split)
    others = [m for m in scores["base"][splits[1]] if m != request.metric]
    columns = [*((request.metric, split) for split in splits), *((m, splits[1]) for m in others)]
    values = {name: [of_split[split].get(m, math.nan) for m, split in columns] for name, of_split in scores.items()}
    best: set[tuple[str, int]] = set()
    for k, (metric, _) in enumerate(columns):
        sign = direction(request, metric)
        top = max((sign * row[k] for row in values.values() if math.isfinite(row[k])), default=None)
        best |= {(name, k) for name, row in values.items() if sign * row[k] == top}
    return Table(
        [f"{m} ({split})" for m, split in columns],
        {name: [shown_score(v) for v in row] for name, row in values.items()},
        frozenset(best),
    )


def direction(request: Search, metric: str) -> float:
    """The sign that makes a metric one to maximise: of those not searched by, what their names say, or else as the one that is."""
    if metric != request.metric and _LOWER_IS_BETTER.search(metric):
        return -1.0
    return 1.0 if metric != request.metric and _HIGHER_IS_BETTER.search(metric) else request.better


def winner_tables(space: Space, best: Config) -> list[tuple[str, Table]]:
    """The winner's coefficients, each with its start and range; those of groups by group and model. With what to say about each
    table."""
    tables, names, start = [], list(best), space.start
    if len(space.groups) > 1:
        weights = {g: [weight_name(label, g, space.groups) for label in space.labels] for g in space.groups}
        cells = {g: [shown_coefficient(best[name]) for name in row] for g, row in weights.items()}
        one = weights[space.groups[0]][0]
        about = f"lambda_i by group and model; start {shown_coefficient(start[one])}, range {_shown_range(space, one)}:"
        tables, names = [(about, Table(space.labels, cells))], [name for name in best if not name.startswith("weight.")]
    rows = {n: [shown_coefficient(best[n]), shown_coefficient(start[n]), _shown_range(space, n)] for n in names}
    return [*tables, *([("For all tensors:", Table(["winner", "start", "range"], rows))] if rows else [])]


def _shown_range(space: Space, name: str) -> str:
    return ", ".join(space.variants) if name == "variant" else f"{space.bounds[name].lower:g} to {space.bounds[name].upper:g}"


def grid_table(request: Search, records: Sequence[Record]) -> Table:
    """The points of a sweep, best first."""
    order = sorted(records, key=lambda r: -request.better * r["objective"] if not r["error"] else math.inf)
    rows = {shown_config(r["config"]): [shown_score(r["objective"]) if not r["error"] else r["error"][:60]] for r in order}
    return Table([request.metric], rows, frozenset({(shown_config(order[0]["config"]), 0)}))


def error_table(records: Sequence[Record]) -> Table | None:
    """The errors, the most frequent first; those that differ in numbers only are one. None if nothing failed."""
    example: dict[str, Record] = {}
    counts = Counter[str]()
    for r in records:
        if r["error"]:
            kind = re.sub(r"0x[0-9a-f]+|\d+(\.\d+)?", "#", r["error"])
            example.setdefault(kind, r)
            counts[kind] += 1
    rows = {example[kind]["error"]: [str(count), str(example[kind]["number"])] for kind, count in counts.most_common()}
    return Table(["candidates", "such as number"], rows) if rows else None
