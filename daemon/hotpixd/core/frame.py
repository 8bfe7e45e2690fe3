"""A decoded shot: its samples as read out, how they lie on the sensor, and how the shot was taken.

The samples stay in the order in which they were read out. All samples of one
colour repeat at a fixed step along rows and columns (2 and 2 in a Bayer
mosaic, 1 and 3 in interleaved RGB), so a *plane* is a strided view and nothing
is copied to get one.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    # Not to run: who only asks whose frames a state holds waits for no array.
    import numpy as np
    from numpy.typing import NDArray

Samples: TypeAlias = "NDArray[np.uint8] | NDArray[np.uint16]"


class ShotKind(StrEnum):
    """Whether light fell on the sensor."""

    LIGHT = "light"
    DARK = "dark"


class SampleKind(StrEnum):
    """Whether samples are what the sensor delivered, or a picture computed from it."""

    RAW = "raw"
    RENDERED = "rendered"


@dataclass(frozen=True, slots=True)
class SensorLayout:
    """How the samples of a frame lie on the sensor: which share a colour and where each one is.

    A frame's samples are one C-contiguous array of shape ``(height, width * channels)``.
    """

    width: int
    """Pixels per row of the visible area."""

    height: int
    """Rows of the visible area."""

    colours: str
    """Colours of one period, row by row: "RGGB" (2x2), 36 letters (X-Trans), "RGB" (rendered), "L" (grey).

    "LLLL" is a grey frame that may be a mosaic of unknown order: four planes, colours not named.
    """

    channels: int = 1
    """Samples per pixel: 3 for a rendered colour picture, 1 for a mosaic or a grey frame."""

    def __post_init__(self) -> None:
        if self.width < 1 or self.height < 1:
            raise ValueError(f"a sensor has at least one pixel, got {self.width}x{self.height}")
        if self.channels == 1 and self.period**2 != len(self.colours):
            raise ValueError(f"a mosaic's period is a square of letters, got {self.colours!r}")
        if self.channels > 1 and len(self.colours) != self.channels:
            raise ValueError(f"{self.channels} channels need as many letters, got {self.colours!r}")

    @property
    def period(self) -> int:
        """Rows (and columns of pixels) after which the colours repeat: 1, 2 or 6."""
        return 1 if self.channels > 1 else int(len(self.colours) ** 0.5)

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of the samples array: (rows, samples per row)."""
        return self.height, self.width * self.channels

    @property
    def size(self) -> int:
        """Number of samples of a frame, the N of the threshold N / alpha."""
        return self.height * self.width * self.channels

    @property
    def row_step(self) -> int:
        """Rows between a sample and the next of its plane below it."""
        return self.period

    @property
    def col_step(self) -> int:
        """Array columns between a sample and the next of its plane to the right."""
        return self.period * self.channels

    @property
    def mosaic(self) -> bool:
        """True where neighbouring sites belong to different planes of one readout."""
        return self.period > 1

    @property
    def plane_count(self) -> int:
        """Number of planes."""
        return self.row_step * self.col_step

    def plane(self, samples: NDArray[np.generic], index: int) -> NDArray[np.generic]:
        """Return plane `index` of an array of this layout's shape, as a strided view (rows, cols)."""
        row, col = divmod(index, self.col_step)
        return samples[row :: self.row_step, col :: self.col_step]

    def planes_of(self, sites: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the planes of the samples with flat indices `sites`."""
        row, col = divmod(sites, self.shape[1])
        return row % self.row_step * self.col_step + col % self.col_step

    def address(self, index: int) -> tuple[int, int, str]:
        """Return (x, y, colour) of the sample with flat index `index`; 0-based, from the top left."""
        row, col = divmod(index, self.shape[1])
        x, channel = divmod(col, self.channels)
        plane = row % self.row_step * self.col_step + col % self.col_step
        return x, row, self.colours[channel if self.channels > 1 else plane]

    def channel(self, index: int) -> int:
        """Return which of a pixel's samples the sample with flat index `index` is."""
        return index % self.shape[1] % self.channels


@dataclass(frozen=True, slots=True)
class SensorIdentity:
    """What makes frames comparable. Frames that differ in any of it never share an accumulator."""

    make: str | None
    """Maker of the camera, as its files say. None if they do not."""

    model: str | None
    """Model of the camera."""

    serial: str | None
    """Serial number of the body. None if the files do not say: then two bodies look the same."""

    samples: SampleKind
    """Raw readout or rendered picture."""

    layout: SensorLayout
    """Geometry and colours."""

    dtype: str
    """"uint8" or "uint16"."""

    bits: int | None = None
    """Bit depth, if it is another than that in which the sensor was met first. None: the usual."""


@dataclass(frozen=True, slots=True)
class ShotInfo:
    """How a shot was taken, as far as its file says. Unknown is None."""

    exposure_s: float | None = None
    """Shutter time."""

    iso: float | None = None
    """Sensitivity setting; for cooled cameras the gain setting."""

    sensor_temp_c: float | None = None
    """Camera-reported temperature; near the sensor, not on it."""

    taken_at: datetime | None = None
    """When the shutter opened, by the camera's clock. Aware if the file names a zone, else naive."""


@dataclass(frozen=True, slots=True)
class Frame:
    """The decoded samples of one shot."""

    sensor: SensorIdentity
    """Whose samples these are."""

    samples: Samples
    """(height, width * channels) uint8 or uint16, C-contiguous, ADU as stored (black level included)."""

    kind: ShotKind
    """Light or dark: given, from the header, or told from the samples."""

    info: ShotInfo
    """How the shot was taken."""

    black_level_adu: float | None = None
    """Value of a sample without light, if the file says. Mean over the planes."""

    white_level_adu: float | None = None
    """Largest value a sample can take, black level included, if the file says."""

    lit: bool = False
    """It is to be a dark, as the user says, and light has plainly fallen on the sensor."""

    @property
    def lone(self) -> bool:
        """Whether extremes that touch an extreme of another plane are no events, see `Accumulator.fold`."""
        return self.kind is ShotKind.LIGHT and self.sensor.layout.mosaic

    @property
    def bits(self) -> int | None:
        """How many bits the samples have, if the file says."""
        return None if self.white_level_adu is None else int(self.white_level_adu).bit_length()
