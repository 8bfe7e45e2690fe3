"""Custody of shots: their files under the name of their content, until a checkpoint covers them.

A shot's key is the BLAKE3 digest of its file, so the same file met twice is
one shot, and a file that changed on its way is noticed. Where the file system
is the same, custody is a hard link: it costs no space, and the user may delete
the original. Elsewhere (a card, FAT) it is a copy. Nothing is ever written
beside the source, which may be a read-only card.

BLAKE3, not SHA-256: hashing is on the way of every shot, and a 40 MB file
takes 11 ms instead of 35. Read into a buffer, not mapped: mapped it would take
9 ms, but a file cut short while mapped kills the process with SIGBUS (both
measured on one core of a Xeon VM, file in the page cache).
"""

from __future__ import annotations

import errno
import os
import re
import stat
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from blake3 import blake3

from hotpixd.store.durable import (
    failpoint,
    fsync_file,
    fsync_folder,
    full_disk_as_state_full,
    make_folder,
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


class SpoolError(Exception):
    """One shot's file cannot be taken or read. The state is unharmed, and other shots can go on."""


class Spool:
    """The folder of shots in custody, one file per shot, named by its key.

    Methods may be called from several threads, though not for the same key at the same time.
    """

    def __init__(self, folder: Path) -> None:
        """Open or make the folder; remove copies that an earlier process did not finish."""
        make_folder(folder)
        self.folder = folder
        for leftover in folder.glob("*.tmp"):
            leftover.unlink()
        self._found = set(self.keys())

    @staticmethod
    def hash_file(path: Path | str) -> str:
        """Return the BLAKE3 digest of a file's content in hex, the shot's key. Releases the GIL.

        Raises
        ------
        SpoolError
            If the file cannot be read, or is no regular file.
        """
        digest = blake3()
        with _source(path) as fd:
            _each_block(fd, path, digest.update)
        return digest.hexdigest()

    def path(self, key: str) -> Path:
        """Return where the shot of this key is, or would be."""
        if not _KEY.fullmatch(key):
            raise ValueError(f"a shot's key is 64 hex digits, got {key!r}")
        return self.folder / key

    def take(self, path: Path | str, key: str, placed: Callable[[], object] = lambda: None) -> Path:
        """Take custody of a file whose content has this key; when this returns, its bytes are on the disk.

        A linked file is not hashed again: `verify` does so before it is used. A copy is. `placed` is called as soon
        as the file can be read in its place, before it is durable.

        Raises
        ------
        SpoolError
            If the file cannot be read, or is copied and no longer has this content.
        StateFull
            If the copy does not fit.
        """
        final = self._place(path, key, placed)
        failpoint("after_spool")
        return final

    def verify(self, key: str) -> bool:
        """Tell whether the shot is there with the content of its name.

        A linked original may have been edited in place since.
        """
        path = self.path(key)
        return path.exists() and self.hash_file(path) == key

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
            self.path(key).unlink(missing_ok=True)
            self._found.discard(key)
            failpoint("after_spool_drop")

    def _place(self, path: Path | str, key: str, placed: Callable[[], object]) -> Path:
        final = self.path(key)
        self._found.discard(key)
        with _source(path) as fd:
            if final.exists():
                if os.path.samestat(os.fstat(fd), final.stat()) or self.verify(key):
                    placed()
                    # Whoever put it here may have died before its own fsyncs.
                    fsync_file(final)
                    fsync_folder(self.folder)
                    return final
                # Torn by a power cut before its row was written, or edited through another link.
                final.unlink()
            with full_disk_as_state_full(f"to keep {os.fspath(path)!r} in {self.folder}"):
                if _link(fd, final):
                    placed()
                    # Link and source are one file, of the state's own disk: EIO here ends the process.
                    os.fsync(fd)
                    failpoint("after_link")
                    fsync_folder(self.folder)
                else:
                    self._copy(fd, path, key)
                    placed()
        return final

    def _copy(self, source: int, path: Path | str, key: str) -> None:
        tmp = self.folder / f"{key}.{threading.get_ident()}.tmp"
        digest = blake3()
        try:
            fd = os.open(tmp, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            try:

                def keep(block: memoryview) -> None:
                    digest.update(block)
                    write_all(fd, block)

                _each_block(source, path, keep)
            finally:
                os.close(fd)
            if digest.hexdigest() != key:
                raise SpoolError(f"{os.fspath(path)!r} is not what it was when its key was taken.")
            replace_durably(tmp, self.folder / key, step="copy")
        except BaseException:
            tmp.unlink(missing_ok=True)
            raise


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
def _source(path: Path | str) -> Iterator[int]:
    """Open a regular file for reading only."""
    try:
        # O_NONBLOCK: a FIFO with a picture's name must not stop the daemon.
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY)
    except OSError as error:
        raise SpoolError(f"{os.fspath(path)!r} cannot be opened: {error.strerror}.") from error
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
