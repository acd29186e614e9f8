"""Merges of models in an object store, and on the Hub, on Ray, through the command line."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import families
import pytest
import yaml
from clusters import await_end, head_node, owners_under, pcb_ray, receipt_of, running
from families import Family
from hub_server import SIGNED, HubServer, Model
from object_servers import FaultProxy, ObjectServer, Request, answer, meanwhile, s3_server
from test_hub import TOKEN
from test_hub_in_place import NEW, OLD, Hub
from test_remote import SECRET, fill, put_all, remote_recipe

import pcb_ray as package
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


@pytest.mark.very_slow
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


@pytest.fixture
def hub() -> Iterator[Hub]:
    with HubServer({}) as server, FaultProxy(server.endpoint) as front, FaultProxy(server.cdn_itself) as cdn:
        server.cdn = cdn.endpoint.replace("127.0.0.1", "localhost")
        yield Hub(server, front, cdn)


def environment_of(hub: Hub, home: Path) -> dict[str, str]:
    return {"HF_ENDPOINT": hub.front.endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "*"}


@pytest.mark.very_slow
def test_a_merge_in_place_from_the_hub_survives_faults_and_a_killed_worker_fetches_once_and_may_be_run_again(
    hub: Hub, tmp_path: Path
) -> None:
    one = Family(tmp_path / "family", *families.fine_tuned(2, scale=1000), shards=2)
    (one.folder / "base" / "tokenizer.json").write_text('{"model": {"vocab": {"a": 0}}}')
    wanted = families.merge_locally(plan(one.recipe()), tmp_path / "wanted").files
    recipe, out = tmp_path / "recipe.yaml", tmp_path / "out"
    recipe.write_text(yaml.safe_dump(hub.put(one)))
    command = ("merge", recipe, out, "--workers", 2, "--scratch", tmp_path / "scratch", "--cache", "20MB")
    environment = environment_of(hub, tmp_path / "hf") | {"HF_TOKEN": TOKEN}
    rules = [
        hub.cdn.fail(answer(503, "SlowDown"), 5, step="get", where=is_whole_piece),
        hub.cdn.fail(meanwhile(lambda _: hub.server.expire()), 2, step="get", where=is_whole_piece),
    ]
    with running(*command, env=environment) as run:
        run.wait_for("ranks of |tau|: ")
        with run.stopped():
            (victim, _) = owners_under(run.pid)
            victim.kill()
        assert run.finish() == 0, run.text
    assert {name: (out / name).read_bytes() for name in wanted} == wanted
    assert (out / "tokenizer.json").read_bytes() == (one.folder / "base" / "tokenizer.json").read_bytes()
    receipt, stored = receipt_of(out), sum(file.size for of in plan(one.recipe()).inputs for file in of.files)
    assert (receipt["workers_lost"], [rule.left for rule in rules]) == (1, [0, 0])
    assert receipt["retries"] >= 5  # the killed one may have met some that nobody heard of
    assert [of["commit"] for of in receipt["inputs"]] == [OLD] * 3
    assert hub.fetched < 1.3 * stored  # headers, samples of the plan, and what the killed one had under way
    assert not list((tmp_path / "scratch").glob("*/*"))
    assert not list((tmp_path / "hf").rglob("*"))
    small = [path for path in out.iterdir() if path.suffix != ".safetensors"]
    everything = "".join([run.text, *(path.read_text() for path in small)])
    assert not any(secret in everything for secret in (TOKEN, SIGNED))

    for model in hub.server.models.values():  # the branch moves on; the output's recipe names the commit
        model.commits["0" * 40] = {}
        model.revisions["main"] = "0" * 40
    checked = pcb_ray("verify", out, env=environment)
    assert checked.process.returncode == 0, checked.text
    for model in hub.server.models.values():
        model.revisions["main"] = OLD
    again = pcb_ray(*command, "--resume", env=environment)
    assert again.process.returncode == 0, again.text
    assert f"{out}: is this very merge already" in again.text
    await_end(owners_under(os.getpid()))


@pytest.mark.very_slow
def test_a_search_of_models_on_the_hub_loads_and_maps_a_copy_of_the_base(hub: Hub, tmp_path: Path) -> None:
    """Of two files, which the evaluator finds by their index."""
    one = Family(tmp_path / "family", *families.fine_tuned(2, scale=60), shards=2)
    recipe, out = tmp_path / "recipe.yaml", tmp_path / "out"
    shutil.copy(Path(__file__).with_name("evaluators_of_tests.py"), tmp_path / "near.py")
    target = families.write(tmp_path / "hidden", package.merge_state_dicts(one.base, one.models, weights=[1.4, 0.3]))
    evaluator = {"near.py:Indexed": {"target": str(target / "model.safetensors")}}
    search = {"evaluator": evaluator, "metric": "near", "budget": 8, "population": 4}
    recipe.write_text(yaml.safe_dump(hub.put(one) | {"search": search}))
    environment = environment_of(hub, tmp_path / "hf") | {"HF_TOKEN": TOKEN}
    done = pcb_ray("search", recipe, out, "--workers", 1, "--scratch", tmp_path / "scratch", env=environment)
    assert done.process.returncode == 0, done.text
    best = (out / "best_recipe.yaml").read_text()
    for name in ("base", "model0", "model1"):
        best = best.replace(f"hf://org/{name}@{OLD}", str(one.folder / name)).replace(f"hf://org/{name}", str(one.folder / name))
    local = yaml.safe_load(best.replace("@v1", ""))
    wanted = families.merge_locally(plan(local), tmp_path / "wanted").files
    assert {name: (out / name).read_bytes() for name in wanted} == wanted
    assert not any(TOKEN in path.read_text() for path in out.iterdir() if path.suffix in (".json", ".yaml", ".html", ".md"))
    assert not list((tmp_path / "scratch").glob("*/*"))


@pytest.mark.very_slow
def test_the_token_of_the_driver_is_not_sent_to_a_cluster_whose_nodes_have_none(hub: Hub, tmp_path: Path) -> None:
    one, recipe = Family(tmp_path / "family", *families.fine_tuned(1)), tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(hub.put(one)))
    command = ("merge", recipe, tmp_path / "out", "--workers", 1)
    variables = environment_of(hub, tmp_path / "hf")
    with head_node(**variables) as head:
        own = {name: value for name, value in head.environment.items() if name.startswith("RAY_")}
        refused = pcb_ray(*command, "--address", head.address, env=variables | own | {"HF_TOKEN": TOKEN})
        assert refused.process.returncode == 2, refused.text
        assert not any(TOKEN in path.read_text(errors="replace") for path in head.folder.rglob("*") if path.is_file())
    text = " ".join(refused.text.split())
    assert f"node {os.uname().nodename}: hf://org/base@{OLD}/model.safetensors: wanted to read it, found no such model on" in text
    assert "Fix: give this machine a token that may read the model (HF_TOKEN, or `hf auth login`)" in text
    assert not (tmp_path / "out").exists()


@pytest.mark.very_slow
def test_a_merge_from_the_hub_to_the_hub_is_one_commit_and_a_node_that_may_not_write_is_named(hub: Hub, tmp_path: Path) -> None:
    one = Family(tmp_path / "family", *families.fine_tuned(2, scale=64))
    wanted = families.merge_locally(plan(one.recipe(), max_shard_bytes=1_500_000), tmp_path / "wanted").files
    recipe, merged = tmp_path / "recipe.yaml", Model({NEW: {".gitattributes": b""}}, {"main": NEW}, token=TOKEN)
    recipe.write_text(yaml.safe_dump(hub.put(one)))
    hub.server.models["org/merged"] = merged
    environment = environment_of(hub, tmp_path / "hf") | {"HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1"}
    command = ("merge", recipe, "hf://org/merged", "--workers", 2, "--max-shard-size", "1.5MB")

    hub.server.readers = frozenset({TOKEN})
    refused = pcb_ray(*command, env=environment)
    assert refused.process.returncode == 2, refused.text
    text = " ".join(refused.text.split())
    assert f"node {os.uname().nodename}: hf://org/merged@main: wanted to write it, found that 127.0.0.1" in text
    assert not hub.server.blobs

    hub.server.readers = frozenset()
    done = pcb_ray(*command, env=environment)
    assert done.process.returncode == 0, done.text
    assert wanted.items() <= merged.commits[merged.revisions["main"]].items()
    assert len(merged.commits) == 2
    assert TOKEN not in done.text
    checked = pcb_ray("verify", "hf://org/merged", env=environment)
    assert checked.process.returncode == 0, checked.text
    assert not [path for path in tmp_path.iterdir() if path.name.endswith(".pcb-ray")]
    await_end(owners_under(os.getpid()))
