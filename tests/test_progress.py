"""A bar for people, a few lines for logs."""

from __future__ import annotations

import fcntl
import os
import pty
import struct
import subprocess
import sys
import termios

import pytest

from pcb_ray import progress
from pcb_ray.progress import ByteBar, readable_bytes


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


def run_sweep(clock: Clock, seconds: float, steps: int) -> None:
    with ByteBar("ranks", steps * 10**6) as bar:
        for _ in range(steps):
            clock.now += seconds / steps
            bar.advance(10**6)


@pytest.mark.parametrize(("seconds", "most"), [(0.1, 2), (20, 5), (600, 26), (36_000, 1206)])
def test_a_log_gets_few_lines_and_the_last_says_done(clock, capsys, seconds, most):
    run_sweep(clock, seconds, 5000)
    lines = capsys.readouterr().err.splitlines()
    assert 1 <= len(lines) <= most
    assert all(line.startswith("ranks: ") for line in lines)
    assert lines[-1].startswith("ranks: done, 5 GB in ")
    if seconds >= 600:
        assert len(lines) >= seconds / 40, "a sign of life every half minute"


def test_a_line_tells_share_speed_and_the_time_that_is_left(clock, capsys):
    with ByteBar("write", 10**9) as bar:
        clock.now += 50
        bar.advance(5 * 10**8)
    assert capsys.readouterr().err.splitlines()[0] == "write:  50% 500 MB of 1 GB, 10 MB/s, 50 s left"


def test_quiet_is_quiet_and_a_failed_sweep_is_not_done(clock, capsys):
    with ByteBar("a", 10, quiet=True) as bar:
        clock.now += 100
        bar.advance(5)
    with pytest.raises(ZeroDivisionError), ByteBar("b", 10):
        raise ZeroDivisionError
    with ByteBar("nothing", 0) as bar:
        bar.advance(0)
    assert "done" in (captured := capsys.readouterr()).err
    assert "a:" not in captured.err
    assert "b:" not in captured.err
    assert captured.out == ""


def test_a_terminal_gets_one_bar():
    program = (
        "import sys\n"
        "from pcb_ray.progress import ByteBar\n"
        "with ByteBar('ranks of beta', 1000) as bar:\n"
        "    for _ in range(1000): bar.advance(1)\n"
    )
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 24, 100, 0, 0))
    with subprocess.Popen([sys.executable, "-c", program], stderr=theirs) as process:
        os.close(theirs)
        shown = b""
        while True:
            try:
                part = os.read(ours, 4096)
            except OSError:  # so Linux tells that the other end is closed
                break
            if not part:
                break
            shown += part
    os.close(ours)
    assert process.returncode == 0
    text = shown.decode()
    assert "ranks of beta" in text
    assert "100%" in text
    assert text.count("\n") == 1, "one line, redrawn"


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1 kB"),
        (1_234_567, "1.23 MB"),
        (345_600_000, "346 MB"),
        (7.5e9, "7.5 GB"),
        (12e15, "12000 TB"),
    ],
)
def test_bytes_are_written_with_three_digits(count, text):
    assert readable_bytes(count) == text
