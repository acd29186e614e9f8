"""Ray nodes that are machines of their own, as far as one kernel allows: each has its own processes, /dev/shm and scratch, and a
power cut ends all of it at once. They share the network. Needs the right to make namespaces (root)."""

from __future__ import annotations

import contextlib
import os
import secrets
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
from clusters import BIN, Run, await_end, await_that, descendants, free_ports, owners_under, pcb_ray, running

BOOT_S = 120.0
SCRATCH = Path("/mnt")
"""The same path on all of them, and another folder on each."""


class Machine:
    """One node. `shm` and `scratch` are its /dev/shm and its SCRATCH, seen from here; they outlive a power cut."""

    def __init__(self, folder: Path, start: Sequence[object], environment: Mapping[str, str]) -> None:
        self.folder, self.shm, self.scratch = folder, Path("/dev/shm", folder.parent.name, folder.name), folder / "scratch"
        self._start, self._environment = [str(word) for word in start], {**os.environ, **environment}
        for path in (self.shm, self.scratch):
            path.mkdir(parents=True, exist_ok=True)
        self.log = folder / "log"
        self._unshare: subprocess.Popen[bytes] | None = None

    def boot(self) -> None:
        """Start it, once or again."""
        agent, agent_grpc, metrics, environments = free_ports(4)
        command = [BIN / "ray", "start", "--block", "--disable-usage-stats", "--node-ip-address", "127.0.0.1", *self._start]
        command += ["--object-store-memory", 80 << 20, "--temp-dir", self.folder / "ray", "--min-worker-port", 0]
        command += ["--max-worker-port", 0, "--dashboard-agent-listen-port", agent, "--dashboard-agent-grpc-port", agent_grpc]
        command += ["--metrics-export-port", metrics, "--runtime-env-agent-port", environments]
        script = f"mount --bind {self.shm} /dev/shm && mount --bind {self.scratch} {SCRATCH} && "
        script += f"echo node-{self.folder.name} > /proc/sys/kernel/hostname && "
        # A shell is process 1: it buries the orphans, as the first process of a machine does.
        script += f"{{ {shlex.join(map(str, command))} & wait $!; }}"
        with self.log.open("wb") as log:
            self._unshare = subprocess.Popen(
                ["unshare", "--pid", "--fork", "--kill-child", "--mount", "--mount-proc", "--uts", "sh", "-c", script],
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        await_that("a node starts", lambda: "Ray runtime started" in self.log.read_text() or not self.runs, BOOT_S)
        assert self.runs, self.log.read_text()

    @property
    def runs(self) -> bool:
        return self._unshare is not None and self._unshare.poll() is None

    @property
    def processes(self) -> list[psutil.Process]:
        """The first is its process 1."""
        return [] if self._unshare is None else descendants(self._unshare.pid)

    @property
    def owners(self) -> list[psutil.Process]:
        return [] if self._unshare is None else owners_under(self._unshare.pid)

    @property
    def rooms(self) -> list[Path]:
        """What runs keep here, or have left."""
        return [*self.shm.glob("pcb-ray-*/*"), *self.scratch.glob("pcb-ray-*/*")]

    def cut_power(self) -> None:
        """Kill the first process, and with it, at once, all others."""
        processes = self.processes
        if processes:
            processes[0].kill()
        if self._unshare is not None:
            self._unshare.wait(timeout=BOOT_S)
        await_end(processes)

    @property
    def _inside(self) -> list[str]:
        return ["nsenter", "--target", str(self.processes[0].pid), "--pid", "--mount", "--uts", "--wd"]

    def running(self, *arguments: Any) -> contextlib.AbstractContextManager[Run]:
        """A run of the command line on it."""
        return running(*arguments, env=self._environment, within=self._inside)

    def command(self, words: Sequence[object]) -> subprocess.CompletedProcess[str]:
        """Another command on it, that has ended well."""
        command = [*self._inside, *map(str, words)]
        return subprocess.run(command, env=self._environment, capture_output=True, text=True, check=True, timeout=BOOT_S)

    def pcb_ray(self, *arguments: Any) -> Run:
        return pcb_ray(*arguments, env=self._environment, within=self._inside)


def needs_namespaces() -> None:
    made = subprocess.run(
        ["unshare", "--pid", "--fork", "--mount", "--mount-proc", "mount", "-t", "tmpfs", "none", "/dev/shm"],
        capture_output=True,
        check=False,
    )
    if made.returncode:
        pytest.skip("no right to make namespaces here")


@contextlib.contextmanager
def machines(count: int, environment: Mapping[str, str]) -> Iterator[tuple[str, list[Machine]]]:
    """The address of a cluster, and its nodes: a head without CPUs, and so many of one CPU."""
    needs_namespaces()
    with tempfile.TemporaryDirectory(prefix="pcb") as folder:  # Ray's sockets lie in it, and their names may have 107 characters
        environment = {
            **environment,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "RAY_health_check_initial_delay_ms": "1000",  # a dead node is noticed within seconds
            "RAY_health_check_period_ms": "1000",
            "RAY_health_check_failure_threshold": "5",
        }
        gcs, client = free_ports(2)
        address = f"127.0.0.1:{gcs}"
        head = ["--head", "--port", gcs, "--ray-client-server-port", client, "--include-dashboard=false", "--num-cpus", 0]
        own = [head, *[["--address", address, "--num-cpus", 1]] * count]
        made = [Machine(Path(folder, str(k)), start, environment) for k, start in enumerate(own)]
        try:
            for machine in made:
                machine.boot()
            yield address, made
        finally:
            for machine in made:
                machine.cut_power()
            shutil.rmtree(made[0].shm.parent)
