"""Changes samples of a FITS file where they lie; its headers stay, but for the checksums that cover the samples."""

from __future__ import annotations

import io
import warnings
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hotpixd.core.frame import Frame
from hotpixd.views.rewriting.errors import RewriteError

_TYPES = {8: ">u1", 16: ">i2", 32: ">i4", -32: ">f4", -64: ">f8"}
_CARD = 80


def rewritten(data: bytes, frame: Frame, sites: NDArray[np.int64], values: NDArray[np.generic]) -> bytes:
    """Return the file with other samples; see `rewriting.rewritten`."""
    try:
        number, header, header_at, data_at = _unit(data)
        out = bytearray(data)
        _change(out, header, data_at, frame, sites, values)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RewriteError("the FITS file is damaged; copy it from the camera again") from error
    if "CHECKSUM" in header or "DATASUM" in header:
        _renew_checksums(out, number, header_at, data_at)
    return bytes(out)


def _unit(data: bytes) -> tuple[int, dict[str, Any], int, int]:
    """Return the number of the unit with the picture, its header, and where header and samples begin."""
    from astropy.io import fits

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with fits.open(io.BytesIO(data), memmap=False, disable_image_compression=True) as units:
            for number, unit in enumerate(units):
                shape: tuple[int, ...] = getattr(unit, "shape", ())
                if unit.is_image and (len(shape) == 2 or (len(shape) == 3 and shape[0] == 3)):
                    info = unit.fileinfo()
                    return number, dict(unit.header), info["hdrLoc"], info["datLoc"]
    raise RewriteError("the picture in this FITS file is compressed; unpack it (funpack) first")


def _change(
    out: bytearray,
    header: dict[str, Any],
    data_at: int,
    frame: Frame,
    sites: NDArray[np.int64],
    values: NDArray[np.generic],
) -> None:
    layout = frame.sensor.layout
    dtype = np.dtype(_TYPES[header["BITPIX"]])
    stored = np.frombuffer(out, dtype, count=layout.size, offset=data_at)
    stored = stored.reshape(layout.channels, layout.height, layout.width)
    rows, columns = np.divmod(sites, layout.shape[1])
    if str(header.get("ROWORDER", "")).strip().upper() != "TOP-DOWN":
        # The standard counts rows from the bottom.
        rows = layout.height - 1 - rows
    place = columns % layout.channels, rows, columns // layout.channels
    scale, zero = float(header.get("BSCALE", 1)), float(header.get("BZERO", 0))
    if (stored[place] * scale + zero != frame.samples.reshape(-1)[sites]).any():
        raise RewriteError("the samples do not lie in this FITS file as they were decoded")
    stored[place] = (values.astype(np.float64) - zero) / scale


def _renew_checksums(out: bytearray, number: int, header_at: int, data_at: int) -> None:
    """Write the checksums of a unit anew, in place."""
    from astropy.io import fits

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with fits.open(
            io.BytesIO(bytes(out)), memmap=False, disable_image_compression=True, do_not_scale_image_data=True
        ) as units:
            unit = units[number]
            unit.add_checksum()
            cards = {key: unit.header.cards[key].image for key in ("DATASUM", "CHECKSUM")}
    for at in range(header_at, data_at, _CARD):
        key = bytes(out[at : at + 8]).decode("ascii", "replace").strip()
        if key in cards:
            out[at : at + _CARD] = cards[key].encode("ascii")
