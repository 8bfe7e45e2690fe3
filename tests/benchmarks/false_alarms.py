"""Show the promise: the chance that any defect ever declared on a sensor is false is at most alpha.

Many small virtual sensors without a defect each see a series of shots; the row printed says on how many of them
anything was ever declared stable. From the repository:

    PYTHONPATH=daemon python tests/benchmarks/false_alarms.py --alpha 0.5
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import rawpy
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from hotpixd.core.frame import Frame, SampleKind, SensorIdentity, SensorLayout
from hotpixd.core.sensor import DetectionSettings, Sensor
from hotpixd.intake.decode import decode
from hotpixd.simulate import SCENES, VirtualSensor

INTERPOLATIONS = ("AHD", "VNG", "PPG", "DHT", "LINEAR")


@dataclass(frozen=True, slots=True)
class Series:
    """What each sensor sees."""

    frames: int
    width: int
    height: int
    scenes: tuple[str, ...]
    """One after the other, of equally many frames each."""

    rendered: bool
    jpeg: int | None
    """Quality in which pictures are written; None for none."""

    develop: str | None
    """LibRaw's interpolation by which they are developed, and sharpened; None: `VirtualSensor`'s, not sharpened."""

    caption: bool
    """Whether a place and the time are written into JPEGs."""

    prnu: float
    alpha: float


def frame_of(camera: VirtualSensor, index: int, series: Series) -> Frame:
    """Release the shutter once; a rendered picture is the camera's own development, without a file between."""
    scene = series.scenes[index * len(series.scenes) // series.frames]
    shot = camera.shot(index, scene)  # type: ignore[arg-type]
    if series.jpeg:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "shot.jpg"
            if series.develop:
                camera.write_dng(path.with_suffix(".dng"), shot)
                _develop(path, series.develop, series.jpeg)
            else:
                camera.write_jpeg(path, shot, series.jpeg)
            if series.caption:
                _burn_in(path, index, series.jpeg)
            return decode(path)
    frame = camera.frame(shot)
    if not series.rendered:
        return frame
    rendered = camera.rendered(shot)
    layout = SensorLayout(series.width, series.height, "RGB", 3)
    identity = SensorIdentity(camera.make, camera.model, camera.serial, SampleKind.RENDERED, layout, "uint8")
    return replace(
        frame,
        sensor=identity,
        samples=np.ascontiguousarray(rendered.reshape(layout.shape)),
        black_level_adu=None,
        white_level_adu=None,
    )


def _develop(path: Path, algorithm: str, quality: int) -> None:
    """Develop the DNG beside a JPEG into it, as a camera does."""
    interpolation = rawpy.DemosaicAlgorithm[algorithm]
    with rawpy.imread(str(path.with_suffix(".dng"))) as raw:
        developed = raw.postprocess(demosaic_algorithm=interpolation, use_camera_wb=True, no_auto_bright=True)
    sharpened = Image.fromarray(developed).filter(ImageFilter.UnsharpMask(1.0, 100, 0))
    sharpened.save(path, quality=quality, subsampling="4:2:2")


def _burn_in(path: Path, index: int, quality: int) -> None:
    """Write a place and the time into a JPEG, as cameras that watch the sky do."""
    with Image.open(path) as opened:
        exif, picture = opened.info["exif"], opened.convert("RGB")
    letters, font = ImageDraw.Draw(picture), ImageFont.load_default()
    letters.text((10, picture.height - 24), "OBSERVATORY 47N 11E", (255, 255, 255), font)
    letters.text((10, 8), f"2026-11-29 00:{index % 60:02d} EXP {index % 30} s", (255, 255, 255), font)
    picture.save(path, quality=quality, exif=exif)


def false_ones(seed: int, series: Series) -> tuple[int, Counter[str]]:
    """Return how many frames of a defect-free sensor were counted, and what was declared stable, by kind."""
    camera = VirtualSensor(
        series.width, series.height, hot=0, stuck=0, dead=0, prnu=series.prnu, seed=seed, serial=f"V{seed}"
    )
    sensor: Sensor | None = None
    kinds: Counter[str] = Counter()
    for index in range(series.frames):
        frame = frame_of(camera, index, series)
        sensor = sensor or Sensor(frame.sensor, DetectionSettings(alpha=series.alpha))
        report = sensor.fold(frame, index)
        kinds.update(t.kind for t in report.transitions if t.change == "stable")
    return (sensor.frames_counted if sensor else 0), kinds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--alpha", type=float, default=0.01)
    parser.add_argument("--sensors", type=int, default=200)
    parser.add_argument("--frames", type=int, default=60)
    parser.add_argument("--size", type=int, nargs=2, default=(300, 200), metavar=("WIDTH", "HEIGHT"))
    parser.add_argument("--scene", choices=SCENES, nargs="+", default=["moving"], help="several: one after the other")
    parser.add_argument("--rendered", action="store_true", help="8-bit RGB instead of raw")
    parser.add_argument("--jpeg", type=int, metavar="QUALITY", help="JPEGs of this quality instead, from files")
    parser.add_argument("--develop", choices=INTERPOLATIONS, help="them, by LibRaw's interpolation, and sharpened")
    parser.add_argument("--caption", action="store_true", help="a place and the time written into them")
    parser.add_argument("--prnu", type=float, default=0.01, help="spread of the healthy sites' response")
    parser.add_argument("--first-seed", type=int, default=1000)
    parser.add_argument("--cores", type=int, default=2)
    given = parser.parse_args()
    if (given.develop or given.caption) and not given.jpeg:
        parser.error("--develop and --caption need --jpeg")
    seen = tuple(given.scene), given.rendered, given.jpeg, given.develop, given.caption
    series = Series(given.frames, *given.size, *seen, given.prnu, given.alpha)
    seeds = range(given.first_seed, given.first_seed + given.sensors)
    # Spawned: numba's threads do not survive a fork.
    with get_context("spawn").Pool(given.cores) as pool:
        results = pool.map(partial(false_ones, series=series), seeds, chunksize=4)
    kinds = sum((kinds for _, kinds in results), Counter[str]())
    counted = np.mean([counted for counted, _ in results])
    wrong = sum(1 for _, kinds in results if kinds)
    # Too small to matter: listed, without an alert. Darks find the long tail of healthy dark currents.
    alerted = sum(1 for _, kinds in results if set(kinds) - {"warm"})
    samples = "rendered" if given.rendered else "raw"
    if given.jpeg:
        samples = f"JPEG {given.jpeg}" + (f", {given.develop}, sharpened" if given.develop else "")
        samples += ", captioned" if given.caption else ""
    listed = ", ".join(f"{n} {kind}" for kind, n in sorted(kinds.items())) or "none"
    out = sys.stdout.write
    heads = ("samples", "scene", "PRNU", "sensors", "frames (counted)", "false ones")
    heads += ("sensors with any", "with any not warm", "bound (alpha)")
    out(f"| {' | '.join(heads)} |\n|{' --- |' * len(heads)}\n")
    out(
        f"| {samples} | {', '.join(given.scene)} | {given.prnu:.1%} | {given.sensors} | {given.frames} ({counted:.0f}) "
        f"| {kinds.total()} ({listed}) | {wrong / given.sensors:.1%} | {alerted / given.sensors:.1%} "
        f"| {given.alpha:.0%} |\n"
    )


if __name__ == "__main__":
    main()
