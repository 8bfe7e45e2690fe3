"""What all sources of shots have in common: how they are, and what is to be remembered of a file.

A source hands out shots with `take`, and hears what became of each by `done` or
`retry`. Directories and cameras are both that.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

Status = Literal["starting", "watching", "away", "trouble"]


@dataclass(frozen=True, slots=True)
class SourceState:
    """What the dashboard shows of a source."""

    name: str
    """The directory, or the camera."""

    status: Status
    """How it is, in the terms that alerts and metrics go by."""

    detail: str
    """A sentence for humans."""

    files: int
    """Pictures in the directory or on the card at the last listing."""

    waiting: int
    """Those of them not in the ledger yet."""

    since: float
    """When the status became this one, Unix time in s."""

    condition: str = ""
    """The source's own word for how it is. Empty: that of its status."""


class Seen(NamedTuple):
    """A file that need not be read again."""

    file: bytes
    """Digest that tells it from others."""

    shot: bytes | None = None
    """The key of its shot, 32 bytes. None if nobody will ask for it."""

    gone: bool = False
    """It was deleted: it is to be forgotten, as another one may come under its name."""


HANGS_AFTER_S = 60.0
"""A thread of a source that has been at one step for so long hangs: most likely a disk does not answer."""


class Step:
    """What the thread of a source is doing; it may be asked from another thread, which does not hang with it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._doing: tuple[str, float] | None = None

    @contextmanager
    def of(self, doing: str) -> Iterator[None]:
        """Mark a step that should not take long."""
        with self._lock:
            self._doing = doing, time.monotonic()
        try:
            yield
        finally:
            with self._lock:
                self._doing = None

    def shown(self, state: SourceState) -> SourceState:
        """Return how a source is: as it last said, or that it hangs."""
        with self._lock:
            doing = self._doing
        if doing is None or (silent_s := time.monotonic() - doing[1]) < HANGS_AFTER_S:
            return state
        detail = f"it has not answered for {silent_s:.0f} s, {doing[0]}; {state.detail}"
        return replace(state, status="trouble", detail=detail)
