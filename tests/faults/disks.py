"""Disks that are full, slow, failing or read-only, and processes that run out of file size, descriptors or memory.

The real `hotpixd scan` and the real daemon meet each of these. They must say so in a sentence and end with 3, or go
on without what failed; never with a traceback, and never having acknowledged what is not there: the acknowledged shots
are deleted from every second inbox. Then the fault is gone, the same command runs again, and its end must be that of
an undisturbed run. A daemon whose disk is full has to stay up, say so, and recover by itself.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tracing
from stage import HUNG, Command, Ended, Scan, Stage, Watch, Wrong, differs, final, undisturbed, workplace
from table import Impossible, Row

from conftest import HOTPIXD, environment
from daemons import Daemon, eventually

_ROOM = "64m"
_FULL = "No space left"
_AT_ONCE = 2

SIZES = 48
"""Disks that the state has to fit on, from none at all to just enough."""

# Generations leave 8 MiB for the ledger; the other files of the small inbox take about 1.5 MB.
_SMALLEST, _SPOOL_FITS, _JUST_ENOUGH = 4 << 10, 2 << 20, 11 << 20

Prefix = Callable[[Path], Sequence[str]]
"""What to put before a command that runs in a folder."""


@dataclass(frozen=True)
class Tried:
    """What came of one fault."""

    hit: bool
    """Whether there was one."""

    code: int

    wrong: str | None = None
    """What was wrong. None: nothing."""


class SmallDisk(Scan):
    """A scan whose state is on a small disk of its own.

    Parameters
    ----------
    size : bytes, until it gets room
    """

    def __init__(self, stage: Stage, size: int) -> None:
        super().__init__(stage)
        self._size = size

    def prepare(self, folder: Path) -> None:
        """Mount the disk."""
        super().prepare(folder)
        mount_small(folder / "state", str(self._size))

    def after_disturbance(self, folder: Path) -> None:
        """Delete what was acknowledged, and make room."""
        super().after_disturbance(folder)
        give_room(folder / "state")

    def clear(self, folder: Path) -> None:
        """Unmount it."""
        subprocess.run(["umount", "-l", folder / "state"], check=False)
        super().clear(folder)


def mount_small(folder: Path, size: str) -> None:
    """Mount a file system in memory.

    Raises
    ------
    Impossible
        If that is not allowed here.
    """
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], capture_output=True)
    if done.returncode:
        raise Impossible(f"no file system can be mounted: {done.stderr.decode(errors='replace').strip()}")


def give_room(folder: Path) -> None:
    """Make a file system in memory larger."""
    subprocess.run(["mount", "-o", f"remount,size={_ROOM}", folder], check=True)


def judged(ended: Ended, allowed: Iterable[int] = (0, 1, 3)) -> str | None:
    """Say what is wrong with how a command ended; None if nothing."""
    if "Traceback" in ended.said:
        return f"a traceback: {ended.said[-600:]}"
    if ended.code not in allowed:
        return f"it ended with {ended.code}: {ended.said[-300:]}"
    if ended.code == 3 and "hotpixd: " not in ended.said:
        return f"it ended with 3 without a sentence: {ended.said[-300:]}"
    return None


def tried(
    command: Command,
    folder: Path,
    wanted: dict[str, Any],
    prefix: Prefix = lambda _: (),
    *,
    keep: bool = False,
    complete: bool = False,
    allowed: Iterable[int] = (0, 1, 3),
    was_hit: Callable[[Path, Ended], bool] = lambda _, ended: ended.code not in (0, 1),
    **env: str,
) -> Tried:
    """Run a command into a fault, then again without, and compare.

    Parameters
    ----------
    keep : the acknowledged shots in the inbox
    complete : where it claims to have done all (0 or 1), compare at once
    allowed : exit codes
    was_hit : tells from its folder and its end whether there was a fault
    """
    code, happened = 0, True
    try:
        command.prepare(folder)
        ended = command.disturbed(folder, prefix(folder), **env)
        code, happened = ended.code, was_hit(folder, ended)
        wrong = judged(ended, allowed)
        if wrong is None and complete and code in (0, 1):
            wrong = differs(final(folder / "state", folder / "inbox"), wanted)
        if wrong is None and happened:
            if isinstance(command, SmallDisk) or not keep:
                command.after_disturbance(folder)
            wrong = differs(command.recovered(folder), wanted)
        return Tried(happened, code, wrong)
    except Impossible:
        raise
    except Wrong as error:
        return Tried(happened, code, str(error))
    except Exception as error:
        # Whatever an undisturbed run would not have raised is wrong, and told.
        return Tried(happened, code, f"{type(error).__name__}: {error}")
    finally:
        command.clear(folder)


def two_at_a_time(tries: Sequence[Callable[[], Tried]]) -> list[Tried]:
    """Do all, as two cores allow."""
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        return list(pool.map(lambda one: one(), tries))


def row(what: str, results: Iterable[Tried], note: str = "", *, control: bool = False) -> Row:
    """Count what was hit, and tell what was wrong."""
    hits = [result for result in results if result.hit or result.wrong]
    wrong = [result.wrong for result in hits if result.wrong]
    if not control:
        for text in wrong:
            print(f"disks: {what}: {text}", file=sys.stderr)
    refused = sum(result.code == 3 for result in hits)
    counted = f"{refused} ended with a sentence, {len(hits) - refused} went on"
    return Row("disks", what, len(hits), len(wrong), control, note or ("" if control else counted))


class Bench:
    """A stage with the end of an undisturbed scan, and room for trials."""

    def __init__(self, work: Path) -> None:
        self.work = work
        self.stage = Stage(work)
        self.wanted = undisturbed(Scan(self.stage), work / "undisturbed")
        self._count = 0

    def place(self) -> Path:
        """Return a folder's path that nobody has used."""
        self._count += 1
        return self.work / f"trial-{self._count}"

    def scans(self, prefixes: Sequence[Prefix], **options: Any) -> list[Tried]:
        """Scan once with each of the prefixes; every second keeps what was acknowledged."""

        def trial(number: int, prefix: Prefix, folder: Path) -> Callable[[], Tried]:
            return lambda: tried(Scan(self.stage), folder, self.wanted, prefix, keep=bool(number % 2), **options)

        return two_at_a_time([trial(n, prefix, self.place()) for n, prefix in enumerate(prefixes)])


def run(long: bool) -> list[Row]:
    """Bring scan and daemon into all of these; a sample of each unless `long`."""
    if os.geteuid() != 0:
        raise Impossible("mounting small disks takes root.")
    tracing.check()
    with workplace() as work:
        bench = Bench(work)
        rows = [
            full_disks(bench, SIZES if long else 9),
            full_disks(bench, SIZES if long else 5, hook="full_ignored"),
            *failing_calls(bench, long),
            daemon_full(bench),
            *daemon_failing(bench, long),
            file_sizes(bench, 16 if long else 4),
            descriptors(bench, 1 if long else 6),
            memory(bench, 24 if long else 5),
            slow_disk(bench),
        ]
        for part in (memory_of_group, read_only_disk):
            try:
                rows.append(part(bench, long))
            except Impossible as reason:
                print(f"disks: {reason}", file=sys.stderr)
        return rows


def sizes(count: int) -> list[int]:
    """Return sizes of disks: most of them where spool and ledger do not fit, the last just enough for all."""
    many = count * 5 // 6
    growth = (_SPOOL_FITS / _SMALLEST) ** (1 / (many - 1))
    small = [_SMALLEST]
    for n in range(1, many):
        # Whole pages, no size twice.
        small.append(max(small[-1] + 4096, round(_SMALLEST * growth**n / 4096) * 4096))
    few = count - many
    return small + [_SPOOL_FITS + (_JUST_ENOUGH - _SPOOL_FITS) * n // few for n in range(1, few + 1)]


def full_disks(bench: Bench, count: int, hook: str = "") -> Row:
    """Scan onto disks of growing size; each is made larger after the fault."""
    stage = Stage(bench.work, hook)
    told_why = []

    def trial(size: int, folder: Path) -> Callable[[], Tried]:
        def full(_folder: Path, ended: Ended) -> bool:
            if ended.code == 3 and not hook:
                told_why.append(_FULL in ended.said)
            return ended.code == 3 or bool(hook)

        return lambda: tried(SmallDisk(stage, size), folder, bench.wanted, complete=True, was_hit=full)

    results = two_at_a_time([trial(size, bench.place()) for size in sizes(count)])
    if hook:
        return row("scan onto full disks, which it ignores", results, control=True)
    fits = sum(not result.hit for result in results)
    if not all(told_why):
        results.append(Tried(True, 3, f"{told_why.count(False)} times the sentence did not say that the disk is full"))
    what = f"scan onto disks of {count} sizes, full; given room, run again"
    return row(what, results, f"{len(results) - fits} were full and said so, on {fits} it fitted")


def failing_calls(bench: Bench, long: bool) -> list[Row]:
    """Have every call that changes the state fail once: with EIO, with ENOSPC; from some call on all with EROFS."""
    place = bench.place()
    command = Scan(bench.stage)
    command.prepare(place)
    log = bench.work / "trace"
    command.disturbed(place, tracing.tracer(log))
    traced = tracing.traced(log, place / "state")
    command.clear(place)
    every = {"write": 1 if long else 20, "pwrite64": 2 if long else 40}
    points = tracing.each(traced.calls, {**dict.fromkeys(traced.calls, 1 if long else 8), **every})

    def failing(call: str, error: str, when: str) -> Prefix:
        return lambda folder: tracing.saboteur(
            folder / "state", traced.paths, f"{call}:error={error}:when={when}", fast=True, log=folder / "log"
        )

    def hit(folder: Path, _ended: Ended) -> bool:
        return tracing.hit(folder / "log")

    rows = []
    for error in ("EIO", "ENOSPC"):
        results = bench.scans([failing(call, error, str(n)) for call, n in points], was_hit=hit)
        if error == "EIO":
            for (call, n), result in zip(points, results, strict=True):
                if call == "fsync" and result.hit and result.code != 3 and result.wrong is None:
                    # Those are ours; of fdatasync SQLite decides.
                    results.append(Tried(True, result.code, f"fsync {n} failed, and it ended with {result.code}"))
        rows.append(row(f"scan, the Nth call of a name fails with {error}", results))
    closed = sorted({"write", "pwrite64", "linkat", "mkdir", "rename", "unlink", "ftruncate"} & set(traced.calls))
    starts = (1, 3, 9, 20, 40, 80, 120, 160) if long else (3, 40)

    def read_only(first: int) -> Prefix:
        faults = [f"{call}:error=EROFS:when={max(first * traced.calls[call] // 170, 1)}+" for call in closed]
        return lambda folder: tracing.saboteur(folder / "state", traced.paths, *faults, fast=True, log=folder / "log")

    results = bench.scans([read_only(first) for first in starts], was_hit=hit)
    rows.append(row("scan, its disk becomes read-only on the way (EROFS)", results))
    return rows


class Notices:
    """A service manager's socket: keeps what the daemon says."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "notify"
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(self.path))
        self._socket.setblocking(False)
        self._said: list[str] = []

    def said(self) -> list[str]:
        """Return all notices so far."""
        with contextlib.suppress(BlockingIOError):
            while True:
                self._said.append(self._socket.recv(65536).decode())
        return self._said

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()


def daemon_full(bench: Bench) -> Row:
    """Fill the disk of a running daemon and free it again: it stays up, says so everywhere, recovers by itself."""
    folder = bench.place()
    watch = Watch(bench.stage)
    watch.prepare(folder)
    (folder / "waiting").mkdir()
    shots = sorted((folder / "inbox").iterdir())
    for shot in shots[6:]:
        shot.rename(folder / "waiting" / shot.name)
    runtime = Path(tempfile.mkdtemp(prefix="hpx"))
    notices = Notices(runtime)
    config = (folder / "config.yaml").read_text().replace('"disk_free_mb": 0', '"disk_free_mb": 4')
    (folder / "config.yaml").write_text(config)
    mount_small(folder / "state", _ROOM)
    env = {"NOTIFY_SOCKET": str(notices.path), "WATCHDOG_USEC": "20000000"}
    daemon = Daemon(folder / "state", runtime, "run", "--config", folder / "config.yaml", **env)
    wrong: str | None = None

    def status() -> dict[str, Any]:
        with contextlib.closing(daemon.client()) as client:
            return client.ask("status")

    try:
        daemon.wait_ready().wait_folded(6)
        ballast = folder / "state" / "ballast"
        with contextlib.suppress(OSError), ballast.open("wb") as file:
            while True:
                file.write(b"\1" * 4096)
                file.flush()
        for shot in shots[6:]:
            (folder / "waiting" / shot.name).rename(folder / "inbox" / shot.name)
        eventually(lambda: _FULL in (status()["daemon"]["degraded"] or ""), "it is degraded", 60)
        eventually(lambda: any(f"STATUS={_FULL}" in said for said in notices.said()), "the manager knows", 30)
        eventually(lambda: "The state's disk is nearly full" in daemon.log, "the disk's alert is raised", 60)
        before = len([said for said in notices.said() if "WATCHDOG=1" in said])
        eventually(lambda: len([s for s in notices.said() if "WATCHDOG=1" in s]) > before, "it lives", 30)
        ballast.unlink()
        eventually(lambda: status()["shots"]["folded"] >= 14, "it goes on by itself", 120)
        eventually(lambda: status()["daemon"]["degraded"] is None, "it is no longer degraded", 30)
        eventually(lambda: len(of_the_disk(status())) >= 2, "both alerts of the disk are raised", 60)
        code = daemon.stop()
        wrong = judged(Ended(code, daemon.log), (0,)) or differs(
            final(folder / "state", folder / "inbox"), bench.wanted
        )
    except (AssertionError, Wrong) as error:
        wrong = f"{error}\n{daemon.log[-1500:]}"
    finally:
        daemon.close()
        notices.close()
        subprocess.run(["umount", "-l", folder / "state"], check=False)
        watch.clear(folder)
        shutil.rmtree(runtime)
    what = "the disk of a running daemon is filled and freed"
    return row(what, [Tried(True, 0, wrong)], "degraded in status and STATUS, alerts, recovered without a restart")


def of_the_disk(status: dict[str, Any]) -> list[str]:
    """Return the alerts about the disk's space."""
    return [alert["text"] for alert in status["alerts"] if alert["topic"] == "disk"]


def daemon_failing(bench: Bench, long: bool) -> list[Row]:
    """Have calls of the daemon fail: an fsync must end it with 3; run again it goes on."""
    place = bench.place()
    watch = Watch(bench.stage)
    log = bench.work / "trace-daemon"
    watch.prepare(place)
    watch.disturbed(place, tracing.tracer(log))
    traced = tracing.traced(log, place / "state")
    watch.clear(place)
    wanted = undisturbed(watch, bench.place())
    calls = {name: traced.calls[name] for name in ("fsync", "fdatasync", "write", "pwrite64", "linkat")}
    step = {"write": 12, "pwrite64": 40} if long else {"write": 200, "pwrite64": 300}
    points = tracing.each(calls, {**dict.fromkeys(calls, 4 if long else 30), **step})

    def trial(call: str, n: int, folder: Path) -> Callable[[], Tried]:
        def prefix(folder: Path) -> Sequence[str]:
            fault = f"{call}:error=EIO:when={n}"
            return tracing.saboteur(folder / "state", traced.paths, fault, fast=True, log=folder / "log")

        def hit(folder: Path, _ended: Ended) -> bool:
            return tracing.hit(folder / "log")

        return lambda: tried(watch, folder, wanted, prefix, keep=bool(n % 2), allowed=(0, 3), was_hit=hit)

    results = two_at_a_time([trial(call, n, bench.place()) for call, n in points])
    return [row("run on a directory, the Nth call of a name fails with EIO", results)]


def limited(option: str, value: int) -> Prefix:
    """Put a limit of resources on a command, with util-linux's prlimit."""
    return lambda _: ["prlimit", f"--{option}={value}:{value}"]


def file_sizes(bench: Bench, count: int) -> Row:
    """Scan with a limit to the size of files (EFBIG)."""
    values = [1024 * round(1.45**n) for n in range(1, 17)][:: 16 // count]
    return row("scan, no file larger than 1 to 382 kB (EFBIG)", bench.scans([limited("fsize", v) for v in values]))


def descriptors(bench: Bench, step: int) -> Row:
    """Scan with fewer and fewer descriptors, as long as the interpreter starts at all."""
    least = next(n for n in range(3, 64) if starts("nofile", n))
    results = bench.scans([limited("nofile", n) for n in range(least, least + 24, step)], was_hit=lambda *_: True)
    return row(f"scan, out of descriptors ({least} to {least + 23})", results)


def memory(bench: Bench, count: int) -> Row:
    """Scan with less and less address space, as long as the interpreter starts at all."""
    least = next(n for n in range(30, 2000, 10) if starts("as", n << 20))
    most = 3000
    values = [least + (most - least) * n * n // count**2 for n in range(count)]
    # Where a thread gets no buffer, OpenBLAS asks for it again without end. A service manager's watchdog ends that;
    # here it is killed. Its other way out is to end the process with 1.
    allowed = (HUNG, 0, 1, 3)
    results = bench.scans([limited("as", n << 20) for n in values], was_hit=lambda *_: True, allowed=allowed)
    hung = sum(result.code == HUNG for result in results)
    note = (
        f"{sum(result.code == 3 for result in results)} ended with a sentence; {hung} hung in OpenBLAS and were killed"
    )
    return row(f"scan, out of memory (RLIMIT_AS {least} to {most} MB)", results, note)


def starts(option: str, value: int) -> bool:
    """Tell whether the command can say its version under a limit."""
    command = [*limited(option, value)(Path()), *HOTPIXD, "--version"]
    return subprocess.run(command, env=environment(), capture_output=True).returncode == 0


def memory_of_group(bench: Bench, long: bool) -> Row:
    """Scan in a control group whose memory does not suffice: the kernel kills it."""
    group = next(
        (Path(p) for p in ("/sys/fs/cgroup/memory", "/sys/fs/cgroup") if (Path(p) / "cgroup.procs").exists()), None
    )
    if group is None:
        raise Impossible("there are no control groups.")
    own = group / f"hotpixd-faults-{os.getpid()}"
    try:
        own.mkdir()
        limit = next(own / name for name in ("memory.limit_in_bytes", "memory.max") if (own / name).exists())
        limit.write_text(str(1 << 30))
    except (OSError, StopIteration) as error:
        with contextlib.suppress(OSError):
            own.rmdir()
        raise Impossible(f"no control group can limit memory here: {error}") from None
    try:
        results = []
        for megabytes in range(20, 180, 10 if long else 40):
            limit.write_text(str(megabytes << 20))
            prefix = ["sh", "-c", f'echo $$ > {own}/cgroup.procs; exec "$@"', "sh"]
            command = Scan(bench.stage)
            results.append(
                tried(command, bench.place(), bench.wanted, lambda _, p=prefix: p, allowed=(-9, 0, 1, 3))  # type: ignore[misc]
            )
        return row("scan, the kernel kills it for its memory (20 to 170 MB)", results)
    finally:
        own.rmdir()


def slow_disk(bench: Bench) -> Row:
    """Every fsync and fdatasync takes a fifth of a second."""
    paths = [".", "ledger.sqlite", "ledger.sqlite-wal", "ledger.sqlite-journal", "spool", "sensors"]
    faults = ["fsync:delay_enter=200ms", "fdatasync:delay_enter=200ms"]
    started = time.monotonic()
    results = bench.scans(
        [lambda folder: tracing.saboteur(folder / "state", paths, *faults, log=folder / "log")],
        was_hit=lambda *_: True,
    )
    took = time.monotonic() - started
    if took < 2:
        results.append(Tried(True, 0, f"it took {took:.1f} s: nothing was slow"))
    return row("scan, every sync takes 0.2 s", results, f"took {took:.0f} s")


@contextlib.contextmanager
def _ext4(folder: Path) -> Iterator[tuple[Path, Path]]:
    """Mount a file system on a loop device; give where, and its image."""
    image, place = folder / "image", folder / "disk"
    place.mkdir()
    with image.open("wb") as file:
        file.truncate(64 << 20)
    subprocess.run(["mkfs.ext4", "-q", "-F", image], check=True, capture_output=True)
    try:
        mount = subprocess.run(["mount", "-o", "loop,errors=remount-ro", image, place], capture_output=True)
    except FileNotFoundError:
        raise Impossible("mount is missing.") from None
    if mount.returncode:
        raise Impossible(f"no loop device can be mounted: {mount.stderr.decode(errors='replace').strip()}")
    try:
        yield place, image
    finally:
        subprocess.run(["umount", "-l", place], check=False)


def read_only_disk(bench: Bench, long: bool) -> Row:
    """The journal of the state's disk is aborted while a scan runs, and then a daemon: it is read-only from then on."""
    if shutil.which("mkfs.ext4") is None:
        raise Impossible("mkfs.ext4 is missing.")
    results = []
    for shots in (1, 5, 9, 13) if long else (5,):
        for daemon in (False, True):
            folder = bench.place()
            folder.mkdir()
            with _ext4(folder) as (disk, image):
                results.append(_aborted(bench, folder, disk, image, shots, daemon=daemon))
            shutil.rmtree(folder)
    return row("the disk of a scan or a daemon becomes read-only (ext4 aborts its journal)", results)


def _aborted(bench: Bench, folder: Path, disk: Path, image: Path, shots: int, *, daemon: bool) -> Tried:
    watch = Watch(bench.stage)
    watch.prepare(folder / "run")
    root, inbox = disk / "state", folder / "run" / "inbox"
    runtime = Path(tempfile.mkdtemp(prefix="hpx"))
    command: tuple[object, ...] = ("run", "--config", folder / "run" / "config.yaml") if daemon else ("scan", inbox)
    process = Daemon(root, runtime, *command)
    try:
        until = time.monotonic() + 60
        spool = root / "spool"
        while time.monotonic() < until and process.process.poll() is None:
            if spool.is_dir() and len(list(spool.iterdir())) >= shots:
                break
            time.sleep(0.002)
        subprocess.run(["mount", "-o", "remount,abort", disk], check=False, capture_output=True)
        try:
            code = process.process.wait(20)
        except subprocess.TimeoutExpired:
            # A daemon without new shots may wait, as long as it does not say that all is well.
            code = process.stop()
        wrong = judged(Ended(code, process.log), (0, 1, 3))
        if wrong is None and code != 3:
            wrong = f"its disk was read-only, and it ended with {code}: {process.log[-300:]}"
        subprocess.run(["umount", disk], check=True)
        subprocess.run(["e2fsck", "-fy", image], check=False, capture_output=True)
        subprocess.run(["mount", "-o", "loop", image, disk], check=True)
        again = subprocess.run([*HOTPIXD, "scan", "--state", root, inbox], env=environment(), capture_output=True)
        if again.returncode not in (0, 1):
            wrong = wrong or f"run again it ended with {again.returncode}: {again.stderr.decode()[-300:]}"
        return Tried(True, code, wrong or differs(final(root, inbox), bench.wanted))
    except (Wrong, AssertionError) as error:
        return Tried(True, 3, str(error))
    finally:
        process.close()
        shutil.rmtree(runtime)
