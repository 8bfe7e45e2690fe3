"""The history of sensors: turns frames and changes of life cycle into sessions, months, growth and remaps.

All of it comes from the ledger's rows, so it costs no more than reading these.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hotpixd import archive
from hotpixd.core.frame import SensorIdentity
from hotpixd.store import thinning
from hotpixd.store.ledger import Ledger, Timeline, TransitionRow
from hotpixd.store.state import State
from hotpixd.views.text import called, identity_words, sensor_name
from hotpixd.words import utc

Answer = dict[str, Any]

GAP_H = 6.0
"""Hours without a shot after which a new session begins."""

MONTH_S = 86_400 * 365.2425 / 12
"""The mean month."""

_REMAP_LEAST, _REMAP_SHARE = 3, 0.2
"""Defects, and share of those there were, that recover at once where a camera has remapped. Others do one by one."""

_RECOVERY_FRAMES = 13
"""Frames that show a site healthy before it counts as recovered, at the least; see `core.sensor`."""

_BETWEEN = 4.0
"""ln of how much likelier it is that a defect vanishes between two sessions than with a certain frame, about."""

_DOUBLING_C = 6.0
"""Warming that doubles the dark current of silicon, about."""

_FRAMES_LOOKED_AT = 384
"""Frames, evenly spread over those kept, that tell what it takes to see a defect."""

_COLDER_C = 6.0
"""Cooling that halves dark current: then defects may be hidden, not gone."""

_SHOWN, _HEALTHY = 0.8, 0.04
"""Shares of frames in which a defect has an event, about, and in which a healthy site has: 2/49."""

_EVENTS = 15
"""Bits of an observation's events: of all four kinds."""

_ALIKE_S = 86_400.0
"""Time after the first session below which there is no growth to speak of."""


def history(state: State, *, sensor: str | None = None, since: str | None = None, gap_h: float = GAP_H) -> Answer:
    """Answer how the defects of each sensor came and went.

    Parameters
    ----------
    sensor : which sensors, see `chosen`
    since
        ISO 8601 date or time, UTC; then `new` holds the defects that were not stable before, and sessions, months and
        events from before are left out
    gap_h : hours without a shot that part two sessions

    Raises
    ------
    ValueError
        If the date is none, or the gap.
    """
    since_s = None if since is None else moment_s(since)
    if not 0 < gap_h <= 24 * 366:
        raise ValueError(f"a gap between sessions is more than 0 hours and at most a year, got {gap_h:g}")
    told = []
    ids, unknown = chosen(state.ledger, sensor)
    for id_ in ids:
        identity = archive.identity_from(state.ledger.sensors()[id_])
        told.append({**identity_words(id_, identity), **of_sensor(state.ledger, id_, identity, gap_h, since_s)})
    return {"since": since, "gap_h": gap_h, "sensors": told, **unknown}


def chosen(ledger: Ledger, wanted: str | None) -> tuple[list[str], dict[str, str]]:
    """Return the ids of the sensors that a user's word means: an id, a serial number, or a part of a name.

    If it means none of those there are, the answer gets a sentence about that, under `unknown`.
    """
    known = [identity_words(id_, archive.identity_from(about)) for id_, about in ledger.sensors().items()]
    found = known if wanted is None else called(known, wanted)
    names = "; ".join(map(sensor_name, known))
    unknown = {} if found or not known else {"unknown": f"no sensor is called {wanted!r}; there are: {names}"}
    return [sensor["id"] for sensor in found], unknown


def moment_s(text: str) -> float:
    """Return the UNIX time of an ISO 8601 date or time; UTC if it names no zone."""
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise ValueError(f"a date is given as {date(2026, 1, 31).isoformat()}, not {text!r}") from None
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()


def of_sensor(ledger: Ledger, id_: str, identity: SensorIdentity, gap_h: float, since_s: float | None) -> Answer:
    """Tell the history of one sensor; the keys of `history` below `sensors`."""
    frames = ledger.timeline(id_)
    transitions = ledger.transitions(id_)
    if not len(frames.seqs):
        nothing: Answer = {"frames": 0, "frames_counted": 0, "defects_now": 0, "growth": None}
        nothing |= {"begin": None, "end": None, "sessions_in_all": 0}
        return nothing | {key: [] for key in ("sessions", "months", "remaps", "defects", "events", "new")}
    sessions = Sessions(frames, gap_h)
    lives = _lives(transitions, frames)
    shown = _Shown(ledger, id_, [life.site for life in lives], frames)
    for life in lives:
        life.from_start = life.from_start or shown.before(life) < _RECOVERY_FRAMES
    remaps = _remaps(lives, shown, frames, sessions)
    addresses = {life.site: identity.layout.address(life.site) for life in lives}
    last_seqs, numbers = _last_seen(ledger, id_, lives, frames), _sessions_with(lives, frames, sessions)
    told = [
        _told(life, addresses[life.site], sessions, last_seqs.get(life.site), number)
        for life, number in zip(lives, numbers, strict=True)
    ]
    changes = sorted(
        ((seq, change, life) for life in lives for seq, change in life.changes), key=lambda c: (c[0], c[2].site)
    )
    change_s = [(sessions.time_s(seq), change) for seq, change, _ in changes]
    answer: Answer = {
        "frames": len(frames.seqs),
        "frames_counted": int(frames.counted.sum()),
        "begin": when(sessions.first_s[0]),
        "end": when(sessions.last_s[-1]),
        "sessions_in_all": len(sessions.first_s),
        "defects_now": sum(life.stable for life in lives),
        "sessions": _sessions_told(sessions, frames, changes),
        "months": _months(frames, change_s),
        "growth": _growth(lives, sessions),
        "remaps": remaps,
        "defects": told,
        "events": [
            {
                "at": when(sessions.time_s(seq)),
                "session": sessions.of(seq),
                "change": change,
                **dict(zip(("x", "y", "colour"), addresses[life.site], strict=True)),
                "kind": life.kind,
            }
            for seq, change, life in changes
        ],
        "new": []
        if since_s is None
        else [one for one, life in zip(told, lives, strict=True) if sessions.time_s(life.stable_seqs[0]) >= since_s],
    }
    return answer if since_s is None else answer | _since(answer, since_s)


def _since(answer: Answer, since_s: float) -> Answer:
    """Return the sessions, months and events of an answer without those that were over before a moment."""
    sessions = [one for one in answer["sessions"] if moment_s(one["end"]) >= since_s]
    return {
        "sessions": sessions,
        # From the one in which the first of them begins; its numbers are those of the whole month.
        "months": [one for one in answer["months"] if sessions and one["month"] >= sessions[0]["begin"][:7]],
        "events": [one for one in answer["events"] if moment_s(one["at"]) >= since_s],
    }


def when(time_s: float) -> str:
    """Write a UNIX time as all answers do."""
    return utc(float(time_s))


class Sessions:
    """Frames by time, parted where nothing was shot for some hours. Sessions are numbered from 1."""

    def __init__(self, frames: Timeline, gap_h: float) -> None:
        self._seqs, self._times_s = frames.seqs, frames.times_s
        order = np.argsort(frames.times_s, kind="stable")
        begins = np.diff(frames.times_s[order], prepend=frames.times_s[order[:1]]) > gap_h * 3600
        self.numbers: NDArray[np.int64] = np.empty(len(order), np.int64)
        """(frames,) session of each frame, in the order of the timeline."""
        self.numbers[order] = 1 + np.cumsum(begins)
        self.first_s = frames.times_s[order][np.flatnonzero(np.r_[True, begins[1:]])]
        """(sessions,) UNIX time of the first frame of each."""
        self.last_s = frames.times_s[order][np.r_[np.flatnonzero(begins[1:]), len(order) - 1]]
        """(sessions,) and of the last."""

    def _at(self, seq: int) -> int:
        # The frame, or where a ledger lacks it, the one after it.
        return min(int(np.searchsorted(self._seqs, seq)), len(self._seqs) - 1)

    def of(self, seq: int) -> int:
        """Return the session of a frame."""
        return int(self.numbers[self._at(seq)])

    def time_s(self, seq: int) -> int:
        """Return when a frame was taken, UNIX time."""
        return int(self._times_s[self._at(seq)])


@dataclass(slots=True)
class _Life:
    """A site that was stable at some time."""

    site: int
    kind: str
    excess_sigma: float | None
    appeared: int
    """Seq of the frame with which it became a candidate."""
    changes: list[tuple[int, str]]
    """(seq, "stable" or "recovered"), in order."""
    from_start: bool = False
    """Whether it may have been there before the first frame."""

    @property
    def stable_seqs(self) -> list[int]:
        return [seq for seq, change in self.changes if change == "stable"]

    @property
    def stable(self) -> bool:
        """Whether it is stable now."""
        return self.changes[-1][1] == "stable"


def _lives(transitions: Iterable[TransitionRow], frames: Timeline) -> list[_Life]:
    """Return all sites that were ever stable, in the order of becoming so."""
    appeared: dict[int, int] = {}
    lives: dict[int, _Life] = {}
    # What happens with one frame happens in this order, not in that of its name.
    order = {"dropped": 0, "appeared": 1, "recovered": 2, "stable": 3}
    for row in sorted(transitions, key=lambda row: (row.seq, row.site, order[row.change])):
        if row.change == "appeared":
            appeared[row.site] = row.seq
        elif row.change == "stable":
            kind, sigma = str(row.detail.get("kind", "")), row.detail.get("excess_sigma")
            life = lives.setdefault(row.site, _Life(row.site, kind, sigma, appeared.get(row.site, row.seq), changes=[]))
            life.kind, life.excess_sigma = kind, sigma
            life.changes.append((row.seq, "stable"))
        elif row.change == "recovered" and row.site in lives:
            lives[row.site].changes.append((row.seq, "recovered"))
    counted = frames.seqs[frames.counted]
    for life in lives.values():
        candidate, stable = np.searchsorted(counted, (life.appeared, life.stable_seqs[0]))
        # Half of the evidence makes a candidate: one that was always there needs about as long for the other half.
        life.from_start = bool(candidate <= 2 * (stable - candidate) + _RECOVERY_FRAMES)
    return list(lives.values())


def _last_seen(ledger: Ledger, id_: str, lives: Sequence[_Life], frames: Timeline) -> dict[int, int]:
    """Return by site the seq of the last counted frame in which a stable defect had an event.

    Of the latest frames alone all observations are kept: of a defect that had none in these it is not known. Nor of one
    that has recovered, as a healthy site has an event now and then.
    """
    latest = frames.seqs[frames.counted][-thinning.LATEST :]
    sites = np.array(sorted(life.site for life in lives if life.stable), np.int64)
    seen = ledger.excesses(id_, latest, sites)[2] & _EVENTS != 0
    return {int(site): int(latest[np.flatnonzero(row)[-1]]) for site, row in zip(sites, seen, strict=True) if row.any()}


def _sessions_with(lives: Sequence[_Life], frames: Timeline, sessions: Sessions) -> list[int]:
    """Return in how many sessions each site was under suspicion or a defect: those with a frame of that time."""
    spans = [
        (n, start if k else life.appeared, 2**62 if end is None else end)
        for n, life in enumerate(lives)
        for k, (start, end) in enumerate(_spans(life.changes))
    ]
    owners, starts, ends = np.array(spans, np.int64).reshape(-1, 3).T
    numbers = np.zeros(len(lives), np.int64)
    for session in range(1, len(sessions.first_s) + 1):
        seqs = frames.seqs[sessions.numbers == session]
        numbers[np.unique(owners[np.searchsorted(seqs, starts) < np.searchsorted(seqs, ends)])] += 1
    return [int(number) for number in numbers]


def _told(life: _Life, address: tuple[int, int, str], sessions: Sessions, last_seq: int | None, number: int) -> Answer:
    ended = None if life.stable else life.changes[-1][0]
    return {
        **dict(zip(("x", "y", "colour"), address, strict=True)),
        "kind": life.kind,
        "state": "stable" if life.stable else "recovered",
        "excess_sigma": life.excess_sigma,
        "onset": when(sessions.time_s(life.appeared)),
        "onset_session": sessions.of(life.appeared),
        "from_start": life.from_start or sessions.of(life.appeared) == 1,
        "stable_since": when(sessions.time_s(life.stable_seqs[-1])),
        "first_stable": when(sessions.time_s(life.stable_seqs[0])),
        "recovered": None if ended is None else when(sessions.time_s(ended)),
        "last_seen": None if last_seq is None else when(sessions.time_s(last_seq)),
        "sessions": number,
        "changes": [
            {"at": when(sessions.time_s(seq)), "session": sessions.of(seq), "change": change}
            for seq, change in life.changes
        ],
    }


def _sessions_told(sessions: Sessions, frames: Timeline, changes: Sequence[tuple[int, str, _Life]]) -> list[Answer]:
    stable = np.zeros(len(sessions.first_s) + 1, np.int64)
    recovered = stable.copy()
    for seq, change, _ in changes:
        (stable if change == "stable" else recovered)[sessions.of(seq)] += 1
    total = np.bincount(sessions.numbers, minlength=len(stable))
    counted = np.bincount(sessions.numbers, frames.counted, minlength=len(stable)).astype(int)
    darks = np.bincount(sessions.numbers, frames.dark, minlength=len(stable)).astype(int)
    coldest, warmest = _extremes(sessions, frames.sensor_temp_c)
    shortest, longest = _extremes(sessions, frames.exposure_s)
    defects = np.cumsum(stable - recovered)
    return [
        {
            "session": n,
            "begin": when(sessions.first_s[n - 1]),
            "end": when(sessions.last_s[n - 1]),
            "frames": int(total[n]),
            "frames_counted": int(counted[n]),
            "darks": int(darks[n]),
            "exposure_s": [shortest[n], longest[n]],
            "sensor_temp_c": [coldest[n], warmest[n]],
            "new": int(stable[n]),
            "recovered": int(recovered[n]),
            "defects": int(defects[n]),
        }
        for n in range(1, len(stable))
    ]


def _extremes(sessions: Sessions, values: NDArray[np.float64]) -> tuple[list[float | None], list[float | None]]:
    """Return the least and the greatest of each session, from index 1 on; None where nothing is known."""
    low, high = np.full(len(sessions.first_s) + 1, np.inf), np.full(len(sessions.first_s) + 1, -np.inf)
    known = np.isfinite(values)
    np.minimum.at(low, sessions.numbers[known], values[known])
    np.maximum.at(high, sessions.numbers[known], values[known])
    return tuple([round(v, 6) if math.isfinite(v) else None for v in side.tolist()] for side in (low, high))  # type: ignore[return-value]


def _months(frames: Timeline, changes: Sequence[tuple[int, str]]) -> list[Answer]:
    """Tell for each calendar month with frames (UTC) what came and went, and how many defects there were at its end."""
    months = frames.times_s.astype("datetime64[s]").astype("datetime64[M]")
    told: dict[str, Answer] = {
        str(month): {"month": str(month), "frames": int(n), "new": 0, "recovered": 0, "defects": 0}
        for month, n in zip(*np.unique(months, return_counts=True), strict=True)
    }
    for time_s, change in changes:
        told[when(time_s)[:7]]["new" if change == "stable" else "recovered"] += 1
    now = 0
    for month in told.values():
        now += month["new"] - month["recovered"]
        month["defects"] = now
    return list(told.values())


def _growth(lives: Sequence[_Life], sessions: Sessions) -> Answer | None:
    """Estimate how many defects come per month; None if the frames are of too short a time.

    A Poisson process, observed since the end of the first session. Defects that may have been there before are none of
    it.
    """
    begin_s, end_s = int(sessions.last_s[0]), int(sessions.last_s[-1])
    if end_s - begin_s < _ALIKE_S:
        return None
    new = [life for life in lives if not life.from_start and sessions.of(life.appeared) > 1]
    months = (end_s - begin_s) / MONTH_S
    low, high = poisson_interval(len(new))
    return {
        "new": len(new),
        "months": round(months, 2),
        "per_month": round(len(new) / months, 3),
        "low": round(low / months, 3),
        "high": round(high / months, 3),
        "confidence": 0.95,
    }


def poisson_interval(count: int, z: float = 1.959964) -> tuple[float, float]:
    """Return the limits of a Poisson mean of which `count` was seen, central, 95 % by default.

    Wilson and Hilferty (1931) for the exact limits of Garwood (1936): right to 1 % from count = 1 on.
    """
    low = 0.0 if count == 0 else count * (1 - 1 / (9 * count) - z / (3 * math.sqrt(count))) ** 3
    above = count + 1
    return max(low, 0.0), above * (1 - 1 / (9 * above) + z / (3 * math.sqrt(above))) ** 3


class _Shown:
    """In which frames which site showed that it is a defect, and in which it would have.

    Dark current grows with exposure, ISO and temperature: a frame of less of these than it took to see a defect before
    tells nothing of it. Dark and light frames are told apart.
    """

    def __init__(self, ledger: Ledger, id_: str, sites: Sequence[int], frames: Timeline) -> None:
        self._frames = frames
        gain = np.where(np.isfinite(frames.iso) & (frames.iso > 0), frames.iso / 100, 1.0)
        exposure = np.where(np.isfinite(frames.exposure_s) & (frames.exposure_s > 0), frames.exposure_s, 1.0)
        usual = _median(frames.sensor_temp_c) or 0.0
        temp = np.where(np.isfinite(frames.sensor_temp_c), frames.sensor_temp_c, usual)
        self._leak = exposure * gain * 2.0 ** ((temp - usual) / _DOUBLING_C)
        """(frames,) what multiplies a dark current, in units of its own."""
        seqs = np.intersect1d(ledger.frames_observed(id_), frames.seqs)
        if len(seqs) > _FRAMES_LOOKED_AT:
            seqs = seqs[np.linspace(0, len(seqs) - 1, _FRAMES_LOOKED_AT).astype(int)]
        self._seqs = seqs
        self._at = np.searchsorted(frames.seqs, seqs)
        ordered = np.array(sorted(sites), np.int64)
        self._rows = {int(site): row for row, site in enumerate(ordered)}
        self._events = ledger.excesses(id_, seqs, ordered)[2] & _EVENTS != 0

    def _telling(self, life: _Life, at: NDArray[np.int64], *, surely: bool) -> NDArray[np.bool_]:
        """Tell for some frames, by their places in the timeline, whether they would have shown a defect.

        Surely: most frames like them do. Else a quarter of those that showed it had less.
        """
        known = self._frames
        ended = life.changes[-1][0] if not life.stable else math.inf
        alive = (self._seqs >= life.appeared) & (self._seqs < ended)
        telling = np.zeros(len(at), bool)
        for dark in (True, False):
            own = np.flatnonzero(alive & (known.dark[self._at] == dark))
            own = own[np.argsort(-self._leak[self._at[own]], kind="stable")]
            seen = self._events[self._rows[life.site], own]
            if not seen.any():
                continue
            leaks = self._leak[self._at[own]]
            # From the strongest down, to where no longer most show it.
            most = np.cumsum(np.where(seen, 1, -1))
            enough = leaks[np.argmax(most)] if surely else np.quantile(leaks[seen], 0.25)
            if not surely or most.max() > 0:
                enough *= 0.99
                telling |= (known.dark[at] == dark) & (self._leak[at] >= enough)
        return telling

    def before(self, life: _Life) -> int:
        """Return how many counted frames before the first sign of a defect would have shown it."""
        at = np.flatnonzero(self._frames.counted & (self._frames.seqs < life.appeared))
        return int(self._telling(life, at, surely=True).sum())

    def gone(self, life: _Life, stable: int, recovered: int, sessions: Sessions) -> tuple[int, int]:
        """Return the last frame that shows a defect, and the first that would have and does not.

        Parameters
        ----------
        stable, recovered : seqs between which it went
        """
        counted = self._frames.seqs[self._frames.counted]
        latest = int(counted[max(int(np.searchsorted(counted, recovered)) - _RECOVERY_FRAMES + 1, 0)])
        inside = (self._seqs > stable) & (self._seqs <= recovered)
        inside[inside] = self._telling(life, self._at[inside], surely=False)
        at, seen = self._seqs[inside], self._events[self._rows[life.site]][inside]
        # The likeliest split of frames with an event from frames without.
        gain = np.where(seen, math.log(_SHOWN / _HEALTHY), math.log((1 - _SHOWN) / (1 - _HEALTHY)))
        sums = np.r_[0.0, np.cumsum(gain)]
        split = int(np.argmax(sums))
        # A healthy site has an event now and then: what is about as likely between two sessions was there.
        edges = 1 + np.flatnonzero(np.diff([sessions.of(seq) for seq in at.tolist()]))
        if len(edges) and (best := edges[np.argmax(sums[edges])]) and sums[best] > sums[split] - _BETWEEN:
            split = int(best)
        if split == 0:
            # Too weak to go by, or what would tell is thinned.
            before = counted[max(int(np.searchsorted(counted, latest)) - 1, 0)]
            return max(stable, int(before)), latest
        return int(at[split - 1]), min(int(at[split]), latest) if split < len(at) else max(latest, int(at[split - 1]))


def _remaps(lives: Sequence[_Life], shown: _Shown, frames: Timeline, sessions: Sessions) -> list[Answer]:
    """Tell where many defects vanished between two sessions, as when the camera's own remapping was run."""
    groups: dict[int, list[tuple[_Life, int, int]]] = {}
    for life in lives:
        for seq, change in life.changes:
            if change != "recovered":
                continue
            stable = max((s for s, change in life.changes if change == "stable" and s < seq), default=life.appeared)
            last, first = shown.gone(life, stable, seq, sessions)
            if sessions.of(last) < sessions.of(first):
                groups.setdefault(sessions.of(first), []).append((life, seq, last))
    told = []
    for session, group in sorted(groups.items()):
        edge_s = sessions.first_s[session - 1]
        healed = {life.site for life, _, _ in group}
        there = sum(
            any(
                sessions.time_s(a) < edge_s and (b is None or sessions.time_s(b) >= edge_s)
                for a, b in _spans(life.changes)
            )
            for life in lives
        )
        if len(healed) < _REMAP_LEAST or len(healed) < _REMAP_SHARE * there:
            continue
        # Most decide: a healthy site may have an event by chance.
        before = int(np.median([sessions.of(last) for _, _, last in group]))
        temps = [_median(frames.sensor_temp_c[sessions.numbers == number]) for number in (before, session)]
        colder = None not in temps and temps[1] < temps[0] - _COLDER_C  # type: ignore[operator]
        back = {life.site for life, seq, _ in group if any(c == "stable" and s > seq for s, c in life.changes)}
        told.append(
            {
                "after": when(sessions.last_s[before - 1]),
                "before": when(edge_s),
                "session": session,
                "defects": len(healed),
                "of": there,
                "came_back": len(back),
                "cause": "colder" if colder else "remap",
                "sensor_temp_c": temps,
                "recovered": when(max(sessions.time_s(seq) for _, seq, _ in group)),
            }
        )
    return told


def _spans(changes: Sequence[tuple[int, str]]) -> Iterable[tuple[int, int | None]]:
    """Yield (stable, recovered) of each time that a site was stable."""
    for (seq, change), (after, then) in pairwise([*changes, (None, "")]):
        if change == "stable" and seq is not None:
            yield seq, after if then == "recovered" else None


def _median(values: NDArray[np.float64]) -> float | None:
    known = values[np.isfinite(values)]
    return round(float(np.median(known)), 2) if len(known) else None
