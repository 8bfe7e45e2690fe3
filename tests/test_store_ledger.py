"""The ledger: acknowledged rows stay, derived rows can be written again, and damage is said, not mended."""

from __future__ import annotations

import os
import shutil
import sqlite3
import tempfile
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from hotpixd.store.durable import StateDamaged, StateError
from hotpixd.store.ledger import Ledger, Received, ShotRow, Tally, TransitionRow
from hotpixd.store.outbox import Alert, Outbox


def shot(number: int, name: str = "IMG.CR3") -> Received:
    return Received(f"{number:064x}", name, f"/card/{name}", 1000 + number, "2026-11-22T20:00:00Z")


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    ledger = Ledger(tmp_path / "ledger.sqlite")
    yield ledger
    ledger.close()


def killed(ledger: Ledger) -> Ledger:
    """Return what a new process finds after this one was killed: the files as they are, without a commit."""
    copy = ledger.path.parent / "after" / ledger.path.name
    copy.parent.mkdir(exist_ok=True)
    for suffix in ("", "-wal"):
        old = Path(f"{copy}{suffix}")
        old.unlink(missing_ok=True)
        source = Path(f"{ledger.path}{suffix}")
        if source.exists():
            old.write_bytes(source.read_bytes())
    return Ledger(copy)


def folded(ledger: Ledger, *numbers: int, sensor: str = "cam") -> list[int]:
    ledger.add_sensor(sensor, {})
    seqs = ledger.receive([shot(number) for number in numbers])
    for seq in seqs:
        ledger.conclude(seq, verdict="folded", sensor_id=sensor, counted=True)
    return seqs


def test_a_received_shot_survives_a_kill(ledger: Ledger) -> None:
    """receive is the acknowledgement: its rows are on the disk when it returns."""
    assert ledger.receive([shot(1), shot(2)]) == [1, 2]
    after = killed(ledger)
    found = after.find(shot(2).key)
    assert found is not None
    assert (found.seq, found.verdict, found.size, found.counted) == (2, "received", 1002, None)
    after.close()


def test_a_known_key_keeps_its_row(ledger: Ledger) -> None:
    """The same content met again, in one batch or later, is the same shot."""
    assert ledger.receive([shot(1), replace(shot(1), name="copy.CR3"), shot(2)]) == [1, 1, 2]
    assert ledger.receive([shot(2), shot(3)]) == [2, 3]
    found = ledger.find(shot(1).key)
    assert found is not None
    assert found.name == "IMG.CR3"


@pytest.mark.parametrize("raw", [b"plain.CR3", "ü λ.CR3".encode(), b"a\nb\t.CR3", b"\xff\xfe\x80.CR3", b"'--%"])
def test_names_of_any_bytes_round_trip(ledger: Ledger, raw: bytes) -> None:
    """What the file system says is what comes back, and reasons may quote it."""
    name = os.fsdecode(raw)
    (seq,) = ledger.receive([shot(1, name)])
    ledger.conclude(seq, verdict="refused", reason=f"{name} is no picture")
    after = ledger.refused()
    assert [os.fsencode(row.name) for row in after] == [raw]
    assert after[0].path == f"/card/{name}"
    assert after[0].reason == f"{name} is no picture"


def test_derived_rows_wait_and_go_with_the_next_acknowledgement(ledger: Ledger) -> None:
    """They are seen at once, lost by a kill before a commit, and kept by the next receive or commit."""
    folded(ledger, 1)
    seen = ledger.find(shot(1).key)
    assert seen is not None
    assert seen.verdict == "folded"
    lost = killed(ledger)
    assert [row.verdict for row in lost.rows_to_replay({})] == ["received"]
    lost.close()
    ledger.receive([shot(2)])
    kept = killed(ledger)
    assert [row.verdict for row in kept.rows_to_replay({})] == ["folded", "received"]
    kept.close()
    ledger.conclude(2, verdict="refused", reason="no picture")
    ledger.commit()
    last = killed(ledger)
    assert [row.verdict for row in last.rows_to_replay({})] == ["folded"]
    last.close()


def test_conclusions_add_up(ledger: Ledger) -> None:
    """Only the columns named change; numpy's numbers are numbers."""
    (seq,) = ledger.receive([shot(1)])
    ledger.conclude(seq, verdict="folded", sensor_id="cam", exposure_s=np.float32(0.5), iso=np.float64(800))
    ledger.conclude(seq, counted=np.bool_(False), not_counted_because="scene did not change", lift=1.25)
    assert ledger.find(shot(1).key) == ShotRow(
        seq=1,
        key=shot(1).key,
        name="IMG.CR3",
        path="/card/IMG.CR3",
        size=1001,
        received_at="2026-11-22T20:00:00Z",
        kind_given=None,
        camera_given=None,
        verdict="folded",
        reason=None,
        sensor_id="cam",
        kind=None,
        exposure_s=0.5,
        iso=800.0,
        sensor_temp_c=None,
        taken_at=None,
        counted=False,
        not_counted_because="scene did not change",
        lift=1.25,
        samples_digest=None,
        attempts=0,
    )


def test_conclusions_of_unknown_columns_are_refused(ledger: Ledger) -> None:
    """A column that replay does not own, or a slip, never reaches SQL."""
    for columns in ({"key": "x"}, {"verdict = 'folded' --": "x"}, {}):
        with pytest.raises(ValueError, match="no columns"):
            ledger.conclude(1, **columns)  # type: ignore[arg-type]


def test_a_verdict_that_does_not_exist_is_refused(ledger: Ledger) -> None:
    """The schema knows the four verdicts."""
    (seq,) = ledger.receive([shot(1)])
    ledger.conclude(seq, verdict="eaten")  # type: ignore[arg-type]
    with pytest.raises(sqlite3.IntegrityError):
        ledger.commit()
    ledger._pending.clear()


def test_a_replay_gets_what_no_generation_covers_in_order(ledger: Ledger) -> None:
    """Undecided shots, and folded ones after the cover of their sensor; never refused ones or companions."""
    a = folded(ledger, 1, 2, 3, sensor="a")
    b = folded(ledger, 4, 5, sensor="b")
    undecided = ledger.receive([shot(6), shot(7), shot(8)])
    ledger.conclude(undecided[0], verdict="refused", reason="no picture")
    ledger.conclude(undecided[1], verdict="companion", sensor_id="a")

    def replay(**covers: int) -> list[int]:
        return [row.seq for row in ledger.rows_to_replay(covers)]

    assert replay() == [*a, *b, undecided[2]]
    assert replay(a=2) == [a[2], *b, undecided[2]]
    assert replay(a=3, b=4) == [b[1], undecided[2]]
    assert replay(a=3, b=5, c=9) == [undecided[2]]


def test_a_refused_shot_can_be_forgotten_and_comes_back_later_in_order(ledger: Ledger) -> None:
    """Its seq is not used again; what was folded cannot be forgotten."""
    (seq,) = ledger.receive([shot(1)])
    ledger.conclude(seq, verdict="refused", reason="decoder crashed")
    ledger.forget(shot(1).key)
    ledger.forget(shot(99).key)
    assert ledger.find(shot(1).key) is None
    assert ledger.receive([shot(1)]) == [2]
    with pytest.raises(ValueError, match="received"):
        ledger.forget(shot(1).key)
    ledger.conclude(2, verdict="folded", sensor_id="cam")
    with pytest.raises(ValueError, match="folded"):
        ledger.forget(shot(1).key)


def test_observations_come_back_with_their_shots(ledger: Ledger) -> None:
    """Per site, some or all; NaN is unknown; a second writing replaces the first."""
    seqs = folded(ledger, 1, 2)
    ledger.conclude(seqs[0], exposure_s=2.0, iso=400, sensor_temp_c=21.5, taken_at="2026", kind="dark")
    sites = np.array([5, 24_000_000, 7])
    for value in (1.0, 2.0):
        for seq in seqs:
            excess = np.array([1.5, np.nan, 3.5], np.float32)
            ledger.add_observations("cam", seq, sites, sites * value, excess, np.array([1, 0, 2], np.uint8))
    first, second = ledger.observations("cam", 5)
    assert first == (1, 5, 10.0, 1.5, 1, 2.0, 400.0, 21.5, "2026", "dark", True)
    assert (second.seq, second.exposure_s) == (2, None)
    assert ledger.observations("cam", np.int64(5)) == [first, second]  # type: ignore[arg-type]
    assert [(o.seq, o.site) for o in ledger.observations("cam", [7, 5])] == [(1, 5), (1, 7), (2, 5), (2, 7)]
    assert [(o.seq, o.site) for o in ledger.observations("cam")] == [
        (seq, site) for seq in seqs for site in (5, 7, 24_000_000)
    ]
    assert ledger.observations("cam", 24_000_000)[0].excess_adu is None
    assert ledger.observations("cam", 6) == []
    assert ledger.observations("cam", []) == []
    assert ledger.observations("other") == []
    with pytest.raises(ValueError, match="zip"):
        ledger.add_observations("cam", 1, [1, 2], [1.0], [1.0], [1])
    with pytest.raises(KeyError):
        ledger.add_observations("other", 1, [], [], [], [])


def test_transitions_and_sensors_come_back(ledger: Ledger) -> None:
    """In order, with their details; a sensor can be described anew and survives the process."""
    folded(ledger, 1, 2)
    ledger.add_sensor("b", {"make": "Canon"})
    rows = [
        TransitionRow("cam", 9, 1, "appeared", {"log_e": 3.5, "name": "\udcff"}),
        TransitionRow("cam", 9, 2, "stable", {}),
        TransitionRow("b", 9, 2, "dropped", {}),
    ]
    ledger.add_transitions(reversed(rows))
    ledger.add_transitions(rows)
    assert ledger.transitions("cam") == rows[:2]
    assert ledger.transitions("b") == rows[2:]
    assert ledger.transitions("c") == []
    ledger.add_sensor("cam", {"make": "Nikon"})
    ledger.commit()
    after = killed(ledger)
    assert after.sensors() == {"cam": {"make": "Nikon"}, "b": {"make": "Canon"}}
    assert after.transitions("cam") == rows[:2]
    after.add_sensor("c", {})
    assert list(after.sensors()) == ["cam", "b", "c"]
    after.close()


def test_a_replay_starts_from_a_clean_slate(ledger: Ledger) -> None:
    """What was derived from shots after the cover goes, of that sensor only."""
    for sensor, first in (("a", 1), ("b", 10)):
        for seq in folded(ledger, *range(first, first + 3), sensor=sensor):
            ledger.add_observations(sensor, seq, [1], [1.0], [1.0], [1])
            ledger.add_transitions([TransitionRow(sensor, 1, seq, "appeared", {})])
    ledger.delete_derived_after("a", 2)
    assert [o.seq for o in ledger.observations("a")] == [1, 2]
    assert [t.seq for t in ledger.transitions("a")] == [1, 2]
    assert [o.seq for o in ledger.observations("b")] == [4, 5, 6]
    ledger.delete_derived_after("unknown", 0)


def test_the_tally_counts_by_sensor_and_verdict(ledger: Ledger) -> None:
    """Every shot is counted once; shots of no sensor come first."""
    assert ledger.tally() == []
    assert ledger.last_shot() is None
    folded(ledger, 3, 1, 2)
    ledger.conclude(2, counted=False)
    seqs = ledger.receive([shot(4), shot(5), shot(6)])
    ledger.conclude(seqs[0], verdict="refused", reason="no picture")
    ledger.conclude(seqs[1], verdict="companion", sensor_id="cam")
    assert ledger.tally() == [
        Tally(None, received=1, refused=1),
        Tally("cam", folded=3, counted=2, companion=1),
    ]
    assert ledger.frame_keys("cam") == [shot(n).key for n in (1, 2, 3)]
    last, last_of_cam = ledger.last_shot(), ledger.last_shot("cam")
    assert last is not None
    assert last_of_cam is not None
    assert (last.seq, last_of_cam.seq) == (6, 5)


def test_a_commit_that_failed_can_be_tried_again(ledger: Ledger) -> None:
    """A failed receive acknowledges nothing and loses no derived row that waits."""
    folded(ledger, 1)
    ledger.add_observations("cam", 1, [5], [1.0], [1.0], [1])
    assert len(ledger.observations("cam")) == 1
    with pytest.raises(sqlite3.IntegrityError):
        ledger.receive([shot(2), replace(shot(3), size=None)])  # type: ignore[arg-type]
    assert ledger.find(shot(2).key) is None
    assert len(ledger.observations("cam")) == 1
    assert ledger.receive([shot(2)]) == [2]
    after = killed(ledger)
    assert len(after.observations("cam")) == 1
    after.close()


def test_a_ledger_of_a_newer_version_is_left_alone(tmp_path: Path) -> None:
    """The sentence names both formats, and the file stays as it is."""
    path = tmp_path / "ledger.sqlite"
    Ledger(path).close()
    with closing(sqlite3.connect(path)) as db:
        db.execute("PRAGMA user_version = 99")
    before = path.read_bytes()
    with pytest.raises(StateError, match="format 99"):
        Ledger(path)
    assert path.read_bytes() == before


def test_another_programs_database_is_left_alone(tmp_path: Path) -> None:
    """No table is added to what is not ours."""
    path = tmp_path / "ledger.sqlite"
    with closing(sqlite3.connect(path)) as db:
        db.execute("CREATE TABLE theirs(x)")
    before = path.read_bytes()
    with pytest.raises(StateError, match="not a ledger"):
        Ledger(path)
    assert path.read_bytes() == before


@pytest.mark.parametrize("damage", ["no database", "torn", "zeros inside"])
def test_a_damaged_ledger_is_named_and_kept(tmp_path: Path, damage: str) -> None:
    """Damage ends in a StateError with the file's name; nothing is deleted or mended."""
    path = tmp_path / "ledger.sqlite"
    ledger = Ledger(path)
    ledger.receive([shot(n, f"{n}" * 20) for n in range(2000)])
    ledger.close()
    content = path.read_bytes()
    broken = {
        "no database": b"x" * len(content),
        "torn": content[:5000],
        "zeros inside": content[:8192] + bytes(len(content) - 8192),
    }[damage]
    path.write_bytes(broken)
    with pytest.raises(StateError, match=r"ledger\.sqlite"):
        Ledger(path).check()
    assert path.read_bytes() == broken


def test_a_whole_ledger_passes_its_check(ledger: Ledger) -> None:
    """check says nothing where nothing is wrong."""
    folded(ledger, 1, 2, 3)
    ledger.check()


def test_a_second_connection_is_kept_out(ledger: Ledger) -> None:
    """Nobody reads the database beside its one process: that is where SQLite's WAL-reset bug lives."""
    with pytest.raises(sqlite3.OperationalError, match="locked"):
        sqlite3.connect(ledger.path, timeout=0).execute("SELECT * FROM shot")


class AgainstADict(RuleBasedStateMachine):
    """Any order of receiving, concluding, forgetting, committing, killing and closing agrees with a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.path = Path(self.folder.name) / "ledger.sqlite"
        self.ledger = Ledger(self.path)
        self.shots: dict[str, tuple[int, str]] = {}
        self.seen: dict[int, set[int]] = {}
        self.durable_shots: dict[str, tuple[int, str]] = {}
        self.durable_seen: dict[int, set[int]] = {}
        self.next = 1
        self.ledger.add_sensor("cam", {})
        self.ledger.commit()

    def committed(self) -> None:
        self.durable_shots = dict(self.shots)
        self.durable_seen = {seq: set(sites) for seq, sites in self.seen.items()}

    @rule(numbers=st.lists(st.integers(0, 9), max_size=4))
    def receive(self, numbers: list[int]) -> None:
        """Acknowledge some shots, some of them again."""
        seqs = self.ledger.receive([shot(n) for n in numbers])
        for n, seq in zip(numbers, seqs, strict=True):
            if shot(n).key not in self.shots:
                assert seq >= self.next
                self.shots[shot(n).key] = (seq, "received")
                self.next = seq + 1
            assert self.shots[shot(n).key][0] == seq
        self.committed()

    @precondition(lambda self: self.shots)
    @rule(data=st.data(), verdict=st.sampled_from(["folded", "refused", "companion"]))
    def conclude(self, data: st.DataObject, verdict: str) -> None:
        """Give one shot a verdict."""
        key = data.draw(st.sampled_from(sorted(self.shots)))
        seq = self.shots[key][0]
        self.ledger.conclude(seq, verdict=verdict, sensor_id="cam")  # type: ignore[arg-type]
        self.shots[key] = (seq, verdict)

    @precondition(lambda self: self.shots)
    @rule(data=st.data(), sites=st.sets(st.integers(0, 5)))
    def observe(self, data: st.DataObject, sites: set[int]) -> None:
        """Write observations of one shot."""
        seq = self.shots[data.draw(st.sampled_from(sorted(self.shots)))][0]
        n = len(sites)
        self.ledger.add_observations("cam", seq, sorted(sites), [1.0] * n, [1.0] * n, [1] * n)
        self.seen.setdefault(seq, set()).update(sites)

    @rule(seq=st.integers(0, 20))
    def replay(self, seq: int) -> None:
        """Remove what was derived after a shot."""
        self.ledger.delete_derived_after("cam", seq)
        self.seen = {s: sites for s, sites in self.seen.items() if s <= seq}

    @rule(number=st.integers(0, 9))
    def forget(self, number: int) -> None:
        """Forget a refused shot; any other is refused."""
        key = shot(number).key
        if key in self.shots and self.shots[key][1] in ("received", "folded"):
            with pytest.raises(ValueError, match="forgotten"):
                self.ledger.forget(key)
            return
        self.ledger.forget(key)
        self.shots.pop(key, None)

    @rule()
    def commit(self) -> None:
        """Commit what waits."""
        self.ledger.commit()
        self.committed()

    @rule()
    def kill(self) -> None:
        """Go on with the files as a killed process leaves them."""
        survivor = killed(self.ledger)
        survivor.close()
        self.ledger._db.close()
        for suffix in ("", "-wal"):
            Path(f"{self.path}{suffix}").unlink(missing_ok=True)
        survivor.path.rename(self.path)
        self.ledger = Ledger(self.path)
        self.shots = dict(self.durable_shots)
        self.seen = {seq: set(sites) for seq, sites in self.durable_seen.items()}

    @rule()
    def reopen(self) -> None:
        """Close in order and open again."""
        self.ledger.close()
        self.committed()
        self.ledger = Ledger(self.path)

    @invariant()
    def agrees(self) -> None:
        """Shots, replay order and observations are those of the dict."""
        by_seq = sorted((seq, key, verdict) for key, (seq, verdict) in self.shots.items())
        replayed = [(row.seq, row.key, row.verdict) for row in self.ledger.rows_to_replay({"cam": 3})]
        assert replayed == [s for s in by_seq if s[2] == "received" or (s[2] == "folded" and s[0] > 3)]
        assert self.ledger.frame_keys("cam") == sorted(key for _, key, verdict in by_seq if verdict == "folded")
        is_folded = {seq for seq, _, verdict in by_seq if verdict == "folded"}
        assert [(o.seq, o.site) for o in self.ledger.observations("cam")] == sorted(
            (seq, site) for seq, sites in self.seen.items() if seq in is_folded for site in sites
        )

    def teardown(self) -> None:
        """Close and remove."""
        self.ledger.close()
        self.folder.cleanup()


TestAgainstADict = AgainstADict.TestCase
TestAgainstADict.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)


def as_written_by(path: Path, version: int) -> None:
    """Turn a ledger of today into what an older hotpixd would have written."""
    with closing(sqlite3.connect(path)) as db:
        for (trigger,) in db.execute("SELECT name FROM sqlite_master WHERE type = 'trigger'").fetchall():
            db.execute(f"DROP TRIGGER {trigger}")
        for table in ("shot", "sensor", "transition", "alert", "delivery"):
            db.execute(f"ALTER TABLE {table} DROP COLUMN seal")
        db.execute("ALTER TABLE shot DROP COLUMN attempts")
        db.execute("DROP TABLE proof")
        db.execute("PRAGMA application_id = 0")
        if version < 3:
            db.execute("ALTER TABLE seen DROP COLUMN shot")
        if version < 2:
            db.execute("ALTER TABLE shot DROP COLUMN camera_given")
            for table in ("seen", "alert", "delivery"):
                db.execute(f"DROP TABLE {table}")
        db.execute(f"PRAGMA user_version = {version}")


def schema(path: Path) -> tuple[int, dict[str, list[tuple[object, ...]]]]:
    """Return format, and tables with their columns; these stand in another order where they were added later."""
    with closing(sqlite3.connect(path)) as db:
        tables = [name for (name,) in db.execute("SELECT name FROM sqlite_master WHERE type = 'table' ORDER BY name")]
        columns = {table: sorted(row[1:] for row in db.execute(f"PRAGMA table_info({table})")) for table in tables}
        return db.execute("PRAGMA user_version").fetchone()[0], columns


@pytest.mark.parametrize("version", [1, 2, 3])
def test_a_ledger_of_an_older_version_is_brought_up_to_date(tmp_path: Path, version: int) -> None:
    """Format 1 had no names for cameras, no files seen and no alerts; its shots stay. It becomes what a new one is."""
    path, new = tmp_path / "ledger.sqlite", tmp_path / "new.sqlite"
    with closing(Ledger(path)) as ledger:
        folded(ledger, 1, 2)
    as_written_by(path, version)
    with closing(Ledger(path)) as ledger:
        ledger.add_seen(b"x" * 16)
        ledger.receive([replace(shot(3), camera_given="left")])
        found = [ledger.find(shot(number).key) for number in (1, 2, 3)]
        assert [row.camera_given for row in found if row is not None] == [None, None, "left"]
        assert [row.verdict for row in found if row is not None] == ["folded", "folded", "received"]
        assert ledger.seen_files() == {b"x" * 16: None}
        assert ledger.alerts(5) == []
    Ledger(new).close()
    assert schema(path) == schema(new)


def test_files_seen_in_format_2_are_known_without_their_shots(tmp_path: Path) -> None:
    """It did not say which shot a file held; nothing of what was seen is read again because of that."""
    path = tmp_path / "ledger.sqlite"
    Ledger(path).close()
    as_written_by(path, 2)
    old, new, key = b"o" * 16, b"n" * 16, bytes(range(32))
    with closing(sqlite3.connect(path)) as db:
        db.execute("INSERT INTO seen VALUES (?)", (old,))
        db.commit()
    with closing(Ledger(path)) as ledger:
        assert ledger.seen_files() == {old: None}
        ledger.add_seen(new, key)
    with closing(Ledger(path)) as ledger:
        assert ledger.seen_files() == {old: None, new: key}


def test_a_file_that_was_deleted_is_forgotten(ledger: Ledger) -> None:
    """Seen again, it may hold another shot; like all derived rows, that waits for a commit."""
    file, other, key = b"f" * 16, b"g" * 16, bytes(32)
    ledger.add_seen(file, key)
    ledger.add_seen(other)
    ledger.commit()
    ledger.forget_seen(file)
    assert ledger.seen_files() == {other: None}
    before = killed(ledger)
    assert before.seen_files() == {file: key, other: None}
    before.close()
    ledger.add_seen(file, bytes(range(32)))
    ledger.commit()
    after = killed(ledger)
    assert after.seen_files() == {file: bytes(range(32)), other: None}
    after.close()


def test_a_migration_that_dies_is_done_again(tmp_path: Path) -> None:
    """Each step is one transaction: a power cut leaves a format whole."""
    path = tmp_path / "ledger.sqlite"
    Ledger(path).close()
    as_written_by(path, 1)
    with closing(sqlite3.connect(path)) as db:
        # In the way of the last statement of the first step.
        db.execute("CREATE TABLE delivery(x)")
    with pytest.raises(StateError):
        Ledger(path)
    with closing(sqlite3.connect(path)) as db:
        assert db.execute("PRAGMA user_version").fetchone() == (1,)
        assert "camera_given" not in [row[1] for row in db.execute("PRAGMA table_info(shot)")]
        db.execute("DROP TABLE delivery")
    with closing(Ledger(path)) as ledger:
        assert ledger.seen_files() == {}


def test_a_migration_that_died_between_two_formats_goes_on_from_there(tmp_path: Path) -> None:
    """The first step is done and on the disk, the second is not."""
    path = tmp_path / "ledger.sqlite"
    with closing(Ledger(path)) as ledger:
        folded(ledger, 1)
    as_written_by(path, 2)
    with closing(sqlite3.connect(path)) as db:
        # In the way of the second step.
        db.execute("ALTER TABLE seen RENAME TO gone")
    with pytest.raises(StateError):
        Ledger(path)
    with closing(sqlite3.connect(path)) as db:
        assert db.execute("PRAGMA user_version").fetchone() == (2,)
        db.execute("ALTER TABLE gone RENAME TO seen")
    with closing(Ledger(path)) as ledger:
        assert ledger.seen_files() == {}
        assert ledger.find(shot(1).key) is not None


# --- seals


@pytest.mark.parametrize(
    ("table", "change"),
    [
        ("shot", f"key = '{'f' * 64}'"),
        ("shot", "kind_given = 'dark'"),
        ("shot", "verdict = 'refused'"),
        ("shot", "sensor_id = 'can'"),
        ("shot", "seq = 17"),
        ("sensor", "identity = '{}'"),
        ("sensor", "number = 5"),
        ("transition", "change = 'recovered'"),
        ("alert", "text = 'Nothing.'"),
        ("alert", "message = 0"),
        ("delivery", "state = 'due'"),
    ],
)
def test_a_row_that_something_else_changed_is_noticed(tmp_path: Path, table: str, change: str) -> None:
    """Whatever it is; the sentence names the table and what to do, and the file stays as it was changed."""
    path = tmp_path / "ledger.sqlite"
    with closing(Ledger(path)) as ledger:
        ledger.add_sensor("cam", {"make": "x"})
        ledger.receive([shot(1)])
        ledger.conclude(1, verdict="folded", sensor_id="cam")
        ledger.add_transitions([TransitionRow("cam", 3, 1, "stable", {})])
        outbox = Outbox(ledger)
        outbox.add([Alert("k", "2026-11-24T00:00:00+00:00", "disk", "disk", "Full.", {})], send={"disk"})
        outbox.record(outbox.compose(["mail"]), "mail", 1, "sent")
    Ledger(path).close()
    with closing(sqlite3.connect(path)) as db:
        # As a flipped byte does, and a trigger does not.
        for (trigger,) in db.execute("SELECT name FROM sqlite_master WHERE type = 'trigger'").fetchall():
            statement = db.execute("SELECT sql FROM sqlite_master WHERE name = ?", (trigger,)).fetchone()[0]
            db.execute(f"DROP TRIGGER {trigger}")
            db.execute("CREATE TABLE IF NOT EXISTS kept(sql)")
            db.execute("INSERT INTO kept VALUES (?)", (statement,))
        db.execute(f"UPDATE {table} SET {change}")
        for (statement,) in db.execute("SELECT sql FROM kept").fetchall():
            db.execute(statement)
        db.execute("DROP TABLE kept")
        db.commit()
    content = path.read_bytes()
    with pytest.raises(StateDamaged, match=f"of the table {table}, 1 row was changed.*hotpixd restore FILE"):
        Ledger(path)
    assert path.read_bytes() == content


def test_shots_of_a_sensor_that_is_not_known_are_noticed(ledger: Ledger) -> None:
    """Those that are of no sensor yet are not of a strange one, even while there is none at all."""
    ledger.receive([shot(1), shot(2)])
    assert ledger.strange_sensors() == []
    ledger.conclude(2, verdict="folded", sensor_id="cam")
    assert ledger.strange_sensors() == ["cam"]
    ledger.add_sensor("cam", {})
    assert ledger.strange_sensors() == []


def test_attempts_are_not_sealed(tmp_path: Path) -> None:
    """They say nothing about a shot that a replay would have to believe."""
    path = tmp_path / "ledger.sqlite"
    with closing(Ledger(path)) as ledger:
        ledger.receive([shot(1)])
        ledger.later("UPDATE shot SET attempts = attempts + 1 WHERE seq = ?", [(1,)])
    with closing(Ledger(path)) as ledger:
        assert ledger.rows("SELECT attempts FROM shot") == [(1,)]


def test_tables_that_something_else_changed_are_noticed(tmp_path: Path) -> None:
    """A check that was dropped from the schema would let anything in."""
    path = tmp_path / "ledger.sqlite"
    Ledger(path).close()
    with closing(sqlite3.connect(path)) as db:
        db.execute("DROP INDEX alert_by_subject")
    with pytest.raises(StateDamaged, match="tables are not as they were made"):
        Ledger(path)


def test_a_log_that_lost_its_middle_is_refused_and_kept(tmp_path: Path) -> None:
    """SQLite would drop what is behind it without a word, and then the log. A torn end is no damage."""
    (tmp_path / "a").mkdir()
    with closing(Ledger(tmp_path / "a" / "ledger.sqlite")) as ledger:
        for number in range(1, 9):
            ledger.receive([shot(number)])
        shutil.copytree(tmp_path / "a", tmp_path / "b")
        shutil.copytree(tmp_path / "a", tmp_path / "c")
    log = tmp_path / "b" / "ledger.sqlite-wal"
    content = bytearray(log.read_bytes())
    content[len(content) // 2] ^= 1
    log.write_bytes(content)
    for _ in range(2):
        with pytest.raises(StateDamaged, match="acknowledged shots behind the damage"):
            Ledger(log.with_name("ledger.sqlite"))
        assert log.read_bytes() == content
    log = tmp_path / "c" / "ledger.sqlite-wal"
    log.write_bytes(log.read_bytes()[:-100])
    with closing(Ledger(log.with_name("ledger.sqlite"))) as ledger:
        assert ledger.find(shot(7).key) is not None
        assert ledger.find(shot(8).key) is None
