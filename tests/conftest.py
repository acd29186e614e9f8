"""Fixtures that several test files share."""

from __future__ import annotations

from pathlib import Path

import families
import pytest
from families import Family, MakeFamily


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
