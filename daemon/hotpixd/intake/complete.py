"""Whether a file is finished: nobody has it open for writing, and its container reaches its end.

Both are asked without reading the picture: a lease tells of writers on this
machine, and a few hundred bytes at the head and the tail tell where a
container means to end. Neither is proof for every kind of file, so an answer
may be None: it cannot be said.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import signal
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from hotpixd.intake.metadata import TIFF_MAGICS, Directory, first_directory, read_directory

Read = Callable[[int, int], bytes]

_TAIL = 64 * 1024
"""Bytes at the end of a JPEG or PNG in which its end mark is looked for: phones append a few kB of their own."""

_MAX_PARTS = 64
"""Directories, boxes or segments looked at before nothing is said."""

_EXTENTS = ((273, 279), (324, 325), (513, 514))
"""TIFF tags of where samples lie and how long they are: strips, tiles, an embedded JPEG."""

_SUB_DIRECTORIES = 330


@dataclass(frozen=True, slots=True)
class Look:
    """What one look at a file said."""

    status: os.stat_result
    """Of the very file that was looked at."""

    written: bool | None
    """Whether somebody has it open for writing. None where the file system cannot say."""

    whole: bool | None
    """Whether its container reaches its end. None for kinds that do not say where that is."""


def look_at(path: Path | str, *, ask_for_writers: bool) -> Look:
    """Open a file for a moment and see whether it is finished. Nothing of it is changed.

    Parameters
    ----------
    ask_for_writers : False for network file systems: they know no writer on other machines, and some deny every lease

    Raises
    ------
    OSError
        If it is gone, cannot be read or is a symlink.
    """
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_NOFOLLOW)
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            return Look(status, None, None)
        written = _has_writers(fd) if ask_for_writers else None
        end = status.st_size

        def read(at: int, size: int) -> bytes:
            # Offsets come from the file, and may be anything.
            return os.pread(fd, size, at) if 0 <= at < end else b""

        return Look(status, written, _is_whole(read, end))
    finally:
        with contextlib.suppress(OSError):  # a card that was pulled
            os.close(fd)


def _has_writers(fd: int) -> bool | None:
    # Whoever opens the file for writing while the lease is held, a few microseconds, breaks it. The kernel then sends
    # SIGIO, which ends the process unless another signal is asked for: one that is ignored by default.
    try:
        fcntl.fcntl(fd, fcntl.F_SETSIG, signal.SIGURG)
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_RDLCK)
    except OSError as error:
        # EACCES: a file of another user. EINVAL: no leases here.
        return True if error.errno == errno.EAGAIN else None
    fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    return False


def _is_whole(read: Read, size: int) -> bool | None:
    head = read(0, 16)
    if not any(head):
        # Empty, or room made for a copy that is still to come.
        return False
    if head[:3] == b"\xff\xd8\xff":
        return _is_whole_jpeg(read, size)
    if head[:8] == b"\x89PNG\r\n\x1a\n":
        return b"IEND\xae\x42\x60\x82" in read(max(size - _TAIL, 0), _TAIL)
    if head[:4] in TIFF_MAGICS:
        return _is_whole_tiff(read, size)
    if head[4:12] == b"ftypcrx ":
        return _is_whole_cr3(read, size)
    return None


def _is_whole_jpeg(read: Read, size: int) -> bool:
    """Tell whether an end-of-image mark follows the start of the scan: within the header there may be a thumbnail's."""
    at = 2
    for _ in range(_MAX_PARTS):
        mark = read(at, 4)
        if len(mark) < 4 or mark[0] != 0xFF:
            return False
        if mark[1] == 0xDA:
            start = max(at, size - _TAIL)
            return b"\xff\xd9" in read(start, size - start)
        at += 1 if mark[1] == 0xFF else 2 + int.from_bytes(mark[2:], "big")
    return False


def _is_whole_tiff(read: Read, size: int) -> bool | None:
    """Tell whether all strips and tiles lie inside the file. None if the directories name none."""
    first = first_directory(read)
    if first is None:
        return False
    ends: list[float] = []
    for directory in _directories(first):
        if directory is None:
            return False
        for where, length in _EXTENTS:
            pairs = zip(directory.numbers(where), directory.numbers(length), strict=False)
            ends.append(max((start + count for start, count in pairs), default=0))
            if where in directory.entries and not directory.numbers(where):
                # The list itself lies beyond the end.
                return False
    end = max(ends)
    return end <= size if end else None


def _directories(first: Directory) -> Iterator[Directory | None]:
    """Yield the directories of a TIFF and those they point to; None for one that is not there."""
    todo: list[tuple[Directory, int]] = [(first, first.next_offset)]
    yield first
    for _ in range(_MAX_PARTS):
        if not todo:
            return
        parent, following = todo.pop()
        offsets = [int(offset) for offset in parent.numbers(_SUB_DIRECTORIES)]
        if following:
            offsets.append(following)
        for offset in offsets[:_MAX_PARTS]:
            found = read_directory(parent.read, parent.base, offset, parent.order)
            yield found
            if found is not None:
                todo.append((found, found.next_offset))


def _is_whole_cr3(read: Read, size: int) -> bool | None:
    at = 0
    for _ in range(_MAX_PARTS):
        head = read(at, 16)
        if len(head) < 8:
            return False
        length = int.from_bytes(head[:4], "big")
        if length == 1 and len(head) == 16:
            length = int.from_bytes(head[8:], "big")
        if length < 8:
            # Zero would mean "to the end", which no camera writes; it is what room not yet filled looks like.
            return False
        at += length
        if at >= size:
            return at == size
    return None
