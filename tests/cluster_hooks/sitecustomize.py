"""Found by the interpreter of a worker when a test puts this folder on its path: some files end it."""

import os
import signal
import sys
from pathlib import Path


def _install() -> None:
    from hotpixd.cluster import worker

    real = worker._is_to_be_decoded

    def is_to_be_decoded(chunk, place, wanted, copy, before):
        if real(chunk, place, wanted, copy, before):
            if Path(wanted.url).read_bytes().endswith(b"DEADLY"):
                os.kill(os.getpid(), signal.SIGKILL)
            return True
        return False

    worker._is_to_be_decoded = is_to_be_decoded


if "spawn_main" in " ".join(sys.orig_argv):
    _install()
