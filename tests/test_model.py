"""The promise of a database, against a dictionary: any order of shots, faults and repairs, and nothing lost or doubled.

A hypothesis state machine drives store, loop and alerts as the service does, in real folders with real files, through
kills at any failpoint, power cuts, full disks, damage, older formats and backups. The dictionary says what each file
is; an oracle folds what the ledger accepted, in its order, in memory and without any store; and both are compared with
what the state says after every step.

A kill is a copy of the folder at that moment, at which the process goes no further. HOTPIXD_LONG=1 runs many more.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import random
import shutil
import sqlite3
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from hotpixd import alerts, archive
from hotpixd.alerts import Alerts, AlertSettings
from hotpixd.core.frame import Frame, ShotKind
from hotpixd.core.sensor import Sensor
from hotpixd.intake.decode import decode
from hotpixd.intake.files import FoundShot
from hotpixd.monitor import Fate, Monitor, Outcome
from hotpixd.simulate import VirtualSensor, write_series
from hotpixd.store import checkpoint, durable, spool
from hotpixd.store import ledger as ledger_module
from hotpixd.store.checkpoint import generations
from hotpixd.store.durable import StateError, StateFull
from hotpixd.store.ledger import Ledger, Received
from hotpixd.store.outbox import Outbox
from hotpixd.store.spool import Spool
from hotpixd.store.state import State
from strict_disk import DATABASE, StrictDisk

LONG = bool(os.environ.get("HOTPIXD_LONG"))

STEPS = [
    "after_link",
    "after_spool",
    "before_receive",
    "after_receive",
    "amid_generation",
    "before_generation_fsync",
    "before_generation_rename",
    "after_generation_rename",
    "after_generation_durable",
    "before_prune",
    "after_prune",
    "after_spool_drop",
    "before_send",
    "after_send",
]
"""Failpoints that these shots pass."""

CHECKPOINT_EVERY = 5
"""Shots, so that there are two generations soon."""

_GONE = "its copy in the spool is gone or was changed"

_NOT_OF_ONE_STATE = ("holds other frames", "lacks the last")
"""Of warnings: ledger and generations contradict each other. No fault of this machine can make them do that."""

_OLD_FORMATS = {
    1: """
CREATE TABLE shot(seq INTEGER PRIMARY KEY AUTOINCREMENT, key TEXT UNIQUE NOT NULL, name TEXT NOT NULL,
    path TEXT NOT NULL, size INTEGER NOT NULL, received_at TEXT NOT NULL,
    kind_given TEXT CHECK (kind_given IN ('light', 'dark')),
    verdict TEXT NOT NULL DEFAULT 'received' CHECK (verdict IN ('received', 'folded', 'refused', 'companion')),
    reason TEXT, sensor_id TEXT, kind TEXT, exposure_s REAL, iso REAL, sensor_temp_c REAL, taken_at TEXT,
    counted INTEGER, not_counted_because TEXT, lift REAL, samples_digest TEXT);
CREATE INDEX shot_by_verdict ON shot(verdict, sensor_id, seq);
CREATE TABLE sensor(number INTEGER PRIMARY KEY, id TEXT UNIQUE NOT NULL, identity TEXT NOT NULL);
CREATE TABLE observation(sensor INTEGER NOT NULL, seq INTEGER NOT NULL, site INTEGER NOT NULL, value_adu REAL,
    excess_adu REAL, events INTEGER, PRIMARY KEY (sensor, seq, site)) WITHOUT ROWID;
CREATE TABLE transition(sensor INTEGER NOT NULL, seq INTEGER NOT NULL, site INTEGER NOT NULL,
    change TEXT NOT NULL CHECK (change IN ('appeared', 'stable', 'recovered', 'dropped')), detail TEXT NOT NULL,
    PRIMARY KEY (sensor, seq, site, change)) WITHOUT ROWID;
""",
    2: """
ALTER TABLE shot ADD COLUMN camera_given TEXT;
CREATE TABLE seen(file BLOB PRIMARY KEY) WITHOUT ROWID;
CREATE TABLE alert(id INTEGER PRIMARY KEY AUTOINCREMENT, key TEXT UNIQUE NOT NULL, raised_at TEXT NOT NULL,
    topic TEXT NOT NULL, subject TEXT NOT NULL, text TEXT NOT NULL, detail TEXT NOT NULL, message INTEGER);
CREATE INDEX alert_by_message ON alert(message, id);
CREATE INDEX alert_by_subject ON alert(subject, id);
CREATE TABLE delivery(message INTEGER NOT NULL, channel TEXT NOT NULL, tries INTEGER NOT NULL DEFAULT 0,
    state TEXT NOT NULL DEFAULT 'due' CHECK (state IN ('due', 'sent', 'given up')),
    PRIMARY KEY (message, channel)) WITHOUT ROWID;
""",
    3: "ALTER TABLE seen ADD COLUMN shot BLOB;",
}
"""The formats of earlier ledgers, as they were: each adds to the one before it."""


# --- the shots


@dataclass(frozen=True)
class Film:
    """Files to be shot, in order."""

    lights: tuple[bytes, ...]
    others: tuple[bytes, ...]
    """Of another body."""

    darks: tuple[bytes, ...]
    pairs: tuple[tuple[bytes, bytes], ...]
    """Raw and JPEG."""


@cache
def film() -> Film:
    """Shots of small sensors with plain defects, so that a few make some stable."""
    with tempfile.TemporaryDirectory() as folder:

        def shots(serial: str, count: int, scene: Any, *formats: Any) -> list[tuple[bytes, ...]]:
            sensor = VirtualSensor(64, 48, hot=8, stuck=3, dead=2, seed=len(serial) + count, serial=serial)
            for one in formats:
                for _ in write_series(Path(folder) / serial, sensor, count, scene, one):
                    pass
            each = [sorted((Path(folder) / serial).glob(f"*.{one}")) for one in formats]
            return list(zip(*([path.read_bytes() for path in paths] for paths in each), strict=True))

        return Film(
            tuple(raw for (raw,) in shots("A", 24, "moving", "dng")),
            tuple(raw for (raw,) in shots("B", 12, "moving", "dng")),
            tuple(raw for (raw,) in shots("D", 6, "dark", "dng")),
            tuple((raw, jpeg) for raw, jpeg in shots("P", 6, "moving", "dng", "jpg")),
        )


@dataclass
class Expected:
    """What the dictionary says of a content."""

    verdicts: frozenset[str]
    """What may become of it."""

    kind: ShotKind | None = None
    """What the user said it is."""

    lossy: bool = False
    """A file of it was edited in place: the state may not be able to fold it again, but then says so."""

    frame: Frame | None = None


class Wrong(AssertionError):  # noqa: N818 - a finding
    """The state says something else than the dictionary."""


class Killed(BaseException):
    """The process was killed in the middle of what it did."""


class Oracle:
    """What a sensor is after some shots, folded in memory in one go."""

    def __init__(self) -> None:
        self._order: list[tuple[int, str]] = []
        self.sensor: Sensor | None = None
        self.transitions: set[tuple[int, int, str]] = set()
        self.observations: set[tuple[int, int]] = set()

    def bring_to(self, order: Sequence[tuple[int, str]], frame_of: Callable[[str], Frame]) -> Sensor:
        """Fold shots, given by row and key, or those of them that are not folded yet."""
        if self._order != list(order[: len(self._order)]) or self.sensor is None:
            self.__init__()  # type: ignore[misc]
        for seq, key in order[len(self._order) :]:
            frame = frame_of(key)
            self.sensor = self.sensor or Sensor(frame.sensor)
            report = self.sensor.fold(frame, seq)
            self.transitions |= {(seq, t.site, t.change) for t in report.transitions}
            self.observations |= {(seq, int(site)) for site in report.observed_sites}
            self._order.append((seq, key))
        assert self.sensor is not None
        return self.sensor


@dataclass
class Armed:
    """When the process is to die next."""

    step: str
    passes: int
    chance: random.Random | None
    """Of what a power cut takes; None: it is only killed."""


@dataclass
class Kept:
    """A backup, and what was true of it."""

    root: Path
    expected: set[str]
    delivered: dict[str, tuple[str, ...]]
    lossy: set[str]
    lost: bool


# --- the machine

PASSED: Counter[str] = Counter()
"""What happened in all runs of this process: a machine that never gets there proves nothing."""


class Machine(RuleBasedStateMachine):
    """A computer with a card, the program, and whoever gets its alerts."""

    def __init__(self) -> None:
        super().__init__()
        self.base = Path(tempfile.mkdtemp(prefix="hotpixd-model-", dir=_memory()))
        self.root = self.base / "state"
        self.card = self.base / "card"
        self.card.mkdir()
        self.disk = StrictDisk()
        self.expected: dict[str, Expected] = {}
        """By key: every content that was ever on the card."""

        self.acknowledged: set[str] = set()
        self.on_card: dict[Path, str] = {}
        """Contents of the files that are there."""

        self.waiting: list[FoundShot] = []
        """Files that the loop has not concluded."""

        self.delivered: dict[str, tuple[str, ...]] = {}
        """Keys of the alerts in each message that was taken, by its id."""

        self.lost = False
        """Whether the state ever said of a shot that it cannot fold it again: what came of it is undone then."""

        self.oracles: dict[str, Oracle] = {}
        self.backup: Kept | None = None
        self.armed: Armed | None = None
        self.next_root: Path | None = None
        self.cut = False
        """Whether the last death was a power cut."""

        self.full = False
        self.deaf = False
        self.count: Counter[str] = Counter()
        self.time = 1000.0
        self.up = self.woken = False
        self.patches = ExitStack()

    @initialize()
    def start(self) -> None:
        self._patch()
        self._live(self._open)

    def teardown(self) -> None:
        """Whatever was armed or full, in the end all is taken, told and saved."""
        try:
            # Not if a step has failed: hypothesis then wants to see that.
            if self.up and not sys.exc_info()[0]:
                self.armed, self.deaf = None, False
                self._make_room()
                self._live(self._take)
                for _ in range(3):
                    # What was tried in vain is tried again later.
                    self.time += 7200
                    self._live(self._tick)
                self._live(self._checkpoint)
                self.all_is_as_the_dictionary_says(finally_=True)
                self._stop()
                self._live(self._open)
                self.all_is_as_the_dictionary_says(finally_=True)
        finally:
            self._bury()
            self.patches.close()
            self.disk.close()
            shutil.rmtree(self.base)
            PASSED.update(self.count)
            PASSED.update(f"lost {sort}" for sort in self.disk.lost.elements())

    # --- what people do

    @rule(many=st.integers(1, 3))
    def shoot(self, many: int) -> None:
        for _ in range(many):
            data = self._next(film().lights, "light")
            if data is not None:
                self._write(f"IMG_{len(self.on_card):04d}.DNG", data, {"folded"})
        self._live(self._take)

    @rule(many=st.integers(2, 4))
    def shoot_with_another_body(self, many: int) -> None:
        for _ in range(many):
            data = self._next(film().others, "other")
            if data is not None:
                self._write(f"DSC_{len(self.on_card):04d}.DNG", data, {"folded"})
        self._live(self._take)

    @rule()
    def shoot_a_dark(self) -> None:
        data = self._next(film().darks, "dark")
        if data is not None:
            self._write(f"DRK_{len(self.on_card):04d}.DNG", data, {"folded"}, kind=ShotKind.DARK)
        self._live(self._take)

    @rule()
    def shoot_a_pair(self) -> None:
        pair = self._next(film().pairs, "pair")
        if pair is not None:
            stem = f"RJ_{len(self.on_card):04d}"
            raw = self._write(f"{stem}.DNG", pair[0], {"folded"})
            # Where the raw file is gone before the JPEG is looked at, the JPEG is a shot of its own.
            self._write(f"{stem}.JPG", pair[1], {"companion", "folded"}, raw=raw)
        self._live(self._take)

    @rule(cut=st.integers(10, 3000), which=st.integers(0, 23))
    def copy_a_broken_file(self, cut: int, which: int) -> None:
        self._write(f"BAD_{len(self.on_card):04d}.DNG", film().lights[which][:cut], {"refused"})
        self._live(self._take)

    @precondition(lambda self: self.on_card)
    @rule(which=st.integers(0, 99))
    def duplicate(self, which: int) -> None:
        path = self._pick(which)
        shot = self._write(f"DUP_{len(self.on_card):04d}{path.suffix}", path.read_bytes(), None)
        self.count["duplicate"] += self.on_card[shot] in self.acknowledged
        self._live(self._take)

    @precondition(lambda self: self.on_card)
    @rule(which=st.integers(0, 99))
    def delete_what_was_acknowledged(self, which: int) -> None:
        path = self._pick(which)
        if self.on_card[path] in self.acknowledged:
            path.unlink()
            del self.on_card[path]
            self.waiting = [shot for shot in self.waiting if shot.path != path]

    @precondition(lambda self: self.on_card)
    @rule(which=st.integers(0, 99))
    def edit_in_place(self, which: int) -> None:
        """A program writes a rating into the file: where the spool's copy is a link, that changes as well."""
        path = self._pick(which)
        known = self.expected[self.on_card[path]]
        if known.verdicts == {"refused"} or self.on_card[path] not in self.acknowledged:
            return
        for twin, key in self.on_card.items():
            # All links of one content: the spool may hold any of them.
            if key == self.on_card[path]:
                self.expected[key].lossy = True
                self.count["edited in place"] += twin == path
        with path.open("r+b") as file:
            # Behind its end: the same samples in another file, so it is a shot of its own.
            file.seek(0, os.SEEK_END)
            file.write(b"\0")
        self._know(path, known.verdicts, known.kind)
        self.waiting = [shot for shot in self.waiting if shot.path != path]
        self.waiting.append(FoundShot(path, kind=known.kind))

    @rule()
    def list_the_card_again(self) -> None:
        """As after a restart, with all that was seen forgotten."""
        offered = {shot.path for shot in self.waiting}
        for path, key in self.on_card.items():
            if path not in offered:
                raw = path.with_suffix(".DNG") if path.suffix == ".JPG" else None
                self.waiting.append(FoundShot(path, raw, self.expected[key].kind))
        self._live(self._take)

    # --- what the service does

    @rule()
    def checkpoint(self) -> None:
        self._live(self._checkpoint)

    @rule(later_s=st.sampled_from([0.0, 60.0]))
    def send_alerts(self, later_s: float) -> None:
        self.time += later_s
        self._live(self._tick)

    @rule()
    def restart(self) -> None:
        self._stop()
        self._live(self._open)

    # --- what goes wrong

    @rule(step=st.sampled_from(STEPS), passes=st.integers(1, 3), seed=st.none() | st.integers(0, 2**32))
    def die_at_a_step(self, step: str, passes: int, seed: int | None) -> None:
        """The next passes of a step end in a kill, or in a power cut."""
        self.armed = Armed(step, passes, None if seed is None else random.Random(seed))

    @rule(step=st.sampled_from(STEPS), seed=st.none() | st.integers(0, 2**32), later=st.booleans())
    def die_while_shooting(self, step: str, seed: int | None, later: bool) -> None:
        """The same, at once, and with a checkpoint to die in."""
        self.die_at_a_step(step, 1, seed)
        self.shoot(2)
        self._live(self._checkpoint)
        if later:
            self.kill()

    @rule()
    def kill(self) -> None:
        self._live(self._die)

    @rule(seed=st.integers(0, 2**32))
    def power_cut(self, seed: int) -> None:
        self._live(lambda: self._die(random.Random(seed)))

    @precondition(lambda self: not self.full)
    @rule()
    def fill_the_disk(self) -> None:
        self.full = True
        self._limit_pages()

    @precondition(lambda self: self.full)
    @rule()
    def make_room(self) -> None:
        self._make_room()

    @rule()
    def the_server_of_alerts_is_away(self) -> None:
        self.deaf = not self.deaf

    @rule(seed=st.integers(0, 2**32))
    def damage_the_newest_generation(self, seed: int) -> None:
        """Of a sensor with two: the older one and the spool are all that is needed."""
        self._stop()
        if not self.full:
            for folder in (self.root / "sensors").iterdir():
                found = generations(folder)
                if len(found) == 2 and _whole(found[0]) and _whole(found[1]):
                    data = bytearray(found[0].read_bytes())
                    data[random.Random(seed).randrange(len(data))] ^= 0x40
                    found[0].unlink()
                    found[0].write_bytes(data)
                    self.count["damaged"] += 1
            self.disk.settle(self.root)
        self._live(self._open)

    @rule(version=st.sampled_from(sorted(_OLD_FORMATS)))
    def was_written_by_an_older_version(self, version: int) -> None:
        """Its ledger is turned back to what that version would have had, and opened by this one."""
        self._stop()
        if self._turn_back(version):
            self.count[f"upgraded from {version}"] += 1
            self.disk.settle(self.root)
        self._live(self._open)

    @rule()
    def back_up(self) -> None:
        """Stopped, and the folder copied."""
        self._stop()
        if self.backup is not None:
            shutil.rmtree(self.backup.root)
        root = self.base / "backup"
        shutil.copytree(self.root, root)
        lossy = {key for key, known in self.expected.items() if known.lossy}
        with contextlib.closing(sqlite3.connect(root / DATABASE[0])) as db:
            known = {key for (key,) in db.execute("SELECT key FROM shot")}
        self.backup = Kept(root, known, dict(self.delivered), lossy, self.lost)
        self._live(self._open)

    @precondition(lambda self: self.backup is not None)
    @rule()
    def go_back_to_the_backup(self) -> None:
        """And look at the card again."""
        assert self.backup is not None
        self._stop()
        shutil.rmtree(self.root)
        shutil.copytree(self.backup.root, self.root)
        self.disk.settle(self.root)
        self.acknowledged = set(self.backup.expected)
        self.delivered = dict(self.backup.delivered)
        self.lost = self.backup.lost
        # Copied, its spool has links to nothing; but what was lossy then may have been lost then.
        for key, known in self.expected.items():
            known.lossy = known.lossy or key in self.backup.lossy
        self.count["gone back"] += 1
        self._live(self._open)
        self.list_the_card_again()

    # --- what must be true

    @invariant()
    def all_is_as_the_dictionary_says(self, finally_: bool = False) -> None:
        if not self.up:
            return
        try:
            # Reading brings what waits into the database: not while that is full.
            rows = self.state.ledger.rows("SELECT seq, key, verdict, reason, sensor_id FROM shot ORDER BY seq")
        except StateFull:
            return
        keys = Counter(key for _, key, *_ in rows)
        if twice := [key for key, n in keys.items() if n > 1]:
            raise Wrong(f"received more than once: {twice}")
        if missing := self.acknowledged - keys.keys():
            raise Wrong(f"acknowledged, and not in the ledger: {missing}")
        if strange := keys.keys() - self.expected.keys():
            raise Wrong(f"never shot: {strange}")
        for _, key, verdict, reason, _ in rows:
            known = self.expected[key]
            lost = known.lossy and verdict == "refused" and _GONE in reason
            on_its_way = verdict == "received" and self.monitor.in_flight
            if verdict not in known.verdicts and not lost and not on_its_way:
                raise Wrong(f"{key} is {verdict}, not one of {set(known.verdicts)}: {reason}")
        if finally_ and (left := set(self.on_card.values()) - keys.keys()):
            raise Wrong(f"on the card, and never taken: {left}")
        try:
            self._check_sensors(rows)
            self._check_alerts(finally_)
        except StateFull:
            return
        self._check_warnings()

    def _check_warnings(self) -> None:
        if contradictions := [w for w in self.monitor.warnings if any(words in w for words in _NOT_OF_ONE_STATE)]:
            raise Wrong(f"the state contradicts itself: {contradictions}")

    def _check_sensors(self, rows: Sequence[tuple[int, str, str, str | None, str | None]]) -> None:
        orders: dict[str, list[tuple[int, str]]] = {}
        for seq, key, verdict, _, sensor_id in rows:
            if verdict == "folded" and sensor_id is not None:
                orders.setdefault(sensor_id, []).append((seq, key))
        ledger = self.state.ledger
        for id_, order in orders.items():
            oracle = self.oracles.setdefault(id_, Oracle())
            wanted = oracle.bring_to(order, self._frame)
            kept = self.monitor.sensor(id_)
            if kept.sensor.frames != len(order):
                raise Wrong(f"{id_} has {kept.sensor.frames} frames of {len(order)} folded shots")
            if kept.sensor.digest(ledger.frame_keys(id_)) != wanted.digest(key for _, key in order):
                raise Wrong(f"{id_} has another digest than a fold of the same shots in one go")
            for (name, array), theirs in zip(wanted.save()[1].items(), kept.sensor.save()[1].values(), strict=True):
                if not np.array_equal(array, theirs, equal_nan=array.dtype.kind == "f"):
                    raise Wrong(f"{id_}: {name} differs from that of a fold of the same shots in one go")
            transitions = {(t.seq, t.site, t.change) for t in ledger.transitions(id_)}
            if transitions != oracle.transitions:
                raise Wrong(f"{id_}: other transitions: {sorted(transitions ^ oracle.transitions)}")
            observations = {(o.seq, o.site) for o in ledger.observations(id_)}
            if observations != oracle.observations:
                raise Wrong(f"{id_}: other observations: {sorted(observations ^ oracle.observations)}")

    def _check_alerts(self, finally_: bool) -> None:
        told = {}
        for key, message in self.state.ledger.rows("SELECT key, message FROM alert"):
            if key in told:
                raise Wrong(f"alerted more than once: {key}")
            told[key] = message
        wanted = {
            f"{t.change}:{id_}:{t.site}:{t.seq}"
            for id_ in self.state.ledger.sensors()
            for t in self.state.ledger.transitions(id_)
            if t.change in ("stable", "recovered") and t.detail["kind"] in AlertSettings().kinds
        }
        # Of a shot that cannot be folded again, the alert stays: it was true when it was raised. Where another shot
        # then shows the same of that site, nobody is told twice.
        silent, idle = wanted - told.keys(), told.keys() - wanted
        if silent := {key for key in silent if _but_for_its_shot(key) not in map(_but_for_its_shot, idle)}:
            raise Wrong(f"a transition without an alert: {silent}")
        if not self.lost and idle:
            raise Wrong(f"an alert without its transition: {idle}")
        self.count["alerts"] = max(self.count["alerts"], len(told))
        heard = Counter(key for keys in self.delivered.values() for key in keys)
        if twice := [key for key, n in heard.items() if n > 1]:
            raise Wrong(f"delivered under more than one id: {twice}")
        if made_up := heard.keys() - told.keys():
            raise Wrong(f"delivered, and not in the outbox: {made_up}")
        if finally_ and (unheard := told.keys() - heard.keys()):
            raise Wrong(f"never delivered: {unheard}")

    # --- how

    def _next(self, shots: Sequence[Any], sort: str) -> Any:
        n = self.count[f"shots: {sort}"]
        if n == len(shots):
            return None
        self.count[f"shots: {sort}"] += 1
        return shots[n]

    def _pick(self, which: int) -> Path:
        paths = sorted(self.on_card)
        return paths[which % len(paths)]

    def _write(
        self,
        name: str,
        data: bytes,
        verdicts: set[str] | None,
        *,
        kind: ShotKind | None = None,
        raw: Path | None = None,
    ) -> Path:
        """Put a file on the card, and into the dictionary if its content is new."""
        path = self.card / name
        while path.exists():
            path = path.with_stem(path.stem + "x")
        path.write_bytes(data)
        self._know(path, None if verdicts is None else frozenset(verdicts), kind)
        self.waiting.append(FoundShot(path, raw, self.expected[self.on_card[path]].kind))
        return path

    def _know(self, path: Path, verdicts: frozenset[str] | None, kind: ShotKind | None) -> None:
        key = Spool.hash_file(path)
        self.on_card[path] = key
        if key not in self.expected:
            assert verdicts is not None
            frame = None
            if verdicts != {"refused"}:
                frame = decode(path, kind)
            self.expected[key] = Expected(verdicts, kind, frame=frame)

    def _frame(self, key: str) -> Frame:
        frame = self.expected[key].frame
        if frame is None:
            raise Wrong(f"{key} is folded, and no picture")
        return frame

    def _live(self, work: Callable[[], None]) -> None:
        """Do something as the process; when it dies of that, start it again."""
        try:
            work()
        except StateFull:
            if not self.full:
                raise
            self.count["full"] += 1
            if not self.up:
                # It ends, and is started again when there is room.
                self._make_room()
        except Killed:
            self._rise()

    def _open(self) -> None:
        self.state = State(self.root)
        self.up = True
        self.disk.committed(self.root)
        self._limit_pages()
        try:
            self.alerts = Alerts(
                self.state.ledger,
                AlertSettings(command=("people",), gather_s=0.0),
                wake=self._wake,
                clock=lambda: self.time,
                now=self._now,
            )
            self.monitor = Monitor(
                self.state,
                decoders=_IN_THIS_PROCESS,
                checkpoint_every_s=math.inf,
                checkpoint_every_shots=CHECKPOINT_EVERY,
                clock=lambda: self.time,
            )
            # A death is of the whole process, and not of one of its threads.
            self.monitor._saver = _SaverAtOnce(1)
            for outcome in self.monitor.replay():
                self.count["replayed"] += 1
                self._after(outcome)
            self._check_warnings()
            self.up = True
        except StateFull:
            self._bury()
            raise

    def _stop(self) -> None:
        """End the process in good order; one that dies of it is started again, and stopped again."""
        while self.up:
            self._live(self._close)

    def _close(self) -> None:
        """As the service ends."""
        self.alerts.close()
        self.monitor.__exit__(None, None, None)
        with contextlib.suppress(StateFull):
            self.monitor.checkpoint()
        try:
            self.state.close()
        except StateFull:
            # It ends with the rows unwritten that waited: a replay writes them.
            self.count["closed while full"] += 1
        self.disk.committed(self.root)
        self.up = False

    def _take(self) -> None:
        """Hand the loop what waits on the card."""
        for outcome in self.monitor.process(list(self.waiting)):
            if outcome.fate is not Fate.UNREADABLE:
                self.waiting = [shot for shot in self.waiting if shot.path != outcome.path]
            self._after(outcome)
        # Files are gone, or are no longer what they were.
        self.waiting = [shot for shot in self.waiting if shot.path.exists()]

    def _after(self, outcome: Outcome) -> None:
        """What the service does after each shot, as far as it touches the state."""
        self.lost |= _GONE in (outcome.reason or "")
        if outcome.report is not None and outcome.sensor_id is not None and outcome.seq is not None:
            kept = self.monitor.sensor(outcome.sensor_id)
            self.alerts.folded(outcome.sensor_id, kept.id, kept.sensor.layout, outcome.report, outcome.seq)
        with contextlib.suppress(StateFull):
            self.alerts.work()

    def _tick(self) -> None:
        self.state.ledger.commit()
        self.woken = True
        while self.woken:
            # Whoever has sent something wakes the loop, and the next message is sent.
            self.woken = False
            self.alerts.work()

    def _wake(self) -> None:
        self.woken = True

    def _checkpoint(self) -> None:
        for outcome in self.monitor.process(()):
            self._after(outcome)
        self.monitor.checkpoint()

    def _make_room(self) -> None:
        self.full = False
        if self.up:
            self._limit_pages()
        else:
            self._live(self._open)
        self._live(self._checkpoint)

    def _limit_pages(self) -> None:
        if self.up:
            most = 1 if self.full else 2**30
            self.state.ledger._db.execute(f"PRAGMA max_page_count = {most}").fetchall()

    def _now(self) -> datetime:
        # Never twice the same: an alert raised again after going back to a backup is another one.
        self.count["clock"] += 1
        return datetime(2026, 1, 1, tzinfo=UTC) + timedelta(seconds=self.time, milliseconds=self.count["clock"])

    def _deliver(self, message: alerts.Message) -> str | None:
        if self.deaf:
            return "nobody there"
        keys = tuple(alert.key for alert in message.alerts)
        if self.delivered.setdefault(message.id, keys) != keys:
            raise Wrong(f"message {message.id} was delivered with other alerts than before")
        return None

    # --- dying

    def _passed(self, step: str) -> None:
        if self.armed is None or self.next_root is not None or step != self.armed.step:
            return
        self.armed.passes -= 1
        if self.armed.passes == 0:
            assert threading.current_thread() is threading.main_thread()
            chance, self.armed = self.armed.chance, None
            self.count[f"died {step}"] += 1
            self._die(chance)

    def _die(self, chance: random.Random | None = None) -> None:
        """Keep what the next process will find, and go no further."""
        self.cut = chance is not None
        self.count["power cut" if self.cut else "killed"] += 1
        self.next_root = self.base / f"state-{self.count['killed'] + self.count['power cut']}"
        if chance is None:
            self.disk.kill(self.root, self.next_root)
        else:
            self.disk.cut(self.root, self.next_root, chance)
        raise Killed

    def _rise(self) -> None:
        assert self.next_root is not None
        self._bury()
        shutil.rmtree(self.root)
        self.root, self.next_root = self.next_root, None
        if self.cut:
            # What is there after a power cut is on the disk.
            self.root.mkdir(exist_ok=True)
            self.disk.settle(self.root)
        self._live(self._open)

    def _bury(self) -> None:
        """Clear away the objects of a process that is dead. What they still write, nobody sees."""
        if not self.up:
            return
        self.up = False
        if hasattr(self, "monitor"):
            self.monitor.__exit__(None, None, None)
        self.state.ledger._db.close()
        os.close(self.state._lock)
        self.state._lock = -1

    # --- around the process

    def _patch(self) -> None:
        enter = self.patches.enter_context
        for name, module in list(sys.modules.items()):
            if name.startswith("hotpixd.") and hasattr(module, "failpoint"):
                enter(patch.object(module, "failpoint", self._passed))
        enter(patch.object(os, "fsync", lambda fd: self.disk.fsync(fd)))
        enter(patch.object(Ledger, "_commit", _noting(Ledger._commit, self._committed)))
        enter(patch.object(Ledger, "receive", _spied(Ledger.receive, self._received)))
        for module in (checkpoint, spool):
            enter(patch.object(module, "write_all", self._write_all))
        enter(patch.object(os, "statvfs", self._statvfs))
        enter(patch.object(os, "link", self._link))
        enter(patch.object(alerts, "_command_channel", lambda _: alerts._Channel("people", "people", self._deliver)))
        enter(patch.object(alerts, "threading", SimpleNamespace(Thread=_AtOnce)))

    def _committed(self, ledger: Ledger) -> None:
        (synchronous,) = ledger._db.execute("PRAGMA synchronous").fetchone()
        if synchronous >= 2:
            self.disk.committed(ledger.path.parent)

    def _received(self, shots: Sequence[Received]) -> None:
        self.acknowledged |= {shot.key for shot in shots}

    def _write_all(self, fd: int, data: bytes | memoryview) -> None:
        if self.full:
            raise OSError(28, "No space left on device")
        durable.write_all(fd, data)

    def _statvfs(self, path: Any) -> Any:
        found = _statvfs(path)
        return SimpleNamespace(f_bavail=0 if self.full else 1 << 30, f_frsize=found.f_frsize)

    def _link(self, *arguments: Any, **options: Any) -> None:
        if self.full:
            raise OSError(28, "No space left on device")
        _link(*arguments, **options)

    def _turn_back(self, version: int) -> bool:
        """Make the ledger one of an older format; False if that could not hold what it holds."""
        path = self.root / DATABASE[0]
        old = self.base / "old.sqlite"
        old.unlink(missing_ok=True)
        with contextlib.closing(sqlite3.connect(old, isolation_level=None)) as db:
            db.execute("ATTACH ? AS new", (str(path),))
            if version == 1 and db.execute("SELECT count(*) FROM new.alert").fetchone() != (0,):
                return False
            db.executescript("".join(_OLD_FORMATS[v] for v in range(1, version + 1)))
            for (table,) in db.execute("SELECT name FROM main.sqlite_master WHERE type = 'table'").fetchall():
                columns = ", ".join(row[1] for row in db.execute(f"PRAGMA main.table_info({table})"))
                if table == "sqlite_sequence":
                    db.execute("DELETE FROM main.sqlite_sequence")
                db.execute(f"INSERT INTO main.{table}({columns}) SELECT {columns} FROM new.{table}")
            db.execute(f"PRAGMA main.user_version = {version}")
        # The mark of what was acknowledged is as new as format 4, and would be of another ledger.
        for name in (*DATABASE, "acknowledged"):
            (self.root / name).unlink(missing_ok=True)
        old.rename(path)
        return True


_statvfs, _link = os.statvfs, os.link

# Starting a worker process takes longer than all of an example; its jail has its own tests.
_IN_THIS_PROCESS: Any = SimpleNamespace(decode=lambda path, kind=None, **_: decode(path, kind), close=lambda: None)


class _SaverAtOnce(ThreadPoolExecutor):
    """Has saved a checkpoint by the time it is asked to."""

    def submit(self, save: Callable[..., Any], *orders: Any, **_: Any) -> Future[Any]:
        done: Future[Any] = Future()
        done.set_result(save(*orders))
        return done


class _AtOnce:
    """A thread that has run by the time it is started."""

    def __init__(self, target: Callable[..., None], args: tuple[Any, ...] = (), **_: object) -> None:
        self._work = lambda: target(*args)

    def start(self) -> None:
        self._work()


def _memory() -> str | None:
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


def _but_for_its_shot(key: str) -> str:
    return key.rpartition(":")[0]


def _whole(path: Path) -> bool:
    try:
        checkpoint.verify(path)
    except checkpoint.GenerationError:
        return False
    return True


def _noting(commit: Callable[[Ledger], None], note: Callable[[Ledger], None]) -> Callable[[Ledger], None]:
    def committed(ledger: Ledger) -> None:
        commit(ledger)
        note(ledger)

    return committed


def _spied(
    receive: Callable[[Ledger, Sequence[Received]], list[int]], note: Callable[[Sequence[Received]], None]
) -> Callable[[Ledger, Sequence[Received]], list[int]]:
    def received(ledger: Ledger, shots: Sequence[Received]) -> list[int]:
        seqs = receive(ledger, shots)
        note(shots)
        return seqs

    return received


def run_machine(examples: int, steps: int, *, shrink: bool = True, derandomize: bool = not LONG) -> None:
    """Run the machine so often, with so many steps each. Without shrinking, the first finding is as good as any."""
    phases = [Phase.explicit, Phase.generate, *([Phase.shrink] if shrink else [])]
    run_state_machine_as_test(
        Machine,
        settings=settings(
            max_examples=examples,
            stateful_step_count=steps,
            derandomize=derandomize,
            database=None,
            deadline=None,
            phases=phases,
            report_multiple_bugs=False,
            suppress_health_check=list(HealthCheck),
        ),
    )


def follow(*steps: Callable[[Machine], object]) -> Counter[str]:
    """Take some steps, each followed by all checks, and return what happened."""
    machine = Machine()
    try:
        machine.start()
        for step in steps:
            step(machine)
            machine.all_is_as_the_dictionary_says()
    finally:
        machine.teardown()
    return machine.count + Counter(f"lost {sort}" for sort in machine.disk.lost.elements())


@pytest.mark.timeout(7200 if LONG else 300)
def test_any_order_of_shots_and_faults_agrees_with_a_dictionary() -> None:
    """After each step, and after the last one all is taken, told and saved."""
    PASSED.clear()
    run_machine(*((2000, 60) if LONG else (25, 30)))
    print(dict(sorted(PASSED.items())))
    wanted = {"killed", "power cut", "replayed", "alerts"}
    if LONG:
        wanted |= EVERYWHERE | {f"died {step}" for step in STEPS}
    assert not wanted - PASSED.keys()


EVERYWHERE = {"killed", "power cut", "replayed", "alerts", "full", "damaged", "duplicate", "edited in place"}
EVERYWHERE |= {f"upgraded from {version}" for version in _OLD_FORMATS}
EVERYWHERE |= {"gone back", "lost entry", "lost content", "lost removal"}


def test_a_tour_goes_everywhere() -> None:
    """Every fault that the machine knows does happen, and is survived: none of its rules is idle."""
    tour: list[Callable[[Machine], object]] = [
        lambda m: m.was_written_by_an_older_version(1),
        lambda m: m.shoot(3),
        lambda m: m.duplicate(0),
        lambda m: m.checkpoint(),
        lambda m: m.shoot(2),
        lambda m: m.checkpoint(),
        lambda m: m.damage_the_newest_generation(3),
        lambda m: m.was_written_by_an_older_version(2),
        lambda m: m.shoot(1),
        lambda m: m.was_written_by_an_older_version(3),
        lambda m: m.back_up(),
        lambda m: m.shoot_a_pair(),
        lambda m: m.copy_a_broken_file(500, 3),
        lambda m: m.shoot_a_dark(),
        lambda m: m.go_back_to_the_backup(),
        lambda m: m.kill(),
        lambda m: m.fill_the_disk(),
        lambda m: m.shoot(2),
        lambda m: m.make_room(),
        lambda m: m.the_server_of_alerts_is_away(),
        lambda m: m.shoot_with_another_body(4),
        *(lambda m, n=n: m.edit_in_place(n) for n in range(4)),
        lambda m: m.delete_what_was_acknowledged(1),
        *(
            step
            for n in range(6)
            # One that was linked when it died is taken before the next one dies.
            for step in (lambda m, n=n: m.die_while_shooting("after_link", n, False), lambda m: m.shoot(1))
        ),
        *(lambda m, n=n: m.die_while_shooting("before_generation_fsync", n, False) for n in range(4)),
        *(lambda m, step=step: m.die_while_shooting(step, None, True) for step in STEPS[:3]),
        lambda m: m.list_the_card_again(),
        lambda m: m.restart(),
    ]
    assert sorted(EVERYWHERE - follow(*tour).keys()) == []


# --- controls: a product that is wrong in one place must be found out


def _receive_late(ledger: Ledger, shots: Sequence[Received]) -> list[int]:
    """Return before the commit."""
    ledger._apply_pending()
    if not ledger._db.in_transaction:
        ledger._db.execute("BEGIN IMMEDIATE")
    return [ledger._receive_one(shot) for shot in shots]


def _receive_marked(ledger: Ledger, shots: Sequence[Received]) -> list[int]:
    """Write the mark first."""
    ledger._acknowledged(ledger.tag, ledger.last_seq + len(shots))
    return _receive(ledger, shots)


def _receive_anew(ledger: Ledger, shot: Received) -> int:
    """Do not look whether the key is known."""
    columns = "key, name, path, size, received_at, kind_given"
    row = (shot.key, shot.name, shot.path, shot.size, shot.received_at, shot.kind_given)
    return ledger._db.execute(f"INSERT INTO shot({columns}) VALUES (?, ?, ?, ?, ?, ?)", row).lastrowid or 0


def _find_only_new(ledger: Ledger, key: str) -> Any:
    """Know no shot that has its verdict, and of two rows the last."""
    return next(iter(ledger._shots("WHERE key = ? AND verdict = 'received' ORDER BY seq DESC", (key,))), None)


def _replay_all(ledger: Ledger, covers: Any) -> Any:
    return list(ledger._shots("WHERE verdict IN ('received', 'folded') ORDER BY seq"))


def _settle_all(state: State, covered_by_older: Any) -> int:
    """Let go of every shot that is folded, covered or not."""
    state.ledger.commit()
    rows = state.ledger.verdicts(list(state.spool.keys()))
    done = [key for key, (verdict, *_) in rows.items() if verdict == "folded"]
    state.spool.drop(done)
    return len(done)


def _settle_by_newer(monitor: Monitor, kept: Any) -> int:
    """Let go of what the newest generation covers, without waiting for the one after it."""
    written = archive.save(monitor._state, kept)
    monitor._covered_by_older[kept.id] = kept.covers
    return written


def _saving_first(state: State, kept: Any, **options: Any) -> Any:
    """Write the generation before the verdicts of its shots are committed."""
    state.ledger.commit = _nothing  # type: ignore[method-assign]
    try:
        return _Saving(state, kept, **options)
    finally:
        del state.ledger.commit


def _add_without_key(outbox: Outbox, raised: Any, *, send: Any) -> Any:
    """Raise an alert again when a replay raises it."""
    keyed = [replace(alert, key=f"{alert.key} {next(_numbers)}") for alert in raised]
    return _add(outbox, keyed, send=send)


def _compose_unsaved(raising: Alerts) -> None:
    """Send a message before what it consists of is committed."""
    _compose(raising)
    raising._unsaved = False


_numbers = itertools.count()
_add, _compose, _receive, _Saving = Outbox.add, Alerts._compose, Ledger.receive, archive.Saving


def _nothing(*_: object) -> None:
    pass


class _OsThatDoesNotFlush:
    """The module os, but for one function."""

    def __getattr__(self, name: str) -> Any:
        return _nothing if name == "fsync" else getattr(os, name)


def _not_full(schema: str) -> Callable[[Ledger, Path | None], None]:
    opened = Ledger._open

    def opens(ledger: Ledger, left: Path | None) -> None:
        opened(ledger, left)
        ledger._db.execute(f"PRAGMA synchronous = {schema}")

    return opens


def _mutations() -> dict[str, list[tuple[Any, str, Any]]]:
    twice = ledger_module._SCHEMA.replace("key TEXT UNIQUE NOT NULL", "key TEXT NOT NULL")
    return {
        "a shot is acknowledged before the commit": [(Ledger, "receive", _receive_late)],
        "a shot may be received twice": [
            (ledger_module, "_SCHEMA", twice),
            (Ledger, "_receive_one", _receive_anew),
            (Ledger, "find", _find_only_new),
        ],
        "a replay does not look at what is covered": [(Ledger, "rows_to_replay", _replay_all)],
        "the spool lets go of what is folded": [(State, "settle_spool", _settle_all)],
        "the spool lets go of what the newest generation covers": [(Monitor, "_save", _settle_by_newer)],
        "a generation is written before the verdicts of its shots": [(archive, "Saving", _saving_first)],
        "so it is, and nobody looks whether it is of this ledger": [
            (archive, "Saving", _saving_first),
            (archive, "_belongs", _nothing),
        ],
        "a shot is marked as acknowledged before its commit": [(Ledger, "receive", _receive_marked)],
        "what a replay writes again is not deleted first": [(Ledger, "delete_derived_after", _nothing)],
        "an alert has no key": [(Outbox, "add", _add_without_key)],
        "a message is sent before it is committed": [(Alerts, "_compose", _compose_unsaved)],
        "no fsync of the spool's folder": [(spool, "fsync_folder", _nothing)],
        "no fsync of what is linked": [(spool, "os", _OsThatDoesNotFlush())],
        "no fsync of a new generation": [(durable, "fsync_file", _nothing)],
        "SQLite need not flush": [(Ledger, "_open", _not_full("OFF"))],
    }


def _lost_to_power(cuts: int) -> list[Callable[[Machine], object]]:
    """Shots that only the state has, and cuts that take other things each time."""
    return [
        step
        for seed in range(cuts)
        for step in (
            lambda m: m.shoot(1),
            lambda m: m.delete_what_was_acknowledged(0),
            lambda m, seed=seed: m.power_cut(seed),
        )
    ]


_TWO_GENERATIONS: list[Callable[[Machine], object]] = [
    lambda m: m.shoot(2),
    lambda m: m.checkpoint(),
    lambda m: m.shoot(2),
    lambda m: m.checkpoint(),
    *[lambda m: m.delete_what_was_acknowledged(0)] * 4,
]

FOUND_OUT_BY: dict[str, list[Callable[[Machine], object]]] = {
    "a shot is acknowledged before the commit": [lambda m: m.shoot(1), lambda m: m.kill()],
    "a shot may be received twice": [lambda m: m.shoot(1), lambda m: m.list_the_card_again()],
    "a replay does not look at what is covered": [
        lambda m: m.shoot(2),
        lambda m: m.checkpoint(),
        lambda m: m.kill(),
    ],
    "the spool lets go of what is folded": [*_TWO_GENERATIONS, lambda m: m.damage_the_newest_generation(1)],
    "the spool lets go of what the newest generation covers": [
        *_TWO_GENERATIONS,
        lambda m: m.damage_the_newest_generation(1),
    ],
    "a generation is written before the verdicts of its shots": [
        lambda m: m.die_while_shooting("after_generation_rename", None, False)
    ],
    "so it is, and nobody looks whether it is of this ledger": [
        lambda m: m.die_while_shooting("after_generation_rename", None, False)
    ],
    "a shot is marked as acknowledged before its commit": [
        lambda m: m.die_while_shooting("before_receive", None, False)
    ],
    "what a replay writes again is not deleted first": [
        lambda m: m.shoot(2),
        lambda m: m.shoot(2),
        lambda m: m.edit_in_place(0),
        lambda m: m.kill(),
    ],
    "an alert has no key": [lambda m: m.shoot(4), lambda m: m.kill()],
    "a message is sent before it is committed": [
        lambda m: m.shoot(3),
        lambda m: m.die_while_shooting("after_send", None, False),
        lambda m: m.send_alerts(60.0),
    ],
    "no fsync of the spool's folder": _lost_to_power(6),
    "no fsync of what is linked": _lost_to_power(6),
    "no fsync of a new generation": [
        step for seed in range(5) for step in (*_TWO_GENERATIONS, lambda m, seed=seed: m.power_cut(seed))
    ],
    "SQLite need not flush": [lambda m: m.shoot(1), lambda m: m.power_cut(1)],
}
"""Steps that bring each mutation to light. At random the machine finds them too, in one second to two minutes."""


@pytest.mark.parametrize("mutation", _mutations())
def test_a_product_that_is_wrong_in_one_place_is_found_out(mutation: str) -> None:
    """Negative controls: the checks see what they are there to see, and only that."""
    follow(*FOUND_OUT_BY[mutation])
    with ExitStack() as stack:
        for owner, name, value in _mutations()[mutation]:
            stack.enter_context(patch.object(owner, name, value))
        with pytest.raises((Wrong, StateError)):
            follow(*FOUND_OUT_BY[mutation])
