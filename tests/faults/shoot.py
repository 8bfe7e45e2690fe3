"""A day of shooting in fast motion: thousands of small shots into the real daemon, and every few seconds a fault.

The daemon is killed, stopped, frozen and started again; its state's disk is filled and freed; the card is taken out
and put in again; files come twice or broken; the program that takes alerts fails or hangs; clients attach and vanish;
decoders are killed. In the end every shot is in the ledger once, what the state knows equals a fold of the same shots
in the order of the ledger, in one go and without any store, and every alert has reached its program in one message.
Memory, descriptors and the state's size are sampled along the way.

    PYTHONPATH=daemon python tests/faults/shoot.py --shots 50000
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))

import numpy as np
from PIL import Image
from table import Row, markdown

from conftest import environment
from daemons import Daemon, memory_mb
from hotpixd.alerts import AlertSettings
from hotpixd.core.sensor import Sensor
from hotpixd.feed import FeedError
from hotpixd.intake.decode import decode
from hotpixd.store.spool import Spool
from hotpixd.store.state import State
from hotpixd.views import answers
from hotpixd.words import utc

SIDES = 96, 64
BODIES = "AB"
"""Two cameras, each with its card."""

BROKEN_SHARE = 0.01
DUPLICATE_SHARE = 0.01

AHEAD = 300
"""Shots that may wait for the daemon."""

CARD_HOLDS = 1500
"""Shots after which a card is cleared, once all on it are safe."""

STATE_MB = 512
"""Size of the state's file system."""

QUIET_EVERY = 5
"""Every so many stretches of the shoot, the daemon is left running, to see whether it grows."""


def picture(body: str, number: int) -> bytes:
    """Return a shot as PNG: another scene and other noise each time, the same defects."""
    rng = np.random.default_rng((BODIES.index(body), number))
    width, height = SIDES
    fixed = np.random.default_rng(BODIES.index(body))
    hot = fixed.integers(0, height, 9), fixed.integers(0, width, 9)
    coarse = rng.normal(100, 30, (height // 8 + 2, width // 8 + 2))
    scene = np.kron(coarse, np.ones((8, 8)))[:height, :width, None]
    samples = scene + rng.normal(0, 6, (height, width, 3))
    samples[hot] += 90
    out = io.BytesIO()
    Image.fromarray(np.clip(samples, 0, 255).astype(np.uint8)).save(out, "PNG", compress_level=1)
    return out.getvalue()


@dataclass
class Sample:
    """How the daemon was at one moment."""

    shots: int
    life: int
    """Of which start."""

    memory_mb: float
    workers_mb: float
    descriptors: int
    spool_mb: float
    """Shots in custody and generations."""

    ledger_mb: float


@dataclass
class Findings:
    """What came of a shoot."""

    shots: int
    faults: Counter[str]
    samples: list[Sample]
    wrong: list[str] = field(default_factory=list)
    seconds: float = 0.0
    alerts: int = 0
    messages: int = 0


class Shoot:
    """Cards, the daemon, and what happens to them."""

    def __init__(self, folder: Path, shots: int, seed: int, fault_every_s: float, **env: str) -> None:
        self.folder = folder
        self.shots = shots
        self.chance = random.Random(seed)
        self.fault_every_s = fault_every_s
        self.env = env
        self.faults: Counter[str] = Counter()
        self.samples: list[Sample] = []
        self.wrong: list[str] = []
        self.keys: dict[str, tuple[str, int] | None] = {}
        """Body and number by content; None for a broken file."""

        self.card = {body: folder / f"card-{body}" for body in BODIES}
        self.mounted = {body: folder / f"mnt-{body}" for body in BODIES}
        self.disk = folder / "disk"
        self.state = self.disk / "state"
        self.told = folder / "told"
        self.mode = folder / "mode"
        self.runtime = Path(tempfile.mkdtemp(prefix="hpx"))
        self.root = os.geteuid() == 0
        self.daemon: Daemon | None = None
        self.clients: list[Any] = []
        self.life = self.answered_life = 0
        self.written = 0
        self.taken_in = 0
        self.least_kills = 2
        """Faults go on until the daemon was killed so often while it was at work."""

        self.kills_only = False
        """For a product of which it is known what brings its fault to light."""

        self.patience_s = 180.0
        """How long the daemon may take for the last shots."""

        self.pace_s = 0.0
        """Least time per shot, so that a short shoot sees some faults."""

        self.progress = False
        self.later: list[tuple[float, Callable[[], None]]] = []
        """What is undone again, and when."""

    # --- the scene

    @contextlib.contextmanager
    def set_up(self) -> Iterator[Shoot]:
        """Cards, disk and configuration; all gone in the end."""
        for path in (*self.card.values(), *self.mounted.values(), self.disk, self.told):
            path.mkdir()
        try:
            if self.root:
                for body in BODIES:
                    self._put_in(body)
                _mount("-t", "tmpfs", "-o", f"size={STATE_MB}m,mode=700", "hotpixd-shoot", self.disk)
            self.mode.write_text("take")
            script = self.folder / "people"
            # It takes a message in one rename; it may say that it failed, or hang, before or after that.
            script.write_text(
                f"""#!/bin/sh
mode=$(cat {self.mode})
[ "$mode" = fail ] && exit 1
[ "$mode" = hang ] && sleep 3 && exit 1
cat > {self.told}/.$HOTPIXD_MESSAGE_ID.$$ && mv {self.told}/.$HOTPIXD_MESSAGE_ID.$$ {self.told}/$HOTPIXD_MESSAGE_ID.$$
[ "$mode" = late ] && sleep 2 && exit 1
exit 0
"""
            )
            script.chmod(0o755)
            config = {
                "sources": [
                    {"directory": str(self.mounted[body] if self.root else self.card[body]), "camera": body,
                     "settle_s": 0.2}
                    for body in BODIES
                ],
                "checkpoint": {"every_s": 5, "every_shots": 400, "idle_s": 3},
                "alerts": {"command": [str(script)], "gather_s": 0.5, "disk_free_mb": 20},
            }  # fmt: skip
            (self.folder / "config.yaml").write_text(json.dumps(config))
            yield self
        finally:
            for client in self.clients:
                client.close()
            if self.daemon is not None:
                self.daemon.close()
            if self.root:
                for path in (*self.mounted.values(), self.disk):
                    subprocess.run(["umount", "-l", path], capture_output=True)
            shutil.rmtree(self.runtime)

    def _put_in(self, body: str) -> None:
        _mount("--bind", self.card[body], self.mounted[body])

    # --- the daemon

    def start(self) -> None:
        """Start it. Shots go on meanwhile."""
        self.life += 1
        arguments = ("run", "--config", self.folder / "config.yaml")
        self.daemon = Daemon(self.state, self.runtime, *arguments, **self.env)

    def end(self, number: int) -> None:
        """End it, and look at what it has said."""
        daemon = self.daemon
        if daemon is None:
            return
        if daemon.process.poll() is None:
            # Frozen, it could not obey.
            daemon.process.send_signal(signal.SIGCONT)
        code = daemon.stop(number)
        self._look_at_the_end(daemon, code, {-signal.SIGKILL} if number == signal.SIGKILL else {0, -signal.SIGTERM})
        self.daemon = None

    def _look_at_the_end(self, daemon: Daemon, code: int, expected: set[int]) -> None:
        said = daemon.log
        full = "No space left" in said
        if code not in expected and not (full and code == 3):
            self.wrong.append(f"the daemon ended with {code}: {said[-2000:]}")
        if "Traceback" in said:
            self.wrong.append(f"a traceback: {said[said.index('Traceback') :][:2000]}")
        daemon.close()

    def keep_up(self) -> None:
        """Start it again if it has ended, as a service manager would."""
        if self.daemon is not None and self.daemon.process.poll() is not None:
            # It may end by itself only because the disk is full.
            self._look_at_the_end(self.daemon, self.daemon.process.returncode, set())
            self.faults["ended on a full disk"] += 1
            self.daemon = None
        if self.daemon is None:
            self.start()

    def look(self) -> bool:
        """Ask how far it is, and note how it is; False if it does not answer now."""
        daemon = self.daemon
        # It opens its feed then, after it has taken up what the last one left.
        if daemon is None or (self.answered_life != self.life and "state in" not in daemon.log):
            return False
        try:
            with contextlib.closing(daemon.client()) as client:
                # If it was frozen after its greeting, nobody but this thread thaws it.
                shots = client.ask("status", timeout_s=5.0)["shots"]
            self.taken_in = int(shots["folded"] + shots["refused"])
            self.answered_life = self.life
            pid = daemon.process.pid
            spooled = sum(_size(self.state / name) for name in ("spool", "sensors"))
            ledger = sum(path.stat().st_size for path in self.state.glob("ledger.sqlite*"))
            self.samples.append(
                Sample(
                    self.taken_in,
                    self.life,
                    memory_mb(pid),
                    sum(memory_mb(child) for child in _children(pid)),
                    len(list(Path(f"/proc/{pid}/fd").iterdir())),
                    spooled / 1e6,
                    ledger / 1e6,
                )
            )
        except (FeedError, OSError, AssertionError):
            # It has just been killed, or is frozen.
            return False
        return True

    # --- faults

    def fault(self, *, restarts: bool) -> None:
        """Let something happen."""
        names = ["freeze", "copy twice", "break", "deaf", "client", "kill a decoder"]
        if self.root:
            names += ["fill the disk", "take the card out"]
        if restarts:
            names += ["kill", "kill", "stop"]
        if restarts and (self.kills_only or self.faults["kill"] < self.least_kills):
            names = ["kill"]
        name = self.chance.choice(names)
        self.faults[name] += 1
        getattr(self, f"_{name.replace(' ', '_')}")()

    def _kill(self) -> None:
        self.end(signal.SIGKILL)

    def _stop(self) -> None:
        self.end(signal.SIGTERM)

    def _freeze(self) -> None:
        if self.daemon is None:
            return
        process = self.daemon.process
        process.send_signal(signal.SIGSTOP)
        self._undo_later(self.chance.uniform(0.3, 2.0), lambda: process.send_signal(signal.SIGCONT))

    def _fill_the_disk(self) -> None:
        ballast = self.disk / "ballast"
        free = shutil.disk_usage(self.disk).free
        left = self.chance.choice([0, 20_000, 200_000])
        with contextlib.suppress(OSError), ballast.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, max(free - left, 4096))
        self._undo_later(self.chance.uniform(1.0, 5.0), lambda: ballast.unlink(missing_ok=True))

    def _take_the_card_out(self) -> None:
        body = self.chance.choice(BODIES)
        if not os.path.ismount(self.mounted[body]):
            return
        # Busy while a file of it is read: as somebody who pulls it.
        if subprocess.run(["umount", "-l", self.mounted[body]], capture_output=True).returncode == 0:
            self._undo_later(self.chance.uniform(0.5, 3.0), lambda: self._put_in(body))

    def _copy_twice(self) -> None:
        body = self.chance.choice(BODIES)
        there = sorted(self.card[body].glob("*/IMG*.PNG"))[-40:]
        if there:
            path = self.chance.choice(there)
            self._write(path.with_name(f"COPY_{self.faults['copy twice']}_{path.name}"), path.read_bytes())

    def _break(self) -> None:
        body = self.chance.choice(BODIES)
        data = picture(body, 10**6 + self.faults["break"])
        data = data[: self.chance.randrange(200, len(data) // 2)]
        path = self.card[body] / "100CANON" / f"BAD_{self.faults['break']}.PNG"
        path.parent.mkdir(exist_ok=True)
        self._write(path, data)
        self.keys[Spool.hash_file(path)] = None

    def _deaf(self) -> None:
        self.mode.write_text(self.chance.choice(["take", "fail", "hang", "late"]))

    def _client(self) -> None:
        if self.daemon is None:
            return
        with contextlib.suppress(FeedError, AssertionError, OSError):
            client = self.daemon.client()
            self.clients.append(client)
            # It never reads.
            self._undo_later(self.chance.uniform(0.1, 8.0), client.close)

    def _kill_a_decoder(self) -> None:
        if self.daemon is None:
            return
        children = _children(self.daemon.process.pid, named="decode_worker")
        if children:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.chance.choice(children), signal.SIGKILL)

    def _undo_later(self, after_s: float, undo: Callable[[], None]) -> None:
        self.later.append((time.monotonic() + after_s, undo))

    def _undo(self, *, all_of_it: bool = False) -> None:
        now = time.monotonic()
        due = [(at, undo) for at, undo in self.later if all_of_it or at <= now]
        self.later = [entry for entry in self.later if entry not in due]
        for _, undo in due:
            with contextlib.suppress(ProcessLookupError):
                undo()

    # --- shots

    def _write(self, path: Path, data: bytes) -> None:
        """Write a file as a camera's program does: some at once, some piece by piece."""
        path.parent.mkdir(exist_ok=True)
        with path.open("wb") as file:
            if self.chance.random() < 0.05:
                file.write(data[: len(data) // 3])
                file.flush()
            file.write(data[file.tell() :])

    def shoot(self) -> None:
        """Take one."""
        self.written += 1
        body = self.chance.choice(BODIES)
        data = picture(body, self.written)
        path = self.card[body] / f"{100 + self.written // 500}CANON" / f"IMG_{self.written:05d}.PNG"
        self._write(path, data)
        self.keys[Spool.hash_file(path)] = body, self.written

    def clear_cards(self) -> None:
        """Delete what is on the cards; the last of it stays."""
        for body in BODIES:
            folders = sorted(self.card[body].iterdir())
            for folder in folders[:-1]:
                shutil.rmtree(folder)

    def catch_up(self, within_s: float) -> bool:
        """Wait until everything on the cards is in the ledger."""
        until = time.monotonic() + within_s
        while time.monotonic() < until:
            self._undo()
            self.keep_up()
            if self.look() and self.taken_in >= len(self.keys):
                return True
            time.sleep(0.3)
        return False

    def run(self) -> Findings:
        """Shoot to the end, and look."""
        began = time.monotonic()
        self.start()
        next_fault = began
        next_look = began
        stretch = max(self.shots // 20, 50)
        cleared = 0
        while self.written < self.shots or self.faults["kill"] < self.least_kills:
            self._undo()
            self.keep_up()
            now = time.monotonic()
            quiet = (self.written // stretch) % QUIET_EVERY == QUIET_EVERY - 1 and self.written < self.shots
            if now >= next_fault:
                # Some die as soon as they are started, most have done something first: on a slow machine it would
                # else never get on.
                at_work = self.answered_life == self.life or self.chance.random() < 0.02
                self.fault(restarts=at_work and not quiet)
                next_fault = now + self.chance.uniform(0.3, 1.7) * self.fault_every_s
            if now >= next_look:
                self.look()
                next_look = now + 1.0
                if self.progress:
                    print(f"{now - began:.0f} s: {self.written} shot, {self.taken_in} taken in", file=sys.stderr)
            behind = len(self.keys) - self.taken_in > AHEAD
            if behind or self.written == self.shots or self.written * self.pace_s > now - began:
                time.sleep(0.05)
                next_look = min(next_look, now + 0.5)
                continue
            for _ in range(10):
                if self.written < self.shots:
                    self.shoot()
            if self.written - cleared >= CARD_HOLDS:
                if self.catch_up(120.0):
                    self.clear_cards()
                cleared = self.written
        return self._finish(began)

    def _finish(self, began: float) -> Findings:
        self._undo(all_of_it=True)
        self.mode.write_text("take")
        if not self.catch_up(self.patience_s):
            said = "" if self.daemon is None else self.daemon.log[-2000:]
            self.wrong.append(f"{len(self.keys)} contents shot, {self.taken_in} taken in: {said}")
        # A new process does not wait with what the last one has tried in vain.
        self.end(signal.SIGTERM)
        self.start()
        assert self.daemon is not None
        self.daemon.wait_ready()
        until = time.monotonic() + 90
        while time.monotonic() < until and "waiting" in self._undelivered():
            time.sleep(0.5)
        self.end(signal.SIGTERM)
        findings = Findings(self.written, self.faults, self.samples, self.wrong)
        findings.seconds = time.monotonic() - began
        judge(self, findings)
        return findings

    def _undelivered(self) -> str:
        assert self.daemon is not None
        with (
            contextlib.suppress(FeedError, AssertionError, OSError),
            contextlib.closing(self.daemon.client()) as client,
        ):
            if not client.ask("status")["metrics"]["alerts_waiting"]:
                return ""
        return "waiting"


# --- what must be true in the end


def judge(shoot: Shoot, findings: Findings) -> None:
    """Compare the state with the shots, and the messages with the outbox."""
    wrong = findings.wrong
    with State(shoot.state, create=False) as state:
        checked = answers.verify(state)
        if not checked["ok"] or checked["waiting"]:
            wrong.append(f"verify: {checked['problems']}, {checked['waiting']} waiting")
        rows = state.ledger.rows("SELECT seq, key, verdict, reason, sensor_id FROM shot ORDER BY seq")
        verdicts = {key: verdict for _, key, verdict, _, _ in rows}
        if len(verdicts) != len(rows):
            wrong.append(f"{len(rows) - len(verdicts)} contents are in the ledger twice")
        if missing := shoot.keys.keys() - verdicts.keys():
            wrong.append(f"{len(missing)} shots are missing")
        if strange := verdicts.keys() - shoot.keys.keys():
            wrong.append(f"{len(strange)} in the ledger were never shot")
        for _, key, verdict, reason, _ in rows:
            expected = "refused" if shoot.keys.get(key) is None else "folded"
            if verdict != expected:
                wrong.append(f"{shoot.keys.get(key)} is {verdict}: {reason}")
        orders: dict[str, list[tuple[int, tuple[str, int]]]] = {}
        for seq, key, verdict, _, sensor_id in rows:
            origin = shoot.keys.get(key)
            if verdict == "folded" and origin is not None:
                orders.setdefault(sensor_id, []).append((seq, origin))
        with ProcessPoolExecutor(2) as pool:
            folded = dict(zip(orders, pool.map(folded_in_one_go, orders.values()), strict=True))
        digests = {sensor["id"]: sensor["digest"] for sensor in checked["sensors"]}
        wanted_alerts = set()
        for id_, (sensor, transitions) in folded.items():
            keys = state.ledger.frame_keys(id_)
            if digests.get(id_) != sensor.digest(keys):
                wrong.append(f"{id_} has another digest than its shots folded in one go")
            theirs = {(t.seq, t.site, t.change) for t in state.ledger.transitions(id_)}
            if theirs != {(seq, site, change) for seq, site, change, _ in transitions}:
                wrong.append(f"{id_} has other transitions than its shots folded in one go")
            wanted_alerts |= {
                f"{change}:{id_}:{site}:{seq}"
                for seq, site, change, kind in transitions
                if change in ("stable", "recovered") and kind in AlertSettings().kinds
            }
        alerts = state.ledger.rows("SELECT key, raised_at, topic, text FROM alert")
        told = {key for key, _, topic, _ in alerts if topic in ("stable", "recovered")}
        if told != wanted_alerts:
            wrong.append(f"{len(wanted_alerts - told)} transitions without alert, {len(told - wanted_alerts)} for none")
        _judge_messages(shoot, findings, {(utc(at), topic, text) for _, at, topic, text in alerts})


def _judge_messages(shoot: Shoot, findings: Findings, alerts: set[tuple[str, str, str]]) -> None:
    """Every alert in one message, that message delivered, and always with the same text."""
    texts: dict[str, str] = {}
    for path in shoot.told.glob("[!.]*"):
        text = path.read_text()
        id_ = path.name.rpartition(".")[0]
        if texts.setdefault(id_, text) != text:
            findings.wrong.append(f"message {id_} came with two texts")
    # Not by number: while the disk is full there is no ledger to give them one that stays.
    named = ("at", "topic", "text")
    heard = Counter(
        tuple(alert[name] for name in named) for text in texts.values() for alert in json.loads(text)["alerts"]
    )
    if twice := [id_ for id_, n in heard.items() if n > 1]:
        findings.wrong.append(f"{len(twice)} alerts came in two messages")
    if unheard := alerts - heard.keys():
        findings.wrong.append(f"{len(unheard)} alerts never came")
    # One of a full disk that was sent before a kill, without a ledger, is not remembered.
    if strange := {alert for alert in heard.keys() - alerts if alert[1] != "disk"}:
        findings.wrong.append(f"{len(strange)} alerts came that the outbox does not have")
    findings.alerts, findings.messages = len(alerts), len(texts)


def folded_in_one_go(order: list[tuple[int, tuple[str, int]]]) -> tuple[Sensor, set[tuple[int, int, str, str]]]:
    """Fold shots, given by row and origin, in memory and without any store; also say what changed."""
    sensor: Sensor | None = None
    transitions = set()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "shot.png"
        for seq, (body, number) in order:
            path.write_bytes(picture(body, number))
            frame = decode(path, None)
            sensor = sensor or Sensor(frame.sensor)
            transitions |= {(seq, t.site, t.change, t.kind) for t in sensor.fold(frame, seq).transitions}
    assert sensor is not None
    return sensor, transitions


def growth(samples: list[Sample]) -> tuple[list[str], list[str]]:
    """Say how first and last third of the shoot differ; and what of it is not bounded."""
    last = max((sample.shots for sample in samples), default=0)
    first_third = [s for s in samples if last * 0.05 < s.shots <= last / 3]
    last_third = [s for s in samples if s.shots > last * 2 / 3]
    if not first_third or not last_third:
        return ["| too few samples |"], ["there are too few samples"]
    table = ["| | first third | last third |", "| --- | --- | --- |"]
    unbounded = []
    for name, unit, spare in (
        ("memory_mb", "MB", 25.0),
        ("workers_mb", "MB", 25.0),
        ("descriptors", "", 10.0),
        ("spool_mb", "MB", 10.0),
    ):
        before, after = (statistics.median(getattr(s, name) for s in part) for part in (first_third, last_third))
        peaks = [max(getattr(s, name) for s in part) for part in (first_third, last_third)]
        label = {"memory_mb": "daemon", "workers_mb": "its decoders", "spool_mb": "spool and generations"}.get(
            name, name
        )
        table.append(
            f"| {label}, median (most) | {before:.1f} ({peaks[0]:.1f}) {unit} | {after:.1f} ({peaks[1]:.1f}) {unit} |"
        )
        if after > 1.25 * before + spare:
            unbounded.append(f"{label}: {before:.1f} to {after:.1f} {unit}")
    rates = []
    for part in (first_third, last_third):
        # The log beside it comes and goes: the least of each end is without.
        shots = part[-1].shots - part[0].shots
        rates.append(1e6 * (part[-1].ledger_mb - part[0].ledger_mb) / max(shots, 1))
    table.append(f"| ledger, bytes per shot | {rates[0]:.0f} | {rates[1]:.0f} |")
    table.append(f"| ledger at its end | {first_third[-1].ledger_mb:.1f} MB | {last_third[-1].ledger_mb:.1f} MB |")
    table.append(f"| starts of the daemon | {first_third[-1].life} | {last_third[-1].life} |")
    if last > 3000 and rates[1] > 1.5 * rates[0] + 500:
        unbounded.append(f"the ledger: {rates[0]:.0f} to {rates[1]:.0f} bytes per shot")
    return table, unbounded


def shot(
    shots: int,
    seed: int = 1,
    fault_every_s: float = 3.0,
    *,
    pace_s: float = 0.0,
    progress: bool = False,
    kills_only: bool = False,
    **env: str,
) -> Findings:
    """Shoot so many."""
    with tempfile.TemporaryDirectory(prefix="hotpixd-shoot-") as folder:
        shoot = Shoot(Path(folder), shots, seed, fault_every_s, **env)
        shoot.progress, shoot.pace_s, shoot.kills_only = progress, pace_s, kills_only
        if kills_only:
            # It may never get there.
            shoot.patience_s = 15.0
        with shoot.set_up():
            return shoot.run()


SABOTAGE = {
    "nothing is folded again after a kill": """
from hotpixd.store.ledger import Ledger
Ledger.rows_to_replay = lambda self, covers: []
""",
    "a replay raises its alerts again": """
import itertools, os
from dataclasses import replace
from hotpixd.store.outbox import Outbox
add, numbers = Outbox.add, itertools.count()
def add_anew(self, alerts, *, send):
    return add(self, [replace(a, key=f"{a.key} {os.getpid()}-{next(numbers)}") for a in alerts], send=send)
Outbox.add = add_anew
""",
}
"""Products that are wrong in one place, by what is wrong: code that runs before the daemon's own."""


def sabotaged(what: str, shots: int = 300, seed: int = 1) -> Findings:
    """Shoot with a product that is wrong on purpose."""
    with tempfile.TemporaryDirectory(prefix="hotpixd-shoot-") as folder:
        (Path(folder) / "sitecustomize.py").write_text(SABOTAGE[what])
        path = os.pathsep.join([folder, environment()["PYTHONPATH"]])
        return shot(shots, seed, 1.0, pace_s=0.05, kills_only=True, PYTHONPATH=path)


def row_of(findings: Findings, unbounded: list[str], what: str, *, control: bool = False) -> Row:
    """Return what the campaign's table says of a shoot."""
    note = f"{findings.alerts} alerts in {findings.messages} messages, {findings.seconds / 60:.1f} min"
    if control:
        note = findings.wrong[0].splitlines()[0][:90] if findings.wrong else ""
    return Row("shoot", what, findings.faults.total(), len(findings.wrong) + len(unbounded), control, note)


def run(long: bool) -> list[Row]:
    """Shoot a day, or a minute of it; then with products that are wrong."""
    findings = shot(50_000) if long else shot(300, fault_every_s=0.7, pace_s=0.05)
    table, unbounded = growth(findings.samples)
    for line in (*findings.wrong, *unbounded):
        print(line, file=sys.stderr)
    if long:
        print("\n".join(table), file=sys.stderr)
    rows = [row_of(findings, unbounded if long else [], f"{findings.shots:,} shots, a fault every few seconds")]
    return [*rows, *(row_of(sabotaged(what), [], what, control=True) for what in SABOTAGE)]


def main() -> None:
    """Shoot, and print what came of it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shots", type=int, default=50_000)
    parser.add_argument("--hours", type=float, help="hours of a shoot with a shot every 1.73 s, instead of --shots")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--fault-every", type=float, default=3.0, metavar="S")
    parser.add_argument("--progress", action="store_true", help="print how far it is, about once a second")
    given = parser.parse_args()
    shots = given.shots if given.hours is None else round(given.hours * 3600 / 1.728)
    findings = shot(shots, given.seed, given.fault_every, progress=given.progress)
    table, unbounded = growth(findings.samples)
    print("\n".join(table))
    print(f"\nFaults: {dict(sorted(findings.faults.items()))}")
    for line in (*findings.wrong, *unbounded):
        print(f"WRONG: {line}")
    row = row_of(findings, unbounded, f"{shots:,} shots, a fault every few seconds")
    print("\n" + markdown([row]))
    raise SystemExit(not row.as_expected)


def _mount(*arguments: object) -> None:
    subprocess.run(["mount", *map(str, arguments)], check=True, capture_output=True)


def _size(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):
            total += path.stat().st_size
    return total


def _children(pid: int, named: str = "") -> list[int]:
    found = []
    with contextlib.suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            with contextlib.suppress(OSError):
                found += [int(child) for child in (task / "children").read_text().split()]
    if named:
        found = [child for child in found if named.encode() in _command(child)]
    return found


def _command(pid: int) -> bytes:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    return b""


if __name__ == "__main__":
    main()
