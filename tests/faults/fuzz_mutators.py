"""Damage to picture files: as disks and half copies do it, and as somebody does it who knows the formats.

Each mutator takes a whole file and a source of randomness and returns what is left of it, or None where it does not
apply. The same seed gives the same damage.
"""

from __future__ import annotations

import functools
import random
import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from fuzz_seeds import Seed

Mutator = Callable[[random.Random, bytes], bytes | None]

EXTREMES = (0, 1, 2, 3, 7, 8, 15, 16, 255, 256, 32767, 32768, 65535, 65536, 2**31 - 1, 2**31, 2**32 - 1)

_SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}

GEOMETRY_TAGS = (
    254, 256, 257, 258, 259, 262, 273, 277, 278, 279, 284, 317, 322, 323, 324, 325, 330, 339, 33421, 33422,
    50713, 50714, 50717, 50719, 50720, 50829,
)  # fmt: skip
"""Tags of TIFF and DNG that say where samples lie and how many there are."""


@dataclass(frozen=True)
class Mutant:
    """A damaged file."""

    seeds: tuple[Seed, ...]
    """The whole file, or the two of a splice."""

    done: str
    """The names of what was done to it."""

    content: bytes


def mutants(form: str, seeds: list[Seed], count: int, first: int = 0) -> Iterator[Mutant]:
    """Yield damaged files of a format; the same numbers give the same files."""
    for number in range(first, first + count):
        yield mutant(form, seeds, number)


def mutant(form: str, seeds: list[Seed], number: int) -> Mutant:
    """Return one damaged file."""
    rng = random.Random(f"{form} {number}")
    if rng.random() < 0.04:
        one, other = rng.choice(seeds), rng.choice(seeds)
        cut, go_on = rng.randrange(len(one.content)), rng.randrange(len(other.content))
        return Mutant((one, other), "splice", one.content[:cut] + other.content[go_on:])
    seed = rng.choice(seeds)
    content, done = seed.content, []
    # Mostly one damage: two hide each other.
    for _ in range(rng.choice((1, 1, 1, 1, 2, 3))):
        for _ in range(20):
            mutator = rng.choice(_ANY if rng.random() < 0.4 else _BY_START.get(kind_of(content), _ANY))
            changed = mutator(rng, content)
            if changed is not None and changed != content:
                content = changed
                done.append(mutator.__name__.strip("_"))
                break
    return Mutant((seed,), "+".join(done), content)


def kind_of(content: bytes) -> str:
    """Return what a file begins like."""
    if content[:3] == b"\xff\xd8\xff":
        return "JPEG"
    if content[:8] == b"\x89PNG\r\n\x1a\n":
        return "PNG"
    if content[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        return "TIFF"
    return "FITS" if content[:6] == b"SIMPLE" else ""


# Of any file


def _flip_bytes(rng: random.Random, content: bytes) -> bytes | None:
    changed = bytearray(content)
    if not changed:
        return None
    # Half of them in the head, which says what the rest means.
    within = len(changed) if rng.random() < 0.5 else min(len(changed), 700)
    for _ in range(rng.choice((1, 1, 2, 4, 16, 64))):
        changed[rng.randrange(within)] = rng.choice((rng.randrange(256), 0, 255, 0x7F, 0x80))
    return bytes(changed)


def _flip_bit(rng: random.Random, content: bytes) -> bytes | None:
    changed = bytearray(content)
    if not changed:
        return None
    changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def _put_extreme(rng: random.Random, content: bytes) -> bytes | None:
    size, order = rng.choice((1, 2, 4, 8)), rng.choice(("little", "big"))
    if len(content) < 16:
        return None
    at = rng.randrange(min(len(content), 2000) - 8)
    value = rng.choice(EXTREMES) % (1 << 8 * size)
    return content[:at] + value.to_bytes(size, order) + content[at + size :]


def _cut_end(rng: random.Random, content: bytes) -> bytes | None:
    return content[: rng.choice((rng.randrange(len(content) + 1), len(content) - rng.randrange(1, 64)))]


def _cut_at_boundary(rng: random.Random, content: bytes) -> bytes | None:
    found = _boundaries(content)
    return content[: rng.choice(found) + rng.choice((-1, 0, 0, 1))] if found else None


def _zero_tail(rng: random.Random, content: bytes) -> bytes | None:
    """Leave what a copy leaves that made room for the whole file and ended early."""
    at = rng.choice([*_boundaries(content), rng.randrange(len(content) + 1), len(content) * 3 // 4])
    at = rng.choice((at, at // 4096 * 4096, at // 512 * 512))
    return content[:at].ljust(len(content), b"\0")


def _zero_block(rng: random.Random, content: bytes) -> bytes | None:
    size = rng.choice((16, 512, 4096))
    at = rng.randrange(len(content) + 1)
    return (content[:at] + b"\0" * size + content[at + size :])[: len(content)]


def _cut_block(rng: random.Random, content: bytes) -> bytes | None:
    at, size = rng.randrange(len(content) + 1), rng.choice((1, 2, 16, 512, 4096))
    return content[:at] + content[at + size :]


def _double_block(rng: random.Random, content: bytes) -> bytes | None:
    at, size = rng.randrange(len(content) + 1), rng.choice((1, 2, 16, 512, 4096))
    return content[: at + size] + content[at:]


def _append(rng: random.Random, content: bytes) -> bytes | None:
    return content + rng.choice((b"\0" * 512, content, rng.randbytes(100)))


def _boundaries(content: bytes) -> list[int]:
    """Return where parts of a file begin and end."""
    kind = kind_of(content)
    if kind == "JPEG":
        return [at for at, _, _ in _segments(content)]
    if kind == "PNG":
        return [at for at, _, _ in png_chunks(content)]
    if kind == "TIFF":
        found = list(entries(content))
        ends = [entry.at for entry in found] + [entry.value_at for entry in found]
        starts = [v for entry in found if entry.tag in (273, 324) for v in entry.values]
        return [at for at in ends + starts if 0 < at <= len(content)]
    return list(range(80, len(content), 2880)) + list(range(2880, len(content), 2880)) if kind == "FITS" else []


# JPEG


def _segments(content: bytes) -> Iterator[tuple[int, int, int]]:
    """Yield (position, marker, length of the payload) up to the first scan."""
    at = 2
    while at + 4 <= len(content) and content[at] == 0xFF:
        marker, size = content[at + 1], int.from_bytes(content[at + 2 : at + 4], "big")
        yield at, marker, size - 2
        if marker == 0xDA:
            return
        at += 2 + max(size, 2)


def frame_header(content: bytes) -> int | None:
    """Return where a JPEG says its sides."""
    return next((at for at, marker, _ in _segments(content) if marker in (0xC0, 0xC1, 0xC2)), None)


def _jpeg_size(rng: random.Random, content: bytes) -> bytes | None:
    at = frame_header(content)
    if at is None or at + 9 > len(content):
        return None
    height, width = struct.unpack(">2H", content[at + 5 : at + 9])
    if rng.random() < 0.3:
        width, height = height, width
    else:
        height, width = _other(rng, height, 65535), rng.choice((width, _other(rng, width, 65535)))
    return content[: at + 5] + struct.pack(">2H", height, width) + content[at + 9 :]


def _jpeg_components(rng: random.Random, content: bytes) -> bytes | None:
    at = frame_header(content)
    if at is None or at + 10 >= len(content):
        return None
    changed = bytearray(content)
    where = rng.choice((at + 1, at + 4, at + 9, at + 10, at + 11, at + 12, min(at + 14, len(content) - 1)))
    changed[where] = rng.choice((1, 2, 3, 4, 0x11, 0x12, 0x21, 0x22, 0x41, 0, 12, 0xC0, 0xC1, 0xC2, 0xC3))
    return bytes(changed)


def _jpeg_segment(rng: random.Random, content: bytes) -> bytes | None:
    """Remove, double or lengthen a segment."""
    found = list(_segments(content))
    if not found:
        return None
    at, _, size = rng.choice(found)
    match rng.randrange(4):
        case 0:
            return content[:at] + content[at + size + 4 :]
        case 1:
            return content[:at] + content[at : at + size + 4] + content[at:]
        case 2:
            return content[: at + 2] + rng.choice(EXTREMES[:13]).to_bytes(4, "big")[2:] + content[at + 4 :]
    # A marker of another kind in its place.
    return content[: at + 1] + rng.choice((b"\xd8", b"\xd9", b"\xc4", b"\xda", b"\xdd", b"\xcc")) + content[at + 2 :]


def _jpeg_scan(rng: random.Random, content: bytes) -> bytes | None:
    """Damage what is coded: cut some of it out, or put a marker there."""
    start = content.find(b"\xff\xda")
    if start < 0 or start + 32 > len(content):
        return None
    at, size = rng.randrange(start + 14, len(content)), rng.choice((1, 8, 100, 1000))
    match rng.randrange(4):
        case 0:
            return content[:at] + content[at + size :]
        case 1:
            return content[:at] + content[at : at + size] + content[at:]
        case 2:
            return (
                content[:at] + rng.choice((b"\xff\xd9", b"\xff\xd0", b"\xff\xda", b"\xff\xdc\0\4\0\x20")) + content[at:]
            )
    return content[:at] + b"\xff\xd9"


# PNG


def png_chunks(content: bytes) -> Iterator[tuple[int, bytes, int]]:
    """Yield (position, name, length) of each chunk."""
    at = 8
    while at + 12 <= len(content):
        size = int.from_bytes(content[at : at + 4], "big")
        yield at, content[at + 4 : at + 8], size
        at += 12 + size


def _with_right_sum(content: bytes, at: int, size: int) -> bytes:
    sum_at = at + 8 + size
    return content[:sum_at] + struct.pack(">I", zlib.crc32(content[at + 4 : sum_at])) + content[sum_at + 4 :]


def _png_header(rng: random.Random, content: bytes) -> bytes | None:
    if content[12:16] != b"IHDR" or len(content) < 33:
        return None
    width, height, depth, colour, method, how, interlaced = struct.unpack(">2I5B", content[16:29])
    match rng.randrange(8):
        case 0:
            width = _other(rng, width)
        case 1:
            height = _other(rng, height)
        case 2:
            width, height = height, width
        case 3:
            # As many bytes, filter bytes included, in rows of another length.
            width, height = 2 * width + 1, height // 2
        case 4:
            depth = rng.choice((1, 2, 4, 8, 16))
        case 5:
            colour = rng.choice((0, 2, 3, 4, 6))
        case 6:
            interlaced ^= 1
        case _:
            method, how = rng.choice(((0, 1), (1, 0), (0, 64)))
    packed = struct.pack(">2I5B", width, height, depth, colour, method, how, interlaced)
    return _with_right_sum(content[:16] + packed + content[29:], 8, 13)


def _png_chunk(rng: random.Random, content: bytes) -> bytes | None:
    """Remove, double, move or spoil a chunk, its checksum made right again."""
    found = list(png_chunks(content))
    if not found:
        return None
    at, name, size = rng.choice(found)
    end = at + 12 + size
    match rng.randrange(4):
        case 0:
            return content[:at] + content[end:]
        case 1:
            return content[:end] + content[at:]
        case 2 if 0 < size < len(content):
            changed = bytearray(content)
            where = at + 8 + rng.randrange(size)
            if where < len(changed):
                changed[where] ^= 1 << rng.randrange(8)
            return _with_right_sum(bytes(changed), at, size)
    return content[: at + 4] + rng.choice((b"IDAT", b"IEND", b"PLTE", b"tRNS", b"eXIf", name[::-1])) + content[at + 8 :]


def _png_stream(rng: random.Random, content: bytes) -> bytes | None:
    """Put other samples into a whole stream: fewer, more, or a bomb."""
    if content[12:16] != b"IHDR":
        return None
    data = b"".join(content[at + 8 : at + 8 + size] for at, name, size in png_chunks(content) if name == b"IDAT")
    try:
        inside = zlib.decompress(data)
    except zlib.error:
        return None
    match rng.randrange(4):
        case 0:
            inside = inside[: rng.randrange(len(inside) + 1)]
        case 1:
            inside += inside[: rng.choice((1, 161, 1000))]
        case 2:
            inside = inside[:-161]
        case _:
            inside += b"\0" * 50_000_000
    packed = zlib.compress(inside, 1)
    chunks = [content[8:33], struct.pack(">I", len(packed)) + b"IDAT" + packed + b"\0\0\0\0"]
    chunks[1] = _with_right_sum(chunks[1], 0, len(packed))
    return content[:8] + b"".join(chunks) + struct.pack(">I", 0) + b"IEND" + struct.pack(">I", zlib.crc32(b"IEND"))


# TIFF and DNG


@dataclass(frozen=True)
class Entry:
    """An entry of a TIFF directory."""

    directory: int
    """Where its directory begins."""
    tag: int
    kind: int
    count: int
    at: int
    """Where the entry begins."""
    value_at: int
    """Where its values are."""
    order: str
    big: bool
    values: tuple[int, ...]


def entries(content: bytes) -> Iterator[Entry]:
    """Go through the entries of all directories that lead from the head."""
    order = "<" if content[:2] == b"II" else ">"
    big = content[2:4] in (b"+\0", b"\0+")
    try:
        (first,) = struct.unpack_from(order + ("Q" if big else "I"), content, 8 if big else 4)
        todo, seen = [first], set()
        while todo and len(seen) < 20:
            start = todo.pop()
            if start in seen or not start:
                continue
            seen.add(start)
            (number,) = struct.unpack_from(order + ("Q" if big else "H"), content, start)
            at = start + (8 if big else 2)
            for _ in range(min(number, 200)):
                tag, kind = struct.unpack_from(order + "2H", content, at)
                (count,) = struct.unpack_from(order + ("Q" if big else "I"), content, at + 4)
                field, room = (at + 12, 8) if big else (at + 8, 4)
                size = _SIZES.get(kind, 1) * count
                value_at = field
                if size > room:
                    (value_at,) = struct.unpack_from(order + ("Q" if big else "I"), content, field)
                unit = {1: "B", 2: "B", 3: "H", 4: "I", 7: "B", 16: "Q"}.get(kind)
                values: tuple[int, ...] = ()
                if unit and size < 4000 and value_at + size <= len(content):
                    values = struct.unpack_from(f"{order}{count}{unit}", content, value_at)
                yield Entry(start, tag, kind, count, at, value_at, order, big, values)
                if tag in (330, 34665):
                    todo += values
                at += 20 if big else 12
            todo += struct.unpack_from(order + ("Q" if big else "I"), content, at)
    except struct.error:
        return


def _tiff_value(rng: random.Random, content: bytes) -> bytes | None:
    """Change a number that says where samples lie or how many there are."""
    found = [e for e in entries(content) if e.tag in GEOMETRY_TAGS and e.values]
    if not found:
        return None
    entry = rng.choice(found)
    unit = {1: "B", 2: "B", 3: "H", 4: "I", 7: "B", 16: "Q"}[entry.kind]
    size = _SIZES[entry.kind]
    values = list(entry.values)
    index = rng.randrange(len(values))
    limit = (1 << 8 * size) - 1
    if entry.tag in (273, 324) and rng.random() < 0.5:
        values[index] = min(max(values[index] + rng.choice((-100, -32, -2, -1, 1, 2, 64)), 0), limit)
    elif entry.tag == 33422:
        rng.shuffle(values)
        if rng.random() < 0.3:
            values[0] = rng.choice((0, 1, 2, 3, 6, 200))
    elif entry.tag in (258, 259, 262, 277):
        values = [rng.choice((1, 2, 3, 4, 5, 7, 8, 10, 12, 14, 16, 32, 34892, 32803, 32773, 34713)) & limit] * len(
            values
        )
    else:
        values[index] = _other(rng, values[index], limit)
    packed = struct.pack(f"{entry.order}{len(values)}{unit}", *values)
    return content[: entry.value_at] + packed + content[entry.value_at + len(packed) :]


def _tiff_sides(rng: random.Random, content: bytes) -> bytes | None:
    """Give a picture of as many samples other sides."""
    found = [e for e in entries(content) if e.values]
    wide = [e for e in found if e.tag == 256]
    if not wide:
        return None
    width = rng.choice(wide)
    height = next((e for e in found if e.tag == 257 and abs(e.at - width.at) < 60), None)
    if height is None:
        return None
    across, down = rng.choice(
        (
            (height.values[0], width.values[0]),
            (width.values[0] * 2, height.values[0] // 2),
            (width.values[0] // 2, height.values[0] * 2),
        )
    )
    for entry, value in ((width, across), (height, down)):
        size = _SIZES[entry.kind]
        # Doubled, a side may need more bytes than it has.
        packed = (value % (1 << 8 * size)).to_bytes(size, "little" if entry.order == "<" else "big")
        content = content[: entry.value_at] + packed + content[entry.value_at + size :]
    return content


def _tiff_entry(rng: random.Random, content: bytes) -> bytes | None:
    """Change the tag, type, count or offset of an entry."""
    found = list(entries(content))
    if not found:
        return None
    entry = rng.choice(found)
    big, order = entry.big, "little" if entry.order == "<" else "big"
    at, size, value = rng.choice(
        (
            (entry.at, 2, rng.choice(GEOMETRY_TAGS)),
            (entry.at + 2, 2, rng.choice((0, 1, 2, 3, 4, 5, 7, 11, 12, 13, 16, 99))),
            (entry.at + 4, 8 if big else 4, rng.choice((*EXTREMES, entry.count + 1, max(entry.count - 1, 0)))),
            (entry.at + (12 if big else 8), 8 if big else 4, rng.choice((*EXTREMES, len(content), entry.at))),
        )
    )
    return content[:at] + value.to_bytes(size, order) + content[at + size :]


def _tiff_chain(rng: random.Random, content: bytes) -> bytes | None:
    """Lead a directory's successor, or its subdirectory, somewhere else: to itself, or into nothing."""
    found = list(entries(content))
    if not found:
        return None
    entry = found[-1]
    step, size = (20, 8) if entry.big else (12, 4)
    order = "little" if entry.order == "<" else "big"
    starts = [e.value_at for e in found if e.tag in (330, 34665)]
    first_at = 8 if entry.big else 4
    at = rng.choice([entry.at + step, first_at, *starts])
    target = rng.choice(
        (8, 16, found[0].at - (8 if entry.big else 2), entry.at, len(content) - 4, rng.choice(EXTREMES))
    )
    return content[:at] + max(target, 0).to_bytes(size, order) + content[at + size :]


def _tiff_bomb(rng: random.Random, content: bytes) -> bytes | None:
    """Put a stream behind the file that inflates to far more than its strip, and lead the strip there."""
    found = {e.tag: e for e in entries(content) if e.values}
    if 273 not in found or 279 not in found or 259 not in found or found[259].values[0] not in (8, 32946):
        return None
    bomb = _bomb()
    for tag, value in ((273, len(content)), (279, len(bomb))):
        entry = found[tag]
        size = _SIZES[entry.kind]
        packed = (value % (1 << 8 * size)).to_bytes(size, "little" if entry.order == "<" else "big")
        content = content[: entry.value_at] + packed + content[entry.value_at + size :]
    return content + bomb


@functools.cache
def _bomb() -> bytes:
    return zlib.compress(b"\0" * 1_500_000_000, 1)


# FITS


def _fits_card(rng: random.Random, content: bytes) -> bytes | None:
    """Change a number of a header, or what the header says of the kind of picture."""
    cards = [
        at
        for at in range(0, len(content) - 79, 80)
        if content[at + 8 : at + 10] == b"= " and content[at : at + 8].isascii()
    ]
    wanted = (b"NAXIS", b"BITPI", b"BZERO", b"BSCAL", b"ZNAXI", b"ZBITP", b"ZTILE", b"PCOUN", b"GCOUN", b"TFORM",
              b"THEAP", b"TFIEL", b"ZCMPT", b"ROWOR", b"BAYER", b"SIMPL", b"XTENS", b"EXTEN")  # fmt: skip
    chosen = [at for at in cards if content[at : at + 5] in wanted]
    if not chosen:
        return None
    at = rng.choice(chosen)
    text = content[at + 10 : at + 30].split(b"/")[0].strip()
    name = content[at : at + 5]
    if name in (b"BITPI", b"ZBITP"):
        value = str(rng.choice((8, 16, 32, 64, -32, -64, 7, 0))).encode()
    elif text.lstrip(b"-").isdigit():
        value = str(rng.choice((_other(rng, int(text)), -1, rng.choice(EXTREMES)))).encode()
    else:
        value = rng.choice(
            (b"T", b"F", b"'GBRG'", b"'RICE_1'", b"'GZIP_1'", b"'1PB'", b"1.5", b"NaN", b"'HCOMPRESS_1'")
        )
    return content[: at + 10] + value.rjust(20) + content[at + 30 :]


def _fits_sides(rng: random.Random, content: bytes) -> bytes | None:
    """Give a picture of as many samples other sides."""
    for first, second in ((b"NAXIS1  =", b"NAXIS2  ="), (b"ZNAXIS1 =", b"ZNAXIS2 =")):
        one, two = content.find(first), content.find(second)
        if one < 0 or two < 0:
            continue
        try:
            across, down = int(content[one + 10 : one + 30]), int(content[two + 10 : two + 30])
        except ValueError:
            continue
        across, down = rng.choice(((down, across), (across * 2, down // 2), (across // 2, down * 2)))
        for at, value in ((one, across), (two, down)):
            content = content[: at + 10] + str(value).encode().rjust(20) + content[at + 30 :]
        return content
    return None


def _fits_blocks(rng: random.Random, content: bytes) -> bytes | None:
    """Cut or double whole blocks of 2880 bytes."""
    at = rng.randrange(len(content) // 2880 + 1) * 2880
    return rng.choice((content[:at] + content[at + 2880 :], content[: at + 2880] + content[at:], content[:at]))


def _other(rng: random.Random, value: int, limit: int = 2**32 - 1) -> int:
    """Return another number: near, a multiple or part, or an extreme one."""
    chosen = rng.choice(
        (value + 1, value - 1, value + 2, value - 2, value + 8, value - 8, value + 16, value - 16, value * 2,
         value // 2, value * 3 // 4, rng.choice(EXTREMES), rng.randrange(1, 300))
    )  # fmt: skip
    return min(max(chosen, 0), limit)


_ANY: list[Mutator] = [
    _flip_bytes,
    _flip_bit,
    _put_extreme,
    _cut_end,
    _cut_at_boundary,
    _zero_tail,
    _zero_block,
    _cut_block,
    _double_block,
    _append,
]
_BY_START: dict[str, list[Mutator]] = {
    "JPEG": [_jpeg_size, _jpeg_size, _jpeg_components, _jpeg_segment, _jpeg_scan],
    "PNG": [_png_header, _png_header, _png_chunk, _png_stream],
    "TIFF": [_tiff_value, _tiff_value, _tiff_value, _tiff_sides, _tiff_entry, _tiff_chain, _tiff_bomb],
    "FITS": [_fits_card, _fits_card, _fits_card, _fits_sides, _fits_blocks],
}
