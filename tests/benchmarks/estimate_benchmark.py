"""Does `pcb-ray plan --cluster` say what a merge takes? A real merge on this machine against its estimate.

python tests/benchmarks/estimate_benchmark.py DIR [--recipes pcb ties] [--workers 2] [--rounds 3] [--quiet-s 600]

DIR is what make_family.py has made; its files must fit in the page cache. In each round: wait (for at most --quiet-s) until nobody
else works on this machine; measure the rates; estimate; merge; compare with the sweeps of the receipt. What others took of the
cores, before and during the merge, stands beside each round."""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import measure
import psutil

from pcb_ray.budget import choose_block, worker_bytes
from pcb_ray.estimate import SHARE_OF_WORKERS, Cluster, Estimate, estimate
from pcb_ray.planning import Plan, plan
from pcb_ray.rates import measured_rates

PAGE_CACHE = 1e12  # no bound: to copy out of it takes a core's time, which the rates have


def wait_until_quiet(limit_s: float) -> float:
    """Until less than a tenth of all cores was busy for 3 s; the share that was busy in the last of these."""
    until = time.monotonic() + limit_s
    while (busy := psutil.cpu_percent(3.0) / 100) > 0.1 and time.monotonic() < until:
        pass
    return busy


def busy_cores_s() -> float:
    """What all cores were busy for since the machine started, in seconds."""
    times = psutil.cpu_times()
    return float(sum(times) - times.idle - times.iowait - times.guest - times.guest_nice)


def estimated(made: Plan, workers: int, block: int) -> Estimate:
    needed = worker_bytes(made, block)
    memory = int(workers * needed / SHARE_OF_WORKERS) + 1
    return estimate(made, Cluster(1, workers, memory, 1e9, disk=PAGE_CACHE), needed, measured_rates(made, block))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--recipes", nargs="+", default=["pcb", "ties"])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quiet-s", type=float, default=600.0)
    options = parser.parse_args()
    out = options.folder / "estimated"
    print("| recipe | busy before | others during | sweep | predicted s | took s | took / predicted |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    ratios: dict[str, list[float]] = {}
    for _ in range(options.rounds):
        for name in options.recipes:
            recipe = options.folder / f"{name}.yaml"
            made = plan(recipe)
            before = wait_until_quiet(options.quiet_s)
            found = estimated(made, options.workers, choose_block(made, "cpu", None))
            shutil.rmtree(out, ignore_errors=True)
            busy_s = busy_cores_s()
            command = [sys.executable, "-m", "pcb_ray", "merge", str(recipe), str(out), "--workers", str(options.workers)]
            merged = measure.run(command)
            others = (busy_cores_s() - busy_s - merged.core_s) / merged.wall_s
            receipt: dict[str, Any] = json.loads((out / "pcb_receipt.json").read_text())
            took = {sweep["name"]: sweep["elapsed_s"] for sweep in receipt["sweeps"]}
            wanted = {sweep.name: sweep.seconds for sweep in found.sweeps}
            assert took.keys() == wanted.keys()
            rows = [*((sweep, wanted[sweep], took[sweep]) for sweep in took), ("**in all**", found.seconds, sum(took.values()))]
            for sweep, predicted_s, took_s in rows:
                numbers = f"{predicted_s:.2f} | {took_s:.2f} | {took_s / predicted_s:.2f}"
                print(f"| {name} | {before:.0%} | {others:.2f} cores | {sweep} | {numbers} |", flush=True)
            ratios.setdefault(name, []).append(rows[-1][2] / rows[-1][1])
    shutil.rmtree(out, ignore_errors=True)
    for name, of_rounds in ratios.items():
        told = ", ".join(f"{ratio:.2f}" for ratio in of_rounds)
        print(f"\n{name}: took / predicted, all sweeps: median {statistics.median(of_rounds):.2f} of {told}")


if __name__ == "__main__":
    main()
