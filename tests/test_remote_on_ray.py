"""A merge of models in an object store on Ray, through the command line."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import families
import pytest
import yaml
from clusters import await_end, owners_under, pcb_ray, receipt_of, running
from families import Family
from object_servers import FaultProxy, ObjectServer, Request, answer, meanwhile, s3_server
from test_remote import SECRET, fill, put_all, remote_recipe

from pcb_ray.files.remote import PIECE
from pcb_ray.planning import plan

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.filterwarnings("ignore::ResourceWarning")]


@pytest.fixture(scope="module")
def server() -> Iterator[ObjectServer]:
    with s3_server() as server:
        yield server


def is_whole_piece(request: Request) -> bool:
    return request.range is not None and request.range[1] - request.range[0] == PIECE


def test_a_merge_from_a_store_survives_faults_and_a_killed_worker_fetches_once_and_may_be_run_again(
    server: ObjectServer, tmp_path: Path
) -> None:
    one = Family(tmp_path / "family", *families.fine_tuned(2, scale=1000), shards=2)
    (one.folder / "base" / "tokenizer.json").write_text('{"model": {"vocab": {"a": 0}}}')
    wanted = families.merge_locally(plan(one.recipe()), tmp_path / "wanted").files
    at, recipe, out = put_all(server, one.folder, "on-ray"), tmp_path / "recipe.yaml", tmp_path / "out"
    recipe.write_text(yaml.safe_dump(remote_recipe(at, 2)))
    command = ("merge", recipe, out, "--workers", 2, "--scratch", tmp_path / "scratch", "--cache", "20MB")
    with FaultProxy(server) as proxy:
        environment = server.through(proxy)
        rule = proxy.fail(answer(503, "SlowDown"), 5, step="get", where=is_whole_piece)
        with running(*command, env=environment) as run:
            run.wait_for("ranks of |tau|: ")
            with run.stopped():
                (victim, _) = owners_under(run.pid)
                victim.kill()
            assert run.finish() == 0, run.text
        assert {name: (out / name).read_bytes() for name in wanted} == wanted
        assert (out / "tokenizer.json").read_bytes() == (one.folder / "base" / "tokenizer.json").read_bytes()
        receipt, stored = receipt_of(out), sum(file.size for of in plan(one.recipe()).inputs for file in of.files)
        assert receipt["workers_lost"] == 1
        assert rule.left == 0
        assert receipt["retries"] >= 4  # the killed one may have met one that nobody heard of
        fetched = sum(proxy.fetched().values())
        assert fetched < 1.3 * stored  # headers, samples of the plan, and what the killed one had under way
        assert not list((tmp_path / "scratch").glob("*/*"))
        assert not list(Path(f"/dev/shm/pcb-ray-{os.getuid()}").glob("*"))
        small = [path for path in out.iterdir() if path.suffix != ".safetensors"]
        everything = [run.text, *(path.read_text() for path in small)]
        assert not any(SECRET in text for text in everything)

        again = pcb_ray(*command, "--resume", env=environment)
        assert again.process.returncode == 0, again.text
        assert f"{out}: is this very merge already" in again.text
        checked = pcb_ray("verify", out, env=environment)
        assert checked.process.returncode == 0, checked.text
        server.put("on-ray/model1/model-00001-of-00002.safetensors", server.get("on-ray/model0/model-00001-of-00002.safetensors"))
        other = pcb_ray(*command, "--resume", env=environment)
        assert other.process.returncode == 2
        assert "wanted the object that was merged" in other.text
    await_end(owners_under(os.getpid()))


@pytest.mark.parametrize("small_disk", ["128m"], indirect=True)
def test_a_scratch_that_others_fill_is_done_without(server: ObjectServer, tmp_path: Path, small_disk: Path) -> None:
    one = Family(tmp_path / "family", *families.fine_tuned(2, scale=600))
    wanted = families.merge_locally(plan(one.recipe()), tmp_path / "wanted").files
    recipe, out = tmp_path / "recipe.yaml", tmp_path / "out"
    recipe.write_text(yaml.safe_dump(remote_recipe(put_all(server, one.folder, "full"), 2)))
    command = ("merge", recipe, out, "--workers", 1, "--scratch", small_disk / "scratch", "--cache", "1MB")
    with FaultProxy(server) as proxy:
        second = proxy.fail(meanwhile(lambda _: None), 1, step="get", where=is_whole_piece)
        proxy.fail(meanwhile(lambda _: fill(small_disk)), 1, step="get", where=is_whole_piece)
        done = pcb_ray(*command, env=server.through(proxy))
        fetched = sum(proxy.fetched().values())
    assert done.process.returncode == 0, done.text
    assert second.left == 0
    assert "of what was fetched, not" in done.text
    assert {name: (out / name).read_bytes() for name in wanted} == wanted
    assert fetched > 1.5 * sum(file.size for of in plan(one.recipe()).inputs for file in of.files)
    assert [path.name for path in small_disk.glob("scratch/*/*")] == []
    await_end(owners_under(os.getpid()))
