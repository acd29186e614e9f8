"""Fixtures that several test files share."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import families
import psutil
import pytest
from clusters import await_end
from families import Family, MakeFamily

# What a shell starts in the background ignores Ctrl-C, and hands that on to the commands that tests interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def family(tmp_path: Path) -> MakeFamily:
    """Makes a family on disk: `family(n, folder=..., shards=..., config=..., **of families.fine_tuned)`."""
    made = 0

    def make(
        n: int = 3, *, folder: Path | None = None, shards: int = 1, config: object = families.CONFIG, **options: object
    ) -> Family:
        nonlocal made
        made += 1
        where = folder or tmp_path / f"family{made}"
        return Family(where, *families.fine_tuned(n, **options), shards=shards, config=config)

    return make


@pytest.fixture(scope="module")
def three_nodes() -> Iterator[Any]:
    """A cluster of three nodes of one core each, all on this machine."""
    from ray.cluster_utils import Cluster

    node = {"num_cpus": 1, "object_store_memory": 80 << 20}
    # A dead node is noticed within seconds; by default it takes Ray 15.
    impatient = {"health_check_initial_delay_ms": 1000, "health_check_period_ms": 1000, "health_check_failure_threshold": 3}
    cluster = Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False, "_system_config": impatient})
    try:
        for _ in range(2):
            cluster.add_node(**node)
        yield cluster
    finally:
        processes = [p for n in cluster.list_all_nodes() for infos in n.all_processes.values() for p in infos]
        cluster.shutdown()
        await_end([psutil.Process(p.process.pid) for p in processes if psutil.pid_exists(p.process.pid)])


@pytest.fixture
def small_disk(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Path]:
    """A file system of 16 MiB, or of another size as `mount` reads it."""
    size = getattr(request, "param", "16m")
    folder = tmp_path / "disk"
    folder.mkdir()
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("only root can mount a small file system")
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"can't mount a small file system: {mounted.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)
