"""A state made anew from its pictures: as a scan makes it, with the old one kept until and after it is done."""

from __future__ import annotations

import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from conftest import HOTPIXD, Camera, environment, feed, run, told
from hotpixd.store.state import State


@pytest.fixture
def lost(scanned: Path, tmp_path: Path) -> Path:
    """A state whose ledger is gone."""
    root = tmp_path / "state"
    shutil.copytree(scanned, root)
    (root / "ledger.sqlite").unlink()
    return root


def test_a_state_without_its_ledger_is_not_begun_anew_in_silence(lost, camera):
    """Scan, verify and status say what is wrong and what cures it, and change nothing."""
    before = sorted(lost.rglob("*"))
    for command in (["scan", camera.folder], ["status"], ["verify"], ["watch", "--plain", camera.folder]):
        done = run(*command, "--state", lost)
        assert done.returncode == 3
        said = done.stdout + done.stderr
        assert "ledger.sqlite is gone" in said
        assert "hotpixd rebuild FOLDER" in said
        assert "hotpixd restore FILE" in said
    assert sorted(lost.rglob("*")) == before


def test_rebuilt_it_tells_what_it_told(lost, scanned, camera, tmp_path):
    """And what is left of the old state is kept."""
    done = run("rebuild", camera.folder, "--state", lost)
    assert done.returncode == 0, done.stderr
    assert "12 shots" in done.stdout
    assert told(lost) == told(scanned)
    (old,) = tmp_path.glob("state.old-*")
    assert str(old) in done.stdout
    assert sorted(path.name for path in (old / "spool").iterdir()) == sorted(
        path.name for path in (scanned / "spool").iterdir()
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["state", old.name])


def test_shots_that_are_in_the_old_spool_alone_are_told(lost, scanned, camera, tmp_path):
    """They may be nowhere else; the command that is named for them folds them."""
    some = tmp_path / "some"
    some.mkdir()
    for shot in camera.shots[:-2]:
        shutil.copyfile(shot, some / shot.name)
    done = run("rebuild", some, "--state", lost)
    assert done.returncode == 0, done.stderr
    assert "2 shots in its spool are not among these pictures" in done.stdout
    told_to = done.stdout.strip().splitlines()[-1].partition("hotpixd scan ")[2]
    assert run("scan", told_to, "--state", lost).returncode == 0
    assert told(lost)["digests"] == told(scanned)["digests"]


def test_interrupted_it_leaves_the_old_state_and_goes_on(camera, other_camera, scanned, tmp_path):
    """Ctrl-C in the middle, then kill -9, then to its end."""
    root = tmp_path / "state"
    feed(root, other_camera.folder)
    before = told(root)
    made = tmp_path / "state.rebuilding"
    command = [*HOTPIXD, "rebuild", str(camera.folder), "--state", str(root)]
    for number, code in ((signal.SIGINT, 1), (signal.SIGKILL, -9)):
        with subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            until = time.monotonic() + 60
            known = len(list((made / "spool").glob("*"))) if made.exists() else 0
            while process.poll() is None and time.monotonic() < until:
                if (made / "spool").is_dir() and len(list((made / "spool").iterdir())) > known:
                    break
                time.sleep(0.002)
            process.send_signal(number)
            out, err = process.communicate(timeout=60)
            assert b"Traceback" not in err
        if process.returncode != code:
            pytest.skip("it was done before it could be interrupted")
        assert told(root) == before
        if number == signal.SIGINT:
            assert b"as it was" in out
    done = run("rebuild", camera.folder, "--state", root)
    assert done.returncode == 0, done.stderr
    assert told(root)["digests"] == told(scanned)["digests"]
    assert not made.exists()
    (old,) = tmp_path.glob("state.old-*")
    assert told(old) == before


def test_a_state_in_use_is_not_rebuilt(lost, camera, scanned, tmp_path):
    """The sentence names who has it."""
    root = tmp_path / "used"
    shutil.copytree(scanned, root)
    with State(root):
        done = run("rebuild", camera.folder, "--state", root)
    assert done.returncode == 3
    assert "in use by process" in done.stderr
    assert told(root) == told(scanned)


@pytest.mark.parametrize("what", ["nothing", "no pictures", "broken ones"])
def test_without_pictures_the_old_state_stays(what, camera: Camera, scanned, tmp_path):
    """A slip of the pen must not put an empty state into the place of a full one."""
    root, folder = tmp_path / "state", tmp_path / "pictures"
    shutil.copytree(scanned, root)
    if what != "nothing":
        folder.mkdir()
    if what == "broken ones":
        (folder / "a.dng").write_bytes(camera.shots[0].read_bytes()[:5000])
    done = run("rebuild", folder, "--state", root)
    assert done.returncode in (1, 2)
    assert "as it was" in done.stderr
    assert told(root) == told(scanned)
    assert not list(tmp_path.glob("state.*"))


def test_where_there_was_no_state_one_is_made(camera, scanned, tmp_path):
    """For instance on another machine, with nothing but the pictures."""
    done = run("rebuild", camera.folder, "--state", tmp_path / "new" / "state")
    assert done.returncode == 0, done.stderr
    assert told(tmp_path / "new" / "state") == told(scanned)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["state"]
