"""The daemon as a whole, as a real process: shots copied into real directories, signals, crashes, readers."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from conftest import HOTPIXD, Camera, environment, feed, run, told
from daemons import Daemon, eventually
from hotpixd import service as service_module
from hotpixd.config import Config
from hotpixd.feed import find_sockets
from hotpixd.intake.source import SourceState
from hotpixd.monitor import Reading
from hotpixd.store.ledger import Ledger
from hotpixd.store.spool import Spool
from ptpip_camera import LoopbackCamera


def put(shot: Path, folder: Path) -> None:
    """Copy a shot as a camera program does: under another name first."""
    part = folder / f".{shot.name}.part"
    shutil.copyfile(shot, part)
    part.rename(folder / shot.name)


def configured(folder: Path, **sections: object) -> Path:
    """Write a configuration and return its path."""
    path = folder / "hotpixd.yaml"
    path.write_text(yaml.safe_dump(sections))
    return path


def test_shots_are_folded_as_they_come(camera: Camera, tmp_path, start):
    """Whether they were there before or come later, one by one: the result is that of a scan."""
    inbox = tmp_path / "inbox"
    inbox.mkdir()
    for shot in camera.shots[:4]:
        put(shot, inbox)
    daemon = start("watch", inbox)
    daemon.wait_folded(4)
    for n, shot in enumerate(camera.shots[4:], 5):
        put(shot, inbox)
        daemon.wait_folded(n)
    assert daemon.stop() == 0
    assert re.findall(r"folded (\S+) of", daemon.log) == [shot.name for shot in camera.shots]
    feed(tmp_path / "scanned", camera.folder)
    assert told(daemon.state) == told(tmp_path / "scanned")


def test_readers_are_answered_while_it_runs_as_after_it(camera: Camera, tmp_path, start):
    """Status, defects, least-variance and verify: one answer, two carriers."""
    daemon = start("watch", camera.folder)
    daemon.wait_folded(12)
    questions = (("defects", "--all"), ("defects",), ("least-variance", "-k", "7"), ("verify",), ("status",))
    live = [daemon.ask(*question) for question in questions]
    assert live[4]["sources"][0]["name"] == str(camera.folder)
    assert live[4]["daemon"]["pid"] == daemon.process.pid
    shot = live[4]["last_shot"]
    times = (shot["received_at"], shot["taken_at"], live[4]["sources"][0]["since"], live[4]["daemon"]["started_at"])
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z", one) for one in times), times
    assert daemon.stop() == 0
    after = [daemon.ask(*question) for question in questions]
    assert live[:4] == after[:4]
    for key in ("sensors", "shots", "last_shot"):
        assert live[4][key] == after[4][key]


_SLOW_COPIES = """
import time
from pathlib import Path
from hotpixd.store.spool import Spool

quick = Spool.verify

def slow(*arguments, **options):
    Path({begun!r}).touch()
    while not Path({go!r}).exists():
        time.sleep(0.01)
        options.get("progress", arguments[-1])()
    return quick(*arguments, **options)

Spool.verify = slow
"""
"""Has the check of a copy in the spool, which nothing else does here, take until a file is there."""


@pytest.fixture
def slow_copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """Return a file that is there when a copy in the spool is being checked, and one that ends this."""
    begun, go = tmp_path / "begun", tmp_path / "go"
    (tmp_path / "sitecustomize.py").write_text(_SLOW_COPIES.format(begun=str(begun), go=str(go)))
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{environment()['PYTHONPATH']}")
    return begun, go


def verified(daemon: Daemon, *arguments: str) -> subprocess.Popen[str]:
    """Begin to ask a daemon whether its state can be believed."""
    command = [*HOTPIXD, "verify", *arguments, "--state", str(daemon.state)]
    return subprocess.Popen(command, env=daemon.env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def test_shots_are_folded_while_the_state_is_verified(camera: Camera, tmp_path, start, slow_copies):
    """The loop read all copies in the spool itself. Those that it does not need any more meanwhile are not missed."""
    begun, go = slow_copies
    inbox = tmp_path / "inbox"
    inbox.mkdir()
    config = configured(tmp_path, sources=[{"directory": str(inbox)}], checkpoint={"every_shots": 1})
    daemon = start("run", "--config", config, PYTHONPATH=os.environ["PYTHONPATH"])
    for shot in camera.shots[:3]:
        put(shot, inbox)
    daemon.wait_folded(3)
    one = verified(daemon, "--json")
    eventually(begun.exists, "a copy is being checked")
    copies = set(daemon.state.glob("spool/*"))
    assert copies
    another = verified(daemon, "--json")
    for n, shot in enumerate(camera.shots[3:], 4):
        put(shot, inbox)
        daemon.wait_folded(n)
    eventually(lambda: not copies & set(daemon.state.glob("spool/*")), "these copies are not needed any more")
    assert one.poll() is None
    assert another.poll() is None
    go.touch()
    said = [json.loads(asked.communicate(timeout=60)[0]) for asked in (one, another)]
    assert [one.returncode, another.returncode] == [0, 0]
    assert [(answer["ok"], answer["waiting"], answer["problems"]) for answer in said] == [(True, 0, [])] * 2
    # Each is about what was there when it was begun.
    assert [answer["sensors"][0]["frames"] for answer in said] == [3, 12]
    assert not list(daemon.state.glob("backup-*"))
    assert daemon.stop() == 0


def test_a_daemon_tells_of_the_damage_that_is_told_without_it(camera: Camera, tmp_path, start):
    """It reads a snapshot, whose name says nothing to anybody; what is no file there is not overlooked."""
    daemon = start("watch", camera.folder)
    daemon.wait_folded(12)
    assert daemon.stop() == 0
    (newest,) = daemon.state.glob("sensors/*/gen-*.hpx")
    damaged, *others = sorted(daemon.state.glob("spool/*"))
    assert len(others) == 11
    damaged.unlink()
    damaged.write_bytes(b"x")
    daemon = start("watch", tmp_path / "elsewhere")
    newest.rename(tmp_path / "kept")
    newest.mkdir()
    others[0].unlink()
    others[0].symlink_to(tmp_path / "nothing")
    live = run("verify", "--json", "--state", daemon.state, env=daemon.env)
    assert daemon.stop() == 0
    after = run("verify", "--json", "--state", daemon.state)
    assert (live.returncode, live.stdout) == (after.returncode, after.stdout) == (3, after.stdout)
    problems = json.loads(live.stdout)["problems"]
    assert problems[0].startswith(f"Generation {newest} cannot be read")
    assert len(problems) == 3


def test_where_nothing_can_be_linked_the_state_is_verified_all_the_same(camera: Camera, tmp_path, start):
    """On FAT, say: by the loop itself, as there is no snapshot without a copy of everything."""
    (tmp_path / "sitecustomize.py").write_text(
        "import errno, pathlib\n\ndef refuse(*_):\n    raise OSError(errno.EPERM, 'no links here')\n\n"
        "pathlib.Path.hardlink_to = refuse\n"
    )
    daemon = start("watch", camera.folder, PYTHONPATH=f"{tmp_path}:{environment()['PYTHONPATH']}")
    daemon.wait_folded(12)
    assert daemon.ask("verify")["sensors"][0]["frames"] == 12
    assert not list(daemon.state.glob("backup-*"))


def test_a_daemon_that_stops_does_not_wait_for_a_verify(camera: Camera, start, slow_copies):
    """Whoever asked reads the state itself then, and has an answer all the same."""
    begun, go = slow_copies
    daemon = start("watch", camera.folder, PYTHONPATH=os.environ["PYTHONPATH"])
    daemon.wait_folded(12)
    asked = verified(daemon)
    eventually(begun.exists, "a copy is being checked")
    assert daemon.stop() == 0
    assert not list(daemon.state.glob("backup-*"))
    go.touch()
    said, wrong = asked.communicate(timeout=60)
    assert (asked.returncode, wrong) == (0, "")
    assert "can be believed" in said


def test_what_status_says_of_the_daemon_is_of_the_same_moment_as_its_numbers(camera: Camera, start):
    """It was of the last look around, up to a second ago: "17 shots folded, 6 to go" above "19 folded"."""
    daemon = start("watch", camera.folder)
    folded = 0
    with contextlib.closing(daemon.client()) as client:
        while folded < 12:
            told = client.ask("status")
            folded = told["shots"]["folded"]
            (said,) = re.findall(r"(\d+) shots? folded", told["daemon"]["activity"])
            assert int(said) == folded
            time.sleep(0.01)


def test_a_restart_does_not_read_known_files_again(camera: Camera, tmp_path, start):
    """What was folded is recognised by name, size and time; a new one is taken."""
    inbox = tmp_path / "inbox"
    inbox.mkdir()
    for shot in camera.shots[:5]:
        put(shot, inbox)
    daemon = start("watch", inbox)
    daemon.wait_folded(5)
    assert daemon.stop() == 0
    again = start("watch", inbox)
    put(camera.shots[5], inbox)
    again.wait_folded(6)
    assert "known already" not in again.log
    assert again.log.count("folded frame") == 1


@pytest.mark.parametrize("after", [1, 4, 9])
def test_killed_at_any_moment_it_comes_back_to_the_same_result(camera: Camera, tmp_path, start, after):
    """kill -9 amid the shots, and again amid the replay."""
    first = start("watch", camera.folder)
    eventually(lambda: first.log.count("folded frame") >= after, "some shots are folded")
    first.stop(signal.SIGKILL)
    second = start("watch", camera.folder, wait=False)
    time.sleep(1.0)
    second.stop(signal.SIGKILL)
    third = start("watch", camera.folder)
    third.wait_folded(12)
    assert third.stop() == 0
    feed(tmp_path / "scanned", camera.folder)
    assert told(third.state) == told(tmp_path / "scanned")


@pytest.mark.parametrize("count", [2, 6])
def test_a_picture_overwritten_in_place_is_not_lost_when_it_is_killed(camera: Camera, tmp_path, start, count):
    """All-sky software writes one image.jpg again and again. Each content was acknowledged, so each must come back."""
    inbox = tmp_path / "inbox"
    inbox.mkdir()
    first = start("watch", inbox)
    for number, shot in enumerate(camera.shots[:count], 1):
        (inbox / "image.dng").write_bytes(shot.read_bytes())
        first.wait_folded(number)
        time.sleep(1.0)
    first.stop(signal.SIGKILL)
    second = start("watch", inbox)
    assert second.folded() == count
    assert second.ask("verify")["ok"]
    # The path is known by now: not even one more is linked.
    (inbox / "image.dng").write_bytes(camera.shots[count].read_bytes())
    second.wait_folded(count + 1)
    (inbox / "image.dng").unlink()
    assert second.ask("verify")["ok"]
    second.stop(signal.SIGKILL)
    third = start("watch", inbox)
    assert third.folded() == count + 1
    assert third.stop() == 0
    feed(tmp_path / "scanned", *camera.shots[: count + 1])
    assert told(third.state)["digests"] == told(tmp_path / "scanned")["digests"]
    assert told(third.state)["refused"] == []


def test_a_shot_whose_copy_was_overwritten_is_taken_from_its_other_name(camera: Camera, tmp_path, start):
    """It is overwritten while nobody watches, before a checkpoint; the dated copy was known already."""
    inbox = tmp_path / "inbox"
    inbox.mkdir()
    first = start("watch", inbox)
    (inbox / "image.dng").write_bytes(camera.shots[0].read_bytes())
    first.wait_folded(1)
    put(camera.shots[0], inbox)
    eventually(lambda: "known already" in first.log, "its copy is met")
    time.sleep(2.0)
    first.stop(signal.SIGKILL)
    for spooled in (first.state / "spool").iterdir():
        # As if it were a link, on file systems that clone as well.
        spooled.write_bytes(camera.shots[1].read_bytes())
    (inbox / "image.dng").write_bytes(camera.shots[1].read_bytes())
    second = start("watch", inbox)
    second.wait_folded(2)
    assert second.stop() == 0
    feed(tmp_path / "scanned", *camera.shots[:2])
    assert told(second.state)["digests"] == told(tmp_path / "scanned")["digests"]
    assert told(second.state)["refused"] == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_it_stops_cleanly_with_a_checkpoint(camera: Camera, start, number):
    """`watch` stops at each of the three (its terminal went away); nothing is left to replay."""
    daemon = start("watch", camera.folder)
    daemon.wait_folded(3)
    started = time.monotonic()
    assert daemon.stop(number) == 0
    assert time.monotonic() - started < 10
    checked = daemon.ask("verify")
    assert checked["ok"]
    assert checked["waiting"] == 0


def test_two_sources_and_the_same_shots_in_both(camera: Camera, other_camera: Camera, tmp_path, start):
    """Each sensor has its own statistic; what lies in both directories is folded once."""
    both = tmp_path / "both"
    shutil.copytree(camera.folder, both)
    config = configured(
        tmp_path, sources=[{"directory": str(both)}, {"directory": str(other_camera.folder)}, {"directory": "late"}]
    )
    daemon = start("run", "--config", config)
    daemon.wait_folded(18)
    (tmp_path / "late").mkdir()
    for shot in camera.shots[:3]:
        put(shot, tmp_path / "late")
    eventually(lambda: daemon.log.count("known already") >= 3, "the doubles are seen")
    frames = {sensor["serial"]: sensor["frames"] for sensor in daemon.ask("status")["sensors"]}
    assert frames == {"V0001": 12, "V0002": 6}
    assert daemon.stop() == 0


def test_reload_takes_what_is_safe_and_says_what_is_not(camera: Camera, other_camera: Camera, tmp_path, start):
    """SIGHUP: a new source is watched, alpha waits for the next start, a wrong file changes nothing."""
    (tmp_path / "empty").mkdir()
    config = configured(tmp_path, sources=[{"directory": "empty"}])
    daemon = start("run", "--config", config)
    configured(tmp_path, sources=[{"directory": "empty"}, {"directory": str(camera.folder)}], detection={"alpha": 0.5})
    daemon.process.send_signal(signal.SIGHUP)
    daemon.wait_folded(12)
    assert "detection.alpha was changed: that takes effect at the next start" in daemon.log
    configured(tmp_path, sources=[{"directory": str(other_camera.folder), "knid": "dark"}])
    daemon.process.send_signal(signal.SIGHUP)
    eventually(lambda: "knid" in daemon.log, "the mistake is named")
    assert daemon.folded() == 12
    configured(tmp_path, sources=[{"directory": str(other_camera.folder)}])
    daemon.process.send_signal(signal.SIGHUP)
    daemon.wait_folded(18)
    assert [source["name"] for source in daemon.ask("status")["sources"]] == [str(other_camera.folder)]
    assert daemon.stop() == 0


def test_a_reload_takes_what_is_to_be_ignored(camera: Camera, tmp_path, start):
    """What is not ignored any more is folded; what was folded before stays so. The command line says the same."""
    folder = tmp_path / "sky"
    shutil.copytree(camera.folder, folder / "night")
    ignored = {"directory": str(folder), "ignore": ["NIGHT"]}
    daemon = start("run", "--config", configured(tmp_path, sources=[ignored]))
    eventually(lambda: daemon.ask("status")["sources"][0]["status"] == "watching", "the folder is listed")
    assert daemon.ask("status")["sources"][0]["waiting"] == 0
    configured(tmp_path, sources=[ignored | {"ignore": []}])
    daemon.process.send_signal(signal.SIGHUP)
    daemon.wait_folded(12)
    configured(tmp_path, sources=[ignored])
    daemon.process.send_signal(signal.SIGHUP)
    eventually(lambda: daemon.log.count("the configuration is reloaded") == 2, "the reload is told")
    assert daemon.folded() == 12
    assert daemon.stop() == 0
    daemon = start("watch", folder, "--plain", "--ignore", "frame_0*", "--ignore", "x")
    eventually(lambda: daemon.ask("status")["sources"][0]["detail"] == "0 files, 0 waiting", "nothing is found")
    assert daemon.stop() == 0


def test_a_camera_is_a_source_like_others(pairs: Camera, tmp_path, start):
    """Its shots are folded and saved, its JPEGs are companions; and a reload lets go of it.

    What was fetched is remembered with its shot, until it is deleted from the card.
    """
    pytest.importorskip("gphoto2")
    contents = [[(path.suffix[1:], path.read_bytes()) for path in pairs.shots[n : n + 2]] for n in (0, 2)]
    keys = {bytes.fromhex(Spool.hash_file(path)) for path in pairs.shots[:4]}
    (tmp_path / "photos").mkdir()
    with LoopbackCamera("generic") as body:
        tethered = {"port": body.port, "save_to": "photos", "save_as": "{serial}/{stem}.{ext}", "verify_after_s": 1}
        config = configured(tmp_path, cameras=[tethered])
        body.shoot(contents[0])
        daemon = start("run", "--config", config)
        daemon.wait_folded(1)
        eventually(lambda: "companion of" in daemon.log, "the JPEG beside it is seen")
        # Until it was asked, and for a moment after that, it goes by its port's name.
        (source,) = eventually(
            lambda: [s for s in daemon.ask("status")["sources"] if s["condition"] == "ready"], "the card is fetched"
        )
        assert source["name"].startswith("Loop EOS Loopback")
        assert f"  {source['name']} ready: " in run("status", "--state", daemon.state, env=daemon.env).stdout
        assert daemon.stop() == 0
        with contextlib.closing(Ledger(daemon.state / "ledger.sqlite")) as ledger:
            seen = keys & set(ledger.seen_files().values())
            places = {row.path for key in seen if (row := ledger.find(key.hex())) is not None}
        assert places == {f"{source['name']}{file.path}" for file in body.files()}
        again = start("run", "--config", configured(tmp_path, cameras=[{**tethered, "delete": True}]))
        body.shoot(contents[1])
        again.wait_folded(2)
        eventually(lambda: again.log.count("companion of") == 1, "the JPEG beside it is seen")
        assert "known already" not in again.log
        assert {path.read_bytes() for path in (tmp_path / "photos").rglob("*.*")} == {
            content for shown in contents for _, content in shown
        }
        eventually(lambda: not body.files(), "what is safe is deleted")
        configured(tmp_path, sources=[{"directory": "photos"}])
        again.process.send_signal(signal.SIGHUP)
        eventually(lambda: f"no longer watching camera at {body.port}" in again.log, "the camera is let go of")
        # What lies there now was folded when it came.
        eventually(lambda: again.log.count("known already") == 4, "the photos are known")
        assert [known["name"] for known in again.ask("status")["sources"]] == [str(tmp_path / "photos")]
        assert again.stop() == 0
        with contextlib.closing(Ledger(daemon.state / "ledger.sqlite")) as ledger:
            # Once each, of the photos: those of the card are forgotten.
            assert sorted(shot for shot in ledger.seen_files().values() if shot in keys) == sorted(keys)


def test_a_second_process_is_told_who_has_the_state(camera: Camera, tmp_path, start):
    """A daemon or a scan: exit code 3 and the name of the first."""
    first = start("watch", camera.folder)
    second = start("watch", camera.folder, wait=False)
    assert second.process.wait(60) == 3
    assert f"process {first.process.pid}" in second.log
    done = run("scan", camera.folder, "--state", first.state, env=first.env)
    assert done.returncode == 3
    assert f"process {first.process.pid}" in done.stderr
    first.wait_folded(12)
    assert first.stop() == 0


def test_shots_are_safe_while_the_first_start_compiles(camera: Camera, tmp_path, runtime, start):
    """It is ready at once. Stopped then it does not wait for the compiler, and the next start folds what it has."""
    first = start("watch", camera.folder, NUMBA_CACHE_DIR=str(tmp_path / "kernels"))
    eventually(lambda: any((first.state / "spool").iterdir()), "shots are in custody")
    assert first.folded() == 0
    eventually(lambda: "compiles the kernels" in first.ask("status")["daemon"]["activity"], "it says what it waits for")
    assert list(runtime.rglob("*.sock"))
    assert first.stop() == 0
    assert "everything is on the disk" in first.log
    assert "folded frame" not in first.log
    assert not list(runtime.rglob("*.sock"))
    assert first.ask("verify")["ok"]
    second = start("watch", camera.folder)
    second.wait_folded(12)
    assert second.stop() == 0
    feed(tmp_path / "scanned", camera.folder)
    assert told(second.state) == told(tmp_path / "scanned")


def is_taken(lock: Path) -> bool:
    """Tell whether a process has the state of this lock."""
    with lock.open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def test_who_comes_while_it_ends_waits_for_that(camera: Camera, tmp_path, start):
    """`kill PID; hotpixd watch ...` without a pause: what was asked then, and the next daemon, ended with 3."""
    for _ in range(5):
        first = start("watch", camera.folder)
        first.wait_folded(12)
        lock = first.state / "lock"
        first.process.send_signal(signal.SIGTERM)
        while "\nfeed " in lock.read_text():
            pass
        first.process.send_signal(signal.SIGSTOP)
        if is_taken(lock):
            # Amid its last checkpoint.
            break
        first.process.send_signal(signal.SIGCONT)
        first.process.wait(60)
    else:
        pytest.fail("it always ended before it could be stopped")
    command = [*HOTPIXD, "status", "--state", str(first.state)]
    asking = subprocess.Popen(command, env=first.env, stdout=subprocess.DEVNULL)
    second = start("watch", camera.folder, wait=False)
    with pytest.raises(subprocess.TimeoutExpired):
        asking.wait(2)
    assert second.process.poll() is None, second.log
    first.process.send_signal(signal.SIGCONT)
    assert (first.process.wait(60), asking.wait(60)) == (0, 0)
    second.wait_ready()
    assert second.stop() == 0


def test_a_refused_shot_is_told_and_not_tried_again(camera: Camera, tmp_path, start):
    """A broken file costs a line in the log and in the status; the others are folded."""
    inbox = tmp_path / "inbox"
    inbox.mkdir()
    (inbox / "a.dng").write_bytes(camera.shots[0].read_bytes()[:5000])
    put(camera.shots[1], inbox)
    daemon = start("watch", inbox)
    daemon.wait_folded(1)
    eventually(lambda: "refused a.dng" in daemon.log, "the refusal is said")
    (refused,) = daemon.ask("status")["refused"]
    assert refused["name"] == "a.dng"
    assert daemon.stop() == 0
    again = start("watch", inbox)
    put(camera.shots[2], inbox)
    again.wait_folded(2)
    assert "refused a.dng" not in again.log


def test_a_shot_refused_only_by_the_replay_is_alerted(camera: Camera, tmp_path, start):
    """Killed between a broken shot's acknowledgement and its refusal: found by kills at `after_receive`."""
    inbox = tmp_path / "inbox"
    inbox.mkdir()
    (inbox / "a.dng").write_bytes(camera.shots[0].read_bytes()[:5000])
    daemon = start("watch", inbox, wait=False, HOTPIXD_FAILPOINT="after_receive:kill")
    assert daemon.process.wait(60) == -signal.SIGKILL
    again = start("watch", inbox)

    def alerts() -> list[str]:
        return [alert["text"] for alert in again.ask("status")["alerts"]]

    eventually(lambda: alerts() and alerts()[0].startswith("a.dng was refused"), "the refusal is alerted")
    assert again.stop() == 0
    third = start("watch", inbox)
    assert len(third.ask("status")["alerts"]) == 1


def test_a_missing_directory_is_waited_for(camera: Camera, tmp_path, start):
    """The status says so; when it comes, its shots are folded, though its name holds escape codes."""
    inbox = tmp_path / "late\x1b[31m"
    daemon = start("watch", inbox)
    assert daemon.ask("status")["sources"][0]["status"] == "away"
    shutil.copytree(camera.folder, inbox)
    daemon.wait_folded(12)
    assert "\x1b" not in daemon.log
    assert daemon.stop() == 0


def test_a_camera_without_a_serial_number_takes_the_name_given(tmp_path, start):
    """Two bodies of one model then have two statistics, and a replay keeps them apart."""
    from hotpixd.simulate import VirtualSensor, write_series

    for place in ("left", "right"):
        sensor = VirtualSensor(64, 48, hot=2, stuck=0, dead=0, seed=1, serial="")
        for _ in write_series(tmp_path / place, sensor, 3, "moving" if place == "left" else "dark", "dng"):
            pass
        (tmp_path / place / "truth.json").unlink()
    sources = [{"directory": place, "camera": place} for place in ("left", "right")]
    daemon = start("run", "--config", configured(tmp_path, sources=sources))
    daemon.wait_folded(6)
    daemon.stop(signal.SIGKILL)
    again = start("run", "--config", configured(tmp_path, sources=sources))
    frames = {sensor["serial"]: sensor["frames"] for sensor in again.ask("status")["sensors"]}
    assert frames == {"left": 3, "right": 3}


def test_it_checkpoints_when_idle(camera: Camera, tmp_path, start):
    """After a quiet second a generation covers everything, so a crash then costs no replay."""
    config = configured(tmp_path, sources=[{"directory": str(camera.folder)}], checkpoint={"idle_s": 1})
    daemon = start("run", "--config", config)
    daemon.wait_folded(12)
    eventually(lambda: list(daemon.state.glob("sensors/*/gen-*.hpx")), "a generation is written")
    daemon.stop(signal.SIGKILL)
    assert daemon.ask("verify")["waiting"] == 0


def test_a_stable_defect_reaches_the_command(camera: Camera, tmp_path, start):
    """The alert comes with its message's id, once, though the daemon is killed and started again."""
    told_to = tmp_path / "told.jsonl"
    alerts = {"command": ["sh", "-c", f"cat >> '{told_to}'; echo >> '{told_to}'"], "gather_s": 1}
    config = configured(tmp_path, sources=[{"directory": str(camera.folder)}], alerts=alerts)
    daemon = start("run", "--config", config)
    daemon.wait_folded(12)
    eventually(told_to.exists, "the command is run")
    time.sleep(3)
    daemon.stop(signal.SIGKILL)
    again = start("run", "--config", config)
    time.sleep(3)
    assert again.stop() == 0
    messages = [json.loads(line) for line in told_to.read_text().splitlines() if line]
    stable = [alert["id"] for message in messages for alert in message["alerts"] if alert["topic"] == "stable"]
    assert stable
    assert len(stable) == len(set(stable)) == len(daemon.ask("defects")["sensors"][0]["defects"])


def test_metrics_are_served_and_in_the_status(camera: Camera, tmp_path, start):
    """Off by default; the numbers are those of the status."""
    config = configured(tmp_path, sources=[{"directory": str(camera.folder)}], metrics={"listen": "127.0.0.1:19469"})
    daemon = start("run", "--config", config)
    daemon.wait_folded(12)
    time.sleep(1.2)
    with urllib.request.urlopen("http://127.0.0.1:19469/metrics", timeout=10) as response:
        text = response.read().decode()
    assert 'hotpixd_shots_total{fate="folded"} 12.0' in text
    beside_it = daemon.ask("status")
    assert beside_it["metrics"]
    assert daemon.stop() == 0
    without = json.loads(run("status", "--json", "--state", tmp_path / "state").stdout)
    assert without.keys() == beside_it.keys()
    assert without["metrics"] is None


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk takes root")
def test_a_full_disk_is_survived(camera: Camera, tmp_path, start):
    """It stays up, says so, acknowledges nothing, and goes on by itself when there is room."""
    disk = tmp_path / "state"
    with small_disk(disk, "700k") as resize:
        daemon = start("watch", camera.folder)
        eventually(lambda: "No space left" in daemon.log, "the full disk is said")
        with contextlib.closing(daemon.client()) as client:
            # Between two tries it may seem well for a moment.
            assert any(
                "No space left" in (live["daemon"]["degraded"] or live["daemon"]["activity"])
                for _, live in zip(range(20), client.watch(), strict=False)
            )
        assert daemon.process.poll() is None
        resize("100m")
        daemon.wait_folded(12, within_s=90)
        assert daemon.stop() == 0
        feed(tmp_path / "scanned", camera.folder)
        assert told(disk) == told(tmp_path / "scanned")


@contextlib.contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Callable[[str], None]]:
    """Mount a disk of this size; yields what changes that."""
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder]).returncode:
        pytest.skip("no tmpfs can be mounted here")
    try:
        yield lambda size: subprocess.run(["mount", "-o", f"remount,size={size}", folder], check=True)
    finally:
        subprocess.run(["umount", "-l", folder], check=False)


def test_files_renamed_as_soon_as_they_are_written_alarm_nobody(camera: Camera, tmp_path, start):
    """As tether programs do it. Under their first names some are gone before they can be read."""
    inbox = tmp_path / "inbox"
    inbox.mkdir()
    daemon = start("run", "--config", configured(tmp_path, sources=[{"directory": str(inbox)}]))
    for number in range(60):
        shot = camera.shots[number % len(camera.shots)]
        first = inbox / f"new_{shot.name}"
        shutil.copy(shot, first)
        time.sleep(number / 3000)
        first.rename(inbox / shot.name)
    daemon.wait_folded(len(camera.shots))
    assert [alert["text"] for alert in daemon.ask_alerts() if alert["topic"] == "refused"] == []


def noting(tmp_path: Path) -> tuple[dict[str, object], Callable[[], list[dict[str, Any]]]]:
    """Return settings of alerts whose command notes each message, and what returns those messages."""
    told_to = tmp_path / "told.jsonl"
    command = ["sh", "-c", f"cat >> '{told_to}'; echo >> '{told_to}'"]

    def messages() -> list[dict[str, Any]]:
        lines = told_to.read_text().splitlines() if told_to.exists() else []
        return [json.loads(line) for line in lines if line]

    return {"command": command, "gather_s": 0, "topics": ["disk", "source", "damage"], "disk_free_mb": 0}, messages


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk takes root")
@pytest.mark.parametrize("size", ["4k", "100k"])
def test_a_disk_full_before_the_ledger_can_be_made_is_waited_out(camera: Camera, tmp_path, start, size):
    """It is up, answers why it does nothing, alerts without a ledger, once, and goes on when there is room."""
    alerts, messages = noting(tmp_path)
    config = configured(tmp_path, sources=[{"directory": str(camera.folder)}], alerts=alerts)
    with small_disk(tmp_path / "state", size) as resize:
        daemon = start("run", "--config", config, wait=False)
        (message,) = eventually(messages, "the alert is sent", 60)
        assert [alert["text"][:28] for alert in message["alerts"]] == ["The state's disk is full: No"]
        with contextlib.closing(daemon.client()) as client:
            live = next(iter(client.watch()))
            assert "No space left" in live["daemon"]["degraded"]
            assert [alert["topic"] for alert in live["alerts"]] == ["disk"]
        time.sleep(8)  # the next try
        assert daemon.process.poll() is None
        assert len(messages()) == 1
        resize("100m")
        eventually(lambda: daemon.log.count("folded frame") == 12, "the shots are folded", 90)
        eventually(lambda: len(messages()) == 2, "its end is told")
        assert "no longer full" in messages()[1]["body"]
        # What is shown is a tick old at most; defects are shown too.
        eventually(lambda: [a["topic"] for a in daemon.ask_alerts()].count("disk") == 2, "both are shown")
        assert daemon.stop() == 0
        again = start("run", "--config", config)
        time.sleep(2)
        assert again.stop() == 0
        assert len(messages()) == len({one["id"] for one in messages()}) == 2
        feed(tmp_path / "scanned", camera.folder)
        assert told(tmp_path / "state") == told(tmp_path / "scanned")


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk takes root")
def test_a_disk_full_during_the_replay_is_waited_out(camera: Camera, tmp_path, start):
    """Killed amid the shots, started with not a byte free: it says so and ends as if it had been undisturbed."""
    alerts, messages = noting(tmp_path)
    shared = {"sources": [{"directory": str(camera.folder)}], "alerts": alerts}
    config = configured(tmp_path, **shared)
    state = tmp_path / "state"
    with small_disk(state, "100m") as resize:
        daemon = start("run", "--config", config)
        eventually(lambda: daemon.log.count("folded frame") >= 5, "some shots are folded")
        daemon.stop(signal.SIGKILL)
        with contextlib.suppress(OSError), (state / "ballast").open("wb", buffering=0) as ballast:
            while ballast.write(bytes(4096)):
                pass
        configured(tmp_path, **shared, checkpoint={"every_shots": 2})
        again = start("run", "--config", config, wait=False)
        eventually(lambda: "No space left" in again.log, "the full disk is said", 60)
        eventually(messages, "the alert is sent")
        with contextlib.closing(again.client()) as client:
            assert client.ask("status")["daemon"]["degraded"]
        assert again.process.poll() is None
        (state / "ballast").unlink()
        resize("200m")
        again.wait_folded(12, within_s=90)
        assert again.stop() == 0
        feed(tmp_path / "scanned", camera.folder)
        assert told(state) == told(tmp_path / "scanned")


@pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")
def test_a_disk_that_fails_ends_it_in_a_sentence(camera: Camera, tmp_path, start):
    """EIO from fsync must not be asked again: exit code 3, no traceback, and the next start loses nothing."""
    for number, name in ((4, "fsync"), (9, "fsync"), (3, "fdatasync")):
        state = tmp_path / f"{name}{number}"
        fault = f"inject={name}:error=EIO:when={number}+"
        command = ["strace", "-f", "-qq", "-o", "/dev/null", "-e", f"trace={name}", "-e", fault, *HOTPIXD]
        env = environment(XDG_RUNTIME_DIR=str(tmp_path))
        done = subprocess.run(
            [*command, "watch", "--plain", camera.folder, "--state", state], env=env, capture_output=True, timeout=120
        )
        said = done.stderr.decode()
        assert done.returncode == 3, said
        assert "Traceback" not in said
        assert "fails" in said.splitlines()[-1]
        feed(state, camera.folder)
        if not (tmp_path / "scanned").exists():
            feed(tmp_path / "scanned", camera.folder)
        assert told(state) == told(tmp_path / "scanned")


class Told:
    """A watchman who notes what he is told."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *what, **more: self.calls.append((name, *what, *more.values()))


def test_a_read_that_hangs_shows_in_status_and_alerts(monkeypatch):
    """After a minute in which nothing more was read, once, and once when it goes on; the loop is not held up."""
    now = [1000.0]
    service = service_module._Service(Config(), Config, service_module.Wake(), service_module.Orders(lambda: None))
    reading = Reading(Path("/card/IMG_1.CR2"), 1000.0)
    readings = {"/card": reading}
    service._monitor = SimpleNamespace(readings=lambda: readings)
    service._watchman = told = Told()
    state = SourceState("/card", "watching", "3 files", 3, 2, 0.0)
    for after_s, trouble in ((59, False), (61, True), (62, True)):
        now[0] = 1000.0 + after_s
        shown = service._moving(state, now[0])
        assert (shown.status == "trouble") == trouble
        assert ("IMG_1.CR2" in shown.detail) == trouble
    assert service._moving(replace(state, name="/other"), now[0]).status == "watching"
    reading.moved_at = now[0]
    assert service._moving(state, now[0]) == state
    assert service._moving(state, now[0]) == state
    assert [(call[0], call[1], call[3] is None) for call in told.calls] == [
        ("stuck", "/card", False),
        ("stuck", "/card", False),
        ("stuck", "/card", True),
    ]


def test_jumps_of_the_clock_and_old_checkpoints_are_noticed(monkeypatch):
    """The wall clock is compared with one that goes on in sleep; a checkpoint is as old as what it leaves out."""
    wall, boot = [1e9], [5000.0]
    monkeypatch.setattr(service_module.time, "time", lambda: wall[0])
    monkeypatch.setattr(service_module.time, "clock_gettime", lambda _: boot[0])
    service = service_module._Service(Config(), Config, service_module.Wake(), service_module.Orders(lambda: None))
    service._monitor = monitor = SimpleNamespace(is_worth_a_checkpoint=False, in_flight=0, checkpointed_at=0.0)
    service._watchman = told = Told()
    for passed_s, set_by_s, uncovered in ((0, 0, 0), (3600, 0, 3), (1, -500, 3), (100, 0, 0), (9, 0.5, 1)):
        wall[0] += passed_s + set_by_s
        boot[0] += passed_s
        monitor.is_worth_a_checkpoint = uncovered > 0
        service._look_at_clocks(boot[0])
    steps = [call[1] for call in told.calls if call[0] == "clock_step"]
    assert steps == pytest.approx([0, -500, 0, 0.5])
    assert [call[1] for call in told.calls if call[0] == "checkpoint"] == [0, 0, 1, 0, 0]


def test_wrong_use_is_a_sentence(tmp_path):
    """No sources, a wrong configuration, one that is not there."""
    nothing = run("run", "--config", configured(tmp_path, log_level="info"), "--state", tmp_path / "s")
    assert nothing.returncode == 2
    assert "nothing to watch" in nothing.stderr
    wrong = run("run", "--config", configured(tmp_path, detection={"alpha": 7}), "--state", tmp_path / "s")
    assert wrong.returncode == 2
    assert "detection.alpha" in wrong.stderr
    assert run("run", "--config", tmp_path / "none.yaml").returncode == 2
    checked = run("check-config", configured(tmp_path, detection={"alhpa": 0.1}))
    assert checked.returncode == 2
    assert "alpha" in checked.stderr
    mine = tmp_path / "mine.svg"
    mine.write_text("mine")
    nowhere = tmp_path / "none" / "p.svg"
    for picture, words in ((nowhere, f"There is no folder {nowhere.parent}."), (mine, "--force")):
        kept = run("dashboard", "--picture", picture, "--state", tmp_path / "none")
        assert kept.returncode == 2
        assert words in kept.stderr
    for picture in ((tmp_path / "p.svg",), (mine, "--force")):
        alone = run("dashboard", "--picture", *picture, "--state", tmp_path / "none")
        assert alone.returncode == 3
        assert "No daemon" in alone.stderr
    assert mine.read_text() == "mine"


@pytest.mark.parametrize(
    ("sources", "cameras", "said"),
    [
        (0, 0, "but it names no sources or cameras: there is nothing to watch."),
        (1, 0, "1 source."),
        (0, 1, "1 camera."),
        (1, 2, "1 source and 2 cameras."),
        (2, 1, "2 sources and 1 camera."),
    ],
)
def test_a_right_configuration_is_said_to_be(tmp_path, sources, cameras, said):
    """With how much it names, so that a section that is not read where one thinks shows."""
    path = configured(
        tmp_path,
        sources=[{"directory": str(tmp_path), "camera": "X"}, {"directory": "/nowhere"}][:sources],
        cameras=[{"port": "auto"}, {"port": "ptpip:192.0.2.1", "save_to": str(tmp_path)}][:cameras],
    )
    done = run("check-config", path)
    assert done.returncode == 0
    *warned, last = done.stdout.splitlines()
    # One that is not there is waited for.
    assert len(warned) == (sources == 2)
    assert last == f"{path} is right{' except for what is said above' * len(warned)}, {said}"


def test_without_a_file_the_environment_is_checked_all_the_same(tmp_path):
    """A variable with a slip of the pen was passed over where there was no file, but ended `run`."""
    env = environment(XDG_CONFIG_HOME=str(tmp_path))
    done = run("check-config", env=env)
    assert (done.returncode, done.stdout) == (
        0,
        "No configuration file: the defaults apply, but they name no sources or cameras: there is nothing to watch.\n",
    )
    done = run("check-config", env={**env, "HOTPIXD_SOURCES": f"[{{directory: {tmp_path}}}]"})
    assert done.stdout == "No configuration file: the defaults apply, 1 source.\n"
    done = run("check-config", env={**env, "HOTPIXD_FOO": "1"})
    assert done.returncode == 2
    assert "HOTPIXD_FOO: there is no key for this variable" in done.stderr


def test_a_url_that_no_alert_can_be_sent_to_is_told_before_it_is_needed(tmp_path):
    """It is no error: the daemon goes on with the other channels."""
    done = run("check-config", configured(tmp_path, alerts={"notify": ["json://localhost", "foo://bar"]}))
    assert done.returncode == 0
    assert "URL 2 of alerts.notify (foo://) cannot be used" in done.stdout
    assert "URL 1" not in done.stdout


@pytest.mark.skipif(shutil.which("tmux") is None, reason="tmux is not installed")
def test_watch_shows_the_dashboard_and_stops_with_it(camera: Camera, tmp_path, runtime):
    """On a terminal: shots appear on the screen as they come; q ends the daemon too, cleanly."""
    inbox, state = tmp_path / "inbox", tmp_path / "state"
    inbox.mkdir()
    server = ["tmux", "-S", str(runtime / "tmux")]
    command = shlex.join([*HOTPIXD, "watch", str(inbox), "--state", str(state)])
    env = environment(XDG_RUNTIME_DIR=str(runtime), LANG="C.UTF-8", TERM="xterm-256color")
    shown = [*server, "new-session", "-d", "-x", "100", "-y", "30", f"{command}; echo EXIT $?; sleep 60"]

    def screen() -> str:
        return subprocess.run([*server, "capture-pane", "-p"], capture_output=True, text=True, env=env).stdout

    subprocess.run(shown, env=env, check=True)
    try:
        eventually(lambda: "No sensor is known yet" in screen(), "the dashboard is there", 60)
        for shot in camera.shots:
            put(shot, inbox)
        eventually(lambda: "12 frames" in screen() and "stuck" in screen(), "the defects are shown")
        subprocess.run([*server, "send-keys", "q"], env=env, check=True)
        eventually(lambda: "EXIT 0" in screen(), "it has stopped", 60)
    finally:
        subprocess.run([*server, "kill-server"], env=env, check=False)
    checked = json.loads(run("verify", "--json", "--state", state, env=env).stdout)
    assert checked["ok"]
    assert checked["sensors"][0]["frames"] == 12


def test_no_line_of_a_client_ends_it(camera: Camera, tmp_path, start):
    """Numbers without end, wrong types, unknown sensors, names and sites: refused in a sentence."""
    daemon = start("watch", camera.folder)
    daemon.wait_folded(12)
    sensor = daemon.ask("status")["sensors"][0]["id"]
    wrong = (
        '{"ask":"least-variance","k":1e999}',
        '{"ask":"least-variance","k":"many"}',
        '{"ask":"around","sensor":"SENSOR","site":1e999}',
        '{"ask":"around","sensor":"SENSOR","site":1e30}',
        '{"ask":"around","sensor":"SENSOR","site":-1}',
        '{"ask":"around","sensor":"none","site":1}',
        '{"ask":"around"}',
        '{"ask":"rm -rf"}',
    )
    (path,) = find_sockets(daemon.env)
    with socket.socket(socket.AF_UNIX) as line:
        line.connect(str(path))
        with line.makefile("rw") as file:
            assert json.loads(file.readline())["type"] == "hello"
            for question in wrong:
                file.write(question.replace("SENSOR", sensor) + "\n")
                file.flush()
                assert json.loads(file.readline())["type"] == "error", question
    assert daemon.folded() == 12
    assert daemon.stop() == 0


def test_what_it_says_of_its_shots_is_what_the_ledger_says(camera: Camera, tmp_path, start):
    """After a crash amid the shots, and though a refused one is met again: no shot counts twice on the screen."""
    inbox = tmp_path / "inbox"
    shutil.copytree(camera.folder, inbox)
    (inbox / "a.dng").write_bytes(camera.shots[0].read_bytes()[:5000])
    daemon = start("watch", inbox)
    eventually(lambda: daemon.log.count("folded frame") >= 5, "some shots are folded")
    daemon.stop(signal.SIGKILL)
    again = start("watch", inbox)
    again.wait_folded(12)
    eventually(lambda: "refused a.dng" in daemon.log + again.log, "the refusal is said")
    (inbox / "a.dng").touch()
    eventually(lambda: "INFO    a.dng:" in again.log, "it is met again", 60)
    with contextlib.closing(again.client()) as client:
        shown = next(iter(client.watch()))["daemon"]["shots"]
        told_of = client.ask("status")["shots"]
    assert {fate: shown.get(fate, 0) for fate in ("folded", "refused")} == {"folded": 12, "refused": 1}
    assert told_of["refused"] == 1
    assert again.stop() == 0


def test_a_reload_during_the_replay_waits_for_it(camera: Camera, tmp_path, start):
    """SIGHUP before it watches anything is heeded once it does."""
    config = configured(tmp_path, sources=[{"directory": str(camera.folder)}])
    first = start("run", "--config", config)
    first.wait_folded(12)
    first.stop(signal.SIGKILL)
    second = start("run", "--config", config, wait=False)
    eventually(lambda: "starting" in second.log, "it has opened the state")
    for _ in range(20):
        second.process.send_signal(signal.SIGHUP)
        time.sleep(0.05)
    second.wait_ready()
    eventually(lambda: "the configuration is reloaded" in second.log, "the reload is done")
    assert second.stop() == 0
