"""A real scan is interrupted, killed and locked out; run again, it ends where an undisturbed one does."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from conftest import HOTPIXD, Camera, environment, feed, run, told
from hotpixd.store.state import State
from hotpixd.views import answers

STEPS = [
    "after_link",
    "after_spool:kill:3",
    "before_receive",
    "before_receive:kill:3",
    "after_receive",
    "after_receive:kill:3",
    "amid_generation",
    "before_generation_fsync",
    "before_generation_rename",
    "after_generation_rename",
    "after_generation_durable",
    "before_prune",
    "after_prune",
    "after_spool_drop",
]
COPY_STEPS = ["before_copy_fsync", "before_copy_rename", "after_copy_rename", "after_copy_durable:kill:2"]
"""Passed only where shots lie on another file system than the state."""

MOMENTS = 6
"""Kills at random moments."""


def start(root: Path, *wanted: Path, **changes: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*HOTPIXD, "scan", "--state", str(root), *map(str, wanted)],
        env=environment(**changes),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def await_shots(scan: subprocess.Popen[str], root: Path, count: int) -> None:
    """Return once the scan has that many shots in custody, or has ended."""
    spool = root / "spool"
    deadline = time.monotonic() + 60
    while scan.poll() is None and time.monotonic() < deadline:
        if spool.is_dir() and sum(1 for _ in spool.iterdir()) >= count:
            return
        time.sleep(0.001)


def finished(scan: subprocess.Popen[str]) -> tuple[int, str]:
    out, err = scan.communicate(timeout=60)
    assert "Traceback" not in err, err
    return scan.returncode, out + err


@pytest.fixture(scope="module")
def inbox(tmp_path_factory: pytest.TempPathFactory, camera: Camera, pairs: Camera) -> Path:
    """Twelve raw shots of a body, then of another two raw ones with their JPEG, a duplicate and a broken file."""
    folder = tmp_path_factory.mktemp("inbox")
    for shot in camera.shots:
        shutil.copyfile(shot, folder / f"a_{shot.name}")
    for shot in pairs.shots[:4]:
        shutil.copyfile(shot, folder / f"b_{shot.name}")
    shutil.copyfile(camera.shots[3], folder / "a_frame_0010_copy.dng")
    (folder / "a_frame_0010_torn.dng").write_bytes(camera.shots[10].read_bytes()[:9000])
    return folder


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, inbox: Path) -> dict[str, Any]:
    """What a scan without any interruption ends with."""
    root = tmp_path_factory.mktemp("undisturbed") / "state"
    feed(root, inbox)
    return told(root)


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory, inbox: Path) -> Path:
    """A state with two generations and some shots to go: the next scan passes every step there is."""
    root = tmp_path_factory.mktemp("begun") / "state"
    shots = sorted(inbox.glob("a_*"))
    feed(root, *shots[:4])
    feed(root, *shots[4:8])
    return root


@pytest.fixture(scope="module")
def elsewhere(inbox: Path) -> Iterator[Path]:
    """The same files on another file system."""
    memory = Path("/dev/shm")
    if not memory.is_dir() or memory.stat().st_dev == inbox.stat().st_dev:
        pytest.skip("there is no second file system to copy from")
    folder = memory / f"hotpixd-test-{os.getpid()}"
    shutil.copytree(inbox, folder)
    yield folder
    shutil.rmtree(folder)


class Killed:
    """Scans that died, two at a time as two cores allow."""

    def __init__(self, folder: Path, begun: Path) -> None:
        self._folder, self._begun = folder, begun
        self._pool = ThreadPoolExecutor(2)

    def at_each(self, steps: list[str], inbox: Path) -> dict[str, tuple[int, Path]]:
        """Scan into a copy of the begun state until the step; give the exit code and the state, by step."""

        def die(step: str) -> tuple[int, Path]:
            root = self._folder / step.replace(":", "-")
            shutil.copytree(self._begun, root)
            order = step if ":" in step else f"{step}:kill"
            code, _ = finished(start(root, inbox, HOTPIXD_FAILPOINT=order))
            return code, root

        return dict(zip(steps, self._pool.map(die, steps), strict=True))

    def at_random_moments(self, count: int, inbox: Path) -> list[tuple[int, Path]]:
        """Scan into an empty state, and kill some time after some shot was received."""
        chance = random.Random(11)
        moments = [(chance.randrange(1, 16), chance.uniform(0, 0.12)) for _ in range(count)]

        def die(number: int) -> tuple[int, Path]:
            shots, later_s = moments[number]
            root = self._folder / f"moment-{number}"
            scan = start(root, inbox)
            await_shots(scan, root, shots)
            time.sleep(later_s)
            scan.kill()
            code, _ = finished(scan)
            return code, root

        return list(self._pool.map(die, range(count)))


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory, begun: Path) -> Killed:
    return Killed(tmp_path_factory.mktemp("killed"), begun)


@pytest.fixture(scope="module")
def dead_at_steps(killed: Killed, inbox: Path) -> dict[str, tuple[int, Path]]:
    return killed.at_each(STEPS, inbox)


@pytest.fixture(scope="module")
def dead_at_copy_steps(killed: Killed, elsewhere: Path) -> dict[str, tuple[int, Path]]:
    return killed.at_each(COPY_STEPS, elsewhere)


@pytest.fixture(scope="module")
def dead_at_moments(killed: Killed, inbox: Path) -> list[tuple[int, Path]]:
    return killed.at_random_moments(MOMENTS, inbox)


@pytest.mark.parametrize("step", STEPS)
def test_killed_at_any_step_a_scan_goes_on_to_the_same_end(step, dead_at_steps, inbox, undisturbed):
    """Digests, defects, transitions, observations and refusals are those of the undisturbed run."""
    code, root = dead_at_steps[step]
    assert code == -signal.SIGKILL
    feed(root, inbox)
    assert told(root) == undisturbed


@pytest.mark.parametrize("step", COPY_STEPS)
def test_killed_while_copying_a_scan_goes_on_to_the_same_end(step, dead_at_copy_steps, elsewhere, undisturbed):
    """The same where shots are copied from a card instead of linked."""
    code, root = dead_at_copy_steps[step]
    assert code == -signal.SIGKILL
    feed(root, elsewhere)
    assert told(root) == undisturbed


@pytest.mark.parametrize("number", range(MOMENTS))
def test_killed_at_a_random_moment_a_scan_goes_on_to_the_same_end(number, dead_at_moments, inbox, undisturbed):
    """Also between the steps that have names."""
    _, root = dead_at_moments[number]
    feed(root, inbox)
    assert told(root) == undisturbed


def test_most_random_moments_were_in_the_middle(dead_at_moments):
    """Kills that come before the first shot or after the last would prove nothing."""
    assert sum(code == -signal.SIGKILL for code, _ in dead_at_moments) >= MOMENTS // 2


def test_the_comparison_can_fail(inbox, undisturbed, tmp_path):
    """Negative control: one shot less, another order, or a replay that folds a shot twice is seen."""
    shots = sorted(inbox.glob("a_*"))
    feed(tmp_path / "less", *shots[:-1], *sorted(inbox.glob("b_*")))
    less = told(tmp_path / "less")
    assert all(less[part] != undisturbed[part] for part in ("digests", "defects", "observations", "transitions"))
    feed(tmp_path / "turned", *reversed(shots), *sorted(inbox.glob("b_*")))
    turned = told(tmp_path / "turned")
    assert turned["defects"] != undisturbed["defects"]
    assert turned["transitions"] != undisturbed["transitions"]
    twice = tmp_path / "twice"
    feed(twice, shots[0])
    again = tmp_path / "again.dng"
    again.write_bytes(shots[0].read_bytes() + b"\0")
    feed(twice, again)
    feed(tmp_path / "once", shots[0])
    assert told(twice)["digests"] != told(tmp_path / "once")["digests"]


def stopped(number: signal.Signals, camera: Camera, root: Path) -> None:
    """Start a scan and send it a signal when it has begun; it must end in good order, and not as if all were done."""
    scan = start(root, camera.folder)
    await_shots(scan, root, 2)
    scan.send_signal(number)
    code, said = finished(scan)
    assert code == 128 + number
    assert " left." in said
    assert "Run the same command again" in said
    with State(root, create=False) as state:
        checked = answers.verify(state)
    assert checked["ok"]
    assert not checked["waiting"]
    assert 0 < checked["sensors"][0]["frames"] < 12


def test_ctrl_c_stops_a_scan_in_good_order(camera, scanned, tmp_path):
    """It folds what it received, checkpoints, ends with 130 and says how to go on; going on ends where it should."""
    root = tmp_path / "state"
    stopped(signal.SIGINT, camera, root)
    again = run("scan", "--state", root, camera.folder)
    assert again.returncode == 0
    assert "Took up" not in again.stderr
    for question in (["verify"], ["defects", "--all"]):
        said = json.loads(run(*question, "--json", "--state", root).stdout)
        with State(scanned, create=False) as state:
            assert said == (
                answers.verify(state) if question == ["verify"] else answers.defects(state, candidates=True)
            )


def test_sigterm_stops_a_scan_in_good_order(camera, scanned, tmp_path):
    """As a service manager or a shutdown sends it; the exit code is 143 then."""
    root = tmp_path / "state"
    stopped(signal.SIGTERM, camera, root)
    feed(root, camera.folder)
    assert told(root) == told(scanned)


def test_a_second_ctrl_c_ends_a_scan_at_once(camera, scanned, tmp_path):
    """What was received is safe all the same."""
    root = tmp_path / "state"
    scan = start(root, camera.folder)
    await_shots(scan, root, 2)
    while scan.poll() is None:
        scan.send_signal(signal.SIGINT)
        time.sleep(0.005)
    code, _ = finished(scan)
    assert code == 130
    again = run("scan", "--state", root, camera.folder)
    assert again.returncode == 0
    assert "Took up" in again.stderr
    assert told(root) == told(scanned)


@pytest.mark.parametrize("module", ["typer", "platformdirs"])
def test_ctrl_c_while_the_command_is_being_loaded_ends_it_without_a_word(module, tmp_path):
    """It was a traceback: of what the entry imports, and of what comes before the command itself."""
    (tmp_path / f"{module}.py").write_text("import os, signal; os.kill(os.getpid(), signal.SIGINT)")
    env = environment()
    env["PYTHONPATH"] = f"{tmp_path}:{env['PYTHONPATH']}"
    # To be asked where the cache is takes platformdirs.
    del env["NUMBA_CACHE_DIR"]
    command = [sys.executable, "-m", "hotpixd", "status", "--state", str(tmp_path)]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


def test_a_second_scan_is_turned_away_by_name(camera, scanned, tmp_path):
    """It says which process has the state, ends with 3, and does not disturb the first."""
    root = tmp_path / "state"
    first = start(root, camera.folder)
    await_shots(first, root, 1)
    first.send_signal(signal.SIGSTOP)
    try:
        for command in (["scan", camera.folder], ["verify", "--json"]):
            second = run(*command, "--state", root)
            assert second.returncode == 3
            assert f"in use by process {first.pid} " in second.stderr
            assert second.stdout == ""
    finally:
        first.send_signal(signal.SIGCONT)
    assert finished(first)[0] == 0
    assert told(root) == told(scanned)


def test_a_scan_that_is_asked_to_stop_before_it_began_says_nothing_odd(camera, tmp_path):
    """Ctrl-C while the program still loads: no traceback, no half state."""
    root = tmp_path / "state"
    scan = start(root, camera.folder)
    deadline = time.monotonic() + 30
    while not root.exists() and time.monotonic() < deadline:
        time.sleep(0.001)
    scan.send_signal(signal.SIGINT)
    code, _ = finished(scan)
    assert code in (0, 130)
    feed(root, camera.folder)
    assert len(told(root)["digests"]) == 1
