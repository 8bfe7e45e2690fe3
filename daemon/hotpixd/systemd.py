"""What systemd is told, and how its journal is written to; outside of systemd nothing happens.

The protocol is sd_notify(3): datagrams of NAME=value lines to the socket named in $NOTIFY_SOCKET. It is twenty lines of
the standard library; the packages that wrap it add a dependency and no behaviour.
"""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Mapping

log = logging.getLogger(__name__)

_SEND_TIMEOUT_S = 1.0
"""A systemd that is busy for longer loses a message, rather than that a shot waits for it."""


class Notifier:
    """Tells systemd how the service fares. Does nothing if systemd did not ask, and never raises."""

    watchdog_s: float | None
    """systemd ends the process if it hears no `beat` for this long, s. None if it does not watch."""

    def __init__(self, environ: Mapping[str, str] = os.environ) -> None:
        address = environ.get("NOTIFY_SOCKET", "")
        # An @ stands for the zero byte of an abstract socket. Other kinds (vsock) are for virtual machines.
        self._address = "\0" + address[1:] if address.startswith("@") else address
        self._socket: socket.socket | None = None
        if address.startswith(("/", "@")):
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
            self._socket.settimeout(_SEND_TIMEOUT_S)
        self.watchdog_s = _watchdog(environ) if self._socket else None
        self._last_beat: float | None = None
        self._last_status: str | None = None
        self._has_failed = False

    def ready(self, status: str) -> None:
        """Say that starting, or reloading, is done."""
        self._send("READY=1", self._as_status(status))

    def status(self, sentence: str) -> None:
        """Show a sentence in `systemctl status`; the same as before is not sent again."""
        line = self._as_status(sentence)
        if line != self._last_status:
            self._send(line)

    def beat(self) -> None:
        """Say that the main loop is alive. May be called often: a quarter of the watchdog's interval is enough."""
        if self.watchdog_s is None:
            return
        now = time.monotonic()
        if self._last_beat is None or now - self._last_beat >= self.watchdog_s / 4:
            self._last_beat = now
            self._send("WATCHDOG=1")

    def reloading(self) -> None:
        """Say that the configuration is being read again; `ready` ends this."""
        # The time is what Type=notify-reload (systemd 253) asks for; earlier ones ignore it.
        self._send("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}")

    def stopping(self, status: str) -> None:
        """Say that the service is about to end."""
        self._send("STOPPING=1", self._as_status(status))

    def extend(self, seconds: float) -> None:
        """Ask for so much time from now before starting, or stopping, counts as failed; not for the watchdog."""
        self._send(f"EXTEND_TIMEOUT_USEC={round(seconds * 1e6)}")

    def _as_status(self, sentence: str) -> str:
        # On one line: what follows a line break would be read as a message of its own.
        return "STATUS=" + "".join(c if c.isprintable() else _escaped(c) for c in " ".join(sentence.split()))

    def _send(self, *lines: str) -> None:
        if self._socket is None:
            return
        # systemd drops a status that is not UTF-8, and names of files may hold anything.
        message = "\n".join(lines).encode("utf-8", errors="replace")
        try:
            self._socket.sendto(message, self._address)
        except OSError as error:
            if not self._has_failed:
                self._has_failed = True
                log.debug("systemd was not told %s: %s", lines[0], error)
            return
        self._last_status = next((line for line in lines if line.startswith("STATUS=")), self._last_status)


def _watchdog(environ: Mapping[str, str]) -> float | None:
    try:
        interval_us = int(environ.get("WATCHDOG_USEC", "0"))
        # Inherited from a parent that systemd watches, it is not for us.
        is_ours = int(environ.get("WATCHDOG_PID", os.getpid())) == os.getpid()
    except ValueError:
        return None
    return interval_us / 1e6 if interval_us > 0 and is_ours else None


class PlainFormatter(logging.Formatter):
    """Writes no control character but line breaks, and begins no line with what is not its own.

    Names of files and what cameras say of themselves are escaped where they are logged; here it is made sure of.
    """

    def format(self, record: logging.LogRecord) -> str:
        lines = super().format(record).split("\n")
        return "\n    ".join(
            "".join(c if c.isprintable() or c == "\t" else _escaped(c) for c in line) for line in lines
        )


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode()


class _JournalFormatter(PlainFormatter):
    """Begins each line with its level, as sd-daemon(3) has it: a traceback is one record of many lines.

    There is no time in it; the journal knows when a line came.
    """

    def __init__(self) -> None:
        super().__init__("%(message)s")

    def format(self, record: logging.LogRecord) -> str:
        prefix = f"<{_syslog_level(record.levelno)}>"
        return "\n".join(prefix + line for line in super().format(record).split("\n"))


def _syslog_level(level: int) -> int:
    for at_least, syslog in ((logging.CRITICAL, 2), (logging.ERROR, 3), (logging.WARNING, 4), (logging.INFO, 6)):
        if level >= at_least:
            return syslog
    return 7


def log_to_journal(environ: Mapping[str, str]) -> logging.Handler | None:
    """Return a handler for the journal if standard error goes there, else None.

    $JOURNAL_STREAM alone does not tell: it is inherited by processes whose standard error is redirected.
    """
    try:
        stderr = os.fstat(2)
    except OSError:
        return None
    if environ.get("JOURNAL_STREAM") != f"{stderr.st_dev}:{stderr.st_ino}":
        return None
    handler = logging.StreamHandler()
    handler.setFormatter(_JournalFormatter())
    return handler
