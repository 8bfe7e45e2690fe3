"""Small pictures made of characters: a bar, a sparkline, the map of a sensor, a magnified patch.

Each is drawn in the characters and colours that the terminal has, see `Look`.
A state is told by its mark as well as by its colour, for terminals (and
people) without colours.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby
from operator import itemgetter
from typing import Any

from rich import box
from rich.cells import cell_len, set_cell_size
from rich.color import Color
from rich.style import Style
from rich.text import Text

from hotpixd.views.text import printable

Patch = Sequence[Sequence[float | None]]
"""Mean excess around a site by row, in units of noise; None outside the sensor."""

Piece = tuple[str, str | Style]
"""Characters and their style."""

STATES = ("recovered", "candidate", "stable")
"""States of a site, in the order in which one hides the other where they share a cell."""

STYLES = {"stable": "bold red", "candidate": "yellow", "recovered": "green"}


@dataclass(frozen=True, slots=True)
class Look:
    """What a terminal can show."""

    unicode: bool
    """Texts may hold any character; else what is not ASCII is written as an escape."""

    edges: box.Box
    """Of panels."""

    marks: Mapping[str, str]
    """A character for each state."""

    here: str
    """The selected site."""

    bar: str
    """Three characters: full, half full, empty."""

    spark: str
    """From low to high."""

    dots: bool
    """Braille, eight dots to a cell."""

    pixel: str
    """How wide a pixel of a magnified patch is: "half" blocks show two rows in a line; "full" pixels are two cells."""

    colours: int
    """How many colours: 0, 16 or 256 and more."""

    sigma: str
    """Unit of an excess in noise."""

    celsius: str
    """Unit of temperature."""

    times: str
    """Between width and height."""

    more: str
    """Ends a text that was cut."""

    def text(self, words: object) -> str:
        """Return words that came from outside, on one line and in characters the terminal has."""
        line = printable(str(words))
        return line if self.unicode else line.encode("ascii", "backslashreplace").decode()

    def fit(self, line: Text, width: int) -> Text:
        """Cut a line to `width` cells, in place, and say so."""
        if line.cell_len > width:
            line.truncate(max(width - len(self.more), 0))
            line.append(self.more[:width])
        return line

    def cell(self, words: str, width: int, *, right: bool = False) -> str:
        """Return words as a cell of a table: cut or padded to `width`."""
        length = cell_len(words)
        if length > width:
            words = set_cell_size(words, max(width - len(self.more), 0)) + self.more[:width]
        elif right:
            words = " " * (width - length) + words
        return set_cell_size(words, width)


def unicode_look(colours: int) -> Look:
    """Return the look of a terminal with a full font."""
    return Look(
        unicode=True,
        edges=box.ROUNDED,
        marks={"stable": "●", "candidate": "○", "recovered": "·"},
        here="◆",
        bar="━╸─",
        spark="▁▂▃▄▅▆▇█",
        dots=True,
        pixel="half",
        colours=colours,
        sigma="\N{GREEK SMALL LETTER SIGMA}",
        celsius="°C",
        times="\N{MULTIPLICATION SIGN}",
        more="…",
    )


def console_look(colours: int) -> Look:
    """Return the look of the Linux console, whose font has little more than code page 437."""
    return Look(
        unicode=True,
        edges=box.SQUARE,
        marks={"stable": "■", "candidate": "o", "recovered": "·"},
        here="X",
        bar="═──",
        spark="_.-:=+*#",
        dots=False,
        pixel="half",
        colours=colours,
        sigma="\N{GREEK SMALL LETTER SIGMA}",
        celsius="°C",
        times="x",
        more="..",
    )


def ascii_look(colours: int) -> Look:
    """Return the look of a terminal that has only ASCII."""
    return Look(
        unicode=False,
        edges=box.ASCII,
        marks={"stable": "*", "candidate": "o", "recovered": "."},
        here="X",
        bar="==.",
        spark="_.-:=+*#",
        dots=False,
        pixel="full",
        colours=colours,
        sigma="sigma",
        celsius="C",
        times="x",
        more="..",
    )


def bar(share: float, width: int, look: Look, style: str) -> list[Piece]:
    """Return a bar of `width` cells, filled to a share of 0 to 1."""
    full, half, empty = tuple(look.bar)
    halves = round(min(max(share, 0.0), 1.0) * 2 * width)
    # Full only if it is: a bar of 99.9 % says that something is missing.
    if share < 1.0:
        halves = min(halves, 2 * width - (2 if half == full else 1))
    filled = full * (halves // 2) + half * (halves % 2)
    return [(filled, style), (empty * (width - len(filled)), "dim")]


def sparkline(values: Sequence[float | None], width: int, look: Look) -> str:
    """Return the last `width` values as levels, the newest last; the range spans zero and at least three units."""
    shown = values[-width:]
    known = [v for v in shown if v is not None]
    if not known:
        return " " * width
    low, high = min(0.0, *known), max(0.0, *known)
    # Noise alone must not look like mountains.
    span = max(high - low, 3.0)
    top = len(look.spark) - 1
    line = "".join(" " if v is None else look.spark[round((v - low) / span * top)] for v in shown)
    return line.ljust(width)


def map_size(width: int, height: int, columns: int, lines: int) -> tuple[int, int]:
    """Return (columns, lines) of the largest map of a sensor that fits; a cell is twice as high as wide."""
    scale = min(columns / width, 2 * lines / height)
    return max(1, min(columns, round(width * scale))), max(1, min(lines, round(height * scale / 2)))


def sensor_map(
    defects: Iterable[Mapping[str, Any]],
    selected: Mapping[str, Any] | None,
    size: tuple[int, int],
    cells: tuple[int, int],
    look: Look,
) -> Text:
    """Return the map of a sensor: where its defects are, and the selected one.

    Parameters
    ----------
    size : (width, height) of the sensor in pixels
    cells : (columns, lines) of the map
    """
    (width, height), (columns, lines) = size, cells
    wide, high = (2, 4) if look.dots else (1, 1)
    across, down = columns * wide, lines * high
    dots = [0] * (columns * lines)
    ranks = [-1] * (columns * lines)
    for defect in defects:
        u, v = defect["x"] * across // width, defect["y"] * down // height
        cell = v // high * columns + u // wide
        dots[cell] |= _BRAILLE[v % high][u % wide]
        rank = _RANKS[defect["state"]]
        if rank > ranks[cell]:
            ranks[cell] = rank
    here = -1
    if selected is not None:
        here = selected["y"] * lines // height * columns + selected["x"] * columns // width
    cells_drawn: list[Piece] = []
    style = ""
    for cell, rank in enumerate(ranks):
        if cell and cell % columns == 0:
            cells_drawn.append(("\n", style))
        if cell == here:
            cells_drawn.append((look.here, "bold reverse"))
        elif rank < 0:
            cells_drawn.append((" ", style))
        else:
            style = STYLES[STATES[rank]]
            cells_drawn.append((chr(0x2800 + dots[cell]) if look.dots else look.marks[STATES[rank]], style))
    return joined(cells_drawn)


_RANKS = {state: rank for rank, state in enumerate(STATES)}

# Bits of the dots of a Braille character, by row and column.
_BRAILLE = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))


def magnifier(patch: Patch, columns: int, lines: int, look: Look) -> Text:
    """Return a patch around its centre, as large as fits: at least eleven pixels across if there is room for them.

    The centre has full brightness, and brightness grows more slowly than the excess, so that a light neighbour shows
    beside a strong centre.
    """
    blocks = look.pixel == "half" and look.colours > 0
    across, down = (columns, 2 * lines) if blocks else (columns // 2, lines)
    reach = len(patch) // 2
    zoom = max(1, min(across, down) // min(_LEAST_ACROSS, 2 * reach + 1))
    shown = min(reach, (min(across, down) // zoom - 1) // 2)
    span = range(reach - shown, reach + shown + 1)
    scale = max(abs(patch[reach][reach] or 0.0), 1.0)
    grid = [[_tone(patch[y][x], scale) for x in span for _ in range(zoom)] for y in span for _ in range(zoom)]
    cells: list[Piece] = []
    if blocks:
        if len(grid) % 2:
            grid.append([None] * len(grid[0]))
        for upper, lower in zip(grid[::2], grid[1::2], strict=True):
            cells += [_two_pixels(above, below, look.colours) for above, below in zip(upper, lower, strict=True)]
            cells.append(("\n", ""))
    else:
        for row in grid:
            cells += [_pixel(tone, look.colours) for tone in row]
            cells.append(("\n", ""))
    return joined(cells[:-1])


def joined(cells: Iterable[Piece]) -> Text:
    """Return pieces as one text, in which those of one style are one piece: rich's time is per piece."""
    runs = groupby(cells, key=itemgetter(1))
    return Text.assemble(*(("".join(words for words, _ in run), style) for style, run in runs), no_wrap=True)


_LEAST_ACROSS = 11


def _tone(value: float | None, scale: float) -> float | None:
    """Return -1 to 1, rounded so that few styles are made."""
    if value is None:
        return None
    return round(math.copysign(min(abs(value) / scale, 1.0) ** (2 / 3), value), 1)


@lru_cache(2048)
def _two_pixels(above: float | None, below: float | None, colours: int) -> Piece:
    """Return a cell that shows two tones, one above the other."""
    if above is None:
        return (" ", Style.null()) if below is None else ("▄", Style(color=_colour(below, colours)))
    return "▀", Style(color=_colour(above, colours), bgcolor=_colour(below, colours))


def _pixel(tone: float | None, colours: int) -> Piece:
    """Return the two cells of a tone."""
    return ("  ", Style(bgcolor=_colour(tone, colours))) if colours else (_shade(tone) * 2, "")


# No white: in so few colours it would not tell the sign of the strongest.
_WARM_16 = ("black", "red", "red", "bright_red", "bright_red")
_COLD_16 = ("black", "blue", "blue", "bright_blue", "bright_blue")
_WARM = ((26, 26, 34), (92, 30, 62), (178, 50, 50), (238, 130, 48), (255, 240, 180))
_COLD = ((26, 26, 34), (28, 60, 120), (60, 130, 210), (170, 225, 255))


def _colour(tone: float | None, colours: int) -> Color | None:
    """Return the colour of a tone; None for None.

    From black over red above zero, over blue below; on to a pale tint of it where there are the colours for that.
    """
    if tone is None:
        return None
    if colours == 16:
        names = _WARM_16 if tone >= 0 else _COLD_16
        return Color.parse(names[round(abs(tone) * (len(names) - 1))])
    stops = _WARM if tone >= 0 else _COLD
    at = abs(tone) * (len(stops) - 1)
    below = min(int(at), len(stops) - 2)
    share = at - below
    mixed = (a + (b - a) * share for a, b in zip(stops[below], stops[below + 1], strict=True))
    return Color.from_rgb(*mixed)


def _shade(tone: float | None) -> str:
    """Return a character for a tone; dashes are below zero, a question mark is outside the sensor."""
    if tone is None:
        return "?"
    shades = " .:+*#@" if tone >= 0 else " -~=%&$"
    return shades[round(abs(tone) * (len(shades) - 1))]
