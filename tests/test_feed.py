"""The feed: what a client merges is what the daemon published, and no client can harm the daemon or another client.

All over real sockets. Timeouts are generous: they end a test that hangs, they do not measure.
"""

from __future__ import annotations

import json
import logging
import os
import random
import resource
import select
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from blake3 import blake3
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from conftest import environment
from hotpixd import __version__, feed, feed_server
from hotpixd.feed import FeedClient, FeedError, default_socket, find_sockets
from hotpixd.feed_server import FeedServer, Question

BIG = "x" * 100_000
"""More than the kernel buffers of a socket hold after a few."""


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder with a short name: a socket's path has at most 107 bytes."""
    with tempfile.TemporaryDirectory(prefix="hp") as name:
        yield Path(name)


@contextmanager
def served(path: Path, **options: Any) -> Iterator[FeedServer]:
    """Run a server."""
    server = FeedServer(path, {"state": "/somewhere"}, options.pop("wake", lambda: None), **options)
    server.start()
    try:
        yield server
    finally:
        server.stop()


@pytest.fixture
def server(folder: Path) -> Iterator[FeedServer]:
    """A server that was started."""
    with served(folder / "feed.sock") as server:
        yield server


class Raw:
    """A client that says what a test wants, to the byte."""

    def __init__(self, path: Path, *, greeted: bool = True) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.socket.settimeout(20)
        self.socket.connect(str(path))
        self._lines = self.socket.makefile("rb")
        self.hello = self.read() if greeted else None

    def send(self, *messages: Any) -> None:
        """Send objects, or bytes as they are."""
        self.socket.sendall(b"".join(m if isinstance(m, bytes) else json.dumps(m).encode() + b"\n" for m in messages))

    def read(self) -> Any:
        """Return the next object; None at the end of the connection."""
        try:
            line = self._lines.readline()
        except ConnectionResetError:
            return None
        return json.loads(line) if line else None

    def close(self) -> None:
        self._lines.close()
        self.socket.close()


@pytest.fixture
def connect(server: FeedServer) -> Iterator[Callable[[], Raw]]:
    """Connect raw clients, closed at the end."""
    with ExitStack() as stack:
        yield lambda: stack.enter_context(closing(Raw(server.path)))


def until(condition: Callable[[], Any], within_s: float = 20.0) -> Any:
    """Wait until something is true, and return it."""
    end = time.monotonic() + within_s
    while not (value := condition()):
        assert time.monotonic() < end, "it did not come true"
        time.sleep(0.005)
    return value


def next_question(server: FeedServer) -> Question:
    return until(lambda: next(server.questions(), None))


@contextmanager
def answering(server: FeedServer, answer: Callable[[Question], None]) -> Iterator[None]:
    """Be the daemon's loop: take questions until the test is done."""
    done = threading.Event()

    def loop() -> None:
        while not done.wait(0.005):
            for question in server.questions():
                answer(question)

    thread = threading.Thread(target=loop)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def follow(client: FeedClient, wanted: Callable[[Any], bool]) -> list[Any]:
    """Return the live states that a client sees, until one is as wanted."""
    seen = []
    for live in client.watch():
        seen.append(live)
        if wanted(live):
            return seen
    raise AssertionError("the daemon went before")


# The protocol


@pytest.mark.parametrize(("variable", "invocation"), [(None, None), ("0123456789abcdef" * 2, "0123456789abcdef" * 2)])
def test_a_client_is_greeted(
    folder: Path, monkeypatch: pytest.MonkeyPatch, variable: str | None, invocation: str | None
) -> None:
    """It learns what it talks to before it has said anything, and of which of systemd's invocations."""
    monkeypatch.delenv("INVOCATION_ID", raising=False)
    if variable is not None:
        monkeypatch.setenv("INVOCATION_ID", variable)
    with served(folder / "feed.sock") as server, closing(Raw(server.path)) as raw:
        hello = raw.hello
    assert hello == {
        "type": "hello",
        "proto": 1,
        "app": "hotpixd",
        "version": __version__,
        "pid": os.getpid(),
        "invocation": invocation,
        "state": "/somewhere",
    }


def test_a_watcher_gets_a_snapshot_and_then_only_what_changes(server: FeedServer, connect: Callable[[], Raw]) -> None:
    """Nothing it has is sent again, and keys that are gone are named."""
    server.publish({"a": 1, "b": {"c": [1, None, "é"]}})
    raw = connect()
    raw.send({"ask": "watch", "a field": "of the future"})
    assert raw.read() == {"type": "snapshot", "n": 1, "set": {"a": 1, "b": {"c": [1, None, "é"]}}}
    server.publish({"a": 2})
    assert raw.read() == {"type": "change", "n": 2, "set": {"a": 2}, "gone": []}
    server.publish({"new": []}, gone=["b", "never there"])
    assert raw.read() == {"type": "change", "n": 3, "set": {"new": []}, "gone": ["b"]}


def test_an_equal_value_is_no_change(server: FeedServer, connect: Callable[[], Raw]) -> None:
    """The next line is that of the next real change."""
    server.publish({"a": {"b": 1}})
    raw = connect()
    raw.send({"ask": "watch"})
    raw.read()
    server.publish({"a": {"b": 1}}, gone=["c"])
    server.publish({"a": {"b": 2}})
    assert raw.read() == {"type": "change", "n": 2, "set": {"a": {"b": 2}}, "gone": []}


def test_a_value_is_published_as_it_was_then(server: FeedServer, connect: Callable[[], Raw]) -> None:
    """Later changes of the caller's object do no harm."""
    value = [1]
    server.publish({"a": value})
    value.append(2)
    raw = connect()
    raw.send({"ask": "watch"})
    assert raw.read()["set"] == {"a": [1]}


def test_what_json_cannot_say_is_refused_where_it_is_published(server: FeedServer) -> None:
    """Not in the feed's thread, and not by sending NaN, which only Python reads. Nothing of it is published."""
    with pytest.raises(ValueError, match="not JSON compliant"):
        server.publish({"fine": 1, "excess": float("nan")})
    with pytest.raises(TypeError):
        server.publish({"fine": 1, "path": Path("/")})
    with closing(FeedClient(server.path)) as client:
        assert next(client.watch()) == {}


def test_names_that_are_no_utf_8_arrive_unharmed(server: FeedServer) -> None:
    """A file's name may hold any byte; Python carries such bytes as surrogates."""
    name = os.fsdecode(b"IMG\xff\n\xe2\x80\xa8.CR3")
    server.publish({"name": name})
    with closing(FeedClient(server.path)) as client:
        assert next(client.watch()) == {"name": name}


def test_silence_is_broken_by_heartbeats(folder: Path) -> None:
    """Only then does a client know a quiet daemon from a dead one."""
    with served(folder / "feed.sock", heartbeat_s=0.2) as server, closing(Raw(server.path)) as raw:
        server.publish({"a": 1})
        raw.send({"ask": "watch"})
        assert raw.read()["type"] == "snapshot"
        for _ in range(3):
            assert raw.read() == {"type": "change", "n": 1, "set": {}, "gone": []}


def test_changes_after_a_quiet_time_go_out_at_once(
    server: FeedServer, connect: Callable[[], Raw], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They do not wait for the next of regular ticks, which are drawn out here so that a busy machine is none."""
    monkeypatch.setattr(feed_server, "_CHANGES_PER_S", 0.1)
    raw = connect()
    raw.send({"ask": "watch"})
    raw.read()
    before = time.monotonic()
    for number in range(3):
        server.publish({"a": number})
        assert raw.read()["set"] == {"a": number}
    assert time.monotonic() - before < 8


def test_changes_are_conflated(server: FeedServer, connect: Callable[[], Raw]) -> None:
    """However many there are, a client gets about ten lines per second, and the last one is the newest."""
    raw = connect()
    raw.send({"ask": "watch"})
    raw.read()
    end = time.monotonic() + 1.0
    for number in count():
        server.publish({"a": number})
        if time.monotonic() > end:
            break
    server.publish({"done": True})
    lines = [raw.read()]
    while "done" not in lines[-1]["set"]:
        lines.append(raw.read())
    assert number > 100
    assert len(lines) < 30
    values = [line["set"]["a"] for line in lines if "a" in line["set"]]
    assert values == sorted(set(values))
    assert values[-1] == number


def test_watching_again_starts_again(server: FeedServer, connect: Callable[[], Raw]) -> None:
    """With a snapshot; it remains one watcher."""
    server.publish({"a": 1})
    raw = connect()
    for _ in range(3):
        raw.send({"ask": "watch"})
        assert raw.read() == {"type": "snapshot", "n": 1, "set": {"a": 1}}
        assert server.watchers == 1


# Questions


def test_questions_are_passed_on_and_answers_find_their_way_back(
    server: FeedServer, connect: Callable[[], Raw]
) -> None:
    """In any order, each with the id that its asker gave, whatever that is."""
    raw = connect()
    ids = [7, "seven", None, {"a": [1]}]
    raw.send(*({"ask": f"q{i}", "id": id_, "sensor": "x", "k": i} for i, id_ in enumerate(ids)))
    asked = [next_question(server) for _ in ids]
    assert [q.name for q in asked] == ["q0", "q1", "q2", "q3"]
    assert [dict(q.arguments) for q in asked] == [{"sensor": "x", "k": i} for i in range(4)]
    for question in reversed(asked[1:]):
        question.answer({"name": question.name})
    asked[0].refuse("There is no q0.")
    assert [raw.read() for _ in ids] == [
        {"type": "answer", "id": {"a": [1]}, "answer": {"name": "q3"}},
        {"type": "answer", "id": None, "answer": {"name": "q2"}},
        {"type": "answer", "id": "seven", "answer": {"name": "q1"}},
        {"type": "error", "id": 7, "error": "There is no q0."},
    ]


def test_the_loop_is_woken_by_questions_and_watchers(folder: Path) -> None:
    """It may be sleeping, and what it publishes for watchers only must come promptly."""
    woken: list[int] = []
    with served(folder / "feed.sock", wake=lambda: woken.append(1)) as server, closing(Raw(server.path)) as raw:
        assert (woken, server.watchers) == ([], 0)
        raw.send({"ask": "watch"})
        until(lambda: woken)
        assert server.watchers == 1
        raw.send({"ask": "status"})
        until(lambda: len(woken) == 2)
        assert [q.name for q in server.questions()] == ["status"]
        assert list(server.questions()) == []
        raw.close()
        until(lambda: server.watchers == 0)


def test_a_connection_has_four_unanswered_questions_at_most(server: FeedServer, connect: Callable[[], Raw]) -> None:
    """More are left unread until one is answered; nothing is lost, and other connections are served."""
    raw = connect()
    raw.send(*({"ask": "q", "id": i} for i in range(20)))
    asked = [next_question(server) for _ in range(4)]
    other = connect()
    other.send({"ask": "other"})
    assert next_question(server).name == "other"
    time.sleep(0.1)
    assert list(server.questions()) == []
    for i in range(20):
        asked[i].answer({})
        assert raw.read()["id"] == i
        if i + 4 < 20:
            asked.append(next_question(server))
    assert len(asked) == 20


def test_a_client_that_asks_but_never_reads_cannot_pile_up_answers(folder: Path) -> None:
    """It gets no further question through before it has taken an answer, and is dropped in the end."""
    big = {"patch": BIG}
    asked = 0

    def answer(question: Question) -> None:
        nonlocal asked
        asked += 1
        question.answer(big)

    with served(folder / "feed.sock", stuck_s=0.5) as server, answering(server, answer):
        raw = Raw(server.path)
        with closing(raw), suppress(OSError):
            while True:
                raw.send({"ask": "around"})
        assert asked < 20


def test_a_client_that_has_gone_is_asked_for_no_more(server: FeedServer, connect: Callable[[], Raw]) -> None:
    """Neither answering nor refusing fails, and questions not yet taken are dropped with it."""
    raw = connect()
    raw.send({"ask": "a"}, {"ask": "b"}, {"ask": "c"})
    taken = [next_question(server), next_question(server)]
    raw.close()
    until(lambda: taken[0]._asker.gone)
    taken[0].answer({"a": 1})
    taken[1].refuse("No.")
    assert list(server.questions()) == []
    server.stop()
    taken[0].answer({})


# Bad clients


@pytest.mark.parametrize(
    "garbage",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        b"\n",
        b"[]\n",
        b"17\n",
        b'{"id":1}\n',
        b'{"ask":null}\n',
        b'{"ask":"status","id":NaN}\n',
        b"\xff\xfe\x00\x01\x80\n",
        '{"ask":"watch"}'.encode("utf-16") + b"\n",
        b"[" * 60_000 + b"\n",
        b"[" * 100_000 + b"\n",
        b'{"ask":"x","id":' + b"[" * 30_000 + b"]" * 30_000 + b"}\n",
        b'{"ask":"x","id":' + b"9" * 60_000 + b"}\n",
        b"x" * 1_000_000,
    ],
    ids=lambda garbage: repr(garbage[:20]),
)
def test_garbage_gets_one_error_and_the_door(server: FeedServer, connect: Callable[[], Raw], garbage: bytes) -> None:
    """And the server goes on with others."""
    raw = connect()
    with suppress(BrokenPipeError, ConnectionResetError):
        raw.send(garbage)
    error = raw.read()
    assert error["type"] == "error"
    assert error["error"].endswith(".")
    assert "id" not in error
    assert raw.read() is None
    other = connect()
    other.send({"ask": "watch"})
    assert other.read()["type"] == "snapshot"


def test_an_id_as_deep_as_can_be_read_can_be_sent_back(server: FeedServer, connect: Callable[[], Raw]) -> None:
    """Encoding it where it is answered could fail with a deeper stack, and end the daemon."""

    def answer_deep(question: Question, depth: int) -> None:
        if depth:
            answer_deep(question, depth - 1)
        else:
            question.answer({})

    answered = 0
    for depth in range(500, 1100, 20):
        raw = connect()
        raw.send(b'{"ask":"x","id":' + b"[" * depth + b"]" * depth + b"}\n")
        # Garbage, if it is too deep to be read.
        until(lambda raw=raw: server._waiting or select.select([raw.socket], [], [], 0)[0])
        for question in server.questions():
            answer_deep(question, 600)
            # Not decoded: this test's own stack is too deep for some of them.
            assert raw.socket.recv(24) == b'{"type":"answer","id":[['
            answered += 1
    assert answered


def test_half_a_line_is_no_question(server: FeedServer, connect: Callable[[], Raw]) -> None:
    """A client may die while it writes. What came in pieces and is whole counts."""
    raw = connect()
    raw.send(b'{"ask":"sta')
    raw.close()
    slow = connect()
    for byte in b'{"ask":"status"}\n':
        slow.send(bytes([byte]))
    assert next_question(server).name == "status"
    assert list(server.questions()) == []


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(junk=st.binary(max_size=200) | st.text(max_size=100).map(str.encode))
def test_no_bytes_harm_the_server(server: FeedServer, junk: bytes) -> None:
    """Whatever a client sends, the next one is served."""
    with closing(Raw(server.path)) as raw, suppress(BrokenPipeError, ConnectionResetError):
        raw.send(junk)
    list(server.questions())
    with closing(Raw(server.path)) as raw:
        assert raw.hello["app"] == "hotpixd"


def test_a_client_that_never_reads_slows_nobody_and_is_dropped(folder: Path) -> None:
    """3000 publishes of a value of 100 kB return at once, and a client that reads sees the last one."""
    with served(folder / "feed.sock", stuck_s=2.0) as server:
        stuck = Raw(server.path)
        stuck.send({"ask": "watch"})
        until(lambda: server.watchers == 1)
        with closing(stuck), closing(FeedClient(server.path)) as client:
            seen: list[Any] = []
            thread = threading.Thread(target=lambda: seen.extend(follow(client, lambda live: live.get("n") == 2999)))
            thread.start()
            until(lambda: server.watchers == 2)
            before = time.monotonic()
            for number in range(3000):
                server.publish({"n": number, "big": BIG + str(number)})
            assert time.monotonic() - before < 10
            thread.join(20)
            assert seen[-1]["big"] == BIG + "2999"
            until(lambda: server.watchers == 0)
        thread.join()


def test_a_slow_client_gets_fewer_and_newer_changes(folder: Path) -> None:
    """It is not dropped while it takes something, however long the whole line takes, and nothing is queued for it."""
    with served(folder / "feed.sock", stuck_s=1.5) as server, closing(Raw(server.path, greeted=False)) as raw:
        server.publish({"n": 0, "big": BIG * 20})
        raw.send({"ask": "watch"})
        received = bytearray()
        newest = 0
        # 2 MB in pieces of 100 kB: the first line alone takes longer than stuck_s.
        while received.count(b"\n") < 3:
            newest += 1
            server.publish({"n": newest})
            received += raw.socket.recv(100_000)
            time.sleep(0.1)
        hello, snapshot, change = received.split(b"\n")[:3]
        assert json.loads(hello)["type"] == "hello"
        assert json.loads(snapshot)["type"] == "snapshot"
        got = json.loads(change)["set"]
        assert set(got) == {"n"}
        # Those of the time in which the snapshot was on its way were never sent.
        assert got["n"] - json.loads(snapshot)["set"]["n"] > 10


def test_a_crowd_is_told_that_there_is_no_room(server: FeedServer) -> None:
    """500 connect: 64 are served, each of the others gets a sentence; when they leave there is room again."""
    with ExitStack() as crowd:
        raws = [crowd.enter_context(closing(Raw(server.path))) for _ in range(500)]
        kinds = [raw.hello["type"] for raw in raws]
        assert kinds == ["hello"] * 64 + ["error"] * 436
        assert "64 clients" in raws[-1].hello["error"]
        with pytest.raises(FeedError, match="64 clients are connected already"):
            FeedClient(server.path)
        raws[3].send({"ask": "status"})
        assert next_question(server).name == "status"
    until(lambda: not server._connections)
    with closing(FeedClient(server.path)) as client:
        assert client.hello["pid"] == os.getpid()


OTHER, THIRD = 65534, 12345


@contextmanager
def by_user(uid: int, path: Path) -> Iterator[Callable[[], Raw]]:
    """Connect as another user, who is let in by the mode of the socket; the kernel notes who connects."""
    path.parent.chmod(0o755)
    path.chmod(0o666)
    with ExitStack() as stack:

        def connect() -> Raw:
            groups = os.getgroups()
            os.setgroups([])
            os.setegid(uid)
            os.seteuid(uid)
            try:
                return stack.enter_context(closing(Raw(path)))
            finally:
                os.seteuid(0)
                os.setegid(0)
                os.setgroups(groups)

        yield connect


needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="being another user takes root")


@needs_root
def test_only_members_of_the_group_have_something_done(folder: Path) -> None:
    """Others may have been let in to read; the kernel says who asks, and the daemon is not troubled with it."""
    with served(folder / "feed.sock") as server, by_user(OTHER, server.path) as connect:
        raw = connect()
        for name in ("darks", "set", "end-series", "list-cards"):
            raw.send({"ask": name, "id": name, "name": "iso", "value": "100"})
        raw.send({"ask": "status", "id": 1})
        assert next_question(server).name == "status"
        refused = [raw.read() for _ in range(4)]
        assert [(one["type"], one["id"]) for one in refused] == [
            ("error", name) for name in ("darks", "set", "end-series", "list-cards")
        ]
        assert "group" in refused[0]["error"]
        os.chown(server.path, -1, OTHER)
    with served(folder / "feed.sock") as server:
        os.chown(server.path, -1, OTHER)
        server._socket_file = server.path.stat()
        with by_user(OTHER, server.path) as connect:
            connect().send({"ask": "darks", "id": 1})
            assert next_question(server).name == "darks"
        with closing(Raw(server.path)) as own:
            own.send({"ask": "set", "id": 1})
            assert next_question(server).name == "set"


@needs_root
def test_one_user_cannot_keep_the_others_out(server: FeedServer) -> None:
    """24 connections for each, 56 for all; root and the daemon's own user have the rest."""
    with (
        by_user(OTHER, server.path) as one,
        by_user(THIRD, server.path) as two,
        by_user(THIRD + 1, server.path) as third,
    ):
        for connect, most in ((one, 24), (two, 24), (third, 8)):
            hellos = [connect().hello for _ in range(30)]
            assert [hello["type"] for hello in hellos] == ["hello"] * most + ["error"] * (30 - most)
        with closing(FeedClient(server.path)) as client:
            assert client.hello["pid"] == os.getpid()


@needs_root
def test_each_user_has_a_turn(server: FeedServer) -> None:
    """One who asks without end waits for himself."""
    with by_user(OTHER, server.path) as connect, closing(Raw(server.path)) as own:
        for _ in range(10):
            connect().send(*({"ask": "verify", "id": n} for n in range(4)))
        until(lambda: len(server._waiting) == 40)
        own.send({"ask": "status", "id": 1})
        until(lambda: len(server._waiting) == 41)
        names = [question.name for question, _ in zip(server.questions(), range(4), strict=False)]
        assert names.index("status") <= 1


def test_who_says_nothing_is_dropped_and_who_did_is_not(folder: Path) -> None:
    """Nor who sends half a line, or one byte now and then; a client that was dropped asks all the same."""
    with ExitStack() as stack:
        server = stack.enter_context(served(folder / "feed.sock", silent_s=0.5))
        client = stack.enter_context(closing(FeedClient(server.path)))
        silent, half, good = (stack.enter_context(closing(Raw(server.path))) for _ in range(3))
        good.send({"ask": "watch"})
        good.read()
        half.send(b'{"ask":')
        begin = time.monotonic()
        while time.monotonic() - begin < 1.0:
            with suppress(OSError):
                half.send(b" ")
            time.sleep(0.05)
        assert silent.read() is None
        assert half.read() is None
        until(lambda: len(server._connections) == 1)
        server.publish({"a": 1})
        assert good.read()["set"] == {"a": 1}
        with answering(server, lambda question: question.answer({"name": question.name})):
            assert client.ask("status") == {"name": "status"}
            assert client.ask("defects") == {"name": "defects"}


def test_answers_that_nobody_takes_do_not_pile_up(server: FeedServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever has most of them waiting is dropped; others are answered."""
    monkeypatch.setattr(feed_server, "_MOST_REPLY_BYTES", 40_000_000)
    answer = {"a": "x" * 5_000_000}
    with ExitStack() as stack, answering(server, lambda question: question.answer(answer)):
        greedy = [stack.enter_context(closing(Raw(server.path))) for _ in range(8)]
        for raw in greedy:
            raw.send(*({"ask": "defects", "id": n} for n in range(4)))
        until(lambda: len(server._connections) < 8)
        assert server._reply_bytes <= 40_000_000
        with closing(FeedClient(server.path)) as client:
            assert client.ask("status") == answer
    until(lambda: server._reply_bytes == 0)


def test_a_crowd_that_comes_and_goes_leaves_nothing_behind(server: FeedServer) -> None:
    """No descriptor, connection or watcher, be they killed at any point of the conversation."""
    server.publish({"big": BIG * 5})
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208 - a number is all that is wanted

    def come_and_go(seed: int) -> None:
        chance = random.Random(seed)
        for _ in range(25):
            with suppress(OSError), closing(Raw(server.path, greeted=False)) as raw:
                raw.send(*chance.sample([{"ask": "watch"}, {"ask": "status"}, b'{"as', b"garbage\n"], 2))
                raw.socket.recv(chance.choice([1, 200, 300_000]))

    threads = [threading.Thread(target=come_and_go, args=(seed,)) for seed in range(8)]
    with answering(server, lambda question: question.answer({"a": BIG})):
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        until(lambda: not server._connections)
    assert server.watchers == 0
    until(lambda: len(os.listdir("/proc/self/fd")) <= before)  # noqa: PTH208


def test_a_killed_client_is_forgotten(server: FeedServer) -> None:
    """The kernel closes its socket; a real process, killed amid the changes."""
    code = f"""if True:
        from pathlib import Path
        from hotpixd.feed import FeedClient
        for live in FeedClient(Path({str(server.path)!r})).watch():
            print(live["n"], flush=True)
    """
    server.publish({"n": 0})
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, env=environment()) as process:
        assert process.stdout is not None
        for number in range(1, 20):
            server.publish({"n": number, "big": BIG + str(number)})
            if number == 10:
                process.stdout.readline()
                assert server.watchers == 1
                process.send_signal(signal.SIGKILL)
    until(lambda: server.watchers == 0)
    with closing(FeedClient(server.path)) as client:
        assert next(client.watch())["n"] == 19


def test_without_descriptors_clients_wait_and_the_server_lives(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """EMFILE says so once, not in a loop, and clients are served when there is room again."""
    with served(folder / "feed.sock") as server, ExitStack() as held:
        waiting = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        held.enter_context(waiting)
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        highest = max(map(int, os.listdir("/proc/self/fd")))  # noqa: PTH208
        resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 3, hard))
        try:
            with ExitStack() as fillers:
                with suppress(OSError):
                    while True:
                        fillers.enter_context(open(os.devnull, "rb"))  # noqa: PTH123
                with caplog.at_level(logging.WARNING):
                    waiting.connect(str(server.path))
                    until(lambda: "no client can connect" in caplog.text)
                    time.sleep(1.2)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert len(caplog.records) == 1
        assert "Too many open files" in caplog.text
        waiting.settimeout(20)
        assert json.loads(waiting.recv(1000))["type"] == "hello"


# Merging


values = st.none() | st.booleans() | st.integers(-5, 5) | st.text(max_size=3) | st.lists(st.integers(0, 3), max_size=3)
publishes = st.tuples(
    st.dictionaries(st.sampled_from("abcdef"), values, max_size=4),
    st.sets(st.sampled_from("abcdef"), max_size=2),
    st.booleans(),
)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(sequence=st.lists(publishes, max_size=12))
def test_a_client_merges_to_what_was_published(server: FeedServer, sequence: list[Any]) -> None:
    """After any publishes, at any pace, whether it came before or amid them. Keys removed in the same call are gone."""
    server.publish({}, gone=["a", "b", "c", "d", "e", "f", "done"])
    expected: dict[str, Any] = {}
    with closing(FeedClient(server.path)) as early, closing(FeedClient(server.path)) as late:
        watching = early.watch()
        next(watching)
        for changes, gone, look in sequence:
            server.publish(changes, gone)
            expected = {key: value for key, value in {**expected, **changes}.items() if key not in gone}
            if look:
                time.sleep(0.003)
        server.publish({"done": True})
        for live in watching:
            if live.get("done"):
                break
        assert live == {**expected, "done": True}
        assert next(late.watch()) == live


def test_many_threads_publish_and_many_clients_agree(server: FeedServer) -> None:
    """Each thread counts up in a key of its own and leaves one key behind per number: none is lost, for no client."""

    def publish(name: str) -> None:
        for number in range(300):
            server.publish({name: number, f"{name} {number}": 0}, gone=["never there"])

    left = {f"{name} {number}" for name in "abcd" for number in range(300)}

    def done(live: Any) -> bool:
        return left <= live.keys()

    results: dict[int, list[Any]] = {}
    with ExitStack() as stack:
        clients = [stack.enter_context(closing(FeedClient(server.path))) for _ in range(10)]
        watchers = [
            threading.Thread(target=lambda i=i, client=client: results.update({i: follow(client, done)}))
            for i, client in enumerate(clients)
        ]
        publishers = [threading.Thread(target=publish, args=(name,)) for name in "abcd"]
        for thread in watchers:
            thread.start()
        # Threads take turns at every chance, or they would hardly ever meet within a publish.
        interval = sys.getswitchinterval()
        sys.setswitchinterval(1e-6)
        for thread in publishers:
            thread.start()
        for thread in publishers:
            thread.join(30)
        sys.setswitchinterval(interval)
        for thread in watchers:
            thread.join(30)
    assert len(results) == 10
    for seen in results.values():
        assert seen[-1] == results[0][-1]
        for name in "abcd":
            numbers = [live[name] for live in seen if name in live]
            assert numbers == sorted(numbers)


# The client


def test_asking_returns_the_answer_or_the_refusal(server: FeedServer) -> None:
    """As a dictionary, or as an error with the daemon's sentence, while another thread watches with the same client."""
    server.publish({"a": 1})

    def answer(question: Question) -> None:
        if question.name == "double":
            question.answer({"doubled": question.arguments["number"] * 2})
        else:
            question.refuse(f"{question.name!r} is no question.")

    with answering(server, answer), closing(FeedClient(server.path)) as client:
        watching = client.watch()
        first = next(watching)
        assert first == {"a": 1}
        for number in range(50):
            assert client.ask("double", number=number) == {"doubled": number * 2}
        with pytest.raises(FeedError, match="'triple' is no question"):
            client.ask("triple")
        assert client.ask("double", number=4) == {"doubled": 8}
        server.publish({"a": 2})
        assert next(watching) == {"a": 2}
        # Another thread may still be drawing it.
        assert first == {"a": 1}


def test_large_answers_arrive_whole(server: FeedServer) -> None:
    """Some megabytes, in many pieces."""
    patch = [[x / 7 for x in range(500)] for _ in range(300)]
    with (
        answering(server, lambda question: question.answer({"patch": patch})),
        closing(FeedClient(server.path)) as client,
    ):
        assert client.ask("around", sensor="x", site=1, reach=9)["patch"] == patch


def test_an_answer_that_comes_too_late_is_not_taken_for_the_next_one(server: FeedServer) -> None:
    """A question was given up; its answer comes while the next one is asked."""
    with closing(FeedClient(server.path)) as client:
        with pytest.raises(FeedError, match=r"said nothing for 0\.1 s"):
            client.ask("slow", timeout_s=0.1)
        slow = next_question(server)
        with answering(server, lambda question: question.answer({"name": question.name})):
            slow.answer({"name": "slow"})
            assert client.ask("quick") == {"name": "quick"}


def test_closing_ends_watching_and_asking_in_other_threads(server: FeedServer) -> None:
    """At once, not at the next line: watching just ends, asking fails."""
    client = FeedClient(server.path)
    ended: dict[str, Any] = {}

    def watch() -> None:
        for _ in client.watch():
            pass
        ended["watch"] = True

    def ask() -> None:
        try:
            client.ask("never answered")
        except FeedError as error:
            ended["ask"] = error

    threads = [threading.Thread(target=watch), threading.Thread(target=ask)]
    for thread in threads:
        thread.start()
    until(lambda: server.watchers == 1)
    next_question(server)
    before = time.monotonic()
    client.close()
    for thread in threads:
        thread.join(10)
    assert time.monotonic() - before < 5
    assert set(ended) == {"watch", "ask"}
    assert list(client.watch()) == []
    with pytest.raises(FeedError):
        client.ask("anything")
    client.close()
    until(lambda: not server._connections)


def test_watching_ends_with_a_sentence_when_the_daemon_stops(folder: Path) -> None:
    """The daemon says goodbye; a client that asks then, or comes then, is told too."""
    with served(folder / "feed.sock") as server, closing(FeedClient(server.path)) as client:
        watching = client.watch()
        next(watching)
        server.stop()
        with pytest.raises(FeedError, match="has stopped"):
            next(watching)
        with pytest.raises(FeedError, match=r"has stopped|has gone"):
            client.ask("status")
        with pytest.raises(FeedError, match="No daemon answers at"):
            FeedClient(server.path)


def test_watching_ends_with_a_sentence_when_the_daemon_is_killed(folder: Path) -> None:
    """Without a goodbye. Its socket stays behind; the next daemon replaces it."""
    path = folder / "feed.sock"
    with killable(path) as process:
        with closing(FeedClient(path)) as client:
            assert client.hello["pid"] == process.pid
            watching = client.watch()
            next(watching)
            process.kill()
            with pytest.raises(FeedError, match="has gone"):
                next(watching)
        process.wait()
    assert path.is_socket()
    with pytest.raises(FeedError, match=r"No daemon answers at .*feed.sock: Connection refused\."):
        FeedClient(path)
    with served(path) as server, closing(FeedClient(path)) as client:
        assert client.hello["pid"] == os.getpid()
        assert server.path.stat().st_mode & 0o777 == 0o660


def test_a_daemon_that_hangs_is_noticed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is stopped amid: its kernel still accepts, but no heartbeat comes, nor a hello for a new client."""
    monkeypatch.setattr(feed, "_SILENCE_S", 0.5)
    path = folder / "feed.sock"
    with killable(path) as process, closing(FeedClient(path)) as client:
        watching = client.watch()
        next(watching)
        process.send_signal(signal.SIGSTOP)
        with pytest.raises(FeedError, match=r"has said nothing for 0\.5 s"):
            next(watching)
        with pytest.raises(FeedError, match=r"has said nothing for 0\.2 s"):
            FeedClient(path, timeout_s=0.2)


@contextmanager
def killable(path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Run a server in a process of its own."""
    code = f"""if True:
        import time
        from pathlib import Path
        from hotpixd.feed_server import FeedServer
        server = FeedServer(Path({str(path)!r}), {{}}, lambda: None)
        server.start()
        server.publish({{"a": 1}})
        time.sleep(120)
    """
    process = subprocess.Popen([sys.executable, "-c", code], env=environment())
    try:
        until(lambda: process.poll() is None and path.is_socket())
        yield process
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize(
    ("said", "sentence"),
    [
        (b"220 mail.example.org ESMTP\r\n", "is not hotpixd"),
        (b"[1]\n", "is not hotpixd"),
        (b'{"type":"hello"}\n', "is not hotpixd"),
        (b'{"type":"hello","app":"hotpixd","proto":2}\n', "version 2 of the protocol, this program 1"),
        (b"x" * 1_000_000, "is not hotpixd"),
        (b"", "has gone"),
    ],
)
def test_what_is_no_daemon_of_ours_is_told_from_it(folder: Path, said: bytes, sentence: str) -> None:
    """A client may be pointed at any socket."""
    path = folder / "other.sock"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(path))
        listener.listen()

        def talk() -> None:
            accepted, _ = listener.accept()
            with accepted, suppress(OSError):
                accepted.sendall(said)

        thread = threading.Thread(target=talk)
        thread.start()
        with pytest.raises(FeedError, match=sentence):
            FeedClient(path)
        thread.join()


def test_a_full_backlog_is_waited_for(folder: Path) -> None:
    """The kernel refuses at once when too many clients wait; that is no reason to say that there is no daemon."""
    path = folder / "feed.sock"
    with killable(path) as process, ExitStack() as crowd:
        process.send_signal(signal.SIGSTOP)
        with pytest.raises(BlockingIOError):
            while True:
                waiting = crowd.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
                waiting.setblocking(False)
                waiting.connect(str(path))
        with pytest.raises(FeedError, match="Another daemon listens"):
            FeedServer(path, {}, lambda: None).start()
        threading.Timer(0.3, process.send_signal, [signal.SIGCONT]).start()
        # The crowd was there before.
        with pytest.raises(FeedError, match="64 clients are connected already"):
            FeedClient(path)


# The socket file


def test_only_owner_and_group_may_connect(server: FeedServer) -> None:
    """The mode does not depend on the umask, and the folder holds nothing else."""
    mode = server.path.stat().st_mode
    assert stat.S_ISSOCK(mode)
    assert stat.S_IMODE(mode) == 0o660
    assert list(server.path.parent.iterdir()) == [server.path]


@pytest.mark.parametrize("umask", [0o000, 0o777])
def test_the_umask_does_not_matter(folder: Path, umask: int) -> None:
    """Neither an open nor a closed one."""
    before = os.umask(umask)
    try:
        with served(folder / "feed.sock") as server:
            assert stat.S_IMODE(server.path.stat().st_mode) == 0o660
    finally:
        os.umask(before)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
@pytest.mark.parametrize(("group", "expected"), [(65533, 1), (65534, 0)])
def test_a_stranger_cannot_connect_but_a_member_of_the_group_can(folder: Path, group: int, expected: int) -> None:
    """The kernel keeps them apart, by the socket's mode and group."""
    folder.chmod(0o755)
    with served(folder / "feed.sock", group="nogroup") as server:
        child = os.fork()
        if not child:
            end = 2
            try:
                os.setgroups([])
                os.setresgid(group, group, group)
                os.setresuid(65534, 65534, 65534)
                FeedClient(server.path)
                end = 0
            except FeedError as error:
                end = 1 if "is closed to this user; its group may use it" in str(error) else 3
            finally:
                os._exit(end)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == expected


def test_an_unknown_group_is_a_sentence(folder: Path) -> None:
    """It is the user's to mend; nothing is left behind."""
    with pytest.raises(FeedError, match="'no such group'"):
        FeedServer(folder / "feed.sock", {}, lambda: None, group="no such group").start()
    assert list(folder.iterdir()) == []


def test_a_living_server_is_not_replaced(server: FeedServer) -> None:
    """The second one is told; the first one serves on."""
    with pytest.raises(FeedError, match="Another daemon listens at"):
        FeedServer(server.path, {}, lambda: None).start()
    with closing(FeedClient(server.path)) as client:
        assert client.hello["state"] == "/somewhere"


def test_stopping_removes_the_socket_but_not_another_daemons(folder: Path) -> None:
    """Somebody removed ours by hand and started another one, which must stay reachable. Stopping twice is nothing."""
    path = folder / "feed.sock"
    with served(path) as first:
        path.unlink()
        with served(path) as second:
            first.stop()
            first.stop()
            with closing(FeedClient(path)):
                pass
            assert second.watchers == 0
        assert not path.exists()


def test_a_file_that_is_no_socket_is_left_alone(folder: Path) -> None:
    """A wrong path in the configuration must not cost a file."""
    path = folder / "precious"
    path.write_text("data")
    with pytest.raises(FeedError, match="something else has that name"):
        FeedServer(path, {}, lambda: None).start()
    assert path.read_text() == "data"


@pytest.mark.parametrize(
    ("name", "sentence"),
    [("x" * 120 + "/feed.sock", r"has a path of \d+ bytes; at most 107"), ("missing/feed.sock", "No such file")],
)
def test_a_path_that_cannot_be_is_a_sentence(folder: Path, name: str, sentence: str) -> None:
    """The kernel's limit is said with a number; a client is told as well."""
    with pytest.raises(FeedError, match=sentence):
        FeedServer(folder / name, {}, lambda: None).start()
    with pytest.raises(FeedError, match="No daemon answers at"):
        FeedClient(folder / name)


def test_publishing_needs_no_running_server(folder: Path) -> None:
    """Before the start it is kept for those who come; after the end it is nobody's."""
    server = FeedServer(folder / "feed.sock", {}, lambda: None)
    server.publish({"a": 1})
    server.start()
    with closing(FeedClient(server.path)) as client:
        assert next(client.watch()) == {"a": 1}
    server.stop()
    server.publish({"a": 2})
    assert (server.watchers, list(server.questions())) == (0, [])


def test_the_death_of_the_feeds_thread_is_not_silent(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loop learns of it where it takes questions."""
    woken = threading.Event()

    async def broken(*_: Any) -> None:
        raise RecursionError("a fault of ours")

    monkeypatch.setattr(FeedServer, "_accept", broken)
    with served(folder / "feed.sock", wake=woken.set) as server:
        assert woken.wait(20)
        with pytest.raises(RuntimeError, match="a fault of ours"):
            next(server.questions())
        server.publish({"a": 1})


# Where the socket is


def test_a_service_listens_in_its_runtime_directory(folder: Path) -> None:
    """systemd names it, and more than one if the unit asks for more."""
    assert default_socket(Path("/x"), {"RUNTIME_DIRECTORY": "/run/hotpixd/a:/run/b"}) == Path(
        "/run/hotpixd/a/feed.sock"
    )


def test_a_user_has_one_socket_per_state(folder: Path) -> None:
    """In a private folder that is made, named by the resolved path of the state."""
    folder.chmod(0o700)
    state = folder / "state"
    state.mkdir()
    (folder / "link").symlink_to(state)
    environ = {"XDG_RUNTIME_DIR": str(folder)}
    path = default_socket(state, environ)
    assert path == folder / "hotpixd" / f"{blake3(os.fsencode(state.resolve())).hexdigest()[:12]}.sock"
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert default_socket(folder / "link", environ) == path
    assert default_socket(folder / "other", environ) != path


def test_without_a_session_a_private_folder_for_temporary_files_is_used(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under cron or su there is no runtime directory."""
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    path = default_socket(Path("/x"), {"XDG_RUNTIME_DIR": str(folder / "missing")})
    expected = folder / f"runtime-{os.geteuid()}"
    if Path(f"/run/user/{os.geteuid()}").is_dir():
        assert path.parent == expected / "hotpixd"
    assert path.parent.parent == expected
    assert stat.S_IMODE(expected.stat().st_mode) == 0o700


@pytest.mark.parametrize("level", ["runtime", "runtime/hotpixd"])
def test_a_folder_that_others_can_change_is_not_trusted(folder: Path, level: str) -> None:
    """They could put a socket of theirs there."""
    (folder / "runtime/hotpixd").mkdir(mode=0o700, parents=True)
    (folder / "runtime").chmod(0o700)
    environ = {"XDG_RUNTIME_DIR": str(folder / "runtime")}
    default_socket(Path("/x"), environ)
    (folder / level).chmod(0o777)
    with pytest.raises(FeedError, match="can be changed by others"):
        default_socket(Path("/x"), environ)


def test_living_sockets_are_found(folder: Path) -> None:
    """Of the service and of the user; not those that a killed daemon left."""
    folder.chmod(0o700)
    runtime = folder / "run"
    runtime.mkdir()
    environ = {"XDG_RUNTIME_DIR": str(folder), "RUNTIME_DIRECTORY": str(runtime)}
    assert not [path for path in find_sockets(environ) if path.is_relative_to(folder)]
    paths = [default_socket(folder / name, environ | {"RUNTIME_DIRECTORY": ""}) for name in ("a", "b", "dead")]
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as dead:
        dead.bind(str(paths[2]))
    with served(paths[0]), served(paths[1]), served(runtime / "feed.sock"):
        found = [path for path in find_sockets(environ) if path.is_relative_to(folder)]
    assert found == [runtime / "feed.sock", *sorted(paths[:2])]
