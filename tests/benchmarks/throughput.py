"""Show how many shots per second a scan folds, beside what decoding and the kernels alone allow on the same cores.

Makes pictures of a virtual camera once, then prints a Markdown table of one run. From the repository (80 shots take 5
GB and some minutes to make; give `--work` to keep them for the next run):

    PYTHONPATH=daemon python tests/benchmarks/throughput.py --work /var/tmp/hotpixd-throughput

Every measurement runs in a process of its own, over files in the page cache and with compiled kernels in numba's
cache; each is repeated, and the fastest counts. Measure on a quiet machine.

What the rows mean:

- decode alone, kernel alone: one thread, per shot. Kernel is the sums, the events and the counts.
- copy: to copy once what the kernel must read and write: the samples, the events, the counts, and a quarter of the
  sums, to which four frames are added together.
- allowed: cores / (decode + kernel), what perfect use of every core would give if no core slowed the others.
- all cores busy: decoding alone, then the kernels alone, each on all cores at once; what both one after the other give.
- bare: measured, threads that decode and fold; no ledger, no spool, no evidence, no checkpoint.
- scan: `hotpixd scan` as a user runs it, with an empty state. Whole is from the start of the process to its end,
  steady is from the second outcome to the last, start-up and final checkpoint left out.
- textbook: what reads the format (Pillow, rawpy, tifffile, astropy), then Welford's update in float64 on whole
  arrays, one process.
- rawpy.enhance: `find_bad_pixels(find_dead=False)` over some of the same DNGs, with the default of two of three.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

FORMATS = {
    "JPEG": ".jpg",
    "JPEG, luma": ".jpg",
    "DNG": ".dng",
    "DNG, lossless JPEG": "_lossless.dng",
    "TIFF": ".tif",
    "FITS": ".fits",
}
"""Ends of names by format. TIFF and FITS are mosaics of 16 bit; nothing but the JPEGs is lossy, and of them the luma
alone may be folded."""

USUAL = ("JPEG", "DNG")

# --- making the pictures


def make_pictures(
    work: Path,
    shots: int,
    size: tuple[int, int],
    quality: int,
    processes: int,
    formats: Sequence[str] = USUAL,
) -> None:
    """Write the shots that are missing."""
    work.mkdir(parents=True, exist_ok=True)
    missing = [i for i in range(shots) if not all(_picture(work, f, i).exists() for f in formats)]
    parts = [missing[k::processes] for k in range(processes)]
    make = partial(_make, work=work, size=size, quality=quality, formats=formats)
    with get_context("spawn").Pool(processes) as pool:
        pool.map(make, [part for part in parts if part], chunksize=1)


def _make(indices: Sequence[int], work: Path, size: tuple[int, int], quality: int, formats: Sequence[str]) -> None:
    from hotpixd.simulate import VirtualSensor

    camera = VirtualSensor(*size, seed=5)
    for index in indices:
        shot = camera.shot(index, "moving")
        for file_format in formats:
            path = _picture(work, file_format, index)
            if path.suffix == ".jpg":
                camera.write_jpeg(path, shot, quality)
            elif file_format == "DNG":
                camera.write_dng(path, shot)
            elif file_format == "TIFF":
                _write_tiff(path, shot.mosaic)
            elif file_format == "FITS":
                _write_fits(path, shot)
            else:
                _write_lossless(path, camera, shot)


def _write_tiff(path: Path, mosaic: Any) -> None:
    import tifffile

    tifffile.imwrite(path, mosaic, photometric="minisblack", metadata=None, software=False)


def _write_fits(path: Path, shot: Any) -> None:
    from astropy.io import fits

    unit = fits.PrimaryHDU(shot.mosaic)
    unit.header.update({"BAYERPAT": "RGGB", "ROWORDER": "TOP-DOWN", "EXPTIME": shot.exposure_s})
    unit.writeto(path, overwrite=True)


def _write_lossless(path: Path, camera: Any, shot: Any) -> None:
    """Write a DNG in tiles of lossless JPEG, with the header of an uncompressed one."""
    import imagecodecs
    import numpy as np
    import tifffile

    plain = path.with_name(f"plain_{path.name}")
    camera.write_dng(plain, shot)
    with tifffile.TiffFile(plain) as file:
        page = file.pages.first
        ours = {256, 257, 258, 259, 262, 273, 277, 278, 279, 282, 283, 296, 305, 322, 323, 324, 325}
        tags = [(t.code, t.dtype, t.count, t.value, True) for t in page.tags.values() if t.code not in ours]
    plain.unlink()
    side = 256

    def tiles() -> Any:
        for y in range(0, shot.mosaic.shape[0], side):
            for x in range(0, shot.mosaic.shape[1], side):
                part = shot.mosaic[y : y + side, x : x + side]
                rest = (side - part.shape[0], side - part.shape[1])
                yield imagecodecs.ljpeg_encode(np.pad(part, ((0, rest[0]), (0, rest[1])), "edge"), bitspersample=16)

    tifffile.imwrite(
        path, tiles(), shape=shot.mosaic.shape, dtype=np.uint16, tile=(side, side), compression=7, photometric=32803,
        extratags=tags, metadata=None, software=False,
    )  # fmt: skip


def _picture(work: Path, file_format: str, index: int) -> Path:
    return work / f"shot_{index:04d}{FORMATS[file_format]}"


# --- what runs in processes of its own, each printing one JSON object as its last line


def alone(files: Sequence[Path], _: Path, *, luma: bool) -> dict[str, float]:
    """Decode, and run the kernels, in one thread; s per shot."""
    from hotpixd.intake.decode import decode, keep_large_buffers

    keep_large_buffers()
    frame = decode(files[0], luma=luma)
    accumulator, fold = _folder(frame, 1, map)
    decoding, passes = [], []
    frames = []
    accumulator.sum_up()
    # Four frames go into the sums together, so the time of four is taken.
    for start in range(0, len(files), 4):
        frames.clear()
        for path in files[start : start + 4]:
            began = time.perf_counter()
            frames.append(decode(path, luma=luma))
            decoding.append(time.perf_counter() - began)
        passes.append(_pass(accumulator, fold, frames))
    held = [frames[0].samples, *accumulator.held()]
    sums = [accumulator.total, accumulator.squares]
    # The first shots still get their memory.
    return {
        "decode_s": _typical(decoding[2:] or decoding),
        "kernel_s": _typical(passes[1:] or passes),
        "copy_s": _copying(held) + _copying(sums) / 4,
    }


def busy(files: Sequence[Path], _: Path, *, luma: bool) -> dict[str, float]:
    """Decode on all cores at once, then run the kernels on all at once; shots per second if one follows the other."""
    from hotpixd.intake.decode import decode, keep_large_buffers

    keep_large_buffers()
    cores = _cores()
    with ThreadPoolExecutor(cores) as pool:
        for _ in range(2):  # the first time gets its memory
            began = time.perf_counter()
            deque(pool.map(partial(decode, luma=luma), files), maxlen=0)
            decode_s = (time.perf_counter() - began) / len(files)
        frames = [decode(path, luma=luma) for path in files[:4]]
        accumulator, fold = _folder(frames[0], cores, pool.map)
        accumulator.sum_up()
        passes = [_pass(accumulator, fold, frames) for _ in range(4)]
    return {"busy_per_s": 1 / (decode_s + _typical(passes[1:]))}


def _copying(arrays: Sequence[Any]) -> float:
    """Return how long it takes to copy arrays into others that have their memory, s."""
    import numpy as np

    copies = [array.copy() for array in arrays]
    took = []
    for _ in range(5):
        began = time.perf_counter()
        for copy, array in zip(copies, arrays, strict=True):
            np.copyto(copy, array)
        took.append(time.perf_counter() - began)
    return min(took)


def bare(files: Sequence[Path], _: Path, *, luma: bool) -> dict[str, float]:
    """Decode and fold on all cores, and nothing else."""
    from hotpixd.intake.decode import decode, keep_large_buffers

    keep_large_buffers()
    cores = _cores()
    with ThreadPoolExecutor(cores) as decoders, ThreadPoolExecutor(cores) as folders:
        _, fold = _folder(decode(files[0], luma=luma), cores, folders.map)
        start = time.perf_counter()
        ahead = [decoders.submit(decode, path, luma=luma) for path in files[:cores]]
        for k in range(len(files)):
            frame = ahead.pop(0).result()
            if k + cores < len(files):
                ahead.append(decoders.submit(decode, files[k + cores], luma=luma))
            fold(frame)
            del frame
        return {"bare_per_s": len(files) / (time.perf_counter() - start)}


def _pass(accumulator: Any, fold: Callable[[Any], None], frames: Sequence[Any]) -> float:
    """Fold frames and add them to the sums together, s per frame."""
    began = time.perf_counter()
    for frame in frames:
        fold(frame)
    accumulator.sum_up()
    return (time.perf_counter() - began) / len(frames)


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


def scan(files: Sequence[Path], work: Path, *, luma: bool) -> dict[str, float]:
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
    sys.argv = ["hotpixd", "scan", *(["--luma"] if luma else []), "--state", str(work / "state"), *map(str, files)]
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


def textbook(files: Sequence[Path], _: Path, *, luma: bool) -> dict[str, float]:
    """Mean and variance of all samples as the textbook has it."""
    import numpy as np

    picture = _load_luma if luma else _load_picture
    load = {".dng": _load_raw, ".jpg": picture, ".tif": _load_tiff, ".fits": _load_fits}[files[0].suffix]
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


def _load_luma(path: Path) -> Any:
    import numpy as np
    from PIL import Image

    picture = Image.open(path)
    picture.draft("L", None)
    return np.asarray(picture)


def _load_raw(path: Path) -> Any:
    import rawpy

    with rawpy.imread(str(path)) as raw:
        return raw.raw_image_visible.copy()


def _load_tiff(path: Path) -> Any:
    import tifffile

    return tifffile.imread(path)


def _load_fits(path: Path) -> Any:
    from astropy.io import fits

    return fits.getdata(path)


def enhance(files: Sequence[Path], _: Path, **__: bool) -> dict[str, float]:
    """Find bad pixels as rawpy does, if it can."""
    import rawpy.enhance

    if not any(map(importlib.util.find_spec, ("cv2", "skimage"))):
        return {}
    start = time.perf_counter()
    rawpy.enhance.find_bad_pixels([str(path) for path in files], find_dead=False)
    return {"enhance_per_s": len(files) / (time.perf_counter() - start)}


_MEASURED = (alone, busy, bare, scan, textbook, enhance)
CHILDREN: dict[str, Callable[..., dict[str, float]]] = {measured.__name__: measured for measured in _MEASURED}


def measure(name: str, files: Sequence[Path], work: Path, *, luma: bool = False) -> dict[str, float]:
    """Run one of `CHILDREN` in a process of its own; add its wall time (s) and its peak memory (MB)."""
    shutil.rmtree(work / "state", ignore_errors=True)
    started = time.time()
    environment = {**os.environ, "HOTPIXD_BENCHMARK_START": repr(started)}
    # As for a user, modules are compiled once.
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    environment["PYTHONPYCACHEPREFIX"] = str(work / "bytecode")
    how = ["--luma"] if luma else []
    command = [sys.executable, __file__, "--child", name, "--work", str(work), *how, *map(str, files)]
    done = subprocess.run(command, stdout=subprocess.PIPE, env=environment, text=True, check=True)
    ended = time.time()
    shutil.rmtree(work / "state", ignore_errors=True)
    numbers = json.loads(done.stdout.splitlines()[-1])
    return {**numbers, "wall_s": ended - started, "end_s": ended - numbers.get("checkpointed_at", started)}


def _as_child(name: str, files: Sequence[Path], work: Path, *, luma: bool) -> None:
    numbers = CHILDREN[name](files, work, luma=luma)
    numbers["peak_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6
    with contextlib.suppress(OSError):
        said = Path("/proc/self/io").read_text().split()
        numbers["written_mb"] = int(said[said.index("write_bytes:") + 1]) / 1e6
    print(json.dumps(numbers))


# --- the table


def rows_of(file_format: str, given: argparse.Namespace) -> dict[str, str]:
    """Measure one format and return the table's cells by the names of its rows."""
    files = [_picture(given.work, file_format, index) for index in range(given.shots)]
    width, height = given.size
    raw = file_format.startswith("DNG")
    samples = width * height * (3 if file_format == "JPEG" else 1)
    jpeg, luma = file_format.startswith("JPEG"), file_format == "JPEG, luma"
    frame_mb = samples * (1 if jpeg else 2) / 1e6
    budget_mb = samples * (18 if jpeg else 20) / 1e6 + 4 * frame_mb + 250
    measure_it = partial(measure, work=given.work, luma=luma)
    measure_it("scan", files[:2])  # compiles the kernels if they never were
    rounds = [
        {
            **measure_it("alone", files[:12]),
            **measure_it("busy", files[:12]),
            **measure_it("bare", files),
            **measure_it("textbook", files[: given.textbook]),
            **(measure_it("enhance", files[: given.textbook]) if raw and given.enhance else {}),
            **measure_it("scan", files),
        }
        for _ in range(given.repeats)
    ]
    decode_s, kernel_s, copy_s = (min(r[key] for r in rounds) for key in ("decode_s", "kernel_s", "copy_s"))
    enhance_per_s = max(r.get("enhance_per_s", 0.0) for r in rounds)
    allowed = _cores() / (decode_s + kernel_s)
    speeds = ("busy_per_s", "bare_per_s", "steady_per_s", "textbook_per_s")
    busy_per_s, bare_per_s, steady, by_the_book = (max(r[key] for r in rounds) for key in speeds)
    best = min(rounds, key=lambda r: r["wall_s"])
    whole = len(files) / best["wall_s"]
    longer = {n: measure_it("scan", _first(given, file_format, n)) for n in given.memory}
    return {
        "size of a file": f"{sum(path.stat().st_size for path in files) / len(files) / 1e6:.1f} MB",
        "decode alone": f"{1000 * decode_s:.1f} ms",
        "kernel alone": f"{1000 * kernel_s:.2f} ms",
        "kernel / copy": f"{kernel_s / copy_s:.2f} x",
        f"allowed on {_cores()} cores": f"{allowed:.2f} shots/s",
        "all cores busy": f"{busy_per_s:.2f} shots/s",
        "bare": f"{bare_per_s:.2f} shots/s",
        "scan, whole": f"{whole:.2f} shots/s ({best['wall_s']:.2f} s)",
        "of it: until the first outcome": f"{best['start_s']:.2f} s",
        "of it: final checkpoint": f"{best['checkpoint_s']:.2f} s",
        "of it: from there to the end": f"{best['end_s']:.2f} s",
        "scan, steady": f"{steady:.2f} shots/s",
        "steady / allowed": f"{steady / allowed:.0%}",
        "steady / all cores busy": f"{steady / busy_per_s:.0%}",
        "steady / bare": f"{steady / bare_per_s:.0%}",
        "whole / bare": f"{whole / bare_per_s:.0%}",
        "textbook": f"{by_the_book:.2f} shots/s",
        "steady / textbook": f"{steady / by_the_book:.1f} x",
        "whole / textbook": f"{whole / by_the_book:.1f} x",
        "rawpy.enhance": f"{enhance_per_s:.2f} shots/s" if enhance_per_s else "-",
        "steady / rawpy.enhance": f"{steady / enhance_per_s:.1f} x" if enhance_per_s else "-",
        "written per shot": f"{best['written_mb'] / len(files):.1f} MB",
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
    parser.add_argument("--formats", nargs="+", choices=list(FORMATS), default=list(USUAL))
    parser.add_argument("--repeats", type=int, default=3, help="rounds; the fastest counts")
    parser.add_argument("--textbook", type=int, default=8, help="shots for the textbook, which is slow")
    parser.add_argument("--no-enhance", dest="enhance", action="store_false", help="without rawpy.enhance")
    parser.add_argument("--memory", type=int, nargs="*", default=[20, 40, 80], help="shots of scans to compare")
    parser.add_argument("--luma", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--child", choices=list(CHILDREN), help=argparse.SUPPRESS)
    parser.add_argument("files", nargs="*", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.child:
        _as_child(given.child, given.files, given.work, luma=given.luma)
        return
    with tempfile.TemporaryDirectory(prefix="hotpixd-throughput-") as folder:
        given.work = given.work or Path(folder)
        make_pictures(
            given.work, max([given.shots, *given.memory]), tuple(given.size), given.quality, _cores(), given.formats
        )
        columns = {file_format: rows_of(file_format, given) for file_format in given.formats}
    out(f"{given.size[0]}x{given.size[1]}, {given.shots} shots, {_cores()} cores, best of {given.repeats}.\n\n")
    out(f"| | {' | '.join(columns)} |\n{'| --- ' * (1 + len(columns))}|\n")
    for name in next(iter(columns.values())):
        out(f"| {name} | {' | '.join(rows[name] for rows in columns.values())} |\n")


if __name__ == "__main__":
    main()
