"""The compiled loops of a baseline JPEG's scan: entropy-coded bytes to coefficients and back.

Coefficients are as the scan has them: (blocks, 64) in the order of the scan, zigzag, quantised, the DC absolute. What
goes through both loops unchanged comes out as the same bits, so that a block can be changed and no other.

Reads nothing outside of its arrays, whatever the bytes are: a scan that makes no sense ends with an error code.

References
----------
ITU-T T.81 (1992), Annex C (code tables), F.1.2 (encoding), F.2.2 (decoding).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hotpixd.core.jit import FAST, nb

DONE, CUT_OFF, NO_CODE, NO_SYMBOL, NO_ROOM = 0, 1, 2, 3, 4
"""How a loop ends: well; the bytes end too early; bits that are no code; no code for a symbol; the output is full."""

_LOOK = 10
"""Bits that are looked up at once; longer codes, one in a hundred, are searched for."""

PADDING = 8
"""Bytes that must follow the data, so that a whole word can be read at its end."""


@dataclass(frozen=True, slots=True)
class Tables:
    """Huffman tables by number, for both directions; unused numbers hold no code."""

    fast: NDArray[np.uint16]
    """(T, 2^LOOK) length << 8 | symbol of the code that these bits begin with; 0 if it is longer."""

    last: NDArray[np.int64]
    """(T, 18) the last code of each length, -1 if there is none."""

    shift: NDArray[np.int64]
    """(T, 18) what makes of a code of each length the place of its symbol."""

    symbols: NDArray[np.uint8]
    """(T, 256) in the order of their codes."""

    code: NDArray[np.uint32]
    """(T, 256) by symbol."""

    length: NDArray[np.uint8]
    """(T, 256) bits of the code by symbol; 0 if it has none."""


def tables(given: list[tuple[bytes, bytes] | None]) -> Tables:
    """Build tables from the numbers of codes of length 1 to 16 and the symbols in their order, as DHT has them.

    Raises
    ------
    ValueError
        If there are more codes than bits can tell apart.
    """
    count = len(given)
    made = Tables(
        np.zeros((count, 1 << _LOOK), np.uint16),
        np.full((count, 18), -1, np.int64),
        np.zeros((count, 18), np.int64),
        np.zeros((count, 256), np.uint8),
        np.zeros((count, 256), np.uint32),
        np.zeros((count, 256), np.uint8),
    )
    for t, table in enumerate(given):
        if table is None:
            continue
        counts, symbols = table
        if sum(counts) != len(symbols) or len(symbols) > 256:
            raise ValueError("a Huffman table has as many symbols as codes")
        made.symbols[t, : len(symbols)] = np.frombuffer(symbols, np.uint8)
        code = place = 0
        for size, number in enumerate(counts, 1):
            made.shift[t, size] = place - code
            for _ in range(number):
                if code >> size:
                    raise ValueError("a Huffman table has more codes than there can be")
                symbol = symbols[place]
                made.code[t, symbol], made.length[t, symbol] = code, size
                if size <= _LOOK:
                    first = code << (_LOOK - size)
                    made.fast[t, first : first + (1 << (_LOOK - size))] = size << 8 | symbol
                made.last[t, size] = code
                code, place = code + 1, place + 1
            code <<= 1
    return made


@nb.njit(inline="always")
def _word_at(data, bit):  # type: ignore[no-untyped-def]
    """At least 32 bits from a place on, at the top of 64."""
    byte = bit >> 3
    word = np.uint64(0)
    for k in range(5):
        word = (word << np.uint64(8)) | np.uint64(data[byte + k])
    return word << np.uint64(24 + (bit & 7))


@nb.njit(inline="always")
def _symbol_at(word, fast, last, shift, symbols):  # type: ignore[no-untyped-def]
    """Length << 8 | symbol of the code at the top of a word; 0 if there is none."""
    found = np.int64(fast[np.int64(word >> np.uint64(64 - _LOOK))])
    if found != 0:
        return found
    for size in range(_LOOK + 1, 17):
        code = np.int64(word >> np.uint64(64 - size))
        if code <= last[size]:
            return np.int64(size << 8) | np.int64(symbols[(code + shift[size]) & 255])
    return np.int64(0)


@nb.njit(inline="always")
def _value_of(word, used, size):  # type: ignore[no-untyped-def]
    """The number that `size` bits after the first `used` stand for (T.81 F.2.2.1, EXTEND)."""
    value = np.int64((word << np.uint64(used)) >> np.uint64(64 - size))
    return value if value >> (size - 1) else value - (1 << size) + 1


@nb.njit(**FAST)
def decode_scan(data, ends, restart, dc_tables, ac_tables, components, fast, last, shift, symbols, mcus, out):  # type: ignore[no-untyped-def]
    """Decode a scan; returns how it ended.

    Parameters
    ----------
    data : bytes without stuffing and markers, and PADDING more
    ends : where each restart interval ends in it
    restart : MCUs in a restart interval; 0 if there is but one
    dc_tables, ac_tables, components : (B,) of each block of an MCU
    mcus : number of MCUs
    out : (mcus * B, 64) int16, zeros
    """
    per_mcu = components.size
    predicted = np.zeros(4, np.int64)
    interval, bit, end = 0, 0, ends[0] * 8
    for mcu in range(mcus):
        if restart and mcu and mcu % restart == 0:
            interval += 1
            if interval >= ends.size:
                return CUT_OFF
            bit, end = ends[interval - 1] * 8, ends[interval] * 8
            predicted[:] = 0
        for b in range(per_mcu):
            block = mcu * per_mcu + b
            table = dc_tables[b]
            if bit >= end:
                return CUT_OFF
            word = _word_at(data, bit)
            found = _symbol_at(word, fast[table], last[table], shift[table], symbols[table])
            size, used = found & 255, found >> 8
            if used == 0 or size > 15:
                return NO_CODE
            if size:
                predicted[components[b]] += _value_of(word, used, size)
            bit += used + size
            if abs(predicted[components[b]]) > 32767:
                return NO_CODE
            out[block, 0] = predicted[components[b]]
            table = ac_tables[b]
            k = 1
            while k < 64:
                if bit >= end:
                    return CUT_OFF
                word = _word_at(data, bit)
                found = _symbol_at(word, fast[table], last[table], shift[table], symbols[table])
                size, used, run = found & 15, found >> 8, (found >> 4) & 15
                if used == 0:
                    return NO_CODE
                if size == 0:
                    bit += used
                    if run < 15:
                        break
                    k += 16
                    continue
                k += run
                if k > 63:
                    return NO_CODE
                out[block, k] = _value_of(word, used, size)
                bit += used + size
                k += 1
        if bit > end:
            return CUT_OFF
    return DONE


@nb.njit(inline="always")
def _bits_in(value):  # type: ignore[no-untyped-def]
    size, left = 0, abs(value)
    while left:
        size += 1
        left >>= 1
    return size


@nb.njit(inline="always")
def _flushed(held, count, out, at):  # type: ignore[no-untyped-def]
    """Write whole bytes of the bits held; a byte of ones is followed by a zero byte. Returns what is left."""
    while count >= 8:
        byte = (held >> np.uint64(count - 8)) & np.uint64(255)
        out[at] = byte
        at += 1
        if byte == np.uint64(255):
            out[at] = 0
            at += 1
        count -= 8
    return count, at


@nb.njit(**FAST)
def encode_scan(blocks, restart, dc_tables, ac_tables, components, code, length, out):  # type: ignore[no-untyped-def]
    """Encode a scan, with stuffing and restart markers; returns how it ended, and the bytes written to `out`.

    The reverse of `decode_scan`; its parameters are described there.
    """
    per_mcu = components.size
    predicted = np.zeros(4, np.int64)
    held, count, at = np.uint64(0), 0, 0
    mcus = blocks.shape[0] // per_mcu
    for mcu in range(mcus):
        # A block takes at most 64 * 27 bits, each byte of which may be stuffed.
        if at + per_mcu * 512 + 16 > out.size:
            return NO_ROOM, at
        if restart and mcu and mcu % restart == 0:
            if count:
                held = (held << np.uint64(8 - count)) | np.uint64((1 << (8 - count)) - 1)
                count, at = _flushed(held, 8, out, at)
            out[at], out[at + 1] = 0xFF, 0xD0 + (mcu // restart - 1) % 8
            at += 2
            predicted[:] = 0
        for b in range(per_mcu):
            block = blocks[mcu * per_mcu + b]
            table = dc_tables[b]
            value = np.int64(block[0]) - predicted[components[b]]
            predicted[components[b]] = block[0]
            size = _bits_in(value)
            used = np.int64(length[table, size])
            if used == 0:
                return NO_SYMBOL, at
            if value < 0:
                value += (1 << size) - 1
            held = (held << np.uint64(used)) | np.uint64(code[table, size])
            held = (held << np.uint64(size)) | np.uint64(value)
            count, at = _flushed(held, count + used + size, out, at)
            table = ac_tables[b]
            run = 0
            for k in range(1, 64):
                value = np.int64(block[k])
                if value == 0:
                    run += 1
                    continue
                while run > 15:
                    used = np.int64(length[table, 0xF0])
                    if used == 0:
                        return NO_SYMBOL, at
                    held = (held << np.uint64(used)) | np.uint64(code[table, 0xF0])
                    count, at = _flushed(held, count + used, out, at)
                    run -= 16
                size = _bits_in(value)
                if size > 15:
                    return NO_SYMBOL, at
                symbol = run << 4 | size
                used = np.int64(length[table, symbol])
                if used == 0:
                    return NO_SYMBOL, at
                if value < 0:
                    value += (1 << size) - 1
                held = (held << np.uint64(used)) | np.uint64(code[table, symbol])
                held = (held << np.uint64(size)) | np.uint64(value)
                count, at = _flushed(held, count + used + size, out, at)
                run = 0
            if run:
                used = np.int64(length[table, 0])
                if used == 0:
                    return NO_SYMBOL, at
                held = (held << np.uint64(used)) | np.uint64(code[table, 0])
                count, at = _flushed(held, count + used, out, at)
    if count:
        held = (held << np.uint64(8 - count)) | np.uint64((1 << (8 - count)) - 1)
        count, at = _flushed(held, 8, out, at)
    return DONE, at
