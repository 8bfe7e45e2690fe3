"""The parts of a screen: the list of sites, the map, what is known of the selected site, alerts, reasons, sources.

Each is drawn for the size it is given. Nothing that came from outside is taken
for markup: all of it goes through `Look.text`.
"""

from __future__ import annotations

import re
import textwrap
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import groupby
from typing import Any, Literal

from rich.align import Align
from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.text import Text

from hotpixd.views.choices import Defect, Live, View
from hotpixd.views.drawing import (
    STATES,
    STYLES,
    Look,
    Patch,
    Piece,
    bar,
    joined,
    magnifier,
    map_size,
    sensor_map,
    sparkline,
)
from hotpixd.views.text import excess_adu, excess_sigma, sensor_name
from hotpixd.words import many

Sensor = Mapping[str, Any]
"""A sensor with its counters, as the live state describes it."""


@dataclass(frozen=True, slots=True)
class Surroundings:
    """The answer to what is around a site."""

    sensor: str
    """Id of the sensor."""

    site: int
    """The site in its centre."""

    patch: Patch | None
    """Mean excess by row, in units of noise. None if there was no answer."""

    trouble: str | None = None
    """Why there was none, in a sentence."""


@dataclass(frozen=True, slots=True)
class Scene:
    """All that one screen shows."""

    live: Live
    """The live state, the last known if the daemon is gone. Empty if none was seen yet."""

    view: View
    """As settled."""

    defects: Sequence[Defect]
    """The list of the view."""

    look: Look
    """What the terminal can show."""

    where: str
    """Where the daemon is looked for."""

    owned: bool = False
    """Whether the daemon ends with the dashboard."""

    trouble: str | None = None
    """Why no daemon is attached, in a sentence. None while one is."""

    around: Surroundings | None = None
    """What is around a site; perhaps not the selected one."""

    @property
    def sensor(self) -> Sensor | None:
        """The sensor of the view. None if none is known, or nothing of it yet."""
        return self.live.get(f"sensor:{self.view.sensor}")

    @property
    def selected(self) -> Defect | None:
        """The selected site."""
        return self.defects[self.view.index] if self.defects else None


# The list.


@dataclass(frozen=True, slots=True)
class _Column:
    """A column of the list."""

    title: str

    width: int
    """Cells."""

    cell: Callable[[Defect], list[Piece]]
    """What stands in it, as wide as the column."""

    right: bool = True
    """Whether it is aligned to the right, as numbers are."""


_BAR = "certain"

_LEAST_LIST = 78
"""Cells of the list with its least columns."""


def _columns(width: int, look: Look) -> list[_Column]:
    def words(title: str, cells: int, of: Callable[[Defect], str], *, right: bool = False) -> _Column:
        return _Column(title, cells, lambda d: [(look.cell(of(d), cells, right=right), "")], right)

    def number(title: str, cells: int, key: str, form: str) -> _Column:
        return words(title, cells, lambda d: "" if d[key] is None else format(d[key], form), right=True)

    def style(defect: Defect) -> str:
        return STYLES[defect["state"]]

    # What the least list leaves over goes to what helps most, in this order.
    rest = width - _LEAST_LIST
    adu, rest = _granted(rest, 11)
    recent, rest = _granted(rest, 8)
    clock, rest = _granted(rest, 6)
    state, rest = _granted(rest, 10)
    more = min(max(rest, 0), 16)
    recent += 8 + more
    gauge = 7 + min(max(rest - more, 0), 9)
    moment = 10 + clock
    return [
        _Column("", 1, lambda d: [(look.marks[d["state"]], style(d))]),
        number("x", 5, "x", "d"),
        number("y", 5, "y", "d"),
        words("", 2, lambda d: look.text(d["colour"])),
        words("kind", 8, lambda d: look.text(d["kind"])),
        *([words("state", 9, lambda d: d["state"])] if state else []),
        _Column(_BAR, gauge, lambda d: bar(_certainty(d), gauge, look, style(d)), right=False),
        words("", 4, lambda d: f"{100 * _certainty(d):.0f}%", right=True),
        *([words("excess ADU", 10, lambda d: excess_adu(d["excess_adu"]), right=True)] if adu else []),
        words(f"+{look.sigma}", 7, lambda d: excess_sigma(d["excess_sigma"]), right=True),
        number("dark ADU/s", 10, "dark_current_adu_per_s", ".0f"),
        _Column("recent", recent, lambda d: [(sparkline(d["recent"], recent, look), style(d))], right=False),
        words("first seen", moment, lambda d: label(d["first_seen"])[:moment]),
    ]


def _certainty(defect: Defect) -> float:
    """Return the certainty as it is shown, 0 to 1: all of it is for what is stable, or was."""
    certainty = float(defect["certainty"])
    return min(certainty, 0.99) if defect["state"] == "candidate" else certainty


def _granted(rest: int, cells: int) -> tuple[int, int]:
    """Return the cells wanted, if there are as many, and what is left then."""
    return (cells, rest - cells) if rest >= cells else (0, rest)


def list_panel(scene: Scene, sensor: Sensor, width: int, height: int) -> Panel:
    """Return the list: the rows around the selected one, and how many sites there are of each state."""
    view, defects, look = scene.view, scene.defects, scene.look
    columns = _columns(width - 2, look)
    rows = height - 3
    # In the middle while there is something above and below, so that one sees what comes.
    top = min(max(view.index - rows // 2, 0), max(len(defects) - rows, 0))
    head = " ".join(look.cell(column.title, column.width, right=column.right) for column in columns)
    lines = [Text(f" {head}", "dim")]
    words = head.index(_BAR)
    for defect in defects[top : top + rows]:
        cells: list[Piece] = []
        for column in columns:
            cells.append((" ", ""))
            cells += column.cell(defect)
        line = joined(cells)
        if defect["site"] == view.site:
            line.pad_right(max(width - 2 - line.cell_len, 0))
            # Reversed, a bar would be a block: where there is no quiet background, only the words before it are.
            line.stylize("bold on grey30" if look.colours > 16 else "reverse", 0, None if look.colours > 16 else words)
        lines.append(line)
    if not defects:
        shown = "Nothing yet." if view.only == "all" else f"None is {view.only}; f shows others."
        lines.append(Text(f" {shown}", "dim"))
    counts = Text()
    for state in reversed(STATES):
        noun = "candidates" if state == "candidate" and sensor[state] != 1 else state
        counts.append(f"{look.marks[state]} {sensor[state]} {noun}  ", STYLES[state])
    counts.right_crop(2)
    place = f"{view.index + 1} of {len(defects)}, " if defects else ""
    subtitle = f"{place}by {view.order}, {view.only}"
    return panel(lines, width, look, counts, subtitle)


# The map, the magnifier, and what is known of the selected site.


def map_panel(scene: Scene, sensor: Sensor, width: int, height: int) -> RenderableType:
    """Return the map of the sensor, whose edges are those of the panel, in the middle of the given space."""
    look, size = scene.look, (sensor["width"], sensor["height"])
    cells = map_size(*size, width - 2, height - 2)
    title = f"{size[0]}{look.times}{size[1]}"
    framed = Panel(
        sensor_map(scene.defects, scene.selected, size, cells, look),
        box=look.edges,
        border_style="dim",
        padding=0,
        width=cells[0] + 2,
        height=cells[1] + 2,
        title=_titled(title) if len(title) + 4 <= cells[0] else None,
    )
    return Align.center(framed, vertical="middle", height=height)


def site_panel(scene: Scene, sensor: Sensor, width: int, height: int) -> Panel:
    """Return the selected site: its surroundings, magnified, and what is known of it."""
    look, defect = scene.look, scene.selected
    if defect is None:
        return panel([], width, look, "nothing selected")
    lines = height - 2
    picture, across = _magnified(scene, defect, min(2 * lines, width - 2 - _FACTS), lines)
    facts = _facts(defect, sensor, look, width - 2 - across - 2)
    merged = []
    for n in range(lines):
        line = picture[n] if n < len(picture) else Text()
        line.pad_right(max(across - line.cell_len, 0))
        if n < len(facts):
            line.append("  ")
            line.append_text(facts[n])
        merged.append(line)
    return panel(merged, width, look, Text(f"{defect['x']}, {defect['y']}", STYLES[defect["state"]]))


def _magnified(scene: Scene, defect: Defect, columns: int, lines: int) -> tuple[list[Text], int]:
    """Return the lines of the magnified patch and their width; a sentence instead while there is none."""
    around, look = scene.around, scene.look
    if around is None or (around.sensor, around.site) != (scene.view.sensor, defect["site"]):
        around = None
    if around is None or around.patch is None:
        words = "..." if around is None else around.trouble or "no answer"
        across = max(columns, 12)
        return [Text(line, "dim") for line in textwrap.wrap(look.text(words), across)[:lines]], across
    drawn = magnifier(around.patch, columns, lines, look).split("\n")
    return list(drawn), max(line.cell_len for line in drawn)


_FACTS = 40
"""Cells for what is known of a site, and the gap before it."""


def _facts(defect: Defect, sensor: Sensor, look: Look, width: int) -> list[Text]:
    """Return what is known of a site, the most telling first."""
    state, since = defect["state"], defect["stable_since"]
    first = Text.assemble((look.text(f"{defect['colour']} {defect['kind']}"), "bold"), ", ", (state, STYLES[state]))
    if since is not None:
        first.append(f" since {label(since)}")
    certain = f"certainty {100 * _certainty(defect):.0f}%"
    if defect["log_e"] is not None and sensor.get("threshold") is not None:
        certain += f", evidence {defect['log_e']:.1f} of {sensor['threshold']:.1f}"
    words = [certain, *textwrap.wrap(_not_stable_because(defect, sensor), width)]
    if defect["excess_adu"] is not None and defect["excess_sigma"] is not None:
        adu, sigma = excess_adu(defect["excess_adu"]), excess_sigma(defect["excess_sigma"])
        words.append(f"excess {adu} ADU, {sigma} {look.sigma}")
    if defect["dark_current_adu_per_s"] is not None:
        iso = "" if defect["dark_current_iso"] is None else f" at ISO {defect['dark_current_iso']:.0f}"
        words.append(f"dark current {defect['dark_current_adu_per_s']:.0f} ADU/s{iso}")
    elif defect["kind"] in _LEAKING:
        words.append("dark current not known yet")
    if defect["first_seen"] is not None:
        words.append(f"first seen {label(defect['first_seen'])}")
    last = []
    if defect["level_adu"] is not None:
        last.append(f"level {defect['level_adu']:.0f} ADU")
    if defect["share_on"] is not None:
        last.append(f"on in {100 * defect['share_on']:.0f}% of frames")
    if last:
        words.append(", ".join(last))
    if defect["frames_to_stable"] is not None:
        words.append(f"stable after {many(defect['frames_to_stable'], 'frame')}")
    return [first, *(Text(line) for line in words)]


_LEAKING = ("hot", "warm", "bright", "unstable")
"""Kinds that have a dark current, or may turn out to have one."""


def _not_stable_because(defect: Defect, sensor: Sensor) -> str:
    """Return why a candidate is not stable although there is evidence enough; nothing if there is not."""
    threshold, least = sensor.get("threshold"), sensor.get("min_frames")
    if defect["state"] != "candidate" or None in (defect["log_e"], threshold) or defect["log_e"] < threshold:
        return ""
    if least is None:
        return "enough evidence; more counted frames are needed"
    if sensor["frames_counted"] < least:
        return f"enough evidence; at least {least} counted frames are needed"
    return "enough evidence, but it is slight or may be of the scene"


# Alerts, reasons and sources.

_TOPIC_STYLES = {"stable": "red", "recovered": "green"}


_OF_A_SITE = re.compile(r"(.+): (\w+) .*?at \(\d+, \d+\).* (?:is a stable defect|has recovered)\.")
"""Text of an alert of a transition: the sensor's name, the kind of the defect."""


def alert_lines(live: Live, look: Look, sensor: Sensor | None = None) -> list[Text]:
    """Return the alerts, the newest first, each in one line, as long as it is.

    Those of a transition of many sites of a sensor within a minute are one line, so that others do not drown in them.
    Where a sensor is given, alerts of that one do without its name.
    """
    alerts = live.get("alerts") or ()
    shown = None if sensor is None else sensor_name(sensor)
    lines = []
    left = len(alerts)
    for (at, topic, name), group in groupby(reversed(alerts), key=_alike):
        same = list(group)
        left -= len(same)
        if name is None or len(same) == 1:
            texts = [alert["text"] if shown is None else alert["text"].removeprefix(f"{shown}: ") for alert in same]
            told = [f" {text}" for text in texts]
        else:
            # Who is told of the last alerts only, does not know how many of these came before.
            least = "at least " if not left and same[-1]["id"] > 1 else ""
            whose = "" if name == shown else f" of {name.rsplit(', ', 2)[0]}"
            told = [f": {least}{len(same)} defects{whose}: {_kinds(same)}"]
        style = _TOPIC_STYLES.get(topic, "yellow")
        lines += [Text.assemble((at, "dim"), " ", (look.text(topic), style), look.text(words)) for words in told]
    return lines


def _alike(alert: Mapping[str, Any]) -> tuple[str, str, str | None]:
    """Return (minute, topic, sensor's name), by which alerts are one line; no name if it is not of a transition."""
    of_a_site = _OF_A_SITE.fullmatch(alert["text"])
    return _local(alert["at"]), alert["topic"], None if of_a_site is None else of_a_site[1]


def _kinds(alerts: Iterable[Mapping[str, Any]]) -> str:
    """Return how many defects of each kind alerts are of, the most first."""
    found = Counter(match[2] for alert in alerts if (match := _OF_A_SITE.fullmatch(alert["text"])))
    return ", ".join(f"{count} {kind}" for kind, count in found.most_common())


def last_alert(scene: Scene, width: int) -> Text:
    """Return the last alert in one line that fits."""
    lines = alert_lines(scene.live, scene.look, scene.sensor)
    return scene.look.fit(Text(" ").append_text(lines[0]), width) if lines else Text(" no alert yet", "dim")


def alerts_panel(scene: Scene, width: int, height: int) -> Panel:
    """Return the last alerts, the newest first."""
    lines = alert_lines(scene.live, scene.look, scene.sensor)[: height - 2]
    return panel(lines or [Text("none yet", "dim")], width, scene.look, "alerts", pad=1)


def reasons_panel(scene: Scene, sensor: Sensor, width: int, height: int) -> Panel:
    """Return why frames are not counted, and the sources; these give way, as their trouble is told above as well."""
    reasons = reason_lines(sensor, scene.look)
    lines = reasons + source_lines(scene.live, scene.look)
    title = "frames not counted, sources" if reasons else "sources"
    return panel(lines[: height - 2], width, scene.look, title, pad=1)


def reason_lines(sensor: Sensor, look: Look) -> list[Text]:
    """Return why frames were not counted, the most frequent reason first."""
    counts = sorted(sensor["not_counted"].items(), key=lambda item: -item[1])
    return [Text(f"{many(count, 'frame')} not counted: {look.text(reason)}") for reason, count in counts]


_SOURCE_STYLES = {"watching": "green", "away": "dim", "trouble": "red", "starting": "yellow"}


def source_lines(live: Live, look: Look) -> list[Text]:
    """Return each source with how it does, in its own word for that."""
    lines = []
    for source in live.get("sources") or ():
        status = source["status"]
        word = look.text(source.get("condition") or status)
        line = Text.assemble(look.text(source["name"]), " ", (word, _SOURCE_STYLES.get(status, "")))
        counts = f"{many(source.get('files') or 0, 'file')}, {source.get('waiting') or 0} waiting"
        lines.append(line.append(f": {look.text(source.get('detail') or counts)}"))
    return lines


_SERIES_STYLES = {"preparing": "yellow", "shooting": "bold cyan", "waiting": "yellow"}
"""Stages of a series of darks that is not over."""


def series_lines(live: Live, look: Look) -> list[Text]:
    """Return a line of the series of darks that is being shot; none if there is none."""
    series = live.get("series")
    if series is None or series["stage"] not in _SERIES_STYLES:
        return []
    words = [f"{series['taken']} of {series['frames']} taken"]
    if series["stage"] != "shooting":
        # Space is short, and this is what is to be done something about.
        words.append(look.text(series["detail"]))
    else:
        if series["exposure_s"] is not None:
            words.append(f"{series['exposure_s']:g} s")
        if series["iso"] is not None:
            words.append(f"ISO {series['iso']:g}")
        if series["temps_c"]:
            words.append(f"{series['temps_c'][-1]:g} {look.celsius}")
        if series["left_s"] is not None:
            words.append(f"{_span(series['left_s'])} left")
    return [Text(f"darks: {', '.join(words)}", _SERIES_STYLES[series["stage"]])]


# Small things.


def panel(
    lines: Sequence[Text],
    width: int,
    look: Look,
    title: str | Text,
    subtitle: str = "",
    pad: Literal[0, 1] = 0,
) -> Panel:
    """Return lines in a box `width` cells wide, cut to fit."""
    inside = width - 2 - 2 * pad
    return Panel(
        Group(*(look.fit(line, inside) for line in lines)),
        box=look.edges,
        border_style="dim",
        padding=(0, pad),
        title=_titled(title),
        title_align="left",
        subtitle=_titled(subtitle),
        subtitle_align="right",
    )


def _titled(title: str | Text) -> Text | None:
    """Return a title that is not as dim as the border it stands in."""
    text = title if isinstance(title, Text) else Text(title)
    text.stylize("not dim")
    return text if text.plain.strip() else None


def ends(left: Text, right: Text, width: int, look: Look) -> Text:
    """Return a line of two ends; the left one gives way."""
    look.fit(left, width - right.cell_len - 1)
    left.pad_right(width - right.cell_len - left.cell_len)
    return left.append_text(right)


def label(moment: str | None) -> str:
    """Shorten a time of a shot. It is not converted: it is what the camera says, wherever it was."""
    return "" if moment is None else moment[:16].replace("T", " ")


def _local(moment: str) -> str:
    """Return a time of the daemon's clock as this terminal's clock shows it."""
    return datetime.fromisoformat(moment).astimezone().strftime("%m-%d %H:%M")


def _span(seconds: float) -> str:
    """Return a time as a clock counts it: 9:32, 1:02:03."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
