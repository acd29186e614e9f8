"""The two ways in which a run ends badly, told apart because they have different exit codes."""

from __future__ import annotations

import os
import sysconfig
import traceback
from collections.abc import Iterable

from pcb_ray.checks import without_secrets

SHOWN_PROBLEMS = 20
_OURS = os.path.join(os.path.dirname(__file__), "")
_PYTHONS = os.path.join(sysconfig.get_path("stdlib"), "")


class RequestError(ValueError):
    """The request or an input is wrong: nothing was written, and the user can mend it (exit code 2).

    `problems` holds everything that was found wrong, one entry each, in the order of discovery; the message
    shows the first 20 and counts the rest.
    """

    def __init__(self, problems: str | Iterable[str]) -> None:
        self.problems: tuple[str, ...] = (problems,) if isinstance(problems, str) else tuple(problems)
        if not self.problems:
            raise AssertionError("a RequestError says what is wrong")
        super().__init__(*self.problems)

    def __reduce__(self) -> tuple[type[RequestError], tuple[tuple[str, ...]]]:
        return type(self), (self.problems,)  # the default would pass the problems one by one

    def __str__(self) -> str:
        lines = list(self.problems[:SHOWN_PROBLEMS])
        if hidden := len(self.problems) - len(lines):
            lines.append(f"... and {hidden} more of the same kind")
        return lines[0] if len(lines) == 1 else "\n".join(f"- {line}" for line in lines)


class InputError(RequestError):
    """No run of this request can succeed: what the inputs hold was seen to be in its way. Nothing of it is worth a resume."""


class RunError(RuntimeError):
    """The request was right but the run could not be finished (exit code 1): a full disk, a lost cluster."""


def reason_in(error: Exception | str) -> str:
    """What happened, of an error that Ray or Tune has wrapped: the last line, or the one that says that memory was short."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    found = next((line for line in lines if "low on memory" in line), lines[-1])
    return without_secrets(found.split(" Some common causes")[0])[:300]  # Ray's guesses, whatever happened


def with_place(error: BaseException) -> str:
    """What was raised and where, as in `ValueError: no data (my_eval.py:12)`: the innermost line in a file of the user's, or else
    of an installed package. To be called where the error is caught: Ray hands it on without its traceback."""
    what = ": ".join(part for part in (type(error).__name__, without_secrets(str(error))[:1000]) if part)
    lines = [(frame.f_code.co_filename, number) for frame, number in traceback.walk_tb(error.__traceback__)]
    file, number = max(reversed(lines), key=lambda line: _nearness(line[0]), default=("", 0))
    return f"{what} ({os.path.basename(file)}:{number})" if _nearness(file) else what


def _nearness(file: str) -> int:
    """2: the user's own, 1: of an installed package, 0: Python's, or ours, which raises what says by itself what to mend."""
    if not file or file.startswith((_OURS, "<")):
        return 0
    if "/site-packages/" in file or "/dist-packages/" in file:
        return 1
    return 0 if file.startswith(_PYTHONS) else 2
