"""A directory or card as a source of shots: on real file systems, with real mounts, writers and events."""

from __future__ import annotations

import errno
import hashlib
import os
import random
import shutil
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from conftest import environment, nobody
from hotpixd.core.frame import ShotKind
from hotpixd.intake import directory, source, volumes, walk
from hotpixd.intake.complete import look_at
from hotpixd.intake.directory import DirectorySettings, DirectorySource
from hotpixd.intake.files import FoundShot

NEVER_S = 60.0
"""A settling time that no test waits for: what is delivered, was delivered because of an event."""

SOON_S = 10.0
"""Enough on a busy machine for what takes milliseconds."""

KEY = "ab" * 32
"""Of whatever is read: no source looks at it."""

QUEUE_SIZE = Path("/proc/sys/fs/inotify/max_queued_events")


def content(number: int, size: int = 3000) -> bytes:
    """Return the bytes of a JPEG, as far as its marks are concerned; a different one for each number."""
    return b"\xff\xd8\xff\xda\x00\x02" + random.Random(number).randbytes(size).replace(b"\xff", b"\x00") + b"\xff\xd9"


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@dataclass
class Delivery:
    """A shot that was taken, with what was in its file then."""

    shot: FoundShot
    digest: str
    signature: bytes | None

    @property
    def name(self) -> str:
        return self.shot.path.name


class Service:
    """Does with a source what the daemon does, in the test's thread."""

    def __init__(self, folder: Path, **settings: object) -> None:
        self.settings = replace(DirectorySettings(folder, settle_s=NEVER_S), **settings)
        self.folder = folder
        self.seen: set[bytes] = set()
        self.deliveries: list[Delivery] = []
        self._woken = threading.Event()
        self.source = DirectorySource(self.settings, self.seen, self._woken.set)
        self.source.start()

    def restart(self) -> None:
        """Stop, and start again with what was remembered."""
        self.source.stop()
        self.source = DirectorySource(self.settings, self.seen, self._woken.set)
        self.source.start()

    def watching(self) -> Service:
        """Wait for the first listing."""
        self.wait(lambda: self.source.state().status == "watching")
        return self

    def wait_for_mounts(self, number: int) -> None:
        """Wait until the events of that many mounts below the directory are heard."""

        def armed() -> bool:
            place = self.source._armed_for
            return place is not None and len(place.mounts) == number + 1

        self.wait(armed)

    def wait(self, true: Callable[[], object], timeout_s: float = SOON_S) -> None:
        """Wait for something that the source does by itself."""
        end = time.monotonic() + timeout_s
        while not true():
            assert time.monotonic() < end, f"waited in vain; {self.source.state()}"
            self._woken.wait(0.05)
            self._woken.clear()

    def next(self, timeout_s: float = SOON_S) -> FoundShot:
        """Wait for a shot and take it."""
        taken: list[FoundShot] = []

        def took() -> bool:
            shot = self.source.take()
            if shot is not None:
                taken.append(shot)
            return shot is not None

        self.wait(took, timeout_s)
        return taken[0]

    def read(self, shot: FoundShot) -> bool:
        """Read a shot as the spool does, and report what became of it."""
        try:
            with shot.path.open("rb") as file:
                data = file.read()
                shot.was_read(os.fstat(file.fileno()), KEY)
        except OSError:
            self.source.retry(shot.path)
            return False
        seen = self.source.done(shot.path)
        signature = None if seen is None else seen.file
        if signature is not None:
            self.seen.add(signature)
        self.deliveries.append(Delivery(shot, digest(data), signature))
        return True

    def deliver(self, count: int = 1, timeout_s: float = SOON_S) -> list[Delivery]:
        """Take and read that many shots."""
        before = len(self.deliveries)
        while len(self.deliveries) < before + count:
            self.read(self.next(timeout_s))
        return self.deliveries[before:]

    def names(self, count: int) -> list[str]:
        return [delivery.name for delivery in self.deliver(count)]

    def delivers_nothing_for(self, duration_s: float) -> bool:
        end = time.monotonic() + duration_s
        while time.monotonic() < end:
            if self.source.take() is not None:
                return False
            time.sleep(0.02)
        return True


@pytest.fixture(autouse=True)
def brisk(monkeypatch) -> None:
    """Look at local folders more often, so that the tests do not take minutes."""
    monkeypatch.setattr(directory, "_LOCAL_EVERY_S", 0.2)


@pytest.fixture
def serve() -> Iterator[Callable[..., Service]]:
    """Watch directories; none is watched any more when the test ends."""
    services: list[Service] = []

    def start(folder: Path, **settings: object) -> Service:
        services.append(Service(folder, **settings))
        return services[-1]

    yield start
    for service in services:
        service.source.stop()


def put(folder: Path, *names: str) -> list[Path]:
    """Write small pictures, each unlike the others."""
    paths = [folder / name for name in names]
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content(zlib.crc32(os.fsencode(path))))
    return paths


# --- what is delivered, and in which order


def test_a_backlog_comes_folder_by_folder_in_the_order_of_its_numbers(tmp_path, serve):
    """The counter went over from 9999 to 0001 in the next folder; IMG_9 was taken before IMG_10."""
    wanted = [
        "99X/IMG_9.JPG",
        "99X/IMG_10.JPG",
        "100CANON/IMG_9998.JPG",
        "100CANON/IMG_9999.JPG",
        "101CANON/IMG_0001.JPG",
    ]
    put(tmp_path, *reversed(wanted))
    service = serve(tmp_path, settle_s=0.2)
    assert [str(one.shot.path.relative_to(tmp_path)) for one in service.deliver(5)] == wanted


def test_only_pictures_are_delivered(tmp_path, serve):
    """Not hidden files, those of Finder, half copied, empty or linked ones, nor what else lies on a card."""
    (wanted,) = put(tmp_path, "DCIM/IMG_1.JPG")
    put(
        tmp_path,
        "._IMG_1.JPG",
        ".Trashes/IMG_2.JPG",
        "IMG_3.JPG.part",
        "a.tmp",
        "b.crdownload",
        "IMG_4.JPG~",
        "MVI.MOV",
    )
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "link.jpg").symlink_to(wanted)
    (tmp_path / "loop.jpg").symlink_to(tmp_path / "loop.jpg")
    (tmp_path / "up").symlink_to(tmp_path)
    (tmp_path / "folder.jpg").mkdir()
    os.mkfifo(tmp_path / "pipe.jpg")
    service = serve(tmp_path, settle_s=0.2)
    assert service.names(1) == ["IMG_1.JPG"]
    assert service.delivers_nothing_for(0.6)


def test_what_is_to_be_ignored_is_never_looked_at(tmp_path, serve, monkeypatch):
    """Files and folders of such names, whether a listing or an event finds them; the folder above may be called so."""
    root = tmp_path / "thumbnails"
    put(root, "a.jpg", "Thumbnails/a.jpg", "night/keogram.jpg", "night/x/thumbnails/b.jpg")
    service = serve(root, settle_s=0.1, ignore=("thumbnails", "Keogram*"))
    assert service.names(1) == ["a.jpg"]
    assert {Path(folder).name for folder in service.source._snapshot.folders} == {"thumbnails", "night", "x"}
    looked = []
    monkeypatch.setattr(directory, "look_at", lambda path, **more: looked.append(path.name) or look_at(path, **more))
    put(root, "night/keogram2.jpg", "night/x/thumbnails/c.jpg", "b.jpg")
    assert service.names(1) == ["b.jpg"]
    (root / "night/x/thumbnails/c.jpg").rename(root / "night/c.jpg")
    assert service.names(1) == ["c.jpg"]
    assert service.delivers_nothing_for(0.6)
    assert set(looked) <= {"b.jpg", "c.jpg"}
    assert service.source.state().detail == "3 files, 0 waiting"


def test_what_the_user_says_of_a_directory_goes_with_each_shot(tmp_path, serve):
    """Darks in one directory, another body in the next."""
    put(tmp_path, "a.fits")
    shot = serve(tmp_path, settle_s=0.1, kind=ShotKind.DARK, camera="attic").next()
    assert shot == FoundShot(tmp_path / "a.fits", None, ShotKind.DARK, "attic", str(tmp_path), below=tmp_path)


def test_names_that_are_not_text_are_delivered(tmp_path, serve):
    """A name may hold any bytes but two."""
    names = [os.fsdecode(b"latin\xff.jpg"), "new\nline.jpg", "größe ☃.jpg"]
    put(tmp_path, *names)
    service = serve(tmp_path, settle_s=0.1)
    assert sorted(service.names(3)) == sorted(names)
    assert len(service.seen) == 3
    put(tmp_path, os.fsdecode(b"late\xff.jpg"))
    assert service.names(1) == [os.fsdecode(b"late\xff.jpg")]


def test_a_directory_may_be_a_link(tmp_path, serve):
    """Its shots have the names by which it was given, whether a listing or an event found them."""
    real = tmp_path / "real"
    put(real, "a.jpg")
    (tmp_path / "link").symlink_to(real)
    service = serve(tmp_path / "link", settle_s=0.1)
    assert service.deliver()[0].shot.path == tmp_path / "link/a.jpg"
    put(real, "b.jpg")
    assert service.deliver()[0].shot.path == tmp_path / "link/b.jpg"


# --- when a file is finished


def plain(path: Path, data: bytes, outside: Path) -> None:
    path.write_bytes(data)


def renamed(path: Path, data: bytes, outside: Path) -> None:
    part = path.with_name(path.name + ".part")
    part.write_bytes(data)
    part.rename(path)


def moved_in(path: Path, data: bytes, outside: Path) -> None:
    (outside / path.name).write_bytes(data)
    (outside / path.name).rename(path)


def linked(path: Path, data: bytes, outside: Path) -> None:
    (outside / path.name).write_bytes(data)
    os.link(outside / path.name, path)


def in_a_new_tree(path: Path, data: bytes, outside: Path) -> None:
    (outside / path.name).write_bytes(data)
    (path.parent / f"new {path.name}").mkdir()
    shutil.copy(outside / path.name, path.parent / f"new {path.name}")


def in_a_moved_tree(path: Path, data: bytes, outside: Path) -> None:
    folder = outside / f"tree {path.name}"
    folder.mkdir()
    (folder / path.name).write_bytes(data)
    folder.rename(path.parent / folder.name)


def slowly(path: Path, data: bytes, outside: Path) -> None:
    with path.open("wb", buffering=0) as file:
        for start in range(0, len(data), 1000):
            file.write(data[start : start + 1000])
            time.sleep(0.03)


def in_two_rounds(path: Path, data: bytes, outside: Path) -> None:
    path.write_bytes(data[:700])
    time.sleep(0.05)
    with path.open("ab") as file:
        file.write(data[700:])


WAYS = (plain, renamed, moved_in, linked, in_a_new_tree, in_a_moved_tree, slowly, in_two_rounds)


@pytest.mark.parametrize("way", WAYS)
def test_a_file_put_in_place_is_delivered_at_once_and_whole(tmp_path, serve, way):
    """However it gets there: its event is enough, no settling time is waited for."""
    (tmp_path / "card").mkdir()
    service = serve(tmp_path / "card").watching()
    way(tmp_path / "card/IMG_1.JPG", content(1), tmp_path)
    assert service.deliver()[0].digest == digest(content(1))


def test_a_file_just_closed_overtakes_the_next_listing(tmp_path, serve):
    """From closing to taking there is no listing in between: one of a full card takes a while."""
    service = serve(tmp_path, scan_every_s=3600.0).watching()
    put(tmp_path, "a.jpg")
    assert service.names(1) == ["a.jpg"]


def test_a_file_closed_while_the_directory_is_listed_is_not_put_off(tmp_path, serve, monkeypatch):
    """The listing is older than it, and says nothing against it."""
    service = serve(tmp_path, scan_every_s=3600.0).watching()
    real = directory.snapshot_of

    def snapshot_of(*arguments):
        snapshot = real(*arguments)
        put(tmp_path, "a.jpg")
        # Two events: it was made, it was closed.
        end = time.monotonic() + SOON_S
        while len(service.source._told) < 2 and time.monotonic() < end:
            time.sleep(0.01)
        return snapshot

    monkeypatch.setattr(directory, "snapshot_of", snapshot_of)
    service.source.hint()
    assert service.names(1) == ["a.jpg"]


@pytest.mark.parametrize("name", ["a.jpg", "a.cr3"])
def test_without_events_a_file_has_to_settle(tmp_path, serve, name):
    """Listings alone find it; its size and time must not change for the settling time."""
    service = serve(tmp_path, use_events=False, settle_s=0.6).watching()
    path = tmp_path / name
    started = time.monotonic()
    for part in (content(1)[:1000], content(1)[1000:]):
        with path.open("ab") as file:
            file.write(part)
        time.sleep(0.4)
    assert service.deliver()[0].digest == digest(content(1))
    assert time.monotonic() - started > 0.9


@pytest.mark.parametrize("use_events", [True, False])
def test_a_file_open_for_writing_is_left_alone(tmp_path, serve, use_events):
    """Although it is whole, and has not changed for several settling times."""
    service = serve(tmp_path, settle_s=0.1, use_events=use_events, scan_every_s=0.2).watching()
    with (tmp_path / "a.jpg").open("wb", buffering=0) as file:
        file.write(content(1))
        assert service.delivers_nothing_for(0.7)
        file.write(b"more")
    assert service.deliver()[0].digest == digest(content(1) + b"more")


def test_a_writer_that_never_ends_does_not_keep_a_shot_for_ever(tmp_path, serve, monkeypatch):
    """A program that leaks its file would else cost a shot until it exits."""
    monkeypatch.setattr(directory, "_WRITER_GONE_AFTER_S", 0.5)
    service = serve(tmp_path, settle_s=0.1).watching()
    with (tmp_path / "a.jpg").open("wb", buffering=0) as file:
        file.write(content(1))
        assert service.deliver()[0].digest == digest(content(1))


def test_closed_is_not_complete(tmp_path, serve):
    """Some programs close a file and go on writing: a JPEG without its end waits ten times as long as others."""
    service = serve(tmp_path, settle_s=0.3).watching()
    path = tmp_path / "a.jpg"
    path.write_bytes(content(1)[:2000])
    assert service.delivers_nothing_for(0.9)
    with path.open("ab") as file:
        file.write(content(1)[2000:])
    assert service.deliver()[0].digest == digest(content(1))


def test_a_torn_file_is_left_to_the_decoder_in_the_end(tmp_path, serve):
    """It never gets its end: then the decoder says what is wrong with it."""
    service = serve(tmp_path, settle_s=0.05).watching()
    (tmp_path / "a.jpg").write_bytes(content(1)[:2000])
    assert service.deliver()[0].digest == digest(content(1)[:2000])


def test_room_made_for_a_copy_is_not_a_picture(tmp_path, serve):
    """Some programs first make a file of the final size, full of zeros, and close it."""
    service = serve(tmp_path, settle_s=0.3).watching()
    path = tmp_path / "a.jpg"
    path.write_bytes(bytes(len(content(1))))
    assert service.delivers_nothing_for(0.6)
    with path.open("r+b") as file:
        file.write(content(1))
    assert service.deliver()[0].digest == digest(content(1))


def test_a_file_that_was_empty_is_delivered_when_it_is_not(tmp_path, serve):
    """Without events too, where nothing but its size tells."""
    (tmp_path / "a.jpg").touch()
    service = serve(tmp_path, settle_s=0.1, use_events=False).watching()
    assert service.delivers_nothing_for(0.5)
    (tmp_path / "a.jpg").write_bytes(content(1))
    assert service.deliver()[0].digest == digest(content(1))


def test_a_kind_without_an_end_has_to_settle(tmp_path, serve):
    """Nothing in a file of an unknown kind says where it ends, so being closed once proves nothing."""
    service = serve(tmp_path, settle_s=0.5).watching()
    (tmp_path / "a.raf").write_bytes(b"FUJIFILMCCD-RAW " * 10)
    started = time.monotonic()
    service.deliver()
    assert time.monotonic() - started > 0.4


# --- raw and JPEG


@pytest.mark.parametrize("names", [("IMG_1.CR2", "IMG_1.JPG"), ("IMG_1.NEF", "IMG_1.JPG"), ("img_1.dng", "IMG_1.jpeg")])
def test_the_raw_comes_before_its_jpeg_which_names_it(tmp_path, serve, names):
    """In a backlog, whichever name sorts first."""
    raw, jpeg = put(tmp_path, *names)
    service = serve(tmp_path, settle_s=0.2)
    assert [one.shot for one in service.deliver(2)] == [
        FoundShot(raw, source=str(tmp_path), below=tmp_path),
        FoundShot(jpeg, raw, source=str(tmp_path), below=tmp_path),
    ]


def test_a_jpeg_waits_for_a_raw_that_is_still_written(tmp_path, serve):
    """The JPEG is smaller, so it is there first."""
    service = serve(tmp_path, settle_s=0.3).watching()
    with (tmp_path / "IMG_1.NEF").open("wb", buffering=0) as raw:
        raw.write(content(1)[:500])
        put(tmp_path, "IMG_1.JPG")
        assert service.delivers_nothing_for(0.6)
        raw.write(content(1)[500:])
    assert service.names(2) == ["IMG_1.NEF", "IMG_1.JPG"]
    assert service.deliveries[1].shot.raw == tmp_path / "IMG_1.NEF"


def test_where_raws_are_about_a_jpeg_waits_for_its_mate_to_appear(tmp_path, serve):
    """The camera writes the JPEG first; no settling time is involved."""
    put(tmp_path, "IMG_1.NEF")
    service = serve(tmp_path, settle_s=0.1)
    service.deliver()
    put(tmp_path, "IMG_2.JPG")
    assert service.delivers_nothing_for(0.8)
    put(tmp_path, "IMG_2.NEF")
    assert service.names(2) == ["IMG_2.NEF", "IMG_2.JPG"]


@pytest.mark.parametrize("use_events", [True, False])
def test_the_jpeg_of_the_very_first_pair_waits_for_its_raw(tmp_path, serve, use_events):
    """A plain copy has it first, where NEF, ORF, RAF and RW2 sort after JPG."""
    service = serve(tmp_path, settle_s=0.1, scan_every_s=0.2, use_events=use_events).watching()
    put(tmp_path, "IMG_1.JPG")
    assert service.delivers_nothing_for(0.7)
    put(tmp_path, "IMG_1.NEF")
    assert service.names(2) == ["IMG_1.NEF", "IMG_1.JPG"]


def test_only_the_first_jpegs_of_a_shoot_without_raws_wait_and_briefly(tmp_path, serve):
    """Those that were there at first do not; from the fourth on none does."""
    put(tmp_path, "IMG_0.JPG")
    service = serve(tmp_path, settle_s=0.1)
    service.names(1)
    took = []
    for number in range(1, 6):
        began = time.monotonic()
        put(tmp_path, f"IMG_{number}.JPG")
        service.names(1)
        took.append(time.monotonic() - began)
    assert all(1.5 < s < 4 for s in took[:2])
    assert all(s < 1 for s in took[2:])


def test_a_jpeg_does_not_wait_for_ever(tmp_path, serve, monkeypatch):
    """Nor for a raw that never comes, nor for one that is there and never gets ready."""
    monkeypatch.setattr(directory, "_MATE_WITHIN_S", 0.5)
    put(tmp_path, "IMG_1.NEF", "IMG_2.JPG", "IMG_3.JPG")
    (tmp_path / "IMG_3.NEF").touch()
    service = serve(tmp_path, settle_s=0.1)
    assert service.names(1) == ["IMG_1.NEF"]
    assert sorted(service.names(2)) == ["IMG_2.JPG", "IMG_3.JPG"]


def test_a_raw_that_cannot_be_read_does_not_hold_its_jpeg(tmp_path, serve):
    """It was offered, and is tried again: its JPEG may be all there is."""
    put(tmp_path, "IMG_1.NEF", "IMG_1.JPG")
    service = serve(tmp_path, settle_s=0.1)
    raw = service.next()
    service.source.retry(raw.path)
    assert service.names(1) == ["IMG_1.JPG"]
    assert service.names(1) == ["IMG_1.NEF"]


# --- what the service reports


def test_nothing_is_offered_twice(tmp_path, serve):
    """Neither while it is taken nor when it is done, however often the directory is listed."""
    put(tmp_path, "a.jpg", "b.jpg")
    service = serve(tmp_path, settle_s=0.1, scan_every_s=0.1)
    taken = service.next()
    assert service.names(1) == ["b.jpg"]
    assert service.delivers_nothing_for(0.5)
    service.read(taken)
    assert service.delivers_nothing_for(0.5)
    state = service.source.state()
    assert (state.files, state.waiting) == (2, 0)


def test_what_was_not_done_is_offered_again(tmp_path, serve):
    """The service lost its folding engine; what it had done stays done."""
    put(tmp_path, "a.jpg", "b.jpg", "c.jpg")
    service = serve(tmp_path, settle_s=0.1)
    service.deliver()
    assert [service.next().path.name for _ in range(2)] == ["b.jpg", "c.jpg"]
    service.source.forget_taken()
    assert service.source.done(tmp_path / "b.jpg") is None
    assert service.names(2) == ["b.jpg", "c.jpg"]


def test_a_shot_that_cannot_be_read_is_offered_later(tmp_path, serve, monkeypatch):
    """Not at once: a disk in trouble needs time. Others are not held up."""
    monkeypatch.setattr(directory, "_RETRY_AFTER_S", 0.1)
    put(tmp_path, "a.jpg", "b.jpg")
    service = serve(tmp_path, settle_s=0.1)
    started = time.monotonic()
    for _ in range(2):
        shot = service.next()
        assert shot.path.name == "a.jpg"
        service.source.retry(shot.path)
        if len(service.deliveries) == 0:
            assert service.names(1) == ["b.jpg"]
    assert service.names(1) == ["a.jpg"]
    assert time.monotonic() - started > 0.5


def test_after_a_restart_only_what_is_new_is_read(tmp_path, serve):
    """Of a card with thousands of files, each known by volume, path, size and time."""
    old = put(tmp_path, *(f"{number}.jpg" for number in range(20)))
    service = serve(tmp_path, settle_s=0.1)
    service.deliver(20)
    assert len(service.seen) == 20
    assert all(len(signature) == 16 for signature in service.seen)
    put(tmp_path, "new.jpg")
    service.deliver()
    service.source.stop()
    old[3].write_bytes(content(33))
    service.restart()
    assert service.names(1) == ["3.jpg"]
    assert service.delivers_nothing_for(0.5)


def test_a_file_written_again_under_its_name_is_another_shot(tmp_path, serve):
    """Cameras start again at IMG_0001; even one of the same size is noticed by its time."""
    put(tmp_path, "a.jpg")
    service = serve(tmp_path, settle_s=0.1)
    service.deliver()
    (tmp_path / "a.jpg").write_bytes(content(2))
    assert service.deliver()[0].digest == digest(content(2))
    assert len(service.seen) == 2


def test_a_file_that_changed_while_it_was_taken_is_offered_once_more(tmp_path, serve):
    """Nobody knows which of the two was read: it is not remembered, and the new one is not offered meanwhile."""
    put(tmp_path, "a.jpg")
    service = serve(tmp_path, settle_s=0.1)
    shot = service.next()
    shot.path.write_bytes(content(2))
    assert service.delivers_nothing_for(0.5)
    shot.was_read(shot.path.stat(), KEY)
    assert service.source.done(shot.path) is None
    assert service.deliver()[0].digest == digest(content(2))
    assert service.delivers_nothing_for(0.5)


def test_a_file_that_is_done_may_be_renamed(tmp_path, serve):
    """It is not read again; another one that takes its old name is."""
    put(tmp_path, "a.jpg", "folder/b.jpg")
    service = serve(tmp_path, settle_s=0.1)
    service.deliver(2)
    (tmp_path / "a.jpg").rename(tmp_path / "c.jpg")
    (tmp_path / "folder").rename(tmp_path / "renamed")
    assert service.delivers_nothing_for(0.8)
    put(tmp_path, "a.jpg")
    assert service.names(1) == ["a.jpg"]


def test_files_that_vanish_drop_out(tmp_path, serve):
    """Deleted in the camera before or after they were taken; what is remembered stays, and nothing fails."""
    put(tmp_path, "a.jpg", "b.jpg", "c.jpg")
    service = serve(tmp_path, settle_s=0.1)
    service.deliver()
    shot = service.next()
    for path in tmp_path.iterdir():
        path.unlink()
    assert not service.read(shot)
    service.wait(lambda: service.source.state().files == 0)
    assert service.delivers_nothing_for(0.7)
    assert len(service.seen) == 1


def test_the_card_is_left_as_it_was(tmp_path, serve):
    """Nothing is written on it, and nothing of it stays open."""
    put(tmp_path, "DCIM/a.jpg", "DCIM/a.nef")

    def told() -> list[tuple[str, int, int, int]]:
        paths = sorted([tmp_path, *tmp_path.rglob("*")])
        return [(str(path), (s := path.stat()).st_mtime_ns, s.st_ctime_ns, s.st_size) for path in paths]

    before = told()
    service = serve(tmp_path, settle_s=0.1)
    service.deliver(2)
    assert told() == before
    open_files = {os.path.realpath(entry.path) for entry in os.scandir("/proc/self/fd")}
    assert not any(name.startswith(str(tmp_path)) for name in open_files)


# --- what the source says of itself


def test_its_state_says_what_a_human_wants_to_know(tmp_path, serve):
    """How many files there are, and how many are not in the ledger yet."""
    put(tmp_path, "a.jpg", "b.jpg")
    service = serve(tmp_path)
    assert service.source.state().status in ("starting", "watching")
    state = service.watching().source.state()
    assert state.name == str(tmp_path)
    assert state.detail == "2 files, 2 waiting"
    assert (state.files, state.waiting) == (2, 2)
    assert abs(time.time() - state.since) < 100


def test_a_hint_has_the_directory_listed(tmp_path, serve):
    """Somebody who knows better need not wait for the next listing."""
    service = serve(tmp_path, use_events=False, scan_every_s=3600.0, settle_s=0.1).watching()
    put(tmp_path, "a.jpg")
    assert service.delivers_nothing_for(0.5)
    service.source.hint()
    assert service.names(1) == ["a.jpg"]


def test_a_missing_directory_is_waited_for(tmp_path, serve):
    """Before it is there, and after it went; another one in its place is another one."""
    folder = tmp_path / "card"
    service = serve(folder, settle_s=0.1)
    service.wait(lambda: service.source.state().status == "away")
    assert service.source.state().detail == "the directory is missing"
    put(folder, "a.jpg")
    assert service.names(1) == ["a.jpg"]
    folder.rename(tmp_path / "old")
    service.wait(lambda: service.source.state().status == "away")
    put(folder, "b.jpg")
    assert service.names(1) == ["b.jpg"]
    put(folder, "c.jpg")
    assert service.names(1) == ["c.jpg"]


def test_a_directory_replaced_in_one_step_is_watched_again(tmp_path, serve):
    """Observers go on watching the old one and say nothing."""
    folder, other = tmp_path / "card", tmp_path / "other"
    put(folder, "a.jpg")
    put(other, "b.jpg")
    service = serve(folder, settle_s=0.1)
    service.deliver()
    subprocess.run(["mv", "--exchange", "-T", other, folder], capture_output=True)
    if not (folder / "b.jpg").exists():
        folder.rename(tmp_path / "old")
        other.rename(folder)
    assert service.names(1) == ["b.jpg"]
    assert service.source._hints.alive


def test_a_card_that_answers_with_errors_proves_nothing(tmp_path, serve, monkeypatch):
    """A listing that fails half way is none: nothing is dropped, offered or done, and then it goes on as before."""
    put(tmp_path, "a/1.jpg", "b/2.jpg", "b/3.jpg")
    service = serve(tmp_path, settle_s=0.3, scan_every_s=0.1)
    service.deliver()
    pulled = threading.Event()
    scandir = os.scandir

    def failing(folder: object) -> object:
        if pulled.is_set() and str(folder).endswith("/b"):
            raise OSError(errno.EIO, "Input/output error")
        return scandir(folder)

    monkeypatch.setattr(walk.os, "scandir", failing)
    pulled.set()
    service.wait(lambda: service.source.state().status == "trouble")
    state = service.source.state()
    assert state.detail == "the directory cannot be listed: Input/output error"
    assert (state.files, state.waiting) == (3, 2)
    assert service.delivers_nothing_for(0.5)
    pulled.clear()
    assert service.names(2) == ["2.jpg", "3.jpg"]
    assert service.delivers_nothing_for(0.5)
    assert service.source.state().status == "watching"


def test_an_error_that_nobody_thought_of_is_not_lost_with_its_thread(tmp_path, serve, monkeypatch):
    """A source that is dead without a word would be taken for a quiet one."""
    service = serve(tmp_path).watching()
    monkeypatch.setattr(directory, "snapshot_of", lambda *_: 1 / 0)
    service.source.hint()
    with pytest.raises(ZeroDivisionError):
        service.wait(service.source.take)


def test_nothing_is_left_behind(tmp_path):
    """Stopping ends all threads and closes all descriptors, and takes no time."""
    warm = Service(tmp_path).watching()
    warm.source.stop()
    threads, descriptors = threading.active_count(), len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(3):
        service = Service(tmp_path, settle_s=0.1).watching()
        put(tmp_path, "a.jpg")
        service.deliver()
        started = time.monotonic()
        service.source.stop()
        assert time.monotonic() - started < 3
    assert (threading.active_count(), len(list(Path("/proc/self/fd").iterdir()))) == (threads, descriptors)


def test_what_is_closed_to_us_is_told_and_holds_up_nothing_else(serve):
    """lost+found is on every disk; and a file of somebody else may become readable later."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        put(folder, "a.jpg", "b.jpg", "lost+found/c.jpg")
        folder.chmod(0o755)
        (folder / "lost+found").chmod(0)
        (folder / "a.jpg").chmod(0)
        with nobody():
            service = serve(folder, settle_s=0.2)
            assert service.names(1) == ["b.jpg"]
            wanted = "2 files, 1 waiting, some cannot be opened: Permission denied, 1 folder closed to us"
            service.wait(lambda: service.source.state().detail == wanted)
        (folder / "a.jpg").chmod(0o644)
        with nobody():
            assert service.names(1) == ["a.jpg"]
            service.source.stop()


# --- events that do not come


def test_lost_events_cost_only_time(tmp_path, serve, monkeypatch):
    """The kernel's queue overflows, or watchdog goes blind: the times of the folders tell, and it is armed anew."""
    service = serve(tmp_path, settle_s=0.2).watching()
    service.source._hints._observer.unschedule_all()
    blind = service.source._hints._observer
    put(tmp_path, "a.jpg")
    assert service.names(1) == ["a.jpg"]
    service.wait(lambda: service.source._hints._observer is not blind and service.source._hints.alive)


USED_UP = """
    import sys, threading, time
    from pathlib import Path
    from hotpixd.intake.directory import DirectorySettings, DirectorySource

    folder = Path(sys.argv[1])
    source = DirectorySource(DirectorySettings(folder, settle_s=0.1), set(), lambda: None)
    source.start()
    for number in range(2):
        end = time.monotonic() + 10
        while (shot := source.take()) is None and time.monotonic() < end:
            time.sleep(0.02)
        print(shot and shot.path.name)
        (folder / f"sub{number}/late{number}.jpg").write_bytes((folder / "sub9/a.jpg").read_bytes())
    print(source.state().detail)
    source.stop()
"""


@pytest.mark.parametrize("kind", ["watches", "instances"])
def test_without_room_for_watches_it_goes_on_by_listing(tmp_path, kind):
    """Other programs used up what the kernel grants a user: it says so, and misses nothing."""
    put(tmp_path, *(f"sub{number}/.keep" for number in range(9)), "sub9/a.jpg")
    limit = f"/proc/sys/user/max_inotify_{kind}"
    few = {"watches": 4, "instances": 0}[kind]
    command = ["unshare", "--user", "--map-root-user", "sh", "-c", f'echo {few} > {limit} && exec "$@"', "sh"]
    if subprocess.run([*command, "true"], capture_output=True).returncode:
        pytest.skip("needs a user namespace, to have limits of its own")
    done = subprocess.run(
        [*command, sys.executable, "-c", textwrap.dedent(USED_UP), str(tmp_path)],
        capture_output=True,
        text=True,
        env=environment(),
        timeout=60,
    )
    assert not done.stderr
    first, second, detail = done.stdout.splitlines()
    assert (first, second) == ("a.jpg", "late0.jpg")
    assert detail.endswith(f"polling, since fs.inotify.max_user_{kind} is used up")


def test_a_network_volume_is_polled_and_settles_longer(tmp_path, serve, monkeypatch):
    """Files of another computer come without events, and nobody can tell whether it still writes."""
    kind = walk.place_of(tmp_path).mounts[0].kind
    monkeypatch.setattr(volumes, "_NETWORK", frozenset((kind,)))
    monkeypatch.setattr(directory, "_NETWORK_EVERY_S", 0.2)
    monkeypatch.setattr(directory, "_NETWORK_SETTLE_S", 0.8)
    service = serve(tmp_path, settle_s=0.1).watching()
    assert not service.source._hints.armed
    put(tmp_path, "a.jpg")
    started = time.monotonic()
    service.deliver()
    assert time.monotonic() - started > 0.7


# --- cards


@dataclass
class Cards:
    """Folders that are mounted as cards are."""

    root: Path

    def __post_init__(self) -> None:
        self._mounted: list[Path] = []

    def insert(self, card: Path | None, at: Path) -> None:
        """Mount a folder like a card, or a new, empty file system."""
        what = ["-t", "tmpfs", "none"] if card is None else ["--bind", str(card)]
        subprocess.run(["mount", *what, str(at)], check=True, capture_output=True)
        # Else what is mounted below it is mounted below the card's own folder as well.
        subprocess.run(["mount", "--make-private", str(at)], check=True)
        self._mounted.append(at)

    def pull(self, at: Path, *, lazily: bool = False) -> None:
        """Unmount; fails if anything there is open."""
        subprocess.run(["umount", *(["-l"] if lazily else []), str(at)], check=True, capture_output=True)
        self._mounted.remove(at)

    def pull_all(self) -> None:
        for at in reversed(list(self._mounted)):
            self.pull(at, lazily=True)


@pytest.fixture
def cards(tmp_path) -> Iterator[Cards]:
    """Mount things, if we may."""
    found = Cards(tmp_path)
    probe = tmp_path / "probe"
    probe.mkdir()
    try:
        found.insert(None, probe)
        found.pull(probe)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("mounting needs root")
    probe.rmdir()
    yield found
    found.pull_all()


def test_a_card_is_found_when_it_is_mounted_and_lets_itself_be_unmounted(tmp_path, serve, cards):
    """At the watched directory itself, read-only; another one in its place is another one."""
    one, two, at = tmp_path / "one", tmp_path / "two", tmp_path / "at"
    put(one, "DCIM/a.jpg")
    put(two, "DCIM/b.jpg")
    at.mkdir()
    service = serve(at, settle_s=0.2, scan_every_s=3600.0).watching()
    for card, wanted in ((one, "a.jpg"), (two, "b.jpg")):
        cards.insert(card, at)
        subprocess.run(["mount", "-o", "remount,bind,ro", str(at)], check=True)
        assert service.names(1) == [wanted]
        cards.pull(at)
    cards.insert(one, at)
    assert service.delivers_nothing_for(0.6)
    put(one, "DCIM/c.jpg")
    assert service.names(1) == ["c.jpg"]


def test_cards_come_and_go_below_the_watched_directory(tmp_path, serve, cards):
    """As below /media/USER; their files are delivered at once when they are closed, also on the second card."""
    media = tmp_path / "media"
    put(media, "here.jpg")
    service = serve(media).watching()
    for number in range(3):
        at = media / f"CARD {number}"
        at.mkdir()
        cards.insert(None, at)
        service.wait_for_mounts(1)
        put(at, f"DCIM/{number}.jpg")
        assert service.names(1) == [f"{number}.jpg"]
        cards.pull(at)
        at.rmdir()


def test_a_card_put_in_again_is_not_read_again(tmp_path, serve, cards):
    """Its files are known by their volume, wherever they were in between."""
    card, at = tmp_path / "card", tmp_path / "at"
    put(card, "a.jpg")
    at.mkdir()
    cards.insert(card, at)
    service = serve(at, settle_s=0.2)
    service.deliver()
    cards.pull(at)
    put(card, "b.jpg")
    cards.insert(card, at)
    assert service.names(1) == ["b.jpg"]
    assert service.delivers_nothing_for(0.5)


def test_a_card_without_a_name_is_read_anew_each_time(tmp_path, serve, cards, monkeypatch):
    """Two FAT cards may hold files of one name, size and time (in steps of 2 s): they must not pass for each other."""
    kind = walk.place_of(tmp_path).mounts[0].kind
    monkeypatch.setattr(volumes, "_FORGETFUL", frozenset((kind,)))
    monkeypatch.setattr(volumes, "_UUIDS", tmp_path / "no udev")
    at = tmp_path / "at"
    at.mkdir()
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.jpg").write_bytes(content(len(name) + ord(name[0])))
        os.utime(tmp_path / name / "a.jpg", (1e9, 1e9))
    service = serve(at, settle_s=0.2).watching()
    digests = []
    for name in ("one", "two", "one"):
        cards.insert(tmp_path / name, at)
        (delivery,) = service.deliver()
        assert delivery.signature is None
        digests.append(delivery.digest)
        assert service.delivers_nothing_for(0.7)
        cards.pull(at)
        service.wait(lambda: service.source.state().files == 0)
    assert digests == [digest(content(len(name) + ord(name[0]))) for name in ("one", "two", "one")]


def test_another_card_read_in_its_place_does_not_count_for_the_first(tmp_path, serve, cards):
    """Swapped between taking and reading: the first card's shot is still to come when that is back."""
    one, two, at = tmp_path / "one", tmp_path / "two", tmp_path / "at"
    put(one, "a.jpg")
    put(two, "a.jpg")
    at.mkdir()
    cards.insert(one, at)
    service = serve(at, settle_s=0.2)
    shot = service.next()
    cards.pull(at)
    cards.insert(two, at)
    service.read(shot)
    assert service.deliveries[0].signature is None
    assert service.deliver()[0].digest == digest((two / "a.jpg").read_bytes())
    cards.pull(at)
    cards.insert(one, at)
    assert service.deliver()[0].digest == digest((one / "a.jpg").read_bytes())


def test_a_card_pulled_while_it_is_read_loses_nothing(tmp_path, serve, cards):
    """What was taken cannot be read, and is offered again when the card is back."""
    card, at = tmp_path / "card", tmp_path / "at"
    put(card, "a.jpg", "b.jpg")
    at.mkdir()
    cards.insert(card, at)
    service = serve(at, settle_s=0.2)
    shot = service.next()
    cards.pull(at, lazily=True)
    while shot is not None:
        # Those that were ready are offered until the source notices.
        assert not service.read(shot)
        shot = service.source.take()
    assert service.delivers_nothing_for(0.5)
    cards.insert(card, at)
    assert service.names(2) == ["a.jpg", "b.jpg"]


def test_a_mount_over_a_folder_above_is_noticed(tmp_path, serve, cards):
    """Everything below is then hidden; watchdog says nothing of it."""
    folder = tmp_path / "above/watched"
    put(folder, "a.jpg")
    service = serve(folder, settle_s=0.2)
    service.deliver()
    cards.insert(None, tmp_path / "above")
    service.wait(lambda: service.source.state().status == "away")
    put(folder, "b.jpg")
    assert service.names(1) == ["b.jpg"]
    cards.pull(tmp_path / "above")
    service.wait(lambda: service.source.state().files == 1)


@pytest.fixture
def small_queue() -> Iterator[None]:
    """Let the kernel keep 64 events and lose the others."""
    before = QUEUE_SIZE.read_text()
    try:
        QUEUE_SIZE.write_text("64")
    except OSError:
        pytest.skip("changing the size of the event queue needs root")
    yield
    QUEUE_SIZE.write_text(before)


@pytest.mark.filterwarnings("ignore:Callback with id:RuntimeWarning")
def test_no_shot_is_lost_and_none_is_torn_whatever_happens(tmp_path, serve, cards, small_queue, monkeypatch):
    """200 shots written in all ways at once, in bursts, while cards are swapped at the mount point and below it.

    Of each content a whole file is delivered, once for each place where it is, and nothing else ever.
    """
    monkeypatch.setattr(directory, "_MATE_WITHIN_S", 1.0)
    chance = random.Random(7)
    one, two, inner, at = (tmp_path / name for name in ("one", "two", "inner", "at"))
    outside = tmp_path / "outside"
    for folder in (one / "slot", two / "slot", inner, at, outside):
        folder.mkdir(parents=True)
    service = serve(at, settle_s=0.3)
    wanted: dict[str, Path] = {}

    def write(card: Path, numbers: list[int]) -> None:
        own = random.Random(numbers[0])
        for number in numbers:
            folder = card / f"DCIM/{100 + number // 40}CANON"
            folder.mkdir(parents=True, exist_ok=True)
            way = own.choice(WAYS)
            endings = own.choice((("JPG",), ("CR2",), ("NEF", "JPG")))
            for ending in endings:
                data = content(number * 2 + (ending == "JPG"), own.randrange(500, 20_000))
                path = folder / f"IMG_{number:04}.{ending}"
                wanted[digest(data)] = path
                way(path, data, outside)
            if own.random() < 0.1:
                (folder / f"._IMG_{number:04}.JPG").write_bytes(b"AppleDouble")
            if own.random() < 0.3:
                time.sleep(own.uniform(0, 0.1))

    writers = [
        threading.Thread(target=write, args=(card, list(range(start, start + 50))))
        for start, card in ((0, one), (50, one), (100, two), (150, inner))
    ]

    def serve_for(duration_s: float) -> None:
        end = time.monotonic() + duration_s
        while time.monotonic() < end:
            shot = service.source.take()
            if shot is None:
                time.sleep(0.01)
            else:
                service.read(shot)

    def swap() -> None:
        cards.pull_all()
        serve_for(chance.uniform(0, 0.3))
        cards.insert(chance.choice((one, two)), at)
        if chance.random() < 0.5:
            cards.insert(inner, at / "slot")

    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        swap()
        serve_for(chance.uniform(0.2, 1.0))
    for card in (one, two):
        cards.pull_all()
        cards.insert(card, at)
        cards.insert(inner, at / "slot")
        service.wait_for_mounts(1)
        # A burst much larger than the queue, while the hints are being heard.
        for number in range(300):
            data = content(10_000 + number + (card == one) * 1000, 200)
            path = card / f"DCIM/199BURST/B{number}.JPG"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
            wanted[digest(data)] = path
        end = time.monotonic() + 30
        here = {key for key, path in wanted.items() if card in path.parents or inner in path.parents}
        while time.monotonic() < end and not here <= {delivery.digest for delivery in service.deliveries}:
            serve_for(0.2)

    # Both at once: nothing of the source keeps a card from being unmounted.
    cards.pull(at / "slot")
    cards.pull(at)
    delivered = [delivery.digest for delivery in service.deliveries]
    assert [str(path) for key, path in wanted.items() if key not in delivered] == []
    assert set(delivered) <= set(wanted)
    remembered = [delivery.signature for delivery in service.deliveries if delivery.signature is not None]
    assert len(remembered) == len(set(remembered)) >= len(wanted)
    # Each once, but for those whose card was swapped between their reading and their report.
    assert len(delivered) - len(remembered) < 50


def test_a_directory_that_does_not_answer_is_said_to_hang(tmp_path, serve, monkeypatch):
    """A dead network drive holds the listing up for ever: its thread cannot say so, and is not asked."""
    put(tmp_path, "a.jpg")
    service = serve(tmp_path, settle_s=0.1, scan_every_s=0.1)
    service.deliver()
    hung, answers, real = threading.Event(), threading.Event(), directory.snapshot_of

    def snapshot_of(*arguments):
        hung.set()
        answers.wait(30)
        return real(*arguments)

    monkeypatch.setattr(source, "HANGS_AFTER_S", 0.3)
    monkeypatch.setattr(directory, "snapshot_of", snapshot_of)
    assert hung.wait(10)
    service.wait(lambda: service.source.concerns()[0].status == "trouble")
    assert "has not answered for" in service.source.state().detail
    assert service.source.take() is None
    answers.set()
    service.wait(lambda: service.source.state().status == "watching")
