"""The live dashboard: attaches a terminal to a running daemon, and detaches without a trace.

Three threads: one follows the live state and reconnects, one asks for the
surroundings of the selected site, and the main one has the terminal. It sleeps
until a key, a signal or either of them wakes it.
"""

from __future__ import annotations

import io
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import replace
from itertools import islice
from pathlib import Path
from signal import SIGHUP, SIGINT, SIGTERM
from types import TracebackType
from typing import Any, Protocol, Self

from rich.console import Console

from hotpixd.views.choices import MOST_LISTED, Live, View, pressed, settled
from hotpixd.views.drawing import Look, ascii_look, console_look, unicode_look
from hotpixd.views.panels import Scene, Surroundings
from hotpixd.views.screen import compose
from hotpixd.views.terminal import Terminal
from hotpixd.views.text import plain_console

WRONG_USE = 2
"""Exit code where there is no terminal to draw on."""

_FRAME_S = 0.1
_RECONNECT_S = 1.0
_ASK_AGAIN_S = 2.0

_PICTURE_WITHIN = 20
"""Changes waited for until a picture is complete."""

_REACH = 12
"""Pixels around the selected site that are asked for: more than a patch shows on all but huge terminals."""


class Client(Protocol):
    """A connection to the daemon. One thread watches, another asks, and a third may close; each may raise OSError."""

    @property
    def hello(self) -> Mapping[str, Any]:
        """What the daemon said of itself."""

    def watch(self) -> Iterator[Live]:
        """Go through the whole live state, as it is after each change; ends when closed."""

    def ask(self, name: str, /, **arguments: Any) -> Mapping[str, Any]:
        """Return the answer to a question. If it is refused, others may be asked."""

    def close(self) -> None:
        """Hang up."""


def run_dashboard(
    connect: Callable[[], Client], *, where: str, owned: bool = False, console: Console | None = None
) -> int:
    """Show the dashboard until the user detaches or the terminal goes; return the exit code.

    Call from the main thread.

    Parameters
    ----------
    connect : makes a connection, or raises OSError if no daemon answers
    where : where the daemon is looked for, for people
    owned : whether the caller ends the daemon when the user leaves; the words on the screen are then of stopping
    console : on stdout unless given
    """
    console = console or plain_console()
    if not (sys.stdin.isatty() and sys.stdout.isatty()) or console.is_dumb_terminal:
        print("hotpixd: the dashboard needs a terminal; `hotpixd status` prints lines instead.", file=sys.stderr)
        return WRONG_USE
    look = look_of(first_environment(), console)
    with (
        Terminal(console, sys.stdin.fileno(), sys.stdout.fileno()) as terminal,
        _Attachment(connect, terminal.wake) as daemon,
    ):
        return _run(terminal, daemon, where, look, owned)


def save_picture(client: Client, path: Path, *, width: int = 120, height: int = 36) -> None:
    """Save what the dashboard would show now as an SVG picture; sizes in characters.

    Raises
    ------
    OSError
        If the daemon goes, or the file cannot be written.
    """
    # The candidates are only worked out while someone watches: at first there may be none, or old ones.
    for live in islice(client.watch(), _PICTURE_WITHIN):
        if _is_complete(live):
            break
    view, defects = settled(live, View())
    # In a picture of half blocks, the lines between lines would show.
    look = replace(unicode_look(256), pixel="full")
    scene = Scene(live, view, defects, look, where="")
    if view.sensor is not None and view.site is not None:
        scene = replace(scene, around=_ask_around(client, view.sensor, view.site))
    console = Console(
        file=io.StringIO(),
        record=True,
        emoji=False,
        width=width,
        height=height,
        force_terminal=True,
        color_system="truecolor",
        no_color=False,
    )
    console.print(compose(scene, width, height).picture)
    console.save_svg(os.fspath(path), title="hotpixd")


def _is_complete(live: Live) -> bool:
    """Whether the candidates of the sensor shown first are those that its counters tell of."""
    for id_ in live.get("sensors", [])[:1]:
        sensor, listed = live.get(f"sensor:{id_}"), live.get(f"defects:{id_}")
        if sensor is None or listed is None:
            return False
        counted = sensor["stable"] + sensor["candidate"] + sensor["recovered"]
        return bool(len(listed) == min(counted, MOST_LISTED))
    return True


def look_of(environment: Mapping[str, str], console: Console) -> Look:
    """Return what a terminal can show, by the environment and what rich found out about it.

    Parameters
    ----------
    environment : as the process was started with
    """
    locale = environment.get("LC_ALL") or environment.get("LC_CTYPE") or environment.get("LANG") or ""
    unicode = "utf8" in locale.lower().replace("-", "") and console.encoding.startswith("utf")
    depth = {None: 0, "standard": 16, "windows": 16, "256": 256, "truecolor": 256}[console.color_system]
    colours = 0 if console.no_color else depth
    if not unicode:
        return ascii_look(colours)
    return console_look(colours) if environment.get("TERM") == "linux" else unicode_look(colours)


def first_environment() -> dict[str, str]:
    """Return the environment that the process was started with.

    Not os.environ: in the C locale, Python writes LC_CTYPE=C.UTF-8 into it (PEP 538), which says nothing about the
    terminal.
    """
    given = Path("/proc/self/environ").read_bytes()
    pairs = (os.fsdecode(entry).partition("=") for entry in given.split(b"\0") if entry)
    return {name: value for name, _, value in pairs}


def _run(terminal: Terminal, daemon: _Attachment, where: str, look: Look, owned: bool) -> int:
    view = View()
    rows, limit = 1, 0
    drawn_at = -_FRAME_S
    stale = True
    while True:
        left = drawn_at + _FRAME_S - time.monotonic()
        if stale and left <= 0:
            live, trouble = daemon.live, daemon.trouble
            view, defects = settled(live, view)
            daemon.look_at(live, view)
            size = terminal.size()
            screen = compose(Scene(live, view, defects, look, where, owned, trouble, daemon.around), *size)
            rows, limit = screen.rows, screen.scroll_limit
            try:
                terminal.draw(screen.picture, size)
            except OSError:
                return 128 + SIGHUP
            drawn_at, stale = time.monotonic(), False
            continue
        keys, signals = terminal.wait(left if stale else None)
        if daemon.failure is not None:
            raise daemon.failure
        if SIGINT in signals or not {"q", "ctrl-c"}.isdisjoint(keys):
            return 0
        for number in (SIGTERM, SIGHUP):
            if number in signals:
                return 128 + number
        for key in keys:
            view, defects = settled(daemon.live, view)
            view = pressed(view, key, daemon.live, defects, rows, limit)
        stale = True


class _Attachment:
    """What is known of the daemon: its live state, and what is around the selected site.

    The attributes are replaced as a whole by the two threads, and only read by others.
    """

    def __init__(self, connect: Callable[[], Client], wake: Callable[[], None]) -> None:
        self._connect = connect
        self._wake = wake
        self._client: Client | None = None
        self._changed = threading.Condition()
        self._closed = False
        # Sensor, site, and how many frames it had then.
        self._wanted: tuple[str, int, int] | None = None
        self._asked: tuple[str, int, int] | None = None
        self._threads = [
            threading.Thread(target=self._guarded, args=(work,), name=name, daemon=True)
            for name, work in (("watch", self._watch), ("around", self._ask))
        ]
        self.live: Live = {}
        """The live state, the last known if the daemon has gone. Empty if none was seen yet."""
        self.trouble: str | None = None
        """Why there is no connection, in a sentence."""
        self.around: Surroundings | None = None
        """The answer that came last."""
        self.failure: BaseException | None = None
        """A fault of the program itself, for the main thread to raise."""

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            client = self._client
        if client is not None:
            client.close()
        # Not longer: a thread may wait for an answer of a daemon that is busy, and ends with the process.
        for thread in self._threads:
            thread.join(timeout=0.5)

    def look_at(self, live: Live, view: View) -> None:
        """Want to know what is around the selected site; asked again as frames come."""
        wanted = None
        if view.sensor is not None and view.site is not None:
            wanted = view.sensor, view.site, (live.get(f"sensor:{view.sensor}") or {}).get("frames", 0)
        with self._changed:
            if wanted != self._wanted:
                self._wanted = wanted
                self._changed.notify_all()

    def _guarded(self, work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:
            self.failure = error
            self._wake()

    def _watch(self) -> None:
        while not self._closed:
            try:
                self._follow()
            except OSError as error:
                self.trouble = str(error)
            if self._closed:
                return
            self._wake()
            with self._changed:
                self._changed.wait_for(lambda: self._closed, _RECONNECT_S)

    def _follow(self) -> None:
        with closing(self._connect()) as client:
            with self._changed:
                if self._closed:
                    return
                self._client = client
                self._changed.notify_all()
            for live in client.watch():
                # A copy: the client may go on changing its own.
                now = dict(live)
                if self.trouble is not None or now != self.live:
                    self.live, self.trouble = now, None
                    self._wake()
        self.trouble = "The daemon hung up."

    def _ask(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(
                    lambda: self._closed or (self._client and self._wanted not in (None, self._asked))
                )
                client, self._asked = self._client, self._wanted
                if self._closed or client is None or self._asked is None:
                    return
                sensor, site, _ = self._asked
            try:
                around = _ask_around(client, sensor, site)
            except OSError as error:
                around = Surroundings(sensor, site, None, str(error))
            if around != self.around:
                self.around = around
                self._wake()
            with self._changed:
                self._changed.wait_for(self._looks_elsewhere, _ASK_AGAIN_S)
                if around.patch is None:
                    self._asked = None

    def _looks_elsewhere(self) -> bool:
        return self._closed or (self._wanted or ())[:2] != (self._asked or ())[:2]


def _ask_around(client: Client, sensor: str, site: int) -> Surroundings:
    answer = client.ask("around", sensor=sensor, site=site, reach=_REACH)
    return Surroundings(sensor, site, answer["patch"])
