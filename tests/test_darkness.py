"""Which frames are told to be dark, by their samples alone."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest
import simplejpeg

from hotpixd.core.darkness import looks_dark, looks_lit
from hotpixd.core.frame import SensorLayout, ShotKind
from hotpixd.intake.decode import decode
from hotpixd.simulate import BLACK_LEVEL_ADU, WHITE_LEVEL_ADU, Scene, VirtualSensor
from pictures import SHARED

needs_data = pytest.mark.skipif(not SHARED.is_dir(), reason=f"the real frames are not at {SHARED}")

HEIGHT, WIDTH = 600, 900
LAYOUT = SensorLayout(WIDTH, HEIGHT, "RGGB")
BLACK, WHITE = 512.0, 16383.0


def black_frame(seed: int = 0, noise: float = 5.0, level: float = BLACK) -> np.ndarray:
    return np.random.default_rng(seed).normal(level, noise, (HEIGHT, WIDTH))


def stored(frame: np.ndarray) -> np.ndarray:
    return np.clip(np.rint(frame), 0, WHITE).astype(np.uint16)


def add_stars(frame: np.ndarray, count: int, fwhm: float = 2.2, flux: float = 4000.0, seed: int = 1) -> np.ndarray:
    """Add point sources of the given width at random places; `flux` is the peak of the brightest, in ADU."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[-6:7, -6:7]
    for _ in range(count):
        row, col = rng.integers(8, HEIGHT - 8), rng.integers(8, WIDTH - 8)
        dy, dx = rng.uniform(-0.5, 0.5, 2)
        profile = np.exp(-4 * np.log(2) * ((y - dy) ** 2 + (x - dx) ** 2) / fwhm**2)
        frame[row - 6 : row + 7, col - 6 : col + 7] += flux * rng.uniform(0.2, 1.0) * profile
    return frame


def add_hot(frame: np.ndarray, share: float, seed: int = 2) -> np.ndarray:
    rng = np.random.default_rng(seed)
    sites = rng.choice(frame.size, int(share * frame.size), replace=False)
    frame.ravel()[sites] += rng.exponential(800.0, sites.size) + 20.0
    return frame


@pytest.mark.parametrize("layout", [LAYOUT, SensorLayout(WIDTH, HEIGHT, "L"), SensorLayout(WIDTH, HEIGHT, "G" * 36)])
def test_noise_around_black_is_dark(layout):
    """A frame of the black level and noise alone is dark, in each kind of mosaic."""
    assert looks_dark(stored(black_frame()), layout, BLACK, WHITE)


@pytest.mark.parametrize("share", [0.0001, 0.001, 0.01])
def test_a_dark_with_hot_pixels_is_dark(share):
    """Up to one site in a hundred may be hot: what stands out lies as if strewn at random."""
    assert looks_dark(stored(add_hot(black_frame(), share)), LAYOUT, BLACK, WHITE)


def test_a_saturated_hot_pixel_that_leaks_is_dark():
    """A saturated site gives 2 % to its neighbours, which is far above the noise and no star."""
    frame = black_frame()
    rng = np.random.default_rng(4)
    for row, col in zip(rng.integers(1, HEIGHT - 1, 60), rng.integers(1, WIDTH - 1, 60), strict=True):
        frame[row, col] += 15000
        for down, right in ((0, 1), (0, -1), (1, 0), (-1, 0)):
            frame[row + down, col + right] += 300
    assert looks_dark(stored(frame), LAYOUT, BLACK, WHITE)


@pytest.mark.parametrize("count", [3, 20, 300])
@pytest.mark.parametrize("fwhm", [1.5, 2.2, 4.0])
def test_stars_on_a_black_sky_are_light(count, fwhm):
    """A star lights its neighbours of other colours too, a hot pixel does not."""
    assert not looks_dark(stored(add_stars(black_frame(), count, fwhm)), LAYOUT, BLACK, WHITE)


def test_stars_among_hot_pixels_are_light():
    """Hot pixels do not hide a star field."""
    frame = add_stars(add_hot(black_frame(), 0.0005), 60)
    assert not looks_dark(stored(frame), LAYOUT, BLACK, WHITE)


def test_even_light_is_light():
    """A flat field has the evenness of a dark frame, not its level."""
    assert not looks_dark(stored(black_frame(level=1500.0, noise=12.0)), LAYOUT, BLACK, WHITE)
    assert not looks_dark(stored(black_frame(level=3000.0, noise=12.0)), LAYOUT, None, None)


def test_coloured_dim_light_is_light():
    """One noise unit of light in one colour only gives itself away."""
    frame = black_frame()
    frame[::2, ::2] += 5.0
    assert not looks_dark(stored(frame), LAYOUT, BLACK, WHITE)


def test_a_dim_gradient_is_light():
    """Light is never as even as black."""
    frame = black_frame() + np.linspace(0, 8, WIDTH)
    assert not looks_dark(stored(frame), LAYOUT, BLACK, WHITE)


def test_a_little_amplifier_glow_is_dark_still():
    """A corner one noise unit above the rest is the sensor's own."""
    frame = black_frame()
    frame[:60, :90] += 5.0 * np.linspace(1, 0, 60)[:, None]
    assert looks_dark(stored(frame), LAYOUT, BLACK, WHITE)


def test_a_lamp_on_black_is_light():
    """One lit spot of thirty pixels is light, wherever the blocks lie."""
    frame = black_frame()
    frame[301:331, 401:431] += 400
    assert not looks_dark(stored(frame), LAYOUT, BLACK, WHITE)


def test_unknown_black_level_needs_a_level_near_zero():
    """Without a black level only the lowest few percent of full scale may be black."""
    assert looks_dark(stored(black_frame(level=60.0)), SensorLayout(WIDTH, HEIGHT, "LLLL"), None, WHITE)
    assert not looks_dark(stored(black_frame(level=900.0)), SensorLayout(WIDTH, HEIGHT, "LLLL"), None, WHITE)


# Rendered pictures


def rendered(frame: np.ndarray) -> np.ndarray:
    """Return an 8-bit JPEG of `frame` (height, width, 3), decoded again."""
    pixels = np.clip(np.rint(frame), 0, 255).astype(np.uint8)
    decoded = simplejpeg.decode_jpeg(simplejpeg.encode_jpeg(np.ascontiguousarray(pixels), quality=95))
    return decoded.reshape(HEIGHT, WIDTH * 3)


RENDERED = SensorLayout(WIDTH, HEIGHT, "RGB", 3)


def test_a_rendered_dark_with_hot_pixels_is_dark():
    """Demosaicing spreads a hot photosite over 3 x 3 pixels of one colour."""
    rng = np.random.default_rng(8)
    frame = np.zeros((HEIGHT, WIDTH, 3))
    kernel = np.array([[0.25, 0.5, 0.25], [0.5, 1.0, 0.5], [0.25, 0.5, 0.25]])
    for row, col in zip(rng.integers(2, HEIGHT - 2, 80), rng.integers(2, WIDTH - 2, 80), strict=True):
        frame[row - 1 : row + 2, col - 1 : col + 2, rng.integers(3)] += rng.uniform(60, 255) * kernel
    assert looks_dark(rendered(frame), RENDERED, None, None)


@pytest.mark.parametrize("count", [5, 100])
def test_rendered_stars_are_light(count):
    """A star lights all colours at once."""
    sky = add_stars(np.zeros((HEIGHT, WIDTH)), count, 2.5, 250.0)
    assert not looks_dark(rendered(np.dstack([sky] * 3)), RENDERED, None, None)


def test_a_rendered_picture_that_is_mostly_black_is_light():
    """A lit object on black is light, even if nine tenths of the picture are at the floor."""
    frame = np.zeros((HEIGHT, WIDTH, 3))
    frame[200:260, 300:420, 0] = 90
    assert not looks_dark(rendered(frame), RENDERED, None, None)


def test_a_dim_rendered_picture_is_light():
    """A few ADU of uneven light in the shadows are enough."""
    frame = np.zeros((HEIGHT, WIDTH, 3)) + np.linspace(0, 6, WIDTH)[None, :, None]
    assert not looks_dark(rendered(frame), RENDERED, None, None)


# Cost


def test_a_light_frame_costs_next_to_nothing():
    """Most frames are light, and a few blocks show it: 24 megapixels in less than 50 ms (0.4 measured)."""
    samples = np.random.default_rng(0).integers(900, 9000, (4000, 6000), dtype=np.uint16)
    layout = SensorLayout(6000, 4000, "RGGB")
    looks_dark(samples, layout, BLACK, WHITE)
    started = time.perf_counter()
    assert not looks_dark(samples, layout, BLACK, WHITE)
    assert time.perf_counter() - started < 0.05


# Real frames


@needs_data
@pytest.mark.parametrize("colours", ["GBRG", "LLLL"])
def test_flea3_darks_are_dark_and_lights_are_light(colours):
    """All 14 darks are dark; of the lights only those with a mean below 0.03 of 255 ADU pass for dark."""
    tifffile = pytest.importorskip("tifffile")
    for path in sorted((SHARED / "flea3_d1_bayer" / "darks").glob("*.tif")):
        assert looks_dark(tifffile.imread(path), SensorLayout(408, 344, colours), None, 255.0)
    called_dark = []
    for path in sorted((SHARED / "flea3_d1_bayer" / "lights").glob("*.tif")):
        samples = tifffile.imread(path)
        if looks_dark(samples, SensorLayout(408, 344, colours), None, 255.0):
            called_dark.append(samples.mean())
    assert all(mean < 0.03 for mean in called_dark)


@needs_data
def test_uniform_frames_of_a_ccd_are_told_apart():
    """The Basler CCD's darks and flat fields, 12 bit in 16, levels unknown."""
    image = pytest.importorskip("PIL.Image")
    for path in sorted((SHARED / "emva_ccd12").glob("*.png")):
        samples = np.asarray(image.open(path)).astype(np.uint16)
        dark = looks_dark(samples, SensorLayout(640, 480, "LLLL"), None, None)
        assert dark == path.name.startswith("d_"), path.name


@needs_data
def test_night_skies_and_black_scenes_are_light():
    """Stars through a telescope, and structured light on a scene that is mostly black."""
    tifffile = pytest.importorskip("tifffile")
    for path in sorted((SHARED / "tetra3_bfs_tiff").glob("*.tiff")):
        assert not looks_dark(tifffile.imread(path), SensorLayout(1024, 768, "LLLL"), None, None), path.name
    for path in sorted((SHARED / "tetra3_bfs_jpeg").glob("*.jpg")):
        grey = simplejpeg.decode_jpeg(path.read_bytes(), colorspace="GRAY")[:, :, 0]
        assert not looks_dark(grey, SensorLayout(1024, 768, "L"), None, None), path.name
    for path in sorted((SHARED / "canon_1d4_left").glob("*.JPG")):
        samples = simplejpeg.decode_jpeg(path.read_bytes()).reshape(3264, -1)
        assert not looks_dark(samples, SensorLayout(4896, 3264, "RGB", 3), None, None), path.name


# Whether light has plainly fallen on a frame that was to be dark

SENSOR = VirtualSensor(600, 400, hot=8, stuck=3, dead=3, seed=1)


def is_lit(scene: Scene, exposure_s: float, iso: float, *, rendered: bool, index: int = 0) -> bool:
    """Tell what a shot of the simulation is taken for, at 24 C."""
    shot = SENSOR.shot(index, scene, exposure_s=exposure_s, iso=iso, sensor_temp_c=24.0)
    if not rendered:
        return looks_lit(shot.mosaic, SENSOR.layout, BLACK_LEVEL_ADU, WHITE_LEVEL_ADU)
    encoded = simplejpeg.encode_jpeg(SENSOR.rendered(shot), 95, colorspace="RGB", colorsubsampling="422")
    pixels = simplejpeg.decode_jpeg(encoded, colorspace="RGB")
    return looks_lit(pixels.reshape(400, 1800), SensorLayout(600, 400, "RGB", 3), None, None)


@pytest.mark.parametrize("rendered", [False, True], ids=["raw", "rendered"])
@pytest.mark.parametrize("iso", [100, 400, 1600])
@pytest.mark.parametrize("exposure_s", [1.0, 30.0, 100.0, 300.0])
def test_no_dark_is_lit(exposure_s, iso, rendered):
    """However long, up to where dark current is 8 % of full scale, and nearly half of it after the tone curve."""
    assert not is_lit("dark", exposure_s, iso, rendered=rendered)


@pytest.mark.parametrize("rendered", [False, True], ids=["raw", "rendered"])
@pytest.mark.parametrize("iso", [100, 1600])
@pytest.mark.parametrize(
    ("scene", "exposure_s"),
    [("moving", 0.002), ("moving", 4.0), ("tripod", 0.002), ("tracked", 30.0), ("dithered", 30.0), ("flat", 0.3)],
)
def test_every_scene_is_lit(scene, exposure_s, iso, rendered):
    """However short its exposure, if it was metered."""
    assert all(is_lit(scene, exposure_s, iso, rendered=rendered, index=index) for index in range(4))


def test_even_light_is_lit_and_as_much_dark_current_is_not():
    """Light is as smooth as its photons; the dark currents of sites differ by a third and more."""
    rng = np.random.default_rng(5)
    share = 0.15 * (WHITE - BLACK)
    light = BLACK + share * rng.normal(1.0, 0.02, (HEIGHT, WIDTH))
    dark = BLACK + share * rng.lognormal(0.0, 0.3, (HEIGHT, WIDTH))
    assert looks_lit(stored(light), LAYOUT, BLACK, WHITE)
    assert not looks_lit(stored(dark), LAYOUT, BLACK, WHITE)
    # Nobody can use such a dark, and hardly any is one.
    assert looks_lit(stored(BLACK + 4 * (dark - BLACK)), LAYOUT, BLACK, WHITE)


def test_stripes_and_a_glowing_corner_are_not_lit():
    """Readout makes stripes along rows and columns, and an amplifier glows, in the dark as well."""
    rng = np.random.default_rng(6)
    stripes = black_frame() + rng.normal(0.0, 10.0, (HEIGHT, 1)) + rng.normal(0.0, 10.0, WIDTH)
    y, x = np.mgrid[0:HEIGHT, 0:WIDTH]
    glow = black_frame() + 2000.0 * np.exp(-np.hypot(y, x) / 60.0)
    assert not looks_lit(stored(stripes), LAYOUT, BLACK, WHITE)
    assert not looks_lit(stored(glow), LAYOUT, BLACK, WHITE)


@needs_data
def test_no_real_dark_is_lit():
    """Those of the Flea3, as TIFF and as DNG, and of the Basler CCD, whose bright frames are."""

    def lit(path: Path) -> bool:
        frame = decode(path, ShotKind.DARK)
        return looks_lit(frame.samples, frame.sensor.layout, frame.black_level_adu, frame.white_level_adu)

    darks = [
        path for folder in ("flea3_d1_bayer", "flea3_d1_dng_derived") for path in (SHARED / folder / "darks").iterdir()
    ]
    darks += (SHARED / "emva_ccd12").glob("d_s_*.png")
    assert len(darks) >= 40
    assert not any(map(lit, darks))
    assert all(map(lit, (SHARED / "emva_ccd12").glob("b_s_*.png")))
