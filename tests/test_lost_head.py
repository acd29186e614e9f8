"""The head of a cluster is lost, or started anew, while a merge runs on it."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import families
import psutil
import pytest
from clusters import (
    DEADLINE_S,
    Head,
    await_end,
    await_that,
    descendants,
    free_ports,
    head_node,
    joining_node,
    owners_under,
    pcb_ray,
    receipt_of,
    running,
    state_of,
)
from families import Family
from test_search_on_nodes import made_in, recipe_of, rows_of

from pcb_ray.planning import plan

pytestmark = [pytest.mark.ray, pytest.mark.very_slow, pytest.mark.timeout(600)]
pytestmark += [pytest.mark.filterwarnings("ignore::ResourceWarning")]


class Merge(NamedTuple):
    recipe: Path
    wanted: dict[str, bytes]


@pytest.fixture(scope="module")
def merge(tmp_path_factory: pytest.TempPathFactory) -> Merge:
    folder = tmp_path_factory.mktemp("merge")
    one = Family(folder / "family", *families.fine_tuned(2, scale=280))
    return Merge(one.recipe_file(), dict(families.merge_locally(plan(one.recipe()), folder / "wanted").files))


def resumed(merge: Merge, out: Path, head: Head) -> None:
    """To the end, on this cluster, with the bytes of an undisturbed run."""
    with joining_node(head, "another", cpus=1):
        done = pcb_ray("merge", merge.recipe, out, "--address", head.address, "--resume", env=head.environment)
    assert done.process.returncode == 0, done.text
    assert "ranks of |tau|" not in done.text, "what was found before the head was lost is known"
    assert {name: (out / name).read_bytes() for name in merge.wanted} == merge.wanted


@pytest.mark.parametrize("anew", [False, True], ids=["gone", "started anew"])
def test_a_run_whose_head_is_lost_ends_with_an_error_and_may_be_resumed_on_another(
    merge: Merge, anew: bool, tmp_path: Path
) -> None:
    """`ray start --block` ends with its GCS, and takes the rest of the head node along, of which the driver is a client. One that
    is started at the same port is another cluster. Workers stand still meanwhile, so that there is something left to do."""
    out = tmp_path / "out"
    with contextlib.ExitStack() as stack:
        head = stack.enter_context(head_node(cpus=0))
        node = stack.enter_context(joining_node(head, "one", cpus=2))
        (gcs,) = [process for process in descendants(head.process.pid) if process.name() == "gcs_server"]
        of_node = descendants(node.pid)
        with running("merge", merge.recipe, out, "--address", head.address, env=head.environment) as run:
            run.wait_for("ranks of beta: ")
            owners = owners_under(node.pid)
            for owner in owners:
                owner.suspend()
            gcs.kill()
            assert head.process.wait(timeout=DEADLINE_S) == 1
            if anew:
                port = head.address.rpartition(":")[2]
                stack.enter_context(head_node(cpus=0, start=("--port", port)))
            assert run.finish() == 1, run.text
        told = r"(to answer, found that nothing listens there any more|another one was started at)"
        assert re.search(rf"^pcb-ray: the cluster: wanted .*{told}.*--resume; finished work is kept", run.text, flags=re.MULTILINE)
        assert "Traceback" not in run.text
        assert "StackTrace" not in run.text
        assert not out.exists()
        assert state_of(out).is_dir()
        node.kill()
        for process in [*owners, *of_node]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        await_end(of_node)
        if not anew:
            resumed(merge, out, stack.enter_context(head_node(cpus=0)))


def test_a_search_whose_head_is_lost_ends_with_an_error_and_goes_on_elsewhere(tmp_path: Path) -> None:
    family, out = made_in(tmp_path / "family"), tmp_path / "out"
    recipe = recipe_of(family, tmp_path / "recipes", "Near", {"uneven_s": 2.0, "digits": 1}, budget=12)
    journal = state_of(out) / "journal.jsonl"
    with contextlib.ExitStack() as stack:
        head = stack.enter_context(head_node(cpus=0))
        node = stack.enter_context(joining_node(head, "one", cpus=2))
        (gcs,) = [process for process in descendants(head.process.pid) if process.name() == "gcs_server"]
        with running("search", recipe, out, "--workers", 1, "--address", head.address, env=head.environment) as run:
            await_that("three trials", lambda: journal.exists() and journal.read_text().count('"trial ') >= 3, DEADLINE_S)
            of_node = descendants(node.pid)
            gcs.kill()
            assert run.finish() == 1, run.text
        told = r"^pcb-ray: the cluster: wanted its head, .*, to answer, found .*--resume; finished work is kept"
        assert re.search(told, run.text, flags=re.MULTILINE), run.text
        assert "Traceback" not in run.text
        assert "StackTrace" not in run.text
        assert not (out / "best_recipe.yaml").exists()
        tried = journal.read_text().count('"trial ')
        node.kill()
        for process in of_node:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        await_end(of_node)
        head = stack.enter_context(head_node(cpus=0))
        stack.enter_context(joining_node(head, "another", cpus=2))
        command = ("search", recipe, out, "--workers", 1, "--address", head.address, "--resume")
        done = pcb_ray(*command, env=head.environment)
        assert done.process.returncode == 0, done.text
    assert f"{tried} candidates were tried before and are not scored again" in done.text
    assert all(row["error"] == "" for row in rows_of(out))
    assert len(rows_of(out)) == 12


@contextlib.contextmanager
def remembering(kind: str, folder: Path) -> Iterator[dict[str, str]]:
    """What makes a head keep what it knows: on its disk, or in a Redis."""
    if kind == "rocksdb":
        yield {"RAY_gcs_storage": "rocksdb", "RAY_gcs_storage_path": str(folder / "gcs")}
        return
    server = shutil.which("redis-server")
    if server is None:
        pytest.skip("no redis-server here")
    (port,) = free_ports(1)
    with subprocess.Popen([server, "--port", str(port), "--save", "", "--dir", str(folder)], stdout=subprocess.DEVNULL) as redis:
        try:
            yield {"RAY_REDIS_ADDRESS": f"127.0.0.1:{port}"}
        finally:
            redis.terminate()


@pytest.mark.parametrize("kind", ["rocksdb", "redis"])
def test_a_run_goes_on_when_a_head_that_remembers_is_started_anew(
    merge: Merge, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ray.cluster_utils import Cluster

    out, node = tmp_path / "out", {"object_store_memory": 80 << 20}
    with remembering(kind, tmp_path) as variables:
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        cluster: Any = Cluster(initialize_head=True, head_node_args={**node, "num_cpus": 0, "include_dashboard": False})
        try:
            (raylet,) = cluster.add_node(**node, num_cpus=2).all_processes["raylet"]
            arguments = ("merge", merge.recipe, out, "--address", cluster.address)
            with running(*arguments, env={"RAY_AUTH_MODE": os.environ.get("RAY_AUTH_MODE", "disabled")}) as run:
                run.wait_for("ranks of |tau|: ")
                owners = owners_under(raylet.process.pid)
                for owner in owners:
                    owner.suspend()
                cluster.head_node.kill_gcs_server()
                run.wait_for("does not answer")
                cluster.head_node.start_gcs_server()
                run.wait_for("is back")
                for owner in owners:
                    owner.resume()
                assert run.finish() == 0, run.text
        finally:
            processes = [p for n in cluster.list_all_nodes() for infos in n.all_processes.values() for p in infos]
            cluster.shutdown()
            await_that(
                "all have ended", lambda: not any(psutil.pid_exists(p.process.pid) for p in processes if p.process.poll() is None)
            )
    assert receipt_of(out)["workers_lost"] == 0
    assert {name: (out / name).read_bytes() for name in merge.wanted} == merge.wanted
