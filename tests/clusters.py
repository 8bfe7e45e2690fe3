"""Scans on a cluster for the tests: in this process, and all that a state tells afterwards, to the last byte."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from blake3 import blake3

from conftest import environment, told
from hotpixd.cluster.coordinator import ClusterMonitor
from hotpixd.cluster.inputs import find_inputs
from hotpixd.core.frame import ShotKind
from hotpixd.monitor import Outcome
from hotpixd.store import checkpoint
from hotpixd.store.state import State


def cluster_feed(
    client: Any,
    root: Path,
    *wanted: Path | str,
    kind: ShotKind | None = None,
    stop: Any = lambda: False,
    **options: Any,
) -> list[Outcome]:
    """Scan on a cluster into a state, and checkpoint."""
    inputs = find_inputs(map(str, wanted), kind)
    assert not inputs.listing.missing
    with State(root) as state, ClusterMonitor(state, client, inputs.marks, **options) as monitor:
        outcomes = list(monitor.replay())
        outcomes += monitor.process(inputs.listing.shots, stop)
        monitor.checkpoint()
    return outcomes


def whole(root: Path) -> dict[str, Any]:
    """Return all that a state tells, and the bytes of its statistics."""
    statistics = {}
    for folder in sorted((root / "sensors").iterdir()):
        generation = checkpoint.read_generation(checkpoint.generations(folder)[0])
        arrays = {name: (a.dtype.str, blake3(a.tobytes()).hexdigest()) for name, a in generation.arrays.items()}
        statistics[folder.name] = generation.header["sensor"], generation.header["chain"], arrays
    with State(root) as state:
        found = state.ledger._shots("ORDER BY seq")
        rows = [(r.seq, r.key, r.name, r.path, r.size, r.verdict, r.reason, r.samples_digest) for r in found]
    all_of_it = {**told(root), "statistics": statistics, "rows": rows}
    for sensor in all_of_it["defects"]["sensors"]:
        for defect in sensor["defects"]:
            # Where the file does not say, a shot's time is that of its receipt.
            del defect["first_seen"], defect["stable_since"]
    return all_of_it


def comparable(root: Path) -> dict[str, Any]:
    """Return all that a state tells but where its shots were."""
    all_of_it = whole(root)
    rows = [(seq, key, name, *rest) for seq, key, name, _path, *rest in all_of_it.pop("rows")]
    for shot in all_of_it["shots"]:
        shot.pop("path", None)
    return {**all_of_it, "rows": rows}


def fates(outcomes: list[Outcome]) -> list[tuple[str, str, str]]:
    """Return what became of each shot; what needs no decoder is told of early by one machine."""
    return sorted((str(outcome.path), str(outcome.fate), outcome.reason or "") for outcome in outcomes)


@contextmanager
def scheduler(folder: Path, *, workers: int = 2) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """Start a scheduler and workers as a user would: with Dask's own command."""
    dask = [sys.executable, "-m", "dask"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "cwd": folder, "env": environment()}
    place = folder / "scheduler.json"
    first = subprocess.Popen(
        [*dask, "scheduler", "--host", "127.0.0.1", "--port", "0", "--no-dashboard", "--scheduler-file", place], **quiet
    )
    with killed_at_last(first):
        until(place.exists)
        address = json.loads(place.read_text())["address"]
        with ExitStack() as running:
            for _ in range(workers):
                order = [*dask, "worker", address, "--nthreads", "1", "--no-dashboard", "--local-directory", folder]
                running.enter_context(killed_at_last(subprocess.Popen(order, **quiet)))
            yield address, first


@contextmanager
def killed_at_last(process: subprocess.Popen[bytes]) -> Iterator[None]:
    try:
        yield
    finally:
        process.terminate()
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def until(true: Any, seconds: float = 30.0) -> None:
    """Wait until something is true."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.05)
