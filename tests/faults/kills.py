"""SIGKILL before every call that changes the state, at every named step, and again while it recovers.

The real `hotpixd scan` and the real daemon (on a directory, and with a tethered camera) are killed before the Nth call
of each name, for N = 1, 2, ... until they no longer die, and at every failpoint. After each kill the shots that were
acknowledged are deleted from every second inbox, the same command is run again, and its end must be that of an
undisturbed run: digests, defects, transitions, observations, refusals, alerts, none lost and none doubled.

A kill does not lose what the kernel holds, so it cannot see a missing fsync; `power` does.
"""

from __future__ import annotations

import re
import sys
import tempfile
import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tracing
from stage import Command, Scan, Stage, Tether, Watch, Wrong, differs, undisturbed, workplace
from table import Impossible, Row

_SOURCES = Path(__file__).parents[2] / "daemon" / "hotpixd"


def _steps_of_rename(step: str) -> tuple[str, ...]:
    """Return the failpoints within `replace_durably`."""
    return tuple(f"{place}_{step}_{what}" for place, what in (
        ("before", "fsync"), ("before", "rename"), ("after", "rename"), ("after", "durable"),
    ))  # fmt: skip


STEPS = (
    "after_link", "after_spool", "before_receive", "after_receive", "amid_generation",
    *_steps_of_rename("generation"), "before_prune", "after_prune", "after_spool_drop",
)  # fmt: skip
"""Failpoints that every command passes."""

COPY_STEPS = _steps_of_rename("copy")
ALERT_STEPS = ("before_send", "after_send")
CAMERA_STEPS = ("after_album", *_steps_of_rename("arrival"))
SERIES_STEPS = _steps_of_rename("series")
"""Passed only while a series of darks is shot, which none of the commands here does."""
REPLAY_STEPS = ("amid_replay",)
"""Passed only by a replay; tests/test_monitor.py dies there."""

DECLARED_STEPS = _steps_of_rename("declared")
"""Passed only while defects are declared; tests/test_declared.py dies there."""
CLUSTER_STEPS = ("ahead_of_ledger",)
"""Passed only by a scan on a cluster; tests/test_cluster.py dies there."""

_PASSES = (1, 2, 3, 5)
"""The Nth pass of a failpoint at which to die."""

_AT_ONCE = 2


@dataclass(frozen=True)
class Point:
    """Where a command is killed."""

    call: str = ""
    """Before which call; empty: at a failpoint."""

    step: str = ""
    nth: int = 1

    again: str = ""
    """A failpoint at which the next run is killed, too; empty: it is not disturbed."""

    def __str__(self) -> str:
        return f"{self.call or self.step}:{self.nth}" + (f", then {self.again}" if self.again else "")


@dataclass
class Sweep:
    """Kills one command at many points."""

    command: Command
    folder: Path
    wanted: dict[str, Any]
    """The end of an undisturbed run."""

    paths: Sequence[str]
    """Where calls count, relative to the state."""

    keep_every: int = 2
    """Of the inboxes every so-manieth keeps what was acknowledged; the others do not."""

    quiet: bool = False
    """Do not print what is wrong: it is expected."""

    killed: int = 0
    killed_again: int = 0
    wrong: list[str] = field(default_factory=list)
    _ended: dict[tuple[str, str], int] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def kill_at(self, points: Iterable[Point]) -> None:
        """Kill at each of the points, two at a time."""
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            for finding in pool.map(self._at, enumerate(points)):
                if finding is not None:
                    if not self.quiet:
                        print(f"kills: {self.command.name}, {finding}", file=sys.stderr)
                    self.wrong.append(finding)

    def _at(self, numbered: tuple[int, Point]) -> str | None:
        number, point = numbered
        series = point.call, point.step
        if point.nth > self._ended.get(series, sys.maxsize):
            return None
        command, folder = self.command, self.folder / f"{number}-{threading.get_ident()}"
        try:
            command.prepare(folder)
            if point.call:
                fault = f"{point.call}:signal=KILL:when={point.nth}"
                ended = command.disturbed(folder, tracing.saboteur(folder / "state", self.paths, fault))
            else:
                ended = command.disturbed(folder, HOTPIXD_FAILPOINT=f"{point.step}:kill:{point.nth}")
            if "Traceback" in ended.said:
                return f"{point}: {ended.said[-500:]}"
            if not ended.killed:
                with self._lock:
                    self._ended[series] = min(point.nth, self._ended.get(series, sys.maxsize))
                return None
            with self._lock:
                self.killed += 1
            if number % self.keep_every:
                command.after_disturbance(folder)
            if point.again:
                again = command.disturbed(folder, HOTPIXD_FAILPOINT=f"{point.again}:kill")
                with self._lock:
                    self.killed_again += again.killed
            found = differs(command.recovered(folder), self.wanted)
            return None if found is None else f"{point}: {found}"
        except Wrong as error:
            return f"{point}: {error}"
        except Exception as error:
            # Whatever an undisturbed run would not have raised is wrong, and told.
            return f"{point}: {type(error).__name__}: {error}"
        finally:
            command.clear(folder)


def run(long: bool) -> list[Row]:
    """Kill scan and daemon; a sample of each unless `long`."""
    tracing.check()
    rows = []
    with workplace() as work:
        stage = Stage(work)
        rows += _scans(stage, work, long)
        rows += _daemons(stage, work, long)
        rows += _controls(work, long)
    return rows


def steps_of(points: Iterable[str], passes: Iterable[int] = _PASSES) -> list[Point]:
    """Return kills at failpoints, at several passes of each."""
    return [Point(step=step, nth=nth) for step in points for nth in passes]


def known_steps() -> set[str]:
    """Return the failpoints that the sources name."""
    found = set()
    for source in _SOURCES.rglob("*.py"):
        found.update(re.findall(r'failpoint\("(\w+)"\)', source.read_text()))
        for step in re.findall(r'step="(\w+)"', source.read_text()):
            found.update(_steps_of_rename(step))
    return found


def prepared(command: Command, work: Path) -> tuple[Sweep, tracing.Traced]:
    """Run a command twice without disturbance, once to see how it changes its state, once for its end."""
    place = work / re.sub(r"\W+", "-", f"{command.name} {command.stage.hook}")
    place.mkdir()
    log, seen = place / "trace", place / "seen"
    command.prepare(seen)
    ended = command.disturbed(seen, tracing.tracer(log))
    if ended.code not in (0, 1):
        raise RuntimeError(f"{command.name} ended with {ended.code} without any fault: {ended.said[-2000:]}")
    traced = tracing.traced(log, seen / "state")
    command.clear(seen)
    wanted = undisturbed(command, place / "undisturbed")
    return Sweep(command, place, wanted, traced.paths), traced


def swept(
    command: Command,
    work: Path,
    steps: Sequence[str],
    *,
    every: int = 1,
    pages: int = 1,
    passes: Sequence[int] = _PASSES,
    twice: int = 0,
    only: Sequence[str] | None = None,
) -> tuple[Sweep, list[Row]]:
    """Kill a command before its calls and at its steps.

    Parameters
    ----------
    every : take every so-manieth call of a name
    pages : the same for pages of the database and pieces of generations, of which there are many
    twice : how many of the failpoints to follow by a second kill, during the recovery
    only : the names of calls; None: all that change the state
    """
    sweep, traced = prepared(command, work)
    calls = {name: count for name, count in traced.calls.items() if only is None or name in only}
    steps_of_calls = {name: pages if name in ("write", "pwrite64") else every for name in calls}
    sweep.kill_at(Point(call=name, nth=n) for name, n in tracing.each(calls, steps_of_calls))
    before_calls = sweep.killed
    sweep.kill_at(steps_of(steps, passes))
    at_steps = sweep.killed - before_calls
    again = [Point(step=step, again=steps[-1 - n % len(steps)]) for n, step in enumerate(steps)]
    sweep.kill_at(again[:twice])
    wrong = len(sweep.wrong)
    before = f"{before_calls} before {', '.join(sorted(calls))}; " if calls else ""
    note = f"{before}{at_steps} at failpoints"
    if twice:
        note += f"; {sweep.killed_again} killed once more while recovering"
    return sweep, [Row("kills", f"{command.name}: SIGKILL", sweep.killed, wrong, False, note)]


def _scans(stage: Stage, work: Path, long: bool) -> list[Row]:
    rows: list[Row] = []
    if long:
        rows += swept(Scan(stage), work, STEPS, twice=6)[1]
        rows += swept(Scan(stage, begun=True), work, STEPS, pages=4, twice=12)[1]
    else:
        rows += swept(Scan(stage, begun=True), work, STEPS, every=9, pages=60, passes=(2,), twice=2)[1]
    with _other_disk(work) as elsewhere:
        if elsewhere is not None:
            command = Scan(stage, copied=elsewhere)
            passes = (1, 2, 9) if long else (2,)
            rows += swept(command, work, COPY_STEPS, every=1 if long else 20, passes=passes, only=("rename", "fsync"))[
                1
            ]
    return rows


def _daemons(stage: Stage, work: Path, long: bool) -> list[Row]:
    rows = []
    steps = (*STEPS, *ALERT_STEPS)
    if long:
        rows += swept(Watch(stage), work, steps, every=2, pages=12, passes=(1, 3, 9), twice=8)[1]
    else:
        rows += swept(Watch(stage), work, steps[-3:], every=25, pages=200, passes=(1,))[1]
    try:
        command = Tether(stage)
    except Impossible as reason:
        print(f"kills: no tethered camera: {reason}", file=sys.stderr)
        return rows
    if long:
        rows += swept(command, work, (*steps, *CAMERA_STEPS), every=4, pages=40, passes=(1,), twice=4)[1]
    else:
        rows += swept(command, work, (*CAMERA_STEPS, "after_receive"), every=100, pages=1000, passes=(1,), only=())[1]
    return rows


def _controls(work: Path, long: bool) -> list[Row]:
    """Kill commands without one of the safeguards: some of these must end wrong."""
    rows = []
    for hook, what, begun, calls, steps in (
        ("in_place", "generations are written in place", True, ("write",), ()),
        ("nothing_covered", "replays fold what generations hold already", False, (), ("after_generation_durable",)),
        ("let_go_early", "shots are let go of before their generation is durable", False, (), ("amid_generation",)),
    ):
        sweep, traced = prepared(Scan(Stage(work, hook), begun=begun), work)
        sweep.wanted = undisturbed(Scan(Stage(work), begun=begun), work / f"without-{hook}")
        counts = {name: traced.calls.get(name, 0) for name in calls}
        points = [Point(call=name, nth=n) for name, n in tracing.each(counts, {"write": 1 if long else 6})]
        rows.append(control(sweep, what, [*points, *steps_of(steps, (1, 2))]))
    sweep, _ = prepared(Watch(Stage(work, "alerts_again")), work)
    points = steps_of(("before_generation_rename",), (1, 2) if long else (2,))
    rows.append(control(sweep, "what a replay folds again is alerted again", points))
    return rows


def control(sweep: Sweep, what: str, points: Iterable[Point]) -> Row:
    """Kill a command that lacks a safeguard; no acknowledged shot is kept in its inbox."""
    sweep.keep_every = sys.maxsize
    sweep.quiet = True
    sweep.kill_at(points)
    return Row("kills", what, sweep.killed, len(sweep.wrong), True)


@contextmanager
def _other_disk(work: Path) -> Iterator[Path | None]:
    """Give a folder on another file system than the states; None if there is none."""
    for place in (Path(tempfile.gettempdir()), Path("/dev/shm"), Path("/var/tmp")):
        if place.is_dir() and place.stat().st_dev != work.stat().st_dev:
            with tempfile.TemporaryDirectory(prefix="hotpixd-faults-", dir=place) as folder:
                yield Path(folder)
            return
    yield None
