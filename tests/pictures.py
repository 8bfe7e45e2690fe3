"""Picture files of the kinds that cameras and camera programs write, for the tests of the intake."""

from __future__ import annotations

import io
import os
import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import tifffile
from PIL import Image

SHARED = Path(os.environ.get("HOTPIXD_SHARED") or Path(__file__).resolve().parents[2] / "shared") / "data"
"""Real pictures and lists, which are no part of the project. Tests that need them are skipped where they are not."""

RGGB = (2, 2, bytes([0, 1, 1, 2]))
XTRANS = (6, 6, bytes("GBGGRGRGRBGBGBGGRGGRGGBGBGBRGRGRGGBG".translate({82: 0, 71: 1, 66: 2}), "latin-1"))

Tag = tuple[int, str, int, object, bool]


def mosaic(height: int = 64, width: int = 80, level: float = 900.0, noise: float = 30.0) -> np.ndarray:
    """Return uneven light on a 14-bit sensor."""
    rng = np.random.default_rng(5)
    scene = level * (1.0 + 0.5 * np.sin(np.arange(width) / 9.0)[None, :] * np.cos(np.arange(height) / 7.0)[:, None])
    return np.clip(rng.normal(scene + 256, noise), 0, 16383).astype(np.uint16)


def write_dng(
    path: Path,
    samples: np.ndarray,
    *,
    pattern: tuple[int, int, bytes] | None = RGGB,
    active_area: tuple[int, int, int, int] | None = None,
    crop: tuple[int, int, int, int] | None = None,
    dng: bool = True,
    black: int = 256,
    white: int = 16383,
    **described: object,
) -> None:
    """Write an uncompressed DNG; without a pattern of a monochrome sensor, without `dng` a mere mosaic.

    Parameters
    ----------
    active_area : top, left, bottom, right
    crop : left, top, width, height of the default crop, within the active area
    """
    about = {"make": "Acme", "model": "Acme One", "serial": "0042", "exposure_s": 0.5, "iso": 800} | described
    unit = tuple(v for one in (1, 0, 0, 0, 1, 0, 0, 0, 1) for v in (one, 1))
    tags: list[Tag] = [
        (271, "s", 0, about["make"], True),
        (272, "s", 0, about["model"], True),
        (306, "s", 0, "2026:03:04 05:06:07", True),
        (33434, "2I", 1, (int(about["exposure_s"] * 1000), 1000), True),  # type: ignore[operator,call-overload]
        (34855, "H", 1, about["iso"], True),
        (50714, "I", 1, black, True),
        (50717, "I", 1, white, True),
    ]
    if pattern is not None:
        rows, cols, colours = pattern
        tags += [(33421, "H", 2, (rows, cols), True), (33422, "B", rows * cols, colours, True)]
    if dng:
        tags += [
            (50706, "B", 4, bytes([1, 4, 0, 0]), True),
            (50707, "B", 4, bytes([1, 1, 0, 0]), True),
            (50708, "s", 0, f"{about['make']} {about['model']}", True),
            (50735, "s", 0, about["serial"], True),
        ]
    if dng and pattern is not None:
        tags += [
            (50721, "2i", 9, unit, True),
            (50728, "2I", 3, (1, 2, 1, 1, 1, 2), True),
            (50778, "H", 1, 21, True),
        ]
    if active_area is not None:
        tags.append((50829, "I", 4, active_area, True))
    if crop is not None:
        tags += [(50719, "I", 2, crop[:2], True), (50720, "I", 2, crop[2:], True)]
    photometric = 34892 if samples.ndim == 3 else 32803 if pattern is not None else 1
    tifffile.imwrite(path, samples, photometric=photometric, extratags=tags, compression=None, metadata=None)
    if photometric == 1:
        # tifffile takes linear raw for three colours; one is what monochrome cameras write.
        with tifffile.TiffFile(path, mode="r+") as written:
            written.pages.first.tags["PhotometricInterpretation"].overwrite(34892)


def exif(entries: dict[int, object], ifd0: dict[int, object] | None = None) -> bytes:
    """Return an Exif block as Pillow writes it."""
    block = Image.Exif()
    for tag, value in (ifd0 or {}).items():
        block[tag] = value
    block.get_ifd(0x8769).update(entries)
    return block.tobytes()


def jpeg(samples: np.ndarray, **options: object) -> bytes:
    """Return a JPEG file."""
    out = io.BytesIO()
    Image.fromarray(samples).save(out, "JPEG", quality=92, **options)
    return out.getvalue()


def colour(height: int = 64, width: int = 80) -> np.ndarray:
    """Return a bright 8-bit colour picture."""
    rng = np.random.default_rng(3)
    return rng.integers(60, 220, (height, width, 3), dtype=np.uint8)


def tiff_ifd(entries: list[tuple[int, int, int, bytes]], start: int, order: str = "<", following: int = 0) -> bytes:
    """Return a TIFF directory that lies at `start`: (tag, type, count, value), long values behind it."""
    head = struct.pack(order + "H", len(entries))
    body, tail = b"", b""
    data_at = start + 2 + 12 * len(entries) + 4
    for tag, kind, count, value in entries:
        if len(value) > 4:
            field = struct.pack(order + "I", data_at + len(tail))
            tail += value + b"\0" * (len(value) % 2)
        else:
            field = value.ljust(4, b"\0")
        body += struct.pack(order + "HHI", tag, kind, count) + field
    return head + body + struct.pack(order + "I", following) + tail


FLAT = (bytes((0, 0, 0, 14, 3, *[0] * 11)), bytes(range(17)))
"""A Huffman table of short codes, 4 and 5 bits: (codes of each length, categories in the order of their codes)."""
SKEWED = (bytes([1] * 16), bytes((7, 6, 8, 5, 9, 4, 10, 3, 11, 2, 12, 1, 13, 0, 14, 15)))
"""One of codes of 1 to 16 bits."""


def lossless_jpeg(
    samples: np.ndarray,
    components: int = 1,
    predictor: int = 1,
    bits: int = 14,
    tables: Sequence[tuple[bytes, bytes]] = (FLAT,),
) -> bytes:
    """Encode (rows, width) samples as ITU-T T.81, Annex H, has it; component i has table i, or the last one."""
    rows, width = samples.shape
    numbers = [min(i, len(tables) - 1) for i in range(components)]
    codes = []
    for counts, categories in tables:
        code, of = 0, {}
        remaining = list(categories)
        for length, count in enumerate(counts, 1):
            for _ in range(count):
                of[remaining.pop(0)] = format(code, f"0{length}b")
                code += 1
            code <<= 1
        codes.append(of)
    written = []
    s = samples.astype(int)
    for y in range(rows):
        for x in range(width):
            if x < components:
                foretold = s[y - 1, x] if y else 1 << (bits - 1)
            else:
                a = s[y, x - components]
                b, c = (s[y - 1, x], s[y - 1, x - components]) if y else (0, 0)
                ways = (a, b, c, a + b - c, a + ((b - c) >> 1), b + ((a - c) >> 1), (a + b) >> 1)
                foretold = ways[predictor - 1] if y else a
            difference = int(s[y, x] - foretold)
            category = abs(difference).bit_length()
            written.append(codes[numbers[x % components]][category])
            if category:
                value = difference if difference > 0 else difference + (1 << category) - 1
                written.append(format(value, f"0{category}b"))
    stream = "".join(written)
    stream += "1" * (-len(stream) % 8)
    scan = int(stream, 2).to_bytes(len(stream) // 8, "big").replace(b"\xff", b"\xff\0")

    def segment(marker: int, content: bytes) -> bytes:
        return struct.pack(">BBH", 0xFF, marker, len(content) + 2) + content

    frame = struct.pack(">BHHB", bits, rows, width // components, components)
    frame += b"".join(bytes((i, 0x11, 0)) for i in range(components))
    start = bytes((components, *(v for i in range(components) for v in (i, numbers[i] << 4)), predictor, 0, 0))
    huffman = b"".join(segment(0xC4, bytes((i,)) + b"".join(table)) for i, table in enumerate(tables))
    return b"\xff\xd8" + segment(0xC3, frame) + huffman + segment(0xDA, start) + scan + b"\xff\xd9"
