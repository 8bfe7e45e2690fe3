"""Which shots some paths and URLs lead to: files here, and on every file system that fsspec knows.

The order is that of `find_shots`, so a folder tells the same whether it lies here, in a bucket or behind a web server.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hotpixd.core.frame import ShotKind
from hotpixd.intake.files import FoundShot, Listing, find_shots, is_ignored, is_picture, natural, with_companions

_PACKAGES = {"s3": "s3fs", "s3a": "s3fs", "ssh": "sshfs", "sftp": "sshfs", "http": "aiohttp", "https": "aiohttp"}
"""What fsspec needs for the kinds of URLs that the extra `cluster` does not bring along, or does."""


class InputError(Exception):
    """Something named cannot be listed at all. The message is a sentence."""


@dataclass(frozen=True, slots=True)
class Mark:
    """By what a file is known again without reading it."""

    size: int | None

    digest: bytes | None
    """Of its URL, size and time or version. None if its file system tells neither: then it is read again."""


@dataclass(frozen=True, slots=True)
class Inputs:
    """What was found."""

    listing: Listing
    marks: Mapping[str, Mark] = field(default_factory=dict)
    """By URL or absolute path."""


def url_of(shot: FoundShot) -> str:
    """Return where a worker finds a shot."""
    return shot.origin or str(shot.path.absolute())


def find_inputs(wanted: Iterable[str], kind: ShotKind | None, ignore: tuple[str, ...] = ()) -> Inputs:
    """List the shots of files, folders and patterns: those here, then those behind URLs.

    Raises
    ------
    InputError
        If a kind of URL is unknown, lacks its package, or its server refuses.
    """
    here: list[str] = []
    missing: list[str] = []
    marks: dict[str, Mark] = {}
    for text in wanted:
        if "://" not in text or text.startswith("file://"):
            here.append(text.removeprefix("file://"))
        elif not _list(text, ignore, marks):
            missing.append(text)
    there = [
        FoundShot(Path(url), raw=None if raw is None else Path(raw), kind=kind, origin=url)
        for url, raw in with_companions(list(marks))
    ]
    listing = find_shots(here, kind, ignore)
    for shot in listing.shots:
        marks[url_of(shot)] = _mark_of_file(shot.path)
    shots = (*listing.shots, *there)
    return Inputs(Listing(shots, (*listing.missing, *missing), listing.unreadable), marks)


def _mark_of_file(path: Path) -> Mark:
    try:
        status = path.stat()
    except OSError:
        return Mark(None, None)
    return Mark(status.st_size, _digest(str(path.absolute()), status.st_size, status.st_mtime_ns))


def _list(url: str, ignore: tuple[str, ...], marks: dict[str, Mark]) -> bool:
    """Add the URLs of the pictures at or below a URL to `marks`; tell whether there are any, ignored ones too."""
    from fsspec.core import url_to_fs

    protocol = url.partition("://")[0]
    try:
        system, path = url_to_fs(url)
        if "*" in path or "?" in path:
            infos = system.glob(path, detail=True)
        else:
            # A file that is named is taken whatever its ending.
            infos = {} if url.endswith("/") else _file(system, path)
            infos = infos or system.find(path, detail=True)
    except FileNotFoundError:
        return False
    except ImportError as error:
        package = _PACKAGES.get(protocol, "the package that it names")
        raise InputError(f"{url} needs {package}: pip install {package} ({error})") from error
    except Exception as error:
        # Every kind of file system has errors of its own.
        raise InputError(f"{url} cannot be listed: {type(error).__name__}: {error}") from error
    names = [name for name, info in infos.items() if info.get("type") == "file" and _is_wanted(name, path, infos)]
    names.sort(key=lambda name: [natural(part) for part in name.split("/")])
    for name in names:
        if is_ignored(_parts_below(name, path), ignore):
            continue
        whole = name if "://" in name else system.unstrip_protocol(name)
        if protocol in ("ssh", "sftp") and "://" not in name:
            # The host is no part of the name there.
            whole = f"{protocol}://{url.partition('://')[2].partition('/')[0]}/{name.lstrip('/')}"
        marks[whole] = _mark_of(whole, infos[name])
    return bool(names)


def _file(system: Any, path: str) -> dict[str, Any]:
    """Return a path and what is known of it, if it is a file: a web server says so of pages, too."""
    try:
        info = system.info(path)
    except FileNotFoundError:
        return {}
    is_page = str(info.get("mimetype", "")).startswith("text/html")
    return {path: info} if info.get("type") == "file" and not is_page else {}


def _is_wanted(name: str, below: str, infos: Mapping[str, Any]) -> bool:
    if len(infos) == 1 and name == below:
        return True
    parts = _parts_below(name, below)
    return is_picture(parts[-1]) and not any(part.startswith(".") for part in parts)


def _parts_below(name: str, below: str) -> list[str]:
    if name == below:
        return [name.rpartition("/")[2]]
    return name.removeprefix(below.split("*")[0].rpartition("/")[0] if "*" in below else below).split("/")


def _mark_of(url: str, info: Mapping[str, Any]) -> Mark:
    size = info.get("size")
    version = info.get("ETag") or info.get("etag") or info.get("LastModified") or info.get("mtime")
    return Mark(size, None if size is None or version is None else _digest(url, size, version))


def _digest(*parts: object) -> bytes:
    return hashlib.blake2b(repr(parts).encode(), digest_size=32, person=b"hotpixd-cluster").digest()
