"""What the reading commands answer, asked of a state as it is and after harm to it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from conftest import Camera, feed
from hotpixd import archive
from hotpixd.core.overview import Overview
from hotpixd.intake.files import find_shots
from hotpixd.monitor import Monitor
from hotpixd.store.state import State
from hotpixd.views import answers


def harmed(scanned: Path, root: Path) -> Path:
    shutil.copytree(scanned, root)
    return root


@pytest.fixture
def interrupted(camera: Camera, tmp_path: Path) -> Path:
    """A state with a generation of five shots, and seven that were received and folded since, in none."""
    root = tmp_path / "interrupted"
    feed(root, *camera.shots[:5])
    with State(root) as state, Monitor(state) as monitor:
        list(monitor.process(find_shots([str(camera.folder)]).shots))
    return root


def test_stable_ones_are_a_part_of_all(scanned):
    """The same entries, and beside them only such as are not stable."""
    with State(scanned, create=False) as state:
        (stable,), (every,) = (answers.defects(state, candidates=c)["sensors"] for c in (False, True))
    assert [d for d in every["defects"] if d["state"] == "stable"] == stable["defects"]
    assert {d["state"] for d in every["defects"]} <= {"stable", "candidate", "recovered"}


def test_status_counts_what_the_other_questions_list(scanned, camera, tmp_path):
    """Sensors, shots by verdict, refusals with their reasons, the last shot."""
    root = harmed(scanned, tmp_path / "state")
    broken = tmp_path / "broken.dng"
    broken.write_bytes(camera.shots[0].read_bytes()[:9000])
    feed(root, broken)
    with State(root, create=False) as state:
        status = answers.status(state)
        (every,) = answers.defects(state, candidates=True)["sensors"]
    (sensor,) = status["sensors"]
    for name in ("stable", "candidate", "recovered"):
        assert sensor[name] == sum(d["state"] == name for d in every["defects"])
    assert status["shots"] == {"received": 0, "folded": 12, "counted": 12, "refused": 1, "companion": 0}
    assert [(shot["name"], shot["path"]) for shot in status["refused"]] == [("broken.dng", str(broken))]
    assert status["last_shot"]["name"] == "broken.dng"
    assert sensor["last_shot"]["name"] == camera.shots[-1].name
    assert sensor["last_shot"]["verdict"] == "folded"


def test_status_does_not_load_what_it_does_not_tell(scanned, monkeypatch):
    """Its numbers are in the header of a generation; with those of older versions, which lack them, it does load."""
    with State(scanned, create=False) as state:
        with monkeypatch.context() as patched:
            patched.setattr(archive, "load", None)
            told = answers.status(state)
        monkeypatch.setattr(Overview, "of", lambda _: None)
        assert answers.status(state) == told


def test_least_variance_gives_k_of_a_sensor_from_the_least_on(scanned):
    """Never more than there are samples."""
    with State(scanned, create=False) as state:
        few, many = (answers.least_variance(state, k)["sensors"][0]["least"] for k in (5, 100_000))
    assert many[:5] == few
    assert len(many) == 200 * 150
    assert [s["m2"] for s in many] == sorted(s["m2"] for s in many)


def test_stuck_pixels_are_the_samples_of_least_variance(scanned, camera):
    """The founding idea: what does not change is not a picture."""
    stuck = {(d.x, d.y) for d in camera.sensor.defects if d.kind == "stuck"}
    with State(scanned, create=False) as state:
        (sensor,) = answers.least_variance(state, len(stuck))["sensors"]
    assert {(s["x"], s["y"]) for s in sensor["least"]} == stuck
    assert all(s["m2"] == 0 for s in sensor["least"])


def test_shots_that_wait_are_no_damage(interrupted):
    """They are counted, and the numbers are those of the generation."""
    with State(interrupted, create=False) as state:
        checked = answers.verify(state)
        assert answers.waiting(state) == 7
        (sensor,) = answers.defects(state)["sensors"]
    assert checked["ok"]
    assert checked["waiting"] == 7
    assert checked["sensors"][0]["frames"] == 5
    assert (sensor["frames"], sensor["frames_waiting"]) == (5, 7)


def test_a_shot_that_waits_and_is_gone_is_damage(interrupted):
    """It was acknowledged; nothing can bring it back."""
    with State(interrupted, create=False) as state:
        (row, *_) = state.ledger.rows_to_replay(dict.fromkeys(state.ledger.sensors(), 5))
        # Not written into: it may be a link to the original.
        state.spool.path(row.key).unlink()
        state.spool.path(row.key).write_bytes(b"changed")
        checked = answers.verify(state)
    assert not checked["ok"]
    assert any(row.name in problem for problem in checked["problems"])


def test_the_digest_is_of_the_content_and_not_of_the_file(scanned, camera, tmp_path):
    """Another number of generations, the same digest; another frame, another digest."""
    for shots in (camera.shots[:6], camera.shots):
        feed(tmp_path / "two", *shots)
    feed(tmp_path / "less", *camera.shots[:11])
    digests = []
    for root in (scanned, tmp_path / "two", tmp_path / "less"):
        with State(root, create=False) as state:
            digests.append(answers.verify(state)["sensors"][0]["digest"])
    assert digests[0] == digests[1]
    assert digests[0] != digests[2]


def test_why_frames_were_not_counted_is_told(camera, tmp_path):
    """Once per reason, with how often."""
    for index in range(4):
        # Other bytes behind the picture: another file, the very same scene and noise.
        (tmp_path / f"{index}.dng").write_bytes(camera.shots[0].read_bytes() + bytes([index]))
    feed(tmp_path / "state", tmp_path)
    with State(tmp_path / "state", create=False) as state:
        (reasons,) = answers.reasons_not_counted(state).values()
        (sensor,) = answers.status(state)["sensors"]
    assert sensor["not_counted"] == reasons
    assert sum(reasons.values()) == sensor["frames"] - sensor["frames_counted"] == 3
    assert all("scene" in reason for reason in reasons)
