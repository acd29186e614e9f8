"""Merges from an object store by 1, 2 and 4 owners on 1 and 3 nodes that share no memory: seconds, and what was fetched.

python tests/benchmarks/owners.py DIR [--rounds 3] [--owners 1 2 4] [--nodes 1 3]

DIR is what make_family.py has made. All nodes are on this machine, so that seconds tell of its cores, and not of a cluster's; what
was fetched, and that the bytes are the same, hold anywhere. moto's S3 server serves from a process of its own, behind the proxy of
the tests, which counts. Needs the right to make namespaces (root)."""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import statistics
import sys
from collections import defaultdict
from contextlib import ExitStack
from pathlib import Path

import measure
import yaml
from store_merge import put

sys.path.insert(0, str(Path(__file__).parents[1]))
from clusters import can_be_apart, head_node, node_apart
from object_servers import FaultProxy, s3_server


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--owners", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--nodes", type=int, nargs="+", default=[1, 3])
    options = parser.parse_args()
    if not can_be_apart():
        raise SystemExit("no right to make namespaces here: nodes would share what they keep")
    folder, out = options.folder, options.folder / "out"
    recipe = yaml.safe_load((folder / "pcb.yaml").read_text())
    stored = sum(path.stat().st_size for path in folder.glob("*/*.safetensors"))
    found: dict[tuple[int, int], list[tuple[float, float, int]]] = defaultdict(list)
    digests: set[str] = set()
    with s3_server() as server:
        put(server, folder)
        under = f"{server.uri}/family/"
        models = [{"model": under + one["model"]} for one in recipe["models"]]
        (folder / "store.yaml").write_text(yaml.safe_dump(recipe | {"base_model": under + recipe["base_model"], "models": models}))
        for nodes in options.nodes:
            with FaultProxy(server) as proxy, ExitStack() as stack:
                head = stack.enter_context(head_node(cpus=0, **server.through(proxy)))
                for k in range(nodes):
                    stack.enter_context(node_apart(head, f"node-{k}", cpus=max(options.owners)))
                for _ in range(options.rounds):
                    for owners in options.owners:
                        before = sum(proxy.fetched().values())
                        command = [sys.executable, "-m", "pcb_ray", "merge", str(folder / "store.yaml"), str(out)]
                        command += ["--workers", str(owners), "--address", head.address]
                        measure.run(command, env=head.environment)
                        receipt = json.loads((out / "pcb_receipt.json").read_text())
                        digests.add(hashlib.sha256((out / "model.safetensors").read_bytes()).hexdigest())
                        shutil.rmtree(out)
                        fetched = sum(proxy.fetched().values()) - before
                        row = receipt["elapsed_s"] - receipt["startup_s"], fetched / stored, receipt["workers_lost"]
                        found[nodes, owners].append(row)
                        print(nodes, owners, row, flush=True)
    if len(digests) != 1:
        raise SystemExit("they gave different bytes")
    print(f"\n{stored:,} bytes of inputs, {options.rounds} rounds, the same bytes from all\n")
    print("| nodes | owners | s without the start, median (all) | fetched / stored | lost |\n| --- | --- | --- | --- | --- |")
    for (nodes, owners), rows in found.items():
        seconds, fetched_of, lost = zip(*rows, strict=True)
        every = ", ".join(f"{one:.1f}" for one in seconds)
        print(f"| {nodes} | {owners} | {statistics.median(seconds):.1f} ({every}) | {max(fetched_of):.2f} | {sum(lost)} |")


if __name__ == "__main__":
    main()
