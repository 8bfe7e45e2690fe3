"""The daemon's side of the feed: see `feed` for what is said."""

from __future__ import annotations

import asyncio
import grp
import json
import logging
import os
import pwd
import socket
import struct
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from hotpixd import __version__
from hotpixd.feed import LONGEST_LINE, PROTO, FeedError, answers, as_json

log = logging.getLogger(__name__)

_LONGEST_PATH = 107
"""Bytes of a socket's path that fit the kernel's sockaddr_un."""

_MOST_CONNECTIONS = 64

_MOST_OF_A_USER, _MOST_OF_OTHERS = 24, 56
"""Connections of one user, and of all: root and the daemon's own user can always have those that are left."""

_ACCEPTED_PER_S, _ACCEPTED_AT_ONCE = 200.0, 64
"""Rate at which connections are accepted, and how many more may come at once: each costs time of the whole process."""

_SILENT_S = 60.0
"""Who has not said one whole line after so long is dropped."""

_MOST_REPLY_BYTES = 64 * 1024 * 1024
"""Of answers that wait for their clients to take them, in all. Whoever lets more pile up is dropped."""

CHANGING = frozenset(
    ("darks", "set", "end-series", "list-cards", "declare", "undeclare", "backup", "backup-part", "backup-end")
)
"""Questions that have something done, or whose answer holds pictures."""

_MOST_UNANSWERED = 4
"""Questions of one connection that wait at the same time. It is not read on before one is answered."""

_CHANGES_PER_S, _CHANGES_AT_ONCE = 10.0, 4
"""Lines that a client gets at most; a shot makes up to four: it arrives, is taken in, is folded, and nothing waits."""

_ACCEPT_AGAIN_S = 1.0
"""Pause after a connection could not be accepted, for want of file descriptors most likely."""

_GOODBYE_WITHIN_S = 1.0

_STOP_WITHIN_S = 5.0


class _Published(NamedTuple):
    """What is published; replaced, never changed, so that it can be read without a lock."""

    n: int
    """Number of the last change."""

    pairs: Mapping[str, tuple[int, bytes]]
    """By key: the number of the change that set it, and ``"key":value`` as JSON."""


@dataclass(frozen=True, slots=True, eq=False)
class Question:
    """What a client wants to know. To be answered or refused once, from any thread; the client may have gone."""

    name: str

    arguments: Mapping[str, Any]
    """What else the client sent. Not checked."""

    _id: bytes
    """The client's id for it, as JSON. Encoded on arrival: a hostile one must not fail where it is answered."""

    _asker: _Connection

    @property
    def is_allowed(self) -> bool:
        """Whether who asks may ask that."""
        return self.name not in CHANGING or self._asker.may_change

    @property
    def is_gone(self) -> bool:
        """Whether who asks has left."""
        return self._asker.gone

    def answer(self, answer: Mapping[str, Any]) -> None:
        """Send the answer."""
        self._asker.reply(b'{"type":"answer","id":%b,"answer":%b}\n' % (self._id, as_json(answer)))

    def refuse(self, sentence: str) -> None:
        """Send why there is no answer."""
        self._asker.reply(b'{"type":"error","id":%b,"error":%b}\n' % (self._id, as_json(sentence)))


class FeedServer:
    """Serves the live state in a thread of its own; nothing here makes the caller wait for a client.

    Parameters
    ----------
    path : socket file
    hello : what the greeting tells beside protocol, version and pid
    wake : called in the feed's thread when a question or a new watcher has come
    group : name of the group that may connect. None: leave it to the system
    stuck_s : a client that takes nothing for so long is dropped
    heartbeat_s : silence after which an empty change is sent
    silent_s : a client that has not said one whole line by then is dropped
    """

    def __init__(
        self,
        path: Path,
        hello: Mapping[str, Any],
        wake: Callable[[], None],
        *,
        group: str | None = None,
        stuck_s: float = 30.0,
        heartbeat_s: float = 5.0,
        silent_s: float = _SILENT_S,
    ) -> None:
        self.path = path
        self._silent_s = silent_s
        self._uid = os.geteuid()
        self._wake = wake
        self._stuck_s = stuck_s
        self._heartbeat_s = heartbeat_s
        greeting = {"type": "hello", "proto": PROTO, "app": "hotpixd", "version": __version__, "pid": os.getpid()}
        # systemd's name for this run, by which its journal can be asked for.
        invocation = os.environ.get("INVOCATION_ID") or None
        self._hello = as_json({**greeting, "invocation": invocation, **hello}) + b"\n"
        self._published = _Published(0, {})
        self._waiting: deque[Question] = deque()
        self._served: dict[int, int] = {}
        """How many questions of each user were taken, while any wait."""
        self._reply_bytes = 0
        self._watching: set[_Connection] = set()
        self._group = group
        self._publishing = threading.Lock()
        self._told = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._socket_file: os.stat_result | None = None
        self._stopping = asyncio.Event()
        self._connections: dict[asyncio.Task[None], _Connection] = {}
        self._fault: Exception | None = None

    def start(self) -> None:
        """Begin to listen. The socket has mode 0660 before anybody can connect; a dead daemon's is replaced.

        Raises
        ------
        FeedError
            If its path is too long or cannot be bound, or another daemon listens there.
        """
        listener = _listen(self.path, self._group)
        self._socket_file = self.path.stat()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, args=(self._loop, listener), name="feed", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Say goodbye to all clients, and remove the socket file unless it is another daemon's by now."""
        if self._loop is None or self._thread is None:
            return
        self.remove_file()
        self._call(self._stopping.set)
        self._thread.join(_STOP_WITHIN_S)
        self._thread = None

    def remove_file(self) -> None:
        """Remove the socket file unless it is another daemon's by now: nobody new connects."""
        with suppress(OSError):
            if self._socket_file is not None and os.path.samestat(self.path.stat(), self._socket_file):
                self.path.unlink()

    def publish(self, changes: Mapping[str, Any], gone: Iterable[str] = ()) -> None:
        """Set some keys of the live state and remove others; from any thread. An equal value is no change.

        Raises
        ------
        TypeError, ValueError
            If a value cannot be said in JSON; NaN and infinity cannot.
        """
        encoded = {key: as_json(key) + b":" + as_json(value) for key, value in changes.items()}
        removed = set(gone)
        with self._publishing:
            n, pairs = self._published
            n += 1
            changed = {
                key: (n, pair)
                for key, pair in encoded.items()
                if key not in removed and (key not in pairs or pairs[key][1] != pair)
            }
            if not changed and removed.isdisjoint(pairs):
                return
            kept = {key: pair for key, pair in pairs.items() if key not in removed}
            self._published = _Published(n, {**kept, **changed})
            # One call for however many changes until it runs.
            if self._loop is not None and not self._told:
                self._told = True
                self._call(self._tell)

    @property
    def watchers(self) -> int:
        """Number of clients that watch."""
        return len(self._watching)

    @property
    def asked(self) -> bool:
        """Whether any question waits."""
        return bool(self._waiting)

    def questions(self) -> Iterator[Question]:
        """Take the questions that wait, but for those of clients that have gone: of each user one in turn.

        Those who may not ask what they do are refused here.

        Raises
        ------
        RuntimeError
            If the feed's thread has died: that must not stay unnoticed.
        """
        if self._fault is not None:
            raise RuntimeError(f"The feed at {self.path} has broken down: {self._fault!r}.") from self._fault
        for _ in range(len(self._waiting)):
            question = self._next_question()
            if question is None:
                return
            if question.is_allowed:
                yield question
            else:
                question.refuse(f"{question.name!r} is for members of the socket's group only.")

    def _next_question(self) -> Question | None:
        """Take the oldest question of the user of whom the fewest were taken lately."""
        waiting = list(self._waiting)
        for question in [question for question in waiting if question._asker.gone]:
            waiting.remove(question)
            self._waiting.remove(question)
        if not waiting:
            self._served.clear()
            return None
        question = min(waiting, key=lambda question: self._served.get(question._asker.uid, 0))
        self._waiting.remove(question)
        self._served[question._asker.uid] = self._served.get(question._asker.uid, 0) + 1
        return question

    def _call(self, function: Callable[[], None]) -> None:
        if self._loop is not None:
            with suppress(RuntimeError):  # the loop is closed: nobody is left to be told
                self._loop.call_soon_threadsafe(function)

    # What follows runs in the feed's thread.

    def _run(self, loop: asyncio.AbstractEventLoop, listener: socket.socket) -> None:
        try:
            with listener:
                loop.run_until_complete(self._serve(listener))
        except Exception as error:
            self._fault = error
            self._wake()
        finally:
            loop.close()

    def _tell(self) -> None:
        self._told = False
        for connection in self._watching:
            connection.news.set()

    async def _serve(self, listener: socket.socket) -> None:
        accepting = asyncio.create_task(self._accept(listener))
        stopping = asyncio.create_task(self._stopping.wait())
        await asyncio.wait({accepting, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if accepting.done():
            accepting.result()
        accepting.cancel()
        await asyncio.gather(*(connection.say_goodbye() for connection in self._connections.values()))
        left = [accepting, *self._connections]
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)

    async def _accept(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        failing = False
        pace = _Pace(_ACCEPTED_PER_S, _ACCEPTED_AT_ONCE)
        while True:
            # Those who come meanwhile wait in the kernel's queue, which costs nothing.
            await pace.next()
            try:
                accepted, _ = await loop.sock_accept(listener)
            except OSError as error:
                if not failing:
                    log.warning("no client can connect to %s: %s", self.path, error.strerror)
                failing = True
                await asyncio.sleep(_ACCEPT_AGAIN_S)
                continue
            failing = False
            peer = accepted.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
            pid, uid, gid = struct.unpack("3i", peer)
            if (refusal := self._refusal(uid)) is not None:
                with accepted, suppress(OSError):
                    accepted.setblocking(False)
                    accepted.send(_complaint(refusal))
                continue
            log.debug("process %d of user %d connected to %s", pid, uid, self.path)
            reader, writer = await asyncio.open_unix_connection(sock=accepted, limit=LONGEST_LINE)
            connection = _Connection(self, reader, writer, uid, self._may_change(uid, gid))
            task = asyncio.create_task(connection.run())
            self._connections[task] = connection
            task.add_done_callback(self._ended)

    def _may_change(self, uid: int, gid: int) -> bool:
        """Tell whether a user may have something done: root, the daemon's own, or one of the socket's group."""
        if uid in (0, self._uid):
            return True
        if self._socket_file is None:
            return False
        group = self._socket_file.st_gid
        try:
            return group == gid or group in os.getgrouplist(pwd.getpwuid(uid).pw_name, gid)
        except (KeyError, OSError):
            return False

    def _refusal(self, uid: int) -> str | None:
        """Say why one more connection of a user is not served; None if it is."""
        most = _MOST_CONNECTIONS
        if uid not in (0, self._uid):
            most = _MOST_OF_OTHERS
            if sum(connection.uid == uid for connection in self._connections.values()) >= _MOST_OF_A_USER:
                return f"{_MOST_OF_A_USER} clients of this user are connected already; there is no room."
        if len(self._connections) >= most:
            return f"{most} clients are connected already; there is no room."
        return None

    def _ended(self, task: asyncio.Task[None]) -> None:
        del self._connections[task]
        if not task.cancelled() and (error := task.exception()) is not None:
            # One client's trouble, and a fault of ours: the others are served on.
            log.error("a client of %s was dropped", self.path, exc_info=error)


class _Connection:
    """One client, in the feed's thread, but for `reply`."""

    def __init__(
        self,
        server: FeedServer,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        uid: int,
        may_change: bool,
    ) -> None:
        self.news = asyncio.Event()
        self.gone = False
        self.uid = uid
        self.may_change = may_change
        self._has_spoken = False
        self._reply_bytes = 0
        self._server = server
        self._loop = asyncio.get_running_loop()
        self._reader = reader
        self._writer = writer
        # Waiting for the buffer to drain then means waiting until it is empty: what is made up next is news.
        writer.transport.set_write_buffer_limits(0)
        self._replies: asyncio.Queue[bytes] = asyncio.Queue()
        self._room = asyncio.BoundedSemaphore(_MOST_UNANSWERED)
        self._asked_to_watch = asyncio.Event()
        self._sent: dict[str, int] = {}
        """Number of the change with which the client got each key it has."""

    async def run(self) -> None:
        """Serve the client until it leaves, sends garbage or takes nothing any more."""
        self._writer.write(self._server._hello)
        tasks = [asyncio.create_task(part) for part in (self._read(), self._send_replies(), self._send_changes())]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self.gone = True
            self._server._watching.discard(self)
            for task in tasks:
                task.cancel()
            ends = await asyncio.gather(*tasks, return_exceptions=True)
            self._server._reply_bytes -= self._reply_bytes
            self._writer.transport.abort()
        for end in ends:
            if isinstance(end, Exception) and not isinstance(end, ConnectionError | TimeoutError):
                raise end

    def reply(self, line: bytes) -> None:
        """Send a line when its turn comes; from any thread."""
        with suppress(RuntimeError):  # the loop is closed: the server was stopped
            self._loop.call_soon_threadsafe(self._put_reply, line)

    def _put_reply(self, line: bytes) -> None:
        if self.gone:
            return
        self._replies.put_nowait(line)
        self._count_reply(len(line))
        server = self._server
        while server._reply_bytes > _MOST_REPLY_BYTES:
            worst = max(server._connections.values(), key=lambda connection: connection._reply_bytes)
            if worst._reply_bytes <= _MOST_REPLY_BYTES // 4:
                return
            log.debug("a client of %s does not take its answers and is dropped", server.path)
            worst._count_reply(-worst._reply_bytes)
            worst._writer.transport.abort()

    def _count_reply(self, length: int) -> None:
        self._reply_bytes += length
        self._server._reply_bytes += length

    async def say_goodbye(self) -> None:
        """Send the last line, and wait for it a moment."""
        self._writer.write(b'{"type":"bye"}\n')
        with suppress(TimeoutError, ConnectionError):
            async with asyncio.timeout(_GOODBYE_WITHIN_S):
                await self._writer.drain()

    async def _read(self) -> None:
        while True:
            try:
                async with asyncio.timeout(None if self._has_spoken else self._server._silent_s):
                    line = await self._reader.readuntil()
                asked, id_, arguments = _understood(line)
                self._has_spoken = True
            except asyncio.IncompleteReadError:
                return
            except TimeoutError:
                log.debug("a client of %s has said nothing and is dropped", self._server.path)
                return
            except (asyncio.LimitOverrunError, _NotUnderstood) as error:
                too_long = isinstance(error, asyncio.LimitOverrunError)
                sentence = f"A line is longer than {LONGEST_LINE} bytes." if too_long else str(error)
                self._writer.write(_complaint(sentence))
                await self._drained()
                return
            if asked == "watch":
                self._sent = {}
                self._asked_to_watch.set()
                self._server._watching.add(self)
                self.news.set()
            else:
                await self._room.acquire()
                self._server._waiting.append(Question(asked, arguments, id_, self))
            self._server._wake()

    async def _send_replies(self) -> None:
        while True:
            reply = await self._replies.get()
            self._writer.write(reply)
            # Only then is there room for another question, or a client that does not read could pile up answers.
            await self._drained()
            self._count_reply(-min(len(reply), self._reply_bytes))
            self._room.release()

    async def _send_changes(self) -> None:
        await self._asked_to_watch.wait()
        pace = _Pace(_CHANGES_PER_S, _CHANGES_AT_ONCE)
        while True:
            silent = False
            try:
                async with asyncio.timeout(self._server._heartbeat_s):
                    await self.news.wait()
            except TimeoutError:
                silent = True
            await self._drained()
            await pace.next()
            self.news.clear()
            line = self._changes(silent)
            if line:
                self._writer.write(line)
                await self._drained()

    def _changes(self, silent: bool) -> bytes:
        """Make up a line from what the client does not have yet; b"" if it has everything, and was not silent."""
        n, pairs = self._server._published
        changed = b",".join(pair for key, (m, pair) in pairs.items() if self._sent.get(key) != m)
        gone = [key for key in self._sent if key not in pairs]
        self._sent = {key: m for key, (m, _) in pairs.items()}
        if self._asked_to_watch.is_set():
            self._asked_to_watch.clear()
            return b'{"type":"snapshot","n":%d,"set":{%b}}\n' % (n, changed)
        if not changed and not gone and not silent:
            return b""
        return b'{"type":"change","n":%d,"set":{%b},"gone":%b}\n' % (n, changed, as_json(gone))

    async def _drained(self) -> None:
        """Wait until the client has taken everything; for ever only while it takes something."""
        while True:
            left = self._writer.transport.get_write_buffer_size()
            try:
                async with asyncio.timeout(self._server._stuck_s):
                    return await self._writer.drain()
            except TimeoutError:
                if self._writer.transport.get_write_buffer_size() >= left:
                    log.debug("a client of %s takes nothing any more and is dropped", self._server.path)
                    raise


class _Pace:
    """So many per second at most in the long run, and some at once after a quiet time."""

    def __init__(self, per_s: float, at_once: int) -> None:
        self._per_s = per_s
        self._at_once = self._credit = float(at_once)
        self._counted_at = asyncio.get_running_loop().time()

    async def next(self) -> None:
        """Wait until it is time for the next one."""
        clock = asyncio.get_running_loop().time
        while True:
            now = clock()
            self._credit = min(self._credit + (now - self._counted_at) * self._per_s, self._at_once)
            self._counted_at = now
            if self._credit >= 1.0:
                self._credit -= 1.0
                return
            await asyncio.sleep((1.0 - self._credit) / self._per_s)


class _NotUnderstood(Exception):  # noqa: N818 - a condition, not a fault
    """A client's line is none of the protocol; a sentence."""


def _understood(line: bytes) -> tuple[str, bytes, dict[str, Any]]:
    """Return what a line asks for, the id it gives, as JSON, and its arguments."""
    try:
        message = json.loads(line.decode("utf-8"))
        # Not left to the loop: nested as deep as could just be read, it may be too deep to be written there.
        id_ = as_json(message.pop("id", None)) if isinstance(message, dict) else b""
    except (ValueError, RecursionError) as error:
        raise _NotUnderstood("A line is not understood: it is no JSON.") from error
    asked = message.pop("ask", None) if isinstance(message, dict) else None
    if not isinstance(asked, str):
        raise _NotUnderstood('A line is not understood: it is no object with a text "ask".')
    return asked, id_, message


def _complaint(sentence: str) -> bytes:
    return b'{"type":"error","error":%b}\n' % as_json(sentence)


def _listen(path: Path, group: str | None) -> socket.socket:
    """Make a listening socket; see `FeedServer.start`."""
    # Made under another name and renamed: the umask is the whole process's, and until it listens nobody gets in.
    temporary = path.with_name(f".{os.getpid()}")
    for needed in (path, temporary):
        if (length := len(os.fsencode(needed))) > _LONGEST_PATH:
            raise FeedError(
                f"The socket {needed} has a path of {length} bytes; at most {_LONGEST_PATH} are possible. Name a"
                " shorter one by feed.socket in the configuration, or by HOTPIXD_FEED__SOCKET."
            )
    try:
        group_id = -1 if group is None else grp.getgrnam(group).gr_gid
    except KeyError as error:
        raise FeedError(f"The socket {path} cannot be given to the group {group!r}: there is none.") from error
    try:
        with ExitStack() as undo:
            if path.exists() and not path.is_socket():
                raise FeedError(f"The socket {path} cannot be made: something else has that name.")
            if answers(path):
                raise FeedError(f"Another daemon listens at {path}.")
            listener = undo.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
            temporary.unlink(missing_ok=True)
            listener.bind(str(temporary))
            undo.callback(temporary.unlink, missing_ok=True)
            temporary.chmod(0o660)
            os.chown(temporary, -1, group_id)
            listener.listen(_MOST_CONNECTIONS)
            listener.setblocking(False)
            temporary.replace(path)
            undo.pop_all()
    except FeedError:
        raise
    except OSError as error:
        raise FeedError(f"The socket {path} cannot be made: {error.strerror or error}.") from error
    return listener
