"""What several tests share: the command as a process, simulated shots, and all that a state tells."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

# Before numba is imported: the kernels are compiled once for all tests and all processes that they start.
os.environ.setdefault("NUMBA_CACHE_DIR", str(Path(tempfile.gettempdir()) / f"hotpixd-test-kernels-{os.getuid()}"))

import hotpixd
from hotpixd.core.frame import Frame
from hotpixd.core.sensor import warm_up
from hotpixd.intake import dng
from hotpixd.intake.decoders import Decoders
from hotpixd.intake.files import find_shots
from hotpixd.monitor import Monitor, Outcome
from hotpixd.simulate import VirtualSensor, write_series
from hotpixd.store.state import State
from hotpixd.views import answers

# A shell that starts them in the background has them ignore Ctrl-C, and whatever they start too.
signal.signal(signal.SIGINT, signal.default_int_handler)

_SCRIPT = Path(sys.executable).with_name("hotpixd")
HOTPIXD = [str(_SCRIPT)] if _SCRIPT.exists() else [sys.executable, "-c", "from hotpixd.cli import main; main()"]
"""The command, as a user would start it."""

_LONGEST = ("service", "cli", "systemd_boot", "cluster", "darks", "faults_power", "faults_kills", "directory", "camera")
"""Files of tests that take longest: begun last, one of them would be run alone at the end."""

_OF_THE_USER = (
    "COLUMNS",
    "FORCE_COLOR",
    "HOTPIXD_FAILPOINT",
    "LINES",
    "NO_COLOR",
    "RUNTIME_DIRECTORY",
    "STATE_DIRECTORY",
)


def environment(**changes: str) -> dict[str, str]:
    """Return an environment for the command that does not depend on who runs the tests."""
    plain = {name: value for name, value in os.environ.items() if name not in _OF_THE_USER}
    return {**plain, "PYTHONPATH": str(Path(hotpixd.__file__).parents[1]), **changes}


def run(
    *arguments: object, env: dict[str, str] | None = None, prefix: Sequence[str] = (), **options: Any
) -> subprocess.CompletedProcess[str]:
    """Run the command to its end and return what it said; never with a traceback."""
    done = subprocess.run(
        [*prefix, *HOTPIXD, *map(str, arguments)],
        env=env or environment(),
        text=True,
        errors="surrogateescape",
        timeout=120,
        **{"capture_output": True, **options},
    )
    assert "Traceback" not in (done.stderr or ""), done.stderr
    return done


@pytest.hookimpl(tryfirst=True)
def pytest_sessionstart(session: pytest.Session) -> None:
    """Have the kernels compiled once, before several processes want them at the same moment."""
    if not hasattr(session.config, "workerinput"):
        warm_up()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the files that take longest first."""
    first = {f"test_{name}.py": place for place, name in enumerate(_LONGEST)}
    items.sort(key=lambda item: first.get(item.path.name, len(first)))


@pytest.fixture
def no_dng_known() -> Iterator[None]:
    """Have no header of a DNG be known to this process, before and after."""

    def forget() -> None:
        dng._known.clear()
        dng._learned_in_vain = 0

    forget()
    yield
    forget()


def same(one: Frame, other: Frame) -> bool:
    """Tell whether two frames are equal in all they hold."""
    return np.array_equal(one.samples, other.samples) and replace(one, samples=other.samples) == other


@cache
def decoders() -> Decoders:
    """Return decoders that all tests of this process share; each takes a while to start."""
    return Decoders()


def feed(root: Path, *wanted: Path, kind: Any = None) -> list[Outcome]:
    """Scan some paths into a state in this process, and checkpoint."""
    with State(root) as state, Monitor(state, decoders=decoders()) as monitor:
        outcomes = list(monitor.replay())
        outcomes += monitor.process(find_shots(map(str, wanted), kind).shots)
        monitor.checkpoint()
    return outcomes


def told(root: Path) -> dict[str, Any]:
    """Return all that a state tells and that must not depend on how its shots came in; it must be undamaged.

    Rows are told by their place among those folded: a torn file is waited for, and refused earlier or later.
    """
    with State(root, create=False) as state:
        checked = answers.verify(state)
        assert checked["ok"], checked["problems"]
        assert not checked["waiting"]
        ids = list(state.ledger.sensors())
        folded = [row.seq for row in state.ledger.rows_to_replay({}) if row.verdict == "folded"]
        place = {seq: n for n, seq in enumerate(folded, 1)}
        return {
            "digests": {sensor["id"]: sensor["digest"] for sensor in checked["sensors"]},
            "defects": answers.defects(state, candidates=True),
            "transitions": {
                id_: [replace(row, seq=place[row.seq]) for row in state.ledger.transitions(id_)] for id_ in ids
            },
            "observations": {
                id_: [row._replace(seq=place[row.seq]) for row in state.ledger.observations(id_)] for id_ in ids
            },
            "least": answers.least_variance(state, 20),
            "refused": sorted((row.name, row.reason) for row in state.ledger.refused()),
            "shots": [{k: v for k, v in shot.items() if k != "received_at"} for shot in _last_shots(state, ids)],
        }


def _last_shots(state: State, ids: Iterable[str]) -> list[dict[str, Any]]:
    return [sensor["last_shot"] for sensor in answers.status(state)["sensors"] if sensor["id"] in ids]


@contextmanager
def nobody() -> Iterator[None]:
    """Give up root's right to open everything."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@dataclass(frozen=True)
class Camera:
    """Shots of a virtual camera on the disk."""

    sensor: VirtualSensor
    folder: Path

    @property
    def shots(self) -> list[Path]:
        """The files, in the order in which they were taken."""
        return sorted(self.folder.glob("frame_*"))


def _camera(folder: Path, frames: int, serial: str, seed: int, *formats: Any) -> Camera:
    sensor = VirtualSensor(200, 150, hot=8, stuck=3, dead=3, seed=seed, serial=serial)
    for file_format in formats:
        for _ in write_series(folder, sensor, frames, "moving", file_format):
            pass
    (folder / "truth.json").unlink()
    return Camera(sensor, folder)


@pytest.fixture(scope="session")
def camera(tmp_path_factory: pytest.TempPathFactory) -> Camera:
    """Twelve raw shots of one camera. Not to be changed: files are linked into states."""
    return _camera(tmp_path_factory.mktemp("camera"), 12, "V0001", 1, "dng")


@pytest.fixture(scope="session")
def other_camera(tmp_path_factory: pytest.TempPathFactory) -> Camera:
    """Six raw shots of another body of the same model."""
    return _camera(tmp_path_factory.mktemp("other"), 6, "V0002", 2, "dng")


@pytest.fixture(scope="session")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Camera:
    """Six shots of a third body, each as raw and as JPEG."""
    return _camera(tmp_path_factory.mktemp("pairs"), 6, "V0003", 3, "dng", "jpg")


@pytest.fixture(scope="session")
def scanned(tmp_path_factory: pytest.TempPathFactory, camera: Camera) -> Path:
    """A state with the camera's twelve shots, for reading only."""
    root = tmp_path_factory.mktemp("scanned") / "state"
    feed(root, camera.folder)
    return root


@pytest.fixture
def runtime() -> Iterator[Path]:
    """Return a folder for sockets whose path is short, as theirs must be."""
    with tempfile.TemporaryDirectory(prefix="hpx") as folder:
        yield Path(folder)


@pytest.fixture
def start(tmp_path: Path, runtime: Path) -> Iterator[Callable[..., Any]]:
    """Return what starts a daemon on tmp_path/state; it is gone when the test ends."""
    # Not above: daemons needs this module.
    from daemons import Daemon

    running: list[Daemon] = []

    def started(*arguments: object, wait: bool = True, **env: str) -> Daemon:
        daemon = Daemon(tmp_path / "state", runtime, *arguments, **env)
        running.append(daemon)
        return daemon.wait_ready() if wait else daemon

    yield started
    for daemon in running:
        daemon.close()
