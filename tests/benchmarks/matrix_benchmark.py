"""Methods on whole matrices beside `pcb`: seconds, and a worker's memory against what the plan announced. And the linear algebra
below them beside torch's (MKL or OpenBLAS) on one core.

python tests/benchmarks/matrix_benchmark.py DIR [--rounds 1] [--sizes 512 1024 2048]

DIR is what make_family.py has made."""

from __future__ import annotations

import argparse
import shutil
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from pcb_ray import merge
from pcb_ray.methods import dense

RECIPES: dict[str, dict[str, Any]] = {
    "pcb": {},
    "pcb, svc": {"parameters": {"calibrate": "svc"}},
    "iso_c": {"merge_method": "iso_c"},
    "wudi": {"merge_method": "wudi"},
    "tsv_m": {"merge_method": "tsv_m"},
    "iso_cts": {"merge_method": "iso_cts"},
}


def seconds(work: Callable[[], object], rounds: int = 3) -> float:
    """The median."""
    found = []
    for _ in range(rounds):
        begin = time.perf_counter()
        work()
        found.append(time.perf_counter() - begin)
    return statistics.median(found)


def linear_algebra(sizes: list[int]) -> None:
    torch.set_num_threads(1)
    print("| n | Gram, GF/s | product, GF/s | torch's product, GF/s | eigenvectors, s | torch's, s |\n" + "| --- " * 6 + "|")
    for n in sizes:
        x = np.random.default_rng(n).standard_normal((n, n)).astype(np.float32)
        g, xd = dense.gram(x), torch.from_numpy(x).double()
        gram_s, product_s = seconds(lambda x=x: dense.gram(x)), seconds(lambda x=x: dense.product(x, x))
        torch_s, eigen_s = seconds(lambda xd=xd: xd @ xd), seconds(lambda g=g: dense.eigen(g), 1)
        torch_eigen_s = seconds(lambda g=g: torch.linalg.eigh(torch.from_numpy(g)), 1)
        flops = 2e-9 * n**3  # half of them for a Gram matrix, of which one triangle is found
        row = f"{flops / 2 / gram_s:.1f} | {flops / product_s:.1f} | {flops / torch_s:.1f} | {eigen_s:.2f} | {torch_eigen_s:.2f}"
        print(f"| {n} | {row} |", flush=True)


def merges(folder: Path, rounds: int) -> None:
    recipe = yaml.safe_load((folder / "pcb.yaml").read_text())
    out = folder / "by-matrix"
    print("\n| recipe | s, median (all) | of pcb | worker, MB | announced, MB |\n" + "| --- " * 5 + "|")
    of_pcb = 0.0
    for name, changes in RECIPES.items():
        times = []
        for _ in range(rounds):
            models = [{"model": str(folder / one["model"])} for one in recipe["models"]]
            asked = recipe | {"base_model": str(folder / recipe["base_model"]), "models": models, "parameters": {}} | changes
            receipt = merge(asked, out, workers=2, overwrite=True, quiet=True)
            times.append(receipt.elapsed_s - receipt.startup_s)
        median = statistics.median(times)
        of_pcb = of_pcb or median
        memory = f"{receipt.peak_worker_bytes / 1e6:.0f} | {receipt.announced_worker_bytes / 1e6:.0f}"
        print(f"| {name} | {median:.1f} ({', '.join(f'{s:.1f}' for s in times)}) | {median / of_pcb:.1f} | {memory} |", flush=True)
    shutil.rmtree(out, ignore_errors=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--sizes", type=int, nargs="+", default=[512, 1024, 2048])
    options = parser.parse_args()
    linear_algebra(options.sizes)
    merges(options.folder, options.rounds)


if __name__ == "__main__":
    main()
