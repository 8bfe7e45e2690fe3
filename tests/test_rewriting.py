"""Picture files in which a few samples change and everything else stays, byte by byte where the format allows it."""

from __future__ import annotations

import io
import struct
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image, PngImagePlugin

from hotpixd.core import huffman
from hotpixd.core.frame import Frame
from hotpixd.intake.decode import decode
from hotpixd.simulate import VirtualSensor
from hotpixd.views import rewriting
from hotpixd.views.rewriting import jpeg
from hotpixd.views.rewriting.errors import RewriteError

SENSOR = VirtualSensor(197, 131, hot=0, stuck=0, dead=0, seed=5)
PICTURE = SENSOR.rendered(SENSOR.shot(0, "moving", exposure_s=0.5, iso=100))
"""A scene, whose sides are no multiples of any block."""

KINDS: dict[str, dict[str, Any]] = {
    "4:4:4": {"subsampling": 0},
    "4:2:2": {"subsampling": 1},
    "4:2:0": {"subsampling": 2},
    "quality 30": {"quality": 30},
    "quality 100": {"quality": 100, "subsampling": 0},
    "own tables": {"optimize": True},
    "restarts": {"restart_marker_blocks": 3},
    "many restarts": {"restart_marker_blocks": 1, "subsampling": 2},
}


def encoded(pixels: NDArray[np.uint8], **options: Any) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "JPEG", **{"quality": 92, **options})
    return out.getvalue()


def pixels_of(data: bytes) -> NDArray[np.int64]:
    return np.asarray(Image.open(io.BytesIO(data))).astype(np.int64)


def holes(*places: tuple[int, int], reach: int = 2) -> NDArray[np.bool_]:
    """Return a mask of diamonds around some (x, y)."""
    y, x = np.mgrid[: PICTURE.shape[0], : PICTURE.shape[1]]
    return np.logical_or.reduce([abs(x - px) + abs(y - py) <= reach for px, py in places])


NOTHING = np.zeros(PICTURE.shape[:2], bool)
PLACES = ((40, 30), (100, 77), (0, 0), (196, 130), (143, 64))


def ruined(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return a picture with white spots."""
    spoilt = pixels.copy()
    spoilt[holes(*PLACES, reach=1)] = 255
    return spoilt


# JPEG


@pytest.mark.parametrize("kind", sorted(KINDS))
@pytest.mark.parametrize("grey", [False, True], ids=["colour", "grey"])
def test_a_scan_goes_through_decoding_and_encoding_unchanged(kind: str, grey: bool):
    """Every bit of it: then a block that is not touched is not changed."""
    if grey and "subsampling" in KINDS[kind] and kind != "4:2:0":
        pytest.skip("grey has nothing to subsample")
    data = encoded(PICTURE[..., 1] if grey else PICTURE, **KINDS[kind])
    parsed = jpeg._parse(data)
    blocks, end = jpeg._decoded(data, parsed)
    assert jpeg._spliced(data, parsed, blocks, end) == data
    assert blocks.any()


@pytest.mark.parametrize("kind", sorted(KINDS))
@pytest.mark.parametrize("grey", [False, True], ids=["colour", "grey"])
def test_only_blocks_with_a_defect_change_in_a_jpeg(kind: str, grey: bool):
    """And there the error against the picture without defects falls; repairing again changes nothing."""
    healthy = PICTURE[..., 1] if grey else PICTURE
    data, truth = encoded(ruined(healthy), **KINDS[kind]), pixels_of(encoded(healthy, **KINDS[kind]))
    mask = holes(*PLACES)
    done = jpeg.corrected(data, mask, NOTHING)
    before, after = pixels_of(data), pixels_of(done.data)
    if kind != "quality 30":
        assert np.abs(after - truth)[mask].sum() < 0.3 * np.abs(before - truth)[mask].sum()
    else:
        assert np.abs(after - truth)[mask].sum() < 0.5 * np.abs(before - truth)[mask].sum()

    parsed = jpeg._parse(data)
    old, _ = jpeg._decoded(data, parsed)
    new, _ = jpeg._decoded(done.data, jpeg._parse(done.data))
    changed = np.flatnonzero((old != new).any(axis=1))
    assert 0 < len(changed) == done.changed_blocks
    touched = np.concatenate(
        [jpeg._places(parsed, c, np.unique(_blocks_of(mask, parsed, c))) for c in parsed.components]
    )
    assert set(changed.tolist()) <= set(touched.tolist())

    # What a decoder makes of it: chroma is smoothed into the pixel beside its block.
    moved = np.argwhere((after != before).reshape(*mask.shape, -1).any(axis=2))
    size = 8 * max(parsed.most_across, parsed.most_down)
    near = {(y // size + dy, x // size + dx) for y, x in np.argwhere(mask) for dy in (-1, 0, 1) for dx in (-1, 0, 1)}
    assert {(y // size, x // size) for y, x in moved} <= near

    assert done.data[: parsed.scan] == data[: parsed.scan] or "optimize" in KINDS[kind]
    assert jpeg.corrected(done.data, mask, NOTHING) == (done.data, 0)


def _blocks_of(mask: NDArray[np.bool_], parsed: Any, component: Any) -> NDArray[np.int64]:
    ys, xs = np.nonzero(mask)
    ys, xs = ys * component.down // parsed.most_down, xs * component.across // parsed.most_across
    return np.asarray(ys // 8 * parsed.mcus_across * component.across + xs // 8)


def test_without_holes_a_jpeg_is_the_very_same():
    """A picture without defects is not touched."""
    data = encoded(PICTURE)
    assert jpeg.corrected(data, NOTHING, NOTHING) == (data, 0)


def test_segments_and_what_follows_the_picture_are_kept():
    """EXIF, an ICC profile, a comment, unknown segments, bytes after the end."""
    profile = bytes(range(256)) * 3
    exif = Image.Exif()
    exif[0x010F] = "Maker"
    data = encoded(ruined(PICTURE), icc_profile=profile, exif=exif, comment=b"hello")
    data = data[:2] + b"\xff\xeb\x00\x06abcd" + data[2:] + b"trailer of a phone"
    done = jpeg.corrected(data, holes(*PLACES), NOTHING).data
    scan = jpeg._parse(data).scan
    assert done[:scan] == data[:scan]
    assert done.endswith(b"\xff\xd9trailer of a phone")
    image = Image.open(io.BytesIO(done))
    assert image.info["icc_profile"] == profile
    assert image.getexif()[0x010F] == "Maker"


@pytest.mark.parametrize("order", ["<", ">"], ids=["little", "big"])
def test_further_pictures_of_a_file_are_still_found(order: str):
    """A multi-picture file names where its others lie, counted from its index; the first one's size changes."""
    first, second = encoded(ruined(PICTURE), subsampling=1), encoded(PICTURE[:64, :64])
    index = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}I", 8)
    index += struct.pack(f"{order}H", 1) + struct.pack(f"{order}HHII", 0xB002, 7, 32, 26) + bytes(4)
    size = len(index) + 32 + 8
    offset = len(first) + size - 10
    entries = struct.pack(f"{order}IIIHH", 0, len(first) + size, 0, 0, 0)
    entries += struct.pack(f"{order}IIIHH", 0, len(second), offset, 0, 0)
    segment = b"\xff\xe2" + struct.pack(">H", 2 + 4 + len(index) + 32) + b"MPF\0" + index + entries
    data = first[:2] + segment + first[2:] + second
    assert data[10 + offset :] == second
    done = jpeg.corrected(data, holes(*PLACES), NOTHING).data
    assert len(done) != len(data)
    length, found = struct.unpack_from(f"{order}II", done, 10 + 26 + 16 + 4)
    assert done[10 + found :] == second
    assert length == len(second)
    assert struct.unpack_from(f"{order}I", done, 10 + 26 + 4)[0] == len(done) - len(second)


def test_a_progressive_jpeg_is_encoded_with_its_own_tables():
    """Its blocks lie in several scans, so the whole picture is encoded anew; segments and subsampling are kept."""
    data = encoded(ruined(PICTURE), progressive=True, subsampling=1, quality=88, icc_profile=b"profile")
    done = jpeg.corrected(data, holes(*PLACES), NOTHING)
    before, after = Image.open(io.BytesIO(data)), Image.open(io.BytesIO(done.data))
    assert done.changed_blocks == -1
    assert before.quantization == after.quantization
    assert [layer[1:3] for layer in before.layer] == [layer[1:3] for layer in after.layer]
    assert (after.info["progressive"], after.info["icc_profile"]) == (1, b"profile")
    truth = pixels_of(encoded(PICTURE, quality=88))
    mask = holes(*PLACES)
    assert np.abs(pixels_of(done.data) - truth)[mask].mean() < 0.3 * np.abs(pixels_of(data) - truth)[mask].mean()


def test_a_missing_code_is_no_obstacle():
    """Tables made for one picture lack what a correction needs: the usual ones take their place."""
    flat = np.full((64, 64, 3), 90, np.uint8)
    flat[20:22, 20:24] = (250, 40, 90)
    flat[50:, 40:] = np.arange(24, dtype=np.uint8)[:, None] * 7
    data = encoded(flat, optimize=True, quality=95, subsampling=0)
    mask = np.zeros((64, 64), bool)
    mask[19:23, 19:25] = True
    done = jpeg.corrected(data, mask, np.zeros_like(mask))
    assert done.changed_blocks > 0
    assert np.abs(pixels_of(done.data)[19:23, 19:25] - 90).max() <= 3


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_a_broken_jpeg_is_refused_with_a_sentence(data: st.DataObject):
    """Whatever is cut off, changed or swapped: an error of ours, or a picture; never a crash or a hang."""
    whole = bytearray(encoded(ruined(PICTURE), restart_marker_blocks=data.draw(st.sampled_from([0, 4]))))
    for _ in range(data.draw(st.integers(1, 8))):
        whole[data.draw(st.integers(2, len(whole) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.one_of(st.none(), st.integers(4, len(whole))))
    try:
        done = jpeg.corrected(bytes(whole[:cut]), holes(*PLACES), NOTHING)
    except RewriteError as error:
        assert str(error)
    else:
        assert done.data[:2] == b"\xff\xd8"


@given(st.integers(0, 2**32 - 1), st.sampled_from([0, 1, 2, 5]))
@settings(max_examples=40, deadline=None)
def test_any_coefficients_come_back(seed: int, restart: int):
    """Of all sizes and runs that the usual tables have codes for."""
    rng = np.random.default_rng(seed)
    blocks = rng.integers(-1023, 1024, (30, 64)) >> rng.integers(0, 11, (30, 64))
    blocks[rng.random(blocks.shape) < rng.random((30, 1))] = 0
    blocks = blocks.astype(np.int16)
    parsed = jpeg._parse(encoded(PICTURE, subsampling=1))
    codes, roles = huffman.tables(list(parsed.huffman)), jpeg._roles(parsed)
    blocks = blocks[: 30 // len(roles[0]) * len(roles[0])]
    out = np.zeros(1 << 16, np.uint8)
    how, size = huffman.encode_scan(blocks, restart, *roles, codes.code, codes.length, out)
    assert how == huffman.DONE
    clean, ends, _ = jpeg._without_markers(np.append(out[:size], (0xFF, 0xD9)).astype(np.uint8), 0)
    back = np.zeros_like(blocks)
    mcus = len(blocks) // len(roles[0])
    how = huffman.decode_scan(
        clean, ends, restart, *roles, codes.fast, codes.last, codes.shift, codes.symbols, mcus, back
    )
    assert how == huffman.DONE
    assert (back == blocks).all()


# Lossless files


def changed(path: Path, count: int = 40, seed: int = 1) -> tuple[Frame, Frame, NDArray[np.int64], bytes, bytes]:
    """Change some samples of a file; return frames before and after, the sites, and the bytes of both."""
    frame = decode(path)
    rng = np.random.default_rng(seed)
    size = frame.samples.size
    sites = np.unique(np.concatenate([rng.integers(0, size, count), [0, size - 1]]))
    values = (frame.samples.reshape(-1)[sites] ^ rng.integers(1, 16, len(sites))).astype(frame.samples.dtype)
    data = path.read_bytes()
    done = rewriting.rewritten(data, frame, sites, values)
    copy = path.with_name(f"done{path.suffix}")
    copy.write_bytes(done)
    after = decode(copy)
    meant = frame.samples.copy()
    meant.reshape(-1)[sites] = values
    assert (after.samples == meant).all()
    assert (after.sensor, after.info) == (frame.sensor, frame.info)
    return frame, after, sites, data, done


def test_an_uncompressed_dng_changes_in_its_samples_only(tmp_path: Path):
    """Same length, and as many bytes differ as the samples have."""
    SENSOR.write_dng(tmp_path / "shot.dng", SENSOR.shot(0, "moving"))
    *_, sites, data, done = changed(tmp_path / "shot.dng")
    assert len(done) == len(data)
    assert sum(a != b for a, b in zip(data, done, strict=True)) == len(sites)


TIFFS: dict[str, dict[str, Any]] = {
    "plain": {},
    "big-endian": {"byteorder": ">"},
    "BigTIFF": {"bigtiff": True},
    "strips": {"rowsperstrip": 16},
    "tiles": {"tile": (32, 48)},
    "deflate": {"compression": "deflate", "rowsperstrip": 16},
    "deflate tiles": {"compression": "adobe_deflate", "tile": (32, 48), "predictor": True},
    "deflate big-endian": {"compression": "deflate", "predictor": True, "byteorder": ">"},
    "LZW": {"compression": "lzw", "rowsperstrip": 16},
    "PackBits": {"compression": "packbits", "rowsperstrip": 16},
}


@pytest.mark.parametrize("kind", sorted(TIFFS))
@pytest.mark.parametrize("form", ["grey 8", "grey 16", "colour 8", "colour 16", "planes 16"])
def test_a_tiff_changes_in_its_samples_only(kind: str, form: str, tmp_path: Path):
    """However it is stored; its other tags and bytes stay."""
    if kind in ("LZW", "PackBits"):
        pytest.importorskip("imagecodecs")
    depth = np.uint8 if form.endswith(" 8") else np.uint16
    pixels = PICTURE.astype(depth) * (1 if depth is np.uint8 else 131)
    options: dict[str, Any] = {"photometric": "rgb"}
    if form.startswith("grey"):
        pixels, options = pixels[..., 1], {"photometric": "minisblack"}
    if form.startswith("planes"):
        pixels, options["planarconfig"] = np.moveaxis(pixels, 2, 0), "separate"
    path = tmp_path / "picture.tif"
    options |= {"extratags": [(65001, "s", 0, "of the maker", True)], "description": "a scene", "software": "firmware"}
    tifffile.imwrite(path, np.ascontiguousarray(pixels), **options, **TIFFS[kind], metadata=None)
    *_, data, done = changed(path)
    with tifffile.TiffFile(io.BytesIO(data)) as old, tifffile.TiffFile(io.BytesIO(done)) as new:
        moved = {273, 279, 324, 325} if "compression" in TIFFS[kind] else set()
        before, after = ({tag.code: tag.value for tag in tiff.pages.first.tags} for tiff in (old, new))
        assert {k: v for k, v in before.items() if k not in moved} == {k: v for k, v in after.items() if k not in moved}
    if "compression" not in TIFFS[kind]:
        assert len(done) == len(data)


def test_packed_samples_of_12_bit_are_changed_in_place(tmp_path: Path):
    """Two samples share a byte; the other one stays."""
    rng = np.random.default_rng(0)
    samples = rng.integers(200, 4096, (64, 96)).astype(np.uint16)
    bits = (samples[..., None] >> np.arange(11, -1, -1) & 1).astype(np.uint8)
    packed = np.packbits(bits.reshape(64, -1), axis=1)
    sensor = VirtualSensor(96, 64, hot=0, stuck=0, dead=0)
    path = tmp_path / "packed.dng"
    sensor.write_dng(path, sensor.shot(0, "flat"))
    with tifffile.TiffFile(path, mode="r+") as tiff:
        page = tiff.pages.first
        at = page.dataoffsets[0]
        page.tags[258].overwrite(12)
        page.tags[279].overwrite(packed.size)
        page.tags[50717].overwrite(4095)
        page.tags[50714].overwrite(128)
    data = bytearray(path.read_bytes())
    data[at:] = packed.tobytes()
    path.write_bytes(data)
    assert (decode(path).samples == samples).all()
    *_, old, new = changed(path)
    assert len(old) == len(new)


def test_a_compressed_dng_is_compressed_anew_tile_by_tile(tmp_path: Path):
    """Lossless JPEG, as most DNGs have it: LibRaw reads the changed samples; tiles that are not touched stay."""
    imagecodecs = pytest.importorskip("imagecodecs")
    sensor = VirtualSensor(256, 192, hot=0, stuck=0, dead=0)
    path = tmp_path / "shot.dng"
    shot = sensor.shot(0, "moving")
    sensor.write_dng(path, shot)
    with tifffile.TiffFile(path) as tiff:
        tags = [
            (tag.code, int(tag.dtype), tag.count, tag.value, True)
            for tag in tiff.pages.first.tags
            if tag.code in (271, 272, 33421, 33422, 50706, 50707, 50708, 50714, 50717, 50721, 50728, 50735, 50778)
        ]
    tiles = [
        imagecodecs.ljpeg_encode(np.ascontiguousarray(shot.mosaic[y : y + 64, x : x + 64]), bitspersample=14)
        for y in range(0, 192, 64)
        for x in range(0, 256, 64)
    ]
    tifffile.imwrite(
        path, iter(tiles), shape=(192, 256), dtype=np.uint16, tile=(64, 64), photometric=32803, compression=7,
        extratags=tags, metadata=None, software=False,
    )  # fmt: skip
    assert (decode(path).samples == shot.mosaic).all()
    frame = decode(path)
    data = path.read_bytes()
    sites = np.array([70 * 256 + 70, 71 * 256 + 80])
    done = rewriting.rewritten(data, frame, sites, np.array([800, 900], np.uint16))
    (tmp_path / "done.dng").write_bytes(done)
    after = decode(tmp_path / "done.dng")
    meant = shot.mosaic.copy()
    meant.reshape(-1)[sites] = 800, 900
    assert (after.samples == meant).all()
    assert after.sensor == frame.sensor
    with tifffile.TiffFile(io.BytesIO(done)) as tiff:
        page = tiff.pages.first
        kept = [done[at : at + size] for at, size in zip(page.dataoffsets, page.databytecounts, strict=True)]
    assert [k for k in range(12) if kept[k] != tiles[k]] == [5]


def test_margins_of_a_dng_are_skipped(tmp_path: Path):
    """ActiveArea says where the samples that were decoded begin."""
    sensor = VirtualSensor(128, 96, hot=0, stuck=0, dead=0)
    path = tmp_path / "shot.dng"
    sensor.write_dng(path, sensor.shot(0, "moving"))
    with tifffile.TiffFile(path) as tiff:
        page = tiff.pages.first
        samples = page.asarray()
        tags = [
            (t.code, int(t.dtype), t.count, t.value, True) for t in page.tags if t.code > 33000 or t.code in (271, 272)
        ]
    tags.append((50829, 4, 4, (6, 10, 96, 120), True))
    tifffile.imwrite(path, samples, photometric=32803, extratags=tags, metadata=None, software=False)
    frame, *_ = changed(path)
    assert frame.samples.shape == (90, 110)
    assert (frame.samples == samples[6:96, 10:120]).all()


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "LA", "I;16"])
def test_a_png_keeps_all_its_other_chunks(mode: str, tmp_path: Path):
    """And its transparency."""
    path = tmp_path / "picture.png"
    image = Image.fromarray(PICTURE).convert("L" if mode == "I;16" else mode)
    if mode == "I;16":
        image = Image.fromarray(PICTURE[..., 1].astype(np.uint16) * 131)
    if "A" in mode:
        image.putalpha(Image.fromarray(PICTURE[..., 0]))
    about = PngImagePlugin.PngInfo()
    about.add_text("Comment", "hello")
    about.add(b"prVt", b"private")
    image.save(path, pnginfo=about, icc_profile=b"profile", dpi=(300, 300))
    *_, data, done = changed(path)
    old, new = Image.open(io.BytesIO(data)), Image.open(io.BytesIO(done))
    assert old.info == new.info
    assert old.mode == new.mode
    assert b"prVt" in done
    if "A" in mode:
        assert (np.asarray(old)[..., -1] == np.asarray(new)[..., -1]).all()


@pytest.mark.parametrize("dtype", ["u1", "i2", "u2", "i4", "f4"])
@pytest.mark.parametrize("order", [None, "TOP-DOWN"])
def test_a_fits_file_changes_in_its_samples_only(dtype: str, order: str | None, tmp_path: Path):
    """And in its checksums, where it has them, which are right then."""
    fits = pytest.importorskip("astropy.io.fits")
    samples = (PICTURE[..., 1].astype(np.int64) + 100).clip(0, 250).astype(dtype)
    header = fits.Header({"INSTRUME": "a camera", "EXPTIME": 3.5})
    if order:
        header["ROWORDER"] = order
    path = tmp_path / "picture.fits"
    unit = fits.PrimaryHDU(samples, header)
    unit.header["COMMENT"] = "kept as it is"
    unit.writeto(path, checksum=True)
    *_, data, done = changed(path)
    assert len(done) == len(data)
    cards = [(data[at : at + 80], done[at : at + 80]) for at in range(0, 2880, 80)]
    assert {old[:8] for old, new in cards if old != new} == {b"CHECKSUM", b"DATASUM "}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with fits.open(io.BytesIO(done), checksum=True) as units:
            assert units[0].header["EXPTIME"] == 3.5


def test_a_compressed_fits_file_is_refused(tmp_path: Path):
    """Its samples do not lie in it."""
    fits = pytest.importorskip("astropy.io.fits")
    path = tmp_path / "packed.fits"
    fits.HDUList([fits.PrimaryHDU(), fits.CompImageHDU(PICTURE[..., 1].astype(np.uint16))]).writeto(path)
    frame = decode(path)
    with pytest.raises(RewriteError, match="funpack"):
        rewriting.rewritten(path.read_bytes(), frame, np.array([5]), np.array([7], np.uint16))


def test_makers_raw_files_are_refused(tmp_path: Path):
    """They are not written; the sentence says what to do."""
    frame = SENSOR.frame(SENSOR.shot(0, "moving"))
    for head in (b"FUJIFILMCCD-RAW ", b"\0\0\0\x18ftypcrx ", b"IIRO\x08\0\0\0"):
        with pytest.raises(RewriteError, match="convert it to DNG"):
            rewriting.rewritten(head + bytes(100), frame, np.array([5]), np.array([7], np.uint16))


def test_a_file_that_holds_other_samples_is_refused(tmp_path: Path):
    """Exchanged after it was decoded, or decoded through a table: nothing is written over what is not understood."""
    SENSOR.write_dng(tmp_path / "one.dng", SENSOR.shot(0, "moving"))
    other = SENSOR.frame(SENSOR.shot(1, "moving"))
    with pytest.raises(RewriteError, match="does not hold the samples"):
        rewriting.rewritten((tmp_path / "one.dng").read_bytes(), other, np.arange(50), np.zeros(50, np.uint16))


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_a_broken_file_is_refused_with_a_sentence(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject):
    """The process that writes reads headers too: nothing in them may end it."""
    folder = tmp_path_factory.mktemp("broken")
    kind = data.draw(st.sampled_from(["dng", "tif", "png", "fits"]))
    path = folder / f"picture.{kind}"
    frame = SENSOR.frame(SENSOR.shot(0, "moving"))
    if kind == "dng":
        SENSOR.write_dng(path, SENSOR.shot(0, "moving"))
    elif kind == "fits":
        pytest.importorskip("astropy.io.fits").PrimaryHDU(frame.samples[::-1]).writeto(path)
    elif kind == "png":
        Image.fromarray(frame.samples).save(path)
    else:
        tifffile.imwrite(path, frame.samples, compression="deflate", predictor=True, metadata=None)
    whole = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 6))):
        whole[data.draw(st.integers(0, min(len(whole) - 1, 3000)))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.one_of(st.none(), st.integers(20, len(whole))))
    sites = np.arange(0, frame.samples.size, 501)
    try:
        done = rewriting.rewritten(bytes(whole[:cut]), frame, sites, frame.samples.reshape(-1)[sites])
    except RewriteError as error:
        assert str(error)
    else:
        assert done
