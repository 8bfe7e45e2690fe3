"""A short campaign of damaged and hostile pictures, and proof that the harness would see what it looks for."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent / "faults"))

from fuzz_mutators import mutant
from fuzz_seeds import FORMATS, seeds
from table import Row

import fuzz

pytest.importorskip("astropy")
pytest.importorskip("imagecodecs")

FILES = 40


def described(rows: list[Row]) -> str:
    return "\n".join(f"{row.what}: {row.wrong} of {row.points} wrong; {row.note}" for row in rows)


def test_damaged_files_are_refused_in_words_or_keep_their_geometry():
    """Of every format, each file in a process of its own: none dies, hangs, grows, or gives other sides."""
    rows = [fuzz._row(form, tally) for form, tally in fuzz.sweeps(FORMATS[:5], FILES)]
    assert len(rows) == 5
    assert all(row.points == FILES and row.wrong == 0 for row in rows), described(rows)


@pytest.mark.skipif(not seeds("real"), reason="the folder of real frames is not on this machine")
def test_damaged_files_of_real_cameras_are_refused_or_keep_their_geometry():
    """The same of files that cameras wrote."""
    rows = [fuzz._row(form, tally) for form, tally in fuzz.sweeps(["real"], FILES // 2)]
    assert [row.wrong for row in rows] == [0], described(rows)


def test_the_harness_sees_a_decoder_that_does_not_check_or_crashes():
    """Without the checks frames of other sides come out; a process that dies is not taken for one that refuses."""
    with fuzz.Worker("unchecked") as worker:
        unchecked = fuzz.sweep("DNG", 60, 0, [worker.decode])
    assert any("instead of" in fault for _, fault in unchecked.faults or [])
    with fuzz.Worker("broken") as worker:
        broken = fuzz.sweep("FITS", 40, 0, [worker.decode])
    assert any("dies of SIGSEGV" in fault for _, fault in broken.faults or [])


def test_the_harness_sees_a_decoder_that_hangs_or_takes_memory(monkeypatch):
    """Time and memory have limits; what is beyond them is wrong."""
    monkeypatch.setattr(fuzz, "LIMIT_S", 1.0)
    with fuzz.Worker("hanging") as worker:
        hanging = fuzz.sweep("JPEG", 20, 0, [worker.decode])
    assert any("hangs" in fault for _, fault in hanging.faults or [])
    monkeypatch.setattr(fuzz, "MOST_RESIDENT_BYTES", 10 << 20)
    with fuzz.Worker() as worker:
        large = fuzz.sweep("PNG", 3, 0, [worker.decode])
    assert any("takes" in fault for _, fault in large.faults or [])


def test_damage_is_the_same_every_time():
    """A wrong result can be looked at again by its number."""
    whole = seeds("TIFF")
    assert mutant("TIFF", whole, 17) == mutant("TIFF", whole, 17)
    assert len({mutant("TIFF", whole, number).content for number in range(50)}) > 45


def test_the_daemon_folds_the_good_among_hostile_files():
    """A watched directory gets both: the digest is that of the good ones alone, and every other one is refused."""
    row = fuzz.among_good_ones(hostile=20)
    assert (row.points, row.wrong) == (20, 0), row.note
