"""A Debian with systemd as its first process, in a container, with the program under test in /opt/hotpixd.

It is a real machine as far as units can tell: its own processes, users, mounts, cgroups and network. The program and
its libraries are those that run the tests, seen read-only.
"""

from __future__ import annotations

import os
import shutil
import site
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import hotpixd

SUITE = "bookworm"
PACKAGES = ("dbus", "dbus-user-session", "libpam-systemd", "procps", "python3", "systemd", "systemd-sysv", "udev")
"""python3 for the libraries its interpreter needs, which are also those of the host's."""

UNITS = Path(__file__).parents[1] / "systemd"

_HOST = "/opt/host"
_BUILD_LIMIT_S = 150


class CannotBootError(Exception):
    """No machine can be had here; the sentence says what is missing."""


class Machine:
    """A booted container."""

    def __init__(self, root: Path, leader: int) -> None:
        self.leader = leader
        """Its first process, as numbered by the host."""

        self.root = root
        """Its root directory, seen from the host. What is mounted inside is not seen."""

        self._enter = ("nsenter", "-t", str(leader), "-m", "-u", "-i", "-n", "-p", "-C", "--")

    def run(
        self, *arguments: object, user: str | None = None, check: bool = True, timeout_s: float = 120
    ) -> subprocess.CompletedProcess[str]:
        """Run a command inside, as root or as another user with all their groups."""
        as_user = () if user is None else ("runuser", "-u", user, "--")
        done = subprocess.run(
            [*self._enter, *as_user, *map(str, arguments)],
            # Not the environment of the tests: it speaks of the host.
            env={"PATH": "/opt/hotpixd/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LANG": "C.UTF-8"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout_s,
        )
        if check and done.returncode:
            raise AssertionError(f"{' '.join(map(str, arguments))} ended with {done.returncode}: {done.stderr.strip()}")
        return done

    def path(self, inside: str) -> Path:
        """Return where a file of the machine is, seen from the host."""
        return self.root / inside.lstrip("/")


@contextmanager
def booted() -> Iterator[Machine]:
    """Boot a machine, and remove it afterwards. CannotBootError if that is impossible here."""
    with installed() as (root, mounts), running(root, mounts) as machine:
        yield machine


@contextmanager
def running(root: Path, mounts: Iterable[str]) -> Iterator[Machine]:
    """Boot a root directory that has the program installed, and shut it down afterwards; it may be dead by then.

    Parameters
    ----------
    mounts : options of systemd-nspawn that say what else is seen inside
    """
    log = root.parent / "console"
    with log.open("wb") as console:
        nspawn = subprocess.Popen(
            [
                # It shuts down with us, even if we are killed.
                *("setpriv", "--pdeathsig", "TERM", "systemd-nspawn", "--quiet", "--boot"),
                *(f"--directory={root}", f"--machine=hotpixd-test-{os.getpid()}"),
                *("--register=no", "--keep-unit", "--private-network", "--console=pipe"),
                # What a machine has, and nspawn takes away.
                "--system-call-filter=landlock_create_ruleset landlock_add_rule landlock_restrict_self",
                *mounts,
            ],
            env={**os.environ, "SYSTEMD_NSPAWN_UNIFIED_HIERARCHY": "1"},
            stdin=subprocess.DEVNULL,
            stdout=console,
            stderr=console,
            start_new_session=True,
        )
    try:
        yield Machine(root, _wait_for_boot(nspawn, log))
    finally:
        # Asks it to shut down.
        nspawn.terminate()
        try:
            nspawn.wait(60)
        except subprocess.TimeoutExpired:
            nspawn.kill()
            nspawn.wait()


def require_container() -> None:
    """Raise CannotBootError where none can be booted."""
    missing = [
        tool for tool in ("systemd-nspawn", "mmdebstrap", "nsenter", "runuser", "setpriv") if shutil.which(tool) is None
    ]
    if missing:
        raise CannotBootError(f"not installed: {', '.join(missing)}")
    if os.getuid() != 0:
        raise CannotBootError("only root can boot a container")


@contextmanager
def installed() -> Iterator[tuple[Path, list[str]]]:
    """Make the root directory of a machine, to be booted as often as one likes; gives it with what `running` needs."""
    require_container()
    archive = _root_archive()
    with tempfile.TemporaryDirectory(prefix="hotpixd-machine-") as place:
        root = Path(place) / "root"
        root.mkdir()
        subprocess.run(["tar", "-C", root, "-xf", archive], check=True)
        yield root, [f"--bind-ro={bind}" for bind in _install(root)]


def _root_archive() -> Path:
    """Return the machine's file system, built at the first time and kept for later runs."""
    archive = Path(tempfile.gettempdir()) / f"hotpixd-test-{SUITE}-{os.getuid()}.tar"
    if archive.exists() and archive.stat().st_uid == os.getuid():
        return archive
    being_built = archive.with_suffix(f".{os.getpid()}.tar")
    command = ["mmdebstrap", "--variant=minbase", f"--include={','.join(PACKAGES)}", SUITE, str(being_built)]
    try:
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=_BUILD_LIMIT_S)
        being_built.replace(archive)
    except subprocess.TimeoutExpired:
        raise CannotBootError(f"mmdebstrap was not done after {_BUILD_LIMIT_S} s") from None
    except subprocess.CalledProcessError as error:
        # The mirror is out of reach, most likely; apt says so some lines before the end.
        raise CannotBootError(f"mmdebstrap could not build a Debian: {error.stderr.strip()[-500:]}") from None
    finally:
        being_built.unlink(missing_ok=True)
    return archive


def _install(root: Path) -> list[str]:
    """Put the program and its units where README has them; return what of the host has to be seen inside."""
    interpreter = Path(sys.executable).resolve()
    binds = []
    if sys.base_prefix != "/usr":
        # At its own place, since it finds its libraries there. Its parents may be closed to others, such as /root.
        for parent in Path(sys.base_prefix).parents:
            inside = root / parent.relative_to("/")
            inside.mkdir(exist_ok=True, parents=True)
            inside.chmod(inside.stat().st_mode | 0o011)
        binds.append(sys.base_prefix)
    packages = Path(site.getsitepackages()[0])
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    ours = root / "opt/hotpixd"
    (ours / "bin").mkdir(parents=True)
    (ours / "lib" / version / "site-packages").mkdir(parents=True)
    (ours / "lib" / version / "site-packages/host.pth").write_text(f"{_HOST}/daemon\n{_HOST}/site-packages\n")
    (ours / "pyvenv.cfg").write_text(f"home = {interpreter.parent}\n")
    (ours / "bin/python").symlink_to(interpreter)
    script = ours / "bin/hotpixd"
    script.write_text("#!/opt/hotpixd/bin/python\nfrom hotpixd.cli import main\nmain()\n")
    script.chmod(0o755)
    binds += [f"{Path(hotpixd.__file__).parents[1]}:{_HOST}/daemon", f"{packages}:{_HOST}/site-packages"]

    for unit in UNITS.glob("*.service"):
        shutil.copy(unit, root / "etc/systemd/system")
    for unit in (UNITS / "user").glob("*.service"):
        shutil.copy(unit, root / "etc/systemd/user")
    (root / "etc/sysusers.d").mkdir(exist_ok=True)
    shutil.copy(UNITS / "hotpixd.sysusers", root / "etc/sysusers.d/hotpixd.conf")
    for rules in UNITS.glob("*.rules"):
        shutil.copy(rules, root / "etc/udev/rules.d")
    return binds


def _wait_for_boot(nspawn: subprocess.Popen[bytes], log: Path) -> int:
    """Return the first process of the machine, as numbered by the host, once it has started everything."""
    children = Path(f"/proc/{nspawn.pid}/task/{nspawn.pid}/children")
    end = time.monotonic() + 60
    while time.monotonic() < end and nspawn.poll() is None:
        leader = children.read_text().split()
        if leader:
            asked = subprocess.run(
                ["nsenter", "-t", leader[0], "-m", "-p", "-C", "--", "systemctl", "is-system-running"],
                capture_output=True,
                text=True,
            )
            if asked.stdout.strip() in ("running", "degraded"):
                return int(leader[0])
        time.sleep(0.1)
    raise CannotBootError(f"systemd-nspawn did not boot: {log.read_text(errors='replace').strip()[-500:]}")
