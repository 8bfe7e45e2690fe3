"""The whole way without a camera: a virtual sensor with known defects, its shots scanned, the result compared."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from hotpixd.core.sensor import DetectionSettings
from hotpixd.scanning import progress, run_scan
from hotpixd.simulate import PlantedDefect, VirtualSensor, write_series
from hotpixd.store.state import State
from hotpixd.views import answers


def run_demo(frames: int, seed: int, keep: Path | None, stop: Callable[[], bool]) -> int:
    """Shoot, scan and compare; return 0 only if every planted defect that matters was found and no other.

    Parameters
    ----------
    frames : shots of moving scenes, then half as many darks of 2 s
    keep : folder for shots and state; a temporary one if None
    """
    with ExitStack() as stack:
        folder = keep or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="hotpixd-demo-")))
        sensor = VirtualSensor(750, 500, hot=30, stuck=6, dead=6, seed=seed)
        print(f"A virtual camera of {sensor.layout.width}x{sensor.layout.height} pixels, {len(sensor.defects)} defects")
        print(f"planted. It shoots {frames} scenes and {frames // 2} darks into {folder}.")
        for scene, count, exposure_s in (("moving", frames, None), ("dark", frames // 2, 2.0)):
            with progress("shot", count) as advance:
                for _ in write_series(folder / scene, sensor, count, scene, "dng", exposure_s=exposure_s):  # type: ignore[arg-type]
                    advance("")
                    if stop():
                        print("Stopped.")
                        return 1
        state = stack.enter_context(State(folder / "state"))
        print(f"\n$ hotpixd scan {folder}/moving {folder}/dark")
        code = run_scan(state, [str(folder / "moving"), str(folder / "dark")], None, stop)
        if code or stop():
            return 1
        return _compare(sensor, state)


def _compare(sensor: VirtualSensor, state: State) -> int:
    found = {(d["x"], d["y"]): d for s in answers.defects(state)["sensors"] for d in s["defects"]}
    planted = {(d.x, d.y): d for d in sensor.defects}
    missed = [d for site, d in planted.items() if site not in found]
    false = [site for site in found if site not in planted]
    floor = DetectionSettings().floor_sigma
    print(f"\nPlanted {len(planted)}, found {len(planted) - len(missed)}, missed {len(missed)}, false {len(false)}.")
    for defect in missed:
        print(f"  missed {_words(defect)}")
    for x, y in false:
        print(f"  false at x {x}, y {y}")
    kinds = sum(found[site]["kind"] == d.kind for site, d in planted.items() if site in found)
    print(f"Of those found, {kinds} are named as the kind they are; hot ones below {floor:g} sigma are named warm.")
    return 0 if not missed and not false else 1


def _words(defect: PlantedDefect) -> str:
    strength = "" if defect.dark_current_adu_per_s is None else f" of {defect.dark_current_adu_per_s:.0f} ADU/s"
    return f"{defect.kind}{strength} at x {defect.x}, y {defect.y}"
