"""Sensors on the disk: turns a sensor's identity into its folder's name, and its state into generations and back."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hotpixd.core.frame import SampleKind, SensorIdentity, SensorLayout
from hotpixd.core.overview import Overview
from hotpixd.store import checkpoint
from hotpixd.store.durable import StateDamaged, StateError
from hotpixd.store.ledger import ShotRow, link_of_chain
from hotpixd.store.state import State
from hotpixd.words import many

if TYPE_CHECKING:
    from hotpixd.core.sensor import Sensor

REFOLDED = (
    "The next scan or start of the daemon keeps it as evidence, and folds its frames again as far as they are there."
)
"""What is done about a generation that cannot be used."""


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

    chain: Any
    """Running BLAKE3 of the shots folded into it: see `Ledger.chain`."""

    spooled_after: int = 0
    """Ledger row after which the spool must have every shot of it, as it was loaded: see `Standing`."""

    damage: tuple[str, ...] = ()
    """Sentences about generations that could not be used."""

    bytes_written: int = 0
    """Size of the newest generation, if it was written here."""

    def fold_in(self, row: ShotRow) -> None:
        """Note that a shot was folded into it."""
        self.last_seq = row.seq
        self.chain.update(link_of_chain(row.seq, row.key))

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


def load(state: State, id_: str, sensor: Sensor) -> Kept:
    """Load a new sensor from its newest generation that is whole; it stays new if there is none."""
    standing = look(state, id_)
    damage = tuple(sentence for _, sentence in standing.unusable)
    for path in standing.usable[:1]:
        generation = checkpoint.read_generation(path, sensor.accumulator.zeros)
        try:
            sensor.restore(generation.header["sensor"], generation.arrays)
        except (KeyError, TypeError, ValueError) as error:
            raise _another_version(path, error) from error
        covers = standing.covers[0]
        older = standing.covers[1] if len(standing.covers) > 1 else None
        chain = state.ledger.chain(id_, covers)
        return Kept(id_, sensor, generation.number, covers, older, covers, chain, standing.spooled_after, damage)
    return Kept(id_, sensor, 0, 0, None, 0, state.ledger.chain(id_, 0), damage=damage)


def overview(state: State, id_: str, identity: SensorIdentity) -> Overview:
    """Return what is told of a sensor, as its newest whole generation has it, without loading that if possible."""
    for path in look(state, id_, 1).usable:
        try:
            told = Overview.of(checkpoint.header_of(path)["sensor"])
        except (KeyError, TypeError) as error:
            raise _another_version(path, error) from error
        if told is not None:
            return told
    from hotpixd.core.sensor import Sensor

    return load(state, id_, Sensor(identity)).sensor.overview


def save(state: State, kept: Kept, *, ledger_first: bool = True, anyway: bool = False) -> int:
    """Write the sensor's next generation, if it has frames that no generation has; return its bytes.

    Parameters
    ----------
    ledger_first : see `State.checkpoint`
    anyway : even if it has none, so that the older of two generations has all of them as well
    """
    if not (kept.pending or anyway):
        return 0
    saving = Saving(state, kept, ledger_first=ledger_first)
    saving.write()
    saving.conclude()
    return kept.bytes_written


class Saving:
    """A sensor's next generation on its way to the disk, as the sensor was when this was made.

    Make and conclude it on the thread that folds; any thread may write it, and folding may go on meanwhile.

    Parameters
    ----------
    kept : has frames that no generation has
    ledger_first : see `State.checkpoint`
    """

    def __init__(self, state: State, kept: Kept, *, ledger_first: bool = True) -> None:
        kept.number += 1
        self.kept = kept
        self._state = state
        self._number = kept.number
        self._covers = kept.last_seq
        self._ahead_of_ledger = {} if ledger_first else {"ahead_of_ledger": True}
        self._chain = kept.chain.hexdigest()
        if ledger_first:
            state.ledger.commit()
        self._header, self._arrays = kept.sensor.save(self)
        self._taken = {name: threading.Event() for name in self._arrays}

    def is_out(self, name: str) -> bool:
        """Tell whether an array of the sensor is still to be written: see `accumulator.Loan`."""
        return not self._taken[name].is_set()

    def wait(self, name: str) -> None:
        """Wait until it is."""
        self._taken[name].wait()

    def write(self, taken: Callable[[], object] = lambda: None) -> None:
        """Write it; when this returns, it survives a power cut.

        Parameters
        ----------
        taken : called when folding may change more of the sensor than before

        Raises
        ------
        StateError, OSError
            As `State.checkpoint`.
        """

        def take(name: str) -> None:
            self._taken[name].set()
            taken()

        header = {"sensor": self._header, "covers": self._covers, "chain": self._chain, **self._ahead_of_ledger}
        try:
            written = self._state.checkpoint(self.kept.id, self._number, header, self._arrays, take)
        finally:
            self.release()
        # Not simply what was covered before: that file may have been damaged since, and was not counted then.
        older = checkpoint.generations(written.parent)[1:2]
        self._covered_by_older = int(checkpoint.header_of(older[0])["covers"]) if older else None
        self._bytes_written = written.stat().st_size

    def release(self) -> None:
        """Let everything of the sensor change again. To be called if it is not written after all."""
        for event in self._taken.values():
            event.set()
        self.kept.sensor.accumulator.end_loan()
        self._arrays = {}

    def conclude(self) -> None:
        """Note that it was written."""
        self.kept.covers = self._covers
        self.kept.covered_by_older = self._covered_by_older
        self.kept.bytes_written = self._bytes_written


def drop_unacknowledged(state: State) -> None:
    """Remove generations that were written ahead of a ledger commit which then never came: their shots come again."""
    if state.forgotten:
        # It had come, and the ledger has lost it since: that is damage, and they are evidence.
        return
    for folder in (state.root / "sensors").iterdir():
        for path in checkpoint.generations(folder)[:1]:
            with suppress(checkpoint.GenerationError):
                header = checkpoint.verify(path)
                if header.get("ahead_of_ledger") and int(header["covers"]) > state.ledger.last_seq:
                    path.unlink()


@dataclass(frozen=True, slots=True)
class Standing:
    """What the disk holds of a sensor."""

    usable: tuple[Path, ...] = ()
    """Generations that are whole and of this ledger, newest first; looked for until there are two."""

    covers: tuple[int, ...] = ()
    """Ledger row up to which each of them contains the sensor's shots."""

    unusable: tuple[tuple[Path, str], ...] = ()
    """Others that were met on the way, and why each cannot be used, in a sentence."""

    spooled_after: int = 0
    """Ledger row after which the spool must have every shot of it, if generations were looked for until there are two.

    Those that the older one covers were dropped. If there is but one, and was another, it was damaged: how far it went
    is not known. A scan on a cluster makes no copies, and a restored state has none.
    """

    @property
    def reach(self) -> int:
        """Ledger row up to which the newest usable generation contains the sensor's shots; 0 if there is none."""
        return next(iter(self.covers), 0)


def look(state: State, id_: str, enough: int = 2) -> Standing:
    """Look at the generations of a sensor, newest first, until there are enough that can be used."""
    usable: list[Path] = []
    covers: list[int] = []
    newest: Mapping[str, Any] = {}
    unusable: list[tuple[Path, str]] = []
    for path in checkpoint.generations(state.sensor_folder(id_)):
        if len(usable) == enough:
            break
        try:
            header = checkpoint.verify(path)
            _belongs(state, id_, path, header)
        except checkpoint.GenerationError as error:
            unusable.append((path, str(error)))
            if not usable:
                state.unusable[path] = f"{error} {REFOLDED}"
            continue
        newest = newest or header
        usable.append(path)
        covers.append(int(header["covers"]))
    if len(usable) < 2:
        was_alone = not usable or (usable[0].name == checkpoint.FIRST and not unusable)
        dropped = 0 if was_alone else covers[0]
    else:
        dropped = covers[1]
    if newest.get("ahead_of_ledger"):
        dropped = covers[0]
    spooled_after = max(dropped, state.ledger.restored_upto)
    return Standing(tuple(usable), tuple(covers), tuple(unusable), spooled_after)


def _belongs(state: State, id_: str, path: Path, header: Mapping[str, Any]) -> None:
    """Raise `GenerationError` if a generation holds other shots than the ledger says that it does."""
    try:
        covers, frames = int(header["covers"]), int(header["sensor"]["frames"])
    except (KeyError, TypeError, ValueError) as error:
        raise _another_version(path, error) from error
    if "chain" in header:
        belongs = header["chain"] == state.ledger.chain(id_, covers).hexdigest()
    else:
        # Written before format 4 of the ledger.
        belongs = len(state.ledger.frame_keys(id_, covers)) == frames
    if not belongs:
        raise checkpoint.GenerationError(
            f"Generation {path} holds other frames ({frames} of them) than the ledger says: they are not of the same"
            " time, or not of one state."
        )


def _another_version(path: Path, error: Exception) -> StateError:
    # Its digest is right, so it was written so: it must not be passed over as damaged.
    return StateError(
        f"Generation {path} is of another version of hotpixd: {error}. Use that version, or make the state anew from"
        " the pictures: hotpixd rebuild FOLDER..."
    )


def covers_of(state: State, id_: str) -> int:
    """Return up to which ledger row the newest usable generation contains a sensor's shots, without loading it."""
    return look(state, id_, 1).reach


def covers(state: State) -> dict[str, int]:
    """Return `covers_of` every sensor in the ledger."""
    return {id_: covers_of(state, id_) for id_ in state.ledger.sensors()}


def check_sensors(state: State) -> None:
    """Raise `StateDamaged` if shots are of a sensor that the ledger does not know."""
    strange = state.ledger.strange_sensors()
    if strange:
        raise StateDamaged(
            f"The ledger {state.ledger.path} is damaged: it has shots of {strange[0]}, which is not among its sensors."
        )


def mark_unusable(state: State) -> str:
    """Say that nobody knows whether the ledger is older than what was acknowledged, and what to do."""
    return (
        f"{state.root / 'acknowledged'} is damaged, or of another ledger: whether the ledger lacks the last of the"
        " shots that were acknowledged cannot be known. Scan the latest once more; only those that it lacks are folded."
    )


def standings(state: State) -> dict[str, Standing]:
    """Look at every sensor in the ledger. That reads its generations, so it is worth keeping.

    Raises
    ------
    StateDamaged
        If the ledger knows too little of itself to go on.
    """
    check_sensors(state)
    return {id_: look(state, id_) for id_ in state.ledger.sensors()}


def set_aside_unusable(state: State, found: Mapping[str, Standing]) -> Iterator[str]:
    """Put what this ledger knows nothing of where nothing uses or removes it, and yield sentences about it.

    Parameters
    ----------
    found : what `standings` has just returned
    """
    strange = False
    for standing in found.values():
        for path, sentence in standing.unusable:
            kept = state.set_aside(path)
            strange = True
            yield f"{sentence} It is kept as {kept}; its frames are folded again as far as they are there."
    if state.forgotten:
        strange = True
        yield (
            f"The ledger {state.ledger.path} lacks the last {state.forgotten} of the shots that were acknowledged: its"
            " end was lost. Those whose files are still where they came from are taken again."
        )
    if state.mark_unusable:
        strange = True
        sentence = mark_unusable(state)
        yield f"{sentence} It is kept as {state.renew_mark()}."
    # Otherwise they are shots whose acknowledgement a crash kept from coming, and their sources offer them again.
    orphans = state.orphans() if strange else []
    for key in orphans:
        state.set_aside(state.spool.path(key))
    if orphans:
        yield (
            f"{many(len(orphans), 'shot')} in the spool of which the ledger knows nothing"
            f" {'is' if len(orphans) == 1 else 'are'} kept in {state.root / 'damaged'}; if they are not taken again,"
            " scan them there."
        )
