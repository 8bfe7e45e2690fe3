"""Made-up live states and a made-up daemon, for the tests of the dashboard."""

from __future__ import annotations

import math
import random
from typing import Any

ID = "acme-one-0042"


def defect(site: int, width: int = 6000, **known: Any) -> dict[str, Any]:
    """Return a stable hot defect with plausible numbers, but for what is given."""
    rng = random.Random(site)
    y, x = divmod(site, width)
    sigma = 80.0 / (1 + site % 17)
    return {
        "site": site,
        "x": x,
        "y": y,
        "colour": "RGGB"[x % 2 + y % 2 * 2],
        "kind": "hot",
        "state": "stable",
        "certainty": 1.0,
        "log_e": 41.2,
        "excess_adu": sigma * 11,
        "excess_sigma": sigma,
        "dark_current_adu_per_s": 31 * sigma,
        "dark_current_iso": 800.0,
        "share_on": 1.0,
        "level_adu": 1300.0,
        "first_seen": f"2026-03-{1 + site % 28:02}T04:05:06Z",
        "stable_since": "2026-03-29T05:06:07Z",
        "frames_to_stable": 9,
        "recent": [sigma * (1 + 0.6 * math.sin(n / 3)) + rng.gauss(0, 1) for n in range(32)],
    } | known


def defects(count: int, width: int = 6000, height: int = 4000, seed: int = 3) -> list[dict[str, Any]]:
    """Return defects at random sites: a third stable, some recovered, the others candidates."""
    rng = random.Random(seed)
    found = []
    for site in rng.sample(range(width * height), count):
        n = rng.random()
        if n < 0.3:
            found.append(defect(site, width, kind=rng.choice(("hot", "hot", "stuck", "warm"))))
        elif n < 0.9:
            certainty = rng.random() ** 0.7 * 0.99
            unknown = {"stable_since": None, "frames_to_stable": None, "dark_current_adu_per_s": None}
            weak = {"excess_adu": 9 * certainty, "excess_sigma": 4 * certainty, "log_e": 24 * certainty}
            noise = [rng.gauss(4 * certainty, 1.5) for _ in range(rng.randint(2, 32))]
            found.append(
                defect(site, width, state="candidate", kind="bright", certainty=certainty, recent=noise)
                | unknown
                | weak
            )
        else:
            found.append(defect(site, width, state="recovered", kind="unstable", share_on=0.2, excess_sigma=0.7))
    return found


def sensor(id_: str = ID, found: list[dict[str, Any]] | None = None, **known: Any) -> dict[str, Any]:
    """Return the counters of a sensor."""
    by_state = {s: sum(d["state"] == s for d in found or ()) for s in ("stable", "candidate", "recovered")}
    return {
        "id": id_,
        "make": "Acme",
        "model": "Acme One",
        "serial": "0042",
        "samples": "raw",
        "width": 6000,
        "height": 4000,
        "colours": "RGGB",
        "frames": 412,
        "frames_counted": 398,
        **by_state,
        "threshold": 24.1,
        "not_counted": {"the scene does not move": 11, "the frame is blurred by stars that trail": 3},
        "not_counting": None,
        "last_shot": {
            "name": "IMG_0412.CR2",
            "received_at": "2026-03-30T22:11:12Z",
            "taken_at": "2026-03-30T22:11:10",
            "verdict": "folded",
            "kind": "light",
            "exposure_s": 0.004,
            "iso": 800.0,
            "sensor_temp_c": 31.0,
        },
    } | known


def live(found: list[dict[str, Any]] | None = None, **known: Any) -> dict[str, Any]:
    """Return the live state of a daemon that watches two sources and knows one sensor."""
    found = defects(47) if found is None else found
    return {
        "daemon": {
            "version": "0.2.0",
            "pid": 17,
            "state": "/var/lib/hotpixd",
            "started_at": "2026-03-30T20:00:00Z",
            "activity": "watching 2 sources",
            "degraded": None,
            "queue": 3,
            "rate": 1.2,
            "shots": {"folded": 412, "refused": 2, "companion": 12, "received": 3, "known": 0},
        },
        "sources": [
            {"name": "card", "status": "watching", "detail": None, "files": 1204, "waiting": 3},
            {"name": "tether", "status": "away", "detail": "/mnt/tether is not mounted", "files": 0, "waiting": 0},
        ],
        "sensors": [ID],
        f"sensor:{ID}": sensor(found=found),
        f"defects:{ID}": found,
        "alerts": [
            {"id": 1, "at": "2026-03-30T20:01:00Z", "topic": "source away", "text": "tether is not there."},
            {"id": 2, "at": "2026-03-30T21:00:00Z", "topic": "stable", "text": "A hot defect of Acme One at 5120, 33."},
            {"id": 3, "at": "2026-03-30T22:00:00Z", "topic": "recovered", "text": "The defect at 17, 4 has recovered."},
        ],
    } | known


def cameras() -> list[dict[str, Any]]:
    """Return tethered cameras as sources: each has a word of its own for how it is."""
    return [
        {"name": name, "status": status, "detail": detail, "files": files, "waiting": waiting, "condition": condition}
        for name, status, condition, detail, files, waiting in (
            ("Acme One 0042", "watching", "ready", "1204 files on its card", 1204, 0),
            ("Acme Two 7", "watching", "catching up", "", 500, 31),
            ("camera at usb:001,005", "trouble", "claimed", "gvfs has it open.", 0, 0),
            ("Acme Old 1", "away", "absent", "it is switched off or unplugged", 0, 0),
            ("Acme New 2", "starting", "opening", "asking it what it is", 0, 0),
        )
    ]


def series(**known: Any) -> dict[str, Any]:
    """Return a series of darks that is being shot."""
    return {
        "stage": "shooting",
        "detail": "dark 13 of 30",
        "camera": "Acme One 0042",
        "frames": 30,
        "taken": 12,
        "folded": 11,
        "refused": 0,
        "resumed_at": 0,
        "exposure_s": 30.0,
        "iso": 1600.0,
        "temps_c": [19.0, 21.5, 21.5],
        "left_s": 572.4,
        "unchanged": 0,
        "warnings": [],
    } | known


def patch(reach: int = 12, centre: float = 65.7, seed: int = 1) -> list[list[float | None]]:
    """Return what is around a site: one strong sample in the centre, noise, a weaker one, an edge of the sensor."""
    rng = random.Random(seed)
    rows: list[list[float | None]] = [[rng.gauss(0.0, 0.3) for _ in range(2 * reach + 1)] for _ in range(2 * reach + 1)]
    rows[reach][reach] = centre
    rows[reach - 3][reach + 2] = centre / 4
    rows[reach + 4][reach - 3] = -centre / 5
    for row in rows:
        row[-4:] = [None] * 4
    return rows
