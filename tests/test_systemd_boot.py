"""The units under a real systemd, from the first start to the last stop."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from conftest import Camera
from container import CannotBootError, Machine, booted
from daemons import eventually

pytestmark = pytest.mark.timeout(600)

WATCHDOG_S = 8
QUICKLY = f"[Service]\nWatchdogSec={WATCHDOG_S}s\nTimeoutAbortSec=2s\nRestartSec=500ms\n"
"""The same units, so that tests need not wait for minutes."""

MEMBER, STRANGER, OWNER = "ann", "bob", "cat"
"""Users: in the group hotpixd; not in it; with a service of her own."""


@pytest.fixture(scope="module")
def machine() -> Iterator[Machine]:
    """A machine as README has it: units, users, a member of the group."""
    try:
        with booted() as machine:
            for user in (MEMBER, STRANGER, OWNER):
                machine.run("useradd", "--create-home", user)
            machine.run("usermod", "--append", "--groups", "hotpixd", MEMBER)
            for folder in ("system/hotpixd.service.d", "system/hotpixd@.service.d", "user/hotpixd.service.d"):
                put(machine, f"/etc/systemd/{folder}/quickly.conf", QUICKLY)
            machine.run("systemctl", "daemon-reload")
            yield machine
    except CannotBootError as error:
        pytest.skip(str(error))


def put(machine: Machine, path: str, text: str) -> None:
    """Write a file in the machine."""
    where = machine.path(path)
    where.parent.mkdir(parents=True, exist_ok=True)
    where.write_text(text)


PYTHON = ("/opt/hotpixd/bin/python", "-c")
CONNECT = "import socket, sys; socket.socket(socket.AF_UNIX).connect(sys.argv[1])"
ASK = "import json, sys; from hotpixd.feed import FeedClient; print(json.dumps(FeedClient(sys.argv[1]).ask('status')))"


class Service:
    """A service of the machine, new and without state."""

    def __init__(self, machine: Machine, name: str, config: str, runtime: str, user: str | None = None) -> None:
        self.machine = machine
        self.name = name
        self._config = config
        self._socket = f"{runtime}/feed.sock"
        self._user = user
        self._since = machine.run("date", "+%s.%N").stdout.strip()

    def ctl(self, verb: str, *arguments: str, check: bool = True) -> str:
        """Run systemctl, or that of the user."""
        if self._user is None:
            return self.machine.run("systemctl", verb, self.name, *arguments, check=check).stdout
        uid = self.machine.run("id", "-u", self._user).stdout.strip()
        as_user = ("env", f"XDG_RUNTIME_DIR=/run/user/{uid}", "systemctl", "--user")
        return self.machine.run(*as_user, verb, self.name, *arguments, user=self._user, check=check).stdout

    def configure(self, *directories: str, **sections: object) -> None:
        """Write its configuration."""
        sources = [{"directory": directory} for directory in directories]
        put(self.machine, self._config, yaml.safe_dump({"sources": sources, **sections}))

    def show(self, name: str) -> str:
        """Return a property as systemd has it."""
        return self.ctl("show", "--property", name, "--value").strip()

    def journal(self) -> list[dict[str, Any]]:
        """Return what it and systemd said about it since this object was made."""
        unit = f"UNIT={self.name}.service" if self._user is None else f"USER_UNIT={self.name}.service"
        fields = (unit, "+", f"_SYSTEMD_{unit}")
        done = self.machine.run("journalctl", "--no-pager", "-o", "json", f"--since=@{self._since}", *fields)
        return [json.loads(line) for line in done.stdout.splitlines()]

    def said(self) -> str:
        """Return the journal as text."""
        return "\n".join(str(entry["MESSAGE"]) for entry in self.journal())

    def status(self) -> dict[str, Any]:
        """Return what it answers over its socket to those it lets in."""
        asked = self.machine.run(*PYTHON, ASK, self._socket, user=self._user or MEMBER)
        return dict(json.loads(asked.stdout))

    def wait_folded(self, count: int) -> None:
        """Wait until so many shots are folded."""
        eventually(lambda: self.status()["shots"]["folded"] >= count, f"{count} folded: {self.said()}", 60)

    def pid(self) -> str:
        """Return the number of its main process, within the machine."""
        return self.show("MainPID")


@pytest.fixture
def service(machine: Machine) -> Iterator[Service]:
    """Return hotpixd.service, not started yet; it watches /srv/inbox, which is empty."""
    for folder in ("/srv/inbox", "/srv/other"):
        machine.path(folder).mkdir(parents=True)
    service = Service(machine, "hotpixd", "/etc/hotpixd/hotpixd.yaml", "/run/hotpixd")
    service.configure("/srv/inbox")
    yield service
    service.ctl("stop")
    service.ctl("reset-failed", check=False)
    for folder in ("/srv/inbox", "/srv/other", "/var/lib/hotpixd", "/etc/hotpixd"):
        shutil.rmtree(machine.path(folder), ignore_errors=True)


def shoot(camera: Camera, machine: Machine, folder: str, first: int, last: int) -> None:
    """Let shots come as a camera's program writes them."""
    for shot in camera.shots[first:last]:
        part = machine.path(folder) / f".{shot.name}.part"
        shutil.copyfile(shot, part)
        part.rename(part.with_name(shot.name))


def test_it_starts_and_says_so(service: Service):
    """Start returns when it watches; its status is a sentence; the journal has levels, and times of its own only."""
    service.ctl("start")
    assert service.show("ActiveState") == "active"
    assert "/srv/inbox" in service.show("StatusText")
    own = [entry for entry in service.journal() if entry.get("_PID") == service.pid()]
    assert own
    assert {entry["SYSLOG_IDENTIFIER"] for entry in own} == {"hotpixd"}
    assert {entry["PRIORITY"] for entry in own} == {"6"}, service.said()
    assert not any(entry["MESSAGE"].startswith(("<", "20")) for entry in own)


def test_a_shot_is_folded_and_a_member_is_told(service: Service, camera: Camera):
    """The way of a shot: into the directory, and out over the socket to whoever is in the group."""
    service.ctl("start")
    shoot(camera, service.machine, "/srv/inbox", 0, 3)
    service.wait_folded(3)
    told = json.loads(service.machine.run("hotpixd", "status", "--json", user=MEMBER).stdout)
    assert [sensor["frames"] for sensor in told["sensors"]] == [3]
    eventually(lambda: "3 shots" in service.show("StatusText"), "the status counts them")


def test_a_tethered_camera(service: Service, pairs: Camera):
    """Within the sandbox: its worker opens libgphoto2's virtual camera, whose shots are folded and saved."""
    machine = service.machine
    card = machine.path("/srv/card/DCIM/100VIRTL")
    card.mkdir(parents=True)
    for shot in pairs.shots:
        shutil.copyfile(shot, card / shot.name)
    machine.run("install", "-d", "-o", "hotpixd", "/srv/photos")
    drop_in = "/etc/systemd/system/hotpixd.service.d/camera.conf"
    put(machine, drop_in, "[Service]\nEnvironment=VCAMERADIR=/srv/card\nReadWritePaths=/srv/photos\n")
    machine.run("systemctl", "daemon-reload")
    try:
        service.configure(cameras=[{"save_to": "/srv/photos"}])
        service.ctl("start")
        service.wait_folded(len(pairs.shots) // 2)
        eventually(lambda: "ready" in service.show("StatusText"), f"the status tells: {service.said()}")
        saved = {path.name: path.read_bytes() for path in machine.path("/srv/photos").iterdir()}
        assert saved == {shot.name: shot.read_bytes() for shot in pairs.shots}
        assert service.status()["shots"]["companion"] == len(pairs.shots) // 2
        workers = machine.run("pgrep", "-f", "camera_worker", check=False).stdout.split()
        assert len(workers) == 1
        before = service.pid()
        service.ctl("kill", "--kill-who=main", "--signal=KILL")
        eventually(
            lambda: workers[0] not in machine.run("pgrep", "-f", "camera_worker", check=False).stdout.split(), "gone"
        )

        def answers() -> bool:
            socket = "/run/hotpixd/feed.sock"
            return machine.run(*PYTHON, CONNECT, socket, user=MEMBER, check=False).returncode == 0

        eventually(lambda: service.pid() not in ("0", before) and answers(), "it is started again", 60)
        eventually(lambda: "ready" in service.show("StatusText"), "it has the camera again")
        assert service.status()["shots"]["folded"] == len(pairs.shots) // 2
    finally:
        machine.path(drop_in).unlink()
        machine.run("systemctl", "daemon-reload")


def test_strangers_are_kept_out(service: Service):
    """The socket is for the group: its mode, its directory's, and what happens to one who tries."""
    service.ctl("start")
    machine = service.machine
    for path, access in (("/run/hotpixd/feed.sock", "660"), ("/run/hotpixd", "750"), ("/var/lib/hotpixd", "700")):
        assert machine.run("stat", "-c", "%a %U:%G", path).stdout.strip() == f"{access} hotpixd:hotpixd"
    machine.run(*PYTHON, CONNECT, "/run/hotpixd/feed.sock", user=MEMBER)
    for user in (STRANGER, "nobody"):
        refused = machine.run(*PYTHON, CONNECT, "/run/hotpixd/feed.sock", user=user, check=False)
        assert "PermissionError" in refused.stderr
    asked = machine.run("hotpixd", "status", "--json", user=STRANGER, check=False)
    assert (asked.returncode, asked.stdout) == (3, "")


def test_reload(service: Service, camera: Camera):
    """A new source is watched from then on; a wrong configuration is named, and the old one stays in use."""
    service.ctl("start")
    before = service.pid()
    shoot(camera, service.machine, "/srv/other", 0, 2)
    service.configure("/srv/inbox", "/srv/other")
    service.ctl("reload")
    service.wait_folded(2)
    service.configure("/srv/inbox", knid="dark")
    service.ctl("reload", check=False)
    eventually(lambda: "knid" in service.said(), "the mistake is named")
    eventually(lambda: service.show("ActiveState") == "active", "reloading has ended")
    assert len(service.status()["sources"]) == 2
    assert (service.pid(), service.show("NRestarts")) == (before, "0")


def test_a_hang_is_noticed_and_ended(service: Service, camera: Camera):
    """A process that does not move is replaced, and what it had received is not lost."""
    service.ctl("start")
    shoot(camera, service.machine, "/srv/inbox", 0, 2)
    service.wait_folded(2)
    before = service.pid()
    service.machine.run("kill", "-STOP", before)
    eventually(lambda: "Watchdog timeout" in service.said(), "the watchdog barks", 3 * WATCHDOG_S)
    eventually(lambda: service.show("NRestarts") == "1" and service.show("ActiveState") == "active", "a restart")
    assert service.pid() != before
    shoot(camera, service.machine, "/srv/inbox", 2, 3)
    service.wait_folded(3)
    assert [sensor["frames"] for sensor in service.status()["sensors"]] == [3]


def test_how_it_hung_is_in_the_journal(service: Service):
    """The watchdog's SIGABRT, to a process that can still react: the traceback of every thread."""
    service.ctl("start")
    # Python reads the stacks of threads that may be running, and ends where one changes under it: 6 of 400 times with
    # three busy threads. What hung stands still.
    for restarts in ("1", "2", "3"):
        service.machine.run("kill", "-ABRT", service.pid())
        eventually(lambda n=restarts: service.show("NRestarts") == n, "a restart")
        eventually(lambda: service.show("ActiveState") == "active", "it is back")
        # The last line it says.
        eventually(lambda n=restarts: service.said().count("Extension modules:") == int(n), "its end is told")
        assert "Fatal Python error: Aborted" in service.said()
        if "Current thread" in service.said():
            return
    pytest.fail(service.said())


def test_killed_it_comes_back_and_nothing_is_doubled(service: Service, camera: Camera):
    """kill -9 amid the shots, twice."""
    service.ctl("start")
    for n in (1, 2):
        shoot(camera, service.machine, "/srv/inbox", 6 * n - 6, 6 * n)
        before = service.pid()
        service.machine.run("kill", "-KILL", before)
        eventually(lambda n=n: service.show("NRestarts") == str(n), "a restart")
        eventually(lambda: service.show("ActiveState") == "active", "it is back")
    service.wait_folded(12)
    status = service.status()
    assert [sensor["frames"] for sensor in status["sensors"]] == [12]
    assert not status["shots"].get("refused")


def test_it_stops_cleanly(service: Service, camera: Camera):
    """Within seconds, with success, and with nothing left to replay."""
    service.ctl("start")
    shoot(camera, service.machine, "/srv/inbox", 0, 3)
    service.wait_folded(3)
    started = time.monotonic()
    service.ctl("stop")
    assert time.monotonic() - started < 20
    assert [service.show(name) for name in ("ActiveState", "Result", "ExecMainStatus")] == ["inactive", "success", "0"]
    assert "State 'stop-sigterm' timed out" not in service.said()
    asked = ("runuser", "-u", "hotpixd", "--", "hotpixd", "verify", "--json", "--state", "/var/lib/hotpixd")
    checked = json.loads(service.machine.run(*asked).stdout)
    assert (checked["ok"], checked["waiting"]) == (True, 0)


def test_a_wrong_configuration_is_not_tried_again(service: Service):
    """It fails at once, says why, and waits for whoever repairs it."""
    service.configure("/srv/inbox", knid="dark")
    service.ctl("start", check=False)
    assert [service.show(name) for name in ("ActiveState", "ExecMainStatus")] == ["failed", "2"]
    assert "knid" in service.said()
    time.sleep(1.5)
    assert (service.show("ActiveState"), service.show("NRestarts")) == ("failed", "0")


def test_cards_come_and_go_while_it_runs(service: Service, camera: Camera, tmp_path: Path):
    """A mount made after the start is seen, one made before can be taken away, and neither can be written to."""
    machine = service.machine
    for n, shot in enumerate(camera.shots[:4]):
        folder = machine.path(f"/root/card{n // 2}")
        folder.mkdir(exist_ok=True)
        shutil.copyfile(shot, folder / shot.name)

    def insert(card: int) -> None:
        machine.run("mount", "-t", "tmpfs", "card", "/media/card")
        machine.run("sh", "-c", f"cp /root/card{card}/* /media/card/")

    machine.path("/media/card").mkdir()
    service.configure("/media/card")
    insert(0)
    service.ctl("start")
    service.wait_folded(2)
    machine.run("umount", "/media/card")
    insert(1)
    service.wait_folded(4)
    machine.run("umount", "/media/card")
    assert service.show("ActiveState") == "active"
    assert not list(machine.path("/media/card").iterdir())


def test_what_it_may_write_and_whom_it_may_see(service: Service):
    """Its own directories and nothing else, as its mount namespace has it even for root."""
    service.ctl("start")
    within = ("nsenter", "-t", service.pid(), "-m")
    for folder in ("/etc", "/usr", "/home/bob", "/srv/inbox", "/var/lib", "/media"):
        refused = service.machine.run(*within, "touch", f"{folder}/x", check=False)
        assert "Read-only file system" in refused.stderr, folder
    for folder in ("/var/lib/hotpixd", "/var/cache/hotpixd", "/run/hotpixd", "/tmp"):
        service.machine.run(*within, "touch", f"{folder}/x")
    assert not service.machine.path("/tmp/x").exists()
    capabilities = service.machine.run("grep", "CapBnd", f"/proc/{service.pid()}/status").stdout.split()[1]
    # CAP_LEASE is the 28th.
    assert int(capabilities, 16) == 1 << 28


def test_addresses_for_alerts_are_for_root_and_the_service(service: Service):
    """A credential, optional; nobody else can read the file."""
    service.configure("/srv/inbox", alerts={"notify_file": "hotpixd.notify"})
    service.ctl("start", check=False)
    assert "hotpixd.notify" in service.said()
    assert service.show("ActiveState") == "failed"
    put(service.machine, "/etc/credstore/hotpixd.notify", "json://secret@127.0.0.1:9/\n")
    service.machine.path("/etc/credstore/hotpixd.notify").chmod(0o600)
    service.ctl("start")
    assert service.show("ActiveState") == "active"
    assert "secret" not in service.said()


def test_instances_live_beside_the_service(service: Service, camera: Camera):
    """Each has its configuration, state and socket; one that stops takes nothing from the others."""
    attic = Service(service.machine, "hotpixd@attic", "/etc/hotpixd/attic.yaml", "/run/hotpixd/attic")
    attic.configure("/srv/other")
    service.ctl("start")
    attic.ctl("start")
    shoot(camera, service.machine, "/srv/inbox", 0, 1)
    shoot(camera, service.machine, "/srv/other", 1, 3)
    service.wait_folded(1)
    attic.wait_folded(2)
    service.ctl("stop")
    assert attic.status()["shots"]["folded"] == 2
    attic.ctl("stop")
    assert attic.show("Result") == "success"


def test_a_plugged_camera_starts_it(machine: Machine):
    """As far as udev's rules go: a device that libgphoto2 knows wants the service until it is removed."""
    # Two other devices stand for a camera each: what udev knew of a device is told again when it is removed.
    put(machine, "/etc/udev/rules.d/60-camera.rules", 'KERNEL=="null|full", ENV{ID_GPHOTO2}="1"\n')
    tried = [("add", "null", True), ("bind", "null", True), ("remove", "full", False), ("add", "zero", False)]
    for action, device, wanted in tried:
        done = machine.run("udevadm", "test", f"--action={action}", f"/sys/devices/virtual/mem/{device}")
        said = done.stdout + done.stderr
        assert "59-hotpixd.rules" in said
        assert "90-hotpixd.rules" in said
        assert "Invalid" not in said
        assert ("SYSTEMD_WANTS=hotpixd.service" in said) == wanted, (action, device)


def test_a_service_of_a_user(machine: Machine, camera: Camera):
    """It starts with the machine (lingering), reads her pictures, writes only its own, and answers her commands."""
    home = f"/home/{OWNER}"
    for folder in ("Pictures", ".config/hotpixd"):
        machine.run("install", "-d", "-m", "700", "-o", OWNER, f"{home}/{folder}")
    uid = machine.run("id", "-u", OWNER).stdout.strip()
    own = Service(machine, "hotpixd", f"{home}/.config/hotpixd/config.yaml", f"/run/user/{uid}/hotpixd", OWNER)
    own.configure("~/Pictures")
    # Those of the system's service, if it has run: compiling them again takes a while.
    machine.run("sh", "-c", f"mkdir -p {home}/.cache; cp -r /var/cache/hotpixd {home}/.cache; chown -R {OWNER} {home}")
    machine.run("touch", f"/var/lib/systemd/linger/{OWNER}")
    machine.run("systemctl", "start", f"user@{uid}")
    own.ctl("start")
    shoot(camera, machine, f"{home}/Pictures", 0, 2)
    own.wait_folded(2)
    of_hers = ("env", f"XDG_RUNTIME_DIR=/run/user/{uid}", f"HOME={home}")
    told = machine.run(*of_hers, "hotpixd", "status", "--json", user=OWNER)
    assert json.loads(told.stdout)["shots"]["folded"] == 2
    within = ("nsenter", "-t", own.pid(), "-m", "-U", "--preserve-credentials")
    for folder in (home, f"{home}/Pictures", f"{home}/.config/hotpixd"):
        refused = machine.run(*within, "touch", f"{folder}/x", user=OWNER, check=False)
        assert "Read-only file system" in refused.stderr, folder
    own.ctl("stop")
    assert own.show("Result") == "success"


def test_its_decoders_are_locked_in(service: Service, machine: Machine, camera: Camera):
    """The unit's own filter leaves them the calls that takes: none of the walls is missing."""
    service.ctl("start")
    shoot(camera, machine, "/srv/inbox", 0, 2)
    service.wait_folded(2)
    find = f"pgrep --parent {service.pid()} --full decode_worker"
    workers = machine.run("sh", "-c", find).stdout.split()
    assert workers

    def filters(pid: str) -> int:
        status = machine.run("cat", f"/proc/{pid}/status").stdout
        return int(next(line.split()[1] for line in status.splitlines() if line.startswith("Seccomp_filters:")))

    # Those of the unit, and one of their own.
    assert {filters(worker) for worker in workers} == {filters(service.pid()) + 1}
    # If no service gets it here, the unit does not take it away.
    code = "import ctypes; print(ctypes.CDLL(None).syscall(444, None, 0, 1))"
    version = machine.run("systemd-run", "--quiet", "--wait", "--pipe", *PYTHON, code).stdout.strip()
    assert ("this kernel has no Landlock" in service.said()) == (int(version) < 1), version
    assert "no seccomp" not in service.said()
