"""Files on their way from a camera: what their names on the disk tell after a crash, whatever a camera calls them."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from conftest import environment
from hotpixd.intake.arrivals import Arrivals, CameraFile, content_digest
from hotpixd.store.spool import Spool

CARD = "/store_00010001/DCIM/100CANON"
TIME = 1_750_000_000


@pytest.fixture
def arrivals(tmp_path: Path) -> Arrivals:
    return Arrivals(tmp_path / "incoming")


def kept(arrivals: Arrivals, file: CameraFile, content: bytes = b"") -> Path:
    """Let a file arrive."""
    part = arrivals.part()
    part.write_bytes(content)
    return arrivals.keep(part, file)


def after_a_crash(arrivals: Arrivals) -> list[tuple[Path, CameraFile]]:
    """Return what the next process finds."""
    return Arrivals(arrivals.folder).left()


# What a name holds

# No slash: a name is one step of a path. A camera may say anything else, with or without sense.
_NAMES = st.text(st.characters(exclude_characters="/"), min_size=1, max_size=14)
_FOLDERS = st.lists(_NAMES, max_size=3).map(lambda steps: "/" + "/".join(steps))
_FILES = st.builds(
    CameraFile,
    camera=st.text(max_size=14),
    folder=_FOLDERS,
    name=_NAMES,
    size=st.integers(0, 1 << 63),
    mtime=st.integers(-(1 << 31), 1 << 33),
)


@settings(suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(files=st.lists(_FILES, max_size=4))
@example(files=[CameraFile("a|b", "/c|d", "e|f|0|0|", 1, 2), CameraFile("%7C", "/%2F", "%", 1, 2)])
@example(files=[CameraFile("", "/\n", "a\nb\0.jpg", 0, -5), CameraFile("../..", "/..", "..", 0, 1)])
@example(files=[CameraFile("\udcff", "/\udc80", "\ud800.jpg", 0, 1), CameraFile(" ", "/ ", " ", 0, 1)])
@example(files=[CameraFile("x.part", "/x.part", "x.part", 0, 1)])
@example(files=[CameraFile("A", "/DCIM", "100CANON.JPG", 1, 1), CameraFile("A", "/DCIM/100CANON", "1.JPG", 1, 1)])
def test_names_come_back_as_they_were(files: list[CameraFile]):
    """All that is known of a file is in its name on the disk, with a content of its own; the folder is not left."""
    with TemporaryDirectory() as top:
        arrivals = Arrivals(Path(top, "incoming"))
        paths = [kept(arrivals, file, repr(file).encode(errors="replace")) for file in files]
        assert all(path.parent == arrivals.folder for path in paths)
        left = after_a_crash(arrivals)
        # Files of a card that agree in all of it are one file.
        assert {path for path, _ in left} == set(paths)
        of = dict(left)
        for path, file in zip(paths, files, strict=True):
            # Those that are too long have a test of their own.
            if not path.name.startswith(file.digest.hex()):
                assert of[path] == file
        assert os.listdir(top) == ["incoming"]  # noqa: PTH208


def test_names_are_readable(arrivals: Arrivals):
    """Whoever looks into the folder sees what is there."""
    path = kept(arrivals, CameraFile("0123 4", CARD, "IMG_0001.CR2", 25_000_000, TIME))
    assert path.name == f"0123 4|{CARD.replace('/', '%2F')}%2FIMG_0001.CR2|25000000|{TIME}|"


@settings(deadline=None)
@given(
    camera=st.text(st.characters(), min_size=1, max_size=300),
    folder=st.text(st.characters(exclude_characters="/"), max_size=300),
    name=st.text(st.characters(exclude_characters="/."), min_size=1, max_size=300),
    mtime=st.sampled_from([0, TIME]),
)
@example(camera="A", folder="DCIM", name="😀" * 100, mtime=TIME)
@example(camera="A", folder="", name="x" * 300, mtime=0)
@example(camera="😀" * 300, folder="DCIM", name="IMG_1", mtime=TIME)
def test_names_too_long_for_a_disk_are_cut(camera: str, folder: str, name: str, mtime: int):
    """The bytes are what counts. What kind of file it is stays known, and whether the camera still has it."""
    file = CameraFile(camera, f"/{folder}", f"{name}.CR2", 1 << 63, mtime)
    with TemporaryDirectory() as top:
        arrivals = Arrivals(Path(top))
        path = kept(arrivals, file, b"raw")
        assert len(os.fsencode(path.name)) <= 250
        ((found, back),) = after_a_crash(arrivals)
        assert found == path
        assert found.read_bytes() == b"raw"
        assert (back.size, back.mtime, back.is_raw, back.volatile) == (1 << 63, mtime, True, file.volatile)
        assert f"/{file.name}".endswith(back.name)


def test_long_names_of_two_cameras_stay_apart(arrivals: Arrivals):
    """What was cut off may be where they differ."""
    files = [CameraFile("x" * 300 + end, "/DCIM", "IMG_0001.CR2", 3, TIME) for end in "ab"]
    files += [CameraFile("x", f"/DCIM/{'y' * 300}{end}", "IMG_0001.CR2", 3, TIME) for end in "ab"]
    assert len({kept(arrivals, file) for file in files}) == 4
    assert len({(file.camera, file.path) for _, file in after_a_crash(arrivals)}) == 4


@pytest.mark.parametrize(
    "file",
    [
        pytest.param(CameraFile("Sony", "/", "capt0000.arw", 25_000_000, TIME), id="in memory"),
        pytest.param(CameraFile("Sony", "/", "capt0000.arw", 25_000_000, 0), id="in memory, without a time"),
        pytest.param(CameraFile("Old", "/DCIM", "NEWEST.JPG", 25_000_000, 0), id="without a time"),
        pytest.param(CameraFile("S" * 300, "/", "capt0000.arw", 25_000_000, TIME), id="in memory, long"),
    ],
)
def test_files_of_one_name_do_not_replace_one_another(arrivals: Arrivals, file: CameraFile):
    """In a camera's memory each shot may be called the same; there is no other copy of any of them."""
    paths = [kept(arrivals, file, b"%d" % number) for number in range(20)]
    left = after_a_crash(arrivals)
    assert sorted(path.read_bytes() for path, _ in left) == sorted(b"%d" % number for number in range(20))
    assert len(set(paths)) == 20
    assert {found.volatile for _, found in left} == {file.volatile}


def test_a_file_of_a_card_is_there_once(arrivals: Arrivals):
    """Fetched again, as after a link that broke too late, it takes the place of itself."""
    file = CameraFile("A", CARD, "IMG_0001.CR2", 3, TIME)
    assert kept(arrivals, file, b"raw") == kept(arrivals, file, b"raw")
    assert len(arrivals.left()) == 1


def test_what_is_left_comes_in_the_order_of_shots(arrivals: Arrivals):
    """Camera by camera, folder by folder, 9 before 10, a raw file before its picture; not in order of arrival."""
    wanted = [
        ("A", "/DCIM", "99CANON.JPG"),
        ("A", "/DCIM", "100CANON.JPG"),
        ("A", "/DCIM/99CANON", "IMG_9999.CR2"),
        ("A", "/DCIM/100CANON", "IMG_9.CR2"),
        ("A", "/DCIM/100CANON", "IMG_10.CR2"),
        ("A", "/DCIM/100CANON", "IMG_10.JPG"),
        ("A", "/DCIM/100CANON", "IMG_11.JPG"),
        ("A", "/DCIM/100CANON/IMG_9", "A.JPG"),
        ("B", "/DCIM/100CANON", "IMG_0001.CR2"),
    ]
    files = [CameraFile(*each, 1, TIME) for each in wanted]
    for file in random.Random(4).sample(files, len(files)):
        kept(arrivals, file)
    assert [file for _, file in after_a_crash(arrivals)] == files


@given(files=st.lists(_FILES, max_size=8), seed=st.integers())
@example(files=[CameraFile("A", "/D", "1.JPG", 1, 1), CameraFile("A", "/D/1", "1.JPG", 1, 1)], seed=0)
def test_any_two_files_have_an_order(files: list[CameraFile], seed: int):
    """A folder beside a file of its name once had none, which would have ended the daemon at each start."""
    shuffled = random.Random(seed).sample(files, len(files))
    assert sorted(file.order for file in shuffled) == sorted(file.order for file in files)


def test_two_stems_of_one_camera_differ():
    """By folder and by camera, not by ending or the case of letters."""
    raw = CameraFile("A", CARD, "IMG_0001.CR2", 3, TIME)
    assert raw.stem == CameraFile("A", CARD, "img_0001.jpg", 9, 0).stem
    assert raw.stem != CameraFile("A", "/DCIM", "IMG_0001.CR2", 3, TIME).stem
    assert raw.stem != CameraFile("B", CARD, "IMG_0001.CR2", 3, TIME).stem
    assert (raw.is_raw, raw.is_rendered) == (True, False)


def test_digests_tell_files_apart():
    """By each of what is known, and not by where one ends and the next begins."""
    file = CameraFile("A", "/DCIM", "IMG.JPG", 12, 34)
    others = [
        CameraFile("B", "/DCIM", "IMG.JPG", 12, 34),
        CameraFile("A", "/DCI", "IMG.JPG", 12, 34),
        CameraFile("A", "/DCIM", "IMH.JPG", 12, 34),
        CameraFile("A", "/DCIM", "IMG.JPG", 13, 34),
        CameraFile("A", "/DCIM", "IMG.JPG", 12, 35),
        CameraFile("A", "/DCIM", "IMG.JPG", 1, 234),
        CameraFile("A/DCIM", "/", "IMG.JPG", 12, 34),
    ]
    assert len({each.digest for each in (file, *others)}) == 8
    assert file.digest == CameraFile("A", "/DCIM/", "IMG.JPG", 12, 34).digest


# The folder


def test_what_a_killed_worker_left_unfinished_is_removed(arrivals: Arrivals, tmp_path: Path):
    """Half a file is no shot, and it is still on the card. What is whole stays, and so does what is not ours."""
    arrivals.part().write_bytes(b"half")
    whole = kept(arrivals, CameraFile("A", CARD, "x.part", 5, TIME), b"whole")
    other = arrivals.folder / "config"
    other.mkdir()
    again = Arrivals(arrivals.folder)
    assert sorted(again.folder.iterdir()) == sorted([whole, other])
    assert [path for path, _ in again.left()] == [whole]


@pytest.mark.parametrize("name", ["note.txt", "a|b|c|d|e", "a|b|1|2", "a|b|1|2||", "|||||", "a|b||2|", "a|b|1|-|"])
def test_files_of_another_kind_are_left_alone(arrivals: Arrivals, name: str):
    """Whatever somebody has put there."""
    (arrivals.folder / name).touch()
    assert arrivals.left() == []
    assert (arrivals.folder / name).exists()


def test_nobody_else_looks_into_it(arrivals: Arrivals):
    """Photos are private until they are saved where the user wants them."""
    assert arrivals.folder.stat().st_mode & 0o777 == 0o700


def test_parts_have_names_of_their_own(arrivals: Arrivals):
    """Two workers write at the same time."""
    assert len({arrivals.part() for _ in range(100)}) == 100


_DYING = """
import sys
from pathlib import Path
from hotpixd.intake.arrivals import Arrivals, CameraFile
arrivals = Arrivals(Path(sys.argv[1]))
part = arrivals.part()
part.write_bytes(b"raw")
arrivals.keep(part, CameraFile("A", "/", "capt0000.arw", 3, 0))
"""


@pytest.mark.parametrize(
    ("step", "arrived"),
    [
        ("before_arrival_fsync", False),
        ("before_arrival_rename", False),
        ("after_arrival_rename", True),
        ("after_arrival_durable", True),
    ],
)
def test_killed_on_the_way_a_file_has_arrived_or_not(tmp_path: Path, step: str, arrived: bool):
    """At each step there is all of it, or nothing."""
    command = [sys.executable, "-c", _DYING, str(tmp_path / "incoming")]
    done = subprocess.run(command, env=environment(HOTPIXD_FAILPOINT=f"{step}:kill"), check=False)
    assert done.returncode == -signal.SIGKILL
    left = Arrivals(tmp_path / "incoming").left()
    assert [path.read_bytes() for path, _ in left] == [b"raw"] * arrived
    assert len(os.listdir(tmp_path / "incoming")) == arrived  # noqa: PTH208


def test_the_digest_of_a_file_is_the_key_of_its_shot(tmp_path: Path):
    """Counted while it is fetched or afterwards, it is what the spool will say."""
    path = tmp_path / "shot"
    path.write_bytes(os.urandom(700_000))
    assert content_digest(path) == Spool.hash_file(path)


@pytest.fixture(autouse=True)
def _nothing_beside(tmp_path: Path) -> Iterator[None]:
    yield
    assert {entry.name for entry in tmp_path.iterdir()} <= {"incoming", "shot"}
