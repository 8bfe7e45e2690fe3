"""Exact sums and counts: equal to numpy's on all frames at once, however they are cut, merged or widened."""

from __future__ import annotations

import itertools
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from hotpixd.core.accumulator import COUNTS, Accumulator
from hotpixd.core.frame import SensorLayout
from hotpixd.core.kernels import HIGH, HIGH_OUTSTANDING, LOW, LOW_OUTSTANDING
from hotpixd.simulate import XTRANS

LAYOUTS = (
    SensorLayout(33, 27, "RGGB"),
    SensorLayout(14, 15, "LLLL"),
    SensorLayout(43, 42, XTRANS),
    SensorLayout(19, 11, "RGB", 3),
    SensorLayout(50, 7, "L"),
)
BITS = (HIGH, LOW, HIGH_OUTSTANDING, LOW_OUTSTANDING)
NEVER = np.full((3, 2), 1 << 40)
"""Limits no sample is at."""

THREADS = ThreadPoolExecutor(2)


def frames_of(layout: SensorLayout, n: int, dtype: str = "uint16", seed: int = 0, levels: int = 0) -> NDArray[Any]:
    """Return n frames of noise; of few `levels`, so that there are ties, if given."""
    largest = int(np.iinfo(dtype).max)
    return np.random.default_rng(seed).integers(0, levels or largest + 1, (n, *layout.shape)).astype(dtype)


def folded(frames: NDArray[Any], layout: SensorLayout, **how: Any) -> Accumulator:
    accumulator = Accumulator(layout, str(frames.dtype), **how)
    for frame in frames:
        accumulator.count(accumulator.fold(frame, lone=layout.mosaic), NEVER)
    return accumulator


class Loan:
    """What is lent, and is back when a test says so."""

    def __init__(self) -> None:
        self.back = {name: threading.Event() for name in (*COUNTS, "total", "squares")}

    def is_out(self, name: str) -> bool:
        return not self.back[name].is_set()

    def wait(self, name: str) -> None:
        assert self.back[name].wait(30.0)


def assert_same(one: Accumulator, other: Accumulator) -> None:
    assert (one.frames, one.counted) == (other.frames, other.counted)
    for name, array in one.arrays().items():
        np.testing.assert_array_equal(array, other.arrays()[name])


@given(st.sampled_from(LAYOUTS), st.sampled_from(("uint8", "uint16")), st.integers(1, 6), st.integers(1, 11))
@settings(max_examples=30, deadline=None, derandomize=True)
def test_what_is_lent_stays_as_it_is(layout: SensorLayout, dtype: str, before: int, more: int):
    """Another thread saves it, in whatever time that takes; folding goes on as far as it can, and then waits."""
    frames = frames_of(layout, before + more, dtype)
    accumulator = folded(frames[:before], layout)
    expected = folded(frames[:before], layout).arrays()
    loan = Loan()
    lent = accumulator.lend(loan)

    def fold_the_rest() -> None:
        for frame in frames[before:]:
            accumulator.count(accumulator.fold(frame, lone=layout.mosaic), NEVER)

    folding = THREADS.submit(fold_the_rest)
    while accumulator.frames == before:
        time.sleep(0.001)
    time.sleep(0.01)
    assert accumulator.must_wait
    assert accumulator.frames == before + 1
    for name, array in lent.items():
        np.testing.assert_array_equal(array, expected[name])
        loan.back[name].set()
        if name == COUNTS[-1]:
            while accumulator.frames < before + min(more, 4):
                time.sleep(0.001)
            time.sleep(0.01)
            assert accumulator.must_wait == (more >= 4)
            assert accumulator.frames == before + min(more, 4)
            assert not accumulator.may_sum_up
    folding.result()
    assert not accumulator.must_wait
    assert_same(accumulator, folded(frames, layout))


@given(st.sampled_from(LAYOUTS), st.sampled_from(("uint8", "uint16")), st.integers(1, 40), st.integers(0, 99))
@settings(max_examples=30, deadline=None, derandomize=True)
def test_sums_and_counts_equal_numpys_over_all_frames(layout: SensorLayout, dtype: str, n: int, seed: int):
    """What is folded frame by frame is what numpy computes from all frames at once, in Python's exact integers."""
    frames = frames_of(layout, n, dtype, seed)
    accumulator = Accumulator(layout, dtype)
    counts = np.zeros((4, *layout.shape), np.int64)
    for frame in frames:
        found = accumulator.fold(frame, lone=layout.mosaic)
        accumulator.count(found, NEVER)
        events = found.events[:, : layout.shape[1]]
        counts += np.stack([events & bit != 0 for bit in BITS])
    exact = frames.astype(np.uint64)
    np.testing.assert_array_equal(accumulator.total, exact.sum(axis=0))
    np.testing.assert_array_equal(accumulator.squares, (exact**2).sum(axis=0))
    every = np.arange(layout.size)
    np.testing.assert_array_equal(accumulator.counts_at(every), counts.reshape(4, -1))
    np.testing.assert_allclose(accumulator.mean(every), frames.mean(axis=0).ravel(), rtol=1e-12)
    mean, variance = accumulator.mean_and_variance(every)
    np.testing.assert_allclose(mean, frames.mean(axis=0).ravel(), rtol=1e-12)
    np.testing.assert_allclose(variance, frames.astype(float).var(axis=0).ravel(), rtol=1e-9)


def test_events_found_beside_others_leave_these_as_they_are():
    """The next frame is looked at while the events of the one before are counted."""
    layout = LAYOUTS[0]
    frames = frames_of(layout, 5, "uint16", 3)
    plain, ahead = (Accumulator(layout, "uint16") for _ in range(2))
    found = ahead.find(frames[0], lone=True)
    for frame, following in itertools.zip_longest(frames, frames[1:]):
        coming = None if following is None else ahead.find(following, lone=True, beside=True)
        ahead.add(frame)
        ahead.count(found, NEVER)
        expected = plain.fold(frame, lone=True)
        plain.count(expected, NEVER)
        np.testing.assert_array_equal(found.events, expected.events)
        assert found.fingerprint == expected.fingerprint
        found = coming
    assert_same(ahead, plain)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_merge_equals_one_pass_bit_for_bit(layout: SensorLayout):
    """Frames folded in two parts and merged leave the same integers and the same digest."""
    frames = frames_of(layout, 30)
    whole, part, rest = folded(frames, layout), folded(frames[:11], layout), folded(frames[11:], layout)
    part.merge(rest)
    assert_same(part, whole)
    assert part.digest(["a", "b"]) == whole.digest(["b", "a"])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_slabs_and_threads_leave_the_same_digest(layout: SensorLayout):
    """How the rows are spread over cores is no part of the state."""
    frames = frames_of(layout, 12)
    digests = {folded(frames, layout, slabs=n, each_slab=THREADS.map).digest() for n in (1, 2, 3, 4)}
    assert len(digests) == 1


def test_the_digest_names_its_frames_and_every_number():
    """Other keys, another sum or another count give another digest."""
    layout = LAYOUTS[0]
    accumulator = folded(frames_of(layout, 5), layout)
    digests = [accumulator.digest(), accumulator.digest(["x"])]
    for name in accumulator.arrays():
        accumulator.arrays()[name][3, 5] += 1
        digests.append(accumulator.digest())
    assert len(set(digests)) == len(digests)


def test_the_width_stored_in_is_no_part_of_the_digest():
    """Arrays widened before their time hold the same numbers, so the digest is the same."""
    layout = LAYOUTS[0]
    narrow = folded(frames_of(layout, 9), layout)
    wide = Accumulator(layout, "uint16")
    wide.restore({name: a.astype(np.uint64) for name, a in narrow.arrays().items()}, narrow.frames, narrow.counted)
    assert wide.digest() == narrow.digest()


@pytest.mark.parametrize("start", [253, 254, 255, 65_533, 65_534])
def test_counts_widen_before_they_overflow(start: int):
    """A sample that was extreme in every frame so far is counted on past the width's end."""
    layout = SensorLayout(21, 17, "L")
    accumulator = Accumulator(layout, "uint16")
    accumulator._make_room_for_counts(start)
    accumulator.counted = start
    frame = np.full(layout.shape, 100, np.uint16)
    frame[8, 9] = 60_000
    for name in ("high", "high_outstanding"):
        accumulator.counts[name][8, 9] = start
    for more in range(1, 5):
        limits = np.array([[start + more, start + more, 0], [1 << 40] * 3, [1 << 40] * 3])
        limits[0, 2] = start + more
        at_limit = accumulator.count(accumulator.fold(frame, lone=False), limits)
        expected = np.zeros((4, *layout.shape), np.uint64)
        expected[[0, 2], 8, 9] = start + more
        np.testing.assert_array_equal(np.stack(list(accumulator.counts.values())).astype(np.uint64), expected)
        assert at_limit.tolist() == [8 * 21 + 9]


@pytest.mark.parametrize(
    ("dtype", "start"),
    [("uint8", 66_049), ("uint8", 16_843_007), ("uint16", 65_535)],
    ids=["squares of 8 bit", "sums of 8 bit", "sums of 16 bit"],
)
def test_sums_widen_before_they_overflow(dtype: str, start: int):
    """Sums fast-forwarded to where full scale ends the width go on as numpy's uint64 would."""
    layout = SensorLayout(9, 8, "L")
    largest = int(np.iinfo(dtype).max)
    accumulator = Accumulator(layout, dtype)
    accumulator._make_room_for_sums(start)
    accumulator.frames = start
    accumulator.total[...] = start * largest
    accumulator.squares[...] = start * largest**2
    frame = np.full(layout.shape, largest, dtype)
    for more in range(1, 6):
        accumulator.fold(frame, lone=False)
        np.testing.assert_array_equal(accumulator.total.astype(np.uint64), np.uint64((start + more) * largest))
        np.testing.assert_array_equal(accumulator.squares.astype(np.uint64), np.uint64((start + more) * largest**2))
    assert accumulator.total.max() == (start + 5) * largest


def test_a_merge_widens_too():
    """Two halves that fit in 8 bits each are not wrapped by their merge."""
    layout = SensorLayout(8, 8, "L")
    halves = []
    for _ in range(2):
        half = Accumulator(layout, "uint8")
        half.counted = half.frames = 200
        for name in COUNTS:
            half.counts[name][...] = 200
        halves.append(half)
    halves[0].merge(halves[1])
    assert all((count == 400).all() for count in halves[0].counts.values())


@given(st.integers(2, 24), st.integers(0, 999), st.integers(2, 5))
@settings(max_examples=40, deadline=None, derandomize=True)
def test_samples_at_a_limit_are_named(n: int, seed: int, columns: int):
    """A sample at a limit is named, one below all of them never; in order, whatever the slabs."""
    layout = SensorLayout(33, 27, "RGGB")
    rng = np.random.default_rng(seed)
    # Limits as evidence makes them: they fall with the outstanding events.
    limits = np.sort(rng.integers(2, n + 2, (3, columns)), axis=1)[:, ::-1].copy()
    frames = frames_of(layout, n, seed=seed)
    # A few defects, so that outstanding events repeat.
    frames.reshape(n, -1)[:, rng.integers(0, layout.size, 5)] = 65_535
    one = Accumulator(layout, "uint16")
    cut = Accumulator(layout, "uint16", slabs=3, each_slab=THREADS.map)
    for frame in frames:
        found = one.fold(frame, lone=False)
        named = one.count(found, limits)
        np.testing.assert_array_equal(named, cut.count(cut.fold(frame, lone=False), limits))
        high, low, high_out, low_out = one.counts_at(np.arange(layout.size))
        at = np.zeros(layout.size, bool)
        for i, (k1, k2) in enumerate(((high, high_out), (low, low_out), (high + low, high_out + low_out))):
            at |= k1 >= limits[i, np.minimum(k2, columns - 1)]
        assert at[named].all()
        assert (np.diff(named) > 0).all()
        now_outstanding = (found.events[:, : layout.shape[1]] & 12 != 0).ravel()
        must = at & (now_outstanding | (high_out + low_out < 2))
        assert np.isin(np.flatnonzero(must), named).all()


def test_forgotten_counts_start_anew_and_sums_stay():
    """An epoch's end clears the evidence, not the pictures."""
    layout = LAYOUTS[0]
    frames = frames_of(layout, 8)
    accumulator = folded(frames[:5], layout)
    accumulator.forget_counts()
    for frame in frames[5:]:
        accumulator.count(accumulator.fold(frame, lone=True), NEVER)
    whole, last = folded(frames, layout), folded(frames[5:], layout)
    assert (accumulator.frames, accumulator.counted) == (8, 3)
    np.testing.assert_array_equal(accumulator.total, whole.total)
    np.testing.assert_array_equal(accumulator.squares, whole.squares)
    for name in COUNTS:
        np.testing.assert_array_equal(accumulator.counts[name], last.counts[name])


@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
def test_a_restored_state_goes_on_as_if_never_saved(dtype: str):
    """Arrays and the two numbers are all there is."""
    layout = LAYOUTS[3]
    frames = frames_of(layout, 20, dtype)
    whole, first = folded(frames, layout), folded(frames[:7], layout)
    second = Accumulator(layout, dtype)
    saved = {name: array.copy() for name, array in first.arrays().items()}
    second.restore(saved, first.frames, first.counted)
    for frame in frames[7:]:
        second.count(second.fold(frame, lone=False), NEVER)
    assert_same(second, whole)
    assert second.digest() == whole.digest()


def test_frames_of_another_shape_or_width_are_refused():
    """Nothing is folded, nothing changes."""
    layout = LAYOUTS[0]
    accumulator = folded(frames_of(layout, 2), layout)
    before = accumulator.digest()
    for wrong in (np.zeros((27, 34), np.uint16), np.zeros((33, 27), np.uint16), np.zeros(layout.shape, np.uint8)):
        with pytest.raises(ValueError, match="cannot be folded"):
            accumulator.fold(wrong, lone=True)
    assert accumulator.digest() == before


def test_other_refusals_name_what_is_wrong():
    """Too small a plane, a merge of two sensors, a saved state with an array missing or of another shape."""
    layout = LAYOUTS[0]
    accumulator = folded(frames_of(layout, 2), layout)
    for small in (SensorLayout(13, 40, "RGGB"), SensorLayout(42, 41, XTRANS), SensorLayout(7, 6, "RGB", 3)):
        with pytest.raises(ValueError, match="at least 7 rows and columns"):
            Accumulator(small, "uint16")
    for other in (Accumulator(layout, "uint8"), Accumulator(SensorLayout(33, 27, "GRBG"), "uint16")):
        with pytest.raises(ValueError, match="different sensors"):
            accumulator.merge(other)
    arrays = accumulator.arrays()
    for broken in ({**arrays, "low": arrays["low"][1:]}, {n: a for n, a in arrays.items() if n != "squares"}):
        with pytest.raises(ValueError, match="missing or not of shape"):
            Accumulator(layout, "uint16").restore(broken, 2, 2)


@given(st.sampled_from(("uint8", "uint16")), st.integers(1, 30), st.sampled_from((0, 2, 3)), st.integers(0, 999))
@settings(max_examples=40, deadline=None, derandomize=True)
def test_least_variance_ranks_as_welfords_algorithm_does(dtype: str, n: int, levels: int, seed: int):
    """Positions, squared deviations and means are the textbook's; ties go to the first position."""
    layout = SensorLayout(24, 16, "RGGB")
    frames = frames_of(layout, n, dtype, seed, levels)
    frames[:, 3, 4] = 7
    accumulator = folded(frames, layout)
    mean = np.zeros(layout.shape)
    m2 = np.zeros(layout.shape)
    for count, frame in enumerate(frames.astype(np.float64), start=1):
        delta = frame - mean
        mean += delta / count
        m2 += delta * (frame - mean)
    # Welford's M2 is rounded in its last digits: equal ones must tie before they are ranked.
    exact = n * (frames.astype(object) ** 2).sum(axis=0) - frames.astype(object).sum(axis=0) ** 2
    order = np.lexsort((np.arange(layout.size), exact.ravel().astype(np.float64)))
    for k in (1, 10, layout.size):
        sites, found_m2, found_mean = accumulator.least_variance(k)
        np.testing.assert_array_equal(sites, order[:k])
        np.testing.assert_allclose(found_m2, m2.ravel()[sites], rtol=1e-9, atol=1e-9 * np.iinfo(dtype).max)
        np.testing.assert_allclose(found_mean, mean.ravel()[sites], rtol=1e-12)
    first, _, _ = accumulator.least_variance(1)
    assert n == 1 or accumulator.mean_and_variance(first)[1] == 0


@pytest.mark.parametrize("held", [1, 1 << 30], ids=["summed at once", "summed by fours"])
def test_sites_are_told_of_alike_before_and_after_the_sums_are_made(held: int):
    """Frames may wait to be added to the sums together; no answer may depend on that."""
    layout = SensorLayout(40, 32, "RGGB")
    rng = np.random.default_rng(3)
    frames = rng.integers(0, 65536, (11, *layout.shape)).astype(np.uint16)
    accumulator = Accumulator(layout, "uint16", held_bytes=held)
    sites = rng.choice(layout.size, 9, replace=False)
    for n, frame in enumerate(frames, 1):
        accumulator.fold(frame, lone=False)
        exact = frames[:n].reshape(n, -1)[:, sites].astype(float)
        mean, variance = accumulator.mean_and_variance(sites)
        np.testing.assert_allclose(mean, exact.mean(axis=0), rtol=1e-12)
        np.testing.assert_allclose(variance, exact.var(axis=0), rtol=1e-9)
        if n % 5 == 0:
            every = np.arange(layout.size)
            np.testing.assert_allclose(accumulator.mean(every), frames[:n].mean(axis=0).ravel(), rtol=1e-12)
    accumulator.sum_up()
    np.testing.assert_array_equal(accumulator.total, frames.sum(axis=0, dtype=np.uint64))
