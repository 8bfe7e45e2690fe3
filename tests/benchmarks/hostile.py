"""Show what hostile clients of the feed and of the metrics cost a daemon, beside one that only spins.

For each sort of client: starts the daemon on an empty directory, lets the client loose, writes shots one by one and
measures the time from closing the file to the change on the feed of a well-behaved client, then a heap of shots, and
measures how many are folded per second. Prints a Markdown table. As root, the hostile client is another user, who is
let in by the mode of the socket. From the repository, on a quiet machine:

    PYTHONPATH=daemon python tests/benchmarks/hostile.py

The row "spins" is the control: a process that takes as much of the processor, and does nothing else.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

from latency import RUN, Feed

ATTACKER = 65534
PORT = 19472


def _connected(path: str) -> socket.socket | None:
    connection = socket.socket(socket.AF_UNIX)
    connection.settimeout(0.5)
    try:
        connection.connect(path)
    except OSError:
        connection.close()
        return None
    return connection


def spins(_path: str) -> None:
    """Take a processor, and nothing else."""
    while True:
        pass


def never_reads(path: str) -> None:
    """Watch and ask on as many connections as there may be, and take nothing."""
    held = []
    while True:
        connection = _connected(path)
        if connection is not None:
            held.append(connection)
            with contextlib.suppress(OSError):
                connection.sendall(b'{"ask":"watch"}\n' + b'{"ask":"defects","candidates":true,"id":1}\n' * 4)
        if len(held) > 500:
            held.pop(0).close()
        time.sleep(0.005)


def garbage(path: str) -> None:
    """Send what is no line, half a line, a line without end, one nested a thousand times, bytes."""
    lines = (
        os.urandom(5000),
        b'{"ask":',
        b"x" * 10_000_000,
        b"[" * 30_000 + b"\n",
        b'{"ask":1}\n',
        b"\0" * 70_000 + b"\n",
    )
    while True:
        connection = _connected(path)
        if connection is not None:
            with contextlib.suppress(OSError), connection:
                connection.sendall(random.choice(lines))


def connects(path: str) -> None:
    """Come and go, 100,000 times and more."""
    count = 0
    while True:
        connection = socket.socket(socket.AF_UNIX)
        connection.setblocking(False)
        with contextlib.suppress(OSError), connection:
            connection.connect(path)
        count += 1


def holds(path: str) -> None:
    """Hold as many connections as descriptors allow, and say nothing."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    held = []
    while True:
        connection = _connected(path)
        if connection is None:
            time.sleep(0.01)
        else:
            held.append(connection)


def asks(path: str) -> None:
    """Ask for the most expensive things there are on 60 connections, and read all answers."""
    questions = [{"ask": "verify"}, {"ask": "defects", "candidates": True}, {"ask": "least-variance", "k": 1000}]
    held: list[socket.socket] = []
    while True:
        while len(held) < 60 and (connection := _connected(path)) is not None:
            connection.setblocking(False)
            held.append(connection)
        for connection in list(held):
            try:
                with contextlib.suppress(BlockingIOError):
                    if not connection.recv(1 << 20):
                        raise ConnectionError
                with contextlib.suppress(BlockingIOError):
                    connection.send(json.dumps({**random.choice(questions), "id": 1}).encode() + b"\n")
            except OSError:
                held.remove(connection)
                connection.close()
        time.sleep(0.002)


def slow_scrapes(_path: str) -> None:
    """Send a request for the metrics byte by byte on 500 connections, and come again when hung up on."""
    held: list[socket.socket] = []
    while True:
        if len(held) < 500:
            with contextlib.suppress(OSError):
                connection = socket.create_connection(("127.0.0.1", PORT), 0.5)
                connection.setblocking(False)
                held.append(connection)
        for connection in list(held):
            try:
                connection.send(b"X")
            except BlockingIOError:
                pass
            except OSError:
                held.remove(connection)
                connection.close()
        time.sleep(0.01)


CLIENTS: tuple[Callable[[str], None], ...] = (spins, never_reads, garbage, connects, holds, asks, slow_scrapes)


def measured(client: Callable[[str], None] | None, pictures: list[Path], singly: int, work: Path) -> list[str]:
    """Return the cells of a row."""
    from hotpixd.feed import FeedClient, FeedError, find_sockets

    inbox, state = work / "inbox", work / "state"
    inbox.mkdir()
    work.chmod(0o755)
    env = os.environ | {"XDG_RUNTIME_DIR": str(work), "HOTPIXD_METRICS__LISTEN": f"127.0.0.1:{PORT}"}
    daemon = subprocess.Popen([*RUN, "watch", str(inbox), "--state", str(state), "--plain"], env=env, stderr=-3)
    attacker = None
    try:
        good = None
        while good is None:
            time.sleep(0.2)
            with contextlib.suppress(FeedError, IndexError):
                path = find_sockets(env)[0]
                good = FeedClient(path)
        feed = Feed(good)
        time.sleep(3)
        if client is not None:
            if os.geteuid() == 0:
                path.parent.chmod(0o755)
                path.chmod(0o666)
            attacker = os.fork()
            if attacker == 0:
                if os.geteuid() == 0:
                    os.setgroups([])
                    os.setgid(ATTACKER)
                    os.setuid(ATTACKER)
                with contextlib.suppress(BaseException):
                    client(str(path))
                os._exit(0)
            time.sleep(3)
        took = []
        for n, picture in enumerate(pictures[:singly], 1):
            shutil.copyfile(picture, inbox / f".{picture.name}")
            (inbox / f".{picture.name}").rename(inbox / picture.name)
            closed = time.perf_counter()
            took.append(feed.wait(n) - closed)
            time.sleep(0.1)
        heap = work / "heap"
        heap.mkdir()
        for picture in pictures[singly:]:
            shutil.copyfile(picture, heap / picture.name)
        began = time.perf_counter()
        for picture in sorted(heap.iterdir()):
            picture.rename(inbox / picture.name)
        while max(feed.seen_at) < len(pictures):
            time.sleep(0.01)
            if time.perf_counter() - began > 120:
                raise SystemExit("shots do not come any more")
        rate = (len(pictures) - singly) / (feed.seen_at[max(feed.seen_at)] - began)
        process = Path(f"/proc/{daemon.pid}")
        descriptors = sum(1 for _ in (process / "fd").iterdir())
        resident = int((process / "status").read_text().partition("VmRSS:")[2].split()[0]) / 1000
        took.sort()
        cells = [
            f"{1000 * median(took):.0f} ms",
            f"{1000 * took[int(len(took) * 0.9)]:.0f} ms",
            f"{1000 * took[-1]:.0f} ms",
        ]
        return [*cells, f"{rate:.1f}", str(descriptors), f"{resident:.0f} MB"]
    finally:
        if attacker:
            os.kill(attacker, 9)
            os.waitpid(attacker, 0)
        daemon.terminate()
        daemon.wait()


def main() -> None:
    """Measure and print."""
    from hotpixd.simulate import VirtualSensor, write_series

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, nargs=2, default=(1500, 1000), metavar=("WIDTH", "HEIGHT"))
    parser.add_argument("--singly", type=int, default=40, help="shots that come one by one")
    parser.add_argument("--heap", type=int, default=60, help="shots that come at once")
    parser.add_argument("--only", nargs="*", help="names of clients")
    given = parser.parse_args()
    print("| client | median | 90 % | longest | shots/s | descriptors | memory |\n|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory(prefix="hpx") as temporary:
        Path(temporary).chmod(0o755)
        made = Path(temporary) / "pictures"
        for _ in write_series(made, VirtualSensor(*given.size), given.singly + given.heap, "moving", "dng"):
            pass
        pictures = sorted(made.glob("*.dng"))
        for client in (None, *CLIENTS):
            name = "none" if client is None else client.__name__.replace("_", " ")
            if given.only and name not in given.only:
                continue
            work = Path(temporary) / name.replace(" ", "")
            work.mkdir()
            print("| " + " | ".join([name, *measured(client, pictures, given.singly, work)]) + " |", flush=True)
            shutil.rmtree(work)


if __name__ == "__main__":
    sys.exit(main())
