"""Which damaged files are whole files of another geometry: the only ones whose frames may differ from the original's.

A camera of other sides or another colour filter could have written such a file byte for byte, so no look at the file
alone can tell. Strictly that means: its header says the very sides and colours of the frame, nothing else in it
contradicts them, and its samples, unpacked here with other means than the product's, are exactly as many as they need.

- JPEG: as many coded blocks as the original has, so the sides differ within the last blocks, or the rows of blocks are
  as long as the columns were; where EXIF states the sides, only those two exchanged (a turned picture).
- PNG: the sum of the rows' lengths is that of the original, the filter bytes included.
- TIFF, DNG: all strips or tiles hold what the tags say (tiles may reach beyond the margin); the visible area and the
  default crop lie within; or another Bayer pattern is named, or a filter of four colours.
- FITS: sides of the same product, or that reach into what fills the last block; or another Bayer pattern is named,
  or none any more.
"""

from __future__ import annotations

import contextlib
import re
import struct
import zlib
from itertools import groupby

from fuzz_mutators import Entry, Mutant, entries, frame_header, kind_of, png_chunks
from fuzz_seeds import Seed

from hotpixd.intake import metadata

Geometry = tuple[str, int, int, str, int, str]

_BAYER = ("RGGB", "BGGR", "GRBG", "GBRG")


def another_whole_file(made: Mutant, geometry: Geometry, original: Geometry | None) -> bool:
    """Tell whether a damaged file is a whole one of the geometry that was read from it."""
    if original is None or geometry[0] != original[0] or geometry[4:] != original[4:]:
        return False
    match kind_of(made.content):
        case "JPEG":
            return geometry[3] == original[3] and any(_jpeg(made.content, seed, geometry) for seed in made.seeds)
        case "PNG":
            return geometry[3] == original[3] and _png(made.content, geometry)
        case "TIFF":
            return _tiff(made.content, geometry, original)
        case "FITS":
            return _fits(made.content, geometry, original)
    return False


def _jpeg(content: bytes, seed: Seed, geometry: Geometry) -> bool:
    blocks, sides = _blocks(content)
    about = metadata.from_bytes(content)
    stated = {about.width, about.height} - {None}
    return sides == geometry[1:3] and blocks == _blocks(seed.content)[0] and (len(stated) < 2 or stated == set(sides))


def _blocks(content: bytes) -> tuple[int, tuple[int, int]]:
    """Return how many blocks are coded at a time, in all, and the sides."""
    at = frame_header(content)
    if at is None:
        return 0, (0, 0)
    height, width, components = struct.unpack(">2HB", content[at + 5 : at + 10])
    sampling = [content[at + 11 + 3 * n] for n in range(components)]
    across, down = (8, 8) if components == 1 else (8 * max(s >> 4 for s in sampling), 8 * max(s & 15 for s in sampling))
    return -(-width // across) * -(-height // down), (width, height)


def _png(content: bytes, geometry: Geometry) -> bool:
    width, height, depth, colour, _, _, interlaced = struct.unpack(">2I5B", content[16:29])
    data = b"".join(content[at + 8 : at + 8 + size] for at, name, size in png_chunks(content) if name == b"IDAT")
    try:
        held = len(zlib.decompress(data))
    except zlib.error:
        return False
    row = 1 + width * {0: 1, 2: 3, 4: 2, 6: 4}[colour] * depth // 8
    return (width, height) == geometry[1:3] and not interlaced and held == row * height


def _tiff(content: bytes, geometry: Geometry, original: Geometry) -> bool:
    for _, found in groupby(entries(content), key=lambda entry: entry.directory):
        # No number has 64 bits but in BigTIFF.
        tags = {entry.tag: entry for entry in found if entry.kind != 16 or entry.big}
        if 256 not in tags or 257 not in tags:
            continue
        if 50706 not in tags and geometry[1:3] == original[1:3] and _colours_are_named(tags, geometry, original):
            # A camera's own raw format, of which no more is known.
            return True
        width, height = tags[256].values[0], tags[257].values[0]
        if 50829 in tags and len(tags[50829].values) != 4:
            continue
        top, left, bottom, right = tags[50829].values if 50829 in tags else (0, 0, height, width)
        origin = tags[50719].values if 50719 in tags else (0, 0)
        crop = tags[50720].values if 50720 in tags else (0, 0)
        if 50706 in tags and (len(origin), len(crop)) != (2, 2):
            continue
        if 50706 not in tags:
            origin = crop = (0, 0)
        # LibRaw begins a visible area where the pattern does.
        near = abs(right - left - geometry[1]) < 2 and abs(bottom - top - geometry[2]) < 2
        inside = bottom <= height and right <= width
        inside &= origin[0] + crop[0] <= right - left and origin[1] + crop[1] <= bottom - top
        if near and inside and _holds(content, tags, width, height) and _colours_are_named(tags, geometry, original):
            return True
    return False


def _holds(content: bytes, tags: dict[int, Entry], width: int, height: int) -> bool:
    def value(tag: int, otherwise: int) -> int:
        # A list where one number belongs is damage that readers pass over; depths are said for each colour.
        return tags[tag].values[0] if tag in tags and (tag == 258 or len(tags[tag].values) == 1) else otherwise

    samples, planes = value(277, 1), 1
    if value(284, 1) == 2:
        samples, planes = 1, samples
    tiled = 322 in tags
    across, down = (value(322, 0), value(323, 0)) if tiled else (width, min(value(278, height), height))
    count = -(-width // across) * -(-height // down) * planes
    starts, sizes = (tags[324].values, tags[325].values) if tiled else (tags[273].values, tags[279].values)
    if not count == len(starts) == len(sizes):
        return False
    row = -(-across * samples * value(258, 1) // 8)
    for index, (start, size) in enumerate(zip(starts, sizes, strict=True)):
        rows = down if tiled else min(down, height - index % -(-height // down) * down)
        needed = across * samples * rows if value(259, 1) == 7 else row * rows
        held = _unpacked(content[start : start + size], value(259, 1))
        if held < 0 < index < count - 1:
            # What it holds is damaged. The others tell the sides.
            continue
        if held != needed and not (value(259, 1) == 1 and held == needed + needed % 2):
            return False
    return True


def _unpacked(coded: bytes, compression: int) -> int:
    """Return how many bytes, of lossless JPEG how many samples, something unpacks to."""
    import imagecodecs

    try:
        match compression:
            case 1:
                return len(coded)
            case 5:
                return len(imagecodecs.lzw_decode(coded))
            case 7:
                # The header, where what follows is damaged.
                with contextlib.suppress(imagecodecs.LjpegError):
                    return int(imagecodecs.ljpeg_decode(coded).size)
                at = coded.index(b"\xff\xc3")
                height, width, components = struct.unpack(">2HB", coded[at + 5 : at + 10])
                return int(height * width * components)
            case 8 | 32946:
                return len(imagecodecs.zlib_decode(coded))
            case 32773:
                return len(imagecodecs.packbits_decode(coded))
    except (RuntimeError, ValueError, struct.error):  # imagecodecs raises the first
        pass
    return -1


def _colours_are_named(tags: dict[int, Entry], geometry: Geometry, original: Geometry) -> bool:
    if geometry[3] == original[3]:
        return True
    named = "".join("RGBCMYW"[value] for value in tags[33422].values if value < 7) if 33422 in tags else ""
    if len(set(named)) == 4:
        return len(set(geometry[3])) == 4
    return len(original[3]) == 4 and named in _BAYER and geometry[3] in _BAYER


def _fits(content: bytes, geometry: Geometry, original: Geometry) -> bool:
    def number(text: str, keyword: str, otherwise: int | None = None) -> int:
        found = re.search(rf"(?:^|\x00){keyword.ljust(8)}= +(-?\d+)[ \0]", text)
        if found is None and otherwise is None:
            raise KeyError(keyword)
        return otherwise if found is None else int(found[1])  # type: ignore[return-value]

    at, same = 0, geometry[3] == original[3]
    while at < len(content):
        end = at
        while content[end : end + 8].rstrip() != b"END":
            end += 80
            if end >= len(content):
                return False
        cards = [content[start : start + 80].decode("latin-1") for start in range(at, end, 80)]
        text = "\0".join(cards)
        named = any(card.startswith("BAYERPAT") and any(one in card for one in _BAYER) for card in cards)
        same |= named == (geometry[3] in _BAYER)
        try:
            sides = [number(text, f"NAXIS{n + 1}") for n in range(number(text, "NAXIS"))]
            size = abs(number(text, "BITPIX")) // 8 if sides else 0
            for side in sides:
                size *= side
            size += number(text, "PCOUNT", 0)
            if "ZIMAGE" in text:
                sides = [number(text, "ZNAXIS1"), number(text, "ZNAXIS2")]
        except KeyError:
            return False
        data = (end // 2880 + 1) * 2880
        at = -(-(data + size) // 2880) * 2880
        if data + size > len(content) or len(set(content[data + size : at])) > 1:
            return False
        if tuple(sides[:2]) == geometry[1:3]:
            grown = "ZIMAGE" not in text or sides[0] * sides[1] == original[1] * original[2]
            return same and grown and (at >= len(content) or content[at : at + 8] == b"XTENSION")
    return False
