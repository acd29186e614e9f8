"""A merge from an object store, and one from it and to it, against the same on a disk; and fetching each byte once alone.

python tests/benchmarks/store_merge.py DIR [--rounds 3] [--workers 2]

DIR is what make_family.py has made. moto's S3 server serves it from a process of its own, behind the proxy of the tests, which
counts. The aim (issue 14): from the store at most 1.3 times the merge on a disk and fetching together. All outputs must have the
same bytes, and are removed."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import measure
import yaml

sys.path.insert(0, str(Path(__file__).parents[1]))
from object_servers import FaultProxy, ObjectServer, s3_server

PIECE = 8 << 20


def fetch_once(uris: dict[str, int]) -> float:
    """Seconds that it takes to fetch all of these objects once, in pieces, as many at once as two workers do."""
    from pcb_ray.files.objects import Objects

    objects, begin = Objects(), time.monotonic()
    pieces = [(uri, start, min(start + PIECE, size)) for uri, size in uris.items() for start in range(0, size, PIECE)]
    with ThreadPoolExecutor(16) as pool:
        for data, _ in pool.map(lambda piece: objects.get(*piece), pieces):
            del data
    return time.monotonic() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    folder, out = options.folder, options.folder / "out"
    recipe = yaml.safe_load((folder / "pcb.yaml").read_text())
    stored = sum(path.stat().st_size for path in folder.glob("*/*.safetensors"))
    rows: list[dict[str, Any]] = []
    digests: set[str] = set()
    with s3_server() as server:
        uris = put(server, folder)
        for kind, under in (("store", f"{server.uri}/family/"), ("disk", "")):
            models = [{"model": under + one["model"]} for one in recipe["models"]]
            (folder / f"{kind}.yaml").write_text(
                yaml.safe_dump(recipe | {"base_model": under + recipe["base_model"], "models": models})
            )
        for number in range(options.rounds):
            row: dict[str, Any] = {}
            for kind, source, target in (
                ("disk", "disk", str(out)),
                ("store", "store", str(out)),
                ("between", "store", f"{server.uri}/out{number}"),
            ):
                with FaultProxy(server) as proxy:
                    settings = server.through(proxy)
                    command = [sys.executable, "-m", "pcb_ray", "merge", str(folder / f"{source}.yaml"), target]
                    took = measure.run([*command, "--workers", str(options.workers)], env=settings)
                    sent = sum(size for key, size in proxy.fetched().items() if key.startswith("family/"))
                if target == str(out):
                    files = {path.name: path.read_bytes() for path in out.iterdir()}
                    shutil.rmtree(out)
                else:
                    files = {name: server.get(f"out{number}/{name}") for name in ("model.safetensors", "pcb_receipt.json")}
                receipt = json.loads(files["pcb_receipt.json"])
                digests.add(hashlib.sha256(files["model.safetensors"]).hexdigest())
                row |= {f"{kind}: s": took.wall_s, f"{kind}: s without the start": receipt["elapsed_s"] - receipt["startup_s"]}
                row |= {
                    f"{kind}: sent/stored": sent / stored,
                    f"{kind}: fetched by workers/stored": receipt["bytes_fetched"] / stored,
                }
            with FaultProxy(server) as proxy:
                os.environ.update(server.through(proxy))
                row["fetching alone: s"] = fetch_once(uris)
            together = row["disk: s without the start"] + row["fetching alone: s"]
            row["store / (disk and fetching)"] = row["store: s without the start"] / together
            rows.append(row)
            print(row, flush=True)
    if len(digests) != 1:
        raise SystemExit("the three ways gave different bytes")
    print(f"\n{stored:,} bytes of inputs, {options.rounds} rounds, {options.workers} workers\n")
    print("| what | median | all |\n| --- | --- | --- |")
    for name in rows[0]:
        values = [row[name] for row in rows]
        print(f"| {name} | {statistics.median(values):,.3g} | {', '.join(f'{value:,.3g}' for value in values)} |")


def put(server: ObjectServer, folder: Path) -> dict[str, int]:
    """The family as objects; the sizes of its files of tensors by their URIs."""
    sizes = {}
    for path in folder.glob("*/*"):
        if path.is_file() and path.parent.name != "out":
            key = f"family/{path.relative_to(folder).as_posix()}"
            server.put(key, path.read_bytes())
            if path.suffix == ".safetensors":
                sizes[f"{server.uri}/{key}"] = path.stat().st_size
    return sizes


if __name__ == "__main__":
    main()
