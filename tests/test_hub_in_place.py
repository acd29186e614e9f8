"""Models on the Hub that are read in place, `hf://`: the real client against a loopback Hub and its CDN, through proxies that make
them fail."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from families import Family, MakeFamily, merge_locally
from hub_server import SIGNED, HubServer, Model, commit_of
from huggingface_hub import constants
from object_servers import FaultProxy, answer, cut, meanwhile, reset, stall
from safetensors.torch import save
from test_hub import TOKEN, Job, nowhere, open_all, problem
from test_remote import is_large, merged_from

from pcb_ray import Recipe, RequestError
from pcb_ray.errors import InputError
from pcb_ray.files import objects, room
from pcb_ray.files.checkpoint import open_checkpoint
from pcb_ray.files.room import Room
from pcb_ray.files.stores import open_store
from pcb_ray.local import LocalOwners
from pcb_ray.output.companions import model_card, side_files, write_side_files
from pcb_ray.output.place import place_of
from pcb_ray.owner import Owner
from pcb_ray.planning import fetched, open_inputs, plan, plan_of
from pcb_ray.receipt import inputs_of_receipt

OLD, NEW = commit_of("old"), commit_of("new")


class Hub:
    """A Hub of which a family's models are the repositories `org/base`, `org/model0`, ..., all private."""

    def __init__(self, server: HubServer, front: FaultProxy, cdn: FaultProxy) -> None:
        self.server, self.front, self.cdn = server, front, cdn

    def put(self, one: Family) -> dict[str, Any]:
        """The recipe that merges them in place."""
        for folder in one.folder.iterdir():
            files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
            self.server.models[f"org/{folder.name}"] = Model({OLD: files}, {"main": OLD, "v1": OLD}, token=TOKEN)
        models = [{"model": f"hf://org/model{k}"} for k in range(len(one.models))]
        return {"merge_method": "pcb", "base_model": "hf://org/base@v1", "models": models}

    def settle(self) -> None:
        """Until what a plan has announced and no longer wants is there."""
        seen = -1
        while seen != len(self.cdn.requests) or any(request.status is None for request in self.cdn.requests):
            seen = len(self.cdn.requests)
            time.sleep(0.3)

    @property
    def fetched(self) -> int:
        """Bytes of weights that were sent."""
        return sum(sent for name, sent in self.cdn.fetched().items() if name.endswith((".safetensors", ".bin")))


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """Where the client of this process is sent. Pauses and limits are short."""
    with HubServer({}) as server, FaultProxy(server.endpoint) as front, FaultProxy(server.cdn_itself) as cdn:
        server.cdn = cdn.endpoint.replace("127.0.0.1", "localhost")
        monkeypatch.setenv("HF_ENDPOINT", front.endpoint)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setenv("NO_PROXY", "*")
        # The library has read its variables when it was imported.
        monkeypatch.setattr(constants, "ENDPOINT", front.endpoint)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", front.endpoint + "/{repo_id}/resolve/{revision}/{filename}")
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "hf" / "token"))
        monkeypatch.setattr(objects, "FIRST_PAUSE_S", 0.01)
        monkeypatch.setattr(objects, "LONGEST_PAUSE_S", 0.05)
        monkeypatch.setattr(objects, "SILENCE_S", 5)  # the servers share this process
        monkeypatch.setattr(objects, "LOOKING_PATIENCE_S", 3.0)
        yield Hub(server, front, cdn)
        huggingface_hub.close_session()


@pytest.fixture(autouse=True)
def memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What stands for /dev/shm."""
    monkeypatch.setattr(room, "MEMORY", tmp_path / "shm")
    (tmp_path / "shm").mkdir()
    return tmp_path / "shm"


# --- the same bytes, fetched once -------------------------------------------------------------------------------------------------


def test_a_merge_in_place_is_that_of_the_files_and_each_byte_is_fetched_once_into_no_cache(
    family: MakeFamily, hub: Hub, tmp_path: Path
) -> None:
    one = family(2, scale=64, shards=2)
    made = plan(hub.put(one))
    assert made.is_remote
    hub.settle()
    before, asked = hub.fetched, len(hub.front.requests)
    found, traffic = merged_from(made, tmp_path / "found", Room.for_a_run(None, "", None))
    assert found == merge_locally(plan(one.recipe()), tmp_path / "wanted").files
    stored = sum(file.size for one in made.inputs for file in one.files)
    probes = 2 * 3  # each owner looks whether it can read each model
    assert made.sweep_bytes <= traffic.fetched <= stored + probes
    assert hub.fetched - before == traffic.fetched
    assert len(hub.front.requests) - asked == sum(len(one.files) for one in made.inputs)  # the Hub says once where each file is
    assert not (tmp_path / "hf").exists()


def test_the_token_goes_to_the_hub_alone(family: MakeFamily, hub: Hub, tmp_path: Path) -> None:
    merged_from(plan(hub.put(family(1))), tmp_path / "found")
    assert {request.headers.get("authorization") for request in hub.front.requests} == {f"Bearer {TOKEN}"}
    assert hub.cdn.requests
    assert not any("authorization" in request.headers for request in hub.cdn.requests)


def test_a_plan_fetches_headers_and_samples_only(family: MakeFamily, hub: Hub) -> None:
    one = family(2, scale=512)
    made, wanted = plan(hub.put(one)), plan(one.recipe())
    assert (made.D, made.relation, made.tensors_sha256) == (wanted.D, wanted.relation, wanted.tensors_sha256)
    stored = sum(file.size for one in made.inputs for file in one.files)
    hub.settle()
    ranges = [request.range for request in hub.cdn.about(step="get")]
    assert all(one is not None and one[1] - one[0] <= 1 << 16 for one in ranges)
    assert hub.fetched < stored / 2  # of small tensors samples are a large part


def test_files_of_torch_save_are_read_in_place(family: MakeFamily, hub: Hub, tmp_path: Path) -> None:
    one = family(1, scale=4)
    for name, state in (("base", one.base), ("model0", one.models[0])):
        torch.save(state, one.folder / name / "pytorch_model.bin")
        (one.folder / name / "model.safetensors").unlink()
    wanted = merge_locally(plan(one.recipe()), tmp_path / "wanted").files
    assert merged_from(plan(hub.put(one)), tmp_path / "found")[0] == wanted


# --- what is merged is what was planned -------------------------------------------------------------------------------------------


def test_one_commit_is_merged_and_named_wherever_the_output_names_its_inputs(family: MakeFamily, hub: Hub, tmp_path: Path) -> None:
    one = family(1, shards=2)
    (one.folder / "base" / "tokenizer.json").write_text('{"model": {"vocab": {"a": 0}}}')
    (one.folder / "base" / "empty.txt").write_text("")
    recipe = Recipe.from_dict(hub.put(one))
    inputs = open_inputs(recipe)
    made = plan_of(recipe, inputs)
    assert not inputs.on_hub  # there is nothing to download
    assert fetched(recipe, inputs) == inputs
    for model in hub.server.models.values():  # the branch moves on
        model.commits[NEW] = {"config.json": b"{}", "model.safetensors": save({"other": torch.ones(3)})}
        model.revisions |= {"main": NEW, "v1": NEW}
    names = [f"model-0000{k}-of-00002.safetensors" for k in (1, 2)]
    assert [file.path for file in made.inputs[1].files] == [f"hf://org/model0@{OLD}/{name}" for name in names]
    assert merged_from(made, tmp_path / "out")[0] == merge_locally(plan(one.recipe()), tmp_path / "wanted").files

    receipt = inputs_of_receipt(made, ["", ""])
    assert [(of.name, of.commit) for of in receipt] == [("org/base", OLD), ("org/model0", OLD)]
    assert [file.name for file in receipt[1].files] == names
    assert all(len(file.tag) == 64 for file in receipt[1].files)  # the Hub's digest of it
    store = open_store(made.stamps)
    files = side_files(recipe, made, inputs.base, inputs.tokenizer)
    write_side_files(tmp_path / "beside", files, store)
    store.close()
    for name in ("tokenizer.json", "empty.txt"):
        assert (tmp_path / "beside" / name).read_bytes() == (one.folder / "base" / name).read_bytes()
    pinned = Recipe.from_file(tmp_path / "beside" / "pcb_recipe.yaml")
    assert (pinned.base_model, pinned.models[0].source) == (f"hf://org/base@{OLD}", f"hf://org/model0@{OLD}")
    again = plan(pinned)
    assert [of.files for of in again.inputs] == [of.files for of in made.inputs]
    card = model_card(made, "1").decode()
    assert "base_model:\n- org/base\n- org/model0\n" in card
    assert f"[org/model0@{OLD}](https://huggingface.co/org/model0/tree/{OLD})" in card
    place_of(tmp_path / "elsewhere").check(made, resume=False)


def test_a_mirror_that_tells_neither_size_nor_digest_will_do(family: MakeFamily, hub: Hub, tmp_path: Path) -> None:
    one = family(1)
    hub.server.linked = False
    made = plan(hub.put(one))
    assert all(stamp.tag == "" for stamp in made.stamps.values())
    store = open_store()
    assert {path: store.stamp(path) for path in made.stamps} == made.stamps
    store.close()
    assert merged_from(made, tmp_path / "found")[0] == merge_locally(plan(one.recipe()), tmp_path / "wanted").files


def test_a_file_that_the_hub_calls_another_ends_the_run(family: MakeFamily, hub: Hub, tmp_path: Path) -> None:
    """No Hub does that to a commit; a mirror of one might."""
    made = plan(hub.put(family(1)))
    files = hub.server.models["org/model0"].commits[OLD]
    files["model.safetensors"] = bytes(reversed(files["model.safetensors"]))
    with pytest.raises(InputError, match=rf"hf://org/model0@{OLD}/model.safetensors: wanted the file as it was"):
        merged_from(made, tmp_path / "out", threads=1)


# --- faults -----------------------------------------------------------------------------------------------------------------------

FAULTS: dict[str, Callable[[Hub], Any]] = {
    "busy": lambda hub: hub.cdn.fail(answer(503, "SlowDown"), 20),
    "the Hub is busy": lambda hub: hub.front.fail(answer(500, "Oops"), 2),
    "too many": lambda hub: hub.front.fail(answer(429, "TooManyRequests"), 3),
    "reset": lambda hub: hub.cdn.fail(reset(), 5),
    "reset in a body": lambda hub: hub.cdn.fail(reset(1000), 5, where=is_large),
    "cut short": lambda hub: hub.cdn.fail(cut(1000), 9, where=is_large),
    "silence": lambda hub: hub.cdn.fail(stall(), 2),
    "silence in a body": lambda hub: hub.cdn.fail(stall(1000), 2, where=is_large),
    "a link that is refused": lambda hub: hub.cdn.fail(answer(403, "AccessDenied"), 2),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_hub_that_fails_for_a_while_changes_no_byte_and_the_retries_are_counted(
    family: MakeFamily, hub: Hub, tmp_path: Path, fault: str
) -> None:
    one = family(1, scale=16)
    made = plan(hub.put(one))
    rule = FAULTS[fault](hub)
    found, traffic = merged_from(made, tmp_path / "found", Room.for_a_run(None, "", None))
    assert found == merge_locally(plan(one.recipe()), tmp_path / "wanted").files
    assert rule.left == 0
    assert traffic.retries == len(rule.struck)


def test_a_link_that_expires_is_asked_for_anew_and_one_that_is_never_taken_is_told(
    family: MakeFamily, hub: Hub, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, logger="")
    one = family(1, scale=16)
    made = plan(hub.put(one))
    hub.settle()
    expired = hub.cdn.fail(meanwhile(lambda _: hub.server.expire()), 3, where=is_large)
    found, traffic = merged_from(made, tmp_path / "found")
    assert found == merge_locally(plan(one.recipe()), tmp_path / "wanted").files
    assert (expired.left, traffic.retries >= 3) == (0, True)
    hub.server.never = True
    with pytest.raises(RequestError) as caught:
        merged_from(made, tmp_path / "never")
    assert "sends refuses access (HTTP 403). Fix: give this machine a token" in str(caught.value)
    for secret in (SIGNED, TOKEN):  # in the address, in the answer of the CDN, in what the transport logs
        assert secret not in f"{caught.value!r}{caplog.text}{made}{made.fingerprint()}"
    assert "Signature" not in caplog.text
    assert "HTTP Request: GET" in caplog.text


def test_a_hub_that_stays_away_is_given_up_in_one_line(family: MakeFamily, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = hub.put(family(1))
    monkeypatch.setattr(objects, "LOOKING_PATIENCE_S", 0.3)
    for proxy, step in ((hub.front, "head"), (hub.cdn, "get"), (hub.front, None)):
        rule = proxy.fail(answer(503, "SlowDown"), None, step=step)
        with pytest.raises(RequestError) as caught:
            plan(recipe)
        assert all("found no answer in 0 s (HTTP 503)" in line for line in caught.value.problems)
        assert rule.struck
        proxy.heal()


# --- what is refused --------------------------------------------------------------------------------------------------------------


def test_what_the_hub_refuses_is_told_when_it_is_opened(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    def told(source: str) -> str:
        with pytest.raises(RequestError) as caught:
            Recipe.from_dict({"merge_method": "linear", "models": [{"model": source}]})
            open_checkpoint(source)
        (line,) = set(caught.value.problems)
        assert TOKEN not in line
        assert "\n" not in line
        return line

    files = {"model.safetensors": save({"x": torch.randn(300, 300)})}
    hub.server.models |= {
        "org/private": Model({OLD: files}, {"main": OLD}, token="another"),
        "org/gated": Model({OLD: files}, {"main": OLD}, gated=True),
        "org/whole": Model({OLD: files}, {"main": OLD}, ranges=False),
    }
    assert "found no such model on 127.0.0.1" in told("hf://org/private")
    assert "no such revision" in told("hf://org/gated@nothing")
    assert "wanted to read it, found it gated on 127.0.0.1" in told("hf://org/gated")
    assert open_checkpoint("hf://org/whole").commit == OLD  # its header can be had
    with pytest.raises(RequestError, match="found that no ranges are sent, but whole files or other bytes. Fix: check HF_ENDPOINT"):
        plan({"merge_method": "task_arithmetic", "base_model": "hf://org/whole", "models": [{"model": "hf://org/whole@main"}]})
    assert "wanted hf://org/name[@revision]" in told("hf://org")
    assert "wanted hf://org/name[@revision]" in told("hf://org/name/folder")
    for uri in (f"hf://{TOKEN}@org/name", f"hf://me:{TOKEN}@org/name", f"hf://org/name?token={TOKEN}"):
        assert "wanted a URI without credentials" in told(uri)
    monkeypatch.setenv("HF_TOKEN", "hf_naïveSecret")
    assert "HF_TOKEN is not plain ASCII" in told("hf://org/gated")


def test_a_worker_without_a_token_is_refused_for_each_model_before_the_work(
    family: MakeFamily, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tokens are each node's own: that of the driver does not go along with the plan."""
    made = plan(hub.put(family(2)))
    hub.server.models["org/model1"].gated = True
    store = open_store(made.stamps)
    with pytest.raises(RequestError) as caught:
        Owner(made, store)
    (gated,) = caught.value.problems
    assert f"hf://org/model1@{OLD}/model.safetensors: wanted to read it, found it gated on" in gated
    store.close()
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(RequestError) as caught:
        merged_from(made, tmp_path / "out", threads=1)
    base, model, _ = caught.value.problems
    for line, repo in ((base, "org/base"), (model, "org/model0")):
        assert line.startswith("node ")
        assert f"hf://{repo}@{OLD}/model.safetensors: wanted to read it, found no such model on 127.0.0.1" in line
        assert "Fix: give this machine a token that may read the model (HF_TOKEN, or `hf auth login`)" in line


def test_a_worker_that_does_not_see_the_cache_of_the_hub_is_told_of_the_other_way(
    family: MakeFamily, hub: Hub, tmp_path: Path
) -> None:
    recipe = hub.put(family(1))
    recipe = Recipe.from_dict(recipe | {"base_model": "org/base", "models": [{"model": "org/model0"}]})
    inputs = fetched(recipe, open_inputs(recipe))
    made = plan_of(recipe, inputs)
    (tmp_path / "hf").rename(tmp_path / "away")
    with pytest.raises(RequestError) as caught:
        LocalOwners(made, open_store(made.stamps))
    assert len(caught.value.problems) == 2
    assert (
        "Fix: name it hf://org/base, so that each node reads it from the Hub itself, or let HF_HOME be" in caught.value.problems[0]
    )


# --- the cache, offline -----------------------------------------------------------------------------------------------------------


def test_offline_a_model_that_lies_whole_in_the_cache_is_read_there_and_else_it_is_refused(tmp_path: Path) -> None:
    whole = {"config.json": b'{"seed": 1}', "model.safetensors": save({"x": torch.ones(7)})}
    models = {"org/whole": Model({OLD: whole}, {"main": OLD}), "org/other": Model({OLD: whole}, {"main": OLD})}
    with HubServer(models) as server:
        (downloaded,) = open_all(tmp_path, server.endpoint, Job("org/whole", True))
        before = sorted(tmp_path.rglob("*"))
        (in_place,) = open_all(tmp_path, server.endpoint, Job("hf://org/whole"))
        assert in_place["folder"] is None
        assert in_place["files"][0][0] == f"hf://org/whole@{OLD}/model.safetensors"
        jobs = [Job(f"hf://org/whole{at}", download) for at in ("", f"@{OLD}") for download in (False, True)]
        *served, other = open_all(tmp_path, nowhere(), *jobs, Job("hf://org/other"), HF_HUB_OFFLINE="1")
    assert [(one["folder"], one["commit"], one["tensors"]) for one in served] == [
        (downloaded["folder"], OLD, downloaded["tensors"])
    ] * 4
    assert "HF_HUB_OFFLINE set, which forbids to fetch it" in problem(other)
    assert sorted(tmp_path.rglob("*")) == before
