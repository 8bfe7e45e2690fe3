"""The compiled loops: their events are those of a slow reading of the definitions, bit for bit."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from conftest import environment
from hotpixd.core import kernels
from hotpixd.core.accumulator import Accumulator, FrameEvents
from hotpixd.core.frame import SensorLayout
from hotpixd.core.kernels import HIGH, HIGH_OUTSTANDING, LOW, LOW_OUTSTANDING
from hotpixd.simulate import XTRANS

KINDS = (("RGGB", 1), (XTRANS, 1), ("LLLL", 1), ("L", 1), ("RGB", 3))

THREADS = ThreadPoolExecutor(2)


@dataclass(frozen=True)
class Case:
    """A frame to fold, and how."""

    layout: SensorLayout
    samples: NDArray[Any]
    lone: bool
    slabs: int


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Small frames of every layout, with ties, zeros and full scale; from flat noise to a few lit sites."""
    colours, channels = draw(st.sampled_from(KINDS))
    period = 1 if channels > 1 else int(len(colours) ** 0.5)
    width, height = (7 * period + draw(st.integers(0, 3 * period + 12)) for _ in range(2))
    layout = SensorLayout(width, height, colours, channels)
    dtype = draw(st.sampled_from((np.uint8, np.uint16)))
    largest = int(np.iinfo(dtype).max)
    few = draw(st.lists(st.integers(0, largest), min_size=1, max_size=4))
    many = np.arange(largest + 1)
    palette = draw(
        st.sampled_from((np.array([0, largest]), np.array([0, 1, largest - 1, largest]), many, np.array(few)))
    )
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    samples = rng.choice(palette, layout.shape)
    if draw(st.booleans()):
        # A calm frame with a few samples far from it: outstanding ones, alone and side by side.
        lit = rng.random(layout.shape) < draw(st.sampled_from((0.002, 0.02, 0.2)))
        samples = np.where(lit, samples, draw(st.integers(0, largest - 3)) + rng.integers(0, 4, layout.shape))
    return Case(layout, samples.astype(dtype), draw(st.booleans()), draw(st.integers(1, 4)))


def events_by_definition(layout: SensorLayout, samples: NDArray[Any], lone: bool) -> NDArray[np.uint8]:
    """Return the event bits of each sample, read off the docstrings: slow, in int64, without a kernel."""
    events = np.zeros(layout.shape, np.uint8)
    centred = np.zeros(layout.shape, bool)
    for p in range(layout.plane_count):
        plane = layout.plane(samples, p).astype(np.int64)
        own_row, own_col = np.indices(plane.shape)
        # Seven rows and columns around the sample; at the border shifted inwards.
        first_row = np.clip(own_row - 3, 0, plane.shape[0] - 7)
        first_col = np.clip(own_col - 3, 0, plane.shape[1] - 7)
        windows = sliding_window_view(plane, (7, 7))[first_row, first_col].reshape(*plane.shape, 49)
        itself = (own_row - first_row) * 7 + own_col - first_col
        others = np.arange(49) != itself[..., None]
        neighbours = windows[others].reshape(*plane.shape, 48)
        top, bottom = neighbours.max(axis=-1), neighbours.min(axis=-1)
        reach = top - bottom + 1
        bits = HIGH * (plane > top) + LOW * (plane < bottom)
        bits += HIGH_OUTSTANDING * (2 * (plane - top) > reach) + LOW_OUTSTANDING * (2 * (bottom - plane) > reach)
        layout.plane(events, p)[...] = bits
        layout.plane(centred, p)[...] = itself == 24
    plain = {HIGH: events & 5 == 1, LOW: events & 10 == 2}
    outstanding = {HIGH: events & 4 != 0, LOW: events & 8 != 0}
    judged = np.zeros(layout.shape, np.uint8)
    for side in (HIGH, LOW):
        extremes_beside = touching(plain[side] | outstanding[side])
        kept = plain[side] & (~lone | (extremes_beside == 0))
        kept_out = outstanding[side] & (~lone | ((touching(outstanding[side]) == 0) & (extremes_beside < 2)))
        judged |= np.where(kept & centred, side, 0).astype(np.uint8)
        judged |= np.where(kept_out, side | side << 2, 0).astype(np.uint8)
    return judged


def touching(marked: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Return how many of the 8 adjacent sites are marked."""
    padded = np.pad(marked.astype(np.int64), 1)
    return sliding_window_view(padded, (3, 3)).sum(axis=(-1, -2)) - marked


def fold(case: Case, slabs: int | None = None, each_slab: Any = map) -> FrameEvents:
    accumulator = Accumulator(
        case.layout, str(case.samples.dtype), each_slab=each_slab, slabs=case.slabs if slabs is None else slabs
    )
    return accumulator.fold(case.samples, lone=case.lone)


def a_frame(layout: SensorLayout, lit: Iterable[tuple[int, int]] = (), *, slope: int = 0) -> Case:
    """A plain or a slope along the diagonal with sites far above it, judged."""
    rows, cols = layout.shape
    samples = (slope * np.add.outer(np.arange(rows), np.arange(cols)) + 20).astype(np.uint16)
    for site in lit:
        samples[site] = 2000
    return Case(layout, samples, True, 1)


@given(cases())
@settings(max_examples=150, deadline=None, derandomize=True)
def test_events_are_those_of_the_definitions(case: Case):
    """Windows, ties, borders, and the lone rule: all bits of all samples agree, padding is empty."""
    folded = fold(case)
    cols = case.layout.shape[1]
    np.testing.assert_array_equal(
        folded.events[:, :cols], events_by_definition(case.layout, case.samples, case.lone), strict=True
    )
    assert not folded.events[:, cols:].any()


@given(cases())
@settings(max_examples=60, deadline=None, derandomize=True)
def test_totals_phases_and_packed_bits_are_sums_over_the_events(case: Case):
    """What a frame's survey says is what one counts in its event bits."""
    folded = fold(case)
    events = folded.events
    bits = [np.count_nonzero(events & bit) for bit in (HIGH, LOW, HIGH_OUTSTANDING, LOW_OUTSTANDING)]
    np.testing.assert_array_equal(folded.totals, bits)
    pattern = (events & (HIGH | LOW) != 0) & (events & (HIGH_OUTSTANDING | LOW_OUTSTANDING) == 0)
    phases = np.zeros((kernels.PHASE_ROWS, kernels.PHASE_COLS), np.int64)
    row, col = np.nonzero(pattern)
    np.add.at(phases, (row % kernels.PHASE_ROWS, col % kernels.PHASE_COLS), 1)
    np.testing.assert_array_equal(folded.phases, phases)
    # Any order of a word's bits would do for counting those set in two frames; one bit per sample must remain.
    rows = np.arange(0, len(events), 2)
    packed = np.empty((len(rows), folded.words.shape[1]), np.uint8)
    kernels.pack_pattern(folded.words, rows, packed)
    set_bits = np.unpackbits(packed[..., None], axis=2).sum(axis=2)
    np.testing.assert_array_equal(set_bits, pattern[rows].reshape(len(rows), -1, 8).sum(axis=2))


@given(cases(), st.integers(2, 4))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_slabs_and_threads_change_nothing(case: Case, slabs: int):
    """Rows cut into slabs and spread over threads give the very same events as one pass."""
    one, cut = fold(case, slabs=1), fold(case, slabs=slabs, each_slab=THREADS.map)
    np.testing.assert_array_equal(one.events, cut.events)
    np.testing.assert_array_equal(one.totals, cut.totals)
    np.testing.assert_array_equal(one.phases, cut.phases)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("lone", [False, True])
def test_a_constant_frame_has_no_events(dtype: Any, lone: bool):
    """Extremes are strict: clipped sky, black frames and full scale are evidence of nothing."""
    layout = SensorLayout(31, 23, "RGGB")
    for level in (0, np.iinfo(dtype).max):
        folded = fold(Case(layout, np.full(layout.shape, level, dtype), lone, 1))
        assert not folded.events.any()


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_differences_do_not_wrap(dtype: Any):
    """Full scale among zeros is outstanding high, zero among full scale low, in the samples' own width."""
    layout = SensorLayout(15, 15, "L")
    largest = np.iinfo(dtype).max
    for level, other, bits in ((largest, 0, HIGH | HIGH_OUTSTANDING), (0, largest, LOW | LOW_OUTSTANDING)):
        samples = np.full(layout.shape, other, dtype)
        samples[7, 7] = level
        events = fold(Case(layout, samples, False, 1)).events
        assert events[7, 7] == bits
        assert np.count_nonzero(events) == 1


@pytest.mark.parametrize("colours", ["L", "RGGB", XTRANS])
def test_a_gradient_lights_no_border(colours: str):
    """At the border a window is not centred: a mere slope makes the last sample its maximum, which is no event."""
    layout = SensorLayout(61, 53, colours)
    assert not fold(a_frame(layout, slope=1)).events.any()


@example(site=(0, 0))
@example(site=(52, 60))
@example(site=(0, 60))
@example(site=(52, 0))
@given(site=st.tuples(st.integers(0, 52), st.integers(0, 60)))
@settings(max_examples=30, deadline=None, derandomize=True)
def test_a_lone_bright_site_is_seen_anywhere(site: tuple[int, int]):
    """Borders and corners of a mosaic included, and it lights no other site."""
    events = fold(a_frame(SensorLayout(61, 53, "RGGB"), [site])).events
    assert events[site] == HIGH | HIGH_OUTSTANDING
    assert np.count_nonzero(events) == 1


def test_a_detail_over_two_colours_is_no_event():
    """Of two adjacent sites of different colours neither counts; a step further apart both do."""
    layout = SensorLayout(61, 53, "RGGB")
    assert not fold(a_frame(layout, [(20, 20), (21, 21)], slope=1)).events.any()
    events = fold(a_frame(layout, [(20, 20), (22, 23)], slope=1)).events
    assert events[20, 20] & HIGH_OUTSTANDING
    assert events[22, 23] & HIGH_OUTSTANDING


@given(st.lists(st.integers(0, 2**64 - 1), min_size=0, max_size=20), st.integers(0, 2**32))
@settings(max_examples=50, deadline=None, derandomize=True)
def test_overlap_counts_the_bits_of_both(words: list[int], seed: int):
    """Equal to Python's own count of the bits set in the intersection."""
    a = np.array(words, np.uint64)
    b = np.random.default_rng(seed).integers(0, 2**64, len(words), np.uint64)
    assert kernels.overlap(a, b) == sum((int(x) & int(y)).bit_count() for x, y in zip(a, b, strict=True))


def test_numba_loads_no_scipy_for_them_and_others_can(tmp_path):
    """It would for its linear algebra, at every start."""
    (tmp_path / "scipy").mkdir()
    (tmp_path / "scipy" / "__init__.py").write_text("__version__ = '1.16.0'\nprint('loaded')\n")
    code = "from hotpixd.core.sensor import warm_up; warm_up(); print('warm'); import scipy"
    env = environment()
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**env, "PYTHONPATH": f"{tmp_path}{os.pathsep}{env['PYTHONPATH']}"},
        capture_output=True,
        text=True,
    )
    assert done.stdout.split() == ["warm", "loaded"], done.stderr
