"""Years of shots in one ledger: how large it becomes, and how long status and history take then.

    python tests/benchmarks/ledger_age.py [--shots 100000] [--sites 50] [--folder F]

The shots go straight into the ledger, as the monitor would write them; what is observed is kept as `thinning` says.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np

from hotpixd import archive
from hotpixd.core.frame import SampleKind, SensorIdentity, SensorLayout
from hotpixd.store.ledger import Received, TransitionRow
from hotpixd.store.state import State
from hotpixd.views import answers

TOGETHER = 50
"""Shots of one commit: the real ones are four."""

BEGIN = datetime(2024, 1, 1, tzinfo=UTC)


def fill(root: Path, shots: int, sites: int) -> tuple[list[tuple[int, float]], float]:
    """Write the shots; return (shots, MB of the ledger) on the way, and the seconds it took."""
    layout = SensorLayout(600, 400, "RGGB")
    identity = SensorIdentity("Acme", "One", "1", SampleKind.RAW, layout, "uint16")
    id_ = archive.sensor_id(identity)
    at = np.sort(np.random.default_rng(1).choice(layout.size, sites, replace=False))
    sizes = []
    started = time.perf_counter()
    with State(root) as state:
        ledger = state.ledger
        ledger.add_sensor(id_, {**archive.describe(identity), "depth": 14})
        for first in range(0, shots, TOGETHER):
            numbers = range(first, min(first + TOGETHER, shots))
            # 137 shots an evening, one every other day.
            times = [BEGIN + timedelta(days=2 * (n // 137), seconds=20 * (n % 137)) for n in numbers]
            received = [
                Received(f"{n:064x}", f"{n}.dng", f"/card/{n}.dng", 1 << 20, t.isoformat(timespec="milliseconds"))
                for n, t in zip(numbers, times, strict=True)
            ]
            for seq, n, moment in zip(ledger.receive(received), numbers, times, strict=True):
                ledger.conclude(
                    seq,
                    verdict="folded",
                    sensor_id=id_,
                    kind="dark",
                    exposure_s=float(2 ** (n % 4)),
                    iso=100.0,
                    sensor_temp_c=15.0 + n % 7,
                    taken_at=moment.isoformat(),
                    counted=True,
                )
                ledger.add_observations(id_, seq, at, at % 997 + 512.0, at % 997 + 0.5, np.full(sites, 5))
                ledger.thin_observations(id_, seq)
                if n % (shots // sites) == 0 and n // (shots // sites) < sites:
                    site = int(at[n // (shots // sites)])
                    ledger.add_transitions(
                        TransitionRow(id_, site, seq, change, {"kind": "hot", "log_e": 20.0, "excess_sigma": 9.0})
                        for change in ("appeared", "stable")
                    )
            if first + TOGETHER in (shots // 100, shots // 10, shots // 2, shots):
                ledger.commit()
                sizes.append((first + TOGETHER, (root / "ledger.sqlite").stat().st_size / 1e6))
    return sizes, time.perf_counter() - started


def main() -> None:
    """Fill a ledger, ask it, and print what was measured."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--shots", type=int, default=100_000)
    parser.add_argument("--sites", type=int, default=50)
    parser.add_argument("--folder", type=Path, default=None)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        sizes, filled_s = fill(Path(folder) / "state", given.shots, given.sites)
        measured: dict[str, object] = {"ledger_mb": dict(sizes), "per_shot_ms": 1000 * filled_s / given.shots}
        started = time.perf_counter()
        with State(Path(folder) / "state", create=False) as state:
            measured["open_s"] = time.perf_counter() - started
            (id_,) = state.ledger.sensors()
            measured["frames_observed"] = len(state.ledger.frames_observed(id_))
            measured["observations"] = state.ledger.rows("SELECT count(*) FROM observation")[0][0]
            for question in ("status", "history"):
                started = time.perf_counter()
                answer = answers.answer(state, question, {})
                measured[f"{question}_s"] = time.perf_counter() - started
            (sensor,) = answer["sensors"]
            measured["sessions"] = len(sensor["sessions"])
            measured["defects"] = len(sensor["defects"])
    print(json.dumps(measured, indent=1))


if __name__ == "__main__":
    main()
