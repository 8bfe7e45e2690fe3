"""Show how long after a shot's file is closed its change is on the daemon's feed, beside decoding it alone.

Starts the daemon on an empty directory, writes pictures of a virtual camera into it one after the other, closes each
and waits for the feed. Prints a Markdown table of one run. From the repository, on a quiet machine:

    PYTHONPATH=daemon python tests/benchmarks/latency.py --work /var/tmp/hotpixd-throughput

The pictures are those of `throughput.py`, whose `--work` keeps them.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from statistics import median
from typing import Any

from throughput import _picture, make_pictures

FORMATS = ("JPEG", "JPEG, luma", "DNG")

RUN = [sys.executable, "-c", "from hotpixd.cli import main; main()"]


class Feed:
    """When which number of frames was first seen on the feed."""

    def __init__(self, client: Any) -> None:
        self._client = client
        self.seen_at: dict[int, float] = {}
        self.news = threading.Condition()
        threading.Thread(target=self._follow, daemon=True).start()

    def _follow(self) -> None:
        from hotpixd.feed import FeedError

        # The daemon is ended when all is measured.
        with contextlib.suppress(FeedError):
            for live in self._client.watch():
                now = time.perf_counter()
                frames = sum(value["frames"] for key, value in live.items() if key.startswith("sensor:"))
                with self.news:
                    self.seen_at.setdefault(frames, now)
                    self.news.notify_all()

    def wait(self, frames: int) -> float:
        """Return when so many frames were folded."""
        with self.news:
            if not self.news.wait_for(lambda: frames in self.seen_at, 60):
                raise SystemExit(f"frame {frames} never came")
            return self.seen_at[frames]


def latencies(pictures: list[Path], work: Path, pause_s: float, *, luma: bool) -> list[float]:
    """Return the time from close to feed of each picture, s."""
    from hotpixd.feed import FeedClient, FeedError, find_sockets

    inbox, state = work / "inbox", work / "state"
    inbox.mkdir()
    env = os.environ | {"XDG_RUNTIME_DIR": str(work), "HOTPIXD_JPEG": "luma" if luma else "rgb"}
    daemon = subprocess.Popen([*RUN, "watch", str(inbox), "--state", str(state), "--plain"], env=env, stderr=-3)
    try:
        client = None
        while client is None:
            time.sleep(0.2)
            with contextlib.suppress(FeedError, IndexError):
                client = FeedClient(find_sockets(env)[0])
        feed = Feed(client)
        time.sleep(3)
        took = []
        for n, picture in enumerate(pictures, 1):
            data = picture.read_bytes()
            with (inbox / picture.name).open("wb") as file:
                file.write(data)
            closed = time.perf_counter()
            took.append(feed.wait(n) - closed)
            time.sleep(pause_s)
        return took
    finally:
        daemon.terminate()
        daemon.wait()


def decode_alone(pictures: list[Path], *, luma: bool) -> list[float]:
    """Return the time to decode each picture, s, after the first."""
    from hotpixd.intake.decode import decode, keep_large_buffers

    keep_large_buffers()
    took = []
    for picture in pictures:
        start = time.perf_counter()
        decode(picture, luma=luma)
        took.append(time.perf_counter() - start)
    return took[1:]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, help="folder of the pictures, kept")
    parser.add_argument("--size", type=int, nargs=2, default=(6000, 4000), metavar=("WIDTH", "HEIGHT"))
    parser.add_argument("--shots", type=int, default=20)
    parser.add_argument("--pause", type=float, default=0.7, help="between two shots, s")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="hpx") as temporary:
        pictures = given.work or Path(temporary) / "pictures"
        make_pictures(pictures, given.shots, tuple(given.size), 92, os.cpu_count() or 1)
        print("| | " + " | ".join(FORMATS) + " |\n|---|" + "---|" * len(FORMATS))
        columns = []
        for name in FORMATS:
            luma = name == "JPEG, luma"
            files = [_picture(pictures, name, i) for i in range(given.shots)]
            work = Path(temporary) / name
            work.mkdir()
            alone = median(decode_alone(files, luma=luma))
            # The first compiles, and the first three JPEGs wait for a raw file.
            took = latencies(files, work, given.pause, luma=luma)[3:]
            columns.append((alone, median(took), sorted(took)[int(len(took) * 0.9)]))
        for k, title in enumerate(("decode alone, median", "close to feed, median", "close to feed, 90 %")):
            print(f"| {title} | " + " | ".join(f"{1000 * column[k]:.0f} ms" for column in columns) + " |")
        print("| median / decode | " + " | ".join(f"{column[1] / column[0]:.2f} x" for column in columns) + " |")


if __name__ == "__main__":
    main()
