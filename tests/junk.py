"""What a user might write in any place of a section, and what may become of a file: for tests that it is taken or refused."""

from __future__ import annotations

import random
from typing import Any

from hypothesis import strategies as st


def places(of: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inside = of.items() if isinstance(of, dict) else enumerate(of) if isinstance(of, list) else ()
    return [at, *(place for key, value in inside for place in places(value, (*at, key)))]


def replaced(of: Any, at: tuple[Any, ...], junk: Any) -> Any:
    if not at:
        return junk
    inside = replaced(of[at[0]], at[1:], junk)
    return of | {at[0]: inside} if isinstance(of, dict) else [*of[: at[0]], inside, *of[at[0] + 1 :]]


scalars = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3) | st.sampled_from(["*", "a:b", "1e-3", "pcb"])
)
junk = st.recursive(
    scalars, lambda x: st.lists(x, max_size=2) | st.dictionaries(st.text(max_size=3) | st.integers(), x, max_size=2)
)


# --- files ------------------------------------------------------------------------------------------------------------------------

NASTY = [
    -1, 0, 1, 2**31, 2**32, 2**53 + 1, 2**63, 2**64, 10**300, True, False, None, 1.0, 4.5, 1e308, "", "F32", "BF16",
    "F8_E4M3", "U8", "x", "\ud800", "\x00", "../x", [], {}, [0], [0, 0], [-1], [2**62] * 4, [0, 4], [4, 0], [[1]],
    {"dtype": "F32", "shape": [], "data_offsets": [0, 4]}, {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]},
]  # fmt: skip


def mutate_json(rng: random.Random, value: Any) -> Any:
    """Change one place of a JSON value: replace, remove, double or swap."""
    if not isinstance(value, (dict, list)) or not value or rng.random() < 0.15:
        if isinstance(value, int) and rng.random() < 0.6:
            return value + rng.choice([-8, -4, -2, -1, 1, 2, 4, 8])
        return rng.choice(NASTY)
    keys = list(value) if isinstance(value, dict) else list(range(len(value)))
    key = rng.choice(keys)
    action = rng.random()
    changed: Any = value.copy()
    if action < 0.08:
        del changed[key]
    elif action < 0.16:
        other = rng.choice(keys)
        changed[key], changed[other] = changed[other], changed[key]
    elif action < 0.22 and isinstance(changed, dict):
        changed[str(rng.choice(NASTY))] = changed[key]
    elif action < 0.22:
        changed.append(changed[key])
    else:
        changed[key] = mutate_json(rng, value[key])
    return changed


def mutate_bytes(rng: random.Random, raw: bytes, other: bytes) -> bytes:
    """Flip, cut, insert, double, renumber or splice."""
    changed = bytearray(raw)
    for _ in range(rng.choice([1, 1, 1, 2, 5])):
        at = rng.randrange(len(changed) + 1)
        match rng.randrange(8):
            case 0 | 1 if at < len(changed):
                changed[at] ^= 1 << rng.randrange(8)
            case 2:
                del changed[at:]
            case 3:
                changed[at:at] = rng.choice([b'"', b"{", b"[", b"\\", b",", b"0", b"-", b"e9", b"\xff", b"\0", b" "])
            case 4:
                changed[at:at] = changed[at : at + rng.randrange(1, 40)]
            case 5:
                digits = [i for i, byte in enumerate(changed) if chr(byte).isdigit()]
                if digits:
                    changed[rng.choice(digits)] = rng.choice(b"0123456789")
            case 6:
                changed[at:] = other[rng.randrange(len(other)) :]
            case _:
                del changed[at : at + rng.randrange(1, 10)]
    return bytes(changed)
