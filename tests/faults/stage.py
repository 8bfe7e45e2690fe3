"""What the harnesses disturb: a small inbox, the commands over it, and what an undisturbed run ends with.

The inbox holds twelve raw shots of one body, two RAW+JPEG pairs of another, a duplicate and a broken file. Each run
gets its own copy, as after a disturbance the files that were acknowledged may be deleted, like those of a user who
was told that they are safe.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import sqlite3
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from table import Impossible

from conftest import HOTPIXD, environment, feed, told
from daemons import Daemon
from hotpixd.feed import FeedError
from hotpixd.simulate import VirtualSensor, write_series
from hotpixd.store.spool import Spool
from ptpip_camera import LoopbackCamera

HOOKS = Path(__file__).with_name("hooks")

HANGS_AFTER_S = 120.0
"""A scan takes 1.3 s, some more under strace on a busy machine."""

HUNG = -signal.SIGALRM
"""Exit code of a scan that hung."""

_GATHERED = "#!/bin/sh\ncat >> '{mailbox}' && echo >> '{mailbox}'\n"


class Wrong(Exception):  # noqa: N818 - what a harness is looking for
    """A run ended otherwise than an undisturbed one. The message says how."""


@contextmanager
def workplace() -> Iterator[Path]:
    """Give a folder for states, in memory if there is room: a kill does not care for disks."""
    memory = Path("/dev/shm")
    roomy = memory.is_dir() and shutil.disk_usage(memory).free > 1 << 30
    folder = Path(tempfile.mkdtemp(prefix="hotpixd-faults-", dir=memory if roomy else None))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def make_inbox(folder: Path) -> Path:
    """Write the shots that all runs get."""
    folder.mkdir()
    body = VirtualSensor(200, 150, hot=8, stuck=3, dead=3, seed=1, serial="V0001")
    other = VirtualSensor(200, 150, hot=8, stuck=3, dead=3, seed=3, serial="V0003")
    with tempfile.TemporaryDirectory() as made:
        a, b = Path(made) / "a", Path(made) / "b"
        for _ in write_series(a, body, 12, "moving", "dng"):
            pass
        for file_format in ("dng", "jpg"):
            for _ in write_series(b, other, 2, "moving", file_format):  # type: ignore[arg-type]
                pass
        for prefix, source in (("a", a), ("b", b)):
            for shot in sorted(source.glob("frame_*")):
                shutil.copyfile(shot, folder / f"{prefix}_{shot.name}")
    shutil.copyfile(folder / "a_frame_0004.dng", folder / "a_frame_0010_copy.dng")
    (folder / "a_frame_0010_torn.dng").write_bytes((folder / "a_frame_0011.dng").read_bytes()[:9000])
    return folder


@dataclass(frozen=True)
class Ended:
    """How a disturbed command ended."""

    code: int
    """Negative: minus the signal that killed it."""

    said: str
    """On stderr."""

    @property
    def killed(self) -> bool:
        """Whether it was killed by what disturbs it."""
        return self.code == -signal.SIGKILL


def acknowledged(root: Path) -> set[Path]:
    """Return the paths of the shots in a ledger, without touching it: a look must not repair anything."""
    ledger = root / "ledger.sqlite"
    if not ledger.exists():
        return set()
    with tempfile.TemporaryDirectory() as copy:
        for part in root.glob("ledger.sqlite*"):
            shutil.copyfile(part, Path(copy) / part.name)
        with closing(sqlite3.connect(Path(copy) / ledger.name)) as db:
            try:
                return {Path(os.fsdecode(path)) for (path,) in db.execute("SELECT path FROM shot")}
            except sqlite3.OperationalError as error:
                if "no such table" in str(error):
                    return set()
                raise


def let_go(root: Path, inbox: Path) -> None:
    """Delete from an inbox what was acknowledged, as its user may: a pair when both files are."""
    safe = {path.name for path in acknowledged(root)}
    for path in list(inbox.iterdir()):
        beside = [other.name for other in inbox.iterdir() if other.stem == path.stem]
        if safe.issuperset(beside):
            for name in beside:
                (inbox / name).unlink(missing_ok=True)


def final(root: Path, folder: Path) -> dict[str, Any]:
    """Return what a state tells in the end, in a form that compares; where it lies does not matter.

    Raises
    ------
    Wrong
        If it is damaged, or something unfinished was left behind.
    """
    try:
        known = told(root)
    except AssertionError as error:
        raise Wrong(f"the state is damaged: {error}") from error
    damaged = sorted(path.name for path in (root / "damaged").glob("gen-*"))
    if damaged:
        # Though the older one makes up for it: neither a kill nor a full disk damages a generation.
        raise Wrong(f"generations were set aside: {damaged}")
    left = [str(path.relative_to(root)) for path in root.rglob("*.tmp")]
    if left:
        raise Wrong(f"unfinished files were left: {left}")
    text = repr(sorted((part, value) for part, value in known.items()))
    return {"told": text.replace(str(folder), "")}


def differs(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> str | None:
    """Say in which parts two ends differ; None if they are equal."""
    parts = [part for part in {**found, **wanted} if found.get(part) != wanted.get(part)]
    if not parts:
        return None
    told_of = []
    for part in parts:
        one, other = repr(found.get(part)), repr(wanted.get(part))
        at = next((n for n, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1]), 0)
        told_of.append(
            f"{part}: ...{one[max(at - 60, 0) : at + 80]}... is not ...{other[max(at - 60, 0) : at + 80]}..."
        )
    return "; ".join(told_of)


class Stage:
    """The shots, and states to begin with.

    Parameters
    ----------
    folder : for all of it
    hook : a safeguard to take out of the commands, see `hooks`; empty: none
    """

    def __init__(self, folder: Path, hook: str = "") -> None:
        self.folder = folder
        self.hook = hook
        self.inbox = folder / "shots"
        if not self.inbox.exists():
            make_inbox(self.inbox)

    def environment(self, **changes: str) -> dict[str, str]:
        """Return what the commands get: with the hook on their path, if there is one."""
        if not self.hook:
            return environment(**changes)
        plain = environment(HOTPIXD_TEST_FAULTS=self.hook, **changes)
        return {**plain, "PYTHONPATH": os.pathsep.join([str(HOOKS), plain["PYTHONPATH"]])}

    def begun(self) -> Path:
        """Return a state with two generations and shots to go: a command on it passes every step there is."""
        root = self.folder / f"begun-{self.hook}"
        if not root.exists():
            shots = sorted(self.inbox.glob("a_*"))
            making = self.folder / f"making-{self.hook}"
            making.mkdir()
            for part in (shots[:4], shots[4:8]):
                for shot in part:
                    os.link(shot, making / shot.name)
                if self.hook:
                    command = [*HOTPIXD, "scan", "--state", str(root), str(making)]
                    subprocess.run(command, env=self.environment(), check=True, capture_output=True)
                else:
                    feed(root, making)
            shutil.rmtree(making)
        return root


class Scan:
    """`hotpixd scan` of the inbox.

    Parameters
    ----------
    begun : onto a state that has two generations already; else onto none
    copied : with the inbox on another file system, so that shots are copied instead of linked
    """

    def __init__(self, stage: Stage, *, begun: bool = False, copied: Path | None = None) -> None:
        self.stage = stage
        self._begun = begun
        self._copied = copied
        self.name = "scan" + (" onto two generations" if begun else "") + (", copying" if copied else "")

    def prepare(self, folder: Path) -> None:
        """Put an inbox, and the state if there is one to begin with, into a folder."""
        folder.mkdir()
        if self._begun:
            shutil.copytree(self.stage.begun(), folder / "state")
        inbox = self.inbox(folder)
        if self._copied is not None:
            shutil.copytree(self.stage.inbox, inbox)
            return
        inbox.mkdir()
        for shot in self.stage.inbox.iterdir():
            os.link(shot, inbox / shot.name)

    def inbox(self, folder: Path) -> Path:
        """Return where the shots of a run are."""
        return folder / "inbox" if self._copied is None else self._copied / folder.name

    def clear(self, folder: Path) -> None:
        """Remove all of a run."""
        shutil.rmtree(folder, ignore_errors=True)
        shutil.rmtree(self.inbox(folder), ignore_errors=True)

    def disturbed(self, folder: Path, prefix: Sequence[str] = (), **env: str) -> Ended:
        """Run the command with something that disturbs it, to its end or death."""
        try:
            done = subprocess.run(
                [*prefix, *HOTPIXD, "scan", "--state", str(folder / "state"), str(self.inbox(folder))],
                env=self.stage.environment(**env),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                timeout=HANGS_AFTER_S,
            )
        except subprocess.TimeoutExpired:
            return Ended(HUNG, f"it hung for {HANGS_AFTER_S:.0f} s and was killed")
        return Ended(done.returncode, done.stderr.decode("utf-8", "replace"))

    def after_disturbance(self, folder: Path) -> None:
        """Delete from the inbox what was acknowledged."""
        let_go(folder / "state", self.inbox(folder))

    def recovered(self, folder: Path) -> dict[str, Any]:
        """Run it again, undisturbed, and return the end.

        In this process: it replays, takes the inbox and checkpoints, which is what the command does. With a
        safeguard taken out, as a command.
        """
        root, inbox = folder / "state", self.inbox(folder)
        if self.stage.hook:
            ended = self.disturbed(folder)
            if ended.code not in (0, 1, 2):
                raise Wrong(f"run again it ended with {ended.code}: {ended.said[-300:]}")
        else:
            feed(root, inbox)
        return final(root, inbox)


class Watch:
    """`hotpixd run` on the inbox as a directory, with a command that takes the alerts."""

    name = "run on a directory"

    def __init__(self, stage: Stage) -> None:
        self.stage = stage
        self.alerts: int | None = None
        """How many alerts an undisturbed run tells of; None: not known yet."""

    def prepare(self, folder: Path) -> None:
        """Put inbox, configuration and mailbox into a folder."""
        folder.mkdir()
        self.prepare_source(folder)
        script = folder / "on-alert"
        script.write_text(_GATHERED.format(mailbox=folder / "mailbox"))
        script.chmod(0o755)
        (folder / "mailbox").touch()
        settings = {
            **self.source(folder),
            "checkpoint": {"every_shots": 4, "idle_s": 2},
            "alerts": {"command": [str(script)], "gather_s": 0, "disk_free_mb": 0},
        }
        (folder / "config.yaml").write_text(json.dumps(settings))

    def prepare_source(self, folder: Path) -> None:
        """Put what is watched into place."""
        (folder / "inbox").mkdir()
        for shot in self.stage.inbox.iterdir():
            os.link(shot, folder / "inbox" / shot.name)

    def source(self, folder: Path) -> dict[str, Any]:
        """Return the part of the configuration that names what is watched."""
        return {"sources": [{"directory": str(folder / "inbox"), "settle_s": 0.1}]}

    def clear(self, folder: Path) -> None:
        """Remove all of a run."""
        shutil.rmtree(folder, ignore_errors=True)

    def start(self, folder: Path, prefix: Sequence[str] = (), **env: str) -> tuple[Daemon, Path]:
        """Start the daemon; give it, and its folder for sockets, whose path must be short."""
        runtime = Path(tempfile.mkdtemp(prefix="hpx"))
        extra = {key: value for key, value in self.stage.environment(**env).items() if os.environ.get(key) != value}
        command = ("run", "--config", folder / "config.yaml")
        return Daemon(folder / "state", runtime, *command, prefix=prefix, **extra), runtime

    def disturbed(self, folder: Path, prefix: Sequence[str] = (), **env: str) -> Ended:
        """Run the daemon with something that disturbs it, until it has done all or died."""
        daemon, runtime = self.start(folder, prefix, **env)
        try:
            until = time.monotonic() + 60
            while daemon.process.poll() is None and time.monotonic() < until and not self.done(daemon, folder):
                time.sleep(0.05)
            code = daemon.stop()
            return Ended(code, daemon.log)
        finally:
            daemon.close()
            shutil.rmtree(runtime, ignore_errors=True)

    def done(self, daemon: Daemon, folder: Path) -> bool:
        """Tell whether all shots have their verdict and all alerts are delivered."""
        with suppress(FeedError, AssertionError), closing(daemon.client()) as client:
            status = client.ask("status")
            shots = status["shots"]
            if shots["folded"] + shots["companion"] + shots["refused"] < self.shots or shots["received"]:
                return False
            if self.alerts is None:
                # Of an undisturbed run: those raised last may still be on their way.
                time.sleep(1.5)
                return client.ask("status")["metrics"].get("alerts_waiting") == 0
            return len(delivered(folder / "mailbox")) >= self.alerts
        return False

    @property
    def shots(self) -> int:
        """How many rows of shots there are in the end."""
        return len({path.read_bytes() for path in self.stage.inbox.iterdir()})

    def after_disturbance(self, folder: Path) -> None:
        """Delete from the directory what was acknowledged."""
        let_go(folder / "state", folder / "inbox")

    def recovered(self, folder: Path) -> dict[str, Any]:
        """Run it again, undisturbed, and return the end with all alerts."""
        ended = self.disturbed(folder)
        if ended.code != 0:
            raise Wrong(f"run again it ended with {ended.code}: {ended.said[-500:]}")
        return {**final(folder / "state", folder), "alerts": self.told_alerts(folder)}

    def told_alerts(self, folder: Path) -> list[Any]:
        """Return all alerts of the ledger, by key.

        Raises
        ------
        Wrong
            If one was delivered in none or in several messages, or a message had two contents.
        """
        with closing(sqlite3.connect(folder / "state" / "ledger.sqlite")) as db:
            rows = db.execute("SELECT id, key, topic, subject, text, message FROM alert ORDER BY key").fetchall()
        messages = delivered_messages(folder / "mailbox")
        ids = Counter(id_ for contents in messages.values() for id_ in contents[0])
        if any(contents != contents[:1] * len(contents) for contents in messages.values()):
            raise Wrong("a message was delivered twice, with another content the second time")
        twice = [id_ for id_, count in ids.items() if count > 1]
        if twice:
            raise Wrong(f"alerts {twice} were delivered in several messages")
        lost = [key for id_, key, *_, message in rows if message != 0 and id_ not in ids]
        if lost:
            raise Wrong(f"alerts were not delivered: {lost}")
        unknown = set(ids) - {id_ for id_, *_ in rows}
        if unknown:
            raise Wrong(f"alerts {unknown} were delivered and are not in the ledger")
        return [tuple(str(value).replace(str(folder), "") for value in row[1:5]) for row in rows]


class Tether(Watch):
    """`hotpixd run` with a camera on loopback that has all shots on its card, saving photos and deleting them there."""

    name = "run with a tethered camera"

    def __init__(self, stage: Stage) -> None:
        """Raise `Impossible` if python-gphoto2 is missing."""
        super().__init__(stage)
        if importlib.util.find_spec("gphoto2") is None:
            raise Impossible("python-gphoto2 is missing.")
        self._cameras: dict[Path, LoopbackCamera] = {}
        raw = sorted(stage.inbox.glob("a_frame_00??.dng"))
        pairs = [sorted(stage.inbox.glob(f"b_frame_000{n}.*")) for n in (1, 2)]
        self._releases = [*([shot] for shot in raw), *pairs]

    @property
    def shots(self) -> int:
        """How many rows of shots there are in the end."""
        return sum(map(len, self._releases))

    def prepare_source(self, folder: Path) -> None:
        """Start a camera and shoot all."""
        (folder / "photos").mkdir()
        self._cameras[folder] = camera = LoopbackCamera("generic")
        camera.__enter__()
        for files in self._releases:
            camera.shoot([(path.suffix[1:].upper(), path.read_bytes()) for path in files])

    def source(self, folder: Path) -> dict[str, Any]:
        """Return the part of the configuration that names the camera."""
        photos = {"save_to": str(folder / "photos"), "delete": True}
        section = {"port": self._cameras[folder].port, "verify_after_s": 0.5, "hang_s": 4, **photos}
        return {"cameras": [section]}

    def clear(self, folder: Path) -> None:
        """Switch the camera off and remove all of a run."""
        camera = self._cameras.pop(folder, None)
        if camera is not None:
            camera.close(check=False)
        super().clear(folder)

    def done(self, daemon: Daemon, folder: Path) -> bool:
        """Tell whether all is folded and told, and the card is empty."""
        return super().done(daemon, folder) and not self._cameras[folder].files()

    def after_disturbance(self, folder: Path) -> None:
        """Do nothing: what was acknowledged is deleted from the card by the daemon itself."""

    def recovered(self, folder: Path) -> dict[str, Any]:
        """Run it again, undisturbed, and return the end with all alerts and photos."""
        end = super().recovered(folder)
        photos = sorted(Spool.hash_file(path) for path in (folder / "photos").iterdir())
        left = [str(path.name) for path in (folder / "state" / "incoming").rglob("*") if path.is_file()]
        return {**end, "photos": photos, "on the card": len(self._cameras[folder].files()), "left": left}


def delivered_messages(mailbox: Path) -> dict[str, list[list[int]]]:
    """Return the alerts of each message, as often as it was delivered."""
    messages: dict[str, list[list[int]]] = {}
    for line in mailbox.read_text().splitlines():
        if line:
            message = json.loads(line)
            messages.setdefault(message["id"], []).append([alert["id"] for alert in message["alerts"]])
    return messages


def delivered(mailbox: Path) -> set[int]:
    """Return the alerts that were delivered."""
    with suppress(ValueError):  # a line is just being written
        return {id_ for contents in delivered_messages(mailbox).values() for ids in contents for id_ in ids}
    return set()


Command = Scan | Watch
"""What is disturbed."""


def undisturbed(command: Command, folder: Path, note: Callable[[Ended], object] = lambda _: None) -> dict[str, Any]:
    """Return what a command ends with that nothing disturbs."""
    command.prepare(folder)
    try:
        ended = command.disturbed(folder)
        note(ended)
        if isinstance(command, Watch):
            command.alerts = len(delivered(folder / "mailbox"))
        return command.recovered(folder)
    finally:
        command.clear(folder)
