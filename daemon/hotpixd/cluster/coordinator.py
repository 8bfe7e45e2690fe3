"""The scan of a cluster as one machine sees it: chunks out, findings back, frames followed in the order of the ledger.

Workers measure chunks ahead of time. Their findings come here in order, and each frame goes the way of any other
(`Monitor`), with an accumulator whose sums are elsewhere (`Followed`). Sums stay on the workers, merged there chunk by
chunk, and come here once per checkpoint. A shot's row is committed with the generation that has it in its sums: it is
acknowledged then, and not before, since its file stays where it is. So whatever dies, nothing is lost but time.
"""

from __future__ import annotations

import itertools
import secrets
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from hotpixd import __version__, archive
from hotpixd.archive import Kept
from hotpixd.cluster import worker
from hotpixd.cluster.connection import ClusterError
from hotpixd.cluster.inputs import Mark, url_of
from hotpixd.cluster.worker import Chunk, Found, Group, Seen, Wanted
from hotpixd.core.followed import Followed, Glimpse, Sums
from hotpixd.core.frame import Frame, SensorIdentity
from hotpixd.core.sensor import FoldReport
from hotpixd.intake.decode import DecodeError
from hotpixd.intake.decoders import Decoders, memory_bytes
from hotpixd.intake.files import FoundShot
from hotpixd.monitor import Fate, Monitor, Outcome, Waiting
from hotpixd.store.durable import failpoint
from hotpixd.store.ledger import Received, ShotRow
from hotpixd.store.state import State

_MOST_PER_CHUNK = 64
"""Shots: the sums of a chunk, 12 bytes per sample, are then a fifth of what its raw files have, or less."""

_PER_THREAD = 4
"""Chunks that every thread gets at least, where there are enough shots: so all end at about the same time."""

_AHEAD_PER_THREAD = 2
"""Chunks under way or measured, and not followed yet."""

_STRAGGLES_AFTER_S = 60.0
"""And after five times what chunks usually take: then it is given to another worker as well."""

_LOOKS_UP_EVERY_S = 0.2
"""How often what waits for the cluster looks whether it is there still."""

_NOBODY_FOR_S = 120.0
"""Time without any worker after which that is no restart any more."""

_ANSWERS_WITHIN_S = 20.0
"""A worker that does not is asked by a task, which goes elsewhere with what it needs if the worker is given up."""

_TRIES = 3
"""Times that a chunk is measured anew as it turned out to hold other shots than it seemed."""


@dataclass(slots=True)
class _Item:
    """One shot of a chunk, in order."""

    shot: FoundShot
    place: int | None
    """Among those that a worker reads; None: it is known already."""

    known: ShotRow | None = None


@dataclass(slots=True)
class _Chunk:
    """Shots on their way."""

    items: list[_Item]
    order: Chunk
    tries: list[Any] = field(default_factory=list)
    """Futures of `Measured`: of one try, or of two if the first straggles."""


@dataclass(slots=True)
class _Pieces:
    """Sums on one worker."""

    there: list[Any]
    """Futures of `Measured` or `Sums` that are there."""

    merging: Any = None
    """Future of the sums of the first `merged` of them."""

    merged: int = 0

    def take(self) -> None:
        """Replace what was merged by the result, if that is there."""
        if self.merging is not None and self.merging.status == "finished":
            self.there[: self.merged] = [self.merging]
            self.merging = None


@dataclass(slots=True)
class _Arrived:
    """A measured chunk."""

    measured: Any
    """Future of `Measured`."""

    found: tuple[Found, ...]
    groups: list[Group]
    about: Mapping[str, Any]


Verdict = Literal["known", "unreadable", "companion", "new"]


@dataclass(frozen=True, slots=True)
class _Decision:
    """What is to be done with a shot."""

    verdict: Verdict
    reason: str | None = None

    frame: Frame | None = None
    """Of a new one that is to be folded, without samples; `reason` says why it is refused otherwise."""


class ClusterMonitor(Monitor):
    """Does what `Monitor` does, with a cluster's workers to read, decode and add up.

    Parameters
    ----------
    state : open for writing
    client : of Dask's scheduler
    marks : by which files are known again without reading them
    chunk_shots : in a chunk at most. None: as many as suit the number of shots and workers
    """

    def __init__(
        self,
        state: State,
        client: Any,
        marks: Mapping[str, Mark],
        *,
        luma: bool = False,
        chunk_shots: int | None = None,
        checkpoint_every_s: float = 120.0,
        checkpoint_every_shots: int = 1024,
        straggles_after_s: float = _STRAGGLES_AFTER_S,
    ) -> None:
        archive.drop_unacknowledged(state)
        # Started when they are needed: only a replay decodes here.
        self._own_decoders = Decoders(0, luma=luma)
        super().__init__(
            state,
            decoders=self._own_decoders,
            checkpoint_every_s=checkpoint_every_s,
            checkpoint_every_shots=checkpoint_every_shots,
        )
        self._client = client
        self._marks = marks
        self._luma = luma
        self._chunk_shots = chunk_shots
        self._straggles_after_s = straggles_after_s
        self._run = secrets.token_hex(4)
        self._numbers = itertools.count(1)
        self._durations: list[float] = []
        self._parts: dict[tuple[str, Group], dict[str | None, _Pieces]] = {}
        """Sums of frames that were followed, by sensor and by the worker that has them."""
        self._followed_keys: dict[str, list[str]] = {}
        """Of the shots whose sums are in the parts, by sensor."""
        self._asking = ThreadPoolExecutor(4, "ask")
        self._unacknowledged = False
        self._resident_limit = max(1 << 30, memory_bytes() // 2)
        self._current: tuple[Found, Seen] | None = None
        self._looks: dict[str, tuple[int, Callable[[NDArray[np.int64]], Glimpse]]] = {}
        """Of sensors with frames in the chunk that is followed and has not begun with them: how many, and how to
        look at them."""
        self.bytes_in: dict[str, int] = {"events": 0, "sites": 0, "sums": 0}
        """What came here from the workers."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._unacknowledged:
            # Their generation was not written: they come again.
            self._ledger.abandon()
        super().__exit__(kind, error, trace)
        self._own_decoders.close()
        self._asking.shutdown(wait=False, cancel_futures=True)
        if self._client.status == "running":
            self._client.run(worker.forget, None, wait=False, on_error="ignore")

    def process(self, shots: Iterable[FoundShot], stop: Callable[[], bool] = lambda: False) -> Iterator[Outcome]:
        """Have shots measured, and fold them, yielding what became of each.

        Parameters
        ----------
        shots : in the order in which they are to be folded
        stop : once true, what was measured is left alone

        Raises
        ------
        ClusterError
            If the cluster is gone.
        """
        from distributed.client import FutureCancelledError, FuturesCancelledError

        listed = list(shots)
        chunks = self._chunks(listed)
        flying: deque[_Chunk] = deque()
        try:
            while not stop():
                while len(flying) < max(2, _AHEAD_PER_THREAD * self._threads()):
                    chunk = next(chunks, None)
                    if chunk is None:
                        break
                    if chunk.order.shots:
                        self._send(chunk)
                    flying.append(chunk)
                if not flying:
                    break
                arrived = self._arrival(flying[0], stop)
                if arrived is None:
                    break
                yield from self._followed(flying.popleft(), arrived)
        except (FutureCancelledError, FuturesCancelledError, TimeoutError) as error:
            raise self._gone(str(error)) from error

    def _gone(self, why: str) -> ClusterError:
        where = f" {self._client.scheduler.address}" if self._client.scheduler else ""
        return ClusterError(
            f"the scheduler{where} is gone ({why}). What was committed stays: run the same command again to go on."
        )

    def checkpoint(self) -> int:
        """Merge what the workers have, and write it down as `Monitor.checkpoint` does."""
        for id_ in dict.fromkeys(id_ for id_, _ in self._parts):
            self._settle(self.sensor(id_))
        self._parts.clear()
        written = super().checkpoint()
        self._unacknowledged = False
        while self._kept and sum(k.sensor.accumulator.nbytes for k in self._kept.values()) > self._resident_limit:
            self._kept.popitem(last=False)
        return written

    # --- chunks

    def _chunks(self, shots: list[FoundShot]) -> Iterator[_Chunk]:
        """Cut the shots into chunks: a raw file and its companions are never in two."""
        most = self._chunk_shots or max(
            1, min(_MOST_PER_CHUNK, -(-len(shots) // max(1, _PER_THREAD * self._threads())))
        )
        seen = self._ledger.seen_files() if any(mark.digest for mark in self._marks.values()) else {}
        together: list[FoundShot] = []
        for shot in shots:
            if shot.raw is None and len(together) >= most:
                yield self._chunk(together, seen)
                together = []
            together.append(shot)
        if together:
            yield self._chunk(together, seen)

    def _chunk(self, shots: list[FoundShot], seen: Mapping[bytes, bytes | None]) -> _Chunk:
        items: list[_Item] = []
        wanted: list[Wanted] = []
        places: dict[Path, _Item] = {}
        for shot in shots:
            url = url_of(shot)
            mark = self._marks.get(url, Mark(None, None))
            key = None if mark.digest is None else seen.get(mark.digest)
            row = None if key is None else self._ledger.find(key.hex())
            if row is not None and not row.is_lost:
                items.append(_Item(shot, None, row))
            else:
                raw = None if shot.raw is None else places.get(shot.raw)
                folded = raw is not None and raw.known is not None and raw.known.verdict == "folded"
                items.append(_Item(shot, len(wanted)))
                wanted.append(Wanted(url, mark.size, None if raw is None else raw.place, folded))
            places[shot.path] = items[-1]
        kind = shots[0].kind
        order = Chunk(next(self._numbers), tuple(wanted), None if kind is None else str(kind), self._luma)
        return _Chunk(items, order)

    def _send(self, chunk: _Chunk, *, but: list[str] | None = None) -> None:
        """Have a chunk measured; a second time by another worker than those that had it, if there is one."""
        key = f"hotpixd-{self._run}-{next(self._numbers)}"
        others = {}
        if but is not None:
            free = sorted(set(self._workers()) - set(but))
            others = {"workers": free, "allow_other_workers": False} if free else {}
        chunk.tries.append(self._client.submit(worker.measure, chunk.order, key=f"measure-{key}", **others))

    def _arrival(self, chunk: _Chunk, stop: Callable[[], bool]) -> _Arrived | None:
        """Wait for a chunk; None if that was stopped."""
        from distributed import KilledWorker

        if not chunk.order.shots:
            return _Arrived(None, (), [], {})
        last_worker_at = waited_from = time.monotonic()
        while True:
            measured = next((one for one in chunk.tries if one.done() and one.status != "cancelled"), None)
            if measured is not None:
                break
            if stop():
                return None
            self._pause(chunk.tries, "FIRST_COMPLETED")
            now = time.monotonic()
            if self._workers():
                last_worker_at = now
            elif now - last_worker_at > _NOBODY_FOR_S:
                raise ClusterError("the cluster has no workers any more. What was committed stays: run it again later.")
            usual = statistics.median(self._durations) if self._durations else 0.0
            if len(chunk.tries) == 1 and now - waited_from > max(self._straggles_after_s, 5 * usual):
                self._send(chunk, but=self._busy_with(chunk.tries[0]))
        try:
            result = self._findings(measured)
        except KilledWorker:
            self.warnings.append("workers died of a chunk of shots, so these were taken one by one")
            return self._measured_alone(chunk)
        except (worker.InputChangedError, ImportError, OSError) as error:
            raise ClusterError(f"a worker cannot go on: {error}") from error
        arrived = _Arrived(measured, *result)
        if arrived.about["version"] != __version__:
            raise ClusterError(
                f"a worker on {arrived.about['host']} has hotpixd {arrived.about['version']}, and here is {__version__}"
            )
        self._durations = [*self._durations[-49:], arrived.about["seconds"]]
        return arrived

    def _pause(self, futures: list[Any], until: str) -> bool:
        """Wait a little for futures; tell whether they are done.

        A future that was made while the connection was being lost is never done, so nothing waits in any other way.
        """
        from distributed import wait

        if self._client.status not in ("running", "connecting"):
            raise self._gone("the connection was lost")
        try:
            wait(futures, timeout=_LOOKS_UP_EVERY_S, return_when=until)
        except TimeoutError:
            return False
        return True

    def _findings(self, measured: Any) -> Any:
        if measured.status == "finished":
            for near in self._client.who_has([measured]).get(measured.key, ()):
                found = self._there(near, worker.findings_there, measured.key)
                if found is not None:
                    return found
        return self._result(self._submit(worker.findings, measured))

    def _there(self, near: str | None, function: Callable[..., Any], *arguments: Any) -> Any:
        """Call a function on a worker beside its tasks, at once; None if it is gone, or does not answer."""
        if near not in self._workers():
            return None
        try:
            asked = self._asking.submit(self._client.run, function, *arguments, workers=[near], on_error="return")
            answer = asked.result(_ANSWERS_WITHIN_S).get(near)
        except (OSError, KeyError, ValueError, TimeoutError):
            return None
        return None if isinstance(answer, BaseException) else answer

    def _measured_alone(self, chunk: _Chunk) -> _Arrived:
        """Measure the shots of a chunk that killed workers one by one; what kills again is refused."""
        from distributed import KilledWorker

        found: list[Found] = []
        pieces: dict[Group, list[Any]] = {}
        about: Mapping[str, Any] = {}
        for place, wanted in enumerate(chunk.order.shots):
            only = chunk.order.only
            raw = None if wanted.raw is None else found[wanted.raw]
            folded = wanted.raw_folded or (raw is not None and raw.seen is not None)
            alone = replace(
                chunk.order,
                number=next(self._numbers),
                shots=(replace(wanted, raw=None, raw_folded=folded),),
                only=None if only is None else frozenset((0,) if place in only else ()),
            )
            measured = self._client.submit(worker.measure, alone, key=f"alone-{self._run}-{alone.number}")
            try:
                (one,), groups, about = self._result(self._submit(worker.findings, measured))
            except KilledWorker:
                key, size = self._result(self._submit(worker.key_of, wanted))
                reason = "it killed every worker that it was given to, so it is left alone; a good picture that does so"
                reason += " is a fault, please report it"
                found.append(Found(key, size, refusal=reason))
                continue
            found.append(one)
            for group in groups:
                pieces.setdefault(group, []).append(measured)
        merged = {group: self._submit(worker.merge, group, *those) for group, those in pieces.items()}
        whole = self._submit(worker.put_together, tuple(found), list(merged), list(merged.values()), dict(about))
        return _Arrived(whole, tuple(found), list(merged), about)

    def _workers(self) -> list[str]:
        return list(self._client.scheduler_info(n_workers=-1)["workers"])

    def _threads(self) -> int:
        return int(sum(w["nthreads"] for w in self._client.scheduler_info(n_workers=-1)["workers"].values()))

    def _busy_with(self, measured: Any) -> list[str]:
        return [who for who, keys in self._client.processing().items() if measured.key in keys]

    # --- frames in order

    def _followed(self, chunk: _Chunk, arrived: _Arrived) -> Iterator[Outcome]:
        """Do with the shots of a chunk what is to be done, one after the other."""
        decisions = self._decided(chunk, arrived.found)
        for _ in range(_TRIES):
            fold = frozenset(
                item.place
                for item, decision in zip(chunk.items, decisions, strict=True)
                if decision.verdict == "new" and decision.reason is None and item.place is not None
            )
            if fold == {place for place, one in enumerate(arrived.found) if one.seen is not None}:
                break
            # Some are in the statistic already, or a companion's raw file is not: the sums have to be made again.
            chunk = _Chunk(chunk.items, replace(chunk.order, number=next(self._numbers), only=fold))
            self._send(chunk)
            again = self._arrival(chunk, lambda: False)
            assert again is not None
            arrived = replace(again, found=tuple(map(_carried, arrived.found, again.found)))
            decisions = self._decided(chunk, arrived.found)
        else:
            raise ClusterError("files change while they are read; scan again when they are complete")
        self._make_room_for(decisions)
        self._prepare_looks(chunk, arrived, decisions)
        for item, decision in zip(chunk.items, decisions, strict=True):
            found = None if item.place is None else arrived.found[item.place]
            yield self._done(item, found, decision)
        self._take_sums(arrived)
        if self._clock() - self._checkpointed_at > self.checkpoint_every_s or (
            self._since_checkpoint >= self.checkpoint_every_shots
        ):
            self.checkpoint()

    def _decided(self, chunk: _Chunk, found: tuple[Found, ...]) -> list[_Decision]:
        """Decide about the shots of a chunk in their order, as `Monitor` does, without doing anything yet."""
        decisions: list[_Decision] = []
        folded: dict[Path, bool] = {}
        keys: dict[str, bool] = {}
        failures: dict[Path, Found] = {}
        for item in chunk.items:
            shot = item.shot
            one = None if item.place is None else found[item.place]
            decision = self._decision(item, one, folded, keys, failures)
            decisions.append(decision)
            key = item.known.key if item.known is not None else one.key if one is not None else None
            if one is not None and one.failure is not None:
                failures[shot.path] = one
            if key is not None:
                row = item.known or self._ledger.find(key)
                if decision.verdict in ("new", "companion"):
                    keys[key] = decision.verdict == "new" and decision.reason is None
                folded[shot.path] = keys.get(key, row is not None and row.verdict == "folded")
        return decisions

    def _decision(
        self,
        item: _Item,
        one: Found | None,
        folded: Mapping[Path, bool],
        keys: Mapping[str, bool],
        failures: Mapping[Path, Found],
    ) -> _Decision:
        shot = item.shot
        if one is None:
            return _Decision("known")
        if one.key is None:
            return _Decision("unreadable", one.failure)
        row = self._ledger.find(one.key)
        if one.key in keys or (row is not None and not row.is_lost):
            return _Decision("known")
        if shot.raw is not None:
            raw = failures.get(shot.raw)
            if raw is not None and not raw.gone:
                return _Decision("unreadable", f"the raw file of {shot.path.name} comes first: {raw.failure}")
            if folded.get(shot.raw):
                return _Decision("companion")
        if one.seen is None:
            # Without a reason it was not decoded, and has to be.
            return _Decision("new", one.refusal)
        frame = one.seen.frame(np.empty((0, 0), one.seen.sensor.dtype))
        try:
            placed = self._placed(_NOT_A_ROW, frame)
        except DecodeError as error:
            return _Decision("new", str(error))
        # The first frame of a body says which depth is its usual one.
        self._depths.setdefault(archive.sensor_id(placed.sensor), frame.bits)
        return _Decision("new", None, placed)

    def _done(self, item: _Item, one: Found | None, decision: _Decision) -> Outcome:
        shot = item.shot
        if one is None or one.key is None:
            if decision.verdict == "unreadable":
                return Outcome(shot.path, Fate.UNREADABLE, decision.reason, origin=shot.origin)
            return self._known(shot, item.known)
        if decision.verdict == "unreadable":
            return Outcome(shot.path, Fate.UNREADABLE, decision.reason, origin=shot.origin)
        self._remember(shot, one.key)
        if decision.verdict == "known":
            return self._known(shot, self._ledger.find(one.key))
        row = self._ledger.find(one.key)
        if row is not None:
            self._ledger.forget(one.key)
            self.lost.pop(one.key, None)
        self._unacknowledged = True
        received = self._received_of(shot, one)
        if decision.verdict == "companion" and shot.raw is not None:
            self._ledger.take_in(replace(received, companion_of=shot.raw.name))
            return Outcome(shot.path, Fate.COMPANION, f"companion of {shot.raw.name}", origin=shot.origin)
        self._ledger.take_in(received)
        row = self._ledger.find(one.key)
        assert row is not None
        future: Future[Frame] = Future()
        if one.seen is None or decision.reason is not None:
            future.set_exception(DecodeError(decision.reason or ""))
            return self._conclude(Waiting(row, future, False, shot))
        self._current = one, one.seen
        future.set_result(one.seen.frame(np.empty((0, 0), one.seen.sensor.dtype)))
        try:
            return self._conclude(Waiting(row, future, False, shot))
        finally:
            self._current = None

    def _fold(self, kept: Kept, frame: Frame, row: ShotRow) -> FoldReport:
        if self._current is None:
            return super()._fold(kept, frame, row)
        found, seen = self._current
        followed = kept.sensor.accumulator
        assert isinstance(followed, Followed) and found.key is not None
        if kept.id in self._looks:
            frames, look = self._looks.pop(kept.id)
            followed.begin(frames, look, kept.sensor.followed_sites)
        followed.advance()
        events = followed.unpack(seen.planes(), seen.totals, seen.phases)
        self.bytes_in["events"] += len(seen.events)
        self._followed_keys.setdefault(kept.id, []).append(found.key)
        return kept.sensor.follow(replace(frame, samples=followed.samples), events, seen.noise, row.seq)

    def _received_of(self, shot: FoundShot, one: Found) -> Received:
        assert one.key is not None
        path = url_of(shot)
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        kind: Literal["light", "dark"] | None = None if shot.kind is None else shot.kind.value
        return Received(one.key, Path(path).name, path, one.size, now, kind, shot.camera)

    def _remember(self, shot: FoundShot, key: str) -> None:
        mark = self._marks.get(url_of(shot))
        if mark is not None and mark.digest is not None:
            self._ledger.add_seen(mark.digest, bytes.fromhex(key))

    # --- what is on the workers

    def _prepare_looks(self, chunk: _Chunk, arrived: _Arrived, decisions: list[_Decision]) -> None:
        """Say for each sensor of the chunk how its frames are looked at."""
        shots: dict[str, list[tuple[Wanted, str]]] = {}
        dtypes: dict[str, str] = {}
        for item, decision in zip(chunk.items, decisions, strict=True):
            if decision.frame is None or item.place is None:
                continue
            id_ = archive.sensor_id(decision.frame.sensor)
            shots.setdefault(id_, []).append((chunk.order.shots[item.place], arrived.found[item.place].key or ""))
            dtypes[id_] = decision.frame.sensor.dtype
        self._looks = {
            id_: (len(those), self._look(id_, tuple(those), chunk.order.kind, dtypes[id_], arrived))
            for id_, those in shots.items()
        }

    def _look(
        self, id_: str, shots: tuple[tuple[Wanted, str], ...], kind: str | None, dtype: str, arrived: _Arrived
    ) -> Callable[[NDArray[np.int64]], Glimpse]:
        near = arrived.about.get("worker")
        frames = [worker.name_of(key, luma=self._luma) for _, key in shots]

        def look(sites: NDArray[np.int64]) -> Glimpse:
            if not sites.size:
                none = np.zeros(0, np.uint64)
                return Glimpse(np.empty((len(shots), 0), dtype), none, none)
            values = self._there(near, worker.glimpse_there, frames, sites, dtype)
            if values is None:
                values = self._gathered(self._submit(worker.glimpse, shots, kind, sites, dtype, luma=self._luma))
            total, squares = np.zeros(len(sites), np.uint64), np.zeros(len(sites), np.uint64)
            for place, group, pieces in self._pieces_of(id_):
                pieces.take()
                names = [piece.key for piece in pieces.there]
                before = self._there(place, worker.at_sites_there, group, sites, names)
                if before is None:
                    before = self._gathered(self._submit(worker.at_sites, group, sites, *pieces.there))
                total += before[0]
                squares += before[1]
                self.bytes_in["sites"] += 16 * len(sites)
            self.bytes_in["sites"] += values.nbytes
            return Glimpse(values, total, squares)

        return look

    def _take_sums(self, arrived: _Arrived) -> None:
        """Merge the sums of a chunk that was followed with those that its worker has already."""
        for group in arrived.groups:
            id_ = archive.sensor_id(self._placed(_NOT_A_ROW, _frame_of(group, arrived.found)).sensor)
            places = self._parts.setdefault((id_, group), {})
            pieces = places.setdefault(arrived.about.get("worker"), _Pieces([]))
            pieces.take()
            pieces.there.append(arrived.measured)
            if pieces.merging is None and len(pieces.there) > 1:
                pieces.merging = self._submit(worker.merge, group, *pieces.there)
                pieces.merged = len(pieces.there)
        names = tuple(
            worker.name_of(one.key, luma=self._luma)
            for one in arrived.found
            if one.seen is not None and one.key is not None
        )
        near = arrived.about.get("worker")
        if names:
            self._there(near, worker.forget, names)

    def _pieces_of(self, id_: str) -> list[tuple[str | None, Group, _Pieces]]:
        return [
            (place, group, pieces)
            for (whose, group), places in self._parts.items()
            if whose == id_
            for place, pieces in places.items()
        ]

    def _settle(self, kept: Kept) -> None:
        parts = []
        for _, group, pieces in self._pieces_of(kept.id):
            pieces.take()
            # First what a worker has itself.
            parts.append((group, self._submit(worker.merge, group, *pieces.there)))
        sums: Sums = self._gathered(self._merged(parts))
        self.bytes_in["sums"] += sums.__sizeof__()
        followed = kept.sensor.accumulator
        assert isinstance(followed, Followed)
        if list(sums.keys) != sorted(self._followed_keys.pop(kept.id, [])):
            raise ClusterError("a file was changed while it was scanned, so its sums are of another one; scan again")
        followed.settle(sums)

    def _merged(self, parts: list[tuple[Group, Any]]) -> Any:
        """Return the future of the merged sums: in a tree, so that no worker gets all of them."""
        while len(parts) > 1:
            pairs = [parts[i : i + 2] for i in range(0, len(parts), 2)]
            parts = [
                (pair[0][0], self._submit(worker.merge, pair[0][0], *(part for _, part in pair))) for pair in pairs
            ]
        return parts[0][1]

    def _submit(self, function: Callable[..., Any], *arguments: Any, **where: Any) -> Any:
        return self._client.submit(
            function,
            *arguments,
            # What is followed waits for it, unlike the chunks.
            priority=10,
            retries=2,
            key=f"{function.__name__}-{self._run}-{next(self._numbers)}",
            **where,
        )

    def _result(self, future: Any) -> Any:
        while not self._pause([future], "ALL_COMPLETED"):
            pass
        return future.result()

    def _gathered(self, future: Any) -> Any:
        from distributed import KilledWorker

        try:
            return self._result(future)
        except (KilledWorker, worker.InputChangedError, OSError) as error:
            raise ClusterError(f"{error}. What was committed stays: run it again.") from error

    # --- sensors

    def _resident(self, id_: str, identity: SensorIdentity) -> Kept:
        kept = super()._resident(id_, identity)
        if not isinstance(kept.sensor.accumulator, Followed):
            kept.sensor.accumulator = Followed.of(kept.sensor.accumulator)
        return kept

    def _make_room(self) -> None:
        """Do nothing: amid a chunk no sensor can be saved."""

    def _make_room_for(self, decisions: list[_Decision]) -> None:
        """Write down and forget sensors before a chunk that brings others, if they would not all fit."""
        coming = {
            archive.sensor_id(d.frame.sensor): d.frame.sensor.layout.size for d in decisions if d.frame is not None
        }
        more = sum(20 * size for id_, size in coming.items() if id_ not in self._kept)
        held = sum(kept.sensor.accumulator.nbytes for kept in self._kept.values())
        if more and held + more > self._resident_limit:
            self.checkpoint()
            for id_ in list(self._kept):
                if id_ not in coming:
                    del self._kept[id_]

    def _save(self, kept: Kept) -> int:
        written = archive.save(self._state, kept, ledger_first=not self._unacknowledged)
        self._note_older(kept)
        failpoint("ahead_of_ledger")
        return written


_NOT_A_ROW = ShotRow(0, "", "", "", 0, "", None, None, "received", *(None,) * 11, 0)
"""Of a shot whose camera has no given name."""


def _carried(before: Found, now: Found) -> Found:
    """Return what is known of a shot that was not decoded again because it was refused."""
    was_refused = before.key == now.key and before.refusal is not None and now.seen is None
    return replace(now, refusal=before.refusal) if was_refused else now


def _frame_of(group: Group, found: tuple[Found, ...]) -> Frame:
    """Return a frame of a group, without samples."""
    none = np.empty((0, 0), group[0].dtype)
    frames = (one.seen.frame(none) for one in found if one.seen is not None)
    return next(frame for frame in frames if (frame.sensor, frame.bits) == group)
