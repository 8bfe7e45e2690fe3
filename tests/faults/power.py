"""Power cuts: the product runs on disks that log, and recovers from everything that may be left of them.

Two kinds of disks: real ext4, btrfs and xfs on a block device whose writes and
flushes are logged (`images`), and a file system that keeps nothing but what
POSIX promises (`posix_log`). The second is the stricter, and sees the fsyncs of
folders; on the first the product meets real file systems. For the controls one
safeguard after the other is left out.

    PYTHONPATH=daemon python tests/faults/power.py [--long] [--only posix,ext4,btrfs,xfs]
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import logging
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

HERE = Path(__file__).resolve().parent
sys.path[:0] = [path for path in map(str, (HERE, HERE.parent, HERE.parents[1] / "daemon")) if path not in sys.path]

import posix_log
from images import Builder, FileSystem, Image, LoggedDisk, choices, mounted, only_flushed, wait_mounted
from posix_log import Record, Remains, power_cuts
from table import Impossible, Row, markdown
from workloads import WORKLOADS, Note, Run, Workload, make_shots, scratch

_T = TypeVar("_T")

_AT_A_TIME = 2
"""Recoveries side by side."""

_BY_COMMAND_EVERY = 40
"""Of so many crash images one is recovered by the command in a process of its own, the others by its code in ours."""

_ENOUGH = 3
"""Wrong ends after which a control has shown what it is for."""

SITES: dict[str, str] = {
    "album._folder_below": "fsync of the folder above a photo's folder",
    "album._place": "fsync of a photo",
    "album.save#1": "fsync of a photo that was there already",
    "album.save#2": "fsync of the folder of a photo that was there already",
    "album.save#3": "fsync of a photo's folder",
    "camera_worker.do_fetch": "first fsync of a file that has arrived",
    "durable.make_folder#1": "fsync of the folder above one that was there already",
    "durable.make_folder#2": "fsync of the folder above a new one",
    "durable.make_parents": "fsync of the folders above the state's",
    "durable.replace_durably#1 arrival": "second fsync of a file that has arrived",
    "durable.replace_durably#1 copy": "fsync of a copy in the spool",
    "durable.replace_durably#1 generation": "fsync of a generation",
    "durable.replace_durably#1 series": "fsync of the journal of a dark series",
    "durable.replace_durably#2 arrival": "fsync of the folder of files that have arrived",
    "durable.replace_durably#2 copy": "fsync of the spool after a copy",
    "durable.replace_durably#2 generation": "fsync of the folder of generations",
    "durable.replace_durably#2 series": "fsync of the folder of a dark series' journal",
    "spool._place#1": "fsync of a shot found in the spool",
    "spool._place#2": "fsync of the spool where a shot was found",
    "spool._place#3": "fsync of a shot linked into the spool",
    "spool._place#4": "fsync of the spool after a link",
}
"""Every place at which the product fsyncs on a shot's way, in words."""

BESIDE = frozenset(
    (
        "backup._unpack#1",
        "backup._unpack#2",
        "backup.save#1",
        "backup.save#2",
        "durable.replace_durably#1 declared",
        "durable.replace_durably#2 declared",
        "durable.set_aside#1",
        "durable.set_aside#2",
        "durable.written_beside#1",
        "durable.written_beside#2",
        "state.swap_in",
    )
)
"""The others: of commands that somebody waits for and repeats, and of evidence. No workload passes them."""

TOGETHER: dict[str, tuple[str, ...]] = {
    "both fsyncs of a file that has arrived": ("camera_worker.do_fetch", "durable.replace_durably#1 arrival"),
}
"""Sites that do each other's work: a control takes them out together. The camera's process fsyncs what it has fetched,
so that waiting for the disk does not keep the other cameras waiting; the second fsync then has nothing left to do."""

OTHERS = (
    "synchronous=FULL (NORMAL instead)",
    "synchronous=FULL (OFF instead)",
    "the commit before a generation",
    "new files for generations (in place instead)",
)
"""Safeguards other than an fsync of ours; see `power_hook`."""

_MAKES = ("ext4", "btrfs", "xfs")
_SAMPLE = 60
_PER_EPOCH = 2

_LONG: dict[str, dict[str, int | None]] = {
    "ext4": {"scan": None, "linked scan": 150, "daemon": 150, "camera": 150, "dark series": None},
    "btrfs": {"scan": None, "linked scan": 150, "daemon": 150, "camera": 150, "dark series": None},
    "xfs": {"scan": 150, "linked scan": 100, "daemon": 50},
}
"""Crash images of each workload; None: all."""

_SHORT: dict[str, dict[str, int | None]] = {
    "ext4": {"scan": 60, "linked scan": 20, "daemon": 20, "camera": 20},
    "btrfs": {"scan": 40, "linked scan": 20},
    "xfs": {"scan": 30},
}

_CONTROLS_OF_SYSTEMS = (
    ("durable.replace_durably#1 copy", "scan"),
    ("synchronous=FULL (OFF instead)", "scan"),
    ("synchronous=FULL (NORMAL instead)", "scan"),
    ("durable.replace_durably#1 generation", "scan"),
    ("spool._place#3", "linked scan"),
    ("album._place", "camera"),
    ("durable.replace_durably#1 series", "dark series"),
    ("new files for generations (in place instead)", "scan"),
)
"""Safeguards that are left out on real file systems, and what is then run."""


@dataclass(frozen=True)
class _Job:
    """What a recovery needs to know, the same for all images of a workload."""

    workload: str
    notes: tuple[Note, ...]
    shots: tuple[Path, ...]
    expected: Mapping[str, Any]

    def wrong(self, disk: Path, end: int, by_command: bool = False) -> str | None:
        promised = [note for note in self.notes if note.at <= end]
        return WORKLOADS[self.workload].wrong(disk, promised, list(self.shots), dict(self.expected), by_command)


@dataclass
class Tally:
    """How many images were tried, and what was wrong with them."""

    points: int = 0
    wrong: int = 0
    first: str = ""

    def add(self, fault: str | None) -> None:
        """Count one."""
        self.points += 1
        if fault is not None:
            self.wrong += 1
            self.first = self.first or fault

    def include(self, other: Tally) -> None:
        """Count those of another one too."""
        self.points += other.points
        self.wrong += other.wrong
        self.first = self.first or other.first


# --- in the processes that recover


def _prepare() -> None:
    """Load and compile all that a recovery needs, once."""
    os.nice(5)
    logging.disable(logging.CRITICAL)
    from hotpixd.core.sensor import warm_up

    warm_up()


def _recover_remains(job: _Job, end: int, remains: Remains) -> str | None:
    with scratch("remains") as disk:
        remains.put_into(disk)
        return job.wrong(disk, end)


def _recover_image(job: _Job, system: FileSystem, image: Path, end: int, by_command: bool) -> str | None:
    try:
        with scratch("image") as folder:
            try:
                with mounted(image, folder, system):
                    return job.wrong(folder, end, by_command)
            except RuntimeError as error:
                return f"Lost: {error}"
    finally:
        image.unlink()


def pool() -> ProcessPoolExecutor:
    """Return the processes that recover."""
    return ProcessPoolExecutor(_AT_A_TIME, get_context("spawn"), _prepare)


def tried(
    processes: ProcessPoolExecutor, points: Iterable[_T], begin: Callable[[_T], Future[str | None]], enough: int | None
) -> Tally:
    """Try points until there are no more, or enough are wrong."""
    tally = Tally()
    running: set[Future[str | None]] = set()
    for point in points:
        running.add(begin(point))
        if len(running) > _AT_A_TIME:
            done, running = wait(running, return_when=FIRST_COMPLETED)
            for one in done:
                tally.add(one.result())
        if enough is not None and tally.wrong >= enough:
            break
    for one in running:
        tally.add(one.result())
    return tally


# --- what POSIX promises


@dataclass(frozen=True)
class Trace:
    """What a workload did to the file system that keeps nothing but what POSIX promises."""

    records: list[Record]
    job: _Job
    sites: dict[int, str]
    """Who asked for the fsyncs: sites by the ends of their records. Those of SQLite are not in it."""

    names: dict[int, str]
    """Files and folders by their numbers."""

    def without(self, *left_out: str) -> Trace:
        """Return the same without the fsyncs of some sites."""
        records = [record for record in self.records if self.sites.get(record.end) not in left_out]
        return replace(self, records=records)

    def without_sqlite(self, name: str) -> Trace:
        """Return the same without what SQLite fsyncs of a file."""
        records = [
            record
            for record in self.records
            if not (
                record.what == "fsync"
                and record.end not in self.sites
                and self.names.get(record.values[0], "").endswith(name)
            )
        ]
        return replace(self, records=records)


@contextlib.contextmanager
def traced(workload: Workload, without: tuple[str, ...] = ()) -> Iterator[Trace]:
    """Run a workload on that file system; what it needs to recover is there while this lasts."""
    with scratch(workload.name) as folder:
        run = _placed(folder, without)
        server = subprocess.Popen([sys.executable, str(HERE / "posix_log.py"), str(run.disk), str(run.log)])
        try:
            wait_mounted(run.disk, server)
            workload.before(run)
            workload.drive(run)
        finally:
            subprocess.run(["fusermount", "-u", "-z", str(run.disk)], capture_output=True)
            with contextlib.suppress(subprocess.TimeoutExpired):
                server.wait(10)
            server.kill()
        records = posix_log.read_log(run.log)
        yield Trace(records, _job(workload, run), _sites(records, run.notes()), _names(records))


def _placed(folder: Path, without: tuple[str, ...]) -> Run:
    run = Run(folder / "disk", folder / "log", folder / "work", folder / "shots", without)
    for each in (run.disk, run.folder, run.shots):
        each.mkdir(exist_ok=True)
    make_shots(run.shots)
    return run


def _job(workload: Workload, run: Run) -> _Job:
    notes = tuple(note for note in run.notes() if note.what != "fsync")
    return _Job(workload.name, notes, tuple(workload.shots(run)), workload.expected(run))


def _sites(records: Sequence[Record], notes: Sequence[Note]) -> dict[int, str]:
    sites = {}
    for note in notes:
        if note.what == "fsync":
            for record in records:
                at_the_time = note.facts["after"] < record.end <= note.at
                if at_the_time and record.what == "fsync" and record.values[0] == note.facts["inode"]:
                    sites[record.end] = note.facts["site"]
    return sites


def _names(records: Sequence[Record]) -> dict[int, str]:
    return {values[2]: values[1] for _, what, values in records if what in ("create", "mkdir")}


def try_trace(
    processes: ProcessPoolExecutor, trace: Trace, most: int | None, known: Mapping[bytes, int] | None = None
) -> Tally:
    """Recover from what may be left.

    Parameters
    ----------
    most : power cuts, chosen by chance if there are more
    known : what may be left with all safeguards, see `left_of`. Then only what is not among it is tried, or what is
        left at a later time, when more is promised; and only until enough is wrong
    """
    cuts = list(power_cuts(trace.records))
    if known is not None:
        cuts = [cut for cut in cuts if cut[0] > known.get(cut[2].digest, -1)]
    if known is not None or (most is not None and len(cuts) > most):
        random.Random(0).shuffle(cuts)
    if known is not None:
        # There are few of these, and they are the worst.
        cuts.sort(key=lambda cut: cut[1] != "synced")
    return tried(
        processes,
        cuts[:most],
        lambda cut: processes.submit(_recover_remains, trace.job, cut[0], cut[2]),
        None if known is None else _ENOUGH,
    )


def left_of(trace: Trace) -> dict[bytes, int]:
    """Return digests of all that may be left, each with the last moment at which that may be."""
    return {remains.digest: end for end, _, remains in power_cuts(trace.records)}


# --- real file systems


@dataclass(frozen=True)
class Disk:
    """What a workload wrote to a real file system, down to the device."""

    disk: LoggedDisk
    job: _Job
    folder: Path


@contextlib.contextmanager
def logged(system: FileSystem, workload: Workload, without: tuple[str, ...] = ()) -> Iterator[Disk]:
    """Run a workload on a real file system; what it needs to recover is there while this lasts."""
    with scratch(workload.name) as folder:
        disk = LoggedDisk(system, folder)
        disk.make()
        run = _placed(folder, without)
        with disk.unlogged():
            workload.before(run)
        with disk.logged():
            workload.drive(run)
        yield Disk(disk, _job(workload, run), folder)


def try_images(
    processes: ProcessPoolExecutor, made: Disk, per_epoch: int, most: int | None, *, control: bool = False
) -> Tally:
    """Recover from crash images; of a control from those without anything that was not flushed, until it is caught."""
    events = made.disk.events()
    wanted = list(only_flushed(events) if control else choices(events, per_epoch, random.Random(0)))
    if most is not None and len(wanted) > most:
        wanted = [wanted[n] for n in sorted(random.Random(0).sample(range(len(wanted)), most))]
    builder = Builder(made.disk.base, made.folder, events)
    try:
        return tried(
            processes,
            _built(builder, wanted, made.folder),
            lambda built: processes.submit(_recover_image, made.job, made.disk.system, *built),
            _ENOUGH if control else None,
        )
    finally:
        builder.close()


def _built(builder: Builder, wanted: Iterable[Image], folder: Path) -> Iterator[tuple[Path, int, bool]]:
    known = set()
    for number, image in enumerate(wanted):
        path = folder / f"crash-{number}.img"
        digest = builder.build(image, path)
        if (digest, image.end) in known:
            path.unlink()
            continue
        known.add((digest, image.end))
        yield path, image.end, len(known) % _BY_COMMAND_EVERY == 0


# --- rows


def run(long: bool) -> list[Row]:
    """Try all disks that this machine can have.

    Raises
    ------
    Impossible
        If it can have none.
    """
    return rows_of(("posix", *_MAKES), long)


def rows_of(disks: Iterable[str], long: bool) -> list[Row]:
    """Try some disks: posix, ext4, btrfs, xfs."""
    rows = []
    reasons = []
    with pool() as processes:
        for disk in disks:
            reason = what_is_missing(disk)
            if reason is not None:
                reasons.append(reason)
            elif disk == "posix":
                rows += posix_rows(processes, long)
            else:
                rows += system_rows(processes, disk, long)  # type: ignore[arg-type]
    if not rows:
        raise Impossible("; ".join(reasons))
    return rows


def what_is_missing(disk: str) -> str | None:
    """Say what this machine needs to have such a disk, if it lacks anything."""
    if not os.access("/dev/fuse", os.W_OK) or shutil.which("fusermount") is None:
        return "there is no FUSE"
    if importlib.util.find_spec("fuse") is None:
        return "package fusepy is missing"
    if disk == "posix":
        return None
    if os.geteuid() != 0 or not Path("/dev/loop-control").exists():
        return "loop devices need root"
    return None if shutil.which(f"mkfs.{disk}") else f"mkfs.{disk} is missing"


def posix_rows(
    processes: ProcessPoolExecutor,
    long: bool,
    names: Iterable[str] = tuple(WORKLOADS),
    most: int = _SAMPLE,
    controls: Collection[str] | None = None,
) -> list[Row]:
    """Try the disk that keeps nothing but what POSIX promises, and on it the controls.

    Parameters
    ----------
    long : all power cuts, not at most `most` of each workload and control
    controls : what is left out, in words; None: everything in turn
    """
    rows = []
    missed: dict[str, Tally] = {}
    for name in names:
        with traced(WORKLOADS[name]) as trace:
            tally = try_trace(processes, trace, None if long else most)
            rows.append(_row(f"what POSIX promises: {name}", tally))
            known = left_of(trace)
            for what, left_out in {**_controls(trace), **_sqlite_controls(trace)}.items():
                so_far = missed.setdefault(what, Tally())
                if so_far.wrong < _ENOUGH and (controls is None or what in controls):
                    so_far.include(try_trace(processes, left_out, None if long else most, known))
    for without in OTHERS if controls is None else ():
        with traced(WORKLOADS["scan"], (without,)) as trace:
            missed[without] = try_trace(processes, trace, None if long else most, {})
    rows += [
        _row(f"what POSIX promises, without {what}", tally, control=True)
        for what, tally in missed.items()
        if controls is None or what in controls
    ]
    return rows


def _controls(trace: Trace) -> dict[str, Trace]:
    present = set(trace.sites.values())
    groups = {**TOGETHER, **{words: (site,) for site, words in SITES.items()}}
    alone = {site for group in TOGETHER.values() for site in group}
    return {
        words: trace.without(*group)
        for words, group in groups.items()
        if present & set(group) and (len(group) > 1 or group[0] not in alone)
    }


def _sqlite_controls(trace: Trace) -> dict[str, Trace]:
    if "ledger.sqlite" not in trace.names.values():
        return {}
    files = {"ledger.sqlite": "the ledger", "ledger.sqlite-wal": "its log", "state": "the state's folder"}
    return {f"SQLite's fsync of {words}": trace.without_sqlite(name) for name, words in files.items()}


def system_rows(processes: ProcessPoolExecutor, system: FileSystem, long: bool) -> list[Row]:
    """Try a real file system, and on it those controls that it does not make good by itself."""
    rows = []
    for name, most in (_LONG if long else _SHORT)[system].items():
        with logged(system, WORKLOADS[name]) as disk:
            tally = try_images(processes, disk, _PER_EPOCH, most)
            rows.append(_row(f"{system}: {name}", tally))
    for without, name in _CONTROLS_OF_SYSTEMS if long else _CONTROLS_OF_SYSTEMS[:2]:
        if without == "spool._place#3" and system != "ext4":
            # There files are cloned, and what is left out would not be passed anyway.
            continue
        with logged(system, WORKLOADS[name], (without,)) as disk:
            tally = try_images(processes, disk, 0, None, control=True)
            rows.append(_row(f"{system}, without {SITES.get(without, without)}: {name}", tally, control=True))
    return rows


def _row(what: str, tally: Tally, *, control: bool = False) -> Row:
    note = "" if control else tally.first
    return Row("power", what, tally.points, tally.wrong, control, note)


def main(arguments: list[str] | None = None) -> int:
    """Try the disks asked for and print the table; 1 if anything is not as expected."""
    parser = argparse.ArgumentParser(description="Cut the power, and see what the product makes of what is left.")
    parser.add_argument("--long", action="store_true", help="everything, instead of a sample")
    parser.add_argument("--only", default="posix,ext4,btrfs,xfs", help="some of posix,ext4,btrfs,xfs")
    options = parser.parse_args(arguments)
    started = time.monotonic()
    rows = rows_of(options.only.split(","), options.long)
    print(markdown(rows))
    print(f"{sum(row.points for row in rows):,} power cuts in {time.monotonic() - started:.0f} s")
    return 0 if all(row.as_expected for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
