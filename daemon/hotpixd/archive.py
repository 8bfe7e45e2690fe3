"""Sensors on the disk: turns a sensor's identity into its folder's name, and its state into generations and back."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from hotpixd.core.accumulator import EachSlab
from hotpixd.core.frame import SampleKind, SensorIdentity, SensorLayout
from hotpixd.core.sensor import DetectionSettings, Sensor
from hotpixd.store import checkpoint
from hotpixd.store.durable import StateError
from hotpixd.store.state import State


@dataclass(slots=True)
class Kept:
    """A sensor in memory, and how much of it is on the disk."""

    id: str
    sensor: Sensor
    number: int
    """Of the newest generation; 0 if there is none."""

    covers: int
    """Ledger row up to which the newest generation contains the sensor's shots."""

    covered_by_older: int | None
    """The same of the older generation kept; None if there is none."""

    last_seq: int
    """Ledger row folded last."""

    damage: tuple[str, ...] = ()
    """Sentences about generations that could not be used."""

    @property
    def pending(self) -> bool:
        """Whether it holds frames that no generation has."""
        return self.last_seq > self.covers


def sensor_id(identity: SensorIdentity) -> str:
    """Return a name for a sensor that is readable, fit for a folder, and different for different identities."""
    words = [w for w in (identity.make, identity.model, identity.serial) if w]
    shape = f"{identity.layout.width}x{identity.layout.height}-{identity.samples}"
    slug = re.sub(r"[^A-Za-z0-9.]+", "-", "-".join([*words, shape])).strip("-.")[:100]
    canonical = json.dumps(describe(identity), sort_keys=True)
    return f"{slug}-{hashlib.sha256(canonical.encode()).hexdigest()[:8]}"


def describe(identity: SensorIdentity) -> dict[str, Any]:
    """Return an identity as plain values."""
    described = {**asdict(identity), "samples": str(identity.samples)}
    if identity.bits is None:
        # Ids are made of this, and most are older than bit depths.
        del described["bits"]
    return described


def identity_from(description: Mapping[str, Any]) -> SensorIdentity:
    """Return the identity that `describe` described; a ledger may know more of a sensor."""
    plain = {name: description[name] for name in SensorIdentity.__dataclass_fields__ if name in description}
    plain["layout"] = SensorLayout(**plain["layout"])
    plain["samples"] = SampleKind(plain["samples"])
    return SensorIdentity(**plain)


def load(
    state: State,
    id_: str,
    identity: SensorIdentity,
    settings: DetectionSettings,
    *,
    each_slab: EachSlab = map,
    slabs: int = 1,
) -> Kept:
    """Load a sensor from its newest generation that is whole; a new one if there is none."""
    sensor = Sensor(identity, settings, each_slab=each_slab, slabs=slabs)
    folder = state.sensor_folder(id_)
    generation, skipped = checkpoint.newest(folder)
    damage = tuple(str(error) for error in skipped)
    if generation is None:
        return Kept(id_, sensor, 0, 0, None, 0, damage)
    try:
        sensor.restore(generation.header["sensor"], generation.arrays)
    except (KeyError, TypeError, ValueError) as error:
        # Its digest is right, so it was written so.
        raise StateError(
            f"Generation {generation.number} in {folder} is of another version of hotpixd: {error}. Use that version,"
            " or scan the shots into a new state."
        ) from error
    covers = int(generation.header["covers"])
    return Kept(id_, sensor, generation.number, covers, _older_cover(state, id_, generation.number), covers, damage)


def save(state: State, kept: Kept) -> int:
    """Write the sensor's next generation, if it has frames that no generation has; return its bytes."""
    if not kept.pending:
        return 0
    header, arrays = kept.sensor.save()
    kept.number += 1
    written = state.checkpoint(kept.id, kept.number, {"sensor": header, "covers": kept.last_seq}, arrays)
    kept.covered_by_older = kept.covers or None
    kept.covers = kept.last_seq
    return written.stat().st_size


def covers_of(state: State, id_: str) -> int:
    """Return up to which ledger row the newest whole generation contains a sensor's shots, without loading it."""
    for path in checkpoint.generations(state.sensor_folder(id_)):
        try:
            return int(checkpoint.verify(path)["covers"])
        except checkpoint.GenerationError:
            continue
    return 0


def covers(state: State) -> dict[str, int]:
    """Return `covers_of` every sensor in the ledger."""
    return {id_: covers_of(state, id_) for id_ in state.ledger.sensors()}


def _older_cover(state: State, id_: str, number: int) -> int | None:
    for path in checkpoint.generations(state.sensor_folder(id_)):
        if path.name >= f"gen-{number:08d}":
            continue
        try:
            header = checkpoint.verify(path)
        except checkpoint.GenerationError:
            continue
        return int(header["covers"])
    return None
