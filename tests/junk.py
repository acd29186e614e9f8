"""What a user might write in any place of a section, for tests that it is taken or refused with a fix."""

from __future__ import annotations

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
