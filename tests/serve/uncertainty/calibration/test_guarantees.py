"""What is promised with a probability holds as often as promised: sets of labels, bounds and thresholds."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loramux.uncertainty.calibration import conformal, threshold
from loramux.uncertainty.calibration.conformal import Sets

#: A test that is right fails by chance once in so many runs.
ONCE_IN = 1e6


def at_least(probability: float, trials: int) -> int:
    """The number of successes that so many trials of at least this probability do not stay below by chance."""
    total = 0.0
    for k in range(trials + 1):
        log_choose = math.lgamma(trials + 1) - math.lgamma(k + 1) - math.lgamma(trials - k + 1)
        total += math.exp(log_choose + k * math.log(probability) + (trials - k) * math.log1p(-probability))
        if total > 1 / ONCE_IN:
            return k
    raise AssertionError


def drawn(rng: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities of a model that is wrong about its sureness, and labels."""
    logits = rng.normal(0, 2, (n, 4))
    honest = np.exp(logits / 2)
    honest /= honest.sum(1, keepdims=True)
    p = np.exp(logits)
    p /= p.sum(1, keepdims=True)
    return p, (rng.random((n, 1)) > honest.cumsum(1)).sum(1)


@pytest.mark.parametrize("sets", Sets)
@pytest.mark.parametrize(("n", "alpha"), [(30, 0.1), (100, 0.2), (19, 0.05)])
def test_sets_of_labels_hold_the_right_one(sets: Sets, n: int, alpha: float) -> None:
    """Calibration anew and one more item, many times: covered at least as often as 1 − α."""
    rng, trials, covered, sizes = np.random.default_rng(1), 1000, 0, 0
    for _ in range(trials):
        p, right = drawn(rng, n + 1)
        scores = conformal.nonconformity(p[:n], sets)[np.arange(n), right[:n]]
        found = conformal.prediction_set(p[n], conformal.limit(scores, alpha), sets)
        covered += right[n] in found
        sizes += len(found)
    assert covered >= at_least(1 - alpha, trials)
    assert sizes < 3.9 * trials  # not by naming all labels


def test_lac_is_as_tight_as_can_be() -> None:
    """Coverage is below 1 − α + 1/(n + 1), too: a set that is larger than it need be would show."""
    rng, trials, n, alpha, covered = np.random.default_rng(2), 3000, 49, 0.3, 0
    for _ in range(trials):
        p, right = drawn(rng, n + 1)
        scores = conformal.nonconformity(p[:n], Sets.LAC)[np.arange(n), right[:n]]
        inside = conformal.nonconformity(p[n], Sets.LAC) <= conformal.limit(scores, alpha)
        covered += bool(inside[right[n]])
    assert at_least(1 - alpha, trials) <= covered <= trials - at_least(alpha - 1 / (n + 1), trials)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(0.01, 1), min_size=2, max_size=6), st.booleans())
def test_nonconformity_is_its_definition(weights: list[float], ties: bool) -> None:
    p = np.array(weights + weights[:1] * ties)
    p /= p.sum()
    expected = [sum(other for other in p if other >= one) for one in p]
    assert conformal.nonconformity(p, Sets.APS) == pytest.approx(expected)
    assert conformal.nonconformity(np.stack([p, p]), Sets.APS)[1] == pytest.approx(expected)
    assert conformal.nonconformity(p, Sets.LAC) == pytest.approx(1 - p)


def test_the_limit_is_a_rank() -> None:
    scores = np.arange(1.0, 20.0)  # 19 of them
    assert [conformal.limit(scores, alpha) for alpha in (0.5, 0.1, 0.05, 0.04)] == [10, 18, 19, math.inf]
    p = np.array([0.2, 0.7, 0.1])
    assert conformal.prediction_set(p, math.inf, Sets.LAC) == [1, 0, 2]
    assert conformal.prediction_set(p, -1.0, Sets.LAC) == [1]  # never empty


def binomial_tail(errors: int, n: int, p: float) -> float:
    return sum(math.comb(n, k) * p**k * (1 - p) ** (n - k) for k in range(errors + 1))


@pytest.mark.parametrize(("errors", "n"), [(0, 1), (0, 29), (3, 50), (49, 50), (25, 50), (120, 400), (7, 10_000)])
@pytest.mark.parametrize("delta", [0.05, 0.005])
def test_the_bound_by_sums_of_binomials(errors: int, n: int, delta: float) -> None:
    bound = threshold.upper_bound(errors, n, delta)
    assert binomial_tail(errors, n, bound) == pytest.approx(delta, rel=1e-6)
    assert bound > errors / n


def test_bounds_at_their_ends() -> None:
    assert threshold.upper_bound(5, 5, 0.05) == 1.0
    assert threshold.upper_bound(0, 28, 0.05) > 0.1 > threshold.upper_bound(0, 29, 0.05)  # the rule of 29


@pytest.mark.parametrize("discrete", [False, True])
def test_the_risk_is_kept_as_often_as_promised(discrete: bool) -> None:
    """P(wrong | u) = u²: the true risk of what a threshold lets through is known."""
    rng, trials, n, risk, delta, kept, found = np.random.default_rng(3), 600, 200, 0.1, 0.1, 0, 0
    support = np.arange(1, 21) / 20
    for _ in range(trials):
        u = rng.choice(support, n) if discrete else rng.random(n)
        right = rng.random(n) >= u**2
        one = threshold.find(u, right, risk=risk, delta=delta)
        if one is None:
            kept += 1
            continue
        found += 1
        accepted = u <= one.value
        assert (accepted.sum(), (~right[accepted]).sum()) == (one.accepted, one.errors) and one.bound <= risk
        inside = support[support <= one.value]
        true = np.square(inside).mean() if discrete else min(one.value, 1.0) ** 2 / 3
        kept += true <= risk
    assert kept >= at_least(1 - delta, trials) and found > trials / 10  # and not by giving none


def test_trying_several_thresholds_costs_nothing_of_the_promise() -> None:
    """A risk just above what is asked for, wherever the threshold lies: each that is found is a mistake."""
    rng, trials, delta = np.random.default_rng(4), 400, 0.2
    found = sum(
        threshold.find(rng.random(400), rng.random(400) > 0.101, risk=0.1, delta=delta) is not None
        for _ in range(trials)
    )
    assert trials - found >= at_least(1 - delta, trials)


def test_a_threshold_lets_through_what_it_may() -> None:
    u = np.arange(29.0)
    everything = threshold.find(u, np.ones(29, bool), risk=0.1, delta=0.05)
    assert everything is not None and everything.value == math.inf and everything.accepted == 29
    assert threshold.find(u, np.arange(29) != 3, risk=0.1, delta=0.05) is None
    assert threshold.find(u[:28], np.ones(28, bool), risk=0.1, delta=0.05) is None
    u = np.arange(400.0)
    half = threshold.find(u, u < 200, risk=0.1, delta=0.05)
    assert half is not None and half.errors == 0 and half.accepted == 200 and 199 < half.value < 200
    assert threshold.find(np.ones(400), u < 300, risk=0.1, delta=0.05) is None  # equal scores are not parted
