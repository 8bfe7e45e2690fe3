"""What of a directory survives a power cut, by the letter of POSIX.

Bytes are on the disk once their file was fsynced, and an entry of a folder once
that folder was. Whatever else a process sees may be there after the cut or not,
each on its own: a file that was never fsynced may come back empty or torn, an
entry may be missing, one that was removed may be back. That is stricter than
ext4, btrfs and xfs are, which put a folder on the disk with many other things.

SQLite writes from C, where nobody can look on. Its files are taken as they were
at its last commit with synchronous=FULL, as its documentation promises, and so
are their entries in the folder: it fsyncs the folder when it makes its log,
before the first commit returns. Of the other entries there it is not taken at
its word. Whether the promise holds is for tests with a real file system. Within
one file, blocks are not reordered.
"""

from __future__ import annotations

import os
import random
import stat
from collections import Counter
from contextlib import suppress
from pathlib import Path

DATABASE = ("ledger.sqlite", "ledger.sqlite-wal")

_Inode = tuple[int, int]

# What a test puts in their place is not meant for the disk itself.
_fsync, _link = os.fsync, os.link


class StrictDisk:
    """Knows what was fsynced since it was made. Put its `fsync` in the place of `os.fsync`."""

    def __init__(self) -> None:
        self._held: dict[_Inode, int] = {}
        """Descriptors: an inode that is open is not given to another file."""
        self._contents: dict[_Inode, bytes] = {}
        self._entries: dict[_Inode, dict[str, _Inode]] = {}
        self._database: dict[str, bytes] = {}
        self.lost: Counter[str] = Counter()
        """What power cuts have taken, by sort: a model in which nothing is ever lost proves nothing."""

    def close(self) -> None:
        """Let go of everything."""
        for fd in self._held.values():
            os.close(fd)
        self._held.clear()

    def fsync(self, fd: int) -> None:
        """Put a file or a folder on the disk."""
        _fsync(fd)
        status = os.fstat(fd)
        inode = self._hold(fd, status)
        if stat.S_ISDIR(status.st_mode):
            self._entries[inode] = _entries_of(fd)
        else:
            self._contents[inode] = _content_of(fd, status.st_size)

    def committed(self, root: Path) -> None:
        """Note that SQLite has committed durably: what its files hold, and that they are in their folder."""
        self._database = {name: (root / name).read_bytes() for name in DATABASE if (root / name).exists()}
        durable = self._entries.setdefault(self._hold_path(root), {})
        for name in self._database:
            if durable.get(name) != _inode_of(root / name):
                durable[name] = self._hold_path(root / name)

    def settle(self, folder: Path) -> None:
        """Put all of a folder on the disk, as an orderly shutdown of the machine does."""
        self._database.clear()
        for path in (folder.parent, folder, *folder.rglob("*")):
            fd = os.open(path, os.O_RDONLY)
            try:
                if path == folder.parent:
                    # Of the others in there nothing is known.
                    inode = self._hold(fd, os.fstat(fd))
                    self._entries.setdefault(inode, {})[folder.name] = _inode_of(folder)
                else:
                    self.fsync(fd)
            finally:
                os.close(fd)
        self.committed(folder)

    def kill(self, root: Path, target: Path) -> None:
        """Make `target` what a process finds after another one with `root` was killed: nothing is lost.

        What is on the disk of `root` is from then on of `target`.
        """
        target.mkdir()
        made = {_inode_of(root): _inode_of(target)}
        for path in sorted(root.rglob("*")):
            twin = target / path.relative_to(root)
            if path.is_dir():
                twin.mkdir()
            elif path.parent == root or path.suffix == ".tmp":
                # What the dead process may still write to, while its objects are cleared away.
                twin.write_bytes(path.read_bytes())
            else:
                _link(path, twin)
            made[_inode_of(path)] = _inode_of(twin)
        for path in (target, *(path for path in target.rglob("*") if path.is_dir())):
            self._hold_path(path)
        for inode in list(self._entries):
            moved = {name: made.get(entry, entry) for name, entry in self._entries[inode].items()}
            self._entries[made.get(inode, inode)] = moved
        for before, after in made.items():
            if before in self._contents:
                self._contents[after] = self._contents[before]
        above = self._entries.get(_inode_of(root.parent), {})
        if root.name in above:
            above[target.name] = _inode_of(target)

    def cut(self, root: Path, target: Path, chance: random.Random) -> None:
        """Make `target` what may be found after the power went: what was not put on the disk is gone, or is not."""
        if self._entries.get(_inode_of(root.parent), {}).get(root.name) != _inode_of(root) and chance.random() < 0.5:
            self.lost["state"] += 1
            return
        self._rebuild(root, target, chance)
        if (target / DATABASE[0]).exists():
            for name in DATABASE:
                (target / name).unlink(missing_ok=True)
                if name in self._database:
                    (target / name).write_bytes(self._database[name])

    def _rebuild(self, folder: Path, target: Path, chance: random.Random) -> None:
        target.mkdir()
        durable = self._entries.get(_inode_of(folder), {})
        seen = {path.name: _inode_of(path) for path in folder.iterdir()}
        for name in sorted(durable.keys() | seen.keys()):
            if name == DATABASE[1]:
                continue  # it comes with the database
            entry = seen.get(name)
            if durable.get(name) != entry and chance.random() < 0.5:
                self.lost["entry" if entry is not None else "removal"] += 1
                entry = durable.get(name)
            if entry is None:
                continue
            path = folder / name
            if entry == seen.get(name) and path.is_dir():
                self._rebuild(path, target / name, chance)
            else:
                self._put(entry, path if entry == seen.get(name) else None, target / name, chance)

    def _put(self, inode: _Inode, path: Path | None, target: Path, chance: random.Random) -> None:
        durable = self._contents.get(inode)
        if path is None:
            # It was removed: what it held is all that is known.
            target.write_bytes(durable or b"")
            return
        seen = path.read_bytes()
        if durable is not None and (durable == seen or path.stat().st_nlink > 1):
            # Linked and edited since: what the link holds is what the other one holds, too.
            _link(path, target)
            return
        self.lost["content"] += 1
        target.write_bytes(chance.choice([durable or b"", seen[: len(seen) // 2], seen]))

    def _hold(self, fd: int, status: os.stat_result) -> _Inode:
        inode = status.st_dev, status.st_ino
        if inode not in self._held:
            self._held[inode] = os.dup(fd)
        return inode

    def _hold_path(self, path: Path) -> _Inode:
        fd = os.open(path, os.O_RDONLY)
        try:
            return self._hold(fd, os.fstat(fd))
        finally:
            os.close(fd)


def _inode_of(path: Path) -> _Inode:
    status = path.stat(follow_symlinks=False)
    return status.st_dev, status.st_ino


def _entries_of(fd: int) -> dict[str, _Inode]:
    found = {}
    for name in os.listdir(fd):
        with suppress(FileNotFoundError):
            status = os.stat(name, dir_fd=fd, follow_symlinks=False)
            found[name] = status.st_dev, status.st_ino
    return found


def _content_of(fd: int, size: int) -> bytes:
    # The descriptor may be open for writing only.
    reader = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY)
    try:
        return os.pread(reader, size, 0)
    finally:
        os.close(reader)
