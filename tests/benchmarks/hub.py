"""A merge of models on the Hub: read in place (`hf://`), downloaded into the Hub's cache first (`org/name`), and of the same files
on a disk, which neither can beat.

python tests/benchmarks/hub.py DIR [--rounds 3] [--workers 2]

DIR is what make_family.py has made. A loopback Hub serves it from a process of its own; each download begins with an empty cache.
All outputs are removed, and must have the same bytes."""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import measure
import yaml

SERVER = """
import json, sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from hub_server import HubServer, Model, commit_of

folder, commit = Path(sys.argv[1]), commit_of("bench")
models = {f"org/{one.name}": Model({commit: {path.name: path.read_bytes() for path in one.iterdir()}}, {"main": commit})
          for one in folder.iterdir() if (one / "config.json").is_file()}
with HubServer(models) as server:
    print(server.endpoint, flush=True)
    for _ in sys.stdin:
        sent = sum(request.body_bytes for request in server.requests if "safetensors" in request.path)
        print(sent, len(server.requests), flush=True)
        server.requests.clear()
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    folder, out, cache = options.folder, options.folder / "out", options.folder / "hf-home"
    recipe = yaml.safe_load((folder / "pcb.yaml").read_text())
    for kind, under in (("hf", "hf://org/"), ("id", "org/"), ("disk", "")):
        models = [{"model": under + one["model"]} for one in recipe["models"]]
        named = {"base_model": under + recipe["base_model"], "models": models}
        (folder / f"{kind}.yaml").write_text(yaml.safe_dump(recipe | named))
    stored = sum(path.stat().st_size for path in folder.glob("*/*.safetensors"))
    server = subprocess.Popen(
        [sys.executable, "-c", SERVER, str(folder), str(Path(__file__).parents[1])],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert server.stdin is not None
    assert server.stdout is not None
    settings = {"HF_ENDPOINT": server.stdout.readline().strip(), "HF_HOME": str(cache), "HF_HUB_DISABLE_TELEMETRY": "1"}
    rows: list[dict[str, Any]] = []
    digests: set[str] = set()
    for _ in range(options.rounds):
        row: dict[str, Any] = {}
        for kind in ("disk", "hf", "id"):
            shutil.rmtree(cache, ignore_errors=True)
            command = [sys.executable, "-m", "pcb_ray", "merge", str(folder / f"{kind}.yaml"), str(out)]
            took = measure.run([*command, "--workers", str(options.workers)], env=settings)
            server.stdin.write("\n")
            server.stdin.flush()
            sent, requests = map(int, server.stdout.readline().split())
            receipt = json.loads((out / "pcb_receipt.json").read_text())
            row |= {f"{kind}: s": took.wall_s, f"{kind}: sent/stored": sent / stored, f"{kind}: requests": requests}
            row |= {f"{kind}: fetched by workers/stored": receipt["bytes_fetched"] / stored, f"{kind}: retries": receipt["retries"]}
            digests.add(hashlib.sha256((out / "model.safetensors").read_bytes()).hexdigest())
            shutil.rmtree(out)
        rows.append(row)
        print(row, flush=True)
    server.stdin.close()
    server.wait()
    if len(digests) != 1:
        raise SystemExit("the three ways gave different bytes")
    print(f"\n{stored:,} bytes of inputs, {options.rounds} rounds, {options.workers} workers\n")
    print("| what | median | all |\n| --- | --- | --- |")
    for name in rows[0]:
        values = [row[name] for row in rows]
        print(f"| {name} | {statistics.median(values):,.3g} | {', '.join(f'{value:,.3g}' for value in values)} |")


if __name__ == "__main__":
    main()
