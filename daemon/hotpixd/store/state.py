"""The state directory: its layout, the lock of its one process, and what may be thrown away.

::

    lock                        who has the state open
    ledger.sqlite               one durable row per shot
    acknowledged                the highest row that was ever durable: a ledger that lacks it has lost some
    spool/<key>                 shots not yet covered by the older of the two generations kept
    sensors/<id>/gen-<n>.hpx    the statistic of a sensor
    incoming/<port>/            files of cameras, until they are in the ledger
    declared/<id>.json          defects that users and other programs' lists declare
    damaged/                    evidence: what was found damaged and is no longer used. Nothing here removes it
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from hotpixd.store import checkpoint, lock
from hotpixd.store.declared import DeclaredLists
from hotpixd.store.durable import (
    FULL,
    StateDamaged,
    StateError,
    StateFull,
    fsync_folder,
    full_disk_as_state_full,
    make_folder,
    make_parents,
    set_aside,
)
from hotpixd.store.ledger import Ledger
from hotpixd.store.lock import StateLocked
from hotpixd.store.spool import Spool

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["State", "StateDamaged", "StateError", "StateFull", "StateLocked", "StateMissing"]

_SENSOR_ID = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._+-]{0,199}")

_TORN_MARK = re.compile(rb"(\d{0,12}|\d{12} [0-9a-f]{0,8})\0*")
"""What a power cut may leave of the first mark, which is not synced: nothing, or its beginning."""


class StateMissing(StateError):  # noqa: N818 - a condition, not a fault
    """There is no state yet."""


class State:
    """An open state directory. One process at a time has it open, for writing or for reading."""

    def __init__(self, root: Path | str, create: bool = True, *, brief: bool = False, locked: bool = False) -> None:
        """Lock and open the state, making what is missing of it.

        The lock is inherited by forks that do not exec: start worker processes by spawning.

        Parameters
        ----------
        create : whether a state is made if there is none
        brief : whether it is closed again in a moment, or else `announce` called: who wants it meanwhile waits for that
        locked : whether the caller has the lock: see `held`

        Raises
        ------
        StateLocked
            If another process has it open; the message names it.
        StateMissing
            If there is none and `create` is false.
        StateDamaged
            If its ledger cannot be believed, or is gone.
        StateError
            If it cannot be made, written or read.
        """
        self.root = Path(root)
        self.unusable: dict[Path, str] = {}
        """Generations that could not be used since this is open, though newer than what was used; why, and what is done
        about it."""
        try:
            left = _look_for_ledger(self.root)
            if not create and not (self.root / "ledger.sqlite").exists():
                raise StateMissing(f"There is no state in {self.root} yet: no shot was ever watched or scanned.")
            with full_disk_as_state_full(f"for the state in {self.root}"):
                if not (self.root / "ledger.sqlite").exists():
                    make_parents(self.root)
                make_folder(self.root)
                file = self.root / "lock"
                self._lock = os.open(os.devnull, os.O_RDONLY) if locked else lock.take(file, brief=brief)
                try:
                    make_folder(self.root / "sensors")
                    make_folder(self.root / "incoming")
                    for unfinished in (*self.root.glob("sensors/*/*.tmp"), *self.root.glob("declared/*.tmp")):
                        with suppress(IsADirectoryError):
                            unfinished.unlink()
                    self.declared = DeclaredLists(self.root / "declared")
                    for unfinished in self.root.glob("backup-*.tmp"):
                        shutil.rmtree(unfinished, ignore_errors=True)
                    self.spool = Spool(self.root / "spool")
                    self._mark = _Mark(self.root / "acknowledged")
                    try:
                        self.ledger = Ledger(self.root / "ledger.sqlite", self._mark.write, left)
                    except BaseException:
                        self._mark.close()
                        raise
                    marked = self._mark.read(self.ledger.tag)
                    self.forgotten = max((marked or 0) - self.ledger.last_seq, 0)
                    """Shots that were acknowledged, and that the ledger does not know any more."""
                    self.mark_unusable = marked is None
                    """Whether that cannot be known: what is in the place of the mark is none of this ledger."""
                except BaseException:
                    lock.release(self._lock)
                    raise
        except (FileExistsError, NotADirectoryError) as error:
            raise StateError(
                f"The state {self.root} cannot be used: {_nearest(Path(error.filename))} is in the way, which is no"
                " folder. Move it away, or name another folder with --state."
            ) from error
        except PermissionError as error:
            nearest = _nearest(self.root)
            # In a folder closed to us it may be there.
            if nearest != self.root and os.access(nearest, os.X_OK, effective_ids=True):
                raise StateError(
                    f"The state {self.root} cannot be made: you have no right to write {nearest}. Name another folder"
                    " with --state."
                ) from error
            raise StateError(
                f"The state {self.root} cannot be used: you have no right to write {error.filename}, which reading"
                " takes, too. Use it as the user whose it is."
            ) from error
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
            self._mark.close()
            lock.release(self._lock)
            self._lock = -1

    def announce(self, feed: Path | None) -> None:
        """Write into the lock at which socket this process answers questions of those who find the state locked.

        None: it answers no more, as it is about to close the state. Whoever wants it waits for that.
        """
        lock.announce(self._lock, feed, brief=feed is None)

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
            try:
                make_folder(folder)
            except FileExistsError:
                raise StateError(f"{folder} is no folder, but in the place of a sensor's. Move it away.") from None
        return folder

    def set_aside(self, path: Path) -> Path:
        """Keep a damaged file of this state as evidence, where nothing uses it; return where it is now."""
        with full_disk_as_state_full(f"to keep {path} in {self.root}"):
            return set_aside(path, self.root / "damaged")

    def renew_mark(self) -> Path:
        """Keep as evidence what is in the place of the mark, and mark the ledger as it is; return where it is now."""
        kept = self.set_aside(self._mark.path)
        self._mark.begin_anew(self.ledger.tag, self.ledger.last_seq)
        self.mark_unusable = False
        return kept

    def orphans(self) -> list[str]:
        """Return the keys of shots in the spool that were there before this process, and have no row."""
        keys = self.spool.untouched()
        return sorted(keys - self.ledger.verdicts(keys).keys())

    def checkpoint(
        self,
        sensor_id: str,
        number: int,
        header: Mapping[str, Any],
        arrays: Mapping[str, NDArray[Any]],
        taken: Callable[[str], object] = lambda _: None,
    ) -> Path:
        """Write a sensor's next generation and remove all but the two newest that are whole. From any thread.

        Commit the ledger first: a generation must never cover a shot whose verdict could still be lost, or a replay
        would fold that shot twice. Where no replay can have the shots, as they were never in the spool, it is the other
        way round: a generation of which the ledger knows nothing is not used.

        Parameters
        ----------
        arrays, taken : see `checkpoint.write_generation`
        """
        folder = self.sensor_folder(sensor_id)
        written = checkpoint.write_generation(folder, number, header, arrays, taken)
        # Newer ones were passed over when the sensor was loaded: they must not count as one of the two.
        for path in checkpoint.generations(folder):
            if path > written:
                self.set_aside(path)
        for path in checkpoint.prune(folder):
            self.set_aside(path)
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


class _Mark:
    """The highest acknowledged row, written beside the ledger after each commit.

    Not fsynced: it may be older than the ledger after a power cut, but never newer, since a row is durable before it is
    marked. Log and database may lose their last commits without contradicting themselves; this tells.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._open()

    def _open(self) -> None:
        self._fd = -1
        self._held: bytes | None = b""
        try:
            self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o600)
            self._held = os.pread(self._fd, 64, 0)
        except OSError as error:
            # Without room there is no mark; else something else is in its place.
            if error.errno not in FULL:
                self._held = None

    def read(self, tag: int) -> int | None:
        """Return the mark of the ledger with this tag, as it was when this was opened.

        0 if there is none yet; None if what is there is something else.
        """
        if self._held is None:
            return None
        if _TORN_MARK.fullmatch(self._held):
            return 0
        number = self._held.split(b" ")[0]
        return int(number) if number.isdigit() and self._held == self._text(tag, int(number)) else None

    def begin_anew(self, tag: int, seq: int) -> None:
        """Mark a row, which is durable, in a new file: the one before was moved away."""
        self.close()
        self._open()
        self.write(tag, seq)

    def write(self, tag: int, seq: int) -> None:
        """Mark a row, which is durable."""
        with suppress(OSError):
            os.pwrite(self._fd, self._text(tag, seq), 0)

    def close(self) -> None:
        """Let go of the file."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    @staticmethod
    def _text(tag: int, seq: int) -> bytes:
        number = f"{seq:012d}"
        return f"{number} {zlib.crc32(f'{tag} {number}'.encode()):08x}\n".encode()


@contextmanager
def held(root: Path) -> Iterator[bool]:
    """Keep every process from a state, whatever is in it, while this lasts; tells whether there is one at all.

    Where there is none, a folder with nothing but the lock keeps its place: nobody begins one there meanwhile.

    Raises
    ------
    StateLocked
        If a process has it open.
    """
    there = root.exists()
    if not there:
        make_parents(root)
        make_folder(root)
    fd = lock.take(root / "lock")
    try:
        yield there
    finally:
        if not there and lock.is_at(root / "lock", fd):
            # Nothing was put there. Who waits for the lock may have made it anew, and has its state there then.
            (root / "lock").unlink()
            with suppress(OSError):
                root.rmdir()
        lock.release(fd)


def swap_in(made: Path, root: Path) -> Path | None:
    """Put a finished state, which nobody has open, into the place of one that is `held`, in one step and durably.

    Returns
    -------
    Where the one that was there is kept now, None if there was none, or nothing in it.
    """
    stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ")
    old = root.with_name(f"{root.name}.old-{stamp}")
    number = 1
    while os.path.lexists(old):
        number += 1
        old = root.with_name(f"{root.name}.old-{stamp}-{number}")
    if _exchange(made, root):
        made.rename(old)
    else:
        root.rename(old)
        made.rename(root)
    fsync_folder(root.parent)
    if {path.name for path in old.iterdir()} <= {"lock"}:
        shutil.rmtree(old)
        return None
    return old


def _exchange(one: Path, other: Path) -> bool:
    """Let two folders change names in one step; False if this system or file system cannot."""
    import ctypes

    at_cwd, exchange = -100, 2
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    if renameat2(at_cwd, os.fsencode(one), at_cwd, os.fsencode(other), exchange) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):
        return False
    raise OSError(code, os.strerror(code), str(other))


def _nearest(path: Path) -> Path:
    """Return a path, or what is there of it."""
    return next((p for p in (path, *path.absolute().parents) if os.path.lexists(p)), path)


def _look_for_ledger(root: Path) -> Path | None:
    """Return something that only the shots of a ledger can have left, if there is any.

    Raises
    ------
    StateDamaged
        If there is no ledger beside it, or an empty one.
    """
    try:
        left = next(root.glob("sensors/*/gen-*.hpx"), None) or next(root.glob("spool/*"), None)
    except OSError:
        left = None
    if left is None:
        return None
    ledger = root / "ledger.sqlite"
    try:
        gone = None if ledger.is_symlink() or ledger.stat().st_size else "is empty"
    except FileNotFoundError:
        gone = "is gone"
    except OSError as error:
        raise StateError(f"The state {root} cannot be used: {error}.") from error
    if gone is not None:
        raise StateDamaged(f"The ledger {ledger} {gone}, but {left} is there.")
    return left
