"""Show how near repaired samples come to what they would have read, beside other programs; and how long it takes.

Edges and thin lines under several angles, a texture with the spectrum of natural scenes, and a simulated scene are read
out by a Bayer sensor with shot noise; every 49th sample is then made a hot one. Numbers are root-mean-square errors in
ADU against the very same frame without defects, its noise included. From the repository:

    PYTHONPATH=daemon python tests/benchmarks/repair.py [--speed]

Side by side: the median of the eight neighbours of the colour; `rawpy.enhance.repair_bad_pixels` (needs
opencv-python-headless or scikit-image); Siril's `cosme_cfa` (needs siril-cli). `--speed` also times pictures of 24
megapixels, each as a user does it, beside decoding and encoding alone.
"""

from __future__ import annotations

import argparse
import io
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))

from hotpixd.core.frame import SensorLayout
from hotpixd.core.inpaint import inpaint
from hotpixd.simulate import VirtualSensor
from hotpixd.views.repair import Wish
from test_inpaint import mosaic, root_mean_square, scene

SIDE = 480
LAYOUT = SensorLayout(SIDE, SIDE, "RGGB")
SCENES = (
    *(f"{kind} {angle}" for kind in ("edge", "line") for angle in (0, 45, 90, 135, 22, 63)),
    "texture 0",
    "flat 0",
)

Mosaic = NDArray[np.uint16]


def frames() -> dict[str, Mosaic]:
    """Return frames without defects by the name of their scene."""
    made = {name: mosaic(scene(name, SIDE, SIDE), LAYOUT) for name in SCENES[:-1]}
    made["flat 0"] = mosaic(np.full((SIDE, SIDE), 3000.0), LAYOUT)
    sensor = VirtualSensor(SIDE, SIDE, hot=0, stuck=0, dead=0, seed=2)
    made["simulated scene"] = sensor.shot(3, "moving", exposure_s=0.5, iso=100).mosaic
    return made


def planted() -> NDArray[np.int64]:
    """Return sites of all four colours, none beside another."""
    grid = np.arange(14, SIDE - 14, 7)
    return np.asarray((grid[:, None] * SIDE + grid + np.arange(len(grid)) % 5).ravel())


def by_median(samples: Mosaic, sites: NDArray[np.int64]) -> Mosaic:
    """Replace each by the median of the eight neighbours of its plane."""
    repaired = samples.copy()
    for site in sites.tolist():
        row, column = divmod(site, SIDE)
        around = samples[row - 2 : row + 3 : 2, column - 2 : column + 3 : 2].ravel()
        repaired[row, column] = np.median(np.delete(around, 4))
    return repaired


def by_us(samples: Mosaic, sites: NDArray[np.int64]) -> Mosaic:
    repaired = samples.copy()
    repaired.reshape(-1)[sites] = inpaint(samples, LAYOUT, sites).values
    return repaired


def by_rawpy(samples: Mosaic, sites: NDArray[np.int64]) -> Mosaic | None:
    """Repair with rawpy.enhance; None if it cannot be imported."""
    import warnings

    import rawpy

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import rawpy.enhance
    except ImportError:
        return None
    sensor = VirtualSensor(SIDE, SIDE, hot=0, stuck=0, dead=0)
    from dataclasses import replace

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "shot.dng")
        sensor.write_dng(path, replace(sensor.shot(0, "flat"), mosaic=samples))
        with rawpy.imread(str(path)) as raw:
            rawpy.enhance.repair_bad_pixels(raw, np.transpose(np.divmod(sites, SIDE)))
            return np.array(raw.raw_image_visible)


def by_siril(samples: Mosaic, sites: NDArray[np.int64]) -> Mosaic | None:
    """Repair with Siril; None if it is not installed, or repairs other samples than it is told."""
    if shutil.which("siril-cli") is None:
        return None
    from astropy.io import fits

    with tempfile.TemporaryDirectory() as folder:
        header = fits.Header({"BAYERPAT": "RGGB", "ROWORDER": "TOP-DOWN"})
        fits.PrimaryHDU(samples, header).writeto(Path(folder, "shot.fit"))
        for turned in (False, True):
            rows, columns = np.divmod(sites, SIDE)
            rows = SIDE - 1 - rows if turned else rows
            lines = "".join(f"P {x} {y} H\n" for x, y in zip(columns, rows, strict=True))
            Path(folder, "list.lst").write_text(lines)
            script = f"requires 1.0.0\ncd {folder}\nset16bits\nload shot\ncosme_cfa list.lst\nsave done\n"
            subprocess.run(["siril-cli", "-s", "-"], input=script, text=True, capture_output=True, check=False)
            if not Path(folder, "done.fit").exists():
                return None
            repaired = np.asarray(fits.getdata(Path(folder, "done.fit"))).astype(np.uint16)
            changed = np.flatnonzero((repaired != samples).ravel())
            if np.isin(changed, sites).all() and len(changed):
                return repaired
    return None


def compare() -> None:
    """Print the errors of all programs."""
    sites = planted()
    programs = {"hotpixd": by_us, "median of 8": by_median, "rawpy.enhance": by_rawpy, "Siril cosme_cfa": by_siril}
    print("| scene | " + " | ".join(programs) + " |")
    print("| --- |" + " --- |" * len(programs))
    for name, clean in frames().items():
        spoilt = clean.copy()
        spoilt.reshape(-1)[sites] = 16_383
        cells = []
        for repair in programs.values():
            repaired: Any = repair(spoilt, sites)
            if repaired is None:
                cells.append("-")
                continue
            cells.append(f"{root_mean_square(repaired.reshape(-1)[sites], clean.reshape(-1)[sites]):.0f}")
        print(f"| {name.removesuffix(' 0') if name.startswith(('texture', 'flat')) else name} | {' | '.join(cells)} |")


def timed(act: Any, times: int = 3) -> float:
    """Return the least time that something took, s."""
    taken = []
    for _ in range(times):
        start = time.perf_counter()
        act()
        taken.append(time.perf_counter() - start)
    return min(taken)


def speed() -> None:
    """Print how long a picture of 24 megapixels takes."""
    from hotpixd.intake.decoders import Decoders
    from hotpixd.repairing import _Repairer

    sensor = VirtualSensor(6000, 4000, hot=500, stuck=20, dead=20, seed=1)
    shot = sensor.shot(0, "moving", exposure_s=1.0, iso=100)
    entries = [
        {"x": d.x, "y": d.y, "colour": d.colour, "kind": d.kind, "state": "stable", "dark_current_iso": 100.0,
         "dark_current_adu_per_s": d.dark_current_adu_per_s} for d in sensor.defects
    ]  # fmt: skip
    print("\n| 24 megapixels, 540 defects | repair | decode | encode or write |")
    print("| --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as folder:
        decoders = Decoders(1)
        for name in ("DNG", "JPEG", "PNG"):
            path = Path(folder, f"shot.{name.lower()}")
            if name == "DNG":
                sensor.write_dng(path, shot)
            elif name == "JPEG":
                sensor.write_jpeg(path, shot)
            else:
                Image.fromarray(sensor.rendered(shot)).save(path)
            frame = decoders.decode(path)
            known = {
                "id": "it", "make": frame.sensor.make, "model": frame.sensor.model, "serial": frame.sensor.serial,
                "samples": str(frame.sensor.samples), "width": 6000, "height": 4000,
                "colours": frame.sensor.layout.colours, "defects": entries,
            }  # fmt: skip
            number = iter(range(100))

            def repair(path: Path = path, known: Any = known, number: Any = number) -> None:
                out = Path(folder, f"out{next(number)}-{path.suffix}")
                out.mkdir()
                done = _Repairer([known], [path], out, Wish(), decoders, force=False).repaired(path)
                assert done.refused is None, done.refused

            def encode(name: str = name, frame: Any = frame, path: Path = path) -> None:
                if name == "DNG":
                    Path(folder, "copy").write_bytes(path.read_bytes())
                    return
                image = Image.fromarray(frame.samples.reshape(4000, 6000, 3))
                options = {"quality": 95, "subsampling": 1} if name == "JPEG" else {}
                image.save(io.BytesIO(), name, **options)

            repair()
            times = (timed(repair), timed(lambda path=path: decoders.decode(path)), timed(encode))  # type: ignore[misc]
            print(f"| {name}, {path.stat().st_size / 1e6:.0f} MB | " + " | ".join(f"{t:.2f} s" for t in times) + " |")
        decoders.close()


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--speed", action="store_true", help="time pictures of 24 megapixels too")
    options = parser.parse_args()
    compare()
    if options.speed:
        speed()


if __name__ == "__main__":
    main()
