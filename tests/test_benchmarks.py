"""The benchmarks run and print the tables they promise, at sizes that take seconds."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parent / "benchmarks"
DAEMON = Path(__file__).parents[1] / "daemon"


def run(script: str, *arguments: str) -> list[list[str]]:
    """Run a benchmark and return the cells of its tables' rows, headings left in, rules left out."""
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / script), *arguments],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(DAEMON)},
    )
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("|") and "---" not in line]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_detection_prints_a_table_for_each_series():
    """A row per step and seed with four numbers per method, a mean per step, a row per scene and per clean sensor."""
    small = ["--size", "150", "100", "--planted", "4", "1", "1", "--processes", "1", "--seeds", "3"]
    rows = run("detection.py", *small, "--frames", "2", "3", "--only", "raw,jpeg,luma,clean,dark", "--dark-frames", "2",
               "--clean-seeds", "1", "--clean-frames", "2")  # fmt: skip
    moving = [row for row in rows if row[0].strip("*") in ("2", "3")]
    assert [row[1].strip("*") for row in moving] == ["3", "mean"] * 6
    assert all(len(cell.strip("*").split(" (")[0].split(" / ")) == 4 for row in moving for cell in row[2:4])
    assert [row[:5] for row in rows if row[0] == "dark"] == [
        ["dark", "raw", "2", "3", "2"],
        ["dark", "jpeg", "2", "3", "2"],
        ["dark", "luma", "2", "3", "2"],
    ]
    assert [row[:4] for row in rows[-3:]] == [[samples, "1", "2", "0"] for samples in ("raw", "jpeg", "luma")]


def test_detection_counts_found_false_and_duplicates(monkeypatch: pytest.MonkeyPatch):
    """An entry within the tolerance finds its defect, a second one is a duplicate, one beyond it is false."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import detection

    from hotpixd.simulate import PlantedDefect

    truth = [PlantedDefect(10, 20, "R", "hot"), PlantedDefect(40, 5, "G", "dead")]
    entries = [(12, 18), (10, 20), (40, 8), (40, 5)]
    near = detection.score(entries, truth, tolerance=2)
    assert (near.found, near.false, near.duplicates) == ({"hot": 1, "dead": 1}, 1, 1)
    exact = detection.score(entries, truth, tolerance=0)
    assert (exact.found, exact.false_at) == ({"hot": 1, "dead": 1}, ((12, 18), (40, 8)))


def test_throughput_prints_one_column_per_format(tmp_path):
    """Speeds, ratios and memory of both formats."""
    rows = run("throughput.py", "--work", str(tmp_path), "--size", "300", "200", "--shots", "3", "--memory", "2",
               "--repeats", "1", "--textbook", "2", "--no-enhance")  # fmt: skip
    assert rows[0] == ["", "JPEG", "DNG"]
    table = {row[0]: row[1:] for row in rows[1:]}
    for name in ("decode alone", "kernel alone", "bare", "scan, steady", "textbook"):
        assert all(float(cell.split()[0]) > 0 for cell in table[name])
    assert all(cell.endswith("%") for cell in table["steady / bare"])
    assert all(float(cell.removesuffix(" MB")) > 50 for cell in table["peak memory, 2 shots"])
    assert not (tmp_path / "state").exists()


def test_tether_prints_memory_and_what_is_open():
    """Eight rows with the shots so far; the daemon, one worker and the same decoders throughout."""
    rows = run("tether.py", "--shots", "16", "--settle", "0", "--idle", "0.2")
    assert [row[0] for row in rows[1:]] == [str(2 * number) for number in range(1, 9)]
    assert len({row[4] for row in rows[1:]}) == 1
    assert int(rows[1][4]) > 2
    assert all(float(row[1]) > 0 and float(row[2]) > 0 for row in rows[1:])


@pytest.mark.skipif(os.geteuid() != 0 or not Path("/dev/loop-control").exists(), reason="loop devices need root")
def test_little_memory_prints_both_ways_within_each_limit(tmp_path):
    """A row per limit and way; nothing is left mounted, and no group."""
    rows = run("little_memory.py", "--work", str(tmp_path), "--size", "300", "200", "--shots", "2", "--limits", "1000")
    assert [row[:2] for row in rows[1:]] == [["1000", "memory"], ["1000", "disk"]]
    assert all(float(cell) > 0 for row in rows[1:] for cell in row[2:])
    assert str(tmp_path) not in Path("/proc/mounts").read_text()


@pytest.mark.skipif(os.geteuid() != 0 or not Path("/dev/loop-control").exists(), reason="loop devices need root")
def test_written_prints_bytes_for_both_ways_and_spools(tmp_path):
    """Four rows; a copy costs the shot's bytes once more than a link, and nothing is left mounted."""
    rows = run("written.py", "--work", str(tmp_path), "--shots", "4", "--size", "300", "200", "--every", "0.1")
    assert [row[:3] for row in rows[1:]] == [
        ["scan", "copied", "4"],
        ["scan", "linked", "4"],
        ["daemon", "copied", "4"],
        ["daemon", "linked", "4"],
    ]
    assert all(float(row[4]) > 0 and int(row[6]) > 0 for row in rows[1:])
    assert str(tmp_path) not in Path("/proc/mounts").read_text()
