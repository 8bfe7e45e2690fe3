"""The loop: shots in, and for each one what became of it.

A shot goes spool -> ledger (from here on it is ours) -> decoder -> fold -> ledger.
Hashing on other threads and decoding in other processes run ahead; folding is in
ledger order, so a replay after a crash ends in the same state.
"""

from __future__ import annotations

import contextlib
import os
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

import numpy as np

from hotpixd import archive
from hotpixd.archive import Kept
from hotpixd.core.frame import Frame, SampleKind, Samples, SensorIdentity, ShotInfo, ShotKind
from hotpixd.core.sensor import DetectionSettings, FoldReport, Look, Sensor, Transition
from hotpixd.intake.decode import DecodeError, keep_large_buffers
from hotpixd.intake.decoders import Decoders, memory_bytes
from hotpixd.intake.files import FoundShot
from hotpixd.store.durable import failpoint
from hotpixd.store.ledger import LOST, Received, ShotRow, TransitionRow
from hotpixd.store.mapped import zeros_in
from hotpixd.store.spool import Held, Spool, SpoolError, is_unchanged
from hotpixd.store.state import State, StateFull

HASHING = "hash"
"""Prefix of the names of threads that read shots: the only ones that may never end."""

_READ_LAST = 8
"""Files of which a source's thread remembers what it has read: the raw file of the next JPEG is among them."""

_HASH_AHEAD = 6
"""Files whose content is being hashed ahead of time."""

_DECODE_AHEAD = 3
"""Frames being decoded, or waiting for the fold, at most: with the one in the fold, four are in memory."""

_SHARE_OF_FRAMES = 32
"""Of memory: what these may take, and as much those that wait to be added to the sums together. But never fewer than
one of each. With 61 megapixels and 2 GB, two decoders at a time were one too many."""

_FRAMES_AHEAD_BYTES = 400_000_000
"""What these may take on any machine: two JPEGs of 45 megapixels, three raw frames of 61."""

_LARGE_FRAME = 120_000_000
"""Bytes of a frame of which nothing is known yet: raw, of 60 megapixels."""

_RECEIVE_TOGETHER = 4
"""Shots acknowledged with one commit, when that many are hashed already."""

_WORTH = 6
"""Bytes of shots per byte of generations: these are then at most a sixth of what is written anyway."""

_CHEAP_BYTES = 8 << 20
"""Generations up to this size are written whenever it is time."""

_MOST_ATTEMPTS = 5
"""Replays that may end at one shot. Decoders have their own processes: only a fault of the fold's could do that."""

_LOST_NAMED = 20
"""Shots that a sentence about those lost names."""

_BYTES_PER_SAMPLE = 20
"""What the statistic of a sensor and a frame on its way through take, about, per sample."""

_BYTES_PER_SAMPLE_ON_DISK = 8
"""What of it is in memory if the statistic is not."""

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

    told: bool = False
    """It had this fate already before the interruption: whoever is told of shots was told then."""

    seq: int | None = None
    """Its row of the ledger, if it was folded."""

    info: ShotInfo | None = None
    """How it was taken, if it was folded."""

    size: int = 0
    """Bytes of its file, if it was received."""

    again: bool = False
    """It was refused before: this is no news."""

    gone: bool = False
    """It is unreadable because its file has another name now, or is no more."""

    origin: str | None = None
    """Where it was before it came to `path`, for people."""

    @property
    def shown(self) -> Path:
        """What people know it by."""
        return self.path if self.origin is None else Path(self.origin)


@dataclass(frozen=True, slots=True)
class Waiting:
    """A shot in the ledger, on its way through the decoder."""

    row: ShotRow
    frame: Future[Frame]
    replayed: bool
    found: FoundShot


@dataclass(frozen=True, slots=True)
class _Read:
    """What a source's thread made of a shot."""

    held: Held

    raw_key: str | None = None
    """The key of its raw file's content. None if there is none, or no longer."""

    raw_failure: SpoolError | None = None
    """Why its raw file could not be read."""


@dataclass(frozen=True, slots=True)
class _Ahead:
    """A look at the next frame, taken while the one before is followed."""

    sensor: Sensor
    samples: Samples
    look: Future[Look]


@dataclass(frozen=True, slots=True)
class _Checkpoint:
    """Generations that another thread writes."""

    written: Future[None]
    generations: list[archive.Saving]
    began_at: float

    shots: int
    """In them, but in none before."""

    nbytes: int
    """Of these shots' files."""


@dataclass(slots=True)
class Reading:
    """A file that a source's thread is reading."""

    path: Path

    moved_at: float
    """When something of it was read last, by the monitor's clock."""


class Monitor:
    """Folds shots into the sensors of an open state directory.

    Use from one thread. Closing does not checkpoint: call `checkpoint` where the work ends.

    Parameters
    ----------
    state : open for writing
    settings : of detection
    cores : threads for folding, and processes for decoding
    decoders : used and not closed, if given; else it starts its own
    checkpoint_every_s : folding time that a crash may cost to repeat
    checkpoint_every_shots : shots after which the spool is cleared, however fast they came
    on_disk : keep sums and counts in files of the state directory, mapped into memory, for what memory does not hold
    luma : fold of JPEGs their luma alone
    kernels : done when the kernels can be used; until then `follow` takes shots in and has them decoded, but folds none
    clock : monotonic, s
    """

    def __init__(
        self,
        state: State,
        settings: DetectionSettings | None = None,
        *,
        cores: int = 2,
        decoders: Decoders | None = None,
        checkpoint_every_s: float = 60.0,
        checkpoint_every_shots: int = 1024,
        on_disk: bool = False,
        luma: bool = False,
        kernels: Future[None] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._state = state
        self._ledger = state.ledger
        self._settings = settings or DetectionSettings()
        self.checkpoint_every_s = checkpoint_every_s
        self.checkpoint_every_shots = checkpoint_every_shots
        self._kernels = kernels
        self._clock = clock
        self._wake: Callable[[], None] | None = None
        self._slabs = cores
        self._on_disk = on_disk
        self._acked: deque[tuple[ShotRow, FoundShot]] = deque()
        self._waiting: deque[Waiting] = deque()
        self._early: dict[str, Future[Frame]] = {}
        keep_large_buffers()
        self._hashers: dict[str, ThreadPoolExecutor] = {}
        self.decoders = decoders or Decoders(cores, luma=luma)
        self._owns_decoders = decoders is None
        self._decoding = ThreadPoolExecutor(cores, "decode")
        self._reading: dict[str, Reading] = {}
        self._read_last: dict[str, OrderedDict[Path, tuple[os.stat_result, str]]] = {}
        self._unsettled: set[Future[_Read]] = set()
        """Reads whose shots are neither kept nor let go of."""
        self._to_replay: deque[ShotRow] | None = None
        self._identities: dict[str, SensorIdentity] = {}
        """Of the sensors that were known before the replay."""
        self._folders = ThreadPoolExecutor(cores, "fold")
        self._looking = ThreadPoolExecutor(1, "look")
        self._next_look: _Ahead | None = None
        self._saver = ThreadPoolExecutor(1, "checkpoint")
        self._saving: _Checkpoint | None = None
        self._kept: OrderedDict[str, Kept] = OrderedDict()
        self._covered_by_older: dict[str, int] = {}
        self._spooled_after: dict[str, int] = {}
        """Of the sensors that were known before the replay: see `archive.Standing`."""
        self._checkpointed_at = clock()
        self._since_checkpoint = 0
        self._bytes_since = 0
        state.spool.rewritten |= self._ledger.rewritten
        self._depths = {id_: about.get("depth") for id_, about in self._ledger.sensors().items()}
        self._memory = memory_bytes()
        self._ahead = self._frames_ahead(_LARGE_FRAME)
        self.lost: dict[str, str] = {}
        """Names by key of shots that were acknowledged, could not be folded again, and were not offered since."""
        self.warnings: list[str] = []
        """Sentences about damage found and worked around."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._let_go()
        for hasher in self._hashers.values():
            # Not waited for: a read of a dying card or a network that has gone may never end.
            hasher.shutdown(wait=False, cancel_futures=True)
        if self._owns_decoders:
            self.decoders.close()
        # The generation that is being written is waited for: nothing may write to a state that is closed.
        for pool in (self._saver, self._decoding, self._looking, self._folders):
            pool.shutdown(cancel_futures=True)
        # Hundreds of MB, which whoever reads the state next needs for the same.
        self._kept.clear()

    def replay(self, stop: Callable[[], bool] = lambda: False) -> Iterator[Outcome]:
        """Fold again what was received but is in no generation, after an interruption.

        Must be run to its end before `process`: the order of folding is the order of the ledger. If `stop` ends it
        early, only `checkpoint` may follow; the next replay does the rest. If a full disk ends it (`StateFull`), call
        it again when there is room: it goes on where it was.
        """
        if self._to_replay is None:
            found = archive.standings(self._state)
            self.warnings.extend(archive.set_aside_unusable(self._state, found))
            covers = {id_: standing.reach for id_, standing in found.items()}
            self._spooled_after = {id_: standing.spooled_after for id_, standing in found.items()}
            rows = self._ledger.rows_to_replay(covers)
            for id_ in {row.sensor_id for row in rows if row.sensor_id in covers}:
                if id_ is not None:
                    self._ledger.delete_derived_after(id_, covers[id_])
            self._identities = {id_: archive.identity_from(about) for id_, about in self._ledger.sensors().items()}
            self._to_replay = deque(rows)
        if self._to_replay:
            # Now, so that no shot is blamed for what goes wrong with them.
            self._wait_for_kernels()
        while self._to_replay and not stop():
            while len(self._waiting) > self._ahead:
                yield from self._next_concluded()
            row = self._to_replay[0]
            suspect = row.verdict == "received" and row.attempts > 0
            # By itself, so that no other shot is taken for what ends us.
            while suspect and self._waiting:
                yield from self._next_concluded()
            if row.verdict == "received":
                self._ledger.begin_attempt(row.seq)
            self._to_replay.popleft()
            failpoint("amid_replay")
            self._waiting.append(self._decode(row, FoundShot(Path(row.path)), replayed=True))
            while suspect and self._waiting:
                yield from self._next_concluded()
                self._ledger.commit()
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
        full disk ends it (`StateFull`), what was received is kept: call it again when there is room. If `stop` ends it
        before there are kernels, what was received is left to the next replay.
        """
        self._wake = wake
        source = iter(shots)
        # What an earlier call has read is offered again.
        self._let_go()
        hashed: deque[tuple[FoundShot, Future[_Read]]] = deque()
        more = True
        while True:
            if self._saving is not None and self._saving.written.done():
                self._conclude_saving()
            yield from self._begun()
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
            together = [] if self._acked else self._read(hashed, wait=wake is None)
            if together:
                yield from self._received(together)
            elif self._next_is_decoded():
                yield from self._next_concluded()
            elif more or hashed or self._waiting:
                self._sum_up()
                yield None
            else:
                break
        while self._waiting or self._acked:
            if stop() and not self._has_kernels():
                return
            yield from self._begun()
            if self._next_is_decoded():
                yield from self._next_concluded()
            else:
                yield None

    def _frames_ahead(self, nbytes: int) -> int:
        """Return how many frames of a size may wait while one is folded."""
        # One whose samples are on another machine has none here.
        share = min(self._memory // _SHARE_OF_FRAMES, _FRAMES_AHEAD_BYTES)
        return min(share // max(nbytes, 1), _DECODE_AHEAD)

    def _sum_up(self) -> None:
        """Do what folding has put off, now that there is time for it."""
        for kept in self._kept.values():
            if kept.sensor.accumulator.may_sum_up:
                kept.sensor.accumulator.sum_up()

    def _hash(self, shot: FoundShot, wake: Callable[[], None] | None) -> Future[_Read]:
        if shot.source not in self._hashers:
            self._hashers[shot.source] = ThreadPoolExecutor(1, HASHING)
            self._read_last[shot.source] = OrderedDict()
        future = self._hashers[shot.source].submit(self._hold, shot)
        self._unsettled.add(future)
        if wake is not None:
            future.add_done_callback(lambda _: wake())
        return future

    def _hold(self, shot: FoundShot) -> _Read:
        """Read a shot, on its source's thread: the only one that touches the source's disk."""
        reading = self._reading[shot.source] = Reading(shot.path, self._clock())

        def progress() -> None:
            reading.moved_at = self._clock()

        try:
            held = self._state.spool.hold(shot.path, shot.below, progress)
            if shot.was_read is not None:
                shot.was_read(held.status, held.key)
            last = self._read_last[shot.source]
            last[shot.path] = held.status, held.key
            if len(last) > _READ_LAST:
                last.popitem(last=False)
            if shot.raw is None or shot.raw_key is not None:
                return _Read(held, shot.raw_key)
            reading.path = shot.raw
            try:
                return _Read(held, self._key_of(shot.raw, shot, progress))
            except SpoolError as error:
                gone = isinstance(error.__cause__, FileNotFoundError)
                return _Read(held, raw_failure=None if gone else error)
        finally:
            del self._reading[shot.source]

    def _key_of(self, raw: Path, shot: FoundShot, progress: Callable[[], None]) -> str:
        """Return the key of a companion's raw file; it is not read again if that was done a moment ago."""
        known = self._read_last[shot.source].get(raw)
        if known is not None:
            with contextlib.suppress(OSError):
                if is_unchanged(known[0], raw.stat(follow_symlinks=shot.below is None)):
                    return known[1]
        return Spool.hash_file(raw, shot.below, progress)

    def readings(self) -> dict[str, Reading]:
        """Return which file of each source is being read now, by the source's name."""
        return dict(self._reading)

    def _let_go(self, *settled: Future[_Read]) -> None:
        """Release what these reads, or all, hold and is not kept; those that still go on do so when they end."""
        for future in settled or tuple(self._unsettled):
            self._unsettled.discard(future)
            future.add_done_callback(self._release)

    def _release(self, future: Future[_Read]) -> None:
        if not future.cancelled() and future.exception() is None:
            self._state.spool.release(future.result().held)

    def _read(
        self, hashed: deque[tuple[FoundShot, Future[_Read]]], *, wait: bool
    ) -> list[tuple[FoundShot, Future[_Read]]]:
        """Take some of those off that are read: in their order, the first one at least, if it is to be waited for."""
        if wait:
            ready: Iterator[tuple[FoundShot, Future[_Read]]] = takewhile(
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
            yield id_, kept or archive.load(self._state, id_, Sensor(archive.identity_from(known[id_]), self._settings))

    @property
    def in_flight(self) -> int:
        """Shots received and not folded yet."""
        return len(self._waiting) + len(self._acked)

    @property
    def is_worth_a_checkpoint(self) -> bool:
        """Whether the shots folded since the last one are large beside the generations that it would write.

        A generation of 24 megapixels takes 120 to 150 MB: one after every shot that comes alone would wear out the
        card of a small computer. Until it is worth it, a crash costs some seconds of folding those shots again.
        """
        cost = sum(kept.bytes_written or kept.sensor.layout.size * 6 for kept in self._kept.values() if kept.pending)
        return self._since_checkpoint > 0 and (cost < _CHEAP_BYTES or self._bytes_since >= _WORTH * cost)

    @property
    def checkpointed_at(self) -> float:
        """When the last checkpoint was begun, or this was made, by the clock."""
        return self._checkpointed_at

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
        before = self._conclude_saving()
        began = self._clock()
        written = sum(self._save(kept) for kept in self._kept.values())
        self._settle_spool()
        self._checkpointed_at = self._clock()
        self._since_checkpoint = self._bytes_since = 0
        self._checkpointed(self._checkpointed_at - began, written)
        return before + written

    def begin_checkpoint(self) -> None:
        """Have another thread write what `checkpoint` would, and go on folding meanwhile.

        `follow` takes note of its end, and raises what went wrong. While one is on its way, this does nothing.
        """
        if self._saving is not None:
            if not self._saving.written.done():
                return
            self._conclude_saving()
        generations = [archive.Saving(self._state, kept) for kept in self._kept.values() if kept.pending]
        self._checkpointed_at = self._clock()
        wake = self._wake or (lambda: None)
        written = self._saver.submit(_write, generations, wake)
        written.add_done_callback(lambda _: wake())
        self._saving = _Checkpoint(
            written, generations, self._checkpointed_at, self._since_checkpoint, self._bytes_since
        )
        self._since_checkpoint = self._bytes_since = 0

    def _conclude_saving(self) -> int:
        """Wait for the checkpoint that is on its way, if there is one; return its bytes."""
        if self._saving is None:
            return 0
        saving, self._saving = self._saving, None
        try:
            saving.written.result()
        except BaseException:
            self._since_checkpoint += saving.shots
            self._bytes_since += saving.nbytes
            raise
        for generation in saving.generations:
            generation.conclude()
            self._note_older(generation.kept)
        self._settle_spool()
        written = sum(generation.kept.bytes_written for generation in saving.generations)
        self._checkpointed(self._clock() - saving.began_at, written)
        return written

    def _checkpointed(self, seconds: float, written: int) -> None:
        """Be told that a checkpoint was written, how long that took, and of how many bytes it is."""

    def _settle_spool(self) -> None:
        self._ledger.commit()
        self._state.settle_spool(self._covered_by_older)

    def _note_older(self, kept: Kept) -> None:
        if kept.covered_by_older is not None:
            self._covered_by_older[kept.id] = kept.covered_by_older

    def _received(self, together: list[tuple[FoundShot, Future[_Read]]]) -> Iterator[Outcome]:
        """Acknowledge shots: their bytes are in the spool and their rows on the disk when this yields them."""
        taken: dict[str, FoundShot] = {}
        for shot, future in together:
            try:
                read = future.result()
                key = read.held.key
                overwritten = self._state.spool.overwritten(read.held)
                if overwritten:
                    yield from self._acknowledged(taken)
                    taken = {}
                    self._ledger.note_rewritten(str(shot.path.absolute()))
                    yield from self._do_without(overwritten)
                if shot.raw is not None:
                    # Its raw file decides: it has to be on its way before this one is looked at.
                    yield from self._acknowledged(taken)
                    yield from self._begun(wait=True)
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
                    self._mend(row, read.held)
                    self._let_go(future)
                    yield self._known(shot, row)
                    continue
                self._state.spool.keep(read.held, partial(self._decode_early, shot, key))
            except SpoolError as error:
                self._let_go(future)
                yield Outcome(shot.path, Fate.UNREADABLE, str(error), gone=error.gone, origin=shot.origin)
                continue
            self._let_go(future)
            if shot.raw is not None:
                if read.raw_failure is not None:
                    reason = f"the raw file of {shot.path.name} comes first: {read.raw_failure}"
                    yield Outcome(shot.path, Fate.UNREADABLE, reason)
                    continue
                if self._is_folded(shot.raw, read.raw_key):
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

    def _begun(self, *, wait: bool = False) -> Iterator[Outcome]:
        """Hand those acknowledged to the decoders; as far as these have room, unless they are to be waited for."""
        while self._acked:
            if len(self._waiting) <= self._ahead:
                self._waiting.append(self._decode(*self._acked.popleft(), replayed=False))
            elif wait or self._next_is_decoded():
                yield from self._next_concluded()
            else:
                return
        self._early.clear()

    def _next_is_decoded(self) -> bool:
        """Tell whether the next one can be folded at once; where nobody is woken, whether it will be."""
        if self._wake is None or not self._waiting:
            return bool(self._waiting)
        held_up = self._saving is not None and any(
            g.kept.sensor.accumulator.must_wait for g in self._saving.generations
        )
        return self._waiting[0].frame.done() and self._has_kernels() and not held_up

    def _has_kernels(self) -> bool:
        return self._kernels is None or self._kernels.done()

    def _wait_for_kernels(self) -> None:
        if self._kernels is not None:
            self._kernels.result()

    def _decode_early(self, shot: FoundShot, key: str) -> None:
        """Start decoding while the shot is made durable; nobody sees the frame before that is done."""
        if shot.raw is None and len(self._waiting) + len(self._early) <= self._ahead:
            self._early[key] = self._decoding.submit(
                self._decode_kept, key, shot.kind, Path(shot.origin or shot.path).name
            )

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
        key : of its content. None if it is gone
        """
        for shot in self._waiting:
            if shot.row.key == key or Path(shot.row.path) == raw.absolute():
                return shot.frame.exception() is None
        row = None if key is None else self._ledger.find(key)
        return row is not None and row.verdict == "folded"

    def _mend(self, row: ShotRow, held: Held) -> None:
        """Make the copy in the spool of a shot that is known anew, if it is damaged or gone, and still needed."""
        id_ = row.sensor_id or ""
        if row.verdict != "folded" or id_ not in self._spooled_after:
            return
        spool, copy = self._state.spool, self._state.spool.path(row.key)
        there = os.path.lexists(copy)
        after = max(self._spooled_after[id_], self._covered_by_older.get(id_, 0))
        if (there or row.seq > after) and not spool.has(held):
            with contextlib.suppress(StateFull):
                if there:
                    self._state.set_aside(copy)
                spool.keep(held)

    def _do_without(self, overwritten: list[str]) -> Iterator[Outcome]:
        """Have both generations cover shots whose copies in the spool were overwritten: no replay can have them."""
        yield from self._begun(wait=True)
        while self._waiting:
            yield from self._next_concluded()
        self.checkpoint()
        for verdict, id_, seq in self._ledger.verdicts(overwritten).values():
            if verdict == "folded" and id_ is not None and seq > self._covered_by_older.get(id_, 0):
                kept = self.sensor(id_)
                archive.save(self._state, kept, anyway=True)
                self._note_older(kept)
        self._state.spool.drop(overwritten)

    def _known(self, shot: FoundShot, row: ShotRow | None) -> Outcome:
        if row is not None and row.verdict == "refused":
            return Outcome(shot.path, Fate.REFUSED, row.reason, again=True, origin=shot.origin)
        kind = ShotKind(row.kind) if row is not None and row.kind else None
        sensor_id = None if row is None else row.sensor_id
        return Outcome(shot.path, Fate.KNOWN, sensor_id=sensor_id, kind=kind, origin=shot.origin)

    def _decode(self, row: ShotRow, found: FoundShot, *, replayed: bool) -> Waiting:
        kind = None if row.kind_given is None else ShotKind(row.kind_given)
        if replayed:
            return Waiting(row, self._decoding.submit(self._decode_again, row, kind), True, found)
        early = self._early.pop(row.key, None)
        frame = early or self._decoding.submit(self._decode_kept, row.key, kind, row.name)
        if self._wake is not None:
            frame.add_done_callback(partial(_woken, self._wake))
        return Waiting(row, frame, False, found)

    def _decode_kept(self, key: str, kind: ShotKind | None, name: str) -> Frame:
        try:
            frame = self.decoders.decode(self._state.spool.path(key), kind, name=name)
        except DecodeError:
            if not self._state.spool.is_as_kept(key):
                raise DecodeError(LOST) from None
            raise
        # After that: what was decoded must be what was acknowledged, and not what the file was overwritten with.
        if not self._state.spool.is_as_kept(key):
            raise DecodeError(LOST)
        return frame

    def _decode_again(self, row: ShotRow, kind: ShotKind | None) -> Frame:
        if row.verdict == "received" and row.attempts >= _MOST_ATTEMPTS:
            raise DecodeError(
                f"hotpixd was ended {row.attempts} times while it worked on this shot, so it is left alone; if that was"
                " not by you, please report it with the file"
            )
        spool = self._state.spool
        kept, original = spool.path(row.key), Path(row.path)
        luma = self._was_luma(row)
        if spool.verify(row.key):
            return self.decoders.decode(kept, kind, luma=luma, name=row.name)
        there = os.path.lexists(kept)
        with contextlib.suppress(StateFull, FileNotFoundError):
            self._state.set_aside(kept)
        try:
            if Spool.hash_file(original) != row.key:
                if there:
                    # It was a link, most likely, and the file is overwritten in place.
                    spool.rewritten.add(row.path)
                raise DecodeError(LOST)
            return self.decoders.decode(spool.take(original, row.key), kind, luma=luma, name=row.name)
        except SpoolError:
            raise DecodeError(LOST) from None
        except StateFull:
            # No room for another copy; the next replay may not find it any more.
            return self.decoders.decode(original, kind, luma=luma)

    def _was_luma(self, row: ShotRow) -> bool | None:
        """Whether a JPEG was folded as luma, whatever the user wants by now; None for others, or if it never was."""
        identity = None if row.sensor_id is None else self._identities.get(row.sensor_id)
        if identity is None or identity.samples is SampleKind.RAW:
            return None
        return identity.layout.channels == 1

    def _next_concluded(self) -> Iterator[Outcome]:
        outcome = self._conclude(self._waiting[0])
        self._waiting.popleft()
        yield outcome
        # After the yield: what the caller writes down of this shot is then in the same commit.
        due = self._clock() - self._checkpointed_at > self.checkpoint_every_s
        if (due and self.is_worth_a_checkpoint) or self._since_checkpoint >= self.checkpoint_every_shots:
            self.begin_checkpoint()

    def _conclude(self, shot: Waiting) -> Outcome:
        """Fold a decoded shot and write down what that changed."""
        row, found = shot.row, shot.found
        try:
            frame = self._placed(row, shot.frame.result())
        except DecodeError as error:
            self._ledger.conclude(row.seq, verdict="refused", reason=str(error))
            if str(error) == LOST:
                self.lost[row.key] = row.name
                if row.path in self._state.spool.rewritten:
                    self._ledger.note_rewritten(row.path)
                self._ledger.forget_seen_shot(row.key)
            return Outcome(
                found.path,
                Fate.REFUSED,
                str(error),
                replayed=shot.replayed,
                told=row.verdict != "received",
                size=row.size,
                origin=found.origin,
            )
        self._ahead = self._frames_ahead(frame.samples.nbytes)
        kept = self._sensor_of(frame)
        report = self._fold(kept, frame, row)
        kept.fold_in(row)
        digest = report.fingerprint
        # It depends on the frames before it, too: on their defects.
        if row.samples_digest not in (None, digest) and not self.lost:
            self.warnings.append(
                f"{row.name} decodes to other samples than when it was first folded; a decoder was changed in between"
            )
        self._write_down(row, frame, kept.id, report, digest)
        self._since_checkpoint += 1
        self._bytes_since += row.size
        return Outcome(
            found.path,
            Fate.FOLDED,
            None,
            kept.id,
            frame.kind,
            report,
            replayed=shot.replayed,
            told=row.verdict != "received",
            seq=row.seq,
            info=frame.info,
            size=row.size,
            origin=found.origin,
        )

    def _fold(self, kept: Kept, frame: Frame, row: ShotRow) -> FoldReport:
        self._wait_for_kernels()
        looked = self._look_taken(kept.sensor, frame) or kept.sensor.look(frame)
        self._look_ahead()
        return kept.sensor.fold(frame, row.seq, looked)

    def _look_ahead(self) -> None:
        """Have another thread look at the frame after this one, if it is here: following a frame leaves cores free.

        Not if it is rendered: decoding those keeps all cores busy, and the second buffer would be three times as large.
        """
        following = self._waiting[1] if len(self._waiting) > 1 else None
        if following is None or not following.frame.done() or following.frame.exception() is not None:
            return
        try:
            frame = self._placed(following.row, following.frame.result())
        except DecodeError:
            return
        kept = self._kept.get(archive.sensor_id(frame.sensor))
        if kept is not None and kept.sensor.identity == frame.sensor and frame.sensor.samples is SampleKind.RAW:
            look = self._looking.submit(kept.sensor.look, frame, beside=True)
            self._next_look = _Ahead(kept.sensor, frame.samples, look)

    def _look_taken(self, sensor: Sensor, frame: Frame) -> Look | None:
        """Return the look at a frame that was taken ahead, if that was done."""
        ahead, self._next_look = self._next_look, None
        # Waited for even if it is of another: it writes where the next look may.
        look = None if ahead is None else ahead.look.result()
        return look if ahead and ahead.sensor is sensor and ahead.samples is frame.samples else None

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
        if report.counted:
            self._ledger.thin_observations(id_, row.seq)
        if report.transitions:
            self._ledger.add_transitions(
                TransitionRow(id_, t.site, row.seq, t.change, _detail(t)) for t in report.transitions
            )

    def _placed(self, row: ShotRow, frame: Frame) -> Frame:
        """Return the frame as one of the sensor to whose statistic it belongs.

        Raises
        ------
        DecodeError
            If this machine cannot hold that statistic.
        """
        sensor = frame.sensor
        if row.camera_given and sensor.serial is None:
            sensor = replace(sensor, serial=row.camera_given)
        depth = frame.bits
        usual = self._depths.get(archive.sensor_id(sensor))
        if None not in (depth, usual) and depth != usual:
            # Samples of 12 and of 14 bit have different units: their sums must not be mixed.
            sensor = replace(sensor, bits=depth)
        needed = sensor.layout.size * (_BYTES_PER_SAMPLE_ON_DISK if self._on_disk else _BYTES_PER_SAMPLE)
        if needed > self._memory:
            cure = "" if self._on_disk else "; it could be kept on the disk (statistic: disk, or scan --on-disk)"
            raise DecodeError(
                f"the statistic of {sensor.layout.width} x {sensor.layout.height} pixels takes {needed / 1e6:.0f} MB"
                f" of memory; this machine has {self._memory / 1e6:.0f} MB for it{cure}"
            )
        return replace(frame, sensor=sensor)

    def _sensor_of(self, frame: Frame) -> Kept:
        id_ = archive.sensor_id(frame.sensor)
        if id_ not in self._kept:
            if self._depths.get(id_) is None:
                self._depths[id_] = frame.bits
            self._ledger.add_sensor(id_, {**archive.describe(frame.sensor), "depth": self._depths[id_]})
        return self._resident(id_, frame.sensor)

    def _resident(self, id_: str, identity: SensorIdentity) -> Kept:
        kept = self._kept.get(id_)
        if kept is None:
            self._make_room()
            sensor = Sensor(
                identity,
                self._settings,
                each_slab=self._folders.map,
                slabs=self._slabs,
                held_bytes=self._memory // _SHARE_OF_FRAMES,
                zeros=zeros_in(self._state.root) if self._on_disk else np.zeros,
            )
            kept = archive.load(self._state, id_, sensor)
            self.warnings.extend(kept.damage)
            self._kept[id_] = kept
            self._note_older(kept)
        self._kept.move_to_end(id_)
        return kept

    def _make_room(self) -> None:
        """Save and forget the sensors used least recently, while they hold too much memory."""
        while self._kept and sum(k.sensor.accumulator.nbytes for k in self._kept.values()) > _RESIDENT_BYTES:
            self._conclude_saving()
            self._save(next(iter(self._kept.values())))
            self._kept.popitem(last=False)

    def _save(self, kept: Kept) -> int:
        written = archive.save(self._state, kept)
        self._note_older(kept)
        return written


def _write(generations: list[archive.Saving], wake: Callable[[], None]) -> None:
    try:
        for generation in generations:
            generation.write(wake)
    finally:
        for generation in generations:
            generation.release()


def _woken(wake: Callable[[], None], _: Future[Frame]) -> None:
    wake()


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
