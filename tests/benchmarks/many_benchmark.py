"""Ten values of lambda in one job against one merge: what do nine merges more cost?

python tests/benchmarks/many_benchmark.py DIR [--rounds 3] [--workers 2]

DIR is what make_family.py has made. In each round a single merge and a grid of ten are run one after another, each with its own
Ray. All outputs are removed; a grid's output for the single merge's lambda must have the single merge's bytes."""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import statistics
import sys
from pathlib import Path
from typing import Any

import measure
import yaml

LAMBDAS = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0]


def sha256(out: Path) -> str:
    return hashlib.sha256((out / "model.safetensors").read_bytes()).hexdigest()


def receipt(out: Path) -> dict[str, Any]:
    return dict(json.loads((out / "pcb_receipt.json").read_text()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    folder, workers = options.folder, ("--workers", str(options.workers))
    recipe = yaml.safe_load((folder / "pcb.yaml").read_text())
    (folder / "grid.yaml").write_text(yaml.safe_dump(recipe | {"grid": {"lambda": LAMBDAS}}))
    ours = [sys.executable, "-m", "pcb_ray", "merge"]
    one, many = folder / "one", folder / "many"
    rows: list[dict[str, float]] = []
    for _ in range(options.rounds):
        for out in (one, many):
            shutil.rmtree(out, ignore_errors=True)
        single = measure.run([*ours, str(folder / "pcb.yaml"), str(one), *workers])
        grid = measure.run([*ours, str(folder / "grid.yaml"), "--into", str(many), *workers])
        points = [many / "grid" / f"lambda={value:g}" for value in LAMBDAS]
        if sha256(points[-1]) != sha256(one) or len({sha256(point) for point in points}) != len(points):
            raise SystemExit("the bytes of a grid are not those of single merges")
        told = receipt(one)
        write = next(sweep["elapsed_s"] for sweep in told["sweeps"] if sweep["name"] == "write")
        others = [receipt(point) for point in points[1:]]
        rows.append(
            {
                "one merge, s": single.wall_s,
                "its write, s": write,
                "its start, s": told["startup_s"],
                "ten merges, s": grid.wall_s,
                "each of the nine that follow, s": statistics.median(one["elapsed_s"] for one in others),
                "bytes read by one, MB": told["bytes_read"] / 1e6,
                "bytes read by ten, MB": sum(receipt(point)["bytes_read"] for point in points) / 1e6,
                "memory of one, MB": single.peak_bytes / 1e6,
                "memory of ten, MB": grid.peak_bytes / 1e6,
                "ten / (one + nine writes)": grid.wall_s / (single.wall_s + 9 * write),
                "ten / ten single merges": grid.wall_s / (10 * single.wall_s),
            }
        )
        print(rows[-1], file=sys.stderr, flush=True)
    for out in (one, many):
        shutil.rmtree(out)
    print("| | median | least | most |\n| --- | --- | --- | --- |")
    for name in rows[0]:
        values = [row[name] for row in rows]
        print(f"| {name} | {statistics.median(values):.2f} | {min(values):.2f} | {max(values):.2f} |")


if __name__ == "__main__":
    main()
