"""Joining or starting a Ray cluster."""

from __future__ import annotations

import atexit
import contextlib
import ipaddress
import logging
import math
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

from pcb_ray.errors import RequestError, RunError, reason_in

log = logging.getLogger("pcb_ray")

_Answer = TypeVar("_Answer")

LOCAL_OBJECT_STORE_BYTES = 80 << 20  # near the smallest that Ray accepts; what does not fit goes to disk
MAX_TMPDIR = 107 - len("/ray/session_2026-11-27_00-00-00_000000_4194304/sockets/plasma_store.1")
"""A socket's path has at most 107 bytes; the rest of it is Ray's."""
HEAD_LOOK_S = 0.25  # often: where the driver's own raylet goes with the head, Ray soon ends the process, silently
HEAD_WAIT_S = 1.0
RECONNECT = "RAY_gcs_rpc_server_reconnect_timeout_s"
"""So long Ray waits for a head that is away, 60 s by default. Then it ends the process, with words of its own."""
TO_END_S = 15.0  # what we need to end before that
AUTH_MODE, ACCELERATORS = "RAY_AUTH_MODE", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"


@contextlib.contextmanager
def cluster(address: str | None) -> Iterator[None]:
    """Join the cluster at this address, or the one this job runs in, or start a local one; leave it (or end it) afterwards.

    A Ray that the caller already runs is used and left as it is. Raises RequestError if the address names another one; RunError if
    there is none."""
    if "ray" in sys.modules:
        import ray

        if ray.is_initialized():
            running = ray.get_runtime_context().gcs_address
            if address and not is_same_cluster(address, running):
                raise RequestError(
                    f"--address {address}: wanted this cluster, found that this process already uses the one at {running}. "
                    "Fix: leave the address out to use that one, or call ray.shutdown() first"
                )
            yield
            return
    address = address or os.environ.get("RAY_ADDRESS") or "local"
    defaults = {ACCELERATORS: "0"}  # the coming default; silences a warning
    if address == "local" and "ray" not in sys.modules:
        defaults[AUTH_MODE] = "token"  # authentication on, and no warning about it; Ray reads it when imported
    with _environment(defaults), _quiet_listeners():
        import ray

        _join(address)
        Head.is_lost = False
        try:
            yield
        finally:
            if Head.is_lost:
                atexit.register(_end_without_ray)
            else:
                ray.shutdown()


class Head:
    """The head of the cluster that this process has joined, which may go away, and come back as another one. What Ray asks it for
    meanwhile blocks; and if then another one answers, Ray aborts this process. So it is looked at by other means."""

    is_lost = False
    """Whether it is gone for good: then nobody needs to be told that this process leaves, and Ray would wait for it."""

    def __init__(self) -> None:
        import ray

        self._address: str = ray.get_runtime_context().gcs_address
        us: Any = ray._private.worker.global_worker
        self._cluster = us.gcs_client.cluster_id
        limit_s = float(os.environ.get(RECONNECT, "60"))
        self._patience_s = max(limit_s / 2, limit_s - TO_END_S)
        self._remembers = (
            noted_by_head(b"extra_usage_tag_gcs_storage", b"usage_stats") != b"memory"
        )  # as it notes for Ray's statistics
        self._looked_s, self._away_since_s = -math.inf, math.inf
        self._asking: threading.Thread | None = None

    def ask(self, question: Callable[[], _Answer]) -> _Answer | None:
        """What Ray asks it for; None while it is away. Raises RunError as `is_there` does, and what the question raises."""
        if not self.is_there() or (self._asking is not None and self._asking.is_alive()):
            return None
        answers: list[_Answer] = []
        failures: list[BaseException] = []

        def answer() -> None:
            try:
                answers.append(question())
            except BaseException as error:
                failures.append(error)

        self._asking = threading.Thread(target=answer, name="ask the head", daemon=True)  # it may be away before it has answered
        self._asking.start()
        while self._asking.is_alive():
            self._asking.join(HEAD_WAIT_S)
            if self._asking.is_alive() and not self.is_there():
                return None
        if failures:
            raise failures[0]
        return answers[0]

    def look_at_times(self) -> None:
        """Look whether it is there, if nobody has for a while. Raises RunError as `is_there` does."""
        if time.monotonic() - self._looked_s >= HEAD_LOOK_S:
            self.is_there()

    def is_there(self) -> bool:
        """Whether it answers now. Raises RunError if it has been away for too long, or is another one."""
        was_away, self._looked_s = self._away_since_s < math.inf, time.monotonic()
        host, _, port = self._address.rpartition(":")
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=HEAD_WAIT_S).close()
            is_another = was_away and self._is_another()
        except OSError as error:
            self._away_since_s = min(self._away_since_s, self._looked_s)
            away_s = self._looked_s - self._away_since_s
            if self._remembers or not isinstance(error, ConnectionRefusedError):
                if not was_away:
                    told = "the head of the cluster, %s, does not answer (%s); it is waited for %.0f s"
                    log.warning(told, self._address, error, self._patience_s)
                if away_s <= self._patience_s:
                    return False
            found = f"that it has not for {away_s:.0f} s" if was_away else "that nothing listens there any more"
            raise self._loss(f"wanted its head, {self._address}, to answer, found {found}") from None
        if is_another:
            raise self._loss(f"wanted the head that was joined, found that another one was started at {self._address}")
        if was_away:
            log.warning("the head of the cluster is back")
        self._away_since_s = math.inf
        return True

    def _loss(self, found: str) -> RunError:
        Head.is_lost = True
        return RunError(
            f"the cluster: {found}; what it knew of this run is lost with it. Fix: start a cluster, this one or another, and run "
            "the same with --resume; finished work is kept"
        )

    def _is_another(self) -> bool:
        """Whether one answers that is not of the cluster that was joined. Raises OSError if it does not answer yet."""
        import ray

        try:
            client: Any = ray._raylet.GcsClient(address=self._address)  # type: ignore[attr-defined]
        except ray.exceptions.AuthenticationError:  # it wants another token
            return True
        except ray.exceptions.RayError as error:
            raise OSError(reason_in(error)) from None
        return bool(client.cluster_id != self._cluster)


@contextlib.contextmanager
def watched_head() -> Iterator[None]:
    """For where Ray's own libraries wait, whom nobody can wake: if the head is lost meanwhile, that is told and this process ends
    with exit code 1. So it would too without this, a minute later, and with a traceback."""
    head, is_over = Head(), threading.Event()

    def watch() -> None:
        try:
            while not is_over.wait(HEAD_LOOK_S):
                head.is_there()
        except RunError as error:
            print(f"\npcb-ray: {error}", file=sys.stderr)  # a progress bar may stand in this line
            _end_without_ray()

    watcher = threading.Thread(target=watch, name="watch the head", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        is_over.set()
        watcher.join()


def is_same_cluster(address: str, running: str) -> bool:
    """Whether this address, as `--address` takes it, names the cluster whose address is `running` (host:port)."""
    if address == "auto":  # whichever runs
        return True
    host, _, port = address.rpartition(":")
    running_host, _, running_port = running.rpartition(":")
    if not host or port != running_port:  # `local` asks for a new one, `ray://host:port` goes by another port
        return False
    wanted, found = _addresses_of(host), _addresses_of(running_host)
    return bool(wanted & found) or (any(map(_is_ours, wanted)) and any(map(_is_ours, found)))


def check_cluster(address: str | None) -> None:
    """Whether a cluster can be joined at this address, or a local one started, as far as that can be told at once.

    Raises RequestError for one that can only be reached through Ray Client, since owners and trials need one to be joined; and for
    a temporary folder whose path is too long for the sockets of a local one."""
    address = address or os.environ.get("RAY_ADDRESS") or "local"
    if address.startswith("ray://"):
        raise RequestError(
            "--address: wanted a cluster to join, found ray://..., which is Ray Client. Fix: use `ray job submit`, or give "
            "HOST:6379 on a node of the cluster."
        )
    if address != "local" or ("ray" in sys.modules and sys.modules["ray"].is_initialized()):
        return
    variable = next((name for name in ("RAY_TMPDIR", "TMPDIR") if name in os.environ), "")
    folder = os.environ[variable] if variable else "/tmp"
    if len(os.fsencode(folder)) > MAX_TMPDIR:
        raise RequestError(
            f"{variable}: wanted a path of at most {MAX_TMPDIR} bytes, since Ray puts sockets below it, whose paths are bounded, "
            f"found {len(os.fsencode(folder))} bytes ({folder}). Fix: set RAY_TMPDIR to a short path, such as RAY_TMPDIR=/tmp."
        )
    if os.path.exists(folder) and not os.access(folder, os.W_OK):
        raise RequestError(
            f"{variable or 'the temporary folder'}: wanted a folder that can be written, where Ray puts sockets and logs, found "
            f"{folder}. Fix: set RAY_TMPDIR to one that can be written."
        )


def _join(address: str) -> None:
    import ray

    options: dict[str, Any] = {"address": address, "log_to_driver": False, "logging_level": logging.ERROR}
    if address == "local":
        options |= {"include_dashboard": False, "object_store_memory": LOCAL_OBJECT_STORE_BYTES}
    on_sigterm = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(**options)
    except (ConnectionError, ValueError, RuntimeError, ray.exceptions.RayError) as error:
        if address == "local":
            raise RunError(
                f"Ray: wanted to start it on this machine, found that it does not start: {reason_in(error)}. Fix: look after "
                "memory, disk and the number of processes here (its logs lie in `ray` below /tmp, RAY_TMPDIR or TMPDIR), or join a "
                "cluster with --address."
            ) from error
        raise RunError(
            f"--address {address}: wanted a Ray cluster, found none: {reason_in(error)}. Fix: start one with `ray start --head`, "
            "set RAY_AUTH_MODE=token if it asks for a token, or leave --address out for a local one."
        ) from error
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, on_sigterm)  # Ray's handler would end the process without a word


@contextlib.contextmanager
def _environment(defaults: Mapping[str, str]) -> Iterator[None]:
    """Set variables of the environment that are not set, and restore them afterwards, with what Ray set itself."""
    before = {name: os.environ.get(name) for name in (AUTH_MODE, ACCELERATORS)}
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    try:
        yield
    finally:
        for name, old in before.items():
            if old is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = old


def _end_without_ray() -> None:
    """End this process as one that has failed. Ray's own way to end waits for the head; without it the interpreter breaks down."""
    import ray

    us: Any = ray._private.worker.global_worker
    with contextlib.suppress(Exception):
        us.node.kill_all_processes(check_alive=False, allow_graceful=False)  # those that it has started, if it has
    with contextlib.suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(1)


def noted_by_head(key: bytes, namespace: bytes | None = None) -> bytes | None:
    """What Ray keeps at its head under a key. It has no public name for this."""
    import ray

    us: Any = ray._private.worker.global_worker
    found: bytes | None = us.gcs_client.internal_kv_get(key, namespace)
    return found


@contextlib.contextmanager
def _quiet_listeners() -> Iterator[None]:
    """Ray has threads that listen to the head, and end with a traceback when it is lost; that it is we say ourselves."""
    before = threading.excepthook

    def hook(what: threading.ExceptHookArgs) -> None:
        if what.thread is None or not what.thread.name.startswith("ray_"):
            before(what)

    threading.excepthook = hook
    try:
        yield
    finally:
        threading.excepthook = before


def _addresses_of(host: str) -> set[str]:
    """The IP addresses of a host; none if nobody knows it."""
    try:
        return {str(found[4][0]) for found in socket.getaddrinfo(host.strip("[]"), None)}
    except OSError:
        return set()


def _is_ours(address: str) -> bool:
    """Whether this IP address is one of this machine: a socket can be bound to no other."""
    family = socket.AF_INET6 if ipaddress.ip_address(address.partition("%")[0]).version == 6 else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.bind((address, 0))
        except OSError:
            return False
    return True
