"""What is fuzzed: whatever bytes come, each target ends in one of the ways it promises, or raises.

A target takes the bytes of one case. Formats that a random byte would never get past (a database, a file with a digest)
are reached by changing a whole one: the bytes then say where and into what, and the digest is made right again.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import math
import os
import shutil
import socket
import sqlite3
import struct
import tempfile
import threading
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from blake3 import blake3

from hotpixd import feed_server
from hotpixd.config import Config, ConfigError, load, warnings
from hotpixd.feed import FeedClient, FeedError
from hotpixd.feed_server import FeedServer
from hotpixd.intake import metadata
from hotpixd.intake.darks import Journal, SeriesOrder, left_open
from hotpixd.intake.decode import DecodeError, decode
from hotpixd.intake.link import Link
from hotpixd.store import checkpoint
from hotpixd.store.durable import StateError
from hotpixd.store.ledger import Ledger, Received, TransitionRow

Target = Callable[[bytes], None]

_FOLDER = Path(tempfile.mkdtemp(prefix="hotpixd-fuzz-", dir="/dev/shm" if Path("/dev/shm").is_dir() else None))


def remove_files() -> None:
    """Remove what the targets have written."""
    shutil.rmtree(_FOLDER, ignore_errors=True)


def patched(base: bytes, changes: bytes) -> bytes:
    """Return `base` with changes: of every five bytes, three are a place, one is a value, one says how."""
    content = bytearray(base)
    for at, low, value, how in struct.iter_unpack("<HBBB", changes[: len(changes) // 5 * 5]):
        place = (at << 8 | low) % max(len(content), 1)
        match how % 4:
            case 0:
                content[place] = value
            case 1:
                content[place] ^= 1 << value % 8
            case 2:
                del content[place : place + value]
            case 3:
                content[place:place] = bytes([value]) * (how >> 2)
        if not content:
            break
    return bytes(content)


# Metadata


def read_metadata(data: bytes) -> None:
    """From memory and from a file the same comes out, fit to be shown and to be compared."""
    from_memory = metadata.from_bytes(data)
    from_file = metadata.from_file(io.BytesIO(data))
    assert from_memory == from_file, (from_memory, from_file)
    for text in (from_memory.make, from_memory.model, from_memory.serial, from_memory.software, from_memory.creator):
        assert text is None or text.strip()
    for number in (from_memory.exposure_s, from_memory.iso, from_memory.sensor_temp_c):
        assert number is None or math.isfinite(number)
    if from_memory.taken_at is not None:
        from_memory.taken_at.astimezone().isoformat()


# Decoder


def decode_file(data: bytes) -> None:
    """A frame that is what it says, or a sentence."""
    path = _FOLDER / "shot"
    path.write_bytes(data)
    try:
        frame = decode(path)
    except DecodeError as error:
        assert str(error).isprintable(), repr(str(error))
        return
    assert frame.samples.shape == frame.sensor.layout.shape
    assert frame.samples.dtype.name == frame.sensor.dtype
    assert frame.samples.flags.c_contiguous


# Configuration


def load_configuration(data: bytes) -> None:
    """A tree, or sentences with nothing unprintable in them; a variable is judged like a key."""
    path = _FOLDER / "config.yaml"
    path.write_bytes(data)
    text = data.decode("utf-8", "replace").replace("\0", "")
    for given, environ in ((path, {}), (None, {"HOTPIXD_ALERTS__NOTIFY": text}), (None, {"HOTPIXD_STATE": text})):
        try:
            config = load(given, environ=environ, overrides={})
        except ConfigError as error:
            assert error.messages
            for message in error.messages:
                assert message.isprintable(), repr(message)
        else:
            assert isinstance(config, Config)
            assert all(warning.isprintable() for warning in warnings(config, given))


# Feed


class _Complaints(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)


class _Server:
    """A real server; all questions are answered with themselves."""

    def __init__(self) -> None:
        self.path = _FOLDER / "feed"
        self.complaints = _Complaints()
        logging.getLogger(feed_server.__name__).addHandler(self.complaints)
        self.server = FeedServer(self.path, {}, self._answer)
        self.server.publish({"a": 1, "b": [1.5, "text"]})
        self.server.start()

    def _answer(self) -> None:
        for question in self.server.questions():
            if question.name == "refuse":
                question.refuse("No.")
            else:
                question.answer({"asked": question.name, "with": dict(question.arguments)})


_running: dict[str, Any] = {}


def ask_server(data: bytes) -> None:
    """A client may send what it likes: it is answered in lines of JSON and dropped, and others are served on."""
    server = _running.setdefault("server", None) or _Server()
    _running["server"] = server
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
        client.settimeout(5)
        client.connect(str(server.path))
        with contextlib.suppress(ConnectionError):
            client.sendall(data)
            client.shutdown(socket.SHUT_WR)
        answered = b""
        with contextlib.suppress(ConnectionError):
            while received := client.recv(1 << 16):
                answered += received
    lines = [json.loads(line) for line in answered.split(b"\n")[:-1]]
    assert lines[0]["type"] == "hello"
    assert all(line["type"] in ("hello", "snapshot", "change", "answer", "error", "bye") for line in lines)
    assert not server.complaints.records, server.complaints.records[0].getMessage()
    list(server.server.questions())


_HELLO = b'{"type":"hello","proto":1,"app":"hotpixd","pid":1}\n'


class _Hostile:
    """Sends the same bytes to everybody who connects."""

    def __init__(self) -> None:
        self.path = _FOLDER / "hostile"
        self.data = b""
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(str(self.path))
        self._listener.listen()
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            connection, _ = self._listener.accept()
            threading.Thread(target=self._send, args=(connection,), daemon=True).start()

    def _send(self, connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            connection.sendall(self.data)
            connection.shutdown(socket.SHUT_WR)
            connection.settimeout(0.5)
            while connection.recv(1 << 16):
                pass


def follow_hostile_server(data: bytes) -> None:
    """What a client gets from something that is no daemon is an answer, a state or `FeedError`."""
    server = _running.setdefault("hostile", None) or _Hostile()
    _running["hostile"] = server
    server.data = data if data[:1] == b"\0" else _HELLO + data
    try:
        client = FeedClient(server.path, 1.0)
    except FeedError:
        return
    try:
        with contextlib.suppress(FeedError):
            assert isinstance(client.ask("status", timeout_s=1.0), dict)
        with contextlib.suppress(FeedError):
            for live in client.watch():
                assert isinstance(live, Mapping)
    finally:
        client.close()


# Ledger


def _whole_ledger() -> bytes:
    path = _FOLDER / "whole.sqlite"
    ledger = Ledger(path)
    ledger.add_sensor("acme-1", {"make": "Acme", "layout": {"width": 4, "height": 4}})
    shots = [Received(f"{n:064x}", f"IMG_{n}.DNG", "/card", 1000 + n, "2026-01-02T03:04:05Z") for n in range(12)]
    seqs = ledger.receive(shots)
    for seq in seqs[:8]:
        ledger.conclude(
            seq, verdict="folded", sensor_id="acme-1", kind="dark", counted=bool(seq % 2),
            not_counted_because="static: no", taken_at="2026-01-02T03:04:05+00:00", exposure_s=1.0, samples_digest="ab",
        )  # fmt: skip
        ledger.add_observations("acme-1", seq, [1, 2], [3.0, 4.0], [1.0, 2.0], [1, 0])
    ledger.conclude(seqs[8], verdict="refused", reason="it is no picture")
    ledger.add_transitions([TransitionRow("acme-1", 2, seqs[3], "stable", {"log_e": 20.0})])
    ledger.add_seen(b"x" * 32, b"y" * 32)
    ledger.commit()
    ledger._db.execute(
        "INSERT INTO alert(key, raised_at, topic, subject, text, detail) VALUES ('k', 't', 'disk', 's', 'x', '{}')"
    )
    ledger.close()
    with contextlib.closing(sqlite3.connect(path)) as db:
        db.execute("PRAGMA journal_mode = DELETE")
        db.execute("VACUUM")
    return path.read_bytes()


def open_ledger(data: bytes) -> None:
    """A damaged ledger is said to be damaged, or gives rows of the kinds it has."""
    base = _running.get("ledger") or _whole_ledger()
    _running["ledger"] = base
    path = _FOLDER / "ledger.sqlite"
    for suffix in ("", "-wal", "-shm", "-journal"):
        Path(f"{path}{suffix}").unlink(missing_ok=True)
    path.write_bytes(patched(base, data))
    with contextlib.suppress(StateError):
        ledger = Ledger(path)
        try:
            _read_all(ledger)
        finally:
            with contextlib.suppress(StateError):
                ledger.close()


def _read_all(ledger: Ledger) -> None:
    def told(read: Callable[[], Any]) -> Any:
        with contextlib.suppress(StateError):
            return read()
        return None

    told(ledger.check)
    rows = [
        *(told(lambda: ledger.rows_to_replay({"acme-1": 4})) or []),
        *(told(ledger.refused) or []),
        *filter(None, [told(ledger.last_shot)]),
    ]
    for row in rows:
        assert isinstance(row.seq, int)
        assert isinstance(row.key, str), row
        assert isinstance(row.name, str), row
        assert row.verdict in ("received", "folded", "refused", "companion"), row
    told(ledger.tally)
    told(lambda: ledger.frame_keys("acme-1"))
    told(lambda: ledger.times([row.seq for row in rows] or [1, 2]))
    told(lambda: ledger.not_counted("acme-1"))
    told(lambda: ledger.verdicts([f"{1:064x}"]))
    for identity in (told(ledger.sensors) or {}).values():
        assert isinstance(identity, dict), identity
    told(lambda: ledger.observations("acme-1"))
    told(lambda: ledger.transitions("acme-1"))
    told(lambda: ledger.alerts(10))
    told(ledger.seen_files)
    told(lambda: ledger.receive([Received("f" * 64, "new", "/card", 1, "2026-01-02T03:04:05Z")]))


# Generation


def _whole_generation() -> bytes:
    folder = _FOLDER / "whole"
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(1)
    arrays = {
        "sums": rng.integers(0, 2**20, 300).astype("<u4"),
        "squares": rng.integers(0, 2**40, (30, 10)).astype("<u8"),
        "empty": np.zeros(0, "<u1"),
        "zero": np.zeros(40, "<f4"),
    }
    return checkpoint.write_generation(folder, 3, {"sensor": {"a": 1}, "covers": 12}, arrays).read_bytes()


def read_generation(data: bytes) -> None:
    """A generation is whole, or it is a `GenerationError`, also if its digest is right and what it covers is not."""
    base = _running.get("generation") or _whole_generation()
    _running["generation"] = base
    path = _FOLDER / "gen-00000003.hpx"
    if data[:1] == b"\0":
        content = data[1:]
    else:
        content = patched(base[:-32], data[1:])
        content += blake3(content).digest()
    path.write_bytes(content)
    for read in (checkpoint.verify, checkpoint.read_generation):
        try:
            found = read(path)
        except checkpoint.GenerationError as error:
            assert str(error)
        else:
            assert isinstance(found, dict | checkpoint.Generation)
    newest, skipped = checkpoint.newest(_FOLDER)
    assert newest is not None or skipped


# Camera worker's pipe


class _Process:
    """Stands for the worker, which is not started."""

    pid = 0


def hear_worker(data: bytes) -> None:
    """What comes through the pipe of a worker is understood, or the worker is given up."""
    out, into = os.pipe()
    os.set_blocking(out, False)
    link = object.__new__(Link)
    answered: list[object] = []
    values = {
        "_process": _Process(), "_in": -1, "_out": out, "_hang_s": 10.0, "_partial": b"", "_last_id": 2,
        "_waiting": {n: lambda ok, error: answered.append((ok, error)) for n in (1, 2)},
        "_patience_s": 0.0, "heard_at": 0.0, "failure": None,
    }  # fmt: skip
    for name, value in values.items():
        setattr(link, name, value)
    events: list[dict[str, Any]] = []
    try:
        os.write(into, data[: 1 << 15])
        alive = link.read(events.append)
        os.close(into)
        into = -1
        if alive:
            assert link.read(events.append) is False
        assert all(isinstance(event, dict) and isinstance(event["event"], str) for event in events)
        assert math.isfinite(link.hangs_at)
        assert link.failure is None or isinstance(link.failure["text"], str)
    finally:
        os.close(out)
        if into >= 0:
            os.close(into)


# Journal of a series


def read_journal(data: bytes) -> None:
    """An unfinished series can be gone on with, or there is none."""
    path = _FOLDER / "series.json"
    path.write_bytes(data)
    journal = Journal.read(path)
    left_open(path)
    if journal is None:
        return
    journal.goes_on_with(SeriesOrder(30, exposure_s=1.0), "Acme One")
    assert isinstance(journal.taken, int)
    assert isinstance(journal.bulb_open, bool)
    assert math.isfinite(journal.at)
    assert all(isinstance(name, str) for name in journal.restore)
    json.dumps(asdict(journal), allow_nan=False)


TARGETS: dict[str, Target] = {
    "metadata": read_metadata,
    "decode": decode_file,
    "config": load_configuration,
    "server": ask_server,
    "client": follow_hostile_server,
    "ledger": open_ledger,
    "generation": read_generation,
    "link": hear_worker,
    "journal": read_journal,
}
