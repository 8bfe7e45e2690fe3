"""A statistic from parts is that of one pass, whatever depends on the order of frames included."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from hotpixd.core import defects
from hotpixd.core.accumulator import Accumulator
from hotpixd.core.followed import Followed, Glimpse, Sums, surroundings_of
from hotpixd.core.frame import Frame, SampleKind, SensorIdentity, SensorLayout, ShotInfo, ShotKind
from hotpixd.core.sensor import DetectionSettings, FoldReport, Sensor
from hotpixd.core.tracks import neighbours_of
from hotpixd.simulate import VirtualSensor

SETTINGS = DetectionSettings(epoch_frames=9, scene_memory=2)


def shot_frames(pattern: str, scenes: str, seed: int = 3) -> list[Frame]:
    """Return frames of a sensor with defects; a letter per frame: moving, tripod, dark."""
    sensor = VirtualSensor(240, 180, hot=12, stuck=3, dead=3, clusters=1, seed=seed, pattern=pattern)
    scene = {"m": "moving", "t": "tripod", "d": "dark"}
    frames = []
    for i, letter in enumerate(scenes):
        shot = sensor.shot(i, scene[letter])
        info = ShotInfo(shot.exposure_s, shot.iso)
        frames.append(Frame(sensor.identity, shot.mosaic, shot.kind, info, 256.0, 16383.0))
    return frames


def rendered_frames(count: int) -> list[Frame]:
    """Return frames of a colour picture with three bright sites, 8 bit."""
    rng = np.random.default_rng(4)
    identity = SensorIdentity("Acme", "One", None, SampleKind.RENDERED, SensorLayout(60, 50, "RGB", 3), "uint8")
    frames = []
    for _ in range(count):
        samples = rng.normal(rng.uniform(60, 120), 4, identity.layout.shape).clip(0, 255).astype(np.uint8)
        for row, col in ((9, 30), (25, 90), (26, 93)):
            samples[row, col : col + 3] = 240
        frames.append(Frame(identity, samples, ShotKind.LIGHT, ShotInfo(0.1, 100.0)))
    return frames


def in_one_pass(frames: list[Frame]) -> tuple[Sensor, list[FoldReport]]:
    sensor = Sensor(frames[0].sensor, SETTINGS)
    return sensor, [sensor.fold(frame, seq) for seq, frame in enumerate(frames, 1)]


def in_parts(frames: list[Frame], size: int, settle_after: int) -> tuple[Sensor, list[FoldReport], int]:
    """Fold frames as a cluster does: chunks of `size`, merged into the statistic after some chunks."""
    sensor = Sensor(frames[0].sensor, SETTINGS)
    followed = sensor.accumulator = Followed.of(sensor.accumulator)
    reports, merged, looked = [], None, 0
    for number, start in enumerate(range(0, len(frames), size), 1):
        chunk = frames[start : start + size]
        there = Accumulator(sensor.layout, sensor.identity.dtype)
        measured = []
        for frame in chunk:
            events = there.fold(frame.samples, lone=frame.lone)
            noise = defects.noise_of(frame, sensor.layout)
            measured.append((there.pack(events), events.totals, events.phases, noise))

        def look(sites: Any, chunk: Any = chunk, before: Any = merged) -> Glimpse:
            nonlocal looked
            looked += len(sites)
            none = np.zeros(len(sites), np.uint64)
            values = np.array([frame.samples.ravel()[sites] for frame in chunk])
            if before is None:
                return Glimpse(values, none, none)
            return Glimpse(values, *(a.ravel()[sites].astype(np.uint64) for a in (before.total, before.squares)))

        followed.begin(len(chunk), look, sensor.followed_sites)
        for i, (frame, (planes, *numbers, noise)) in enumerate(zip(chunk, measured, strict=True)):
            followed.advance()
            without = replace(frame, samples=followed.samples)
            reports.append(sensor.follow(without, followed.unpack(planes, *numbers), noise, start + i + 1))
        keys = tuple(f"{start + i:04d}" for i in range(len(chunk)))
        new = Sums((number,), keys, there.total, there.squares)
        merged = new if merged is None else merged.merged(new)
        if number % settle_after == 0 or start + size >= len(frames):
            followed.settle(merged)
            merged = None
    return sensor, reports, looked


def told(sensor: Sensor) -> list[Any]:
    header, arrays = sensor.save()
    return [header, sensor.digest(), sensor.defects(candidates=True), {name: a.tobytes() for name, a in arrays.items()}]


SETS = {
    "moving": lambda: shot_frames("RGGB", "m" * 24),
    "tripod between moving": lambda: shot_frames("RGGB", "mmtttttmtmttmmmm"),
    "darks between lights": lambda: shot_frames("RGGB", "mdmmddddmmmmtttdd"),
    "six by six": lambda: shot_frames("XTRANS", "m" * 14),
    "grey": lambda: shot_frames("L", "m" * 14),
    "rendered": lambda: rendered_frames(14),
}


@pytest.mark.parametrize(("size", "settle_after"), [(1, 1), (4, 1), (5, 2), (30, 1)])
@pytest.mark.parametrize("name", SETS)
def test_parts_make_what_one_pass_makes(name, size, settle_after):
    """Sums, counts, gate, rates, epochs, tracks, observations and transitions: to the last bit."""
    frames = SETS[name]()
    whole, reports = in_one_pass(frames)
    parts, again, _ = in_parts(frames, size, settle_after)
    assert told(parts) == told(whole)
    for one, other in zip(reports, again, strict=True):
        assert (one.counted, one.not_counted_because, one.lift) == (
            other.counted,
            other.not_counted_because,
            other.lift,
        )
        assert one.transitions == other.transitions
        assert one.fingerprint == other.fingerprint
        assert one.observed_sites.tolist() == other.observed_sites.tolist()
        assert one.observations.tobytes() == other.observations.tobytes()
    # Otherwise nothing that depends on the order was asked.
    assert any(t.change == "stable" for report in reports for t in report.transitions)


def test_frames_that_are_not_counted_are_among_them():
    """The control: a tripod's frames do repeat each other, and the gate says so."""
    _, reports = in_one_pass(SETS["tripod between moving"]())
    assert {report.counted for report in reports} == {True, False}


def test_only_few_sites_are_looked_at():
    """The events say where; a sensor without defects is hardly looked at."""
    sensor = VirtualSensor(240, 180, hot=0, stuck=0, dead=0, seed=8)
    shots = [sensor.shot(i, "moving") for i in range(12)]
    frames = [Frame(sensor.identity, s.mosaic, s.kind, ShotInfo(s.exposure_s, s.iso), 256.0, 16383.0) for s in shots]
    _, _, looked = in_parts(frames, 4, 1)
    assert looked < sensor.layout.size // 10


@pytest.mark.parametrize("pattern", ["RGGB", "L", "XTRANS"])
def test_events_survive_the_way(pattern):
    """Packed to bits and unpacked they are the same bytes, at the borders too."""
    for frame in shot_frames(pattern, "md"):
        here, there = (Accumulator(frame.sensor.layout, "uint16") for _ in range(2))
        events = here.fold(frame.samples, lone=frame.lone)
        again = there.unpack(here.pack(events), events.totals, events.phases)
        assert np.array_equal(again.events, events.events)
        assert events.events.any()
        assert again.fingerprint == events.fingerprint


def sums(part: int, *keys: str, dtype: Any = np.uint64) -> Sums:
    return Sums((part,), keys, np.full((8, 8), part, np.uint32), np.full((8, 8), part, dtype))


def test_a_chunk_is_never_added_twice():
    """However often it was measured: its number is in what was made of it."""
    both = sums(1, "a").merged(sums(2, "b"))
    assert (both.parts, both.keys, int(both.total[0, 0])) == ((1, 2), ("a", "b"), 3)
    with pytest.raises(ValueError, match="chunk 2 cannot be added twice"):
        both.merged(sums(2, "b"))


def test_sums_are_merged_in_any_order():
    """Integers: the tree does not matter."""
    parts = [sums(i, str(i)) for i in range(1, 5)]
    first = None
    for order in itertools.permutations(parts):
        merged = order[0].merged(order[1]).merged(order[2].merged(order[3]))
        told = (merged.parts, merged.keys, merged.total.tobytes())
        first = first or told
        assert told == first


def test_sums_widen_before_they_overflow():
    """66,051 squares of 255 fit 32 bit, one more does not."""
    many = Sums((1,), tuple(map(str, range(66_000))), np.zeros((8, 8), np.uint32), np.zeros((8, 8), np.uint32))
    few = Sums((2,), tuple(f"b{i}" for i in range(60)), np.zeros((8, 8), np.uint32), np.zeros((8, 8), np.uint32))
    assert few.merged(replace(few, parts=(3,))).squares.dtype == np.uint32
    assert many.merged(few).squares.dtype == np.uint64
    assert many.merged(few).total.dtype == np.uint64


def test_sums_of_other_frames_are_not_settled():
    """A file that changed between two looks at it must not get into the statistic."""
    frames = shot_frames("RGGB", "mmm")
    sensor = Sensor(frames[0].sensor)
    followed = Followed.of(sensor.accumulator)
    values = frames[0].samples.ravel()
    followed.begin(1, lambda s: Glimpse(values[s][None], *[np.zeros(len(s), np.uint64)] * 2), np.array([4000]))
    followed.advance()
    other = Accumulator(sensor.layout, "uint16")
    other.fold(frames[1].samples, lone=True)
    with pytest.raises(ValueError, match="other frames"):
        followed.settle(Sums((1,), ("a",), other.total, other.squares))


@pytest.mark.parametrize("site", [0, 1, 119, 120 * 45 + 60, 120 * 90 - 1])
def test_surroundings_hold_all_that_is_read_around_a_site(site):
    """Its neighbours, those of the sites beside it, and the windows it is in; clipped at the border."""
    layout = SensorLayout(120, 90, "RGGB")
    around = set(surroundings_of(np.array([site]), layout).tolist())
    assert site in around
    assert set(neighbours_of(np.array([site]), layout).ravel().tolist()) <= around
    assert all(0 <= one < layout.size for one in around)
    assert len(around) < 300
