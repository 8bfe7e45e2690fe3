"""Volumes told from the mount table and from the device names of this machine."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from hotpixd.intake import volumes
from hotpixd.intake.volumes import Mount, Volume, mounts_around, volume_of

TABLE = r"""21 28 0:20 / /proc rw,relatime shared:5 - proc proc rw
28 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw
36 28 8:17 / /media/ann/EOS\040DIGITAL rw,nosuid - vfat /dev/sdb1 rw
37 28 0:41 /share /media/ann/nas rw - nfs4 server:/share rw
38 28 0:42 / /media/ann/phone rw - fuse.sshfs phone: rw
39 28 8:33 / /media/annabel rw - ext4 /dev/sdc1 rw
40 36 8:49 /in\134side /media/ann/EOS\040DIGITAL rw - exfat /dev/sdd1 rw
"""


@pytest.fixture
def table(tmp_path, monkeypatch) -> None:
    """Have a mount table with one of each."""
    path = tmp_path / "mountinfo"
    path.write_text(TABLE)
    monkeypatch.setattr(volumes, "MOUNT_TABLE", path)


def test_the_mount_a_folder_lies_on_comes_first_then_those_below(table):
    """Blanks and backslashes are escaped; of two on one point the last counts; names that only begin alike do not."""
    found = mounts_around("/media/ann")
    assert [mount.point for mount in found] == ["/", "/media/ann/EOS DIGITAL", "/media/ann/nas", "/media/ann/phone"]
    assert found[1] == Mount(40, "8:49", "/in\\side", "/media/ann/EOS DIGITAL", "exfat")
    assert mounts_around("/media/ann/EOS DIGITAL/DCIM") == [found[1]]


def test_kinds_of_file_systems_are_told_apart(table):
    """Who else may write there, and whether times and inode numbers mean anything."""
    told = {mount.kind: (mount.network, mount.forgetful) for mount in mounts_around("/media")}
    assert told == {
        "ext4": (False, False),
        "exfat": (False, True),
        "nfs4": (True, False),
        "fuse.sshfs": (True, True),
    }


def test_the_mount_table_of_this_machine_can_be_read():
    """Whatever is mounted here."""
    here = mounts_around(os.path.realpath(__file__))
    assert here[0].point == "/" or Path(here[0].point).is_dir()


def test_a_volume_with_a_uuid_is_known_by_it_and_its_folder(tmp_path, monkeypatch):
    """However it is mounted: by another path, or as a folder of it."""
    root = Path("/").stat().st_dev
    device = next((d for d in Path("/dev").iterdir() if d.is_block_device() and d.stat().st_rdev == root), None)
    if device is None:
        pytest.skip("needs a block device under the root file system")
    uuids = tmp_path / "by-uuid"
    uuids.mkdir()
    (uuids / "gone").symlink_to(tmp_path / "nothing")
    (uuids / "1234-ABCD").symlink_to(device)
    monkeypatch.setattr(volumes, "_UUIDS", uuids)
    mount = Mount(1, "254:0", "/", "/", "vfat")
    assert volume_of(mount, "/usr/bin").identity == b"uuid 1234-ABCD /usr/bin"
    assert volume_of(replace(mount, inside="/cards", point="/usr"), "/usr/bin").identity == b"uuid 1234-ABCD /cards/bin"
    assert volume_of(replace(mount, point="/usr/bin"), "/usr").root == "/usr/bin"


def test_without_a_uuid_only_a_file_system_with_a_memory_has_an_identity(tmp_path, monkeypatch):
    """Two FAT cards may look alike in all that a path, a size and a time can tell."""
    monkeypatch.setattr(volumes, "_UUIDS", tmp_path / "no udev")
    status = tmp_path.stat()
    mount = Mount(1, "254:0", "/", "/", "tmpfs")
    known = volume_of(mount, str(tmp_path))
    assert known.identity == f"device {status.st_dev} inode {status.st_ino}".encode()
    assert volume_of(mount, str(tmp_path.parent)).identity != known.identity
    assert volume_of(replace(mount, kind="vfat"), str(tmp_path)).identity is None


def test_a_volume_without_an_identity_is_only_itself():
    """One that looks the same after it was away may be another card."""
    mount = Mount(1, "8:17", "/", "/card", "vfat")
    one, other = Volume(mount, "/card", 2065, 1, None), Volume(mount, "/card", 2065, 1, None)
    assert one == other
    assert one.recognised_as(one)
    assert not one.recognised_as(other)
    named = replace(one, identity=b"uuid 1234-ABCD /")
    assert named.recognised_as(replace(named, inode=7))
