"""A map of defects, as other programs understand one: turns an answer of `defects` into the pixels to correct.

Several samples of one pixel (a rendered picture has three) are one entry here. Coordinates are those of all answers:
0-based, from the top left of the visible area, unrotated. What is added for another program's way of counting rows
is in `Rows`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

STATES = ("stable", "warm", "candidate", "recovered")
"""What may be in a map: stable are certain defects but for warm ones, which are certain and below 3 sigma."""

COLD = ("dead", "dim")
"""Kinds that lack signal; a stuck one may be either."""


class Rows(StrEnum):
    """How the files hold their rows for which the map is meant.

    A FITS file's first row is the lowest one of the picture, by the standard, unless its header says otherwise.
    Programs that do not ask count rows as the file has them.
    """

    PICTURE = "picture"
    """Camera raw, DNG, TIFF, PNG, JPEG: the first row is the top."""

    FITS = "fits"
    """FITS as the standard has it: the first row is the bottom."""

    FITS_TOP_DOWN = "fits-top-down"
    """FITS with ROWORDER = 'TOP-DOWN': the first row is the top."""

    def in_file(self, y: int, height: int) -> int:
        """Return the index, in the file, of the row `y` from the top; and back again."""
        return height - 1 - y if self is Rows.FITS else y

    def in_siril(self, y: int, height: int) -> int:
        """Return how Siril counts the row `y`, and back again: from the last row of FITS, whatever its header says."""
        return height - 1 - y if self is Rows.FITS_TOP_DOWN else y


@dataclass(frozen=True, slots=True)
class Pixel:
    """A pixel to be corrected."""

    x: int
    y: int

    cold: bool
    """Whether it lacks signal."""

    first_seen: str | None
    """When it was first under suspicion, or was declared."""

    found: tuple[Mapping[str, Any], ...]
    """Its entries in `defects`, one per sample; none if it is only declared."""

    declared: Mapping[str, Any] | None
    """Its entry in `declared`. None if it is only found."""

    @property
    def kind(self) -> str:
        """What is wrong with it, in a word: of its strongest sample, or "declared"."""
        return str(self._strongest["kind"]) if self.found else "declared"

    @property
    def state(self) -> str:
        """Its state, or "declared"."""
        return str(self._strongest["state"]) if self.found else "declared"

    @property
    def row(self) -> dict[str, Any]:
        """All that is known of it as one row of a table."""
        known: Mapping[str, Any] = self._strongest if self.found else {}
        declared = self.declared or {}
        return {
            "x": self.x,
            "y": self.y,
            "colour": "".join(str(entry["colour"]) for entry in self.found),
            "kind": self.kind,
            "state": self.state,
            **{key: known.get(key) for key in NUMBERS},
            "first_seen": known.get("first_seen"),
            "stable_since": known.get("stable_since"),
            "source": declared.get("source"),
            "declared_at": declared.get("declared_at"),
        }

    @property
    def _strongest(self) -> Mapping[str, Any]:
        return max(self.found, key=lambda entry: abs(entry["excess_sigma"] or 0.0))


NUMBERS = ("certainty", "excess_adu", "excess_sigma", "dark_current_adu_per_s")
"""Keys of a row that hold numbers, or nothing."""

COLUMNS = ("x", "y", "colour", "kind", "state", *NUMBERS, "first_seen", "stable_since", "source", "declared_at")
"""Keys of a row."""


@dataclass(frozen=True, slots=True)
class DefectMap:
    """The pixels of a sensor that are to be corrected."""

    sensor: Mapping[str, Any]
    """As answers describe it, without its defects."""

    pixels: tuple[Pixel, ...]
    """By position: row by row, from the top left."""

    made_at: str
    """ISO 8601, UTC."""

    rows: Rows = Rows.PICTURE
    """How the files hold their rows for which it is meant."""

    @property
    def width(self) -> int:
        """Pixels per row."""
        return int(self.sensor["width"])

    @property
    def height(self) -> int:
        """Rows."""
        return int(self.sensor["height"])


def defect_map(
    answer: Mapping[str, Any],
    made_at: str,
    *,
    states: Collection[str] = ("stable", "warm"),
    least_sigma: float = 0.0,
    declared: bool = True,
    rows: Rows = Rows.PICTURE,
) -> DefectMap:
    """Choose what of a sensor's defects is on its map.

    Parameters
    ----------
    answer : a sensor of the answer to `defects`
    states : of STATES
    least_sigma : excess or lack, in units of noise, below which what was found is left out
    declared : whether declared defects are on it, whatever was found there
    """
    found: dict[tuple[int, int], list[Mapping[str, Any]]] = {}
    for entry in answer["defects"]:
        state = "warm" if entry["state"] == "stable" and entry["kind"] == "warm" else entry["state"]
        if state in states and abs(entry["excess_sigma"] or 0.0) >= least_sigma:
            found.setdefault((entry["y"], entry["x"]), []).append(entry)
    said = {(entry["y"], entry["x"]): entry for entry in answer.get("declared", [])} if declared else {}
    pixels = []
    for y, x in sorted(found.keys() | said.keys()):
        entries, entry = tuple(found.get((y, x), ())), said.get((y, x))
        cold = bool(entries) and all(_is_cold(one) for one in entries)
        times = [t for t in (*(e["first_seen"] for e in entries), entry and entry["declared_at"]) if t]
        pixels.append(Pixel(x, y, cold, min(times, default=None), entries, entry))
    sensor = {key: value for key, value in answer.items() if key not in ("defects", "declared")}
    return DefectMap(sensor, tuple(pixels), made_at, rows)


def _is_cold(entry: Mapping[str, Any]) -> bool:
    return entry["kind"] in COLD or (entry["kind"] == "stuck" and (entry["excess_adu"] or 0.0) < 0.0)
