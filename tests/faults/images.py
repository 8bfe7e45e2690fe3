"""Crash images: what a logged disk may hold after a power cut.

A flush is a promise that all before it is on the disk. What was written since
may be there or not, each write on its own, and the last one torn between two
sectors. An image is each prefix of the log, and some such choices.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from blake3 import blake3
from block_log import Event, read_log

FileSystem = Literal["ext4", "btrfs", "xfs"]

_MAKE: dict[str, tuple[int, list[str]]] = {
    "ext4": (24, ["mkfs.ext4", "-q", "-F", "-J", "size=4", "-E", "lazy_itable_init=0,lazy_journal_init=0,nodiscard"]),
    "btrfs": (120, ["mkfs.btrfs", "-q", "-f", "-K", "-m", "single", "-d", "single"]),
    "xfs": (300, ["mkfs.xfs", "-q", "-f", "-K"]),
}
"""Size in MB, and the command that makes it."""

# A copy of an xfs has the identity of the one it was copied from, which may be mounted at the same time.
_OPTIONS = {"xfs": ["-o", "loop,nouuid"]}

_SECTOR = 512
_BLOCK = 4096


@dataclass(frozen=True)
class Image:
    """A crash image: the first writes of the log as they were, and some of those after."""

    end: int
    """Length of the log at the last moment when this may be what is left: just before the next flush."""

    whole: int
    """How many events are there as logged."""

    rest: tuple[int, ...] = ()
    """Events after these that are there too."""

    torn: int | None = None
    """Bytes that are there of the last of all. None: it is whole."""


class LoggedDisk:
    """A file system on a disk that logs, mounted while this lasts.

    Parameters
    ----------
    folder : for its files; in memory, as it is copied often
    """

    def __init__(self, system: FileSystem, folder: Path) -> None:
        self.system = system
        self.base = folder / "base.img"
        self.log = folder / "log"
        self.mount = folder / "disk"
        self._image = folder / "now.img"
        self._served = folder / "served"

    def make(self) -> None:
        """Make the file system, and mount it once without a log: the first mount writes much that is of no interest."""
        size, command = _MAKE[self.system]
        for folder in (self.mount, self._served):
            folder.mkdir()
        with self.base.open("wb") as base:
            base.truncate(size << 20)
        _run(*command, str(self.base))

    @contextlib.contextmanager
    def unlogged(self) -> Iterator[Path]:
        """Mount it for what is to be there before the log begins."""
        with mounted(self.base, self.mount, self.system):
            yield self.mount

    @contextlib.contextmanager
    def logged(self) -> Iterator[Path]:
        """Mount it with a log."""
        copy_sparse(self.base, self._image)
        program = Path(__file__).with_name("block_log.py")
        command = [sys.executable, str(program), str(self._served), str(self._image), str(self.log)]
        server = subprocess.Popen(command)
        try:
            wait_mounted(self._served, server)
            with mounted(self._served / "disk", self.mount, self.system):
                yield self.mount
        finally:
            subprocess.run(["fusermount", "-u", "-z", str(self._served)], capture_output=True)
            with contextlib.suppress(subprocess.TimeoutExpired):
                server.wait(10)
            server.kill()

    def events(self) -> list[Event]:
        """Return the log."""
        return read_log(self.log)


def wait_mounted(folder: Path, server: subprocess.Popen[bytes], within_s: float = 20.0) -> None:
    """Wait until a FUSE program serves a folder."""
    until = time.monotonic() + within_s
    while not os.path.ismount(folder):
        if server.poll() is not None or time.monotonic() > until:
            raise RuntimeError(f"{folder} cannot be mounted by FUSE")
        time.sleep(0.02)


@contextlib.contextmanager
def mounted(image: Path, folder: Path, system: str) -> Iterator[None]:
    """Mount an image through a loop device.

    Raises
    ------
    RuntimeError
        If it cannot be mounted.
    """
    _run("mount", "-t", system, *_OPTIONS.get(system, ["-o", "loop"]), str(image), str(folder))
    try:
        yield
    finally:
        for patience_s in (0.02, 0.1, 0.5, 2.0, None):
            done = subprocess.run(["umount", str(folder)], capture_output=True, text=True)
            if done.returncode == 0:
                break
            if patience_s is None:
                subprocess.run(["umount", "-l", str(folder)], check=True)
                raise RuntimeError(f"{folder} is busy: {done.stderr}")
            time.sleep(patience_s)


def choices(events: Sequence[Event], per_epoch: int, chance: random.Random) -> Iterator[Image]:
    """Go through every prefix, and for each stretch between two flushes through some choices of its writes."""
    flushed = 0
    for number in [*(n for n, event in enumerate(events) if event.data is None), len(events)]:
        end = events[number - 1].end if number else 0
        for whole in range(flushed, number + 1):
            yield Image(end, whole)
        # One write is there or not: both are prefixes.
        turns = per_epoch if number > flushed else 0
        for _ in range(turns):
            yield _reordered(events, flushed, number, end, chance)
        flushed = number + 1


def only_flushed(events: Sequence[Event]) -> Iterator[Image]:
    """Go through what there is if nothing is there but what was flushed."""
    seen = 0
    for image in choices(events, 0, random.Random(0)):
        if image.end != seen:
            seen = image.end
            yield image


def _reordered(events: Sequence[Event], flushed: int, end: int, length: int, chance: random.Random) -> Image:
    share = chance.choice((0.2, 0.5, 0.8, 1.0))
    rest = tuple(n for n in range(flushed, end) if chance.random() < share) or (end - 1,)
    event = events[rest[-1]]
    last = len(event.data or b"")
    torn = chance.randrange(last // _SECTOR) * _SECTOR if last >= _SECTOR and chance.random() < 0.5 else None
    # ext4 has its superblock there, two sectors with one checksum: torn, it cannot be mounted, whatever is on it.
    return Image(length, flushed, rest, torn if event.offset >= _BLOCK else None)


class Builder:
    """Builds images one after the other, each from the one before."""

    def __init__(self, base: Path, folder: Path, events: Sequence[Event]) -> None:
        self._events = events
        self._path = folder / "building.img"
        copy_sparse(base, self._path)
        self._fd = os.open(self._path, os.O_RDWR)
        self._done = 0
        self._blocks: dict[int, bytes] = {}

    def build(self, image: Image, into: Path) -> bytes:
        """Write an image into a new file; return a digest of what is in it. Prefixes must come in their order."""
        while self._done < image.whole:
            event = self._events[self._done]
            if event.data is not None:
                self._put(event.offset, event.data)
            self._done += 1
        before: list[tuple[int, bytes]] = []
        for number in image.rest:
            event = self._events[number]
            data = event.data or b""
            if number == image.rest[-1] and image.torn is not None:
                data = data[: image.torn]
            before.append((event.offset, os.pread(self._fd, len(data), event.offset)))
            self._put(event.offset, data)
        digest = self._digest()
        copy_sparse(self._path, into)
        for offset, old in reversed(before):
            self._put(offset, old)
        return digest

    def _put(self, offset: int, data: bytes) -> None:
        if not data:
            return
        os.pwrite(self._fd, data, offset)
        for block in range(offset // _BLOCK, (offset + len(data) - 1) // _BLOCK + 1):
            self._blocks[block] = blake3(os.pread(self._fd, _BLOCK, block * _BLOCK)).digest(16)

    def _digest(self) -> bytes:
        digest = blake3()
        for block, content in sorted(self._blocks.items()):
            digest.update(block.to_bytes(8, "little") + content)
        return digest.digest()

    def close(self) -> None:
        """Remove what it builds on."""
        os.close(self._fd)
        self._path.unlink()


def copy_sparse(source: Path, target: Path) -> None:
    """Copy a file without its holes."""
    with source.open("rb") as have, target.open("wb") as made:
        size = os.fstat(have.fileno()).st_size
        made.truncate(size)
        at = 0
        while at < size:
            try:
                begin = os.lseek(have.fileno(), at, os.SEEK_DATA)
            except OSError:
                return
            at = os.lseek(have.fileno(), begin, os.SEEK_HOLE)
            os.lseek(made.fileno(), begin, os.SEEK_SET)
            os.lseek(have.fileno(), begin, os.SEEK_SET)
            shutil.copyfileobj(_Part(have.fileno(), at - begin), made)
            made.flush()


class _Part:
    """The next so many bytes of a file."""

    def __init__(self, fd: int, left: int) -> None:
        self._fd, self._left = fd, left

    def read(self, size: int) -> bytes:
        data = os.read(self._fd, min(size, self._left))
        self._left -= len(data)
        return data


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}: {done.stderr.strip()}")
