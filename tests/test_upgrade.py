"""States as older versions wrote them, kept in `tests/states`: opened by this one, they tell the same and go on.

Each was written by the commit before the next format: two scans of three and two shots, and a third one that was
killed when its first shot was acknowledged, so that there are two generations, a log and a shot to be replayed. Beside
each lies what that version said of it, before and after the next scan of one more shot.
"""

from __future__ import annotations

import json
import sqlite3
import tarfile
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from conftest import feed, run, told
from hotpixd.store.ledger import SCHEMA_VERSION
from hotpixd.store.state import State
from hotpixd.views import answers

STATES = Path(__file__).with_name("states")
FORMATS = (1, 2, 3)


@pytest.fixture(scope="module")
def shots(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The eight shots that those states are of."""
    folder = tmp_path_factory.mktemp("shots")
    _unpack("shots", folder)
    return sorted((folder / "shots").iterdir())


@pytest.fixture(params=FORMATS)
def old(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A state of an older format."""
    _unpack(f"format-{request.param}", tmp_path)
    return tmp_path / f"format-{request.param}"


def _unpack(name: str, folder: Path) -> None:
    with tarfile.open(STATES / f"{name}.tar.xz") as archive:
        archive.extractall(folder, filter="data")


def _recorded(root: Path, name: str) -> Any:
    return json.loads((root / f"told-{name}.json").read_text())


def test_the_kept_states_are_of_the_formats_they_stand_for():
    """Or this file would test nothing; and every older format there ever was has one."""
    assert tuple(range(1, SCHEMA_VERSION)) == FORMATS


def test_an_old_state_says_what_it_said(old: Path):
    """The digest of its generation, the frames and the shot that waits."""
    with closing(sqlite3.connect(f"file:{old / 'ledger.sqlite'}?mode=ro&immutable=1", uri=True)) as db:
        assert f"format-{db.execute('PRAGMA user_version').fetchone()[0]}" == old.name
    with State(old, create=False) as state:
        assert answers.verify(state) == _recorded(old, "before")
    with closing(sqlite3.connect(old / "ledger.sqlite")) as db:
        assert db.execute("PRAGMA user_version").fetchone() == (SCHEMA_VERSION,)


def test_an_old_state_goes_on(old: Path, shots: list[Path]):
    """What waits is folded from its spool, then another shot: as the version that wrote it would have ended."""
    done = run("scan", "--state", old, shots[7])
    assert done.returncode == 0, done.stderr
    assert "Took up 1 shot from" in done.stderr
    with State(old, create=False) as state:
        assert answers.verify(state) == _recorded(old, "after")
        # It knew nothing of declared defects, nor did it tell how many frames a verdict takes.
        recorded = [{**sensor, "declared": [], "min_frames": 4} for sensor in _recorded(old, "defects")["sensors"]]
        assert answers.defects(state, candidates=True)["sensors"] == recorded


def test_an_old_state_ends_where_a_new_one_does(old: Path, shots: list[Path], tmp_path: Path):
    """As if all its shots had come to this version; the one of the killed scan that was never acknowledged too."""
    feed(old, *shots)
    feed(tmp_path / "new", *shots)
    assert told(old)["digests"] == told(tmp_path / "new")["digests"]
    assert told(old)["defects"] == told(tmp_path / "new")["defects"]


def test_an_old_generation_of_another_ledger_is_noticed(old: Path, shots: list[Path], tmp_path: Path):
    """It carries no chain yet; the number of its frames still tells."""
    feed(tmp_path / "other", *shots[:3])
    (there,) = (old / "sensors").iterdir()
    for path in there.iterdir():
        path.rename(tmp_path / "other" / "sensors" / there.name / path.name)
    with State(tmp_path / "other", create=False) as state:
        checked = answers.verify(state)
    assert not checked["ok"]
    assert any("not of the same" in problem for problem in checked["problems"])
