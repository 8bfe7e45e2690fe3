"""Texts that came from outside (names of files, what a camera says of itself) made fit for a terminal."""

from __future__ import annotations


def printable(text: str) -> str:
    """Return a text on one line, with control characters and broken UTF-8 written as escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
