"""Hints from the kernel that a file may be new: they come sooner than the next listing, and are not to be relied on.

watchdog is told of a file when it is closed or moved into place, within a
millisecond. It loses events when the kernel's queue overflows, hears nothing of
another computer's files, and goes blind without a word when its folder is
unmounted, covered or replaced.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass

from watchdog.events import (
    DirCreatedEvent,
    DirMovedEvent,
    FileClosedEvent,
    FileCreatedEvent,
    FileMovedEvent,
    FileSystemEvent,
    FileSystemEventHandler,
)
from watchdog.observers.inotify import InotifyObserver

from hotpixd.intake.files import is_picture

_WANTED: list[type[FileSystemEvent]] = [
    DirCreatedEvent,
    DirMovedEvent,
    FileClosedEvent,
    FileCreatedEvent,
    FileMovedEvent,
]
"""Not those of opening and reading, which we do ourselves."""

_REASONS = {
    errno.ENOSPC: "fs.inotify.max_user_watches is used up",
    errno.EMFILE: "fs.inotify.max_user_instances is used up",
}

_WARNS_OF_OVERFLOW = logging.getLogger("watchdog.observers.inotify_c")

# It calls it an error when it is stopped while an event is on its way, and warns when a folder is announced twice.
logging.getLogger("watchdog.observers.inotify").setLevel(logging.CRITICAL)
warnings.filterwarnings("ignore", "Callback with id", RuntimeWarning, r"watchdog\.")


@dataclass(frozen=True, slots=True)
class Hint:
    """Something happened to a file, or to a folder."""

    path: str | None
    """The picture to look at. None: folders changed, or hints were lost."""

    closed: bool = False
    """A writer has closed it, or it was moved into place from this folder."""

    moved_from: str | None = None
    """Where it was before, if it was moved within the folder."""


class Hints(FileSystemEventHandler):
    """Watches one folder at a time.

    Parameters
    ----------
    hear : takes each hint, in a thread of watchdog
    """

    def __init__(self, hear: Callable[[Hint], None]) -> None:
        self._hear = hear
        self._observer: InotifyObserver | None = None
        self._overflow = _Overflow(lambda: hear(Hint(None)))
        self.refused: str | None = None
        """Why there are no hints, or not from all folders, although they were asked for."""

    def arm(self, folder: str) -> None:
        """Watch this folder and all below it, and nothing else any more."""
        self.disarm()
        try:
            self._observer = self._observing(folder, recursive=True)
            # Folders for which there was no room are left out in silence. There is room for one more only if there was
            # room for all.
            self._end(self._observing(folder, recursive=False))
        except OSError as error:
            self.refused = _REASONS.get(error.errno or 0, error.strerror or str(error))
        _WARNS_OF_OVERFLOW.addHandler(self._overflow)

    def disarm(self) -> None:
        """Watch nothing any more. Takes half a second at most, while watchdog waits for the other half of a move."""
        _WARNS_OF_OVERFLOW.removeHandler(self._overflow)
        self.refused = None
        if self._observer is not None:
            self._end(self._observer)
            self._observer = None

    @property
    def alive(self) -> bool:
        """Whether hints may still come: watchdog's threads end with the folder they watch."""
        observer = self._observer
        return observer is not None and observer.is_alive() and all(e.is_alive() for e in observer.emitters)

    @property
    def armed(self) -> bool:
        """Whether a folder is watched, as far as we know."""
        return self._observer is not None

    def on_closed(self, event: FileSystemEvent) -> None:
        """Pass on that a writer has closed a file."""
        self._say(event.src_path, closed=True)

    def on_created(self, event: FileSystemEvent) -> None:
        """Pass on that a file was made, linked or moved here from elsewhere, or that a folder was."""
        if event.is_directory:
            self._hear(Hint(None))
        else:
            self._say(event.src_path)

    def on_moved(self, event: FileSystemEvent) -> None:
        """Pass on that a file got another name, or that a folder did."""
        if event.is_directory:
            self._hear(Hint(None))
        else:
            self._say(event.dest_path, closed=True, moved_from=os.fsdecode(event.src_path))

    def _say(self, path: str | bytes, *, closed: bool = False, moved_from: str | None = None) -> None:
        text = os.fsdecode(path)
        if is_picture(text.rpartition("/")[2]):
            self._hear(Hint(text, closed, moved_from))

    def _observing(self, folder: str, *, recursive: bool) -> InotifyObserver:
        observer = InotifyObserver()
        try:
            observer.schedule(self, folder, recursive=recursive, event_filter=_WANTED)
            observer.start()
        except OSError:
            self._end(observer)
            raise
        return observer

    @staticmethod
    def _end(observer: InotifyObserver) -> None:
        observer.stop()
        # It was not started if its folder could not be watched.
        with contextlib.suppress(RuntimeError):
            observer.join()


class _Overflow(logging.Handler):
    """Notices that watchdog warns of lost events: nothing else says so."""

    def __init__(self, noticed: Callable[[], None]) -> None:
        super().__init__(logging.WARNING)
        self._noticed = noticed

    def emit(self, record: logging.LogRecord) -> None:  # noqa: ARG002 - the signature is logging's
        self._noticed()
