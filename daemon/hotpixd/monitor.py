"""The loop: shots in, and for each one what became of it.

A shot goes spool -> ledger (from here on it is ours) -> decoder -> fold -> ledger.
Hashing and decoding run ahead on other threads; folding is in ledger order, so
a replay after a crash ends in the same state.
"""

from __future__ import annotations

import contextlib
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from enum import StrEnum
from functools import partial
from itertools import islice, takewhile
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

from hotpixd import archive
from hotpixd.archive import Kept
from hotpixd.core.frame import Frame, SensorIdentity, ShotInfo, ShotKind
from hotpixd.core.sensor import DetectionSettings, FoldReport, Transition
from hotpixd.intake.decode import DecodeError, decode, keep_large_buffers
from hotpixd.intake.files import FoundShot
from hotpixd.store.ledger import LOST, Received, ShotRow, TransitionRow
from hotpixd.store.spool import Spool, SpoolError
from hotpixd.store.state import State, StateFull

HASHING = "hash"
"""Prefix of the names of threads that read shots: the only ones that may never end."""

_HASH_AHEAD = 6
"""Files whose content is being hashed ahead of time."""

_DECODE_AHEAD = 3
"""Frames being decoded, or waiting for the fold: with the one in the fold, four are in memory."""

_RECEIVE_TOGETHER = 4
"""Shots acknowledged with one commit, when that many are hashed already."""

_LOST_NAMED = 20
"""Shots that a sentence about those lost names."""

_RESIDENT_BYTES = 1 << 30
"""Accumulators of sensors not in use are kept in memory up to this size."""


class Fate(StrEnum):
    """What became of a shot."""

    FOLDED = "folded"
    REFUSED = "refused"
    KNOWN = "known"
    COMPANION = "companion"
    UNREADABLE = "unreadable"


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one shot."""

    path: Path
    """Where it came from."""

    fate: Fate

    reason: str | None = None
    """Why it was refused or unreadable, in a sentence."""

    sensor_id: str | None = None
    """Whose shot it is."""

    kind: ShotKind | None = None
    """Light or dark."""

    report: FoldReport | None = None
    """What it changed, if it was folded."""

    replayed: bool = False
    """Folded again after an interruption, from the spool."""

    seq: int | None = None
    """Its row of the ledger, if it was folded."""

    info: ShotInfo | None = None
    """How it was taken, if it was folded."""

    size: int = 0
    """Bytes of its file, if it was received."""

    again: bool = False
    """It was refused before: this is no news."""

    origin: str | None = None
    """Where it was before it came to `path`, for people."""

    @property
    def shown(self) -> Path:
        """What people know it by."""
        return self.path if self.origin is None else Path(self.origin)


@dataclass(frozen=True, slots=True)
class _Waiting:
    """A shot in the ledger, on its way through the decoder."""

    row: ShotRow
    frame: Future[Frame]
    replayed: bool
    found: FoundShot


class Monitor:
    """Folds shots into the sensors of an open state directory.

    Use from one thread. Closing does not checkpoint: call `checkpoint` where the work ends.

    Parameters
    ----------
    state : open for writing
    settings : of detection
    cores : threads for decoding and for folding
    checkpoint_every_s : folding time that a crash may cost to repeat
    checkpoint_every_shots : shots after which the spool is cleared, however fast they came
    clock : monotonic, s
    """

    def __init__(
        self,
        state: State,
        settings: DetectionSettings | None = None,
        *,
        cores: int = 2,
        checkpoint_every_s: float = 60.0,
        checkpoint_every_shots: int = 1024,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._state = state
        self._ledger = state.ledger
        self._settings = settings or DetectionSettings()
        self.checkpoint_every_s = checkpoint_every_s
        self.checkpoint_every_shots = checkpoint_every_shots
        self._clock = clock
        self._slabs = cores
        self._acked: deque[tuple[ShotRow, FoundShot]] = deque()
        self._waiting: deque[_Waiting] = deque()
        self._early: dict[str, Future[Frame]] = {}
        keep_large_buffers()
        self._hashers: dict[str, ThreadPoolExecutor] = {}
        self._decoders = ThreadPoolExecutor(cores, "decode")
        self._folders = ThreadPoolExecutor(cores, "fold")
        self._kept: OrderedDict[str, Kept] = OrderedDict()
        self._covered_by_older: dict[str, int] = {}
        self._checkpointed_at = clock()
        self._since_checkpoint = 0
        self.lost: dict[str, str] = {}
        """Names by key of shots that were acknowledged, could not be folded again, and were not offered since."""
        self.warnings: list[str] = []
        """Sentences about damage found and worked around."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for hasher in self._hashers.values():
            # Not waited for: a read of a dying card or a network that has gone may never end.
            hasher.shutdown(wait=False, cancel_futures=True)
        for pool in (self._decoders, self._folders):
            pool.shutdown(cancel_futures=True)
        # Hundreds of MB, which whoever reads the state next needs for the same.
        self._kept.clear()

    def replay(self, stop: Callable[[], bool] = lambda: False) -> Iterator[Outcome]:
        """Fold again what was received but is in no generation, after an interruption.

        Must be run to its end before `process`: the order of folding is the order of the ledger. If `stop` ends it
        early, only `checkpoint` may follow; the next replay does the rest.
        """
        self.warnings.extend(archive.set_aside_unusable(self._state))
        covers = archive.covers(self._state)
        rows = self._ledger.rows_to_replay(covers)
        for id_ in {row.sensor_id for row in rows if row.sensor_id in covers}:
            if id_ is not None:
                self._ledger.delete_derived_after(id_, covers[id_])
        for row in rows:
            if stop():
                break
            self._waiting.append(self._decode(row, FoundShot(Path(row.path)), replayed=True))
            if len(self._waiting) > _DECODE_AHEAD:
                yield from self._next_concluded()
        while self._waiting:
            yield from self._next_concluded()
        if self.lost:
            named = ", ".join(list(self.lost.values())[:_LOST_NAMED])
            more = f" and {len(self.lost) - _LOST_NAMED} more" if len(self.lost) > _LOST_NAMED else ""
            self.warnings.append(
                f"Shots that were folded or received cannot be folded again, as neither their copies in the spool nor"
                f" the originals are there as they were: {named}{more}. If you have their files, scan them: they are"
                " then folded anew."
            )

    def process(self, shots: Iterable[FoundShot], stop: Callable[[], bool] = lambda: False) -> Iterator[Outcome]:
        """Take shots in and fold them, yielding what became of each.

        Parameters
        ----------
        shots : in the order in which they are to be folded
        stop : asked before each shot is received; once true, those received are folded and the rest is left alone
        """
        return (outcome for outcome in self.follow(shots, stop) if outcome is not None)

    def follow(
        self,
        shots: Iterable[FoundShot | None],
        stop: Callable[[], bool] = lambda: False,
        wake: Callable[[], None] | None = None,
    ) -> Iterator[Outcome | None]:
        """Do as `process` does with a source that may have no shot just now, and then says None at once.

        Yields None when there is nothing to do: the caller waits before it goes on, until `wake` is called (from
        another thread) if it gave one. Without, the reading of files is waited for, and their order is kept. If a
        full disk ends it (`StateFull`), what was received is kept: call it again when there is room.
        """
        source = iter(shots)
        hashed: deque[tuple[FoundShot, Future[str]]] = deque()
        more = True
        # Of a call that a full disk ended.
        yield from self._begun()
        while True:
            # Who wakes limits what each source hands out; the files of one that hangs must not keep others out.
            while more and (wake is not None or len(hashed) < _HASH_AHEAD):
                try:
                    shot = next(source)
                except StopIteration:
                    more = False
                    break
                if shot is None:
                    break
                hashed.append((shot, self._hash(shot, wake)))
            if stop():
                break
            together = self._read(hashed, wait=wake is None)
            if together:
                yield from self._received(together)
            elif self._waiting:
                yield from self._next_concluded()
            elif more or hashed:
                yield None
            else:
                break
        while self._waiting:
            yield from self._next_concluded()

    def _hash(self, shot: FoundShot, wake: Callable[[], None] | None) -> Future[str]:
        if shot.source not in self._hashers:
            self._hashers[shot.source] = ThreadPoolExecutor(1, HASHING)
        future = self._hashers[shot.source].submit(Spool.hash_file, shot.path)
        if wake is not None:
            future.add_done_callback(lambda _: wake())
        return future

    def _read(self, hashed: deque[tuple[FoundShot, Future[str]]], *, wait: bool) -> list[tuple[FoundShot, Future[str]]]:
        """Take some of those off that are read: in their order, the first one at least, if it is to be waited for."""
        if wait:
            ready: Iterator[tuple[FoundShot, Future[str]]] = takewhile(
                lambda pair: pair[1].done() or pair is hashed[0], hashed
            )
        else:
            ready = filter(lambda pair: pair[1].done(), hashed)
        together = list(islice(ready, _RECEIVE_TOGETHER))
        for pair in together:
            hashed.remove(pair)
        return together

    def sensors(self, ids: Iterable[str]) -> Iterator[tuple[str, Kept]]:
        """Return sensors of this state by id: those in memory as they are, the others from the disk."""
        known = self._ledger.sensors()
        for id_ in ids:
            kept = self._kept.get(id_)
            yield id_, kept or archive.load(self._state, id_, archive.identity_from(known[id_]), self._settings)

    @property
    def in_flight(self) -> int:
        """Shots received and not folded yet."""
        return len(self._waiting) + len(self._acked)

    @property
    def uncovered(self) -> int:
        """Shots folded since the last checkpoint."""
        return self._since_checkpoint

    def sensor(self, id_: str) -> Kept:
        """Return a sensor of the ledger, loaded if it is not in memory."""
        kept = self._kept.get(id_)
        # Asked for at every shot: the ledger only if it is not in memory.
        identity = kept.sensor.identity if kept else archive.identity_from(self._ledger.sensors()[id_])
        return self._resident(id_, identity)

    def checkpoint(self) -> int:
        """Write a generation of every sensor that has new frames, and clear the spool of what is safe by then.

        Returns
        -------
        Bytes written.
        """
        written = sum(self._save(kept) for kept in self._kept.values())
        self._ledger.commit()
        self._state.settle_spool(self._covered_by_older)
        self._checkpointed_at = self._clock()
        self._since_checkpoint = 0
        return written

    def _received(self, together: list[tuple[FoundShot, Future[str]]]) -> Iterator[Outcome]:
        """Acknowledge shots: their bytes are in the spool and their rows on the disk when this yields them."""
        taken: dict[str, FoundShot] = {}
        for shot, future in together:
            try:
                key = future.result()
                if shot.raw is not None:
                    # Its raw file decides: it has to be on its way before this one is looked at.
                    yield from self._acknowledged(taken)
                    taken = {}
                row = self._ledger.find(key)
                if key in taken:
                    yield from self._acknowledged(taken)
                    taken = {}
                    row = self._ledger.find(key)
                if row is not None and row.is_lost:
                    # As if it had never come: a later row, since its frame is folded after all the others.
                    self._ledger.forget(key)
                    self.lost.pop(key, None)
                elif row is not None:
                    yield self._known(shot, row)
                    continue
                self._state.spool.take(shot.path, key, partial(self._decode_early, shot, key))
            except SpoolError as error:
                yield Outcome(shot.path, Fate.UNREADABLE, str(error), origin=shot.origin)
                continue
            if shot.raw is not None:
                try:
                    folded = self._is_folded(shot.raw, shot.raw_key)
                except SpoolError as error:
                    yield Outcome(shot.path, Fate.UNREADABLE, f"the raw file of {shot.path.name} comes first: {error}")
                    continue
                if folded:
                    # With its verdict in the same commit: without it, a replay would fold the companion.
                    received = self._received_now(shot, key)
                    self._ledger.receive([replace(received, companion_of=shot.raw.name)])
                    yield Outcome(shot.path, Fate.COMPANION, f"companion of {shot.raw.name}", origin=shot.origin)
                    continue
            taken[key] = shot
        yield from self._acknowledged(taken)

    def _acknowledged(self, taken: dict[str, FoundShot]) -> Iterator[Outcome]:
        if not taken:
            return
        self._ledger.receive([self._received_now(shot, key) for key, shot in taken.items()])
        for key, shot in taken.items():
            row = self._ledger.find(key)
            if row is not None:
                self._acked.append((row, shot))
        yield from self._begun()

    def _begun(self) -> Iterator[Outcome]:
        while self._acked:
            self._waiting.append(self._decode(*self._acked.popleft(), replayed=False))
            while len(self._waiting) > _DECODE_AHEAD:
                yield from self._next_concluded()
        self._early.clear()

    def _decode_early(self, shot: FoundShot, key: str) -> None:
        """Start decoding while the shot is made durable; nobody sees the frame before that is done."""
        if shot.raw is None and len(self._waiting) + len(self._early) <= _DECODE_AHEAD:
            self._early[key] = self._decoders.submit(decode, self._state.spool.path(key), shot.kind)

    def _received_now(self, shot: FoundShot, key: str) -> Received:
        given: Literal["light", "dark"] | None = None if shot.kind is None else shot.kind.value
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        # Of the spool's file: the card may have been pulled by now.
        size = self._state.spool.path(key).stat().st_size
        path = shot.origin or str(shot.path.absolute())
        return Received(key, Path(path).name, path, size, now, given, shot.camera)

    def _is_folded(self, raw: Path, key: str | None) -> bool:
        """Whether a raw file is folded, or about to be.

        Parameters
        ----------
        key : of its content, if it is known. The file is not looked at then

        Raises
        ------
        SpoolError
            If it is there, but cannot be read.
        """
        for shot in self._waiting:
            if shot.row.key == key or Path(shot.row.path) == raw.absolute():
                return shot.frame.exception() is None
        try:
            row = self._ledger.find(key or Spool.hash_file(raw))
        except SpoolError as error:
            if isinstance(error.__cause__, FileNotFoundError):
                return False
            raise
        return row is not None and row.verdict == "folded"

    def _known(self, shot: FoundShot, row: ShotRow | None) -> Outcome:
        if row is not None and row.verdict == "refused":
            return Outcome(shot.path, Fate.REFUSED, row.reason, again=True, origin=shot.origin)
        return Outcome(shot.path, Fate.KNOWN, sensor_id=None if row is None else row.sensor_id, origin=shot.origin)

    def _decode(self, row: ShotRow, found: FoundShot, *, replayed: bool) -> _Waiting:
        kind = None if row.kind_given is None else ShotKind(row.kind_given)
        if replayed:
            return _Waiting(row, self._decoders.submit(self._decode_again, row, kind), True, found)
        early = self._early.pop(row.key, None)
        frame = early or self._decoders.submit(decode, self._state.spool.path(row.key), kind)
        return _Waiting(row, frame, False, found)

    def _decode_again(self, row: ShotRow, kind: ShotKind | None) -> Frame:
        spool = self._state.spool
        kept, original = spool.path(row.key), Path(row.path)
        if spool.verify(row.key):
            return decode(kept, kind)
        with contextlib.suppress(StateFull, FileNotFoundError):
            self._state.set_aside(kept)
        try:
            if Spool.hash_file(original) != row.key:
                raise DecodeError(LOST)
            return decode(spool.take(original, row.key), kind)
        except SpoolError:
            raise DecodeError(LOST) from None
        except StateFull:
            # No room for another copy; the next replay may not find it any more.
            return decode(original, kind)

    def _next_concluded(self) -> Iterator[Outcome]:
        outcome = self._conclude(self._waiting[0])
        self._waiting.popleft()
        yield outcome
        # After the yield: what the caller writes down of this shot is then in the same commit.
        due = self._clock() - self._checkpointed_at > self.checkpoint_every_s
        if self._since_checkpoint and (due or self._since_checkpoint >= self.checkpoint_every_shots):
            self.checkpoint()

    def _conclude(self, shot: _Waiting) -> Outcome:
        """Fold a decoded shot and write down what that changed."""
        row, found = shot.row, shot.found
        try:
            frame = shot.frame.result()
        except DecodeError as error:
            self._ledger.conclude(row.seq, verdict="refused", reason=str(error))
            if str(error) == LOST:
                self.lost[row.key] = row.name
                self._ledger.forget_seen_shot(row.key)
            return Outcome(
                found.path, Fate.REFUSED, str(error), replayed=shot.replayed, size=row.size, origin=found.origin
            )
        if row.camera_given and frame.sensor.serial is None:
            frame = replace(frame, sensor=replace(frame.sensor, serial=row.camera_given))
        kept = self._sensor_of(frame)
        report = kept.sensor.fold(frame, row.seq)
        kept.fold_in(row)
        digest = report.fingerprint
        # It depends on the frames before it, too: on their defects.
        if row.samples_digest not in (None, digest) and not self.lost:
            self.warnings.append(
                f"{row.name} decodes to other samples than when it was first folded; a decoder was changed in between"
            )
        self._write_down(row, frame, kept.id, report, digest)
        self._since_checkpoint += 1
        return Outcome(
            found.path,
            Fate.FOLDED,
            None,
            kept.id,
            frame.kind,
            report,
            shot.replayed,
            row.seq,
            frame.info,
            row.size,
            origin=found.origin,
        )

    def _write_down(self, row: ShotRow, frame: Frame, id_: str, report: FoldReport, digest: str) -> None:
        info = frame.info
        self._ledger.conclude(
            row.seq,
            verdict="folded",
            reason=None,
            sensor_id=id_,
            kind=str(frame.kind),
            exposure_s=info.exposure_s,
            iso=info.iso,
            sensor_temp_c=info.sensor_temp_c,
            taken_at=None if info.taken_at is None else _utc(info.taken_at),
            counted=report.counted,
            not_counted_because=report.not_counted_because,
            lift=report.lift,
            samples_digest=digest,
        )
        seen = report.observations
        if len(seen):
            self._ledger.add_observations(
                id_, row.seq, report.observed_sites, seen["value"], seen["excess"], seen["events"]
            )
        if report.transitions:
            self._ledger.add_transitions(
                TransitionRow(id_, t.site, row.seq, t.change, _detail(t)) for t in report.transitions
            )

    def _sensor_of(self, frame: Frame) -> Kept:
        id_ = archive.sensor_id(frame.sensor)
        if id_ not in self._kept:
            self._ledger.add_sensor(id_, archive.describe(frame.sensor))
        return self._resident(id_, frame.sensor)

    def _resident(self, id_: str, identity: SensorIdentity) -> Kept:
        kept = self._kept.get(id_)
        if kept is None:
            self._make_room()
            each_slab = self._folders.map
            kept = archive.load(self._state, id_, identity, self._settings, each_slab=each_slab, slabs=self._slabs)
            self.warnings.extend(kept.damage)
            self._kept[id_] = kept
            if kept.covered_by_older is not None:
                self._covered_by_older[id_] = kept.covered_by_older
        self._kept.move_to_end(id_)
        return kept

    def _make_room(self) -> None:
        """Save and forget the sensors used least recently, while they hold too much memory."""
        while self._kept and sum(k.sensor.accumulator.nbytes for k in self._kept.values()) > _RESIDENT_BYTES:
            self._save(next(iter(self._kept.values())))
            self._kept.popitem(last=False)

    def _save(self, kept: Kept) -> int:
        written = archive.save(self._state, kept)
        if kept.covered_by_older is not None:
            self._covered_by_older[kept.id] = kept.covered_by_older
        return written


def _utc(moment: datetime) -> str:
    """ISO 8601, UTC. A camera that does not say its zone is taken at its word: its clock is then the label."""
    aware = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
    return aware.astimezone(UTC).isoformat()


def _detail(transition: Transition) -> dict[str, object]:
    return {
        "kind": transition.kind,
        "log_e": round(transition.log_e, 3),
        "excess_sigma": round(transition.excess_sigma, 3),
    }
