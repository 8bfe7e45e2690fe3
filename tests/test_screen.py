"""What the dashboard shows, drawn from made-up live states at several sizes and for several terminals."""

from __future__ import annotations

import io
import random
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from rich.cells import cell_len
from rich.console import Console
from rich.screen import Screen
from rich.style import Style
from rich.text import Text

import live_states as made_up
from hotpixd.core.overview import STATIC_SCENE_ADVICE
from hotpixd.views.choices import Filter, Order, Page, View, arranged, pressed, settled
from hotpixd.views.drawing import (
    Look,
    ascii_look,
    bar,
    console_look,
    magnifier,
    map_size,
    sensor_map,
    sparkline,
    unicode_look,
)
from hotpixd.views.panels import Scene, Surroundings, source_lines
from hotpixd.views.screen import compose

LOOKS = [unicode_look(256), unicode_look(16), unicode_look(0), console_look(16), ascii_look(16), ascii_look(0)]
SIZES = [(80, 24), (100, 30), (120, 36), (149, 50), (150, 35), (150, 36), (400, 24), (200, 60), (400, 120)]


def drawn(
    live: dict[str, Any],
    width: int = 80,
    height: int = 24,
    *,
    look: Look | None = None,
    view: View | None = None,
    **more: Any,
) -> list[str]:
    """Return the lines of a screen, as a terminal would get them, without their colours."""
    view, defects = settled(live, view or View())
    scene = Scene(live, view, defects, look or unicode_look(256), where="/run/hotpixd/feed.sock", **more)
    file = io.StringIO()
    console = Console(file=file, width=width, height=height, force_terminal=True, color_system="256", no_color=False)
    console.print(Screen(compose(scene, width, height).picture), end="")
    return re.sub(r"\x1b\[[0-9;]*m", "", file.getvalue()).split("\n")


def around(live: dict[str, Any], view: View | None = None) -> Surroundings:
    """Return surroundings of what is selected."""
    view, _ = settled(live, view or View())
    assert view.sensor is not None
    assert view.site is not None
    return Surroundings(view.sensor, view.site, made_up.patch())


@pytest.mark.parametrize(("width", "height"), SIZES)
@pytest.mark.parametrize("look", LOOKS, ids=["unicode", "16", "mono", "console", "ascii", "ascii-mono"])
def test_every_part_is_there_at_every_size(width: int, height: int, look: Look):
    """Counters, list, map, magnifier, alerts and keys, in exactly as many lines and columns as there are."""
    live = made_up.live()
    live[f"sensor:{made_up.ID}"]["not_counting"] = "the scene does not move"
    lines = drawn(live, width, height, look=look, around=around(live))
    assert len(lines) == height
    assert {cell_len(line) for line in lines} == {width}
    screen = "\n".join(lines)
    strongest = arranged(live, settled(live, View())[0])[0]
    for part in (
        "watching 2 sources", "1.2 shots/s", "queue 3", "Acme One, serial 0042", "412 frames",
        "398 counted as evidence", "14 not", "2 shots refused", "IMG_0412.CR2", "1/250 s", "ISO 800", "31 ",
        "the last frame was not counted: the scene does not move", "13 stable", "28 candidates", "6 recovered",
        "kind", "certain", "dark ADU/s", "recent", "first seen", f"6000{look.times}4000", look.here,
        f"{strongest['x']}, {strongest['y']}", "evidence 41.2 of 24.1", "ADU, ", "ISO 800", "first seen 2026-03",
        "The defect at 17, 4 has recovered.", "help", "detach",
    ):  # fmt: skip
        assert part in screen, part
    assert re.search(rf" {strongest['x']} +{strongest['y']} +{strongest['colour']} +{strongest['kind']}", screen)
    assert look.spark[-1] in screen
    assert look.bar[0] * 7 in screen
    if not look.unicode:
        assert screen.isascii()


def test_more_space_shows_more():
    """A wide terminal has the excess in ADU, the state in words, times to the minute, sources and reasons."""
    live = made_up.live()
    narrow, wide = "\n".join(drawn(live)), "\n".join(drawn(live, 200, 60))
    for part in ("excess ADU", " stable   ", "11 frames not counted: the scene does not move", "tether away"):
        assert part not in narrow
        assert part in wide
    assert wide.count(" 04:05") > 30


@pytest.mark.parametrize(("width", "height"), [(79, 24), (80, 23), (20, 5), (1, 1)])
def test_too_small_a_terminal_is_told_so(width: int, height: int):
    """Below 80x24 there is a sentence instead of a broken screen."""
    said = " ".join("".join(line) for line in drawn(made_up.live(), width, height)).split()
    if width > 10:
        assert "80x24" in said
    assert not any("Acme" in word for word in said)


def test_without_any_state_it_says_what_it_waits_for():
    """Attaching, no daemon, a daemon without a sensor, a sensor not described yet, a sensor without a defect."""
    assert "Attaching to /run/hotpixd/feed.sock" in "\n".join(drawn({}))
    gone = "\n".join(drawn({}, trouble="Connection refused."))
    assert "No daemon answers at /run/hotpixd/feed.sock; waiting" in gone
    assert "Connection refused." in gone
    live = made_up.live()
    bare = "\n".join(drawn({key: live[key] for key in ("daemon", "sources", "alerts")} | {"sensors": []}))
    assert "No sensor is known yet: waiting for the first shot." in bare
    assert "card watching" in bare
    assert "being read" in "\n".join(drawn(live | {f"sensor:{made_up.ID}": None}))
    assert "Nothing yet." in "\n".join(drawn(made_up.live([]), around=None))
    recovered = drawn(made_up.live([made_up.defect(7)]), view=View(only=Filter.RECOVERED))
    assert "None is recovered; f shows others." in "\n".join(recovered)
    assert "nothing selected" in "\n".join(recovered)


def test_trouble_stands_above_everything():
    """A daemon that is gone, a degraded one and a source in trouble are told in words, with what was last known."""
    live = made_up.live()
    live["daemon"]["degraded"] = "The disk is full: shots wait."
    live["sources"][0] |= {"status": "trouble", "detail": "I/O error"}
    screen = drawn(live, trouble="The daemon hung up.")
    assert "No daemon answers at /run/hotpixd/feed.sock; waiting" in screen[1]
    assert "The disk is full: shots wait." in screen[2]
    assert "card: I/O error" in screen[3]
    assert "412 frames" in screen[5]
    log = "\n".join(drawn(live, view=View(page=Page.LOG)))
    assert "The disk is full: shots wait." in log


def test_the_page_of_alerts_says_what_to_do_where_the_scene_does_not_move():
    """Nothing elsewhere has room for it; other reasons have no advice."""
    live = made_up.live()
    assert STATIC_SCENE_ADVICE in "\n".join(drawn(live, 240, 40, view=View(page=Page.LOG)))
    live[f"sensor:{made_up.ID}"]["not_counted"] = {"the frame is blurred by stars that trail": 3}
    assert STATIC_SCENE_ADVICE not in "\n".join(drawn(live, 240, 40, view=View(page=Page.LOG)))


def test_declared_defects_are_told_of_where_there_are_any():
    """How many are found, where there is room for it; on the page of alerts at every size."""
    live = made_up.live()
    counts = {"declared": 12, "both": 9, "not_found": 3, "not_declared": 4}
    with_them = live | {f"sensor:{made_up.ID}": live[f"sensor:{made_up.ID}"] | {"agreement": counts}}
    assert drawn(with_them, 120, 36)[2].rstrip().endswith("12 declared, 9 found")
    assert "2 shots refused" in drawn(with_them, 80, 24)[2]
    words = "12 declared: 9 of them found, 3 not; 4 found but not declared"
    assert words in "\n".join(drawn(with_them, view=View(page=Page.LOG)))
    for screen in (drawn(live, 120, 36), drawn(live, view=View(page=Page.LOG))):
        assert "declared" not in "\n".join(screen)


def test_an_alert_of_the_sensor_shown_does_without_its_name():
    """Where space is short; of another one, and in the log, it is whole."""
    live = made_up.live()
    alert = live["alerts"][0] | {"topic": "stable"}
    live["alerts"] = [alert | {"text": "Acme One, serial 0042, 6000x4000 raw: hot G at (3, 4)."}]
    assert "stable hot G at (3, 4)." in drawn(live)[-2]
    assert "stable Acme One, serial 0042" in "\n".join(drawn(live, view=View(page=Page.LOG)))
    live["alerts"] = [alert | {"text": "Other One: hot G at (3, 4)."}]
    assert "stable Other One: hot G at (3, 4)." in drawn(live)[-2]


@pytest.mark.parametrize("look", LOOKS, ids=["unicode", "16", "mono", "console", "ascii", "ascii-mono"])
def test_a_source_says_in_its_own_word_how_it_is(look: Look):
    """A camera is ready or catching up where a directory is watched; where the word is missing, the status stands."""
    live = made_up.live(sources=[*made_up.live()["sources"], *made_up.cameras()])
    live["sources"][0]["condition"] = ""
    for lines in (drawn(live, 160, 80, look=look), drawn(live, 80, 40, look=look, view=View(page=Page.LOG))):
        screen = "\n".join(lines)
        for told in (
            "card watching: 1204 files, 3 waiting",
            "tether away: /mnt/tether is not mounted",
            "Acme One 0042 ready: 1204 files on its card",
            "Acme Two 7 catching up: 500 files, 31 waiting",
            "camera at usb:001,005 claimed: gvfs has it open.",
            "Acme Old 1 absent: it is switched off or unplugged",
            "Acme New 2 opening: asking it what it is",
        ):
            assert told in screen
    # As its status says, not its word.
    assert "camera at usb:001,005: gvfs has it open." in drawn(live, look=look)[1]


def test_the_word_has_the_colour_of_the_status():
    """Green, red, yellow and dim mean the same for a camera as for a directory."""
    live = made_up.live(sources=made_up.cameras())
    words = [line.plain[line.spans[-1].start : line.spans[-1].end] for line in source_lines(live, LOOKS[0])]
    styles = [str(line.spans[-1].style) for line in source_lines(live, LOOKS[0])]
    assert words == ["ready", "catching up", "claimed", "absent", "opening"]
    assert styles == ["green", "green", "red", "dim", "yellow"]


@pytest.mark.parametrize(("width", "height"), SIZES)
@pytest.mark.parametrize("look", LOOKS, ids=["unicode", "16", "mono", "console", "ascii", "ascii-mono"])
def test_a_series_of_darks_is_shown_at_every_size(width: int, height: int, look: Look):
    """Below the activity, with all that one waits for; the list gives way by a line."""
    lines = drawn(made_up.live(series=made_up.series()), width, height, look=look)
    assert len(lines) == height
    assert lines[1].rstrip() == f" darks: 12 of 30 taken, 30 s, ISO 1600, 21.5 {look.celsius}, 9:32 left"
    assert "412 frames" in lines[3]


@pytest.mark.parametrize(
    ("known", "told"),
    [
        (
            {"stage": "preparing", "taken": 0, "temps_c": [], "detail": "setting the camera"},
            "0 of 30 taken, setting the camera",
        ),
        ({"exposure_s": None, "iso": None, "temps_c": [], "left_s": None}, "12 of 30 taken"),
        ({"exposure_s": 0.5, "left_s": 0.0}, "12 of 30 taken, 0.5 s, ISO 1600, 21.5 °C, 0:00 left"),
        ({"exposure_s": 1800.0, "left_s": 32_400.4}, "12 of 30 taken, 1800 s, ISO 1600, 21.5 °C, 9:00:00 left"),
        ({"left_s": 3599.7}, "12 of 30 taken, 30 s, ISO 1600, 21.5 °C, 1:00:00 left"),
        ({"temps_c": [-10.0, -9.5, -9.5]}, "12 of 30 taken, 30 s, ISO 1600, -9.5 °C, 9:32 left"),
        (
            {"stage": "waiting", "detail": "waiting\x1b[2J [red]"},
            r"12 of 30 taken, waiting\x1b[2J [red]",
        ),
    ],
)
def test_a_series_is_told_as_far_as_it_is_known(known: dict[str, Any], told: str):
    """Before the camera has answered, in hours, and what it waits for; nothing of it is a command to the terminal."""
    live = made_up.live(series=made_up.series(**known))
    assert drawn(live, 120, 36)[1].rstrip() == f" darks: {told}"
    log = "\n".join(drawn(live, 120, 36, view=View(page=Page.LOG)))
    assert f"darks: {told}" in log
    assert f"darks: {told}" in "\n".join(drawn(live | {"sensors": []}, 120, 36))


@pytest.mark.parametrize("stage", ["done", "stopped", "failed"])
def test_a_series_that_is_over_is_not_shown(stage: str):
    """It is no news any more; neither is none at all."""
    without = drawn(made_up.live(), 120, 36)
    assert drawn(made_up.live(series=made_up.series(stage=stage, left_s=None)), 120, 36) == without
    assert drawn(made_up.live(series=None), 120, 36) == without


NOISY = "Acme One, serial 0042, 6000x4000 raw"


def alerts(*entries: tuple[str, str, str]) -> list[dict[str, Any]]:
    """Return alerts of (time, topic, text)."""
    return [{"id": n, "at": at, "topic": topic, "text": text} for n, (at, topic, text) in enumerate(entries, 1)]


def of_sites(count: int, at: str = "2026-03-30T20:01", name: str = NOISY) -> list[tuple[str, str, str]]:
    """Return what alerts of as many stable defects tell: a fifth is stuck, the others are bright."""
    kinds = ["bright" if n % 5 else "stuck" for n in range(count)]
    return [
        (f"{at}:{n % 60:02}Z", "stable", f"{name}: {kind} R at ({n}, 52), -1.3 sigma is a stable defect.")
        for n, kind in enumerate(kinds)
    ]


def test_alerts_of_many_defects_do_not_drown_the_others():
    """Those of a topic, a sensor and a minute are one line; the log says of which camera, the main page if another."""
    told = ("2026-03-30T20:00:00Z", "source", "tether is not there.")
    live = made_up.live(alerts=alerts(told, *of_sites(40)))
    wide = "\n".join(drawn(live, 200, 60))
    assert re.search(r"\d\d-\d\d \d\d:\d\d stable: 40 defects: 32 bright, 8 stuck ", wide)
    assert "source tether is not there." in wide
    log = drawn(live, 80, 40, view=View(page=Page.LOG))
    assert sum("stable" in line for line in log) == 1
    assert "stable: 40 defects of Acme One: 32 bright, 8 stuck " in "\n".join(log)
    assert "source tether is not there." in "\n".join(log)
    other = made_up.live(alerts=alerts(*of_sites(5, name="Other, no serial number, 8x8 raw")))
    assert "stable: 5 defects of Other: 4 bright, 1 stuck " in drawn(other)[-2]


def test_alerts_that_differ_stay_apart():
    """By minute, sensor, topic or another between them; one alone, and a text of another form, are shown whole."""
    strange = ("2026-03-30T20:03:00Z", "stable", "Something is stable.")
    back = ("2026-03-30T20:03:01Z", "recovered", f"{NOISY}: dead at (1, 52) has recovered.")
    later = of_sites(2, "2026-03-30T20:03", "Two, serial 1, 8x8 raw")
    live = made_up.live(alerts=alerts(*of_sites(3), *of_sites(1, "2026-03-30T20:02"), *later, strange, strange, back))
    log = "\n".join(drawn(live, 120, 40, view=View(page=Page.LOG)))
    said = [line[3:].split(" ", 2)[2].strip(" │") for line in log.split("Alerts, newest first")[1].split("\n")[1:8]]
    assert said == [
        f"recovered {NOISY}: dead at (1, 52) has recovered.",
        "stable Something is stable.",
        "stable Something is stable.",
        "stable: 2 defects of Two: 1 bright, 1 stuck",
        f"stable {NOISY}: stuck R at (0, 52), -1.3 sigma is a stable defect.",
        "stable: 3 defects of Acme One: 2 bright, 1 stuck",
        "",
    ]


def test_a_count_of_alerts_that_may_go_on_says_so():
    """Only the last alerts are known: of those that begin before them there are at least as many."""
    live = made_up.live(alerts=alerts(*of_sites(50))[10:])
    assert "stable: at least 40 defects: 32 bright, 8 stuck " in drawn(live)[-2]


def test_the_title_drops_what_is_told_below_before_it_cuts():
    """The first of the daemon's parts stays as long as it fits; all are there where there is space."""
    live = made_up.live()
    live["daemon"]["activity"] = "watching 2 directories; 412 shots folded, 13 stable defects, 230 to go"
    assert drawn(live)[0].startswith(" hotpixd  watching 2 directories       ")
    assert "13 stable defects, 230 to go  " in drawn(live, 120, 36)[0]
    live["daemon"]["activity"] = "watching " + 20 * "far/" + "; 412 shots folded"
    assert re.match(r" hotpixd  watching (far/)+fa… 1.2 shots/s  queue 3 $", drawn(live)[0])


@pytest.mark.parametrize(
    ("counted", "least", "reason"),
    [
        (3, 4, "enough evidence; at least 4 counted frames are needed"),
        (3, None, "enough evidence; more counted frames are needed"),
        (9, 4, "enough evidence, but it is slight or may be of the scene"),
    ],
)
@pytest.mark.parametrize("look", LOOKS)
def test_a_candidate_is_not_certain_before_it_is_stable(look: Look, counted: int, least: int | None, reason: str):
    """With all the evidence it says what is missing, and neither its number nor its bar is full."""
    site = made_up.defect(5, state="candidate", certainty=0.999, log_e=30.0)
    live = made_up.live([site])
    live[f"sensor:{made_up.ID}"] |= {"frames_counted": counted}
    if least is not None:
        live[f"sensor:{made_up.ID}"]["min_frames"] = least
    screen = "\n".join(drawn(live, 120, 36, look=look))
    row = next(line for line in screen.split("\n") if "99%" in line)
    assert "certainty 99%" in screen
    assert "100%" not in row
    assert look.bar[0] * 6 in row
    assert look.bar[0] * 7 not in row
    inside = [line.rstrip(" │|").rsplit("  ", 1)[-1] for line in screen.split("\n")]
    assert reason in " ".join(inside)
    for other in (site | {"log_e": 24.0}, site | {"state": "stable", "certainty": 1.0}):
        assert "enough evidence" not in "\n".join(drawn(made_up.live([other]), 120, 36, look=look))


@pytest.mark.parametrize("kind", ["hot", "warm", "bright", "unstable", "stuck", "dead", "dim"])
def test_a_dark_current_is_missed_only_where_there_may_be_one(kind: str):
    """A stuck, dead or dim sample has none to be known."""
    live = made_up.live([made_up.defect(5, kind=kind, dark_current_adu_per_s=None)])
    missed = kind in ("hot", "warm", "bright", "unstable")
    assert ("dark current not known yet" in "\n".join(drawn(live))) == missed


HOSTILE = "[bold red]x[/] \x1b[2J\r\n\t\u202e \ud800 [/nothing]"


def test_nothing_from_outside_is_markup_or_control():
    """Names of files, cameras and sources, reasons and alerts are shown as they are, and do nothing."""
    live = made_up.live()
    sensor = live[f"sensor:{made_up.ID}"]
    sensor |= {"model": f"Acme {HOSTILE}", "not_counting": HOSTILE, "not_counted": {HOSTILE: 2}}
    sensor["last_shot"]["name"] = HOSTILE
    live["daemon"] |= {"activity": HOSTILE, "degraded": HOSTILE}
    live["sources"] = [{"name": HOSTILE, "status": "trouble", "detail": HOSTILE, "files": 1, "waiting": 0}]
    live["alerts"] = [{"id": 1, "at": "2026-03-30T20:01:00Z", "topic": HOSTILE, "text": HOSTILE}]
    live[f"defects:{made_up.ID}"] = [made_up.defect(5, kind=HOSTILE, colour=HOSTILE)]
    for page in (Page.MAIN, Page.LOG):
        for look in LOOKS:
            lines = drawn(live, 200, 60, look=look, view=View(page=page))
            screen = "\n".join(lines)
            assert not re.search(r"[\x00-\x09\x0b-\x1f\u202e\ud800]", screen)
            assert r"[bold red]x[/] \x1b[2J\r\n\t\u202e \ud800 [/nothing]" in screen
            assert {cell_len(line) for line in lines} == {200}


def test_wide_characters_do_not_move_the_edges():
    """A name in a script of double width is cut by its cells."""
    live = made_up.live()
    live[f"sensor:{made_up.ID}"]["last_shot"]["name"] = "写真" * 60
    live["sources"][0] |= {"status": "trouble", "detail": "カード" * 60}
    for page in (Page.MAIN, Page.LOG):
        assert {cell_len(line) for line in drawn(live, view=View(page=page))} == {80}


def test_numbers_that_are_not_known_are_left_blank():
    """Nothing is made up for a sensor without a shot and a site with nothing but a position."""
    unknown = dict.fromkeys(
        ("excess_adu", "excess_sigma", "dark_current_adu_per_s", "dark_current_iso", "share_on", "level_adu",
         "first_seen", "stable_since", "frames_to_stable", "log_e")
    )  # fmt: skip
    live = made_up.live([made_up.defect(5, recent=[None, 3.0, None]) | unknown, made_up.defect(9, recent=[]) | unknown])
    live[f"sensor:{made_up.ID}"] |= {"last_shot": None, "threshold": None, "serial": None, "make": None}
    for order in Order:
        screen = "\n".join(drawn(live, view=View(order=order)))
        assert "no shot yet" in screen
        assert "None" not in screen


def test_a_long_log_is_scrolled_to_its_end():
    """Fifty long alerts do not fit 24 lines; each can be reached, and no word of it is lost."""
    live = made_up.live()
    alert = live["alerts"][0]
    live["alerts"] = [alert | {"text": f"alert number {n} " + "and so on " * 15} for n in range(50)]
    view, defects = settled(live, View(page=Page.LOG))
    seen = ""
    for _ in range(20):
        scene = Scene(live, view, defects, unicode_look(256), where="")
        screen = compose(scene, 80, 24)
        seen += "\n".join(drawn(live, view=view))
        view = pressed(view, "page down", live, defects, screen.rows, screen.scroll_limit)
    assert all(f"alert number {n} " in seen for n in range(50))
    assert view.scroll == screen.scroll_limit
    assert pressed(view, "home", live, defects, 1, screen.scroll_limit).scroll == 0


@pytest.mark.parametrize("look", LOOKS)
def test_help_names_every_key_on_the_smallest_screen(look: Look):
    """Without scrolling."""
    screen = "\n".join(drawn(made_up.live(), view=View(page=Page.HELP), look=look))
    for word in ("sort by", "show all", "next, previous sensor", "alerts", "detach: the daemon goes on", "PgUp",
                 "Home End, g G", "magnifier", "from too few frames yet", "100% only once it is"):  # fmt: skip
        assert word in screen
    own = "\n".join(drawn(made_up.live(), view=View(page=Page.HELP), look=look, owned=True))
    assert re.search(r"q, Ctrl-C +stop watching", own)
    assert "detach" not in own
    assert "goes on" not in own
    assert "q stop" in drawn(made_up.live(), look=look, owned=True)[-1]


# What the user chooses.


def test_orders_and_filters_are_what_they_say():
    """Each against the plain definition."""
    live = made_up.live(made_up.defects(300))
    view, everything = settled(live, View())
    assert len(everything) == 300
    for order, key, down in (
        (Order.CERTAINTY, lambda d: d["certainty"], True),
        (Order.EXCESS, lambda d: abs(d["excess_sigma"]), True),
        (Order.POSITION, lambda d: (d["y"], d["x"]), False),
        (Order.FIRST_SEEN, lambda d: d["first_seen"], True),
    ):
        keys = [key(d) for d in arranged(live, replace(view, order=order))]
        assert keys == sorted(keys, reverse=down)
    for state in (Filter.STABLE, Filter.CANDIDATE, Filter.RECOVERED):
        shown = arranged(live, replace(view, only=state))
        assert {d["state"] for d in shown} == {state}
        assert len(shown) == live[f"sensor:{made_up.ID}"][state]


def press(view: View, keys: Sequence[str], live: dict[str, Any], rows: int = 7) -> View:
    """Press keys one after another."""
    for key in keys:
        view, defects = settled(live, view)
        view = pressed(view, key, live, defects, rows, 0)
    return settled(live, view)[0]


def test_the_selection_moves_by_rows_pages_and_to_the_ends():
    """And stops there."""
    live = made_up.live()
    steps = [("down", 1), ("j", 2), ("page down", 9), ("k", 8), ("up", 7), ("end", 46), ("down", 46), ("page up", 39)]
    view = View()
    ends = [("home", 0), ("up", 0), ("page up", 0), ("G", 46), ("g", 0), ("end", 46), ("x", 46), ("f1", 46)]
    for key, index in [*steps, *ends]:
        view = press(view, [key], live)
        assert view.index == index
        assert view.site == arranged(live, view)[index]["site"]


def test_the_selection_stays_on_its_site():
    """However the list is sorted, and whatever comes and goes around it."""
    live = made_up.live()
    view = press(View(), ["down"] * 5, live)
    site = view.site
    rng = random.Random(2)
    for key in "ssss":
        view = press(view, [key], live)
        assert view.site == site
        others = [d for d in made_up.defects(200, seed=rng.randint(0, 99)) if d["site"] != site]
        own = [d for d in live[f"defects:{made_up.ID}"] if d["site"] == site]
        live = made_up.live([*others[:100], *own, *others[100:]])
        view, defects = settled(live, view)
        assert view.site == site
        assert defects[view.index]["site"] == site


def test_the_selection_is_the_top_until_the_user_moves():
    """Also through keys that sort, filter, turn pages or mean nothing; another sensor starts at its top again."""
    live = made_up.live(made_up.defects(20))
    view = press(View(), ["s", "f", "f", "f", "f", "h", "down", "G", "h", "x"], live)
    assert view.index == 0
    later = made_up.live([*made_up.defects(20), *made_up.defects(200, seed=9)])
    for order in Order:
        moved, defects = settled(later, replace(view, order=order))
        assert (moved.index, moved.site) == (0, defects[0]["site"])
    for keys, index in ((["down"], 1), (["down", "up"], 0), (["g"], 0)):
        picked = press(view, keys, live)
        assert picked.index == index
        assert press(picked, [], later).site == picked.site
    two = {**live, "sensors": [made_up.ID, "b"], "sensor:b": made_up.sensor("b")}
    two["defects:b"] = made_up.defects(9)
    other = press(press(View(), ["down"], two), ["n"], two)
    assert other.sensor == "b"
    assert press(other, [], {**two, "defects:b": made_up.defects(99, seed=5)}).index == 0


def test_the_heir_of_a_site_that_leaves_stands_where_it_stood():
    """Also when it was the last, and when the list was empty for a while."""
    found = made_up.defects(20)
    live = made_up.live(found)
    view = press(View(), ["end"], live)
    assert press(view, [], made_up.live([d for d in found if d["site"] != view.site])).index == 18
    empty = press(view, [], made_up.live([]))
    assert empty.site is None
    assert press(empty, ["down", "end", "s", "f", "f", "f", "f"], made_up.live([])).site is None
    assert press(empty, [], live).site == view.site


def test_sensors_take_turns_and_are_kept():
    """n, N and Tab go round; the sensor shown stays when another becomes the one used last."""
    live = made_up.live()
    for id_ in ("b", "c"):
        live |= {f"sensor:{id_}": made_up.sensor(id_, model=f"Model {id_}"), f"defects:{id_}": []}
    live["sensors"] = ["b", made_up.ID, "c"]
    view = press(View(), [], live)
    assert view.sensor == "b"
    live["sensors"] = ["c", "b", made_up.ID]
    view = press(view, ["down"], live)
    assert view.sensor == "b"
    assert "sensor 2 of 3" in "\n".join(drawn(live, view=view))
    turns = [view := press(view, [key], live) for key in ("n", "tab", "n", "N", "shift-tab")]
    assert [v.sensor for v in turns] == ["c", made_up.ID, "b", made_up.ID, "c"]
    assert press(view, ["down"], {**live, "sensors": ["b"]}).sensor == "b"
    one = made_up.live()
    assert press(View(), ["n"], one).sensor == made_up.ID
    assert press(View(), ["n"], {}).sensor is None


def test_pages_are_turned_and_turned_back():
    """A key turns to its page and back, Esc goes back, another page's key changes over."""
    live = made_up.live()
    for keys, page in (("h", "help"), ("hh", "main"), ("?", "help"), ("a", "log"), ("ah", "help"), ("ahh", "main")):
        assert press(View(), keys, live).page == page
    assert press(View(), ["h", "escape"], live).page == Page.MAIN


# Small pictures.


@pytest.mark.parametrize("look", LOOKS)
def test_a_bar_is_full_only_at_one(look: Look):
    """Its parts fill its width, it grows, and 0.999 is not certain."""
    full, _, empty = look.bar
    words = ["".join(piece for piece, _ in bar(share, 8, look, "")) for share in (-1, 0, 0.3, 0.5, 0.999, 1, 7)]
    assert {len(word) for word in words} == {8}
    assert words[0] == words[1] == empty * 8
    assert words[3].startswith(full * 4)
    assert words[5] == words[6] == full * 8
    counts = [word.count(full) for word in words]
    assert counts == sorted(counts)
    assert words[4] != words[5]


def test_a_sparkline_shows_the_newest_and_does_not_exaggerate():
    """The last values, the newest to the right; noise stays low; gaps are gaps."""
    look = unicode_look(256)
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7], 4, look) == "▅▆▇█"
    assert sparkline([0.0, 0.2], 4, look) == "▁▁  "
    assert sparkline([-5.0, 0.0], 2, look) == "▁█"
    assert sparkline([None, 7.0], 2, look) == " █"
    assert sparkline([], 3, look) == sparkline([None], 3, look) == "   "


@pytest.mark.parametrize(("width", "height"), [(6000, 4000), (4000, 6000), (3000, 3000), (10000, 1), (1, 10000)])
def test_a_map_has_the_aspect_of_its_sensor(width: int, height: int):
    """A cell is twice as high as wide; a side that would vanish keeps one cell."""
    columns, lines = map_size(width, height, 60, 20)
    assert 1 <= columns <= 60
    assert 1 <= lines <= 20
    assert columns == 60 or lines == 20
    if columns > 1 and lines > 1:
        assert abs(columns / (2 * lines) / (width / height) - 1) < 0.1


def test_a_map_has_its_defects_where_they_are():
    """Corners in the corners; the strongest state shows where several share a cell; the selected one is marked."""
    corners = [
        made_up.defect(0, 100),
        made_up.defect(99, 100, state="candidate"),
        made_up.defect(49 * 100, 100, state="recovered"),
        made_up.defect(49 * 100 + 1, 100, state="stable"),
        made_up.defect(49 * 100 + 99, 100),
    ]
    plain = sensor_map(corners, None, (100, 50), (20, 5), ascii_look(0)).plain.split("\n")
    assert plain == ["*" + 18 * " " + "o", " " * 20, " " * 20, " " * 20, "*" + 18 * " " + "*"]
    dots = sensor_map(corners, corners[4], (100, 50), (20, 5), unicode_look(256)).plain.split("\n")
    assert (dots[0][0], dots[0][-1], dots[4][0], dots[4][-1]) == ("⠁", "⠈", "⡀", "◆")


def bright_cells(text: Text) -> list[tuple[int, int]]:
    """Return (line, column) of the shades that stand for the strongest excess."""
    return [(y, x) for y, line in enumerate(text.plain.split("\n")) for x, c in enumerate(line) if c == "@"]


def test_a_magnifier_keeps_its_centre_and_its_edges():
    """The centre is the brightest and in the middle; what is below zero and outside the sensor looks different."""
    patch = made_up.patch(6)
    shades = magnifier(patch, 26, 13, ascii_look(0))
    lines = shades.plain.split("\n")
    assert (len(lines), {len(line) for line in lines}) == (13, {26})
    assert bright_cells(shades) == [(6, 12), (6, 13)]
    assert all(line.endswith("?" * 8) for line in lines)
    assert set(lines[10][6:8]) <= set("-~=%&$")
    for look in LOOKS:
        for columns, rows in ((11, 6), (30, 15), (60, 20), (12, 30), (2, 1)):
            fitted = magnifier(patch, columns, rows, look).split("\n")
            assert len(fitted) <= rows
            assert max(line.cell_len for line in fitted) <= max(columns, 2)


@pytest.mark.parametrize("look", [unicode_look(16), console_look(16), ascii_look(16)])
@pytest.mark.parametrize(("centre", "colour"), [(211.0, "red"), (-211.0, "blue")])
def test_sixteen_colours_tell_the_sign(look: Look, centre: float, colour: str):
    """Red is above zero and blue below, as help says, for the strongest too; what is next to nothing is black."""
    shown = magnifier([[0.1, 0.1, 0.1], [0.1, centre, 0.1], [0.1, 0.1, 0.1]], 12, 6, look)
    styles = [span.style for span in shown.spans if isinstance(span.style, Style)]
    colours = {c.name for style in styles for c in (style.color, style.bgcolor) if c is not None}
    assert colours == {"black", f"bright_{colour}"}


def test_a_stronger_neighbour_does_not_hide_the_centre():
    """Brightness is relative to the centre, in which one is interested."""
    patch = made_up.patch(4, centre=10.0)
    patch[0][0] = 5000.0
    assert (4, 8) in bright_cells(magnifier(patch, 18, 9, ascii_look(0)))
