"""Which volume a folder lies on, and whether that volume can be recognised when it comes back.

A card is pulled and put in again, or another one is put in its place: paths do
not tell, so a file is known by its volume as well. Where nothing names a
volume for certain, nothing is remembered of it, since a shot read twice costs
time, but one taken for another is lost.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

MOUNT_TABLE = Path("/proc/self/mountinfo")
"""What is mounted where. Polling it for POLLPRI tells of changes."""

_UUIDS = Path("/dev/disk/by-uuid")

_NETWORK = frozenset(
    ("nfs", "nfs4", "cifs", "smb3", "smbfs", "9p", "ceph", "afs", "glusterfs", "lustre", "virtiofs", "fuse")
)
"""File systems that others may write to without this machine knowing; of FUSE those with a subtype, too."""

_FORGETFUL = frozenset(("vfat", "msdos", "exfat", "ntfs", "ntfs3", "fuseblk", "fuse"))
"""File systems whose times or inode numbers do not tell two files apart."""


@dataclass(frozen=True, slots=True)
class Mount:
    """A line of the mount table."""

    number: int
    """Of this mount, for as long as it is mounted."""

    device: str
    """As "major:minor"."""

    inside: str
    """The folder of the file system that is mounted."""

    point: str
    """The folder it is mounted on."""

    kind: str
    """Type of the file system, such as "vfat"."""

    @property
    def network(self) -> bool:
        """Whether files may change without an event, and be written by somebody no lease tells of."""
        return self.kind in _NETWORK or self.kind.startswith("fuse.")

    @property
    def forgetful(self) -> bool:
        """Whether times come in steps of up to 2 s, or inode numbers are made up anew at each mount."""
        return self.kind in _FORGETFUL or self.kind.startswith("fuse.")


@dataclass(frozen=True, slots=True)
class Volume:
    """A mounted file system, from the watched folder or its mount point downwards."""

    mount: Mount

    root: str
    """The folder from which its paths count: the mount point, or the watched folder if that lies below it."""

    device: int
    inode: int
    """Of `root`."""

    identity: bytes | None
    """The same whenever this volume is mounted, and of no other volume. None if nothing tells for certain."""

    def recognised_as(self, other: Volume) -> bool:
        """Tell whether what is known of one volume holds for the other."""
        return self is other or (self.identity is not None and self.identity == other.identity)


def mounts_around(folder: str) -> list[Mount]:
    """Return the mount that a folder lies on, and behind it all mounts below the folder.

    Parameters
    ----------
    folder : absolute, without symlinks
    """
    under: Mount | None = None
    below: dict[str, Mount] = {}
    for mount in _parse(MOUNT_TABLE.read_text(encoding="utf-8", errors="surrogateescape")):
        if _contains(mount.point, folder):
            # Of several on one point, the last covers the others.
            if under is None or len(mount.point) >= len(under.point):
                under = mount
        elif _contains(folder, mount.point):
            below[mount.point] = mount
    if under is None:
        raise OSError(f"{folder!r} lies on no mount")
    return [under, *below.values()]


def volume_of(mount: Mount, folder: str) -> Volume:
    """Describe the volume of a mount as seen from a folder, which lies on it or above it.

    Raises
    ------
    OSError
        If its root cannot be reached.
    """
    root = folder if _contains(mount.point, folder) else mount.point
    status = Path(root).stat()
    uuid = _uuid_of(status.st_dev)
    identity = None
    if uuid is not None:
        within = os.path.normpath(os.path.join(mount.inside, os.path.relpath(root, mount.point)))  # noqa: PTH118
        identity = f"uuid {uuid} {within}"
    elif not mount.forgetful:
        identity = f"device {status.st_dev} inode {status.st_ino}"
    encoded = None if identity is None else os.fsencode(identity)
    return Volume(mount, root, status.st_dev, status.st_ino, encoded)


def _uuid_of(device: int) -> str | None:
    try:
        names = os.listdir(_UUIDS)  # noqa: PTH208 - names are all that is wanted
    except OSError:
        # No udev here, as in a container.
        return None
    for name in names:
        try:
            if (_UUIDS / name).stat().st_rdev == device:
                return name
        except OSError:
            # Unplugged meanwhile.
            continue
    return None


def _parse(table: str) -> Iterable[Mount]:
    for line in table.split("\n")[:-1]:
        before, _, after = line.partition(" - ")
        number, _, device, inside, point, *_ = before.split(" ")
        yield Mount(int(number), device, _unescaped(inside), _unescaped(point), after.split(" ")[0])


def _unescaped(field: str) -> str:
    """Blanks, tabs, newlines and backslashes are written as three octal digits."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), field)


def _contains(folder: str, other: str) -> bool:
    return other == folder or other.startswith(folder.rstrip("/") + "/")
