"""Uncompressed DNGs are read without LibRaw, and come out as LibRaw reads them: samples, crop, colours, levels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rawpy
import tifffile

from hotpixd.intake import dng
from hotpixd.intake.decode import DecodeError, decode

RGGB, XTRANS = bytes((0, 1, 1, 2)), bytes("RGB".index(c) for c in "GGRGGBGGBGGRBRGRBGGGBGGRGGRGGBRBGBRG")
ONE, ZERO = (1, 1), (0, 1)
MATRIX = (*ONE, *ZERO, *ZERO, *ZERO, *ONE, *ZERO, *ZERO, *ZERO, *ONE)


pytestmark = pytest.mark.usefixtures("no_dng_known")


def write(path: Path, samples: np.ndarray, pattern: bytes = RGGB, *, byteorder: Any = "<", **more: Any) -> Path:
    """Write a DNG; `more` names other tags by their number: area=(50829, "I", 4, ...)."""
    side = {4: 2, 36: 6}[len(pattern)]
    tags: list[Any] = [
        (271, "s", 0, "Test", True),
        (272, "s", 0, "Plain", True),
        (306, "s", 0, "2026:01:02 03:04:05", True),
        (33421, "H", 2, (side, side), True),
        (33422, "B", len(pattern), pattern, True),
        (33434, "2I", 1, (1, 50), True),
        (34855, "H", 1, 400, True),
        (36867, "s", 0, "2026:01:02 03:04:05", True),
        (50706, "B", 4, bytes((1, 4, 0, 0)), True),
        (50708, "s", 0, "Test Plain", True),
        (50714, "I", 1, 200, True),
        (50717, "I", 1, 60000, True),
        (50721, "2i", 9, MATRIX, True),
        (50778, "H", 1, 21, True),
        *more.values(),
    ]
    tifffile.imwrite(
        path, samples, photometric=32803, extratags=tags, metadata=None, software=False, byteorder=byteorder
    )
    return path


def shot(seed: int, shape: tuple[int, int] = (96, 132)) -> np.ndarray:
    return np.random.default_rng(seed).integers(150, 50000, shape).astype(np.uint16)


def by_libraw(path: Path) -> np.ndarray:
    with rawpy.imread(str(path)) as raw:
        return raw.raw_image_visible.copy()


AREA = (50829, "I", 4, (6, 8, 90, 128), True)  # top, left, bottom, right


@pytest.mark.parametrize("pattern", [RGGB, XTRANS], ids=["Bayer", "X-Trans"])
@pytest.mark.parametrize("more", [{}, {"area": AREA}], ids=["all visible", "with margins"])
def test_later_shots_equal_libraws_without_it(tmp_path: Path, pattern: bytes, more: dict[str, Any], monkeypatch):
    first = decode(write(tmp_path / "1.dng", shot(1), pattern, **more))
    paths = [write(tmp_path / f"{n}.dng", shot(n), pattern, **more) for n in (2, 3)]
    expected = [by_libraw(path) for path in paths]
    monkeypatch.setattr("hotpixd.intake.decode._by_libraw", None)
    for path, samples in zip(paths, expected, strict=True):
        frame = decode(path)
        np.testing.assert_array_equal(frame.samples, samples)
        assert (frame.sensor, frame.info, frame.kind) == (first.sensor, first.info, first.kind)
        assert (frame.black_level_adu, frame.white_level_adu) == (200.0, 60000.0)


def test_another_header_is_compared_anew(tmp_path: Path):
    decode(write(tmp_path / "1.dng", shot(1)))
    other = write(tmp_path / "2.dng", shot(2), area=AREA)
    assert decode(other).samples.shape == (84, 120)
    assert len(dng._known) == 2


@pytest.mark.parametrize(
    ("more", "order"),
    [
        ({"table": (50712, "H", 4, (300, 10000, 20000, 30000), True)}, "<"),
        ({"masked": (50830, "I", 4, (0, 0, 96, 4), True)}, "<"),
        ({}, ">"),
    ],
    ids=["table of levels", "masked area", "other byte order"],
)
def test_what_takes_more_than_reading_is_left_to_libraw(tmp_path: Path, more: dict[str, Any], order: str):
    for n in (1, 2):
        path = write(tmp_path / f"{n}.dng", shot(n), byteorder=order, **more)
        with path.open("rb", buffering=0) as file:
            assert dng.find(file) is None
        np.testing.assert_array_equal(decode(path).samples, by_libraw(path))


def test_a_header_of_which_libraw_makes_something_else_is_never_read_here(tmp_path: Path, monkeypatch):
    """The control: were its samples shifted by a row, the comparison must see it."""
    path = write(tmp_path / "1.dng", shot(1))
    with path.open("rb", buffering=0) as file:
        plain = dng.find(file)
        assert plain is not None
        shifted = np.roll(by_libraw(path), 1, axis=0)
        dng.learn(plain, dng.Reading(0, 0, 132, 96, "RGGB", 200.0, 60000.0), shifted, file)
    assert not dng.is_new(plain)
    assert dng.known(plain) is None
    np.testing.assert_array_equal(decode(path).samples, by_libraw(path))


@pytest.mark.parametrize("damage", ["cut", "half written", "offset"])
def test_what_is_wrong_is_said_alike_of_a_first_and_of_a_later_shot(tmp_path: Path, damage: str):
    """A verdict must not depend on which shots this decoder has seen."""
    content = bytearray(write(tmp_path / "2.dng", shot(2)).read_bytes())
    if damage == "cut":
        del content[-5000:]
    elif damage == "half written":
        content[-9000:] = bytes(9000)
    else:
        with tifffile.TiffFile(tmp_path / "2.dng") as file:
            at = file.pages.first.tags[273].offset + 8
        content[at : at + 4] = (10**8).to_bytes(4, "little")
    broken = tmp_path / "broken.dng"
    broken.write_bytes(content)
    with pytest.raises(DecodeError) as first:
        decode(broken)
    decode(write(tmp_path / "1.dng", shot(1)))
    with pytest.raises(DecodeError) as later:
        decode(broken)
    assert str(later.value) == str(first.value)
