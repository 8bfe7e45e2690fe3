"""Lossless JPEGs: our loops make of them what the standard says and LibRaw does, or leave them to LibRaw."""

from __future__ import annotations

import struct
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import rawpy
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st

sys.path.append(str(Path(__file__).parent / "faults"))

from fuzz_seeds import write_lossless_dng

from conftest import environment, same
from hotpixd.core.frame import Frame
from hotpixd.intake import dng
from hotpixd.intake.decode import DecodeError, _around_libraw, decode
from hotpixd.intake.decoders import Decoders
from hotpixd.intake.lossless_jpeg import Reader
from pictures import FLAT, SKEWED, lossless_jpeg, mosaic

SHAPE = (96, 112)
TILE = (48, 64)


pytestmark = pytest.mark.usefixtures("no_dng_known")


def noise(seed: int, shape: tuple[int, int], bits: int) -> np.ndarray:
    """Return samples of which some differ little from their neighbours, and some as much as there is."""
    random = np.random.default_rng(seed)
    smooth = np.clip((1 << (bits - 1)) + random.normal(0, 20, shape).cumsum(axis=1), 0, (1 << bits) - 1)
    wild = random.integers(0, 1 << bits, shape)
    return np.where(random.random(shape) < 0.1, wild, smooth).astype(np.uint16)


def by_libraw(path: Path) -> np.ndarray:
    with rawpy.imread(str(path)) as raw:
        return raw.raw_image_visible.copy()


# --- the loops


@settings(deadline=None)
@given(
    seed=st.integers(0, 1 << 32),
    rows=st.integers(1, 7),
    groups=st.integers(1, 9),
    components=st.sampled_from((1, 2, 4)),
    predictor=st.integers(1, 7),
    bits=st.integers(9, 16),
    tables=st.sampled_from(((FLAT,), (SKEWED,), (FLAT, SKEWED))),
)
def test_what_was_encoded_comes_out(seed, rows, groups, components, predictor, bits, tables):
    """All predictors, depths, components, short and long codes; or nothing, where a difference has 16 bits."""
    samples = noise(seed, (rows, groups * components), bits)
    try:
        coded = lossless_jpeg(samples, components, predictor, bits, tables[: components if components < 4 else 1])
    except KeyError:  # a difference of 17 bits, which only wraps around
        return
    found = Reader().read(coded, samples.shape)
    if found is None:
        # The only reason: a category of which decoders make different things.
        assert bits == 16
    else:
        np.testing.assert_array_equal(found, samples)


def test_memory_used_before_leaves_nothing_behind():
    """A reader is used for all tiles of a picture, the last of which may be small."""
    reader = Reader()
    for shape in ((40, 64), (7, 20), (40, 64)):
        samples = noise(shape[0], shape, 14)
        found = reader.read(lossless_jpeg(samples, 2, 6), shape)
        np.testing.assert_array_equal(found, samples)


def test_rows_of_another_length_are_those_of_the_tile():
    """Some writers store two rows of a tile as one."""
    samples = noise(1, (8, 24), 14)
    found = Reader().read(lossless_jpeg(samples.reshape(4, 48), 2), (8, 24))
    np.testing.assert_array_equal(found, samples)


def changed(coded: bytes, old: bytes, new: bytes) -> bytes:
    assert coded.count(old) == 1
    return coded.replace(old, new)


WHOLE = lossless_jpeg(noise(3, (6, 8), 14), 2)
SCAN_START = bytes((0xFF, 0xDA, 0, 10, 2, 0, 0, 1, 0))


@pytest.mark.parametrize(
    "coded",
    [
        b"",
        WHOLE[:-2],
        WHOLE[:-3] + WHOLE[-2:],
        WHOLE[:-2] + b"\0\0" + WHOLE[-2:],
        WHOLE[:-2] + b"\xff\xd0" + WHOLE[-2:],
        changed(WHOLE, b"\xff\xc3", b"\xff\xc0"),
        changed(WHOLE, b"\xff\xda", b"\xff\xdd\0\4\0\2\xff\xda"),
        changed(WHOLE, SCAN_START + b"\1\0\0", SCAN_START + b"\1\0\1"),
        changed(WHOLE, SCAN_START + b"\1\0\0", SCAN_START + b"\0\0\0"),
        changed(WHOLE, SCAN_START, SCAN_START[:-1] + b"\x10"),
        changed(WHOLE, b"\1\x11\0", b"\1\x22\0"),
        changed(WHOLE, bytes((0, 14, 14, 0, 6)), bytes((0, 14, 14, 0, 7))),
        changed(WHOLE, bytes((0, 14, 14, 0, 6)), bytes((0, 14, 12, 0, 6))),
        changed(WHOLE, bytes((14, 3, 0)), bytes((14, 6, 0))),
    ],
    ids=[
        *("empty", "no end", "a byte short", "a byte too long", "a marker within", "not lossless", "restarts"),
        *("shifted", "no predictor", "a table that is not there", "subsampled", "a row too many", "fewer bits"),
        "more codes than there can be",
    ],
)
def test_what_is_out_of_the_ordinary_is_not_read(coded):
    """The control of all these: the file from which they are made is."""
    assert Reader().read(WHOLE, (6, 8)) is not None
    assert Reader().read(coded, (6, 8)) is None


def test_a_table_by_another_number_is_not_read():
    """The standard takes the one that the scan names, LibRaw the one of the component's number."""
    samples = noise(3, (6, 8), 14)
    coded = lossless_jpeg(samples, 2, tables=(FLAT, SKEWED))
    assert Reader().read(coded, (6, 8)) is not None
    assert Reader().read(changed(coded, bytes((2, 0, 0, 1, 0x10)), bytes((2, 0, 0x10, 1, 0))), (6, 8)) is None


TABLES_AT_RANDOM = """
import numpy as np
from hotpixd.core import lossless

random = np.random.default_rng(1)
for _ in range(3000):
    components = int(random.choice((1, 2, 4)))
    given = []
    for _ in range(components):
        counts = np.zeros(16, int)
        for length in random.integers(1, 17, random.integers(1, 18)):
            counts[length - 1] += 1
        given.append(bytes(counts.tolist()) + bytes(random.permutation(17)[: counts.sum()].tolist()))
    tables = lossless.tables(given)
    if tables is None:
        continue
    coded = np.append(random.integers(0, 256, random.integers(0, 200)), (255, 217)).astype(np.uint8)
    width = components * int(random.integers(1, 9))
    data = np.full(lossless.room(len(coded), width), 255, np.uint8)
    size = lossless.unstuff(coded, 0, data)
    if size >= 0:
        out = np.zeros((int(random.integers(1, 6)), width), np.uint16)
        how = int(random.integers(1, 8)), int(random.integers(9, 17))
        lossless.decode(data, size, tables.nearest, tables.longer, tables.wide, *how, out)
print("within")
"""


def test_nothing_outside_of_the_arrays_is_touched(tmp_path):
    """With bounds checked, which costs time: random bytes by random tables, short and long codes of all categories."""
    checked = environment(NUMBA_BOUNDSCHECK="1", NUMBA_CACHE_DIR=str(tmp_path))
    done = subprocess.run([sys.executable, "-c", TABLES_AT_RANDOM], env=checked, capture_output=True, text=True)
    assert done.stdout == "within\n", done.stderr[-2000:]


def test_a_difference_of_16_bits_by_a_short_code_is_not_read():
    """LibRaw and the standard make of it what the version of the DNG says."""
    table = bytes((0, 2, *[0] * 14)), bytes((0, 16))
    samples = np.array([[0, 0]], np.uint16)
    assert Reader().read(lossless_jpeg(samples, 1, 1, 16, (table,)), (1, 2)) is None


# --- beside LibRaw


@pytest.mark.parametrize("tile", [None, TILE, (32, SHAPE[1])], ids=["strip", "tiles", "tiles as wide as the picture"])
@pytest.mark.parametrize("how", [(1, 6, 14, (FLAT,)), (2, 1, 14, (SKEWED,)), (2, 7, 16, (FLAT,)), (1, 4, 14, (FLAT,))])
def test_later_shots_equal_libraws_without_it(tmp_path, tile, how, monkeypatch):
    def shot(seed: int) -> Path:
        path = tmp_path / f"{seed}.dng"
        write_lossless_dng(path, mosaic(*SHAPE) + np.uint16(seed), tile, lambda part: lossless_jpeg(part, *how))
        return path

    first = decode(shot(1))
    expected = by_libraw(shot(2))
    monkeypatch.setattr("hotpixd.intake.decode._by_libraw", None)
    frame = decode(tmp_path / "2.dng")
    np.testing.assert_array_equal(frame.samples, expected)
    np.testing.assert_array_equal(frame.samples, mosaic(*SHAPE) + 2)
    assert (frame.sensor, frame.info, frame.kind) == (first.sensor, first.info, first.kind)


def outcome(path: Path) -> Frame | str:
    try:
        return decode(path)
    except DecodeError as error:
        return str(error)


def test_what_comes_of_a_damaged_file_does_not_depend_on_the_shots_before(tmp_path, monkeypatch):
    """Of each of 300 some bytes are changed. Read as a first and as a later one, it is the same picture or refusal."""
    whole = tmp_path / "whole.dng"
    write_lossless_dng(whole, mosaic(*SHAPE), TILE, lambda part: lossless_jpeg(part, 2, 1, 14, (SKEWED,)))
    content = whole.read_bytes()
    start = content.index(b"\xff\xd8")
    random = np.random.default_rng(1)
    broken = tmp_path / "broken.dng"
    read_here = []
    read_into = dng.read_into
    monkeypatch.setattr(dng, "read_into", lambda *args: read_here.append(read_into(*args)) or read_here[-1])
    for _ in range(300):
        damaged = bytearray(content)
        for at in random.integers(start, len(content), random.integers(1, 4)):
            damaged[at] ^= 1 << random.integers(8)
        broken.write_bytes(damaged)
        dng._known.clear()
        dng._learned_in_vain = 0
        first = outcome(broken)
        dng._known.clear()
        decode(whole)
        later = outcome(broken)
        if isinstance(first, str):
            assert later == first
        else:
            assert isinstance(later, Frame)
            np.testing.assert_array_equal(later.samples, first.samples)
    # Neither way is hardly ever taken.
    assert sum(read_here) > 10
    assert len(read_here) - sum(read_here) > 10


def alike(one: Frame | str, other: Frame | str) -> bool:
    if isinstance(one, str) or isinstance(other, str):
        return one == other
    return same(one, other)


WIDTH = 128


@pytest.mark.parametrize(
    ("tile", "encode"),
    [
        ((48, WIDTH // 2), lambda part: lossless_jpeg(part, 2)),
        ((48, WIDTH // 4), lambda part: lossless_jpeg(part, 4)),
        ((48, WIDTH // 2), lambda part: lossless_jpeg(part.reshape(24, WIDTH), 1)),
        (None, lambda part: lossless_jpeg(part.reshape(-1, WIDTH // 2), 2)),
        (None, lambda part: lossless_jpeg(part.reshape(-1, WIDTH // 4), 4)),
    ],
    ids=["two of half a width", "four of a quarter", "two rows as one", "half rows", "quarter rows"],
)
def test_another_layout_of_the_jpegs_is_compared_anew(tmp_path, tile, encode):
    """Some of these LibRaw gets wrong; the header of the DNG is that of the shot before."""
    shot = mosaic(96, WIDTH)
    write_lossless_dng(tmp_path / "before.dng", shot, tile, lossless_jpeg)
    write_lossless_dng(tmp_path / "shot.dng", shot, tile, encode)
    first = outcome(tmp_path / "shot.dng")
    dng._known.clear()
    decode(tmp_path / "before.dng")
    assert alike(outcome(tmp_path / "shot.dng"), first)
    assert alike(outcome(tmp_path / "shot.dng"), first)


@pytest.mark.parametrize(
    ("level", "also"),
    [(60000, {}), (200, {50712: (3, np.arange(0, 60000, 2).astype("<u2").tobytes())})],
    ids=["all alike", "a table of levels beside the preview"],
)
def test_nothing_is_learned_of(tmp_path, level, also):
    """A picture in which all samples are alike cannot show that they lie elsewhere."""
    shot = mosaic(*SHAPE) if also else np.full(SHAPE, level, np.uint16)
    write_lossless_dng(
        tmp_path / "shot.dng", shot, TILE, lambda part: lossless_jpeg(part, bits=16), preview=True, also=also
    )
    outcome(tmp_path / "shot.dng")
    assert not any(dng._known.values())


def test_a_camera_that_writes_something_new_into_each_header_is_not_compared_for_ever(tmp_path):
    for n in range(20):
        also = {50740: (1, bytes((n,)) * 100)}
        write_lossless_dng(tmp_path / f"{n}.dng", mosaic(*SHAPE), TILE, lossless_jpeg, also=also)
        decode(tmp_path / f"{n}.dng")
    assert len(dng._known) == dng._IN_VAIN


@pytest.mark.parametrize("kind", [3, 9, 11, 12], ids=["16 bits", "signed", "float", "double"])
def test_offsets_of_another_type_are_the_files_fault(tmp_path, kind):
    """Negative or beyond all files, they would look like a disk that cannot be read."""
    path = tmp_path / "shot.dng"
    write_lossless_dng(path, mosaic(*SHAPE), TILE, lossless_jpeg)
    content = path.read_bytes()
    with tifffile.TiffFile(path) as file:
        tag = file.pages.first.tags[324]
    values = {3: b"\xff" * 16, 9: b"\xff" * 16, 11: np.full(4, 1e38, "<f4").tobytes(), 12: b"\0" * 16}[kind]
    content = content[: tag.offset + 2] + bytes((kind,)) + content[tag.offset + 3 :]
    path.write_bytes(content[: tag.valueoffset] + values + content[tag.valueoffset + 16 :])
    for _ in range(2):
        with pytest.raises(DecodeError):
            decode(path)


@pytest.mark.parametrize("top", [16, 20, 70])
def test_margins_may_be_larger_than_a_tile(tmp_path, top, monkeypatch):
    area = {50829: (3, np.array([top, 4, SHAPE[0], SHAPE[1]], "<u2").tobytes())}
    for n in (1, 2):
        write_lossless_dng(tmp_path / f"{n}.dng", mosaic(*SHAPE) + np.uint16(n), (16, 16), lossless_jpeg, also=area)
    decode(tmp_path / "1.dng")
    expected = by_libraw(tmp_path / "2.dng")
    monkeypatch.setattr("hotpixd.intake.decode._by_libraw", None)
    np.testing.assert_array_equal(decode(tmp_path / "2.dng").samples, expected)


def in_the_last_tile(tmp_path: Path, change: Callable[[bytes], bytes]) -> Path:
    """Write a DNG whose last tile is changed."""
    path = tmp_path / "broken.dng"
    write_lossless_dng(path, mosaic(*SHAPE), TILE, lambda part: lossless_jpeg(part, 2, 1, 14, (SKEWED,)))
    content = path.read_bytes()
    at = content.rindex(b"\xff\xd8")
    path.write_bytes(content[:at] + change(content[at:]))
    return path


def test_samples_that_libraw_complains_of_are_refused(tmp_path):
    """It prints a line and goes on, with samples that are beyond their depth or of another place."""
    path = in_the_last_tile(tmp_path, lambda tile: tile[:-400] + bytes(200) + tile[-200:])
    with pytest.raises(DecodeError, match="the raw file is damaged"):
        decode(path)


def test_a_tile_that_is_no_jpeg_is_refused(tmp_path):
    """LibRaw leaves out what follows, without a word."""
    with pytest.raises(DecodeError, match="the file is damaged"):
        decode(in_the_last_tile(tmp_path, lambda tile: b"\0\0" + tile[2:]))


def test_samples_that_libraw_does_not_decode_are_none_of_another_picture(tmp_path, monkeypatch):
    """Without both checks: it leaves their memory as it was. What was there before must not be taken for samples."""
    monkeypatch.setattr("hotpixd.intake.extent.raw_fault", lambda *_: None)
    path = in_the_last_tile(tmp_path, lambda tile: b"\0\0" + tile[2:])
    whole = tmp_path / "whole.dng"
    write_lossless_dng(whole, mosaic(*SHAPE), TILE)
    for _ in range(5):
        dng._known.clear()
        decode(whole)
        assert not decode(path).samples[TILE[0] :, TILE[1] :].any()


def test_no_memory_is_filled_for_samples_that_a_file_cannot_hold(tmp_path, monkeypatch):
    """LibRaw reserves 1.4 GB for a header that says so; touching all of it could end other processes."""
    filled = []
    monkeypatch.setattr(_around_libraw, "_fill", filled.append)
    write_lossless_dng(tmp_path / "shot.dng", mosaic(*SHAPE), TILE)
    decode(tmp_path / "shot.dng")
    assert filled == [1, -1]
    content = (tmp_path / "shot.dng").read_bytes()
    sides = struct.pack("<HHII", 256, 4, 1, SHAPE[1]), struct.pack("<HHII", 256, 4, 1, 30000)
    assert content.count(sides[0]) == 1
    (tmp_path / "shot.dng").write_bytes(content.replace(*sides))
    with pytest.raises(DecodeError):
        decode(tmp_path / "shot.dng")
    assert filled == [1, -1]


# --- in the jail


def test_workers_with_the_loops_take_over(tmp_path):
    """The first shots are read by LibRaw; no shot waits for the loops, and none is read differently."""
    paths = [tmp_path / f"{n}.dng" for n in range(3)]
    for n, path in enumerate(paths):
        write_lossless_dng(path, mosaic(*SHAPE) + np.uint16(n), TILE)
    with closing(Decoders(2)) as decoders:
        decoders.decode(paths[0])
        before = len(decoders._all)
        until = time.monotonic() + 120
        while True:
            for n, path in enumerate(paths):
                np.testing.assert_array_equal(decoders.decode(path).samples, mosaic(*SHAPE) + n)
            workers = list(decoders._all)
            # Each has said that it is ready: one that ends before counts as one whose loops cannot be loaded.
            if all(worker.with_loops and worker.missing is not None for worker in workers):
                break
            assert time.monotonic() < until
            time.sleep(0.2)
        assert len(workers) <= max(before, 2)
        # One that dies is replaced by its like.
        for worker in workers:
            worker.kill()
            worker._process.wait()
        np.testing.assert_array_equal(decoders.decode(paths[0]).samples, mosaic(*SHAPE))
        assert all(worker.with_loops for worker in decoders._all)


@pytest.mark.parametrize(
    ("loading", "reason"),
    [
        ("raise ImportError('it was left out')", "ImportError: it was left out"),
        ("import os; os.kill(os.getpid(), 11)", "it was killed by SIGSEGV"),
    ],
    ids=["an error", "a crash"],
)
def test_loops_that_cannot_be_loaded_cost_no_shot(tmp_path, monkeypatch, caplog, loading, reason):
    """LibRaw goes on, and the log says why."""
    write_lossless_dng(tmp_path / "shot.dng", mosaic(*SHAPE), TILE)
    (tmp_path / "numba.py").write_text(loading)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{environment()['PYTHONPATH']}")
    with closing(Decoders(1)) as decoders:
        until = time.monotonic() + 60
        while not caplog.records:
            np.testing.assert_array_equal(decoders.decode(tmp_path / "shot.dng").samples, mosaic(*SHAPE))
            assert time.monotonic() < until
        for _ in range(3):
            decoders.decode(tmp_path / "shot.dng")
    (said,) = caplog.records
    assert said.getMessage().endswith(f"LibRaw decodes it, slowly: {reason}")


def test_who_decodes_nothing_of_the_kind_loads_no_loops(tmp_path):
    from pictures import write_dng

    write_dng(tmp_path / "plain.dng", mosaic())
    with closing(Decoders(2)) as decoders:
        for _ in range(3):
            decoders.decode(tmp_path / "plain.dng")
        assert not any(worker.with_loops for worker in decoders._all)
