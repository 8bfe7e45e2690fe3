"""What defective samples would have read: interpolation along the direction that fits, whatever the layout."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from hotpixd.core.frame import SensorLayout
from hotpixd.core.inpaint import REACH, Filled, inpaint, local_noise
from hotpixd.simulate import RESPONSE, XTRANS

LAYOUTS = {
    "bayer": SensorLayout(40, 30, "RGGB"),
    "xtrans": SensorLayout(42, 36, XTRANS),
    "mono": SensorLayout(31, 23, "L"),
    "unknown": SensorLayout(40, 30, "LLLL"),
    "rgb": SensorLayout(24, 20, "RGB", 3),
}


def colour_of(layout: SensorLayout) -> NDArray[np.int64]:
    """Return a number per sample that is equal where one may stand in for another: an independent statement of it."""
    rows, columns = np.indices(layout.shape)
    if layout.channels > 1:
        return np.asarray(columns % layout.channels)
    place = rows % layout.period * layout.period + columns % layout.period
    if layout.colours == "LLLL":
        return np.asarray(place)
    return np.array(["RGBL".index(letter) for letter in layout.colours])[place]


def noise(layout: SensorLayout, seed: int = 0) -> NDArray[np.uint16]:
    return np.random.default_rng(seed).integers(100, 16_000, layout.shape).astype(np.uint16)


def soft_step(distance: NDArray[Any]) -> NDArray[Any]:
    return 1.0 / (1.0 + np.exp(-distance / 0.45))


def scene(name: str, height: int, width: int, seed: int = 0) -> NDArray[np.float64]:
    """Return light with edges or lines under an angle, or with a texture as natural scenes have."""
    y, x = np.mgrid[:height, :width].astype(float)
    kind, _, angle = name.partition(" ")
    if kind == "texture":
        squared = np.fft.fftfreq(height)[:, None] ** 2 + np.fft.fftfreq(width) ** 2
        squared[0, 0] = 1.0
        spectrum = np.fft.fft2(np.random.default_rng(seed).normal(size=(height, width)))
        field = np.fft.ifft2(spectrum * squared**-0.6 * np.exp(-7 * squared)).real
        return 3000 + 1200 * field / field.std()
    turned = np.deg2rad(float(angle))
    across = x * np.cos(turned) + y * np.sin(turned) + 1003.3
    if kind == "edge":
        return 1000 + 6000 * soft_step(across % 40 - 20)
    return 1000 + 6000 * np.exp(-0.5 * ((across % 16 - 8) / 0.6) ** 2)


def mosaic(light: NDArray[np.float64], layout: SensorLayout, seed: int = 0) -> NDArray[np.uint16]:
    """Return what a sensor makes of grey light, with shot noise."""
    out = light.copy()
    period = layout.period
    for place, letter in enumerate(layout.colours):
        row, column = divmod(place, period)
        out[row::period, column::period] *= RESPONSE[letter]
    out += np.random.default_rng(seed).normal(size=out.shape) * np.sqrt(np.maximum(out, 0) / 2.8)
    return np.clip(np.rint(out), 0, 16_383).astype(np.uint16)


def root_mean_square(values: Any, truth: Any) -> float:
    return float(np.sqrt(np.mean((np.asarray(values, float) - np.asarray(truth, float)) ** 2)))


@st.composite
def spoilt(draw: st.DrawFn) -> tuple[SensorLayout, NDArray[np.uint16], NDArray[np.int64]]:
    """A picture and some of its sites: single ones, clusters, corners, rows, columns, half of it."""
    layout = LAYOUTS[draw(st.sampled_from(sorted(LAYOUTS)))]
    samples = noise(layout, draw(st.integers(0, 5)))
    bad = np.zeros(layout.shape, bool)
    for _ in range(draw(st.integers(1, 6))):
        row, column = draw(st.integers(0, layout.shape[0] - 1)), draw(st.integers(0, layout.shape[1] - 1))
        match draw(st.sampled_from(["site", "cluster", "row", "column", "corner", "half"])):
            case "site":
                bad[row, column] = True
            case "cluster":
                bad[row : row + draw(st.integers(1, 7)), column : column + draw(st.integers(1, 7))] = True
            case "row":
                bad[row] = True
            case "column":
                bad[:, column] = True
            case "corner":
                bad[: draw(st.integers(1, 4)), -draw(st.integers(1, 4)) :] = True
            case "half":
                bad[: layout.shape[0] // 2] = True
    return layout, samples, np.flatnonzero(bad)


@given(spoilt(), st.randoms(use_true_random=False))
@settings(max_examples=150, deadline=None)
def test_any_set_of_sites_is_filled_from_healthy_samples_of_its_colour(given_: Any, shuffler: Any):
    """Finite and within the range of healthy same-colour samples; nothing else changes; neither order nor repetition
    nor what the defective samples read matters."""
    layout, samples, sites = given_
    before = samples.copy()
    filled = inpaint(samples, layout, sites)
    assert (samples == before).all()
    healthy = np.ones(layout.size, bool)
    healthy[sites] = False
    colours = colour_of(layout).ravel()
    assert np.isfinite(filled.values.astype(float)).all()
    for colour in np.unique(colours[sites]):
        own = filled.found & (colours[sites] == colour)
        usable = samples.ravel()[healthy & (colours == colour)]
        assert usable.size or not own.any()
        if own.any():
            assert filled.values[own].min() >= usable.min()
            assert filled.values[own].max() <= usable.max()
    assert (filled.values[~filled.found] == samples.ravel()[sites][~filled.found]).all()

    order = list(range(len(sites)))
    shuffler.shuffle(order)
    shuffled = inpaint(samples, layout, sites[order])
    assert (shuffled.values == filled.values[order]).all()

    repaired = samples.copy()
    repaired.reshape(-1)[sites] = filled.values
    assert (inpaint(repaired, layout, sites).values == filled.values).all()
    ruined = samples.copy()
    ruined.reshape(-1)[sites[filled.found]] = 65_535
    assert (inpaint(ruined, layout, sites).values == filled.values)[filled.found].all()


@pytest.mark.parametrize("name", sorted(LAYOUTS))
def test_a_flat_field_stays_flat(name: str):
    """No layout mixes colours: each has a level of its own, and every filled site gets that of its colour."""
    layout = LAYOUTS[name]
    samples = (1000 * (1 + colour_of(layout))).astype(np.uint16)
    sites = np.arange(0, layout.size, 7)
    ruined = samples.copy()
    ruined.reshape(-1)[sites] = 65_535
    assert (inpaint(ruined, layout, sites).values == samples.reshape(-1)[sites]).all()


def test_avoided_sites_are_not_used():
    """A defect that is not corrected is no source for others either."""
    layout = SensorLayout(20, 20, "L")
    samples = np.full(layout.shape, 500, np.uint16)
    samples[10, :] = 60_000
    row = np.arange(200, 220)
    filled = inpaint(samples, layout, np.array([210]), row)
    assert filled.values.tolist() == [500]


def test_a_site_without_healthy_samples_near_is_left():
    """All is defective: nothing can be said, and this is told."""
    layout = SensorLayout(20, 20, "RGGB")
    samples = noise(layout)
    filled = inpaint(samples, layout, np.arange(400))
    assert not filled.found.any()
    assert (filled.values == samples.ravel()).all()
    wide = SensorLayout(4 * REACH, 40, "L")
    middle = inpaint(noise(wide), wide, np.arange(wide.size)[np.arange(wide.size) % wide.width < 3 * REACH])
    assert middle.found.any()
    assert not middle.found.all()


def test_wrong_shapes_and_sites_are_refused():
    """With the numbers, before anything is read outside of the array."""
    layout = SensorLayout(20, 20, "L")
    with pytest.raises(ValueError, match=r"shape \(20, 19\)"):
        inpaint(np.zeros((20, 19), np.uint16), layout, np.array([0]))
    for site in (-1, 400):
        with pytest.raises(ValueError, match="400 samples"):
            inpaint(np.zeros((20, 20), np.uint16), layout, np.array([site]))


@pytest.mark.parametrize("pattern", ["RGGB", XTRANS, "L"], ids=["bayer", "xtrans", "mono"])
@pytest.mark.parametrize(
    ("name", "share"),
    [("edge 0", 0.5), ("edge 45", 0.5), ("edge 90", 0.5), ("edge 135", 0.5), ("edge 63", 0.85),
     ("line 0", 0.1), ("line 45", 0.1), ("line 90", 0.1), ("line 63", 0.1), ("texture", 0.9)],
)  # fmt: skip
def test_it_beats_the_median_of_neighbours(name: str, share: float, pattern: str):
    """On edges and lines of all directions and on texture; or is as good as noise lets any be."""
    layout = SensorLayout(240, 240, pattern)
    samples = mosaic(scene(name, 240, 240), layout)
    grid = np.arange(14, 226, 7)
    sites = (grid[:, None] * 240 + grid + np.arange(len(grid)) % 5).ravel()
    truth = samples.reshape(-1)[sites]
    ruined = samples.copy()
    ruined.reshape(-1)[sites] = 16_383
    error = root_mean_square(inpaint(ruined, layout, sites).values, truth)
    colours = colour_of(layout)
    reach = 2 if layout.period > 1 else 1
    medians = []
    for site in sites.tolist():
        row, column = divmod(site, 240)
        around = (slice(row - reach, row + reach + 1), slice(column - reach, column + reach + 1))
        same = colours[around] == colours[row, column]
        same[reach, reach] = False
        medians.append(np.median(ruined[around][same]))
    noise_alone = 1.3 * np.sqrt(float(truth.mean()) / 2.8)
    assert error < max(share * root_mean_square(medians, truth), noise_alone)


def test_local_noise_is_that_of_the_planted_noise_even_beside_an_edge():
    """And a hot neighbour, or the colours' own levels, add nothing to it."""
    layout = SensorLayout(100, 100, "RGGB")
    rng = np.random.default_rng(3)
    samples = np.full(layout.shape, 1000.0) + 4000 * (np.arange(100) >= 50)
    samples[::2, ::2] *= 2
    samples += rng.normal(0, 25, layout.shape)
    samples[40, 44] = 60_000
    sites = np.array([40 * 100 + 46, 60 * 100 + 20, 0, 9_999])
    found = local_noise(samples.astype(np.uint16), layout, sites, np.array([4044]))
    assert found == pytest.approx([25] * 4, rel=0.35)
    assert local_noise(np.full(layout.shape, 7, np.uint16), layout, sites, sites).max() < 0.5


def test_filled_says_of_which_type_it_is():
    """Floats stay floats: components of a JPEG are not rounded here."""
    layout = SensorLayout(20, 20, "L")
    filled: Filled = inpaint(np.full((20, 20), 2.5, np.float32), layout, np.array([45]))
    assert filled.values.dtype == np.float32
    assert filled.values.tolist() == [2.5]
