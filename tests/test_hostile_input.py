"""What the fuzzer has found: files of the state, lines from pipes and sockets, that nobody of ours writes."""

from __future__ import annotations

import json
import os
import socket
import struct
import threading
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from blake3 import blake3

from hotpixd.feed import FeedClient, FeedError
from hotpixd.intake.darks import Journal, SeriesOrder
from hotpixd.intake.link import Link
from hotpixd.store.checkpoint import GenerationError, read_generation, verify, write_generation
from hotpixd.store.durable import StateError
from hotpixd.store.ledger import Ledger, Received, TransitionRow

# Ledger: SQLite finds damaged pages, not damaged values


def damaged_ledger(folder: Path, statement: str) -> Ledger:
    """Write a ledger, change it as no code of ours does, with seals that are right, and open it."""
    path = folder / "ledger.sqlite"
    ledger = Ledger(path)
    ledger.add_sensor("acme-1", {"make": "Acme"})
    (seq,) = ledger.receive([Received("a" * 64, "IMG_1.DNG", "/card", 1000, "2026-01-02T03:04:05Z")])
    ledger.add_transitions([TransitionRow("acme-1", 2, seq, "stable", {"log_e": 20.0})])
    ledger.commit()
    ledger._db.execute(statement)
    ledger.close()
    return Ledger(path)


@pytest.mark.parametrize("text", ["'{\"make\": '", "'[1]'", "x'00ff'", "7"])
def test_a_sensor_without_a_description_is_damage(tmp_path, text):
    """It was a traceback of the JSON reader."""
    ledger = damaged_ledger(tmp_path, f"UPDATE sensor SET identity = {text}")
    with pytest.raises(StateError, match=r"is damaged: sensor acme-1 is"):
        ledger.sensors()


def test_a_transition_without_a_description_is_damage(tmp_path):
    """The same of what a site went through."""
    ledger = damaged_ledger(tmp_path, "UPDATE transition SET detail = 'x'")
    with pytest.raises(StateError, match="is damaged: a transition of site 2"):
        ledger.transitions("acme-1")


def test_a_time_that_is_none_is_damage(tmp_path):
    """The times of shots are shown with defects."""
    ledger = damaged_ledger(tmp_path, "UPDATE shot SET received_at = 'yesterday'")
    with pytest.raises(StateError, match="the time of shot 1 is 'yesterday'"):
        ledger.times([1])


@pytest.mark.parametrize("change", ["key = 'xx'", "key = '../../../etc/passwd'", "key = x'00'"])
def test_a_row_that_nobody_wrote_is_damage(tmp_path, change):
    """A key names a file of the spool: it must be one, and must not lead out of it."""
    ledger = damaged_ledger(tmp_path, f"UPDATE shot SET {change}")
    with pytest.raises(StateError, match="the row of shot 1"):
        ledger.rows_to_replay({})


def test_a_schema_whose_constraints_are_not_ours_is_damage(tmp_path):
    """One letter of it changed on the disk: new shots could not be received, and nobody would know why."""
    path = tmp_path / "ledger.sqlite"
    Ledger(path).close()
    content = path.read_bytes()
    assert content.count(b"verdict IN ('received'") == 1
    path.write_bytes(content.replace(b"verdict IN ('received'", b"verdict IN ('rec<ived'"))
    with pytest.raises(StateError, match="is damaged: its tables are not as they were made"):
        Ledger(path)


def test_a_negative_format_is_damage(tmp_path):
    """There is no way to upgrade from it."""
    with pytest.raises(StateError, match="is damaged: its format is -5"):
        damaged_ledger(tmp_path, "PRAGMA user_version = -5")


# Generation: its digest proves what was written, not that it makes sense


@pytest.mark.parametrize("dtype", ["<u4, ,", "O", "<M8", "S4", "<f16", ">u4", "<u9", 7, None])
def test_a_generation_of_other_numbers_contradicts_itself(tmp_path, dtype):
    """numpy raised a SyntaxError for some texts, and took others for kinds of objects."""
    path = write_generation(tmp_path, 3, {}, {"a": np.arange(5, dtype="<u4")})
    content = path.read_bytes()[:-32]
    (length,) = struct.unpack_from("<I", content, 8)
    header = json.loads(content[12 : 12 + length])
    header["arrays"][0][1] = dtype
    text = json.dumps(header).encode()
    changed = content[:8] + struct.pack("<I", len(text)) + text + content[12 + length :]
    path.write_bytes(changed + blake3(changed).digest())
    for read in (verify, read_generation):
        with pytest.raises(GenerationError, match="contradicts itself"):
            read(path)


# Pipe of a camera's worker


def heard(*lines: bytes) -> tuple[bool, list[dict[str, Any]], list[object], Link]:
    """Let a link read some lines that its worker is said to have written."""
    link = Link({**os.environ, "HOTPIXD_TEST_FAULTS": ""}, 30.0, 30.0)
    events: list[dict[str, Any]] = []
    answers: list[object] = []
    try:
        out, into = os.pipe()
        os.set_blocking(out, False)
        link._out = out
        link._waiting = {1: lambda ok, _: answers.append(ok)}
        os.write(into, b"\n".join(lines) + b"\n")
        alive = link.read(events.append)
        os.close(into)
        os.close(out)
    finally:
        link.kill()
        link._waiting = {}
        link.lose(5.0)
    return alive, events, answers, link


@pytest.mark.parametrize(
    "line",
    [
        b"libgphoto2 was here",
        b"[]",
        b"3",
        b"\xff\xfe",
        b"[" * 100_00,
        b'{"id":99,"ok":{}}',
        b'{"id":1,"ok":[]}',
        b'{"id":[],"ok":{}}',
        b'{"event":5}',
        b'{"event":"beat"}',
        b'{"event":"beat","patience_s":NaN}',
        b'{"failed":"badly"}',
        b"{}",
    ],
)
def test_a_worker_that_talks_nonsense_is_given_up(line):
    """It was the end of the daemon; now the worker is replaced, as if it had died."""
    alive, events, _, link = heard(b'{"event":"changed"}', line, b'{"event":"changed"}')
    assert not alive
    assert events == [{"event": "changed"}]
    assert link.failure is None


def test_what_a_worker_says_is_heard():
    """Answers, events and the last words."""
    alive, events, answers, link = heard(
        b'{"id":1,"ok":{"a":1}}',
        b'{"event":"beat","patience_s":3}',
        b'{"event":"added","file":["/","a",1,2]}',
        b'{"failed":{"code":-7,"text":"I/O","doing":"listing","trace":"x"}}',
    )
    assert alive
    assert [event["event"] for event in events] == ["added"]
    assert answers == [{"a": 1}]
    assert link.failure is not None
    assert link.failure["code"] == -7


# Journal of a dark series


@pytest.mark.parametrize(
    "change",
    [
        {"taken": "4"}, {"taken": -1}, {"taken": True}, {"taken": 1.5}, {"camera": 5}, {"restore": []},
        {"restore": None}, {"bulb_open": "no"}, {"at": "now"}, {"at": float("nan")}, {"at": None},
        {"order": {"frames": "x"}}, {"order": []},
    ],
)  # fmt: skip
def test_a_journal_of_other_kinds_of_values_is_none(tmp_path, change):
    """The series would have failed in its middle, or at the comparison of times."""
    path = tmp_path / "series.json"
    plain = asdict(Journal(SeriesOrder(30, exposure_s=1.0), "Acme One", 4, {"iso": "100"}, at=1.7e9))
    path.write_text(json.dumps(plain))
    assert Journal.read(path) is not None
    path.write_text(json.dumps({**plain, **change}))
    assert Journal.read(path) is None


def test_a_journal_nested_too_deeply_is_none(tmp_path):
    """The JSON reader gives up with an error of its own."""
    path = tmp_path / "series.json"
    path.write_text("[" * 100_000)
    assert Journal.read(path) is None


# A server that is no daemon


@pytest.mark.parametrize(
    "said",
    [
        b'{"type":"answer","id":1}\n',
        b'{"type":"answer","id":1,"answer":[1]}\n',
        b'{"type":"error","id":1}\n',
        b'{"type":"error","id":1,"error":{"a":1}}\n',
        b"[" * 50_000 + b"\n",
        b"\xff\n",
    ],
)
def test_an_answer_that_is_none_is_a_feed_error(runtime, said):
    """The reading commands say a sentence, not a traceback."""
    client = attached(runtime / "feed", said)
    with pytest.raises(FeedError):
        client.ask("status", timeout_s=5)
    client.close()


@pytest.mark.parametrize(
    "said",
    [
        b'{"type":"snapshot"}\n',
        b'{"type":"snapshot","set":[1]}\n',
        b'{"type":"change","set":{},"gone":5}\n',
        b'{"type":"change","set":null}\n',
    ],
)
def test_a_state_that_is_none_is_a_feed_error(runtime, said):
    """The dashboard leaves with a sentence, too."""
    client = attached(runtime / "feed", said)
    with pytest.raises(FeedError, match="not hotpixd"):
        list(client.watch())
    client.close()


def test_a_key_that_cannot_be_one_is_never_gone(runtime):
    """What is gone is looked up as it is."""
    client = attached(runtime / "feed", b'{"type":"change","set":{"a":1},"gone":[[],{},"b"]}\n')
    states = client.watch()
    assert next(states) == {"a": 1}
    client.close()


def attached(path: Path, said: bytes) -> FeedClient:
    """Attach a client to a server that says hello and then the same to everybody."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(str(path))
    listener.listen()

    def serve(connection: socket.socket) -> None:
        with connection:
            connection.sendall(b'{"type":"hello","proto":1,"app":"hotpixd","pid":1}\n' + said)
            while connection.recv(4096):
                pass

    def accept() -> None:
        with listener:
            for _ in range(2):
                threading.Thread(target=serve, args=(listener.accept()[0],), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    return FeedClient(path)
