"""What is remembered of every site under suspicion: a row of numbers, and its last observations.

Plain arrays, so that thousands of sites cost a few vector operations per frame,
and so that the whole memory goes into a generation as it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import IntEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hotpixd.core.frame import SensorLayout

MOST = 65_536
"""Sites followed per sensor. A sensor with more has another problem."""

MOST_OBSERVED = 4_096
"""Sites of which single observations are kept."""

RECENT = 64
"""Observations kept per site, the latest ones."""

NEIGHBOUR_REACH = 2
"""Plane rows and columns on either side whose median a site is compared with: 24 neighbours."""


NEIGHBOURS = (2 * NEIGHBOUR_REACH + 1) ** 2 - 1
"""24."""


class Status(IntEnum):
    """Life cycle of a site under suspicion."""

    CANDIDATE = 0
    STABLE = 1
    RECOVERED = 2


class Kind(IntEnum):
    """What a defect does."""

    BRIGHT = 0
    HOT = 1
    WARM = 2
    STUCK = 3
    DEAD = 4
    DIM = 5
    UNSTABLE = 6


TRACK = np.dtype(
    [
        ("site", "i8"),  # flat index of the sample
        ("status", "u1"),
        ("kind", "u1"),
        ("slot", "i4"),  # row of `recent`; -1: not observed
        ("seen", "i4"),  # observations made so far
        ("first_seq", "i8"),
        ("stable_seq", "i8"),
        ("frames_to_stable", "i4"),
        ("log_e", "f8"),  # the largest reached
        ("base", "i4", 4),  # counts when the site recovered: evidence since then starts there
        ("base_counted", "i4"),
        ("recovery", "f8"),  # ln evidence that it is healthy again
        ("rate", "f4"),  # ADU of excess per unit of exposure (s x ISO / 100), else median excess
        ("level", "f4"),  # median value, ADU
        ("strength", "f4"),  # the largest excess seen, in units of noise
        ("share_on", "f4"),  # share of telling frames in which the excess was there
    ]
)

OBSERVATION = np.dtype(
    [
        ("excess", "f4"),  # ADU above the local median
        ("value", "f4"),  # ADU as stored
        ("spread", "f4"),  # robust standard deviation among the neighbours, ADU
        ("exposure", "f4"),  # s; NaN unknown
        ("gain", "f4"),  # ISO / 100; 1 if unknown
        ("events", "u1"),
        ("dark", "u1"),
    ]
)


class Tracks:
    """The sites under suspicion of one sensor."""

    def __init__(self, layout: SensorLayout) -> None:
        self._layout = layout
        self.rows: NDArray[Any] = np.empty(0, TRACK)
        self.recent: NDArray[Any] = np.zeros((0, RECENT), OBSERVATION)
        self.neighbours: NDArray[np.int64] = np.empty((0, NEIGHBOURS), np.int64)
        self.beside: NDArray[np.float64] = np.empty((0, 2))
        """Light frames that suspect a row's site, and the sum of the shares that its adjacent sites have of its excess.

        Of a rendered picture, where a defect lights these as well: frames that tell, and how many of them show a star.
        """
        self.around: NDArray[np.float64] = np.empty((0, 2))
        """Frames with an event at a row's site, and the sum of their agreements with the others around it."""

    def __len__(self) -> int:
        return len(self.rows)

    def copy(self) -> Tracks:
        """Return a copy whose rows can be changed without changing these. Observations are shared."""
        twin = Tracks(self._layout)
        twin.rows, twin.recent, twin.neighbours = self.rows.copy(), self.recent, self.neighbours
        twin.beside, twin.around = self.beside, self.around
        return twin

    def add(self, sites: NDArray[np.int64], log_e: NDArray[np.float64], seq: int) -> NDArray[np.int64]:
        """Follow new sites, as far as there is room; return the positions of their rows."""
        sites, log_e = sites[: MOST - len(self)], log_e[: MOST - len(self)]
        if not sites.size:
            return np.empty(0, np.int64)
        new = np.zeros(len(sites), TRACK)
        new["site"], new["log_e"], new["first_seq"] = sites, log_e, seq
        new["slot"] = -1
        taken = np.zeros(MOST_OBSERVED + 1, bool)
        taken[self.rows["slot"]] = True  # of those without a slot the last one, which none has
        free = np.flatnonzero(~taken[:-1])
        n = min(len(new), len(free))
        new["slot"][:n] = free[:n]
        if n and free[n - 1] >= len(self.recent):
            grown = np.zeros((min(MOST_OBSERVED, int(free[n - 1]) * 2 + 64), RECENT), OBSERVATION)
            grown[: len(self.recent)] = self.recent
            self.recent = grown
        first = len(self.rows)
        self.rows = np.concatenate([self.rows, new])
        self.neighbours = np.concatenate([self.neighbours, neighbours_of(sites, self._layout)])
        self.beside = np.concatenate([self.beside, np.zeros((len(new), 2))])
        self.around = np.concatenate([self.around, np.zeros((len(new), 2))])
        return np.arange(first, len(self.rows))

    def drop(self, positions: NDArray[np.int64]) -> None:
        """Forget rows."""
        if not positions.size:
            return
        keep = np.ones(len(self.rows), bool)
        keep[positions] = False
        self.rows, self.neighbours = self.rows[keep], self.neighbours[keep]
        self.beside, self.around = self.beside[keep], self.around[keep]

    def observed(self) -> NDArray[np.int64]:
        """Return the positions of the rows whose observations are kept."""
        return np.flatnonzero(self.rows["slot"] >= 0)

    def observe(self, positions: NDArray[np.int64], observations: NDArray[Any]) -> None:
        """Keep one more observation of each row; it replaces the oldest."""
        rows = self.rows
        self.recent[rows["slot"][positions], rows["seen"][positions] % RECENT] = observations
        rows["seen"][positions] += 1

    def recent_of(self, positions: NDArray[np.int64]) -> tuple[NDArray[Any], NDArray[np.bool_]]:
        """Return the observations kept, (K, RECENT), and which entries hold one."""
        slots, seen = self.rows["slot"][positions], self.rows["seen"][positions]
        held = np.arange(RECENT)[None, :] < np.where(slots >= 0, seen, 0)[:, None]
        if not len(self.recent):
            return np.zeros((len(positions), RECENT), OBSERVATION), held
        return self.recent[np.maximum(slots, 0)], held

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Return the memory as plain byte arrays."""
        used = int(self.rows["slot"].max()) + 1 if len(self.rows) else 0
        return {
            "tracks": np.frombuffer(self.rows.tobytes(), np.uint8),
            "recent": np.frombuffer(self.recent[:used].tobytes(), np.uint8),
            "beside": self.beside.copy(),
            "around": self.around.copy(),
        }

    def restore(self, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Take over what `arrays` once returned."""
        self.rows = np.frombuffer(arrays["tracks"].tobytes(), TRACK).copy()
        recent = np.frombuffer(arrays["recent"].tobytes(), OBSERVATION)
        self.recent = recent.reshape(-1, RECENT).copy()
        self.neighbours = neighbours_of(self.rows["site"], self._layout)
        # States of earlier versions have none, and their candidates had been looked at in other ways.
        self.beside = np.array(arrays.get("beside", np.zeros((len(self.rows), 2))))
        self.around = np.array(arrays.get("around", np.tile([2.0, 0.0], (len(self.rows), 1))))


def neighbours_of(sites: NDArray[np.int64], layout: SensorLayout) -> NDArray[np.int64]:
    """Return the flat indices of each site's 24 nearest neighbours of its plane: (K, 24).

    Windows are shifted inwards at the borders.
    """
    row, col = np.divmod(sites, layout.shape[1])
    rows = _shifted(row, layout.row_step, layout.shape[0])
    cols = _shifted(col, layout.col_step, layout.shape[1])
    window = (rows[:, :, None] * layout.shape[1] + cols[:, None, :]).reshape(len(sites), NEIGHBOURS + 1)
    return np.asarray(window[window != sites[:, None]].reshape(len(sites), NEIGHBOURS))


def _shifted(position: NDArray[np.int64], step: int, length: int) -> NDArray[np.int64]:
    phase = position % step
    count = (length - phase + step - 1) // step
    width = 2 * NEIGHBOUR_REACH + 1
    start = np.clip(position // step - NEIGHBOUR_REACH, 0, count - width)
    return np.asarray((start[:, None] + np.arange(width)) * step + phase[:, None])
