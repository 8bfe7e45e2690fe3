"""The pipe to a camera's worker process: orders out, answers and events in, and an end to it when it hangs."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

Answer = Callable[[dict[str, Any] | None, dict[str, Any] | None], None]
"""Takes what an order brought, or its error. Neither if the worker died before it answered."""

_LEAVE_S = 5.0
"""How long a worker may take to let go of its camera."""

_LONGEST_LINE = 64 << 20
"""Bytes: a listing of a hundred thousand files has a fifth of it."""


class Link:
    """A running worker. Use from one thread.

    Parameters
    ----------
    environ : of the worker
    hang_s : it ends itself when nothing has succeeded for so long
    poll_s : time between two questions that prove the camera to be there, while it is in use
    """

    def __init__(self, environ: Mapping[str, str], hang_s: float, poll_s: float) -> None:
        spec = json.dumps({"parent": os.getpid(), "hang_s": hang_s, "poll_s": poll_s})
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "hotpixd.intake.camera_worker", spec],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=dict(environ),
            # Signals of the terminal are for us.
            start_new_session=True,
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._in, self._out = self._process.stdin.fileno(), self._process.stdout.fileno()
        os.set_blocking(self._out, False)
        self._hang_s = hang_s
        self._partial = b""
        self._waiting: dict[int, Answer] = {}
        self._last_id = 0
        self._patience_s = 0.0
        self.heard_at = time.monotonic()
        self.failure: dict[str, Any] | None = None
        """What the worker said before it ended, if it did."""

    def fileno(self) -> int:
        """Return the descriptor that is readable when the worker has said something or has ended."""
        return self._out

    @property
    def pid(self) -> int:
        """Of the worker."""
        return self._process.pid

    @property
    def busy(self) -> bool:
        """Whether an order is not answered yet."""
        return bool(self._waiting)

    def order(self, do: str, answer: Answer, **arguments: Any) -> None:
        """Send an order; `answer` is called by `read`, or by `lose` if the worker ends before."""
        self._last_id += 1
        self._waiting[self._last_id] = answer
        line = json.dumps({"id": self._last_id, "do": do, **arguments}) + "\n"
        # A worker that has ended is found by `read`.
        with suppress(BrokenPipeError):
            # Orders are short and few: they fit the pipe, so this does not wait.
            os.write(self._in, line.encode())

    def read(self, event: Callable[[dict[str, Any]], None]) -> bool:
        """Take in what was said; False if the worker has ended, or says what no worker says."""
        while True:
            try:
                data = os.read(self._out, 1 << 16)
            except BlockingIOError:
                return True
            if not data:
                return False
            self.heard_at = time.monotonic()
            *lines, self._partial = (self._partial + data).split(b"\n")
            for line in lines:
                message = self._understood(line)
                if message is None:
                    return False
                self._hear(message, event)
            if len(self._partial) > _LONGEST_LINE:
                return False

    def _understood(self, line: bytes) -> dict[str, Any] | None:
        """Return a message; None if it is none. A library of the worker may have written into its pipe."""
        try:
            message = json.loads(line)
        except (ValueError, RecursionError):
            return None
        match message:
            case {"failed": {"code": int(), "text": str(), "doing": str()}}:
                return dict(message)
            case {"failed": _}:
                return None
            case {"id": int(id_)} if id_ in self._waiting:
                parts = (message.get("ok"), message.get("error"))
                return dict(message) if all(part is None or isinstance(part, dict) for part in parts) else None
            case {"event": "beat", "patience_s": int() | float() as patience_s} if 0 <= patience_s < math.inf:
                return dict(message)
            case {"event": str(name)} if name != "beat" and "id" not in message:
                return dict(message)
        return None

    def _hear(self, message: dict[str, Any], event: Callable[[dict[str, Any]], None]) -> None:
        if "failed" in message:
            self.failure = message["failed"]
        elif "id" in message:
            self._waiting.pop(message["id"])(message.get("ok"), message.get("error"))
        elif message["event"] == "beat":
            self._patience_s = message["patience_s"]
        else:
            event(message)

    @property
    def hangs_at(self) -> float:
        """When it should have ended itself if nothing is heard of it until then; monotonic s."""
        return self.heard_at + 1.5 * self._hang_s + 2.0 + self._patience_s

    def kill(self) -> None:
        """End the worker at once."""
        self._process.kill()
        # It needs a moment to be gone.
        self.heard_at = time.monotonic()

    def ask_to_leave(self) -> None:
        """Have the worker let go of the camera and end when it has done what it is at."""
        with suppress(ProcessLookupError):
            self._process.send_signal(signal.SIGTERM)

    def lose(self, within_s: float = 0.0) -> int:
        """See the worker to its end; orders without an answer get none. Returns its exit code."""
        try:
            code = self._process.wait(within_s)
        except subprocess.TimeoutExpired:
            self._process.kill()
            code = self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            with suppress(OSError):
                assert pipe is not None
                pipe.close()
        waiting, self._waiting = self._waiting, {}
        for answer in waiting.values():
            answer(None, None)
        return code

    def close(self) -> None:
        """Have the worker let go of the camera, and end it if it does not."""
        self.ask_to_leave()
        self.lose(_LEAVE_S)
