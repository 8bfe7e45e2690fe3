"""Arrays that lie in files: what a small computer's memory cannot hold, its disk can."""

from __future__ import annotations

import logging
import math
import mmap
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

log = logging.getLogger(__name__)

_SMALL_BYTES = 1 << 20
"""Arrays below this stay in memory."""


def zeros_in(folder: Path) -> Callable[[tuple[int, ...], DTypeLike], NDArray[Any]]:
    """Return a substitute for `numpy.zeros` whose arrays are mapped from files in a folder.

    The files have no names and end with their arrays, or with the process: nothing of them is state. An array for which
    the disk has no room is made in memory, which the log tells.
    """

    def zeros(shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
        size = math.prod(shape) * np.dtype(dtype).itemsize
        if size < _SMALL_BYTES:
            return np.zeros(shape, dtype)
        try:
            with tempfile.TemporaryFile(dir=folder) as file:
                # A hole for which there is no block when it is written to would end the process.
                os.posix_fallocate(file.fileno(), 0, size)
                mapped = mmap.mmap(file.fileno(), size)
        except OSError as error:
            log.warning(
                "%.0f MB of the statistic are kept in memory: %s cannot hold them (%s)",
                size / 1e6, folder, error.strerror,
            )  # fmt: skip
            return np.zeros(shape, dtype)
        return np.frombuffer(mapped, dtype).reshape(shape)

    return zeros
