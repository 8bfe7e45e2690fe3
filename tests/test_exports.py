"""Maps for other programs: each format holds the pixels of the map and no others, and reads back as the same ones."""

from __future__ import annotations

import io
import json
import string
import struct
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from astropy.io import fits
from astropy.table import Table
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from hotpixd.store.checkpoint import Generation
from hotpixd.views.exports import FORMATS, ExportError, Extras, rawtherapee_name
from hotpixd.views.imports import READERS, ListError, read_list
from hotpixd.views.maps import DefectMap, Rows, defect_map
from hotpixd.views.opcodes import Dng
from pictures import SHARED

NOW = "2026-11-24T18:00:00Z"
SENSOR: dict[str, Any] = {
    "id": "x", "make": "Canon", "model": "Canon EOS R6", "serial": "0123", "samples": "raw", "frames": 12,
    "frames_counted": 12, "colours": "RGGB",
}  # fmt: skip


def found(x: int, y: int, **changes: Any) -> dict[str, Any]:
    """Return an entry of `defects`."""
    plain = {
        "x": x, "y": y, "colour": "R", "kind": "hot", "state": "stable", "certainty": 1.0, "log_e": 40.0,
        "excess_adu": 800.0, "excess_sigma": 33.0, "dark_current_adu_per_s": 27.1, "first_seen": "2026-11-21T20:00:03Z",
        "stable_since": "2026-11-21T20:00:41Z",
    }  # fmt: skip
    return {**plain, **changes}


def said(x: int, y: int) -> dict[str, Any]:
    """Return an entry of `declared`."""
    return {"x": x, "y": y, "source": "mark", "declared_at": NOW}


def map_of(
    width: int, height: int, points: Any, rows: Rows = Rows.PICTURE, declared: Any = (), **changes: Any
) -> DefectMap:
    """Return a map with hot pixels at some points."""
    answer = {
        **SENSOR, **changes, "width": width, "height": height, "defects": [found(x, y) for x, y in points],
        "declared": [said(x, y) for x, y in declared],
    }  # fmt: skip
    return defect_map(answer, NOW, rows=rows)


@st.composite
def maps(draw: st.DrawFn) -> DefectMap:
    """Draw a map of any size, with pixels anywhere; corners and edges more often than by chance."""
    width, height = draw(st.integers(7, 60)), draw(st.integers(7, 60))

    def side(length: int) -> st.SearchStrategy[int]:
        return st.sampled_from([0, length - 1]) | st.integers(0, length - 1)

    # Fewer than half of all pixels: a mask with more is taken for a picture.
    points = draw(st.lists(st.tuples(side(width), side(height)), max_size=20, unique=True))
    split = draw(st.integers(0, len(points)))
    return map_of(width, height, points[:split], draw(st.sampled_from(Rows)), points[split:])


@pytest.mark.parametrize("name", sorted(READERS))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(about=maps())
def test_what_is_exported_is_imported_as_the_same_pixels(name: str, about: DefectMap, tmp_path: Path):
    """With every way of storing rows; and without being told the format, but for an empty list."""
    path = tmp_path / "list"
    path.write_bytes(FORMATS[name].make(about, Extras()))
    pixels = tuple((p.x, p.y) for p in about.pixels)
    assert read_list(path, about.width, about.height, name, about.rows).pixels == pixels
    if pixels:
        told = read_list(path, about.width, about.height, None, about.rows)
        assert told.pixels == pixels
        assert told.format == name


@settings(max_examples=60, deadline=None)
@given(about=maps(), order=st.sampled_from("<>"), margins=st.tuples(*[st.integers(0, 5)] * 4), below=st.booleans())
def test_a_list_in_a_dng_reads_back_as_the_same_pixels(about, order, margins, below):
    """Counted from the first stored sample; nothing else of the file is changed but one pointer to a directory."""
    left, top, right, bottom = margins
    size = about.width + left + right, about.height + top + bottom
    active = top, left, top + about.height, left + about.width
    before = dng_of(*size, active, order=order, below=below)
    after = FORMATS["dng"].make(about, Extras(dng=dng_file(before)))
    assert points_in(after) == [(p.x + left, p.y + top) for p in about.pixels]
    changed = [at for at, (a, b) in enumerate(zip(before, after[: len(before)], strict=True)) if a != b]
    assert len(changed) <= 4
    assert not changed or changed[-1] - changed[0] < 4


# --- a DNG, written by hand: whatever order of bytes, with the raw picture in IFD 0 or below it


def dng_of(
    width: int,
    height: int,
    active: tuple[int, int, int, int] | None,
    *,
    order: str = "<",
    below: bool = False,
    pattern: bytes = bytes((0, 1, 1, 2)),
    opcodes: bytes = b"",
    version: bytes = bytes((1, 4, 0, 0)),
    serial: str = "0123",
) -> bytes:
    """Return a DNG whose samples count up, in IFD 0 or in one below it."""
    samples = np.arange(width * height, dtype=f"{order}u2").tobytes()
    out = bytearray((b"II" if order == "<" else b"MM") + struct.pack(f"{order}HI", 42, 0))

    def put(content: bytes) -> int:
        out.extend(bytes(len(out) % 2))
        out.extend(content)
        return len(out) - len(content)

    def entry(tag: int, kind: int, count: int, data: bytes) -> bytes:
        value = data.ljust(4, b"\0") if len(data) <= 4 else struct.pack(f"{order}I", put(data))
        return struct.pack(f"{order}HHI", tag, kind, count) + value

    def longs(tag: int, *values: int) -> bytes:
        return entry(tag, 4, len(values), struct.pack(f"{order}{len(values)}I", *values))

    def shorts(tag: int, *values: int) -> bytes:
        return entry(tag, 3, len(values), struct.pack(f"{order}{len(values)}H", *values))

    def text(tag: int, value: str) -> bytes:
        return entry(tag, 2, len(value) + 1, value.encode() + b"\0")

    def directory(entries: list[bytes]) -> int:
        ordered = sorted(entries, key=lambda e: struct.unpack(f"{order}H", e[:2]))
        return put(struct.pack(f"{order}H", len(ordered)) + b"".join(ordered) + bytes(4))

    raw = [
        longs(254, 0), longs(256, width), longs(257, height), shorts(258, 16), shorts(259, 1), shorts(262, 32803),
        longs(273, put(samples)), shorts(277, 1), longs(278, height), longs(279, len(samples)), shorts(33421, 2, 2),
        entry(33422, 1, 4, pattern),
    ]  # fmt: skip
    if active is not None:
        raw.append(longs(50829, *active))
    if opcodes:
        raw.append(entry(51008, 7, len(opcodes), opcodes))
    about = [text(271, "Canon"), text(272, "Canon EOS R6"), entry(50706, 1, 4, version), text(50735, serial)]
    at = directory([*about, longs(254, 1), longs(330, directory(raw))]) if below else directory([*about, *raw])
    struct.pack_into(f"{order}I", out, 4, at)
    return bytes(out)


def dng_file(content: bytes) -> Any:
    """Return something that is read as a file would be."""

    class Held:
        def read_bytes(self) -> bytes:
            return content

    return Held()


def opcodes_in(content: bytes) -> list[tuple[int, bytes]]:
    """Return id and data of the opcodes of a DNG, as tifffile finds them and the specification has them."""
    with tifffile.TiffFile(io.BytesIO(content)) as file:
        pages = [page for top in file.pages for page in (top, *(top.pages or ()))]
        (page,) = (page for page in pages if page.tags[254].value == 0)
        assert page.tags[51008].dtype == tifffile.DATATYPE.UNDEFINED
        data = bytes(page.tags[51008].value)
    (count,) = struct.unpack_from(">I", data)
    at, found = 4, []
    for _ in range(count):
        number, _, _, size = struct.unpack_from(">IIII", data, at)
        found.append((number, data[at + 16 : at + 16 + size]))
        at += 16 + size
    assert at == len(data)
    return found


def points_in(content: bytes) -> list[tuple[int, int]]:
    """Return x, y of the bad pixels that a DNG lists."""
    number, data = opcodes_in(content)[-1]
    phase, points, rectangles = struct.unpack_from(">III", data)
    assert (number, rectangles, phase) == (5, 0, phase % 4)
    assert len(data) == 12 + 8 * points
    numbers = struct.unpack_from(f">{2 * points}I", data, 12)
    return list(zip(numbers[1::2], numbers[::2], strict=True))


def test_opcodes_that_are_there_stay():
    """The list comes after them."""
    before = struct.pack(">I", 1) + struct.pack(">IIII", 9, 0x01030000, 0, 4) + b"gain"
    content = dng_of(30, 20, (2, 4, 18, 28), opcodes=before)
    after = FORMATS["dng"].make(map_of(24, 16, [(0, 0), (23, 15)]), Extras(dng=dng_file(content)))
    first, _ = opcodes_in(after)
    assert first == (9, b"gain")
    assert points_in(after) == [(4, 2), (27, 17)]
    # And again: a copy of a copy.
    again = FORMATS["dng"].make(map_of(24, 16, [(5, 6)]), Extras(dng=dng_file(after)))
    assert [number for number, _ in opcodes_in(again)] == [9, 5, 5]


def test_an_older_dng_says_that_it_is_of_the_version_that_has_opcodes():
    """Else a reader may not look for them."""
    content = dng_of(24, 16, None, version=bytes((1, 1, 0, 0)))
    after = FORMATS["dng"].make(map_of(24, 16, [(0, 0)]), Extras(dng=dng_file(content)))
    with tifffile.TiffFile(io.BytesIO(after)) as file:
        assert bytes(file.pages.first.tags[50706].value) == bytes((1, 3, 0, 0))
        assert np.array_equal(file.pages.first.asarray().ravel(), np.arange(24 * 16))


@pytest.mark.parametrize(
    ("pattern", "left", "phase"),
    [
        ((1, 0, 2, 1), 0, 0), ((0, 1, 1, 2), 0, 1), ((2, 1, 1, 0), 0, 2), ((1, 2, 0, 1), 0, 3),
        # The pattern is told from the active area's corner: one column of margin turns RG into GR.
        ((0, 1, 1, 2), 1, 0), ((1, 0, 2, 1), 1, 1),
    ],
)  # fmt: skip
def test_the_phase_is_that_of_the_first_stored_sample(pattern, left, phase):
    """By the specification: 0 is green in a red row, 1 red, 2 blue, 3 green in a blue row."""
    content = dng_of(24 + left, 16, (0, left, 16, 24 + left), pattern=bytes(pattern))
    after = FORMATS["dng"].make(map_of(24, 16, [(0, 0)]), Extras(dng=dng_file(content)))
    assert struct.unpack_from(">I", opcodes_in(after)[-1][1]) == (phase,)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "no DNG"),
        (b"II*\0\xff\xff\0\0", "damaged"),
        (dng_of(30, 16, None), "30x16 pixels, the sensor 24x16"),
        (dng_of(24, 16, None, serial="9"), "serial number is 9, the sensor's 0123"),
        (dng_of(24, 16, None, opcodes=b"x" * 10)[:-30], "damaged"),
    ],
)
def test_a_file_that_cannot_get_a_list_is_refused(content, reason):
    """With a sentence that says why."""
    with pytest.raises(ExportError, match=reason):
        FORMATS["dng"].make(map_of(24, 16, [(0, 0)]), Extras(dng=dng_file(content)))


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_a_damaged_dng_is_refused_or_read_but_never_a_crash(data):
    """Any one byte of it is any other, or its end is lost."""
    content = bytearray(dng_of(24, 16, (0, 0, 16, 24), below=data.draw(st.booleans())))
    at = data.draw(st.integers(0, len(content) - 1))
    content[at] = data.draw(st.integers(0, 255))
    cut = bytes(content[: data.draw(st.just(len(content)) | st.integers(0, len(content)))])
    try:
        FORMATS["dng"].make(map_of(24, 16, [(0, 0)]), Extras(dng=dng_file(cut)))
    except ExportError as error:
        assert "cannot get a list" in str(error)


# --- what is on a map


def test_states_and_strength_choose_what_is_on_a_map():
    """Warm ones are apart from the other stable ones; declared ones are on it whatever was found there."""
    entries = [
        found(0, 0), found(1, 0, kind="warm", excess_sigma=2.0), found(2, 0, state="candidate"),
        found(3, 0, state="recovered"), found(4, 0, kind="dead", excess_sigma=-8.0, excess_adu=-90.0),
    ]  # fmt: skip
    answer = {**SENSOR, "width": 9, "height": 9, "defects": entries, "declared": [said(2, 0), said(8, 8)]}

    def chosen(**options: Any) -> list[tuple[int, int]]:
        return [(p.x, p.y) for p in defect_map(answer, NOW, **options).pixels]

    assert chosen(declared=False) == [(0, 0), (1, 0), (4, 0)]
    assert chosen(declared=False, states=["stable"]) == [(0, 0), (4, 0)]
    assert chosen(declared=False, states=["candidate", "recovered"]) == [(2, 0), (3, 0)]
    assert chosen(declared=False, least_sigma=5.0) == [(0, 0), (4, 0)]
    assert chosen(least_sigma=100.0) == [(2, 0), (8, 8)]
    assert chosen() == [(0, 0), (1, 0), (2, 0), (4, 0), (8, 8)]
    assert [p.kind for p in defect_map(answer, NOW).pixels] == ["hot", "warm", "declared", "dead", "declared"]


def test_samples_of_one_pixel_are_one_pixel_of_a_map():
    """A rendered picture has three."""
    entries = [found(3, 2, colour="R"), found(3, 2, colour="B", excess_sigma=50.0, kind="stuck")]
    answer = {**SENSOR, "width": 9, "height": 9, "defects": entries, "declared": [said(3, 2)]}
    (pixel,) = defect_map(answer, NOW).pixels
    assert pixel.row["colour"] == "RB"
    assert (pixel.kind, pixel.row["source"]) == ("stuck", "mark")


def test_no_defects_make_lists_that_hold_none():
    """The control: of every format, and not one of them fails."""
    about = map_of(40, 30, [])
    for name in READERS:
        content = FORMATS[name].make(about, Extras())
        path = Path("/dev/null") if not content else None
        if path is None and name not in ("fits-mask", "png-mask", "ecsv", "json"):
            lines = [line for line in content.decode().splitlines() if not line.startswith("#")]
            assert lines == (["x,y," + ",".join(lines[0].split(",")[2:])] if name == "csv" else [])
    with Image.open(io.BytesIO(FORMATS["overlay"].make(about, Extras()))) as picture:
        assert not np.asarray(picture).any()


# --- the formats, letter by letter

CORNERS = [(0, 0), (39, 0), (0, 29), (39, 29), (5, 7)]


def lines_of(name: str, rows: Rows = Rows.PICTURE, **extras: Any) -> list[str]:
    """Return the lines of a format that are no comments, for hot pixels in the corners and one dead one."""
    about = map_of(40, 30, CORNERS[:-1], rows)
    answer = {**about.sensor, "defects": [*(found(x, y) for x, y in CORNERS[:-1]), found(5, 7, kind="dead")]}
    content = FORMATS[name].make(defect_map(answer, NOW, rows=rows), Extras(**extras))
    assert all(len(line) < 128 for line in content.decode("ascii").splitlines())
    return [line for line in content.decode().splitlines() if not line.startswith("#")]


def test_the_lists_are_as_their_programs_read_them():
    """Syntax and coordinates of each, where the files begin with the top row."""
    assert lines_of("dcraw") == ["0 0 0", "39 0 0", "5 7 0", "0 29 0", "39 29 0"]
    assert lines_of("dcraw", camera_clock=True)[0] == "0 0 1795291203"
    assert lines_of("rawtherapee") == ["0 0", "39 0", "5 7", "0 29", "39 29"]
    assert lines_of("siril") == ["P 0 0 H", "P 39 0 H", "P 5 7 C", "P 0 29 H", "P 39 29 H"]
    assert lines_of("pixinsight") == ["Col 0 0 0", "Col 39 0 0", "Col 5 7 7", "Col 0 29 29", "Col 39 29 29"]
    assert lines_of("phd2") == ["0 0", "39 0", "5 7", "0 29", "39 29"]


def test_where_files_hold_their_rows_otherwise_lists_follow():
    """A row 7 from the top is number 22 of a FITS file; Siril counts from the last row of whatever FITS it is."""
    assert "5 22" in lines_of("phd2", Rows.FITS)
    assert "5 7" in lines_of("phd2", Rows.FITS_TOP_DOWN)
    assert "Col 5 22 22" in lines_of("pixinsight", Rows.FITS)
    assert "P 5 7 C" in lines_of("siril", Rows.FITS)
    assert "P 5 22 C" in lines_of("siril", Rows.FITS_TOP_DOWN)
    assert "5 7 0" in lines_of("dcraw", Rows.FITS)


def test_phd2_s_parser_finds_the_pixels():
    """As its source has it: trims, skips what begins with #, takes the first two words of a line as numbers."""
    content = FORMATS["phd2"].make(map_of(40, 30, CORNERS), Extras()).decode()
    assert content.startswith("# PHD2 Defect Map v1\n")
    points = []
    for line in content.split("\n"):
        words = line.lstrip().split()
        if words and not words[0].startswith("#"):
            points.append((int(words[0]), int(words[1])))
    assert sorted(points) == sorted(CORNERS)


def test_the_first_line_for_rawtherapee_is_no_lone_number():
    """It would be an offset."""
    first = FORMATS["rawtherapee"].make(map_of(40, 30, CORNERS), Extras()).decode().split("\n")[0]
    assert first.startswith("#")


@pytest.mark.parametrize(
    ("make", "model", "serial", "name"),
    [
        ("Canon", "Canon EOS R6", "0123", "Canon EOS R6 0123.badpixels"),
        ("NIKON CORPORATION", "NIKON D3S", None, "Nikon D3S.badpixels"),
        ("OLYMPUS IMAGING CORP.", "E-M1", "B/2", "Olympus E-M1 B_2.badpixels"),
        ("Hotpixd", "Virtual Camera", "V0001", "Hotpixd Virtual Camera V0001.badpixels"),
        (None, None, None, "unknown.badpixels"),
    ],
)
def test_rawtherapee_s_name_of_a_camera(make, model, serial, name):
    """The first four as RawTherapee 5.9 says that it looks for them, but for the serial number."""
    assert rawtherapee_name({"make": make, "model": model, "serial": serial}) == name


def test_ecsv_is_a_table_of_boxes_from_the_lower_left():
    """As astropy reads it."""
    table = Table.read(FORMATS["ecsv"].make(map_of(40, 30, CORNERS), Extras()).decode(), format="ascii.ecsv")
    boxes = [tuple(map(int, (row["x0"], row["y0"], row["width"], row["height"]))) for row in table]
    assert sorted(boxes) == sorted((x, 29 - y, 1, 1) for x, y in CORNERS)
    assert table.meta["sensor"]["serial"] == "0123"


@pytest.mark.parametrize("rows", Rows)
def test_a_fits_mask_lies_over_the_frames_as_astropy_reads_both(rows):
    """Its rows are stored as theirs are, and its header says so."""
    content = FORMATS["fits-mask"].make(map_of(40, 30, CORNERS, rows), Extras())
    with fits.open(io.BytesIO(content)) as units:
        units.verify("exception")
        mask, header = units[0].data, units[0].header
    assert mask.dtype == np.uint8
    assert header["ROWORDER"] == ("BOTTOM-UP" if rows is Rows.FITS else "TOP-DOWN")
    expected = np.zeros((30, 40), np.uint8)
    for x, y in CORNERS:
        expected[29 - y if rows is Rows.FITS else y, x] = 1
    assert np.array_equal(mask, expected)


def test_a_png_mask_and_a_layer_mark_the_pixels():
    """The mask nothing else; in the layer they alone are opaque."""
    about = map_of(40, 30, CORNERS[:3], declared=CORNERS[3:])
    with Image.open(io.BytesIO(FORMATS["png-mask"].make(about, Extras()))) as picture:
        ys, xs = np.nonzero(np.asarray(picture) == 255)
        assert picture.mode == "L"
    assert sorted(zip(xs.tolist(), ys.tolist(), strict=True)) == sorted(CORNERS)
    with Image.open(io.BytesIO(FORMATS["overlay"].make(about, Extras()))) as picture:
        layer = np.asarray(picture)
    ys, xs = np.nonzero(layer[..., 3] == 255)
    assert sorted(zip(xs.tolist(), ys.tolist(), strict=True)) == sorted(CORNERS)
    assert tuple(layer[0, 0, :3]) == (255, 0, 0)
    assert tuple(layer[29, 39, :3]) == (255, 200, 0)


def test_the_map_of_ours_holds_all_that_is_known():
    """As it was answered, with what only its history tells, where that knows it."""
    about = map_of(40, 30, CORNERS[:3], declared=CORNERS[3:])
    content = json.loads(FORMATS["json"].make(about, Extras()))
    unknown = {"last_seen": None, "sessions": None}
    assert content["defects"] == [{**entry, **unknown} for p in about.pixels for entry in p.found]
    assert [(d["x"], d["y"]) for d in content["declared"]] == [(5, 7), (39, 29)]
    assert content["sensor"]["serial"] == "0123"


# --- pictures of the statistic


def generation(samples: list[np.ndarray]) -> Generation:
    """Return a generation that holds frames of 16 bit."""
    stack = np.stack(samples).astype(np.uint64)
    shape = stack.shape[1:]
    counts = {name: np.full(shape, n, np.uint8) for n, name in enumerate(("high", "low"))}
    counts |= {name: np.full(shape, n, np.uint16) for n, name in enumerate(("high_outstanding", "low_outstanding"), 2)}
    arrays = {"total": stack.sum(0).astype(np.uint32), "squares": (stack * stack).sum(0), **counts}
    return Generation(1, {"sensor": {"frames": len(samples)}}, arrays)


@pytest.mark.parametrize("suffix", [".fits", ".tif"])
@pytest.mark.parametrize("rows", [Rows.PICTURE, Rows.FITS])
def test_mean_deviation_and_counts_are_those_of_the_frames(suffix, rows):
    """As numpy has them, and exact to float32; of TIFF the first row is always the top."""
    frames = list(np.random.default_rng(1).integers(0, 65536, (9, 30, 40), dtype=np.uint16))
    about = map_of(40, 30, [], rows)
    extras = Extras(suffix=suffix, statistic=lambda: generation(frames))

    def read(content: bytes) -> Any:
        if suffix == ".tif":
            return tifffile.imread(io.BytesIO(content))
        data = fits.getdata(io.BytesIO(content))
        return data[..., ::-1, :] if rows is Rows.FITS else data

    assert np.array_equal(read(FORMATS["mean"].make(about, extras)), np.mean(frames, 0).astype(np.float32))
    deviation = read(FORMATS["deviation"].make(about, extras))
    assert np.allclose(deviation, np.std(np.asarray(frames, np.float64), 0), rtol=1e-6)
    counts = read(FORMATS["counts"].make(about, extras))
    assert counts.shape == (4, 30, 40)
    assert [set(np.unique(plane)) for plane in counts] == [{0}, {1}, {2}, {3}]


def test_the_mean_of_pictures_in_colour_has_three_planes():
    """Red, green, blue."""
    frames = [np.arange(30 * 40 * 3, dtype=np.uint16).reshape(30, 120)] * 2
    about = map_of(40, 30, [], samples="rendered", colours="RGB")
    extras = Extras(suffix=".fits", statistic=lambda: generation(frames))
    data = fits.getdata(io.BytesIO(FORMATS["mean"].make(about, extras)))
    assert np.array_equal(np.moveaxis(data, 0, -1), frames[0].reshape(30, 40, 3))
    tif = FORMATS["mean"].make(about, replace(extras, suffix=".tif"))
    with tifffile.TiffFile(io.BytesIO(tif)) as file:
        assert file.pages.first.photometric == tifffile.PHOTOMETRIC.RGB


@pytest.mark.parametrize("rows", [Rows.PICTURE, Rows.FITS])
def test_phd2_s_master_dark_is_as_large_as_the_frames(rows):
    """Width and height of its FITS are compared with the camera's; its rows are where the map has them."""
    frames = [np.full((30, 40), 100, np.uint16)] * 3
    for frame in frames:
        frame[7, 5] = 9000
    about = map_of(40, 30, [(5, 7)], rows)
    content = FORMATS["phd2"].beside(about, Extras(statistic=lambda: generation(frames)))
    with fits.open(io.BytesIO(content)) as units:
        assert (units[0].header["NAXIS1"], units[0].header["NAXIS2"]) == (40, 30)
        master = units[0].data
    (point,) = (line for line in FORMATS["phd2"].make(about, Extras()).decode().splitlines() if line[0] != "#")
    x, y = map(int, point.split())
    assert master[y, x] == 9000
    assert (master == 9000).sum() == 1


# --- lists that others wrote


def refusal(tmp_path: Path, content: bytes | str, **options: Any) -> str:
    """Return why a list is refused."""
    path = tmp_path / "list.txt"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(ListError) as refused:
        read_list(path, 40, 30, **options)
    assert str(path) in str(refused.value)
    assert "Nothing was imported" in str(refused.value)
    return str(refused.value)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("1 2 0\n# fine\n3 4\n", "line 3: '3 4' is not a column, a row and a time"),
        ("1 2\n3 4 5\n", "line 2"),
        ("1 2\n3 x\n", "line 2"),
        ("1 2 0\n\n40 0 0\n", r"line 3: (40, 0) is outside of the sensor, which has 40x30 pixels"),
        ("1 2 0\n0 30 0\n", "line 2: (0, 30)"),
        ("1 2 0\n-1 3 0\n", "line 2: (-1, 3)"),
        ("-5\n1 2\n", "line 2: (-4, -3)"),
        ("P 1 2 H\nQ 1 2 H\n", "line 2"),
        ("P 1 2 H\nP 1 H\n", "line 2"),
        ("Col 1 2 2\nCol 1 3\n", "line 2"),
        ("Col 1 2 2\nCol 1 5 30\n", "line 2: 5 to 30 is not within 0 to 29"),
        ("Col 1 2 2\nRow 1 3 2\n", "line 2"),
        ("x,y\n1,2\n3,\n", "line 3"),
        ("x,y\n1,2\n3.5,4\n", "line 3"),
        ("hello world\n", "line 1: 'hello world' begins no list"),
        ("", "it is empty"),
        ("{}", "no map that hotpixd has exported"),
        ('{"defects": [{"x": 1.5, "y": 2}]}', "no map that hotpixd has exported"),
        ('{"defects": [{"x": 1000, "y": 2}]}', "(1000, 2) is outside"),
        (b"\x00\x01\x02", "is no text"),
        (b"\x89PNG\r\n\x1a\n", "no PNG that can be read"),
        (b"SIMPLE  =                    T", "FITS"),
        ("# %ECSV 1.0\n# ---\nx0\n1\n", "no table"),
        ("1 2 0\n" + "9" * 5000 + " 1 0\n", "line 2"),
    ],
)
def test_a_list_that_is_not_understood_is_refused_by_line(tmp_path, content, told):
    """And nothing of it is taken."""
    assert told in refusal(tmp_path, content)


def test_a_mask_of_another_size_is_refused(tmp_path):
    """As is a picture that is no mask."""
    for name in ("png-mask", "fits-mask"):
        assert "41x30 pixels" in refusal(tmp_path, FORMATS[name].make(map_of(41, 30, [(1, 1)]), Extras()))
    picture = io.BytesIO()
    Image.fromarray(np.full((30, 40), 7, np.uint8)).save(picture, "PNG")
    assert "more than half" in refusal(tmp_path, picture.getvalue())
    layer = FORMATS["overlay"].make(map_of(40, 30, [(1, 1)]), Extras())
    assert "without transparency" in refusal(tmp_path, layer)


def test_boxes_columns_and_rows_are_all_their_pixels(tmp_path):
    """As their programs mean them."""

    def read(content: str) -> set[tuple[int, int]]:
        (tmp_path / "l").write_text(content)
        return set(read_list(tmp_path / "l", 40, 30).pixels)

    assert read("Col 3\n") == {(3, y) for y in range(30)}
    assert read("Row 4 1 3\n") == {(1, 4), (2, 4), (3, 4)}
    assert read("C 3 H\n") == {(3, y) for y in range(30)}
    assert read("L 0\n") == {(x, 0) for x in range(40)}
    assert read("P 1 2\n") == {(1, 2)}
    assert read("2\n1 2\n") == {(3, 4)}
    boxes = "# %ECSV 1.0\n# ---\n# datatype:\n" + "".join(
        f"# - {{name: {name}, datatype: int64}}\n" for name in ("x0", "y0", "width", "height")
    )
    assert read(f"{boxes}x0 y0 width height\n0 0 2 1\n39 29 1 1\n") == {(0, 29), (1, 29), (39, 0)}


def test_lists_that_others_wrote_are_read():
    """Of a PowerShot G2, 2272x1704, by the author of dcraw, and of a Canon 7D's video."""
    folder = SHARED / "badpixel_lists"
    if not folder.is_dir():
        pytest.skip("the real lists are not here")
    own = read_list(folder / "dcraw_.badpixels", 2272, 1704)
    assert own.format == "dcraw"
    assert len(own.pixels) == 19  # 20 lines, one of which is there twice
    assert {(962, 91), (2181, 1532)} <= set(own.pixels)
    video = read_list(folder / "convmlv_canon7d_1080p_badpixels.txt", 1920, 1080)
    assert len(video.pixels) == 14


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    content=st.binary(max_size=200)
    | st.text(string.digits + ' -#\n\tPCLHRowCol,xy.{}[]":', max_size=200).map(str.encode)
    | st.sampled_from([b"\x89PNG", b"SIMPLE  =", b"# %ECSV 1.0\n", b"{"]).flatmap(
        lambda start: st.binary(max_size=80).map(lambda rest: start + rest)
    ),
    name=st.none() | st.sampled_from(sorted(READERS)),
)
def test_whatever_a_file_holds_it_is_read_or_refused_in_a_sentence(tmp_path, content, name):
    """Pixels of the sensor, or a ListError."""
    path = tmp_path / "any"
    path.write_bytes(content)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            listing = read_list(path, 40, 30, name)
        except ListError:
            return
    assert all(0 <= x < 40 and 0 <= y < 30 for x, y in listing.pixels)


def test_a_dng_s_copy_is_read_as_the_same_picture():
    """By a reader of TIFF that knows nothing of it."""
    content = dng_of(30, 20, (2, 4, 18, 28), below=True, order=">")
    after = FORMATS["dng"].make(map_of(24, 16, [(3, 3)]), Extras(dng=dng_file(content)))
    with tifffile.TiffFile(io.BytesIO(content)) as before, tifffile.TiffFile(io.BytesIO(after)) as now:
        assert np.array_equal(before.pages.first.pages[0].asarray(), now.pages.first.pages[0].asarray())
    assert Dng(after).info == Dng(content).info
