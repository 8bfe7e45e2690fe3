"""What the reading commands show on a terminal: turns their answers into tables and sentences."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape

from hotpixd.core.frame import SampleKind
from hotpixd.core.overview import STATIC_SCENE, STATIC_SCENE_ADVICE
from hotpixd.views.text import (
    agreement,
    agreement_words,
    excess_adu,
    excess_sigma,
    history_words,
    plain_console,
    printable,
    sensor_name,
)
from hotpixd.words import many

if TYPE_CHECKING:
    from rich.table import Table

Answer = Mapping[str, Any]

_ALERTS_SHOWN = 5

_WIDEST_TABLE = 200

_RECEIVED = "received but not folded"

_NAMED = 3
"""Sensors that one line names."""


def print_defects(
    answer: Answer, *, most: int = 1_000_000, not_counted: Mapping[str, Mapping[str, int]] | None = None
) -> None:
    """Print each sensor with its defects, strongest first.

    Parameters
    ----------
    answer : of `answers.defects`
    most : rows of one table before the rest is only counted
    not_counted : reasons why frames were no new evidence, by sensor id
    """
    console = plain_console()
    if not answer["sensors"]:
        console.print("No sensor is known yet.")
    for sensor in answer["sensors"]:
        console.print(f"\n[bold]{escape(sensor_name(sensor))}[/bold]  {_frames(sensor)}", soft_wrap=True)
        _print_not_counted(console, sensor, (not_counted or {}).get(sensor["id"], {}))
        found = sensor["defects"]
        declared = [(defect["x"], defect["y"]) for defect in sensor.get("declared", [])]
        if words := agreement_words(agreement(found, declared)):
            console.print(f"  {words}")
        if trouble := sensor.get("declared_unusable"):
            console.print(f"  [red]{escape(printable(trouble))}[/red]", soft_wrap=True)
        if not found:
            console.print("  no stable defect")
            continue
        kinds: dict[str, int] = {}
        for defect in found:
            label = defect["kind"] if defect["state"] == "stable" else f"{defect['state']}"
            kinds[label] = kinds.get(label, 0) + 1
        console.print("  " + ", ".join(f"{n} {kind}" for kind, n in sorted(kinds.items(), key=lambda k: -k[1])))
        titles = ("x", "y", "", "kind", "state", "certain", "excess", "sigma", "dark ADU/s", "frames")
        table = _table(*titles, left=("", "kind", "state"))
        shown = sorted(found, key=lambda d: (-d["certainty"], -abs(d["excess_sigma"] or 0.0)))
        for defect in shown[:most]:
            table.add_row(
                str(defect["x"]),
                str(defect["y"]),
                defect["colour"],
                defect["kind"],
                defect["state"],
                f"{100 * defect['certainty']:.0f} %",
                excess_adu(defect["excess_adu"]),
                excess_sigma(defect["excess_sigma"]),
                _number(defect["dark_current_adu_per_s"], ".0f"),
                "" if defect["frames_to_stable"] is None else str(defect["frames_to_stable"]),
            )
        _print_table(console, table)
        if len(shown) > most:
            console.print(f"  ... and {len(shown) - most} more: hotpixd defects")


def _print_not_counted(console: Console, sensor: Answer, reasons: Mapping[str, int]) -> None:
    for reason, count in reasons.items():
        console.print(f"  {many(count, 'frame')} not counted: {escape(reason)}", soft_wrap=True)
        if reason == STATIC_SCENE and count > sensor["frames_counted"]:
            console.print(f"    {STATIC_SCENE_ADVICE}", soft_wrap=True)
            if sensor["samples"] == SampleKind.RENDERED:
                # Only rendered darks can look like light frames; then most of them repeat a scene.
                console.print("    If the cap was on: hotpixd rebuild FOLDER --kind dark", soft_wrap=True)


_LATEST_CHANGES, _LATEST_SESSIONS = 30, 12


def print_history(answer: Answer, *, everything: bool = False) -> None:
    """Print the answer of `history.history`: its latest sessions and changes, or all."""
    console = plain_console()
    if not answer["sensors"]:
        console.print("No sensor is known yet.")
    since = answer["since"]
    for sensor in answer["sensors"]:
        sessions, months, events = sensor["sessions"], sensor["months"], sensor["events"]
        span = f", {_date(sensor['begin'])} to {_date(sensor['end'])}" if sensor["frames"] else ""
        counts = f"{many(sensor['frames'], 'frame')} in {many(sensor['sessions_in_all'], 'session')}"
        console.print(f"\n[bold]{escape(sensor_name(sensor))}[/bold]  {counts}{span}", soft_wrap=True)
        console.print(f"  {many(sensor['defects_now'], 'stable defect')}")
        if since is not None and not sessions:
            console.print(f"  no session since {escape(printable(since))}")
        elif since is not None:
            console.print(f"  {many(len(sensor['new']), 'new defect')} since {escape(printable(since))}")
        for sentence in history_words(sensor):
            console.print(f"  {escape(sentence)}", soft_wrap=True)
        table = _table(
            "", "session", "frames", "counted", "exposure s", "sensor C", "new", "gone", "defects", left=("session",)
        )
        shown = sessions if everything else sessions[-_LATEST_SESSIONS:]
        for one in shown:
            table.add_row(
                str(one["session"]),
                _minute(one["begin"]),
                str(one["frames"]),
                str(one["frames_counted"]),
                _range(one["exposure_s"]),
                _range(one["sensor_temp_c"]),
                _count(one["new"]),
                _count(one["recovered"]),
                str(one["defects"]),
            )
        if sessions:
            _print_table(console, table)
        if len(months) > 1:
            table = _table("month", "frames", "new", "gone", "defects")
            for month in months:
                changed = [_count(month["new"]), _count(month["recovered"])]
                table.add_row(month["month"], str(month["frames"]), *changed, str(month["defects"]))
            _print_table(console, table)
        table = _table("when", "session", "x", "y", "", "kind", "change", left=("when", "", "kind", "change"))
        latest = events if everything else events[-_LATEST_CHANGES:]
        for event in latest:
            where = [str(event["x"]), str(event["y"]), event["colour"]]
            table.add_row(_minute(event["at"]), str(event["session"]), *where, event["kind"], event["change"])
        if latest:
            _print_table(console, table)
        older = ((len(sessions) - len(shown), "session"), (len(events) - len(latest), "change"))
        if left := " and ".join(many(count, unit) for count, unit in older if count):
            console.print(f"  ... and before that {left}: hotpixd history --all", soft_wrap=True)


def _table(*titles: str, left: Sequence[str] = ()) -> Table:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 1))
    for title in titles:
        table.add_column(title, justify="left" if title in left else "right", no_wrap=True)
    return table


def _date(moment: str) -> str:
    return moment[:10]


def _minute(moment: str) -> str:
    return moment[:16].replace("T", " ")


def _count(number: int) -> str:
    return str(number) if number else ""


def _range(limits: Sequence[float | None]) -> str:
    low, high = limits
    if low is None or high is None:
        return ""
    return f"{low:.3g}" if f"{low:.3g}" == f"{high:.3g}" else f"{low:.3g}–{high:.3g}"


def print_status(answer: Answer) -> None:
    """Print the answer of `answers.status`."""
    console = plain_console()
    console.print(f"State in {escape(printable(answer['state']))}", soft_wrap=True)
    if daemon := answer.get("daemon"):
        console.print(escape(printable(daemon["activity"])), soft_wrap=True)
    for source in answer["sources"]:
        told = f"{source['name']} {source.get('condition') or source['status']}"
        told += f": {source['detail']}" if source["detail"] else ""
        console.print(f"  {escape(printable(told))}", soft_wrap=True)
    shots = _as_folded(answer)
    console.print(", ".join(f"{n} {word}" for word, n in shots.items() if n) or "No shot yet.")
    if shots.get(_RECEIVED) and not answer.get("daemon"):
        console.print("  What is not folded yet is folded when the daemon starts, or by the next scan.", soft_wrap=True)
    for sensor in answer["sensors"]:
        console.print(f"\n[bold]{escape(sensor_name(sensor))}[/bold]  {_frames(sensor)}", soft_wrap=True)
        candidates = many(sensor["candidate"], "candidate")
        console.print(f"  {sensor['stable']} stable, {candidates}, {sensor['recovered']} recovered")
        _print_not_counted(console, sensor, sensor["not_counted"])
        last = sensor["last_shot"]
        if last:
            console.print(f"  last shot {escape(printable(last['name']))}: {escape(_settings(last))}", soft_wrap=True)
    if answer["alerts"]:
        console.print("\nLatest alerts:")
        for alert in answer["alerts"][-_ALERTS_SHOWN:]:
            console.print(f"  {alert['at'][:16].replace('T', ' ')} {escape(printable(alert['text']))}", soft_wrap=True)
    if answer["refused"]:
        console.print("\nRefused:")
        for shot in answer["refused"]:
            words = printable(f"{shot['path']}: {shot['reason'] or ''}")
            console.print(f"  {escape(words)}", soft_wrap=True)


def _as_folded(answer: Answer) -> dict[str, int]:
    """Return the numbers of shots of a status; those that are to be folded again are not among those folded.

    An interruption came between their verdict, which the ledger has, and the next generation.
    """
    sensors = answer["sensors"]
    again = sum(sensor.get("frames_waiting", 0) for sensor in sensors)
    shots = dict(answer["shots"])
    if again:
        shots["received"] += again
        shots["folded"] -= again
        shots["counted"] = min(shots["counted"], sum(sensor["frames_counted"] for sensor in sensors))
    return {_RECEIVED if word == "received" else word: n for word, n in shots.items()}


def print_least_variance(answer: Answer) -> None:
    """Print the answer of `answers.least_variance`."""
    from rich.table import Table

    console = plain_console()
    if not answer["sensors"]:
        console.print("No sensor is known yet.")
    for sensor in answer["sensors"]:
        console.print(f"\n[bold]{escape(sensor_name(sensor))}[/bold]  {_frames(sensor)}", soft_wrap=True)
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 2))
        for title in ("x", "y", "colour", "M2", "mean"):
            table.add_column(title, justify="left" if title == "colour" else "right")
        for row in sensor["least"]:
            table.add_row(str(row["x"]), str(row["y"]), row["colour"], f"{row['m2']:.6g}", f"{row['mean']:.6g}")
        _print_table(console, table)


def print_verify(answer: Answer) -> None:
    """Print the answer of `answers.verify` in one line."""
    problems = [printable(problem) for problem in answer["problems"]]
    if problems:
        more = len(problems) - 1
        others = f" ({more} more: hotpixd verify --json)" if more else ""
        plain_console().print(f"[bold red]damaged:[/bold red] {escape(problems[0])}{others}", soft_wrap=True)
        return
    sensors = answer["sensors"]
    frames = sum(sensor["frames"] for sensor in sensors)
    words = f"{many(frames, 'frame')} of {many(len(sensors), 'sensor')}"
    if sensors:
        named = "; ".join(sensor_name(sensor) for sensor in sensors[:_NAMED])
        words += f" ({escape(named)}{'; ...' if len(sensors) > _NAMED else ''})"
    if answer["waiting"]:
        words += f"; {_waiting_words(answer['waiting'])}, which the next run folds"
    plain_console().print(f"[bold]ok:[/bold] everything that was written can be believed, {words}.", soft_wrap=True)


def warn_of_waiting(count: int) -> None:
    """Warn on stderr that an answer lacks shots that were received but not folded, if it does."""
    if count:
        print(f"hotpixd: {_waiting_words(count)}; run scan again.", file=sys.stderr)


def _waiting_words(count: int) -> str:
    return f"{many(count, 'shot')} {_RECEIVED}"


# Texts from outside are printed with soft_wrap: broken by us, they could begin a line with what looks like one of ours.


def _print_table(console: Console, table: Table) -> None:
    """Print a table whole: where the terminal is too narrow it breaks the lines, but no number is lost."""
    wide = plain_console(width=_WIDEST_TABLE)
    wide.width = max(console.width, wide.measure(table).maximum)
    wide.print(table)


def _frames(sensor: Answer) -> str:
    frames, counted = sensor["frames"], sensor["frames_counted"]
    counted_words = "" if counted == frames else f", {counted} counted as evidence"
    return f"{many(frames, 'frame')}{counted_words}"


def _settings(shot: Answer) -> str:
    exposure = shot["exposure_s"]
    taken = (shot["taken_at"] or shot["received_at"])[:16].replace("T", " ")
    words = [taken, shot["kind"] or "not folded"]
    if exposure is not None:
        words.append(f"{exposure:g} s" if exposure >= 0.3 else f"1/{1 / exposure:.0f} s" if exposure > 0 else "0 s")
    if shot["iso"] is not None:
        words.append(f"ISO {shot['iso']:g}")
    if shot["sensor_temp_c"] is not None:
        words.append(f"{shot['sensor_temp_c']:g} C")
    return ", ".join(words)


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
