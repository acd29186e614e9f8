"""The short form of tests/benchmarks/soak.py: each of its faults once."""

from __future__ import annotations

from pathlib import Path

import pytest
from benchmarks.soak import FAULTS, FAULTS_EACH, soak

pytestmark = [pytest.mark.ray, pytest.mark.very_slow, pytest.mark.timeout(1200)]


def test_merges_whose_cluster_is_killed_piece_by_piece_are_right_and_leave_nothing(tmp_path: Path) -> None:
    found = soak(len(FAULTS) // FAULTS_EACH, seed=1, scale=600, folder=tmp_path)
    assert found.problems == []
    struck = [fault for one in found.merges for fault in one.faults]
    assert len(struck) == len(FAULTS)
    assert sum(one.attempts for one in found.merges) > len(found.merges)
