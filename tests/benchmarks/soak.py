"""Merges from an object store to an object store on a cluster whose parts are killed at random; what is left of it, as Markdown.

    python tests/benchmarks/soak.py > tests/benchmarks/results/DATE-soak.md

The nodes are machines of their own (tests/machines.py): a head, and three of one CPU. Each merge meets three faults, in an order
and at moments that the seed decides (moments are counted in requests to the server): a worker killed, a raylet killed (its node
comes back), the driver killed (and resumed from any node), 20 times 503, five connections reset, two requests never answered. After
each, the output is compared with that of a merge without Ray, and verified. Undisturbed merges come first and last: between them
nothing may have grown. Exit code 1 if anything was wrong."""

from __future__ import annotations

import argparse
import collections
import datetime
import os
import platform
import random
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import yaml

sys.path.insert(0, str(Path(__file__).parent.parent))
import families
from clusters import BIN, Run, await_end, title
from machines import SCRATCH, Machine, machines
from object_servers import FaultProxy, ObjectServer, answer, reset, s3_server, stall

from pcb_ray.planning import plan

FAULTS = ("worker", "raylet", "driver", "503", "reset", "stall")
FAULTS_EACH = 3
ATTEMPTS = 5
MERGE_S = 900.0
MB = 1_000_000


@dataclass
class Told:
    """What is known of one merge."""

    name: str
    faults: list[str]
    attempts: int = 0
    seconds: float = 0.0
    workers_lost: int = 0
    problems: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Left:
    """What there is between two merges."""

    processes: Mapping[str, int]
    """By what they are, but for workers of Ray that wait for work."""
    descriptors: Mapping[int, int]
    """By the pid of a process that lives long."""
    memory: Mapping[int, int]
    """Its own, in bytes, likewise."""
    store: int
    """Bytes in Ray's object stores."""
    rooms: int
    files: tuple[str, ...]
    """In /dev/shm and scratch of all nodes."""
    objects: tuple[str, ...]
    """Beside and below the outputs."""
    uploads: int


@dataclass(frozen=True)
class Soaked:
    """What is known of all of it."""

    merges: list[Told]
    before: Left
    after: Left
    lived: Mapping[int, str]
    """Processes that lived through it, by their pids."""

    @property
    def problems(self) -> list[str]:
        of_merges = [f"merge {one.name}: {problem}" for one in self.merges for problem in one.problems]
        return [*of_merges, *_grown(self.before, self.after, self.lived)]


def soak(merges: int, seed: int, scale: int, folder: Path) -> Soaked:
    chance = random.Random(seed)
    one = families.Family(folder / "family", *families.fine_tuned(2, scale=scale))
    shard = 12_000 * scale + 2_000_000
    wanted = families.merge_locally(plan(one.recipe(), max_shard_bytes=shard), folder / "wanted").files
    with s3_server() as server, FaultProxy(server) as proxy, machines(3, server.through(proxy)) as (address, nodes):
        for path in (one.folder).rglob("*.*"):
            server.put(f"models/{path.relative_to(one.folder).as_posix()}", path.read_bytes())
        at = f"{server.uri}/models"
        recipe = folder / "recipe.yaml"
        models = [{"model": f"{at}/model{k}"} for k in range(2)]
        recipe.write_text(yaml.safe_dump({"merge_method": "pcb", "base_model": f"{at}/base", "models": models}))
        command = ["merge", recipe, "--workers", 2, "--address", address, "--scratch", SCRATCH, "--cache", "20MB", "--resume"]
        command += ["--max-shard-size", f"{shard}B"]
        cluster = _Cluster(server, proxy, nodes, address, command, wanted, chance)
        told = [cluster.merge("undisturbed", [])]
        requests = cluster.requests
        before = cluster.left()
        lived = cluster.long_living()
        deck: list[str] = []
        for number in range(merges):
            if len(deck) < FAULTS_EACH:
                deck += chance.sample(FAULTS, len(FAULTS))
            faults, deck = deck[:FAULTS_EACH], deck[FAULTS_EACH:]
            told.append(cluster.merge(f"{number + 1}", [(chance.uniform(0.05, 0.8) * requests, fault) for fault in faults]))
            print(told[-1], file=sys.stderr, flush=True)
        told.append(cluster.merge("undisturbed again", []))
        after = cluster.left()
        return Soaked(told, before, after, {process.pid: name for process, name in lived.items() if process.is_running()})


@dataclass
class _Cluster:
    server: ObjectServer
    proxy: FaultProxy
    nodes: list[Machine]
    address: str
    command: list[object]
    wanted: Mapping[str, bytes]
    chance: random.Random
    requests: int = 0
    """Of the last merge."""

    def merge(self, name: str, faults: list[tuple[float, str]]) -> Told:
        """One merge, with faults as soon as so many requests were made."""
        told, out, begin = Told(name, []), f"{self.server.uri}/merges/out", time.monotonic()
        self._before, pending = len(self.proxy.requests), sorted(faults)
        excused = True
        while excused and told.attempts < ATTEMPTS:
            told.attempts += 1
            driver = self.chance.choice(self.nodes[1:])
            with driver.running(*self.command[:2], out, *self.command[2:]) as run:
                excused = self._disturb(told, run, driver, pending)
                code = run.finish()
            told.workers_lost += run.text.count(" died (")
            if code == 0:
                break
        else:
            code = code or 1
        self.requests = len(self.proxy.requests) - self._before
        self.proxy.heal()
        if code:
            told.problems.append(f"ended with {code}:\n{run.text}")
        told.seconds = time.monotonic() - begin
        for fault in pending:
            told.faults.append(f"({fault[1]}: too late)")
        self._check(told, out)
        return told

    def _disturb(self, told: Told, run: Run, driver: Machine, pending: list[tuple[float, str]]) -> bool:
        """Do what is due while it runs. Whether its end is no fault of its own."""
        excused, until = False, time.monotonic() + MERGE_S
        while run.process.poll() is None:
            if time.monotonic() > until:
                told.problems.append(f"not done in {MERGE_S:.0f} s")
                run.close()
            if pending and len(self.proxy.requests) - self._before >= pending[0][0]:
                fault = pending[0][1]
                owners = [owner for node in self.nodes for owner in node.owners]
                if fault == "worker" and not owners:
                    continue
                del pending[0]
                told.faults.append(fault)
                if fault == "worker":
                    self.chance.choice(owners).kill()
                elif fault == "raylet":
                    node = self.chance.choice(self.nodes[1:])
                    excused |= node is driver
                    (raylet,) = [p for p in node.processes if p.name() == "raylet"]
                    raylet.kill()
                    node.cut_power()
                    node.boot()
                elif fault == "driver":
                    excused = True
                    for process in psutil.Process(run.pid).children():
                        process.kill()
                else:
                    self.proxy.fail(*{"503": (answer(503, "SlowDown"), 20), "reset": (reset(), 5), "stall": (stall(), 2)}[fault])
            time.sleep(0.02)
        return excused

    def _check(self, told: Told, out: str) -> None:
        key = out.removeprefix(f"{self.server.uri}/")
        if {
            name: self.server.get(f"{key}/{name}") for name in self.wanted if f"{key}/{name}" in self.server.list(key)
        } != self.wanted:
            told.problems.append("other bytes than undisturbed")
        verified = self.chance.choice(self.nodes[1:]).pcb_ray("verify", out)
        if verified.process.returncode:
            told.problems.append(f"verify: {verified.text}")
        if uploads := self.server.uploads():
            told.problems.append(f"uploads that nobody goes on with: {uploads}")
        for name in self.server.list(f"{key}/"):
            self.server.delete(name)
        if beside := list(self.server.list("merges/")):
            told.problems.append(f"beside the output: {beside}")
        try:
            await_end([owner for node in self.nodes for owner in node.owners])
        except AssertionError as error:
            told.problems.append(f"workers: {error}")

    def long_living(self) -> dict[psutil.Process, str]:
        """Ray's own processes, which outlive any merge, with their names."""
        found = {}
        for node in self.nodes:
            for process in node.processes:
                if _kind(process) in ("raylet", "gcs_server", "ray::DashboardAgent", "ray::RuntimeEnvAgent"):
                    found[process] = f"{_kind(process)} of node {node.folder.name}"
        return found

    def left(self) -> Left:
        """What there is once all has settled."""
        time.sleep(20)  # what was killed is buried, what is idle is told
        descriptors, memory = {}, {}
        for process in self.long_living():
            descriptors[process.pid], memory[process.pid] = process.num_fds(), process.memory_full_info().uss
        processes = collections.Counter(_kind(process) for node in self.nodes for process in node.processes)
        del processes["ray::IDLE"]
        return Left(
            processes=dict(sorted(processes.items())),
            descriptors=descriptors,
            memory=memory,
            store=self._in_object_stores(),
            rooms=sum(len(node.rooms) for node in self.nodes),
            files=tuple(sorted(set(_files(self.nodes)))),
            objects=tuple(self.server.list("merges/")) + tuple(self.server.list(".")),
            uploads=len(self.server.uploads()),
        )

    def _in_object_stores(self) -> int:
        script = (
            "import sys, ray; ray.init(sys.argv[1], log_to_driver=False, logging_level='ERROR')\n"
            "from ray._private.internal_api import node_stats\n"
            "stats = [node_stats(n['NodeManagerAddress'], n['NodeManagerPort'], False) for n in ray.nodes() if n['Alive']]\n"
            "print(sum(s.store_stats.object_store_bytes_used for s in stats))\n"
        )
        done = self.nodes[1].command([BIN / "python", "-c", script, self.address])
        return int(done.stdout.split()[-1])


def _kind(process: psutil.Process) -> str:
    try:
        if process.status() == psutil.STATUS_ZOMBIE:
            return "zombie"
        name = title(process)
        return name.partition(" ")[0] if name.startswith("ray::") else process.name()
    except psutil.NoSuchProcess:
        return "gone"


def _files(nodes: list[Machine]) -> Iterator[str]:
    for node in nodes:
        for folder in (node.shm, node.scratch):
            for path in folder.rglob("*"):
                if not path.is_dir():
                    yield f"{folder}/{path.relative_to(folder)}"


def _grown(before: Left, after: Left, lived: Mapping[int, str]) -> Iterator[str]:
    for kind in after.processes:
        if after.processes[kind] > before.processes.get(kind, 0):
            yield f"processes: {after.processes[kind]} {kind}, there were {before.processes.get(kind, 0)}"
    for pid, name in lived.items():
        if after.descriptors[pid] > before.descriptors[pid] + 20:
            yield f"{name}: {after.descriptors[pid]} descriptors, there were {before.descriptors[pid]}"
        if after.memory[pid] > before.memory[pid] + 100 * MB:
            yield f"{name}: {after.memory[pid] / MB:.0f} MB, there were {before.memory[pid] / MB:.0f}"
    if after.store > before.store:
        yield f"Ray's object stores: {after.store} bytes, there were {before.store}"
    if after.rooms or after.uploads or after.objects:
        yield f"left: {after.rooms} rooms, {after.uploads} uploads, {after.objects}"
    if new := set(after.files) - set(before.files):
        yield f"files in /dev/shm or scratch: {sorted(new)}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--merges", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scale", type=int, default=1000, help="a model has 19,552 elements times this")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = soak(asked.merges, asked.seed, asked.scale, Path(folder))
    before, after = found.before, found.after
    import ray

    day = datetime.date.today().isoformat()
    print(f"# A soak of {asked.merges} merges, {day}, {os.cpu_count()} cores, {platform.machine()}\n")
    print(f"Ray {ray.__version__}, Python {platform.python_version()}, seed {asked.seed}, scale {asked.scale}.\n")
    print("| merge | faults | starts | workers lost | s | wrong |\n| --- | --- | --- | --- | --- | --- |")
    for one in found.merges:
        faults = ", ".join(one.faults) or "none"
        wrong = len(one.problems) or "nothing"
        print(f"| {one.name} | {faults} | {one.attempts} | {one.workers_lost} | {one.seconds:.0f} | {wrong} |")
    print("\n| what there is | after the first | after the last |\n| --- | --- | --- |")
    for pid, name in found.lived.items():
        print(f"| descriptors of the {name} | {before.descriptors[pid]} | {after.descriptors[pid]} |")
        print(f"| its memory, MB | {before.memory[pid] / MB:.0f} | {after.memory[pid] / MB:.0f} |")
    print(f"| processes but idle workers of Ray | {sum(before.processes.values())} | {sum(after.processes.values())} |")
    for name, what in (("Ray's object stores, bytes", "store"), ("rooms in /dev/shm and scratch", "rooms"), ("uploads", "uploads")):
        print(f"| {name} | {getattr(before, what)} | {getattr(after, what)} |")
    print(f"| files in /dev/shm and scratch | {len(before.files)} | {len(after.files)} |")
    print(f"| objects beside and below the outputs | {len(before.objects)} | {len(after.objects)} |")
    print("\n## What was wrong\n")
    print("\n".join(f"- {problem}" for problem in found.problems) or "Nothing.")
    return int(bool(found.problems))


if __name__ == "__main__":
    sys.exit(main())
