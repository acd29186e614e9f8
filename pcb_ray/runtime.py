"""All of Ray for merging: starting or joining a cluster, placing owners, asking them, replacing the dead.

`ask` sends one question about many items (chunks) to all owners and yields answers as they come, in no order: answers are such that order does
not matter. `fold` is for answers that add up: each owner keeps the sum of its own, and the owners then add up in pairs, as a tree, so that the
driver receives one answer whatever their number. `store` is for questions that write: it ends when all is durable.

Each owner works through its own shard, a contiguous run of items; one that is done takes batches from the end of the longest shard left. The
items of a dead owner are asked again, with those whose answers it alone held. `LocalOwners` does the same without Ray in this process.
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
from functools import partial
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from pcb_ray.errors import RequestError, RunError, reason_in
from pcb_ray.planning import Plan

log = logging.getLogger("pcb_ray")

BATCHES_PER_OWNER = 32  # an owner's shard is asked for in about so many batches: progress, and work for those who finish early
MAX_BATCH = 64
IN_FLIGHT = 2  # batches an owner has at hand, so that it need not wait for the driver
PLACEMENT_TIMEOUT_S = 120.0
MAX_DEATHS_OF_BATCH = 3
CALL_TIMEOUT_S, SYNC_TIMEOUT_S = 300.0, 3600.0
LOCAL_OBJECT_STORE_BYTES = 80 << 20  # near the smallest that Ray accepts; what does not fit goes to disk
ADVICE = "If they ran out of memory, lower --workers; finished work is kept: --resume goes on"


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

    def store(self, question: str, items: Sequence[Any], *args: Any) -> Iterator[tuple[Sequence[Any], Any]]:
        """As `ask`, for questions that write to the output: when it ends, all of that is durable. What a dead owner wrote is written again."""
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

        size = max(1, min(MAX_BATCH, len(items) // (8 * len(self._owners))))
        batches = iter([items[at : at + size] for at in range(0, len(items), size)])
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

    store = ask  # whoever commits the output makes it durable


class _Actor:
    """An owner as Ray runs it. Its owner is made by `start` and not by the constructor, since what a constructor raises is lost."""

    def start(self, plan: Plan, out_dir: str, options: dict[str, Any]) -> dict[str, Any]:
        import torch

        from pcb_ray.owner import Owner

        torch.set_num_threads(1)  # one owner per core
        self.owner = Owner(plan, out_dir, **options)
        self.sum = (0, 0)  # which one `total` is
        self.total: Any = None
        return self.owner.state()

    def ask(self, question: str, items: Sequence[Any], *args: Any) -> tuple[Any, dict[str, Any]]:
        return getattr(self.owner, question)(items, *args), self.owner.state()

    def add(self, number: tuple[int, int], question: str, items: Sequence[Any], *args: Any) -> tuple[Any, dict[str, Any]]:
        """Add the answer to the total, which begins anew with another number of the sum."""
        answer = getattr(self.owner, question)(items, *args)
        if number != self.sum:
            self.sum, self.total = number, answer
        else:
            self.total.merge(answer)
        return None, self.owner.state()

    def give(self) -> Any:
        """The total so far."""
        return self.total

    def absorb(self, total: Any) -> None:
        """Add the total of another owner to one's own."""
        self.total.merge(total)

    def sync(self) -> None:
        self.owner.sync()


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
            f"no Ray cluster at {address}: {reason_in(error)}; start one with `ray start --head`, "
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
        raise RequestError("--device cuda: the cluster has no GPU; use --device cpu, or join a cluster with GPUs by --address")
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
        self._sums = 0
        # What is lost with an owner: the batches whose answers are in its total, or whose output it has written.
        self._held: dict[int, list[Sequence[Any]]] = {}
        self._given: collections.Counter[int] = collections.Counter()  # how often an owner's total went to another
        self._failures: collections.Counter[Any] = collections.Counter()  # deaths at work on an item
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
        return self._work(self._begin(items), question, _put(args))

    def store(self, question: str, items: Sequence[Any], *args: Any) -> Iterator[tuple[Sequence[Any], Any]]:
        """Raises as `ask` does."""
        import ray

        shards, shared = self._begin(items), _put(args)
        while shards.left:
            yield from self._work(shards, question, shared, hold=True)
            for number, synced in [(n, self._owners[n].sync.remote()) for n in self._held]:
                try:
                    ray.get(synced, timeout=SYNC_TIMEOUT_S)
                except ray.exceptions.RayError as error:
                    self._bury_or_raise(number, shards, error)

    def fold(self, question: str, items: Sequence[Any], *args: Any) -> Iterator[tuple[Sequence[Any], Any]]:
        """Raises as `ask` does."""
        import ray

        shards, shared = self._begin(items), _put(args)
        self._sums += 1
        lost, total = 0, None
        while shards.left or len(self._held) > 1 or (self._held and total is None):
            for batch, _ in self._work(shards, question, shared, hold=True, add=True):
                yield batch, None
            before = self.deaths
            if len(self._held) > 1:
                self._add_up(shards)
            elif self._held:
                (last,) = self._held
                try:
                    total = ray.get(self._owners[last].give.remote(), timeout=CALL_TIMEOUT_S)
                except ray.exceptions.RayError as error:
                    self._bury_or_raise(last, shards, error)
            lost += self.deaths - before
            if lost > 3 * (len(self._owners) + 1):
                raise RunError(f"{lost} workers died while they added up what they had counted. {ADVICE}")
        yield (), total

    def _begin(self, items: Sequence[Any]) -> _Shards:
        self._held, self._fruitless = {}, 0
        self._failures.clear()
        return _Shards(items, list(self._owners))

    def _add_up(self, shards: _Shards) -> None:
        """One level of the tree: half of those who hold a total add another's to their own."""
        import ray

        holders = list(self._held)
        pairs = [
            (one, other, self._owners[one].absorb.remote(self._owners[other].give.remote()))
            for one, other in zip(holders[::2], holders[1::2], strict=False)
        ]
        for one, other, absorbed in pairs:
            try:
                ray.get(absorbed, timeout=CALL_TIMEOUT_S)
            except ray.exceptions.RayTaskError as error:  # the argument was lost, and the sum is as it was
                self._bury_or_raise(other, shards, error)
            except ray.exceptions.RayError as error:  # before or after it had added: nobody knows
                self._bury_or_raise(one, shards, error)
            else:
                self._held[one] += self._held.pop(other)
                self._given[other] += 1

    def _bury_or_raise(self, number: int, shards: _Shards, error: Exception) -> None:
        """Replace an owner that died, which sends back what it held; raise any other error as one of ours."""
        import ray
        from ray.exceptions import RayError, RayTaskError

        if not isinstance(error, _deaths()):
            cause = error.cause if isinstance(error, RayTaskError) and isinstance(error.cause, Exception) else error
            if isinstance(cause, OSError):
                where = f"{cause.filename}: " if cause.filename else ""
                raise RunError(
                    f"{where}{cause.strerror or cause}; finished work is kept: free space or mend the disk, then --resume goes on"
                ) from None
            if isinstance(cause, RayError | MemoryError):
                raise RunError(f"a worker failed: {reason_in(cause)}. {ADVICE}") from None
            raise cause from None
        if number not in self._owners:
            return  # not the first of its answers to fail
        self.deaths, self._fruitless = self.deaths + 1, self._fruitless + 1
        log.warning("worker %d died (%s); its part is done again by another", number, reason_in(error))
        with contextlib.suppress(RayError, ValueError):
            ray.kill(self._owners[number])
        del self._owners[number]
        self._starting = {r: n for r, n in self._starting.items() if n != number}
        for batch in self._held.pop(number, []):
            shards.give_back(number, batch)
        same_part = max(self._failures.values(), default=0)
        if same_part >= MAX_DEATHS_OF_BATCH or self._fruitless > 3 * (len(self._owners) + 1):
            raise RunError(
                f"{self.deaths} workers died, {same_part} of them on the same part of the model; last: {reason_in(error)}. {ADVICE}"
            ) from error
        self._place()

    def _work(
        self, shards: _Shards, question: str, shared: Sequence[Any], *, hold: bool = False, add: bool = False
    ) -> Iterator[tuple[Sequence[Any], Any]]:
        """Have all batches of the shards done; with `hold`, again if their owner dies later. With `add`, owners keep the answers and add them up."""
        import ray

        asked: dict[Any, tuple[int, Sequence[Any]]] = {}
        busy: collections.Counter[int] = collections.Counter()
        last_sign = time.monotonic()

        def refill(number: int) -> None:
            while busy[number] < IN_FLIGHT and (batch := shards.take(number)):
                owner = self._owners[number]
                call = partial(owner.add.remote, (self._sums, self._given[number])) if add else owner.ask.remote
                asked[call(question, batch, *shared)] = (number, batch)
                busy[number] += 1

        def refill_all() -> None:
            starting = set(self._starting.values())
            for number in self._owners:
                if number not in starting:
                    refill(number)

        refill_all()
        while shards.left or asked:
            references = [*asked, *self._starting]
            if not ray.wait(references, num_returns=1, timeout=5.0)[0]:
                if not asked and time.monotonic() - last_sign > PLACEMENT_TIMEOUT_S:
                    raise RunError(
                        f"no worker could be placed for {PLACEMENT_TIMEOUT_S:.0f} s: the cluster has {nodes()}; "
                        "other jobs may hold its cores or memory. Free some, then --resume"
                    )
                continue
            last_sign = time.monotonic()
            for reference in ray.wait(references, num_returns=len(references), timeout=0.0)[0]:
                if reference not in asked and reference not in self._starting:
                    continue  # its owner was buried meanwhile
                number, batch = asked.pop(reference) if reference in asked else (self._starting.pop(reference), ())
                busy[number] -= bool(batch)
                try:
                    answer = ray.get(reference, timeout=CALL_TIMEOUT_S)
                except ray.exceptions.RayError as error:  # a large answer is lost with the node that keeps it
                    self._failures.update(batch)
                    shards.give_back(number, batch)
                    self._bury_or_raise(number, shards, error)
                    refill_all()
                    continue
                self._fruitless = 0
                if batch and hold and number not in self._owners:  # answered before it was buried, and lost with it
                    shards.give_back(number, batch)
                    refill_all()
                    continue
                if number in self._owners:
                    refill(number)
                if batch:
                    answer, self.stats[number] = answer
                    if hold:
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


def _put(args: Sequence[Any]) -> list[Any]:
    import ray

    return [ray.put(a) for a in args]


def _deaths() -> tuple[type[Exception], ...]:
    """What a call raises when its owner, or the node that keeps its answer, is gone."""
    from ray.exceptions import GetTimeoutError, ObjectLostError, OutOfMemoryError, RayActorError

    return (RayActorError, ObjectLostError, OutOfMemoryError, GetTimeoutError)
