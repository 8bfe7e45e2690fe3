"""The compiled loops: one frame in, exact sums and one byte of events per sample out.

Every array has the frame's own order (`SensorLayout.shape`). Neighbours of one
plane lie `step` rows or columns apart, so a Bayer mosaic and interleaved RGB
need no de-interleaving.

What makes it fast, measured: inner loops are small functions over whole rows,
so that LLVM vectorises each of them; a window's maximum is separable, over its
rows first and then along these; results are cast back to the samples' own
width, since numba widens small integers; nogil, so that two threads take two
halves of the rows.
"""

from __future__ import annotations

import numpy as np

from hotpixd.core.jit import FAST, nb
from hotpixd.core.window import HALF_WINDOW, PHASE_COLS, PHASE_ROWS, WINDOW

HIGH, LOW, HIGH_OUTSTANDING, LOW_OUTSTANDING, KNOWN = 1, 2, 4, 8, 16
"""Bits of a sample's events: strict maximum or minimum of its window, and by more than half the window's range.

An outstanding sample is extreme as well. KNOWN is set only while `unmask` looks at the frame.

A merely extreme sample is part of the *pattern*, whose return in the next frame tells that the scene stands still. With
outstanding ones, the sensor's own defects would look like such a scene.
"""

BLOCK = 512
"""Samples of a row that are counted together, then looked at one by one only if one of them is at a limit."""


@nb.njit(inline="always")
def _larger(a, b):  # type: ignore[no-untyped-def]
    # numba's max() widens unsigned integers, which halves the speed or worse.
    return a if a > b else b


@nb.njit(inline="always")
def _smaller(a, b):  # type: ignore[no-untyped-def]
    return a if a < b else b


@nb.njit(**FAST)
def _window_start(position, step, length):  # type: ignore[no-untyped-def]
    """Return where the window of a row or column begins: near a border it is shifted inwards, still WINDOW wide."""
    phase = position % step
    count = (length - phase + step - 1) // step
    return min(max(position // step - HALF_WINDOW, 0), count - WINDOW) * step + phase


@nb.njit(**FAST)
def _extremes_across(x, a, b, c, d, e, f, high_around, high, low_around, low):  # type: ignore[no-untyped-def]
    """Highest and lowest of each column of a row's windows, without and with the row itself.

    Parameters
    ----------
    x : the row
    a, b, c, d, e, f : the six others of its windows
    """
    for i in range(x.size):
        top = _larger(_larger(_larger(a[i], b[i]), c[i]), _larger(_larger(d[i], e[i]), f[i]))
        bottom = _smaller(_smaller(_smaller(a[i], b[i]), c[i]), _smaller(_smaller(d[i], e[i]), f[i]))
        own = x[i]
        # After all is read: for LLVM each of these might change what it has not read yet.
        high_around[i] = top
        high[i] = _larger(top, own)
        low_around[i] = bottom
        low[i] = _smaller(bottom, own)


@nb.njit(inline="always")
def _only_outstanding(bits):  # type: ignore[no-untyped-def]
    """Keep an extreme only if it is outstanding.

    Where a window is not centred, a mere gradient makes the last sample before the border extreme, but never
    outstanding.
    """
    return np.uint8(bits & np.uint8(12 | np.uint8(bits >> 2)))


@nb.njit(**FAST)
def _events_of_row(x, a, b, c, d, e, f, around, g, h, k, m, n, o, under, out):  # type: ignore[no-untyped-def]
    """Events of a row's samples.

    The columns come as slices, one step apart: an index computed with a step might be negative for all that LLVM knows,
    and then it does not vectorise.

    Parameters
    ----------
    x : the samples
    a, b, c, d, e, f, around : highest of the windows' other columns, and of the 6 others of their own
    g, h, k, m, n, o, under : lowest of the same
    """
    width = x.dtype.type
    for i in range(x.size):
        above = _larger(_larger(_larger(a[i], b[i]), c[i]), _larger(_larger(d[i], e[i]), f[i]))
        below = _smaller(_smaller(_smaller(g[i], h[i]), k[i]), _smaller(_smaller(m[i], n[i]), o[i]))
        top, bottom = _larger(above, around[i]), _smaller(below, under[i])
        spread = width(top - bottom)
        # 2 (x - top) > top - bottom + 1, without leaving the samples' width.
        half = width(width(spread >> 1) + width(spread & 1))
        high = np.uint8(x[i] > top)
        low = np.uint8(x[i] < bottom)
        high_out = np.uint8(high & np.uint8(width(x[i] - top) > half))
        low_out = np.uint8(low & np.uint8(width(bottom - x[i]) > half))
        out[i] = np.uint8(high | (low << 1) | (high_out << 2) | (low_out << 3))


@nb.njit(**FAST)
def _events_at_ends(x, step, high_around, high, low_around, low, out):  # type: ignore[no-untyped-def]
    """The same near a row's ends: windows are shifted inwards, still 7 columns wide."""
    edge = HALF_WINDOW * step
    for at in range(2 * edge):
        i = at if at < edge else x.size - 1 - (at - edge)
        start = _window_start(i, step, x.size)
        own, top, bottom = np.int64(x[i]), np.int64(high_around[i]), np.int64(low_around[i])
        for j in range(start, start + WINDOW * step, step):
            if j != i:
                top = max(top, np.int64(high[j]))
                bottom = min(bottom, np.int64(low[j]))
        bits = 0
        if own > top:
            bits = HIGH | (HIGH_OUTSTANDING if 2 * (own - top) > top - bottom + 1 else 0)
        elif own < bottom:
            bits = LOW | (LOW_OUTSTANDING if 2 * (bottom - own) > top - bottom + 1 else 0)
        out[i] = bits


@nb.njit(**FAST)
def _restrict_row(row, edge, centred):  # type: ignore[no-untyped-def]
    """Keep only outstanding extremes where windows are not centred: at the ends of a row, or in all of it."""
    if not centred:
        edge = row.size
    for i in range(edge):
        row[i] = _only_outstanding(row[i])
    for i in range(max(row.size - edge, edge), row.size):
        row[i] = _only_outstanding(row[i])


@nb.njit(inline="always")
def _judged(own, n, ne, e, se, s, sw, w, nw):  # type: ignore[no-untyped-def]
    """Event bits of a mosaic's site, given those of the 8 adjacent sites.

    Details of a scene light several colours at once, a defect lights one site. So an extreme beside an extreme of its
    own side is no event. An outstanding one is dropped only beside an outstanding one or two extremes, since every
    seventh site touches an extreme by chance.
    """
    once = np.uint8(n | ne | e | se | s | sw | w | nw)
    # Carry-save: a bit is set where at least two neighbours have it.
    twice = np.uint8(n & ne)
    seen = np.uint8(n | ne)
    twice = np.uint8(twice | (seen & e))
    seen = np.uint8(seen | e)
    twice = np.uint8(twice | (seen & se))
    seen = np.uint8(seen | se)
    twice = np.uint8(twice | (seen & s))
    seen = np.uint8(seen | s)
    twice = np.uint8(twice | (seen & sw))
    seen = np.uint8(seen | sw)
    twice = np.uint8(twice | (seen & w))
    seen = np.uint8(seen | w)
    twice = np.uint8(twice | (seen & nw))
    outstanding = np.uint8(own & 12)
    crowded_out = np.uint8(outstanding & np.uint8(once | np.uint8(twice << 2)))
    kept_out = np.uint8(outstanding & np.uint8(~crowded_out))
    extreme = np.uint8(own & 3)
    plain = np.uint8(extreme & np.uint8(~np.uint8(outstanding >> 2)))
    return np.uint8(np.uint8(plain & np.uint8(~once)) | np.uint8(kept_out | np.uint8(kept_out >> 2)))


@nb.njit(**FAST)
def _judge_row(above, here, below, edge, centred, out):  # type: ignore[no-untyped-def]
    n = here.size
    a, b, c = above[: n - 2], above[1 : n - 1], above[2:]
    d, e, f = here[: n - 2], here[1 : n - 1], here[2:]
    g, h, k = below[: n - 2], below[1 : n - 1], below[2:]
    middle = out[1 : n - 1]
    for i in range(n - 2):
        middle[i] = _judged(e[i], b[i], c[i], f[i], k[i], h[i], g[i], d[i], a[i])
    none = np.uint8(0)
    out[0] = _judged(here[0], above[0], above[1], here[1], below[1], below[0], none, none, none)
    z = n - 1
    out[z] = _judged(here[z], above[z], none, none, none, below[z], below[z - 1], here[z - 1], above[z - 1])
    _restrict_row(out, edge, centred)


@nb.njit(inline="always")
def _squared(squares, value):  # type: ignore[no-untyped-def]
    # It fits in 32 bits, and a product of 64 takes four times as long.
    return squares.dtype.type(np.uint32(np.uint32(value) * np.uint32(value)))


@nb.njit(**FAST)
def _add_sums(x, total, squares):  # type: ignore[no-untyped-def]
    for i in range(x.size):
        total[i] += total.dtype.type(x[i])
    for i in range(x.size):
        squares[i] += _squared(squares, x[i])


@nb.njit(**FAST)
def _add_sums_of_four(a, b, c, d, total, squares):  # type: ignore[no-untyped-def]
    for i in range(a.size):
        width = total.dtype.type
        total[i] += (width(a[i]) + width(b[i])) + (width(c[i]) + width(d[i]))
    for i in range(a.size):
        squares[i] += (_squared(squares, a[i]) + _squared(squares, b[i])) + (
            _squared(squares, c[i]) + _squared(squares, d[i])
        )


@nb.njit(**FAST)
def add_rows(a, b, c, d, frames, total, squares, first, last):  # type: ignore[no-untyped-def]
    """Add rows first..last of one to four frames to the sums, in one pass over these.

    Parameters
    ----------
    a, b, c, d : (rows, cols) uint8 or uint16, of which the first `frames` are added
    total, squares : (rows, cols) unsigned, changed in place
    """
    for y in range(first, last):
        if frames == 4:
            _add_sums_of_four(a[y], b[y], c[y], d[y], total[y], squares[y])
            continue
        _add_sums(a[y], total[y], squares[y])
        if frames > 1:
            _add_sums(b[y], total[y], squares[y])
        if frames > 2:
            _add_sums(c[y], total[y], squares[y])


@nb.njit(inline="always")
def _merely_extreme(bits):  # type: ignore[no-untyped-def]
    """1 if a sample's events make it part of the pattern, else 0."""
    extreme = np.uint8(bits | np.uint8(bits >> 1))
    return np.uint8(np.uint8(extreme & np.uint8(~np.uint8(extreme >> 2))) & 1)


@nb.njit(**FAST)
def _tally_pattern(row, phases):  # type: ignore[no-untyped-def]
    """Count a row's pattern by column phase; the row is as long as a multiple of the phases."""
    # Bytes, which are four times as many in a register as the numbers that they are added to.
    pattern = np.zeros(PHASE_COLS, np.uint8)
    for start in range(0, row.size, 255 * PHASE_COLS):
        pattern[:] = 0
        for at in range(start, min(start + 255 * PHASE_COLS, row.size), PHASE_COLS):
            block = row[at : at + PHASE_COLS]
            for j in range(PHASE_COLS):
                pattern[j] = np.uint8(pattern[j] + _merely_extreme(block[j]))
        for j in range(PHASE_COLS):
            phases[j] += pattern[j]


@nb.njit(inline="always")
def _sum_of_bytes(word):  # type: ignore[no-untyped-def]
    pairs = (word & np.uint64(0x00FF00FF00FF00FF)) + ((word >> np.uint64(8)) & np.uint64(0x00FF00FF00FF00FF))
    return np.int64((pairs * np.uint64(0x0001000100010001)) >> np.uint64(48))


@nb.njit(**FAST)
def _count_events(words, totals):  # type: ignore[no-untyped-def]
    """Add the number of each event to the totals: eight bytes at a time, as many as a byte can count."""
    low_bits = np.uint64(0x0101010101010101)
    for start in range(0, words.size, 255):
        part = words[start : start + 255]
        high = low = high_out = low_out = np.uint64(0)
        for w in range(part.size):
            high += part[w] & low_bits
            low += (part[w] >> np.uint64(1)) & low_bits
            high_out += (part[w] >> np.uint64(2)) & low_bits
            low_out += (part[w] >> np.uint64(3)) & low_bits
        totals[0] += _sum_of_bytes(high)
        totals[1] += _sum_of_bytes(low)
        totals[2] += _sum_of_bytes(high_out)
        totals[3] += _sum_of_bytes(low_out)


@nb.njit(**FAST)
def _survey_row(row, words, totals, phases):  # type: ignore[no-untyped-def]
    _tally_pattern(row, phases)
    _count_events(words, totals)


@nb.njit(**FAST)
def find_events(samples, row_step, col_step, lone, events, totals, phases, first, last):  # type: ignore[no-untyped-def]
    """Find the events of rows first..last of a frame.

    Parameters
    ----------
    samples : (rows, cols) uint8 or uint16
    row_step, col_step : steps to the next sample of the same plane
    lone : judge a site by the 8 adjacent ones, see `_judged`; else every event stays
    events : (rows, padded) uint8, cols rounded up to a multiple of PHASE_COLS; overwritten, padding zero
    totals : (4,) int64, samples high, low, outstanding high and low, added to
    phases : (PHASE_ROWS, PHASE_COLS) int64, samples of the pattern per position of the grid, added to
    """
    rows, cols = samples.shape
    # Of the columns of a row's windows, without and with the row itself.
    high_around, high = np.empty(cols, samples.dtype), np.empty(cols, samples.dtype)
    low_around, low = np.empty(cols, samples.dtype), np.empty(cols, samples.dtype)
    others = np.empty(WINDOW - 1, np.int64)
    before = False
    found = np.zeros((3, cols), np.uint8)
    words = events.view(np.uint64)
    margin = 1 if lone else 0
    begin, end = max(first - margin, 0), min(last + margin, rows)
    s = col_step
    edge, inner = HALF_WINDOW * s, cols - (WINDOW - 1) * s
    here = slice(edge, edge + inner)
    if begin == 0:
        found[2] = 0
    for y in range(begin, end):
        start = _window_start(y, row_step, rows)
        known = 0
        for row in range(start, start + WINDOW * row_step, row_step):
            if row != y:
                others[known] = row
                known += 1
        _extremes_across(
            samples[y],
            samples[others[0]], samples[others[1]], samples[others[2]],
            samples[others[3]], samples[others[4]], samples[others[5]],
            high_around, high, low_around, low,
        )  # fmt: skip
        inside = start + HALF_WINDOW * row_step == y
        out = found[y % 3] if lone else events[y, :cols]
        a, b, c = high[:inner], high[s : s + inner], high[2 * s : 2 * s + inner]
        d, e, f = high[4 * s : 4 * s + inner], high[5 * s : 5 * s + inner], high[6 * s : 6 * s + inner]
        g, h, k = low[:inner], low[s : s + inner], low[2 * s : 2 * s + inner]
        m, n, o = low[4 * s : 4 * s + inner], low[5 * s : 5 * s + inner], low[6 * s : 6 * s + inner]
        _events_of_row(
            samples[y, here], a, b, c, d, e, f, high_around[here], g, h, k, m, n, o, low_around[here], out[here]
        )
        _events_at_ends(samples[y], s, high_around, high, low_around, low, out)
        if not lone:
            _restrict_row(out, edge, inside)
            _survey_row(events[y], words[y], totals, phases[y % PHASE_ROWS])
            continue
        if y - 1 >= first:
            _judge_row(found[(y - 2) % 3], found[(y - 1) % 3], found[y % 3], edge, before, events[y - 1, :cols])
            _survey_row(events[y - 1], words[y - 1], totals, phases[(y - 1) % PHASE_ROWS])
        before = inside
    if lone and last == rows:
        found[rows % 3] = 0
        _judge_row(found[(rows - 2) % 3], found[(rows - 1) % 3], found[rows % 3], edge, before, events[rows - 1, :cols])
        _survey_row(events[rows - 1], words[rows - 1], totals, phases[(rows - 1) % PHASE_ROWS])


@nb.njit(**FAST)
def _count_extremes(row, high, low, high_limit, low_limit, both_limit):  # type: ignore[no-untyped-def]
    """Add a stretch of extremes to the counts; return whether any count is at its limit, and any is outstanding."""
    width = high.dtype.type
    at_limit = np.uint8(0)
    outstanding = np.uint8(0)
    for i in range(high.size):
        a = width(high[i] + (row[i] & 1))
        b = width(low[i] + ((row[i] >> 1) & 1))
        outstanding = np.uint8(outstanding | np.uint8(row[i] & 12))
        high[i] = a
        low[i] = b
        over = (a >= high_limit) | (b >= low_limit) | (width(a + b) >= both_limit)
        at_limit = np.uint8(at_limit | np.uint8(over))
    return at_limit != 0, outstanding != 0


@nb.njit(**FAST)
def _reaches(high, low, high_out, low_out, limits):  # type: ignore[no-untyped-def]
    """Whether the counts of one sample reach a limit, see `count_rows`."""
    most = limits.shape[1] - 1
    if np.int64(high) >= limits[0, min(np.int64(high_out), most)]:
        return True
    if np.int64(low) >= limits[1, min(np.int64(low_out), most)]:
        return True
    outstanding = np.int64(high_out) + np.int64(low_out)
    return np.int64(high) + np.int64(low) >= limits[2, min(outstanding, most)]


@nb.njit(**FAST)
def count_rows(events, high, low, high_outstanding, low_outstanding, limits, reached, first, last):  # type: ignore[no-untyped-def]
    """Add rows first..last of a frame's events to the counts; return how many samples are at a limit.

    Parameters
    ----------
    events : (rows, padded) uint8, from `find_events`
    high, low, high_outstanding, low_outstanding : (rows, cols) unsigned, changed in place
    limits : (3, K) int64, K > 1: extremes high, low, either that a sample with k outstanding ones needs,
        falling with k; the last entry serves for all greater k. They fit the counts' width
    reached : (room,) int64, overwritten with flat indices as far as there is room. A sample that had only
        outstanding events before the last one may be left out until its next
    """
    cols = high.shape[1]
    width = high.dtype.type
    # Two outstanding events are so rare that they are looked for one by one.
    high_limit, low_limit, both_limit = width(limits[0, 1]), width(limits[1, 1]), width(limits[2, 1])
    n = 0
    for y in range(first, last):
        for start in range(0, cols, BLOCK):
            stop = min(start + BLOCK, cols)
            row, a, b = events[y, start:stop], high[y, start:stop], low[y, start:stop]
            at_limit, outstanding = _count_extremes(row, a, b, high_limit, low_limit, both_limit)
            if not (at_limit or outstanding):
                continue
            for i in range(start, stop):
                bits = events[y, i] & 12
                if bits:
                    high_outstanding[y, i] += bits >> 2 & 1
                    low_outstanding[y, i] += bits >> 3
                elif high[y, i] < high_limit and low[y, i] < low_limit and width(high[y, i] + low[y, i]) < both_limit:
                    continue
                if _reaches(high[y, i], low[y, i], high_outstanding[y, i], low_outstanding[y, i], limits):
                    if n < reached.size:
                        reached[n] = y * cols + i
                    n += 1
    return n


@nb.njit(**FAST)
def unmask(samples, row_step, col_step, lone, sites, events, totals):  # type: ignore[no-untyped-def]
    """Find outstanding samples whose windows hold a known defect, which hides them; count it out.

    Parameters
    ----------
    samples : (rows, cols) the frame
    sites : (K,) int64, sorted flat indices of known defects
    events, totals : of the frame, from `find_events`; changed in place

    The highest (lowest) of the others is left out too: where one defect is, two more may hide each other. Only an
    outstanding sample gains events, and both of them: with some neighbours left out, to be a mere extreme would be
    likelier than 1/49. For the same reason more than 4 defects in a window are not counted out.
    """
    rows, cols = samples.shape
    for site in sites:
        events[site // cols, site % cols] |= KNOWN
    for site in sites:
        y, x = site // cols, site % cols
        for j in range(-HALF_WINDOW, WINDOW - HALF_WINDOW):
            for i in range(-HALF_WINDOW, WINDOW - HALF_WINDOW):
                v, u = y + j * row_step, x + i * col_step
                if v < 0 or u < 0 or v >= rows or u >= cols or events[v, u] & 12:
                    continue
                found = _outstanding_among(samples, row_step, col_step, events, v, u)
                if found and not (lone and _touches(events, found, v, u, cols)):
                    extreme = found >> 2
                    totals[0 if extreme == HIGH else 1] += 0 if events[v, u] & extreme else 1
                    totals[2 if extreme == HIGH else 3] += 1
                    events[v, u] |= found | extreme
    for site in sites:
        events[site // cols, site % cols] &= np.uint8(~np.uint8(KNOWN))


@nb.njit(**FAST)
def _outstanding_among(samples, row_step, col_step, events, v, u):  # type: ignore[no-untyped-def]
    """Event bit of a sample among those neighbours that are no known defects; 0 if it is not outstanding."""
    rows, cols = samples.shape
    top, left = _window_start(v, row_step, rows), _window_start(u, col_step, cols)
    own = np.int64(samples[v, u])
    highest = high = np.int64(-1)
    lowest = low = np.int64(1 << 62)
    left_out = above = below = 0
    for j in range(WINDOW):
        for i in range(WINDOW):
            r, c = top + j * row_step, left + i * col_step
            if r == v and c == u:
                continue
            if events[r, c] & KNOWN:
                left_out += 1
                continue
            value = np.int64(samples[r, c])
            if value >= own:
                above += 1
            if value <= own:
                below += 1
            # It is between two pairs of them, as nearly every sample is after a few: no extreme.
            if above > 1 and below > 1:
                return 0
            if value > highest:
                high, highest = highest, value
            elif value > high:
                high = value
            if value < lowest:
                low, lowest = lowest, value
            elif value < low:
                low = value
    if left_out > 4:
        return 0
    if 2 * (own - high) > high - lowest + 1:
        return HIGH_OUTSTANDING
    if 2 * (low - own) > highest - low + 1:
        return LOW_OUTSTANDING
    return 0


@nb.njit(**FAST)
def _touches(events, bit, v, u, cols):  # type: ignore[no-untyped-def]
    """Whether one of the 8 adjacent sites has the same event."""
    for r in range(max(v - 1, 0), min(v + 2, events.shape[0])):
        for c in range(max(u - 1, 0), min(u + 2, cols)):
            if (r != v or c != u) and events[r, c] & bit:
                return True
    return False


@nb.njit(**FAST)
def overlap(a, b):  # type: ignore[no-untyped-def]
    """Number of bits set in both of two uint64 arrays."""
    n = 0
    for i in range(a.size):
        v = a[i] & b[i]
        # Kernighan would loop; these bits are sparse, so nearly every word is zero.
        while v != 0:
            v &= v - np.uint64(1)
            n += 1
    return n


@nb.njit(inline="always")
def _gathered(word):  # type: ignore[no-untyped-def]
    """Lowest bits of 8 bytes as one byte: a product gathers them in its top byte."""
    return np.uint8(((word & np.uint64(0x0101010101010101)) * np.uint64(0x0102040810204080)) >> np.uint64(56))


@nb.njit(**FAST)
def pack_pattern(words, rows, bits):  # type: ignore[no-untyped-def]
    """Pack which samples are part of the pattern.

    Parameters
    ----------
    words : (height, padded / 8) uint64, a view of the events from `find_events`
    rows : (R,) int64, the rows that are looked at
    bits : (R, padded / 8) uint8, overwritten: one bit per sample
    """
    for r in range(rows.size):
        row, out = words[rows[r]], bits[r]
        for w in range(row.size):
            extreme = row[w] | (row[w] >> np.uint64(1))
            out[w] = _gathered(extreme & ~(extreme >> np.uint64(2)))


@nb.njit(**FAST)
def pack_events(words, planes):  # type: ignore[no-untyped-def]
    """Split events into planes of one bit per sample, for the way to another machine; see `unpack_events`.

    Parameters
    ----------
    words : (rows, padded / 8) uint64, a view of the events from `find_events`
    planes : (4, rows, padded / 8) uint8, overwritten: extremes high, low, outstanding ones high, low
    """
    for y in range(words.shape[0]):
        for w in range(words.shape[1]):
            for k in range(4):
                planes[k, y, w] = _gathered(words[y, w] >> np.uint64(k))


@nb.njit(**FAST)
def unpack_events(planes, words):  # type: ignore[no-untyped-def]
    """Undo `pack_events`: overwrite `words`."""
    spread = np.zeros(256, np.uint64)
    for b in range(256):
        for k in range(8):
            spread[b] |= np.uint64((b >> k) & 1) << np.uint64(8 * k)
    for y in range(words.shape[0]):
        for w in range(words.shape[1]):
            word = spread[planes[0, y, w]] | spread[planes[1, y, w]] << np.uint64(1)
            words[y, w] = word | spread[planes[2, y, w]] << np.uint64(2) | spread[planes[3, y, w]] << np.uint64(3)
