"""Declared defects: taken from users and lists, kept apart from what is found, and never lost with it."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from astropy.io import fits
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from conftest import Camera, environment, nobody
from declarations import command, declared
from hotpixd import declaring
from hotpixd.declaring import DeclareError, Declaring
from hotpixd.exchange import ask_of, declare
from hotpixd.feed import FeedClient, FeedError
from hotpixd.store.checkpoint import read_generation
from hotpixd.store.declared import DeclaredDefect, DeclaredError, DeclaredLists, read
from hotpixd.store.state import State
from hotpixd.views import answers


@pytest.fixture
def root(scanned: Path, tmp_path: Path) -> Path:
    """A state of one sensor with 200x150 pixels."""
    shutil.copytree(scanned, tmp_path / "state")
    return tmp_path / "state"


# --- the files

DEFECTS = st.lists(
    st.builds(DeclaredDefect, st.integers(0, 9999), st.integers(0, 9999), st.text(max_size=20), st.text(max_size=20)),
    max_size=20,
    unique_by=lambda d: (d.x, d.y, d.source),
)


@settings(deadline=None, max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(defects=DEFECTS)
def test_what_is_written_is_read(tmp_path, defects):
    """By whoever opens it next; ordered by position."""
    DeclaredLists(tmp_path / "declared").replace("a", defects)
    assert DeclaredLists(tmp_path / "declared").of("a") == tuple(sorted(defects, key=lambda d: (d.y, d.x)))
    assert DeclaredLists(tmp_path / "declared").of("b") == ()
    assert not list(DeclaredLists(tmp_path / "declared").problems())


def test_any_changed_byte_is_noticed(tmp_path):
    """Each in turn, and a file that ends early, and another sensor's."""
    lists = DeclaredLists(tmp_path / "declared")
    lists.replace("a", [DeclaredDefect(1, 2, "mark", "2026-11-24T18:00:00Z")])
    path = tmp_path / "declared" / "a.json"
    whole = path.read_bytes()
    for at in range(len(whole) - 1):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(DeclaredError):
            read(path, "a")
        path.write_bytes(whole[:at])
        with pytest.raises(DeclaredError):
            read(path, "a")
    path.write_bytes(whole)
    assert read(path, "a")
    with pytest.raises(DeclaredError, match="it is of the sensor a"):
        read(path, "b")


@pytest.mark.parametrize("step", ["before_declared_fsync", "before_declared_rename", "after_declared_rename"])
def test_a_death_amid_writing_leaves_the_old_or_the_new(tmp_path, step):
    """Never a part of it; and what is left over is cleared away by the next who opens the state."""
    DeclaredLists(tmp_path / "declared").replace("a", [DeclaredDefect(1, 2, "mark", "")])
    code = (
        "import sys; from pathlib import Path; from hotpixd.store.declared import *;"
        "DeclaredLists(Path(sys.argv[1])).replace('a', [DeclaredDefect(3, 4, 'mark', '')])"
    )
    env = environment(HOTPIXD_FAILPOINT=f"{step}:kill")
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "declared")], env=env, check=False)
    assert done.returncode == -9
    (defect,) = DeclaredLists(tmp_path / "declared").of("a")
    assert (defect.x, defect.y) == ((3, 4) if step == "after_declared_rename" else (1, 2))
    with State(tmp_path):
        assert [path.name for path in (tmp_path / "declared").iterdir()] == ["a.json"]


# --- the questions


def test_a_long_list_is_declared_at_once_with_its_last_part(root, monkeypatch):
    """What comes in between, or never comes, declares nothing."""
    monkeypatch.setattr("hotpixd.exchange.POINTS_AT_A_TIME", 100)
    pixels = [(x, y) for y in range(50) for x in range(0, 200, 4)]
    with State(root, create=False) as state:
        ask = ask_of(state)
        (sensor,) = state.ledger.sensors()
        one = {"sensor": sensor, "source": "dcraw:a", "upload": "1", "total": 2, "points": [1, 1], "offset": 0}
        assert ask("declare", **one) == {"received": 1}
        assert state.declared.of(sensor) == ()
        assert declare(ask, sensor, {"dcraw:b": pixels})["added"] == len(pixels)
        with pytest.raises(DeclareError, match="meanwhile"):
            ask("declare", **{**one, "offset": 1})
        assert len(state.declared.of(sensor)) == len(pixels)
        assert not (root / "declared" / f"{sensor}.json.tmp").exists()


@pytest.mark.parametrize(
    "changes",
    [
        {"points": [1]}, {"points": [1.0, 2]}, {"points": ["1", 2]}, {"points": [True, 2]}, {"points": [200, 0]},
        {"points": [-1, 0]}, {"points": None}, {"sensor": "other"}, {"sensor": "../../x"}, {"total": "x"},
        {"total": 1_000_000},
    ],
)  # fmt: skip
def test_a_question_that_makes_no_sense_declares_nothing(root, changes):
    """Whatever a client may send."""
    with State(root, create=False) as state:
        (sensor,) = state.ledger.sensors()
        plain = {"sensor": sensor, "source": "s", "upload": "1", "total": 1, "offset": 0, "points": [1, 2]}
        with pytest.raises((DeclareError, TypeError, ValueError)):
            Declaring(state).answer("declare", {**plain, **changes})
        assert state.declared.of(sensor) == ()
        assert Declaring(state).answer("declare", plain)["added"] == 1
    assert len(str({**plain, "points": [99999, 99999] * declaring.POINTS_AT_A_TIME})) < 60_000


# --- with a daemon


def test_the_daemon_declares_exports_and_tells(start, camera: Camera, tmp_path, runtime):
    """All commands while it runs: they write through it, and the feed tells of it at once."""
    card = tmp_path / "card"
    shutil.copytree(camera.folder, card)
    daemon = start("watch", "--plain", card)
    daemon.wait_folded(12)
    state = {"state": tmp_path / "state", "env": daemon.env}
    (tmp_path / "list").write_text("".join(f"{x} {y} 0\n" for x in range(100) for y in range(100)))
    assert "10000 pixels of" in command("import", tmp_path / "list", **state)
    command("mark", 150, 140, **state)
    command("unmark", 0, 0, **state)
    (sensor,) = daemon.ask("defects")["sensors"]
    assert len(sensor["declared"]) == 10_000
    found = {(d["x"], d["y"]) for d in sensor["defects"]}
    said = {(d["x"], d["y"]) for d in sensor["declared"]}
    with contextlib.closing(daemon.client()) as client:
        for live in client.watch():
            agreement = live[f"sensor:{sensor['id']}"]["agreement"]
            if agreement["declared"] == 10_000:
                break
    assert agreement["both"] == len(found & said)
    assert agreement["not_declared"] == len(found - said)
    command("export", "mean", "-o", tmp_path / "mean.fits", **state)
    with fits.open(tmp_path / "mean.fits") as units:
        assert units[0].header["NFRAMES"] == 12
        assert units[0].data.shape == (150, 200)
    assert "\n150 140 0\n" in command("export", "dcraw", **state)
    assert daemon.ask("verify")["ok"]
    command("backup", tmp_path / "b", **state)
    assert daemon.stop() == 0
    command("restore", tmp_path / "b", state=tmp_path / "again")
    assert len(declared(tmp_path / "again")) == 10_000
    assert declared(tmp_path / "state") == declared(tmp_path / "again")


def test_who_may_only_read_declares_nothing(scanned, start, camera, tmp_path, runtime):
    """The feed refuses it, as all that changes something."""
    if os.geteuid() != 0:
        pytest.skip("takes root to be somebody else")
    card = tmp_path / "card"
    card.mkdir()
    shutil.copyfile(camera.shots[0], card / camera.shots[0].name)
    daemon = start("watch", "--plain", card)
    daemon.wait_folded(1)
    (path,) = (runtime / "hotpixd").glob("*.sock")
    for folder in (runtime, runtime / "hotpixd"):
        folder.chmod(0o755)
    path.chmod(0o666)
    sensor = daemon.ask("defects")["sensors"][0]["id"]
    # Not with root's group either, which is the socket's.
    os.setegid(65534)
    try:
        with nobody():
            client = FeedClient(path)
    finally:
        os.setegid(0)
    with contextlib.closing(client):
        assert client.ask("defects")["sensors"]
        for question in ("declare", "undeclare"):
            with pytest.raises(FeedError, match="members of the socket's group"):
                client.ask(question, sensor=sensor, points=[1, 2], source="s", upload="1", total=1, offset=0)
    assert daemon.ask("defects")["sensors"][0]["declared"] == []


def test_a_generation_that_was_replaced_meanwhile_is_asked_for_again(root, tmp_path):
    """An immutable file is read without the daemon, which may have removed it by then."""
    from hotpixd.exchange import _statistic

    with State(root, create=False) as state:
        (sensor,) = state.ledger.sensors()
        right = answers.answer(state, "generation", {"sensor": sensor})
    given = [{"path": str(tmp_path / "gen-00000001.hpx"), "waiting": 0}] * 2 + [right]
    frames = _statistic(lambda *_, **__: given.pop(0), sensor).header["sensor"]["frames"]
    assert not given
    assert frames == read_generation(Path(right["path"])).header["sensor"]["frames"] == 12
    assert json.dumps(right)
