"""What a scan of very many frames would take on a cluster: an analytic model, and the runs it is checked against.

    python tests/benchmarks/cluster_plan.py --measure      the constants, on this machine, with 24-megapixel raw frames
    python tests/benchmarks/cluster_plan.py --check        model and measured scan with 1 and 2 local workers
    python tests/benchmarks/cluster_plan.py                the plan: 1 to 200 workers

A scan is as fast as the slowest of four things that go on at the same time: the workers' cores, the workers' network,
the network of the machine that follows the frames, and that machine's one core. After a sensor's last frame its sums
are merged and written, which nothing overlaps if there is only one sensor.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path


@dataclass(frozen=True)
class Costs:
    """What one frame, chunk or sensor costs. Defaults: `--measure --shots 16` on 2 busy cores of an EPYC VM."""

    frame_bytes: float = 48e6
    """Of a file: uncompressed raw of 24 megapixels."""

    measure_s: float = 0.28
    """Worker: read, decode in the jail, add up, find and pack events, keep the frame on its disk."""

    events_bytes: float = 0.442e6
    """Of a frame's events, compressed."""

    sites_bytes: float = 0.125e6
    """Of samples at sites looked at: some 200 sites with what is around them."""

    follow_s: float = 0.056
    """One machine: unpack, gate, count, observe. The first two frames of a sensor took 0.6 and 1.2 s: most sites come
    under suspicion in them, and are fetched."""

    sums_bytes: float = 288e6
    """Of one sensor: 12 bytes per sample."""

    save_s: float = 3.0
    """Per generation: merged into the statistic, compressed, on the disk. An estimate."""

    start_s: float = 0.0
    """Start of the command and of local workers."""

    link_bytes_per_s: float = 1.25e9
    """10 Gbit/s, of every machine."""

    chunk: int = 64
    checkpoint_frames: int = 1024
    threads: int = 1
    """Per worker."""


def plan(costs: Costs, frames: int, sensors: int, workers: int) -> dict[str, float]:
    """Return times in s and bytes of a scan whose folders hold one sensor each."""
    per_sensor = frames / sensors
    generations = sensors * max(1.0, per_sensor / costs.checkpoint_frames)
    # Chunks are handed out in order: of one generation's frames every worker has a part, or one chunk.
    holders = min(float(workers), max(1.0, min(per_sensor, costs.checkpoint_frames) / costs.chunk))
    merges = generations * (holders - 1)
    chunk_merges = frames / costs.chunk - generations * holders
    moved = merges * costs.sums_bytes
    into_one = frames * (costs.events_bytes + costs.sites_bytes) + generations * costs.sums_bytes
    worker_s = frames * costs.measure_s / (workers * costs.threads)
    network_s = (frames * costs.frame_bytes + moved) / workers / costs.link_bytes_per_s
    one_network_s = into_one / costs.link_bytes_per_s
    one_core_s = frames * costs.follow_s + generations * costs.save_s
    slowest = max(worker_s, network_s, one_network_s, one_core_s)
    return {
        "read": frames * costs.frame_bytes,
        "between workers": moved,
        "to one": into_one,
        "merges": merges + max(chunk_merges, 0.0),
        "workers": worker_s,
        "network": network_s,
        "one network": one_network_s,
        "one core": one_core_s,
        "total": costs.start_s + slowest + costs.chunk * costs.measure_s * (frames > costs.chunk),
    }


def table(costs: Costs, frames: int, sensors: int, counts: Sequence[int]) -> str:
    """Return the plan as a table, hours and terabytes."""
    lines = [
        "| workers | workers' cores, h | their network, h | one network, h | one core, h | total, h | moved between"
        " workers, TB | to one, TB | merges |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for count in counts:
        p = plan(costs, frames, sensors, count)
        hours = [p[name] / 3600 for name in ("workers", "network", "one network", "one core", "total")]
        cells = [f"{h:.1f}" for h in hours] + [f"{p[n] / 1e12:.2f}" for n in ("between workers", "to one")]
        lines.append(f"| {count} | " + " | ".join(cells) + f" | {p['merges']:,.0f} |")
    return "\n".join(lines)


def best_of(work: Callable[[], object], times: int = 3) -> float:
    """Return the shortest of some runs, s."""
    found = []
    for _ in range(times):
        started = time.perf_counter()
        work()
        found.append(time.perf_counter() - started)
    return min(found)


def pictures(folder: Path, frames: int, size: tuple[int, int]) -> list[Path]:
    """Write raw frames of a virtual sensor."""
    from hotpixd.simulate import VirtualSensor, write_series

    sensor = VirtualSensor(*size, hot=200, stuck=10, dead=10)
    return list(write_series(folder, sensor, frames, "moving"))


def measured(folder: Path, frames: int, size: tuple[int, int]) -> Costs:
    """Measure the constants with frames of this size."""
    from hotpixd.cluster import worker
    from hotpixd.cluster.worker import Chunk, Wanted
    from hotpixd.core.followed import Followed, Glimpse
    from hotpixd.core.sensor import Sensor

    files = pictures(folder, frames, size)
    wanted = tuple(Wanted(str(path), path.stat().st_size) for path in files)
    worker.measure(Chunk(0, wanted[:1], None, luma=False))
    worker.forget()
    started = time.perf_counter()
    result = worker.measure(Chunk(1, wanted, None, luma=False))
    measure_s = (time.perf_counter() - started) / frames
    (sums,) = result.sums.values()
    seen = [found.seen for found in result.found]
    keys = [str(found.key) for found in result.found]
    assert all(seen)
    sensor = Sensor(seen[0].sensor)
    followed = sensor.accumulator = Followed.of(sensor.accumulator)
    looked = 0

    def look(sites):
        nonlocal looked
        looked += sites.size * frames * 2
        import numpy as np

        none = np.zeros(sites.size, np.uint64)
        return Glimpse(worker.glimpse_there(keys, sites, "uint16"), none, none)

    took = []
    followed.begin(frames, look, sensor.followed_sites)
    for seq, one in enumerate(seen, 1):
        started = time.perf_counter()
        followed.advance()
        events = followed.unpack(one.planes(), one.totals, one.phases)
        sensor.follow(one.frame(followed.samples), events, one.noise, seq)
        took.append(time.perf_counter() - started)
    # In the first ones most sites come under suspicion, and are fetched: of a thousand frames they are few.
    later = took[frames // 2 :]
    follow_s = sum(later) / len(later)
    print(f"following, s per frame: {' '.join(f'{each:.2f}' for each in took)}", file=sys.stderr)
    followed.settle(sums)
    worker.forget()
    return Costs(
        frame_bytes=files[0].stat().st_size,
        measure_s=measure_s,
        events_bytes=result.events_bytes / frames,
        sites_bytes=looked / frames,
        follow_s=follow_s,
        sums_bytes=sums.total.nbytes + sums.squares.nbytes,
    )


def checked(folder: Path, frames: int, size: tuple[int, int]) -> str:
    """Return what the model says and what a scan took, with 1 and 2 workers here."""
    costs = measured(folder / "few", 6, size)
    files = folder / "shots"
    pictures(files, frames, size)
    nothing = timed(["--help"], folder)
    lines = []
    for count in (1, 2):
        state = folder / f"state-{count}"
        took = timed(["scan", str(files), "--cluster", f"local:{count}", "--state", str(state)], folder)
        again = timed(["scan", str(files), "--cluster", f"local:{count}", "--state", str(state)], folder)
        shutil.rmtree(state)
        chunk = -(-frames // (4 * count))
        # All on one machine: nothing goes over a wire, and its cores do the workers' work and follow as well.
        here = replace(costs, chunk=chunk, link_bytes_per_s=5e9, start_s=again)
        p = plan(here, frames, 1, count)
        lines.append(f"{count} workers: model {p['total']:.1f} s, measured {took:.1f} s (start {again:.1f} s)")
    return "\n".join([f"help alone {nothing:.1f} s; {costs}", *lines])


def timed(arguments: Sequence[str], folder: Path) -> float:
    """Return how long the command takes, s."""
    command = Path(sys.executable).with_name("hotpixd")
    started = time.perf_counter()
    subprocess.run([command, *arguments], check=True, cwd=folder, stdout=subprocess.DEVNULL)
    return time.perf_counter() - started


def main() -> None:
    """Print what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", action="store_true", help="measure the constants and print them")
    parser.add_argument("--check", action="store_true", help="compare the model with scans on this machine")
    parser.add_argument("--frames", type=int, default=1_000_000)
    parser.add_argument("--sensors", type=int, default=1000)
    parser.add_argument("--size", type=int, nargs=2, default=(6000, 4000), metavar=("WIDTH", "HEIGHT"))
    parser.add_argument("--shots", type=int, default=6, help="that --measure and --check make")
    given = parser.parse_args()
    if not given.measure and not given.check:
        print(table(Costs(), given.frames, given.sensors, (1, 2, 5, 10, 20, 50, 100, 200)))
        return
    with tempfile.TemporaryDirectory() as folder:
        work = checked if given.check else measured
        print(work(Path(folder), given.shots, tuple(given.size)))


if __name__ == "__main__":
    main()
