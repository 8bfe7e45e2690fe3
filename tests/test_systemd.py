"""What a service manager hears, and what its journal is given."""

from __future__ import annotations

import logging
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from hotpixd.systemd import Notifier


class Manager:
    """The listening end of the protocol."""

    def __init__(self, address: str) -> None:
        self.environ = {"NOTIFY_SOCKET": address}
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind("\0" + address[1:] if address.startswith("@") else address)
        self._socket.setblocking(False)

    def heard(self) -> list[str]:
        """Return the messages since the last call."""
        messages = []
        while True:
            try:
                messages.append(self._socket.recv(4096).decode("utf-8"))
            except BlockingIOError:
                return messages

    def close(self) -> None:
        """Stop listening, as at a crash: a socket's file stays."""
        self._socket.close()


@pytest.fixture(params=["file", "abstract"])
def manager(request: pytest.FixtureRequest, runtime: Path) -> Iterator[Manager]:
    """Listen at both kinds of addresses."""
    listening = Manager(str(runtime / "notify") if request.param == "file" else f"@hotpixd-test-{os.getpid()}")
    yield listening
    listening.close()


def all_messages(notifier: Notifier) -> None:
    """Send every kind of message."""
    notifier.ready("watching")
    notifier.status("a shot")
    notifier.beat()
    notifier.reloading()
    notifier.extend(1.5)
    notifier.stopping("ending")


def test_every_message_is_as_the_protocol_has_it(manager: Manager):
    """Names and values of sd_notify(3); times in microseconds, of the monotonic clock."""
    before_us = time.monotonic_ns() // 1000
    all_messages(Notifier({**manager.environ, "WATCHDOG_USEC": "30000000"}))
    ready, status, beat, reloading, extend, stopping = manager.heard()
    assert ready == "READY=1\nSTATUS=watching"
    assert status == "STATUS=a shot"
    assert beat == "WATCHDOG=1"
    assert reloading.startswith("RELOADING=1\nMONOTONIC_USEC=")
    assert before_us <= int(reloading.rpartition("=")[2]) <= time.monotonic_ns() // 1000
    assert extend == "EXTEND_TIMEOUT_USEC=1500000"
    assert stopping == "STOPPING=1\nSTATUS=ending"


@pytest.mark.parametrize("environ", [{}, {"NOTIFY_SOCKET": ""}, {"NOTIFY_SOCKET": "vsock:2:9999"}])
def test_outside_of_systemd_nothing_happens(environ: dict[str, str]):
    """A terminal, or an address that is not ours to understand; a watchdog without a way to it is none."""
    notifier = Notifier({**environ, "WATCHDOG_USEC": "30000000"})
    assert notifier.watchdog_s is None
    all_messages(notifier)


def test_the_same_sentence_is_sent_once(manager: Manager):
    """The loop says what it does at every turn; what `ready` said counts as well."""
    notifier = Notifier(manager.environ)
    notifier.ready("watching")
    for sentence in ("watching", "folding", "folding", "watching"):
        notifier.status(sentence)
    assert manager.heard() == ["READY=1\nSTATUS=watching", "STATUS=folding", "STATUS=watching"]


def test_a_sentence_stays_one_line_and_text(manager: Manager):
    """A file's name must neither smuggle in a message nor be dropped for not being UTF-8."""
    notifier = Notifier(manager.environ)
    notifier.status("cannot read a\nMAINPID=1\r\n\u2028" + os.fsdecode(b"\xff.jpg"))
    assert manager.heard() == ["STATUS=cannot read a MAINPID=1 \\udcff.jpg"]


@pytest.mark.parametrize(
    ("variables", "watchdog_s"),
    [
        ({"WATCHDOG_USEC": "4000000"}, 4.0),
        ({"WATCHDOG_USEC": "4000000", "WATCHDOG_PID": str(os.getpid())}, 4.0),
        ({"WATCHDOG_USEC": "4000000", "WATCHDOG_PID": "1"}, None),
        ({"WATCHDOG_USEC": "0"}, None),
        ({"WATCHDOG_USEC": "soon"}, None),
        ({"WATCHDOG_PID": str(os.getpid())}, None),
    ],
)
def test_the_watchdog_is_ours_or_none(manager: Manager, variables: dict[str, str], watchdog_s: float | None):
    """A child inherits its parent's variables, but nobody waits for its beats."""
    notifier = Notifier({**manager.environ, **variables})
    assert notifier.watchdog_s == watchdog_s
    notifier.beat()
    assert manager.heard() == ([] if watchdog_s is None else ["WATCHDOG=1"])


def test_beats_are_sent_in_time_but_not_at_every_turn(manager: Manager):
    """Four in an interval, however often the loop turns."""
    notifier = Notifier({**manager.environ, "WATCHDOG_USEC": "2000000"})
    end = time.monotonic() + 1.25
    while time.monotonic() < end:
        notifier.beat()
        time.sleep(0.001)
    assert 2 <= len(manager.heard()) <= 3


def test_a_manager_that_has_gone_is_no_fault_of_ours(manager: Manager, caplog: pytest.LogCaptureFixture):
    """One line for those who look for it; what it missed is said when it is back."""
    notifier = Notifier({**manager.environ, "WATCHDOG_USEC": "30000000"})
    manager.close()
    with caplog.at_level(logging.DEBUG):
        all_messages(notifier)
    assert [record.levelno for record in caplog.records] == [logging.DEBUG]
    address = manager.environ["NOTIFY_SOCKET"]
    if not address.startswith("@"):
        Path(address).unlink()
    back = Manager(address)
    notifier.status("ending")
    assert back.heard() == ["STATUS=ending"]
    back.close()


def test_a_manager_that_does_not_listen_does_not_stop_the_loop(manager: Manager):
    """Its queue holds a few messages; then sending would wait for ever."""
    notifier = Notifier(manager.environ)
    for n in range(100_000):
        started = time.monotonic()
        notifier.status(f"shot {n}")
        if time.monotonic() - started > 0.5:
            break
    assert 1 <= len(manager.heard()) <= n
    notifier.status("listening again")
    assert manager.heard() == ["STATUS=listening again"]


SPEAKER = """
import logging, os, sys
from hotpixd.systemd import log_to_journal
handler = log_to_journal(os.environ)
if handler is None:
    sys.exit(3)
logging.basicConfig(level=logging.DEBUG, handlers=[handler])
log = logging.getLogger("hotpixd")
log.debug("one")
log.info("two")
log.warning("three")
log.error("four <0>")
log.critical("five")
log.log(25, "between")
log.info("name with\\n<0>a level of its own")
try:
    {}["site"]
except KeyError:
    log.exception("six")
"""


def said(journal_stream: str | None, stderr: int, *, closed: bool = False) -> int:
    """Run the speaker and return its exit code."""
    environ = {name: value for name, value in os.environ.items() if name != "JOURNAL_STREAM"}
    if journal_stream is not None:
        environ["JOURNAL_STREAM"] = journal_stream
    command = [sys.executable, "-c", SPEAKER]
    shell = ["sh", "-c", 'exec "$@" 2>&-', "sh"] if closed else []
    return subprocess.run([*shell, *command], env=environ, stderr=stderr, timeout=60).returncode


def named(fd: int) -> str:
    """Return what $JOURNAL_STREAM calls a file."""
    status = os.fstat(fd)
    return f"{status.st_dev}:{status.st_ino}"


def test_each_line_in_the_journal_has_its_level(tmp_path: Path):
    """Those of a traceback too, and those a name with a line break makes."""
    with (tmp_path / "journal").open("w+b") as journal:
        assert said(named(journal.fileno()), journal.fileno()) == 0
        journal.seek(0)
        lines = journal.read().decode().splitlines()
    assert lines[:8] == [
        "<7>one",
        "<6>two",
        "<4>three",
        "<3>four <0>",
        "<2>five",
        "<6>between",
        "<6>name with",
        "<6>    <0>a level of its own",
    ]
    assert lines[8:10] == ["<3>six", "<3>    Traceback (most recent call last):"]
    assert lines[-1] == "<3>    KeyError: 'site'"
    assert all(line.startswith("<3>") for line in lines[8:])


@pytest.mark.parametrize("stream", [None, "", "journal", "1:2:3", "0:0"])
def test_without_the_journal_there_is_no_handler(stream: str | None, tmp_path: Path):
    """Not started by systemd, or nonsense in the variable."""
    with (tmp_path / "log").open("wb") as log:
        assert said(stream, log.fileno()) == 3


def test_a_redirected_stderr_is_not_the_journal(tmp_path: Path):
    """`hotpixd ... 2> log` within a service: the variable is inherited, but names another file."""
    with (tmp_path / "journal").open("wb") as journal, (tmp_path / "log").open("wb") as log:
        assert said(named(journal.fileno()), log.fileno()) == 3


def test_a_closed_stderr_is_not_the_journal(tmp_path: Path):
    """A daemon may have none."""
    with (tmp_path / "journal").open("wb") as journal:
        assert said(named(journal.fileno()), journal.fileno(), closed=True) == 3
