"""The daemon as a process, for the tests that need one running."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from conftest import HOTPIXD, environment, run
from hotpixd.feed import FeedClient, FeedError, find_sockets

START_WITHIN_S = 60.0


def eventually(condition: Callable[[], Any], what: str, within_s: float = 30.0) -> Any:
    """Wait until a condition holds and return what it returned."""
    until = time.monotonic() + within_s
    while True:
        found = condition()
        if found:
            return found
        assert time.monotonic() < until, f"not within {within_s:g} s: {what}"
        time.sleep(0.05)


class Daemon:
    """A running `hotpixd run` or `hotpixd watch --plain`."""

    def __init__(self, state: Path, runtime: Path, *arguments: object, prefix: Sequence[str] = (), **env: str) -> None:
        self.state = state
        self.env = environment(XDG_RUNTIME_DIR=str(runtime), **env)
        self.runtime = runtime
        self._log = tempfile.NamedTemporaryFile("w+b", prefix="hotpixd-log-")  # noqa: SIM115 - closed with us
        command = [*prefix, *HOTPIXD, *map(str, arguments), "--state", str(state)]
        self.process = subprocess.Popen(command, env=self.env, stdout=self._log, stderr=self._log)

    @property
    def log(self) -> str:
        """All that it has said so far."""
        return Path(self._log.name).read_text("utf-8", "replace")

    def wait_ready(self) -> Daemon:
        """Wait until it watches."""

        def ready() -> bool:
            assert self.process.poll() is None, self.log
            return "state in" in self.log

        eventually(ready, "the daemon is ready", START_WITHIN_S)
        return self

    def client(self) -> FeedClient:
        """Attach to its feed."""
        for path in find_sockets(self.env):
            with contextlib.suppress(FeedError):
                client = FeedClient(path)
                if client.hello["pid"] == self.process.pid:
                    return client
                client.close()
        raise AssertionError(f"no feed of process {self.process.pid}: {self.log}")

    def ask(self, *arguments: object) -> dict[str, Any]:
        """Return what a reading command answers in JSON while it runs."""
        done = run(*arguments, "--json", "--state", self.state, env=self.env)
        assert done.returncode == 0, done.stderr
        return dict(json.loads(done.stdout))

    def ask_alerts(self) -> list[dict[str, Any]]:
        """Return the alerts that it shows."""
        with contextlib.closing(self.client()) as client:
            return list(next(iter(client.watch()))["alerts"])

    def folded(self) -> int:
        """Return how many shots it has folded, over all runs."""
        with contextlib.closing(self.client()) as client:
            return int(client.ask("status")["shots"]["folded"])

    def wait_folded(self, count: int, within_s: float = 60.0) -> None:
        """Wait until so many shots are folded."""
        eventually(lambda: self.folded() >= count, f"{count} shots are folded\n{self.log}", within_s)

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Send a signal and return the exit code."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        return self.process.wait(60)

    def close(self) -> None:
        """Make sure that it is gone."""
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        self._log.close()


def cpu_s(pid: int) -> float:
    """Return the processor time a process has used, s."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def memory_mb(pid: int) -> float:
    """Return the resident memory of a process, MB."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1000
    raise AssertionError(f"process {pid} has no memory")
