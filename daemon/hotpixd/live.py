"""What the feed shows: turns outcomes, sensors and sources into the keys of the live state.

`daemon`, `sources`, `sensors` (ids, the one used last first), and for each of
them `sensor:<id>` with its counters and `defects:<id>` with its candidates and
defects. Counters are kept as shots come, since asking the ledger for them after
each shot would cost more the longer it is in use; the candidates are only
worked out while someone watches.
"""

from __future__ import annotations

import time
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from typing import Any

from hotpixd.core.sensor import FoldReport, Sensor
from hotpixd.monitor import Fate, Monitor, Outcome
from hotpixd.store.declared import DeclaredError
from hotpixd.store.state import State
from hotpixd.views import answers
from hotpixd.views.choices import MOST_LISTED
from hotpixd.views.text import agreement

Publish = Callable[[Mapping[str, Any]], None]

_RATE_OVER_S = 30.0
_DEFECTS_EVERY_S = 0.5
_RECENT_SHOWN = 32


class Live:
    """The live state of one run of the daemon.

    Parameters
    ----------
    publish : takes changed keys
    """

    def __init__(
        self, state: State, monitor: Monitor, publish: Publish, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._state = state
        self._monitor = monitor
        self._publish = publish
        self._clock = clock
        self.shots: Counter[str] = Counter()
        """Shots by what became of them, over all runs; those known already, of this run."""
        self.recount()
        self._sensors: OrderedDict[str, dict[str, Any]] = OrderedDict()
        self._folded_at: deque[float] = deque()
        self._stale: dict[str, None] = {}
        self._described_at: dict[str, float] = {}
        for id_ in self._by_last_use():
            self._sensors[id_] = {}
            self._stale[id_] = None
        self._publish({"sensors": list(self._sensors)})

    def _by_last_use(self) -> list[str]:
        last = {id_: self._state.ledger.last_shot(id_) for id_ in self._state.ledger.sensors()}
        return sorted(last, key=lambda id_: -(row.seq if (row := last[id_]) is not None else 0))

    @property
    def rate(self) -> float:
        """Shots folded per second of late."""
        now = self._clock()
        while self._folded_at and now - self._folded_at[0] > _RATE_OVER_S:
            self._folded_at.popleft()
        if len(self._folded_at) < 2:
            return 0.0
        return (len(self._folded_at) - 1) / max(now - self._folded_at[0], 1e-3)

    @property
    def sensors(self) -> Mapping[str, Mapping[str, Any]]:
        """Each sensor as last described; empty if it was not yet."""
        return self._sensors

    def recount(self) -> None:
        """Take the numbers of shots from the ledger. Those of a replay are in it already, or were not yet."""
        self.shots.clear()
        for tally in self._state.ledger.tally():
            self.shots.update(folded=tally.folded, refused=tally.refused, companion=tally.companion)

    def include(self, outcome: Outcome) -> None:
        """Take in what became of a shot, and publish the counters of its sensor at once."""
        self.shots[str(Fate.KNOWN if outcome.again else outcome.fate)] += 1
        id_ = outcome.sensor_id
        if outcome.report is None or id_ is None:
            return
        self._folded_at.append(self._clock())
        known = self._sensors.get(id_)
        if known:
            self._count(known, id_, outcome.report)
        else:
            self._describe(id_)
        self._sensors.move_to_end(id_, last=False)
        self._publish({"sensors": list(self._sensors), f"sensor:{id_}": self._sensors[id_]})
        self._stale[id_] = None

    def refresh(self, *, watched: bool) -> None:
        """Describe a sensor that was not described yet; if someone watches, publish the candidates that changed."""
        now = self._clock()
        for id_ in list(self._stale):
            new = not self._sensors[id_]
            if not new and (not watched or now - self._described_at[id_] < _DEFECTS_EVERY_S):
                continue
            del self._stale[id_]
            self._describe(id_)
            if new:
                # That may have meant reading hundreds of MB; the others come with the next calls.
                break

    def daemon(self, facts: Mapping[str, Any], sources: Iterable[Mapping[str, Any]], queue: int) -> None:
        """Publish how the daemon does."""
        self._publish(
            {
                "daemon": {**facts, "queue": queue, "rate": round(self.rate, 1), "shots": dict(self.shots)},
                "sources": list(sources),
            }
        )

    def around(self, id_: str, site: int, reach: int) -> dict[str, Any]:
        """Answer what the mean frame looks like around a site; see `Sensor.around`.

        Raises
        ------
        KeyError
            If there is no such sensor.
        """
        if id_ not in self._sensors:
            raise KeyError(id_)
        kept = self._monitor.sensor(id_)
        if not 0 <= site < kept.sensor.layout.size or not 0 <= reach <= 64:
            raise ValueError(f"site {site} with reach {reach} is not within sensor {id_}")
        patch = kept.sensor.around(site, reach).round(2).tolist()
        return {"patch": [[None if v != v else v for v in row] for row in patch]}

    def look_again(self, id_: str) -> None:
        """Describe a sensor anew at the next refresh: other defects are declared."""
        if id_ in self._sensors:
            self._stale[id_] = None

    def _describe(self, id_: str) -> None:
        """Publish all about a sensor anew."""
        kept = self._monitor.sensor(id_)
        sensor = kept.sensor
        known = self._sensors.setdefault(id_, {})
        if not known:
            known.update(answers.summary(self._state, id_, sensor.identity, sensor.overview, None))
            known.update(not_counting=None, min_frames=sensor.settings.min_frames)
        known.update(_counters(sensor))
        entries = answers.entries_of(self._state, kept, candidates=True)
        with suppress(DeclaredError):  # `verify` and `defects` tell of that
            declared = ((defect.x, defect.y) for defect in self._state.declared.of(id_))
            known.update(agreement=agreement([entry for _, entry in entries], declared))
        entries.sort(key=lambda entry: -(entry[1]["certainty"] or 0.0))
        entries = entries[:MOST_LISTED]
        recent = sensor.recent_excess([site for site, _ in entries])
        defects = [
            {"site": site, **entry, "recent": [round(e, 1) for e in excess[-_RECENT_SHOWN:]]}
            for (site, entry), excess in zip(entries, recent, strict=True)
        ]
        self._publish({f"sensor:{id_}": known, f"defects:{id_}": defects})
        self._described_at[id_] = self._clock()

    def _count(self, known: dict[str, Any], id_: str, report: FoldReport) -> None:
        known.update(_counters(self._monitor.sensor(id_).sensor), not_counting=report.not_counted_because)
        if report.not_counted_because is not None:
            reason = report.not_counted_because.split(":")[0]
            known["not_counted"] = {**known["not_counted"], reason: known["not_counted"].get(reason, 0) + 1}
        known["last_shot"] = answers.last_shot(self._state, id_)


def _counters(sensor: Sensor) -> dict[str, Any]:
    return {
        "frames": sensor.frames,
        "frames_counted": sensor.frames_counted,
        "threshold": sensor.threshold,
        **sensor.found,
        "kinds": sensor.kinds,
    }
