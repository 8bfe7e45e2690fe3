"""The dashboard on real terminals: driven in tmux, on bare ptys for what ends it, and its keys byte by byte."""

from __future__ import annotations

import fcntl
import io
import json
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import termios
import threading
import time
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self

import pytest
from rich.console import Console

import hotpixd
import live_states as made_up
from hotpixd.views.dashboard import look_of, run_dashboard, save_picture
from hotpixd.views.terminal import KeyParser

WAIT_S = 30.0

PROGRAM = """
import json, os, sys, time
from pathlib import Path
from hotpixd.views.dashboard import run_dashboard

folder = Path(sys.argv[1])

class Client:
    hello = {}

    def __init__(self):
        self.closed = False
        if not (folder / "live.json").exists():
            raise ConnectionRefusedError("Connection refused.")

    def watch(self):
        while not self.closed:
            try:
                live = json.loads((folder / "live.json").read_text())
            except FileNotFoundError:
                raise ConnectionResetError("The daemon hung up.") from None
            if live == "a fault":
                raise RuntimeError("a fault of the program")
            yield live
            time.sleep(0.1)

    def ask(self, name, **arguments):
        if (folder / "slow").exists():
            time.sleep(3600)
        reach = arguments["reach"]
        patch = [[0.1] * (2 * reach + 1) for _ in range(2 * reach + 1)]
        patch[reach][reach] = 50.0
        return {"patch": patch}

    def close(self):
        self.closed = True

code = run_dashboard(Client, where="/run/the.sock", owned=(folder / "owned").exists())
if code == 0:
    print("left with 0")
sys.exit(code)
"""


class Daemon:
    """A made-up daemon for `PROGRAM`: it answers while there is a live state in its folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "program.py").write_text(PROGRAM, encoding="utf-8")
        self.command = [sys.executable, str(folder / "program.py"), str(folder)]
        self.paths = {"PYTHONPATH": str(Path(hotpixd.__file__).parents[1])}

    def says(self, live: object) -> None:
        """Change the live state."""
        new = self.folder / "live.tmp"
        new.write_text(json.dumps(live), encoding="utf-8")
        new.rename(self.folder / "live.json")

    def goes(self) -> None:
        """Stop answering."""
        (self.folder / "live.json").unlink()


@pytest.fixture
def daemon(tmp_path: Path) -> Daemon:
    """Return a daemon that answers with 47 sites."""
    made = Daemon(tmp_path)
    made.says(made_up.live())
    return made


class Tmux:
    """A tmux server of its own, with one window in which a shell runs."""

    def __init__(self, socket: Path, width: int, height: int, environment: dict[str, str]) -> None:
        self._tmux = ["tmux", "-u", "-S", str(socket), "-f", os.devnull]
        settings = [f"{name}={value}" for name, value in environment.items()]
        shell = ["env", *settings, "PS1=$ ", "sh"]
        size = ["-x", str(width), "-y", str(height)]
        subprocess.run([*self._tmux, "new-session", "-d", *size, *shell], check=True, env=os.environ | environment)

    def do(self, *words: str) -> str:
        """Run a command of tmux."""
        return subprocess.run([*self._tmux, *words], check=True, capture_output=True, text=True).stdout

    def press(self, *keys: str) -> None:
        """Press keys, by tmux's names."""
        self.do("send-keys", *keys)

    def screen(self) -> str:
        """Return what the window shows."""
        return self.do("capture-pane", "-p")

    def wait(self, seen: Callable[[str], object]) -> str:
        """Return the screen once it satisfies a condition."""
        until = time.monotonic() + WAIT_S
        while not seen(screen := self.screen()):
            assert time.monotonic() < until, screen
            time.sleep(0.05)
        return screen

    def close(self) -> None:
        """End the server and all in it."""
        self.do("kill-server")


@pytest.fixture
def tmux(daemon: Daemon, tmp_path: Path) -> Iterator[Callable[[int, int], Tmux]]:
    """Return a function that opens a window of a size, with the dashboard in it, attached."""
    if shutil.which("tmux") is None:
        pytest.skip("tmux is not installed")
    opened = []

    def attached(width: int, height: int) -> Tmux:
        window = Tmux(tmp_path / "tmux", width, height, {"LC_ALL": "C.UTF-8", **daemon.paths})
        opened.append(window)
        window.press("stty -a > before; " + " ".join(daemon.command) + "; stty -a > after", "Enter")
        window.wait(lambda screen: "13 stable" in screen)
        return window

    monkey = pytest.MonkeyPatch()
    monkey.chdir(tmp_path)
    yield attached
    monkey.undo()
    for window in opened:
        window.close()


def title(screen: str) -> str:
    """Return the position of the selected site, which is the title of its panel."""
    found = re.search(r"─ (\d+, \d+) ─", screen)
    return "" if found is None else found[1]


def test_the_dashboard_at_80x24(tmux: Callable[[int, int], Tmux], daemon: Daemon, tmp_path: Path):
    """Select, sort, filter, help, log, loss of the daemon and its return, detach: all on the smallest terminal."""
    window = tmux(80, 24)
    screen = window.wait(lambda screen: "▀▀▀▀▀▀▀▀▀▀▀" in screen)
    for part in ("watching 2 sources", "412 frames", "28 candidates", "1 of 47, by certainty, all", "─ 6000",
                 "recovered The defect at 17, 4", "q detach"):  # fmt: skip
        assert part in screen
    first = title(screen)
    window.press("Down", "j", "Down")
    screen = window.wait(lambda screen: "4 of 47" in screen)
    assert title(screen) != first
    chosen = title(screen)
    window.press("s", "s")
    screen = window.wait(lambda screen: "by position" in screen)
    assert title(screen) == chosen
    daemon.says(made_up.live(made_up.defects(60)))
    assert title(window.wait(lambda screen: "of 60, by position" in screen)) == chosen
    window.press("f", "f")
    screen = window.wait(lambda screen: "by position, candidate" in screen)
    assert "stuck" not in screen.split("kind")[1].split("by position")[0]
    window.press("End")
    window.wait(lambda screen: re.search(r"─ (\d+) of \1, by position, candidate", screen))
    window.press("h")
    assert "detach: the daemon goes on" in window.wait(lambda screen: "─ help ─" in screen)
    window.press("Escape")
    window.wait(lambda screen: "by position, candidate" in screen)
    window.press("a")
    window.wait(lambda screen: "11 frames not counted: the scene does not move" in screen)
    window.press("a")
    window.wait(lambda screen: "by position, candidate" in screen)
    daemon.goes()
    screen = window.wait(lambda screen: "No daemon answers at /run/the.sock; waiting" in screen)
    assert "412 frames" in screen
    daemon.says(made_up.live(made_up.defects(5)))
    window.wait(lambda screen: "No daemon" not in screen and "13 stable" not in screen)
    window.press("q")
    screen = window.wait(lambda screen: "left with 0" in screen)
    assert "412 frames" not in screen
    window.wait(lambda _: (tmp_path / "after").exists() and (tmp_path / "after").stat().st_size)
    assert (tmp_path / "after").read_text() == (tmp_path / "before").read_text()
    assert window.do("display-message", "-p", "#{cursor_flag} #{alternate_on}").split() == ["1", "0"]


def test_the_dashboard_at_200x60_and_resized(tmux: Callable[[int, int], Tmux]):
    """More columns and more rows where there is space; it follows each change of size at once, back and forth."""
    window = tmux(200, 60)
    screen = window.wait(lambda screen: "▀▀▀" in screen)
    lines = screen.rstrip("\n").split("\n")
    assert len(lines) == 60
    assert max(len(line) for line in lines) == 200
    for part in ("excess ADU", "state", "─ alerts ─", "tether away", "stable after 9 frames", "1 of 47"):
        assert part in screen
    window.press("End")
    window.wait(lambda screen: "47 of 47" in screen)
    window.do("resize-window", "-x", "80", "-y", "24")
    window.wait(lambda screen: "excess ADU" not in screen and "47 of 47" in screen and "q detach" in screen)
    window.do("resize-window", "-x", "79", "-y", "24")
    window.wait(lambda screen: "hotpixd needs 80x24 characters; this terminal has 79x24." in screen)
    window.do("resize-window", "-x", "120", "-y", "40")
    window.wait(lambda screen: "excess ADU" in screen and "─ frames not counted, sources ─" in screen)
    window.press("C-c")
    window.wait(lambda screen: "left with 0" in screen)


def test_every_line_is_in_its_place_after_a_change_of_size(tmux: Callable[[int, int], Tmux]):
    """No key is needed. Drawn from where the cursor happened to be, the title was shifted by the columns gained."""
    window = tmux(80, 24)
    first = window.wait(lambda screen: "▀▀▀▀▀▀▀▀▀▀▀" in screen)
    for width, height in ((100, 30), (200, 60), (80, 24)):
        window.do("resize-window", "-x", str(width), "-y", str(height))
        title = f" hotpixd  watching 2 sources{'1.2 shots/s  queue 3':>{width - 29}}"
        screen = window.wait(lambda screen: screen.startswith(f"{title}\n") and "▀▀▀" in screen)  # noqa: B023
        lines = screen.rstrip("\n").split("\n")
        assert len(lines) == height
        assert lines[1].startswith(" Acme One")
        assert lines[-1].startswith(" j k select")
    assert screen == first


def test_a_daemon_of_its_own_is_stopped_not_left(daemon: Daemon):
    """Where the daemon ends with the dashboard, nothing on the screen says that it goes on."""
    (daemon.folder / "owned").touch()
    with Session(daemon) as session:
        session.wait("13 stable")
        os.write(session.ours, b"h")
        session.wait("stop watching")
        os.write(session.ours, b"q")
        assert session.ended() == 0
        assert b" stop " in session.output
        assert b"detach" not in session.output


# What ends it, and what terminals it knows: on a bare pty, whose attributes and output can be examined.


class Session:
    """The dashboard on a pty of 80x24, as a child process in a session of its own."""

    def __init__(self, daemon: Daemon, **environment: str) -> None:
        self.ours, theirs = pty.openpty()
        termios.tcsetwinsize(theirs, (24, 80))
        self.before = termios.tcgetattr(theirs)
        self.theirs = theirs
        self.output = b""
        self.process = subprocess.Popen(
            daemon.command,
            stdin=theirs,
            stdout=theirs,
            stderr=subprocess.PIPE,
            env={"PATH": os.environ["PATH"], "TERM": "xterm-256color", "LC_ALL": "C.UTF-8"}
            | daemon.paths
            | environment,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()
        for fd in (self.ours, self.theirs):
            if fd >= 0:
                os.close(fd)

    def read(self, for_s: float) -> None:
        """Take in what is written within a time."""
        until = time.monotonic() + for_s
        while (left := until - time.monotonic()) > 0 and select.select([self.ours], [], [], left)[0]:
            self.output += os.read(self.ours, 65536)

    def wait(self, words: str) -> None:
        """Take in output until these words were written."""
        until = time.monotonic() + WAIT_S
        while words.encode() not in self.output:
            assert time.monotonic() < until, self.output[-3000:]
            assert self.process.poll() is None
            self.read(0.05)

    def ended(self) -> int:
        """Return the exit code, once the process has ended."""
        until = time.monotonic() + WAIT_S
        while self.process.poll() is None:
            assert time.monotonic() < until
            self.read(0.1)
        self.read(0.1)
        return self.process.returncode

    def is_restored(self) -> bool:
        """Whether the terminal is as it was: its attributes, its cursor, its normal screen."""
        last = [
            self.output.rfind(sequence) for sequence in (b"\x1b[?1049h", b"\x1b[?1049l", b"\x1b[?25l", b"\x1b[?25h")
        ]
        return 0 <= last[0] < last[1] and 0 <= last[2] < last[3] and termios.tcgetattr(self.theirs) == self.before


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGINT, 0)], ids=["TERM", "HUP", "INT"]
)
def test_a_signal_detaches_and_restores_the_terminal(daemon: Daemon, number: signal.Signals, code: int):
    """Also while an answer is long in coming."""
    (daemon.folder / "slow").touch()
    with Session(daemon) as session:
        session.wait("13 stable")
        assert termios.tcgetattr(session.theirs) != session.before
        session.process.send_signal(number)
        assert session.ended() == code
        assert session.is_restored()


def test_a_fault_restores_the_terminal_and_shows_its_traceback(daemon: Daemon):
    """An exception of the program, here in the thread that follows the state, is neither hidden nor lost."""
    with Session(daemon) as session:
        session.wait("13 stable")
        daemon.says("a fault")
        assert session.ended() == 1
        assert session.is_restored()
        assert b"RuntimeError: a fault of the program" in session.process.stderr.read()


def test_a_fault_in_drawing_restores_the_terminal(daemon: Daemon):
    """A live state that cannot be drawn ends in a traceback on a normal screen."""
    broken = made_up.live()
    del broken[f"sensor:{made_up.ID}"]["frames"]
    with Session(daemon) as session:
        session.wait("13 stable")
        daemon.says(broken)
        assert session.ended() == 1
        assert session.is_restored()
        assert b"KeyError: 'frames'" in session.process.stderr.read()


def test_a_terminal_that_hangs_up_ends_it(daemon: Daemon):
    """An ssh connection that breaks leaves no process behind."""
    with Session(daemon) as session:
        session.wait("13 stable")
        os.close(session.theirs)
        os.close(session.ours)
        session.ours = session.theirs = -1
        assert session.process.wait(WAIT_S) == 129
        assert session.process.stderr.read() == b""


def test_it_waits_for_a_daemon_that_is_not_there_yet(daemon: Daemon):
    """Started before the daemon, it says so and attaches when it comes."""
    daemon.goes()
    with Session(daemon) as session:
        session.wait("No daemon answers at /run/the.sock; waiting")
        daemon.says(made_up.live())
        session.wait("13 stable")
        os.write(session.ours, b"q")
        assert session.ended() == 0


def test_it_is_still_while_nothing_changes(daemon: Daemon):
    """Ten equal states a second draw nothing, and cost next to nothing."""
    with Session(daemon) as session:
        session.wait("▀▀▀▀▀▀▀▀▀▀▀")
        session.read(0.5)
        length, before = len(session.output), cpu_s(session.process.pid)
        session.read(2.0)
        assert len(session.output) == length
        assert cpu_s(session.process.pid) - before < 1.0


def cpu_s(pid: int) -> float:
    """Return the processor time that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@pytest.mark.parametrize(
    ("environment", "unicode", "colour"),
    [
        ({}, True, "256"),
        ({"LC_ALL": "", "LANG": "C"}, False, "256"),
        ({"LC_ALL": "C"}, False, "256"),
        ({"TERM": "xterm"}, True, "16"),
        ({"TERM": "linux"}, True, "16"),
        ({"NO_COLOR": "1"}, True, None),
        ({"LC_ALL": "POSIX", "NO_COLOR": "1", "TERM": "xterm"}, False, None),
        ({"COLUMNS": "40", "LINES": "10"}, True, "256"),
    ],
)
def test_it_writes_what_the_terminal_understands(
    daemon: Daemon, environment: dict[str, str], unicode: bool, colour: str | None
):
    """Only ASCII without a UTF-8 locale, only 16 colours on a plain xterm, none with NO_COLOR, the true size always."""
    with Session(daemon, **environment) as session:
        session.wait("13 stable")
        session.read(0.3)
        os.write(session.ours, b"q")
        assert session.ended() == 0
        assert session.is_restored()
        assert session.output.isascii() != unicode
        styles = re.findall(rb"\x1b\[([0-9;]*)m", session.output)
        assert any(re.search(rb"[34]8;5;", style) for style in styles) == (colour == "256")
        assert any(re.search(rb"(^|;)[349][0-7](;|$)", style) for style in styles) == (colour is not None)
        assert (b"\xe2\xa0" in session.output) == (unicode and environment.get("TERM") != "linux"), "Braille"


def test_without_a_terminal_it_says_so(daemon: Daemon):
    """In a pipe, and on a terminal that cannot move its cursor."""
    done = subprocess.run(
        daemon.command, stdin=subprocess.DEVNULL, capture_output=True, text=True, env=os.environ | daemon.paths
    )
    assert done.returncode == 2
    assert "needs a terminal" in done.stderr
    with Session(daemon, TERM="dumb") as session:
        assert session.ended() == 2
        assert b"needs a terminal" in session.process.stderr.read()


def test_nothing_is_left_behind_in_the_process(daemon: Daemon, monkeypatch: pytest.MonkeyPatch):
    """Signal handlers, wake-up descriptor, threads and files are as before, for a program that goes on after it."""
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 80))
    monkeypatch.setenv("TERM", "xterm")
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGWINCH)
    before = [signal.getsignal(number) for number in numbers]
    with os.fdopen(theirs, "r+b", buffering=0) as raw, io.TextIOWrapper(raw, "utf-8", write_through=True) as stream:
        monkeypatch.setattr(sys, "stdin", stream)
        monkeypatch.setattr(sys, "stdout", stream)
        drain = threading.Thread(target=drained, args=(ours,))
        drain.start()
        threads, files = set(threading.enumerate()), len(os.listdir("/proc/self/fd"))  # noqa: PTH208
        os.write(ours, b"jq")
        assert run_dashboard(lambda: Once(made_up.live()), where="here", console=Console(file=stream)) == 0
        assert [signal.getsignal(number) for number in numbers] == before
        assert signal.set_wakeup_fd(-1) == -1
        assert set(threading.enumerate()) == threads
        assert len(os.listdir("/proc/self/fd")) == files  # noqa: PTH208
    drain.join()
    os.close(ours)


def drained(fd: int) -> None:
    """Read a pty until its other end is closed."""
    try:
        while os.read(fd, 65536):
            pass
    except OSError:
        return


class Once:
    """A client whose state is said once; then it waits to be closed."""

    def __init__(self, live: dict[str, Any]) -> None:
        self.hello: dict[str, Any] = {}
        self._live = live
        self._closed = threading.Event()

    def watch(self) -> Iterator[dict[str, Any]]:
        """Say the state."""
        yield self._live
        self._closed.wait()

    def ask(self, name: str, **arguments: Any) -> dict[str, Any]:
        """Answer what is around a site."""
        assert name == "around"
        assert arguments["sensor"] == made_up.ID
        return {"patch": made_up.patch(arguments["reach"])}

    def close(self) -> None:
        """Hang up."""
        self._closed.set()


def test_a_picture_is_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """An SVG that any program can read, with the parts of the screen in it, whatever the terminal can show."""
    path = tmp_path / "screen.svg"
    save_picture(Once(made_up.live()), path, width=120, height=36)
    words = "".join(ET.parse(path).getroot().itertext()).replace("\xa0", " ")
    for part in ("watching 2 sources", "28 candidates", "by certainty, all", "evidence 41.2 of 24.1"):
        assert part in words
    coloured = path.read_text(encoding="utf-8")
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("TERM", "dumb")
    save_picture(Once(made_up.live()), path, width=120, height=36)
    assert path.read_text(encoding="utf-8") == coloured
    save_picture(Once({"sensors": []}), path)
    assert "No sensor is known yet" in path.read_text(encoding="utf-8").replace("&#160;", " ")


def test_the_locale_of_the_start_decides_about_unicode():
    """LC_ALL before LC_CTYPE before LANG; a stream that is not UTF-8 is believed as well."""
    utf8 = Console(file=io.TextIOWrapper(io.BytesIO(), encoding="utf-8"))
    latin = Console(file=io.TextIOWrapper(io.BytesIO(), encoding="latin-1"))
    for environment, unicode in (
        ({"LANG": "de_DE.UTF-8"}, True),
        ({"LANG": "de_DE.utf8", "LC_ALL": ""}, True),
        ({"LANG": "de_DE.UTF-8", "LC_ALL": "C"}, False),
        ({"LANG": "C", "LC_CTYPE": "C.UTF-8"}, True),
        ({"LANG": "de_DE"}, False),
        ({}, False),
    ):
        assert look_of(environment, utf8).unicode == unicode
        assert not look_of(environment, latin).unicode


# Keys.

KEYS = [
    (b"\x1b[A", "up"), (b"\x1bOA", "up"), (b"\x1b[B", "down"), (b"\x1bOB", "down"), (b"\x1b[5~", "page up"),
    (b"\x1b[6~", "page down"), (b"\x1b[H", "home"), (b"\x1bOH", "home"), (b"\x1b[1~", "home"), (b"\x1b[7~", "home"),
    (b"\x1b[F", "end"), (b"\x1b[4~", "end"), (b"\x1b[8~", "end"), (b"\x1b[1;5A", "up"), (b"\x1b[Z", "shift-tab"),
    (b"\t", "tab"), (b"j", "j"), (b"?", "?"), (b"\x03", "ctrl-c"), (b"q", "q"),
]  # fmt: skip


def test_each_key_is_known_by_its_bytes():
    """Whole, cut into single bytes, and several at once."""
    for data, key in KEYS:
        assert KeyParser().feed(data) == [key]
        parser = KeyParser()
        assert [key for byte in data for key in parser.feed(bytes([byte]))] == [key]
        assert not parser.waiting
    assert KeyParser().feed(b"".join(data for data, _ in KEYS)) == [key for _, key in KEYS]


@pytest.mark.parametrize(
    "data", [b"\x1b[15~", b"\x1b[[A", b"\x1bOP", b"\x1b[200~", b"\x1b[<0;3;4M", b"\x1b[?1;2c", "é".encode(), b"\x00"]
)
def test_what_has_no_meaning_is_swallowed_whole(data: bytes):
    """Function keys, pastes, mice and answers of the terminal leave no letters behind that would be taken for keys."""
    assert KeyParser().feed(data + b"j") == ["j"]


def test_an_escape_alone_is_told_from_a_sequence():
    """By what follows, or by nothing following."""
    parser = KeyParser()
    assert parser.feed(b"\x1b") == []
    assert parser.waiting
    assert parser.flush() == ["escape"]
    assert not parser.waiting
    assert parser.feed(b"\x1b\x1b[A") == ["escape", "up"]
    assert parser.feed(b"\x1bx") == ["escape", "x"]
    assert parser.feed(b"\x1b[1;") == []
    assert parser.flush() == []
    assert parser.feed(b"q") == ["q"]
