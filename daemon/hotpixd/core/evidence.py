"""From event counts to a stated certainty.

A healthy sample is exchangeable with the 48 neighbours of its window, whatever
the exposure, ISO, temperature or scene: it is their strict maximum with
probability at most 1/49. The more often it is an extreme, the less likely it
is healthy; the e-value says by how much, and may be looked at after every
frame.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hotpixd import core
from hotpixd.core.accumulator import FrameEvents
from hotpixd.core.frame import SensorLayout
from hotpixd.core.window import PHASE_COLS, PHASE_ROWS, WINDOW

NEIGHBOURHOOD = WINDOW**2
"""A sample and its neighbours: 49."""

PRIOR = (2, 2, 1)
"""Dirichlet prior of a defect's rates: outstanding, extreme but not outstanding, neither.

Measured on four simulated sensors of 60 hot samples (mean found at 5, 10, 20, 50 raw frames): averaged witnesses
with Beta(8, 1) 38, 45, 55, 59; Dirichlet (4, 4, 1) 40, 49, 55, 59; (2, 2, 1) 40, 50, 56, 60; (1, 1, 1) 40, 51, 56, 60
but one false. None false with the others.
"""

WITNESSES = 3
"""High, low, and either: a stuck sample is now this, now that."""

EXTREME_FLOORS = np.array([1.0, 1.0, 2.0]) / NEIGHBOURHOOD
"""Null rate of an extreme per witness, by exchangeability; a measured one counts only where it is larger."""

OUTSTANDING_FLOOR = 1e-6
"""Least null rate of outstanding assumed: fewer were not seen in what a frame can show."""


_Rates = tuple[float, float] | tuple[NDArray[np.float64], NDArray[np.float64]]
"""Null rates (outstanding, extreme), of one witness or of several."""


class _LogFactorials:
    """ln(n!) for n = 0, 1, ...; grows as needed."""

    def __init__(self) -> None:
        self._table = np.zeros(1)

    def upto(self, n: int) -> NDArray[np.float64]:
        if n >= self._table.size:
            larger = np.arange(1, 2 * n + 64)
            self._table = np.concatenate([[0.0], np.cumsum(np.log(larger))])
        return self._table


_LOG_FACTORIALS = _LogFactorials()


def log_e(n: int, outstanding: NDArray[np.int64], extreme: NDArray[np.int64], rates: _Rates) -> NDArray[np.float64]:
    """Return ln of the mixture e-value of a witness.

    In each frame a sample is outstanding, merely extreme, or neither. Under the null the first two happen with at
    most the null rates p2 and p1, under the alternative with rates q that have a Dirichlet prior a:
    ln B(a + k) - ln B(a) - max over q2 <= p2, q1 <= p1 of (k2 ln q2 + k1 ln q1 + k0 ln(1 - q1 - q2)).
    Dividing by the largest null likelihood keeps a sample with fewer events than the null rate from being evidence.

    Parameters
    ----------
    n : frames counted
    outstanding : frames in which the sample was outstanding, k2
    extreme : frames in which it was extreme, outstanding or not: k1 + k2, at most n
    rates : null rates (outstanding p2, extreme p1), of one witness or of several that all is broadcast to

    References
    ----------
    Ville (1939); Ramdas, Gruenwald, Vovk, Shafer (2023), Statistical Science 38(4), 576-601.
    """
    f = _LOG_FACTORIALS.upto(n + sum(PRIOR))
    a2, a1, a0 = PRIOR
    k2, k1, k0 = outstanding, extreme - outstanding, n - extreme
    log_beta = f[a2 + k2 - 1] + f[a1 + k1 - 1] + f[a0 + k0 - 1] - f[sum(PRIOR) + n - 1]
    prior = f[a2 - 1] + f[a1 - 1] + f[a0 - 1] - f[sum(PRIOR) - 1]
    return np.asarray(log_beta - prior - _largest_null_log_likelihood(k2, k1, k0, rates))


def _largest_null_log_likelihood(
    k2: NDArray[np.int64], k1: NDArray[np.int64], k0: NDArray[np.int64], rates: _Rates
) -> NDArray[np.float64]:
    p2, p1 = rates
    q2 = np.minimum(p2, k2 / np.maximum(k2 + k1 + k0, 1))
    q1 = np.minimum(p1, (1 - q2) * k1 / np.maximum(k1 + k0, 1))
    # Concave: coordinates in turn find the maximum; after two rounds they move by less than q2 q1.
    q2 = np.minimum(p2, (1 - q1) * k2 / np.maximum(k2 + k0, 1))
    q1 = np.minimum(p1, (1 - q2) * k1 / np.maximum(k1 + k0, 1))
    terms = ((k2, q2), (k1, q1), (k0, 1 - q1 - q2))
    return np.asarray(sum(k * np.log(np.where(k > 0, q, 1.0)) for k, q in terms))


def combined_log_e(n: int, counts: NDArray[np.int64], rates: NullRates) -> NDArray[np.float64]:
    """Return ln of the mean of the witnesses' e-values, which is an e-value again.

    Parameters
    ----------
    n : frames counted
    counts : (4, K) in the order of `accumulator.COUNTS`
    """
    if n == 0:
        return np.zeros(counts.shape[1])
    high, low, high_out, low_out = counts
    outstanding, extreme = np.stack((high_out, low_out, high_out + low_out)), np.stack((high, low, high + low))
    each = log_e(n, outstanding, extreme, rates.columns())
    return np.asarray(np.logaddexp.reduce(each, axis=0) - math.log(WITNESSES))


def count_limits(n: int, rates: NullRates, level: float) -> NDArray[np.int64]:
    """Return how many extremes a sample with k outstanding ones needs for ln e of a witness to reach `level`.

    A mean of e-values reaches a level only if one of them does, so a sample below all limits is below the level.

    Returns
    -------
    (3, K) int64
        For witness i and k = 0..K-1; n + 1 where it cannot be reached. More outstanding ones than K - 1 need no
        extremes beyond themselves.
    """
    p2, p1 = rates.columns()
    k2 = np.arange(n + 1)
    short = log_e(n, k2, k2, (p2, p1)) < level
    # From here on outstanding events alone suffice.
    last = np.where(short.any(axis=1), n + 1 - np.argmax(short[:, ::-1], axis=1), 0)
    k2 = k2[: max(last.max(), 1)]
    # Above n p1 ln e grows with k1; up to there it may rise and fall, so all are tried.
    usual = min(math.ceil(n * rates.extreme.max()), n)
    tried = k2[:, None] + np.arange(usual + 1)
    reached = (log_e(n, k2[:, None], np.minimum(tried, n), (p2[:, None], p1[:, None])) >= level) & (tried <= n)
    first = k2 + np.argmax(reached, axis=2)
    high = np.where(reached.any(axis=2), first, n + 1)
    low = np.where(reached.any(axis=2), first, np.minimum(k2 + usual, n + 1))
    while (low < high).any():
        middle = (low + high) // 2
        enough = log_e(n, k2, np.minimum(middle, n), (p2, p1)) >= level
        enough |= middle > n
        high = np.where(enough, middle, high)
        low = np.where(enough, low, np.minimum(middle + 1, high))
    high[k2 >= last[:, None]] = 0
    # Falling, as the kernel wants it: where a rare crowd of events makes it rise, some are named that need not be.
    return np.minimum.accumulate(np.pad(high, ((0, 0), (0, 1))), axis=1).astype(np.int64)


class NullRates:
    """How often a healthy sample has an event: the largest rate of any counted frame, never below the floor."""

    def __init__(self, extreme: NDArray[np.float64] | None = None, outstanding: NDArray[np.float64] | None = None):
        self.extreme: NDArray[np.float64] = EXTREME_FLOORS.copy() if extreme is None else extreme
        self.outstanding: NDArray[np.float64] = (
            np.full(WITNESSES, OUTSTANDING_FLOOR) if outstanding is None else outstanding
        )

    def include(self, frame: FrameEvents, layout: SensorLayout) -> None:
        """Take a counted frame into account."""
        high, low, high_out, low_out = frame.totals / layout.size
        self.outstanding = np.maximum(self.outstanding, [high_out, low_out, high_out + low_out])
        self.extreme = np.maximum(self.extreme, [high, low, high + low])

    def columns(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return the null rates (outstanding, extreme) of the witnesses, each (3, 1)."""
        return self.outstanding[:, None], self.extreme[:, None]


_COMPARED = 6_000_000
"""Samples enough to see whether a scene stands still; of larger sensors every second, third, ... band of rows is."""


@dataclass(frozen=True, slots=True)
class Pattern:
    """Where a light frame has extremes, as far as the gate looks."""

    bits: NDArray[np.uint64]
    """One bit per sample of the rows compared: was extreme."""

    rates: NDArray[np.float64]
    """(PHASE_ROWS, PHASE_COLS) share of extremes by position in the grid."""


class SceneGate:
    """Tells whether a light frame shows another scene than the light frames counted last.

    Of the samples that were extreme then, which part is extreme again? Divided by what independence predicts
    this is the *lift*. The prediction is made per position in a grid, since JPEG blocks and demosaicing make
    some positions likelier than others. Several frames are remembered, so that going back and forth between two
    scenes does not count either many times.
    """

    def __init__(self, layout: SensorLayout, depth: int) -> None:
        self._patterns: deque[Pattern] = deque(maxlen=depth)
        self._samples_per_phase = _samples_per_phase(layout)
        bands = np.arange(layout.height) // PHASE_ROWS
        self._rows = np.flatnonzero(bands % max(1, layout.size // _COMPARED) == 0)
        self._share = len(self._rows) / layout.height

    def pattern(self, frame: FrameEvents) -> Pattern:
        """Return what is compared of a light frame's extremes."""
        shape = len(self._rows), frame.words.shape[1]
        # A row has a multiple of 6 bytes, so the whole need not be a multiple of 8.
        words = np.zeros(-(-math.prod(shape) // 8), np.uint64)
        core.kernels.pack_pattern(frame.words, self._rows, words.view(np.uint8)[: math.prod(shape)].reshape(shape))
        return Pattern(words, frame.phases / self._samples_per_phase)

    def lift(self, new: Pattern) -> float | None:
        """Return the largest lift against the frames remembered; None if there are none."""
        return max((self._lift(new, old) for old in self._patterns), default=None)

    def remember(self, new: Pattern) -> None:
        """Keep the extremes of a frame that is counted; the oldest ones go."""
        self._patterns.append(new)

    def _lift(self, a: Pattern, b: Pattern) -> float:
        expected = float((a.rates * b.rates * self._samples_per_phase).sum()) * self._share
        # Fewer than a handful expected: a chance meeting must not look like a pattern.
        return int(core.kernels.overlap(a.bits, b.bits)) / max(expected, 25.0)

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Return the gate's memory, oldest first."""
        bits = [p.bits for p in self._patterns]
        rates = [p.rates for p in self._patterns]
        return {
            "gate_bits": np.array(bits, np.uint64),
            "gate_rates": np.array(rates, np.float64),
        }

    def restore(self, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Take over what `arrays` once returned."""
        self._patterns.clear()
        for bits, rates in zip(arrays["gate_bits"], arrays["gate_rates"], strict=True):
            self._patterns.append(Pattern(bits, rates))


def _samples_per_phase(layout: SensorLayout) -> NDArray[np.float64]:
    rows, cols = layout.shape
    per_row = np.bincount(np.arange(rows) % PHASE_ROWS, minlength=PHASE_ROWS)
    per_col = np.bincount(np.arange(cols) % PHASE_COLS, minlength=PHASE_COLS)
    return np.maximum(np.outer(per_row, per_col).astype(np.float64), 1.0)
