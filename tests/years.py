"""A virtual camera over months: sessions of shots between which defects come, and at last are remapped."""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

from hotpixd.core.frame import ShotKind
from hotpixd.simulate import PlantedDefect, Scene, VirtualSensor, VirtualShot

BEGIN = datetime(2025, 1, 4, 20, 0, tzinfo=UTC)


@dataclass(frozen=True)
class Session:
    """Shots of one evening."""

    begin: datetime
    frames: int = 24
    scene: Scene = "dark"
    exposures_s: tuple[float, ...] = (1.0, 2.0, 4.0)
    temp_c: float = 20.0


@dataclass(frozen=True)
class Year:
    """What was planted when, and the shots of it."""

    folder: Path
    sessions: tuple[Session, ...]
    onset: dict[tuple[int, int], int]
    """Session (from 1) with which the defect at (x, y) begins."""
    healed: dict[tuple[int, int], int] = field(default_factory=dict)
    """Session before which it was remapped."""


def monthly(count: int, **given: object) -> tuple[Session, ...]:
    """Return sessions a month apart, an evening each."""
    return tuple(
        Session(BEGIN + timedelta(days=30 * n, minutes=7 * n), **given)  # type: ignore[arg-type]
        for n in range(count)
    )


def shoot(
    folder: Path,
    sessions: tuple[Session, ...],
    *,
    start: int,
    per_session: float = 0.0,
    remap_before: int | None = None,
    remapped_share: float = 0.7,
    width: int = 160,
    height: int = 120,
    seed: int = 5,
    serial: str = "Y0001",
    fits: bool = False,
    hot_range_adu_per_s: tuple[float, float] = (150.0, 2000.0),
) -> Year:
    """Write the shots of all sessions as DNG files, in the order of their names.

    Parameters
    ----------
    start : hot defects there are from the first session on
    per_session : how many come with each other one
    remap_before : session before which a share of those there are is mapped out by the camera
    fits : as cooled cameras write them, with the sensor's temperature
    """
    folder.mkdir(parents=True, exist_ok=True)
    number = start + round(per_session * (len(sessions) - 1))

    def camera(wanted: set[tuple[int, int]] | None) -> VirtualSensor:
        sensor = VirtualSensor(
            *(width, height),
            hot=number,
            stuck=0,
            dead=0,
            seed=seed,
            serial=serial,
            hot_range_adu_per_s=hot_range_adu_per_s,
        )
        if wanted is not None:
            # Before anything is worked out of them.
            sensor.defects = tuple(d for d in sensor.defects if (d.x, d.y) in wanted)
        return sensor

    chance = random.Random(seed)
    every: list[PlantedDefect] = list(camera(None).defects)
    chance.shuffle(every)
    onset: dict[tuple[int, int], int] = {}
    for n, defect in enumerate(every):
        onset[defect.x, defect.y] = 1 if n < start else 2 + int((n - start) / per_session)
    healed: dict[tuple[int, int], int] = {}
    if remap_before is not None:
        there = sorted(site for site, session in onset.items() if session < remap_before)
        healed = dict.fromkeys(chance.sample(there, round(remapped_share * len(there))), remap_before)
    index = 0
    for n, session in enumerate(sessions, 1):
        active = {site for site, first in onset.items() if first <= n and n < healed.get(site, n + 1)}
        sensor = camera(active)
        for k in range(session.frames):
            shot = sensor.shot(
                index,
                session.scene,
                exposure_s=session.exposures_s[k % len(session.exposures_s)],
                iso=100,
                sensor_temp_c=session.temp_c + 0.02 * k,
            )
            shot = replace(shot, taken_at=session.begin + timedelta(seconds=40 * k))
            if fits:
                write_fits(folder / f"s{n:03d}_{k:03d}.fits", sensor, shot)
            else:
                sensor.write_dng(folder / f"s{n:03d}_{k:03d}.dng", shot)
            index += 1
    return Year(folder, sessions, onset, healed)


def write_fits(path: Path, sensor: VirtualSensor, shot: VirtualShot) -> None:
    """Write a shot as programs for astronomical cameras do."""
    from astropy.io import fits

    header = fits.Header()
    header["INSTRUME"] = sensor.model
    header["CAMSERNO"] = sensor.serial
    header["EXPTIME"] = shot.exposure_s
    header["GAIN"] = shot.iso
    header["CCD-TEMP"] = shot.sensor_temp_c
    header["DATE-OBS"] = shot.taken_at.replace(tzinfo=None).isoformat(timespec="milliseconds")
    header["IMAGETYP"] = "Dark Frame" if shot.kind is ShotKind.DARK else "Light Frame"
    header["BAYERPAT"] = sensor.layout.colours
    header["ROWORDER"] = "TOP-DOWN"
    fits.PrimaryHDU(shot.mosaic, header).writeto(path)
