"""What a picture file says about itself: EXIF, maker notes and a few containers turned into one record.

Only the handful of tags that identify a body and describe a shot are read, by
hand: a full EXIF parser takes 10 to 90 ms for some maker notes, as long as the
decoding of the picture itself; this takes a fraction of a millisecond. Bytes
that make no sense are skipped: a shot without metadata is still a shot.

References
----------
TIFF 6.0; CIPA DC-008 (Exif 2.32); Adobe DNG 1.7; maker notes and CR3 boxes as
documented by ExifTool (https://exiftool.org/TagNames/).
"""

from __future__ import annotations

import math
import os
import re
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta, timezone
from typing import BinaryIO

Read = Callable[[int, int], bytes]
"""(offset, size) -> at most size bytes from there."""

TIFF_MAGICS = {
    b"II*\0": "<",
    b"MM\0*": ">",
    b"IIU\0": "<",  # Panasonic RW2
    b"IIRO": "<",  # Olympus ORF
    b"IIRS": "<",
    b"MMOR": ">",
}
"""First four bytes of TIFF and of the raw files built on it, with the byte order."""

_TYPE_FORMATS = {
    1: "B", 2: "c", 3: "H", 4: "I", 5: "II", 6: "b", 7: "c", 8: "h", 9: "i", 10: "ii", 11: "f", 12: "d",
}  # fmt: skip
_MAX_ENTRIES = 512  # no camera writes as many; a broken count must not cost time
_MAX_VALUE_BYTES = 65536
_MAX_SEGMENTS = 256
_FITS_SERIALS = ("CAMSERNO", "SERIALNO", "SERNUM", "SERIAL", "CAMERAID", "CAMID", "DETSER")
_FIRST_YEAR, _LAST_YEAR = 1826, 9000
"""From the oldest photograph to far from the end of `datetime`, so that each time can be expressed in UTC."""

_CANON_UUID = bytes.fromhex("85c0b687820f11e08111f4ce462b6a48")


@dataclass(frozen=True, slots=True)
class Metadata:
    """What a file says about its camera and its shot. Unknown is None."""

    make: str | None = None
    """Maker of the camera."""

    model: str | None = None
    """Model of the camera."""

    serial: str | None = None
    """Serial number of the body."""

    exposure_s: float | None = None
    """Shutter time."""

    iso: float | None = None
    """Sensitivity setting; for cooled cameras the gain setting."""

    sensor_temp_c: float | None = None
    """Camera-reported temperature; near the sensor, not on it."""

    taken_at: datetime | None = None
    """When the shutter opened. Aware if the file names a zone, else naive."""

    software: str | None = None
    """What wrote the file: the camera's firmware, or a program."""

    creator: str | None = None
    """The program that XMP names as the creator of the file."""

    width: int | None = None
    """Pixels per row the camera wrote, by its EXIF. Differs from the stored size after a crop."""

    height: int | None = None
    """Rows the camera wrote, by its EXIF."""

    def filled_from(self, other: Metadata) -> Metadata:
        """Return a copy in which what is unknown is taken from `other`."""
        missing = {name: getattr(other, name) for name in self.__slots__ if getattr(self, name) is None}
        return replace(self, **missing)


def from_bytes(data: bytes) -> Metadata:
    """Read the metadata of a whole file, or of its first part, held in memory."""
    return _read_any(lambda offset, size: data[offset : offset + size])


def from_file(file: BinaryIO) -> Metadata:
    """Read the metadata of an open, seekable file. Only the parts needed are read.

    Raises
    ------
    OSError
        If the disk cannot be read. Content that makes no sense is no error.
    """

    end = file.seek(0, os.SEEK_END)

    def read(offset: int, size: int) -> bytes:
        # Offsets come from the file: some are none that the system takes.
        if not 0 <= offset < end:
            return b""
        file.seek(offset)
        return file.read(size)

    return _read_any(read)


def from_fits_header(header: Mapping[str, object]) -> Metadata:
    """Read the keywords that FITS camera programs write (MaxIm DL, N.I.N.A., SharpCap, INDI, Siril)."""
    return Metadata(
        model=clean_text(_first(header, "INSTRUME", "CAMERA", "CAMNAME")),
        serial=clean_serial(clean_text(_first(header, *_FITS_SERIALS))),
        exposure_s=_non_negative(_float(_first(header, "EXPTIME", "EXPOSURE"))),
        iso=_non_negative(_float(_first(header, "GAIN", "ISOSPEED"))),
        sensor_temp_c=_temperature(_float(_first(header, "CCD-TEMP", "DET-TEMP", "CCDTEMP", "CAMTEMP"))),
        taken_at=_fits_time(_first(header, "DATE-OBS")),
        software=clean_text(_first(header, "SWCREATE", "CREATOR", "SOFTWARE")),
    )


def clean_text(value: object) -> str | None:
    """Return `value` without NULs and surrounding blanks; None if nothing that names something is left."""
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str):
        return None
    text = " ".join(value.replace("\0", " ").split())
    return text if text and text.lower() not in {"none", "unknown", "n/a"} else None


def clean_serial(text: str | None) -> str | None:
    """Return a serial number without its label ("No= 00002539"); None if it is only zeros or filler."""
    if text is None:
        return None
    # Nikon writes "NO= 00002539", others "S/N: 123"; the label is not part of the number.
    number = re.sub(r"^(?:s/?n|serial|no|nr)\b\s*[.:=#]*\s*", "", text, flags=re.IGNORECASE)
    if not re.search(r"[1-9A-Za-z]", number) or number.lower() in {"none", "unknown", "n/a"}:
        return None
    return number


@dataclass(frozen=True, slots=True)
class Directory:
    """One TIFF directory: its entries, decoded when asked for."""

    read: Read
    """Where values too long for their entry are read from."""

    order: str
    """"<" or ">"."""

    base: int
    """Position from which the directory's offsets count."""

    entries: Mapping[int, tuple[int, int, bytes]]
    """Tag -> (type, count, the four bytes of value or offset)."""

    next_offset: int = 0
    """Offset of the next directory in the chain; 0 at the end."""

    def raw(self, tag: int, most: int = _MAX_VALUE_BYTES) -> bytes:
        """Return the bytes of a value; empty if it is not there, longer than `most`, or lies outside the file."""
        kind, count, field = self.entries.get(tag, (0, 0, b""))
        size = struct.calcsize("=" + _TYPE_FORMATS[kind]) * count if kind in _TYPE_FORMATS else 0
        if not 0 < size <= most:
            return b""
        if size <= 4:
            return field[:size]
        value = self.read(self.base + self._long(field), size)
        return value if len(value) == size else b""

    def offset(self, tag: int) -> int:
        """Return where the value of `tag` lies in the file; 0 if it is not there or fits its entry."""
        kind, count, field = self.entries.get(tag, (0, 0, b""))
        size = struct.calcsize("=" + _TYPE_FORMATS[kind]) * count if kind in _TYPE_FORMATS else 0
        return self.base + self._long(field) if size > 4 else 0

    def numbers(self, tag: int) -> tuple[float, ...]:
        """Return a value's numbers; rationals are divided, those over zero left out."""
        kind = self.entries.get(tag, (0, 0, b""))[0]
        value = self.raw(tag)
        if not value or kind in (2, 7):
            return ()
        unit = _TYPE_FORMATS[kind]
        count = len(value) // struct.calcsize("=" + unit)
        flat = struct.unpack(self.order + unit * count, value)
        if len(unit) == 1:
            return tuple(number for number in flat if math.isfinite(number))
        return tuple(over / under for over, under in zip(flat[::2], flat[1::2], strict=True) if under)

    def number(self, tag: int) -> float | None:
        """Return the first number of a value."""
        return next(iter(self.numbers(tag)), None)

    def text(self, tag: int) -> str | None:
        """Return a value as cleaned text."""
        kind = self.entries.get(tag, (0, 0, b""))[0]
        if kind not in (1, 2, 7):
            return None
        return clean_text(self.raw(tag).split(b"\0")[0].decode("utf-8", "replace"))

    def child(self, tag: int) -> Directory | None:
        """Return the directory that the value of `tag` points to."""
        return next(iter(self.children(tag)), None)

    def children(self, tag: int) -> list[Directory]:
        """Return the directories that the values of `tag` point to."""
        found = (read_directory(self.read, self.base, int(at), self.order) for at in self.numbers(tag)[:16])
        return [directory for directory in found if directory is not None]

    def _long(self, field: bytes) -> int:
        return int(struct.unpack(self.order + "I", field)[0])


def read_directory(read: Read, base: int, offset: int, order: str) -> Directory | None:
    """Return the TIFF directory at `base + offset`, or None if there is none."""
    head = read(base + offset, 2) if offset > 0 else b""
    if len(head) < 2:
        return None
    (count,) = struct.unpack(order + "H", head)
    if not 0 < count <= _MAX_ENTRIES:
        return None
    body = read(base + offset + 2, 12 * count + 4)
    whole = len(body) // 12 * 12
    entries = {
        tag: (kind, number, field)
        for tag, kind, number, field in struct.iter_unpack(order + "HHI4s", body[: min(whole, 12 * count)])
    }
    tail = body[12 * count : 12 * count + 4]
    following = struct.unpack(order + "I", tail)[0] if len(tail) == 4 else 0
    return Directory(read, order, base, entries, following)


def first_directory(read: Read, base: int = 0) -> Directory | None:
    """Return the first directory of the TIFF that begins at `base`, or None if it is no TIFF."""
    head = read(base, 8)
    order = TIFF_MAGICS.get(head[:4])
    if order is None or len(head) < 8:
        return None
    return read_directory(read, base, struct.unpack(order + "I", head[4:])[0], order)


def _read_any(read: Read) -> Metadata:
    head = read(0, 16)
    if head[:3] == b"\xff\xd8\xff":
        return _from_jpeg(read, 0)
    if head[:4] in TIFF_MAGICS:
        return _from_tiff(read, 0)
    if head[:8] == b"FUJIFILM":
        jpeg_offset = read(84, 4)
        return _from_jpeg(read, struct.unpack(">I", jpeg_offset)[0]) if len(jpeg_offset) == 4 else Metadata()
    if head[4:12] == b"ftypcrx ":
        return _from_cr3(read)
    if head[:8] == b"\x89PNG\r\n\x1a\n":
        return _from_png(read)
    return Metadata()


def _from_jpeg(read: Read, start: int) -> Metadata:
    found = Metadata()
    for offset, size in _app1_segments(read, start):
        head = read(offset, 29)
        if head.startswith(b"Exif\0"):
            found = found.filled_from(_from_tiff(read, offset + 6))
        elif head.startswith(b"http://ns.adobe.com/xap/1.0/"):
            found = found.filled_from(Metadata(creator=_xmp_creator(read(offset, size))))
    return found


def _app1_segments(read: Read, start: int) -> Iterator[tuple[int, int]]:
    """Yield (offset, size) of the payload of each APP1 segment before the picture data."""
    offset = start + 2
    for _ in range(_MAX_SEGMENTS):
        head = read(offset, 4)
        if len(head) < 4 or head[0] != 0xFF or head[1] in (0xDA, 0xD9):
            return
        if head[1] == 0xFF:  # fill byte
            offset += 1
            continue
        size = struct.unpack(">H", head[2:])[0]
        if head[1] == 0xE1:
            yield offset + 4, size - 2
        offset += 2 + max(size, 2)


def _xmp_creator(packet: bytes) -> str | None:
    match = re.search(rb"CreatorTool(?:=\"([^\"<]{1,200})\"|>([^<]{1,200})<)", packet)
    if match is None:
        return None
    return clean_text((match[1] or match[2]).decode("utf-8", "replace"))


def _from_png(read: Read) -> Metadata:
    offset = 8
    for _ in range(_MAX_SEGMENTS):
        head = read(offset, 8)
        if len(head) < 8 or head[4:] in (b"IDAT", b"IEND"):
            break
        size = struct.unpack(">I", head[:4])[0]
        if head[4:] == b"eXIf":
            return _from_tiff(read, offset + 8)
        offset += 12 + size
    return Metadata()


def _from_cr3(read: Read) -> Metadata:
    """Read Canon's boxes: moov/uuid holds CMT1 (IFD0), CMT2 (Exif) and CMT3 (the maker note) as TIFFs."""
    parts: dict[bytes, Directory] = {}
    for kind, start, end in _boxes(read, 0, 1 << 40):
        if kind != b"moov":
            continue
        for inner, inner_start, inner_end in _boxes(read, start, end):
            if inner != b"uuid" or read(inner_start, 16) != _CANON_UUID:
                continue
            for name, at, _ in _boxes(read, inner_start + 16, inner_end):
                directory = first_directory(read, at) if name in (b"CMT1", b"CMT2", b"CMT3") else None
                if directory is not None:
                    parts[name] = directory
    found = Metadata()
    for name in (b"CMT1", b"CMT2"):
        if name in parts:
            found = found.filled_from(_from_directory(parts[name]))
    if b"CMT3" in parts:
        found = found.filled_from(_canon(parts[b"CMT3"], found.model))
    return found


def _boxes(read: Read, start: int, end: int) -> Iterator[tuple[bytes, int, int]]:
    """Yield (type, first byte of content, end) of each ISO base media box from `start`."""
    for _ in range(64):
        head = read(start, 16)
        if len(head) < 8 or start >= end:
            return
        size, header = struct.unpack(">I", head[:4])[0], 8
        if size == 1 and len(head) == 16:
            size, header = struct.unpack(">Q", head[8:])[0], 16
        if size < header:
            return
        yield head[4:8], start + header, min(start + size, end)
        start += size


def _from_tiff(read: Read, base: int) -> Metadata:
    first = first_directory(read, base)
    if first is None:
        return Metadata()
    found = _from_directory(first)
    exif = first.child(0x8769)
    if exif is not None:
        # Exif first: IFD0's DateTime is when the file was last changed, and its size may be a thumbnail's.
        found = _from_directory(exif).filled_from(found)
        found = found.filled_from(_from_maker_note(exif, found))
    # Only in a file of its own, not in a preview: a preview inside itself would never end.
    preview = first.offset(0x002E) if base == 0 and read(base, 4) == b"IIU\0" else 0
    if preview:
        found = found.filled_from(_from_jpeg(read, preview))
    return found


def _from_directory(directory: Directory) -> Metadata:
    """Read the tags of IFD0 and of the Exif directory; raw files put some of each in the other."""
    return Metadata(
        make=directory.text(0x010F),
        model=directory.text(0x0110),
        serial=clean_serial(directory.text(0xA431)) or clean_serial(directory.text(0xC62F)),
        exposure_s=_exposure_s(directory),
        iso=_iso(directory),
        sensor_temp_c=None,
        taken_at=_taken_at(directory),
        software=directory.text(0x0131) or directory.text(0x000B),
        width=_positive_int(directory.number(0xA002)),
        height=_positive_int(directory.number(0xA003)),
    )


def _exposure_s(directory: Directory) -> float | None:
    exposure_s = directory.number(0x829A)
    if exposure_s is not None and exposure_s >= 0:
        return exposure_s
    apex = directory.number(0x9201)  # ShutterSpeedValue = -log2(seconds)
    return 2.0**-apex if apex is not None and abs(apex) < 30 else None


def _iso(directory: Directory) -> float | None:
    # 65535 in ISOSpeedRatings means "more than fits"; the newer tags hold the value then.
    for tag in (0x8827, 0x8832, 0x8833):
        iso = directory.number(tag)
        if iso and iso != 65535:
            return float(iso)
    return None


def _taken_at(directory: Directory) -> datetime | None:
    for tag, subsecond_tag, zone_tag in (
        (0x9003, 0x9291, 0x9011),
        (0x9004, 0x9292, 0x9012),
        (0x0132, 0x9290, 0x9010),
    ):
        taken_at = _exif_time(directory.text(tag), directory.text(subsecond_tag), directory.text(zone_tag))
        if taken_at is not None:
            return taken_at
    return None


def _exif_time(text: str | None, subseconds: str | None, zone: str | None) -> datetime | None:
    match = re.match(r"(\d{4})[:-](\d\d)[:-](\d\d)[ T](\d\d):(\d\d):(\d\d)", text or "")
    if match is None:
        return None
    try:
        taken_at = datetime.strptime("".join(match.groups()), "%Y%m%d%H%M%S")
    except ValueError:  # 0000:00:00 of a camera whose clock was never set
        return None
    if not _is_credible(taken_at):
        return None
    if subseconds and subseconds.isascii() and subseconds.isdigit():
        taken_at = taken_at.replace(microsecond=int(f"{subseconds:0<6.6}"))
    offset = re.fullmatch(r"([+-])(\d\d):(\d\d)", zone or "")
    if zone == "Z":
        return taken_at.replace(tzinfo=UTC)
    if offset is None or int(offset[2]) > 14:
        return taken_at
    away = timedelta(hours=int(offset[2]), minutes=int(offset[3]))
    return taken_at.replace(tzinfo=timezone(away if offset[1] == "+" else -away))


def _from_maker_note(exif: Directory, known: Metadata) -> Metadata:
    """Read serial number and temperature where a maker hides them in its own directory."""
    start = exif.offset(0x927C)
    make = (known.make or "").upper()
    head = exif.read(start, 16) if start else b""
    if len(head) < 16:
        return Metadata()
    if make.startswith("CANON"):
        canon = read_directory(exif.read, exif.base, start - exif.base, exif.order)
        return _canon(canon, known.model) if canon else Metadata()
    if head.startswith(b"Nikon\0\x02"):
        nikon = first_directory(exif.read, start + 10)
        return _nikon(nikon) if nikon else Metadata()
    if head.startswith((b"OLYMPUS\0", b"OM SYSTEM\0")):
        # Offsets count from the note; the header names its byte order.
        skip = 12 if head.startswith(b"OLYMPUS") else 16
        olympus = read_directory(exif.read, start, skip, "<" if b"II" in head else ">")
        equipment = olympus.child(0x2010) if olympus else None
        return Metadata(serial=clean_serial(equipment.text(0x0101))) if equipment else Metadata()
    if head.startswith(b"Panasonic\0"):
        panasonic = read_directory(exif.read, exif.base, start - exif.base + 12, exif.order)
        return Metadata(serial=clean_serial(panasonic.text(0x0025))) if panasonic else Metadata()
    if head.startswith(b"FUJIFILM"):
        fuji = read_directory(exif.read, start, struct.unpack("<I", head[8:12])[0], "<")
        return Metadata(serial=clean_serial(fuji.text(0x0010))) if fuji else Metadata()
    if head.startswith((b"AOC\0", b"PENTAX \0")):
        return _pentax(exif, start, head)
    return Metadata()


def _canon(note: Directory, model: str | None) -> Metadata:
    serial = _positive_int(note.number(0x000C))
    shot_info = note.numbers(0x0004)
    # Only EOS bodies fill this field, the first 1D and 1Ds with something else; 0 means not measured.
    measured = "EOS" in (model or "") and not re.search(r"EOS-1DS?$", model or "", re.IGNORECASE)
    temperature = shot_info[12] if measured and len(shot_info) > 12 else 0
    return Metadata(
        serial=str(serial) if serial else None,
        sensor_temp_c=_temperature(temperature - 128.0) if temperature else None,
    )


def _nikon(note: Directory) -> Metadata:
    iso = note.numbers(0x0002)
    return Metadata(
        serial=clean_serial(note.text(0x001D)) or clean_serial(note.text(0x00A0)),
        iso=float(iso[1]) if len(iso) > 1 and iso[1] else None,
    )


def _pentax(exif: Directory, start: int, head: bytes) -> Metadata:
    if head.startswith(b"PENTAX"):  # offsets count from the note
        note = read_directory(exif.read, start, 10, "<" if head[8:10] == b"II" else ">")
    else:
        note = read_directory(exif.read, exif.base, start - exif.base + 6, "<" if head[4:6] == b"II" else ">")
    if note is None:
        return Metadata()
    return Metadata(serial=clean_serial(note.text(0x0229)), sensor_temp_c=_temperature(note.number(0x0047)))


def _fits_time(value: object) -> datetime | None:
    """Return DATE-OBS, which the standard defines as UTC, as an aware time."""
    if not isinstance(value, str) or "T" not in value:
        return None
    try:
        taken_at = datetime.fromisoformat(value.strip())
    except ValueError:
        return None
    if not _is_credible(taken_at):
        return None
    return taken_at if taken_at.tzinfo else taken_at.replace(tzinfo=UTC)


def _is_credible(taken_at: datetime) -> bool:
    return _FIRST_YEAR <= taken_at.year <= _LAST_YEAR


def _first(header: Mapping[str, object], *keywords: str) -> object:
    return next((header[keyword] for keyword in keywords if header.get(keyword) not in (None, "")), None)


def _float(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        number = float(value)
    except ValueError:
        return None
    return number if abs(number) < 1e12 else None  # also refuses nan


def _non_negative(value: float | None) -> float | None:
    return value if value is not None and value >= 0 else None


def _positive_int(value: float | None) -> int | None:
    return int(value) if value is not None and value >= 1 else None


def _temperature(value: float | None) -> float | None:
    # Below what any camera cooler reaches, or above what electronics survives, is a filler value.
    return float(value) if value is not None and -100 <= value <= 120 else None
