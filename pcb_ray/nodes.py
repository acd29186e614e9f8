"""What the nodes of a cluster have, which of them may work, and how many workers they hold."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pcb_ray.errors import RequestError

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
        units = {"num_gpus": 1, "num_cpus": 0} if self.unit == "GPU" else {"num_cpus": 1}
        found = {**units, "memory": self.memory, "resources": dict(self.pool.resources)}
        return found | ({"label_selector": dict(self.pool.labels)} if self.pool.labels else {})

    def places(self, found: Iterable[Node]) -> int:
        """How many workers these nodes hold, if nobody else uses them."""
        return sum(
            min(int(node.has(name) / amount + LEAST) for name, amount in self.amounts.items())
            for node in found
            if self.pool.admits(node)
        )


def choose_device(device: str, pool: Pool) -> str:
    """cpu or cuda; `auto` is cuda where nodes that may work have a GPU."""
    gpus = sum(node.has("GPU") for node in nodes() if pool.admits(node))
    if device == "cuda" and gpus < 1:
        raise RequestError(
            "--device cuda: wanted a GPU, found none in the cluster. Fix: use --device cpu, or join a cluster with GPUs by "
            "--address"
        )
    return ("cuda" if gpus >= 1 else "cpu") if device == "auto" else device


def choose_workers(workers: int | None, needs: Needs, chunks: int) -> int:
    """The wished number of workers, else one per core (GPU) of the cluster as memory allows; never more than the cluster can
    place."""
    found = nodes()
    places = needs.places(found)
    if places == 0:
        raise RequestError(_why_none(needs, found))
    if workers is None:
        return min(places, chunks)
    if workers > places:
        units = int(sum(node.has(needs.unit) for node in found if needs.pool.admits(node)))
        raise RequestError(
            f"--workers: wanted {workers}, found a cluster with {units} {needs.unit}s and memory for {places} workers of "
            f"{needs.memory / 1e9:.2f} GB. Fix: ask for at most {places}, or lower --memory."
        )
    return workers


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
