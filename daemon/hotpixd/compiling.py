"""The kernels, compiled or loaded beside the daemon's loop: on a small computer the first start takes minutes of it."""

from __future__ import annotations

import threading
import time
from concurrent.futures import Future

from hotpixd.core.sensor import warm_up
from hotpixd.store.durable import FULL

_PAUSE_S = 0.1
"""Between two tries where the disk is too full for the cache."""

_LOADED_WITHIN_S = 4.0
"""What takes longer is compiling."""


class Kernels:
    """Has the kernels made ready for use in a thread of its own, which cannot be stopped."""

    def __init__(self) -> None:
        self.ready: Future[None] = Future()
        """Done when they can be used; holds what went wrong if they never can."""
        # Not a daemon thread: Python cannot end while one of those compiles.
        self._thread = threading.Thread(target=self._make_ready, name="kernels")
        self._started_at = time.monotonic()

    def start(self) -> None:
        """Begin."""
        self._started_at = time.monotonic()
        self._thread.start()

    @property
    def in_the_making(self) -> bool:
        """Whether the thread is at it."""
        return self._thread.is_alive()

    @property
    def are_late(self) -> bool:
        """Whether they are surely compiled and not loaded: that takes longer."""
        return not self.ready.done() and time.monotonic() - self._started_at > _LOADED_WITHIN_S

    def _make_ready(self) -> None:
        while True:
            try:
                warm_up()
            except OSError as error:
                if error.errno in FULL:
                    # Each one that could not be written down is in memory now, and is not compiled again.
                    time.sleep(_PAUSE_S)
                    continue
                self.ready.set_exception(error)
            except BaseException as error:
                self.ready.set_exception(error)
            else:
                self.ready.set_result(None)
            return
