"""Scans on a cluster: the same state as on one machine, bit for bit, whatever dies on the way."""

from __future__ import annotations

import os
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("distributed", reason="the extra `cluster` is not installed")

from clusters import cluster_feed, fates, scheduler, whole
from conftest import environment, feed, run, told
from hotpixd.cluster import connection
from hotpixd.cluster.connection import ClusterError, connected
from hotpixd.cluster.coordinator import ClusterMonitor
from hotpixd.cluster.inputs import find_inputs
from hotpixd.core.frame import ShotKind
from hotpixd.monitor import Fate
from hotpixd.simulate import VirtualSensor, write_series
from hotpixd.store.state import State
from pictures import SHARED, mosaic, write_dng

HOOKS = Path(__file__).with_name("cluster_hooks")


@pytest.fixture(scope="module")
def client() -> Iterator[Any]:
    """Two workers here, which all tests of this file share."""
    with connected("local:2") as client:
        yield client


def series(folder: Path, frames: int, scene: Any, file_format: Any = "dng", *, serial: str = "V0007", seed: int = 7):
    sensor = VirtualSensor(300, 220, hot=12, stuck=3, dead=3, seed=seed, serial=serial)
    for _ in write_series(folder, sensor, frames, scene, file_format):
        pass
    return sensor


@pytest.fixture(scope="module")
def shoebox(tmp_path_factory: pytest.TempPathFactory, camera, other_camera, pairs) -> Path:
    """Everything that people have on their disks, in one folder."""
    box = tmp_path_factory.mktemp("shoebox")
    series(box / "b moving", 8, "moving")
    series(box / "c tripod", 6, "tripod")
    series(box / "d darks", 6, "dark")
    series(box / "e moving", 5, "moving", "jpg", serial="V0008")
    shutil.copytree(camera.folder, box / "a")
    shutil.copytree(pairs.folder, box / "f pairs")
    # Of the raw of one there is nothing to learn: its JPEG is folded.
    (box / "f pairs" / "frame_0002.dng").write_bytes(b"no picture")
    # Two bodies in turn, and all shots of a folder once more under other names.
    (box / "g").mkdir()
    for number, (one, other) in enumerate(zip(camera.shots[:6], other_camera.shots, strict=True)):
        shutil.copyfile(other, box / "g" / f"{number}a.dng")
        shutil.copyfile(one, box / "g" / f"{number}b.dng")
    # A copy of a raw, but not of its companion's name; the same JPEG as a companion.
    shutil.copyfile(box / "f pairs" / "frame_0003.jpg", box / "g" / "alone.jpg")
    for k in range(3):
        write_dng(box / f"h{k}.dng", mosaic(level=600.0 + k))
        write_dng(box / f"i{k}.dng", mosaic(level=700.0 + k) // 4, black=64, white=4095)
    (box / "j.cr2").write_bytes(b"II*\0" + bytes(3000))
    (box / "k.jpg").write_bytes(b"")
    (box / "._k.jpg").write_bytes(b"")
    return box


@pytest.fixture(scope="module")
def here(shoebox: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What one machine makes of it."""
    root = tmp_path_factory.mktemp("here") / "state"
    outcomes = feed(root, shoebox)
    return {"fates": fates(outcomes), **whole(root)}


@pytest.mark.parametrize(("chunk", "every"), [(3, 10), (64, 1024)])
def test_a_cluster_tells_what_one_machine_tells(client, shoebox, here, tmp_path, chunk, every):
    """Digests, defects, transitions, rows, reasons, every byte of every statistic; however it is cut."""
    outcomes = cluster_feed(client, tmp_path / "state", shoebox, chunk_shots=chunk, checkpoint_every_shots=every)
    assert fates(outcomes) == here["fates"]
    again = whole(tmp_path / "state")
    for name, expected in again.items():
        assert expected == here[name], name


def test_the_luma_of_jpegs_is_what_one_machine_makes_of_it(client, shoebox, tmp_path):
    """Though the same workers have just had the same files for a scan of all colours."""
    folder = shoebox / "e moving"
    cluster_feed(client, tmp_path / "colours", folder, chunk_shots=2)
    cluster_feed(client, tmp_path / "luma", folder, chunk_shots=2, luma=True)
    assert run("scan", "--luma", "--state", tmp_path / "here", folder).returncode == 0
    assert whole(tmp_path / "luma") == whole(tmp_path / "here")
    assert whole(tmp_path / "luma")["digests"] != whole(tmp_path / "colours")["digests"]


def test_lights_that_are_called_darks_are_no_evidence_there_either(client, shoebox, tmp_path):
    """A worker tells that light has fallen on them."""
    wanted = shoebox / "b moving", shoebox / "d darks"
    cluster_feed(client, tmp_path / "cluster", *wanted, kind=ShotKind.DARK, chunk_shots=3)
    assert run("scan", "--kind", "dark", "--state", tmp_path / "here", *wanted).returncode == 0
    assert whole(tmp_path / "cluster") == whole(tmp_path / "here")
    (sensor,) = whole(tmp_path / "cluster")["defects"]["sensors"]
    assert (sensor["frames"], sensor["frames_counted"]) == (14, 6)


def test_the_shoebox_holds_what_it_should(here):
    """The control: each kind of shot is there, or the equality above says little."""
    kinds = {fate for _, fate, _ in here["fates"]}
    assert kinds == {"folded", "refused", "known", "companion"}
    assert len(here["statistics"]) == 8
    changes = {t.change for rows in here["transitions"].values() for t in rows}
    assert {"appeared", "stable"} <= changes
    assert any(sensor["frames_counted"] < sensor["frames"] for sensor in here["defects"]["sensors"])


def test_planted_defects_are_found(client, tmp_path):
    """And nothing else: the way over workers keeps positions."""
    sensor = series(tmp_path / "shots", 12, "moving")
    cluster_feed(client, tmp_path / "state", tmp_path / "shots", chunk_shots=3)
    (found,) = told(tmp_path / "state")["defects"]["sensors"]
    stable = {(d["x"], d["y"]) for d in found["defects"] if d["state"] == "stable"}
    assert stable
    assert stable <= {(d.x, d.y) for d in sensor.defects}


def test_a_sensor_without_defects_has_none(client, tmp_path):
    """The control."""
    for _ in write_series(tmp_path / "shots", VirtualSensor(200, 150, hot=0, stuck=0, dead=0, seed=4), 8, "moving"):
        pass
    cluster_feed(client, tmp_path / "state", tmp_path / "shots", chunk_shots=3)
    (found,) = told(tmp_path / "state")["defects"]["sensors"]
    assert not [d for d in found["defects"] if d["state"] == "stable"]


def test_what_is_known_is_not_read_again(client, camera, tmp_path):
    """A second run knows files by their size and time; a file that changed is another shot."""
    shutil.copytree(camera.folder, tmp_path / "shots")
    cluster_feed(client, tmp_path / "state", tmp_path / "shots", chunk_shots=5)
    before = whole(tmp_path / "state")
    with State(tmp_path / "state") as state:
        inputs = find_inputs([str(tmp_path / "shots")], None)
        monitor = ClusterMonitor(state, client, inputs.marks)
        orders = [chunk.order for chunk in monitor._chunks(list(inputs.listing.shots))]
        assert not any(order.shots for order in orders)
    outcomes = cluster_feed(client, tmp_path / "state", tmp_path / "shots")
    assert {o.fate for o in outcomes} == {Fate.KNOWN}
    assert whole(tmp_path / "state") == before
    changed = tmp_path / "shots" / "frame_0003.dng"
    write_dng(changed, mosaic(level=610.0))
    outcomes = cluster_feed(client, tmp_path / "state", tmp_path / "shots")
    assert [o.path for o in outcomes if o.fate == Fate.FOLDED] == [changed]


def test_machine_and_cluster_take_turns(client, camera, tmp_path):
    """One state: what the one began, the other goes on with."""
    feed(tmp_path / "here", camera.folder)
    state = tmp_path / "state"
    cluster_feed(client, state, *camera.shots[:4], chunk_shots=3)
    feed(state, *camera.shots[2:7])
    cluster_feed(client, state, *camera.shots[5:], chunk_shots=2)
    feed(state, camera.folder)
    assert whole(state) == whole(tmp_path / "here")


def test_interrupted_it_goes_on(client, shoebox, here, tmp_path):
    """Ctrl-C: what was followed is committed, the rest is left."""
    asked = []

    def stop() -> bool:
        asked.append(1)
        return len(asked) > 8

    first = cluster_feed(client, tmp_path / "state", shoebox, stop=stop, chunk_shots=4)
    assert 0 < len(first) < len(here["fates"])
    cluster_feed(client, tmp_path / "state", shoebox, chunk_shots=4)
    assert whole(tmp_path / "state") == {k: v for k, v in here.items() if k != "fates"}


def test_a_killed_worker_loses_and_doubles_nothing(client, shoebox, here, tmp_path):
    """SIGKILL amid the scan, while it holds sums that were not merged yet."""
    inputs = find_inputs([str(shoebox)], None)
    pids = list(client.run(os.getpid).values())
    with State(tmp_path / "state") as state, ClusterMonitor(state, client, inputs.marks, chunk_shots=3) as monitor:
        outcomes = []
        for outcome in monitor.process(inputs.listing.shots):
            outcomes.append(outcome)
            if len(outcomes) in (20, 40):
                os.kill(pids.pop(), signal.SIGKILL)
        monitor.checkpoint()
    assert not pids
    assert fates(outcomes) == here["fates"]
    assert whole(tmp_path / "state") == {k: v for k, v in here.items() if k != "fates"}


def test_a_straggler_is_overtaken(client, camera, scanned, tmp_path):
    """A worker that stands still keeps nobody waiting, and what it does later counts for nothing."""
    with connected("local:2") as other:
        (pid, *_) = other.run(os.getpid).values()
        inputs = find_inputs([str(camera.folder)], None)
        options = {"chunk_shots": 2, "straggles_after_s": 1.0}
        with State(tmp_path / "state") as state, ClusterMonitor(state, other, inputs.marks, **options) as monitor:
            os.kill(pid, signal.SIGSTOP)
            threading.Timer(6.0, os.kill, (pid, signal.SIGCONT)).start()
            outcomes = list(monitor.process(inputs.listing.shots))
            monitor.checkpoint()
    assert len(outcomes) == 12
    assert whole(tmp_path / "state") == whole(scanned)


@pytest.mark.parametrize("at", ["ahead_of_ledger:kill", "amid_generation:kill:2", "before_prune:kill"])
def test_a_killed_scan_goes_on(camera, scanned, tmp_path, at):
    """Amid a checkpoint: a generation of which the ledger knows nothing is not used, and no damage is told of."""
    state = tmp_path / "state"
    cluster = ("--cluster", "local:1", "--state", state)
    assert run("scan", *camera.shots[:5], *cluster).returncode == 0
    killed = run("scan", camera.folder, *cluster, env=environment(HOTPIXD_FAILPOINT=at))
    assert killed.returncode == -signal.SIGKILL
    done = run("scan", camera.folder, *cluster)
    assert (done.returncode, done.stderr) == (0, "")
    assert not (state / "damaged").exists()
    assert whole(state) == whole(scanned)


def test_a_file_that_kills_workers_is_refused(camera, tmp_path):
    """However often: the shots around it are folded, and it is said why it is not."""
    shutil.copytree(camera.folder, tmp_path / "shots")
    deadly = tmp_path / "shots" / "frame_0005.dng"
    deadly.write_bytes(deadly.read_bytes() + b"DEADLY")
    refused = run("scan", tmp_path / "shots", "--cluster", "local:2", "--state", tmp_path / "state", env=hooked())
    assert refused.returncode == 1
    assert "11 shots folded, 1 refused" in refused.stdout
    assert "it killed every worker that it was given to" in refused.stdout
    feed(tmp_path / "other", *(shot for shot in sorted((tmp_path / "shots").glob("*.dng")) if shot != deadly))
    assert told(tmp_path / "state")["digests"] == told(tmp_path / "other")["digests"]


def hooked() -> dict[str, str]:
    """Return an environment in which workers die of files that end with DEADLY."""
    return environment(PYTHONPATH=os.pathsep.join([str(HOOKS), environment()["PYTHONPATH"]]))


def test_a_crashing_decoder_costs_no_worker(client, camera, tmp_path):
    """It has a process of its own there, too."""
    broken = tmp_path / "broken.dng"
    whole_file = camera.shots[0].read_bytes()
    broken.write_bytes(whole_file[: len(whole_file) // 2])
    pids = set(client.run(os.getpid).values())
    outcomes = cluster_feed(client, tmp_path / "state", broken, *camera.shots[:2])
    assert [str(o.fate) for o in outcomes] == ["refused", "folded", "folded"]
    assert set(client.run(os.getpid).values()) == pids


# --- real frames


@pytest.mark.skipif(not SHARED.is_dir(), reason="the folder of real frames is not on this machine")
@pytest.mark.parametrize("name", ["flea3_d1_dng_derived", "tetra3_bfs_jpeg", "raw_misc", "emva_ccd12"])
def test_real_frames_tell_the_same(client, tmp_path, name):
    """Of all kinds of cameras, those refused included."""
    expected = fates(feed(tmp_path / "here", SHARED / name))
    outcomes = cluster_feed(client, tmp_path / "state", SHARED / name, chunk_shots=5, checkpoint_every_shots=12)
    assert fates(outcomes) == expected
    assert whole(tmp_path / "state") == whole(tmp_path / "here")


# --- what can be wrong


def test_a_missing_scheduler_is_told_of(camera, tmp_path):
    """In a sentence that says how to start one; the exit code is that of wrong use. No state is begun."""
    done = run("scan", camera.folder, "--cluster", "tcp://127.0.0.1:9", "--state", tmp_path / "state")
    assert done.returncode == 2
    assert "no scheduler answers at tcp://127.0.0.1:9" in done.stderr
    assert "dask scheduler" in done.stderr
    assert not (tmp_path / "state").exists()


@pytest.mark.parametrize("address", ["here", "local:0", "local:many", "localhost"])
def test_what_is_no_address_is_told_of(camera, tmp_path, address):
    """By what would be one."""
    done = run("scan", camera.folder, "--cluster", address, "--state", tmp_path / "state")
    assert done.returncode == 2
    assert "--cluster takes local, local:4 or a scheduler's address" in done.stderr


def test_without_the_extra_the_command_for_it_is_named(camera, tmp_path):
    """Dask is a large thing that most do not need."""
    (tmp_path / "distributed.py").write_text("raise ImportError('No module named distributed')")
    env = environment(PYTHONPATH=os.pathsep.join([str(tmp_path), environment()["PYTHONPATH"]]))
    done = run("scan", camera.folder, "--cluster", "local", "--state", tmp_path / "state", env=env)
    assert done.returncode == 2
    assert "pip install 'hotpixd[cluster]'" in done.stderr


def test_another_version_on_a_worker_is_told_of(camera, tmp_path, client):
    """Other decoders give other samples: no silent difference."""
    client.run(pretend_version, "0.0.1")
    try:
        done = run("scan", camera.folder, "--cluster", client.scheduler.address, "--state", tmp_path / "state")
    finally:
        client.run(pretend_version, None)
    assert done.returncode == 2
    assert "has hotpixd 0.0.1" in done.stderr
    assert "pip install" in done.stderr


def pretend_version(version: str | None) -> None:
    """On a worker: let the installed hotpixd seem to be another."""
    import importlib.metadata as metadata

    real = getattr(metadata, "real_version", metadata.version)
    metadata.real_version = real
    metadata.version = real if version is None else lambda name: version if name == "hotpixd" else real(name)


def test_a_scheduler_that_goes_ends_the_scan_in_a_sentence(camera, tmp_path, runtime, monkeypatch):
    """What was committed stays, and the next run goes on. What is asked when it has gone is never answered."""
    monkeypatch.setattr(connection, "_CONNECT_WITHIN_S", 3.0)
    with scheduler(runtime) as (address, process):
        inputs = find_inputs([str(camera.folder)], None)
        with (
            connected(address) as other,
            pytest.raises(ClusterError, match="is gone"),
            State(tmp_path / "state") as state,
            ClusterMonitor(state, other, inputs.marks, chunk_shots=2, checkpoint_every_shots=4) as monitor,
        ):
            for number, _ in enumerate(monitor.process(inputs.listing.shots)):
                if number == 4:
                    process.kill()
                    while other.status == "running":
                        time.sleep(0.01)
    with State(tmp_path / "state", create=False) as state:
        assert state.ledger.last_seq == 4
