"""A merge between stores whose driver loses its whole machine, on nodes that share nothing but the network."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import families
import pytest
import yaml
from clusters import await_end
from families import Family
from machines import SCRATCH, machines
from object_servers import FaultProxy, ObjectServer, Request, meanwhile, s3_server
from test_prefix import held
from test_remote import SECRET, put_all, remote_recipe

from pcb_ray.planning import plan

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(600), pytest.mark.filterwarnings("ignore::ResourceWarning")]


@pytest.fixture(scope="module")
def server() -> Iterator[ObjectServer]:
    with s3_server() as server:
        yield server


def seen(_: Request) -> None:
    """It goes on to the server as it is."""


@pytest.mark.very_slow
def test_a_merge_whose_driver_lost_its_machine_is_resumed_from_another(server: ObjectServer, tmp_path: Path) -> None:
    one = Family(tmp_path / "family", *families.fine_tuned(2, scale=1000))
    wanted = families.merge_locally(plan(one.recipe(), max_shard_bytes=18_000_000), tmp_path / "wanted").files
    recipe, out = tmp_path / "recipe.yaml", f"{server.uri}/merges/out"
    recipe.write_text(yaml.safe_dump(remote_recipe(put_all(server, one.folder, "models"), 2)))
    with FaultProxy(server) as proxy, machines(2, server.through(proxy)) as (address, (_, first, second)):
        command = ("merge", recipe, out, "--max-shard-size", "18MB", "--address", address, "--cache", "30MB", "--scratch", SCRATCH)
        noted = proxy.fail(meanwhile(seen), 1, step="put", key="journal.jsonl")
        with first.running(*command, "--workers", 2) as run:
            noted.wait(timeout=150)
            others = second.owners
            first.cut_power()
            run.finish()
        assert others
        assert not run.text.count("models merged")
        await_end(others)  # they are of a run that is no more
        there = held(server, "merges/out")
        assert "pcb_receipt.json" not in there
        assert any(name.endswith("lease.json") for name in there)

        moved = tmp_path / "elsewhere.yaml"
        moved.write_text(recipe.read_text())
        done = second.pcb_ray("merge", moved, *command[2:], "--workers", 1, "--resume")
        assert done.process.returncode == 0, done.text
        assert "if nothing is heard of it for 60 s it is taken over" in done.text
        assert "ranks of" not in done.text  # what was found before is known
        there = held(server, "merges/out")
        assert {name: there[name] for name in wanted} == wanted
        assert not [name for name in there if ".pcb-ray" in name]
        assert server.uploads() == {}
        assert not second.rooms
        assert SECRET not in run.text + done.text
        checked = second.pcb_ray("verify", out)
        assert checked.process.returncode == 0, checked.text
