"""A sample of `faults/disks.py`: full and failing disks end a scan with a sentence; the next one goes on."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).with_name("faults")))

import disks
import tracing
from stage import workplace
from table import Impossible


@pytest.fixture(scope="module")
def bench() -> Iterator[disks.Bench]:
    if os.geteuid() != 0:
        pytest.skip("mounting small disks takes root")
    try:
        tracing.check()
    except Impossible as reason:
        pytest.skip(str(reason))
    with workplace() as folder:
        yield disks.Bench(folder)


def test_a_scan_onto_a_full_disk_says_so_and_goes_on_when_there_is_room(bench):
    """On the smallest disk, on those where some shots fit, and on one that is just large enough."""
    try:
        row = disks.full_disks(bench, 5)
    except Impossible as reason:
        pytest.skip(str(reason))
    assert row.points >= 3
    assert row.as_expected


def test_a_scan_that_ignores_a_full_disk_is_seen(bench):
    """The control: it claims to have done all."""
    try:
        row = disks.full_disks(bench, 4, hook="full_ignored")
    except Impossible as reason:
        pytest.skip(str(reason))
    assert row.as_expected


def test_a_sync_that_fails_ends_a_scan_and_the_next_goes_on(bench):
    """The kernel has dropped what it could not write: a second fsync would lie."""

    def failing(folder: Path) -> list[str]:
        fault = "fsync:error=EIO:when=2"
        return tracing.saboteur(folder / "state", ["spool"], fault, fast=True, log=folder / "log")

    (tried,) = bench.scans([failing], was_hit=lambda folder, _: tracing.hit(folder / "log"))
    assert tried == disks.Tried(hit=True, code=3)


def test_the_disks_of_the_campaign_grow_from_nothing_to_just_enough():
    """Most are too small for the shots and the ledger; sizes are whole pages."""
    sizes = disks.sizes(disks.SIZES)
    assert len(set(sizes)) == 48
    assert sizes == sorted(sizes)
    assert sizes[0] == 4096
    assert all(size % 4096 == 0 for size in sizes[:40])
