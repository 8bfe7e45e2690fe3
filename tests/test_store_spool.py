"""Custody: the bytes of a shot stay what its key says, wherever it came from and whatever happens to it."""

from __future__ import annotations

import errno
import os
import shutil
import socket
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from blake3 import blake3

from hotpixd.store import spool as spool_module
from hotpixd.store.durable import StateFull
from hotpixd.store.spool import Spool, SpoolError

CONTENT = bytes(range(256)) * 4321  # over a megabyte, no multiple of a block


@pytest.fixture
def spool(tmp_path: Path) -> Spool:
    made = Spool(tmp_path / "spool")
    # Of links it is told here, whatever file system the tests run on.
    made._may_clone = False
    return made


@pytest.fixture
def shot(tmp_path: Path) -> Path:
    path = tmp_path / "IMG_1.CR3"
    path.write_bytes(CONTENT)
    return path


def refuse_links(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def link(*args: object, **kwargs: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(spool_module.os, "link", link)


@pytest.mark.parametrize("size", [0, 1, 256 * 1024 - 1, 256 * 1024, 256 * 1024 + 1, len(CONTENT)])
def test_a_key_is_the_blake3_of_the_content(tmp_path: Path, size: int) -> None:
    """hash_file agrees with the batch digest at every size around a block."""
    path = tmp_path / "file"
    path.write_bytes(CONTENT[:size])
    assert Spool.hash_file(path) == blake3(CONTENT[:size]).hexdigest()


def test_a_taken_shot_is_a_hard_link_and_survives_its_original(spool: Spool, shot: Path) -> None:
    """Custody on one file system costs no space, and deleting the original does not end it."""
    key = spool.hash_file(shot)
    taken = spool.take(shot, key)
    assert taken == spool.path(key)
    assert taken.samefile(shot)
    shot.unlink()
    assert taken.read_bytes() == CONTENT
    assert spool.verify(key)


@pytest.mark.parametrize("number", [errno.EXDEV, errno.EPERM, errno.ENOTSUP, errno.EMLINK, errno.ENOENT])
def test_where_a_link_is_impossible_the_shot_is_copied(
    spool: Spool, shot: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """Another file system, FAT, another owner, too many links: a copy of the same content."""
    refuse_links(monkeypatch, number)
    key = spool.hash_file(shot)
    taken = spool.take(shot, key)
    assert not taken.samefile(shot)
    assert taken.read_bytes() == CONTENT
    assert list(spool.keys()) == [key]
    assert [p.name for p in spool.folder.iterdir()] == [key]


def test_a_shot_of_another_file_system_is_copied(spool: Spool) -> None:
    """The real thing: /dev/shm is another file system than the state's."""
    other = Path("/dev/shm")
    if not other.is_dir() or other.stat().st_dev == spool.folder.stat().st_dev:
        pytest.skip("no second file system at /dev/shm")
    source = other / f"hotpixd-test-{os.getpid()}"
    source.write_bytes(CONTENT)
    try:
        key = spool.hash_file(source)
        assert spool.take(source, key).read_bytes() == CONTENT
    finally:
        source.unlink()


def test_a_shot_that_changed_before_its_copy_is_refused(
    spool: Spool, shot: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A copy is hashed on its way; another content than the key's leaves nothing behind."""
    refuse_links(monkeypatch, errno.EXDEV)
    key = spool.hash_file(shot)
    shot.write_bytes(CONTENT[:-1] + b"x")
    with pytest.raises(SpoolError, match=r"IMG_1\.CR3"):
        spool.take(shot, key)
    assert list(spool.folder.iterdir()) == []


def test_a_symlink_is_followed_to_its_file(spool: Spool, shot: Path, tmp_path: Path) -> None:
    """The spool holds the file, not the way to it."""
    way = tmp_path / "way.CR3"
    way.symlink_to(shot)
    taken = spool.take(way, spool.hash_file(way))
    assert not taken.is_symlink()
    assert taken.samefile(shot)


def test_no_symlink_is_followed_below_a_folder(spool: Spool, shot: Path, tmp_path: Path) -> None:
    """Nor a folder that was put in the place of another one after the listing, nor a way out of it."""
    card = tmp_path / "card"
    (card / "DCIM").mkdir(parents=True)
    inside = card / "DCIM" / "IMG_2.CR3"
    inside.write_bytes(CONTENT)
    spool.release(spool.hold(inside, card))
    (card / "way.CR3").symlink_to(shot)
    elsewhere = tmp_path / "elsewhere"
    (card / "DCIM").rename(elsewhere)
    (card / "DCIM").symlink_to(elsewhere)
    assert inside.read_bytes() == CONTENT
    for path in (inside, card / "way.CR3", card / ".." / shot.name, card / "gone.CR3"):
        with pytest.raises(SpoolError, match=path.name):
            spool.hold(path, card)
        with pytest.raises(SpoolError, match=path.name):
            spool.hash_file(path, card)
    assert list(spool.folder.iterdir()) == []


def test_what_is_no_file_is_not_opened_below_a_folder(
    spool: Spool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Opening a FIFO, a socket or a device may do something to it: their sort is asked for before."""
    opened: list[object] = []
    real = os.open

    def noting(path: str, *more: Any, **options: Any) -> int:
        opened.append(path)
        return real(path, *more, **options)

    monkeypatch.setattr(os, "open", noting)
    os.mkfifo(tmp_path / "fifo.CR3")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "socket.CR3"))
        for name in ("fifo.CR3", "socket.CR3"):
            opened.clear()
            with pytest.raises(SpoolError, match=name):
                spool.hold(tmp_path / name, tmp_path)
            assert opened == [tmp_path]


def test_what_is_held_is_not_in_custody_yet(spool: Spool, shot: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A link or a copy: no key tells of it, it is read once, and it can be let go of without a trace."""
    read: list[int] = []
    real = os.preadv

    def noting(fd: int, blocks: Any, at: int) -> int:
        read.append(at)
        return real(fd, blocks, at)

    monkeypatch.setattr(os, "preadv", noting)
    here = spool._device
    for device in (here, here + 1):
        spool._device = device
        for end in (spool.release, spool.keep):
            read.clear()
            held = spool.hold(shot)
            assert held.key == blake3(CONTENT).hexdigest()
            assert list(spool.keys()) == []
            end(held)
            # Each block once, and the end.
            assert len(read) == len(set(read)) == len(CONTENT) // (256 * 1024) + 2
        assert [path.name for path in spool.folder.iterdir()] == [held.key]
        assert spool.verify(held.key)
        assert spool.path(held.key).samefile(shot) == (device == here)
        spool.release(held)
        spool.drop([held.key])


def test_taking_again_changes_nothing(spool: Spool, shot: Path) -> None:
    """A crash between link and ledger makes the same shot come again."""
    key = spool.hash_file(shot)
    spool.take(shot, key)
    assert [spool.take(shot, key) for _ in range(2)] == [spool.path(key)] * 2
    assert shot.stat().st_nlink == 2


def test_a_torn_file_in_custody_is_replaced(spool: Spool, shot: Path) -> None:
    """What a power cut left under the key gives way to the real content, also if of the same size."""
    key = spool.hash_file(shot)
    for torn in (b"", bytes(len(CONTENT))):
        spool.path(key).unlink(missing_ok=True)
        spool.path(key).write_bytes(torn)
        spool.take(shot, key)
        assert spool.verify(key)


def test_a_good_file_in_custody_is_kept(spool: Spool, shot: Path) -> None:
    """A copy that is there already is not made again."""
    key = spool.hash_file(shot)
    spool.path(key).write_bytes(CONTENT)
    there = spool.path(key).stat().st_ino
    spool.take(shot, key)
    assert spool.path(key).stat().st_ino == there


def test_an_edited_original_is_noticed(spool: Spool, shot: Path) -> None:
    """verify tells that a linked original was overwritten in place, or is not there."""
    key = spool.hash_file(shot)
    assert not spool.verify(key)
    spool.take(shot, key)
    with shot.open("r+b") as file:
        file.write(b"edited")
    assert not spool.verify(key)


def overwrite(path: Path, content: bytes) -> None:
    """Write a file again in place, as a program does that keeps one "current picture"."""
    with path.open("wb") as file:
        file.write(content)


def test_a_file_that_is_written_again_in_place_is_copied_from_then_on(spool: Spool, shot: Path, tmp_path: Path) -> None:
    """Found in a trial of all-sky software: every link of its image.jpg had the content of the last one."""
    first, second = spool.hold(shot), CONTENT[::-1]
    assert spool.overwritten(first) == []
    spool.keep(first)
    assert spool.is_as_kept(first.key)
    overwrite(shot, second)
    assert not spool.is_as_kept(first.key)
    held = spool.hold(shot)
    assert spool.overwritten(held) == [first.key]
    spool.drop([first.key])
    spool.keep(held)
    overwrite(shot, CONTENT)
    assert spool.verify(held.key)
    assert spool.is_as_kept(held.key)
    again = spool.hold(shot)
    assert spool.overwritten(again) == []
    assert not spool.keep(again).samefile(shot)
    other = tmp_path / "IMG_2.CR3"
    other.write_bytes(second * 2)
    assert spool.take(other, spool.hash_file(other)).samefile(other)


def test_a_shot_overwritten_before_its_link_is_refused_and_one_only_touched_is_not(spool: Spool, shot: Path) -> None:
    """Unpacking sets a file's time after it was closed: that alone must not cost a shot."""
    held = spool.hold(shot)
    os.utime(shot, (0, 0))
    assert spool.keep(held).samefile(shot)
    assert spool.is_as_kept(held.key)
    spool.drop([held.key])
    held = spool.hold(shot)
    overwrite(shot, CONTENT[::-1])
    with pytest.raises(SpoolError, match="not what it was"):
        spool.keep(held)
    assert list(spool.folder.iterdir()) == []


@contextmanager
def mounted(folder: Path, size_mb: int, *make: str) -> Iterator[Path]:
    """Yield a new file system of its own."""
    if os.geteuid() != 0 or shutil.which(make[0]) is None or not Path("/dev/loop-control").exists():
        pytest.skip(f"{make[0]} and mounting what it makes take root and loop devices")
    image, disk = folder / "disk.img", folder / "disk"
    disk.mkdir()
    with image.open("wb") as file:
        file.truncate(size_mb << 20)
    subprocess.run([*make, str(image)], check=True)
    if subprocess.run(["mount", "-o", "loop", str(image), str(disk)], check=False).returncode:
        pytest.skip(f"this kernel does not mount what {make[0]} makes")
    try:
        yield disk
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize(
    ("size_mb", "make", "clones"),
    [
        (120, ("mkfs.btrfs", "-q", "-f"), True),
        (300, ("mkfs.xfs", "-q", "-f", "-m", "reflink=1"), True),
        (24, ("mkfs.ext4", "-q", "-F"), False),
    ],
)
def test_where_files_can_be_cloned_they_are(tmp_path: Path, size_mb: int, make: tuple[str, ...], clones: bool) -> None:
    """A clone shares its bytes with the original, and keeps them when that is overwritten."""
    with mounted(tmp_path, size_mb, *make) as disk:
        spool, path = Spool(disk / "spool"), disk / "image.jpg"
        content = os.urandom(8 << 20)
        path.write_bytes(content)
        os.sync()
        before = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
        held = spool.hold(path)
        kept = spool.keep(held)
        os.sync()
        assert before - os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize < len(content) // 2
        assert kept.samefile(path) != clones
        assert [file.name for file in spool.folder.iterdir()] == [held.key]
        overwrite(path, content[::-1])
        assert spool.verify(held.key) == clones
        late = spool.hold(path)
        assert (spool.overwritten(late) == []) == clones
        overwrite(path, content)
        with pytest.raises(SpoolError, match="not what it was"):
            spool.keep(late)


def test_nothing_but_a_regular_file_is_taken(spool: Spool, tmp_path: Path) -> None:
    """Folders, missing files and FIFOs are refused in a sentence, and a FIFO does not block."""
    os.mkfifo(tmp_path / "fifo.CR3")
    (tmp_path / "folder.CR3").mkdir()
    for name in ("fifo.CR3", "folder.CR3", "missing.CR3"):
        with pytest.raises(SpoolError, match=name):
            spool.hash_file(tmp_path / name)
        with pytest.raises(SpoolError, match=name):
            spool.take(tmp_path / name, "0" * 64)


def test_a_key_cannot_leave_the_folder(spool: Spool, shot: Path) -> None:
    """Only 64 hex digits are a key."""
    for key in ("../x", "", "A" * 64, "0" * 63, "0" * 64 + "\n"):
        with pytest.raises(ValueError, match="64 hex digits"):
            spool.take(shot, key)


def test_sources_are_opened_for_reading_only(spool: Spool, shot: Path) -> None:
    """A read-only file in a read-only folder can be taken, and keeps its times and its folder."""
    shot.chmod(0o400)
    folder = shot.parent / "card"
    folder.mkdir()
    shot = shot.rename(folder / shot.name)
    folder.chmod(0o500)
    before = folder.stat().st_mtime_ns, shot.stat().st_mtime_ns, [p.name for p in folder.iterdir()]
    spool.take(shot, spool.hash_file(shot))
    assert before == (folder.stat().st_mtime_ns, shot.stat().st_mtime_ns, [p.name for p in folder.iterdir()])
    folder.chmod(0o700)


def test_names_with_any_bytes_can_be_taken(spool: Spool, tmp_path: Path) -> None:
    """A name of newlines and invalid UTF-8 is only a name."""
    shot = tmp_path / os.fsdecode(b"a\n\xff\xfe b")
    shot.write_bytes(CONTENT)
    assert spool.take(shot, spool.hash_file(shot)).read_bytes() == CONTENT
    with pytest.raises(SpoolError, match="udcff"):
        spool.hash_file(str(shot) + "missing")


def test_unfinished_copies_go_at_the_start(spool: Spool, shot: Path) -> None:
    """*.tmp of an earlier process is removed; shots stay, and count as found."""
    key = spool.hash_file(shot)
    spool.take(shot, key)
    (spool.folder / f"{key}.123.tmp").write_bytes(b"half")
    again = Spool(spool.folder)
    assert [p.name for p in spool.folder.iterdir()] == [key]
    assert again.untouched() == {key}
    again.take(shot, key)
    assert again.untouched() == set()
    assert spool.untouched() == set()


def test_dropped_shots_are_gone(spool: Spool, shot: Path) -> None:
    """drop ends custody, also of what is not there."""
    key = spool.hash_file(shot)
    spool.take(shot, key)
    spool.drop([key, "0" * 64])
    assert list(spool.keys()) == []
    assert shot.exists()


def test_the_spool_is_nobody_elses(spool: Spool) -> None:
    """Pictures are private: the folder is open to its user only."""
    assert stat.S_IMODE(spool.folder.stat().st_mode) == 0o700


def test_a_full_disk_is_reported_and_leaves_nothing(spool: Spool, shot: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ENOSPC while copying is StateFull, and the partial copy is removed."""
    refuse_links(monkeypatch, errno.EXDEV)

    def full(fd: int, data: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(spool_module, "write_all", full)
    with pytest.raises(StateFull):
        spool.take(shot, spool.hash_file(shot))
    assert list(spool.folder.iterdir()) == []


def test_hashing_leaves_other_threads_running(tmp_path: Path) -> None:
    """The GIL is released: another thread gets on while one hashes."""
    path = tmp_path / "big"
    path.write_bytes(bytes(64 << 20))
    ticks = []
    done = threading.Event()

    def tick() -> None:
        while not done.wait(0.001):
            ticks.append(1)

    thread = threading.Thread(target=tick)
    thread.start()
    for _ in range(3):
        Spool.hash_file(path)
    done.set()
    thread.join()
    assert len(ticks) >= 5


def test_a_file_cut_short_while_it_is_hashed_does_not_kill_the_process(tmp_path: Path) -> None:
    """A mapped file would end the process with SIGBUS; reading just ends early."""
    path = tmp_path / "shrinking"
    path.write_bytes(bytes(8 << 20))
    script = f"""
import os
from hotpixd.store import spool
real = os.preadv
def preadv(fd, buffers, at):
    if at == 1 << 20:
        os.truncate({str(path)!r}, 4096)
    return real(fd, buffers, at)
os.preadv = preadv
print(spool.Spool.hash_file({str(path)!r}))
"""
    here = Path(spool_module.__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": str(here)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == blake3(bytes(1 << 20)).hexdigest()


def test_what_is_held_on_a_disk_that_failed_is_let_go_of_without_a_word(tmp_path: Path, shot: Path) -> None:
    """An aborted journal makes ext4 read-only; the copy that was under way then cannot even be removed."""
    if os.geteuid() != 0:
        pytest.skip("mounting takes root")
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "none", disk], check=True)
    try:
        spool = Spool(disk / "spool")
        held = spool.hold(shot)
        assert held.copy is not None
        left = held.copy
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        spool.release(held)
        assert held.copy is None
        assert left.exists()
        subprocess.run(["mount", "-o", "remount,rw", disk], check=True)
        Spool(disk / "spool")
        assert not left.exists()
    finally:
        subprocess.run(["umount", disk], check=True)
