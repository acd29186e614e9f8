"""A node that lives, and that nobody reaches: its network is cut, for real, in a network of namespaces of the kernel."""

from __future__ import annotations

import contextlib
import os
import secrets
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import families
import psutil
import pytest
from clusters import DEADLINE_S, await_end, await_that, descendants, node_of, owners_under, receipt_of, running
from families import Family

from pcb_ray.planning import plan

pytestmark = [pytest.mark.ray, pytest.mark.very_slow, pytest.mark.timeout(600)]
pytestmark += [pytest.mark.filterwarnings("ignore::ResourceWarning")]

ADDRESSES = ("10.231.78.1", "10.231.78.2", "10.231.78.3")
HOSTS = ("pcbcut1", "pcbcut2", "pcbcut3")
PORT = 6379


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


@pytest.fixture
def three_hosts() -> Iterator[None]:
    """Three machines as far as their networks go. The first has the switch, with a port for each of the others: v2 and v3."""
    if os.geteuid() != 0:
        pytest.skip("needs network namespaces: root only")
    first = HOSTS[0]
    try:
        for name in HOSTS:
            ip("netns", "add", name)
            ip("-n", name, "link", "set", "lo", "up")
        ip("-n", first, "link", "add", "br0", "type", "bridge")
        ip("-n", first, "address", "add", f"{ADDRESSES[0]}/24", "dev", "br0")
        ip("-n", first, "link", "set", "br0", "up")
        for number, (name, address) in enumerate(zip(HOSTS[1:], ADDRESSES[1:], strict=True), 2):
            ip("link", "add", f"v{number}", "netns", first, "type", "veth", "peer", "name", "eth0", "netns", name)
            ip("-n", first, "link", "set", f"v{number}", "master", "br0", "up")
            ip("-n", name, "address", "add", f"{address}/24", "dev", "eth0")
            ip("-n", name, "link", "set", "eth0", "up")
        yield
    finally:
        for name in HOSTS:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)


@contextlib.contextmanager
def ray_on(number: int, folder: Path, environment: dict[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    """A Ray node on this host: the head without CPUs, or one with one."""
    head = ["--head", "--port", PORT, "--include-dashboard", "false", "--temp-dir", folder / "ray"]
    start = head if number == 1 else ["--address", f"{ADDRESSES[0]}:{PORT}"]
    log, within = folder / f"{number}.log", ["ip", "netns", "exec", HOSTS[number - 1]]
    with node_of(start, int(number > 1), environment, log, within, ADDRESSES[number - 1]) as node:
        await_that(
            f"a node starts ({log})", lambda: "Ray runtime started" in log.read_text() or node.poll() is not None, DEADLINE_S
        )
        assert node.poll() is None, log.read_text()
        yield node


def test_a_node_that_is_cut_off_the_network_changes_no_byte(three_hosts: None, tmp_path: Path) -> None:
    """Its processes go on. What its worker has at hand the other one does after 2 seconds; what it has counted, when Ray's health
    checks of that node have failed: here within seconds."""
    one, out = Family(tmp_path / "family", *families.fine_tuned(2, scale=280)), tmp_path / "out"
    wanted = families.merge_locally(plan(one.recipe()), tmp_path / "wanted").files
    environment = {
        **os.environ,
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_health_check_initial_delay_ms": "1000",
        "RAY_health_check_period_ms": "1000",
        "RAY_health_check_timeout_ms": "2000",
        "RAY_health_check_failure_threshold": "3",
        "PCB_RAY_KERNEL": "torch",
    }
    with tempfile.TemporaryDirectory(prefix="pcb") as folder, contextlib.ExitStack() as stack:
        nodes = [stack.enter_context(ray_on(number, Path(folder), environment)) for number in (1, 2, 3)]
        arguments = ("merge", one.recipe_file(), out, "--address", f"{ADDRESSES[0]}:{PORT}", "--workers", 2)
        with running(*arguments, env=environment, within=["ip", "netns", "exec", HOSTS[0]]) as run:
            run.wait_for("ranks of |tau|: ")
            run.wait_for("ranks of |tau|: ")  # and some of it is counted
            with run.stopped():
                (owner,) = owners_under(nodes[2].pid)
                ip("-n", HOSTS[0], "link", "set", "v3", "down")
            run.wait_for("died (")
            assert owner.is_running(), "nobody has ended it"
            assert run.finish() == 0, run.text
        left = descendants(nodes[2].pid)
        ip("-n", HOSTS[0], "link", "set", "v3", "up")
        for process in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        await_end(left)
    assert receipt_of(out)["workers_lost"] == 1, run.text
    assert {name: (out / name).read_bytes() for name in wanted} == wanted
