"""Does with tethered cameras what the daemon does, for the tests: takes what they offer, and remembers."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import hotpixd
from hotpixd.intake.camera import CameraSettings, CameraSource
from hotpixd.intake.files import FoundShot
from hotpixd.intake.source import Seen

SOON_S = 30.0
CODE = str(Path(hotpixd.__file__).parents[1])


class Tether:
    """A source of cameras and, in a thread, a service that puts what it offers into a ledger.

    Parameters
    ----------
    folder : of the state
    environ : of the workers, beside this process's own
    """

    def __init__(self, folder: Path, settings: CameraSettings, **environ: str) -> None:
        self.folder = folder
        self.settings = settings
        paths = os.pathsep.join(filter(None, (environ.pop("PYTHONPATH", ""), CODE)))
        self._environ = {**os.environ, "PYTHONPATH": paths, **environ}
        self.seen: dict[bytes, bytes | None] = {}
        self.shots: list[FoundShot] = []
        self.arrived: Counter[str] = Counter()
        """How often each content came, by its SHA-256."""
        self.bytes_of: dict[str, str] = {}
        """Digest of each shot's content, by its path on the card."""
        self._woken = threading.Event()
        self.changes: list[tuple[str, str, str]] = []
        """Conditions that were shown, with name and detail."""
        self._over = threading.Event()
        self.source = self._started()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _started(self) -> CameraSource:
        source = CameraSource(self.settings, self.folder, self.seen, self._woken.set, self._environ)
        source.start()
        return source

    def _serve(self) -> None:
        while not self._over.is_set():
            for seen in self.source.notes():
                self._remember(seen)
            for state in self.source.states():
                now = (state.name, state.condition, state.detail)
                if now not in self.changes[-3:]:
                    self.changes.append(now)
            shot = self.source.take()
            if shot is None:
                self._woken.wait(0.05)
                self._woken.clear()
                continue
            data = shot.path.read_bytes()
            key = sha256(data).hexdigest()
            self.shots.append(shot)
            self.arrived[key] += 1
            self.bytes_of[shot.origin or ""] = key
            self._remember(self.source.done(shot.path))

    def _remember(self, seen: Seen | None) -> None:
        if seen is None:
            return
        if seen.gone:
            self.seen.pop(seen.file, None)
        else:
            self.seen[seen.file] = seen.shot

    def restart(self, **settings: Any) -> None:
        """Stop, and start again with what was remembered."""
        self._over.set()
        self._thread.join()
        self.source.stop()
        self.settings = replace(self.settings, **settings)
        self._over.clear()
        self.source = self._started()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def pause(self) -> None:
        """Take nothing any more."""
        self._over.set()
        self._thread.join()

    def crash(self) -> None:
        """End the workers and forget all that was not written down."""
        self.pause()
        for pid in self.workers():
            os.kill(pid, signal.SIGKILL)
        self.source.stop()

    def wait(self, true: Callable[[], Any], what: str = "", timeout_s: float = SOON_S) -> Any:
        """Wait for something that happens by itself."""
        until = time.monotonic() + timeout_s
        while not (found := true()):
            assert time.monotonic() < until, f"waited in vain {what}: {self.source.states()}, {len(self.shots)} shots"
            time.sleep(0.02)
        return found

    def ready(self, timeout_s: float = SOON_S) -> Tether:
        """Wait until a camera is ready."""
        self.wait(lambda: "ready" in self.conditions(), "until it is ready", timeout_s)
        return self

    def conditions(self) -> list[str]:
        """Return how the cameras are."""
        return [state.condition for state in self.source.states()]

    def delivered(self, count: int, timeout_s: float = SOON_S) -> list[FoundShot]:
        """Wait for that many different contents."""
        self.wait(lambda: len(self.arrived) >= count, f"for {count} shots", timeout_s)
        return self.shots

    def workers(self) -> list[int]:
        """Return the numbers of the worker processes."""
        return [body.link.pid for body in self.source._bodies if body.link is not None]

    def close(self) -> None:
        """Stop all of it."""
        self._over.set()
        self._thread.join(10)
        with contextlib.suppress(OSError):
            self.source.stop()
