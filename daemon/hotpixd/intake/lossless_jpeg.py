"""Lossless JPEGs, as DNGs hold them: one picture per tile, of which every sample is read or none is.

Only what has one meaning is read: whatever LibRaw, which does not follow the standard everywhere, might make something
else of is left to it. It chooses tables by their number, the standard by the scan's header; differences of 16 bits
depend on the version of the DNG; restarts and point transforms no camera writes.

References
----------
ITU-T T.81 (1992), Annex B (markers), Annex H (lossless mode).
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

_TABLES, _FRAME, _SCAN = 0xC4, 0xC3, 0xDA
_SKIPPED = {*range(0xE0, 0xF0), 0xFE}  # what applications and people say


@dataclass(frozen=True, slots=True)
class _Scan:
    start: int
    """Where its bytes begin."""

    rows: int
    width: int
    """Samples of a row, of all components."""

    bits: int
    predictor: int
    codes: tuple[bytes, ...]
    """Of each component, its table as DHT has it."""


class Reader:
    """Reads the tiles of one picture, each into the same memory."""

    def __init__(self) -> None:
        from hotpixd.core import lossless

        self._loops = lossless
        self._tables = lru_cache(16)(lossless.tables)
        self._data = np.empty(0, np.uint8)
        self._samples = np.empty(0, np.uint16)

    def read(
        self, coded: bytes, shape: tuple[int, int], sides: tuple[int, int, int] | None = None
    ) -> NDArray[np.uint16] | None:
        """Return the samples of a tile, (rows, columns), good until the next one is read; None if it is not whole.

        Parameters
        ----------
        sides : columns, rows and components that its JPEG must have, if only one with these is good
        """
        scan = _scan(coded)
        if scan is None or scan.rows * scan.width != shape[0] * shape[1]:
            return None
        components = len(scan.codes)
        if sides not in (None, (scan.width // components, scan.rows, components)):
            return None
        tables = self._tables(scan.codes)
        if tables is None:
            return None
        size = self._loops.room(len(coded), scan.width)
        if len(self._data) < size:
            self._data = np.zeros(size, np.uint8)
        if len(self._samples) != shape[0] * shape[1]:
            self._samples = np.empty(shape[0] * shape[1], np.uint16)
        length = self._loops.unstuff(np.frombuffer(coded, np.uint8), scan.start, self._data)
        if length == self._loops.BROKEN:
            return None
        samples = self._samples.reshape(scan.rows, scan.width)
        good = self._loops.decode(
            self._data, length, tables.nearest, tables.longer, tables.wide, scan.predictor, scan.bits, samples
        )
        # DNGs may store a tile's samples in rows of another length (DNG 1.7, "Compression").
        return self._samples.reshape(shape) if good else None


def _scan(coded: bytes) -> _Scan | None:
    """Return what the headers of a tile say; None if they say anything out of the ordinary."""
    tables: dict[int, bytes] = {}
    frame = b""
    at = 2
    if coded[:2] != b"\xff\xd8":
        return None
    while at + 4 <= len(coded):
        mark, marker, length = struct.unpack_from(">BBH", coded, at)
        content = coded[at + 4 : at + 2 + length]
        at += 2 + length
        if mark != 0xFF or length < 2 or at > len(coded):
            return None
        if marker == _TABLES:
            if not _add_tables(content, tables):
                return None
        elif marker == _FRAME and not frame:
            frame = content
        elif marker == _SCAN:
            return _ordinary(frame, content, tables, at)
        elif marker not in _SKIPPED:
            return None
    return None


def _add_tables(content: bytes, tables: dict[int, bytes]) -> bool:
    while content:
        end = 17 + sum(content[1:17])
        # A second one of some number is for another scan, or a mistake.
        if len(content) < end or content[0] > 3 or content[0] in tables:
            return False
        tables[content[0]] = content[1:end]
        content = content[end:]
    return True


def _ordinary(frame: bytes, scan: bytes, tables: dict[int, bytes], start: int) -> _Scan | None:
    components = frame[5] if len(frame) > 5 else 0
    if components not in (1, 2, 4) or len(frame) != 6 + 3 * components or len(scan) != 4 + 2 * components:
        return None
    bits, rows, columns = struct.unpack_from(">BHH", frame)
    about = [frame[6 + 3 * i : 9 + 3 * i] for i in range(components)]
    chosen = [scan[1 + 2 * i : 3 + 2 * i] for i in range(components)]
    predictor, end, shift = scan[-3:]
    if scan[0] != components or not 1 <= predictor <= 7 or end or shift or not 8 < bits <= 16:
        return None
    codes = []
    for number, (component, choice) in enumerate(zip(about, chosen, strict=True)):
        # By the standard the one that is named; LibRaw takes the one of its number, or else the last one before.
        below = max((known for known in tables if known <= number), default=-1)
        named = tables.get(choice[1] >> 4)
        if component[1] != 0x11 or component[0] != choice[0] or named is None or named != tables.get(below):
            return None
        codes.append(named)
    return _Scan(start, rows, components * columns, bits, predictor, tuple(codes)) if rows and columns else None
