"""One statistic from parts: sums that others make, and the frames' events, which are followed here in their order.

What depends on the order of frames (which ones count, which sites become defects) needs of a frame its events, a few
numbers, and the samples at the sites under suspicion. So other machines decode frames and add them up; here the very
same code follows them with an accumulator whose sums are right at those sites, and at all the others once the parts are
merged into it. Sums are integers: the result is that of one pass, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from hotpixd.core.accumulator import Accumulator
from hotpixd.core.frame import Samples, SensorLayout
from hotpixd.core.tracks import neighbours_of
from hotpixd.core.window import WINDOW


@dataclass(frozen=True, slots=True)
class Sums:
    """Exact sums of some frames of one sensor, made anywhere."""

    parts: tuple[int, ...]
    """Numbers of the chunks of frames in it, sorted: none may be in a statistic twice."""

    keys: tuple[str, ...]
    """Keys of the shots in it, sorted."""

    total: NDArray[Any]
    """(height, width * channels), ADU."""

    squares: NDArray[Any]
    """Of the same shape, ADU^2."""

    def __sizeof__(self) -> int:
        """Return its size in memory, by which it is decided what is moved where."""
        return int(self.total.nbytes + self.squares.nbytes)

    def merged(self, other: Sums) -> Sums:
        """Return the sums over the frames of both.

        Raises
        ------
        ValueError
            If a chunk is in both.
        """
        twice = set(self.parts) & set(other.parts)
        if twice:
            raise ValueError(f"the sums of chunk {min(twice)} cannot be added twice")
        frames, largest = len(self.keys) + len(other.keys), 2**16 - 1
        width = np.uint32 if frames * largest < 2**32 else np.uint64
        return Sums(
            tuple(sorted(self.parts + other.parts)),
            tuple(sorted(self.keys + other.keys)),
            np.add(self.total, other.total, dtype=max(np.dtype(width), self.total.dtype, other.total.dtype)),
            np.add(self.squares, other.squares, dtype=_room_for(self, other)),
        )


def _room_for(a: Sums, b: Sums) -> np.dtype[Any]:
    # 8-bit squares fit uint32 for 66,051 frames; those of 16 bit have uint64 from the start.
    frames = len(a.keys) + len(b.keys)
    narrow = a.squares.dtype == b.squares.dtype == np.uint32 and frames * 255**2 < 2**32
    return np.dtype(np.uint32 if narrow else np.uint64)


@dataclass(frozen=True, slots=True)
class Glimpse:
    """What it takes to look at some sites amid a chunk."""

    values: NDArray[Any]
    """(frames of the chunk, K) the samples at the sites."""

    total: NDArray[np.uint64]
    """(K,) sum over the frames before the chunk that are not merged yet."""

    squares: NDArray[np.uint64]
    """(K,) the same of the squares."""


Look = Callable[[NDArray[np.int64]], Glimpse]
"""Fetches the samples at some sites from wherever the frames are."""


class Followed(Accumulator):
    """An accumulator whose frames are elsewhere: right at the sites looked at, and everywhere once settled.

    Between `begin` and `settle`, `mean` and `mean_and_variance` fetch what they lack.
    """

    @classmethod
    def of(cls, whole: Accumulator) -> Self:
        """Return one that goes on where another one is, with its arrays."""
        followed = cls(whole.layout, whole.dtype.name, each_slab=whole._each_slab, slabs=len(whole._slabs))
        followed.restore(whole.arrays(), whole.frames, whole.counted)
        return followed

    def __init__(self, layout: SensorLayout, dtype: str, **spread: Any) -> None:
        super().__init__(layout, dtype, **spread)
        self.samples: Samples = np.zeros(layout.shape, self.dtype)
        """The current frame, at the sites held."""
        self._held = np.zeros(layout.size, bool)
        self._required: set[int] = set()
        self._sites = np.empty(0, np.int64)
        self._values = np.empty((0, 0), self.dtype)
        self._added_total = np.empty(0, np.uint64)
        self._added_squares = np.empty(0, np.uint64)
        self._at = -1
        self._ahead = 0
        """Frames advanced over whose sums are not settled."""
        self._look: Look | None = None

    def begin(self, frames: int, look: Look, suspects: NDArray[np.int64]) -> None:
        """Begin a chunk.

        Parameters
        ----------
        frames : in it
        look : fetches its samples at sites
        suspects : sites that every frame is looked at
        """
        self._look, self._at = look, -1
        self._make_room_for_sums(self.frames + frames)
        self._values = look(self._sites).values
        self.require(suspects)

    def advance(self) -> None:
        """Go to the chunk's next frame, in place: it is in the sums then."""
        self._at += 1
        self.frames += 1
        self._ahead += 1
        values = self._values[self._at]
        self._add(self._sites, values.astype(np.uint64), values.astype(np.uint64) ** 2)
        self._added_total += values
        self._added_squares += values.astype(np.uint64) ** 2
        self.samples.ravel()[self._sites] = values

    def settle(self, sums: Sums) -> None:
        """Replace what was added at the sites held by the sums of all frames since the last time, in place.

        Raises
        ------
        ValueError
            If these are not the sums of those frames.
        """
        there = sums.total.ravel()[self._sites], sums.squares.ravel()[self._sites]
        same = np.array_equal(there[0], self._added_total) and np.array_equal(there[1], self._added_squares)
        if len(sums.keys) != self._ahead or not same:
            raise ValueError("the sums are of other frames than those that were followed")
        for array, added in ((self.total, self._added_total), (self.squares, self._added_squares)):
            array.ravel()[self._sites] -= added.astype(array.dtype)
        np.add(self.total, sums.total, out=self.total, casting="unsafe")
        np.add(self.squares, sums.squares, out=self.squares, casting="unsafe")
        self._held[self._sites] = False
        self._required.clear()
        self._sites = np.empty(0, np.int64)
        self._added_total, self._added_squares = np.empty(0, np.uint64), np.empty(0, np.uint64)
        self._values = np.empty((0, 0), self.dtype)
        self._look, self._ahead = None, 0

    def require(self, sites: NDArray[np.int64]) -> None:
        """Fetch sites and all that may be read around them: in the windows that they are in, and beside a star."""
        new = np.array([site for site in sites.tolist() if site not in self._required], np.int64)
        if self._look is not None and new.size:
            self._required.update(new.tolist())
            self._hold(surroundings_of(new, self.layout))

    def mean(self, sites: NDArray[np.int64]) -> NDArray[np.float64]:
        """Return the mean sample at sites, as `Accumulator.mean` does."""
        self._hold(sites)
        return super().mean(sites)

    def mean_and_variance(self, sites: NDArray[np.int64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return both at sites, as `Accumulator.mean_and_variance` does."""
        # Its shape may be that of sites and their neighbours.
        self._hold(sites.ravel())
        return super().mean_and_variance(sites)

    def _hold(self, sites: NDArray[np.int64]) -> None:
        if self._look is None:
            return
        missing = np.unique(sites[~self._held[sites]])
        if not missing.size:
            return
        glimpse = self._look(missing)
        past = glimpse.values[: self._at + 1].astype(np.uint64)
        total, squares = glimpse.total + past.sum(axis=0), glimpse.squares + (past**2).sum(axis=0)
        self._add(missing, total, squares)
        if self._at >= 0:
            self.samples.ravel()[missing] = glimpse.values[self._at]
        self._held[missing] = True
        self._sites = np.concatenate([self._sites, missing])
        self._values = np.concatenate([self._values, glimpse.values], axis=1)
        self._added_total = np.concatenate([self._added_total, total])
        self._added_squares = np.concatenate([self._added_squares, squares])

    def _add(self, sites: NDArray[np.int64], total: NDArray[np.uint64], squares: NDArray[np.uint64]) -> None:
        self.total.ravel()[sites] += total.astype(self.total.dtype)
        self.squares.ravel()[sites] += squares.astype(self.squares.dtype)


def surroundings_of(sites: NDArray[np.int64], layout: SensorLayout) -> NDArray[np.int64]:
    """Return the sites whose samples may be read for these: sorted, each once.

    Those in the windows of all samples in whose windows they are, the adjacent ones, and the neighbours of both.
    """
    cols = layout.shape[1]
    reach = np.arange(1 - WINDOW, WINDOW)
    row, col = np.divmod(sites, cols)
    # In a rendered picture of all channels.
    channels = np.arange(1 - layout.channels, layout.channels)
    right = np.unique(reach[:, None] * layout.col_step + channels)
    windows = _within(row, col, reach * layout.row_step, right, layout)
    beside = _within(row, col, np.arange(-1, 2), np.arange(-1, 2), layout)
    return np.unique(np.concatenate([windows, beside, neighbours_of(beside, layout).ravel()]))


def _within(
    row: NDArray[np.int64], col: NDArray[np.int64], down: NDArray[Any], right: NDArray[Any], layout: SensorLayout
) -> NDArray[np.int64]:
    """Return the sites at these offsets that are on the sensor."""
    y = (row[:, None, None] + down[None, :, None]) + 0 * right[None, None, :]
    x = (col[:, None, None] + right[None, None, :]) + 0 * down[None, :, None]
    there = (y >= 0) & (x >= 0) & (y < layout.shape[0]) & (x < layout.shape[1])
    return np.unique(y[there] * layout.shape[1] + x[there])
