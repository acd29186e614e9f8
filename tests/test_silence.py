"""Owners on Ray that die, stop, or are slow: what they had to do is done, and counts once.

Questions stop their own process (SIGSTOP) or wait for a file, the first time that an item is asked for; owners hold no model.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
from clusters import DEADLINE_S, await_end, await_that, ray_address

from pcb_ray.cluster import cluster
from pcb_ray.errors import RequestError, RunError
from pcb_ray.nodes import Needs
from pcb_ray.questions import OwnerState
from pcb_ray.runtime import RayOwners
from pcb_ray.schedule import Patience

# Ray closes its own sockets and log files late.
pytestmark = [pytest.mark.ray, pytest.mark.filterwarnings("ignore::ResourceWarning")]

ITEMS = range(16)
BRISK = Patience(slow_least_s=0.3, late_least_s=3.0, unknown_s=3.0, lost=2.0, exchange_s=3.0, sync_least_s=3.0)
CALM = Patience(slow_least_s=0.3)  # doubles soon, and replaces nobody


@pytest.fixture(scope="module", autouse=True)
def shared_ray() -> Iterator[str]:
    address = ray_address()
    from ray import cloudpickle

    cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers don't find this module
    yield address
    cloudpickle.unregister_pickle_by_value(sys.modules[__name__])


# --- what is asked ----------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Folder:
    """Stands for a plan: a folder that all processes see."""

    path: str
    reads = None  # the same for all of them

    def claim(self, name: object) -> bool:
        """Whether the caller is the first one that asks for this."""
        try:
            Path(self.path, str(name)).touch(exist_ok=False)
        except FileExistsError:
            return False
        return True

    def has(self, name: object) -> bool:
        return Path(self.path, str(name)).exists()


class FakeOwner:
    def __init__(self, plan: Any) -> None:
        self.folder: Folder = plan
        self.unsynced: list[int] = []

    def state(self) -> OwnerState:
        return OwnerState("none", "cpu", 0, 0, os.getpid(), "here")

    def close(self) -> None:
        pass

    def sync(self) -> None:
        if not self.folder.has("no stop in sync") and self.folder.claim("stopped in sync"):
            stop_here(self.folder)
        for item in self.unsynced:
            self.folder.claim(f"durable {item}")
        self.unsynced = []


def make_fake(plan: Any, options: Any) -> Any:
    return FakeOwner(plan)


def stop_here(folder: Folder) -> None:
    folder.claim(f"stopped {os.getpid()}")
    signal_here(signal.SIGSTOP)


def signal_here(number: int) -> None:
    os.kill(os.getpid(), number)
    time.sleep(1)  # the signal goes to any thread of the process: this one might answer before it is stopped, too


@dataclasses.dataclass
class Count:
    """How often each item was counted."""

    of_item: dict[int, int]

    def merge(self, other: Count) -> None:
        for item, times in other.of_item.items():
            self.of_item[item] = self.of_item.get(item, 0) + times


@dataclasses.dataclass(frozen=True)
class Counting:
    """Counts items. Who is the first at `stops` is stopped there, who is the first at `waits` waits until there is a file `go`."""

    stops: int | None = None
    waits: int | None = None
    always: bool = False  # whoever comes is stopped, not only the first

    def answer(self, owner: Any, items: Sequence[int]) -> Count:
        folder = owner.folder
        if self.always or (self.stops in items and folder.claim("stops")):
            stop_here(folder)
        if self.waits in items and not folder.claim("waits"):
            folder.claim("doubled")
        elif self.waits in items:
            while not folder.has("go"):
                time.sleep(0.01)
            folder.claim("went")
        if self.stops in items and folder.has("stops"):
            folder.claim("second at stops")
        return Count(dict.fromkeys(items, 1))


@dataclasses.dataclass
class DeadlyCount(Count):
    """The first process that adds another owner's count to its own gets a signal."""

    folder: Folder
    signal: int

    def merge(self, other: Count) -> None:
        if len(other.of_item) > 1 and self.folder.claim("signal"):  # an owner's own answers are about one item
            signal_here(self.signal)
        super().merge(other)


@dataclasses.dataclass(frozen=True)
class DeadlyCounting:
    signal: int

    def answer(self, owner: Any, items: Sequence[int]) -> Count:
        return DeadlyCount(dict.fromkeys(items, 1), owner.folder, self.signal)


@dataclasses.dataclass(frozen=True)
class Writing:
    """Writes items, which are durable once they are synced."""

    def answer(self, owner: Any, items: Sequence[int]) -> int:
        owner.unsynced += items
        return os.getpid()


@dataclasses.dataclass(frozen=True)
class WhichPlan:
    def answer(self, owner: Any, items: Sequence[int]) -> tuple[str, int]:
        return owner.folder.path, os.getpid()


@dataclasses.dataclass(frozen=True)
class Failing:
    def answer(self, owner: Any, items: Sequence[int]) -> int:
        raise RequestError("model1: wanted a number, found none. Fix: give one")


@contextlib.contextmanager
def owners_of(folder: Folder, patience: Patience, workers: int = 2) -> Iterator[RayOwners]:
    owners = RayOwners(workers=workers, needs=Needs("cpu", 1 << 20), patience=patience, make_owner=make_fake)
    try:
        owners.use(folder, 1)  # type: ignore[arg-type]
        owners.wait_until_ready()
        yield owners
    finally:
        owners.close()
        await_end([psutil.Process(state.pid) for state in owners.states if psutil.pid_exists(state.pid)])


def stopped_in(folder: Folder) -> list[int]:
    return [int(path.name.split()[1]) for path in Path(folder.path).glob("stopped [0-9]*")]


def counted(owners: RayOwners, question: Counting | DeadlyCounting, done: Callable[[Sequence[int]], None] = lambda _: None) -> None:
    """The sum is right: each item once."""
    assert owners.fold(question, ITEMS, done).of_item == dict.fromkeys(ITEMS, 1)


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(str(tmp_path))


# --- claims -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_stopped_worker_is_replaced_and_each_item_is_counted_once(folder: Folder, caplog: pytest.LogCaptureFixture) -> None:
    told: list[int] = []
    with owners_of(folder, BRISK) as owners, caplog.at_level(logging.WARNING, "pcb_ray"):
        counted(owners, Counting(stops=5), told.extend)
        assert owners.deaths == 1
        (pid,) = stopped_in(folder)
        await_that("the stopped process is gone", lambda: not psutil.pid_exists(pid))
        assert set(told) == set(ITEMS)
        assert len(told) > len(ITEMS)  # what it had counted is counted again
        counted(owners, Counting())
        assert owners.deaths == 1
    assert re.search(rf"worker \d+ \(pid {pid} on \S+\) (has not answered for \d+ s|did not yet give its total)", caplog.text)
    assert re.search(rf"worker \d+ \(pid {pid} on \S+\) is given up .*its part is done again by another", caplog.text)


@pytest.mark.very_slow
def test_the_place_of_a_stopped_worker_is_free_for_another(folder: Folder) -> None:
    with owners_of(folder, BRISK, workers=4) as owners:  # as many as there are cores
        counted(owners, Counting(stops=5))
        (pid,) = stopped_in(folder)
        await_that("the stopped process is gone", lambda: not psutil.pid_exists(pid))
        owners.wait_until_ready()
        assert len({pid for _, (_, pid) in owners.ask(WhichPlan(), range(400))}) == 4


@pytest.mark.slow
def test_answers_of_a_stopped_worker_that_arrived_are_not_asked_for_again(folder: Folder) -> None:
    with owners_of(folder, BRISK) as owners:
        seen = [item for batch, answer in owners.ask(Counting(stops=5), ITEMS) for item in batch if answer.of_item[item]]
    assert sorted(seen) == list(ITEMS)


def test_an_idle_worker_doubles_what_a_slow_one_has_and_the_first_answer_counts(folder: Folder) -> None:
    with owners_of(folder, CALM) as owners:
        seen = [item for batch, _ in owners.ask(Counting(waits=5), ITEMS) for item in batch]
        assert sorted(seen) == list(ITEMS)
        assert folder.has("doubled")
        assert not folder.has("went")
        folder.claim("go")
        await_that("the slow one goes on", lambda: folder.has("went"))
        assert sorted(item for batch, _ in owners.ask(Counting(), ITEMS) for item in batch) == list(ITEMS)
        assert owners.deaths == 0


def test_what_two_workers_might_write_differently_is_not_doubled(folder: Folder) -> None:
    folder.claim("no stop in sync")
    wake = threading.Timer(10 * CALM.slow_least_s, folder.claim, ["go"])  # the other one is idle long before
    with owners_of(folder, CALM) as owners:
        wake.start()
        seen = [item for batch, _ in owners.store(Counting(waits=5), ITEMS, doubles=False) for item in batch]
        wake.join()
    assert sorted(seen) == list(ITEMS)
    assert folder.has("went")
    assert not folder.has("doubled")


def test_a_slow_worker_gives_what_it_has_counted_and_its_late_answer_does_not_count(folder: Folder) -> None:
    with owners_of(folder, CALM) as owners:
        counted(owners, Counting(waits=5))
        assert not folder.has("went")
        folder.claim("go")
        for _ in range(3):
            counted(owners, Counting())
        assert folder.has("went")
        assert owners.deaths == 0


def test_a_worker_that_wakes_after_its_work_was_given_away_does_not_count_twice(folder: Folder) -> None:
    def wake() -> None:
        await_that("another does it", lambda: folder.has("second at stops"))
        for pid in stopped_in(folder):
            os.kill(pid, signal.SIGCONT)

    with owners_of(folder, CALM) as owners:
        waker = threading.Thread(target=wake)
        waker.start()
        counted(owners, Counting(stops=5))
        waker.join()
        assert owners.deaths == 0
        counted(owners, Counting())


@pytest.mark.very_slow
def test_what_a_worker_wrote_that_stops_while_it_syncs_is_written_again(folder: Folder) -> None:
    with owners_of(folder, BRISK) as owners:
        written = [item for batch, _ in owners.store(Writing(), ITEMS) for item in batch]
        assert owners.deaths == 1
    assert set(written) == set(ITEMS)
    assert len(written) > len(ITEMS)
    assert all(folder.has(f"durable {item}") for item in ITEMS)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, pytest.param(signal.SIGSTOP, marks=pytest.mark.very_slow)])
def test_a_worker_lost_while_it_adds_up_takes_two_totals_with_it_and_all_is_counted_again(folder: Folder, number: int) -> None:
    told: list[int] = []
    with owners_of(folder, BRISK, workers=3) as owners:
        counted(owners, DeadlyCounting(number), told.extend)
        assert folder.has("signal")
        assert owners.deaths == 1
    assert len(told) > len(ITEMS)


def test_time_in_which_the_driver_was_busy_counts_against_nobody(folder: Folder) -> None:
    patience = dataclasses.replace(BRISK, late_least_s=1.0, unknown_s=1.0, exchange_s=1.0)  # lost after 2 s
    with owners_of(folder, patience) as owners:
        answers = owners.ask(Counting(waits=0), ITEMS)
        seen = [*next(answers)[0]]
        time.sleep(3)
        folder.claim("go")
        seen += [item for batch, _ in answers for item in batch]
        assert sorted(seen) == list(ITEMS)
        assert owners.deaths == 0


@pytest.mark.very_slow
def test_when_every_worker_stops_the_run_ends_and_says_so(folder: Folder) -> None:
    patience = dataclasses.replace(BRISK, late_least_s=1.0, unknown_s=1.0)
    wanted = r"workers were lost, .*it did not answer for \d+ s\. Fix: .*mount.*--resume"
    with owners_of(folder, patience) as owners, pytest.raises(RunError, match=wanted):
        counted(owners, Counting(always=True))
    for pid in stopped_in(folder):
        await_that("it is gone", lambda pid=pid: not psutil.pid_exists(pid))


def test_a_killed_worker_is_replaced_by_one_of_the_current_plan(folder: Folder, tmp_path: Path) -> None:
    second = tmp_path / "second"
    second.mkdir()
    with owners_of(folder, CALM) as owners:
        before = {answer for _, answer in owners.ask(WhichPlan(), ITEMS)}
        owners.use(Folder(str(second)), 1)  # type: ignore[arg-type]
        after = {answer for _, answer in owners.ask(WhichPlan(), ITEMS)}
        assert {path for path, _ in before} == {folder.path}
        assert {path for path, _ in after} == {str(second)}
        pids = {pid for _, pid in before | after}
        assert len(pids) <= 2  # the actors stayed
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        replaced = {answer for _, answer in owners.ask(WhichPlan(), ITEMS)}
        assert {path for path, _ in replaced} == {str(second)}
        assert not pids & {pid for _, pid in replaced}
        assert owners.deaths == len(pids)


def test_a_question_that_was_dropped_halfway_does_not_disturb_the_next(folder: Folder) -> None:
    with owners_of(folder, CALM) as owners:
        dropped = owners.ask(Counting(waits=5), ITEMS)
        next(dropped)
        for _ in range(2):
            counted(owners, Counting())
        folder.claim("go")
        counted(owners, Counting())
        assert owners.deaths == 0


def test_what_an_owner_raises_is_raised_as_it_is(folder: Folder) -> None:
    with owners_of(folder, CALM) as owners:
        with pytest.raises(RequestError, match="model1: wanted a number"):
            list(owners.ask(Failing(), ITEMS))
        counted(owners, Counting())


# --- which cluster ----------------------------------------------------------------------------------------------------------------


def test_an_address_of_another_cluster_than_the_one_that_runs_is_refused(shared_ray: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    monkeypatch.setenv("RAY_ADDRESS", "192.0.2.1:6379")  # it ranks lower than what runs
    for address in (None, "auto", shared_ray, f"localhost:{shared_ray.rpartition(':')[2]}"):
        with cluster(address):
            assert ray.is_initialized()
    for address in ("192.0.2.1:6379", "localhost:1", "local"):
        with (
            pytest.raises(RequestError, match=rf"--address {address}: .*{shared_ray}.*Fix: leave the address out"),
            cluster(address),
        ):
            pass
    assert ray.is_initialized()


ENVIRONMENT_BEFORE_AND_AFTER = """
import os
from pcb_ray.cluster import cluster
before = dict(os.environ)
for _ in range(2):
    with cluster(None):
        import ray
        assert ray.is_initialized()
        assert os.environ["RAY_AUTH_MODE"] == "token"
    assert not ray.is_initialized()
    changed = {k for k in before.keys() | os.environ.keys() if before.get(k) != os.environ.get(k) and "RAY" in k}
    print("changed", sorted(changed))
"""


@pytest.mark.very_slow
@pytest.mark.slow
def test_the_environment_is_as_before_when_a_cluster_was_left() -> None:
    names = ("RAY_AUTH_MODE", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "RAY_ADDRESS")
    environment = {name: value for name, value in os.environ.items() if name not in names}
    command = [sys.executable, "-c", ENVIRONMENT_BEFORE_AND_AFTER]
    done = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE_S, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["changed []"] * 2
