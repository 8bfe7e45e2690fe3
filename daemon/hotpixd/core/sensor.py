"""All that is known of one sensor: frames in, transitions and defects out.

Joins the exact sums, the evidence and the life cycle of sites. What it holds is
a function of the frames folded and their order, so a replay ends in the same
state and reports the same transitions.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from hotpixd import core
from hotpixd.core import defects, evidence
from hotpixd.core.accumulator import COUNTS, HELD_BYTES, Accumulator, EachSlab, FrameEvents, Loan, Zeros
from hotpixd.core.defects import Defect
from hotpixd.core.frame import Frame, SampleKind, Samples, SensorIdentity, SensorLayout, ShotInfo, ShotKind
from hotpixd.core.overview import LIT_DARK, STATIC_SCENE, Overview
from hotpixd.core.tracks import OBSERVATION, RECENT, Kind, Status, Tracks, neighbours_of


@dataclass(frozen=True, slots=True)
class DetectionSettings:
    """What it takes to call a site defective."""

    alpha: float = 0.01
    """Chance that any defect ever declared stable on a sensor is false, if frames are independent."""

    min_frames: int = 4
    """Counted frames before anything is stable, whatever the evidence: chance is not the only cause of coincidence."""

    floor_sigma: float = 3.0
    """Least excess that matters, in units of the plane's robust single-frame noise; below it a defect is warm."""

    scene_lift_raw: float = 3.5
    """A light frame that repeats the extremes of an earlier one more often than this times chance is not counted.

    Measured on raw mosaics: moving scenes 1.0 to 1.6 at 1 % PRNU and to 3.4 at 2 %, tracked stars 1.1, tripod 13
    to 24.
    """

    scene_lift_rendered: float = 2.5
    """The same for rendered pictures: moving scenes 0.6 to 1.6, tracked stars 2.7 to 56, tripod 25 to 40."""

    scene_memory: int = 8
    """Counted light frames a new one is compared with."""

    spread_limit: float = 0.12
    """Mean excess of the adjacent sites over a site's own, above which it is a point source, not a defect."""

    epoch_frames: int = 1000
    """Counted frames after which the evidence of sites not yet stable starts anew, so that new defects show soon."""


Change = Literal["appeared", "stable", "recovered", "dropped"]
"""How a site moves through its life cycle."""


@dataclass(frozen=True, slots=True)
class Transition:
    """A site's change of life cycle."""

    site: int
    """Flat index of the sample."""

    change: Change

    kind: str
    """Kind of defect, as far as it is known by then."""

    log_e: float
    """ln e-value by then."""

    excess_sigma: float
    """Mean excess in units of the plane's noise."""


@dataclass(frozen=True, slots=True)
class FoldReport:
    """What one frame changed."""

    counted: bool
    """Whether it was new evidence."""

    not_counted_because: str | None
    """A sentence if it was not."""

    lift: float | None
    """How much more often than chance it repeats an earlier frame; None for darks and the first frame."""

    transitions: tuple[Transition, ...]
    """Changes of life cycle, in order of site."""

    observed_sites: NDArray[np.int64]
    """(K,) flat indices of the sites observed."""

    observations: NDArray[Any]
    """(K,) of `tracks.OBSERVATION`."""

    fingerprint: str
    """Digest of the frame's events: tells whether a replay decodes the same samples."""


_NO_OBSERVATIONS = (np.empty(0, np.int64), np.empty(0, OBSERVATION))

_FIRST_EPOCH_SHARE = 0.9
"""Of alpha. Most defects are there from the start; the later epochs share the rest."""

_CANDIDATE_AT = 0.5
"""Certainty from which a site is a candidate. e is then above sqrt(N/alpha), which at most sqrt(N alpha) healthy
sites ever reach."""

_DROPPED_BELOW = 0.25
"""Certainty below which a candidate is forgotten."""

_RECOVERED_AT = 13.0
"""ln evidence for recovery: ln(MOST_OBSERVED / 0.01), and at least 13 telling frames in a row."""

_RESPONSE_RANGE = 0.15
"""Share of the light on it by which a healthy sample's response may differ from its neighbours'.

1 % is usual, and of a million samples one then differs by 5 %: it is extreme in every bright and smooth scene.
"""

_OUTSTANDING_AT_LEAST = 2
"""Outstanding events that tell a weak defect from such a sample, which hardly ever has one but in flat fields."""

_RESTUDY = 8
"""Counted frames between two looks at the kinds of all tracks."""

_AROUND_ROWS, _AROUND_PIXELS = 16, 32
"""Reach of the surroundings in which the null rate of outstanding is measured once more: 33x65 pixels."""

_BLOCK_PIXELS, _BLOCKS = 8, 8
"""Side of the blocks that JPEGs are coded in, and how many of them on either side tell of a place in them."""

_ADJACENT = np.array([(dy, dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1) if dy or dx])

_STANDS_OUT = 2.0
"""Mean excess of the adjacent sites in robust deviations of their neighbourhood. Tracked stars have 3 to 1000."""

_MERGED_WITHIN = 2
"""Pixels. In a rendered picture one photosite spreads over its neighbours and several channels."""

_AT_ONCE = 512
"""Sites whose surroundings are looked at together."""

_DETAIL_REACH_RAW, _DETAIL_REACH_RENDERED = 4, 6
"""Plane rows and columns on either side of a site among which detail is looked for. In a rendered picture the nearest
do not tell: a defect lights those up to two away as well."""

_DETAIL_SHARE, _LEAST_DETAIL = 0.5, 4
"""So many samples around a site, as uneven in the mean frame as this share of the site itself, are detail."""

_DETAIL_STAYS = 0.3
"""Mean agreement of detail with that of the other frames, -1 to 1, from which it is taken to be always the same.

Measured on six sensors of 900x600 with 170 defects each, moving scenes: found after 5, 10, 20 frames 665, 844, 949; at
0.35 668, 849, 950; without this 677, 855, 955. On 48 without any, ground below moving skies, 30 frames: 4 false ones,
all of them points of light; without this more than 500; with a reach of 6 instead of 4 (653, 845, 953) 8.
"""

_STAR_NEAR, _STAR_FAR = 0.5, 0.03
"""Mean share of its peak that the pixels beside a star have, and those two away.

Measured in luma, means over frames: stars near the pole 0.54 to 0.70 and 0.04 to 0.12. Of 430 defects, whose light
interpolation spreads (bilinear, VNG, AHD, DHT, sharpened, quality 80 to 92), one had more than 0.5 beside it; AHD gives
up to 0.29 two away, but 0.44 beside.
"""

_LUMA = (0.299, 0.587, 0.114)
"""Shares of red, green and blue in the luma of ITU-R BT.601, which JPEGs have."""

_NEARLY_WHITE = 250
"""Of 8 bits; what is brighter may be clipped."""

_LOOKS_AT_LEAST = 2
"""Frames that have suspected a site, before it is known whether it is amid such detail."""

_ECHOES = ((8, 4.0), (20, 8.0))
"""(pixels, ratio): a site with that many times less excess than what is shown by one that near is its echo. JPEG codes
blocks of 8 or 16 pixels, and a strong defect, with what it smears, rings through its own."""


@dataclass(frozen=True, slots=True)
class Look:
    """What a frame shows whatever came before it."""

    events: FrameEvents
    """Overwritten when the next are found, see `Accumulator.find`."""

    noise: NDArray[np.float64]
    """(P,) ADU, `defects.noise_of` the frame."""


@dataclass(slots=True)
class _Running:
    """The plain numbers of the state."""

    counted_total: int = 0
    light_frames: int = 0
    epoch: int = 1
    black_level_adu: float | None = None
    white_level_adu: float | None = None


class Sensor:
    """The running state of one sensor.

    Parameters
    ----------
    identity : whose frames
    settings : what it takes to call a site defective
    each_slab, slabs, held_bytes, zeros : how to spread rows over cores, how much to keep for one pass and where the
        arrays are made, see `Accumulator`
    """

    def __init__(
        self,
        identity: SensorIdentity,
        settings: DetectionSettings | None = None,
        *,
        each_slab: EachSlab = map,
        slabs: int = 1,
        held_bytes: int = HELD_BYTES,
        zeros: Zeros = np.zeros,
    ) -> None:
        self.identity = identity
        self.layout = identity.layout
        self.settings = settings or DetectionSettings()
        self.accumulator = Accumulator(
            self.layout, identity.dtype, each_slab=each_slab, slabs=slabs, held_bytes=held_bytes, zeros=zeros
        )
        self._rates = evidence.NullRates()
        self._gate = evidence.SceneGate(self.layout, self.settings.scene_memory)
        self._tracks = Tracks(self.layout)
        self._noise_squares = np.zeros(self.layout.plane_count)
        self._running = _Running()
        self._rendered = identity.samples is SampleKind.RENDERED
        settings = self.settings
        self._lift_limit = settings.scene_lift_rendered if self._rendered else settings.scene_lift_raw

    @property
    def frames(self) -> int:
        """Frames folded."""
        return self.accumulator.frames

    @property
    def frames_counted(self) -> int:
        """Frames that were new evidence."""
        return self._running.counted_total

    @property
    def found(self) -> dict[str, int]:
        """Number of sites by status: "candidate", "stable", "recovered"."""
        statuses = self._tracks.rows["status"]
        return {status.name.lower(): int((statuses == status).sum()) for status in Status}

    @property
    def overview(self) -> Overview:
        """All of it that `status` tells."""
        return Overview(self.frames, self.frames_counted, self.found)

    @property
    def followed_sites(self) -> NDArray[np.int64]:
        """Flat indices of the sites under suspicion."""
        return np.array(self._tracks.rows["site"])

    @property
    def kinds(self) -> dict[str, int]:
        """Number of stable defects by kind, as far as these are known by now."""
        kinds = self._tracks.rows["kind"][self._tracks.rows["status"] == Status.STABLE]
        return {kind.name.lower(): n for kind in Kind if (n := int((kinds == kind).sum()))}

    @property
    def threshold(self) -> float:
        """ln e at which a site is stable.

        ln(N / (share x alpha)). The first epoch has 90 % of alpha, the k-th of the others 10 % / (k (k - 1)): all
        shares add up to one, so the promise holds for ever.
        """
        epoch = self._running.epoch
        share = _FIRST_EPOCH_SHARE if epoch == 1 else (1 - _FIRST_EPOCH_SHARE) / (epoch * (epoch - 1))
        return math.log(self.layout.size / (share * self.settings.alpha))

    def fold(self, frame: Frame, seq: int, looked: Look | None = None) -> FoldReport:
        """Fold one frame.

        Parameters
        ----------
        frame : of this sensor
        seq : ledger row of the shot; grows from call to call
        looked : what `look` returned for it, if that was done already

        Raises
        ------
        ValueError
            If the frame is of another sensor.
        """
        looked = looked or self.look(frame)
        self.accumulator.add(frame.samples)
        return self.follow(frame, looked.events, looked.noise, seq)

    def look(self, frame: Frame, *, beside: bool = False) -> Look:
        """Do what depends on the frame alone.

        Parameters
        ----------
        frame : of this sensor
        beside : leave what was returned last as it is, for another thread that folds that frame meanwhile

        Raises
        ------
        ValueError
            If the frame is of another sensor.
        """
        if frame.sensor != self.identity:
            raise ValueError("a frame of another sensor cannot be folded")
        events = self.accumulator.find(frame.samples, lone=frame.lone, beside=beside)
        return Look(events, defects.noise_of(frame, self.layout))

    def follow(self, frame: Frame, events: FrameEvents, noise: NDArray[np.float64], seq: int) -> FoldReport:
        """Do what depends on the frames before this one, which the accumulator has in its sums already.

        Parameters
        ----------
        frame, seq : as `fold` takes them; of the samples those are read that the accumulator requires
        events : what the accumulator returned for it
        noise : `defects.noise_of` it
        """
        light, lone = frame.kind is ShotKind.LIGHT, frame.lone
        running = self._running
        running.light_frames += light
        running.black_level_adu = frame.black_level_adu
        running.white_level_adu = frame.white_level_adu
        self._noise_squares += noise**2
        if frame.lit:
            # In darks nothing excuses an extreme: every detail of a scene would be one.
            return FoldReport(False, LIT_DARK, None, (), *_NO_OBSERVATIONS, events.fingerprint)
        pattern = self._gate.pattern(events) if light else None
        lift = None if pattern is None else self._gate.lift(pattern)
        if lift is not None and lift > self._lift_limit:
            why = f"{STATIC_SCENE}: it repeats an earlier frame {lift:.1f} times as often as chance"
            return FoldReport(False, why, lift, (), *_NO_OBSERVATIONS, events.fingerprint)
        if pattern is not None:
            self._gate.remember(pattern)
        if not self._rendered:
            # A rendered picture smears a defect over its neighbours, which then are no others of its kind.
            rows = self._tracks.rows
            known = np.sort(rows["site"][rows["status"] == Status.STABLE])
            self.accumulator.unmask(frame.samples, events, known, lone=lone)
        transitions = self._count(events, seq)
        sites, seen = self._observe(frame, events)
        self._look_around(frame, events)
        if light and self.layout.mosaic:
            self._look_beside(frame.samples, events)
        transitions += self._settle(seen, seq)
        transitions.sort(key=lambda t: t.site)
        return FoldReport(True, None, lift, tuple(transitions), sites, seen, events.fingerprint)

    def _count(self, events: FrameEvents, seq: int) -> list[Transition]:
        """Count a frame as evidence and follow the sites that become candidates."""
        if self.accumulator.counted >= self.settings.epoch_frames:
            self._start_epoch()
        self._rates.include(events, self.layout)
        n = self.accumulator.counted + 1
        level = _CANDIDATE_AT * self.threshold
        reached = self.accumulator.count(events, evidence.count_limits(n, self._rates, level))
        self._running.counted_total += 1
        new = np.setdiff1d(reached, self._tracks.rows["site"])
        log_e = evidence.combined_log_e(n, self.accumulator.counts_at(new), self._rates)
        new, log_e = new[log_e >= level], log_e[log_e >= level]
        self.accumulator.require(new)
        looks = np.zeros((len(new), 2, 2))
        if self._rendered:
            new, log_e, looks = self._strongest(new, log_e)
        positions = self._tracks.add(new, log_e, seq)
        self._tracks.around[positions], self._tracks.beside[positions] = looks[: len(positions)].swapaxes(0, 1)
        return self._transitions("appeared", positions)

    def _start_epoch(self) -> None:
        self.accumulator.forget_counts()
        self._rates = evidence.NullRates()
        self._running.epoch += 1
        self._tracks.rows["base"] = 0
        self._tracks.rows["base_counted"] = 0

    def _strongest(
        self, sites: NDArray[np.int64], log_e: NDArray[np.float64]
    ) -> tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.float64]]:
        """Of the sites that one bad photosite lights in a rendered picture, keep the strongest.

        Candidates that turn out weaker than a new neighbour are dropped; it inherits what was seen around them.
        """
        tracks = self._tracks
        tx, ty = self._pixels(tracks.rows["site"])
        fixed = tracks.rows["status"] != Status.CANDIDATE
        # What a known defect lights comes again with every frame, and there may be dozens around each.
        clear = ~_near_any(*self._pixels(sites), tx[fixed], ty[fixed], _MERGED_WITHIN)
        clear[clear] = ~self._is_shadow(sites[clear])
        sites, log_e = sites[clear], log_e[clear]
        excess = np.abs(self._mean_excess(sites))
        order = np.lexsort((sites, -excess, -log_e))
        kept: list[int] = []
        looks = np.zeros((len(sites), 2, 2))
        x, y = self._pixels(sites)
        strength = np.where(fixed, np.inf, tracks.rows["log_e"])
        weaker = np.zeros(len(tracks), bool)
        for i in order:
            near = _near(tx, ty, x[i], y[i], _MERGED_WITHIN)
            if (strength[near & ~weaker] >= log_e[i]).any():
                continue
            if kept and _near(x[kept], y[kept], x[i], y[i], _MERGED_WITHIN).any():
                continue
            if near.any():
                heir_of = np.flatnonzero(near)[np.argmax(tracks.around[near, 0])]
                looks[i] = tracks.around[heir_of], tracks.beside[heir_of]
            weaker |= near
            kept.append(int(i))
        tracks.drop(np.flatnonzero(weaker))
        kept.sort()
        return sites[kept], log_e[kept], looks[kept]

    def _observe(self, frame: Frame, events: FrameEvents) -> tuple[NDArray[np.int64], NDArray[Any]]:
        positions = self._tracks.observed()
        seen = defects.observe(frame, events.events, self._tracks, positions)
        self._tracks.observe(positions, seen)
        return self._tracks.rows["site"][positions], seen

    def _events_at_suspects(self, events: FrameEvents) -> NDArray[np.uint8]:
        """Return the event bits of each row's site, none of those that are known as defects."""
        rows = self._tracks.rows
        row, col = np.divmod(rows["site"], self.layout.shape[1])
        return np.where(rows["status"] != Status.STABLE, events.events[row, col], np.uint8(0))

    def _look_around(self, frame: Frame, events: FrameEvents) -> None:
        """Add up how far the detail around sites that this frame gives cause to suspect is in all other frames, too."""
        tracks = self._tracks
        suspected = np.flatnonzero(self._events_at_suspects(events) != 0)
        if frame.kind is ShotKind.DARK or self.frames < 2:
            # No scene, or nothing to compare it with.
            tracks.around[suspected, 0] += 1
            return
        for start in range(0, len(suspected), _AT_ONCE):
            part = suspected[start : start + _AT_ONCE]
            sites = tracks.rows["site"][part]
            around, telling = self._around(sites)
            now = frame.samples.ravel()[around].astype(np.float64)
            mean = self.accumulator.mean(around.ravel()).reshape(around.shape)
            others = mean + (mean - now) / (self.frames - 1)
            if self._rendered:
                tracks.beside[part] += np.stack(_stars(now), axis=1)
            now, others = _from_median(now, telling), _from_median(others, telling)
            detail = telling & (np.abs(others) > _DETAIL_SHARE * np.abs(self._mean_excess(sites))[:, None, None])
            # White letters on white are not seen.
            much, seen = detail.sum(axis=(1, 2)) >= _LEAST_DETAIL, (detail & (now != 0)).sum(axis=(1, 2))
            agreement = np.where(detail, np.sign(now * others), 0.0).sum(axis=(1, 2)) / np.maximum(seen, 1)
            tells = ~much | (seen >= _LEAST_DETAIL)
            tracks.around[part] += np.stack([tells, np.where(much & tells, agreement, 0.0)], axis=1)

    def _around(self, sites: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """Return the sites around each, (K, channels, n), and which of them tell of the scene.

        In a mosaic those of its plane; in a rendered picture those of all channels: text may be red, or blue.
        """
        layout = self.layout
        y, col = np.divmod(sites[:, None, None], layout.shape[1])
        reach = _DETAIL_REACH_RENDERED if self._rendered else _DETAIL_REACH_RAW
        down, right = (each.ravel() for each in np.mgrid[-reach : reach + 1, -reach : reach + 1])
        channel = np.arange(layout.channels)[:, None]
        ys, xs = y + down * layout.row_step, col // layout.channels + right * layout.period
        there = (ys >= 0) & (xs >= 0) & (ys < layout.height) & (xs < layout.width)
        # Beyond the border the border itself, which does not tell.
        ys, xs = np.clip(ys, 0, layout.height - 1), np.clip(xs, 0, layout.width - 1)
        around = ys * layout.shape[1] + xs * layout.channels + channel
        # Defects are no detail, nor what they light; of those that are none yet only the core, it may be detail.
        rows, (px, py) = self._tracks.rows, self._pixels(around.ravel())
        stable = rows["site"][rows["status"] == Status.STABLE]
        lights, core = (_MERGED_WITHIN, 1) if self._rendered else (0, 0)
        lit = _near_any(px, py, *self._pixels(rows["site"]), core) | _near_any(px, py, *self._pixels(stable), lights)
        own = np.maximum(np.abs(down), np.abs(right)) <= lights
        return around, there & ~own & ~lit.reshape(around.shape)

    def _is_amid_detail(self, positions: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Whether sites are part of detail that stays where it is: ground below a moving sky, burnt-in text.

        There is more of it around them, in the very frames that suspect them; around a defect are only other defects.
        """
        frames, agreement = self._tracks.around[positions].T
        return np.asarray((frames < _LOOKS_AT_LEAST) | (agreement > _DETAIL_STAYS * frames))

    def _look_beside(self, samples: Samples, events: FrameEvents) -> None:
        """Add up how much of their excess the adjacent sites share, of those that this frame gives cause to suspect."""
        tracks = self._tracks
        suspected = np.flatnonzero(self._events_at_suspects(events) & core.kernels.HIGH)
        sites = tracks.rows["site"][suspected]
        adjacent, telling, _ = self._adjacent(sites)
        around = np.zeros(adjacent.shape)
        around[telling] = defects.excess_in(samples, adjacent[telling], self.layout)
        own = defects.excess_in(samples, sites, self.layout)
        # Each frame has one vote: a detail of a moving scene may be brighter than a star in ten frames.
        share = around.sum(axis=0) / np.maximum(telling.sum(axis=0), 1) / np.maximum(own, 1e-9)
        tracks.beside[suspected] += np.where(own > 0, [np.ones(len(own)), np.clip(share, -1, 1)], 0.0).T

    def _adjacent(self, sites: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.bool_], NDArray[np.float64]]:
        """Return the 8 adjacent sites of each, (8, K), which of them tell of a star, and the share on the sensor."""
        y, x = np.divmod(sites, self.layout.shape[1])
        ny, nx = y + _ADJACENT[:, :1], x + _ADJACENT[:, 1:]
        there = (ny >= 0) & (nx >= 0) & (ny < self.layout.shape[0]) & (nx < self.layout.shape[1])
        adjacent = np.where(there, ny * self.layout.shape[1] + nx, 0)
        # An adjacent defect is no sign of a star.
        return adjacent, there & ~np.isin(adjacent, self._tracks.rows["site"]), there.mean(axis=0)

    def _settle(self, seen: NDArray[Any], seq: int) -> list[Transition]:
        """Move sites through their life cycle after a counted frame."""
        tracks = self._tracks
        if not len(tracks):
            return []
        rows = tracks.rows
        log_e = self._log_e_now()
        rows["log_e"] = np.where(rows["status"] == Status.CANDIDATE, log_e, np.maximum(rows["log_e"], log_e))
        enough = (log_e >= self.threshold) & (self.accumulator.counted >= self.settings.min_frames)
        rising = np.flatnonzero(enough & (rows["status"] != Status.STABLE))
        # First of all: what is detail is held back for good, and comes here in every frame.
        rising = rising[~self._is_amid_detail(rising)]
        if rising.size or self._running.counted_total % _RESTUDY == 0:
            self._classify(tracks)
        made = self._recovered(seen)
        # Too small to matter, and there is no use in a map of it: dust, a sample of 2 % less response.
        slight = (rows["kind"][rising] == Kind.DIM) & (rows["strength"][rising] < self.settings.floor_sigma)
        rising = rising[~slight]
        rising = rising[~self._is_no_defect(rising)]
        rising = rising[~self._may_be_response(rising)]
        rising = rising[self._log_e_here(rising) >= self.threshold]
        rows["status"][rising] = Status.STABLE
        rows["stable_seq"][rising] = seq
        rows["frames_to_stable"][rising] = self.accumulator.counted
        rows["recovery"][rising] = 0.0
        made += self._transitions("stable", rising)
        faded = np.flatnonzero((rows["status"] == Status.CANDIDATE) & (log_e < _DROPPED_BELOW * self.threshold))
        made += self._transitions("dropped", faded)
        tracks.drop(faded)
        return made

    def _recovered(self, seen: NDArray[Any]) -> list[Transition]:
        rows = self._tracks.rows
        positions = self._tracks.observed()
        stable = rows["status"][positions] == Status.STABLE
        positions, seen = positions[stable], seen[stable]
        if not len(positions):
            return []
        defective, step = defects.recovery_steps(rows[positions], seen, not self._rendered, self._white_level())
        recovery = np.where(defective, 0.0, rows["recovery"][positions] + step)
        rows["recovery"][positions] = recovery
        healed = positions[recovery >= _RECOVERED_AT]
        rows["status"][healed] = Status.RECOVERED
        # What made it stable is spent: to come back it needs new evidence.
        rows["base"][healed] = self.accumulator.counts_at(rows["site"][healed]).T
        rows["base_counted"][healed] = self.accumulator.counted
        self._tracks.beside[healed] = self._tracks.around[healed] = 0.0
        return self._transitions("recovered", healed)

    def _is_no_defect(self, positions: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Whether sites with evidence enough are something else: a point source, or an echo of JPEG coding."""
        if not positions.size:
            return np.zeros(0, bool)
        if self._rendered:
            return self._is_echo(positions) | self._is_star(positions)
        if self._running.light_frames and self.layout.mosaic:
            return self._is_point_source(positions)
        return np.zeros(len(positions), bool)

    def _is_point_source(self, positions: NDArray[np.int64]) -> NDArray[np.bool_]:
        """A star that stays raises its 8 adjacent sites over their own planes; a defect does not.

        In the frames that suspect the site, whatever other frames show; and in the mean frame, which knows of more.
        """
        sites = self._tracks.rows["site"][positions]
        adjacent, telling, on_sensor = self._adjacent(sites)
        # Of a star beyond the border, those on the sensor are the farther ones.
        limit = self.settings.spread_limit * on_sensor
        frames, share = self._tracks.beside[positions].T
        then = (frames > 0) & (share >= limit * frames)
        own = self._mean_excess(sites)
        around, clear = np.zeros((2, *adjacent.shape))
        excess, spread = self._mean_excess_and_spread(adjacent[telling])
        around[telling], clear[telling] = excess, excess / spread
        n = np.maximum(telling.sum(axis=0), 1)
        # After few frames of moving scenes the mean frame is uneven everywhere, not only here.
        stands_out = clear.sum(axis=0) / n > _STANDS_OUT
        always = (own > 0) & stands_out & (around.sum(axis=0) / n >= limit * own)
        counts = self.accumulator.counts_at(sites)
        return np.asarray((counts[0] > counts[1]) & (then | always))

    def _is_echo(self, positions: NDArray[np.int64]) -> NDArray[np.bool_]:
        rows = self._tracks.rows
        x, y = self._pixels(rows["site"])
        excess = np.abs(self._mean_excess(rows["site"][positions]))
        farthest = max(within for within, _ in _ECHOES)
        sources = np.flatnonzero(_near_any(x, y, x[positions], y[positions], farthest))
        # The sample that a clipped defect was found by may be a weak one: white all around hardly has a maximum.
        strength = np.maximum(*self._extremes_around(rows["site"][sources]))
        echo = np.zeros(len(positions), bool)
        for k, i in enumerate(positions):
            others = sources != i
            for within, ratio in _ECHOES:
                near = others & _near(x[sources], y[sources], x[i], y[i], within)
                echo[k] |= bool((strength[near] > ratio * excess[k]).any())
        return echo

    def _is_star(self, positions: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Whether most of the telling frames that suspect sites of a rendered picture show a star, as near the pole."""
        frames, stars = self._tracks.beside[positions].T
        return np.asarray(2 * stars > frames)

    def _is_shadow(self, sites: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Whether sites are low only because of a bright photosite, which interpolation and sharpening ring beside."""
        counts = self.accumulator.counts_at(sites)
        # By its events: the mean of a stuck sample, which is now low, now high, may be a little low.
        shadow = np.asarray(counts[1] > counts[0])
        bright, deep = self._extremes_around(sites[shadow])
        shadow[shadow] = bright > deep
        return shadow

    def _extremes_around(self, sites: NDArray[np.int64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return how far the mean frame rises and falls at most among the pixels that one photosite spreads over."""
        layout = self.layout
        row, col = np.divmod(sites, layout.shape[1])
        step = np.arange(-_MERGED_WITHIN, _MERGED_WITHIN + 1)
        # Beyond the border the border itself: a site looked at twice changes no extreme.
        ys = np.clip(row[:, None] + step, 0, layout.height - 1)
        xs = np.clip(col[:, None] // layout.channels + step, 0, layout.width - 1)
        pixels = ys[:, :, None] * layout.shape[1] + xs[:, None, :] * layout.channels
        around = (pixels[..., None] + np.arange(layout.channels)).reshape(len(sites), step.size**2 * layout.channels)
        high, low = np.zeros((2, len(sites)))
        # Each has dozens of samples around it, and each of these 48 neighbours: those of thousands fill the memory.
        for start in range(0, len(sites), _AT_ONCE):
            part = slice(start, start + _AT_ONCE)
            excess = self._mean_excess(around[part].ravel()).reshape(around[part].shape)
            high[part], low[part] = excess.max(axis=1, initial=0.0), excess.min(axis=1, initial=0.0)
        return high, -low

    def _log_e_now(self) -> NDArray[np.float64]:
        rows = self._tracks.rows
        counts = self.accumulator.counts_at(rows["site"]) - rows["base"].T
        log_e = np.empty(len(rows))
        for base in np.unique(rows["base_counted"]):
            same = rows["base_counted"] == base
            n = self.accumulator.counted - int(base)
            log_e[same] = evidence.combined_log_e(n, counts[:, same], self._rates)
        return log_e

    def _may_be_response(self, positions: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Whether the excess of sites is no larger than that of healthy samples that respond a little differently."""
        rows = self._tracks.rows[positions]
        counts = self.accumulator.counts_at(rows["site"]) - rows["base"].T
        excess = self._mean_excess(rows["site"])
        light = self.accumulator.mean(rows["site"]) - excess - (self._running.black_level_adu or 0.0)
        may_be = np.asarray(np.abs(excess) < _RESPONSE_RANGE * light)
        # Of those not observed, which may be many times as many, nothing more can tell.
        outstanding = np.maximum(counts[2], counts[3]) >= _OUTSTANDING_AT_LEAST
        asked = may_be & outstanding & (rows["slot"] >= 0)
        may_be[asked] = defects.follows_light(self._tracks, positions[asked], self._running.black_level_adu)
        return may_be

    def _log_e_here(self, positions: NDArray[np.int64]) -> NDArray[np.float64]:
        """Return ln e with the null rates around each site, where those are larger than the sensor's.

        A null rate is a mean over the frame. Where there is foliage below the sky in every frame, or glints in one
        corner, healthy samples are outstanding more often than that. So are the corners of the blocks that a JPEG is
        coded in: 30 times as often in darks of quality 92, and extreme three times as often.
        """
        rows = self._tracks.rows
        ky, kx = np.divmod(rows["site"], self.layout.shape[1])
        reach = _AROUND_PIXELS * self.layout.channels
        smear = _MERGED_WITHIN * self.layout.channels
        log_e = np.empty(len(positions))
        for i, row in enumerate(rows[positions]):
            y, x = divmod(int(row["site"]), self.layout.shape[1])
            top, left = max(y - _AROUND_ROWS, 0), max(x - reach, 0)
            high, low = (
                self.accumulator.counts[name][top : y + _AROUND_ROWS + 1, left : x + reach + 1].astype(np.int64)
                for name in ("high_outstanding", "low_outstanding")
            )
            # Defects, and what they light around them, are not the scene's.
            dy, dx = ky - top, kx - left
            inside = (dy >= 0) & (dx >= 0) & (dy < high.shape[0]) & (dx < high.shape[1])
            for a, b in zip(dy[inside], dx[inside], strict=True):
                near = (
                    slice(max(a - _MERGED_WITHIN, 0), a + _MERGED_WITHIN + 1),
                    slice(max(b - smear, 0), b + smear + 1),
                )
                high[near] = low[near] = 0
            extreme, outstanding = self._rates.extreme, np.maximum(self._rates.outstanding, self._rates_of(high, low))
            if self._rendered:
                extreme_here, outstanding_here = self._rates_in_block(y, x)
                extreme, outstanding = np.maximum(extreme, extreme_here), np.maximum(outstanding, outstanding_here)
            rates = evidence.NullRates(extreme, outstanding)
            counts = self.accumulator.counts_at(row["site"][None]) - row["base"][:, None]
            n = self.accumulator.counted - int(row["base_counted"])
            log_e[i] = evidence.combined_log_e(n, counts, rates)[0]
        return log_e

    def _rates_in_block(self, y: int, x: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return how often samples that are in their blocks where one is in its are extreme, and outstanding."""
        step = _BLOCK_PIXELS * self.layout.channels
        alike = slice(
            max(y - _BLOCKS * _BLOCK_PIXELS, y % _BLOCK_PIXELS), y + _BLOCKS * _BLOCK_PIXELS + 1, _BLOCK_PIXELS
        )
        beside = slice(max(x - _BLOCKS * step, x % step), x + _BLOCKS * step + 1, step)
        counts = [self.accumulator.counts[name][alike, beside].astype(np.int64) for name in COUNTS]
        own = (y - alike.start) // _BLOCK_PIXELS, (x - beside.start) // step
        for count in counts:
            count[own] = 0
        return self._rates_of(*counts[:2]), self._rates_of(*counts[2:])

    def _rates_of(self, high: NDArray[np.int64], low: NDArray[np.int64]) -> NDArray[np.float64]:
        """Return how often samples with these counts surely have an event: high, low, either."""
        events = np.array([high.sum(), low.sum(), high.sum() + low.sum()], np.float64)
        # An edge in one of a few frames is no rate.
        return np.asarray(np.maximum(events - 3 * np.sqrt(events), 0.0) / (self.accumulator.counted * high.size))

    def _classify(self, tracks: Tracks) -> None:
        rows = tracks.rows
        # What looks healthy is no longer what it was, and must be told from that: it stays what it was called.
        known = np.flatnonzero(
            (rows["status"] == Status.RECOVERED) | ((rows["status"] == Status.STABLE) & (rows["recovery"] > 0))
        )
        before = rows[known]
        suspects = defects.weigh(self.accumulator, tracks, self._noise(), self._running.black_level_adu)
        counts = self.accumulator.counts_at(rows["site"])
        defects.classify(
            tracks,
            suspects,
            counts,
            self.identity.samples,
            self._white_level(),
            self.settings.floor_sigma,
        )
        rows[known] = before

    def _transitions(self, change: Change, positions: NDArray[np.int64]) -> list[Transition]:
        if not positions.size:
            return []
        rows = self._tracks.rows[positions]
        sigma = self._mean_excess(rows["site"]) / self._noise()[self.layout.planes_of(rows["site"])]
        return [
            Transition(int(row["site"]), change, Kind(row["kind"]).name.lower(), float(row["log_e"]), float(s))
            for row, s in zip(rows, sigma, strict=True)
        ]

    def _mean_excess(self, sites: NDArray[np.int64]) -> NDArray[np.float64]:
        """Mean-frame excess over the median of the neighbours, ADU."""
        return np.asarray(self.accumulator.mean(sites) - np.median(self._mean_around(sites), axis=1))

    def _mean_excess_and_spread(self, sites: NDArray[np.int64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """The same, and the neighbours' robust deviation, ADU."""
        around = self._mean_around(sites)
        median = np.median(around, axis=1)
        spread = 1.4826 * np.median(np.abs(around - median[:, None]), axis=1)
        return self.accumulator.mean(sites) - median, np.maximum(spread, 1e-3)

    def _mean_around(self, sites: NDArray[np.int64]) -> NDArray[np.float64]:
        return self.accumulator.mean(neighbours_of(sites, self.layout))

    def _pixels(self, sites: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        row, col = np.divmod(sites, self.layout.shape[1])
        return col // self.layout.channels, row

    def _noise(self) -> NDArray[np.float64]:
        return np.asarray(np.sqrt(self._noise_squares / max(self.frames, 1)))

    def _white_level(self) -> float:
        white = self._running.white_level_adu
        return float(np.iinfo(self.identity.dtype).max) if white is None else white

    def defects(self, *, candidates: bool = False) -> list[Defect]:
        """Return the stable defects in order of site; with `candidates` the candidates and the recovered too."""
        if not len(self._tracks):
            return []
        # A copy: looking must not change what the next frame does.
        tracks = self._tracks.copy()
        self._classify(tracks)
        suspects = defects.weigh(self.accumulator, tracks, self._noise(), self._running.black_level_adu)
        current, iso = defects.dark_current(tracks, self.identity.samples, self._white_level())
        found = []
        for i in np.argsort(tracks.rows["site"], kind="stable"):
            row = tracks.rows[i]
            status = Status(row["status"])
            if status is not Status.STABLE and not candidates:
                continue
            kind = Kind(row["kind"])
            was_stable = status is not Status.CANDIDATE
            leaks = kind in (Kind.HOT, Kind.WARM, Kind.UNSTABLE) and math.isfinite(current[i])
            found.append(
                Defect(
                    site=int(row["site"]),
                    status=status.name.lower(),
                    kind=kind.name.lower(),
                    certainty=1.0 if was_stable else float(np.clip(row["log_e"] / self.threshold, 0, 0.999)),
                    log_e=float(row["log_e"]),
                    excess_adu=float(suspects.excess[i]),
                    excess_sigma=float(suspects.sigma[i]),
                    dark_current_adu_per_s=float(current[i]) if leaks else None,
                    dark_current_iso=float(iso[i]) if leaks else None,
                    share_on=float(row["share_on"]) if math.isfinite(row["share_on"]) else None,
                    level_adu=float(row["level"]),
                    first_seq=int(row["first_seq"]),
                    stable_seq=int(row["stable_seq"]) if was_stable else None,
                    frames_to_stable=int(row["frames_to_stable"]) if was_stable else None,
                )
            )
        return found

    def recent_excess(self, sites: Iterable[int]) -> list[list[float]]:
        """Return the excess of the last observations at each site in units of its plane's noise, oldest first.

        Up to `tracks.RECENT` of them; none for a site that is not observed.
        """
        wanted = list(sites)
        tracks = self._tracks
        if not len(tracks):
            return [[] for _ in wanted]
        position = {int(site): i for i, site in enumerate(tracks.rows["site"])}
        noise = self._noise()[self.layout.planes_of(np.array(wanted, np.int64))]
        kept, held = tracks.recent_of(np.array([position.get(site, 0) for site in wanted], np.int64))
        histories: list[list[float]] = []
        for i, site in enumerate(wanted):
            at = position.get(site)
            if at is None:
                histories.append([])
                continue
            oldest = int(tracks.rows["seen"][at]) % RECENT
            excess = np.roll(kept["excess"][i], -oldest)[np.roll(held[i], -oldest)]
            histories.append((excess / noise[i]).tolist())
        return histories

    def around(self, site: int, reach: int) -> NDArray[np.float64]:
        """Return the mean frame around a site, (2 reach + 1, 2 reach + 1) pixels, NaN outside of the sensor.

        Each pixel is its mean minus the median of its plane in this patch, in units of the plane's noise. In a
        rendered picture it is the channel of the site.
        """
        row, col = divmod(site, self.layout.shape[1])
        x, channel = divmod(col, self.layout.channels)
        ys, xs = np.mgrid[row - reach : row + reach + 1, x - reach : x + reach + 1]
        inside = (ys >= 0) & (xs >= 0) & (ys < self.layout.height) & (xs < self.layout.width)
        sites = (ys * self.layout.shape[1] + xs * self.layout.channels + channel)[inside]
        mean, planes = self.accumulator.mean(sites), self.layout.planes_of(sites)
        noise = self._noise()
        for plane in np.unique(planes):
            own = planes == plane
            mean[own] = (mean[own] - np.median(mean[own])) / noise[plane]
        patch = np.full(inside.shape, np.nan)
        patch[inside] = mean
        return patch

    def patches(self, sites: NDArray[np.int64], reach: int) -> NDArray[np.float32]:
        """Return what `around` does for many sites at once, (K, 2 reach + 1, 2 reach + 1)."""
        layout = self.layout
        if not sites.size:
            return np.empty((0, 2 * reach + 1, 2 * reach + 1), np.float32)
        row, col = np.divmod(sites, layout.shape[1])
        x, channel = np.divmod(col, layout.channels)
        step = np.arange(-reach, reach + 1)
        ys, xs = (row[:, None] + step)[:, :, None], (x[:, None] + step)[:, None, :]
        inside = (ys >= 0) & (xs >= 0) & (ys < layout.height) & (xs < layout.width)
        there = np.where(inside, ys * layout.shape[1] + xs * layout.channels + channel[:, None, None], 0)
        patches = np.where(inside, self.accumulator.mean(there.ravel()).reshape(there.shape), np.nan)
        noise = self._noise()[layout.planes_of(there)]
        # All sites of one phase within a patch are of one plane.
        for i in range(layout.period):
            for j in range(layout.period):
                plane = (slice(None), slice(i, None, layout.period), slice(j, None, layout.period))
                own = patches[plane].reshape(len(sites), -1)
                patches[plane] -= defects.medians(own)[:, None, None]
        return np.asarray(patches / noise, np.float32)

    def digest(self, keys: Iterable[str] = ()) -> str:
        """Return the accumulator's digest over the frames named by `keys`."""
        return self.accumulator.digest(keys)

    def save(self, loan: Loan | None = None) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
        """Return the state as a header of plain values and arrays by name; those of the accumulator not copied.

        Parameters
        ----------
        loan : if another thread is to read these while folding goes on: see `Accumulator.lend`
        """
        header = {
            "frames": self.accumulator.frames,
            "counted": self.accumulator.counted,
            "found": self.found,
            **asdict(self._running),
        }
        arrays = {
            **(self.accumulator.arrays() if loan is None else self.accumulator.lend(loan)),
            **self._tracks.arrays(),
            **self._gate.arrays(),
            "noise_squares": np.array(self._noise_squares),
            "null_extreme": np.array(self._rates.extreme),
            "null_outstanding": np.array(self._rates.outstanding),
        }
        return header, arrays

    def restore(self, header: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]]) -> None:
        """Take over what `save` once returned."""
        self.accumulator.restore(arrays, header["frames"], header["counted"])
        self._tracks.restore(arrays)
        self._gate.restore(arrays)
        self._noise_squares = np.array(arrays["noise_squares"])
        self._rates = evidence.NullRates(np.array(arrays["null_extreme"]), np.array(arrays["null_outstanding"]))
        self._running = _Running(**{f.name: header[f.name] for f in fields(_Running)})


def _stars(around: NDArray[np.float64]) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Return whether patches of a rendered picture tell, and whether what is amid them spreads as a star's disc does.

    Parameters
    ----------
    around : (K, channels, n) samples of squares of pixels
    """
    side = math.isqrt(around.shape[2])
    step = np.abs(np.arange(side) - side // 2)
    distance = np.maximum(step[:, None], step).ravel()
    luma = np.tensordot(_LUMA if around.shape[1] == len(_LUMA) else [1.0], around, axes=(0, 1))
    excess = luma - np.median(luma[:, distance > _MERGED_WITHIN + 1], axis=1)[:, None]
    core = excess[:, distance <= 1].max(axis=1)
    near, far = (excess[:, distance == d].mean(axis=1) for d in (1, 2))
    # A defect that is clipped is as broad as a star.
    tells = around[:, :, distance <= 1].max(axis=(1, 2)) <= _NEARLY_WHITE
    return tells, tells & (near > _STAR_NEAR * core) & (far > _STAR_FAR * core)


def _from_median(values: NDArray[np.float64], telling: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Return how far values are above the median of those of their row that tell; NaN where there is none."""
    known = np.where(telling, values, np.nan).reshape(-1, values.shape[-1])
    return np.asarray(values - defects.medians(known).reshape(*values.shape[:-1], 1))


def _near(xs: NDArray[np.int64], ys: NDArray[np.int64], x: int, y: int, within: int) -> NDArray[np.bool_]:
    return np.asarray((np.abs(xs - x) <= within) & (np.abs(ys - y) <= within))


def _near_any(
    xs: NDArray[np.int64], ys: NDArray[np.int64], x: NDArray[np.int64], y: NDArray[np.int64], within: int
) -> NDArray[np.bool_]:
    """Return which of the pixels (xs, ys) have one of the pixels (x, y) in the square around them."""
    # Rows so far apart that the end of one is not near the begin of the next.
    length = int(max(xs.max(initial=0), x.max(initial=0))) + 2 * within + 1
    there = np.sort(y * length + x)
    near = np.zeros(len(xs), bool)
    for dy in range(-within, within + 1):
        at = (ys + dy) * length + xs
        near |= np.searchsorted(there, at - within) < np.searchsorted(there, at + within, side="right")
    return near


def warm_up() -> None:
    """Have the kernels compiled, or loaded from their cache, for the common kinds of frames."""
    noise = np.random.default_rng(0)
    for kind, layout in (
        (SampleKind.RAW, SensorLayout(96, 64, "RGGB", 1)),
        (SampleKind.RENDERED, SensorLayout(96, 64, "RGB", 3)),
    ):
        samples = noise.integers(40, 60, layout.shape)
        values = samples.astype(np.uint16) if kind is SampleKind.RAW else samples.astype(np.uint8)
        identity = SensorIdentity(None, None, None, kind, layout, values.dtype.name)
        sensor = Sensor(identity)
        for seq in range(2):
            sensor.fold(Frame(identity, values, ShotKind.LIGHT, ShotInfo()), seq)
