"""What the reading commands answer: turns an open state into plain values, ready for JSON.

The keys are a contract with programs outside this repository.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import fields
from datetime import UTC, datetime
from typing import Any

from hotpixd import archive
from hotpixd.archive import Kept
from hotpixd.core.frame import SensorIdentity
from hotpixd.core.overview import Overview
from hotpixd.store.declared import DeclaredError
from hotpixd.store.durable import StateDamaged, StateError
from hotpixd.store.ledger import ShotRow, Tally
from hotpixd.store.state import State
from hotpixd.views.text import identity_words
from hotpixd.words import utc

Answer = dict[str, Any]

Sensors = Iterable[tuple[str, Kept]]
"""Sensors with their ids. Whoever holds some in memory gives them; else all are read from the disk."""


def answer(
    state: State,
    question: str,
    arguments: Mapping[str, Any],
    sensors: Sensors | None = None,
    progress: Callable[[], object] = lambda: None,
) -> Answer:
    """Answer a question by its name, be it asked here or over the daemon's socket.

    Parameters
    ----------
    progress : called now and then while an answer takes long

    Raises
    ------
    KeyError
        If there is no such question.
    """
    match question:
        case "status":
            return status(state, sensors)
        case "defects":
            return {
                **defects(state, candidates=bool(arguments.get("candidates")), sensors=sensors),
                "waiting": waiting(state) if sensors is None else 0,
            }
        case "least-variance":
            return least_variance(state, int(arguments.get("k", 10)), sensors)
        case "verify":
            return verify(state, progress)
        case "generation":
            return {
                "path": generation(state, str(arguments["sensor"])),
                "waiting": waiting(state) if sensors is None else 0,
            }
        case "report":
            return report(state, str(arguments["sensor"]), sensors)
        case "history":
            from hotpixd.views import history

            return history.history(state, **arguments)
    raise KeyError(question)


_ALERTS = 50
"""Latest alerts that a status tells."""


def status(state: State, sensors: Sensors | None = None) -> Answer:
    """Sensors with their counters, all shots by verdict, what was refused and why."""
    tallies = {tally.sensor_id: tally for tally in state.ledger.tally()}
    if sensors is None:
        known = state.ledger.sensors().items()
        identities = ((id_, archive.identity_from(description)) for id_, description in known)
        given = [(id_, identity, archive.overview(state, id_, identity)) for id_, identity in identities]
    else:
        given = [(id_, kept.sensor.identity, kept.sensor.overview) for id_, kept in sensors]
    described = [summary(state, *sensor, tallies.get(sensor[0])) for sensor in given]
    every = tallies.values()
    return {
        "state": str(state.root),
        "sensors": described,
        "shots": {f.name: sum(getattr(t, f.name) for t in every) for f in fields(Tally) if f.name != "sensor_id"},
        "refused": [{"name": row.name, "path": row.path, "reason": row.reason} for row in state.ledger.refused()],
        "last_shot": last_shot(state),
        "sources": [],
        "alerts": state.ledger.alerts(_ALERTS),
        # Of a run of the daemon, which fills them in.
        "daemon": None,
        "metrics": None,
        "series": None,
    }


def summary(state: State, id_: str, identity: SensorIdentity, overview: Overview, tally: Tally | None) -> Answer:
    """One sensor of `status`."""
    return {
        **_described(id_, identity, overview, tally),
        **overview.found,
        "not_counted": state.ledger.not_counted(id_),
        "last_shot": last_shot(state, id_),
    }


def last_shot(state: State, id_: str | None = None) -> Answer | None:
    """Describe the shot received last, of one sensor or of all."""
    row = state.ledger.last_shot(id_)
    return None if row is None else _shot(row)


def defects(state: State, *, candidates: bool = False, sensors: Sensors | None = None) -> Answer:
    """Stable defects of every sensor, by position; with `candidates` those not yet stable and the recovered too."""
    tallies = {tally.sensor_id: tally for tally in state.ledger.tally()}
    answer = []
    for id_, kept in _given(state, sensors):
        entries = [entry for _, entry in entries_of(state, kept, candidates=candidates)]
        about = {**describe(kept, tallies.get(id_)), "min_frames": kept.sensor.settings.min_frames}
        answer.append({**about, "defects": entries, **declared(state, id_)})
    return {"sensors": answer}


def declared(state: State, id_: str) -> Answer:
    """Return what users and other programs' lists declare of a sensor, by position; why not, if that is damaged.

    Each pixel once: since when and by whom it was declared first, and by all who did.
    """
    try:
        known = state.declared.of(id_)
    except DeclaredError as error:
        # What was found can be believed all the same.
        return {"declared": [], "declared_unusable": str(error)}
    pixels: dict[tuple[int, int], Answer] = {}
    for d in known:
        first = {"x": d.x, "y": d.y, "source": d.source, "declared_at": d.declared_at, "sources": []}
        pixels.setdefault((d.x, d.y), first)["sources"].append(d.source)
    return {"declared": list(pixels.values())}


def generation(state: State, id_: str) -> str | None:
    """Return where the newest usable generation is. It never changes, but goes when there are two newer ones."""
    if id_ not in state.ledger.sensors():
        raise KeyError(id_)
    path = next(iter(archive.look(state, id_, 1).usable), None)
    return None if path is None else str(path.absolute())


def entries_of(state: State, kept: Kept, *, candidates: bool) -> list[tuple[int, Answer]]:
    """Return the defects of one sensor by position, each with its site."""
    found = kept.sensor.defects(candidates=candidates)
    times = state.ledger.times({seq for d in found for seq in (d.first_seq, d.stable_seq) if seq is not None})
    entries = []
    for defect in found:
        x, y, colour = kept.sensor.layout.address(defect.site)
        entry = {
            "x": x,
            "y": y,
            "colour": colour,
            "kind": defect.kind,
            "state": defect.status,
            "certainty": round(defect.certainty, 4),
            "log_e": _rounded(defect.log_e, 3),
            "excess_adu": _rounded(defect.excess_adu, 3),
            "excess_sigma": _rounded(defect.excess_sigma, 3),
            "dark_current_adu_per_s": _rounded(defect.dark_current_adu_per_s, 3),
            "dark_current_iso": _rounded(defect.dark_current_iso, 1),
            "share_on": _rounded(defect.share_on, 3),
            "level_adu": _rounded(defect.level_adu, 1),
            "first_seen": times.get(defect.first_seq),
            "stable_since": None if defect.stable_seq is None else times.get(defect.stable_seq),
            "frames_to_stable": defect.frames_to_stable,
        }
        entries.append((defect.site, entry))
    return entries


def report(state: State, id_: str, sensors: Sensors | None = None) -> Answer:
    """All that a report shows of one sensor, but for its history; see `evidence`.

    Raises
    ------
    KeyError
        If there is no such sensor.
    """
    from hotpixd.views import evidence

    about = state.ledger.sensors()[id_]
    if sensors is None:
        sensors = [(id_, _loaded(state, id_, about))]
    kept = next(kept for found, kept in sensors if found == id_)
    (found,) = defects(state, candidates=True, sensors=[(id_, kept)])["sensors"]
    entries = found.pop("defects")
    return {**found, "declared": found.get("declared", []), **evidence.of_sensor(state, kept, entries)}


def least_variance(state: State, k: int, sensors: Sensors | None = None) -> Answer:
    """The k samples of least variance over all frames, per sensor; ties by position."""
    tallies = {tally.sensor_id: tally for tally in state.ledger.tally()}
    answer = []
    for id_, kept in _given(state, sensors):
        layout = kept.sensor.layout
        least = []
        if kept.sensor.frames:
            for site, m2, mean in zip(*kept.sensor.accumulator.least_variance(k), strict=True):
                x, y, colour = layout.address(int(site))
                channel = layout.channel(int(site))
                least.append(
                    {"x": x, "y": y, "channel": channel, "colour": colour, "m2": float(m2), "mean": float(mean)}
                )
        answer.append({**describe(kept, tallies.get(id_)), "least": least})
    return {"sensors": answer}


def verify(state: State, progress: Callable[[], object] = lambda: None) -> Answer:
    """Check every digest of the state.

    `ok` is false if anything that was written can no longer be believed; `problems` says what, in sentences. Shots
    received and not folded yet are no damage: the next run folds them from the spool, if they are whole there.

    Parameters
    ----------
    progress : called for each sensor, and for each block of the spool that was read
    """
    problems = []
    try:
        state.ledger.check()
        archive.check_sensors(state)
    except StateError as error:
        problems.append(str(error))
    problems += state.declared.problems()
    sensors: list[Answer] = []
    covers: dict[str, int] = {}
    older: dict[str, int] = {}
    spooled_after: dict[str, int] = {}
    for id_, kept in _given(state, None):
        progress()
        covers[id_], older[id_], spooled_after[id_] = kept.covers, kept.covered_by_older or 0, kept.spooled_after
        keys = state.ledger.frame_keys(id_, kept.covers)
        problems += [f"{sentence} {archive.REFOLDED}" for sentence in kept.damage]
        sensors.append({**describe(kept), "digest": kept.sensor.digest(keys)})
    if state.forgotten:
        problems.append(
            f"The ledger {state.ledger.path} lacks the last {state.forgotten} of the shots that were acknowledged. Scan"
            " their files once more; those in the spool are kept as evidence."
        )
    if state.mark_unusable:
        problems.append(f"{archive.mark_unusable(state)} The next scan or start of the daemon begins it anew.")
    waiting = state.ledger.rows_to_replay(covers)
    problems += [
        f"{row.name} was received but its copy in the spool is gone or was changed. If the original is not in its place"
        " either, scan its file once more."
        for row in waiting
        if not state.spool.verify(row.key, progress)
    ]
    seqs = {row.seq for row in waiting}
    for row in state.ledger.rows_to_replay(older):
        copy = state.spool.path(row.key)
        there = os.path.lexists(copy)
        wanted = there or row.seq > spooled_after.get(row.sensor_id or "", 0)
        if row.seq not in seqs and wanted and not state.spool.verify(row.key, progress):
            problems.append(
                f"The copy of {row.name} in the spool ({copy}) is {'damaged' if there else 'gone'}. Nothing is lost as"
                " long as the newest generation of its sensor is whole: the copy is needed if that is damaged. Scan"
                f" the original ({row.path}) once more, if it is as it was, and the copy is made anew; the next scan of"
                " new shots of that sensor makes it superfluous."
            )
    return {"ok": not problems, "sensors": sensors, "waiting": len(waiting), "problems": problems}


def damaged(error: StateDamaged) -> Answer:
    """Answer `verify` for a state whose ledger cannot even be opened."""
    return {"ok": False, "sensors": [], "waiting": 0, "problems": [str(error)]}


def waiting(state: State) -> int:
    """Return how many shots were received but are in no generation yet, after an interruption."""
    return len(state.ledger.rows_to_replay(archive.covers(state)))


def _given(state: State, sensors: Sensors | None) -> Iterator[tuple[str, Kept]]:
    if sensors is not None:
        yield from sensors
        return
    # One at a time: a sensor of 45 megapixels takes a gigabyte.
    for id_, description in state.ledger.sensors().items():
        yield id_, _loaded(state, id_, description)


def _loaded(state: State, id_: str, description: Mapping[str, Any]) -> Kept:
    from hotpixd.core.sensor import Sensor

    return archive.load(state, id_, Sensor(archive.identity_from(description)))


def describe(kept: Kept, tally: Tally | None = None) -> Answer:
    """Describe a sensor in the words that all answers use."""
    return _described(kept.id, kept.sensor.identity, kept.sensor.overview, tally)


def _described(id_: str, identity: SensorIdentity, overview: Overview, tally: Tally | None) -> Answer:
    answer: Answer = {
        **identity_words(id_, identity),
        "frames": overview.frames,
        "frames_counted": overview.frames_counted,
    }
    if tally is not None:
        answer["frames_waiting"] = max(tally.folded - overview.frames, 0)
    return answer


def now() -> str:
    """Return the time as all answers write it."""
    return utc(datetime.now(UTC))


def _shot(row: ShotRow) -> Answer:
    return {
        "name": row.name,
        "received_at": utc(row.received_at),
        "taken_at": None if row.taken_at is None else utc(row.taken_at),
        "verdict": row.verdict,
        "kind": row.kind,
        "exposure_s": row.exposure_s,
        "iso": row.iso,
        "sensor_temp_c": row.sensor_temp_c,
    }


def _rounded(value: float | None, digits: int) -> float | None:
    return None if value is None or not math.isfinite(value) else round(value, digits)


def reasons_not_counted(state: State) -> dict[str, dict[str, int]]:
    """Return for each sensor why frames were no new evidence, and how many."""
    return {id_: state.ledger.not_counted(id_) for id_ in state.ledger.sensors()}
