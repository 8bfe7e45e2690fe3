"""The luma of JPEGs instead of their red, green and blue: a third of the samples, and the same defects."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from conftest import run, told
from daemons import Daemon
from hotpixd.intake.decode import decode
from hotpixd.intake.decoders import Decoders
from hotpixd.intake.files import find_shots
from hotpixd.monitor import Fate, Monitor
from hotpixd.simulate import VirtualSensor, write_series
from hotpixd.store.state import State

SENSOR = VirtualSensor(320, 240, hot=12, stuck=3, dead=3, seed=11, hot_range_adu_per_s=(3000.0, 12_000.0))
FRAMES = 30


@pytest.fixture(scope="module")
def jpegs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of JPEGs of a moving scene."""
    folder = tmp_path_factory.mktemp("jpegs")
    for _ in write_series(folder, SENSOR, FRAMES, "moving", "jpg"):
        pass
    (folder / "truth.json").unlink()
    return folder


@pytest.fixture(scope="module")
def scanned_luma(jpegs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A state that `scan --luma` has made of them."""
    root = tmp_path_factory.mktemp("luma") / "state"
    assert run("scan", "--luma", "--state", root, jpegs).returncode == 0
    return root


def sensors(root: Path) -> list[dict[str, Any]]:
    return list(json.loads(run("defects", "--json", "--state", root).stdout)["sensors"])


def places(sensor: dict[str, Any]) -> set[tuple[int, int]]:
    return {(d["x"], d["y"]) for d in sensor["defects"]}


def test_the_luma_is_what_pillow_reads(jpegs: Path):
    """The file's own Y, not made of its red, green and blue; decoded here and in a jail."""
    path = sorted(jpegs.iterdir())[0]
    with Image.open(path) as picture:
        assert picture.mode == "RGB"
        picture.draft("L", None)
        expected = np.asarray(picture)
    decoders = Decoders(luma=True)
    try:
        for frame in (decode(path, luma=True), decoders.decode(path)):
            np.testing.assert_array_equal(frame.samples, expected)
            assert (frame.sensor.layout.colours, frame.sensor.layout.channels) == ("L", 1)
            assert frame.sensor.samples == "rendered"
    finally:
        decoders.close()
    assert decode(path).sensor.layout.channels == 3


def test_it_finds_the_defects_that_red_green_and_blue_show(jpegs: Path, scanned_luma: Path, tmp_path: Path):
    """And nothing else; in one state they are two statistics."""
    (luma,) = sensors(scanned_luma)
    assert (luma["samples"], luma["frames"], {d["colour"] for d in luma["defects"]}) == ("rendered", FRAMES, {"L"})
    planted = {(d.x, d.y) for d in SENSOR.defects}
    assert places(luma) <= planted
    both = tmp_path / "state"
    assert run("scan", "--state", both, *sorted(jpegs.iterdir())[: FRAMES - 1]).returncode == 0
    assert len(places(luma)) >= len(places(sensors(both)[0])) >= 10
    done = run("scan", "--luma", "--state", both, jpegs)
    assert done.returncode == 0
    assert f"{FRAMES - 1} of those known were folded as red, green and blue, which stays so." in done.stdout
    assert sorted(sensor["frames"] for sensor in sensors(both)) == [1, FRAMES - 1]
    checked = run("verify", "--state", both)
    assert checked.returncode == 0
    assert checked.stdout.count("320x240 rendered, luma") == 1


def test_a_scan_without_luma_says_what_was_folded_as_luma(jpegs: Path, scanned_luma: Path, tmp_path: Path):
    """And how to change that, as the other way round. A grey JPEG is luma in any case."""
    shutil.copytree(scanned_luma, tmp_path / "state")
    done = run("scan", "--state", tmp_path / "state", jpegs)
    assert done.returncode == 0
    said = f"{FRAMES} of those known were folded as luma, which stays so. To change that: hotpixd rebuild FOLDER\n"
    assert said in done.stdout
    again = run("scan", "--luma", "--state", tmp_path / "state", jpegs)
    assert "stays so" not in again.stdout
    with Image.open(min(jpegs.iterdir())) as image:
        image.convert("L").save(tmp_path / "grey.jpg", quality=95)
    for _ in range(2):
        grey = run("scan", "--state", tmp_path / "grey", tmp_path / "grey.jpg")
    assert "1 known already" in grey.stdout
    assert "stays so" not in grey.stdout


def test_a_healthy_sensor_has_no_defects_in_its_luma(tmp_path: Path):
    """The control."""
    healthy = VirtualSensor(320, 240, hot=0, stuck=0, dead=0, seed=12)
    for _ in write_series(tmp_path / "jpegs", healthy, FRAMES, "moving", "jpg"):
        pass
    assert run("scan", "--luma", "--state", tmp_path / "state", tmp_path / "jpegs").returncode == 0
    (luma,) = sensors(tmp_path / "state")
    assert luma["frames_counted"] > FRAMES // 2
    assert luma["defects"] == []


def test_raw_frames_are_what_they_always_are(camera, scanned, tmp_path: Path):
    """It is about JPEGs alone."""
    assert run("scan", "--luma", "--state", tmp_path / "state", camera.folder).returncode == 0
    assert told(tmp_path / "state") == told(scanned)


def test_a_state_of_luma_can_be_made_anew(jpegs: Path, scanned_luma: Path, tmp_path: Path):
    """As what it was."""
    shutil.copytree(scanned_luma, tmp_path / "state")
    (tmp_path / "state" / "ledger.sqlite").unlink()
    assert run("rebuild", "--luma", jpegs, "--state", tmp_path / "state").returncode == 0
    assert told(tmp_path / "state") == told(scanned_luma)


def test_an_interruption_does_not_turn_luma_into_colours(jpegs: Path, tmp_path: Path):
    """Whoever takes it up, shots stay in the statistic that they were folded into."""
    shots = find_shots([str(path) for path in sorted(jpegs.iterdir())[:8]]).shots
    decoders = Decoders(luma=True)
    try:
        with State(tmp_path / "state") as state, Monitor(state, decoders=decoders) as monitor:
            assert [outcome.fate for outcome in monitor.process(shots)] == [Fate.FOLDED] * 8
        with State(tmp_path / "whole") as state, Monitor(state, decoders=decoders) as monitor:
            list(monitor.process(shots))
            monitor.checkpoint()
    finally:
        decoders.close()
    with State(tmp_path / "state") as state, Monitor(state) as monitor:
        assert len(list(monitor.replay())) == 8
        assert monitor.warnings == []
        monitor.checkpoint()
    assert told(tmp_path / "state") == told(tmp_path / "whole")


def test_a_damaged_statistic_of_luma_is_cured_by_any_scan(jpegs: Path, scanned_luma: Path, tmp_path: Path):
    """As `verify` promises, which does not know of what kind the next scan is."""
    root = tmp_path / "state"
    shutil.copytree(scanned_luma, root)
    (generation,) = root.glob("sensors/*/gen-*.hpx")
    content = bytearray(generation.read_bytes())
    content[len(content) // 2] ^= 1
    generation.write_bytes(content)
    assert run("verify", "--state", root).returncode == 3
    assert run("scan", "--state", root, jpegs).returncode == 0
    assert told(root) == told(scanned_luma)


def test_the_daemon_folds_it_if_its_configuration_says_so(jpegs: Path, scanned_luma: Path, tmp_path: Path):
    """With the same result; a reload tells that the key takes effect at the next start."""
    config = tmp_path / "config.yaml"
    settings = {"jpeg": "luma", "sources": [{"directory": str(jpegs)}]}
    config.write_text(json.dumps(settings))
    daemon = Daemon(tmp_path / "state", tmp_path, "run", "--config", config)
    try:
        daemon.wait_ready().wait_folded(FRAMES)
        assert daemon.stop() == 0
    finally:
        daemon.close()
    assert told(tmp_path / "state")["digests"] == told(scanned_luma)["digests"]


def test_a_colour_jpeg_is_repaired_with_the_map_of_its_luma(scanned_luma: Path, tmp_path: Path):
    """Wherever the map has a defect that shows, in all colours; nothing elsewhere."""
    index = FRAMES + 5
    SENSOR.write_jpeg(tmp_path / "a.jpg", SENSOR.shot(index, "moving"))
    done = run("repair", tmp_path / "a.jpg", "-o", tmp_path / "out", "--state", scanned_luma, "--json")
    assert done.returncode == 0, done.stderr
    (picture,) = json.loads(done.stdout)["pictures"]
    assert picture["corrected"] >= 5
    before, after = (decode(path).samples.reshape(240, 320, 3) for path in (tmp_path / "a.jpg", tmp_path / "out/a.jpg"))
    changed = np.argwhere((before != after).any(axis=2))
    known = np.array([(d["y"], d["x"]) for d in picture["defects"]])
    assert len(changed)
    distances = np.abs(changed[:, np.newaxis, :] - known).max(axis=2).min(axis=1)
    assert distances.max() < 32


def test_of_two_maps_that_of_more_frames_is_taken_with_all_that_is_declared(jpegs: Path, tmp_path: Path):
    """Both are of one body, and of one grid of pixels."""
    root, files = tmp_path / "state", sorted(jpegs.iterdir())
    assert run("scan", "--state", root, *files[:3]).returncode == 0
    (colours,) = sensors(root)
    assert run("mark", 3, 5, "--state", root).returncode == 0
    assert run("scan", "--luma", "--state", root, jpegs).returncode == 0
    done = run("repair", files[5], "-o", tmp_path / "out", "--state", root, "--json")
    assert done.returncode == 0, done.stderr
    (picture,) = json.loads(done.stdout)["pictures"]
    assert picture["sensor"] != colours["id"]
    assert picture["corrected"] >= 5
    assert [d["why"] for d in picture["defects"] if (d["x"], d["y"]) == (3, 5)] == ["declared"]
    refused = run("repair", jpegs, "-o", tmp_path / "none", "--state", root)
    assert refused.returncode == 1
    assert "it is a folder; name the pictures in it" in refused.stderr
