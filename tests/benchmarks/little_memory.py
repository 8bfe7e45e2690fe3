"""Show what it costs to keep the statistic on the disk, and what memory it saves: scans under limits, both ways.

Raw frames of 61 megapixels by default. Each scan is a process of its own in a control group with a limit, its state on
an ext4 of its own that counts what is written to it. Root. From the repository:

    PYTHONPATH=daemon python tests/benchmarks/little_memory.py --work /var/tmp/hotpixd-61

Counted are the shots from the start of the process to its end. `--work` keeps the pictures. What the kernel caches of
files counts as a group's memory too and goes when it is needed, so what is in use is told without it.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from throughput import make_pictures
from written import COMMAND, CountedDisk


@contextlib.contextmanager
def limited(megabytes: int) -> Iterator[Path]:
    """Make a control group whose processes together get so much memory."""
    above = next(p for p in map(Path, ("/sys/fs/cgroup/memory", "/sys/fs/cgroup")) if (p / "cgroup.procs").exists())
    group = above / f"hotpixd-memory-{os.getpid()}"
    group.mkdir()
    try:
        limit = next(group / name for name in ("memory.limit_in_bytes", "memory.max") if (group / name).exists())
        limit.write_text(str(megabytes << 20))
        yield group
    finally:
        group.rmdir()


def in_use_mb(group: Path) -> float:
    """Return the memory of a group that is no file's, MB."""
    numbers = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    return int(numbers.get("rss") or numbers["anon"]) / 1e6


def measure(megabytes: int, options: list[str], files: list[Path], work: Path) -> list[str]:
    """Scan within a limit; return shots/s, the most memory in use and bytes written per shot, or how it ended."""
    size = sum(file.stat().st_size for file in files)
    with (
        tempfile.TemporaryDirectory(prefix="memory-", dir=work) as folder,
        CountedDisk(Path(folder), 2 * size + (6 << 30)) as disk,
        limited(megabytes) as group,
    ):
        before = disk.written_bytes()
        command = [*COMMAND, "scan", *options, "--state", str(disk.mount / "state"), *map(str, files)]
        into = ["sh", "-c", f'echo $$ > {group}/cgroup.procs; exec "$@"', "sh"]
        started = time.perf_counter()
        scan = subprocess.Popen([*into, *command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        used = [0.0]
        ended = threading.Event()

        def look() -> None:
            while not ended.wait(0.02):
                used.append(in_use_mb(group))

        looker = threading.Thread(target=look)
        looker.start()
        said = scan.communicate()[0]
        ended.set()
        looker.join()
        took = time.perf_counter() - started
        written = disk.written_bytes() - before
    if f"{len(files)} shots folded" not in said and f"{len(files)} folded" not in said:
        killed = scan.returncode < 0 or scan.returncode == 137
        return ["killed" if killed else "refused: " + " ".join(said.split())[:200], "", ""]
    return [f"{len(files) / took:.2f}", f"{max(used):.0f}", f"{written / len(files) / 1e6:.0f}"]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, help="folder of the pictures, kept; also where the disks are made")
    parser.add_argument("--size", type=int, nargs=2, default=(9504, 6336), metavar=("WIDTH", "HEIGHT"))
    parser.add_argument("--shots", type=int, default=12)
    parser.add_argument("--limits", type=int, nargs="+", default=(8192, 2048, 1536, 1024), metavar="MB")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="hpx") as temporary:
        work = given.work or Path(temporary)
        make_pictures(work, given.shots, tuple(given.size), 95, os.cpu_count() or 1, ("DNG",))
        files = sorted(work.glob("shot_*.dng"))[: given.shots]
        print("| limit, MB | statistic | shots/s | MB in use at most | MB written per shot |\n|---|---|---|---|---|")
        for limit in given.limits:
            for name, options in (("memory", []), ("disk", ["--on-disk"])):
                print(f"| {limit} | {name} | {' | '.join(measure(limit, options, files, work))} |", flush=True)


if __name__ == "__main__":
    main()
