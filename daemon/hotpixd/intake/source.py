"""What all sources of shots have in common: how they are, and what is to be remembered of a file.

A source hands out shots with `take`, and hears what became of each by `done` or
`retry`. Directories and cameras are both that.
"""

from __future__ import annotations

from dataclasses import dataclass
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
