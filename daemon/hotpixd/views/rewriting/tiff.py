"""Changes samples of a TIFF or DNG where they lie; every other byte of the file stays, tags and previews among them.

Uncompressed samples are overwritten. Of compressed ones, the strips or tiles with a changed sample are compressed anew,
in the way in which they were, and put at the end of the file; the tags that say where they lie are changed in place.

References
----------
Adobe, TIFF 6.0 (strips, predictor), TIFF Technical Note 2002 (tiles); Digital Negative Specification 1.7 (ActiveArea).
"""

from __future__ import annotations

import io
import logging
import struct
import zlib
from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from hotpixd.core.frame import Frame
from hotpixd.views.rewriting.errors import RewriteError

_ACTIVE_AREA = 50829
_PLAIN, _LZW, _JPEG, _DEFLATE, _PACKBITS, _OLD_DEFLATE = 1, 5, 7, 8, 32773, 32946
_HORIZONTAL = 2
_OFFSET_TYPES = {3: "H", 4: "I", 16: "Q"}

_MOST_PAGES = 64
"""Directories that are looked at; camera files have a handful."""


def rewritten(data: bytes, frame: Frame, sites: NDArray[np.int64], values: NDArray[np.generic]) -> bytes:
    """Return the file with other samples; see `rewriting.rewritten`."""
    import tifffile

    tifffile.logger().setLevel(logging.CRITICAL)  # what matters becomes a RewriteError
    reason = "this file does not hold the samples as they were decoded from it"
    try:
        with tifffile.TiffFile(io.BytesIO(data), name="shot") as tiff:
            if tiff.pages.first.tags.get(271) is not None and not _holds_dng(tiff) and _is_camera_raw(tiff):
                raise RewriteError(
                    "camera raw files of this kind cannot be written; convert it to DNG, or give the map to your"
                    " raw converter"
                )
            for page in _pages(tiff):
                try:
                    return _Page(page, data, tiff.byteorder).changed(frame, sites, values)
                except _OtherPage:
                    continue
                except _CannotEncode as error:
                    reason = str(error)
    except RewriteError:
        raise
    except (MemoryError, KeyboardInterrupt):
        raise
    except Exception as error:
        # tifffile meets broken files with anything from struct.error to RecursionError.
        raise RewriteError("the TIFF or DNG file is damaged; copy it from the camera again") from error
    raise RewriteError(reason)


class _OtherPage(Exception):  # noqa: N818 - told on, never raised to a caller
    """A page that does not hold the samples that were decoded: a preview."""


class _CannotEncode(Exception):  # noqa: N818 - told on, never raised to a caller
    """The page of the samples, compressed in a way that cannot be written. The message is a sentence."""


def _holds_dng(tiff: Any) -> bool:
    return 50706 in tiff.pages.first.tags


def _is_camera_raw(tiff: Any) -> bool:
    """Tell whether a TIFF is a maker's own raw file, in which other places may refer to what is moved."""
    first = tiff.pages.first
    return 330 in first.tags and int(first.tags.valueof(254, 0)) == 1


def _pages(tiff: Any) -> Iterator[Any]:
    """Yield the pages of a file, each before those that its tags lead to."""
    waiting = [tiff.pages.get(k) for k in range(min(len(tiff.pages), _MOST_PAGES))]
    count = 0
    while waiting and count < _MOST_PAGES:
        page = waiting.pop(0)
        count += 1
        yield page
        if page.subifds:
            inner = page.pages
            waiting += [inner.get(k) for k in range(min(len(inner), _MOST_PAGES))]


class _Page:
    """One picture of a file, and where its samples lie."""

    def __init__(self, page: Any, data: bytes, byteorder: Literal["<", ">"]) -> None:
        self._page = page
        self._data = data
        self._order = byteorder
        self._width, self._height = int(page.imagewidth), int(page.imagelength)
        self._samples = int(page.samplesperpixel)
        self._separate = self._samples > 1 and int(page.planarconfig) == 2
        self._bits = int(page.bitspersample) if isinstance(page.bitspersample, int) else 0
        self._compression = int(page.compression)
        tiled = bool(page.is_tiled)
        self._part_height = int(page.tilelength if tiled else min(page.rowsperstrip or 1 << 30, self._height))
        self._part_width = int(page.tilewidth if tiled else self._width)
        self._offsets_tag, self._counts_tag = (324, 325) if tiled else (273, 279)

    def changed(self, frame: Frame, sites: NDArray[np.int64], values: NDArray[np.generic]) -> bytes:
        """Return the file with other samples on this page.

        Raises
        ------
        _OtherPage, _CannotEncode
            If it holds other samples, or ones that cannot be written.
        """
        layout = frame.sensor.layout
        area = self._page.tags.valueof(_ACTIVE_AREA, None) or (0, 0, self._height, self._width)
        top, left = int(area[0]), int(area[1])
        # A fourth sample of a pixel is its transparency.
        if self._samples < layout.channels or self._width < left + layout.width or self._height < top + layout.height:
            raise _OtherPage
        rows, columns = np.divmod(sites, layout.shape[1])
        rows = rows + top
        pixels, channels = columns // layout.channels + left, columns % layout.channels
        before = frame.samples.reshape(-1)[sites]
        parts = self._part_of(rows, pixels, channels)
        rows_in, pixels_in = rows % self._part_height, pixels % self._part_width
        channels_in = np.zeros_like(channels) if self._separate else channels
        if self._compression == _PLAIN:
            return self._overwritten(parts, rows_in, pixels_in, channels_in, before, values)
        return self._compressed_anew(parts, rows_in, pixels_in, channels_in, before, values)

    def _part_of(
        self, rows: NDArray[np.int64], pixels: NDArray[np.int64], channels: NDArray[np.int64]
    ) -> NDArray[np.int64]:
        """Return the strip or tile of each sample."""
        across = -(-self._width // self._part_width)
        down = -(-self._height // self._part_height)
        part = rows // self._part_height * across + pixels // self._part_width
        return np.asarray(part + channels * across * down if self._separate else part)

    def _overwritten(
        self,
        parts: NDArray[np.int64],
        rows: NDArray[np.int64],
        pixels: NDArray[np.int64],
        channels: NDArray[np.int64],
        before: NDArray[np.generic],
        values: NDArray[np.generic],
    ) -> bytes:
        out = bytearray(self._data)
        order: Literal["little", "big"] = "little" if self._order == "<" else "big"
        per_pixel = 1 if self._separate else self._samples
        # Rows begin at whole bytes.
        row_bits = -(-self._part_width * per_pixel * self._bits // 8) * 8
        if not 8 <= self._bits <= 16:
            raise _OtherPage
        starts = np.array(self._page.dataoffsets, np.int64)
        if parts.size and parts.max() >= len(starts):
            raise _OtherPage
        bits = starts[parts] * 8 + rows * row_bits + (pixels * per_pixel + channels) * self._bits
        for bit, old, new in zip(bits.tolist(), before.tolist(), values.tolist(), strict=True):
            if self._bits in (8, 16):
                sample = slice(bit // 8, (bit + self._bits) // 8)
                if int.from_bytes(out[sample], order) != old:
                    raise _OtherPage
                out[sample] = int(new).to_bytes(self._bits // 8, order)
                continue
            # Packed samples go from the highest bit on, whatever the order of bytes is.
            sample = slice(bit // 8, (bit + self._bits + 7) // 8)
            behind = -(bit + self._bits) % 8
            whole = int.from_bytes(out[sample], "big")
            mask = ((1 << self._bits) - 1) << behind
            if (whole & mask) >> behind != old:
                raise _OtherPage
            out[sample] = ((whole & ~mask) | int(new) << behind).to_bytes(sample.stop - sample.start, "big")
        return bytes(out)

    def _compressed_anew(
        self,
        parts: NDArray[np.int64],
        rows: NDArray[np.int64],
        pixels: NDArray[np.int64],
        channels: NDArray[np.int64],
        before: NDArray[np.generic],
        values: NDArray[np.generic],
    ) -> bytes:
        out = bytearray(self._data)
        page = self._page
        for part in np.unique(parts).tolist():
            at, size = page.dataoffsets[part], page.databytecounts[part]
            coded = self._data[at : at + size]
            try:
                decoded = page.decode(coded, part, jpegtables=page.jpegtables)[0]
            except ValueError as error:
                if "imagecodecs" in str(error):
                    raise _CannotEncode(
                        "this file is compressed in a way that needs the package imagecodecs:"
                        ' pip install "hotpixd[repair]"'
                    ) from error
                raise
            # The last strip has fewer rows, and readers may have cut tiles at the picture's edge.
            samples = np.array(decoded).reshape(decoded.shape[-3], decoded.shape[-2], decoded.shape[-1])
            own = parts == part
            place = rows[own], pixels[own], channels[own]
            if (samples[place] != before[own]).any():
                raise _OtherPage
            samples[place] = values[own]
            made = self._encoded(samples, coded)
            if len(made) <= size:
                out[at : at + len(made)] = made
                where = at
            else:
                out += b"\0" * (len(out) % 2)
                where = len(out)
                out += made
            self._point(out, self._offsets_tag, part, where)
            self._point(out, self._counts_tag, part, len(made))
        return bytes(out)

    def _encoded(self, samples: NDArray[Any], coded: bytes) -> bytes:
        """Return a strip or tile compressed as it was."""
        predictor = int(self._page.predictor)
        if self._compression == _JPEG:
            return _lossless_jpeg(samples, coded)
        if self._compression not in (_DEFLATE, _OLD_DEFLATE, _LZW, _PACKBITS) or predictor not in (1, _HORIZONTAL):
            raise _CannotEncode("this TIFF is compressed in a way that cannot be written; save it without compression")
        if predictor == _HORIZONTAL:
            # Modulo the samples' own size, as the standard has it.
            samples[:, 1:] -= samples[:, :-1].copy()
        plain = samples.astype(samples.dtype.newbyteorder(self._order)).tobytes()
        if self._compression == _PACKBITS:
            return _packed(plain, len(plain) // len(samples))
        if self._compression != _LZW:
            return zlib.compress(plain)
        import imagecodecs

        return bytes(imagecodecs.lzw_encode(plain))

    def _point(self, out: bytearray, number: int, part: int, value: int) -> None:
        """Change one entry of a tag in place."""
        tag = self._page.tags[number]
        form = self._order + _OFFSET_TYPES[int(tag.dtype)]
        try:
            struct.pack_into(form, out, tag.valueoffset + part * struct.calcsize(form), value)
        except struct.error as error:
            raise _CannotEncode("this TIFF has no room for a larger strip; save it without compression") from error


def _lossless_jpeg(samples: NDArray[Any], coded: bytes) -> bytes:
    """Return a tile as lossless JPEG of the precision that it had."""
    import imagecodecs

    begin = coded.find(b"\xff\xc3")
    if begin < 0 or samples.shape[-1] != 1:
        raise _CannotEncode("this DNG is compressed in a way that cannot be written; save it without compression")
    return bytes(imagecodecs.ljpeg_encode(samples[..., 0], bitspersample=coded[begin + 4]))


def _packed(plain: bytes, row_bytes: int) -> bytes:
    """Return bytes as PackBits without any run, which is a little longer: rows are packed one by one."""
    rows = (plain[at : at + row_bytes] for at in range(0, len(plain), row_bytes))
    literals = (row[at : at + 128] for row in rows for at in range(0, row_bytes, 128))
    return b"".join(bytes((len(literal) - 1,)) + literal for literal in literals)
