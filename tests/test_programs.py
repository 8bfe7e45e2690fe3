"""Maps as other programs use them: the planted pixels are corrected there, and only they.

A test whose program or library is not there is skipped. What is compared is pixels: with a picture that has no
defects, and without the map as the control.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import struct
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rawpy
import tifffile
from astropy.io import fits
from numpy.typing import NDArray

from hotpixd.intake.decode import decode
from hotpixd.views.exports import FORMATS, Extras, rawtherapee_name
from hotpixd.views.maps import DefectMap, Rows, defect_map
from test_exports import NOW, SENSOR, found

WIDTH, HEIGHT = 416, 300
LEFT, TOP, RIGHT, BOTTOM = 22, 14, 10, 6
"""Margins: their sum with the width is a multiple of 32, see test_darktable."""

PLANTED = [
    (0, 0), (WIDTH - 1, 0), (0, HEIGHT - 1), (WIDTH - 1, HEIGHT - 1), (100, 77), (101, 150), (200, 151), (33, 2),
    (7, HEIGHT - 3),
]  # fmt: skip
"""In the visible area: its corners, and sites of all four planes."""

LEVEL, HOT = 2000, 15000

Pixels = set[tuple[int, int]]


@dataclass(frozen=True)
class Shots:
    """A shot with planted defects, and the same without."""

    hot: Path
    clean: Path
    margins: tuple[int, int, int, int]
    """Left, top, right, bottom."""


def _mosaics(left: int, top: int, right: int, bottom: int) -> tuple[NDArray[np.uint16], NDArray[np.uint16]]:
    noise = np.random.default_rng(1).integers(0, 40, (HEIGHT + top + bottom, WIDTH + left + right))
    clean = (LEVEL + noise).astype(np.uint16)
    hot = clean.copy()
    for x, y in PLANTED:
        hot[y + top, x + left] = HOT
    return hot, clean


def write_dng(path: Path, mosaic: NDArray[np.uint16], margins: tuple[int, int, int, int], serial: str) -> None:
    """Write a DNG with margins around its active area, whose corner is red."""
    left, top, right, bottom = margins
    one, zero = (1, 1), (0, 1)
    height, width = mosaic.shape
    tags = [
        (271, "s", 0, "Hotpixd", True), (272, "s", 0, "Virtual Camera", True),
        (306, "s", 0, "2025:06:01 20:00:00", True), (36867, "s", 0, "2025:06:01 20:00:00", True),
        (33421, "H", 2, (2, 2), True), (33422, "B", 4, bytes((0, 1, 1, 2)), True),
        (33434, "2I", 1, (1, 1), True), (34855, "H", 1, 100, True), (50706, "B", 4, bytes((1, 4, 0, 0)), True),
        (50707, "B", 4, bytes((1, 1, 0, 0)), True), (50708, "s", 0, "Hotpixd Virtual Camera", True),
        (50714, "I", 1, 512, True), (50717, "I", 1, 16383, True),
        (50721, "2i", 9, (*one, *zero, *zero, *zero, *one, *zero, *zero, *zero, *one), True),
        (50728, "2I", 3, one * 3, True), (50735, "s", 0, serial, True), (50778, "H", 1, 21, True),
        (50829, "I", 4, (top, left, height - bottom, width - right), True),
    ]  # fmt: skip
    tifffile.imwrite(path, mosaic, photometric=32803, extratags=tags, metadata=None, software=False)


@pytest.fixture(scope="module", params=["margins", "no margins"])
def shots(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Shots:
    """Shots as DNG, with and without margins."""
    folder = tmp_path_factory.mktemp("shots")
    margins = (LEFT, TOP, RIGHT, BOTTOM) if request.param == "margins" else (0, 0, 0, 0)
    hot, clean = _mosaics(*margins)
    write_dng(folder / "hot.dng", hot, margins, "0123")
    write_dng(folder / "clean.dng", clean, margins, "0123")
    return Shots(folder / "hot.dng", folder / "clean.dng", margins)


def the_map(points: Iterable[tuple[int, int]] = PLANTED, rows: Rows = Rows.PICTURE) -> DefectMap:
    """Return a map of the virtual camera."""
    about = {**SENSOR, "make": "Hotpixd", "model": "Virtual Camera", "width": WIDTH, "height": HEIGHT}
    return defect_map({**about, "defects": [found(x, y) for x, y in points]}, NOW, rows=rows)


def beyond(picture: NDArray[Any], other: NDArray[Any], limit: float) -> Pixels:
    """Return where two pictures differ by more than a limit: x, y."""
    difference = np.abs(picture.astype(np.int64) - other.astype(np.int64))
    if difference.ndim == 3:
        difference = difference.max(axis=2)
    rows, columns = np.nonzero(difference > limit)
    return set(zip(columns.tolist(), rows.tolist(), strict=True))


def ran(*command: object, home: Path, **environment: str) -> str:
    """Run another program in a home of its own; return what it said."""
    done = subprocess.run(
        [*map(str, command)],
        env={**os.environ, "HOME": str(home), "XDG_CONFIG_HOME": str(home / "config"), **environment},
        capture_output=True,
        text=True,
        errors="replace",
        timeout=200,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def needs(program: str) -> Any:
    """Skip a test where a program is not there."""
    return pytest.mark.skipif(shutil.which(program) is None, reason=f"{program} is not installed")


def test_hotpixd_s_own_visible_area_is_what_the_maps_count_in(shots: Shots):
    """The control of all others: the planted pixels are there, and nowhere else."""
    hot, clean = decode(shots.hot), decode(shots.clean)
    assert (hot.sensor.layout.width, hot.sensor.layout.height) == (WIDTH, HEIGHT)
    assert beyond(hot.samples, clean.samples, 100) == set(PLANTED)


# --- LibRaw


def developed(path: Path, bad_pixels: Path | None = None) -> NDArray[np.uint16]:
    """Develop a DNG with LibRaw, each pixel from its own neighbours only."""
    params = rawpy.Params(
        user_flip=0, output_bps=16, no_auto_bright=True, use_camera_wb=True, gamma=(1, 1),
        demosaic_algorithm=rawpy.DemosaicAlgorithm.LINEAR,
    )  # fmt: skip
    if bad_pixels is not None:
        # What `postprocess(bad_pixels_path=)` is for: in rawpy 0.28 it refuses any text.
        params.bad_pixels = os.fsencode(bad_pixels)
    with rawpy.imread(os.fspath(path)) as raw:
        return np.asarray(raw.postprocess(params))


def test_libraw_corrects_the_planted_pixels(shots: Shots, tmp_path: Path):
    """With the list the picture is that of the clean shot; without, and with a list one column off, it is not."""
    clean = developed(shots.clean)
    (tmp_path / "right").write_bytes(FORMATS["dcraw"].make(the_map(), Extras()))
    (tmp_path / "off").write_bytes(FORMATS["dcraw"].make(the_map([(x - 1, y) for x, y in PLANTED if x]), Extras()))
    without, off = developed(shots.hot), developed(shots.hot, tmp_path / "off")
    assert set(PLANTED) <= beyond(without, clean, 2000)
    assert {(x, y) for x, y in PLANTED if x} <= beyond(off, clean, 2000)
    assert not beyond(developed(shots.hot, tmp_path / "right"), clean, 300)


def test_libraw_changes_no_other_pixel(shots: Shots, tmp_path: Path):
    """Of a clean shot the list changes what depends on the listed pixels, by their noise, and nothing else."""
    (tmp_path / "list").write_bytes(FORMATS["dcraw"].make(the_map(), Extras()))
    changed = beyond(developed(shots.clean, tmp_path / "list"), developed(shots.clean), 0)
    # Bilinear interpolation looks one pixel far.
    near = {(x + dx, y + dy) for x, y in PLANTED for dx in (-1, 0, 1) for dy in (-1, 0, 1)}
    assert changed
    assert changed <= near


def test_libraw_leaves_pixels_alone_in_pictures_from_before_they_died(shots: Shots, tmp_path: Path):
    """Times of death are compared with the camera's clock, so they are only written where that is trusted."""
    shot_at = datetime(2025, 6, 1, 20, tzinfo=UTC)
    late = defect_map(
        {**the_map().sensor, "defects": [found(x, y, first_seen="2025-06-03T20:00:00Z") for x, y in PLANTED]}, NOW
    )
    (tmp_path / "timed").write_bytes(FORMATS["dcraw"].make(late, Extras(camera_clock=True)))
    (tmp_path / "untimed").write_bytes(FORMATS["dcraw"].make(late, Extras()))
    times = {int(line.split()[2]) for line in (tmp_path / "timed").read_text().splitlines() if line[0] != "#"}
    assert times == {int(shot_at.timestamp()) + 48 * 3600}
    assert not beyond(developed(shots.hot, tmp_path / "timed"), developed(shots.hot), 0)
    assert not beyond(developed(shots.hot, tmp_path / "untimed"), developed(shots.clean), 300)


# --- Siril


def siril(folder: Path, *lines: str) -> None:
    """Run a script of Siril in a folder."""
    (folder / "script.ssf").write_text("\n".join(["requires 1.0.0", "set16bits", *lines, ""]))
    said = ran("siril-cli", "-d", folder, "-s", folder / "script.ssf", home=folder)
    assert "successfully" in said, said


@needs("siril-cli")
def test_siril_corrects_the_planted_pixels_of_a_raw_file(shots: Shots, tmp_path: Path):
    """`cosme_cfa` changes them and no others; so close that the noise of the clean shot remains."""
    shutil.copyfile(shots.hot, tmp_path / "hot.dng")
    shutil.copyfile(shots.clean, tmp_path / "clean.dng")
    (tmp_path / "map.lst").write_bytes(FORMATS["siril"].make(the_map(), Extras()))
    siril(tmp_path, "load clean.dng", "save clean", "load hot.dng", "save hot", "cosme_cfa map.lst", "save fixed")
    hot, fixed, clean = (_top_down(tmp_path / f"{name}.fit") for name in ("hot", "fixed", "clean"))
    assert beyond(hot, clean, 100) == set(PLANTED)
    assert beyond(fixed, hot, 100) == set(PLANTED)
    assert not beyond(fixed, clean, 100)


def _top_down(path: Path) -> NDArray[Any]:
    """Return what Siril saved of a raw file, whose rows it stores from the bottom, top row first."""
    with fits.open(path) as units:
        assert units[0].header["ROWORDER"] == "BOTTOM-UP"
        return np.asarray(units[0].data)[::-1]


@needs("siril-cli")
@pytest.mark.parametrize("rows", [Rows.FITS, Rows.FITS_TOP_DOWN])
def test_siril_corrects_the_planted_pixels_of_fits_files(tmp_path: Path, rows: Rows):
    """Whichever way their rows are stored: it counts from the last one, whatever the header says."""
    hot, clean = _mosaics(0, 0, 0, 0)
    for name, mosaic in (("hot", hot), ("clean", clean)):
        unit = fits.PrimaryHDU(mosaic if rows is Rows.FITS_TOP_DOWN else mosaic[::-1])
        unit.header["BAYERPAT"] = "RGGB" if rows is Rows.FITS_TOP_DOWN else "GBRG"
        if rows is Rows.FITS_TOP_DOWN:
            unit.header["ROWORDER"] = "TOP-DOWN"
        unit.writeto(tmp_path / f"{name}.fit")
    # hotpixd sees the planted pixels where they are planted: the map is that of such frames.
    assert beyond(decode(tmp_path / "hot.fit").samples, decode(tmp_path / "clean.fit").samples, 100) == set(PLANTED)
    (tmp_path / "map.lst").write_bytes(FORMATS["siril"].make(the_map(rows=rows), Extras()))
    siril(tmp_path, "load hot.fit", "cosme_cfa map.lst", "save fixed")
    before, after = fits.getdata(tmp_path / "hot.fit"), fits.getdata(tmp_path / "fixed.fit")
    changed = beyond(before, after, 0)
    assert {(x, y if rows is Rows.FITS_TOP_DOWN else HEIGHT - 1 - y) for x, y in changed} == set(PLANTED)
    assert not beyond(after, fits.getdata(tmp_path / "clean.fit"), 100)


# --- RawTherapee

_RT_BORDER = 4
"""Pixels that it cuts off on each side."""


@needs("rawtherapee-cli")
@pytest.mark.parametrize("crop", [None, (LEFT + 4, TOP + 2)])
def test_rawtherapee_corrects_the_planted_pixels(shots: Shots, tmp_path: Path, crop: tuple[int, int] | None):
    """From its folder of dark frames, under the name that it looks for; in a DNG it finds no serial number.

    Also where its camconst.json has another crop of the raw frame than LibRaw: then the list is shifted.
    """
    if crop is not None and not shots.margins[0]:
        pytest.skip("there is nothing to crop")
    darks, settings = tmp_path / "darks", tmp_path / "settings"
    darks.mkdir()
    settings.mkdir()
    shift = 0, 0
    if crop is not None:
        known = {"make_model": "Hotpixd Virtual Camera", "raw_crop": [*crop, WIDTH - 8, HEIGHT - 6]}
        (settings / "camconst.json").write_text(json.dumps({"camera_constants": [known]}))
        shift = shots.margins[0] - crop[0], shots.margins[1] - crop[1]
    (settings / "options").write_text(f"[General]\nDarkFramesPath={darks}\nVerbose=true\n")
    (tmp_path / "plain.pp3").write_text("[RAW]\nCA=false\n[RAW Bayer]\nMethod=fast\n")

    def picture(shot: Path) -> tuple[NDArray[Any], str]:
        said = ran(
            "rawtherapee-cli", "-q", "-o", tmp_path / "out.tif", "-t", "-b16", "-Y", "-p", tmp_path / "plain.pp3",
            "-c", shot, home=tmp_path, RT_SETTINGS=str(settings), RT_CACHE=str(tmp_path / "cache"),
        )  # fmt: skip
        return tifffile.imread(tmp_path / "out.tif"), said

    clean, said = picture(shots.clean)
    size = (WIDTH, HEIGHT) if crop is None else (WIDTH - 8, HEIGHT - 6)
    assert clean.shape[:2] == (size[1] - 2 * _RT_BORDER, size[0] - 2 * _RT_BORDER)
    seen = {(x + shift[0] - _RT_BORDER, y + shift[1] - _RT_BORDER) for x, y in PLANTED}
    seen = {(x, y) for x, y in seen if 0 <= x < clean.shape[1] and 0 <= y < clean.shape[0]}
    without, _ = picture(shots.hot)
    assert len(seen) >= 3
    assert seen <= beyond(without, clean, 1500)
    name = rawtherapee_name({"make": "Hotpixd", "model": "Virtual Camera", "serial": None})
    assert f"{name} not found" in said
    (darks / name).write_bytes(FORMATS["rawtherapee"].make(the_map(), Extras(shift=shift)))
    corrected, said = picture(shots.hot)
    count = re.search(r"Correcting (\d+) pixels from .badpixels", said)
    assert count is not None
    assert int(count[1]) == len(PLANTED) if crop is None else int(count[1]) >= len(seen)
    if crop is not None:
        # The control: without the shift it is of no use.
        (darks / name).write_bytes(FORMATS["rawtherapee"].make(the_map(), Extras()))
        assert seen <= beyond(picture(shots.hot)[0], clean, 1500)
    assert not beyond(corrected, clean, 300)


# --- readers of DNG


@pytest.fixture
def listed(shots: Shots, tmp_path: Path) -> Path:
    """A copy of the shot with the defects that lists them."""
    path = tmp_path / "listed.dng"
    path.write_bytes(FORMATS["dng"].make(the_map(), Extras(dng=shots.hot)))
    return path


def test_a_copy_with_a_list_holds_the_samples_and_settings_of_the_original(shots: Shots, listed: Path):
    """As LibRaw reads both, and byte for byte: only the pointer to the directory is another."""
    before, after = decode(shots.hot), decode(listed)
    assert np.array_equal(before.samples, after.samples)
    assert (before.sensor, before.info) == (after.sensor, after.info)
    old, new = shots.hot.read_bytes(), listed.read_bytes()
    changed = [at for at in range(len(old)) if old[at] != new[at]]
    assert changed
    assert set(changed) <= set(range(4, 8))


@needs("darktable-cli")
def test_darktable_corrects_the_planted_pixels(shots: Shots, listed: Path, tmp_path: Path):
    """By RawSpeed, which applies the opcode.

    Its two faults are not ours, and avoided here: it leaves the last columns alone unless the stored width is, modulo
    32, none or more than 16; and what it interpolates at the very border of the stored samples comes out too dark.
    """

    def picture(shot: Path) -> NDArray[Any]:
        out = tmp_path / "out.tif"
        out.unlink(missing_ok=True)
        command: tuple[object, ...] = (
            "darktable-cli", shot, out, "--apply-custom-presets", "false", "--core", "--configdir", tmp_path / "dt",
            "--cachedir", tmp_path / "dtc", "--library", ":memory:", "--conf", "plugins/imageio/format/tiff/bpp=16",
        )  # fmt: skip
        ran(*command, home=tmp_path)
        return np.asarray(tifffile.imread(out))

    clean, without, corrected = picture(shots.clean), picture(shots.hot), picture(listed)
    inner = {
        (x, y)
        for x, y in PLANTED
        if 2 <= x + shots.margins[0] < WIDTH + shots.margins[0] + shots.margins[2] - 2
        and 2 <= y + shots.margins[1] < HEIGHT + shots.margins[1] + shots.margins[3] - 2
    }
    assert len(inner) == (len(PLANTED) if shots.margins[0] else 5)
    assert set(PLANTED) <= beyond(without, clean, 3000)
    left = beyond(corrected, clean, 3000)
    assert not {(x, y) for x, y in left if any(abs(x - a) < 4 and abs(y - b) < 4 for a, b in inner)}
    if shots.margins[0]:
        assert not left


@needs("exiftool")
def test_exiftool_finds_the_list(listed: Path, tmp_path: Path):
    """It names the opcode, and has nothing to complain of."""
    said = json.loads(ran("exiftool", "-j", "-validate", "-a", "-OpcodeList1", listed, home=tmp_path))
    assert "FixBadPixelsList" in said[0]["OpcodeList1"]
    assert "Error" not in said[0]


@needs("exiv2")
def test_exiv2_finds_the_list(listed: Path, tmp_path: Path, shots: Shots):
    """As bytes of the right number, beside what was there."""
    said = ran("exiv2", "-Pkyct", listed, home=tmp_path)
    (line,) = (line for line in said.splitlines() if "OpcodeList1" in line or "0xc740" in line)
    assert re.search(rf"Undefined\s+{4 + 16 + 12 + 8 * len(PLANTED)}\b", line)
    assert "Exif.Image.CameraSerialNumber" in said
    with tifffile.TiffFile(listed) as file:
        data = bytes(file.pages.first.tags[51008].value)
    numbers = struct.unpack_from(f">{2 * len(PLANTED)}I", data, 32)
    left, top = shots.margins[:2]
    assert sorted(zip(numbers[1::2], numbers[::2], strict=True)) == sorted((x + left, y + top) for x, y in PLANTED)


# --- astropy


def test_ccdproc_s_way_of_masking_hides_the_planted_pixels(tmp_path: Path):
    """A mask beside frames in FITS without ROWORDER, applied as an array, which is all that it does."""
    hot, _clean = _mosaics(0, 0, 0, 0)
    fits.PrimaryHDU(hot[::-1]).writeto(tmp_path / "hot.fits")
    (tmp_path / "mask.fits").write_bytes(FORMATS["fits-mask"].make(the_map(rows=Rows.FITS), Extras()))
    frame, mask = fits.getdata(tmp_path / "hot.fits"), fits.getdata(tmp_path / "mask.fits")
    masked = np.ma.MaskedArray(frame, mask.astype(bool))
    assert masked.max() < LEVEL + 40
    assert int(mask.sum()) == len(PLANTED)
