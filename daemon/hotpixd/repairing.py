"""Correct pictures with the map of their sensor: files in, corrected copies in a folder out, a sentence for each.

Pictures are decoded in the jail. What is written is decoded there again before it gets its name, and must show what
was meant to be changed and nothing else.
"""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.markup import escape

from hotpixd.core.frame import Frame
from hotpixd.intake.decode import DecodeError
from hotpixd.intake.decoders import Decoders
from hotpixd.scanning import progress
from hotpixd.store.durable import written_beside
from hotpixd.views import rewriting
from hotpixd.views.repair import Choice, PictureRefusedError, Plan, Sensor, Wish, WrongSensorError, planned, sensor_of
from hotpixd.views.rewriting import jpeg
from hotpixd.views.rewriting.errors import RewriteError
from hotpixd.views.text import plain_console, printable, sensor_name
from hotpixd.words import many

_JPEG_REACH = 32
"""Pixels around a changed one that may change with it in a JPEG: a block of subsampled colour, and its smoothing."""


@dataclass(frozen=True, slots=True)
class Repaired:
    """What became of one picture."""

    path: Path
    refused: str | None = None
    """The sentence if it was not corrected."""

    output: Path | None = None
    """Where the corrected one is. None if refused, or if nothing is written."""

    sensor: Sensor | None = None
    """Whose map was used."""

    choices: tuple[Choice, ...] = ()
    """One per defect of the map."""

    samples: int = 0
    """How many samples were changed: of a JPEG, those that were filled before their blocks were coded."""


def run_repair(
    answer: dict[str, Any],
    pictures: Sequence[Path],
    folder: Path | None,
    wish: Wish,
    *,
    force: bool = False,
    dry_run: bool = False,
    as_json: bool = False,
    stop: Callable[[], bool] = lambda: False,
) -> int:
    """Correct pictures and say what became of each; return the exit code.

    Parameters
    ----------
    answer : to `defects`, of the state or of the daemon that has it open
    folder : for the corrected pictures, under their own names
    dry_run : write nothing, but list what would be corrected
    force : replace pictures that are there
    stop : becomes true when the user wants to stop
    """
    console = plain_console(stderr=True)
    sensors = answer["sensors"]
    if not sensors:
        console.print("hotpixd: no sensor is known yet; scan its pictures first")
        return 2
    done = []
    try:
        with closing(Decoders(1)) as decoders, progress("picture", len(pictures)) as advance:
            repairer = _Repairer(sensors, pictures, None if dry_run else folder, wish, decoders, force=force)
            for path in pictures:
                if stop():
                    break
                done.append(repairer.repaired(path))
                advance("")
    except WrongSensorError as error:
        console.print(f"hotpixd: {escape(printable(str(error)))}", soft_wrap=True)
        return 2
    if as_json:
        json.dump({"pictures": [_described(each) for each in done]}, sys.stdout, indent=1)
        print()
    else:
        for each in done:
            _print(each, dry_run=dry_run)
    if len(done) < len(pictures):
        console.print(f"hotpixd: interrupted; {many(len(pictures) - len(done), 'picture')} left")
    return 1 if len(done) < len(pictures) or any(each.refused for each in done) else 0


class _Repairer:
    """Corrects one picture after the other."""

    def __init__(
        self,
        sensors: Sequence[Sensor],
        sources: Sequence[Path],
        folder: Path | None,
        wish: Wish,
        decoders: Decoders,
        *,
        force: bool,
    ) -> None:
        self._sensors = sensors
        self._folder = folder
        self._wish = wish
        self._decoders = decoders
        self._force = force
        self._sources = {(about.st_dev, about.st_ino) for path in sources if (about := _status(path)) is not None}
        self._made: set[Path] = set()

    def repaired(self, path: Path) -> Repaired:
        """Correct one picture, or say why not."""
        try:
            return self._repaired(path)
        except (DecodeError, PictureRefusedError, RewriteError) as error:
            return Repaired(path, f"{error}.")
        except MemoryError:
            return Repaired(path, "there is not enough memory for it.")
        except OSError as error:
            return Repaired(path, f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}.")

    def _repaired(self, path: Path) -> Repaired:
        if path.is_dir():
            raise PictureRefusedError("it is a folder; name the pictures in it")
        output = None if self._folder is None else self._folder / path.name
        if output is not None:
            self._require_free(output)
        frame = self._decoders.decode(path)
        sensor = sensor_of(self._sensors, frame, self._wish)
        data = path.read_bytes()
        is_jpeg = rewriting.is_jpeg(data)
        plan = planned(frame, sensor, self._wish, jpeg=is_jpeg)
        if output is None:
            return Repaired(path, None, None, sensor, plan.choices, plan.sites.size)
        if plan.sites.size:
            data = _corrected_jpeg(data, frame, plan) if is_jpeg else _rewritten(data, frame, plan)
        self._write(output, data, path.stat(), frame, plan, is_jpeg=is_jpeg)
        return Repaired(path, None, output, sensor, plan.choices, plan.sites.size)

    def _require_free(self, output: Path) -> None:
        about = _status(output)
        if about is not None and (about.st_dev, about.st_ino) in self._sources:
            raise PictureRefusedError(
                f"{output} is one of the pictures to correct, and these are never replaced; name another folder with -o"
            )
        if output in self._made:
            raise PictureRefusedError(f"{output} has just been made of another picture of that name")
        if os.path.lexists(output) and not self._force:
            raise PictureRefusedError(f"{output} is there already; --force replaces it")

    def _write(
        self, output: Path, data: bytes, original: os.stat_result, frame: Frame, plan: Plan, *, is_jpeg: bool
    ) -> None:
        """Write a picture, check what can be read from it, and give it its name: all of it is there, or nothing."""
        output.parent.mkdir(parents=True, exist_ok=True)
        try:
            with written_beside(output, data, replace=self._force, mode=0o644) as part:
                if plan.sites.size:
                    _require_as_meant(self._decoders.decode(part), frame, plan, is_jpeg=is_jpeg)
                os.utime(part, ns=(original.st_atime_ns, original.st_mtime_ns))
        except FileExistsError:
            raise PictureRefusedError(f"{output} is there already; --force replaces it") from None
        self._made.add(output)


def _status(path: Path) -> os.stat_result | None:
    try:
        return path.stat()
    except OSError:
        return None


def _rewritten(data: bytes, frame: Frame, plan: Plan) -> bytes:
    return rewriting.rewritten(data, frame, plan.sites, plan.values)


def _corrected_jpeg(data: bytes, frame: Frame, plan: Plan) -> bytes:
    holes, avoided = (_pixels(sites, frame) for sites in (plan.sites, plan.avoided))
    return jpeg.corrected(data, holes, avoided).data


def _pixels(sites: NDArray[np.int64], frame: Frame) -> NDArray[np.bool_]:
    """Return (height, width) which pixels have any of these samples."""
    layout = frame.sensor.layout
    pixels = np.zeros(layout.height * layout.width, np.bool_)
    pixels[sites // layout.channels] = True
    return pixels.reshape(layout.height, layout.width)


def _require_as_meant(written: Frame, frame: Frame, plan: Plan, *, is_jpeg: bool) -> None:
    """Refuse what does not show the corrected samples and, elsewhere, the very same as before."""
    same = written.sensor == frame.sensor
    if same and is_jpeg:
        changed = np.unique(np.flatnonzero(written.samples != frame.samples) // frame.sensor.layout.channels)
        same = _all_near(changed, plan.sites // frame.sensor.layout.channels, frame)
    elif same:
        meant = frame.samples.copy()
        meant.reshape(-1)[plan.sites] = plan.values
        same = np.array_equal(written.samples, meant)
    if not same:
        raise RewriteError(
            "what was written of it does not show what it should, so it was thrown away; please report this"
        )


def _all_near(pixels: NDArray[np.int64], changed: NDArray[np.int64], frame: Frame) -> bool:
    """Tell whether all pixels lie in squares that hold a changed one, or beside these."""
    layout = frame.sensor.layout
    rows, columns = -(-layout.height // _JPEG_REACH) + 2, -(-layout.width // _JPEG_REACH) + 2
    near = np.zeros((rows, columns), np.bool_)
    y, x = np.divmod(np.unique(changed), layout.width)
    for dy in range(3):
        for dx in range(3):
            near[y // _JPEG_REACH + dy, x // _JPEG_REACH + dx] = True
    y, x = np.divmod(pixels, layout.width)
    return bool(near[y // _JPEG_REACH + 1, x // _JPEG_REACH + 1].all())


# What is said


def _described(done: Repaired) -> dict[str, Any]:
    return {
        "path": str(done.path),
        "output": None if done.output is None else str(done.output),
        "refused": done.refused,
        "sensor": None if done.sensor is None else done.sensor["id"],
        "corrected": sum(choice.corrected for choice in done.choices),
        "left": sum(not choice.corrected for choice in done.choices),
        "samples": done.samples,
        "defects": [{**asdict(choice), "corrected": choice.corrected} for choice in done.choices],
    }


def _print(done: Repaired, *, dry_run: bool) -> None:
    # Paths to stdout for the next program, in whole lines.
    if done.refused is not None or done.sensor is None:
        plain_console(stderr=True).print(
            escape(f"{printable(str(done.path))} was refused: {done.refused}"), soft_wrap=True
        )
        return
    reasons = Counter(choice.why for choice in done.choices)
    corrected = sum(choice.corrected for choice in done.choices)
    does = "would be corrected" if dry_run else "corrected"
    sentence = f"{printable(str(done.path))}: {many(corrected, 'defect')} {does}"
    if reasons["does not show"]:
        sentence += f", {reasons['does not show']} left that do not show in it"
    if reasons["no healthy neighbour"]:
        sentence += f", {reasons['no healthy neighbour']} left as no healthy pixel is near"
    print(sentence + f" ({sensor_name(done.sensor)})")
    if dry_run:
        for choice in done.choices:
            how = choice.why if choice.corrected else f"not corrected: {choice.why}"
            print(f"  {choice.x:5} {choice.y:5}  {choice.kind:9} {how}")
