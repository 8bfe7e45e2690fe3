"""Picture files with a few samples changed and everything else as it was: one module per kind of file."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from hotpixd.core.frame import Frame
from hotpixd.views.rewriting.errors import RewriteError

_TIFF_STARTS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")


def is_jpeg(data: bytes) -> bool:
    """Tell whether a file is a JPEG, by its content."""
    return data[:3] == b"\xff\xd8\xff"


def rewritten(data: bytes, frame: Frame, sites: NDArray[np.int64], values: NDArray[np.generic]) -> bytes:
    """Return a file, other than a JPEG, with other samples.

    Parameters
    ----------
    data : the file
    frame : what it was decoded to
    sites : (K,) flat indices of the samples to change
    values : (K,) what they become

    Raises
    ------
    RewriteError
        If it is of a kind that cannot be written, or its samples do not lie in it as they were decoded.
    """
    if data[:8] == b"\x89PNG\r\n\x1a\n":
        from hotpixd.views.rewriting import png

        return png.rewritten(data, frame, sites, values)
    if data[:9] == b"SIMPLE  =":
        from hotpixd.views.rewriting import fits

        return fits.rewritten(data, frame, sites, values)
    if data[:4] in _TIFF_STARTS:
        from hotpixd.views.rewriting import tiff

        return tiff.rewritten(data, frame, sites, values)
    raise RewriteError(
        "camera raw files of this kind cannot be written; convert it to DNG, or give the map to your raw converter"
    )
