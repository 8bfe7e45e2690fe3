"""Durable writes: all bytes, in the right order, and failpoints that obey or refuse."""

from __future__ import annotations

import errno
import os
import signal
from pathlib import Path

import pytest

from hotpixd.store import durable
from hotpixd.store.durable import (
    Failpoints,
    StateFull,
    full_disk_as_state_full,
    make_folder,
    make_parents,
    replace_durably,
    write_all,
)


def test_a_write_that_stops_short_is_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """write_all goes on where the system's write stopped."""
    real = os.write
    monkeypatch.setattr(durable.os, "write", lambda fd, data: real(fd, data[:7]))
    path = tmp_path / "file"
    with path.open("wb") as file:
        write_all(file.fileno(), bytes(range(100)))
    assert path.read_bytes() == bytes(range(100))


def test_replacing_fsyncs_the_file_before_and_the_folder_after(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """replace_durably makes content durable before the name, and the name before it returns."""
    tmp, final = tmp_path / "new.tmp", tmp_path / "final"
    tmp.write_text("new")
    final.write_text("old")
    seen: list[tuple[str, bool]] = []

    def fsync(fd: int) -> None:
        seen.append((Path(f"/proc/self/fd/{fd}").readlink().name, tmp.exists()))

    monkeypatch.setattr(durable.os, "fsync", fsync)
    replace_durably(tmp, final)
    assert final.read_text() == "new"
    assert seen == [("new.tmp", True), (tmp_path.name, False)]


def test_folders_above_are_made_durably_whoever_made_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All entries on the way to a new folder are fsynced, also where somebody made the folders and died before that.

    A power cut once took the whole state with it: its parents were made, and never fsynced.
    """
    synced: list[Path] = []
    monkeypatch.setattr(durable, "fsync_folder", synced.append)
    (tmp_path / "begun").mkdir()
    folder = tmp_path / "begun" / "new" / "state"
    make_parents(folder)
    make_folder(folder)
    assert folder.is_dir()
    assert {tmp_path, tmp_path / "begun", tmp_path / "begun" / "new"} <= set(synced)


def test_a_full_disk_is_told_apart_from_a_broken_one() -> None:
    """ENOSPC becomes StateFull, to be tried again; EIO stays what it is and ends the process."""
    with pytest.raises(StateFull, match="No space left for this"), full_disk_as_state_full("for this"):
        raise OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(OSError, match="broken") as caught, full_disk_as_state_full("for this"):
        raise OSError(errno.EIO, "broken")
    assert caught.value.errno == errno.EIO


def test_a_failpoint_kills_at_its_name_and_pass_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """name:kill:3 kills at the third pass of that name, never before, never elsewhere."""
    killed: list[int] = []
    monkeypatch.setattr(durable.os, "kill", lambda _, number: killed.append(number))
    failpoints = Failpoints("here:kill:3")
    for name in ("here", "there", "here", "there", "there"):
        failpoints.passed(name)
    assert killed == []
    failpoints.passed("here")
    assert killed == [signal.SIGKILL]
    for name in ("a", ""):
        Failpoints(None).passed(name)
        Failpoints("").passed(name)
    assert killed == [signal.SIGKILL]


@pytest.mark.parametrize("order", ["here", "here:die", "here:kill:0", "here:kill:x", ":kill", "here:kill:-1"])
def test_a_failpoint_order_that_cannot_be_obeyed_is_refused(order: str) -> None:
    """A slip in HOTPIXD_FAILPOINT must not let a crash test pass without a crash."""
    with pytest.raises(ValueError, match="name:kill"):
        Failpoints(order)
