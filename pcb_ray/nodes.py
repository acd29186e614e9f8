"""What the nodes of a cluster have, which of them may work, and how many workers they hold."""

from __future__ import annotations

import contextlib
import json
import logging
import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pcb_ray.cluster import noted_by_head
from pcb_ray.errors import RequestError

log = logging.getLogger("pcb_ray")

AUTOSCALER_S = 600.0
"""So long an autoscaler is waited for."""

_NAME = r"[A-Za-z0-9]([\w.-]*[A-Za-z0-9])?"
_KEY = re.compile(rf"({_NAME}/)?{_NAME}")
_SELECTOR = re.compile(rf"(?P<other>!?)(in\((?P<several>{_NAME}(,{_NAME})*)\)|(?P<one>{_NAME}))")
LEAST = 1e-4  # of a resource, as Ray counts
_OURS = ("CPU", "GPU", "memory", "object_store_memory")


@dataclass(frozen=True)
class Node:
    """A node that is there to stay."""

    id: str
    resources: Mapping[str, float]
    labels: Mapping[str, str]

    def has(self, resource: str) -> float:
        """How much of it in all, whoever uses it."""
        return self.resources.get(resource, 0.0)

    def __str__(self) -> str:
        return f"{self.has('CPU'):g} CPUs, {self.has('GPU'):g} GPUs and {self.has('memory') / 1e9:.2f} GB"


def nodes() -> list[Node]:
    """The cluster's living nodes, without those that are about to go."""
    import ray

    leaving = draining()
    table: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    return [Node(n["NodeID"], n["Resources"], n["Labels"]) for n in table if n["Alive"] and n["NodeID"] not in leaving]


def draining() -> set[str]:
    """The ids of nodes that are about to go: a spot instance with notice, `ray drain-node`, `ray start --block` that is to end.

    Ray has no public name for it; its own libraries ask in this way."""
    import ray

    return set(ray._private.state.state.get_draining_nodes())


def shown_nodes(found: Iterable[Node]) -> str:
    """For people."""
    return "; ".join(map(str, found)) or "no nodes"


@dataclass(frozen=True)
class Pool:
    """Which nodes may work, by their labels, and what of a node's own resources each worker takes. Raises RequestError if it can be
    none."""

    labels: Mapping[str, str] = field(default_factory=dict)
    """Values as Ray's label selectors have them: `spot`, `!spot`, `in(spot,on-demand)`, `!in(...)`."""
    resources: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        problems = [
            f"--label {key}={value}: wanted KEY=VALUE, and as VALUE a label, !LABEL, in(LABEL,...) or !in(LABEL,...), found "
            "something else. Fix: write such as pool=merge; labels have letters, digits, `-`, `_` and `.`."
            for key, value in self.labels.items()
            if not _KEY.fullmatch(key) or not _SELECTOR.fullmatch(value)
        ]
        for name, amount in self.resources.items():
            told = f"--resource {name}={amount:g}: wanted"
            if name in _OURS:
                problems.append(f"{told} a resource of your own, found one of Ray's. Fix: use --device, --memory and --workers.")
            elif not name or not amount > 0 or (amount > 1 and amount % 1):
                problems.append(
                    f"{told} NAME=AMOUNT, a whole number or a fraction of 1, found something else. Fix: write such as spot=1."
                )
        if problems:
            raise RequestError(problems)

    def admits(self, node: Node) -> bool:
        """Whether its labels are as wanted."""
        return all(_selects(value, node.labels.get(key)) for key, value in self.labels.items())

    def places(self, found: Iterable[Node], amounts: Mapping[str, float]) -> int:
        """How many processes these nodes hold that each take so much of them (and of what the pool asks for), if nobody else uses
        them."""
        taken = {**amounts, **self.resources}
        return sum(
            min(int(node.has(name) / amount + LEAST) for name, amount in taken.items()) for node in found if self.admits(node)
        )

    def options(self, amounts: Mapping[str, float]) -> dict[str, Any]:
        """What such a process asks of its node, for Ray."""
        found = {"num_cpus": amounts.get("CPU", 0), "num_gpus": amounts.get("GPU"), "memory": amounts.get("memory")}
        return {**found, "resources": dict(self.resources)} | ({"label_selector": dict(self.labels)} if self.labels else {})


def _selects(selector: str, label: str | None) -> bool:
    found = _SELECTOR.fullmatch(selector)
    if found is None:
        raise AssertionError(selector)
    labels = (found["several"] or found["one"]).split(",")
    return (label in labels) != bool(found["other"])


@dataclass(frozen=True)
class Needs:
    """What a worker takes of a node."""

    device: str
    memory: int
    pool: Pool = Pool()

    @property
    def unit(self) -> str:
        """What a worker has one of for itself."""
        return "GPU" if self.device == "cuda" else "CPU"

    @property
    def amounts(self) -> dict[str, float]:
        """Of all resources, by Ray's names."""
        return {self.unit: 1, "memory": self.memory, **self.pool.resources}

    @property
    def options(self) -> dict[str, Any]:
        """For Ray."""
        return self.pool.options(self.amounts)

    def places(self, found: Iterable[Node]) -> int:
        """How many workers these nodes hold, if nobody else uses them."""
        return self.pool.places(found, self.amounts)


def autoscales() -> bool:
    """Whether an autoscaler runs that may add nodes. It knows nodes by the types of its configuration; where there is none, Ray
    makes up a type for each node."""
    import ray
    from ray.autoscaler.v2.sdk import get_cluster_status
    from ray.autoscaler.v2.utils import is_autoscaler_v2

    if is_autoscaler_v2():
        status = get_cluster_status(ray.get_runtime_context().gcs_address)
        types = {node.node_id: node.ray_node_type_name for node in [*status.active_nodes, *status.idle_nodes]}
    else:
        status = json.loads(noted_by_head(b"__autoscaling_status") or "{}")
        types = (status.get("autoscaler_report") or {}).get("node_type_mapping") or {}
    return any(kind != f"node_{node}" for node, kind in types.items())


@contextlib.contextmanager
def enough_nodes(workers: int | None, needs: Needs) -> Iterator[None]:
    """With as many nodes as the wished number of workers needs (or one), as far as an autoscaler adds them within a while. What it
    was asked for is withdrawn at the end."""
    wanted, places = workers or 1, needs.places(nodes())
    if places >= wanted or not autoscales():
        yield
        return
    from ray.autoscaler.sdk import request_resources

    log.warning(
        "the autoscaler is asked for nodes: %d workers are wanted, the cluster has room for %d; it is waited for %.0f s at most",
        wanted,
        places,
        AUTOSCALER_S,
    )
    labels = dict(needs.pool.labels)
    try:
        request_resources(bundles=[needs.amounts] * wanted, bundle_label_selectors=[labels] * wanted if labels else None)
        begin = time.monotonic()
        while places < wanted and time.monotonic() - begin < AUTOSCALER_S:
            time.sleep(1.0)
            places = needs.places(nodes())
        waited_s = time.monotonic() - begin
        log.log(
            logging.INFO if places >= wanted else logging.WARNING,
            "after %.0f s there is room for %d of %d workers%s",
            waited_s,
            places,
            wanted,
            "" if places >= wanted else "; nodes that come later are used",
        )
        yield
    finally:
        request_resources(bundles=[])


def choose_device(device: str, pool: Pool) -> str:
    """cpu or cuda; `auto` is cuda where nodes that may work have a GPU."""
    gpus = sum(node.has("GPU") for node in nodes() if pool.admits(node))
    if device == "cuda" and gpus < 1 and not autoscales():
        raise RequestError(
            "--device cuda: wanted a GPU, found none in the cluster. Fix: use --device cpu, or join a cluster with GPUs by "
            "--address"
        )
    return ("cuda" if gpus >= 1 else "cpu") if device == "auto" else device


def choose_workers(workers: int | None, needs: Needs, chunks: int) -> int:
    """The wished number of workers, else one per core (GPU) of the cluster as memory allows; never more than the cluster can
    place now."""
    found = nodes()
    places = needs.places(found)
    if places == 0:
        raise RequestError(_why_none(needs, found))
    if workers is None:
        return min(places, chunks)
    if workers > places and not autoscales():
        units = int(sum(node.has(needs.unit) for node in found if needs.pool.admits(node)))
        raise RequestError(
            f"--workers: wanted {workers}, found a cluster with {units} {needs.unit}s and memory for {places} workers of "
            f"{needs.memory / 1e9:.2f} GB. Fix: ask for at most {places}, or lower --memory."
        )
    return min(workers, places)


def _why_none(needs: Needs, found: Sequence[Node]) -> list[str]:
    """What no node has."""
    pool = needs.pool
    admitted = [node for node in found if pool.admits(node)]
    if not admitted:
        asked = " ".join(f"--label {key}={value}" for key, value in pool.labels.items())
        keys = {key: sorted({node.labels[key] for node in found if key in node.labels}) for key in pool.labels}
        there = "; ".join(f"{key}: {', '.join(values) or 'on no node'}" for key, values in keys.items())
        return [
            f"{asked}: wanted a node with this, found {there}. Fix: start nodes with it (`ray start --labels KEY=VALUE`), or "
            "leave it out."
        ]
    problems = [
        f"--resource {name}={amount:g}: wanted a node with so much of it, found at most {max(n.has(name) for n in admitted):g}. "
        f"Fix: start nodes with it (`ray start --resources '{{\"{name}\": {max(1, amount):g}}}'`), ask for less, or leave it out."
        for name, amount in pool.resources.items()
        if all(node.has(name) < amount for node in admitted)
    ]
    return problems or [
        f"the cluster: wanted a node with room for a worker of {needs.memory / 1e9:.2f} GB and one {needs.unit}, found "
        f"{shown_nodes(admitted)}. Fix: lower --memory or use larger nodes"
    ]
