"""The command as a user starts it: answers, exit codes, and what it does when the world around it is broken."""

from __future__ import annotations

import ast
import contextlib
import fcntl
import json
import os
import pty
import re
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image
from typer.main import get_command
from typer.testing import CliRunner

from conftest import HOTPIXD, Camera, environment, feed, run, told
from daemons import Daemon, eventually
from hotpixd import __version__
from hotpixd.cli import app
from hotpixd.feed_server import FeedServer
from hotpixd.simulate import write_series
from hotpixd.store.checkpoint import generations
from hotpixd.store.state import State

HEAVY = {"numpy", "numba", "rawpy", "PIL", "astropy", "tifffile", "exifread"}

NUMBER = (int, float)
NULL = type(None)

SENSOR = {
    "id": str, "make": (str, NULL), "model": (str, NULL), "serial": (str, NULL), "samples": str, "width": int,
    "height": int, "colours": str, "frames": int, "frames_counted": int,
}  # fmt: skip
WITH_TALLY = {**SENSOR, "frames_waiting": int}
DEFECT = {
    "x": int, "y": int, "colour": str, "kind": str, "state": str, "certainty": NUMBER, "log_e": NUMBER,
    "excess_adu": (int, float, NULL), "excess_sigma": (int, float, NULL),
    "dark_current_adu_per_s": (int, float, NULL), "dark_current_iso": (int, float, NULL),
    "share_on": (int, float, NULL), "level_adu": (int, float, NULL), "first_seen": (str, NULL),
    "stable_since": (str, NULL), "frames_to_stable": (int, NULL),
}  # fmt: skip
LEAST = {"x": int, "y": int, "channel": int, "colour": str, "m2": NUMBER, "mean": NUMBER}
SHOT = {
    "name": str, "received_at": str, "taken_at": (str, NULL), "verdict": str, "kind": (str, NULL),
    "exposure_s": (int, float, NULL), "iso": (int, float, NULL), "sensor_temp_c": (int, float, NULL),
}  # fmt: skip
TALLY = {"received": int, "folded": int, "counted": int, "refused": int, "companion": int}
DECLARED = {"x": int, "y": int, "source": str, "declared_at": str, "sources": [str]}
REFUSED = {"name": str, "path": str, "reason": str}


def has_shape(value: Any, shape: Any) -> bool:
    """Tell whether a JSON value has the keys and types of a shape; every item of a list has the one of its item."""
    if isinstance(shape, dict):
        return (
            isinstance(value, dict)
            and value.keys() == shape.keys()
            and all(has_shape(value[key], part) for key, part in shape.items())
        )
    if isinstance(shape, list):
        return isinstance(value, list) and all(has_shape(item, shape[0]) for item in value)
    # True is an int to Python, not to a reader of JSON.
    return isinstance(value, shape) and (isinstance(value, bool) == (shape is bool))


def invoke(*arguments: object) -> Any:
    """Run a command in this process, which is quicker; its JSON if it was asked for."""
    result = CliRunner().invoke(app, list(map(str, arguments)))
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return json.loads(result.stdout) if "--json" in arguments else result


def harmed(scanned: Path, root: Path) -> Path:
    """Return a copy of a state, to do harm to."""
    shutil.copytree(scanned, root)
    return root


@pytest.fixture
def broken(tmp_path: Path, camera: Camera) -> Path:
    path = tmp_path / "broken.dng"
    path.write_bytes(camera.shots[0].read_bytes()[:9000])
    return path


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 12 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = os.geteuid() == 0 and shutil.which("mount")
    if (
        not mounted
        or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", folder], check=False).returncode
    ):
        pytest.skip("only root can mount a small disk, and not in every container")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


@pytest.fixture
def like_everyone() -> list[str]:
    """What to put before a command so that it has no more rights than the files give, also if root runs the tests."""
    if os.geteuid() != 0:
        return []
    prefix = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"]
    if not shutil.which("setpriv") or subprocess.run([*prefix, "true"], check=False).returncode:
        pytest.skip("root may open everything, and there is no setpriv to give that up")
    return prefix


# --- answers


def test_the_shape_check_can_fail():
    """Negative control of the helper that the JSON tests stand on."""
    assert has_shape({"a": [1], "b": None}, {"a": [int], "b": (str, NULL)})
    assert not has_shape({"a": [1, "x"]}, {"a": [int]})
    assert not has_shape({"a": 1, "b": 2}, {"a": int})
    assert not has_shape({}, {"a": int})
    assert not has_shape({"a": True}, {"a": int})


@pytest.mark.parametrize(
    ("question", "sensor", "rest"),
    [
        (["defects"], {**WITH_TALLY, "min_frames": int, "defects": [DEFECT], "declared": [DECLARED]}, {}),
        (["defects", "--all"], {**WITH_TALLY, "min_frames": int, "defects": [DEFECT], "declared": [DECLARED]}, {}),
        (["least-variance", "-k", 7], {**WITH_TALLY, "least": [LEAST]}, {}),
        (["verify"], {**SENSOR, "digest": str}, {"ok": bool, "waiting": int, "problems": [str]}),
        (
            ["status"],
            {**WITH_TALLY, "stable": int, "candidate": int, "recovered": int, "not_counted": dict, "last_shot": SHOT},
            {
                "state": str,
                "shots": TALLY,
                "refused": [REFUSED],
                "last_shot": SHOT,
                "sources": list,
                "alerts": list,
                "daemon": NULL,
                "metrics": NULL,
                "series": NULL,
            },
        ),
    ],
)
def test_the_json_of_every_question_has_the_keys_and_types_of_the_contract(question, sensor, rest, scanned):
    """Other programs read it; exactly these keys, so that one that comes or goes is noticed here."""
    answer = invoke(*question, "--json", "--state", scanned)
    assert len(answer["sensors"]) == 1
    assert has_shape(answer, {"sensors": [sensor], **rest})


def test_a_state_without_shots_answers_every_question(tmp_path, broken):
    """With no sensors, not with a fault."""
    assert invoke("scan", broken, "--state", tmp_path / "state").exit_code == 1
    for question in ("status", "defects", "least-variance", "verify"):
        assert invoke(question, "--json", "--state", tmp_path / "state")["sensors"] == []
        assert invoke(question, "--state", tmp_path / "state").exit_code == 0


def test_the_values_of_a_defect_are_in_range(scanned, camera):
    """Positions inside the frame, certainty at most 1, moments as ISO 8601 in UTC, only stable ones without --all."""
    (sensor,) = invoke("defects", "--json", "--state", scanned)["sensors"]
    assert (sensor["make"], sensor["model"], sensor["serial"]) == ("Hotpixd", "Virtual Camera", "V0001")
    assert (sensor["width"], sensor["height"], sensor["samples"], sensor["frames"]) == (200, 150, "raw", 12)
    assert sensor["defects"]
    for defect in sensor["defects"]:
        assert 0 <= defect["x"] < 200
        assert 0 <= defect["y"] < 150
        assert defect["state"] == "stable"
        assert defect["certainty"] == 1.0
        assert re.fullmatch(r"2025-06-01T\d\d:\d\d:\d\dZ", defect["stable_since"])
        assert defect["first_seen"] <= defect["stable_since"]
        assert 4 <= defect["frames_to_stable"] <= 12
    places = [(d["y"], d["x"]) for d in sensor["defects"]]
    assert places == sorted(places)


def test_every_question_has_an_answer_for_people(scanned, broken, tmp_path):
    """Names, counts and reasons in words and tables."""
    root = harmed(scanned, tmp_path / "state")
    feed(root, broken)
    said = {q: invoke(q, "--state", root).stdout for q in ("status", "defects", "least-variance", "verify")}
    assert all("Hotpixd Virtual Camera, serial V0001, 200x150 raw" in text for text in said.values())
    assert f"  {broken}: " in said["status"]
    assert "12 folded" in said["status"]
    assert re.search(r"x +y +kind +state", said["defects"])
    assert "M2" in said["least-variance"]
    assert "can be believed" in said["verify"]


def test_least_variance_is_what_the_textbook_says(tmp_path):
    """Welford over the decoded pictures, ties by position: the same sites, in the same order, with the same sums."""
    shots = tmp_path / "shots"
    done = invoke("simulate", shots, "--format", "jpg", "--frames", 7, "--width", 120, "--height", 80, "--stuck", 4,
               "--hot", 3, "--dead", 3)  # fmt: skip
    assert done.exit_code == 0, done.output
    mean = m2 = np.zeros((80, 120, 3))
    for n, path in enumerate(sorted(shots.glob("*.jpg")), start=1):
        with Image.open(path) as picture:
            samples = np.asarray(picture, dtype=np.float64)
        delta = samples - mean
        mean = mean + delta / n
        m2 = m2 + delta * (samples - mean)
    # Welford's rounding must not decide between equal ones: all M2 here are multiples of 1/7.
    order = np.argsort(np.round(m2.ravel(), 6), kind="stable")[:10]
    state = tmp_path / "state"
    assert invoke("scan", shots, "--state", state).exit_code == 0
    answer = json.loads(run("least-variance", "-k", 10, "--json", "--state", state).stdout)
    (sensor,) = answer["sensors"]
    y, x, channel = np.unravel_index(order, m2.shape)
    assert [(s["y"], s["x"], s["channel"]) for s in sensor["least"]] == list(zip(y, x, channel, strict=True))
    assert [s["colour"] for s in sensor["least"]] == ["RGB"[c] for c in channel]
    assert np.allclose([s["m2"] for s in sensor["least"]], m2.ravel()[order], rtol=1e-9, atol=1e-6)
    assert np.allclose([s["mean"] for s in sensor["least"]], mean.ravel()[order], rtol=1e-12)


def test_simulate_writes_shots_and_the_truth(tmp_path):
    """And the scan of them gives the sensor that the truth names."""
    few = ["--frames", 2, "--width", 64, "--height", 48, "--hot", 2, "--stuck", 1, "--dead", 1]
    done = invoke("simulate", tmp_path / "shots", *few)
    assert done.exit_code == 0
    truth = json.loads((tmp_path / "shots/truth.json").read_text())
    assert len(truth["defects"]) == 4
    assert invoke("scan", tmp_path / "shots", "--state", tmp_path / "state").exit_code == 0
    (sensor,) = invoke("status", "--json", "--state", tmp_path / "state")["sensors"]
    assert all(sensor[key] == truth[key] for key in ("make", "model", "serial", "width", "height"))


def test_simulated_shots_are_not_mixed_with_those_of_another_run(tmp_path):
    """Truth.json would not be true of them. The same run may be given again, or in the other format."""
    few = ["simulate", tmp_path, "--width", 64, "--height", 48, "--hot", 2, "--stuck", 1, "--dead", 1]
    run(*few, "--frames", 2).check_returncode()
    held = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    for change in (["--frames", 1], ["--frames", 2, "--seed", 1], ["--frames", 2, "--kind", "dark"]):
        done = run(*few, *change)
        assert (done.returncode, done.stdout) == (2, "")
        assert f"{tmp_path} holds shots of another run; name another folder" in done.stderr
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == held
    assert run(*few, "--frames", 2, "--format", "jpg").returncode == 0
    assert run(*few, "--frames", 2).returncode == 0
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.suffix != ".jpg"} == held
    (tmp_path / "truth.json").unlink()
    assert run(*few, "--frames", 2).returncode == 2


def test_another_seed_is_another_camera(tmp_path):
    """Or their shots would be folded together."""
    serials = set()
    for seed in (0, 3):
        run("simulate", tmp_path / str(seed), "--seed", seed, "--frames", 1, "--width", 200, "--height", 150)
        serials.add(json.loads((tmp_path / str(seed) / "truth.json").read_text())["serial"])
    assert serials == {"V0001", "V0004"}


def test_the_demo_finds_what_it_planted_and_nothing_else(tmp_path):
    """All the way: a camera is tethered, its shots are fetched, darks are ordered; and what it leaves is of use."""
    kept = tmp_path / "kept"
    done = run("demo", "--keep", kept)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Planted 42, found 42, missed 0, false 0." in done.stdout
    assert "30 shots folded" in done.stdout
    assert done.stdout.count("45 shots folded") == 1
    assert "is a stable defect." in done.stdout
    (sensor,) = json.loads((kept / "defects.json").read_text())["sensors"]
    assert (sensor["width"], sensor["height"], sensor["frames"], sensor["samples"]) == (750, 500, 45, "rendered")
    stable = [defect for defect in sensor["defects"] if defect["state"] == "stable"]
    assert len(stable) >= 42
    with Image.open(kept / "map.png") as picture:
        assert picture.size == (750, 500)
        ground = picture.getpixel((375, 250))
        assert all(picture.getpixel((defect["x"], defect["y"])) != ground for defect in stable)
    screen = ElementTree.parse(kept / "dashboard.svg").getroot()
    words = "".join(screen.itertext()).replace("\xa0", " ")
    assert "Hotpixd Virtual Camera, serial V0001" in words
    assert "45 frames" in words
    assert run("verify", "--state", kept / "state").returncode == 0
    (known,) = json.loads(run("status", "--json", "--state", kept / "state").stdout)["sensors"]
    assert known["last_shot"]["kind"] == "dark"
    again = run("demo", "--keep", kept)
    assert again.returncode == 2
    assert str(kept) in again.stderr


def test_a_demo_replaces_nothing(tmp_path):
    """Its results have names that others may have, too."""
    (tmp_path / "map.png").write_text("mine")
    for keep in (tmp_path, tmp_path / "map.png"):
        assert "is no empty folder" in run("demo", "--keep", keep).stderr
    assert (tmp_path / "map.png").read_text() == "mine"


def test_a_short_demo_tells_what_it_missed(tmp_path, runtime):
    """Its exit code says whether all was found and nothing else; it leaves nothing but its results."""
    done = run("demo", "--frames", 5, env=environment(TMPDIR=str(runtime)))
    counts = re.search(r"Planted 42, found (\d+), missed (\d+), false (\d+)\.", done.stdout)
    assert counts, done.stdout + done.stderr
    found, missed, false = map(int, counts.groups())
    assert found + missed == 42
    assert found > 20
    assert (done.stdout.count("  missed "), done.stdout.count("  false at ")) == (missed, false)
    assert done.returncode == (1 if missed or false else 0)
    (results,) = runtime.iterdir()
    assert f"are in {results}" in done.stdout
    assert {entry.name for entry in results.iterdir()} == {"defects.json", "map.png", "dashboard.svg"}


def processes_with(text: str) -> list[int]:
    """Return processes that have a text in their environment."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if text.encode() in (folder / "environ").read_bytes():
                found.append(int(folder.name))
    return found


@pytest.mark.parametrize(
    ("frames", "amid"), [(30, "5 shots folded"), (6, "The cap goes on")], ids=["amid the scenes", "amid the darks"]
)
def test_a_demo_that_is_interrupted_ends_all_of_it(tmp_path, runtime, frames, amid):
    """Ctrl-C: daemon, worker and temporary files are gone when it has ended, and it has not succeeded."""
    env = environment(TMPDIR=str(runtime))
    command = [*HOTPIXD, "demo", "--frames", str(frames), "--keep", str(tmp_path / "kept")]
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        try:
            assert process.stdout is not None
            said = ""
            while amid not in said:
                line = process.stdout.readline()
                assert line, said
                said += line
            # The daemon, and mostly a worker.
            assert processes_with(str(tmp_path / "kept" / "card"))
            process.send_signal(signal.SIGINT)
            said += process.stdout.read()
            assert process.wait(60) == 1
        finally:
            process.kill()
    assert "The demo did not come to its end: it was stopped" in said
    assert "Traceback" not in said
    assert processes_with(str(tmp_path / "kept")) == []
    assert processes_with(str(runtime)) == []
    assert list(runtime.iterdir()) == []
    assert run("verify", "--state", tmp_path / "kept" / "state").returncode == 0


# --- exit codes


def test_0_when_all_is_done(camera, tmp_path):
    """Also when all is known already."""
    for words in ("2 shots folded", "2 known already"):
        done = run("scan", *camera.shots[:2], "--state", tmp_path / "state")
        assert done.returncode == 0
        assert words in done.stdout


def test_0_for_all_who_ask_at_once_and_the_daemon_that_starts_meanwhile(scanned, tmp_path):
    """Each has the state for a moment: the next waits, instead of being turned away."""
    root = harmed(scanned, tmp_path / "state")
    (tmp_path / "inbox").mkdir()
    command = [*HOTPIXD, "status", "--state", str(root)]
    asking = [subprocess.Popen(command, env=environment(), stdout=subprocess.DEVNULL) for _ in range(5)]
    daemon = Daemon(root, tmp_path, "watch", tmp_path / "inbox", "--plain")
    try:
        daemon.wait_ready()
        assert [each.wait(60) for each in asking] == [0] * len(asking)
    finally:
        daemon.close()


@pytest.mark.parametrize("killed", [False, True])
def test_0_when_the_daemon_ends_before_it_has_answered(scanned, tmp_path, killed):
    """The state is asked itself when it is free. A killed daemon does not say goodbye, and its socket stays."""
    root = harmed(scanned, tmp_path / "state")
    alone = run("defects", "--json", "--state", root)
    with State(root) as state:
        daemon = FeedServer(tmp_path / "feed.sock", {}, lambda: None)
        daemon.start()
        state.announce(daemon.path)
        command = [*HOTPIXD, "defects", "--json", "--state", str(root)]
        asking = subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, text=True)
        eventually(lambda: daemon.asked, "it is asked")
        if not killed:
            state.announce(None)
        daemon.stop()
        # It has the state for a moment longer.
        time.sleep(0.3)
    out, _ = asking.communicate(timeout=60)
    assert asking.returncode == 0
    assert out == alone.stdout


@pytest.mark.parametrize("command", ["report", "backup a", "export csv -o a", "watch a --plain"])
def test_3_when_the_current_folder_was_removed(scanned, tmp_path, command):
    """As a script's own temporary folder may be: the bare "No such file or directory" did not say which."""
    root = harmed(scanned, tmp_path / "state")
    (tmp_path / "gone").mkdir()
    words = [*HOTPIXD, *command.split(), "--state", str(root)]
    shell = f"rmdir {tmp_path / 'gone'} && exec {shlex.join(words)}"
    done = subprocess.run(shell, shell=True, cwd=tmp_path / "gone", env=environment(), capture_output=True, text=True)
    assert done.returncode == 3
    assert done.stderr == "hotpixd: the folder that this was started in is gone; change to one that is there\n"


def test_1_when_a_shot_is_refused(camera, broken, tmp_path):
    """With its name and a sentence; the others are folded."""
    done = run("scan", broken, camera.shots[0], "--state", tmp_path / "state")
    assert done.returncode == 1
    assert "1 shot folded, 1 refused." in done.stdout
    assert re.search(r"refused broken\.dng: \w+.* \w+", done.stdout)


def test_1_when_a_folder_cannot_be_listed(camera, tmp_path, like_everyone):
    """What could be seen is folded."""
    inbox = tmp_path / "inbox"
    (inbox / "shut").mkdir(parents=True)
    shutil.copyfile(camera.shots[0], inbox / "a.dng")
    (inbox / "shut").chmod(0)
    done = run("scan", inbox, "--state", tmp_path / "state", prefix=like_everyone)
    (inbox / "shut").chmod(0o755)
    assert done.returncode == 1
    assert "cannot be listed: Permission denied" in done.stderr
    assert "1 shot folded." in done.stdout


def test_1_when_a_file_cannot_be_read(camera, tmp_path, like_everyone):
    """It is named; it can be scanned when it can be read."""
    inbox = tmp_path / "inbox"
    inbox.mkdir()
    for shot in camera.shots[:2]:
        shutil.copyfile(shot, inbox / shot.name)
    (inbox / camera.shots[0].name).chmod(0)
    done = run("scan", inbox, "--state", tmp_path / "state", prefix=like_everyone)
    assert done.returncode == 1
    assert "1 shot folded, 1 refused." in done.stdout
    assert "cannot be opened: Permission denied" in done.stdout


@pytest.mark.parametrize(
    "arguments",
    [
        ["scan", "/nothing/is/here.dng"],
        ["scan"],
        ["scan", "--kind", "grey", "x"],
        ["scan", "--unknown", "x"],
        ["scan", "--ignore", "thumbnails/", "/"],
        ["watch", "--ignore", "", "/"],
        ["defects", "--unknown"],
        ["unknown"],
        ["least-variance", "-k", "0"],
        ["least-variance", "-k", "ten"],
        ["simulate", "OUT", "--frames", "0"],
        ["simulate", "OUT", "--format", "gif"],
        ["simulate", "OUT", "--exposure", "nan"],
        ["simulate", "OUT", "--iso", "0"],
        ["darks", "--exposure", "nan"],
        ["darks", "--cooldown", "nan"],
        ["history", "--gap", "nan"],
        ["export", "dcraw", "--min-excess", "nan"],
        ["dashboard", "--picture", "photo.jpg", "--socket", "none"],
    ],
)
def test_2_when_used_wrongly(arguments, tmp_path):
    """An unknown command or option, a value that cannot be, a path to nothing."""
    where = ["--state", tmp_path / "state"] if arguments[0] in ("scan", "defects", "least-variance") else []
    assert invoke(*arguments, *where).exit_code == 2


def test_the_help_explains_every_argument_and_option():
    """Of each command, by -h too. What stands in brackets Rich takes for markup, and does not show."""
    commands = get_command(app).commands
    assert "import" in commands
    for name, command in commands.items():
        assert all(one.help and "[" not in one.help for one in command.params), name
        assert "Show this message" in invoke(name, "-h").output
    assert "[default: (as for run)]" in invoke("check-config", "-h").output


def test_an_empty_state_is_not_the_current_folder(tmp_path):
    """As which a path without a name counts; a script's variable may not be set."""
    for arguments in (["status"], ["scan", tmp_path], ["run"], ["restore", tmp_path / "b"]):
        done = run(*arguments, "--state", "", cwd=tmp_path)
        assert (done.returncode, done.stdout) == (2, "")
        assert "an empty path names no folder" in " ".join(done.stderr.split())
    assert not list(tmp_path.iterdir())


def test_2_says_which_path_leads_to_nothing(tmp_path):
    """And an empty folder is no success either."""
    done = run("scan", tmp_path / "gone", "--state", tmp_path / "state")
    assert done.returncode == 2
    assert str(tmp_path / "gone") in done.stderr
    (tmp_path / "empty").mkdir()
    done = run("scan", tmp_path / "empty", "--state", tmp_path / "state")
    assert done.returncode == 2
    assert "no pictures" in done.stderr
    assert not (tmp_path / "state").exists()


def test_what_a_scan_ignores_is_neither_folded_nor_refused_nor_missing(camera, broken, tmp_path):
    """Even if nothing is left: that is said in other words than of an empty folder."""
    folder = tmp_path / "sky"
    (folder / "thumbnails").mkdir(parents=True)
    shutil.copy(camera.shots[0], folder)
    shutil.copy(broken, folder / "thumbnails")
    done = run("scan", folder, "--ignore", "keogram*", "--ignore", "Thumb*", "--state", tmp_path / "state")
    assert (done.returncode, done.stdout.splitlines()[0]) == (0, "1 shot folded.")
    done = run("scan", folder, "--ignore", "*", "--state", tmp_path / "other")
    assert done.returncode == 2
    assert f"there are no pictures in {folder} but for what --ignore leaves out" in done.stderr


def test_2_says_what_is_there_that_cannot_be_scanned(tmp_path):
    """Nothing is at them would not be true."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("gone")
    (tmp_path / "loop").symlink_to("loop")
    wanted = {
        tmp_path / "pipe": "is a special file",
        "/dev/null": "is a special file",
        tmp_path / "link": "is a link that leads to nothing",
        tmp_path / "loop": "is a link that leads to nothing",
        "s3://bucket/x": "is a remote address, which only scan --cluster reads",
        tmp_path / "gone": "nothing is at",
    }
    done = run("scan", *wanted, "--state", tmp_path / "state")
    assert done.returncode == 2
    lines = dict(zip(wanted, done.stderr.splitlines(), strict=True))
    assert all(str(path) in lines[path] and words in lines[path] for path, words in wanted.items())
    assert not (tmp_path / "state").exists()


def test_a_kind_that_is_said_too_late_is_not_ignored_in_silence(camera, tmp_path):
    """What was folded stays what it was taken for."""
    run("scan", *camera.shots[:2], "--state", tmp_path / "state")
    done = run("scan", *camera.shots[:3], "--kind", "dark", "--state", tmp_path / "state")
    assert "2 of those known were folded as light, which stays so" in done.stdout
    done = run("scan", *camera.shots[:2], "--kind", "light", "--state", tmp_path / "state")
    assert "were folded as" not in done.stdout


def test_lights_that_are_called_darks_are_no_evidence(camera, tmp_path):
    """Every detail of a scene would be a defect: nothing excuses an extreme in a dark. True darks count."""
    darks = tmp_path / "darks"
    for _ in write_series(darks, camera.sensor, 6, "dark", "dng"):
        pass
    done = run("scan", camera.folder, darks, "--kind", "dark", "--state", tmp_path / "state")
    assert done.returncode == 0
    assert "12 frames not counted: light has fallen on the sensor, though they are to be darks" in done.stdout
    (sensor,) = json.loads(run("defects", "--json", "--state", tmp_path / "state").stdout)["sensors"]
    assert (sensor["frames"], sensor["frames_counted"]) == (18, 6)
    planted = {(d.x, d.y) for d in camera.sensor.defects}
    assert {(d["x"], d["y"]) for d in sensor["defects"]} <= planted


def test_2_when_a_file_is_to_be_watched(tmp_path):
    """At once: it never becomes a directory, as one that is not there may when a card is mounted."""
    (tmp_path / "conf.yaml").write_text("sources: []\n")
    (tmp_path / "link").symlink_to("conf.yaml")
    for name in ("conf.yaml", "link"):
        done = run("watch", tmp_path, tmp_path / name, "--state", tmp_path / "state")
        assert done.returncode == 2
        assert f"{tmp_path / name} is a file; name the directory" in done.stderr
    assert not (tmp_path / "state").exists()


def test_2_when_simulated_shots_cannot_be_written(tmp_path):
    """Where they should go is the user's choice."""
    (tmp_path / "file").write_text("")
    done = run("simulate", tmp_path / "file" / "shots", "--frames", 1)
    assert done.returncode == 2
    assert str(tmp_path / "file") in done.stderr


def test_3_when_the_disk_does_not_take_simulated_shots(small_disk, like_everyone):
    """Found by a user: a full disk was wrong use, told in numbers of bytes, and a part of a shot stayed."""
    (small_disk / "rest").write_bytes(bytes(10_000_000))
    done = run("simulate", small_disk / "shots", "--frames", 2)
    assert done.returncode == 3
    assert f"No space left for the shots in {small_disk / 'shots'}" in done.stderr
    assert [path.name for path in (small_disk / "shots").iterdir()] == ["truth.json"]
    (small_disk / "rest").unlink()
    assert run("simulate", small_disk / "shots", "--frames", 2).returncode == 0
    small_disk.chmod(0o555)
    done = run("simulate", small_disk / "others", "--frames", 1, prefix=like_everyone)
    assert done.returncode == 3
    assert f"Permission denied: {small_disk / 'others'}" in done.stderr


def test_2_when_corrected_pictures_are_to_go_into_a_file(scanned, camera, tmp_path):
    """Or below one. Found by a user: it was told of each picture."""
    (tmp_path / "precious.txt").write_text("mine")
    for folder in (tmp_path / "precious.txt", tmp_path / "precious.txt" / "out"):
        done = run("repair", *camera.shots[:2], "-o", folder, "--state", scanned)
        assert done.returncode == 2
        assert done.stderr == f"hotpixd: {tmp_path / 'precious.txt'} is a file; -o names a folder\n"
    assert (tmp_path / "precious.txt").read_text() == "mine"


def test_3_when_a_folder_takes_no_corrected_pictures(scanned, camera, small_disk, like_everyone):
    """One sentence that names it, and what became of those before is told; no picture is to blame."""
    size = camera.shots[0].stat().st_size
    free = os.statvfs(small_disk).f_bavail * os.statvfs(small_disk).f_frsize
    (small_disk / "rest").write_bytes(bytes(free - 3 * size // 2))
    out = small_disk / "out"
    done = run("repair", *camera.shots[:4], "-o", out, "--state", scanned, "--json")
    assert done.returncode == 3
    assert done.stderr == f"hotpixd: No space left for corrected pictures in {out}: No space left on device.\n"
    assert [picture["refused"] for picture in json.loads(done.stdout)["pictures"]] == [None]
    assert [path.name for path in out.iterdir()] == [camera.shots[0].name]
    out.chmod(0o555)
    for folder in (out, out / "deeper"):
        done = run("repair", *camera.shots[2:4], "-o", folder, "--state", scanned, prefix=like_everyone)
        assert (done.returncode, done.stdout) == (3, "")
        assert done.stderr == f"hotpixd: The folder {folder} takes no pictures: Permission denied.\n"


def test_3_names_the_file_that_was_asked_for_where_it_cannot_be_written(scanned, tmp_path, like_everyone):
    """Found by a user of `backup`: it named the hidden file beside it, which is written first."""
    shutil.copytree(scanned, tmp_path / "state")
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o555)
    for order in (("backup", closed / "b"), ("export", "dcraw", "-o", closed / "b")):
        done = run(*order, "--state", tmp_path / "state", prefix=like_everyone)
        assert (done.returncode, done.stderr) == (3, f"hotpixd: Permission denied: {closed / 'b'}\n")


def test_3_when_there_is_no_state(tmp_path):
    """Asking must not make one."""
    done = run("defects", "--state", tmp_path / "state")
    assert done.returncode == 3
    assert "no state" in done.stderr
    assert not (tmp_path / "state").exists()


def test_3_when_no_daemon_shoots_the_darks_that_are_to_stop(tmp_path):
    """As for all that takes a daemon."""
    done = run("darks", "--stop", "--state", tmp_path)
    assert done.returncode == 3
    assert "no daemon is running" in done.stderr


def test_3_when_the_ledger_is_damaged(scanned, tmp_path, camera):
    """For every command, in a sentence that names it."""
    root = harmed(scanned, tmp_path / "state")
    ledger = root / "ledger.sqlite"
    ledger.write_bytes(b"not a database" + ledger.read_bytes()[14:])
    for command in (["verify"], ["scan", camera.shots[0]]):
        done = run(*command, "--state", root)
        assert done.returncode == 3
        said = done.stdout if command == ["verify"] else done.stderr
        assert str(ledger) in said
        assert "damaged" in said
        assert "hotpixd restore FILE" in said
        assert len(said.splitlines()) == 1
    answer = invoke("verify", "--json", "--state", root)
    assert answer["ok"] is False
    assert str(ledger) in answer["problems"][0]


def test_3_when_a_generation_is_damaged(scanned, tmp_path, camera):
    """What is answered lacks its frames, so it is said; what others would rely on is not written at all."""
    root = harmed(scanned, tmp_path / "state")
    (generation,) = root.glob("sensors/*/gen-*.hpx")
    content = bytearray(generation.read_bytes())
    content[len(content) // 2] ^= 1
    generation.write_bytes(content)
    for question in ("status", "defects", "least-variance"):
        done = run(question, "--state", root)
        assert done.returncode == 3, question
        assert f"{generation} is damaged" in done.stderr
        assert "0 frames" in done.stdout
    corrected = tmp_path / "corrected"
    for command in (["export", "dcraw"], ["repair", camera.shots[0], "-o", corrected]):
        done = run(*command, "--state", root)
        assert done.returncode == 3
        assert f"{generation} is damaged" in done.stderr
        assert not done.stdout
        assert not corrected.exists()
    assert run("scan", *camera.shots, "--state", root).returncode == 0
    assert told(root) == told(scanned)
    assert run("status", "--state", root).returncode == 0


def test_3_when_an_answer_cannot_be_written(scanned, tmp_path):
    """A full disk must not make an empty map of defects look like a success."""
    root = harmed(scanned, tmp_path / "state")
    for command in ("defects --json", "status", "export csv"):
        done = shell(f'hotpixd {command} --state "$1" >/dev/full', root)
        assert "codes 3" in done.stderr
        assert "No space left on device" in done.stderr


def test_3_and_the_page_that_is_damaged_is_found_by_verify(scanned, tmp_path):
    """Damage inside the ledger, which opening it does not show."""
    root = harmed(scanned, tmp_path / "state")
    ledger = root / "ledger.sqlite"
    content = bytearray(ledger.read_bytes())
    page = int.from_bytes(content[16:18], "big")
    for start in range(3 * page, len(content), page):
        content[start : start + 40] = b"\xff" * 40
    ledger.write_bytes(content)
    done = run("verify", "--state", root)
    assert done.returncode == 3
    assert str(ledger) in done.stdout + done.stderr


def test_3_and_verify_names_the_damaged_generation(scanned, tmp_path):
    """One bit is enough; JSON and text name the file."""
    root = harmed(scanned, tmp_path / "state")
    (path,) = generations(next((root / "sensors").iterdir()))
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 1
    path.write_bytes(content)
    done = run("verify", "--state", root)
    assert done.returncode == 3
    assert str(path) in done.stdout
    answer = invoke("verify", "--json", "--state", root)
    assert answer["ok"] is False
    assert any(str(path) in problem for problem in answer["problems"])


def test_3_when_ledger_and_generation_are_not_of_one_time(scanned, camera, tmp_path):
    """A backup of one without the other holds frames that the ledger does not know."""
    root = harmed(scanned, tmp_path / "state")
    feed(tmp_path / "younger", *camera.shots[:5])
    shutil.copyfile(tmp_path / "younger/ledger.sqlite", root / "ledger.sqlite")
    answer = invoke("verify", "--json", "--state", root)
    assert answer["ok"] is False
    assert any("not of the same time" in problem for problem in answer["problems"])


@pytest.mark.parametrize("where", ["/proc/nobody/state", "/dev/null", "/dev/null/state"])
def test_3_when_the_state_cannot_be_made(where, camera):
    """No folder, no permission, or something else in its place."""
    done = run("scan", camera.shots[0], "--state", where)
    assert done.returncode == 3
    assert where in done.stderr


@pytest.mark.parametrize("below", ["", "state"])
def test_3_when_a_file_is_in_the_way_of_the_state(camera, tmp_path, below):
    """Named in a sentence; it was "[Errno 17] File exists"."""
    file = tmp_path / "conf.yaml"
    file.write_text("sources: []")
    where = file / below
    done = run("scan", camera.shots[0], "--state", where)
    assert done.returncode == 3
    assert f"The state {where} cannot be used: {file} is in the way, which is no folder." in done.stderr
    assert "Errno" not in done.stderr


def test_3_when_the_state_cannot_be_written(scanned, tmp_path, camera, like_everyone):
    """Its folder, or one above it, is for reading only."""
    root = harmed(scanned, tmp_path / "state")
    root.chmod(0o500)
    (root / "lock").chmod(0o400)
    tmp_path.chmod(0o500)
    try:
        for where, what in (
            (root, f"used: you have no right to write {root / 'lock'}, which"),
            (tmp_path / "new", f"made: you have no right to write {tmp_path}. Name another folder with --state."),
            (tmp_path / "new" / "state", f"made: you have no right to write {tmp_path}. Name another"),
        ):
            done = run("scan", camera.shots[0], "--state", where, prefix=like_everyone)
            assert done.returncode == 3
            assert f"The state {where} cannot be {what}" in done.stderr
    finally:
        tmp_path.chmod(0o700)
        root.chmod(0o700)


def test_3_when_a_state_is_in_use_though_the_daemon_of_another_one_would_answer(tmp_path):
    """An answer about another state is none."""
    (tmp_path / "inbox").mkdir()
    other = Daemon(tmp_path / "other", tmp_path, "watch", tmp_path / "inbox", "--plain")
    try:
        other.wait_ready()
        mine = {**other.env, "STATE_DIRECTORY": str(tmp_path / "mine")}
        with State(tmp_path / "mine"):
            done = run("status", env=mine)
        assert done.returncode == 3
        assert f"{tmp_path / 'mine'} is in use by process {os.getpid()}" in done.stderr
        assert run("status", "--state", tmp_path / "other", env=mine).returncode == 0
    finally:
        other.close()


def test_3_when_the_home_cannot_be_written(camera, tmp_path):
    """Neither the user's state nor the cache of kernels can be made there: a sentence; with --state all is well."""
    nowhere = environment(HOME="/proc/nobody")
    for name in ("NUMBA_CACHE_DIR", "XDG_STATE_HOME", "XDG_CACHE_HOME", "CACHE_DIRECTORY"):
        nowhere.pop(name, None)
    done = run("scan", camera.shots[0], env=nowhere)
    assert done.returncode == 3
    assert "/proc/nobody" in done.stderr
    feed(tmp_path / "state", camera.shots[0])
    assert run("defects", "--state", tmp_path / "state", env=nowhere).returncode == 0


def test_3_when_the_disk_is_full_and_afterwards_all_goes_on(small_disk, camera, scanned):
    """Nothing is lost, whenever it fills up: what was acknowledged is there, the rest is scanned again."""
    root, ballast = small_disk / "state", small_disk / "ballast"
    for left in (200, 12_000):
        free = os.statvfs(small_disk).f_bavail * os.statvfs(small_disk).f_frsize
        ballast.write_bytes(bytes(max(free - left * 1024, 0)))
        done = run("scan", camera.folder, "--state", root)
        assert done.returncode == (3 if left < 12_000 else 0)
        if done.returncode:
            assert "No space left" in done.stderr
        ballast.unlink()
    assert told(root) == told(scanned)


# --- the world around it


@pytest.mark.parametrize("option", ["--help", "--version"])
def test_help_and_version_are_told(option):
    """Of the program as it is installed."""
    done = run(option)
    assert done.returncode == 0
    assert ("least-variance" if option == "--help" else __version__) in done.stdout


def loaded_by(*arguments: str) -> set[str]:
    """Run a command in a process of its own; return the names of the packages and lone modules that it loads."""
    code = (
        "import sys\nfrom hotpixd.cli import main\n"
        f"sys.argv = ['hotpixd', *{arguments!r}]\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "print(sorted({name.partition('.')[0] for name in sys.modules}))"
    )
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=True)
    return set(ast.literal_eval(done.stdout.splitlines()[-1]))


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["scan", "--help"], ["nonsense"]])
def test_nothing_heavy_is_imported_for_help(arguments):
    """Kernels, decoders and pictures come when they are used."""
    assert not HEAVY & loaded_by(*arguments)


@pytest.mark.parametrize(("option", "needless"), [([], set()), (["--json"], {"rich"})])
def test_nothing_heavy_is_imported_for_the_status_of_a_state(option, needless, scanned):
    """Rows of the ledger and the header of a generation are no arrays; without a daemon status once loaded numpy."""
    loaded = loaded_by("status", "--state", str(scanned), *option)
    # It did open the state.
    assert "sqlite3" in loaded
    assert not (HEAVY | {"zstandard"} | needless) & loaded


def test_no_command_shows_the_commands():
    """The first thing a new user does."""
    done = run()
    assert "scan" in done.stdout + done.stderr


def shell(command: str, *values: object) -> subprocess.CompletedProcess[str]:
    """Run a line of bash in which hotpixd is the command and $1, $2 ... are values; it tells the codes of its pipe."""
    line = f'hotpixd() {{ {" ".join(HOTPIXD)} "$@"; }}\n{command}\necho "codes ${{PIPESTATUS[*]}}" >&2'
    done = subprocess.run(
        ["bash", "-c", line, "bash", *map(str, values)], env=environment(), capture_output=True, text=True, timeout=60
    )
    assert "Traceback" not in done.stderr, done.stderr
    assert "Exception ignored" not in done.stderr, done.stderr
    return done


@pytest.mark.parametrize(
    ("command", "code"),
    [
        ('hotpixd scan "$1" --state "$2" | head -1', 0),
        ('hotpixd scan "$1" "$3" --state "$2" | true', 1),
        ('hotpixd defects --json --state "$2" | head -c 1', 0),
        ('hotpixd defects --all --state "$2" | true', 0),
        ('hotpixd scan "$1" --state "$2" 2>&1 | true', 0),
    ],
)
def test_a_reader_that_has_gone_changes_no_exit_code(command, code, scanned, camera, broken, tmp_path):
    """`| head` once ended in 1, which says that shots were refused."""
    root = harmed(scanned, tmp_path / "state")
    done = shell(command, camera.folder, root, broken)
    assert f"codes {code} " in done.stderr


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&- <&-", ">/dev/full"])
def test_closed_and_full_outputs_do_no_harm(closed, scanned, camera, tmp_path):
    """What was found is in the state; nothing of ours may be opened under the number of a closed stream."""
    root = tmp_path / "state"
    done = shell(f'hotpixd scan "$1" --state "$2" {closed}', camera.folder, root)
    assert "codes 0" in done.stderr
    assert told(root) == told(scanned)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_a_terminal_of_few_letters_gets_escapes(encoding, camera, tmp_path):
    """A name that it cannot show must not end the scan."""
    named = tmp_path / "雪 größe.dng"
    named.write_bytes(b"II*\0")
    done = run("scan", named, "--state", tmp_path / "state", env=environment(PYTHONIOENCODING=encoding))
    assert done.returncode == 1
    assert "\\u96ea" in done.stdout


def test_a_name_cannot_garble_the_terminal(tmp_path, camera):
    """Escape codes and newlines in names of files, folders and cameras are shown as what they are, on every way out."""
    evil = "\x1b]0;title\x07\x1b[2J\nroot# "
    folder = tmp_path / f"folder{evil}"
    folder.mkdir()
    (folder / f"IMG_1{evil}.dng").write_bytes(b"II*\0")
    (folder / "IMG_2[bold]:bug:.dng").write_bytes(b"II*\0x")
    camera.sensor.write_dng(folder / os.fsdecode(b"\xff.dng"), camera.sensor.shot(0, "dark"))
    state = tmp_path / f"state{evil}"
    said = [
        run("scan", folder, "--state", state),
        run("scan", tmp_path / f"gone{evil}", "--state", state),
        run("status", "--state", state),
        run("defects", "--state", tmp_path / f"none{evil}"),
    ]
    for done in said:
        assert "\x1b" not in done.stdout + done.stderr
        assert "\x07" not in done.stdout + done.stderr
        assert "\nroot#" not in done.stdout + done.stderr
    for done in (said[0], said[2]):
        assert "IMG_2[bold]:bug:.dng" in done.stdout
    assert "\\x1b" in said[0].stdout
    assert "gone\\x1b" in said[1].stderr
    assert "\\udcff.dng" in said[2].stdout
    assert json.loads(run("status", "--json", "--state", state).stdout)["refused"][0]["name"] == f"IMG_1{evil}.dng"


# --- on a terminal


ESCAPE = re.compile(r"\x1b(\[[0-9;?]*[A-Za-z]|\][^\x07]*\x07)")


class Terminal:
    """A command on a terminal of 80 columns and 24 rows."""

    def __init__(self, *arguments: object, **changes: str) -> None:
        self._keyboard, screen = pty.openpty()
        fcntl.ioctl(screen, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
        self.process = subprocess.Popen(
            [*HOTPIXD, *map(str, arguments)],
            stdin=screen,
            stdout=screen,
            stderr=screen,
            env=environment(**{"TERM": "xterm-256color", **changes}),
            start_new_session=True,
        )
        os.close(screen)
        self.shown = ""

    def read(self) -> bool:
        """Read what comes next; False if nothing will."""
        try:
            data = os.read(self._keyboard, 65536)
        except OSError:
            return False
        self.shown += data.decode()
        return bool(data)

    def finish(self) -> int:
        """Read to the end; return the exit code."""
        while self.read():
            pass
        os.close(self._keyboard)
        return self.process.wait(30)

    @property
    def lines(self) -> list[str]:
        """What was written between two returns or newlines, without escape codes."""
        return re.split(r"[\r\n]+", ESCAPE.sub("", self.shown))


def test_a_scan_on_a_terminal_shows_a_bar_and_then_tables_that_fit(camera, tmp_path):
    """Shots per second while it runs; afterwards nothing is cut or wrapped at 80 columns."""
    terminal = Terminal("scan", camera.folder, "--state", tmp_path / "state")
    assert terminal.finish() == 0
    assert re.search(r"\d+/12 +[\d.]+ shots/s", ESCAPE.sub("", terminal.shown))
    assert re.search(r"[1-9]\d* stable", ESCAPE.sub("", terminal.shown))
    assert max(map(len, terminal.lines)) <= 80
    assert "…" not in terminal.shown
    after = terminal.lines[terminal.lines.index("12 shots folded.") :]
    (head,) = (line for line in after if line.split()[:3] == ["x", "y", "kind"])
    assert head.split() == ["x", "y", "kind", "state", "certain", "excess", "sigma", "dark", "ADU/s", "frames"]
    assert any(re.match(r" *\d+ +\d+ +[RGB] +hot +stable +100 % ", line) for line in after)


@pytest.mark.parametrize("changes", [{"NO_COLOR": "1"}, {"TERM": "dumb"}])
def test_a_terminal_without_colours_is_served_too(changes, camera, tmp_path):
    """The same words, without the escape codes that it was not to get."""
    terminal = Terminal("scan", *camera.shots[:3], "--state", tmp_path / "state", **changes)
    assert terminal.finish() == 0
    assert "3 shots folded." in terminal.lines
    assert not re.search(r"\x1b\[[0-9;]*3[0-7]m", terminal.shown)
    if changes.get("TERM") == "dumb":
        assert "\x1b" not in terminal.shown


def test_the_cursor_is_shown_again_after_two_ctrl_c(camera, tmp_path):
    """The bar hides it; a terminal without a cursor is no good to its user."""
    # With a file at which its decoder sleeps, the scan cannot end between the two.
    asleep = tmp_path / "asleep.jpg"
    asleep.write_bytes(b"HOSTILE sleep\n")
    hooks = f"{Path(__file__).with_name('decoder_hooks')}:{environment()['PYTHONPATH']}"
    terminal = Terminal("scan", asleep, camera.folder, "--state", tmp_path / "state", PYTHONPATH=hooks)
    while "\x1b[?25l" not in terminal.shown and terminal.read():
        pass
    # Asked to stop before it has received a shot, it would end at the first.
    while not any((tmp_path / "state" / "spool").glob("?" * 64)):
        time.sleep(0.01)
    time.sleep(0.5)
    while terminal.process.poll() is None:
        terminal.process.send_signal(signal.SIGINT)
        time.sleep(0.005)
    assert terminal.finish() == 130
    assert terminal.shown.rindex("\x1b[?25h") > terminal.shown.rindex("\x1b[?25l")


def test_without_memory_a_scan_ends_with_a_sentence(camera, tmp_path):
    """Not with a traceback: found by scans within less and less address space."""
    done = run("scan", "--state", tmp_path / "state", camera.folder, prefix=["prlimit", f"--as={60 << 20}"])
    assert done.returncode == 3
    assert "there is not enough memory" in done.stderr
