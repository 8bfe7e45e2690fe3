"""The camera on loopback: a plain python-gphoto2 client sees what it has, and its faults do what they say.

What is asserted of libgphoto2, error codes above all, was seen with python-gphoto2 2.6.4 and its libgphoto2 2.5.34. The
widgets of a name twice, or for nothing, are its own: over PTP/IP it offers the bulb of several makers to each camera.
"""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

pytest.importorskip("gphoto2", reason="python-gphoto2 is not installed")

from daemons import eventually
from plain_client import CameraRefusedError, PlainClient
from ptp_wire import Reply
from ptpip_camera import LoopbackCamera, PersonaName

BIG = 2_500_000
"""Bytes of a file which libgphoto2 reads in three parts."""

UNSPECIFIED = -1
BAD_PARAMETERS = -2
IO = -7
TIMEOUT = -10
CAMERA_BUSY = -110


@pytest.fixture(params=["generic", "nikon"])
def persona(request: pytest.FixtureRequest) -> PersonaName:
    """Each persona."""
    chosen: PersonaName = request.param
    return chosen


@pytest.fixture
def camera(persona: PersonaName) -> Iterator[LoopbackCamera]:
    """A camera that takes RAW and JPEG."""
    with LoopbackCamera(persona) as camera:
        camera.capture_random({"DNG": 50_000, "JPG": 10_000})
        yield camera


@pytest.fixture
def generic() -> Iterator[LoopbackCamera]:
    """The camera without a maker, for what does not depend on it."""
    with LoopbackCamera() as camera:
        camera.capture_random({"DNG": 5_000, "JPG": 1_000})
        yield camera


@pytest.fixture
def nikon() -> Iterator[LoopbackCamera]:
    """The camera that has a bulb."""
    with LoopbackCamera("nikon") as camera:
        camera.capture_random({"NEF": 5_000, "JPG": 1_000})
        yield camera


@pytest.fixture
def client(camera: LoopbackCamera) -> Iterator[PlainClient]:
    """A client that has the camera open."""
    with PlainClient(camera.port) as client:
        yield client


@pytest.fixture
def generic_client(generic: LoopbackCamera) -> Iterator[PlainClient]:
    """A client that has the generic camera open."""
    with PlainClient(generic.port) as client:
        yield client


@pytest.fixture
def nikon_client(nikon: LoopbackCamera) -> Iterator[PlainClient]:
    """A client that has the Nikon open."""
    with PlainClient(nikon.port) as client:
        yield client


@contextmanager
def refused(code: int) -> Iterator[None]:
    """Expect a call to fail with one of libgphoto2's codes."""
    with pytest.raises(CameraRefusedError) as caught:
        yield
    assert caught.value.code == code


def digest(data: bytes) -> str:
    """Return the digest that the camera tells of a file."""
    return hashlib.sha256(data).hexdigest()


def runs(pid: int) -> bool:
    """Tell whether there is a process which has not ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


# Files and events


def test_a_client_finds_what_was_shot_before(camera: LoopbackCamera) -> None:
    """Names, sizes, times and bytes."""
    camera.shoot(mtime_s=1_000_000_000)
    camera.shoot([("DNG", b"x" * BIG)])
    files = camera.files()
    with PlainClient(camera.port) as client:
        assert sorted(client.listing(files[0].folder)) == sorted(file.name for file in files)
        for file in files:
            assert client.size_and_time(file.path) == (file.size, int(file.mtime_s))
            assert digest(client.download(file.path)) == file.sha256
    assert files[0].mtime_s == 1_000_000_000
    assert camera.status.downloads == 3


def test_the_button_is_announced(camera: LoopbackCamera, client: PlainClient) -> None:
    """With the new folder first."""
    shot = camera.shoot()
    events = client.events()
    assert [kind for kind, _ in events] == ["FOLDER_ADDED", "FOLDER_ADDED", "FILE_ADDED", "FILE_ADDED"]
    assert [path for _, path in events[2:]] == [file.path for file in shot]
    assert [digest(client.download(file.path)) for file in shot] == [file.sha256 for file in shot]


def test_events_get_lost_or_come_twice_or_late(generic: LoopbackCamera, generic_client: PlainClient) -> None:
    """As one shot's events do, or all from now on."""
    generic.shoot(drop=1.0)
    assert {kind for kind, _ in generic_client.events()} == {"FOLDER_ADDED"}
    twice = generic.shoot(duplicate=1.0)
    assert generic_client.added(4) == [file.path for file in twice for _ in range(2)]
    began_s = time.monotonic()
    late = generic.shoot(delay_s=0.3)
    assert generic_client.added(2) == [file.path for file in late]
    assert time.monotonic() - began_s >= 0.3
    generic.behave(drop_events=0.5)
    some = [generic.shoot(stem=f"X{number}")[0].path for number in range(30)]
    heard = {path for _, path in generic_client.events()}
    assert 0 < len(heard.intersection(some)) < 30


def test_numbers_begin_again_in_a_new_folder(generic: LoopbackCamera) -> None:
    """After 9999."""
    generic.number_from(9999)
    last, _ = generic.shoot()
    first, _ = generic.shoot()
    assert (last.name[4:], last.folder[-8:-5]) == ("9999.DNG", "100")
    assert (first.name[4:], first.folder[-8:-5]) == ("0001.DNG", "101")
    with PlainClient(generic.port) as client:
        assert digest(client.download(first.path)) == first.sha256


def test_a_name_comes_again_after_its_file_is_deleted(generic: LoopbackCamera, generic_client: PlainClient) -> None:
    """With other bytes, if the camera is of that kind."""
    generic.behave(names_repeat=True)
    first = generic.shoot()
    generic_client.added(2)
    for file in first:
        generic_client.delete(file.path)
    again = generic.shoot()
    assert [file.path for file in again] == [file.path for file in first]
    assert [file.sha256 for file in again] != [file.sha256 for file in first]
    assert generic.status.deleted == 2
    generic.delete(again[0].name)
    assert generic.files() == again[1:]


def test_a_size_is_unknown_at_first(generic: LoopbackCamera, generic_client: PlainClient) -> None:
    """libgphoto2 then gives an empty file, and goes on to do so: it remembers the size."""
    generic.behave(size_unknown_s=0.3)
    file = generic.shoot()[0]
    generic_client.added(2)
    assert generic_client.size_and_time(file.path)[0] == 0
    assert generic_client.download(file.path) == b""
    time.sleep(0.3)
    assert generic_client.download(file.path) == b""
    with PlainClient(generic.port) as fresh:
        assert digest(fresh.download(file.path)) == file.sha256


# Settings


def test_settings_are_read_back(camera: LoopbackCamera, client: PlainClient) -> None:
    """As the camera then has them."""
    assert client.choices("iso") == ["100", "200", "400", "800", "1600", "3200", "6400"]
    assert client.set("iso", "1600") == "1600"
    assert client.set("shutterspeed", "30.0000s") == "30.0000s"
    settings = camera.status.settings
    assert (settings["iso"], settings["exposure"]) == (1600, 300_000)
    camera.turn("iso", 200)
    client.events()
    assert client.get("iso") == "200"
    assert client.get("batterylevel") == "77%"


def test_nikon_has_what_a_dark_session_sets(nikon: LoopbackCamera, nikon_client: PlainClient) -> None:
    """By the names and the choices of libgphoto2."""
    client = nikon_client
    assert client.choices("shutterspeed")[-2:] == ["30.0000s", "Bulb"]
    assert client.choices("expprogram") == ["M", "P", "A", "S"]
    assert client.choices("capturetarget") == ["Internal RAM", "Memory card"]
    assert client.get("capturetarget") == "Memory card"
    assert "NEF (Raw)" in client.choices("imagequality")
    assert client.set("longexpnr", "On") == "On"
    assert client.set("imagequality", "NEF (Raw)") == "NEF (Raw)"
    client.trigger()
    assert [Path(path).suffix for path in client.added(1)] == [".NEF"]
    assert len(nikon.files()) == 1


def test_a_setting_can_be_ignored_or_refused(camera: LoopbackCamera, client: PlainClient) -> None:
    """Ignored, it looks like success until it is read back."""
    camera.behave(settings="ignored")
    assert client.set("iso", "100") == "800"
    camera.behave(settings="refused")
    for refusal in (Reply.ACCESS_DENIED, Reply.GENERAL_ERROR):
        camera.behave(refusal=refusal)
        with refused(BAD_PARAMETERS):
            client.set("iso", "100")
    assert [done.reply for done in camera.operations() if done.name == "SET_PROPERTY"] == [0x2001, 0x200F, 0x2002]
    assert camera.status.settings["iso"] == 800


# Captures


def test_a_capture_takes_its_time(camera: LoopbackCamera, client: PlainClient) -> None:
    """An exposure of 30 s 0.3 s. libgphoto2 waits for a Nikon, and only for it."""
    client.set("shutterspeed", "30.0000s")
    began_s = time.monotonic()
    client.trigger()
    if camera.status.exposing:
        assert camera.files() == []
        with refused(CAMERA_BUSY):
            client.trigger()
    added = client.added(2)
    assert time.monotonic() - began_s >= 0.3
    assert added == [file.path for file in camera.files()]
    assert (camera.status.captures, camera.status.shots) == (1, 1)


def test_noise_reduction_doubles_it(nikon: LoopbackCamera, nikon_client: PlainClient) -> None:
    """For exposures of a second and more."""
    nikon_client.set("shutterspeed", "30.0000s")
    nikon_client.set("longexpnr", "On")
    began_s = time.monotonic()
    nikon_client.trigger()
    assert time.monotonic() - began_s >= 0.6


def test_capture_names_one_of_two_files(camera: LoopbackCamera, client: PlainClient, persona: PersonaName) -> None:
    """The event of the other is lost with the generic camera, and waits with a Nikon."""
    path = client.capture()
    names = {file.path for file in camera.files()}
    assert path in names
    heard = {path for kind, path in client.events() if kind == "FILE_ADDED"}
    assert heard == (names - {path} if persona == "nikon" else set())


def test_a_folder_gives_the_files_of_captures(
    generic: LoopbackCamera, generic_client: PlainClient, tmp_path: Path
) -> None:
    """In the order of their names; those of one stem together."""
    for name in ("shot10.dng", "shot2.jpg", "shot2.dng"):
        (tmp_path / name).write_text(name)
    generic.capture_folder(tmp_path)
    generic_client.trigger()
    generic_client.added(1)
    generic_client.trigger()
    generic_client.added(2)
    files = generic.files()
    assert [generic.read(file.path) for file in files] == [b"shot10.dng", b"shot2.dng", b"shot2.jpg"]
    assert [file.name[4:] for file in files] == ["0001.DNG", "0002.DNG", "0002.JPG"]


def test_a_function_gives_the_files_of_captures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It knows the settings; the test's own modules can be imported by the camera."""
    (tmp_path / "darkroom.py").write_text(
        "def develop(shot, settings):\n"
        '    return [(\'DNG\', f\'{shot} {settings["exposure_s"]} {settings["iso"]} {settings["bulb_s"]}\'.encode())]\n'
    )
    monkeypatch.syspath_prepend(tmp_path)
    with LoopbackCamera("nikon", time_scale=0.001, bulb_scale=100.0) as nikon, PlainClient(nikon.port) as nikon_client:
        nikon.capture_rendered("darkroom:develop")
        nikon_client.set("shutterspeed", "30.0000s")
        nikon_client.trigger()
        nikon_client.added(1)
        nikon_client.set("bulb", 1)
        nikon_client.set("bulb", 0)
        nikon_client.added(1)
        timed, bulb = [nikon.read(file.path).decode().split() for file in nikon.files()]
        assert timed == ["1", "30.0", "800", "None"]
        assert bulb[1] == bulb[3]
        assert float(bulb[3]) == pytest.approx(100 * nikon.status.longest_bulb_s)


def test_a_full_card_takes_no_picture(camera: LoopbackCamera, client: PlainClient) -> None:
    """And says so in the room that is left."""
    assert client.free_kib() > 0
    camera.behave(card_full=True)
    assert client.free_kib() == 0
    with refused(UNSPECIFIED):
        client.trigger()
    assert camera.status.captures == 0


def test_a_busy_camera_refuses_some_operations(camera: LoopbackCamera, client: PlainClient) -> None:
    """So many, then no more."""
    camera.behave(busy_operations=2)
    for _ in range(2):
        with refused(CAMERA_BUSY):
            client.trigger()
    client.trigger()
    assert len(client.added(2)) == 2


def test_ram_is_lost_with_its_client(nikon: LoopbackCamera) -> None:
    """What libgphoto2 does unless told otherwise."""
    with PlainClient(nikon.port, capture_target=None) as client:
        assert client.get("capturetarget") == "Internal RAM"
        client.trigger()
        eventually(nikon.ram_files, "a shot is in RAM")
        assert nikon.files() == []
        client.kill()
    eventually(lambda: not nikon.ram_files(), "the RAM is empty")


# Bulb


def test_a_bulb_opens_and_closes(nikon: LoopbackCamera, nikon_client: PlainClient) -> None:
    """It lasts from one to the other, and then there are files."""
    with refused(UNSPECIFIED):
        nikon_client.set("bulb", 0)
    nikon_client.set("bulb", 1)
    assert nikon.bulb_open
    with refused(CAMERA_BUSY):
        nikon_client.set("bulb", 1)
    time.sleep(0.2)
    nikon_client.set("bulb", 0)
    assert not nikon.bulb_open
    assert nikon.status.bulbs == 1
    assert 0.2 <= nikon.status.longest_bulb_s < 2.0
    assert len(nikon_client.added(2)) == 2


def test_a_killed_client_leaves_the_shutter_open(nikon: LoopbackCamera) -> None:
    """The next one can close it. Some cameras close it themselves."""
    with PlainClient(nikon.port) as client:
        client.set("bulb", 1)
        client.kill()
    eventually(lambda: not nikon.status.connected, "the camera notices")
    assert nikon.bulb_open
    with PlainClient(nikon.port) as client:
        client.set("bulb", 0)
        assert not nikon.bulb_open
        assert len(client.added(2)) == 2
        nikon.behave(bulb_closes_on_disconnect=True)
        client.set("bulb", 1)
        client.kill()
    eventually(lambda: nikon.status.bulbs == 2 and not nikon.bulb_open, "the camera closes its shutter")
    eventually(lambda: len(nikon.files()) == 4, "the files are on the card")


def test_a_dial_can_be_in_the_way_of_a_bulb(nikon: LoopbackCamera, nikon_client: PlainClient) -> None:
    """The settings are ignored, and what follows is a timed exposure: there is no bulb to end."""
    nikon.behave(settings="ignored")
    nikon_client.set("bulb", 1)
    assert nikon.status.bulbs == 0
    with refused(UNSPECIFIED):
        nikon_client.set("bulb", 0)
    assert len(nikon_client.added(2)) == 2


def test_the_generic_camera_has_a_bulb_for_show() -> None:
    """libgphoto2 offers it to each camera on the network."""
    with LoopbackCamera() as camera, PlainClient(camera.port) as client:
        with refused(UNSPECIFIED):
            client.set("bulb", 1)
        assert not camera.bulb_open


# Connections


def test_a_download_is_cut(generic: LoopbackCamera) -> None:
    """Once: the next client gets the file."""
    file = generic.shoot([("DNG", os.urandom(BIG))])[0]
    with PlainClient(generic.port) as client:
        generic.cut_download(BIG // 2)
        with refused(IO):
            client.download(file.path)
        with refused(IO):
            client.free_kib()
    with PlainClient(generic.port) as client:
        assert digest(client.download(file.path)) == file.sha256
    assert generic.status.downloads == 1


def test_a_download_stalls(generic: LoopbackCamera) -> None:
    """libgphoto2 gives up after 2.5 s, and a new client is served."""
    file = generic.shoot([("DNG", os.urandom(BIG))])[0]
    with PlainClient(generic.port) as client:
        generic.stall_download(BIG // 2)
        with refused(TIMEOUT):
            client.download(file.path)
        assert generic.status.connected
    with PlainClient(generic.port) as client:
        assert digest(client.download(file.path)) == file.sha256


def test_a_stalled_download_goes_on(nikon: LoopbackCamera, nikon_client: PlainClient) -> None:
    """If it is resumed in time."""
    file = nikon.shoot([("NEF", os.urandom(BIG))])[0]
    nikon_client.added(1)
    nikon.stall_download(BIG // 2)
    began_s = time.monotonic()
    timer = threading.Timer(0.3, nikon.resume)
    timer.start()
    assert digest(nikon_client.download(file.path)) == file.sha256
    assert time.monotonic() - began_s >= 0.3
    timer.join()


def test_a_camera_that_hangs(nikon: LoopbackCamera, nikon_client: PlainClient) -> None:
    """It does not take the picture later if nobody waits for it any more."""
    nikon.hang()
    threading.Timer(0.3, os.kill, (nikon_client.pid, signal.SIGKILL)).start()
    with pytest.raises(AssertionError, match="ended with -9"):
        nikon_client.trigger()
    eventually(lambda: not nikon.status.connected, "the camera notices")
    nikon.resume()
    with PlainClient(nikon.port) as client:
        assert client.free_kib() > 0
    assert nikon.status.captures == 0


def test_the_plug_is_pulled_and_put_in(generic: LoopbackCamera) -> None:
    """In the middle of a download; shots go on meanwhile."""
    file = generic.shoot([("DNG", os.urandom(BIG))])[0]
    with PlainClient(generic.port) as client:
        generic.unplug(after_bytes=BIG // 2)
        with refused(IO):
            client.download(file.path)
        assert not generic.status.online
    with refused(IO):
        PlainClient(generic.port)
    generic.shoot(stem="OFFLINE")
    generic.plug()
    with PlainClient(generic.port) as client:
        assert "OFFLINE.JPG" in client.listing(file.folder)


def test_it_dies_at_a_capture(generic: LoopbackCamera) -> None:
    """At the second from now, and stays off until it is switched on."""
    generic.behave(die_at_capture=2)
    with PlainClient(generic.port) as client:
        client.trigger()
        client.added(2)
        with refused(IO):
            client.trigger()
    with refused(IO):
        PlainClient(generic.port)
    generic.plug()
    with PlainClient(generic.port) as client:
        client.trigger()
        client.added(2)
    assert len(generic.files()) == 4


def test_it_dies_in_an_exposure(nikon: LoopbackCamera, nikon_client: PlainClient) -> None:
    """Which is lost then; its shutter closes."""
    nikon.behave(die_at_capture=1, die_after_s=0.2)
    nikon_client.set("bulb", 1)
    assert nikon.bulb_open
    eventually(lambda: not nikon.status.online, "the camera dies")
    with refused(IO):
        nikon_client.set("bulb", 0)
    assert not nikon.bulb_open
    assert not nikon.status.exposing
    assert nikon.files() == []


def test_a_second_client_takes_its_place_or_is_refused(generic: LoopbackCamera) -> None:
    """As the camera is."""
    with PlainClient(generic.port) as first, PlainClient(generic.port) as second:
        with refused(IO):
            first.free_kib()
        generic.behave(exclusive=True)
        with refused(UNSPECIFIED):
            PlainClient(generic.port)
        assert second.free_kib() > 0
        second.kill()
        eventually(lambda: not generic.status.connected, "the camera notices")
        with PlainClient(generic.port) as third:
            assert third.free_kib() > 0


# The camera's process


def test_it_does_not_outlive_a_killed_test() -> None:
    """Nobody is left to end it."""
    script = (
        "import os, signal, ptpip_camera\n"
        "camera = ptpip_camera.LoopbackCamera()\n"
        "print(camera.pid, flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=Path(__file__).parent, stdout=subprocess.PIPE, text=True)
    assert done.returncode == -signal.SIGKILL
    eventually(lambda: not runs(int(done.stdout)), "the camera's process has ended")


def test_what_goes_wrong_in_it_fails_the_test(tmp_path: Path) -> None:
    """A capture more than there are shots, say."""
    with pytest.raises(AssertionError, match="has no shot 1"), LoopbackCamera() as camera:
        camera.capture_folder(tmp_path)
        with PlainClient(camera.port) as client:
            client.trigger()
            eventually(lambda: not camera.status.exposing, "the exposure fails")
