"""Texts that came from outside (names of files, what a camera says of itself) made fit for a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from rich.console import Console

    from hotpixd.core.frame import SensorIdentity

_Sensor = TypeVar("_Sensor", bound=Mapping[str, Any])


def printable(text: str) -> str:
    """Return a text on one line, with control characters and broken UTF-8 written as escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def plain_console(**settings: Any) -> Console:
    """Return a console that adds nothing of its own to texts: no colours for numbers, no pictures for words."""
    # Loaded here: not all that makes texts prints them.
    from rich.console import Console

    return Console(highlight=False, emoji=False, **settings)


def agreement(defects: Iterable[Mapping[str, Any]], declared: Iterable[tuple[int, int]]) -> dict[str, int]:
    """Count the pixels declared, found as well, declared only, and found (stable) only.

    Parameters
    ----------
    declared : x, y
    """
    said = set(declared)
    found = {(defect["x"], defect["y"]) for defect in defects if defect["state"] == "stable"}
    both = len(said & found)
    return {"declared": len(said), "both": both, "not_found": len(said) - both, "not_declared": len(found) - both}


def agreement_words(counts: Mapping[str, int]) -> str:
    """Say how what is declared agrees with what is found; "" if nothing is declared."""
    if not counts["declared"]:
        return ""
    return (
        f"{counts['declared']} declared: {counts['both']} of them found, {counts['not_found']} not;"
        f" {counts['not_declared']} found but not declared"
    )


def identity_words(id_: str, identity: SensorIdentity) -> dict[str, Any]:
    """Describe a sensor in the words that all answers use, without loading its statistic."""
    return {
        "id": id_,
        "make": identity.make,
        "model": identity.model,
        "serial": identity.serial,
        "samples": str(identity.samples),
        "width": identity.layout.width,
        "height": identity.layout.height,
        "colours": identity.layout.colours,
        **({} if identity.bits is None else {"bits": identity.bits}),
    }


def sensor_name(sensor: Mapping[str, Any]) -> str:
    """Name a sensor, described as in the answers, for people."""
    make, model = sensor["make"], sensor["model"]
    # Most models repeat their maker.
    first = (make or "").lower().split()[:1]
    words = [model] if first and model and model.lower().startswith(first[0]) else [make, model]
    named = " ".join(word.strip() for word in words if word and word.strip()) or "Unknown camera"
    serial = f"serial {sensor['serial']}" if sensor["serial"] else "no serial number"
    depth = f", {sensor['bits']} bit" if sensor.get("bits") else ""
    luma = ", luma" if is_luma(sensor) else ""
    return printable(f"{named}, {serial}, {sensor['width']}x{sensor['height']} {sensor['samples']}{luma}{depth}")


def is_luma(sensor: Mapping[str, Any]) -> bool:
    """Tell whether a sensor's statistic is of the luma of its JPEGs, or of grey ones."""
    return (sensor["samples"], sensor.get("colours")) == ("rendered", "L")


def called(sensors: Sequence[_Sensor], wanted: str) -> list[_Sensor]:
    """Return the sensors, described as in the answers, that a user's word means.

    Those of that id or serial number; if there are none, those with the word in their id or name.
    """
    exact = [sensor for sensor in sensors if wanted in (sensor["id"], sensor["serial"])]
    word = wanted.lower()
    return exact or [s for s in sensors if word in s["id"].lower() or word in sensor_name(s).lower()]


def excess_adu(value: float | None) -> str:
    """Return an excess in ADU, to a tenth where it is small, as in many JPEGs; "" if it is not known."""
    return "" if value is None else _signed(value, 1 if abs(value) < 9.95 else 0)


def excess_sigma(value: float | None) -> str:
    """Return an excess in sigma in seven characters; "" if it is not known."""
    return "" if value is None else _signed(value, 1 if abs(value) < 9999 else 0)


def _signed(value: float, digits: int) -> str:
    # What rounds to zero has no sign: "+0" of a dim sample looks like a mistake.
    text = f"{value:+.{digits}f}"
    return text if float(text) else text[1:]


def history_words(sensor: Mapping[str, Any]) -> list[str]:
    """Return what the history of a sensor says in words."""
    said = []
    growth = sensor["growth"]
    if growth is not None:
        said.append(
            f"{growth['per_month']:.2g} new defects per month (95 %: {growth['low']:.2g} to {growth['high']:.2g}),"
            f" from {growth['new']} in {growth['months']:.1f} months"
        )
    for remap in sensor["remaps"]:
        between = f"between {remap['after'][:16].replace('T', ' ')} and {remap['before'][:16].replace('T', ' ')}"
        gone = f"{remap['defects']} of {remap['of']} defects vanished {between}"
        if remap["cause"] == "colder":
            before, after = remap["sensor_temp_c"]
            said.append(f"{gone}: the sensor was {before - after:.0f} C colder then, which may only hide them")
        else:
            said.append(f"{gone}: the camera's own remapping, it seems")
        if remap["came_back"]:
            said[-1] += f"; {remap['came_back']} came back"
    return said
