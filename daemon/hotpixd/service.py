"""The daemon: shots in from all sources; what became of them out to feed, alerts, metrics, log and service manager.

One thread does everything that touches the state, one shot or one tick at a
time. Sources, feed, alerts and metrics have threads of their own, and hand over
through queues; whoever has something for the loop wakes it.
"""

from __future__ import annotations

import errno
import gc
import logging
import math
import os
import queue
import re
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, fields, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

from hotpixd import __version__
from hotpixd.alerts import Alerts, Watchman
from hotpixd.backup import QUESTIONS as BACKUP_QUESTIONS
from hotpixd.backup import Backups
from hotpixd.compiling import Kernels
from hotpixd.config import Config, ConfigError, needs_restart
from hotpixd.declaring import QUESTIONS as DECLARING_QUESTIONS
from hotpixd.declaring import Declaring
from hotpixd.feed import default_socket
from hotpixd.feed_server import FeedServer, Question
from hotpixd.intake.camera import CameraError, CameraSettings, CameraSource
from hotpixd.intake.darks import DarkSeries, SeriesOrder, left_open
from hotpixd.intake.decode import keep_large_buffers
from hotpixd.intake.directory import DirectorySettings, DirectorySource
from hotpixd.intake.files import FoundShot
from hotpixd.intake.source import HANGS_AFTER_S, Seen, SourceState
from hotpixd.live import Live
from hotpixd.metrics import Metrics
from hotpixd.monitor import Fate, Monitor, Outcome
from hotpixd.store.durable import FULL
from hotpixd.store.ledger import Ledger
from hotpixd.store.lock import default_state_dir
from hotpixd.store.state import State, StateDamaged, StateError, StateFull
from hotpixd.systemd import Notifier
from hotpixd.verifying import Verifier
from hotpixd.views import answers
from hotpixd.views.text import identity_words, printable, sensor_name
from hotpixd.words import many, utc

log = logging.getLogger("hotpixd")

_TICK_S = 1.0
"""Between two looks at what sends no word: sources' states, the disk, the clock."""

_TAKEN_AT_A_TIME = 8
"""Shots of one source on their way through the loop."""

_DISK_EVERY_S = 10.0

_COMMIT_AFTER_S = 0.5
"""Quiet time after which derived rows are committed. Earlier, the next shot's own commit would take them along."""

_ANSWERING_S = 0.1
"""How long questions are answered before the next shot is looked for."""

_ANSWERING_SHARE, _ANSWERING_SHARE_IDLE = 0.2, 0.5
"""Of the loop's time, for answers, while there are shots to fold, and while there are none."""

_SHOTS_RECALLED = 64
"""Shots of the last run from which it is seen whether a shoot was going on."""

_DISK_FAILS = frozenset((errno.EIO, errno.EROFS, errno.EUCLEAN, errno.ENODEV, errno.ENXIO))
"""What the system says where the state's disk is broken, gone or read-only. Sources' errors do not come so far."""

_FULL_RETRY_S = (5.0, 60.0)
"""First and longest pause before a full disk is tried again."""

_SET_WITHIN_S = 60.0
"""How long a camera may take for a setting that somebody asked for."""

_SERIES_ENDS_S = 45.0
"""How long the exposure that a dark series is at may take when the daemon is stopped."""

_PATIENCE_S = 180.0
"""Longest single step of the loop (compiling, a checkpoint on a slow card) that does not count as a hang."""


_COMPILING = "the first start compiles the kernels, which takes up to half a minute"

_ORDER_KEYS = frozenset(field.name for field in fields(SeriesOrder))

_T = TypeVar("_T")

_Settings = DirectorySettings | CameraSettings
_Source = DirectorySource | CameraSource


class Wake:
    """Wakes the loop. Callable from any thread and from signal handlers, unlike an Event's set."""

    def __init__(self) -> None:
        self._tokens: queue.SimpleQueue[None] = queue.SimpleQueue()

    def __call__(self) -> None:
        self._tokens.put(None)

    def wait(self, timeout_s: float) -> None:
        """Sleep until woken, at most so long."""
        try:
            self._tokens.get(timeout=timeout_s)
            while True:
                self._tokens.get_nowait()
        except queue.Empty:
            return


class Orders:
    """What signals ask for: SIGTERM and SIGINT to stop, SIGHUP to read the configuration again."""

    def __init__(self, wake: Wake) -> None:
        self._wake = wake
        self.stop = False
        self.reload = False
        self.leave: Callable[[], None] | None = None
        """The process may end at once with this, since it holds nothing yet."""

    @contextmanager
    def obeyed(self, *, reloadable: bool) -> Iterator[None]:
        """Take signals while this lasts. What cannot reload stops at SIGHUP: its terminal has gone."""
        hang_up = self._reload if reloadable else self._stop
        actions = {signal.SIGTERM: self._stop, signal.SIGINT: self._stop, signal.SIGHUP: hang_up}
        before = {number: signal.signal(number, action) for number, action in actions.items()}
        try:
            yield
        finally:
            for number, action in before.items():
                signal.signal(number, action)

    def _stop(self, number: int, _frame: FrameType | None) -> None:
        if self.stop:
            # Safe at any moment: what was received is in the spool and the ledger.
            os._exit(128 + number)
        if self.leave is not None:
            self.leave()
            os._exit(0)
        self.stop = True
        self._wake()

    def _reload(self, _number: int, _frame: FrameType | None) -> None:
        self.reload = True
        self._wake()


def serve(config: Config, load: Callable[[], Config], *, reloadable: bool) -> int:
    """Run the daemon until it is told to stop; return its exit code.

    Parameters
    ----------
    config : to start with
    load : reads the configuration again. A wrong one is reported and the old one kept
    reloadable : whether SIGHUP does that

    Raises
    ------
    StateError
        If the state is locked or damaged.
    FeedError, MetricsError
        If a socket cannot be had.
    """
    # Before any thread is started: a thread that has an arena of its own would not keep frames.
    keep_large_buffers()
    wake = Wake()
    orders = Orders(wake)
    with orders.obeyed(reloadable=reloadable):
        service = _Service(config, load, wake, orders)
        # What was imported stays; the collector went through all of it with every frame, 2 ms of processor time.
        gc.freeze()
        try:
            code = service.run()
            if service.kernels.in_the_making:
                # A compiler does not stop when it is told to; all else is closed by now.
                logging.shutdown()
                os._exit(code)
            return code
        except OSError as error:
            if error.errno not in _DISK_FAILS:
                raise
            # On purpose: what the kernel could not write it will not write if it is asked again.
            raise StateError(
                f"The disk of the state {service.root} fails: {error.strerror}. Every shot that was acknowledged is on"
                " it; the others stay where they are. The next start goes on from there."
            ) from error


class _Service:
    def __init__(self, config: Config, load: Callable[[], Config], wake: Wake, orders: Orders) -> None:
        self._load = load
        self._config = self._started_with = config
        self._wake = wake
        self._orders = orders
        self._notifier = Notifier()
        self._metrics = Metrics()
        self.kernels = Kernels()
        self._sources: dict[_Settings, _Source] = {}
        self._taken: dict[Path, tuple[_Source, float]] = {}
        self._unreadable: set[Path] = set()
        self._statuses: dict[str, tuple[str, str]] = {}
        self._started_at = answers.now()
        self.root = config.state or default_state_dir()
        """Of the state."""
        self._feed: FeedServer | None = None
        self._live: Live | None = None
        self._degraded: str | None = None
        self._stand_in: Alerts | None = None
        """Sends alerts while the ledger cannot be written."""
        self._memory: Ledger | None = None
        """What it keeps them in."""
        self._uncovered_at: float | None = None
        self._clock_offset_s: float | None = None
        self._reload_failed = False
        self._watching = False
        self._answer_at = 0.0
        """When questions may be answered again."""
        self._stuck: set[str] = set()
        """Sources of which a file has been read for long without getting on."""
        self._quiet_since: float | None = None
        self._ticked_at = 0.0
        self._disk_at = -_DISK_EVERY_S
        self._disk_free = 0
        self._activity = "starting"
        self._series: DarkSeries | None = None
        self._sources_changed = False
        self._backed_up: Question | None = None
        """The last one that a backup was begun for."""
        self._early: list[Question] = []
        """Asked before there were any sources."""
        self._to_verify: list[Question] = []
        """Asked whether the state can be believed, while that was being found out for others."""

    def run(self) -> int:
        config = self._config
        with ExitStack() as stack:
            state = self._opened(stack)
            if state is None:
                return 0
            # Loading the kernels keeps one core busy, and loading the statistic the other.
            self.kernels.start()
            self.kernels.ready.add_done_callback(lambda _: self._wake())
            self._state = state
            self._ledger: Ledger = state.ledger
            state.announce(self._listen(stack).path)
            self._alerts = Alerts(self._ledger, config.alerts.settings(), wake=self._wake)
            stack.callback(self._alerts.close)
            if self._stand_in is None:
                self._watchman = Watchman(self._alerts)
            self._declaring = Declaring(state)
            self._backups = Backups(state, live=True)
            # One thread: of one backup after the other.
            self._packing = ThreadPoolExecutor(1, "backup")
            stack.callback(self._backups.close)
            stack.callback(self._packing.shutdown, wait=True, cancel_futures=True)
            self._verifier = Verifier(state, self._wake)
            stack.callback(self._end_verifying)
            self._monitor = stack.enter_context(self._make_monitor(state))
            live = self._despite_full_disk(lambda: Live(state, self._monitor, self._listen(stack).publish))
            if live is None:
                return 0
            self._live = live
            self._activity = f"starting; {_COMPILING}"
            self._despite_full_disk(self._tick)
            log.info("%s", self._activity)
            self._replay()
            # Not before: a shot that a replay finds lost is wanted again.
            self._seen = self._ledger.seen_files()
            live.recount()
            if not self._orders.stop:
                stack.callback(self._stop_sources)
                self._recall_shoots()
                self._despite_full_disk(self._start_sources)
                self._watching = True
                while self._early:
                    self._answer(self._early.pop(0))
                # However short ago it was: there were no sources yet.
                self._ticked_at = 0.0
                self._despite_full_disk(self._tick)
                self._notifier.ready(self._activity)
                log.info("hotpixd %s: %s; state in %s", __version__, self._activity, state.root)
                self._watch()
            return self._finish()

    def _opened(self, stack: ExitStack) -> State | None:
        """Open the state, waiting for room if its disk is full; None if the daemon is told to stop meanwhile."""

        def opened() -> State:
            return stack.enter_context(State(self.root, brief=True))

        def listening() -> None:
            # Whoever looks is told why there is nothing to see yet.
            if self._stand_in is None:
                self._watchman = Watchman(self._stood_in())
                self._listen(stack)

        return self._despite_full_disk(opened, listening)

    # --- the loop

    def _despite_full_disk(self, step: Callable[[], _T], prepare: Callable[[], None] = lambda: None) -> _T | None:
        """Do something as often as it takes until the disk has room for it; None if the daemon is told to stop."""
        pause = _FULL_RETRY_S[0]
        while True:
            try:
                return step()
            except (StateFull, OSError) as error:
                if isinstance(error, OSError) and error.errno not in FULL:
                    raise
                prepare()
                self._wait_for_room(str(error), pause)
                pause = min(2 * pause, _FULL_RETRY_S[1])
                if self._orders.stop:
                    return None

    def _replay(self) -> None:
        count = 0

        def replay() -> None:
            nonlocal count
            for outcome in self._monitor.replay(self._stop_asked):
                count += 1
                self._notifier.extend(_PATIENCE_S)
                self._activity = f"taking up {many(count, 'shot')} from where the last run was interrupted"
                self._after(outcome)
                self._tick()

        self._despite_full_disk(replay)
        if count:
            log.info("took up %s from where the last run was interrupted", many(count, "shot"))

    def _watch(self) -> None:
        pause = _FULL_RETRY_S[0]
        while not self._orders.stop:
            try:
                for outcome in self._monitor.follow(self._shots(), self._stop_asked, self._wake):
                    if outcome is None:
                        self._rest()
                    else:
                        self._after(outcome)
                        if outcome.fate not in (Fate.KNOWN, Fate.UNREADABLE):
                            # It was acknowledged.
                            self._recover(surely=True)
                            pause = _FULL_RETRY_S[0]
                    self._tick()
            except StateFull as error:
                self._wait_for_room(str(error), pause)
                pause = min(2 * pause, _FULL_RETRY_S[1])
                with suppress(StateFull):
                    # What was received may be what fills the disk: covered by a generation, it can go.
                    for outcome in self._monitor.process(()):
                        self._after(outcome)
                    self._monitor.checkpoint()

    def _shots(self) -> Iterator[FoundShot | None]:
        while True:
            nothing = True
            # One of each in turn: a full card must not keep a camera waiting.
            for source in list(self._sources.values()):
                if sum(taken is source for taken, _ in self._taken.values()) >= _TAKEN_AT_A_TIME:
                    continue
                shot = source.take()
                if shot is not None:
                    nothing = False
                    self._taken[shot.path] = (source, time.monotonic())
                    yield shot
            if nothing:
                yield None

    def _stop_asked(self) -> bool:
        return self._orders.stop

    def _rest(self) -> None:
        """Do what waits for a quiet moment, then sleep until there is something to do."""
        now = time.monotonic()
        if self._quiet_since is None:
            self._quiet_since = now
        quiet = now - self._quiet_since
        if (self._ledger.waits and quiet >= _COMMIT_AFTER_S) or self._degraded is not None:
            self._ledger.commit()
            self._recover(surely=False)
        if self._monitor.is_worth_a_checkpoint and quiet >= self._config.checkpoint.idle_s:
            self._monitor.begin_checkpoint()
        pause = _COMMIT_AFTER_S if self._ledger.waits else _TICK_S
        if self._listening.asked:
            pause = min(pause, max(self._answer_at - time.monotonic(), 0.0))
        self._wake.wait(pause)

    def _after(self, outcome: Outcome) -> None:
        """Tell everyone what became of a shot."""
        assert self._live is not None
        self._quiet_since = None
        source, since = self._taken.pop(outcome.path, (None, None))
        if outcome.fate is Fate.UNREADABLE and source is not None:
            source.retry(outcome.path)
            # One that was renamed comes under its new name; of a card that was pulled out its directory tells.
            if outcome.gone or outcome.path in self._unreadable:
                return
            self._unreadable.add(outcome.path)
        elif source is not None:
            self._unreadable.discard(outcome.path)
            self._remember(source.done(outcome.path))
        # First of all, so that they are in the same commit as the transitions that they tell of.
        self._tell_folded(outcome)
        if self._series is not None and outcome.origin is not None:
            refused = outcome.reason if outcome.fate is Fate.REFUSED else None
            self._series.folded(outcome.origin, outcome.kind, changed=self._may_change(outcome), refused=refused)
        self._live.include(outcome)
        if not outcome.told and not outcome.again:
            if source is not None and outcome.fate in (Fate.FOLDED, Fate.REFUSED):
                self._tell_shot(source, outcome)
            self._watchman.outcome(outcome.shown, str(outcome.fate), outcome.reason)
            latency = None if since is None or outcome.report is None else time.monotonic() - since
            self._metrics.shot(str(outcome.fate), latency, outcome.size)
        self._log(outcome)

    def _tell_shot(self, source: _Source, outcome: Outcome) -> None:
        """Tell the watchman of a new shot, unless a series is being shot, which says itself how it gets on."""
        if self._series is not None and not self._series.ended:
            self._watchman.shoot_ends()
            return
        states = source.states()
        # A camera's shots begin with its name.
        named = [state for state in states if outcome.origin is not None and outcome.origin.startswith(state.name)]
        for state in named or states[:1]:
            self._watchman.shot(state.name, state.waiting)

    def _recall_shoots(self) -> None:
        """Tell the watchman which shots came last: a shoot may have been going on when the last run ended."""
        now = datetime.now(UTC)
        by_source: dict[str, list[tuple[float, float | None]]] = {}
        named = [str(source.directory) for source in self._config.sources]
        for path, received_at, taken_at in self._ledger.last_times(_SHOTS_RECALLED):
            within = [name for name in named if path.startswith(f"{name}/")]
            # "Canon EOS R6 0123/store_00010001/DCIM/..." is of a camera.
            name = max(within, key=len) if within else None if path.startswith("/") else path.partition("/")[0]
            if name:
                age_s = max((now - datetime.fromisoformat(received_at)).total_seconds(), 0.0)
                taken = None if taken_at is None else datetime.fromisoformat(taken_at).timestamp()
                by_source.setdefault(name, []).append((age_s, taken))
        for name, shots in by_source.items():
            self._watchman.recall(name, shots)

    def _may_change(self, outcome: Outcome) -> bool:
        """Tell whether a shot has changed the map of defects, or there are too few yet for anything to be on it."""
        id_, report = outcome.sensor_id, outcome.report
        if id_ is None or report is None:
            return False
        sensor = self._monitor.sensor(id_).sensor
        young = sensor.accumulator.counted < sensor.settings.min_frames
        return young or any(t.change in ("stable", "recovered") for t in report.transitions)

    def _log(self, outcome: Outcome) -> None:
        assert self._live is not None
        name, reason = printable(outcome.shown.name), printable(outcome.reason or "")
        if outcome.fate is Fate.FOLDED and outcome.sensor_id is not None:
            sensor = self._live.sensors[outcome.sensor_id]
            text = "folded %s of %s: %s, %s, %d stable"
            counts = many(sensor["frames"], "frame"), many(sensor["candidate"], "candidate"), sensor["stable"]
            not_counted = "" if sensor["not_counting"] is None else f"; not counted: {sensor['not_counting']}"
            log.info(text + "%s", name, sensor_name(sensor), *counts, not_counted)
        elif outcome.fate is Fate.UNREADABLE:
            log.warning("%s It is tried again.", reason)
        elif outcome.fate is Fate.REFUSED and not outcome.again:
            log.info("refused %s: %s", name, reason)
        else:
            log.info("%s: %s", name, reason or "known already")

    def _remember(self, seen: Seen | None) -> None:
        if seen is None:
            return
        if seen.gone:
            self._seen.pop(seen.file, None)
            self._ledger.forget_seen(seen.file)
        elif seen.file not in self._seen:
            self._seen[seen.file] = seen.shot
            self._ledger.add_seen(seen.file, seen.shot)

    def _tell_folded(self, outcome: Outcome) -> None:
        id_, report, seq = outcome.sensor_id, outcome.report, outcome.seq
        if id_ is None or report is None or seq is None:
            return
        kept = self._monitor.sensor(id_)
        described = sensor_name(identity_words(id_, kept.sensor.identity))
        self._alerts.folded(id_, described, kept.sensor.layout, report, seq)
        if not outcome.told:
            self._watchman.counted(id_, described, report.counted, report.not_counted_because)
            if outcome.info is not None and outcome.info.taken_at is not None:
                self._watchman.clock(id_, described, outcome.info.taken_at, datetime.now(UTC))

    def _tick(self) -> None:
        """Keep everyone informed. Called after every shot, and about once per second without one."""
        self._notifier.beat()
        assert self._feed is not None
        assert self._live is not None
        for source in self._sources.values():
            for seen in source.notes():
                self._remember(seen)
        if self._orders.reload and self._watching:
            self._orders.reload = False
            self._reload()
        if self.kernels.ready.done():
            # Before any shot can be blamed for what went wrong.
            self.kernels.ready.result()
        self._answer_those_asked()
        while self._monitor.warnings:
            self._watchman.damage(self._monitor.warnings.pop(0))
        self._alerts.work()
        if self._stand_in is not None:
            self._stand_in.work()
        self._live.refresh(watched=self._feed.watchers > 0)
        now = time.monotonic()
        if now - self._ticked_at < _TICK_S / 4:
            return
        self._ticked_at = now
        self._look_around(now)

    def _look_around(self, now: float) -> None:
        assert self._feed is not None
        assert self._live is not None
        states = self._states(now)
        for concern in (state for source in self._sources.values() for state in source.concerns()):
            self._watchman.source(concern.name, concern.status, concern.detail)
        for state in states:
            self._watchman.listen(state.name, there=state.status == "watching")
        self._look_at_clocks(now)
        before, self._statuses = self._statuses, {state.name: (state.condition, state.status) for state in states}
        for state in states:
            if before.get(state.name) != (state.condition, state.status):
                level = logging.WARNING if state.status == "trouble" else logging.INFO
                condition = state.condition or state.status
                log.log(level, "%s %s: %s", printable(state.name), condition, printable(state.detail))
        if now - self._disk_at >= _DISK_EVERY_S:
            self._disk_at = now
            self._disk_free = shutil.disk_usage(self._state.root).free
            self._watchman.disk(self._disk_free)
            if self._degraded is None:
                self._recover(surely=False)
            self._packing.submit(self._backups.end_if_idle)
        queued = self._note_activity(states)
        series = None if self._series is None else self._series.state()
        shooting = self._series is not None and not self._series.ended
        if self._sources_changed and not shooting:
            self._start_sources()
        self._feed.publish({"series": series})
        described = [_described(state) for state in states]
        self._live.daemon(self._facts(), described, queued)
        if not shooting and self._series is not None:
            self._watchman.shoot_ends()
        self._feed.publish({"alerts": self._recent_alerts()})
        darks = f"darks: {series['detail']}; " if shooting and series is not None else ""
        self._notifier.status(darks + self._activity)
        self._metrics.update(
            queue=queued,
            sources=described,
            sensors=self._live.sensors,
            alerts_waiting=self._alerts.waiting,
            disk_free_bytes=self._disk_free,
        )

    def _states(self, now: float) -> list[SourceState]:
        return [self._moving(state, now) for source in self._sources.values() for state in source.states()]

    def _note_activity(self, states: list[SourceState]) -> int:
        """Say anew what the daemon does; return how many shots wait."""
        assert self._live is not None
        queued = sum(state.waiting for state in states) or self._monitor.in_flight
        if self._watching:
            self._activity = self._degraded or _activity(states, queued, self._live)
            if self.kernels.are_late:
                self._activity += f"; {_COMPILING}, and shots wait for it"
            if self._reload_failed:
                self._activity += "; the changed configuration is wrong, the old one stays in use"
        return queued

    def _facts(self) -> dict[str, Any]:
        return {
            "version": __version__,
            "pid": os.getpid(),
            "state": str(self.root),
            "started_at": self._started_at,
            "activity": self._activity,
            "degraded": self._degraded,
        }

    def _moving(self, state: SourceState, now: float) -> SourceState:
        """Return how a source is, with what hangs while one of its files is read."""
        reading = self._monitor.readings().get(state.name)
        silent_s = 0.0 if reading is None else now - reading.moved_at
        if reading is None or silent_s < HANGS_AFTER_S:
            if state.name in self._stuck:
                self._stuck.discard(state.name)
                self._watchman.stuck(state.name, "", None)
            return state
        self._stuck.add(state.name)
        self._watchman.stuck(state.name, f"hangs while {reading.path.name} is read", silent_s)
        detail = f"it does not answer: {reading.path.name} has been read for {silent_s:.0f} s; {state.detail}"
        return replace(state, status="trouble", detail=detail)

    def _look_at_clocks(self, now: float) -> None:
        """Notice jumps of the wall clock, and how long there has been no checkpoint."""
        # Not the monotonic clock, which stands still while a laptop sleeps.
        booted_s = time.clock_gettime(time.CLOCK_BOOTTIME)
        offset_s, before_s = time.time() - booted_s, self._clock_offset_s
        self._clock_offset_s = offset_s
        if before_s is not None:
            self._watchman.clock_step(offset_s - before_s, booted_s)
        if not self._monitor.is_worth_a_checkpoint and not self._monitor.in_flight:
            self._uncovered_at = None
        elif self._uncovered_at is None:
            self._uncovered_at = now
        since = self._uncovered_at
        uncovered_s = 0.0 if since is None else now - max(since, self._monitor.checkpointed_at)
        self._watchman.checkpoint(max(uncovered_s, 0.0), self._config.checkpoint.every_s)

    def _recent_alerts(self) -> list[dict[str, Any]]:
        try:
            known = self._alerts.recent()
        except StateFull:
            known = []
        return known if self._stand_in is None else [*known, *self._stand_in.recent()]

    def _wait_for_room(self, why: str, pause: float) -> None:
        """Stay up while the disk is full: nothing is acknowledged meanwhile, and nothing is lost."""
        log.error("%s Shots stay where they are until there is room.", printable(why))
        self._degraded = why
        self._watchman.report_to(self._stood_in())
        self._watchman.full(why)
        for source in self._sources.values():
            source.forget_taken()
        self._taken.clear()
        if not self._watching:
            self._activity = why
            # It is up, and says what it waits for: whoever started it need not wait as well.
            self._notifier.ready(why)
        until = time.monotonic() + pause
        while not self._orders.stop and time.monotonic() < until:
            self._notifier.beat()
            self._stood_in().work()
            if self._live is None:
                self._tell_waiting(why)
            else:
                self._answer_those_asked()
                with suppress(StateFull):  # whatever would be written down of what it sees
                    self._look_around(time.monotonic())
            self._wake.wait(_TICK_S)

    def _tell_waiting(self, why: str) -> None:
        """Say that the state cannot be opened yet."""
        self._notifier.status(why)
        feed = self._listening
        for question in feed.questions():
            question.refuse(f"The state cannot be opened yet. {why}")
        daemon = {**self._facts(), "queue": 0, "rate": 0.0, "shots": {}}
        shown: dict[str, Any] = {"daemon": daemon, "sources": [], "sensors": [], "series": None}
        feed.publish({**shown, "alerts": self._stood_in().recent()})

    def _stood_in(self) -> Alerts:
        """Return what sends alerts while the ledger cannot be written."""
        if self._stand_in is None:
            self._memory = Ledger(None)
            settings = self._config.alerts.settings()
            self._stand_in = Alerts(self._memory, settings, wake=self._wake, stands_in=True)
        return self._stand_in

    def _recover(self, *, surely: bool) -> None:
        """Go back to normal: the disk has taken something, or (surely) a shot."""
        self._degraded = None
        if self._stand_in is None or not self._watchman.has_room(surely=surely):
            return
        self._stand_in.close()
        self._alerts.take_over(self._stand_in)
        self._watchman.report_to(self._alerts)
        if self._memory is not None:
            self._memory.close()
        self._stand_in = self._memory = None
        log.info("the disk has room again")

    def _finish(self) -> int:
        self._notifier.stopping("writing a checkpoint")
        # No question is answered any more: who comes now, or was not answered, has the state when it is closed.
        self._state.announce(None)
        self._stop_sources()
        try:
            self._monitor.checkpoint()
        except StateFull as error:
            log.error("%s The shots since the last checkpoint are taken up from the spool at the next start.", error)
            return 3
        log.info("stopped; everything is on the disk")
        return 0

    # --- parts

    def _listen(self, stack: ExitStack) -> FeedServer:
        """Return the feed, and serve it and the metrics from now on."""
        if self._feed is None:
            config = self._config.feed
            path = config.socket or default_socket(self.root, os.environ)
            feed = FeedServer(path, {"version": __version__, "state": str(self.root)}, self._wake, group=config.group)
            feed.start()
            stack.callback(feed.stop)
            self._feed = feed
            if self._config.metrics.listen:
                self._metrics.serve(self._config.metrics.listen)
                stack.callback(self._metrics.close)
        return self._feed

    @property
    def _listening(self) -> FeedServer:
        assert self._feed is not None
        return self._feed

    def _make_monitor(self, state: State) -> Monitor:
        config = self._config
        return _Watched(
            self,
            state,
            config.detection.settings(),
            cores=config.cores or min(os.cpu_count() or 1, 4),
            on_disk=config.statistic == "disk",
            luma=config.jpeg == "luma",
            kernels=self.kernels.ready,
            checkpoint_every_s=config.checkpoint.every_s,
            checkpoint_every_shots=config.checkpoint.every_shots,
        )

    def _start_sources(self) -> None:
        wanted: list[_Settings] = [source.settings() for source in self._config.sources]
        wanted += [camera.settings() for camera in self._config.cameras]
        self._sources_changed = False
        for settings in [known for known in self._sources if known not in wanted]:
            if self._series is not None and not self._series.ended and self._series.is_of(self._sources[settings]):
                log.warning("%s is changed when its darks are taken", printable(self._sources[settings].name))
                self._sources_changed = True
                continue
            source = self._sources.pop(settings)
            with self._patience("letting go of a source"):
                source.stop()
            log.info("no longer watching %s", printable(source.name))
        for settings in wanted:
            if settings not in self._sources and not self._sources_changed:
                try:
                    source = self._source(settings)
                except StateFull:
                    # Of the folder for what a camera brings: tried again at the next look around.
                    self._sources_changed = self._watching
                    raise
                self._sources[settings] = source
                source.start()

    def _source(self, settings: _Settings) -> _Source:
        if isinstance(settings, DirectorySettings):
            return DirectorySource(settings, self._seen, self._wake)
        # One for each port: what is left there by a crash is for the camera that comes to it.
        folder = self._state.root / "incoming" / re.sub(r"[^A-Za-z0-9.]+", "-", settings.port)
        return CameraSource(settings, folder, self._seen, self._wake, release=left_open(self._series_path))

    @property
    def _series_path(self) -> Path:
        return self._state.root / "series.json"

    def _stop_sources(self) -> None:
        with self._patience("letting go of the sources"):
            if self._series is not None and not self._series.ended:
                self._series.stop()
                self._series.join(_SERIES_ENDS_S)
            sources, self._sources = list(self._sources.values()), {}
            # At once: each may have to wait for a camera.
            stopping = [threading.Thread(target=source.stop, name=f"stop {source.name}") for source in sources]
            for thread in stopping:
                thread.start()
            for thread in stopping:
                thread.join()

    def _reload(self) -> None:
        self._notifier.reloading()
        try:
            new = self._load()
        except ConfigError as error:
            log.error("the configuration is not reloaded, the old one stays in use:\n%s", error)
            self._reload_failed = True
            self._notifier.ready("the new configuration is wrong; the old one stays in use")
            return
        self._reload_failed = False
        for key in needs_restart(self._started_with, new):
            log.warning("%s was changed: that takes effect at the next start", key)
        self._config = new
        logging.getLogger().setLevel(new.log_level.upper())
        self._alerts.change_settings(new.alerts.settings())
        if self._stand_in is not None:
            self._stand_in.change_settings(new.alerts.settings())
        self._monitor.checkpoint_every_s = new.checkpoint.every_s
        self._monitor.checkpoint_every_shots = new.checkpoint.every_shots
        self._start_sources()
        log.info("the configuration is reloaded")
        self._notifier.ready("the configuration is reloaded")

    def _answer_those_asked(self) -> None:
        """Answer questions, but not so many that shots wait for whoever asks without end."""
        started = time.monotonic()
        if started < self._answer_at:
            return
        for answer in self._answers_due():
            answer()
            spent_s = time.monotonic() - started
            share = _ANSWERING_SHARE if self._monitor.in_flight else _ANSWERING_SHARE_IDLE
            self._answer_at = started + spent_s / share
            if spent_s > _ANSWERING_S:
                break

    def _answers_due(self) -> Iterator[Callable[[], None]]:
        """Go through what answers those who wait, one after the other."""
        if self._to_verify and not self._verifier.is_busy:
            yield self._verify
        for question in self._listening.questions():
            yield partial(self._answer, question)

    def _answer(self, question: Question) -> None:
        """Answer who asks over the socket what the reading commands would read themselves."""
        if question.name in ("set", "list-cards", "darks") and not self._watching and not self._orders.stop:
            # There are no cameras yet, but there will be.
            self._early.append(question)
            return
        if question.name in BACKUP_QUESTIONS:
            self._answer_backup(question)
            return
        if question.name == "verify":
            self._to_verify.append(question)
            if not self._verifier.is_busy:
                self._verify()
            return
        if question.name in ("set", "list-cards"):
            # A camera may take its time; the loop has none.
            asked = threading.Thread(target=_ask_cameras, args=(question, self._tethers()), name="ask", daemon=True)
            asked.start()
            return
        self._answer_here(question)

    def _answer_here(self, question: Question) -> None:
        try:
            with self._patience(f"answering {question.name}"):
                question.answer(self._answer_to(question.name, question.arguments))
        except (CameraError, StateError) as error:
            question.refuse(str(error))
        except (ArithmeticError, KeyError, TypeError, ValueError) as error:
            # Whatever a client may have sent.
            question.refuse(f"{question.name!r} with these arguments is no question to this daemon: {error}")

    def _answer_backup(self, question: Question) -> None:
        """Take the snapshot here, and have the rest done elsewhere: that reads the whole state."""
        taken: Path | None = None
        if question.name == "backup":
            try:
                with self._patience("taking a snapshot"):
                    self._monitor.checkpoint()
                    # Whoever wanted the one before may have been killed.
                    taken = self._backups.begin(anyway=self._backed_up is not None and self._backed_up.is_gone)
                    self._backed_up = question
            except StateError as error:
                question.refuse(str(error))
                return

        def pack() -> None:
            try:
                if taken is not None:
                    question.answer(self._backups.prepare(taken))
                else:
                    question.answer(self._backups.answer(question.name, **question.arguments))
            except (StateError, OSError) as error:
                question.refuse(str(error))
            except (KeyError, TypeError, ValueError) as error:
                question.refuse(f"{question.name!r} with these arguments is no question to this daemon: {error}")

        self._packing.submit(pack)

    def _verify(self) -> None:
        """Take a snapshot for all who asked, and have the rest done elsewhere: that reads the whole state."""
        asked, self._to_verify = self._to_verify, []
        try:
            with self._patience("taking a snapshot"):
                # It is about what is on the disk.
                self._monitor.checkpoint()
                self._verifier.begin(asked)
        except StateDamaged as error:
            for question in asked:
                question.answer(answers.damaged(error))
        except (StateError, OSError):
            # The disk is full, or knows no links. What else is wrong is found there as well.
            for question in asked:
                self._answer_here(question)

    def _end_verifying(self) -> None:
        with self._patience("letting go of a snapshot"):
            self._verifier.close()

    def _answer_to(self, name: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
        if name == "cameras":
            return {
                "cameras": [camera for source in self._tethers() for camera in source.cameras()],
                "held": {port: name for source in self._tethers() for port, name in source.held().items()},
            }
        if name in ("darks", "series", "end-series"):
            return self._series_answer(name, arguments)
        if name == "around":
            assert self._live is not None
            return self._live.around(str(arguments["sensor"]), int(arguments["site"]), int(arguments.get("reach", 8)))
        if name in DECLARING_QUESTIONS:
            declared = self._declaring.answer(name, arguments)
            assert self._live is not None
            self._live.look_again(str(arguments["sensor"]))
            return declared
        if name in ("verify", "generation"):
            # They are about what is on the disk.
            self._monitor.checkpoint()
        ids = [str(arguments["sensor"])] if name == "report" else list(self._ledger.sensors())
        sensors = self._monitor.sensors(ids)
        answer = answers.answer(self._state, name, arguments, sensors, self._notifier.beat)
        if name == "status":
            states = self._states(time.monotonic())
            # Not that of the last look around: its numbers would contradict those told here.
            self._note_activity(states)
            answer.update(
                daemon=self._facts(),
                sources=[_described(state) for state in states],
                metrics=self._metrics.as_dict(),
                series=None if self._series is None else self._series.state(),
            )
        return answer

    def _tethers(self) -> list[CameraSource]:
        return [source for source in self._sources.values() if isinstance(source, CameraSource)]

    def _series_answer(self, name: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """Begin, end or describe a series of darks."""
        if name == "darks":
            if self._series is not None and not self._series.ended:
                raise CameraError("A series of darks is being shot already; hotpixd darks --stop ends it.")
            order = SeriesOrder(**{key: value for key, value in arguments.items() if key in _ORDER_KEYS})
            tethers = self._tethers()
            if not tethers:
                raise CameraError("This daemon tethers no camera: name one under `cameras` in its configuration.")
            tether = _tether_of(order.camera, tethers)
            decode = self._monitor.decoders.decode
            self._series = DarkSeries(order, tether, self._series_path, self._wake, decode)
            self._series.start()
        elif name == "end-series" and self._series is not None:
            self._series.stop()
        return {"series": None if self._series is None else self._series.state()}

    @contextmanager
    def _patience(self, doing: str) -> Iterator[None]:
        """Keep the service manager from taking one long step for a hang; not for ever."""
        done = threading.Event()

        def beat() -> None:
            until = time.monotonic() + _PATIENCE_S
            while not done.wait(1.0) and time.monotonic() < until:
                log.debug("still %s", doing)
                self._notifier.beat()
                self._notifier.extend(10.0)

        thread = threading.Thread(target=beat, name="patience", daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()


class _Watched(Monitor):
    """A monitor whose longer steps do not count as a hang, and whose checkpoints are measured."""

    def __init__(self, service: _Service, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._service = service

    def _wait_for_kernels(self) -> None:
        service = self._service
        if not service.kernels.ready.done():
            service._orders.leave = service._listening.remove_file
            with service._patience("compiling the kernels"):
                wait([service.kernels.ready])
            service._orders.leave = None
        super()._wait_for_kernels()

    def _is_folded(self, raw: Path, key: str | None) -> bool:
        with self._service._patience("waiting for a raw file to be decoded"):
            return super()._is_folded(raw, key)

    def checkpoint(self) -> int:
        with self._service._patience("writing a checkpoint"):
            return super().checkpoint()

    def _checkpointed(self, seconds: float, written: int) -> None:
        self._service._metrics.checkpoint(seconds, written)


def _ask_cameras(question: Question, tethers: list[CameraSource]) -> None:
    """Change a setting of a camera, and answer what it then says it is; or list all cards anew."""
    given = question.arguments
    try:
        if not tethers:
            raise CameraError("This daemon tethers no camera.")
        if question.name == "list-cards":
            for tether in tethers:
                tether.list_anew()
            question.answer({})
            return
        camera = None if given.get("camera") is None else str(given["camera"])
        name, value = str(given["name"]), given["value"]
        if isinstance(value, bool) or not isinstance(value, str | int | float) or not f"{name}{value}".isprintable():
            raise ValueError(f"a value is a text or a number, got {value!r}")
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"a value is a finite number, got {value!r}")
        question.answer(_tether_of(camera, tethers).call("set", _SET_WITHIN_S, camera, name=name, value=value))
    except CameraError as error:
        question.refuse(str(error))
    except (KeyError, TypeError, ValueError) as error:
        question.refuse(f"'set' takes the name and the value of a setting of the camera: {error}")


def _tether_of(camera: str | None, tethers: list[CameraSource]) -> CameraSource:
    """Return the source that has the camera of this serial number, or else the first one with any camera."""
    for tether in tethers:
        if any(camera in (None, known["camera"]) for known in tether.cameras()):
            return tether
    return tethers[0]


def _described(state: SourceState) -> dict[str, Any]:
    return asdict(state) | {"since": utc(state.since)}


def _activity(states: list[SourceState], queued: int, live: Live) -> str:
    """Say in a sentence what the daemon does."""
    away = [state for state in states if state.status in ("away", "trouble")]
    watched = [state for state in states if state not in away and not state.condition]
    parts = [f"watching {_names(watched)}"] if watched else []
    parts += [
        f"{printable(f'{state.name} {state.condition}'.rstrip())}: {printable(state.detail)}"
        for state in states
        if state not in watched
    ]
    counts = f"{many(live.shots['folded'], 'shot')} folded"
    if all(live.sensors.values()):
        stable = sum(sensor["stable"] for sensor in live.sensors.values())
        counts += f", {many(stable, 'stable defect')}"
    if queued:
        counts += f", {queued} to go"
    return "; ".join([*(parts or ["nothing to watch: the configuration names no sources or cameras"]), counts])


def _names(states: list[SourceState]) -> str:
    return printable(states[0].name) if len(states) == 1 else f"{len(states)} directories"
