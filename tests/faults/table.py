"""What a harness of the fault campaign reports: rows of one table."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


class Impossible(Exception):  # noqa: N818 - a condition, not a fault
    """A harness cannot run on this machine. The message is a sentence that says what is missing."""


@dataclass(frozen=True)
class Row:
    """One sort of fault, and what came of it."""

    harness: str
    """Name of the module that made it."""

    what: str
    """What was done to what."""

    points: int
    """How often, each time at another point."""

    wrong: int
    """How often the end was not that of an undisturbed run, and nobody said so."""

    control: bool
    """Whether a safeguard was taken out on purpose: then `wrong` must be above 0, else it must be 0."""

    note: str = ""
    """What else there is to say, in a few words."""

    @property
    def as_expected(self) -> bool:
        """Whether the row proves what it is to prove. Without any point it proves nothing."""
        return self.points > 0 and (self.wrong > 0 if self.control else self.wrong == 0)


def markdown(rows: Iterable[Row]) -> str:
    """Return the rows as a Markdown table; what is not as expected is bold."""
    lines = ["| harness | what | points | wrong | |", "| --- | --- | --- | --- | --- |"]
    for row in rows:
        what = f"control: {row.what}" if row.control else row.what
        said = [row.note] if row.note else []
        wrong = f"{row.wrong:,}"
        if not row.as_expected:
            wrong = f"**{wrong}**"
            said.insert(0, "**not caught**" if row.control else "**wrong**" if row.wrong else "**nothing was tried**")
        cells = [row.harness, what, f"{row.points:,}", wrong, "; ".join(said)]
        lines.append("| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |")
    return "\n".join(lines)
