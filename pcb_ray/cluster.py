"""Joining or starting a Ray cluster."""

from __future__ import annotations

import contextlib
import ipaddress
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator, Mapping
from typing import Any

from pcb_ray.errors import RequestError, RunError, reason_in

LOCAL_OBJECT_STORE_BYTES = 80 << 20  # near the smallest that Ray accepts; what does not fit goes to disk
MAX_TMPDIR = 107 - len("/ray/session_2026-11-27_00-00-00_000000_4194304/sockets/plasma_store.1")
"""A socket's path has at most 107 bytes; the rest of it is Ray's."""
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
    with _environment(defaults):
        import ray

        _join(address)
        try:
            yield
        finally:
            ray.shutdown()


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
