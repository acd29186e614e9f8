"""Order statistics from counts are those of a sort, for any data, any partition and any bound on memory."""

from __future__ import annotations

import math
import pickle
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pcb_ray.selection import Bracket, Sample, Tally, adding_bytes, tally_bytes

quick = settings(max_examples=100, deadline=None, derandomize=True)
LIMITS = {32: 0x7F800000, 64: 0x7FF0000000000000}


def counted(keys: np.ndarray, bracket: Bracket, max_entries: int) -> Tally:
    tally = Tally(bracket, max_entries)
    inside = keys[(keys > bracket.lo) & (keys < bracket.hi)]
    below = (keys < bracket.lo, keys <= bracket.lo, keys < bracket.hi, keys <= bracket.hi)
    tally.add(*(int(b.sum()) for b in below), inside)
    return tally


def select_by_sweeps(
    parts: list[np.ndarray], rank: int, bracket: Bracket, max_entries: int, limit: int, most: int
) -> tuple[int, int]:
    """The key of this rank and the number of sweeps it took; fails after `most` sweeps."""
    for sweep in range(1, most + 1):
        tallies = [counted(part, bracket, max_entries) for part in parts]
        for tally in tallies:
            assert len(tally.keys) <= max_entries
        total = tallies[0]
        for tally in tallies[1:]:
            total.merge(pickle.loads(pickle.dumps(tally)))  # as an owner sends it
            assert len(total.keys) <= max_entries
        answer = total.select(rank, -limit, limit)
        if not isinstance(answer, Bracket):
            return answer, sweep
        every = np.concatenate(parts)
        assert answer.lo <= np.sort(every)[rank] <= answer.hi, "the narrower bracket must hold the key"
        assert (answer.hi - answer.lo) < (bracket.hi - bracket.lo) or not bracket.lo <= answer.lo <= answer.hi <= bracket.hi
        bracket = answer
    raise AssertionError(f"{most} sweeps did not decide rank {rank}; the last bracket is {bracket}")


def sweeps_enough(bits: int, max_entries: int) -> int:
    """A wrong first bracket costs one sweep, and each later one settles at least log2(max_entries) - 1 bits of the key, one at
    least."""
    return 2 + math.ceil((bits + 1) / max(1.0, math.log2(max_entries) - 1))


@st.composite
def keys_of(draw: st.DrawFn, bits: int) -> np.ndarray:
    limit, size = LIMITS[bits], draw(st.integers(1, 400))
    generator = np.random.default_rng(draw(st.integers(0, 2**32)))
    kind = draw(st.sampled_from(["any", "ties", "constant", "two", "zeros", "clusters", "powers", "ends", "normal"]))
    if kind == "any":
        keys = generator.integers(-limit, limit + 1, size=size)
    elif kind == "ties":
        keys = generator.integers(-3, 4, size=size)
    elif kind == "constant":
        keys = np.full(size, draw(st.integers(-limit, limit)))
    elif kind == "two":
        keys = generator.choice([draw(st.integers(-limit, limit)), draw(st.integers(-limit, limit))], size=size)
    elif kind == "zeros":
        keys = np.where(generator.random(size) < 0.9, 0, generator.integers(-limit, limit + 1, size=size))
    elif kind == "clusters":  # far apart, each of neighbouring keys
        centres = generator.integers(-limit // 2, limit // 2, size=3)
        keys = generator.choice(centres, size=size) + generator.integers(0, 64, size=size)
    elif kind == "powers":  # as dense near 0 as keys can be, over all scales
        keys = generator.choice([-1, 1], size=size) * (1 << generator.integers(0, bits - 2, size=size, dtype=np.int64))
    elif kind == "ends":
        keys = generator.choice([-limit, limit, limit - 1, 0, -1], size=size)
    else:
        keys = np.frombuffer(
            generator.normal(size=size).astype(np.float32 if bits == 32 else np.float64).tobytes(), dtype=f"i{bits // 8}"
        )
        magnitude = (keys.astype(np.int64) & ((1 << (bits - 1)) - 1)).astype(np.int64)
        keys = np.where(keys < 0, -magnitude, magnitude)
    return np.asarray(keys, dtype=np.int64)


@pytest.mark.parametrize("bits", [32, 64])
@quick
@given(data=st.data(), max_entries=st.sampled_from([2, 3, 5, 16, 64, 1000]))
def test_any_bracket_any_partition_and_any_bound_lead_to_the_exact_order_statistic(bits, data, max_entries):
    keys, limit = data.draw(keys_of(bits)), LIMITS[bits]
    rank = data.draw(st.integers(0, len(keys) - 1))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(keys)), max_size=5)))
    parts = data.draw(st.permutations(np.split(keys, cuts)))
    ends = st.one_of(st.sampled_from(keys[:10].tolist()), st.integers(-limit, limit))
    lo, hi = data.draw(st.sampled_from([(-limit, limit), tuple(sorted((data.draw(ends), data.draw(ends))))]))
    found, _ = select_by_sweeps(parts, rank, Bracket(lo, hi), max_entries, limit, sweeps_enough(bits, max_entries))
    assert found == np.sort(keys)[rank]


@quick
@given(data=st.data(), max_entries=st.sampled_from([2, 7, 50]))
def test_the_order_in_which_tallies_are_merged_does_not_matter(data, max_entries):
    keys = data.draw(keys_of(32))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(keys)), min_size=2, max_size=4)))
    bracket = Bracket(-LIMITS[32], LIMITS[32])
    parts = np.split(keys, cuts)

    def total(order: list[int], grouped: bool) -> Tally:
        tallies = [counted(parts[k], bracket, max_entries) for k in order]
        if grouped:  # as in a tree
            tallies[-2].merge(tallies[-1])
            tallies.pop()
        for tally in tallies[1:]:
            tallies[0].merge(tally)
        return tallies[0]

    first = total(list(range(len(parts))), False)
    other = total(data.draw(st.permutations(range(len(parts)))), True)
    assert (first.below_lo, first.upto_lo, first.below_hi, first.upto_hi) == (
        other.below_lo,
        other.upto_lo,
        other.below_hi,
        other.upto_hi,
    )
    for rank in range(len(keys)):
        assert first.select(rank, -LIMITS[32], LIMITS[32]) == other.select(rank, -LIMITS[32], LIMITS[32])


def test_ties_are_counted_and_not_collected():
    """Half of all values zero, a bracket around them: the tally stays small."""
    keys = np.concatenate((np.zeros(100_000, dtype=np.int64), np.arange(-50, 50)))
    tally = Tally(Bracket(-60, 60), 128)
    for part in np.split(keys, 77 * np.arange(1, 1300)):
        inside = part[(part > -60) & (part < 60)]
        tally.add(*(int(x.sum()) for x in (part < -60, part <= -60, part < 60, part <= 60)), inside.astype(np.int32))
        assert len(tally.keys) <= 128
    assert tally.select(50_000, -1000, 1000) == 0
    assert tally.shift == 0
    assert len(tally.keys) == 100
    assert tally.counts.sum() == len(keys)


def test_a_tally_is_bounded_and_travels_without_its_pending_keys():
    rng = np.random.default_rng(3)
    tally = Tally(Bracket(-LIMITS[32], LIMITS[32]), 1000)
    for _ in range(50):
        tally.add(0, 0, 700, 700, rng.integers(-(10**9), 10**9, size=700).astype(np.int32))
        assert len(tally.keys) <= 1000
        assert tally._pending_size <= 1000 + 700
    sent = pickle.loads(pickle.dumps(tally))
    assert sent._pending == []
    assert len(sent.keys) <= 1000
    assert sent.counts.sum() == 50 * 700
    assert len(pickle.dumps(tally)) < 1000 * 16 + 2000


@pytest.mark.parametrize("bits", [32, 64])
@pytest.mark.parametrize("max_entries", [150_000, 400_000])
def test_large_tallies_add_up_as_all_their_keys_do_and_in_the_memory_that_is_announced(bits, max_entries):
    """They are added a run of entries at a time: no key is cut in two, whatever bits were dropped before."""
    rng, limit = np.random.default_rng(bits), LIMITS[bits]
    most = max_entries * 7 // 8
    narrow = rng.integers(-(1 << 20), 1 << 20, size=most)
    wide = np.concatenate((rng.integers(-limit, limit, size=most // 2), rng.choice(narrow, size=most // 2)))
    counts_of = [np.unique(part, return_counts=True) for part in (narrow, wide)]
    for one, other in ((0, 1), (1, 0), (1, 1)):
        mine, theirs = Tally(Bracket(-limit, limit), max_entries), Tally(Bracket(-limit, limit), max_entries)
        for tally, part in ((mine, one), (theirs, other)):
            for piece in np.array_split((narrow, wide)[part], 16):
                tally.add(0, 0, len(piece), len(piece), piece)
            tally._compact()
        held = 2 * tally_bytes(max_entries)
        tracemalloc.start()
        mine.merge(theirs)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak <= adding_bytes(max_entries)
        assert held >= sum(array.nbytes for tally in (mine, theirs) for array in (tally.keys, tally.counts))
        every = np.concatenate([counts_of[part][0] for part in (one, other)])
        counts = np.concatenate([counts_of[part][1] for part in (one, other)])
        wanted, at = np.unique(every >> mine.shift, return_inverse=True)
        assert np.array_equal(mine.keys, wanted)
        assert np.array_equal(mine.counts, np.bincount(at, weights=counts).astype(np.int64))
        assert len(np.unique(every >> mine.shift - 1)) > max_entries if mine.shift else len(np.unique(every)) <= max_entries


# --- samples --------------------------------------------------------------------------------------------------------------------


def key_of(x: np.ndarray) -> np.ndarray:
    bits = x.astype(np.float32).view(np.int32).astype(np.int64)
    return np.where(bits >= 0, bits, -(bits & 0x7FFFFFFF))


def sampled(keys: np.ndarray, stride: int, run: int, shift: int = 15, seed: int = 0) -> Sample:
    rng = np.random.default_rng(seed)
    sample = Sample(shift)
    for k, at in enumerate(range(0, len(keys) - stride + 1, stride)):
        start = at + int(rng.integers(0, stride - run + 1))
        sample.add(keys[start : start + run].astype(np.int32), np.full(run, k))
    return sample


@pytest.mark.parametrize("q", [0.0, 1e-4, 0.01, 0.5, 0.9, 0.99, 1 - 1e-6])
@pytest.mark.parametrize("magnitude", [True, False])
def test_a_sample_of_data_that_drifts_along_the_model_brackets_the_rank(q, magnitude):
    D, missed, inside = 1 << 20, 0, []
    for seed in range(8):
        rng = np.random.default_rng(seed)
        drift = 1e-3 * (1 + 3 * np.linspace(0, 1, D) ** 2)  # deeper layers move more
        x = rng.normal(size=D) * drift
        keys = key_of(np.abs(x) if magnitude else x)
        rank = min(int(q * D), D - 1)
        # A bracket for few entries is narrow: that is put to the test here, not the widening.
        bracket = sampled(keys, 1 << 14, 1 << 10, seed=seed).bracket(rank, D, 0 if magnitude else -LIMITS[32], LIMITS[32], 1 << 12)
        missed += not bracket.lo <= np.sort(keys)[rank] <= bracket.hi
        inside.append(float(((keys > bracket.lo) & (keys < bracket.hi)).mean()))
    assert missed == 0
    assert max(inside) < 0.25, "a bracket that excludes little is no bracket"


def test_a_sample_that_misleads_costs_sweeps_and_never_the_answer():
    keys = np.sort(np.random.default_rng(1).integers(0, LIMITS[32], size=20_000))
    sample = Sample(15)
    sample.add(keys[:2000], np.zeros(2000, dtype=np.int64))  # the smallest alone
    for rank in (0, 1999, 2000, 10_000, 19_999):
        bracket = sample.bracket(rank, len(keys), 0, LIMITS[32], 1 << 19)
        found, _ = select_by_sweeps([keys], rank, bracket, 256, LIMITS[32], sweeps_enough(32, 256))
        assert found == keys[rank]


def test_an_empty_sample_brackets_everything():
    assert Sample(15).bracket(5, 10, -7, 9, 1 << 19) == Bracket(-7, 9)


@quick
@given(data=st.data())
def test_samples_add_up_in_any_order(data):
    parts = [data.draw(keys_of(32)) for _ in range(3)]
    order = data.draw(st.permutations(range(3)))

    def total(order: list[int]) -> Sample:
        samples = []
        for k in order:
            one = Sample(15)
            one.add(parts[k], np.full(len(parts[k]), k))
            samples.append(one)
        samples[0].merge(samples[1])
        samples[0].merge(samples[2])
        return samples[0]

    D = 10 * sum(len(p) for p in parts)
    for rank in (0, D // 3, D - 1):
        first, other = (total(each).bracket(rank, D, -LIMITS[32], LIMITS[32], 1 << 19) for each in ([0, 1, 2], order))
        assert first == other


def test_counts_that_can_not_belong_together_or_miss_some_are_told_with_and_without_asserts():
    """A rank beyond what was counted would be looked for for ever; counts against other brackets would decide it wrongly."""
    script = """if True:
        from pcb_ray.selection import Bracket, Sample, Tally
        import numpy as np
        one, other = Tally(Bracket(0, 9), 64), Tally(Bracket(0, 8), 64)
        one.add(0, 1, 2, 3, np.array([4]))
        for wrong in (
            lambda: one.select(3, -9, 9), lambda: one.merge(other), lambda: Sample(1).merge(Sample(2))
        ):
            try:
                wrong()
            except AssertionError as error:
                print(error)
    """
    for flags in ((), ("-O",)):
        done = subprocess.run([sys.executable, *flags, "-c", script], capture_output=True, text=True, check=True, timeout=60)
        assert len(done.stdout.splitlines()) == 3
        assert "rank 3 of 3 values" in done.stdout
