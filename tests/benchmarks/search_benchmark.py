"""The measurements of the search, side by side in one run, as Markdown.

    python tests/benchmarks/make_family.py /data/family4 --experts 4
    python tests/benchmarks/search_benchmark.py /data/family4 > tests/benchmarks/results/DATE-search.md

apply: a candidate written into the loaded model, against a plain copy of the base's parameters, and against merging again and
    loading the result.
trials: what Tune costs per trial beyond applying and scoring; trials per minute of two trial processes against one, for a scorer of
    about a second.
memory: what a first and a second trial process on a node take (PSS), by part.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

import pcb_ray
from pcb_ray.analysis import analyse
from pcb_ray.files.store import LocalStore
from pcb_ray.local import LocalOwners
from pcb_ray.planning import Plan, plan
from pcb_ray.searching.basis import Basis
from pcb_ray.searching.building import BuildVolumes
from pcb_ray.searching.volumes import volumes_of
from pcb_ray.session import Session

REPEATS = 7


class Second:
    """A scorer of about a second that uses one core, on a small model."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def load(self, model_dir: Path) -> torch.nn.Module:
        from pcb_ray.searching.evaluators import module_of

        self.module = module_of(
            {k: v.float() for path in Path(model_dir).glob("*.safetensors") for k, v in load_file(path).items()}
        )
        return self.module

    def score(self, split: str) -> dict[str, float]:
        until = time.thread_time() + self.seconds
        total = 0.0
        while time.thread_time() < until:
            total += sum(k * k for k in range(1000))
        return {"sum": float(next(self.module.buffers()).sum()) + 0.0 * total}


def recipe_of(family: Path) -> dict[str, Any]:
    models = sorted(path for path in family.glob("expert*") if path.is_dir())
    return {"base_model": str(family / "base"), "models": [str(m) for m in models], "parameters": {"density": 0.1}}


def build(recipe: dict[str, Any], folder: Path) -> tuple[Plan, Basis, float, float]:
    """The basis, and how long the analysis and the building took."""
    made = plan(recipe)
    folder.mkdir()
    store = LocalStore()
    session = Session(made, lambda plan: LocalOwners(plan, store))
    start = time.perf_counter()
    known = analyse(session)
    analysed = time.perf_counter()
    for _ in session.store("basis", BuildVolumes(known, str(folder), scored=False), range(volumes_of(made))):
        pass
    return made, Basis(made, folder, known), analysed - start, time.perf_counter() - analysed


def apply(recipe: dict[str, Any], scratch: Path) -> str:
    made, basis, analysis_s, build_s = build(recipe, scratch / "basis")
    base = {k: v.clone() for path in Path(recipe["base_model"]).glob("*.safetensors") for k, v in load_file(path).items()}
    lambdas = [(1.0, 0.7, 1.3, 0.9)[: made.N]] * len(made.tensors)
    lines = [
        f"Basis of N = {made.N}, D = {made.D:,}, r = 0.1: {basis.entries:,} entries, {basis.nbytes / 1e9:.2f} GB: "
        f"{basis.nbytes / (0.1 * made.N * made.D):.2f} bytes per element of r N D. Analysis {analysis_s:.1f} s, building "
        f"{build_s:.1f} s.",
        "",
        "| parameters | threads | copy s | apply s | ratio |",
        "| --- | --- | --- | --- | --- |",
    ]
    slowest = 0.0
    for dtype in (torch.bfloat16, torch.float32):
        source = {k: v.to(dtype) for k, v in base.items()}
        target = {k: torch.zeros_like(v) for k, v in source.items()}
        for threads in (1, 2):
            torch.set_num_threads(threads)
            copies, applies = [], []
            for k in range(REPEATS + 1):
                start = time.perf_counter()
                for name, tensor in source.items():
                    target[name].copy_(tensor)
                copied = time.perf_counter()
                basis.apply(target, lambdas, 1.0 + 0.01 * k, threads=threads)
                copies.append(copied - start)
                applies.append(time.perf_counter() - copied)
            copies, applies = copies[1:], applies[1:]  # the first touches pages for the first time
            ratio = statistics.median(a / c for a, c in zip(applies, copies, strict=True))
            slowest = max(slowest, statistics.median(applies))
            row = (
                str(dtype).removeprefix("torch."),
                threads,
                f"{statistics.median(copies):.3f}",
                f"{statistics.median(applies):.3f}",
                f"{ratio:.2f}",
            )
            lines.append("| " + " | ".join(map(str, row)) + " |")
        del source, target
    (scratch / "recipe.yaml").write_text(json.dumps(recipe))
    start = time.perf_counter()
    command = [sys.executable, "-m", "pcb_ray", "merge", str(scratch / "recipe.yaml"), str(scratch / "merged")]
    subprocess.run(command, check=True, capture_output=True)
    loaded = {k: v.clone() for path in (scratch / "merged").glob("*.safetensors") for k, v in load_file(path).items()}
    again_s = time.perf_counter() - start
    assert loaded.keys() == base.keys()
    return "\n".join(
        [
            *lines,
            "",
            f"Merging again (command line) and loading: {again_s:.1f} s, {again_s / slowest:.0f} times the slowest apply above.",
            "",
        ]
    )


def trials(scratch: Path) -> str:
    sys.path.insert(0, str(Path(__file__).parent.parent))
    import families

    family = families.Family(scratch / "small", *families.fine_tuned(4, scale=8))
    search = {
        "evaluator": {f"{__file__}:Second": {"seconds": 0.0}},
        "metric": "sum",
        "budget": 60,
        "population": 10,
        "concurrency": 1,
    }
    start = time.monotonic()
    pcb_ray.search(family.recipe(search=search), scratch / "quick", quiet=True)
    rows = table(scratch / "quick")
    # Between the ends of the second and the last trial, less what they spent themselves: the first loads Ray, torch and the model.
    beyond_s = ((rows[-1]["ended"] - rows[1]["ended"]).total_seconds() - sum(r["seconds"] for r in rows[2:])) / (len(rows) - 2)
    lines = [
        f"60 trials, one process: {beyond_s:.3f} s per trial beyond applying and scoring (the whole search "
        f"{time.monotonic() - start:.0f} s)."
    ]
    rates = {}
    for processes in (1, 2):
        search |= {"evaluator": {f"{__file__}:Second": {"seconds": 1.0}}, "concurrency": processes, "budget": 40}
        pcb_ray.search(family.recipe(search=search), scratch / f"second{processes}", quiet=True)
        rows = table(scratch / f"second{processes}")
        steady = rows[2 * processes :]  # all of them are up
        rates[processes] = 60 * len(steady) / (steady[-1]["ended"] - rows[2 * processes - 1]["ended"]).total_seconds()
    lines.append(
        f"A scorer of one core second: {rates[1]:.1f} trials a minute in one process, {rates[2]:.1f} in two: "
        f"{rates[2] / rates[1]:.2f} times."
    )
    return "\n".join([*lines, ""])


def table(out: Path) -> list[dict[str, Any]]:
    import pyarrow.parquet

    return sorted(pyarrow.parquet.read_table(out / "trials.parquet").to_pylist(), key=lambda row: row["ended"])


TRIAL = """
import json, pickle, sys, time, torch
from safetensors.torch import load_file
from pathlib import Path
from pcb_ray.searching.basis import Basis
torch.set_num_threads(1)
made, known, folder, base = pickle.load(open(sys.argv[1], "rb"))
model = {k: v.clone() for path in Path(base).glob("*.safetensors") for k, v in load_file(path).items()}
basis = Basis(made, folder, known)
for k in range(2):
    basis.apply(model, [(1.0,) * made.N] * len(made.tensors), 1.0 + k)
print("ready", flush=True)
sys.stdin.read()
"""


def memory(recipe: dict[str, Any], scratch: Path) -> str:
    import pickle

    made, basis, _, _ = build(recipe, scratch / "basis-memory")
    (scratch / "job.pkl").write_bytes(pickle.dumps((made, basis.made_for, str(scratch / "basis-memory"), recipe["base_model"])))
    size = basis.nbytes
    del basis
    lines = [
        "| processes | process | model and process (anonymous) MB | basis MB | base MB | other files MB |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    processes: list[subprocess.Popen[str]] = []
    try:
        for count in (1, 2):
            processes.append(
                subprocess.Popen(
                    [sys.executable, "-c", TRIAL, str(scratch / "job.pkl")],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                )
            )
            assert processes[-1].stdout is not None
            assert processes[-1].stdout.readline() == "ready\n"
            for number, process in enumerate(processes, 1):
                anonymous, of_basis, of_base, other = (
                    round(b / 1e6) for b in pss(process.pid, "basis-memory", recipe["base_model"])
                )
                lines.append(f"| {count} | {number} | {anonymous} | {of_basis} | {of_base} | {other} |")
    finally:
        for process in processes:
            process.kill()
    return "\n".join([f"PSS by part; basis {size / 1e6:.0f} MB, base {made.D * 2 / 1e6:.0f} MB, a model as much:", "", *lines, ""])


def pss(pid: int, basis: str, base: str) -> tuple[int, int, int, int]:
    """Proportional share in bytes: anonymous, of the basis, of the base, of other files."""
    found = {"anonymous": 0, "basis": 0, "base": 0, "other": 0}
    kind = "anonymous"
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        if header := re.match(r"[0-9a-f]+-[0-9a-f]+ \S+ \S+ \S+ \d+\s*(.*)", line):
            path = header[1]
            kind = (
                "basis" if basis in path else "base" if path.startswith(base) else "other" if path.startswith("/") else "anonymous"
            )
        elif size := re.match(r"Pss:\s+(\d+) kB", line):
            found[kind] += 1024 * int(size[1])
    return found["anonymous"], found["basis"], found["base"], found["other"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("family", type=Path)
    parser.add_argument("--only", default="apply,trials,memory")
    options = parser.parse_args()
    recipe = recipe_of(options.family.resolve())
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    print(
        f"# Search, {time.strftime('%Y-%m-%d')}, commit {commit}, {os.cpu_count()} cores, {platform.machine()}, torch "
        f"{torch.__version__}\n"
    )
    with tempfile.TemporaryDirectory(dir=options.family) as scratch:
        for name in options.only.split(","):
            start = time.monotonic()
            text = {
                "apply": lambda: apply(recipe, Path(scratch)),
                "trials": lambda: trials(Path(scratch)),
                "memory": lambda: memory(recipe, Path(scratch)),
            }[name]()
            print(f"## {name}\n\n{text}", flush=True)
            print(f"{name}: {time.monotonic() - start:.0f} s", file=sys.stderr)
            for path in Path(scratch).iterdir():
                shutil.rmtree(path) if path.is_dir() else path.unlink()


if __name__ == "__main__":
    main()
