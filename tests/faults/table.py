"""A row of the table that a campaign prints."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """What one sweep of a harness found."""

    harness: str
    """Which harness."""

    what: str
    """What was done to the program."""

    points: int
    """How often."""

    wrong: int
    """How often the result was wrong: 0, but for a control."""

    control: bool
    """Whether the harness was given a fault that it must see; `wrong` must be above 0 then."""

    note: str = ""
    """What else is worth knowing."""
