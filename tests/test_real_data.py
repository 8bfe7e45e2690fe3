"""Frames of real cameras: what is known of them must come out, and nothing else.

The pictures are no part of the project; without the folder that holds them (HOTPIXD_SHARED, or `shared` beside the
repository) these tests are skipped.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile

from conftest import feed, run
from hotpixd.core.frame import SampleKind, ShotKind
from hotpixd.intake.decode import DecodeError, decode
from hotpixd.store.state import State
from hotpixd.views import answers
from pictures import SHARED

pytestmark = pytest.mark.skipif(not SHARED.is_dir(), reason="the folder of real frames is not on this machine")

Site = tuple[int, int]

EXPOSURES_S = (0.5, 0.5, 2.0, 2.0, 3.916, 3.916)
"""Of the six longest darks of the series."""


def truth(name: str) -> dict[Site, float]:
    """Return the excess of the hot pixels that are known, by position."""
    listed = json.loads((SHARED / name / "truth.json").read_text())["hot"]
    return {(x, y): excess for x, y, excess in listed}


def found(root: Path, *wanted: Path, kind: ShotKind | None = None) -> dict[Site, dict[str, Any]]:
    """Scan into a new state and return the stable defects of its only sensor, by position."""
    outcomes = feed(root, *wanted, kind=kind)
    assert outcomes
    assert all(outcome.fate == "folded" for outcome in outcomes), outcomes
    with State(root) as state:
        (sensor,) = answers.defects(state)["sensors"]
    assert sensor["frames"] == len(outcomes)
    return {(d["x"], d["y"]): d for d in sensor["defects"]}


def residuals(folder: Path, site: Site, step: int) -> list[float]:
    """Return what a site has above the median of its eight neighbours of the same colour, frame by frame."""
    x, y = site
    around = [(dy, dx) for dy in (-step, 0, step) for dx in (-step, 0, step) if dy or dx]
    values = []
    for path in sorted(folder.glob("*.tif*"), key=exposure_ms):
        frame = tifffile.imread(path).astype(int)
        inside = [
            (y + dy, x + dx) for dy, dx in around if 0 <= y + dy < frame.shape[0] and 0 <= x + dx < frame.shape[1]
        ]
        values.append(frame[y, x] - float(np.median([frame[place] for place in inside])))
    return values


def stands_out(frame: np.ndarray, site: Site) -> bool:
    """Tell whether a site is above its colour's neighbourhood by five deviations and by more than rounding."""
    x, y = site
    near = frame[max(y - 8, y % 2) : y + 9 : 2, max(x - 8, x % 2) : x + 9 : 2]
    median = np.median(near)
    deviation = max(1.4826 * float(np.median(np.abs(near - median))), 0.3)
    return bool(frame[y, x] - median > max(5 * deviation, 2))


def exposure_ms(path: Path) -> float:
    stated = re.search(r"_(\d+)ms", path.name)
    return float(stated[1]) if stated else 0.0


def assert_complete(defects: dict[Site, dict[str, Any]], known: dict[Site, float]) -> None:
    missed = {site: known[site] for site in known.keys() - defects.keys()}
    assert not missed, f"missed of {len(known)}, with their excess in ADU: {missed}"


@pytest.mark.parametrize("kind", [None, ShotKind.DARK], ids=["auto", "dark"])
@pytest.mark.parametrize("files", ["flea3_d1_bayer", "flea3_d1_dng_derived"], ids=["tiff", "dng"])
def test_all_hot_pixels_of_a_dark_series_are_found(files, kind, tmp_path):
    """All 17 known ones; any other is in the longest darks too, weaker than the list goes down to, but for 2."""
    known = truth("flea3_d1_bayer")
    assert len(known) == 17
    defects = found(tmp_path / "state", SHARED / files / "darks", kind=kind)
    darks = SHARED / "flea3_d1_bayer" / "darks"
    # The list wants 5 ADU in each of the four longest darks. Less is an excess too, if all four show it.
    baseless = [site for site in defects.keys() - known.keys() if min(residuals(darks, site, 2)[-4:]) < 1]
    assert len(baseless) <= 2, baseless
    assert_complete(defects, known)


def test_the_excess_of_a_dark_series_is_seen_to_grow_with_exposure(tmp_path):
    """The DNG state their exposure: every known pixel is hot, with a slope that the frames show."""
    known = truth("flea3_d1_bayer")
    defects = found(tmp_path / "state", SHARED / "flea3_d1_dng_derived" / "darks")
    for site in known.keys() & defects.keys():
        defect = defects[site]
        assert defect["kind"] == "hot", (site, defect)
        # Of the six longest darks, as the sites are not all linear.
        longest = zip(residuals(SHARED / "flea3_d1_bayer" / "darks", site, 2)[-6:], EXPOSURES_S, strict=True)
        rates = [excess_adu / exposure_s for excess_adu, exposure_s in longest]
        assert 0.9 * min(rates) <= defect["dark_current_adu_per_s"] <= 1.1 * max(rates), (site, defect)


def test_a_dark_series_without_stated_exposures_has_no_unstable_pixels(tmp_path):
    """The TIFF do not state it: an excess that differs from frame to frame may just follow the exposure."""
    defects = found(tmp_path / "state", SHARED / "flea3_d1_bayer" / "darks")
    odd = {site: d["kind"] for site, d in defects.items() if d["kind"] not in ("hot", "warm", "bright")}
    assert not odd


@pytest.mark.parametrize("files", ["flea3_d1_bayer", "flea3_d1_dng_derived"], ids=["tiff", "dng"])
def test_light_frames_of_a_target_that_stands_still_show_no_defect_that_is_none(files, tmp_path):
    """At most 2 beside those that the darks of the same sensor show."""
    defects = found(tmp_path / "state", SHARED / files / "lights")
    darks = SHARED / "flea3_d1_bayer" / "darks"
    baseless = {s: d["kind"] for s, d in defects.items() if min(residuals(darks, s, 2)[-4:]) < 1}
    assert len(baseless) <= 2, baseless


def test_light_frames_alone_show_the_hot_pixels_that_can_be_seen_in_them(tmp_path):
    """Those which stand out of their neighbourhood in 8 of the 49 frames or more: the other exposures are too short."""
    folder = SHARED / "flea3_d1_bayer" / "lights"
    known = truth("flea3_d1_bayer")
    frames = [tifffile.imread(path).astype(int) for path in sorted(folder.glob("*.tif"))]
    seen = {site: excess for site, excess in known.items() if sum(stands_out(f, site) for f in frames) >= 8}
    assert len(seen) >= 4
    assert_complete(found(tmp_path / "state", folder), seen)


def test_darks_and_lights_together_show_all_hot_pixels(tmp_path):
    """Frames of both kinds add up to one body of evidence."""
    defects = found(tmp_path / "state", SHARED / "flea3_d1_dng_derived")
    assert_complete(defects, truth("flea3_d1_bayer"))


@pytest.mark.parametrize("files", ["tetra3_bfs_tiff", "tetra3_bfs_jpeg"])
def test_all_hot_pixels_of_a_moving_sky_are_found(files, tmp_path):
    """All known ones of eight light frames. Any other defect has an excess in each of the eight frames."""
    defects = found(tmp_path / "state", SHARED / files)
    tiffs = SHARED / "tetra3_bfs_tiff"
    # Stars are never seen eight times at one place. A frame's noise is 130 ADU, JPEG smears by a pixel.
    others = defects.keys() - truth("tetra3_bfs_tiff").keys()
    baseless = [site for site in others if np.mean(residuals(tiffs, site, 1)) < 260]
    assert len(baseless) <= 2, baseless
    assert_complete(defects, truth(files))


def test_a_static_scene_is_not_mistaken_for_defects(tmp_path):
    """A sculpture under changing stripes: one bright detail of it persists in every frame of the series."""
    assert not found(tmp_path / "state", SHARED / "canon_1d4_left")


@pytest.mark.parametrize("pattern", ["d_*", "b_*", "*"], ids=["darks", "lights", "all"])
def test_a_sensor_without_defects_has_none(pattern, tmp_path):
    """Uniform frames of a clean sensor."""
    assert not found(tmp_path / "state", SHARED / "emva_ccd12" / f"{pattern}.png")


def test_broken_raw_files_are_refused_each_with_a_sentence(tmp_path):
    """Through the command: exit code 1, every file by its name, nothing folded."""
    folder = SHARED / "raw_misc" / "broken"
    done = run("scan", folder, "--state", tmp_path / "state")
    files = sorted(path.name for path in folder.iterdir())
    assert done.returncode == 1
    assert f"0 shots folded, {len(files)} refused." in done.stdout
    for name in files:
        assert re.search(rf"refused {re.escape(name)}: \w+( \S+){{4,}}", done.stdout), name
    assert done.stderr == ""


def test_pictures_under_the_name_of_a_raw_are_not_taken_for_one(tmp_path):
    """JPEG data in .nef: what a program edited is refused, and nothing of it is a raw sensor."""
    for path in sorted((SHARED / "raw_misc" / "misnamed_jpeg_as_nef").iterdir()):
        try:
            assert decode(path).sensor.samples is SampleKind.RENDERED
        except DecodeError as error:
            assert len(str(error).split()) > 4


BODIES = {
    "Canon_EOS_20D_1.jpg": ("Canon EOS 20D", "330113864"),
    "Canon_EOS_20D_3.jpg": ("Canon EOS 20D", "320116738"),
    "Canon_PowerShot_S40_2.jpg": ("Canon PowerShot S40", None),
}


def test_pictures_of_many_makes_have_an_identity_or_a_refusal():
    """Bodies are told apart by serial where the file has one; what was edited is refused by the editor's name."""
    refused = {}
    for path in sorted((SHARED / "exif_zoo_jpeg").glob("*.jpg")):
        try:
            sensor = decode(path).sensor
        except DecodeError as error:
            refused[path.name] = str(error)
            continue
        assert sensor.samples is SampleKind.RENDERED
        assert sensor.make
        assert sensor.model
        if path.name in BODIES:
            assert (sensor.model, sensor.serial) == BODIES[path.name]
    assert "Noise Ninja" in refused.pop("Canon_EOS-1DS_after_Noise_Ninja.jpg")
    assert "Nikon Transfer" in refused.pop("Nikon_D70.jpg")
    assert not refused


def test_two_frames_of_a_cooled_camera_open_and_say_nothing_yet(tmp_path):
    """42 pixels persist in both: too few frames to call any of them a defect."""
    pytest.importorskip("astropy", reason="FITS needs astropy")
    assert not found(tmp_path / "state", SHARED / "umd_st8_fits")
