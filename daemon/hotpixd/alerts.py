"""Alerts: transitions and conditions become messages, and messages reach people.

An alert goes to the log at once and to the outbox with the ledger's next
commit. What is raised within some seconds becomes one message, so that a
thousand defects of one dark session are not a thousand messages. A message is
committed before it is sent, and sent until its channel takes it: whoever
receives it twice sees so by its id.

A channel is one apprise URL or the command. The main loop only ever looks:
sending happens on daemon threads, one per channel that is sending just now, so
that a dead server holds up neither the loop, nor other channels, nor the end
of the process.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import random
import re
import signal
import statistics
import subprocess
import tempfile
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from datetime import time as time_of_day
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any
from urllib.parse import unquote, urlsplit

from hotpixd.core.frame import SensorLayout
from hotpixd.core.overview import STATIC_SCENE, STATIC_SCENE_ADVICE
from hotpixd.core.sensor import FoldReport, Transition
from hotpixd.store.durable import StateFull, failpoint
from hotpixd.store.ledger import Ledger
from hotpixd.store.outbox import Alert, Outbox
from hotpixd.words import many, utc

log = logging.getLogger(__name__)

TOPICS = ("stable", "recovered", "source", "silence", "refused", "scene", "disk", "checkpoint", "clock", "damage")
"""Sorts of alerts, in the order in which a message tells of them."""

_OF_DEFECTS = ("stable", "recovered")
"""Those that tell of transitions, of the same names."""

_EXCESS_KINDS = frozenset(("hot", "warm", "bright", "unstable"))
"""Kinds of which the excess says how bad they are. A stuck or dead sample may have none."""

_LISTED = 10
"""Alerts of one sort that a message lists; the others it counts."""

_FIRST_RETRY_S = 10.0
_LAST_RETRY_S = 3600.0
"""The wait doubles from the one to the other with each failure."""

_JITTER = 0.2
"""Share by which waits differ, so that many daemons do not come back to a server at one time."""

_COMMAND_S = 60.0
"""Time that the command has."""

_LOOK_AGAIN_S = 600.0
"""Longest time between two looks at the wall clock, which may be set meanwhile."""

_RUN_ENDS_AFTER_S = 3600.0
"""Refusals closer to each other than that are one run."""

_NOT_COUNTED_IN_A_ROW = 10
"""Frames without new evidence after which that is worth an alert."""

_CLOCK_AHEAD = timedelta(hours=26)
"""How far a camera's clock may be ahead by its time zone alone: cameras seldom name it."""

_CLOCK_RESET = datetime(2000, 1, 2, tzinfo=UTC)
"""Cameras whose clock was never set start at 1980 or 2000."""

_SHOOT_SHOTS = 10
"""Shots in a row after which a shoot is on."""

_SHOOT_LASTS_S = 300.0
"""How long a shoot must have lasted: somebody who takes a burst is no intervalometer."""

_SHOOT_REMEMBERED = 20
"""Intervals that say what is usual."""

_SHOOT_EVEN = 0.75
"""Share of the intervals that must lie within half and twice their median: then a timer releases, not a finger."""

_SHOOT_LEAST_S = 1.0
"""Median interval below which shots are a burst."""

_SHOOT_OVER_S = 6 * 3600.0
"""A longer silence was the end of the shoot: the next shot is no news."""

_ALONE = 4
"""Shots that may wait at a source when one comes by itself. Of more, as on a card, the intervals say nothing."""

_FULL_OVER_S = 150.0
"""A disk that was full and is not said to be any more for so long has room again: twice the pause between two tries."""

_BOOTED_S = 900.0
"""Time since the machine was started in which its clock may be set without a word: many have none that goes on."""

_STEPS_APART_S = 3600.0
"""Between two alerts about a clock that jumps again and again."""

_TELL_SECRETS = ("apprise", "urllib3", "requests_oauthlib", "oauthlib")
"""Loggers that write URLs and tokens, some even at level ERROR."""


@dataclass(frozen=True, slots=True)
class AlertSettings:
    """What is alerted, to whom, and when."""

    notify: tuple[str, ...] = ()
    """Apprise URLs. They hold passwords: never logged."""

    command: tuple[str, ...] = ()
    """Program and its arguments: gets each message as JSON on its stdin. Empty: none."""

    topics: frozenset[str] = frozenset(TOPICS)
    """Those of `TOPICS` that are sent; the others are only logged."""

    kinds: frozenset[str] = frozenset(("hot", "bright", "stuck", "dead", "dim", "unstable"))
    """Kinds of defects that are alerted."""

    min_excess_sigma: float = 0.0
    """Hot, warm, bright and unstable defects with less excess than this are not alerted."""

    gather_s: float = 30.0
    """Alerts raised within this time make one message."""

    quiet_hours: tuple[time_of_day, time_of_day] | None = None
    """From when until when, local time, nothing is sent; may go over midnight. None: never quiet."""

    give_up_after_h: float = 72.0
    """A message that fails and is older than this is not tried again."""

    disk_free_mb: float = 500.0
    """Free space of the state's disk below which that is alerted."""

    silence_times: float = 5.0
    """No shot for so many times the usual interval is alerted, while a shoot is on. 0: never."""

    silence_least_s: float = 600.0
    """But not before this."""

    checkpoint_after_min: float = 60.0
    """Shots that no checkpoint has covered for so long are alerted. 0: never."""

    clock_step_s: float = 60.0
    """A jump of this computer's clock by more than this is alerted. 0: never."""


@dataclass(frozen=True, slots=True)
class Message:
    """Some alerts, in words."""

    id: str
    """The same whenever it is sent again, of this state and of one restored from a backup."""

    title: str

    body: str
    """Lines; the last one holds the id."""

    alerts: tuple[Alert, ...]

    def json(self) -> str:
        """Return the message as the command gets it."""
        names = ("id", "at", "topic", "text", "detail")
        alerts = [{name: getattr(alert, name) for name in names} | {"at": utc(alert.at)} for alert in self.alerts]
        return json.dumps({"id": self.id, "title": self.title, "body": self.body, "alerts": alerts})


@dataclass(slots=True)
class _Channel:
    """A way to people."""

    id: str
    """Short digest of its URL or command: what the ledger knows it by."""

    name: str
    """For the log: tells nothing that is secret."""

    send: Callable[[Message], str | None]
    """Deliver a message; return why that failed, or None."""

    failures: int = 0
    """In a row."""

    next_try: float = 0.0
    """When it may be tried again, by the monotonic clock."""

    busy: bool = False
    """A thread is sending on it."""


@dataclass(slots=True)
class _Due:
    """A delivery still to be made."""

    tries: int
    born: float
    """When its newest alert was raised, by the monotonic clock; before this process, as the wall clock says."""


@dataclass(frozen=True, slots=True)
class _Opened:
    """What a thread made of the settings."""

    settings: AlertSettings
    channels: tuple[_Channel, ...]
    complaints: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Tried:
    """What a thread made of a delivery."""

    message: int
    id: str
    """The message's, as people see it."""
    channel: str
    name: str
    failure: str | None


class Alerts:
    """Raises alerts and sees them delivered. Use from the ledger's thread.

    Parameters
    ----------
    wake : called from other threads when `work` has something to do
    clock : monotonic, s
    now : wall clock, aware
    stands_in : whether this is for the time in which the state's own ledger cannot be written: the ledger is one in
        memory, and `take_over` of the real one is handed this in the end
    """

    def __init__(
        self,
        ledger: Ledger,
        settings: AlertSettings,
        *,
        wake: Callable[[], None],
        clock: Callable[[], float] = time.monotonic,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
        stands_in: bool = False,
    ) -> None:
        """Take up what an earlier process left unsent."""
        self._ledger = ledger
        self._stands_in = stands_in
        # Numbers that no other message has, nor will have: they, and so the ids, stay the same when it is taken over.
        self._outbox = Outbox(ledger, below=-int(now().timestamp()) if stands_in else None)
        self._wake = wake
        self._clock = clock
        self._now = now
        self._results: SimpleQueue[_Opened | _Tried] = SimpleQueue()
        self._channels: dict[str, _Channel] = {}
        self._unsaved = False
        self._gathering_since = clock() if self._outbox.gathers else None
        self._due = {
            (due.message, due.channel): _Due(due.tries, clock() - self.age_s(due.newest_at))
            for due in self._outbox.due()
        }
        self.change_settings(settings)

    def change_settings(self, settings: AlertSettings) -> None:
        """Go by other settings from now on. Messages due on a channel that is gone go to the new ones."""
        self.settings = settings
        self._opening = True
        if settings.notify:
            # Importing apprise takes half a second.
            threading.Thread(target=self._open, args=(settings,), name="alerts", daemon=True).start()
        else:
            self._open(settings)

    @property
    def waiting(self) -> int:
        """Messages that some channel has not taken yet, with the one being gathered.

        None while the settings name no channel; what has not reached anyone goes to the one they name next.
        """
        if not self._anyone_to_tell:
            return 0
        return len({message for message, _ in self._due}) + (self._gathering_since is not None)

    @property
    def _anyone_to_tell(self) -> bool:
        return bool(self.settings.notify or self.settings.command)

    def recent(self, n: int = 50) -> list[dict[str, Any]]:
        """Return the latest alerts, sent or not, oldest first: id, at (UTC, ISO 8601), topic, text."""
        return self._ledger.alerts(n)

    def last(self, subject: str) -> Alert | None:
        """Return the latest alert about a subject, if there was any."""
        return self._outbox.last(_printable(subject))

    def age_s(self, at: str) -> float:
        """Return how long ago something was raised, as the wall clock says; not below 0."""
        return max((self._now() - datetime.fromisoformat(at)).total_seconds(), 0.0)

    def age_of(self, subject: str) -> float:
        """Return how long ago the latest alert about a subject was raised, s; inf if there was none."""
        last = self.last(subject)
        return math.inf if last is None else self.age_s(last.at)

    # --- raising

    def folded(self, sensor: str, description: str, layout: SensorLayout, report: FoldReport, seq: int) -> None:
        """Raise what a frame's transitions are worth.

        To be called before anything commits the ledger: alerts and transitions are then on the disk together.
        A replay of the frame raises nothing again.

        Parameters
        ----------
        sensor : its id
        description : its name for people
        seq : ledger row of the frame
        """
        told = [t for t in report.transitions if t.change in _OF_DEFECTS and t.kind in self.settings.kinds]
        strengths = self._strengths_when_stable(sensor) if any(t.change == "recovered" for t in told) else {}
        alerts = []
        for t in told:
            if self._was_told(t, sensor):
                continue
            strength = t.excess_sigma if t.change == "stable" else strengths.get(t.site, math.inf)
            if t.kind not in _EXCESS_KINDS or not abs(strength) < self.settings.min_excess_sigma:
                alerts.append(self._of_transition(t, sensor, description, layout, seq))
        self._add(alerts)

    def raise_(
        self,
        topic: str,
        subject: str,
        key: str,
        text: str,
        detail: Mapping[str, Any] | None = None,
        *,
        quietly: bool = False,
    ) -> None:
        """Raise an alert, unless one of this key was raised before. If the disk is full it is written later.

        Parameters
        ----------
        topic : of `TOPICS`, but not one of transitions: see `folded`
        subject : see `Alert`
        text : a sentence
        detail : of strings, numbers and None
        quietly : only note it
        """
        self._add([self._alert(topic, subject, key, text, detail or {})], quietly=quietly)

    def take_over(self, stand_in: Alerts) -> None:
        """Write down what was raised, sent and not sent by the one that stood in for this; it must be closed.

        What it has sent is not sent again, the rest is, under the same ids.
        """
        while not stand_in._results.empty():
            result = stand_in._results.get()
            if isinstance(result, _Tried):
                stand_in._record(result)
        messages = self._outbox.take_over(stand_in._outbox)
        self._due.update({key: due for key, due in stand_in._due.items() if key[0] in messages})
        if self._gathering_since is None and stand_in._gathering_since is not None:
            self._gathering_since = stand_in._gathering_since
        self._unsaved = True
        if not self._opening and self._channels:
            known = {channel.id for channel in self._channels.values()}
            for message, gone in [key for key in self._due if key[1] not in known]:
                self._redirect(message, gone, self._channels)

    def _alert(self, topic: str, subject: str, key: str, text: str, detail: Mapping[str, Any]) -> Alert:
        # Names of files are in these: they may hold anything.
        clean = {name: _plain(value) for name, value in detail.items()}
        at = self._now().astimezone(UTC).isoformat(timespec="milliseconds")
        if self._stands_in:
            # Of a condition, keys are only different within one ledger; and the id is made of the key.
            key = f"{key} {at}"
        return Alert(_printable(key), at, topic, _printable(subject), _printable(text), clean)

    def _of_transition(self, t: Transition, sensor: str, description: str, layout: SensorLayout, seq: int) -> Alert:
        x, y, colour = layout.address(t.site)
        detail = {
            "sensor": sensor,
            "camera": description,
            "site": t.site,
            "x": x,
            "y": y,
            "colour": colour,
            "kind": t.kind,
            "excess_sigma": round(t.excess_sigma, 3),
            "log_e": round(t.log_e, 3),
            "seq": seq,
        }
        verb = "is a stable defect" if t.change == "stable" else "has recovered"
        text = f"{description}: {_defect(detail)} {verb}."
        return self._alert(t.change, f"{sensor}:{t.site}", f"{t.change}:{sensor}:{t.site}:{seq}", text, detail)

    def _was_told(self, t: Transition, sensor: str) -> bool:
        """Tell whether this was told of a transition that was undone since: shots were lost, and are folded anew."""
        try:
            last = self._outbox.last(f"{sensor}:{t.site}")
            if last is None or last.topic != t.change:
                return False
            query = "SELECT 1 FROM transition WHERE sensor = (SELECT number FROM sensor WHERE id = ?)"
            where = (sensor, last.detail["seq"], t.site, t.change)
            return not self._ledger.rows(f"{query} AND seq = ? AND site = ? AND change = ?", where)
        except StateFull:
            return False

    def _strengths_when_stable(self, sensor: str) -> dict[int, float]:
        """Excess by site when it last became stable, sigma: a recovered site has none any more.

        None is known while the disk is full: an alert too many is better than one too few.
        """
        try:
            return {t.site: t.detail["excess_sigma"] for t in self._ledger.transitions(sensor) if t.change == "stable"}
        except StateFull:
            return {}

    def _add(self, alerts: Sequence[Alert], *, quietly: bool = False) -> None:
        if not alerts:
            return
        topics = self.settings.topics if self._anyone_to_tell and not quietly else frozenset()
        new = self._outbox.add(alerts, send=topics)
        if self._gathering_since is None and any(alert.topic in topics for alert in new):
            self._gathering_since = self._clock()
        for line in _lines(new):
            log.log(logging.INFO if quietly else logging.WARNING, "%s", line)

    # --- sending

    def work(self) -> float | None:
        """Do what is due, without waiting for anything but the ledger's commit.

        Returns
        -------
        Seconds after which to call it again, if `wake` is not called before. None: then only.

        Raises
        ------
        StateFull
            If the disk is full; nothing is sent then that is not on it. Call it again when there is room.
        """
        while not self._results.empty():
            self._include(self._results.get())
        now = self._clock()
        quiet_s = self._quiet_s()
        if not quiet_s and self._ripe_at() <= now:
            self._compose()
        if self._unsaved:
            self._ledger.commit()
            self._unsaved = False
        if quiet_s:
            return min(quiet_s, _LOOK_AGAIN_S) if self.waiting else None
        for channel in self._channels.values():
            message = self._next_message(channel)
            if message is not None and not channel.busy and channel.next_try <= now:
                job = (channel, message, self._message(message))
                channel.busy = True
                failpoint("before_send")
                threading.Thread(target=self._try, args=job, name="alerts", daemon=True).start()
        moments = [c.next_try for c in self._channels.values() if not c.busy and self._next_message(c) is not None]
        soonest = min([*moments, self._ripe_at()])
        return None if math.isinf(soonest) else max(soonest - now, 0.0)

    def close(self, timeout_s: float = 5.0) -> None:
        """Let those who are sending finish, within this time. What is not sent stays due."""
        until = time.monotonic() + timeout_s
        while any(channel.busy for channel in self._channels.values()):
            try:
                result = self._results.get(timeout=max(until - time.monotonic(), 0.0))
            except Empty:
                return
            if isinstance(result, _Tried):
                self._record(result)

    def _ripe_at(self) -> float:
        """When the alerts gathered are to become a message, by the monotonic clock; inf: not by time alone.

        While every channel is failing they are gathered on, so that a dead server does not cost a message per alert.
        """
        if self._gathering_since is None or self._opening or not self._channels:
            return math.inf
        return max(self._gathering_since + self.settings.gather_s, min(c.next_try for c in self._channels.values()))

    def _compose(self) -> None:
        if not self._outbox.gathers:
            # They were not new after all, which could not be told while the disk was full.
            self._gathering_since = None
            return
        message = self._outbox.compose(self._channels)
        self._due.update({(message, channel): _Due(0, self._clock()) for channel in self._channels})
        self._gathering_since = None
        self._unsaved = True

    def _next_message(self, channel: _Channel) -> int | None:
        """The one tried least, so that one which is never taken does not hold up the others."""
        waiting = [(due.tries, message) for (message, id_), due in self._due.items() if id_ == channel.id]
        return min(waiting)[1] if waiting else None

    def _message(self, number: int) -> Message:
        return composed(number, self._outbox.alerts(number))

    def _open(self, settings: AlertSettings) -> None:
        """Have `work` use the channels. On a thread of its own if that takes long."""
        self._results.put(_opened(settings))
        self._wake()

    def _try(self, channel: _Channel, number: int, message: Message) -> None:
        """On a thread of its own: send a message."""
        try:
            failure = channel.send(message)
        except Exception as error:
            # A plugin's fault must not end the daemon, and its text may hold the URL.
            failure = f"{type(error).__name__} within its plugin"
        if failure is None:
            failpoint("after_send")
        self._results.put(_Tried(number, message.id, channel.id, channel.name, failure))
        self._wake()

    def _include(self, result: _Opened | _Tried) -> None:
        if isinstance(result, _Tried):
            self._record(result)
        elif result.settings is self.settings:
            try:
                self._use(result)
            except StateFull:
                self._results.put(result)  # to be used when there is room for what moves to other channels
                raise

    def _use(self, opened: _Opened) -> None:
        # A channel that stays keeps its retries.
        channels = {channel.id: self._channels.get(channel.id, channel) for channel in opened.channels}
        if channels:
            for message, gone in [key for key in self._due if key[1] not in channels]:
                self._redirect(message, gone, channels)
        self._channels = channels
        self._opening = False
        for complaint in opened.complaints:
            log.error("%s", complaint)

    def _redirect(self, message: int, gone: str, channels: Iterable[str]) -> None:
        """Have a message sent on those of the channels that it was never due on, instead of the one that is gone."""
        # Read before anything is changed: should the disk be full, this is called again.
        id_, known = self._message(message).id, self._outbox.channels(message)
        due = self._due.pop((message, gone))
        self._outbox.record(message, gone, due.tries, "given up")
        self._unsaved = True
        new = [] if self._too_old(due) else sorted(set(channels) - known)
        self._outbox.add_deliveries(message, new)
        self._due.update({(message, channel): _Due(0, due.born) for channel in new})
        if not new and all(number != message for number, _ in self._due):
            log.warning("message %s is not sent any more: its channel is gone", id_)

    def _record(self, tried: _Tried) -> None:
        channel = self._channels.get(tried.channel)
        if channel is not None:
            channel.busy = False
            self._schedule(channel, tried.failure)
        due = self._due.get((tried.message, tried.channel))
        if due is None:
            return
        self._unsaved = True
        if tried.failure is None:
            self._outbox.record(tried.message, tried.channel, due.tries, "sent")
            del self._due[tried.message, tried.channel]
            log.info("message %s was delivered to %s", tried.id, tried.name)
            return
        due.tries += 1
        if self._too_old(due):
            self._outbox.record(tried.message, tried.channel, due.tries, "given up")
            del self._due[tried.message, tried.channel]
            log.error("message %s was not delivered to %s and is given up: %s", tried.id, tried.name, tried.failure)
            return
        self._outbox.record(tried.message, tried.channel, due.tries, "due")
        level = logging.WARNING if due.tries == 1 else logging.INFO
        log.log(level, "message %s was not delivered to %s, to be tried again: %s", tried.id, tried.name, tried.failure)

    def _schedule(self, channel: _Channel, failure: str | None) -> None:
        if failure is None:
            channel.failures = 0
            return
        wait_s = min(_FIRST_RETRY_S * 2 ** min(channel.failures, 20), _LAST_RETRY_S)
        channel.failures += 1
        channel.next_try = self._clock() + wait_s * random.uniform(1 - _JITTER, 1 + _JITTER)

    def _too_old(self, due: _Due) -> bool:
        return self._clock() - due.born > self.settings.give_up_after_h * 3600

    def _quiet_s(self) -> float:
        """Seconds until the quiet hours end; 0 if they are not now."""
        if self.settings.quiet_hours is None:
            return 0.0
        start, end = (_seconds(moment) for moment in self.settings.quiet_hours)
        now = _seconds(self._now().astimezone().time())
        quiet = start <= now < end if start <= end else not end <= now < start
        return (end - now) % 86400 if quiet else 0.0


def _seconds(moment: time_of_day) -> float:
    """Seconds since midnight."""
    return moment.hour * 3600 + moment.minute * 60 + moment.second + moment.microsecond / 1e6


# --- messages


def composed(number: int, alerts: Sequence[Alert]) -> Message:
    """Return the message of some alerts; of the same alerts always the same.

    Parameters
    ----------
    number : of the message in its outbox
    alerts : in the order in which they were raised, at least one
    """
    first = f"{alerts[0].key}\n{alerts[0].at}"
    id_ = f"{hashlib.sha256(first.encode()).hexdigest()[:8]}-{abs(number)}"
    topics = Counter(alert.topic for alert in alerts)
    title = "hotpixd: " + ", ".join(_heading(topic, topics[topic]) for topic in TOPICS if topics[topic])
    times = sorted({alert.at[:19].replace("T", " ") for alert in alerts})
    raised = times[0] if len(times) == 1 else f"{times[0]} to {times[-1]}"
    body = "\n".join([*_lines(alerts), f"Raised {raised} UTC", f"hotpixd message {id_}"])
    if number < 0:
        # Made without a ledger: the number that each gets there is not known yet. Sent again, it must be the same.
        alerts = [replace(alert, id=0) for alert in alerts]
    return Message(id_, title, body, tuple(alerts))


def _heading(topic: str, count: int) -> str:
    if topic in _OF_DEFECTS:
        return many(count, f"{topic} defect")
    words = {"refused": "shots refused", "clock": "clock", "damage": "damaged state", "silence": "no shots"}
    return words.get(topic, topic)


def _lines(alerts: Iterable[Alert]) -> list[str]:
    """Say some alerts: defects by sensor, with counts and the strongest; of the others those raised first."""
    groups: dict[tuple[str, str], list[Alert]] = {}
    for alert in alerts:
        sensor = str(alert.detail["sensor"]) if alert.topic in _OF_DEFECTS else ""
        groups.setdefault((alert.topic, sensor), []).append(alert)
    lines = []
    for (topic, _), members in sorted(groups.items(), key=lambda group: TOPICS.index(group[0][0])):
        if topic not in _OF_DEFECTS or len(members) == 1:
            lines += [alert.text for alert in members[:_LISTED]]
        else:
            kinds = Counter(alert.detail["kind"] for alert in members)
            verb = "became stable" if topic == "stable" else "have recovered"
            counts = ", ".join(f"{n} {kind}" for kind, n in kinds.most_common())
            lines.append(f"{members[0].detail['camera']}: {len(members)} defects {verb}: {counts}.")
            strongest = sorted(members, key=lambda alert: -abs(alert.detail["excess_sigma"] or 0.0))
            lines += [f"  {_defect(alert.detail)}" for alert in strongest[:_LISTED]]
        if len(members) > _LISTED:
            lines.append(f"  ... and {len(members) - _LISTED} more")
    return lines


def _defect(detail: Mapping[str, Any]) -> str:
    strength = detail["excess_sigma"]
    sigma = "" if strength is None or not math.isfinite(strength) else f", {strength:+.1f} sigma"
    return f"{detail['kind']} {detail['colour']} at ({detail['x']}, {detail['y']}){sigma}"


def _printable(text: str) -> str:
    """Return a text on one line, with control characters and broken UTF-8 written as escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        # JSON has no such numbers.
        return None
    return _printable(value) if isinstance(value, str) else value


# --- channels


def complaints(settings: AlertSettings) -> tuple[str, ...]:
    """Return sentences about the URLs that no alert can be sent to."""
    return _opened(settings).complaints


def _opened(settings: AlertSettings) -> _Opened:
    """Make the channels that the settings name, and sentences about those that cannot be."""
    channels = []
    complaints = []
    for place, url in enumerate(settings.notify, 1):
        try:
            channels.append(_apprise_channel(url))
        except Exception as error:
            # Neither the URL nor what a plugin says of it is fit for the log: even its host may be a token.
            scheme = re.match(r"\w+://", url)
            named = f"URL {place} of alerts.notify ({scheme.group() if scheme else 'without a scheme'})"
            unknown = isinstance(error, ValueError)
            why = "apprise does not know it, or it lacks something" if unknown else type(error).__name__
            complaints.append(f"{named} cannot be used: {why}. The other channels go on.")
    if settings.command:
        channels.append(_command_channel(settings.command))
    return _Opened(settings, tuple(channels), tuple(complaints))


def _channel_id(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode("utf-8", "surrogateescape")).hexdigest()[:12]


def holds_secret(url: str) -> bool:
    """Tell whether an apprise URL holds a password or token; one that apprise cannot make sense of does not."""
    try:
        service = _apprise_service(url)
        # Which of its parts are secret only the service's own plugin knows.
        return bool(service.url(privacy=True) != service.url(privacy=False))
    except Exception:
        # Whatever a plugin raises, it would show the URL; `complaints` says that it cannot be used.
        return False


def _apprise_service(url: str) -> Any:
    """Return the service of an apprise URL. Takes half a second the first time.

    Raises
    ------
    ValueError
        If apprise cannot make sense of it.
    """
    for name in _TELL_SECRETS:
        logger = logging.getLogger(name)
        # Apprise keeps its own warnings for the result only if its logger lets them pass so far.
        logger.setLevel(logging.WARNING)
        logger.propagate = False
        if not logger.handlers:
            logger.addHandler(logging.NullHandler())
    import apprise

    # Within our own thread: its pools would hold up the end of the process. Its sockets have timeouts of 4 s.
    asset = apprise.AppriseAsset(app_id="hotpixd", app_desc="hotpixd", async_mode=False, service_timeout=0)
    service = apprise.Apprise.instantiate(url, asset=asset)
    if service is None:
        raise ValueError("not a URL for apprise")
    # Some services take 2000 characters and refuse more.
    service.overflow_mode = apprise.OverflowMode.SPLIT
    return service


def _apprise_channel(url: str) -> _Channel:
    """Return the channel of an apprise URL.

    Raises
    ------
    ValueError
        If apprise cannot make sense of it.
    """
    import apprise

    service = _apprise_service(url)
    sender = apprise.Apprise(asset=service.asset)
    sender.add(service)

    def send(message: Message) -> str | None:
        result = sender.notify(title=message.title, body=message.body, body_format=apprise.NotifyFormat.TEXT)
        if result:
            return None
        said = [_masked(entry.message, url.partition("://")[2]) for entry in result.logs()]
        return said[0] if said else "it says no more"

    masked = urlsplit(str(service.url(privacy=True)))
    return _Channel(_channel_id(url), f"{masked.scheme}://{masked.netloc.rpartition('@')[2]}", send)


def _masked(text: str, *secrets: str) -> str:
    """Return a text without any word of some secrets, in one line of reasonable length."""
    words = {word for secret in (*secrets, *map(unquote, secrets)) for word in re.split(r"[\s:/@?&=,;#+]+", secret)}
    for word in sorted(words, key=len, reverse=True):
        if len(word) >= 4:
            text = text.replace(word, "***")
    return _printable(text.strip())[:200]


def _command_channel(command: tuple[str, ...]) -> _Channel:
    def send(message: Message) -> str | None:
        # Files, not pipes: it need not read its input, and may leave something running that keeps its stderr open.
        with tempfile.TemporaryFile() as given, tempfile.TemporaryFile() as said:
            given.write(message.json().encode())
            given.seek(0)
            try:
                process = subprocess.Popen(
                    command,
                    stdin=given,
                    stdout=subprocess.DEVNULL,
                    stderr=said,
                    env={**os.environ, "HOTPIXD_MESSAGE_ID": message.id},
                    start_new_session=True,
                )
            except OSError as error:
                return f"it cannot be started: {error.strerror}"
            try:
                code = process.wait(_COMMAND_S)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                return f"it did not end within {_COMMAND_S:.0f} s and was killed"
            if code == 0:
                return None
            said.seek(0)
            last = said.read()[-1000:].decode("utf-8", "replace").strip().rpartition("\n")[2]
            return f"it ended with {code}" + (f": {_masked(last, *command[1:])}" if last else "")

    return _Channel(_channel_id("command", *command), f"command {_printable(Path(command[0]).name)}", send)


# --- conditions


class Watchman:
    """Watches conditions and raises an alert when one begins and when it ends.

    It remembers by the alerts themselves: what was alerted before a restart is not alerted again. `outcome`,
    `counted` and `clock` are not for shots folded again after an interruption, which were told of before.

    Parameters
    ----------
    clock : monotonic, s
    source_after_s : how long a source must be away before that is worth an alert
    """

    def __init__(
        self, alerts: Alerts, *, clock: Callable[[], float] = time.monotonic, source_after_s: float = 60.0
    ) -> None:
        self._alerts = alerts
        self._clock = clock
        self._source_after_s = source_after_s
        self._begun: dict[str, bool] = {}
        self._away_since: dict[str, float] = {}
        self._runs: dict[str, tuple[int, float, float]] = {}
        self._not_counted: Counter[str] = Counter()
        self._shoots: dict[str, _Shoot] = {}
        self._full_at: float | None = None
        self._stepped_at = -math.inf

    def report_to(self, alerts: Alerts) -> None:
        """Raise alerts there from now on. What has begun is known to have."""
        self._alerts = alerts

    def source(self, name: str, status: str, detail: str | None) -> None:
        """Tell how a source is: "starting", "watching", "away" or "trouble"; again and again."""
        subject = f"source:{name}"
        # Whoever left a silent camera on was told, and knows when its battery is empty.
        quietly = self._begun.get(f"silence:{name}", False)
        if status == "watching":
            self._away_since.pop(name, None)
            self._turn("source", subject, False, f"Source {name} is watched again.", quietly=quietly)
        elif status in ("away", "trouble"):
            since = self._away_since.setdefault(name, self._clock())
            if self._clock() - since > self._source_after_s:
                state = "is away" if status == "away" else "is in trouble"
                text = f"Source {name} {state}" + (f": {detail}" if detail else ".")
                self._turn("source", subject, True, text, quietly=quietly)

    def outcome(self, path: Path, fate: str, reason: str | None) -> None:
        """Tell what became of a shot.

        Of a run of refusals the first is alerted, the tenth, the hundredth, ..., and of the others those that the
        message of the first one still lists.
        """
        if fate not in ("refused", "unreadable"):
            return
        now = self._clock()
        count, began_at, last_at = self._runs.get(fate) or self._run_before_restart(fate)
        count, began_at = (1, now) if now - last_at > _RUN_ENDS_AFTER_S else (count + 1, began_at)
        listed = count <= _LISTED and now - began_at <= self._alerts.settings.gather_s
        if listed or count == 10 ** (len(str(count)) - 1):
            was = "was refused" if fate == "refused" else "could not be taken"
            by_now = "" if count == 1 else f" ({count} such shots by now)"
            detail = {"path": str(path), "reason": reason, "count": count}
            self._raise("refused", fate, f"{path.name} {was}{by_now}: {reason}", detail)
        self._runs[fate] = count, began_at, now

    def counted(self, sensor: str, description: str, counted: bool, because: str | None) -> None:
        """Tell whether a light or dark frame of a sensor was new evidence, and why not.

        Parameters
        ----------
        sensor : its id; two sensors may have one description
        description : its name for people
        """
        subject = f"scene:{sensor}"
        if counted:
            del self._not_counted[sensor]
            self._turn("scene", subject, False, f"{description}: frames are new evidence again.")
            return
        self._not_counted[sensor] += 1
        if self._not_counted[sensor] >= _NOT_COUNTED_IN_A_ROW:
            text = f"{description}: the last {_NOT_COUNTED_IN_A_ROW} frames were no new evidence: {because}"
            if because is not None and because.startswith(STATIC_SCENE):
                text += f". {STATIC_SCENE_ADVICE}"
            self._turn("scene", subject, True, text)

    def disk(self, free_bytes: int) -> None:
        """Tell how much space the state's disk has."""
        free_mb, least_mb = free_bytes / 1e6, self._alerts.settings.disk_free_mb
        if free_mb < least_mb:
            text = f"The state's disk is nearly full: {free_mb:.0f} MB are free, less than {least_mb:.0f} MB."
            self._turn("disk", "disk", True, text)
        elif free_mb > 1.2 * least_mb:
            self._turn("disk", "disk", False, f"The state's disk has room again: {free_mb:.0f} MB are free.")

    def clock(self, sensor: str, description: str, taken_at: datetime | None, received_at: datetime) -> None:
        """Tell when a shot was taken by its camera's clock (naive: zone unknown), and received by ours (aware).

        Parameters
        ----------
        sensor, description : as for `counted`
        """
        if taken_at is None:
            return
        taken = taken_at if taken_at.tzinfo else taken_at.replace(tzinfo=UTC)
        wrong = taken < _CLOCK_RESET or taken > received_at + _CLOCK_AHEAD
        if wrong:
            text = f"{description}: the camera's clock is wrong, or this computer's:"
            text += f" {taken:%Y-%m-%d %H:%M} in the camera, {received_at.astimezone(UTC):%Y-%m-%d %H:%M} UTC here."
        else:
            text = f"{description}: the camera's clock is right again."
        self._turn("clock", f"clock:{sensor}", wrong, text)

    def full(self, why: str) -> None:
        """Tell that the state's disk is full: shots are not taken."""
        self._full_at = self._clock()
        text = f"The state's disk is full: {why} Shots stay where they are until there is room."
        self._turn("disk", "full", True, text)

    def has_room(self, *, surely: bool) -> bool:
        """Tell that the state's disk does not seem full, or surely is not; return whether it counts as full no more."""
        if self._full_at is None:
            return True
        if not surely and self._clock() - self._full_at < _FULL_OVER_S:
            return False
        self._full_at = None
        self._turn("disk", "full", False, "The state's disk is no longer full: shots are taken again.")
        return True

    def stuck(self, name: str, what: str, since_s: float | None) -> None:
        """Tell that something of a source has not moved on for so long, or (None) that it does."""
        text = f"Source {name} {what}, and has not moved on for {_duration(since_s or 0.0)}; it is waited for."
        if since_s is None:
            text = f"Source {name} moves on again."
        self._turn("source", f"stuck:{name}", since_s is not None, text)

    def shot(self, source: str, waiting: int) -> None:
        """Tell that a new shot of a source has come, and how many wait there."""
        shoot = self._shoots.setdefault(source, _Shoot())
        now = self._clock()
        gap_s = self._alerts.age_of(f"silence:{source}") if shoot.last_at is None else now - shoot.last_at
        over = gap_s > _SHOOT_OVER_S
        text = f"Shots of {source} come again, the first for {_duration(gap_s)}."
        self._turn("silence", f"silence:{source}", False, text, quietly=over)
        if over or waiting > _ALONE:
            shoot.forget()
        shoot.add(now, self._silent_after_s(shoot))

    def recall(self, source: str, shots: Sequence[tuple[float, float | None]]) -> None:
        """Tell what is known of the last shots of a source, after a restart.

        Only those count that came as they were taken, which their own times tell: those of a card came at once.

        Parameters
        ----------
        shots : how long ago each one was received, s, and when it was taken by any clock, s; oldest first
        """
        shoot = self._shoots.setdefault(source, _Shoot())
        now = self._clock()
        taken_before: float | None = None
        for age_s, taken in shots:
            at = now - age_s
            if shoot.last_at is not None:
                gap_s = at - shoot.last_at
                apart = None if taken is None or taken_before is None else taken - taken_before
                if gap_s > _SHOOT_OVER_S or apart is None or abs(gap_s - apart) > 2.0 + 0.25 * abs(apart):
                    shoot.forget()
            shoot.add(at, self._silent_after_s(shoot))
            taken_before = taken

    def listen(self, source: str, *, there: bool) -> None:
        """Tell, again and again, whether a source is there; alerts if one is that has fallen silent.

        One that was taken away, or switched off, has ended its shoot: that it is away is told by `source`.
        """
        shoot = self._shoots.get(source)
        if shoot is None:
            return
        if not there:
            shoot.forget()
            return
        after_s = self._silent_after_s(shoot)
        silent_s = 0.0 if shoot.last_at is None else self._clock() - shoot.last_at
        if after_s is not None and silent_s > after_s:
            text = f"No shot of {source} for {_duration(silent_s)}; before, one came every {_duration(shoot.usual_s)}."
            self._turn("silence", f"silence:{source}", True, text)

    def shoot_ends(self) -> None:
        """Tell that whoever released the shutter has ended: that nothing comes is no news."""
        self._shoots.clear()

    def _silent_after_s(self, shoot: _Shoot) -> float | None:
        settings = self._alerts.settings
        if not settings.silence_times or not shoot.is_on:
            return None
        return max(settings.silence_times * shoot.usual_s, settings.silence_least_s)

    def checkpoint(self, uncovered_s: float, every_s: float) -> None:
        """Tell how long there have been shots that no checkpoint covers, and how often there is to be one."""
        least_s = self._alerts.settings.checkpoint_after_min * 60
        if not uncovered_s:
            self._turn("checkpoint", "checkpoint", False, "A checkpoint was written: it covers all shots.")
        elif least_s and uncovered_s > max(least_s, 2 * every_s):
            text = f"No checkpoint for {_duration(uncovered_s)}: a crash would cost as much work. No shot is in danger."
            self._turn("checkpoint", "checkpoint", True, text)

    def clock_step(self, step_s: float, booted_s: float) -> None:
        """Tell that this computer's clock was set.

        Parameters
        ----------
        step_s : by how much; below 0: back
        booted_s : how long ago the machine was started. Then it may be set once it knows better
        """
        least_s = self._alerts.settings.clock_step_s
        if not least_s or abs(step_s) <= least_s:
            return
        text = f"This computer's clock was set {'forward' if step_s > 0 else 'back'} by {_duration(abs(step_s))}."
        quietly = booted_s < _BOOTED_S or self._clock() - self._stepped_at < _STEPS_APART_S
        if not quietly:
            self._stepped_at = self._clock()
        self._raise("clock", "clock of this computer", text, {"step_s": round(step_s, 1)}, quietly=quietly)

    def damage(self, sentence: str) -> None:
        """Tell of damage found and worked around; each sentence is alerted once."""
        self._alerts.raise_("damage", "damage", f"damage:{sentence}", sentence)

    def _turn(self, topic: str, subject: str, begun: bool, text: str, *, quietly: bool = False) -> None:
        """Raise an alert if a condition begins or ends with this."""
        if subject not in self._begun:
            last = self._alerts.last(subject)
            self._begun[subject] = last is not None and bool(last.detail["begun"])
        if self._begun[subject] != begun:
            # Should the disk be full now, the alerts are asked again.
            del self._begun[subject]
            self._raise(topic, subject, text, {"begun": begun}, quietly=quietly)
            self._begun[subject] = begun

    def _run_before_restart(self, fate: str) -> tuple[int, float, float]:
        """Count of refusals and times of the first and the last one, as far as the last alert tells."""
        last = self._alerts.last(fate)
        if last is None:
            return 0, -math.inf, -math.inf
        # When it began is not known; its first message has gone out, or holds what it held.
        return int(last.detail["count"]), -math.inf, self._clock() - self._alerts.age_s(last.at)

    def _raise(self, topic: str, subject: str, text: str, detail: Mapping[str, Any], *, quietly: bool = False) -> None:
        last = self._alerts.last(subject)
        key = f"{subject}:{0 if last is None else last.id}"
        self._alerts.raise_(topic, subject, key, text, detail, quietly=quietly)


class _Shoot:
    """What the last shots of a source say of when the next one is to be expected."""

    def __init__(self) -> None:
        self.last_at: float | None = None
        self._intervals: deque[float] = deque(maxlen=_SHOOT_REMEMBERED)
        self._lasted_s = 0.0
        self._shots = 0

    def forget(self) -> None:
        """Begin anew."""
        self.last_at = None
        self._intervals.clear()
        self._lasted_s = 0.0
        self._shots = 0

    def add(self, at: float, longest_s: float | None) -> None:
        """Include a shot. A silence longer than `longest_s` is no interval."""
        if self.last_at is not None and (longest_s is None or at - self.last_at <= longest_s):
            self._intervals.append(at - self.last_at)
            self._lasted_s += at - self.last_at
        self.last_at = at
        self._shots += 1

    @property
    def usual_s(self) -> float:
        """Median of the intervals."""
        return statistics.median(self._intervals) if self._intervals else math.inf

    @property
    def is_on(self) -> bool:
        """Whether shots come as from a timer, and have for a while."""
        if self._shots < _SHOOT_SHOTS or self._lasted_s < _SHOOT_LASTS_S:
            return False
        usual_s = self.usual_s
        even = sum(usual_s / 2 <= interval <= 2 * usual_s for interval in self._intervals)
        return usual_s >= _SHOOT_LEAST_S and even >= _SHOOT_EVEN * len(self._intervals)


def _duration(seconds: float) -> str:
    """Say how long something lasts, in words of reasonable size."""
    for unit, word in ((86400.0, "days"), (3600.0, "h"), (60.0, "min")):
        if seconds >= 2 * unit:
            return f"{seconds / unit:.0f} {word}"
    return f"{seconds:.0f} s"
