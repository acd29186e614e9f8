"""What the Ray tests share: one Ray for all of them, and runs of the command line that can be stopped and killed.

A run is a real `python -m pcb_ray merge` in a process group and a terminal of its own, followed by what it prints. A sweep shows
its bar when it begins; to hit it, a test waits for that bar and stops the driver (SIGSTOP) while it decides whom to kill."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import pty
import queue
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import termios
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import psutil

DEADLINE_S = 150.0  # for anything a test waits for: far more than it takes, so that only a hang meets it
SIDE_FILES = ("pcb_receipt.json", "README.md")  # they tell of the run; every other byte is a function of inputs and recipe


# --- outputs ---------------------------------------------------------------------------------------------------------------------


def digests(out: Path) -> dict[str, str]:
    """sha256 of all files of an output but those that tell of the run."""
    return {
        str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(out.rglob("*"))
        if path.is_file() and path.name not in SIDE_FILES
    }


def receipt_of(out: Path) -> dict[str, Any]:
    return dict(json.loads((out / "pcb_receipt.json").read_text()))


def state_of(out: Path) -> Path:
    """Where an unfinished merge to `out` is kept (DESIGN section 6)."""
    return out.parent / f".{out.name}.pcb-ray"


def flip(path: Path, at: int) -> None:
    """Change one bit of the byte at this place."""
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1]))


def executable(path: Path, script: str) -> None:
    """A command of the test's own, in bash."""
    path.write_text(f"#!/usr/bin/env bash\n{script}\n")
    path.chmod(0o755)


# --- Ray ------------------------------------------------------------------------------------------------------------------------


@functools.cache
def ray_address() -> str:
    """One Ray of 4 CPUs for the whole test session, in this process; the address that other processes join it by.

    Its owners compute with the torch kernel, so that runs on it and local ones (native, where built) must agree, and sweeps are
    slow enough to hit."""
    os.environ["RAY_AUTH_MODE"] = "token"
    os.environ["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] = "0"
    import ray

    os.environ["PCB_RAY_KERNEL"] = "torch"  # its raylet, and so every worker, inherits it
    try:
        ray.init(
            address="local",
            num_cpus=4,
            include_dashboard=False,
            object_store_memory=80 << 20,
            log_to_driver=False,
            logging_level="ERROR",
        )
    finally:
        del os.environ["PCB_RAY_KERNEL"]
    return str(ray.get_runtime_context().gcs_address)


def free_ports(count: int) -> list[int]:
    """Free ports of 127.0.0.1, all different."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()


class Head(NamedTuple):
    """A head node with a dashboard, which wants a token of its own."""

    process: subprocess.Popen[bytes]
    url: str
    address: str
    environment: Mapping[str, str]
    """For commands on this machine: an activated one, with the token."""
    folder: Path
    token: str

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])


BIN = Path(sys.executable).parent


@contextlib.contextmanager
def head_node(cpus: int = 2, path: str = "", start: Sequence[Any] = (), **variables: str) -> Iterator[Head]:
    """`ray start --head` on ports of its own, with more arguments and these variables; `path` comes before the PATH of an activated
    environment."""
    folder = Path(tempfile.mkdtemp(prefix="pcb"))  # Ray's sockets lie in it, and their names may have 107 characters
    token = secrets.token_hex(32)
    (folder / "token").write_text(token)
    environment = {
        **os.environ,
        "PATH": path or f"{BIN}:{os.environ['PATH']}",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(folder / "token"),
        **variables,
    }
    gcs, dashboard, client = free_ports(3)
    own = ["--port", gcs, "--dashboard-port", dashboard, "--ray-client-server-port", client, "--temp-dir", folder / "ray"]
    try:
        with node_of(["--head", "--dashboard-host", "127.0.0.1", *own, *start], cpus, environment, folder / "head.log") as process:
            url = f"http://127.0.0.1:{dashboard}"
            log = folder / "head.log"
            await_that(f"a head node starts ({log})", lambda: wants_token(url) or process.poll() is not None, DEADLINE_S)
            assert process.poll() is None, log.read_text()
            yield Head(process, url, f"127.0.0.1:{gcs}", environment, folder, token)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def joining_node(
    head: Head, name: str, *start: Any, cpus: int = 1, before: Sequence[str] = ()
) -> Iterator[subprocess.Popen[bytes]]:
    """A node that has joined."""
    log = head.folder / f"{name}.log"
    with node_of(["--address", head.address, *start], cpus, head.environment, log, before) as node:
        await_that(f"{name} joins ({log})", lambda: "Ray runtime started" in log.read_text(), DEADLINE_S)
        yield node


def node_apart(head: Head, name: str, *start: Any, cpus: int = 1) -> contextlib.AbstractContextManager[subprocess.Popen[bytes]]:
    """One that shares no memory with others of this machine, and has a name of its own: `/dev/shm` is another one there."""
    apart = ["unshare", "--mount", "--uts", "sh", "-c", f'mount -t tmpfs none /dev/shm && hostname {name} && exec "$0" "$@"']
    return joining_node(head, name, *start, cpus=cpus, before=apart)


def can_be_apart() -> bool:
    """Whether this user may make namespaces here."""
    return subprocess.run(["unshare", "--mount", "--uts", "true"], capture_output=True, check=False).returncode == 0


@contextlib.contextmanager
def node_of(
    start: Sequence[Any],
    cpus: int,
    environment: Mapping[str, str],
    log: Path,
    before: Sequence[str] = (),
    host: str = "127.0.0.1",
) -> Iterator[subprocess.Popen[bytes]]:
    """`ray start --block` with these arguments, as the command that `before` runs; `host` is its address."""
    agent, agent_grpc, metrics, environments = free_ports(4)
    command = [*before, BIN / "ray", "start", "--block", "--disable-usage-stats", "--num-cpus", cpus, *start]
    command += ["--node-ip-address", host, "--object-store-memory", 80 << 20, "--dashboard-agent-listen-port", agent]
    command += ["--dashboard-agent-grpc-port", agent_grpc, "--metrics-export-port", metrics]
    command += ["--runtime-env-agent-port", environments, "--min-worker-port", 0, "--max-worker-port", 0]
    with log.open("wb") as stream:
        process = subprocess.Popen([str(c) for c in command], env=environment, stdout=stream, stderr=stream, start_new_session=True)
    try:
        yield process
    finally:
        processes = descendants(process.pid)
        process.send_signal(signal.SIGTERM)  # and it ends what it started, and nothing else
        process.wait(timeout=DEADLINE_S)
        await_end(processes)


def wants_token(url: str) -> bool:
    """Whether a dashboard answers there, and asks for its token."""
    try:
        urllib.request.urlopen(f"{url}/api/version", timeout=5).close()
    except urllib.error.HTTPError as error:
        with error:
            return error.code == 401
    except OSError:
        return False
    return False


# --- runs -----------------------------------------------------------------------------------------------------------------------


class Run:
    """`python -m pcb_ray` as a process group of its own. `lines` are what it printed so far; each state of a progress bar is a
    line."""

    def __init__(
        self, *arguments: Any, env: Mapping[str, str] | None = None, keyboard: bool = False, within: Sequence[str] = ()
    ) -> None:
        """With `keyboard` what `type` gives is its input, as in a terminal: Ctrl-C too. `within` is a command that starts it."""
        self.lines: list[str] = []
        self._queue: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        ours, theirs = pty.openpty()
        termios.tcsetwinsize(theirs, (24, 160))
        self._terminal = ours
        try:
            self.process = subprocess.Popen(
                [*(["setsid", "--ctty"] if keyboard else []), *within, sys.executable, "-m", "pcb_ray", *map(str, arguments)],
                stdin=theirs if keyboard else subprocess.DEVNULL,
                stdout=theirs,
                stderr=theirs,
                env={**os.environ, "RAY_AUTH_MODE": "token", **(env or {})},
                start_new_session=not keyboard,
            )
        finally:
            os.close(theirs)
        self._reader = threading.Thread(target=self._read, args=(ours,), daemon=True)
        self._reader.start()

    def _read(self, terminal: int) -> None:
        rest = ""
        try:
            while data := os.read(terminal, 1 << 16):
                *lines, rest = re.split(r"[\r\n]+", rest + data.decode(errors="replace"))
                if rest.endswith("B/s]"):  # a whole bar: nothing ends it before the next one is shown
                    lines, rest = [*lines, rest], ""
                for line in filter(None, lines):
                    self._queue.put(line)
        except OSError:  # the last process that could write to the terminal is gone
            pass
        finally:
            os.close(terminal)
        self._queue.put(rest)
        self._queue.put(None)

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def text(self) -> str:
        return "\n".join(self.lines)

    def wait_for(self, *parts: str) -> str:
        """The next line that holds one of these parts."""
        deadline = time.monotonic() + DEADLINE_S
        while (line := self._next(deadline)) is not None:
            if any(part in line for part in parts):
                return line
        raise AssertionError(f"ended without printing {parts}:\n{self.text}")

    def _next(self, deadline: float) -> str | None:
        try:
            line = self._queue.get(timeout=max(0.0, deadline - time.monotonic()))
        except queue.Empty:
            raise AssertionError(f"nothing more was printed for too long:\n{self.text}") from None
        if line is not None:
            self.lines.append(line)
        return line

    def finish(self) -> int:
        """Its exit code, once it has ended and all it printed is in `lines`."""
        deadline = time.monotonic() + DEADLINE_S
        while self._next(deadline) is not None:
            pass
        return self.process.wait(timeout=DEADLINE_S)

    def type(self, text: str) -> None:
        os.write(self._terminal, text.encode())

    def send(self, number: int, *, group: bool = False) -> None:
        (os.killpg if group else os.kill)(self.pid, number)

    @contextlib.contextmanager
    def stopped(self) -> Iterator[None]:
        """The driver stands still meanwhile."""
        self.send(signal.SIGSTOP)
        try:
            yield
        finally:
            self.send(signal.SIGCONT)

    def close(self) -> None:
        """End what is left of it."""
        for process in [*descendants(self.pid), self.process]:
            with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
                process.kill()
        self.process.wait(timeout=DEADLINE_S)
        self._reader.join(timeout=DEADLINE_S)


@contextlib.contextmanager
def running(
    *arguments: Any, env: Mapping[str, str] | None = None, keyboard: bool = False, within: Sequence[str] = ()
) -> Iterator[Run]:
    """A run that doesn't outlive the block."""
    run = Run(*arguments, env=env, keyboard=keyboard, within=within)
    try:
        yield run
    finally:
        run.close()


def pcb_ray(*arguments: Any, env: Mapping[str, str] | None = None, within: Sequence[str] = ()) -> Run:
    """A run that has ended."""
    with running(*arguments, env=env, within=within) as run:
        run.finish()
        return run


def descendants(pid: int) -> list[psutil.Process]:
    try:
        return list(psutil.Process(pid).children(recursive=True))
    except psutil.NoSuchProcess:
        return []


def title(process: psutil.Process) -> str:
    """How a process calls itself; Ray's workers tell what they run. Empty if it is gone."""
    try:
        return " ".join(process.cmdline())
    except (psutil.NoSuchProcess, psutil.ZombieProcess):
        return ""


def owners_under(pid: int) -> list[psutil.Process]:
    """The owner processes that work below this process (a driver with its own Ray, or whoever started a cluster)."""
    return [p for p in descendants(pid) if title(p).startswith("ray::_Actor")]


def working(owner: psutil.Process) -> bool:
    """Whether it is answering a question just now."""
    return title(owner).startswith(("ray::_Actor.ask", "ray::_Actor.add"))


def await_that(what: str, condition: Any, timeout_s: float = 60.0) -> None:
    """Wait until `condition()`; fail with `what` if it takes too long."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"waited {timeout_s:.0f} s in vain: {what}"
        time.sleep(0.002)


def await_end(processes: Sequence[psutil.Process], timeout_s: float = 30.0) -> None:
    """Wait until all these processes have ended; fail with those that haven't."""
    deadline = time.monotonic() + timeout_s
    while left := [p for p in processes if lives(p.pid)]:
        assert time.monotonic() < deadline, f"still there after {timeout_s:.0f} s: {left}"
        time.sleep(0.05)


def lives(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
