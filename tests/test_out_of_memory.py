"""Workers that run out of memory, for real: what they had at hand is done again with smaller blocks, once."""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import re
import resource
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import families
import psutil
import pytest
from clusters import await_end, await_that, head_node, joining_node, owners_under, ray_address, receipt_of, running
from families import Family

from pcb_ray.budget import MIN_BLOCK, SMALLER, least_block, smaller_block, worker_bytes
from pcb_ray.errors import RunError
from pcb_ray.nodes import Needs
from pcb_ray.planning import Plan, Sizes, plan
from pcb_ray.questions import CountKeys, WriteParts
from pcb_ray.runtime import Options, RayOwners, make_owner
from pcb_ray.selection import Bracket

# Ray closes its own sockets and log files late.
pytestmark = [pytest.mark.ray, pytest.mark.filterwarnings("ignore::ResourceWarning")]

LARGE = 1 << 22
"""Elements of a block that no worker here has room for; it takes about 500 MB."""
ROOM = 200 << 20
"""What a worker may take for its blocks."""


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return Family(tmp_path_factory.mktemp("memory") / "family", *families.fine_tuned(2, scale=200))


@pytest.fixture(scope="module")
def made(family: Family) -> Plan:
    """4.1 M elements in one chunk, which holds a large block."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Sizes, "of", classmethod(lambda _cls, D: Sizes(LARGE, tally_entries=1 << 12)))
        return plan(family.recipe(parameters={"density": 0.2}))


def make_bounded(room: int) -> Callable[[Plan, Options], Any]:
    """Owners in processes that can't have more memory than so much beside what they have."""

    def make(plan: Plan, options: Options) -> Any:
        owner = make_owner(plan, options)
        owner.answered = 0
        (has,) = re.findall(r"^VmData:\s+(\d+) kB", Path("/proc/self/status").read_text(), flags=re.MULTILINE)
        resource.setrlimit(resource.RLIMIT_DATA, (1024 * int(has) + room, resource.RLIM_INFINITY))
        return owner

    return make


@contextlib.contextmanager
def owners_of(made: Plan, make: Callable[[Plan, Options], Any], workers: int = 1) -> Iterator[RayOwners]:
    ray_address()
    owners = RayOwners(workers=workers, needs=Needs("cpu", 1 << 20), make_owner=make)
    try:
        owners.use(made, LARGE)
        owners.wait_until_ready()
        yield owners
    finally:
        owners.close()
        await_end([psutil.Process(state.pid) for state in owners.states if psutil.pid_exists(state.pid)])


def merged(owners: RayOwners, made: Plan, wanted: families.Local, folder: Path) -> None:
    """One sweep of the analysis and the write, to the same answers and bytes as in one process."""
    question = CountKeys(0, {}, ((Bracket(0, (1 << 31) - 1),),) * made.N)
    total = owners.fold(question, range(made.chunks), lambda _: None)
    assert [of_model[0].upto_hi for of_model in total.tallies] == [made.D] * made.N
    for file in made.files:
        with (folder / file.name).open("wb") as stream:
            stream.truncate(file.size)
    for _ in owners.store(WriteParts(wanted.known, str(folder)), range(len(made.parts))):
        pass
    assert {name: (folder / name).read_bytes() for name in wanted.files} == wanted.files


# --- blocks -----------------------------------------------------------------------------------------------------------------------


def test_a_smaller_block_is_one_that_the_method_can_work_with(made: Plan) -> None:
    sizes = list(itertools.accumulate(range(9), lambda block, _: smaller_block(made, block), initial=LARGE))
    assert sizes[:2] == [LARGE, LARGE // SMALLER]
    assert sizes[-2:] == [MIN_BLOCK, MIN_BLOCK] == [least_block(made)] * 2
    assert all(size % MIN_BLOCK == 0 for size in sizes)
    assert worker_bytes(made, sizes[1]) < worker_bytes(made, LARGE)


# --- by its own word --------------------------------------------------------------------------------------------------------------


def test_a_worker_without_memory_for_its_blocks_is_replaced_by_one_with_smaller_blocks_and_no_byte_changes(
    made: Plan, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    wanted = families.merge_locally(made, tmp_path / "wanted")
    (tmp_path / "out").mkdir()
    with owners_of(made, make_bounded(ROOM)) as owners, caplog.at_level(logging.WARNING, "pcb_ray"):
        merged(owners, made, wanted, tmp_path / "out")
        assert owners.deaths == 1
        owners.use(made, LARGE)
        assert {worker.block for worker in owners._workers.values()} == {LARGE // SMALLER}, "for the next plan too"
    told = r"worker \d \(pid \d+ on \S+\) ran out of memory with blocks of 4,194,304 elements \(.*allocate.*\); its part is done "
    assert re.search(told + "again by another, with blocks of 524,288", caplog.text), caplog.text


@pytest.mark.very_slow
def test_a_part_that_runs_out_of_memory_with_smaller_blocks_too_ends_the_run_with_both_sizes(made: Plan) -> None:
    question = CountKeys(0, {}, ((Bracket(0, 1 << 29),),) * made.N)
    wanted = (
        r"one ran out of it with blocks of 4,194,304 elements, and worker 1 .* with blocks of 524,288: .*Fix: lower --workers, "
    )
    with owners_of(made, make_bounded(4 << 20)) as owners, pytest.raises(RunError, match=wanted):
        owners.fold(question, range(made.chunks), lambda _: None)


# --- by the kernel's --------------------------------------------------------------------------------------------------------------

GROUPS = Path("/sys/fs/cgroup/memory")  # of version 1, which this process need not be in


@pytest.fixture
def groups() -> Iterator[str]:
    """The name of control groups that may be made, with a number behind it; the kernel kills who takes more memory there than it
    may."""
    name = f"pcb-test-{os.getpid()}"
    try:
        (GROUPS / name).mkdir()
        (GROUPS / name).rmdir()
    except OSError:
        pytest.skip("no right to make control groups here")
    if not (GROUPS / "memory.limit_in_bytes").exists() or psutil.swap_memory().total:
        pytest.skip("no control groups of memory here, or a swap that takes what is too much")
    try:
        yield name
    finally:
        for group in GROUPS.glob(f"{name}-*"):
            await_that("its process is gone", lambda group=group: not (group / "cgroup.procs").read_text())
            group.rmdir()


def make_in_group(name: str) -> Callable[[Plan, Options], Any]:
    """Owners that the kernel kills if they take more memory than ROOM beside what they have."""

    def make(plan: Plan, options: Options) -> Any:
        owner = make_owner(plan, options)
        group = GROUPS / f"{name}-{os.getpid()}"
        group.mkdir(exist_ok=True)
        (group / "memory.limit_in_bytes").write_text(str(ROOM))
        (group / "cgroup.procs").write_text(str(os.getpid()))
        return owner

    return make


@pytest.mark.very_slow
def test_a_worker_that_the_kernel_kills_for_memory_is_replaced_by_one_with_smaller_blocks(
    made: Plan, groups: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Ray only says that it is gone. That it was for memory its node tells: the kernel counts whom it has killed."""
    wanted = families.merge_locally(made, tmp_path / "wanted")
    (tmp_path / "out").mkdir()
    with owners_of(made, make_in_group(groups)) as owners, caplog.at_level(logging.WARNING, "pcb_ray"):
        merged(owners, made, wanted, tmp_path / "out")
        assert owners.deaths == 1
    told = r"worker \d \(pid \d+ on \S+\) ran out of memory with blocks of 4,194,304 elements \(the kernel of its node has killed"
    assert re.search(told, caplog.text), caplog.text


# --- by Ray's ---------------------------------------------------------------------------------------------------------------------

MARGIN = 4 << 30
"""What Ray and other programs of this machine may take meanwhile."""


@pytest.mark.very_slow
def test_a_worker_that_ray_kills_for_memory_costs_no_byte(tmp_path: Path) -> None:
    """Ray's monitor of a node kills a worker where all processes together take too much: here this one does."""
    memory = psutil.virtual_memory()
    if memory.available < 2 * MARGIN:
        pytest.skip("too little memory here")
    one, out = Family(tmp_path / "family", *families.fine_tuned(2, scale=280)), tmp_path / "out"
    wanted = families.merge_locally(plan(one.recipe()), tmp_path / "wanted").files
    variables = {
        "RAY_memory_usage_threshold": f"{(memory.total - memory.available + MARGIN) / memory.total:.4f}",
        "RAY_memory_monitor_refresh_ms": "100",
        "PCB_RAY_KERNEL": "torch",
    }
    with (
        head_node(cpus=0, **variables) as head,
        joining_node(head, "other") as node,
        running("merge", one.recipe_file(), out, "--address", head.address, env=head.environment) as run,
    ):
        run.wait_for("ranks of |tau|: ")
        with run.stopped():
            assert owners_under(node.pid)
            ballast = []
            while owners_under(node.pid):
                assert psutil.virtual_memory().available > 1 << 30, "Ray kills nobody"
                ballast.append(b"x" * (64 << 20))
        run.wait_for("ran out of memory with blocks of")
        del ballast
        assert run.finish() == 0, run.text
    assert re.search(
        r"ran out of memory with blocks of 262,144 elements \(.*memory.*\); its part .* with blocks of 32,768", run.text
    )
    assert receipt_of(out)["workers_lost"] == 1
    assert {name: (out / name).read_bytes() for name in wanted} == wanted
