"""Notes, from inside the product, what it promised and when; and takes safeguards away from it.

A note is a line of JSON with `at`: how long the log of the disk was when the
promise was made. A crash later than that must find it kept.
"""

from __future__ import annotations

import functools
import json
import os
import signal
import sqlite3
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import fsync_sites

_HELPERS = ("fsync_file", "fsync_folder")
"""Whoever calls these is where the fsync belongs."""


class _Notes:
    """The file of notes, and the log whose length dates them."""

    def __init__(self, notes: str, log: str) -> None:
        self._log = Path(log)
        self._fd = os.open(notes, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)

    def at(self) -> int:
        return self._log.stat().st_size

    def add(self, what: str, at: int | None = None, **facts: Any) -> None:
        line = json.dumps({"what": what, "at": self.at() if at is None else at, **facts}) + "\n"
        os.write(self._fd, line.encode())


def install(order: str) -> None:
    """Change this process as ordered.

    The order is JSON: `notes` and `log` are paths, `without` names safeguards that are left out: sites of fsync as
    `fsync_sites` names them, or keys of `_OTHERS`. `kill` is a site at whose first pass the process is killed, before
    the fsync.
    """
    wanted = json.loads(order)
    notes = _Notes(wanted["notes"], wanted["log"])
    without = set(wanted.get("without", ()))
    _replace_fsync(notes, without, wanted.get("kill"))
    if sys.orig_argv[-2:-1] == ["hotpixd.intake.camera_worker"]:
        # It promises nothing by itself.
        return
    _note_promises(notes)
    for name in without & _OTHERS.keys():
        _OTHERS[name]()


def _replace_fsync(notes: _Notes, without: set[str], kill: str | None) -> None:
    fsync = os.fsync

    def replaced(fd: int) -> None:
        site = _site(sys._getframe(1))
        if site is None:
            fsync(fd)
            return
        if site == kill:
            os.kill(os.getpid(), signal.SIGKILL)
        if site in without:
            return
        before, inode = notes.at(), os.fstat(fd).st_ino
        fsync(fd)
        notes.add("fsync", site=site, inode=inode, after=before)

    os.fsync = replaced


def _site(frame: FrameType | None) -> str | None:
    while frame is not None and frame.f_code.co_name in _HELPERS:
        frame = frame.f_back
    if frame is None:
        return None
    site = fsync_sites.sites_of(frame.f_code.co_filename).get(frame.f_lineno)
    if site and site.startswith("durable.replace_durably"):
        # One function for many steps.
        return f"{site} {frame.f_locals['step']}"
    return site


def _after(owner: Any, name: str, note: Callable[..., None]) -> None:
    """Have `note` called with the result and the arguments of a method whenever it has returned."""
    method = getattr(owner, name)

    @functools.wraps(method)
    def noted(*args: Any, **named: Any) -> Any:
        result = method(*args, **named)
        note(result, *args, **named)
        return result

    setattr(owner, name, noted)


def _before(owner: Any, name: str, note: Callable[..., None]) -> None:
    """Have `note` called with the arguments of a method before it begins."""
    method = getattr(owner, name)

    @functools.wraps(method)
    def noted(*args: Any, **named: Any) -> Any:
        note(*args, **named)
        return method(*args, **named)

    setattr(owner, name, noted)


def _note_promises(notes: _Notes) -> None:
    from hotpixd.intake.arrivals import Arrivals, content_digest
    from hotpixd.intake.camera import CameraSource
    from hotpixd.intake.darks import Journal
    from hotpixd.intake.directory import DirectorySource
    from hotpixd.store.ledger import Ledger

    _after(Ledger, "receive", lambda _, __, shots: notes.add("received", keys=[shot.key for shot in shots]))
    _after(DirectorySource, "done", lambda _, __, path: notes.add("done", name=Path(path).name))
    _after(Arrivals, "keep", lambda path, *_: notes.add("arrived", key=content_digest(path)))
    # From here on the camera may have it no more.
    _before(CameraSource, "_delete", lambda _, __, file: notes.add("deleted", name=file.name))
    _after(Journal, "write", lambda _, journal, __: notes.add("series", taken=journal.taken))


# --- safeguards other than an fsync of ours


def _synchronous(level: str) -> Callable[[], None]:
    class Careless(sqlite3.Connection):
        """A connection that is told less than it was to be told."""

        def execute(self, sql: str, *rest: Any) -> sqlite3.Cursor:
            return super().execute(sql.replace("synchronous = FULL", f"synchronous = {level}"), *rest)

    return lambda: setattr(sqlite3, "connect", functools.partial(sqlite3.connect, factory=Careless))


def _commit_only(not_by: str) -> Callable[[], None]:
    def replace() -> None:
        from hotpixd.store.ledger import Ledger

        commit = Ledger.commit

        def replaced(ledger: Ledger) -> None:
            if sys._getframe(1).f_code.co_qualname != not_by:
                commit(ledger)

        Ledger.commit = replaced  # type: ignore[method-assign]

    return replace


def _generations_in_place() -> None:
    from hotpixd.store import checkpoint

    def overwrite(tmp: Path, final: Path, step: str) -> None:
        content = tmp.read_bytes()
        older = checkpoint.generations(final.parent)
        if older:
            older[0].rename(final)
        # Flushed to the disk as the kernel likes, in the middle too.
        fd = os.open(final, os.O_WRONLY | os.O_CREAT, 0o600)
        half = len(content) // 2
        for at, part in ((0, content[:half]), (half, content[half:])):
            os.pwrite(fd, part, at)
            os.fsync(fd)
        os.ftruncate(fd, len(content))
        os.fsync(fd)
        os.close(fd)
        tmp.unlink()

    checkpoint.replace_durably = overwrite


_OTHERS: dict[str, Callable[[], None]] = {
    "synchronous=FULL (NORMAL instead)": _synchronous("NORMAL"),
    "synchronous=FULL (OFF instead)": _synchronous("OFF"),
    "the commit before a generation": _commit_only("Saving.__init__"),
    "new files for generations (in place instead)": _generations_in_place,
}
