"""The user's folder of photos: each file under a name made by a template, and never over another one.

``{date:%Y-%m-%d}/{name}`` puts a shot into a folder of its day. Where a file of
that name exists with the same content, it is the same shot; with another
content, the new one is called IMG_0001-1.CR2.
"""

from __future__ import annotations

import errno
import itertools
import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from blake3 import blake3

from hotpixd.intake import metadata
from hotpixd.intake.arrivals import CameraFile, content_digest
from hotpixd.intake.naming import UNKNOWN, filled
from hotpixd.store.durable import failpoint, fsync_file, fsync_folder, rename_to_new, write_all

_LONGEST_VALUE = 60
"""Characters of what a file says of its camera: a name has room for 255 bytes."""

_LONGEST_NAME = 255
"""Bytes."""

_BLOCK = 1 << 20


@dataclass(frozen=True, slots=True)
class Album:
    """Where photos are saved, and under which names."""

    folder: Path
    """Absolute. It is not made: a disk that is not mounted must not be filled below its mount point."""

    template: str = "{name}"
    """Path below the folder; see `naming`. A symlink among the folders there is not followed."""

    def save(self, arrived: Path, file: CameraFile) -> Path:
        """Put a file that has arrived into the folder, durably; return where it is there.

        Raises
        ------
        OSError
            If the folder is not there, is full or closed to us.
        """
        if not self.folder.is_dir():
            raise FileNotFoundError(errno.ENOENT, "the folder is missing", str(self.folder))
        name = self._name(arrived, file)
        with _folder_below(self.folder, name.parent.parts) as inside:
            # Hidden, so that nobody takes it for a photo before it is whole; of the same name when it is tried again,
            # so that nothing is left of a crash: half a photo, or a second name of one that is whole.
            part = inside / f".hotpixd-{blake3(os.fsencode(arrived)).hexdigest(8)}.part"
            part.unlink(missing_ok=True)
            for number in itertools.count():
                step = _fitting(name.name, f"-{number}" if number else "")
                path = inside / step
                if os.path.lexists(path):
                    if not _is_same(arrived, path):
                        continue
                    # Whoever put it there may have died before its own sync, or never cares for one.
                    fsync_file(path)
                    fsync_folder(inside)
                    return self.folder / name.parent / step
                with suppress(FileExistsError):
                    _place(arrived, part, path)
                    fsync_folder(inside)
                    failpoint("after_album")
                    return self.folder / name.parent / step
        raise AssertionError("numbers do not end")

    def _name(self, arrived: Path, file: CameraFile) -> Path:
        with arrived.open("rb") as content:
            about = metadata.from_file(content)
        taken = about.taken_at or _moment(file.mtime)
        stem, dot, ending = file.name.rpartition(".")
        known: Mapping[str, object] = {
            "name": file.name,
            "stem": stem if dot else file.name,
            "ext": ending.lower() if dot else UNKNOWN,
            "date": taken,
            "make": (about.make or UNKNOWN)[:_LONGEST_VALUE],
            "model": (about.model or UNKNOWN)[:_LONGEST_VALUE],
            "serial": (about.serial or file.camera)[:_LONGEST_VALUE],
        }
        return filled(self.template, known)


def _moment(mtime: int) -> datetime:
    try:
        return datetime.fromtimestamp(mtime, UTC)
    except (OverflowError, ValueError, OSError):
        # Beyond all years: a clock that was never set.
        return datetime.fromtimestamp(0, UTC)


@contextmanager
def _folder_below(top: Path, steps: tuple[str, ...]) -> Iterator[Path]:
    """Open a folder below another one, making what is missing of it; yields a path that leads to this very folder.

    Below `top` no symlink is followed, whoever may have put it there, and nothing that is put in the place of a folder
    meanwhile.

    Raises
    ------
    OSError
        If something else has the name of a folder.
    """
    at = os.open(top, os.O_RDONLY | os.O_DIRECTORY)
    try:
        for step in steps:
            step = _fitting(step)
            try:
                os.mkdir(step, dir_fd=at)
            except FileExistsError:
                pass
            else:
                mode = stat.S_IMODE(os.fstat(at).st_mode) & 0o777
                _open_up(Path(f"/proc/self/fd/{at}", step), mode)
            # Durable then, whoever has made it.
            os.fsync(at)
            try:
                inner = os.open(step, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=at)
            except NotADirectoryError as error:
                raise NotADirectoryError(errno.ENOTDIR, f"{step!r} in it is a symlink, or no folder") from error
            os.close(at)
            at = inner
        yield Path(f"/proc/self/fd/{at}")
    finally:
        os.close(at)


def _fitting(name: str, more: str = "") -> str:
    """Return a name with something more before its ending, as short as file systems need it."""
    stem, ending = os.path.splitext(name)  # noqa: PTH122 - of a part of a path
    room = _LONGEST_NAME - len(os.fsencode(more)) - len(os.fsencode(ending[:_LONGEST_VALUE]))
    short = os.fsencode(stem)[:room].decode("utf-8", "ignore")
    return f"{short}{more}{ending[:_LONGEST_VALUE]}"


def _open_up(path: Path, mode: int) -> None:
    """Let the user in, who may be another one than the service's; the umask of that lets nobody."""
    # Where there are no modes, as on FAT and network drives, all of it is as open as it was mounted.
    with suppress(OSError):
        path.chmod(mode)


def _is_same(one: Path, other: Path) -> bool:
    if other.is_symlink() or not other.is_file() or one.stat().st_size != other.stat().st_size:
        return False
    return one.samefile(other) or content_digest(one) == content_digest(other)


def _place(arrived: Path, part: Path, path: Path) -> None:
    """Write a copy and give it its name, durably but for the folder's entry; FileExistsError if the name is taken.

    Not a link: the user may change the photo in place, which would change what is kept of the shot.
    """
    try:
        fd = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o644)
        try:
            with arrived.open("rb") as content:
                while block := content.read(_BLOCK):
                    write_all(fd, block)
            os.fsync(fd)
        finally:
            os.close(fd)
        _open_up(part, 0o644)
        rename_to_new(part, path)
    finally:
        part.unlink(missing_ok=True)
