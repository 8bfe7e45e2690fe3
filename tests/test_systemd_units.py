"""The unit files as systemd reads them, without starting anything. test_systemd_boot.py starts them."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

UNITS = Path(__file__).parents[1] / "systemd"
SERVICES = {"hotpixd.service": "--system", "hotpixd@.service": "--system", "user/hotpixd.service": "--user"}
"""By which manager reads them."""

MOST_EXPOSURE = 2.5

pytestmark = pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")


def analyze(manager: str, *arguments: object, runtime: Path) -> subprocess.CompletedProcess[str]:
    """Run systemd-analyze; a user's manager wants a place of its own, which need not be one's real one."""
    environ = {**os.environ, "XDG_RUNTIME_DIR": str(runtime)}
    command = ["systemd-analyze", manager, *map(str, arguments)]
    return subprocess.run(command, env=environ, capture_output=True, text=True, timeout=60)


def directives(unit: str) -> list[str]:
    """Return a unit's lines without comments."""
    lines = (UNITS / unit).read_text().splitlines()
    return [line for line in lines if line and not line.startswith("#")]


@pytest.mark.parametrize("unit", SERVICES)
def test_systemd_has_nothing_to_say_about_a_unit(unit: str, tmp_path: Path):
    """No unknown key, no bad value, no missing program, whether or not hotpixd is installed."""
    done = analyze(SERVICES[unit], "verify", UNITS / unit, runtime=tmp_path)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


@pytest.mark.parametrize("unit", SERVICES)
def test_a_mistake_in_a_unit_is_found(unit: str, tmp_path: Path):
    """What the test above is worth."""
    wrong = tmp_path / Path(unit).name
    wrong.write_text((UNITS / unit).read_text().replace("WatchdogSec=2min", "WatchdogSec=soon\nWatchDog=yes"))
    done = analyze(SERVICES[unit], "verify", wrong, runtime=tmp_path)
    assert "soon" in done.stderr
    assert "WatchDog" in done.stderr


@pytest.mark.parametrize("unit", SERVICES)
def test_a_unit_is_not_exposed(unit: str, tmp_path: Path):
    """The sum over what a service might do to the machine; 10 without any hardening."""
    done = analyze(SERVICES[unit], "security", "--offline=true", "--no-pager", UNITS / unit, runtime=tmp_path)
    level = re.search(r"Overall exposure level for \S+: ([0-9.]+)", done.stdout)
    assert level is not None, done.stderr
    assert float(level[1]) <= MOST_EXPOSURE


def test_an_instance_differs_from_the_service_in_names_only():
    """Else the reasons, which are given once, would be those of something else."""
    expected = []
    for line in directives("hotpixd.service"):
        if line == "RuntimeDirectoryPreserve=yes":
            continue
        name, equals, value = line.partition("=")
        value = {
            "Description": value.replace("hotpixd", "hotpixd %i"),
            "ExecStart": value.replace("hotpixd.yaml", "%i.yaml"),
            "SyslogIdentifier": "hotpixd@%i",
            "StateDirectory": "hotpixd/%i",
            "RuntimeDirectory": "hotpixd/%i",
        }.get(name, value)
        expected.append(name + equals + value)
    assert directives("hotpixd@.service") == expected


def test_the_user_unit_adds_little_to_the_service():
    """What it has beyond the system's is about places and a user's powers; the rest is explained over there."""
    of_system = {line.partition("=")[0] for line in directives("hotpixd.service")}
    of_user = {line.partition("=")[0] for line in directives("user/hotpixd.service")}
    assert of_user - of_system == {"ExecStartPre", "PrivateUsers", "ReadWritePaths"}
