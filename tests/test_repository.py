"""Outputs on the Hub: the real client against a loopback Hub, through a proxy that makes it fail. All is as on Ray, but for the
owners, which are threads."""

# ruff: noqa: F401, F811 - fixtures of another module

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import families
import pytest
from families import Family
from hub_server import Model, commit_of
from huggingface_hub import constants
from object_servers import FaultProxy, Request, answer, meanwhile, s3_server
from test_hub import TOKEN
from test_hub_in_place import Hub, hub, memory

from pcb_ray import Receipt, Recipe, RequestError, RunError, merge, merging, verify
from pcb_ray.errors import InputError
from pcb_ray.files.room import Room
from pcb_ray.files.stores import open_store
from pcb_ray.local import LocalOwners
from pcb_ray.output.state import Place
from pcb_ray.planning import Plan, plan
from pcb_ray.session import Session

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # the library's own

SHARD = 1_200_000
EMPTY = commit_of("empty")
OUT = "hf://org/merged"


@pytest.fixture(autouse=True)
def owners(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # what Xet's own client speaks, no server of tests does

    @contextlib.contextmanager
    def placed(plans: Sequence[Plan], *, writes_to: Callable[[], Place], room: Room | None, **_: Any) -> Iterator[Session]:
        store = open_store(plans[0].stamps, plans[0].recipe.storage, room, writes_to().fence)

        def owners_for(plan: Plan) -> LocalOwners:
            return LocalOwners(plan, store, threads=1)

        try:
            yield Session(plans[0], owners_for, relate=True)
        finally:
            store.close()

    monkeypatch.setattr(merging, "placed", placed)
    monkeypatch.setattr(merging, "cluster", lambda _: contextlib.nullcontext())


@pytest.fixture
def repository(hub: Hub) -> Model:
    """A new one, as `hf repo create` leaves it."""
    made = Model({EMPTY: {".gitattributes": b"*.safetensors filter=lfs"}}, {"main": EMPTY, "v/2": EMPTY}, token=TOKEN)
    hub.server.models["org/merged"] = made
    return made


@pytest.fixture
def one(family: families.MakeFamily) -> Family:
    made = family(2, scale=64)
    (made.folder / "base" / "tokenizer.json").write_text('{"model": {"vocab": {"a": 0}}}')
    return made


def wanted(one: Family, tmp_path: Path) -> dict[str, bytes]:
    return families.merge_locally(plan(one.recipe(), max_shard_bytes=SHARD), tmp_path / "wanted").files


def merge_to(out: str, one: Family, **options: Any) -> Receipt:
    options = {"state": str(one.folder / "state"), **options}
    return merge(Recipe.from_dict(one.recipe()), out, max_shard_bytes=SHARD, quiet=True, **options)


def is_sent(request: Request) -> bool:
    return request.method == "PUT" and "/" not in request.key


def head(repository: Model, branch: str = "main") -> dict[str, bytes]:
    return repository.commits[repository.revisions[branch]]


def test_a_merge_to_the_hub_is_one_commit_that_verify_finds_well(
    one: Family,
    repository: Model,
    hub: Hub,
    tmp_path: Path,
    memory: Path,
) -> None:
    seen: list[int] = []
    hub.cdn.fail(meanwhile(lambda _: seen.append(len(repository.commits))), None, method="PUT")
    receipt = merge_to(OUT, one)
    files = wanted(one, tmp_path)
    assert len(seen) == len(files) > 1
    assert set(seen) == {1}  # nobody has seen a part of it
    assert len(repository.commits) == 2
    found = head(repository)
    assert {name: found[name] for name in files} == files
    assert set(found) == {*files, *receipt.files_sha256, "pcb_receipt.json", ".gitattributes"}
    assert found["tokenizer.json"] == (one.folder / "base" / "tokenizer.json").read_bytes()
    assert "tags:\n- merge\n- pcb-merging" in found["README.md"].decode()
    assert json.loads(found["pcb_receipt.json"]) == json.loads(receipt.to_json())
    assert verify(OUT).ok
    assert not list(memory.glob("*/*"))
    assert not list((one.folder / "state").rglob("*"))
    assert not any(TOKEN.encode() in data for data in found.values())
    assert merge_to(OUT, one, resume=True) == receipt
    with pytest.raises(RequestError, match="exists: wanted a repository or branch without a model"):
        merge_to(OUT, one)
    assert len(repository.commits) == 2


def test_it_may_go_to_a_branch_or_end_with_a_pull_request(one: Family, repository: Model, tmp_path: Path) -> None:
    merge_to(f"{OUT}@v/2", one)
    assert wanted(one, tmp_path).items() <= head(repository, "v/2").items()
    assert head(repository) == repository.commits[EMPTY]
    assert verify(f"{OUT}@v/2").ok
    merge_to(OUT, one, pull_request=True)
    assert wanted(one, tmp_path / "again").items() <= head(repository, "refs/pr/1").items()
    assert head(repository) == repository.commits[EMPTY]


def test_a_run_that_was_cut_off_goes_on_and_sends_only_what_is_missing(
    one: Family,
    repository: Model,
    hub: Hub,
    tmp_path: Path,
) -> None:
    hub.cdn.fail(meanwhile(lambda _: None), 1, method="PUT")
    hub.cdn.fail(answer(403, "Forbidden"), None, method="PUT")
    with pytest.raises((RunError, OSError)):
        merge_to(OUT, one)
    hub.cdn.heal()
    assert len(hub.server.blobs) == 1
    assert len(repository.commits) == 1
    with pytest.raises(RequestError, match="found an unfinished run to .*--resume"):
        merge_to(OUT, one)
    hub.cdn.requests.clear()
    receipt = merge_to(OUT, one, resume=True)
    files = wanted(one, tmp_path)
    assert receipt.resumed
    assert len(hub.cdn.about(method="PUT")) == len(files) - 1
    assert files.items() <= head(repository).items()


def test_what_the_hub_has_dropped_is_sent_again(one: Family, repository: Model, hub: Hub, tmp_path: Path) -> None:
    hub.cdn.fail(meanwhile(lambda _: None), 1, method="PUT")
    hub.cdn.fail(answer(403, "Forbidden"), None, method="PUT")
    with pytest.raises((RunError, OSError)):
        merge_to(OUT, one)
    hub.cdn.heal()
    hub.server.blobs.clear()
    merge_to(OUT, one, resume=True)
    assert wanted(one, tmp_path).items() <= head(repository).items()
    assert verify(OUT).ok


def test_a_commit_of_another_during_the_run_is_not_built_upon(
    one: Family,
    repository: Model,
    hub: Hub,
    tmp_path: Path,
) -> None:
    def commit(_: Request) -> None:
        repository.commits[commit_of("other")] = {**head(repository), "LICENSE": b"other"}
        repository.revisions["main"] = commit_of("other")

    hub.cdn.fail(meanwhile(commit), 1, method="PUT")
    with pytest.raises(RunError, match="somebody has committed meanwhile.*--resume"):
        merge_to(OUT, one)
    assert head(repository)["LICENSE"] == b"other"
    hub.cdn.requests.clear()
    merge_to(OUT, one, resume=True)
    assert not hub.cdn.about(method="PUT")
    assert {"LICENSE": b"other", **wanted(one, tmp_path)}.items() <= head(repository).items()


def test_what_lies_there_is_never_replaced(one: Family, repository: Model) -> None:
    repository.commits[EMPTY]["config.json"] = b"{}"
    with pytest.raises(RequestError, match=r"without a model, found 'config\.json'"):
        merge_to(OUT, one)
    with pytest.raises(RequestError, match="found --overwrite"):
        merge_to(OUT, one, overwrite=True)
    assert head(repository)["config.json"] == b"{}"


def test_a_repository_or_branch_that_is_not_there_is_told_with_how_to_make_it(one: Family, repository: Model) -> None:
    for out in ("hf://org/nowhere", f"{OUT}@nowhere"):
        with pytest.raises(RequestError, match="found none. Fix: make it .*hf repo create org/"):
            merge_to(out, one)
    for out in ("hf://org", "hf://org/name/file", "hf://me:secret@org/name"):
        with pytest.raises(RequestError) as refused:
            merge_to(out, one)
        assert "secret" not in str(refused.value)


def test_inputs_that_change_end_the_run_and_nothing_is_committed(one: Family, repository: Model, hub: Hub) -> None:
    file = one.folder / "model1" / "model.safetensors"

    def meddle(_: Request) -> None:
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.write_bytes(data)

    hub.cdn.fail(meanwhile(meddle), 1, method="PUT")
    with pytest.raises(InputError, match="was changed during the run"):
        merge_to(OUT, one)
    assert len(repository.commits) == 1
    assert not list((one.folder / "state").rglob("*"))


def test_the_state_may_lie_in_a_store_and_a_store_that_fails_changes_no_byte(
    one: Family,
    repository: Model,
    hub: Hub,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with s3_server() as server, FaultProxy(server) as proxy:
        for name, value in server.through(proxy).items():
            monkeypatch.setenv(name, value)
        hub.front.fail(answer(503, "busy"), 2, method="POST")
        merge_to(OUT, one, state=f"{server.uri}/states")
        assert wanted(one, tmp_path).items() <= head(repository).items()
        assert proxy.about(method="PUT", key="^states/.hf-org-merged-main.pcb-ray/state.json")
        assert server.list() == {}


def test_scratch_is_used_where_memory_has_no_room_and_without_both_it_is_told(
    one: Family, repository: Model, tmp_path: Path
) -> None:
    with pytest.raises((RunError, OSError), match="no room for its"):
        merge_to(OUT, one, cache=0)
    merge_to(OUT, one, cache=0, scratch=str(tmp_path / "scratch"), resume=True)
    assert wanted(one, tmp_path).items() <= head(repository).items()
    assert not list((tmp_path / "scratch").glob("*/*"))
