"""What files say about their camera and shot, in the places where makers put it."""

from __future__ import annotations

import io
import struct
from datetime import UTC, datetime, timedelta, timezone

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hotpixd.intake import metadata
from hotpixd.intake.metadata import Metadata, clean_serial
from pictures import SHARED, colour, exif, jpeg, tiff_ifd

needs_data = pytest.mark.skipif(not SHARED.is_dir(), reason=f"the real frames are not at {SHARED}")


def text(value: str) -> tuple[int, int, bytes]:
    data = value.encode() + b"\0"
    return 2, len(data), data


def longs(*values: int) -> tuple[int, int, bytes]:
    return 4, len(values), struct.pack(f"<{len(values)}I", *values)


def shorts(*values: int) -> tuple[int, int, bytes]:
    return 3, len(values), struct.pack(f"<{len(values)}H", *values)


def with_maker_note(make: str, model: str, note: bytes) -> bytes:
    """Return a TIFF whose Exif directory holds `note` at offset 512."""
    first = tiff_ifd([(0x10F, *text(make)), (0x110, *text(model)), (0x8769, *longs(256))], 8)
    inner = tiff_ifd([(0x927C, 7, len(note), note)], 256)
    content = b"II*\0" + struct.pack("<I", 8) + first
    content = content.ljust(256, b"\0") + inner[: 2 + 12 + 4]
    content = content.ljust(512, b"\0") + note
    return content.replace(
        struct.pack("<HHII", 0x927C, 7, len(note), 274), struct.pack("<HHII", 0x927C, 7, len(note), 512)
    )


def test_a_jpeg_tells_make_model_serial_and_settings():
    """The common tags arrive with blanks and NULs cut off."""
    block = exif(
        {0x829A: 1 / 60, 0x8827: 200, 0xA431: "  X-12 \0", 0xA002: 80, 0xA003: 64},
        {0x010F: "Acme Corp.  \0", 0x0110: " One", 0x0131: "Ver.1.00 "},
    )
    about = metadata.from_bytes(jpeg(colour(), exif=block))
    assert about == Metadata(
        make="Acme Corp.",
        model="One",
        serial="X-12",
        exposure_s=pytest.approx(1 / 60),
        iso=200.0,
        software="Ver.1.00",
        width=80,
        height=64,
    )


@pytest.mark.parametrize(
    ("zone", "expected"),
    [
        (None, None),
        ("+02:00", timezone(timedelta(hours=2))),
        ("-07:00", timezone(-timedelta(hours=7))),
        ("   :  ", None),
        ("+99:00", None),
    ],
)
def test_the_time_has_subseconds_and_a_zone_if_the_file_names_one(zone, expected):
    """Without OffsetTimeOriginal the camera's clock is of no known zone."""
    entries = {0x9003: "2026:02:03 04:05:06", 0x9291: "583"} | ({0x9011: zone} if zone else {})
    about = metadata.from_bytes(jpeg(colour(), exif=exif(entries)))
    assert about.taken_at == datetime(2026, 2, 3, 4, 5, 6, 583000, expected)


@pytest.mark.parametrize("stamp", ["0000:00:00 00:00:00", "", "    :  :     :  :  ", "2026:13:40 00:00:00"])
def test_a_clock_that_was_never_set_is_no_time(stamp):
    """Filler in the time tags is unknown, not an error."""
    assert metadata.from_bytes(jpeg(colour(), exif=exif({0x9003: stamp}))).taken_at is None


@pytest.mark.parametrize(
    ("stamp", "zone"),
    [
        ("0001:01:01 00:00:00", "+09:00"),
        ("9999:12:31 23:59:59", "-05:00"),
        ("0001:01:01 00:00:00", None),
        ("1825:12:31 23:59:59", None),
    ],
)
def test_a_time_that_cannot_be_is_no_time(stamp, zone):
    """A shot of the year 1 east of Greenwich has no time in UTC, and ended the daemon at each start."""
    entries = {0x9003: stamp} | ({0x9011: zone} if zone else {})
    assert metadata.from_bytes(jpeg(colour(), exif=exif(entries))).taken_at is None
    fits = stamp.replace(":", "-", 2).replace(" ", "T") + (zone or "")
    assert metadata.from_fits_header({"DATE-OBS": fits}).taken_at is None


def test_a_credible_time_is_taken_after_one_that_cannot_be():
    """The other time tags of the file may be right, and old scans carry old dates."""
    entries = {0x9003: "0001:01:01 00:00:00", 0x9004: "1826:07:01 12:00:00", 0x9012: "+14:00"}
    taken_at = metadata.from_bytes(jpeg(colour(), exif=exif(entries))).taken_at
    assert taken_at is not None
    assert taken_at.astimezone(UTC) == datetime(1826, 6, 30, 22, tzinfo=UTC)


@pytest.mark.parametrize(
    ("written", "number"),
    [
        ("No= 00002539", "00002539"),
        ("NO= 00002539        ", "00002539"),
        ("S/N: 77", "77"),
        ("KCXHZ81300092", "KCXHZ81300092"),
        ("Nova7", "Nova7"),
        ("000K79K13272", "000K79K13272"),
        ("0000000", None),
        ("None", None),
        ("  ", None),
        (None, None),
    ],
)
def test_serial_numbers_lose_their_label(written, number):
    """The label is not part of the number, and filler is no number."""
    assert clean_serial(metadata.clean_text(written)) == number


def test_iso_beyond_16_bit_is_read_from_the_newer_tag():
    """65535 in the old tag says that the value is elsewhere."""
    block = exif({0x8827: 65535, 0x8832: 102400})
    assert metadata.from_bytes(jpeg(colour(), exif=block)).iso == 102400.0


def test_exposure_is_taken_from_the_apex_value_if_nothing_else_is_there():
    """ShutterSpeedValue 3 is an eighth of a second."""
    block = exif({0x9201: 3.0})
    assert metadata.from_bytes(jpeg(colour(), exif=block)).exposure_s == pytest.approx(0.125)


@pytest.mark.parametrize(
    ("model", "reading", "temperature"),
    [("Canon EOS R", 157, 29.0), ("Canon EOS 20D", 0, None), ("Canon PowerShot G2", 157, None)],
)
def test_canon_hides_serial_and_temperature_in_its_note(model, reading, temperature):
    """ShotInfo holds the temperature plus 128 on EOS bodies, 0 where it was not measured."""
    shot_info = shorts(*[0] * 12, reading, 0)
    note = tiff_ifd([(0x0004, *shot_info), (0x000C, *longs(1931400184))], 512)
    about = metadata.from_bytes(with_maker_note("Canon", model, note))
    assert (about.serial, about.sensor_temp_c) == ("1931400184", temperature)


def test_nikon_hides_its_serial_behind_a_header_of_its_own():
    """Offsets of Nikon's note count from the TIFF header inside it."""
    note = b"Nikon\0\x02\x10\0\0" + b"II*\0" + struct.pack("<I", 8)
    note += tiff_ifd([(0x0002, *shorts(0, 640)), (0x001D, *text("No= 3002539"))], 8)
    about = metadata.from_bytes(with_maker_note("NIKON CORPORATION", "NIKON D850", note))
    assert (about.serial, about.iso) == ("3002539", 640.0)


def test_fuji_and_panasonic_and_olympus_notes_give_the_body():
    """Each maker lays out its note in its own way."""
    fuji = b"FUJIFILM" + struct.pack("<I", 12) + tiff_ifd([(0x0010, *text("FPX 123456"))], 12)
    assert metadata.from_bytes(with_maker_note("FUJIFILM", "X-T3", fuji)).serial == "FPX 123456"
    panasonic = b"Panasonic\0\0\0" + tiff_ifd([(0x0025, *text("F541207070157"))], 512 + 12)
    assert metadata.from_bytes(with_maker_note("Panasonic", "DC-G9", panasonic)).serial == "F541207070157"
    olympus = b"OLYMPUS\0II\x03\0" + tiff_ifd([(0x2010, *longs(64))], 12)
    olympus = olympus.ljust(64, b"\0") + tiff_ifd([(0x0101, *text("BHP242330"))], 64)
    assert metadata.from_bytes(with_maker_note("OLYMPUS", "E-M1", olympus)).serial == "BHP242330"


def test_fits_keywords_are_read():
    """The spellings of several programs; DATE-OBS is UTC by the standard."""
    about = metadata.from_fits_header(
        {
            "EXPOSURE": "2.5",
            "GAIN": 100,
            "CCD-TEMP": -9.9,
            "DATE-OBS": "2026-01-02T03:04:05",
            "CAMSERNO": 55.0,
        }
        | {"INSTRUME": "ASI", "SERIALNO": 1234}
    )
    assert (about.exposure_s, about.iso, about.sensor_temp_c, about.model) == (2.5, 100.0, -9.9, "ASI")
    assert about.taken_at == datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    start=st.sampled_from(
        [
            b"II*\0\x08\0\0\0",
            b"MM\0*\0\0\0\x08",
            b"IIU\0\x08\0\0\0",
            b"\xff\xd8\xff\xe1\x01\0Exif\0\0II*\0\x08\0\0\0",
            b"FUJIFILM",
            b"\0\0\0\x18ftypcrx ",
            b"\x89PNG\r\n\x1a\n",
        ]
    ),
    rest=st.binary(max_size=600),
)
def test_bytes_without_sense_give_metadata_without_content(start, rest):
    """A shot without readable metadata is still a shot."""
    assert isinstance(metadata.from_bytes(start + rest), Metadata)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(changes=st.lists(st.tuples(st.integers(0, 1200), st.integers(0, 255)), min_size=1, max_size=20))
def test_damaged_maker_notes_do_not_hurt(changes):
    """Offsets that point anywhere are followed nowhere."""
    note = tiff_ifd([(0x0004, *shorts(*range(20))), (0x000C, *longs(7))], 512)
    content = bytearray(with_maker_note("Canon", "Canon EOS R", note))
    for at, value in changes:
        content[at % len(content)] = value
    assert isinstance(metadata.from_bytes(bytes(content)), Metadata)


@needs_data
@pytest.mark.parametrize(
    ("name", "serial"),
    [
        ("Canon_EOS_20D_1.jpg", "330113864"),
        ("Canon_EOS_20D_3.jpg", "320116738"),
        ("Canon_PowerShot_S40_2.jpg", None),
        ("Nikon_D70.jpg", "00002539"),
        ("Issue_177.jpg", None),
    ],
)
def test_real_bodies_are_told_apart(name, serial):
    """Two bodies of one model differ by their serial; those that write none stay unknown."""
    with (SHARED / "exif_zoo_jpeg" / name).open("rb") as file:
        assert metadata.from_file(file).serial == serial


@needs_data
def test_a_canon_file_in_each_container_is_read():
    """JPEG and CR3 hold the same directories in different boxes."""
    with (SHARED / "canon_1d4_left" / "calib_1.JPG").open("rb") as file:
        about = metadata.from_file(file)
    assert (about.serial, about.sensor_temp_c, about.iso) == ("1931400184", 25.0, 200.0)
    assert about.taken_at == datetime(2013, 3, 29, 16, 15, 17, 970000)
    with (SHARED / "raw_misc" / "broken" / "fixture.cr3").open("rb") as file:
        about = metadata.from_file(file)
    assert (about.model, about.serial, about.sensor_temp_c) == ("Canon EOS R", "085023000606", 29.0)


@needs_data
def test_common_tags_agree_with_exifread():
    """A general reader finds the same make, model, exposure and ISO in every real file."""
    exifread = pytest.importorskip("exifread")
    for path in sorted((SHARED / "exif_zoo_jpeg").glob("*.jpg")):
        content = path.read_bytes()[: 1 << 18]
        tags = exifread.process_file(io.BytesIO(content), details=False)
        about = metadata.from_bytes(content)
        assert about.make == " ".join(str(tags["Image Make"]).split())
        assert about.model == " ".join(str(tags["Image Model"]).split())
        assert about.exposure_s == pytest.approx(float(tags["EXIF ExposureTime"].values[0]))
        if "EXIF ISOSpeedRatings" in tags:
            assert about.iso == tags["EXIF ISOSpeedRatings"].values[0]
