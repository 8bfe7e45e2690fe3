"""Show how many shots per second a scan folds, beside what decoding and the kernels alone allow on the same cores.

Makes pictures of a virtual camera once, JPEG and uncompressed DNG, then prints a Markdown table of one run. From the
repository (80 shots take 5 GB and some minutes to make; give `--work` to keep them for the next run):

    PYTHONPATH=daemon python tests/benchmarks/throughput.py --work /var/tmp/hotpixd-throughput

Every measurement runs in a process of its own, over files in the page cache and with compiled kernels in numba's
cache; each is repeated, and the fastest counts. Measure on a quiet machine.

What the rows mean:

- decode alone, kernel alone: one thread, per shot. Kernel is the sums, the events and the counts.
- allowed: cores / (decode + kernel), what perfect use of every core would give.
- bare: measured, threads that decode and fold; no ledger, no spool, no evidence, no checkpoint.
- scan: `hotpixd scan` as a user runs it, with an empty state. Whole is from the start of the process to its end,
  steady is from the second outcome to the last, start-up and final checkpoint left out.
- textbook: Pillow (rawpy for DNG), then Welford's update in float64 on whole arrays, one process.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

FORMATS = {"JPEG": "jpg", "DNG": "dng"}

# --- making the pictures


def make_pictures(work: Path, shots: int, size: tuple[int, int], quality: int, processes: int) -> None:
    """Write the shots that are missing."""
    work.mkdir(parents=True, exist_ok=True)
    missing = [i for i in range(shots) if not all(_picture(work, f, i).exists() for f in FORMATS)]
    parts = [missing[k::processes] for k in range(processes)]
    with get_context("spawn").Pool(processes) as pool:
        pool.map(partial(_make, work=work, size=size, quality=quality), [part for part in parts if part], chunksize=1)


def _make(indices: Sequence[int], work: Path, size: tuple[int, int], quality: int) -> None:
    from hotpixd.simulate import VirtualSensor

    camera = VirtualSensor(*size, seed=5)
    for index in indices:
        shot = camera.shot(index, "moving")
        camera.write_jpeg(_picture(work, "JPEG", index), shot, quality)
        camera.write_dng(_picture(work, "DNG", index), shot)


def _picture(work: Path, file_format: str, index: int) -> Path:
    return work / f"shot_{index:04d}.{FORMATS[file_format]}"


# --- what runs in processes of its own, each printing one JSON object as its last line


def alone(files: Sequence[Path], _: Path) -> dict[str, float]:
    """Decode, and run the kernels, in one thread; s per shot."""
    from hotpixd.intake.decode import decode, keep_large_buffers

    keep_large_buffers()
    accumulator, fold = _folder(decode(files[0]), 1, map)
    decoding, folding = [], []
    for path in files:
        start = time.perf_counter()
        frame = decode(path)
        decoded = time.perf_counter()
        fold(frame)
        folding.append(time.perf_counter() - decoded)
        decoding.append(decoded - start)
    assert accumulator.frames == len(files) + 1
    # The first shots still get their memory.
    return {"decode_s": _typical(decoding[2:] or decoding), "kernel_s": _typical(folding[2:] or folding)}


def bare(files: Sequence[Path], _: Path) -> dict[str, float]:
    """Decode and fold on all cores, and nothing else."""
    from hotpixd.intake.decode import decode, keep_large_buffers

    keep_large_buffers()
    cores = _cores()
    with ThreadPoolExecutor(cores) as decoders, ThreadPoolExecutor(cores) as folders:
        _, fold = _folder(decode(files[0]), cores, folders.map)
        start = time.perf_counter()
        ahead = [decoders.submit(decode, path) for path in files[:cores]]
        for k in range(len(files)):
            frame = ahead.pop(0).result()
            if k + cores < len(files):
                ahead.append(decoders.submit(decode, files[k + cores]))
            fold(frame)
            del frame
        return {"bare_per_s": len(files) / (time.perf_counter() - start)}


def _folder(frame: Any, slabs: int, each_slab: Any) -> tuple[Any, Callable[[Any], None]]:
    """Return an accumulator that has its memory, and what folds a frame into it."""
    import numpy as np

    from hotpixd.core.accumulator import Accumulator

    layout = frame.sensor.layout
    accumulator = Accumulator(layout, frame.sensor.dtype, each_slab=each_slab, slabs=slabs)
    out_of_reach = np.full((3, 2), 1 << 30)

    def fold(frame: Any) -> None:
        accumulator.count(accumulator.fold(frame.samples, lone=layout.mosaic), out_of_reach)

    fold(frame)
    return accumulator, fold


def scan(files: Sequence[Path], work: Path) -> dict[str, float]:
    """Run the command line's scan, and note when what was done."""
    started = float(os.environ["HOTPIXD_BENCHMARK_START"])
    from hotpixd import cli, monitor

    outcomes: list[float] = []
    checkpoint_s: list[float] = []
    checkpointed_at: list[float] = []

    class Timed(monitor.Monitor):
        def process(self, *args: Any, **kwargs: Any) -> Any:
            for outcome in super().process(*args, **kwargs):
                outcomes.append(time.time())
                yield outcome

        def checkpoint(self) -> None:
            before = time.time()
            super().checkpoint()
            checkpoint_s.append(time.time() - before)
            checkpointed_at.append(time.time())

    monitor.Monitor = Timed  # type: ignore[misc]
    sys.argv = ["hotpixd", "scan", "--state", str(work / "state"), *map(str, files)]
    code: object = 0
    try:
        cli.main()
    except SystemExit as done:
        code = done.code
    if code:
        raise SystemExit(f"scan failed with exit code {code}")
    return {
        "start_s": outcomes[0] - started,
        "steady_per_s": (len(outcomes) - 1) / max(outcomes[-1] - outcomes[0], 1e-9),
        "checkpoint_s": checkpoint_s[-1],
        "checkpointed_at": checkpointed_at[-1],
    }


def textbook(files: Sequence[Path], _: Path) -> dict[str, float]:
    """Mean and variance of all samples as the textbook has it."""
    import numpy as np

    load = _load_raw if files[0].suffix == ".dng" else _load_picture
    n, mean, m2 = 0, np.zeros(load(files[0]).shape), np.zeros(load(files[0]).shape)
    start = time.perf_counter()
    for path in files:
        x = load(path)
        n += 1
        delta = x - mean
        mean += delta / n
        m2 += delta * (x - mean)
    return {"textbook_per_s": n / (time.perf_counter() - start)}


def _load_picture(path: Path) -> Any:
    import numpy as np
    from PIL import Image

    return np.asarray(Image.open(path))


def _load_raw(path: Path) -> Any:
    import rawpy

    with rawpy.imread(str(path)) as raw:
        return raw.raw_image_visible.copy()


CHILDREN: dict[str, Callable[[Sequence[Path], Path], dict[str, float]]] = {
    f.__name__: f for f in (alone, bare, scan, textbook)
}


def measure(name: str, files: Sequence[Path], work: Path) -> dict[str, float]:
    """Run one of `CHILDREN` in a process of its own; add its wall time (s) and its peak memory (MB)."""
    shutil.rmtree(work / "state", ignore_errors=True)
    started = time.time()
    environment = {**os.environ, "HOTPIXD_BENCHMARK_START": repr(started)}
    # As for a user, modules are compiled once.
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    environment["PYTHONPYCACHEPREFIX"] = str(work / "bytecode")
    command = [sys.executable, __file__, "--child", name, "--work", str(work), *map(str, files)]
    done = subprocess.run(command, stdout=subprocess.PIPE, env=environment, text=True, check=True)
    ended = time.time()
    shutil.rmtree(work / "state", ignore_errors=True)
    numbers = json.loads(done.stdout.splitlines()[-1])
    return {**numbers, "wall_s": ended - started, "end_s": ended - numbers.get("checkpointed_at", started)}


def _as_child(name: str, files: Sequence[Path], work: Path) -> None:
    numbers = CHILDREN[name](files, work)
    numbers["peak_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6
    print(json.dumps(numbers))


# --- the table


def rows_of(file_format: str, given: argparse.Namespace) -> dict[str, str]:
    """Measure one format and return the table's cells by the names of its rows."""
    files = [_picture(given.work, file_format, index) for index in range(given.shots)]
    width, height = given.size
    samples = width * height * (3 if file_format == "JPEG" else 1)
    frame_mb = samples * (1 if file_format == "JPEG" else 2) / 1e6
    budget_mb = samples * (18 if file_format == "JPEG" else 20) / 1e6 + 4 * frame_mb + 250
    measure("scan", files[:2], given.work)  # compiles the kernels if they never were
    rounds = [
        {
            **measure("alone", files[:12], given.work),
            **measure("bare", files, given.work),
            **measure("textbook", files[: given.textbook], given.work),
            **measure("scan", files, given.work),
        }
        for _ in range(given.repeats)
    ]
    decode_s, kernel_s = (min(r[key] for r in rounds) for key in ("decode_s", "kernel_s"))
    allowed = _cores() / (decode_s + kernel_s)
    speeds = ("bare_per_s", "steady_per_s", "textbook_per_s")
    bare_per_s, steady, by_the_book = (max(r[key] for r in rounds) for key in speeds)
    best = min(rounds, key=lambda r: r["wall_s"])
    whole = len(files) / best["wall_s"]
    longer = {n: measure("scan", _first(given, file_format, n), given.work) for n in given.memory}
    return {
        "size of a file": f"{sum(path.stat().st_size for path in files) / len(files) / 1e6:.1f} MB",
        "decode alone": f"{1000 * decode_s:.1f} ms",
        "kernel alone": f"{1000 * kernel_s:.2f} ms",
        f"allowed on {_cores()} cores": f"{allowed:.2f} shots/s",
        "bare": f"{bare_per_s:.2f} shots/s",
        "scan, whole": f"{whole:.2f} shots/s ({best['wall_s']:.2f} s)",
        "of it: until the first outcome": f"{best['start_s']:.2f} s",
        "of it: final checkpoint": f"{best['checkpoint_s']:.2f} s",
        "of it: from there to the end": f"{best['end_s']:.2f} s",
        "scan, steady": f"{steady:.2f} shots/s",
        "steady / allowed": f"{steady / allowed:.0%}",
        "steady / bare": f"{steady / bare_per_s:.0%}",
        "whole / bare": f"{whole / bare_per_s:.0%}",
        "textbook": f"{by_the_book:.2f} shots/s",
        "steady / textbook": f"{steady / by_the_book:.1f} x",
        "whole / textbook": f"{whole / by_the_book:.1f} x",
        "peak memory": f"{max(r['peak_mb'] for r in rounds):.0f} MB",
        "budget": f"{budget_mb:.0f} MB",
        **{f"peak memory, {n} shots": f"{numbers['peak_mb']:.0f} MB" for n, numbers in longer.items()},
        **{f"scan, whole, {n} shots": f"{n / numbers['wall_s']:.2f} shots/s" for n, numbers in longer.items()},
    }


def _first(given: argparse.Namespace, file_format: str, n: int) -> list[Path]:
    return [_picture(given.work, file_format, index) for index in range(n)]


def _typical(times: Sequence[float]) -> float:
    return sorted(times)[len(times) // 2]


def _cores() -> int:
    return len(os.sched_getaffinity(0))


def main(arguments: Sequence[str] | None = None, out: Callable[[str], object] = sys.stdout.write) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, help="folder for pictures and state, kept [default: a temporary one]")
    parser.add_argument("--shots", type=int, default=40, help="shots of a scan")
    parser.add_argument("--size", type=int, nargs=2, default=(6000, 4000), metavar=("WIDTH", "HEIGHT"))
    parser.add_argument("--quality", type=int, default=95, help="of the JPEGs: 5 to 9 MB each")
    parser.add_argument("--formats", nargs="+", choices=list(FORMATS), default=list(FORMATS))
    parser.add_argument("--repeats", type=int, default=3, help="rounds; the fastest counts")
    parser.add_argument("--textbook", type=int, default=8, help="shots for the textbook, which is slow")
    parser.add_argument("--memory", type=int, nargs="*", default=[20, 40, 80], help="shots of scans to compare")
    parser.add_argument("--child", choices=list(CHILDREN), help=argparse.SUPPRESS)
    parser.add_argument("files", nargs="*", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.child:
        _as_child(given.child, given.files, given.work)
        return
    with tempfile.TemporaryDirectory(prefix="hotpixd-throughput-") as folder:
        given.work = given.work or Path(folder)
        make_pictures(given.work, max([given.shots, *given.memory]), tuple(given.size), given.quality, _cores())
        columns = {file_format: rows_of(file_format, given) for file_format in given.formats}
    out(f"{given.size[0]}x{given.size[1]}, {given.shots} shots, {_cores()} cores, best of {given.repeats}.\n\n")
    out(f"| | {' | '.join(columns)} |\n{'| --- ' * (1 + len(columns))}|\n")
    for name in next(iter(columns.values())):
        out(f"| {name} | {' | '.join(rows[name] for rows in columns.values())} |\n")


if __name__ == "__main__":
    main()
