"""Damaged and hostile picture files: each gives a refusal in words or a frame of the right geometry, and nothing else.

::

    PYTHONPATH=daemon python tests/faults/fuzz.py [--long] [--only JPEG,DNG] [--files N] [--first N]
    PYTHONPATH=daemon python tests/faults/fuzz.py --keep FOLDER    # what was wrong is left there

Files are decoded in processes of their own, with limited memory, so that a crash of a C library is seen and costs one
file. What is wrong: the process dies; it takes longer than the limit; it raises anything but `DecodeError`; it says
nothing, or nothing fit for a line of a log; a frame has other sides, colours or depth than the file it was made from,
unless the damaged file is another whole file (`another_whole_file` says when, strictly, and how many were).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import queue
import resource
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from fuzz_mutators import Mutant, mutant, mutants
from fuzz_seeds import FORMATS, Seed, seeds
from fuzz_whole import another_whole_file
from table import Row

from pictures import SHARED

HARNESS = "fuzz"
LIMIT_S = 10.0
"""Longer for one small file is a hang."""

MEMORY_BYTES = 3 << 30
"""Address space of a process that decodes: beside 0.6 GB of libraries, thrice what the largest frame needs."""

MOST_RESIDENT_BYTES = 1 << 30
"""What decoding small files may have taken at most, whatever their headers promise."""

LONG_FILES, SHORT_FILES = 5000, 80

Geometry = tuple[str, int, int, str, int, str]
"""Raw or rendered, width, height, colours, channels, dtype."""


@dataclass(frozen=True)
class Result:
    """What became of a file."""

    geometry: Geometry | None = None
    refused: str | None = None
    fault: str | None = None
    """How the decoder failed, if it neither refused nor returned a frame."""

    resident_bytes: int = 0


Decoder = Callable[[Path], Result]
"""The seam: what is to be tried. `Worker.decode` runs `hotpixd.intake.decode` in a process of its own."""


def geometry_of(frame: Any) -> Geometry:
    """Return what must not change of a frame."""
    sensor = frame.sensor
    layout = sensor.layout
    return str(sensor.samples), layout.width, layout.height, layout.colours, layout.channels, sensor.dtype


def by_future(submit: Callable[[Path, Any], Any]) -> Decoder:
    """Make a decoder of something with `submit(path, kind)` that returns a future of a frame."""
    from hotpixd.intake.decode import DecodeError

    def decode(path: Path) -> Result:
        try:
            return Result(geometry_of(submit(path, None).result(timeout=6 * LIMIT_S)))
        except DecodeError as error:
            return Result(refused=str(error))
        except Exception as error:
            return Result(fault=repr(error))

    return decode


class Worker:
    """A process that decodes files, one after the other, and is replaced when it dies or hangs."""

    def __init__(self, option: str = "") -> None:
        self._option = option
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    def decode(self, path: Path) -> Result:
        """Return what becomes of a file."""
        process = self._started()
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(os.fsencode(path) + b"\n")
            process.stdin.flush()
            ready, _, _ = select.select([process.stdout], [], [], LIMIT_S)
            if not ready:
                self._end()
                return Result(fault=f"hangs for {LIMIT_S:g} s")
            line = process.stdout.readline()
        except BrokenPipeError:
            line = b""
        if not line:
            code = process.wait()
            self._end()
            name = signal.Signals(-code).name if code < 0 else f"exit code {code}"
            return Result(fault=f"the process dies of {name}")
        said = json.loads(line)
        if said.get("geometry"):
            said["geometry"] = tuple(said["geometry"])
        return Result(**said)

    def _started(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            command = [sys.executable, str(HERE / "fuzz.py"), "--worker", self._option]
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
            )
            # The libraries are loaded now, not within the limit of a file.
            assert self._process.stdout is not None
            assert self._process.stdout.readline() == b"ready\n"
        return self._process

    def _end(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            for pipe in (self._process.stdin, self._process.stdout):
                with contextlib.suppress(OSError):
                    assert pipe is not None
                    pipe.close()
            self._process = None


def serve(option: str) -> None:
    """Decode the files named on standard input; `option` makes a control of it."""
    import ctypes

    from hotpixd.intake import decode as module

    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints is no answer
    if option == "unchecked":
        for name in CHECKS:
            setattr(module, name, lambda *_: None)
    with tempfile.TemporaryDirectory(prefix="hotpixd-fuzz-") as folder:
        for form in FORMATS[:5]:  # loads the libraries
            path = Path(folder) / form
            path.write_bytes(seeds(form)[0].content)
            module.decode(path)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    print("ready", file=out, flush=True)
    for number, line in enumerate(sys.stdin.buffer):
        # The whole files come first.
        fails = number > 20 and number % 5 == 0
        path = Path(os.fsdecode(line.rstrip(b"\n")))
        _forget_peak()
        try:
            if option == "broken" and fails:
                ctypes.string_at(0)
            if option == "hanging" and fails:
                time.sleep(2 * LIMIT_S)
            said: dict[str, Any] = {"geometry": geometry_of(module.decode(path))}
        except module.DecodeError as error:
            said = {"refused": str(error)}
        except Exception as error:
            said = {"fault": f"raises {error!r}"}
        said["resident_bytes"] = _peak_bytes()
        print(json.dumps(said), file=out, flush=True)


def _forget_peak() -> None:
    with contextlib.suppress(OSError):  # not permitted everywhere: then the peak is that of all files so far
        Path("/proc/self/clear_refs").write_text("5")


def _peak_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


CHECKS = ("_refuse_if", "_refuse_half_written", "_refuse_edited", "_require_tiff_size")
"""What keeps frames of a wrong geometry out; a control works without."""


def fault_of(made: Mutant, result: Result, wanted: dict[Seed, Geometry | None]) -> str | None:
    """Tell what is wrong with a result; None if nothing."""
    if result.fault is not None:
        return result.fault
    if result.resident_bytes > MOST_RESIDENT_BYTES:
        return f"takes {result.resident_bytes >> 20} MB"
    if result.geometry is None:
        sentence = result.refused or ""
        return None if sentence.isprintable() and 20 < len(sentence) < 600 else f"says {sentence!r}"
    allowed = {wanted[seed] for seed in made.seeds}
    if result.geometry in allowed or any(another_whole_file(made, result.geometry, one) for one in allowed):
        return None
    return f"gives {result.geometry} instead of {allowed}"


@dataclass
class Tally:
    """What became of the files of a format."""

    files: int = 0
    frames: int = 0
    others: int = 0
    """Frames of another geometry that are whole files of their own."""
    faults: list[tuple[Mutant, str]] | None = None
    most_resident_bytes: int = 0

    def add(self, made: Mutant, result: Result, wanted: dict[Seed, Geometry | None]) -> None:
        """Judge a result."""
        self.files += 1
        self.frames += result.geometry is not None
        self.others += result.geometry is not None and result.geometry not in {wanted[seed] for seed in made.seeds}
        self.most_resident_bytes = max(self.most_resident_bytes, result.resident_bytes)
        found = fault_of(made, result, wanted)
        if found:
            self.faults = [*(self.faults or []), (made, found)]


def sweep(form: str, files: int, first: int, decoders: Sequence[Decoder]) -> Tally:
    """Decode so many damaged files of a format."""
    whole = seeds(form)
    tally = Tally(faults=[])
    lock = threading.Lock()
    numbers: queue.SimpleQueue[int] = queue.SimpleQueue()
    with tempfile.TemporaryDirectory(prefix="hotpixd-fuzz-") as folder:
        path = Path(folder) / "whole"
        wanted: dict[Seed, Geometry | None] = {}
        for seed in whole:
            path.write_bytes(seed.content)
            result = decoders[0](path)
            if result.fault is not None:
                raise AssertionError(f"the whole file {seed.name} fails: {result.fault}")
            wanted[seed] = result.geometry
        for number in range(first, first + files):
            numbers.put(number)

        def work(index: int, decode: Decoder) -> None:
            path = Path(folder) / str(index)
            with contextlib.suppress(queue.Empty):
                while True:
                    made = mutant(form, whole, numbers.get_nowait())
                    path.write_bytes(made.content)
                    result = decode(path)
                    with lock:
                        tally.add(made, result, wanted)

        threads = [threading.Thread(target=work, args=pair) for pair in enumerate(decoders)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    return tally


def sweeps(
    forms: Iterable[str], files: int, first: int = 0, processes: int = 2, option: str = ""
) -> Iterator[tuple[str, Tally]]:
    """Sweep formats with processes of our own."""
    with contextlib.ExitStack() as stack:
        workers = [stack.enter_context(Worker(option)) for _ in range(processes)]
        for form in forms:
            if seeds(form):
                yield form, sweep(form, files, first, [worker.decode for worker in workers])


def _row(form: str, tally: Tally) -> Row:
    faults = tally.faults or []
    note = (
        f"{tally.files - tally.frames} refused, {tally.frames} frames, {tally.others} of them of another whole file;"
        f" {tally.most_resident_bytes / 1e6:.0f} MB at most"
    )
    if faults:
        note += "; " + "; ".join(f"{made.seeds[0].name}, {made.done}: {fault}" for made, fault in faults[:3])
    return Row(HARNESS, f"damaged {form} files", tally.files, len(faults), control=False, note=note)


def run(long: bool) -> list[Row]:
    """Return a row per format, the controls, and the daemon among hostile files."""
    files = LONG_FILES if long else SHORT_FILES
    rows = [_row(form, tally) for form, tally in sweeps(FORMATS, files)]
    if not seeds("real"):
        rows.append(Row(HARNESS, f"damaged files of real cameras: none at {SHARED}", 0, 0, control=False))
    rows += controls(300 if long else 60)
    rows.append(among_good_ones(hostile=600 if long else 40))
    return rows


def controls(files: int) -> list[Row]:
    """Return what the harness sees of a decoder without checks, of one that crashes and of one that hangs."""
    rows = []
    for option, form, count in (("unchecked", "DNG", files), ("broken", "FITS", files), ("hanging", "JPEG", 20)):
        with Worker(option) as worker:
            tally = sweep(form, count, 0, [worker.decode])
        rows.append(Row(HARNESS, f"control: {option} decoder, {form}", count, len(tally.faults or []), control=True))
    return rows


def among_good_ones(hostile: int) -> Row:
    """Put hostile files among good ones into a directory that the daemon watches; compare with a scan of the good."""
    from conftest import feed, told
    from daemons import Daemon
    from hotpixd.simulate import VirtualSensor, write_series

    wrong = []
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="hpx")))
        good, watched, runtime = folder / "good", folder / "watched", folder / "run"
        for made in (good, watched, runtime):
            made.mkdir()
        sensor = VirtualSensor(200, 150, hot=8, stuck=3, dead=3, seed=1, serial="V0001")
        for _ in write_series(good, sensor, 12, "moving", "dng"):
            pass
        (good / "truth.json").unlink()
        feed(folder / "alone", good)
        alone = told(folder / "alone")
        bad = list(_refused(hostile))
        daemon = stack.enter_context(contextlib.closing(Daemon(folder / "state", runtime, "watch", watched, "--plain")))
        daemon.wait_ready()
        shots = sorted(good.iterdir())
        per_shot = -(-len(bad) // len(shots))
        for index, shot in enumerate(shots):
            for number, made in enumerate(bad[index * per_shot : (index + 1) * per_shot]):
                _put(watched / f"b{index:02d}_{number:04d}.dng", made.content)
            _put(watched / shot.name, shot.read_bytes())
        keys = len({made.content for made in bad})
        try:
            daemon.wait_folded(len(shots), within_s=120 + hostile)
            _wait_until(lambda: len(daemon.ask("status")["refused"]) >= keys, 120 + hostile)
        except AssertionError as error:
            wrong.append(str(error)[-500:])
        if daemon.stop() != 0:
            wrong.append(f"the daemon ends badly: {daemon.log[-500:]}")
        both = told(folder / "state")
        wrong += [f"{name} differ" for name in ("digests", "defects") if alone[name] != both[name]]
        wrong += [f"refused without a reason: {name}" for name, reason in both["refused"] if not reason]
        if len(both["refused"]) != keys:
            wrong.append(f"{len(both['refused'])} refused of {keys} hostile files")
    what = f"the daemon: {len(bad)} hostile files among 12 good ones"
    return Row(HARNESS, what, len(bad), len(wrong), control=False, note="; ".join(wrong))


def _refused(count: int) -> Iterator[Mutant]:
    """Yield damaged files of all formats that are no pictures any more."""
    taken: set[bytes] = set()
    forms = FORMATS[:5]
    with Worker() as worker, tempfile.TemporaryDirectory(prefix="hotpixd-fuzz-") as folder:
        path = Path(folder) / "file.dng"
        whole = {form: seeds(form) for form in forms}
        number = 0
        while len(taken) < count:
            form = forms[number % len(forms)]
            made = mutant(form, whole[form], 100_000 + number)
            number += 1
            path.write_bytes(made.content)
            if made.content and made.content not in taken and worker.decode(path).refused:
                taken.add(made.content)
                yield made


def _put(path: Path, content: bytes) -> None:
    part = path.with_suffix(".part")
    part.write_bytes(content)
    part.rename(path)


def _wait_until(condition: Callable[[], bool], within_s: float) -> None:
    until = time.monotonic() + within_s
    while not condition():
        if time.monotonic() > until:
            raise AssertionError(f"not within {within_s:g} s")
        time.sleep(0.5)


def main() -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--long", action="store_true", help=f"{LONG_FILES} files per format")
    parser.add_argument("--only", default=",".join(FORMATS), help="formats, with commas")
    parser.add_argument("--files", type=int, help="files per format; without the controls and the daemon")
    parser.add_argument("--first", type=int, default=0, help="number of the first file")
    parser.add_argument("--keep", type=Path, help="leave files with a wrong result here")
    parser.add_argument("--worker", nargs="?", const="", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker is not None:
        serve(options.worker)
        return 0
    if options.files is None:
        rows = run(options.long)
    else:
        rows = []
        for form, tally in sweeps(options.only.split(","), options.files, options.first):
            rows.append(_row(form, tally))
            counted = Counter(f"{made.seeds[0].name}: {made.done}: {fault}"[:200] for made, fault in tally.faults or [])
            for text, count in counted.most_common(40):
                print(f"{count:5} {text}", file=sys.stderr)
            if options.keep:
                options.keep.mkdir(exist_ok=True)
                for number, (made, _) in enumerate(tally.faults or []):
                    (options.keep / f"{form}-{number}").write_bytes(made.content)
    for row in rows:
        mark = "control" if row.control else ""
        print(f"| {row.harness} | {row.what} | {row.points} | {row.wrong} | {mark} | {row.note} |")
    return 0 if all((row.wrong > 0) == row.control for row in rows) else 1


__all__ = ["Mutant", "Result", "Worker", "by_future", "fault_of", "mutants", "run", "sweep"]

if __name__ == "__main__":
    sys.exit(main())
