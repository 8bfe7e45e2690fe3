"""Words that every part of ours may use, since this imports none of them."""

from __future__ import annotations


def many(count: int, noun: str) -> str:
    """Return a count with its noun."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
