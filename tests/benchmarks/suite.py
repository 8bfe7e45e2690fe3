"""Show the speed of everything in one run: formats and sizes, latency, start, status; a table of each, and a plot.

    PYTHONPATH=daemon python tests/benchmarks/suite.py --work /var/tmp/hotpixd-suite --plot speed.png

All of it takes about an hour on two cores, and 40 GB of disk while it runs; `--sizes 24` and `--formats JPEG DNG` a few
minutes. Measure on a quiet machine. What the columns mean is said in `throughput.py`, which does the measuring; latency
is `latency.py`'s. A plot needs matplotlib.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import throughput
from latency import RUN

SIZES = {12: (4000, 3000), 24: (6000, 4000), 45: (8192, 5464), 61: (9504, 6336)}
"""Sides of a sensor, by its megapixels."""

COLUMNS = {
    "size of a file": "file",
    "decode alone": "decode",
    "kernel alone": "kernel",
    "kernel / copy": "kernel / copy",
    "scan, steady": "scan",
    "steady / allowed": "of what decoding and kernel allow",
    "steady / all cores busy": "of what they allow when all cores are busy",
    "textbook": "textbook",
    "steady / textbook": "scan / textbook",
    "steady / rawpy.enhance": "scan / rawpy.enhance",
    "written per shot": "written",
    "peak memory": "peak memory",
}
"""Rows of `throughput.py` that become columns here."""


def speed_row(work: Path, file_format: str, megapixels: int, given: argparse.Namespace) -> dict[str, str]:
    """Measure one format at one size; its pictures are removed afterwards unless they are to be kept."""
    folder = work / f"{megapixels}"
    settings = Namespace(
        work=folder, shots=given.shots, size=SIZES[megapixels], quality=95, repeats=given.repeats, textbook=3,
        memory=[], enhance=True,
    )  # fmt: skip
    throughput.make_pictures(folder, given.shots, SIZES[megapixels], 95, throughput._cores(), [file_format])
    for index in range(given.shots):
        # Into the page cache: what is measured first would else be the disk.
        throughput._picture(folder, file_format, index).read_bytes()
    rows = throughput.rows_of(file_format, settings)
    if not given.keep:
        for index in range(given.shots):
            throughput._picture(folder, file_format, index).unlink()
    return rows


def start_rows(work: Path) -> list[tuple[str, str]]:
    """Measure start and status with a state of a 24-megapixel camera: `hotpixd status` alone and beside the daemon."""
    from hotpixd.feed import FeedClient, FeedError, find_sockets

    pictures, state, inbox = work / "24", work / "start", work / "empty"
    throughput.make_pictures(pictures, 2, SIZES[24], 95, throughput._cores(), ["DNG"])
    shutil.rmtree(state, ignore_errors=True)
    inbox.mkdir(exist_ok=True)
    files = [str(throughput._picture(pictures, "DNG", index)) for index in range(2)]
    subprocess.run([*RUN, "scan", "--state", str(state), *files], check=True, capture_output=True)
    env = os.environ | {"XDG_RUNTIME_DIR": str(work)}

    def status() -> float:
        began = time.perf_counter()
        subprocess.run([*RUN, "status", "--state", str(state)], env=env, check=True, capture_output=True)
        return time.perf_counter() - began

    alone = min(status() for _ in range(5))
    starts, asked = [], []
    for _ in range(3):
        began = time.perf_counter()
        daemon = subprocess.Popen(
            [*RUN, "watch", str(inbox), "--state", str(state), "--plain"], env=env, stderr=subprocess.DEVNULL
        )
        try:
            while True:
                with (
                    contextlib.suppress(FeedError, IndexError),
                    contextlib.closing(FeedClient(find_sockets(env)[0])) as client,
                ):
                    client.ask("status")
                    starts.append(time.perf_counter() - began)
                    break
                time.sleep(0.02)
            asked += [status() for _ in range(3)]
        finally:
            daemon.terminate()
            daemon.wait()
    shutil.rmtree(state)
    return [
        ("start of the daemon, until it answers", f"{min(starts):.2f} s"),
        ("`hotpixd status`, no daemon", f"{alone:.2f} s"),
        ("`hotpixd status`, from the daemon", f"{min(asked):.2f} s"),
    ]


def plot(rows: Sequence[tuple[str, int, dict[str, str]]], path: Path) -> None:
    """Draw shots per second against megapixels, for each format: the scan, what is allowed, the textbook."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    formats = list(dict.fromkeys(name for name, _, _ in rows))
    figure, axes = pyplot.subplots(1, len(formats), figsize=(3.2 * len(formats), 3.6), sharey=True, squeeze=False)
    lines = {"scan, steady": "o-", f"allowed on {throughput._cores()} cores": "x--", "textbook": "s:"}
    for axis, name in zip(axes[0], formats, strict=True):
        mine = [(size, cells) for other, size, cells in rows if other == name]
        for row, style in lines.items():
            speeds = [float(cells[row].split()[0]) for _, cells in mine]
            axis.plot([size for size, _ in mine], speeds, style, label=row.replace(", steady", ""))
        axis.set(title=name, xlabel="megapixels", yscale="log")
        axis.grid(True, which="both", alpha=0.3)
    axes[0][0].set_ylabel("shots per second")
    axes[0][-1].legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for pictures and states")
    parser.add_argument("--sizes", type=int, nargs="+", choices=list(SIZES), default=list(SIZES), metavar="MEGAPIXELS")
    parser.add_argument("--formats", nargs="+", choices=list(throughput.FORMATS), default=list(throughput.FORMATS))
    parser.add_argument("--shots", type=int, default=16, help="of a scan")
    parser.add_argument("--repeats", type=int, default=2, help="rounds; the fastest counts")
    parser.add_argument("--keep", action="store_true", help="keep the pictures for the next run")
    parser.add_argument("--plot", type=Path, metavar="F.png")
    parser.add_argument("--no-start", dest="start", action="store_false", help="without start and latency")
    given = parser.parse_args(arguments)
    given.work.mkdir(parents=True, exist_ok=True)
    rows: list[tuple[str, int, dict[str, Any]]] = []
    print(f"| format | MP | {' | '.join(COLUMNS.values())} |\n{'| --- ' * (2 + len(COLUMNS))}|", flush=True)
    for file_format in given.formats:
        for size in given.sizes:
            cells = speed_row(given.work, file_format, size, given)
            rows.append((file_format, size, cells))
            print(f"| {file_format} | {size} | {' | '.join(cells[name] for name in COLUMNS)} |", flush=True)
    if given.start:
        print("\n| 24 megapixels, DNG | |\n| --- | --- |")
        for name, value in start_rows(given.work):
            print(f"| {name} | {value} |")
        print(flush=True)
        script = Path(__file__).with_name("latency.py")
        subprocess.run([sys.executable, str(script), "--work", str(given.work / "latency")], check=True)
        shutil.rmtree(given.work / "latency", ignore_errors=given.keep)
    if given.plot:
        plot(rows, given.plot)


if __name__ == "__main__":
    main()
