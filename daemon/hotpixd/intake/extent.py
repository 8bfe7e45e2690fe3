"""Whether a picture file holds what its header says: a sentence where it does not.

Readers of pictures fill gaps, and leave out what they do not need. One wrong number in a header then gives a frame
of other sides, or one with its samples out of place, without any error. So what a header promises is compared with what
the file holds: to the byte where samples lie as they are, and by what comes out of it where they are compressed.

JPEGs need no check of their own: libjpeg-turbo warns of missing and of superfluous blocks, and warnings are errors
in `decode`. What no check can find is a file that would be whole with other sides: as many samples in rows of another
length, or a JPEG whose last blocks are used less or more.

References
----------
TIFF 6.0; TIFF/EP; Adobe DNG 1.7; PNG (third edition); FITS 4.0.
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Any, BinaryIO

from hotpixd.intake import metadata
from hotpixd.intake.metadata import Directory

CFA, LINEAR_RAW = 32803, 34892
"""Photometric interpretations of a mosaic, and of raw colours that are no mosaic (or one)."""

_STORED, _LZW, _JPEG, _DEFLATE, _PACKBITS = 1, 5, 7, (8, 32946), 32773
_PATTERN_SIDES, _PATTERN = 33421, 33422

JPEG_HEADER = 4096
"""Bytes of a JPEG within which it says how large it is: tables may come first."""

_XTRANS = "GBGGRGRGRBGBGBGGRGGRGGBGBGBRGRGRGGBG"


# TIFF and DNG


@dataclass(frozen=True, slots=True)
class _Stored:
    """How a TIFF or DNG stores the samples of a picture, by its tags."""

    width: int
    height: int

    bits: int
    """Per sample."""

    samples: int
    """Per pixel, of those that lie side by side."""

    planes: int
    """Of those that lie one plane after the other; else 1."""

    compression: int

    part: tuple[int, int]
    """Width and height of a strip or tile."""

    tiled: bool
    """Whether parts at the margins are as large as all others."""

    offsets: Sequence[int]
    counts: Sequence[int]
    """Bytes of each part."""

    def sizes(self) -> list[tuple[int, int]]:
        """Return (samples per row, rows) of each part."""
        width, height = self.part
        if width < 1 or height < 1:
            return []
        down = range(0, self.height, height)
        if self.tiled:
            return [(width * self.samples, height)] * (-(-self.width // width) * len(down) * self.planes)
        return [(width * self.samples, min(height, self.height - top)) for top in down] * self.planes


def page_fault(page: Any, file: BinaryIO) -> str | None:
    """Judge a page of a `tifffile.TiffFile`."""
    sides, colours = _tuple(page.tags.valueof(_PATTERN_SIDES)), _tuple(page.tags.valueof(_PATTERN))
    named = len(sides) == 2 and len(colours) == sides[0] * sides[1] and max(colours, default=7) <= 6
    if not named == bool(sides or colours) == (int(page.photometric) == CFA):
        return "the TIFF contradicts itself about the colours of its mosaic"
    planes = page.samplesperpixel if int(page.planarconfig) == 2 else 1
    strip = (page.imagewidth, min(page.rowsperstrip or page.imagelength, page.imagelength))
    stored = _Stored(
        width=page.imagewidth,
        height=page.imagelength,
        bits=page.bitspersample,
        samples=page.samplesperpixel // planes,
        planes=planes,
        compression=int(page.compression),
        part=(page.tilewidth, page.tilelength) if page.is_tiled else strip,
        tiled=page.is_tiled,
        # As they are written: tifffile drops those it does not need.
        offsets=_tuple(page.tags.valueof(324 if page.is_tiled else 273)),
        counts=_tuple(page.tags.valueof(325 if page.is_tiled else 279)) or page.databytecounts,
    )
    count_bytes, entry_bytes, offset_bytes = (8, 20, 8) if page.parent.is_bigtiff else (2, 12, 4)
    taken = [(page.offset, page.offset + count_bytes + entry_bytes * len(page.tags) + offset_bytes)]
    taken += [
        (tag.valueoffset, tag.valueoffset + tag.valuebytecount)
        for tag in page.tags
        if tag.valuebytecount > offset_bytes
    ]
    return _stored_fault(stored, file, taken)


def _tuple(value: object) -> tuple[int, ...]:
    if isinstance(value, int):
        return (value,)
    return tuple(value) if isinstance(value, tuple | bytes) else ()


def raw_fault(file: BinaryIO, width: int, height: int, colours: str) -> str | None:
    """Judge a DNG or a mere mosaic, of which LibRaw has read so many samples; all other raw files nearly always pass.

    Those say less of themselves, each in its way: what LibRaw makes of them is believed.

    Parameters
    ----------
    width, height : of all samples, those outside the visible area too
    colours : as LibRaw says
    """

    def read(offset: int, size: int) -> bytes:
        file.seek(offset)
        return file.read(size)

    first = metadata.first_directory(read)
    if first is None:
        return None
    directories = [first, *first.children(0x014A)]
    fault = next(filter(None, map(_area_fault, directories)), None)
    if fault:
        return fault
    # LibRaw takes a colour that it does not expect for another one; of four it has names of its own.
    patterns = [{int(colour) for colour in directory.numbers(_PATTERN)} for directory in directories]
    read_as = {"RGBCMYW".find(colour) for colour in colours}
    if len(colours) > 1 and any(len(pattern) < 4 and not pattern <= read_as for pattern in patterns):
        return f"the raw file names other colours than {colours}"
    if 0xC612 not in first.entries and first.number(0x0106) not in (CFA, LINEAR_RAW):
        own = (first.number(0x0100), first.number(0x0101)) == (width, height)
        alone = len(directories) == 1 and not first.next_offset
        finished = first.number(0x0106) in (0, 1, 2, 3, 6)
        return "the file holds one picture, and that is none of raw samples" if own and alone and finished else None
    raws = [
        directory
        for directory in directories
        if directory.number(0x0106) in (CFA, LINEAR_RAW) and not directory.number(0x00FE)
    ]
    sides = [(int(raw.number(0x0100) or 0), int(raw.number(0x0101) or 0)) for raw in raws]
    if (width, height) not in sides:
        return f"the raw file describes no picture of the {width} x {height} samples that were read"
    raw = raws[sides.index((width, height))]
    tiled = 0x0142 in raw.entries
    tile = (int(raw.number(0x0142) or 0), int(raw.number(0x0143) or 0))
    stored = _Stored(
        width=width,
        height=height,
        bits=int(raw.number(0x0102) or 1),
        samples=int(raw.number(0x0115) or 1),
        planes=1,
        compression=int(raw.number(0x0103) or _STORED),
        part=tile if tiled else (width, int(min(raw.number(0x0116) or height, height))),
        tiled=tiled,
        offsets=[int(start) for start in raw.numbers(0x0144 if tiled else 0x0111)],
        counts=[int(count) for count in raw.numbers(0x0145 if tiled else 0x0117)],
    )
    pattern_sides, pattern = raw.numbers(_PATTERN_SIDES), raw.numbers(_PATTERN)
    named = len(pattern_sides) == 2 and len(pattern) == pattern_sides[0] * pattern_sides[1]
    said = not raw.entries.keys().isdisjoint((_PATTERN_SIDES, _PATTERN))
    if not (raw.number(0x0106) == CFA) == named == said == (len(colours) > 1):
        return "the raw file contradicts itself about its colours"
    return _stored_fault(stored, file, sorted(_values_of(first) | _values_of(raw)))


def _area_fault(raw: Directory) -> str | None:
    """Judge the visible area of a directory, and the default crop within it, if it names them."""
    width, height = raw.number(0x0100) or 0, raw.number(0x0101) or 0
    area = raw.numbers(0xC68D) if 0xC68D in raw.entries else (0, 0, height, width)
    origin = raw.numbers(0xC61F) if 0xC61F in raw.entries else (0, 0)
    crop = raw.numbers(0xC620) if 0xC620 in raw.entries else (0, 0)
    if (len(area), len(origin), len(crop)) == (4, 2, 2):
        top, left, bottom, right = area
        inside = 0 <= top <= bottom <= height and 0 <= left <= right <= width
        if inside and origin[0] + crop[0] <= right - left and origin[1] + crop[1] <= bottom - top:
            return None
    return f"the raw file's visible area does not fit into its {width:.0f} x {height:.0f} samples"


def _values_of(directory: Directory) -> set[tuple[int, int]]:
    """Return where the values of a directory lie, but for those that fit into it."""
    spans = set()
    for tag in directory.entries:
        value = directory.raw(tag)
        if len(value) > 4:
            spans.add((directory.offset(tag), directory.offset(tag) + len(value)))
    return spans


def _stored_fault(stored: _Stored, file: BinaryIO, taken: Sequence[tuple[int, int]]) -> str | None:
    """Compare strips or tiles with what sides and depth need.

    Parameters
    ----------
    taken : (start, end) of what else is in the file: samples that lie there are not where they were written
    """
    sizes = stored.sizes()
    said = f"{stored.width} x {stored.height} pixels"
    if not sizes or not len(sizes) == len(stored.offsets) == len(stored.counts):
        return f"the header says {said}, which are {len(sizes)} parts, and names {len(stored.offsets)}"
    parts = [(start, start + count) for start, count in zip(stored.offsets, stored.counts, strict=True)]
    end = file.seek(0, io.SEEK_END)
    if any(not 8 <= start < stop <= end for start, stop in parts):
        return "samples lie beyond the end of the file"
    if any(before[1] > after[0] for before, after in pairwise(sorted([*parts, *taken]))):
        return "parts of the file lie over each other"
    needed = [-(-across * stored.bits // 8) * rows for across, rows in sizes]
    if stored.compression == _STORED:
        right = all(_is_filled_up(count, size) for count, size in zip(stored.counts, needed, strict=True))
    else:
        # The first and the last tell any change of the sides: those between are as large as the first. But at what does
        # not begin as a JPEG LibRaw stops without a word.
        looked_at = range(len(sizes)) if stored.compression == _JPEG else {0, len(sizes) - 1}
        right = all(_holds(stored, file, index, sizes[index], needed[index]) for index in looked_at)
    return None if right else f"the header says {said} of {stored.bits} bit, and the file holds others"


def _is_filled_up(count: int, size: int) -> bool:
    """Tell whether a length is a size filled up: writers do so to an even length, with large parts to pages."""
    units = (1, 2, 512, 4096) if size >= 1 << 20 else (1, 2)
    return any(count == -(-size // unit) * unit for unit in units)


def _holds(stored: _Stored, file: BinaryIO, index: int, size: tuple[int, int], needed: int) -> bool:
    """Tell whether a compressed part holds what is needed; True where that cannot be told."""
    file.seek(stored.offsets[index])
    coded = file.read(min(stored.counts[index], JPEG_HEADER) if stored.compression == _JPEG else stored.counts[index])
    if stored.compression in _DEFLATE:
        inflater = zlib.decompressobj()
        try:
            # Bounded: what inflates to more is a bomb, or of other sides.
            return len(inflater.decompress(coded, needed + 1)) == needed
        except zlib.error:
            return False
    # With 8 bit they are lossy, and their sides need not be those of the part.
    if stored.compression == _JPEG and stored.bits != 8:
        across, rows, components = jpeg_sides(coded)
        return across * rows * components == size[0] * size[1]
    if stored.compression in (_LZW, _PACKBITS):
        import tifffile

        try:
            return len(tifffile.TIFF.DECOMPRESSORS[stored.compression](coded)) == needed
        except (KeyError, ValueError):  # LZW needs imagecodecs
            return True
    return True


def jpeg_sides(coded: bytes) -> tuple[int, int, int]:
    """Return width, height and components of a JPEG as its frame header says; zeros if it has none."""
    at = 2 if coded.startswith(b"\xff\xd8") else len(coded)
    while coded[at : at + 1] == b"\xff" and at + 10 <= len(coded):
        if 0xC0 <= coded[at + 1] <= 0xCF and coded[at + 1] not in (0xC4, 0xC8, 0xCC):
            height, width = int.from_bytes(coded[at + 5 : at + 7], "big"), int.from_bytes(coded[at + 7 : at + 9], "big")
            return width, height, coded[at + 9]
        at += 2 + max(int.from_bytes(coded[at + 2 : at + 4], "big"), 2)
    return 0, 0, 0


def filter_fault(colours: str) -> str | None:
    """Judge the colours of a raw frame: a Bayer filter's two greens lie on a diagonal; X-Trans begins anywhere."""
    if len(colours) == 36:
        right = colours in _xtrans_filters()
    elif len(colours) == 4 and set(colours) <= set("RGB"):
        right = set(colours) == set("RGB") and "GG" in (colours[::3], colours[1:3])
    else:
        # Filters of other colours have each once; LLLL is a pattern that nobody named.
        right = len(colours) != 4 or set(colours) in (set("CMYG"), set("RGBE")) or colours == "LLLL"
    return None if right else f"no sensor has colours in the order {colours}"


@cache
def _xtrans_filters() -> frozenset[str]:
    found = set()
    turned = "".join(_XTRANS[x * 6 + y] for y in range(6) for x in range(6))
    for filter_ in (_XTRANS, turned):
        for down in range(6):
            for right in range(6):
                places = [((y + down) % 6) * 6 + (x + right) % 6 for y in range(6) for x in range(6)]
                found.add("".join(filter_[place] for place in places))
    return frozenset(found)


# PNG

_CHANNELS = {0: 1, 2: 3, 4: 2, 6: 4}
_ADAM7 = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
"""Of each pass of an interlaced PNG: first column, first row, and the steps to the next."""


def png_fault(data: bytes) -> str | None:
    """Judge a PNG that has its header: it must hold exactly the samples that this says, and their checksum be right.

    Pillow fills with zeros what is missing, and leaves out what is too much.
    This takes 0.16 s for 24 megapixels of 16 bit, decoding them 0.3 s (2.3 GHz server core).
    """
    width, height = int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")
    pixel = _CHANNELS.get(data[25], 0) * data[24] // 8
    needed = 0
    for left, top, right, down in _ADAM7 if data[28] else ((0, 0, 1, 1),):
        across, rows = -(-max(width - left, 0) // right), -(-max(height - top, 0) // down)
        needed += rows * (1 + across * pixel) if across else 0
    inflater = zlib.decompressobj()
    held = 0
    try:
        for part in _png_samples(data):
            left_over = part
            while left_over and held <= needed:
                # In bounded pieces: a bomb would fill the memory.
                held += len(inflater.decompress(left_over, 1 << 20))
                left_over = inflater.unconsumed_tail
    except zlib.error as error:
        return f"the samples of the PNG cannot be read ({error})"
    if held == needed and inflater.eof:
        return None
    return f"the header says {width} x {height} pixels, and the PNG holds others"


def _png_samples(data: bytes) -> Iterator[bytes]:
    """Yield the compressed samples, in pieces of at most 64 kB."""
    at = 8
    while at + 12 <= len(data):
        size = int.from_bytes(data[at : at + 4], "big")
        if data[at + 4 : at + 8] == b"IDAT":
            end = min(at + 8 + size, len(data))
            for start in range(at + 8, end, 1 << 16):
                yield data[start : min(start + (1 << 16), end)]
        at += 12 + size


# FITS

_BLOCK = 2880
_MAX_UNITS = 256
_MAX_BLOCKS = 4096
"""Of a header: 11 MB."""


def fits_fault(file: BinaryIO) -> str | None:
    """Judge a FITS file: header, data, what fills the last block of these, the next header, to the end of the file.

    The very last block may be short, as some programs write it.
    """
    end = file.seek(0, io.SEEK_END)
    at = 0
    for _ in range(_MAX_UNITS):
        found = _fits_header(file, at)
        size = None if found is None else _fits_size(found[0])
        if found is None or size is None:
            return "the FITS file's header contradicts itself"
        start = found[1]
        file.seek(min(start + size, end))
        fill = file.read(-size % _BLOCK)
        at = start + size + len(fill)
        whole = len(fill) == -size % _BLOCK
        if start + size > end or len(set(fill)) > 1 or (at < end and not whole):
            break
        if found[0].get("ZCMPTYPE", "").strip("' ") in ("GZIP_1", "GZIP_2") and not _last_tile_holds(file, *found):
            return "the sides of the compressed FITS picture are not those of its last part"
        if at == end:
            file.seek(0)
            return None
        file.seek(at)
        if file.read(8) != b"XTENSION":
            break
    return "the FITS file is longer or shorter than its headers say"


def _fits_header(file: BinaryIO, at: int) -> tuple[dict[str, str], int] | None:
    """Return what stands behind the keywords of a header, and where its data begin; None if it has no end."""
    header: dict[str, str] = {}
    file.seek(at)
    for block in range(1, _MAX_BLOCKS):
        text = file.read(_BLOCK).decode("latin-1")
        for start in range(0, len(text), 80):
            keyword = text[start : start + 8].rstrip()
            if keyword == "END":
                return header, at + block * _BLOCK
            if text[start + 8 : start + 10] == "= ":
                header.setdefault(keyword, text[start + 10 : start + 80].split("/")[0].strip())
        if len(text) < _BLOCK:
            break
    return None


def _fits_size(header: Mapping[str, str]) -> int | None:
    """Return the bytes of the data behind a header; None if it contradicts itself."""
    try:
        bits, axes = int(header["BITPIX"]), int(header["NAXIS"])
        # Bounds of the standard: astropy would list all axes and columns, however many are claimed.
        if axes not in range(1000) or bits not in (8, 16, 32, 64, -32, -64):
            return None
        if int(header.get("TFIELDS", "0")) not in range(1000) or int(header.get("ZNAXIS", "0")) not in range(1000):
            return None
        sides = [int(header[f"NAXIS{n}"]) for n in range(1, axes + 1)]
        extra, groups = int(header.get("PCOUNT", "0")), int(header.get("GCOUNT", "1"))
        if min([extra, groups, *sides]) < 0 or (header.get("ZIMAGE") == "T" and _tiles(header) != sides[1]):
            return None
    except (KeyError, ValueError, IndexError):
        return None
    pixels = 1 if sides else 0
    for side in sides:
        pixels *= side
    return groups * (extra + pixels) * abs(bits) // 8


def _last_tile_holds(file: BinaryIO, header: Mapping[str, str], start: int) -> bool:
    """Tell whether the last tile, which the picture's margins may cut, inflates to what it should."""
    try:
        row, rows = int(header["NAXIS1"]), int(header["NAXIS2"])
        needed = abs(int(header["ZBITPIX"])) // 8
        for n in range(1, int(header["ZNAXIS"]) + 1):
            side = int(header[f"ZNAXIS{n}"])
            tile = int(header.get(f"ZTILE{n}", side if n == 1 else 1))
            needed *= side - (side - 1) // tile * tile
        file.seek(start + row * (rows - 1))
        count, at = struct.unpack(">2I", file.read(8))
        file.seek(start + int(header.get("THEAP", row * rows)) + at)
        # An empty one is stored in another column, in another way.
        return not count or len(zlib.decompressobj(31).decompress(file.read(count), needed + 1)) == needed
    except (KeyError, ValueError, ZeroDivisionError, struct.error, zlib.error):
        return False


def _tiles(header: Mapping[str, str]) -> int:
    """Return how many rows the table of a compressed picture needs: one for each tile."""
    tiles = 1
    for n in range(1, int(header["ZNAXIS"]) + 1):
        side = int(header[f"ZNAXIS{n}"])
        # Unless it is said, a tile is a row.
        tile = int(header.get(f"ZTILE{n}", side if n == 1 else 1))
        if not 0 < tile <= side:
            return 0
        tiles *= -(-side // tile)
    return tiles
