"""What a merge would take on a cluster that isn't here: seconds of each sweep, bytes of each node, from a plan and measured rates.

Pure arithmetic, and all of it is shown. It reckons with nodes that are alike, an analysis that stays where its bytes were fetched,
and reading, computing and writing at the same time: a sweep takes as long as the slowest of the three. The output goes where the
inputs lie: parts that whoever is free writes, or files in a store, which have one writer each. It leaves out what starting takes,
what the driver adds, and making the output durable."""

from __future__ import annotations

import heapq
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from pcb_ray.checks import nearest, size_of, wrong
from pcb_ray.errors import RequestError
from pcb_ray.files.room import SHARE_OF_MEMORY
from pcb_ray.files.store import is_remote
from pcb_ray.methods import Ranks
from pcb_ray.planning import Plan

SHARE_OF_WORKERS = 0.7
"""Of a node's memory: what Ray gives to workers. The rest is its object store, which a merge hardly uses."""
EXAMPLE = "nodes=16,cores=64,mem=1TB,net=25Gb,disk=5GB/s"
_KEYS = {
    "nodes": ("a whole number of at least 1", "nodes=16"),
    "cores": ("a whole number of at least 1, of each node", "cores=64"),
    "mem": ("the memory of each node", "mem=1TB"),
    "net": ("bits per second, of each node", "net=25Gb (gigabits; 25 gigabytes per second are 200Gb)"),
    "disk": ("bytes per second, of each node", "disk=5GB/s"),
}
_BITS = {"k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


@dataclass(frozen=True)
class Cluster:
    """Nodes that are alike."""

    nodes: int
    cores: int
    """Of each node, as all that follows."""
    memory_bytes: int
    network: float
    """Bytes per second that come, and as many that go at the same time."""
    disk: float | None = None
    """Bytes per second, read and written together: of a disk for scratch, or of the file system that local paths lie on."""

    @classmethod
    def parse(cls, text: str) -> Cluster:
        """`nodes=16,cores=64,mem=1TB,net=25Gb,disk=5GB/s`, of which `disk` may be left out. Raises RequestError with all that is
        wrong."""
        found: dict[str, float] = {}
        problems = []
        for part in text.split(","):
            key, sign, raw = (word.strip() for word in part.partition("="))
            if not sign or key not in _KEYS:
                fix = nearest(key, list(_KEYS)) if sign else f"write it as in {EXAMPLE}"
                problems.append(wrong("a key", f"KEY=VALUE with KEY one of {', '.join(_KEYS)}", part.strip(), fix))
            elif key in found:
                problems.append(f"{key}: wanted one value, found two. Fix: leave one out.")
            else:
                found[key] = value = _value(key, raw)
                if not value:
                    wanted, example = _KEYS[key]
                    problems.append(wrong(key, wanted, raw, f"write one such as {example}"))
        missing = [key for key in _KEYS if key != "disk" and key not in found]
        if missing and not problems:
            problems.append(wrong("keys", f"{', '.join(missing)} too", text.strip(), f"write all, as in {EXAMPLE}"))
        if problems:
            raise RequestError(problems)
        return cls(int(found["nodes"]), int(found["cores"]), int(found["mem"]), found["net"], found.get("disk"))


def _value(key: str, raw: str) -> float:
    """A value in whole numbers, bytes, or bytes per second; 0 for what is none."""
    if key in ("nodes", "cores"):
        return int(raw) if raw.isdecimal() and raw.isascii() and len(raw) < 10 else 0
    if key == "net":
        match = re.fullmatch(r"(\d{1,9}(?:\.\d+)?)\s*([kMGT])b(?:it)?(?:/s|ps)?", raw)
        return float(match[1]) * _BITS[match[2]] / 8 if match else 0
    size = raw.removesuffix("/s") if key == "disk" else raw
    return 0 if size.endswith("b") else size_of(size) or 0  # bits are as likely to be meant


@dataclass(frozen=True)
class SweepEstimate:
    """One sweep; bytes are those of one node."""

    name: str
    received_bytes: float
    """Over the network: what is fetched, and what is read of a file system where `disk` is not said."""
    sent_bytes: float
    disk_bytes: float
    busiest_elements: float
    """Of the worker that has the most to do."""
    rate: float
    """Elements per second of one core."""
    network_s: float
    disk_s: float
    arithmetic_s: float

    @property
    def seconds(self) -> float:
        return max(self.network_s, self.disk_s, self.arithmetic_s)

    @property
    def bound_by(self) -> str:
        """What takes longest: network, disk or arithmetic."""
        times = {"network": self.network_s, "disk": self.disk_s, "arithmetic": self.arithmetic_s}
        return max(times, key=lambda name: times[name])


@dataclass(frozen=True)
class Estimate:
    """What a merge would take on a cluster; bytes are those of one node."""

    cluster: Cluster
    worker_bytes: int
    workers_per_node: int
    workers: int
    """In all: never more than there are chunks."""
    chunks: int
    files: int
    """Of the output."""
    input_bytes: float
    """Of one full sweep."""
    remote_bytes: float
    """Of these what lies in object stores."""
    memory_room: float
    """What may be kept in memory of what was fetched."""
    kept_in_memory: float
    kept_on_disk: float
    fetched_again: float
    """By each further sweep of the analysis: what there is no room for."""
    fetched_bytes: float
    """In all, from object stores."""
    written_bytes: float
    sweeps: tuple[SweepEstimate, ...]

    @property
    def seconds(self) -> float:
        return sum(sweep.seconds for sweep in self.sweeps)

    @property
    def node_bytes(self) -> float:
        """The memory that workers, and what is kept in memory, take of a node."""
        return self.workers_per_node * self.worker_bytes + self.kept_in_memory

    def summary(self) -> dict[str, Any]:
        """As JSON values, with what follows from the rest."""
        sweeps = [asdict(sweep) | {"seconds": sweep.seconds, "bound_by": sweep.bound_by} for sweep in self.sweeps]
        return asdict(self) | {"sweeps": sweeps, "seconds": self.seconds}


def sweeps_of(plan: Plan) -> Iterator[tuple[str, float]]:
    """The sweeps of a merge in the usual case, by the names that a receipt gives them, and the share of elements that each looks
    at."""
    sizes = plan.sizes
    for wanted in plan.method.passes:
        if isinstance(wanted, Ranks) and sizes.tally_entries < plan.D and plan.method.unit != "tensor":
            yield f"sample of {wanted.quantity.name}", sizes.sample_run / sizes.sample_stride
        yield wanted.title, 1.0
    yield "write", 1.0


def estimate(plan: Plan, cluster: Cluster, worker_bytes: int, rates: Mapping[str, float]) -> Estimate:
    """What the plan takes there with workers of so many bytes. `rates` are elements per second and core, by the names of the sweeps
    (of a sample: elements that are looked at).

    Raises RequestError if a node has no room for a worker."""
    fits = int(SHARE_OF_WORKERS * cluster.memory_bytes // worker_bytes)
    if not fits:
        raise RequestError(
            f"--cluster: mem: wanted at least {worker_bytes / SHARE_OF_WORKERS:,.0f} bytes, {SHARE_OF_WORKERS:.0%} of which hold a "
            f"worker, found {cluster.memory_bytes:,}. Fix: plan with larger nodes, or a lower --memory."
        )
    per_node = min(cluster.cores, fits)
    workers = min(per_node * cluster.nodes, plan.chunks)
    remote = sum(t.nbytes for tensor in plan.tensors for t in tensor.sources if t is not None and is_remote(t.file)) / cluster.nodes
    local = plan.sweep_bytes / cluster.nodes - remote
    room = SHARE_OF_MEMORY * cluster.memory_bytes
    in_memory = min(remote, room)
    on_disk = 0.0 if cluster.disk is None else remote - in_memory
    again = remote - in_memory - on_disk
    written = plan.written_bytes / cluster.nodes
    copied_remote = sum(t.nbytes for c in plan.copies for t in c.models or (c.source,) if is_remote(t.file)) / cluster.nodes
    copied_local = plan.copied_bytes / cluster.nodes - copied_remote
    repeated = sum(plan.tensors[one.tensor].numel for one in plan.again)
    file_bytes = [file.size for file in plan.files]
    of_worker, of_node = (_busiest_share(file_bytes, takers) for takers in (workers, cluster.nodes))

    sweeps: list[SweepEstimate] = []
    fetched_bytes = 0.0
    for name, share in sweeps_of(plan):
        # Whoever samples what lies in a store fetches it whole: there is a run of the sample in each piece.
        fetched = again if sweeps else remote
        scratch = on_disk * (share if sweeps else 1.0)  # written by the first, read by the others
        from_files, to_files, to_store = share * local, 0.0, 0.0
        busiest = -(-plan.chunks // workers) * share * plan.D / plan.chunks
        if name == "write":
            elements, from_files = plan.D + repeated, from_files + copied_local
            if remote:  # the output goes where the inputs lie, and a file there has one writer, who needs what other nodes keep
                busiest = of_worker * elements
                fetched = of_node * (cluster.nodes * (remote + copied_remote) - in_memory - on_disk)
                to_store = of_node * plan.written_bytes
            else:
                busiest = -(-len(plan.parts) // workers) * elements / len(plan.parts)
                to_files = written
        fetched_bytes += fetched
        on_network = (fetched, to_store) if cluster.disk else (fetched + from_files, to_store + to_files)
        disk_bytes = scratch + from_files + to_files if cluster.disk else 0.0
        sweeps.append(
            SweepEstimate(
                name,
                *on_network,
                disk_bytes,
                busiest,
                rates[name],
                network_s=max(on_network) / cluster.network,
                disk_s=disk_bytes / cluster.disk if cluster.disk else 0.0,
                arithmetic_s=busiest / rates[name],
            )
        )
    return Estimate(
        cluster,
        worker_bytes,
        workers_per_node=per_node,
        workers=workers,
        chunks=plan.chunks,
        files=len(plan.files),
        input_bytes=remote + local,
        remote_bytes=remote,
        memory_room=room,
        kept_in_memory=in_memory,
        kept_on_disk=on_disk,
        fetched_again=again,
        fetched_bytes=fetched_bytes,
        written_bytes=written,
        sweeps=tuple(sweeps),
    )


def _busiest_share(sizes: Sequence[int], takers: int) -> float:
    """The share of the whole that falls to one of so many, if the largest is always given to whoever has least."""
    loads = [0] * min(takers, len(sizes))
    for size in sorted(sizes, reverse=True):
        heapq.heapreplace(loads, loads[0] + size)
    return max(loads) / sum(sizes)
