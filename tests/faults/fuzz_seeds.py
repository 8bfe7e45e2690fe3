"""Whole picture files to damage: one folder's worth for each format, small, so that thousands can be decoded."""

from __future__ import annotations

import io
import struct
import tempfile
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
from PIL import Image

from pictures import RGGB, SHARED, XTRANS, colour, exif, jpeg, mosaic, tiff_ifd, write_dng

FORMATS = ("JPEG", "PNG", "TIFF", "DNG", "FITS", "real")


@dataclass(frozen=True)
class Seed:
    """A whole file."""

    name: str
    content: bytes


def seeds(form: str) -> list[Seed]:
    """Return the whole files of a format; none of "real" where the folder of real frames is absent."""
    return {"JPEG": _jpegs, "PNG": _pngs, "TIFF": _tiffs, "DNG": _dngs, "FITS": _fits, "real": _real}[form]()


def _jpegs() -> list[Seed]:
    # Smooth, so that most of what is coded differs little, as in photographs.
    scene = _scene()
    body = {0x010F: "Acme", 0x0110: "Acme One"}
    sized = {0xA002: 160, 0xA003: 112, 0x829A: 0.25, 0xA431: "A77"}
    camera = exif(sized, body)
    return [
        Seed("camera", jpeg(scene, exif=camera)),
        Seed("camera progressive", jpeg(scene, exif=camera, progressive=True)),
        Seed("camera grey", jpeg(scene[:, :, 1], exif=exif(sized, body))),
        Seed("camera 4:4:4", jpeg(scene, exif=camera, subsampling=0)),
        Seed("camera restart", jpeg(scene, exif=camera, restart_marker_rows=1)),
        Seed("plain", jpeg(scene)),
        Seed("plain progressive grey", jpeg(scene[:, :, 1], progressive=True)),
    ]


def _pngs() -> list[Seed]:
    deep = mosaic()
    about = exif({0x829A: 0.5, 0xA431: "P5"}, {0x010F: "Acme", 0x0110: "Acme Two"})
    return [
        Seed("grey 16", _saved(deep, "PNG")),
        Seed("grey 8", _saved((deep >> 4).astype(np.uint8), "PNG")),
        Seed("RGB", _saved(colour(), "PNG", exif=about)),
        Seed("RGBA", _saved(np.dstack([colour(), np.full((64, 80), 9, np.uint8)]), "PNG")),
        Seed("stored", _saved(deep, "PNG", compress_level=0)),
        Seed("small parts", _in_small_parts(_saved(deep, "PNG"))),
    ]


def _tiffs() -> list[Seed]:
    deep = mosaic(96, 112)
    shallow = (deep >> 4).astype(np.uint8)
    about = [(271, "s", 0, "Acme", True), (272, "s", 0, "Acme Three", True), (42033, "s", 0, "T9", True)]
    plain = {"extratags": about, "metadata": None}
    made = [
        ("strip", deep, {}),
        ("strips", deep, {"rowsperstrip": 10}),
        ("8 bit", shallow, {"rowsperstrip": 16}),
        ("big-endian", deep, {"byteorder": ">"}),
        ("tiles", deep, {"tile": (32, 48)}),
        ("BigTIFF", deep, {"bigtiff": True, "rowsperstrip": 40}),
        ("deflate", deep, {"compression": "zlib", "rowsperstrip": 20}),
        ("deflate predictor", deep, {"compression": "zlib", "predictor": True}),
        ("deflate tiles", deep, {"compression": "zlib", "tile": (32, 32)}),
        ("packbits", shallow, {"compression": "packbits", "rowsperstrip": 32}),
        ("LZW", deep, {"compression": "lzw", "rowsperstrip": 24}),
        ("RGB", colour(), {"photometric": "rgb"}),
        ("RGB planes", np.ascontiguousarray(np.moveaxis(colour(), -1, 0)), {"photometric": "rgb", "planarconfig": 2}),
    ]
    found = []
    for name, samples, options in made:
        out = io.BytesIO()
        tifffile.imwrite(out, samples, **plain, **options)
        found.append(Seed(name, out.getvalue()))
    found.append(_written("mosaic", lambda path: write_dng(path, deep, dng=False, make="", model="")))
    return found


def _dngs() -> list[Seed]:
    deep = mosaic(96, 112)
    return [
        _written("uncompressed", lambda path: write_dng(path, deep)),
        _written("X-Trans", lambda path: write_dng(path, deep, pattern=XTRANS)),
        _written("monochrome", lambda path: write_dng(path, deep, pattern=None)),
        _written("margins", lambda path: write_dng(path, deep, active_area=(4, 8, 92, 108))),
        _written("cropped", lambda path: write_dng(path, deep, active_area=(4, 8, 92, 108), crop=(2, 2, 96, 84))),
        _written("lossless JPEG", lambda path: write_lossless_dng(path, deep)),
        _written("lossless JPEG tiles", lambda path: write_lossless_dng(path, deep, tile=(48, 64))),
        _written("packed 12 bit", lambda path: write_packed_dng(path, deep >> 2)),
        _written("behind a preview", lambda path: write_camera_dng(path, deep)),
    ]


def _fits() -> list[Seed]:
    from astropy.io import fits

    def stored(unit: object) -> bytes:
        out = io.BytesIO()
        units = [unit] if isinstance(unit, fits.PrimaryHDU) else [fits.PrimaryHDU(), unit]
        fits.HDUList(units).writeto(out)
        return out.getvalue()

    header = fits.Header([("INSTRUME", "ZWO ASI533MM"), ("EXPTIME", 30.0), ("IMAGETYP", "Light Frame")])
    mosaic_header = fits.Header([*header.cards, ("BAYERPAT", "RGGB"), ("ROWORDER", "TOP-DOWN")])
    deep = mosaic()
    planes = np.ascontiguousarray(np.moveaxis(colour(), -1, 0))
    return [
        Seed("16 bit", stored(fits.PrimaryHDU(deep, header))),
        Seed("mosaic", stored(fits.PrimaryHDU(deep, mosaic_header))),
        Seed("8 bit", stored(fits.PrimaryHDU((deep >> 4).astype(np.uint8), header))),
        Seed("32 bit", stored(fits.PrimaryHDU(deep.astype(np.int32), header))),
        Seed("float", stored(fits.PrimaryHDU(deep.astype(np.float32), header))),
        Seed("planes", stored(fits.PrimaryHDU(planes, header))),
        Seed("Rice", stored(fits.CompImageHDU(deep, header))),
        Seed("gzip", stored(fits.CompImageHDU(deep, header, compression_type="GZIP_1", tile_shape=(16, 80)))),
    ]


def _real() -> list[Seed]:
    wanted = (
        "raw_misc/ok/*",
        "flea3_d1_bayer/darks/*2000ms*0003.tif",
        "flea3_d1_dng_derived/darks/*2000ms*0003.dng",
        "tetra3_bfs_jpeg/*Alt40_Azi45*.jpg",
        "exif_zoo_jpeg/Issue_211.jpg",
        "emva_ccd12/d_s_000_snap_000.png",
    )
    return [Seed(path.name, path.read_bytes()) for one in wanted for path in sorted(SHARED.glob(one))]


def write_lossless_dng(
    path: Path,
    samples: np.ndarray,
    tile: tuple[int, int] | None = None,
    encode: Callable[[np.ndarray], bytes] | None = None,
    **more: Any,
) -> None:
    """Write a DNG compressed with lossless JPEG, as cameras and Adobe's converter do."""
    import imagecodecs

    encode = encode or (lambda part: imagecodecs.ljpeg_encode(np.ascontiguousarray(part), bitspersample=14))
    height, width = samples.shape
    rows, cols = tile or (height, width)
    coded = []
    for top in range(0, height, rows):
        for left in range(0, width, cols):
            part = samples[top : top + rows, left : left + cols]
            part = np.pad(part, ((0, rows - part.shape[0]), (0, cols - part.shape[1])), "edge")
            coded.append(encode(part))
    _write_raw_tiff(path, samples.shape, 16, 7, coded, tile, **more)


def write_packed_dng(path: Path, samples: np.ndarray) -> None:
    """Write an uncompressed DNG with 12 bit per sample, rows without gaps."""
    bits = np.unpackbits(samples.astype(">u2").view(np.uint8).reshape(*samples.shape, 2), axis=2)[:, :, 4:]
    _write_raw_tiff(path, samples.shape, 12, 1, [np.packbits(bits.reshape(samples.shape[0], -1), axis=1).tobytes()])


def write_camera_dng(path: Path, samples: np.ndarray) -> None:
    """Write a DNG as cameras do: a preview first, the raw samples in a directory of its own, with a default crop."""
    rows, cols = samples.shape
    crop = (2, 2, cols - 4, rows - 4)
    _write_raw_tiff(path, samples.shape, 16, 1, [samples.astype("<u2").tobytes()], preview=True, crop=crop)


def _write_raw_tiff(
    path: Path,
    shape: tuple[int, int],
    bits: int,
    compression: int,
    parts: list[bytes],
    tile: tuple[int, int] | None = None,
    *,
    preview: bool = False,
    crop: tuple[int, int, int, int] | None = None,
    also: Mapping[int, tuple[int, bytes]] | None = None,
) -> None:
    height, width = shape
    unit = struct.pack("<18i", *(v for one in (1, 0, 0, 0, 1, 0, 0, 0, 1) for v in (one, 1)))
    about = {
        271: (2, b"Acme\0"),
        272: (2, b"Acme Four\0"),
        306: (2, b"2026:03:04 05:06:07\0"),
        33434: (5, struct.pack("<2I", 1, 2)),
        34855: (3, struct.pack("<H", 800)),
        50706: (1, bytes([1, 4, 0, 0])),
        50708: (2, b"Acme Four\0"),
        50721: (10, unit),
        50728: (5, struct.pack("<6I", 1, 2, 1, 1, 1, 2)),
        50735: (2, b"0042\0"),
        50778: (3, struct.pack("<H", 21)),
        **(also or {}),
    }
    raw = {
        254: (4, struct.pack("<I", 0)),
        256: (4, struct.pack("<I", width)),
        257: (4, struct.pack("<I", height)),
        258: (3, struct.pack("<H", bits)),
        259: (3, struct.pack("<H", compression)),
        262: (3, struct.pack("<H", 32803)),
        277: (3, struct.pack("<H", 1)),
        284: (3, struct.pack("<H", 1)),
        33421: (3, struct.pack("<2H", 2, 2)),
        33422: (1, bytes(RGGB[2])),
        50714: (4, struct.pack("<I", 64)),
        50717: (4, struct.pack("<I", (1 << min(bits, 14)) - 1)),
    }
    where, length = (324, 325) if tile else (273, 279)
    if tile:
        raw |= {323: (4, struct.pack("<I", tile[0])), 322: (4, struct.pack("<I", tile[1]))}
    else:
        raw[278] = (4, struct.pack("<I", height))
    if crop is not None:
        left, top, across, down = crop
        raw |= {50719: (4, struct.pack("<2I", left, top)), 50720: (4, struct.pack("<2I", across, down))}
    thumbnail = jpeg(colour(32, 48))
    first = {
        254: (4, struct.pack("<I", 1)),
        256: (4, struct.pack("<I", 48)),
        257: (4, struct.pack("<I", 32)),
        258: (3, struct.pack("<3H", 8, 8, 8)),
        259: (3, struct.pack("<H", 7)),
        262: (3, struct.pack("<H", 6)),
        277: (3, struct.pack("<H", 3)),
        278: (4, struct.pack("<I", 32)),
    }
    # Offsets are known once the lengths are: lay out twice.
    at = {"parts": [0] * len(parts), "thumbnail": 0, "raw": 0}
    content = b""
    for _ in range(2):
        raw[where] = (4, struct.pack(f"<{len(parts)}I", *at["parts"]))  # type: ignore[misc]
        raw[length] = (4, struct.pack(f"<{len(parts)}I", *map(len, parts)))
        first |= {
            273: (4, struct.pack("<I", at["thumbnail"])),
            279: (4, struct.pack("<I", len(thumbnail))),
            330: (4, struct.pack("<I", at["raw"])),
        }
        content = b"II*\0" + struct.pack("<I", 8)
        content += _directory(first | about if preview else raw | about, 8)
        if preview:
            at["raw"] = len(content)
            content += _directory(raw, len(content))
            at["thumbnail"] = len(content)
            content += thumbnail + b"\0" * (len(thumbnail) % 2)
        at["parts"] = []
        for part in parts:
            at["parts"].append(len(content))  # type: ignore[attr-defined]
            content += part + b"\0" * (len(part) % 2)
    path.write_bytes(content)


def _directory(entries: dict[int, tuple[int, bytes]], start: int) -> bytes:
    sizes = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 10: 8}
    listed = [(tag, kind, len(value) // sizes[kind], value) for tag, (kind, value) in sorted(entries.items())]
    return tiff_ifd(listed, start)


def _scene() -> np.ndarray:
    y, x = np.mgrid[0:112, 0:160]
    rng = np.random.default_rng(4)
    planes = [120 + 70 * np.sin(x / (11.0 + 3 * k)) * np.cos(y / (9.0 + k)) for k in range(3)]
    return np.clip(np.dstack(planes) + rng.normal(0, 3, (112, 160, 3)), 1, 254).astype(np.uint8)


def _saved(samples: np.ndarray, form: str, **options: object) -> bytes:
    out = io.BytesIO()
    Image.fromarray(samples).save(out, form, **options)
    return out.getvalue()


def _in_small_parts(content: bytes) -> bytes:
    """Return a PNG whose samples lie in many chunks."""
    head, data, at = content[:33], b"", 33
    while content[at + 4 : at + 8] != b"IEND":
        size = int.from_bytes(content[at : at + 4], "big")
        if content[at + 4 : at + 8] == b"IDAT":
            data += content[at + 8 : at + 8 + size]
        at += 12 + size
    parts = [b"IDAT" + data[start : start + 500] for start in range(0, len(data), 500)] + [b"IEND"]
    return head + b"".join(struct.pack(">I", len(p) - 4) + p + struct.pack(">I", zlib.crc32(p)) for p in parts)


def _written(name: str, write: Callable[[Path], None]) -> Seed:
    with tempfile.TemporaryDirectory(prefix="hotpixd-seed-") as folder:
        path = Path(folder) / "seed"
        write(path)
        return Seed(name, path.read_bytes())
