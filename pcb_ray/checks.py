"""Checks of what a user wrote: each takes a raw value and its place, and returns it in one form, or anything after a complaint in
`problems`."""

from __future__ import annotations

import difflib
import json
import math
import numbers
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

LARGEST = 3.4028234663852886e38  # of float32, in which the merge is computed
NO_FIXES: Mapping[str, str] = {}

UNITS = {
    "": 1,
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KIB": 1 << 10,
    "MIB": 1 << 20,
    "GIB": 1 << 30,
    "TIB": 1 << 40,
}

_SECRET = re.compile(
    r"""
    (?P<kept> :// | :/ ) [^/@\s:]* : [^/@\s]* (?=@)                  # user and password in an address; Path makes one slash of two
    | (?<=://) (?<!abfs://) (?<!abfss://) [^/@\s]+ (?=@)             # a user, or a token; not the container in abfs://CONTAINER@HOST
    | \b hf_[A-Za-z0-9]{30,}                                        # a token of the Hub
    | (?<=[?&]sig=) [^&\s'"]+                                       # of a signed address, as Azure makes them, or S3 and Google
    | (?<=-(?i:signature)=) [^&\s'"]+
    | (?<=TOKEN=|ECRET=|SWORD=|S_KEY=|I_KEY=|T_KEY=) [^\s$][^\s]{7,}  # NAME=value in a command
    """,
    flags=re.VERBOSE,
)
_SECRET_VARIABLE = re.compile(r"(SECRET|TOKEN|PASSWORD|_KEY)$")


def without_secrets(text: str) -> str:
    """A text as it may stand in messages, logs and records. Blotted out are Hub tokens, users, passwords and signatures in
    addresses, and what variables of this process's environment hold that are called a secret, token, password or key."""
    text = _SECRET.sub(r"\g<kept>***", text)
    for name, value in os.environ.items():
        if len(value) >= 8 and value in text and _SECRET_VARIABLE.search(name):
            text = text.replace(value, "***")
    return text


def shown(value: object) -> str:
    """A value as a message may show it: short, on one line, without a secret or what is inside it."""
    if isinstance(value, str):
        text = repr(without_secrets(value))
        return text if len(text) <= 62 else text[:59] + "..."
    if value is None:
        return "nothing"
    if isinstance(value, (bool, float)) or (isinstance(value, int) and value.bit_length() <= 64):
        return json.dumps(value)
    return f"a value of type {type(value).__name__}"


def wrong(where: str, wanted: str, found: object, fix: str) -> str:
    return f"{where}: wanted {wanted}, found {shown(found)}. Fix: {fix}."


def nearest(found: object, known: Sequence[str], otherwise: str = "") -> str:
    near = difflib.get_close_matches(found, known, n=1) if isinstance(found, str) else []
    return f"write `{near[0]}`" if near else otherwise or f"use one of {', '.join(known)}"


def section(
    raw: object, where: str, known: Sequence[str], problems: list[str], fixes: Mapping[str, str] = NO_FIXES
) -> dict[str, Any]:
    """What a mapping says under the known keys; `key:` with nothing after it counts as absent. `fixes` are for keys that are known
    elsewhere."""
    if not isinstance(raw, Mapping):
        problems.append(wrong(where, "`key: value` lines", raw, f"give some of {', '.join(known)}"))
        return {}
    for key in raw:
        if key not in known:
            fix = fixes.get(key) or nearest(key, known)
            problems.append(f"{where}: unknown key {shown(key)}. Fix: {fix}.")
    return present({key: raw.get(key) for key in known})


def present(section: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in section.items() if value is not None}


def number(raw: object, where: str, problems: list[str], *, is_fraction: bool = False, is_positive: bool = False) -> float:
    try:  # text too: YAML 1.1 reads 1e-3 as text, and people write it
        value = float(raw) if isinstance(raw, (numbers.Real, str)) and not isinstance(raw, bool) else math.nan
    except (ValueError, OverflowError):
        value = math.nan
    if is_fraction:
        is_right, wanted = 0 < value <= 1, "a number in (0, 1]"
    elif is_positive:
        is_right, wanted = 0 < value <= LARGEST, "a number above 0"
    else:
        is_right, wanted = abs(value) <= LARGEST, "a finite float32 number"
    if not is_right:
        problems.append(wrong(where, wanted, raw, "write one number such as 0.5 or 1e-3"))
    return value


def whole(raw: object, where: str, least: int, problems: list[str], most: int = 10**9) -> int:
    if isinstance(raw, int) and not isinstance(raw, bool) and least <= raw <= most:
        return raw
    wanted = f"a whole number of at least {least}" + (f" and at most {most}" if isinstance(raw, int) and raw > most else "")
    problems.append(wrong(where, wanted, raw, f"write one such as {max(least, 8)}"))
    return least


def flag(raw: object, where: str, problems: list[str]) -> bool:
    if not isinstance(raw, bool):
        problems.append(wrong(where, "true or false", raw, "write one of them, without quotes"))
    return raw is True


def size_of(raw: object) -> int | None:
    """'2GB' -> 2000000000; units kB MB GB TB (powers of 1000) and KiB MiB GiB TiB. None for what is no size."""
    match = re.fullmatch(r"\s*(\d{1,15}(?:\.\d+)?)\s*([a-zA-Z]*)\s*", str(raw))
    if not match or match[2].upper() not in UNITS:
        return None
    return int(float(match[1]) * UNITS[match[2].upper()]) or None


def text(raw: object, where: str, problems: list[str], wanted: str = "text") -> str:
    text = os.fspath(raw) if isinstance(raw, os.PathLike) else raw
    if isinstance(text, str) and text.strip() and text.isprintable():
        return text
    fix = "remove what is not printable" if isinstance(text, str) else "write it on one line, in quotes if it looks like a number"
    problems.append(wrong(where, wanted, raw, fix))
    return ""


def choice(
    raw: object, where: str, known: Sequence[str], problems: list[str], equivalents: Mapping[str, str] = NO_FIXES, more: str = ""
) -> str:
    """One of the known words; `more` tells what else would be right."""
    if isinstance(raw, str) and raw in known:
        return raw
    near = equivalents.get(raw) if isinstance(raw, str) else None
    known = [word for word in known if word]
    problems.append(wrong(where, " | ".join(known) + more, raw, f"`{near}` is the nearest" if near else nearest(raw, known)))
    return ""
