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
from hotpixd.views.text import plain_console, printable

_LOOK_EVERY_S = 0.25
_GONE_FOR_S = 30.0
"""How long a daemon that has gone is waited for: the service manager starts it again."""

_FOLDED_WITHIN_S = 60.0
_BROKEN_OFF_FOLDED_WITHIN_S = 10.0
"""How long the darks that were taken may take to get into the statistic, after the end and after a bad one."""

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
    console = plain_console(stderr=True)
    if socket is not None:
        return _shown(_Follower(order, socket, console, stop, may_return=lambda: True), as_json=as_json)
    with contextlib.ExitStack() as stack:
        daemon = own()
        stack.callback(daemon.stop)
        if not daemon.answers():
            sys.stderr.write(daemon.said)
            return daemon.stop() or 1
        # Nobody starts ours again.
        follower = _Follower(order, daemon.socket, console, stop, may_return=lambda: daemon.running)
        return _shown(follower, as_json=as_json)


def end_darks(socket: Path) -> int:
    """Have the series that a daemon shoots end."""
    with contextlib.closing(FeedClient(socket)) as client:
        series = client.ask("end-series")["series"]
    print("No darks are being shot." if series is None or series["stage"] in _ENDED else "The series ends.")
    return 0


def _shown(follower: _Follower, *, as_json: bool) -> int:
    series = follower.follow()
    if as_json:
        json.dump({"series": series}, sys.stdout, indent=1)
        print()
    else:
        _say_end(series)
        if series["stage"] == "done":
            with contextlib.closing(FeedClient(follower.socket)) as client:
                tables.print_defects(client.ask("defects"), most=_DEFECTS_SHOWN)
    return 0 if series["stage"] == "done" and not series["refused"] else 1


class _Follower:
    """Orders a series and follows it to its end, through restarts of the daemon.

    Parameters
    ----------
    may_return : whether a daemon that has gone may come back
    """

    def __init__(
        self,
        order: Mapping[str, Any],
        socket: Path,
        console: Console,
        stop: Callable[[], bool],
        may_return: Callable[[], bool],
    ) -> None:
        self.socket = socket
        self._order = order
        self._console = console
        self._stop = stop
        self._may_return = may_return
        self._last: dict[str, Any] = {}
        self._warned: set[str] = set()
        self._asked_to_end = False

    def follow(self) -> dict[str, Any]:
        """Return how it ended.

        Raises
        ------
        FeedError
            If the daemon does not take the order.
        """
        gone_since: float | None = None
        with _progress(self._console, int(self._order["frames"])) as show:
            while True:
                seen = self._last
                try:
                    with contextlib.closing(FeedClient(self.socket)) as client:
                        return self._follow(client, show)
                except FeedError as error:
                    if not self._last:
                        raise
                    if gone_since is None or self._last is not seen:
                        gone_since = time.monotonic()
                        self._console.print(f"[red]{escape(printable(str(error)))}[/red]", soft_wrap=True)
                    show({**self._last, "stage": "waiting", "detail": "waiting for the daemon"})
                    if self._stop() or not self._may_return() or time.monotonic() - gone_since > _GONE_FOR_S:
                        return {**self._last, "stage": "failed", "detail": "the daemon has gone"}
                    time.sleep(4 * _LOOK_EVERY_S)

    def _follow(self, client: FeedClient, show: Callable[[Series], None]) -> dict[str, Any]:
        series = client.ask("series")["series"] if self._last else None
        if series is None:
            # After a restart of the daemon the same order goes on where it was.
            series = client.ask("darks", **{**self._order, "anew": self._order["anew"] and not self._last})["series"]
        ended_at: float | None = None
        while True:
            self._last = series
            self._warn(series["warnings"])
            show(series)
            if series["stage"] in _ENDED:
                ended_at = ended_at or time.monotonic()
                if self._stop() and not self._asked_to_end:
                    return dict(series)
                within_s = _FOLDED_WITHIN_S if series["stage"] == "done" else _BROKEN_OFF_FOLDED_WITHIN_S
                if time.monotonic() - ended_at > within_s or _all_folded(client):
                    return dict(series)
            elif self._stop() and not self._asked_to_end:
                self._asked_to_end = True
                client.ask("end-series")
                if series["stage"] == "shooting":
                    first = "The shutter is closed now" if series["bulb"] else "The dark under way is the last one"
                    self._console.print(f"Stopping. {first}; Ctrl-C again does not wait for it.")
            time.sleep(_LOOK_EVERY_S)
            series = client.ask("series")["series"]

    def _warn(self, warnings: list[str]) -> None:
        for warning in warnings:
            if warning not in self._warned:
                self._warned.add(warning)
                self._console.print(f"[yellow]{escape(printable(warning))}[/yellow]", soft_wrap=True)


def _all_folded(client: FeedClient) -> bool:
    """Tell whether the darks taken are in the statistic, so that what is told of defects is the end of it."""
    return not any(source["waiting"] for source in client.ask("status")["sources"])


@contextlib.contextmanager
def _progress(console: Console, frames: int) -> Iterator[Callable[[Series], None]]:
    if not console.is_terminal:
        yield _Lines()
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
    from rich.table import Column

    # Not the whole line: the ^C that the terminal echoes would begin another.
    room = max(20, console.width - 50)
    note = Column(no_wrap=True, overflow="ellipsis", max_width=room)
    columns = (
        TextColumn("darks", table_column=Column(no_wrap=True)),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}", table_column=note),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("darks", total=frames, note="starting")
        said = set()

        def show(series: Series) -> None:
            words = printable(_words(series) if series["stage"] == "shooting" else series["detail"])
            if len(words) > room and series["stage"] not in (*_ENDED, "shooting") and words not in said:
                said.add(words)
                console.print(f"{words[:1].upper()}{words[1:]}", markup=False, soft_wrap=True)
            bar.update(task, completed=series["taken"], note=escape(words))

        yield show


class _Lines:
    """A line for each dark and for each change, where there is no terminal."""

    def __init__(self) -> None:
        self._said = ""
        self._taken = 0

    def __call__(self, series: Series) -> None:
        if series["stage"] == "shooting" or series["taken"] != self._taken:
            # The last one may be told with the end.
            self._taken = series["taken"]
            self._say(f"{series['taken']} of {series['frames']} darks taken", _words(series))
        if series["stage"] != "shooting":
            self._say(f"{series['stage']}: {series['detail']}")

    def _say(self, line: str, words: str = "") -> None:
        if line != self._said:
            self._said = line
            print(printable(f"{line}  {words}".rstrip()), file=sys.stderr)


def _words(series: Series) -> str:
    words = []
    if series["exposure_s"] is not None:
        words.append(f"{series['exposure_s']:g} s")
    if series["iso"] is not None:
        words.append(f"ISO {series['iso']:g}")
    if series["temps_c"]:
        words.append(f"{series['temps_c'][-1]:g} C")
    if series["left_s"] is not None:
        minutes, rest = divmod(round(series["left_s"]), 60)
        hours, minutes = divmod(minutes, 60)
        words.append(f"{hours}:{minutes:02d}:{rest:02d} left" if hours else f"{minutes}:{rest:02d} left")
    return "  ".join(words)


def _say_end(series: Series) -> None:
    taken, frames = series["taken"], series["frames"]
    begun = f" ({series['resumed_at']} of them before)" if series["resumed_at"] else ""
    temps = series["temps_c"]
    at = f", {temps[0]:g} to {temps[1]:g} C" if temps else ""
    detail = printable(series["detail"])
    if series["stage"] == "done":
        refused = f", but {series['refused']} refused: hotpixd status says why" if series["refused"] else ""
        print(f"{taken} of {frames} darks{begun}{at}: {detail}{refused}.")
        return
    end = "" if detail.endswith((".", "?", "!")) else "."
    print(f"{taken} of {frames} darks{begun}{at}. {detail[:1].upper()}{detail[1:]}{end}")
    if taken:
        print("The same order goes on from there.")
