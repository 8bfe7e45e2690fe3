"""Correct pictures with the map of their sensor: files in, corrected copies in a folder out, a sentence for each.

Pictures are decoded in the jail. What is written is decoded there again before it gets its name, and must show what
was meant to be changed and nothing else.
"""

from __future__ import annotations

import errno
import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
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
from hotpixd.store.durable import StateError, WrongUse, full_disk_as_state_full, written_beside
from hotpixd.views import rewriting
from hotpixd.views.repair import Choice, PictureRefusedError, Plan, Sensor, Wish, WrongSensorError, planned, sensor_of
from hotpixd.views.rewriting import jpeg
from hotpixd.views.rewriting.errors import RewriteError
from hotpixd.views.text import plain_console, printable, sensor_name
from hotpixd.words import many

_JPEG_REACH = 32
"""Pixels around a changed one that may change with it in a JPEG: a block of subsampled colour, and its smoothing."""

_MOST_LOST = 1.0
"""Difference of samples of 255, on average over a picture, up to which a JPEG may be encoded again as a whole.

Of six real and simulated pictures, progressive at qualities 30 to 100 with any subsampling, the mean was at most 0.5;
of noise and checks of few pixels in pure colours, which no camera has seen, it is up to 20.
"""

_FOR_ALL = (errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO)
"""What the system says where a folder takes no picture at all. Of one picture's name it says other things."""


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

    Raises
    ------
    WrongUse
        If the folder can be none.
    StateError
        If the folder takes no pictures, once it is said what became of those before.
    """
    if folder is not None:
        _require_folder(folder)
    console = plain_console(stderr=True)
    sensors = answer["sensors"]
    if not sensors:
        console.print("hotpixd: no sensor is known yet; scan its pictures first")
        return 2
    done = []
    fault: StateError | None = None
    try:
        with closing(Decoders(1)) as decoders, progress("picture", len(pictures)) as advance:
            repairer = _Repairer(sensors, pictures, None if dry_run else folder, wish, decoders, force=force)
            for path in pictures:
                if stop():
                    break
                done.append(repairer.repaired(path))
                advance("")
    except StateError as error:
        fault = error
    except WrongSensorError as error:
        console.print(f"hotpixd: {escape(printable(str(error)))}", soft_wrap=True)
        return 2
    if as_json:
        json.dump({"pictures": [_described(each) for each in done]}, sys.stdout, indent=1)
        print()
    else:
        for each in done:
            _print(each, dry_run=dry_run)
    if fault is not None:
        raise fault
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
        require = _require_as_meant
        if plan.sites.size and is_jpeg:
            done = _corrected_jpeg(data, frame, plan)
            data = done.data
            require = _require_little_lost if done.changed_blocks < 0 else _require_same_elsewhere
        elif plan.sites.size:
            data = _rewritten(data, frame, plan)
        self._write(output, data, path.stat(), frame, plan, require)
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
        self,
        output: Path,
        data: bytes,
        original: os.stat_result,
        frame: Frame,
        plan: Plan,
        require: Callable[[Frame, Frame, Plan], None],
    ) -> None:
        """Write a picture, check what can be read from it, and give it its name: all of it is there, or nothing."""
        with _blamed_on(output.parent):
            output.parent.mkdir(parents=True, exist_ok=True)
            try:
                with written_beside(output, data, replace=self._force, mode=0o644) as part:
                    if plan.sites.size:
                        require(self._decoders.decode(part), frame, plan)
                    os.utime(part, ns=(original.st_atime_ns, original.st_mtime_ns))
            except FileExistsError:
                raise PictureRefusedError(f"{output} is there already; --force replaces it") from None
        self._made.add(output)


def _require_folder(folder: Path) -> None:
    """Raise `WrongUse` if something else is where a folder should be, or on the way there."""
    there = next((each for each in (folder, *folder.parents) if os.path.lexists(each)), None)
    if there is not None and not there.is_dir():
        raise WrongUse(f"{there} is {'a file' if there.is_file() else 'no folder'}; -o names a folder")


@contextmanager
def _blamed_on(folder: Path) -> Iterator[None]:
    """Raise `StateError` where a folder takes no pictures at all: it is not the fault of each of them."""
    try:
        with full_disk_as_state_full(f"for corrected pictures in {folder}"):
            yield
    except OSError as error:
        if error.errno not in _FOR_ALL:
            raise
        raise StateError(f"The folder {folder} takes no pictures: {error.strerror}.") from error


def _status(path: Path) -> os.stat_result | None:
    try:
        return path.stat()
    except OSError:
        return None


def _rewritten(data: bytes, frame: Frame, plan: Plan) -> bytes:
    return rewriting.rewritten(data, frame, plan.sites, plan.values)


def _corrected_jpeg(data: bytes, frame: Frame, plan: Plan) -> jpeg.Rewritten:
    holes, avoided = (_pixels(sites, frame) for sites in (plan.sites, plan.avoided))
    return jpeg.corrected(data, holes, avoided)


def _pixels(sites: NDArray[np.int64], frame: Frame) -> NDArray[np.bool_]:
    """Return (height, width) which pixels have any of these samples."""
    layout = frame.sensor.layout
    pixels = np.zeros(layout.height * layout.width, np.bool_)
    pixels[sites // layout.channels] = True
    return pixels.reshape(layout.height, layout.width)


def _require_as_meant(written: Frame, frame: Frame, plan: Plan) -> None:
    """Refuse what does not show the corrected samples and, elsewhere, the very same as before."""
    meant = frame.samples.copy()
    meant.reshape(-1)[plan.sites] = plan.values
    if written.sensor != frame.sensor or not np.array_equal(written.samples, meant):
        raise _unlike_what_was_meant()


def _require_same_elsewhere(written: Frame, frame: Frame, plan: Plan) -> None:
    """Refuse a JPEG that does not show, away from its corrected pixels, the very same as before."""
    if written.sensor != frame.sensor or _changed_elsewhere(written, frame, plan).size:
        raise _unlike_what_was_meant()


def _require_little_lost(written: Frame, frame: Frame, plan: Plan) -> None:
    """Refuse a JPEG that was encoded again as a whole if that is plain to see away from its corrected pixels.

    Its pixels were rounded and clipped in between, its colours spread and gathered: some come out a little different.
    """
    if written.sensor != frame.sensor:
        raise _unlike_what_was_meant()
    elsewhere = _changed_elsewhere(written, frame, plan)
    before, after = (
        each.samples.reshape(-1, frame.sensor.layout.channels)[elsewhere].astype(np.int16) for each in (frame, written)
    )
    lost = float(np.abs(after - before).sum()) / frame.samples.size
    if lost > _MOST_LOST:
        raise PictureRefusedError(
            "it is no baseline JPEG, so it has to be encoded again as a whole, and that would change its other samples"
            f" by {lost:.1f} of 255 on average; `jpegtran -copy all` makes it one without any loss"
        )


def _unlike_what_was_meant() -> RewriteError:
    return RewriteError(
        "what was written of it does not show what it should, so it was thrown away; please report this"
    )


def _changed_elsewhere(written: Frame, frame: Frame, plan: Plan) -> NDArray[np.int64]:
    """Return the pixels of a JPEG that have changed, neither in squares that hold a corrected one nor beside these."""
    layout = frame.sensor.layout
    changed = np.unique(np.flatnonzero(written.samples != frame.samples) // layout.channels)
    rows, columns = -(-layout.height // _JPEG_REACH) + 2, -(-layout.width // _JPEG_REACH) + 2
    near = np.zeros((rows, columns), np.bool_)
    y, x = np.divmod(np.unique(plan.sites // layout.channels), layout.width)
    for dy in range(3):
        for dx in range(3):
            near[y // _JPEG_REACH + dy, x // _JPEG_REACH + dx] = True
    y, x = np.divmod(changed, layout.width)
    return np.asarray(changed[~near[y // _JPEG_REACH + 1, x // _JPEG_REACH + 1]])


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
    counted, least = done.sensor.get("frames_counted", 0), done.sensor.get("min_frames", 0)
    if counted < least:
        there = f"there {'is' if counted == 1 else 'are'} {counted}"
        sentence += f"; nothing is known of its sensor yet, as a verdict takes {least} counted frames and {there}"
    print(sentence + f" ({sensor_name(done.sensor)})")
    if dry_run:
        for choice in done.choices:
            how = choice.why if choice.corrected else f"not corrected: {choice.why}"
            print(f"  {choice.x:5} {choice.y:5}  {choice.kind:9} {how}")
