"""A terminal on a running daemon: the dashboard attached to its feed, and `watch`, which starts one for itself."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
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
    with log.open("wb") as out:
        daemon = subprocess.Popen(
            [sys.executable, "-m", "hotpixd", *arguments, "--plain"],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            # Ctrl-C is for the dashboard; the daemon is told to stop when that has gone.
            start_new_session=True,
        )
    before = {number: signal.signal(number, _leave) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        socket = default_socket(state, os.environ)
        if _answers(socket, daemon):
            run_attached(socket)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        code = _stopped(daemon)
        sys.stderr.write(log.read_text("utf-8", "replace") if code else "")
    return code


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
