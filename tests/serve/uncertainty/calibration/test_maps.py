"""Maps to a confidence against references that know nothing of how they are found."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loramux.uncertainty.calibration import isotonic, platt, temperature

rng = np.random.default_rng(5)


def overconfident(n: int, labels: int, true_temperature: float) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities that are too sure by this temperature, and labels drawn from the right ones."""
    logits = rng.normal(0, 1.5, (n, labels))
    honest = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    right = np.array([rng.choice(labels, p=p) for p in honest])
    sharp = np.exp(logits * true_temperature)
    return sharp / sharp.sum(1, keepdims=True), right


def nll(p: np.ndarray, right: np.ndarray, t: float) -> float:
    """By the definition, label by label."""
    powers = p ** (1 / t)
    return float(-np.log(powers[np.arange(len(p)), right] / powers.sum(1)).sum())


@pytest.mark.parametrize("true", [0.5, 1.0, 3.0])
def test_a_temperature_is_the_best_of_a_grid(true: float) -> None:
    p, right = overconfident(3000, 4, true)
    found = temperature.fit(p, right)
    grid = np.exp(np.linspace(np.log(0.05), np.log(20), 2001))
    best = grid[int(np.argmin([nll(p, right, t) for t in grid]))]
    assert found == pytest.approx(best, rel=4e-3) and nll(p, right, found) <= nll(p, right, best) + 1e-9
    assert found == pytest.approx(true, rel=0.2)


def test_temperature_of_one_is_nothing_and_none_changes_the_order() -> None:
    p, _ = overconfident(50, 3, 2.0)
    assert temperature.apply(p, 1.0) == pytest.approx(p)
    assert (temperature.apply(p, 7.0).argsort(1) == p.argsort(1)).all()
    assert temperature.apply(p, 2.0) == pytest.approx(np.sqrt(p) / np.sqrt(p).sum(1, keepdims=True))


@pytest.mark.parametrize(("place", "end"), [(0, 1 / temperature.MAX_TEMPERATURE), (1, temperature.MAX_TEMPERATURE)])
def test_temperatures_without_a_best_one_end(place: int, end: float) -> None:
    """All right, all wrong."""
    p = np.array([[0.9, 0.1]] * 20)
    assert temperature.fit(p, np.full(20, place)) == pytest.approx(end)
    assert np.isfinite(temperature.apply(p, end)).all()


def test_a_label_that_nothing_thinks_of() -> None:
    p = np.array([[0.9, 0.1, 0.0]] * 20)
    assert temperature.fit(p, np.full(20, 2)) == pytest.approx(temperature.MAX_TEMPERATURE)
    assert np.isfinite(temperature.apply(p, 1.0)).all()


def platt_loss(a: float, b: float, x: np.ndarray, right: np.ndarray) -> float:
    ones, zeros = right.sum(), (~right).sum()
    target = np.where(right, (ones + 1) / (ones + 2), 1 / (zeros + 2))
    p = 1 / (1 + np.exp(-(a * x + b)))
    return float(-(target * np.log(p) + (1 - target) * np.log(1 - p)).sum())


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
def test_a_sigmoid_has_the_smallest_loss_around(scale: float) -> None:
    x = rng.exponential(scale, 200)
    right = rng.random(200) < 1 / (1 + np.exp(2 * x / scale - 2))
    found = platt.fit(x, right)
    a, b = found.a / found.scale, found.b - found.a * found.centre / found.scale
    assert found(x) == pytest.approx(1 / (1 + np.exp(-(a * x + b))))
    least = platt_loss(a, b, x, right)
    for da in np.linspace(-1, 1, 41) / scale:
        for db in np.linspace(-1, 1, 41):
            assert platt_loss(a + da, b + db, x, right) >= least - 1e-9
    for step in (1e-3, -1e-3):  # and not only on the grid
        assert platt_loss(a + step / scale, b, x, right) > least < platt_loss(a, b + step, x, right)


def test_a_sigmoid_of_what_is_told_apart_without_an_error_is_finite() -> None:
    x = np.arange(40.0)
    right = x < 20
    p = platt.fit(x, right)(x)
    assert p[right].min() > 0.5 > p[~right].max() and p.min() > 0 and p.max() < 1
    same = platt.fit(np.ones(40), right)(np.ones(40))
    assert same == pytest.approx(0.5)
    assert np.isfinite(platt.fit(x, right)(np.array([-1e300, 1e300]))).all()


def min_max(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Isotonic regression by its formula: f(x_i) = min over l ≤ i of max over u ≥ i of mean y_l…u, falling with x."""
    values = np.unique(x)
    sums = np.array([y[x == value].sum() for value in values], float)
    counts = np.array([(x == value).sum() for value in values], float)
    f = []
    for i in range(len(values)):
        means = [
            max(sums[low : high + 1].sum() / counts[low : high + 1].sum() for high in range(i, len(values)))
            for low in range(i + 1)
        ]
        f.append(min(means))
    return np.array(f)[np.searchsorted(values, x)]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 12), st.booleans()), min_size=1, max_size=40))
def test_isotonic_is_the_min_max_formula(items: list[tuple[int, bool]]) -> None:
    x, y = np.array([x for x, _ in items], float), np.array([y for _, y in items])
    found = isotonic.fit(x, y)
    assert found(x) == pytest.approx(min_max(x, y))
    assert (np.diff(found.x) > 0).all() and (np.diff(found.y) <= 1e-12).all()
    ends = found(np.array([-5.0, 50.0]))
    assert ends[0] == found.y[0] and ends[1] == found.y[-1]


def test_isotonic_is_the_least_square_among_monotone_functions() -> None:
    """The quadratic definition, on a grid of all falling step functions of four scores."""
    x = np.array([0, 0, 1, 1, 2, 2, 2, 3, 3, 3], float)
    y = np.array([1, 0, 1, 1, 0, 1, 0, 0, 1, 0], bool)
    found = isotonic.fit(x, y)(x)
    levels = np.linspace(0, 1, 25)
    grid = ((a, b, c, d) for a in levels for b in levels for c in levels for d in levels if a >= b >= c >= d)
    best = min(float(np.square(np.array(f)[x.astype(int)] - y).sum()) for f in grid)
    assert float(np.square(found - y).sum()) <= best + 1e-12
