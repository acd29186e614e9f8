"""Large ranged reads and uploads by obstore, pyarrow and httpx against what the loopback gives, as Markdown.

    python tests/benchmarks/stores.py > tests/benchmarks/results/DATE-stores.md

Reads come from nginx (`apt-get install nginx-light`), one file of 1 GiB in the page cache, into a buffer that was there before;
uploads go to a sink that throws parts away. Each measurement is a process of its own (or two at once), in turn, and the median of
`--rounds` counts. CPU is the client's alone. Choose some with --only reads,faults,memory."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))
from object_servers import BUCKET, FaultProxy, answer, cut, reset, stall

MB, GB = 1_000_000, 1_000_000_000
FILE = 1 << 30
KEY = "shard.safetensors"
CLIENTS = ("obstore", "obstore, streamed", "obstore, kept", "pyarrow", "httpx", "sockets", "curl")
# What is proposed for this project: a request that is silent for ten seconds, or takes more than a minute for its 16 MB, is over.
STATED_CLIENT = {
    "allow_http": True,
    "connect_timeout": "5s",
    "read_timeout": "10s",
    "timeout": "60s",
    "pool_idle_timeout": "30s",
}
STATED_RETRY = {
    "max_retries": 10,
    "retry_timeout": timedelta(seconds=180),
    "backoff": {"init_backoff": timedelta(milliseconds=200), "max_backoff": timedelta(seconds=10), "base": 2},
}


# --- clients: each gives a function that reads one range into a buffer ----------------------------------------------------------


def _obstore(endpoint: str, client: dict[str, Any] | None = None, retry: dict[str, Any] | None = None) -> Any:
    from obstore.store import S3Store

    options: dict[str, Any] = {"client_options": client or STATED_CLIENT, "retry_config": retry or STATED_RETRY}
    return S3Store(BUCKET, endpoint=endpoint, region="us-east-1", access_key_id="AKIA", secret_access_key="secret", **options)


def _pyarrow(endpoint: str, attempts: int = 10, **options: Any) -> Any:
    import pyarrow.fs

    return pyarrow.fs.S3FileSystem(
        access_key="AKIA",
        secret_key="secret",
        region="us-east-1",
        scheme="http",
        endpoint_override=endpoint.removeprefix("http://"),
        connect_timeout=5,
        request_timeout=10,
        retry_strategy=pyarrow.fs.AwsStandardS3RetryStrategy(max_attempts=attempts),
        **options,
    )


Reader = Callable[[memoryview, int], object]


def reader(name: str, endpoint: str, **options: Any) -> Reader:
    url = f"{endpoint}/{BUCKET}/{KEY}"
    if name.startswith("obstore"):
        store = _obstore(endpoint, **options)
        if name == "obstore":

            def read(into: memoryview, start: int) -> object:
                into[:] = memoryview(store.get_range(KEY, start=start, length=len(into)))
                return None

        elif name == "obstore, kept":

            def read(into: memoryview, start: int) -> object:
                return store.get_range(KEY, start=start, length=len(into))  # the client's own memory, no copy

        else:

            def read(into: memoryview, start: int) -> object:
                at = 0
                for block in store.get(KEY, options={"range": (start, start + len(into))}).stream(min_chunk_size=1 << 20):
                    into[at : at + len(block)] = block
                    at += len(block)
                if at != len(into):
                    raise EOFError
                return None

        return read
    if name == "pyarrow":
        files, filesystem = threading.local(), _pyarrow(endpoint, **options)

        def read(into: memoryview, start: int) -> object:
            if not hasattr(files, "file"):
                files.file = filesystem.open_input_file(f"{BUCKET}/{KEY}")  # asks for the size
            files.file.seek(start)
            if files.file.readinto(into) != len(into):
                raise EOFError
            return None

        return read
    if name == "httpx":
        from huggingface_hub.utils import get_session  # the client that it uses for everything

        session = get_session()

        def read(into: memoryview, start: int) -> object:
            at = 0
            with session.stream("GET", url, headers={"Range": f"bytes={start}-{start + len(into) - 1}"}) as heard:
                heard.raise_for_status()
                for block in heard.iter_bytes():
                    into[at : at + len(block)] = block
                    at += len(block)
            if at != len(into):
                raise EOFError
            return None

        return read
    import http.client
    import socket

    connections = threading.local()

    def read(into: memoryview, start: int) -> object:
        if not hasattr(connections, "connection"):
            connections.connection = http.client.HTTPConnection(endpoint.removeprefix("http://"))
        connections.connection.request("GET", f"/{BUCKET}/{KEY}", headers={"Range": f"bytes={start}-{start + len(into) - 1}"})
        heard = connections.connection.getresponse()
        buffered = heard.fp.read1()  # what came with the headers; the rest is received where it shall be
        into[: len(buffered)] = buffered
        at = len(buffered)
        while at < len(into):
            at += connections.connection.sock.recv_into(into[at:], 0, socket.MSG_WAITALL)
        heard.length = 0
        heard.close()
        return None

    return read


def read_all(client: str, endpoint: str, size: int, flight: int) -> dict[str, float]:
    """Reads the file once, this many ranges in flight; seconds of the clock and of this process's cores."""
    starts = range(0, FILE, size)
    if client == "curl":
        with tempfile.NamedTemporaryFile("w", suffix=".curl") as config:
            lines = 'url="{}/{}/{}"', 'range="{}-{}"', 'output="/dev/null"', "silent", "fail", "next", ""
            asked = "\n".join(lines)
            config.write(
                "".join(asked.format(endpoint, BUCKET, KEY, start, start + size - 1) for start in starts).removesuffix("next\n")
            )
            config.flush()
            start, used = time.perf_counter(), os.times()
            subprocess.run(
                ["curl", "--no-progress-meter", "--parallel", "--parallel-max", str(flight), "--config", config.name], check=True
            )
            after = os.times()
            seconds = time.perf_counter() - start
            return {"s": seconds, "cpu": after.children_user + after.children_system - used.children_user - used.children_system}
    read = reader(client, endpoint)
    buffers = [memoryview(bytearray(b"\1") * size) for _ in range(flight)]
    free = list(buffers)

    def one(start: int) -> None:
        buffer = free.pop()
        read(buffer, start)
        free.append(buffer)

    with ThreadPoolExecutor(flight) as pool:
        list(pool.map(one, list(starts)[:flight]))  # connections are made, threads started
        begin, used = time.perf_counter(), time.process_time()
        list(pool.map(one, starts))
        return {"s": time.perf_counter() - begin, "cpu": time.process_time() - used}


# --- servers --------------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def nginx(folder: Path) -> Iterator[str]:
    """Static files over HTTP/1.1 with ranges and ETags, as fast as two cores give them."""
    import socket

    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    config = folder / "nginx.conf"
    config.write_text(
        f"""daemon off; worker_processes 2; pid {folder}/pid; error_log stderr crit; user root;
        events {{ worker_connections 512; }}
        http {{ access_log off; sendfile on; tcp_nopush on; keepalive_requests 1000000;
                server {{ listen 127.0.0.1:{port}; root {folder}; }} }}"""
    )
    process = subprocess.Popen([shutil.which("nginx", path=f"{os.environ['PATH']}:/usr/sbin") or "nginx", "-c", str(config)])
    try:
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                break
            time.sleep(0.02)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait()


class _Sink(BaseHTTPRequestHandler):
    """Takes uploads in parts and forgets them."""

    protocol_version = "HTTP/1.1"
    block = memoryview(bytearray(1 << 20))

    def log_message(self, *_: object) -> None:
        pass

    def do_PUT(self) -> None:
        chunked = "Content-Length" not in self.headers  # pyarrow sends checksums behind the body
        while left := int(self.rfile.readline(), 16) if chunked else int(self.headers["Content-Length"]):
            while left:
                left -= self.rfile.readinto(self.block[: min(left, len(self.block))])
            if not chunked:
                break
            self.rfile.readline()
        if chunked:
            self.rfile.readline()
        self._say(b"")

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        kind = "InitiateMultipartUpload" if "uploads" in self.path else "CompleteMultipartUpload"
        self._say(
            f"<{kind}Result><Bucket>b</Bucket><Key>k</Key><UploadId>1</UploadId><ETag>&quot;e&quot;</ETag></{kind}Result>".encode()
        )

    def do_HEAD(self) -> None:
        self._say(b"")

    def _say(self, body: bytes) -> None:
        self.send_response(200)
        self.send_header("ETag", '"e"')
        self.send_header("Content-Type", "application/xml")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@contextlib.contextmanager
def sink() -> Iterator[str]:
    code = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import stores; stores.serve_sink()"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        yield process.stdout.readline().strip()
        process.kill()


def serve_sink() -> None:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Sink)
    print(f"http://127.0.0.1:{server.server_address[1]}", flush=True)
    server.serve_forever()


# --- memory ---------------------------------------------------------------------------------------------------------------------


def _anonymous() -> int:
    found = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(found[1]) * 1024 if found else 0


@contextlib.contextmanager
def peak_memory(result: dict[str, float]) -> Iterator[None]:
    """Anonymous memory beyond what there was at the start, at its highest (looked at every 5 ms), in MB."""
    over, before = threading.Event(), _anonymous()
    highest = before

    def watch() -> None:
        nonlocal highest
        while not over.wait(0.005):
            highest = max(highest, _anonymous())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield
    finally:
        over.set()
        watcher.join()
        result["mb"] = (highest - before) / MB


def upload(how: str, endpoint: str, total: int, part: int, flight: int) -> dict[str, float]:
    block = memoryview(os.urandom(4 << 20))

    def blocks() -> Iterator[bytes]:
        """Each one a copy: obstore keeps what it is given until it is sent, so that one buffer for all would hide its memory."""
        for _ in range(total // len(block)):
            yield bytes(block)

    result: dict[str, float] = {}
    client = STATED_CLIENT | {"timeout": "300s"}
    if how.startswith("obstore"):
        import obstore

        store = _obstore(endpoint, client)
        if "unsigned" in how:
            from obstore.store import S3Store

            store = S3Store(
                BUCKET,
                endpoint=endpoint,
                region="us-east-1",
                access_key_id="AKIA",
                secret_access_key="secret",
                client_options=client,
                unsigned_payload=True,
            )
        store.put("warm", b"x")
    else:
        store = _pyarrow(endpoint)
        with store.open_output_stream(f"{BUCKET}/warm") as out:
            out.write(b"x")
    with peak_memory(result):
        start, used = time.perf_counter(), time.process_time()
        if "put" in how:
            store.put(KEY, blocks(), chunk_size=part, max_concurrency=flight)
        elif "open_writer" in how:
            with obstore.open_writer(store, KEY, buffer_size=part, max_concurrency=flight) as writer:
                for each in blocks():
                    writer.write(each)
        else:
            with store.open_output_stream(f"{BUCKET}/{KEY}") as out:
                for each in blocks():
                    out.write(each)
        result |= {"s": time.perf_counter() - start, "cpu": time.process_time() - used}
    return result


def read_memory(client: str, endpoint: str, size: int, flight: int) -> dict[str, float]:
    read_all(client, endpoint, 1 << 20, 1)
    result: dict[str, float] = {}
    with peak_memory(result):
        result |= read_all(client, endpoint, size, flight)
    result["mb"] -= size * flight / MB  # the buffers that were asked for
    return result


# --- the tables -----------------------------------------------------------------------------------------------------------------


def apart(task: str, *arguments: object, times: int = 1) -> list[dict[str, float]]:
    """What processes of their own, this many at once, say of `task`."""
    command = [sys.executable, __file__, "--task", json.dumps([task, *arguments])]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(times)]
    said = [process.communicate()[0] for process in processes]
    return [json.loads(each) for each in said]


def reads(endpoint: str, rounds: int) -> None:
    cases = [(size, flight, times) for size in (8, 16) for flight in (1, 4, 8, 16) for times in (1, 2)]
    found: dict[tuple[Any, ...], list[tuple[float, float]]] = {}
    for _ in range(rounds):
        for size, flight, times in cases:
            for client in CLIENTS:
                said = apart("read_all", client, endpoint, size << 20, flight, times=times)
                rate = sum(FILE / each["s"] for each in said) / MB
                cpu = sum(each["cpu"] for each in said) / (FILE * times / GB)
                found.setdefault((size, flight, times, client), []).append((rate, cpu))
    print("## Ranged reads: MB/s in all (client's core seconds per GB)\n")
    print("| processes | MiB a range | in flight, each | " + " | ".join(CLIENTS) + " |")
    print("| --- " * (3 + len(CLIENTS)) + "|")
    for size, flight, times in sorted(cases, key=lambda case: (case[2], case[0], case[1])):
        row = [
            [statistics.median(column) for column in zip(*found[size, flight, times, client], strict=True)] for client in CLIENTS
        ]
        print(f"| {times} | {size} | {flight} | " + " | ".join(f"{rate:,.0f} ({cpu:.2f})" for rate, cpu in row) + " |")
    print()


def _row(what: str, size: int, said: dict[str, float]) -> None:
    print(f"| {what} | {said['mb']:.0f} | {size / said['s'] / MB:,.0f} | {said['cpu'] / size * GB:.2f} |", flush=True)


def memory(endpoint: str) -> None:
    print("## Memory beyond the caller's own buffers\n")
    print("| what | MiB a range or part | in flight | peak, MB | MB/s | core s per GB |\n| --- | --- | --- | --- | --- | --- |")
    for client in ("obstore", "obstore, streamed", "pyarrow", "httpx"):
        for size, flight in ((8, 4), (16, 4), (16, 16)):
            said = apart("read_memory", client, endpoint, size << 20, flight)[0]
            _row(f"read: {client} | {size} | {flight}", FILE, said)
    total = 5 * GB // (4 << 20) * (4 << 20)
    with sink() as into:
        for how in ("obstore put", "obstore put, unsigned", "obstore open_writer", "obstore open_writer, unsigned", "pyarrow"):
            for part, flight in ((8, 4), (16, 4), (16, 12), (64, 4)) if how.startswith("obstore") else ((0, 0),):
                said = apart("upload", how, into, total, part << 20, flight)[0]
                sizes = f"{part} | {flight}" if part else "its own | its own"
                _row(f"5 GB up: {how} | {sizes}", total, said)
    print()


FAULTS: dict[str, tuple[Any, int | None]] = {
    "503 SlowDown, 5 times": (answer(503, "SlowDown"), 5),
    "503 SlowDown, 20 times": (answer(503, "SlowDown"), 20),
    "503 with Retry-After: 1, 5 times": (answer(503, "SlowDown", retry_after=1), 5),
    "reset at once, 5 times": (reset(), 5),
    "reset after 1 MB, 5 times": (reset(MB), 5),
    "body cut after 1 MB, 5 times": (cut(MB), 5),
    "body cut after 1 MB, 9 times": (cut(MB), 9),
    "body cut after 0 bytes, 5 times": (cut(0), 5),
    "403 ExpiredToken, once": (answer(403, "ExpiredToken"), 1),
    "400 ExpiredToken, once": (answer(400, "ExpiredToken"), 1),
    "500 InternalError, 5 times": (answer(500, "InternalError"), 5),
    "no answer, once": (stall(), 1),
    "silence after 1 MB, once": (stall(MB), 1),
    "no answer, always": (stall(), None),
}
WAYS = {
    "obstore, defaults": "obstore",
    "obstore, stated": "obstore",
    "pyarrow, 3 attempts": "pyarrow",
    "pyarrow, 10 attempts": "pyarrow",
    "httpx": "httpx",
}
PATIENCE_S = 100


def one_read(way: str, endpoint: str) -> dict[str, Any]:
    """One range of 16 MiB; what came of it."""
    options: dict[str, Any] = {}
    if way == "obstore, defaults":
        options = {"client": {"allow_http": True}, "retry": {"max_retries": 10}}
    elif way == "pyarrow, 3 attempts":
        options = {"attempts": 3}
    read = reader(WAYS[way], endpoint, **options)
    buffer = memoryview(bytearray(16 << 20))
    start = time.perf_counter()
    try:
        read(buffer, 0)
        outcome = "read"
    except Exception as error:
        outcome = type(error).__name__
    return {"outcome": outcome, "s": time.perf_counter() - start}


def faults(endpoint: str) -> None:
    print("## One range of 16 MiB through the fault proxy: what came of it, seconds, GET requests\n")
    print("| fault | " + " | ".join(WAYS) + " |\n" + "| --- " * (1 + len(WAYS)) + "|")
    for name, (fault, times) in FAULTS.items():
        cells = []
        for way in WAYS:
            with FaultProxy(endpoint) as proxy:
                proxy.fail(fault, times, method="GET")
                command = [sys.executable, __file__, "--task", json.dumps(["one_read", way, proxy.endpoint])]
                with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
                    try:
                        said = json.loads(process.communicate(timeout=PATIENCE_S)[0])
                        outcome = f"{said['outcome']}, {said['s']:.1f} s"
                    except subprocess.TimeoutExpired:
                        process.kill()
                        outcome = f"nothing in {PATIENCE_S} s"
                cells.append(f"{outcome}, {len(proxy.about(method='GET'))}")
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)
    print()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="reads,memory,faults")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--task", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.task:
        task, *rest = json.loads(arguments.task)
        print(json.dumps(globals()[task](*rest)))
        return
    import httpx2
    import obstore
    import pyarrow

    print(f"# Clients of object stores, {time.strftime('%Y-%m-%d')}, {os.cpu_count()} cores, {platform.machine()}\n")
    versions = {"obstore": obstore, "pyarrow": pyarrow, "httpx2": httpx2}
    named = ", ".join(f"{name} {module.__version__}" for name, module in versions.items())
    print(f"{named}, Python {platform.python_version()}.\n")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        (folder / BUCKET).mkdir()
        with (folder / BUCKET / KEY).open("wb") as file:
            for _ in range(FILE >> 24):
                file.write(os.urandom(1 << 24))
        with nginx(folder) as endpoint:
            for what in arguments.only.split(","):
                {
                    "reads": lambda: reads(endpoint, arguments.rounds),
                    "memory": lambda: memory(endpoint),
                    "faults": lambda: faults(endpoint),
                }[what]()


if __name__ == "__main__":
    main()
