"""A sample of the power cuts of tests/faults: the product recovers from each, and the harness sees what is missing.

The whole is run by ``python tests/faults/campaign.py --long --only power``.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest

FAULTS = str(Path(__file__).parent / "faults")
if FAULTS not in sys.path:
    sys.path.insert(0, FAULTS)

import power  # noqa: E402 - after the path
import workloads  # noqa: E402

LINKED = (
    "fsync of a shot found in the spool",
    "fsync of a shot linked into the spool",
    "fsync of the spool after a link",
    "fsync of a generation",
    "fsync of the folder of generations",
    "fsync of the journal of a dark series",
    "fsync of the folder of a dark series' journal",
    "SQLite's fsync of its log",
)
"""What must be missed on a disk that keeps nothing but what POSIX promises, in the two workloads tried here."""


@pytest.fixture(scope="module")
def processes() -> Iterator[ProcessPoolExecutor]:
    with power.pool() as pool:
        yield pool


def possible(disk: str) -> None:
    """Skip where this machine has no such disk."""
    reason = power.what_is_missing(disk)
    if reason is not None:
        pytest.skip(reason)


def test_every_place_that_fsyncs_has_a_control() -> None:
    """A new fsync has to be named, so that the campaign leaves it out once and sees what happens."""
    assert workloads.all_sites() == power.SITES.keys() | power.BESIDE


def test_a_disk_that_keeps_no_more_than_posix_promises_loses_nothing(processes) -> None:
    """Linked shots and the journal of darks; and each fsync that is left out is missed."""
    possible("posix")
    rows = power.posix_rows(processes, False, ("linked scan", "dark series"), 20, LINKED)
    assert len(rows) == 2 + len(LINKED)
    assert all(row.as_expected for row in rows), [row for row in rows if not row.as_expected]


def test_ext4_loses_nothing(processes) -> None:
    """Crash images of a scan; without SQLite's fsyncs some are wrong."""
    possible("ext4")
    scan = workloads.WORKLOADS["scan"]
    with power.logged("ext4", scan) as disk:
        tally = power.try_images(processes, disk, 2, 24)
    assert tally.points >= 20
    assert tally.wrong == 0, tally.first
    with power.logged("ext4", scan, ("synchronous=FULL (OFF instead)",)) as disk:
        assert power.try_images(processes, disk, 0, None, control=True).wrong
