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
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

from hotpixd.core.frame import Frame, ShotKind
from hotpixd.intake import metadata
from hotpixd.intake.arrivals import CameraFile
from hotpixd.intake.camera import CameraError, CameraSource
from hotpixd.intake.decode import DecodeError
from hotpixd.store.durable import replace_durably

log = logging.getLogger("hotpixd")

Stage = Literal["preparing", "shooting", "waiting", "done", "stopped", "failed"]
ENDED = ("done", "stopped", "failed")

_NEAR = 0.02
"""Share by which two exposure times of one name may differ: 1/3 stops are 26 % apart."""

_AS_ORDERED = 0.07
"""Share by which the time in a file may differ from the one ordered: cameras write 30 for 32 s."""

_HELD_S = 0.5
"""How much longer or shorter a shutter held open from here may have been open: orders take their time."""

_MATES_WITHIN_S = 1.0
"""Quiet time after which the files of a shot have all come, as long as it is not known how many there are."""

_LATE_S = 30.0
"""How long a shot's files may take beside twice its exposure time: noise reduction shoots a second dark."""

_ANSWER_S = 90.0

_BUSY_S = 30.0
"""How long a busy camera is asked again."""

_SETTLES_S = 5.0
"""How long after its last exposure a camera may refuse to be set back."""

_CAMERA_WITHIN_S = 120.0
"""How long a camera is waited for, at the start and when it has gone, while nothing of it comes."""

_NAG_S = 0.2
"""Between two looks at what sends no word."""

_RESUMED_WITHIN_S = 86400.0
"""An order given again after so long begins anew: the sensor's temperature was another one."""

_FAILURES = 3
"""Shots in a row that do not come before the series ends."""

_BAD_PARAMETERS, _BUSY = -2, -110
"""What libgphoto2 says of a setting that is refused, now or for ever, and of a camera that does something else."""

_NOISE_REDUCTION = ("longexpnr", "longexposurenr", "longexposurenoisereduction")
_AUTOFOCUS = (("autofocus", ("Off", "0")), ("focusmode", ("Manual", "MF", "Manual Focus")))
_SHUTTER = ("shutterspeed", "shutterspeed2", "exptime")
_ISO = ("iso",)
_MODE = "expprogram"
_OFF = ("off", "0", "disable", "disabled", "no")

_RAW = "raw|nef|dng|pef"
_RENDERED = "jpe?g|hei[fc]|tiff?|fine|normal|basic|standard"
"""What the name of an image quality contains if such a file is part of it."""

_Settings = Mapping[str, Mapping[str, Any]]
"""Value, choices and readonly of settings, by name."""


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

    def __post_init__(self) -> None:
        """Raise ValueError for what no camera could do: orders come over a socket."""
        limits = {"frames": (1, 10_000), "exposure_s": (1e-5, 7200), "iso": (1, 10_000_000), "cooldown_s": (0, 3600)}
        for name, (least, most) in {**limits, "until_stable": (1, 10_000)}.items():
            value = getattr(self, name)
            whole = name in ("frames", "iso", "until_stable")
            if value is None and name not in ("frames", "cooldown_s"):
                continue
            if isinstance(value, bool) or not isinstance(value, int if whole else int | float):
                raise ValueError(f"{name} must be a {'whole ' if whole else ''}number, got {value!r}")
            if not least <= value <= most:
                raise ValueError(f"{name} must be from {least:g} to {most:g}, got {value!r}")
        if not (self.camera is None or isinstance(self.camera, str)):
            raise ValueError(f"camera must be a serial number, got {self.camera!r}")

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


class _Stopped(Exception):  # noqa: N818 - what happened, not a class of errors
    """Told to stop."""


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
            journal = cls(**{**plain, "order": SeriesOrder(**plain["order"])})
        except (OSError, ValueError, TypeError, KeyError, RecursionError):
            return None
        return journal if journal._is_sound() else None

    def _is_sound(self) -> bool:
        """Tell whether its values are of the kinds that `write` writes."""
        return (
            isinstance(self.camera, str)
            and type(self.taken) is int
            and self.taken >= 0
            and isinstance(self.restore, dict)
            and isinstance(self.bulb_open, bool)
            and type(self.at) in (int, float)
            and math.isfinite(self.at)
        )

    def write(self, path: Path) -> None:
        """Put it on the disk, durably."""
        part = path.with_name(f"{path.name}.tmp")
        part.write_text(json.dumps(asdict(self)), "utf-8")
        replace_durably(part, path, step="series")

    def goes_on_with(self, order: SeriesOrder, camera: str) -> bool:
        """Tell whether an order to a camera goes on with this series."""
        fresh = 0 <= time.time() - self.at < _RESUMED_WITHIN_S
        return fresh and self.camera == camera and self.order.same_as(order) and not order.anew


@dataclass(frozen=True, slots=True)
class _Came:
    """A file of the series."""

    shot: str
    """What the files of one shot share."""

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
    decode : as `Decoders.decode`
    """

    def __init__(
        self,
        order: SeriesOrder,
        source: CameraSource,
        path: Path,
        wake: Callable[[], None],
        decode: Callable[[Path, ShotKind | None], Frame],
    ) -> None:
        self.order = order
        self._source = source
        self._path = path
        self._wake = wake
        self._decode = decode
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self._came: queue.SimpleQueue[_Came] = queue.SimpleQueue()
        self._ours: set[str] = set()
        self._shots: dict[str, tuple[str, set[str]]] = {}
        """For each stem its shot, and the names of its files that have come."""
        self._counted: set[str] = set()
        self._strays = 0
        """Exposures that were broken off, and whose files may come yet."""
        self._broken_off: set[str] = set()
        self._most_files = 0
        self._files_each: int | None = None
        """Files that a shot is known to have. None: not known yet."""
        self._bulb = False
        self._holding = False
        self._exposing_until = -math.inf
        self._shot_at: float | None = None
        self._stage: Stage = "preparing"
        self._detail = "looking for the camera"
        self._warnings: list[str] = []
        self._gone_on: set[str] = set()
        self._temps: list[float] = []
        self._folded = 0
        self._refused = 0
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
        if not self._stopping.is_set():
            self._stopping.set()
            threading.Thread(target=self._let_go, name="let go of the shutter", daemon=True).start()

    def join(self, within_s: float) -> None:
        """Wait for the end."""
        self._thread.join(within_s)

    @property
    def ended(self) -> bool:
        """Whether it is over, and the camera as it was."""
        return self._stage in ENDED

    def is_of(self, source: object) -> bool:
        """Tell whether it is shot by a camera of this source."""
        return source is self._source

    def state(self) -> dict[str, Any]:
        """Describe how it does, as the feed shows it."""
        with self._lock:
            return {
                "stage": self._stage,
                "detail": self._detail,
                "camera": self._camera_name,
                "frames": self.order.frames,
                "taken": 0 if self._journal is None else self._journal.taken,
                "folded": self._folded,
                "refused": self._refused,
                "resumed_at": self._resumed_at,
                "exposure_s": self._exposure_s,
                "iso": self._iso,
                "bulb": self._bulb,
                "temps_c": self._temps[-1:] and [min(self._temps), max(self._temps), self._temps[-1]],
                "left_s": self._left_s(),
                "unchanged": self._unchanged,
                "warnings": list(self._warnings),
            }

    def _left_s(self) -> float | None:
        """Return how long it will still take, as far as that is known; call with the lock held."""
        if self._stage in ENDED or (self._shot_s is None and self._exposure_s is None):
            return None
        each_s = (self._exposure_s or 0.0) + 2.0 if self._shot_s is None else self._shot_s
        left = self.order.frames - (0 if self._journal is None else self._journal.taken)
        begun_s = 0.0 if self._shot_at is None else min(time.monotonic() - self._shot_at, each_s)
        return round(max(0.0, left * each_s + max(left - 1, 0) * self.order.cooldown_s - begun_s), 1)

    def folded(self, origin: str, kind: ShotKind | None, *, changed: bool, refused: str | None) -> None:
        """Take in what became of a shot: of which kind it is (None: not folded), and whether the map may still change.

        Parameters
        ----------
        origin : of the shot; those of others are passed over
        refused : why it was, if so
        """
        with self._lock:
            if not origin.endswith(tuple(self._ours)):
                return
            if kind is ShotKind.DARK:
                self._folded += 1
                self._unchanged = 0 if changed else self._unchanged + 1
            self._refused += refused is not None
        if refused is not None:
            self._warn(f"{origin} was refused: {refused}")
        self._wake()

    # --- the thread

    def _run(self) -> None:
        end: tuple[Stage, str] = "failed", "A fault in hotpixd has ended it; the daemon's log says more."
        try:
            end = self._shoot_all()
        except SeriesError as error:
            end = "failed", str(error)
        except CameraError as error:
            end = "failed", self._cannot_go_on(error)
        except OSError as error:
            end = "failed", f"How far the series has come cannot be written to {self._path}: {error.strerror}."
        except _Stopped:
            end = "stopped", "stopped before the camera was ready"
        finally:
            log.info("darks %s: %s", *end)
            self._tell(*end)

    def _shoot_all(self) -> tuple[Stage, str]:
        facts = self._wait_for_camera()
        if not facts["verified"]:
            # What was shot before must not be taken for a part of the series.
            self._source.list_anew()
            facts = self._wait_for_camera()
        camera = facts["camera"]
        journal = Journal.read(self._path)
        if journal is None or not journal.goes_on_with(self.order, camera):
            restore = {} if journal is None or journal.camera != camera else journal.restore
            journal = Journal(self.order, camera, restore=restore)
        with self._lock:
            self._resumed_at = journal.taken
            self._journal = journal
            self._camera_name = facts["name"]
        self._source.exposing = True
        self._source.on_arrival = self._heed
        end: tuple[Stage, str] | None = None
        try:
            end = self._shoot_on(facts, journal)
            return end
        finally:
            self._source.exposing = False
            self._source.on_arrival = None
            self._restore(journal, done=end is not None and end[0] == "done")

    def _shoot_on(self, facts: dict[str, Any], journal: Journal) -> tuple[Stage, str]:
        """Shoot until the end, however often the camera goes away and comes back."""
        losses, taken = 0, journal.taken
        while True:
            try:
                if losses:
                    facts = self._take_stock(journal)
                self._prepare(facts, journal)
                return self._shoot(journal)
            except CameraError as error:
                if not error.gone:
                    raise
                losses, taken = (losses + 1 if journal.taken == taken else 1), journal.taken
                self._strays += 1
                self._warn(f"The camera went away in the middle: {error}.")
                if losses >= _FAILURES:
                    raise SeriesError(f"The camera goes away each time: {error}.") from error
            except _Stopped:
                return "stopped", "stopped"

    def _wait_for_camera(self) -> dict[str, Any]:
        """Return the facts of the camera, once it is ready: all that was on its card is then no part of the series."""
        until, waiting = time.monotonic() + _CAMERA_WITHIN_S, None
        wanted = self._camera or self.order.camera
        while True:
            if self._stopping.is_set():
                raise _Stopped
            cameras = self._source.cameras()
            ready = [camera for camera in cameras if wanted in (None, camera["camera"])]
            if len(ready) > 1:
                names = ", ".join(str(camera["camera"]) for camera in ready)
                raise SeriesError(f"There are several cameras; say which by --camera and its serial number: {names}.")
            if ready and ready[0]["condition"] == "ready":
                return ready[0]
            states = self._source.states()
            why = [state.detail for state in states if state.condition not in ("", "ready") and state.detail]
            words = "; ".join(dict.fromkeys(why))
            if cameras and not ready:
                words = f"{wanted} is not here, but {', '.join(str(camera['camera']) for camera in cameras)}"
            self._tell("waiting", f"waiting for the camera{': ' if words else ''}{words}")
            now_waiting = [(state.condition, state.waiting) for state in states if state.condition == "catching up"]
            if now_waiting and now_waiting != waiting:
                # It is there, and all that is on its card is being fetched.
                until, waiting = time.monotonic() + _CAMERA_WITHIN_S, now_waiting
            if time.monotonic() > until:
                who = "No camera has" if wanted is None else f"The camera {wanted} has not"
                raise SeriesError(f"{who} come within {_CAMERA_WITHIN_S:g} s: {words or 'none is seen'}.")
            self._stopping.wait(_NAG_S)

    def _take_stock(self, journal: Journal) -> dict[str, Any]:
        """Wait until the camera is back and its card is listed; count what was not heard of. Returns its facts."""
        self._tell("waiting", "waiting for the camera")
        self._source.exposing = False
        try:
            # So long it may be said to be there still.
            self._stopping.wait(_NAG_S)
            facts = self._wait_for_camera()
        finally:
            self._source.exposing = True
        if journal.bulb_open:
            # At another port nobody has done it yet.
            self._source.call("release", _ANSWER_S, self._camera)
            journal.bulb_open = False
            self._note(journal)
        # What was exposed meanwhile may have come to its end, and is a dark as good as the others; or it may not.
        while self._collect(0.0, journal):
            pass
        return facts

    # --- settings

    def _prepare(self, facts: Mapping[str, Any], journal: Journal) -> None:
        self._tell("preparing", "setting the camera")
        if not facts["can_trigger"] and not self.order.bulb:
            raise SeriesError(f"{facts['name']} cannot be released from here: shoot its darks by hand while tethered.")
        if self.order.bulb and self.order.exposure_s is None:
            raise SeriesError("How long the shutter is to be held open must be given: --exposure.")
        if facts["target"] == "ram":
            self._warn("The camera keeps shots in its memory only: one is lost if it is unplugged before it has come.")
        quality = str(facts.get("image_quality") or "")
        if re.search(_RENDERED, quality, re.IGNORECASE) and not re.search(_RAW, quality, re.IGNORECASE):
            self._warn(f"The camera is set to {quality}: these darks tell of rendered pictures, not of raw files.")
        known = self._read({*_NOISE_REDUCTION, *dict(_AUTOFOCUS), *_ISO, *_SHUTTER, _MODE} & set(facts["settings"]))
        self._set_off(known, journal)
        for name, choices in _AUTOFOCUS:
            if name in known:
                self._set(name, known[name], choices.__contains__, journal)
        if self.order.iso is not None:
            self._set_iso(known, journal)
        elif (iso := _first(_ISO, known)) is not None:
            with suppress(ValueError):
                self._iso = float(str(known[iso]["value"]))
        self._set_exposure(known, facts, journal)

    def _set_off(self, known: _Settings, journal: Journal) -> None:
        """Switch the noise reduction of long exposures off: it subtracts what is looked for, and doubles the time."""
        name = _first(_NOISE_REDUCTION, known)
        if name is None:
            if (self.order.exposure_s or 0.0) >= 1.0:
                self._warn(
                    "Whether the camera's long exposure noise reduction is off cannot be seen from here. It must be:"
                    " it hides hot pixels and doubles the time."
                )
            return
        why = self._set(name, known[name], lambda choice: choice.strip().lower() in _OFF, journal)
        if why is not None:
            self._refuse(
                f"The camera's long exposure noise reduction is on and cannot be switched off from here: the camera"
                f" {why}. It hides hot pixels and doubles the time. Switch it off in the camera's menu.",
                "noise reduction",
            )

    def _set_iso(self, known: _Settings, journal: Journal) -> None:
        name = _first(_ISO, known)
        if name is None:
            raise SeriesError(
                "The camera's ISO cannot be set from here. Set it on the camera, and give the order without --iso."
            )
        wanted, choices = str(self.order.iso), known[name]["choices"]
        if choices and wanted not in map(str.strip, choices):
            raise SeriesError(f"The camera has no ISO {wanted}. It has: {', '.join(choices)}.")
        why = self._set(name, known[name], lambda choice: choice.strip() == wanted, journal)
        if why is not None:
            self._refuse(f"The camera is not to be set to ISO {wanted}: it {why}. Set it on the camera.", "iso")

    def _set_exposure(self, known: _Settings, facts: Mapping[str, Any], journal: Journal) -> None:
        name = _first(_SHUTTER, known)
        wanted = self.order.exposure_s
        if wanted is None:
            now = None if name is None else seconds(str(known[name]["value"]))
            if now is None:
                raise SeriesError("The camera does not say its exposure time: give one with --exposure.")
            self._exposure_s = now
            return
        choices = [] if name is None else known[name]["choices"] or []
        offered = [choice for choice in choices if _is_near(seconds(choice), wanted)]
        if name is not None and offered and not self.order.bulb:
            why = self._set(name, known[name], lambda choice: choice in offered, journal)
            if why is not None:
                self._refuse(
                    f"The camera is not to be set to an exposure of {wanted:g} s: it {why}. Is its mode dial on M?",
                    "exposure",
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
        for changed in (name, _MODE):
            if changed is not None and changed in known:
                journal.restore.setdefault(changed, known[changed]["value"])
        self._note(journal)
        if name is not None and any("bulb" in choice.lower() for choice in choices):
            # Where that is refused, holding it open may do it all the same; the first file tells.
            self._set(name, known[name], lambda choice: "bulb" in choice.lower(), journal)

    def _read(self, names: Iterable[str]) -> _Settings:
        """Return settings as the camera has them; those that it does not tell are left out."""
        answer = self._source.call("get", _ANSWER_S, self._camera, names=sorted(names), busy_s=_BUSY_S)
        return {name: known for name, known in answer.items() if known is not None}

    def _set(self, name: str, known: Mapping[str, Any], fits: Callable[[str], bool], journal: Journal) -> str | None:
        """Set the first choice that fits; return None if the camera then says so itself, else what it does instead."""
        if fits(str(known["value"])):
            return None
        choice = next((choice for choice in known["choices"] or () if fits(choice)), None)
        if choice is None:
            return f"is at {known['value']}, and has no such choice"
        if known["readonly"]:
            return f"is at {known['value']}, which cannot be changed from here"
        journal.restore.setdefault(name, known["value"])
        self._note(journal)
        try:
            now = self._source.call("set", _ANSWER_S, self._camera, name=name, value=choice, busy_s=_BUSY_S)
        except CameraError as error:
            if error.gone or error.code == _BUSY:
                raise
            return f"refuses that ({error}), and stays at {known['value']}"
        value = str(now.get("value"))
        return None if fits(value) else f"takes {choice} without a word, and then is at {value}"

    @property
    def _camera(self) -> str | None:
        return None if self._journal is None else self._journal.camera

    def _restore(self, journal: Journal, *, done: bool) -> None:
        """Give the camera back as it was; what cannot be restored now is left for the next series."""
        try:
            known = self._read(journal.restore) if journal.restore else {}
            for name, value in list(journal.restore.items()):
                if name in known and str(known[name]["value"]) != str(value):
                    self._set_back(name, value)
                del journal.restore[name]
        except CameraError as error:
            names = ", ".join(journal.restore)
            self._warn(f"Settings of the camera could not be restored ({error}); the next series does it: {names}.")
        if done and not journal.restore:
            self._path.unlink(missing_ok=True)
            return
        with suppress(OSError):
            # What is finished begins anew when it is ordered again.
            (replace(journal, taken=0) if done else journal).write(self._path)

    def _set_back(self, name: str, value: Any) -> None:
        until = time.monotonic() + _SETTLES_S
        while True:
            try:
                now = self._source.call("set", _ANSWER_S, self._camera, name=name, value=value, busy_s=_BUSY_S)
                break
            except CameraError as error:
                if error.gone or error.code == _BUSY:
                    raise
                if error.code != _BAD_PARAMETERS or time.monotonic() > until:
                    self._warn(f"The camera's {name} could not be set back to {value}: {error}.")
                    return
            # That is also what it says while it deals with its last exposure.
            time.sleep(_NAG_S)
        if str(now.get("value")) != str(value):
            self._warn(f"The camera's {name} could not be set back to {value}: it stays at {now.get('value')}.")

    # --- shots

    def _shoot(self, journal: Journal) -> tuple[Stage, str]:
        failures = 0
        while journal.taken < self.order.frames:
            if self._stopping.is_set():
                return "stopped", "stopped"
            self._tell("shooting", f"dark {journal.taken + 1} of {self.order.frames}")
            with self._lock:
                self._shot_at = began = time.monotonic()
            came = self._one(journal)
            with self._lock:
                if came:
                    self._shot_s = time.monotonic() - began
                self._shot_at = None
            if not came and not self._stopping.is_set():
                # Perhaps only the word of it was lost.
                before = journal.taken
                self._source.list_anew()
                self._take_stock(journal)
                came = journal.taken > before
            failures = 0 if came else failures + 1
            if failures >= _FAILURES:
                raise SeriesError(
                    f"The shutter was released {failures} times, and no picture has come. Is the camera focusing"
                    " with its cap on, or its card locked?"
                )
            if self._is_stable():
                return "done", f"the map has not changed for {self._unchanged} darks"
            if came and journal.taken < self.order.frames:
                self._stopping.wait(self.order.cooldown_s)
        return "done", "all darks are taken"

    def _one(self, journal: Journal) -> bool:
        """Release the shutter once, and count what came; tell whether something did."""
        exposure_s = self._exposure_s or 1.0
        # Of an exposure that the link broke in, it may be at that still.
        busy_s = _BUSY_S + max(0.0, self._exposing_until - time.monotonic())
        self._exposing_until = time.monotonic() + 2.2 * exposure_s
        within_s = 2.2 * exposure_s + busy_s + _ANSWER_S
        if self._bulb:
            journal.bulb_open = True
            self._note(journal)
            self._holding = True
            try:
                held = self._source.call("bulb", within_s, self._camera, exposure_s=exposure_s, busy_s=busy_s)
            finally:
                self._holding = False
            journal.bulb_open = False
            self._note(journal)
            if held["held_s"] < exposure_s:
                # Before it is on the card, the camera takes no settings; it is none of the series.
                self._next_file(_SETTLES_S if held["held_s"] else 0.0)
                return False
        else:
            self._source.call("trigger", within_s, self._camera, exposure_s=exposure_s, busy_s=busy_s)
        # Told to stop, too: what the camera was at is a dark as good as the others.
        came = self._collect(2.2 * exposure_s + _LATE_S, journal)
        self._exposing_until = -math.inf
        return came

    def _collect(self, within_s: float, journal: Journal) -> bool:
        """Count the shot that comes next, and wait for all of its files; tell whether one came."""
        files = 0
        first: str | None = None
        while (came := self._next_file(within_s if first is None else _MATES_WITHIN_S)) is not None:
            if self._strays and came.shot not in self._counted | self._broken_off and self._amiss(came) is not None:
                log.info("darks: %r is of an exposure that was broken off", came.name)
                self._strays -= 1
                self._broken_off.add(came.shot)
            if came.shot in self._broken_off:
                continue
            self._check(came)
            if came.shot not in self._counted:
                self._count(came, journal)
                if first is not None:
                    log.warning("a picture came that the series has not ordered: %r", came.name)
                first = first or came.shot
            files += came.shot == first
            if first is not None and self._files_each is not None and files >= self._files_each:
                break
        if first is not None:
            self._files_each = self._most_files
        return first is not None

    def _count(self, came: _Came, journal: Journal) -> None:
        self._counted.add(came.shot)
        with self._lock:
            journal.taken += 1
        self._note(journal)
        self._wake()

    def _next_file(self, within_s: float) -> _Came | None:
        until = time.monotonic() + within_s
        while True:
            left = max(0.0, until - time.monotonic())
            with suppress(queue.Empty):
                return self._came.get(timeout=min(left, 0.2)) if left else self._came.get_nowait()
            if not left:
                return None
            if not any(camera["camera"] == self._camera for camera in self._source.cameras()):
                raise CameraError("the link to it broke while its picture was waited for", gone=True)

    def _heed(self, file: CameraFile, path: Path) -> ShotKind | None:
        """In the source's thread: a file has arrived. It is a dark, unless light is plain to see in it."""
        with path.open("rb") as content:
            about = metadata.from_file(content)
        with self._lock:
            self._ours.add(file.path)
        lit = not self.order.anyway and self._is_lit(path)
        came = _Came(self._shot_of(file), about.exposure_s, about.iso, about.sensor_temp_c, file.name, lit)
        self._came.put(came)
        if self.order.anyway:
            return ShotKind.DARK
        # Told by the file itself where it is not what was ordered.
        return self._source.settings.kind if lit or self._amiss(came) is not None else ShotKind.DARK

    def _is_lit(self, path: Path) -> bool:
        try:
            return self._decode(path, ShotKind.DARK).lit
        except DecodeError:
            # What is wrong with it is said when it is to be folded.
            return False

    def _shot_of(self, file: CameraFile) -> str:
        """Return what a file shares with those of the same shot. A name that comes again is another shot's."""
        shot, names = self._shots.get(file.stem, (file.stem, set()))
        if file.name in names:
            shot, names = f"{shot}+", set()
        names.add(file.name)
        self._shots[file.stem] = shot, names
        self._most_files = max(self._most_files, len(names))
        return shot

    def _check(self, came: _Came) -> None:
        """Compare how a dark was taken with what was ordered."""
        if came.temp_c is not None:
            with self._lock:
                self._temps.append(came.temp_c)
        if came.lit:
            raise SeriesError(
                f"Light reaches the sensor: {came.name} is not dark. Put the cap on, and cover the viewfinder."
            )
        amiss = self._amiss(came)
        if amiss is not None:
            self._refuse(f"{came.name} {amiss[0]}", amiss[1])

    def _amiss(self, came: _Came) -> tuple[str, str] | None:
        """Return how a dark was taken that was not ordered so, and what of it that concerns."""
        wanted, given = self._exposure_s, came.exposure_s
        near_s = 0.0 if wanted is None else _AS_ORDERED * wanted + _HELD_S * self._bulb
        if given is not None and wanted is not None and abs(given - wanted) > near_s:
            return (
                f"was exposed for {given:g} s, not for {wanted:g} s: the camera does not follow."
                " Is its mode dial on M?",
                "exposure",
            )
        if came.iso is not None and self._iso is not None and not math.isclose(came.iso, self._iso, rel_tol=0.05):
            return (
                f"was taken at ISO {came.iso:g}, not {self._iso:g}: the camera does not follow. Is automatic ISO on?",
                "iso",
            )
        return None

    def _is_stable(self) -> bool:
        wanted = self.order.until_stable
        return wanted is not None and self._unchanged >= wanted

    def _let_go(self) -> None:
        """In a thread of its own: have a shutter closed that is held open. It may be about to be opened."""
        while self._thread.is_alive():
            if self._holding:
                self._source.interrupt()
            time.sleep(_NAG_S)

    # --- what is told

    def _refuse(self, sentence: str, about: str) -> None:
        """End the series because the camera does not do as it was told; if it is to go on anyway, say it once."""
        if not self.order.anyway:
            raise SeriesError(sentence)
        if about not in self._gone_on:
            self._gone_on.add(about)
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

    def _note(self, journal: Journal) -> None:
        journal.at = time.time()
        journal.write(self._path)

    def _cannot_go_on(self, error: CameraError) -> str:
        """Say in a sentence what a camera that answers has refused."""
        if error.code in (-3, -115):
            return "The camera's card is full: make room on it, or put in another one."
        if error.code == _BUSY:
            return f"The camera has been busy for {_BUSY_S:g} s. Is it in a menu, or writing to its card?"
        if error.code == -6:
            return "The camera cannot be released from here: shoot its darks by hand while tethered."
        if self._bulb:
            return f"The camera's shutter cannot be held open from here: {error}. Is its mode dial on M or B?"
        return f"The camera does not release its shutter: {error}."


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


def _first(wanted: Iterable[str], known: _Settings) -> str | None:
    return next((name for name in wanted if name in known), None)


def _is_near(given: float | None, wanted: float) -> bool:
    return given is not None and abs(given - wanted) <= _NEAR * wanted
