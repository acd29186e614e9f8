"""Real object stores on 127.0.0.1, each in a process of its own, and a proxy that makes them fail on command.

`s3_server()` is moto's S3, `gs_server()` the same behind the headers that Google's XML API adds (generations and conditions on
them), `az_server()` is azurite. `FaultProxy(server)` stands in front of any of them, or of any other HTTP server: it counts, slows
down and breaks. SigV4 covers the Host header, so it passes that on unchanged."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import hmac
import itertools
import os
import re
import shutil
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import format_datetime
from pathlib import Path
from typing import Any, NamedTuple, NoReturn
from urllib.parse import parse_qs, quote, unquote, urlsplit
from xml.etree import ElementTree

import requests

START_S = 60.0  # for a server to answer: it takes one or two
BUCKET = "models"
_BLOCK = 256 << 10


# moto checks no signatures, but takes a request without any for an anonymous one
_CREDENTIAL = {
    "Authorization": "AWS4-HMAC-SHA256 Credential=AKIAOFTESTS/20260101/us-east-1/s3/aws4_request, SignedHeaders=host, Signature=0"
}


# --- servers --------------------------------------------------------------------------------------------------------------------


@dataclass
class ObjectServer:
    """A store that serves one empty bucket (or container), with a client of its own: nothing here goes through pcb_ray.

    `environment` is what makes the usual clients find it: endpoint, region and dummy credentials."""

    scheme: str
    endpoint: str  # scheme, host and port
    environment: dict[str, str]
    folder: str = f"/{BUCKET}/"  # what precedes the key in a path

    @property
    def uri(self) -> str:
        return f"{self.scheme}://{BUCKET}"

    def through(self, proxy: FaultProxy) -> dict[str, str]:
        """`environment` with the proxy as the endpoint."""
        return {name: value.replace(self.endpoint, proxy.endpoint) for name, value in self.environment.items()}

    def put(self, key: str, data: bytes) -> None:
        self._ask("PUT", key, body=data)

    def get(self, key: str) -> bytes:
        return self._ask("GET", key).content

    def delete(self, key: str) -> None:
        self._ask("DELETE", key)

    def list(self, prefix: str = "", page: int = 1000) -> dict[str, int]:
        """Sizes by key of the objects whose keys begin with `prefix`, in pages of so many."""
        found: dict[str, int] = {}
        token = {"max-keys": str(page)}
        while True:
            listed = _elements(self._ask("GET", "", {"list-type": "2", "prefix": prefix, **token}))
            found |= {str(item.findtext("Key")): int(item.findtext("Size") or 0) for item in listed.iter("Contents")}
            if not (following := listed.findtext("NextContinuationToken")):
                return found
            token["continuation-token"] = following

    def uploads(self) -> dict[str, str]:
        """Keys by id of the multipart uploads that are neither complete nor aborted."""
        found = _elements(self._ask("GET", "", {"uploads": ""})).iter("Upload")
        return {str(upload.findtext("UploadId")): str(upload.findtext("Key")) for upload in found}

    def lose_uploads(self) -> None:
        """End all uploads: whoever goes on with one finds it gone."""
        for upload, key in self.uploads().items():
            with contextlib.suppress(OSError):  # moto stumbles over a part that arrives at this moment, and is asked again
                self._ask("DELETE", key, {"uploadId": upload})
        if self.uploads():
            self.lose_uploads()

    def _ask(self, method: str, key: str, query: Mapping[str, str] | None = None, body: bytes = b"") -> requests.Response:
        path = self.folder + quote(key) if key else self.folder.rstrip("/")
        answer = requests.request(
            method, self.endpoint + path, params=query, data=body, headers=self._signed(method, path, query or {}, body), timeout=60
        )
        if not answer.ok:
            raise OSError(f"{method} {path}: {answer.status_code} {answer.text[:500]}")
        return answer

    def _signed(self, method: str, path: str, query: Mapping[str, str], body: bytes) -> dict[str, str]:
        return _CREDENTIAL


class AzureServer(ObjectServer):
    def list(self, prefix: str = "", page: int = 1000) -> dict[str, int]:
        found: dict[str, int] = {}
        token = {"maxresults": str(page)}
        while True:
            listed = _elements(self._ask("GET", "", {"restype": "container", "comp": "list", "prefix": prefix, **token}))
            for blob in listed.iter("Blob"):
                found[str(blob.findtext("Name"))] = int(blob.findtext("Properties/Content-Length") or 0)
            if not (following := listed.findtext("NextMarker")):
                return found
            token["marker"] = following

    def uploads(self) -> dict[str, str]:
        """Azure has no uploads: blocks that no list names wait beside the blob for a week. Keys of blobs that only have such."""
        listed = _elements(self._ask("GET", "", {"restype": "container", "comp": "list", "include": "uncommittedblobs"}))
        names = {str(blob.findtext("Name")) for blob in listed.iter("Blob")}
        return {name: name for name in names - set(self.list())}

    def lose_uploads(self) -> None:
        raise NotImplementedError("Azure can't lose an upload, only a blob")

    def _signed(self, method: str, path: str, query: Mapping[str, str], body: bytes) -> dict[str, str]:
        """The header of the SharedKey scheme (no library of the test environment speaks it)."""
        headers = {"x-ms-date": format_datetime(datetime.now(UTC), usegmt=True), "x-ms-version": "2021-12-02"}
        if method == "PUT":
            headers |= {"x-ms-blob-type": "BlockBlob", "Content-Type": "application/octet-stream"}
        account = self.environment["AZURE_STORAGE_ACCOUNT_NAME"]
        text = [method, "", "", str(len(body)) if body else "", "", headers.get("Content-Type", ""), "", "", "", "", "", ""]
        text += sorted(f"{name}:{value}" for name, value in headers.items() if name.startswith("x-ms-"))
        text += [f"/{account}{path}", *sorted(f"{name}:{value}" for name, value in query.items())]
        key = base64.b64decode(self.environment["AZURE_STORAGE_ACCOUNT_KEY"])
        signature = base64.b64encode(hmac.digest(key, "\n".join(text).encode(), "sha256")).decode()
        return headers | {"Authorization": f"SharedKey {account}:{signature}"}


def _elements(answer: requests.Response) -> ElementTree.Element:
    return ElementTree.fromstring(re.sub(rb' xmlns="[^"]*"', b"", answer.content).removeprefix(b"\xef\xbb\xbf"))


@contextlib.contextmanager
def s3_server() -> Iterator[ObjectServer]:
    with _process([sys.executable, __file__, "s3"]) as port:
        endpoint = f"http://127.0.0.1:{port}"
        environment = {
            "AWS_ACCESS_KEY_ID": "AKIAOFTESTS",
            "AWS_SECRET_ACCESS_KEY": "secret-key-of-tests",
            "AWS_REGION": "us-east-1",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_ENDPOINT_URL": endpoint,
            "AWS_ALLOW_HTTP": "true",
            "AWS_EC2_METADATA_DISABLED": "true",
        }
        server = ObjectServer("s3", endpoint, environment)
        server._ask("PUT", "")
        yield server


@contextlib.contextmanager
def gs_server() -> Iterator[ObjectServer]:
    with _process([sys.executable, __file__, "gs"]) as port:
        endpoint = f"http://127.0.0.1:{port}"
        environment = {"GOOGLE_BASE_URL": endpoint, "GOOGLE_BEARER_TOKEN": "bearer-of-tests"}
        server = ObjectServer("gs", endpoint, environment)
        server._ask("PUT", "")
        yield server


def azurite() -> str | None:
    """Where azurite is: on the PATH, or put into the environment by `npm install --prefix .venv azurite`."""
    return shutil.which("azurite-blob") or shutil.which("azurite-blob", path=f"{sys.prefix}/node_modules/.bin")


@contextlib.contextmanager
def az_server() -> Iterator[AzureServer]:
    command = azurite()
    if command is None:
        raise FileNotFoundError("azurite-blob is not installed. Fix: npm install --prefix .venv azurite")
    options = ["--blobPort", "0", "--inMemoryPersistence", "--skipApiVersionCheck", "--disableTelemetry", "--silent"]
    with _process([command, *options]) as port:
        endpoint = f"http://127.0.0.1:{port}"
        account = "devstoreaccount1"  # azurite's own, with the key that its manual publishes
        environment = {
            "AZURE_STORAGE_ACCOUNT_NAME": account,
            "AZURE_STORAGE_ACCOUNT_KEY": "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw==",
            "AZURE_STORAGE_ENDPOINT": f"{endpoint}/{account}",
            "AZURE_ALLOW_HTTP": "true",
        }
        server = AzureServer("az", endpoint, environment, f"/{account}/{BUCKET}/")
        server._ask("PUT", "", {"restype": "container"})
        yield server


_GUARD = """
import signal, subprocess, sys
server = subprocess.Popen(sys.argv[1:], stdin=subprocess.DEVNULL)
sys.stdin.read()  # ends when whoever started this is no more
server.kill()
server.wait()
"""


@contextlib.contextmanager
def _process(command: list[str]) -> Iterator[int]:
    """The port of a server that prints it (`...127.0.0.1:PORT`) when it listens; it ends with this process, however that ends."""
    guard = [sys.executable, "-c", _GUARD, *command]
    process = subprocess.Popen(guard, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, process_group=0)
    assert process.stdin is not None
    assert process.stdout is not None
    said: list[str] = []
    ports: list[int] = []
    known = threading.Event()

    def listen() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            text = line.decode(errors="replace")
            said.append(text)
            del said[:-50]
            if not known.is_set() and (found := re.search(r"127\.0\.0\.1:([1-9]\d*)", text)):
                ports.append(int(found[1]))
                known.set()
        known.set()

    reader = threading.Thread(target=listen)
    reader.start()
    try:
        if not known.wait(START_S) or not ports:
            raise RuntimeError(f"{' '.join(command)} did not start: {''.join(said)}")
        yield ports[0]
    finally:
        process.stdin.close()
        process.wait()
        reader.join()
        process.stdout.close()


# --- what runs in a server's process --------------------------------------------------------------------------------------------


class _Generations:
    """moto's S3 as Google's XML API: a number for each object written, and conditions on it. For the rest the two are alike."""

    def __init__(self, app: Callable[..., Iterable[bytes]]) -> None:
        self._app = app
        self._numbers = itertools.count(1_700_000_000_000_001)
        self._generations: dict[str, int] = {}
        self._lock = threading.Lock()

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        if environ["REQUEST_METHOD"] in ("GET", "HEAD"):
            return self._forward(environ, start_response)
        with self._lock:
            wanted = environ.get("HTTP_X_GOOG_IF_GENERATION_MATCH")
            if wanted is not None and int(wanted) != self._generations.get(environ["PATH_INFO"], 0):
                environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
                start_response("412 Precondition Failed", [("Content-Type", "application/xml")])
                return [b"<?xml version='1.0'?><Error><Code>PreconditionFailed</Code></Error>"]
            return self._forward(environ, start_response)

    def _forward(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> list[bytes]:
        path, query = environ["PATH_INFO"], environ["QUERY_STRING"]
        if environ.get("HTTP_AUTHORIZATION", "").startswith("Bearer "):
            environ["HTTP_AUTHORIZATION"] = _CREDENTIAL["Authorization"]
        environ = {name.replace("HTTP_X_GOOG_COPY_SOURCE", "HTTP_X_AMZ_COPY_SOURCE"): value for name, value in environ.items()}
        heard: list[Any] = []

        def keep(status: str, headers: list[tuple[str, str]], _: object = None) -> Callable[[bytes], None]:
            heard[:] = status, headers
            return lambda _: None

        body = list(self._app(environ, keep))
        status, headers = heard
        writes = (environ["REQUEST_METHOD"], "uploadId=" in query) in (("PUT", False), ("POST", True))
        if status.startswith("2") and writes:
            self._generations[path] = next(self._numbers)
        elif status.startswith("2") and environ["REQUEST_METHOD"] == "DELETE" and "uploadId=" not in query:
            self._generations.pop(path, None)
        if writes or (path in self._generations and "uploadId=" not in query):
            headers = [*headers, ("x-goog-generation", str(self._generations.get(path, 0))), ("x-goog-metageneration", "1")]
        start_response(status, headers)
        return body


def _serve(scheme: str) -> None:
    from moto.server import DomainDispatcherApplication, MotoRequestHandler, create_backend_app
    from werkzeug.serving import make_server

    app = DomainDispatcherApplication(create_backend_app)
    app = _Generations(app) if scheme == "gs" else app
    server = make_server("127.0.0.1", 0, app, threaded=True, request_handler=MotoRequestHandler)
    print(f"127.0.0.1:{server.port}", flush=True)
    server.serve_forever()


# --- the proxy ------------------------------------------------------------------------------------------------------------------


@dataclass
class Request:
    """A request as the proxy saw it; the last three fields fill while it is answered."""

    method: str
    key: str  # decoded, without the bucket; of a request for the bucket itself: ""
    step: str  # get, head, put, delete, list, start, part, complete, abort, uploads, parts, other
    query: dict[str, str]
    headers: dict[str, str]  # names in small letters
    range: tuple[int, int] | None  # from, to; as in slices
    received: int = 0  # body bytes from the client
    sent: int = 0  # body bytes to the client
    status: int | None = None  # None as long as, and where, no answer was sent


class Fault(NamedTuple):
    """What happens to a request instead of being answered as it should; made by the functions below."""

    kind: str
    status: int = 0
    code: str = ""
    headers: tuple[tuple[str, str], ...] = ()
    after: int | None = None
    act: Callable[[Request], None] | None = None


def answer(status: int, code: str, *, retry_after: int | None = None) -> Fault:
    """An error of the store's own (503 SlowDown, 403 ExpiredToken, 404 NoSuchUpload, 200 InternalError); the store sees nothing."""
    return Fault("answer", status, code, () if retry_after is None else (("Retry-After", str(retry_after)),))


def reset(after: int | None = None, *, done: bool = False) -> Fault:
    """The connection is reset (RST): before the store sees the request, once it has `done` it, or after some bytes of the body."""
    return Fault("reset", after=0 if done and after is None else after)


def cut(after: int) -> Fault:
    """The answer promises its whole body, and the connection closes in order after so many bytes of it."""
    return Fault("cut", after=after)


def stall(after: int | None = None) -> Fault:
    """No answer ever, the store sees nothing; or silence after so many bytes of the body."""
    return Fault("stall", after=after)


def swallow() -> Fault:
    """A write is taken and said to be done (200, with an ETag), but the store never gets it."""
    return Fault("swallow")


def flip() -> Fault:
    """A write comes to the store with another byte than the client has sent."""
    return Fault("flip")


def meanwhile(act: Callable[[Request], None]) -> Fault:
    """`act` is called before the request goes to the store (to replace the object, to lose the upload), which then answers it."""
    return Fault("meanwhile", act=act)


@dataclass
class Rule:
    """A fault and the requests that it strikes."""

    fault: Fault
    left: int | None  # how often it still strikes; None: as long as it is there
    matches: Callable[[Request], bool]
    struck: list[Request] = field(default_factory=list)
    _news: threading.Condition = field(default_factory=threading.Condition)

    def wait(self, times: int = 1, timeout: float = 60.0) -> None:
        """Until it has struck this often; TimeoutError if it doesn't."""
        with self._news:
            if not self._news.wait_for(lambda: len(self.struck) >= times, timeout):
                raise TimeoutError(f"a fault struck {len(self.struck)} times in {timeout:g} s, not {times} times")

    def _strikes(self, request: Request) -> bool:
        with self._news:
            if self.left == 0 or not self.matches(request):
                return False
            self.left = None if self.left is None else self.left - 1
            self.struck.append(request)
            self._news.notify_all()
            return True


class FaultProxy:
    """A proxy in front of `server` (an ObjectServer, or the endpoint of any HTTP server), from `with` to the end of it.

    All of it may be called from any thread while requests are under way. `latency_s` is added to each request, `bytes_per_s` bounds
    the bodies of both directions together; both can be set anew at any time."""

    def __init__(self, server: ObjectServer | str, *, latency_s: float = 0.0, bytes_per_s: float | None = None) -> None:
        target = urlsplit(server if isinstance(server, str) else server.endpoint)
        self._target = str(target.hostname), int(target.port or 80)
        self._folder = "/" if isinstance(server, str) else server.folder
        self.latency_s, self.bytes_per_s = latency_s, bytes_per_s
        self.requests: list[Request] = []
        self._rules: list[Rule] = []
        self._sockets: set[socket.socket] = set()
        self._threads: list[threading.Thread] = []
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._free_at = 0.0

    def __enter__(self) -> FaultProxy:
        self._door = socket.create_server(("127.0.0.1", 0), backlog=256)
        self.port = int(self._door.getsockname()[1])
        self._thread = threading.Thread(target=self._admit)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        with self._lock:
            waiting = [self._door, *self._sockets]
        for each in waiting:
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._door.close()
        for thread in self._threads:
            thread.join()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    # What a test says

    def fail(
        self,
        fault: Fault,
        times: int | None = 1,
        *,
        method: str | None = None,
        key: str | None = None,
        step: str | None = None,
        where: Callable[[Request], bool] = lambda _: True,
    ) -> Rule:
        """Let `fault` strike the next `times` requests (None: all, until `heal`) of this method, step and key (a pattern).

        Rules are asked in the order in which they were made; the first that strikes is the one."""

        def matches(request: Request) -> bool:
            alike = (method or request.method, step or request.step) == (request.method, request.step)
            return alike and (key is None or re.search(key, request.key) is not None) and where(request)

        rule = Rule(fault, times, matches)
        with self._lock:
            self._rules.append(rule)
        return rule

    def heal(self) -> None:
        """Forget all faults. A request that is stalled stays so."""
        with self._lock:
            self._rules.clear()

    def about(self, *, method: str | None = None, key: str | None = None, step: str | None = None) -> list[Request]:
        """The requests so far of this method, step and key (a pattern, searched for)."""
        with self._lock:
            seen = list(self.requests)
        return [
            request
            for request in seen
            if (method or request.method, step or request.step) == (request.method, request.step)
            and (key is None or re.search(key, request.key))
        ]

    def counts(self) -> dict[str, int]:
        """Numbers of requests by step."""
        steps = [request.step for request in self.about()]
        return {step: steps.count(step) for step in sorted(set(steps))}

    def fetched(self) -> dict[str, int]:
        """Body bytes that went to clients of GET requests for objects, by key, those of broken answers too."""
        return self._total("get", lambda request: request.sent)

    def stored(self) -> dict[str, int]:
        """Body bytes that came from clients in PUT requests for objects and parts, by key."""
        put, part = self._total("put", lambda request: request.received), self._total("part", lambda request: request.received)
        return {key: put.get(key, 0) + part.get(key, 0) for key in put | part}

    def _total(self, step: str, size: Callable[[Request], int]) -> dict[str, int]:
        total: dict[str, int] = {}
        for request in self.about(step=step):
            total[request.key] = total.get(request.key, 0) + size(request)
        return total

    # What happens to a connection

    def _admit(self) -> None:
        while not self._ended.is_set():
            try:
                client, _ = self._door.accept()
            except OSError:
                return
            thread = threading.Thread(target=self._attend, args=(client,))
            thread.start()
            self._threads = [each for each in self._threads if each.is_alive()] + [thread]

    @contextlib.contextmanager
    def _held(self, connection: socket.socket) -> Iterator[socket.socket]:
        """Closed at the end of it, and woken up at the end of the proxy."""
        with self._lock:
            self._sockets.add(connection)
        try:
            with contextlib.closing(connection):
                if self._ended.is_set():
                    raise _Over
                yield connection
        finally:
            with self._lock:
                self._sockets.discard(connection)

    def _attend(self, client: socket.socket) -> None:
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with contextlib.suppress(OSError, _Over), self._held(client), client.makefile("rb", buffering=_BLOCK) as arriving:
            while head := _Head.read(arriving):
                self._pass_on(head, client, arriving)
                if "close" in head.fields.get("connection", "").lower():
                    return

    def _pass_on(self, head: _Head, client: socket.socket, arriving: Any) -> None:
        request = _request(head, self._folder)
        with self._lock:
            self.requests.append(request)
            rules = list(self._rules)
        fault = next((rule.fault for rule in rules if rule._strikes(request)), None)
        if self._ended.wait(self.latency_s):
            raise _Over
        if "100-continue" in head.fields.get("expect", "").lower():
            client.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
        if fault is not None and fault.kind not in ("meanwhile", "flip") and fault.after is None:
            self._instead(fault, request, head, client, arriving)
            return
        if fault is not None and fault.act is not None:
            fault.act(request)
        with self._held(socket.create_connection(self._target)) as store, store.makefile("rb", buffering=_BLOCK) as answering:
            store.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            store.sendall(head.without("connection", "expect", "keep-alive").and_("Connection: close").bytes)
            for block in head.body(arriving):
                self._pace(len(block))
                if fault is not None and fault.kind == "flip" and not request.received:
                    block = bytes([block[0] ^ 1]) + block[1:]
                request.received += len(head.payload(block))
                store.sendall(block)
            while (heard := _Head.read(answering)) and heard.status == 100:
                pass
            if heard is None:
                raise _Over  # the store hung up
            self._reply(heard, fault, request, client, answering)

    def _reply(self, heard: _Head, fault: Fault | None, request: Request, client: socket.socket, answering: Any) -> None:
        after = None if fault is None else fault.after
        if after == 0 and fault is not None and fault.kind == "reset":
            self._break(fault, client)
        bodyless = request.method == "HEAD" or heard.status in (204, 304)
        framed = bodyless or "content-length" in heard.fields or heard.chunked
        request.status = heard.status
        client.sendall(heard.without("connection", "keep-alive").and_("" if framed else "Connection: close").bytes)
        for block in () if bodyless else heard.body(answering, to_the_end=True):
            size = len(heard.payload(block))
            if after is not None and fault is not None and request.sent + size > after:
                block = block[: after - request.sent]
                request.sent += len(block)
                client.sendall(block)
                self._break(fault, client)
            self._pace(len(block))
            request.sent += size  # first, so that who has the bytes finds them counted
            client.sendall(block)
        if not framed:
            raise _Over

    def _instead(self, fault: Fault, request: Request, head: _Head, client: socket.socket, arriving: Any) -> None:
        """The faults of which the store sees nothing."""
        if fault.kind in ("reset", "stall"):
            self._break(fault, client)
        digest = hashlib.md5(usedforsecurity=False)
        for block in head.body(arriving):
            self._pace(len(block))
            request.received += len(head.payload(block))
            digest.update(head.payload(block))
        body, status, headers = b"", fault.status or 200, list(fault.headers)
        if fault.kind == "answer":
            message = f"<Error><Code>{fault.code}</Code><Message>said by the fault proxy</Message></Error>"
            body = f'<?xml version="1.0" encoding="UTF-8"?>\n{message}'.encode()
            headers += [("Content-Type", "application/xml"), ("x-ms-error-code", fault.code)]
        else:
            headers += [("ETag", f'"{digest.hexdigest()}"')]
        lines = [f"HTTP/1.1 {status} {fault.code or 'OK'}", f"Content-Length: {len(body)}", *(f"{k}: {v}" for k, v in headers)]
        request.status = status
        body = b"" if request.method == "HEAD" else body
        request.sent += len(body)
        client.sendall("\r\n".join([*lines, "", ""]).encode() + body)

    def _break(self, fault: Fault, client: socket.socket) -> NoReturn:
        if fault.kind == "stall":
            self._ended.wait()
        elif fault.kind == "reset":
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # close sends RST
        raise _Over

    def _pace(self, size: int) -> None:
        if rate := self.bytes_per_s:
            with self._lock:
                self._free_at = max(self._free_at, time.monotonic()) + size / rate
                pause = self._free_at - time.monotonic()
            if self._ended.wait(max(pause, 0.0)):
                raise _Over


class _Over(Exception):
    """Nothing more is said on a connection."""


@dataclass
class _Head:
    """The first lines of a request or an answer, passed on as they came but for what a proxy must change."""

    lines: list[str]

    @staticmethod
    def read(stream: Any) -> _Head | None:
        lines: list[str] = []
        while line := stream.readline():
            if line == b"\r\n":
                return _Head(lines)
            lines.append(line.decode("latin-1").removesuffix("\r\n"))
        return None

    @property
    def fields(self) -> dict[str, str]:
        pairs = (line.partition(":") for line in self.lines[1:])
        return {name.strip().lower(): value.strip() for name, _, value in pairs}

    @property
    def status(self) -> int:
        return int(self.lines[0].split()[1])

    @property
    def chunked(self) -> bool:
        return "chunked" in self.fields.get("transfer-encoding", "").lower()

    @property
    def bytes(self) -> bytes:
        return "\r\n".join([*self.lines, "", ""]).encode("latin-1")

    def without(self, *names: str) -> _Head:
        return _Head(self.lines[:1] + [line for line in self.lines[1:] if line.partition(":")[0].strip().lower() not in names])

    def and_(self, line: str) -> _Head:
        return _Head([*self.lines, line] if line else self.lines)

    def body(self, stream: Any, *, to_the_end: bool = False) -> Iterator[bytes]:
        """As it came, in blocks; of a chunked body one line or one chunk at a time."""
        if self.chunked:
            while line := stream.readline():
                yield line
                size = int(line.partition(b";")[0], 16)
                if size:
                    yield stream.read(size + 2)
                    continue
                while trailer := stream.readline():
                    yield trailer
                    if trailer == b"\r\n":
                        return
            raise _Over
        left = int(self.fields.get("content-length", -1 if to_the_end else 0))
        while left:
            block = stream.read1(_BLOCK if left < 0 else min(left, _BLOCK))
            if not block:
                if left > 0:
                    raise _Over
                return
            left -= len(block) if left > 0 else 0
            yield block

    def payload(self, block: bytes) -> bytes:
        """What of a block of the body is no framing (a chunked one: chunks, which end a line but aren't one)."""
        if not self.chunked:
            return block
        return b"" if block.count(b"\n") == 1 and len(block) < 40 else block[:-2]


_STEPS = {  # by method, whether an upload is named, and whether uploads are spoken of
    ("POST", False, True): "start",
    ("PUT", True, False): "part",
    ("POST", True, False): "complete",
    ("DELETE", True, False): "abort",
    ("GET", False, True): "uploads",
    ("GET", True, False): "parts",
}
_AZURE_STEPS = {("PUT", "block"): "part", ("PUT", "blocklist"): "complete", ("GET", "blocklist"): "parts", ("GET", "list"): "list"}


def _request(head: _Head, folder: str) -> Request:
    method, target, _ = head.lines[0].split(" ")
    where = urlsplit(target)
    path = unquote(where.path)
    query = {name: values[-1] for name, values in parse_qs(where.query, keep_blank_values=True).items()}
    bucket = path.rstrip("/") + "/" == folder and folder != "/"
    key = "" if bucket else path.removeprefix(folder)
    step = _STEPS.get((method, "uploadId" in query, "uploads" in query)) or _AZURE_STEPS.get((method, query.get("comp", "")))
    if step is None:
        step = (
            "list"
            if bucket and method == "GET"
            else "other"
            if bucket or method not in ("GET", "HEAD", "PUT", "DELETE")
            else method.lower()
        )
    fields = head.fields
    span = re.fullmatch(r"bytes=(\d+)-(\d+)", fields.get("range") or fields.get("x-ms-range") or "")
    return Request(method, key, step, query, fields, (int(span[1]), int(span[2]) + 1) if span else None)


if __name__ == "__main__":
    sys.path.remove(str(Path(__file__).parent))  # only what is installed is meant
    os.environ.setdefault("AWS_ACCESS_KEY_ID", "none")
    _serve(sys.argv[1])
