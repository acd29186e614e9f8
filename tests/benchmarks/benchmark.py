"""The measurements behind the README, side by side in one run, as Markdown.

    python tests/benchmarks/make_family.py /data/family
    python tests/benchmarks/benchmark.py /data/family --mergekit ~/mergekit/bin/mergekit-yaml > tests/benchmarks/results/DATE.md

Files are read once before, so that all measurements find them in the page cache. Comparisons run in turn (A B A B ...), and the
median of the pairwise ratios is what counts: machines drift. Choose some with --only mergekit,limit,dense,memory,cores."""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
sys.path.insert(0, str(Path(__file__).parent))
from measure import Measured, run

HERE = Path(__file__).parent
PCB_RAY = [sys.executable, "-m", "pcb_ray"]


def merge(recipe: Path, *options: str) -> tuple[Measured, dict]:
    """A merge through the command line, measured, with its receipt."""
    out = recipe.parent / "benchmark-out"
    shutil.rmtree(out, ignore_errors=True)
    measured = run([*PCB_RAY, "merge", str(recipe), str(out), "--overwrite", *options])
    receipt = json.loads((out / "pcb_receipt.json").read_text())
    shutil.rmtree(out)
    return measured, receipt


def warm(folder: Path) -> None:
    for path in sorted(folder.glob("*/*.safetensors")):
        with path.open("rb", buffering=0) as file:
            while file.read(1 << 24):
                pass


def sweeps_s(receipt: dict) -> float:
    return sum(s["elapsed_s"] for s in receipt["sweeps"])


def pairs(count: int, a: Callable[[], float], b: Callable[[], float]) -> tuple[float, float, float]:
    """Medians of a and of b, run in turn, and the median of the ratios a / b."""
    results = [(a(), b()) for _ in range(count)]
    return (*(statistics.median(r) for r in zip(*results, strict=True)), statistics.median(x / y for x, y in results))


def against_mergekit(family: Path, mergekit: str, count: int) -> str:
    peaks: dict[str, int] = {"ours": 0, "mergekit": 0}

    def ours() -> float:
        measured, _ = merge(family / "ties.yaml")
        peaks["ours"] = max(peaks["ours"], measured.peak_bytes)
        return measured.wall_s

    def theirs() -> float:
        out = family / "benchmark-mergekit"
        command = [mergekit, "ties.yaml", str(out), "--no-copy-tokenizer", "--no-write-model-card"]
        measured = run(command, cwd=family, env={"HF_HUB_OFFLINE": "1"})
        shutil.rmtree(out)
        peaks["mergekit"] = max(peaks["mergekit"], measured.peak_bytes)
        return measured.wall_s

    pcb, _ = merge(family / "pcb.yaml")
    ours_s, theirs_s, ratio = pairs(count, ours, theirs)
    return table(
        "ties, density 0.1, same files, start-up included",
        ["", "wall s", "peak memory"],
        [
            ["mergekit 0.1.5 `ties`", f"{theirs_s:.1f}", megabytes(peaks["mergekit"])],
            ["pcb_ray `ties`", f"{ours_s:.1f}", megabytes(peaks["ours"])],
            ["pcb_ray / mergekit", f"{ratio:.3f} (1/{1 / ratio:.1f})", f"{peaks['ours'] / peaks['mergekit']:.2f}"],
            ["pcb_ray `pcb`", f"{pcb.wall_s:.1f}", megabytes(pcb.peak_bytes)],
        ],
    )


def against_the_limit(family: Path, count: int) -> str:
    inputs = [str(family / name / "model.safetensors") for name in ("base", "expert1", "expert2", "expert3")]
    receipts: list[dict] = []

    def ours() -> float:
        receipts.append(merge(family / "pcb.yaml")[1])
        return sweeps_s(receipts[-1])

    def plain(processes: int) -> float:
        command = [sys.executable, str(HERE / "plain_copy.py"), str(family / "plain-copy"), str(processes), *inputs]
        return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    again: dict[str, list[float]] = {"library": [], "two": []}

    def plain_thrice() -> float:
        again["library"].append(plain(0))
        again["two"].append(plain(2))
        return plain(1)

    ours_s, plain_s, ratio = pairs(count, ours, plain_thrice)
    library_s, two_s = (statistics.median(times) for times in again.values())
    rows = [[s["name"], f"{s['elapsed_s']:.2f}", f"{s['bytes'] / s['elapsed_s'] / 1e9:.2f}"] for s in receipts[-1]["sweeps"]]
    return table(
        "against a plain program that reads every input once and writes the output once (start-up of Ray and Python apart)",
        ["", "s", "pcb_ray / this"],
        [
            ["pcb_ray, all sweeps", f"{ours_s:.2f}", ""],
            ["plain program with the safetensors library", f"{library_s:.2f}", f"{ours_s / library_s:.1f}"],
            ["plain program with one 1 MB buffer for all, one process", f"{plain_s:.2f}", f"{ratio:.1f}"],
            ["plain program with one 1 MB buffer each, two processes", f"{two_s:.2f}", f"{ours_s / two_s:.1f}"],
        ],
    ) + table("where the time goes (last run)", ["sweep", "s", "GB/s"], rows)


def against_dense(count: int, elements: int) -> str:
    """In memory, float32, the same process: the oracle of the tests against merge_state_dicts."""
    code = f"""
import sys, time, json, torch, resource
sys.path.insert(0, {str(HERE.parent)!r})
import oracle, pcb_ray
D, n = {elements}, 4
g = torch.Generator().manual_seed(0)
base = {{"w": torch.randn(D, generator=g)}}
models = [{{"w": base["w"] + 1e-3 * torch.randn(D, generator=g)}} for _ in range(n)]
result = []
for k in range({count}):
    start = time.monotonic(); a = pcb_ray.merge_state_dicts(base, models)["w"]; ours = time.monotonic() - start
    start = time.monotonic(); b = oracle.merge_state_dicts(base, models)["w"]; dense = time.monotonic() - start
    result.append((ours, dense, ((a - b).abs() > 1e-6).sum().item()))
print(json.dumps(result))
"""
    measured = run([sys.executable, "-c", code])
    results = json.loads(measured.output.strip().splitlines()[-1])
    ours_s, dense_s = (statistics.median(r[k] for r in results) for k in (0, 1))
    ratio = statistics.median(dense / ours for ours, dense, _ in results)
    rate = 4 * elements / 1e6
    return table(
        f"against the dense implementation of the tests' oracle, 4 x {elements / 1e6:.0f} M elements in memory, float32, "
        "`pairwise`",
        ["", "s", "M task elements/s"],
        [
            ["dense oracle", f"{dense_s:.1f}", f"{rate / dense_s:.1f}"],
            ["pcb_ray.merge_state_dicts", f"{ours_s:.2f}", f"{rate / ours_s:.0f}"],
            ["throughput ratio", f"{ratio:.1f}", f"{max(r[2] for r in results)} elements differ (by rounding at a threshold)"],
        ],
    )


def memory(family: Path, scratch: Path) -> str:
    rows = []
    for name, experts, layers in (("base case", 3, 10), ("N doubled", 6, 10), ("D doubled", 3, 23)):
        folder = family if name == "base case" else scratch / name.replace(" ", "-")
        if folder != family:
            command = [
                sys.executable,
                str(HERE / "make_family.py"),
                str(folder),
                "--experts",
                str(experts),
                "--layers",
                str(layers),
            ]
            subprocess.run(command, check=True, capture_output=True)
        measured, receipt = merge(folder / "pcb.yaml")
        peak = megabytes(receipt["peak_worker_bytes"]), megabytes(receipt["announced_worker_bytes"])
        rows.append(
            [
                name,
                str(receipt["N"]),
                f"{receipt['D'] / 1e6:.0f} M",
                megabytes(measured.peak_bytes),
                *peak,
                f"{measured.wall_s:.1f}",
            ]
        )
        if folder != family:
            shutil.rmtree(folder)
    return table(
        "memory that the kernel can't take back, all processes together (Ray included)",
        ["", "N", "D", "all processes", "largest worker", "announced per worker", "wall s"],
        rows,
    )


def cores(family: Path, count: int) -> str:
    two_s, one_s, ratio = pairs(
        count,
        lambda: sweeps_s(merge(family / "pcb.yaml", "--workers", "2")[1]),
        lambda: sweeps_s(merge(family / "pcb.yaml", "--workers", "1")[1]),
    )
    return table(
        "two workers against one, seconds in the sweeps",
        ["", "s"],
        [["one worker", f"{one_s:.2f}"], ["two workers", f"{two_s:.2f}"], ["gain", f"{1 / ratio:.2f}"]],
    )


def megabytes(count: float) -> str:
    return f"{count / 1e6:.0f} MB"


def table(title: str, head: list[str], rows: list[list[str]]) -> str:
    lines = [
        f"### {title}",
        "",
        f"| {' | '.join(head)} |",
        f"|{' --- |' * len(head)}",
        *(f"| {' | '.join(row)} |" for row in rows),
        "",
        "",
    ]
    return "\n".join(lines)


def configuration() -> str:
    import ray
    import torch

    cpu = next((line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line), "?")
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=HERE, capture_output=True, text=True, check=False
    ).stdout.strip()
    load = os.getloadavg()[0]
    return "\n".join(
        [
            f"## {time.strftime('%Y-%m-%d')}, commit {commit}",
            "",
            f"{len(os.sched_getaffinity(0))} cores of {cpu}, Linux {platform.release()}, Python {platform.python_version()}, "
            f"torch {torch.__version__}, Ray {ray.__version__}; load before the run {load:.1f}.",
            "Work: PCB-Merging of a Llama-shaped base and 3 experts of 582 M parameters each (make_family.py), "
            "bfloat16, density 0.1, `pairwise`, files in the page cache.",
            "",
            "",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("family", type=Path)
    parser.add_argument("--mergekit", help="path of mergekit-yaml, in an environment of its own")
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--dense-elements", type=int, default=50_000_000)
    parser.add_argument("--only", default="mergekit,limit,dense,memory,cores")
    options = parser.parse_args()
    wanted = options.only.split(",")
    warm(options.family)
    print(configuration(), flush=True)
    with tempfile.TemporaryDirectory(dir=options.family.parent) as scratch:
        measurements: dict[str, Callable[[], str]] = {
            "limit": lambda: against_the_limit(options.family, options.pairs),
            "cores": lambda: cores(options.family, options.pairs),
            "mergekit": lambda: against_mergekit(options.family, options.mergekit, options.pairs) if options.mergekit else "",
            "memory": lambda: memory(options.family, Path(scratch)),
            "dense": lambda: against_dense(options.pairs, options.dense_elements),
        }
        for name, measurement in measurements.items():
            if name in wanted:
                print(measurement(), flush=True)


if __name__ == "__main__":
    main()
