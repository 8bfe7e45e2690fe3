"""Where a state is, and who has it open: known without loading what reads one, which takes longer than to ask."""

from __future__ import annotations

import fcntl
import os
import re
import shlex
import sys
import time
from contextlib import suppress
from pathlib import Path

from hotpixd.store.durable import StateError

_FREE_WITHIN_S = 10.0
"""Who only asks lets go of the lock, also on a small computer; what a killed process has left behind does sooner."""

_BRIEF = "for a moment"


class StateLocked(StateError):  # noqa: N818 - a condition, not a fault
    """Another process has the state open."""

    def __init__(self, message: str, feed: Path | None = None) -> None:
        super().__init__(message)
        self.feed = feed
        """Socket at which that process answers questions. None if it does not."""


def default_state_dir() -> Path:
    """Return the first of $STATE_DIRECTORY (set by systemd), else the user's directory for state."""
    given = os.environ.get("STATE_DIRECTORY", "").split(":")[0]
    if given:
        return Path(given)
    import platformdirs

    return Path(platformdirs.user_state_dir("hotpixd"))


def take(path: Path, *, brief: bool = False) -> int:
    """Take a lock and write into it who we are; return its descriptor. Waits for who has it for a moment only.

    Parameters
    ----------
    brief : whether we do, and so whoever comes meanwhile is to wait

    Raises
    ------
    StateLocked
        If another process has it.
    """
    fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    holder, until = "", 0.0
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            process, feed, passing = _read(fd)
            if process != holder:
                # Of those who ask each has its moment, however many come before us.
                holder, until = process, time.monotonic() + _FREE_WITHIN_S
            # Gone: it was killed while it started a process, which has the lock until it runs its own program.
            if (passing or _is_gone(process)) and time.monotonic() < until:
                time.sleep(0.05)
                continue
            os.close(fd)
            raise StateLocked(f"The state {path.parent} is in use by {process}.", feed) from None
        if not is_at(path, fd):
            # Another state was put into the place of this one meanwhile.
            os.close(fd)
            return take(path, brief=brief)
        announce(fd, None, brief=brief)
        return fd


def is_at(path: Path, fd: int) -> bool:
    """Tell whether a lock that was taken is the one that is there now."""
    with suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(fd), path.stat())
    return False


def release(fd: int) -> None:
    """Give the lock back."""
    # Until the next who takes it has written its name there, nobody may take us for who has it.
    announce(fd, None, brief=True)
    _let_go(fd)


def _let_go(fd: int) -> None:
    """Unlock and close. To close would not do: a process that is being started has the lock, too, until it runs."""
    fcntl.flock(fd, fcntl.LOCK_UN)
    os.close(fd)


def answering(root: Path) -> Path | None:
    """Return at which socket the process that has a state open answers questions; None if there is none."""
    try:
        fd = os.open(root / "lock", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        _, feed, _ = _read(fd)
        if feed is not None:
            # Not tried without need: for this moment nobody else gets it.
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return feed
    except OSError:
        return None
    finally:
        _let_go(fd)
    return None


def _is_gone(process: str) -> bool:
    """Tell whether the process that wrote its name into the lock has ended."""
    named = re.match(r"process (\d+) ", process)
    if named is None:
        return False
    try:
        os.kill(int(named[1]), 0)
    except ProcessLookupError:
        return True
    except (PermissionError, OverflowError):
        return False
    return False


def announce(fd: int, feed: Path | None, *, brief: bool = False) -> None:
    """Write into a lock who holds it, and at which socket it answers questions, or that it has it for a moment only."""
    me = f"process {os.getpid()} ({shlex.join(sys.argv)})".replace("\n", " ")
    more = f"feed {feed}\n" if feed is not None else f"{_BRIEF}\n" if brief else ""
    text = os.fsencode(f"{me}\n{more}")
    with suppress(OSError):  # a full disk: the lock holds without a name in it
        os.pwrite(fd, text, 0)
        os.ftruncate(fd, len(text))


def _read(fd: int) -> tuple[str, Path | None, bool]:
    """Return who holds a lock, at which socket it answers, and whether it has the lock for a moment only."""
    first, _, second = os.fsdecode(os.pread(fd, 65536, 0)).partition("\n")
    process = first.encode("utf-8", "replace").decode().strip() or "another process"
    feed = Path(second.strip().removeprefix("feed ")) if second.startswith("feed ") else None
    return process, feed, second.strip() == _BRIEF
