"""Show what is found after how many frames: defects of virtual sensors, planted, shot, written to files, searched.

Markdown tables of hotpixd beside the least variance and beside `rawpy.enhance.find_bad_pixels`. From the repository:

    PYTHONPATH=daemon python tests/benchmarks/detection.py --quick
    PYTHONPATH=daemon python tests/benchmarks/detection.py        # all of it, 10 to 20 minutes on two cores

How it is scored. In raw a defect is found only at its exact site; in JPEG, where one photosite spreads over its
neighbours, within 2 pixels. Further entries for the same defect are duplicates; entries that match no planted defect
are false.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from hotpixd.core.frame import ShotKind
from hotpixd.core.sensor import Sensor
from hotpixd.intake.decode import decode
from hotpixd.simulate import FileFormat, PlantedDefect, Scene, VirtualSensor

JPEG_TOLERANCE = 2
"""Pixels by which an entry may miss its defect after demosaicing."""

SERIES = ("raw", "jpeg", "luma", "clean", "tripod", "tracked", "dithered", "dark")
"""What `--only` can name. The first three are the moving scenes, the last four are shot in raw and as JPEG."""

FORMATS: dict[str, FileFormat] = {"raw": "dng", "jpeg": "jpg", "luma": "jpg"}
"""Of files, by what is folded of them: `luma` is that of JPEGs alone."""

KINDS = ("hot", "stuck", "dead")


@dataclass(frozen=True, slots=True)
class Job:
    """One sensor and the frames it sees."""

    series: str
    scene: Scene
    samples: str
    """One of `FORMATS`."""

    seed: int
    steps: tuple[int, ...]
    """Numbers of frames after which to look, ascending."""

    size: tuple[int, int]
    planted: tuple[int, int, int]
    """Hot, stuck and dead samples."""


@dataclass(frozen=True, slots=True)
class Score:
    """A list of entries held against the truth."""

    found: Counter[str]
    """Planted defects found, by kind."""

    false: int
    duplicates: int
    false_at: tuple[tuple[int, int], ...]
    """Where the false ones are."""

    def __str__(self) -> str:
        words = " / ".join(str(self.found[kind]) for kind in KINDS) + f" / {self.false}"
        return f"{words} (+{self.duplicates})" if self.duplicates else words


@dataclass(slots=True)
class Result:
    """What a job's sensor was found to have."""

    job: Job
    counted: int = 0
    """Frames that were new evidence."""

    scores: dict[tuple[str, int], Score] = field(default_factory=dict)
    """By method and number of frames."""

    false_kinds: Counter[str] = field(default_factory=Counter)
    """What hotpixd takes its false ones to be, in the end."""


def score(entries: Iterable[tuple[int, int]], truth: Sequence[PlantedDefect], tolerance: int) -> Score:
    """Hold entries (x, y) against the planted defects, each entry against the nearest."""
    taken: set[int] = set()
    false: list[tuple[int, int]] = []
    duplicates = 0
    tx, ty = (np.array([getattr(d, axis) for d in truth], int) for axis in "xy")
    for x, y in entries:
        away = np.maximum(np.abs(tx - x), np.abs(ty - y))
        nearest = int(away.argmin()) if away.size else -1
        if nearest < 0 or away[nearest] > tolerance:
            false.append((x, y))
        elif nearest in taken:
            duplicates += 1
        else:
            taken.add(nearest)
    return Score(Counter(truth[i].kind for i in taken), len(false), duplicates, tuple(false))


def rawpy_lacks() -> str | None:
    """Return what rawpy.enhance needs and is not there, as a sentence."""
    if importlib.util.find_spec("cv2") or importlib.util.find_spec("skimage"):
        return None
    return "rawpy.enhance was not run: it needs OpenCV or scikit-image, `pip install opencv-python-headless`."


def bad_pixels_by_rawpy(paths: Sequence[Path]) -> list[tuple[int, int]]:
    """Return what rawpy finds in real files. `find_dead` off: its default confirms healthy samples by the thousand."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from rawpy.enhance import find_bad_pixels

        sites = find_bad_pixels([str(path) for path in paths], find_dead=False, confirm_ratio=0.9)
    return [(int(x), int(y)) for y, x in sites]


def run(job: Job) -> Result:
    """Shoot, write, decode and fold the frames of one job, and score what is found."""
    hot, stuck, dead = job.planted
    camera = VirtualSensor(*job.size, hot=hot, stuck=stuck, dead=dead, seed=job.seed, serial=f"V{job.seed}")
    tolerance = 0 if job.samples == "raw" else JPEG_TOLERANCE
    result = Result(job)
    sensor: Sensor | None = None
    paths: list[Path] = []
    with tempfile.TemporaryDirectory(prefix="hotpixd-benchmark-") as folder:
        for index in range(max(job.steps)):
            path = Path(folder) / f"{index:04d}.{FORMATS[job.samples]}"
            shot = camera.shot(index, job.scene)
            write = camera.write_dng if job.samples == "raw" else camera.write_jpeg
            write(path, shot)
            paths.append(path)
            kind = ShotKind.DARK if job.scene == "dark" else None
            frame = decode(path, kind, luma=job.samples == "luma")
            sensor = sensor or Sensor(frame.sensor)
            if job.samples != "raw":
                path.unlink()  # only rawpy wants the files again
            result.counted += sensor.fold(frame, index).counted
            if index + 1 not in job.steps:
                continue
            judged = partial(score, truth=camera.defects, tolerance=tolerance)
            stable = sensor.defects()
            at = _pixels(sensor, [d.site for d in stable])
            result.scores["hotpixd", index + 1] = ours = judged(at)
            result.false_kinds = Counter(d.kind for d, xy in zip(stable, at, strict=True) if xy in ours.false_at)
            if camera.defects:
                least = sensor.accumulator.least_variance(len(camera.defects))[0].tolist()
                result.scores["variance", index + 1] = judged(_pixels(sensor, least))
            if job.samples == "raw" and not rawpy_lacks():
                result.scores["rawpy", index + 1] = judged(bad_pixels_by_rawpy(paths))
    return result


def _pixels(sensor: Sensor, sites: Iterable[int]) -> list[tuple[int, int]]:
    layout = sensor.layout
    return [(site % layout.shape[1] // layout.channels, site // layout.shape[1]) for site in sites]


# --- tables


def _moving_tables(results: Sequence[Result], steps: Sequence[int]) -> Iterator[str]:
    for samples in FORMATS:
        chosen = sorted((r for r in results if r.job.series == samples), key=lambda r: r.job.seed)
        if not chosen:
            continue
        hot, stuck, dead = chosen[0].job.planted
        width, height = chosen[0].job.size
        k = sum(chosen[0].job.planted)
        yield f"### Moving scenes, {samples}: found hot / stuck / dead / false (+ duplicates)"
        yield ""
        yield f"{width}x{height}, planted {hot} hot, {stuck} stuck, {dead} dead."
        yield ""
        methods = {"hotpixd": "hotpixd (stable)", "variance": f"least variance ({k} lowest)"}
        if samples == "raw":
            methods["rawpy"] = "rawpy.enhance (find_dead=False, ratio 0.9)"
        yield "| frames | seed | " + " | ".join(methods.values()) + " |"
        yield "| --- " * (2 + len(methods)) + "|"
        for step in steps:
            for result in chosen:
                cells = [str(result.scores.get((method, step), "not run")) for method in methods]
                yield f"| {step} | {result.job.seed} | " + " | ".join(cells) + " |"
            cells = [_mean([r.scores.get((method, step)) for r in chosen]) for method in methods]
            yield f"| **{step}** | **mean** | " + " | ".join(f"**{cell}**" for cell in cells) + " |"
        yield ""


def _mean(scores: Sequence[Score | None]) -> str:
    held = [s for s in scores if s is not None]
    if not held:
        return "not run"
    numbers = [float(np.mean([s.found[kind] for s in held])) for kind in KINDS]
    numbers.append(float(np.mean([s.false for s in held])))
    extra = float(np.mean([s.duplicates for s in held]))
    return " / ".join(f"{n:.4g}" for n in numbers) + (f" (+{extra:.4g})" if extra else "")


def _scene_table(results: Sequence[Result]) -> Iterator[str]:
    chosen = [r for r in results if r.job.series in ("tripod", "tracked", "dithered", "dark")]
    if not chosen:
        return
    yield "### Other scenes: found hot / stuck / dead / false (+ duplicates)"
    yield ""
    yield "| scene | samples | frames | seed | counted | hotpixd (stable) | its false ones | rawpy.enhance |"
    yield "| --- " * 8 + "|"
    for result in sorted(chosen, key=lambda r: (SERIES.index(r.job.series), SERIES.index(r.job.samples), r.job.seed)):
        job, frames = result.job, max(result.job.steps)
        other = result.scores.get(("rawpy", frames), "not run" if job.samples == "raw" else "-")
        yield (
            f"| {job.series} | {job.samples} | {frames} | {job.seed} | {result.counted} "
            f"| {result.scores['hotpixd', frames]} | {_listed_kinds(result.false_kinds)} | {other} |"
        )
    yield ""


def _clean_table(results: Sequence[Result]) -> Iterator[str]:
    chosen = [r for r in results if r.job.series == "clean"]
    if not chosen:
        return
    yield "### Sensors without a defect, moving scenes"
    yield ""
    yield "| samples | sensors | frames each | hotpixd: false | by kind | sensors with any | rawpy: false each (most) |"
    yield "| --- " * 7 + "|"
    for samples in FORMATS:
        same = [r for r in chosen if r.job.samples == samples]
        if not same:
            continue
        frames = max(same[0].job.steps)
        false = [r.scores["hotpixd", frames].false for r in same]
        other = [r.scores["rawpy", frames].false for r in same if ("rawpy", frames) in r.scores]
        cell = f"{np.median(other):.4g} ({max(other)})" if other else "-"
        kinds = _listed_kinds(sum((r.false_kinds for r in same), Counter[str]()))
        sensors = sum(f > 0 for f in false)
        yield f"| {samples} | {len(same)} | {frames} | {sum(false)} | {kinds} | {sensors} | {cell} |"
    yield ""


def _listed_kinds(kinds: Counter[str]) -> str:
    return ", ".join(f"{n} {kind}" for kind, n in sorted(kinds.items())) or "-"


# --- command line


def _jobs(given: argparse.Namespace) -> list[Job]:
    size, planted = tuple(given.size), tuple(given.planted)
    steps = tuple(sorted(given.frames))
    jobs = []
    for series in given.only:
        if series in FORMATS:
            jobs += [Job(series, "moving", series, seed, steps, size, planted) for seed in given.seeds]
            continue
        if series == "clean":
            frames = (given.clean_frames,)
            for seed in range(1000, 1000 + given.clean_seeds):
                jobs += [Job(series, "moving", samples, seed, frames, size, (0, 0, 0)) for samples in FORMATS]
            continue
        frames = (given.dark_frames if series == "dark" else given.scene_frames,)
        for seed in given.seeds:
            jobs += [Job(series, series, samples, seed, frames, size, planted) for samples in FORMATS]
    return jobs


def _listed(text: str) -> list[str]:
    names = text.split(",")
    if unknown := set(names) - set(SERIES):
        raise argparse.ArgumentTypeError(f"unknown: {', '.join(sorted(unknown))}; there are {', '.join(SERIES)}")
    return names


def main(arguments: Sequence[str] | None = None, out: Callable[[str], object] = sys.stdout.write) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3], help="one sensor each")
    parser.add_argument("--frames", type=int, nargs="+", default=[5, 10, 20, 50], help="when to look (moving scenes)")
    parser.add_argument("--only", type=_listed, default=list(SERIES), metavar=",".join(SERIES))
    parser.add_argument("--quick", action="store_true", help="one seed, 5 to 20 frames, two clean sensors")
    parser.add_argument("--scene-frames", type=int, default=30, help="frames of tripod, tracked and dithered stars")
    parser.add_argument("--dark-frames", type=int, default=20)
    parser.add_argument("--clean-seeds", type=int, default=20, help="sensors without a defect")
    parser.add_argument("--clean-frames", type=int, default=50)
    parser.add_argument("--size", type=int, nargs=2, default=(1500, 1000), metavar=("WIDTH", "HEIGHT"))
    parser.add_argument("--planted", type=int, nargs=3, default=(60, 10, 15), metavar=("HOT", "STUCK", "DEAD"))
    parser.add_argument("--processes", type=int, default=2)
    given = parser.parse_args(arguments)
    if given.quick:
        given.seeds, given.frames = given.seeds[:1], [n for n in given.frames if n <= 20]
        given.clean_seeds, given.scene_frames, given.dark_frames = 2, 15, 10
    # The longest first, so that no process waits for another's last job.
    jobs = sorted(_jobs(given), key=lambda job: -max(job.steps))
    if given.processes > 1:
        # Spawned: numba's threads do not survive a fork.
        with get_context("spawn").Pool(given.processes) as pool:
            results = list(pool.imap_unordered(run, jobs))
    else:
        results = [run(job) for job in jobs]
    if lacking := rawpy_lacks():
        out(lacking + "\n\n")
    for lines in (_moving_tables(results, sorted(given.frames)), _scene_table(results), _clean_table(results)):
        for line in lines:
            out(line + "\n")


if __name__ == "__main__":
    main()
