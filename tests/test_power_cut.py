"""A merge between stores whose driver loses its whole machine, on nodes that share nothing but the network."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import families
import pytest
import yaml
from clusters import Run, await_end
from families import Family
from machines import SCRATCH, Machine, machines
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


class Merge(NamedTuple):
    """One between stores, and what it must give."""

    recipe: Path
    out: str
    wanted: dict[str, bytes]
    server: ObjectServer

    def command(self, address: str) -> tuple[str, ...]:
        room = ("--cache", "30MB", "--scratch", str(SCRATCH))
        return ("merge", str(self.recipe), self.out, "--max-shard-size", "18MB", "--address", address, *room)

    @property
    def held(self) -> dict[str, bytes]:
        return held(self.server, f"merges/{self.recipe.stem}")

    def is_cut_off(self, run: Run) -> None:
        assert not run.text.count("models merged")
        assert "pcb_receipt.json" not in self.held
        assert any(name.endswith("lease.json") for name in self.held)

    def resume(self, machine: Machine, address: str) -> Run:
        """To the end, from a recipe of another place."""
        moved = self.recipe.with_name("elsewhere.yaml")
        moved.write_text(self.recipe.read_text())
        command = self.command(address)
        done = machine.pcb_ray("merge", moved, *command[2:], "--workers", 1, "--resume")
        assert done.process.returncode == 0, done.text
        assert "ranks of" not in done.text  # what was found before is known
        assert {name: self.held[name] for name in self.wanted} == self.wanted
        assert not [name for name in self.held if ".pcb-ray" in name]
        assert self.server.uploads() == {}
        assert not machine.rooms
        assert SECRET not in done.text
        checked = machine.pcb_ray("verify", self.out)
        assert checked.process.returncode == 0, checked.text
        return done


@pytest.fixture
def merge(server: ObjectServer, tmp_path: Path, request: pytest.FixtureRequest) -> Merge:
    one = Family(tmp_path / "family", *families.fine_tuned(2, scale=1000))
    wanted = families.merge_locally(plan(one.recipe(), max_shard_bytes=18_000_000), tmp_path / "wanted").files
    recipe = tmp_path / f"{request.node.name}.yaml"
    recipe.write_text(yaml.safe_dump(remote_recipe(put_all(server, one.folder, f"models-{recipe.stem}"), 2)))
    return Merge(recipe, f"{server.uri}/merges/{recipe.stem}", dict(wanted), server)


@pytest.mark.very_slow
def test_a_merge_whose_driver_lost_its_machine_is_resumed_from_another(merge: Merge) -> None:
    with FaultProxy(merge.server) as proxy, machines(2, merge.server.through(proxy)) as (address, (_, first, second)):
        noted = proxy.fail(meanwhile(seen), 1, step="put", key="journal.jsonl")
        with first.running(*merge.command(address), "--workers", 2) as run:
            noted.wait(timeout=150)
            others = second.owners
            first.cut_power()
            run.finish()
        assert others
        assert SECRET not in run.text
        await_end(others)  # they are of a run that is no more
        merge.is_cut_off(run)
        assert "if nothing is heard of it for 60 s it is taken over" in merge.resume(second, address).text


@pytest.mark.very_slow
def test_a_merge_whose_whole_cluster_lost_power_is_resumed_on_another(merge: Merge) -> None:
    """Nothing of the first one is left: neither its head, nor a disk."""
    with FaultProxy(merge.server) as proxy:
        through = merge.server.through(proxy)
        with machines(2, through) as (address, nodes):
            noted = proxy.fail(meanwhile(seen), 1, step="put", key="journal.jsonl")
            with nodes[1].running(*merge.command(address), "--workers", 2) as run:
                noted.wait(timeout=150)
                for node in nodes:
                    node.cut_power()
                run.finish()
        merge.is_cut_off(run)
        with machines(1, through) as (address, (_, only)):
            merge.resume(only, address)
