"""Does `pcb-ray plan --cluster` say what a merge takes? A real merge on this machine against its estimate.

python tests/benchmarks/estimate_benchmark.py DIR [--recipes pcb ties] [--workers 2] [--rounds 3] [--quiet-s 600]

DIR is what make_family.py has made. In each round: wait (for at most --quiet-s) until nobody else works on this machine; measure the
rates, and what a disk gives (the files of the inputs, read by as many processes as there are workers, mostly from the page cache);
estimate; merge; compare with the sweeps of the receipt. Load of others, before and during the merge, stands beside each round."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import measure
import psutil

from pcb_ray.budget import choose_block, worker_bytes
from pcb_ray.estimate import SHARE_OF_WORKERS, Cluster, Estimate, estimate
from pcb_ray.planning import Plan, plan
from pcb_ray.rates import measured_rates

READ_AT_ONCE = 8 << 20


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


def read_share(paths: Sequence[str], share: int, of: int) -> int:
    buffer, count = memoryview(bytearray(READ_AT_ONCE)), 0
    for path in paths:
        with open(path, "rb", buffering=0) as file:
            size = os.path.getsize(path)
            file.seek(size * share // of)
            left = size * (share + 1) // of - size * share // of
            while left and (got := file.readinto(buffer[: min(left, READ_AT_ONCE)])):
                left, count = left - got, count + got
    return count


def disk_rate(made: Plan, workers: int) -> float:
    """Bytes per second that the workers together get of the inputs' files."""
    paths = [file.path for one in made.inputs for file in one.files]
    with ProcessPoolExecutor(workers) as pool:
        list(pool.map(read_share, [paths[:0]] * workers, range(workers), [workers] * workers))  # they start
        start = time.monotonic()
        total = sum(pool.map(read_share, [paths] * workers, range(workers), [workers] * workers))
        return total / (time.monotonic() - start)


def estimated(made: Plan, workers: int, block: int) -> Estimate:
    needed = worker_bytes(made, block)
    memory = int(workers * needed / SHARE_OF_WORKERS) + 1
    return estimate(made, Cluster(1, workers, memory, 1e9, disk_rate(made, workers)), needed, measured_rates(made, block))


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
