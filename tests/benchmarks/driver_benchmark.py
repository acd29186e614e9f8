"""What the driver of a merge takes: core seconds, memory, and bytes that go through it, whatever the number of owners.

python tests/benchmarks/driver_benchmark.py simulate [--owners 1000] [--models 32] [--billions 70]
python tests/benchmarks/driver_benchmark.py ray DIR      (what make_family.py has made: real owners, on one node and on three)

`simulate` runs the real driver: `RayOwners`, `Schedule`, the analysis with its selection, `write`. In the place of Ray stands a
module of a few functions that sends calls to one other process, where the real actors live, with a clock of their own: a batch
takes an owner --item-s for each chunk, messages a millisecond, and the driver as long as it really takes. What the actors answer
has the real types and sizes, and is made up: keys that are spread evenly over 20 octaves. To add up the totals of all owners would
take that process hours, so 32 of them are added up really: they see nearly every key of a bracket, as all would."""

from __future__ import annotations

import argparse
import dataclasses
import heapq
import json
import math
import multiprocessing
import os
import pickle
import random
import subprocess
import sys
import tempfile
import time
import types
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import measure
import numpy as np

from pcb_ray.analysis import analyse
from pcb_ray.files.checkpoint import Checkpoint, Tensor
from pcb_ray.planning import Inputs, Plan, plan_of
from pcb_ray.questions import SAMPLE_SHIFT, Counted, CountKeys, OwnerState, Sampled, SampleKeys, WriteParts, Written
from pcb_ray.recipe import Model, Recipe
from pcb_ray.runtime import Options, RayOwners
from pcb_ray.selection import GROUP_BITS, SAMPLE_GROUPS, Sample, Tally
from pcb_ray.session import Session
from pcb_ray.steps import write

ADDED_REALLY = 32
FIRST_KEY, KEYS = 0x30000000, 20 << 23  # of |tau| and beta: 20 octaves
SMALL = 100 << 10  # answers below this come with the word that they are there, as in Ray
LATENCY_S = 1e-3


# --- what owners answer, made up --------------------------------------------------------------------------------------------------


class MadeUp:
    """The total of some owners' answers: it is made when it is sent, as one of the questions' real answers."""

    def __init__(self, plan: Plan, question: SampleKeys | CountKeys, owner: int, items: int) -> None:
        self.plan, self.question, self.items = plan, question, {owner: items}

    def merge(self, other: MadeUp) -> None:
        for owner, items in other.items.items():
            self.items[owner] = self.items.get(owner, 0) + items

    def __reduce__(self) -> Any:
        shares = sorted(self.items.values(), reverse=True)[:ADDED_REALLY]
        elements = self.plan.D * sum(self.items.values()) / self.plan.chunks
        start_s, total = time.process_time(), None
        for k in range(len(shares)):
            one = (
                self._sampled(elements / len(shares))
                if isinstance(self.question, SampleKeys)
                else self._counted(elements, len(shares), k)
            )
            if total is None:
                total = one
            else:
                total.merge(one)  # type: ignore[arg-type]
        assert total is not None
        additions = max(1, len(shares) - 1)
        print(f"  owners: one addition of totals like these takes {(time.process_time() - start_s) / additions:.2f} s", flush=True)
        return _as_it_is, (total,)

    def _sampled(self, elements: float) -> Sampled:
        sizes, shift = self.plan.sizes, SAMPLE_SHIFT[32]
        bins = np.arange(FIRST_KEY >> shift, FIRST_KEY + KEYS >> shift)
        entries = (bins[:, None] << GROUP_BITS | np.arange(SAMPLE_GROUPS)).ravel()
        each = max(1, round(elements * sizes.sample_run / sizes.sample_stride / len(entries)))
        samples = []
        for _ in range(self.plan.N):
            sample = Sample(shift)
            sample.bins, sample.counts = entries, np.full(len(entries), each)
            samples.append(sample)
        return Sampled(samples)

    def _counted(self, elements: float, owners: int, k: int) -> Counted:
        """Of one of so many owners, who together stand for so many elements."""
        assert isinstance(self.question, CountKeys)
        random_k = np.random.default_rng(k)

        def tally(bracket: Any) -> Tally:
            made = Tally(bracket, self.plan.sizes.tally_entries)
            below, upto_lo, below_hi, upto_hi = (
                round(min(1.0, max(0.0, (key - FIRST_KEY) / KEYS)) * elements / owners)
                for key in (bracket.lo, bracket.lo + 1, bracket.hi, bracket.hi + 1)
            )
            width, inside = bracket.hi - bracket.lo - 1, below_hi - upto_lo
            keys = np.flatnonzero(random_k.random(width) < -math.expm1(-inside / max(width, 1)) if inside else []) + bracket.lo + 1
            counts = np.full(len(keys), inside // max(len(keys), 1))
            counts[:1] += inside - counts.sum()
            made.below_lo, made.upto_lo, made.below_hi, made.upto_hi = below, upto_lo, below_hi, upto_hi
            made.keys, made.counts = keys, counts
            return made

        tallies = [[tally(bracket) for bracket in of_model] for of_model in self.question.brackets]
        return Counted(tallies, [FIRST_KEY + KEYS] * self.plan.N, (0,) * (self.plan.N + 1), None)


def _as_it_is(total: Any) -> Any:
    return total


class MadeUpOwner:
    def __init__(self, plan: Plan, options: Options) -> None:
        self.plan, self.number = plan, next(_numbers)

    def state(self) -> OwnerState:
        return OwnerState("native", "cpu", 0, 0, self.number, "node")

    def sample(self, chunks: Sequence[int], question: SampleKeys) -> MadeUp:
        return MadeUp(self.plan, question, self.number, len(chunks))

    def count(self, chunks: Sequence[int], question: CountKeys) -> MadeUp:
        return MadeUp(self.plan, question, self.number, len(chunks))

    def write(self, parts: Sequence[int], question: WriteParts) -> dict[int, Written]:
        one = random.getrandbits(128)
        return {part: Written(one, (0,) * (self.plan.N + 1)) for part in parts}

    def sync(self) -> None: ...

    def close(self) -> None: ...


_numbers = iter(range(1 << 30))


# --- in the place of Ray ----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Ref:
    number: int


def cluster(pipe: Connection, item_s: float) -> None:
    """All actors, in a process of its own; it answers until the driver is gone."""
    from pcb_ray.runtime import _Actor

    actors: dict[int, Any] = {}
    values: dict[int, Any] = {}
    ready_s: dict[int, float] = {}
    free_s: dict[tuple[int, bool], float] = {}
    coming: list[tuple[float, int]] = []
    now, jitter = 0.0, random.Random(0)
    while True:
        try:
            kind, content = pickle.loads(pipe.recv_bytes())
        except EOFError:
            return
        if kind == "get":
            pipe.send_bytes(pickle.dumps(values[content]))
            continue
        elapsed_s, calls = content
        now += elapsed_s
        for actor, method, aside, references, arguments in calls:
            if method == "put":
                values[references[0]] = arguments[0]
                continue
            if actor not in actors:
                actors[actor] = _Actor()
            start = max(
                [
                    now + LATENCY_S,
                    free_s.get((actor, aside), 0.0),
                    *(ready_s.get(a.number, 0.0) for a in arguments if isinstance(a, Ref)),
                ]
            )
            arguments = [values[a.number] if isinstance(a, Ref) else a for a in arguments]
            answer = getattr(actors[actor], method)(*arguments)
            items = len(arguments[-1]) if method in ("add", "ask") else 0
            end = free_s[actor, aside] = start + LATENCY_S + items * item_s * jitter.uniform(0.8, 1.2)
            for reference, value in zip(references, answer if len(references) > 1 else [answer], strict=True):
                values[reference], ready_s[reference] = value, end
                heapq.heappush(coming, (end, reference))
        now = max(now, coming[0][0]) if coming else now
        told = []
        while coming and coming[0][0] <= now:
            reference = heapq.heappop(coming)[1]
            small = b"" if isinstance(getattr(values[reference], "total", None), MadeUp) else pickle.dumps(values[reference])
            told.append((reference, small if len(small) < SMALL else b""))
        pipe.send_bytes(pickle.dumps((now, told)))


class Driver:
    """The other end, and what went through it."""

    def __init__(self, pipe: Connection) -> None:
        self.pipe, self.calls, self.ready = pipe, list[Any](), dict[int, bytes]()
        self.numbers, self.sent, self.received, self.turns, self.messages, self.now = iter(range(1 << 40)), 0, 0, 0, 0, 0.0
        self.since = time.process_time()

    def call(self, actor: int, method: str, aside: bool, returns: int, arguments: Sequence[Any]) -> Any:
        references = [Ref(next(self.numbers)) for _ in range(returns)]
        # Each is sent by itself, and what it holds is as large as in the sum.
        self.calls.append((actor, method, aside, [r.number for r in references], arguments))
        self.messages += method != "put"
        return references[0] if returns == 1 else references

    def wait(self, references: Sequence[Ref], num_returns: int, timeout: float) -> Any:
        found = [r for r in references if r.number in self.ready]
        if not found and timeout:
            self.turns += 1
            data = pickle.dumps(("turn", (time.process_time() - self.since, self.calls)))
            self.sent, self.calls = self.sent + len(data), []
            self.pipe.send_bytes(data)
            answer = self.pipe.recv_bytes()
            self.received += len(answer)
            self.since = time.process_time()
            self.now, told = pickle.loads(answer)
            self.ready.update(told)
            found = [r for r in references if r.number in self.ready]
        found = found[:num_returns]
        return found, [r for r in references if r not in found] if num_returns == 1 and not found else []

    def get(self, reference: Ref, timeout: float | None = None) -> Any:
        data = self.ready.pop(reference.number)
        if not data:
            self.pipe.send_bytes(pickle.dumps(("get", reference.number)))
            data = self.pipe.recv_bytes()
            self.received += len(data)
            print(f"  driver: one total of {len(data) / 1e6:.1f} MB", flush=True)
        return pickle.loads(data)


def ray_by(driver: Driver) -> types.ModuleType:
    numbers = iter(range(1 << 30))

    class Method:
        def __init__(self, actor: int, name: str, options: dict[str, Any]) -> None:
            self.actor, self.name, self.given = actor, name, options

        def options(self, **options: Any) -> Method:
            return Method(self.actor, self.name, options)

        def remote(self, *arguments: Any) -> Any:
            aside = self.given.get("concurrency_group") == "aside"
            return driver.call(self.actor, self.name, aside, self.given.get("num_returns", 1), arguments)

    class Handle:
        def __init__(self) -> None:
            self._number = next(numbers)

        def __getattr__(self, name: str) -> Method:
            return Method(self._number, name, {})

    class Class:
        def options(self, **_: Any) -> Class:
            return self

        def remote(self) -> Handle:
            return Handle()

    ray, errors = types.ModuleType("ray"), types.ModuleType("ray.exceptions")
    for name in ("RayError", "RayTaskError", "RayActorError", "ObjectLostError", "OutOfMemoryError", "GetTimeoutError"):
        setattr(errors, name, type(name, (Exception,), {}))
    names = {
        "exceptions": errors,
        "remote": lambda **_: lambda _: Class(),
        "put": lambda value: driver.call(-1, "put", False, 1, (value,)),
        "get": driver.get,
        "wait": driver.wait,
        "kill": lambda _: None,
    }
    for name, value in names.items():
        setattr(ray, name, value)
    sys.modules |= {"ray": ray, "ray.exceptions": errors}
    return ray


# --- the simulation ---------------------------------------------------------------------------------------------------------------


def large_plan(models: int, billions: float) -> Plan:
    rows = round(billions * 1e9 / 80 / 8192)
    shapes = {f"layers.{k}.weight": (rows + k, 8192) for k in range(-40, 40)}  # no two alike, which would be compared

    def checkpoint(name: str) -> Checkpoint:
        tensors = {key: Tensor(key, "BF16", shape, name, k << 40) for k, (key, shape) in enumerate(shapes.items())}
        return Checkpoint(name, None, tensors, {}, (), None, None)

    opened = [checkpoint(f"model{k}") for k in range(models + 1)]
    recipe = Recipe(tuple(Model(one.source) for one in opened[1:]), "model0")
    return plan_of(recipe, Inputs(opened[0], tuple(opened[1:]), opened[0]))


class Nowhere:
    def create(self, file: str, size: int) -> None: ...


class Told(Session):
    """A session that tells what each sweep took of the driver."""

    driver: Driver

    @contextmanager
    def _telling(self, name: str) -> Iterator[None]:
        one = self.driver
        before = time.process_time(), one.sent, one.received, one.turns, one.messages, one.now
        yield
        after = time.process_time(), one.sent, one.received, one.turns, one.messages, one.now
        core_s, sent, received, turns, messages, seconds = (b - a for a, b in zip(before, after, strict=True))
        print(
            f"| {name} | {messages:,} | {turns:,} | {core_s:.1f} | {core_s / max(messages, 1) * 1e6:.0f} | {seconds:.0f} | "
            f"{sent / 1e6:.1f} | {received / 1e6:.1f} | {peak_bytes() / 1e6:.0f} |",
            flush=True,
        )

    def total(self, name: str, *arguments: Any, **options: Any) -> Any:
        with self._telling(name):
            return super().total(name, *arguments, **options)

    def store(self, name: str, *arguments: Any, **options: Any) -> Iterator[Any]:
        with self._telling(name):
            yield from super().store(name, *arguments, **options)


def peak_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) << 10


def simulate(owners: int, models: int, billions: float, item_s: float) -> None:
    ours, theirs = multiprocessing.Pipe()
    context = multiprocessing.get_context("fork")
    process = context.Process(target=cluster, args=(theirs, item_s), daemon=True)
    process.start()
    theirs.close()
    driver = Driver(ours)
    ray_by(driver)
    start = time.process_time()
    plan = large_plan(models, billions)
    print(
        f"{owners:,} owners, {models} models, D = {plan.D:,}, {plan.chunks:,} chunks, {len(plan.parts):,} parts, "
        f"a plan of {len(pickle.dumps(plan)) / 1e6:.1f} MB made in {time.process_time() - start:.1f} s; "
        f"{peak_bytes() / 1e6:.0f} MB so far"
    )
    print("| sweep | calls | turns | driver core s | us a call | simulated s | MB sent | MB received | peak MB |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    begin = time.process_time()
    pool = RayOwners(workers=owners, device="cpu", worker_bytes=0, make_owner=MadeUpOwner)  # type: ignore[arg-type]

    def owners_for(plan: Plan) -> RayOwners:
        pool.use(plan, 1 << 18)
        return pool

    session = Told(plan, owners_for)
    session.driver = driver
    with session._telling("(start)"):
        pool.wait_until_ready()
    known = analyse(session)
    write(session, Nowhere(), known, "out")  # type: ignore[arg-type]
    core_s = time.process_time() - begin
    print(f"in all {core_s:.1f} core seconds of the driver, of {driver.now:.0f} s simulated; peak {peak_bytes() / 1e6:.0f} MB")
    process.terminate()


# --- real owners ------------------------------------------------------------------------------------------------------------------


def on_ray(folder: Path) -> None:
    print("| nodes | owners | driver core s | memory of the driver, MB | bytes to the driver, MB | merge s |")
    print("| --- | --- | --- | --- | --- | --- |")
    for nodes, owners in ((1, 1), (1, 2), (1, 4), (3, 1), (3, 2), (3, 4)):
        command = [sys.executable, __file__, "one", str(folder), "--nodes", str(nodes), "--owners", str(owners)]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=280)
        if ended.returncode:
            raise SystemExit(ended.stderr)
        told = json.loads(ended.stdout.splitlines()[-1])
        peak, received = told["peak_bytes"] / 1e6, told["received"] / 1e6
        print(f"| {nodes} | {owners} | {told['core_s']:.1f} | {peak:.0f} | {received:.2f} | {told['merge_s']:.1f} |", flush=True)


def one_on_ray(folder: Path, nodes: int, owners: int) -> None:
    import ray
    from ray.cluster_utils import Cluster

    from pcb_ray import merge

    each = {"num_cpus": -(-owners // nodes), "object_store_memory": 80 << 20, "memory": 8 << 30}
    made = Cluster(initialize_head=True, head_node_args={**each, "include_dashboard": False})
    try:
        for _ in range(nodes - 1):
            made.add_node(**each)
        ray.init(address=made.address, log_to_driver=False, logging_level="ERROR")
        received, peak, get = 0, 0, ray.get

        def counted(reference: Any, **options: Any) -> Any:
            nonlocal received, peak
            answer = get(reference, **options)
            received += len(ray.cloudpickle.dumps(answer))
            peak = max(peak, measure.anonymous_bytes(os.getpid()))
            return answer

        ray.get = counted
        start, core_s = time.monotonic(), time.process_time()
        with tempfile.TemporaryDirectory(dir=folder) as out:
            merge(folder / "pcb.yaml", Path(out) / "out", workers=owners, quiet=True)
        told = {
            "core_s": time.process_time() - core_s,
            "merge_s": time.monotonic() - start,
            "received": received,
            "peak_bytes": peak,
        }
        ray.get = get
        ray.shutdown()
    finally:
        made.shutdown()
    print(json.dumps(told))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    simulation = commands.add_parser("simulate")
    simulation.add_argument("--owners", type=int, default=1000)
    simulation.add_argument("--models", type=int, default=32)
    simulation.add_argument("--billions", type=float, default=70.0)
    simulation.add_argument("--item-s", type=float, default=1.0)
    real, one = commands.add_parser("ray"), commands.add_parser("one")
    for command in (real, one):
        command.add_argument("folder", type=Path)
    one.add_argument("--nodes", type=int)
    one.add_argument("--owners", type=int)
    options = parser.parse_args()
    if options.command == "simulate":
        simulate(options.owners, options.models, options.billions, options.item_s)
    elif options.command == "ray":
        on_ray(options.folder)
    else:
        one_on_ray(options.folder, options.nodes, options.owners)


if __name__ == "__main__":
    main()
