"""Shots through the whole loop on a real state directory: what is folded, in which order, what a replay restores."""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conftest import HOTPIXD, Camera, decoders, environment, feed, told
from hotpixd import monitor as monitor_module
from hotpixd.core import accumulator
from hotpixd.core.accumulator import COUNTS
from hotpixd.core.frame import Frame, ShotKind
from hotpixd.core.sensor import Sensor
from hotpixd.intake.files import FoundShot, find_shots
from hotpixd.monitor import Fate, Monitor, Outcome
from hotpixd.simulate import VirtualSensor, write_series
from hotpixd.store.checkpoint import generations, read_generation
from hotpixd.store.ledger import LOST, Ledger
from hotpixd.store.spool import Spool
from hotpixd.store.state import State, StateFull
from hotpixd.views import answers
from pictures import mosaic, write_dng


def fates(outcomes: list[Outcome]) -> list[tuple[str, str]]:
    return [(outcome.path.name, str(outcome.fate)) for outcome in outcomes]


def rows(root: Path) -> list[tuple[str, str, str | None]]:
    """Return (name, verdict, reason) of every shot, in the order of the ledger."""
    with State(root) as state:
        return [(row.name, row.verdict, row.reason) for row in state.ledger._shots("ORDER BY seq")]


def newest(root: Path) -> list[Path]:
    return [generations(folder)[0] for folder in sorted((root / "sensors").iterdir())]


def spooled(root: Path) -> int:
    return sum(1 for _ in (root / "spool").iterdir())


@pytest.fixture
def interleaved(camera: Camera, other_camera: Camera, tmp_path: Path) -> list[Path]:
    """Shots of two bodies in turn, as two photographers fill one folder."""
    inbox = tmp_path / "inbox"
    inbox.mkdir()
    pairs = itertools.chain.from_iterable(zip(camera.shots, other_camera.shots, strict=False))
    for number, shot in enumerate(pairs):
        shutil.copyfile(shot, inbox / f"{number:02d}.dng")
    return sorted(inbox.iterdir())


def test_the_same_shots_tell_the_same_in_another_state(camera, scanned, tmp_path):
    """Everything known is a function of the shots and their order."""
    feed(tmp_path / "state", camera.folder)
    assert told(tmp_path / "state") == told(scanned)


@pytest.mark.parametrize("ahead", ["always", "never"])
def test_it_does_not_matter_which_frames_are_looked_at_ahead(interleaved, tmp_path, monkeypatch, ahead):
    """A look at the next frame, of this sensor or another, is what it would be in its turn."""
    feed(tmp_path / "expected", *interleaved)
    looks = []
    look = Sensor.look
    monkeypatch.setattr(Sensor, "look", lambda *frame, **beside: looks.append(beside) or look(*frame, **beside))
    if ahead == "never":
        monkeypatch.setattr(Monitor, "_look_ahead", lambda _: None)
    else:
        # Whether the next frame is here already is else up to chance.
        conclude = Monitor._conclude
        wait = lambda self: [waiting.frame.exception() for waiting in self._waiting]  # noqa: E731
        monkeypatch.setattr(Monitor, "_conclude", lambda self, shot: wait(self) and conclude(self, shot))
    feed(tmp_path / "state", *interleaved)
    assert ({"beside": True} in looks) == (ahead == "always")
    assert told(tmp_path / "state") == told(tmp_path / "expected")


def test_it_does_not_matter_in_how_many_runs_the_shots_came(camera, scanned, tmp_path):
    """A generation holds all that the next run needs."""
    for shots in (camera.shots[:5], camera.shots[5:6], camera.shots):
        feed(tmp_path / "state", *shots)
    assert told(tmp_path / "state") == told(scanned)


def test_planted_defects_are_found(camera, scanned):
    """The way from the file to the answer keeps positions: no defect is where none was planted."""
    planted = {(d.x, d.y) for d in camera.sensor.defects}
    (sensor,) = told(scanned)["defects"]["sensors"]
    stable = {(d["x"], d["y"]) for d in sensor["defects"] if d["state"] == "stable"}
    assert stable
    assert stable <= planted


def test_outcomes_come_in_the_order_of_the_ledger(interleaved, tmp_path):
    """Decoding runs ahead in parallel; folding does not, or a replay would end elsewhere."""
    outcomes = feed(tmp_path / "state", *interleaved)
    assert [o.path.name for o in outcomes] == [path.name for path in interleaved]
    assert [o.path.name for o in outcomes] == [name for name, _, _ in rows(tmp_path / "state")]


def test_interleaved_bodies_are_told_apart(camera, other_camera, interleaved, tmp_path):
    """Each body's statistic is what it is when its shots come alone."""
    feed(tmp_path / "both", *interleaved)
    both = told(tmp_path / "both")["digests"]
    for alone, shots in (("one", camera.shots[:6]), ("other", other_camera.shots)):
        feed(tmp_path / alone, *shots)
        ((id_, digest),) = told(tmp_path / alone)["digests"].items()
        assert both.pop(id_) == digest
    assert not both


def test_raw_and_jpeg_of_one_body_are_two_sensors(pairs, tmp_path):
    """Their samples are not comparable; only a JPEG beside its raw is left out."""
    shutil.copytree(pairs.folder, tmp_path / "jpeg", ignore=shutil.ignore_patterns("*.dng"))
    shutil.copytree(pairs.folder, tmp_path / "raw", ignore=shutil.ignore_patterns("*.jpg"))
    feed(tmp_path / "state", tmp_path / "raw", tmp_path / "jpeg")
    sensors = told(tmp_path / "state")["defects"]["sensors"]
    assert sorted((s["samples"], s["serial"], s["frames"]) for s in sensors) == [
        ("raw", "V0003", 6),
        ("rendered", "V0003", 6),
    ]


def test_bit_depths_of_one_body_are_two_sensors(tmp_path):
    """A camera that shoots bursts with 12 bit has other units then: their sums are kept apart, whatever comes first."""
    for k in range(4):
        write_dng(tmp_path / f"a{k}.dng", mosaic(level=600.0 + k))
        write_dng(tmp_path / f"b{k}.dng", mosaic(level=700.0 + k) // 4, black=64, white=4095)
    feed(tmp_path / "alone", *sorted(tmp_path.glob("a*.dng")))
    ((_, alone),) = told(tmp_path / "alone")["digests"].items()
    # In two runs, the second of which has the sensors from the disk.
    feed(tmp_path / "state", tmp_path / "a0.dng", tmp_path / "b0.dng", tmp_path / "b1.dng")
    feed(tmp_path / "state", *sorted(tmp_path.glob("*.dng")))
    both = told(tmp_path / "state")
    assert alone in both["digests"].values()
    assert [(s.get("bits"), s["frames"]) for s in both["defects"]["sensors"]] == [(None, 4), (12, 4)]


def test_a_state_that_knows_no_bit_depths_goes_on(tmp_path):
    """One of an older hotpixd learns the usual depth with the next frame."""
    for k in range(3):
        write_dng(tmp_path / f"a{k}.dng", mosaic(level=600.0 + k))
    write_dng(tmp_path / "b.dng", mosaic() // 4, black=64, white=4095)
    feed(tmp_path / "state", tmp_path / "a0.dng")
    with State(tmp_path / "state") as state:
        ((id_, about),) = state.ledger.sensors().items()
        assert about.pop("depth") == 14
        state.ledger.add_sensor(id_, about)
    feed(tmp_path / "state", *sorted(tmp_path.glob("*.dng")))
    sensors = told(tmp_path / "state")["defects"]["sensors"]
    assert [(s.get("bits"), s["frames"]) for s in sensors] == [(None, 3), (12, 1)]


def test_a_picture_too_large_for_this_machine_is_refused(tmp_path, camera, monkeypatch):
    """Its statistic would take the memory of all others."""
    monkeypatch.setattr(monitor_module, "memory_bytes", lambda: 100_000)
    (outcome,) = feed(tmp_path / "state", camera.shots[0])
    assert outcome.fate is Fate.REFUSED
    assert outcome.reason == (
        "the statistic of 200 x 150 pixels takes 1 MB of memory; this machine has 0 MB for it; it could be kept on the"
        " disk (statistic: disk, or scan --on-disk)"
    )


def test_making_room_for_sensors_changes_nothing(interleaved, tmp_path, monkeypatch):
    """A sensor that was saved and forgotten goes on as if it had stayed in memory."""
    feed(tmp_path / "kept", *interleaved)
    monkeypatch.setattr(monitor_module, "_RESIDENT_BYTES", 0)
    feed(tmp_path / "evicted", *interleaved)
    assert told(tmp_path / "evicted") == told(tmp_path / "kept")
    assert newest(tmp_path / "evicted")[0].name > newest(tmp_path / "kept")[0].name


def test_a_duplicate_under_another_name_is_folded_once(camera, tmp_path):
    """Content is what counts: in one run, with its twin on the way, and in a later run."""
    shot = camera.shots[0]
    twin, late = tmp_path / "twin.dng", tmp_path / "late.dng"
    shutil.copyfile(shot, twin)
    shutil.copyfile(shot, late)
    assert fates(feed(tmp_path / "state", shot, twin)) == [(twin.name, "known"), (shot.name, "folded")]
    assert fates(feed(tmp_path / "state", late)) == [(late.name, "known")]
    assert [name for name, _, _ in rows(tmp_path / "state")] == [shot.name]


def test_a_companion_is_ledgered_and_not_folded(pairs, tmp_path):
    """The JPEG shows the same samples again, processed: it is no new evidence."""
    feed(tmp_path / "state", pairs.folder)
    for name, verdict, reason in rows(tmp_path / "state"):
        expected = ("folded", None) if name.endswith(".dng") else ("companion", f"companion of {name[:-4]}.dng")
        assert (verdict, reason) == expected
    assert [s["frames"] for s in told(tmp_path / "state")["defects"]["sensors"]] == [6]


def test_a_companion_of_a_refused_raw_is_folded(pairs, tmp_path):
    """Better a JPEG than nothing: in the run that refuses the raw, and in a later one."""
    inbox = tmp_path / "inbox"
    shutil.copytree(pairs.folder, inbox)
    for raw in sorted(inbox.glob("*.dng"))[:2]:
        raw.write_bytes(raw.read_bytes()[:5000] + raw.name.encode())
    first, second = (find_shots([str(inbox)]).shots[i : i + 2] for i in (0, 2))
    root = tmp_path / "state"
    for shots in (first, second[:1], second[1:]):
        with State(root) as state, Monitor(state) as monitor:
            list(monitor.process(shots))
            monitor.checkpoint()
    assert [verdict for _, verdict, _ in rows(root)] == ["refused", "folded"] * 2


def test_a_companion_keeps_its_verdict_when_the_process_dies_at_once(pairs, tmp_path, monkeypatch):
    """Its verdict was once written after its acknowledgement: a power cut between them made a replay fold it."""
    root = tmp_path / "state"
    shots = find_shots([str(pairs.folder)]).shots[:2]

    class PowerCutError(Exception):
        pass

    receive = Ledger.receive

    def receive_and_die(ledger, received):
        seqs = receive(ledger, received)
        if any(r.name.endswith(".jpg") for r in received):
            # What was not committed by now is lost.
            ledger._pending.clear()
            ledger._db.close()
            raise PowerCutError
        return seqs

    with monkeypatch.context() as patched, State(root) as state, Monitor(state) as monitor:
        patched.setattr(Ledger, "receive", receive_and_die)
        patched.setattr(Ledger, "close", lambda _: None)
        with pytest.raises(PowerCutError):
            list(monitor.process(shots))
    feed(root, pairs.folder / shots[0].path.name)
    assert [(name[-3:], verdict) for name, verdict, _ in rows(root)] == [("dng", "folded"), ("jpg", "companion")]


def test_a_refused_shot_stays_refused_with_its_reason(camera, tmp_path):
    """In a sentence, again when it is met again, and without harm to the others."""
    broken = tmp_path / "broken.dng"
    broken.write_bytes(camera.shots[0].read_bytes()[:7000])
    first = feed(tmp_path / "state", camera.shots[0], broken, camera.shots[1])
    again = feed(tmp_path / "state", broken)
    assert [o.fate for o in first] == [Fate.FOLDED, Fate.REFUSED, Fate.FOLDED]
    assert [o.fate for o in again] == [Fate.REFUSED]
    assert again[0].reason == first[1].reason
    assert "cut off" in str(first[1].reason) or "damaged" in str(first[1].reason)


def test_a_file_that_cannot_be_read_is_no_shot(tmp_path, camera):
    """It is not ledgered, so it is taken when it can be read."""
    root, gone = tmp_path / "state", tmp_path / "gone.dng"
    with State(root) as state, Monitor(state) as monitor:
        outcomes = list(monitor.process([FoundShot(gone), FoundShot(camera.shots[0])]))
    assert [o.fate for o in outcomes] == [Fate.UNREADABLE, Fate.FOLDED]
    assert str(gone) in str(outcomes[0].reason)
    shutil.copyfile(camera.shots[1], gone)
    assert [(o.path.name, o.fate) for o in feed(root, gone)][-1] == (gone.name, Fate.FOLDED)


def test_what_the_user_says_of_a_shot_outlives_a_replay(camera, tmp_path):
    """The kind given is part of the shot's row."""
    root = tmp_path / "state"
    with State(root) as state, Monitor(state) as monitor:
        list(monitor.process(find_shots([str(camera.folder)], ShotKind.DARK).shots))
    outcomes = feed(root)
    assert len(outcomes) == 12
    assert all(o.replayed and o.kind is ShotKind.DARK for o in outcomes)


def test_a_stop_finishes_what_was_received_and_leaves_the_rest(camera, scanned, tmp_path):
    """Nothing that was acknowledged is left half done; the next run does the rest."""
    root = tmp_path / "state"
    asked = itertools.count()
    with State(root) as state, Monitor(state) as monitor:
        done = list(monitor.process(find_shots([str(camera.folder)]).shots, stop=lambda: next(asked) >= 3))
        monitor.checkpoint()
    assert 3 <= len(done) < 12
    assert [verdict for _, verdict, _ in rows(root)] == ["folded"] * len(done)
    feed(root, camera.folder)
    assert told(root) == told(scanned)


def test_a_replay_that_is_stopped_goes_on_in_the_next_run(camera, scanned, tmp_path):
    """A long replay must heed Ctrl-C too."""
    root = tmp_path / "state"
    with State(root) as state, Monitor(state) as monitor:
        list(monitor.process(find_shots([str(camera.folder)]).shots))
    asked = itertools.count()
    with State(root) as state, Monitor(state) as monitor:
        first = list(monitor.replay(lambda: next(asked) >= 5))
        monitor.checkpoint()
    assert len(first) == 5
    assert len(feed(root)) == 7
    assert told(root) == told(scanned)


@pytest.mark.parametrize("harm", ["delete", "corrupt", "cut"])
def test_a_replay_makes_up_for_a_lost_generation(camera, scanned, tmp_path, harm):
    """The older generation and the spool together hold everything."""
    root = tmp_path / "state"
    for shots in (camera.shots[:4], camera.shots[4:8], camera.shots[8:]):
        feed(root, *shots)
    (lost,) = newest(root)
    if harm == "delete":
        lost.unlink()
    else:
        content = bytearray(lost.read_bytes())
        content[len(content) // 2] ^= 4
        lost.write_bytes(content if harm == "corrupt" else content[:-100])
    outcomes = feed(root)
    assert [o.path.name for o in outcomes] == [shot.name for shot in camera.shots[8:]]
    assert all(o.replayed and o.fate is Fate.FOLDED for o in outcomes)
    assert told(root) == told(scanned)


def test_a_replay_of_all_sensors_makes_up_for_all_newest_generations(interleaved, tmp_path):
    """Each sensor from what its own older generation covers on."""
    for root in (tmp_path / "undisturbed", tmp_path / "harmed"):
        feed(root, *interleaved[:4])
        feed(root, *interleaved[4:7])
    for path in newest(tmp_path / "harmed"):
        path.unlink()
    feed(tmp_path / "harmed")
    for root in (tmp_path / "undisturbed", tmp_path / "harmed"):
        feed(root, *interleaved)
    assert told(tmp_path / "harmed") == told(tmp_path / "undisturbed")


def test_damage_that_was_worked_around_is_told(camera, tmp_path):
    """In a sentence that names the file."""
    root = tmp_path / "state"
    feed(root, *camera.shots[:2])
    feed(root, *camera.shots[2:4])
    (lost,) = newest(root)
    lost.write_bytes(lost.read_bytes()[:-1])
    with State(root) as state, Monitor(state) as monitor:
        list(monitor.replay())
        assert any(str(lost) in warning for warning in monitor.warnings)


def test_the_spool_keeps_what_the_older_generation_does_not_cover(camera, tmp_path):
    """And nothing else: a checkpoint drops what no replay can ask for, refused shots and companions too."""
    root = tmp_path / "state"
    broken = tmp_path / "broken.dng"
    broken.write_bytes(b"II*\0")
    kept = []
    for shots in (camera.shots[:4], camera.shots[4:9], [*camera.shots[9:], broken], [camera.shots[0]]):
        feed(root, *shots)
        kept.append(spooled(root))
    assert kept == [4, 5, 3, 3]


def test_a_shot_that_is_gone_at_replay_is_named_and_only_that_one_is_lost(camera, tmp_path):
    """Its copy in the spool was deleted, and the original was too."""
    root, inbox = tmp_path / "state", tmp_path / "inbox"
    shutil.copytree(camera.folder, inbox)
    with State(root) as state, Monitor(state) as monitor:
        list(monitor.process(find_shots([str(inbox)]).shots))
        gone = sorted(inbox.iterdir())[5]
        state.spool.path(state.spool.hash_file(gone)).unlink()
    gone.unlink()
    outcomes = feed(root)
    (refused,) = (o for o in outcomes if o.fate is not Fate.FOLDED)
    assert refused.path.name == gone.name
    assert refused.fate is Fate.REFUSED
    assert "spool" in str(refused.reason)
    assert len(outcomes) == 12
    others = [shot for shot in camera.shots if shot.name != gone.name]
    feed(tmp_path / "others", *others)
    assert told(root)["digests"] == told(tmp_path / "others")["digests"]


def test_the_original_is_used_where_the_spool_lost_its_copy(camera, scanned, tmp_path):
    """As long as it still has the content that was received."""
    root = tmp_path / "state"
    with State(root) as state, Monitor(state) as monitor:
        list(monitor.process(find_shots([str(camera.folder)]).shots))
        for path in (root / "spool").iterdir():
            path.unlink()
    feed(root)
    assert told(root) == told(scanned)


def test_an_original_that_was_edited_in_place_is_not_folded(camera, tmp_path):
    """The spool's link shows the edit too; neither has the content that was acknowledged."""
    root, inbox = tmp_path / "state", tmp_path / "inbox"
    shutil.copytree(camera.folder, inbox)
    with State(root) as state, Monitor(state) as monitor:
        list(monitor.process(find_shots([str(inbox)]).shots))
    edited = sorted(inbox.iterdir())[0]
    with edited.open("r+b") as file:
        file.seek(-100, 2)
        file.write(b"edited")
    outcomes = feed(root)
    assert [o.path.name for o in outcomes if o.fate is Fate.REFUSED] == [edited.name]


def test_a_shot_overwritten_before_it_is_decoded_is_not_folded_as_another(camera, tmp_path, monkeypatch):
    """The link in the spool shows the new content; that has a row of its own, and the old one may come again."""
    current = tmp_path / "image.dng"
    shutil.copyfile(camera.shots[0], current)
    with State(tmp_path / "state") as state, Monitor(state) as monitor:
        state.spool._may_clone = False
        decode = monitor.decoders.decode

        def late(path: Path, *more: Any, **named: Any) -> Frame:
            monkeypatch.setattr(monitor.decoders, "decode", decode)
            current.write_bytes(camera.shots[1].read_bytes())
            return decode(path, *more, **named)

        monkeypatch.setattr(monitor.decoders, "decode", late)
        (refused,) = monitor.process(find_shots([str(current)]).shots)
        assert (refused.fate, refused.reason) == (Fate.REFUSED, LOST)
        outcomes = list(monitor.process(find_shots([str(current), str(camera.shots[0])]).shots))
        assert [outcome.fate for outcome in outcomes] == [Fate.FOLDED, Fate.FOLDED]
        monitor.checkpoint()
    feed(tmp_path / "scanned", camera.shots[1], camera.shots[0])
    assert told(tmp_path / "state")["digests"] == told(tmp_path / "scanned")["digests"]


def test_a_checkpoint_is_written_when_it_is_due(camera, tmp_path):
    """After a time, by the clock handed in, and after a number of shots."""
    now = itertools.count(step=40)
    with State(tmp_path / "timed") as state, Monitor(state, clock=lambda: float(next(now))) as monitor:
        list(monitor.process(find_shots([str(camera.folder)]).shots))
    assert int(newest(tmp_path / "timed")[0].stem[4:]) >= 3
    with State(tmp_path / "counted") as state, Monitor(state, checkpoint_every_shots=5) as monitor:
        list(monitor.process(find_shots([str(camera.folder)]).shots))
    assert newest(tmp_path / "counted")[0].name == "gen-00000002.hpx"


def test_nothing_new_writes_no_generation(scanned, camera, tmp_path):
    """A scan of known shots costs no more than looking at them."""
    root = tmp_path / "state"
    feed(root, *camera.shots[:3])
    before = newest(root)
    feed(root, *camera.shots[:3])
    assert newest(root) == before


def test_a_source_may_have_nothing_just_now(camera, scanned, tmp_path):
    """None from the source is None to the caller, once all that came before is folded."""
    shots = find_shots([str(camera.folder)]).shots
    said = [None, *shots[:1], *[None] * 4, *shots[1:9], None, *shots[9:], *[None] * 9]
    with State(tmp_path / "state") as state, Monitor(state) as monitor:
        outcomes = list(monitor.follow(said))
        monitor.checkpoint()
    names = [None if outcome is None else outcome.path.name for outcome in outcomes]
    assert [name for name in names if name is not None] == [shot.path.name for shot in shots]
    assert names[:2] == [None, shots[0].path.name]
    # One None is used up in receiving the shot and one in folding it.
    assert names[2:5] == [None, None, shots[1].path.name]
    assert names[-1] is None
    assert told(tmp_path / "state") == told(scanned)


def test_a_disk_that_was_full_for_a_while_loses_nothing(camera, scanned, tmp_path, monkeypatch):
    """What was received goes on where it was; the shot that did not fit is offered again."""
    shots = find_shots([str(camera.folder)]).shots
    with State(tmp_path / "state") as state, Monitor(state) as monitor:
        receive, done = state.ledger.receive, []

        def full(received):
            if len(done) == 5:
                raise StateFull("No space left for the ledger.")
            return receive(received)

        monkeypatch.setattr(state.ledger, "receive", full)
        monkeypatch.setattr(monitor_module, "_RECEIVE_TOGETHER", 1)
        with pytest.raises(StateFull):
            done.extend(monitor.follow(shots))
        assert len(done) == 5
        assert monitor.in_flight > 0
        monkeypatch.undo()
        done += [o for o in monitor.follow(shots[5:]) if o is not None and o.fate is Fate.FOLDED]
        monitor.checkpoint()
    assert [outcome.path.name for outcome in done] == [shot.path.name for shot in shots]
    assert told(tmp_path / "state") == told(scanned)


def test_a_camera_takes_the_users_name_if_it_has_no_serial(camera, tmp_path):
    """Only then; a serial number in the file is believed."""
    nameless = VirtualSensor(64, 48, hot=1, stuck=0, dead=0, serial="")
    for _ in write_series(tmp_path / "nameless", nameless, 2, "moving", "dng"):
        pass
    (tmp_path / "nameless" / "truth.json").unlink()
    shots = find_shots([str(tmp_path / "nameless"), str(camera.shots[0])]).shots
    with State(tmp_path / "state") as state, Monitor(state) as monitor:
        list(monitor.process(replace(shot, camera="mine") for shot in shots))
        assert {identity["serial"] for identity in state.ledger.sensors().values()} == {"mine", "V0001"}


def held_up(state: State, gate: threading.Event, *, counts_too: bool = False) -> None:
    """Have generations written only when a gate opens; before, none but the counts are taken."""
    write = state.checkpoint

    def slow(sensor_id: str, number: int, header: Any, arrays: Any, taken: Any) -> Path:
        early = () if counts_too else COUNTS
        copies = {name: arrays[name].copy() for name in early}
        for name in early:
            taken(name)
        assert gate.wait(30.0)
        return write(sensor_id, number, header, arrays | copies, taken)

    state.checkpoint = slow  # type: ignore[method-assign]


@pytest.mark.parametrize(("counts_too", "folded"), [(False, 9), (True, 5)])
def test_shots_come_in_and_are_folded_while_a_checkpoint_is_written(camera, tmp_path, monkeypatch, counts_too, folded):
    """Shots are acknowledged as ever, and folded as long as their sums may wait; the generation has none of them."""
    # On so small a sensor the sites under suspicion are more than a few.
    monkeypatch.setattr(accumulator, "_FEW", 1)
    gate, woken, outcomes = threading.Event(), threading.Event(), []
    shots = find_shots([str(camera.folder)]).shots[:10]
    with State(tmp_path / "state") as state, Monitor(state, checkpoint_every_shots=5, decoders=decoders()) as monitor:
        held_up(state, gate, counts_too=counts_too)
        for outcome in monitor.follow(shots, wake=woken.set):
            if outcome is not None:
                outcomes.append(outcome)
                continue
            # Nothing is to do: all that can be done is done.
            if not gate.is_set() and len(outcomes) == folded and state.ledger.last_shot().seq == len(shots):
                time.sleep(0.05)
                gate.set()
            woken.wait(0.01)
            assert len(outcomes) <= folded or gate.is_set()
        monitor.checkpoint()
    assert gate.is_set()
    assert fates(outcomes) == [(shot.path.name, "folded") for shot in shots]
    feed(tmp_path / "all", *[shot.path for shot in shots])
    assert told(tmp_path / "state") == told(tmp_path / "all")
    feed(tmp_path / "five", *[shot.path for shot in shots[:5]])
    (folder,) = (tmp_path / "state" / "sensors").iterdir()
    (expected,) = newest(tmp_path / "five")
    found = next(read_generation(path) for path in generations(folder) if path.name == expected.name)
    expected = read_generation(expected)
    assert found.header == expected.header
    for name, array in expected.arrays.items():
        np.testing.assert_array_equal(found.arrays[name], array)


def test_a_state_is_not_closed_while_a_checkpoint_is_written(camera, tmp_path):
    """Whoever has the state next must find nobody writing to it."""
    gate = threading.Event()
    with State(tmp_path / "state") as state:
        with Monitor(state, decoders=decoders()) as monitor:
            list(monitor.process(find_shots([str(camera.shots[0])]).shots))
            held_up(state, gate)
            monitor.begin_checkpoint()
            threading.Timer(0.2, gate.set).start()
        assert gate.is_set()
    assert [path.name for path in newest(tmp_path / "state")[0].parent.iterdir()] == ["gen-00000001.hpx"]


def test_a_checkpoint_that_fails_keeps_no_sensor_from_folding(interleaved, tmp_path):
    """That of the first body fails, so that of the second is not begun; both go on."""
    feed(tmp_path / "expected", *interleaved)
    with State(tmp_path / "state") as state, Monitor(state, decoders=decoders()) as monitor:
        list(monitor.process(find_shots([str(path) for path in interleaved[:4]]).shots))
        write, state.checkpoint = state.checkpoint, _full  # type: ignore[method-assign]
        monitor.begin_checkpoint()
        with pytest.raises(StateFull):
            monitor.checkpoint()
        state.checkpoint = write
        list(monitor.process(find_shots([str(path) for path in interleaved[4:]]).shots))
        monitor.checkpoint()
    assert told(tmp_path / "state") == told(tmp_path / "expected")


def _full(*_: object) -> Path:
    raise StateFull("No space left for a generation.")


def test_a_checkpoint_on_a_full_disk_loses_none_of_a_commit(camera, tmp_path):
    """Rows acknowledged together go on after it, though the first of them was just concluded."""
    shots = find_shots([str(camera.folder)]).shots
    with State(tmp_path / "state") as state, Monitor(state, checkpoint_every_shots=2) as monitor:
        write, failing = state.checkpoint, [True, True]

        def full(sensor_id, number, header, *rest):
            if failing and header["covers"] >= 6:
                failing.pop()
                raise StateFull("No space left for generation 3.")
            return write(sensor_id, number, header, *rest)

        state.checkpoint = full
        outcomes: list[Outcome] = []
        for _ in range(3):
            done = {outcome.path for outcome in outcomes}
            try:
                outcomes += [o for o in monitor.follow([s for s in shots if s.path not in done]) if o is not None]
            except StateFull:
                # The caller cannot know what became of those it has no outcome for; it offers them again.
                continue
        monitor.checkpoint()
        assert not failing
        assert monitor.in_flight == 0
        assert [row.verdict for row in state.ledger._shots("ORDER BY seq")] == ["folded"] * 12
    with State(tmp_path / "state") as state:
        checked = answers.verify(state)
        assert checked["ok"], checked["problems"]
        assert checked["sensors"][0]["frames"] == 12


def test_a_read_that_hangs_holds_up_its_own_source_only(camera, tmp_path, monkeypatch):
    """A dying card must not keep the shots of another camera waiting."""
    hang, hung = threading.Event(), camera.shots[0]
    hold = Spool.hold

    def slow(spool, path, *more):
        if path == hung:
            hang.wait(60)
        return hold(spool, path, *more)

    monkeypatch.setattr(Spool, "hold", slow)
    woken = threading.Event()
    shots = [FoundShot(hung, source="dying"), *(FoundShot(shot, source="alive") for shot in camera.shots[1:4])]
    names: list[str] = []
    with State(tmp_path / "state") as state, Monitor(state) as monitor:
        for outcome in monitor.follow(shots, wake=woken.set):
            if outcome is None:
                woken.wait(5)
                woken.clear()
            else:
                names.append(outcome.path.name)
                if len(names) == 3:
                    hang.set()
    assert names == [shot.name for shot in (*camera.shots[1:4], hung)]


def test_a_copy_that_hangs_holds_up_its_own_source_only(camera, tmp_path, monkeypatch):
    """A card that stops answering in the middle of a file that cannot be linked; it is said which one, since when."""
    hang, hung = threading.Event(), tmp_path / "hung.dng"
    shutil.copyfile(camera.shots[0], hung)
    inode, preadv, now = hung.stat().st_ino, os.preadv, [0.0]

    def slow(fd, blocks, at):
        if os.fstat(fd).st_ino == inode:
            hang.wait(60)
        return preadv(fd, blocks, at)

    monkeypatch.setattr(os, "preadv", slow)
    woken = threading.Event()
    shots = [FoundShot(hung, source="dying"), *(FoundShot(shot, source="alive") for shot in camera.shots[1:4])]
    names: list[str] = []
    with State(tmp_path / "state") as state, Monitor(state, clock=lambda: now[0]) as monitor:
        state.spool._device += 1  # nothing is on the spool's own disk
        for outcome in monitor.follow(shots, wake=woken.set):
            if outcome is None:
                woken.wait(5)
                woken.clear()
                continue
            names.append(outcome.path.name)
            if len(names) == 3:
                now[0] = 100.0
                assert {name: (r.path, r.moved_at) for name, r in monitor.readings().items()} == {"dying": (hung, 0.0)}
                # A checkpoint meanwhile drops nothing that is on its way.
                monitor.checkpoint()
                hang.set()
        assert monitor.readings() == {}
        assert [path.suffix for path in state.spool.folder.iterdir()] == [""] * 4
        monitor.checkpoint()
    assert names == [shot.name for shot in camera.shots[1:4]] + ["hung.dng"]
    feed(tmp_path / "scanned", *camera.shots[1:4], hung)
    assert told(tmp_path / "state")["digests"] == told(tmp_path / "scanned")["digests"]


def test_a_full_disk_during_the_replay_is_waited_out(camera, scanned, tmp_path, monkeypatch):
    """It goes on where it was, however often the disk is full, and ends as if it had never been."""
    root = tmp_path / "state"
    with State(root) as state, Monitor(state) as monitor:
        for _, _ in zip(range(9), monitor.process(find_shots([str(camera.folder)]).shots), strict=False):
            pass
        state.ledger.commit()
    with State(root) as state, Monitor(state, checkpoint_every_shots=2) as monitor:
        write, failures = state.checkpoint, [1, 2]

        def full(sensor_id, number, header, *rest):
            if header["covers"] >= 2 * len(failures) and failures:
                failures.pop()
                raise StateFull("No space left.")
            return write(sensor_id, number, header, *rest)

        monkeypatch.setattr(state, "checkpoint", full)
        for _ in range(3):
            with contextlib.suppress(StateFull):
                list(monitor.replay())
        assert not failures
        list(monitor.process(find_shots([str(camera.folder)]).shots))
        monitor.checkpoint()
    assert told(root) == told(scanned)


def test_a_double_in_one_batch_is_known_after_the_first_has_its_row(camera, tmp_path):
    """What is said to be known is in the ledger by then."""
    shutil.copyfile(camera.shots[0], tmp_path / "copy.dng")
    with State(tmp_path / "state") as state, Monitor(state) as monitor:
        for outcome in monitor.follow([FoundShot(camera.shots[0]), FoundShot(tmp_path / "copy.dng")]):
            if outcome is not None and outcome.fate is Fate.KNOWN:
                assert state.ledger.find(Spool.hash_file(outcome.path)) is not None
                break
        else:
            raise AssertionError("no double was seen")


def test_a_jpeg_waits_for_its_raw_that_cannot_be_read(pairs, tmp_path):
    """Else the shot would count in two statistics once the raw can be read."""
    raw = tmp_path / "a.dng"
    raw.mkdir()
    with State(tmp_path / "state") as state, Monitor(state) as monitor:
        (outcome,) = monitor.process([FoundShot(pairs.folder / "frame_0001.jpg", raw=raw)])
    assert outcome.fate is Fate.UNREADABLE
    assert "a.dng" in (outcome.reason or "")


def test_a_jpeg_whose_raw_was_deleted_is_folded(pairs, tmp_path):
    """In the camera, say, between the listing and the reading."""
    with State(tmp_path / "state") as state, Monitor(state) as monitor:
        (outcome,) = monitor.process([FoundShot(pairs.folder / "frame_0001.jpg", raw=tmp_path / "gone.dng")])
    assert outcome.fate is Fate.FOLDED


# Shots of a camera: their files are gone as soon as they are in the ledger

CARD = "Acme One 0042/store_00010001/DCIM/100ACME"


def from_camera(shot: Path, inbox: Path, name: str, **more: Any) -> FoundShot:
    """Let a shot arrive, under a name that only the daemon understands."""
    inbox.mkdir(exist_ok=True)
    path = inbox / f"0042|{name}|1|2|"
    shutil.copyfile(shot, path)
    return FoundShot(path, camera="0042", source="Acme One 0042", origin=f"{CARD}/{name}", **more)


def test_a_shot_of_a_camera_is_known_by_its_place_on_the_card(pairs, tmp_path):
    """To people and in the ledger; the source hears of the file that it gave. A replay calls it the same."""
    root, inbox = tmp_path / "state", tmp_path / "incoming"
    shots = [from_camera(pairs.folder / f"frame_000{n}.dng", inbox, f"IMG_000{n}.DNG") for n in (1, 2)]
    with State(root) as state, Monitor(state) as monitor:
        outcomes = list(monitor.process(shots))
    for outcome, shot, name in zip(outcomes, shots, ("IMG_0001.DNG", "IMG_0002.DNG"), strict=True):
        assert outcome.fate is Fate.FOLDED
        assert outcome.path == shot.path
        assert str(outcome.shown) == outcome.origin == f"{CARD}/{name}"
    with State(root) as state:
        known = [(row.name, row.path) for row in state.ledger._shots("ORDER BY seq")]
    assert known == [(outcome.shown.name, outcome.origin) for outcome in outcomes]
    shutil.rmtree(inbox)
    again = feed(root)
    assert [(o.fate, o.replayed, str(o.shown)) for o in again] == [(Fate.FOLDED, True, o.origin) for o in outcomes]


def test_a_shot_of_a_directory_is_known_by_its_path(camera, tmp_path):
    """As ever."""
    (outcome,) = feed(tmp_path / "state", camera.shots[0])
    assert (outcome.path, outcome.shown, outcome.origin) == (camera.shots[0], camera.shots[0], None)


def test_every_outcome_says_where_the_shot_was(pairs, tmp_path):
    """Folded, known, refused, refused again, a companion, unreadable: what is told of each is its place on the card."""
    inbox, raw, jpeg = tmp_path / "incoming", pairs.folder / "frame_0001.dng", pairs.folder / "frame_0001.jpg"
    broken = tmp_path / "broken.dng"
    broken.write_bytes(raw.read_bytes()[:7000])
    key = Spool.hash_file(raw)
    gone = from_camera(jpeg, inbox, "GONE.JPG")
    gone.path.unlink()
    shots = {
        Fate.FOLDED: from_camera(raw, inbox, "IMG_0001.DNG"),
        Fate.KNOWN: from_camera(raw, inbox, "COPY_0001.DNG"),
        Fate.REFUSED: from_camera(broken, inbox, "IMG_0002.DNG"),
        Fate.COMPANION: from_camera(jpeg, inbox, "IMG_0001.JPG", raw=Path("IMG_0001.DNG"), raw_key=key),
        Fate.UNREADABLE: gone,
    }
    with State(tmp_path / "state") as state, Monitor(state) as monitor:
        for fate, shot in [*shots.items(), (Fate.REFUSED, from_camera(broken, inbox, "IMG_0003.DNG"))]:
            (outcome,) = monitor.process([shot])
            assert (outcome.fate, outcome.path, outcome.origin) == (fate, shot.path, shot.origin)


@pytest.mark.parametrize("together", [True, False])
def test_a_jpeg_is_the_companion_of_a_raw_that_is_known_by_its_key(pairs, tmp_path, together):
    """The raw file is gone from the disk by then: in one batch, and a day later in another run."""
    root, inbox = tmp_path / "state", tmp_path / "incoming"
    raw = from_camera(pairs.folder / "frame_0001.dng", inbox, "IMG_0001.DNG")
    key = Spool.hash_file(raw.path)
    jpeg = from_camera(pairs.folder / "frame_0001.jpg", inbox, "IMG_0001.JPG", raw=Path("IMG_0001.DNG"), raw_key=key)
    outcomes = []
    for shots in ([raw, jpeg],) if together else ([raw], [jpeg]):
        with State(root) as state, Monitor(state) as monitor:
            for outcome in monitor.process(shots):
                outcomes.append(outcome)
                outcome.path.unlink()
            monitor.checkpoint()
    assert sorted(fates(outcomes)) == [(raw.path.name, "folded"), (jpeg.path.name, "companion")]
    assert rows(root) == [("IMG_0001.DNG", "folded", None), ("IMG_0001.JPG", "companion", "companion of IMG_0001.DNG")]


def test_the_key_counts_and_not_a_file_of_that_name(pairs, tmp_path, monkeypatch):
    """A raw file that happens to lie where the daemon was started is another one, and is not even read."""
    inbox, started_in = tmp_path / "incoming", tmp_path / "cwd"
    started_in.mkdir()
    (started_in / "IMG_0001.DNG").mkdir()
    monkeypatch.chdir(started_in)
    raw = from_camera(pairs.folder / "frame_0001.dng", inbox, "IMG_0001.DNG")
    known = {"raw": Path("IMG_0001.DNG"), "raw_key": Spool.hash_file(raw.path)}
    with State(tmp_path / "state") as state, Monitor(state) as monitor:
        list(monitor.process([raw]))
        (outcome,) = monitor.process([from_camera(pairs.folder / "frame_0001.jpg", inbox, "IMG_0001.JPG", **known)])
    assert outcome.fate is Fate.COMPANION


def test_a_jpeg_is_folded_if_the_raw_of_that_key_is_not(pairs, tmp_path):
    """Refused, or never received: better a JPEG than nothing."""
    inbox = tmp_path / "incoming"
    broken = tmp_path / "broken.dng"
    broken.write_bytes((pairs.folder / "frame_0001.dng").read_bytes()[:7000])
    raw = from_camera(broken, inbox, "IMG_0001.DNG")
    keys = [Spool.hash_file(raw.path), "0" * 64]
    jpegs = [
        from_camera(pairs.folder / f"frame_000{n}.jpg", inbox, f"IMG_000{n}.JPG", raw=Path("IMG.DNG"), raw_key=key)
        for n, key in enumerate(keys, 1)
    ]
    with State(tmp_path / "state") as state, Monitor(state) as monitor:
        assert [o.fate for o in monitor.process([raw, *jpegs])] == [Fate.REFUSED, Fate.FOLDED, Fate.FOLDED]


def test_a_shot_that_ends_every_replay_is_left_alone_in_the_end(camera, tmp_path):
    """And no other shot with it: the statistic is then that of the others, and the reason says what happened."""
    inbox = tmp_path / "inbox"
    inbox.mkdir()
    for shot in camera.shots[:7]:
        shutil.copyfile(shot, inbox / shot.name)
    poison = sorted(inbox.iterdir())[5].name
    code = (
        "import os, sys; from hotpixd import cli; from hotpixd.monitor import Monitor; conclude = Monitor._conclude\n"
        "def fatal(self, shot):\n"
        f"    if shot.row.name == {poison!r} and shot.frame.exception() is None: os._exit(9)\n"
        "    return conclude(self, shot)\n"
        "Monitor._conclude = fatal; cli.main()"
    )
    command = [sys.executable, "-c", code, "scan", "--state", str(tmp_path / "state"), str(inbox)]
    codes = [subprocess.run(command, env=environment(), capture_output=True).returncode for _ in range(8)]
    # The first run, five replays, and then none ends there any more.
    assert codes == [9] * 6 + [1, 1]
    found = rows(tmp_path / "state")
    assert [(name, verdict) for name, verdict, _ in found if verdict != "folded"] == [(poison, "refused")]
    assert "ended 5 times while it worked on this shot" in str({n: r for n, _, r in found}[poison])
    others = [shot for shot in camera.shots[:7] if shot.name != poison]
    feed(tmp_path / "alone", *others)
    assert told(tmp_path / "state")["least"] == told(tmp_path / "alone")["least"]


def test_kills_at_the_same_moment_refuse_no_good_shot(camera, scanned, tmp_path):
    """A replay that is killed four times over before it ends goes on with every shot."""
    command = [*HOTPIXD, "scan", "--state", str(tmp_path / "state"), *map(str, camera.shots)]
    for step in ("after_receive:kill:2", *["amid_replay:kill"] * 4):
        done = subprocess.run(command, env=environment(HOTPIXD_FAILPOINT=step), capture_output=True)
        assert done.returncode == -9, done.stderr
    assert subprocess.run(command, env=environment(), capture_output=True).returncode == 0
    assert told(tmp_path / "state")["digests"] == told(scanned)["digests"]


def test_large_generations_wait_until_they_are_worth_it(camera, tmp_path, monkeypatch):
    """A shot a minute would else write a generation of 150 MB each time; what is not covered is folded again."""
    monkeypatch.setattr(monitor_module, "_CHEAP_BYTES", 0)
    monkeypatch.setattr(monitor_module, "_WORTH", 2)
    clock = itertools.count(0, 1000)
    with State(tmp_path / "state") as state, Monitor(state, decoders=decoders(), clock=lambda: next(clock)) as monitor:
        written, folded = [], 0
        for shot in camera.shots:
            folded += len(list(monitor.process([FoundShot(shot)])))
            if monitor._since_checkpoint == 0:
                written.append(folded)
        size = generations(next((tmp_path / "state" / "sensors").iterdir()))[0].stat().st_size
    each = camera.shots[0].stat().st_size
    # The first is an estimate of six bytes per sample; the later ones are as large as the one before.
    assert written[0] == -(-2 * 6 * 200 * 150 // each)
    assert 1 <= len(written) <= len(camera.shots) * each / (2 * size) + 1
    feed(tmp_path / "state")
    assert told(tmp_path / "state")["digests"] == told_of(tmp_path, camera)


def told_of(tmp_path, camera):
    feed(tmp_path / "again", camera.folder)
    return told(tmp_path / "again")["digests"]
