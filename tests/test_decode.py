"""What the intake makes of picture files, and which it refuses."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
import tifffile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from hotpixd.core.frame import SampleKind, ShotKind
from hotpixd.intake import decode as decode_module
from hotpixd.intake.decode import DecodeError, decode, decode_file, keep_large_buffers
from pictures import RGGB, SHARED, XTRANS, colour, exif, jpeg, mosaic, write_dng

fits = pytest.importorskip("astropy.io.fits")

needs_data = pytest.mark.skipif(not SHARED.is_dir(), reason=f"the real frames are not at {SHARED}")


def put(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def png(samples: np.ndarray) -> bytes:
    out = io.BytesIO()
    Image.fromarray(samples).save(out, "PNG")
    return out.getvalue()


# JPEG


def test_a_colour_jpeg_has_the_samples_pillow_reads(tmp_path):
    """Samples of a colour JPEG equal Pillow's, three to a pixel, without a copy of their order."""
    path = put(tmp_path / "shot", jpeg(colour()))
    frame = decode(path)
    expected = np.asarray(Image.open(path))
    assert np.array_equal(frame.samples.reshape(expected.shape), expected)
    assert frame.samples.shape == frame.sensor.layout.shape
    assert (frame.sensor.layout.colours, frame.sensor.layout.channels) == ("RGB", 3)
    assert frame.sensor.samples is SampleKind.RENDERED
    assert frame.sensor.dtype == "uint8"


def test_a_grey_jpeg_is_one_plane(tmp_path):
    """A grey JPEG is one plane of rendered samples, equal to Pillow's."""
    path = put(tmp_path / "shot.jpg", jpeg(colour()[:, :, 0]))
    frame = decode(path)
    assert np.array_equal(frame.samples, np.asarray(Image.open(path)))
    assert frame.sensor.layout.colours == "L"


def test_a_jpeg_with_the_name_of_a_raw_file_is_a_jpeg(tmp_path):
    """The content decides, not the extension."""
    assert decode(put(tmp_path / "DSC_0001.NEF", jpeg(colour()))).sensor.samples is SampleKind.RENDERED


def test_a_jpeg_is_never_rotated(tmp_path):
    """Coordinates are the stored ones, whatever the Orientation says."""
    path = put(tmp_path / "shot.jpg", jpeg(colour(), exif=exif({}, {0x0112: 6})))
    assert decode(path).sensor.layout.shape == (64, 240)


def test_the_exif_of_a_jpeg_arrives_in_the_frame(tmp_path):
    """Identity and settings come from the EXIF block."""
    block = exif({0x829A: 0.25, 0x8827: 400, 0xA431: "A77"}, {0x010F: "Acme", 0x0110: "Acme One"})
    frame = decode(put(tmp_path / "shot.jpg", jpeg(colour(), exif=block)))
    assert (frame.sensor.make, frame.sensor.model, frame.sensor.serial) == ("Acme", "Acme One", "A77")
    assert (frame.info.exposure_s, frame.info.iso) == (0.25, 400.0)


@pytest.mark.parametrize("share", [0.05, 0.5, 0.9, 0.99])
def test_a_truncated_jpeg_is_refused(tmp_path, share):
    """A JPEG that ends early is never decoded in part."""
    content = jpeg(colour(200, 300))
    with pytest.raises(DecodeError, match="JPEG file is damaged or cut off"):
        decode(put(tmp_path / "shot.jpg", content[: int(len(content) * share)]))


def test_a_jpeg_that_ends_in_zeros_is_refused(tmp_path):
    """A preallocated file whose second half was never written is no shot."""
    content = jpeg(colour(200, 300))
    with pytest.raises(DecodeError, match="damaged or cut off"):
        decode(put(tmp_path / "shot.jpg", content[: len(content) // 2].ljust(len(content), b"\0")))


def test_a_cmyk_jpeg_is_refused(tmp_path):
    """No camera writes CMYK."""
    out = io.BytesIO()
    Image.fromarray(colour()).convert("CMYK").save(out, "JPEG")
    with pytest.raises(DecodeError, match="CMYK"):
        decode(put(tmp_path / "shot.jpg", out.getvalue()))


def test_a_jpeg_of_absurd_size_is_refused_before_memory_is_taken(tmp_path):
    """A header that promises 3.6 gigapixels costs nothing."""
    content = bytearray(jpeg(colour()))
    at = content.index(b"\xff\xc0") + 5
    content[at : at + 4] = (60000).to_bytes(2, "big") * 2
    with pytest.raises(DecodeError, match="60000 x 60000 pixels, more than any camera"):
        decode(put(tmp_path / "shot.jpg", bytes(content)))


# Edited pictures


@pytest.mark.parametrize(
    "program",
    [
        "Adobe Photoshop CC 2017 (Windows)",
        "Noise Ninja 2",
        "GIMP 2.10.36",
        "Nikon Transfer 6.2.1 W",
        "OfotoNow 2",
    ],
)
def test_a_picture_written_by_an_editor_is_refused_by_name(tmp_path, program):
    """The sentence names the program, so that the photographer knows which copy this is."""
    path = put(tmp_path / "shot.jpg", jpeg(colour(), exif=exif({}, {0x0131: program})))
    with pytest.raises(DecodeError, match="written by") as caught:
        decode(path)
    assert program in str(caught.value)
    assert "shot.jpg" not in str(caught.value)


@pytest.mark.parametrize("firmware", ["Ver.1.00", "Firmware Version 1.0.2", "ZV-E10 v1.00", "9.3.1", ""])
def test_firmware_is_no_editor(tmp_path, firmware):
    """Cameras write their firmware into the same tag."""
    assert decode(put(tmp_path / "shot.jpg", jpeg(colour(), exif=exif({}, {0x0131: firmware}))))


def test_an_editor_named_by_xmp_alone_is_refused(tmp_path):
    """Some programs leave Software alone and name themselves in XMP."""
    xmp = b'<x:xmpmeta><rdf:Description xmp:CreatorTool="Adobe Lightroom 7.1"/></x:xmpmeta>'
    with pytest.raises(DecodeError, match=r"Adobe Lightroom 7\.1"):
        decode(put(tmp_path / "shot.jpg", jpeg(colour(), xmp=xmp)))


def test_a_cropped_jpeg_is_refused_and_a_turned_one_is_not(tmp_path):
    """The camera's own size in the EXIF gives a crop away; a turned picture has the same two sides."""
    turned = exif({0xA002: 64, 0xA003: 80})
    assert decode(put(tmp_path / "turned.jpg", jpeg(colour(), exif=turned)))
    cropped = exif({0xA002: 800, 0xA003: 640})
    with pytest.raises(DecodeError, match="camera wrote 800 x 640 pixels, the file has 80 x 64"):
        decode(put(tmp_path / "cropped.jpg", jpeg(colour(), exif=cropped)))


# PNG


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_a_grey_png_is_raw_of_unknown_pattern(tmp_path, dtype):
    """Grey lossless samples may be a mosaic: four planes without names."""
    samples = mosaic().astype(dtype)
    frame = decode(put(tmp_path / "shot", png(samples)))
    assert np.array_equal(frame.samples, samples)
    assert frame.samples.dtype == dtype
    assert frame.sensor.layout.colours == "LLLL"
    assert frame.sensor.samples is SampleKind.RAW


def test_an_rgba_png_loses_its_alpha(tmp_path):
    """Alpha is no sample of the sensor."""
    rgba = np.dstack([colour(), np.full((64, 80), 7, np.uint8)])
    frame = decode(put(tmp_path / "shot.png", png(rgba)))
    assert np.array_equal(frame.samples.reshape(64, 80, 3), rgba[:, :, :3])
    assert frame.sensor.samples is SampleKind.RENDERED


def test_pngs_whose_samples_would_be_changed_are_refused(tmp_path):
    """A palette is no sample; Pillow drops the low bytes of 16-bit colour, which would pass unseen."""
    out = io.BytesIO()
    Image.fromarray(colour()).quantize(16).save(out, "PNG")
    with pytest.raises(DecodeError, match="palette"):
        decode(put(tmp_path / "a.png", out.getvalue()))
    deep = bytearray(png(colour()))
    deep[24] = 16
    with pytest.raises(DecodeError, match="16 bit per sample in colour"):
        decode(put(tmp_path / "b.png", bytes(deep)))


def test_a_png_bomb_is_refused(tmp_path):
    """30000 x 30000 pixels of nothing fit into a small file."""
    content = bytearray(png(mosaic()))
    content[16:24] = (30000).to_bytes(4, "big") * 2
    with pytest.raises(DecodeError, match="more than any camera"):
        decode(put(tmp_path / "bomb.png", bytes(content)))


def test_pillows_guard_does_not_bite_at_the_largest_cameras(tmp_path):
    """179 megapixels is where Image.open refuses; medium-format cameras write 200."""
    samples = np.zeros((12000, 16000), np.uint8)
    samples[::7, ::11] = 90
    samples[-1] = 5
    out = io.BytesIO()
    Image.fromarray(samples).save(out, "PNG", compress_level=1)
    frame = decode(put(tmp_path / "large.png", out.getvalue()), ShotKind.LIGHT)
    assert frame.sensor.layout.size == 192_000_000


# TIFF


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"byteorder": ">"},
        {"bigtiff": True},
        {"compression": "zlib"},
        {"compression": "lzw"},
        {"tile": (32, 32)},
    ],
)
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_a_grey_tiff_is_raw_of_unknown_pattern(tmp_path, options, dtype):
    """Grey TIFFs of each byte order and compression give their samples unchanged, in native order."""
    samples = mosaic().astype(dtype)
    tifffile.imwrite(tmp_path / "shot", samples, **options)
    frame = decode(tmp_path / "shot")
    assert np.array_equal(frame.samples, samples)
    assert frame.samples.dtype == np.dtype(dtype)
    assert frame.samples.flags.c_contiguous
    assert (frame.sensor.layout.colours, frame.sensor.samples) == ("LLLL", SampleKind.RAW)


@pytest.mark.parametrize("planar", ["contig", "separate"])
def test_an_rgb_tiff_is_rendered(tmp_path, planar):
    """Colour TIFFs interleave their channels in the frame however they are stored."""
    stored = colour() if planar == "contig" else np.ascontiguousarray(np.moveaxis(colour(), -1, 0))
    tifffile.imwrite(tmp_path / "shot.tif", stored, photometric="rgb", planarconfig=planar)
    frame = decode(tmp_path / "shot.tif")
    assert np.array_equal(frame.samples.reshape(64, 80, 3), colour())
    assert frame.sensor.samples is SampleKind.RENDERED


def test_an_lzw_tiff_is_read_without_imagecodecs(tmp_path, monkeypatch):
    """The optional package is not needed for what Pillow can read; for the rest a sentence names it."""
    tifffile.imwrite(tmp_path / "grey.tif", mosaic(), compression="lzw")
    deep = np.dstack([mosaic()] * 3)
    tifffile.imwrite(tmp_path / "deep.tif", deep, compression="lzw", photometric="rgb")

    def missing(page, *args, **kwargs):
        raise ValueError("<COMPRESSION.LZW: 5> requires the 'imagecodecs' package")

    monkeypatch.setattr(tifffile.TiffPage, "asarray", missing)
    assert np.array_equal(decode(tmp_path / "grey.tif").samples, mosaic())
    with pytest.raises(DecodeError, match="imagecodecs"):
        decode(tmp_path / "deep.tif")


@pytest.mark.parametrize(
    ("samples", "options", "reason"),
    [
        (mosaic().astype(np.float32), {}, "whole numbers"),
        (mosaic().astype(np.int16), {}, "whole numbers"),
        (mosaic(), {"photometric": "miniswhite"}, "photometric 0"),
        (np.stack([mosaic()] * 3), {"photometric": "minisblack"}, "several pictures"),
    ],
)
def test_tiffs_that_are_no_single_readout_are_refused(tmp_path, samples, options, reason):
    """Fractions, signed numbers, negatives and stacks are not what a sensor delivered in one shot."""
    tifffile.imwrite(tmp_path / "shot.tif", samples, **options)
    with pytest.raises(DecodeError, match=reason):
        decode(tmp_path / "shot.tif")


def test_a_mosaic_tiff_that_libraw_refuses_keeps_its_pattern(tmp_path):
    """A TIFF/EP mosaic without camera identity is no raw file to LibRaw; its own tags name the colours."""
    write_dng(tmp_path / "a.tif", mosaic(), pattern=(2, 2, bytes([1, 2, 0, 1])), dng=False, make="", model="")
    frame = decode(tmp_path / "a.tif")
    assert frame.sensor.layout.colours == "GBRG"
    assert np.array_equal(frame.samples, mosaic())


# Camera raw


def test_a_dng_gives_its_samples_levels_and_identity(tmp_path):
    """LibRaw's samples are the stored ones; black and white level, body and settings come along."""
    write_dng(tmp_path / "shot", mosaic())
    frame = decode(tmp_path / "shot")
    assert np.array_equal(frame.samples, mosaic())
    assert frame.samples.dtype == np.uint16
    assert (frame.black_level_adu, frame.white_level_adu) == (256.0, 16383.0)
    assert (frame.sensor.make, frame.sensor.model, frame.sensor.serial) == ("Acme", "Acme One", "0042")
    assert (frame.info.exposure_s, frame.info.iso) == (0.5, 800.0)
    assert frame.info.taken_at == datetime(2026, 3, 4, 5, 6, 7)
    assert (frame.sensor.layout.colours, frame.sensor.samples) == ("RGGB", SampleKind.RAW)


def test_raw_samples_outlive_everything_else(tmp_path):
    """The array keeps LibRaw's buffer alive: many decoded frames hold their own samples."""
    frames = []
    for index in range(8):
        write_dng(tmp_path / f"{index}", mosaic() + np.uint16(index))
        frames.append(decode(tmp_path / f"{index}", ShotKind.LIGHT).samples)
    for index, samples in enumerate(frames):
        assert np.array_equal(samples, mosaic() + np.uint16(index))


@pytest.mark.parametrize("pattern", [RGGB, XTRANS], ids=["bayer", "x-trans"])
@pytest.mark.parametrize("margins", [(0, 0), (1, 0), (0, 1), (3, 5)])
def test_the_pattern_is_that_of_the_visible_area(tmp_path, pattern, margins):
    """With odd margins the visible area begins inside the pattern; LibRaw's own colours are the truth."""
    rawpy = pytest.importorskip("rawpy")
    samples = mosaic(66, 84)
    top, left = margins
    write_dng(tmp_path / "shot.dng", samples, pattern=pattern, active_area=(top, left, 66, 84))
    frame = decode(tmp_path / "shot.dng")
    with rawpy.imread(str(tmp_path / "shot.dng")) as raw:
        names = raw.color_desc.decode()
        period = frame.sensor.layout.period
        truth = "".join(names[index] for index in raw.raw_colors_visible[:period, :period].ravel())
        y, x = raw.sizes.top_margin, raw.sizes.left_margin
    assert frame.sensor.layout.colours == truth
    assert np.array_equal(frame.samples, samples[y:, x:])
    # DNG counts the pattern from the active area; LibRaw drops a row of a Bayer mosaic to begin evenly.
    written = "".join("RGB"[colour] for colour in pattern[2])
    assert truth[0] == written[(y - top) % period * period + (x - left) % period]
    assert frame.samples.flags.c_contiguous


def test_a_monochrome_raw_is_one_plane(tmp_path):
    """A sensor without colour filters has no pattern."""
    write_dng(tmp_path / "shot.dng", mosaic(), pattern=None)
    frame = decode(tmp_path / "shot.dng")
    assert frame.sensor.layout.colours == "L"
    assert np.array_equal(frame.samples, mosaic())


def test_a_linear_dng_is_refused(tmp_path):
    """Computed colours are no sensor samples."""
    write_dng(tmp_path / "shot.dng", np.dstack([mosaic()] * 3), pattern=None)
    with pytest.raises(DecodeError, match="computed colours"):
        decode(tmp_path / "shot.dng")


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.99])
def test_a_truncated_dng_is_refused(tmp_path, share):
    """A raw file that ends early is refused wherever it ends."""
    write_dng(tmp_path / "whole.dng", mosaic())
    content = (tmp_path / "whole.dng").read_bytes()
    with pytest.raises(DecodeError):
        decode(put(tmp_path / "cut.dng", content[: int(len(content) * share)]))


@pytest.mark.parametrize("share", [0.3, 0.5, 0.8])
def test_a_half_written_raw_is_refused(tmp_path, share):
    """LibRaw decodes a preallocated, zero-filled file without complaint; its last rows give it away."""
    write_dng(tmp_path / "whole.dng", mosaic())
    content = (tmp_path / "whole.dng").read_bytes()
    written = content[: int(len(content) * share)].ljust(len(content), b"\0")
    with pytest.raises(DecodeError, match="only half written"):
        decode(put(tmp_path / "half.dng", written))


@pytest.mark.parametrize(("first", "count"), [(0, 8), (20, 12), (52, 12)])
def test_a_raw_with_blocks_that_were_never_written_is_refused(tmp_path, first, count):
    """A crash leaves holes anywhere in a file; a few empty rows alone say nothing."""
    samples = mosaic()
    samples[first : first + count] = 0
    write_dng(tmp_path / "holes.dng", samples)
    with pytest.raises(DecodeError, match=f"{count}.* of 64 rows are all zero"):
        decode(tmp_path / "holes.dng")
    samples = mosaic()
    samples[first : first + 4] = 0
    write_dng(tmp_path / "few.dng", samples)
    decode(tmp_path / "few.dng")


@pytest.mark.parametrize(
    ("levels", "reason"),
    [
        ({"black": 4096}, "black is 4096, but half of the samples are below"),
        ({"white": 300}, "no sample is above 300, but they reach"),
        ({"black": 900, "white": 300}, "black is 900 and white 300"),
    ],
)
def test_a_raw_whose_samples_are_not_where_its_header_says_is_refused(tmp_path, levels, reason):
    """A damaged header, or the samples of another picture."""
    write_dng(tmp_path / "wrong.dng", mosaic(), **levels)
    with pytest.raises(DecodeError, match=reason):
        decode(tmp_path / "wrong.dng")


@pytest.mark.parametrize("levels", [{}, {"black": 0}, {"black": 512}, {"white": 4095}, {"white": 65535}])
def test_levels_that_may_be_are_taken(tmp_path, levels):
    """Black levels differ by ISO, and highlights go a little beyond the white level."""
    write_dng(tmp_path / "fine.dng", mosaic(), **levels)
    assert decode(tmp_path / "fine.dng").samples.shape == (64, 80)


def test_a_clipped_8_bit_dark_is_not_half_written(tmp_path):
    """In a dark clipped at zero whole rows are zero everywhere, at the end too."""
    rng = np.random.default_rng(1)
    samples = (rng.random((344, 408)) < 0.002).astype(np.uint8)
    samples[-4:] = 0
    tifffile.imwrite(tmp_path / "dark.tif", samples)
    assert decode(tmp_path / "dark.tif").kind is ShotKind.DARK


def test_a_clipped_sky_is_no_half_written_picture(tmp_path):
    """Constant rows of a rendered picture are burnt-out light."""
    samples = colour()
    samples[32:] = 255
    assert decode(put(tmp_path / "sky.jpg", jpeg(samples))).kind is ShotKind.LIGHT


def test_a_name_that_is_no_utf8_can_be_decoded(tmp_path):
    """File names are bytes; rawpy takes only those that are text."""
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/shot\xff.dng"))
    write_dng(tmp_path / "shot.dng", mosaic())
    (tmp_path / "shot.dng").rename(path)
    assert np.array_equal(decode(path).samples, mosaic())


def test_complaints_of_libraw_stay_inside(tmp_path):
    """Neither LibRaw nor a reader writes to standard error, and Python's own goes there as before."""
    write_dng(tmp_path / "whole.dng", mosaic())
    content = (tmp_path / "whole.dng").read_bytes()
    put(tmp_path / "cut.dng", content[:4000])
    put(tmp_path / "cut.tif", content[:300])
    program = (
        "import sys, pathlib\n"
        "from hotpixd.intake.decode import decode, DecodeError\n"
        "for name in sys.argv[1:]:\n"
        "    try: decode(pathlib.Path(name))\n"
        "    except DecodeError: pass\n"
        "sys.stderr.write('still here')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "cut.dng"), str(tmp_path / "cut.tif")],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"PYTHONPATH": str(Path(decode_module.__file__).parents[2])},
    )
    assert (done.stdout, done.stderr) == ("", "still here")


# FITS


def write_fits(path: Path, data: np.ndarray, **cards: object) -> Path:
    header = fits.Header()
    for keyword, value in cards.items():
        header[keyword.replace("_", "-")] = value
    fits.PrimaryHDU(data, header).writeto(path)
    return path


def test_a_fits_frame_tells_kind_settings_and_camera(tmp_path):
    """The keywords of camera programs arrive in the frame; DATE-OBS is UTC."""
    path = write_fits(
        tmp_path / "shot",
        mosaic(),
        IMAGETYP="Dark Frame",
        EXPTIME=30.0,
        GAIN=120,
        CCD_TEMP=-10.5,
        DATE_OBS="2026-01-02T03:04:05.5",
        INSTRUME="ZWO ASI533MM",
        ROWORDER="TOP-DOWN",
    )
    frame = decode(path)
    assert frame.kind is ShotKind.DARK
    assert (frame.info.exposure_s, frame.info.iso, frame.info.sensor_temp_c) == (30.0, 120.0, -10.5)
    assert frame.info.taken_at == datetime(2026, 1, 2, 3, 4, 5, 500000, UTC)
    assert frame.sensor.model == "ZWO ASI533MM"
    assert np.array_equal(frame.samples, mosaic())
    assert (frame.samples.dtype, frame.sensor.layout.colours) == (np.uint16, "LLLL")


@pytest.mark.parametrize(
    ("stated", "kind"),
    [
        ("Bias Frame", "dark"),
        ("DARK", "dark"),
        ("Light Frame", "light"),
        ("OBJECT", "light"),
        ("FLAT", "light"),
    ],
)
def test_imagetyp_decides_unless_the_caller_does(tmp_path, stated, kind):
    """The header says what the frame is; a caller who knows better is believed."""
    path = write_fits(tmp_path / "shot.fits", mosaic(), IMAGETYP=stated)
    assert decode(path).kind == kind
    assert decode(path, ShotKind.LIGHT).kind is ShotKind.LIGHT


@pytest.mark.parametrize("height", [64, 65])
@pytest.mark.parametrize("order", ["TOP-DOWN", "BOTTOM-UP", None])
@pytest.mark.parametrize("offsets", [(0, 0), (1, 0), (0, 1), (1, 1)])
def test_bayerpat_stays_right_when_rows_are_turned(tmp_path, height, order, offsets):
    """Whatever the row order and the offsets, each sample keeps the colour that the file gave it."""
    right, down = offsets
    stored = np.zeros((height, 80), np.uint16)
    for y in range(2):
        for x in range(2):
            stored[y::2, x::2] = 1000 + ord("RGGB"[(y + down) % 2 * 2 + (x + right) % 2])
    cards = {"BAYERPAT": "RGGB", "XBAYROFF": right, "YBAYROFF": down} | ({"ROWORDER": order} if order else {})
    frame = decode(write_fits(tmp_path / "shot.fits", stored, **cards))
    layout = frame.sensor.layout
    for index in range(4):
        assert (layout.plane(frame.samples, index) == 1000 + ord(layout.colours[index])).all()
    assert np.array_equal(frame.samples, stored if order == "TOP-DOWN" else stored[::-1])
    assert frame.samples.flags.c_contiguous


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int16, np.int32, np.float32])
def test_whole_numbers_of_any_type_are_accepted(tmp_path, dtype):
    """Camera programs store the same counts in many types."""
    samples = np.minimum(mosaic(), 250).astype(dtype)
    frame = decode(write_fits(tmp_path / "shot.fits", samples, ROWORDER="TOP-DOWN"))
    assert np.array_equal(frame.samples, samples)
    assert frame.samples.dtype == (np.uint8 if dtype == np.uint8 else np.uint16)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda d: d / 2 + 0.25, "fractions"),
        (lambda d: d - 2000.0, "not within"),
        (lambda d: d * np.nan, "fractions"),
    ],
)
def test_calibrated_fits_frames_are_refused(tmp_path, change, reason):
    """Fractions and negative values come from a calibration, not from a sensor."""
    path = write_fits(tmp_path / "shot.fits", change(mosaic().astype(np.float32)))
    with pytest.raises(DecodeError, match=reason):
        decode(path)


def test_a_fits_cube_of_three_planes_is_rendered(tmp_path):
    """Three planes are the colours of one picture."""
    frame = decode(
        write_fits(tmp_path / "shot.fits", np.moveaxis(colour(), -1, 0).astype(np.uint8), ROWORDER="TOP-DOWN")
    )
    assert frame.sensor.samples is SampleKind.RENDERED
    assert np.array_equal(frame.samples.reshape(64, 80, 3), colour())


def test_a_compressed_fits_image_is_found_behind_an_empty_header(tmp_path):
    """fpack puts the picture into the second unit."""
    units = fits.HDUList([fits.PrimaryHDU(), fits.CompImageHDU(mosaic())])
    units.writeto(tmp_path / "shot.fz")
    assert np.array_equal(decode(tmp_path / "shot.fz").samples, mosaic()[::-1])


def _pictures(folder: Path) -> dict[str, Path]:
    """Write one picture of every kind whose samples take their own way into memory."""
    grey, rgb = mosaic(48, 64), colour(48, 64)
    written = {
        "JPEG": put(folder / "a.jpg", jpeg(rgb)),
        "grey JPEG": put(folder / "b.jpg", jpeg(rgb[:, :, 0])),
        "PNG": put(folder / "c.png", png(rgb)),
        "DNG": folder / "d.dng",
        "DNG with margins": folder / "e.dng",
        "FITS": write_fits(folder / "f.fits", grey),
        "FITS, top down": write_fits(folder / "g.fits", grey, ROWORDER="TOP-DOWN"),
        "FITS cube": write_fits(folder / "h.fits", np.moveaxis(rgb, -1, 0)),
    }
    write_dng(written["DNG"], grey)
    write_dng(written["DNG with margins"], mosaic(60, 80), active_area=(2, 4, 58, 76))
    for name, samples, options in (
        ("TIFF", grey, {}),
        ("TIFF, big-endian", grey, {"byteorder": ">"}),
        ("TIFF in strips", grey, {"rowsperstrip": 7}),
        ("TIFF, deflated", grey, {"compression": "deflate"}),
        ("TIFF, predicted", grey, {"compression": "deflate", "predictor": True}),
        ("BigTIFF", grey, {"bigtiff": True}),
        ("colour TIFF", rgb, {"photometric": "rgb"}),
        ("planar TIFF", np.moveaxis(rgb, -1, 0).copy(), {"photometric": "rgb", "planarconfig": "separate"}),
    ):
        written[name] = folder / f"{name}.tif"
        tifffile.imwrite(written[name], samples, **options)
    return written


def test_samples_are_put_where_they_are_wanted_and_nowhere_else(tmp_path):
    """Once, whatever the format: a decoder's process is given memory one time."""
    for name, path in _pictures(tmp_path).items():
        given = []

        def place(shape, dtype, given=given):
            given.append(np.full(shape, 7, dtype))
            return given[-1]

        with path.open("rb", buffering=0) as file:
            frame = decode_file(file, None, place)
        (memory,) = given
        assert np.shares_memory(frame.samples, memory), name
        assert frame.samples.flags.c_contiguous, name
        assert frame.samples.size == memory.size, name
        there = decode(path)
        assert frame.sensor == there.sensor, name
        np.testing.assert_array_equal(frame.samples, there.samples, name)


def test_fits_without_astropy_names_what_to_install(tmp_path, monkeypatch):
    """The package for FITS is optional; the sentence says how to get it."""
    path = write_fits(tmp_path / "shot.fits", mosaic())
    monkeypatch.setitem(sys.modules, "astropy.io", None)
    with pytest.raises(DecodeError, match=r'pip install "hotpixd\[fits\]"'):
        decode(path)


# Anything else


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "empty"),
        (b"\0" * 5000, "begins with zeros"),
        (b"hello" * 100, "no picture"),
        (b"GIF89a" + b"\1" * 100, "GIF"),
        (b"\0\0\0\x18ftypheic" + b"\1" * 100, "HEIF"),
        (b"\0\0\0\x18ftypqt  " + b"\1" * 100, "video"),
    ],
)
def test_what_is_no_picture_is_refused_in_words(tmp_path, content, reason):
    """Each refusal says what the file is."""
    with pytest.raises(DecodeError, match=reason):
        decode(put(tmp_path / "x", content))


@pytest.mark.parametrize(("height", "width"), [(15, 80), (80, 15), (8, 8)])
def test_thumbnails_are_refused(tmp_path, height, width):
    """Below 16 pixels nothing is a camera's frame."""
    with pytest.raises(DecodeError, match=f"only {width} x {height}"):
        decode(put(tmp_path / "x", jpeg(colour(height, width))))


def test_planes_too_small_for_the_detection_window_are_refused(tmp_path):
    """Of an X-Trans mosaic of 30 rows each plane has five."""
    write_dng(tmp_path / "x", mosaic(30, 90), pattern=XTRANS)
    with pytest.raises(DecodeError, match="only 90 x 30"):
        decode(tmp_path / "x")


def test_a_missing_file_is_not_bad_content(tmp_path):
    """Disk errors are the caller's to retry, not a verdict on the shot."""
    with pytest.raises(FileNotFoundError):
        decode(tmp_path / "gone.dng")
    with pytest.raises(IsADirectoryError):
        decode(tmp_path)


def _seeds() -> list[bytes]:
    seeds = [
        jpeg(colour(), exif=exif({0x829A: 0.5, 0x9003: "2026:01:01 00:00:00"})),
        png(mosaic()),
        png(colour()),
    ]
    for options in ({}, {"compression": "zlib"}, {"bigtiff": True}):
        out = io.BytesIO()
        tifffile.imwrite(out, mosaic(), **options)
        seeds.append(out.getvalue())
    out = io.BytesIO()
    fits.PrimaryHDU(mosaic()).writeto(out)
    return [*seeds, out.getvalue()]


SEEDS = _seeds()


@settings(max_examples=300, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    seed=st.integers(0, len(SEEDS)),
    changes=st.lists(st.tuples(st.integers(0, 1500), st.integers(0, 255)), max_size=12),
    length=st.one_of(st.none(), st.integers(0, 12000)),
)
def test_damaged_files_raise_nothing_but_decode_error(tmp_path_factory, seed, changes, length):
    """Whatever is cut off or overwritten, the answer is a frame or a sentence."""
    path = tmp_path_factory.getbasetemp() / "damaged"
    if seed == len(SEEDS):
        write_dng(path, mosaic())
        content = bytearray(path.read_bytes())
    else:
        content = bytearray(SEEDS[seed])
    for at, value in changes:
        content[at % len(content)] = value
    path.write_bytes(content[:length])
    try:
        frame = decode(path)
    except DecodeError as error:
        assert str(error)
        assert "damaged\n" not in str(error)
    else:
        assert frame.samples.shape == frame.sensor.layout.shape
        assert frame.samples.dtype.name == frame.sensor.dtype


@settings(max_examples=100, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    start=st.sampled_from([b"", b"II*\0", b"MM\0*", b"\xff\xd8\xff", b"SIMPLE  =", b"FUJIFILM", b"IIU\0"]),
    rest=st.binary(max_size=400),
)
def test_random_bytes_raise_nothing_but_decode_error(tmp_path_factory, start, rest):
    """A known beginning is no promise."""
    path = put(tmp_path_factory.getbasetemp() / "random", start + rest)
    with pytest.raises(DecodeError):
        decode(path)


def test_importing_the_decoder_loads_no_reader():
    """Readers are loaded with the first file that needs them."""
    program = (
        "import sys, hotpixd.intake.decode\n"
        "print([m for m in ('rawpy', 'simplejpeg', 'PIL', 'tifffile', 'astropy') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"PYTHONPATH": str(Path(decode_module.__file__).parents[2])},
    )
    assert done.stdout.strip() == "[]"


def test_large_buffers_can_be_kept():
    """On glibc the allocator takes the setting; elsewhere the answer is no."""
    program = "from hotpixd.intake.decode import keep_large_buffers; print(keep_large_buffers())"
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"PYTHONPATH": str(Path(decode_module.__file__).parents[2])},
    )
    assert done.stdout.strip() in ("True", "False")
    assert callable(keep_large_buffers)


# Real files


@needs_data
@pytest.mark.parametrize("name", ["broken", "misnamed_jpeg_as_nef"])
def test_real_broken_and_edited_files_are_refused(name):
    """Headers of eight makes cut short, and JPEGs that Capture NX wrote under a raw name."""
    for path in sorted((SHARED / "raw_misc" / name).iterdir()):
        with pytest.raises(DecodeError) as caught:
            decode(path)
        assert path.name not in str(caught.value)


@needs_data
def test_a_real_raw_opens_and_a_real_linear_dng_does_not():
    """Kodak's mosaic is used, Adobe's reduced colour DNG is not."""
    frame = decode(SHARED / "raw_misc" / "ok" / "RAW_KODAK_DC50.KDC")
    assert frame.sensor.layout.shape == (512, 768)
    with pytest.raises(DecodeError, match="computed colours"):
        decode(SHARED / "raw_misc" / "ok" / "canon_eos_6d_linear.dng")


@needs_data
def test_the_same_frames_in_two_containers_have_the_same_samples():
    """The Flea3's TIFF and DNG differ in type and names, not in samples."""
    for dng in sorted((SHARED / "flea3_d1_dng_derived" / "darks").iterdir())[:3]:
        tiff = SHARED / "flea3_d1_bayer" / "darks" / dng.with_suffix(".tif").name
        raw = decode(dng)
        assert np.array_equal(raw.samples, decode(tiff).samples)
        assert (raw.sensor.layout.colours, raw.sensor.serial) == ("GBRG", "14447582")


@needs_data
def test_straight_camera_jpegs_are_accepted_and_edited_ones_are_not():
    """All of the 1D Mark IV pass; Noise Ninja and Nikon Transfer are named."""
    for path in sorted((SHARED / "canon_1d4_left").glob("*.JPG")):
        assert decode(path).kind is ShotKind.LIGHT
    refused = {}
    for path in sorted((SHARED / "exif_zoo_jpeg").glob("*.jpg")):
        try:
            decode(path)
        except DecodeError as error:
            refused[path.name] = str(error)
    assert refused.keys() == {"Canon_EOS-1DS_after_Noise_Ninja.jpg", "Nikon_D70.jpg"}
    assert "Noise Ninja 2" in refused["Canon_EOS-1DS_after_Noise_Ninja.jpg"]


@needs_data
def test_a_bias_frame_of_a_cooled_camera_is_dark():
    """MaxIm DL says "Bias Frame"; unsigned 16 bit come through BZERO."""
    frame = decode(SHARED / "umd_st8_fits" / "calib-001-bi.fit")
    assert frame.kind is ShotKind.DARK
    assert frame.sensor.dtype == "uint16"
    assert frame.info.sensor_temp_c == pytest.approx(0.189, abs=0.001)
