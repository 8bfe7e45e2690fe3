"""Names of saved photos: turns a template such as ``{date:%Y-%m-%d}/{name}`` into a path below a folder."""

from __future__ import annotations

import string
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path

FIELDS = ("name", "stem", "ext", "date", "make", "model", "serial")
"""What a template may name: the file's name, its parts, when the shot was taken, and the camera."""

UNKNOWN = "unknown"
"""Stands for what a file does not say."""


def filled(template: str, known: Mapping[str, object]) -> Path:
    """Return a template's path; what its values hold cannot lead out of it.

    Raises
    ------
    ValueError
        If it names an unknown field, leads outside, or names no file. The message is the end of a sentence.
    """
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise ValueError(f"is no template: {error}") from None
    for _, field, _, _ in parts:
        if field is not None and field not in FIELDS:
            raise ValueError(f"names {{{field}}}, but there are {', '.join(f'{{{name}}}' for name in FIELDS)}")
    if not any(field in ("name", "stem") for _, field, _, _ in parts):
        raise ValueError("must have {name} or {stem} in it, or all photos would have one name")
    plain = {key: _plain(value) if isinstance(value, str) else value for key, value in known.items()}
    try:
        text = template.format(**plain)
    except (ValueError, KeyError, IndexError) as error:
        raise ValueError(f"cannot be filled in: {error}") from None
    steps = text.split("/")
    if text.startswith("/") or any(step in ("", ".", "..") for step in steps) or "\0" in text:
        raise ValueError("must lead to a file below the folder, without empty parts or ..")
    return Path(*steps)


def check_template(template: str) -> None:
    """Raise ValueError if a template cannot be used."""
    sample = dict.fromkeys(FIELDS, "x")
    filled(template, {**sample, "date": datetime(2026, 1, 1, tzinfo=UTC)})


def on_one_line(text: str) -> str:
    """Return what a camera says of itself without control characters and broken UTF-8, which are written as escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _plain(value: str) -> str:
    """Return a value that is one part of a path: what a camera says of itself is not to be trusted."""
    plain = "".join("_" if c in "/\\\0" or not c.isprintable() else c for c in value).strip()
    return plain.lstrip(".") or UNKNOWN
