"""A merge from an object store to an object store on Ray, through the command line: killed, resumed, and checked."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import families
import pytest
import yaml
from clusters import await_end, owners_under, pcb_ray, running
from families import Family
from object_servers import FaultProxy, ObjectServer, Request, answer, meanwhile, s3_server
from test_prefix import held
from test_remote import SECRET, put_all, remote_recipe

from pcb_ray.planning import plan

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.filterwarnings("ignore::ResourceWarning")]


@pytest.fixture(scope="module")
def server() -> Iterator[ObjectServer]:
    with s3_server() as server:
        yield server


def seen(_: Request) -> None:
    """It goes on to the server as it is."""


@pytest.mark.very_slow
def test_a_merge_between_stores_survives_its_workers_and_its_driver(server: ObjectServer, tmp_path: Path) -> None:
    one = Family(tmp_path / "family", *families.fine_tuned(2, scale=1000))
    (one.folder / "base" / "tokenizer.json").write_text('{"model": {"vocab": {"a": 0}}}')
    wanted = families.merge_locally(plan(one.recipe(), max_shard_bytes=18_000_000), tmp_path / "wanted").files
    names = sorted(wanted)
    assert len(names) == 3
    recipe, out = tmp_path / "recipe.yaml", f"{server.uri}/merges/out"
    recipe.write_text(yaml.safe_dump(remote_recipe(put_all(server, one.folder, "models"), 2)))
    command = ("merge", recipe, out, "--workers", 2, "--max-shard-size", "18MB")
    with FaultProxy(server) as proxy:
        environment = server.through(proxy)
        busy = proxy.fail(answer(503, "SlowDown"), 5, step="part")
        begun = proxy.fail(meanwhile(seen), 1, step="start", key=names[1])
        finished = proxy.fail(meanwhile(seen), 1, step="put", key="journal.jsonl")
        with running(*command, env=environment) as run:
            begun.wait(timeout=150)
            owners_under(run.pid)[0].kill()  # one of those that are writing
            finished.wait(timeout=150)
            os.kill(run.pid, signal.SIGKILL)  # and the driver, when it notes that a file is there
            run.finish()
        await_end(owners_under(run.pid))
        there = held(server, "merges/out")
        assert "pcb_receipt.json" not in there
        assert "config.json" not in there
        assert any(name.endswith("lease.json") for name in there)

        elsewhere = tmp_path / "elsewhere"  # nothing of the first run is there
        elsewhere.mkdir()
        moved = elsewhere / "recipe.yaml"
        moved.write_text(recipe.read_text())
        resumed = ("merge", moved, out, "--workers", 1, "--max-shard-size", "18MB", "--resume")
        done = pcb_ray(*resumed, env=environment)
        assert done.process.returncode == 0, done.text
        assert busy.left == 0
        there = held(server, "merges/out")
        assert {name: there[name] for name in names} == wanted
        assert there["tokenizer.json"] == (one.folder / "base" / "tokenizer.json").read_bytes()
        assert not [name for name in there if ".pcb-ray" in name]
        assert server.uploads() == {}
        assert not any(SECRET.encode() in data for name, data in there.items() if name not in names)
        assert SECRET not in run.text + done.text

        again = pcb_ray(*resumed, env=environment)
        assert again.process.returncode == 0, again.text
        assert f"{out}: is this very merge already" in again.text
        assert pcb_ray(*command, env=environment).process.returncode == 2
        checked = pcb_ray("verify", out, env=environment)
        assert checked.process.returncode == 0, checked.text
    await_end(owners_under(os.getpid()))


@pytest.mark.very_slow
def test_a_node_that_may_not_write_is_named_before_the_work(server: ObjectServer, tmp_path: Path) -> None:
    one = Family(tmp_path / "family", *families.fine_tuned(2))
    with FaultProxy(server) as proxy:
        proxy.fail(answer(403, "AccessDenied"), None, step="put", key="/tried/")
        done = pcb_ray("merge", one.recipe_file(), f"{server.uri}/refused/out", "--workers", 1, env=server.through(proxy))
    assert done.process.returncode == 2, done.text
    assert "node " in done.text
    assert "wanted to write it, found access refused (AccessDenied)" in done.text
    assert server.list("refused/") == {}
