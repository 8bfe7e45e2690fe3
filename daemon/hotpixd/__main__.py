"""Where the command begins: `python -m hotpixd` is `hotpixd`."""

import os
import signal
import sys

_INTERRUPTED = 128 + signal.SIGINT
"""Exit code after Ctrl-C, as shells have it."""


def main() -> None:
    """Run the command line; Ctrl-C while it is being loaded ends it without a word."""
    # Else our caller has it ignored.
    ends_us = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if ends_us:
        # Not as an exception: some callbacks of an import print one and go on.
        signal.signal(signal.SIGINT, lambda *_: os._exit(_INTERRUPTED))
    from hotpixd.cli import main as run

    if ends_us:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        run()
    except KeyboardInterrupt:
        # Between that and the command's own beginning.
        sys.exit(_INTERRUPTED)


if __name__ == "__main__":
    main()
