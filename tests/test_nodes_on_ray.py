"""Several nodes, which differ, come and go: who works where."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import families
import psutil
import pytest
from clusters import (
    BIN,
    DEADLINE_S,
    Head,
    await_that,
    can_be_apart,
    descendants,
    head_node,
    joining_node,
    node_apart,
    owners_under,
    pcb_ray,
    receipt_of,
    running,
    title,
    working,
)
from families import Family
from object_servers import FaultProxy, ObjectServer, s3_server
from test_remote import put_all, remote_recipe

from pcb_ray.planning import plan

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.filterwarnings("ignore::ResourceWarning")]


@pytest.fixture(scope="module")
def server() -> Iterator[ObjectServer]:
    with s3_server() as server:
        yield server


ASK_TWO_NODES = """
import collections, json, sys, psutil
from pcb_ray.budget import worker_bytes
from pcb_ray.cluster import cluster
from pcb_ray.files.room import Room
from pcb_ray.planning import plan
from pcb_ray.questions import CountKeys
from pcb_ray.nodes import Needs
from pcb_ray.runtime import RayOwners, make_owner
from pcb_ray.selection import Bracket

PIECE = 1 << 18

def with_small_pieces(plan, options):
    from pcb_ray.files import remote
    remote.PIECE = PIECE
    return make_owner(plan, options)

class Homes(dict):
    def update(self, found):
        for chunk, node in found:
            self[chunk] = node
            had[node].add(chunk)

def pieces_of(chunks):
    found = set()
    for chunk in chunks:
        for one in made.ranges_of(made.cells_of(chunk)):
            starts = range(one.start // PIECE * PIECE, one.stop, PIECE)
            found |= {(one.file, at, min(at + PIECE, size[one.file])) for at in starts}
    return found

made = plan(json.loads(sys.argv[2]))
size = {file.path: file.size for one in made.inputs for file in one.files}
question = CountKeys(0, {}, ((Bracket(0, 1 << 29),),) * made.N)
room, had = Room.for_a_run(None, "", None), collections.defaultdict(set)
with cluster(sys.argv[1]):
    owners = RayOwners(workers=4, needs=Needs("cpu", worker_bytes(made, 1 << 15)), room=room, make_owner=with_small_pieces)
    try:
        fetched, probes, deaths, digests = 0, 0, 0, set()
        for victim in (None, 0, 1):
            if victim is not None:
                process = psutil.Process(owners._states[victim].pid)
                process.kill()
                psutil.wait_procs([process])
            owners.use(made, 1 << 15)
            owners.wait_until_ready()
            if victim is None:
                owners._homes = Homes()
            total = owners.fold(question, range(made.chunks), lambda chunks: None)
            digests.add(total.digests)
            fetched += sum(state.fetched for state in owners.states)
            probes, deaths = probes + len(owners.states), deaths + owners.deaths
        wanted = sum(stop - start for chunks in had.values() for _, start, stop in pieces_of(chunks))
        everything = sum(stop - start for _, start, stop in pieces_of(range(made.chunks)))
        print(json.dumps({
            "nodes": len(had), "deaths": deaths, "digests": len(digests), "fetched": fetched, "wanted": wanted, "probes": probes,
            "everything": everything,
        }))
    finally:
        owners.close()
"""


@pytest.mark.very_slow
@pytest.mark.skipif(not can_be_apart(), reason="no right to make namespaces here")
def test_chunks_stay_on_the_node_that_has_their_bytes_when_owners_come_and_go(server: ObjectServer, tmp_path: Path) -> None:
    """Two nodes, neither of which sees what the other keeps. Owners are killed between sweeps, so that the order of all owners is
    another one then; without homes nearly every chunk would change its node."""
    one = Family(tmp_path / "family", *families.fine_tuned(2, scale=500), shards=2)
    at = put_all(server, one.folder, "nodes")
    with FaultProxy(server) as proxy, ExitStack() as stack:
        variables = server.through(proxy)
        head = stack.enter_context(head_node(cpus=0, **variables))
        for name in ("one", "other"):
            stack.enter_context(node_apart(head, name, cpus=2))
        found = asked(head, ASK_TWO_NODES, json.dumps(remote_recipe(at, 2)))
    assert (found["nodes"], found["deaths"], found["digests"]) == (2, 2, 1)
    assert found["wanted"] <= found["fetched"] <= found["wanted"] + found["probes"], (
        "each piece once by each node that has to do with it"
    )
    assert found["fetched"] < 1.5 * found["everything"], "and few by both: at the ends of runs, and where one lags behind"


@pytest.mark.very_slow
def test_a_node_that_joins_is_used_if_its_labels_are_as_wanted(tmp_path: Path) -> None:
    """The only worker stands still until the next one works."""
    one, out = Family(tmp_path / "family", *families.fine_tuned(2, scale=280)), tmp_path / "out"
    wanted = families.merge_locally(plan(one.recipe()), tmp_path / "wanted").files
    with head_node(cpus=0) as head, ExitStack() as stack:
        first = stack.enter_context(joining_node(head, "first", "--labels", "pool=merge"))
        command = ("merge", one.recipe_file(), out, "--address", head.address, "--label", "pool=merge", "-v")
        with running(*command, env=head.environment) as run:
            run.wait_for("ranks of |tau|: ")
            (owner,) = owners_under(first.pid)
            owner.suspend()
            stack.enter_context(joining_node(head, "other", "--labels", "pool=search", cpus=2))
            second = stack.enter_context(joining_node(head, "second", "--labels", "pool=merge"))
            await_that("the node gets a worker, and it works", lambda: any(map(working, owners_under(second.pid))), DEADLINE_S)
            owner.resume()
            assert run.finish() == 0, run.text
        refused = pcb_ray(*command[:-2], "pool=none", "--resource", "disk=1", "--overwrite", env=head.environment)
    receipt = receipt_of(out)
    assert (receipt["workers"], receipt["workers_lost"]) == (2, 0)
    assert {name: (out / name).read_bytes() for name in wanted} == wanted
    assert refused.process.returncode == 2, refused.text
    assert "--label pool=none: wanted a node with this, found pool: merge, search" in refused.text


def asked(head: Head, script: str, *arguments: str) -> dict[str, Any]:
    """What a driver of its own prints as JSON; Ray prints too."""
    command = [sys.executable, "-c", script, head.address, *arguments]
    done = subprocess.run(command, env=head.environment, capture_output=True, text=True, timeout=DEADLINE_S, check=False)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{"))))


DRAIN_TWO_NODES = """
import collections, json, subprocess, sys
from pcb_ray.budget import worker_bytes
from pcb_ray.cluster import cluster
from pcb_ray.nodes import Needs, draining
from pcb_ray.planning import plan
from pcb_ray.questions import CountKeys, WriteParts
from pcb_ray.runtime import RayOwners
from pcb_ray.selection import Bracket
import time

address, recipe, known, folder, ray_command = sys.argv[1:]

def drain(number):
    node = owners._workers[number].node
    command = [ray_command, "drain-node", "--address", address, "--node-id", node, "--reason", "DRAIN_NODE_REASON_PREEMPTION"]
    subprocess.run([*command, "--reason-message", "test", "--deadline-remaining-seconds", "600"], check=True, capture_output=True)
    while node not in draining():
        time.sleep(0.05)
    owners._looked_s = 0

class Drain:
    # When two owners hold something, the node of one of them is drained.
    def __init__(self):
        self.done, self.number = collections.Counter(), None
    def __call__(self, items):
        self.done.update(items)
        staying = [n for n in owners._workers if owners._workers[n].node not in draining()]
        if self.number is None and len(staying) > 1 and len(self.done) > wanted // 2:
            self.number = max(staying)
            drain(self.number)

made = plan(json.loads(recipe))
with cluster(address):
    owners = RayOwners(workers=2, needs=Needs("cpu", worker_bytes(made, 1 << 15)))
    try:
        owners.use(made, 1 << 15)
        owners.wait_until_ready()
        wanted, counted = made.chunks, Drain()
        total = owners.fold(CountKeys(0, {}, ((Bracket(0, (1 << 31) - 1),),) * made.N), range(made.chunks), counted)
        while len([w for w in owners._workers.values() if w.ready]) < 2:
            owners._turn(None)
        wanted, written = len(made.parts), Drain()
        for file in made.files:
            with open(folder + "/" + file.name, "wb") as stream:
                stream.truncate(file.size)
        for parts, _ in owners.store(WriteParts(json.loads(known), folder), range(len(made.parts))):
            written(parts)
        print(json.dumps({
            "deaths": owners.deaths, "counted": sum(t.upto_hi for t in total.tallies[0]),
            "drained": [counted.number, written.number], "left": list(owners._workers),
            "times": [sorted(set(one.done.values())) for one in (counted, written)],
            "items": [len(counted.done) == made.chunks, len(written.done) == len(made.parts)],
        }))
    finally:
        owners.close()
"""


@pytest.mark.very_slow
def test_what_owners_on_draining_nodes_hold_is_taken_over_and_nothing_is_done_twice(tmp_path: Path) -> None:
    """Two of three nodes are drained, one in a sweep and one in the write: totals move to another owner, what was written is made
    durable, and only what was at hand is begun again."""
    one = Family(tmp_path / "family", *families.fine_tuned(2, scale=280))
    recipe = one.recipe()
    wanted = families.merge_locally(plan(recipe), tmp_path / "wanted")
    (tmp_path / "out").mkdir()
    with head_node(cpus=0) as head, ExitStack() as stack:
        for name in ("one", "two", "three"):
            stack.enter_context(joining_node(head, name))
        arguments = json.dumps(recipe), json.dumps(wanted.known), str(tmp_path / "out"), str(BIN / "ray")
        found = asked(head, DRAIN_TWO_NODES, *arguments)
    assert found["deaths"] == 0
    assert None not in found["drained"]
    assert not set(found["drained"]) & set(found["left"])
    assert found["times"] == [[1], [1]], "each answer counted once, and for good"
    assert found["items"] == [True, True]
    assert found["counted"] == sum(t.numel() for t in one.base.values())
    assert {name: (tmp_path / "out" / name).read_bytes() for name in wanted.files} == wanted.files


@pytest.mark.very_slow
def test_a_node_that_is_told_to_end_costs_no_worker(tmp_path: Path) -> None:
    one, out = Family(tmp_path / "family", *families.fine_tuned(2, scale=280)), tmp_path / "out"
    wanted = families.merge_locally(plan(one.recipe()), tmp_path / "wanted").files
    with head_node(cpus=0) as head, ExitStack() as stack:
        told, *_ = [stack.enter_context(joining_node(head, name)) for name in ("one", "two", "three")]
        with running("merge", one.recipe_file(), out, "--address", head.address, "-v", env=head.environment) as run:
            run.wait_for("ranks of |tau|: ")
            told.terminate()
            assert run.finish() == 0, run.text
    receipt = receipt_of(out)
    assert receipt["workers_lost"] == 0, run.text
    assert "with its node" in run.text
    assert {name: (out / name).read_bytes() for name in wanted} == wanted


HEAD = "f" * 51 + "00000"  # as Ray's fake cluster has it
AUTOSCALED = {
    "cluster_name": "fake",
    "max_workers": 2,
    "idle_timeout_minutes": 0.1,
    "provider": {
        "type": "external",
        "module": "fake_nodes.Provider",
        "head_node_id": HEAD,
        "use_node_id_as_ip": True,
        "launch_multiple": True,
        "disable_node_updaters": True,
        "disable_launch_config_check": True,
    },
    "head_node_type": "ray.head.default",
    "available_node_types": {
        "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
        "worker": {
            "resources": {"CPU": 1, "object_store_memory": 80 << 20, "memory": 3 << 30},
            "node_config": {},
            "min_workers": 0,
            "max_workers": 2,
        },
    },
    **{key: {} for key in ("auth", "file_mounts")},
    **{key: [] for key in ("cluster_synced_files", "rsync_exclude", "rsync_filter")},
    **{f"{name}_commands": [] for name in ("initialization", "setup", "head_setup", "worker_setup")},
    **{f"{name}_start_ray_commands": [] for name in ("head", "worker")},
    "file_mounts_sync_continuously": False,
}

ASK_FOR_TOO_MUCH = """
import json, logging, sys
import pcb_ray, pcb_ray.nodes
pcb_ray.nodes.AUTOSCALER_S = 5.0
logging.basicConfig(level=logging.WARNING)
try:
    pcb_ray.merge(json.loads(sys.argv[2]), sys.argv[3], address=sys.argv[1], workers=3, resources={"disk": 1}, quiet=True)
except pcb_ray.RequestError as error:
    print(json.dumps({"error": str(error)}))
"""


@pytest.mark.very_slow
def test_an_autoscaler_is_asked_waited_for_and_asked_no_more(tmp_path: Path) -> None:
    """Ray's autoscaler over processes of this machine. That the request is withdrawn shows in that idle nodes end."""
    one, out, config = Family(tmp_path / "family", *families.fine_tuned(2, scale=80)), tmp_path / "out", tmp_path / "cluster.yaml"
    wanted = families.merge_locally(plan(one.recipe()), tmp_path / "wanted").files
    config.write_text(json.dumps(AUTOSCALED))
    variables = {"AUTOSCALER_UPDATE_INTERVAL_S": "1", "RAY_FAKE_CLUSTER": "1", "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD}
    variables["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[1])])
    with head_node(cpus=0, start=("--autoscaling-config", config), **variables) as head:

        def started() -> list[psutil.Process]:
            """What the autoscaler started."""
            return [
                one
                for monitor in descendants(head.process.pid)
                if "monitor.py" in title(monitor)
                for one in descendants(monitor.pid)
            ]

        try:
            refused = asked(head, ASK_FOR_TOO_MUCH, json.dumps(one.recipe()), str(tmp_path / "other"))
            run = pcb_ray("merge", one.recipe_file(), out, "--address", head.address, "--workers", 2, "-v", env=head.environment)
            assert started()
            await_that("idle nodes end, since nobody asks for them", lambda: not started(), DEADLINE_S)
        finally:
            for process in started():
                process.kill()
    assert "--resource disk=1: wanted a node with so much of it" in refused["error"]
    assert run.process.returncode == 0, run.text
    assert "the autoscaler is asked for nodes: 2 workers are wanted, the cluster has room for 0" in run.text
    assert "there is room for 2 of 2 workers" in run.text
    assert receipt_of(out)["workers"] == 2
    assert {name: (out / name).read_bytes() for name in wanted} == wanted


@pytest.mark.very_slow
def test_a_node_that_hangs_changes_no_byte(three_nodes: Any, tmp_path: Path) -> None:
    """All of its processes stand still, which nobody tells. What its worker has at hand others do after 2 seconds; what it has
    counted already they do when Ray's health checks of that node have failed: here within seconds, by default half a minute."""
    one, out = Family(tmp_path / "family", *families.fine_tuned(2, scale=280)), tmp_path / "out"
    wanted = families.merge_locally(plan(one.recipe()), tmp_path / "wanted").files
    node = next(iter(three_nodes.worker_nodes))
    (raylet,) = [psutil.Process(info.process.pid) for info in node.all_processes["raylet"]]
    stopped = [raylet, *descendants(raylet.pid)]
    try:
        arguments = ("merge", one.recipe_file(), out, "--address", three_nodes.address, "--workers", 3)
        with running(*arguments, env={"RAY_AUTH_MODE": os.environ.get("RAY_AUTH_MODE", "disabled")}) as run:
            run.wait_for("ranks of |tau|: ")
            run.wait_for("ranks of |tau|: ")  # and some of it is counted
            with run.stopped():
                stopped += [process for process in owners_under(raylet.pid) if process not in stopped]
                assert any(title(process).startswith("ray::_Actor") for process in stopped)
                for process in stopped:
                    process.suspend()
            assert run.finish() == 0, run.text
    finally:
        for process in stopped:
            process.kill()
        three_nodes.remove_node(node, allow_graceful=False)
    assert receipt_of(out)["workers_lost"] <= 1, run.text
    assert {name: (out / name).read_bytes() for name in wanted} == wanted
