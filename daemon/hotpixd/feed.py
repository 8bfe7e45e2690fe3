"""Live state for other processes: lines of JSON over a unix socket, and the client that reads them.

Each line is one object. The server greets with ``{"type":"hello","proto":1,...}``, with its pid and
systemd's `invocation` (null if that did not start it). A client may send:

- ``{"ask":"watch"}`` and gets ``{"type":"snapshot","n":17,"set":{key:value,...}}``, then
  ``{"type":"change","n":18,"set":{...},"gone":[...]}`` as things change, at most ten per second, and an empty change
  after five seconds of nothing, so that a dead daemon or a dead link is told from a quiet one;
- ``{"ask":NAME,"id":any,...arguments}`` and gets ``{"type":"answer","id":same,"answer":{...}}`` or
  ``{"type":"error","id":same,"error":sentence}``, in any order. What can be asked is the daemon's business.

An error without an id is about the connection, which is closed then. ``{"type":"bye"}`` is the last line of a daemon
that stops. Unknown fields and types are to be ignored; `proto` changes when that is not enough. A client leaves by
closing, even if it is only its writing side.

A client that reads slowly gets fewer and newer changes: what it misses is never queued, since a change is made up
from what the client has when it can take one. The mode of the socket file decides who may connect, and read; the
kernel says who that is. What changes anything is refused to all but root, the daemon's own user and the members of the
socket's group, should others be let in as well.

A hostile client costs the daemon little: connections are few, per user and in all, and are accepted at a limited rate;
who says nothing whole is dropped, and so is who does not take what it has asked for; each user's questions have their
turn one by one.
"""

from __future__ import annotations

import json
import os
import socket
import stat
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from blake3 import blake3

PROTO = 1
"""Version of the protocol: changes only when an older client could no longer understand."""

LONGEST_LINE = 64 * 1024
"""Bytes of a line from a client, and of a hello."""

_SILENCE_S = 15.0
"""Longer silence of a daemon that is watched, three heartbeats, means that it or the link has gone."""

Live = Mapping[str, Any]
"""The merged live state, as a client sees it."""


class FeedError(ConnectionError):
    """The feed cannot be served or followed, or a question was refused; a sentence for people."""


class DaemonGone(FeedError):  # noqa: N818 - a condition, not a fault
    """No daemon is there, or not any more: what it was asked last may have no answer, but may be done."""


def as_json(value: Any) -> bytes:
    """Encode a value as JSON.

    As ASCII: names of files may hold bytes that are not UTF-8, as surrogates, and only escapes can carry them. NaN
    is refused, since JSON has none and a client in another language would choke on it.
    """
    return json.dumps(value, separators=(",", ":"), allow_nan=False).encode("ascii")


# The client


class FeedClient:
    """A client of a daemon's feed. `watch` and `ask` may be used by different threads, `close` by any.

    `watch` has a connection of its own, so that an answer need not wait for a change nor a change for an answer.

    Parameters
    ----------
    path : socket file
    timeout_s : for the daemon to say hello

    Raises
    ------
    FeedError
        If no daemon answers there that this program understands.
    """

    def __init__(self, path: Path, timeout_s: float = 5.0) -> None:
        self._path = path
        self._timeout_s = timeout_s
        self._closing = threading.Lock()
        self._closed = False
        self._open: set[_Line] = set()
        self._asking = threading.Lock()
        self._asked = 0
        self._line = self._connect()
        self.hello: Mapping[str, Any] = self._line.hello

    def ask(self, name: str, /, timeout_s: float = 600.0, **arguments: Any) -> dict[str, Any]:
        """Ask the daemon, and wait for its answer.

        Raises
        ------
        FeedError
            If it refuses, has gone, or says nothing for `timeout_s`.
        """
        with self._asking:
            self._asked += 1
            id_ = self._asked
            if self._line.has_ended() and not self._closed:
                # Who has not asked anything for a minute is dropped.
                before, self._line = self._line, self._connect()
                self._disconnect(before)
            self._line.send({**arguments, "ask": name, "id": id_}, timeout_s)
            while True:
                message = self._line.read(timeout_s)
                # Others may come late, to questions that were given up.
                if message.get("id") == id_:
                    break
        if message["type"] == "error":
            raise FeedError(str(message.get("error")))
        answer = message.get("answer")
        if not isinstance(answer, dict):
            raise self._line.foreign()
        return answer

    def watch(self) -> Iterator[Live]:
        """Yield the live state now, after each change, and at each heartbeat. Ends when the client is closed.

        Raises
        ------
        FeedError
            When the daemon has gone, or nothing came for 15 s.
        """
        line = None
        live: dict[str, Any] = {}
        try:
            line = self._connect()
            line.send({"ask": "watch"}, self._timeout_s)
            while True:
                message = line.read(_SILENCE_S)
                if message["type"] == "snapshot":
                    live = {}
                elif message["type"] != "change":
                    continue
                changed, gone = message.get("set"), message.get("gone", [])
                if not isinstance(changed, dict) or not isinstance(gone, list):
                    raise line.foreign()
                # Never changed in place: another thread may be drawing the one before.
                live = {key: value for key, value in {**live, **changed}.items() if key not in gone}
                yield live
        except FeedError:
            if not self._closed:
                raise
        finally:
            if line is not None:
                self._disconnect(line)

    def close(self) -> None:
        """Leave. What another thread waits for here ends at once."""
        with self._closing:
            self._closed = True
            for line in self._open:
                line.hang_up()
        with self._asking:
            self._disconnect(self._line)

    def _connect(self) -> _Line:
        line = _Line(self._path, self._timeout_s)
        with self._closing:
            self._open.add(line)
            if self._closed:
                line.hang_up()
        return line

    def _disconnect(self, line: _Line) -> None:
        with self._closing:
            self._open.discard(line)
        line.close()


class _Line:
    """A connection to a daemon that has said hello."""

    def __init__(self, path: Path, timeout_s: float) -> None:
        self._path = path
        self._received = bytearray()
        self._socket = _connected(path, timeout_s)
        try:
            self.hello = self.read(timeout_s, LONGEST_LINE)
            if self.hello["type"] != "hello" or self.hello.get("app") != "hotpixd":
                raise self.foreign()
            if (proto := self.hello.get("proto")) != PROTO:
                raise FeedError(
                    f"The daemon at {path} speaks version {proto} of the protocol, this program {PROTO}: one of them is"
                    " out of date."
                )
        except BaseException:
            self.close()
            raise

    def send(self, message: Mapping[str, Any], timeout_s: float) -> None:
        """Send one object."""
        try:
            self._socket.settimeout(timeout_s)
            self._socket.sendall(as_json(message) + b"\n")
        except OSError as error:
            raise self._gone() from error

    def read(self, silence_s: float, longest: int | None = None) -> dict[str, Any]:
        """Return the next object, of at most `longest` bytes, waiting so long for each part of it.

        Raises
        ------
        FeedError
            Also if it is a goodbye or a complaint about this connection.
        """
        searched = 0
        while (end := self._received.find(b"\n", searched)) < 0:
            searched = len(self._received)
            if longest is not None and searched > longest:
                raise self.foreign()
            try:
                self._socket.settimeout(silence_s)
                received = self._socket.recv(256 * 1024)
            except TimeoutError as error:
                raise FeedError(f"The daemon at {self._path} has said nothing for {silence_s:g} s.") from error
            except OSError as error:
                raise self._gone() from error
            if not received:
                raise self._gone()
            self._received += received
        line = bytes(self._received[:end])
        del self._received[: end + 1]
        try:
            message = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise self.foreign() from error
        if not isinstance(message, dict) or "type" not in message:
            raise self.foreign()
        if message["type"] == "bye":
            raise DaemonGone(f"The daemon at {self._path} has stopped.")
        if message["type"] == "error" and "id" not in message:
            raise FeedError(f"The daemon at {self._path} refuses: {message.get('error')}")
        return message

    def has_ended(self) -> bool:
        """Tell whether the other side has closed the connection."""
        try:
            # With a time limit, recv would wait for something to come.
            self._socket.setblocking(False)
            return not self._socket.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return False
        except OSError:
            return True

    def hang_up(self) -> None:
        """End the connection from any thread. The socket stays, so that no reader finds another's in its place."""
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Free the socket, which no other thread may be using."""
        self._socket.close()

    def foreign(self) -> FeedError:
        """Return what to raise when something is said that no daemon says."""
        return FeedError(f"What answers at {self._path} is not hotpixd.")

    def _gone(self) -> DaemonGone:
        return DaemonGone(f"The daemon at {self._path} has gone.")


def _connected(path: Path, timeout_s: float) -> socket.socket:
    until = time.monotonic() + timeout_s
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.settimeout(timeout_s)
    try:
        while True:
            try:
                connection.connect(str(path))
            except BlockingIOError:
                # More clients are waiting there than it takes at a time: the kernel has no way to wait for that.
                if time.monotonic() > until:
                    raise
                time.sleep(0.02)
            else:
                return connection
    except PermissionError as error:
        connection.close()
        raise FeedError(f"The daemon's socket {path} is closed to this user; its group may use it.") from error
    except (FileNotFoundError, ConnectionError) as error:
        connection.close()
        raise DaemonGone(f"No daemon answers at {path}: {error.strerror or error}.") from error
    except OSError as error:
        connection.close()
        raise FeedError(f"No daemon answers at {path}: {error.strerror or error}.") from error


# Where the socket is


def default_socket(state: Path, environ: Mapping[str, str]) -> Path:
    """Return where the daemon of a state listens unless it is told: in its service's or the user's runtime directory.

    The user's is made if it is missing.

    Raises
    ------
    FeedError
        If others could put a socket of theirs there.
    """
    for folder in _runtime_directories(environ):
        return folder / "feed.sock"
    folder = _user_folder(environ)
    for level in (folder.parent, folder):
        _make_private(level)
    return folder / f"{blake3(os.fsencode(state.resolve())).hexdigest()[:12]}.sock"


def find_sockets(environ: Mapping[str, str]) -> list[Path]:
    """Return where daemons answer: of this service, of this user, of the system, in this order."""
    system = Path("/run/hotpixd")
    found = [folder / "feed.sock" for folder in _runtime_directories(environ)]
    with suppress(OSError):  # closed to this user
        found += sorted(_user_folder(environ).glob("*.sock"))
    found.append(system / "feed.sock")
    with suppress(OSError):
        found += sorted(system.glob("*/feed.sock"))
    living = []
    for path in dict.fromkeys(found):
        with suppress(OSError):
            if answers(path):
                living.append(path)
    return living


def _runtime_directories(environ: Mapping[str, str]) -> list[Path]:
    """Return what systemd made for this service."""
    return [Path(name) for name in environ.get("RUNTIME_DIRECTORY", "").split(":") if name]


def _user_folder(environ: Mapping[str, str]) -> Path:
    """Return the folder for this user's sockets. Not by platformdirs, which warns where there is no session."""
    given = Path(environ.get("XDG_RUNTIME_DIR") or f"/run/user/{os.geteuid()}")
    if given.is_absolute() and given.is_dir():
        return given / "hotpixd"
    return Path(tempfile.gettempdir()) / f"runtime-{os.geteuid()}" / "hotpixd"


def _make_private(folder: Path) -> None:
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
    except OSError as error:
        raise FeedError(f"The folder {folder} for sockets cannot be made: {error.strerror}.") from error
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o022:
        raise FeedError(f"The folder {folder} for sockets can be changed by others; it must be this user's alone.")


def answers(path: Path) -> bool:
    """Tell whether somebody listens at a socket.

    Raises
    ------
    OSError
        If that cannot be known.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(str(path))
        except (FileNotFoundError, ConnectionRefusedError):
            return False
        except BlockingIOError:  # more clients are waiting there than it takes at a time
            return True
    return True
