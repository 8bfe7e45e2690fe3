"""Cameras told from other USB devices: trees of /sys as the kernel makes them, real uevents and real processes."""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from conftest import nobody
from hotpixd.intake.usb import UsbEvents, cameras, devices_seen, gvfs, holders, takes_cameras_by_itself

PTP, DISK, OWN, PRINTER, HID, AUDIO = "06/01/01", "08/06/50", "ff/00/00", "07/01/02", "03/00/00", "01/01/00"
WEBCAM = ("0e/01/00", "0e/02/00", AUDIO)

KERNEL, NETLINK_KOBJECT_UEVENT = 1, 15


class Bus:
    """The part of /sys that tells of USB, with one controller and its root hub."""

    def __init__(self, root: Path) -> None:
        self.sysfs = root / "sys"
        self.dev = root / "dev"
        self._hub = self.sysfs / "devices/pci0000:00/0000:00:14.0/usb1"
        self._names = self.sysfs / "bus/usb/devices"
        self._names.mkdir(parents=True)
        self._describe(self._hub, busnum="1", devnum="1", idVendor="1d6b", idProduct="0002", bDeviceClass="09")
        self._interface(self._hub, "1-0:1.0", "09/00/00", "hub")
        self._link(self._hub)

    def plug(
        self,
        number: int,
        ids: str,
        *interfaces: str,
        name: str | None = None,
        serial: str | None = None,
        driver: str | None = None,
        kind: str = "00",
    ) -> Path:
        """Plug a device in and return its folder. `driver` is that of all its interfaces."""
        folder = self._hub / f"1-{number}"
        vendor, product = ids.split(":")
        self._describe(
            folder,
            busnum="1",
            devnum=str(number),
            idVendor=vendor,
            idProduct=product,
            bDeviceClass=kind,
        )
        for attribute, value in (("manufacturer", name and "Maker Inc."), ("product", name), ("serial", serial)):
            if value is not None:
                (folder / attribute).write_text(value + "\n")
        for at, interface in enumerate(interfaces):
            self._interface(folder, f"1-{number}:1.{at}", interface, driver)
        self._link(folder)
        return folder

    def unplug(self, folder: Path) -> None:
        """Take a device away, as the kernel does: its folder first."""
        shutil.rmtree(folder)
        for link in self._names.glob(f"{folder.name}*"):
            if not link.exists():
                link.unlink()

    def _describe(self, folder: Path, **attributes: str) -> None:
        folder.mkdir(parents=True)
        for name, value in attributes.items():
            (folder / name).write_text(value + "\n")

    def _interface(self, device: Path, name: str, triple: str, driver: str | None) -> None:
        numbers = zip(("Class", "SubClass", "Protocol"), triple.split("/"), strict=True)
        self._describe(device / name, **{f"bInterface{part}": number for part, number in numbers})
        if driver is not None:
            (device / name / "driver").symlink_to(f"../../../../../../bus/usb/drivers/{driver}")

    def _link(self, folder: Path) -> None:
        for path in (folder, *folder.glob("*:*")):
            (self._names / path.name).symlink_to(path)


@pytest.fixture
def bus(tmp_path: Path) -> Bus:
    """Return a machine where nothing but the hub is plugged in."""
    return Bus(tmp_path)


@pytest.fixture
def program(tmp_path: Path) -> Iterator[Callable[..., int]]:
    """Return what starts a program of any name that has a file open; all are gone when the test ends."""
    running = []

    def started(name: str, *arguments: str, opens: Path = Path("/dev/null"), under: str = "sleep") -> int:
        path = tmp_path / "programs" / name
        path.parent.mkdir(exist_ok=True)
        if not path.exists():
            shutil.copy(shutil.which(under) or under, path)
        with opens.open("rb") as file:
            running.append(subprocess.Popen([path, *(arguments or ("60",))], stdin=file))
        return running[-1].pid

    yield started
    for process in running:
        process.kill()
        process.wait()


def test_a_camera_is_described_as_the_kernel_describes_it(bus):
    """The numbers, the names, and where libgphoto2 and a program find it."""
    bus.plug(12, "04a9:32f4", PTP, name="Canon Digital Camera", serial="0123456789ab")
    [camera] = cameras(bus.sysfs, bus.dev)
    assert (camera.bus, camera.device, camera.vendor, camera.product) == (1, 12, 0x04A9, 0x32F4)
    assert (camera.manufacturer, camera.name, camera.serial) == ("Maker Inc.", "Canon Digital Camera", "0123456789ab")
    assert (camera.ptp, camera.storage, camera.video, camera.claimed) == (True, False, False, False)
    assert (camera.port, camera.maker) == ("usb:001,012", "Canon")
    assert camera.node == bus.dev / "bus/usb/001/012"


CAMERAS = {
    "EOS R5": ("04a9:32f4", [PTP]),
    "D750": ("04b0:0437", [PTP]),
    "A7 III in PC Remote mode": ("054c:0c34", [PTP]),
    "a phone that shows its pictures": ("18d1:4ee5", [PTP]),
    "a camera of a maker we do not know": ("abcd:0001", [OWN, PTP]),
    "PowerShot S10, older than PTP": ("04a9:3041", [OWN]),
    "DC-240, older than PTP": ("040a:0120", [OWN]),
    "D70 as a disk": ("04b0:0405", [DISK]),
    "A6000 as a disk": ("054c:07c3", [DISK]),
    "ZV-1 as a webcam": ("054c:0d97", WEBCAM),
}


@pytest.mark.parametrize("name", CAMERAS)
def test_a_camera_is_found(bus, name):
    """By its PTP interface whoever made it, else by its maker; in a wrong USB mode it is found, too."""
    ids, interfaces = CAMERAS[name]
    bus.plug(2, ids, *interfaces)
    [camera] = cameras(bus.sysfs, bus.dev)
    assert (camera.ptp, camera.storage) == (PTP in interfaces, DISK in interfaces)
    assert camera.video == (interfaces is WEBCAM)


OTHERS = {
    "a printer of Canon's with a card reader": ("04a9:1912", [OWN, PRINTER, DISK]),
    "a photo printer of Canon's": ("04a9:3214", [OWN, PRINTER]),
    "a scanner of Canon's": ("04a9:2213", [OWN]),
    "a film scanner of Nikon's": ("04b0:4001", [OWN]),
    "a reader of smart cards in a Sony laptop": ("054c:06c3", [OWN]),
    "a game controller of Sony's": ("054c:0ce6", [AUDIO, HID]),
    "A6000 being charged": ("054c:0994", []),
    "a voice recorder of Olympus's": ("07b4:0244", [DISK]),
    "a musical keyboard of Casio's": ("07cf:6803", ["01/03/00"]),
    "a phone being charged, with its debugger": ("18d1:4ee7", ["ff/42/01"]),
    "a memory stick": ("0781:5567", [DISK]),
    "a webcam": ("046d:0825", WEBCAM),
    "a keyboard": ("046d:c31c", ["03/01/01"]),
    "a serial adapter": ("0403:6001", ["ff/ff/ff"]),
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_no_camera_is_left_out(bus, name):
    """Makers of cameras make other things as well. It is counted, so that one sees that USB works."""
    ids, interfaces = OTHERS[name]
    bus.plug(2, ids, *interfaces)
    assert cameras(bus.sysfs, bus.dev) == []
    assert devices_seen(bus.sysfs) == 1


def test_hubs_do_not_count(bus):
    """Not even one by a maker of cameras, in whose keyboard it sits."""
    bus.plug(2, "0451:8142", "09/00/01", kind="09")
    bus.plug(3, "054c:0002", "09/00/00", OWN, kind="09")
    assert cameras(bus.sysfs, bus.dev) == []
    assert devices_seen(bus.sysfs) == 0


def test_without_usb_there_is_nothing_and_that_is_told(tmp_path):
    """As in a container."""
    assert cameras(tmp_path, tmp_path) == []
    assert devices_seen(tmp_path) is None


def test_of_several_each_is_found_in_the_order_of_ports(bus):
    """Also behind a hub, and beside other things."""
    for number, ids in ((11, "04a9:32f4"), (3, "04b0:0437"), (7, "046d:c31c")):
        bus.plug(number, ids, HID if ids.startswith("046d") else PTP)
    assert [camera.port for camera in cameras(bus.sysfs, bus.dev)] == ["usb:001,003", "usb:001,011"]
    assert devices_seen(bus.sysfs) == 3


def test_a_device_need_not_have_a_name_nor_one_in_utf8(bus):
    """Some have none, some an empty one, some any bytes."""
    nameless, odd = bus.plug(2, "04a9:32f4", PTP), bus.plug(3, "04b0:0437", PTP, name="x", serial="")
    (odd / "product").write_bytes(b"D750 \xff\n")
    first, second = cameras(bus.sysfs, bus.dev)
    assert (first.manufacturer, first.name, first.serial) == (None, None, None)
    assert (second.name, second.serial) == ("D750 \N{REPLACEMENT CHARACTER}", None)
    assert nameless.exists()


@pytest.mark.parametrize(
    ("interface", "driver", "claimed"),
    [
        (PTP, "usbfs", True),
        (OWN, "usbfs", True),
        (PTP, None, False),
        (DISK, "usb-storage", False),
        (AUDIO, "usbfs", False),
    ],
)
def test_a_claim_is_seen_by_the_driver_of_the_interface(bus, interface, driver, claimed):
    """The kernel has a driver of that name for interfaces that a program has claimed. Only the tethered one matters."""
    device = bus.plug(2, "04a9:3041", "0e/01/00", interface)
    if driver is not None:
        (device / "1-2:1.1/driver").symlink_to(f"../../../../../../bus/usb/drivers/{driver}")
    [camera] = cameras(bus.sysfs, bus.dev)
    assert camera.claimed is claimed


def test_a_device_may_vanish_in_between(bus):
    """Whatever is already gone of it: it is left out, or found with what is left; others are found."""
    bus.plug(3, "04b0:0437", PTP)
    device = bus.plug(2, "04a9:32f4", PTP, name="Canon Digital Camera", driver="usbfs")
    for path in sorted(device.rglob("*")):
        aside = device.parent / "aside"
        path.rename(aside)
        assert cameras(bus.sysfs, bus.dev)[-1].port == "usb:001,003", path
        # What is removed while it is open answers with an error of its own (ENODEV); this one (EISDIR) stands for it.
        path.mkdir()
        assert cameras(bus.sysfs, bus.dev)[-1].port == "usb:001,003", path
        assert devices_seen(bus.sysfs) in (1, 2)
        path.rmdir()
        aside.rename(path)
    assert len(cameras(bus.sysfs, bus.dev)) == 2


def test_a_loose_contact_ends_nothing(bus):
    """A device comes and goes all the time while the bus is read."""
    stop = threading.Event()

    def shake() -> None:
        while not stop.is_set():
            bus.unplug(bus.plug(2, "04a9:32f4", PTP, name="Canon Digital Camera"))

    shaking = threading.Thread(target=shake)
    shaking.start()
    try:
        seen = [len(cameras(bus.sysfs, bus.dev)) for _ in range(200)]
        assert {devices_seen(bus.sysfs) for _ in range(200)} <= {0, 1}
    finally:
        stop.set()
        shaking.join()
    assert set(seen) <= {0, 1}


def test_this_machine_can_be_read():
    """Whatever is plugged in here, if it has USB at all."""
    found = cameras()
    assert len(found) <= (devices_seen() or 0)


@pytest.fixture
def events() -> Iterator[UsbEvents]:
    """Listen to the kernel as any user may."""
    with nobody():
        try:
            listening = UsbEvents()
        except OSError as error:
            pytest.skip(f"netlink is refused here: {error}")
    with contextlib.closing(listening):
        yield listening


def announce(subsystem: str, times: int = 1) -> None:
    """Send what the kernel sends when a device is added, to whoever listens to the kernel."""
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_KOBJECT_UEVENT) as sender:
        path = "/devices/pci0000:00/0000:00:14.0/usb1/1-2"
        message = f"add@{path}\0ACTION=add\0DEVPATH={path}\0SUBSYSTEM={subsystem}\0SEQNUM=1\0"
        for _ in range(times):
            try:
                sender.sendto(message.encode(), (0, KERNEL))
            except PermissionError:
                pytest.skip("needs root")


def is_readable(events: UsbEvents) -> bool:
    return bool(select.select([events], [], [], 0)[0])


def test_an_event_of_usb_is_told_once(events):
    """And wakes whoever waits for it. What happens to other devices is not told."""
    events.drain()
    assert not is_readable(events)
    assert not events.drain()
    announce("usb")
    assert is_readable(events)
    assert events.drain()
    assert not events.drain()
    announce("usbmisc")
    announce("block")
    assert not events.drain()
    announce("net")
    announce("usb")
    announce("net")
    assert events.drain()


def test_an_event_of_the_kernel_itself_is_heard(events):
    """Of the network here: not every machine has USB. It is none of ours."""
    trigger = Path("/sys/class/net/lo/uevent")
    events.drain()
    try:
        trigger.write_text("change")
    except OSError:
        pytest.skip("needs root and a writable /sys")
    if not is_readable(events):
        pytest.skip("the kernel tells this network namespace of no devices")
    assert not events.drain()


def test_lost_events_count_as_events(events):
    """The kernel's buffer is small; thereafter events are told as before."""
    events.drain()
    announce("net", times=5000)
    assert events.drain()
    assert not events.drain()
    announce("usb")
    assert events.drain()


def test_where_events_are_refused_an_error_says_so(monkeypatch):
    """As in a sandbox: the caller then looks from time to time."""
    monkeypatch.setattr(UsbEvents, "_NETLINK_KOBJECT_UEVENT", 31)
    with pytest.raises(OSError):
        UsbEvents()


def test_the_programs_that_have_a_device_open_are_named(tmp_path, program):
    """By their whole name, although the kernel knows 15 letters of it; programs with other files open are not."""
    node, other = tmp_path / "005", tmp_path / "006"
    node.touch()
    other.touch()
    desktop = program("gvfs-gphoto2-volume-monitor", opens=node)
    person = program("darktable", opens=node)
    program("shotwell", opens=other)
    assert sorted(holders(node)) == sorted([(desktop, "gvfs-gphoto2-volume-monitor"), (person, "darktable")])
    assert holders(tmp_path / "007") == []


def test_what_others_have_open_is_not_told_to_everybody(tmp_path, program):
    """That they run is."""
    node = tmp_path / "005"
    node.touch()
    pid = program("gvfsd-gphoto2", opens=node)
    assert holders(node) == [(pid, "gvfsd-gphoto2")]
    with nobody():
        if Path(f"/proc/{pid}/fd").stat().st_uid == os.geteuid():
            pytest.skip("needs root")
        assert holders(node) == []
        assert "gvfsd-gphoto2" in gvfs()


def process(proc: Path, pid: int, command: str, *arguments: str) -> None:
    folder = proc / str(pid)
    folder.mkdir(parents=True)
    (folder / "comm").write_text(command + "\n")
    (folder / "cmdline").write_text("".join(argument + "\0" for argument in arguments))


def test_programs_that_take_cameras_are_found(tmp_path):
    """The desktop's first. KDE's worker is named by what it has loaded; threads of the kernel have no command line."""
    process(tmp_path, 2, "kthreadd")
    process(tmp_path, 900, "gvfsd", "/usr/libexec/gvfsd")
    process(tmp_path, 901, "gvfs-gphoto2-vo", "/usr/libexec/gvfs-gphoto2-volume-monitor")
    process(tmp_path, 902, "gvfsd-gphoto2", "/usr/libexec/gvfsd-gphoto2", "--spawner", ":1.7", "/org/gtk/gvfs/exec")
    worker = "/usr/lib/qt6/plugins/kf6/kio/kio_kamera.so"
    process(tmp_path, 903, "kioworker", "/usr/libexec/kf6/kioworker", worker, "camera", "", "local:/run/x")
    process(tmp_path, 904, "kiod6", "/usr/libexec/kf6/kiod6")
    process(tmp_path, 905, "indi_gphoto_ccd", "indi_gphoto_ccd")
    process(tmp_path, 906, "indi_eqmod_tele", "indi_eqmod_telescope")
    process(tmp_path, 907, "entangle", "entangle")
    process(tmp_path, 908, "vim", "vim", "darktable")
    (tmp_path / "sys").mkdir()
    (tmp_path / "909").mkdir()
    desktop = ["gvfs-gphoto2-volume-monitor", "gvfsd-gphoto2"]
    assert gvfs(tmp_path) == [*desktop, "entangle", "kio_kamera", "kiod6", "indi_gphoto_ccd"]
    assert [name for name in gvfs(tmp_path) if takes_cameras_by_itself(name)] == desktop


def test_where_none_of_them_runs_none_is_found(tmp_path):
    """Nor where /proc is hidden."""
    process(tmp_path / "proc", 1, "systemd", "/sbin/init")
    assert gvfs(tmp_path / "proc") == []
    assert gvfs(tmp_path / "none") == []
    assert holders(Path("/dev/bus/usb/001/005"), tmp_path / "none") == []


def test_our_own_processes_are_known_as_ours(tmp_path):
    """However they were started: by the command, or as a module of Python's."""
    node = "/dev/bus/usb/001/005"
    started = [
        ("hotpixd", "/opt/hotpixd/bin/python3", "/opt/hotpixd/bin/hotpixd", "run"),
        ("python3", "/usr/bin/python3", "-m", "hotpixd.intake.camera_worker", '{"parent": 100}'),
        ("python3", "/usr/bin/python3", "-m", "http.server"),
    ]
    for pid, (command, *arguments) in enumerate(started, 100):
        process(tmp_path, pid, command, *arguments)
        (tmp_path / str(pid) / "fd").mkdir()
        (tmp_path / str(pid) / "fd/5").symlink_to(node)
    assert holders(Path(node), tmp_path) == [(100, "hotpixd"), (101, "hotpixd"), (102, "python3")]
