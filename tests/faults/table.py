"""What a harness of the campaign has seen."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """One line of the campaign's table."""

    harness: str
    """Which harness."""

    what: str
    """What was done to the program."""

    points: int
    """How often, each time at another place or moment."""

    wrong: int
    """How often the end was wrong."""

    control: bool
    """Whether a safeguard was taken away: then `wrong` must not be 0."""

    note: str = ""
    """Anything else worth knowing."""
