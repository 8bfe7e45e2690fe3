"""What is damaged in a state is passed over, kept, and told; what is lost is named, and folded when offered again."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from conftest import Camera, feed, run, told
from hotpixd import archive
from hotpixd.intake.files import find_shots
from hotpixd.monitor import Monitor
from hotpixd.store import checkpoint
from hotpixd.store.spool import Spool
from hotpixd.store.state import State, StateDamaged
from hotpixd.views import answers


def damage(path: Path) -> bytes:
    """Flip a bit in the middle of a file; return what it holds then."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    # Not in place: the file may be linked.
    path.unlink()
    path.write_bytes(content)
    return bytes(content)


def generations(root: Path) -> list[Path]:
    """The generations of its one sensor, newest first."""
    (folder,) = (root / "sensors").iterdir()
    return checkpoint.generations(folder)


@pytest.fixture
def gone(camera: Camera, tmp_path: Path) -> Path:
    """A state of two generations, whose twelve shots are where they came from no more."""
    away = tmp_path / "away"
    shutil.copytree(camera.folder, away)
    shots = sorted(away.iterdir())
    feed(tmp_path / "state", *shots[:5])
    feed(tmp_path / "state", *shots[5:])
    shutil.rmtree(away)
    return tmp_path / "state"


def replayed(root: Path) -> list[str]:
    """Start on a state and checkpoint; return what it says."""
    with State(root) as state, Monitor(state) as monitor:
        list(monitor.replay())
        monitor.checkpoint()
        return monitor.warnings


def test_a_damaged_newest_generation_costs_nothing_but_a_sentence(gone, scanned):
    """The older one and the spool have it all; the damaged one is kept as evidence, as it was."""
    newest, _ = generations(gone)
    wrong = damage(newest)
    (said,) = replayed(gone)
    assert str(newest) in said
    (kept,) = (gone / "damaged").iterdir()
    assert str(kept) in said
    assert kept.read_bytes() == wrong
    assert told(gone) == told(scanned)
    assert replayed(gone) == []


def test_with_both_damaged_the_lost_shots_are_named_and_folded_when_offered_again(gone, camera, scanned):
    """The first five are in neither spool nor generation; `scan` says so, ends with 1, and takes them as new later."""
    for path in generations(gone):
        damage(path)
    done = run("scan", "--state", gone, camera.shots[11])
    assert done.returncode == 1
    assert all(shot.name in done.stderr for shot in camera.shots[:5])
    assert not any(shot.name in done.stderr for shot in camera.shots[5:])
    with State(gone, create=False) as state:
        assert [row.name for row in state.ledger.refused()] == [shot.name for shot in camera.shots[:5]]
    done = run("scan", "--state", gone, camera.folder)
    assert done.returncode == 0, done.stderr
    assert "5 shots folded, 7 known already" in done.stdout
    with State(gone, create=False) as state:
        assert state.ledger.refused() == []
        (id_,) = state.ledger.sensors()
        keys = state.ledger.frame_keys(id_)
    with State(scanned, create=False) as state:
        assert state.ledger.frame_keys(id_) == keys
    assert len(list((gone / "damaged").iterdir())) == 2


def test_a_generation_damaged_while_it_is_in_use_does_not_cost_the_good_one_before_it(camera, tmp_path, scanned):
    """A checkpoint removes the oldest only once the next one is proved whole, and no shot that only it covers."""
    root = tmp_path / "state"
    feed(root, *camera.shots[:3])
    feed(root, *camera.shots[3:6])
    newest, oldest = generations(root)
    with State(root) as state, Monitor(state) as monitor:
        list(monitor.replay())
        (id_,) = state.ledger.sensors()
        monitor.sensor(id_)
        wrong = damage(newest)
        list(monitor.process(find_shots(map(str, camera.shots[6:])).shots))
        monitor.checkpoint()
    assert [path.name for path in generations(root)] == ["gen-00000003.hpx", oldest.name]
    assert [path.read_bytes() for path in (root / "damaged").iterdir()] == [wrong]
    # Even if the newest is then damaged as well, nothing is lost.
    damage(generations(root)[0])
    assert len(replayed(root)) == 1
    assert told(root) == told(scanned)


def test_a_generation_of_another_state_is_not_used(gone, camera, scanned, tmp_path):
    """Though it is whole and of the same sensor."""
    feed(tmp_path / "other", *camera.shots[2:9])
    (strange,) = generations(tmp_path / "other")
    newest, _ = generations(gone)
    shutil.copyfile(strange, generations(gone)[1])
    newest.unlink()
    said = " ".join(replayed(gone))
    assert "not of the same time, or not of one state" in said
    assert "cannot be folded again" in said
    feed(gone, camera.folder)
    with State(gone, create=False) as state, State(scanned, create=False) as whole:
        (id_,) = state.ledger.sensors()
        assert state.ledger.frame_keys(id_) == whole.ledger.frame_keys(id_)
        assert answers.verify(state)["ok"]


def test_a_log_without_its_last_shots_is_told(camera, tmp_path):
    """Log and database do not contradict themselves; what was acknowledged is counted beside them."""
    root = tmp_path / "state"
    feed(root, *camera.shots[:4])
    with State(root) as state, Monitor(state) as monitor:
        list(monitor.process(find_shots(map(str, camera.shots[4:8])).shots))
        state.ledger.commit()
        shutil.copytree(root, tmp_path / "killed")
    (tmp_path / "killed" / "ledger.sqlite-wal").unlink()
    done = run("verify", "--state", tmp_path / "killed")
    assert done.returncode == 3
    assert done.stdout.startswith("damaged: ")
    assert "lacks the last 4 of the shots" in done.stdout
    said = replayed(tmp_path / "killed")
    assert any("lacks the last 4" in sentence for sentence in said)
    assert any("4 shots in the spool of which the ledger knows nothing" in sentence for sentence in said)
    assert len(list((tmp_path / "killed" / "damaged").iterdir())) == 4
    feed(tmp_path / "killed", *camera.shots[4:8])
    assert run("verify", "--state", tmp_path / "killed").returncode == 0


def _garbage(mark: Path, _: Path) -> None:
    mark.write_bytes(b"garbage")


def _of_another(mark: Path, other: Path) -> None:
    shutil.copyfile(other / "acknowledged", mark)


def _a_folder(mark: Path, _: Path) -> None:
    mark.unlink()
    mark.mkdir()


@pytest.mark.parametrize("damaged", [_garbage, _of_another, _a_folder])
def test_a_mark_of_what_was_acknowledged_that_is_none_is_told_and_begun_anew(damaged, gone, scanned):
    """Without it nobody knows whether the ledger is as new as it was; the next start keeps it as evidence."""
    mark = gone / "acknowledged"
    damaged(mark, scanned)
    done = run("verify", "--state", gone)
    assert done.returncode == 3
    assert done.stdout.startswith(f"damaged: {mark} is damaged, or of another ledger")
    (said,) = replayed(gone)
    (kept,) = (gone / "damaged").iterdir()
    assert str(mark) in said
    assert str(kept) in said
    assert run("verify", "--state", gone).returncode == 0
    assert told(gone) == told(scanned)
    assert replayed(gone) == []


@pytest.mark.parametrize("content", [b"", bytes(22), b"00000000001"])
def test_a_mark_that_a_power_cut_kept_from_the_disk_is_no_damage(content, gone):
    """It is written beside the ledger without a sync."""
    (gone / "acknowledged").write_bytes(content)
    assert run("verify", "--state", gone).returncode == 0
    assert replayed(gone) == []


def test_a_ledger_that_does_not_know_its_sensors_is_refused(gone):
    """Pages of an older copy: rows are whole, each by itself."""
    with State(gone) as state:
        state.ledger.later("DELETE FROM sensor WHERE number = ?", [(1,)])
    with State(gone) as state, pytest.raises(StateDamaged, match="not among its sensors"):
        archive.standings(state)
    assert run("verify", "--state", gone).returncode == 3


def test_a_healthy_state_says_nothing(scanned, tmp_path):
    """No false alarm, neither after an end in good order nor after a kill."""
    shutil.copytree(scanned, tmp_path / "state")
    assert replayed(tmp_path / "state") == []
    with State(tmp_path / "state") as state:
        shutil.copytree(state.root, tmp_path / "killed")
    assert replayed(tmp_path / "killed") == []
    assert not (tmp_path / "killed" / "damaged").exists()


def _missing(copy: Path) -> None:
    copy.unlink()


def _replaced(copy: Path) -> None:
    copy.unlink()
    copy.write_bytes(b"something else")


@pytest.mark.parametrize("harm", [damage, _missing, _replaced])
@pytest.mark.parametrize("generations_kept", [1, 2])
def test_a_bad_copy_of_a_shot_that_only_the_newest_generation_has_is_told_and_made_anew(
    harm, generations_kept, camera, tmp_path
):
    """Were that generation damaged next, the shot would be lost."""
    root = tmp_path / "state"
    if generations_kept == 2:
        feed(root, *camera.shots[:3])
    feed(root, *camera.shots[3:6])
    shot = camera.shots[4]
    harm(root / "spool" / Spool.hash_file(shot))
    for _ in range(2):
        done = run("verify", "--state", root)
        assert done.returncode == 3
        assert f"The copy of {shot.name} in the spool" in done.stdout
        assert str(shot) in done.stdout
    done = run("scan", "--state", root, shot)
    assert done.returncode == 0, done.stderr
    assert run("verify", "--state", root).returncode == 0
    assert len(list((root / "damaged").iterdir()) if harm is not _missing else [1]) == 1
    newest, *_ = generations(root)
    damage(newest)
    replayed(root)
    with State(root, create=False) as state:
        assert state.ledger.refused() == []


def test_new_shots_make_a_bad_copy_superfluous(camera, tmp_path):
    """The generation that held the shot is the older one then."""
    root = tmp_path / "state"
    feed(root, *camera.shots[:3])
    _missing(root / "spool" / Spool.hash_file(camera.shots[0]))
    assert run("verify", "--state", root).returncode == 3
    feed(root, *camera.shots[3:])
    assert run("verify", "--state", root).returncode == 0


def test_shots_that_need_no_copy_are_not_missed(gone, camera):
    """Neither after the older generation was put aside, nor where a known shot is offered then."""
    damage(generations(gone)[1])
    replayed(gone)
    assert len(generations(gone)) == 1
    with State(gone, create=False) as state:
        assert answers.verify(state)["ok"]
    held = sorted(path.name for path in (gone / "spool").iterdir())
    feed(gone, camera.folder)
    assert sorted(path.name for path in (gone / "spool").iterdir()) == held
