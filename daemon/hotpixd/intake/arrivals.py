"""Files on their way from a camera into the ledger: durable under a name that says what they are.

A camera's file is written to ``<token>.part``, synced, and renamed to a name
that holds all that is known of it: whose it is, where it was on the card, size
and time. After a crash the names alone tell what had arrived, so nothing is
fetched twice, and nothing is lost of a camera that kept it in its memory only.
"""

from __future__ import annotations

import os
import secrets
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote, unquote

from blake3 import blake3

from hotpixd.intake.files import RAW, RENDERED, natural, stem_of
from hotpixd.store.durable import full_disk_as_state_full, make_folder, replace_durably

_LONGEST_NAME = 250
"""Bytes of a name that every file system can hold."""

_ANY = "surrogatepass"
"""How names are encoded: those of a camera need not be text, and nothing it says may end the daemon."""

PART = ".part"

_BLOCK = 1 << 18


@dataclass(frozen=True, slots=True)
class CameraFile:
    """A file as a camera lists it."""

    camera: str
    """Serial number of the body, or what else tells it from others."""

    folder: str
    """Where it is on the card: /store_00010001/DCIM/100CANON."""

    name: str

    size: int
    """Bytes."""

    mtime: int
    """By the camera's clock, s. 0 if it does not say."""

    @property
    def path(self) -> str:
        """Folder and name."""
        return f"{self.folder.rstrip('/')}/{self.name}"

    @property
    def volatile(self) -> bool:
        """Whether it is in the camera's memory and nowhere else: libgphoto2 shows such files in the root."""
        return self.folder == "/"

    @property
    def digest(self) -> bytes:
        """16 bytes that tell it from other files, also of other cameras."""
        known = "\0".join((self.camera, self.path, str(self.size), str(self.mtime)))
        return blake3(known.encode(errors=_ANY)).digest(16)

    @property
    def stem(self) -> str:
        """What the files of one shot share."""
        return f"{self.camera}:{stem_of(self.path)}"

    @property
    def is_raw(self) -> bool:
        """Whether it is a raw file, by its name."""
        return _ending(self.name) in RAW

    @property
    def is_rendered(self) -> bool:
        """Whether it may be the picture beside a raw file, by its name."""
        return _ending(self.name) in RENDERED

    @property
    def order(self) -> tuple[object, ...]:
        """Sort key: folder by folder, in natural order of names, the raw file of a shot first."""
        folders = tuple(natural(part) for part in self.folder.split("/"))
        return folders, natural(self.name.rpartition(".")[0]), not self.is_raw, self.name


class Arrivals:
    """The folder of files that have arrived and are not in the ledger yet.

    Use from one thread; the worker only writes the files that `part` names.
    """

    def __init__(self, folder: Path) -> None:
        """Open or make the folder; remove what a killed worker left unfinished.

        Raises
        ------
        StateFull
            If there is no room to make it.
        """
        self.folder = folder
        with full_disk_as_state_full(f"for {folder}"):
            make_folder(folder)
        for unfinished in folder.glob(f"*{PART}"):
            unfinished.unlink(missing_ok=True)

    def part(self) -> Path:
        """Return where the next file is to be written."""
        return self.folder / f"{secrets.token_hex(8)}{PART}"

    def keep(self, part: Path, file: CameraFile) -> Path:
        """Give a finished file its name; when this returns, it survives a power cut.

        Raises
        ------
        OSError
            If it is not there, or the disk refuses.
        """
        # In a camera's memory all files may have one name, size and time: Sony's are capt0000.arw. Elsewhere only where
        # times are not told.
        nonce = secrets.token_hex(4) if file.volatile or not file.mtime else ""
        rest = (str(file.size), str(file.mtime), nonce)
        name = "|".join((_quoted(file.camera), _quoted(file.path), *rest))
        if len(name) > _LONGEST_NAME:
            name = _shortened(file, rest)
        final = self.folder / name
        replace_durably(part, final, step="arrival")
        return final

    def left(self) -> list[tuple[Path, CameraFile]]:
        """Return what arrived before this process and did not get into the ledger, in the order of shots.

        Where names are too long for a file system, camera and folder are not the ones on the card.
        """
        found = []
        for path in self.folder.iterdir():
            parts = [unquote(field, errors=_ANY) for field in path.name.split("|")]
            if len(parts) != 5 or not (parts[2].isdecimal() and parts[3].lstrip("-").isdecimal()):
                continue
            folder, _, name = parts[1].rpartition("/")
            found.append((path, CameraFile(parts[0], folder or "/", name, int(parts[2]), int(parts[3]))))
        return sorted(found, key=lambda pair: (pair[1].camera, pair[1].order))


def content_digest(path: Path) -> str:
    """Return the BLAKE3 of a file's content in hex: the key of its shot.

    Raises
    ------
    OSError
        If it cannot be read.
    """
    digest = blake3()
    with path.open("rb") as content:
        while block := content.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def _quoted(text: str) -> str:
    return quote(text, safe=" ", errors=_ANY)


def _shortened(file: CameraFile, rest: tuple[str, str, str]) -> str:
    """Return a name without room for all: a digest for camera and folder, and the end of the file's name."""
    place = "/" if file.volatile else "/-/"
    fields = file.digest.hex(), "", *rest
    room = _LONGEST_NAME - len("|".join(fields))
    end = file.name
    while len(_quoted(place + end)) > room:
        end = end[1:]
    return "|".join((fields[0], _quoted(place + end), *rest))


def _ending(name: str) -> str:
    return os.path.splitext(name)[1].lower()  # noqa: PTH122 - strings are ten times faster
