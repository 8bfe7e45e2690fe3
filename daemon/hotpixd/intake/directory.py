"""A card, or a directory that a tethering program fills, as a source of shots.

A complete listing is the truth: what a new file is, what has changed, what is
gone. Hints (a file was closed, a card was mounted) only make it sooner. Between
listings, the times of the folders are looked at, which costs next to nothing.

    found --------> waiting -------> ready -------> taken --------> done
    by a listing    until finished   for `take`     by the service  in the ledger

A file is offered once nobody writes to it any more and its container is whole:
at once if an event says that it was closed or moved into place, else after its
size and time have not changed for a while. A file that changes is another file.
Files that vanish drop out, and nothing that is remembered is touched.

Nothing is written, and nothing stays open, so that a card can be unmounted.
"""

from __future__ import annotations

import errno
import functools
import heapq
import itertools
import math
import os
import select
import stat
import threading
import time
from collections import deque
from collections.abc import Callable, Container
from dataclasses import dataclass
from enum import Enum, auto
from functools import partial
from pathlib import Path
from typing import Any

from blake3 import blake3

from hotpixd.core.frame import ShotKind
from hotpixd.intake.complete import Look, look_at
from hotpixd.intake.files import RAW, RENDERED, FoundShot, is_ignored, natural, stem_of
from hotpixd.intake.hints import Hint, Hints
from hotpixd.intake.source import Seen, SourceState, Status, Step
from hotpixd.intake.volumes import MOUNT_TABLE, Volume
from hotpixd.intake.walk import MovingError, Picture, Place, Snapshot, place_of, snapshot_of
from hotpixd.words import many

_LOCAL_EVERY_S, _NETWORK_EVERY_S = 1.0, 10.0
_NETWORK_SETTLE_S = 5.0

_LISTING_SHARE = 0.002
"""Of a core, spent on listings that nothing calls for, down to one a minute: 10,000 files take about 0.1 s each."""

_ASKED_LISTING_SHARE = 0.02
"""Of a core, spent on listings since a folder has changed or hints were lost."""

_LISTING_AT_LEAST_EVERY_S = 60.0

_DESCRIBE_EVERY_S = 0.2

_CHECKS_AT_A_TIME_S = 0.1
"""How long a backlog may keep a shot just closed waiting."""

_TORN_AFTER = 10.0
"""Times the settling time: a file without its end that has not changed for so long is left to the decoder."""

_WRITER_GONE_AFTER_S = 60.0
"""A file open for writing that has not changed for so long is offered nevertheless; if it does change, once more."""

_MATE_WITHIN_S = 10.0
"""How long a JPEG waits for its raw file to appear, where raw files are about."""

_FIRST_MATE_WITHIN_S = 2.0
"""The same while nothing tells yet whether raw files will come. A copy begins the next file at once."""

_ALONE_TELLS = 3
"""JPEGs that came without a raw file: no others are waited for then."""

_MATE_AFTER = 15.0
"""Times the settling time that a JPEG waits for a raw file which is there, but neither finished nor growing."""

_LONGEST_WAIT_S = 30.0
"""Between two looks at a file that is not finished."""

_STRANGELY_LONG_S = 60.0
"""A file that has not changed for so long, and still is not complete, is named."""

_SHORTLY_S = 0.05
"""Until what is going on, a card being mounted or a folder being moved, is over and all its hints are heard."""

_AFTER_UNMOUNTING_S = 0.5

_RETRY_AFTER_S, _LONGEST_RETRY_S = 0.5, 60.0

_GONE = frozenset(
    (errno.ENOENT, errno.ENOTDIR, errno.ENODEV, errno.ENXIO, errno.ENOTCONN, errno.ESTALE, errno.EHOSTDOWN)
)
"""Errors that mean "not there now"; others are a fault of the disk or of our rights."""


@dataclass(frozen=True, slots=True)
class DirectorySettings:
    """One directory to watch."""

    directory: Path
    """Absolute. It may be missing for now, be a mount point, or hold mount points."""

    kind: ShotKind | None = None
    """What all of its shots are, if the user says so."""

    camera: str | None = None
    """The user's name for the body, if its files hold no serial number."""

    settle_s: float = 1.0
    """How long size and time must not have changed, where no event says that the writer has closed the file."""

    scan_every_s: float | None = None
    """Time between two listings. None: as the file system and the number of files suggest."""

    ignore: tuple[str, ...] = ()
    """Patterns of names that no file and no folder on the way to it must have; see `files.is_ignored`."""

    use_events: bool = True
    """Whether to ask the kernel for hints. False: listings only."""


class _Stage(Enum):
    WAITING = auto()
    READY = auto()
    TAKEN = auto()
    DONE = auto()
    GONE = auto()


@dataclass(slots=True, eq=False)
class _File:
    """A file with one size and time; when they change, it is replaced by another one."""

    below: str
    """Path relative to the directory."""

    picture: Picture

    signature: bytes | None
    """Digest of volume, path, size and time; None if the volume cannot be recognised."""

    since: float
    """When this size and time were first seen, monotonic s."""

    appeared: float
    """When a file of this name was first seen, monotonic s."""

    stage: _Stage = _Stage.WAITING

    placed: bool = False
    """An event said that it was made, linked or moved here."""

    closed: bool = False
    """An event said that a writer closed it, or that it was moved within the directory."""

    tries: int = 0
    """How often it was offered and could not be read."""

    due: float = 0.0
    """When it is looked at next, monotonic s."""

    read_as: tuple[os.stat_result, str] | None = None
    """Its status after it was read, and the key of its content, set by whoever read it."""

    problem: str | None = None
    """Why it could not be looked at the last time."""

    @property
    def key(self) -> tuple[Any, ...]:
        """Its place in the order of shots. Not kept: most files are done."""
        folder, _, name = self.below.rpartition("/")
        return (*_order_of(folder), natural(name))

    @property
    def is_raw(self) -> bool:
        return _ending(self.below) in RAW

    @property
    def is_rendered(self) -> bool:
        return _ending(self.below) in RENDERED


_Check = tuple[float, tuple[Any, ...], int, _File]
"""When to look at a file, its place in the order, a number that makes each entry unlike all others, the file."""


class DirectorySource:
    """Watches a directory in a thread of its own and hands out its shots.

    All methods are to be called from one thread. Shots are offered folder by folder, in natural order of names; a raw
    file before the JPEG of the same shot.

    Parameters
    ----------
    seen : signatures of files that are in the ledger already. Asked in the source's thread; if what `done`
        returns is added to it, a card put in again is not read again.
    wake : called from the source's thread when `take` has something or `state` has changed
    """

    def __init__(self, settings: DirectorySettings, seen: Container[bytes], wake: Callable[[], None]) -> None:
        self.name = str(settings.directory)
        self._settings = settings
        self._seen = seen
        self._wake = wake
        self._thread = threading.Thread(target=self._run, name=f"watch {self.name}", daemon=True)
        self._bell = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._stopping = False
        self._failure: BaseException | None = None

        # Shared with the caller's thread, which moves files between stages as well.
        self._lock = threading.Lock()
        self._ready: list[tuple[tuple[Any, ...], int, int, _File, _File | None]] = []
        self._checks: list[_Check] = []
        self._taken: dict[Path, _File] = {}
        self._count = itertools.count()
        self._state = SourceState(self.name, "starting", "not listed yet", 0, 0, time.time())

        self._step = Step()

        # Of the source's thread alone.
        self._told: deque[Hint] = deque()
        self._hints = Hints(self._hear)
        self._heard = 0
        self._heard_by_listing = 0
        self._armed_for: Place | None = None
        self._snapshot: Snapshot | None = None
        self._files: dict[str, _File] = {}
        self._mates: dict[str, list[_File]] = {}
        self._raws = 0
        self._alone = 0
        """JPEGs that were there, or offered, without a raw file."""
        self._first_listed_at: float | None = None
        self._list_at = 0.0
        self._listed_at = 0.0
        self._list_now = False
        self._listing_s = 0.0
        self._glance_at = 0.0
        self._describe_at = math.inf
        self._described_at = -math.inf

    # --- for the service

    def start(self) -> None:
        """Begin to watch."""
        self._thread.start()

    def stop(self) -> None:
        """Stop watching; what was taken may still be reported as done."""
        if self._stopping:
            return
        self._stopping = True
        os.eventfd_write(self._bell, 1)
        # A listing of a dead network volume cannot be interrupted: its thread ends with the process.
        self._thread.join(timeout=5.0)
        if not self._thread.is_alive():
            os.close(self._bell)

    def take(self) -> FoundShot | None:
        """Return the next shot that is complete, or None if there is none now. Never waits for the disk.

        Raises
        ------
        BaseException
            What ended the source's thread.
        """
        if self._failure is not None:
            raise self._failure
        with self._lock:
            while self._ready:
                *_, file, raw = heapq.heappop(self._ready)
                if file.stage is _Stage.READY:
                    file.stage = _Stage.TAKEN
                    path = self._path(file)
                    self._taken[path] = file
                    return FoundShot(
                        path,
                        None if raw is None else self._path(raw),
                        self._settings.kind,
                        self._settings.camera,
                        self.name,
                        below=self._settings.directory,
                        was_read=partial(_note_reading, file),
                    )
        return None

    def done(self, path: Path) -> Seen | None:
        """Note that the shot taken from `path` is in the ledger, whatever became of it. Never waits for the disk.

        Returns
        -------
        What to remember, or None if this file cannot be recognised later: its volume has no name, or it is
        no longer what was taken, so that nobody knows which of the two was read.
        """
        with self._lock:
            file = self._taken.pop(path, None)
            if file is None:
                return None
            file.stage = _Stage.DONE
        self._ring()
        if file.read_as is None or file.signature is None:
            return None
        status, key = file.read_as
        same = Picture.of(status, file.picture.volume).is_same_as(file.picture)
        # With its key: should the shot be lost, it is read again, under whatever name it was met.
        return Seen(file.signature, bytes.fromhex(key)) if same else None

    def retry(self, path: Path) -> None:
        """Note that the shot taken from `path` could not be read; it is offered again later."""
        with self._lock:
            file = self._taken.pop(path, None)
            if file is None:
                return
            file.tries += 1
            file.stage = _Stage.WAITING
            delay_s = min(_LONGEST_RETRY_S, _RETRY_AFTER_S * 2.0 ** min(file.tries, 10))
            self._schedule(file, time.monotonic() + delay_s)
        self._ring()

    def forget_taken(self) -> None:
        """Offer again all that was taken and is not done."""
        with self._lock:
            for file in self._taken.values():
                file.stage = _Stage.WAITING
                self._schedule(file, 0.0)
            self._taken.clear()
        self._ring()

    def state(self) -> SourceState:
        """Say how the source is."""
        return self._step.shown(self._state)

    def states(self) -> list[SourceState]:
        """Say how the source is: a directory is one."""
        return [self.state()]

    def concerns(self) -> list[SourceState]:
        """Return the states that alerts are about."""
        return [self.state()]

    def notes(self) -> list[Seen]:
        """Return what is to be remembered besides: nothing."""
        return []

    def hint(self) -> None:
        """List the directory now."""
        self._list_now = True
        self._ring()

    # --- the thread

    def _ring(self) -> None:
        if not self._stopping:
            os.eventfd_write(self._bell, 1)

    def _hear(self, hint: Hint) -> None:
        self._heard += 1
        self._told.append(hint)
        self._ring()

    def _run(self) -> None:
        try:
            self._watch()
        except BaseException as error:
            # Nobody looks at this thread: `take` raises it where somebody does.
            self._failure = error
        finally:
            self._hints.disarm()
            self._wake()

    def _watch(self) -> None:
        with MOUNT_TABLE.open("rb", buffering=0) as table:
            poller = select.poll()
            poller.register(self._bell, select.POLLIN)
            poller.register(table, select.POLLPRI)
            while not self._stopping:
                # Rounded up, or the last millisecond would be spun away.
                events = dict(poller.poll(math.ceil(1000 * self._idle_s())))
                if self._bell in events:
                    os.eventfd_read(self._bell)
                with self._step.of("the directory being looked at"):
                    if table.fileno() in events:
                        self._heed_mounts()
                    self._round()

    def _idle_s(self) -> float:
        """How long nothing needs to be done if nothing happens."""
        if self._list_now or self._told:
            return 0.0
        due = self._list_at
        if self._snapshot is not None:
            due = min(due, self._glance_at, self._describe_at)
            with self._lock:
                while self._checks and not _is_valid(self._checks[0]):
                    heapq.heappop(self._checks)
                if self._checks:
                    due = min(due, self._checks[0][0])
        return max(0.0, due - time.monotonic())

    def _round(self) -> None:
        if self._snapshot is not None and time.monotonic() >= self._glance_at:
            self._glance(self._snapshot)
        if self._list_now or time.monotonic() >= self._list_at:
            self._list()
        self._heed_all(self._snapshot)
        if self._snapshot is not None:
            self._check_those_due()
            # Goes through all files: not each time one of a thousand is done.
            self._describe_at = min(self._describe_at, self._described_at + _DESCRIBE_EVERY_S)
            if time.monotonic() >= self._describe_at:
                self._describe(self._snapshot)
                self._described_at = time.monotonic()
                self._describe_at = math.inf

    # --- listings

    def _list(self) -> None:
        """Make a complete listing, and draw conclusions only if that succeeds."""
        self._list_now = False
        known = self._snapshot
        try:
            place = place_of(self._settings.directory)
            if place != self._armed_for:
                # Before the listing, so that no file falls between the two.
                self._arm(place)
            began = time.monotonic()
            snapshot = snapshot_of(place, {} if known is None else known.volumes, self._settings.ignore)
        except MovingError:
            self._list_at = time.monotonic() + _SHORTLY_S
            return
        except OSError as error:
            self._lose(error)
            return
        if known is not None and known.place == place:
            # Files that are gone may only have been renamed.
            self._heed_all(known)
        self._snapshot = snapshot
        found = self._merge(snapshot, began)
        self._listed_at = time.monotonic()
        self._listing_s = self._listed_at - began
        self._list_at = self._listed_at + (self._settings.scan_every_s or self._listing_every_s(place))
        self._glance_at = self._listed_at + self._glance_every_s(place)
        deaf = self._hints.armed and not self._hints.refused and self._heard == self._heard_by_listing
        self._heard_by_listing = self._heard
        if found and known is not None and deaf:
            # Hints should have told of these files.
            self._armed_for = None
            self._list_soon()

    def _listing_every_s(self, place: Place) -> float:
        bearable_s = min(self._listing_s / _LISTING_SHARE, _LISTING_AT_LEAST_EVERY_S)
        return max(bearable_s, self._glance_every_s(place))

    def _glance_every_s(self, place: Place) -> float:
        return self._settings.scan_every_s or (_NETWORK_EVERY_S if place.network else _LOCAL_EVERY_S)

    def _list_soon(self) -> None:
        """Have a listing made as soon as the last one's cost allows."""
        bearable = self._listed_at + self._listing_s / _ASKED_LISTING_SHARE
        self._list_at = min(self._list_at, max(bearable, time.monotonic() + _SHORTLY_S))

    def _glance(self, snapshot: Snapshot) -> None:
        """Look for signs that a listing would say something new."""
        began = time.monotonic()
        try:
            if place_of(self._settings.directory) != snapshot.place:
                self._list_now = True
            elif self._hints.armed and not self._hints.alive:
                self._armed_for = None
                self._list_now = True
            elif not snapshot.place.network and _have_changed(snapshot.folders):
                # Not over a network: some file systems there make the times of folders up.
                self._list_soon()
        except OSError:
            self._list_now = True
        now = time.monotonic()
        self._glance_at = now + max(self._glance_every_s(snapshot.place), (now - began) / _LISTING_SHARE)

    def _heed_mounts(self) -> None:
        """Something was mounted or unmounted, perhaps here."""
        if self._snapshot is None:
            self._list_now = True
            return
        before = self._snapshot.place
        try:
            place = place_of(self._settings.directory)
        except OSError:
            self._list_now = True
            return
        if place.mounts[0] != before.mounts[0] or not set(place.mounts) <= set(before.mounts):
            self._list_now = True
        elif place != before or place.may_be_swapped:
            # A card may have gone and come back: the table then looks the same, but hints have stopped. If one has
            # gone, the next of the same reader may follow: a listing now would find it open, and keep it from going.
            self._armed_for = None
            self._list_at = min(self._list_at, time.monotonic() + _AFTER_UNMOUNTING_S)

    def _arm(self, place: Place) -> None:
        if self._settings.use_events and not place.mounts[0].network:
            self._hints.arm(place.folder)
        else:
            self._hints.disarm()
        self._armed_for = place

    def _lose(self, error: OSError) -> None:
        """The directory cannot be listed: offer nothing, conclude nothing."""
        self._snapshot = None
        self._armed_for = None
        now = time.monotonic()
        with self._lock:
            for *_, file, _raw in self._ready:
                if file.stage is _Stage.READY:
                    file.stage = _Stage.WAITING
                    self._schedule(file, now)
            self._ready.clear()
        self._list_at = now + (self._settings.scan_every_s or _LOCAL_EVERY_S)
        reason = error.strerror or str(error)
        waiting = len(self._not_done())
        if error.errno == errno.ENOENT:
            self._tell("away", "the directory is missing", waiting)
        elif error.errno in _GONE:
            self._tell("away", f"the directory cannot be reached: {reason}", waiting)
        else:
            self._tell("trouble", f"the directory cannot be listed: {reason}", waiting)

    def _merge(self, snapshot: Snapshot, began: float) -> bool:
        """Take over what a listing says that began then; True if it found a file that was not known."""
        for below in self._files.keys() - snapshot.pictures.keys():
            # One heard of since then may have come after its folder was listed.
            if self._files[below].since < began:
                self._drop(self._files[below])
        now = time.monotonic()
        if self._first_listed_at is None:
            self._first_listed_at = now
        found = False
        for below, picture in snapshot.pictures.items():
            file = self._files.get(below)
            if file is not None and file.picture.is_same_as(picture):
                file.picture = picture
                continue
            if file is not None and file.since >= began:
                continue
            found = found or file is None
            self._put(below, picture, now)
        return found

    def _put(self, below: str, picture: Picture, now: float) -> _File:
        """Begin to follow a file; one known under its path is forgotten."""
        file = _File(below, picture, self._signature(below, picture), now, now)
        before = self._files.get(below)
        if before is not None:
            file.appeared = before.appeared
            self._drop(before)
        self._files[below] = file
        self._mates.setdefault(stem_of(below), []).append(file)
        self._raws += file.is_raw
        with self._lock:
            if self._is_seen(file):
                file.stage = _Stage.DONE
                self._alone += file.is_rendered
            else:
                self._schedule(file, now + self._settle_s(file))
        return file

    def _drop(self, file: _File) -> None:
        """Stop following a file. If it is with the service, that may still report what became of it."""
        del self._files[file.below]
        stem = stem_of(file.below)
        self._mates[stem].remove(file)
        if not self._mates[stem]:
            del self._mates[stem]
        self._raws -= file.is_raw
        with self._lock:
            if file.stage is not _Stage.TAKEN:
                file.stage = _Stage.GONE

    # --- single files

    def _heed_all(self, snapshot: Snapshot | None) -> None:
        while self._told:
            hint = self._told.popleft()
            # Without a snapshot, the next listing will find what it is about.
            if snapshot is not None:
                self._heed(hint, snapshot)

    def _heed(self, hint: Hint, snapshot: Snapshot) -> None:
        if hint.path is None:
            self._list_soon()
            return
        below = _below(snapshot.place.folder, hint.path)
        parts = below.split("/")
        if any(part.startswith(".") for part in parts) or is_ignored(parts, self._settings.ignore):
            return
        try:
            status = Path(hint.path).stat(follow_symlinks=False)
        except OSError:
            # Gone again, or the card is: a listing says which.
            self._list_soon()
            return
        if not stat.S_ISREG(status.st_mode):
            return
        picture = Picture.of(status, _volume_at(snapshot, hint.path))
        file = self._files.get(below)
        if file is None or not file.picture.is_same_as(picture):
            file = self._put(below, picture, time.monotonic())
        file.placed = True
        file.closed = file.closed or hint.closed
        moved = None if hint.moved_from is None else self._files.get(_below(snapshot.place.folder, hint.moved_from))
        with self._lock:
            if file.stage is not _Stage.WAITING:
                return
            if moved is not None and moved.stage is _Stage.DONE and moved.picture.is_same_as(picture):
                file.stage = _Stage.DONE
            else:
                self._schedule(file, 0.0)

    def _schedule(self, file: _File, due: float) -> None:
        """Have a file looked at when it is due; call with the lock held."""
        file.due = due
        heapq.heappush(self._checks, (due, file.key, next(self._count), file))

    def _check_those_due(self) -> None:
        enough = time.monotonic() + _CHECKS_AT_A_TIME_S
        while (now := time.monotonic()) < enough:
            with self._lock:
                while self._checks and not _is_valid(self._checks[0]):
                    heapq.heappop(self._checks)
                if not self._checks or self._checks[0][0] > now:
                    return
                file = heapq.heappop(self._checks)[-1]
            # One that was dropped while the service had it, and was given back, is followed no more.
            if self._files.get(file.below) is file:
                self._check(file)

    def _check(self, file: _File) -> None:
        """Offer a file if it is finished, else look at it again later."""
        again_s = min(_LONGEST_WAIT_S, max(self._settle_s(file), (time.monotonic() - file.since) / 2))
        volume = file.picture.volume
        file.problem = None
        try:
            look = look_at(self._path(file), ask_for_writers=not volume.mount.network)
        except FileNotFoundError:
            self._drop(file)
            return
        except OSError as error:
            file.problem = error.strerror
            self._check_again(file, again_s)
            self._list_soon()
            return
        now = time.monotonic()
        picture = Picture.of(look.status, volume)
        if not file.picture.is_same_as(picture):
            self._put(file.below, picture, now)
        elif self._path(file) in self._taken or not self._is_finished(file, look, now - file.since):
            self._check_again(file, again_s)
        elif (hold_s := self._hold_s(file, now)) > 0:
            with self._lock:
                # At that very moment: those that came together are offered in their order.
                self._schedule(file, now + min(hold_s, again_s))
        else:
            self._offer(file)

    def _check_again(self, file: _File, after_s: float) -> None:
        with self._lock:
            self._schedule(file, time.monotonic() + after_s)

    def _is_finished(self, file: _File, look: Look, quiet_s: float) -> bool:
        if not file.picture.size or (look.written and quiet_s < _WRITER_GONE_AFTER_S):
            return False
        # An event alone is no proof: some programs close a picture and open it again to add to it. Where leases do
        # not tell of writers, nothing less than the event of closing will do.
        told = file.closed if look.written is None else file.placed
        if told and look.whole and not file.picture.volume.mount.network:
            return True
        return quiet_s >= self._settle_s(file) * (_TORN_AFTER if look.whole is False else 1.0)

    def _hold_s(self, file: _File, now: float) -> float:
        """How long a JPEG that is finished waits for the raw file of its shot."""
        if not file.is_rendered:
            return 0.0
        raw = self._raw_of(file)
        if raw is None:
            if self._raws:
                return file.appeared + _MATE_WITHIN_S - now
            # The raw file of one that was there at first would be there, too.
            is_new = self._first_listed_at is not None and file.appeared > self._first_listed_at
            return file.appeared + _FIRST_MATE_WITHIN_S - now if is_new and self._alone < _ALONE_TELLS else 0.0
        if raw.stage is _Stage.WAITING and not raw.tries:
            return raw.since + _MATE_AFTER * self._settle_s(raw) - now
        return 0.0

    def _raw_of(self, file: _File) -> _File | None:
        if not file.is_rendered:
            return None
        return next((mate for mate in self._mates[stem_of(file.below)] if mate.is_raw), None)

    def _offer(self, file: _File) -> None:
        raw = self._raw_of(file)
        alone = raw is None and file.is_rendered
        place = (file.key, False) if raw is None else (raw.key, True)
        with self._lock:
            self._alone += alone
            if alone and self._alone == _ALONE_TELLS:
                # Those that wait come before those that will not have to.
                for other in self._files.values():
                    if other is not file and other.is_rendered and other.stage is _Stage.WAITING:
                        self._schedule(other, 0.0)
            if self._is_seen(file):
                # The service had a file of this name and time when this one was found.
                file.stage = _Stage.DONE
                return
            file.stage = _Stage.READY
            heapq.heappush(self._ready, (*place, next(self._count), file, raw))
            first = len(self._ready) == 1
            if file.is_raw:
                for mate in self._mates[stem_of(file.below)]:
                    if mate.stage is _Stage.WAITING:
                        self._schedule(mate, 0.0)
        if first:
            self._wake()

    def _is_seen(self, file: _File) -> bool:
        return file.signature is not None and file.signature in self._seen

    def _path(self, file: _File) -> Path:
        return self._settings.directory / file.below

    def _signature(self, below: str, picture: Picture) -> bytes | None:
        volume = picture.volume
        if volume.identity is None or self._snapshot is None:
            return None
        within = _below(volume.root, f"{self._snapshot.place.folder}/{below}")
        parts = (volume.identity, os.fsencode(within), b"%d %d" % (picture.size, picture.mtime_ns))
        return blake3(b"\0".join(parts)).digest(16)

    def _settle_s(self, file: _File) -> float:
        network = file.picture.volume.mount.network
        return max(self._settings.settle_s, _NETWORK_SETTLE_S) if network else self._settings.settle_s

    # --- what is shown

    def _describe(self, snapshot: Snapshot) -> None:
        waiting = self._not_done()
        said = [many(len(self._files), "file"), f"{len(waiting)} waiting"]
        problem = next((file.problem for file in waiting if file.problem), None)
        if problem is not None:
            said.append(f"some cannot be opened: {problem}")
        long_since = time.monotonic() - _STRANGELY_LONG_S
        stuck = next((file.below for file in waiting if file.stage is _Stage.WAITING and file.since < long_since), None)
        if stuck is not None:
            said.append(f"{stuck} does not become complete")
        if snapshot.closed:
            said.append(f"{many(snapshot.closed, 'folder')} closed to us")
        if self._hints.refused is not None:
            said.append(f"polling, since {self._hints.refused}")
        self._tell("watching", ", ".join(said), len(waiting))

    def _not_done(self) -> list[_File]:
        return [file for file in self._files.values() if file.stage is not _Stage.DONE]

    def _tell(self, status: Status, detail: str, waiting: int) -> None:
        before = self._state
        since = before.since if status == before.status else time.time()
        self._state = SourceState(self.name, status, detail, len(self._files), waiting, since)
        if self._state != before:
            self._wake()


def _note_reading(file: _File, status: os.stat_result, key: str) -> None:
    file.read_as = status, key


def _is_valid(check: _Check) -> bool:
    """Tell whether an entry of the heap is the last one made for its file."""
    due, _, _, file = check
    return file.stage is _Stage.WAITING and file.due == due


def _have_changed(folders: dict[str, int]) -> bool:
    return any(Path(folder).stat().st_mtime_ns != changed_ns for folder, changed_ns in folders.items())


@functools.lru_cache(maxsize=1024)
def _order_of(folder: str) -> tuple[Any, ...]:
    return tuple(natural(part) for part in folder.split("/")) if folder else ()


def _ending(name: str) -> str:
    return os.path.splitext(name)[1].lower()  # noqa: PTH122 - strings are ten times faster


def _below(folder: str, path: str) -> str:
    """Return a path that lies below a folder, relative to it."""
    return path[len(folder.rstrip("/")) + 1 :]


def _volume_at(snapshot: Snapshot, path: str) -> Volume:
    around = [root for root in snapshot.volumes if root == snapshot.place.folder or path.startswith(root + "/")]
    return snapshot.volumes[max(around, key=len)]
