"""Readers of files from anywhere share this: regular files only, strict JSON, and messages that are safe to print."""

from __future__ import annotations

import json
import re
import reprlib
import stat
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

from pcb_ray.errors import RequestError

MAX_JSON_BYTES = 100_000_000  # The safetensors library has this limit for a header; an index has the same here.
MAX_PROBLEMS = 100  # A wrecked header would otherwise have one for each tensor.

ANEW = "copy or download it again"


def mismatch(wanted: str, found: str, fix: str) -> str:
    """Say what is wrong, to follow the place in the message of an error."""
    return f"wanted {wanted}, found {found}. Fix: {fix}."


# ---------------------------------------------------------------------------------------------------- files


def open_regular(path: Path) -> BinaryIO:
    """Open a file to read it; a pipe or a device would block or never end."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise RequestError(f"{path}: {mismatch('a regular file', 'something else', 'give the model as files')}")
        return open(path, "rb")
    except OSError as error:
        raise RequestError(os_problem(path, error)) from None


def os_problem(path: Path | str, error: OSError) -> str:
    if isinstance(error, FileNotFoundError):
        return f"{path}: {mismatch('a file', 'none', f'{ANEW}, or mend the index that names it')}"
    return f"{path}: {mismatch('to read it', error.strerror or type(error).__name__, 'check the file and its permissions')}"


# ---------------------------------------------------------------------------------------------------- JSON


def strict_json(where: str, raw: bytes, *, constants: bool = False) -> Any:
    """Parse JSON, refusing repeated keys, and NaN and infinities unless `constants`."""
    repeated: list[str] = []

    def table(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) < len(pairs):
            repeated.extend(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        return result

    def constant(name: str) -> float:
        if constants:
            return float(name)
        raise ValueError(f"{name} is not a number of JSON")

    def integer(text: str) -> int | float:  # Other parsers take -0 for a floating number.
        return -0.0 if text == "-0" else int(text)

    try:
        value = json.loads(raw.decode(), object_pairs_hook=table, parse_int=integer, parse_constant=constant)
    except UnicodeDecodeError as error:
        raise RequestError(f"{where}: {mismatch('UTF-8', f'something else at byte {error.start} of the text', ANEW)}") from None
    except RecursionError:
        raise RequestError(f"{where}: {mismatch('plain JSON', 'JSON nested too deeply', ANEW)}") from None
    except ValueError as error:
        raise RequestError(f"{where}: {mismatch('JSON', f'something else: {clip(str(error))}', ANEW)}") from None
    if repeated:
        raise RequestError([f"{where}: {mismatch(f'one {show(key)}', 'several', ANEW)}" for key in repeated[:MAX_PROBLEMS]])
    return value


# ---------------------------------------------------------------------------------------------------- text


def is_unicode(value: Any) -> bool:
    return isinstance(value, str) and not re.search(r"[\ud800-\udfff]", value)


def is_plain_text(text: str) -> bool:
    """Tell whether a name can be written to a file, a terminal or a header: UTF-8, no control characters."""
    return not re.search(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]", text)


def is_inside(name: str) -> bool:
    """Tell whether a name that some file gives is one of a file or folder below its own, by its text."""
    parts = name.split("/")
    return is_plain_text(name) and "\\" not in name and len(name) < 1000 and all(map(_is_file_name, parts))


def _is_file_name(part: str) -> bool:
    return part not in ("", ".", "..") and len(part.encode()) < 256


_BRIEF = reprlib.Repr()
_BRIEF.maxstring = _BRIEF.maxother = 100
_BRIEF.maxlist = _BRIEF.maxtuple = 8


def show(value: Any) -> str:
    """Show a value in a message: it takes one short, printable line, be it nested a thousand deep or of a megabyte."""
    return clip(_BRIEF.repr(value))


def clip(text: str) -> str:
    return text if len(text) <= 120 else f"{text[:117]}..."


def some(names: Sequence[str]) -> str:
    return ", ".join(show(name) for name in names[:3]) + (", ..." if len(names) > 3 else "")
