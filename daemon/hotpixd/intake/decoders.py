"""Decoding in processes of their own, in a jail: a file that crashes, hangs or fills a decoder costs one shot.

A job hands an open file to a worker (see `decode_worker`) and gets a `Frame` whose samples lie in memory that both
share: nothing of them is copied between the processes. A worker that dies, or does not answer in time, is replaced,
and the job is done once more by a new one; a file that ends two is refused, and the reason says how.

Workers start without the compiled loops, which few cameras' files need and which take a second and some memory to
load. When a file would have been read faster with them, workers that have them are started, and take over when they
are ready.

What a worker says is not trusted: a broken decoder may have been taken over by the file. It is only believed as far as
it describes samples that are really there.
"""

from __future__ import annotations

import array
import fcntl
import itertools
import json
import logging
import math
import mmap
import os
import re
import select
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hotpixd.core.frame import Frame, SampleKind, SensorIdentity, SensorLayout, ShotInfo, ShotKind
from hotpixd.intake.decode import MAX_PIXELS, DecodeError, require_sides
from hotpixd.intake.decode_worker import LONGEST_TEXT, MESSAGE_BYTES

log = logging.getLogger(__name__)

_START_WITHIN_S = 60.0
"""A worker imports its libraries in 0.3 s; from a slow card when everything starts at once, in many more."""

_PATIENCE_S, _PATIENCE_S_PER_MB = 30.0, 1.0
"""Time that a file may take. A raw file of 60 MB takes 1 s on a laptop and 15 s on a small computer."""

_NO_MEMORY = "it takes more memory than any camera's picture should"

_TRIES = 2
"""Workers that a file may cost before it is refused."""

_STARTS = 3
"""Workers that may fail to start before that is given up: then something is wrong here, and not with a file."""

_AFTER_KILLS_S = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
"""Waits after workers that were killed with SIGKILL, for which a file is not to blame at first: where memory runs out,
the kernel kills workers before anything else, whoever has filled it. What a file does by itself ends in other ways."""

_LEAST_MEMORY, _MOST_MEMORY = 1 << 30, 4 << 30
"""Address space that a worker may take, bytes: half of the machine's memory, within these."""


class DecodersFailedError(OSError):
    """No worker can be started: not a file is to blame, but this machine."""


class _Died(Exception):  # noqa: N818 - told on, never raised to a caller
    """A worker ended, or was ended, before it answered."""


class _Killed(_Died):
    """By SIGKILL, and not by us."""


class Decoders:
    """Workers that decode shots. May be used from several threads; each job has a worker of its own.

    Parameters
    ----------
    count : workers to start at once; more are started when they are needed
    patience_s, patience_s_per_mb : time that a file may take, and how much more for each MB of it
    memory : bytes that a worker may take for a file
    luma : see `decode.decode_file`
    """

    def __init__(
        self,
        count: int = 1,
        *,
        patience_s: float = _PATIENCE_S,
        patience_s_per_mb: float = _PATIENCE_S_PER_MB,
        memory: int | None = None,
        luma: bool = False,
    ) -> None:
        self._luma = luma
        self._patience = patience_s, patience_s_per_mb
        self._memory = memory or _memory_for_one()
        self._slots = _Slots()
        self._idle: list[_Worker] = []
        self._all: set[_Worker] = set()
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._with_loops: bool | None = None
        """Whether workers are started with the compiled loops; None: no file has asked for them yet."""
        self._told: set[str] = set()
        # A worker ends with the thread that started it: with this one, and not with one of our callers.
        self._starter = ThreadPoolExecutor(1, "decoders")
        for _ in range(count):
            self._starter.submit(self._start_early)

    def decode(
        self, path: Path, kind: ShotKind | None = None, *, luma: bool | None = None, name: str | None = None
    ) -> Frame:
        """Decode a file. Its samples are writable, and nobody changes them.

        Parameters
        ----------
        luma : if it is to be other than that of all files
        name : what people know it by, if that is not the file's name

        Raises
        ------
        DecodeError
            If it is no picture to learn about a sensor from, or ended two workers.
        DecodersFailedError
            If no worker can be started.
        OSError
            If the disk cannot be read.
        """
        # O_NONBLOCK: a FIFO must not stop us.
        file = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
        try:
            about = os.fstat(file)
            if not stat.S_ISREG(about.st_mode):
                raise DecodeError("this is not a regular file")
            base, per_mb = self._patience
            wanted = self._luma if luma is None else luma
            return self._decoded(file, name or path.name, kind, base + per_mb * about.st_size / 1e6, luma=wanted)
        finally:
            os.close(file)

    def close(self) -> None:
        """End all workers, whatever they do. Frames that were returned stay."""
        with self._lock:
            self._closed.set()
            for worker in self._all:
                worker.kill()
        self._starter.shutdown(cancel_futures=True)
        for worker in list(self._all):
            self._discard(worker)
        self._slots.close()

    def _decoded(self, file: int, name: str, kind: ShotKind | None, patience_s: float, *, luma: bool) -> Frame:
        deaths: list[str] = []
        waits = iter(_AFTER_KILLS_S)
        while len(deaths) < _TRIES:
            worker = self._take(waits)
            # The last one may have ended anywhere in it.
            os.lseek(file, 0, os.SEEK_SET)
            try:
                frame = worker.decode(file, kind, time.monotonic() + patience_s, luma=luma)
            except _Died as death:
                self._discard(worker)
                if self._closed.is_set():
                    raise DecodersFailedError("The decoders were closed.") from None
                log.warning("a decoder ended at %r: %s", name, death)
                if not self._was_by_others(death, waits):
                    deaths.append(str(death))
            except BaseException:
                self._give_back(worker)
                raise
            else:
                self._give_back(worker)
                if worker.wants_loops:
                    self._replace_all()
                return frame
        how = deaths[0] if len(set(deaths)) == 1 else " and ".join(deaths)
        raise DecodeError(f"it ended two decoders ({how}), so it is left alone; a good picture that does so is a fault")

    def _was_by_others(self, death: _Died, waits: Iterator[float]) -> bool:
        """Whether a worker was killed, most likely by something else than its file; waits until that may be over."""
        wait = next(waits, None) if isinstance(death, _Killed) else None
        if wait is None:
            return False
        self._closed.wait(wait)
        return True

    def _take(self, waits: Iterator[float]) -> _Worker:
        """Return a worker that waits for a job."""
        failures: list[str] = []
        while len(failures) < _STARTS and not self._closed.is_set():
            if failures:
                self._closed.wait(1.0)
            try:
                worker = self._idle_one() or self._starter.submit(self._start).result()
            except (OSError, RuntimeError) as error:
                failures.append(str(error))
                continue
            try:
                missing = worker.ready(time.monotonic() + _START_WITHIN_S)
            except _Died as death:
                self._discard(worker)
                if self._was_by_others(death, waits):
                    continue
                failures.append(str(death))
                if worker.with_loops:
                    self._give_up_loops(failures[-1])
                continue
            if worker.no_loops is not None:
                self._give_up_loops(worker.no_loops)
            for name in missing:
                self._say_once(f"this kernel has no {name}: decoders are less well locked in")
            return worker
        failure = "they were closed" if self._closed.is_set() else failures[-1]
        raise DecodersFailedError(f"The decoder processes do not start: {failure}.")

    def _idle_one(self) -> _Worker | None:
        with self._lock:
            if self._closed.is_set():
                return None
            for worker in [worker for worker in self._idle if worker.with_loops and worker.has_spoken()]:
                try:
                    worker.ready(time.monotonic() + 1.0)
                except _Died as death:
                    self._drop(worker)
                    self._give_up_loops(str(death))
            quick = [worker for worker in self._idle if worker.with_loops and worker.missing is not None]
            loading = [worker for worker in self._idle if worker.with_loops and worker.missing is None]
            plain = [worker for worker in self._idle if not worker.with_loops]
            for worker in plain[: len(quick)]:
                self._drop(worker)
            for worker in (*quick, *plain[len(quick) :], *loading):
                if worker.alive:
                    self._idle.remove(worker)
                    return worker
                # Not by a file: nobody is to blame.
                self._drop(worker)
        return None

    def _drop(self, worker: _Worker) -> None:
        self._idle.remove(worker)
        self._all.discard(worker)
        worker.close()

    def _replace_all(self) -> None:
        """Start as many workers with the compiled loops as there are without, once."""
        with self._lock:
            if self._with_loops is not None or self._closed.is_set():
                return
            self._with_loops = True
            for worker in self._all:
                if not worker.with_loops:
                    self._starter.submit(self._start_early)

    def _give_up_loops(self, reason: str) -> None:
        """Start workers without from now on: files can be decoded without."""
        self._with_loops = False
        self._say_once(f"the loops for lossless JPEG cannot be loaded, so LibRaw decodes it, slowly: {reason}")

    def _give_back(self, worker: _Worker) -> None:
        if worker.amid_a_job:
            # What went wrong went wrong here: it waits for something that will not come.
            self._discard(worker)
            return
        with self._lock:
            self._idle.append(worker)

    def _start_early(self) -> None:
        # What is wrong is said when a shot needs it.
        with suppress(OSError):
            self._give_back(self._start())

    def _start(self) -> _Worker:
        with self._lock:
            if self._closed.is_set():
                raise DecodersFailedError("they were closed")
            worker = _Worker(self._memory, self._slots, self._with_loops is True)
            self._all.add(worker)
            return worker

    def _discard(self, worker: _Worker) -> None:
        worker.close()
        with self._lock:
            self._all.discard(worker)

    def _say_once(self, sentence: str) -> None:
        if sentence not in self._told:
            self._told.add(sentence)
            log.warning("%s", sentence)


@dataclass(eq=False)
class _Slot:
    """Memory for the samples of one frame, shared with the workers that were told of it."""

    number: int
    file: int
    memory: mmap.mmap

    def close(self) -> None:
        os.close(self.file)
        # A frame may still be looked at; it goes with the last look.
        with suppress(BufferError):
            self.memory.close()


class _Slots:
    """Memory for frames, used again: pages that are new cost more than what is written into them."""

    def __init__(self) -> None:
        self._numbers = itertools.count(1)
        self._free: list[_Slot] = []
        self._lock = threading.Lock()
        self._returned: deque[_Slot] = deque()
        """Free again, and not among `_free` yet."""
        self._closed = False
        self.gone: set[int] = set()
        """Numbers of those closed."""

    def take(self, size: int) -> _Slot:
        """Return a slot of at least that size that nobody uses."""
        with self._lock:
            self._take_back()
            for slot in self._free:
                if len(slot.memory) >= size:
                    self._free.remove(slot)
                    return slot
            # Those too small would never go.
            for slot in self._free:
                self._forget(slot)
            self._free.clear()
            number = next(self._numbers)
        file = os.memfd_create("hotpixd-frame", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(file, size)
            # Or a worker might cut it short while we read, which kills with SIGBUS.
            fcntl.fcntl(file, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
            return _Slot(number, file, mmap.mmap(file, size))
        except BaseException:
            os.close(file)
            raise

    def give_back(self, slot: _Slot) -> None:
        """Let others use a slot. Called when a frame is collected: at any moment, in any thread, so without a lock."""
        if self._closed:
            self._forget(slot)
        else:
            self._returned.append(slot)

    def lease(self, slot: _Slot, shape: tuple[int, int], dtype: np.dtype[Any]) -> NDArray[Any]:
        """Return samples in a slot, which is free again when nobody has them, nor a view of them, any more."""
        whole = np.frombuffer(slot.memory, dtype, count=shape[0] * shape[1])
        weakref.finalize(whole, self.give_back, slot).atexit = False
        return whole.reshape(shape)

    def close(self) -> None:
        with self._lock:
            self._closed = True
            self._take_back()
            for slot in self._free:
                self._forget(slot)
            self._free.clear()

    def _take_back(self) -> None:
        while self._returned:
            self._free.append(self._returned.popleft())

    def _forget(self, slot: _Slot) -> None:
        self.gone.add(slot.number)
        slot.close()


@dataclass(eq=False)
class _Worker:
    """One worker process. Its jobs are done one after the other."""

    memory: int
    slots: _Slots
    with_loops: bool
    wants_loops: bool = False
    """Whether it would have been faster with the compiled loops."""
    missing: list[str] | None = None
    """Which walls its jail lacks, in words; None until it is ready."""
    no_loops: str | None = None
    """Why it has no compiled loops, if it was to have them."""
    known: set[int] = field(default_factory=set)
    """Numbers of the slots that it was told of."""
    amid_a_job: bool = False

    def __post_init__(self) -> None:
        self._talk, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            with theirs:
                orders = map(str, (theirs.fileno(), os.getpid(), self.memory, int(self.with_loops)))
                self._process = subprocess.Popen(
                    [sys.executable, "-P", "-m", "hotpixd.intake.decode_worker", *orders],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    pass_fds=[theirs.fileno()],
                    env=_environment(),
                    # Signals of the terminal are for us.
                    start_new_session=True,
                )
        except BaseException:
            self._talk.close()
            raise

    def ready(self, until: float) -> list[str]:
        """Wait until it takes jobs; return which walls its jail lacks.

        Raises
        ------
        _Died
            If it does not start.
        """
        if self.missing is None:
            answer = self._hear(until, "it did not start in time")
            missing, fault = answer.get("ready"), answer.get("no_loops")
            if not isinstance(missing, list):
                raise _Died("it did not start as it should")
            self.missing = [str(name) for name in missing]
            self.no_loops = None if fault is None else str(fault)
        return self.missing

    def has_spoken(self) -> bool:
        """Whether it has said that it is ready, or has ended, and nobody has heard it yet."""
        if self.missing is not None:
            return False
        said = select.poll()
        said.register(self._talk, select.POLLIN)
        return bool(said.poll(0))

    @property
    def alive(self) -> bool:
        """Whether it has not ended yet."""
        return self._process.poll() is None

    def decode(self, file: int, kind: ShotKind | None, until: float, *, luma: bool) -> Frame:
        """Have it decode an open file.

        Raises
        ------
        DecodeError, OSError
            As it says.
        _Died
            If it ended, made no sense or did not answer in time. It is of no more use then.
        """
        forget = sorted(self.known & self.slots.gone)
        self.known -= self.slots.gone
        self.amid_a_job = True
        self._say({"kind": None if kind is None else str(kind), "luma": luma, "forget": forget}, file)
        slot: _Slot | None = None
        try:
            while True:
                answer = self._hear(until, "it took too long")
                self.amid_a_job = "place" in answer
                if "place" in answer and slot is None:
                    shape, dtype = _wanted(answer)
                    slot = self.slots.take(shape[0] * shape[1] * dtype.itemsize)
                    self._say({"slot": slot.number}, None if slot.number in self.known else slot.file)
                    self.known.add(slot.number)
                elif "frame" in answer and slot is not None:
                    self.wants_loops = answer.get("wants_loops") is True
                    about = _frame(answer["frame"], shape, dtype)
                    samples, slot = self.slots.lease(slot, shape, dtype), None
                    return about(samples)
                else:
                    raise _failure(answer)
        finally:
            if slot is not None:
                self.slots.give_back(slot)

    def kill(self) -> None:
        """End it at once."""
        self._process.kill()

    def close(self) -> None:
        """End it, and wait until it is gone."""
        self._process.kill()
        self._talk.close()
        self._process.wait()

    def _say(self, message: dict[str, Any], file: int | None) -> None:
        with_file = [] if file is None else [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [file]))]
        try:
            self._talk.sendmsg([json.dumps(message).encode()], with_file)
        except OSError as error:
            raise self._death() from error

    def _hear(self, until: float, late: str) -> dict[str, Any]:
        self._talk.settimeout(max(until - time.monotonic(), 0.001))
        try:
            said = self._talk.recv(MESSAGE_BYTES)
            answer = json.loads(said) if said else None
        except TimeoutError:
            raise _Died(late) from None
        except (OSError, ValueError):
            answer = None
        if not isinstance(answer, dict):
            raise self._death()
        return answer

    def _death(self) -> _Died:
        """Return how it ended, or that it has not."""
        try:
            code = self._process.wait(1.0)
        except subprocess.TimeoutExpired:
            return _Died("it made no sense")
        if -code == signal.SIGKILL:
            return _Killed("it was killed by SIGKILL, as where memory runs out")
        with suppress(ValueError):
            return _Died(f"it was killed by {signal.Signals(-code).name}")
        return _Died(f"it ended with code {code}")


def _environment() -> dict[str, str]:
    """Return what a worker gets to know: where modules and compiled loops are, and nothing that may be secret."""
    names = ("PATH", "PYTHONPATH", "LD_LIBRARY_PATH", "NUMBA_CACHE_DIR")
    kept = {name: os.environ[name] for name in names if name in os.environ}
    # One thread per worker: there are as many workers as cores for them.
    return {**kept, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "HOME": "/nonexistent"}


def memory_bytes() -> int:
    """Return how much memory this process may take: the machine's, or what its service is allowed."""
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    groups = ""
    with suppress(OSError):
        groups = Path("/proc/self/cgroup").read_text()
    # Of both versions of cgroups; a group without a limit says "max", or a number beyond all machines.
    for line, limit in ((r"^0::(/.*)$", "{}/memory.max"), (r"^\d+:memory:(/.*)$", "/memory{}/memory.limit_in_bytes")):
        for group in re.findall(line, groups, re.MULTILINE):
            with suppress(OSError, ValueError):
                machine = min(machine, int(Path("/sys/fs/cgroup" + limit.format(group)).read_text()))
    return machine


def _memory_for_one() -> int:
    return min(max(memory_bytes() // 2, _LEAST_MEMORY), _MOST_MEMORY)


def _failure(answer: dict[str, Any]) -> Exception:
    """Return what an answer that is no frame stands for."""
    match answer:
        case {"refused": str(reason)}:
            return DecodeError(reason[: 4 * LONGEST_TEXT])
        case {"no_memory": True}:
            # Perhaps of what it did before, or of the machine just now: a new one is given the file as well.
            return _Died(_NO_MEMORY)
        case {"errno": int(code), "strerror": str(words)}:
            return OSError(code, words[:LONGEST_TEXT])
        case {"fault": str(fault), "traceback": str(trace)}:
            log.error("a fault in a decoder, please report it:\n%s", trace[:8000])
            return DecodeError(f"hotpixd failed to decode it ({fault[:LONGEST_TEXT]}); please report this")
    return _Died("it made no sense")


def _wanted(answer: dict[str, Any]) -> tuple[tuple[int, int], np.dtype[Any]]:
    """Return the shape and type of the samples for which a worker wants memory."""
    match answer:
        case {"place": [int(rows), int(columns)], "dtype": "uint8" | "uint16" as dtype}:
            if rows > 0 and columns > 0 and rows * columns <= 3 * MAX_PIXELS:
                return (rows, columns), np.dtype(str(dtype))
    raise _Died("it made no sense")


@dataclass(frozen=True, slots=True)
class _Described:
    """A frame without its samples."""

    sensor: SensorIdentity
    kind: ShotKind
    info: ShotInfo
    black_level_adu: float | None
    white_level_adu: float | None
    lit: bool

    def __call__(self, samples: NDArray[Any]) -> Frame:
        levels = self.black_level_adu, self.white_level_adu
        return Frame(self.sensor, samples, self.kind, self.info, *levels, self.lit)


def _frame(said: Any, shape: tuple[int, int], dtype: np.dtype[Any]) -> _Described:
    """Return what a worker says of the samples of this shape, if that can be."""
    try:
        layout = SensorLayout(_whole(said["width"]), _whole(said["height"]), said["colours"], _whole(said["channels"]))
        if layout.shape != shape or layout.channels not in (1, 3) or layout.period not in (1, 2, 6):
            raise ValueError("samples of another shape")
        require_sides(layout)
        taken_at = _text(said["taken_at"])
        return _Described(
            SensorIdentity(
                make=_text(said["make"]),
                model=_text(said["model"]),
                serial=_text(said["serial"]),
                samples=SampleKind(said["samples"]),
                layout=layout,
                dtype=dtype.name,
            ),
            ShotKind(said["kind"]),
            ShotInfo(
                _number(said["exposure_s"]),
                _number(said["iso"]),
                _number(said["sensor_temp_c"]),
                None if taken_at is None else datetime.fromisoformat(taken_at),
            ),
            _number(said["black_level_adu"]),
            _number(said["white_level_adu"]),
            said["lit"] is True,
        )
    except (DecodeError, KeyError, TypeError, ValueError) as error:
        raise _Died("it made no sense") from error


def _whole(value: Any) -> int:
    if type(value) is not int or not 0 < value < 1 << 31:
        raise ValueError(f"a length is a whole number, got {value!r}")
    return value


def _number(value: Any) -> float | None:
    if value is not None and (type(value) not in (int, float) or not math.isfinite(value)):
        raise ValueError(f"a number is finite, got {value!r}")
    return None if value is None else float(value)


def _text(value: Any) -> str | None:
    if value is not None and (not isinstance(value, str) or len(value) > LONGEST_TEXT):
        raise ValueError("a text is short")
    return value
