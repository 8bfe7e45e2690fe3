"""A sample of `faults/kills.py`: scan and daemon are killed, run again, and compared; missing safeguards are seen."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).with_name("faults")))

import kills
import tracing
from stage import Scan, Stage, Watch, undisturbed, workplace
from table import Impossible, Row, markdown


@pytest.fixture(scope="module")
def work() -> Iterator[Path]:
    try:
        tracing.check()
    except Impossible as reason:
        pytest.skip(str(reason))
    with workplace() as folder:
        yield folder


def test_every_failpoint_of_the_sources_is_known_to_the_campaign():
    """A new failpoint has to be added to the list, or nobody dies there."""
    listed = {*kills.STEPS, *kills.COPY_STEPS, *kills.ALERT_STEPS, *kills.CAMERA_STEPS, *kills.SERIES_STEPS}
    listed |= {*kills.REPLAY_STEPS, *kills.DECLARED_STEPS, *kills.CLUSTER_STEPS}
    assert listed == kills.known_steps()


def test_a_scan_killed_before_a_call_ends_as_if_it_were_not(work):
    """A sample of the calls that sync, rename and remove; two failpoints; one second kill."""
    steps = ("before_generation_rename", "after_spool_drop")
    calls = ("fdatasync", "rename", "unlink")
    command = Scan(Stage(work), begun=True)
    sweep, (row,) = kills.swept(command, work, steps, every=8, pages=90, passes=(1,), twice=1, only=calls)
    assert sweep.wrong == []
    assert sweep.killed_again == 1
    assert row.points >= 6
    assert row.as_expected


def test_a_daemon_killed_between_sending_and_knowing_it_alerts_nobody_twice(work):
    """The message that was sent is sent again as it was; no alert is in two messages."""
    sweep, _ = kills.prepared(Watch(Stage(work)), work)
    sweep.kill_at(kills.steps_of(("after_send",), (1,)))
    assert sweep.killed == 1
    assert sweep.wrong == []


def test_without_a_safeguard_it_shows(work):
    """The control: a replay that does not ask what generations hold counts shots twice."""
    sweep, _ = kills.prepared(Scan(Stage(work, "nothing_covered")), work)
    sweep.wanted = undisturbed(Scan(Stage(work)), work / "without")
    row = kills.control(sweep, "control", kills.steps_of(("after_generation_durable",), (1,)))
    assert (row.points, row.wrong) == (1, 1)
    assert row.as_expected


def test_the_table_says_what_is_not_as_expected():
    """Wrong ends, controls that saw nothing, and rows without any point."""
    rows = [
        Row("a", "fine", 3, 0, False, "note"),
        Row("b", "bad", 3, 1, False),
        Row("c", "blind", 3, 0, True),
        Row("d", "sees", 3, 2, True),
        Row("e", "empty", 0, 0, False),
    ]
    assert [row.as_expected for row in rows] == [True, False, False, True, False]
    assert markdown(rows).splitlines()[2:] == [
        "| a | fine | 3 | 0 | note |",
        "| b | bad | 3 | **1** | **wrong** |",
        "| c | control: blind | 3 | **0** | **not caught** |",
        "| d | control: sees | 3 | 2 |  |",
        "| e | empty | 0 | **0** | **nothing was tried** |",
    ]
