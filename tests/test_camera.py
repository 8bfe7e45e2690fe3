"""Tethered cameras: every file once and byte for byte, through all that drivers, cables, cameras and kills can do.

libgphoto2's virtual camera is a USB camera whose driver can be made to fail;
the PTP/IP camera on loopback has a card, a button and faults of its own. Each
run of HOTPIXD_LONG=1 has 500 files, and every seed.
"""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from daemons import eventually
from hotpixd.core.frame import ShotKind
from hotpixd.intake import camera as camera_module
from hotpixd.intake.album import Album
from hotpixd.intake.camera import CameraError, CameraSettings
from ptpip_camera import LoopbackCamera
from tethers import CODE, Tether

pytest.importorskip("gphoto2")

LONG = bool(os.environ.get("HOTPIXD_LONG"))
SEEDS = range(5) if LONG else range(1)
PAIRS = 250 if LONG else 60
PRESSES = 500 if LONG else 40

FAULTS = ("unplug", "cut", "stall", "busy", "kill")

HOOKS = str(Path(__file__).with_name("worker_hooks"))
PRESS = "0x9999,0x0,0x0"
"""What makes the virtual camera believe that its button was pressed."""

MARK = b"\xff\xd8"
SIZE = 30_000


def content(number: int, size: int = SIZE) -> bytes:
    """Return a file's bytes, unlike all others'."""
    return (MARK + b"%08d" % number).ljust(size, b"x")


def key(data: bytes) -> str:
    return sha256(data).hexdigest()


@dataclass
class VirtualCard:
    """The folder that libgphoto2's virtual camera shows as its card."""

    root: Path

    def put(self, *numbers: int) -> set[str]:
        """Put files on the card, as the camera finds them when it is opened next; return their digests."""
        folder = self.root / "DCIM" / "100VIRTL"
        folder.mkdir(parents=True, exist_ok=True)
        for number in numbers:
            (folder / f"IMG_{number:04d}.JPG").write_bytes(content(number))
        return {key(content(number)) for number in numbers}


@pytest.fixture
def card(tmp_path: Path) -> VirtualCard:
    return VirtualCard(tmp_path / "card")


@pytest.fixture
def tether(tmp_path: Path) -> Iterator[Callable[..., Tether]]:
    """Tether cameras; none is tethered any more when the test ends, and no process is left."""
    tethers: list[Tether] = []

    def start(port: str = "auto", environ: dict[str, str] | None = None, **settings: Any) -> Tether:
        chosen = {"verify_after_s": 1.0, "hang_s": 4.0, **settings}
        folder = tmp_path / f"incoming-{len(tethers)}"
        tethers.append(Tether(folder, CameraSettings(port=port, **chosen), **(environ or {})))
        return tethers[-1]

    yield start
    workers = [pid for one in tethers for pid in one.workers()]
    for one in tethers:
        one.close()
    assert not any(Path(f"/proc/{pid}").exists() for pid in workers), "a worker was left behind"


@pytest.fixture
def loopback() -> Iterator[LoopbackCamera]:
    with LoopbackCamera("generic") as camera:
        camera.capture_random({"CR2": 30_000, "JPG": 5_000})
        yield camera


def digests(camera: LoopbackCamera) -> set[str]:
    return {file.sha256 for file in camera.files()}


def faulty(card: VirtualCard, tmp_path: Path, **faults: Any) -> dict[str, str]:
    """Return the environment of workers whose driver fails once."""
    order = {"code": -7, "mark": str(tmp_path / "gone-wrong"), **faults}
    return {"VCAMERADIR": str(card.root), "PYTHONPATH": HOOKS, "HOTPIXD_TEST_FAULTS": json.dumps(order)}


# --- the virtual camera on USB


def test_what_is_pressed_on_the_body_arrives_once_and_byte_for_byte(card, tether):
    """As an event only: the virtual camera forgets these shots when it is opened anew."""
    wanted = card.put(1)
    source_file = next(card.root.rglob("*.JPG"))
    one = tether(environ={"VCAMERADIR": str(card.root)}, verify_after_s=3600.0)
    one.delivered(1)
    for number in range(2, PRESSES + 2):
        source_file.write_bytes(content(number))
        wanted.add(key(content(number)))
        one.source.call("set", 20.0, name="opcode", value=PRESS)
        one.delivered(number)
    assert set(one.arrived) == wanted
    assert set(one.arrived.values()) == {1}
    assert {shot.camera for shot in one.shots} == {"0.1"}
    assert re.fullmatch(r"GP VC 0\.1/store_00010001/DCIM/10\dGPHOT/GPH_\d{4}\.JPG", one.shots[-1].origin)


@pytest.mark.parametrize("code", [-52, -7, -34, -10])
@pytest.mark.parametrize("calls", [0, 1, 5, 15, 25, 35, 50, 70] if LONG else [0, 15, 35])
def test_a_driver_that_fails_at_any_call_loses_nothing(card, tether, tmp_path, code, calls):
    """No device, I/O error, read error, timeout; while it is opened, listed, asked and read."""
    wanted = card.put(*range(1, 6))
    one = tether(environ=faulty(card, tmp_path, code=code, after_calls=calls), hang_s=3.0)
    one.delivered(5)
    one.ready()
    assert (tmp_path / "gone-wrong").exists()
    assert set(one.arrived) == wanted
    assert set(one.arrived.values()) == {1}


def test_a_link_that_dies_in_the_middle_of_a_file_leaves_no_half_file(card, tether, tmp_path):
    """The part is thrown away, and the whole file is fetched again."""
    wanted = card.put(*range(1, 6))
    one = tether(environ=faulty(card, tmp_path, code=-7, after_bytes=3 * SIZE + SIZE // 2))
    one.delivered(5)
    assert (tmp_path / "gone-wrong").exists()
    assert set(one.arrived) == wanted
    one.ready()
    assert [path.name for path in one.folder.iterdir()] == ["config"]


def test_a_worker_that_hangs_in_the_library_is_ended(card, tether, tmp_path):
    """With the interpreter's lock held, so that nothing in it can help; the others never notice."""
    wanted = card.put(*range(1, 6))
    one = tether(environ=faulty(card, tmp_path, after_calls=60, hang=True), hang_s=2.0)
    answered = []
    eventually((tmp_path / "gone-wrong").exists, "the worker hangs")
    began = time.monotonic()
    answered.append(one.source.states())
    assert time.monotonic() - began < 0.5
    one.delivered(5)
    assert set(one.arrived) == wanted
    assert "backing off" in {condition for _, condition, _ in one.changes}


@pytest.mark.parametrize("code", [-53, -60])
def test_a_camera_that_another_program_has_is_waited_for(card, tether, tmp_path, monkeypatch, code):
    """It says so meanwhile, and takes the camera when it is free."""
    monkeypatch.setattr(camera_module, "_CLAIMED_RETRY_S", 0.5)
    card.put(1)
    one = tether(environ=faulty(card, tmp_path, code=code, operations=["open"], times=2, mark=""))
    one.wait(lambda: "claimed" in one.conditions())
    assert one.source.states()[0].status == "trouble"
    one.delivered(1)
    one.ready()


def test_lost_events_are_made_up_for_by_a_listing(card, tether, tmp_path):
    """What is put on the card while nobody tells of it; the control is the same camera without a listing."""
    card.put(1)
    one = tether(environ={"VCAMERADIR": str(card.root)}, verify_after_s=3600.0)
    one.delivered(1)
    wanted = card.put(1, 2, 3)
    time.sleep(1.5)
    assert len(one.arrived) == 1, "nobody has told of them"
    one.source.list_anew()
    one.delivered(3)
    assert set(one.arrived) == wanted


def test_files_that_are_not_pictures_stay_where_they_are(card, tether):
    """Films and texts; and raw files that libgphoto2 does not fetch from this camera are told of once."""
    wanted = card.put(1)
    folder = card.root / "DCIM" / "100VIRTL"
    (folder / "MVI_0002.MOV").write_bytes(content(2))
    (folder / "NOTE.TXT").write_bytes(content(3))
    (folder / "IMG_0004.NEF").write_bytes(content(4))
    one = tether(environ={"VCAMERADIR": str(card.root)})
    one.delivered(1)
    one.ready()
    one.wait(lambda: one.source.states()[0].waiting == 0)
    assert set(one.arrived) == wanted


def test_shots_go_to_the_card_not_to_the_camera_s_memory(card, tether):
    """Memory is libgphoto2's default; before the camera is opened it is told otherwise, and asked afterwards."""
    card.put(1)
    one = tether(environ={"VCAMERADIR": str(card.root)}).ready()
    (facts,) = one.source.cameras()
    assert facts["target"] == "card"
    target = one.source.call("get", 20.0, names=["capturetarget", "iso"])
    assert target["capturetarget"]["value"] == "Memory card"
    assert target["iso"] is None


# --- the traps of the bindings


def test_nothing_is_read_from_memory_that_was_freed():
    """A call's result must have a name while a part of it is used: `file_get_info(...).file` points into nothing."""
    for path in (Path(CODE) / "hotpixd").rglob("*.py"):
        text = path.read_text("utf-8")
        assert not re.search(r"file_get_info\([^\n]*\)\.file|\.get_data_and_size", text), path


def test_only_the_worker_touches_the_library():
    """Its calls may hang with the interpreter's lock held; and `capture` loses the second file of a pair."""
    touching = set()
    for path in (Path(CODE) / "hotpixd").rglob("*.py"):
        text = path.read_text("utf-8")
        if re.search(r"^\s*(import|from) gphoto2", text, re.MULTILINE):
            touching.add(path.name)
        assert not re.search(r"\.capture\(", text), path
    assert touching == {"camera_worker.py"}


# --- the camera on loopback


def chaos(camera: LoopbackCamera, one: Tether, pairs: int, seed: int, faults: tuple[str, ...]) -> None:
    """Shoot pairs while cables, downloads and workers fail."""
    rng = random.Random(seed)
    fault_at = time.monotonic() + 0.3
    for _ in range(pairs):
        camera.shoot()
        time.sleep(rng.uniform(0.01, 0.05))
        if not faults or time.monotonic() < fault_at:
            continue
        fault = rng.choice(faults)
        if fault == "unplug":
            camera.unplug()
            time.sleep(rng.uniform(0.05, 0.5))
            camera.plug()
        elif fault == "cut":
            camera.cut_download(rng.randrange(30_000))
        elif fault == "stall":
            camera.stall_download(rng.randrange(30_000))
        elif fault == "busy":
            camera.behave(busy_operations=rng.randrange(1, 8))
        elif fault == "kill":
            for pid in one.workers():
                os.kill(pid, signal.SIGKILL)
        fault_at = time.monotonic() + rng.uniform(0.2, 0.8)
    camera.plug()


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    "faults",
    [("unplug",), ("cut", "stall"), ("busy",), ("kill",)] if LONG else [("unplug", "cut", "stall", "busy", "kill")],
)
def test_no_shot_is_lost_whatever_happens_to_the_link(tether, seed, faults):
    """RAW+JPEG, numbers that roll over, 15 % of the events lost, 10 % told twice; nothing more comes than was shot."""
    with LoopbackCamera("generic", seed=seed, drop_events=0.15, duplicate_events=0.1) as camera:
        camera.capture_random({"CR2": 30_000, "JPG": 5_000}, seed=seed)
        camera.number_from(9999 - PAIRS // 2)
        one = tether(camera.port).ready()
        chaos(camera, one, PAIRS, seed, faults)
        wanted = digests(camera)
        one.wait(lambda: wanted <= set(one.arrived), "for all files", 60.0)
        assert len(wanted) == 2 * PAIRS
        assert set(one.arrived) == wanted
        names = {shot.origin.rpartition("/")[2] for shot in one.shots}
        assert {"IMG_9999.CR2", "IMG_0001.CR2"} <= names
        companions = [shot for shot in one.shots if shot.origin.endswith(".JPG") and shot.raw is not None]
        assert len({shot.origin for shot in companions}) == PAIRS


def test_a_listing_that_leaves_files_out_is_not_the_last(card, tether, tmp_path):
    """A camera that is busy while it is listed shows fewer files or none, without an error."""
    wanted = card.put(1, 2, 3)
    one = tether(environ=faulty(card, tmp_path, lies=True))
    one.ready()
    assert one.source.states()[0].files == 0
    one.delivered(3)
    assert set(one.arrived) == wanted
    one.wait(lambda: any(known["verified"] for known in one.source.cameras()))


def test_without_a_listing_after_the_burst_shots_are_lost(tether, monkeypatch):
    """The control: it is the listing that finds what no event told of."""
    monkeypatch.setattr(camera_module.CameraSource, "_verify_due", lambda *_: float("inf"))
    with LoopbackCamera("generic", drop_events=0.3) as camera:
        camera.capture_random({"CR2": 3_000, "JPG": 500})
        one = tether(camera.port).ready()
        chaos(camera, one, 40, 0, ())
        time.sleep(3.0)
        assert 0 < len(one.arrived) < 70


def test_without_what_a_listing_finds_shots_are_lost(tether, monkeypatch):
    """The control: shots made while the cable was out are on the card only."""
    monkeypatch.setattr(camera_module.CameraSource, "_reconcile", lambda *_: None)
    with LoopbackCamera("generic") as camera:
        camera.capture_random({"CR2": 3_000})
        one = tether(camera.port).ready()
        camera.shoot()
        one.delivered(1)
        camera.unplug()
        camera.shoot()
        camera.plug()
        one.wait(lambda: "ready" in one.conditions())
        time.sleep(2.5)
        assert len(one.arrived) == 1 < len(digests(camera))


def test_the_raw_comes_first_and_the_picture_beside_it_is_its_companion(loopback, tether):
    """In whichever order the camera tells of them."""
    one = tether(loopback.port).ready()
    loopback.shoot()
    loopback.shoot([("JPG", b"\xff\xd8 late raw"), ("CR2", b"raw after its picture")])
    one.delivered(4)
    for raw, beside in (one.shots[:2], one.shots[2:4]):
        assert raw.origin.endswith(".CR2")
        assert raw.raw is None
        assert beside.origin.endswith(".JPG")
        assert str(beside.raw) == raw.origin.rpartition("/")[2]
        assert beside.raw_key is not None


def test_a_picture_whose_raw_does_not_come_is_not_kept_waiting_for_ever(loopback, tether, monkeypatch):
    """The camera was set to JPEG in between."""
    monkeypatch.setattr(camera_module, "_MATE_WITHIN_S", 1.5)
    one = tether(loopback.port).ready()
    loopback.shoot()
    one.delivered(2)
    began = time.monotonic()
    loopback.shoot([("JPG", b"\xff\xd8 alone")])
    one.delivered(3)
    assert time.monotonic() - began > 1.0
    assert one.shots[2].raw is None


def test_a_picture_is_a_companion_also_in_the_next_run(loopback, tether):
    """The raw file was folded before a restart; its JPEG is fetched after."""
    one = tether(loopback.port).ready()
    (raw,) = loopback.shoot([("CR2", b"raw")], stem="IMG_0007")
    one.delivered(1)
    one.wait(lambda: len(one.seen) == 2)
    one.restart()
    one.ready()
    loopback.shoot([("JPG", b"\xff\xd8")], stem="IMG_0007")
    one.delivered(2)
    assert one.shots[1].raw is not None
    assert one.shots[1].raw.name == raw.name


def test_what_was_fetched_is_not_fetched_again(loopback, tether):
    """Neither by the listings that follow nor after a restart; the clock of the camera may jump meanwhile."""
    one = tether(loopback.port).ready()
    for mtime_s in (1_800_000_000, 1_000_000_000):
        loopback.shoot(mtime_s=mtime_s)
    one.delivered(4)
    downloads = loopback.status.downloads
    one.source.list_anew()
    one.ready()
    one.restart()
    one.ready()
    one.wait(lambda: one.source.cameras())
    assert loopback.status.downloads == downloads
    assert set(one.arrived.values()) == {1}


def test_a_name_that_comes_again_with_other_content_is_another_shot(loopback, tether):
    """The card was formatted, and the counter began anew."""
    one = tether(loopback.port).ready()
    loopback.shoot([("CR2", b"one")], stem="IMG_0001", mtime_s=1_700_000_000)
    one.delivered(1)
    loopback.format_card()
    loopback.shoot([("CR2", b"two")], stem="IMG_0001", mtime_s=1_700_000_005)
    one.delivered(2)
    assert set(one.arrived) == {key(b"one"), key(b"two")}


def test_a_file_of_which_the_size_is_not_known_yet_is_fetched_when_it_is(tether):
    """libgphoto2 remembers the first size it was told; only another worker asks again."""
    with LoopbackCamera("generic", size_unknown_s=1.0) as camera:
        camera.capture_random({"CR2": 3_000})
        one = tether(camera.port).ready()
        camera.shoot()
        one.delivered(1)
        assert set(one.arrived) == digests(camera)


def test_nothing_is_deleted_unless_asked_for(loopback, tether):
    """The control of the next test."""
    one = tether(loopback.port).ready()
    loopback.shoot()
    one.delivered(2)
    one.wait(lambda: one.source.states()[0].files == 2)
    assert loopback.status.deleted == 0


def test_files_are_deleted_once_they_are_safe_and_listed_anew(loopback, tether, tmp_path):
    """Not before: the service has them, they are saved, and a fresh listing shows them with their size."""
    (tmp_path / "photos").mkdir()
    one = tether(loopback.port, delete=True, album=Album(tmp_path / "photos")).ready()
    loopback.shoot()
    wanted = digests(loopback)
    one.delivered(2)
    one.wait(lambda: not loopback.files(), "until they are deleted")
    assert {key(path.read_bytes()) for path in (tmp_path / "photos").iterdir()} == wanted
    assert loopback.status.deleted == 2
    # And another shot may have that name.
    one.wait(lambda: len(one.seen) == 1)


def test_what_was_not_saved_is_saved_before_it_is_deleted(loopback, tether, tmp_path):
    """In the ledger since a run without a folder for photos, and nowhere else."""
    loopback.shoot()
    one = tether(loopback.port).ready()
    one.delivered(2)
    wanted = digests(loopback)
    (tmp_path / "photos").mkdir()
    one.restart(album=Album(tmp_path / "photos"), delete=True)
    one.wait(lambda: not loopback.files(), "until they are deleted")
    assert {key(path.read_bytes()) for path in (tmp_path / "photos").iterdir()} == wanted


def test_shots_in_the_camera_s_memory_are_fetched_deleted_and_never_mixed_up(tether):
    """All of them are called capt0000.nef. The camera stands for a body that has no other place for them."""
    order = {"code": -7, "after_calls": 1 << 30, "memory_only": True}
    environ = {"PYTHONPATH": HOOKS, "HOTPIXD_TEST_FAULTS": json.dumps(order)}
    with LoopbackCamera("nikon", names_repeat=True) as camera:
        camera.behave(time_scale=0.001)
        camera.capture_random({"NEF": 20_000})
        one = tether(camera.port, environ=environ).ready()
        assert one.source.cameras()[0]["target"] == "ram"
        assert "memory" in one.source.states()[0].detail
        for number in range(1, 5):
            one.source.call("trigger", 30.0, exposure_s=0.1)
            one.delivered(number)
            one.wait(lambda: not (one.source._arrived or one.source._bodies[0].doomed))
        assert set(one.arrived.values()) == {1}
        assert {shot.origin.rpartition("/")[2] for shot in one.shots} <= {f"capt{n:04}.nef" for n in range(4)}
        # None of them is remembered by its name: the next one may have it.
        assert not any(one.seen.values())


def test_what_had_arrived_before_a_crash_is_offered_without_being_fetched(loopback, tether, monkeypatch):
    """Also of a camera that does not come back."""
    monkeypatch.setattr(camera_module, "_LEFT_WAIT_S", 1.0)
    one = tether(loopback.port, verify_after_s=3600.0).ready()
    one.pause()
    loopback.shoot()
    one.wait(lambda: one.source.states()[0].waiting == 2)
    one.wait(lambda: not one.source._bodies[0].pending)
    one.crash()
    loopback.unplug()
    downloads = loopback.status.downloads
    one.restart()
    one.delivered(2)
    assert [shot.origin.rpartition(".")[2] for shot in one.shots] == ["CR2", "JPG"]
    assert one.shots[1].raw is not None
    loopback.plug()
    one.ready()
    assert loopback.status.downloads == downloads
    assert set(one.arrived) == digests(loopback)


def test_photos_are_saved_where_the_user_wants_them(loopback, tether, tmp_path):
    """Under names made by a template; what is there already is not overwritten."""
    photos = tmp_path / "photos"
    photos.mkdir()
    (photos / "LB0001-IMG_0001.CR2").write_bytes(b"somebody's")
    one = tether(loopback.port, album=Album(photos, "{serial}-{name}")).ready()
    loopback.shoot()
    one.delivered(2)
    one.wait(lambda: len(list(photos.glob("[!.]*"))) == 3)
    saved = {path.name: key(path.read_bytes()) for path in photos.glob("[!.]*")}
    assert saved.pop("LB0001-IMG_0001.CR2") == key(b"somebody's")
    assert set(saved) == {"LB0001-IMG_0001-1.CR2", "LB0001-IMG_0001.JPG"}
    assert set(saved.values()) == digests(loopback)


def test_a_missing_folder_for_photos_is_told_and_waited_for(loopback, tether, tmp_path, monkeypatch):
    """A disk that is not mounted: shots are folded meanwhile, and kept until they can be saved."""
    monkeypatch.setattr(camera_module, "_AGAIN_S", 0.5)
    photos = tmp_path / "photos"
    one = tether(loopback.port, album=Album(photos)).ready()
    loopback.shoot()
    one.delivered(2)
    one.wait(lambda: one.source.states()[0].status == "trouble")
    assert str(photos) in one.source.states()[0].detail
    assert not photos.exists()
    photos.mkdir()
    one.wait(lambda: len(list(photos.iterdir())) == 2)
    one.wait(lambda: one.source.states()[0].status == "watching")
    # Each file and that it is saved, and the camera.
    one.wait(lambda: len(one.seen) == 5)


@pytest.mark.parametrize("existing", ["fetch", "leave", "later"])
def test_what_is_on_the_card_at_first(loopback, tether, existing):
    """Fetched, left for good, or left until the next start."""
    loopback.shoot()
    old = digests(loopback)
    one = tether(loopback.port, existing=existing).ready()
    loopback.shoot()
    one.delivered(4 if existing == "fetch" else 2)
    new = digests(loopback) - old
    assert set(one.arrived) == (old | new if existing == "fetch" else new)
    one.restart(existing="fetch")
    one.ready()
    one.wait(lambda: one.source.states()[0].waiting == 0)
    assert set(one.arrived) == (new if existing == "leave" else old | new)


def test_several_cameras_at_once_and_one_that_changes_its_port(tether, monkeypatch):
    """Each is known by its serial number, so that nothing is fetched twice when it is plugged in elsewhere."""
    with LoopbackCamera("generic", "AAA1") as first, LoopbackCamera("generic", "BBB2") as second:
        ports = {first.port, second.port}
        monkeypatch.setattr(camera_module, "ports_at", lambda *_: set(ports))
        monkeypatch.setattr(camera_module, "_LOOK_FOR_CAMERAS_S", 0.3)
        for camera, seed in ((first, 1), (second, 2)):
            camera.capture_random({"CR2": 3_000}, seed=seed)
            camera.shoot()
        one = tether()
        one.delivered(2)
        one.wait(lambda: one.conditions() == ["ready", "ready"])
        assert {state.name for state in one.source.states()} == {"Loop EOS Loopback AAA1", "Loop EOS Loopback BBB2"}
        second.unplug()
        ports.discard(second.port)
        one.wait(lambda: sorted(one.conditions()) == ["absent", "ready"])
        assert {s.status for s in one.source.states() if s.condition == "absent"} == {"away"}
        with pytest.raises(CameraError):
            one.source.call("get", 5.0, "BBB2", names=["iso"])
        # The same body at another port, with the same card.
        with LoopbackCamera("generic", "BBB2") as moved:
            moved.capture_random({"CR2": 3_000}, seed=2)
            moved.shoot(mtime_s=int(second.files()[0].mtime_s))
            ports.add(moved.port)
            one.wait(lambda: one.conditions() == ["ready", "ready"])
            assert moved.status.downloads == 0
            moved.shoot()
            one.delivered(3)


def test_no_camera_is_said_and_costs_nothing(tether, monkeypatch):
    """The thread sleeps; it does not ask libusb, which leaks where there is no USB."""
    monkeypatch.setattr(camera_module, "ports_at", lambda *_: set())
    one = tether()
    one.wait(lambda: "absent" in one.conditions())
    assert one.workers() == []
    thread = next(t for t in threading.enumerate() if t.name == "tether auto")
    before = Path(f"/proc/self/task/{thread.native_id}/stat").read_text().split()[13:15]
    time.sleep(2.0)
    after = Path(f"/proc/self/task/{thread.native_id}/stat").read_text().split()[13:15]
    assert sum(map(int, after)) - sum(map(int, before)) <= 1


def test_what_is_thought_of_a_shot_goes_with_it(loopback, tether):
    """The user says that all are darks; the body's serial number names it where the file does not."""
    one = tether(loopback.port, kind=ShotKind.DARK).ready()
    loopback.shoot()
    one.delivered(1)
    assert one.shots[0].kind is ShotKind.DARK
    assert one.shots[0].camera == "LB0001"


def test_a_worker_does_not_outlive_its_daemon(loopback, tmp_path):
    """However that ends: the camera would stay claimed."""
    code = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from hotpixd.intake.camera import CameraSettings, CameraSource\n"
        "source = CameraSource(CameraSettings(port=sys.argv[1]), Path(sys.argv[2]), {}, lambda: None)\n"
        "source.start()\n"
        "while not source.cameras(): time.sleep(0.05)\n"
        "print(source._bodies[0].link.pid, flush=True)\n"
        "time.sleep(60)\n"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", code, loopback.port, str(tmp_path / "incoming")],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": CODE},
    )
    assert parent.stdout is not None
    worker = Path(f"/proc/{int(parent.stdout.readline())}")
    assert worker.exists()
    parent.kill()
    parent.wait()
    eventually(lambda: not worker.exists(), "the worker has ended", 10.0)
    eventually(lambda: not loopback.status.connected, "the camera is free")


def test_a_full_disk_is_told_and_the_shots_stay_on_the_card(loopback, tmp_path, tether, monkeypatch):
    """Nothing is lost: they come when there is room."""
    if os.geteuid() != 0:
        pytest.skip("only root may mount")
    monkeypatch.setattr(camera_module, "_AGAIN_S", 0.5)
    small = tmp_path / "incoming-0"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=100k", "tmpfs", small], check=True)
    try:
        (small / "filler").write_bytes(bytes(80_000))
        one = tether(loopback.port).ready()
        loopback.shoot()
        one.wait(lambda: one.source.states()[0].status == "trouble")
        assert "space" in one.source.states()[0].detail
        (small / "filler").unlink()
        one.delivered(2)
        one.wait(lambda: one.source.states()[0].status == "watching")
        assert set(one.arrived) == digests(loopback)
    finally:
        one.close()
        subprocess.run(["umount", "-l", small], check=True)
