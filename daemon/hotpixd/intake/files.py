"""Which files of some folders are shots, and in which order they were taken.

Nothing is opened: names decide what to look at, contents decide later what it
is. Raw and JPEG of one shot lie side by side under one stem; the raw comes
first, and the JPEG is named as its companion.
"""

from __future__ import annotations

import fnmatch
import functools
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from glob import glob
from pathlib import Path

from hotpixd.core.frame import ShotKind

RAW = frozenset(
    (
        ".3fr", ".ari", ".arw", ".bay", ".cap", ".cr2", ".cr3", ".crw", ".dcr", ".dcs", ".dng", ".eip", ".erf", ".fff",
        ".gpr", ".iiq", ".k25", ".kdc", ".mdc", ".mef", ".mos", ".mrw", ".nef", ".nrw", ".orf", ".ori", ".pef", ".ptx",
        ".pxn", ".r3d", ".raf", ".raw", ".rw2", ".rwl", ".rwz", ".sr2", ".srf", ".srw", ".x3f",
    )
)  # fmt: skip
"""Endings of camera raw files, as LibRaw knows them."""

RENDERED = frozenset((".jpg", ".jpeg", ".jpe"))
"""Endings of pictures that a camera writes beside its raw files."""

PICTURES = RAW | RENDERED | frozenset((".tif", ".tiff", ".png", ".fit", ".fits", ".fts"))
"""Endings of all files looked at in a folder."""


@dataclass(frozen=True, slots=True)
class FoundShot:
    """A file that may be a shot."""

    path: Path
    """Where it is."""

    raw: Path | None = None
    """The raw file of the same shot, if there is one: then this one is its companion."""

    kind: ShotKind | None = None
    """Light or dark, if the user says so."""

    camera: str | None = None
    """The user's name for the body: its serial number, if the file holds none."""

    source: str = ""
    """Where it comes from. Files of one source are read one after the other."""

    origin: str | None = None
    """Where it was before it came to `path`, for people: a camera's name and the path on its card."""

    raw_key: str | None = None
    """The key of the raw file's content, if it is known: the file itself may be gone."""

    below: Path | None = None
    """A folder in which it lies; on the way from there no symlink is followed. None: wherever the path leads."""

    was_read: Callable[[os.stat_result, str], None] | None = field(default=None, compare=False, repr=False)
    """To be called, in whatever thread, with the status of the very file that was read, and the key of its content."""


@dataclass(frozen=True, slots=True)
class Listing:
    """What some paths and patterns lead to."""

    shots: tuple[FoundShot, ...]
    """In the order of folders and natural order of names, each raw before its companion."""

    missing: tuple[str, ...]
    """Paths and patterns that lead to nothing."""

    unreadable: tuple[tuple[Path, str], ...]
    """Folders that could not be listed, with the system's reason."""


def find_shots(wanted: Iterable[str], kind: ShotKind | None = None, ignore: tuple[str, ...] = ()) -> Listing:
    """List the shots of files, folders (with all below them) and glob patterns.

    A file that is named is listed whatever its ending; in folders, endings decide. Hidden files and folders are left
    out: AppleDouble `._IMG_1.JPG` and `.Trashes` are no shots.

    Parameters
    ----------
    kind : light or dark, if the user says so
    ignore : see `is_ignored`; of a folder that is named its own name does not count, nor do those above. What is left
        out is not missing.
    """
    files: dict[Path, None] = {}
    missing: list[str] = []
    unreadable: list[tuple[Path, str]] = []
    for text in wanted:
        matches = [text] if os.path.lexists(text) else sorted(glob(text, recursive=True), key=natural)  # noqa: PTH207 - absolute and ~ patterns too
        named = _parts_named(text)
        found = False
        for match in matches:
            path = Path(match)
            if path.is_dir():
                pictures = _pictures_below(path, ignore, unreadable)
            elif path.is_file():
                pictures = iter((path,))
            else:
                continue
            found = True
            if not is_ignored(path.parts[named:], ignore):
                files.update(dict.fromkeys(pictures))
        if not found:
            missing.append(text)
    return Listing(tuple(_with_companions(list(files), kind)), tuple(missing), tuple(unreadable))


def is_picture(name: str) -> bool:
    """Tell whether a file of this name is looked at in a folder: neither AppleDouble nor hidden, nor half copied."""
    return not name.startswith(".") and os.path.splitext(name)[1].lower() in PICTURES  # noqa: PTH122


def check_pattern(pattern: str) -> None:
    """Raise ValueError if a pattern of what is to be ignored can fit no name. The message is the end of a sentence."""
    if not pattern or "/" in pattern:
        raise ValueError('must be a pattern for the name of a file or folder, without "/"')


def is_ignored(names: Iterable[str], ignore: tuple[str, ...]) -> bool:
    """Tell whether the name of a file, or of a folder that it lies in, fits a shell pattern, in whatever case."""
    return bool(ignore) and any(map(_one_of(ignore).match, names))


def stem_of(path: str) -> str:
    """Return what the files of one shot share: their folder, and their name without its ending, in lower case."""
    folder, slash, name = path.rpartition("/")
    return folder + slash + os.path.splitext(name)[0].lower()  # noqa: PTH122


def natural(name: str) -> tuple[tuple[int, str], ...]:
    """Sort key under which IMG_9 comes before IMG_10."""
    parts = re.split(r"(\d+)", name)
    return tuple((int(part), "") if part.isdigit() and part.isascii() else (-1, part) for part in parts)


@functools.lru_cache(maxsize=64)
def _one_of(patterns: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile("|".join(map(fnmatch.translate, patterns)), re.IGNORECASE)


def _parts_named(text: str) -> int:
    """Return how many parts of a path or glob name the folder that all it leads to lies in."""
    parts = Path(text).parts
    if os.path.lexists(text):
        return len(parts) - (not os.path.isdir(text))  # noqa: PTH112
    return next((i for i, part in enumerate(parts) if re.search(r"[*?[]", part)), len(parts))


def _pictures_below(folder: Path, ignore: tuple[str, ...], unreadable: list[tuple[Path, str]]) -> Iterator[Path]:
    # Not os.walk: it hides the errors of a card that was pulled.
    try:
        with os.scandir(folder) as entries:
            found = sorted(entries, key=lambda entry: natural(entry.name))
    except OSError as error:
        unreadable.append((folder, error.strerror or str(error)))
        return
    for entry in found:
        if entry.name.startswith(".") or is_ignored((entry.name,), ignore):
            continue
        if entry.is_dir(follow_symlinks=False):
            yield from _pictures_below(Path(entry.path), ignore, unreadable)
        elif is_picture(entry.name) and _is_file(entry):
            yield Path(entry.path)


def _is_file(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_file()
    except OSError:
        # A symlink to itself, or into a folder closed to us.
        return False


def _with_companions(files: list[Path], kind: ShotKind | None) -> Iterator[FoundShot]:
    by_name = {str(path): path for path in files}
    for name, raw in with_companions(list(by_name)):
        yield FoundShot(by_name[name], raw=None if raw is None else by_name[raw], kind=kind)


def with_companions(names: list[str]) -> Iterator[tuple[str, str | None]]:
    """Yield paths or URLs, each raw file before its companions, and with these the raw file's."""
    endings = {name: os.path.splitext(name)[1].lower() for name in names}  # noqa: PTH122 - URLs too
    raws = {stem_of(name): name for name in names if endings[name] in RAW}
    late: dict[str, list[str]] = {}
    early: set[str] = set()
    for name in names:
        raw = raws.get(stem_of(name)) if endings[name] in RENDERED else None
        if raw is not None:
            late.setdefault(raw, []).append(name)
            early.add(name)
    for name in names:
        if name in early:
            continue
        yield name, None
        for companion in late.get(name, ()):
            yield companion, name
