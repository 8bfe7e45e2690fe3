"""A terminal on a running daemon: the dashboard attached to its feed, and `watch`, which starts one for itself."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
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


def watch_with_dashboard(arguments: Sequence[str], state: Path) -> int:
    """Start a daemon of our own with these arguments, show its dashboard, and stop it when the user quits.

    Its log goes to STATE/watch.log, since the screen is taken.
    """
    state.mkdir(mode=0o700, parents=True, exist_ok=True)
    log = state / "watch.log"
    with log.open("ab") as out:
        # Appended to: another daemon may have the state, and this be its log. If so, ours will say that and end.
        begin = out.tell()
        daemon = subprocess.Popen(
            [sys.executable, "-m", "hotpixd", *arguments, "--plain"],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            # Ctrl-C is for the dashboard; the daemon is told to stop when that has gone, however it went.
            start_new_session=True,
            preexec_fn=_end_with_parent,
        )
    before = {number: signal.signal(number, _leave) for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)}
    try:
        socket = default_socket(state, os.environ)
        if _answers(socket, daemon):
            over = threading.Event()
            threading.Thread(target=_end_with_daemon, args=(daemon, over), daemon=True).start()
            run_dashboard(lambda: FeedClient(socket), where=str(socket), owned=True)
            over.set()
    finally:
        killed = (daemon.poll() or 0) < 0
        code = _stopped(daemon)
        for number, handler in before.items():
            signal.signal(number, handler)
    if killed:
        print("The daemon was killed. What it had received is safe: start it again.", file=sys.stderr)
        return 1
    if code:
        sys.stderr.write(log.read_bytes()[begin:].decode("utf-8", "replace"))
    return code


def _end_with_parent() -> None:
    """Have the kernel tell this process to stop when the one that started it dies."""
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def _end_with_daemon(daemon: subprocess.Popen[bytes], over: threading.Event) -> None:
    """End the dashboard when the daemon has ended, if it is not over."""
    daemon.wait()
    if not over.is_set():
        os.kill(os.getpid(), signal.SIGINT)


def _leave(number: int, _frame: object) -> None:
    raise SystemExit(128 + number)


def _answers(socket: Path, daemon: subprocess.Popen[bytes]) -> bool:
    until = time.monotonic() + _START_WITHIN_S
    while daemon.poll() is None and time.monotonic() < until:
        with contextlib.suppress(FeedError), contextlib.closing(FeedClient(socket)) as client:
            if client.hello["pid"] == daemon.pid:
                return True
        time.sleep(0.1)
    return False


def _stopped(daemon: subprocess.Popen[bytes]) -> int:
    if daemon.poll() is None:
        print("Stopping: writing a checkpoint.")
        daemon.terminate()
    try:
        return daemon.wait(_STOP_WITHIN_S)
    except subprocess.TimeoutExpired:
        daemon.kill()
        return daemon.wait()
