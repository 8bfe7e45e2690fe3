"""A virtual camera whose defects are known: turns (seed, shot number, scene) into a shot, a frame or a file.

The sensor counts electrons: light through the colour filters, dark current that doubles every
6 C, shot noise and read noise, then the conversion to ADU, clipping and rounding. Defects are
planted in that chain, not painted on the result, so a hot sample is noisy, follows exposure time
and temperature, and saturates like a real one.

A shot depends on (seed, index, scene) and on nothing before it: shot 500 needs no other, and the
same numbers give the same samples again.
"""

from __future__ import annotations

import io
import json
import math
import struct
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from functools import cache, cached_property
from pathlib import Path
from typing import Final, Literal

import numpy as np
import simplejpeg
import tifffile
from numpy.typing import NDArray
from PIL import Image
from PIL.TiffImagePlugin import IFDRational

from hotpixd.core.frame import Frame, SampleKind, SensorIdentity, SensorLayout, ShotInfo, ShotKind

Scene = Literal["moving", "tripod", "tracked", "dithered", "dark", "flat", "horizon"]
SCENES: Final[tuple[Scene, ...]] = ("moving", "tripod", "tracked", "dithered", "dark", "flat", "horizon")

FileFormat = Literal["dng", "jpg"]
DefectKind = Literal["hot", "stuck", "dead", "unstable"]

XTRANS: Final = "GBGGRGRGRBGBGBGGRGGRGGBGBGBRGRGRGGBG"
"""Colours of Fujifilm's 6x6 period, row by row."""

BLACK_LEVEL_ADU: Final = 512
WHITE_LEVEL_ADU: Final = 16383
SPAN_ADU: Final = WHITE_LEVEL_ADU - BLACK_LEVEL_ADU
FULL_WELL_E: Final = 45_000.0
BASE_ISO: Final = 100.0
BASE_GAIN: Final = FULL_WELL_E / SPAN_ADU
"""e-/ADU at base ISO: 2.84, about that of a full-frame 14-bit camera. Below base ISO the well is deeper."""

READ_NOISE_E: Final = 3.0
DSNU_MEAN_E_PER_S: Final = 0.5
DSNU_SIGMA: Final = 0.3
"""Standard deviation of the logarithm of a healthy site's dark current.

Real sensors' is wider. With 0.5 some healthy site of a million leaks 4 e-/s, which twenty darks show: then what is
planted would not be all there is to find.
"""

REFERENCE_TEMP_C: Final = 20.0
DOUBLING_C: Final = 6.0
"""Dark current of silicon doubles every 6 to 7 C."""

RESPONSE: Final = {"R": 0.5, "G": 1.0, "B": 0.66, "L": 1.0}
"""Response to white light, relative to green: the reason why cameras balance white."""

EXPOSURE_RANGE_S: Final = (0.3, 2.0)
ISO_RANGE: Final = (50.0, 200.0)
TEMP_RANGE_C: Final = (20.0, 24.0)
FIRST_SHOT: Final = datetime(2025, 6, 1, 20, 0, tzinfo=UTC)
SHOT_INTERVAL_S: Final = 5.0

TELEGRAPH_CYCLE: Final = 12
"""Frames in which an unstable site is on once, for one run of frames."""

PSF_SIGMA: Final = 0.7
"""Lens blur, in sites. Objects are drawn with it analytically: blurring a drawn frame costs more."""

EDGE_WIDTH: Final = PSF_SIGMA * math.sqrt(12.0)
"""Width of the linear ramp whose line spread has the standard deviation of the lens blur."""

TEXTURE_SIZES: Final = (256, 2048)
"""Smallest and largest period of the textures, in sites."""

MIN_SPACING: Final = 6
"""Sites between two defects, so that each is judged by healthy neighbours."""

STARS: Final = 1_500
DITHER_SITES: Final = 15.0
STAR_PEAK_E_PER_S: Final = (90.0, 2.0e6)
"""Peak rate of the faintest and of the brightest star allowed."""

STAR_SLOPE: Final = 0.8
"""Exponent of the star counts: N(brighter than F) ~ F**-slope."""

SKY_E_PER_S: Final = 140.0

GROUND_TINTS: Final = np.array([(0.12, -0.3), (-0.1, -0.45), (0.0, -0.05), (0.2, -0.5), (-0.05, 0.1)])
"""Natural logarithms of red/green and blue/green: soil, grass, stone, sand, snow in shade."""

SATURATION: Final = np.float32(1.25)
"""How much a camera's standard style lifts colours off grey."""

Floats = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class PlantedDefect:
    """One defect of the virtual sensor: the truth that a search is judged by."""

    x: int
    """Column, 0-based."""

    y: int
    """Row, 0-based."""

    colour: str
    """Letter of its colour filter."""

    kind: DefectKind
    """Hot, stuck, dead, or unstable: hot in some frames only."""

    dark_current_adu_per_s: float | None = None
    """At base ISO and the reference temperature. None if neither hot nor unstable."""

    level_adu: float | None = None
    """The value it always has, black level included. None if not stuck."""

    duty: float | None = None
    """Share of frames in which its excess is on. None if not unstable."""

    response: float | None = None
    """What it makes of light, as a fraction of a healthy response. None if not dead."""


@dataclass(frozen=True, slots=True)
class VirtualShot:
    """One release of the virtual shutter."""

    mosaic: NDArray[np.uint16]
    """(height, width), ADU with black level."""

    exposure_s: float
    """Shutter time, in whole microseconds."""

    iso: float
    """Sensitivity, a whole number."""

    sensor_temp_c: float
    """Temperature of the sensor, in hundredths."""

    taken_at: datetime
    """When the shutter opened, in whole milliseconds; aware."""

    kind: ShotKind
    """Whether light fell on the sensor."""


class VirtualSensor:
    """A sensor with planted defects, and the camera around it.

    Parameters
    ----------
    width, height
        Size in sites.
    hot, stuck, dead, unstable
        Number of single defects of each kind.
    clusters
        Number of groups of 2 to 4 adjacent hot sites, in addition to `hot`.
    seed
        Everything random follows from it.
    hot_range_adu_per_s
        Dark currents are drawn log-uniformly from it, at base ISO and the reference temperature.
    prnu
        Standard deviation of the healthy sites' responses to light, as a fraction of their mean.
    pattern
        Colours of one period: "RGGB" or another Bayer order, `XTRANS`, or "L".

    Raises
    ------
    ValueError
        If the pattern is not of letters R, G, B, L, or if the defects do not fit.
    """

    def __init__(
        self,
        width: int = 1500,
        height: int = 1000,
        *,
        hot: int = 60,
        stuck: int = 10,
        dead: int = 15,
        unstable: int = 0,
        clusters: int = 0,
        seed: int = 0,
        make: str = "Hotpixd",
        model: str = "Virtual Camera",
        serial: str = "V0001",
        hot_range_adu_per_s: tuple[float, float] = (150.0, 12_000.0),
        prnu: float = 0.01,
        pattern: str = "RGGB",
    ) -> None:
        pattern = XTRANS if pattern.upper() == "XTRANS" else pattern
        if set(pattern) - set(RESPONSE):
            raise ValueError(f"a pattern consists of the letters R, G, B or of L, got {pattern!r}")
        self.layout = SensorLayout(width, height, pattern)
        self.seed = seed
        self.prnu = prnu
        self.make, self.model, self.serial = make, model, serial
        self.identity = SensorIdentity(make, model, serial, SampleKind.RAW, self.layout, "uint16")
        self.defects = self._planted(hot, stuck, dead, unstable, clusters, hot_range_adu_per_s)

    # ------------------------------------------------------------------ shots

    def shot(
        self,
        index: int,
        scene: Scene,
        *,
        exposure_s: float | None = None,
        iso: float | None = None,
        sensor_temp_c: float | None = None,
    ) -> VirtualShot:
        """Release the shutter: shot number `index` (from 0) of a scene; settings given are kept fixed."""
        if scene not in SCENES:
            raise ValueError(f"scene must be one of {', '.join(SCENES)}, got {scene!r}")
        settings = self._rng("settings", index)
        drawn_exposure_s = _log_uniform(settings, *EXPOSURE_RANGE_S)
        drawn_iso = _log_uniform(settings, *ISO_RANGE)
        late_s = settings.uniform(0.0, 0.5 * SHOT_INTERVAL_S)
        # Rounded to what a file can hold, so that a frame read back has the very same settings.
        exposure_s = round(drawn_exposure_s, 3) if exposure_s is None else round(exposure_s, 6)
        iso = float(round(drawn_iso if iso is None else iso))
        if iso <= 0 or exposure_s < 0:
            raise ValueError(f"exposure must not be negative and ISO positive, got {exposure_s} s, ISO {iso}")
        temp_c = round(self._drifting_temp_c(index) if sensor_temp_c is None else sensor_temp_c, 2)
        taken_at = FIRST_SHOT + timedelta(milliseconds=round(1000 * (index * SHOT_INTERVAL_S + late_s)))

        gain = BASE_GAIN * BASE_ISO / iso
        integrated_s = exposure_s * 2 ** ((temp_c - REFERENCE_TEMP_C) / DOUBLING_C)
        mean_e = self._dark_e_per_s * np.float32(integrated_s)
        for defect in self.defects:
            if defect.kind == "unstable" and not self.is_on(defect, index):
                # The site's leak is in the map; a site that is off is an ordinary one.
                mean_e[defect.y, defect.x] = DSNU_MEAN_E_PER_S * integrated_s
        if scene != "dark":
            light_e = self._light_e(index, scene, exposure_s, gain)
            light_e *= self._response
            mean_e += light_e
        mosaic = _read_out(mean_e, gain, self._rng("noise", index, SCENES.index(scene)))
        for defect in self.defects:
            if defect.level_adu is not None:
                mosaic[defect.y, defect.x] = round(defect.level_adu)
        kind = ShotKind.DARK if scene == "dark" else ShotKind.LIGHT
        return VirtualShot(mosaic, exposure_s, iso, temp_c, taken_at, kind)

    def is_on(self, defect: PlantedDefect, index: int) -> bool:
        """Tell whether an unstable defect leaks in shot `index`; True for other hot ones.

        In each cycle of frames it is on for one run of duty * cycle frames, which starts at random.
        """
        if defect.duty is None:
            return defect.kind == "hot"
        run = round(defect.duty * TELEGRAPH_CYCLE)
        site = defect.y * self.layout.width + defect.x
        cycle, phase = divmod(index + site % TELEGRAPH_CYCLE, TELEGRAPH_CYCLE)
        start = int(self._rng("telegraph", site, cycle).integers(0, TELEGRAPH_CYCLE - run + 1))
        return start <= phase < start + run

    def frame(self, shot: VirtualShot) -> Frame:
        """Return the frame that decoding the shot's raw file gives."""
        info = ShotInfo(shot.exposure_s, shot.iso, shot.sensor_temp_c, shot.taken_at)
        return Frame(self.identity, shot.mosaic, shot.kind, info, BLACK_LEVEL_ADU, WHITE_LEVEL_ADU)

    # ------------------------------------------------------------------ files

    def write_dng(self, path: Path, shot: VirtualShot) -> None:
        """Write an uncompressed DNG from which LibRaw reads the very samples of the mosaic.

        References
        ----------
        Adobe, Digital Negative Specification 1.4; CIPA DC-008 (EXIF) for the tags of the shot.
        """
        layout = self.layout
        when = shot.taken_at.strftime("%Y:%m:%d %H:%M:%S")
        one = (1, 1)
        zero = (0, 1)
        to_camera = (*one, *zero, *zero, *zero, *one, *zero, *zero, *zero, *one)
        exposure = (round(shot.exposure_s * 1_000_000), 1_000_000)
        temperature = (round(shot.sensor_temp_c * 100), 100)
        tags: list[tuple[int, str, int, object, bool]] = [
            (271, "s", 0, self.make, True),
            (272, "s", 0, self.model, True),
            (306, "s", 0, when, True),
            (33434, "2I", 1, exposure, True),
            (34855, "H", 1, round(shot.iso), True),
            (36867, "s", 0, when, True),  # DateTimeOriginal
            (36881, "s", 0, "+00:00", True),  # OffsetTimeOriginal
            (37521, "s", 0, f"{shot.taken_at.microsecond // 1000:03d}", True),  # SubSecTimeOriginal
            (37888, "2i", 1, temperature, True),  # AmbientTemperature
            (50706, "B", 4, bytes((1, 4, 0, 0)), True),  # DNGVersion
            (50707, "B", 4, bytes((1, 1, 0, 0)), True),  # DNGBackwardVersion
            (50708, "s", 0, f"{self.make} {self.model}", True),  # UniqueCameraModel
            (50714, "I", 1, BLACK_LEVEL_ADU, True),
            (50717, "I", 1, WHITE_LEVEL_ADU, True),
            (50735, "s", 0, self.serial, True),  # CameraSerialNumber
            (50778, "H", 1, 21, True),  # CalibrationIlluminant1: D65
        ]
        if layout.mosaic:
            neutral = tuple(n for letter in "RGB" for n in (round(RESPONSE[letter] * 1000), 1000))
            cfa = bytes("RGB".index(letter) for letter in layout.colours)
            tags += [
                (33421, "H", 2, (layout.period, layout.period), True),  # CFARepeatPatternDim
                (33422, "B", len(cfa), cfa, True),  # CFAPattern
                (50721, "2i", 9, to_camera, True),  # ColorMatrix1
                (50728, "2I", 3, neutral, True),  # AsShotNeutral
            ]
        content = io.BytesIO()
        tifffile.imwrite(
            content,
            shot.mosaic,
            photometric=32803 if layout.mosaic else 1,  # CFA or grey
            extratags=tags,
            metadata=None,
            software=False,
        )
        if not layout.mosaic:
            content.seek(0)
            with tifffile.TiffFile(content) as written:
                # LinearRaw, as DNG wants it; tifffile writes that for three samples only.
                written.pages.first.tags[262].overwrite(34892)
        _write_whole(path, content.getbuffer())

    def write_jpeg(self, path: Path, shot: VirtualShot, quality: int = 95) -> None:
        """Write the picture that the camera would make of the shot, with its EXIF."""
        rendered = self.rendered(shot)
        if rendered.ndim == 2:
            encoded = simplejpeg.encode_jpeg(rendered[..., np.newaxis], quality, colorspace="GRAY")
        else:
            encoded = simplejpeg.encode_jpeg(rendered, quality, colorspace="RGB", colorsubsampling="422")
        exif = self._exif(shot)
        segment = b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif
        # EXIF wants its segment right after the start of the image.
        _write_whole(path, encoded[:2] + segment + encoded[2:])

    def rendered(self, shot: VirtualShot) -> NDArray[np.uint8]:
        """Develop the shot as a camera does: (h, w, 3) uint8, or (h, w) for a sensor without colours."""
        if not self.layout.mosaic:
            return _toned(shot.mosaic - np.float32(BLACK_LEVEL_ADU))
        # White balance before the interpolation, which expects colours of equal strength; clipped
        # to white, so that lamps have no coloured rims.
        balanced = np.subtract(shot.mosaic, np.float32(BLACK_LEVEL_ADU), dtype=np.float32)
        for letter, plane in self._planes():
            balanced[plane] *= np.float32(1.0 / RESPONSE[letter])
        np.clip(balanced, 0.0, SPAN_ADU, out=balanced)
        if self.layout.period == 2:
            return _bayer_to_rgb(balanced, self.layout.colours)
        return _mosaic_to_rgb(balanced, self.layout)

    def _exif(self, shot: VirtualShot) -> bytes:
        when = shot.taken_at.strftime("%Y:%m:%d %H:%M:%S")
        milliseconds = f"{shot.taken_at.microsecond // 1000:03d}"
        exif = Image.Exif()
        exif.update({0x010F: self.make, 0x0110: self.model, 0x0112: 1, 0x0132: when})
        exif.get_ifd(0x8769).update(
            {
                0x829A: IFDRational(round(shot.exposure_s * 1_000_000), 1_000_000),
                0x8827: round(shot.iso),
                0x9000: b"0232",
                0x9003: when,
                0x9004: when,
                0x9010: "+00:00",
                0x9011: "+00:00",
                0x9291: milliseconds,
                0x9400: IFDRational(round(shot.sensor_temp_c * 100), 100),
                0xA001: 1,
                0xA002: self.layout.width,
                0xA003: self.layout.height,
                0xA431: self.serial,
            }
        )
        return exif.tobytes()

    # ------------------------------------------------------------------ the sensor

    def _rng(self, purpose: str, *numbers: int) -> np.random.Generator:
        # One independent stream per purpose and shot: this is what makes every shot reachable at once.
        words = [self.seed, int.from_bytes(purpose.encode(), "little"), *numbers]
        return np.random.Generator(np.random.SFC64(np.random.SeedSequence(words)))

    def _planted(
        self, hot: int, stuck: int, dead: int, unstable: int, clusters: int, hot_range: tuple[float, float]
    ) -> tuple[PlantedDefect, ...]:
        rng = self._rng("defects")
        numbers: dict[DefectKind, int] = {"hot": hot, "stuck": stuck, "dead": dead, "unstable": unstable}
        free = np.ones(self.layout.shape, dtype=bool)
        defects = []
        for _ in range(clusters):
            members = [self._free_site(rng, free)]
            size = int(rng.integers(2, 5))
            while len(members) < size:
                y, x = members[rng.integers(len(members))]
                site = y + int(rng.integers(-1, 2)), x + int(rng.integers(-1, 2))
                inside = 0 <= site[0] < self.layout.height and 0 <= site[1] < self.layout.width
                if inside and site not in members:
                    members.append(site)
            for site in members:
                _occupy(free, site)
                defects.append(self._defect(site, "hot", rng, hot_range))
        for kind, number in numbers.items():
            for _ in range(number):
                site = self._free_site(rng, free)
                _occupy(free, site)
                defects.append(self._defect(site, kind, rng, hot_range))
        return tuple(defects)

    def _free_site(self, rng: np.random.Generator, free: NDArray[np.bool_]) -> tuple[int, int]:
        height, width = self.layout.shape
        for _ in range(1000):
            y, x = int(rng.integers(height)), int(rng.integers(width))
            # One in 25 at the border, where a window has no neighbours on one side.
            edge = int(rng.integers(100))
            y = {0: 0, 1: height - 1}.get(edge, y)
            x = {2: 0, 3: width - 1}.get(edge, x)
            if free[y, x]:
                return y, x
        raise ValueError(f"{width}x{height} sites have no room for that many defects {MIN_SPACING} sites apart")

    def _defect(
        self,
        site: tuple[int, int],
        kind: DefectKind,
        rng: np.random.Generator,
        hot_range: tuple[float, float],
    ) -> PlantedDefect:
        y, x = site
        colour = self.layout.colours[y % self.layout.period * self.layout.period + x % self.layout.period]
        match kind:
            case "hot":
                return PlantedDefect(x, y, colour, kind, dark_current_adu_per_s=_log_uniform(rng, *hot_range))
            case "unstable":
                leak = _log_uniform(rng, *hot_range)
                duty = int(rng.integers(3, TELEGRAPH_CYCLE - 2)) / TELEGRAPH_CYCLE
                return PlantedDefect(x, y, colour, kind, dark_current_adu_per_s=leak, duty=duty)
            case "stuck":
                # One in four at full scale, the others anywhere above the black level.
                level = min(WHITE_LEVEL_ADU, round(BLACK_LEVEL_ADU + rng.uniform(0.02, 1.3) * SPAN_ADU))
                return PlantedDefect(x, y, colour, kind, level_adu=float(level))
            case "dead":
                return PlantedDefect(x, y, colour, kind, response=float(rng.uniform(0.0, 0.05)))

    @cached_property
    def _dark_e_per_s(self) -> Floats:
        """Dark current of every site at the reference temperature; unstable sites as if on."""
        spread = self._rng("dsnu").standard_normal(self.layout.shape, dtype=np.float32)
        spread *= np.float32(DSNU_SIGMA)
        # The mean of a lognormal is exp(mu + sigma**2 / 2).
        spread += np.float32(math.log(DSNU_MEAN_E_PER_S) - 0.5 * DSNU_SIGMA**2)
        rate: Floats = np.exp(spread, out=spread)
        for defect in self.defects:
            if defect.dark_current_adu_per_s is not None:
                rate[defect.y, defect.x] += defect.dark_current_adu_per_s * BASE_GAIN
        return rate

    @cached_property
    def _response(self) -> Floats:
        """What every site makes of light that would be 1 in a healthy green site."""
        response = self._rng("prnu").standard_normal(self.layout.shape, dtype=np.float32)
        response *= np.float32(self.prnu)
        response += np.float32(1.0)
        for letter, plane in self._planes():
            response[plane] *= np.float32(RESPONSE[letter])
        for defect in self.defects:
            if defect.response is not None:
                response[defect.y, defect.x] *= defect.response
        return response

    @cached_property
    def _colour_index(self) -> NDArray[np.uint8]:
        """Colour of every site as an index into "RGB"; green for a grey sensor."""
        index = np.ones(self.layout.shape, dtype=np.uint8)
        for letter, plane in self._planes():
            index[plane] = 1 if letter == "L" else "RGB".index(letter)
        return index

    def _planes(self) -> Iterator[tuple[str, tuple[slice, slice]]]:
        """Yield each plane of the mosaic: the letter of its colour and where its sites are."""
        period = self.layout.period
        for offset, letter in enumerate(self.layout.colours):
            row, column = divmod(offset, period)
            yield letter, (slice(row, None, period), slice(column, None, period))

    def _drifting_temp_c(self, index: int) -> float:
        low, high = TEMP_RANGE_C
        phase = float(self._rng("temperature").uniform(0.0, 2 * math.pi))
        return 0.5 * (low + high) + 0.5 * (high - low) * math.sin(2 * math.pi * index / 300 + phase)

    # ------------------------------------------------------------------ scenes

    def _light_e(self, index: int, scene: Scene, exposure_s: float, gain: float) -> Floats:
        """Return the light on every site, in electrons of a healthy green site; the caller's to change."""
        full_scale_e = SPAN_ADU * gain
        rng = self._rng("scene", index, SCENES.index(scene))
        match scene:
            case "moving" | "horizon":
                light = self._natural_scene(rng)
                if scene == "horizon":
                    # The lowest tenth is ground, and stays.
                    top = self.layout.height * 9 // 10
                    light[top:] = self._fixed_scene[top:]
                # The camera meters: the median lands where a photographer wants it.
                light *= np.float32(_log_uniform(rng, 0.06, 0.28) * full_scale_e)
            case "tripod":
                light = self._fixed_scene * np.float32(0.14 * full_scale_e * rng.normal(1.0, 0.03))
            case "flat":
                light = self._vignetting * np.float32(0.25 * FULL_WELL_E * exposure_s)
            case _:
                shift = rng.uniform(-DITHER_SITES, DITHER_SITES, 2) if scene == "dithered" else np.zeros(2)
                light = self._night_sky(shift, sigma=float(rng.uniform(1.0, 1.4)))
                light *= np.float32(exposure_s * rng.normal(1.0, 0.03))
        return light

    @cached_property
    def _vignetting(self) -> Floats:
        height, width = self.layout.shape
        y = np.linspace(-1.0, 1.0, height, dtype=np.float32)[:, np.newaxis]
        x = np.linspace(-1.0, 1.0, width, dtype=np.float32)
        fall: Floats = np.float32(1.0) - np.float32(0.15) * (y * y + x * x)
        return fall

    @cached_property
    def _stars(self) -> tuple[Floats, Floats, Floats, Floats]:
        """Positions x and y, peak rates in e-/s at a blur of 1.2 sites, and colours (n, 3) of the stars."""
        rng = self._rng("stars")
        height, width = self.layout.shape
        margin = DITHER_SITES + 2
        density = STARS / (width * height)
        count = round(density * (width + 2 * margin) * (height + 2 * margin))
        x = rng.uniform(-margin, width + margin, count).astype(np.float32)
        y = rng.uniform(-margin, height + margin, count).astype(np.float32)
        faintest, brightest = STAR_PEAK_E_PER_S
        peak = np.minimum(faintest * rng.random(count) ** (-1 / STAR_SLOPE), brightest).astype(np.float32)
        redness = rng.normal(0.0, 0.2, count)
        colours = np.exp(np.stack((redness, np.zeros(count), -redness), axis=1)).astype(np.float32)
        return x, y, peak, colours

    def _night_sky(self, shift: NDArray[np.float64], sigma: float) -> Floats:
        """Return e-/s: a sky that brightens towards one side, and the stars."""
        height, width = self.layout.shape
        y = np.linspace(0.85, 1.15, height, dtype=np.float32)[:, np.newaxis]
        x = np.linspace(0.95, 1.05, width, dtype=np.float32)
        light: Floats = np.float32(SKY_E_PER_S) * (y * x)
        star_x, star_y, peak, colours = self._stars
        # The same light in a wider disc has a lower peak.
        peak = peak * np.float32((1.2 / sigma) ** 2)
        self._add_spots(light, star_x + shift[1], star_y + shift[0], sigma, peak[:, np.newaxis] * colours)
        return light

    @cached_property
    def _fixed_scene(self) -> Floats:
        return self._natural_scene(self._rng("tripod"))

    @property
    def _texture_size(self) -> int:
        # A quarter wider than the frame, so that frames show different parts; a power of two for the FFT.
        wanted = 1 << math.ceil(math.log2(1.25 * max(self.layout.shape)))
        return min(max(wanted, TEXTURE_SIZES[0]), TEXTURE_SIZES[1])

    @cached_property
    def _rough(self) -> Floats:
        """Periodic texture with the 1/f amplitudes of natural scenes, blurred by the lens."""
        return _texture(self._rng("rough"), self._texture_size, slope=1.0)

    @cached_property
    def _smooth(self) -> Floats:
        """Periodic texture of clouds and colour casts."""
        return _texture(self._rng("smooth"), self._texture_size, slope=1.7)

    def _crop(self, texture: Floats, rng: np.random.Generator) -> Floats:
        """Return a piece as large as the sensor from a random place, mirrored and turned at random."""
        rows = _stretch(self.layout.height, len(texture), rng)
        columns = _stretch(self.layout.width, len(texture), rng)
        turned = texture.T if rng.random() < 0.5 else texture
        return np.take(np.take(turned, rows, axis=0), columns, axis=1)

    def _natural_scene(self, rng: np.random.Generator) -> Floats:
        """Return a scene with median 1: textured ground, perhaps a sky, objects, lines and small details."""
        height, width = self.layout.shape
        clouds = self._crop(self._smooth, rng)
        light = self._crop(self._rough, rng)
        # Smooth surfaces here, rough ones there: the clouds upside down are as good a map as any.
        light *= np.float32(rng.uniform(0.35, 0.7)) * np.clip(
            np.float32(0.55) + np.float32(0.55) * clouds[::-1], np.float32(0.08), np.float32(1.4)
        )
        rows = np.linspace(0.0, 1.0, height, dtype=np.float32)[:, np.newaxis]
        light += np.float32(rng.uniform(-0.8, 0.8)) * rows
        tint = GROUND_TINTS[int(rng.integers(len(GROUND_TINTS)))] + rng.normal(0.0, 0.06, 2)
        cast = np.float32(rng.uniform(0.03, 0.12))
        sky_tint = (-rng.uniform(0.1, 0.45), rng.uniform(0.1, 0.4))
        brightness = np.float32(rng.uniform(0.4, 1.4))
        # Without a sky its edge lies outside the frame, or the top row would be a fixed mark.
        no_sky = np.full(width, -EDGE_WIDTH, dtype=np.float32)
        sky_rows = _skyline(height, width, rng) if rng.random() < 0.7 else no_sky
        # Only the rows which the sky reaches are blended.
        deepest = min(height, max(0, math.ceil(float(sky_rows.max()) + EDGE_WIDTH)))
        y = np.arange(deepest, dtype=np.float32)[:, np.newaxis]
        sky = np.clip((sky_rows - y) / np.float32(EDGE_WIDTH) + np.float32(0.5), 0.0, 1.0)
        light[:deepest] *= np.float32(1.0) - sky
        light[:deepest] += sky * (brightness + np.float32(0.8) * rows[:deepest] + np.float32(0.2) * clouds[:deepest])
        # Colour: logarithms of red/green and blue/green, each at the sites of its own colour only.
        for letter, plane in self._planes():
            if letter not in "RB":
                continue
            sign, own = (1.0, 0) if letter == "R" else (-1.0, 1)
            colour = np.float32(sign) * cast * clouds[plane] + np.float32(tint[own])
            in_sky = sky[plane]
            colour[: len(in_sky)] += in_sky * (np.float32(sky_tint[own]) - colour[: len(in_sky)])
            light[plane] += colour
        np.exp(light, out=light)
        self._add_objects(light, sky_rows, rng)
        light *= np.float32(1.0 / float(np.median(light[::5, ::7])))
        return light

    def _add_objects(self, light: Floats, sky_rows: Floats, rng: np.random.Generator) -> None:
        """Draw things with edges over the scene, in place, nearly all of them below the sky."""
        height, width = self.layout.shape
        size = min(height, width)
        scale = np.float32(np.median(light[::5, ::7]))

        def places(count: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
            x, y = rng.uniform(0, width, count), rng.uniform(0, height, count)
            ground = np.take(sky_rows, x.astype(np.intp))
            dropped = np.minimum(ground + np.abs(rng.normal(0.0, 0.12 * height, count)), height - 1)
            return x, np.where((y < ground) & (rng.random(count) < 0.9), dropped, y)

        for centre in zip(*places(int(rng.integers(25, 50))), strict=True):
            self._add_shape(light, rng, _paint(rng) * scale, centre, half=_log_uniform(rng, 2.0, 0.2 * size))
        for _ in range(int(rng.integers(10, 30))):
            self._add_line(light, rng, _paint(rng) * scale, length=_log_uniform(rng, 20.0, size))
        x, y = places(round(rng.uniform(1e-4, 4e-4) * height * width))
        # Glints: a few reach full scale, most are a little brighter than what they lie on.
        peak = scale * rng.lognormal(-0.5, 1.2, (len(x), 1))
        peaks = (peak * np.exp(rng.normal(0.0, 0.15, (len(x), 3)))).astype(np.float32)
        self._add_spots(light, x.astype(np.float32), y.astype(np.float32), PSF_SIGMA, peaks)

    def _add_shape(
        self,
        light: Floats,
        rng: np.random.Generator,
        colour: Floats,
        centre: tuple[float, float],
        half: float,
    ) -> None:
        """Draw a disc or a rectangle, some with rows of windows or slats, in place."""
        height, width = self.layout.shape
        half_u, half_v = np.float32(half * rng.uniform(0.2, 1.0)), np.float32(half)
        reach = math.hypot(half_u, half_v) + EDGE_WIDTH
        top, bottom = max(0, int(centre[1] - reach)), min(height, int(centre[1] + reach) + 2)
        left, right = max(0, int(centre[0] - reach)), min(width, int(centre[0] + reach) + 2)
        dy = np.arange(top, bottom, dtype=np.float32)[:, np.newaxis] - np.float32(centre[1])
        dx = np.arange(left, right, dtype=np.float32) - np.float32(centre[0])
        box = light[top:bottom, left:right]
        paint = np.take(colour, self._colour_index[top:bottom, left:right])
        if rng.random() < 0.15:
            cover = _ramp(half_u - np.sqrt(dx * dx + dy * dy))
        else:
            # Most things made by man stand upright.
            angle = rng.normal(0.0, 0.01) if rng.random() < 0.75 else rng.uniform(0.0, math.pi)
            cos, sin = np.float32(math.cos(angle)), np.float32(math.sin(angle))
            u, v = dx * cos + dy * sin, dy * cos - dx * sin
            cover = _ramp(half_u - np.abs(u)) * _ramp(half_v - np.abs(v))
            if rng.random() < 0.4:
                step = np.float32(2 * math.pi / _log_uniform(rng, 5.0, 40.0))
                panes = np.clip(2 * np.sin(step * v), 0.0, 1.0)
                if rng.random() < 0.7:
                    panes = panes * np.clip(2 * np.sin(step * u), 0.0, 1.0)
                paint *= np.float32(1.0) - np.float32(rng.uniform(0.3, 0.9)) * panes
        # Light falls from one side.
        paint *= np.float32(1.0) + np.float32(rng.uniform(-0.25, 0.25)) * dx / half_v
        # A little of what lies below shows as the surface's own texture.
        box += cover * (paint - np.float32(0.93) * box)

    def _add_line(self, light: Floats, rng: np.random.Generator, colour: Floats, length: float) -> None:
        """Draw a wire of one or two sites' width, in place."""
        height, width = self.layout.shape
        angle = rng.uniform(-math.pi / 4, math.pi / 4)
        steep = rng.random() < 0.5
        along, across = (height, width) if steep else (width, height)
        begin, middle = rng.uniform(0, along), rng.uniform(0, across)
        run = np.arange(max(0, int(begin)), min(along, int(begin + length * math.cos(angle))))
        path = middle + (run - begin) * math.tan(angle)
        target = np.round(path).astype(np.intp) + np.arange(-4, 5)[:, np.newaxis]
        distance = (target - path) * math.cos(angle)
        blur = math.hypot(PSF_SIGMA, rng.uniform(0.3, 0.7))
        cover = np.exp(-0.5 * (distance / blur) ** 2).astype(np.float32)
        inside = (target >= 0) & (target < across)
        target, cover = target[inside], cover[inside]
        along_run = np.broadcast_to(run, inside.shape)[inside]
        site = (along_run, target) if steep else (target, along_run)
        light[site] += cover * (np.take(colour, self._colour_index[site]) - light[site])

    def _add_spots(self, light: Floats, x: Floats, y: Floats, sigma: float, peaks: Floats) -> None:
        """Add gaussian spots of peaks (n, 3), one per colour, in place."""
        height, width = self.layout.shape
        offset = np.arange(-7, 8, dtype=np.float32)
        columns = np.round(x)[:, np.newaxis] + offset
        rows = np.round(y)[:, np.newaxis] + offset
        narrow = np.float32(-0.5 / sigma**2)
        across = np.exp(narrow * (columns - x[:, np.newaxis]) ** 2)
        down = np.exp(narrow * (rows - y[:, np.newaxis]) ** 2)
        spot = down[:, :, np.newaxis] * across[:, np.newaxis, :]
        in_rows, in_columns = (rows >= 0) & (rows < height), (columns >= 0) & (columns < width)
        inside = in_rows[:, :, np.newaxis] & in_columns[:, np.newaxis, :]
        site = rows.astype(np.intp)[:, :, np.newaxis] * width + columns.astype(np.intp)[:, np.newaxis, :]
        which = np.broadcast_to(np.arange(len(x))[:, np.newaxis, np.newaxis], site.shape)[inside]
        site = site[inside]
        np.add.at(light.reshape(-1), site, spot[inside] * peaks[which, self._colour_index.reshape(-1)[site]])


def write_series(
    out: Path,
    sensor: VirtualSensor,
    frames: int,
    scene: Scene,
    format: FileFormat = "dng",
    *,
    exposure_s: float | None = None,
    iso: float | None = None,
) -> Iterator[Path]:
    """Write truth.json and then the shots, yielding each shot's path once the file is whole.

    A folder with the same truth is written again, or in the other format: so a run that was interrupted is completed,
    and shots become pairs of raw and JPEG.

    Raises
    ------
    FileExistsError
        If the folder holds shots of another truth: mixed with these, truth.json would not be true of them.
    ValueError
        If the format is not "dng" or "jpg".
    """
    if format not in ("dng", "jpg"):
        raise ValueError(f"format must be dng or jpg, got {format!r}")
    out.mkdir(parents=True, exist_ok=True)
    truth = {
        "make": sensor.make,
        "model": sensor.model,
        "serial": sensor.serial,
        "width": sensor.layout.width,
        "height": sensor.layout.height,
        "pattern": sensor.layout.colours,
        "scene": scene,
        "frames": frames,
        "seed": sensor.seed,
        "black_level_adu": BLACK_LEVEL_ADU,
        "white_level_adu": WHITE_LEVEL_ADU,
        "defects": [asdict(defect) for defect in sensor.defects],
    }
    text, place = (json.dumps(truth, indent=1) + "\n").encode(), out / "truth.json"
    holds_others = place.read_bytes() != text if place.exists() else any(out.glob("frame_*"))
    if holds_others:
        raise FileExistsError(f"{out} holds shots of another run; name another folder, or remove this one first")
    _write_whole(place, text)
    for index in range(frames):
        path = out / f"frame_{index + 1:04d}.{format}"
        shot = sensor.shot(index, scene, exposure_s=exposure_s, iso=iso)
        if format == "dng":
            sensor.write_dng(path, shot)
        else:
            sensor.write_jpeg(path, shot)
        yield path


def _write_whole(path: Path, content: bytes | memoryview) -> None:
    """Write a file, so that all of it is there, or nothing; not durably: it can be simulated anew."""
    # Hidden and of another ending: nobody watching the directory takes it for a shot.
    part = path.with_name(f".{path.name}.part")
    try:
        part.write_bytes(content)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _log_uniform(rng: np.random.Generator, low: float, high: float) -> float:
    return float(low * (high / low) ** rng.random())


def _occupy(free: NDArray[np.bool_], site: tuple[int, int]) -> None:
    y, x = site
    free[max(0, y - MIN_SPACING) : y + MIN_SPACING + 1, max(0, x - MIN_SPACING) : x + MIN_SPACING + 1] = False


def _read_out(mean_e: Floats, gain: float, rng: np.random.Generator) -> NDArray[np.uint16]:
    """Count electrons, add the amplifier's noise, convert to ADU, clip and round.

    From 4 e- on, the sum of the Poisson count and the gaussian read noise is drawn as one gaussian
    corrected to its third cumulant (Cornish and Fisher), which is much cheaper than a Poisson draw.
    Below, the count is drawn exactly.
    """
    noise = rng.standard_normal(mean_e.shape, dtype=np.float32)
    few = mean_e < 4.0
    counted = rng.poisson(mean_e[few]) + np.float32(READ_NOISE_E) * noise[few]
    variance = mean_e + np.float32(READ_NOISE_E**2)
    electrons: Floats = noise * noise
    electrons -= np.float32(1.0)
    electrons *= mean_e
    electrons /= np.float32(6.0) * variance
    noise *= np.sqrt(variance, out=variance)
    electrons += noise
    electrons += mean_e
    electrons[few] = counted
    adu: Floats = electrons * np.float32(1.0 / gain) + np.float32(BLACK_LEVEL_ADU)
    np.clip(np.rint(adu, out=adu), 0.0, WHITE_LEVEL_ADU, out=adu)
    return adu.astype(np.uint16)


def _texture(rng: np.random.Generator, size: int, slope: float) -> Floats:
    """Return a periodic gaussian field of mean 0, variance 1, amplitudes f**-slope, blurred by the lens."""
    fy = np.fft.fftfreq(size)[:, np.newaxis]
    fx = np.fft.rfftfreq(size)
    squared = fy * fy + fx * fx
    # Nothing wider than a quarter of the texture: a frame shows a part of it only.
    amplitude = np.maximum(squared, (4 / size) ** 2) ** (-0.5 * slope)
    amplitude *= np.exp(-2 * (math.pi * PSF_SIGMA) ** 2 * squared)
    amplitude[0, 0] = 0.0
    spectrum = np.fft.rfft2(rng.standard_normal((size, size), dtype=np.float32)) * amplitude
    field = np.fft.irfft2(spectrum, s=(size, size))
    texture: Floats = (field / field.std()).astype(np.float32)
    return texture


def _stretch(length: int, period: int, rng: np.random.Generator) -> NDArray[np.intp]:
    """Return `length` successive positions of a texture from a random one, forwards or backwards."""
    run = np.arange(length) if rng.random() < 0.5 else np.arange(length)[::-1]
    positions: NDArray[np.intp] = (run + int(rng.integers(period))) % period
    return positions


def _skyline(height: int, width: int, rng: np.random.Generator) -> Floats:
    """Return for each column the row at which the sky ends: hills of all widths."""
    steps = rng.standard_normal(width // 2 + 1) + 1j * rng.standard_normal(width // 2 + 1)
    steps *= np.maximum(np.arange(width // 2 + 1), 1) ** -1.4
    steps[0] = 0.0
    hills = np.fft.irfft(steps, width)
    hills *= rng.uniform(0.01, 0.08) * height / max(float(hills.std()), 1e-9)
    return (height * rng.uniform(0.15, 0.55) + hills).astype(np.float32)


def _paint(rng: np.random.Generator) -> Floats:
    """Return light (R, G, B) of a thing, relative to the scene's median: shadow, surface or lamp."""
    brightness = rng.lognormal(-0.2, 0.8)
    chance = rng.random()
    if chance < 0.12:
        brightness = rng.uniform(0.01, 0.05)
    elif chance > 0.93:
        brightness = rng.uniform(4.0, 20.0)
    return (brightness * np.exp(rng.normal(0.0, 0.15, 3))).astype(np.float32)


def _ramp(depth: Floats) -> Floats:
    """Return the share of light of a site at `depth` sites inside a blurred edge."""
    ramp: Floats = np.clip(depth / np.float32(EDGE_WIDTH) + np.float32(0.5), 0.0, 1.0)
    return ramp


@cache
def _tone_curve() -> NDArray[np.uint8]:
    """Return the 8-bit value of each linear level from 0 to the span in ADU: the transfer curve of sRGB."""
    linear = np.arange(SPAN_ADU + 1) / SPAN_ADU
    curve = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    return np.round(255 * curve).astype(np.uint8)


def _toned(linear: Floats) -> NDArray[np.uint8]:
    """Return the rendered values of linear ones, black level removed."""
    level = np.clip(linear, 0.0, SPAN_ADU).astype(np.uint16)
    return np.take(_tone_curve(), level)


def _styled(red: Floats, green: Floats, blue: Floats) -> tuple[NDArray[np.uint8], ...]:
    """Return the toned colours of linear ones, clipped to white first so that lamps do not turn pink."""
    clipped = [np.clip(colour, 0.0, SPAN_ADU) for colour in (red, green, blue)]
    grey = np.float32(0.3) * clipped[0] + np.float32(0.6) * clipped[1] + np.float32(0.1) * clipped[2]
    grey *= np.float32(1.0) - SATURATION
    return tuple(_toned(SATURATION * colour + grey) for colour in clipped)


def _bayer_to_rgb(balanced: Floats, pattern: str) -> NDArray[np.uint8]:
    """Interpolate a Bayer mosaic with gradient correction and render it.

    References
    ----------
    Malvar, He, Cutler (2004), ICASSP, "High-quality linear interpolation for demosaicing of
    Bayer-patterned color images".
    """
    height, width = balanced.shape
    # Mirrored about the outer sites, which keeps the colours in step; even, so that quarters are equal.
    padded = np.pad(balanced, ((2, 2 + height % 2), (2, 2 + width % 2)), mode="reflect")
    # Contiguous quarters: a neighbour of a plane is then a shifted block, not a strided one.
    quarter = {(a, b): np.ascontiguousarray(padded[a::2, b::2]) for a in (0, 1) for b in (0, 1)}
    rendered = np.empty((height, width, 3), dtype=np.uint8)
    for offset, letter in enumerate(pattern):
        row, column = divmod(offset, 2)
        at = _neighbours(quarter, (row, column), balanced.shape)
        here = at(0, 0)
        beside, above = at(0, -1) + at(0, 1), at(-1, 0) + at(1, 0)
        far_beside, far_above = at(0, -2) + at(0, 2), at(-2, 0) + at(2, 0)
        diagonal = at(-1, -1) + at(-1, 1) + at(1, -1) + at(1, 1)
        if letter == "G":
            along_row = _eighth(5 * here + 4 * beside - diagonal - far_beside + np.float32(0.5) * far_above)
            along_column = _eighth(5 * here + 4 * above - diagonal - far_above + np.float32(0.5) * far_beside)
            red_in_row = "R" in pattern[2 * row : 2 * row + 2]
            red, blue = (along_row, along_column) if red_in_row else (along_column, along_row)
            colours = _styled(red, here, blue)
        else:
            far = far_beside + far_above
            green = _eighth(4 * here + 2 * (beside + above) - far)
            other = _eighth(6 * here + 2 * diagonal - np.float32(1.5) * far)
            colours = _styled(here, green, other) if letter == "R" else _styled(other, green, here)
        for channel, colour in enumerate(colours):
            rendered[row::2, column::2, channel] = colour
    return rendered


def _neighbours(
    quarter: dict[tuple[int, int], Floats], origin: tuple[int, int], shape: tuple[int, ...]
) -> Callable[[int, int], Floats]:
    """Return a function of (dy, dx) giving that neighbour of each site of the plane from `origin` on."""
    rows, columns = ((size - first + 1) // 2 for size, first in zip(shape, origin, strict=True))

    def at(dy: int, dx: int) -> Floats:
        y, x = origin[0] + 2 + dy, origin[1] + 2 + dx
        return quarter[y % 2, x % 2][y // 2 : y // 2 + rows, x // 2 : x // 2 + columns]

    return at


def _eighth(total: Floats) -> Floats:
    total *= np.float32(0.125)
    return total


def _mosaic_to_rgb(balanced: Floats, layout: SensorLayout) -> NDArray[np.uint8]:
    """Interpolate a mosaic of any order and render it: a mean of near sites, weighted by distance."""
    height, width = balanced.shape
    kernel = np.outer(*[np.array((1.0, 4.0, 6.0, 4.0, 1.0), dtype=np.float32)] * 2)
    repeats = (height // layout.period + 1, width // layout.period + 1)
    letters = np.array(list(layout.colours)).reshape(layout.period, layout.period)
    letters = np.tile(letters, repeats)[:height, :width]
    colours = []
    for letter in "RGB":
        known = (letters == letter).astype(np.float32)
        total, weight = np.zeros_like(balanced), np.zeros_like(balanced)
        sources = (np.pad(balanced * known, 2), np.pad(known, 2))
        for dy in range(5):
            for dx in range(5):
                total += kernel[dy, dx] * sources[0][dy : dy + height, dx : dx + width]
                weight += kernel[dy, dx] * sources[1][dy : dy + height, dx : dx + width]
        colours.append(np.where(known > 0, balanced, total / np.maximum(weight, 1)))
    return np.stack(_styled(*colours), axis=2)
