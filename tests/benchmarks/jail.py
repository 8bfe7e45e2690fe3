"""Show what the decoders' jail costs: shots per second of a scan with it, and with decoding in the process itself.

Makes pictures of a virtual camera once, JPEG and uncompressed DNG, then folds them into an empty state in turn with and
without the jail, several times, and prints a Markdown table of the medians. From the repository:

    PYTHONPATH=daemon python tests/benchmarks/jail.py --work /var/tmp/hotpixd-throughput

Each run is a process of its own, over files in the page cache, with compiled kernels; counted is from the second
outcome to the last. Measure on a quiet machine.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace

from throughput import FORMATS, make_pictures

WAYS = ("jail", "process")


def folded_per_s(way: str, state: Path, files: Sequence[str]) -> float:
    """Fold the files; return shots per second."""
    from hotpixd.intake.decode import decode
    from hotpixd.intake.files import find_shots
    from hotpixd.monitor import Monitor
    from hotpixd.store.state import State

    options = {} if way == "jail" else {"decoders": SimpleNamespace(decode=decode)}
    with State(state) as opened, Monitor(opened, cores=os.cpu_count() or 1, **options) as monitor:  # type: ignore[arg-type]
        times = [time.perf_counter() for _ in monitor.process(find_shots(files).shots)]
    return (len(times) - 1) / (times[-1] - times[0])


def measured(way: str, state: Path, files: Sequence[Path]) -> float:
    """Do so in a process of its own, with an empty state."""
    shutil.rmtree(state, ignore_errors=True)
    command = [sys.executable, __file__, "--child", way, "--work", str(state), *map(str, files)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    shutil.rmtree(state, ignore_errors=True)
    return float(json.loads(done.stdout))


def main(arguments: Sequence[str] | None = None, out: Callable[[str], object] = sys.stdout.write) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, help="folder for the pictures, kept [default: a temporary one]")
    parser.add_argument("--shots", type=int, default=40)
    parser.add_argument("--size", type=int, nargs=2, default=(6000, 4000), metavar=("WIDTH", "HEIGHT"))
    parser.add_argument("--quality", type=int, default=95, help="of the JPEGs")
    parser.add_argument("--repeats", type=int, default=5, help="runs of each, in turn")
    parser.add_argument("--child", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("files", nargs="*", help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.child:
        print(json.dumps(folded_per_s(given.child, given.work, given.files)))
        return
    with tempfile.TemporaryDirectory(prefix="hotpixd-jail-") as folder:
        work = given.work or Path(folder)
        make_pictures(work, given.shots, tuple(given.size), given.quality, os.cpu_count() or 1)
        out(f"{given.size[0]}x{given.size[1]}, {given.shots} shots, medians of {given.repeats} runs in turn.\n\n")
        out("| | in the jail | in the process | jail / process, each pair |\n| --- | --- | --- | --- |\n")
        for name, ending in FORMATS.items():
            files = sorted(work.glob(f"shot_*.{ending}"))[: given.shots]
            measured("process", work / "state", files[:3])
            pairs = [
                {way: measured(way, work / "state", files) for way in (WAYS if k % 2 else WAYS[::-1])}
                for k in range(given.repeats)
            ]
            jail, process = (statistics.median(pair[way] for pair in pairs) for way in WAYS)
            ratios = sorted(pair["jail"] / pair["process"] for pair in pairs)
            out(f"| {name} | {jail:.2f} shots/s | {process:.2f} shots/s | {statistics.median(ratios):.0%}")
            out(f" ({ratios[0]:.0%} to {ratios[-1]:.0%}) |\n")


if __name__ == "__main__":
    main()
