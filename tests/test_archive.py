"""Sensors between memory and disk: names of folders, identities, generations that cannot be used."""

from __future__ import annotations

import shutil
from dataclasses import replace

import pytest

from conftest import decoders, feed
from hotpixd import archive
from hotpixd.core.frame import SampleKind, SensorIdentity, SensorLayout
from hotpixd.core.sensor import Sensor
from hotpixd.intake.files import find_shots
from hotpixd.monitor import Monitor
from hotpixd.store import checkpoint
from hotpixd.store.durable import StateError
from hotpixd.store.state import State

IDENTITY = SensorIdentity("Canon", "EOS R6", "0123", SampleKind.RAW, SensorLayout(64, 48, "RGGB"), "uint16")


@pytest.mark.parametrize(
    "other",
    [
        replace(IDENTITY, serial="0124"),
        replace(IDENTITY, serial=None),
        replace(IDENTITY, serial=""),
        replace(IDENTITY, make="CANON"),
        replace(IDENTITY, model="EOS-R6"),
        replace(IDENTITY, dtype="uint8"),
        replace(IDENTITY, samples=SampleKind.RENDERED),
        replace(IDENTITY, layout=SensorLayout(64, 48, "BGGR")),
        replace(IDENTITY, layout=SensorLayout(48, 64, "RGGB")),
    ],
)
def test_what_differs_in_anything_has_a_folder_of_its_own(other):
    """Even where the readable part of the name is the same."""
    assert archive.sensor_id(other) != archive.sensor_id(IDENTITY)
    assert archive.identity_from(archive.describe(other)) == other


@pytest.mark.parametrize("word", ["../../etc", "a/b\\c", "\x1b[31m\n", "", ".", "-", "名前", "x" * 300, "\udcff"])
def test_whatever_a_camera_calls_itself_can_be_a_folder(tmp_path, word):
    """Makers write anything into their files; nothing of it may lead out of the state."""
    identity = replace(IDENTITY, make=word, model=word, serial=word)
    with State(tmp_path / "state") as state:
        folder = state.sensor_folder(archive.sensor_id(identity))
    assert folder.parent == tmp_path / "state" / "sensors"
    assert folder.is_dir()


def test_a_name_says_whose_sensor_it_is():
    """People look into the state directory too."""
    assert archive.sensor_id(IDENTITY).startswith("Canon-EOS-R6-0123-64x48-raw-")


def test_a_sensor_without_a_generation_starts_empty(tmp_path):
    """The first shot of a body makes its sensor."""
    with State(tmp_path / "state") as state:
        kept = archive.load(state, archive.sensor_id(IDENTITY), Sensor(IDENTITY))
    assert (kept.sensor.frames, kept.number, kept.covers, kept.covered_by_older) == (0, 0, 0, None)


def test_a_sensor_without_new_frames_is_not_written(tmp_path, camera):
    """Generations say something new, or they are none."""
    feed(tmp_path / "state", *camera.shots[:2])
    with State(tmp_path / "state") as state:
        ((id_, description),) = state.ledger.sensors().items()
        kept = archive.load(state, id_, Sensor(archive.identity_from(description)))
        archive.save(state, kept)
        assert len(checkpoint.generations(state.sensor_folder(id_))) == 1


def test_the_verdicts_are_committed_before_their_generation(tmp_path, camera, monkeypatch):
    """A generation never covers a shot whose verdict a kill could still take away."""
    with State(tmp_path / "state") as state, Monitor(state, decoders=decoders()) as monitor:
        list(monitor.process(find_shots([str(camera.shots[0])]).shots))
        waiting = []
        write = state.checkpoint
        monkeypatch.setattr(state, "checkpoint", lambda *what: waiting.append(state.ledger.waits) or write(*what))
        assert state.ledger.waits
        monitor.checkpoint()
    assert waiting == [False]


def test_what_two_generations_cover_is_known_after_loading(tmp_path, camera):
    """The spool is cleared by the older of the two; a damaged one covers nothing."""
    root = tmp_path / "state"
    feed(root, *camera.shots[:2])
    feed(root, *camera.shots[2:5])
    with State(root) as state:
        ((id_, description),) = state.ledger.sensors().items()
        identity = archive.identity_from(description)
        kept = archive.load(state, id_, Sensor(identity))
        assert (kept.number, kept.covers, kept.covered_by_older) == (2, 5, 2)
        assert archive.covers_of(state, id_) == 5
        newest, older = checkpoint.generations(state.sensor_folder(id_))
        older.write_bytes(older.read_bytes()[:-1])
        assert archive.load(state, id_, Sensor(identity)).covered_by_older is None
        newest.write_bytes(b"")
        kept = archive.load(state, id_, Sensor(identity))
        assert (kept.number, kept.covers, kept.sensor.frames) == (0, 0, 0)
        assert len(kept.damage) == 2
        assert archive.covers_of(state, id_) == 0


@pytest.mark.parametrize("change", ["missing", "shape", "header"])
def test_a_generation_of_another_version_is_refused_in_a_sentence(tmp_path, scanned, change):
    """Its digest is right, but its arrays are not ours; once that ended in a traceback."""
    shutil.copytree(scanned, tmp_path / "state")
    with State(tmp_path / "state") as state:
        ((id_, description),) = state.ledger.sensors().items()
        (path,) = checkpoint.generations(state.sensor_folder(id_))
        generation = checkpoint.read_generation(path)
        header, arrays = dict(generation.header), dict(generation.arrays)
        if change == "missing":
            del arrays["total"]
        elif change == "shape":
            arrays["tracks"] = arrays["tracks"].ravel()[:-1].copy()
        else:
            header["sensor"] = {}
        checkpoint.write_generation(path.parent, 1, header, arrays)
        with pytest.raises(StateError, match="another version") as caught:
            archive.load(state, id_, Sensor(archive.identity_from(description)))
        assert str(path.parent) in str(caught.value)
