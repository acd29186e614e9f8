"""The time limit of a trial: it ends the trial that is late and nothing that comes after it, whenever the alarm rings."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest

from pcb_ray.searching import scorer
from pcb_ray.searching.scorer import within

# The tests own the alarm: pytest-timeout would have it otherwise.
pytestmark = pytest.mark.timeout(300, method="thread")

LONG_S = 10_000.0


def wait() -> None:
    while True:
        signal.pause()


def is_clear(handler: Any = signal.SIG_DFL) -> bool:
    """Whether no alarm is left, and no thread that would end the process."""
    watching = [t for t in threading.enumerate() if t.name == scorer.WATCH]
    for thread in watching:
        thread.join(60)
    clear = not any(thread.is_alive() for thread in watching)
    return clear and signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0) and signal.getsignal(signal.SIGALRM) == handler


def test_a_call_in_time_gives_its_result_or_its_error():
    assert within(None, lambda: 1) == 1
    assert within(LONG_S, lambda: 2) == 2
    with pytest.raises(ZeroDivisionError):
        within(LONG_S, lambda: 1 // 0)
    assert is_clear()


def test_a_call_that_takes_too_long_is_interrupted():
    with pytest.raises(TimeoutError, match=r"longer than 0\.01 s"):
        within(0.01, wait)
    assert is_clear()


@pytest.mark.parametrize("body", ["while True: pass", "threading.Event().wait(0.2)"])
def test_a_call_that_does_not_mind_ends_with_its_process(body):
    program = f"""
import threading
from pcb_ray.searching import scorer
scorer.HANG_GRACE_S = 0.05
def call():
    while True:
        try:
            {body}
        except TimeoutError:
            pass
scorer.within(0.05, call)
"""
    assert subprocess.run([sys.executable, "-c", program], timeout=120).returncode == 1


def alarm_at(moment: int, call: Callable[[], Any]) -> bool:
    """Run it, and let the alarm ring once: before bytecode number `moment` of `within` after the call has begun; whether that
    came."""
    code, seen = within.__code__, 0

    def trace(frame: FrameType, event: str, _argument: Any) -> Any:
        nonlocal seen
        if frame.f_code is not code:
            return None
        frame.f_trace_opcodes = True
        if event == "opcode" and began:
            if seen == moment and signal.getsignal(signal.SIGALRM) not in (signal.SIG_DFL, None):
                seen += 1
                signal.raise_signal(signal.SIGALRM)
            else:
                seen += 1
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    finally:
        sys.settrace(before)
    return seen > moment


began: list[None] = []


def begin() -> str:
    began.append(None)
    return "scored"


def test_an_alarm_at_any_moment_of_the_end_leaves_nothing_that_could_end_the_next_trial(monkeypatch):
    def end_process(_code: int) -> None:
        ended.append(None)

    ended: list[None] = []
    monkeypatch.setattr(os, "_exit", end_process)
    outcomes = set()
    for moment in range(10_000):
        began.clear()
        try:
            came = alarm_at(moment, lambda: within(LONG_S, begin))
            outcomes.add("scored")
        except TimeoutError:
            came = True
            outcomes.add("late")
        assert is_clear(), f"bytecode {moment}"
        if not came:
            break
    assert moment > 30
    assert outcomes == {"scored", "late"}, "some came before the end, some were not heard"
    assert not ended


def test_an_alarm_that_was_set_before_rings_afterwards():
    def ring(_number: int, _frame: FrameType | None) -> None:
        rung.append(None)

    rung: list[None] = []
    signal.signal(signal.SIGALRM, ring)
    try:
        signal.setitimer(signal.ITIMER_REAL, LONG_S)
        within(LONG_S / 2, lambda: None)
        left, _ = signal.getitimer(signal.ITIMER_REAL)
        assert LONG_S / 2 < left <= LONG_S
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        with pytest.raises(TimeoutError):
            within(0.2, wait)
        while not rung:
            signal.pause()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
    assert is_clear()


def test_a_limit_within_a_limit_ends_what_is_within_only():
    def outer() -> str:
        with pytest.raises(TimeoutError, match=r"0\.01 s"):
            within(0.01, wait)
        return "went on"

    assert within(LONG_S, outer) == "went on"
    with pytest.raises(TimeoutError, match=r"0\.02 s"):
        within(0.02, lambda: (within(LONG_S, lambda: None), wait()))
    assert is_clear()
