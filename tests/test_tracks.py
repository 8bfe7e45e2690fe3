"""The memory of sites under suspicion: right neighbours, the latest observations, and an end to both."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from hotpixd.core import tracks as module
from hotpixd.core.frame import SensorLayout
from hotpixd.core.tracks import MOST, MOST_OBSERVED, OBSERVATION, RECENT, Tracks, neighbours_of
from hotpixd.simulate import XTRANS

LAYOUT = SensorLayout(400, 300, "RGGB")


def followed(n: int, layout: SensorLayout = LAYOUT) -> Tracks:
    """Return the memory of n sites, 3 apart."""
    tracks = Tracks(layout)
    tracks.add(np.arange(n) * 3 % layout.size, np.full(n, 9.0), seq=1)
    return tracks


def observations(values: NDArray[np.int64]) -> NDArray[np.void]:
    seen = np.zeros(len(values), OBSERVATION)
    seen["value"] = values
    return seen


@pytest.mark.parametrize(
    "layout",
    [
        SensorLayout(15, 13, "RGGB"),
        SensorLayout(43, 42, XTRANS),
        SensorLayout(11, 8, "RGB", 3),
        SensorLayout(9, 7, "L"),
    ],
)
def test_neighbours_are_the_24_nearest_of_the_plane(layout: SensorLayout):
    """A search through all samples finds the same: 5x5 of the own plane, shifted inwards at the border."""
    sites = np.arange(layout.size)
    found = neighbours_of(sites, layout)
    address = {}
    members: dict[tuple[int, int, int], int] = {}
    sizes = {}
    for p in range(layout.plane_count):
        plane = layout.plane(sites.reshape(layout.shape), p)
        sizes[p] = plane.shape
        for (row, col), site in np.ndenumerate(plane):
            address[int(site)] = (p, row, col)
            members[p, row, col] = int(site)
    for site in sites.tolist():
        p, row, col = address[site]
        top = min(max(row - 2, 0), sizes[p][0] - 5)
        left = min(max(col - 2, 0), sizes[p][1] - 5)
        near = {members[p, top + i, left + j] for i in range(5) for j in range(5)} - {site}
        assert set(found[site].tolist()) == near
        assert len(near) == found.shape[1]


def test_the_latest_observations_are_kept():
    """A ring: before it is full all are there, afterwards the oldest have gone."""
    tracks = followed(3)
    positions = tracks.observed()
    for i in range(RECENT + 10):
        tracks.observe(positions, observations(100 * positions + i))
        recent, held = tracks.recent_of(positions)
        for k in range(3):
            values = sorted((recent["value"][k][held[k]] - 100 * k).tolist())
            assert values == list(range(max(0, i + 1 - RECENT), i + 1))


def test_a_dropped_sites_memory_is_not_its_successors():
    """Rows of others stay as they are; the place is used again, and empty."""
    tracks = followed(4)
    tracks.observe(tracks.observed(), observations(np.arange(4) + 50))
    tracks.drop(np.array([1]))
    assert tracks.rows["site"].tolist() == [0, 6, 9]
    new = tracks.add(np.array([500]), np.array([8.0]), seq=7)
    assert tracks.rows["slot"][new] == 1
    recent, held = tracks.recent_of(np.arange(4))
    assert held.sum(axis=1).tolist() == [1, 1, 1, 0]
    assert recent["value"][:3, 0].tolist() == [50, 52, 53]
    np.testing.assert_array_equal(tracks.neighbours, neighbours_of(tracks.rows["site"], LAYOUT))


def test_only_so_many_sites_are_observed_and_followed(monkeypatch: pytest.MonkeyPatch):
    """Beyond the slots sites are followed without observations; beyond the room they are left out."""
    n = MOST_OBSERVED + 5
    tracks = followed(n)
    assert len(tracks) == n
    assert tracks.observed().tolist() == list(range(MOST_OBSERVED))
    _, held = tracks.recent_of(np.arange(n))
    assert not held.any()
    assert len(followed(MOST_OBSERVED + 1).recent) == MOST_OBSERVED
    monkeypatch.setattr(module, "MOST", 10)
    few = followed(7)
    assert few.add(np.arange(1000, 1020), np.zeros(20), seq=2).tolist() == [7, 8, 9]
    assert len(few) == 10
    assert MOST > MOST_OBSERVED


def test_a_restored_memory_is_the_same():
    """Rows, observations and neighbours; an empty one too."""
    tracks, restored, empty = followed(9), Tracks(LAYOUT), Tracks(LAYOUT)
    empty.restore(empty.arrays())
    assert len(empty) == 0
    for i in range(5):
        tracks.observe(tracks.observed(), observations(np.arange(9) + i))
    tracks.drop(np.array([8, 2]))
    restored.restore(tracks.arrays())
    np.testing.assert_array_equal(restored.rows, tracks.rows)
    np.testing.assert_array_equal(restored.neighbours, tracks.neighbours)
    every = np.arange(len(tracks))
    for one, other in zip(restored.recent_of(every), tracks.recent_of(every), strict=True):
        np.testing.assert_array_equal(one, other)
    for each in (tracks, restored):
        each.add(np.array([700, 800, 900]), np.zeros(3), seq=9)
    np.testing.assert_array_equal(restored.rows, tracks.rows)


def test_a_copy_can_be_changed_alone():
    """Looking at the defects classifies a copy."""
    tracks = followed(3)
    twin = tracks.copy()
    twin.rows["kind"] = 5
    assert tracks.rows["kind"].tolist() == [0, 0, 0]
    assert twin.rows["site"].tolist() == tracks.rows["site"].tolist()
