"""A Python process that a test drives: it calls methods of an object there, and gets what they return or raise.

The process ends when the test's end of their connection is closed, so it cannot outlive the test.
"""

from __future__ import annotations

import importlib
import os
import socket
import subprocess
import sys
import threading
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Final

_START_LIMIT_S: Final = 30.0
_CALL_LIMIT_S: Final = 60.0
_STOP_LIMIT_S: Final = 5.0


class DrivenProcess:
    """The test's end."""

    def __init__(self, entry: str, *arguments: Any, **environment: str) -> None:
        """Start a function, "module:function", with a connection and some arguments; it sends a greeting first."""
        ours, theirs = socket.socketpair()
        here = str(Path(__file__).parent)
        self._process = subprocess.Popen(
            [sys.executable, "-c", "import driven; driven.main()", entry, str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            # What the test can import can be imported there.
            env={**os.environ, "PYTHONPATH": os.pathsep.join([here, *filter(None, sys.path)]), **environment},
            stdin=subprocess.DEVNULL,
        )
        theirs.close()
        self._connection = Connection(ours.detach())
        self._lock = threading.Lock()
        try:
            self._connection.send(arguments)
            self.greeting = self._received(_START_LIMIT_S)
        except BaseException:
            self.end()
            raise

    @property
    def pid(self) -> int:
        """Its process."""
        return self._process.pid

    def call(self, method: str, *arguments: Any, **options: Any) -> Any:
        """Call a method and return or raise what it does. From any thread, one after the other."""
        with self._lock:
            self._connection.send((method, arguments, options))
            return self._received(_CALL_LIMIT_S)

    def kill(self) -> None:
        """End it with SIGKILL."""
        self._process.kill()
        self.end()

    def end(self) -> None:
        """Let it end, whatever state it is in."""
        self._connection.close()
        try:
            self._process.wait(_STOP_LIMIT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _received(self, within_s: float) -> Any:
        assert self._connection.poll(within_s), f"no answer within {within_s:g} s"
        try:
            succeeded, value = self._connection.recv()
        except (EOFError, ConnectionError):
            raise AssertionError(f"the process has ended with {self._process.wait(_STOP_LIMIT_S)}") from None
        if not succeeded:
            raise value
        return value


def main() -> None:
    """Be the process."""
    module, _, function = sys.argv[1].partition(":")
    connection = Connection(int(sys.argv[2]))
    getattr(importlib.import_module(module), function)(connection, *connection.recv())
