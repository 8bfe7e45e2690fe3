"""Observations become fewer with age: by a rule that bounds them, and that any replay ends with."""

from __future__ import annotations

import signal
import sqlite3
import subprocess
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conftest import HOTPIXD, environment, feed, told
from hotpixd.store import thinning
from hotpixd.store.ledger import Ledger, Received
from years import monthly, shoot


def test_what_is_kept_grows_with_the_logarithm():
    """All of the latest, half as many per octave before them, and the first ones."""
    for frames in (1_000, 10_000, 100_000, 1_000_000):
        kept = np.flatnonzero(thinning.is_kept(np.arange(frames), frames - 1))
        octaves = np.log2(frames / thinning.LATEST)
        assert len(kept) < thinning.LATEST * (1 + (octaves + 1) / 2) + thinning.FIRST
        assert len(kept) > thinning.LATEST * (1 + (octaves - 1) / 2)
        assert kept[: thinning.FIRST].tolist() == list(range(thinning.FIRST))
        assert (frames - 1 - kept < thinning.LATEST).sum() == thinning.LATEST


def test_few_frames_keep_all():
    """Control: there is nothing to thin yet."""
    assert thinning.is_kept(np.arange(thinning.LATEST), thinning.LATEST - 1).all()


def test_what_was_dropped_is_never_wanted_again():
    """Else a replay, which cannot bring it back, would end otherwise."""
    ranks = np.arange(2_000)
    before = np.ones(len(ranks), bool)
    for newest in range(len(ranks)):
        now = thinning.is_kept(ranks, newest) | (ranks > newest)
        assert not (now & ~before).any()
        before = now


@pytest.mark.parametrize("period", [2, 3, 4, 8])
def test_no_exposure_of_a_bracket_is_left_out(period):
    """A series in a cycle of exposures keeps about as many of each."""
    kept = np.flatnonzero(thinning.is_kept(np.arange(50_000), 49_999))
    old = kept[kept < 49_999 - thinning.LATEST]
    share = np.bincount(old % period, minlength=period) / len(old)
    assert share.min() > 0.6 / period


def _shoot(ledger: Ledger, n: int, sites: int = 5, counted: bool = True) -> int:
    (seq,) = ledger.receive([Received(f"{n:064x}", f"{n}.dng", f"/card/{n}.dng", 1, "2026-01-01T00:00:00+00:00")])
    _conclude(ledger, seq, n, sites, counted)
    return seq


def _conclude(ledger: Ledger, seq: int, n: int, sites: int, counted: bool) -> None:
    ledger.conclude(seq, verdict="folded", sensor_id="cam", counted=counted)
    if counted:
        at = np.arange(sites)
        ledger.add_observations("cam", seq, at, at + n, at * 0.5, at % 2)
        ledger.thin_observations("cam", seq)


def _seqs(ledger: Ledger) -> list[int]:
    return list(dict.fromkeys(o.seq for o in ledger.observations("cam")))


def test_a_ledger_keeps_what_the_rule_says(monkeypatch):
    """By rank among the counted frames, whatever else has a row: refused ones, those of other cameras."""
    ledger = Ledger(None)
    ledger.add_sensor("cam", {})
    counted = [_shoot(ledger, n) if n % 3 else None for n in range(1_500) if _shoot(ledger, 10_000 + n, counted=False)]
    seqs = np.array([seq for seq in counted if seq is not None])
    assert _seqs(ledger) == seqs[thinning.is_kept(np.arange(len(seqs)), len(seqs) - 1)].tolist()
    excess, value, events = ledger.excesses("cam", ledger.frames_observed("cam"), np.array([1, 3, 99]))
    assert np.isnan(excess[2]).all()
    assert not events[2].any()
    kept = ledger.observations("cam", [1, 3])
    assert value[:2].T.ravel().tolist() == [o.value_adu for o in kept]


def test_a_replay_from_anywhere_ends_with_the_same(tmp_path):
    """What was thinned on behalf of frames that are then folded anew changes nothing."""
    undisturbed = Ledger(None)
    undisturbed.add_sensor("cam", {})
    seqs = [_shoot(undisturbed, n) for n in range(700)]
    for covers in (0, 5, 130, 333, 690):
        ledger = Ledger(tmp_path / f"{covers}.sqlite")
        ledger.add_sensor("cam", {})
        for n in range(700):
            _shoot(ledger, n)
        ledger.close()
        ledger = Ledger(tmp_path / f"{covers}.sqlite")
        ledger.delete_derived_after("cam", covers)
        for n, seq in enumerate(seqs):
            if seq > covers:
                _conclude(ledger, seq, n, 5, counted=True)
        assert ledger.observations("cam") == [o for o in undisturbed.observations("cam") if o.seq > 0]
        ledger.close()


def test_a_ledger_that_never_thinned_is_thinned_step_by_step(tmp_path):
    """An older version left all there was: with each frame some go, oldest first, until the rule holds."""
    ledger = Ledger(tmp_path / "ledger.sqlite")
    ledger.add_sensor("cam", {})
    (many,) = [2_000]
    for n in range(many):
        (seq,) = ledger.receive([Received(f"{n:064x}", "a", "/a", 1, "2026-01-01T00:00:00+00:00")])
        ledger.conclude(seq, verdict="folded", sensor_id="cam", counted=True)
        ledger.add_observations("cam", seq, [1], [1.0], [1.0], [1])
    ledger.close()
    ledger = Ledger(tmp_path / "ledger.sqlite")
    before = many
    for n in range(many, many + 70):
        _shoot(ledger, n)
        now = len(ledger.frames_observed("cam"))
        assert before - now <= 32
        before = now
    ranks = ledger.frames_observed("cam") - 1
    assert thinning.is_kept(ranks, many + 69).all()
    assert len(ranks) == thinning.is_kept(np.arange(many + 70), many + 69).sum()


@pytest.fixture(scope="module")
def inbox(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """So many small darks that a good part is thinned."""
    folder = tmp_path_factory.mktemp("thinned")
    return shoot(folder / "shots", monthly(2, frames=105), start=6, width=48, height=32).folder


@pytest.fixture(scope="module")
def undisturbed(inbox: Path) -> dict[str, Any]:
    root = inbox.with_name("undisturbed")
    feed(root, inbox)
    return told(root)


def test_the_shots_are_so_many_that_it_matters(undisturbed):
    """Or the next test would show nothing."""
    ((_, observations),) = undisturbed["observations"].items()
    seqs = {o.seq for o in observations}
    assert len(seqs) < 190
    assert max(seqs) == 210


def test_kills_between_change_nothing(inbox, undisturbed, tmp_path):
    """A scan is killed again and again at other moments, and ends with the same rows."""
    root = tmp_path / "state"
    kills = 0
    for moment in (0.3, 0.9, 0.5, 1.3, 0.7):
        scan = subprocess.Popen(
            [*HOTPIXD, "scan", "--state", str(root), str(inbox)],
            env=environment(HOTPIXD_FAILPOINT="after_receive:kill:25") if kills == 0 else environment(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        count = len(list((root / "spool").iterdir())) if (root / "spool").is_dir() else 0
        until = time.monotonic() + 60
        while scan.poll() is None and time.monotonic() < until:
            if (root / "spool").is_dir() and len(list((root / "spool").iterdir())) > count:
                time.sleep(moment)
                scan.kill()
                break
            time.sleep(0.01)
        kills += scan.wait() == -signal.SIGKILL
    assert kills >= 2
    feed(root, inbox)
    assert told(root) == undisturbed


def test_an_older_checkpoint_ends_with_the_same(inbox, undisturbed, tmp_path):
    """The newest generation is damaged after all was folded: what is thinned by then is not needed to go on."""
    root = tmp_path / "state"
    shots = sorted(inbox.iterdir())
    feed(root, *shots[:70])
    feed(root, *shots[70:])
    (newest, *_) = sorted(root.glob("sensors/*/gen-*.hpx"), reverse=True)
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes(content)
    feed(root, inbox)
    after = told(root)
    assert after["observations"] == undisturbed["observations"]
    assert after == undisturbed


def test_nothing_that_is_detected_depends_on_thinned_rows(inbox, undisturbed, tmp_path):
    """Without any observation left in the ledger, the next shots change the same."""
    shots = sorted(inbox.iterdir())
    for name in ("whole", "emptied"):
        feed(tmp_path / name, *shots[:120])
    with closing(sqlite3.connect(tmp_path / "emptied" / "ledger.sqlite")) as db, db:
        assert db.execute("DELETE FROM observation").rowcount > 0
    for name in ("whole", "emptied"):
        feed(tmp_path / name, *shots[120:])
    whole, emptied = told(tmp_path / "whole"), told(tmp_path / "emptied")
    assert emptied.pop("observations") != whole.pop("observations")
    assert emptied == whole
