"""The disposable process that alone touches libgphoto2: takes orders as lines of JSON, answers and reports likewise.

libgphoto2 may hang with the interpreter's lock held, crash, leak, and answer
from a cache that no longer is true. All that ends with the process, which is
started anew whenever there is doubt. It decides nothing: the supervisor
(`camera`) says what to fetch and where to.

An order is ``{"id":1,"do":"fetch",...}`` on standard input; its answer is
``{"id":1,"ok":{...}}`` or ``{"id":1,"error":{"code":-108,"text":...}}`` on the
descriptor that was standard output. In between come ``{"event":"added",...}``,
``{"event":"changed"}`` and ``{"event":"beat","patience_s":0}``. When the link is broken the
last line is ``{"failed":{"code":-52,...}}``. The end of standard input, or
SIGTERM, makes it close the shutter, let go of the camera and end.

A dead man's timer of the kernel ends the process when nothing has succeeded for
`hang_s`, whoever holds the lock and whether or not the supervisor still lives.
"""

from __future__ import annotations

import contextlib
import ctypes
import io
import json
import os
import select
import signal
import sys
import time
import traceback
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from blake3 import blake3

_Result = TypeVar("_Result")

FAILED = 70
"""Exit code after a failure that was reported."""

_BUSY, _BAD_PARAMETERS, _UNSPECIFIED, _FULL = -110, -2, -1, -115
_LINK_IS_BROKEN = frozenset((-7, -10, -34, -35, -52, -60, -53, -105, -5))
"""libgphoto2's results after which no call can be believed. Others may be meant, if the camera still answers."""

_SLICE_MS, _LIVELY_SLICE_MS = 500, 100
"""Longest time libgphoto2 waits for an event, which is also how long an order may have to wait; the second while the
camera is in use. Below 1000: the virtual camera makes up an event each second.
"""

_LIVELY_S = 30.0

_BUSY_S = 30.0
"""How long a busy camera is asked again."""

_SLOWEST_BYTES_PER_S = 300_000.0
"""Of a download that tells of no progress. One that has stopped is ended by libgphoto2 in seconds."""

_BLOCK = 1 << 20

_MEMORY = "/"
"""Where libgphoto2 shows what is in the camera's memory only. It does not know the size of it."""

_PR_SET_PDEATHSIG = 1
_EXPOSURE_MODE = ("expprogram", "autoexposuremode")
_NOISE_REDUCTION = ("longexpnr", "longexposurenr", "longexposurenoisereduction")


class _Broken(Exception):  # noqa: N818 - what happened, not a class of errors
    """The link to the camera is broken."""

    def __init__(self, code: int, text: str, doing: str) -> None:
        super().__init__(text)
        self.report = {"code": code, "text": text, "doing": doing}


class _Told(Exception):  # noqa: N818
    """Told to end."""


def main() -> None:
    """Serve orders until told to end."""
    spec = json.loads(sys.argv[1])
    out = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    # libgphoto2 and its drivers print on both.
    nowhere = os.open(os.devnull, os.O_RDWR)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    # Over a network, libgphoto2 closes descriptor 0 with each camera it lets go of.
    orders = os.dup(0)
    os.dup2(nowhere, 0)
    signal.signal(signal.SIGTERM, _tell)
    # Ctrl-C in the terminal is for the supervisor.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != spec["parent"]:
        return
    worker = _Worker(orders, out, float(spec["hang_s"]), float(spec["poll_s"]))
    try:
        worker.serve()
    except _Broken as broken:
        worker.say({"failed": broken.report})
        # Not exit() of the camera: on a broken link that may hang. The kernel lets go of the port.
        os._exit(FAILED)
    except (_Told, BrokenPipeError):
        worker.leave()
    except Exception as error:
        # A fault of ours: nobody reads the standard error of a worker.
        where = "".join(traceback.format_exception(error))
        worker.say({"failed": {"code": 0, "text": repr(error), "doing": "work", "trace": where}})
        os._exit(FAILED)
    os._exit(0)


class _Orders:
    """What signals have said. libgphoto2's callbacks swallow exceptions, so it is also looked at."""

    told = False


def _tell(_number: int, _frame: object) -> None:
    # Once: when the supervisor dies, the kernel says so for each of its threads, also while a shutter is being closed.
    if not _Orders.told:
        _Orders.told = True
        raise _Told


class _Worker:
    def __init__(self, orders: int, out: Any, hang_s: float, poll_s: float) -> None:
        # Within: it takes 50 ms, and looks at the environment.
        import gphoto2

        warnings.simplefilter("ignore", DeprecationWarning)
        self._gp = gphoto2
        self._in = orders
        self._out = out
        self._hang_s = hang_s
        self._poll_s = poll_s
        self._camera: Any = None
        self._context: Any = None
        self._ports: Any = None
        self._drivers: Any = None
        self._orders: deque[dict[str, Any]] = deque()
        self._partial = b""
        self._ended = False
        self._release: Callable[[], None] | None = None
        self._free_kb: int | None = None
        self._tells_no_progress = False
        self._list_patience_s = 0.0
        self._polled_at = self._beaten_at = self._used_at = 0.0

    def say(self, message: dict[str, Any]) -> None:
        self._out.write(json.dumps(message) + "\n")

    def serve(self) -> None:
        self._alive()
        while True:
            self._read_orders(0.0)
            if self._orders:
                self._obey(self._orders.popleft())
                self._used_at = time.monotonic()
            elif self._ended:
                raise _Told
            elif self._camera is None:
                self._read_orders(self._hang_s / 3)
                self._alive()
            else:
                lively = time.monotonic() - self._used_at < _LIVELY_S
                self._attend(_LIVELY_SLICE_MS if lively else _SLICE_MS)
                self._poll()

    def leave(self) -> None:
        """Close the shutter and let go of the camera, so that the body leaves its PC mode."""
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        _Orders.told = False
        # Whoever has listened may be gone.
        self._out = io.StringIO()
        with contextlib.suppress(self._gp.GPhoto2Error):
            self._close_shutter()
            if self._camera is not None:
                self._camera.exit()

    # --- orders

    def _read_orders(self, wait_s: float) -> None:
        """Take in the orders that are there; wait so long for one if there is none."""
        until = time.monotonic() + wait_s
        while not self._ended:
            left = 0.0 if self._orders else max(until - time.monotonic(), 0.0)
            if not select.select([self._in], [], [], left)[0]:
                return
            data = os.read(self._in, 1 << 16)
            self._ended = not data
            *lines, self._partial = (self._partial + data).split(b"\n")
            self._orders.extend(json.loads(line) for line in lines)

    def _obey(self, order: dict[str, Any]) -> None:
        name = order["do"]
        try:
            answer = getattr(self, f"do_{name}")(**{k: v for k, v in order.items() if k not in ("id", "do")})
        except self._gp.GPhoto2Error as error:
            self._judge(error, name)
            self.say({"id": order["id"], "error": {"code": error.code, "text": _words(error)}})
        except OSError as error:
            text = f"{error.strerror}: {error.filename or ''}".rstrip(": ")
            self.say({"id": order["id"], "error": {"code": 0, "errno": error.errno, "text": text}})
        except ValueError as error:
            self.say({"id": order["id"], "error": {"code": 0, "text": str(error)}})
        else:
            self.say({"id": order["id"], "ok": answer})

    def _judge(self, error: Any, doing: str) -> None:
        """Raise `_Broken` unless the camera itself has said what the error says."""
        if self._camera is None or doing == "open":
            # Nothing is open, so nothing is broken: the supervisor asks again when it likes.
            self._camera = None
            return
        if error.code in _LINK_IS_BROKEN:
            raise _Broken(error.code, _words(error), doing) from error
        if error.code == _BUSY:
            return
        try:
            # "Not found" and "bad parameters" are also what a dead link looks like. This never comes from a cache.
            self._camera.get_storageinfo()
        except self._gp.GPhoto2Error as dead:
            if dead.code != _BUSY:
                raise _Broken(dead.code, _words(dead), doing) from dead

    def do_open(self, port: str, release: bool = False) -> dict[str, Any]:
        """Open the camera at a port; say what it is and how it is set."""
        gp = self._gp
        self._camera = None
        with open(os.devnull) as nowhere:  # noqa: PTH123
            # It may have been closed with the camera before; the next socket must not get its number.
            os.dup2(nowhere.fileno(), 0)
        if self._ports is None:
            self._ports = gp.PortInfoList()
            self._ports.load()
            self._drivers = gp.CameraAbilitiesList()
            self._drivers.load()
            self._alive()
        # A new object each time: an old one's memory of the card may be wrong, and using it again can crash.
        camera = gp.Camera()
        camera.set_abilities(self._drivers[self._drivers.lookup_model(self._model_at(port))])
        camera.set_port_info(self._ports[self._ports.lookup_path(port)])
        self._context = gp.Context()
        # Kept, or they would be called after they are gone.
        self._progress = self._context.set_progress_funcs(self._started, self._advanced, self._stopped, None)
        camera.init(self._context)
        self._camera = camera
        self._alive()
        if release:
            self._release_whatever_is_open()
        facts = self._facts(port)
        self._tells_no_progress = port.startswith("ptpip:")
        self._polled_at = time.monotonic()
        self._free_kb = self._free()
        return facts

    def do_list(self, endings: list[str], patience_s: float) -> dict[str, Any]:
        """List the card's files with these endings; a folder may take so much longer than other things.

        It counts only if the camera answers before and after.
        """
        self._list_patience_s = patience_s
        free = self._free()
        files = list(self._walk("/", tuple(endings)))
        self._free_kb = self._free()
        return {"files": files, "free_kb": free}

    def do_fetch(self, folder: str, name: str, size: int, part: str) -> dict[str, Any]:
        """Write a file's bytes to `part`, durably; say their number and BLAKE3. A size of 0 is not known."""
        fd = os.open(part, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            # libgphoto2 writes into it, and closes what it is given. Nothing is held in memory, and nothing can be
            # used after it was freed.
            file = self._gp.CameraFile(os.dup(fd))
            patience_s = size / _SLOWEST_BYTES_PER_S if self._tells_no_progress else 0.0
            wanted = (folder, name, self._gp.GP_FILE_TYPE_NORMAL, file, self._context)
            try:
                self._patiently(self._camera.file_get, *wanted, patience_s=patience_s)
            except self._gp.GPhoto2Error as error:
                _raise_if_full(part, size)
                raise error
            finally:
                del file
            digest = blake3()
            at = 0
            while block := os.pread(fd, _BLOCK, at):
                digest.update(block)
                at += len(block)
            if at != size and (size or not at):
                raise ValueError(f"{at} bytes came of the {size} it is said to have")
            os.fsync(fd)
            return {"size": at, "key": digest.hexdigest()}
        except BaseException:
            Path(part).unlink(missing_ok=True)
            raise
        finally:
            os.close(fd)

    def do_delete(self, folder: str, name: str, size: int) -> dict[str, Any]:
        """Delete a file from the card or from the camera's memory, if it still has this size."""
        if folder != _MEMORY and (now := self._size_and_time(folder, name)[0]) != size:
            raise ValueError(f"it has {now} bytes now, not {size}")
        self._patiently(self._camera.file_delete, folder, name)
        return {}

    def do_get(self, names: list[str], busy_s: float = _BUSY_S) -> dict[str, Any]:
        """Read settings; those that the camera does not have are None. A busy one is asked again for so long."""
        return {name: self._setting(name, busy_s) for name in names}

    def do_set(self, name: str, value: Any, busy_s: float = _BUSY_S) -> dict[str, Any]:
        """Change a setting, and say what the camera then says it is: it may have taken nothing of it."""
        gp = self._gp
        widget = self._widget(name, busy_s)
        if widget.get_type() == gp.GP_WIDGET_RANGE:
            value = float(value)
        elif widget.get_type() in (gp.GP_WIDGET_TOGGLE, gp.GP_WIDGET_DATE):
            value = int(value)
        widget.set_value(value)
        self._insistently(self._camera.set_single_config, name, widget, busy_s=busy_s)
        return self._setting(name, busy_s) or {}

    def do_trigger(self, exposure_s: float, busy_s: float = _BUSY_S) -> dict[str, Any]:
        """Release the shutter, for a picture that is exposed for so long; a busy camera is asked again for so long."""
        # Some drivers throw away the events that wait when they are told to release.
        self._drain()
        # Nikon's returns when the picture is taken, and perhaps a second one to reduce its noise.
        patience_s = 2.0 * exposure_s + _BUSY_S
        with self._full_card_told():
            self._patiently(self._camera.trigger_capture, busy_s=busy_s, patience_s=patience_s)
        return {}

    def do_bulb(self, exposure_s: float, busy_s: float = _BUSY_S) -> dict[str, Any]:
        """Hold the shutter open for so long, or until there is another order."""
        self._drain()
        if self._orders:
            return {"held_s": 0.0}
        with self._full_card_told():
            self._open_shutter(busy_s)
        began = time.monotonic()
        try:
            while (left := began + exposure_s - time.monotonic()) > 0 and not (self._orders or self._ended):
                self._attend(max(1, min(_SLICE_MS, int(1000 * left))), min(left, _SLICE_MS / 1000))
                self._read_orders(0.0)
        finally:
            held_s = time.monotonic() - began
            self._close_shutter()
        return {"held_s": held_s}

    def do_release(self) -> dict[str, Any]:
        """Close a shutter that a worker before this one may have left open."""
        self._release_whatever_is_open()
        return {}

    def do_close(self) -> dict[str, Any]:
        """Let go of the camera and end."""
        raise _Told

    # --- what the camera is

    def _model_at(self, port: str) -> str:
        if port.startswith("ptpip:"):
            return "PTP/IP Camera"
        # Only here, once in a process: where there is no USB at all, it leaks.
        found = self._gp.Camera.autodetect()
        for index in range(found.count()):
            if found.get_value(index) == port:
                return str(found.get_name(index))
        raise self._gp.GPhoto2Error(-105)

    def _facts(self, port: str) -> dict[str, Any]:
        gp, camera = self._gp, self._camera
        names = self._names()
        target = self._choose_card(names)
        abilities = camera.get_abilities()
        battery = "".join(c for c in str(self._value("batterylevel") or "") if c.isdigit())
        quality = self._first(("imagequality", "imageformat"), names)
        maker, model = self._value("manufacturer"), self._value("cameramodel")
        return {
            "port": port,
            "model": " ".join(str(word) for word in (maker, model) if word) or abilities.model,
            "driver": abilities.model,
            "serial": str(self._value("serialnumber") or "").strip(),
            "target": target,
            "storages": self._storages(),
            "battery_percent": int(battery) if battery else None,
            "mode_dial": self._first(_EXPOSURE_MODE, names),
            "long_exposure_nr": _is_on(self._first(_NOISE_REDUCTION, names)),
            "image_quality": None if str(quality).startswith("Unknown value") else quality,
            # Of drivers for whole classes of cameras, PTP/IP among them, it lists the one and means both.
            "can_trigger": bool(
                abilities.operations & (gp.GP_OPERATION_TRIGGER_CAPTURE | gp.GP_OPERATION_CAPTURE_IMAGE)
            ),
            "can_bulb": self._bulb_by(names) is not None,
            "autopoweroff": self._first(("autopoweroff",), names),
            "settings": sorted(names),
        }

    def _choose_card(self, names: set[str]) -> str:
        """Have shots go to the card, where they survive; say where they go."""
        if "capturetarget" not in names:
            return "unknown"
        setting = self._setting("capturetarget")
        if setting is None:
            return "unknown"
        card = next((choice for choice in setting["choices"] or () if "card" in choice.lower()), None)
        if card is None:
            return "ram"
        if setting["value"] != card:
            with contextlib.suppress(self._gp.GPhoto2Error):
                setting = self.do_set("capturetarget", card)
        return "card" if setting and setting["value"] == card else "ram"

    def _names(self) -> set[str]:
        listed = self._patiently(self._camera.list_config)
        return {listed.get_name(index) for index in range(listed.count())}

    def _setting(self, name: str, busy_s: float = _BUSY_S) -> dict[str, Any] | None:
        gp = self._gp
        try:
            widget = self._widget(name, busy_s)
        except gp.GPhoto2Error as error:
            if error.code == _BUSY:
                raise
            self._judge(error, f"reading {name}")
            return None
        chosen = widget.get_type() in (gp.GP_WIDGET_RADIO, gp.GP_WIDGET_MENU)
        choices = [widget.get_choice(index) for index in range(widget.count_choices())] if chosen else None
        return {"value": widget.get_value(), "choices": choices, "readonly": bool(widget.get_readonly())}

    def _widget(self, name: str, busy_s: float = _BUSY_S) -> Any:
        """Return a setting; a busy camera is asked again."""
        return self._insistently(self._camera.get_single_config, name, busy_s=busy_s)

    def _value(self, name: str) -> Any:
        setting = self._setting(name)
        return None if setting is None else setting["value"]

    def _first(self, wanted: tuple[str, ...], names: set[str]) -> Any:
        return next((value for name in wanted if name in names and (value := self._value(name)) is not None), None)

    def _storages(self) -> list[dict[str, Any]]:
        gp = self._gp
        found = self._patiently(self._camera.get_storageinfo)
        return [
            {
                "name": storage.basedir,
                "capacity_kb": storage.capacitykbytes,
                "free_kb": storage.freekbytes,
                "read_only": bool(
                    storage.fields & gp.GP_STORAGEINFO_ACCESS and storage.access == gp.GP_STORAGEINFO_AC_READONLY
                ),
            }
            for storage in found
        ]

    def _free(self) -> int:
        return sum(storage["free_kb"] for storage in self._storages())

    def _walk(self, folder: str, endings: tuple[str, ...]) -> Iterator[tuple[str, str, int, int]]:
        # It asks the camera for each file of the folder, and tells of no progress.
        names = self._patiently(self._camera.folder_list_files, folder, patience_s=self._list_patience_s)
        for index in range(names.count()):
            name = names.get_name(index)
            if not name.startswith(".") and name.lower().endswith(endings):
                yield folder, name, *self._listed_size_and_time(folder, name)
        folders = self._patiently(self._camera.folder_list_folders, folder)
        for index in range(folders.count()):
            yield from self._walk(os.path.join(folder, folders.get_name(index)), endings)  # noqa: PTH118 - not ours

    def _listed_size_and_time(self, folder: str, name: str) -> tuple[int, int]:
        try:
            return self._size_and_time(folder, name)
        except self._gp.GPhoto2Error as error:
            self._judge(error, f"asking for {name}")
            # One file that cannot be described must not hide the others.
            return 0, 0

    def _size_and_time(self, folder: str, name: str) -> tuple[int, int]:
        info = self._patiently(self._camera.file_get_info, folder, name)
        # Of its own name: what it is part of must live as long.
        file = info.file
        return file.size, file.mtime

    # --- events

    def _attend(self, timeout_ms: int, at_least_s: float | None = None) -> int:
        """Wait for one event and report it; some drivers do not wait, so what is left is slept. Returns its kind."""
        gp = self._gp
        began = time.monotonic()
        try:
            kind, data = self._camera.wait_for_event(timeout_ms)
        except gp.GPhoto2Error as error:
            self._judge(error, "waiting for the camera")
            kind, data = gp.GP_EVENT_TIMEOUT, None
        self._alive()
        if kind == gp.GP_EVENT_FILE_ADDED:
            self._used_at = time.monotonic()
            self._report(data.folder, data.name)
        elif kind == gp.GP_EVENT_FOLDER_ADDED:
            self.say({"event": "changed"})
        else:
            # Other events may come without end: reading a property makes one.
            rest_s = timeout_ms / 1000 if kind == gp.GP_EVENT_TIMEOUT else 0.02
            left_s = began + (rest_s if at_least_s is None else min(rest_s, at_least_s)) - time.monotonic()
            if left_s > 0:
                self._read_orders(left_s)
        return int(kind)

    def _report(self, folder: str, name: str) -> None:
        gp = self._gp
        try:
            size, mtime = self._size_and_time(folder, name)
        except gp.GPhoto2Error as error:
            self._judge(error, f"asking for {name}")
            if folder != _MEMORY:
                self.say({"event": "changed"})
                return
            size, mtime = 0, 0
        self.say({"event": "added", "file": [folder, name, size, mtime]})
        # What is to be done with it comes in a moment.
        self._read_orders(0.05)

    def _drain(self) -> None:
        """Report the events that wait; not without end, as some cameras never have none."""
        until = time.monotonic() + 0.3
        while time.monotonic() < until and self._attend(20) != self._gp.GP_EVENT_TIMEOUT:
            pass

    def _poll(self) -> None:
        """Ask how much room the card has, now and then: proves that the camera is there, and tells of missed events."""
        now = time.monotonic()
        lively = now - self._used_at < _LIVELY_S
        if now - self._polled_at < (self._poll_s if lively else 10 * self._poll_s):
            return
        self._polled_at = now
        try:
            free_kb = sum(storage.freekbytes for storage in self._camera.get_storageinfo())
        except self._gp.GPhoto2Error as error:
            # Busy with a long exposure, so alive.
            self._judge(error, "asking for room on the card")
            return
        self._alive()
        if free_kb != self._free_kb:
            self._free_kb = free_kb
            self.say({"event": "changed"})

    # --- the shutter

    def _bulb_by(self, names: set[str]) -> str | None:
        return next((name for name in ("bulb", "eosremoterelease") if name in names), None)

    def _open_shutter(self, busy_s: float) -> None:
        names = self._names()
        by = self._bulb_by(names)
        if by is None:
            raise ValueError("this camera's shutter cannot be held open from here")
        if by == "bulb":
            self._release = lambda: self._set_blindly("bulb", 0)
            self._set_blindly("bulb", 1, busy_s)
            return
        choices = (self._setting(by) or {}).get("choices") or ()
        press = next(words for words in ("Press Full", "Immediate", "Press Full MF") if words in choices)
        self._release = lambda: self._set_blindly(by, "Release Full")
        self._set_blindly(by, press, busy_s)

    def _close_shutter(self) -> None:
        if self._release is not None:
            self._release()
            # Only now: if it was interrupted, it is done again.
            self._release = None

    def _release_whatever_is_open(self) -> None:
        """Close a shutter that a worker before this one may have left open."""
        by = self._bulb_by(self._names())
        if by is not None:
            with contextlib.suppress(self._gp.GPhoto2Error):
                self._set_blindly(by, 0 if by == "bulb" else "Release Full")

    def _set_blindly(self, name: str, value: Any, busy_s: float = _BUSY_S) -> None:
        widget = self._widget(name, busy_s)
        widget.set_value(value)
        self._insistently(self._camera.set_single_config, name, widget, busy_s=busy_s)

    @contextlib.contextmanager
    def _full_card_told(self) -> Iterator[None]:
        """Raise that the card is full where libgphoto2 says that something has failed."""
        try:
            yield
        except self._gp.GPhoto2Error as error:
            if error.code == _UNSPECIFIED and not self._free():
                raise self._gp.GPhoto2Error(_FULL) from error
            raise

    # --- staying alive

    def _patiently(
        self, function: Callable[..., _Result], *arguments: Any, busy_s: float = _BUSY_S, patience_s: float = 0.0
    ) -> _Result:
        """Call libgphoto2, which may take so much longer; a camera that is busy is asked again for so long."""
        pause_s, until = 0.1, time.monotonic() + busy_s
        while True:
            if patience_s:
                self._alive(patience_s)
            try:
                result = function(*arguments)
            except self._gp.GPhoto2Error as error:
                if error.code != _BUSY or time.monotonic() > until:
                    raise
            else:
                self._alive()
                return result
            self._alive()
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, 2.0)

    def _insistently(self, function: Callable[..., _Result], *arguments: Any, busy_s: float) -> _Result:
        """Do so with a setting, which a busy camera is said not to have or not to take."""

        def ask() -> _Result:
            try:
                return function(*arguments)
            except self._gp.GPhoto2Error as error:
                if error.code != _BAD_PARAMETERS:
                    raise
            # This says if it is busy. If it is not, it may have been until now.
            self._camera.get_storageinfo()
            return function(*arguments)

        return self._patiently(ask, busy_s=busy_s)

    def _alive(self, patience_s: float = 0.0) -> None:
        """Note that something has succeeded, and that the next thing may take so much longer."""
        if _Orders.told:
            raise _Told
        self._beat(patience_s)

    def _beat(self, patience_s: float = 0.0) -> None:
        signal.setitimer(signal.ITIMER_REAL, self._hang_s + patience_s)
        now = time.monotonic()
        if patience_s or now - self._beaten_at > self._hang_s / 4:
            self._beaten_at = now
            self.say({"event": "beat", "patience_s": patience_s})

    # Called by libgphoto2 amid a download. What they raise is lost; a signal's order is obeyed afterwards.

    def _started(self, *_: Any) -> int:
        self._beat()
        return 1

    def _advanced(self, *_: Any) -> None:
        self._beat()

    def _stopped(self, *_: Any) -> None:
        self._beat()


def _raise_if_full(part: str, size: int) -> None:
    """Raise what the disk said: libgphoto2 says it of the camera."""
    room = os.statvfs(Path(part).parent)
    if room.f_bavail * room.f_frsize < max(size, _BLOCK):
        import errno

        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), part)


def _is_on(value: Any) -> bool | None:
    return None if value is None else str(value).strip().lower() in ("on", "1", "yes", "auto", "true")


def _words(error: Any) -> str:
    text = getattr(error, "string", None) or str(error)
    return str(text).partition("] ")[2] or str(text)


if __name__ == "__main__":
    main()
