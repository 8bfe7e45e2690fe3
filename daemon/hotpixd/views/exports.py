"""Maps of defects and pictures of the statistic in the formats of other programs: turns a `DefectMap` into bytes.

What each program reads was found in its source, and tried with the program itself where it can be had: see the tests.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from hotpixd import __version__
from hotpixd.core.accumulator import COUNTS
from hotpixd.store.checkpoint import Generation
from hotpixd.views.maps import COLUMNS, DefectMap, Pixel, Rows
from hotpixd.views.opcodes import Dng, DngError
from hotpixd.views.text import printable, sensor_name
from hotpixd.words import many

if TYPE_CHECKING:
    from astropy.io.fits import Header

COORDINATES = "0-based, from the top left of the visible area, unrotated"


class ExportError(Exception):
    """A map cannot be written as wanted; a sentence."""


@dataclass(frozen=True, slots=True)
class Extras:
    """What some formats need beside the map."""

    camera_clock: bool = False
    """Whether the camera's clock is right, so that times of death mean something to the reader."""

    dng: Path | None = None
    """The DNG to which a list of bad pixels is added."""

    shift: tuple[int, int] = (0, 0)
    """What RawTherapee adds to x and y, where it crops raw files otherwise than LibRaw."""

    statistic: Callable[[], Generation] = field(default=lambda: _no_statistic())
    """Reads the newest generation of the sensor's statistic."""

    history: Callable[[], Mapping[str, Any]] = field(default=lambda: {"defects": []})
    """Reads the sensor's history."""

    raw_frame: Mapping[str, int] | None = None
    """Where the visible area lies in the raw file that was named as an example. None if none was."""

    suffix: str = ""
    """Of the file's name, in lower case: says which format a picture has."""


@dataclass(frozen=True, slots=True)
class Format:
    """A format that a map can be written in."""

    name: str

    about: str
    """For whom it is, and how it counts."""

    make: Callable[[DefectMap, Extras], bytes]
    """Makes the file's content."""

    text: bool = True
    """Whether it may go to a terminal or a pipe."""

    by_rows: bool = False
    """Whether the reader counts rows as they are in the files, so that it matters how these hold them."""

    mapped: bool = True
    """Whether it holds the map; pictures of the statistic do not."""

    beside: Callable[[DefectMap, Extras], bytes] | None = None
    """Makes a second file that the reader demands."""


# --- lists


def _lines(lines: Iterable[str]) -> bytes:
    return "".join(f"{line}\n" for line in lines).encode()


def _comments(about: DefectMap) -> list[str]:
    """Return what comments say. Pure ASCII and short: some readers take 127 bytes of a line and no more."""
    named = sensor_name(about.sensor).encode("ascii", "replace").decode()
    return [f"hotpixd {__version__}, {about.made_at}", named[:100], many(len(about.pixels), "pixel")]


def dcraw(about: DefectMap, extras: Extras) -> bytes:
    """Return lines of "column row time of death".

    LibRaw leaves a pixel alone in pictures that the camera dates earlier, so the time is 0 unless its clock is trusted.
    """
    points = (f"{p.x} {p.y} {_unix_time(p.first_seen) if extras.camera_clock else 0}" for p in about.pixels)
    return _lines([*(f"# {c}" for c in _comments(about)), *points])


def _unix_time(moment: str | None) -> int:
    return 0 if moment is None else max(int(datetime.fromisoformat(moment).timestamp()), 0)


def rawtherapee(about: DefectMap, extras: Extras) -> bytes:
    """Return lines of "column row". The first line is a comment: a lone number there would be an offset."""
    dx, dy = extras.shift
    shifted = ((p.x + dx, p.y + dy) for p in about.pixels)
    # What it crops away on the other side it passes over by itself.
    return _lines([*(f"# {c}" for c in _comments(about)), *(f"{x} {y}" for x, y in shifted if x >= 0 and y >= 0)])


_CORPORATIONS = (
    "AgfaPhoto", "Canon", "Casio", "Epson", "Fujifilm", "Mamiya", "Minolta", "Motorola", "Kodak", "Konica", "Leica",
    "Nikon", "Nokia", "Olympus", "Pentax", "Phase One", "Ricoh", "Samsung", "Sigma", "Sinar", "Sony",
)  # fmt: skip
"""Makers that raw converters call by these names, however long their files' own are."""


def rawtherapee_name(sensor: Mapping[str, Any]) -> str:
    """Return the name by which RawTherapee looks for the list of a camera: "Make Model Serial.badpixels"."""
    make, model = (sensor["make"] or "").strip(), (sensor["model"] or "").strip()
    make = next((name for name in _CORPORATIONS if name.lower() in make.lower()), make)
    if make and model.lower().startswith(make.lower()):
        model = model[len(make) :].strip()
    words = " ".join(word for word in (make, model, (sensor["serial"] or "").strip()) if word) or "unknown"
    return f"{printable(words).replace('/', '_')}.badpixels"


def siril(about: DefectMap, _: Extras) -> bytes:
    """Return lines of "P column row H|C"; no blank ones, which its calibration refuses."""
    points = (f"P {p.x} {about.rows.in_siril(p.y, about.height)} {'C' if p.cold else 'H'}" for p in about.pixels)
    return _lines([*(f"# {c}" for c in _comments(about)), *points])


def phd2(about: DefectMap, _: Extras) -> bytes:
    """Return PHD2's defect map."""
    comments = ("PHD2 Defect Map v1", *_comments(about)[:2], f"Defect count: {len(about.pixels)}")
    points = (f"{p.x} {about.rows.in_file(p.y, about.height)}" for p in about.pixels)
    return _lines([*(f"# {c}" for c in comments), *points])


def phd2_master(about: DefectMap, extras: Extras) -> bytes:
    """Return the master dark that PHD2 demands beside its map, of equal size: the mean of all frames."""
    picture = _mean(about, extras.statistic())
    if picture.ndim != 2:
        raise ExportError("PHD2 knows cameras with one sample per pixel only; this sensor's pictures are in colour")
    return _fits(about, np.rint(picture).clip(0, 65535).astype(np.uint16), {"IMAGETYP": "Dark Frame"})


def pixinsight(about: DefectMap, _: Extras) -> bytes:
    """Return lines of "Col x y y", each a column of one pixel. It takes no comments."""
    return _lines(f"Col {p.x} {row} {row}" for p in about.pixels for row in (about.rows.in_file(p.y, about.height),))


# --- tables


def comma_separated(about: DefectMap, _: Extras) -> bytes:
    """Return a table with a header, one pixel per line."""
    out = io.StringIO()
    writer = csv.DictWriter(out, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows({key: _plain(value) for key, value in pixel.row.items()} for pixel in about.pixels)
    return out.getvalue().encode()


def _plain(value: Any) -> Any:
    """Return a cell that no spreadsheet takes for a formula: names come from outside."""
    return f"'{value}" if isinstance(value, str) and value[:1] in ("=", "+", "-", "@") else value


def own(about: DefectMap, extras: Extras) -> bytes:
    """Return all that is known, as JSON."""
    lives = {(life["x"], life["y"], life["colour"]): life for life in extras.history()["defects"]}

    def with_history(entry: Mapping[str, Any]) -> dict[str, Any]:
        life = lives.get((entry["x"], entry["y"], entry["colour"]), {})
        return {**entry, "last_seen": life.get("last_seen"), "sessions": life.get("sessions")}

    content = {
        "hotpixd map": 1,
        "version": __version__,
        "made_at": about.made_at,
        "coordinates": COORDINATES,
        "raw_frame": extras.raw_frame,
        "sensor": about.sensor,
        "defects": [with_history(entry) for pixel in about.pixels for entry in pixel.found],
        "declared": [pixel.declared for pixel in about.pixels if pixel.declared is not None],
    }
    return json.dumps(content, indent=1).encode() + b"\n"


def ecsv(about: DefectMap, _: Extras) -> bytes:
    """Return LSST's table of boxes, of one pixel each: x0 y0 from the lower left."""
    from astropy.table import Column, Table

    pixels = about.pixels
    ones = np.ones(len(pixels), np.int32)
    rows = Rows.FITS_TOP_DOWN if about.rows is Rows.FITS_TOP_DOWN else Rows.FITS
    table = Table(
        [
            Column(np.array([p.x for p in pixels], np.int32), "x0", description="column, 0-based"),
            Column(np.array([rows.in_file(p.y, about.height) for p in pixels], np.int32), "y0"),
            Column(ones, "width"),
            Column(ones, "height"),
            Column(np.array([p.kind for p in pixels], "U16"), "kind"),
            Column(np.array([p.state for p in pixels], "U16"), "state"),
        ],
        meta={
            "hotpixd": __version__,
            "made_at": about.made_at,
            "sensor": {key: about.sensor[key] for key in ("make", "model", "serial", "width", "height")},
            "rows": "top-down" if rows is Rows.FITS_TOP_DOWN else "bottom-up",
        },
    )
    out = io.StringIO()
    table.write(out, format="ascii.ecsv")
    return out.getvalue().encode()


# --- masks


def _mask(about: DefectMap) -> NDArray[np.bool_]:
    mask = np.zeros((about.height, about.width), np.bool_)
    for pixel in about.pixels:
        mask[pixel.y, pixel.x] = True
    return mask


def fits_mask(about: DefectMap, _: Extras) -> bytes:
    """Return a mask as FITS: uint8, 1 is bad."""
    return _fits(about, _mask(about).astype(np.uint8), {"IMAGETYP": "Bad Pixel Mask"})


def png_mask(about: DefectMap, _: Extras) -> bytes:
    """Return a mask as a grey PNG: 255 is bad."""
    return _png(_mask(about).astype(np.uint8) * np.uint8(255))


_COLOURS = {"cold": (0, 128, 255), "found": (255, 0, 0), "declared": (255, 200, 0)}
_RING = 5
_RING_ALPHA = 160


def overlay(about: DefectMap, _: Extras) -> bytes:
    """Return a transparent PNG, to be a layer over the picture: bad pixels opaque, each in a square that is not."""
    picture = np.zeros((about.height, about.width, 4), np.uint8)
    for pixel in about.pixels:
        y0, y1, x0, x1 = pixel.y - _RING, pixel.y + _RING, pixel.x - _RING, pixel.x + _RING
        ring = (*_colour(pixel), _RING_ALPHA)
        rows, columns = slice(max(y0, 0), y1 + 1), slice(max(x0, 0), x1 + 1)
        for y in (y0, y1):
            if 0 <= y < about.height:
                picture[y, columns] = ring
        for x in (x0, x1):
            if 0 <= x < about.width:
                picture[rows, x] = ring
    # After all squares: none may cover a pixel.
    for pixel in about.pixels:
        picture[pixel.y, pixel.x] = (*_colour(pixel), 255)
    return _png(picture)


def _colour(pixel: Pixel) -> tuple[int, int, int]:
    return _COLOURS["declared" if not pixel.found else "cold" if pixel.cold else "found"]


def dng(about: DefectMap, extras: Extras) -> bytes:
    """Return a copy of a DNG that lists its bad pixels."""
    if extras.dng is None:
        raise ExportError("a list in a DNG needs the DNG: name one of the camera's with --like")
    try:
        picture = Dng(extras.dng.read_bytes())
        info = picture.info
        if (info.width, info.height) != (about.width, about.height):
            raise DngError(
                f"its visible area has {info.width}x{info.height} pixels, the sensor {about.width}x{about.height}"
            )
        for word, said, known in (("model", info.model, "model"), ("serial number", info.serial, "serial")):
            if said and about.sensor[known] and said != about.sensor[known].strip():
                raise DngError(f"its camera's {word} is {printable(said)}, the sensor's {about.sensor[known]}")
        return picture.with_points([(pixel.x, pixel.y) for pixel in about.pixels])
    except OSError as error:
        raise ExportError(f"{extras.dng} cannot be read: {error.strerror or error}") from error
    except DngError as error:
        raise ExportError(f"{extras.dng} cannot get a list of bad pixels: {error}.") from error


# --- pictures of the statistic


def _no_statistic() -> Generation:
    raise ExportError("there is no statistic of this sensor yet")


def mean(about: DefectMap, extras: Extras) -> bytes:
    """Return the mean of all frames: of darks, the master dark. float32, ADU."""
    return _picture(about, extras, _mean(about, extras.statistic()))


def deviation(about: DefectMap, extras: Extras) -> bytes:
    """Return the standard deviation of every sample over all frames (of the population). float32, ADU."""
    generation = extras.statistic()
    frames = _frames(generation)
    total, squares = generation.arrays["total"], generation.arrays["squares"]
    picture = np.empty(total.shape, np.float32)
    for row in range(total.shape[0]):
        # n Q - S^2 exactly, from integers: see Accumulator.
        sums = total[row].astype(np.uint64)
        scaled = np.uint64(frames) * squares[row].astype(np.uint64) - sums * sums
        picture[row] = np.sqrt(scaled.astype(np.float64)) / frames
    return _picture(about, extras, _by_channel(about, picture))


def counts(about: DefectMap, extras: Extras) -> bytes:
    """Return the four event counts as planes: extreme high, low; outstanding high, low. uint32."""
    arrays = extras.statistic().arrays
    planes = np.stack([arrays[name].astype(np.uint32) for name in COUNTS])
    if planes.shape[-1] != about.width:
        raise ExportError("counts of a sensor whose pictures are in colour have no format; its mean and deviation have")
    return _picture(about, extras, planes)


def _mean(about: DefectMap, generation: Generation) -> NDArray[np.float32]:
    frames = _frames(generation)
    return _by_channel(about, (generation.arrays["total"] / frames).astype(np.float32))


def _frames(generation: Generation) -> int:
    frames = int(generation.header["sensor"]["frames"])
    if not frames:
        raise ExportError("there are no frames in the statistic of this sensor yet")
    return frames


def _by_channel(about: DefectMap, samples: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return (height, width), or (channels, height, width) of a rendered picture in colour."""
    if samples.shape[1] == about.width:
        return samples
    return np.moveaxis(samples.reshape(about.height, about.width, -1), -1, 0)


def _picture(about: DefectMap, extras: Extras, samples: NDArray[Any]) -> bytes:
    if extras.suffix in _FITS_SUFFIXES:
        return _fits(about, samples, {})
    if extras.suffix in _TIFF_SUFFIXES:
        import tifffile

        out = io.BytesIO()
        coloured = samples.ndim == 3 and samples.shape[0] == 3
        tifffile.imwrite(
            out,
            np.ascontiguousarray(samples),
            photometric="rgb" if coloured else "minisblack",
            planarconfig="separate" if coloured else None,
            metadata=None,
            software=False,
        )
        return out.getvalue()
    raise ExportError(f"a picture's name ends in .fits or .tif, which says what it is, not in {extras.suffix!r}")


_FITS_SUFFIXES = (".fits", ".fit", ".fts")
_TIFF_SUFFIXES = (".tif", ".tiff")


def _fits(about: DefectMap, samples: NDArray[Any], more: Mapping[str, Any]) -> bytes:
    """Return an array, top row first, as a FITS file with its rows as the frames' files have them."""
    from astropy.io import fits

    top_down = about.rows is not Rows.FITS
    unit = fits.PrimaryHDU(np.ascontiguousarray(samples if top_down else samples[..., ::-1, :]))
    header: Header = unit.header
    for key, value in more.items():
        header[key] = value
    header["ROWORDER"] = ("TOP-DOWN" if top_down else "BOTTOM-UP", "first row of the file is the top / bottom")
    header["DATE"] = (about.made_at.removesuffix("Z"), "UTC")
    header["CREATOR"] = f"hotpixd {__version__}"
    named = sensor_name(about.sensor).encode("ascii", "replace").decode()
    header["INSTRUME"] = named[:68]
    header["NFRAMES"] = (about.sensor["frames"], "frames in the statistic")
    header["NDEFECTS"] = (len(about.pixels), "pixels on the map")
    out = io.BytesIO()
    unit.writeto(out)
    return out.getvalue()


def _png(samples: NDArray[np.uint8]) -> bytes:
    from PIL import Image

    out = io.BytesIO()
    Image.fromarray(samples).save(out, "PNG")
    return out.getvalue()


_TOP_LEFT = "0-based, top left of the visible area"

FORMATS: Mapping[str, Format] = {
    known.name: known
    for known in (
        Format("dcraw", f"dcraw, LibRaw, rawpy: x y time; {_TOP_LEFT}", dcraw),
        Format("rawtherapee", f"RawTherapee, into its folder of dark frames: x y; {_TOP_LEFT}", rawtherapee),
        Format("siril", "Siril: P x y H|C; 0-based, from the top (of FITS: from the last row)", siril, by_rows=True),
        Format(
            "phd2",
            "PHD2's defect map, and the master dark that it demands: x y; 0-based, rows as in its FITS",
            phd2,
            text=False,
            by_rows=True,
            beside=phd2_master,
        ),
        Format("pixinsight", "CosmeticCorrection: Col x y y; 0-based, rows as in the file", pixinsight, by_rows=True),
        Format(
            "dng",
            "a copy of a DNG (--like) with opcode FixBadPixelsList; 0-based, of all stored samples, margins included",
            dng,
            text=False,
        ),
        Format("ecsv", "LSST's table of boxes x0 y0 width height; 0-based, lower left", ecsv, by_rows=True),
        Format("fits-mask", "FITS: uint8, 1 is bad; rows as in the frames, with ROWORDER", fits_mask, False, True),
        Format("png-mask", f"grey PNG: 255 is bad; {_TOP_LEFT}", png_mask, text=False),
        Format("overlay", "transparent PNG to lay over a picture: red hot, blue dead, yellow declared", overlay, False),
        Format("csv", f"table with a header; {_TOP_LEFT}", comma_separated),
        Format("json", f"all that is known; {_TOP_LEFT}", own),
        Format("mean", "mean of all frames, of darks the master dark: .fits or .tif", mean, False, True, False),
        Format("deviation", "standard deviation of every sample: .fits or .tif", deviation, False, True, False),
        Format(
            "counts", "how often each was extreme, outstanding (high, low): .fits or .tif", counts, False, True, False
        ),
    )
}
"""All formats by name."""
