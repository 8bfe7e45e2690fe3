"""Which samples of a picture are corrected: turns the map of its sensor, as `answers` tells it, into sites and values.

A defect that always shows (stuck, dead, declared by the user) is always corrected. One that leaks shows as far as the
exposure lets it: its fitted dark current says by how much, and it is left alone where that is below the noise of the
picture around it. Where exposure or dark current are unknown, the picture itself is looked at.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from hotpixd.core.frame import Frame, SampleKind, SensorIdentity
from hotpixd.core.inpaint import inpaint, local_noise
from hotpixd.views.text import called, is_luma, sensor_name

Sensor = Mapping[str, Any]
"""A sensor of the answer to `defects`."""

SHOWS_AT = 1.0
"""Foreseen excess in units of the noise around a site from which a defect is corrected. Below, the value that replaces
it would be no better: interpolation is as uncertain as the noise of a sample."""

SHOWS_BY_ITSELF_AT = 2.0
"""The same for the excess found in the picture: that of one healthy sample in twenty is as large."""

_SMEAR = (
    (0, 0), (-1, 0), (1, 0), (0, -1), (0, 1), (-1, -1), (-1, 1), (1, -1), (1, 1), (-2, 0), (2, 0), (0, -2), (0, 2),
)  # fmt: skip
"""Pixels (dy, dx) over which demosaicing spreads a defect: what gradient-corrected interpolation of a Bayer
mosaic reads.

Measured on 150 hot sites of simulated JPEGs (Bayer, 4:2:2, quality 95): filling these left 8 % of the error at the site
and 8 % of the squared error within 8 pixels of it; 3x3 pixels left 11 and 44 %, 5x5 left 10 and 12 %, the site and its
4 neighbours 16 and 37 %. On an X-Trans mosaic these, too, left the least.
"""

_SMEARED_NEIGHBOURS = 2
"""How many of the four adjacent pixels must show a defect in a picture that may be unprocessed, if it is smeared."""

Why = Literal["always shows", "declared", "shows", "all", "does not show", "no healthy neighbour"]


class PictureRefusedError(Exception):
    """A picture cannot be corrected. The message is a sentence for its photographer, without the file's name."""


class WrongSensorError(Exception):
    """What the user says of the sensor leads nowhere. The message is a sentence."""


@dataclass(frozen=True, slots=True)
class Wish:
    """What the user wants corrected."""

    states: Collection[str] = ("stable",)
    """Of defects: "stable", "candidate"."""

    declared: bool = True
    """Defects that the user, or another program's list, declared, too."""

    everything: bool = False
    """Defects that do not show in this picture, too."""

    sensor: str | None = None
    """Name of the sensor whose map is used; None: the picture says."""

    map_of: str | None = None
    """Name of the sensor of raw frames whose map is used for rendered pictures of the same body."""


@dataclass(frozen=True, slots=True)
class Choice:
    """What becomes of one defect in one picture."""

    x: int
    y: int
    kind: str
    """As in the map, or "declared"."""

    why: Why
    """The reason for which it is corrected or not."""

    @property
    def corrected(self) -> bool:
        """Whether it is."""
        return self.why not in ("does not show", "no healthy neighbour")


@dataclass(frozen=True, slots=True)
class Plan:
    """What is changed in a picture."""

    choices: tuple[Choice, ...] = ()
    """One per defect of the map, in its order, each position once."""

    sites: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))
    """Samples to change, flat indices in ascending order."""

    values: NDArray[Any] = field(default_factory=lambda: np.empty(0, np.uint16))
    """What they become; none for a JPEG, whose components are filled, not its colours."""

    avoided: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))
    """Samples of all defects known, corrected or not: nothing is filled from them."""


# Whose picture it is


def sensor_of(sensors: Sequence[Sensor], frame: Frame, wish: Wish) -> Sensor:
    """Return the sensor whose map is that of a picture.

    Raises
    ------
    PictureRefusedError
        If it is of none of them, or not of the one the user says.
    """
    picture = frame.sensor
    if wish.map_of is not None:
        other = named(sensors, wish.map_of)
        if picture.samples is SampleKind.RENDERED:
            return _raw_map(other, picture)
    if wish.sensor is not None:
        sensor = named(sensors, wish.sensor)
        contradiction = _contradiction(sensor, picture)
        if contradiction:
            raise PictureRefusedError(f"{contradiction}, so the map of {sensor_name(sensor)} is not its map")
        return sensor
    own = [sensor for sensor in sensors if _is_same(sensor, picture)]
    if own:
        # Of the colours of JPEGs and their luma, the one that is known better.
        best = _of_depth(sorted(own, key=lambda sensor: -sensor.get("frames_counted", 0)), frame)
        others = [pixel for sensor in own if sensor is not best for pixel in sensor.get("declared", [])]
        return {**best, "declared": [*best.get("declared", []), *others]} if others else best
    raise PictureRefusedError(f"it is of {_named(picture)}, of which there is no map{_hint(sensors, picture)}")


def named(sensors: Sequence[Sensor], name: str) -> Sensor:
    """Return the sensor that a user means by its id, serial number, or a part of its name.

    Raises
    ------
    WrongSensorError
        If none or several are.
    """
    matches = called(sensors, name)
    if len(matches) == 1:
        return matches[0]
    if matches:
        listed = "; ".join(f"{sensor['id']} ({sensor['samples']})" for sensor in matches)
        raise WrongSensorError(f"{name!r} may be one of several sensors: {listed}")
    known = "; ".join(sensor["id"] for sensor in sensors) or "none"
    raise WrongSensorError(f"no sensor is called {name!r}; known are: {known}")


def _is_same(sensor: Sensor, picture: SensorIdentity) -> bool:
    return _body(sensor) == (picture.make, picture.model, picture.serial) and _fits(sensor, picture)


def _fits(sensor: Sensor, picture: SensorIdentity) -> bool:
    """Whether the places of a sensor's map are those of a picture: the luma of JPEGs knows them, though no colours."""
    *form, colours = _form(sensor)
    *its_form, its_colours = _form_of(picture)
    return form == its_form and (colours == its_colours or is_luma(sensor))


def _body(sensor: Sensor) -> tuple[str | None, str | None, str | None]:
    return sensor["make"], sensor["model"], sensor["serial"]


def _form(sensor: Sensor) -> tuple[str, int, int, str]:
    return sensor["samples"], sensor["width"], sensor["height"], sensor["colours"]


def _form_of(picture: SensorIdentity) -> tuple[str, int, int, str]:
    return str(picture.samples), picture.layout.width, picture.layout.height, picture.layout.colours


def _named(picture: SensorIdentity) -> str:
    return sensor_name(
        {
            "make": picture.make,
            "model": picture.model,
            "serial": picture.serial,
            "width": picture.layout.width,
            "height": picture.layout.height,
            "samples": str(picture.samples),
        }
    )


def _contradiction(sensor: Sensor, picture: SensorIdentity, *, form: bool = True) -> str | None:
    """Say how a picture cannot be of a sensor; what the picture does not say, the user may know better."""
    for word, own, its in zip(
        ("maker", "model", "serial number"), _body(sensor), (picture.make, picture.model, picture.serial), strict=True
    ):
        if own is not None and its is not None and own != its:
            return f"its {word} is {its}, not {own}"
    if form and not _fits(sensor, picture):
        samples, width, height, _ = _form(sensor)
        if (samples, width, height) == _form_of(picture)[:3]:
            return f"its colours are {picture.layout.colours}, not {sensor['colours']}"
        layout = picture.layout
        return f"it is {layout.width}x{layout.height} {picture.samples}, not {width}x{height} {samples}"
    return None


def _raw_map(sensor: Sensor, picture: SensorIdentity) -> Sensor:
    if sensor["samples"] != "raw":
        raise WrongSensorError(f"{sensor['id']} is no sensor of raw frames; --sensor uses the map of rendered pictures")
    contradiction = _contradiction(sensor, picture, form=False)
    layout = picture.layout
    if contradiction is None and (sensor["width"], sensor["height"]) != (layout.width, layout.height):
        contradiction = (
            f"it is {layout.width}x{layout.height} pixels and the raw frames are {sensor['width']}x{sensor['height']}:"
            " where its pixels lie on the sensor is not known"
        )
    if contradiction:
        raise PictureRefusedError(f"{contradiction}, so the map of {sensor_name(sensor)} is not its map")
    return sensor


def _of_depth(sensors: list[Sensor], frame: Frame) -> Sensor:
    """Return the sensor whose samples have the picture's bit depth; positions are those of the others as well."""
    bits = None if frame.white_level_adu is None else int(frame.white_level_adu).bit_length()
    return min(sensors, key=lambda sensor: (sensor.get("bits") != bits, sensor.get("bits") is not None))


def _hint(sensors: Iterable[Sensor], picture: SensorIdentity) -> str:
    """Say what may help, of sensors that come near."""
    for sensor in sensors:
        make, model, serial = _body(sensor)
        if (make, model) != (picture.make, picture.model):
            continue
        if serial == picture.serial and sensor["samples"] == "raw" and picture.samples is SampleKind.RENDERED:
            if (sensor["width"], sensor["height"]) == (picture.layout.width, picture.layout.height):
                return f"; that of its raw frames is used if you say --map-of {sensor['id']}"
            return f"; that of its raw frames is for {sensor['width']}x{sensor['height']} pixels"
        if _fits(sensor, picture) and picture.serial is None:
            return f"; if it is of the body {serial}, say --sensor {sensor['id']}"
        if _fits(sensor, picture):
            return f"; the one of that model is of another body, {serial or 'which has no serial number'}"
    return "; scan pictures of it first"


# What is corrected


def planned(frame: Frame, sensor: Sensor, wish: Wish, *, jpeg: bool = False) -> Plan:
    """Choose what is corrected in a picture, and compute what it becomes.

    In a colour JPEG a defect is corrected in all channels, over the pixels that demosaicing spreads it to; in a
    rendered picture that may be unprocessed (grey, or lossless) only if it shows beside its own pixel as well.

    Parameters
    ----------
    jpeg : it is one, whose colours a camera has made of a mosaic
    """
    known = [*sensor["defects"], *sensor.get("declared", [])]
    layout = frame.sensor.layout
    known = [defect for defect in known if 0 <= defect["x"] < layout.width and 0 <= defect["y"] < layout.height]
    every = _union(_own_sites(defect, frame, sensor) for defect in known)
    wished = _wished(sensor, wish)
    wished = [defect for defect in wished if 0 <= defect["x"] < layout.width and 0 <= defect["y"] < layout.height]
    if not wished:
        return Plan(avoided=every)
    areas = _areas(wished, every, frame, sensor, jpeg=jpeg)
    avoided = _union([every, *areas])
    one_of_each = np.array([_strongest(area, frame, defect) for area, defect in zip(areas, wished, strict=True)])
    filled = inpaint(frame.samples, layout, one_of_each, avoided)
    noise = local_noise(frame.samples, layout, one_of_each, avoided)
    if jpeg:
        # Quantisation makes smooth parts smoother than what it may add to a block with a defect.
        noise = np.maximum(noise, 1.0)
    excess = frame.samples.reshape(-1)[one_of_each].astype(np.float64) - filled.values
    choices = []
    for k, defect in enumerate(wished):
        why = _why(defect, frame, sensor, wish, float(excess[k]), float(noise[k]))
        if not filled.found[k]:
            why = "no healthy neighbour"
        choices.append(Choice(defect["x"], defect["y"], defect.get("kind", "declared"), why))
    sites = _union(area for area, choice in zip(areas, choices, strict=True) if choice.corrected)
    if jpeg:
        # Filled before colours are mixed and rounded, from what its coefficients say.
        return Plan(tuple(choices), sites, avoided=avoided)
    done = inpaint(frame.samples, layout, sites, avoided)
    return Plan(tuple(choices), sites[done.found], done.values[done.found], avoided)


def _wished(sensor: Sensor, wish: Wish) -> list[Mapping[str, Any]]:
    """Return the defects to look at, each position once: what is declared needs no evidence."""
    by_place: dict[tuple[int, int], Mapping[str, Any]] = {}
    if wish.declared:
        by_place = {(defect["x"], defect["y"]): defect for defect in sensor.get("declared", [])}
    for defect in sensor["defects"]:
        if defect["state"] in wish.states:
            by_place.setdefault((defect["x"], defect["y"]), defect)
    return [by_place[place] for place in sorted(by_place, key=lambda place: (place[1], place[0]))]


def _why(defect: Mapping[str, Any], frame: Frame, sensor: Sensor, wish: Wish, excess: float, noise: float) -> Why:
    if "kind" not in defect:
        return "declared"
    if defect["kind"] in ("stuck", "dead"):
        return "always shows"
    foreseen = None if defect["kind"] == "unstable" else _foreseen_excess(defect, frame, sensor)
    # What is foreseen is sure; what is found may be noise.
    if abs(foreseen or 0.0) > SHOWS_AT * noise or (foreseen is None and abs(excess) > SHOWS_BY_ITSELF_AT * noise):
        return "shows"
    return "all" if wish.everything else "does not show"


def _foreseen_excess(defect: Mapping[str, Any], frame: Frame, sensor: Sensor) -> float | None:
    """Return the excess that a defect's dark current makes at a picture's settings, ADU; None if that is not known.

    The temperature is not in it: where the picture is much warmer than the map's frames, `--all` corrects more.
    """
    rate, at_iso = defect["dark_current_adu_per_s"], defect["dark_current_iso"]
    exposure_s, iso = frame.info.exposure_s, frame.info.iso
    if rate is None or exposure_s is None or str(frame.sensor.samples) != sensor["samples"]:
        return None
    return float(rate * exposure_s * (iso / at_iso if iso and at_iso else 1.0))


def _own_sites(defect: Mapping[str, Any], frame: Frame, sensor: Sensor) -> NDArray[np.int64]:
    """Return the samples of a picture that are a defect's own."""
    layout = frame.sensor.layout
    first = (defect["y"] * layout.width + defect["x"]) * layout.channels
    letter = str(defect.get("colour"))
    if layout.channels > 1 and letter in layout.colours and sensor["samples"] == "rendered":
        return np.array([first + layout.colours.index(letter)], np.int64)
    return np.arange(first, first + layout.channels, dtype=np.int64)


def _areas(
    defects: Sequence[Mapping[str, Any]], every: NDArray[np.int64], frame: Frame, sensor: Sensor, *, jpeg: bool
) -> list[NDArray[np.int64]]:
    """Return the samples of a picture that each defect spoils."""
    own = [_own_sites(defect, frame, sensor) for defect in defects]
    if frame.sensor.samples is SampleKind.RAW:
        return own
    smeared = [_smear(defect, frame) for defect in defects]
    layout = frame.sensor.layout
    if (jpeg and layout.channels > 1) or (sensor["samples"] == "raw" and len(set(sensor["colours"])) > 1):
        return smeared
    avoided = _union([every, *smeared])
    areas = []
    for defect, alone, spread in zip(defects, own, smeared, strict=True):
        x, y, channel = defect["x"], defect["y"], int(alone[0]) % layout.channels
        beside = [(y + dy, x + dx) for dy, dx in _SMEAR[1:5]]
        sites = np.array(
            [(row * layout.width + column) * layout.channels + channel
             for row, column in beside if 0 <= row < layout.height and 0 <= column < layout.width], np.int64
        )  # fmt: skip
        values = inpaint(frame.samples, layout, sites, avoided).values.astype(np.float64)
        excess = frame.samples.reshape(-1)[sites] - values
        noise = local_noise(frame.samples, layout, sites, avoided)
        shows = int((np.abs(excess) > SHOWS_BY_ITSELF_AT * noise).sum())
        areas.append(spread if shows >= _SMEARED_NEIGHBOURS else alone)
    return areas


def _smear(defect: Mapping[str, Any], frame: Frame) -> NDArray[np.int64]:
    layout = frame.sensor.layout
    pixels = [
        (defect["y"] + dy) * layout.width + defect["x"] + dx
        for dy, dx in _SMEAR
        if 0 <= defect["y"] + dy < layout.height and 0 <= defect["x"] + dx < layout.width
    ]
    every = np.array(pixels, np.int64)[:, np.newaxis] * layout.channels + np.arange(layout.channels)
    return every.ravel()


def _strongest(area: NDArray[np.int64], frame: Frame, defect: Mapping[str, Any]) -> int:
    """Return the sample of a defect's own pixel by which it is judged: that of its colour, or the brightest."""
    layout = frame.sensor.layout
    first = (defect["y"] * layout.width + defect["x"]) * layout.channels
    letter = str(defect.get("colour"))
    if len(area) == 1 or layout.channels == 1:
        return int(area[0]) if len(area) == 1 else int(first)
    if letter in layout.colours:
        return int(first + layout.colours.index(letter))
    pixel = frame.samples.reshape(-1)[first : first + layout.channels]
    return int(first + pixel.argmax())


def _union(some: Iterable[NDArray[np.int64]]) -> NDArray[np.int64]:
    arrays = list(some)
    return np.unique(np.concatenate(arrays)) if arrays else np.empty(0, np.int64)
