"""Says why cameras cannot be used, each fault with its cure: looks at USB, opens what there is, and judges it."""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.markup import escape

from hotpixd.feed import FeedClient, FeedError, find_sockets
from hotpixd.intake import usb
from hotpixd.intake.camera import CameraSettings, ports_at, worker_environ
from hotpixd.intake.doctor import Finding, camera_findings, error_finding, usb_findings
from hotpixd.intake.link import Link
from hotpixd.views.text import plain_console, printable

_HANG_S = 20.0
_OPEN_WITHIN_S = 60.0
_LEAST_FREE_BYTES = 1 << 30

_STYLES = {"ok": "green", "warning": "yellow", "fault": "red"}


def run_checkup(settings: CameraSettings, *, as_json: bool) -> int:
    """Print what is found; return 0 if cameras can be tethered, else 1."""
    findings = list(_findings(settings))
    if as_json:
        json.dump({"findings": [asdict(finding) for finding in findings]}, sys.stdout, indent=1)
        print()
    else:
        _print(findings)
    return 1 if any(finding.level == "fault" for finding in findings) else 0


def _findings(settings: CameraSettings) -> Iterator[Finding]:
    devices: list[usb.UsbDevice] = []
    by_usb = settings.port.partition(":")[0] in ("auto", "usb") and "VCAMERADIR" not in os.environ
    if by_usb:
        devices = usb.cameras()
        if settings.port != "auto":
            devices = [device for device in devices if device.port == settings.port]
    # A daemon that has a camera knows best how it is, and nobody else can open it: it may be listing the card anew.
    held, known = _of_daemons()
    if by_usb and (devices or not held):
        # Claimed by that daemon, as it should be.
        expected = ("ok", "claimed") if held else ("ok",)
        found = usb_findings(devices, seen=usb.devices_seen())
        yield from (finding for finding in found if finding.what not in expected)
    for port in ports_at(settings.port, os.environ):
        if port in held:
            yield Finding("ok", "ok", f"{held[port]} is tethered by a running hotpixd.")
            if port in known:
                yield from camera_findings(known[port])
        else:
            yield from _of_port(port, devices)
    yield from _of_folder(settings)


def _of_daemons() -> tuple[dict[str, str], dict[str, Mapping[str, Any]]]:
    """Return the names of the cameras that daemons have, and what they know of those they have listed, by port."""
    held: dict[str, str] = {}
    known: dict[str, Mapping[str, Any]] = {}
    for path in find_sockets(os.environ):
        with contextlib.suppress(FeedError), contextlib.closing(FeedClient(path)) as client:
            answer = client.ask("cameras", timeout_s=10.0)
            held |= answer.get("held", {})
            known |= {facts["port"]: facts for facts in answer["cameras"]}
    return held, known


def _of_port(port: str, devices: list[usb.UsbDevice]) -> Iterator[Finding]:
    """Open what is at a port, and let go of it."""
    came: list[tuple[dict[str, Any] | None, dict[str, Any] | None]] = []
    with tempfile.TemporaryDirectory(prefix="hotpixd-check-") as folder:
        link = Link(worker_environ(os.environ, Path(folder)), _HANG_S, _HANG_S)
        link.order("open", lambda ok, error: came.append((ok, error)), port=port)
        until = time.monotonic() + _OPEN_WITHIN_S
        alive = True
        while alive and not came and time.monotonic() < until:
            if select.select([link], [], [], 0.5)[0]:
                alive = link.read(lambda _: None)
        link.close()
    facts, error = came[0] if came else (None, None)
    if facts is not None:
        yield from camera_findings(facts)
        return
    if error is None:
        error = link.failure or {"code": -10, "text": "it has not answered"}
    yield error_finding(error["code"], error["text"], "open", port, devices)


def _of_folder(settings: CameraSettings) -> Iterator[Finding]:
    if settings.album is None:
        return
    folder = settings.album.folder
    if not folder.is_dir():
        yield Finding("save-to", "fault", f"The folder {folder} for photos is not there.", f"mkdir -p '{folder}'")
    elif not os.access(folder, os.W_OK | os.X_OK):
        yield Finding("save-to", "fault", f"Photos may not be written to {folder}.", f"sudo chown $USER '{folder}'")
    elif (free := shutil.disk_usage(folder).free) < _LEAST_FREE_BYTES:
        words = f"Only {free / 1e6:.0f} MB are free for photos in {folder}."
        yield Finding("save-to", "warning", words, "Make room there, or name another folder with --save-to")


def _print(findings: list[Finding]) -> None:
    console = plain_console()
    for finding in findings:
        style = _STYLES[finding.level]
        console.print(f"[{style}]{finding.level:<7}[/{style}] {escape(printable(finding.text))}", soft_wrap=True)
        if finding.cure is not None:
            console.print(f"        {escape(printable(finding.cure))}", soft_wrap=True)
