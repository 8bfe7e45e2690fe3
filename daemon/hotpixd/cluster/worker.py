"""What the machines of a cluster do: a chunk of shots in, exact sums and each frame's events out.

All of it depends on the files alone, never on other frames, so a chunk may be measured again, elsewhere or twice, and
comes out the same. The result stays on the worker that made it; what is small of it (`findings`) goes to whoever
follows the frames, the sums only after they were merged with those of other chunks. Decoded frames are kept for a while
on the worker's own disk, as the sites that will be looked at are known only when the frames are followed.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import socket
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cache, reduce
from pathlib import Path
from typing import Any

import numpy as np
import zstandard
from numpy.typing import NDArray

from hotpixd import __version__
from hotpixd.core import defects
from hotpixd.core.accumulator import COUNTS, Accumulator
from hotpixd.core.followed import Sums
from hotpixd.core.frame import Frame, Samples, SensorIdentity, ShotInfo, ShotKind
from hotpixd.intake.decode import DecodeError
from hotpixd.intake.decoders import Decoders
from hotpixd.store.spool import Spool, SpoolError

SiteSums = tuple[NDArray[np.uint64], NDArray[np.uint64]]
"""Sums and sums of squares at some sites."""

Group = tuple[SensorIdentity, int | None]
"""Frames whose sums may be added: of one sensor as its files describe it, and one bit depth."""

_READ_TRIES = 4
"""Attempts to read a file over a network, with pauses of 0.5, 1 and 2 s."""

_KEPT_BYTES = 16 << 30
"""Decoded frames kept on a worker's disk, at most, and never more than half of what is free there."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """A shot to be measured."""

    url: str
    """Absolute path, or URL of a file system that fsspec knows."""

    size: int | None = None
    """Bytes, as it was listed."""

    raw: int | None = None
    """Place of its raw file in the chunk."""

    raw_folded: bool = False
    """Its raw file is not in the chunk, as it is folded already."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """Shots that one worker measures and adds up."""

    number: int
    shots: tuple[Wanted, ...]
    kind: str | None
    """Light or dark, if the user says so."""

    luma: bool
    """What of JPEGs is folded: see `Monitor`."""

    only: frozenset[int] | None = None
    """Places of those to be folded, where that is known better elsewhere."""


@dataclass(frozen=True, slots=True)
class Seen:
    """A frame without its samples: all of it that does not depend on the frames before."""

    sensor: SensorIdentity
    kind: ShotKind
    info: ShotInfo
    black_level_adu: float | None
    white_level_adu: float | None
    lit: bool

    events: bytes
    """`Accumulator.pack`, compressed."""

    totals: NDArray[np.int64]
    phases: NDArray[np.int64]
    noise: NDArray[np.float64]
    """`defects.noise_of`."""

    def frame(self, samples: Samples) -> Frame:
        """Return the frame with these samples."""
        levels = self.black_level_adu, self.white_level_adu
        return Frame(self.sensor, samples, self.kind, self.info, *levels, self.lit)

    def planes(self) -> NDArray[np.uint8]:
        """Return the planes of its events."""
        packed = np.frombuffer(zstandard.decompress(self.events), np.uint8)
        return packed.reshape(len(COUNTS), self.sensor.layout.height, -1)


@dataclass(frozen=True, slots=True)
class Found:
    """What a worker made of one shot."""

    key: str | None = None
    """BLAKE3 of its content; None if it cannot be read."""

    size: int = 0

    failure: str | None = None
    """Why it cannot be read, in a sentence."""

    gone: bool = False
    """It is not there at all."""

    refusal: str | None = None
    """Why it is no picture to learn from."""

    seen: Seen | None = None
    """Its frame, which is in the sums."""


@dataclass(slots=True)
class Measured:
    """What became of a chunk. Stays where it was made."""

    found: tuple[Found, ...]
    sums: dict[Group, Sums]
    about: dict[str, Any] = field(default_factory=dict)
    """Where it was made, by which version, and how long that took."""

    def __sizeof__(self) -> int:
        """Return its size in memory, by which it is decided what is moved where."""
        return sum(s.__sizeof__() for s in self.sums.values()) + self.events_bytes

    @property
    def events_bytes(self) -> int:
        """Bytes of all frames' events."""
        return sum(len(f.seen.events) for f in self.found if f.seen is not None)


class InputChangedError(Exception):
    """A file is no longer what it was when it was measured."""


def measure(chunk: Chunk) -> Measured:
    """Read, decode and add up the shots of a chunk."""
    started = time.monotonic()
    found: list[Found] = []
    adding: dict[Group, tuple[Accumulator, list[str]]] = {}
    for place, (wanted, copy) in enumerate(_read_ahead(chunk.shots)):
        with copy:
            if copy.found.key is None or not _is_to_be_decoded(chunk, place, wanted, copy.found, found):
                found.append(copy.found)
                continue
            try:
                frame = _decoders(chunk.luma).decode(copy.path, None if chunk.kind is None else ShotKind(chunk.kind))
                changed = copy.changed()
                if changed is not None:
                    found.append(Found(failure=changed))
                    continue
            except DecodeError as error:
                found.append(replace(copy.found, refusal=str(error)))
                continue
        group = frame.sensor, frame.bits
        if group not in adding:
            adding[group] = Accumulator(frame.sensor.layout, frame.sensor.dtype), []
        sums, keys = adding[group]
        keys.append(copy.found.key)
        found.append(replace(copy.found, seen=_seen(frame, sums)))
        _kept().keep(name_of(copy.found.key, luma=chunk.luma), frame.samples)
    return Measured(
        tuple(found),
        {
            group: Sums((chunk.number,), tuple(sorted(keys)), sums.total, sums.squares)
            for group, (sums, keys) in adding.items()
        },
        {
            "version": __version__,
            "worker": _address(),
            "host": socket.gethostname(),
            "seconds": time.monotonic() - started,
        },
    )


def findings(measured: Measured) -> tuple[tuple[Found, ...], list[Group], Mapping[str, Any]]:
    """Return all of it but the sums."""
    return measured.found, list(measured.sums), measured.about


def merge(group: Group, *pieces: Measured | Sums) -> Sums:
    """Return the sums of one sensor over the frames of all."""
    sums = [_sums_of(piece, group) for piece in pieces]
    return reduce(Sums.merged, sums[1:], sums[0])


def at_sites(group: Group, sites: NDArray[np.int64], *pieces: Measured | Sums) -> SiteSums:
    """Return sums and sums of squares of one sensor at flat indices, over the frames of all."""
    total, squares = np.zeros(len(sites), np.uint64), np.zeros(len(sites), np.uint64)
    for piece in pieces:
        sums = _sums_of(piece, group)
        total += sums.total.ravel()[sites]
        squares += sums.squares.ravel()[sites]
    return total, squares


def _sums_of(piece: Measured | Sums, group: Group) -> Sums:
    return piece.sums[group] if isinstance(piece, Measured) else piece


# The same beside the tasks, at once: a worker that is busy with a chunk would let them wait for minutes.


def findings_there(key: str, dask_worker: Any) -> Any:
    """Return the `findings` of what a worker has under a key; None if it has not."""
    measured = dask_worker.data.get(key)
    return None if measured is None else findings(measured)


def at_sites_there(group: Group, sites: NDArray[np.int64], keys: list[str], dask_worker: Any) -> SiteSums | None:
    """Return `at_sites` of what a worker has under some keys; None if it has not."""
    pieces = [dask_worker.data.get(key) for key in keys]
    return None if any(piece is None for piece in pieces) else at_sites(group, sites, *pieces)


def glimpse_there(names: list[str], sites: NDArray[np.int64], dtype: str) -> NDArray[Any] | None:
    """Return what `glimpse` returns, of frames that are kept here under these names; None if one is not."""
    values = np.empty((len(names), len(sites)), dtype)
    for i, name in enumerate(names):
        samples = _kept().find(name)
        if samples is None:
            return None
        values[i] = samples.ravel()[sites]
    return values


def name_of(key: str, *, luma: bool) -> str:
    """Return under which name the frame of a shot is kept: two scans may want of one file what differs."""
    return f"{key} luma" if luma else key


def glimpse(
    shots: tuple[tuple[Wanted, str], ...], kind: str | None, sites: NDArray[np.int64], dtype: str, *, luma: bool
) -> NDArray[Any]:
    """Return the samples of frames at flat indices: (frames, K).

    Parameters
    ----------
    shots : with the key that each had when it was measured

    Raises
    ------
    InputChangedError
        If a file has to be read again, and has another content now.
    """
    values = np.empty((len(shots), len(sites)), dtype)
    for i, (wanted, key) in enumerate(shots):
        samples = _kept().find(name_of(key, luma=luma))
        if samples is None:
            samples = _decoded_again(wanted, key, kind, luma=luma)
        values[i] = samples.ravel()[sites]
    return values


def key_of(wanted: Wanted) -> tuple[str | None, int]:
    """Return key and size of a file that is not to be decoded."""
    with _copy(wanted) as copy:
        return copy.found.key, copy.found.size


def put_together(found: tuple[Found, ...], groups: list[Group], sums: list[Sums], about: dict[str, Any]) -> Measured:
    """Return what became of a chunk whose shots were measured one by one."""
    return Measured(found, dict(zip(groups, sums, strict=True)), about)


def forget(names: tuple[str, ...] | None = None) -> None:
    """Keep these frames, or any, no longer."""
    _kept().drop(names)


def leave_terminal(_: Any) -> None:
    """Leave the terminal's process group: Ctrl-C there is for the scan, which tells its workers when to end."""
    with suppress(OSError):
        os.setsid()


dask_setup = leave_terminal


def _is_to_be_decoded(chunk: Chunk, place: int, wanted: Wanted, copy: Found, before: list[Found]) -> bool:
    if chunk.only is not None:
        return place in chunk.only
    if any(other.key == copy.key for other in before) or wanted.raw_folded:
        return False
    raw = None if wanted.raw is None else before[wanted.raw]
    return raw is None or raw.gone or raw.refusal is not None


def _seen(frame: Frame, sums: Accumulator) -> Seen:
    events = sums.fold(frame.samples, lone=frame.lone)
    return Seen(
        frame.sensor,
        frame.kind,
        frame.info,
        frame.black_level_adu,
        frame.white_level_adu,
        frame.lit,
        zstandard.ZstdCompressor(level=1).compress(sums.pack(events).data),
        events.totals,
        events.phases,
        defects.noise_of(frame, frame.sensor.layout),
    )


def _decoded_again(wanted: Wanted, key: str, kind: str | None, *, luma: bool) -> Samples:
    with _copy(wanted) as copy:
        if copy.found.key == key:
            frame = _decoders(luma).decode(copy.path, None if kind is None else ShotKind(kind))
            if copy.changed() is None:
                _kept().keep(name_of(key, luma=luma), frame.samples)
                return frame.samples
    raise InputChangedError(f"{wanted.url} is no longer what it was a moment ago; scan it again when it is complete")


@cache
def _decoders(luma: bool) -> Decoders:
    return Decoders(luma=luma)


def _address() -> str | None:
    from distributed import get_worker

    with suppress(ValueError):
        return str(get_worker().address)
    return None


# --- files


@dataclass(slots=True)
class _Copy:
    """A file that was read, in a place where a decoder can open it."""

    path: Path
    found: Found
    status: tuple[int, ...] | None = None
    """Of a file that is decoded where it lies, to see that it stays as it was."""

    def __enter__(self) -> _Copy:
        return self

    def __exit__(self, *_: object) -> None:
        if self.status is None:
            self.path.unlink(missing_ok=True)

    def changed(self) -> str | None:
        """Say so if the file was written to since it was read."""
        if self.status is None or _status_of(self.path) == self.status:
            return None
        return f"{os.fspath(self.path)!r} was changed while it was read."


def _read_ahead(shots: tuple[Wanted, ...]) -> Iterator[tuple[Wanted, _Copy]]:
    """Read each file while the one before it is decoded."""
    with ThreadPoolExecutor(1, "read") as reader:
        coming = None if not shots else reader.submit(_copy, shots[0])
        for i, wanted in enumerate(shots):
            assert coming is not None
            copy = coming.result()
            coming = reader.submit(_copy, shots[i + 1]) if i + 1 < len(shots) else None
            yield wanted, copy


def _copy(wanted: Wanted) -> _Copy:
    return _fetched(wanted) if "://" in wanted.url else _local(Path(wanted.url))


def _local(path: Path) -> _Copy:
    before = _status_of(path)
    try:
        key = Spool.hash_file(path)
    except SpoolError as error:
        return _Copy(path, Found(failure=str(error), gone=isinstance(error.__cause__, FileNotFoundError)), ())
    return _Copy(path, Found(key, before[0] if before else 0), before)


def _status_of(path: Path) -> tuple[int, ...]:
    try:
        status = path.stat()
    except OSError:
        return ()
    return status.st_size, status.st_mtime_ns, status.st_ino


def _fetched(wanted: Wanted) -> _Copy:
    """Copy a file here over the network; tried again if that fails, or if not all of it came."""
    place = _kept().folder / f"input-{threading.get_ident()}-{hashlib.sha256(wanted.url.encode()).hexdigest()[:16]}"
    failure = Found()
    for attempt in range(_READ_TRIES):
        if attempt:
            time.sleep(0.25 * 2**attempt)
        try:
            _get(wanted, place)
            return _Copy(place, Found(Spool.hash_file(place), place.stat().st_size))
        except FileNotFoundError as error:
            failure = Found(failure=f"{wanted.url} cannot be read: {error}", gone=True)
            break
        except ImportError:
            # Not of this file: nothing of its kind can be read here.
            raise
        except Exception as error:
            # Every kind of file system has errors of its own.
            failure = Found(failure=f"{wanted.url} cannot be read: {type(error).__name__}: {error}")
    place.unlink(missing_ok=True)
    return _Copy(place, failure)


def _get(wanted: Wanted, place: Path) -> None:
    from fsspec.core import url_to_fs

    system, path = url_to_fs(wanted.url)
    system.get_file(path, os.fspath(place))
    size = wanted.size
    if place.stat().st_size != size:
        # Changed since it was listed, or cut short.
        system.invalidate_cache()
        size = system.info(path).get("size")
    if size is not None and place.stat().st_size != size:
        raise OSError(f"{place.stat().st_size} of its {size} bytes came")


# --- frames kept


class _Kept:
    """Decoded frames on the disk of this worker, by key."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._sizes: dict[str, int] = {}
        self._lock = threading.Lock()

    def keep(self, key: str, samples: Samples) -> None:
        """Keep a frame, if there is room: it can be decoded again."""
        with self._lock:
            room = min(_KEPT_BYTES, shutil.disk_usage(self.folder).free // 2 + sum(self._sizes.values()))
            if key in self._sizes or sum(self._sizes.values()) + samples.nbytes > room:
                return
            self._sizes[key] = samples.nbytes
        part = self.folder / f"{key}.part.npy"
        try:
            np.save(part, samples)
            part.rename(self._path(key))
        except OSError:
            part.unlink(missing_ok=True)
            self.drop((key,))

    def find(self, key: str) -> Samples | None:
        """Return a frame, mapped, if it is kept."""
        try:
            return np.asarray(np.load(self._path(key), mmap_mode="r"))
        except OSError:
            return None

    def drop(self, keys: tuple[str, ...] | None) -> None:
        """Let go of frames; of all if none are named."""
        with self._lock:
            for key in list(self._sizes) if keys is None else keys:
                self._sizes.pop(key, None)
                self._path(key).unlink(missing_ok=True)

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}.npy"


@cache
def _kept() -> _Kept:
    from distributed import get_worker

    below: str | None = None
    with suppress(ValueError):
        # Dask removes it with the worker.
        below = get_worker().local_directory
    return _Kept(Path(tempfile.mkdtemp(prefix="hotpixd-", dir=below)))
