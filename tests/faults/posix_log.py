"""A file system in memory that logs what is done to it, and what POSIX leaves of it after a power cut.

Real file systems keep more than they promise: on ext4, btrfs and xfs the fsync
of a file brings the entries of its folders to the disk as well. Here nothing is
durable but what was asked for: the content of a file once it was fsynced, an
entry of a folder once that folder was. A rename is atomic; all else that was not
fsynced is there after the power cut or is not, each on its own.

Run as a program: ``posix_log.py MOUNTPOINT LOG`` (FUSE; package fusepy).
"""

from __future__ import annotations

import errno
import functools
import hashlib
import os
import pickle
import random
import stat
import struct
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

Survival = Literal["synced", "names", "zeros", "contents", "removals", "some"]
"""What survives of that which was not fsynced: nothing; the entries of folders; these, and the sizes of files; the
contents; only what removes entries; each thing by chance."""

SURVIVALS: tuple[Survival, ...] = ("synced", "names", "zeros", "contents", "removals", "some")

_HEAD = struct.Struct("<I")
_SECTOR = 512
_ROOT = 1


class Record(NamedTuple):
    """Something that was done."""

    end: int
    """Length of the log with it."""

    what: str
    """write, truncate, create, mkdir, enter, leave, move, fsync."""

    values: tuple[Any, ...]


def read_log(path: Path) -> list[Record]:
    """Return all that was logged."""
    data = path.read_bytes()
    records, at = [], 0
    while at < len(data):
        (length,) = _HEAD.unpack_from(data, at)
        at += _HEAD.size + length
        what, *values = pickle.loads(data[at - length : at])
        records.append(Record(at, what, tuple(values)))
    return records


# --- what is left


@dataclass
class _File:
    live: bytearray = field(default_factory=bytearray)
    durable: bytes = b""
    pending: list[tuple[int, bytes | None]] = field(default_factory=list)
    """Since the last fsync: what was written at which offset; None: cut or grown to that size."""

    @functools.cached_property
    def now(self) -> bytes:
        """The content as it is; kept until it changes."""
        return bytes(self.live)

    def changed(self, at: int, data: bytes | None) -> None:
        """Take down a change of `live`."""
        self.pending.append((at, data))
        self.__dict__.pop("now", None)


@dataclass
class _Folder:
    live: dict[str, int] = field(default_factory=dict)
    durable: dict[str, int] = field(default_factory=dict)
    pending: list[dict[str, int | None]] = field(default_factory=list)
    """Since the last fsync: entries set and (None) removed, each change at once or not at all."""


class Tree:
    """Files and folders, with what of them is durable."""

    def __init__(self) -> None:
        self._nodes: dict[int, _File | _Folder] = {_ROOT: _Folder()}

    def do(self, record: Record) -> None:
        """Take up what was done next."""
        getattr(self, f"_{record.what}")(*record.values)

    def _folder(self, node: int) -> _Folder:
        found = self._nodes[node]
        assert isinstance(found, _Folder)
        return found

    def _file(self, node: int) -> _File:
        found = self._nodes[node]
        assert isinstance(found, _File)
        return found

    def _write(self, node: int, at: int, data: bytes) -> None:
        file = self._file(node)
        _written(file.live, at, data)
        file.changed(at, data)

    def _truncate(self, node: int, size: int) -> None:
        file = self._file(node)
        _cut(file.live, size)
        file.changed(size, None)

    def _create(self, folder: int, name: str, node: int) -> None:
        self._nodes[node] = _File()
        self._enter(folder, name, node)

    def _mkdir(self, folder: int, name: str, node: int) -> None:
        self._nodes[node] = _Folder()
        self._enter(folder, name, node)

    def _enter(self, folder: int, name: str, node: int) -> None:
        self._change(folder, {name: node})

    def _leave(self, folder: int, name: str) -> None:
        self._change(folder, {name: None})

    def _move(self, folder: int, name: str, to_folder: int, to_name: str, node: int) -> None:
        if folder == to_folder:
            self._change(folder, {name: None, to_name: node})
        else:
            self._change(to_folder, {to_name: node})
            self._change(folder, {name: None})

    def _change(self, folder: int, change: dict[str, int | None]) -> None:
        changed = self._folder(folder)
        _apply(changed.live, change)
        changed.pending.append(change)

    def _fsync(self, node: int) -> None:
        synced = self._nodes[node]
        if isinstance(synced, _File):
            synced.durable = synced.now
        else:
            synced.durable = dict(synced.live)
        synced.pending.clear()

    def after_power_cut(self, survival: Survival, chance: random.Random) -> Remains:
        """Return what is left if the power goes now."""
        contents: dict[int, bytes] = {}
        folders: dict[str, None] = {}
        files: dict[str, int] = {}

        def go(node: int, path: str) -> None:
            folders[path] = None
            for name, below in self._left_of_folder(self._folder(node), survival, chance).items():
                if isinstance(self._nodes[below], _Folder):
                    go(below, f"{path}{name}/")
                else:
                    files[path + name] = below
                    if below not in contents:
                        contents[below] = _left_of_file(self._file(below), survival, chance)

        go(_ROOT, "")
        return Remains(tuple(folders), files, contents)

    @staticmethod
    def _left_of_folder(folder: _Folder, survival: Survival, chance: random.Random) -> dict[str, int]:
        if survival in ("names", "zeros"):
            return folder.live
        left = dict(folder.durable)
        for change in folder.pending:
            removes = all(node is None for node in change.values())
            if (survival == "removals" and removes) or (survival == "some" and chance.random() < 0.5):
                _apply(left, change)
        return left


@dataclass(frozen=True)
class Remains:
    """What a power cut has left."""

    folders: tuple[str, ...]
    """Paths below the root, with a slash at the end; the root itself is empty."""

    files: dict[str, int]
    """Files by path; those with the same number are links to one."""

    contents: dict[int, bytes]

    @functools.cached_property
    def digest(self) -> bytes:
        """The same for the same files and folders."""
        numbers = {node: number for number, node in enumerate(dict.fromkeys(sorted(self.files.values())))}
        digest = hashlib.blake2b(digest_size=16)
        digest.update(repr(sorted(self.folders)).encode())
        for path, node in sorted(self.files.items()):
            digest.update(repr((path, numbers[node])).encode(errors="surrogateescape"))
            digest.update(_digest(self.contents[node]))
        return digest.digest()

    def put_into(self, root: Path) -> None:
        """Make these files and folders."""
        for folder in self.folders:
            (root / folder).mkdir(mode=0o700, exist_ok=True)
        first: dict[int, Path] = {}
        for path, node in self.files.items():
            if node in first:
                (root / path).hardlink_to(first[node])
            else:
                (root / path).write_bytes(self.contents[node])
                first[node] = root / path


@functools.lru_cache(4096)
def _digest(content: bytes) -> bytes:
    return hashlib.blake2b(content).digest()


def _left_of_file(file: _File, survival: Survival, chance: random.Random) -> bytes:
    if not file.pending:
        return file.durable
    if survival == "contents":
        return file.now
    if survival == "zeros":
        left = bytearray(file.durable[: len(file.live)])
        _cut(left, len(file.live))
        return bytes(left)
    if survival != "some" or chance.random() < 0.3:
        return file.durable
    left = bytearray(file.durable)
    for at, data in file.pending:
        if chance.random() < 0.3:
            continue
        if data is None:
            _cut(left, at)
        else:
            # Torn: sectors are the least that is written at once.
            whole = chance.random() < 0.7
            _written(left, at, data if whole else data[: chance.randrange(len(data) + 1) // _SECTOR * _SECTOR])
    return bytes(left)


def _written(content: bytearray, at: int, data: bytes) -> None:
    if not data:
        return
    if len(content) < at:
        content.extend(bytes(at - len(content)))
    content[at : at + len(data)] = data


def _cut(content: bytearray, size: int) -> None:
    del content[size:]
    content.extend(bytes(size - len(content)))


def _apply(entries: dict[str, int], change: dict[str, int | None]) -> None:
    for name, node in change.items():
        if node is None:
            entries.pop(name, None)
        else:
            entries[name] = node


def power_cuts(records: list[Record], seed: int = 0) -> Iterator[tuple[int, Survival, Remains]]:
    """Go through all that may be left of it at every moment, each thing once: the last time, when most is promised.

    Yields
    ------
    Length of the log at that moment, what survived, and what is left.
    """
    last: dict[bytes, tuple[int, Survival]] = {}
    for end, survival, remains in _all_power_cuts(records, seed):
        if last.get(remains.digest, (0, ""))[0] < end:
            last[remains.digest] = end, survival
    wanted = set(last.values())
    for end, survival, remains in _all_power_cuts(records, seed):
        if (end, survival) in wanted:
            yield end, survival, remains


def _all_power_cuts(records: list[Record], seed: int) -> Iterator[tuple[int, Survival, Remains]]:
    tree = Tree()
    for record in records:
        tree.do(record)
        for survival in SURVIVALS:
            yield record.end, survival, tree.after_power_cut(survival, random.Random(f"{seed} {record.end}"))


# --- the file system


class _Node:
    def __init__(self, number: int, mode: int) -> None:
        self.number = number
        self.mode = mode
        self.links = 1
        self.content = bytearray()
        self.entries: dict[str, _Node] = {}
        self.mtime = time.time_ns()


class _FileSystem:
    """What fusepy calls. Paths begin with a slash; None is the path of a file that has none any more."""

    use_ns = True
    flag_nullpath_ok = 1

    def __init__(self, log: str) -> None:
        self._log = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o600)
        self._root = _Node(_ROOT, stat.S_IFDIR | 0o755)
        self._open: dict[int, _Node] = {}
        self._numbers = _ROOT
        self._handles = 0

    def __call__(self, name: str, *args: Any) -> Any:
        method = getattr(self, name, None)
        if method is None:
            raise OSError(errno.ENOSYS, name)
        return method(*args)

    def _note(self, what: str, *values: Any) -> None:
        data = pickle.dumps((what, *values))
        os.write(self._log, _HEAD.pack(len(data)) + data)

    def _find(self, path: str | None, fh: int | None = None) -> _Node:
        if fh in self._open:
            return self._open[fh]
        node = self._root
        for name in (path or "").split("/"):
            if name:
                if name not in node.entries:
                    raise OSError(errno.ENOENT, path)
                node = node.entries[name]
        return node

    def _place(self, path: str) -> tuple[_Node, str]:
        above, _, name = path.rpartition("/")
        return self._find(above), name

    def _handle(self, node: _Node) -> int:
        self._handles += 1
        self._open[self._handles] = node
        return self._handles

    def _make(self, path: str, mode: int, what: str) -> _Node:
        folder, name = self._place(path)
        self._numbers += 1
        folder.entries[name] = node = _Node(self._numbers, mode)
        self._note(what, folder.number, name, node.number)
        return node

    def init(self, path: str) -> None:
        pass

    def destroy(self, path: str) -> None:
        pass

    def getattr(self, path: str | None, fh: int | None = None) -> dict[str, int]:
        node = self._find(path, fh)
        return {
            "st_mode": node.mode,
            "st_nlink": node.links,
            "st_ino": node.number,
            "st_size": len(node.content),
            "st_blocks": -(-len(node.content) // 512),
            "st_mtime": node.mtime,
            "st_ctime": node.mtime,
            "st_atime": node.mtime,
        }

    def statfs(self, path: str) -> dict[str, int]:
        free = dict.fromkeys(("f_blocks", "f_bfree", "f_bavail", "f_files", "f_ffree", "f_favail"), 1 << 18)
        return {"f_bsize": 4096, "f_frsize": 4096, "f_namemax": 255, **free}

    def opendir(self, path: str) -> int:
        return self._handle(self._find(path))

    def releasedir(self, path: str | None, fh: int) -> int:
        self._open.pop(fh, None)
        return 0

    def readdir(self, path: str | None, fh: int) -> list[str]:
        return [".", "..", *self._find(path, fh).entries]

    def open(self, path: str, flags: int) -> int:
        return self._handle(self._find(path))

    def create(self, path: str, mode: int) -> int:
        return self._handle(self._make(path, stat.S_IFREG | mode, "create"))

    def release(self, path: str | None, fh: int) -> int:
        self._open.pop(fh, None)
        return 0

    def flush(self, path: str | None, fh: int) -> int:
        return 0

    def read(self, path: str | None, size: int, offset: int, fh: int) -> bytes:
        return bytes(self._find(path, fh).content[offset : offset + size])

    def write(self, path: str | None, data: bytes, offset: int, fh: int) -> int:
        node = self._find(path, fh)
        _written(node.content, offset, data)
        node.mtime = time.time_ns()
        self._note("write", node.number, offset, data)
        return len(data)

    def truncate(self, path: str | None, length: int, fh: int | None = None) -> int:
        node = self._find(path, fh)
        _cut(node.content, length)
        node.mtime = time.time_ns()
        self._note("truncate", node.number, length)
        return 0

    def fsync(self, path: str | None, datasync: int, fh: int) -> int:
        self._note("fsync", self._find(path, fh).number)
        return 0

    def fsyncdir(self, path: str | None, datasync: int, fh: int) -> int:
        self._note("fsync", self._find(path, fh).number)
        return 0

    def mkdir(self, path: str, mode: int) -> int:
        self._make(path, stat.S_IFDIR | mode, "mkdir")
        return 0

    def unlink(self, path: str) -> int:
        folder, name = self._place(path)
        folder.entries.pop(name).links -= 1
        self._note("leave", folder.number, name)
        return 0

    def rmdir(self, path: str) -> int:
        folder, name = self._place(path)
        if folder.entries[name].entries:
            raise OSError(errno.ENOTEMPTY, path)
        return self.unlink(path)

    def link(self, new: str, old: str) -> int:
        node = self._find(old)
        folder, name = self._place(new)
        folder.entries[name] = node
        node.links += 1
        self._note("enter", folder.number, name, node.number)
        return 0

    def rename(self, old: str, new: str) -> int:
        folder, name = self._place(old)
        to_folder, to_name = self._place(new)
        node = folder.entries.pop(name)
        if to_name in to_folder.entries:
            to_folder.entries[to_name].links -= 1
        to_folder.entries[to_name] = node
        self._note("move", folder.number, name, to_folder.number, to_name, node.number)
        return 0

    def chmod(self, path: str, mode: int) -> int:
        node = self._find(path)
        node.mode = stat.S_IFMT(node.mode) | stat.S_IMODE(mode)
        return 0

    def chown(self, path: str, uid: int, gid: int) -> int:
        return 0

    def utimens(self, path: str, times: tuple[int, int] | None = None) -> int:
        self._find(path).mtime = time.time_ns() if times is None else times[1]
        return 0


def main(mountpoint: str, log: str) -> None:
    from fuse import FUSE

    # hard_remove: an open file that is removed is not renamed. direct_io: the two names of a file have one content.
    FUSE(
        _FileSystem(log),
        mountpoint,
        foreground=True,
        nothreads=True,
        use_ino=True,
        hard_remove=True,
        direct_io=True,
        attr_timeout=0,
        entry_timeout=0,
        encoding="utf-8",
        fsname="posix_log",
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
