"""A disk that logs: one file, to put a loop device on, of which every write and every flush is written down.

Run as a program: ``block_log.py MOUNTPOINT IMAGE LOG`` (FUSE; package fusepy) serves IMAGE as MOUNTPOINT/disk.
What the loop device flushes arrives as an fsync. The log holds a head for each: what, offset, length; then the data.
"""

from __future__ import annotations

import errno
import os
import stat
import struct
import sys
import threading
import time
from pathlib import Path
from typing import Any, NamedTuple

_HEAD = struct.Struct("<BQI")
_WRITE, _FLUSH = 0, 1


class Event(NamedTuple):
    """A write, or a flush, which has no data."""

    end: int
    """Length of the log with it."""

    offset: int
    data: bytes | None


def read_log(path: Path) -> list[Event]:
    """Return all that was logged."""
    log = path.read_bytes()
    events, at = [], 0
    while at < len(log):
        what, offset, length = _HEAD.unpack_from(log, at)
        begin = at + _HEAD.size
        at = begin + length
        events.append(Event(at, offset, None if what == _FLUSH else log[begin:at]))
    return events


class _Disk:
    """What fusepy calls."""

    use_ns = True

    def __init__(self, image: str, log: str) -> None:
        self._image = os.open(image, os.O_RDWR)
        self._size = os.fstat(self._image).st_size
        self._log = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o600)
        self._lock = threading.Lock()

    def __call__(self, name: str, *args: Any) -> Any:
        method = getattr(self, name, None)
        if method is None:
            raise OSError(errno.ENOSYS, name)
        return method(*args)

    def init(self, path: str) -> None:
        pass

    def destroy(self, path: str) -> None:
        pass

    def getattr(self, path: str, fh: int | None = None) -> dict[str, int]:
        now = time.time_ns()
        times = {"st_ctime": now, "st_mtime": now, "st_atime": now}
        if path == "/":
            return {"st_mode": stat.S_IFDIR | 0o755, "st_nlink": 2, **times}
        if path == "/disk":
            return {"st_mode": stat.S_IFREG | 0o600, "st_nlink": 1, "st_size": self._size, **times}
        raise OSError(errno.ENOENT, path)

    def readdir(self, path: str, fh: int) -> list[str]:
        return [".", "..", "disk"]

    def open(self, path: str, flags: int) -> int:
        return 1

    def read(self, path: str, size: int, offset: int, fh: int) -> bytes:
        return os.pread(self._image, size, offset)

    def write(self, path: str, data: bytes, offset: int, fh: int) -> int:
        with self._lock:
            os.pwrite(self._image, data, offset)
            os.write(self._log, _HEAD.pack(_WRITE, offset, len(data)) + data)
        return len(data)

    def flush(self, path: str, fh: int) -> int:
        return 0

    def fsync(self, path: str, datasync: int, fh: int) -> int:
        with self._lock:
            os.write(self._log, _HEAD.pack(_FLUSH, 0, 0))
        return 0


def main(mountpoint: str, image: str, log: str) -> None:
    from fuse import FUSE

    FUSE(
        _Disk(image, log),
        mountpoint,
        foreground=True,
        nothreads=False,
        big_writes=True,
        max_write=131072,
        encoding="utf-8",
        fsname="block_log",
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
