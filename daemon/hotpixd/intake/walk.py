"""All pictures below a folder at one moment, or an error: never a part of them.

A card that is pulled answers with errors for a while, then it is another
folder, perhaps with another card's files. A listing made meanwhile would say
that files are gone, or that they are of another volume.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from hotpixd.intake.files import is_ignored, is_picture
from hotpixd.intake.volumes import Mount, Volume, mounts_around, volume_of

_YOUNG_NS = 3_000_000_000
"""FAT keeps times in steps of 2 s: a folder changed that recently may change again without a new time."""


class MovingError(OSError):
    """The folder was replaced, or something was mounted, while it was listed. Another try may succeed at once."""


@dataclass(frozen=True, slots=True)
class Place:
    """A folder as it was reached: another card in the same folder is another place."""

    folder: str
    """Without symlinks."""

    device: int
    inode: int

    mounts: tuple[Mount, ...]
    """The one it lies on, then those below it."""

    @property
    def network(self) -> bool:
        """Whether any of it is on another computer."""
        return any(mount.network for mount in self.mounts)

    @property
    def may_be_swapped(self) -> bool:
        """Whether mounting and unmounting can change what it holds."""
        return len(self.mounts) > 1 or self.mounts[0].point != "/"


@dataclass(frozen=True, slots=True)
class Picture:
    """A file with the ending of a picture."""

    size: int
    mtime_ns: int
    inode: int

    volume: Volume

    @classmethod
    def of(cls, status: os.stat_result, volume: Volume) -> Picture:
        """Describe a file by its status."""
        return cls(status.st_size, status.st_mtime_ns, status.st_ino, volume)

    def is_same_as(self, other: Picture) -> bool:
        """Tell whether two looks at one path saw the same file, unchanged."""
        return (
            self.size == other.size
            and self.mtime_ns == other.mtime_ns
            and (self.inode == other.inode or self.volume.mount.forgetful)
            and self.volume.recognised_as(other.volume)
        )


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What lies below a folder."""

    place: Place

    volumes: dict[str, Volume]
    """By the folder from which they count."""

    pictures: dict[str, Picture]
    """By path relative to the folder."""

    folders: dict[str, int]
    """When each folder was last changed, in ns; -1 if it may have changed since without a new time."""

    closed: int
    """Folders that we may not look into."""


def place_of(directory: Path) -> Place:
    """Say which folder a path leads to now, and what is mounted around it.

    Raises
    ------
    OSError
        If there is no folder, or it cannot be reached.
    """
    folder = os.path.realpath(directory)
    status = Path(folder).stat()
    return Place(folder, status.st_dev, status.st_ino, tuple(mounts_around(folder)))


def snapshot_of(place: Place, known: dict[str, Volume], ignore: tuple[str, ...] = ()) -> Snapshot:
    """List all pictures below a folder; symlinks are not followed, hidden names left out.

    Parameters
    ----------
    known : volumes of the last snapshot; one that is still mounted stays the same object
    ignore : see `files.is_ignored`; such folders are not looked into

    Raises
    ------
    MovingError
        If it was not the same place from the start to the end.
    OSError
        If any of it cannot be listed, but for folders that we have no right to look into.
    """
    volumes: dict[str, Volume] = {}
    for mount in place.mounts:
        try:
            volume = volume_of(mount, place.folder)
        except OSError:
            if mount is place.mounts[0]:
                raise
            # Covered by another mount, in a closed folder, or broken: walking into it will tell.
            continue
        before = known.get(volume.root)
        volumes[volume.root] = before if before is not None and before == volume else volume
    pictures: dict[str, Picture] = {}
    folders: dict[str, int] = {}
    closed = 0
    todo = [("", volumes[place.folder])]
    now_ns = time.time_ns()
    while todo:
        below, volume = todo.pop()
        folder = os.path.join(place.folder, below) if below else place.folder  # noqa: PTH118 - strings are ten times faster
        try:
            changed_ns = Path(folder).stat().st_mtime_ns
            for entry, status in _entries(folder, ignore):
                inner = f"{below}/{entry.name}" if below else entry.name
                if status is None:
                    todo.append((inner, volumes.get(entry.path, volume)))
                else:
                    pictures[inner] = Picture.of(status, volume)
        except FileNotFoundError:
            # Deleted while we were on the way to it.
            if not below:
                raise
            continue
        except PermissionError:
            # Such as lost+found. A card that was pulled answers otherwise.
            if not below:
                raise
            closed += 1
            continue
        # A time far in the future is a camera's wrong clock.
        folders[folder] = -1 if abs(now_ns - changed_ns) < _YOUNG_NS else changed_ns
    if place_of(Path(place.folder)) != place:
        raise MovingError("the directory is being replaced")
    return Snapshot(place, volumes, pictures, folders, closed)


def _entries(folder: str, ignore: tuple[str, ...]) -> Iterator[tuple[os.DirEntry[str], os.stat_result | None]]:
    """Yield the pictures in a folder with their status, and the folders in it without one."""
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith(".") or is_ignored((entry.name,), ignore):
                continue
            try:
                if entry.is_dir(follow_symlinks=False):
                    yield entry, None
                elif is_picture(entry.name) and entry.is_file(follow_symlinks=False):
                    yield entry, entry.stat(follow_symlinks=False)
            except FileNotFoundError:
                # Deleted a moment ago; its neighbours are still there.
                continue
