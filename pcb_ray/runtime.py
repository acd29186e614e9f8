"""All of Ray for merging: starting or joining a cluster, placing owners, asking them, replacing the dead.

`ask` sends one question about many items (chunks) to all owners and yields answers as they come, in no order: answers are such that order does
not matter. `fold` is for answers that add up: each owner keeps the sum of its own, and the owners then add up in pairs, as a tree, so that the
driver receives one answer whatever their number. Each owner works through its own shard, a contiguous run of items; one that is done takes
batches from the end of the longest shard left, and the items of a dead owner are asked again. `LocalOwners` does the same without Ray.
"""

from __future__ import annotations

import collections
import contextlib
import itertools
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from pcb_ray.errors import RequestError, RunError
from pcb_ray.plan import Plan

log = logging.getLogger("pcb_ray")

BATCHES_PER_OWNER = 32  # an owner's shard is asked for in about so many batches: progress, and work for those who finish early
MAX_BATCH = 64
IN_FLIGHT = 2  # batches an owner has at hand, so that it need not wait for the driver
PLACEMENT_TIMEOUT_S = 120.0
MAX_DEATHS_OF_BATCH = 3
LOCAL_OBJECT_STORE_BYTES = 80 << 20  # the smallest Ray accepts; answers are small


class Owners(Protocol):
    """Whoever answers questions about chunks."""

    stats: dict[int, dict[str, Any]]
    deaths: int

    def ask(self, question: str, items: Sequence[Any], *args: Any) -> Iterator[tuple[Sequence[Any], Any]]:
        """Yields (some items, the answer about them)."""
        ...

    def fold(self, question: str, items: Sequence[Any], *args: Any) -> Iterator[tuple[Sequence[Any], Any]]:
        """Yields (some items, None) as they are done - again, if their answer was lost - and last ((), the sum of all answers)."""
        ...


class LocalOwners:
    """Owners in this process, a thread each: for models in memory and for `verify`. The kernels leave the interpreter lock free."""

    deaths = 0

    def __init__(
        self,
        plan: Plan,
        out_dir: str = "",
        *,
        memory: dict[str, NDArray[np.uint8]] | None = None,
        threads: int | None = None,
        block_elements: int | None = None,
    ) -> None:
        from pcb_ray.owner import Owner

        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        self._owners = [
            Owner(plan, out_dir, memory=memory, block_elements=block_elements) for _ in range(min(threads or cores, plan.chunks))
        ]
        self.stats: dict[int, dict[str, Any]] = {}

    def ask(self, question: str, items: Sequence[Any], *args: Any) -> Iterator[tuple[Sequence[Any], Any]]:
        import torch

        def answer(number: int, batch: Sequence[Any]) -> tuple[int, Sequence[Any], Any]:
            return number, batch, getattr(self._owners[number], question)(batch, *args)

        batches = iter([items[at : at + 4] for at in range(0, len(items), 4)])
        before = torch.get_num_threads()
        try:
            # One torch thread each: a block is too small to be shared.
            with ThreadPoolExecutor(len(self._owners), initializer=torch.set_num_threads, initargs=(1,)) as pool:
                running = {pool.submit(answer, n, batch) for n, batch in zip(range(len(self._owners)), batches, strict=False)}
                while running:
                    done, running = wait(running, return_when=FIRST_COMPLETED)
                    for number, batch, result in (future.result() for future in done):
                        if (following := next(batches, None)) is not None:
                            running.add(pool.submit(answer, number, following))
                        self.stats[number] = self._owners[number].state()
                        yield batch, result
        finally:
            torch.set_num_threads(before)

    def fold(self, question: str, items: Sequence[Any], *args: Any) -> Iterator[tuple[Sequence[Any], Any]]:
        total: Any = None
        for batch, answer in self.ask(question, items, *args):
            if total is None:
                total = answer
            else:
                total.merge(answer)
            yield batch, None
        yield (), total


class _Actor:
    """An owner as Ray runs it. Its owner is made by `start` and not by the constructor, since what a constructor raises is lost."""

    def start(self, plan: Plan, out_dir: str, options: dict[str, Any]) -> dict[str, Any]:
        import torch

        from pcb_ray.owner import Owner

        torch.set_num_threads(1)  # one owner per core
        self.owner = Owner(plan, out_dir, **options)
        self.sum_of: tuple[int, int] | None = None  # what `total` adds up
        self.total: Any = None
        return self.owner.state()

    def ask(self, sum_of: tuple[int, int] | None, question: str, items: Sequence[Any], *args: Any) -> tuple[Any, dict[str, Any]]:
        """The answer; or, if it belongs to a sum, none: it is added to the total, which begins anew with a new sum."""
        answer = getattr(self.owner, question)(items, *args)
        if sum_of is None:
            return answer, self.owner.state()
        if sum_of != self.sum_of:
            self.sum_of, self.total = sum_of, answer
        else:
            self.total.merge(answer)
        return None, self.owner.state()

    def give(self) -> Any:
        """The total so far."""
        return self.total

    def absorb(self, total: Any) -> None:
        """Add the total of another owner to one's own."""
        self.total.merge(total)


@contextlib.contextmanager
def cluster(address: str | None) -> Iterator[None]:
    """Join the cluster at this address, or the one this job runs in, or start a local one; leave it (or end it) afterwards."""
    address = address or os.environ.get("RAY_ADDRESS") or "local"
    if address == "local" and "ray" not in sys.modules:
        os.environ.setdefault("RAY_AUTH_MODE", "token")  # authentication on, and no warning about it; Ray reads it when imported
    import ray

    if ray.is_initialized():  # the caller's own: used, and left as it is
        yield
        return
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # the coming default; silences a warning
    options: dict[str, Any] = {"address": address, "log_to_driver": False, "logging_level": logging.ERROR}
    if address == "local":
        options |= {"include_dashboard": False, "object_store_memory": LOCAL_OBJECT_STORE_BYTES}
    on_sigterm = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(**options)
    except (ConnectionError, ValueError, RuntimeError, ray.exceptions.RayError) as error:
        raise RunError(
            f"no Ray cluster at {address}: {str(error).splitlines()[0]}; start one with `ray start --head`, "
            "set RAY_AUTH_MODE=token if it asks for a token, or leave --address out for a local one"
        ) from error
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, on_sigterm)  # Ray's handler would end the process without a word
    try:
        yield
    finally:
        ray.shutdown()


def nodes() -> list[dict[str, float]]:
    """CPUs, GPUs and memory of the cluster's living nodes."""
    import ray

    return [
        {"CPU": n["Resources"].get("CPU", 0.0), "GPU": n["Resources"].get("GPU", 0.0), "memory": n["Resources"].get("memory", 0.0)}
        for n in ray.nodes()
        if n["Alive"]
    ]


def choose_device(device: str) -> str:
    """cpu or cuda; `auto` is cuda where the cluster has a GPU."""
    gpus = sum(n["GPU"] for n in nodes())
    if device == "cuda" and gpus < 1:
        raise RequestError(
            "--device cuda: the cluster has no GPU; use --device cpu (the bytes are the same), or join a cluster with GPUs by --address"
        )
    return ("cuda" if gpus >= 1 else "cpu") if device == "auto" else device


def choose_workers(workers: int | None, device: str, worker_bytes: int, chunks: int) -> int:
    """The wished number of workers, else one per core (GPU) of the cluster as memory allows; never more than the cluster can place."""
    unit = "GPU" if device == "cuda" else "CPU"
    fits = [min(int(n[unit]), int(n["memory"] // worker_bytes)) for n in nodes()]
    cores = int(sum(n[unit] for n in nodes()))
    if sum(fits) == 0:
        raise RequestError(
            f"no node has room for a worker of {worker_bytes / 1e9:.2f} GB and one {unit}: the nodes have {nodes()}; "
            "lower --memory or use larger nodes"
        )
    if workers is None:
        return min(sum(fits), chunks)
    if workers > sum(fits):
        raise RequestError(
            f"--workers {workers}: the cluster has {cores} {unit}s and memory for {sum(fits)} workers of "
            f"{worker_bytes / 1e9:.2f} GB; ask for at most {sum(fits)}, or lower --memory"
        )
    return workers


class RayOwners:
    """Owners as Ray actors, spread over the nodes."""

    def __init__(self, plan: Plan, out_dir: str, *, workers: int, device: str, worker_bytes: int, block_elements: int) -> None:
        import ray

        self.stats: dict[int, dict[str, Any]] = {}
        self.deaths = 0
        resources = {"num_gpus": 1, "num_cpus": 0} if device == "cuda" else {"num_cpus": 1}
        self._actor = ray.remote(_Actor).options(scheduling_strategy="SPREAD", memory=worker_bytes, max_restarts=0, **resources)
        self._arguments = (ray.put(plan), out_dir, {"device": device, "block_elements": block_elements})
        self._owners: dict[int, Any] = {}  # by number; a replacement has a new one
        self._starting: dict[Any, int] = {}  # reference to the end of `start` -> number
        self._born = 0
        self._sweeps = 0
        self._held: dict[int, list[Sequence[Any]]] = {}  # the batches whose answers an owner's total holds
        self._given: collections.Counter[int] = (
            collections.Counter()
        )  # how often an owner's total went to another, and it begins anew
        self._failures: collections.Counter[Any] = collections.Counter()  # of an item
        self._fruitless = 0  # deaths since the last answer
        for _ in range(workers):
            self._place()

    def close(self) -> None:
        """Let the actors go; a local cluster ends with the driver, another one goes on."""
        import ray

        for actor in self._owners.values():
            ray.kill(actor)
        self._owners, self._starting = {}, {}

    def wait_until_ready(self) -> None:
        """Wait for all owners to have started, but not for ever: `ask` works with those there are."""
        import ray

        ray.wait(list(self._starting), num_returns=len(self._starting), timeout=PLACEMENT_TIMEOUT_S / 4)

    def _place(self) -> None:
        number, self._born = self._born, self._born + 1
        self._owners[number] = self._actor.remote()
        self._starting[self._owners[number].start.remote(*self._arguments)] = number

    def ask(self, question: str, items: Sequence[Any], *args: Any) -> Iterator[tuple[Sequence[Any], Any]]:
        """Raises what an owner raised, or RunError if items keep killing owners."""
        import ray

        return self._work(_Shards(items, list(self._owners)), None, question, [ray.put(a) for a in args])

    def fold(self, question: str, items: Sequence[Any], *args: Any) -> Iterator[tuple[Sequence[Any], Any]]:
        """Raises as `ask` does."""
        import ray
        from ray.exceptions import ObjectLostError, RayActorError

        self._sweeps += 1
        shards, shared = _Shards(items, list(self._owners)), [ray.put(a) for a in args]
        while True:
            for batch, _ in self._work(shards, self._sweeps, question, shared):
                yield batch, None
            holders = list(self._held)
            try:
                if len(holders) == 1:
                    yield (), ray.get(self._owners[holders[0]].give.remote())
                    self._held = {}
                    return
                for one, other in self._add_up(holders):
                    self._held[one] += self._held.pop(other)
                    self._given[other] += 1
            except (RayActorError, ObjectLostError) as error:
                # An argument that was lost left the total as it was; who died takes its own total along.
                for number in holders:
                    if not self._lives(number):
                        self._bury(number, shards, error)

    def _add_up(self, holders: Sequence[int]) -> Iterator[tuple[int, int]]:
        """One level of the tree: pairs (a, b) where a's total now includes b's."""
        import ray

        pairs = [
            (one, other, self._owners[one].absorb.remote(self._owners[other].give.remote()))
            for one, other in zip(holders[::2], holders[1::2], strict=False)
        ]
        errors = []
        for one, other, done in pairs:
            try:
                ray.get(done)
            except ray.exceptions.RayError as error:
                errors.append(error)
            else:
                yield one, other
        if errors:
            raise errors[0]

    def _lives(self, number: int) -> bool:
        import ray

        with contextlib.suppress(ray.exceptions.RayError):
            ray.get(self._owners[number].__ray_ready__.remote(), timeout=60.0)
            return True
        return False

    def _bury(self, number: int, shards: _Shards, error: Exception) -> None:
        """Replace a dead owner; what it held is to be done again."""
        import ray

        self.deaths, self._fruitless = self.deaths + 1, self._fruitless + 1
        log.warning("worker %d died (%s); its part is done again by another", number, _first_line(error)[:200])
        with contextlib.suppress(ray.exceptions.RayActorError, ValueError):
            ray.kill(self._owners.pop(number))
        self._owners.pop(number, None)
        self._starting = {r: n for r, n in self._starting.items() if n != number}
        for batch in self._held.pop(number, []):
            shards.give_back(number, batch)
        same_part = max(self._failures.values(), default=0)
        if same_part >= MAX_DEATHS_OF_BATCH or self._fruitless > 3 * (len(self._owners) + 1):
            raise RunError(
                f"{self.deaths} workers died, {same_part} of them on the same part of the model; last: {_first_line(error)[:300]}. "
                "If they ran out of memory, lower --workers; finished work is kept: --resume goes on"
            ) from error
        self._place()

    def _work(
        self, shards: _Shards, sweep: int | None, question: str, shared: Sequence[Any]
    ) -> Iterator[tuple[Sequence[Any], Any]]:
        """Have all batches of the shards done."""
        import ray
        from ray.exceptions import GetTimeoutError, ObjectLostError, RayActorError, RayTaskError

        asked: dict[Any, tuple[int, Sequence[Any]]] = {}
        self._failures.clear()
        self._fruitless = 0
        last_sign = time.monotonic()
        while shards.left or asked:
            ready = [n for n in self._owners if n not in self._starting.values()]
            for number in ready:
                while sum(owner == number for owner, _ in asked.values()) < IN_FLIGHT and (batch := shards.take(number)):
                    sum_of = None if sweep is None else (sweep, self._given[number])
                    asked[self._owners[number].ask.remote(sum_of, question, batch, *shared)] = (number, batch)
            done, _ = ray.wait([*asked, *self._starting], num_returns=1, timeout=5.0)
            if not done:
                if not asked and time.monotonic() - last_sign > PLACEMENT_TIMEOUT_S:
                    raise RunError(
                        f"no worker could be placed for {PLACEMENT_TIMEOUT_S:.0f} s: the cluster has {nodes()}; "
                        "other jobs may hold its cores or memory. Free some, then --resume"
                    )
                continue
            last_sign = time.monotonic()
            reference = done[0]
            number, batch = asked.pop(reference) if reference in asked else (self._starting.pop(reference), ())
            try:
                answer = ray.get(reference, timeout=60.0)
            except (RayActorError, ObjectLostError, GetTimeoutError) as error:  # a large answer is lost with the node that keeps it
                self._failures.update(batch)
                shards.give_back(number, batch)
                if number in self._owners:  # the first of its answers to fail
                    self._bury(number, shards, error)
                continue
            except RayTaskError as error:
                cause = error.cause if isinstance(error.cause, Exception) else error
                raise _as_run_error(cause) from None
            self._fruitless = 0
            if batch:
                answer, self.stats[number] = answer
                if sweep is not None:
                    self._held.setdefault(number, []).append(batch)
                yield batch, answer


class _Shards:
    """Who has which items still to do."""

    def __init__(self, items: Sequence[Any], owners: Sequence[int]) -> None:
        size = max(1, min(MAX_BATCH, len(items) // max(1, len(owners) * BATCHES_PER_OWNER)))
        cuts = [len(items) * k // len(owners) for k in range(len(owners) + 1)]
        self._of = {
            owner: collections.deque(items[at : min(at + size, stop)] for at in range(start, stop, size))
            for owner, (start, stop) in zip(owners, itertools.pairwise(cuts), strict=True)
        }

    @property
    def left(self) -> bool:
        return any(self._of.values())

    def take(self, owner: int) -> Sequence[Any] | None:
        """The next batch of this owner's shard, or the last one of the longest shard."""
        if self._of.get(owner):
            return self._of[owner].popleft()
        longest = max(self._of.values(), key=len)
        return longest.pop() if longest else None

    def give_back(self, owner: int, batch: Sequence[Any]) -> None:
        if batch:
            self._of.setdefault(owner, collections.deque()).appendleft(batch)


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]


def _as_run_error(error: Exception) -> Exception:
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        return RunError(
            f"{where}{error.strerror or error}; finished work is kept: free space or mend the disk, then --resume goes on"
        )
    return error
