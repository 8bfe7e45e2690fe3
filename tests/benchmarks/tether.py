"""What tethering costs over 2,000 shots: memory, descriptors and processes, and processor time when nothing comes.

    PYTHONPATH=daemon python tests/benchmarks/tether.py [--shots 2000]

The real daemon tethers a PTP/IP camera on loopback, whose shots are tiny raw
files, so that what is measured is not the statistic of a sensor.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from daemons import Daemon, cpu_s, memory_mb
from hotpixd.simulate import VirtualSensor, write_series
from ptpip_camera import LoopbackCamera


def children(pid: int) -> list[int]:
    """Return the processes that a process has started and that live."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            if int(path.read_text().rpartition(")")[2].split()[1]) == pid:
                found.append(int(path.parent.name))
    return found


def main() -> None:
    """Shoot, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shots", type=int, default=2000)
    parser.add_argument("--settle", type=float, default=45.0, help="until the last listing and checkpoint are over, s")
    parser.add_argument("--idle", type=float, default=60.0, help="how long processor time is measured, s")
    options = parser.parse_args()
    shots = options.shots
    with (
        tempfile.TemporaryDirectory() as folder,
        tempfile.TemporaryDirectory(prefix="hpx") as runtime,
        LoopbackCamera("generic") as camera,
    ):
        root = Path(folder)
        sensor = VirtualSensor(64, 48, hot=2, stuck=1, dead=1)
        for _ in write_series(root / "shots", sensor, shots, "moving"):
            pass
        (root / "shots" / "truth.json").unlink()
        camera.capture_folder(root / "shots")
        settings = f"cameras:\n  - {{port: '{camera.port}', verify_after_s: 5}}\ncheckpoint: {{every_shots: 100}}\n"
        (root / "config.yaml").write_text(settings)
        daemon = Daemon(root / "state", Path(runtime), "run", "--config", root / "config.yaml").wait_ready()
        try:
            measure(daemon, camera, shots)
            time.sleep(options.settle)
            measure_idle(daemon, options.idle)
        finally:
            daemon.stop()
            daemon.close()


def measure(daemon: Daemon, camera: LoopbackCamera, shots: int) -> None:
    """Print a line now and then while shots are taken."""
    pid = daemon.process.pid
    print("| shots | daemon, MB | worker, MB | descriptors | processes |\n| --- | --- | --- | --- | --- |")
    began = time.monotonic()
    for number in range(1, shots + 1):
        camera.shoot()
        time.sleep(0.01)
        if number % (shots // 8) == 0:
            daemon.wait_folded(number)
            workers = children(pid)
            worker_mb = sum(memory_mb(worker) for worker in workers)
            descriptors = len(list(Path(f"/proc/{pid}/fd").iterdir()))
            print(f"| {number} | {memory_mb(pid):.1f} | {worker_mb:.1f} | {descriptors} | {1 + len(workers)} |")
    print(f"\n{shots / (time.monotonic() - began):.1f} shots/s")


def measure_idle(daemon: Daemon, idle_s: float) -> None:
    """Print what daemon and worker take while nothing comes."""
    pids = [daemon.process.pid, *children(daemon.process.pid)]
    before = [cpu_s(each) for each in pids]
    time.sleep(idle_s)
    used = [100 * (cpu_s(each) - earlier) / idle_s for each, earlier in zip(pids, before, strict=True)]
    print(f"Idle with the camera attached: daemon {used[0]:.2f} %, worker {sum(used[1:]):.2f} % of a core.")


if __name__ == "__main__":
    main()
