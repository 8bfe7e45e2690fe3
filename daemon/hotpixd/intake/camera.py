"""Tethered cameras as a source of shots: every file on their cards, fetched once, whatever happens on the way.

    seen by USB ---> opening ---> catching up ---> ready
                        |  ^            |            |
                        v  |            v            v
                  claimed, absent <-- backing off <--+

Each camera has a worker process that alone touches libgphoto2 (`camera_worker`)
and does what it is told; here is decided what to fetch. The truth is a listing
by a worker that has just been started, made between two proofs that the camera
answers: what libgphoto2 remembers of a card may be wrong, and events get lost.
Each time a worker is started the card is listed, and after each burst of shots,
when the camera has been quiet for a while, a worker is started anew for that.

A shot's bytes are durable before anyone is told of it (`arrivals`); it is
offered to the service then, and forgotten when the service has it in the ledger
and it is saved where the user wants it. Files vanish from a camera by deletion,
by a change of cards and by a link that lies: nothing is ever concluded from that.
"""

from __future__ import annotations

import logging
import math
import os
import random
import re
import selectors
import signal
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from blake3 import blake3

from hotpixd.core.frame import ShotKind
from hotpixd.intake import usb
from hotpixd.intake.album import Album
from hotpixd.intake.arrivals import Arrivals, CameraFile, content_digest
from hotpixd.intake.doctor import Finding, classify, error_finding, usb_findings
from hotpixd.intake.files import PICTURES, FoundShot
from hotpixd.intake.link import Link
from hotpixd.intake.naming import on_one_line
from hotpixd.intake.source import HANGS_AFTER_S, Seen, SourceState, Status, Step

log = logging.getLogger("hotpixd")

SAVING = "save photos"
"""Prefix of the names of threads that write to the user's folder, which may hang."""

Condition = Literal["absent", "opening", "claimed", "catching up", "ready", "backing off"]

_STATUS: Mapping[Condition, Status] = {
    "absent": "away",
    "opening": "starting",
    "claimed": "trouble",
    "catching up": "watching",
    "ready": "watching",
    "backing off": "trouble",
}

_FIRST_RETRY_S, _LONGEST_RETRY_S = 0.05, 2.0
"""Pauses after a worker died, doubled each time until a listing succeeds."""

_CLAIMED_RETRY_S, _ABSENT_RETRY_S = 5.0, 2.0

_LOOK_FOR_CAMERAS_S = 10.0
"""Between two looks at what is on USB. The kernel's events make it sooner, where they can be had."""

_QUIET_S = 2.0
"""Least time without an event before a listing interrupts the camera."""

_MATE_WITHIN_S = 10.0
"""How long a JPEG waits for its raw file, where raw files are about: they come in either order."""

_MATE_AT_LAST_S = 120.0
"""The same while the card is not listed since: the event of the raw file may be lost."""

_LEFT_WAIT_S = 60.0
"""How long a JPEG that was left over by a crash waits for a listing that says whether it has a raw file."""

_MOST_ARRIVED = 32
"""Files that may wait for the service before no more are fetched that are safe on a card."""

_RAWS_REMEMBERED = 4096

_SAME_SHOT_S = 60.0
"""By how much the times of the files of one shot may differ: a long buffer is written file by file."""

_STOP_WITHIN_S = 20.0
"""How long the cameras have to be let go of. A file that is being fetched is fetched again."""

_LISTED_FILE_S = 0.02
"""How long a poor network takes for one file of a listing."""

_LONGEST_LISTING_S = 600.0

_TRIES_OF_A_WORKER = 20
"""How often one worker tries to open a camera."""

_REFUSALS = 3
"""How often a camera may refuse a file before it is left there."""

_AGAIN_S = 10.0
"""Until a file that could not be saved or fetched is tried again."""

_DESCRIBE_EVERY_S, _DESCRIBE_ANYWAY_S = 0.2, 30.0

_RAW_QUALITY = re.compile(r"raw|nef|dng|pef", re.IGNORECASE)
"""What the name of an image quality contains if a raw file is part of it."""

_VIRTUAL_PORT = "usb:001,001"
"""Where libgphoto2's virtual camera is; it is the only one then."""

_NUMBERED = re.compile(r"(.*?)(\d{4})\.")


@dataclass(frozen=True, slots=True)
class CameraSettings:
    """Cameras to tether."""

    port: str = "auto"
    """"auto": all on USB, as they come and go; else one port of libgphoto2: usb:001,005 or ptpip:192.168.1.1."""

    kind: ShotKind | None = None
    """What all of its shots are, if the user says so."""

    album: Album | None = None
    """Where photos are saved. None: nowhere but in the state's spool, as long as it needs them."""

    delete: bool = False
    """Whether files are deleted from the card once they are in the ledger, saved, and listed anew."""

    existing: Literal["fetch", "leave", "later"] = "fetch"
    """What is done with the files on the card when a camera is met for the first time. "leave": they are never fetched;
    "later": not as long as this source lives.
    """

    verify_after_s: float = 60.0
    """Quiet time after shots, until the card is listed anew for those whose events were lost."""

    resync_s: float = 1800.0
    """Longest time between two listings of a card in use."""

    hang_s: float = 30.0
    """A worker is ended when nothing has succeeded for so long."""


class CameraError(Exception):
    """The camera has not done what it was told. The message is a sentence.

    Parameters
    ----------
    gone : the link broke, so it may have done it all the same; it may be back soon
    """

    def __init__(self, message: str, *, code: int = 0, gone: bool = False) -> None:
        super().__init__(message)
        self.code = code
        self.gone = gone


@dataclass(slots=True, eq=False)
class _Arrived:
    """A file whose bytes are durable."""

    file: CameraFile
    path: Path
    key: str
    """BLAKE3 of its content, hex."""

    name: str
    """Of its camera, for people."""

    kind: ShotKind | None
    hold_until: float = 0.0
    again_at: float = 0.0
    """Not before that it is offered once more."""

    hold_at_most_until: float = 0.0
    """If it waits for its raw file longer than that, there is none."""

    offered: bool = False
    done: bool = False
    saved: bool = False
    save_at: float = 0.0
    saving: bool = False
    saving_since: float = 0.0
    body: _Body | None = None


@dataclass(slots=True, eq=False)
class _Body:
    """A camera, or a port at which there may be one."""

    port: str
    name: str
    condition: Condition = "opening"
    detail: str = "starting"
    since: float = field(default_factory=time.time)
    link: Link | None = None
    camera: str | None = None
    """Serial number, or what else tells it from others; None until it was opened."""

    facts: dict[str, Any] = field(default_factory=dict)
    retry_at: float = 0.0
    tries: int = 0
    """How often it could not be opened."""

    fetch_at: float = 0.0
    failures: int = 0
    gone: bool = False
    """Its port is no longer there."""

    opened: bool = False
    listing: bool = False
    slow_listings: int = 0
    """How often in a row it took too long to list its card."""

    listed: bool = False
    """Its card was listed since it was opened."""

    leaving: bool = False
    """Its worker was told to end, so that the next one lists the card."""

    release: bool = False
    """A shutter may be open that nobody holds any more."""

    pending: OrderedDict[bytes, CameraFile] = field(default_factory=OrderedDict)
    fetching: CameraFile | None = None
    doomed: deque[CameraFile] = field(default_factory=deque)
    calls: deque[tuple[str, dict[str, Any], Future[dict[str, Any]]]] = field(default_factory=deque)
    missing: dict[bytes, int] = field(default_factory=dict)
    refused: dict[bytes, int] = field(default_factory=dict)
    files: int = 0
    known_raws: dict[str, tuple[str, CameraFile]] = field(default_factory=dict)
    """Raw files on the card that are in the ledger with their keys, by stem."""

    lone: set[str] = field(default_factory=set)
    """Stems of pictures of the last listing that have no raw file beside them."""

    believed: set[bytes] | None = None
    """What is on the card as far as is known: the last listing, and what was announced since. None: not listed yet."""

    unverified: bool = False
    event_at: float = -math.inf
    listed_at: float = -math.inf
    hurry: bool = False
    """A gap in the numbers says that an event was lost."""

    last_number: tuple[str, int] | None = None

    def say(self, condition: Condition, detail: str) -> None:
        if _STATUS[condition] != _STATUS[self.condition]:
            self.since = time.time()
        self.condition, self.detail = condition, detail


class CameraSource:
    """All cameras of one setting, and their shots.

    The methods for the service are to be called from one thread; `call`, `cameras` and `held` from any.

    Parameters
    ----------
    folder : for what is needed while it runs; the state's own
    seen : files that need not be fetched, by digest, with their shots' keys. If what `done` and `notes` return is
        added to it, no file is fetched twice.
    wake : called from the source's thread when `take` has something or `states` has changed
    environ : of the process; VCAMERADIR in it stands for libgphoto2's virtual camera
    release : whether a shutter may be open that an earlier process held
    """

    def __init__(
        self,
        settings: CameraSettings,
        folder: Path,
        seen: Mapping[bytes, bytes | None],
        wake: Callable[[], None],
        environ: Mapping[str, str] = os.environ,
        *,
        release: bool = False,
    ) -> None:
        self.name = "cameras" if settings.port == "auto" else f"camera at {settings.port}"
        self.settings = settings
        self._seen = seen
        self._wake = wake
        self._arrivals = Arrivals(folder)
        self._given_environ = environ
        self._environ = worker_environ(environ, folder)
        self._virtual = "VCAMERADIR" in environ
        self._release = release
        self._thread = threading.Thread(target=self._run, name=f"tether {settings.port}", daemon=True)
        self._bell = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._stopping = False
        self._failure: BaseException | None = None

        # Shared with other threads.
        self._lock = threading.Lock()
        self._ready: deque[_Arrived] = deque()
        self._arrived: dict[Path, _Arrived] = {}
        self._notes: list[Seen] = []
        self._noted: set[bytes] = set()
        self._states: list[SourceState] = [SourceState(self.name, "starting", "not looked at yet", 0, 0, time.time())]
        self._calls: deque[tuple[str | None, str, dict[str, Any], Future[dict[str, Any]]]] = deque()
        self.on_arrival: Callable[[CameraFile, Path], ShotKind | None] | None = None
        """Called in the source's thread for each file that has arrived, before it is offered: says what it is."""
        self.exposing = False
        """Whether a series is being shot, which no listing must interrupt."""

        self._step = Step()
        self._interrupted = False
        self._relist: threading.Event | None = None
        self._changed = True

        # Of the source's thread alone.
        self._saver = ThreadPoolExecutor(1, SAVING)
        self._bodies: list[_Body] = []
        self._by_stem: dict[str, list[_Arrived]] = {}
        self._raws: OrderedDict[str, tuple[str, CameraFile]] = OrderedDict()
        self._raw_cameras: set[str] = set()
        self._plain_cameras: set[str] = set()
        self._met: set[str] = set()
        self._settled: set[str] = set()
        self._put_off: dict[str, set[bytes]] = {}
        self._selector = selectors.DefaultSelector()
        self._usb: usb.UsbEvents | None = None
        self._usb_at = 0.0
        self._described_at = -math.inf
        self._save_trouble: str | None = None
        self._saved_at = -math.inf
        self._fetch_trouble: str | None = None

    # --- for the service

    def start(self) -> None:
        """Begin to look for cameras."""
        self._thread.start()

    def stop(self) -> None:
        """Let go of the cameras; what was taken may still be reported as done."""
        if self._stopping:
            return
        self._stopping = True
        os.eventfd_write(self._bell, 1)
        self._thread.join(timeout=_STOP_WITHIN_S)
        if not self._thread.is_alive():
            os.close(self._bell)

    def take(self) -> FoundShot | None:
        """Return the next shot that has arrived, or None if there is none now.

        Raises
        ------
        BaseException
            What ended the source's thread.
        """
        if self._failure is not None:
            raise self._failure
        with self._lock:
            if not self._ready:
                return None
            arrived = self._ready.popleft()
        file = arrived.file
        key, raw = self._raw_of(file) or (None, None)
        return FoundShot(
            arrived.path,
            None if raw is None else Path(raw.name),
            arrived.kind,
            file.camera,
            arrived.name,
            f"{arrived.name}{file.path}",
            key,
        )

    def done(self, path: Path) -> Seen | None:
        """Note that the shot taken from `path` is in the ledger; return what to remember, if anything by now."""
        with self._lock:
            arrived = self._arrived.get(path)
            if arrived is None:
                return None
            arrived.done = True
            if self.settings.delete and arrived.body is not None:
                # A listing has to show it before it may be deleted.
                arrived.body.unverified = True
            if not arrived.saved:
                return None
            seen = self._finished(arrived)
        self._ring()
        return seen

    def retry(self, path: Path) -> None:
        """Note that the shot taken from `path` could not be read. It is offered again later."""
        with self._lock:
            arrived = self._arrived.get(path)
            if arrived is not None and not path.exists():
                # Whoever took it away: the card still has it, and a listing says so.
                self._drop(arrived)
                for body in self._bodies:
                    body.unverified = True
            elif arrived is not None:
                arrived.offered = False
                arrived.again_at = time.monotonic() + _AGAIN_S
        self._ring()

    def forget_taken(self) -> None:
        """Offer again all that was taken and is not done."""
        with self._lock:
            waiting = {arrived.path for arrived in self._ready}
            for arrived in self._arrived.values():
                if arrived.offered and not arrived.done and arrived.path not in waiting:
                    arrived.offered = False
        self._ring()

    def states(self) -> list[SourceState]:
        """Say how each camera is."""
        return [self._step.shown(state) for state in self._states]

    def concerns(self) -> list[SourceState]:
        """Return the states that alerts are about: each camera once it was met, and the source itself until then."""
        states = self.states()
        known = [state for state in states if state.name in self._met]
        if not known:
            worst = states[0] if states else None
            return [] if worst is None else [replace(worst, name=self.name)]
        return [*known, SourceState(self.name, "watching", "a camera is there", 0, 0, 0.0)]

    def notes(self) -> list[Seen]:
        """Return what is to be remembered besides what `done` returned."""
        with self._lock:
            # Those of the last call are in `seen` by now.
            notes, self._notes = self._notes, []
            self._noted = {seen.file for seen in notes if not seen.gone}
        return notes

    def cameras(self) -> list[dict[str, Any]]:
        """Return what is known of each camera that is open and listed.

        Beside its facts that is `name`, `camera` (its serial number), `condition`, and whether its card was listed
        after the last sign of a shot (`verified`).
        """
        return [
            {
                **body.facts,
                "name": body.name,
                "camera": body.camera,
                "condition": body.condition,
                "verified": not body.unverified,
            }
            for body in list(self._bodies)
            if body.listed and not body.leaving
        ]

    def held(self) -> dict[str, str]:
        """Return the cameras that are open here or about to be, though not listed perhaps: their names by port."""
        return {
            body.port: body.name for body in list(self._bodies) if _STATUS[body.condition] in ("starting", "watching")
        }

    def call(self, do: str, timeout_s: float, camera: str | None = None, **arguments: Any) -> dict[str, Any]:
        """Have a camera do something, and return what came of it; see `camera_worker`.

        Raises
        ------
        CameraError
            If it has not done it, or there is no such camera.
        """
        future: Future[dict[str, Any]] = Future()
        self._calls.append((camera, do, arguments, future))
        self._ring()
        try:
            return future.result(timeout_s)
        except TimeoutError:
            # What nobody waits for is not done any more.
            future.cancel()
            raise CameraError(f"the camera has not answered within {timeout_s:.0f} s", gone=True) from None

    def list_anew(self) -> None:
        """Have the cards listed anew, and wait until that is under way. Call from any other thread."""
        under_way = threading.Event()
        self._relist = under_way
        self._ring()
        under_way.wait(_LOOK_FOR_CAMERAS_S)

    def interrupt(self) -> None:
        """Have a shutter that is held open closed now. Call from any thread."""
        self._interrupted = True
        self._ring()

    # --- the thread

    def _ring(self) -> None:
        if not self._stopping:
            os.eventfd_write(self._bell, 1)

    def _run(self) -> None:
        try:
            self._tether()
        except BaseException as error:
            # Nobody looks at this thread: `take` raises it where somebody does.
            self._failure = error
        finally:
            links = [body.link for body in self._bodies if body.link is not None]
            for link in links:
                link.ask_to_leave()
            for link in links:
                link.close()
            self._saver.shutdown(wait=False, cancel_futures=True)
            self._selector.close()
            if self._usb is not None:
                self._usb.close()
            left = [call[-1] for call in self._calls]
            for future in [*left, *(call[-1] for body in self._bodies for call in body.calls)]:
                _refuse(future, "the daemon is being stopped")
            self._wake()

    def _tether(self) -> None:
        self._selector.register(self._bell, selectors.EVENT_READ, None)
        if not self._virtual and not self.settings.port.startswith("ptpip:"):
            with suppress(OSError):
                self._usb = usb.UsbEvents()
                self._selector.register(self._usb, selectors.EVENT_READ, None)
        self._take_up_what_is_left()
        while not self._stopping:
            for key, _ in self._selector.select(self._idle_s()):
                if isinstance(key.data, _Body):
                    self._read(key.data)
                elif key.fileobj == self._bell:
                    os.eventfd_read(self._bell)
                elif self._usb is not None and self._usb.drain():
                    self._usb_at = 0.0
            with self._step.of("the cameras being looked after"):
                self._round()

    def _idle_s(self) -> float:
        due = [self._usb_at, self._describe_due()]
        with self._lock:
            for arrived in self._arrived.values():
                if not arrived.offered:
                    due.append(max(arrived.hold_until, arrived.again_at))
                if not arrived.saved and not arrived.saving:
                    due.append(arrived.save_at)
        due += [self._due(body) for body in self._bodies]
        return max(0.0, min(due) - time.monotonic())

    def _due(self, body: _Body) -> float:
        """When something is to be done about a camera that does not say anything."""
        if body.link is None:
            return math.inf if body.gone else body.retry_at
        if not body.opened and not body.link.busy and not body.leaving:
            return body.retry_at
        due = body.link.hangs_at
        if body.opened and not body.link.busy and not body.leaving:
            if not body.pending:
                due = min(due, self._verify_due(body))
            elif self._has_room():
                due = min(due, body.fetch_at)
        return due

    def _describe_due(self) -> float:
        # Without a change as well: what hangs says nothing.
        return self._described_at + (_DESCRIBE_EVERY_S if self._changed else _DESCRIBE_ANYWAY_S)

    def _round(self) -> None:
        now = time.monotonic()
        if self._relist is not None:
            relist, self._relist = self._relist, None
            for body in self._bodies:
                if body.opened and not body.leaving:
                    self._start_anew(body)
            relist.set()
        if self._interrupted:
            self._interrupted = False
            for body in self._bodies:
                if body.opened and body.link is not None:
                    # Any further order ends it.
                    body.link.order("get", lambda _ok, _error: None, names=[])
        if now >= self._usb_at:
            self._look_for_cameras()
        for _ in range(len(self._calls)):
            self._pass_on(*self._calls.popleft())
        for body in list(self._bodies):
            self._tend(body)
        self._release_held()
        self._save_those_due()
        self._describe()

    # --- which cameras there are

    def _look_for_cameras(self) -> None:
        self._usb_at = time.monotonic() + _LOOK_FOR_CAMERAS_S
        if self._virtual or self.settings.port.startswith("ptpip:"):
            # Known once and for all.
            self._usb_at = math.inf
        ports = ports_at(self.settings.port, self._given_environ)
        known = {body.port: body for body in self._bodies if not body.gone}
        for port in known.keys() - ports:
            known[port].gone = True
            self._changed = True
        for port in sorted(ports - known.keys()):
            self._bodies.append(_Body(port, f"camera at {port}", release=self._release))
            self._changed = True

    def _tend(self, body: _Body) -> None:
        now = time.monotonic()
        if body.link is None:
            if body.gone:
                self._part_with(body)
            elif now >= body.retry_at:
                self._open(body)
        elif now >= body.link.hangs_at:
            log.warning("%s: the process that talks to it hangs; it is ended", body.name)
            body.link.kill()
        elif body.leaving:
            # It ends; what follows is seen when it has.
            return
        elif not body.opened:
            if not body.link.busy and body.gone:
                self._lose(body)
            elif not body.link.busy and now >= body.retry_at:
                self._order_open(body)
        elif not body.link.busy:
            self._next(body)

    def _part_with(self, body: _Body) -> None:
        if body.camera is None:
            self._bodies.remove(body)
            self._changed = True
        elif body.condition != "absent":
            self._say(body, "absent", "it is switched off or unplugged")
        for *_, future in body.calls:
            _refuse(future, f"{body.name} is not there")
        body.calls.clear()

    def _open(self, body: _Body) -> None:
        try:
            body.link = Link(self._environ, self.settings.hang_s, _QUIET_S)
        except OSError as error:
            # Out of processes, memory or descriptors: that passes.
            self._say(body, "backing off", f"no process can be started for it: {error.strerror}")
            body.retry_at = time.monotonic() + _AGAIN_S
            return
        self._selector.register(body.link, selectors.EVENT_READ, body)
        if body.condition != "ready":
            self._say(body, "opening", "asking it what it is")
        self._order_open(body)

    def _order_open(self, body: _Body) -> None:
        assert body.link is not None
        body.retry_at = math.inf
        body.link.order("open", lambda ok, error: self._opened(body, ok, error), port=body.port, release=body.release)

    def _opened(self, body: _Body, facts: dict[str, Any] | None, error: dict[str, Any] | None) -> None:
        if facts is None:
            if error is not None:
                self._not_opened(body, error)
            return
        body.release = False
        body.tries = 0
        body.opened = True
        body.facts = facts
        serial = facts["serial"] = on_one_line(facts["serial"])
        facts["model"] = on_one_line(facts["model"])
        # A port on USB is another one each time.
        nameless = facts["model"] if body.port.startswith("usb:") else f"{facts['model']} at {body.port}"
        body.camera = serial or nameless
        body.name = f"{facts['model']} {serial}".strip() or body.name
        self._met.add(body.name)
        for other in [b for b in self._bodies if b is not body and b.camera == body.camera and b.link is None]:
            # The same body, at the port where it was before it was unplugged.
            body.release = other.release
            self._bodies.remove(other)
        if body.condition != "ready":
            self._say(body, "catching up", "listing its card")
        if facts["target"] == "ram":
            log.warning(
                "%s keeps shots in its memory only: a shot is lost if it is unplugged before it has come", body.name
            )
        self._list(body)

    def _not_opened(self, body: _Body, error: dict[str, Any]) -> None:
        sort = classify(error["code"])
        by_network = body.port.startswith("ptpip:")
        found = self._finding(body, error["code"], error["text"], "open")
        words = found.text if found.cure is None else f"{found.text} Cure: {found.cure}"
        if sort == "claimed" or found.what in ("claimed", "permission"):
            condition: Condition = "claimed"
            pause_s = _CLAIMED_RETRY_S
        elif sort == "absent" or by_network:
            condition, pause_s = "absent", _ABSENT_RETRY_S
        else:
            condition, pause_s = "backing off", self._pause_s(body)
        if body.condition != condition:
            log.warning("%s: %s", body.name, words)
        self._say(body, condition, words)
        body.retry_at = time.monotonic() + pause_s
        body.tries += 1
        if condition == "backing off" or body.tries % _TRIES_OF_A_WORKER == 0:
            # Another may fare better. Where nobody is there, one is asked again and again, as starting it takes longer.
            assert body.link is not None
            body.leaving = True
            body.link.kill()

    def _finding(self, body: _Body, code: int, text: str, doing: str) -> Finding:
        if self._virtual:
            return error_finding(code, text, doing, "libgphoto2's virtual port", [])
        return error_finding(code, text, doing, body.port, usb.cameras() if body.port.startswith("usb:") else [])

    def _pause_s(self, body: _Body) -> float:
        body.failures += 1
        pause_s = min(_FIRST_RETRY_S * 2.0 ** min(body.failures, 16), _LONGEST_RETRY_S)
        return pause_s * random.uniform(0.5, 1.5)

    def _read(self, body: _Body) -> None:
        assert body.link is not None
        if not body.link.read(lambda message: self._heed(body, message)):
            self._lose(body)

    def _lose(self, body: _Body) -> None:
        """A worker has ended: because it was told to, because its link broke, or by a crash."""
        link, body.link = body.link, None
        assert link is not None
        self._selector.unregister(link)
        listing = body.listing
        code = link.lose(1.0)
        if listing and code == -signal.SIGALRM:
            # A card with very many files, perhaps.
            body.slow_listings += 1
        body.opened = body.listed = False
        if body.leaving:
            body.leaving = False
            return
        failure = link.failure
        if failure is not None and "trace" in failure:
            log.error("%s: a fault in hotpixd, please report it:\n%s", body.name, failure["trace"])
        if failure is not None:
            words = self._finding(body, failure["code"], failure["text"], failure["doing"]).text
        else:
            words = f"the process that talks to it was ended{f' (signal {-code})' if code < 0 else ''}"
        body.retry_at = time.monotonic() + self._pause_s(body)
        # Whatever was announced is found by the listing that follows.
        body.unverified = True
        log.info("%s: %s", body.name, words)
        if body.condition not in ("claimed", "absent"):
            self._say(body, "backing off", words)

    # --- listings

    def _list(self, body: _Body) -> None:
        assert body.link is not None
        asked_at = time.monotonic()
        body.listing = True
        patience_s = max(body.files * _LISTED_FILE_S, self.settings.hang_s * 2.0**body.slow_listings)
        body.link.order(
            "list",
            lambda ok, error: self._listed(body, asked_at, ok, error),
            endings=sorted(PICTURES),
            patience_s=min(patience_s, _LONGEST_LISTING_S),
        )

    def _listed(self, body: _Body, asked_at: float, ok: dict[str, Any] | None, error: dict[str, Any] | None) -> None:
        body.listing = False
        if ok is None:
            if error is not None:
                # It answers, but not this: a card is being changed, or it is busy.
                self._say(body, "backing off", f"its card cannot be listed: {error['text']}")
                self._start_anew(body)
                body.retry_at = time.monotonic() + self._pause_s(body)
            return
        camera = body.camera or ""
        files = sorted((CameraFile(camera, *entry) for entry in ok["files"]), key=lambda file: file.order)
        body.failures = body.slow_listings = 0
        body.files = len(files)
        body.listed = True
        body.listed_at = time.monotonic()
        self._put_off_what_was_there(body, files)
        self._reconcile(body, files)
        listed = {file.digest for file in files}
        # A camera that is busy leaves out files, or all of them, without a word: a listing is believed if it shows what
        # was known, or the same as the one before.
        if body.event_at < asked_at:
            body.unverified = listed != body.believed
        fewer = body.believed is not None and not listed >= body.believed
        # What is shot before the first listing is believed would be taken for what was there before.
        unsettled = self.settings.existing != "fetch" and camera not in self._settled
        body.hurry = body.unverified and (fewer or unsettled)
        body.believed = listed
        if not body.unverified:
            self._settled.add(camera)
            if not self._is_seen(_met(camera)):
                self._note(Seen(_met(camera)))
        with self._lock:
            for arrived in self._arrived.values():
                if arrived.file.camera == camera and arrived.body is not body:
                    # Left over by a crash: now it is known what lies beside it.
                    arrived.body = body
                    arrived.hold_until = min(arrived.hold_until, time.monotonic() + _QUIET_S)
                    arrived.hold_at_most_until = time.monotonic() + _MATE_AT_LAST_S
        if body.pending:
            self._say(body, "catching up", "")
        else:
            self._say(body, "ready", "")

    def _put_off_what_was_there(self, body: _Body, files: list[CameraFile]) -> None:
        """Leave alone what is on the card when a camera comes for the first time, if the user wants that.

        What was announced meanwhile was shot meanwhile. The first time lasts until a listing is believed.
        """
        if self.settings.existing == "fetch":
            return
        camera = body.camera or ""
        there = [file.digest for file in files if file.digest not in body.pending and not self._is_here(file.digest)]
        if self.settings.existing == "leave" and not self._is_seen(_met(camera)):
            self._note(*(Seen(digest) for digest in there if not self._is_seen(digest)))
        if self.settings.existing == "later" and camera not in self._settled:
            self._put_off.setdefault(camera, set()).update(there)

    def _reconcile(self, body: _Body, files: list[CameraFile]) -> None:
        """Have fetched what is on the card and nowhere else."""
        with self._lock:
            here = {arrived.file.digest for arrived in self._arrived.values() if not arrived.file.volatile}
        camera = body.camera or ""
        announced = body.pending
        body.pending = OrderedDict()
        body.known_raws = {}
        body.doomed.clear()
        with_raw = {file.stem for file in files if file.is_raw}
        # The raw file of the last one may be on its way.
        body.lone = {file.stem for file in files[:-1] if file.is_rendered} - with_raw
        if not with_raw and any(file.is_rendered for file in files):
            self._plain_cameras.add(camera)
        for file in files:
            digest = file.digest
            if file.is_raw:
                self._raw_cameras.add(file.camera)
                shot = self._seen.get(digest)
                if shot is not None:
                    body.known_raws[file.stem] = shot.hex(), file
            if digest in here or not file.size or digest in self._put_off.get(camera, ()):
                continue
            if not self._is_seen(digest) or self._is_to_be_saved(digest):
                body.pending[digest] = file
            elif self.settings.delete and self._is_seen(_saved(digest)):
                body.doomed.append(file)
        for digest, file in announced.items():
            if digest in body.pending or digest in here or self._is_seen(digest):
                continue
            # An event told of it. Once may be a listing made too early; then it has vanished.
            body.missing[digest] = body.missing.get(digest, 0) + 1
            if file.volatile or body.missing[digest] < 2:
                body.pending[digest] = file
            else:
                log.warning("%s: %r was announced, but is not on its card", body.name, file.path)
                del body.missing[digest]

    def _is_to_be_saved(self, digest: bytes) -> bool:
        """Tell whether a file was folded without being saved, in a run without a folder for photos."""
        return (
            self.settings.album is not None and self._seen.get(digest) is not None and not self._is_seen(_saved(digest))
        )

    def _verify_due(self, body: _Body) -> float:
        if self.exposing or body.facts.get("target") == "ram":
            # What a camera has in its memory is not listed, and may be gone when it is opened anew.
            return math.inf
        quiet_since = max(body.event_at, body.listed_at)
        if body.unverified:
            return quiet_since + (_QUIET_S if body.hurry else self.settings.verify_after_s)
        return max(body.event_at + _QUIET_S, body.listed_at + self.settings.resync_s)

    def _start_anew(self, body: _Body) -> None:
        """Have the worker let go of the camera; the next one lists the card as it is."""
        assert body.link is not None
        body.leaving = True
        body.retry_at = 0.0
        body.link.ask_to_leave()

    # --- events

    def _heed(self, body: _Body, message: Mapping[str, Any]) -> None:
        body.event_at = time.monotonic()
        body.unverified = True
        if message["event"] != "added":
            return
        file = CameraFile(body.camera or "", *message["file"])
        if not file.name.lower().endswith(tuple(PICTURES)):
            return
        self._look_for_gaps(body, file)
        digest = file.digest
        if body.believed is not None and not file.volatile:
            body.believed.add(digest)
        if not file.size and not file.volatile:
            # Still being written; only a new worker will see its size.
            body.hurry = True
        elif digest in body.pending or (body.fetching is not None and body.fetching.digest == digest):
            return
        elif file.volatile or not file.mtime:
            # One name and size for all shots: only the content tells them apart.
            body.pending[digest] = file
        elif not self._is_here(digest) and (not self._is_seen(digest) or self._is_to_be_saved(digest)):
            body.pending[digest] = file
        self._changed = True

    def _look_for_gaps(self, body: _Body, file: CameraFile) -> None:
        match = _NUMBERED.match(file.name)
        if match is None or file.volatile:
            return
        series, number = f"{file.folder}/{match[1]}", int(match[2])
        if body.last_number is not None and body.last_number[0] == series:
            body.hurry = body.hurry or number > body.last_number[1] + 1
        if body.last_number is None or body.last_number[0] != series or number > body.last_number[1]:
            body.last_number = series, number

    # --- what to do next

    def _next(self, body: _Body) -> None:
        """Give the worker the next order; it has none."""
        assert body.link is not None
        now = time.monotonic()
        volatile = next((file for file in body.pending.values() if file.volatile), None)
        if volatile is not None and now >= body.fetch_at:
            self._fetch(body, volatile)
        elif body.calls:
            do, arguments, future = body.calls.popleft()
            if not future.set_running_or_notify_cancel():
                return
            body.release = body.release or do == "bulb"
            body.link.order(do, lambda ok, error: _resolve(body, do, future, ok, error), **arguments)
        elif body.pending and now >= body.fetch_at and self._has_room():
            self._fetch(body, next(iter(body.pending.values())))
        elif body.doomed and not body.pending:
            self._delete(body, body.doomed.popleft())
        elif not body.pending and now >= self._verify_due(body):
            self._start_anew(body)
        elif not body.pending and body.condition == "catching up":
            self._say(body, "ready", "")

    def _has_room(self) -> bool:
        # Not those that wait for a raw file, which may be the next one to be fetched.
        with self._lock:
            return sum(arrived.offered for arrived in self._arrived.values()) < _MOST_ARRIVED

    def _fetch(self, body: _Body, file: CameraFile) -> None:
        assert body.link is not None
        part = self._arrivals.part()
        body.fetching = file
        body.link.order(
            "fetch",
            lambda ok, error: self._fetched(body, file, part, ok, error),
            folder=file.folder,
            name=file.name,
            size=file.size,
            part=str(part),
        )

    def _fetched(
        self, body: _Body, file: CameraFile, part: Path, ok: dict[str, Any] | None, error: dict[str, Any] | None
    ) -> None:
        body.fetching = None
        self._changed = True
        if ok is None:
            part.unlink(missing_ok=True)
            if error is not None:
                self._not_fetched(body, file, error)
            return
        try:
            path = self._arrivals.keep(part, file)
        except OSError as failure:
            part.unlink(missing_ok=True)
            self._not_fetched(body, file, {"code": 0, "errno": failure.errno, "text": failure.strerror or str(failure)})
            return
        self._fetch_trouble = None
        body.pending.pop(file.digest, None)
        body.missing.pop(file.digest, None)
        kind = self.settings.kind if self.on_arrival is None else self.on_arrival(file, path)
        self._arrive(_Arrived(file, path, ok["key"], body.name, kind, body=body))

    def _not_fetched(self, body: _Body, file: CameraFile, error: Mapping[str, Any]) -> None:
        """A file could not be fetched, though the camera answers."""
        if error.get("errno"):
            # Of our own disk. The file is safe where it is.
            self._fetch_trouble = f"photos cannot be fetched to {self._arrivals.folder}: {error['text']}"
            body.fetch_at = time.monotonic() + _AGAIN_S
            return
        sort = classify(error["code"])
        if sort == "unsupported":
            log.warning("%s: %r cannot be had: libgphoto2 does not fetch files of its kind", body.name, file.path)
            body.pending.pop(file.digest, None)
            self._note(Seen(file.digest))
            return
        if file.volatile and sort == "missing":
            # Announced twice, and fetched the first time.
            body.pending.pop(file.digest, None)
            return
        # Deleted, announced by mistake, or remembered wrongly: a listing says.
        log.info("%s: %r could not be fetched: %s", body.name, file.path, on_one_line(error["text"]))
        digest = file.digest
        body.refused[digest] = body.refused.get(digest, 0) + 1
        if body.refused[digest] >= _REFUSALS:
            log.warning("%s: %r is left on the card until the next start", body.name, file.path)
            self._put_off.setdefault(file.camera, set()).add(digest)
            body.pending.pop(digest, None)
        self._start_anew(body)
        body.retry_at = time.monotonic() + self._pause_s(body)

    def _delete(self, body: _Body, file: CameraFile) -> None:
        assert body.link is not None

        def deleted(ok: dict[str, Any] | None, error: dict[str, Any] | None) -> None:
            if ok is not None:
                if body.believed is not None:
                    body.believed.discard(file.digest)
                log.info("%s: deleted %r from its card; it is saved", body.name, file.path)
                body.files -= 1
                self._note(Seen(file.digest, gone=True), Seen(_saved(file.digest), gone=True))
            elif error is not None:
                log.warning("%s: %r could not be deleted: %s", body.name, file.path, on_one_line(error["text"]))

        body.link.order("delete", deleted, folder=file.folder, name=file.name, size=file.size)

    def _pass_on(self, camera: str | None, do: str, arguments: dict[str, Any], future: Future[dict[str, Any]]) -> None:
        meant = [body for body in self._bodies if body.camera is not None and camera in (None, body.camera)]
        wanted = [body for body in meant if body.listed and not body.leaving]
        if wanted:
            wanted[0].calls.append((do, arguments, future))
        elif any(body.condition in ("ready", "catching up") and not body.gone for body in meant):
            # Its worker is just being replaced by another one.
            self._calls.append((camera, do, arguments, future))
        else:
            _refuse(future, "no camera is ready")

    # --- what has arrived

    def _take_up_what_is_left(self) -> None:
        now = time.monotonic()
        for path, file in self._arrivals.left():
            try:
                key = content_digest(path)
            except OSError as error:
                log.error("%s cannot be read and is left there: %s", on_one_line(str(path)), error.strerror)
                continue
            arrived = _Arrived(file, path, key, file.camera, self.settings.kind)
            if file.is_rendered:
                arrived.hold_until = now + _LEFT_WAIT_S
            self._arrive(arrived)

    def _arrive(self, arrived: _Arrived) -> None:
        file = arrived.file
        arrived.saved = self.settings.album is None
        if file.is_raw:
            self._raw_cameras.add(file.camera)
            self._remember_raw(arrived.key, file)
        if file.is_rendered and not arrived.hold_until and self._expects_raws(arrived):
            arrived.hold_until = time.monotonic() + _MATE_WITHIN_S
            arrived.hold_at_most_until = time.monotonic() + _MATE_AT_LAST_S
        with self._lock:
            self._arrived[arrived.path] = arrived
            self._by_stem.setdefault(file.stem, []).append(arrived)
        self._changed = True

    def _expects_raws(self, arrived: _Arrived) -> bool:
        """Tell whether a picture may have a raw file beside it, by what was seen and by how the camera is set."""
        camera, body = arrived.file.camera, arrived.body
        if body is None or camera in self._raw_cameras:
            return body is None or body.unverified or arrived.file.stem not in body.lone
        if camera in self._plain_cameras:
            return False
        quality = body.facts.get("image_quality")
        if quality is not None:
            return _RAW_QUALITY.search(str(quality)) is not None
        return True

    def _raw_of(self, file: CameraFile) -> tuple[str, CameraFile] | None:
        """Return the raw file beside a picture, with its key; not one of that name that was shot long before."""
        known = self._raws.get(file.stem) if file.is_rendered else None
        if known is None or abs(known[1].mtime - file.mtime) > _SAME_SHOT_S:
            return None
        return known

    def _remember_raw(self, key: str, file: CameraFile) -> None:
        self._raws[file.stem] = key, file
        self._raws.move_to_end(file.stem)
        while len(self._raws) > _RAWS_REMEMBERED:
            self._raws.popitem(last=False)

    def _release_held(self) -> None:
        """Offer what has waited long enough, raw files before the pictures beside them."""
        now = time.monotonic()
        offered = False
        with self._lock:
            for arrived in list(self._arrived.values()):
                if arrived.offered or now < arrived.again_at:
                    continue
                if self._has_mate(arrived) or self._is_held_no_more(arrived, now):
                    arrived.offered = True
                    self._ready.append(arrived)
                    offered = True
        if offered:
            self._wake()

    def _is_held_no_more(self, arrived: _Arrived, now: float) -> bool:
        if now < arrived.hold_until:
            return False
        body = arrived.body
        if body is None or not body.unverified or now > arrived.hold_at_most_until:
            return True
        # The event of its raw file may be lost: a listing says, which is made as soon as the camera is quiet.
        body.hurry = True
        arrived.hold_until = now + _QUIET_S
        return False

    def _has_mate(self, arrived: _Arrived) -> bool:
        """Tell whether the raw file beside a picture is offered or in the ledger, so that the picture may follow."""
        file = arrived.file
        if not file.is_rendered:
            return False
        if self._raw_of(file) is not None:
            mates = [mate for mate in self._by_stem.get(file.stem, ()) if mate.file.is_raw]
            return all(mate.offered for mate in mates)
        for body in self._bodies:
            if body.camera == file.camera and file.stem in body.known_raws:
                self._remember_raw(*body.known_raws[file.stem])
                return True
        return False

    def _finished(self, arrived: _Arrived) -> Seen | None:
        """Let go of a file that is in the ledger and saved; call with the lock held."""
        file = arrived.file
        self._drop(arrived)
        arrived.path.unlink(missing_ok=True)
        self._changed = True
        if file.volatile:
            if arrived.body is not None:
                arrived.body.doomed.append(file)
            return None
        # Until the service has put it into `seen`, which it does before it asks for notes again.
        self._noted.add(file.digest)
        return Seen(file.digest, bytes.fromhex(arrived.key))

    def _drop(self, arrived: _Arrived) -> None:
        del self._arrived[arrived.path]
        beside = self._by_stem[arrived.file.stem]
        beside.remove(arrived)
        if not beside:
            del self._by_stem[arrived.file.stem]

    def _is_here(self, digest: bytes) -> bool:
        with self._lock:
            return any(arrived.file.digest == digest for arrived in self._arrived.values())

    def _is_seen(self, digest: bytes) -> bool:
        return digest in self._seen or digest in self._noted

    def _note(self, *seen: Seen) -> None:
        with self._lock:
            self._notes.extend(seen)
            self._noted.update(each.file for each in seen if not each.gone)
        self._wake()

    # --- the user's folder

    def _save_those_due(self) -> None:
        album, now = self.settings.album, time.monotonic()
        if album is None:
            return
        with self._lock:
            due = [a for a in self._arrived.values() if not a.saved and not a.saving and now >= a.save_at]
        for arrived in due:
            arrived.saving = True
            arrived.saving_since = now
            # Elsewhere: a network drive may hang.
            future = self._saver.submit(album.save, arrived.path, arrived.file)
            future.add_done_callback(partial(self._saved, arrived))

    def _saved(self, arrived: _Arrived, future: Future[Path]) -> None:
        if future.cancelled():
            return
        error = future.exception()
        with self._lock:
            arrived.saving = False
            self._saved_at = time.monotonic()
            if isinstance(error, OSError | ValueError):
                arrived.save_at = time.monotonic() + _AGAIN_S
                folder = "" if self.settings.album is None else self.settings.album.folder
                reason = getattr(error, "strerror", None) or error
                self._save_trouble = f"photos cannot be saved in {folder}: {reason}"
            elif error is not None:
                self._failure = error
            else:
                self._save_trouble = None
                arrived.saved = True
                if not arrived.file.volatile:
                    self._notes.append(Seen(_saved(arrived.file.digest)))
                    self._noted.add(_saved(arrived.file.digest))
                seen = self._finished(arrived) if arrived.done else None
                if seen is not None:
                    self._notes.append(seen)
                    self._noted.add(seen.file)
        self._changed = True
        self._ring()
        self._wake()

    # --- what is shown

    def _say(self, body: _Body, condition: Condition, detail: str) -> None:
        body.say(condition, detail)
        self._changed = True

    def _describe(self) -> None:
        now = time.monotonic()
        if now < self._describe_due():
            return
        self._changed = False
        self._described_at = now
        states = [self._describe_one(body) for body in self._bodies]
        if not states:
            words = "no camera is seen on USB"
            if not self._virtual and (devices := usb.cameras()):
                words = "; ".join(f.text for f in usb_findings(devices, seen=None))
            since = self._states[0].since if self._states and self._states[0].condition == "absent" else time.time()
            states = [SourceState(self.name, "away", words, 0, len(self._arrived), since, "absent")]
        if states != self._states:
            self._states = states
            self._wake()

    def _save_hangs(self) -> str | None:
        """Say that the user's folder does not answer; None if nothing has waited for long."""
        with self._lock:
            since = min((a.saving_since for a in self._arrived.values() if a.saving), default=math.inf)
        silent_s = time.monotonic() - max(since, self._saved_at)
        if self.settings.album is None or silent_s < HANGS_AFTER_S:
            return None
        return f"photos cannot be saved in {self.settings.album.folder}: it has not answered for {silent_s:.0f} s"

    def _describe_one(self, body: _Body) -> SourceState:
        with self._lock:
            arrived = sum(a.file.camera == body.camera for a in self._arrived.values())
        waiting = len(body.pending) + arrived
        said = [body.detail] if body.detail else []
        if body.condition == "catching up" and not said:
            said.append(f"{len(body.pending)} of {body.files} files to fetch")
        elif body.condition == "ready":
            said.append(f"{body.files} files on its card" if body.files != 1 else "1 file on its card")
            if body.unverified:
                said.append("to be looked through once more")
        if body.opened and body.facts.get("target") == "ram":
            said.append("shots are in its memory only until they have come")
        battery = body.facts.get("battery_percent")
        if body.opened and battery is not None and battery <= 20:
            said.append(f"battery {battery} %")
        trouble = self._fetch_trouble or self._save_trouble or self._save_hangs()
        status = _STATUS[body.condition]
        if trouble is not None:
            said.insert(0, trouble)
            status = "trouble"
        return SourceState(body.name, status, ", ".join(said), body.files, waiting, body.since, body.condition)


def _refuse(future: Future[dict[str, Any]], sentence: str) -> None:
    """Tell that there is no camera for a call; if nobody waits for it any more, nobody is told."""
    if future.set_running_or_notify_cancel():
        future.set_exception(CameraError(sentence, gone=True))


def _resolve(
    body: _Body,
    do: str,
    future: Future[dict[str, Any]],
    ok: dict[str, Any] | None,
    error: dict[str, Any] | None,
) -> None:
    if ok is not None:
        body.release = body.release and do != "bulb"
        future.set_result(ok)
    elif error is not None:
        future.set_exception(CameraError(error["text"], code=error["code"]))
    else:
        future.set_exception(CameraError(f"the link to {body.name} broke", gone=True))


def _saved(digest: bytes) -> bytes:
    """Return the mark by which it is remembered that a file was saved: it is in the ledger also if it was not."""
    return blake3(b"saved " + digest).digest(16)


def _met(camera: str) -> bytes:
    """Return the mark by which it is remembered that a camera was met."""
    return blake3(f"met {camera}".encode(errors="surrogatepass")).digest(16)


def ports_at(wanted: str, environ: Mapping[str, str]) -> set[str]:
    """Return the ports at which there are cameras, or may be, of those that a setting wants."""
    if wanted.startswith("ptpip:"):
        return {wanted}
    if "VCAMERADIR" in environ:
        return {_VIRTUAL_PORT} if wanted in ("auto", _VIRTUAL_PORT) else set()
    # A phone speaks PTP, too: whoever means it names its port.
    devices = [device for device in usb.cameras() if device.ptp or not device.storage]
    return {device.port for device in devices if (device.maker if wanted == "auto" else device.port == wanted)}


def worker_environ(environ: Mapping[str, str], folder: Path) -> dict[str, str]:
    """Return the environment of workers: settings of our own, times in UTC, names of choices in English."""
    config = folder / "config"
    settings = config / "gphoto" / "settings"
    settings.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    # libgphoto2 has shots kept in the camera's memory unless told otherwise before it opens it, and waits 20 s for
    # an answer. Other programs that use it must not change that under us.
    settings.write_text("ptp2=capturetarget=card\nptp2=normal_timeout=6000\nptp2=capture_timeout=30000\n")
    # UTF-8, or names that are not ASCII would all be question marks.
    ours = {"XDG_CONFIG_HOME": str(config), "TZ": "UTC", "LC_ALL": "C.UTF-8", "LANGUAGE": ""}
    return {**environ, **ours}
