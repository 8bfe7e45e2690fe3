"""Adds a list of bad pixels to a DNG: turns its bytes into those of a copy that says which pixels to interpolate.

The copy is the original, with a new directory of the raw picture at its end, and the one pointer to that directory
changed: whatever else is in the file stays where it is, byte for byte.

The list is the opcode FixBadPixelsList in OpcodeList1 (tag 51008), which readers apply to the samples as stored. Its
points count from the first stored row and column, margins included; it is big-endian, whatever the file is.

References
----------
Adobe, Digital Negative Specification 1.4, chapter 7.
"""

from __future__ import annotations

import struct
from collections.abc import Collection, Iterator
from dataclasses import dataclass

_TYPE_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4}
_INTEGERS = {1: "B", 3: "H", 4: "I", 7: "B", 13: "I"}

_KIND, _WIDTH, _HEIGHT, _COMPRESSED, _FILTERS, _SUB = 254, 256, 257, 259, 262, 330
_PERIOD, _PATTERN, _VERSION, _MAKE, _MODEL = 33421, 33422, 50706, 271, 272
_SERIAL, _ACTIVE, _OPCODES = 50735, 50829, 51008
_CFA = 32803

_FIX_BAD_PIXELS_LIST = 5
_SINCE_1_3 = 0x01030000
_OPTIONAL = 1
"""Flag: a reader that does not know the opcode may go on without it."""


class DngError(Exception):
    """The file is no DNG that a list can be added to; a sentence without its name."""


@dataclass(frozen=True, slots=True)
class _Entry:
    type: int
    count: int
    value: bytes
    """Four bytes: the value, or where it is."""


@dataclass(frozen=True, slots=True)
class _Directory:
    at: int
    entries: dict[int, _Entry]
    next: int
    pointed_from: int
    """Where the four bytes are that say where it starts."""


@dataclass(frozen=True, slots=True)
class DngInfo:
    """What matters of a DNG's raw picture here."""

    width: int
    """Pixels per row of the active area, which is what is visible."""

    height: int

    left: int
    """Columns before the active area."""

    top: int
    """Rows above it."""

    make: str | None
    model: str | None
    serial: str | None


class Dng:
    """A DNG in memory.

    Raises
    ------
    DngError
        If it is none, or holds no Bayer mosaic.
    """

    def __init__(self, content: bytes) -> None:
        self._content = content
        order = {b"II": "<", b"MM": ">"}.get(content[:2])
        if order is None or len(content) < 8:
            raise DngError("it is no DNG")
        self._order = order
        try:
            if self._unpacked("H", 2)[0] != 42:
                raise DngError("it is no DNG, or one larger than 4 GB")
            directories = list(self._directories())
            self._first = directories[0]
            if _VERSION not in self._first.entries:
                raise DngError("it is a TIFF file or another raw file, but no DNG")
            self._raw = self._raw_directory(directories)
            top, left, bottom, right = self._active()
            self._phase = self._bayer_phase(top, left)
            self.info = DngInfo(
                right - left, bottom - top, left, top, self._text(_MAKE), self._text(_MODEL), self._text(_SERIAL)
            )
        except (struct.error, IndexError, KeyError) as error:
            raise DngError("it is damaged") from error

    def with_points(self, points: Collection[tuple[int, int]]) -> bytes:
        """Return a copy with a list of bad pixels; opcodes that are there stay, before it.

        Parameters
        ----------
        points : x, y, from the top left of the active area
        """
        opcodes = [(self._opcode(points))]
        known = self._raw.entries.get(_OPCODES)
        before = b"" if known is None else self._bytes(known)
        count = 0
        if before:
            (count,) = struct.unpack_from(">I", before)
        payload = struct.pack(">I", count + len(opcodes)) + before[4:] + b"".join(opcodes)
        out = bytearray(self._content)
        out += bytes(len(out) % 2)
        where = len(out)
        out += payload
        out += bytes(len(out) % 2)
        placed = _Entry(7, len(payload), struct.pack(f"{self._order}I", where))
        at = len(out)
        out += self._directory({**self._raw.entries, _OPCODES: placed}, self._raw.next)
        if len(out) >= 1 << 32:
            raise DngError("there is no room in it: it would be larger than 4 GB")
        struct.pack_into(f"{self._order}I", out, self._raw.pointed_from, at)
        self._raise_version(out, at)
        return bytes(out)

    def _opcode(self, points: Collection[tuple[int, int]]) -> bytes:
        # Points only, and no rectangles: readers disagree whether their last row belongs to them.
        data = struct.pack(">III", self._phase, len(points), 0)
        ordered = sorted((y + self.info.top, x + self.info.left) for x, y in points)
        data += b"".join(struct.pack(">II", row, column) for row, column in ordered)
        return struct.pack(">IIII", _FIX_BAD_PIXELS_LIST, _SINCE_1_3, _OPTIONAL, len(data)) + data

    def _raise_version(self, out: bytearray, raw_at: int) -> None:
        """Have the file call itself a DNG 1.3, where it calls itself an older one: opcodes came with that."""
        version = self._first.entries[_VERSION].value
        if version >= bytes((1, 3, 0, 0)):
            return
        for at in {self._first.at, raw_at} if self._first is self._raw else {self._first.at}:
            (count,) = struct.unpack_from(f"{self._order}H", out, at)
            for place in range(at + 2, at + 2 + 12 * count, 12):
                if struct.unpack_from(f"{self._order}H", out, place)[0] == _VERSION:
                    out[place + 8 : place + 12] = bytes((1, 3, 0, 0))

    def _directory(self, entries: dict[int, _Entry], following: int) -> bytes:
        out = struct.pack(f"{self._order}H", len(entries))
        for tag, entry in sorted(entries.items()):
            out += struct.pack(f"{self._order}HHI", tag, entry.type, entry.count) + entry.value
        return out + struct.pack(f"{self._order}I", following)

    # --- reading

    def _directories(self) -> Iterator[_Directory]:
        """Yield the chain of directories, each followed by those below it."""
        seen: set[int] = set()
        pointed_from = 4
        while True:
            directory = self._read(pointed_from)
            if directory.at in seen:
                raise DngError("it is damaged: its directories lead in a circle")
            seen.add(directory.at)
            yield directory
            below = directory.entries.get(_SUB)
            if below is not None and below.type in (4, 13) and below.count <= 64:
                start = directory.at + 2 + 12 * sorted(directory.entries).index(_SUB) + 8
                if below.count > 1:
                    (start,) = self._unpacked("I", start)
                for number in range(below.count):
                    yield self._read(start + 4 * number)
            if not directory.next:
                return
            (count,) = self._unpacked("H", directory.at)
            pointed_from = directory.at + 2 + 12 * count

    def _read(self, pointed_from: int) -> _Directory:
        (at,) = self._unpacked("I", pointed_from)
        (count,) = self._unpacked("H", at)
        entries = {}
        order = []
        for place in range(at + 2, at + 2 + 12 * count, 12):
            tag, kind, number = self._unpacked("HHI", place)
            entries[tag] = _Entry(kind, number, self._content[place + 8 : place + 12])
            order.append(tag)
        if order != sorted(set(order)):
            raise DngError("it is damaged: a directory is out of order")
        (following,) = self._unpacked("I", at + 2 + 12 * count)
        return _Directory(at, entries, following, pointed_from)

    @staticmethod
    def _raw_directory(directories: list[_Directory]) -> _Directory:
        for directory in directories:
            kind, filters = directory.entries.get(_KIND), directory.entries.get(_FILTERS)
            main = kind is None or not any(kind.value)
            if main and filters is not None and _CFA.to_bytes(2, "little") in (filters.value[:2], filters.value[1::-1]):
                return directory
        raise DngError("it holds no mosaic of raw samples, to which alone a list of bad pixels applies")

    def _active(self) -> tuple[int, int, int, int]:
        width, height = self._integers(_WIDTH)[0], self._integers(_HEIGHT)[0]
        if _ACTIVE not in self._raw.entries:
            return 0, 0, height, width
        top, left, bottom, right = self._integers(_ACTIVE)
        if not (0 <= top < bottom <= height and 0 <= left < right <= width):
            raise DngError("it is damaged: its active area is outside of its picture")
        return top, left, bottom, right

    def _bayer_phase(self, top: int, left: int) -> int:
        """Return the phase at the first stored sample: 0 green beside red, 1 red, 2 blue, 3 green beside blue."""
        period = self._integers(_PERIOD)
        if tuple(period) != (2, 2):
            raise DngError("its colours do not repeat after two rows: lists of bad pixels know Bayer mosaics only")
        pattern = self._integers(_PATTERN)
        # The pattern is told from the active area's origin.
        rows = [[pattern[(y - top) % 2 * 2 + (x - left) % 2] for x in (0, 1)] for y in (0, 1)]
        first, beside = rows[0]
        if first == 1:
            return 0 if beside == 0 else 3
        return 1 if first == 0 else 2

    def _integers(self, tag: int) -> tuple[int, ...]:
        entry = self._raw.entries[tag]
        data = self._bytes(entry)
        return struct.unpack_from(f"{self._order}{entry.count}{_INTEGERS[entry.type]}", data)

    def _text(self, tag: int) -> str | None:
        entry = self._first.entries.get(tag)
        if entry is None or entry.type not in (1, 2):
            return None
        return self._bytes(entry).partition(b"\0")[0].decode("utf-8", "replace").strip() or None

    def _bytes(self, entry: _Entry) -> bytes:
        size = entry.count * _TYPE_BYTES[entry.type]
        if size <= 4:
            return entry.value[:size]
        (at,) = struct.unpack(f"{self._order}I", entry.value)
        if at + size > len(self._content):
            raise DngError("it is cut off before its end")
        return self._content[at : at + size]

    def _unpacked(self, form: str, at: int) -> tuple[int, ...]:
        return struct.unpack_from(f"{self._order}{form}", self._content, at)
