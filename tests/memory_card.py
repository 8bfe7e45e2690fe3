"""A memory card in memory, and what a virtual camera puts on it: files named as DCF has them.

DCF (CIPA DC-009): a shot is four characters and a number from 0001 to 9999, its files differ in the extension; after
9999 the numbers begin again in a new folder, 101CANON after 100CANON.
"""

from __future__ import annotations

import hashlib
import importlib
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count, groupby
from pathlib import Path, PurePosixPath
from typing import Any, Final

from ptp_wire import ObjectFormat, ObjectInfo

STORAGE: Final = 0x00010001
LAST_NUMBER: Final = 9999
FIRST_RAM_HANDLE: Final = 0xFFFF0001
"""Where Nikon keeps shots that are on no card."""

Files = Sequence[tuple[str, bytes]]
"""The files of one shot: their extensions and contents."""

Settings = Mapping[str, Any]
"""How a shot was taken: exposure_s, iso, and bulb_s, which is None unless it was a bulb exposure."""

CaptureSource = Callable[[int, Settings], Files]
"""Turns a shot's number, from 1, and its settings into its files."""

_FORMATS: Final = {
    ".JPG": ObjectFormat.JPEG,
    ".DNG": ObjectFormat.DNG,
    ".CR2": ObjectFormat.CANON_CR2,
}


class UsedUpError(Exception):
    """A capture source has no more shots."""


@dataclass(frozen=True, slots=True)
class CardFile:
    """A file on the card, as a test sees it."""

    folder: str
    """As libgphoto2 names it: /store_00010001/DCIM/100CANON."""

    name: str
    size: int
    sha256: str
    mtime_s: float
    """By the clock of the camera, in s since 1970."""

    @property
    def path(self) -> str:
        """Its folder and name."""
        return f"{self.folder}/{self.name}"


@dataclass(frozen=True, slots=True)
class StoredObject:
    """A file or folder on the card."""

    handle: int
    parent: int
    """Handle of its folder; 0 at the root of the card, and in the camera's RAM."""

    name: str
    object_format: int
    data: bytes
    mtime_s: float
    appeared_s: float
    """By the monotonic clock."""

    @property
    def is_folder(self) -> bool:
        """Whether it holds others."""
        return self.object_format == ObjectFormat.FOLDER

    @property
    def in_ram(self) -> bool:
        """Whether it is on no card."""
        return self.handle >= FIRST_RAM_HANDLE

    def info(self, size_bytes: int) -> ObjectInfo:
        """Return its PTP dataset. The size is what the camera claims."""
        captured = time.strftime("%Y%m%dT%H%M%S", time.localtime(self.mtime_s))
        return ObjectInfo(
            storage=0 if self.in_ram else STORAGE,
            object_format=self.object_format,
            size_bytes=size_bytes,
            parent=self.parent,
            association=int(self.is_folder),
            name=self.name,
            captured=captured,
            modified=captured,
        )


class Card:
    """The objects of a card, and of the camera's RAM, by handle."""

    def __init__(self, prefix: str, folder_suffix: str) -> None:
        """Make an empty card. The prefix of names has four characters, the suffix of folders five."""
        self.objects: dict[int, StoredObject] = {}
        self.next_number = 1
        self.folder_number = 100
        self._prefix = prefix
        self._folder_suffix = folder_suffix
        self._handles = count(1)
        self._ram_handles = count(FIRST_RAM_HANDLE)

    def begin_shot(self, *, names_repeat: bool) -> tuple[str, list[StoredObject]]:
        """Return the name of the next shot, without extension, and the folders made for it.

        If names repeat, the number is one more than the highest on the card, so that deleting brings names back.
        """
        if names_repeat:
            self.next_number = 1 + max(map(self._number_of, self.files()), default=0)
        if self.next_number > LAST_NUMBER:
            self.folder_number += 1
            self.next_number = 1
        stem = f"{self._prefix}{self.next_number:04d}"
        self.next_number += 1
        return stem, self._make_folders()

    def put(self, name: str, data: bytes, mtime_s: float | None = None, *, in_ram: bool = False) -> StoredObject:
        """Store a file in the current folder, or in the camera's RAM."""
        object_format = _FORMATS.get(PurePosixPath(name).suffix.upper(), ObjectFormat.TIFF_EP)
        parent = 0 if in_ram else self._folder().handle
        return self._add(parent, name, object_format, data, mtime_s, in_ram=in_ram)

    def remove(self, handle: int) -> None:
        """Remove an object and all below it."""
        for stored in [stored for stored in self.objects.values() if stored.parent == handle]:
            self.remove(stored.handle)
        del self.objects[handle]

    def clear_ram(self) -> None:
        """Forget what is on no card."""
        self.objects = {handle: stored for handle, stored in self.objects.items() if not stored.in_ram}

    def files(self) -> list[StoredObject]:
        """Return the files on the card, in the order in which they came."""
        return [stored for stored in self.objects.values() if not stored.is_folder and not stored.in_ram]

    def find(self, path: str) -> StoredObject:
        """Return the file at a path as libgphoto2 has it, or of a name: then the newest. KeyError if there is none."""
        for stored in reversed(self.files()):
            if path in (stored.name, f"{self.path(stored.parent)}/{stored.name}"):
                return stored
        raise KeyError(f"no file {path} on the card")

    def path(self, handle: int) -> str:
        """Return the path of a folder as libgphoto2 has it."""
        if handle == 0:
            return f"/store_{STORAGE:08x}"
        stored = self.objects[handle]
        return f"{self.path(stored.parent)}/{stored.name}"

    def seen(self, stored: StoredObject) -> CardFile:
        """Describe a file to a test."""
        folder = "RAM" if stored.in_ram else self.path(stored.parent)
        digest = hashlib.sha256(stored.data).hexdigest()
        return CardFile(folder, stored.name, len(stored.data), digest, stored.mtime_s)

    def used_bytes(self) -> int:
        """Return what the files take: whole clusters of 32 KiB."""
        return sum(-(-len(stored.data) // 32768) * 32768 for stored in self.files())

    def _number_of(self, stored: StoredObject) -> int:
        number = stored.name.removeprefix(self._prefix)[:4]
        return int(number) if number.isdigit() else 0

    def _folder(self) -> StoredObject:
        self._make_folders()
        name = f"{self.folder_number}{self._folder_suffix}"
        return next(stored for stored in self.objects.values() if stored.is_folder and stored.name == name)

    def _make_folders(self) -> list[StoredObject]:
        made = []
        parent = 0
        for name in ("DCIM", f"{self.folder_number}{self._folder_suffix}"):
            known = [stored for stored in self.objects.values() if (stored.parent, stored.name) == (parent, name)]
            if not known:
                known = [self._add(parent, name, ObjectFormat.FOLDER)]
                made += known
            parent = known[0].handle
        return made

    def _add(
        self,
        parent: int,
        name: str,
        object_format: int,
        data: bytes = b"",
        mtime_s: float | None = None,
        *,
        in_ram: bool = False,
    ) -> StoredObject:
        handle = next(self._ram_handles if in_ram else self._handles)
        taken_s = time.time() if mtime_s is None else mtime_s
        stored = StoredObject(handle, parent, name, object_format, data, taken_s, time.monotonic())
        self.objects[handle] = stored
        return stored


def random_files(sizes: Mapping[str, int], seed: int = 0) -> CaptureSource:
    """Return a source of random bytes: so many for each extension."""
    generator = random.Random(seed)

    def files(_shot: int, _settings: Settings) -> Files:
        return [(extension, generator.randbytes(size)) for extension, size in sizes.items()]

    return files


def folder_files(folder: Path) -> CaptureSource:
    """Return a source of the files of a folder, sorted; those of one stem are one shot. Its numbers do not matter."""
    paths = sorted(filter(Path.is_file, folder.iterdir()), key=lambda path: (path.stem, path.suffix))
    shots = iter([list(group) for _, group in groupby(paths, key=lambda path: path.stem)])

    def files(shot: int, _settings: Settings) -> Files:
        for group in shots:
            return [(path.suffix[1:].upper(), path.read_bytes()) for path in group]
        raise UsedUpError(f"{folder} has no shot {shot}")

    return files


def rendered_files(name: str) -> CaptureSource:
    """Return the source with a dotted name, "module:function"."""
    module, _, function = name.partition(":")
    source: CaptureSource = getattr(importlib.import_module(module), function)
    return source
