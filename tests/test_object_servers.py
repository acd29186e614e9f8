"""The servers and the proxy that tests of stores rely on do what they say, to clients that know nothing of pcb_ray."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import object_servers
import obstore
import psutil
import pytest
import requests
from object_servers import (
    BUCKET,
    FaultProxy,
    ObjectServer,
    answer,
    az_server,
    cut,
    gs_server,
    meanwhile,
    reset,
    s3_server,
    stall,
    swallow,
)
from obstore.exceptions import AlreadyExistsError, BaseError, PermissionDeniedError, PreconditionError
from obstore.store import AzureStore, GCSStore, S3Store

SERVERS = {"s3": s3_server, "gs": gs_server, "az": az_server}
DATA = bytes(range(256)) * 8192  # 2 MB
PART = 5 << 20  # the least that S3 takes
QUICK = {"max_retries": 0}


@pytest.fixture(scope="module", params=["s3", "gs", "az"])
def server(request: Any) -> Iterator[ObjectServer]:
    if request.param == "az" and object_servers.azurite() is None:
        pytest.skip("azurite is not installed (npm install --prefix .venv azurite)")
    with SERVERS[request.param]() as server:
        yield server


@pytest.fixture
def proxy(server: ObjectServer) -> Iterator[FaultProxy]:
    with FaultProxy(server) as proxy:
        for key in server.list():
            server.delete(key)
        yield proxy


def store_at(server: ObjectServer, proxy: FaultProxy, **retries: Any) -> Any:
    """obstore through the proxy, found by the environment that the server gives, without a retry but those asked for."""
    options: dict[str, Any] = {"client_options": {"allow_http": True}, "retry_config": QUICK | retries}
    kind = {"s3": S3Store, "gs": GCSStore, "az": AzureStore}[server.scheme]
    with pytest.MonkeyPatch.context() as patch:
        for name, value in server.through(proxy).items():
            patch.setenv(name, value)
        return kind(BUCKET, **options)


# --- servers --------------------------------------------------------------------------------------------------------------------


def test_a_server_keeps_lists_and_deletes_objects(server: ObjectServer, proxy: FaultProxy) -> None:
    server.put("a/one two+3.bin", DATA)
    server.put("b", b"")
    assert server.get("a/one two+3.bin") == DATA
    assert server.list() == {"a/one two+3.bin": len(DATA), "b": 0}
    assert server.list("a/") == {"a/one two+3.bin": len(DATA)}
    server.delete("b")
    assert set(server.list()) == {"a/one two+3.bin"}


def test_a_conditional_put_is_refused_where_the_object_is_there_or_is_another(server: ObjectServer, proxy: FaultProxy) -> None:
    store = store_at(server, proxy)
    first = store.put("lease", b"first", mode="create")
    with pytest.raises(AlreadyExistsError):
        store.put("lease", b"second", mode="create")
    version = {name: value for name, value in first.items() if value}
    store.put("lease", b"third", mode=version)
    with pytest.raises(PreconditionError):
        store.put("lease", b"fourth", mode=version)
    assert server.get("lease") == b"third"


def test_a_range_is_given_with_an_etag_and_refused_under_another(server: ObjectServer, proxy: FaultProxy) -> None:
    server.put("object", DATA)
    store = store_at(server, proxy)
    pin = store.head("object")["e_tag"]
    options = {"range": (1000, 3000), "if_match": pin}
    assert bytes(store.get("object", options=options).bytes()) == DATA[1000:3000]
    server.put("object", DATA[::-1])
    with pytest.raises(PreconditionError):
        store.get("object", options=options)
    assert [(request.range, request.status) for request in proxy.about(step="get")] == [((1000, 3000), 206), ((1000, 3000), 412)]


def test_a_listing_has_as_many_pages_as_it_takes(proxy: FaultProxy, server: ObjectServer) -> None:
    keys = {f"many/{index:04}": 1 for index in range(20)}
    for key in keys:
        server.put(key, b".")
    server.put("another", b".")
    assert server.list("many/", page=6) == keys
    assert {entry["path"]: entry["size"] for entry in store_at(server, proxy).list("many").collect()} == keys


def test_an_upload_in_parts_is_seen_only_when_it_is_complete_and_can_be_lost(server: ObjectServer, proxy: FaultProxy) -> None:
    if server.scheme == "az":
        pytest.skip("Azure has no uploads, only blocks")
    store = store_at(server, proxy, max_retries=5)
    writer = obstore.open_writer(store, "shard", buffer_size=PART)
    writer.write(bytes(2 * PART))
    assert list(server.uploads().values()) == ["shard"]
    assert "shard" not in server.list()
    writer.close()
    assert (server.uploads(), server.list()) == ({}, {"shard": 2 * PART})
    assert proxy.stored() == {"shard": 2 * PART}
    assert (proxy.counts()["start"], proxy.counts()["part"], proxy.counts()["complete"]) == (1, 2, 1)

    writer = obstore.open_writer(store, "lost", buffer_size=PART)
    writer.write(bytes(PART + 1))
    rule = proxy.fail(meanwhile(lambda _: server.lose_uploads()), step="complete")
    with pytest.raises((BaseError, FileNotFoundError)):
        writer.close()
    assert rule.struck
    assert "lost" not in server.list()


def test_a_request_without_credentials_is_refused(server: ObjectServer, proxy: FaultProxy) -> None:
    server.put("object", b"secret")
    assert requests.get(proxy.endpoint + server.folder + "object", timeout=60).status_code in (401, 403, 404)


def test_a_server_ends_when_the_process_that_started_it_is_killed() -> None:
    code = "import object_servers\nwith object_servers.s3_server() as server:\n    print(server.endpoint, flush=True)\n    input()"
    starter = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parent,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    with starter:
        assert starter.stdout is not None
        assert starter.stdout.readline().startswith(b"http://127.0.0.1:")
        family = psutil.Process(starter.pid).children(recursive=True)
        assert len(family) == 2  # the guard and the server
        starter.send_signal(signal.SIGKILL)
    assert psutil.wait_procs(family, timeout=60)[1] == []


# --- the proxy, in front of moto ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def s3() -> Iterator[ObjectServer]:
    with s3_server() as server:
        server.put("object", DATA)
        yield server


@pytest.fixture
def breaker(s3: ObjectServer) -> Iterator[FaultProxy]:
    with FaultProxy(s3) as proxy:
        yield proxy


def fetch(proxy: FaultProxy, key: str = "object", **options: Any) -> requests.Response:
    options.setdefault("timeout", 60)
    options["headers"] = object_servers._CREDENTIAL | options.get("headers", {})
    method = options.pop("method", "GET")
    return requests.request(method, f"{proxy.endpoint}/{BUCKET}/{key}", **options)


def test_requests_and_bytes_are_counted_by_key_and_the_host_stays(breaker: FaultProxy) -> None:
    assert fetch(breaker).content == DATA
    assert fetch(breaker, headers={"Range": "bytes=10-19"}).content == DATA[10:20]
    fetch(breaker, "a%20b", method="PUT", data=DATA[:5000])
    fetch(breaker, "a%20b", method="PUT", data=iter([DATA[:300], DATA[300:700]]), headers={"x-amz-decoded-content-length": "700"})
    assert fetch(breaker, method="HEAD").headers["Content-Length"] == str(len(DATA))
    assert breaker.fetched() == {"object": len(DATA) + 10}
    assert breaker.stored() == {"a b": 5700}
    assert breaker.counts() == {"get": 2, "head": 1, "put": 2}
    assert {request.headers["host"] for request in breaker.requests} == {f"127.0.0.1:{breaker.port}"}


def test_many_requests_at_once_are_all_counted(breaker: FaultProxy) -> None:
    def ask() -> None:
        with requests.Session() as session:
            for _ in range(10):
                session.get(
                    f"{breaker.endpoint}/{BUCKET}/object", headers=object_servers._CREDENTIAL | {"Range": "bytes=0-99"}, timeout=60
                )

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert breaker.fetched() == {"object": 8000}


def test_an_answer_in_the_stores_name_comes_as_often_as_asked_and_never_reaches_the_store(breaker: FaultProxy) -> None:
    breaker.fail(answer(503, "SlowDown", retry_after=7), times=2, key="^obj")
    heard = [fetch(breaker) for _ in range(3)]
    assert [each.status_code for each in heard] == [503, 503, 200]
    assert heard[0].headers["Retry-After"] == "7"
    assert "<Code>SlowDown</Code>" in heard[0].text
    breaker.fail(answer(403, "ExpiredToken"), step="put")
    assert fetch(breaker).status_code == 200  # of another step
    assert fetch(breaker, "new", method="PUT", data=b"x").status_code == 403
    assert fetch(breaker, "new").status_code == 404


def test_rules_match_by_range_and_are_forgotten_together(breaker: FaultProxy) -> None:
    breaker.fail(answer(500, "InternalError"), times=None, where=lambda request: request.range == (100, 200))
    assert fetch(breaker, headers={"Range": "bytes=0-99"}).status_code == 206
    assert [fetch(breaker, headers={"Range": "bytes=100-199"}).status_code for _ in range(2)] == [500, 500]
    breaker.heal()
    assert fetch(breaker, headers={"Range": "bytes=100-199"}).status_code == 206


def test_a_reset_is_one(breaker: FaultProxy) -> None:
    breaker.fail(reset())
    with pytest.raises(requests.ConnectionError, match="reset by peer"):
        fetch(breaker)
    breaker.fail(reset(100_000))
    with pytest.raises((requests.ConnectionError, requests.exceptions.ChunkedEncodingError), match="reset by peer"):
        fetch(breaker)
    assert [(request.status, request.sent) for request in breaker.requests] == [(None, 0), (200, 100_000)]


def test_what_is_reset_when_done_is_done(breaker: FaultProxy, s3: ObjectServer) -> None:
    breaker.fail(reset(done=True), method="PUT")
    with pytest.raises(requests.ConnectionError):
        fetch(breaker, "done", method="PUT", data=b"data")
    assert s3.get("done") == b"data"


def test_a_body_is_cut_after_so_many_bytes(breaker: FaultProxy) -> None:
    breaker.fail(cut(100_000), times=1)
    with pytest.raises(
        (requests.ConnectionError, requests.exceptions.ChunkedEncodingError), match="IncompleteRead|Connection broken"
    ):
        fetch(breaker)
    assert breaker.requests[0].sent == 100_000
    assert fetch(breaker).content == DATA


def test_a_stalled_request_waits_before_the_answer_or_in_its_middle_until_the_proxy_ends(s3: ObjectServer) -> None:
    def hang_up() -> None:
        with pytest.raises(requests.ConnectionError):
            fetch(proxy)

    with FaultProxy(s3) as proxy:
        silent = proxy.fail(stall())
        with pytest.raises(requests.ReadTimeout):
            fetch(proxy, timeout=0.3)
        assert [request.status for request in silent.struck] == [None]
        proxy.fail(stall(1000))
        heard = fetch(proxy, timeout=0.3, stream=True)
        assert heard.raw.read(1000) == DATA[:1000]
        with pytest.raises(Exception, match="timed out"):
            heard.raw.read(1)
        heard.close()
        rule = proxy.fail(stall())
        thread = threading.Thread(target=hang_up)
        thread.start()
        rule.wait()
    thread.join()


def test_a_swallowed_write_is_said_to_be_done_but_is_not(breaker: FaultProxy, s3: ObjectServer) -> None:
    breaker.fail(swallow(), method="PUT")
    heard = fetch(breaker, "gone", method="PUT", data=b"abc")
    assert (heard.status_code, heard.headers["ETag"]) == (200, '"900150983cd24fb0d6963f7d28e17f72"')  # its MD5
    assert "gone" not in s3.list()


def test_an_object_can_be_replaced_between_two_ranges(breaker: FaultProxy, s3: ObjectServer) -> None:
    s3.put("changing", b"old" * 100)
    pin = {"If-Match": fetch(breaker, "changing", method="HEAD").headers["ETag"]}
    breaker.fail(meanwhile(lambda request: s3.put(request.key, b"new" * 100)), where=lambda request: request.range == (100, 200))
    assert fetch(breaker, "changing", headers=pin | {"Range": "bytes=0-99"}).status_code == 206
    assert fetch(breaker, "changing", headers=pin | {"Range": "bytes=100-199"}).status_code == 412


def test_latency_and_bandwidth_are_added(breaker: FaultProxy) -> None:
    breaker.latency_s = 0.2
    start = time.monotonic()
    fetch(breaker, headers={"Range": "bytes=0-0"})
    assert time.monotonic() - start >= 0.2
    breaker.latency_s, breaker.bytes_per_s = 0.0, len(DATA) / 0.4
    start = time.monotonic()
    assert fetch(breaker).content == DATA
    assert time.monotonic() - start >= 0.3


def test_credentials_that_a_store_denies_are_told_apart(s3: ObjectServer, breaker: FaultProxy) -> None:
    breaker.fail(answer(403, "ExpiredToken"))
    with pytest.raises(PermissionDeniedError, match="ExpiredToken"):
        store_at(s3, breaker).get("object")


def test_nothing_of_a_proxy_is_left(s3: ObjectServer) -> None:
    gc.collect()  # what other tests have left open
    threads, descriptors = threading.active_count(), len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        with FaultProxy(s3) as proxy:
            proxy.fail(stall(10))
            with pytest.raises(requests.exceptions.RequestException):
                fetch(proxy, timeout=0.2)
            fetch(proxy)
    assert threading.active_count() <= threads
    assert len(os.listdir("/proc/self/fd")) <= descriptors


def test_obstore_sends_what_a_buffer_holds_later_and_not_what_it_was_given(s3: ObjectServer, breaker: FaultProxy) -> None:
    """Why nothing of ours may reuse a buffer that it wrote: should this fail, obstore copies by now, and the rule can go."""
    buffer = bytearray(PART)
    with obstore.open_writer(store_at(s3, breaker), "reused", buffer_size=2 * PART) as writer:
        writer.write(memoryview(buffer))
        buffer[:] = bytes([1]) * PART
    assert set(s3.get("reused")) == {1}


def test_a_writer_that_meets_an_error_leaves_neither_an_object_nor_an_upload(s3: ObjectServer, breaker: FaultProxy) -> None:
    with pytest.raises(KeyError), obstore.open_writer(store_at(s3, breaker, max_retries=5), "half", buffer_size=PART) as writer:
        writer.write(bytes(PART + 1))
        raise KeyError
    assert "half" not in s3.list()
    assert s3.uploads() == {}
