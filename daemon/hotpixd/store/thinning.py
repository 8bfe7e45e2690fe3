"""Which frames' observations are kept: turns the ranks of frames into a choice that grows with the logarithm of time.

Observations of every frame of years would fill any disk. All of the latest `LATEST` frames are kept, half of the
`LATEST` before them, a quarter of twice as many before those, and so on: `LATEST` / 2 in each octave of age. Which of
two frames stays is chosen by a digest of where they are, not always the first: exposures that are bracketed in twos
or fours would else leave only one of them.

The choice depends on a frame's rank and on that of the newest frame alone, and what is dropped once is never wanted
again. So it does not matter how often, or from where, frames are folded anew: the end is the same.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

LATEST = 128
"""Frames of which all observations are kept: twice what detection itself remembers."""

FIRST = 16
"""Of the first frames, too: what a sensor was like in the beginning."""


def is_kept(ranks: NDArray[np.int64], newest: int, latest: int = LATEST) -> NDArray[np.bool_]:
    """Tell which frames keep their observations.

    Parameters
    ----------
    ranks : (K,) places of frames among those of their sensor that were observed, from 0
    newest : rank of the newest frame there is
    latest : number of frames of which all are kept

    Returns
    -------
    (K,) bool. True for `newest` may become False as it grows, never the other way.
    """
    ages = newest - ranks
    kept = np.ones(len(ranks), bool)
    level = 1
    # A frame that is old enough for a level is there only if it was the one of its pair in each level up to it.
    while (old := ages >= latest << (level - 1)).any():
        block = ranks >> level
        kept &= ~old | ((ranks >> (level - 1)) & 1 == _chosen(block, level))
        level += 1
    return np.asarray(kept | (ranks < FIRST))


def _chosen(block: NDArray[np.int64], level: int) -> NDArray[np.int64]:
    """Return which half of each block survives: 0 or 1, as if at random."""
    # The finaliser of SplitMix64 (Steele, Lea and Flood 2014): every bit depends on all.
    mixed = block.astype(np.uint64) * np.uint64(64) + np.uint64(level)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((mixed >> np.uint64(33)) & np.uint64(1)).astype(np.int64)
