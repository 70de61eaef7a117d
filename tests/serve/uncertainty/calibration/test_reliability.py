"""How good confidences are, against the definitions, pair by pair and bin by bin."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loramux.uncertainty.calibration import reliability

items = st.lists(st.tuples(st.floats(0, 1), st.booleans()), min_size=1, max_size=50)


@given(items)
def test_definitions(found: list[tuple[float, bool]]) -> None:
    confidence, right = np.array([c for c, _ in found]), np.array([y for _, y in found])
    n, ece = len(found), 0.0
    for low in range(15):
        inside = [(c, y) for c, y in found if (low <= c * 15 < low + 1) or (low == 14 and c == 1)]
        if inside:
            gap = np.mean([y for _, y in inside]) - np.mean([c for c, _ in inside])
            ece += len(inside) / n * abs(float(gap))
    assert reliability.ece(confidence, right) == pytest.approx(ece, abs=1e-12)
    assert reliability.brier(confidence, right) == pytest.approx(np.mean([(c - y) ** 2 for c, y in found]))
    pairs = [(a > b) + (a == b) / 2 for a, one in found for b, other in found if one and not other]
    expected = float(np.mean(pairs)) if pairs else None
    assert reliability.auroc(confidence, right) == (None if expected is None else pytest.approx(expected))


def test_risk_at_coverage() -> None:
    confidence = np.array([0.1, 0.9, 0.5, 0.7])
    right = np.array([False, True, False, True])
    risks = [reliability.risk_at_coverage(confidence, right, share) for share in (0.01, 0.5, 0.75, 1.0)]
    assert risks == pytest.approx([0, 0, 1 / 3, 0.5]) and not math.isnan(risks[0])
