"""Declares defects, and takes that back: what `import`, `mark` and `unmark` ask of whoever has the state open."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from hotpixd import archive
from hotpixd.core.frame import SensorLayout
from hotpixd.store.declared import DeclaredDefect
from hotpixd.store.durable import StateError
from hotpixd.store.state import State
from hotpixd.views import answers

QUESTIONS = frozenset(("declare", "undeclare"))

POINTS_AT_A_TIME = 3_000
"""Pixels in one question: a line to the daemon has at most 64 KiB."""

MOST_DECLARED = 200_000
"""Pixels declared of one sensor, each counted once per source: more are no defects, but a mask upside down or the
wrong file."""

_LONGEST_SOURCE = 200


class DeclareError(StateError):
    """What is declared cannot be of the sensor; a sentence."""


class Declaring:
    """Answers the questions; of a list that comes in several, nothing is written before all of it is there."""

    def __init__(self, state: State) -> None:
        self._state = state
        self._upload: tuple[str, str] | None = None
        self._points: dict[tuple[int, int, str], None] = {}
        self._received = 0

    def answer(self, question: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """Answer `declare` or `undeclare`.

        Raises
        ------
        DeclareError
            If there is no such sensor, or a pixel is not on it.
        StateError
            If what is declared already cannot be believed, or there is no room.
        """
        id_ = str(arguments["sensor"])
        layout = self._layout(id_)
        if question == "declare":
            return self._declare(id_, layout, arguments)
        if question == "undeclare":
            return self._undeclare(id_, layout, arguments)
        raise KeyError(question)

    def _declare(self, id_: str, layout: SensorLayout, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """Take the pixels from number `offset` on, of `total`; the last of them have all declared."""
        upload = id_, str(arguments["upload"])
        offset, total = int(arguments["offset"]), int(arguments["total"])
        if total > MOST_DECLARED:
            raise DeclareError(f"At most {MOST_DECLARED} pixels are declared of a sensor, not {total}.")
        points, source = _points(arguments["points"], layout), str(arguments["source"])[:_LONGEST_SOURCE]
        if offset == 0:
            self._upload, self._points, self._received = upload, {}, 0
        if upload != self._upload or offset != self._received:
            raise DeclareError("Another list was imported meanwhile; import this one again.")
        self._points.update(dict.fromkeys((x, y, source) for x, y in points))
        self._received += len(points)
        if self._received < total:
            return {"received": self._received}
        wanted, self._upload, self._points = self._points, None, {}
        now = answers.now()
        before = self._state.declared.of(id_)
        # What was declared first stays: it says since when. What another source says stays when one is taken back.
        known = {(d.x, d.y, d.source) for d in before}
        new = [DeclaredDefect(x, y, source, now) for x, y, source in wanted if (x, y, source) not in known]
        if len(before) + len(new) > MOST_DECLARED:
            raise DeclareError(
                f"At most {MOST_DECLARED} pixels are declared of a sensor, by all lists together; {len(before)} are"
                " already."
            )
        if new:
            self._state.declared.replace(id_, [*before, *new])
        pixels, pixels_before = {(x, y) for x, y, _ in wanted}, {(d.x, d.y) for d in before}
        added = len(pixels - pixels_before)
        return {"received": self._received, "added": added, "known": len(pixels) - added}

    def _undeclare(self, id_: str, layout: SensorLayout, arguments: Mapping[str, Any]) -> dict[str, Any]:
        points = set(_points(arguments.get("points", []), layout))
        source = arguments.get("source")
        declared = self._state.declared.of(id_)
        gone = {d for d in declared if (d.x, d.y) in points or (source is not None and d.source == source)}
        left = [d for d in declared if d not in gone]
        if gone:
            self._state.declared.replace(id_, left)
        pixels, pixels_left = {(d.x, d.y) for d in gone}, {(d.x, d.y) for d in left}
        return {
            "removed": len(pixels - pixels_left),
            "kept": len(pixels & pixels_left),
            "sources": sorted({d.source for d in gone}),
        }

    def _layout(self, id_: str) -> SensorLayout:
        description = self._state.ledger.sensors().get(id_)
        if description is None:
            raise DeclareError(f"There is no sensor {id_!r} in this state.")
        return archive.identity_from(description).layout


def _points(flat: Iterable[Any], layout: SensorLayout) -> list[tuple[int, int]]:
    """Return x, y, x, y, ... as pixels of a sensor."""
    numbers = list(flat)
    if len(numbers) % 2 or not all(type(n) is int for n in numbers):
        raise ValueError("points are whole numbers x, y, x, y, ...")
    points = list(zip(numbers[::2], numbers[1::2], strict=True))
    for x, y in points:
        if not (0 <= x < layout.width and 0 <= y < layout.height):
            raise DeclareError(f"({x}, {y}) is outside of the sensor, which has {layout.width}x{layout.height} pixels.")
    return points
