"""Why a camera cannot be used, or not fully, each with the one thing that cures it.

Three kinds of facts are judged: what the kernel says of USB, what the camera
says of itself once it is open, and the results of libgphoto2. A finding is a
single line, since it is also what the running daemon shows as its state.
"""

from __future__ import annotations

import grp
import os
import pwd
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from hotpixd.intake.usb import PROC, UsbDevice, gvfs, holders, takes_cameras_by_itself

What = Literal[
    "ok", "usb", "permission", "claimed", "mode", "target", "save-to", "card", "battery", "noise-reduction", "dial",
    "quality", "release", "link", "busy", "file", "error",
]  # fmt: skip

Kind = Literal["claimed", "absent", "link", "busy", "full", "unsupported", "missing", "unknown"]

_KINDS: dict[int, Kind] = {
    -1: "link",
    -3: "full",
    -5: "absent",
    -6: "unsupported",
    -7: "link",
    -10: "link",
    -34: "link",
    -35: "link",
    -52: "link",
    -53: "claimed",
    -60: "claimed",
    -105: "absent",
    -107: "missing",
    -108: "missing",
    -110: "busy",
    -115: "full",
}
"""What a result of libgphoto2 means for us. -2 (bad parameters) means anything: an unknown setting, or a dead link."""

_INSTALL_RULES = (
    "sudo install -m 644 systemd/59-hotpixd.rules /etc/udev/rules.d/ && sudo udevadm control --reload"
    # As if plugged in anew: for a mere change, the rules of libgphoto2 do nothing.
    " && sudo udevadm trigger --action=add --subsystem-match=usb"
)
_LOOK_AT_CABLE = "Switch the camera on, check that the cable is one for data, and set its USB mode to PTP or PC Remote"

_USB_MODES = {
    "Fujifilm": 'set Connection Mode to "USB Tether Shooting Auto"',
    "Nikon": 'set USB to "MTP/PTP"',
    "Panasonic": 'set USB Mode to "PC (Tether)"',
    "Pentax": 'set USB Connection to "PTP"',
    "Ricoh": 'set USB Connection to "PTP"',
    "Sony": 'set USB Connection to "PC Remote"',
}
"""What the menus of some makers call it."""

_AUTOMATIC = frozenset(("a", "auto", "av", "intelligent auto", "p", "program", "s", "superior auto", "tv"))
"""Positions of the mode dial, as libgphoto2 calls them, in which the camera has a say in the exposure."""

_RAW = ("raw", "nef", "dng", "pef")
"""What the name of an image quality contains if a raw file is part of it."""

_DOING = {
    "bulb": "holding its shutter open",
    "delete": "deleting a file",
    "fetch": "fetching a shot",
    "get": "reading its settings",
    "list": "listing its files",
    "open": "being opened",
    "set": "changing a setting",
    "trigger": "releasing its shutter",
}
"""The orders to the process that talks to the camera, as people would say it."""

_LEAST_FREE_BYTES = 100_000_000
_LEAST_FREE_SHARE = 0.01
_LOW_BATTERY_PERCENT = 20


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was found."""

    what: What

    level: Literal["ok", "warning", "fault"]
    """Fault: no shots come. Warning: some things do not work, or soon nothing will."""

    text: str
    """A sentence, on one line."""

    cure: str | None = None
    """A shell command, or what to do with the camera. None if there is nothing to do."""


def classify(code: int) -> Kind:
    """Return what a result of libgphoto2 means."""
    return _KINDS.get(code, "unknown")


def usb_findings(
    devices: Sequence[UsbDevice], *, seen: int | None, user: str | None = None, proc: Path = PROC
) -> list[Finding]:
    """Judge what is plugged in, without opening anything.

    Parameters
    ----------
    devices : as `usb.cameras` returns them
    seen : as `usb.devices_seen` returns it
    user : name of whoever runs this, who is to open the camera; looked up if None
    """
    if not devices:
        return [_nothing(seen)]
    usable = any(not _is_in_wrong_mode(device) for device in devices)
    return [_usb_finding(device, usable, user or _user(), proc) for device in devices]


def camera_findings(opened: Mapping[str, Any]) -> list[Finding]:
    """Judge what a camera says of itself.

    Parameters
    ----------
    opened : what the process that opened it has reported. What is missing or None is not known, and not judged;
        `autopoweroff` is not judged either: libgphoto2 keeps awake the cameras that have it.
    """
    model = opened.get("model") or "The camera"
    target = opened.get("target")
    found = [
        *_card_findings(opened, model),
        *([_memory_only(model)] if target == "ram" else []),
        *_battery_findings(opened.get("battery_percent"), model),
        *_setting_findings(opened, model),
    ]
    return found or [Finding("ok", "ok", f"{model} is ready: {_state(opened)}.")]


def error_finding(
    code: int,
    text: str,
    doing: str,
    port: str | None,
    devices: Sequence[UsbDevice],
    *,
    user: str | None = None,
    ours: Collection[int] = (),
    proc: Path = PROC,
) -> Finding:
    """Say what an error of libgphoto2 means, with what else is known of the camera at that port.

    Parameters
    ----------
    code, text : the result, and libgphoto2's words for it
    doing : the order that failed ("open", "fetch", ...), or what was being done ("reading iso")
    port : as libgphoto2 writes it. None if no camera was found yet
    devices : what is plugged in now
    user : name of whoever runs this and opens the camera; looked up if None
    ours : numbers of our processes that may have the device open
    """
    kind = classify(code)
    device = _at(port, devices)
    if device is None:
        return _without_device(kind, code, text, doing, port)
    camera = _named(device)
    if kind in ("absent", "claimed", "link", "unknown"):
        # Whoever is not allowed to open it gets any of these; -7 (I/O problem), as a rule.
        denied = _denied(device, user or _user())
        if denied is not None:
            return denied
    if kind == "claimed":
        return _claimed(device, proc, ours)
    if kind == "absent":
        if _is_in_wrong_mode(device):
            return _wrong_mode(device, "fault")
        return _fault("mode", f"libgphoto2 does not know {camera} in its present USB mode.", _usb_mode(device))
    return _trouble(kind, code, text, doing, camera)


def _fault(what: What, text: str, cure: str | None = None) -> Finding:
    return Finding(what, "fault", text, cure)


def _warning(what: What, text: str, cure: str | None = None) -> Finding:
    return Finding(what, "warning", text, cure)


def _nothing(seen: int | None) -> Finding:
    if seen is None:
        text = "This machine shows no USB: it may be a container, or a virtual machine."
        return _fault("usb", text, "Pass the camera on to it; to a container by docker run --device=/dev/bus/usb")
    if seen == 0:
        return _fault("usb", "No camera on USB: nothing is plugged in.", _LOOK_AT_CABLE)
    if seen == 1:
        return _fault("usb", "No camera on USB: 1 device, which is not a camera.", _LOOK_AT_CABLE)
    return _fault("usb", f"No camera on USB: {seen} devices, none of them a camera.", _LOOK_AT_CABLE)


def _usb_finding(device: UsbDevice, another_is_usable: bool, user: str, proc: Path) -> Finding:
    if _is_in_wrong_mode(device):
        return _wrong_mode(device, "warning" if another_is_usable else "fault")
    denied = _denied(device, user)
    if denied is not None:
        return denied
    if not device.claimed:
        return Finding("ok", "ok", f"{_named(device)} is on {device.port}, and {user} may open it.")
    by_us = [pid for pid, name in holders(device.node, proc) if name == "hotpixd"]
    if by_us:
        return Finding("ok", "ok", f"{_named(device)} is on {device.port}, and hotpixd has it open (pid {by_us[0]}).")
    return _claimed(device, proc, ())


def _is_in_wrong_mode(device: UsbDevice) -> bool:
    return not device.ptp and (device.storage or device.video)


def _wrong_mode(device: UsbDevice, level: Literal["warning", "fault"]) -> Finding:
    shown = "its card as a disk" if device.storage else "itself as a webcam"
    return Finding("mode", level, f"{_named(device)} shows {shown}; so it cannot be tethered.", _usb_mode(device))


def _usb_mode(device: UsbDevice) -> str:
    mode = _USB_MODES.get(device.maker or "", 'set the USB connection to "PTP", "PC Remote" or "Tether"')
    return f"In the camera's menu, {mode}, then plug it in again"


def _denied(device: UsbDevice, user: str) -> Finding | None:
    """Say why we may not open a device. None if we may."""
    if os.access(device.node, os.R_OK | os.W_OK, effective_ids=True):
        return None
    try:
        status = device.node.stat()
    except OSError:
        text = f"{_named(device)} is plugged in, but {device.node} is not there, as in a container."
        return _fault("permission", text, "Pass it on to the container: docker run --device=/dev/bus/usb")
    text = f"{user} may not open {_named(device)} ({device.node})."
    group = _group_that_may(status)
    if group is None:
        return _fault("permission", text, _INSTALL_RULES)
    if user in group.gr_mem:
        return _fault("permission", text, f"Log in again, or restart the service: {user} is new in {group.gr_name}")
    return _fault("permission", text, f"sudo usermod -aG {group.gr_name} {user}  # then log in again")


def _group_that_may(status: os.stat_result) -> grp.struct_group | None:
    """Return the group whose members may open a device, unless that is root's."""
    if status.st_gid == 0 or status.st_mode & 0o060 != 0o060:
        return None
    try:
        return grp.getgrgid(status.st_gid)
    except KeyError:
        return None


def _claimed(device: UsbDevice, proc: Path, ours: Collection[int]) -> Finding:
    camera = _named(device)
    others = [(pid, name) for pid, name in holders(device.node, proc) if pid not in {*ours, os.getpid()}]
    if not others:
        return _claimed_by_somebody(device, proc)
    pid, name = others[0]
    if takes_cameras_by_itself(name):
        return _fault("claimed", f"The desktop has {camera} open ({name}, pid {pid}).", _free_from_desktop(name))
    if name == "hotpixd":
        cure = "systemctl --user stop hotpixd; sudo systemctl stop hotpixd"
        return _fault("claimed", f"Another hotpixd has {camera} open (pid {pid}).", cure)
    return _fault("claimed", f"{name} (pid {pid}) has {camera} open.", f"Quit {name}, or: kill {pid}")


def _claimed_by_somebody(device: UsbDevice, proc: Path) -> Finding:
    """Name the usual suspects: whose files a process has open is told to its owner and to root only."""
    camera = _named(device)
    running = gvfs(proc)
    if not running:
        return _fault("claimed", f"Another program has {camera} open.", f"sudo fuser -v {device.node}")
    name = running[0]
    if takes_cameras_by_itself(name):
        text = f"Another program has {camera} open, probably the desktop ({name})."
        return _fault("claimed", text, _free_from_desktop(name))
    return _fault("claimed", f"Another program has {camera} open, perhaps {name}.", f"Quit {name}")


def _free_from_desktop(program: str) -> str:
    """Return what the user at the desktop has to do: the first command lets go for now, the second for good."""
    scheme = "mtp" if "mtp" in program else "gphoto2"
    return f"gio mount -s {scheme}; systemctl --user mask --now gvfs-{scheme}-volume-monitor.service"


def _card_findings(opened: Mapping[str, Any], model: str) -> list[Finding]:
    storages = opened.get("storages")
    if storages is None:
        return []
    if not storages:
        if opened.get("target") == "ram" and _is_sony(model):
            # It does not show a card that it does not save to; `_memory_only` says what there is to say.
            return []
        return [_fault("card", f"{model} has no card.", "Put a card into the camera")]
    if all(storage.get("read_only") for storage in storages):
        return [_fault("card", f"The card of {model} is write-protected.", "Move the switch on the card's side")]
    writable = [storage for storage in storages if not storage.get("read_only")]
    if all(_is_full(storage) for storage in writable):
        free = sum(storage["free_kb"] for storage in writable)
        text = f"The card of {model} is full: {_size(free)} are free."
        return [_fault("card", text, "Put an empty card into the camera")]
    return []


def _is_full(storage: Mapping[str, Any]) -> bool:
    """Tell whether there is no room. Unknown where a camera does not say how large its card is."""
    capacity, free = storage.get("capacity_kb") or 0, storage.get("free_kb")
    if not capacity or free is None:
        return False
    return bool(free * 1024 < _LEAST_FREE_BYTES or free < _LEAST_FREE_SHARE * capacity)


def _memory_only(model: str) -> Finding:
    text = f"Shots of {model} go to its memory, not to a card: one that is not fetched is lost."
    if _is_sony(model):
        return _warning("save-to", text, 'In the camera\'s menu, set Still Img. Save Dest. to "PC+Camera"')
    return _warning("target", text, "Put a card into the camera, and have its menu save shots to the card")


def _is_sony(model: str) -> bool:
    return model.lower().startswith("sony")


def _battery_findings(percent: int | None, model: str) -> list[Finding]:
    if percent is None or percent > _LOW_BATTERY_PERCENT:
        return []
    return [_warning("battery", f"The battery of {model} is at {percent} %.", "Charge it, or use a mains adapter")]


def _setting_findings(opened: Mapping[str, Any], model: str) -> list[Finding]:
    found = []
    if opened.get("long_exposure_nr"):
        text = f"{model} takes long exposures twice, and subtracts a dark of its own: hot pixels are hidden."
        found.append(_warning("noise-reduction", text, "In the camera's menu, turn Long Exposure NR off"))
    dial = opened.get("mode_dial")
    if str(dial).lower() in _AUTOMATIC:
        text = f"The mode dial of {model} is at {dial}: darks need an exposure that the camera does not change."
        found.append(_warning("dial", text, "Turn the mode dial to M"))
    quality = opened.get("image_quality")
    if quality and not any(word in str(quality).lower() for word in _RAW):
        text = f'{model} writes no raw files ("{quality}"): they show more defects.'
        found.append(_warning("quality", text, "In the camera's menu, set the image quality to RAW"))
    if opened.get("can_trigger") is False:
        text = f"{model} cannot be released from here: shots are fetched, but darks you have to take yourself."
        found.append(_warning("release", text))
    return found


def _state(opened: Mapping[str, Any]) -> str:
    told = []
    if opened.get("serial"):
        told.append(f"serial {opened['serial']}")
    if opened.get("port"):
        told.append(f"on {opened['port']}")
    free = sum(storage.get("free_kb") or 0 for storage in opened.get("storages") or ())
    if free:
        told.append(f"{_size(free)} free")
    if opened.get("battery_percent") is not None:
        told.append(f"battery at {opened['battery_percent']} %")
    return ", ".join(told) or "nothing is amiss"


def _without_device(kind: Kind, code: int, text: str, doing: str, port: str | None) -> Finding:
    """Judge an error where USB shows no such camera: it is gone, or it was never on USB."""
    if port is None:
        return _fault("usb", "No camera on USB.", _LOOK_AT_CABLE)
    if port.startswith("usb:") and kind in ("absent", "claimed", "link", "unknown"):
        cure = "Plug it in and switch it on; if it fell asleep, press its shutter halfway"
        return _fault("usb", f"The camera on {port} is gone.", cure)
    if kind == "absent":
        return _fault("link", f"There is no camera at {port}.", "Switch the camera on, and its network")
    found = _trouble(kind, code, text, doing, f"the camera on {port}")
    if kind == "link" and port.startswith("ptpip:"):
        return replace(found, cure="Switch it and its network on, and check that its address is still this one")
    return found


def _trouble(kind: Kind, code: int, text: str, doing: str, camera: str) -> Finding:
    """Judge an error that is between the camera and us."""
    while_ = f"while {_DOING.get(doing, doing)}"
    subject = camera[0].upper() + camera[1:]
    if kind == "full":
        return _fault("card", f"{subject} has no room for a shot.", "Put an empty card into the camera")
    if code == -1 and doing in ("trigger", "bulb"):
        # The only sign of a full card that some cameras give.
        return _fault("card", f"{subject} took no shot, as with a full card.", "Put an empty card into the camera")
    if kind == "busy":
        cure = "Leave its menus and playback, and let it finish writing"
        return _warning("busy", f"{subject} is busy {while_}.", cure)
    if kind == "link":
        cure = "Check cable and hub; switch the camera off and on"
        return _fault("link", f"{subject} does not answer {while_} ({text}).", cure)
    if kind == "claimed":
        return _fault("claimed", f"Another program has {camera} open.", "Quit the other program")
    if kind == "unsupported":
        return _warning("file", f"{subject} refuses that {while_}.")
    if kind == "missing":
        return _warning("file", f"{subject} misses a file or folder {while_}; it is looked for again.")
    return _fault("error", f"{subject} failed {while_}: {text} ({code}).")


def _at(port: str | None, devices: Sequence[UsbDevice]) -> UsbDevice | None:
    """Return the device at a port. Where no port is known yet, the only one there is, or the first."""
    if port is None:
        return devices[0] if devices else None
    return next((device for device in devices if device.port == port), None)


def _named(device: UsbDevice) -> str:
    """Name a device for people: makers and models repeat each other, or are missing."""
    if device.name is None:
        return f"{device.maker} camera" if device.maker else f"USB device {device.vendor:04x}:{device.product:04x}"
    if device.maker is None or device.maker.lower() in device.name.lower():
        return device.name
    return f"{device.maker} {device.name}"


def _user() -> str:
    try:
        return pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        return f"user {os.geteuid()}"


def _size(kilobytes: int) -> str:
    """Write a size in units of 1000, as on the card's label."""
    megabytes = kilobytes * 1024 / 1e6
    return f"{megabytes / 1000:.1f} GB" if megabytes >= 1000 else f"{megabytes:.0f} MB"
