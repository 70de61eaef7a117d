"""Scores against their definitions, summed term by term over the vocabulary."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loramux.uncertainty import scores
from loramux.uncertainty.scores import Array


def predictive(draws: int, tokens: int, words: int = 30, spread: float = 1.0, seed: int = 0) -> Array:
    """p_s,t: [S, n, V]."""
    rng = np.random.default_rng(seed)
    z = rng.normal(size=(1, tokens, words)) * 2 + spread * rng.normal(size=(draws, tokens, words))
    p: Array = np.exp(z) / np.exp(z).sum(-1, keepdims=True)
    return p


def by_hand(p: Array) -> float:
    return -sum(float(x) * math.log(x) for x in p if x > 0)


def split(p: Array) -> scores.Split:
    return scores.split(scores.entropy(p.mean(0)), scores.entropy(p))


def test_the_parts_of_an_uncertainty() -> None:
    p = predictive(4, 3)
    parts = split(p)
    for t in range(3):
        total = by_hand(p[:, t].mean(0))
        aleatoric = sum(by_hand(p[s, t]) for s in range(4)) / 4
        # The mutual information of token and draw, by its definition.
        mi = sum(float(p[s, t, v]) / 4 * math.log(p[s, t, v] / p[:, t, v].mean()) for s in range(4) for v in range(30))
        assert parts.total_raw[t] == pytest.approx(total, abs=1e-12)
        assert parts.aleatoric[t] == pytest.approx(aleatoric, abs=1e-12)
        assert parts.epistemic_raw[t] == pytest.approx(mi, abs=1e-12)
        assert parts.epistemic[t] == pytest.approx(mi * 4 / 3, abs=1e-12)
        assert parts.total[t] == pytest.approx(aleatoric + mi * 4 / 3, abs=1e-12)


@settings(max_examples=50, deadline=None)
@given(st.integers(2, 9), st.integers(1, 5), st.floats(0, 3), st.integers(0, 2**20))
def test_bounds(draws: int, tokens: int, spread: float, seed: int) -> None:
    """0 ≤ epistemic ≤ log S, aleatoric ≤ total ≤ log V, before the correction."""
    parts = split(predictive(draws, tokens, spread=spread, seed=seed))
    assert np.all(parts.epistemic_raw >= 0) and np.all(parts.epistemic_raw <= np.log(draws) + 1e-12)
    assert np.all(parts.total_raw <= np.log(30) + 1e-12)


def test_equal_draws_agree() -> None:
    parts = split(np.repeat(predictive(1, 4), 8, 0))
    assert parts.epistemic.max() < 1e-14


def test_the_correction_makes_scores_of_few_and_many_draws_comparable() -> None:
    """MI · S/(S − 1) is flat in S; without it, 2 draws show half."""
    means = {s: split(predictive(s, 4000, words=10, spread=0.2)) for s in (2, 4, 8, 64)}
    raw = {s: parts.epistemic_raw.mean() for s, parts in means.items()}
    corrected = {s: parts.epistemic.mean() for s, parts in means.items()}
    assert raw[2] / raw[64] == pytest.approx(0.5, abs=0.03)
    for s in (2, 4, 8):
        assert corrected[s] / corrected[64] == pytest.approx(1, abs=0.03)


def test_a_draw_that_has_not_read_a_token_does_not_count_there() -> None:
    p = predictive(3, 2)
    entropies = scores.entropy(p)
    entropies[2, 1] = np.nan
    parts = scores.split(scores.entropy(np.stack([p[:, 0].mean(0), p[:2, 1].mean(0)])), entropies)
    assert parts.draws.tolist() == [3, 2]
    assert parts.epistemic_raw[1] == pytest.approx(split(p[:2]).epistemic_raw[1])


def test_scores_of_a_sequence() -> None:
    p = predictive(5, 20, seed=3)
    answer = np.arange(20)
    logp = np.log(p[:, np.arange(20), answer])
    parts = split(p)
    found = scores.sequence_scores(parts, logp)
    assert set(found) == set(scores.SEQUENCE_SCORES)
    bma = math.log(sum(math.exp(sum(map(float, draw))) for draw in logp) / 5)
    assert found["nll_ln"] == pytest.approx(-bma / 20)
    assert found["confidence"] == pytest.approx(math.exp(bma / 20))
    assert found["rmi_seq"] == pytest.approx((bma - float(logp.sum(1).mean())) / 20) and found["rmi_seq"] > 0
    assert found["sd_logp"] == pytest.approx(float(np.std(logp.sum(1), ddof=1)))
    assert found["mi_max"] == pytest.approx(max(parts.epistemic))
    assert found["mi_top10"] == pytest.approx(float(np.mean(sorted(parts.epistemic)[-2:])))
    assert found["total"] == pytest.approx(found["aleatoric"] + found["epistemic"])
    assert found["mi_mean"] == found["epistemic"] == pytest.approx(float(np.mean(parts.epistemic)))


def test_long_answers_do_not_underflow() -> None:
    logp = np.full((4, 5000), -3.0)
    logp[0] = -3.1
    found = scores.sequence_scores(scores.split(np.ones(5000), np.ones((4, 5000))), logp)
    assert found["nll_ln"] == pytest.approx(3.0, abs=1e-3)
    assert all(map(math.isfinite, found.values()))


def test_a_decision() -> None:
    rng = np.random.default_rng(0)
    p = rng.dirichlet(np.ones(4), size=6) * 0.7  # the labels have 70 % of the probability
    decision = scores.decide(np.log(p))
    shares = p / p.sum(1, keepdims=True)
    np.testing.assert_allclose(decision.mean, shares.mean(0))
    np.testing.assert_allclose(decision.deviation, shares.std(0, ddof=1))
    assert decision.predicted == int(shares.mean(0).argmax())
    found = decision.scores()
    assert set(found) == set(scores.LABEL_SCORES)
    assert found["label_mass"] == pytest.approx(0.7)
    assert found["confidence"] == pytest.approx(shares.mean(0).max())
    total, aleatoric = by_hand(shares.mean(0)), float(np.mean([by_hand(row) for row in shares]))
    assert found["aleatoric"] == pytest.approx(aleatoric)
    assert found["epistemic"] == pytest.approx((total - aleatoric) * 6 / 5)


def test_a_decision_on_labels_that_are_hardly_ever_said() -> None:
    decision = scores.decide(np.array([[-900.0, -901.0], [-900.0, -902.0]]))
    assert decision.predicted == 0 and decision.label_mass == 0
    assert decision.mean.sum() == pytest.approx(1)


def test_fast_scores() -> None:
    found = scores.fast_scores([0.5, 1.5], [-0.1, -0.3])
    assert set(found) == set(scores.FAST_SCORES)
    assert found == pytest.approx({"total": 1.0, "entropy_max": 1.5, "nll_ln": 0.2, "confidence": math.exp(-0.2)})
