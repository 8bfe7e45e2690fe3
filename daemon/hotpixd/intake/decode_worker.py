"""A process that decodes what it is handed, in a jail: an open file in, samples and a description out.

It talks to `decoders` over one socket whose messages are JSON. A job brings the file's descriptor. Before samples are
written the worker says how large they are and gets shared memory for them; what it knows of the shot is the answer.
Nothing it says is believed there unless it makes sense.
"""

from __future__ import annotations

import array
import errno
import importlib
import json
import math
import mmap
import os
import socket
import sys
import traceback
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hotpixd.core.frame import Frame, ShotKind
from hotpixd.intake import dng, jail
from hotpixd.intake.decode import DecodeError, decode_file, keep_large_buffers

MESSAGE_BYTES = 1 << 16
"""Longest message in either direction."""

LONGEST_TEXT = 500
"""Characters of what a file says of its camera."""

_CPU_S = 300
"""Processor time per shot, for the case that nobody is there to end a job that takes too long."""

_NEEDED = ("simplejpeg", "rawpy", "tifffile", "PIL.PngImagePlugin", "PIL.TiffImagePlugin")
"""Imported before the first job comes. Others are rare: they are found when a file needs them."""


class _Worker:
    def __init__(self, talk: socket.socket) -> None:
        self._talk = talk
        self._memory: dict[int, mmap.mmap] = {}

    def run(self) -> None:
        """Do jobs until nobody asks any more."""
        while True:
            job, files = self._hear()
            if not job:
                return
            for slot in job["forget"]:
                self._memory.pop(slot, None)
            jail.allow_cpu(_CPU_S)
            with os.fdopen(files[0], "rb", buffering=0) as file:
                answer = self._done(file, None if job["kind"] is None else ShotKind(job["kind"]), luma=job["luma"])
            self._talk.send(json.dumps(answer).encode())

    def _done(self, file: Any, kind: ShotKind | None, *, luma: bool) -> dict[str, Any]:
        try:
            dng.loops.wanted = False
            frame = decode_file(file, kind, self._place, luma=luma)
            return {"frame": _described(frame), "wants_loops": dng.loops.wanted}
        except DecodeError as error:
            return {"refused": str(error)}
        except MemoryError:
            return {"no_memory": True}
        except Exception as error:
            if isinstance(error, OSError) and error.errno not in (errno.EACCES, errno.EPERM):
                # The disk. What the jail forbids is a fault like any other: the file is open already.
                return {"errno": error.errno, "strerror": error.strerror}
            # Of ours or of a library: it must cost this shot only, and be told.
            return {"fault": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()[-8000:]}

    def _place(self, shape: tuple[int, int], dtype: np.dtype[Any]) -> NDArray[Any]:
        """Return shared memory for samples."""
        self._talk.send(json.dumps({"place": list(shape), "dtype": dtype.name}).encode())
        given, files = self._hear()
        slot = int(given["slot"])
        if files:
            self._memory[slot] = mmap.mmap(files[0], 0)
            os.close(files[0])
        size = int(np.prod(shape))
        return self._array(slot).view(dtype)[:size].reshape(shape)

    def _array(self, slot: int) -> NDArray[np.uint8]:
        return np.frombuffer(self._memory[slot], np.uint8)

    def _hear(self) -> tuple[dict[str, Any], list[int]]:
        message, ancillary, _, _ = self._talk.recvmsg(MESSAGE_BYTES, socket.CMSG_LEN(4))
        files = array.array("i")
        for level, kind, data in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                files.frombytes(data)
        return (json.loads(message) if message else {}), list(files)


def _described(frame: Frame) -> dict[str, Any]:
    sensor, info = frame.sensor, frame.info
    about = {
        "make": sensor.make,
        "model": sensor.model,
        "serial": sensor.serial,
        "samples": str(sensor.samples),
        "width": sensor.layout.width,
        "height": sensor.layout.height,
        "colours": sensor.layout.colours,
        "channels": sensor.layout.channels,
        "kind": str(frame.kind),
        "exposure_s": info.exposure_s,
        "iso": info.iso,
        "sensor_temp_c": info.sensor_temp_c,
        "taken_at": None if info.taken_at is None else info.taken_at.isoformat(),
        "black_level_adu": frame.black_level_adu,
        "white_level_adu": frame.white_level_adu,
        "lit": frame.lit,
    }
    return {name: _sendable(value) for name, value in about.items()}


def _sendable(value: Any) -> Any:
    if isinstance(value, str):
        return value[:LONGEST_TEXT]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _load_loops() -> str | None:
    """Load the compiled loops; return what is wrong with them. Every file can be decoded without."""
    try:
        importlib.import_module("hotpixd.core.lossless").load()
    except Exception as error:
        return f"{type(error).__name__}: {error}"[:LONGEST_TEXT]
    return None


def main() -> None:
    """Run as ``python -m hotpixd.intake.decode_worker SOCKET PARENT MEMORY LOOPS``.

    LOOPS is 1 for a worker with the compiled loops: they cannot be loaded once it is in its jail.
    """
    number, parent, memory, with_loops = map(int, sys.argv[1:5])
    keep_large_buffers()
    for name in _NEEDED:
        importlib.import_module(name)
    fault = _load_loops() if with_loops else None
    dng.loops.allowed = bool(with_loops) and fault is None
    missing = jail.enter(memory, parent)
    with socket.socket(fileno=number) as talk:
        talk.send(json.dumps({"ready": missing, "no_loops": fault}).encode())
        _Worker(talk).run()


if __name__ == "__main__":
    main()
