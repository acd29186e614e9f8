"""One bar per sweep in a terminal, a few lines in a log."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Never, Self

from tqdm import tqdm

LOG_STEP = 0.25  # a log gets a line each time this share more is done,
LOG_PAUSE_S = 30.0  # or this time has passed,
LOG_MIN_S = 5.0  # but after the first never more often than this


def readable_bytes(count: float) -> str:
    """1234567 -> '1.23 MB' (powers of 1000)."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if count < 1000 or unit == "TB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.3g} {unit}" if count < 100 else f"{count:.0f} {unit}"
        count /= 1000
    raise AssertionError


class ByteBar:
    """Progress of one sweep over `total` bytes, on standard error."""

    def __init__(self, name: str, total: int, *, quiet: bool = False) -> None:
        self.name, self.total, self.done = name, total, 0
        self.quiet = quiet
        self._terminal = sys.stderr.isatty() and not quiet
        self._start = time.monotonic()
        self._last_line = self._start - LOG_MIN_S
        self._shown = 0.0
        self._bar: tqdm[Never] | None = None
        if self._terminal:
            self._bar = tqdm(total=total, desc=name, unit="B", unit_scale=True, dynamic_ncols=True, mininterval=0.2, smoothing=0.1)

    def advance(self, count: int) -> None:
        self.done += count
        if self._bar is not None:
            self._bar.update(count)
        elif not self.quiet:
            now, share = time.monotonic(), self.done / max(self.total, 1)
            pause_s = now - self._last_line
            if share < 1.0 and (pause_s >= LOG_PAUSE_S or (pause_s >= LOG_MIN_S and share - self._shown >= LOG_STEP)):
                rate = self.done / max(now - self._start, 1e-9)
                left = (self.total - self.done) / max(rate, 1e-9)
                self._line(
                    f"{share:4.0%} {readable_bytes(self.done)} of {readable_bytes(self.total)}, {readable_bytes(rate)}/s, "
                    f"{left:.0f} s left"
                )
                self._shown, self._last_line = share, now

    def _line(self, text: str) -> None:
        print(f"{self.name}: {text}", file=sys.stderr, flush=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        elapsed_s = time.monotonic() - self._start
        if self._bar is not None:
            self._bar.close()
        elif not self.quiet and kind is None:
            self._line(
                f"done, {readable_bytes(self.done)} in {elapsed_s:.1f} s, {readable_bytes(self.done / max(elapsed_s, 1e-9))}/s"
            )


class CountBar:
    """Progress over `total` things of a kind, with a few words on how it stands, on standard error."""

    def __init__(self, name: str, total: int, unit: str, *, quiet: bool = False) -> None:
        self.name, self.total, self.unit, self.quiet, self.done = name, total, unit, quiet, 0
        self._start = self._last_line = time.monotonic()
        self._bar: tqdm[Never] | None = None
        if sys.stderr.isatty() and not quiet:
            form = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} {unit}, {remaining} left{postfix}"
            self._bar = tqdm(total=total, desc=name, unit=unit, dynamic_ncols=True, bar_format=form)

    def note(self, words: str) -> None:
        """How it stands by now; a log has it with the next thing done."""
        if self._bar is not None:
            self._bar.set_postfix_str(words)

    def advance(self, words: str) -> None:
        self.done += 1
        now = time.monotonic()
        if self._bar is not None:
            self._bar.set_postfix_str(words, refresh=False)
            self._bar.update()
        elif not self.quiet and (now - self._last_line >= LOG_PAUSE_S or self.done == self.total):
            left_s = (now - self._start) / self.done * (self.total - self.done)
            told = [
                f"{self.name}: {self.done} of {self.total} {self.unit}",
                words,
                f"{left_s:.0f} s left" if self.done < self.total else "",
            ]
            print(", ".join(filter(None, told)), file=sys.stderr, flush=True)
            self._last_line = now

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
