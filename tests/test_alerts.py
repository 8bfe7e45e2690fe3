"""Alerts reach people: real servers and commands on loopback, killed processes, hours that pass on a clock of ours.

Run as a program, this file is a small daemon over alerts: ``test_alerts.py LEDGER SETTINGS`` folds a report of
twelve transitions, and works until nothing waits or it is killed.
"""

from __future__ import annotations

import email
import email.policy
import json
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from datetime import time as time_of_day
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import hotpixd
from hotpixd import alerts as module
from hotpixd.alerts import Alerts, AlertSettings, Watchman, composed
from hotpixd.core.frame import SensorLayout
from hotpixd.core.overview import STATIC_SCENE_ADVICE
from hotpixd.core.sensor import FoldReport, Transition
from hotpixd.core.tracks import OBSERVATION
from hotpixd.store.durable import StateFull
from hotpixd.store.ledger import Ledger, TransitionRow

CAMERA = "Canon EOS R6 0123"
LAYOUT = SensorLayout(100, 80, "RGGB")
MORNING = datetime(2026, 11, 21, 9, 0, tzinfo=UTC)


def report(*transitions: Transition) -> FoldReport:
    return FoldReport(True, None, None, transitions, np.empty(0, np.int64), np.empty(0, OBSERVATION), "")


def stable(site: int, kind: str = "hot", sigma: float = 20.0) -> Transition:
    return Transition(site, "stable", kind, 30.0, sigma)


class Clock:
    """Time that passes when a test says so; both clocks in step."""

    def __init__(self, now: datetime = MORNING) -> None:
        self.start = now
        self.passed_s = 0.0

    def __call__(self) -> float:
        return 1000.0 + self.passed_s

    def now(self) -> datetime:
        return self.start + timedelta(seconds=self.passed_s)


class Bench:
    """Alerts over a ledger, with a clock of the test's own."""

    def __init__(self, path: Path, settings: AlertSettings, clock: Clock | None = None) -> None:
        self.closed = False
        self.clock = clock or Clock()
        self.woken = threading.Event()
        self.ledger = Ledger(path / "ledger.sqlite")
        self.alerts = Alerts(self.ledger, settings, wake=self.woken.set, clock=self.clock, now=self.clock.now)

    def close(self) -> None:
        if not self.closed:
            self.alerts.close()
            self.ledger.close()
        self.closed = True

    def outbox_sites(self) -> list[tuple[str, int]]:
        """Topic and site of each alert of a transition, in order."""
        rows = self.ledger.rows("SELECT topic, detail FROM alert ORDER BY id")
        return [(topic, json.loads(detail)["site"]) for topic, detail in rows]

    def fold(self, *transitions: Transition, seq: int = 1) -> None:
        self.alerts.folded("cam", CAMERA, LAYOUT, report(*transitions), seq)

    def later(self, seconds: float) -> float | None:
        """Let time pass, and work until nobody is sending."""
        self.clock.passed_s += seconds
        return self.settle()

    def settle(self) -> float | None:
        until = time.monotonic() + 30
        while True:
            self.woken.clear()
            again = self.alerts.work()
            if not self.alerts._opening and not any(c.busy for c in self.alerts._channels.values()):
                return again
            assert self.woken.wait(until - time.monotonic()), "nobody woke the loop"

    def states(self) -> list[tuple[int, int, str]]:
        return self.ledger.rows("SELECT message, tries, state FROM delivery ORDER BY message, channel")


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Callable[..., Bench]]:
    """Makes benches that are closed at the end."""
    made = []

    def make(settings: AlertSettings | None = None, clock: Clock | None = None, path: Path = tmp_path) -> Bench:
        made.append(Bench(path, settings or AlertSettings(), clock))
        return made[-1]

    yield make
    for one in made:
        one.close()


class Inbox:
    """A command that keeps what it is given, one file per message, and can be told to fail."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.broken = folder / "broken"
        script = f'test -e "{self.broken}" && {{ echo "no route" >&2; exit 1; }}; cat > "{folder}/$$.json"'
        script += f'; echo "$HOTPIXD_MESSAGE_ID" >> "{folder}/ids"'
        self.command = ("/bin/sh", "-c", script)

    def messages(self) -> list[dict[str, Any]]:
        files = sorted(self.folder.glob("*.json"), key=lambda path: path.stat().st_mtime_ns)
        return [json.loads(path.read_text()) for path in files]

    def ids(self) -> list[str]:
        path = self.folder / "ids"
        return path.read_text().split() if path.exists() else []


@pytest.fixture
def inbox(tmp_path: Path) -> Inbox:
    """An inbox for the command."""
    folder = tmp_path / "inbox"
    folder.mkdir()
    return Inbox(folder)


class Web:
    """A real web server that keeps what it is sent and answers as it is told."""

    def __init__(self) -> None:
        self.got: list[dict[str, Any]] = []
        self.status = 200
        web = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                web.got.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
                self.send_response(web.status)
                self.end_headers()

            def log_message(self, *arguments: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.port = self.server.server_port
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def ids(self) -> list[str]:
        return [got["message"].rpartition("hotpixd message ")[2] for got in self.got]


@pytest.fixture
def web() -> Iterator[Web]:
    """A web server on loopback."""
    server = Web()
    yield server
    server.server.shutdown()
    server.server.server_close()


# --- what is raised, and what it says


def test_a_transition_is_alerted_once_whatever_is_replayed(bench: Callable[..., Bench]):
    """Appeared and dropped are not worth an alert; a replay of the frame raises nothing."""
    one = bench()
    one.ledger.add_sensor("cam", {})
    one.ledger.add_transitions([TransitionRow("cam", 102, 1, "stable", {})])
    for _ in range(2):
        one.fold(stable(102), Transition(5, "appeared", "hot", 9.0, 5.0), Transition(6, "dropped", "hot", 1.0, 5.0))
    one.fold(stable(102), seq=1)
    assert [entry["text"] for entry in one.alerts.recent()] == [
        f"{CAMERA}: hot G at (2, 1), +20.0 sigma is a stable defect."
    ]
    one.fold(stable(102), seq=7)
    assert [(entry["topic"], entry["at"]) for entry in one.alerts.recent()] == [
        ("stable", "2026-11-21T09:00:00.000Z")
    ] * 2


def test_what_was_told_is_not_told_again_when_shots_are_folded_anew(bench: Callable[..., Bench]):
    """As after a loss of generations: under later rows, the same sites become stable. Recovered between, it is news."""
    one = bench(AlertSettings())
    one.ledger.add_sensor("cam", {})
    one.ledger.add_transitions(TransitionRow("cam", n, 3, "stable", {}) for n in (1, 2))
    one.fold(stable(1), stable(2), seq=3)
    one.ledger.delete_derived_after("cam", 0)
    one.fold(stable(1), stable(2), stable(5), seq=11)
    assert one.outbox_sites() == [("stable", 1), ("stable", 2), ("stable", 5)]
    one.fold(Transition(1, "recovered", "hot", 0.0, 0.1), seq=12)
    one.fold(stable(1), seq=13)
    assert one.outbox_sites()[3:] == [("recovered", 1), ("stable", 1)]


def test_an_alert_is_on_the_disk_with_its_transition(tmp_path: Path):
    """A crash before the commit loses both, and the replay brings both back."""
    one = Bench(tmp_path, AlertSettings())
    one.ledger.add_sensor("cam", {})
    one.ledger.commit()
    one.ledger.add_transitions([TransitionRow("cam", 102, 1, "stable", {})])
    one.fold(stable(102))
    one.ledger._db.close()  # as a crash does
    again = Bench(tmp_path, AlertSettings())
    assert again.ledger.transitions("cam") == []
    assert again.alerts.recent() == []
    again.ledger.add_transitions([TransitionRow("cam", 102, 1, "stable", {})])
    again.fold(stable(102))
    again.ledger.commit()
    again.fold(stable(102))
    assert len(again.alerts.recent()) == len(again.ledger.transitions("cam")) == 1
    again.close()


def test_kinds_and_excess_decide_what_is_alerted(bench: Callable[..., Bench]):
    """Excess says nothing about a dead or stuck sample; of a recovered one, what it had when it became stable."""
    one = bench(AlertSettings(kinds=frozenset(("hot", "dead")), min_excess_sigma=10.0))
    one.ledger.add_sensor("cam", {})
    details = {1: 50.0, 2: 4.0}
    one.ledger.add_transitions(TransitionRow("cam", n, 1, "stable", {"excess_sigma": s}) for n, s in details.items())
    recovered = [Transition(n, "recovered", "hot", 0.0, 0.1) for n in (1, 2)]
    one.fold(
        *recovered, stable(3, sigma=9.9), stable(4, sigma=10.0), stable(5, "dead", -1.0), stable(6, "stuck"), seq=2
    )
    assert [(a.topic, a.detail["site"]) for a in all_alerts(one)] == [("recovered", 1), ("stable", 4), ("stable", 5)]


def all_alerts(one: Bench) -> list[Any]:
    rows = one.ledger.rows("SELECT subject FROM alert ORDER BY id")
    return [one.alerts.last(subject) for (subject,) in rows]


def test_a_thousand_defects_make_one_message(
    bench: Callable[..., Bench], inbox: Inbox, caplog: pytest.LogCaptureFixture
):
    """With counts by kind and the ten strongest; the log is not flooded either."""
    one = bench(AlertSettings(command=inbox.command, gather_s=30))
    with caplog.at_level(logging.WARNING):
        for seq in range(1, 5):
            one.fold(*(stable(n * 4 + seq, "dead" if n % 5 == 0 else "hot", float(n)) for n in range(250)), seq=seq)
            one.later(5)
    assert len(caplog.records) < 60
    assert inbox.messages() == []
    one.later(30)
    (message,) = inbox.messages()
    assert len(message["alerts"]) == 1000
    assert message["title"] == "hotpixd: 1000 stable defects"
    lines = message["body"].splitlines()
    assert lines[0] == f"{CAMERA}: 1000 defects became stable: 800 hot, 200 dead."
    assert [line.split()[-2] for line in lines[1:11]] == [f"+{n}.0" for n in (249, 248, 247) for _ in range(4)][:10]
    assert lines[11] == "  ... and 990 more"
    assert lines[-1] == f"hotpixd message {message['id']}"
    assert len(lines) == 14
    assert one.alerts.waiting == 0
    assert len(one.alerts.recent()) == 50


def test_a_message_says_what_it_gathered_by_topic(bench: Callable[..., Bench], inbox: Inbox):
    """Two cameras apart, conditions by their sentences, and when all that was."""
    one = bench(AlertSettings(command=inbox.command))
    one.alerts.raise_("disk", "disk", "d1", "The disk is nearly full.")
    one.alerts.folded("other", "Other camera", LAYOUT, report(stable(3, "stuck", float("nan"))), 1)
    one.fold(stable(1), stable(2), seq=2)
    one.clock.passed_s = 10
    one.fold(Transition(1, "recovered", "hot", 0.0, 0.0), seq=3)
    one.later(30)
    (message,) = inbox.messages()
    assert message["title"] == "hotpixd: 3 stable defects, 1 recovered defect, disk"
    assert message["body"].splitlines()[:-1] == [
        "Other camera: stuck G at (3, 0) is a stable defect.",
        f"{CAMERA}: 2 defects became stable: 2 hot.",
        "  hot G at (1, 0), +20.0 sigma",
        "  hot R at (2, 0), +20.0 sigma",
        f"{CAMERA}: hot G at (1, 0), +0.0 sigma has recovered.",
        "The disk is nearly full.",
        "Raised 2026-11-21 09:00:00 to 2026-11-21 09:00:10 UTC",
    ]
    assert [alert["topic"] for alert in message["alerts"]] == ["disk", "stable", "stable", "stable", "recovered"]
    assert message["alerts"][1]["detail"]["excess_sigma"] is None
    assert message["alerts"][2]["detail"]["camera"] == CAMERA


def test_a_message_counts_sensors_of_one_description_apart(bench: Callable[..., Bench], inbox: Inbox):
    """Two bodies that write no serial number."""
    one = bench(AlertSettings(command=inbox.command))
    one.alerts.folded("other", CAMERA, LAYOUT, report(stable(1), stable(2)), 1)
    one.fold(stable(3), stable(4), stable(5), seq=2)
    one.later(30)
    (message,) = inbox.messages()
    assert [line for line in message["body"].splitlines() if "became" in line] == [
        f"{CAMERA}: 2 defects became stable: 2 hot.",
        f"{CAMERA}: 3 defects became stable: 3 hot.",
    ]


def test_what_comes_after_the_window_is_another_message(bench: Callable[..., Bench], inbox: Inbox):
    """The window starts with the first alert, so that a steady trickle is told of as well."""
    one = bench(AlertSettings(command=inbox.command, gather_s=30))
    assert one.alerts.work() is None
    for n in range(5):
        one.fold(stable(n), seq=n + 1)
        one.later(10)
    one.later(30)
    assert [[a["detail"]["site"] for a in m["alerts"]] for m in inbox.messages()] == [[0, 1, 2], [3, 4]]
    first, second = inbox.ids()
    assert first.endswith("-1")
    assert second.endswith("-2")
    assert [m["id"] for m in inbox.messages()] == [first, second]
    one.fold(stable(9), seq=9)
    assert one.alerts.work() == 30


def test_topics_not_chosen_are_only_logged(bench: Callable[..., Bench], inbox: Inbox, caplog: pytest.LogCaptureFixture):
    """They are in the alert log all the same; so is everything where there is no channel."""
    one = bench(AlertSettings(command=inbox.command, topics=frozenset(("stable",))))
    one.alerts.raise_("disk", "disk", "d1", "The disk is nearly full.")
    one.fold(stable(1))
    one.later(30)
    (message,) = inbox.messages()
    assert [a["topic"] for a in message["alerts"]] == ["stable"]
    assert [entry["topic"] for entry in one.alerts.recent()] == ["disk", "stable"]
    assert "The disk is nearly full." in caplog.messages
    silent = AlertSettings()
    one.alerts.change_settings(silent)
    one.fold(stable(2), seq=2)
    assert one.alerts.waiting == 0
    assert one.later(1000) is None


def test_texts_from_outside_cannot_break_the_log(bench: Callable[..., Bench], caplog: pytest.LogCaptureFixture):
    """Names of files hold line ends, escapes and bytes that are not UTF-8."""
    one = bench()
    one.alerts.raise_("refused", "x\udc80", "k\udc80", "a\nb\x1b[31m\udcff", {"path": "a\udcff", "n": float("inf")})
    one.ledger.commit()
    assert caplog.messages == ["a\\nb\\x1b[31m\\udcff"]
    last = one.alerts.last("x\udc80")
    assert last is not None
    assert dict(last.detail) == {"path": "a\\udcff", "n": None}


def test_the_same_alerts_are_the_same_message(bench: Callable[..., Bench], tmp_path: Path):
    """Another state numbers its messages alike, but its ids are others: so are those after a backup was restored."""
    one = bench()
    one.fold(stable(1))
    (alert,) = all_alerts(one)
    assert composed(1, [alert]) == composed(1, [alert])
    other = bench(path=Path(shutil.copytree(tmp_path, tmp_path / "other")), clock=Clock(MORNING + timedelta(days=1)))
    other.fold(stable(1))
    (later,) = all_alerts(other)
    assert composed(1, [later]).id != composed(1, [alert]).id
    # Made while there is no ledger, an alert has another number in each.
    assert composed(-7, [replace(alert, id=1)]).json() == composed(-7, [replace(alert, id=2)]).json()


# --- when it is sent


@pytest.mark.parametrize(
    ("start", "end", "hour", "waits_h"),
    [(22, 7, 23, 8), (22, 7, 3, 4), (22, 7, 7, 0), (22, 7, 12, 0), (12, 14, 13, 1), (12, 14, 14, 0), (12, 14, 2, 0)],
)
def test_quiet_hours_hold_messages_back(
    bench: Callable[..., Bench], inbox: Inbox, start: int, end: int, hour: int, waits_h: int
):
    """By the local clock, also over midnight; all of a night make one message."""
    quiet = (time_of_day(start), time_of_day(end))
    begin = datetime(2026, 11, 21, hour, 0).astimezone()  # local
    one = bench(AlertSettings(command=inbox.command, quiet_hours=quiet), Clock(begin))
    one.fold(stable(1))
    one.later(40)
    assert len(inbox.messages()) == (waits_h == 0)
    if not waits_h:
        return
    assert 0 < (one.alerts.work() or 0) <= 600
    one.fold(stable(2), seq=2)
    one.later(waits_h * 3600 - 41)
    assert inbox.messages() == []
    one.later(1)
    (message,) = inbox.messages()
    assert len(message["alerts"]) == 2


def test_retries_wait_longer_each_time_and_end(
    bench: Callable[..., Bench], inbox: Inbox, caplog: pytest.LogCaptureFixture
):
    """From 10 s to an hour; after 72 hours the log says that it is given up."""
    inbox.broken.touch()
    one = bench(AlertSettings(command=inbox.command, gather_s=0))
    one.fold(stable(1))
    waits = []
    while one.alerts.waiting:
        again = one.settle()
        if again is None:
            break
        waits.append(again)
        one.clock.passed_s += again
    for n, wait in enumerate(waits):
        nominal = min(10 * 2**n, 3600)
        assert 0.8 * nominal <= wait <= 1.2 * nominal
    assert 72 * 3600 < one.clock.passed_s < 74 * 3600
    assert len(waits) == pytest.approx(81, abs=10)
    assert one.states() == [(1, len(waits) + 1, "given up")]
    assert caplog.records[-1].levelno == logging.ERROR
    assert "is given up: it ended with 1: no route" in caplog.messages[-1]
    assert sum(record.levelno == logging.WARNING for record in caplog.records) == 2  # the alert, the first failure


def test_a_restart_takes_up_what_is_due(bench: Callable[..., Bench], inbox: Inbox):
    """Messages not delivered and alerts not gathered, with the age that they have by then."""
    inbox.broken.touch()
    settings = AlertSettings(command=inbox.command)
    one = bench(settings)
    one.fold(stable(1))
    one.later(30)
    one.fold(stable(2), seq=2)
    one.close()
    inbox.broken.unlink()
    again = bench(settings, Clock(MORNING + timedelta(hours=1)))
    assert again.alerts.waiting == 2
    again.settle()
    assert [[a["detail"]["site"] for a in m["alerts"]] for m in inbox.messages()] == [[1]]
    again.later(30)
    assert [[a["detail"]["site"] for a in m["alerts"]] for m in inbox.messages()] == [[1], [2]]
    assert again.states() == [(1, 1, "sent"), (2, 0, "sent")]


def test_a_message_too_old_is_tried_once_more_after_a_restart(bench: Callable[..., Bench], inbox: Inbox):
    """The clock may have jumped, so age alone does not give it up."""
    inbox.broken.touch()
    settings = AlertSettings(command=inbox.command, gather_s=0)
    one = bench(settings)
    one.fold(stable(1))
    one.settle()
    one.close()
    again = bench(settings, Clock(MORNING + timedelta(days=30)))
    assert again.alerts.waiting == 1
    again.settle()
    assert again.states() == [(1, 2, "given up")]


def test_a_message_never_taken_does_not_hold_up_others(bench: Callable[..., Bench], tmp_path: Path, inbox: Inbox):
    """The one tried least goes first."""
    picky = ("/bin/sh", "-c", f'case "$HOTPIXD_MESSAGE_ID" in *-1) exit 1;; esac; cat > "{inbox.folder}/$$.json"')
    one = bench(AlertSettings(command=picky, gather_s=0))
    for n in range(3):
        one.fold(stable(n), seq=n + 1)
        one.later(20)
    one.later(3600)
    assert [[a["detail"]["site"] for a in m["alerts"]] for m in inbox.messages()] == [[1], [2]]
    assert one.alerts.waiting == 1


def test_while_every_channel_fails_alerts_are_gathered_on(bench: Callable[..., Bench], inbox: Inbox):
    """A dead server must not leave a message per alert behind."""
    inbox.broken.touch()
    one = bench(AlertSettings(command=inbox.command, gather_s=0))
    for n in range(200):
        one.fold(stable(n), seq=n + 1)
        one.later(60)
    assert one.alerts.waiting < 20
    inbox.broken.unlink()
    for _ in range(one.alerts.waiting + 1):
        one.later(3600 * 1.2)
    sites = [a["detail"]["site"] for m in inbox.messages() for a in m["alerts"]]
    assert sorted(sites) == list(range(200))


def test_nothing_is_sent_that_is_not_on_the_disk(
    bench: Callable[..., Bench], inbox: Inbox, monkeypatch: pytest.MonkeyPatch
):
    """With the disk full nothing goes out; when there is room again, each alert does so once."""
    one = bench(AlertSettings(command=inbox.command, gather_s=0))
    one.fold(stable(1))
    commit = one.ledger.commit

    def full() -> None:
        one.ledger._roll_back()  # as SQLite does
        raise StateFull("No space left.")

    monkeypatch.setattr(one.ledger, "commit", full)
    for _ in range(3):
        with pytest.raises(StateFull):
            one.alerts.work()
    assert inbox.ids() == []
    monkeypatch.setattr(one.ledger, "commit", commit)
    one.settle()
    (message,) = inbox.messages()
    assert len(message["alerts"]) == 1
    assert one.states() == [(1, 0, "sent")]


# --- where it is sent


def test_settings_can_change_while_messages_wait(bench: Callable[..., Bench], inbox: Inbox, web: Web):
    """What waits for a channel that was mistyped goes to the one that replaces it, under its id."""
    inbox.broken.touch()
    one = bench(AlertSettings(command=inbox.command, gather_s=0))
    one.fold(stable(1))
    one.settle()
    assert one.alerts.waiting == 1
    one.alerts.change_settings(AlertSettings(notify=(f"json://127.0.0.1:{web.port}/",), gather_s=0))
    one.settle()
    (id_,) = web.ids()
    assert id_.endswith("-1")
    assert sorted(state for _, _, state in one.states()) == ["given up", "sent"]
    assert one.alerts.waiting == 0


def test_without_a_channel_nothing_waits(bench: Callable[..., Bench], inbox: Inbox):
    """A reload that takes the last channel away left one message waiting for ever; the next channel gets it."""
    inbox.broken.touch()
    one = bench(AlertSettings(command=inbox.command))
    one.fold(stable(1))
    one.later(30)
    one.fold(stable(2), seq=2)
    one.settle()
    assert one.alerts.waiting == 2
    one.alerts.change_settings(AlertSettings())
    assert one.later(3600) is None
    assert one.alerts.waiting == 0
    inbox.broken.unlink()
    one.alerts.change_settings(AlertSettings(command=inbox.command))
    for _ in range(2):
        one.later(30)
    assert sorted(a["detail"]["site"] for m in inbox.messages() for a in m["alerts"]) == [1, 2]
    assert one.alerts.waiting == 0


def test_a_message_reaches_a_web_server_and_the_command(bench: Callable[..., Bench], inbox: Inbox, web: Web):
    """Each gets it once, under one id; a server that answers 500 gets it again, the command does not."""
    web.status = 500
    one = bench(AlertSettings(notify=(f"json://127.0.0.1:{web.port}/path",), command=inbox.command))
    one.settle()
    one.fold(stable(102))
    one.later(30)
    assert len(web.got) == len(inbox.messages()) == 1
    one.later(3)
    assert len(web.got) == 1
    web.status = 200
    one.later(10)
    one.later(5000)
    assert len(web.got) == 2
    assert web.got[0] == web.got[1]
    assert web.got[0]["title"] == "hotpixd: 1 stable defect"
    assert web.ids() == inbox.ids() * 2
    assert inbox.messages()[0]["body"] == web.got[0]["message"]
    assert inbox.messages()[0]["alerts"][0]["at"] == "2026-11-21T09:00:00.000Z"
    assert one.alerts.waiting == 0


def test_a_hanging_server_holds_up_nobody(bench: Callable[..., Bench], inbox: Inbox):
    """Neither the loop nor the command."""
    with closing(socket.create_server(("127.0.0.1", 0))) as silent:
        url = f"json://127.0.0.1:{silent.getsockname()[1]}/?rto=2"
        one = bench(AlertSettings(notify=(url,), command=inbox.command, gather_s=0))
        one.settle()
        one.fold(stable(1))
        begin = time.monotonic()
        one.alerts.work()
        assert time.monotonic() - begin < 2
        while not inbox.ids():
            assert one.woken.wait(20)
            one.woken.clear()
            one.alerts.work()
        one.settle()  # until its timeout
        silent.setblocking(False)
        silent.accept()[0].close()
        with pytest.raises(BlockingIOError):  # it was not tried a second time meanwhile
            silent.accept()
        assert sorted((tries, state) for _, tries, state in one.states()) == [(0, "sent"), (1, "due")]


def test_a_command_that_hangs_is_killed_with_its_children(
    bench: Callable[..., Bench], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    """And tried again later."""
    monkeypatch.setattr(module, "_COMMAND_S", 0.5)
    script = f'sleep 300 & echo $! > "{tmp_path}/child"; wait'
    one = bench(AlertSettings(command=("/bin/sh", "-c", script), gather_s=0))
    one.fold(stable(1))
    one.settle()
    child = int((tmp_path / "child").read_text())
    until = time.monotonic() + 10
    while Path(f"/proc/{child}").exists() and "Z (" not in Path(f"/proc/{child}/status").read_text():
        assert time.monotonic() < until
        time.sleep(0.01)
    assert one.states() == [(1, 1, "due")]
    assert "was killed" in caplog.messages[-1]


def test_a_command_may_leave_something_running(bench: Callable[..., Bench]):
    """Its exit says that it took the message, even if a child keeps its outputs open."""
    one = bench(AlertSettings(command=("/bin/sh", "-c", "sleep 20 & exit 0"), gather_s=0))
    one.fold(*(stable(n) for n in range(500)))  # more than a pipe holds, and it reads nothing
    begin = time.monotonic()
    one.settle()
    assert time.monotonic() - begin < 15
    assert one.states() == [(1, 0, "sent")]


def test_a_command_that_is_not_there_is_a_failure(bench: Callable[..., Bench], caplog: pytest.LogCaptureFixture):
    """It may be installed later."""
    one = bench(AlertSettings(command=("/nowhere/notify", "hunter2secret"), gather_s=0))
    one.fold(stable(1))
    one.settle()
    assert one.states() == [(1, 1, "due")]
    assert "cannot be started: No such file or directory" in caplog.messages[-1]
    assert "hunter2secret" not in caplog.text


@pytest.mark.filterwarnings("ignore:Requiring AUTH")
def test_a_message_reaches_a_mail_server(bench: Callable[..., Bench]):
    """SMTP with a password, as a relay on the local network has it."""
    controller = pytest.importorskip("aiosmtpd.controller")
    smtp = pytest.importorskip("aiosmtpd.smtp")
    mails = []

    class Mailbox:
        async def handle_DATA(self, server: Any, session: Any, envelope: Any) -> str:  # noqa: N802, ARG002
            mails.append((envelope.rcpt_tos, email.message_from_bytes(envelope.content, policy=email.policy.default)))
            return "250 OK"

    def authenticate(server: Any, session: Any, envelope: Any, mechanism: Any, data: Any) -> Any:
        return smtp.AuthResult(success=data == smtp.LoginPassword(b"user", b"hunter2secret"))

    with closing(socket.create_server(("127.0.0.1", 0))) as free:
        port = free.getsockname()[1]
    server = controller.Controller(
        Mailbox(), "127.0.0.1", port, authenticator=authenticate, auth_required=True, auth_require_tls=False
    )
    server.start()
    try:
        url = f"mailto://user:hunter2secret@127.0.0.1:{port}?mode=insecure&from=cam@example.org&to=me@example.org"
        one = bench(AlertSettings(notify=(url,), gather_s=0))
        one.settle()
        one.fold(stable(102), stable(103))
        one.settle()
    finally:
        server.stop()
    ((recipients, mail),) = mails
    assert recipients == ["me@example.org"]
    assert mail["subject"] == "hotpixd: 2 stable defects"
    text = mail.get_body(("plain",)).get_content()
    assert "hot G at (2, 1), +20.0 sigma" in text
    assert f"hotpixd message {one.alerts._message(1).id}" in text
    assert one.states() == [(1, 0, "sent")]


@pytest.mark.skipif(not (shutil.which("mosquitto") or Path("/usr/sbin/mosquitto").exists()), reason="needs mosquitto")
def test_a_message_reaches_an_mqtt_broker(bench: Callable[..., Bench], tmp_path: Path):
    """Retried until the broker is there."""
    client = pytest.importorskip("paho.mqtt.client")
    with closing(socket.create_server(("127.0.0.1", 0))) as free:
        port = free.getsockname()[1]
    one = bench(AlertSettings(notify=(f"mqtt://127.0.0.1:{port}/home/camera",), gather_s=0))
    one.settle()
    one.fold(stable(102))
    one.settle()
    assert one.states() == [(1, 1, "due")]
    settings = tmp_path / "mosquitto.conf"
    settings.write_text(f"listener {port} 127.0.0.1\nallow_anonymous true\n")
    program = shutil.which("mosquitto") or "/usr/sbin/mosquitto"
    broker = subprocess.Popen([program, "-c", str(settings)], stderr=subprocess.DEVNULL)
    try:
        got: list[str] = []
        subscribed, received = threading.Event(), threading.Event()
        subscriber = client.Client(client.CallbackAPIVersion.VERSION2)
        subscriber.on_connect = lambda c, *_: c.subscribe("home/camera")
        subscriber.on_subscribe = lambda *_: subscribed.set()
        subscriber.on_message = lambda _, __, message: (got.append(message.payload.decode()), received.set())
        until = time.monotonic() + 20
        while True:
            try:
                subscriber.connect("127.0.0.1", port)
                break
            except OSError:
                assert time.monotonic() < until
                time.sleep(0.05)
        subscriber.loop_start()
        assert subscribed.wait(20)
        one.later(20)
        assert received.wait(20)
        subscriber.loop_stop()
    finally:
        broker.terminate()
        broker.wait(20)
    (payload,) = got
    assert "hot G at (2, 1)" in payload
    assert payload.endswith(f"hotpixd message {one.alerts._message(1).id}")
    assert one.states() == [(1, 1, "sent")]


@pytest.fixture
def journal() -> Iterator[list[str]]:
    """All that reaches the root logger's handler at the lowest level, as that of the daemon does. (caplog also
    listens to loggers that do not propagate.)
    """
    told: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: told.append(f"{record.levelname} {record.getMessage()}")  # type: ignore[method-assign]
    root = logging.getLogger()
    level = root.level
    root.addHandler(handler)
    root.setLevel(1)
    yield told
    root.setLevel(level)
    root.removeHandler(handler)


def test_secrets_are_never_told(
    bench: Callable[..., Bench], tmp_path: Path, web: Web, journal: list[str], capfd: pytest.CaptureFixture[str]
):
    """Not in the log, at any level and of any library; not on stderr, not in the ledger."""
    web.status = 500
    urls = (
        f"json://hunter2user:hunter2pass@127.0.0.1:{web.port}/hunter2path?+X-Key=hunter2key",
        f"ntfy://hunter2user:hunter2pass@127.0.0.1:{web.port}/hunter2topic",
        "json://hunter2user:hunter2pass@127.0.0.1:9/hunter2path",
        "mailto://hunter2user:hunter2pass@127.0.0.1:9?mode=insecure&from=hunter2from@x.org&to=hunter2to@x.org",
        "mqtt://hunter2user:hunter2pass@127.0.0.1:9/hunter2topic",
        "slack://hunter2token",
        "nosuch://hunter2user:hunter2pass@hunter2host/",
        "hunter2whole",
    )
    one = bench(AlertSettings(notify=urls, gather_s=0))
    one.settle()
    one.fold(stable(1))
    one.settle()
    assert [tries for _, tries, _ in one.states()] == [1] * 5
    told = capfd.readouterr()
    assert "hunter2" not in "".join(journal) + told.out + told.err
    for path in tmp_path.glob("ledger.sqlite*"):
        assert b"hunter2" not in path.read_bytes()
    ours = [line for line in journal if "not delivered" in line]
    assert len(ours) == 5
    assert any(f"to json://127.0.0.1:{web.port}, to be tried again: Failed to send JSON" in line for line in ours)
    assert any(f"to ntfy://127.0.0.1:{web.port}, to be tried again: Failed to send ntfy" in line for line in ours)
    assert [line.partition(" cannot be used")[0] for line in journal if line.startswith("ERROR")] == [
        "ERROR URL 6 of alerts.notify (slack://)",
        "ERROR URL 7 of alerts.notify (nosuch://)",
        "ERROR URL 8 of alerts.notify (without a scheme)",
    ]


# --- kill -9


def main(path: Path, given: dict[str, Any]) -> None:
    """Be a small daemon, until nothing waits."""
    ledger = Ledger(path)
    woken = threading.Event()
    alerts = Alerts(ledger, AlertSettings(notify=tuple(given["notify"]), gather_s=0.05), wake=woken.set)
    ledger.add_sensor("cam", {})
    for seq in range(1, 4):
        transitions = [stable(10 * seq + n) for n in range(4)]
        ledger.add_transitions(TransitionRow("cam", t.site, seq, t.change, {}) for t in transitions)
        alerts.folded("cam", CAMERA, LAYOUT, report(*transitions), seq)
        while alerts.waiting and not given.get("leave"):
            again = alerts.work()
            if alerts.waiting:
                woken.wait(again)
                woken.clear()
    if given.get("leave"):
        # With a send under way.
        while not any(channel.busy for channel in alerts._channels.values()):
            time.sleep(0.05)
            alerts.work()
        alerts.close(timeout_s=0.2)
    ledger.close()


def run(path: Path, failpoint: str | None = None, **given: Any) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(Path(hotpixd.__file__).parents[1])}
    environment.pop("HOTPIXD_FAILPOINT", None)
    if failpoint:
        environment["HOTPIXD_FAILPOINT"] = failpoint
    return subprocess.run(
        [sys.executable, __file__, str(path), json.dumps(given)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )


def sites(path: Path) -> dict[str, list[int]]:
    """Sites by the message that tells of them."""
    with closing(Ledger(path)) as ledger:
        alerts = Alerts(ledger, AlertSettings(), wake=lambda: None)
        numbers = [n for (n,) in ledger.rows("SELECT DISTINCT message FROM alert WHERE message > 0 ORDER BY message")]
        messages = map(alerts._message, numbers)
        return {message.id: [int(a.detail["site"]) for a in message.alerts] for message in messages}


@pytest.mark.parametrize(("failpoint", "sent_twice"), [("before_send:kill:2", 0), ("after_send:kill:2", 1)])
def test_killed_around_sending_every_transition_is_told_of(tmp_path: Path, web: Web, failpoint: str, sent_twice: int):
    """Killed before it is sent, a message arrives once; killed before that is written down, twice with one id."""
    path = tmp_path / "ledger.sqlite"
    url = f"json://127.0.0.1:{web.port}/"
    killed = run(path, failpoint, notify=[url])
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert len(web.got) == 1 + sent_twice
    done = run(path, notify=[url])
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    told = sites(path)
    assert sorted(site for group in told.values() for site in group) == [
        10 * seq + n for seq in (1, 2, 3) for n in range(4)
    ]
    assert set(web.ids()) == set(told)
    assert len(web.ids()) - len(told) == sent_twice
    for id_ in told:
        bodies = {got["message"] for got in web.got if got["message"].endswith(id_)}
        assert len(bodies) == 1


def test_the_end_of_the_process_does_not_wait_for_a_dead_server(tmp_path: Path):
    """Its thread is left behind; the message stays due."""
    with closing(socket.create_server(("127.0.0.1", 0))) as silent:
        url = f"json://127.0.0.1:{silent.getsockname()[1]}/?cto=50&rto=50"
        begin = time.monotonic()
        done = run(tmp_path / "ledger.sqlite", notify=[url], leave=True)
        took_s = time.monotonic() - begin
    assert done.returncode == 0, done.stderr
    assert took_s < 40
    with closing(Ledger(tmp_path / "ledger.sqlite")) as ledger:
        assert ledger.rows("SELECT tries, state FROM delivery") == [(0, "due")]


# --- conditions


class Watch:
    """A watchman over a bench."""

    def __init__(self, one: Bench) -> None:
        self.one = one
        self.watchman = Watchman(one.alerts, clock=one.clock)

    def told(self) -> list[str]:
        return [entry["text"] for entry in self.one.alerts.recent()]


def test_a_source_is_lost_and_back(bench: Callable[..., Bench]):
    """After a minute, once; also across a restart. A card that is only changed is nobody's business."""
    one = bench()
    watch = Watch(one)
    for seconds, status in (
        (0, "starting"),
        (1, "watching"),
        (1, "away"),
        (59, "away"),
        (1, "watching"),
        (1, "trouble"),
    ):
        one.clock.passed_s += seconds
        watch.watchman.source("/card", status, "it cannot be listed")
    assert watch.told() == []
    for _ in range(100):
        one.clock.passed_s += 1
        watch.watchman.source("/card", "trouble", "it cannot be listed")
    assert watch.told() == ["Source /card is in trouble: it cannot be listed"]
    again = Watch(one)
    one.clock.passed_s += 1
    again.watchman.source("/card", "away", None)
    one.clock.passed_s += 100
    again.watchman.source("/card", "away", None)
    assert len(again.told()) == 1
    again.watchman.source("/card", "watching", None)
    again.watchman.source("/card", "watching", None)
    assert again.told()[1:] == ["Source /card is watched again."]
    one.clock.passed_s += 1
    again.watchman.source("/card", "away", None)
    one.clock.passed_s += 61
    again.watchman.source("/card", "away", None)
    assert again.told()[2:] == ["Source /card is away."]


def test_a_run_of_refusals_is_a_few_alerts(bench: Callable[..., Bench]):
    """The first, the tenth, the hundredth; a run ends after an hour, and goes on over a restart."""
    one = bench()
    watch = Watch(one)
    for n in range(150):
        one.clock.passed_s += 31
        watch.watchman.outcome(Path(f"/card/IMG_{n}.JPG"), "refused", "it was edited")
        watch.watchman.outcome(Path("/card/fine.JPG"), "folded", None)
    assert watch.told() == [
        "IMG_0.JPG was refused: it was edited",
        "IMG_9.JPG was refused (10 such shots by now): it was edited",
        "IMG_99.JPG was refused (100 such shots by now): it was edited",
    ]
    watch.watchman.outcome(Path("/card/x.JPG"), "unreadable", "'/card/x.JPG' cannot be read: Input/output error.")
    assert watch.told()[3:] == ["x.JPG could not be taken: '/card/x.JPG' cannot be read: Input/output error."]
    again = Watch(one)
    again.watchman.outcome(Path("/card/y.JPG"), "refused", "it was edited")
    assert len(again.told()) == 4
    one.clock.passed_s += 3601
    again.watchman.outcome(Path("/card/z.JPG"), "refused", "it was edited")
    assert again.told()[4:] == ["z.JPG was refused: it was edited"]


def test_shots_refused_together_are_all_named(bench: Callable[..., Bench]):
    """As far as a message lists them, which is sent for the first one anyway."""
    one = bench()
    watch = Watch(one)
    for n in range(1, 13):
        watch.watchman.outcome(Path(f"/card/IMG_{n}.JPG"), "refused", "it was edited")
    assert watch.told() == [
        "IMG_1.JPG was refused: it was edited",
        *(f"IMG_{n}.JPG was refused ({n} such shots by now): it was edited" for n in range(2, 11)),
    ]


def test_a_scene_that_does_not_move_is_told_after_ten_frames(bench: Callable[..., Bench]):
    """And that it moves again."""
    one = bench()
    watch = Watch(one)
    for counted in [False] * 9 + [True] + [False] * 25 + [True] * 3:
        watch.watchman.counted("id", "cam", counted, None if counted else "the scene does not move: 3 times chance")
    assert watch.told() == [
        f"cam: the last 10 frames were no new evidence: the scene does not move: 3 times chance. {STATIC_SCENE_ADVICE}",
        "cam: frames are new evidence again.",
    ]


def test_sensors_of_one_description_have_scenes_of_their_own(bench: Callable[..., Bench]):
    """Two bodies that write no serial number: one on a tripod does not stand still because the other moves."""
    watch = Watch(bench())
    for _ in range(10):
        watch.watchman.counted("still", "Acme One", False, "the scene does not move")
        watch.watchman.counted("moving", "Acme One", True, None)
    (told,) = watch.told()
    assert told.startswith("Acme One: the last 10 frames were no new evidence: the scene does not move")


def test_a_disk_nearly_full_is_told_until_there_is_ample_room(bench: Callable[..., Bench]):
    """A little above the limit is not room enough, so that it is not told of twice a minute."""
    watch = Watch(bench(AlertSettings(disk_free_mb=500)))
    for free_mb in (800, 501, 499, 400, 510, 590, 499, 601, 510):
        watch.watchman.disk(free_mb * 10**6)
    assert watch.told() == [
        "The state's disk is nearly full: 499 MB are free, less than 500 MB.",
        "The state's disk has room again: 601 MB are free.",
    ]


def test_a_camera_clock_is_wrong_until_it_is_right(bench: Callable[..., Bench]):
    """Time zones explain up to 26 hours; of two cameras each has its own clock."""
    watch = Watch(bench())
    for moment in (
        None,
        datetime(2026, 11, 22, 10, 59),
        datetime(1980, 1, 1),
        datetime(2000, 1, 1, 5),
        datetime(2026, 11, 21, 9),
        datetime(2026, 11, 22, 11, 1, tzinfo=UTC),
    ):
        watch.watchman.clock("id", "cam", moment, MORNING)
    watch.watchman.clock("other", "cam", datetime(2027, 1, 1), MORNING)
    assert [text[:55] for text in watch.told()] == [
        "cam: the camera's clock is wrong, or this computer's: 1",
        "cam: the camera's clock is right again.",
        "cam: the camera's clock is wrong, or this computer's: 2",
        "cam: the camera's clock is wrong, or this computer's: 2",
    ]


def test_damage_is_told_once_per_sentence(bench: Callable[..., Bench]):
    """Each start finds it again."""
    one = bench()
    for _ in range(2):
        watch = Watch(one)
        watch.watchman.damage("Generation 7 is damaged.")
        watch.watchman.damage("Generation 8 is damaged.")
    assert watch.told() == ["Generation 7 is damaged.", "Generation 8 is damaged."]


# --- silence


class Shoot:
    """Shots of a source on a clock of the test's own, looked at each second as by the daemon."""

    def __init__(self, one: Bench) -> None:
        self.one = one
        self.watch = Watch(one)

    def shots(self, count: int, every_s: float, *, waiting: int = 1) -> Shoot:
        for _ in range(count):
            self.nothing(every_s)
            self.watch.watchman.shot("Canon", waiting)
        return self

    def nothing(self, seconds: float, *, there: bool = True) -> Shoot:
        until = self.one.clock.passed_s + seconds
        while self.one.clock.passed_s < until:
            self.one.clock.passed_s = min(self.one.clock.passed_s + max(seconds / 50, 1.0), until)
            self.watch.watchman.listen("Canon", there=there)
        return self

    def told(self) -> list[str]:
        return self.watch.told()


def test_a_sequence_that_stops_is_told_once_and_once_when_it_goes_on(bench: Callable[..., Bench]):
    """Three hundred exposures of three minutes: after a quarter of an hour of nothing, and not again all night."""
    shoot = Shoot(bench()).shots(40, 180).nothing(899)
    assert shoot.told() == []
    shoot.nothing(60)
    assert shoot.told() == ["No shot of Canon for 15 min; before, one came every 3 min."]
    shoot.nothing(3 * 3600).shots(1, 10)
    assert shoot.told()[1:] == ["Shots of Canon come again, the first for 3 h."]
    shoot.shots(30, 180).nothing(3600)
    assert [text[:24] for text in shoot.told()] == [
        "No shot of Canon for 15 ",
        "Shots of Canon come agai",
        "No shot of Canon for 16 ",
    ]


def test_short_exposures_may_pause_for_ten_minutes(bench: Callable[..., Bench]):
    """A mount that turns over, a focus run, clouds: the least time counts, not some seconds."""
    shoot = Shoot(bench()).shots(60, 10).nothing(595)
    assert shoot.told() == []
    shoot.nothing(30)
    assert shoot.told() == ["No shot of Canon for 10 min; before, one came every 10 s."]


def test_who_goes_home_is_told_at_most_once(bench: Callable[..., Bench], inbox: Inbox):
    """Neither that the battery of the camera left behind is empty, nor the next evening that shots come again."""
    one = bench(AlertSettings(command=inbox.command, gather_s=0))
    shoot = Shoot(one).shots(20, 30).nothing(4 * 3600)
    for _ in range(200):
        one.clock.passed_s += 60
        shoot.watch.watchman.source("Canon", "away", "it is switched off")
        shoot.watch.watchman.listen("Canon", there=False)
    one.settle()
    shoot.watch.watchman.source("Canon", "watching", None)
    shoot.shots(1, 3600)
    one.later(3600)
    assert len(inbox.messages()) == 1
    assert [entry["topic"] for entry in one.alerts.recent()] == ["silence", "source", "source", "silence"]


@pytest.mark.parametrize("after_s", [10, 600])
def test_a_camera_switched_off_is_not_silent(bench: Callable[..., Bench], after_s: float):
    """That it has gone is told by its source; taking the card out ends the shoot."""
    shoot = Shoot(bench()).shots(40, 30).nothing(after_s - 1).nothing(5000, there=False).nothing(5000)
    assert shoot.told() == []
    shoot.shots(20, 30).nothing(5000)
    assert [text[:15] for text in shoot.told()] == ["No shot of Cano"]


@pytest.mark.parametrize(
    "shots",
    [
        lambda shoot: shoot.shots(9, 60),
        lambda shoot: shoot.shots(29, 10),
        lambda shoot: shoot.shots(300, 2, waiting=40),
        lambda shoot: [shoot.shots(8, 0.2).nothing(pause) for pause in (5, 60, 13, 200, 40, 7, 90, 300)],
        lambda shoot: [shoot.nothing(pause).shots(1, 1) for pause in (5, 60, 13, 200, 40, 7, 90, 300) * 3],
    ],
    ids=["too few", "too short", "a card", "bursts", "by hand"],
)
def test_no_shoot_is_no_silence(bench: Callable[..., Bench], shots: Callable[[Shoot], object]):
    """A card being read, and people who take pictures now and then, may stop without a word."""
    shoot = Shoot(bench())
    shots(shoot)
    assert shoot.nothing(24 * 3600).told() == []


def test_silence_can_be_switched_off(bench: Callable[..., Bench]):
    """By 0."""
    assert Shoot(bench(AlertSettings(silence_times=0))).shots(40, 30).nothing(7200).told() == []


def test_silence_may_be_told_sooner(bench: Callable[..., Bench]):
    """With a factor and a least time of one's own."""
    shoot = Shoot(bench(AlertSettings(silence_times=3, silence_least_s=60))).shots(40, 30)
    assert shoot.nothing(89).told() == []
    assert len(shoot.nothing(3).told()) == 1


def test_silence_goes_over_a_restart(bench: Callable[..., Bench]):
    """The shoot is known from the ledger's shots, if they came as they were taken; what was told is not told again."""
    one = bench()
    taken = [5000.0 + 60 * n for n in range(20)]
    for of_a_card in (True, False):
        shoot = Shoot(one)
        ages = [400.0 + (0.3 if of_a_card else 60.0) * n for n in reversed(range(20))]
        shoot.watch.watchman.recall("Canon", list(zip(ages, taken, strict=True)))
        shoot.nothing(150)
        assert shoot.told() == []
    shoot.nothing(100)
    assert shoot.told() == ["No shot of Canon for 10 min; before, one came every 60 s."]
    again = Shoot(one)
    ages = [700.0 + 60 * n for n in reversed(range(20))]
    again.watch.watchman.recall("Canon", list(zip(ages, taken, strict=True)))
    again.nothing(3600)
    assert len(again.told()) == 1
    again.shots(1, 1)
    assert len(again.told()) == 2


def test_the_end_of_a_series_of_darks_is_no_silence(bench: Callable[..., Bench]):
    """Whoever has ordered thirty darks does not wait for the next one."""
    shoot = Shoot(bench()).shots(30, 30)
    shoot.watch.watchman.shoot_ends()
    assert shoot.nothing(7200).told() == []


# --- checkpoints and clocks


def test_a_checkpoint_that_does_not_come_is_told(bench: Callable[..., Bench]):
    """Once, and once when it has come; later where checkpoints are to be rare."""
    one = bench()
    watch = Watch(one)
    for uncovered_s, every_s in ((0, 60), (3599, 60), (3700, 1900), (3700, 60), (9000, 60), (0, 60), (0, 60)):
        watch.watchman.checkpoint(uncovered_s, every_s)
    assert [text[:24] for text in watch.told()] == ["No checkpoint for 62 min", "A checkpoint was written"]
    Watch(one).watchman.checkpoint(0, 60)
    assert len(watch.told()) == 2


def test_a_clock_that_jumps_is_told_but_not_when_the_machine_was_just_started(
    bench: Callable[..., Bench], inbox: Inbox
):
    """A small computer without a clock of its own is set by the network minutes after its start: that is noted only."""
    one = bench(AlertSettings(command=inbox.command, gather_s=0))
    watchman = Watch(one).watchman
    for step_s, booted_s, after_s in (
        (3e6, 60, 0),
        (30, 5000, 0),
        (-7200, 5000, 0),
        (7200, 5010, 10),
        (61, 9000, 3600),
    ):
        one.clock.passed_s += after_s
        watchman.clock_step(step_s, booted_s)
        one.settle()
    assert [entry["text"] for entry in one.alerts.recent()] == [
        "This computer's clock was set forward by 35 days.",
        "This computer's clock was set back by 2 h.",
        "This computer's clock was set forward by 2 h.",
        "This computer's clock was set forward by 61 s.",
    ]
    assert [message["alerts"][0]["detail"]["step_s"] for message in inbox.messages()] == [-7200, 61]


# --- while the ledger cannot be written


def test_what_stood_in_is_taken_over(bench: Callable[..., Bench], inbox: Inbox, tmp_path: Path):
    """Sent without the state's ledger: not sent again; not sent yet: sent under the same id; raised: known."""
    settings = AlertSettings(command=inbox.command, gather_s=0)
    one = bench(settings)
    one.fold(stable(1))
    one.settle()
    with closing(Ledger(None)) as memory:
        stand_in = Alerts(memory, settings, wake=one.woken.set, clock=one.clock, now=one.clock.now, stands_in=True)
        watchman = Watchman(one.alerts, clock=one.clock)
        watchman.report_to(stand_in)
        watchman.full("No space left.")
        while stand_in.waiting or len(inbox.ids()) < 2:
            stand_in.work()
        inbox.broken.touch()
        watchman.source("/card", "trouble", "x")
        one.clock.passed_s += 100
        watchman.source("/card", "trouble", "it cannot be listed")
        while not any(due.tries for due in stand_in._due.values()):
            stand_in.work()
        unsent = composed(*next((n, stand_in._outbox.alerts(n)) for n, _ in stand_in._due)).id
        assert not watchman.has_room(surely=False)
        assert watchman.has_room(surely=True)
        stand_in.close()
        one.alerts.take_over(stand_in)
        watchman.report_to(one.alerts)
    inbox.broken.unlink()
    one.later(60)
    one.later(60)
    assert one.alerts.waiting == 0
    ids = inbox.ids()
    assert len(set(ids)) == len(ids) == 4
    assert unsent in ids
    assert [entry["topic"] for entry in one.alerts.recent()] == ["stable", "disk", "source", "disk"]
    # Whether a condition has begun is known from there on, and after a restart.
    Watch(one).watchman.source("/card", "watching", None)
    assert one.alerts.recent()[-1]["text"] == "Source /card is watched again."


def test_a_disk_that_is_full_again_and_again_is_told_once(bench: Callable[..., Bench]):
    """Between two tries nothing fails; that is not yet room."""
    one = bench()
    watch = Watch(one)
    for _ in range(20):
        watch.watchman.full("No space left.")
        one.clock.passed_s += 60
        assert not watch.watchman.has_room(surely=False)
    one.clock.passed_s += 150
    assert watch.watchman.has_room(surely=False)
    assert [text[:30] for text in watch.told()] == ["The state's disk is full: No s", "The state's disk is no longer "]


@contextmanager
def full_disk(ledger: Ledger) -> Iterator[None]:
    """Give SQLite no more pages than it has, and have more wait in the ledger than they hold."""
    ledger.commit()
    (pages,) = ledger._db.execute("PRAGMA page_count").fetchone()
    ledger._db.execute(f"PRAGMA max_page_count = {pages}")
    ledger.add_seen(bytes(100_000))
    with pytest.raises(StateFull):
        ledger.commit()
    try:
        yield
    finally:
        ledger._db.execute("PRAGMA max_page_count = 1000000")


def test_what_is_raised_with_a_full_disk_is_sent_once(
    bench: Callable[..., Bench], inbox: Inbox, caplog: pytest.LogCaptureFixture
):
    """Alerts were kept but not sent, or lost, by what they tell of and by when their look-up failed."""
    one = bench(AlertSettings(command=inbox.command, topics=frozenset(("stable", "recovered")), min_excess_sigma=1.0))
    one.settle()
    with full_disk(one.ledger):
        one.fold(stable(102), Transition(5, "recovered", "hot", 0.0, 0.1))
        one.alerts.raise_("damage", "damage", "d1", "Generation 7 is damaged.")
        assert one.alerts.waiting == 1
    assert "Generation 7 is damaged." in caplog.messages
    one.fold(stable(102))
    one.later(30)
    (message,) = inbox.messages()
    assert [alert["topic"] for alert in message["alerts"]] == ["stable", "recovered"]
    assert [entry["topic"] for entry in one.alerts.recent()] == ["stable", "recovered", "damage"]
    assert one.alerts.waiting == 0
    assert one.later(1000) is None


def test_a_condition_that_begins_with_a_full_disk_is_told_once(bench: Callable[..., Bench]):
    """How it was before cannot be looked up then, so it is asked again."""
    one = bench()
    watch = Watch(one)
    with full_disk(one.ledger), pytest.raises(StateFull):
        watch.watchman.disk(0)
    for _ in range(3):
        watch.watchman.disk(0)
    assert len(watch.told()) == 1


def test_a_replay_with_a_full_disk_sends_nothing_again(bench: Callable[..., Bench], inbox: Inbox):
    """It cannot be told then that its alerts are known, but there is no message of none."""
    one = bench(AlertSettings(command=inbox.command))
    one.fold(stable(102))
    one.later(30)
    with full_disk(one.ledger):
        one.fold(stable(102))
    assert one.later(30) is None
    assert len(inbox.messages()) == 1
    assert one.alerts.waiting == 0


def test_a_delivery_is_written_down_with_a_full_disk(bench: Callable[..., Bench], inbox: Inbox):
    """It was forgotten, and the message sent a second time."""
    one = bench(AlertSettings(command=inbox.command, gather_s=0))
    one.settle()
    one.fold(stable(1))
    one.alerts.work()
    with full_disk(one.ledger):
        one.alerts.close()
    one.settle()
    assert len(inbox.ids()) == 1
    assert one.states() == [(1, 0, "sent")]


def test_settings_changed_with_a_full_disk_lose_no_message(bench: Callable[..., Bench], inbox: Inbox):
    """What moves to another channel does so when there is room."""
    one = bench(AlertSettings(command=("/nowhere/notify",), gather_s=0))
    for site in (1, 2):
        one.fold(stable(site), seq=site)
        one.later(20)
    with full_disk(one.ledger):
        one.alerts.change_settings(AlertSettings(command=inbox.command, gather_s=0))
        for _ in range(2):
            with pytest.raises(StateFull):
                one.alerts.work()
    for _ in range(3):
        one.later(20)
    assert sorted(alert["detail"]["site"] for m in inbox.messages() for alert in m["alerts"]) == [1, 2]
    assert one.alerts.waiting == 0


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
