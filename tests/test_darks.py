"""Series of darks on a camera on loopback: what it is set to and back to, what ends it, what interrupts it."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pty
import re
import signal
import sqlite3
import struct
import subprocess
import tempfile
import termios
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

import pytest

pytest.importorskip("gphoto2", reason="python-gphoto2 is not installed")

from hotpixd.core.frame import ShotKind
from hotpixd.intake import darks, metadata
from hotpixd.intake.camera import CameraSettings
from hotpixd.intake.darks import DarkSeries, Journal, SeriesOrder, seconds
from hotpixd.intake.decode import decode
from hotpixd.simulate import Scene, VirtualSensor
from memory_card import Files, Settings
from ptpip_camera import LoopbackCamera
from tethers import Tether

# The camera's process imports this module for what is below: nothing here that it has to wait for.


@cache
def _sensor() -> VirtualSensor:
    return VirtualSensor(200, 150, hot=8, stuck=3, dead=3, seed=1, serial="V0007")


def _rendered(shot: int, scene: Scene, exposure_s: float, iso: float) -> Files:
    taken = _sensor().shot(shot, scene, exposure_s=exposure_s, iso=iso)
    with tempfile.TemporaryDirectory() as folder:
        raw, picture = Path(folder, "shot.dng"), Path(folder, "shot.jpg")
        _sensor().write_dng(raw, taken)
        _sensor().write_jpeg(picture, taken)
        return [("DNG", raw.read_bytes()), ("JPG", picture.read_bytes())]


def in_the_dark(shot: int, settings: Settings) -> Files:
    """Take a dark as the camera is set."""
    return _rendered(shot, "dark", settings["exposure_s"], settings["iso"])


def in_the_light(shot: int, settings: Settings) -> Files:
    """Take it without the cap."""
    return _rendered(shot, "moving", settings["exposure_s"], settings["iso"])


def uncapped_later(shot: int, settings: Settings) -> Files:
    """Lose the cap after two darks."""
    return (in_the_dark if shot <= 2 else in_the_light)(shot, settings)


def one_cut_short(shot: int, settings: Settings) -> Files:
    """Write half of the second dark's samples, as a card does that is about to die."""
    _, (_, content) = in_the_dark(shot, settings)
    return [("JPG", content[: len(content) // 2] + b"\xff\xd9" if shot == 2 else content)]


def by_the_dial(shot: int, settings: Settings) -> Files:
    """Expose for 2 s whatever it was told, as the mode dial has it."""
    return _rendered(shot, "dark", 2.0, settings["iso"])


def iso_of_its_own(shot: int, settings: Settings) -> Files:
    """Choose the ISO itself."""
    return _rendered(shot, "dark", settings["exposure_s"], 200.0)


def warming_up(shot: int, settings: Settings) -> Files:
    """Take it with an EOS, whose note tells its temperature: 20 C at first, one more with each shot."""
    from pictures import jpeg, tiff_ifd

    def ifd(entries: list[tuple[int, int, int, bytes]], start: int) -> bytes:
        return tiff_ifd(entries, start).ljust(256, b"\0")

    info = struct.pack("<14H", *[0] * 12, 128 + 19 + shot, 0)
    exposure = struct.pack("<II", round(settings["exposure_s"] * 1000), 1000)
    note = (0x927C, 7, 256, ifd([(0x0004, 3, 14, info)], 306))
    about = [(0x829A, 5, 1, exposure), (0x8827, 3, 1, struct.pack("<H", settings["iso"])), note]
    camera = [(0x10F, 2, 6, b"Canon\0"), (0x110, 2, 12, b"Canon EOS R\0"), (0x8769, 4, 1, struct.pack("<I", 256))]
    block = b"II*\0" + struct.pack("<I", 8) + ifd(camera, 8)[:248] + ifd(about, 256)
    taken = _sensor().shot(shot, "dark", exposure_s=settings["exposure_s"], iso=settings["iso"])
    return [("JPG", jpeg(_sensor().rendered(taken), exif=b"Exif\0\0" + block))]


ORDER: Mapping[str, Any] = {"frames": 3, "exposure_s": 4.0, "iso": 1600}


@pytest.fixture
def camera() -> Iterator[LoopbackCamera]:
    """A capped camera that takes RAW and JPEG, in mode A."""
    with LoopbackCamera("nikon") as camera:
        camera.capture_rendered("test_darks:in_the_dark")
        camera.turn("program", 3)
        yield camera


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wait less than for real cameras."""
    for name, wait_s in {
        "_MATES_WITHIN_S": 0.15,
        "_LATE_S": 0.5,
        "_BUSY_S": 4.0,
        "_SETTLES_S": 2.0,
        "_CAMERA_WITHIN_S": 20.0,
        "_NAG_S": 0.05,
    }.items():
        monkeypatch.setattr(darks, name, wait_s)
    monkeypatch.setattr("hotpixd.intake.camera._ABSENT_RETRY_S", 0.2)


class Darkroom:
    """A tethered camera and series on it, in this process."""

    def __init__(self, camera: LoopbackCamera, folder: Path, existing: Literal["fetch", "later"] = "later") -> None:
        self.camera = camera
        self.journal = folder / "series.json"
        self.tether = Tether(folder / "incoming", CameraSettings(camera.port, existing=existing, hang_s=10.0))

    def begin(self, **order: Any) -> DarkSeries:
        """Give an order: `ORDER` unless something else is said."""
        series = DarkSeries(SeriesOrder(**{**ORDER, **order}), self.tether.source, self.journal, lambda: None, decode)
        series.start()
        return series

    def end(self, series: DarkSeries, within_s: float = 40.0) -> dict[str, Any]:
        """Wait for the end of a series; return how it ended."""
        self.tether.wait(lambda: series.ended, "for the end of the series", within_s)
        assert not self.camera.bulb_open
        return series.state()

    def shoot(self, **order: Any) -> dict[str, Any]:
        """Have a series shot."""
        return self.end(self.begin(**order))

    def wait(self, true: Callable[[], Any], series: DarkSeries | None = None) -> Any:
        """Wait for something that happens by itself, before a series ends."""

        def now() -> Any:
            found = true()
            assert found or series is None or not series.ended, series.state()
            return found

        return self.tether.wait(now)

    def raws(self) -> list[ShotKind | None]:
        """Return as what the raw files were handed out that have come, once each shot on the card was."""
        self.wait(lambda: len(self.tether.bytes_of) >= len(self.camera.files()))
        return [shot.kind for shot in self.tether.shots if str(shot.origin).endswith(".DNG")]


@pytest.fixture
def darkroom(camera: LoopbackCamera, tmp_path: Path, quick: None) -> Iterator[Darkroom]:
    """The camera, tethered."""
    room = Darkroom(camera, tmp_path)
    yield room
    room.tether.close()


def taken_as(camera: LoopbackCamera) -> list[tuple[float | None, float | None]]:
    """Return exposure time and ISO of each file on the card, as it says itself."""
    about = [metadata.from_bytes(camera.read(file.path)) for file in camera.files()]
    return [(each.exposure_s, each.iso) for each in about]


def set_to(camera: LoopbackCamera) -> dict[str, Any]:
    """Return the settings of the camera that a series may change."""
    return {name: camera.status.settings[name] for name in ("exposure", "program", "iso", "noise_reduction", "quality")}


# What is set, and set back


def test_the_camera_is_set_and_all_of_it_set_back(darkroom: Darkroom, camera: LoopbackCamera) -> None:
    """Each file says that it was taken as ordered, without noise reduction, and the camera is then as it was."""
    camera.turn("noise_reduction", 1)
    before = set_to(camera)
    get = darkroom.tether.ready().source.call
    assert get("get", 10.0, names=["autofocus"])["autofocus"]["value"] == "On"
    series = darkroom.begin()
    known = darkroom.wait(lambda: (found := Journal.read(darkroom.journal)) and found.taken and found, series)
    assert known.restore == {"longexpnr": "On", "autofocus": "On", "iso": "800", "shutterspeed": "1.0000s"}
    state = darkroom.end(series)
    assert (state["stage"], state["taken"], state["detail"]) == ("done", 3, "all darks are taken")
    assert (state["warnings"], state["left_s"], state["resumed_at"]) == ([], None, 0)
    assert taken_as(camera) == [(4.0, 1600.0)] * 6
    assert set_to(camera) == before
    assert get("get", 10.0, names=["autofocus"])["autofocus"]["value"] == "On"
    assert darkroom.raws() == [ShotKind.DARK] * 3
    assert (camera.status.captures, darkroom.journal.exists()) == (3, False)


def test_without_exposure_and_iso_the_camera_stays_as_it_is(darkroom: Darkroom, camera: LoopbackCamera) -> None:
    """And the files are compared with that."""
    state = darkroom.shoot(exposure_s=None, iso=None, frames=2)
    assert (state["stage"], state["exposure_s"], state["iso"]) == ("done", 1.0, 800.0)
    assert taken_as(camera) == [(1.0, 800.0)] * 4


def test_a_shutter_is_held_open_and_closed_each_time(darkroom: Darkroom, camera: LoopbackCamera) -> None:
    """For a time that the camera does not have, too. Its mode and exposure time are then as they were."""
    before = set_to(camera)
    state = darkroom.shoot(exposure_s=1.2, frames=2)
    assert (state["stage"], state["taken"], state["bulb"]) == ("done", 2, True)
    assert (camera.status.bulbs, camera.status.captures) == (2, 2)
    assert 1.2 <= camera.status.longest_bulb_s < 1.7
    assert all(1.2 <= exposure_s < 1.7 and iso == 1600.0 for exposure_s, iso in taken_as(camera))
    assert set_to(camera) == before
    assert darkroom.raws() == [ShotKind.DARK] * 2


def test_a_setting_that_is_ignored_ends_it_before_the_first_shot(darkroom: Darkroom, camera: LoopbackCamera) -> None:
    """It is read back."""
    camera.behave(settings="ignored")
    state = darkroom.shoot()
    assert state["stage"] == "failed"
    assert "is not to be set to ISO 1600: it takes 1600 without a word, and then is at 800." in state["detail"]
    state = darkroom.shoot(iso=None)
    assert state["stage"] == "failed"
    assert "an exposure of 4 s: it takes 4.0000s without a word, and then is at 1.0000s." in state["detail"]
    assert camera.status.captures == 0
    assert not Journal.read(darkroom.journal).restore


def test_a_bulb_that_is_ignored_ends_it_with_the_first_shot(darkroom: Darkroom, camera: LoopbackCamera) -> None:
    """The camera exposes for the time it is set to, and then has no shutter to close."""
    camera.behave(settings="ignored")
    state = darkroom.shoot(exposure_s=1.0, bulb=True, iso=None)
    assert state["stage"] == "failed"
    assert "cannot be held open from here" in state["detail"]
    assert "mode dial on M or B?" in state["detail"]
    assert camera.status.captures == 1


def test_a_file_that_was_not_taken_as_ordered_ends_it(darkroom: Darkroom, camera: LoopbackCamera) -> None:
    """Though the camera says that it is set so; as what it was taken is then for the file to say."""
    before = set_to(camera)
    camera.capture_rendered("test_darks:by_the_dial")
    state = darkroom.shoot()
    assert (state["stage"], state["taken"]) == ("failed", 0)
    assert "DSC_0001.DNG was exposed for 2 s, not for 4 s: the camera does not follow. Is its mode" in state["detail"]
    camera.capture_rendered("test_darks:iso_of_its_own")
    state = darkroom.shoot()
    assert (state["stage"], state["taken"]) == ("failed", 0)
    assert "DSC_0002.DNG was taken at ISO 200, not 1600: the camera does not follow." in state["detail"]
    assert camera.status.captures == 2
    assert set_to(camera) == before
    assert darkroom.raws() == [None] * 2


def test_anyway_it_goes_on_and_warns_once(darkroom: Darkroom, camera: LoopbackCamera) -> None:
    """Of each thing in which the camera does not follow."""
    camera.turn("noise_reduction", 1)
    camera.behave(settings="refused")
    state = darkroom.shoot(anyway=True)
    assert (state["stage"], state["taken"]) == ("done", 3)
    about = [
        word for warning in state["warnings"] for word in ("noise reduction", "ISO 1600", "4 s") if word in warning
    ]
    assert about == ["noise reduction", "ISO 1600", "4 s"]
    assert len(state["warnings"]) == 3
    assert darkroom.raws() == [ShotKind.DARK] * 3
    assert taken_as(camera) == [(1.0, 800.0)] * 6


def test_what_cannot_be_is_refused_before_the_first_shot(darkroom: Darkroom, camera: LoopbackCamera) -> None:
    """With a sentence that says what can be done."""
    camera.turn("noise_reduction", 1)
    before = set_to(camera)
    for order, words in (
        ({"iso": 1234}, "The camera has no ISO 1234. It has: 100, 200, 400, 800, 1600, 3200, 6400."),
        ({"exposure_s": 0.7}, "A shutter held open from here takes at least 1 s, not 0.7 s."),
        ({"exposure_s": None, "bulb": True}, "How long the shutter is to be held open must be given: --exposure."),
    ):
        state = darkroom.shoot(**order)
        assert (state["stage"], state["detail"]) == ("failed", words)
    camera.behave(settings="refused")
    state = darkroom.shoot(exposure_s=None, iso=None)
    assert state["stage"] == "failed"
    assert "noise reduction is on and cannot be switched off from here: the camera refuses that" in state["detail"]
    assert camera.status.captures == 0
    assert set_to(camera) == before


def test_a_camera_without_bulb_says_so(tmp_path: Path, quick: None) -> None:
    """libgphoto2 offers one of every camera over a network."""
    with LoopbackCamera("generic") as camera:
        camera.capture_rendered("test_darks:in_the_dark")
        room = Darkroom(camera, tmp_path)
        try:
            state = room.shoot(exposure_s=45.0)
            assert "The camera's shutter cannot be held open from here" in state["detail"]
            assert camera.status.captures == 0
            state = room.shoot(exposure_s=1.0, frames=2)
            assert (state["stage"], taken_as(camera)) == ("done", [(1.0, 1600.0)] * 4)
            (warning,) = state["warnings"]
            assert "Whether the camera's long exposure noise reduction is off cannot be seen" in warning
        finally:
            room.tether.close()


# Light, temperature


def test_light_on_the_sensor_ends_it(darkroom: Darkroom, camera: LoopbackCamera) -> None:
    """The lit frame is none of the series, and is not said to be a dark."""
    camera.capture_rendered("test_darks:uncapped_later")
    state = darkroom.shoot()
    assert (state["stage"], state["taken"]) == ("failed", 2)
    assert "Light reaches the sensor: DSC_0003" in state["detail"]
    assert camera.status.captures == 3
    assert darkroom.raws() == [ShotKind.DARK, ShotKind.DARK, None]


def test_the_temperature_is_told(darkroom: Darkroom, camera: LoopbackCamera) -> None:
    """Lowest, highest, last; and that the darks are of rendered pictures."""
    camera.turn("quality", 2)
    camera.capture_rendered("test_darks:warming_up")
    state = darkroom.shoot()
    assert (state["stage"], state["temps_c"]) == ("done", [20.0, 22.0, 22.0])
    assert "these darks tell of rendered pictures" in state["warnings"][0]


# A camera in trouble


def test_a_busy_camera_is_asked_again(darkroom: Darkroom, camera: LoopbackCamera) -> None:
    """Whatever it was asked for."""
    darkroom.tether.ready()
    camera.behave(busy_operations=4)
    series = darkroom.begin(frames=4)
    darkroom.wait(lambda: series.state()["taken"] == 1, series)
    camera.behave(busy_operations=4)
    state = darkroom.end(series)
    assert (state["stage"], state["taken"], state["warnings"]) == ("done", 4, [])
    assert taken_as(camera) == [(4.0, 1600.0)] * 8


def test_a_camera_that_stays_busy_ends_it(
    darkroom: Darkroom, camera: LoopbackCamera, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What could not be set back then is set back by the next series."""
    monkeypatch.setattr(darks, "_BUSY_S", 0.5)
    before = set_to(camera)
    # Between two darks: one that was exposed and cannot be fetched is waited for, much longer.
    series = darkroom.begin(frames=10, cooldown_s=3.0)
    darkroom.wait(lambda: series.state()["taken"] == 1, series)
    darkroom.wait(lambda: all(not source.waiting for source in darkroom.tether.source.states()), series)
    camera.behave(busy_operations=1_000_000)
    state = darkroom.end(series)
    assert (state["stage"], state["detail"].partition(". ")[0]) == ("failed", "The camera has been busy for 0.5 s")
    assert "the next series does it: " in state["warnings"][-1]
    assert state["warnings"][-1].endswith("iso, shutterspeed.")
    camera.behave(busy_operations=0)
    state = darkroom.shoot(frames=1)
    assert (state["stage"], state["taken"]) == ("done", 1)
    assert set_to(camera) == before


def test_a_full_card_ends_it(darkroom: Darkroom, camera: LoopbackCamera) -> None:
    """With room on it, the same order goes on."""
    series = darkroom.begin(frames=5)
    darkroom.wait(lambda: series.state()["taken"] == 1, series)
    camera.behave(card_full=True)
    state = darkroom.end(series)
    assert (state["stage"], state["detail"].partition(":")[0]) == ("failed", "The camera's card is full")
    camera.behave(card_full=False)
    assert darkroom.shoot(frames=5)["stage"] == "done"
    assert camera.status.shots == 5


def test_shots_of_which_no_word_comes_are_found(darkroom: Darkroom, camera: LoopbackCamera) -> None:
    """By a listing."""
    camera.behave(drop_events=1.0)
    state = darkroom.shoot(frames=1, exposure_s=0.002)
    assert (state["stage"], state["taken"], camera.status.captures) == ("done", 1, 1)
    assert darkroom.raws() == [ShotKind.DARK]


def test_shots_that_do_not_come_end_it(
    darkroom: Darkroom, camera: LoopbackCamera, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of a camera that does not find its focus in the dark."""
    monkeypatch.setattr(darks, "_FAILURES", 2)
    camera.capture_random({"TXT": 10})
    state = darkroom.shoot(exposure_s=0.002)
    assert "The shutter was released 2 times, and no picture has come." in state["detail"]


@pytest.mark.parametrize("fault", ["unplug", "die"])
def test_it_goes_on_when_the_camera_comes_back(darkroom: Darkroom, camera: LoopbackCamera, fault: str) -> None:
    """Unplugged, it goes on exposing, and that dark counts; without power, it is lost."""
    camera.behave(time_scale=0.1)
    before = set_to(camera)
    if fault == "die":
        camera.behave(die_at_capture=2, die_after_s=2.0)
    series = darkroom.begin(frames=2)
    darkroom.wait(lambda: series.state()["taken"] == 1 and (camera.status.exposing or not camera.status.online), series)
    if fault == "unplug":
        camera.unplug()
    darkroom.wait(lambda: series.state()["stage"] == "waiting", series)
    darkroom.wait(lambda: not camera.status.exposing)
    camera.plug()
    state = darkroom.end(series)
    assert (state["stage"], state["taken"]) == ("done", 2)
    assert "The camera went away in the middle" in state["warnings"][0]
    assert camera.status.captures == (2 if fault == "unplug" else 3)
    assert camera.status.shots == 2
    assert darkroom.raws() == [ShotKind.DARK] * 2
    assert taken_as(camera) == [(4.0, 1600.0)] * 4
    assert set_to(camera) == before


def test_a_camera_that_is_not_here_is_told_beside_those_that_are(
    darkroom: Darkroom, camera: LoopbackCamera, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its serial number may be mistyped."""
    darkroom.tether.ready()
    monkeypatch.setattr(darks, "_CAMERA_WITHIN_S", 0.5)
    state = darkroom.shoot(camera="LB0010")
    assert state["detail"] == "The camera LB0010 has not come within 0.5 s: LB0010 is not here, but LB0001."


def test_a_camera_that_does_not_come_back_ends_it(
    darkroom: Darkroom, camera: LoopbackCamera, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In bounded time; the next series has it set back, and goes on."""
    before = set_to(camera)
    darkroom.tether.ready()
    monkeypatch.setattr(darks, "_CAMERA_WITHIN_S", 0.5)
    camera.behave(die_at_capture=2, die_after_s=2.0)
    state = darkroom.shoot()
    assert (state["stage"], state["taken"]) == ("failed", 1)
    assert state["detail"].startswith("The camera LB0001 has not come within 0.5 s: ")
    assert "the next series does it: autofocus, iso, shutterspeed" in state["warnings"][-1]
    assert set_to(camera) != before
    monkeypatch.setattr(darks, "_CAMERA_WITHIN_S", 20.0)
    camera.plug()
    state = darkroom.shoot()
    assert (state["stage"], state["taken"], state["resumed_at"]) == ("done", 3, 1)
    assert set_to(camera) == before
    assert not darkroom.journal.exists()


def test_no_camera_is_said_in_a_sentence(
    darkroom: Darkroom, camera: LoopbackCamera, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In bounded time, and sooner if it is told to stop."""
    camera.unplug()
    series = darkroom.begin()
    darkroom.wait(lambda: series.state()["stage"] == "waiting", series)
    series.stop()
    state = darkroom.end(series, 5.0)
    assert (state["stage"], state["detail"]) == ("stopped", "stopped before the camera was ready")
    monkeypatch.setattr(darks, "_CAMERA_WITHIN_S", 0.5)
    state = darkroom.shoot()
    assert state["stage"] == "failed"
    assert state["detail"].startswith("No camera has come within 0.5 s: ")


def test_a_camera_that_goes_away_each_time_ends_it(darkroom: Darkroom, camera: LoopbackCamera) -> None:
    """Though it comes back each time."""
    darkroom.tether.ready()
    camera.behave(die_at_capture=1, die_after_s=0.0)
    series = darkroom.begin()
    for _ in range(3):
        darkroom.wait(lambda: not camera.status.online)
        camera.behave(die_at_capture=1, die_after_s=0.0)
        camera.plug()
    state = darkroom.end(series)
    assert (state["stage"], state["taken"]) == ("failed", 0)
    assert "The camera goes away each time" in state["detail"]


# A shutter that is open


@pytest.mark.parametrize("fault", ["unplugged", "killed"])
def test_nothing_leaves_the_shutter_open(darkroom: Darkroom, camera: LoopbackCamera, fault: str) -> None:
    """Neither a link that breaks nor a worker that is killed; the next worker closes it, and the series goes on."""
    before = set_to(camera)
    series = darkroom.begin(exposure_s=40.0, bulb=True)
    darkroom.wait(lambda: camera.bulb_open, series)
    if fault == "killed":
        (worker,) = darkroom.tether.workers()
        os.kill(worker, signal.SIGKILL)
    else:
        camera.unplug()
        darkroom.wait(lambda: series.state()["stage"] == "waiting", series)
        assert camera.bulb_open
        camera.plug()
    darkroom.wait(lambda: camera.status.bulbs == 2 and camera.bulb_open, series)
    assert camera.status.longest_bulb_s < 20
    series.stop()
    state = darkroom.end(series)
    assert (state["stage"], state["taken"]) == ("stopped", 0)
    # What was broken off is none of the series.
    assert darkroom.raws() == [None, None]
    assert set_to(camera) == before


def test_told_to_stop_it_closes_the_shutter_at_once(darkroom: Darkroom, camera: LoopbackCamera) -> None:
    """Of a camera that answers nothing else meanwhile. What was exposed until then is no dark of the series."""
    camera.behave(busy_while_exposing="everything")
    before = set_to(camera)
    series = darkroom.begin(exposure_s=60.0, bulb=True)
    darkroom.wait(lambda: camera.bulb_open, series)
    began = time.monotonic()
    series.stop()
    state = darkroom.end(series)
    assert (state["stage"], state["taken"]) == ("stopped", 0)
    assert time.monotonic() - began < 15
    assert camera.status.bulbs == 1
    assert set_to(camera) == before
    assert darkroom.raws() == [None]


# Interrupted


def test_told_to_stop_it_ends_after_the_dark_under_way(darkroom: Darkroom, camera: LoopbackCamera) -> None:
    """The same order then goes on where it was, unless it is to begin anew, or all was done."""
    before = set_to(camera)

    def interrupted() -> tuple[str, int, int]:
        camera.behave(time_scale=0.1)
        series = darkroom.begin(frames=2)
        darkroom.wait(lambda: camera.status.exposing, series)
        series.stop()
        state = darkroom.end(series)
        assert set_to(camera) == before
        camera.behave(time_scale=0.01)
        return state["stage"], state["taken"], state["resumed_at"]

    assert interrupted() == ("stopped", 1, 0)
    state = darkroom.shoot(frames=2)
    assert (state["stage"], state["taken"], state["resumed_at"], camera.status.shots) == ("done", 2, 1, 2)
    assert interrupted() == ("stopped", 1, 0)
    state = darkroom.shoot(frames=2, anew=True)
    assert (state["stage"], state["taken"], state["resumed_at"], camera.status.shots) == ("done", 2, 0, 5)


def test_what_the_user_shot_before_is_no_part_of_it(camera: LoopbackCamera, tmp_path: Path, quick: None) -> None:
    """It may not even be dark; and no word of it may have come."""
    room = Darkroom(camera, tmp_path, existing="fetch")
    try:
        room.tether.ready()
        camera.shoot(in_the_light(0, {"exposure_s": 0.01, "iso": 100}), drop=1.0)
        state = room.shoot()
        assert (state["stage"], state["taken"]) == ("done", 3)
        assert room.raws() == [None, *[ShotKind.DARK] * 3]
    finally:
        room.tether.close()


# The command and the daemon


class Commands:
    """`hotpixd darks` on a camera and a state of the test's own."""

    def __init__(self, camera: LoopbackCamera, state: Path, runtime: Path) -> None:
        # Not above: the camera's process would have to wait for it.
        from conftest import HOTPIXD, environment

        self._program = [*HOTPIXD]
        self._environ = environment(XDG_RUNTIME_DIR=str(runtime), TERM="xterm-256color")
        self.state = state
        self._where = ["--camera", camera.port, "--state", str(state)]
        self._started: list[subprocess.Popen[str]] = []

    def darks(self, *arguments: object, **streams: Any) -> subprocess.Popen[str]:
        """Order a series."""
        given = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, **streams}
        command = [*self._program, "darks", *map(str, arguments), *self._where]
        self._started.append(subprocess.Popen(command, env=self._environ, **given))
        return self._started[-1]

    def kinds(self) -> dict[tuple[str | None, str | None], int]:
        """Return how many shots were folded as light and as dark, and how many were not, by verdict."""
        ledger = sqlite3.connect(self.state / "ledger.sqlite")
        with contextlib.closing(ledger):
            rows = ledger.execute("SELECT verdict, kind, COUNT(*) FROM shot GROUP BY verdict, kind")
            return {(verdict, kind): count for verdict, kind, count in rows}

    def close(self) -> None:
        """Make sure that all of them are gone."""
        for process in self._started:
            if process.poll() is None:
                process.kill()
                process.wait()


@pytest.fixture
def commands(camera: LoopbackCamera, tmp_path: Path, runtime: Path) -> Iterator[Commands]:
    """Commands on the camera."""
    commands = Commands(camera, tmp_path / "state", runtime)
    yield commands
    commands.close()


def ended(process: subprocess.Popen[str], within_s: float = 60.0) -> tuple[int, str, str]:
    """Wait for the end of a command; return its exit code and what it has said."""
    out, err = process.communicate(timeout=within_s)
    assert "Traceback" not in err, err
    return process.returncode, out, err


def wait_until(true: Callable[[], Any], process: subprocess.Popen[str] | None = None) -> None:
    """Wait for something that happens by itself while a command runs."""
    until = time.monotonic() + 40.0
    while not true():
        assert time.monotonic() < until
        if process is not None and process.poll() is not None:
            raise AssertionError(ended(process))
        time.sleep(0.02)


def test_twenty_darks_from_the_command_line(camera: LoopbackCamera, commands: Commands) -> None:
    """Shot as ordered and folded as darks. Ctrl-C ends it after the dark under way, and the same order goes on then."""
    camera.turn("noise_reduction", 1)
    camera.behave(time_scale=0.1)
    before = set_to(camera)
    order = ("--frames", 20, "--exposure", 4, "--iso", 1600)
    first = commands.darks(*order)
    wait_until(lambda: camera.status.shots == 1 and camera.status.exposing, first)
    first.send_signal(signal.SIGINT)
    code, out, err = ended(first)
    assert (code, out) == (1, "2 of 20 darks. Stopped.\nThe same order goes on from there.\n")
    assert "Stopping. The dark under way is the last one" in err
    assert (camera.status.captures, camera.bulb_open, set_to(camera)) == (2, False, before)
    assert commands.kinds() == {("folded", "dark"): 2, ("companion", None): 2}

    camera.behave(time_scale=0.01)
    code, out, err = ended(commands.darks(*order, "--json"))
    assert code == 0, err
    series = json.loads(out)["series"]
    assert (series["stage"], series["taken"], series["resumed_at"], series["folded"]) == ("done", 20, 2, 18)
    assert series["warnings"] == []
    assert "20 of 20 darks taken  4 s  ISO 1600" in err
    assert taken_as(camera) == [(4.0, 1600.0)] * 40
    assert (camera.status.captures, camera.bulb_open, set_to(camera)) == (20, False, before)
    assert commands.kinds() == {("folded", "dark"): 20, ("companion", None): 20}


def test_darks_that_are_refused_are_told(camera: LoopbackCamera, commands: Commands) -> None:
    """They are none of the statistic, however many were taken."""
    camera.turn("quality", 2)
    camera.capture_rendered("test_darks:one_cut_short")
    code, out, err = ended(commands.darks("--frames", 3, "--exposure", 1))
    assert code == 1
    assert "3 of 3 darks: all darks are taken, but 1 refused: hotpixd status says why." in out
    assert "was refused: " in err
    assert commands.kinds() == {("folded", "dark"): 2, ("refused", None): 1}


def test_interrupted_with_the_shutter_open_it_is_closed(camera: LoopbackCamera, commands: Commands) -> None:
    """By Ctrl-C, and the camera is set back; and if the command is killed and its daemon with it."""
    before = set_to(camera)
    order = ("--frames", 3, "--exposure", 60, "--bulb")
    first = commands.darks(*order)
    wait_until(lambda: camera.bulb_open, first)
    first.send_signal(signal.SIGINT)
    code, out, err = ended(first)
    assert (code, out) == (1, "0 of 3 darks. Stopped.\n")
    assert "Stopping. The shutter is closed now" in err
    assert (camera.bulb_open, camera.status.bulbs, set_to(camera)) == (False, 1, before)

    second = commands.darks(*order)
    wait_until(lambda: camera.bulb_open, second)
    second.kill()
    wait_until(lambda: not camera.bulb_open)
    assert camera.status.longest_bulb_s < 20
    wait_until(lambda: set_to(camera) == before)


def test_until_stable_it_ends_early(camera: LoopbackCamera, commands: Commands) -> None:
    """After the first darks that can show something, and as many as were asked for that show nothing new."""
    keyboard, screen = pty.openpty()
    fcntl.ioctl(screen, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    streams = {"stdin": screen, "stdout": screen, "stderr": screen, "text": False}
    series = commands.darks("--frames", 40, "--exposure", 4, "--iso", 1600, "--until-stable", 3, **streams)
    os.close(screen)
    shown = b""
    # The terminal hangs up when the last of its programs has ended.
    with contextlib.suppress(OSError):
        while data := os.read(keyboard, 1 << 16):
            shown += data
    os.close(keyboard)
    assert series.wait(10) == 0
    assert re.search(rb"/40.*4 s  ISO 1600  \d:\d\d left", shown)
    assert re.search(rb"\d+ of 40 darks: the map has not changed for \d darks.\r\n", shown)
    taken = camera.status.shots
    # Folding may be some darks behind.
    assert 7 <= taken < 20
    assert commands.kinds()["folded", "dark"] == taken


def test_a_daemon_shoots_one_series_at_a_time(
    camera: LoopbackCamera, commands: Commands, start: Callable[..., Any]
) -> None:
    """Killed while it holds the shutter open, it leaves none open, even if its worker is killed with it."""
    tether = ("tether", "--plain", "--existing", "later", "--camera", camera.port)
    daemon = start(*tether)
    order = ("--frames", 3, "--exposure", 60, "--bulb")
    first = commands.darks(*order)
    wait_until(lambda: camera.bulb_open, first)
    code, _, err = ended(commands.darks("--frames", 2))
    assert (code, err) == (3, "hotpixd: A series of darks is being shot already; hotpixd darks --stop ends it.\n")
    assert ended(commands.darks("--stop"))[:2] == (0, "The series ends.\n")
    code, out, _ = ended(first)
    assert (code, out) == (1, "0 of 3 darks. Stopped.\n")
    assert not camera.bulb_open
    assert ended(commands.darks("--stop"))[:2] == (0, "No darks are being shot.\n")

    second = commands.darks(*order)
    wait_until(lambda: camera.bulb_open, second)
    second.kill()
    second.wait()
    assert camera.bulb_open
    daemon.process.kill()
    wait_until(lambda: not camera.bulb_open)
    daemon.process.wait()

    daemon = start(*tether)
    third = commands.darks(*order)
    wait_until(lambda: camera.bulb_open, third)
    third.kill()
    os.kill(daemon.process.pid, signal.SIGSTOP)
    for worker in Path(f"/proc/{daemon.process.pid}/task/{daemon.process.pid}").parent.glob("*/children"):
        for pid in worker.read_text().split():
            os.kill(int(pid), signal.SIGKILL)
    daemon.process.kill()
    daemon.process.wait()
    time.sleep(0.3)
    assert camera.bulb_open
    start(*tether)
    wait_until(lambda: not camera.bulb_open)


def test_an_old_series_is_not_gone_on_with() -> None:
    """After a day the sensor is at another temperature; another camera is another sensor. Nor with another order."""
    order = SeriesOrder(**ORDER)
    journal = Journal(order, "LB0001", taken=2)
    assert journal.goes_on_with(order, "LB0001")
    assert not journal.goes_on_with(order, "LB0002")
    assert not journal.goes_on_with(replace(order, iso=800), "LB0001")
    assert not journal.goes_on_with(replace(order, anew=True), "LB0001")
    assert journal.goes_on_with(replace(order, cooldown_s=9.0, anyway=True), "LB0001")
    journal.at -= 100_000
    assert not journal.goes_on_with(order, "LB0001")


@pytest.mark.parametrize(
    ("choice", "exposure_s"),
    [("30", 30.0), ("1/200", 0.005), ("30.0000s", 30.0), ("0.3", 0.3), ('2"', 2.0), ("bulb", None), ("1/0", None)],
)
def test_exposure_times_are_read_from_choices(choice: str, exposure_s: float | None) -> None:
    """As libgphoto2's drivers write them."""
    assert seconds(choice) == exposure_s
