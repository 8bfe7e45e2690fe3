"""Run the fault campaign: break what can break around the daemon, and compare with what an undisturbed run ends with.

Prints a Markdown table; the exit code is 1 if a row is wrong or a control was not caught, else 0. A control takes a
safeguard out on purpose: the harness must see the difference. From the repository, as root on Linux:

    PYTHONPATH=daemon python tests/faults/campaign.py                      # some minutes
    PYTHONPATH=daemon python tests/faults/campaign.py --long               # everything
    PYTHONPATH=daemon python tests/faults/campaign.py --only kills,disks

A harness is a module in this folder with a function `run(long)` that returns rows. One that is impossible on this
machine (not root, no strace, no FUSE) is named below the table with the reason.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import time
import traceback
from pathlib import Path

HERE = Path(__file__).resolve().parent
HARNESSES = ("kills", "disks", "power", "damage", "fuzz", "shoot", "machine")

# The harnesses and what the tests share are modules without a package, as the tests are.
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parents[1] / "daemon")]

from table import Impossible, Row, markdown


def main(arguments: list[str] | None = None) -> int:
    """Run the harnesses asked for, print the table and return the exit code."""
    parser = argparse.ArgumentParser(description="Run the fault campaign and print its table.")
    parser.add_argument("--long", action="store_true", help="everything, instead of a sample of each")
    parser.add_argument("--only", metavar="NAMES", help=f"some of {', '.join(HARNESSES)}; separated by commas")
    options = parser.parse_args(arguments)
    there = [name for name in HARNESSES if (HERE / f"{name}.py").exists()]
    wanted = options.only.split(",") if options.only else there
    unknown = [name for name in wanted if name not in there]
    if unknown:
        parser.error(f"there is no harness {', '.join(unknown)}; there are {', '.join(there)}")
    rows: list[Row] = []
    sentences = []
    failed = False
    for name in wanted:
        started = time.monotonic()
        try:
            new = harness_rows(name, options.long)
        except Impossible as reason:
            sentences.append(f"{name} was not run: {reason}")
            continue
        except Exception:
            traceback.print_exc()
            sentences.append(f"{name} broke down; its traceback is above.")
            failed = True
            continue
        rows += new
        print(f"{name}: {len(new)} rows in {time.monotonic() - started:.0f} s", file=sys.stderr)
    print(markdown(rows))
    for sentence in sentences:
        print(f"\n{sentence}")
    return 1 if failed or not all(row.as_expected for row in rows) else 0


def harness_rows(name: str, long: bool) -> list[Row]:
    """Run one harness.

    Raises
    ------
    Impossible
        If this machine lacks something for it.
    """
    try:
        return list(importlib.import_module(name).run(long))
    except ModuleNotFoundError as error:
        raise Impossible(f"the Python module {error.name} is missing.") from error


if __name__ == "__main__":
    sys.exit(main())
