"""What every durable write goes through: write all of it, fsync, rename, fsync the folder.

A file is safe once its bytes *and* the entry of its folder have reached the
disk; a rename is a commit point only if the renamed file was safe before.
Here too: the errors of the state directory, and the failpoints at which tests
stop the process between two such steps.
"""

from __future__ import annotations

import errno
import os
import signal
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path

_NO_LINKS = (errno.EPERM, errno.EXDEV, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EMLINK, errno.ENOSYS, errno.EACCES)

FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
"""What the system says where there is no room for more."""


class StateError(Exception):
    """The state directory cannot be used. The message is a sentence for people."""


class WrongUse(Exception):  # noqa: N818 - not a fault of ours
    """What is asked for cannot be, and nothing was done; the message says how to ask."""


class StateDamaged(StateError):  # noqa: N818 - a condition, not a fault
    """The ledger can no longer be believed. It is left as it is; the message says what is wrong and what to do.

    Not begun anew by itself: shots were acknowledged that may be nowhere else.
    """

    def __init__(self, what: str) -> None:
        super().__init__(
            f"{what} Nothing of it is used or changed. If you have a backup: hotpixd restore FILE --force; else, from"
            " the pictures: hotpixd rebuild FOLDER... Both keep the old state beside the new one."
        )
        self.what = what
        """The same without what cures it."""


class StateFull(StateError):  # noqa: N818 - a condition, not a fault
    """The disk of the state directory is full. Nothing was acknowledged or damaged: try again later."""


class Failpoints:
    """Named steps at which the process kills itself, for tests: HOTPIXD_FAILPOINT=name:kill[:nth pass]."""

    def __init__(self, order: str | None) -> None:
        """Take the order of the environment; None arms nothing.

        Raises
        ------
        ValueError
            If the order is none that can be obeyed: a test must not pass because of a slip of the pen.
        """
        self._name: str | None = None
        self._passes_left = 0
        if not order:
            return
        name, _, rest = order.partition(":")
        action, _, nth = rest.partition(":")
        if not name or action != "kill" or not (nth or "1").isdecimal() or int(nth or "1") < 1:
            raise ValueError(f"HOTPIXD_FAILPOINT must read name:kill or name:kill:N, got {order!r}")
        self._name, self._passes_left = name, int(nth or "1")

    def passed(self, name: str) -> None:
        """Kill the process if this is the pass it was told to die at."""
        if name != self._name:
            return
        self._passes_left -= 1
        if self._passes_left == 0:
            os.kill(os.getpid(), signal.SIGKILL)


failpoint = Failpoints(os.environ.get("HOTPIXD_FAILPOINT")).passed
"""Mark a step by its name: ``failpoint("after_link")``."""


@contextmanager
def full_disk_as_state_full(doing: str) -> Iterator[None]:
    """Turn "no space left" into `StateFull`; other errors pass unchanged.

    An fsync that fails with EIO passes too, and must end the process: the
    kernel has marked the pages clean, so a second fsync would lie.
    """
    try:
        yield
    except OSError as error:
        if error.errno in FULL:
            raise StateFull(f"No space left {doing}: {error.strerror}.") from error
        raise


def open_for_reading(path: Path | str, below: Path | None = None) -> int:
    """Open a file for reading only and return its descriptor; opening neither waits for anything nor starts anything.

    Parameters
    ----------
    below : a folder that the file lies in. On the way from there to the file no symlink is followed, so that a folder
        put in the place of another one after it was listed does not lead elsewhere. None: symlinks are followed.

    Raises
    ------
    OSError
        If it cannot be opened, or a symlink is on its way.
    """
    # O_NONBLOCK: a FIFO with a picture's name must not stop the daemon.
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY
    if below is None:
        return os.open(path, flags)
    *folders, name = Path(path).relative_to(below).parts
    if ".." in (*folders, name):
        raise OSError(errno.EXDEV, "the path leads out of its folder", os.fspath(path))
    at = os.open(below, os.O_PATH | os.O_DIRECTORY)
    try:
        for folder in folders:
            inner = os.open(folder, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=at)
            os.close(at)
            at = inner
        # What is no regular file is not opened at all: opening a device may have effects. Should something else be put
        # there in between, it is opened without waiting, and found out by who looks at the descriptor.
        if not stat.S_ISREG(os.stat(name, dir_fd=at, follow_symlinks=False).st_mode):
            raise OSError(errno.EINVAL, "it is not a regular file", os.fspath(path))
        return os.open(name, flags | os.O_NOFOLLOW, dir_fd=at)
    finally:
        os.close(at)


def write_all(fd: int, data: bytes | memoryview) -> None:
    """Write all of `data`; `os.write` may stop after a part of it."""
    left = memoryview(data).cast("B")
    while left:
        left = left[os.write(fd, left) :]


def fsync_file(path: Path) -> None:
    """Put the content of a file on the disk. Opens it for reading only."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def fsync_folder(folder: Path) -> None:
    """Put the entries of a folder (files made, renamed, removed) on the disk."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextmanager
def named_after(path: Path, part: Path) -> Iterator[None]:
    """Have errors about a file that is written beside its place name that place: users know nothing of the other."""
    try:
        yield
    except OSError as error:
        if error.filename == os.fspath(part):
            error.filename = os.fspath(path)
        raise


@contextmanager
def written_beside(path: Path, content: bytes, *, replace: bool, mode: int = 0o666) -> Iterator[Path]:
    """Write a file of the user's under a hidden name beside its place, and give it its name when the block has ended.

    Then all of it is there, or nothing; yields where it is until then. Hidden, and of no picture's name, so that nobody
    who watches the folder takes it for one.

    Parameters
    ----------
    replace : whether what has that name by then is replaced
    mode : of the file, less what the user's umask takes away

    Raises
    ------
    FileExistsError
        If the name is taken, and `replace` is false.
    """
    part = path.with_name(f".{path.name[:200]}.{os.getpid()}.part")
    try:
        with named_after(path, part):
            fd = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, mode)
        try:
            write_all(fd, content)
            os.fsync(fd)
        finally:
            os.close(fd)
        yield part
        if replace:
            part.replace(path)
        else:
            rename_to_new(part, path)
        # A folder that may be written but not listed.
        with suppress(PermissionError):
            fsync_folder(path.parent)
    finally:
        part.unlink(missing_ok=True)


def require_place(path: Path, *, force: bool) -> None:
    """Raise `WrongUse` if a file that the user names is there and `force` is not given, or cannot be there."""
    if path.is_dir():
        raise WrongUse(f"{path} is a folder; name a file.")
    if not path.parent.is_dir():
        raise WrongUse(f"There is no folder {path.parent}.")
    if path.exists() and not path.is_file():
        # As root, a rename would take away /dev/null.
        raise WrongUse(f"{path} is a device, a pipe or a socket; name a file.")
    if os.path.lexists(path) and not force:
        raise WrongUse(f"{path} is there already; name another file, or replace it with --force.")


def rename_to_new(part: Path, path: Path) -> None:
    """Give a file another name, if nobody else has taken that; FileExistsError if so. It may keep its old one."""
    try:
        os.link(part, path)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        # No links here, as on FAT: an empty file of ours takes the name, so that the rename replaces nothing else.
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644))
        try:
            part.rename(path)
        except OSError:
            path.unlink()
            raise


def replace_durably(tmp: Path, final: Path, step: str = "file") -> None:
    """Give a finished temporary file its final name; afterwards either all of it is there, or none.

    `step` names the failpoints ``before_<step>_fsync``, ``before_<step>_rename``, ``after_<step>_rename``
    and ``after_<step>_durable``.
    """
    failpoint(f"before_{step}_fsync")
    fsync_file(tmp)
    failpoint(f"before_{step}_rename")
    tmp.rename(final)
    failpoint(f"after_{step}_rename")
    fsync_folder(final.parent)
    failpoint(f"after_{step}_durable")


def make_parents(folder: Path) -> None:
    """Make the folders above one that are missing; all are durable then, whoever has made them."""
    parent = folder.absolute().parent
    parent.mkdir(parents=True, exist_ok=True)
    for above in parent.parents:
        if above.stat().st_dev != parent.stat().st_dev:
            break
        with suppress(PermissionError):
            fsync_folder(above)


def make_folder(folder: Path) -> None:
    """Make a folder for nobody else's eyes, durably. One that exists keeps its mode."""
    try:
        folder.mkdir(mode=0o700)
    except FileExistsError:
        if not folder.is_dir():
            raise
        # Whoever made it may have died before this. The folder of an old state's root may be closed to us.
        with suppress(PermissionError):
            fsync_folder(folder.parent)
        return
    fsync_folder(folder.parent)


def set_aside(path: Path, folder: Path) -> Path:
    """Move a damaged file (or whatever is in its place) into a folder for evidence, durably; return where it is now."""
    make_folder(folder)
    stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ")
    for number in range(1, 1000):
        kept = folder / f"{path.name}-{stamp}{'' if number == 1 else f'-{number}'}"
        if not os.path.lexists(kept):
            break
    path.rename(kept)
    fsync_folder(folder)
    fsync_folder(path.parent)
    return kept
