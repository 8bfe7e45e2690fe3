"""The state directory: its layout, the lock of its one process, and what may be thrown away.

::

    lock                        who has the state open
    ledger.sqlite               one durable row per shot
    spool/<key>                 shots not yet covered by the older of the two generations kept
    sensors/<id>/gen-<n>.hpx    the statistic of a sensor
    incoming/<port>/            files of cameras, until they are in the ledger
"""

from __future__ import annotations

import fcntl
import os
import re
import shlex
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from numpy.typing import NDArray

from hotpixd.store import checkpoint
from hotpixd.store.durable import StateError, StateFull, full_disk_as_state_full, make_folder, make_parents
from hotpixd.store.ledger import Ledger
from hotpixd.store.spool import Spool

__all__ = ["State", "StateError", "StateFull", "StateLocked", "StateMissing", "default_state_dir"]

_SENSOR_ID = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._+-]{0,199}")


class StateLocked(StateError):  # noqa: N818 - a condition, not a fault
    """Another process has the state open."""

    def __init__(self, message: str, feed: Path | None = None) -> None:
        super().__init__(message)
        self.feed = feed
        """Socket at which that process answers questions. None if it does not."""


class StateMissing(StateError):  # noqa: N818 - a condition, not a fault
    """There is no state yet."""


def default_state_dir() -> Path:
    """Return the first of $STATE_DIRECTORY (set by systemd), else the user's directory for state."""
    given = os.environ.get("STATE_DIRECTORY", "").split(":")[0]
    if given:
        return Path(given)
    import platformdirs

    return Path(platformdirs.user_state_dir("hotpixd"))


class State:
    """An open state directory. One process at a time has it open, for writing or for reading."""

    def __init__(self, root: Path | str, create: bool = True) -> None:
        """Lock and open the state, making what is missing of it.

        The lock is inherited by forks that do not exec: start worker processes by spawning.

        Raises
        ------
        StateLocked
            If another process has it open; the message names it.
        StateMissing
            If there is none and `create` is false.
        StateError
            If it cannot be made, written or read.
        """
        self.root = Path(root)
        if not create and not (self.root / "ledger.sqlite").exists():
            raise StateMissing(f"There is no state in {self.root} yet: no shot was ever watched or scanned.")
        try:
            with full_disk_as_state_full(f"for the state in {self.root}"):
                if not (self.root / "ledger.sqlite").exists():
                    make_parents(self.root)
                make_folder(self.root)
                self._lock = _locked(self.root / "lock")
                try:
                    make_folder(self.root / "sensors")
                    make_folder(self.root / "incoming")
                    for unfinished in self.root.glob("sensors/*/*.tmp"):
                        unfinished.unlink()
                    self.spool = Spool(self.root / "spool")
                    self.ledger = Ledger(self.root / "ledger.sqlite")
                except BaseException:
                    os.close(self._lock)
                    raise
        except (FileExistsError, NotADirectoryError) as error:
            raise StateError(f"The state {self.root} is not a directory: {error}.") from error
        except OSError as error:
            raise StateError(f"The state {self.root} cannot be used: {error}.") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Commit what waits in the ledger and let go of the state."""
        if self._lock < 0:
            return
        try:
            self.ledger.close()
        finally:
            os.close(self._lock)
            self._lock = -1

    def announce(self, feed: Path) -> None:
        """Write into the lock at which socket this process answers questions of those who find the state locked."""
        _write_lock(self._lock, feed)

    def sensor_folder(self, sensor_id: str) -> Path:
        """Return the folder of a sensor's generations; it is made if missing.

        Raises
        ------
        ValueError
            If the id cannot be the name of a folder.
        StateFull
            If there is no room for it.
        """
        if not _SENSOR_ID.fullmatch(sensor_id):
            raise ValueError(f"a sensor's id is made of letters, digits and ._+-, got {sensor_id!r}")
        folder = self.root / "sensors" / sensor_id
        with full_disk_as_state_full(f"for the sensor {sensor_id} in {self.root}"):
            make_folder(folder)
        return folder

    def checkpoint(
        self, sensor_id: str, number: int, header: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]]
    ) -> Path:
        """Write a sensor's next generation and remove all but the two newest.

        The ledger is committed first: a generation must never cover a shot whose verdict could still be lost,
        or a replay would fold that shot twice.
        """
        folder = self.sensor_folder(sensor_id)
        self.ledger.commit()
        written = checkpoint.write_generation(folder, number, header, arrays)
        for passed_over in checkpoint.generations(folder):
            # A newer one was found damaged, or `number` would be higher; it must not count as one of the two.
            if passed_over > written:
                passed_over.unlink()
        checkpoint.prune(folder)
        return written

    def settle_spool(self, covered_by_older: Mapping[str, int]) -> int:
        """Drop every shot that no replay will ask for; return how many.

        These are the shots covered by the OLDER of the two generations kept of their sensor, as the newer one
        may turn out damaged (`covered_by_older` holds the seq by sensor; without an entry all are kept);
        refused shots and companions; and files without a row that were here before this process: theirs died
        before the acknowledgement, and the source is scanned anyway.
        """
        # A verdict must be on the disk before the file goes: with the verdict lost a replay would ask for it.
        self.ledger.commit()
        keys = list(self.spool.keys())
        rows = self.ledger.verdicts(keys)
        orphans = self.spool.untouched()
        done = []
        for key in keys:
            if key not in rows:
                settled = key in orphans
            else:
                verdict, sensor_id, seq = rows[key]
                covered = sensor_id is not None and seq <= covered_by_older.get(sensor_id, 0)
                settled = verdict in ("refused", "companion") or (verdict == "folded" and covered)
            if settled:
                done.append(key)
        self.spool.drop(done)
        return len(done)


def _locked(path: Path) -> int:
    """Take the lock and write into it who we are; return its descriptor."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder, feed = _read_lock(fd)
        os.close(fd)
        raise StateLocked(f"The state {path.parent} is in use by {holder}.", feed) from None
    _write_lock(fd, None)
    return fd


def _write_lock(fd: int, feed: Path | None) -> None:
    me = f"process {os.getpid()} ({shlex.join(sys.argv)})".replace("\n", " ")
    text = os.fsencode(f"{me}\n" if feed is None else f"{me}\nfeed {feed}\n")
    with suppress(OSError):  # a full disk: the lock holds without a name in it
        os.pwrite(fd, text, 0)
        os.ftruncate(fd, len(text))


def _read_lock(fd: int) -> tuple[str, Path | None]:
    first, _, second = os.fsdecode(os.pread(fd, 65536, 0)).partition("\n")
    holder = first.encode("utf-8", "replace").decode().strip() or "another process"
    return holder, Path(second.strip().removeprefix("feed ")) if second.startswith("feed ") else None
