"""DNGs: samples straight from the file into their place, once LibRaw was seen to make the same of them.

LibRaw reads a file into memory, copies its samples twice and asks for a third
copy; three quarters of the time that an uncompressed DNG takes. Lossless JPEG it
decodes at less than half the speed of `core.lossless`. What it makes of the samples
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
from hotpixd.intake.extent import CFA, JPEG_HEADER, jpeg_sides
from hotpixd.intake.lossless_jpeg import Reader
from hotpixd.intake.metadata import Directory

_WHERE = {0x0111, 0x0117, 0x0144, 0x0145, 0x014A, 0x0201, 0x0202}
"""Tags that say where samples, directories and previews lie."""

_OF_THE_SHOT = {
    *(0x0132, 0x8769, 0x8825, 0x02BC, 0x83BB),  # time, EXIF, GPS, XMP, IPTC
    *(0x829A, 0x829D, 0x8827, *range(0x9003, 0x9015), *range(0x9201, 0x9209), *range(0x9290, 0x9293), 0x9400),
    *(0xC628, 0xC629, 0xC65D, 0xC761),  # white balance, the samples' digest, their noise
}
"""Tags that differ from shot to shot, and that what LibRaw makes of the samples does not depend on."""

_REFUSED = {0xC618, 0xC68E}
"""Tags with which it does more: a table of levels, masked areas."""

_STORED, _JPEG = 1, 7
_LONG = 4
"""Type of a tag: numbers of 32 bits, as which LibRaw reads all offsets."""

_LONGEST_VALUE = 1 << 24
"""Bytes of the value of a tag."""

_BAND = 256
"""Rows read at a time."""

_MOST = 64
"""Headers to remember. No card has the shots of so many cameras."""

_IN_VAIN = 8
"""Headers learned one after the other, of which none came again, after which no more are: to compare takes time, and a
camera that writes something new into each would have all its shots compared."""


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

    sides: tuple[int, int, int] | None
    """Columns, rows and components of the JPEG of each part, if they are lossless JPEGs; else None."""

    @property
    def coded(self) -> bool:
        """Whether they are lossless JPEGs."""
        return self.sides is not None

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
        rows = _clipped(top - self.top, block.shape[0], self.height)
        columns = _clipped(left - self.left, block.shape[1], self.width)
        inner = slice(rows.start + self.top - top, rows.stop + self.top - top)
        return rows, columns, block[inner, columns.start + self.left - left : columns.stop + self.left - left]


def _clipped(start: int, length: int, most: int) -> slice:
    """Return what of a stretch lies within 0..most; one that lies beyond is empty."""
    first = min(max(start, 0), most)
    return slice(first, max(min(start + length, most), first))


class _Loops:
    """The compiled loops of lossless JPEG: loaded when a shot wants them, but for a process that says otherwise."""

    allowed = True
    wanted = False


loops = _Loops()

_learned_in_vain = 0
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
    if len(raws) != 1 or not _REFUSED.isdisjoint({*first.entries, *raws[0].entries}):
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
    where, lengths = (0x0144, 0x0145) if tiled else (0x0111, 0x0117)
    starts, counts = raw.numbers(where), raw.numbers(lengths)
    if not starts or len(starts) != len(counts) or raw.entries[where][0] != _LONG:
        return None
    if len(part) != 2 or min(part) < 1 or part[0] * part[1] > 4 * width * height:
        return None
    places = tuple((int(start), int(count)) for start, count in zip(starts, counts, strict=True))
    size = int(part[0]), int(part[1] if tiled else min(part[1], height))
    sides = jpeg_sides(read(places[0][0], min(places[0][1], JPEG_HEADER))) if compression == _JPEG else None
    header = _digest(first, raw, sides)
    mosaic = None if header is None else Mosaic(header, width, height, size, tiled, places, sides)
    return mosaic if mosaic is not None and _is_whole(mosaic) else None


def _is_whole(mosaic: Mosaic) -> bool:
    """Whether a mosaic has as many parts as it must; those of samples as they are, one after the other."""
    if mosaic.coded:
        # LibRaw reads one strip only, and of a tile that is wider than the picture rows of the picture's width.
        across, down = -(-mosaic.width // mosaic.part[0]), -(-mosaic.height // mosaic.part[1])
        return len(mosaic.places) == across * down and (
            mosaic.part[0] <= mosaic.width if mosaic.tiled else len(mosaic.places) == 1
        )
    one_by_one = all(before[0] + before[1] == after[0] for before, after in pairwise(mosaic.places))
    return (
        not mosaic.tiled and one_by_one and sum(size for _, size in mosaic.places) == 2 * mosaic.width * mosaic.height
    )


def known(mosaic: Mosaic) -> Reading | None:
    """Return what LibRaw makes of samples with this header, if that is what `read_into` reads."""
    global _learned_in_vain
    loops.wanted |= mosaic.coded
    if mosaic.header in _known:
        _learned_in_vain = 0
    return _known.get(mosaic.header)


def is_new(mosaic: Mosaic) -> bool:
    """Whether this header is yet to be compared."""
    readable = loops.allowed or not mosaic.coded
    return readable and mosaic.header not in _known and _learned_in_vain < _IN_VAIN


def learn(mosaic: Mosaic, reading: Reading, samples: NDArray[np.generic], file: BinaryIO) -> None:
    """Compare what LibRaw has made of a file with what is here, and remember whether they agree."""
    global _learned_in_vain
    if np.count_nonzero(samples[:, 1:] != samples[:, :-1]) < samples.size / 2:
        # Where all are alike, samples of another place would be equal as well.
        return
    if len(_known) >= _MOST:
        _known.pop(next(iter(_known)))
    _learned_in_vain += 1
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
        yield reader.read(file.read(size), (height, across), mosaic.sides), row * down, column * across


def _filled(samples: NDArray[np.uint16], file: BinaryIO) -> bool:
    rest = samples.data.cast("B")
    while rest:
        length = file.readinto(rest)  # type: ignore[attr-defined]
        if not length:
            return False
        rest = rest[length:]
    return True


def _digest(first: Directory, raw: Directory, sides: tuple[int, int, int] | None) -> bytes | None:
    """Return a digest of all that says what to make of the samples; None if some of it cannot be read."""
    digest = hashlib.sha256(repr(sides).encode())
    for directory in (first,) if raw is first else (first, raw):
        # In their order: LibRaw reads some by what it knows from those before.
        for tag, (kind, count, _) in directory.entries.items():
            if tag in _OF_THE_SHOT:
                continue
            content = b"" if tag in _WHERE else directory.raw(tag, _LONGEST_VALUE)
            if count and not content and tag not in _WHERE:
                return None
            digest.update(f"{tag} {kind} {count} ".encode() + content + b"\n")
        digest.update(b"\n")
    return digest.digest()
