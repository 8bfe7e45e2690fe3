"""Picture files of the kinds that cameras and camera programs write, for the tests of the intake."""

from __future__ import annotations

import io
import struct
from pathlib import Path

import numpy as np
import tifffile
from PIL import Image

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
