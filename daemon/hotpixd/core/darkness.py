"""Tell a dark frame from a light frame by its samples alone.

A light frame taken for a dark one makes stars into defects, a dark one taken
for a light one merely adds evidence more slowly. So a frame is dark only if
everything speaks for it: its level is that of no light, the level is the same
everywhere and in all colours, and what stands out are single sites.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from hotpixd.core.frame import Samples, SensorLayout

BLOCK = 16
"""Rows and columns of a plane per block."""

COARSE_GRID = 5
"""Blocks looked at along each axis of a plane at first: 25 show the light in nearly every light frame."""

FINE_GRID = 16
"""The same for a frame that looks dark on the coarse grid."""

MAX_UNEVEN = 0.25
"""Noise units by which nine of ten blocks may differ from the level.

Measured: 0.07 to 0.17 in darks of the Flea3 and Basler CCDs, 0.28 in a light frame at a mean of 0.1 ADU.
"""

MAX_GLOW = 2.0
"""Noise units by which any block may differ: amplifier glow in a corner."""

MAX_TINT = 0.5
"""Noise units by which planes may differ. Light has a colour; pedestals of readout channels differ less."""

MAX_LEVEL = 0.01
"""Share of full scale that the level may lie above a known black level: dark current, not light."""

MAX_LEVEL_OF_UNKNOWN_BLACK = 0.03
"""Share of full scale below which a level without a known black level may be that of no light."""

MAX_NOISE = 0.02
"""Share of full scale that noise may reach, at the highest ISO settings. More is texture."""

OUTLIER_NOISES = 6.0
"""A sample this many noise units above the level stands out; of 1e9 normal samples one does."""

OUTLIER_MIN_ADU = 3.0
"""The least that stands out, for frames whose noise is below one ADU."""

MAX_OUTLIERS = 0.03
"""Share of samples that may stand out. No sensor in use has as many hot pixels at once."""

COMPANION = 0.1
"""A neighbour with this part of a site's excess is lit together with it.

A star lights its neighbours with 15 % or more, however sharp the lens; a saturated hot pixel
leaks 1 to 3 % into them.
"""

RENDERED_MAX_LEVEL_ADU = 8.0
"""Highest floor of a rendered 8-bit dark: noise clipped at black, lifted by the tone curve."""

RENDERED_GLOW_ADU = 0.5
"""The least by which a rendered block must differ: the rim of a hot pixel's 3 x 3 lifts it by 0.3."""

RENDERED_OUTLIER_ADU = 16.0
"""The least that stands out of a rendered frame, where noise comes in smoothed blotches."""

RENDERED_MAX_OUTLIERS = 0.005
"""Share of rendered samples that may stand out: each defect takes nine or more of them."""

LIT_LEVEL, LIT_RENDERED_ADU = 0.1, 90.0
"""Share of full scale above the black level, and level in 8 bits after the tone curve, that dark current reaches in
long and warm darks only.
"""

LIT_UNKNOWN_BLACK = 0.2
"""Share of full scale, black level included, where that is not known: offsets of 12-bit cameras reach 2048 of 16383."""

LIT_SMOOTH, LIT_SMOOTH_RENDERED = 0.2, 0.07
"""Noise as a share of such a level, below which it is light: dark current differs from site to site.

Measured: simulated darks 0.30 and more, rendered 0.08 and more; flat fields of the simulation 0.03, rendered 0.02, of a
Basler CCD 0.01.
"""

LIT_BRIGHT, LIT_BRIGHT_ADU = 0.5, 204.0
"""The level that is light, or a dark that nobody can use."""

LIT_UNEVEN, LIT_UNEVEN_ADU, LIT_UNEVEN_RENDERED_ADU = 1.0, 1.0, 1.5
"""Noises of one sample, and parts in 255 of full scale, by which more than a quarter of the blocks must differ.

Measured: real and simulated darks at most 0.7 noises, or at most 1 part in 255; moving scenes from 0.7 noises on,
tracked stars of 2 s from 0.2 on.
"""

LIT_ALIKE = 0.2
"""Correlation of neighbouring samples of a plane of a raw frame. In a dark each has noise of its own.

Measured: darks of the simulation, of the Flea3 and of the Basler CCD at most 0.02; moving scenes 0.37 and more.
"""

DEFECT_REACH = 5
"""Sites that one defect may reach from end to end after demosaicing and JPEG compression."""


def looks_dark(
    samples: Samples, layout: SensorLayout, black_level_adu: float | None, white_level_adu: float | None
) -> bool:
    """Return whether no light fell on the sensor, as far as one frame can tell. In doubt it is a light frame.

    Parameters
    ----------
    samples : (height, width * channels) uint8 or uint16
        Not modified. All are looked at only if a few hundred blocks do not already show light.
    black_level_adu, white_level_adu
        Value of a sample without light, and the largest value, if known.
    """
    # A raw frame of a monochrome sensor comes from LibRaw in 16 bit; 8-bit grey of period 1 is a grey JPEG.
    rendered = layout.channels > 1 or (layout.period == 1 and samples.dtype == np.uint8)
    for grid in (COARSE_GRID, FINE_GRID):
        floor = _floor(samples, layout, grid, rendered)
        if floor is None:
            return False
        level_adu, noise_adu = floor
        if rendered:
            highest_adu, full_adu = RENDERED_MAX_LEVEL_ADU, 255.0
        elif black_level_adu:  # 0 may mean that nobody knows it
            full_adu = (white_level_adu or float(np.iinfo(samples.dtype).max)) - black_level_adu
            highest_adu = black_level_adu + MAX_LEVEL * full_adu
        else:
            # The coarse look must not cost a search for the brightest of all samples.
            full_adu = white_level_adu or _full_scale(samples, exact=grid == FINE_GRID)
            highest_adu = MAX_LEVEL_OF_UNKNOWN_BLACK * full_adu
        if level_adu > highest_adu or (not rendered and noise_adu > MAX_NOISE * full_adu):
            return False
    if layout.channels > 1:
        return _only_defects_rendered(samples, layout, level_adu, noise_adu)
    if rendered:
        return _only_single_sites(samples, level_adu, noise_adu, RENDERED_OUTLIER_ADU, RENDERED_MAX_OUTLIERS)
    return _only_single_sites(samples, level_adu, noise_adu, OUTLIER_MIN_ADU, MAX_OUTLIERS)


def looks_lit(
    samples: Samples, layout: SensorLayout, black_level_adu: float | None, white_level_adu: float | None
) -> bool:
    """Return whether light has plainly fallen on the sensor while a dark was taken. In doubt it has not.

    Dark current and glow may lift a long exposure, and a glowing corner is no scene; but most of a dark is even.

    Parameters
    ----------
    samples, layout, black_level_adu, white_level_adu
        As for `looks_dark`.
    """
    rendered = layout.channels > 1 or (layout.period == 1 and samples.dtype == np.uint8)
    full_adu = 255.0 if rendered else white_level_adu or _full_scale(samples, exact=True)
    black_adu = 0.0 if rendered else black_level_adu or 0.0
    if rendered:
        high_adu, bright_adu, smooth = LIT_RENDERED_ADU, LIT_BRIGHT_ADU, LIT_SMOOTH_RENDERED
    else:
        share = LIT_LEVEL if black_level_adu else LIT_UNKNOWN_BLACK
        high_adu, bright_adu, smooth = share * (full_adu - black_adu), LIT_BRIGHT * (full_adu - black_adu), LIT_SMOOTH
    uneven_adu = (LIT_UNEVEN_RENDERED_ADU if rendered else LIT_UNEVEN_ADU) * full_adu / 255.0
    for index in range(0, layout.plane_count, max(1, layout.plane_count // 6)):
        plane = layout.plane(samples, index)
        blocks = _blocks(plane, FINE_GRID)
        # Medians: what stands out in a dark are single sites.
        levels = np.median(blocks, axis=1)
        level_adu = float(np.median(levels)) - black_adu
        noise_adu = 1.4826 * float(np.median(np.median(np.abs(blocks - levels[:, None]), axis=1)))
        if level_adu > bright_adu or (level_adu > high_adu and noise_adu < smooth * level_adu):
            return True
        away_adu = float(np.quantile(np.abs(levels - black_adu - level_adu), 0.75))
        if away_adu > max(LIT_UNEVEN * noise_adu, uneven_adu):
            return True
        # Rendered, noise comes in blotches.
        if not rendered and _likeness(blocks - levels[:, None], plane.shape, noise_adu) > LIT_ALIKE:
            return True
    return False


def _likeness(residuals: NDArray[np.float32], shape: tuple[int, ...], noise_adu: float) -> float:
    """Return the median of the blocks' correlations of diagonal neighbours: readout makes stripes, but no slanted ones.

    Parameters
    ----------
    residuals : (blocks, samples)
        Samples less the level of their block.
    shape
        Of the plane.
    """
    reach = max(3.0 * noise_adu, 1.0)
    blocks = np.clip(residuals, -reach, reach).reshape(-1, min(BLOCK, shape[0]), min(BLOCK, shape[1]))
    blocks = blocks - blocks.mean(axis=(1, 2), keepdims=True)
    variance = (blocks * blocks).mean(axis=(1, 2))
    down = (blocks[:, 1:, 1:] * blocks[:, :-1, :-1]).mean(axis=(1, 2))
    up = (blocks[:, 1:, :-1] * blocks[:, :-1, 1:]).mean(axis=(1, 2))
    # A block without any noise is like no scene.
    return float(np.median(0.5 * (down + up) / np.maximum(variance, 1e-6)))


def _floor(samples: Samples, layout: SensorLayout, grid: int, rendered: bool) -> tuple[float, float] | None:
    """Return (level, noise of one sample) in ADU; None if the level differs by place or by colour."""
    levels, noises = [], []
    # Every plane of a Bayer mosaic and every channel; of the 36 of X-Trans one column, with all colours.
    for index in range(0, layout.plane_count, max(1, layout.plane_count // 6)):
        blocks = _blocks(layout.plane(samples, index), grid)
        some = blocks[:, :: max(1, blocks.size // 16384)]
        middle = float(np.median(some))
        reach = max(4.0 * 1.4826 * float(np.median(np.abs(some - middle))), OUTLIER_MIN_ADU)
        # Clipped means, not medians: an 8-bit dark is zeros with a one here and there, median 0 in any light.
        clipped = np.clip(blocks, middle - reach, middle + reach)
        means = clipped.mean(axis=1)
        levels.append(float(np.median(means)))
        noises.append(float(np.sqrt(clipped.var(axis=1).mean())))
        away = np.abs(means - levels[-1])
        if np.quantile(away, 0.9) > MAX_UNEVEN * noises[-1]:
            return None
        # A demosaiced hot pixel lifts its block over a floor without noise; what it is, is judged later.
        calm = blocks.max(axis=1) <= middle + RENDERED_OUTLIER_ADU if rendered else np.ones(means.size, bool)
        glow = max(MAX_GLOW * noises[-1], RENDERED_GLOW_ADU if rendered else 0.0)
        if away[calm].max(initial=0.0) > glow:
            return None
    noise_adu = float(np.mean(noises))
    if max(levels) - min(levels) > MAX_TINT * noise_adu:
        return None
    return float(np.mean(levels)), noise_adu


def _blocks(plane: NDArray[np.generic], grid: int) -> NDArray[np.float32]:
    """Return the samples of up to grid x grid blocks spread evenly over a plane, (blocks, samples)."""
    height, width = min(BLOCK, plane.shape[0]), min(BLOCK, plane.shape[1])
    rows = np.unique(np.linspace(0, plane.shape[0] - height, grid).astype(int))
    cols = np.unique(np.linspace(0, plane.shape[1] - width, grid).astype(int))
    windows = np.lib.stride_tricks.sliding_window_view(plane, (height, width))
    blocks: NDArray[np.float32] = windows[np.ix_(rows, cols)].reshape(-1, height * width).astype(np.float32)
    return blocks


def _full_scale(samples: Samples, exact: bool) -> float:
    """Return the least usual full scale that holds all samples: cameras store 10 to 16 bits in 16.

    Without `exact`, the highest it can be, at no cost.
    """
    if samples.dtype == np.uint8:
        return 255.0
    brightest = int(samples.max()) if exact else 65535
    return next(full for full in (1023.0, 4095.0, 16383.0, 65535.0) if full >= brightest)


def _outliers(samples: Samples, threshold: int, limit: int) -> NDArray[np.intp] | None:
    """Return the flat indices of samples above `threshold`, ascending; None if they are more than `limit`."""
    # By bands that stay in the cache: the whole comparison would write 24 MB to read them once.
    found, count, step = [], 0, max(1, (1 << 20) // samples.shape[1])
    for top in range(0, samples.shape[0], step):
        inside = np.flatnonzero(samples[top : top + step] > threshold)
        count += inside.size
        if count > limit:
            return None
        found.append(inside + top * samples.shape[1])
    return np.concatenate(found)


def _only_single_sites(samples: Samples, level_adu: float, noise_adu: float, min_adu: float, max_share: float) -> bool:
    """Return whether the sites that stand out lie as if strewn at random, as hot pixels do."""
    threshold = int(level_adu + max(OUTLIER_NOISES * noise_adu, min_adu))
    sites = _outliers(samples, threshold, int(max_share * samples.size))
    if sites is None:
        return False
    if sites.size == 0:
        return True
    excess = samples.ravel()[sites].astype(np.float32) - level_adu
    pairs = _touching(sites, samples.shape[1])
    leaked = np.zeros(sites.size, bool)
    for one, other in (pairs, pairs[::-1]):
        leaked[one[excess[one] < COMPANION * excess[other]]] = True
    both = ~leaked[pairs[0]] & ~leaked[pairs[1]]
    accompanied = np.unique(pairs[:, both]).size
    # Strewn at random, this part of the sites has one of its 8 neighbours among the others.
    by_chance = 1.0 - (1.0 - sites.size / samples.size) ** 8
    allowed = sites.size * (1.5 * by_chance + 0.05) + 4.0
    return bool(accompanied <= allowed)


def _touching(sites: NDArray[np.intp], width: int) -> NDArray[np.intp]:
    """Return the pairs of ascending flat indices that are among each other's 8 neighbours, (2, pairs)."""
    pairs = []
    columns = sites % width
    for down, right in ((0, 1), (1, -1), (1, 0), (1, 1)):
        wanted = sites + down * width + right
        mate = np.minimum(np.searchsorted(sites, wanted), sites.size - 1)
        inside = (columns + right >= 0) & (columns + right < width)
        one = np.flatnonzero((sites[mate] == wanted) & inside)
        pairs.append(np.stack([one, mate[one]]))
    return np.concatenate(pairs, axis=1)


def _only_defects_rendered(samples: Samples, layout: SensorLayout, level_adu: float, noise_adu: float) -> bool:
    """Return whether all that stands out is small and of one colour, as a demosaiced hot pixel is."""
    threshold = int(level_adu + max(OUTLIER_NOISES * noise_adu, RENDERED_OUTLIER_ADU))
    sites = _outliers(samples, threshold, int(RENDERED_MAX_OUTLIERS * samples.size))
    if sites is None:
        return False
    if sites.size == 0:
        return True
    pixels = np.unique(sites // layout.channels)
    rows, cols = np.divmod(pixels, layout.width)
    excess = samples.reshape(layout.height, layout.width, layout.channels)[rows, cols].astype(np.float32) - level_adu
    # A hot photosite lights one colour; what lights two colours alike is light.
    ordered = np.sort(excess, axis=1)
    white = np.count_nonzero(ordered[:, -2] > 0.6 * ordered[:, -1])
    if white > 4 + 0.1 * pixels.size:
        return False
    return not _reaches_far(pixels, layout)


def _reaches_far(pixels: NDArray[np.intp], layout: SensorLayout) -> bool:
    """Return whether lit pixels form a line longer than one defect can be, along a row or a column."""
    lines = 0
    for step in (1, layout.width):
        run = pixels
        for ahead in range(1, DEFECT_REACH + 1):
            mate = np.minimum(np.searchsorted(pixels, run + ahead * step), pixels.size - 1)
            run = run[pixels[mate] == run + ahead * step]
        lines += run.size
    # Defects that happen to touch make a few such lines.
    return bool(lines > 2 + 0.01 * pixels.size)
