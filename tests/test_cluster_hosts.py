"""A cluster of three hosts, each a network namespace: nothing is shared but the network, and the shots come by HTTP."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("distributed", reason="the extra `cluster` is not installed")

from clusters import comparable, killed_at_last
from conftest import HOTPIXD, environment, feed

HOSTS = ("head", "one", "two")
SUBNET = "10.77.77"
"""Only within the namespaces."""


def ip(*arguments: str, at: str | None = None) -> None:
    inside = ["-n", at] if at else []
    subprocess.run(["ip", *inside, *arguments], check=True, capture_output=True)


@pytest.fixture
def hosts() -> Iterator[dict[str, str]]:
    """Three namespaces on one bridge, which is in the first; gives the namespace of each host."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("network namespaces take root and the command ip")
    names = {host: f"hpx{os.getpid()}-{host}" for host in HOSTS}
    with ExitStack() as made:
        for host in HOSTS:
            try:
                ip("netns", "add", names[host])
            except subprocess.CalledProcessError as error:
                pytest.skip(f"this machine makes no network namespaces: {error.stderr.decode().strip()}")
            made.callback(subprocess.run, ["ip", "netns", "del", names[host]])
            ip("link", "set", "lo", "up", at=names[host])
        ip("link", "add", "bridge", "type", "bridge", at=names["head"])
        ip("addr", "add", f"{SUBNET}.1/24", "dev", "bridge", at=names["head"])
        ip("link", "set", "bridge", "up", at=names["head"])
        for number, host in enumerate(HOSTS[1:], 2):
            ip("link", "add", f"to-{host}", "type", "veth", "peer", "name", "eth0", "netns", names[host],
               at=names["head"])  # fmt: skip
            ip("link", "set", f"to-{host}", "master", "bridge", "up", at=names["head"])
            ip("addr", "add", f"{SUBNET}.{number}/24", "dev", "eth0", at=names[host])
            ip("link", "set", "eth0", "up", at=names[host])
        yield names


@pytest.fixture
def cluster(hosts: dict[str, str], camera: Any, runtime: Path) -> Iterator[tuple[Callable[..., Any], dict[str, Any]]]:
    """A web server and a scheduler on the head, a worker on each of the others; gives what starts a command there."""

    def start(host: str, *command: object, **how: Any) -> subprocess.Popen[str]:
        # As on another machine: the shots are not there.
        hidden = f'mount -t tmpfs none {camera.folder} && exec "$@"' if host != "head" else 'exec "$@"'
        inside = ["ip", "netns", "exec", hosts[host], "unshare", "-m", "sh", "-c", hidden, "sh"]
        return subprocess.Popen([*inside, *map(str, command)], env=environment(), text=True, cwd=runtime, **how)

    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    dask = [sys.executable, "-m", "dask"]
    address = f"tcp://{SUBNET}.1:8786"
    processes = {}
    with ExitStack() as running:
        web = ("-m", "http.server", "8000", "--bind", f"{SUBNET}.1", "--directory", camera.folder)
        running.enter_context(killed_at_last(start("head", sys.executable, *web, **quiet)))
        order = (*dask, "scheduler", "--host", f"{SUBNET}.1", "--port", "8786", "--no-dashboard")
        running.enter_context(killed_at_last(start("head", *order, **quiet)))
        for host in HOSTS[1:]:
            order = (*dask, "worker", address, "--nthreads", "1", "--no-dashboard", "--local-directory", runtime / host)
            processes[host] = start(host, *order, **quiet)
            running.enter_context(killed_at_last(processes[host]))
        yield start, processes


def scanned_there(start: Callable[..., Any], state: Path) -> subprocess.Popen[str]:
    order = ("scan", "--state", state, "--cluster", f"tcp://{SUBNET}.1:8786", f"http://{SUBNET}.1:8000/")
    return start("head", *HOTPIXD, *order, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)  # type: ignore[no-any-return]


def test_three_hosts_tell_what_one_machine_tells(cluster, camera, tmp_path):
    """Same digest, defects, transitions and rows; the workers cannot see the files but over the network."""
    feed(tmp_path / "here", camera.folder)
    start, _ = cluster
    scan = scanned_there(start, tmp_path / "there")
    said, _ = scan.communicate(timeout=200)
    assert scan.returncode == 0, said
    assert comparable(tmp_path / "there") == comparable(tmp_path / "here")


def test_a_host_that_dies_amid_the_scan_changes_nothing(cluster, hosts, camera, tmp_path):
    """All processes of one host are killed once its worker is at work."""
    feed(tmp_path / "here", camera.folder)
    start, _ = cluster
    scan = scanned_there(start, tmp_path / "there")
    until = time.monotonic() + 60
    victims: list[int] = []
    # A decoder there: it has a chunk.
    while scan.poll() is None and time.monotonic() < until and not victims:
        pids = subprocess.run(["ip", "netns", "pids", hosts["two"]], capture_output=True, text=True).stdout.split()
        commands = [Path(f"/proc/{pid}/cmdline") for pid in pids]
        if any(b"decode_worker" in path.read_bytes() for path in commands if path.exists()):
            victims = [int(pid) for pid in pids]
        time.sleep(0.02)
    assert victims, "the worker on host two never began"
    for pid in victims:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    said, _ = scan.communicate(timeout=200)
    assert scan.returncode == 0, said
    assert comparable(tmp_path / "there") == comparable(tmp_path / "here")
