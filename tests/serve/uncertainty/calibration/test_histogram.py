from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loramux.uncertainty.calibration.histogram import Histogram

scores = st.lists(st.floats(-10, 10), min_size=1, max_size=60)


@given(scores, scores)
def test_psi_is_its_definition(before: list[float], after: list[float]) -> None:
    found = Histogram.of(np.array(before))
    ends = [-np.inf, *found.edges, np.inf]
    psi = 0.0
    for low, high in itertools.pairwise(ends):
        e, a = ((sum(low <= x < high for x in xs) + 0.5) / (len(xs) + 0.5 * (len(ends) - 1)) for xs in (before, after))
        psi += (a - e) * np.log(a / e)
    assert found.psi(after) == pytest.approx(psi, abs=1e-9) and found.psi(after) >= 0
    assert found.psi(before) == pytest.approx(0, abs=1e-9)
    assert sum(found.counts) == len(before) and len(found.counts) <= 10


def test_what_shifts_is_seen_and_what_does_not_is_not() -> None:
    rng = np.random.default_rng(0)
    found = Histogram.of(rng.exponential(1, 1000))
    assert found.psi(rng.exponential(1, 200)) < 0.1 < 0.25 < found.psi(rng.exponential(2, 200))
