"""The statistic on the disk: the same numbers as in memory, no file left, and no harm where the disk is full."""

from __future__ import annotations

import errno
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from conftest import Camera, decoders, environment, feed, run, told
from hotpixd.core.accumulator import Accumulator
from hotpixd.core.frame import SensorLayout
from hotpixd.intake.files import find_shots
from hotpixd.monitor import Monitor
from hotpixd.store import mapped
from hotpixd.store.mapped import zeros_in
from hotpixd.store.state import State

LAYOUT = SensorLayout(60, 40, "RGGB")


@pytest.fixture(autouse=True)
def nothing_is_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """The arrays of a small sensor go to the disk too."""
    monkeypatch.setattr(mapped, "_SMALL_BYTES", 0)


def mapped_files(folder: Path) -> int:
    """Return how many files without a name in a folder this process has mapped."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    return sum(f" {folder}/" in line and line.endswith("(deleted)") for line in lines)


def folded(frames: NDArray[Any], **how: Any) -> Accumulator:
    accumulator = Accumulator(LAYOUT, str(frames.dtype), **how)
    never = np.full((3, 2), 1 << 40)
    for frame in frames:
        accumulator.count(accumulator.fold(frame, lone=True), never)
    return accumulator


def test_sums_and_counts_on_the_disk_are_those_in_memory(tmp_path: Path):
    """Beyond 255 frames too, where counts become wider; and the files have no names, and end with the arrays."""
    frames = np.random.default_rng(3).integers(0, 65536, (300, *LAYOUT.shape)).astype(np.uint16)
    on_disk = folded(frames, zeros=zeros_in(tmp_path))
    assert mapped_files(tmp_path) == 6
    assert list(tmp_path.iterdir()) == []
    assert on_disk.digest() == folded(frames).digest()
    assert on_disk.counts["high"].dtype == np.uint16
    on_disk.forget_counts()
    assert not any(count.any() for count in on_disk.counts.values())
    del on_disk
    assert mapped_files(tmp_path) == 0


def test_a_state_is_the_same_with_the_statistic_on_the_disk(camera: Camera, tmp_path: Path):
    """Over a restart, too, after which the arrays are read from a generation to the disk."""
    feed(tmp_path / "memory", camera.folder)
    root = tmp_path / "disk"
    half = len(camera.shots) // 2
    for shots in (camera.shots[:half], camera.shots[half:]):
        with State(root) as state, Monitor(state, decoders=decoders(), on_disk=True) as monitor:
            list(monitor.replay())
            list(monitor.process(find_shots(map(str, shots)).shots))
            assert mapped_files(root) >= 6
            monitor.checkpoint()
        assert mapped_files(root) == 0
    assert told(root) == told(tmp_path / "memory")


def test_small_arrays_stay_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(mapped, "_SMALL_BYTES", 1 << 20)
    array = zeros_in(tmp_path)((100, 100), np.uint8)
    assert not array.any()
    assert mapped_files(tmp_path) == 0


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EROFS])
def test_what_the_disk_cannot_hold_is_held_in_memory(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    """In the middle of a run counts become wider: that must not end it, and must not be silent."""

    def fails(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    frames = np.random.default_rng(4).integers(0, 65536, (300, *LAYOUT.shape)).astype(np.uint16)
    on_disk = folded(frames[:200], zeros=zeros_in(tmp_path))
    monkeypatch.setattr(os, "posix_fallocate", fails)
    never = np.full((3, 2), 1 << 40)
    with caplog.at_level(logging.WARNING):
        for frame in frames[200:]:
            on_disk.count(on_disk.fold(frame, lone=True), never)
    assert on_disk.digest() == folded(frames).digest()
    assert f"are kept in memory: {tmp_path} cannot hold them ({os.strerror(code)})" in caplog.text


def test_a_disk_that_fills_up_later_ends_no_process(tmp_path: Path):
    """Blocks are taken when an array is made: what is written into it afterwards has its place."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", folder]).returncode:
        pytest.skip("needs to mount")
    try:
        code = (
            "import sys, numpy as np; from pathlib import Path; from hotpixd.store.mapped import zeros_in\n"
            "folder = Path(sys.argv[1]); array = zeros_in(folder)((4 << 20,), np.uint8)\n"
            "try: (folder / 'ballast').write_bytes(bytes(8 << 20))\n"
            "except OSError: pass\n"
            "array[:] = 1; print(array.sum())"
        )
        done = subprocess.run([sys.executable, "-c", code, folder], env=environment(), capture_output=True, text=True)
        assert (done.returncode, done.stdout) == (0, f"{4 << 20}\n"), done.stderr
    finally:
        subprocess.run(["umount", folder], check=True)


def test_scan_takes_an_option_for_it(camera: Camera, tmp_path: Path):
    feed(tmp_path / "memory", camera.folder)
    done = run("scan", "--on-disk", "--state", tmp_path / "disk", camera.folder)
    assert done.returncode == 0, done.stderr
    assert told(tmp_path / "disk") == told(tmp_path / "memory")
    done = run("scan", "--on-disk", "--cluster", "local", "--state", tmp_path / "disk", camera.folder)
    assert done.returncode == 2
    assert "--on-disk is for a scan on this machine alone" in done.stderr
