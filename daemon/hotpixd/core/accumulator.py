"""Exact running sums and event counts of one sensor.

State is the sufficient statistic and nothing else: per sample the sum, the sum
of squares and how often it was extreme or outstanding, high or low. All are
integers, so its size does not grow with the number of frames, a merge of two
parts equals one pass bit for bit, and a replay ends with the same digest.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import DTypeLike, NDArray

from hotpixd import core
from hotpixd.core.frame import Samples, SensorLayout
from hotpixd.core.window import PHASE_COLS, PHASE_ROWS, WINDOW

COUNTS = ("high", "low", "high_outstanding", "low_outstanding")
"""Names of the four event counts, in the order in which they are stored."""

_SUMS = ("total", "squares")

EachSlab = Callable[[Callable[[tuple[int, int]], Any], Sequence[tuple[int, int]]], Iterable[Any]]
"""A `map` over slabs of rows; a thread pool's uses several cores."""

Zeros = Callable[[tuple[int, ...], DTypeLike], NDArray[Any]]
"""Makes an array of zeros, as `numpy.zeros` does; another place for it than memory may be found."""

_MOST_REACHED = 1 << 17
"""Samples at a limit that one slab of one frame can report."""

_FRAMES_PER_PASS = 4
"""Frames added to the sums in one pass, as many as `kernels.add_rows` takes."""

HELD_BYTES = 320 << 20
"""Four frames of a 24-megapixel JPEG."""

_FEW = 100
"""Share of the sites up to which it is faster to look at frames not summed up than to sum them up."""

_BLOCK = 1 << 20
"""Samples per step where a whole-sensor computation needs temporary arrays."""


@dataclass(frozen=True, slots=True)
class FrameEvents:
    """The events of one frame."""

    events: NDArray[np.uint8]
    """(height, padded) event bits of each sample, see `kernels`; a buffer, overwritten when the next are found."""

    totals: NDArray[np.int64]
    """(4,) samples per event, in the order of COUNTS."""

    phases: NDArray[np.int64]
    """(PHASE_ROWS, PHASE_COLS) samples of the pattern by position in the grid."""

    @property
    def words(self) -> NDArray[np.uint64]:
        """(height, padded / 8) `events`, eight at a time."""
        return self.events.view(np.uint64)

    @property
    def fingerprint(self) -> str:
        """Digest of the numbers of events: another decoding of the shot will hardly have the same."""
        numbers = np.concatenate([self.totals, self.phases.ravel()]).astype("<i8")
        return hashlib.sha256(numbers.data).hexdigest()[:32]


def _width_for(limit: int, *widths: type[np.unsignedinteger[Any]]) -> np.dtype[Any]:
    """Return the first of `widths` that holds `limit`."""
    for width in widths:
        if limit <= np.iinfo(width).max:
            return np.dtype(width)
    raise OverflowError(f"{limit} does not fit in {np.dtype(widths[-1])}")


class Loan(Protocol):
    """Knows which arrays another thread still reads, by their names."""

    def is_out(self, name: str) -> bool:
        """Tell whether this one must not change yet."""

    def wait(self, name: str) -> None:
        """Wait until it may."""


class Accumulator:
    """Sums over every frame folded, counts over the frames counted as evidence.

    Parameters
    ----------
    layout : SensorLayout
    dtype : "uint8" or "uint16", of the samples
    each_slab : a `map`; a thread pool's spreads the rows over cores
    slabs : number of slabs
    held_bytes : of samples, which may wait to be added to the sums together
    zeros : makes the arrays of sums and counts
    """

    def __init__(
        self,
        layout: SensorLayout,
        dtype: str,
        *,
        each_slab: EachSlab = map,
        slabs: int = 1,
        held_bytes: int = HELD_BYTES,
        zeros: Zeros = np.zeros,
    ) -> None:
        if min(layout.height // layout.row_step, layout.shape[1] // layout.col_step) < WINDOW:
            raise ValueError(
                f"a plane needs at least {WINDOW} rows and columns; "
                f"{layout.width}x{layout.height} with colours {layout.colours!r} has fewer"
            )
        self.layout = layout
        self.dtype = np.dtype(dtype)
        self.frames = 0
        self.counted = 0
        self._largest = int(np.iinfo(self.dtype).max)
        rows, cols = layout.shape
        self.zeros = zeros
        self._total = zeros((rows, cols), np.uint32)
        self._squares = zeros((rows, cols), np.uint32 if dtype == "uint8" else np.uint64)
        self._unsummed: list[NDArray[Any]] = []
        self._most_unsummed = min(max(held_bytes // (layout.size * self.dtype.itemsize), 1), _FRAMES_PER_PASS)
        self.counts = {name: zeros((rows, cols), np.uint8) for name in COUNTS}
        self._buffers = [self._buffer_for_events()]
        self._loan: Loan | None = None
        self._each_slab = each_slab
        edges = np.linspace(0, rows, slabs + 1).astype(int)
        self._slabs = [(int(a), int(b)) for a, b in itertools.pairwise(edges) if b > a]

    def fold(self, samples: Samples, *, lone: bool) -> FrameEvents:
        """Add a frame to the sums, in place, and find its events: `find` and `add`."""
        events = self.find(samples, lone=lone)
        self.add(samples)
        return events

    def add(self, samples: Samples) -> None:
        """Add a frame to the sums, in place.

        Parameters
        ----------
        samples : as `find` takes them; kept for `sum_up`, and must not change any more
        """
        if len(self._unsummed) >= self._most_unsummed:
            self.sum_up()
        self._unsummed.append(np.ascontiguousarray(samples))
        self.frames += 1

    def find(self, samples: Samples, *, lone: bool, beside: bool = False) -> FrameEvents:
        """Find the events of a frame. They depend on it alone, so another thread may do it ahead of time.

        Parameters
        ----------
        samples : (height, width * channels), ADU, of the accumulator's dtype; not modified
        lone : drop extremes that touch an extreme of another plane. For light frames of a mosaic: stars and
            details light several colours at once, a defect lights one site.
        beside : leave the events that were found last as they are; those before may be overwritten

        Raises
        ------
        ValueError
            If shape or dtype differ from the accumulator's.
        """
        if samples.shape != self.layout.shape or samples.dtype != self.dtype:
            raise ValueError(
                f"a frame of shape {samples.shape} {samples.dtype} cannot be folded into "
                f"{self.layout.shape} {self.dtype}"
            )
        contiguous = np.ascontiguousarray(samples)
        if beside:
            if len(self._buffers) < 2:
                self._buffers.append(self._buffer_for_events())
            self._buffers.reverse()
        events = self._buffers[0]

        def find_in_slab(slab: tuple[int, int]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
            totals = np.zeros(len(COUNTS), np.int64)
            phases = np.zeros((PHASE_ROWS, PHASE_COLS), np.int64)
            steps = self.layout.row_step, self.layout.col_step
            core.kernels.find_events(contiguous, *steps, lone, events, totals, phases, *slab)
            return totals, phases

        parts = list(self._each_slab(find_in_slab, self._slabs))
        totals = np.sum([totals for totals, _ in parts], axis=0)
        phases = np.sum([phases for _, phases in parts], axis=0)
        return FrameEvents(events, totals, phases)

    def _buffer_for_events(self) -> NDArray[np.uint8]:
        rows, cols = self.layout.shape
        return np.zeros((rows, -(-cols // PHASE_COLS) * PHASE_COLS), np.uint8)

    def sum_up(self) -> None:
        """Add the frames folded last to the sums, and let go of their samples.

        Several go in one pass, as it takes longer to read and write the sums than to add to them. Until then what is
        asked of a few sites is answered with these frames looked at one by one.
        """
        if not self._unsummed:
            return
        self._own(*_SUMS)
        frames, self._unsummed = self._unsummed, []
        self._make_room_for_sums(self.frames)
        total, squares = self._total, self._squares
        # Only as many as there are are looked at.
        four = [*frames, *frames[:1] * (_FRAMES_PER_PASS - len(frames))]

        def sum_slab(slab: tuple[int, int]) -> None:
            core.kernels.add_rows(*four, len(frames), total, squares, *slab)

        list(self._each_slab(sum_slab, self._slabs))

    @property
    def total(self) -> NDArray[Any]:
        """(height, width * channels) unsigned: sum of the samples, ADU."""
        self.sum_up()
        return self._total

    @property
    def squares(self) -> NDArray[Any]:
        """(height, width * channels) unsigned: sum of their squares, ADU^2."""
        self.sum_up()
        return self._squares

    def count(self, frame: FrameEvents, limits: NDArray[np.int64]) -> NDArray[np.int64]:
        """Add the events of the frame folded last to the counts, in place.

        Parameters
        ----------
        frame : what `fold` returned for it
        limits : (3, K) extremes needed high, low and on either side, by outstanding events so far; see
            `evidence.count_limits`

        Returns
        -------
        (K,) int64, sorted
            Flat indices of samples at a limit. One that two outstanding events brought near it is named at its
            next outstanding event.
        """
        self._own(*COUNTS)
        self._make_room_for_counts(self.counted + 1)
        largest = int(np.iinfo(self.counts["high"].dtype).max)
        bounded = np.minimum(limits, largest).astype(np.int64)

        def count_slab(slab: tuple[int, int]) -> NDArray[np.int64]:
            reached = np.empty(_MOST_REACHED, np.int64)
            n = core.kernels.count_rows(frame.events, *self.counts.values(), bounded, reached, *slab)
            return reached[: min(n, _MOST_REACHED)]

        parts = list(self._each_slab(count_slab, self._slabs))
        self.counted += 1
        return np.sort(np.concatenate(parts))

    def unmask(self, samples: Samples, frame: FrameEvents, defects: NDArray[np.int64], *, lone: bool) -> None:
        """Add to the events of the frame folded last what known defects hide in the windows around them, in place.

        Parameters
        ----------
        samples, lone : as given to `fold`
        frame : what it returned
        defects : (K,) flat indices, sorted
        """
        steps = self.layout.row_step, self.layout.col_step
        core.kernels.unmask(np.ascontiguousarray(samples), *steps, lone, defects, frame.events, frame.totals)

    def forget_counts(self) -> None:
        """Start the counts anew; the sums stay."""
        for name in COUNTS:
            self.counts[name] = self.zeros(self.layout.shape, np.uint8)
        self.counted = 0

    def merge(self, other: Accumulator) -> None:
        """Add another accumulator of the same sensor, in place: the result is that of one pass over both.

        Raises
        ------
        ValueError
            If layout or dtype differ.
        """
        if other.layout != self.layout or other.dtype != self.dtype:
            raise ValueError("accumulators of different sensors cannot be merged")
        self.sum_up()
        self._own(*_SUMS, *COUNTS)
        self._make_room_for_sums(self.frames + other.frames)
        self._make_room_for_counts(self.counted + other.counted)
        self._total += other.total
        self._squares += other.squares
        for name, count in self.counts.items():
            count += other.counts[name]
        self.frames += other.frames
        self.counted += other.counted

    def require(self, sites: NDArray[np.int64]) -> None:
        """Be told that sites are looked at from now on, with what is around them. Here is all that it takes."""

    def pack(self, frame: FrameEvents) -> NDArray[np.uint8]:
        """Return the events of the frame folded last as planes of bits, for an accumulator on another machine."""
        planes = np.empty((len(COUNTS), *frame.words.shape), np.uint8)
        core.kernels.pack_events(frame.words, planes)
        return planes

    def unpack(self, planes: NDArray[np.uint8], totals: NDArray[np.int64], phases: NDArray[np.int64]) -> FrameEvents:
        """Return what `fold` returned there, from what `pack` made of it; to be counted before the next fold."""
        frame = FrameEvents(self._buffers[0], totals.copy(), phases)
        core.kernels.unpack_events(planes, frame.words)
        return frame

    def _make_room_for_sums(self, frames: int) -> None:
        self._total = self._widened(self._total, _width_for(frames * self._largest, np.uint32, np.uint64))
        self._squares = self._widened(self._squares, _width_for(frames * self._largest**2, np.uint32, np.uint64))

    def _make_room_for_counts(self, counted: int) -> None:
        # One more than the largest count must fit too: it is the limit that is never reached.
        width = _width_for(counted + 1, np.uint8, np.uint16, np.uint32)
        for name, count in self.counts.items():
            self.counts[name] = self._widened(count, width)

    def _widened(self, array: NDArray[Any], width: np.dtype[Any]) -> NDArray[Any]:
        if width <= array.dtype:
            return array
        wide = self.zeros(array.shape, width)
        wide[...] = array
        return wide

    def mean(self, sites: NDArray[np.int64]) -> NDArray[np.float64]:
        """Return the mean sample at flat indices `sites`, ADU; NaN before the first frame."""
        if not self.frames:
            return np.full(sites.shape, np.nan)
        return np.asarray(self._sums_at(sites)[0] / self.frames)

    def mean_and_variance(self, sites: NDArray[np.int64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return mean (ADU) and population variance (ADU^2) of the samples at flat indices `sites`."""
        n = max(self.frames, 1)
        total, squares = self._sums_at(sites)
        return total / n, _scaled_m2(self.frames, total, squares) / n / n

    def counts_at(self, sites: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the four counts at flat indices `sites`: (4, K) in the order of COUNTS."""
        return np.stack([count.ravel()[sites].astype(np.int64) for count in self.counts.values()])

    def least_variance(self, k: int) -> tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.float64]]:
        """Return the k samples of least variance over all frames, as Welford's algorithm would rank them.

        M2 = sum of squares - sum^2 / n is the same number, from exact integers. Ties go to the lower index.

        Returns
        -------
        sites : (k,) int64 flat indices
        m2 : (k,) sum of squared deviations from the mean, ADU^2
        mean : (k,) ADU

        References
        ----------
        Welford (1962), Technometrics 4(3), 419-420.
        """
        self.sum_up()
        best = np.empty(0, np.int64)
        keys = np.empty(0, np.uint64)
        for start in range(0, self.layout.size, _BLOCK):
            sites = np.arange(start, min(start + _BLOCK, self.layout.size))
            block = self._scaled_m2(slice(sites[0], sites[-1] + 1))
            if k < block.size:
                chosen = np.flatnonzero(block <= np.partition(block, k - 1)[k - 1])
                sites, block = sites[chosen], block[chosen]
            best, keys = np.concatenate([best, sites]), np.concatenate([keys, block])
            order = np.lexsort((best, keys))[:k]
            best, keys = best[order], keys[order]
        return best, self._m2(best), self.mean(best)

    def _scaled_m2(self, where: slice | NDArray[np.int64]) -> NDArray[np.uint64]:
        return _scaled_m2(self.frames, *self._sums_at(where))

    def _sums_at(self, where: slice | NDArray[np.int64]) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
        """Return sums of samples and of squares, those of frames not summed up yet included."""
        if not isinstance(where, slice) and where.size > self.layout.size // _FEW:
            self.sum_up()
        total = self._total.ravel()[where].astype(np.uint64)
        squares = self._squares.ravel()[where].astype(np.uint64)
        for samples in self._unsummed:
            values = samples.ravel()[where].astype(np.uint64)
            total += values
            squares += values * values
        return total, squares

    def _m2(self, sites: NDArray[np.int64]) -> NDArray[np.float64]:
        return np.asarray(self._scaled_m2(sites) / max(self.frames, 1))

    def digest(self, keys: Iterable[str] = ()) -> str:
        """Return SHA-256 over layout, sums, counts and the frames' keys; the width they are stored in is no part.

        Parameters
        ----------
        keys : names of the frames folded, in any order
        """
        h = hashlib.sha256()
        head = (self.layout.width, self.layout.height, self.layout.colours, self.layout.channels)
        h.update(repr((*head, str(self.dtype), self.frames, self.counted)).encode())
        for array in (self.total, self.squares, *self.counts.values()):
            flat = array.ravel()
            for start in range(0, flat.size, _BLOCK):
                h.update(flat[start : start + _BLOCK].astype("<u8").data)
        for key in sorted(keys):
            h.update(key.encode() + b"\n")
        return h.hexdigest()

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Return the state's arrays by name, not copied."""
        # Counts first: every frame needs them, and sums but every fourth.
        return {**self.counts, "total": self.total, "squares": self.squares}

    def lend(self, loan: Loan) -> dict[str, NDArray[Any]]:
        """Return `arrays` for another thread to read while folding goes on: what would change one waits."""
        arrays = self.arrays()
        self._loan = loan
        return arrays

    def end_loan(self) -> None:
        """Be told, by any thread, that all is back."""
        self._loan = None

    @property
    def must_wait(self) -> bool:
        """Whether another frame cannot be folded before arrays that are lent are back."""
        full = len(self._unsummed) >= self._most_unsummed
        return self._are_out((*COUNTS, *_SUMS) if full else COUNTS)

    @property
    def may_sum_up(self) -> bool:
        """Whether `sum_up` need not wait."""
        return not self._are_out(_SUMS)

    def _are_out(self, names: Sequence[str]) -> bool:
        loan = self._loan
        return loan is not None and any(map(loan.is_out, names))

    def _own(self, *names: str) -> None:
        """Wait until these arrays may change."""
        loan = self._loan
        if loan is not None:
            for name in names:
                loan.wait(name)

    def restore(self, arrays: Mapping[str, NDArray[Any]], frames: int, counted: int) -> None:
        """Take over arrays that `arrays` once returned.

        Raises
        ------
        ValueError
            If one is missing or has another shape.
        """
        for name in (*_SUMS, *COUNTS):
            if name not in arrays or arrays[name].shape != self.layout.shape:
                raise ValueError(f"saved array {name!r} is missing or not of shape {self.layout.shape}")
        self._unsummed = []
        self._total, self._squares = arrays["total"], arrays["squares"]
        self.counts = {name: arrays[name] for name in COUNTS}
        self.frames, self.counted = frames, counted

    def held(self) -> list[NDArray[Any]]:
        """Return the arrays that every frame goes through, other than the sums."""
        return [self._buffers[0], *self.counts.values()]

    @property
    def nbytes(self) -> int:
        """Bytes held in memory."""
        arrays = (self._total, self._squares, *self._unsummed, *self._buffers, *self.counts.values())
        return sum(array.nbytes for array in arrays)


def _scaled_m2(frames: int, total: NDArray[np.uint64], squares: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Return n M2 = n Q - S^2, exactly.

    The terms may wrap, the difference does not while n^2 2^30 < 2^64 for 16-bit samples, that is up to 131,072 frames.
    """
    return np.uint64(frames) * squares - total * total
