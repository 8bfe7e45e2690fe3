"""Lists of bad pixels that other programs wrote: turns a file into pixels of a sensor, or says what is wrong with it.

The content decides which format it is. Nothing is guessed beyond that: a line that is not understood, or a pixel that
is not on the sensor, makes the whole list be refused.
"""

from __future__ import annotations

import csv
import io
import json
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hotpixd.views.maps import Rows
from hotpixd.views.text import printable

MOST_BYTES = 512 << 20
"""A larger file is no list of bad pixels; a FITS mask of 400 megapixels has as many bytes."""


class ListError(Exception):
    """A list cannot be used. The message is a sentence that names the file, and the line if it has any."""


@dataclass(frozen=True, slots=True)
class Listing:
    """What a list holds."""

    format: str

    pixels: tuple[tuple[int, int], ...]
    """x, y, as in all answers; by position, each once."""


@dataclass(frozen=True, slots=True)
class _Sensor:
    width: int
    height: int
    rows: Rows


class _Wrong(Exception):  # noqa: N818 - the sentence without the file's name
    def __init__(self, what: str, line: int | None = None) -> None:
        super().__init__(what)
        self.line = line


_Found = tuple[int, int, int | None]
"""x, y, and the line that says so."""

_Reader = Callable[[bytes, _Sensor], Iterable[_Found]]


def read_list(
    path: Path, width: int, height: int, format_name: str | None = None, rows: Rows = Rows.PICTURE
) -> Listing:
    """Read a list of bad pixels.

    Parameters
    ----------
    width, height : of the sensor
    format_name : of READERS. None: by the content
    rows : how the files hold their rows for which the list was made, for formats that depend on it

    Raises
    ------
    ListError
        If it cannot be read, is not understood, or names a pixel outside of the sensor.
    """
    try:
        if path.stat().st_size > MOST_BYTES:
            raise ListError(f"{path} is too large for a list of bad pixels.")
        content = path.read_bytes()
    except OSError as error:
        raise ListError(f"{path} cannot be read: {error.strerror or error}.") from error
    line: int | None = None
    try:
        name = format_name or told_format(content)
        pixels = set()
        for x, y, line in READERS[name](content, _Sensor(width, height, rows)):
            if not (0 <= x < width and 0 <= y < height):
                raise _Wrong(f"({x}, {y}) is outside of the sensor, which has {width}x{height} pixels", line)
            pixels.add((y, x))
    except _Wrong as error:
        at = "" if error.line is None else f", line {error.line}"
        raise ListError(f"{path}{at}: {error}. Nothing was imported.") from error
    return Listing(name, tuple((x, y) for y, x in sorted(pixels)))


def told_format(content: bytes) -> str:
    """Return the format that a content is in."""
    starts = {b"\x89PNG": "png-mask", b"SIMPLE  =": "fits-mask", b"# PHD2 Defect Map": "phd2", b"# %ECSV": "ecsv"}
    for start, name in starts.items():
        if content.startswith(start):
            return name
    if content.lstrip()[:1] == b"{":
        return "json"
    first = next(_data_lines(content), None)
    if first is None:
        # Comments only: of one of those that have comments and no header, and empty.
        if not content.strip():
            raise _Wrong("it is empty; if that is meant, say which format it is with --format")
        return "dcraw"
    words = first[1].split()
    header = [cell.strip().strip('"').lower() for cell in first[1].split(",")]
    if {"x", "y"} <= set(header):
        return "csv"
    if words[0] in ("P", "C", "L") and len(words) > 1:
        return "siril"
    if words[0] in ("Col", "Row"):
        return "pixinsight"
    if len(words) in (1, 2, 3) and all(_NUMBER.fullmatch(word) for word in words):
        return "dcraw" if len(words) == 3 else "rawtherapee"
    raise _Wrong(f"{printable(first[1][:60])!r} begins no list that is known", first[0])


_INTEGER = re.compile(r"[+-]?\d{1,9}", re.ASCII)
_NUMBER = re.compile(r"[+-]?\d{1,19}", re.ASCII)


def _data_lines(content: bytes) -> Iterator[tuple[int, str]]:
    """Yield the lines that are neither blank nor comments, without comments behind them, and their numbers."""
    if b"\0" in content:
        raise _Wrong("it is no text, nor a mask as FITS or PNG")
    text = content.decode("utf-8-sig", "replace")
    for number, line in enumerate(text.splitlines(), 1):
        data = line.partition("#")[0].strip()
        if data:
            yield number, data


def _integers(words: list[str], line: int, *, least: int, most: int, what: str) -> list[int]:
    if not (least <= len(words) <= most) or not all(_INTEGER.fullmatch(word) for word in words):
        raise _Wrong(f"{printable(' '.join(words)[:60])!r} is not {what}", line)
    return [int(word) for word in words]


def _dcraw(content: bytes, _: _Sensor) -> Iterator[_Found]:
    for line, data in _data_lines(content):
        # What comes behind the three numbers is ignored by dcraw, too; a time has up to ten digits.
        words = data.split()
        if len(words) < 3 or not all(_NUMBER.fullmatch(word) for word in words[:3]):
            raise _Wrong(f"{printable(data[:60])!r} is not a column, a row and a time of death", line)
        x, y = _integers(words[:2], line, least=2, most=2, what="a column and a row")
        yield x, y, line


def _rawtherapee(content: bytes, _: _Sensor) -> Iterator[_Found]:
    offset = 0
    for line, data in _data_lines(content):
        words = data.split()
        if line == 1 and len(words) == 1:
            (offset,) = _integers(words, line, least=1, most=1, what="an offset")
            continue
        x, y = _integers(words, line, least=2, most=2, what="a column and a row")
        yield x + offset, y + offset, line


def _phd2(content: bytes, sensor: _Sensor) -> Iterator[_Found]:
    for line, data in _data_lines(content):
        x, y = _integers(data.split(), line, least=2, most=2, what="a column and a row")
        yield x, sensor.rows.in_file(y, sensor.height), line


def _siril(content: bytes, sensor: _Sensor) -> Iterator[_Found]:
    for line, data in _data_lines(content):
        words = data.split()
        letter, numbers = words[0], words[1:]
        if numbers and numbers[-1] in ("H", "C"):
            numbers = numbers[:-1]
        if letter == "P":
            x, y = _integers(numbers, line, least=2, most=2, what="a column and a row")
            yield x, sensor.rows.in_siril(y, sensor.height), line
        elif letter in ("C", "L"):
            (place,) = _integers(numbers, line, least=1, most=1, what="one column or line")
            if letter == "C":
                yield from ((place, y, line) for y in range(sensor.height))
            else:
                yield from ((x, sensor.rows.in_siril(place, sensor.height), line) for x in range(sensor.width))
        else:
            raise _Wrong(f"{printable(data[:60])!r} is neither a pixel (P), a column (C) nor a line (L)", line)


def _pixinsight(content: bytes, sensor: _Sensor) -> Iterator[_Found]:
    for line, data in _data_lines(content):
        words = data.split()
        if words[0] not in ("Col", "Row"):
            raise _Wrong(f"{printable(data[:60])!r} begins with neither Col nor Row", line)
        numbers = _integers(words[1:], line, least=1, most=3, what="a column or row, and from where to where")
        length = sensor.height if words[0] == "Col" else sensor.width
        if len(numbers) == 2:
            raise _Wrong(f"{printable(data[:60])!r} says from where, but not to where", line)
        place, start, end = numbers if len(numbers) == 3 else (numbers[0], 0, length - 1)
        if start > end or end >= length or start < 0:
            raise _Wrong(f"{start} to {end} is not within 0 to {length - 1}", line)
        for at in range(start, end + 1):
            x, y = (place, at) if words[0] == "Col" else (at, place)
            yield x, sensor.rows.in_file(y, sensor.height), line


def _csv(content: bytes, _: _Sensor) -> Iterator[_Found]:
    text = content.decode("utf-8-sig", "replace")
    rows = csv.reader(io.StringIO(text))
    columns: dict[str, int] | None = None
    try:
        for cells in rows:
            if not any(cell.strip() for cell in cells) or cells[0].startswith("#"):
                continue
            line = rows.line_num
            if columns is None:
                names = [cell.strip().lower() for cell in cells]
                if not {"x", "y"} <= set(names):
                    raise _Wrong("its header names no columns x and y", line)
                columns = {"x": names.index("x"), "y": names.index("y")}
                continue
            words = [cells[at].strip() if at < len(cells) else "" for at in columns.values()]
            x, y = _integers(words, line, least=2, most=2, what="a whole number for x and one for y")
            yield x, y, line
    except csv.Error as error:
        raise _Wrong(f"it is no table: {error}", rows.line_num) from error


def _ecsv(content: bytes, sensor: _Sensor) -> Iterator[_Found]:
    from astropy.table import Table

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            table = Table.read(content.decode("utf-8"), format="ascii.ecsv")
        boxes = [[int(n) for n in table[name]] for name in ("x0", "y0", "width", "height")]
    except Exception as error:  # whatever a reader in Python meets in a broken file
        raise _Wrong(f"it is no table with columns x0, y0, width and height: {error}") from error
    # A table of ours says how it counts; others' count as arrays read from the frames do, or from the lower left.
    told = table.meta.get("rows", "") if isinstance(table.meta, dict) else ""
    top_down = told == "top-down" or (not told and sensor.rows is Rows.FITS_TOP_DOWN)
    rows = Rows.FITS_TOP_DOWN if top_down else Rows.FITS
    for number, (x0, y0, width, height) in enumerate(zip(*boxes, strict=True), 1):
        inside = x0 >= 0 and y0 >= 0 and x0 + width <= sensor.width and y0 + height <= sensor.height
        if width < 1 or height < 1 or not inside:
            raise _Wrong(
                f"box {number}, {width}x{height} at ({x0}, {y0}), is not within the sensor, which has"
                f" {sensor.width}x{sensor.height} pixels"
            )
        for y in range(y0, y0 + height):
            yield from ((x, rows.in_file(y, sensor.height), None) for x in range(x0, x0 + width))


def _json(content: bytes, _: _Sensor) -> Iterator[_Found]:
    try:
        said = json.loads(content)
        if "hotpixd declared" in said:
            entries = [{"x": x, "y": y} for x, y, *_rest in said["defects"]]
        else:
            entries = [*said["defects"], *said.get("declared", [])]
        points = [(entry["x"], entry["y"]) for entry in entries]
        if not all(type(n) is int for point in points for n in point):
            raise TypeError
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _Wrong("it is no map that hotpixd has exported") from error
    yield from ((x, y, None) for x, y in points)


def _fits_mask(content: bytes, sensor: _Sensor) -> Iterator[_Found]:
    from astropy.io import fits

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with fits.open(io.BytesIO(content), memmap=False, lazy_load_hdus=True) as units:
                found = next((u for u in units if u.is_image and len(getattr(u, "shape", ())) == 2), None)
                if found is None:
                    raise _Wrong("it holds no picture of two axes")
                _require_size(found.shape, sensor)
                mask, header = np.asarray(found.data), dict(found.header)
    except _Wrong:
        raise
    except Exception as error:  # whatever a reader in Python meets in a broken file
        raise _Wrong(f"it is no FITS file that can be read: {error}") from error
    top_down = str(header.get("ROWORDER", "")).strip().upper() == "TOP-DOWN"
    yield from _set_in(mask if top_down else mask[::-1])


def _png_mask(content: bytes, sensor: _Sensor) -> Iterator[_Found]:
    from PIL import Image

    try:
        with Image.open(io.BytesIO(content), formats=["PNG"]) as picture:
            # Before anything is inflated.
            _require_size(picture.size[::-1], sensor)
            if picture.mode not in ("1", "L", "I;16", "I"):
                raise _Wrong("a mask is a grey PNG without transparency, and this one is not")
            mask = np.asarray(picture)
    except _Wrong:
        raise
    except Exception as error:  # whatever Pillow meets in a broken file
        raise _Wrong(f"it is no PNG that can be read: {error}") from error
    yield from _set_in(mask)


def _require_size(shape: tuple[int, ...], sensor: _Sensor) -> None:
    if tuple(shape) != (sensor.height, sensor.width):
        raise _Wrong(
            f"the mask has {shape[1]}x{shape[0]} pixels, the visible area of the sensor {sensor.width}x{sensor.height}"
        )


def _set_in(mask: NDArray[Any]) -> Iterator[_Found]:
    """Yield what a mask, top row first, marks: all that is not zero."""
    if mask.dtype.kind == "f" and not np.isfinite(mask).all():
        raise _Wrong("the mask holds values that are no numbers")
    marked = mask != 0
    if 2 * int(marked.sum()) > mask.size:
        raise _Wrong("more than half of the mask is marked: it seems to be a picture, or 0 stands for bad in it")
    rows, columns = np.nonzero(marked)
    yield from ((x, y, None) for x, y in zip(columns.tolist(), rows.tolist(), strict=True))


READERS: Mapping[str, _Reader] = {
    "dcraw": _dcraw,
    "rawtherapee": _rawtherapee,
    "siril": _siril,
    "phd2": _phd2,
    "pixinsight": _pixinsight,
    "csv": _csv,
    "ecsv": _ecsv,
    "json": _json,
    "fits-mask": _fits_mask,
    "png-mask": _png_mask,
}
"""What can be read, by format."""

BY_ROWS = ("siril", "phd2", "pixinsight", "ecsv")
"""Formats that count rows as the frames' files hold them, and do not say how."""
