"""The user's folder of photos: names made by a template, and nothing that is there ever overwritten."""

from __future__ import annotations

import errno
import os
import signal
import stat
import string
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from conftest import environment, nobody
from hotpixd.intake import album as album_module
from hotpixd.intake.album import Album
from hotpixd.intake.arrivals import CameraFile
from hotpixd.intake.naming import FIELDS, check_template, filled
from hotpixd.simulate import VirtualSensor

SHOT = CameraFile("V0042", "/store_00010001/DCIM/100CANON", "IMG_0001.CR2", 5, 1_750_000_000)
TAKEN = datetime(2026, 3, 30, 22, 11, 12, tzinfo=UTC)
SAID = {
    "name": "IMG_0001.CR2",
    "stem": "IMG_0001",
    "ext": "cr2",
    "date": TAKEN,
    "make": "Canon",
    "model": "EOS R6",
    "serial": "V0042",
}


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """The user's folder, with a photo of theirs that is called as the camera's next one will be."""
    folder = tmp_path / "photos"
    folder.mkdir(mode=0o755)
    folder.chmod(0o755)
    (folder / "IMG_0001.CR2").write_bytes(b"precious")
    return folder


@pytest.fixture
def inbox(tmp_path: Path) -> Path:
    """Where files arrive; nobody else may look into it."""
    folder = tmp_path / "incoming"
    folder.mkdir(mode=0o700)
    return folder


def arrived(inbox: Path, content: bytes, name: str = "1") -> Path:
    """Put a file there as a worker does."""
    path = inbox / name
    # Not into what is linked to a photo by now.
    path.unlink(missing_ok=True)
    path.write_bytes(content)
    path.chmod(0o600)
    return path


def there(folder: Path) -> dict[str, bytes]:
    """Return all files below a folder, hidden ones too, with their content."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


NO_LINKS = (errno.EPERM, errno.EXDEV, errno.EOPNOTSUPP, errno.EACCES)


@pytest.fixture(params=["links", "elsewhere", "fat"])
def disk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, inbox: Path) -> str:
    """Where the user's folder is: beside the state, on another disk, on one without hard links."""
    link = os.link

    def refusing(source: Path, target: Path, **options: object) -> None:
        if request.param == "fat" or Path(source).parent == inbox:
            raise OSError(errno.EPERM if request.param == "fat" else errno.EXDEV, "refused", str(target))
        link(source, target)

    if request.param != "links":
        monkeypatch.setattr(os, "link", refusing)
    return str(request.param)


# Never over another one


def test_a_photo_is_saved_under_its_name(photos: Path, inbox: Path, disk: str):
    """With its content, readable for everybody, whatever the service's umask; what arrived stays for the ledger."""
    before = os.umask(0o077)
    try:
        saved = Album(photos).save(arrived(inbox, b"raw"), CameraFile("V", "/DCIM", "IMG_0002.CR2", 3, 1))
    finally:
        os.umask(before)
    assert saved == photos / "IMG_0002.CR2"
    assert there(photos) == {"IMG_0001.CR2": b"precious", "IMG_0002.CR2": b"raw"}
    assert mode(saved) == 0o644
    assert there(inbox) == {"1": b"raw"}


def test_nothing_is_ever_overwritten(photos: Path, inbox: Path, disk: str):
    """Cameras start again at IMG_0001: others of that name get a number, and nothing is left beside them."""
    for number in range(1, 4):
        content = b"raw %d" % number
        saved = Album(photos).save(arrived(inbox, content), SHOT)
        assert saved == photos / f"IMG_0001-{number}.CR2"
        assert saved.read_bytes() == content
    assert sorted(there(photos)) == ["IMG_0001-1.CR2", "IMG_0001-2.CR2", "IMG_0001-3.CR2", "IMG_0001.CR2"]
    assert (photos / "IMG_0001.CR2").read_bytes() == b"precious"


def test_the_same_photo_is_saved_once(photos: Path, inbox: Path, disk: str):
    """After a crash it is saved again: it is found by its content, numbered or not, and not made anew."""
    album = Album(photos)
    first = album.save(arrived(inbox, b"raw"), SHOT)
    inode = first.stat().st_ino
    assert first.name == "IMG_0001-1.CR2"
    assert album.save(arrived(inbox, b"raw", "2"), SHOT) == first
    assert album.save(arrived(inbox, b"precious", "3"), SHOT) == photos / "IMG_0001.CR2"
    assert first.stat().st_ino == inode
    assert len(there(photos)) == 2


@pytest.mark.parametrize("sort", ["folder", "symlink", "dangling", "pipe"])
def test_what_is_no_photo_keeps_its_name_too(photos: Path, inbox: Path, disk: str, sort: str):
    """A folder, or a symbolic link, even to nowhere or to the same content: following it would write elsewhere."""
    taken, elsewhere = photos / "IMG_0002.CR2", photos / "elsewhere"
    if sort == "folder":
        taken.mkdir()
    elif sort == "pipe":
        os.mkfifo(taken)
    else:
        taken.symlink_to(elsewhere)
        if sort == "symlink":
            elsewhere.write_bytes(b"raw")
    before = taken.lstat()
    saved = Album(photos).save(arrived(inbox, b"raw"), CameraFile("V", "/DCIM", "IMG_0002.CR2", 3, 1))
    assert saved == photos / "IMG_0002-1.CR2"
    assert (taken.lstat().st_ino, taken.lstat().st_mode) == (before.st_ino, before.st_mode)
    assert elsewhere.exists() == (sort == "symlink")


def test_somebody_who_takes_the_name_meanwhile_loses_nothing(photos: Path, inbox: Path, disk: str, monkeypatch):
    """Between the look and the write: another program may save the same card."""
    place = album_module._place

    def beaten(source: Path, part: Path, path: Path) -> None:
        if path.name == "IMG_0002.CR2":
            path.write_bytes(b"theirs")
        place(source, part, path)

    monkeypatch.setattr(album_module, "_place", beaten)
    saved = Album(photos).save(arrived(inbox, b"ours"), CameraFile("V", "/DCIM", "IMG_0002.CR2", 4, 1))
    assert saved.name == "IMG_0002-1.CR2"
    assert there(photos) == {"IMG_0001.CR2": b"precious", "IMG_0002.CR2": b"theirs", "IMG_0002-1.CR2": b"ours"}


def test_a_photo_changed_in_place_is_another_file(photos: Path, inbox: Path):
    """Programs that write a rating into it do that; what is kept of the shot must stay as it was."""
    path = arrived(inbox, b"raw")
    saved = Album(photos).save(path, SHOT)
    with saved.open("r+b") as photo:
        photo.write(b"war")
    assert path.read_bytes() == b"raw"


@pytest.mark.parametrize("number", NO_LINKS)
def test_whatever_a_disk_says_that_has_no_links_it_is_copied_to(photos: Path, inbox: Path, monkeypatch, number: int):
    """More than one block, in the end under its own name."""

    def refuse(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "link", refuse)
    monkeypatch.setattr(album_module, "_BLOCK", 1000)
    content = os.urandom(3333)
    saved = Album(photos).save(arrived(inbox, content), SHOT)
    assert there(photos) == {"IMG_0001.CR2": b"precious", saved.name: content}
    assert mode(saved) == 0o644


# What goes wrong


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_a_copy_that_fails_leaves_nothing(photos: Path, inbox: Path, monkeypatch, number: int):
    """The disk is full or torn out: no half photo under its name, and none beside it."""

    def fail(fd: int, data: bytes) -> None:
        os.write(fd, data[: len(data) // 2])
        raise OSError(number, os.strerror(number))

    def refuse(*_: object) -> None:
        raise OSError(errno.EXDEV, "another disk")

    monkeypatch.setattr(os, "link", refuse)
    with monkeypatch.context() as torn:
        torn.setattr(album_module, "write_all", fail)
        with pytest.raises(OSError, match=os.strerror(number)):
            Album(photos).save(arrived(inbox, b"raw"), SHOT)
    assert there(photos) == {"IMG_0001.CR2": b"precious"}
    assert Album(photos).save(inbox / "1", SHOT).read_bytes() == b"raw"


def test_a_name_that_was_claimed_in_vain_is_given_back(photos: Path, inbox: Path, monkeypatch):
    """Without links an empty file takes the name first; it must not stay if the photo cannot follow."""

    def refuse(*_: object) -> None:
        raise OSError(errno.EPERM, "no links")

    def fail(*_: object) -> None:
        raise OSError(errno.EIO, "torn out")

    monkeypatch.setattr(os, "link", refuse)
    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(OSError, match="torn out"):
        Album(photos).save(arrived(inbox, b"raw"), SHOT)
    assert there(photos) == {"IMG_0001.CR2": b"precious"}


_KILLED = """
import errno, os, signal, sys
from pathlib import Path
from hotpixd.intake import album
from hotpixd.intake.arrivals import CameraFile

def refuse(*_):
    raise OSError(errno.EXDEV, "another disk")

def die(fd, data):
    os.write(fd, data[:2])
    os.kill(os.getpid(), signal.SIGKILL)

os.link = refuse
if sys.argv[3] == "die":
    album.write_all = die
print(album.Album(Path(sys.argv[2])).save(Path(sys.argv[1]), CameraFile("V", "/DCIM", "IMG_0001.CR2", 3, 1)).name)
"""


def test_a_kill_in_the_middle_of_a_copy_leaves_nothing_in_the_end(photos: Path, inbox: Path):
    """Half a photo is hidden until it is saved again, and gone then."""
    path = arrived(inbox, b"raw")

    def saved(how: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", _KILLED, str(path), str(photos), how]
        return subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)

    assert saved("die").returncode == -signal.SIGKILL
    (torn,) = there(photos).keys() - {"IMG_0001.CR2"}
    assert torn.startswith(".")
    assert saved("live").stdout == "IMG_0001-1.CR2\n"
    assert there(photos) == {"IMG_0001.CR2": b"precious", "IMG_0001-1.CR2": b"raw"}


def test_a_kill_once_it_has_its_name_leaves_no_second_one(photos: Path, inbox: Path, monkeypatch):
    """The hidden name would be a second one of the user's photo, which the next use of it would write into."""
    path = arrived(inbox, b"raw")
    unlink = Path.unlink

    def die(self: Path, missing_ok: bool = False) -> None:
        if not missing_ok or not self.exists():
            unlink(self, missing_ok)

    monkeypatch.setattr(Path, "unlink", die)
    saved = Album(photos).save(path, SHOT)
    assert len(there(photos)) == 3
    monkeypatch.undo()
    saved = saved.rename(photos / "edited.CR2")
    assert Album(photos).save(path, SHOT).name == "IMG_0001-1.CR2"
    assert there(photos) == {"IMG_0001.CR2": b"precious", "IMG_0001-1.CR2": b"raw", "edited.CR2": b"raw"}
    assert not saved.samefile(photos / "IMG_0001-1.CR2")


def test_a_folder_that_is_missing_is_not_made(tmp_path: Path, inbox: Path):
    """A disk that is not mounted must not be filled below its mount point."""
    gone = tmp_path / "mnt" / "photos"
    with pytest.raises(FileNotFoundError, match="the folder is missing") as error:
        Album(gone, "{date:%Y}/{name}").save(arrived(inbox, b"raw"), SHOT)
    assert error.value.filename == str(gone)
    assert not gone.parent.exists()


def test_a_folder_closed_to_us_is_an_error():
    """As one of somebody else's is; nothing is left there."""
    with tempfile.TemporaryDirectory() as top:
        Path(top).chmod(0o755)
        path = arrived(Path(top), b"raw")
        path.chmod(0o644)
        photos = Path(top, "photos")
        photos.mkdir()
        photos.chmod(0o555)
        with nobody(), pytest.raises(PermissionError):
            Album(photos).save(path, SHOT)
        with nobody(), pytest.raises(PermissionError):
            Album(photos, "{date:%Y}/{name}").save(path, SHOT)
        assert list(photos.iterdir()) == []
        photos.chmod(0o777)
        with nobody():
            assert Album(photos).save(path, SHOT).read_bytes() == b"raw"


def test_a_file_in_place_of_a_folder_is_an_error(photos: Path, inbox: Path):
    """It is a photo of somebody, perhaps; it stays."""
    with pytest.raises(OSError, match="no folder"):
        Album(photos, "{name}/{stem}.{ext}").save(arrived(inbox, b"raw"), SHOT)
    assert there(photos) == {"IMG_0001.CR2": b"precious"}


# Names


def test_all_that_a_template_may_name(tmp_path: Path, photos: Path, inbox: Path):
    """Of the file itself where it says it, the date as the camera's clock had it."""
    sensor = VirtualSensor(200, 150, serial="V0042")
    path = inbox / "shot"
    sensor.write_jpeg(path, sensor.shot(0, "moving"))
    template = "{date:%Y}/{make} {model} ({serial})/{stem}_{date:%m%d}.{ext}"
    saved = Album(photos, template).save(path, CameraFile("port 1", "/DCIM", "IMG_0007.JPG", 1, 1_750_000_000))
    year, camera, name = saved.relative_to(photos).parts
    assert (year.isdecimal(), len(year)) == (True, 4)
    assert camera.endswith("(V0042)")
    assert "unknown" not in camera
    assert name.startswith("IMG_0007_")
    assert name.endswith(".jpg")


def test_what_a_file_does_not_say_the_camera_does(photos: Path, inbox: Path):
    """The date is then of the card's listing, and the serial number of the body; nothing else is known."""
    album = Album(photos, "{make}-{model}-{serial}/{date:%Y-%m-%d %H.%M}/{name}")
    saved = album.save(arrived(inbox, b"no picture"), SHOT)
    assert saved.relative_to(photos) == Path("unknown-unknown-V0042/2025-06-15 15.06/IMG_0001.CR2")


@pytest.mark.parametrize("mtime", [0, -1, 1 << 40, 1 << 62, -(1 << 62)])
def test_a_camera_clock_of_any_time_is_a_date(photos: Path, inbox: Path, mtime: int):
    """A listing may hold anything; it must not end the daemon."""
    saved = Album(photos, "{date:%Y}/{name}").save(arrived(inbox, b"raw"), CameraFile("V", "/DCIM", "a.jpg", 3, mtime))
    assert saved.parent.name.isdecimal()


def test_folders_that_are_made_are_as_open_as_the_one_they_are_in(photos: Path, inbox: Path):
    """Whatever the service's umask: once they were closed to the user whose photos these are."""
    photos.chmod(0o775)
    before = os.umask(0o077)
    try:
        saved = Album(photos, "{date:%Y}/{date:%m}/{name}").save(arrived(inbox, b"raw"), SHOT)
    finally:
        os.umask(before)
    assert [mode(folder) for folder in saved.parents[:2]] == [0o775, 0o775]
    (photos / "2025").chmod(0o750)
    Album(photos, "{date:%Y}/{name}").save(arrived(inbox, b"raw"), SHOT)
    assert mode(photos / "2025") == 0o750


@pytest.mark.parametrize(
    ("said", "step"),
    [
        ("../../x", "_.._x"),
        ("a/b", "a_b"),
        ("..", "unknown"),
        ("...hidden", "hidden"),
        ("", "unknown"),
        ("   ", "unknown"),
        ("/etc/passwd", "_etc_passwd"),
        ("a\nb\x1b[2J\x00c\x7f", "a_b_[2J_c_"),
        ("back\\slash", "back_slash"),
        ("\u202egpj.exe", "_gpj.exe"),
        ("\udcff", "_"),
        ("{name}{0}%s", "{name}{0}%s"),
        ("Größe 雪", "Größe 雪"),
    ],
)
def test_what_a_hostile_camera_says_is_one_plain_part_of_a_path(said: str, step: str):
    """It neither leads elsewhere, nor hides, nor acts on a terminal."""
    assert filled("{model}/{name}", {**SAID, "model": said}) == Path(step, "IMG_0001.CR2")
    assert filled("x-{model}/{name}", {**SAID, "model": said}) == Path(f"x-{step}", "IMG_0001.CR2")
    assert filled("{name}", {**SAID, "name": said}) == Path(step)


def test_a_hostile_camera_saves_below_the_folder_all_the_same(photos: Path, inbox: Path):
    """From end to end, with a name on its card that leads out of it, and words without end."""
    album = Album(photos, "{serial}/{make}/{name}")
    saved = album.save(arrived(inbox, b"raw"), CameraFile("../" * 500, "/DCIM/..", "../../../x.jpg", 3, 1))
    assert saved.is_relative_to(photos)
    assert saved.resolve() == saved
    assert saved.read_bytes() == b"raw"
    assert len(os.fsencode(saved.parts[-3])) < 255


_VALUES = st.text(st.characters(), max_size=30)
_PIECES = st.sampled_from(
    [*(f"{{{field}}}" for field in FIELDS), "{date:%Y/%m}", "{stem:.3}", "/", "..", ".", "-", "a"]
)


def test_templates_that_can_be_used_and_those_that_cannot():
    """Each refusal ends a sentence that begins with the template."""
    for template in ("{name}", "{date:%Y-%m-%d}/{name}", "{stem}{ext}", "{{x}}/{name}", "a/b/{name!s:.8}", ".h/{name}"):
        check_template(template)
    for template, reason in (
        ("{nme}", "names {nme}, but there are {name}, {stem},"),
        ("{}", "names {}, but"),
        ("{0}", "names {0}, but"),
        ("{name.__class__}", "names {name.__class__}, but"),
        ("{date}", "must have {name} or {stem} in it"),
        ("photo.jpg", "must have {name} or {stem} in it"),
        ("", "must have {name} or {stem} in it"),
        ("{{name}}", "must have {name} or {stem} in it"),
        ("../{name}", "must lead to a file below the folder"),
        ("a/../{name}", "must lead to a file below the folder"),
        ("./{name}", "must lead to a file below the folder"),
        ("/{name}", "must lead to a file below the folder"),
        ("a//{name}", "must lead to a file below the folder"),
        ("{name}/", "must lead to a file below the folder"),
        ("{name}\0", "must lead to a file below the folder"),
        ("{date:/%Y}/{name}", "must lead to a file below the folder"),
        ("{name", "is no template: "),
        ("name}", "is no template: "),
        ("{name:d}", "cannot be filled in: "),
        ("{name:{x}}", "cannot be filled in: "),
    ):
        with pytest.raises(ValueError, match="^" + "".join(f"[{c}]" if c in "{}.()" else c for c in reason)):
            check_template(template)


@given(template=st.lists(_PIECES, max_size=6).map("".join), said=st.fixed_dictionaries(dict.fromkeys(FIELDS, _VALUES)))
@example(template="{stem}.{name}", said=dict.fromkeys(FIELDS, "."))
@example(template=".{name}", said=dict.fromkeys(FIELDS, "."))
@example(template="{make:.1}{name}", said=dict.fromkeys(FIELDS, " ."))
def test_no_value_leads_out_of_the_folder(template: str, said: dict[str, str]):
    """A template that is accepted once is never refused later, whatever a camera says; every step is a plain name."""
    try:
        check_template(template)
    except ValueError:
        return
    path = filled(template, {**said, "date": TAKEN})
    assert not path.is_absolute()
    assert ".." not in path.parts
    assert len(path.parts) == template.replace("{date:%Y/%m}", "/").count("/") + 1
    os.fsencode(path)
    for letter in str(path):
        assert letter.isprintable() or letter in template


def test_fields_are_those_of_the_templates():
    """What is documented is what can be filled in."""
    check_template("/".join(f"{{{field}}}" for field in FIELDS))
    assert set(SAID) == set(FIELDS)
    assert all(field in string.ascii_lowercase or field.isalpha() for field in FIELDS)


@pytest.fixture(autouse=True)
def _no_umask_is_left() -> Iterator[None]:
    """The tests change it, and it is of the whole process."""
    before = os.umask(0o022)
    os.umask(before)
    yield
    assert os.umask(before) == before


def test_no_symlink_leads_out_of_the_folder(photos: Path, inbox: Path, tmp_path: Path):
    """Whoever may write there could have photos put where only the daemon may; the folder itself may be a link."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (photos / "2025").symlink_to(elsewhere)
    (photos / "dangling").symlink_to(tmp_path / "nowhere")
    file, came = CameraFile("V", "/DCIM", "IMG_0002.CR2", 3, 1), arrived(inbox, b"content")
    for template in ("2025/{name}", "dangling/{name}", "2025/deeper/{name}"):
        with pytest.raises(OSError, match="symlink"):
            Album(photos, template).save(came, file)
    assert list(elsewhere.iterdir()) == []
    assert not (tmp_path / "nowhere").exists()
    (tmp_path / "link").symlink_to(photos)
    saved = Album(tmp_path / "link", "2026/{name}").save(came, file)
    assert saved.read_bytes() == b"content"
    assert (photos / "2026" / file.name).samefile(saved)


@pytest.mark.parametrize("name", ["x" * 251 + ".CR2", "\u00e4" * 130 + ".CR2", "y" * 255, "IMG." + "z" * 251])
def test_a_name_as_long_as_can_be_is_saved_twice(photos: Path, inbox: Path, name: str):
    """With its number it was too long for the file system, and tried again for ever."""
    file = CameraFile("V", "/DCIM", name, 3, 1)
    saved = [Album(photos).save(arrived(inbox, content), file) for content in (b"one", b"two")]
    assert [path.read_bytes() for path in saved] == [b"one", b"two"]
    assert all(len(os.fsencode(path.name)) <= 255 for path in saved)


def test_a_photo_that_is_there_already_is_made_durable(photos: Path, inbox: Path, monkeypatch) -> None:
    """The user may have copied it, and copying does not fsync; its folders may be of a process that died too soon.

    The file is deleted from the card then: a power cut would have taken the only copy.
    """
    (photos / "a" / "b").mkdir(parents=True)
    (photos / "a" / "b" / "IMG_0001.CR2").write_bytes(b"photo")
    synced: list[Path] = []
    monkeypatch.setattr(os, "fsync", lambda fd: synced.append(Path(f"/proc/self/fd/{fd}").readlink()))
    path = Album(photos, "a/b/{name}").save(arrived(inbox, b"photo"), SHOT)
    assert path == photos / "a" / "b" / "IMG_0001.CR2"
    assert set(synced) == {photos, photos / "a", photos / "a" / "b", path}
