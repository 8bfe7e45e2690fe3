"""Fuzz one target, guided by the coverage of the program's own code.

::

    pip install -e '.[fuzz,test]'
    PYTHONPATH=daemon python tests/fuzz/run.py TARGET [--seconds N] [--keep FOLDER]

New inputs that reach new code go to a folder of their own (`--keep`: this one, which stays); what is found is written
to the working directory as `crash-...`. Replay it with `run.py TARGET FILE`. The corpus in the repository is only read.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parent / "faults")]


def main() -> None:
    """Run the command."""
    import atheris

    with atheris.instrument_imports(include=["hotpixd"]):
        import targets

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("target", choices=targets.TARGETS)
    parser.add_argument("files", nargs="*", type=Path, help="replay these instead")
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--keep", type=Path)
    options = parser.parse_args()
    target = targets.TARGETS[options.target]
    if options.files:
        for path in options.files:
            target(path.read_bytes())
            print(path, "ends well")
        targets.remove_files()
        return
    found = options.keep or Path(tempfile.mkdtemp(prefix="hotpixd-corpus-"))
    found.mkdir(exist_ok=True)
    arguments = [
        sys.argv[0],
        f"-max_total_time={options.seconds}",
        "-timeout=20",
        "-rss_limit_mb=3000",
        "-max_len=30000",
        "-print_final_stats=1",
        "-verbosity=1",
        "-reload=0",
        str(found),
        str(HERE / "corpus" / options.target),
    ]
    # In a process of its own: the fuzzer ends it without a word to Python.
    child = os.fork()
    if child == 0:
        atheris.Setup(arguments, target)
        atheris.Fuzz()
    _, status = os.waitpid(child, 0)
    targets.remove_files()
    if options.keep is None:
        shutil.rmtree(found, ignore_errors=True)
    sys.exit(os.waitstatus_to_exitcode(status))


if __name__ == "__main__":
    main()
