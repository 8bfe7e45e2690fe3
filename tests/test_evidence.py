"""Evidence: the e-value is what its formula says, and chance alone rarely makes it large, whenever one looks."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import integrate, special, stats

from hotpixd.core.accumulator import Accumulator, FrameEvents
from hotpixd.core.evidence import (
    EXTREME_FLOORS,
    OUTSTANDING_FLOOR,
    PRIOR,
    WITNESSES,
    NullRates,
    Pattern,
    SceneGate,
    combined_log_e,
    count_limits,
    log_e,
)
from hotpixd.core.frame import SensorLayout

RATES = ((1e-6, 1 / 49), (1e-4, 1 / 49), (2e-3, 2 / 49), (0.02, 0.05), (0.3, 0.4))
"""Null rates (outstanding, extreme): calm, usual, either side, crowded, absurd."""

LAYOUT = SensorLayout(300, 200, "RGGB")


def of(rates: NullRates, witness: int) -> tuple[float, float]:
    """Return a witness's null rates (outstanding, extreme)."""
    return float(rates.outstanding[witness]), float(rates.extreme[witness])


def outcomes(n: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return all (outstanding, extreme) that n frames can show."""
    k2, extreme = np.indices((n + 1, n + 1)).reshape(2, -1)
    possible = extreme >= k2
    return k2[possible], extreme[possible]


def largest_null_log_likelihood(k2: float, k1: float, k0: float, p2: float, p1: float) -> float:
    """Return the maximum over the box of null rates, by trying all that it can be: inside, or at either bound."""
    n = k2 + k1 + k0
    inside = [(k2 / n, k1 / n), (p2, (1 - p2) * k1 / max(k1 + k0, 1)), ((1 - p1) * k2 / max(k2 + k0, 1), p1), (p2, p1)]
    return max(
        float(special.xlogy(k2, q2) + special.xlogy(k1, q1) + special.xlogy(k0, 1 - q1 - q2))
        for q2, q1 in inside
        if q2 <= p2 and q1 <= p1
    )


def chances(n: int, q2: float, q1: float) -> NDArray[np.float64]:
    """Return the probability of each of `outcomes` for frames that are outstanding with q2, merely extreme with q1."""
    k2, extreme = outcomes(n)
    return stats.multinomial.pmf(np.stack([k2, extreme - k2, n - extreme], axis=1), n, [q2, q1, 1 - q1 - q2])


@pytest.mark.parametrize("rates", RATES)
@pytest.mark.parametrize("n", [1, 2, 7, 40])
def test_ln_e_is_its_formula(n: int, rates: tuple[float, float]):
    """Gamma functions and the exact maximum over the null rates give the same number for all outcomes."""
    k2, extreme = outcomes(n)
    a2, a1, a0 = PRIOR

    def log_beta(*a: NDArray[np.int64] | int) -> NDArray[np.float64]:
        return np.asarray(sum(special.gammaln(x) for x in a) - special.gammaln(sum(a)))

    mixture = log_beta(a2 + k2, a1 + extreme - k2, a0 + n - extreme) - log_beta(a2, a1, a0)
    null = [
        largest_null_log_likelihood(k, e - k, n - e, *rates) for k, e in zip(k2.tolist(), extreme.tolist(), strict=True)
    ]
    np.testing.assert_allclose(log_e(n, k2, extreme, rates), mixture - null, rtol=1e-10, atol=1e-9)


@pytest.mark.parametrize("rates", [(1e-4, 1 / 49), (0.02, 0.05)])
def test_e_is_the_integral_of_the_likelihood_ratio(rates: tuple[float, float]):
    """Numerical integration over a defect's rates, with the density of the prior, gives the same e-value."""
    n = 5
    k2, extreme = outcomes(n)
    found = np.exp(log_e(n, k2, extreme, rates))
    for e_value, a, b in zip(found, k2.tolist(), (extreme - k2).tolist(), strict=True):
        c = n - a - b
        null = math.exp(largest_null_log_likelihood(a, b, c, *rates))

        def weighed(q1: float, q2: float, a: int = a, b: int = b, c: int = c) -> float:
            density = stats.dirichlet.pdf([q2, q1, 1 - q2 - q1], PRIOR) if 0 < q2 + q1 < 1 else 0.0
            return float(density) * q2**a * q1**b * (1 - q2 - q1) ** c

        integral, _ = integrate.dblquad(weighed, 0, 1, 0, lambda q2: 1 - q2, epsrel=1e-6)
        assert integral / null == pytest.approx(e_value, rel=1e-4)


@pytest.mark.parametrize("rates", RATES)
@pytest.mark.parametrize("n", [1, 3, 12, 45])
def test_its_expectation_under_the_null_is_at_most_one(n: int, rates: tuple[float, float]):
    """By enumeration, at the assumed null rates and at all lower ones: fewer events are no evidence either."""
    e_values = np.exp(log_e(n, *outcomes(n), rates))
    for share2, share1 in itertools.product((0.0, 0.01, 0.3, 0.9, 1.0), repeat=2):
        expected = (chances(n, share2 * rates[0], share1 * rates[1]) * e_values).sum()
        assert expected <= 1 + 1e-9


@pytest.mark.parametrize("rates", RATES)
@pytest.mark.parametrize(("calm", "usual"), [(1, 1), (5, 15), (20, 20), (35, 5)])
def test_null_rates_may_change_from_frame_to_frame(calm: int, usual: int, rates: tuple[float, float]):
    """Frames without an event mixed with frames of the largest null rates: the expectation stays at most one."""
    e_values = log_e(calm + usual, *outcomes(usual), rates)
    assert (chances(usual, *rates) * np.exp(e_values)).sum() <= 1 + 1e-9


@pytest.mark.parametrize("varying", [False, True], ids=["same rates", "rates that come and go"])
def test_chance_alone_rarely_ever_exceeds_a_level(varying: bool):
    """Of healthy samples at most a share a ever reaches e = 1/a, though one looks after every frame (Ville)."""
    rng = np.random.default_rng(3)
    samples, frames = 50_000, 120
    rates = NullRates(outstanding=np.array([0.004, 0.004, 0.008]))
    out, plain = 0.004, 1 / 49
    counts = np.zeros((4, samples), np.int64)
    largest = np.full(samples, -np.inf)
    for n in range(1, frames + 1):
        now = 1.0 if not varying or n % 40 < 10 else 0.1
        drawn = rng.random(samples) / now
        # High outstanding, merely high, low outstanding, merely low; one at a time.
        bounds = np.cumsum([out, plain, out, plain])
        which = np.searchsorted(bounds, drawn, side="right")
        counts += np.stack([which <= 1, (which == 2) | (which == 3), which == 0, which == 2])
        largest = np.maximum(largest, combined_log_e(n, counts, rates))
    for a in (0.5, 0.1, 0.01, 0.001):
        # Three standard deviations of the count for the simulation's own chance.
        assert (largest >= math.log(1 / a)).mean() <= a + 3 * math.sqrt(a / samples)
    # The test can tell: healthy samples do come near.
    assert (largest >= math.log(2)).mean() > 0.001


@pytest.mark.parametrize("level", [3.0, 9.1, 15.6, 21.6])
@pytest.mark.parametrize("rates", [RATES[0], RATES[1], RATES[3]])
def test_limits_are_those_of_trying_all_counts(level: float, rates: tuple[float, float]):
    """The least extremes that reach the level with so many outstanding ones or fewer; below it none does.

    Few extremes beside some outstanding ones reached the level and were not named: only more than chance explains
    had been tried.
    """
    null = NullRates(np.array([rates[1], rates[1], 2 * rates[1]]), np.array([rates[0], rates[0], 2 * rates[0]]))
    for n in [*range(1, 61), 500, 3000]:
        limits = count_limits(n, null, level)
        columns = limits.shape[1]
        assert columns >= 2
        k2, extreme = np.indices((columns if n > 60 else n + 1, n + 1))
        for i in range(WITNESSES):
            possible = extreme >= k2
            enough = (log_e(n, k2, np.maximum(extreme, k2), of(null, i)) >= level) & possible
            least = np.where(enough.any(axis=1), enough.argmax(axis=1), n + 1)
            expected = np.minimum.accumulate(least)
            found = limits[i, np.minimum(np.arange(len(k2)), columns - 1)]
            suffices = (enough | ~possible).all(axis=1)
            assert (found[found == 0] == 0).all() and suffices[found == 0].all()
            np.testing.assert_array_equal(found[found > 0], expected[found > 0])


def test_the_combined_e_value_is_the_mean_of_three_witnesses():
    """High, low, and either; before the first frame it is one."""
    rates = NullRates(outstanding=np.array([1e-4, 2e-4, 3e-4]))
    counts = np.array([[9, 0, 5, 0], [0, 8, 5, 0], [4, 0, 1, 0], [0, 3, 1, 0]])
    high, low, high_out, low_out = counts
    each = [
        np.exp(log_e(20, high_out, high, of(rates, 0))),
        np.exp(log_e(20, low_out, low, of(rates, 1))),
        np.exp(log_e(20, high_out + low_out, high + low, of(rates, 2))),
    ]
    np.testing.assert_allclose(combined_log_e(20, counts, rates), np.log(np.mean(each, axis=0)))
    np.testing.assert_array_equal(combined_log_e(0, 0 * counts, rates), 0.0)


def events_with(totals: tuple[int, int, int, int]) -> FrameEvents:
    """Return a frame's events of which only the totals matter."""
    return FrameEvents(np.zeros((1, 48), np.uint8), np.array(totals), np.zeros((16, 48), np.int64))


def test_null_rates_are_the_largest_seen_and_never_below_the_floor():
    """A calm frame after a crowded one changes nothing; either side together is at most the sum."""
    rates = NullRates()
    n = LAYOUT.size
    rates.include(events_with((0, 0, 0, 0)), LAYOUT)
    assert of(rates, 0) == (OUTSTANDING_FLOOR, EXTREME_FLOORS[0])
    assert of(rates, 2) == (OUTSTANDING_FLOOR, 2 / 49)
    rates.include(events_with((3000, 600, 60, 30)), LAYOUT)
    rates.include(events_with((600, 2400, 30, 120)), LAYOUT)
    assert of(rates, 0) == (60 / n, 3000 / n)
    assert of(rates, 1) == (120 / n, 2400 / n)
    assert of(rates, 2) == pytest.approx((150 / n, 3600 / n))


def light(seed: int, accumulator: Accumulator) -> Pattern:
    """Fold a scene's frame of noise; the same seed is the same scene."""
    scene = np.random.default_rng(seed).normal(1000, 100, LAYOUT.shape)
    return SceneGate(LAYOUT, 1).pattern(accumulator.fold(scene.astype(np.uint16), lone=True))


@pytest.fixture
def accumulator() -> Accumulator:
    return Accumulator(LAYOUT, "uint16")


def test_the_gate_tells_another_scene_from_the_same(accumulator: Accumulator):
    """Independent scenes repeat each other about as often as chance, a scene repeats itself many times as often."""
    gate = SceneGate(LAYOUT, 8)
    assert gate.lift(light(0, accumulator)) is None
    gate.remember(light(0, accumulator))
    others = [gate.lift(light(seed, accumulator)) for seed in range(1, 6)]
    assert all(lift is not None and 0.3 < lift < 2 for lift in others)
    again = gate.lift(light(0, accumulator))
    assert again is not None
    assert again > 10


def test_going_back_and_forth_between_two_scenes_is_caught(accumulator: Accumulator):
    """Not only the frame before is remembered; what is older than the memory is forgotten."""
    gate = SceneGate(LAYOUT, 2)
    for seed in (0, 1):
        gate.remember(light(seed, accumulator))
    assert all(gate.lift(light(seed, accumulator)) > 10 for seed in (0, 1, 0, 1))  # type: ignore[operator]
    gate.remember(light(2, accumulator))
    assert gate.lift(light(0, accumulator)) < 2  # type: ignore[operator]
    assert gate.lift(light(1, accumulator)) > 10  # type: ignore[operator]


def test_the_prediction_is_made_by_position_in_the_grid(accumulator: Accumulator):
    """Extremes that keep to some positions of a block, as JPEG's do, are no scene that stands still."""
    gate = SceneGate(LAYOUT, 8)
    rng = np.random.default_rng(5)

    def blocky() -> Pattern:
        samples = np.full(LAYOUT.shape, 1000)
        # Only the first two columns of each block vary, so every extreme lies there.
        for offset in range(2):
            samples[:, offset::16] += rng.integers(1, 200, samples[:, offset::16].shape)
        return gate.pattern(accumulator.fold(samples.astype(np.uint16), lone=False))

    gate.remember(blocky())
    lift = gate.lift(blocky())
    assert lift is not None
    assert 0.7 < lift < 1.5


def test_a_restored_gate_decides_the_same(accumulator: Accumulator):
    """What is saved is all it knows; an empty one can be saved too."""
    gate, restored, empty = (SceneGate(LAYOUT, 3) for _ in range(3))
    empty.restore(gate.arrays())
    assert empty.lift(light(0, accumulator)) is None
    for seed in range(5):
        gate.remember(light(seed, accumulator))
    restored.restore({name: array.copy() for name, array in gate.arrays().items()})
    for seed in (2, 4, 7, 3, 8):
        assert restored.lift(light(seed, accumulator)) == gate.lift(light(seed, accumulator))
        for each in (gate, restored):
            each.remember(light(seed, accumulator))
