"""What the tests of declared defects ask and command."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from conftest import run
from hotpixd.store.state import State
from hotpixd.views import answers

Pixels = list[tuple[int, int]]


def only(root: Path) -> dict[str, Any]:
    """Return the one sensor of a state, as `defects` answers."""
    with State(root, create=False) as state:
        (sensor,) = answers.defects(state)["sensors"]
    return sensor


def declared(root: Path) -> Pixels:
    """Return the pixels declared of the one sensor."""
    return [(d["x"], d["y"]) for d in only(root)["declared"]]


def command(*arguments: object, state: Path, code: int = 0, **options: Any) -> str:
    """Run one of the commands, and return what it said."""
    done = run(*arguments, "--state", state, **options)
    assert done.returncode == code, done.stdout + done.stderr
    return str(done.stdout + done.stderr)
