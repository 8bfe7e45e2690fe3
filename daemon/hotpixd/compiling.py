"""The kernels, compiled or loaded beside the daemon's loop: on a small computer the first start takes minutes of it."""

from __future__ import annotations

import time
from concurrent.futures import Future, ThreadPoolExecutor

from hotpixd.core.sensor import warm_up
from hotpixd.store.durable import FULL

_PAUSE_S = 0.1
"""Between two tries where the disk is too full for the cache."""

_LOADED_WITHIN_S = 4.0
"""What takes longer is compiling."""


class Kernels:
    """Has the kernels made ready for use in a thread of its own, which cannot be stopped."""

    def __init__(self) -> None:
        self._beside = ThreadPoolExecutor(1, "kernels")
        self._started_at = 0.0
        self.ready: Future[None] = Future()
        """Done when they can be used; holds what went wrong if they never can."""

    def start(self) -> None:
        """Begin."""
        self._started_at = time.monotonic()
        self.ready = self._beside.submit(_make_ready)

    @property
    def in_the_making(self) -> bool:
        """Whether the thread is at it."""
        return self.ready.running()

    @property
    def are_late(self) -> bool:
        """Whether they are surely compiled and not loaded: that takes longer."""
        return self.in_the_making and time.monotonic() - self._started_at > _LOADED_WITHIN_S


def _make_ready() -> None:
    while True:
        try:
            warm_up()
            return
        except OSError as error:
            if error.errno not in FULL:
                raise
            # Each one that could not be written down is in memory now, and is not compiled again.
            time.sleep(_PAUSE_S)
