"""Whether a picture file holds what its header says: genuine files of each kind pass, one wrong number is seen."""

from __future__ import annotations

import io
import struct
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tifffile

sys.path.append(str(Path(__file__).parent / "faults"))

from fuzz_mutators import entries, png_chunks
from fuzz_seeds import FORMATS, Seed, seeds

from hotpixd.intake import metadata
from hotpixd.intake.decode import DecodeError, decode
from hotpixd.intake.extent import _is_filled_up, filter_fault
from pictures import XTRANS, jpeg, mosaic, write_dng

fits = pytest.importorskip("astropy.io.fits")

SEEDS = {(form, seed.name): seed for form in FORMATS[:5] for seed in seeds(form)}


def whole(form: str, name: str) -> bytes:
    return SEEDS[form, name].content


def decoded(tmp_path: Path, content: bytes):
    path = tmp_path / "shot"
    path.write_bytes(content)
    return decode(path)


def refusal(tmp_path: Path, content: bytes) -> str:
    with pytest.raises(DecodeError) as caught:
        decoded(tmp_path, content)
    return str(caught.value)


def with_tag(content: bytes, tag: int, *values: int) -> bytes:
    """Change the values of a tag in the last directory that has it, which holds the raw samples."""
    entry = [entry for entry in entries(content) if entry.tag == tag][-1]
    unit = {1: "B", 3: "H", 4: "I", 16: "Q"}[entry.kind]
    packed = struct.pack(f"{entry.order}{len(values)}{unit}", *values)
    return content[: entry.value_at] + packed + content[entry.value_at + len(packed) :]


def tag_of(content: bytes, tag: int) -> tuple[int, ...]:
    return next(entry.values for entry in entries(content) if entry.tag == tag)


@pytest.mark.parametrize("seed", SEEDS.values(), ids=[" ".join(key) for key in SEEDS])
def test_a_whole_file_passes(tmp_path, seed: Seed):
    """Each way to store samples that cameras and programs have: nothing in it contradicts the rest."""
    assert decoded(tmp_path, seed.content).samples.size


# TIFF

PLAIN_TIFFS = [name for form, name in SEEDS if form == "TIFF" and name not in ("deflate tiles", "tiles")]


@pytest.mark.parametrize("name", PLAIN_TIFFS)
@pytest.mark.parametrize(("tag", "change"), [(256, -1), (256, 1), (256, -16), (257, -1), (257, 1), (257, 40)])
def test_a_tiff_of_other_sides_than_its_strips_hold_is_refused(tmp_path, name, tag, change):
    """A row or a column more or less, in one strip or several, stored or compressed: readers would cut or fill."""
    content = whole("TIFF", name)
    (side,) = tag_of(content, tag)
    assert refusal(tmp_path, with_tag(content, tag, side + change))


@pytest.mark.parametrize("name", ["tiles", "deflate tiles"])
@pytest.mark.parametrize(("tag", "value"), [(256, 40), (257, 200), (322, 16), (323, 64)])
def test_a_tiff_with_other_tiles_than_its_sides_need_is_refused(tmp_path, name, tag, value):
    """Tiles are counted, and the first is as large as is said."""
    assert refusal(tmp_path, with_tag(whole("TIFF", name), tag, value))


@pytest.mark.parametrize("change", [-200, -100, 10])
def test_a_strip_that_lies_over_the_directory_or_beyond_the_end_is_refused(tmp_path, change):
    """The samples would be there, all of them, in other places than they were read out."""
    content = whole("TIFF", "strip")
    (start,) = tag_of(content, 273)
    assert decoded(tmp_path, content + b"appended by something")
    assert refusal(tmp_path, with_tag(content, 273, start + change))


def test_strips_that_lie_over_each_other_are_refused(tmp_path):
    """A half of the picture would be there twice."""
    content = whole("TIFF", "strips")
    starts = list(tag_of(content, 273))
    starts[3] = starts[2]
    assert "over each other" in refusal(tmp_path, with_tag(content, 273, *starts))


def test_a_strip_that_inflates_to_more_than_it_should_is_no_bomb(tmp_path):
    """A gigabyte of zeros fits into a megabyte: it is refused without ever being in memory."""
    content = whole("TIFF", "deflate predictor")
    bomb = zlib.compress(bytes(1 << 28), 9)
    content = with_tag(with_tag(content, 273, len(content)), 279, len(bomb))
    assert "holds others" in refusal(tmp_path, content + bomb)


@pytest.mark.parametrize(("tag", "values"), [(33422, (0, 1, 9, 2)), (33422, (0, 0, 1, 2)), (33421, (2, 3))])
def test_a_mosaic_without_a_right_pattern_is_refused(tmp_path, tag, values):
    """A TIFF/EP mosaic must say what its samples are."""
    assert refusal(tmp_path, with_tag(whole("TIFF", "mosaic"), tag, *values))


def test_a_cycle_of_directories_ends(tmp_path):
    """A chain that leads back to its beginning is no endless list of pictures."""
    content = bytearray(whole("TIFF", "strip"))
    (first,) = struct.unpack_from("<I", content, 4)
    (count,) = struct.unpack_from("<H", content, first)
    struct.pack_into("<I", content, first + 2 + 12 * count, first)
    assert decoded(tmp_path, bytes(content)).samples.shape == (96, 112)


# DNG

DNGS = [name for form, name in SEEDS if form == "DNG"]


@pytest.mark.parametrize("name", [name for name in DNGS if name != "lossless JPEG tiles"])
@pytest.mark.parametrize(("tag", "change"), [(256, -2), (256, 2), (257, -1), (257, 2), (257, -48)])
def test_a_dng_of_other_sides_than_its_strips_hold_is_refused(tmp_path, name, tag, change):
    """LibRaw reads as many samples as the sides say, whatever the strip holds."""
    content = whole("DNG", name)
    side = [entry.values[0] for entry in entries(content) if entry.tag == tag][-1]
    assert refusal(tmp_path, with_tag(content, tag, side + change))


@pytest.mark.parametrize(
    ("name", "tag", "values"),
    [
        ("uncompressed", 258, (12,)),
        ("uncompressed", 277, (2,)),
        ("uncompressed", 278, (50,)),
        ("uncompressed", 262, (34892,)),
        ("packed 12 bit", 258, (16,)),
        ("packed 12 bit", 258, (10,)),
        ("lossless JPEG", 278, (40,)),
        ("lossless JPEG tiles", 322, (128,)),
        ("lossless JPEG tiles", 257, (200,)),
        ("margins", 50829, (4, 8, 98, 108)),
        ("cropped", 50829, (4, 8, 60, 108)),
        ("behind a preview", 50720, (112, 92)),
        ("uncompressed", 33422, (0, 1, 2, 1)),
        ("uncompressed", 33422, (6, 1, 1, 2)),
        ("lossless JPEG", 33422, (1, 2, 3, 1)),
        ("X-Trans", 33422, tuple(sorted(XTRANS[2]))),
    ],
)
def test_a_dng_whose_tags_contradict_its_samples_is_refused(tmp_path, name, tag, values):
    """Depth, parts, visible area, crop, colours."""
    assert refusal(tmp_path, with_tag(whole("DNG", name), tag, *values))


def test_a_wrong_depth_does_not_hide_wrong_sides(tmp_path):
    """The sides of a lossless JPEG count whatever depth the DNG says."""
    content = whole("DNG", "lossless JPEG")
    (width,) = tag_of(content, 256)
    assert refusal(tmp_path, with_tag(with_tag(content, 258, 5), 256, width + 8))


@pytest.mark.parametrize("tag", [33421, 33422, 262])
def test_a_dng_that_lost_a_tag_of_its_mosaic_is_refused(tmp_path, tag):
    """LibRaw would take RGGB."""
    content = whole("DNG", "uncompressed")
    entry = next(entry for entry in entries(content) if entry.tag == tag)
    lost = content[: entry.at] + struct.pack("<H", tag + 1 if tag == 262 else tag - 1) + content[entry.at + 2 :]
    assert refusal(tmp_path, lost)


def test_a_dng_that_is_refused_is_not_read_as_a_tiff(tmp_path):
    """The TIFF reader knows nothing of visible areas: what the raw reader refuses stays refused."""
    content = with_tag(whole("DNG", "cropped"), 50829, 4, 8, 60, 108)
    assert "visible area" in refusal(tmp_path, content)


def test_an_odd_strip_may_be_filled_up(tmp_path):
    """Writers end a strip of an odd number of bytes on an even one."""
    write_dng(tmp_path / "shot.dng", (mosaic(65, 81) >> 6).astype(np.uint8), black=0, white=255)
    content = (tmp_path / "shot.dng").read_bytes()
    assert decoded(tmp_path, content).samples.shape == (65, 81)
    assert decoded(tmp_path, with_tag(content, 279, 65 * 81 + 1) + b"\0")
    assert refusal(tmp_path, with_tag(content, 279, 65 * 81 + 2) + b"\0\0")


@pytest.mark.parametrize(
    ("count", "size", "filled"),
    [
        (100, 100, True),
        (102, 101, True),
        (512, 511, True),
        (512, 500, False),
        (4096, 4000, False),
        (48_000_000, 48_000_000, True),
        (48_000_000, 47_999_990, True),
        (48_001_024, 48_000_999, True),
        (48_000_001, 48_000_000, False),
        # A column less of 6000 x 4000.
        (48_000_000, 47_992_000, False),
    ],
)
def test_large_strips_may_be_filled_up_to_pages(count, size, filled):
    """Cameras write in sectors. In small strips a column less would look the same."""
    assert _is_filled_up(count, size) is filled


@pytest.mark.parametrize("colours", ["RGGB", "BGGR", "GRBG", "GBRG", "CYGM", "LLLL", "L"])
def test_filters_of_sensors_pass(colours):
    """Bayer in its four orders, four colours, none."""
    assert filter_fault(colours) is None


def test_xtrans_begins_anywhere():
    """Every shift of the pattern of 36 is one; every two letters exchanged are none, unless they are the same."""
    pattern = "".join("RGB"[colour] for colour in XTRANS[2])
    for down in range(6):
        for right in range(6):
            shifted = "".join(pattern[(y + down) % 6 * 6 + (x + right) % 6] for y in range(6) for x in range(6))
            assert filter_fault(shifted) is None
    for place in range(1, 36):
        if pattern[place] != pattern[0]:
            swapped = pattern[place] + pattern[1:place] + pattern[0] + pattern[place + 1 :]
            assert filter_fault(swapped)


@pytest.mark.parametrize("colours", ["RRGB", "RGBG", "GGRB", "RRRR", "GGGG", "RGGR", "WGBG", "RGB" * 12])
def test_what_is_no_filter_is_refused(colours):
    """Two greens in a row, a colour missing, a colour too often."""
    assert filter_fault(colours)


# PNG


def png_with(content: bytes, change: Callable[[list[int]], None]) -> bytes:
    """Change the numbers of a PNG's header and make its checksum right."""
    numbers = list(struct.unpack(">2I5B", content[16:29]))
    change(numbers)
    head = b"IHDR" + struct.pack(">2I5B", *numbers)
    return content[:12] + head + struct.pack(">I", zlib.crc32(head)) + content[33:]


def put(index: int, value: int) -> Callable[[list[int]], None]:
    return lambda numbers: numbers.__setitem__(index, value)


@pytest.mark.parametrize("name", ["grey 16", "grey 8", "RGB", "RGBA", "small parts", "stored"])
@pytest.mark.parametrize("change", [put(0, 79), put(0, 81), put(1, 63), put(1, 65), put(1, 32), put(6, 1)])
def test_a_png_of_other_sides_than_it_holds_is_refused(tmp_path, name, change):
    """With its checksum made right, only the number of samples tells. Pillow cuts, or fills with zeros."""
    assert "holds others" in refusal(tmp_path, png_with(whole("PNG", name), change))


@pytest.mark.parametrize(("index", "value"), [(2, 16), (3, 2), (3, 4), (3, 6)])
def test_a_png_of_another_depth_or_colour_is_refused(tmp_path, index, value):
    """Twice or thrice the samples are not there."""
    assert refusal(tmp_path, png_with(whole("PNG", "grey 8"), put(index, value)))


def test_an_interlaced_png_passes(tmp_path):
    """Seven passes of other sizes; a PNG of one row less holds others."""
    interlaced = interlaced_png(33, 21)
    assert decoded(tmp_path, interlaced).samples.shape == (21, 33)
    assert "holds others" in refusal(tmp_path, png_with(interlaced, put(1, 20)))


def interlaced_png(width: int, height: int) -> bytes:
    """Write what Pillow cannot."""
    samples = (mosaic(height, width) >> 5).astype(np.uint8)
    rows = b""
    for left, top, right, down in ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2),
                                   (0, 1, 1, 2)):  # fmt: skip
        rows += b"".join(b"\0" + row.tobytes() for row in samples[top::down, left::right])
    parts = [b"IHDR" + struct.pack(">2I5B", width, height, 8, 0, 0, 0, 1), b"IDAT" + zlib.compress(rows), b"IEND"]
    body = b"".join(struct.pack(">I", len(p) - 4) + p + struct.pack(">I", zlib.crc32(p)) for p in parts)
    return b"\x89PNG\r\n\x1a\n" + body


def test_a_flipped_bit_among_the_samples_of_a_png_is_seen(tmp_path):
    """The stream has a checksum of its own."""
    content = whole("PNG", "stored")
    at = next(at for at, name, _ in png_chunks(content) if name == b"IDAT") + 5000
    flipped = content[:at] + bytes([content[at] ^ 8]) + content[at + 1 :]
    assert "cannot be read" in refusal(tmp_path, flipped)


def test_a_png_that_inflates_to_more_than_it_should_is_no_bomb(tmp_path):
    """It is refused at the first byte too many."""
    content = whole("PNG", "grey 16")
    packed = b"IDAT" + zlib.compress(bytes(1 << 28), 9)
    bomb = content[:33] + struct.pack(">I", len(packed) - 4) + packed + struct.pack(">I", zlib.crc32(packed))
    assert "holds others" in refusal(tmp_path, bomb + content[-12:])


# JPEG: libjpeg-turbo's own warnings


def jpeg_with(content: bytes, width: int, height: int) -> bytes:
    at = max(content.find(b"\xff\xc0"), content.find(b"\xff\xc2")) + 5
    return content[:at] + struct.pack(">2H", height, width) + content[at + 4 :]


@pytest.mark.parametrize("name", ["plain", "plain progressive grey", "camera restart", "camera 4:4:4"])
@pytest.mark.parametrize(("width", "height"), [(160, 96), (160, 128), (144, 112), (176, 112), (320, 112), (160, 16)])
def test_a_jpeg_of_other_sides_than_it_codes_is_refused(tmp_path, name, width, height):
    """Blocks that are missing or left over are warnings of libjpeg-turbo, and those are errors here."""
    assert refusal(tmp_path, jpeg_with(whole("JPEG", name), width, height))


@pytest.mark.parametrize(("width", "height"), [(159, 112), (160, 111), (320, 56), (80, 224)])
def test_exif_tells_sides_that_need_as_many_blocks(tmp_path, width, height):
    """What no count of blocks can tell, the camera's own statement does."""
    assert "camera wrote 160 x 112" in refusal(tmp_path, jpeg_with(whole("JPEG", "camera"), width, height))


def test_a_jpeg_without_its_end_is_refused(tmp_path):
    """All blocks may be there."""
    assert "JPEG" in refusal(tmp_path, jpeg(np.full((64, 80, 3), 90, np.uint8))[:-2])


# FITS


def fits_with(content: bytes, keyword: str, value: object) -> bytes:
    at = content.find(keyword.ljust(8).encode() + b"=")
    return content[: at + 10] + str(value).rjust(20).encode() + content[at + 30 :]


@pytest.mark.parametrize("name", ["16 bit", "mosaic", "32 bit", "float", "planes", "8 bit"])
@pytest.mark.parametrize(
    ("keyword", "value"),
    [
        ("NAXIS1", 79), ("NAXIS1", 160), ("NAXIS2", 63), ("NAXIS2", 32), ("NAXIS2", 128), ("NAXIS1", 2**31),
        ("NAXIS", 1), ("NAXIS", 2**31 - 1), ("NAXIS", -1), ("NAXIS1", -80), ("NAXIS2", "X"), ("BITPIX", 64),
        ("BITPIX", 7),
    ],
)  # fmt: skip
def test_a_fits_file_of_another_length_than_its_header_says_is_refused(tmp_path, name, keyword, value):
    """Data that are left over, or missing; astropy takes minutes for two thousand million axes."""
    assert "FITS" in refusal(tmp_path, fits_with(whole("FITS", name), keyword, value))


@pytest.mark.parametrize(
    ("keyword", "value"),
    [("ZNAXIS1", 40), ("ZNAXIS1", 81), ("ZNAXIS2", 56), ("ZNAXIS2", 48), ("ZNAXIS2", 65), ("ZTILE1", 90)],
)
@pytest.mark.parametrize("name", ["Rice", "gzip"])
def test_a_compressed_fits_picture_has_as_many_tiles_as_its_sides_need(tmp_path, name, keyword, value):
    """The table has a row for each; half a tile is none."""
    assert "FITS" in refusal(tmp_path, fits_with(whole("FITS", name), keyword, value))


def test_a_fits_table_of_two_thousand_million_columns_is_refused(tmp_path):
    """astropy would go through them all."""
    assert refusal(tmp_path, fits_with(whole("FITS", "Rice"), "TFIELDS", 2**31 - 1))


def test_a_fits_file_may_lack_what_fills_its_last_block(tmp_path):
    """Some programs end with the last sample; what follows a whole block must be a header."""
    content = whole("FITS", "16 bit")
    assert decoded(tmp_path, content[: 2880 + 64 * 80 * 2]).samples.shape == (64, 80)
    assert "longer or shorter" in refusal(tmp_path, content[: 2880 + 64 * 80 * 2 - 1])
    assert "longer or shorter" in refusal(tmp_path, content + b"\0" * 2880)


@pytest.mark.parametrize("order", ["TOP-DOWN", "BOTTOM-UP"])
@pytest.mark.parametrize("dtype", [np.uint16, np.int16, np.int32])
def test_a_half_written_fits_file_is_refused_whichever_way_its_rows_go(tmp_path, order, dtype):
    """Unwritten bytes are 32768 in unsigned 16 bit, and lie at the top of the frame where rows are turned."""
    out = io.BytesIO()
    fits.PrimaryHDU(mosaic().astype(dtype), fits.Header([("ROWORDER", order)])).writeto(out)
    content = out.getvalue()
    half = content[: len(content) // 2].ljust(len(content), b"\0")
    assert decoded(tmp_path, content)
    assert "half written" in refusal(tmp_path, half)


# Offsets that no file has


def test_offsets_beyond_every_file_are_skipped():
    """A box of a CR3 may claim 2**63 bytes; the system takes no such offset."""
    box = struct.pack(">I4sQ", 1, b"moov", 2**63 - 8) + bytes(16)
    content = b"\0\0\0\x18ftypcrx " + bytes(12) + box
    assert metadata.from_file(io.BytesIO(content)) == metadata.Metadata()


def test_offsets_beyond_every_file_are_no_fault_of_the_disk(tmp_path):
    """The same in a file: what the system says to such an offset was taken for a failing disk."""
    path = tmp_path / "shot.cr3"
    path.write_bytes(b"\0\0\0\x18ftypcrx " + bytes(12) + struct.pack(">I4sQ", 1, b"moov", 2**63 - 8) + bytes(16))
    with pytest.raises(DecodeError):
        decode(path)


def test_a_tiff_page_is_judged_by_its_own_list_of_strips(tmp_path):
    """tifffile drops the strips that it does not need, and says nothing."""
    content = with_tag(whole("TIFF", "strips"), 257, 80)
    with tifffile.TiffFile(io.BytesIO(content)) as tiff:
        assert tiff.pages.first.asarray().shape == (80, 112)
    assert "which are 8 parts, and names 10" in refusal(tmp_path, content)
