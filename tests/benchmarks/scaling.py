"""Show what a fold costs against the number of frames, of defective sites, and of sensors: it should not grow.

Folds frames made in memory, no files, into `Sensor`s, in one thread; prints a Markdown table per question:

    PYTHONPATH=daemon python tests/benchmarks/scaling.py

- sites: frames of 6 megapixels with 10 to 100,000 hot samples, all candidates after a few darks; ms per frame
  when they have become stable, beside the kernels alone.
- frames: 100,000 frames of 96x64 with 10 hot samples; ms per frame in stretches that grow tenfold.
- sensors: 240 frames of 96x64 in turn from 1 to 100 sensors, through the whole monitor on a state of its own;
  ms per frame. Their ledger and checkpoints are in it.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from hotpixd.core.accumulator import Accumulator
from hotpixd.core.frame import Frame, SampleKind, SensorIdentity, SensorLayout, ShotInfo, ShotKind
from hotpixd.core.sensor import Sensor


def darks(layout: SensorLayout, hot: int, seed: int = 1) -> Iterator[Frame]:
    """Yield darks of a raw sensor with hot samples, without end."""
    rng = np.random.default_rng(seed)
    identity = SensorIdentity("Test", "Scaling", str(seed), SampleKind.RAW, layout, "uint16")
    sites = rng.choice(layout.size, hot, replace=False)
    excess = np.zeros(layout.size, np.uint16)
    excess[sites] = rng.integers(150, 3000, hot)
    noise = rng.normal(512, 8, 4 * layout.size).astype(np.uint16)
    while True:
        # Another part each time: to draw new noise would take longer than all that is measured.
        start = int(rng.integers(0, 3 * layout.size))
        samples = (noise[start : start + layout.size] + excess).reshape(layout.shape)
        info = ShotInfo(exposure_s=30.0, iso=800)
        yield Frame(identity, samples, ShotKind.DARK, info, black_level_adu=512.0, white_level_adu=16383.0)


def sites_table(counts: Sequence[int], frames: int) -> Iterator[tuple[str, ...]]:
    """Yield ms per frame by number of hot samples."""
    layout = SensorLayout(3000, 2000, "RGGB")
    yield "hot samples", "stable", "ms per frame", "largest", "kernels alone", "appearing (first 12 frames)"
    for hot in counts:
        source = darks(layout, hot)
        sensor = Sensor(next(source).sensor)
        begun = [_timed(sensor.fold, next(source), seq) for seq in range(1, 13)]
        steady = [_timed(sensor.fold, next(source), seq) for seq in range(13, 13 + frames)]
        alone = Accumulator(layout, "uint16")
        kernels = [_timed(_kernels, alone, next(source)) for _ in range(frames)]
        yield (
            f"{hot:,}", f"{sensor.found['stable']:,}", _ms(sum(steady) / frames), _ms(max(steady)),
            _ms(sum(kernels) / frames), f"{sum(begun):.1f} s",
        )  # fmt: skip


def frames_table(most: int) -> Iterator[tuple[str, ...]]:
    """Yield ms per frame in stretches."""
    source = darks(SensorLayout(96, 64, "RGGB"), 10)
    sensor = Sensor(next(source).sensor)
    yield "frames", "ms per frame", "stable"
    done, stretch = 0, 10
    while stretch <= most:
        started = time.perf_counter()
        for seq in range(done, stretch):
            sensor.fold(next(source), seq + 1)
        yield (
            f"{done:,} to {stretch:,}",
            _ms((time.perf_counter() - started) / (stretch - done)),
            str(sensor.found["stable"]),
        )
        done, stretch = stretch, stretch * 10


def sensors_table(counts: Sequence[int], frames: int) -> Iterator[tuple[str, ...]]:
    """Yield ms per frame by number of sensors, through the monitor."""
    from hotpixd.intake.files import find_shots
    from hotpixd.monitor import Monitor
    from hotpixd.simulate import VirtualSensor, write_series
    from hotpixd.store.state import State

    yield "sensors", "frames", "ms per frame"
    for count in counts:
        with tempfile.TemporaryDirectory(prefix="hotpixd-scaling-") as folder:
            for k in range(count):
                sensor = VirtualSensor(96, 64, hot=3, stuck=1, dead=1, seed=k)
                for _ in write_series(
                    Path(folder) / f"pictures/{k:03d}", sensor, max(frames // count, 1), "moving", "dng"
                ):
                    pass
            listing = find_shots([f"{folder}/pictures"], None)
            # In turn, as from that many cameras at once.
            shots = sorted(listing.shots, key=lambda shot: (shot.path.name, shot.path.parent.name))
            with State(Path(folder) / "state", create=True) as state, Monitor(state) as monitor:
                started = time.perf_counter()
                done = sum(1 for _ in monitor.process(shots))
                monitor.checkpoint()
                yield str(count), str(done), _ms((time.perf_counter() - started) / done)


def _kernels(alone: Accumulator, frame: Frame) -> None:
    alone.count(alone.fold(frame.samples, lone=False), np.full((3, 2), 1 << 30))


def _timed(work: Callable[..., object], *given: object) -> float:
    started = time.perf_counter()
    work(*given)
    return time.perf_counter() - started


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:.1f}"


def _print(rows: Iterator[tuple[str, ...]]) -> None:
    for k, row in enumerate(rows):
        print(f"| {' | '.join(row)} |", flush=True)
        if not k:
            print("| --- " * len(row) + "|")
    print()


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("sites", "frames", "sensors"), help="one table")
    parser.add_argument("--sites", type=int, nargs="+", default=[10, 100, 1_000, 10_000, 100_000])
    parser.add_argument("--frames", type=int, default=100_000, help="small frames in all")
    parser.add_argument("--steady", type=int, default=24, help="frames after which a number of sites is judged")
    parser.add_argument("--sensors", type=int, nargs="+", default=[1, 10, 100])
    given = parser.parse_args(arguments)
    tables = {
        "sites": lambda: sites_table(given.sites, given.steady),
        "frames": lambda: frames_table(given.frames),
        "sensors": lambda: sensors_table(given.sensors, 200),
    }
    for name, table in tables.items():
        if given.only in (None, name):
            _print(table())


if __name__ == "__main__":
    sys.exit(main())
