"""What defective samples would have read: turns samples, their layout and sites into values for these sites.

A site is interpolated along eight directions, each time between the nearest healthy samples of its colour on either
side. How far a direction is trusted is tried out on the healthy samples around the site, of whatever colour: each is
interpolated along the same direction over the same distances, and compared with what it is. Along an edge or a thin
line that works, across it fails, and the square of the failure is the direction's variance::

    v(s) = sum_d w_d v_d / sum_d w_d        w_d = (e_d^2 + q^2)^-P
    v_d  = (j a + i b) / (i + j)            a, b: nearest healthy samples of the colour, i and j steps away
    e_d^2 = sum_n g_n (s_n - v_d(n))^2 / sum_n g_n

with g a Gaussian of the distance to s. Directions as candidates are those of Hamilton and Adams; with P = 1 the weights
would be those of Cochran for independent estimates. These are none: neighbouring directions err alike, so a larger P
is better, and was measured. Every value is a convex combination of healthy samples of its colour: it never leaves their
range, and no other site's value goes into it, so that neither order nor repetition matters.

References
----------
Hamilton, Adams (1997), US patent 5,629,734: interpolation along the direction of least gradient.
Cochran (1937), Supplement to the Journal of the Royal Statistical Society 4(1), 102-118: inverse-variance weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hotpixd.core.frame import Samples, SensorLayout
from hotpixd.core.jit import FAST, nb

REACH = 64
"""Pixels that are looked at along a direction for a healthy sample. A cluster wider than twice that is no cluster."""

_DIRECTIONS = np.array([(0, 1), (1, 0), (1, 1), (1, -1), (1, 2), (2, 1), (1, -2), (2, -1)], np.int64)
"""(rows, columns) of one step."""

_TRIED_WITHIN = 4
"""Pixels around a site in which directions are tried out."""

_TRIED_SIGMA = 1.5
"""Standard deviation of the weight of a trial with its distance, pixels."""

_POWER = 2.0
"""P above."""

_QUANTUM = 0.3
"""q above, ADU: the standard deviation of rounding to whole numbers."""


@dataclass(frozen=True, slots=True)
class Filled:
    """Values for sites; every array has one entry per site asked for."""

    values: NDArray[Any]
    """Interpolated values, of the samples' type (floats of it for floats)."""

    found: NDArray[np.bool_]
    """Whether there were healthy samples within reach. Where not, the value is the site's own."""


def inpaint(
    samples: Samples | NDArray[np.float32],
    layout: SensorLayout,
    sites: NDArray[np.int64],
    avoided: NDArray[np.int64] | None = None,
) -> Filled:
    """Interpolate sites from healthy samples of their colour.

    Parameters
    ----------
    samples : (height, width * channels)
        Not modified.
    sites : (K,) flat indices, in any order
    avoided : flat indices of other sites whose samples are not to be used either

    Raises
    ------
    ValueError
        If the samples have another shape than the layout says, or a site lies outside.
    """
    bad = np.zeros(layout.size, np.bool_)
    for some in (sites, avoided):
        if some is not None and some.size:
            if some.min() < 0 or some.max() >= layout.size:
                raise ValueError(f"a site lies outside of {layout.size} samples")
            bad[some] = True
    return inpaint_within(samples, layout, sites, bad.reshape(layout.shape))


def inpaint_within(
    samples: Samples | NDArray[np.float32],
    layout: SensorLayout,
    sites: NDArray[np.int64],
    unusable: NDArray[np.bool_],
) -> Filled:
    """Do the same where all samples that must not be used are marked, those of the sites among them.

    Raises
    ------
    ValueError
        If an array has another shape than the layout says.
    """
    if samples.shape != layout.shape or unusable.shape != layout.shape:
        raise ValueError(f"samples of shape {samples.shape} do not fit a layout of {layout.shape}")
    values = np.empty(len(sites), np.float64)
    found = np.empty(len(sites), np.bool_)
    _fill(samples, unusable, _classes(layout), layout.channels, sites, _trials(), values, found)
    if samples.dtype.kind == "u":
        values = np.rint(values)
    return Filled(values.astype(samples.dtype), found)


def local_noise(
    samples: Samples | NDArray[np.float32],
    layout: SensorLayout,
    sites: NDArray[np.int64],
    avoided: NDArray[np.int64],
    reach: int = 6,
) -> NDArray[np.float64]:
    """Return the robust noise of the samples around each site, (K,) ADU, at least that of rounding.

    From differences of neighbours of one plane within `reach` plane steps of the site: 1.4826 median |d| / sqrt 2. An
    edge or a star changes few of them, so this is not the texture but what a defect must exceed to be seen.
    """
    bad = np.zeros(layout.size, np.bool_)
    bad[sites] = True
    bad[avoided] = True
    bad = bad.reshape(layout.shape)
    noise = np.full(len(sites), _QUANTUM)
    rows, cols = np.divmod(sites, layout.shape[1])
    dy, dx = layout.row_step, layout.col_step
    for k in range(len(sites)):
        top, left = rows[k] - min(reach, rows[k] // dy) * dy, cols[k] - min(reach, cols[k] // dx) * dx
        part = (slice(top, rows[k] + reach * dy + 1, dy), slice(left, cols[k] + reach * dx + 1, dx))
        values, healthy = samples[part].astype(np.float64), ~bad[part]
        across = np.abs(np.diff(values, axis=1))[healthy[:, 1:] & healthy[:, :-1]]
        down = np.abs(np.diff(values, axis=0))[healthy[1:] & healthy[:-1]]
        differences = np.concatenate([across, down])
        if differences.size:
            noise[k] = max(1.4826 * float(np.median(differences)) / 2**0.5, _QUANTUM)
    return noise


def _classes(layout: SensorLayout) -> NDArray[np.int64]:
    """Return (period, period) numbers of the colours of a period; equal numbers may stand in for each other."""
    period = layout.period
    if layout.channels > 1:
        return np.zeros((1, 1), np.int64)
    letters = list(layout.colours)
    # Of a grey picture that may be a mosaic of unknown order, nothing says which positions share a colour.
    unknown = period > 1 and len(set(letters)) == 1
    numbers = range(len(letters)) if unknown else [sorted(set(letters)).index(letter) for letter in letters]
    return np.array(numbers, np.int64).reshape(period, period)


def _trials() -> NDArray[np.float64]:
    """Return the weights of trials by (row, column) offset from the site, which has none itself."""
    offset = np.arange(-_TRIED_WITHIN, _TRIED_WITHIN + 1)
    squared = offset[:, np.newaxis] ** 2 + offset**2
    weights = np.exp(-0.5 * squared / _TRIED_SIGMA**2)
    weights[_TRIED_WITHIN, _TRIED_WITHIN] = 0.0
    return np.asarray(weights)


@nb.njit(**FAST)
def _usable(bad, classes, channels, row, pixel, channel, colour):  # type: ignore[no-untyped-def]
    """Whether a healthy sample of a colour is at a place."""
    if row < 0 or pixel < 0 or row >= bad.shape[0] or pixel * channels >= bad.shape[1]:
        return False
    if bad[row, pixel * channels + channel]:
        return False
    period = classes.shape[0]
    # Divisions take longer than all the rest.
    return period == 1 or classes[row % period, pixel % period] == colour


@nb.njit(**FAST)
def _steps_to_usable(bad, classes, channels, row, pixel, channel, dy, dx):  # type: ignore[no-untyped-def]
    """Steps to the nearest healthy sample of the colour of a place; 0 if there is none within reach."""
    period = classes.shape[0]
    colour = classes[row % period, pixel % period]
    for step in range(1, REACH // max(abs(dy), abs(dx)) + 1):
        if _usable(bad, classes, channels, row + step * dy, pixel + step * dx, channel, colour):
            return step
    return 0


@nb.njit(**FAST)
def _squared_error(samples, bad, classes, channels, row, pixel, channel, dy, dx, i, j, trials):  # type: ignore[no-untyped-def]
    """Mean squared error of interpolating the samples around a place along a direction; negative if none can be."""
    reach = trials.shape[0] // 2
    period = classes.shape[0]
    total, weights = 0.0, 0.0
    for oy in range(-reach, reach + 1):
        for ox in range(-reach, reach + 1):
            weight = trials[oy + reach, ox + reach]
            y, x = row + oy, pixel + ox
            if weight == 0.0 or y < 0 or x < 0 or y >= bad.shape[0] or x * channels >= bad.shape[1]:
                continue
            if bad[y, x * channels + channel]:
                continue
            colour = classes[y % period, x % period] if period > 1 else classes[0, 0]
            foreseen = 0.0
            if i > 0:
                ya, xa = y - i * dy, x - i * dx
                if not _usable(bad, classes, channels, ya, xa, channel, colour):
                    continue
                foreseen += max(j, 1) * float(samples[ya, xa * channels + channel])
            if j > 0:
                yb, xb = y + j * dy, x + j * dx
                if not _usable(bad, classes, channels, yb, xb, channel, colour):
                    continue
                foreseen += max(i, 1) * float(samples[yb, xb * channels + channel])
            foreseen /= i + j if i > 0 and j > 0 else 1
            error = float(samples[y, x * channels + channel]) - foreseen
            total += weight * error * error
            weights += weight
    return total / weights if weights > 0.0 else -1.0


@nb.njit(**FAST)
def _fill(samples, bad, classes, channels, sites, trials, values, found):  # type: ignore[no-untyped-def]
    count = _DIRECTIONS.shape[0]
    value, squared, distance = np.empty(count), np.empty(count), np.empty(count)
    for k in range(sites.size):
        row = sites[k] // samples.shape[1]
        column = sites[k] % samples.shape[1]
        pixel, channel = column // channels, column % channels
        known = 0.0
        lowest, highest = np.inf, -np.inf
        for d in range(count):
            dy, dx = _DIRECTIONS[d]
            i = _steps_to_usable(bad, classes, channels, row, pixel, channel, -dy, -dx)
            j = _steps_to_usable(bad, classes, channels, row, pixel, channel, dy, dx)
            distance[d] = 0.0
            if i == 0 and j == 0:
                continue
            a = float(samples[row - i * dy, (pixel - i * dx) * channels + channel]) if i > 0 else 0.0
            b = float(samples[row + j * dy, (pixel + j * dx) * channels + channel]) if j > 0 else 0.0
            if i > 0:
                lowest, highest = min(lowest, a), max(highest, a)
            if j > 0:
                lowest, highest = min(lowest, b), max(highest, b)
            if i > 0 and j > 0:
                value[d] = (j * a + i * b) / (i + j)
            else:
                value[d] = a if i > 0 else b
            distance[d] = (i + j) * np.sqrt(dy * dy + dx * dx)
            squared[d] = _squared_error(samples, bad, classes, channels, row, pixel, channel, dy, dx, i, j, trials)
            known = max(known, squared[d])
        total, weights = 0.0, 0.0
        for d in range(count):
            if distance[d] == 0.0:
                continue
            # A direction that cannot be tried out is as good as the worst, and worse the farther it reaches.
            error = squared[d] if squared[d] >= 0.0 else (known + 1.0) * distance[d] ** 2
            weight = (error + _QUANTUM**2) ** -_POWER
            total += weight * value[d]
            weights += weight
        found[k] = weights > 0.0
        if found[k]:
            # Rounding of the sums must not lead out of the range either.
            values[k] = min(max(total / weights, lowest), highest)
        else:
            values[k] = float(samples[row, column])
