"""What a report is made of: turns one sensor and its rows in the ledger into plain values of bounded size.

The daemon answers with these over its socket; `report` turns them into a page. Tables of numbers are packed: base64 of
little-endian arrays, so that 5,000 defects take 3 MB and not 30.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hotpixd.archive import Kept
from hotpixd.core.defects import BASE_ISO
from hotpixd.store.ledger import Timeline
from hotpixd.store.state import State
from hotpixd.views.history import when

Answer = dict[str, Any]

MOST_DEFECTS = 5_000
"""Defects and candidates of a sensor in a report: the stable ones first, then those surest."""

REACH = 6
"""Pixels shown around a defect on each side: 13 x 13."""

_MOST_CELLS, _FEWEST_FRAMES, _MOST_FRAMES = 250_000, 48, 400
"""Single observations, sites times frames, and limits of the frames: all of the frames kept where there is room."""

_FIT_LEAST = 8
"""Frames that a fit against temperature is made of."""

_ALIKE = 3
"""Values that are all the highest there is: full scale, not chance."""

_NAMED_FRAMES = 200
"""Latest frames not counted that are named one by one."""

FULL_SCALE_SIGMA, _LINEAR_SIGMA = 200.0, 1.5
"""Excess that the pictures show brightest, and up to which they are about linear; asinh in between."""


def of_sensor(state: State, kept: Kept, entries: Sequence[Answer]) -> Answer:
    """Return what a report shows of one sensor, besides its history.

    Parameters
    ----------
    entries : its defects as in `answers.defects`, candidates too
    """
    order = {"stable": 0, "recovered": 1, "candidate": 2}
    surest = sorted(entries, key=lambda e: (order[e["state"]], -e["certainty"], -abs(e["excess_sigma"] or 0)))
    layout = kept.sensor.layout
    placed = []
    for entry in surest[:MOST_DEFECTS]:
        channel = layout.colours.index(entry["colour"]) if layout.channels > 1 else 0
        placed.append((entry["y"] * layout.shape[1] + entry["x"] * layout.channels + channel, entry))
    placed.sort(key=lambda pair: pair[0])
    sites = np.array([site for site, _ in placed], np.int64)
    defects = [entry for _, entry in placed]
    frames = state.ledger.timeline(kept.id)
    sensor = kept.sensor
    return {
        "alpha": sensor.settings.alpha,
        "threshold": sensor.threshold,
        "left_out": len(entries) - len(placed),
        "defects": {
            **{key: [entry[key] for entry in defects] for key in (defects[0] if defects else {})},
            "evidence": _evidence(state, kept, sites, frames),
        },
        "crops": _packed(_scaled(sensor.patches(sites, REACH))),
        **_observed(state, kept.id, sites, frames),
        **_uncounted(state, kept.id, frames),
    }


def _scaled(sigma: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Turn excesses in sigma into 1..255, 128 being none; 0 is outside of the sensor."""
    scaled = np.arcsinh(sigma / _LINEAR_SIGMA) / np.arcsinh(FULL_SCALE_SIGMA / _LINEAR_SIGMA)
    levels = 128 + np.rint(127 * np.clip(scaled, -1, 1))
    return np.where(np.isnan(sigma), 0, levels).astype(np.uint8)


def _evidence(state: State, kept: Kept, sites: NDArray[np.int64], frames: Timeline) -> list[list[list[float]]]:
    """Return for each site (counted frames, ln e) as far as they were written down: candidate, stable."""
    counted = frames.seqs[frames.counted]
    at = {int(site): k for k, site in enumerate(sites)}
    points: list[list[list[float]]] = [[] for _ in at]
    for row in state.ledger.transitions(kept.id):
        k = at.get(row.site)
        log_e = row.detail.get("log_e")
        if k is None or log_e is None:
            continue
        if row.change == "appeared":
            # What came of an earlier suspicion is dropped.
            points[k] = []
        if row.change in ("appeared", "stable") and len(points[k]) < 2:
            points[k].append([int(np.searchsorted(counted, row.seq)) + 1, round(float(log_e), 2)])
    return points


def _observed(state: State, id_: str, sites: NDArray[np.int64], frames: Timeline) -> Answer:
    """Return the excess of each site in some of the frames, with how these were taken."""
    seqs = np.intersect1d(state.ledger.frames_observed(id_), frames.seqs)
    most = min(max(_FEWEST_FRAMES, _MOST_CELLS // max(len(sites), 1)), _MOST_FRAMES)
    if len(seqs) > most:
        seqs = seqs[np.unique(np.linspace(0, len(seqs) - 1, most).astype(int))]
    excess, value, _ = state.ledger.excesses(id_, seqs, sites)
    known = np.isfinite(excess)
    scale = np.max(np.abs(excess), axis=1, initial=1e-3, where=known) / 32_000
    packed = np.where(known, np.rint(np.where(known, excess, 0) / scale[:, None]), -32_768).astype("<i2")
    at = np.searchsorted(frames.seqs, seqs)
    return {
        "frames_shown": {
            "at": frames.times_s[at].tolist(),
            "exposure_s": _known(frames.exposure_s[at]),
            "iso": _known(frames.iso[at]),
            "sensor_temp_c": _known(frames.sensor_temp_c[at]),
            "dark": frames.dark[at].tolist(),
        },
        "excess": _packed(packed),
        "excess_scale": _packed(scale.astype("<f4")),
        "fits": _fits(np.where(_saturated(value), np.nan, excess), frames, at),
    }


def _saturated(value: NDArray[np.float32]) -> NDArray[np.bool_]:
    """Tell which values are at full scale: files need not name it, but then many share the highest."""
    top = np.max(value, initial=0.0, where=np.isfinite(value))
    return np.asarray((value >= 0.98 * top) & ((value == top).sum() >= _ALIKE))


def _fits(excess: NDArray[np.float32], frames: Timeline, at: NDArray[np.int64]) -> list[list[float] | None]:
    """Fit the dark current of each site against temperature: ln(excess / exposure) = a + b T, unweighted.

    Returns
    -------
    [ADU/s at ISO 100 and the mean temperature, that temperature, C per doubling, its standard error] or None, where
    temperatures are unknown or alike, or the slope is not clear.
    """
    gain = frames.iso[at] / BASE_ISO
    exposure = frames.exposure_s[at] * np.where(np.isfinite(gain) & (gain > 0), gain, 1.0)
    temp, dark = frames.sensor_temp_c[at], frames.dark[at]
    fits: list[list[float] | None] = []
    usable = np.isfinite(temp) & (exposure > 0)
    for row in excess:
        good = usable & (row > 0)
        if (good & dark).sum() >= _FIT_LEAST:
            # Light hides dark current.
            good &= dark
        n = int(good.sum())
        x = temp[good]
        if n < _FIT_LEAST or np.ptp(x) < 3.0:
            fits.append(None)
            continue
        y = np.log(row[good] / exposure[good])
        mean = x.mean()
        # The middle half of the residuals decides what belongs to it: saturated frames and edges do not.
        keep = np.ones(n, bool)
        slope = level = error = 0.0
        for _ in range(3):
            dx = x[keep] - x[keep].mean()
            sxx = float((dx**2).sum())
            if keep.sum() < _FIT_LEAST or sxx < 1.0:
                break
            slope = float((dx * y[keep]).sum() / sxx)
            level = float(y[keep].mean() + slope * (mean - x[keep].mean()))
            residual = y - level - slope * (x - mean)
            spread = float(np.std(residual[keep], ddof=2))
            error = spread / sxx**0.5
            keep = np.abs(residual) <= max(4 * 1.4826 * float(np.median(np.abs(residual))), 1e-3)
        if slope <= 3 * error or slope <= 0:
            fits.append(None)
            continue
        doubling = float(np.log(2) / slope)
        fits.append([round(v, 4) for v in (float(np.exp(level)), float(mean), doubling, doubling * error / slope)])
    return fits


def _uncounted(state: State, id_: str, frames: Timeline) -> Answer:
    """Return why frames were not counted as evidence: by reason, and the latest by name."""
    reasons: dict[str, Answer] = {}
    latest = []
    times = dict(zip(frames.seqs.tolist(), frames.times_s.tolist(), strict=True))
    for seq, name, reason in state.ledger.frames_not_counted(id_):
        known = reasons.setdefault(
            reason.split(":")[0], {"count": 0, "first": when(times[seq]), "last": when(times[seq])}
        )
        known["count"] += 1
        known["first"] = min(known["first"], when(times[seq]))
        known["last"] = max(known["last"], when(times[seq]))
        latest.append({"name": name, "at": when(times[seq]), "reason": reason})
    return {
        "not_counted": [{"reason": reason, **known} for reason, known in reasons.items()],
        "not_counted_frames": latest[-_NAMED_FRAMES:],
    }


def _known(values: NDArray[np.float64]) -> list[float | None]:
    return [None if value != value else value for value in values.tolist()]


def _packed(array: NDArray[Any]) -> str:
    return base64.b64encode(np.ascontiguousarray(array).tobytes()).decode("ascii")


def unpacked(text: str, dtype: str) -> NDArray[Any]:
    """Return an array that was packed here, flat."""
    return np.frombuffer(base64.b64decode(text), dtype)
