"""Runs a command and measures what it takes: wall time, and the memory of all its processes that the kernel can't take back."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

SAMPLE_S = 0.1


@dataclass(frozen=True)
class Measured:
    wall_s: float
    peak_bytes: int  # anonymous memory, private and shared, of the whole process tree; shared pages counted once
    output: str


def anonymous_bytes(pid: int) -> int:
    """Proportional share of anonymous and shared-memory pages of one process; pages of mapped files don't count."""
    try:
        rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except OSError:
        return 0  # it has just ended
    return sum(1024 * int(kib) for kib in re.findall(r"^Pss_(?:Anon|Shmem):\s+(\d+) kB", rollup, flags=re.MULTILINE))


def run(command: Sequence[str], *, cwd: Path | None = None, env: Mapping[str, str] | None = None) -> Measured:
    """Run to the end; RuntimeError with its output if it fails."""
    start, peak = time.monotonic(), 0
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, cwd=cwd, env={**os.environ, **(env or {})}, stdout=log, stderr=subprocess.STDOUT)
        while process.poll() is None:
            with contextlib.suppress(psutil.NoSuchProcess):
                tree = [process.pid, *(child.pid for child in psutil.Process(process.pid).children(recursive=True))]
                peak = max(peak, sum(anonymous_bytes(pid) for pid in tree))
            time.sleep(SAMPLE_S)
        wall_s = time.monotonic() - start
        log.seek(0)
        output = log.read()
    if process.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}:\n{output}")
    return Measured(wall_s, peak, output)
