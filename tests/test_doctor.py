"""What keeps a camera from being used is found and named, with a cure; a healthy camera is left alone."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from conftest import nobody
from hotpixd.intake import doctor
from hotpixd.intake.doctor import Finding, camera_findings, classify, error_finding, usb_findings
from hotpixd.intake.usb import UsbDevice

CANON = UsbDevice(
    bus=1,
    device=5,
    vendor=0x04A9,
    product=0x32F4,
    manufacturer="Canon Inc.",
    name="Canon Digital Camera",
    serial="0123456789ab",
    ptp=True,
    storage=False,
    claimed=False,
    node=Path("/dev/null"),
)

OPENED: dict[str, Any] = {
    "model": "Canon.Inc Canon EOS R5",
    "serial": "012345",
    "port": "usb:001,005",
    "target": "card",
    "storages": [{"name": "/store_00010001", "capacity_kb": 62_500_000, "free_kb": 50_000_000, "read_only": False}],
    "battery_percent": 80,
    "mode_dial": "Manual",
    "long_exposure_nr": False,
    "image_quality": "RAW",
    "can_trigger": True,
    "can_bulb": True,
    "autopoweroff": "60",
}


@pytest.fixture
def nodes(runtime: Path) -> Path:
    """Return a folder for device files that everybody may enter, as that of udev is."""
    runtime.chmod(0o755)
    return runtime


@pytest.fixture
def camera(nodes: Path) -> UsbDevice:
    """Return a healthy camera that everybody may open."""
    node = nodes / "005"
    node.touch()
    node.chmod(0o666)
    return replace(CANON, node=node)


@pytest.fixture
def quiet(tmp_path: Path) -> Path:
    """Return a /proc in which nothing runs."""
    (tmp_path / "proc").mkdir()
    return tmp_path / "proc"


@pytest.fixture
def program(tmp_path: Path) -> Iterator[Callable[[str, Path], int]]:
    """Return what starts a program of any name that has a file open; all are gone when the test ends."""
    running = []

    def started(name: str, opens: Path) -> int:
        path = tmp_path / name
        shutil.copy(shutil.which("sleep") or "sleep", path)
        with opens.open("rb") as file:
            running.append(subprocess.Popen([path, "60"], stdin=file))
        return running[-1].pid

    yield started
    for process in running:
        process.kill()
        process.wait()


def said(findings: list[Finding]) -> list[tuple[str, str]]:
    return [(finding.what, finding.level) for finding in findings]


def command(finding: Finding) -> str:
    """Return the cure, which a shell must understand."""
    subprocess.run(["sh", "-n", "-c", finding.cure or "("], check=True)
    return finding.cure or ""


# What USB shows


def test_a_healthy_camera_on_usb_is_all_right(camera):
    """Nothing else is said of it."""
    assert usb_findings([camera], seen=3, user="ann") == [
        Finding("ok", "ok", "Canon Digital Camera is on usb:001,005, and ann may open it.")
    ]


@pytest.mark.parametrize(
    ("seen", "text"),
    [
        (None, "This machine shows no USB: it may be a container, or a virtual machine."),
        (0, "No camera on USB: nothing is plugged in."),
        (1, "No camera on USB: 1 device, which is not a camera."),
        (5, "No camera on USB: 5 devices, none of them a camera."),
    ],
)
def test_without_a_camera_it_is_told_what_there_is(seen, text):
    """So that one knows whether USB works at all; the cure is in one's hands."""
    [finding] = usb_findings([], seen=seen)
    assert (finding.what, finding.level, finding.text) == ("usb", "fault", text)
    assert ("container" if seen is None else "Switch the camera on") in (finding.cure or "")


@pytest.mark.parametrize(
    ("changes", "shown", "cure"),
    [
        ({"storage": True}, "its card as a disk", '"PTP"'),
        ({"video": True}, "itself as a webcam", '"PTP"'),
        ({"storage": True, "vendor": 0x054C, "name": "ILCE-7M3"}, "its card as a disk", '"PC Remote"'),
        ({"storage": True, "vendor": 0x04CB, "name": "X-T5"}, "its card as a disk", '"USB Tether Shooting Auto"'),
    ],
)
def test_a_wrong_usb_mode_is_told_with_the_right_one(camera, changes, shown, cure):
    """By the name it has in the menu of that maker, where that is known."""
    [finding] = usb_findings([replace(camera, ptp=False, **changes)], seen=1)
    assert (finding.what, finding.level) == ("mode", "fault")
    assert shown in finding.text
    assert cure in (finding.cure or "")


def test_a_disk_beside_a_camera_that_works_is_no_fault(camera):
    """It may be a card reader of the same maker. A camera with both interfaces is in no wrong mode."""
    disk = replace(camera, device=6, vendor=0x054C, name="Storage Media", ptp=False, storage=True)
    found = usb_findings([camera, disk], seen=2)
    assert said(found) == [("ok", "ok"), ("mode", "warning")]
    assert found[1].text.startswith("Sony Storage Media shows its card")
    assert said(usb_findings([replace(camera, storage=True)], seen=1)) == [("ok", "ok")]


def forbid(node: Path, mode: int, gid: int = 0) -> None:
    """Give a device file to root and a group; to somebody else, if the tests are not run by root."""
    node.chmod(mode)
    if os.geteuid() == 0:
        os.chown(node, 0, gid)


def test_a_camera_that_may_not_be_opened_needs_our_rule(camera):
    """Not so for root, nor once everybody may open it. The command names a file that there is."""
    forbid(camera.node, 0o444)
    with nobody():
        [finding] = usb_findings([camera], seen=1, user="ann")
    assert (finding.what, finding.level) == ("permission", "fault")
    assert finding.text == f"ann may not open Canon Digital Camera ({camera.node})."
    cure = command(finding)
    rules = cure.partition("-m 644 ")[2].partition(" ")[0]
    assert (Path(__file__).parents[1] / rules).is_file()
    assert cure.startswith("sudo install -m 644")
    assert "udevadm control --reload && sudo udevadm trigger" in cure
    if os.geteuid() == 0:
        assert said(usb_findings([camera], seen=1)) == [("ok", "ok")]
    camera.node.chmod(0o666)
    with nobody():
        assert said(usb_findings([camera], seen=1)) == [("ok", "ok")]


@pytest.mark.parametrize(
    ("members", "cure"),
    [
        ([], "sudo usermod -aG plugdev ann  # then log in again"),
        (["ann"], "Log in again, or restart the service: ann is new in plugdev"),
    ],
)
def test_where_a_group_may_open_the_camera_one_joins_it(camera, monkeypatch, members, cure):
    """As with Debian's rules for libgphoto2. Membership begins with the next login."""
    forbid(camera.node, 0o064, gid=46)
    monkeypatch.setattr(doctor.grp, "getgrgid", lambda gid: doctor.grp.struct_group(("plugdev", "x", gid, members)))
    with nobody():
        [finding] = usb_findings([camera], seen=1, user="ann")
    assert (finding.what, finding.cure) == ("permission", cure)
    assert members or command(finding)


def test_a_group_without_a_name_is_joined_by_nobody(camera, monkeypatch):
    """As with a device that a container was given: the rule it is."""
    forbid(camera.node, 0o064, gid=46)
    monkeypatch.setattr(doctor.grp, "getgrgid", {}.__getitem__)
    with nobody():
        [finding] = usb_findings([camera], seen=1, user="ann")
    assert command(finding).startswith("sudo install -m 644")


def test_a_camera_without_a_device_file_is_in_a_container(camera):
    """Which shows the machine's /sys, but not its /dev: for root as well."""
    camera.node.unlink()
    [finding] = usb_findings([camera], seen=1)
    assert (finding.what, finding.level) == ("permission", "fault")
    assert "docker run --device=/dev/bus/usb" in (finding.cure or "")


@pytest.mark.parametrize("name", ["gvfs-gphoto2-volume-monitor", "gvfsd-gphoto2"])
def test_a_camera_that_the_desktop_has_taken_is_freed_by_one_command(camera, program, name):
    """The mount first, then what would mount it again. A camera nobody has claimed is all right although they run."""
    pid = program(name, camera.node)
    [finding] = usb_findings([replace(camera, claimed=True)], seen=1)
    assert (finding.what, finding.level) == ("claimed", "fault")
    assert finding.text == f"The desktop has Canon Digital Camera open ({name}, pid {pid})."
    assert command(finding) == "gio mount -s gphoto2; systemctl --user mask --now gvfs-gphoto2-volume-monitor.service"
    assert said(usb_findings([camera], seen=1)) == [("ok", "ok")]


def test_a_camera_taken_as_a_music_player_is_freed_likewise(camera, program):
    """Some cameras speak MTP as well, and the desktop has a program for that."""
    program("gvfsd-mtp", camera.node)
    [finding] = usb_findings([replace(camera, claimed=True)], seen=1)
    assert command(finding) == "gio mount -s mtp; systemctl --user mask --now gvfs-mtp-volume-monitor.service"


def test_another_program_that_has_the_camera_is_named(camera, program):
    """With its number, since it may have no window."""
    pid = program("darktable", camera.node)
    [finding] = usb_findings([replace(camera, claimed=True)], seen=1)
    assert finding == Finding(
        "claimed", "fault", f"darktable (pid {pid}) has Canon Digital Camera open.", f"Quit darktable, or: kill {pid}"
    )


def test_that_hotpixd_has_the_camera_is_all_right(camera, program):
    """It is what one wants, unless another one fails by it."""
    pid = program("hotpixd", camera.node)
    claimed = replace(camera, claimed=True)
    [finding] = usb_findings([claimed], seen=1)
    assert (finding.level, finding.text.endswith(f"hotpixd has it open (pid {pid}).")) == ("ok", True)
    finding = error_finding(-53, "Could not claim the USB device", "open", claimed.port, [claimed])
    assert (finding.what, finding.level) == ("claimed", "fault")
    assert finding.text == f"Another hotpixd has Canon Digital Camera open (pid {pid})."


@pytest.mark.parametrize(
    ("running", "text", "cure"),
    [
        ([], "Another program has Canon Digital Camera open.", "sudo fuser -v "),
        (["entangle"], "Another program has Canon Digital Camera open, perhaps entangle.", "Quit entangle"),
        (
            ["entangle", "gvfsd-gphoto2"],
            "Another program has Canon Digital Camera open, probably the desktop (gvfsd-gphoto2).",
            "gio mount -s gphoto2; ",
        ),
    ],
)
def test_where_it_cannot_be_seen_who_has_the_camera_the_usual_suspects_are_named(camera, quiet, running, text, cure):
    """A service does not see what a user's programs have open."""
    for pid, name in enumerate(running, 100):
        (quiet / str(pid)).mkdir()
        (quiet / str(pid) / "comm").write_text(name + "\n")
    [finding] = usb_findings([replace(camera, claimed=True)], seen=1, proc=quiet)
    assert (finding.what, finding.level, finding.text) == ("claimed", "fault", text)
    assert (finding.cure or "").startswith(cure)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({}, "Canon Digital Camera"),
        ({"vendor": 0x04B0, "name": "NIKON DSC D750"}, "NIKON DSC D750"),
        ({"vendor": 0x054C, "name": "ILCE-7M3"}, "Sony ILCE-7M3"),
        ({"name": None}, "Canon camera"),
        ({"vendor": 0x18D1, "name": "Pixel 7"}, "Pixel 7"),
        ({"vendor": 0x18D1, "product": 0x4EE5, "name": None}, "USB device 18d1:4ee5"),
    ],
)
def test_a_camera_is_called_by_its_maker_and_name(camera, changes, named):
    """Once each, as far as they are known."""
    [finding] = usb_findings([replace(camera, **changes)], seen=1)
    assert finding.text.startswith(f"{named} is on ")


def test_whoever_runs_it_is_looked_up(camera, monkeypatch):
    """Also where the user has no name."""
    with nobody():
        uid = os.geteuid()
        [finding] = usb_findings([camera], seen=1)
    names = {entry.pw_uid: entry.pw_name for entry in pwd.getpwall()}
    assert finding.text.endswith(f" and {names.get(uid, f'user {uid}')} may open it.")
    monkeypatch.setattr(doctor.pwd, "getpwuid", {}.__getitem__)
    [finding] = usb_findings([camera], seen=1)
    assert finding.text.endswith(f" and user {os.geteuid()} may open it.")


# What the camera says


def test_a_healthy_camera_is_ready():
    """And nothing else is said of it."""
    [finding] = camera_findings(OPENED)
    assert (finding.what, finding.level, finding.cure) == ("ok", "ok", None)
    assert finding.text == (
        "Canon.Inc Canon EOS R5 is ready: serial 012345, on usb:001,005, 51.2 GB free, battery at 80 %."
    )


def test_what_a_camera_does_not_say_is_not_held_against_it():
    """Many say little."""
    unknown = dict.fromkeys(OPENED)
    for opened in ({}, unknown, {**unknown, "model": "X", "target": "unknown", "serial": ""}):
        assert said(camera_findings(opened)) == [("ok", "ok")]


CARD = OPENED["storages"][0]
FULL = {**CARD, "free_kb": 0}

AMISS = {
    "no card": ({"storages": []}, ("card", "fault"), "has no card", "Put a card"),
    "less than 100 MB": (
        {"storages": [{**CARD, "capacity_kb": 1_000_000, "free_kb": 97_000}]},
        ("card", "fault"),
        "99 MB are free",
        "empty card",
    ),
    "less than 1 %": ({"storages": [{**CARD, "free_kb": 600_000}]}, ("card", "fault"), "614 MB are free", "empty card"),
    "both cards full": ({"storages": [FULL, FULL]}, ("card", "fault"), "is full", "empty card"),
    "write-protected": ({"storages": [{**CARD, "read_only": True}]}, ("card", "fault"), "write-protected", "switch"),
    "one write-protected, one full": (
        {"storages": [{**CARD, "read_only": True}, FULL]},
        ("card", "fault"),
        "is full: 0 MB",
        "empty card",
    ),
    "memory": ({"target": "ram"}, ("target", "warning"), "one that is not fetched is lost", "save shots to the card"),
    "memory, Sony": (
        {"target": "ram", "model": "Sony Corporation ILCE-7M3", "storages": []},
        ("save-to", "warning"),
        "one that is not fetched is lost",
        'Still Img. Save Dest. to "PC+Camera"',
    ),
    "battery": ({"battery_percent": 20}, ("battery", "warning"), "is at 20 %", "Charge it"),
    "noise reduction": ({"long_exposure_nr": True}, ("noise-reduction", "warning"), "hidden", "Long Exposure NR off"),
    "dial": ({"mode_dial": "Auto"}, ("dial", "warning"), "is at Auto", "to M"),
    "JPEG": ({"image_quality": "JPEG Fine"}, ("quality", "warning"), '"JPEG Fine"', "RAW"),
    "no release": ({"can_trigger": False}, ("release", "warning"), "darks you have to take yourself", ""),
}


@pytest.mark.parametrize("name", AMISS)
def test_what_is_amiss_is_told(name):
    """One thing at a time, each with what cures it."""
    changes, what, text, cure = AMISS[name]
    [finding] = camera_findings({**OPENED, **changes})
    assert (finding.what, finding.level) == what
    assert text in finding.text
    assert cure in (finding.cure or "")


@pytest.mark.parametrize(
    "changes",
    [
        {"storages": [{**CARD, "capacity_kb": 1_000_000, "free_kb": 98_000}]},
        {"storages": [{**CARD, "free_kb": 630_000}]},
        {"storages": [FULL, CARD]},
        {"storages": [{**CARD, "read_only": True}, CARD]},
        {"storages": [{**CARD, "capacity_kb": 0, "free_kb": 0}]},
        {"target": "unknown"},
        {"battery_percent": 21},
        {"mode_dial": "M"},
        {"mode_dial": "Bulb"},
        {"mode_dial": "Center-weighted"},
        {"image_quality": "NEF (Raw)"},
        {"image_quality": "RAW + Large Fine JPEG"},
        {"can_bulb": False},
    ],
)
def test_what_is_just_good_enough_is_good(changes):
    """On the other side of each limit; one good card of two will do."""
    assert said(camera_findings({**OPENED, **changes})) == [("ok", "ok")]


def test_all_that_is_amiss_is_told():
    """Not only the first; and then it is not called ready."""
    amiss = {"storages": [], "target": "ram", "battery_percent": 5, "mode_dial": "P", "long_exposure_nr": True}
    found = camera_findings({**OPENED, **amiss})
    assert [finding.what for finding in found] == ["card", "target", "battery", "noise-reduction", "dial"]


# What libgphoto2 says


def test_results_are_told_apart_as_experiments_have_shown():
    """The table of the design; the names are those of libgphoto2."""
    gp = pytest.importorskip("gphoto2")
    table = {
        "claimed": (gp.GP_ERROR_IO_USB_CLAIM, gp.GP_ERROR_IO_LOCK),
        "absent": (gp.GP_ERROR_MODEL_NOT_FOUND, gp.GP_ERROR_UNKNOWN_PORT),
        "link": (
            gp.GP_ERROR_IO_USB_FIND, gp.GP_ERROR_IO, gp.GP_ERROR_IO_READ, gp.GP_ERROR_IO_WRITE, gp.GP_ERROR_TIMEOUT,
            gp.GP_ERROR,
        ),
        "busy": (gp.GP_ERROR_CAMERA_BUSY,),
        "full": (gp.GP_ERROR_NO_MEMORY, gp.GP_ERROR_NO_SPACE),
        "unsupported": (gp.GP_ERROR_NOT_SUPPORTED,),
        "missing": (gp.GP_ERROR_FILE_NOT_FOUND, gp.GP_ERROR_DIRECTORY_NOT_FOUND),
        "unknown": (gp.GP_ERROR_BAD_PARAMETERS, gp.GP_ERROR_CANCEL, -999, 0),
    }  # fmt: skip
    for kind, codes in table.items():
        assert {classify(code) for code in codes} == {kind}


@pytest.mark.parametrize(
    ("code", "what", "level"),
    [
        (-53, "claimed", "fault"),
        (-60, "claimed", "fault"),
        (-105, "mode", "fault"),
        (-7, "link", "fault"),
        (-10, "link", "fault"),
        (-1, "link", "fault"),
        (-110, "busy", "warning"),
        (-3, "card", "fault"),
        (-115, "card", "fault"),
        (-6, "file", "warning"),
        (-108, "file", "warning"),
        (-2, "error", "fault"),
    ],
)
def test_an_error_of_a_camera_that_is_there_is_named(camera, quiet, code, what, level):
    """With the camera it is of, and what was being done."""
    finding = error_finding(code, "some words", "fetch", camera.port, [camera], proc=quiet)
    assert (finding.what, finding.level) == (what, level)
    assert "Canon Digital Camera" in finding.text
    if what in ("link", "busy", "file", "error"):
        assert "while fetching a shot" in finding.text


@pytest.mark.parametrize("code", [-53, -105, -7, -1, -2])
def test_whoever_may_not_open_the_camera_is_told_that_and_not_the_code(camera, code):
    """libgphoto2 gives an I/O problem then."""
    forbid(camera.node, 0o444)
    with nobody():
        finding = error_finding(code, "I/O problem", "open", camera.port, [camera], user="hotpixd")
    assert finding.what == "permission"
    assert finding.text.startswith("hotpixd may not open Canon Digital Camera")


@pytest.mark.parametrize("code", [-110, -115, -6, -108])
def test_what_an_open_camera_says_itself_is_not_about_permission(camera, code):
    """It was opened before the permission changed."""
    forbid(camera.node, 0o444)
    with nobody():
        assert error_finding(code, "words", "fetch", camera.port, [camera]).what in ("busy", "card", "file")


def test_our_own_processes_do_not_count_as_somebody_else(camera, program, quiet):
    """The process that failed may still have the device open."""
    worker = program("python3", camera.node)
    claimed = replace(camera, claimed=True)
    with camera.node.open("rb"):
        finding = error_finding(-53, "", "open", camera.port, [claimed], ours=[worker])
        assert str(worker) not in finding.text
        assert str(os.getpid()) not in finding.text
        assert str(worker) in error_finding(-53, "", "open", camera.port, [claimed]).text


@pytest.mark.parametrize("code", [-52, -7, -105, -53, -1, -2])
def test_a_camera_that_is_no_longer_at_its_port_is_gone(camera, code):
    """Plugged in again it has another port."""
    for devices in ([], [replace(camera, device=6)]):
        finding = error_finding(code, "words", "list", "usb:001,005", devices)
        assert (finding.what, finding.level, finding.text) == ("usb", "fault", "The camera on usb:001,005 is gone.")


def test_with_no_port_and_no_camera_there_is_none(camera):
    """With a camera that libgphoto2 does not find, its USB mode is wrong."""
    assert error_finding(-105, "Unknown model", "open", None, []).text == "No camera on USB."
    disk = replace(camera, ptp=False, storage=True)
    assert error_finding(-105, "Unknown model", "open", None, [disk]).text.startswith("Canon Digital Camera shows its")
    assert error_finding(-105, "Unknown model", "open", None, [camera]).what == "mode"


@pytest.mark.parametrize(
    ("code", "what"), [(-105, "link"), (-7, "link"), (-10, "link"), (-110, "busy"), (-53, "claimed")]
)
def test_a_camera_on_the_network_is_not_looked_for_on_usb(camera, code, what):
    """Nor is its trouble that of another camera."""
    finding = error_finding(code, "words", "open", "ptpip:192.0.2.7", [camera])
    assert finding.what == what
    assert "ptpip:192.0.2.7" in finding.text


def test_no_shot_after_a_release_is_a_full_card(camera):
    """Some cameras say no more than that there was an error. In any other order it is the link."""
    assert error_finding(-1, "Unspecified error", "trigger", camera.port, [camera]).what == "card"
    assert error_finding(-1, "Unspecified error", "list", camera.port, [camera]).what == "link"


def test_every_finding_is_one_short_sentence(camera, quiet):
    """The running daemon shows it on a line. There is a cure unless there is nothing one could do."""
    network = "ptpip:192.168.100.200:15740"
    found = [
        error_finding(code, "Could not find the requested device on the USB port", doing, port, devices, proc=quiet)
        for code in range(-130, 1)
        for doing in ("open", "fetch", "trigger", "reading shutterspeed")
        for port in (None, camera.port, network)
        for devices in ([], [camera], [replace(camera, claimed=True)], [replace(camera, ptp=False, storage=True)])
    ]
    found += [finding for changes, *_ in AMISS.values() for finding in camera_findings({**OPENED, **changes})]
    found += [finding for seen in (None, 0, 7) for finding in usb_findings([], seen=seen)]
    for finding in found:
        assert finding.text.endswith(".")
        assert finding.text[0].isupper() or finding.text.split()[0] in ("libgphoto2", "darktable")
        assert len(finding.text) < 150
        assert "\n" not in finding.text + (finding.cure or "")
        assert finding.cure or finding.what in ("file", "error", "release")
