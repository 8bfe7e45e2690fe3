"""Which USB devices may be cameras, who else has them open, and when it is time to look again.

All of it is read from the kernel. libgphoto2 would have libusb list the
devices, and loses 170 kB each time it finds none; the same descriptors are
files below /sys, whose reading takes milliseconds and no right to the device.
"""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

SYS, DEV, PROC = Path("/sys"), Path("/dev"), Path("/proc")

_HUB, _STORAGE, _PRINTER, _VIDEO, _VENDOR = 0x09, 0x08, 0x07, 0x0E, 0xFF
"""Classes of interfaces, as usb.org numbers them. The last one means: as its maker likes."""

_PTP = (0x06, 0x01, 0x01)
"""Class, subclass and protocol of the interface that tethering goes through; MTP is the same with more commands."""

_HELD = "usbfs"
"""The driver that an interface is bound to while a program, and not the kernel, has claimed it."""


@dataclass(frozen=True, slots=True)
class _Maker:
    name: str

    products: range = range(0x10000)
    """The product numbers of its cameras. Its printers, scanners and recorders have others."""

    speaks_its_own: bool = True
    """Whether an interface of its own class may belong to a camera: old ones had a protocol before there was PTP."""


# Of usb.ids 2025.07.26. Sony numbers its cameras among everything else; what it makes with an interface of its own
# class are readers of smart cards, built into laptops.
_MAKERS = {
    0x040A: _Maker("Kodak", range(0x0100, 0x1000)),
    0x04A9: _Maker("Canon", range(0x3000, 0x4000)),
    0x04B0: _Maker("Nikon", range(0x0100, 0x0F00)),
    0x04CB: _Maker("Fujifilm", range(0x0100, 0x1000)),
    0x04DA: _Maker("Panasonic", range(0x2300, 0x2500)),
    0x054C: _Maker("Sony", speaks_its_own=False),
    0x07B4: _Maker("Olympus", range(0x0100, 0x0200)),
    0x07CF: _Maker("Casio", range(0x1000, 0x2000)),
    0x0A17: _Maker("Pentax"),
    0x1003: _Maker("Sigma"),
    0x1A98: _Maker("Leica"),
    0x22DB: _Maker("Phase One"),
    0x25B7: _Maker("Hasselblad"),
    0x25FB: _Maker("Ricoh"),
    0x2672: _Maker("GoPro"),
    0x2756: _Maker("Hasselblad"),
    0x33A2: _Maker("OM System"),
}

_GVFS = ("gvfs-gphoto2-volume-monitor", "gvfsd-gphoto2", "gvfs-mtp-volume-monitor", "gvfsd-mtp")
"""GNOME's, and of most other desktops too: they open a camera as soon as it is plugged in."""

_TETHERING = (
    "darktable", "digikam", "entangle", "gphoto2", "gphotofs", "gtkam", "kio_kamera", "pktriggercord", "qdslrdashboard",
    "rapid-photo-downloader", "shotwell", "kiod5", "kiod6",
)  # fmt: skip
"""Programs that people open cameras with. KDE's kiod always runs, and is the least suspect."""


@dataclass(frozen=True, slots=True)
class UsbDevice:
    """A device that may be a camera."""

    bus: int
    device: int
    """Where it is until it is unplugged; the same camera gets another number each time."""

    vendor: int
    product: int

    manufacturer: str | None
    name: str | None
    serial: str | None
    """As the device calls itself. None if it does not."""

    ptp: bool
    """Has a PTP interface: it can be tethered."""

    storage: bool
    """Has a mass storage interface: it shows its card as a disk."""

    claimed: bool
    """Some program, perhaps we, has claimed the interface that tethering goes through."""

    node: Path
    """The file that a program opens to talk to it."""

    video: bool = False
    """Has a video interface: it serves as a webcam."""

    @property
    def port(self) -> str:
        """Its name for libgphoto2."""
        return f"usb:{self.bus:03},{self.device:03}"

    @property
    def maker(self) -> str | None:
        """Who made it. None if that is not a maker of cameras: a phone, say."""
        maker = _MAKERS.get(self.vendor)
        return maker.name if maker else None


@dataclass(frozen=True, slots=True)
class _Interface:
    triple: tuple[int, int, int]
    """Class, subclass, protocol."""

    driver: str | None


def cameras(sysfs: Path = SYS, dev: Path = DEV) -> list[UsbDevice]:
    """Return the devices that may be cameras, ordered by port.

    That is every device with a PTP interface, whoever made it: also a phone that shows its pictures. Of makers of
    cameras also what has an interface of their own, and what shows a card or a webcam but no PTP: it may be a camera in
    the wrong USB mode.
    """
    found = []
    for folder in _folders(sysfs):
        device = _camera(folder, dev)
        if device is not None:
            found.append(device)
    return sorted(found, key=lambda device: device.port)


def devices_seen(sysfs: Path = SYS) -> int | None:
    """Count all USB devices but hubs. None: there is no USB here, or it is kept from us."""
    if not _bus(sysfs).is_dir():
        return None
    return sum(_number(folder / "bDeviceClass", 16) not in (None, _HUB) for folder in _folders(sysfs))


class UsbEvents:
    """Tells that devices came, went or became ready since the last time it was asked.

    The kernel says so as soon as a device is there, and udev once it has set who may open it: both are heard, so that
    a look after the last event finds what stays. That a program claims an interface or lets go of it is an event as
    well, also if that program is ours: a reason to look, not to open.

    Raises
    ------
    OSError
        If the kernel or a sandbox refuses: then one has to look from time to time.
    """

    _KERNEL_AND_UDEV = 1 | 2
    _NETLINK_KOBJECT_UEVENT = 15
    _LARGEST = 64 * 1024

    def __init__(self) -> None:
        kind = socket.SOCK_RAW | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC
        self._socket = socket.socket(socket.AF_NETLINK, kind, self._NETLINK_KOBJECT_UEVENT)
        try:
            self._socket.bind((0, self._KERNEL_AND_UDEV))
        except OSError:
            self._socket.close()
            raise

    def fileno(self) -> int:
        """Return what to wait for: it is readable when something may have happened."""
        return self._socket.fileno()

    def drain(self) -> bool:
        """Tell whether something happened to a USB device since, or may have; without waiting."""
        happened = False
        while True:
            try:
                message = self._socket.recv(self._LARGEST)
            except BlockingIOError:
                return happened
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise
                # Events came faster than they were read, and some are lost.
                happened = True
                continue
            happened = happened or b"SUBSYSTEM=usb\0" in message

    def close(self) -> None:
        """Hear no more."""
        self._socket.close()


def holders(node: Path, proc: Path = PROC) -> list[tuple[int, str]]:
    """Return number and name of each process that has a device open, as far as /proc lets us see.

    Processes of others are seen by root only; in a sandbox perhaps not even then.
    """
    wanted = str(node)
    return [(pid, _process_name(proc / str(pid))) for pid in _processes(proc) if wanted in _open_files(proc / str(pid))]


def gvfs(proc: Path = PROC) -> list[str]:
    """Return the names of running programs that take cameras: those of the desktop first, then those people start."""
    names = {_process_name(proc / str(pid)) for pid in _processes(proc)}
    known = [name for name in (*_GVFS, *_TETHERING) if name in names]
    # INDI has a driver for each make: indi_gphoto_ccd, indi_canon_ccd, indi_nikon_ccd, ...
    return known + sorted(name for name in names if name.startswith("indi_") and name.endswith("_ccd"))


def takes_cameras_by_itself(program: str) -> bool:
    """Tell whether a program belongs to the desktop, which opens cameras unasked."""
    return program in _GVFS


def _bus(sysfs: Path) -> Path:
    return sysfs / "bus" / "usb" / "devices"


def _folders(sysfs: Path) -> Iterator[Path]:
    """Yield the folder of each device. Interfaces lie beside them, with a colon in their names, and are left out."""
    for name in sorted(_names_in(_bus(sysfs))):
        if ":" not in name:
            yield _bus(sysfs) / name


def _camera(folder: Path, dev: Path) -> UsbDevice | None:
    """Read one device. None if it is no camera, or gone while being read."""
    bus, device = _number(folder / "busnum"), _number(folder / "devnum")
    vendor, product = _number(folder / "idVendor", 16), _number(folder / "idProduct", 16)
    if bus is None or device is None or vendor is None or product is None:
        return None
    if _number(folder / "bDeviceClass", 16) == _HUB:
        return None
    interfaces = _interfaces(folder)
    classes = {interface.triple[0] for interface in interfaces}
    ptp = any(interface.triple == _PTP for interface in interfaces)
    if not ptp and not _may_be_camera(vendor, product, classes):
        return None
    held = [interface for interface in interfaces if interface.driver == _HELD]
    return UsbDevice(
        bus=bus,
        device=device,
        vendor=vendor,
        product=product,
        manufacturer=_text(folder / "manufacturer"),
        name=_text(folder / "product"),
        serial=_text(folder / "serial"),
        ptp=ptp,
        storage=_STORAGE in classes,
        claimed=any(interface.triple == _PTP or interface.triple[0] == _VENDOR for interface in held),
        node=dev / "bus" / "usb" / f"{bus:03}" / f"{device:03}",
        video=_VIDEO in classes,
    )


def _may_be_camera(vendor: int, product: int, classes: set[int]) -> bool:
    maker = _MAKERS.get(vendor)
    if maker is None or product not in maker.products or _PRINTER in classes:
        return False
    return bool(classes & {_STORAGE, _VIDEO}) or (maker.speaks_its_own and _VENDOR in classes)


def _interfaces(folder: Path) -> list[_Interface]:
    """Return the interfaces of the configuration that is in use: a device that is locked out has none."""
    found = []
    for name in _names_in(folder):
        if not name.startswith(f"{folder.name}:"):
            continue
        parts = [_number(folder / name / f"bInterface{part}", 16) for part in ("Class", "SubClass", "Protocol")]
        kind, subclass, protocol = parts
        if kind is not None and subclass is not None and protocol is not None:
            found.append(_Interface((kind, subclass, protocol), _driver(folder / name)))
    return found


def _driver(interface: Path) -> str | None:
    try:
        return (interface / "driver").readlink().name
    except OSError:
        return None


def _names_in(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)  # noqa: PTH208 - names are all that is wanted
    except OSError:
        return []


def _text(path: Path) -> str | None:
    """Read an attribute. None if it is empty or not there: devices need not have a name, and vanish at any time."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip() or None
    except OSError:
        return None


def _number(path: Path, base: int = 10) -> int | None:
    try:
        return int(_text(path) or "", base)
    except ValueError:
        return None


def _processes(proc: Path) -> list[int]:
    return sorted(int(name) for name in _names_in(proc) if name.isdecimal())


def _open_files(process: Path) -> set[str]:
    """Return where the open files of a process are. None of them if it is somebody else's, or has ended."""
    found = set()
    for name in _names_in(process / "fd"):
        try:
            found.add(str((process / "fd" / name).readlink()))
        except OSError:
            # Closed meanwhile.
            continue
    return found


def _process_name(process: Path) -> str:
    """Return what a process is called. The kernel cuts the name at 15 letters; the command line may have all of it."""
    command = _text(process / "comm") or "?"
    arguments = [argument.rpartition("/")[2] for argument in (_text(process / "cmdline") or "").split("\0")]
    # KDE's workers are one program that loads what it is to be; where they are forked, they call themselves by that.
    if "kio_kamera.so" in (command, *arguments[:2]):
        return "kio_kamera"
    if arguments[0].startswith("python") and any(argument.startswith("hotpixd") for argument in arguments[1:5]):
        return "hotpixd"
    return arguments[0] if arguments[0].startswith(command) else command
