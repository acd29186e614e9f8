"""Outputs in object stores, written to real servers on this machine through a proxy that makes them fail. All is as on Ray, but for
the owners, which are threads."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import families
import pytest
from families import Family
from object_servers import (
    FaultProxy,
    ObjectServer,
    Request,
    Rule,
    answer,
    az_server,
    azurite,
    flip,
    gs_server,
    meanwhile,
    reset,
    s3_server,
)
from safetensors.torch import load
from test_remote import put_all, remote_recipe

from pcb_ray import Receipt, Recipe, RequestError, RunError, merge, merge_many, merging, verify
from pcb_ray.errors import InputError
from pcb_ray.files import objects, remote
from pcb_ray.files.objects import Objects
from pcb_ray.files.stores import open_store
from pcb_ray.local import LocalOwners
from pcb_ray.output import lease
from pcb_ray.output.lease import Lease
from pcb_ray.output.state import Place
from pcb_ray.planning import Plan, plan
from pcb_ray.session import Session

SHARD = 16_000_000
FILES = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]

MORE = pytest.mark.very_slow
"""One case of each kind of fault is enough for the first tier."""


@pytest.fixture(scope="module")
def server() -> Iterator[ObjectServer]:
    with s3_server() as server:
        yield server


@contextlib.contextmanager
def reached(server: ObjectServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    """In front of the server, and where all clients are sent. Pauses and limits are short."""
    with FaultProxy(server) as proxy:
        for name, value in server.through(proxy).items():
            monkeypatch.setenv(name, value)
        for name, value in {"FIRST_PAUSE_S": 0.01, "LONGEST_PAUSE_S": 0.05, "SILENCE_S": 5, "UPLOAD_PIECE": 5 << 20}.items():
            monkeypatch.setattr(objects, name, value)
        for name, value in {"RENEWED_S": 0.2, "DEAD_S": 2.0, "LOOK_S": 0.1}.items():
            monkeypatch.setattr(lease, name, value)
        yield proxy


@pytest.fixture
def proxy(server: ObjectServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    with reached(server, monkeypatch) as proxy:
        yield proxy


@pytest.fixture(autouse=True)
def owners(monkeypatch: pytest.MonkeyPatch) -> None:
    @contextlib.contextmanager
    def placed(plans: Sequence[Plan], *, writes_to: Callable[[], Place], **_: Any) -> Iterator[Session]:
        def owners_for(plan: Plan) -> LocalOwners:
            store = open_store(plan.stamps, plan.recipe.storage, fence=writes_to().fence)
            return LocalOwners(plan, store, threads=1)

        yield Session(plans[0], owners_for, relate=True)

    monkeypatch.setattr(merging, "placed", placed)
    monkeypatch.setattr(merging, "cluster", lambda _: contextlib.nullcontext())


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Family:
    made = Family(tmp_path_factory.mktemp("family"), *families.fine_tuned(2, scale=600))
    (made.folder / "base" / "tokenizer.json").write_text('{"model": {"vocab": {"a": 0}}}')
    return made


@pytest.fixture(scope="module")
def wanted(one: Family, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The bytes of the merge on a disk."""
    return families.merge_locally(plan(one.recipe(), max_shard_bytes=SHARD), tmp_path_factory.mktemp("wanted")).files


def merge_to(out: str, one: Family, *, shard: int = SHARD, recipe: dict[str, Any] | None = None, **options: Any) -> Receipt:
    return merge(Recipe.from_dict(recipe or one.recipe()), out, max_shard_bytes=shard, quiet=True, **options)


def held(server: ObjectServer, key: str) -> dict[str, bytes]:
    """All objects below a key, and beside it."""
    folder, _, name = key.rpartition("/")
    keys = server.list(f"{key}/") | server.list(f"{folder}/.{name}.pcb-ray/" if folder else f".{name}.pcb-ray/")
    return {found.removeprefix(f"{key}/"): server.get(found) for found in keys}


def assert_whole(server: ObjectServer, key: str, wanted: dict[str, bytes]) -> Receipt:
    """What `merge` leaves: the output, which `verify` finds well, and nothing else."""
    found = held(server, key)
    receipt = Receipt.of(f"{server.uri}/{key}")
    assert {name: found[name] for name in wanted} == wanted
    assert set(found) == {*wanted, *receipt.files_sha256, "pcb_receipt.json"}
    assert server.uploads() == {}
    assert verify(f"{server.uri}/{key}").problems == ()
    return receipt


def writes(proxy: FaultProxy, key: str) -> list[str]:
    """The names of the objects below a key in the order in which they came to be."""
    made = [request for request in proxy.about(key=f"^{key}/") if request.step in ("put", "complete") and request.status == 200]
    return [request.key.removeprefix(f"{key}/") for request in made]


def is_data(request: Request) -> bool:
    return request.key.endswith(".safetensors")


# --- the same bytes ------------------------------------------------------------------------------------------------------------


def test_a_merge_to_a_store_is_that_to_a_folder_and_its_receipt_comes_last(
    one: Family, wanted: dict[str, bytes], server: ObjectServer, proxy: FaultProxy, tmp_path: Path
) -> None:
    receipt = merge_to(f"{server.uri}/a/same", one)
    order = writes(proxy, "a/same")
    assert sorted(order[:2]) == FILES
    assert order[-3:] == ["config.json", "model.safetensors.index.json", "pcb_receipt.json"]
    assert receipt == assert_whole(server, "a/same", wanted)
    on_disk = merge_to(str(tmp_path / "out"), one)
    assert receipt.output_digest == on_disk.output_digest
    assert receipt.files_sha256 == on_disk.files_sha256
    assert receipt.outputs == on_disk.outputs


@pytest.mark.parametrize(
    "kind", ["gs", pytest.param("az", marks=pytest.mark.skipif(azurite() is None, reason="azurite is not installed"))]
)
def test_other_stores_hold_the_same(
    one: Family, wanted: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    with (gs_server if kind == "gs" else az_server)() as server, reached(server, monkeypatch):
        merge_to(f"{server.uri}/a/same", one)
        assert_whole(server, "a/same", wanted)
        with pytest.raises(RequestError, match="exists: wanted a prefix without objects"):
            merge_to(f"{server.uri}/a/same", one)
        first = Lease(f"{server.uri}/lease", "out")
        with pytest.raises(RequestError, match="another merge is writing it now"):
            Lease(f"{server.uri}/lease", "out")
        first.release()
        assert "lease" not in server.list()
    assert "conditional" not in caplog.text


@pytest.mark.very_slow
def test_models_and_output_may_lie_in_one_bucket(
    one: Family, wanted: dict[str, bytes], server: ObjectServer, proxy: FaultProxy
) -> None:
    for path in one.folder.rglob("*"):
        if path.is_file():
            server.put(f"family/{path.relative_to(one.folder).as_posix()}", path.read_bytes())
    at = f"{server.uri}/family"
    recipe = {"merge_method": "pcb", "base_model": f"{at}/base", "models": [{"model": f"{at}/model{k}"} for k in range(2)]}
    for within in (at, f"{at}/base", f"{at}/model1/merged"):
        with pytest.raises(RequestError, match="wanted a prefix apart from the inputs"):
            merge_to(within, one, recipe=recipe)
    merge_to(f"{at}-merged", one, recipe=recipe)
    assert_whole(server, "family-merged", wanted)
    assert load(server.get(f"family-merged/{FILES[0]}"))


@pytest.mark.very_slow
def test_many_merges_go_below_one_prefix(
    one: Family, server: ObjectServer, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pcb_ray import many

    monkeypatch.setattr(many, "placed", merging.placed)
    monkeypatch.setattr(many, "cluster", merging.cluster)
    monkeypatch.setattr(many, "choose_device", lambda device, _: device)
    monkeypatch.setattr(many, "autoscales", lambda: False)
    monkeypatch.setattr(many, "choose_workers", lambda *_: 1)
    recipe = one.recipe(grid={"lambda": [0.5, 1.0]})
    for before in (False, True):
        found = merge_many({"run": recipe}, f"{server.uri}/many", quiet=True, resume=before)
        assert {name: done.before for name, done in found.items()} == {"run/lambda=0.5": before, "run/lambda=1": before}
    assert verify(f"{server.uri}/many/run/lambda=0.5").ok
    assert not [key for key in server.list("many/") if ".pcb-ray/" in key]


# --- what is in the way ----------------------------------------------------------------------------------------------------------


def test_what_lies_there_is_never_replaced(one: Family, server: ObjectServer, proxy: FaultProxy) -> None:
    server.put("theirs/notes.txt", b"precious")
    for options in ({}, {"resume": True}):
        with pytest.raises(RequestError, match="theirs: exists: wanted a prefix without objects, found some"):
            merge_to(f"{server.uri}/theirs", one, **options)
    with pytest.raises(RequestError, match="found --overwrite. Fix: write to another prefix"):
        merge_to(f"{server.uri}/free", one, overwrite=True)
    assert held(server, "theirs") == {"notes.txt": b"precious"}
    assert held(server, "free") == {}


def test_a_place_where_nothing_may_be_written_is_told_before_the_work(one: Family, server: ObjectServer, proxy: FaultProxy) -> None:
    refused = proxy.fail(answer(403, "AccessDenied"), None, method="PUT")
    with pytest.raises(RequestError, match=r"\.out\.pcb-ray: wanted to write it, found access refused \(AccessDenied\)"):
        merge_to(f"{server.uri}/readonly/out", one)
    assert refused.struck
    with pytest.raises(RequestError, match="no such bucket|found none"):
        merge_to("s3://nobodys-bucket/out", one)


# --- faults --------------------------------------------------------------------------------------------------------------------


def lose(server: ObjectServer) -> Callable[[Request], None]:
    return lambda _: server.lose_uploads()


@pytest.mark.parametrize(
    ("fault", "times", "step"),
    [
        pytest.param(answer(503, "SlowDown"), 20, "part", id="busy"),
        pytest.param(answer(503, "SlowDown"), 5, "start", id="busy-start", marks=MORE),
        pytest.param(answer(503, "SlowDown"), 3, "complete", id="busy-end", marks=MORE),
        pytest.param(reset(1 << 20), 3, "part", id="reset", marks=MORE),
        pytest.param(reset(done=True), 1, "complete", id="lost-answer", marks=MORE),
        pytest.param(answer(404, "NoSuchUpload"), 1, "part", id="lost-upload"),
        pytest.param(answer(403, "ExpiredToken"), 1, "part", id="expired", marks=MORE),
    ],
)
def test_a_store_that_fails_for_a_while_changes_no_byte(
    one: Family, wanted: dict[str, bytes], server: ObjectServer, proxy: FaultProxy, fault: Any, times: int, step: str, request: Any
) -> None:
    key = f"faults/{request.node.callspec.id}"
    rule = proxy.fail(fault, times, step=step, where=is_data)
    merge_to(f"{server.uri}/{key}", one)
    assert rule.left == 0
    assert_whole(server, key, wanted)


@pytest.mark.parametrize("kind", ["s3", pytest.param("gs", marks=MORE)])
@pytest.mark.parametrize("name", [FILES[1], pytest.param("model.safetensors.index.json", marks=MORE)])
def test_what_does_not_arrive_as_it_was_sent_is_sent_again(
    one: Family, wanted: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, server: ObjectServer, kind: str, name: str
) -> None:
    with gs_server() if kind == "gs" else contextlib.nullcontext(server) as other, reached(other, monkeypatch) as proxy:
        key = f"spoilt/{name}"
        rule = proxy.fail(flip(), 1, method="PUT", key=f"{key}/{name}$")
        receipt = merge_to(f"{other.uri}/{key}", one)
        assert rule.left == 0
        assert receipt.retries >= (name == FILES[1])  # the driver writes the other, when all is counted
        assert writes(proxy, key).count(name) == 2
        assert_whole(other, key, wanted)


def test_a_store_that_finds_so_itself_is_asked_again(
    one: Family, wanted: dict[str, bytes], server: ObjectServer, proxy: FaultProxy
) -> None:
    spoilt = answer(400, "XAmzContentSHA256Mismatch")  # S3 compares what comes with the digest that the request is signed with
    rules = [proxy.fail(spoilt, 1, step="part", key=FILES[1]), proxy.fail(spoilt, 1, step="put", key="config.json")]
    merge_to(f"{server.uri}/refused", one)
    assert [rule.left for rule in rules] == [0, 0]
    sent = [request.headers for step in ("part", "put") for request in proxy.about(step=step)]
    assert all(re.fullmatch("[0-9a-f]{64}", headers["x-amz-content-sha256"]) for headers in sent)
    assert_whole(server, "refused", wanted)


@pytest.mark.parametrize("name", ["config.json", pytest.param(FILES[1], marks=MORE)])
def test_what_never_arrives_as_it_was_sent_ends_the_run_and_does_not_stay(
    one: Family, wanted: dict[str, bytes], server: ObjectServer, proxy: FaultProxy, name: str
) -> None:
    key = f"never/{name}"
    rule = proxy.fail(flip(), None, method="PUT", key=f"{key}/{name}$")
    with pytest.raises((RunError, OSError), match="what arrived is not what was sent"):
        merge_to(f"{server.uri}/{key}", one)
    assert len(rule.struck) >= objects.UPLOAD_TRIES
    assert not {name, "pcb_receipt.json"} & set(held(server, key))
    proxy.heal()
    merge_to(f"{server.uri}/{key}", one, resume=True)
    assert_whole(server, key, wanted)


@pytest.mark.parametrize("size", [1 << 20, 12 << 20])
def test_a_store_whose_tags_are_no_digests_is_read_once(
    server: ObjectServer, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    monkeypatch.setattr(objects, "_md5", lambda data: hashlib.blake2b(data, digest_size=16).digest())  # so that no tag is one
    store = open_store()
    for k in range(2):
        with store.whole(f"{server.uri}/kms/{size}-{k}", 3 * size) as part:
            part.write(bytes([k]) * size)
        assert server.get(f"kms/{size}-{k}") == bytes([k]) * size
    assert proxy.fetched() == {f"kms/{size}-0": size}


@pytest.mark.parametrize("size", [0, 1 << 20, 12 << 20])
def test_what_turns_out_smaller_than_it_might_be_is_compared_too(server: ObjectServer, proxy: FaultProxy, size: int) -> None:
    for k, at_most in enumerate((size, 4 << 20, 40 << 20)):
        uri = f"{server.uri}/smaller/{size}-{k}"
        rule = proxy.fail(flip(), 1, method="PUT", key=f"smaller/{size}-{k}")
        with contextlib.suppress(objects.CutOff), open_store().whole(uri, max(size, at_most)) as part:
            part.write(bytes(size))
        assert not size or rule.left == 0
        with open_store().whole(uri, max(size, at_most)) as part:
            part.write(bytes(size))
        assert server.get(f"smaller/{size}-{k}") == bytes(size)
        proxy.heal()


OLD, NEW = "AKIAOLD", "AKIANEW"


@pytest.fixture
def profile(proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The file that gives this machine its credentials: those of the key OLD."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    file = tmp_path / "credentials"
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(file))
    hold(file, OLD)
    return file


def hold(profile: Path, key: str) -> None:
    (written := profile.with_name("written")).write_text(f"[default]\naws_access_key_id = {key}\naws_secret_access_key = s\n")
    written.replace(profile)


@pytest.mark.parametrize("step", ["part", *(pytest.param(step, marks=MORE) for step in ("get", "start", "complete", "put"))])
def test_credentials_that_expire_are_waited_for_and_the_run_goes_on_with_the_new_ones(
    one: Family, wanted: dict[str, bytes], server: ObjectServer, proxy: FaultProxy, profile: Path, step: str
) -> None:
    recipe = remote_recipe(put_all(server, one.folder, "expiring"), 2)
    expired, key = threading.Event(), f"expired/{step}"
    # With the answer to a piece, or to a part, or to the first note of what is written, they are no longer valid.
    wheres = {"get": is_piece, "put": lambda request: request.key.endswith("journal.jsonl")}
    proxy.fail(meanwhile(lambda _: expired.set()), 1, step=step, where=wheres.get(step, is_data))
    refused = proxy.fail(
        answer(403, "ExpiredToken"), None, where=lambda of: expired.is_set() and OLD in of.headers.get("authorization", "")
    )

    def renew() -> None:
        refused.wait(times=25, timeout=60)  # long after they have expired
        hold(profile, NEW)

    renewing = threading.Thread(target=renew)
    renewing.start()
    merge_to(f"{server.uri}/{key}", one, recipe=recipe)
    renewing.join()
    struck = len(refused.struck)
    assert_whole(server, key, wanted)
    assert len(refused.struck) == struck  # nobody asks with the old ones any more


def is_piece(request: Request) -> bool:
    return request.range is not None and request.range[1] - request.range[0] > 1 << 20


def test_credentials_that_stay_expired_are_told(one: Family, server: ObjectServer, proxy: FaultProxy, profile: Path) -> None:
    recipe = remote_recipe(put_all(server, one.folder, "expiring"), 2)
    proxy.fail(answer(403, "ExpiredToken"), None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(objects, "LOOKING_PATIENCE_S", 0.5)
        with pytest.raises(RequestError, match=r"expiring/base: wanted to read it, found its credentials have expired. Fix: give"):
            merge_to(f"{server.uri}/expired/never", one, recipe=recipe)


def test_who_may_not_list_uploads_may_merge(
    one: Family, wanted: dict[str, bytes], server: ObjectServer, proxy: FaultProxy, caplog: pytest.LogCaptureFixture
) -> None:
    rule = proxy.fail(answer(403, "AccessDenied"), None, step="uploads")
    merge_to(f"{server.uri}/unlisted", one)
    assert rule.struck
    assert_whole(server, "unlisted", wanted)
    stopped_in_the_second_file(one, proxy, f"{server.uri}/unlisted-2")
    proxy.fail(answer(403, "AccessDenied"), None, step="uploads")
    merge_to(f"{server.uri}/unlisted-2", one, resume=True)
    assert "may have left unfinished uploads" in caplog.text


def test_an_upload_that_the_store_has_lost_is_made_again(
    one: Family, wanted: dict[str, bytes], server: ObjectServer, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "PATIENCE_S", 5.0)  # moto says 500 of an upload that it has lost
    rule = proxy.fail(meanwhile(lose(server)), 1, step="part", where=is_data)
    receipt = merge_to(f"{server.uri}/lost", one)
    assert rule.left == 0
    assert receipt.retries >= 1
    assert_whole(server, "lost", wanted)


def stopped_in_the_second_file(one: Family, proxy: FaultProxy, out: str, **options: Any) -> Rule:
    """A run that ends with one file written."""
    rule = proxy.fail(answer(404, "NoSuchUpload"), None, step="part", key=FILES[1])
    with pytest.raises((RunError, OSError), match="cut off"):
        merge_to(out, one, **options)
    proxy.heal()
    return rule


def test_a_run_that_was_cut_off_goes_on_from_anywhere_and_writes_only_what_is_missing(
    one: Family, wanted: dict[str, bytes], server: ObjectServer, proxy: FaultProxy
) -> None:
    out = f"{server.uri}/b/resumed"
    stopped_in_the_second_file(one, proxy, out)
    assert FILES[0] in held(server, "b/resumed")
    assert "pcb_receipt.json" not in held(server, "b/resumed")
    assert "config.json" not in held(server, "b/resumed")
    with pytest.raises(RequestError, match="found an unfinished run to .*go on with --resume"):
        merge_to(out, one)
    with pytest.raises(RequestError, match="this is not the merge that was begun"):
        merge_to(out, one, recipe=one.recipe(parameters={"density": 0.5}), resume=True)
    proxy.requests.clear()
    receipt = merge_to(out, one, resume=True)
    assert receipt.resumed
    assert FILES[0] not in writes(proxy, "b/resumed")
    assert_whole(server, "b/resumed", wanted)
    assert merge_to(out, one, resume=True) == receipt  # and once more there is nothing to do


def test_a_file_that_was_changed_meanwhile_is_written_again(
    one: Family, wanted: dict[str, bytes], server: ObjectServer, proxy: FaultProxy
) -> None:
    out = f"{server.uri}/meddled"
    stopped_in_the_second_file(one, proxy, out)
    server.put(f"meddled/{FILES[0]}", bytes(len(wanted[FILES[0]])))
    merge_to(out, one, resume=True)
    assert_whole(server, "meddled", wanted)


def test_a_file_that_is_lost_before_the_end_is_told_and_no_receipt_is_written(
    one: Family, wanted: dict[str, bytes], server: ObjectServer, proxy: FaultProxy
) -> None:
    def drop(request: Request) -> None:
        server.delete(f"dropped/{FILES[0]}")

    proxy.fail(meanwhile(drop), 1, step="start", key=FILES[1])
    with pytest.raises(RunError, match=f"found others or none in the place of {FILES[0]}.*--resume"):
        merge_to(f"{server.uri}/dropped", one)
    assert "pcb_receipt.json" not in held(server, "dropped")
    merge_to(f"{server.uri}/dropped", one, resume=True)
    assert_whole(server, "dropped", wanted)


def test_inputs_that_change_end_the_run_and_what_it_wrote_goes(
    family: families.MakeFamily, server: ObjectServer, proxy: FaultProxy
) -> None:
    small = family(2, scale=600)
    file = small.folder / "model1" / "model.safetensors"

    def meddle(request: Request) -> None:
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.write_bytes(data)

    proxy.fail(meanwhile(meddle), 1, step="start", key=FILES[1])
    with pytest.raises(InputError, match="was changed during the run"):
        merge_to(f"{server.uri}/inputs", small)
    assert held(server, "inputs") == {}


def test_a_receipt_that_was_written_last_thing_before_a_kill_counts(
    one: Family, wanted: dict[str, bytes], server: ObjectServer, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pcb_ray.output.prefix import Prefix

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Prefix, "publish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        merge_to(f"{server.uri}/c/killed", one)
    assert ".killed.pcb-ray/state.json" in {key.removeprefix("c/") for key in server.list("c/.killed")}
    merge_to(f"{server.uri}/c/killed", one, resume=True)
    assert_whole(server, "c/killed", wanted)


# --- what verify sees ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "change", "told"),
    [
        (FILES[0], lambda data: data[:-1], "wanted 13.* bytes"),
        (FILES[1], lambda data: data[:-4] + b"\1\2\3\4", "they were changed after the merge"),
        (FILES[1], None, "found no file"),
        ("config.json", lambda data: data + b" ", "wanted sha256"),
        ("tokenizer.json", None, "found no file"),
    ],
)
def test_what_was_changed_in_a_store_is_found(
    one: Family, server: ObjectServer, proxy: FaultProxy, name: str, change: Any, told: str
) -> None:
    if not server.list("verified/"):
        merge_to(f"{server.uri}/verified", one)
    before = server.get(f"verified/{name}")
    try:
        server.delete(f"verified/{name}") if change is None else server.put(f"verified/{name}", change(before))
        problems = "\n".join(verify(f"{server.uri}/verified").problems)
        assert name in problems or name == FILES[1]
        assert re.search(told, problems)
        with pytest.raises(RequestError, match="is not this very merge"):
            merge_to(f"{server.uri}/verified", one, resume=True)
    finally:
        server.put(f"verified/{name}", before)
    assert verify(f"{server.uri}/verified").ok


# --- one run at a time -----------------------------------------------------------------------------------------------------------


HOLD = """
import sys
from pcb_ray.output import lease
lease.RENEWED_S = 0.2
lease.Lease(sys.argv[1], "out")
print("held", flush=True)
sys.stdin.read()
"""


@contextlib.contextmanager
def holder(uri: str) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the lease."""
    with subprocess.Popen([sys.executable, "-c", HOLD, uri], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        try:
            yield process
        finally:
            process.kill()


def test_a_place_that_a_living_run_holds_is_refused(one: Family, server: ObjectServer, proxy: FaultProxy) -> None:
    out = f"{server.uri}/d/held"
    with holder(f"{server.uri}/d/.held.pcb-ray/lease.json") as process:
        for options in ({}, {"resume": True}):
            with pytest.raises(RequestError, match=f"another merge is writing it now: .*by process {process.pid} on"):
                merge_to(out, one, **options)
    assert server.list("d/held/") == {}


def test_the_lease_of_a_killed_process_is_taken_over_at_once(server: ObjectServer, proxy: FaultProxy, monkeypatch: Any) -> None:
    monkeypatch.setattr(lease, "DEAD_S", 10_000.0)
    uri = f"{server.uri}/e/lease"
    with holder(uri) as process:
        process.kill()
        process.wait()
        taken = Lease(uri, "out")
    assert Objects().holds(taken.fence)
    taken.release()
    assert server.list("e/") == {}


def test_a_lease_that_nobody_renews_is_taken_over_and_its_holder_finishes_no_object(
    server: ObjectServer, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri, out = f"{server.uri}/f/lease", f"{server.uri}/f/out/file"
    with monkeypatch.context() as patch:  # it is alive, and cut off from the store
        patch.setattr(lease, "RENEWED_S", 10_000.0)
        first = Lease(uri, "out")
        patch.setattr(lease.Holder, "is_dead", lambda _: False)
        began, second = threading.Event(), list[Lease]()
        store = open_store(fence=first.fence)
        with pytest.raises(RunError, match="another run has taken the output over"), store.part(out, 0, 12 << 20) as part:
            part.write(bytes(6 << 20))
            second.append(Lease(uri, "out"))
            began.set()
            part.write(bytes(6 << 20))
    assert began.is_set()
    assert server.list("f/out/") == {}
    assert server.uploads() == {}
    with pytest.raises(RunError, match="another run has taken the output over"), store.part(out, 0, 3) as part:
        part.write(b"abc")
    first.release()  # it is the other's now
    assert Objects().holds(second[0].fence)
    with open_store(fence=second[0].fence).part(out, 0, 3) as part:
        part.write(b"abc")
    assert server.get("f/out/file") == b"abc"
    second[0].release()
    assert server.list("f/lease") == {}


def test_a_lease_whose_answer_was_lost_is_held(server: ObjectServer, proxy: FaultProxy) -> None:
    rule = proxy.fail(reset(done=True), 1, method="PUT", key="g/lease")
    mine = Lease(f"{server.uri}/g/lease", "out")
    assert rule.left == 0
    renewed = proxy.fail(reset(done=True), 1, method="PUT", key="g/lease")
    renewed.wait()
    proxy.fail(meanwhile(lambda _: None), 1, method="PUT", key="g/lease").wait()  # and is renewed after it
    mine.check()
    mine.release()
    assert server.list("g/") == {}


@pytest.mark.parametrize("refuses", [True, False])
def test_a_store_without_conditions_is_told_of(
    one: Family, wanted: dict[str, bytes], server: ObjectServer, proxy: FaultProxy, caplog: pytest.LogCaptureFixture, refuses: bool
) -> None:
    key = f"unconditional-{refuses}"

    def is_conditional(request: Request) -> bool:
        return "if-none-match" in request.headers or "if-match" in request.headers

    if refuses:
        proxy.fail(answer(501, "NotImplemented"), None, method="PUT", where=is_conditional)
    else:
        pytest.importorskip("moto")
        proxy.fail(meanwhile(lambda request: server.delete(request.key)), None, method="PUT", where=is_conditional)
    merge_to(f"{server.uri}/{key}", one)
    assert "this store has no conditional writes" in caplog.text
    assert_whole(server, key, wanted)


def test_uploads_that_a_killed_run_left_are_aborted_by_the_next(
    one: Family, wanted: dict[str, bytes], server: ObjectServer, proxy: FaultProxy, caplog: pytest.LogCaptureFixture
) -> None:
    out = f"{server.uri}/h/left"
    stopped_in_the_second_file(one, proxy, out)
    server._ask("POST", f"h/left/{FILES[1]}", {"uploads": ""})  # as a process that was killed leaves it
    server._ask("POST", "h/others", {"uploads": ""})
    merge_to(out, one, resume=True)
    assert "1 unfinished uploads of killed workers were aborted" in caplog.text
    assert list(server.uploads().values()) == ["h/others"]
    server.lose_uploads()
    assert_whole(server, "h/left", wanted)


def test_notes_and_lease_tell_no_secret(one: Family, server: ObjectServer, proxy: FaultProxy) -> None:
    out = f"{server.uri}/i/secret"
    stopped_in_the_second_file(one, proxy, out)
    notes = {key: server.get(key) for key in server.list("i/.secret.pcb-ray/")}
    assert json.loads(notes["i/.secret.pcb-ray/state.json"])["asked"]
    secret = server.environment["AWS_SECRET_ACCESS_KEY"].encode()
    assert not any(secret in data for data in notes.values())
