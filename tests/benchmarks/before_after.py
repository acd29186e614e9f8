"""Two states of the code side by side, in turn: merges of one family, their sweeps, wall time and memory, as Markdown.

    git worktree add /tmp/before COMMIT            # and build its kernel: pip install -e there, or copy the .so of the same C code
    python tests/benchmarks/make_family.py /data/family
    python tests/benchmarks/before_after.py /data/family /tmp/before . --pairs 5

The files are read once before, so that all runs find them in the page cache. Machines drift: what counts is the median of the
ratios within pairs.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import sys
import time
from pathlib import Path

import yaml

sys.path.insert(0, str(Path(__file__).parent))
from measure import run

RECIPES = {
    "pcb pairwise": ({"merge_method": "pcb", "parameters": {"density": 0.1}}, 1),
    "pcb pairwise, two workers": ({"merge_method": "pcb", "parameters": {"density": 0.1}}, 2),
    "pcb paper, two workers": ({"merge_method": "pcb", "parameters": {"density": 0.1, "variant": "paper"}}, 2),
    "ties": ({"merge_method": "ties", "parameters": {"density": 0.1}}, 1),
    "task_arithmetic": ({"merge_method": "task_arithmetic", "parameters": {"lambda": 0.4}}, 1),
}


def merge(code: Path, recipe: Path, workers: int) -> dict[str, float]:
    """One merge by the code in a checkout."""
    out = recipe.with_name("before-after")
    shutil.rmtree(out, ignore_errors=True)
    command = [sys.executable, "-m", "pcb_ray", "merge", str(recipe), str(out), "--workers", str(workers)]
    measured = run(command, cwd=code, env={"PYTHONPATH": str(code)})  # what lies in the current folder comes first
    receipt = json.loads((out / "pcb_receipt.json").read_text())
    shutil.rmtree(out)
    sweeps = {s["name"]: s["elapsed_s"] for s in receipt["sweeps"]}
    return {
        "all sweeps, s": sum(sweeps.values()),
        "write, s": sweeps["write"],
        "wall, s": measured.wall_s,
        "memory of all processes, MB": measured.peak_bytes / 1e6,
        "memory of a worker, MB": receipt["peak_worker_bytes"] / 1e6,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("family", type=Path)
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("--pairs", type=int, default=5)
    options = parser.parse_args()
    family, before, after = (path.resolve() for path in (options.family, options.before, options.after))
    for path in sorted(family.glob("*/*.safetensors")):
        with path.open("rb", buffering=0) as file:
            while file.read(1 << 24):
                pass
    experts = [{"model": path.name} for path in sorted(family.glob("expert*")) if path.is_dir()]
    recipe = family / "before-after.yaml"
    print(
        f"# Before and after, {time.strftime('%Y-%m-%d')}, {os.cpu_count()} cores, {platform.machine()}, {options.pairs} pairs "
        "in turn\n"
    )
    print("Medians; the ratio is the median of those within pairs (least to most).\n")
    print("| merge | | before | after | after / before |\n| --- | --- | --- | --- | --- |")
    for name, (asked, workers) in RECIPES.items():
        recipe.write_text(yaml.safe_dump({**asked, "base_model": "base", "models": experts}))
        pairs = [(merge(before, recipe, workers), merge(after, recipe, workers)) for _ in range(options.pairs)]
        for what in pairs[0][0]:
            old, new = ([pair[k][what] for pair in pairs] for k in (0, 1))
            ratios = sorted(b / a for a, b in zip(old, new, strict=True))
            shown = f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
            print(f"| {name} | {what} | {statistics.median(old):.2f} | {statistics.median(new):.2f} | {shown} |", flush=True)
    recipe.unlink()


if __name__ == "__main__":
    main()
