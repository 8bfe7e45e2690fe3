"""The daemon with a tethered camera, as a process: killed again and again, asked, told what to do.

HOTPIXD_LONG=1 shoots 500 files for each of five seeds.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from conftest import environment, run, told
from daemons import Daemon, eventually
from hotpixd.feed import FeedError
from hotpixd.simulate import VirtualSensor, write_series
from ptpip_camera import LoopbackCamera

pytest.importorskip("gphoto2")

LONG = bool(os.environ.get("HOTPIXD_LONG"))
PAIRS = 250 if LONG else 50
KILLS = 6 if LONG else 3

Start = Callable[..., Daemon]


@pytest.fixture(scope="module")
def pairs_of_shots(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Many shots of a small sensor, each as raw and as JPEG."""
    folder = tmp_path_factory.mktemp("shots")
    sensor = VirtualSensor(96, 64, hot=4, stuck=1, dead=1, serial="V0009", seed=9)
    for file_format in ("dng", "jpg"):
        for _ in write_series(folder, sensor, PAIRS, "moving", file_format):  # type: ignore[arg-type]
            pass
    (folder / "truth.json").unlink()
    return folder


@pytest.fixture
def camera(pairs_of_shots: Path) -> Iterator[LoopbackCamera]:
    with LoopbackCamera("generic") as camera:
        camera.capture_folder(pairs_of_shots)
        yield camera


def configured(tmp_path: Path, camera: LoopbackCamera, **settings: object) -> Path:
    """Write a configuration that tethers the camera, and return its path."""
    path = tmp_path / "config.yaml"
    section = {"port": camera.port, "verify_after_s": 1.0, "hang_s": 4, **settings}
    path.write_text(json.dumps({"cameras": [section], "checkpoint": {"every_s": 2, "idle_s": 2}}))
    return path


def asked(daemon: Daemon, question: str) -> dict[str, Any]:
    with contextlib.closing(daemon.client()) as client:
        return client.ask(question)


def taken_in(daemon: Daemon) -> int:
    """Return how many files the ledger knows; 0 while the daemon does not answer."""
    with contextlib.suppress(FeedError, AssertionError):
        shots = asked(daemon, "status")["shots"]
        return int(shots["folded"] + shots["companion"] + shots["refused"])
    return 0


@pytest.mark.parametrize("seed", range(5) if LONG else range(1))
def test_a_daemon_that_is_killed_again_and_again_loses_no_shot_and_counts_none_twice(
    tmp_path, start: Start, pairs_of_shots, seed
):
    """While its worker is killed, the cable pulled, downloads are cut, events lost and told twice."""
    photos = tmp_path / "photos"
    photos.mkdir()
    rng = random.Random(seed)
    with LoopbackCamera("generic", seed=seed, drop_events=0.15, duplicate_events=0.1) as camera:
        camera.capture_folder(pairs_of_shots)
        camera.number_from(9999 - PAIRS // 2)
        config = configured(tmp_path, camera, save_to=str(photos))
        daemon = start("run", "--config", config)
        shot, kills, fault_at, kill_at = 0, 0, time.monotonic(), time.monotonic() + 1.5
        while shot < PAIRS or kills < KILLS:
            if shot < PAIRS:
                camera.shoot()
                shot += 1
            time.sleep(rng.uniform(0.02, 0.06))
            if time.monotonic() > fault_at:
                fault_at = time.monotonic() + rng.uniform(0.3, 0.9)
                hurt(camera, daemon, rng)
            if time.monotonic() > kill_at:
                daemon.stop(signal.SIGKILL)
                kills += 1
                daemon = start("run", "--config", config, wait=False)
                kill_at = time.monotonic() + rng.uniform(1.5, 4.0)
        camera.plug()
        try:
            eventually(lambda: taken_in(daemon) >= 2 * PAIRS, "all files are in the ledger", 90.0)
        except AssertionError as error:
            raise AssertionError(f"{error}; exit code {daemon.process.poll()}; {camera.status}\n{daemon.log}") from None
        # What was folded before the last kill is folded again.
        daemon.wait_ready()
        wanted = {file.sha256 for file in camera.files()}
        saved = [sha256(path.read_bytes()).hexdigest() for path in photos.iterdir()]
        shots = asked(daemon, "status")["shots"]
        assert daemon.stop() == 0
    assert len(wanted) == 2 * PAIRS
    assert sorted(saved) == sorted(wanted)
    assert shots["refused"] == 0
    known = told(tmp_path / "state")
    raw = next(sensor for sensor in known["defects"]["sensors"] if sensor["samples"] == "raw")
    assert raw["frames"] == PAIRS
    assert shots["folded"] + shots["companion"] == 2 * PAIRS
    assert not [path for path in (tmp_path / "state" / "incoming").rglob("*") if "|" in path.name]


def hurt(camera: LoopbackCamera, daemon: Daemon, rng: random.Random) -> None:
    """Do one of the things that happen to cables, cameras and processes."""
    fault = rng.choice(("unplug", "cut", "busy", "kill the worker"))
    if fault == "unplug":
        camera.unplug()
        time.sleep(0.2)
        camera.plug()
    elif fault == "cut":
        camera.cut_download(rng.randrange(5000))
    elif fault == "busy":
        camera.behave(busy_operations=3)
    else:
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if int((process / "stat").read_text().rpartition(")")[2].split()[1]) == daemon.process.pid:
                    os.kill(int(process.name), signal.SIGKILL)


def test_the_same_shots_give_the_same_statistic_as_a_scan(tmp_path, start: Start, camera, pairs_of_shots):
    """Tethered one after the other, each is folded in its order."""
    daemon = start("run", "--config", configured(tmp_path, camera))
    eventually(lambda: asked(daemon, "cameras")["cameras"], "the camera is open")
    for _ in range(10):
        camera.shoot()
    eventually(lambda: taken_in(daemon) == 20, "the shots are folded")
    assert daemon.stop() == 0
    first = sorted(pairs_of_shots.glob("*.dng"))[:10]
    assert run("scan", *first, "--state", tmp_path / "scanned").returncode == 0
    tethered, scanned = told(tmp_path / "state"), told(tmp_path / "scanned")
    assert tethered["digests"] == scanned["digests"]
    found, wanted = (
        [
            (defect["x"], defect["y"], defect["state"], defect["log_e"])
            for defect in known["defects"]["sensors"][0]["defects"]
        ]
        for known in (tethered, scanned)
    )
    assert found == wanted


def test_the_states_of_a_camera_are_told(tmp_path, start: Start, camera):
    """In the status, in the daemon's own words, and on the feed; absent, then ready, then absent."""
    camera.unplug()
    daemon = start("run", "--config", configured(tmp_path, camera))

    def conditions() -> list[str]:
        return [source["condition"] for source in asked(daemon, "status")["sources"]]

    eventually(lambda: conditions() == ["absent"], "it is absent")
    assert "absent" in run("status", "--state", tmp_path / "state", env=daemon.env).stdout
    camera.plug()
    eventually(lambda: conditions() == ["ready"], "it is ready")
    with contextlib.closing(daemon.client()) as client:
        # What is shown is a tick old at most.
        shown = (source["name"] for live in client.watch() for source in live.get("sources", ()))
        assert any(name == "Loop EOS Loopback LB0001" for name in islice(shown, 5))
        eventually(lambda: "ready" in client.ask("status")["daemon"]["activity"], "it says so itself")
    camera.die()
    eventually(lambda: conditions() == ["absent"], "it is absent again")
    assert "Traceback" not in daemon.log


def test_a_camera_taken_out_of_the_configuration_is_let_go(tmp_path, start: Start, camera):
    """At once, by SIGHUP; and taken again."""
    config = configured(tmp_path, camera)
    daemon = start("run", "--config", config)
    eventually(lambda: asked(daemon, "cameras")["cameras"], "the camera is open")
    (tmp_path / "card").mkdir()
    config.write_text(json.dumps({"sources": [{"directory": str(tmp_path / "card")}]}))
    daemon.process.send_signal(signal.SIGHUP)
    eventually(lambda: not camera.status.connected, "the camera is free")
    configured(tmp_path, camera)
    daemon.process.send_signal(signal.SIGHUP)
    camera.shoot()
    eventually(lambda: taken_in(daemon) == 2, "its shots come")


def test_tether_on_the_command_line(tmp_path, start: Start, camera):
    """Without any configuration; the photos land in a folder."""
    (tmp_path / "photos").mkdir()
    camera.shoot()
    where = ("--save-to", tmp_path / "photos", "--save-as", "{date:%Y}/{name}")
    daemon = start("tether", "--plain", "--camera", camera.port, *where)
    eventually(lambda: taken_in(daemon) == 2, "the shots are folded")
    eventually(lambda: len(list((tmp_path / "photos").rglob("*.*"))) == 2, "the shots are saved")
    assert {path.parent.name for path in (tmp_path / "photos").rglob("*.*")} == {"2025"}
    assert "folded IMG_0001.DNG of Hotpixd Virtual Camera, serial V0009" in daemon.log
    assert daemon.stop(signal.SIGINT) == 0


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (("--camera", "usb:1"), "cameras[0].port must be auto, or a port"),
        (("--delete",), "delete needs save_to"),
        (("--save-to", "photos", "--save-as", "{nme}"), "save_as must be a path below save_to"),
    ],
)
def test_wrong_use_is_a_sentence(tmp_path, wrong, said):
    """And the exit code says so."""
    done = run("tether", *wrong, "--state", tmp_path / "state")
    assert done.returncode == 2
    assert said in done.stderr


def test_a_checkup_says_whether_a_camera_can_be_used(tmp_path, start: Start, camera, runtime):
    """Of its own, of one that a daemon has open, and of one that is not there; each fault with its cure."""
    env = environment(XDG_RUNTIME_DIR=str(runtime))

    def checked(*arguments: object) -> tuple[int, list[dict[str, Any]]]:
        done = run("tether", "--check", "--json", "--camera", camera.port, *arguments, env=env)
        return done.returncode, json.loads(done.stdout)["findings"]

    code, findings = checked()
    assert (code, [finding["level"] for finding in findings]) == (0, ["ok"])
    assert "EOS Loopback" in findings[0]["text"]
    code, findings = checked("--save-to", tmp_path / "nowhere")
    assert code == 1
    assert findings[-1]["what"] == "save-to"
    assert findings[-1]["cure"] == f"mkdir -p '{tmp_path / 'nowhere'}'"
    daemon = start("run", "--config", configured(tmp_path, camera))
    eventually(lambda: asked(daemon, "cameras")["cameras"], "the camera is open")
    code, findings = checked()
    assert code == 0
    assert "tethered by a running hotpixd" in findings[0]["text"]
    camera.shoot()
    # Its worker lets go of it to see the card as it is, and takes it again.
    eventually(lambda: not asked(daemon, "cameras")["cameras"], "the card is listed anew")
    assert list(asked(daemon, "cameras")["held"]) == [camera.port]
    code, findings = checked()
    assert code == 0
    assert "tethered by a running hotpixd" in findings[0]["text"]
    daemon.stop()
    camera.unplug()
    code, findings = checked()
    assert code == 1
    assert findings[0]["level"] == "fault"
    assert findings[0]["cure"]
