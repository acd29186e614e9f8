"""Does `pcb-ray plan --cluster` say what a merge takes? A real merge on this machine against its estimate.

python tests/benchmarks/estimate_benchmark.py DIR [--recipes pcb ties] [--workers 2] [--rounds 3] [--quiet-s 600]

DIR is what make_family.py has made; its files must fit in the page cache. In each round: wait (for at most --quiet-s) until nobody
else works on this machine; measure the rates; estimate; merge; compare with the sweeps of the receipt, and with the time that the
workers spent on cores meanwhile, which other programs hardly change. What others took of the cores stands beside each round."""

from __future__ import annotations

import argparse
import shutil
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

from pcb_ray import merge, steps
from pcb_ray.budget import choose_block, worker_bytes
from pcb_ray.estimate import SHARE_OF_WORKERS, Cluster, Estimate, estimate
from pcb_ray.planning import Plan, plan
from pcb_ray.rates import measured_rates
from pcb_ray.session import Session

PAGE_CACHE = 1e12  # no bound: to copy out of it takes a core's time, which the rates have
noted: list[tuple[float, float]] = []
"""Of each sweep: core seconds of the workers, and of all that runs here."""


def wait_until_quiet(limit_s: float) -> float:
    """Until less than a tenth of all cores was busy for 3 s; the share that was busy in the last of these."""
    until = time.monotonic() + limit_s
    while (busy := psutil.cpu_percent(3.0) / 100) > 0.1 and time.monotonic() < until:
        pass
    return busy


def core_s() -> tuple[float, float]:
    """What the workers, and all that runs on this machine, have spent on cores."""
    times = psutil.cpu_times()
    everything = sum(times) - times.idle - times.iowait - times.guest - times.guest_nice
    below = psutil.Process().children(recursive=True)
    return sum(sum(one.cpu_times()[:2]) for one in below if one.name().startswith("ray::_Actor")), everything


class Noting(Session):
    """It notes what each sweep takes of the cores."""

    def total(self, *arguments: Any, **options: Any) -> Any:
        before = core_s()
        found = super().total(*arguments, **options)
        self._note(before)
        return found

    def store(self, *arguments: Any, **options: Any) -> Iterator[Any]:
        before = core_s()
        yield from super().store(*arguments, **options)
        self._note(before)

    def _note(self, before: tuple[float, float]) -> None:
        workers_s, everything_s = (now - then for now, then in zip(core_s(), before, strict=True))
        noted.append((workers_s, everything_s))


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
    out, steps.Session = options.folder / "estimated", Noting  # type: ignore[attr-defined]
    print("| recipe | others took | sweep | estimate s | took s | ratio | estimate core s | took core s | ratio |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    ratios: dict[tuple[str, str], list[float]] = {}
    for _ in range(options.rounds):
        for name in options.recipes:
            made = plan(options.folder / f"{name}.yaml")
            wait_until_quiet(options.quiet_s)
            found = estimated(made, options.workers, choose_block(made, "cpu", None))
            shutil.rmtree(out, ignore_errors=True)
            noted.clear()
            receipt = merge(options.folder / f"{name}.yaml", out, workers=options.workers, quiet=True)
            rows = [
                (sweep.name, one.seconds, sweep.elapsed_s, one.arithmetic_s * options.workers, *of_cores)
                for sweep, one, of_cores in zip(receipt.sweeps, found.sweeps, noted, strict=True)
            ]
            assert [sweep.name for sweep in receipt.sweeps] == [one.name for one in found.sweeps]
            sums = [sum(column) for column in list(zip(*rows, strict=True))[1:]]
            for sweep, wanted_s, took_s, wanted_core_s, took_core_s, everything_s in [*rows, ("**in all**", *sums)]:
                others = f"{max(0.0, everything_s - took_core_s) / took_s:.2f} cores"
                wall = f"{wanted_s:.2f} | {took_s:.2f} | {took_s / wanted_s:.2f}"
                cores = f"{wanted_core_s:.2f} | {took_core_s:.2f} | {took_core_s / wanted_core_s:.2f}"
                print(f"| {name} | {others} | {sweep} | {wall} | {cores} |", flush=True)
            ratios.setdefault((name, "seconds"), []).append(sums[1] / sums[0])
            ratios.setdefault((name, "core seconds"), []).append(sums[3] / sums[2])
    shutil.rmtree(out, ignore_errors=True)
    for (name, of), found_ratios in ratios.items():
        told = ", ".join(f"{ratio:.2f}" for ratio in found_ratios)
        print(f"\n{name}, {of}, taken / estimated: median {statistics.median(found_ratios):.2f} of {told}")


if __name__ == "__main__":
    main()
