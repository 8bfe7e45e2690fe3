"""Faults in the port layer of libgphoto2's virtual camera: what the drivers above see is what libusb would return.

The virtual port keeps its operations in a table of function pointers. Two
pointers lead from the Camera object to it; where they lie was found for
libgphoto2_port's ABI 12 on 64-bit Linux, and is checked before anything is
changed: each operation must lie in the port's own library.
"""

from __future__ import annotations

import ctypes
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_OPERATIONS = (
    "init", "exit", "open", "close", "read", "check_int", "write", "update", "get_pin", "set_pin", "send_break",
    "flush", "find_device", "find_device_by_class", "clear_halt", "msg_write", "msg_read", "msg_interface_write",
    "msg_interface_read", "msg_class_write", "msg_class_read", "seek", "send_scsi_cmd", "reset",
)  # fmt: skip
_POINTER = ctypes.c_void_p
_SIGNATURES = {
    "open": ctypes.CFUNCTYPE(ctypes.c_int, _POINTER),
    "read": ctypes.CFUNCTYPE(ctypes.c_int, _POINTER, _POINTER, ctypes.c_int),
    "write": ctypes.CFUNCTYPE(ctypes.c_int, _POINTER, _POINTER, ctypes.c_int),
    "check_int": ctypes.CFUNCTYPE(ctypes.c_int, _POINTER, _POINTER, ctypes.c_int, ctypes.c_int),
}
_PRIVATE_AT, _TABLE_AT = 304, 2080
"""Offsets, in bytes, of the port's private part, and therein of its table of operations."""

_TIMEOUT = -10


@dataclass(frozen=True)
class Faults:
    """What is to go wrong, in the first workers that use the mark."""

    code: int
    """What the operations return."""

    operations: tuple[str, ...] = ("read", "write", "check_int")

    after_calls: int = 0
    """How many calls of these succeed before."""

    times: int | None = None
    """How many calls fail. None: all from then on."""

    after_bytes: int | None = None
    """How many bytes are read before; counted instead of calls."""

    mark: str = ""
    """A file that is made when it has gone wrong; then nothing goes wrong any more. Empty: it goes wrong always."""

    hang: bool = False
    """Do not return at all."""

    lose_events: int = 0
    """So many calls of check_int find nothing, though there is something."""

    lies: bool = False
    """The first listing of a folder's folders is empty, without an error, as while a camera is busy."""

    memory_only: bool = False
    """Leave shots in the camera's memory, as with a body that knows nothing else."""

    counted: str = ""
    """A file that the number of calls is written to."""


def install(order: str) -> None:
    """Have every camera that this process opens fail as ordered."""
    faults = Faults(**json.loads(order))
    if faults.mark and Path(faults.mark).exists():
        return
    import gphoto2

    class FaultyCamera(gphoto2.Camera):
        def init(self, *arguments: Any) -> None:
            self._faults = _Table(self, faults)
            super().init(*arguments)

    class ForgetfulCamera(gphoto2.Camera):
        def init(self, *arguments: Any) -> None:
            super().init(*arguments)
            target = super().get_single_config("capturetarget")
            target.set_value("Internal RAM")
            super().set_single_config("capturetarget", target)

        def set_single_config(self, name: str, *arguments: Any) -> None:
            if name != "capturetarget":
                super().set_single_config(name, *arguments)

    class LyingCamera(gphoto2.Camera):
        def folder_list_folders(self, *arguments: Any) -> Any:
            if Path(faults.mark).exists():
                return super().folder_list_folders(*arguments)
            Path(faults.mark).touch()
            return gphoto2.CameraList()

    kind = ForgetfulCamera if faults.memory_only else LyingCamera if faults.lies else FaultyCamera
    gphoto2.Camera = kind


class _Failures:
    """Of this process: its cameras come and go."""

    count = 0


class _Table:
    def __init__(self, camera: Any, faults: Faults) -> None:
        self._faults = faults
        self._calls = self._bytes = self._lost = 0
        port = _at(int(camera.this))
        self._table = _at(_at(port + _PRIVATE_AT) + _TABLE_AT)
        library = _mapped("vusb")
        for index, name in enumerate(_OPERATIONS):
            where = _at(self._table + 8 * index)
            if where and not any(low <= where < high for low, high in library):
                raise RuntimeError(f"libgphoto2's port looks different from what this was made for, at {name}")
        # Kept: C calls them.
        self._hooks = [self._hook(name) for name in faults.operations]
        if faults.lose_events:
            self._hooks.append(self._hook("check_int"))

    def _hook(self, name: str) -> Any:
        slot = self._table + 8 * _OPERATIONS.index(name)
        original = _SIGNATURES[name](_at(slot))
        hook = _SIGNATURES[name](lambda *arguments: self._called(name, original, arguments))
        _POINTER.from_address(slot).value = ctypes.cast(hook, _POINTER).value
        return hook

    def _called(self, name: str, original: Callable[..., int], arguments: tuple[Any, ...]) -> int:
        faults = self._faults
        self._calls += 1
        if faults.counted:
            Path(faults.counted).write_text(str(self._calls))
        due = self._calls > faults.after_calls if faults.after_bytes is None else self._bytes >= faults.after_bytes
        over = faults.times is not None and _Failures.count >= faults.times
        if name in faults.operations and (_Failures.count or due) and not over:
            _Failures.count += 1
            if faults.mark:
                Path(faults.mark).touch()
            while faults.hang:
                os.sched_yield()
            return faults.code
        result = original(*arguments)
        if name == "read":
            self._bytes += max(result, 0)
        if name == "check_int" and result > 0 and self._lost < faults.lose_events:
            self._lost += 1
            return _TIMEOUT
        return result


def _at(address: int) -> int:
    return _POINTER.from_address(address).value or 0


def _mapped(library: str) -> list[tuple[int, int]]:
    found = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        fields = line.split()
        if len(fields) > 5 and library in fields[5]:
            low, _, high = fields[0].partition("-")
            found.append((int(low, 16), int(high, 16)))
    return found
