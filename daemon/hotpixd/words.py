"""Words that every part of ours may use, since this imports none of them."""

from __future__ import annotations

from datetime import UTC, datetime


def utc(moment: datetime | float | str) -> str:
    """Return a time as all JSON has it: ISO 8601 in UTC, which ends in Z.

    Parameters
    ----------
    moment : with a time zone; as Unix time, s; or in the form of the ledger, whose fractions of a second stay
    """
    if isinstance(moment, str):
        return f"{moment.removesuffix('+00:00').removesuffix('Z')}Z"
    if isinstance(moment, float):
        moment = datetime.fromtimestamp(moment, UTC)
    return moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def many(count: int, noun: str) -> str:
    """Return a count with its noun."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
