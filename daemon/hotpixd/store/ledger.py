"""The ledger: one durable row per shot received, and what was derived from the shots in their order.

A committed row is the acknowledgement of a shot. Everything else (verdicts,
observations, transitions) is a function of the shots in the order of their
`seq`, so a replay writes the same rows again; these rows wait and go to disk
with the next commit.

One connection, one process, one thread: EXCLUSIVE locking keeps SQLite's
write-ahead log out of shared memory, and with it away from the WAL-reset bug
of SQLite 3.7.0 to 3.51.2, which needs two connections. synchronous=FULL, as
NORMAL may lose the last commits when the power goes.

SQLite does not notice a byte that changed within a value. Each row therefore
carries a seal, a digest of its columns and of a number that is this ledger's
alone, written by triggers and checked whenever the ledger is opened: a changed
byte, a page of another ledger and a log of another ledger break it. Observations
have none: they are many, nothing is decided by them, and a replay writes them
again. The check takes 0.7 s for 100,000 shots, that of the index included (one
core of a Xeon VM).
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import shutil
import sqlite3
import stat
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypedDict, Unpack, get_args

from blake3 import blake3

from hotpixd.store import wal
from hotpixd.store.durable import StateDamaged, StateError, StateFull, failpoint, make_folder
from hotpixd.words import utc

if TYPE_CHECKING:
    # To run only where there are observations or timelines: `status` asks for neither.
    import numpy as np
    from numpy.typing import NDArray

Verdict = Literal["received", "folded", "refused", "companion"]
Change = Literal["appeared", "stable", "recovered", "dropped"]

SCHEMA_VERSION = 4

LOST = (
    "it was received, but its copy in the spool is gone or was changed, and so is the original: it cannot"
    " be folded again"
)
"""The reason of a shot that was acknowledged and cannot be replayed. Offered again, it is received anew."""

# Observations lie in the order in which they come, (sensor, seq, site): a frame's rows are then appended to
# a few pages. In the order (sensor, site, seq) each row of a frame would dirty a page of its own. A site's
# history is still one look-up per shot.
_SCHEMA = """
CREATE TABLE shot(
    seq INTEGER PRIMARY KEY AUTOINCREMENT,
    key TEXT UNIQUE NOT NULL,
    name TEXT NOT NULL,
    path TEXT NOT NULL,
    size INTEGER NOT NULL,
    received_at TEXT NOT NULL,
    kind_given TEXT CHECK (kind_given IN ('light', 'dark')),
    camera_given TEXT,
    verdict TEXT NOT NULL DEFAULT 'received'
        CHECK (verdict IN ('received', 'folded', 'refused', 'companion')),
    reason TEXT,
    sensor_id TEXT,
    kind TEXT,
    exposure_s REAL,
    iso REAL,
    sensor_temp_c REAL,
    taken_at TEXT,
    counted INTEGER,
    not_counted_because TEXT,
    lift REAL,
    samples_digest TEXT
);
CREATE INDEX shot_by_verdict ON shot(verdict, sensor_id, seq);
CREATE TABLE sensor(
    number INTEGER PRIMARY KEY,
    id TEXT UNIQUE NOT NULL,
    identity TEXT NOT NULL
);
CREATE TABLE observation(
    sensor INTEGER NOT NULL,
    seq INTEGER NOT NULL,
    site INTEGER NOT NULL,
    value_adu REAL,
    excess_adu REAL,
    events INTEGER,
    PRIMARY KEY (sensor, seq, site)
) WITHOUT ROWID;
CREATE TABLE transition(
    sensor INTEGER NOT NULL,
    seq INTEGER NOT NULL,
    site INTEGER NOT NULL,
    change TEXT NOT NULL CHECK (change IN ('appeared', 'stable', 'recovered', 'dropped')),
    detail TEXT NOT NULL,
    PRIMARY KEY (sensor, seq, site, change)
) WITHOUT ROWID;
"""

# Since format 2. A file seen is known by a digest of its volume, path, size and time; that only saves reading it
# again. Alerts wait here until they are sent: `outbox` says how.
_SCHEMA_2 = """
CREATE TABLE seen(file BLOB PRIMARY KEY) WITHOUT ROWID;
CREATE TABLE alert(
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    key TEXT UNIQUE NOT NULL,
    raised_at TEXT NOT NULL,
    topic TEXT NOT NULL,
    subject TEXT NOT NULL,
    text TEXT NOT NULL,
    detail TEXT NOT NULL,
    message INTEGER
);
CREATE INDEX alert_by_message ON alert(message, id);
CREATE INDEX alert_by_subject ON alert(subject, id);
CREATE TABLE delivery(
    message INTEGER NOT NULL,
    channel TEXT NOT NULL,
    tries INTEGER NOT NULL DEFAULT 0,
    state TEXT NOT NULL DEFAULT 'due' CHECK (state IN ('due', 'sent', 'given up')),
    PRIMARY KEY (message, channel)
) WITHOUT ROWID;
"""

# Since format 3. Of a camera's file it is known which shot it held: its JPEG may come in another run.
_SCHEMA_3 = "ALTER TABLE seen ADD COLUMN shot BLOB;"

# Since format 4: how often it was tried to decode a shot, and the seals of rows. `proof` holds a digest of the schema,
# and up to which shot the state was restored from a backup.
_SCHEMA_4 = """
ALTER TABLE shot ADD COLUMN attempts INTEGER NOT NULL DEFAULT 0;
CREATE TABLE proof(name TEXT PRIMARY KEY, value BLOB NOT NULL) WITHOUT ROWID;
"""

_SEALED = {
    "shot": (
        ("seq",),
        (
            *("key", "name", "path", "size", "received_at", "kind_given", "camera_given", "verdict", "reason"),
            *("sensor_id", "kind", "exposure_s", "iso", "sensor_temp_c", "taken_at"),
            *("counted", "not_counted_because", "lift", "samples_digest"),
        ),
    ),
    "sensor": (("number",), ("id", "identity")),
    "transition": (("sensor", "seq", "site", "change"), ("detail",)),
    "alert": (("id",), ("key", "raised_at", "topic", "subject", "text", "detail", "message")),
    "delivery": (("message", "channel"), ("tries", "state")),
}
"""By table: the columns that tell a row from others, and the others that its seal covers."""


def _sealing() -> str:
    """Return the statements that give every row a seal, now and whenever it is written."""
    statements = []
    for table, (keys, others) in _SEALED.items():
        sealed = f"sealed({', '.join([*keys, *others])})"
        same = " AND ".join(f"{key} = new.{key}" for key in keys)
        statements.append(f"ALTER TABLE {table} ADD COLUMN seal BLOB; UPDATE {table} SET seal = {sealed};")
        for name, written in (("made", "INSERT"), ("changed", f"UPDATE OF {', '.join([*keys, *others])}")):
            statements.append(
                f"CREATE TRIGGER {table}_{name} AFTER {written} ON {table}"
                f" BEGIN UPDATE {table} SET seal = {sealed} WHERE {same}; END;"
            )
    return "".join(statements)


_MIGRATIONS = {
    1: "ALTER TABLE shot ADD COLUMN camera_given TEXT;" + _SCHEMA_2,
    2: _SCHEMA_3,
    3: _SCHEMA_4 + _sealing(),
}
"""From a format to the next one."""


@dataclass(frozen=True, slots=True)
class Received:
    """A shot whose bytes are safe in the spool, to be acknowledged."""

    key: str
    """BLAKE3 of its file's content, hex."""

    name: str
    """Name of its file. May hold bytes that are not UTF-8, as surrogates."""

    path: str
    """Where it came from, for people. May hold surrogates too."""

    size: int
    """Bytes of its file."""

    received_at: str
    """When, UTC, ISO 8601. A label: the order of shots is that of their rows."""

    kind_given: Literal["light", "dark"] | None = None
    """What the user said it is. None if nothing."""

    camera_given: str | None = None
    """The user's name for the camera. None if they gave none."""

    companion_of: str | None = None
    """Name of the raw file of the same shot, which is folded instead. None if there is none."""


@dataclass(frozen=True, slots=True)
class ShotRow:
    """Everything the ledger knows of a shot. What is not known (yet) is None."""

    seq: int
    """Its place in the order of folding. Grows, never used twice."""

    key: str
    name: str
    path: str
    size: int
    received_at: str
    kind_given: Literal["light", "dark"] | None
    camera_given: str | None

    verdict: Verdict
    """received: not decided yet; folded: into its sensor's statistic; refused; companion: of a raw file."""

    reason: str | None
    """Why it was refused, or whose companion it is."""

    sensor_id: str | None
    kind: str | None
    exposure_s: float | None
    iso: float | None
    sensor_temp_c: float | None
    taken_at: str | None

    counted: bool | None
    """Whether its events count as evidence."""

    not_counted_because: str | None
    lift: float | None

    samples_digest: str | None
    """Digest of the decoded samples: tells whether a replay decodes the same."""

    attempts: int
    """Replays that began with it before it had a verdict. More than one: it may be what ended them."""

    @property
    def is_lost(self) -> bool:
        """Whether it was acknowledged, but could not be folded again: offered again, it is to be received anew."""
        return self.verdict == "refused" and self.reason == LOST


class Conclusion(TypedDict, total=False):
    """The columns of a shot that `Ledger.conclude` may set; those of the same names in `ShotRow`."""

    verdict: Verdict
    reason: str | None
    sensor_id: str | None
    kind: str | None
    exposure_s: float | None
    iso: float | None
    sensor_temp_c: float | None
    taken_at: str | None
    counted: bool | None
    not_counted_because: str | None
    lift: float | None
    samples_digest: str | None


class Observation(NamedTuple):
    """What one frame showed at one site, with how the shot was taken."""

    seq: int
    site: int
    value_adu: float | None
    excess_adu: float | None
    events: int | None
    exposure_s: float | None
    iso: float | None
    sensor_temp_c: float | None
    taken_at: str | None
    kind: str | None
    counted: bool | None


@dataclass(frozen=True, slots=True)
class Timeline:
    """The frames folded for a sensor, in the order of folding; every array has one entry per frame."""

    seqs: NDArray[np.int64]

    times_s: NDArray[np.int64]
    """When each was taken, or received where the file does not say or names the future; UNIX time."""

    counted: NDArray[np.bool_]
    """Whether it was new evidence."""

    dark: NDArray[np.bool_]

    exposure_s: NDArray[np.float64]
    """NaN where the file does not say; so in the next two."""

    iso: NDArray[np.float64]

    sensor_temp_c: NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class TransitionRow:
    """A site of a sensor changed its life cycle with the shot `seq`."""

    sensor_id: str
    site: int
    seq: int
    change: Change
    detail: Mapping[str, Any]
    """Whatever describes it, as JSON can hold it."""


@dataclass(frozen=True, slots=True)
class Tally:
    """Numbers of shots by verdict: of one sensor, or of those not (yet) known to be of any."""

    sensor_id: str | None
    received: int = 0
    folded: int = 0
    counted: int = 0
    """Of those folded, how many count as evidence."""
    refused: int = 0
    companion: int = 0


_FRAMES_OBSERVED = """
    WITH RECURSIVE frame(seq) AS (
        SELECT min(seq) FROM observation WHERE sensor = :sensor
        UNION ALL
        SELECT (SELECT min(seq) FROM observation WHERE sensor = :sensor AND seq > frame.seq)
        FROM frame WHERE frame.seq IS NOT NULL
    )"""
"""From each frame to the next, by the primary key: a DISTINCT would read all their rows."""

_THINNED_AT_ONCE = 32
"""Frames whose observations go with one new frame. One on average; more where an older version left them all."""

_KEY = re.compile(r"[0-9a-f]{64}")
_VERDICTS = get_args(Verdict)
_SHOT_COLUMNS = ", ".join(field.name for field in fields(ShotRow))
_CONCLUSION_COLUMNS = frozenset(Conclusion.__annotations__)


@dataclass(slots=True)
class _Observed:
    """The frames of a sensor whose observations are in the ledger."""

    count: int
    """Frames ever observed: those counted as evidence."""

    newest: int
    """Seq of the last one."""

    ranks: NDArray[np.int64]
    """(K,) places among all ever observed, of those that are still there, ascending."""

    seqs: NDArray[np.int64]
    """(K,) their seqs."""


class Ledger:
    """The ledger's one connection. Use it from the thread that opened it.

    Derived rows wait in memory: where many come without a `receive` (a replay), call `commit` now and then.
    """

    def __init__(
        self,
        path: Path | None,
        acknowledged: Callable[[int, int], None] = lambda _tag, _seq: None,
        left: Path | None = None,
    ) -> None:
        """Open the ledger or make a new one; without a path one in memory, gone with this process.

        Parameters
        ----------
        acknowledged : told the ledger's tag and the highest seq whenever shots have become durable
        left : something that only the shots of a ledger can have left; then no new one is made

        Raises
        ------
        StateDamaged
            If anything in it that decides about shots, sensors or alerts can no longer be believed. It is left as it
            is.
        StateError
            If it is not a ledger, or is of a newer hotpixd. It is left as it is.
        """
        self.path = path
        self._acknowledged = acknowledged
        # Derived writes since the last commit, and how many of them are in the open transaction. Kept, so
        # that a commit which failed on a full disk, and was rolled back, can be tried again.
        self._failed = False
        self._pending: list[tuple[str, Sequence[Sequence[object]]]] = []
        self._applied = 0
        self._taken_in = 0
        self._tag = 0
        self._observed: dict[str, _Observed] = {}
        self._look_at_files()
        with self._in_plain_words():
            self._db = sqlite3.connect(":memory:" if path is None else path, isolation_level=None)
        try:
            with self._in_plain_words():
                self._db.create_function("sealed", -1, self._seal, deterministic=True)
                self._open(left)
                self._check_rows()
                self._numbers: dict[str, int] = dict(self._db.execute("SELECT id, number FROM sensor"))
        except BaseException as error:
            if isinstance(error, StateError) and not isinstance(error, StateFull):
                # Not at any price: without room the sentence is worth more.
                with suppress(OSError):
                    self._keep_log()
            self._db.close()
            raise

    def _look_at_files(self) -> None:
        """See what SQLite would not say: these are files, and no acknowledged shot would be dropped from the log."""
        if self.path is None:
            return
        log = _log_of(self.path)
        for path in (self.path, log):
            try:
                found = path.stat()
            except FileNotFoundError:
                if path.is_symlink():
                    raise StateDamaged(f"The ledger {path} is damaged: it is a link to nothing.") from None
                continue
            if not stat.S_ISREG(found.st_mode):
                raise StateDamaged(f"The ledger {path} is damaged: it is no file.")
        try:
            if log.exists() and log.stat().st_size and self.path.exists():
                with self.path.open("rb") as file:
                    if file.read(20)[18:] != b"\2\2":
                        # Taken at its word, SQLite would begin a new log over this one.
                        raise self._damaged("its header denies that it has a log")
            lost = wal.acknowledged_is_lost(self.path, log)
        except OSError as error:
            raise StateError(f"The ledger {self.path} cannot be read: {error.strerror}.") from error
        if lost:
            raise StateDamaged(f"The ledger {log} is damaged: acknowledged shots behind the damage would be dropped.")

    def _open(self, left: Path | None) -> None:
        self._db.execute("PRAGMA locking_mode = EXCLUSIVE")
        (version,) = self._db.execute("PRAGMA user_version").fetchone()
        if version > SCHEMA_VERSION:
            raise StateError(
                f"The ledger {self.path} has format {version}, and this hotpixd knows none above"
                f" {SCHEMA_VERSION}. Use the newer hotpixd that wrote it."
            )
        (tables,) = self._db.execute("SELECT count(*) FROM sqlite_master").fetchone()
        if version < 0:
            raise self._damaged(f"its format is {version}")
        if not tables and left is not None:
            raise StateDamaged(f"The ledger {self.path} is empty, but {left} is there.")
        if tables and version == 0:
            raise StateError(f"{self.path} is a database, but not a ledger of hotpixd.")
        if 0 < version < SCHEMA_VERSION:
            # Before anything is changed: there are no seals yet that would tell.
            self._find("PRAGMA integrity_check(1)")
        self._db.execute("PRAGMA journal_mode = WAL")
        self._db.execute("PRAGMA synchronous = FULL")
        # What fits in it is not written twice; a frame's observations need 0.2 MB.
        self._db.execute("PRAGMA cache_size = -4096")
        (self._tag,) = self._db.execute("PRAGMA application_id").fetchone()
        if version == 0:
            # One transaction: after a power cut there is all of the schema, or a new ledger is made.
            # The folder needs no fsync of ours: SQLite makes one for its log, before the first commit returns.
            self._make(f"{_SCHEMA}{_SCHEMA_2}{_SCHEMA_3}{_MIGRATIONS[3]}", SCHEMA_VERSION)
            return
        for older in range(version, SCHEMA_VERSION):
            self._make(_MIGRATIONS[older], older + 1)

    def _make(self, statements: str, version: int) -> None:
        """Change the schema in one transaction."""
        if version >= 4 and not self._tag:
            self._tag = secrets.randbelow((1 << 31) - 1) + 1
        self._db.executescript(
            f"BEGIN;{statements}PRAGMA application_id = {self._tag};PRAGMA user_version = {version};"
        )
        if version >= 4:
            self._db.execute("INSERT OR REPLACE INTO proof VALUES ('schema', ?)", (self._schema_digest(),))
        self._db.execute("COMMIT")

    def _seal(self, *columns: object) -> bytes:
        # ascii, not repr: which letters repr escapes depends on the version of Python.
        return hashlib.blake2b(ascii((self._tag, *columns)).encode(), digest_size=8).digest()

    def _schema_digest(self) -> bytes:
        schema = self._db.execute("SELECT type, name, tbl_name, sql FROM sqlite_master ORDER BY type, name").fetchall()
        return hashlib.blake2b(ascii(schema).encode(), digest_size=16).digest()

    def _check_rows(self) -> None:
        """Raise `StateDamaged` if a row was changed by anyone but hotpixd, or is missing in an index."""
        # The form of every page; which row an index leads to is looked at below, where a wrong one could do harm.
        self._find("PRAGMA quick_check(1)")
        proof = self._db.execute("SELECT value FROM proof WHERE name = 'schema'").fetchall()
        if proof != [(self._schema_digest(),)]:
            raise self._damaged("its tables are not as they were made")
        for table, (keys, others) in _SEALED.items():
            self._find(f"PRAGMA integrity_check({table})")
            sealed = f"sealed({', '.join([*keys, *others])})"
            count, first = self._db.execute(
                f"SELECT count(*), min({keys[0]}) FROM {table} NOT INDEXED WHERE seal IS NOT {sealed}"
            ).fetchone()
            if count:
                raise self._damaged(
                    f"of the table {table}, {count} {'row was' if count == 1 else 'rows were'} changed by something"
                    f" else than hotpixd (the first has {keys[0]} {first!r})"
                )

    def _find(self, check: str) -> None:
        for (finding,) in self._db.execute(check).fetchall():
            if finding != "ok":
                # SQLite writes some over several lines.
                raise self._damaged(" ".join(finding.split()))

    def _keep_log(self) -> None:
        """Copy database and log before SQLite merges them at closing: what was found is evidence."""
        if self.path is None:
            return
        log = _log_of(self.path)
        if not log.exists() or not log.stat().st_size:
            return
        folder = self.path.with_name("damaged")
        make_folder(folder)
        stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ")
        for path in (self.path, log):
            shutil.copyfile(path, folder / f"{path.name}-{stamp}")

    def close(self) -> None:
        """Commit what waits and close."""
        try:
            # Nothing is tried again on a disk that has failed: a second fsync may lie.
            if not self._failed:
                self.commit()
        finally:
            with self._in_plain_words():
                self._db.close()

    def copy_to(self, path: Path) -> None:
        """Write a copy of all that is committed, and of what waits, to a new file; not fsynced."""
        self.commit()
        with self._in_plain_words():
            copy = sqlite3.connect(path, isolation_level=None)
            try:
                # Nobody reads it before it is whole; and with a log of its own it would be written twice.
                copy.execute("PRAGMA synchronous = OFF")
                copy.execute("PRAGMA journal_mode = OFF")
                self._db.backup(copy)
            finally:
                copy.close()

    def check(self) -> None:
        """Read the whole database and raise `StateDamaged` if anything in it is damaged."""
        with self._in_plain_words():
            self._apply_pending()
            self._check_rows()
            self._find("PRAGMA integrity_check(1)")

    # --- shots

    def receive(self, shots: Sequence[Received]) -> list[int]:
        """Write the shots and all derived rows that wait; when this returns, they survive a power cut.

        Returns
        -------
        One seq per shot, in their order. A shot whose key is known already keeps its row.

        Raises
        ------
        StateFull
            If the disk is full. None of the shots is received then; the derived rows wait on.
        """
        with self._in_plain_words():
            self._apply_pending()
            if not self._db.in_transaction:
                self._db.execute("BEGIN IMMEDIATE")
            seqs = [self._receive_one(shot) for shot in shots]
            failpoint("before_receive")
            self._commit()
            failpoint("after_receive")
        if seqs:
            self._acknowledged(self._tag, max(seqs))
        return seqs

    def take_in(self, shot: Received) -> int:
        """Write a shot that is unknown yet with the next commit, which acknowledges it; return its seq.

        For one whose bytes are not in the spool: its source offers it again until it has a verdict.
        """
        seq = self.last_seq + 1
        values = (seq, shot.key, _file_text(shot.name), _file_text(shot.path), shot.size, shot.received_at)
        about = "companion" if shot.companion_of else "received", _companion(shot.companion_of)
        self.later(
            "INSERT INTO shot(seq, key, name, path, size, received_at, kind_given, camera_given, verdict, reason)"
            " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            [(*values, shot.kind_given, shot.camera_given, *about)],
        )
        self._taken_in = seq
        return seq

    @property
    def tag(self) -> int:
        """A number that is this ledger's alone, and its copies'."""
        return self._tag

    @property
    def last_seq(self) -> int:
        """The highest seq ever given, be its row still there or not."""
        return next((int(seq) for (seq,) in self.rows("SELECT seq FROM sqlite_sequence WHERE name = 'shot'")), 0)

    def note_restored(self) -> None:
        """Write down that the state is made from a backup, in which shots that a generation covers have no copy."""
        self.later("INSERT OR REPLACE INTO proof VALUES ('restored', ?)", [(self.last_seq,)])

    @property
    def restored_upto(self) -> int:
        """The highest seq when the state was restored; 0 if it never was."""
        return next((int(seq) for (seq,) in self.rows("SELECT value FROM proof WHERE name = 'restored'")), 0)

    def note_rewritten(self, path: str) -> None:
        """Write down that the file at a path is overwritten in place."""
        # Not as the name: that is a text, and a path need not be UTF-8.
        name = f"rewritten {blake3(os.fsencode(path)).hexdigest(16)}"
        self.later("INSERT OR REPLACE INTO proof VALUES (?, ?)", [(name, _file_text(path))])

    @property
    def rewritten(self) -> set[str]:
        """The paths at which files are known to be overwritten in place."""
        return {_text(path) for (path,) in self.rows("SELECT value FROM proof WHERE name LIKE 'rewritten %'")}

    def find(self, key: str) -> ShotRow | None:
        """Return the shot of this key, if it was ever received."""
        return next(iter(self._shots("WHERE key = ?", (key,))), None)

    def forget(self, key: str) -> None:
        """Remove the row of a refused shot or a companion, so that it can be received anew.

        Raises
        ------
        ValueError
            If the shot is folded or about to be: its row is what a replay needs.
        """
        shot = self.find(key)
        if shot is None:
            return
        if shot.verdict not in ("refused", "companion"):
            raise ValueError(f"only a refused shot can be forgotten, {key} is {shot.verdict}")
        self.later("DELETE FROM shot WHERE seq = ?", [(shot.seq,)])

    def begin_attempt(self, seq: int) -> None:
        """Note that a replay is about to take up a shot; when this returns, that survives whatever the shot does."""
        self.later("UPDATE shot SET attempts = attempts + 1 WHERE seq = ?", [(seq,)])
        self.commit()

    def conclude(self, seq: int, **columns: Unpack[Conclusion]) -> None:
        """Set columns of a shot: its verdict and what is known of it. The others stay as they are."""
        unknown = columns.keys() - _CONCLUSION_COLUMNS
        if unknown or not columns:
            raise ValueError(f"a shot's conclusion has no columns {sorted(unknown)}")
        names = ", ".join(f"{name} = ?" for name in columns)
        self.later(f"UPDATE shot SET {names} WHERE seq = ?", [(*map(_storable, columns.values()), int(seq))])

    def rows_to_replay(self, covers: Mapping[str, int]) -> list[ShotRow]:
        """Return, in seq order, the shots that no loaded generation contains.

        These are the shots without a verdict, those folded after the last one that the generation in use
        covers (`covers`, by sensor), and all folded for a sensor without a generation. This is right only if
        verdicts are committed before a generation that covers their shots is written.
        """
        wanted: list[object] = []
        after = ""
        for sensor_id, seq in covers.items():
            after += " OR verdict = 'folded' AND sensor_id = ? AND seq > ?"
            wanted += [sensor_id, seq]
        marks = ", ".join("?" * len(covers))
        return list(
            self._shots(
                f"WHERE verdict = 'received' OR verdict = 'folded' AND sensor_id NOT IN ({marks}){after} ORDER BY seq",
                [*covers, *wanted],
            )
        )

    def refused(self) -> list[ShotRow]:
        """Return the refused shots, in seq order."""
        return list(self._shots("WHERE verdict = 'refused' ORDER BY seq"))

    def strange_sensors(self) -> list[str]:
        """Return the sensors that shots are of, but which the ledger does not know: their rows were lost."""
        # NULL is told to be outside of the empty set.
        query = (
            "SELECT DISTINCT sensor_id FROM shot"
            " WHERE sensor_id IS NOT NULL AND sensor_id NOT IN (SELECT id FROM sensor) ORDER BY sensor_id"
        )
        return [id_ for (id_,) in self.rows(query)]

    def last_shot(self, sensor_id: str | None = None) -> ShotRow | None:
        """Return the shot received last, of one sensor (folded, refused or companion) or of all."""
        if sensor_id is None:
            return next(iter(self._shots("ORDER BY seq DESC LIMIT 1")), None)
        return next(iter(self._shots("WHERE sensor_id = ? ORDER BY seq DESC LIMIT 1", (sensor_id,))), None)

    def frame_keys(self, sensor_id: str, upto: int | None = None) -> list[str]:
        """Return the keys of all shots folded for a sensor, up to a seq if given, sorted."""
        query = "SELECT key FROM shot WHERE verdict = 'folded' AND sensor_id = ? AND seq <= ? ORDER BY key"
        return [key for (key,) in self.rows(query, (sensor_id, 2**62 if upto is None else upto))]

    def chain(self, sensor_id: str, upto: int) -> Any:
        """Return a running BLAKE3 of what was folded for a sensor up to a seq: a generation carries its digest.

        Of another ledger, or of an older copy of this one, it is another.
        """
        digest = blake3(sensor_id.encode())
        query = "SELECT seq, key FROM shot WHERE verdict = 'folded' AND sensor_id = ? AND seq <= ? ORDER BY seq"
        for seq, key in self.rows(query, (sensor_id, upto)):
            digest.update(link_of_chain(seq, key))
        return digest

    def times(self, seqs: Iterable[int]) -> dict[int, str]:
        """Return when shots were taken, or received where the file does not say; UTC, ISO 8601."""
        query = "SELECT coalesce(taken_at, received_at) FROM shot WHERE seq = ?"
        found = {}
        for seq in seqs:
            for (moment,) in self.rows(query, (seq,)):
                try:
                    found[seq] = utc(datetime.fromisoformat(moment))
                except (ValueError, TypeError) as error:
                    raise self._damaged(f"the time of shot {seq} is {moment!r}") from error
        return found

    def not_counted(self, sensor_id: str) -> dict[str, int]:
        """Return why frames of a sensor were no new evidence, and how many for each reason."""
        query = "SELECT not_counted_because FROM shot WHERE verdict = 'folded' AND sensor_id = ? AND counted = 0"
        return dict(Counter((reason or "").split(":")[0] for (reason,) in self.rows(query, (sensor_id,))))

    def verdicts(self, keys: Iterable[str]) -> dict[str, tuple[Verdict, str | None, int]]:
        """Return (verdict, sensor_id, seq) of those keys that have a row."""
        query = "SELECT verdict, sensor_id, seq FROM shot WHERE key = ?"
        found = {}
        for key in keys:
            for row in self.rows(query, (key,)):
                found[key] = row
        return found

    def tally(self) -> list[Tally]:
        """Count the shots of each sensor by verdict; shots of no known sensor under None, first."""
        query = """
            SELECT sensor_id, sum(verdict = 'received'), sum(verdict = 'folded'),
                   sum(verdict = 'folded' AND coalesce(counted, 0)), sum(verdict = 'refused'),
                   sum(verdict = 'companion')
            FROM shot GROUP BY sensor_id ORDER BY sensor_id"""
        return [Tally(*row) for row in self.rows(query)]

    # --- sensors and what was derived

    def add_sensor(self, sensor_id: str, identity: Mapping[str, Any]) -> None:
        """Make a sensor known, or describe a known one anew. Needed before its observations."""
        number = self._numbers.setdefault(sensor_id, len(self._numbers) + 1)
        self.later(
            "INSERT OR REPLACE INTO sensor(number, id, identity) VALUES (?, ?, ?)",
            [(number, sensor_id, json.dumps(identity))],
        )

    def sensors(self) -> dict[str, dict[str, Any]]:
        """Return the identity of each sensor by its id, in the order in which they came."""
        rows = self.rows("SELECT id, identity FROM sensor ORDER BY number")
        return {id_: self._described(text, f"sensor {id_}") for id_, text in rows}

    def add_observations(
        self,
        sensor_id: str,
        seq: int,
        sites: NDArray[np.integer] | Sequence[int],
        value_adu: NDArray[np.floating | np.integer] | Sequence[float],
        excess_adu: NDArray[np.floating | np.integer] | Sequence[float],
        events: NDArray[np.integer] | Sequence[int],
    ) -> None:
        """Write what the frame `seq` showed at some sites; four columns of one length.

        NaN is written as NULL and comes back as None.

        Raises
        ------
        ValueError
            If the columns differ in length.
        KeyError
            If the sensor was not added.
        """
        import numpy as np

        number = self._numbers[sensor_id]
        columns = [np.asarray(column).tolist() for column in (sites, value_adu, excess_adu, events)]
        rows = [(number, int(seq), *row) for row in zip(*columns, strict=True)]
        self.later("INSERT OR REPLACE INTO observation VALUES (?, ?, ?, ?, ?, ?)", rows)

    def thin_observations(self, sensor_id: str, seq: int) -> None:
        """Drop the observations of older frames that are too many, now that the counted frame `seq` is written.

        `thinning` says which. Nothing that decides about a site reads them: detection has its own memory.
        """
        import numpy as np

        from hotpixd.store import thinning

        observed = self._observed.get(sensor_id)
        if observed is None or observed.newest >= seq:
            observed = self._observed[sensor_id] = self._observed_before(sensor_id, seq)
        ranks, seqs = np.append(observed.ranks, observed.count), np.append(observed.seqs, int(seq))
        drop = np.flatnonzero(~thinning.is_kept(ranks, observed.count))[:_THINNED_AT_ONCE]
        number = self._numbers[sensor_id]
        self.later(
            "DELETE FROM observation WHERE sensor = ? AND seq = ?",
            [(number, dropped) for dropped in seqs[drop].tolist()],
        )
        self._observed[sensor_id] = _Observed(
            observed.count + 1, int(seq), np.delete(ranks, drop), np.delete(seqs, drop)
        )

    def _observed_before(self, sensor_id: str, seq: int) -> _Observed:
        """Find out which frames before `seq` still have observations; once in the life of this process."""
        import numpy as np

        counted = self.rows(
            "SELECT seq FROM shot WHERE verdict = 'folded' AND sensor_id = ? AND seq < ? AND counted ORDER BY seq",
            (sensor_id, seq),
        )
        counted_seqs = np.array([found for (found,) in counted], np.int64)
        seqs = self.frames_observed(sensor_id)
        seqs = np.intersect1d(seqs[seqs < seq], counted_seqs)
        return _Observed(len(counted_seqs), int(seq) - 1, np.searchsorted(counted_seqs, seqs), seqs)

    def observations(self, sensor_id: str, site: int | Iterable[int] | None = None) -> list[Observation]:
        """Return what was observed of a sensor, of one site, some or all, ordered by (seq, site).

        One site takes about 10 us per frame kept; all sites take 5 us and 300 bytes per row: see `excesses`.
        """
        # CROSS JOIN fixes the order of the loops: for each frame, look its shot and its sites up by their keys.
        query = f"""
            {_FRAMES_OBSERVED}
            SELECT seq, site, value_adu, excess_adu, events,
                   exposure_s, iso, sensor_temp_c, taken_at, kind, counted
            FROM frame CROSS JOIN shot USING (seq) CROSS JOIN observation USING (seq)
            WHERE sensor = :sensor AND sensor_id = :id AND verdict = 'folded'"""
        wanted: dict[str, object] = {"sensor": self._numbers.get(sensor_id), "id": sensor_id}
        if site is not None:
            sites = site if isinstance(site, Iterable) else [site]
            query += " AND site IN (SELECT value FROM json_each(:sites))"
            wanted["sites"] = json.dumps([int(s) for s in sites])
        return [
            Observation._make((*row[:-1], None if row[-1] is None else bool(row[-1])))
            for row in self.rows(query + " ORDER BY seq, site", wanted)
        ]

    def frames_observed(self, sensor_id: str) -> NDArray[np.int64]:
        """Return the seqs of the frames whose observations are kept, ascending."""
        import numpy as np

        query = f"{_FRAMES_OBSERVED} SELECT seq FROM frame WHERE seq IS NOT NULL"
        found = self.rows(query, {"sensor": self._numbers.get(sensor_id)})
        return np.array([seq for (seq,) in found], np.int64)

    def excesses(
        self, sensor_id: str, seqs: NDArray[np.int64], sites: NDArray[np.int64]
    ) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.uint8]]:
        """Return what some frames showed at some sites, as three tables of one row per site: (sites, seqs).

        Takes about 1 us per observation of those frames, of whatever site.

        Parameters
        ----------
        seqs, sites : ascending

        Returns
        -------
        Excess and value, ADU, NaN where nothing was observed; events.
        """
        import numpy as np

        excess, value = (np.full((len(sites), len(seqs)), np.nan, np.float32) for _ in range(2))
        events = np.zeros(excess.shape, np.uint8)
        query = "SELECT site, excess_adu, value_adu, events FROM observation WHERE sensor = ? AND seq = ?"
        for column, seq in enumerate(seqs.tolist() if len(sites) else ()):
            rows = self.rows(query, (self._numbers.get(sensor_id), seq))
            if not rows:
                continue
            # What is not known is None, which becomes NaN.
            seen = np.array(rows, np.float64)
            row = np.minimum(np.searchsorted(sites, seen[:, 0]), len(sites) - 1)
            wanted = sites[row] == seen[:, 0]
            excess[row[wanted], column] = seen[wanted, 1]
            value[row[wanted], column] = seen[wanted, 2]
            events[row[wanted], column] = np.nan_to_num(seen[wanted, 3])
        return excess, value, events

    def timeline(self, sensor_id: str) -> Timeline:
        """Return all frames folded for a sensor. Takes about 2 us per frame."""
        import numpy as np

        # A camera whose battery was out may be in the past, which nobody can tell; none can be in the future.
        query = """
            SELECT seq,
                   coalesce(
                       CASE WHEN julianday(taken_at) < julianday(received_at) + 1.5 THEN strftime('%s', taken_at) END,
                       strftime('%s', received_at), 0
                   ),
                   coalesce(counted, 0), coalesce(kind = 'dark', 0), exposure_s, iso, sensor_temp_c
            FROM shot WHERE verdict = 'folded' AND sensor_id = ? ORDER BY seq"""
        table = np.array(self.rows(query, (sensor_id,)), np.float64).reshape(-1, 7).T
        seqs, times_s = table[:2].astype(np.int64)
        return Timeline(seqs, times_s, table[2] != 0, table[3] != 0, *table[4:])

    def frames_not_counted(self, sensor_id: str) -> list[tuple[int, str, str]]:
        """Return seq and file name of each frame that was no new evidence, and why, in seq order."""
        query = """
            SELECT seq, name, not_counted_because FROM shot
            WHERE verdict = 'folded' AND sensor_id = ? AND counted = 0 ORDER BY seq"""
        return [(seq, *map(_text, rest)) for seq, *rest in self.rows(query, (sensor_id,))]

    def add_transitions(self, rows: Iterable[TransitionRow]) -> None:
        """Write changes of life cycle.

        Raises
        ------
        KeyError
            If a sensor was not added.
        """
        self.later(
            "INSERT OR REPLACE INTO transition(sensor, seq, site, change, detail) VALUES (?, ?, ?, ?, ?)",
            [(self._numbers[r.sensor_id], int(r.seq), int(r.site), r.change, json.dumps(dict(r.detail))) for r in rows],
        )

    def transitions(self, sensor_id: str) -> list[TransitionRow]:
        """Return the changes of life cycle of a sensor's sites, ordered by (seq, site)."""
        query = "SELECT site, seq, change, detail FROM transition WHERE sensor = ? ORDER BY seq, site, change"
        return [
            TransitionRow(sensor_id, site, seq, change, self._described(detail, f"a transition of site {site}"))
            for site, seq, change, detail in self.rows(query, (self._numbers.get(sensor_id),))
        ]

    def delete_derived_after(self, sensor_id: str, seq: int) -> None:
        """Remove a sensor's observations and transitions of shots after `seq`: a replay writes them again."""
        number = self._numbers.get(sensor_id)
        self._observed.pop(sensor_id, None)
        self.later("DELETE FROM observation WHERE sensor = ? AND seq > ?", [(number, seq)])
        self.later("DELETE FROM transition WHERE sensor = ? AND seq > ?", [(number, seq)])

    def alerts(self, last: int) -> list[dict[str, Any]]:
        """Return the latest alerts, oldest first: id, at (UTC, ISO 8601), topic, text."""
        query = "SELECT id, raised_at, topic, text FROM alert ORDER BY id DESC LIMIT ?"
        rows = self.rows(query, (last,))
        return [{"id": id_, "at": utc(at), "topic": topic, "text": text} for id_, at, topic, text in reversed(rows)]

    def last_times(self, last: int) -> list[tuple[str, str, str | None]]:
        """Return path, time of receipt and time of taking (UTC, ISO 8601) of the latest shots, oldest first."""
        query = "SELECT path, received_at, taken_at FROM shot WHERE verdict != 'companion' ORDER BY seq DESC LIMIT ?"
        rows = self.rows(query, (last,))
        return [(os.fsdecode(path), received_at, taken_at) for path, received_at, taken_at in reversed(rows)]

    # --- files seen

    def seen_files(self) -> dict[bytes, bytes | None]:
        """Return the digests of all files that need not be read again, with the key of the shot in it if known."""
        return dict(self.rows("SELECT file, shot FROM seen"))

    def add_seen(self, file: bytes, shot: bytes | None = None) -> None:
        """Remember that a file's shot is in the ledger, or is not wanted there.

        Parameters
        ----------
        file : digest that tells the file from others
        shot : the key of its shot as 32 bytes, where somebody will ask for it
        """
        self.later("INSERT OR REPLACE INTO seen(file, shot) VALUES (?, ?)", [(file, shot)])

    def forget_seen(self, file: bytes) -> None:
        """Forget a file that was deleted: another one may come under its name."""
        self.later("DELETE FROM seen WHERE file = ?", [(file,)])

    def forget_seen_shot(self, key: str) -> None:
        """Forget the files of which it is known that they hold this shot: it is wanted again."""
        self.later("DELETE FROM seen WHERE shot = ?", [(bytes.fromhex(key),)])

    def commit(self) -> None:
        """Put the derived rows that wait on the disk."""
        with self._in_plain_words():
            self._apply_pending()
            self._commit()
        if self._taken_in:
            self._acknowledged(self._tag, self._taken_in)
            self._taken_in = 0

    def abandon(self) -> None:
        """Forget the derived rows that wait, and the shots that were taken in since the last commit."""
        self._roll_back()
        self._pending.clear()
        self._taken_in = 0

    # --- how

    @property
    def waits(self) -> bool:
        """Whether derived rows wait for the next commit."""
        return bool(self._pending) or self._db.in_transaction

    def later(self, statement: str, rows: Sequence[Sequence[object]]) -> None:
        """Write derived rows with the next commit; until then only this process sees them."""
        if rows:
            self._pending.append((statement, rows))

    def _apply_pending(self) -> None:
        """Bring the waiting rows into the open transaction, all of them if SQLite has rolled it back."""
        if not self._db.in_transaction:
            self._applied = 0
        if self._applied == len(self._pending):
            return
        if not self._db.in_transaction:
            self._db.execute("BEGIN IMMEDIATE")
        for statement, rows in self._pending[self._applied :]:
            self._db.executemany(statement, rows)
            self._applied += 1

    def _receive_one(self, shot: Received) -> int:
        known = self._db.execute("SELECT seq FROM shot WHERE key = ?", (shot.key,)).fetchone()
        if known is not None:
            return int(known[0])
        row = (
            shot.key,
            _file_text(shot.name),
            _file_text(shot.path),
            shot.size,
            shot.received_at,
            shot.kind_given,
            shot.camera_given,
            "received" if shot.companion_of is None else "companion",
            _companion(shot.companion_of),
        )
        try:
            added = self._db.execute(
                "INSERT INTO shot(key, name, path, size, received_at, kind_given, camera_given, verdict, reason)"
                " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
                row,
            )
        except sqlite3.IntegrityError as error:
            if error.sqlite_errorcode != sqlite3.SQLITE_CONSTRAINT_CHECK:
                raise
            # A new row passes what we check, so this is not ours any more.
            raise self._damaged(str(error)) from error
        return added.lastrowid or 0

    def _commit(self) -> None:
        if self._db.in_transaction:
            self._db.execute("COMMIT")
        self._pending.clear()
        self._applied = 0

    def rows(self, query: str, values: Sequence[object] | Mapping[str, object] = ()) -> list[Any]:
        """Read, with the rows that wait in sight."""
        with self._in_plain_words():
            self._apply_pending()
            return self._db.execute(query, values).fetchall()

    def _shots(self, condition: str, values: Sequence[object] = ()) -> Iterator[ShotRow]:
        for row in self.rows(f"SELECT {_SHOT_COLUMNS} FROM shot {condition}", values):
            columns = dict(zip(ShotRow.__dataclass_fields__, row, strict=True))
            for name in ("name", "path", "reason", "not_counted_because"):
                if columns[name] is not None:
                    columns[name] = _text(columns[name])
            if columns["counted"] is not None:
                columns["counted"] = bool(columns["counted"])
            shot = ShotRow(**columns)
            # SQLite keeps whatever stands in a row, and a key is the name of a file.
            sound = all(isinstance(text, str) for text in (shot.key, shot.name, shot.path, shot.received_at))
            if not sound or not _KEY.fullmatch(shot.key) or shot.verdict not in _VERDICTS:
                raise self._damaged(f"the row of shot {shot.seq} holds what none holds")
            yield shot

    @contextmanager
    def _in_plain_words(self) -> Iterator[None]:
        """Roll back on any failure, and say in a sentence what SQLite says in a code."""
        try:
            yield
        except BaseException as error:
            self._roll_back()
            if isinstance(error, UnicodeDecodeError):  # of a name in the schema, which SQLite's own message quotes
                raise self._damaged("a name in it is no text") from error
            if not isinstance(error, sqlite3.DatabaseError) or isinstance(
                error, sqlite3.IntegrityError | sqlite3.ProgrammingError
            ):
                raise
            raise self._sentence(error) from error

    def _roll_back(self) -> None:
        db = getattr(self, "_db", None)
        if db is None:
            return
        self._applied = 0
        try:
            if db.in_transaction:
                db.execute("ROLLBACK")
        except sqlite3.Error:
            # What was not committed is rolled back when the file is opened next.
            pass

    def _described(self, text: str, subject: str) -> dict[str, Any]:
        """Return what was written as JSON."""
        try:
            described = json.loads(text)
        except (ValueError, TypeError, RecursionError) as error:
            raise self._damaged(f"{subject} is not described in JSON") from error
        if not isinstance(described, dict):
            raise self._damaged(f"{subject} is described by {described!r}")
        return described

    def _damaged(self, what: str) -> StateError:
        return StateDamaged(f"The ledger {self.path} is damaged: {what}.")

    def _sentence(self, error: sqlite3.DatabaseError) -> StateError:
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF
        if code == sqlite3.SQLITE_FULL or (code == sqlite3.SQLITE_CANTOPEN and self._has_no_room()):
            return StateFull(f"No space left for the ledger {self.path}.")
        # SQLite may quote pieces of the file.
        said = " ".join(str(error).split())
        if code == sqlite3.SQLITE_IOERR:
            self._failed = True
            return StateError(f"The disk of the ledger {self.path} fails: {said}.")
        # No code: a text is no UTF-8. SQLITE_ERROR: a column or table that was made is not there under its name.
        if code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_ERROR, 0):
            return self._damaged(said)
        if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
            return StateError(f"The ledger {self.path} is open in another program: {said}.")
        return StateError(f"The ledger {self.path} cannot be used: {said}.")

    def _has_no_room(self) -> bool:
        """Whether its log cannot be made for want of space or of inodes."""
        if self.path is None:
            return False
        found = os.statvfs(self.path.parent)
        return not found.f_bavail or bool(found.f_files and not found.f_favail)


def _log_of(path: Path) -> Path:
    return path.with_name(f"{path.name}-wal")


def link_of_chain(seq: int, key: str) -> bytes:
    """Return what a folded shot adds to its sensor's chain."""
    return f"{seq} {key}\n".encode()


def _file_text(text: str) -> str | bytes:
    """Return text as SQLite can hold it: bytes where a file's name is not UTF-8."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return text.encode("utf-8", "surrogateescape")
    return text


def _text(stored: str | bytes | None) -> str:
    """Return text that `_file_text` made fit for SQLite."""
    return stored.decode("utf-8", "surrogateescape") if isinstance(stored, bytes) else stored or ""


def _companion(raw: str | None) -> str | bytes | None:
    return None if raw is None else _file_text(f"companion of {raw}")


def _storable(value: object) -> object:
    if hasattr(value, "item"):
        # One of numpy's numbers: sqlite3 would store its bytes.
        return value.item()
    # A reason may quote the name of a file.
    return _file_text(value) if isinstance(value, str) else value
