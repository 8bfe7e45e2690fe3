"""strace as a saboteur: a command dies before its Nth call of a name, or that call fails, or takes its time.

strace counts the calls of a name for each thread by itself, and of those only
the ones that touch the paths it is given. So the points are those at which the
state directory is changed, wherever the interpreter keeps its compiled files.
It matches whole paths: an undisturbed run says which there are.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from table import Impossible

CHANGING = (
    "write", "pwrite64", "writev", "pwritev", "pwritev2", "copy_file_range", "sendfile", "fallocate", "ftruncate",
    "truncate", "fsync", "fdatasync", "sync_file_range", "syncfs", "rename", "renameat", "renameat2", "link", "linkat",
    "symlink", "symlinkat", "unlink", "unlinkat", "mkdir", "mkdirat", "rmdir",
)  # fmt: skip
"""Every call by which a process changes files and folders, or has them put on the disk."""

_CALL = re.compile(r"(?P<thread>\d+) +(?P<name>\w+)\((?P<rest>.*)")
_PATH = re.compile(r'[<"](/[^<>"]*)[>"]')


@dataclass(frozen=True)
class Traced:
    """How an undisturbed run changes a folder."""

    calls: Mapping[str, int]
    """Most calls of each name that one thread makes; none where there are none."""

    paths: tuple[str, ...]
    """All that it touches below the folder, relative to it; "." is the folder."""


def check() -> None:
    """Raise `Impossible` if this machine has no strace, or does not let it trace."""
    if shutil.which("strace") is None:
        raise Impossible("strace is missing (apt install strace).")
    tried = subprocess.run(
        ["strace", "-qq", "-o", "/dev/null", "-e", "trace=write", "-e", "inject=write:error=EIO:when=1", "echo", "x"],
        capture_output=True,
    )
    if tried.returncode != 1:
        raise Impossible(f"strace may not trace here: {tried.stderr.decode(errors='replace').strip()}")


def tracer(log: Path) -> list[str]:
    """Return what to put before a command so that `traced` can read from the log how it changes files."""
    return ["strace", "-D", "-f", "-qq", "-y", "-s", "4096", "-o", str(log), "-e", "trace=" + ",".join(CHANGING)]


def traced(log: Path, folder: Path) -> Traced:
    """Read a log of `tracer`: what was done below a folder."""
    most: Counter[tuple[str, str]] = Counter()
    paths = {"."}
    top = f"{folder}/"
    for line in log.read_text("utf-8", "replace").splitlines():
        call = _CALL.match(line)
        if call is None:
            continue
        # Not what is written, which may quote a path.
        before = call["rest"].split(', "')[0] if "write" in call["name"] else call["rest"]
        touched = [path for path in _PATH.findall(before) if path == str(folder) or path.startswith(top)]
        if touched:
            most[call["thread"], call["name"]] += 1
            paths.update(str(Path(path.removesuffix(" (deleted)")).relative_to(folder)) for path in touched)
    calls: dict[str, int] = {}
    for (_, name), count in most.items():
        calls[name] = max(count, calls.get(name, 0))
    return Traced(calls, tuple(sorted(paths)))


def saboteur(
    folder: Path, paths: Iterable[str], *faults: str, fast: bool = False, log: Path = Path("/dev/null")
) -> list[str]:
    """Return what to put before a command so that its calls on some paths below a folder go wrong.

    Parameters
    ----------
    faults : as strace's --inject takes them, for example "fsync:signal=KILL:when=3"
    fast : stop at no other calls. Signals are not delivered then (strace 6.1)
    log : what was done to which call; see `hit`
    """
    names = ",".join(fault.partition(":")[0] for fault in faults)
    filters = [part for path in paths for part in ("-P", str(folder / path))]
    injected = [part for fault in faults for part in ("-e", f"inject={fault}")]
    speed = ["--seccomp-bpf"] if fast else []
    return ["strace", "-D", "-f", "-qq", *speed, "-o", str(log), *filters, "-e", f"trace={names}", *injected]


def hit(log: Path) -> bool:
    """Tell from a saboteur's log whether anything went wrong."""
    return log.exists() and "(INJECTED)" in log.read_text("utf-8", "replace")


def each(calls: Mapping[str, int], every: Mapping[str, int] | None = None) -> Sequence[tuple[str, int]]:
    """Return the points (name, N) of a run, some more than it had: their number varies a little from run to run.

    Parameters
    ----------
    every : of which names only every so-manieth is wanted
    """
    points = []
    for name, count in sorted(calls.items()):
        step = (every or {}).get(name, 1)
        points += [(name, n) for n in range(1, count + 4, step)]
    return points
