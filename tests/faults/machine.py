"""A whole machine under a real systemd, whose power is cut again and again in the middle of the shots.

The machine is a booted container; its state lies on a disk of its own, ext4 on a loop device. A cut ends all of its
processes at once, and takes what the disk had been given by then: whatever the file system still held in memory is
gone. The next boot mounts that image, as a disk after a power failure is, and the service goes on. What the
ledger has acknowledged is deleted from the card before some of the cuts, so that only the state has it.

In the end all shots are there once, and the statistic equals that of the same shots folded in one go.

    PYTHONPATH=daemon python tests/faults/machine.py --cuts 10
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))

from shoot import folded_in_one_go, picture
from table import Impossible, Row, markdown

from container import CannotBootError, Machine, installed, running
from daemons import eventually
from hotpixd.store.spool import Spool
from hotpixd.store.state import State, StateError
from hotpixd.views import answers

DISK_MB = 96

ASK = "import json, sys; from hotpixd.feed import FeedClient; print(json.dumps(FeedClient(sys.argv[1]).ask('status')))"

CONFIG = {
    "state": "/var/lib/hotpixd/state",
    "sources": [{"directory": "/srv/inbox", "camera": "A", "settle_s": 0.2}],
    "checkpoint": {"every_s": 1, "every_shots": 20, "idle_s": 1},
}

ALL_LIES = """
import os
os.fsync = lambda fd: None
from hotpixd.store import ledger
opened = ledger.Ledger._open
def opens(self, left):
    opened(self, left)
    self._db.execute("PRAGMA synchronous = OFF")
ledger.Ledger._open = opens
"""
"""Runs before the daemon's own code in the control: nothing is ever put on the disk on purpose."""


class Cuts:
    """A machine, its disk and its card."""

    def __init__(self, root: Path, mounts: list[str], seed: int) -> None:
        self.root = root
        self.place = root.parent
        self.mounts = mounts
        self.chance = random.Random(seed)
        self.inbox = root / "srv/inbox"
        self.inbox.mkdir(parents=True)
        self.keys: dict[str, tuple[str, int]] = {}
        self.images = 0
        self.image = self.place / "disk-0"
        self.disk = self.place / "disk"
        self.disk.mkdir()
        self.replayed = 0
        with self.image.open("wb") as file:
            file.truncate(DISK_MB << 20)
        subprocess.run(["mkfs.ext4", "-q", "-F", self.image], check=True)
        (root / "etc/hotpixd").mkdir(exist_ok=True)
        (root / "etc/hotpixd/hotpixd.yaml").write_text(json.dumps(CONFIG))

    @contextlib.contextmanager
    def on(self) -> Iterator[Machine]:
        """Mount the disk, boot, and leave nothing mounted."""
        # Its own commits are seldom, so that only what the program asks for is on it.
        subprocess.run(["mount", "-o", "loop,commit=300", self.image, self.disk], check=True)
        try:
            with running(self.root, [*self.mounts, f"--bind={self.disk}:/var/lib/hotpixd"]) as machine:
                # Not enabled: a boot is over when all is started, and the first start compiles for a while.
                machine.run("systemctl", "start", "--no-block", "hotpixd")
                yield machine
        finally:
            subprocess.run(["umount", "-l", self.disk], check=True)

    def shoot(self, count: int) -> None:
        """Write some shots onto the card, as a camera's program does."""
        for _ in range(count):
            number = len(self.keys) + 1
            part = self.inbox / ".part"
            part.write_bytes(picture("A", number))
            self.keys[Spool.hash_file(part)] = "A", number
            part.rename(self.inbox / f"IMG_{number:05d}.PNG")

    def folded(self, machine: Machine) -> int:
        """Return how many shots the service says it has folded; -1 if it does not say."""
        asked = machine.run("/opt/hotpixd/bin/python", "-c", ASK, "/run/hotpixd/feed.sock", check=False)
        return int(json.loads(asked.stdout)["shots"]["folded"]) if asked.returncode == 0 else -1

    def cut_in_the_middle(self, *, wait_for: bool) -> None:
        """Boot, let shots come, and cut the power while they are folded.

        Parameters
        ----------
        wait_for : whether all shots are acknowledged, and deleted from the card, before the last ones come
        """
        with self.on() as machine:
            if wait_for:
                self.shoot(self.chance.randrange(5, 15))
                eventually(lambda: self.folded(machine) >= len(self.keys), "all shots are folded", 120)
                for path in self.inbox.glob("IMG_*"):
                    path.unlink()
            until = time.monotonic() + self.chance.uniform(0.2, 2.0)
            while time.monotonic() < until:
                self.shoot(self.chance.randrange(1, 4))
                time.sleep(self.chance.uniform(0.0, 0.1))
            # The first process of a container takes all others with it, at once.
            os.kill(machine.leader, signal.SIGKILL)
            self.images += 1
            after = self.place / f"disk-{self.images}"
            # What the loop device was given. What the file system has not given to it yet is lost.
            subprocess.run(["cp", "--sparse=always", self.image, after], check=True)
        self.image.unlink()
        self.image = after

    def finish(self) -> list[str]:
        """Boot once more, let it catch up, and say what is wrong."""
        with self.on() as machine:
            with contextlib.suppress(AssertionError):
                eventually(lambda: self.folded(machine) >= len(self.keys), "all shots are folded", 60)
            machine.run("systemctl", "stop", "hotpixd", check=False)
            said = machine.run("journalctl", "--no-pager", "-u", "hotpixd", check=False).stdout
            self.replayed = said.count("took up ")
            try:
                return self._wrong()
            except StateError as error:
                return [str(error)]

    def _wrong(self) -> list[str]:
        wrong = []
        with State(self.disk / "state", create=False) as state:
            checked = answers.verify(state)
            if not checked["ok"] or checked["waiting"]:
                wrong.append(f"verify: {checked['problems']}, {checked['waiting']} waiting")
            rows = state.ledger.rows("SELECT seq, key, verdict FROM shot ORDER BY seq")
            verdicts = {key: verdict for _, key, verdict in rows}
            wrong += [f"shot {self.keys[key][1]} is missing" for key in self.keys.keys() - verdicts.keys()]
            wrong += [f"shot {self.keys[key][1]} is {is_}" for key, is_ in verdicts.items() if is_ != "folded"]
            if len(rows) != len(verdicts):
                wrong.append("shots are in the ledger twice")
            if not wrong:
                sensor, transitions = folded_in_one_go([(seq, self.keys[key]) for seq, key, _ in rows])
                (told,) = checked["sensors"]
                if told["digest"] != sensor.digest(verdicts):
                    wrong.append("the digest is not that of the same shots folded in one go")
                theirs = {(t.seq, t.site, t.change) for t in state.ledger.transitions(told["id"])}
                if theirs != {(seq, site, change) for seq, site, change, _ in transitions}:
                    wrong.append("the transitions are not those of the same shots folded in one go")
        return wrong


def cut(times: int, seed: int = 1, sabotage: str | None = None, say: Callable[[str], None] = lambda _: None) -> Row:
    """Cut the power so often, and return what came of it."""
    began = time.monotonic()
    with installed() as (root, mounts):
        for path in (root / "opt/hotpixd/lib").glob("*/site-packages"):
            if sabotage is not None:
                (path / "sitecustomize.py").write_text(sabotage)
        cuts = Cuts(root, mounts, seed)
        # The kernels are compiled once, and the service's users made.
        with cuts.on() as machine:
            eventually(lambda: cuts.folded(machine) == 0, "the service watches", 180)
        try:
            for n in range(times):
                cuts.cut_in_the_middle(wait_for=n % 2 == 1)
                say(f"cut {n + 1}, {len(cuts.keys)} shots so far, {time.monotonic() - began:.0f} s")
            wrong = cuts.finish()
        except AssertionError as error:
            # Shots that it had acknowledged may be gone: these never come again.
            wrong = [str(error)]
    for line in wrong:
        say(line)
    note = f"{len(cuts.keys)} shots; replayed after {cuts.replayed} boots; {(time.monotonic() - began) / 60:.1f} min"
    if sabotage is not None:
        note = wrong[0][:90] if wrong else ""
    what = "power of a machine with systemd cut, state on ext4"
    what += ", no fsync at all" if sabotage is not None else ""
    return Row("machine", what, times, len(wrong), sabotage is not None, note)


def run(long: bool) -> list[Row]:
    """Cut the power of a machine, then of one that puts nothing on its disk."""
    try:
        return [cut(12 if long else 2), cut(4 if long else 2, sabotage=ALL_LIES)]
    except CannotBootError as error:
        raise Impossible(str(error)) from None


def main() -> None:
    """Cut, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cuts", type=int, default=10)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--control", action="store_true", help="with a program that puts nothing on the disk")
    given = parser.parse_args()
    row = cut(given.cuts, given.seed, ALL_LIES if given.control else None, say=lambda line: print(line, flush=True))
    print(markdown([row]))
    raise SystemExit(not row.as_expected)


if __name__ == "__main__":
    main()
