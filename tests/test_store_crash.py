"""Killed at any named step, or out of space, a small daemon over the store comes back to the same state.

Run as a program, this file is that daemon: ``test_store_crash.py STATE INBOX`` takes the files of INBOX,
folds them into a sum, checkpoints every third shot and prints a digest of what it knows.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import hotpixd
from hotpixd.store.checkpoint import generations, newest, verify
from hotpixd.store.durable import StateFull
from hotpixd.store.ledger import Received, TransitionRow
from hotpixd.store.state import State

SIDE = 16
SHOTS = 8


class Daemon:
    """The least that uses the store as the real one does."""

    def __init__(self, root: Path) -> None:
        self.state = State(root)
        folder = self.state.sensor_folder("cam")
        found, _ = newest(folder)
        self.number = found.number if found else 0
        self.covers = found.header["covers"] if found else 0
        self.sums: NDArray[Any] = found.arrays["sums"] if found else np.zeros((SIDE, SIDE), np.uint32)
        self.state.ledger.add_sensor("cam", {"model": "test"})
        self.state.ledger.delete_derived_after("cam", self.covers)
        self.upto = self.covers
        for row in self.state.ledger.rows_to_replay({"cam": self.covers}):
            assert self.state.spool.verify(row.key), f"shot {row.seq} is lost"
            self.decide(row.seq, row.key)

    def take(self, inbox: Path) -> None:
        """Take and fold every file of the inbox that is not known yet."""
        for path in sorted(inbox.iterdir()):
            key = self.state.spool.hash_file(path)
            if self.state.ledger.find(key):
                continue
            self.state.spool.take(path, key)
            size = path.stat().st_size
            (seq,) = self.state.ledger.receive([Received(key, path.name, str(path), size, "2026")])
            self.decide(seq, key)
            if seq % 3 == 0:
                self.checkpoint()
        self.state.ledger.commit()

    def decide(self, seq: int, key: str) -> None:
        """Fold a shot, or refuse what has not its size."""
        content = self.state.spool.path(key).read_bytes()
        self.upto = seq
        if len(content) != SIDE * SIDE:
            self.state.ledger.conclude(seq, verdict="refused", reason="wrong size")
            return
        samples = np.frombuffer(content, np.uint8).reshape(SIDE, SIDE)
        self.sums += samples
        self.state.ledger.conclude(seq, verdict="folded", sensor_id="cam", counted=True)
        sites = np.flatnonzero(samples > 250)
        values = samples.flat[sites]
        self.state.ledger.add_observations("cam", seq, sites, values, values, np.ones(len(sites), int))
        self.state.ledger.add_transitions([TransitionRow("cam", int(s), seq, "appeared", {}) for s in sites])

    def checkpoint(self) -> None:
        """Write a generation and let go of the shots that the one before covers."""
        self.number += 1
        self.state.ledger.commit()
        self.state.checkpoint("cam", self.number, {"covers": self.upto}, {"sums": self.sums})
        older = generations(self.state.sensor_folder("cam"))[1:2]
        self.state.settle_spool({"cam": verify(older[0])["covers"]} if older else {})

    def digest(self) -> str:
        """Say all that is known, canonically."""
        ledger = self.state.ledger
        known = (
            self.sums.tobytes(),
            ledger.frame_keys("cam"),
            [row.name for row in ledger.refused()],
            ledger.observations("cam"),
            ledger.transitions("cam"),
            ledger.tally(),
        )
        return hashlib.sha256(repr(known).encode()).hexdigest()


def main(root: Path, inbox: Path) -> None:
    daemon = Daemon(root)
    daemon.take(inbox)
    print(daemon.digest())
    daemon.state.close()


@pytest.fixture(scope="module")
def inbox(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight shots, a duplicate and a file that is refused."""
    folder = tmp_path_factory.mktemp("inbox")
    rng = np.random.default_rng(7)
    for n in range(SHOTS):
        (folder / f"IMG_{n}").write_bytes(rng.integers(0, 256, SIDE * SIDE, np.uint8).tobytes())
    shutil.copyfile(folder / "IMG_2", folder / "IMG_5 copy")
    (folder / "IMG_4 torn").write_bytes(b"torn")
    return folder


def run(root: Path, inbox: Path, failpoint: str | None = None) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(Path(hotpixd.__file__).parents[1])}
    if failpoint:
        environment["HOTPIXD_FAILPOINT"] = failpoint
    return subprocess.run(
        [sys.executable, "-B", __file__, str(root), str(inbox)],
        env=environment,
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory, inbox: Path) -> str:
    """What an undisturbed run ends with."""
    done = run(tmp_path_factory.mktemp("reference") / "state", inbox)
    assert done.returncode == 0, done.stderr
    return done.stdout


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
]


def test_killed_at_any_step_it_comes_back_to_the_same_state(tmp_path: Path, inbox: Path, reference: str) -> None:
    """SIGKILL at the first and third pass of each failpoint, then a run to the end: no shot lost or twice."""

    def wrong(order: str) -> str | None:
        root = tmp_path / order.replace(":", "-")
        first = run(root, inbox, order)
        if first.returncode != -signal.SIGKILL:
            return f"{order}: was not killed but returned {first.returncode}: {first.stderr}"
        second = run(root, inbox)
        if second.stdout != reference:
            return f"{order}: {second.stdout}{second.stderr}"
        left = [str(path) for path in root.rglob("*.tmp")]
        return f"{order}: left {left}" if left else None

    orders = [f"{step}:kill:{n}" for step in STEPS for n in (1, 3)]
    with ThreadPoolExecutor(2) as pool:
        assert [answer for answer in pool.map(wrong, orders) if answer] == []


def test_killed_again_and_again_it_still_arrives(tmp_path: Path, inbox: Path, reference: str) -> None:
    """A process that dies at each start, a step later every time, ends where an undisturbed one does."""
    for step in STEPS:
        run(tmp_path / "state", inbox, f"{step}:kill")
    assert run(tmp_path / "state", inbox).stdout == reference


def test_a_full_disk_acknowledges_nothing_and_harms_nothing(inbox: Path, reference: str, tmp_path: Path) -> None:
    """On file systems of growing size: StateFull or success, and after growing the undisturbed result."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small file system takes root")
    mount = tmp_path / "small"
    mount.mkdir()
    full = 0
    for kilobytes in range(40, 240, 16):
        if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "none", mount]).returncode:
            pytest.skip("mounting is not allowed here")
        try:
            try:
                daemon = Daemon(mount / "state")
            except StateFull:
                full += 1
            else:
                try:
                    daemon.take(inbox)
                except StateFull:
                    full += 1
                else:
                    pytest.fail("the reserve for the ledger was not kept free")
                subprocess.run(["mount", "-o", "remount,size=64m", mount], check=True)
                # The same process goes on, as the daemon does: what waited is still there.
                daemon.take(inbox)
                assert daemon.state.ledger.frame_keys("cam")
                daemon.state.close()
            subprocess.run(["mount", "-o", "remount,size=64m", mount], check=True)
            done = run(mount / "state", inbox)
            assert done.stdout == reference, f"{kilobytes} kB: {done.stderr}"
        finally:
            subprocess.run(["umount", mount], check=True)
    assert full


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
