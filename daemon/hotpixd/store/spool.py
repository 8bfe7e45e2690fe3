"""Custody of shots: their files under the name of their content, until a checkpoint covers them.

A shot's key is the BLAKE3 digest of its file, so the same file met twice is
one shot, and a file that changed on its way is noticed. Where the file system
is the same, custody is a clone (btrfs, XFS) or else a hard link: that costs no
space, and the user may delete the original. Elsewhere (a card, FAT) it is a
copy. Nothing is ever written beside the source, which may be a read-only card.

A hard link is the source's own file, so it changes if a program writes that
again in place, as many do with a "current picture". `overwritten` tells as soon
as the new content is held, and files of that path are copied from then on.

A shot comes in two steps. `hold` reads the source, once: the key of its content
is known then, and what cannot be linked is in a temporary file here. It may
wait for a dying card for ever, so it is called on a thread of its own. `keep`
gives the content its name, durably; it touches the state's disk only.

BLAKE3, not SHA-256: hashing is on the way of every shot, and a 40 MB file
takes 11 ms instead of 35. Read into a buffer, not mapped: mapped it would take
9 ms, but a file cut short while mapped kills the process with SIGBUS (both
measured on one core of a Xeon VM, file in the page cache).
"""

from __future__ import annotations

import errno
import fcntl
import itertools
import os
import re
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from blake3 import blake3

from hotpixd.store.durable import (
    failpoint,
    fsync_file,
    fsync_folder,
    full_disk_as_state_full,
    make_folder,
    open_for_reading,
    replace_durably,
    write_all,
)

# Where the time per byte is least: larger leaves the L2 cache, smaller pays for the calls.
_BLOCK = 256 * 1024

_KEY = re.compile(r"[0-9a-f]{64}")

# What link(2) says where a hard link is impossible, but a copy is not: another file system, a file system
# without links, a file of another owner (protected_hardlinks), too many links, a jail, no /proc.
_COPY_INSTEAD = frozenset(
    {
        errno.EXDEV,
        errno.EPERM,
        errno.EACCES,
        errno.ENOTSUP,
        errno.EOPNOTSUPP,
        errno.ENOSYS,
        errno.EMLINK,
        errno.ENOENT,
        errno.ELOOP,
        errno.EINVAL,
    }
)

FICLONE = 0x40049409
"""ioctl(2) that lets a new file share the blocks of another one until either is written to."""

_NO_CLONES = frozenset({errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOTTY, errno.ENOSYS})
"""What a file system says to it that knows no clones. Anything else is about this file."""


class SpoolError(Exception):
    """One shot's file cannot be taken or read. The state is unharmed, and other shots can go on."""

    gone = False
    """Whether there is no file of that name any more."""


@dataclass(slots=True)
class Held:
    """A file that was read, on its way into the spool."""

    key: str
    """BLAKE3 of its content, hex."""

    status: os.stat_result
    """Of the very file that was read, after that."""

    before: os.stat_result
    """The same before that: what was written to it since has another time."""

    path: str
    """Where it was found."""

    fd: int | None = None
    """Open still, if it is of the spool's own file system: most likely it can be linked."""

    copy: Path | None = None
    """A copy of it in the spool, under a name that is no key. One of the two there is, until it is kept or released."""


class Spool:
    """The folder of shots in custody, one file per shot, named by its key.

    Methods may be called from several threads, though not for the same key at the same time.
    """

    def __init__(self, folder: Path) -> None:
        """Open or make the folder; remove copies that an earlier process did not finish."""
        make_folder(folder)
        self.folder = folder
        for leftover in folder.glob("*.tmp"):
            with suppress(IsADirectoryError):
                leftover.unlink()
        self._device = folder.stat().st_dev
        self._copies = itertools.count()
        self._found = set(self.keys())
        self._links: dict[str, os.stat_result] = {}
        """The status of each file that was linked since this is open, from before it was read."""
        self._may_clone = True
        self.rewritten: set[str] = set()
        """Absolute paths whose files are known to be written again in place: these are not linked."""

    @staticmethod
    def hash_file(path: Path | str, below: Path | None = None, progress: Callable[[], object] = lambda: None) -> str:
        """Return the BLAKE3 digest of a file's content in hex, the shot's key. Releases the GIL.

        Parameters
        ----------
        below : see `open_for_reading`
        progress : called for each block that was read

        Raises
        ------
        SpoolError
            If the file cannot be read, or is no regular file.
        """
        digest, look_at = _hashing(progress)
        with _source(path, below) as fd:
            _each_block(fd, path, look_at)
        return digest.hexdigest()

    def path(self, key: str) -> Path:
        """Return where the shot of this key is, or would be."""
        if not _KEY.fullmatch(key):
            raise ValueError(f"a shot's key is 64 hex digits, got {key!r}")
        return self.folder / key

    def hold(self, path: Path | str, below: Path | None = None, progress: Callable[[], object] = lambda: None) -> Held:
        """Read a file once, and have its content ready to be kept. To be followed by `keep` or `release`.

        Nothing is durable yet, nor is anything here that `keys` would tell of: of a shot that turns out to be known
        nothing needs to reach the disk. May be called from any thread.

        Parameters
        ----------
        below : see `open_for_reading`
        progress : called for each block that was read

        Raises
        ------
        SpoolError
            If the file cannot be read, or is no regular file.
        StateFull
            If it has to be copied, and the copy does not fit.
        """
        digest, look_at = _hashing(progress)
        with _source(path, below) as fd:
            before = os.fstat(fd)
            if before.st_dev == self._device:
                _each_block(fd, path, look_at)
                return Held(digest.hexdigest(), os.fstat(fd), before, os.fspath(path), fd=os.dup(fd))
            with full_disk_as_state_full(f"to keep {os.fspath(path)!r} in {self.folder}"):
                copy = self._copy(fd, path, look_at)
            return Held(digest.hexdigest(), os.fstat(fd), before, os.fspath(path), copy=copy)

    def keep(self, held: Held, placed: Callable[[], object] = lambda: None) -> Path:
        """Take custody of what is held; when this returns, its bytes are on the disk.

        A linked file is not hashed again, unless it was touched since it was read. `placed` is called as soon as the
        file can be read in its place, which may be before it is durable.

        Raises
        ------
        SpoolError
            If the file no longer has this content.
        StateFull
            If there is no room for it.
        """
        try:
            final = self._place(held, placed)
        finally:
            self.release(held)
        failpoint("after_spool")
        return final

    def release(self, held: Held) -> None:
        """Let go of what is held, if that was not done yet; what was kept stays."""
        if held.fd is not None:
            os.close(held.fd)
            held.fd = None
        if held.copy is not None:
            # A disk that has failed keeps it; the next start removes it.
            with suppress(OSError):
                held.copy.unlink()
            held.copy = None

    def take(self, path: Path | str, key: str, placed: Callable[[], object] = lambda: None) -> Path:
        """Take custody of a file whose content has this key: `hold` and `keep` in one.

        Raises
        ------
        SpoolError
            If the file cannot be read, or no longer has this content.
        StateFull
            If there is no room for it.
        """
        self.path(key)
        held = self.hold(path)
        if held.key != key:
            self.release(held)
            raise SpoolError(f"{os.fspath(path)!r} is not what it was when its key was taken.")
        return self.keep(held, placed)

    def verify(self, key: str, progress: Callable[[], object] = lambda: None) -> bool:
        """Tell whether the shot is there with the content of its name.

        A linked original may have been edited in place since. What cannot be read, or is no file, is not there.
        """
        try:
            return self.hash_file(self.path(key), progress=progress) == key
        except SpoolError:
            return False

    def has(self, held: Held) -> bool:
        """Tell whether what is held is there already, whole."""
        return self._is(held.fd, self.path(held.key)) or self.verify(held.key)

    def is_as_kept(self, key: str) -> bool:
        """Tell whether a shot kept since this is open still has the content of its name.

        Its file is only read if it is a link, and was touched since.
        """
        linked = self._links.get(key)
        if linked is None:
            return True
        with suppress(OSError):
            if is_unchanged(linked, self.path(key).stat()):
                return True
        return self.verify(key)

    def overwritten(self, held: Held) -> list[str]:
        """Return the keys of other shots that are links to the very file that is held: it was overwritten in place.

        Files of its path are not linked any more then.
        """
        if held.fd is None:
            return []
        status = os.fstat(held.fd)
        if status.st_nlink < 2:
            return []
        with os.scandir(self.folder) as entries:
            linked = [entry.name for entry in entries if entry.inode() == status.st_ino]
        keys = [key for key in linked if key != held.key and _KEY.fullmatch(key)]
        if keys:
            self.rewritten.add(str(Path(held.path).absolute()))
        return keys

    def keys(self) -> Iterator[str]:
        """Go through the keys of all shots in custody, in no order."""
        for name in os.listdir(self.folder):  # noqa: PTH208 - names are all that is wanted
            if _KEY.fullmatch(name):
                yield name

    def untouched(self) -> set[str]:
        """Return the keys that were here when this process started and were not taken again since."""
        return set(self._found)

    def drop(self, keys: Iterable[str]) -> None:
        """Give up custody. Not fsynced: what comes back after a power cut is dropped once more."""
        for key in keys:
            # A folder in its place is none of ours.
            with suppress(IsADirectoryError):
                self.path(key).unlink(missing_ok=True)
            self._found.discard(key)
            self._links.pop(key, None)
            failpoint("after_spool_drop")

    def _place(self, held: Held, placed: Callable[[], object]) -> Path:
        final = self.path(held.key)
        self._found.discard(held.key)
        if os.path.lexists(final):
            if self._is(held.fd, final) or self.verify(held.key):
                if held.fd is not None:
                    self._links[held.key] = held.before
                placed()
                # Whoever put it here may have died before its own fsyncs.
                fsync_file(final)
                fsync_folder(self.folder)
                return final
            # Torn by a power cut before its row was written, or edited through another link.
            if final.is_dir():
                raise SpoolError(f"{final} is in the way of a shot: it is a folder. Move it away.")
            final.unlink()
        with full_disk_as_state_full(f"to keep {held.path!r} in {self.folder}"):
            if held.fd is not None:
                held.copy = self._clone(held.fd)
                if held.copy is None and self._link(held, final):
                    placed()
                    # Link and source are one file, of the state's own disk: EIO here ends the process.
                    os.fsync(held.fd)
                    failpoint("after_link")
                    fsync_folder(self.folder)
                    return final
                if held.copy is None:
                    # The same disk, but no link is to be had (a file of another owner, FAT), or to be trusted.
                    digest = blake3()
                    held.copy = self._copy(held.fd, held.path, digest.update)
                    is_it = digest.hexdigest() == held.key
                else:
                    is_it = is_unchanged(held.before, os.fstat(held.fd)) or self.hash_file(held.copy) == held.key
                if not is_it:
                    raise SpoolError(f"{held.path!r} is not what it was when its key was taken.")
            assert held.copy is not None
            replace_durably(held.copy, final, step="copy")
            held.copy = None
            placed()
        return final

    @staticmethod
    def _is(fd: int | None, path: Path) -> bool:
        try:
            return fd is not None and os.path.samestat(os.fstat(fd), path.stat())
        except OSError:  # a link to nothing
            return False

    def _link(self, held: Held, final: Path) -> bool:
        """Link what is held, and is of the spool's own file system; False if that cannot be, or it is better copied."""
        assert held.fd is not None
        if str(Path(held.path).absolute()) in self.rewritten or not _link(held.fd, final):
            return False
        self._links[held.key] = held.before
        if not self.is_as_kept(held.key):
            self.drop([held.key])
            raise SpoolError(f"{held.path!r} is not what it was when its key was taken.")
        return True

    def _clone(self, source: int) -> Path | None:
        """Clone an open file of the spool's own file system to a temporary one; None if that is impossible here."""
        if not self._may_clone:
            return None
        tmp = self._temporary()
        try:
            fd = os.open(tmp, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            try:
                fcntl.ioctl(fd, FICLONE, source)
            finally:
                os.close(fd)
        except OSError as error:
            self._may_clone = error.errno not in _NO_CLONES
            # Whatever it was, a link needs less: its own errors decide.
            with suppress(OSError):
                tmp.unlink()
            return None
        return tmp

    def _temporary(self) -> Path:
        return self.folder / f"{os.getpid()}-{next(self._copies)}.tmp"

    def _copy(self, source: int, path: Path | str, use: Callable[[memoryview], object]) -> Path:
        """Copy an open file to a temporary one, handing each block to `use` as well."""
        tmp = self._temporary()
        try:
            fd = os.open(tmp, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            try:

                def keep(block: memoryview) -> None:
                    use(block)
                    write_all(fd, block)

                _each_block(source, path, keep)
            finally:
                os.close(fd)
        except BaseException:
            tmp.unlink(missing_ok=True)
            raise
        return tmp


def is_unchanged(before: os.stat_result, now: os.stat_result) -> bool:
    """Tell whether two looks saw the same file, not written to in between."""
    return (before.st_dev, before.st_ino, before.st_size, before.st_mtime_ns) == (
        now.st_dev,
        now.st_ino,
        now.st_size,
        now.st_mtime_ns,
    )


def _hashing(progress: Callable[[], object]) -> tuple[blake3, Callable[[memoryview], None]]:
    """Return a digest, and what adds a block to it and tells of that."""
    digest = blake3()

    def look_at(block: memoryview) -> None:
        digest.update(block)
        progress()

    return digest, look_at


def _link(fd: int, final: Path) -> bool:
    """Link the very file that is open as `fd`; False if that is impossible here.

    Through /proc, so that neither a symlink nor a file put in its place meanwhile is taken for it. The
    descriptor of the folder makes os.link call linkat, as plain link(2) would link the symlink.
    """
    folder = os.open(final.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.link(f"/proc/self/fd/{fd}", final.name, dst_dir_fd=folder, follow_symlinks=True)
    except OSError as error:
        if error.errno in _COPY_INSTEAD:
            return False
        raise
    finally:
        os.close(folder)
    return True


@contextmanager
def _source(path: Path | str, below: Path | None = None) -> Iterator[int]:
    """Open a regular file for reading only; see `open_for_reading`."""
    try:
        fd = open_for_reading(path, below)
    except OSError as error:
        failure = SpoolError(f"{os.fspath(path)!r} cannot be opened: {error.strerror}.")
        failure.gone = isinstance(error, FileNotFoundError)
        raise failure from error
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise SpoolError(f"{os.fspath(path)!r} is not a regular file.")
        yield fd
    finally:
        with suppress(OSError):  # a card that was pulled
            os.close(fd)


def _each_block(fd: int, path: Path | str, use: Callable[[memoryview], object]) -> None:
    """Hand the content of an open file to `use`, block by block, from its start."""
    block = memoryview(bytearray(_BLOCK))
    at = 0
    while True:
        try:
            length = os.preadv(fd, [block], at)
        except OSError as error:
            raise SpoolError(f"{os.fspath(path)!r} cannot be read: {error.strerror}.") from error
        if not length:
            return
        use(block[:length])
        at += length
