"""Searches the coefficients of the quickstart's family, beside a grid of as many evaluations.

    .venv/bin/python examples/search.py [--out FOLDER]

The grid has 4 densities and 15 values of lambda, the same for all experts; the search, with a budget of 60, has a lambda_i for each
expert and the density. Both are chosen by mean loss on the validation split; the table is of both splits."""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # idle threads sleep: much faster where the cores are shared

import train_family
import transformers
from quickstart import table
from train_family import HeldOutLoss, is_trained, read_held_out

import pcb_ray

DENSITIES = [0.05, 0.1, 0.2, 0.4]
LAMBDAS = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.2, 1.4, 1.6, 1.8, 2.0]
BUDGET = 60
SEEDS = (0, 1, 2)

Scores = dict[str, dict[str, float]]  # split -> domain or "mean" -> nats per token


def recipe_of(family: Path, domains: list[str], seed: int) -> dict[str, Any]:
    """As it would stand in a file, for `pcb-ray search` and `pcb-ray sweep`."""
    return {
        "merge_method": "pcb",
        "base_model": str(family / "base"),
        "models": [{"model": str(family / domain)} for domain in domains],
        "parameters": {"density": 0.2},
        "sweep": {"density": DENSITIES, "lambda": LAMBDAS},
        "search": {
            "evaluator": {f"{train_family.__file__}:HeldOutLoss": {"family": str(family)}},
            "split": {"search": "validation", "report": "test"},
            "metric": "mean",
            "mode": "min",
            "space": {"density": {"lower": 0.02, "upper": 0.4}},
            "budget": BUDGET,
            "seed": seed,
        },
    }


def compare(family: Path, out: Path, domains: list[str]) -> dict[str, Scores]:
    """The scores of base, experts, uniform lambda, the grid's best and each search's winner."""
    rows: dict[str, Scores] = {}
    print(f"  grid of {len(DENSITIES) * len(LAMBDAS)} evaluations", flush=True)
    grid = pcb_ray.sweep(recipe_of(family, domains, 0), out / "grid", overwrite=True)
    pcb_ray.merge(out / "grid" / "best_recipe.yaml", out / "grid-best", overwrite=True, quiet=True)
    evaluator = HeldOutLoss(str(family))
    evaluator.load(out / "grid-best")
    of_grid = {split: evaluator.score(split) for split in ("validation", "test")}
    for seed in SEEDS:
        print(f"  search, seed {seed}", flush=True)
        found = pcb_ray.search(recipe_of(family, domains, seed), out / f"search-{seed}", overwrite=True)
        if not rows:
            rows |= {name if name == "base" else f"expert {name}": found.scores[name] for name in ("base", *domains)}
            rows["uniform, lambda 1"] = found.scores["start"]
            rows["grid: " + ", ".join(f"{name} {value:g}" for name, value in grid.best.items())] = of_grid
        rows[f"search, seed {seed}"] = found.scores["winner"]
        print("    " + ", ".join(f"{name} {value:.3f}" for name, value in found.best.items()), flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Search the coefficients of the quickstart's family, beside a grid of as many evaluations."
    )
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "quickstart-out", help="where the quickstart has written"
    )
    out = parser.parse_args().out.resolve()
    family = out / "family"
    transformers.utils.logging.disable_progress_bar()
    started_s = time.perf_counter()
    if not is_trained(family):
        train_family.train_family(family)
    domains = list(read_held_out(family, "test"))
    rows = compare(family, out / "search", domains)
    columns = [f"{split} {name}" for split in ("validation", "test") for name in ("mean", *domains)]
    cells = {
        row: [f"{scores[split][name]:.4f}" for split in ("validation", "test") for name in ("mean", *domains)]
        for row, scores in rows.items()
    }
    results = table("loss, nats per token", [column.replace("validation", "val") for column in columns], cells)
    print(f"\n{results}\n\nDone in {time.perf_counter() - started_s:.0f} s.")
    (out / "search" / "results.txt").write_text(results + "\n")
    (out / "search" / "results.json").write_text(json.dumps(rows, indent=2))


if __name__ == "__main__":
    main()
