"""The compiled loops of a lossless JPEG's scan: entropy-coded bytes to samples.

Strict: every code must be one of its table, every sample fit its depth, and the bytes be used to their end. What passes
has one meaning, whichever decoder reads it; what does not is for others to make something of.

Reads and writes nothing outside of its arrays, whatever the bytes are.

References
----------
ITU-T T.81 (1992), Annex H (lossless mode), Annex C (code tables), F.2.2.1 (EXTEND).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hotpixd.core.jit import FAST, nb

LOOK = 12
"""Bits that are looked up at once, in a table that stays in the nearest cache; longer codes are rare."""

BROKEN = -1

_MARKER, _END_OF_IMAGE = 0xFF, 0xD9


@dataclass(frozen=True, slots=True)
class Tables:
    """Huffman tables of the components of a scan."""

    nearest: NDArray[np.uint16]
    """(components, 2^LOOK) what the next bits begin with: bits of code and difference << 4 | bits of the difference.

    Zero if the code is longer or there is none; and for differences of 16 bits, which depend on the decoder.
    """

    longer: NDArray[np.int64]
    """(components, 3, 17) by length of code: where such codes end among the next 16 bits, and the place of the first
    one's category; by place: the category."""

    wide: bool
    """Whether two differences may take more than 56 bits."""


def tables(given: Sequence[bytes]) -> Tables | None:
    """Build tables; None if one has more codes than bits can tell apart, or than there are categories.

    Parameters
    ----------
    given : of each component the numbers of codes of length 1 to 16 and the categories in the order of their codes, as
        DHT has them
    """
    nearest = np.zeros((len(given), 1 << LOOK), np.uint16)
    longer = np.zeros((len(given), 3, 17), np.int64)
    most = 0
    for component, table in enumerate(given):
        counts, categories = table[:16], table[16:]
        if len(categories) > 17 or max(categories, default=0) > 16:
            return None
        longer[component, 2, : len(categories)] = list(categories)
        end = place = 0
        for length, number in enumerate(counts, 1):
            longer[component, 1, length] = place
            for category in categories[place : place + number]:
                start, end = end, end + (1 << (16 - length))
                if length <= LOOK and category < 16:
                    nearest[component, start >> (16 - LOOK) : end >> (16 - LOOK)] = (length + category) << 4 | category
                most = max(most, length + category)
            place += number
            longer[component, 0, length] = end
        if end > 1 << 16:
            return None
    return Tables(nearest, longer, most > 28)


def room(size: int, width: int) -> int:
    """Return the bytes of memory for a scan of `size` bytes and rows of `width` samples: a row may be read past it."""
    return size + 4 * width + 16


@nb.njit(inline="always")
def _word_at(data, at):  # type: ignore[no-untyped-def]
    word = np.uint64(0)
    for k in range(8):
        word = (word << np.uint64(8)) | np.uint64(data[at + k])
    return word


@nb.njit(**FAST)
def unstuff(coded, start, data):  # type: ignore[no-untyped-def]
    """Copy a scan without its stuffing; return its length, BROKEN if anything but the end of the image ends it."""
    size = 0
    i = start
    while i + 1 < coded.size:
        byte = coded[i]
        i += 1
        if byte == _MARKER:
            if coded[i] != 0:
                return size if coded[i] == _END_OF_IMAGE else BROKEN
            i += 1
        data[size] = byte
        size += 1
    return BROKEN


@nb.njit(**FAST)
def _long_code(bits, component, longer):  # type: ignore[no-untyped-def]
    """Return what `Tables.nearest` would say if it knew longer codes."""
    if bits < longer[component, 0, LOOK]:
        # A short one, of 16 bits of difference.
        return 0
    for length in range(LOOK + 1, 17):
        if bits < longer[component, 0, length]:
            nth = (bits - longer[component, 0, length - 1]) >> (16 - length)
            category = longer[component, 2, longer[component, 1, length] + nth]
            return (length + category) << 4 | category if category < 16 else 0
    return 0


@nb.njit(**FAST)
def _differences(data, at, held, count, nearest, longer, wide, out):  # type: ignore[no-untyped-def]
    """Decode a row of differences; return where the next one goes on, and whether all codes were known.

    Bits wait at the top of `held`, `count` of them certain. It is filled up to 56 or more without a branch: bits beyond
    the count are those that come next, and are set once more by the next filling (Giesen, "Reading bits in far too many
    ways", 2018, variant 4). As one loop, since its parts as inlined functions took three times as long.
    """
    last = nearest.shape[0] - 1
    at_once = 1 if wide or out.size & 1 else 2
    for first in range(0, out.size, at_once):
        held |= _word_at(data, at) >> np.uint64(count)
        at += (63 - count) >> 3
        count |= 56
        for i in range(first, first + at_once):
            entry = np.int64(nearest[i & last, np.int64(held >> np.uint64(64 - LOOK))])
            if entry == 0:
                entry = np.int64(_long_code(np.int64(held >> np.uint64(48)), i & last, longer))
                if entry == 0:
                    return at, held, count, False
            bits = entry & 15
            used = entry >> 4
            rest = held << np.uint64(used - bits)
            value = np.int64(rest >> np.uint64(1) >> np.uint64(63 - bits))
            # One that begins with 0 is negative. No branch: nobody could foretell it.
            out[i] = value - (~(np.int64(rest) >> 63) & ((np.int64(1) << bits) - 1))
            held <<= np.uint64(used)
            count -= used
    return at, held, count, True


@nb.njit(**FAST)
def _along(row, differences, components, mask):  # type: ignore[no-untyped-def]
    """Add differences to the samples before (predictor 1, and every predictor's first row)."""
    outside = np.int64(0)
    for component in range(components):
        sample = np.int64(row[component])
        for i in range(component + components, row.size, components):
            sample += np.int64(differences[i])
            outside |= sample & mask
            row[i] = sample
    return outside == 0


@nb.njit(**FAST)
def _across(above, row, differences, components, predictor, mask):  # type: ignore[no-untyped-def]
    """Add differences to what the samples before and above foretell (T.81, table H.1)."""
    outside = np.int64(0)
    for component in range(components):
        a = np.int64(row[component])
        c = np.int64(above[component])
        for i in range(component + components, row.size, components):
            b = np.int64(above[i])
            if predictor == 2:
                a = b
            elif predictor == 3:
                a = c
            elif predictor == 4:
                a = a + b - c
            elif predictor == 5:
                a = a + ((b - c) >> 1)
            elif predictor == 6:
                a = b + ((a - c) >> 1)
            else:
                a = (a + b) >> 1
            a += np.int64(differences[i])
            c = b
            outside |= a & mask
            row[i] = a
    return outside == 0


@nb.njit(**FAST)
def decode(data, size, nearest, longer, wide, predictor, bits, out):  # type: ignore[no-untyped-def]
    """Decode a scan; return whether it is whole.

    Parameters
    ----------
    data : (room(size, width),) what `unstuff` makes of it
    size : of its bytes
    nearest, longer, wide : see `Tables`; of 1, 2 or 4 components
    predictor : 1 to 7
    bits : depth of the samples
    out : (rows, width) uint16; a width of whole groups of components
    """
    rows, width = out.shape
    components = nearest.shape[0]
    mask = ~np.int64((1 << bits) - 1)
    differences = np.empty(width, np.int32)
    at, held, count = np.int64(0), np.uint64(0), np.int64(0)
    for y in range(rows):
        at, held, count, good = _differences(data, at, held, count, nearest, longer, wide, differences)
        if not good or at * 8 - count > size * 8:
            return False
        for component in range(components):
            before = np.int64(out[y - 1, component]) if y else np.int64(1) << (bits - 1)
            sample = before + np.int64(differences[component])
            if sample & mask:
                return False
            out[y, component] = sample
        if y == 0 or predictor == 1:
            good = _along(out[y], differences, components, mask)
        else:
            good = _across(out[y - 1], out[y], differences, components, predictor, mask)
        if not good:
            return False
    # What is left is no more than what fills the last byte.
    return 0 <= size * 8 - (at * 8 - count) < 8


def load() -> None:
    """Compile the loops, or take them from numba's cache, which can take seconds."""
    coded = np.frombuffer(b"\x55\xff\xd9", np.uint8)
    data = np.zeros(room(1, 2), np.uint8)
    ours = tables([bytes((1, *[0] * 15, 0))])
    if ours is not None:
        size = unstuff(coded, 0, data)
        decode(data, size, ours.nearest, ours.longer, ours.wide, 6, 8, np.empty((2, 2), np.uint16))
