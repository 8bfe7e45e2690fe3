"""One screen of the dashboard: turns the live state and the user's choices into something rich can draw.

Nothing is read or changed here. The layout depends on the size alone, so that
nothing jumps while numbers change; the parts are in `panels`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rich.align import Align
from rich.cells import cell_len
from rich.console import Group, RenderableType
from rich.layout import Layout
from rich.text import Text

from hotpixd.core.overview import STATIC_SCENE, STATIC_SCENE_ADVICE
from hotpixd.views.choices import Page
from hotpixd.views.drawing import STATES, STYLES, Look, map_size
from hotpixd.views.panels import (
    Scene,
    Sensor,
    alert_lines,
    alerts_panel,
    ends,
    label,
    last_alert,
    list_panel,
    map_panel,
    panel,
    reason_lines,
    reasons_panel,
    series_lines,
    site_panel,
    source_lines,
)
from hotpixd.views.text import agreement_words, sensor_name
from hotpixd.words import many

SMALLEST = (80, 24)
"""Columns and lines without which the parts would not fit."""

WIDE = (150, 36)
"""Columns and lines from which the map stands beside the list rather than below it."""


@dataclass(frozen=True, slots=True)
class Screenful:
    """A screen, and what keys that move by a page need to know of it."""

    picture: RenderableType

    rows: int
    """Rows of the list, or lines of the long page, that are visible."""

    scroll_limit: int
    """Lines by which a long page is longer than the screen."""


def compose(scene: Scene, width: int, height: int) -> Screenful:
    """Return the screen for a terminal of this size, in characters."""
    if width < SMALLEST[0] or height < SMALLEST[1]:
        words = f"hotpixd needs {SMALLEST[0]}x{SMALLEST[1]} characters; this terminal has {width}x{height}."
        return Screenful(Text(words, justify="center"), 1, 0)
    inside = height - 1
    rows, limit = 1, 0
    main: RenderableType
    if scene.view.page is not Page.MAIN:
        rows = inside - 2
        main, limit = _long_page(scene, width, rows)
    elif not scene.live:
        main = _nobody(scene, inside)
    else:
        main = Layout()
        header = _header(scene, width)
        body = inside - len(header)
        if scene.sensor is None:
            below: RenderableType = _no_sensor(scene, width, body)
        elif width >= WIDE[0] and height >= WIDE[1]:
            below, rows = _side_by_side(scene, scene.sensor, width, body)
        else:
            below, rows = _stacked(scene, scene.sensor, width, body)
        main.split_column(Layout(Group(*header), size=len(header)), Layout(below))
    layout = Layout()
    layout.split_column(Layout(main), Layout(_keys(scene, width), size=1))
    return Screenful(layout, rows, limit)


def _side_by_side(scene: Scene, sensor: Sensor, width: int, height: int) -> tuple[Layout, int]:
    """Return the list beside map and magnifier, over alerts and reasons; and the rows of the list."""
    below = min(max(height // 5, 4), 12)
    body = height - below
    columns, lines = map_size(sensor["width"], sensor["height"], width * 2 // 5, max(body * 3 // 5, body - 20) - 2)
    aside = max(columns + 2, 60)
    lines = min(lines + 2, body - 8)
    right = Layout(size=aside)
    right.split_column(
        Layout(map_panel(scene, sensor, aside, lines), size=lines),
        Layout(site_panel(scene, sensor, aside, body - lines)),
    )
    main, bottom = Layout(), Layout(size=below)
    main.split_row(Layout(list_panel(scene, sensor, width - aside, body)), right)
    bottom.split_row(
        Layout(alerts_panel(scene, width - aside, below)),
        Layout(reasons_panel(scene, sensor, aside, below), size=aside),
    )
    layout = Layout()
    layout.split_column(main, bottom)
    return layout, body - 3


def _stacked(scene: Scene, sensor: Sensor, width: int, height: int) -> tuple[Layout, int]:
    """Return the list over map and magnifier, over the last alert or more of them; and the rows of the list."""
    middle = min(max(height * 2 // 5, 8), 22)
    below = 1 if height < 26 else min(max(height // 5, 4), 10)
    listed = height - middle - below
    columns, _ = map_size(sensor["width"], sensor["height"], width // 2 - 2, middle - 2)
    aside = max(columns + 2, 18)
    row, bottom = Layout(size=middle), Layout(size=below)
    row.split_row(
        Layout(map_panel(scene, sensor, aside, middle), size=aside),
        Layout(site_panel(scene, sensor, width - aside, middle)),
    )
    if below == 1:
        bottom.update(last_alert(scene, width))
    elif width < 110:
        bottom.update(alerts_panel(scene, width, below))
    else:
        half = width // 2
        bottom.split_row(
            Layout(alerts_panel(scene, half, below), size=half),
            Layout(reasons_panel(scene, sensor, width - half, below)),
        )
    layout = Layout()
    layout.split_column(Layout(list_panel(scene, sensor, width, listed), size=listed), row, bottom)
    return layout, listed - 3


# The lines above.


def _header(scene: Scene, width: int) -> list[Text]:
    live, look, sensor = scene.live, scene.look, scene.sensor
    daemon = live.get("daemon") or {}
    rate, queue = daemon.get("rate") or 0.0, daemon.get("queue") or 0
    pace = Text(f"{rate:.1f} shots/s  queue {queue} ", "bold cyan" if queue else "")
    first = Text.assemble((" hotpixd ", "bold reverse"), " ")
    activity = look.text(daemon.get("activity") or "starting")
    # Its later parts are numbers that stand below as well.
    while cell_len(activity) > width - first.cell_len - pace.cell_len - 1 and ";" in activity:
        activity = activity.rpartition(";")[0]
    first.append(activity, "bold" if scene.trouble is None else "dim")
    told = [*_notices(scene), *series_lines(live, look)]
    lines = [ends(first, pace, width, look), *(Text(" ").append_text(line) for line in told)]
    if sensor is not None:
        ids = sorted(live["sensors"])
        which = Text(f"sensor {ids.index(sensor['id']) + 1} of {len(ids)} " if len(ids) > 1 else "", "cyan")
        lines.append(ends(Text(f" {look.text(sensor_name(sensor))}", "bold"), which, width, look))
        frames, counted = sensor["frames"], sensor["frames_counted"]
        refused = (daemon.get("shots") or {}).get("refused", 0)
        numbers = Text(f" {many(frames, 'frame')}, {counted} counted as evidence, {frames - counted} not; ")
        numbers.append(f"{many(refused, 'shot')} refused", "yellow" if refused else "")
        agreement = sensor.get("agreement") or {"declared": 0}
        words = Text(f"{agreement['declared']} declared, {agreement['both']} found " if agreement["declared"] else "")
        # Where there is no room, the page of alerts tells it.
        lines.append(ends(numbers, words, width, look) if numbers.cell_len + words.cell_len < width else numbers)
        lines.append(Text(f" {_last_shot(sensor.get('last_shot'), look)}"))
        if sensor.get("not_counting"):
            reason = look.text(sensor["not_counting"])
            lines.append(Text(f" the last frame was not counted: {reason}", "yellow"))
    return [look.fit(line, width) for line in lines]


def _notices(scene: Scene) -> list[Text]:
    """Return what must not be overlooked."""
    live, look = scene.live, scene.look
    notices = []
    if scene.trouble is not None:
        where = look.text(scene.where)
        notices.append(Text(f"No daemon answers at {where}; waiting. Below: how it was.", "bold red"))
    degraded = (live.get("daemon") or {}).get("degraded")
    if degraded:
        notices.append(Text(look.text(degraded), "bold red"))
    troubled = [source for source in live.get("sources") or () if source["status"] == "trouble"]
    if troubled:
        others = f" (and {many(len(troubled) - 1, 'other source')})" if len(troubled) > 1 else ""
        words = f"{look.text(troubled[0]['name'])}: {look.text(troubled[0].get('detail') or 'trouble')}"
        notices.append(Text(words + others, "red"))
    return notices


def _last_shot(shot: Mapping[str, Any] | None, look: Look) -> str:
    if shot is None:
        return "no shot yet"
    words = [f"last shot {look.text(shot['name'])}", look.text(shot["kind"] or shot["verdict"])]
    exposure, iso, celsius = shot["exposure_s"], shot["iso"], shot["sensor_temp_c"]
    if exposure is not None:
        words.append(f"{exposure:g} s" if exposure >= 0.3 or exposure <= 0 else f"1/{1 / exposure:.0f} s")
    if iso is not None:
        words.append(f"ISO {iso:g}")
    if celsius is not None:
        words.append(f"{celsius:g} {look.celsius}")
    words.append(label(shot["taken_at"] or shot["received_at"]))
    return ", ".join(words)


# Pages without a list, and the line of keys.


def _nobody(scene: Scene, height: int) -> RenderableType:
    where = scene.look.text(scene.where)
    if scene.trouble is None:
        return Align.center(Text(f"Attaching to {where} ..."), vertical="middle", height=height)
    words = Text(f"No daemon answers at {where}; waiting\n\n", "bold red", justify="center")
    words.append(f"{scene.look.text(scene.trouble)}\n", "not bold default")
    words.append("This screen attaches by itself as soon as one does. hotpixd run starts it.", "not bold default")
    return Align.center(words, vertical="middle", height=height)


def _no_sensor(scene: Scene, width: int, height: int) -> RenderableType:
    live, look = scene.live, scene.look
    words = "This sensor is being read." if scene.view.sensor else "No sensor is known yet: waiting for the first shot."
    lines = [Text(words, "bold"), Text(), *source_lines(live, look), Text()]
    lines += alert_lines(live, look)
    return panel(lines[: height - 2], width, look, "", pad=1)


def _long_page(scene: Scene, width: int, rows: int) -> tuple[RenderableType, int]:
    """Return the page that the user turned to, and the lines by which it is longer than `rows`."""
    if scene.view.page is Page.HELP:
        title, lines = "help", _help(scene.look, scene.owned)
    else:
        title, lines = "alerts, sources, frames not counted", _log(scene, width - 4)
    limit = max(len(lines) - rows, 0)
    top = min(scene.view.scroll, limit)
    return panel(lines[top : top + rows], width, scene.look, title, pad=1), limit


def _log(scene: Scene, width: int) -> list[Text]:
    """Return all alerts, reasons and sources, in lines that fit."""
    live, look, sensor = scene.live, scene.look, scene.sensor
    reasons = [] if sensor is None else reason_lines(sensor, look)
    if sensor is not None and sensor.get("not_counting"):
        reasons.append(Text(f"the last frame: {look.text(sensor['not_counting'])}", "yellow"))
    if sensor is not None and STATIC_SCENE in sensor["not_counted"]:
        reasons.append(Text(STATIC_SCENE_ADVICE))
    agreement = (sensor or {}).get("agreement")
    agreed = agreement_words(agreement) if agreement else ""
    parts = [
        ("Trouble", _notices(scene)),
        ("Why frames are not counted", reasons),
        *([("Declared defects", [Text(agreed)])] if agreed else []),
        ("Sources", source_lines(live, look) + series_lines(live, look)),
        ("Alerts, newest first", alert_lines(live, look)),
    ]
    lines = []
    for title, entries in parts:
        lines.append(Text(title, "bold"))
        for entry in entries or [Text("none", "dim")]:
            lines += _wrapped(entry, width)
        lines.append(Text())
    return lines[:-1]


def _wrapped(line: Text, width: int) -> list[Text]:
    """Break a line at `width` cells; what goes on is indented."""
    pieces = []
    while line.cell_len > width:
        space = line.plain.rfind(" ", 8, width)
        head, rest = line.divide([space if space > 0 else width // 2])
        pieces.append(head)
        line = Text("    ").append_text(rest)
    return [*pieces, line]


_HELP_KEYS = (
    ("up down, j k", "select a site"),
    ("PgUp PgDn", "by a screenful"),
    ("Home End, g G", "first and last"),
    ("s", "sort by certainty, excess, position, first seen (newest first)"),
    ("f", "show all, stable, candidates, recovered"),
    ("n N, Tab", "next, previous sensor"),
    ("a", "all alerts, sources, and why frames are not counted"),
    ("h ?", "this page; Esc goes back"),
)


def _help(look: Look, owned: bool) -> list[Text]:
    about = {
        "stable": "a defect: enough evidence, from enough frames",
        "candidate": "evidence, but not enough, or from too few frames yet",
        "recovered": "was stable, and has been ordinary for long",
    }
    tones = "red is above zero, blue below" if look.colours else "-~=%&$ is below zero"
    leave = "stop watching: this daemon ends with its dashboard" if owned else "detach: the daemon goes on"
    keys_told = (*_HELP_KEYS, ("q, Ctrl-C", leave))
    lines = [Text.assemble((f"{keys:<21}", "bold cyan"), meaning) for keys, meaning in keys_told]
    lines.append(Text())
    lines += [
        Text.assemble((f"{look.marks[state]} {state:<19}", STYLES[state]), about[state]) for state in reversed(STATES)
    ]
    lines.append(Text(f"{look.here} {'selected':<19}where the selected site is on the map"))
    lines.append(Text())
    lines += [
        Text("certain   the evidence over what it takes to be stable; 100% only once it is"),
        Text(f"+{look.sigma:<9}mean excess over the neighbours, in units of one frame's noise"),
        Text("dark      what the site adds per second of exposure, in ADU"),
        Text("recent    excess in the last frames, the newest to the right"),
        Text(f"magnifier mean excess around the site: {tones}"),
    ]
    return lines


def _keys(scene: Scene, width: int) -> Text:
    if scene.view.page is Page.MAIN:
        keys = [("j k", "select"), ("s", "sort"), ("f", "filter"), ("n", "sensor"), ("a", "alerts"), ("h", "help")]
    else:
        keys = [("j k", "scroll"), ("Esc", "back")]
    line = Text(" ")
    for key, meaning in [*keys, ("q", "stop" if scene.owned else "detach")]:
        line.append(key, "bold cyan").append(f" {meaning}   ")
    return scene.look.fit(line, width)
