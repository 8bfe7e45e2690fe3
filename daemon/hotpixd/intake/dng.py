"""DNGs: samples straight from the file into their place, once LibRaw was seen to make the same of them.

LibRaw reads a file into memory, copies its samples twice and asks for a third
copy; three quarters of the time that an uncompressed DNG takes. Lossless JPEG it
decodes four times as slowly as `core.lossless`. What it makes of the samples
depends on a header that is the same for all shots of a camera. So the first shot
is read both ways, and compared: samples, crop, colours, levels. If all are equal,
the next shots with that header are read here.

What is read here is whole, and means the same to LibRaw; else it has the say. So
what comes of a file does not depend on which shots came before.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from hotpixd.intake import metadata
from hotpixd.intake.extent import CFA
from hotpixd.intake.lossless_jpeg import Reader
from hotpixd.intake.metadata import Directory

_OF_THE_SHOT = {
    *(0x0132, 0x8769, 0x8825, 0x02BC, 0x83BB),  # time, EXIF, GPS, XMP, IPTC
    *(0x829A, 0x829D, 0x8827, *range(0x9003, 0x9015), *range(0x9201, 0x9209), *range(0x9290, 0x9293), 0x9400),
    *(0xC628, 0xC629, 0xC65D, 0xC761),  # white balance, the samples' digest, their noise
    *(0x0111, 0x0117, 0x0144, 0x0145),  # where they lie
}
"""Tags that differ from shot to shot, and that what LibRaw makes of the samples does not depend on."""

_REFUSED = {0xC618, 0xC68E}
"""Tags with which it does more: a table of levels, masked areas."""

_STORED, _JPEG = 1, 7

_BAND = 256
"""Rows read at a time."""

_MOST = 64
"""Headers to remember. No card has the shots of so many cameras."""


@dataclass(frozen=True, slots=True)
class Mosaic:
    """Where the samples of a DNG lie."""

    header: bytes
    """Digest of all that says what to make of them."""

    width: int
    height: int

    part: tuple[int, int]
    """Width and height of a strip or tile."""

    tiled: bool
    """Whether parts at the margins are as large as all others."""

    places: tuple[tuple[int, int], ...]
    """(offset, bytes) of each. Those of samples that are stored as they are follow each other."""

    coded: bool
    """Whether they are lossless JPEGs."""

    @property
    def offset(self) -> int:
        """Where the first one begins."""
        return self.places[0][0]

    @property
    def end(self) -> int:
        """Where the last one ends."""
        return max(offset + size for offset, size in self.places)


@dataclass(frozen=True, slots=True)
class Reading:
    """What LibRaw makes of samples with some header."""

    top: int
    left: int
    width: int
    height: int
    colours: str
    black_level_adu: float
    white_level_adu: float | None

    def visible(self, block: NDArray[np.uint16], top: int, left: int) -> tuple[slice, slice, NDArray[np.uint16]]:
        """Return where in the visible area a block of all samples lies, and what of it lies there."""
        first, before = max(self.top - top, 0), max(self.left - left, 0)
        rows = slice(max(top - self.top, 0), min(top - self.top + block.shape[0], self.height))
        columns = slice(max(left - self.left, 0), min(left - self.left + block.shape[1], self.width))
        down, across = max(rows.stop - rows.start, 0), max(columns.stop - columns.start, 0)
        return rows, columns, block[first : first + down, before : before + across]


class _Loops:
    """The compiled loops of lossless JPEG: loaded when a shot wants them, but for a process that says otherwise."""

    allowed = True
    wanted = False


loops = _Loops()

_known: dict[bytes, Reading | None] = {}
"""By header. None: it makes something else of them than what is here."""


def find(file: BinaryIO) -> Mosaic | None:
    """Return where the samples of a file lie, if it is a DNG that can be read here, else None."""

    def read(offset: int, size: int) -> bytes:
        file.seek(offset)
        return file.read(size)

    first = metadata.first_directory(read)
    if first is None or 0xC612 not in first.entries or first.order != ("<" if sys.byteorder == "little" else ">"):
        return None
    raws = [d for d in (first, *first.children(0x014A)) if d.number(0x0106) == CFA and not d.number(0x00FE)]
    if len(raws) != 1 or not _REFUSED.isdisjoint(raws[0].entries):
        return None
    raw = raws[0]
    compression, bits = raw.number(0x0103), raw.numbers(0x0102)
    if raw.number(0x0115) != 1 or len(bits) != 1 or not 8 < bits[0] <= 16:
        return None
    if compression != _JPEG and (compression, *bits) != (_STORED, 16):
        return None
    width, height = int(raw.number(0x0100) or 0), int(raw.number(0x0101) or 0)
    tiled = 0x0142 in raw.entries
    part = raw.numbers(0x0142)[:1] + raw.numbers(0x0143)[:1] if tiled else (width, raw.number(0x0116) or height)
    starts, counts = raw.numbers(0x0144 if tiled else 0x0111), raw.numbers(0x0145 if tiled else 0x0117)
    if len(part) != 2 or not 0 < part[0] * part[1] <= 4 * width * height or len(starts) != len(counts):
        return None
    places = tuple((int(start), int(count)) for start, count in zip(starts, counts, strict=True))
    sides = int(part[0]), int(part[1] if tiled else min(part[1], height))
    mosaic = Mosaic(_digest(first, raw), width, height, sides, tiled, places, compression == _JPEG)
    return mosaic if _is_whole(mosaic) else None


def _is_whole(mosaic: Mosaic) -> bool:
    """Whether a mosaic has as many parts as it must; those of samples as they are, one after the other."""
    if mosaic.coded:
        return len(mosaic.places) == -(-mosaic.width // mosaic.part[0]) * -(-mosaic.height // mosaic.part[1])
    one_by_one = all(before[0] + before[1] == after[0] for before, after in pairwise(mosaic.places))
    return (
        not mosaic.tiled and one_by_one and sum(size for _, size in mosaic.places) == 2 * mosaic.width * mosaic.height
    )


def known(mosaic: Mosaic) -> Reading | None:
    """Return what LibRaw makes of samples with this header, if that is what `read_into` reads."""
    loops.wanted |= mosaic.coded
    return _known.get(mosaic.header)


def is_new(mosaic: Mosaic) -> bool:
    """Whether this header is yet to be compared."""
    return mosaic.header not in _known and (loops.allowed or not mosaic.coded)


def learn(mosaic: Mosaic, reading: Reading, samples: NDArray[np.generic], file: BinaryIO) -> None:
    """Compare what LibRaw has made of a file with what is here, and remember whether they agree."""
    if len(_known) >= _MOST:
        _known.pop(next(iter(_known)))
    agree = reading.top + reading.height <= mosaic.height and reading.left + reading.width <= mosaic.width
    # Some at a time: LibRaw has all of them in memory twice already.
    for block, top, left in _blocks(mosaic, file):
        if block is None:
            # Of a file that is not whole nothing is learned.
            return
        rows, columns, seen = reading.visible(block, top, left)
        agree = agree and np.array_equal(samples[rows, columns], seen)
    _known[mosaic.header] = reading if agree else None


def read_into(samples: NDArray[np.uint16], mosaic: Mosaic, reading: Reading, file: BinaryIO) -> bool:
    """Read the visible samples into (height, width); False if they are not whole."""
    if not mosaic.coded and reading.width == mosaic.width:
        file.seek(mosaic.offset + 2 * reading.top * mosaic.width)
        return _filled(samples, file)
    for block, top, left in _blocks(mosaic, file):
        if block is None:
            return False
        rows, columns, seen = reading.visible(block, top, left)
        samples[rows, columns] = seen
    return True


def _blocks(mosaic: Mosaic, file: BinaryIO) -> Iterator[tuple[NDArray[np.uint16] | None, int, int]]:
    """Yield all samples in blocks, with the row and column at which each begins; None for one that is not whole."""
    if not mosaic.coded:
        file.seek(mosaic.offset)
        band = np.empty((min(_BAND, mosaic.height), mosaic.width), np.uint16)
        for top in range(0, mosaic.height, _BAND):
            rows = band[: mosaic.height - top]
            yield rows if _filled(rows, file) else None, top, 0
        return
    reader = Reader()
    across, down = mosaic.part
    for index, (offset, size) in enumerate(mosaic.places):
        row, column = divmod(index, -(-mosaic.width // across))
        height = down if mosaic.tiled else min(down, mosaic.height - row * down)
        file.seek(offset)
        yield reader.read(file.read(size), (height, across)), row * down, column * across


def _filled(samples: NDArray[np.uint16], file: BinaryIO) -> bool:
    rest = samples.data.cast("B")
    while rest:
        length = file.readinto(rest)  # type: ignore[attr-defined]
        if not length:
            return False
        rest = rest[length:]
    return True


def _digest(first: Directory, raw: Directory) -> bytes:
    digest = hashlib.sha256()
    for directory in (first,) if raw is first else (first, raw):
        for tag in sorted(directory.entries.keys() - _OF_THE_SHOT):
            kind, count, _ = directory.entries[tag]
            digest.update(f"{tag} {kind} {count} ".encode() + directory.raw(tag) + b"\n")
        digest.update(b"\n")
    return digest.digest()
