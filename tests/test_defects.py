"""What is wrong with a site: known series of observations are told apart, and numbers come out as planted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from hotpixd.core import defects
from hotpixd.core.accumulator import Accumulator
from hotpixd.core.defects import classify, dark_current, noise_of, observe, recovery_steps, weigh
from hotpixd.core.frame import Frame, SampleKind, SensorIdentity, SensorLayout, ShotInfo, ShotKind
from hotpixd.core.tracks import Kind, Tracks

LAYOUT = SensorLayout(40, 30, "RGGB")
SITE = 12 * 40 + 17
BLACK, WHITE = 512.0, 16383.0
NOISE = 8.0
FLOOR = 3.0

RAW = SensorIdentity("Maker", "Model", "1", SampleKind.RAW, LAYOUT, "uint16")
RENDERED = SensorIdentity("Maker", "Model", "1", SampleKind.RENDERED, LAYOUT, "uint16")


@dataclass(frozen=True)
class Shown:
    """What a series of shots made of one site."""

    kind: Kind
    rate: float
    share_on: float
    dark_current: float
    dark_current_iso: float
    tracks: Tracks


def shots(
    sites: Sequence[float] | NDArray[Any],
    exposures: Sequence[float] | NDArray[Any],
    *,
    isos: Sequence[float] | None = None,
    fixed: bool = False,
    kind: ShotKind = ShotKind.LIGHT,
    identity: SensorIdentity = RAW,
    seed: int = 0,
) -> list[Frame]:
    """Return shots of changing light in which SITE has an excess of so many ADU, or a `fixed` value."""
    rng = np.random.default_rng(seed)
    frames = []
    for i, (site, exposure) in enumerate(zip(sites, exposures, strict=True)):
        light = 0.0 if kind is ShotKind.DARK else rng.uniform(500, 4000)
        values = BLACK + light + rng.normal(0, NOISE, LAYOUT.shape)
        if fixed:
            values.flat[SITE] = site
        else:
            values.flat[SITE] += site
        samples = np.clip(np.rint(values), 0, WHITE).astype(np.uint16)
        info = ShotInfo(float(exposure), 100.0 if isos is None else isos[i])
        frames.append(Frame(identity, samples, kind, info, BLACK, WHITE))
    return frames


def shown(frames: Sequence[Frame], *, rendered: bool = False) -> Shown:
    """Observe the site in all shots and classify it."""
    identity = RENDERED if rendered else RAW
    tracks = Tracks(LAYOUT)
    tracks.add(np.array([SITE]), np.array([20.0]), seq=1)
    accumulator = Accumulator(LAYOUT, "uint16")
    noise = np.zeros(LAYOUT.plane_count)
    for frame in frames:
        events = accumulator.fold(frame.samples, lone=True)
        accumulator.count(events, np.full((3, 2), 1 << 40))
        tracks.observe(np.array([0]), observe(frame, events.events, tracks, np.array([0])))
        noise += noise_of(frame, LAYOUT) ** 2
    suspects = weigh(accumulator, tracks, np.sqrt(noise / len(frames)), BLACK)
    counts = accumulator.counts_at(np.array([SITE]))
    classify(tracks, suspects, counts, identity.samples, WHITE, FLOOR)
    current, iso = dark_current(tracks, identity.samples, WHITE)
    row = tracks.rows[0]
    return Shown(Kind(row["kind"]), row["rate"], row["share_on"], current[0], iso[0], tracks)


def spread_out(n: int) -> NDArray[np.float64]:
    return np.geomspace(0.2, 4.0, n)


def test_the_noise_is_that_of_one_frame():
    """Within 10 %, per plane, with a defect and an edge in the frame."""
    (frame,) = shots([9000.0], [1.0])
    frame.samples[:, :8] //= 2
    np.testing.assert_allclose(noise_of(frame, LAYOUT), NOISE, rtol=0.15)


@given(st.lists(st.integers(0, 65535), min_size=1, max_size=40))
def test_the_median_of_integers_is_numpys(values: list[int]):
    assert defects._median_of_integers(np.array([values], np.int32)) == np.median(values)


def test_an_observation_is_what_the_frame_shows():
    """Value, excess over the neighbours' median, their spread, and how the shot was taken."""
    (frame,) = shots([300.0], [2.0], isos=[400.0])
    tracks = Tracks(LAYOUT)
    tracks.add(np.array([SITE]), np.array([20.0]), seq=1)
    events = Accumulator(LAYOUT, "uint16").fold(frame.samples, lone=True).events
    (seen,) = observe(frame, events, tracks, np.array([0]))
    assert seen["value"] == frame.samples.flat[SITE]
    assert seen["excess"] == pytest.approx(300, abs=5 * NOISE)
    assert seen["spread"] == pytest.approx(NOISE, rel=0.6)
    assert (seen["exposure"], seen["gain"], seen["dark"]) == (2.0, 4.0, 0)
    assert seen["events"] & 5 == 5


@pytest.mark.parametrize("kind", ShotKind)
def test_an_excess_linear_in_exposure_is_hot_with_its_dark_current(kind: ShotKind):
    """Planted 700 ADU/s, found within 5 %."""
    exposures = spread_out(40)
    found = shown(shots(700 * exposures, exposures, kind=kind))
    assert found.kind is Kind.HOT
    assert found.dark_current == pytest.approx(700, rel=0.05)
    assert found.share_on == 1


def test_the_dark_current_is_stated_at_the_median_iso():
    """Excess grows with ISO too: 700 ADU/s at ISO 100 is 2800 at ISO 400."""
    exposures = spread_out(30)
    isos = [200.0] * 10 + [400.0] * 10 + [800.0] * 10
    found = shown(shots(700 * exposures / 4 * np.array(isos) / 100, exposures, isos=isos))
    assert found.dark_current_iso == 400
    assert found.dark_current == pytest.approx(700, rel=0.05)


def test_saturated_observations_do_not_lower_the_dark_current():
    """In the longer half the site is at full scale; the others tell its 9000 ADU/s."""
    exposures = spread_out(40)
    found = shown(shots(9000 * exposures, exposures))
    assert found.kind is Kind.HOT
    assert found.dark_current == pytest.approx(9000, rel=0.05)
    assert found.rate == pytest.approx(9000, rel=0.05)


def test_one_exposure_tells_bright_not_hot():
    """Whether an excess is leakage only other exposures or darks can tell."""
    assert shown(shots([400.0] * 30, [1.0] * 30)).kind is Kind.BRIGHT
    assert shown(shots([400.0] * 30, [1.0] * 30, kind=ShotKind.DARK)).kind is Kind.HOT


def test_an_excess_that_does_not_grow_with_exposure_is_bright():
    """An offset, not a leak; it was called unstable, being less than foreseen in long exposures."""
    found = shown(shots([400.0] * 40, spread_out(40)))
    assert found.kind is Kind.BRIGHT
    assert found.share_on == 1


@pytest.mark.parametrize("duty", [0.25, 0.5, 0.75])
def test_an_excess_that_comes_and_goes_is_unstable_with_its_duty(duty: float):
    """Telegraph noise: the share of frames in which it was on, within 0.1; its rate is that of the on-times."""
    exposures = np.geomspace(0.5, 2.0, 60)
    on = np.random.default_rng(1).permutation(60) < duty * 60
    found = shown(shots(1500 * exposures * on, exposures))
    assert found.kind is Kind.UNSTABLE
    assert found.share_on == pytest.approx(duty, abs=0.1)
    assert found.rate == pytest.approx(1500, rel=0.15)


@pytest.mark.parametrize("level", [1500.0, 2500.0, WHITE])
def test_a_value_that_never_changes_is_stuck(level: float):
    """Below, within and above the scene; with its level."""
    found = shown(shots([level] * 40, spread_out(40), fixed=True))
    assert found.kind is Kind.STUCK
    assert found.tracks.rows["level"][0] == level


def test_no_response_to_light_is_dead():
    """Always the black level, though its neighbours are lit; with a little noise as well."""
    rng = np.random.default_rng(2)
    assert shown(shots([BLACK] * 40, spread_out(40), fixed=True)).kind is Kind.DEAD
    assert shown(shots(BLACK + rng.normal(0, NOISE, 40), spread_out(40), fixed=True)).kind is Kind.DEAD


def test_a_weak_response_is_dim():
    """Less light than the neighbours, but not none."""
    assert shown(shots([-200.0] * 40, spread_out(40))).kind is Kind.DIM


@pytest.mark.parametrize("kind", ShotKind)
def test_an_excess_below_the_floor_is_warm(kind: ShotKind):
    """What a single frame's noise hides matters to nobody."""
    exposures = np.geomspace(0.8, 1.2, 40)
    assert shown(shots(NOISE * exposures, exposures, kind=kind)).kind is Kind.WARM


def test_rendered_samples_state_no_dark_current():
    """They are not proportional to the exposure."""
    found = shown(shots([400.0] * 30, spread_out(30), identity=RENDERED), rendered=True)
    assert np.isnan(found.dark_current)
    assert found.rate == pytest.approx(400, rel=0.05)


def steps(found: Shown, frame: Frame) -> tuple[bool, float]:
    """Return whether one more frame shows the defect, and how much it speaks for its recovery."""
    nothing = np.zeros(LAYOUT.shape, np.uint8)
    seen = observe(frame, nothing, found.tracks, np.array([0]))
    defective, step = recovery_steps(found.tracks.rows, seen, True, WHITE)
    return bool(defective[0]), float(step[0])


def test_only_a_telling_frame_speaks_for_recovery():
    """A hot sample without excess has recovered in a long exposure; in a short one nothing was to be seen."""
    exposures = spread_out(40)
    hot = shown(shots(700 * exposures, exposures))
    assert steps(hot, shots([0.0], [2.0])[0]) == (False, 1.0)
    assert steps(hot, shots([0.0], [0.002])[0]) == (False, 0.0)
    assert steps(hot, shots([1400.0], [2.0])[0]) == (True, 0.0)
    # Full scale tells nothing.
    assert steps(hot, shots([15_000.0], [60.0])[0]) == (False, 0.0)


def test_an_offset_has_not_recovered_in_a_long_exposure():
    """There it is a small part of the excess foreseen from shorter ones, yet it has not gone."""
    offset = shown(shots([400.0] * 40, spread_out(40)))
    assert steps(offset, shots([400.0], [8.0])[0]) == (False, 0.0)


def test_off_times_of_an_unstable_sample_weigh_little():
    """One that is off in half of the frames anyway needs many more in a row."""
    exposures = np.geomspace(0.5, 2.0, 60)
    on = np.random.default_rng(1).permutation(60) < 30
    unstable = shown(shots(1500 * exposures * on, exposures))
    defective, step = steps(unstable, shots([0.0], [1.0])[0])
    assert not defective
    assert 0.4 < step < 1


def test_a_stuck_sample_has_recovered_when_it_follows_its_neighbours():
    """At its old level it is the defect; near its neighbours, far from that level, it speaks for recovery."""
    stuck = shown(shots([9000.0] * 40, spread_out(40), fixed=True))
    assert steps(stuck, shots([9000.0], [1.0], fixed=True)[0]) == (True, 0.0)
    defective, step = steps(stuck, shots([0.0], [1.0])[0])
    assert not defective
    assert step == 1


def test_unlit_frames_do_not_speak_for_a_dead_samples_recovery():
    """In darks it is like its neighbours; in light it would be again if it had recovered."""
    dead = shown(shots([BLACK] * 40, spread_out(40), fixed=True))
    assert steps(dead, shots([0.0], [1.0], kind=ShotKind.DARK)[0]) == (False, 0.0)
    assert steps(dead, shots([BLACK], [1.0], fixed=True)[0]) == (True, 0.0)
    assert steps(dead, shots([0.0], [1.0])[0]) == (False, 1.0)
