"""A series of dark frames on a tethered camera: sets what it can, reads all of it back, shoots, checks what came.

A camera takes a setting and does another thing: the mode dial wins, a choice
that does not exist is accepted in silence, the noise reduction of long
exposures doubles the time. So each setting is read back, and each file that
comes is asked how it was taken. What does not fit ends the series with a
sentence, unless it is to go on anyway.

How far a series has come is on the disk, with the settings to be restored:
interrupted by whatever, the same order goes on where it was.
"""

from __future__ import annotations

import json
import logging
import math
import queue
import re
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

from hotpixd.core.darkness import looks_lit
from hotpixd.core.frame import ShotKind
from hotpixd.intake import metadata
from hotpixd.intake.arrivals import CameraFile
from hotpixd.intake.camera import CameraError, CameraSource
from hotpixd.intake.decode import DecodeError, decode
from hotpixd.store.durable import replace_durably

log = logging.getLogger("hotpixd")

Stage = Literal["preparing", "shooting", "waiting", "done", "stopped", "failed"]
ENDED = ("done", "stopped", "failed")

_NEAR = 0.02
"""Share by which two exposure times of one name may differ: 1/3 stops are 26 % apart."""

_AS_ORDERED = 0.07
"""Share by which the time in a file may differ from the one ordered: cameras write 30 for 32 s."""

_MATES_WITHIN_S = 1.0
"""Quiet time after which the files of a shot have all come."""

_LATE_S = 30.0
"""How long a shot's files may take beside twice its exposure time: noise reduction shoots a second dark."""

_ANSWER_S = 90.0
_CAMERA_WITHIN_S = 120.0
"""How long a camera that has gone is waited for."""

_RESUMED_WITHIN_S = 86400.0
"""An order given again after so long begins anew: the sensor's temperature was another one."""

_FAILURES = 3
"""Shots in a row that do not come before the series ends."""

_NOISE_REDUCTION = ("longexpnr", "longexposurenr", "longexposurenoisereduction")
_AUTOFOCUS = (("autofocus", ("Off", "0")), ("focusmode", ("Manual", "MF", "Manual Focus")))
_SHUTTER = ("shutterspeed", "shutterspeed2", "exptime")
_ISO = ("iso",)
_OFF = ("off", "0", "disable", "disabled", "no")


@dataclass(frozen=True, slots=True)
class SeriesOrder:
    """What is to be shot."""

    frames: int
    exposure_s: float | None = None
    """None: as the camera is set."""

    iso: int | None = None
    """None: as the camera is set."""

    cooldown_s: float = 0.0
    """Pause between two shots."""

    bulb: bool = False
    """Hold the shutter open from here, even if the camera has a setting for this time."""

    until_stable: int | None = None
    """End early when so many darks in a row have changed nothing on the map of defects."""

    anyway: bool = False
    """Go on where the camera does not follow, or the frames are not dark."""

    anew: bool = False
    """Do not go on with an interrupted series of the same order."""

    camera: str | None = None
    """Serial number, if there are several."""

    def same_as(self, other: SeriesOrder) -> bool:
        """Tell whether another order goes on with this one's series."""
        return (self.frames, self.exposure_s, self.iso, self.bulb, self.camera) == (
            other.frames,
            other.exposure_s,
            other.iso,
            other.bulb,
            other.camera,
        )


class SeriesError(Exception):
    """The series cannot begin or go on. The message is a sentence, with what to do."""


@dataclass(slots=True)
class Journal:
    """How far a series has come."""

    order: SeriesOrder
    camera: str
    taken: int = 0
    """Darks that have come as ordered."""

    restore: dict[str, Any] = field(default_factory=dict)
    """Settings as they were."""

    bulb_open: bool = False
    at: float = field(default_factory=time.time)

    @classmethod
    def read(cls, path: Path) -> Journal | None:
        """Return the journal of an unfinished series, if there is one that can be read."""
        try:
            plain = json.loads(path.read_text("utf-8"))
            return cls(**{**plain, "order": SeriesOrder(**plain["order"])})
        except (OSError, ValueError, TypeError, KeyError):
            return None

    def write(self, path: Path) -> None:
        """Put it on the disk, durably."""
        part = path.with_name(f"{path.name}.tmp")
        part.write_text(json.dumps(asdict(self)), "utf-8")
        replace_durably(part, path, step="series")


@dataclass(frozen=True, slots=True)
class _Came:
    """A file of the series."""

    stem: str
    exposure_s: float | None
    iso: float | None
    temp_c: float | None
    name: str
    lit: bool
    """Whether light has plainly fallen on the sensor."""


class DarkSeries:
    """Shoots a series in a thread of its own.

    Parameters
    ----------
    source : of the camera
    path : of the journal
    wake : called when `state` has changed
    """

    def __init__(self, order: SeriesOrder, source: CameraSource, path: Path, wake: Callable[[], None]) -> None:
        self.order = order
        self._source = source
        self._path = path
        self._wake = wake
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self._came: queue.SimpleQueue[_Came] = queue.SimpleQueue()
        self._ours: set[str] = set()
        self._bulb = False
        self._stage: Stage = "preparing"
        self._detail = "looking for the camera"
        self._warnings: list[str] = []
        self._temps: list[float] = []
        self._folded = 0
        self._unchanged = 0
        self._shot_s: float | None = None
        self._exposure_s = order.exposure_s
        self._iso: float | None = order.iso
        self._journal: Journal | None = None
        self._camera_name = ""
        self._resumed_at = 0
        self._thread = threading.Thread(target=self._run, name="darks", daemon=True)

    # --- for the service

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self) -> None:
        """End after what the camera is at; a shutter that is held open is closed at once."""
        self._stopping.set()
        self._source.interrupt()

    def join(self, within_s: float) -> None:
        """Wait for the end."""
        self._thread.join(within_s)

    @property
    def ended(self) -> bool:
        """Whether it is over."""
        return self._stage in ENDED

    def state(self) -> dict[str, Any]:
        """Describe how it does, as the feed shows it."""
        with self._lock:
            taken = 0 if self._journal is None else self._journal.taken
            left = self.order.frames - taken
            each_s = None
            if self._shot_s is not None:
                each_s = self._shot_s + self.order.cooldown_s
            elif self._exposure_s is not None:
                each_s = self._exposure_s + self.order.cooldown_s + 2.0
            return {
                "stage": self._stage,
                "detail": self._detail,
                "camera": self._camera_name,
                "frames": self.order.frames,
                "taken": taken,
                "folded": self._folded,
                "resumed_at": self._resumed_at,
                "exposure_s": self._exposure_s,
                "iso": self._iso,
                "temps_c": self._temps[-1:] and [min(self._temps), max(self._temps), self._temps[-1]],
                "left_s": None if each_s is None or self._stage in ENDED else round(left * each_s, 1),
                "unchanged": self._unchanged,
                "warnings": list(self._warnings),
            }

    def folded(self, origin: str, kind: ShotKind | None, *, changed: bool) -> None:
        """Take in what became of a shot: of which kind it is (None: not folded), and whether the map has changed.

        Parameters
        ----------
        origin : of the shot; those of others are passed over
        """
        with self._lock:
            if not origin.endswith(tuple(self._ours)):
                return
            if kind is ShotKind.DARK:
                self._folded += 1
                self._unchanged = 0 if changed else self._unchanged + 1
        self._wake()

    # --- the thread

    def _run(self) -> None:
        try:
            self._shoot_all()
        except SeriesError as error:
            self._end("failed", str(error))
        except CameraError as error:
            self._end("failed", f"{error}.")
        except OSError as error:
            self._end("failed", f"How far the series has come cannot be written to {self._path}: {error.strerror}.")

    def _shoot_all(self) -> None:
        facts = self._wait_for_camera()
        if not facts["verified"]:
            # What was shot before must not be taken for a part of the series.
            self._source.list_anew()
            facts = self._wait_for_camera()
        camera = facts["camera"]
        journal = Journal.read(self._path)
        fits = journal is not None and journal.camera == camera and journal.order.same_as(self.order)
        fresh = journal is not None and 0 <= time.time() - journal.at < _RESUMED_WITHIN_S
        if journal is None or not fits or not fresh or self.order.anew:
            restore = {} if journal is None or journal.camera != camera else journal.restore
            journal = Journal(self.order, camera, restore=restore)
        self._resumed_at = journal.taken
        with self._lock:
            self._journal = journal
            self._camera_name = facts["name"]
        self._source.exposing = True
        self._source.on_arrival = self._heed
        try:
            self._prepare(facts, journal)
            self._shoot(journal)
        finally:
            self._source.exposing = False
            self._source.on_arrival = None
            self._restore(journal)

    def _wait_for_camera(self) -> dict[str, Any]:
        """Return the facts of the camera, once it is ready: all that was on its card is then no part of the series."""
        until = time.monotonic() + _CAMERA_WITHIN_S
        while True:
            if self._stopping.is_set():
                raise SeriesError("The series was stopped before the camera was ready.")
            ready = [camera for camera in self._source.cameras() if self.order.camera in (None, camera["camera"])]
            if len(ready) > 1:
                names = ", ".join(str(camera["camera"]) for camera in ready)
                raise SeriesError(f"There are several cameras; say which by its serial number: {names}.")
            if ready and ready[0]["condition"] == "ready":
                return ready[0]
            states = "; ".join(f"{s.name} {s.condition or s.status}: {s.detail}" for s in self._source.states())
            self._tell("waiting" if self._journal else "preparing", f"waiting for the camera ({states})")
            if time.monotonic() > until:
                raise SeriesError(f"No camera is ready: {states}.")
            self._stopping.wait(0.2)

    # --- settings

    def _prepare(self, facts: Mapping[str, Any], journal: Journal) -> None:
        self._tell("preparing", "setting the camera")
        if not facts["can_trigger"] and not self.order.bulb:
            raise SeriesError(f"{facts['name']} cannot be released from here: shoot its darks by hand while tethered.")
        if facts["target"] == "ram":
            self._warn("The camera keeps shots in its memory only: one is lost if it is unplugged before it has come.")
        quality = str(facts.get("image_quality") or "")
        if quality and not re.search(r"raw|nef|arw|dng|raf|cr2|cr3", quality, re.IGNORECASE):
            self._warn(f"The camera is set to {quality}: these darks tell of rendered pictures, not of raw files.")
        names = set(facts["settings"])
        self._set_off(names, journal)
        for name, choices in _AUTOFOCUS:
            if name in names:
                self._set(name, choices.__contains__, journal, quietly=True)
        if self.order.iso is not None:
            self._set_iso(names, journal)
        elif (iso := self._value(names, _ISO)) is not None:
            with suppress(ValueError):
                self._iso = float(str(iso))
        self._set_exposure(names, facts, journal)

    def _set_off(self, names: set[str], journal: Journal) -> None:
        """Switch the noise reduction of long exposures off: it subtracts what is looked for, and doubles the time."""
        name = next((name for name in _NOISE_REDUCTION if name in names), None)
        known = None if name is None else self._read(name)
        if name is None or known is None:
            if (self._exposure_s or 0.0) >= 1.0:
                self._warn(
                    "Whether the camera's long exposure noise reduction is off cannot be seen from here. It must be:"
                    " it hides hot pixels and doubles the time."
                )
            return
        if str(known["value"]).strip().lower() in _OFF:
            return
        if not self._set(name, lambda choice: choice.strip().lower() in _OFF, journal, quietly=True):
            self._refuse(
                "The camera's long exposure noise reduction is on and cannot be switched off from here; it hides hot"
                " pixels and doubles the time. Switch it off in the camera's menu."
            )

    def _set_iso(self, names: set[str], journal: Journal) -> None:
        name = next((name for name in _ISO if name in names), None)
        known = None if name is None else self._read(name)
        if name is None or known is None:
            raise SeriesError(
                "The camera's ISO cannot be set from here. Set it on the camera, and give the order without --iso."
            )
        wanted = str(self.order.iso)
        if not self._set(name, lambda choice: choice.strip() == wanted, journal):
            choices = ", ".join(known["choices"] or ())
            self._refuse(
                f"The camera does not take ISO {wanted}; it is at {self._read_value(name)}. It has: {choices}."
            )

    def _set_exposure(self, names: set[str], facts: Mapping[str, Any], journal: Journal) -> None:
        name = next((name for name in _SHUTTER if name in names), None)
        known = None if name is None else self._read(name)
        wanted = self.order.exposure_s
        if wanted is None:
            now = None if known is None else seconds(str(known["value"]))
            if now is None:
                raise SeriesError("The camera does not say its exposure time: give one with --exposure.")
            self._exposure_s = now
            return
        choices = [] if known is None else known["choices"] or []
        offered = [choice for choice in choices if _is_near(seconds(choice), wanted)]
        if name is not None and offered and not self.order.bulb:
            if not self._set(name, lambda choice: choice in offered, journal):
                self._refuse(
                    f"The camera does not take an exposure of {wanted:g} s; it is at {self._read_value(name)}."
                    " Is its mode dial on M?"
                )
            return
        if not facts["can_bulb"]:
            times = sorted(time for time in map(seconds, choices) if time is not None)
            has = f" It has {times[0]:g} to {times[-1]:g} s." if times else ""
            raise SeriesError(
                f"The camera cannot expose for {wanted:g} s, and its shutter cannot be held open from here.{has}"
            )
        if wanted < 1.0:
            raise SeriesError(f"A shutter held open from here takes at least 1 s, not {wanted:g} s.")
        self._bulb = True
        # Holding it open may change these by itself.
        for changed in (name, "expprogram"):
            if changed in names and (known := self._read(changed)) is not None:
                journal.restore.setdefault(changed, known["value"])
        self._note(journal)
        if name is not None and any("bulb" in choice.lower() for choice in choices):
            self._set(name, lambda choice: "bulb" in choice.lower(), journal, quietly=True)

    def _read(self, name: str) -> dict[str, Any] | None:
        known: dict[str, Any] | None = self._source.call("get", _ANSWER_S, self._camera, names=[name])[name]
        return known

    def _read_value(self, name: str) -> str:
        known = self._read(name)
        return "an unknown value" if known is None else str(known["value"])

    def _value(self, names: set[str], wanted: tuple[str, ...]) -> Any:
        name = next((name for name in wanted if name in names), None)
        known = None if name is None else self._read(name)
        return None if known is None else known["value"]

    def _set(self, name: str, fits: Callable[[str], bool], journal: Journal, *, quietly: bool = False) -> bool:
        """Set the first choice that fits; tell whether the camera then says so itself."""
        known = self._read(name)
        if known is None:
            return False
        if fits(str(known["value"])):
            return True
        choices = known["choices"]
        choice = next((choice for choice in choices if fits(choice)), None) if choices else None
        if choice is None or known["readonly"]:
            return False
        journal.restore.setdefault(name, known["value"])
        self._note(journal)
        try:
            now = self._source.call("set", _ANSWER_S, self._camera, name=name, value=choice)
        except CameraError as error:
            if error.gone:
                raise
            if not quietly:
                self._warn(f"The camera refuses {name} = {choice}: {error}.")
            return False
        return fits(str(now.get("value")))

    @property
    def _camera(self) -> str | None:
        return None if self._journal is None else self._journal.camera

    def _restore(self, journal: Journal) -> None:
        """Give the camera back as it was; what cannot be restored now is left for the next series."""
        for name, value in list(journal.restore.items()):
            try:
                self._source.call("set", _ANSWER_S, self._camera, name=name, value=value)
            except CameraError as error:
                if error.gone:
                    break
                self._warn(f"The camera's {name} could not be set back to {value}: {error}.")
            del journal.restore[name]
        if self._stage == "done" and not journal.restore:
            self._path.unlink(missing_ok=True)
        else:
            with suppress(OSError):
                self._note(journal)

    # --- shots

    def _shoot(self, journal: Journal) -> None:
        failures = 0
        while journal.taken < self.order.frames and not self._stopping.is_set():
            began = time.monotonic()
            self._tell("shooting", f"dark {journal.taken + 1} of {self.order.frames}")
            try:
                came = self._one(journal)
            except CameraError as error:
                if not error.gone:
                    raise SeriesError(_cannot_shoot(error)) from error
                # Perhaps it was taken all the same: then the listing finds it, and it is folded beside the series.
                self._warn(f"The camera went away: {error}.")
                self._await_return()
                continue
            if came is None and self._stopping.is_set():
                break
            if came is None:
                failures += 1
                if failures >= _FAILURES:
                    raise SeriesError(
                        f"The shutter was released {failures} times, and no picture has come. Is the camera focusing"
                        " with its cap on, or its card locked?"
                    )
                continue
            failures = 0
            self._check(came)
            with self._lock:
                journal.taken += 1
                self._shot_s = time.monotonic() - began
            self._note(journal)
            self._wake()
            if self._is_stable():
                self._end("done", f"the map has not changed for {self._unchanged} darks")
                return
            if journal.taken < self.order.frames:
                self._stopping.wait(self.order.cooldown_s)
        if self._stopping.is_set():
            self._end("stopped", "stopped; the same order goes on from here")
        else:
            self._end("done", "all darks are taken")

    def _one(self, journal: Journal) -> _Came | None:
        """Release the shutter once, and return what came; None if nothing did."""
        while not self._came.empty():
            self._came.get()
        exposure_s = self._exposure_s or 1.0
        if self._bulb:
            journal.bulb_open = True
            self._note(journal)
            self._source.call("bulb", exposure_s + _ANSWER_S, self._camera, exposure_s=exposure_s)
            journal.bulb_open = False
        else:
            self._source.call("trigger", 2.2 * exposure_s + _ANSWER_S, self._camera, exposure_s=exposure_s)
        # Told to stop, too: what the camera is at is a dark as good as the others.
        first = self._next_file(2.2 * exposure_s + _LATE_S, to_the_end=not self._bulb)
        if first is None:
            return None
        while (mate := self._next_file(_MATES_WITHIN_S)) is not None:
            if mate.stem != first.stem:
                log.warning("a picture came that the series has not ordered: %r", mate.name)
        return first

    def _next_file(self, within_s: float, *, to_the_end: bool = True) -> _Came | None:
        until = time.monotonic() + within_s
        while (to_the_end or not self._stopping.is_set()) and (left := until - time.monotonic()) > 0:
            with suppress(queue.Empty):
                return self._came.get(timeout=min(left, 0.2))
            if not any(camera["camera"] == self._camera for camera in self._source.cameras()):
                raise CameraError("the link to the camera broke while its picture was waited for", gone=True)
        return None

    def _await_return(self) -> None:
        self._tell("waiting", "waiting for the camera")
        self._source.exposing = False
        facts = self._wait_for_camera()
        self._source.exposing = True
        assert self._journal is not None
        self._prepare(facts, self._journal)

    def _heed(self, file: CameraFile, path: Path) -> ShotKind | None:
        """In the source's thread: a file has arrived. It is a dark, unless light is plain to see in it."""
        with path.open("rb") as content:
            about = metadata.from_file(content)
        with self._lock:
            self._ours.add(file.path)
        lit = not self.order.anyway and _is_lit(path)
        self._came.put(_Came(file.stem, about.exposure_s, about.iso, about.sensor_temp_c, file.name, lit))
        ordered = self._exposure_s
        aborted = about.exposure_s is not None and ordered is not None and about.exposure_s < 0.5 * ordered
        # Told by the file itself where it is not what was ordered.
        return self._source.settings.kind if lit or aborted else ShotKind.DARK

    def _check(self, came: _Came) -> None:
        """Compare how a dark was taken with what was ordered."""
        if came.temp_c is not None:
            with self._lock:
                self._temps.append(came.temp_c)
        if came.lit:
            raise SeriesError(
                f"Light reaches the sensor: {came.name} is not dark. Put the cap on, and cover the viewfinder."
            )
        wanted = self._exposure_s
        if came.exposure_s is not None and wanted is not None and not _is_near(came.exposure_s, wanted, _AS_ORDERED):
            self._refuse(
                f"{came.name} was exposed for {came.exposure_s:g} s, not for {wanted:g} s: the camera does not follow."
                " Is its mode dial on M?"
            )
        if came.iso is not None and self._iso is not None and not math.isclose(came.iso, self._iso, rel_tol=0.05):
            self._refuse(
                f"{came.name} was taken at ISO {came.iso:g}, not {self._iso:g}: the camera does not follow."
                " Is automatic ISO on?"
            )

    def _is_stable(self) -> bool:
        wanted = self.order.until_stable
        return wanted is not None and self._folded >= wanted and self._unchanged >= wanted

    # --- what is told

    def _refuse(self, sentence: str) -> None:
        """End the series because the camera does not do as it was told, unless it is to go on anyway."""
        if not self.order.anyway:
            raise SeriesError(sentence)
        self._warn(sentence)

    def _warn(self, sentence: str) -> None:
        with self._lock:
            if sentence in self._warnings:
                return
            self._warnings.append(sentence)
        log.warning("darks: %s", sentence)
        self._wake()

    def _tell(self, stage: Stage, detail: str) -> None:
        with self._lock:
            changed = (stage, detail) != (self._stage, self._detail)
            self._stage, self._detail = stage, detail
        if changed:
            self._wake()

    def _end(self, stage: Stage, detail: str) -> None:
        log.info("darks %s: %s", stage, detail)
        self._tell(stage, detail)

    def _note(self, journal: Journal) -> None:
        journal.at = time.time()
        journal.write(self._path)


def seconds(choice: str) -> float | None:
    """Return the exposure time that a camera's choice names: "30", "1/200", "0.3", "30.0000s"; None for "bulb"."""
    text = choice.strip().lower().removesuffix("s").removesuffix('"').strip()
    match = re.fullmatch(r"(\d+)/(\d+)|\d+(\.\d*)?", text, re.ASCII)
    if match is None or (match[2] is not None and int(match[2]) == 0):
        return None
    return float(Fraction(text)) if "/" in text else float(text)


def left_open(path: Path) -> bool:
    """Tell whether a series was interrupted while it held a shutter open."""
    journal = Journal.read(path)
    return journal is not None and journal.bulb_open


def _is_lit(path: Path) -> bool:
    try:
        frame = decode(path, ShotKind.DARK)
    except DecodeError:
        # What is wrong with it is said when it is to be folded.
        return False
    return looks_lit(frame.samples, frame.sensor.layout, frame.black_level_adu, frame.white_level_adu)


def _is_near(given: float | None, wanted: float, share: float = _NEAR) -> bool:
    return given is not None and abs(given - wanted) <= share * wanted


def _cannot_shoot(error: CameraError) -> str:
    if error.code in (-3, -115):
        return "The camera's card is full: make room on it, or put in another one."
    if error.code == -110:
        return "The camera has been busy for half a minute. Is it in a menu, or writing to its card?"
    return f"The camera does not release its shutter: {error}."
