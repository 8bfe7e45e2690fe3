"""Safeguards that a control takes out of the product, to know that a harness sees what they guard against."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def in_place() -> None:
    """Generations are written over the newest one, without a temporary file, fsync or rename."""
    from hotpixd.store import checkpoint

    written_aside = checkpoint.write_generation

    def write_generation(
        folder: Path, number: int, header: Mapping[str, Any], arrays: Mapping[str, Any], *taken: Any
    ) -> Path:
        aside = folder.parent.parent / "aside"
        aside.mkdir(exist_ok=True)
        content = written_aside(aside, 1, header, arrays, *taken).read_bytes()
        path = folder / "gen-00000001.hpx"
        # Piece by piece, as it would be compressed.
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        for start in range(0, len(content), 1 + len(content) // 8):
            os.write(fd, content[start : start + 1 + len(content) // 8])
        os.close(fd)
        return path

    checkpoint.write_generation = write_generation


def nothing_covered() -> None:
    """A replay does not ask which shots the generations hold already."""
    from hotpixd.store.ledger import Ledger

    rows_to_replay = Ledger.rows_to_replay
    Ledger.rows_to_replay = lambda self, _covers: rows_to_replay(self, {})  # type: ignore[method-assign]


def let_go_early() -> None:
    """Shots are let go of before the generation that holds them is on the disk."""
    from hotpixd.store.state import State

    checkpoint = State.checkpoint

    def impatient(self: State, *arguments: Any, **options: Any) -> Path:
        self.spool.drop(list(self.spool.keys()))
        return checkpoint(self, *arguments, **options)

    State.checkpoint = impatient  # type: ignore[method-assign]


def alerts_again() -> None:
    """What a replay folds again is alerted again, under another key."""
    from hotpixd.alerts import Alerts
    from hotpixd.monitor import Outcome
    from hotpixd.service import _Service

    tell_folded, of_transition = _Service._tell_folded, Alerts._of_transition

    def told(self: _Service, outcome: Outcome) -> None:
        self._alerts.replaying = outcome.replayed  # type: ignore[attr-defined]
        tell_folded(self, outcome)

    def renamed(self: Alerts, *arguments: Any) -> Any:
        alert = of_transition(self, *arguments)
        return dataclasses.replace(alert, key=f"{alert.key}:again") if self.replaying else alert  # type: ignore[attr-defined]

    _Service._tell_folded = told  # type: ignore[method-assign]
    Alerts._of_transition = renamed  # type: ignore[method-assign]


def full_ignored() -> None:
    """A scan that meets a full disk ends as if it had done all."""
    from hotpixd import scanning
    from hotpixd.store.durable import StateFull

    run_scan = scanning.run_scan

    def careless(*arguments: Any, **options: Any) -> int:
        try:
            return run_scan(*arguments, **options)
        except StateFull:
            return 0

    scanning.run_scan = careless
