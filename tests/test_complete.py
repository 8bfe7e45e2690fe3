"""Whether a file is finished, asked of real files of the kinds that cameras write, and of real writers."""

from __future__ import annotations

import io
import os
import struct
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import tifffile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from conftest import environment
from hotpixd.intake.complete import look_at
from pictures import colour, exif, jpeg, mosaic, write_dng


def whole(path: Path, data: bytes) -> bool | None:
    path.write_bytes(data)
    return look_at(path, ask_for_writers=False).whole


def png() -> bytes:
    out = io.BytesIO()
    Image.fromarray(colour().astype(np.uint8)).save(out, "png")
    return out.getvalue()


def tiff(**options: object) -> bytes:
    out = io.BytesIO()
    tifffile.imwrite(out, mosaic(128, 96), **options)
    return out.getvalue()


def dng() -> bytes:
    path = Path("made.dng")
    write_dng(path, mosaic())
    return path.read_bytes()


def cr3() -> bytes:
    """Return boxes as in a CR3: the samples are in the last one."""

    def box(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I4s", 8 + len(body), kind) + body

    large = struct.pack(">I4sQ", 1, b"mdat", 16 + 5000) + bytes(range(250)) * 20
    return box(b"ftyp", b"crx " + bytes(12)) + box(b"moov", bytes(900)) + large


MADE = {
    "jpeg": lambda: jpeg(colour()),
    "jpeg with a thumbnail": lambda: jpeg(colour(), exif=exif({})[:6] + jpeg(colour(16, 16))),
    "png": png,
    "tiff": tiff,
    "big-endian tiff": lambda: tiff(byteorder=">"),
    "tiled tiff": lambda: tiff(tile=(32, 32)),
    "tiff of strips": lambda: tiff(rowsperstrip=5),
    "dng": dng,
    "cr3": cr3,
}


@pytest.mark.parametrize("kind", MADE)
def test_a_file_is_whole_with_its_end_and_not_without(tmp_path, monkeypatch, kind):
    """Cut anywhere behind its header: the thumbnail's end within a header is not the picture's."""
    monkeypatch.chdir(tmp_path)
    data = MADE[kind]()
    assert whole(tmp_path / "file", data) is True
    for part in (0.2, 0.5, 0.9, 0.99):
        assert whole(tmp_path / "file", data[: int(part * len(data))]) is False


@pytest.mark.parametrize("kind", ["jpeg", "png"])
@pytest.mark.parametrize("tail", [bytes(500), b"SEFT" + bytes(range(200)) * 5, b"\xff\xd8 a preview in full \xff\xd9"])
def test_what_a_camera_appends_does_not_matter(tmp_path, kind, tail):
    """Phones add trailers, other cameras whole previews."""
    assert whole(tmp_path / "file", MADE[kind]() + tail) is True


@pytest.mark.parametrize("kind", ["jpeg", "png", "cr3"])
def test_room_not_yet_filled_is_not_a_picture(tmp_path, kind):
    """Some programs make a file of the final size first."""
    data = MADE[kind]()
    assert whole(tmp_path / "file", bytes(len(data))) is False
    assert whole(tmp_path / "file", data[:600] + bytes(len(data) - 600)) is False


@pytest.mark.parametrize("data", [b"FUJIFILMCCD-RAW 0201", b"SIMPLE  =                    T", b"text of any kind"])
def test_of_a_kind_that_says_nothing_nothing_is_said(tmp_path, data):
    """The settling time then has to do."""
    assert whole(tmp_path / "file", data) is None


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    start=st.sampled_from([b"", b"\xff\xd8\xff", b"II*\0", b"MM\0*", b"\0\0\0\x18ftypcrx ", b"\x89PNG\r\n\x1a\n"]),
    rest=st.binary(max_size=400),
)
def test_no_content_makes_it_fail(tmp_path, start, rest):
    """Offsets and lengths in a file may be anything; one bad file must not end a source."""
    assert whole(tmp_path / "file", start + rest) in (True, False, None)


def test_a_writer_is_noticed_and_a_reader_is_not(tmp_path):
    """Also a writer that only maps or appends, and the status is that of the file."""
    path = tmp_path / "a.jpg"
    path.write_bytes(jpeg(colour()))
    assert look_at(path, ask_for_writers=True).written is False
    with path.open("rb"):
        assert look_at(path, ask_for_writers=True).written is False
    with path.open("ab"):
        look = look_at(path, ask_for_writers=True)
    assert (look.written, look.whole, look.status.st_size) == (True, True, path.stat().st_size)
    assert look_at(path, ask_for_writers=False).written is None


def test_a_symlink_and_a_pipe_are_not_opened(tmp_path):
    """A pipe would be waited for, a symlink may lead off the card."""
    (tmp_path / "link.jpg").symlink_to(tmp_path / "a.jpg")
    (tmp_path / "a.jpg").write_bytes(b"x")
    with pytest.raises(OSError, match="symbolic links"):
        look_at(tmp_path / "link.jpg", ask_for_writers=True)
    os.mkfifo(tmp_path / "pipe.jpg")
    assert look_at(tmp_path / "pipe.jpg", ask_for_writers=True).whole is None


LOOKS = """
    import sys
    from hotpixd.intake.complete import look_at

    seen = set()
    print("ready", flush=True)
    while seen < {True, False} or len(seen) < 2:
        seen.add(look_at(sys.argv[1], ask_for_writers=True).written)
    for _ in range(20_000):
        look_at(sys.argv[1], ask_for_writers=True)
    print("alive")
"""


def test_a_writer_that_opens_the_file_at_that_moment_does_not_end_the_process(tmp_path):
    """It breaks the lease, for which the kernel sends SIGIO to its holder unless told otherwise; that kills."""
    path = tmp_path / "a.jpg"
    path.write_bytes(jpeg(colour()))
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(LOOKS), str(path)], stdout=subprocess.PIPE, text=True, env=environment()
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        while process.poll() is None:
            os.close(os.open(path, os.O_WRONLY))
        assert (process.returncode, process.stdout.read()) == (0, "alive\n")
