"""Show that the daemon does not grow over thousands of shots, and costs next to nothing when nothing happens.

Starts the daemon on an empty directory, lets a virtual camera shoot small frames into it,
and prints its memory along the way as a Markdown table; then its processor time while
10,000 files lie on the card and nothing happens. From the repository:

    PYTHONPATH=daemon python tests/benchmarks/endurance.py
"""

from __future__ import annotations

import argparse
import contextlib
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from daemons import cpu_s, memory_mb

RUN = [sys.executable, "-c", "from hotpixd.cli import main; main()"]


def shots(count: int, size: tuple[int, int]):
    """Make pictures as bytes: PNG of scenes of a virtual camera, each time with other noise."""
    import io

    from PIL import Image

    rng = np.random.default_rng(1)
    height, width = size[1], size[0]
    hot = rng.integers(0, height, 12), rng.integers(0, width, 12)
    for _ in range(count):
        coarse = rng.normal(100, 30, (height // 8 + 2, width // 8 + 2))
        scene = np.kron(coarse, np.ones((8, 8)))[:height, :width]
        picture = np.stack([scene + rng.normal(0, 6, scene.shape) for _ in range(3)], axis=2)
        picture[hot] += 90
        out = io.BytesIO()
        Image.fromarray(np.clip(picture, 0, 255).astype(np.uint8)).save(out, "PNG", compress_level=1)
        yield out.getvalue()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shots", type=int, default=10_000)
    parser.add_argument("--size", type=int, nargs=2, default=(120, 80), metavar=("WIDTH", "HEIGHT"))
    parser.add_argument("--keep", type=int, help="files left on the card, the latest ones; all if not given")
    parser.add_argument("--idle", type=float, default=60.0, help="seconds to measure the idle daemon")
    given = parser.parse_args()
    from hotpixd.feed import FeedClient, FeedError, find_sockets

    with tempfile.TemporaryDirectory(prefix="hpx") as temporary:
        inbox, state = Path(temporary) / "inbox", Path(temporary) / "state"
        inbox.mkdir()
        env = os.environ | {"XDG_RUNTIME_DIR": temporary}
        daemon = subprocess.Popen([*RUN, "watch", str(inbox), "--state", str(state), "--plain"], env=env, stderr=-3)
        client = None
        while client is None:
            time.sleep(0.2)
            with contextlib.suppress(FeedError, IndexError):
                client = FeedClient(find_sockets(env)[0])
        print("| shots folded | memory |\n|---|---|", flush=True)
        marks = sorted({given.shots * k // 20 for k in range(1, 21)} | {min(500, given.shots)})
        memory: dict[int, float] = {}
        for n, data in enumerate(shots(given.shots, tuple(given.size)), 1):
            folder = inbox / f"{100 + n // 1000}CANON"
            folder.mkdir(exist_ok=True)
            (folder / f"IMG_{n:05d}.PNG").write_bytes(data)
            if n in marks:
                while client.ask("status")["shots"]["folded"] < n:
                    time.sleep(0.2)
                memory[n] = memory_mb(daemon.pid)
                if given.keep is not None:
                    for old in sorted(inbox.glob("*/*.PNG"))[: -given.keep]:
                        old.unlink()
                print(f"| {n} | {memory[n]:.1f} MB |", flush=True)
        first = memory[min(500, given.shots)]
        print(f"\nGrowth after the first {min(500, given.shots)}: {100 * (max(memory.values()) / first - 1):.1f} %")
        time.sleep(35)
        before, since = cpu_s(daemon.pid), time.monotonic()
        time.sleep(given.idle)
        used = (cpu_s(daemon.pid) - before) / (time.monotonic() - since)
        print(f"Idle with {len(list(inbox.glob('*/*.PNG')))} files: {100 * used:.2f} % of a core over {given.idle:g} s")
        daemon.terminate()
        raise SystemExit(daemon.wait())


if __name__ == "__main__":
    main()
