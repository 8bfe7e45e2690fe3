"""Show how many bytes the product writes per shot, beside its own size: what a memory card or an SSD has to bear.

The state is on an ext4 of its own, on a loop device that counts what is written to it, all included: the spool, the
ledger and its log, generations, the file system's journal. Root. From the repository:

    PYTHONPATH=daemon python tests/benchmarks/written.py --work /var/tmp/hotpixd-written

Linked: the shots lie on the state's own disk (they were written there before, which is not counted). Copied: on
another. The daemon gets a shot every `--every` seconds. `--work` keeps the pictures.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

COMMAND = [sys.executable, "-c", "from hotpixd.cli import main; main()"]
_SECTOR = 512


@dataclass(frozen=True)
class Written:
    """What one run wrote."""

    way: str
    spool: str
    shots: int
    shot_bytes: int
    """Of all shots together."""

    written_bytes: int
    generations: int
    generation_bytes: int
    """Of the last one."""


class CountedDisk:
    """An ext4 on a loop device.

    Parameters
    ----------
    folder : for its image and its mount point
    """

    def __init__(self, folder: Path, size_bytes: int) -> None:
        self.mount = folder / "disk"
        self._image = folder / "disk.img"
        self._size = size_bytes
        self._device = ""

    def __enter__(self) -> CountedDisk:
        self.mount.mkdir()
        with self._image.open("wb") as image:
            image.truncate(self._size)
        _run("mkfs.ext4", "-q", "-F", "-E", "lazy_itable_init=0,lazy_journal_init=0", str(self._image))
        self._device = _run("losetup", "-f", "--show", str(self._image)).strip()
        _run("mount", self._device, str(self.mount))
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(subprocess.CalledProcessError):
            _run("umount", str(self.mount))
        _run("losetup", "-d", self._device)

    def written_bytes(self) -> int:
        """Return what has been written to the device so far, with what still waited in memory."""
        _run("sync", "-f", str(self.mount))
        fields = Path("/sys/block", Path(self._device).name, "stat").read_text().split()
        return int(fields[6]) * _SECTOR


def measure(way: str, spool: str, pictures: list[Path], work: Path, every_s: float) -> Written:
    """Scan the pictures, or let the daemon watch them come, and count what that writes."""
    size = sum(picture.stat().st_size for picture in pictures)
    with (
        tempfile.TemporaryDirectory(prefix="written-", dir=work) as folder,
        CountedDisk(Path(folder), 2 * size + (3 << 30)) as disk,
    ):
        files = pictures
        if spool == "linked":
            (disk.mount / "pictures").mkdir()
            files = [Path(shutil.copyfile(path, disk.mount / "pictures" / path.name)) for path in pictures]
        state = disk.mount / "state"
        before = disk.written_bytes()
        if way == "scan":
            _run(*COMMAND, "scan", "--state", str(state), *map(str, files))
        else:
            inbox = (disk.mount if spool == "linked" else Path(folder)) / "inbox"
            inbox.mkdir()
            _watch(state, inbox, files, every_s)
        written = disk.written_bytes() - before
        newest = max(state.glob("sensors/*/gen-*.hpx"))
        number = int(newest.stem.removeprefix("gen-"))
        return Written(way, spool, len(files), size, written, number, newest.stat().st_size)


def _watch(state: Path, inbox: Path, files: list[Path], every_s: float) -> None:
    from hotpixd.feed import FeedClient, FeedError, find_sockets

    with tempfile.TemporaryDirectory(prefix="hpx") as runtime:
        env = os.environ | {"XDG_RUNTIME_DIR": runtime}
        command = [*COMMAND, "watch", str(inbox), "--state", str(state), "--plain"]
        daemon = subprocess.Popen(command, env=env, stderr=subprocess.DEVNULL)
        try:
            client = None
            while client is None:
                time.sleep(0.2)
                with contextlib.suppress(FeedError, IndexError):
                    client = FeedClient(find_sockets(env)[0])
            for file in files:
                os.link(file, inbox / file.name)
                time.sleep(every_s)
            until = time.monotonic() + 120
            while client.ask("status")["shots"]["folded"] < len(files):
                if time.monotonic() > until:
                    raise SystemExit("not all shots are folded")
                time.sleep(0.2)
        finally:
            daemon.send_signal(signal.SIGTERM)
            daemon.wait()


def _run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def _pictures(folder: Path, count: int, size: tuple[int, int]) -> Iterator[Path]:
    """Write the pictures that are not there yet, and go through all."""
    have = sorted(folder.glob("frame_*.dng")) if folder.exists() else []
    if len(have) < count:
        from hotpixd.simulate import VirtualSensor, write_series

        yield from write_series(folder, VirtualSensor(*size, seed=0), count, "moving")
    else:
        yield from have[:count]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, help="folder of the pictures, kept; also where the disk is made")
    parser.add_argument("--size", type=int, nargs=2, default=(6000, 4000), metavar=("WIDTH", "HEIGHT"))
    parser.add_argument("--shots", type=int, default=70)
    parser.add_argument("--every", type=float, default=1.0, help="between two shots for the daemon, s")
    parser.add_argument("--ways", default="scan,daemon")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="hpx") as temporary:
        work = given.work or Path(temporary)
        pictures = list(_pictures(work / f"pictures-{given.shots}", given.shots, tuple(given.size)))
        print("| | spool | shots | MB per shot | MB written per shot | of its size | generations | MB each |")
        print("|---|---|---|---|---|---|---|---|")
        for way in given.ways.split(","):
            for spool in ("copied", "linked"):
                found = measure(way, spool, pictures, work, given.every)
                own, written = found.shot_bytes / found.shots, found.written_bytes / found.shots
                print(
                    f"| {way} | {spool} | {found.shots} | {own / 1e6:.2f} | {written / 1e6:.2f} | {written / own:.2f} |"
                    f" {found.generations} | {found.generation_bytes / 1e6:.2f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
