"""Every region of every file of a state is damaged, and the state is then used as if nothing had happened.

The state is one that a kill left: two generations, three shots that the older one does not hold, two more that are in
no generation, a log with acknowledged shots. Its pictures are gone from where they were, so that nothing but the state
itself can replay them; they are offered again at the end, from elsewhere. For each damage:

- after the next start, what the state tells is what it would have told undamaged, or a sentence says what is wrong, and
  the shots that are lost are those that the sentence names;
- after the pictures are offered again, it ends where an undamaged state does, or it was refused in a sentence that says
  what to do;
- what was damaged is still there, in its place or as evidence;
- nothing ends in a traceback.

The controls switch one check off each: of the seals of rows, of the generations' digests, of the chain that ties a
generation to its ledger, of the log.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import shutil
import sqlite3
import struct
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))

from table import Row

from hotpixd import archive
from hotpixd.backup import Backups, restore, save
from hotpixd.intake.decoders import Decoders
from hotpixd.intake.files import FoundShot, find_shots
from hotpixd.monitor import Monitor
from hotpixd.simulate import VirtualSensor, write_series
from hotpixd.store import checkpoint, wal
from hotpixd.store import state as state_module
from hotpixd.store.ledger import Ledger
from hotpixd.store.outbox import Alert, Outbox
from hotpixd.store.spool import Spool
from hotpixd.store.state import State, StateDamaged, StateError
from hotpixd.views import answers

SHOTS = 10
_WIDTH, _HEIGHT = 64, 48


@dataclass
class Seen:
    """What a state told, or why it did not."""

    told: dict[str, Any] | None = None
    said: list[str] = field(default_factory=list)
    refused: StateError | None = None


class Ground:
    """A state to be damaged, others to take files from, and how it ends undamaged."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.decoders = Decoders(1)
        self.pictures = folder / "pictures"
        _shoot(self.pictures, "V0001", 1)
        _shoot(folder / "others", "V0001", 2)
        self.older, self.state = _grown(folder / "grown", self.pictures, self.decoders)
        _, self.other = _grown(folder / "grown-other", folder / "others", self.decoders)
        self.backup = folder / "state.backup"
        copy = folder / "for-backup"
        shutil.copytree(self.state, copy)
        with State(copy) as state:
            save(Backups(state, live=False).answer, self.backup, force=False)
        self.work = folder / "work" / "state"
        self.work.parent.mkdir()
        with self.copied():
            self.replayed = self.used(None)
            self.ended = self.used(self.pictures)
        assert self.replayed.told is not None and self.ended.told is not None
        assert not self.replayed.said and not self.ended.said
        assert self.replayed.told != self.ended.told
        self.names = {path.name: Spool.hash_file(path) for path in self.pictures.iterdir()}

    def used(self, pictures: Path | None) -> Seen:
        """Start on the state in the working place and offer it pictures, if any; return what it tells then."""
        seen = Seen()
        try:
            with State(self.work) as state, Monitor(state, decoders=self.decoders) as monitor:
                list(monitor.replay())
                if pictures is not None:
                    list(monitor.process(find_shots([str(pictures)]).shots))
                monitor.checkpoint()
                seen.said = list(monitor.warnings)
            with State(self.work, create=False) as state:
                seen.told = _told(state)
        except StateError as error:
            seen.refused = error
        return seen

    def move(self) -> None:
        """Have a working place and decoders of this process's own, after a fork."""
        self.work = self.folder / f"work-{os.getpid()}" / "state"
        self.work.parent.mkdir()
        self.decoders = Decoders(1)

    def folded_in_order_of(self, root: Path) -> dict[str, Any]:
        """Return what a new state tells of the pictures, folded in the order in which a state has folded them."""
        with State(root) as state:
            rows = state.ledger.rows("SELECT key FROM shot WHERE verdict = 'folded' ORDER BY seq")
        paths = {key: path for path in self.pictures.iterdir() if (key := self.names[path.name])}
        fresh = self.work.with_name("fresh")
        with State(fresh) as state, Monitor(state, decoders=self.decoders) as monitor:
            list(monitor.process(FoundShot(paths[key]) for (key,) in rows))
            monitor.checkpoint()
        with State(fresh) as state:
            return _told(state)

    @contextmanager
    def copied(self) -> Iterator[Path]:
        """Have a fresh copy of the state in the working place."""
        shutil.copytree(self.state, self.work)
        try:
            yield self.work
        finally:
            for path in self.work.parent.iterdir():
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def _shoot(folder: Path, serial: str, seed: int) -> None:
    sensor = VirtualSensor(_WIDTH, _HEIGHT, hot=4, stuck=1, dead=1, seed=seed, serial=serial)
    for _ in write_series(folder, sensor, SHOTS, "moving", "dng"):
        pass
    (folder / "truth.json").unlink()


def _grown(folder: Path, pictures: Path, decoders: Decoders) -> tuple[Path, Path]:
    """Let a state grow from pictures that are gone afterwards; return it as an early kill and a later one left it."""
    away = folder / "away"
    shutil.copytree(pictures, away)
    shots = sorted(away.iterdir())
    root = folder / "state"
    copies = []
    for first, last in ((0, 3), (3, 6)):
        with State(root) as state, Monitor(state, decoders=decoders) as monitor:
            list(monitor.replay())
            list(monitor.process(find_shots(map(str, shots[first:last])).shots))
            monitor.checkpoint()
            outbox = Outbox(state.ledger)
            for number in range(first, last):
                text = f"Alert number {number}."
                outbox.add(
                    [Alert(f"key {number}", f"2026-11-24T00:00:0{number}+00:00", "disk", "disk", text, {})], send=()
                )
            state.ledger.commit()
            # The last shots are acknowledged, and folded in memory only.
            list(monitor.process(find_shots(map(str, shots[last : last + 1])).shots))
            if last == 6:
                list(monitor.process(find_shots(map(str, shots[last + 1 : last + 2])).shots))
            state.ledger.commit()
            copies.append(folder / f"killed-{last}")
            (root / "series.json").write_text('{"order": {"frames": 3}, "camera": "x", "taken": 1}')
            (root / "incoming" / "usb-1").mkdir(exist_ok=True)
            (root / "incoming" / "usb-1" / "IMG_0001.JPG.part").write_bytes(b"half a picture")
            shutil.copytree(root, copies[-1])
    shutil.rmtree(away)
    shutil.rmtree(root)
    return copies[0], copies[1]


def _told(state: State) -> dict[str, Any]:
    checked = answers.verify(state)
    return {
        "ok": checked["ok"],
        "digests": {sensor["id"]: sensor["digest"] for sensor in checked["sensors"]},
        "keys": {id_: state.ledger.frame_keys(id_) for id_ in state.ledger.sensors()},
        "defects": answers.defects(state, candidates=True),
        "alerts": state.ledger.alerts(100),
    }


# --- damages


@dataclass(frozen=True)
class Damage:
    """One thing that is done to one file."""

    file: str
    what: str
    do: Callable[[Path], None]


def _flip(at: int, bits: int) -> Callable[[Path], None]:
    def do(path: Path) -> None:
        content = bytearray(path.read_bytes())
        content[at] ^= bits
        path.write_bytes(content)

    return do


def _zero(at: int, length: int) -> Callable[[Path], None]:
    def do(path: Path) -> None:
        content = bytearray(path.read_bytes())
        content[at : at + length] = bytes(len(content[at : at + length]))
        path.write_bytes(content)

    return do


def _cut(length: int) -> Callable[[Path], None]:
    return lambda path: os.truncate(path, length)


def _replaced(by: Callable[[Path], object]) -> Callable[[Path], None]:
    def do(path: Path) -> None:
        path.unlink()
        by(path)

    return do


def _taken_from(other: Path) -> Callable[[Path], None]:
    def do(path: Path) -> None:
        path.unlink()
        shutil.copyfile(other, path)

    return do


def damages(ground: Ground, every: int) -> list[Damage]:
    """List what can be done to each file; of positions and lengths only every so many."""
    found: list[Damage] = []
    for path in sorted(p for p in ground.state.rglob("*") if p.is_file()):
        name = str(path.relative_to(ground.state))
        size = path.stat().st_size
        dice = random.Random(name)
        places = sorted({*_structure(path), *(size * k // 64 for k in range(64) if size)})[::every]
        for at in places:
            found.append(Damage(name, "a byte flipped", _flip(at, 0xFF)))
            found.append(Damage(name, "a bit flipped", _flip(at, 1 << dice.randrange(8))))
        for at in places[::2]:
            found.append(Damage(name, "64 bytes zeroed", _zero(at, 64)))
            found.append(Damage(name, "4096 bytes zeroed", _zero(at // 4096 * 4096, 4096)))
        lengths = sorted({size * k // 64 for k in range(1, 64)} - {size})[::every]
        found += [Damage(name, "cut short", _cut(length)) for length in lengths]
        found.append(Damage(name, "emptied", _cut(0)))
        found.append(Damage(name, "removed", Path.unlink))
        found.append(Damage(name, "replaced by a folder", _replaced(Path.mkdir)))
        found.append(Damage(name, "replaced by a link to nothing", _replaced(lambda p: p.symlink_to("/nonexistent/x"))))
        found.append(Damage(name, "replaced by a link to itself", _replaced(lambda p: p.symlink_to(p))))
        for what, source in (("an older copy of itself", ground.older), ("that of another state", ground.other)):
            for candidate in _same_role(source, name):
                found.append(Damage(name, f"replaced by {what}", _taken_from(candidate)))
    for name in (
        "spool",
        "sensors",
        next(str(p.relative_to(ground.state)) for p in (ground.state / "sensors").iterdir()),
    ):
        found.append(Damage(name, "removed", shutil.rmtree))
        found.append(Damage(name, "replaced by a file", lambda p: (shutil.rmtree(p), p.write_text("x"))[0]))
        found.append(Damage(name, "replaced by that of another state", _folder_from(ground.other, name)))
        found.append(Damage(name, "replaced by an older copy of itself", _folder_from(ground.older, name)))
    found.append(Damage("ledger.sqlite", "with its log an older copy of itself", _ledger_from(ground.older)))
    found.append(Damage("ledger.sqlite", "with its log that of another state", _ledger_from(ground.other)))
    found.append(Damage("ledger.sqlite", "of a newer version", _newer_ledger))
    found += [Damage(str(p.relative_to(ground.state)), "of a newer version", _newer_generation)
              for p in ground.state.rglob("gen-*.hpx")]  # fmt: skip
    return found


def _structure(path: Path) -> Iterator[int]:
    """Go through the places of a file that say how the rest is to be read."""
    content = path.read_bytes()
    if path.name == "ledger.sqlite":
        yield from range(100)
        for page in range(0, len(content), 4096):
            yield from (page + (100 if page == 0 else 0) + k for k in range(16))
            # The cells grow from the end of a page to its front.
            cells = struct.unpack_from(">H", content, page + (105 if page == 0 else 5))[0]
            yield from (page + min(max(cells, 20) + 40 * k, 4095) for k in range(24))
    elif path.name.endswith("-wal"):
        yield from range(32)
        for frame in range(32, len(content) - 24, 4120):
            yield from range(frame, frame + 24, 3)
            yield from (min(frame + 24 + 171 * k, len(content) - 1) for k in range(24))
    elif path.suffix == ".hpx":
        yield from range(12)
        (length,) = struct.unpack_from("<I", content, 8)
        yield from range(12, 12 + length, 16)
        yield from range(12 + length, 12 + length + 8)
        yield from range(len(content) - 32, len(content), 4)


def _same_role(source: Path, name: str) -> Iterable[Path]:
    if name.startswith("spool/"):
        return sorted((source / "spool").iterdir())[:1]
    path = source / name
    return [path] if path.is_file() else []


def _folder_from(source: Path, name: str) -> Callable[[Path], None]:
    def do(path: Path) -> None:
        shutil.rmtree(path)
        shutil.copytree(source / name, path)

    return do


def _ledger_from(source: Path) -> Callable[[Path], None]:
    def do(path: Path) -> None:
        for name in (path.name, f"{path.name}-wal"):
            shutil.copyfile(source / name, path.with_name(name))

    return do


def _newer_ledger(path: Path) -> None:
    log = path.with_name(f"{path.name}-wal")
    with sqlite3.connect(path) as db:
        db.execute("PRAGMA user_version = 99")
    db.close()
    log.unlink(missing_ok=True)


def _newer_generation(path: Path) -> None:
    from blake3 import blake3

    content = b"HPXGEN09" + path.read_bytes()[8:-32]
    path.write_bytes(content + blake3(content).digest())


# --- judging


def wrong_with(ground: Ground, damage: Damage) -> tuple[str | None, str]:
    """Do one damage; return what was wrong then, None if nothing, and how it ended."""
    with ground.copied() as root:
        path = root / damage.file
        try:
            damage.do(path)
            evidence = path.read_bytes() if path.is_file() else None
            try:
                with State(root, create=False) as state:
                    problems = answers.verify(state)["problems"]
            except StateError as error:
                problems = [str(error)]
            replayed = ground.used(None)
            ended = replayed if replayed.refused else ground.used(ground.pictures)
        except Exception as error:
            return f"{type(error).__name__}: {error}", "traceback"
        said = [*problems, *replayed.said, *ended.said]
        for sentence in (*said, *(str(s.refused) for s in (replayed, ended) if s.refused)):
            if not sentence.strip().endswith((".", ".'", "...", "one.")) or "\n" in sentence:
                return f"no sentence: {sentence!r}", "said"
        # A ledger, and what is beside it, goes on being written.
        used = damage.file.startswith("ledger") or damage.file in ("lock", "acknowledged")
        # A copy in the spool that the replay does not ask for is dropped by its checkpoint.
        used |= damage.file.startswith("spool/") and not replayed.said
        lost_evidence = evidence is not None and not _is_kept(root, evidence)
        if ended.refused is not None:
            return _wrong_refusal(ground, root, ended.refused, lost_evidence), "refused"
        if said and lost_evidence and not used:
            return "the evidence is gone", "said"
        assert replayed.told is not None and ended.told is not None
        if replayed.told != ground.replayed.told:
            if not said:
                return f"silent at the start: other {_difference(ground.replayed, replayed)}", "silent"
            if wrong := _unnamed(ground, replayed):
                return wrong, "said"
        if ended.told == ground.ended.told:
            return None, "told" if said else "same"
        if not said:
            return f"silent at the end: other {_difference(ground.ended, ended)}", "silent"
        if not ended.told["ok"]:
            return "it goes on with a state that does not verify", "said"
        if _all_keys(ended) != _all_keys(ground.ended):
            return "offered all pictures, it ends with other shots", "said"
        # The order of frames has a part in what is found: it must be as if they had come in this one.
        anew = ground.folded_in_order_of(root)
        for what in ("digests", "keys"):
            if ended.told[what] != anew[what]:
                return f"offered all pictures, it ends with other {what}; said: {said}", "said"
        return None, "told"


def _all_keys(seen: Seen) -> set[str]:
    assert seen.told is not None
    return {key for keys in seen.told["keys"].values() for key in keys}


def _difference(expected: Seen, seen: Seen) -> str:
    assert expected.told is not None and seen.told is not None
    return ", ".join(key for key in expected.told if expected.told[key] != seen.told[key])


def _is_kept(root: Path, evidence: bytes) -> bool:
    return any(p.is_file() and p.read_bytes() == evidence for p in root.rglob("*"))


def _wrong_refusal(ground: Ground, root: Path, refused: StateError, lost_evidence: bool) -> str | None:
    """Judge a state that was refused: nothing may be gone, and the cure that is named must work."""
    if lost_evidence:
        return "refused, and the evidence is gone"
    if isinstance(refused, StateDamaged):
        if "hotpixd restore FILE" not in str(refused) or "hotpixd rebuild FOLDER" not in str(refused):
            return f"refused without a cure: {refused}"
        restore(root, ground.backup, force=True)
        if ground.used(ground.pictures).told != ground.ended.told:
            return "refused, and the backup does not cure it"
    return None


def _unnamed(ground: Ground, seen: Seen) -> str | None:
    """Tell whether shots are missing that no sentence names."""
    gone = _all_keys(ground.replayed) - _all_keys(seen)
    text = " ".join(seen.said)
    missing = sorted(name for name, key in ground.names.items() if key in gone and name not in text)
    # What the ledger itself forgot it cannot name; it says how many, or that it is not of the time of the generations.
    if missing and "not of the same time" not in text and f"lacks the last {len(missing)} of the shots" not in text:
        return f"{', '.join(missing)} are lost, and no sentence names them"
    return None


@contextmanager
def _both(one: Any, other: Any) -> Iterator[None]:
    with one, other:
        yield


class _AnyDigest:
    """A digest that equals all others."""

    def __init__(self, *_: object) -> None: ...

    def update(self, _: object) -> None: ...

    def digest(self) -> _AnyDigest:
        return self

    def __eq__(self, _: object) -> bool:
        return True

    def __ne__(self, _: object) -> bool:
        return False

    __hash__ = None  # type: ignore[assignment]


CONTROLS: dict[str, tuple[Callable[[], Any], Callable[[Damage], bool]]] = {
    "rows without seals": (
        lambda: mock.patch.object(Ledger, "_check_rows", lambda _: None),
        lambda d: d.file == "ledger.sqlite" and "flipped" in d.what,
    ),
    "generations without a digest": (
        lambda: mock.patch.object(checkpoint, "blake3", _AnyDigest),
        lambda d: d.file.endswith("2.hpx") and "flipped" in d.what,
    ),
    "generations not tied to their ledger": (
        lambda: mock.patch.object(archive, "_belongs", lambda *_: None),
        lambda d: "another state" in d.what or "older copy" in d.what,
    ),
    "a log that nothing is expected of": (
        lambda: _both(
            mock.patch.object(wal, "acknowledged_is_lost", lambda *_: False),
            mock.patch.object(state_module._Mark, "read", lambda *_: 0),
        ),
        lambda d: d.file.endswith("-wal") and "flipped" in d.what,
    ),
}
"""What is switched off, and which damages then must show it."""


def run(long: bool) -> list[Row]:
    """Damage everything (or, if it is not to take long, a part) and return what came of it, by file and by damage."""
    rows = []
    with tempfile.TemporaryDirectory(
        prefix="hotpixd-damage-", dir="/dev/shm" if Path("/dev/shm").is_dir() else None
    ) as folder:
        ground = Ground(Path(folder))
        every = 1 if long else 25
        tallies: dict[tuple[str, str], list[tuple[str | None, str]]] = {}
        chosen = damages(ground, every)
        for damage, result in zip(chosen, _in_processes(ground, chosen), strict=True):
            tallies.setdefault((_role(damage.file), damage.what), []).append(result)
        for (role, what), results in tallies.items():
            ends = [end for _, end in results]
            counts = {"same": "as if undamaged", "told": "cured and told", "refused": "refused with the cure"}
            note = ", ".join(f"{ends.count(end)} {words}" for end, words in counts.items() if end in ends)
            first = next((wrong for wrong, _ in results if wrong), "")
            rows.append(Row("damage", f"{role}: {what}", len(results), sum(w is not None for w, _ in results), False,
                            f"{note}{'; ' if first else ''}{first}"))  # fmt: skip
        for name, (switch_off, concerned) in CONTROLS.items():
            chosen = [damage for damage in damages(ground, every if long else 12) if concerned(damage)]
            if len(chosen) > 60:
                chosen = random.Random(0).sample(chosen, 60)
            with ExitStack() as stack:
                stack.enter_context(switch_off())
                wrong = sum(wrong_with(ground, damage)[0] is not None for damage in chosen)
            rows.append(Row("damage", f"control: {name}", len(chosen), wrong, True))
    return rows


def _in_processes(ground: Ground, chosen: list[Damage]) -> Iterator[tuple[str | None, str]]:
    """Do each damage, on all cores; yield what `wrong_with` says of them, in their order."""
    # What a damage does is a function that cannot be sent: a process has the list from its parent by the fork.
    context = multiprocessing.get_context("fork")
    _shared[:] = [(ground, damage) for damage in chosen]
    with context.Pool(os.cpu_count(), ground.move) as pool:
        yield from pool.imap(_nth_wrong, range(len(chosen)), chunksize=8)


_shared: list[tuple[Ground, Damage]] = []


def _nth_wrong(number: int) -> tuple[str | None, str]:
    return wrong_with(*_shared[number])


def _role(file: str) -> str:
    if file.startswith("sensors/") and file.endswith(".hpx"):
        return "newest generation" if file.endswith("2.hpx") else "older generation"
    if file.startswith("sensors/"):
        return "a sensor's folder"
    return "a shot in the spool" if file.startswith("spool/") else "incoming" if file.startswith("incoming") else file


if __name__ == "__main__":
    for row in run("--long" in sys.argv):
        print(f"{'CONTROL ' if row.control else ''}{row.what} | {row.points} | {row.wrong} | {row.note}", flush=True)
