"""Declared defects: what a user or another program's list says of a sensor, in one small file per sensor.

They are kept apart from what is found, so that nothing that makes the statistic anew, and no loss of the ledger,
takes them along. A file is JSON, replaced as a whole, and proves itself: its digest is of all else in it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blake3 import blake3

from hotpixd.store.durable import StateError, full_disk_as_state_full, make_folder, replace_durably, write_all

FORMAT = 1

_MARK = "hotpixd declared"


class DeclaredError(StateError):
    """A file of declared defects is damaged or cannot be read. The message names it, and says what to do."""


@dataclass(frozen=True, slots=True)
class DeclaredDefect:
    """A pixel that somebody says is defective. Who says the same of it has an entry of their own."""

    x: int
    """Column, 0-based, of the visible area."""

    y: int
    """Row, 0-based, from the top."""

    source: str
    """"mark", or the format and the name of the list, as "dcraw:.badpixels"."""

    declared_at: str
    """When that was, ISO 8601, UTC."""


class DeclaredLists:
    """The declared defects of all sensors of one state. One process writes them: the one that has its lock."""

    def __init__(self, folder: Path) -> None:
        """Take the folder of the files, which need not be there."""
        self.folder = folder
        self._known: dict[str, tuple[DeclaredDefect, ...]] = {}

    def of(self, sensor_id: str) -> tuple[DeclaredDefect, ...]:
        """Return the declared defects of a sensor, by position; of one pixel, who declared it first comes first.

        Raises
        ------
        DeclaredError
            If its file cannot be believed.
        """
        known = self._known.get(sensor_id)
        if known is None:
            path = self._path(sensor_id)
            known = read(path, sensor_id) if os.path.lexists(path) else ()
            self._known[sensor_id] = known
        return known

    def replace(self, sensor_id: str, defects: Iterable[DeclaredDefect]) -> None:
        """Write the declared defects of a sensor; when this returns, they survive a power cut.

        Raises
        ------
        StateFull
            If there is no room; then all is as it was.
        """
        ordered = tuple(sorted(defects, key=lambda defect: (defect.y, defect.x)))
        path = self._path(sensor_id)
        tmp = path.with_name(f"{path.name}.tmp")
        with full_disk_as_state_full(f"for the declared defects in {self.folder}"):
            make_folder(self.folder)
            try:
                fd = os.open(tmp, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600)
                try:
                    write_all(fd, _text(sensor_id, ordered))
                finally:
                    os.close(fd)
                replace_durably(tmp, path, step="declared")
            except BaseException:
                tmp.unlink(missing_ok=True)
                raise
        self._known[sensor_id] = ordered

    def problems(self) -> Iterator[str]:
        """Read all files anew, and yield a sentence for each that cannot be believed."""
        for path in files(self.folder):
            try:
                read(path, path.stem)
            except DeclaredError as error:
                yield str(error)

    def _path(self, sensor_id: str) -> Path:
        return self.folder / f"{sensor_id}.json"


def files(folder: Path) -> list[Path]:
    """Return the files of declared defects in a folder, which need not be there."""
    return sorted(folder.glob("*.json"))


def read(path: Path, sensor_id: str | None = None) -> tuple[DeclaredDefect, ...]:
    """Read a file of declared defects.

    Parameters
    ----------
    sensor_id : whose they must be. None: anyone's

    Raises
    ------
    DeclaredError
        If it is not whole, or another sensor's.
    """
    try:
        content = json.loads(path.read_bytes())
        version = content.pop(_MARK)
        if version != FORMAT:
            raise DeclaredError(
                f"The declared defects {path} are of format {version!r}. Use the hotpixd that wrote them."
            )
        if content.pop("digest") != _digest(content):
            raise ValueError("its digest does not match its content")
        if sensor_id is not None and content["sensor"] != sensor_id:
            raise ValueError(f"it is of the sensor {content['sensor']}")
        return tuple(DeclaredDefect(int(x), int(y), str(s), str(at)) for x, y, s, at in content["defects"])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        why = f"{error!r} is missing" if isinstance(error, KeyError) else str(error)
    except OSError as error:
        why = error.strerror or str(error)
    raise DeclaredError(
        f"The declared defects {path} cannot be believed: {why}. Nothing is written over them: move the file away, then"
        " import the lists again, or take it from a backup."
    )


def _text(sensor_id: str, defects: Iterable[DeclaredDefect]) -> bytes:
    content = {"sensor": sensor_id, "defects": [[d.x, d.y, d.source, d.declared_at] for d in defects]}
    return json.dumps({_MARK: FORMAT, "digest": _digest(content), **content}).encode() + b"\n"


def _digest(content: Mapping[str, Any]) -> str:
    return blake3(json.dumps(content, sort_keys=True).encode()).hexdigest()
