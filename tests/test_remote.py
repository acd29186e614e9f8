"""Models in object stores, read from real servers on this machine through a proxy that makes them fail."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from families import MakeFamily, merge_locally
from object_servers import FaultProxy, ObjectServer, Request, answer, cut, gs_server, meanwhile, reset, s3_server, stall

from pcb_ray import Recipe, RequestError
from pcb_ray.analysis import analyse
from pcb_ray.errors import InputError
from pcb_ray.files import objects, remote, room
from pcb_ray.files.checkpoint import open_checkpoint
from pcb_ray.files.objects import Access, Objects
from pcb_ray.files.room import KeptHere, Room
from pcb_ray.files.store import Range, Traffic
from pcb_ray.files.stores import open_store
from pcb_ray.local import LocalOwners
from pcb_ray.output.place import place_of
from pcb_ray.planning import Plan, plan
from pcb_ray.questions import WriteParts
from pcb_ray.session import Session

SECRET = "secret-key-of-tests"


@pytest.fixture(scope="module")
def server() -> Iterator[ObjectServer]:
    with s3_server() as server:
        yield server


@pytest.fixture
def proxy(server: ObjectServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    """In front of the server, and where all clients are sent. Pauses and limits are short."""
    with FaultProxy(server) as proxy:
        for name, value in server.through(proxy).items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(objects, "FIRST_PAUSE_S", 0.01)
        monkeypatch.setattr(objects, "LONGEST_PAUSE_S", 0.05)
        monkeypatch.setattr(objects, "SILENCE_S", 1)
        yield proxy


@pytest.fixture
def memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What stands for /dev/shm."""
    monkeypatch.setattr(room, "MEMORY", tmp_path / "shm")
    (tmp_path / "shm").mkdir()
    return tmp_path / "shm"


def put_all(server: ObjectServer, folder: Path, under: str) -> str:
    """The files of a folder as objects; the URI of what they share."""
    for path in folder.rglob("*"):
        if path.is_file():
            server.put(f"{under}/{path.relative_to(folder).as_posix()}", path.read_bytes())
    return f"{server.uri}/{under}"


def remote_recipe(at: str, n: int, **changes: Any) -> dict[str, Any]:
    models = [{"model": f"{at}/model{k}"} for k in range(n)]
    return {"merge_method": "pcb", "base_model": f"{at}/base", "models": models, **changes}


def merged_from(made: Plan, out: Path, kept: Room | None = None, threads: int = 2) -> tuple[dict[str, bytes], Traffic]:
    """A merge of a plan without Ray, and what it took of the network."""
    out.mkdir()
    store = open_store(made.stamps, made.recipe.storage, kept)
    try:
        session = Session(made, lambda plan: LocalOwners(plan, store, threads=threads))
        known = analyse(session)
        for file in made.files:
            store.create(str(out / file.name), file.size)
        for _ in session.store("write", WriteParts(known, str(out)), range(len(made.parts))):
            pass
        return {file.name: (out / file.name).read_bytes() for file in made.files}, store.traffic
    finally:
        store.close()


# --- the same bytes, fetched once -------------------------------------------------------------------------------------------------


def test_a_merge_of_objects_is_that_of_the_files_and_each_byte_is_fetched_once(
    family: MakeFamily, server: ObjectServer, proxy: FaultProxy, memory: Path, tmp_path: Path
) -> None:
    one = family(2, scale=64, shards=2)
    made = plan(remote_recipe(put_all(server, one.folder, "once"), 2))
    assert made.is_remote
    before = sum(proxy.fetched().values())
    found, traffic = merged_from(made, tmp_path / "found", Room.for_a_run(None, "", None))
    wanted = merge_locally(plan(one.recipe()), tmp_path / "wanted").files
    assert found == wanted
    stored = sum(file.size for one in made.inputs for file in one.files)
    probes = 2  # each owner looks whether it can read there
    assert made.sweep_bytes <= traffic.fetched <= stored + probes
    assert sum(proxy.fetched().values()) - before == traffic.fetched
    assert not list(memory.glob("*/*"))  # nothing is left behind


def test_without_room_it_is_fetched_again_as_often_as_the_plan_says(
    family: MakeFamily, server: ObjectServer, proxy: FaultProxy, tmp_path: Path
) -> None:
    one = family(2, scale=64)
    made = plan(remote_recipe(put_all(server, one.folder, "again"), 2))
    found, traffic = merged_from(made, tmp_path / "found", threads=1)
    assert found == merge_locally(plan(one.recipe()), tmp_path / "wanted").files
    stored = sum(file.size for one in made.inputs for file in one.files)
    assert stored < traffic.fetched <= made.method.passes_over_inputs * stored + 1


def test_what_does_not_fit_in_memory_is_kept_in_scratch(
    family: MakeFamily, server: ObjectServer, proxy: FaultProxy, memory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "PIECE", 1 << 16)
    one = family(2, scale=64)
    made = plan(remote_recipe(put_all(server, one.folder, "scratch"), 2))
    kept = Room.for_a_run(1_000_000, str(tmp_path / "scratch"), None)
    found, traffic = merged_from(made, tmp_path / "found", kept, threads=1)
    assert found == merge_locally(plan(one.recipe()), tmp_path / "wanted").files
    assert traffic.fetched <= sum(file.size for one in made.inputs for file in one.files) + 1
    assert not list(memory.glob("*/*"))
    assert not list((tmp_path / "scratch").glob("*/*"))


def test_a_plan_fetches_headers_and_samples_only(family: MakeFamily, server: ObjectServer, proxy: FaultProxy) -> None:
    one = family(2, scale=512)
    at = put_all(server, one.folder, "headers")
    made = plan(remote_recipe(at, 2))
    assert made.D == plan(one.recipe()).D
    assert made.relation == plan(one.recipe()).relation
    stored = sum(file.size for one in made.inputs for file in one.files)
    assert sum(proxy.fetched().values()) < stored / 8


# --- kinds of models --------------------------------------------------------------------------------------------------------------


def test_files_of_torch_save_and_single_files_are_read_in_place(
    family: MakeFamily, server: ObjectServer, proxy: FaultProxy, tmp_path: Path
) -> None:
    one = family(1, scale=4)
    for name, state in (("base", one.base), ("model0", one.models[0])):
        torch.save(state, one.folder / name / "pytorch_model.bin")
        (one.folder / name / "model.safetensors").unlink()
    at = put_all(server, one.folder, "torch")
    wanted = merge_locally(plan(one.recipe()), tmp_path / "wanted").files
    assert merged_from(plan(remote_recipe(at, 1)), tmp_path / "found")[0] == wanted
    single = open_checkpoint(f"{at}/base/pytorch_model.bin")
    assert single.folder is None
    assert set(single.tensors) == set(one.base)


def test_a_model_in_googles_store_is_read_by_the_variables_of_its_tools(
    family: MakeFamily, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = family(1, scale=4)
    with gs_server() as google:
        for name, value in google.environment.items():
            monkeypatch.setenv(name, value)
        at = put_all(google, one.folder, "g")
        assert at.startswith("gs://")
        wanted = merge_locally(plan(one.recipe()), tmp_path / "wanted").files
        assert merged_from(plan(remote_recipe(at, 1)), tmp_path / "found")[0] == wanted


# --- faults -----------------------------------------------------------------------------------------------------------------------


def is_large(request: Request) -> bool:
    return request.range is not None and request.range[1] - request.range[0] > 1000


FAULTS: dict[str, Callable[[FaultProxy], Any]] = {
    "slow down": lambda proxy: proxy.fail(answer(503, "SlowDown"), 20, step="get"),
    "reset": lambda proxy: proxy.fail(reset(), 5, step="get"),
    "reset in a body": lambda proxy: proxy.fail(reset(1000), 5, step="get", where=is_large),
    "cut short": lambda proxy: proxy.fail(cut(1000), 9, step="get", where=is_large),
    "silence": lambda proxy: proxy.fail(stall(), 2, step="get"),
    "silence in a body": lambda proxy: proxy.fail(stall(1000), 2, step="get", where=is_large),
    "expired": lambda proxy: proxy.fail(answer(403, "ExpiredToken"), 2, step="get"),
    "too many": lambda proxy: proxy.fail(answer(429, "TooManyRequests"), 3, step="get"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_store_that_fails_for_a_while_changes_no_byte_and_the_retries_are_counted(
    family: MakeFamily, server: ObjectServer, proxy: FaultProxy, memory: Path, tmp_path: Path, fault: str
) -> None:
    one = family(1, scale=16)
    made = plan(remote_recipe(put_all(server, one.folder, "faults"), 1))
    rule = FAULTS[fault](proxy)
    found, traffic = merged_from(made, tmp_path / "found", Room.for_a_run(None, "", None))
    assert found == merge_locally(plan(one.recipe()), tmp_path / "wanted").files
    assert rule.left == 0
    assert traffic.retries == len(rule.struck)


def test_a_store_that_stays_away_is_given_up_in_one_line(
    family: MakeFamily, server: ObjectServer, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    at = put_all(server, family(1).folder, "away")
    monkeypatch.setattr(objects, "LOOKING_PATIENCE_S", 0.3)
    proxy.fail(answer(503, "SlowDown"), None, step="get")
    with pytest.raises(RequestError) as caught:
        plan(remote_recipe(at, 1))
    assert all("wanted to read it, found no answer in 0 s (SlowDown). Fix: " in line for line in caught.value.problems)


@pytest.mark.parametrize("when", ["before", "during"])
def test_an_object_that_is_replaced_ends_the_run(
    family: MakeFamily, server: ObjectServer, proxy: FaultProxy, tmp_path: Path, when: str
) -> None:
    one = family(1, scale=16)
    at = put_all(server, one.folder, f"replaced-{when}")
    made = plan(remote_recipe(at, 1))
    key, other = f"replaced-{when}/model0/model.safetensors", (one.folder / "base" / "model.safetensors").read_bytes()
    if when == "before":
        server.put(key, other)
    else:
        ranged = len(proxy.about(step="get", key=key))
        proxy.fail(
            meanwhile(lambda _: server.put(key, other)),
            1,
            step="get",
            where=lambda _: len(proxy.about(step="get", key=key)) > ranged + 1,
        )
    with pytest.raises(InputError, match=rf"{at}/model0/model.safetensors: wanted the file as it was .* found .*: it was changed"):
        merged_from(made, tmp_path / "out", threads=1)


# --- what is refused --------------------------------------------------------------------------------------------------------------


def test_what_is_not_there_or_may_not_be_read_is_told_in_one_line_without_a_secret(
    server: ObjectServer, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    def told(source: str) -> str:
        with pytest.raises(RequestError) as caught:
            open_checkpoint(source)
        (line,) = caught.value.problems
        assert SECRET not in line
        assert "\n" not in line
        return line

    assert "found no object whose name begins so" in told(f"{server.uri}/nowhere/at/all")
    assert "found no object whose name begins so" in told("s3://no-such-bucket/model")
    server.put("empty/readme.txt", b"nothing")
    assert "wanted model.safetensors or pytorch_model.bin" in told(f"{server.uri}/empty")
    proxy.fail(answer(403, "AccessDenied"), 1, step="list")
    assert "access refused (AccessDenied). Fix: give this machine a role" in told(f"{server.uri}/denied")
    monkeypatch.setattr(objects, "LOOKING_PATIENCE_S", 0.2)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    assert "(connection refused). Fix: check the endpoint" in told(f"{server.uri}/denied")


def test_a_credential_in_a_recipe_is_refused_and_not_shown() -> None:
    at = "s3://bucket/models"
    wrong = [
        remote_recipe(at, 1, storage={"s3": {"secret_access_key": SECRET}}),
        remote_recipe(at, 1, storage={"s3": {"endpoint": f"http://me:{SECRET}@minio:9000"}}),
        remote_recipe(at, 1, storage={"az": {"sas_token": SECRET}}),
        remote_recipe(f"s3://key:{SECRET}@bucket/models", 1),
        remote_recipe(f"az://container/models?sig={SECRET}", 1),
    ]
    for recipe in wrong:
        with pytest.raises(RequestError) as caught:
            Recipe.from_dict(recipe)
        assert SECRET not in str(caught.value)
        assert "credential" in str(caught.value) or "without user" in str(caught.value)


def test_how_stores_are_reached_is_part_of_the_recipe_and_of_no_resume(
    server: ObjectServer, family: MakeFamily, monkeypatch: pytest.MonkeyPatch
) -> None:
    at = put_all(server, family(1).folder, "storage")
    recipe = Recipe.from_dict(remote_recipe(at, 1, storage={"s3": {"endpoint": server.endpoint, "region": "us-east-1"}}))
    assert recipe.storage == {"s3": Access(server.endpoint, "us-east-1")}
    assert Recipe.from_yaml(recipe.to_yaml()) == recipe
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, server.environment[name])
    made = plan(recipe)
    assert server.endpoint not in str(made.fingerprint())
    with pytest.raises(RequestError, match="unknown key 'endpoints'"):
        Recipe.from_dict(remote_recipe(at, 1, storage={"s3": {"endpoints": server.endpoint}}))


def test_anonymous_requests_carry_no_signature_and_others_do(server: ObjectServer, proxy: FaultProxy) -> None:
    server.put("public/config.json", b"{}")
    for anonymous in (True, False):
        with contextlib.suppress(PermissionError):  # moto has no public buckets
            Objects({"s3": Access(anonymous=anonymous)}).get(f"{server.uri}/public/config.json", 0, 2)
        assert ("authorization" in proxy.about(step="get")[-1].headers) == (not anonymous)


def test_objects_are_made_once_and_changed_only_as_they_were_seen(server: ObjectServer, proxy: FaultProxy) -> None:
    store, uri = Objects(), f"{server.uri}/lease"
    first = store.put(uri, b"one", only="new")
    with pytest.raises(objects.Exists):
        store.put(uri, b"two", only="new")
    second = store.put(uri, b"two", only=first)
    with pytest.raises(objects.Exists):
        store.put(uri, b"three", only=first)
    assert server.get("lease") == b"two"
    assert store.look(uri) == (b"two", second)
    assert store.sizes(f"{server.uri}/") | {"lease": 3} == store.sizes(f"{server.uri}/")
    store.delete(uri)
    store.delete(uri)  # there is nothing to do
    with pytest.raises(FileNotFoundError):
        store.head(uri)


# --- the room on a machine --------------------------------------------------------------------------------------------------------


def test_a_room_keeps_what_fits_and_the_last_to_leave_removes_it(memory: Path) -> None:
    asked = Room("run", 100, "", None)
    one, other = KeptHere(asked), KeptHere(Room("run", 10**6, "", None))
    assert other.bytes == 100  # the first that came has decided
    assert one.put("a", memoryview(bytes(range(60))))
    assert not other.put("b", memoryview(bytes(60)))
    assert other.has("a")
    assert not one.has("b")
    out = memoryview(bytearray(5))
    assert other.read("a", 10, out)
    assert bytes(out) == bytes(range(10, 15))
    assert not other.read("a", 58, out)
    assert not other.read("b", 0, out)
    one.close()
    assert other.has("a")
    other.close()
    assert not list(memory.glob("*/*"))


def test_a_room_that_a_killed_process_left_is_removed_by_the_next_and_one_in_use_is_not(memory: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from pcb_ray.files import room; room.MEMORY = Path(sys.argv[1])\n"
        "kept = room.KeptHere(room.Room('dead', 100, '', None)); kept.put('a', memoryview(bytes(9))); print('here', flush=True)\n"
        "sys.stdin.read()"
    )
    process = subprocess.Popen([sys.executable, "-c", script, str(memory)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"here\n"
    first = KeptHere(Room("first", 100, "", None))
    assert [path.name for path in memory.glob("*/dead")] == ["dead"]
    process.kill()
    process.wait()
    process.stdout.close()
    assert process.stdin is not None
    process.stdin.close()
    second = KeptHere(Room("second", 100, "", None))
    assert sorted(path.name for path in memory.glob("*/*")) == ["first", "second"]
    first.close()
    second.close()


def test_a_folder_for_scratch_that_can_not_be_written_is_told(tmp_path: Path, memory: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(RequestError, match=r"--scratch .*/file/below: wanted a folder on each machine that can be written, found"):
        KeptHere(Room("run", None, str(tmp_path / "file" / "below"), None))


def test_threads_and_workers_together_keep_no_more_than_the_limit(memory: Path) -> None:
    workers = [KeptHere(Room("run", 200, "", None)) for _ in range(2)]

    def put(number: int) -> bool:
        return workers[number % 2].put(str(number), memoryview(b"1"))

    with ThreadPoolExecutor(16) as pool:
        kept = sum(pool.map(put, range(800)))
    assert kept == 200
    for one in workers:
        one.close()


def fill(disk: Path) -> None:
    """Until nothing more goes on it, as others do."""
    with contextlib.suppress(OSError), (disk / "filler").open("ab", buffering=0) as file:
        while True:
            file.write(bytes(1 << 12))


def test_a_disk_that_others_have_filled_keeps_nothing_and_is_left_as_it_was(small_disk: Path, memory: Path) -> None:
    asked = Room("run", 0, str(small_disk / "scratch"), None)
    early = KeptHere(asked)
    assert early.put("a", memoryview(bytes(5000)))
    assert early.bytes > 10**7
    fill(small_disk)
    late = KeptHere(asked)  # it replaces one that was killed
    for one in (early, late):
        with one.claim("b"):
            assert not one.put("b", memoryview(bytes(5000)))
        assert one.bytes == 5000
        assert one.has("a")
        assert not one.has("b")
        assert not one.put("c", memoryview(bytes(1)))
    early.close()
    late.close()
    assert not list(small_disk.glob("scratch/*/*"))
    fill(small_disk)
    never = KeptHere(asked)
    assert never.bytes == 0
    with never.claim("a"):
        assert not never.put("a", memoryview(bytes(1)))
    never.close()
    assert not list(small_disk.glob("scratch/*/*"))


def test_a_piece_is_fetched_once_by_two_that_want_it_at_once(server: ObjectServer, proxy: FaultProxy, memory: Path) -> None:
    server.put("shared", os.urandom(1 << 20))
    uri, kept = f"{server.uri}/shared", Room.for_a_run(10**8, "", None)
    pins = {uri: Objects().head(uri)}
    stores = [open_store(pins, None, kept) for _ in range(3)]
    proxy.latency_s = 0.2
    for store in stores:
        store.expect([Range(uri, 0, 10)])
    for store in stores:
        out = memoryview(bytearray(1 << 20))
        store.read(uri, 0, out)
        assert bytes(out) == server.get("shared")
    assert sum(store.traffic.fetched for store in stores) == 1 << 20
    for store in stores:
        store.close()


@pytest.mark.parametrize("out", ["hf://org", "http://127.0.0.1/out", "s3://bucket", "s3://bucket/", "s3://key:secret@bucket/a"])
def test_an_output_where_none_can_be_written_is_refused_and_no_folder_of_that_name_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, out: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RequestError, match="Fix: ") as refused:
        place_of(out)
    assert "secret" not in str(refused.value)
    assert not list(tmp_path.iterdir())
