"""The daemon: shots in from all sources; what became of them out to feed, alerts, metrics, log and service manager.

One thread does everything that touches the state, one shot or one tick at a
time. Sources, feed, alerts and metrics have threads of their own, and hand over
through queues; whoever has something for the loop wakes it.
"""

from __future__ import annotations

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
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, fields
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import Any

from hotpixd import __version__
from hotpixd.alerts import Alerts, Watchman
from hotpixd.config import Config, ConfigError, needs_restart
from hotpixd.core.sensor import warm_up
from hotpixd.feed import FeedServer, Question, default_socket
from hotpixd.intake.camera import CameraError, CameraSettings, CameraSource
from hotpixd.intake.darks import DarkSeries, SeriesOrder, left_open
from hotpixd.intake.decode import keep_large_buffers
from hotpixd.intake.directory import DirectorySettings, DirectorySource
from hotpixd.intake.files import FoundShot
from hotpixd.intake.source import Seen, SourceState
from hotpixd.live import Live
from hotpixd.metrics import Metrics
from hotpixd.monitor import Fate, Monitor, Outcome
from hotpixd.store.ledger import Ledger
from hotpixd.store.state import State, StateError, StateFull, default_state_dir
from hotpixd.systemd import Notifier
from hotpixd.views import answers
from hotpixd.views.text import printable, sensor_name

log = logging.getLogger("hotpixd")

_TICK_S = 1.0
"""Between two looks at what sends no word: sources' states, the disk, the clock."""

_TAKEN_AT_A_TIME = 8
"""Shots of one source on their way through the loop."""

_DISK_EVERY_S = 10.0

_COMMIT_AFTER_S = 0.5
"""Quiet time after which derived rows are committed. Earlier, the next shot's own commit would take them along."""

_FULL_RETRY_S = (5.0, 60.0)
"""First and longest pause before a full disk is tried again."""

_SET_WITHIN_S = 60.0
"""How long a camera may take for a setting that somebody asked for."""

_SERIES_ENDS_S = 45.0
"""How long the exposure that a dark series is at may take when the daemon is stopped."""

_PATIENCE_S = 180.0
"""Longest single step of the loop (compiling, a checkpoint on a slow card) that does not count as a hang."""


_ORDER_KEYS = frozenset(field.name for field in fields(SeriesOrder))

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
        self.nothing_held = False
        """Whether the process may end at once, since it holds nothing yet."""

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
        if self.nothing_held:
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
        return _Service(config, load, wake, orders).run()


class _Service:
    def __init__(self, config: Config, load: Callable[[], Config], wake: Wake, orders: Orders) -> None:
        self._load = load
        self._config = self._started_with = config
        self._wake = wake
        self._orders = orders
        self._notifier = Notifier()
        self._metrics = Metrics()
        self._sources: dict[_Settings, _Source] = {}
        self._taken: dict[Path, tuple[_Source, float]] = {}
        self._unreadable: set[Path] = set()
        self._statuses: dict[str, tuple[str, str]] = {}
        self._started_at = answers.now()
        self._degraded: str | None = None
        self._reload_failed = False
        self._watching = False
        self._quiet_since: float | None = None
        self._ticked_at = 0.0
        self._disk_at = -_DISK_EVERY_S
        self._disk_free = 0
        self._activity = "starting"
        self._series: DarkSeries | None = None
        self._sources_changed = False
        self._early: list[Question] = []
        """Asked before there were any sources."""

    def run(self) -> int:
        config = self._config
        with ExitStack() as stack:
            self._state = state = stack.enter_context(State(config.state or default_state_dir()))
            self._ledger: Ledger = state.ledger
            self._feed = self._open_feed(state)
            stack.callback(self._feed.stop)
            if config.metrics.listen:
                self._metrics.serve(config.metrics.listen)
                stack.callback(self._metrics.close)
            self._alerts = Alerts(self._ledger, config.alerts.settings(), wake=self._wake)
            stack.callback(self._alerts.close)
            self._watchman = Watchman(self._alerts)
            self._monitor = stack.enter_context(self._make_monitor(state))
            self._seen = self._ledger.seen_files()
            self._live = Live(state, self._monitor, self._feed.publish)
            self._activity = "starting; the first start compiles the kernels, which takes up to half a minute"
            self._tick()
            log.info("%s", self._activity)
            self._orders.nothing_held = True
            with self._patience("compiling the kernels"):
                warm_up()
            self._orders.nothing_held = False
            self._replay()
            self._live.recount()
            if not self._orders.stop:
                stack.callback(self._stop_sources)
                self._start_sources()
                self._watching = True
                while self._early:
                    self._answer(self._early.pop(0))
                self._tick()
                self._notifier.ready(self._activity)
                log.info("hotpixd %s: %s; state in %s", __version__, self._activity, state.root)
                self._watch()
            return self._finish()

    # --- the loop

    def _replay(self) -> None:
        count = 0
        for outcome in self._monitor.replay(self._stop_asked):
            count += 1
            self._notifier.extend(_PATIENCE_S)
            self._activity = f"taking up {count} shots from where the last run was interrupted"
            self._after(outcome)
            self._tick()
        if count:
            log.info("took up %d shots from where the last run was interrupted", count)

    def _watch(self) -> None:
        pause = _FULL_RETRY_S[0]
        while not self._orders.stop:
            try:
                for outcome in self._monitor.follow(self._shots(), self._stop_asked, self._wake):
                    if outcome is None:
                        self._rest()
                    else:
                        self._after(outcome)
                        self._degraded, pause = None, _FULL_RETRY_S[0]
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
            self._degraded = None
        if self._monitor.uncovered and quiet >= self._config.checkpoint.idle_s:
            self._monitor.checkpoint()
        self._wake.wait(_COMMIT_AFTER_S if self._ledger.waits else _TICK_S)

    def _after(self, outcome: Outcome) -> None:
        """Tell everyone what became of a shot."""
        self._quiet_since = None
        source, since = self._taken.pop(outcome.path, (None, None))
        if outcome.fate is Fate.UNREADABLE and source is not None:
            source.retry(outcome.path)
            if outcome.path in self._unreadable:
                return
            self._unreadable.add(outcome.path)
        elif source is not None:
            self._unreadable.discard(outcome.path)
            self._remember(source.done(outcome.path))
        # First of all, so that they are in the same commit as the transitions that they tell of.
        self._tell_folded(outcome)
        if self._series is not None and outcome.origin is not None:
            self._series.folded(outcome.origin, outcome.kind, changed=self._may_change(outcome))
        self._live.include(outcome)
        if not outcome.told and not outcome.again:
            self._watchman.outcome(outcome.shown, str(outcome.fate), outcome.reason)
            latency = None if since is None or outcome.report is None else time.monotonic() - since
            self._metrics.shot(str(outcome.fate), latency, outcome.size)
        self._log(outcome)

    def _may_change(self, outcome: Outcome) -> bool:
        """Tell whether a shot has changed the map of defects, or there are too few yet for anything to be on it."""
        id_, report = outcome.sensor_id, outcome.report
        if id_ is None or report is None:
            return False
        sensor = self._monitor.sensor(id_).sensor
        young = sensor.accumulator.counted < sensor.settings.min_frames
        return young or any(t.change in ("stable", "recovered") for t in report.transitions)

    def _log(self, outcome: Outcome) -> None:
        name, reason = printable(outcome.shown.name), printable(outcome.reason or "")
        if outcome.fate is Fate.FOLDED and outcome.sensor_id is not None:
            sensor = self._live.sensors[outcome.sensor_id]
            text = "folded %s of %s: %d frames, %d candidates, %d stable"
            counts = sensor["frames"], sensor["candidate"], sensor["stable"]
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
        described = sensor_name(answers.describe(kept))
        self._alerts.folded(id_, described, kept.sensor.layout, report, seq)
        if not outcome.told:
            self._watchman.counted(id_, described, report.counted, report.not_counted_because)
            if outcome.info is not None and outcome.info.taken_at is not None:
                self._watchman.clock(id_, described, outcome.info.taken_at, datetime.now(UTC))

    def _tick(self) -> None:
        """Keep everyone informed. Called after every shot, and about once per second without one."""
        self._notifier.beat()
        for source in self._sources.values():
            for seen in source.notes():
                self._remember(seen)
        if self._orders.reload and self._watching:
            self._orders.reload = False
            self._reload()
        for question in self._feed.questions():
            self._answer(question)
        while self._monitor.warnings:
            self._watchman.damage(self._monitor.warnings.pop(0))
        self._alerts.work()
        self._live.refresh(watched=self._feed.watchers > 0)
        now = time.monotonic()
        if now - self._ticked_at < _TICK_S / 4:
            return
        self._ticked_at = now
        self._look_around(now)

    def _look_around(self, now: float) -> None:
        states = [state for source in self._sources.values() for state in source.states()]
        for concern in (state for source in self._sources.values() for state in source.concerns()):
            self._watchman.source(concern.name, concern.status, concern.detail)
        before, self._statuses = self._statuses, {state.name: (state.condition, state.status) for state in states}
        for state in states:
            if before.get(state.name) != (state.condition, state.status):
                level = logging.WARNING if state.status == "trouble" else logging.INFO
                condition = state.condition or state.status
                log.log(level, "%s is %s: %s", printable(state.name), condition, printable(state.detail))
        if now - self._disk_at >= _DISK_EVERY_S:
            self._disk_at = now
            self._disk_free = shutil.disk_usage(self._state.root).free
            self._watchman.disk(self._disk_free)
        queued = sum(state.waiting for state in states) or self._monitor.in_flight
        if self._watching:
            self._activity = self._degraded or _activity(states, queued, self._live)
            if self._reload_failed:
                self._activity += "; the changed configuration is wrong, the old one stays in use"
        series = None if self._series is None else self._series.state()
        shooting = self._series is not None and not self._series.ended
        if self._sources_changed and not shooting:
            self._start_sources()
        self._feed.publish({"series": series})
        described = [asdict(state) for state in states]
        self._live.daemon(self._facts(), described, queued)
        self._feed.publish({"alerts": self._alerts.recent()})
        darks = f"darks: {series['detail']}; " if shooting and series is not None else ""
        self._notifier.status(darks + self._activity)
        self._metrics.update(
            queue=queued,
            sources=described,
            sensors=self._live.sensors,
            alerts_waiting=self._alerts.waiting,
            disk_free_bytes=self._disk_free,
        )

    def _facts(self) -> dict[str, Any]:
        return {
            "version": __version__,
            "pid": os.getpid(),
            "state": str(self._state.root),
            "started_at": self._started_at,
            "activity": self._activity,
            "degraded": self._degraded,
        }

    def _wait_for_room(self, why: str, pause: float) -> None:
        """Stay up while the disk is full: nothing is acknowledged meanwhile, and nothing is lost."""
        log.error("%s Shots stay where they are until there is room.", why)
        self._degraded = why
        for source in self._sources.values():
            source.forget_taken()
        self._taken.clear()
        until = time.monotonic() + pause
        while not self._orders.stop and time.monotonic() < until:
            self._notifier.beat()
            for question in self._feed.questions():
                self._answer(question)
            with suppress(StateFull):  # whatever would be written down of what it sees
                self._look_around(time.monotonic())
            self._wake.wait(_TICK_S)

    def _finish(self) -> int:
        self._notifier.stopping("writing a checkpoint")
        self._stop_sources()
        try:
            self._monitor.checkpoint()
        except StateFull as error:
            log.error("%s The shots since the last checkpoint are taken up from the spool at the next start.", error)
            return 3
        log.info("stopped; everything is on the disk")
        return 0

    # --- parts

    def _open_feed(self, state: State) -> FeedServer:
        config = self._config.feed
        path = config.socket or default_socket(state.root, os.environ)
        feed = FeedServer(path, {"version": __version__, "state": str(state.root)}, self._wake, group=config.group)
        feed.start()
        state.announce(path)
        return feed

    def _make_monitor(self, state: State) -> Monitor:
        config = self._config
        return _Watched(
            self,
            state,
            config.detection.settings(),
            cores=config.cores or min(os.cpu_count() or 1, 4),
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
                self._sources[settings] = source = self._source(settings)
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
        self._monitor.checkpoint_every_s = new.checkpoint.every_s
        self._monitor.checkpoint_every_shots = new.checkpoint.every_shots
        self._start_sources()
        log.info("the configuration is reloaded")
        self._notifier.ready("the configuration is reloaded")

    def _answer(self, question: Question) -> None:
        """Answer who asks over the socket what the reading commands would read themselves."""
        if question.name in ("set", "list-cards", "darks") and not self._watching and not self._orders.stop:
            # There are no cameras yet, but there will be.
            self._early.append(question)
            return
        if question.name in ("set", "list-cards"):
            # A camera may take its time; the loop has none.
            asked = threading.Thread(target=_ask_cameras, args=(question, self._tethers()), name="ask", daemon=True)
            asked.start()
            return
        try:
            with self._patience(f"answering {question.name}"):
                question.answer(self._answer_to(question.name, question.arguments))
        except (CameraError, StateError) as error:
            question.refuse(str(error))
        except (ArithmeticError, KeyError, TypeError, ValueError) as error:
            # Whatever a client may have sent.
            question.refuse(f"{question.name!r} with these arguments is no question to this daemon: {error}")

    def _answer_to(self, name: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
        if name == "cameras":
            return {"cameras": [camera for source in self._tethers() for camera in source.cameras()]}
        if name in ("darks", "series", "end-series"):
            return self._series_answer(name, arguments)
        if name == "around":
            return self._live.around(str(arguments["sensor"]), int(arguments["site"]), int(arguments.get("reach", 8)))
        if name == "verify":
            # It looks at what is on the disk.
            self._monitor.checkpoint()
        sensors = self._monitor.sensors(list(self._ledger.sensors()))
        answer = answers.answer(self._state, name, arguments, sensors)
        if name == "status":
            answer.update(
                daemon=self._facts(),
                sources=[asdict(state) for source in self._sources.values() for state in source.states()],
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
            self._series = DarkSeries(order, _tether_of(order.camera, tethers), self._series_path, self._wake)
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
    """A monitor whose checkpoints are measured, and do not count as a hang."""

    def __init__(self, service: _Service, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._service = service

    def checkpoint(self) -> int:
        started = time.monotonic()
        with self._service._patience("writing a checkpoint"):
            written = super().checkpoint()
        self._service._metrics.checkpoint(time.monotonic() - started, written)
        return written


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
    counts = f"{live.shots['folded']} shots folded"
    if all(live.sensors.values()):
        stable = sum(sensor["stable"] for sensor in live.sensors.values())
        counts += f", {stable} stable defects"
    if queued:
        counts += f", {queued} to go"
    return "; ".join([*(parts or ["nothing to watch: the configuration names no sources or cameras"]), counts])


def _names(states: list[SourceState]) -> str:
    return printable(states[0].name) if len(states) == 1 else f"{len(states)} directories"
