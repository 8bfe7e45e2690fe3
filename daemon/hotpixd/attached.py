"""A terminal on a running daemon: the dashboard attached to its feed, and daemons started for a command."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from hotpixd.feed import FeedClient, FeedError, default_socket
from hotpixd.views.dashboard import run_dashboard, save_picture

_START_WITHIN_S = 60.0
_STOP_WITHIN_S = 90.0


def run_attached(socket: Path) -> int:
    """Show the dashboard of the daemon that listens at a socket, until the user detaches; return the exit code."""
    return run_dashboard(lambda: FeedClient(socket), where=str(socket))


def save_attached(socket: Path, picture: Path, width: int, height: int) -> None:
    """Save what the dashboard would show now as an SVG picture.

    Raises
    ------
    FeedError
        If no daemon answers.
    """
    with contextlib.closing(FeedClient(socket)) as client:
        save_picture(client, picture, width=width, height=height)


class OwnDaemon:
    """A daemon that a command starts for itself, and that ends with it.

    Its log goes to STATE/watch.log, since the command has the terminal.

    Parameters
    ----------
    arguments : of the command that the daemon runs as, without the program
    environ : of the daemon, for sockets too
    """

    def __init__(self, arguments: Sequence[str], state: Path, environ: Mapping[str, str] = os.environ) -> None:
        state.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._log = state / "watch.log"
        self.socket = default_socket(state, environ)
        with self._log.open("ab") as out:
            # Appended to: another daemon may have the state, and this be its log. If so, ours will say that and end.
            self._begin = out.tell()
            self._process = subprocess.Popen(
                [sys.executable, "-m", "hotpixd", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                env=dict(environ),
                # Ctrl-C is for the command; the daemon is told to stop when that has gone, however it went.
                start_new_session=True,
                preexec_fn=_end_with_parent,
            )

    def answers(self) -> bool:
        """Wait until it answers; False if it has ended instead."""
        until = time.monotonic() + _START_WITHIN_S
        while self.running and time.monotonic() < until:
            with contextlib.suppress(FeedError), contextlib.closing(FeedClient(self.socket)) as client:
                if client.hello["pid"] == self._process.pid:
                    return True
            time.sleep(0.1)
        return False

    @property
    def running(self) -> bool:
        """Whether it has not ended."""
        return self._process.poll() is None

    @property
    def said(self) -> str:
        """What it has logged."""
        return self._log.read_bytes()[self._begin :].decode("utf-8", "replace")

    def wait(self) -> None:
        """Wait for its end."""
        self._process.wait()

    def stop(self) -> int:
        """Have it write a checkpoint and end; return its exit code, below 0 if it was killed before."""
        if self.running:
            self._process.terminate()
        try:
            return self._process.wait(_STOP_WITHIN_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return self._process.wait()


def watch_with_dashboard(arguments: Sequence[str], state: Path) -> int:
    """Start a daemon of our own with these arguments, show its dashboard, and stop it when the user quits."""
    with leaving_by_signals():
        daemon = OwnDaemon([*arguments, "--plain"], state)
        try:
            if daemon.answers():
                show_dashboard_of(daemon)
        finally:
            killed = not daemon.running
            if not killed:
                print("Stopping: writing a checkpoint.")
            code = daemon.stop()
    if killed and code < 0:
        print("The daemon was killed. What it had received is safe: start it again.", file=sys.stderr)
        return 1
    if code:
        sys.stderr.write(daemon.said)
    return code


def show_dashboard_of(daemon: OwnDaemon) -> None:
    """Show a daemon's dashboard until the user quits, or the daemon has ended."""
    over = threading.Event()
    threading.Thread(target=_end_with_daemon, args=(daemon, over), daemon=True).start()
    run_dashboard(lambda: FeedClient(daemon.socket), where=str(daemon.socket), owned=True)
    over.set()


@contextlib.contextmanager
def leaving_by_signals() -> Iterator[None]:
    """Turn signals into SystemExit, so that what was started is stopped."""
    before = {number: signal.signal(number, _leave) for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _end_with_parent() -> None:
    """Have the kernel tell this process to stop when the one that started it dies."""
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def _end_with_daemon(daemon: OwnDaemon, over: threading.Event) -> None:
    """End the dashboard when the daemon has ended, if it is not over."""
    daemon.wait()
    if not over.is_set():
        os.kill(os.getpid(), signal.SIGINT)


def _leave(number: int, _frame: object) -> None:
    raise SystemExit(128 + number)
