"""What the product does while the power may go, and what must be true of the disk afterwards.

A workload drives the real command on a disk that logs. Notes say what was
promised meanwhile: a shot received, a message handed over, a file of a camera
deleted. From any remains of that disk the product itself then recovers, which
must keep every promise made by that time, and end like a run without a power cut.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

HOOKS = Path(__file__).resolve().parent / "power_hooks"
sys.path.append(str(HOOKS))

import fsync_sites

import hotpixd
from conftest import HOTPIXD, environment, feed, run, told
from daemons import Daemon, eventually
from hotpixd.config import Config, load
from hotpixd.intake.arrivals import Arrivals, content_digest
from hotpixd.intake.darks import Journal
from hotpixd.intake.files import FoundShot, find_shots
from hotpixd.monitor import Monitor, Outcome
from hotpixd.service import Orders, Wake, _Service
from hotpixd.simulate import VirtualSensor, write_series
from hotpixd.store.durable import make_folder, make_parents
from hotpixd.store.ledger import Ledger
from hotpixd.store.spool import FICLONE
from hotpixd.store.state import State

PACKAGE = Path(hotpixd.__file__).parent
STATE = Path("new/folder/state")
"""Where the state is on the disk: the folders above it are made with it."""

_FRAMES = 9
_LINKED, _CLONED = "spool._place#3", "durable.replace_durably#1 copy"
_OF_DEFECTS = "SELECT key FROM alert WHERE topic IN ('stable', 'recovered') ORDER BY key"


class Lost(Exception):  # noqa: N818 - what happened, not a class of errors
    """A promise was broken, or the end is another one. The message is a sentence."""


class Note(NamedTuple):
    """Something that was promised."""

    at: int
    """Length of the disk's log by then."""

    what: str
    facts: dict[str, Any]


@dataclass(frozen=True)
class Run:
    """Where a workload runs."""

    disk: Path
    """Mount point of the disk that logs."""

    log: Path
    """Its log."""

    folder: Path
    """Intact: for notes, configurations, sockets."""

    shots: Path
    """See `make_shots`. Intact."""

    without: tuple[str, ...] = ()
    """Safeguards that are left out."""

    @property
    def state(self) -> Path:
        """The state."""
        return self.disk / STATE

    @property
    def files(self) -> list[Path]:
        """All shots, in their order."""
        return sorted(self.shots.iterdir())

    @contextlib.contextmanager
    def card(self) -> Iterator[list[Path]]:
        """Give the shots on a card that is pulled before the power goes: nothing can be read from it again."""
        card = self.folder / "card"
        shutil.copytree(self.shots, card)
        yield sorted(card.iterdir())
        shutil.rmtree(card)

    def env(self, kill: str | None = None) -> dict[str, str]:
        """Return what the command's environment needs beside the usual."""
        order = {"notes": str(self.folder / "notes"), "log": str(self.log), "without": self.without, "kill": kill}
        paths = os.pathsep.join((str(HOOKS), str(PACKAGE.parent)))
        return {"PYTHONPATH": paths, "TEST_POWER": json.dumps(order)}

    def hotpixd(self, *arguments: object, kill: str | None = None) -> None:
        """Run the command; it must end well, or be killed if it is to be."""
        done = run(*arguments, "--state", self.state, env=environment(**self.env(kill)))
        if done.returncode not in ((-9,) if kill else (0, 1)):
            raise RuntimeError(f"hotpixd {arguments[0]} ended with {done.returncode}: {done.stdout}{done.stderr}")

    def notes(self) -> list[Note]:
        """Return what was promised, and the messages that were handed over."""
        found = []
        for path in self.folder.glob("notes*"):
            for line in path.read_text("utf-8").splitlines():
                facts = json.loads(line)
                found.append(Note(facts.pop("at"), facts.pop("what"), facts))
        return sorted(found, key=lambda note: note.at)

    def receiver(self) -> list[str]:
        """Return a command that takes messages and notes them."""
        return [str(HOOKS / "take_message"), str(self.log), str(self.folder / "notes-messages")]


def make_shots(folder: Path) -> None:
    """Write a few tiny raw shots, one of them twice and one torn."""
    sensor = VirtualSensor(120, 90, hot=5, stuck=2, dead=2, seed=5, serial="V0005")
    for _ in write_series(folder, sensor, _FRAMES, "moving", "dng"):
        pass
    (folder / "truth.json").unlink()
    first, *_, last = sorted(folder.iterdir())
    shutil.copyfile(first, folder / "frame_0003 copy.dng")
    (folder / "frame_0006 torn.dng").write_bytes(last.read_bytes()[:20_000])


# --- workloads


class Workload:
    """Something that the product does. Also the simplest: scans of more and more files from another disk."""

    name = "scan"

    by_command = True
    """Whether the command itself can recover: it ends by itself, and what it tells is enough."""

    def before(self, run: Run) -> None:
        """Do what is to be on the disk, durably, before the log begins."""

    def drive(self, run: Run) -> None:
        """Do it."""
        with run.card() as files:
            for upto in (3, 6, None):
                run.hotpixd("scan", *files[:upto])

    def shots(self, run: Run) -> list[Path]:
        """Return the shots as they come from an intact disk."""
        return run.files

    def expected(self, run: Run) -> dict[str, Any]:
        """Return what an undisturbed run tells."""
        with tempfile.TemporaryDirectory(prefix="power-") as folder:
            return self.end_of(Path(folder), self.shots(run))

    def end_of(self, disk: Path, shots: list[Path], promised: Iterable[Note] = ()) -> dict[str, Any]:
        """Recover, take in all shots, and return what is told then.

        Raises
        ------
        Lost
            If a promise was broken.
        """
        with State(disk / STATE) as state, Monitor(state, cores=1) as monitor:
            for _ in monitor.replay():
                pass
            _check_received(state.ledger, promised)
            self.take_rest(disk, monitor)
            for _ in monitor.process(find_shots(map(str, shots)).shots):
                pass
            monitor.checkpoint()
            _check_undamaged(monitor)
        return told(disk / STATE)

    def end_by_command(self, disk: Path, shots: list[Path]) -> dict[str, Any]:
        """Recover with the command itself, in a process of its own."""
        done = run("scan", "--state", disk / STATE, *shots)
        if done.returncode not in (0, 1):
            raise Lost(f"the scan ended with {done.returncode}: {done.stderr}")
        return told(disk / STATE)

    def take_rest(self, disk: Path, monitor: Monitor) -> None:
        """Take in what lies on the disk itself."""

    def wrong(
        self, disk: Path, promised: list[Note], shots: list[Path], expected: dict[str, Any], by_command: bool = False
    ) -> str | None:
        """Recover and say what is wrong with it, if anything is."""
        try:
            end = (
                self.end_by_command(disk, shots)
                if by_command and self.by_command
                else self.end_of(disk, shots, promised)
            )
        except Exception as error:
            # Whatever the product raises: it was to recover.
            return f"{type(error).__name__}: {error}"[:300]
        return None if end == expected else "the end differs in " + ", ".join(k for k in end if end[k] != expected[k])


class KilledScan(Workload):
    """Scans that are killed at awkward moments and run again, before the power goes."""

    name = "killed scan"

    def drive(self, run: Run) -> None:
        """Kill at each of a few steps, the first time they come, and go on."""
        with run.card() as files:
            for kill in ("durable.make_parents", "durable.make_folder#2", "durable.replace_durably#2 copy"):
                _killed(run, kill, *files[:2])
            run.hotpixd("scan", *files[:4])
            for kill in ("durable.replace_durably#1 generation", "durable.replace_durably#2 generation"):
                _killed(run, kill, *files[:6])
            for upto in (6, None):
                run.hotpixd("scan", *files[:upto])


class LinkedScan(Workload):
    """Scans of files that somebody has just copied to the state's own disk: they are linked, or cloned, there."""

    name = "linked scan"

    def before(self, run: Run) -> None:
        """Make the folder of the files."""
        _made(run.disk / "inbox")

    def drive(self, run: Run) -> None:
        """Copy a few files, scan; the first two times be killed between the link (or clone) and its fsync."""
        placed = _CLONED if _clones(run.disk) else _LINKED
        for number, (first, last) in enumerate(((0, 3), (3, 6), (6, None))):
            # Not fsynced: that is the product's part.
            copies = [shutil.copyfile(file, run.disk / "inbox" / file.name) for file in run.files[first:last]]
            if number < 2:
                _killed(run, placed, *copies)
            run.hotpixd("scan", *copies)


class Watched(Workload):
    """The daemon on a directory, killed once, with a command that takes its messages."""

    name = "daemon"
    by_command = False

    def shots(self, run: Run) -> list[Path]:
        """Return all but the torn one, for whose rest the daemon would wait."""
        return [file for file in run.files if "torn" not in file.name]

    def drive(self, run: Run) -> None:
        """Let it fold a few shots, kill it, and let it fold the rest. Then the card is pulled."""
        inbox = run.folder / "inbox"
        inbox.mkdir()
        config = run.folder / "config.json"
        config.write_text(json.dumps(self.config(inbox, run.receiver())))
        for upto, number in ((5, 9), (None, 15)):
            for file in self.shots(run)[:upto]:
                if not (inbox / file.name).exists():
                    shutil.copyfile(file, inbox / file.name)
            with _daemon(run, config) as daemon:
                daemon.wait_ready()
                wanted = len({content_digest(file) for file in self.shots(run)[:upto]})
                daemon.wait_folded(wanted)
                eventually(lambda: not daemon.ask("status")["metrics"].get("alerts_waiting", 0), "messages are sent")
                time.sleep(1.0)
                daemon.stop(number)
        shutil.rmtree(inbox)

    @staticmethod
    def config(inbox: Path, receiver: list[str]) -> dict[str, Any]:
        """Return a configuration that does everything often."""
        return {
            "sources": [{"directory": str(inbox), "settle_s": 0.1}],
            "checkpoint": {"every_shots": 3, "idle_s": 1},
            "alerts": {"command": receiver, "gather_s": 0, "topics": ["stable", "recovered"], "disk_free_mb": 0},
        }

    def end_of(self, disk: Path, shots: list[Path], promised: Iterable[Note] = ()) -> dict[str, Any]:
        """Recover with the service itself."""
        with tempfile.TemporaryDirectory(prefix="power-") as name:
            here = Path(name)
            inbox = here / "inbox"
            inbox.mkdir()
            for shot in shots:
                shutil.copyfile(shot, inbox / shot.name)
            log = here / "log"
            log.touch()
            receiver = [str(HOOKS / "take_message"), str(log), str(here / "notes-messages")]
            plain = {**self.config(inbox, receiver), "state": str(disk / STATE), "cores": 1}
            plain["feed"] = {"socket": str(here / "feed")}
            path = here / "config.json"
            path.write_text(json.dumps(plain))
            config = load(path, environ={}, overrides={})
            wake = Wake()
            wanted = {content_digest(shot) for shot in shots}
            service = _Recovery(config, wake, promised, wanted)
            service.run()
            messages = [note.facts["message"] for note in promised if note.what == "message"]
            messages += [note.facts["message"] for note in Run(disk, log, here, here).notes()]
            with State(disk / STATE, create=False) as state:
                keys = [key for (key,) in state.ledger.rows(_OF_DEFECTS)]
            _check_messages(messages, keys)
            return {**told(disk / STATE), "alerts": keys}


class Tethered(Workload):
    """The daemon on a camera: files arrive, are saved as photos, and are deleted from the card."""

    name = "camera"

    def before(self, run: Run) -> None:
        """Make the folder of the photos."""
        _made(run.disk / "photos")

    def shots(self, run: Run) -> list[Path]:
        """Return the shots under the names they have on the card."""
        card = run.folder / "card"
        if not card.exists():
            card.mkdir()
            files = [file for file in run.files if "copy" not in file.name and "torn" not in file.name][:6]
            for number, file in enumerate(files, 1):
                shutil.copyfile(file, card / f"IMG_{number:04d}.DNG")
        return sorted(card.iterdir())

    def drive(self, run: Run) -> None:
        """Let the daemon fetch, save and delete all; killed twice. One photo is there already, from the user."""
        from ptpip_camera import LoopbackCamera

        shots = self.shots(run)
        with LoopbackCamera("generic") as camera:
            camera.capture_folder(run.folder / "card")
            for _ in shots:
                camera.shoot()
            if [Path(file.path).name for file in camera.files()] != [shot.name for shot in shots]:
                raise RuntimeError("the camera names its files otherwise")
            config = run.folder / "config.json"
            section = {
                "port": camera.port,
                "verify_after_s": 0.5,
                "save_to": str(run.disk / "photos"),
                "save_as": "{make}/{stem}/{name}",
                "delete": True,
            }
            plain = {"cameras": [section], "checkpoint": {"every_shots": 2, "idle_s": 1}}
            config.write_text(json.dumps(plain))
            for kill in ("album._folder_below", "album.save#3", None):
                if kill in run.without:
                    continue
                with _daemon(run, config, kill) as daemon:
                    if kill:
                        eventually(lambda: daemon.process.poll() is not None, f"killed at {kill}\n{daemon.log}", 60.0)
                        if daemon.process.wait() != -9:
                            raise RuntimeError(f"not killed at {kill}: {daemon.log}")
                        for photo in (run.disk / "photos").rglob("*.DNG"):
                            # Not fsynced: no user does that.
                            theirs = photo.parents[1] / shots[-1].stem
                            theirs.mkdir()
                            shutil.copyfile(shots[-1], theirs / shots[-1].name)
                            break
                        continue
                    daemon.wait_ready()
                    daemon.wait_folded(len(shots))
                    eventually(lambda: not camera.files(), f"all files are deleted\n{daemon.log}", 60.0)
                    daemon.stop()

    def take_rest(self, disk: Path, monitor: Monitor) -> None:
        """Take up what had arrived, as the daemon does."""
        for folder in (disk / STATE / "incoming").iterdir():
            left = [FoundShot(path, origin=file.path) for path, file in Arrivals(folder).left()]
            for _ in monitor.process(left):
                pass

    def wrong(
        self, disk: Path, promised: list[Note], shots: list[Path], expected: dict[str, Any], by_command: bool = False
    ) -> str | None:
        """Look for the photos first."""
        photos = {path.name: path for path in (disk / "photos").rglob("*.DNG")} if (disk / "photos").is_dir() else {}
        by_name = {shot.name: shot for shot in shots}
        for note in promised:
            if note.what == "deleted":
                name = note.facts["name"]
                if name not in photos or photos[name].read_bytes() != by_name[name].read_bytes():
                    return f"Lost: {name} was deleted from the camera, and the photo is not whole"
        arrived = {note.facts["key"] for note in promised if note.what == "arrived"}
        root = disk / STATE
        left = {content_digest(path) for path in (root / "incoming").rglob("*|*")} if root.is_dir() else set()
        if arrived - left:
            known = _keys_in(root)
            if arrived - left - known:
                return f"Lost: {len(arrived - left - known)} files that had arrived"
        return super().wrong(disk, promised, shots, expected, by_command)


class DarkSeriesKept(Workload):
    """The journal of a series of darks, written again and again."""

    name = "dark series"
    by_command = False

    _DRIVER = """
import sys
from pathlib import Path
from hotpixd.intake.darks import Journal, SeriesOrder
journal = Journal(SeriesOrder(frames=9), "V0005")
for taken in range(6):
    journal.taken = taken
    journal.write(Path(sys.argv[1]) / "series.json")
"""

    def before(self, run: Run) -> None:
        """Make the state, durably."""
        _made(run.state)

    def drive(self, run: Run) -> None:
        """Write it as the daemon does."""
        command = [sys.executable, "-c", self._DRIVER, str(run.state)]
        subprocess.run(command, env=environment(**run.env()), check=True)

    def expected(self, run: Run) -> dict[str, Any]:
        """Return what is known of it beforehand: nothing."""
        return {}

    def end_of(self, disk: Path, shots: list[Path], promised: Iterable[Note] = ()) -> dict[str, Any]:
        """Read it, as the daemon does at the next start."""
        path = disk / STATE / "series.json"
        journal = Journal.read(path)
        if journal is None and path.exists():
            raise Lost("the journal cannot be read")
        taken = max((note.facts["taken"] for note in promised if note.what == "series"), default=-1)
        if (-1 if journal is None else journal.taken) < taken:
            raise Lost(f"the journal says {journal and journal.taken}, and {taken} darks were taken")
        return {}


WORKLOADS: dict[str, Workload] = {
    workload.name: workload
    for workload in (Workload(), KilledScan(), LinkedScan(), Watched(), Tethered(), DarkSeriesKept())
}


@contextlib.contextmanager
def _daemon(run: Run, config: Path, kill: str | None = None) -> Iterator[Daemon]:
    # Paths of sockets must be short.
    with tempfile.TemporaryDirectory(prefix="hpx") as runtime:
        daemon = Daemon(run.state, Path(runtime), "run", "--config", config, **run.env(kill))
        try:
            yield daemon
        finally:
            daemon.close()


def _made(folder: Path) -> None:
    """Make a folder, durably."""
    make_parents(folder)
    make_folder(folder)


def _clones(folder: Path) -> bool:
    """Tell whether the file system of a folder can clone files."""
    with tempfile.TemporaryFile(dir=folder) as one, tempfile.TemporaryFile(dir=folder) as other:
        try:
            fcntl.ioctl(one, FICLONE, other.fileno())
        except OSError:
            return False
    return True


def _killed(run: Run, kill: str, *files: Path) -> None:
    """Scan and be killed at a step. If that is one of those left out, it is done to its end."""
    if kill in run.without:
        return
    done = subprocess.run(
        [*HOTPIXD, "scan", "--state", str(run.state), *map(str, files)],
        env=environment(**run.env(kill)),
        capture_output=True,
        text=True,
        timeout=120,
    )
    if done.returncode != -9:
        raise RuntimeError(f"not killed at {kill}: {done.stdout}{done.stderr}")


# --- promises


def _check_received(ledger: Ledger, promised: Iterable[Note]) -> None:
    """Nothing that was acknowledged may be missing right after the replay."""
    received: set[str] = set()
    names: set[str] = set()
    for note in promised:
        received.update(note.facts["keys"] if note.what == "received" else ())
        names.update([note.facts["name"]] if note.what == "done" else ())
    known = {key: verdict for key, (verdict, _, _) in ledger.verdicts(received).items()}
    missing = [key for key in received if known.get(key, "received") == "received"]
    if missing:
        raise Lost(f"{len(missing)} of {len(received)} shots that were acknowledged are missing")
    have = {name.removesuffix(" copy") for (name,) in ledger.rows("SELECT name FROM shot")}
    if gone := {name for name in names if "copy" not in name} - have:
        raise Lost(f"the source was told that {sorted(gone)} are done, and they are missing")


def _check_undamaged(monitor: Monitor) -> None:
    """A power cut damages nothing."""
    if monitor.warnings:
        raise Lost(f"found damaged: {monitor.warnings[0]}")


def _check_messages(messages: list[dict[str, Any]], keys: list[str]) -> None:
    """Each alert is told, and in one message only, though that may come twice."""
    told_in: dict[str, set[str]] = {}
    told_by: dict[str, set[str]] = {}
    for message in messages:
        of = {
            f"{alert['topic']}:{alert['detail']['sensor']}:{alert['detail']['site']}:{alert['detail']['seq']}"
            for alert in message["alerts"]
        }
        if told_by.setdefault(message["id"], of) != of:
            raise Lost(f"message {message['id']} was sent with two contents")
        for key in of:
            told_in.setdefault(key, set()).add(message["id"])
    for key in keys:
        if len(told_in.get(key, ())) != 1:
            raise Lost(f"alert {key} is in {len(told_in.get(key, ()))} messages")


def _keys_in(root: Path) -> set[str]:
    if not (root / "ledger.sqlite").exists():
        return set()
    with State(root) as state:
        return {key for (key,) in state.ledger.rows("SELECT key FROM shot")}


class _Recovery(_Service):
    """The service, until it has taken in all shots and all messages are gone."""

    def __init__(self, config: Config, wake: Wake, promised: Iterable[Note], wanted: set[str]) -> None:
        super().__init__(config, lambda: config, wake, _UntilDone(wake, self))
        self._promised = promised
        self._wanted = wanted
        self._asked_at = 0.0
        self._done = False
        self._started = time.monotonic()
        self.warnings: list[str] = []

    def _replay(self) -> None:
        super()._replay()
        _check_received(self._ledger, self._promised)

    def _after(self, outcome: Outcome) -> None:
        super()._after(outcome)
        self._asked_at = 0.0

    def _tick(self) -> None:
        self.warnings += self._monitor.warnings
        if self.warnings:
            raise Lost(f"found damaged: {self.warnings[0]}")
        super()._tick()

    def is_done(self) -> bool:
        """Tell whether there is nothing left to do."""
        now = time.monotonic()
        if self._done or now - self._asked_at < 0.02 or not self._watching:
            return self._done
        self._asked_at = now
        if now - self._started > 60:
            raise Lost("the daemon does not come to an end within a minute")
        verdicts = self._ledger.verdicts(self._wanted)
        concluded = sum(verdict != "received" for verdict, _, _ in verdicts.values())
        self._done = concluded == len(self._wanted) and not self._alerts.waiting
        return self._done


class _UntilDone(Orders):
    def __init__(self, wake: Wake, service: _Recovery) -> None:
        self._service = service
        super().__init__(wake)

    @property
    def stop(self) -> bool:  # type: ignore[override]
        return self._service.is_done()

    @stop.setter
    def stop(self, value: bool) -> None:
        pass


@contextlib.contextmanager
def scratch(name: str) -> Iterator[Path]:
    """Give a folder in memory, removed afterwards."""
    place = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix=f"power-{name.replace(' ', '-')}-", dir=place) as folder:
        yield Path(folder)


def all_sites() -> set[str]:
    """Return every place of the product at which something is fsynced."""
    return fsync_sites.all_sites(PACKAGE)


def reference(run: Run, workload: Workload) -> dict[str, Any]:
    """Return what an undisturbed run tells, by the plain way of the other tests where it can be had."""
    expected = workload.expected(run)
    if type(workload) is Workload:
        with tempfile.TemporaryDirectory(prefix="power-") as folder:
            feed(Path(folder) / "state", *run.files)
            assert told(Path(folder) / "state") == expected
    return expected
