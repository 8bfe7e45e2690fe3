"""The terminal of the dashboard: keys and signals in, a full screen out, and everything put back at the end."""

from __future__ import annotations

import os
import select
import signal
import termios
from collections.abc import Callable
from contextlib import ExitStack, suppress
from types import FrameType, TracebackType
from typing import Any, Self

from rich.console import Console, RenderableType
from rich.control import Control
from rich.screen import Screen

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGWINCH)

_ESCAPE_ALONE_S = 0.05
"""How long the rest of a sequence may take: a slow ssh link sends it in one piece all the same."""

_FINALS = {"A": "up", "B": "down", "H": "home", "F": "end", "Z": "shift-tab"}
_TILDES = {"1": "home", "4": "end", "5": "page up", "6": "page down", "7": "home", "8": "end"}
_CONTROLS = {0x03: "ctrl-c", 0x09: "tab", 0x7F: "backspace", 0x08: "backspace", 0x0D: "enter", 0x0A: "enter"}


class KeyParser:
    """Turns the bytes of a terminal into names of keys, however they are cut into pieces."""

    def __init__(self) -> None:
        self._rest = b""

    @property
    def waiting(self) -> bool:
        """Whether an ESC came whose meaning depends on what follows."""
        return bool(self._rest)

    def feed(self, data: bytes) -> list[str]:
        """Return the keys complete with these bytes. Sequences without a meaning here are swallowed whole."""
        self._rest += data
        keys = []
        while self._rest:
            length, key = _first_key(self._rest)
            if not length:
                break
            self._rest = self._rest[length:]
            if key is not None:
                keys.append(key)
        return keys

    def flush(self) -> list[str]:
        """Return the key that an unfinished sequence is, now that nothing has followed."""
        rest, self._rest = self._rest, b""
        return ["escape"] if rest == b"\x1b" else []


def _first_key(data: bytes) -> tuple[int, str | None]:
    """Return (length, key) of the first sequence; length 0 if it is not complete."""
    first = data[0]
    if first != 0x1B:
        return 1, chr(first) if 0x20 <= first < 0x7F else _CONTROLS.get(first)
    if len(data) == 1:
        return 0, None
    if data[1:2] not in (b"[", b"O"):
        return 1, "escape"
    at = 2
    # The Linux console sends its function keys as ESC [ [ A.
    if data[:3] == b"\x1b[[":
        at = 3
    start = at
    while at < len(data) and 0x20 <= data[at] <= 0x3F:
        at += 1
    if at == len(data):
        return 0, None
    final = chr(data[at])
    if start == 3:
        return at + 1, None
    if final == "~":
        return at + 1, _TILDES.get(data[start:at].split(b";")[0].decode())
    return at + 1, _FINALS.get(final)


class Terminal:
    """The terminal while the dashboard has it: alternate screen, no cursor, keys without Enter.

    Enter and leave from the main thread, since signals are taken too. Leaving puts everything back, whatever the
    reason, even if the terminal itself has gone.
    """

    def __init__(self, console: Console, keyboard: int, display: int) -> None:
        """Keep the file descriptors of input and output; nothing changes before it is entered."""
        self._console = console
        self._keyboard = keyboard
        self._display = display
        self._parser = KeyParser()
        self._undo = ExitStack()
        self._bell: tuple[int, int] = (-1, -1)
        self._drawn: tuple[int, int] | None = None

    def __enter__(self) -> Self:
        with ExitStack() as undo:
            listening, ringing = self._bell = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
            undo.callback(os.close, listening)
            undo.callback(os.close, ringing)
            # A signal's number is written here by Python itself; the handler has nothing left to do.
            undo.callback(signal.set_wakeup_fd, signal.set_wakeup_fd(ringing, warn_on_full_buffer=False))
            for number in _SIGNALS:
                undo.callback(signal.signal, number, signal.signal(number, _ignore))
            before = termios.tcgetattr(self._keyboard)
            undo.callback(_even_if_gone, lambda: termios.tcsetattr(self._keyboard, termios.TCSADRAIN, before))
            termios.tcsetattr(self._keyboard, termios.TCSADRAIN, _without_lines(before))
            undo.callback(_even_if_gone, self._show_normal)
            self._console.set_alt_screen(True)
            self._console.show_cursor(False)
            self._undo = undo.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._undo.close()
        # Who rings later must not write to whatever has these numbers then.
        self._bell = (-1, -1)

    def wake(self) -> None:
        """End `wait` at once; from any thread, also when the terminal was left meanwhile."""
        # Full means that it will wake anyhow.
        with suppress(OSError):
            os.write(self._bell[1], b"\0")

    def wait(self, timeout_s: float | None) -> tuple[list[str], set[int]]:
        """Wait for keys, signals or `wake`; return the keys and the signals. A terminal that has gone is SIGHUP."""
        if self._parser.waiting:
            timeout_s = _ESCAPE_ALONE_S
        ready, _, _ = select.select([self._keyboard, self._bell[0]], [], [], timeout_s)
        signals: set[int] = set()
        if self._bell[0] in ready:
            signals = set(os.read(self._bell[0], 4096)) - {0}
        if self._keyboard not in ready:
            return ([] if ready else self._parser.flush()), signals
        try:
            data = os.read(self._keyboard, 4096)
        except OSError:
            data = b""
        if not data:
            signals.add(signal.SIGHUP)
        return self._parser.feed(data), signals

    def size(self) -> tuple[int, int]:
        """Return (columns, lines); a terminal that does not know, such as a serial line, has 80x24."""
        columns, lines = os.get_terminal_size(self._display)
        return columns or 80, lines or 24

    def draw(self, picture: RenderableType, size: tuple[int, int]) -> None:
        """Fill the screen."""
        self._console.size = size
        before = [Control.home()]
        if size != self._drawn:
            # What the terminal made of the last screen at its new size is of no use; else there is no need to flicker.
            before.insert(0, Control.clear())
        self._console.print(*before, Screen(picture), end="")
        self._drawn = size

    def _show_normal(self) -> None:
        # Where there is no alternate screen, nothing of ours stays behind.
        self._console.clear()
        self._console.show_cursor(True)
        self._console.set_alt_screen(False)


def _ignore(_number: int, _frame: FrameType | None) -> None:
    """Leave the signal to `Terminal.wait`."""


def _even_if_gone(step: Callable[[], object]) -> None:
    """Take a step back to the terminal as it was; one that hung up needs none."""
    with suppress(OSError, termios.error):
        step()


def _without_lines(attributes: list[Any]) -> list[Any]:
    """Return the attributes for keys that come one by one, unseen, with Ctrl-C as a key."""
    changed = [*attributes[:6], list(attributes[6])]
    changed[3] &= ~(termios.ICANON | termios.ECHO | termios.ISIG)
    changed[6][termios.VMIN], changed[6][termios.VTIME] = 1, 0
    return changed
