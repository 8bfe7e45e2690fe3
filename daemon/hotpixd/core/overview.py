"""What is told of a sensor without its statistic, and so without the arrays and kernels that this takes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

LIT_DARK = "light has fallen on the sensor, though they are to be darks"
"""Why frames that the user has called dark are no evidence."""

STATIC_SCENE = "the scene does not move"
"""Why a light frame is no evidence if it repeats an earlier one."""

STATIC_SCENE_ADVICE = (
    "All of the picture, or a part such as a foreground or a caption, stays in its place: such frames tell nothing of a"
    " defect. Other scenes do, darks (cap on, kind: dark), or raw files instead of JPEGs with a caption."
)
"""What that means, and what to do."""


@dataclass(frozen=True, slots=True)
class Overview:
    """How many frames a sensor has, and how many sites were found."""

    frames: int
    """Frames folded."""

    frames_counted: int
    """Frames that were new evidence."""

    found: Mapping[str, int]
    """Number of sites by status: "candidate", "stable", "recovered"."""

    @classmethod
    def of(cls, header: Mapping[str, Any]) -> Self | None:
        """Return it from a header of `Sensor.save`; None if that was saved before there was such a thing."""
        return cls(header["frames"], header["counted_total"], header["found"]) if "found" in header else None
