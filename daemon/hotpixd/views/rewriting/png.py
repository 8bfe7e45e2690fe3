"""Changes samples of a PNG: its picture data are made anew, every other chunk is kept byte by byte.

References
----------
W3C, Portable Network Graphics (second edition), 5: chunks.
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from hotpixd.core.frame import Frame
from hotpixd.views.rewriting.errors import RewriteError

_BROKEN = "the PNG file is damaged; copy it from the camera again"


def rewritten(data: bytes, frame: Frame, sites: NDArray[np.int64], values: NDArray[np.generic]) -> bytes:
    """Return the file with other samples; see `rewriting.rewritten`."""
    from PIL import Image, PngImagePlugin

    try:
        with PngImagePlugin.PngImageFile(io.BytesIO(data)) as image:
            image.load()
            mode, pixels = image.mode, np.array(image)
        chunks = list(_chunks(data))
    except (OSError, SyntaxError, ValueError, struct.error) as error:
        raise RewriteError(_BROKEN) from error
    layout = frame.sensor.layout
    # Grey with alpha, or RGB with alpha: what is no sample of ours stays.
    every = pixels.reshape(layout.height, layout.width, -1)
    rows, columns = np.divmod(sites, layout.shape[1])
    every[rows, columns // layout.channels, columns % layout.channels] = values
    made = io.BytesIO()
    # A mode of two bytes per sample comes back as it went in.
    Image.frombytes(mode, (layout.width, layout.height), pixels.tobytes()).save(made, "PNG")
    made_chunks = list(_chunks(made.getvalue()))
    header, made_header = chunks[0][1], made_chunks[0][1]
    if header[:12] != made_header[:12]:
        raise RewriteError("this PNG stores its samples in a way that cannot be written")
    out = bytearray(data[:8]) + _chunk(b"IHDR", made_header)
    written = False
    for kind, content in chunks[1:]:
        if kind != b"IDAT":
            out += _chunk(kind, content)
        elif not written:
            out += _chunk(b"IDAT", b"".join(part for name, part in made_chunks if name == b"IDAT"))
            written = True
    return bytes(out)


def _chunks(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    at = 8
    while at < len(data):
        (size,) = struct.unpack_from(">I", data, at)
        kind, content = data[at + 4 : at + 8], data[at + 8 : at + 8 + size]
        if len(content) != size:
            raise ValueError("a chunk is cut off")
        yield kind, content
        if kind == b"IEND":
            return
        at += 12 + size


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
