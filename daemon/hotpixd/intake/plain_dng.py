"""Uncompressed DNGs: samples straight from the file into their place, once LibRaw was seen to make the same of them.

LibRaw reads a file into memory, copies its samples twice and asks for a third
copy; three quarters of the time that an uncompressed DNG takes. What it makes of
the samples depends on a header that is the same for all shots of a camera. So the
first shot is read both ways, and compared: samples, crop, colours, levels. If all
are equal, the next shots with that header are read here.
"""

from __future__ import annotations

import hashlib
import sys
from dataclasses import dataclass, replace
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from hotpixd.intake import metadata
from hotpixd.intake.extent import CFA
from hotpixd.intake.metadata import Directory

_OF_THE_SHOT = {
    *(0x0132, 0x8769, 0x8825, 0x02BC, 0x83BB),  # time, EXIF, GPS, XMP, IPTC
    *(0x829A, 0x829D, 0x8827, *range(0x9003, 0x9015), *range(0x9201, 0x9209), *range(0x9290, 0x9293), 0x9400),
    *(0xC628, 0xC629, 0xC65D, 0xC761),  # white balance, the samples' digest, their noise
    *(0x0111, 0x0117),  # where they lie
}
"""Tags that differ from shot to shot, and that what LibRaw makes of the samples does not depend on."""

_REFUSED = {0xC618, 0xC68E, 0x0142}
"""Tags with which it does more: a table of levels, masked areas, tiles."""

_BAND = 256
"""Rows compared at a time."""

_MOST = 64
"""Headers to remember. No card has the shots of so many cameras."""


@dataclass(frozen=True, slots=True)
class Plain:
    """Where the samples of a DNG lie."""

    header: bytes
    """Digest of all that says what to make of them."""

    offset: int
    width: int
    height: int

    @property
    def end(self) -> int:
        """Where they end."""
        return self.offset + 2 * self.width * self.height


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


_known: dict[bytes, Reading | None] = {}
"""By header. None: it makes something else of them than what is here."""


def find(file: BinaryIO) -> Plain | None:
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
    if (raw.number(0x0103), raw.numbers(0x0102), raw.number(0x0115)) != (1, (16.0,), 1):
        return None
    width, height = int(raw.number(0x0100) or 0), int(raw.number(0x0101) or 0)
    starts, counts = raw.numbers(0x0111), raw.numbers(0x0117)
    if not starts or len(starts) != len(counts) or sum(counts) != 2 * width * height:
        return None
    if any(start + count != after for start, count, after in zip(starts, counts, starts[1:], strict=False)):
        return None
    return Plain(_digest(first, raw), int(starts[0]), width, height)


def known(plain: Plain) -> Reading | None:
    """Return what LibRaw makes of samples with this header, if that is what `samples_of` returns."""
    return _known.get(plain.header)


def is_new(plain: Plain) -> bool:
    """Whether this header was never compared."""
    return plain.header not in _known


def learn(plain: Plain, reading: Reading, samples: NDArray[np.generic], file: BinaryIO) -> None:
    """Compare what LibRaw has made of a file with what is here, and remember whether they agree."""
    if len(_known) >= _MOST:
        _known.pop(next(iter(_known)))
    agree = _fits(plain, reading)
    # Some rows at a time: LibRaw has all of them in memory twice already.
    own = np.empty((min(_BAND, reading.height), reading.width), np.uint16)
    for first in range(0, reading.height, _BAND):
        rows = own[: reading.height - first]
        part = replace(reading, top=reading.top + first)
        agree = agree and read_into(rows, plain, part, file) and np.array_equal(rows, samples[first : first + _BAND])
    _known[plain.header] = reading if agree else None


def read_into(samples: NDArray[np.uint16], plain: Plain, reading: Reading, file: BinaryIO) -> bool:
    """Read as many rows of visible samples as an array (rows, width) has; False if the file ends before they do."""
    file.seek(plain.offset + 2 * reading.top * plain.width)
    if reading.width == plain.width:
        return _filled(samples, file)
    rows = np.empty((len(samples), plain.width), np.uint16)
    whole = _filled(rows, file)
    samples[...] = rows[:, reading.left : reading.left + reading.width]
    return whole


def _filled(samples: NDArray[np.uint16], file: BinaryIO) -> bool:
    rest = samples.data.cast("B")
    while rest:
        length = file.readinto(rest)  # type: ignore[attr-defined]
        if not length:
            return False
        rest = rest[length:]
    return True


def _fits(plain: Plain, reading: Reading) -> bool:
    return reading.top + reading.height <= plain.height and reading.left + reading.width <= plain.width


def _digest(first: Directory, raw: Directory) -> bytes:
    digest = hashlib.sha256()
    for directory in (first,) if raw is first else (first, raw):
        for tag in sorted(directory.entries.keys() - _OF_THE_SHOT):
            kind, count, _ = directory.entries[tag]
            digest.update(f"{tag} {kind} {count} ".encode() + directory.raw(tag) + b"\n")
        digest.update(b"\n")
    return digest.digest()
