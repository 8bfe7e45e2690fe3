"""The outbox: one row per key, messages whose parts and ways are fixed before they are sent."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from hotpixd.store.durable import StateFull
from hotpixd.store.ledger import Ledger
from hotpixd.store.outbox import Alert, Outbox


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    """A new ledger."""
    opened = Ledger(tmp_path / "ledger.sqlite")
    yield opened
    opened.close()


def alert(key: str, subject: str = "source:card", at: str = "2026-11-21T20:00:00.000+00:00") -> Alert:
    return Alert(key, at, "source", subject, f"Alert {key}.", {"n": 1, "name": "käse"})


def test_an_alert_is_written_once_per_key(ledger: Ledger):
    """A replay raises it again; the first one stays, whether it was committed meanwhile or not."""
    outbox = Outbox(ledger)
    assert [a.key for a in outbox.add([alert("a"), alert("b")], send={"source"})] == ["a", "b"]
    assert [a.key for a in outbox.add([alert("b"), alert("c"), alert("c")], send={"source"})] == ["c"]
    ledger.commit()
    assert outbox.add([alert("a", subject="other")], send=()) == []
    written = outbox.alerts(outbox.compose(["x"]))
    assert [replace(a, id=0) for a in written] == [alert("a"), alert("b"), alert("c")]
    assert [a.id for a in written] == sorted({a.id for a in written})


def test_a_message_takes_what_was_gathered_and_no_more(ledger: Ledger):
    """Alerts raised after it belong to the next one; those not to be sent to none."""
    outbox = Outbox(ledger)
    assert not outbox.gathers
    outbox.add([alert("kept")], send=())
    assert not outbox.gathers
    outbox.add([alert("a"), alert("b")], send={"source"})
    assert outbox.gathers
    first = outbox.compose(["mail", "command"])
    assert not outbox.gathers
    outbox.add([alert("c", at="2026-11-21T21:00:00.000+00:00")], send={"source"})
    second = outbox.compose(["mail"])
    assert [a.key for a in outbox.alerts(first)] == ["a", "b"]
    assert [a.key for a in outbox.alerts(second)] == ["c"]
    assert [(d.message, d.channel, d.tries, d.newest_at[11:13]) for d in outbox.due()] == [
        (first, "command", 0, "20"),
        (first, "mail", 0, "20"),
        (second, "mail", 0, "21"),
    ]


def test_what_is_sent_or_given_up_is_not_due_after_a_restart(tmp_path: Path):
    """The others are, with their tries."""
    ledger = Ledger(tmp_path / "ledger.sqlite")
    outbox = Outbox(ledger)
    outbox.add([alert("a")], send={"source"})
    message = outbox.compose(["mail", "mqtt", "command"])
    outbox.record(message, "mail", 0, "sent")
    outbox.record(message, "mqtt", 9, "given up")
    outbox.record(message, "command", 2, "due")
    ledger.close()
    again = Ledger(tmp_path / "ledger.sqlite")
    outbox = Outbox(again)
    assert [(d.channel, d.tries) for d in outbox.due()] == [("command", 2)]
    assert outbox.channels(message) == {"mail", "mqtt", "command"}
    outbox.add([alert("b")], send={"source"})
    assert outbox.compose(["mail"]) == message + 1
    again.close()


def test_without_a_commit_nothing_is_left(tmp_path: Path):
    """An alert is on the disk together with what it tells of, or not at all."""
    ledger = Ledger(tmp_path / "ledger.sqlite")
    outbox = Outbox(ledger)
    outbox.add([alert("a")], send={"source"})
    ledger.commit()
    outbox.add([alert("b")], send={"source"})
    outbox.compose(["mail"])
    ledger._db.close()  # as a crash does
    again = Ledger(tmp_path / "ledger.sqlite")
    outbox = Outbox(again)
    assert outbox.gathers
    assert outbox.due() == []
    assert [row["text"] for row in again.alerts(50)] == ["Alert a."]
    again.close()


def test_with_the_disk_full_alerts_wait_for_room(ledger: Ledger):
    """Then none is known, so all count as new; in the end each is written once."""
    outbox = Outbox(ledger)
    outbox.add([alert("a")], send={"source"})
    ledger.commit()
    ((pages,),) = ledger.rows("PRAGMA page_count")
    ledger.rows(f"PRAGMA max_page_count = {pages}")
    ledger.add_seen(bytes(100_000))
    with pytest.raises(StateFull):
        ledger.commit()
    assert [a.key for a in outbox.add([alert("a"), alert("b")], send={"source"})] == ["a", "b"]
    ledger._db.execute("PRAGMA max_page_count = 1000000")
    assert outbox.add([alert("b")], send={"source"}) == []
    assert [a.key for a in outbox.alerts(outbox.compose(["x"]))] == ["a", "b"]


def test_of_alerts_raised_together_some_are_sent(ledger: Ledger):
    """Those of the topics that are to be; the others are kept."""
    outbox = Outbox(ledger)
    outbox.add([alert("a"), replace(alert("b"), topic="disk")], send={"source"})
    assert [a.key for a in outbox.alerts(outbox.compose(["x"]))] == ["a"]
    assert [a.key for a in outbox.alerts(0)] == ["b"]


def test_the_last_alert_of_a_subject_says_how_it_is(ledger: Ledger):
    """Also before it is committed."""
    outbox = Outbox(ledger)
    assert outbox.last("source:card") is None
    outbox.add([alert("lost"), alert("other", subject="disk")], send={"source"})
    outbox.add([alert("back")], send=())
    last = outbox.last("source:card")
    assert last is not None
    assert (last.key, last.detail) == ("back", {"n": 1, "name": "käse"})


def test_an_alert_refuses_what_json_cannot_hold(ledger: Ledger):
    """The command that gets it may be written in anything."""
    with pytest.raises(ValueError, match="JSON"):
        Outbox(ledger).add(
            [Alert("a", "2026-11-21T20:00:00+00:00", "disk", "disk", "Full.", {"x": float("nan")})], send={"source"}
        )
