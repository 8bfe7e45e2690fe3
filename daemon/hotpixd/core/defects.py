"""From observations of a site to what is wrong with it: kind, excess, dark current, whether it has recovered.

Everything works on all tracks at once, as arrays of one entry per track.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hotpixd.core.accumulator import Accumulator
from hotpixd.core.frame import Frame, SampleKind, Samples, SensorLayout, ShotKind
from hotpixd.core.tracks import OBSERVATION, Kind, Tracks, neighbours_of

BASE_ISO = 100.0
"""Excess is compared between frames per second of exposure at this ISO."""

TELLING = 6.0
"""An excess foreseen to be this many robust deviations of the neighbourhood can be missed only if it is not there."""

_ENOUGH = 4
"""Observations whose median says how strong an excess is: fewer may be high by chance."""

_CONSTANT_IN = 12
"""Darks in which a value must be the same to be no leak's."""

_SATURATES_IN_S = 0.5
"""Exposure, s x ISO / 100, in which only a sample that is stuck is saturated: a leak is a tenth of that, and less."""

QUANTISATION_ADU = 0.3
"""Deviation of a value rounded to whole ADU, 1/sqrt(12): no noise is believed to be smaller."""

_BY_CHANCE = 6.0
"""Standard deviations of chi-square by which a fit may be worse than its mean by chance.

Measured on 112 sensors without defects and with 1 % PRNU, 20 and 80 raw flats: at 4, of 26 sensors one had a false
defect; at 6 and 9, none. Hot samples of 60 found in 5, 10, 20, 50 moving scenes: at 6, 39.75, 50.5, 56, 59.5; at 9,
39.75, 50.5, 55.5, 59.25; without this 40, 50.75, 56, 59.75.
"""

_LEAST_SPREAD_ADU = 1.0
"""No neighbours' deviation is believed to be smaller, where small excesses are compared.

Of whole numbers whose standard deviation is below 0.74 the median deviation is 0, and coding a JPEG moves a sample by
about 1. Measured on 56 sensors as above, JPEGs: with `QUANTISATION_ADU` in its place 14 had a false defect, with 0.74
one, with 1 none. Hot samples found in JPEGs of 50 moving scenes: 50.25 instead of 50.5.
"""

_SPREAD_FREEDOM = 9.0
"""Degrees of freedom of a robust deviation of 24 neighbours: a median deviation tells as much as 37 % of them do."""


@dataclass(frozen=True, slots=True)
class Defect:
    """A site under suspicion, as users see it."""

    site: int
    """Flat index of the sample; `SensorLayout.address` gives x, y and colour."""

    status: str
    """"candidate", "stable" or "recovered"."""

    kind: str
    """"hot", "warm", "bright", "stuck", "dead", "dim" or "unstable"."""

    certainty: float
    """ln e over what stable takes, 0..1."""

    log_e: float
    """Largest ln e-value reached."""

    excess_adu: float
    """Mean sample above the median of its neighbours' means."""

    excess_sigma: float
    """The same in units of the plane's robust single-frame noise."""

    dark_current_adu_per_s: float | None
    """Fitted slope of the excess against exposure, at `dark_current_iso`. None if exposures do not tell."""

    dark_current_iso: float | None
    """ISO the dark current is stated at: the median of the frames it was fitted to."""

    share_on: float | None
    """Share of telling frames in which the excess was there. None if there were none."""

    level_adu: float
    """Median value of the sample."""

    first_seq: int
    """Ledger row of the shot with which it became a candidate."""

    stable_seq: int | None
    """Ledger row of the shot with which it became stable."""

    frames_to_stable: int | None
    """Counted frames that took."""


@dataclass(frozen=True, slots=True)
class Suspects:
    """Statistics of all tracks at one moment; every array has one entry per track."""

    excess: NDArray[np.float64]
    """Mean-frame excess, ADU."""

    sigma: NDArray[np.float64]
    """The same in units of the plane's noise."""

    still: NDArray[np.bool_]
    """The sample varies far less than its neighbours do."""

    response: NDArray[np.float64]
    """Mean above black over the neighbours' median mean above black; NaN if black is unknown."""


def noise_of(frame: Frame, layout: SensorLayout) -> NDArray[np.float64]:
    """Return the robust single-frame noise of each plane, (P,) ADU.

    From differences of neighbours of a plane, in up to 48 rows: 1.4826 median |d| / sqrt 2. The median looks past
    edges and details, so this is the noise of the smooth parts.
    """
    noise = np.empty(layout.plane_count)
    for p in range(layout.plane_count):
        plane = layout.plane(frame.samples, p)
        rows = plane[:: max(1, plane.shape[0] // 48), :1024].astype(np.int32)
        noise[p] = 1.4826 / np.sqrt(2) * _median_of_integers(np.abs(np.diff(rows, axis=1)))
    return np.maximum(noise, QUANTISATION_ADU)


def _median_of_integers(values: NDArray[np.int32]) -> float:
    """Return what `numpy.median` does, of small integers that are not negative, and five times as fast."""
    up_to = np.cumsum(np.bincount(values.ravel()))
    return float(np.searchsorted(up_to, [(values.size - 1) // 2, values.size // 2], side="right").mean())


def observe(frame: Frame, events: NDArray[np.uint8], tracks: Tracks, positions: NDArray[np.int64]) -> NDArray[Any]:
    """Return what a frame shows at tracks: (K,) of `tracks.OBSERVATION`."""
    flat = frame.samples.ravel()
    sites = tracks.rows["site"][positions]
    around = flat[tracks.neighbours[positions]].astype(np.float32)
    median = np.median(around, axis=1)
    seen = np.zeros(len(positions), OBSERVATION)
    seen["value"] = flat[sites]
    seen["excess"] = seen["value"] - median
    deviation = 1.4826 * np.median(np.abs(around - median[:, None]), axis=1)
    seen["spread"] = np.maximum(deviation, QUANTISATION_ADU)
    exposure, iso = frame.info.exposure_s, frame.info.iso
    seen["exposure"] = np.nan if exposure is None else exposure
    seen["gain"] = 1.0 if not iso else iso / BASE_ISO
    row, col = np.divmod(sites, frame.samples.shape[1])
    seen["events"] = events[row, col]
    seen["dark"] = frame.kind is ShotKind.DARK
    return seen


def excess_in(samples: Samples, sites: NDArray[np.int64], layout: SensorLayout) -> NDArray[np.float64]:
    """Return the excess of sites over the median of their neighbours in one frame, ADU."""
    flat = samples.ravel()
    return np.asarray(flat[sites] - np.median(flat[neighbours_of(sites, layout)], axis=1))


def weigh(
    accumulator: Accumulator, tracks: Tracks, noise: NDArray[np.float64], black_level_adu: float | None
) -> Suspects:
    """Return the statistics of all tracks from the sums over all frames."""
    sites, around = tracks.rows["site"], tracks.neighbours
    mean, variance = accumulator.mean_and_variance(sites)
    around_mean, around_variance = (np.median(each, axis=1) for each in accumulator.mean_and_variance(around))
    plane_noise = noise[accumulator.layout.planes_of(sites)]
    # Only a scene that changes tells a sample that does not: the neighbours must vary by more than noise.
    still = (around_variance > 9 * plane_noise**2) & (variance < 0.05 * around_variance)
    excess = mean - around_mean
    response = np.full(len(sites), np.nan)
    if black_level_adu is not None:
        lit = around_mean - black_level_adu
        telling = lit > 3 * plane_noise
        response[telling] = (mean[telling] - black_level_adu) / lit[telling]
    return Suspects(excess, excess / plane_noise, still, response)


def follows_light(tracks: Tracks, positions: NDArray[np.int64], black_level_adu: float | None) -> NDArray[np.bool_]:
    """Whether what was observed at tracks can be an excess in proportion to the light: a sample's own response.

    Least squares of excess_i = r light_i, with the neighbours' deviations as errors. These are measured, too, so what
    is left is weighed as Student's t has it, not as a normal distribution.

    Returns
    -------
    (K,) bool
    """
    recent, held = tracks.recent_of(positions)
    excess, spread = recent["excess"].astype(np.float64), np.maximum(recent["spread"], _LEAST_SPREAD_ADU)
    light = (recent["value"] - recent["excess"] - (black_level_adu or 0.0)).astype(np.float64)
    weight = np.where(held, 1 / spread.astype(np.float64) ** 2, 0.0)
    response = (weight * excess * light).sum(axis=1) / np.maximum((weight * light**2).sum(axis=1), 1e-9)
    square = weight * (excess - response[:, None] * light) ** 2
    misfit = (_SPREAD_FREEDOM * np.log1p(square / _SPREAD_FREEDOM)).sum(axis=1)
    free = np.maximum(held.sum(axis=1) - 1, 0)
    return np.asarray(misfit < free + _BY_CHANCE * np.sqrt(2 * free + 1))


def classify(
    tracks: Tracks,
    suspects: Suspects,
    counts: NDArray[np.int64],
    sample_kind: SampleKind,
    white_level_adu: float,
    floor_sigma: float,
) -> None:
    """Set kind, rate, level and share_on of every track, in place.

    Parameters
    ----------
    counts : (4, K) event counts of the tracks
    white_level_adu : saturated samples do not tell an excess
    floor_sigma : an excess below this many deviations is too small to matter
    """
    rows = tracks.rows
    seen = _seen(tracks, sample_kind, white_level_adu)
    # Events before excess: a mean over dark and bright frames may hide which side it is.
    dim = np.where(counts[0] == counts[1], suspects.excess < 0, counts[1] > counts[0])
    kind = np.full(len(rows), int(Kind.BRIGHT))
    kind[seen.in_darks | seen.grows] = Kind.HOT
    kind[seen.comes_and_goes] = Kind.UNSTABLE
    # Once strong, always strong: darks show what a hundred short exposures after them do not.
    strength = np.fmax(np.abs(suspects.sigma), np.where(dim, 0.0, np.fmax(seen.clear, rows["strength"])))
    kind[(strength < floor_sigma) & (kind != Kind.UNSTABLE)] = Kind.WARM
    kind[dim] = Kind.DIM
    # Without a black level, a sample that hardly ever is above its neighbours has no response.
    no_response = suspects.response < 0.25
    unknown = np.isnan(suspects.response)
    kind[suspects.still | (seen.constant & ~dim)] = Kind.STUCK
    sinks = counts[1] > 3 * counts[0]
    kind[suspects.still & (no_response | (unknown & sinks))] = Kind.DEAD
    kind[dim & ~suspects.still & (suspects.response < 0.5)] = Kind.DEAD
    kind[dim & ~suspects.still & unknown & (suspects.sigma < -floor_sigma)] = Kind.DEAD
    rows["kind"] = kind
    rows["strength"] = strength
    rows["rate"] = np.where(kind == Kind.UNSTABLE, seen.on_rate, seen.rate)
    rows["level"] = seen.level
    rows["share_on"] = seen.share_on


@dataclass(slots=True)
class _Seen:
    """What the observations of tracks say; every array has one entry per track."""

    in_darks: NDArray[np.bool_]
    """Three darks show it."""

    grows: NDArray[np.bool_]
    """The excess grows with exposure."""

    comes_and_goes: NDArray[np.bool_]

    constant: NDArray[np.bool_]
    """In darks it varies far less than noise does."""

    clear: NDArray[np.float64]
    """Median excess in deviations of the neighbourhood; 0 where there are too few."""

    rate: NDArray[np.float64]
    """Median excess per unit of exposure, ADU; 0 if unknown."""

    on_rate: NDArray[np.float64]
    """The same while it is on."""

    level: NDArray[np.float64]
    """Median value, ADU; 0 if unknown."""

    share_on: NDArray[np.float64]
    """Share of telling frames in which the excess was there; NaN without any."""


def _seen(tracks: Tracks, sample_kind: SampleKind, white_level_adu: float) -> _Seen:
    count = len(tracks)
    never, nothing = np.zeros(count, bool), np.zeros(count)
    every = _Seen(never, never, never, never, nothing, nothing, nothing, nothing, np.full(count, np.nan))
    # The others are told by counts and sums alone; there may be many times as many of them.
    positions = tracks.observed()
    of_observed = _seen_at(tracks, positions, sample_kind, white_level_adu)
    for field in fields(_Seen):
        whole = getattr(every, field.name).copy()
        whole[positions] = getattr(of_observed, field.name)
        setattr(every, field.name, whole)
    return every


def _seen_at(tracks: Tracks, positions: NDArray[np.int64], sample_kind: SampleKind, white_level_adu: float) -> _Seen:
    recent, held = tracks.recent_of(positions)
    linear = sample_kind is SampleKind.RAW
    excess = np.where(held, recent["excess"], np.nan)
    exposure = _exposure(recent, linear)
    useful = held & (recent["value"] < 0.98 * white_level_adu)
    rate = _quantile(np.where(useful, excess / exposure, np.nan), 0.5)
    rate = np.where(np.isnan(rate), _quantile(excess / exposure, 0.5), rate)
    on_rate = _quantile(np.where(useful, excess / exposure, np.nan), 0.8)
    foreseen = on_rate[:, None] * exposure
    headroom = recent["value"] - recent["excess"] + foreseen < 0.95 * white_level_adu
    telling = held & (foreseen > TELLING * recent["spread"]) & headroom
    # A clear excess is there, even if it does not grow with exposure as foreseen.
    present = telling & (excess > np.minimum(0.2 * foreseen, TELLING * recent["spread"]))
    # Without exposure times an excess that comes and goes may just follow them; rendered samples follow them only
    # roughly, so there the longer half has to tell.
    true_exposure = np.where(held, exposure_of(recent), np.nan)
    comparable = np.isfinite(true_exposure)
    if not linear:
        comparable &= true_exposure >= _quantile(true_exposure, 0.5)[:, None]
    telling &= comparable
    present &= comparable
    n_telling = telling.sum(axis=1)
    share_on = np.where(n_telling > 0, present.sum(axis=1) / np.maximum(n_telling, 1), np.nan)

    clear = _quantile(np.abs(excess) / recent["spread"], 0.5)
    clear[held.sum(axis=1) < _ENOUGH] = 0.0
    return _Seen(
        in_darks=(held & (recent["dark"] != 0)).sum(axis=1) >= 3,
        grows=_grows(excess, exposure_of(recent), useful),
        comes_and_goes=(n_telling >= 8) & (n_telling - present.sum(axis=1) >= 3) & (share_on < 0.8),
        constant=_is_constant(recent, held, white_level_adu),
        clear=clear,
        rate=np.nan_to_num(rate),
        on_rate=np.nan_to_num(on_rate),
        level=np.nan_to_num(_quantile(np.where(held, recent["value"], np.nan), 0.5)),
        share_on=share_on,
    )


def _is_constant(recent: NDArray[Any], held: NDArray[np.bool_], white_level_adu: float) -> NDArray[np.bool_]:
    """Whether the values in darks vary by less than a fifth of the noise around them: no leak, as leaks have noise.

    A saturated sample does not vary either; but no leak saturates one in half a second. Where noise is lost in whole
    numbers, nothing can be told.
    """
    dark = held & (recent["dark"] != 0)
    values, exposures, spreads = (
        np.where(dark, each, np.nan) for each in (recent["value"], exposure_of(recent), recent["spread"])
    )
    spread = _quantile(spreads, 0.5)
    low, high = _quantile(values, 0.0), _quantile(values, 1.0)
    no_leak = (high < 0.98 * white_level_adu) | (_quantile(exposures, 0.0) <= _SATURATES_IN_S)
    told = (dark.sum(axis=1) >= _CONSTANT_IN) & (spread > 0.7) & no_leak
    return np.asarray(told & (high - low < 0.2 * spread))


def exposure_of(recent: NDArray[Any]) -> NDArray[np.float64]:
    """Return exposure x ISO / 100 of observations, s; NaN where the exposure is unknown."""
    return np.asarray(recent["exposure"] * recent["gain"], dtype=np.float64)


def _exposure(recent: NDArray[Any], linear: bool) -> NDArray[np.float64]:
    # Rendered samples are not proportional to exposure, and files may not say: then the excess itself is foreseen.
    exposure = exposure_of(recent)
    if not linear:
        return np.ones_like(exposure)
    return np.where(np.isnan(exposure) | (exposure <= 0), 1.0, exposure)


def _grows(excess: NDArray[np.float64], exposure: NDArray[np.float64], useful: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Whether the excess grows with exposure: ranks correlate by more than three standard errors."""
    known = useful & np.isfinite(exposure)
    n = known.sum(axis=1)
    x, y = np.where(known, exposure, np.nan), np.where(known, excess, np.nan)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        spread = np.nanmax(x, axis=1, initial=0) / np.nanmin(x, axis=1, initial=np.inf)
    rank_x, rank_y = _ranks(x), _ranks(y)
    dx = np.where(known, rank_x - (n[:, None] - 1) / 2, 0.0)
    dy = np.where(known, rank_y - (n[:, None] - 1) / 2, 0.0)
    scale = np.sqrt((dx**2).sum(axis=1) * (dy**2).sum(axis=1))
    correlation = (dx * dy).sum(axis=1) / np.maximum(scale, 1e-9)
    return np.asarray((n >= 6) & (spread >= 1.5) & (correlation * np.sqrt(np.maximum(n - 1, 0)) > 3.0))


def _ranks(values: NDArray[np.float64]) -> NDArray[np.float64]:
    # NaN sorts last, so the known ones have ranks 0..n-1.
    return np.argsort(np.argsort(values, axis=1, kind="stable"), axis=1, kind="stable").astype(np.float64)


def _quantile(values: NDArray[np.float64], q: float) -> NDArray[np.float64]:
    """Quantile along rows, NaN left out; NaN for a row without numbers. (np.nanquantile loops over rows.)"""
    if not values.size:
        return np.full(len(values), np.nan)
    ordered = np.sort(values, axis=1)
    n = np.isfinite(ordered).sum(axis=1)
    at = q * np.maximum(n - 1, 0)
    low = np.floor(at).astype(int)
    high = np.minimum(low + 1, np.maximum(n - 1, 0))
    index = np.arange(len(values))
    picked = ordered[index, low] + (ordered[index, high] - ordered[index, low]) * (at - low)
    return np.asarray(np.where(n > 0, picked, np.nan))


def medians(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the median of each row, NaN left out."""
    return _quantile(values, 0.5)


def dark_current(
    tracks: Tracks, sample_kind: SampleKind, white_level_adu: float
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Fit the dark current of every track.

    Excess = dark current x exposure x ISO / 100, by the median of the ratios in the longer half of the exposures,
    unsaturated ones only: one frame with an edge beside the site must not move it.

    Returns
    -------
    rate : (K,) ADU/s at `iso`; NaN where exposures are unknown, or samples rendered
    iso : (K,) median ISO of the observations
    """
    recent, held = tracks.recent_of(np.arange(len(tracks)))
    exposure = exposure_of(recent)
    useful = held & np.isfinite(exposure) & (exposure > 0) & (recent["value"] < 0.98 * white_level_adu)
    if sample_kind is SampleKind.RENDERED:
        useful[:] = False
    x = np.where(useful, exposure, np.nan)
    longer = useful & (x >= _quantile(x, 0.5)[:, None])
    ratio = np.where(longer, recent["excess"] / np.where(longer, exposure, 1.0), np.nan)
    iso = _quantile(np.where(held, recent["gain"], np.nan), 0.5) * BASE_ISO
    return _quantile(ratio, 0.5) * iso / BASE_ISO, iso


def recovery_steps(
    rows: NDArray[Any], seen: NDArray[Any], linear: bool, white_level_adu: float
) -> tuple[NDArray[np.bool_], NDArray[np.float64]]:
    """Tell for each defect whether one more frame speaks for or against its recovery.

    Parameters
    ----------
    rows : (K,) tracks, classified
    seen : (K,) their observations in this frame

    Returns
    -------
    defective : the frame shows the defect
    step : ln of how much likelier the frame is if the site is healthy; 0 where it does not tell
    """
    median = seen["value"] - seen["excess"]
    foreseen = rows["rate"] * _exposure(seen, linear)
    fixed = np.isin(rows["kind"], (Kind.STUCK, Kind.DEAD))
    foreseen = np.where(fixed, rows["level"] - median, foreseen)
    clear = np.abs(foreseen) > TELLING * seen["spread"]
    # A dead sample has light to miss only where its neighbours are lit.
    unlit = (rows["kind"] == Kind.DEAD) & (foreseen > 0)
    telling = clear & ~unlit & (fixed | (median + foreseen < 0.95 * white_level_adu))
    share = seen["excess"] / np.where(telling, foreseen, 1.0)
    # An offset is a small part of what long exposures let foresee, yet not gone.
    healthy = telling & (share < 0.2) & (np.abs(seen["excess"]) < TELLING * seen["spread"])
    share_on = np.nan_to_num(rows["share_on"], nan=0.95)
    # Bounded: the off-times of an unstable sample come in runs, and one frame must not weigh too much.
    step = np.where(healthy, np.minimum(-np.log(np.clip(1 - share_on, 1e-3, 0.99)), 1.0), 0.0)
    return telling & (share > 0.5), step
