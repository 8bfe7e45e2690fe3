"""A terminal on a series of darks: orders it from the daemon, or from one of its own, and shows how it does."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from hotpixd.attached import OwnDaemon
from hotpixd.feed import FeedClient, FeedError
from hotpixd.views import tables
from hotpixd.views.text import printable

_LOOK_EVERY_S = 0.25
_GONE_FOR_S = 30.0
"""How long a daemon that has gone is waited for: the service manager starts it again."""

_ENDED = ("done", "stopped", "failed")
_DEFECTS_SHOWN = 20

Series = Mapping[str, Any]


def run_darks(
    order: Mapping[str, Any],
    socket: Path | None,
    own: Callable[[], OwnDaemon],
    stop: Callable[[], bool],
    *,
    as_json: bool,
) -> int:
    """Have a series shot, and show it; return the exit code: 1 if it did not come to its end.

    Parameters
    ----------
    order : what `intake.darks.SeriesOrder` holds
    socket : of the daemon that has the state open; None: start one of our own
    own : starts it
    stop : becomes true when the user wants to stop
    """
    console = Console(stderr=True, highlight=False)
    if socket is not None:
        return _shown(order, socket, console, stop, as_json=as_json)
    with contextlib.ExitStack() as stack:
        daemon = own()
        stack.callback(daemon.stop)
        if not daemon.answers():
            sys.stderr.write(daemon.said)
            return daemon.stop() or 1
        return _shown(order, daemon.socket, console, stop, as_json=as_json)


def end_darks(socket: Path) -> int:
    """Have the series that a daemon shoots end."""
    with contextlib.closing(FeedClient(socket)) as client:
        series = client.ask("end-series")["series"]
    print("No darks are being shot." if series is None or series["stage"] in _ENDED else "The series ends.")
    return 0


def _shown(order: Mapping[str, Any], socket: Path, console: Console, stop: Callable[[], bool], *, as_json: bool) -> int:
    series = _followed(order, socket, console, stop)
    if as_json:
        json.dump({"series": series}, sys.stdout, indent=1)
        print()
    else:
        _say_end(series)
        if series["stage"] == "done":
            with contextlib.closing(FeedClient(socket)) as client:
                tables.print_defects(client.ask("defects"), most=_DEFECTS_SHOWN)
    return 0 if series["stage"] == "done" else 1


def _followed(order: Mapping[str, Any], socket: Path, console: Console, stop: Callable[[], bool]) -> dict[str, Any]:
    """Order the series and follow it to its end, through restarts of the daemon."""
    last: dict[str, Any] = {}
    warned: set[str] = set()
    gone_since: float | None = None
    asked_to_end = False
    with _progress(console, int(order["frames"])) as show:
        while True:
            try:
                with contextlib.closing(FeedClient(socket)) as client:
                    # After a restart of the daemon: the same order goes on where it was.
                    client.ask("darks", **{**order, "anew": order["anew"] and not last})
                    while True:
                        last = client.ask("series")["series"]
                        gone_since = None
                        for warning in last["warnings"]:
                            if warning not in warned:
                                warned.add(warning)
                                console.print(f"[yellow]{escape(printable(warning))}[/yellow]", soft_wrap=True)
                        show(last)
                        if last["stage"] in _ENDED and _all_folded(client, last):
                            return last
                        if stop() and not asked_to_end:
                            asked_to_end = True
                            client.ask("end-series")
                            console.print("Stopping after the exposure that the camera is at. Ctrl-C again: at once.")
                        time.sleep(_LOOK_EVERY_S)
            except FeedError as error:
                if not last:
                    raise
                if gone_since is None:
                    gone_since = time.monotonic()
                    console.print(f"[red]The daemon has gone; waiting for it.[/red] ({escape(str(error))})")
                if stop() or time.monotonic() - gone_since > _GONE_FOR_S:
                    return {
                        **last,
                        "stage": "failed",
                        "detail": "The daemon has gone. The same order goes on from here.",
                    }
                time.sleep(1.0)


def _all_folded(client: FeedClient, series: Series) -> bool:
    """Tell whether the darks taken are in the statistic, so that what is told of defects is the end of it."""
    if series["stage"] != "done":
        return True
    status = client.ask("status")
    return not any(source["waiting"] for source in status["sources"])


@contextlib.contextmanager
def _progress(console: Console, frames: int) -> Iterator[Callable[[Series], None]]:
    if not console.is_terminal:
        yield _Lines()
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[note]}"))
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("darks", total=frames, note="")

        def show(series: Series) -> None:
            note = f"{_words(series)}  {series['detail']}" if series["stage"] != "shooting" else _words(series)
            bar.update(task, completed=series["taken"], note=escape(printable(note)))

        yield show


class _Lines:
    """A line for each dark and for each change, where there is no terminal."""

    def __init__(self) -> None:
        self._said = ""

    def __call__(self, series: Series) -> None:
        line = f"{series['stage']}: {series['detail']}"
        if series["stage"] == "shooting":
            line = f"dark {series['taken']} of {series['frames']} taken"
        if line != self._said and not (series["stage"] == "shooting" and not series["taken"]):
            self._said = line
            print(printable(f"{line}  {_words(series)}".rstrip()), file=sys.stderr)


def _words(series: Series) -> str:
    words = []
    if series["exposure_s"] is not None:
        words.append(f"{series['exposure_s']:g} s")
    if series["iso"] is not None:
        words.append(f"ISO {series['iso']:g}")
    if series["temps_c"]:
        words.append(f"{series['temps_c'][-1]:g} C")
    if series["left_s"]:
        minutes, rest = divmod(round(series["left_s"]), 60)
        words.append(f"{minutes}:{rest:02d} left")
    return "  ".join(words)


def _say_end(series: Series) -> None:
    taken, frames = series["taken"], series["frames"]
    begun = f" ({series['resumed_at']} of them before)" if series["resumed_at"] else ""
    temps = series["temps_c"]
    at = f", {temps[0]:g} to {temps[1]:g} C" if temps else ""
    detail = printable(series["detail"])
    if series["stage"] == "done":
        print(f"{taken} of {frames} darks{begun}{at}: {detail}.")
        return
    print(f"{taken} of {frames} darks{begun}{at}. {detail[:1].upper()}{detail[1:].rstrip('.')}.")
    if taken and series["stage"] == "stopped":
        print("Give the same order again to go on.")
