"""Draws by and by: errors against what they are of many sets of draws, and decisions that more would not change."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from loramux.uncertainty import adaptive, scores
from loramux.uncertainty.abstain import Rule

rng = np.random.default_rng(7)
N, V = 6, 12
BASE = rng.normal(0, 1.5, (N, V))


def answer(draws: int, noise: float) -> tuple[dict[str, Any], np.ndarray, np.ndarray]:
    """What so many draws say of an answer: scores, log p_s(y_t), H[p_s,t]."""
    logits = BASE + noise * rng.normal(0, 1, (draws, N, V))
    logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    p = np.exp(logp)
    entropy = -(p * logp).sum(-1)
    parts = scores.Split(scores.entropy(p.mean(0)), entropy.mean(0), np.full(N, float(draws)))
    return scores.sequence_scores(parts, logp[..., 0]), logp[..., 0], entropy


@pytest.mark.parametrize("score", scores.SEQUENCE_SCORES)
def test_errors_are_those_of_many_sets_of_draws(score: str) -> None:
    """The mean estimated variance is the true one; of what is epistemic no less, and not idle."""
    draws, found, variances = 8, [], []
    for _ in range(400):
        told, logp, entropy = answer(draws, 0.3)
        found.append(told[score])
        variances.append(adaptive.sequence_error(score, told, logp, entropy) ** 2)
    ratio = float(np.mean(variances) / np.var(found))
    bounded = score in ("total", "epistemic") or score.startswith("mi_")
    assert 0.7 < ratio < (100 if bounded else 1.6), ratio


def test_the_jackknife_of_a_mean_is_its_standard_error() -> None:
    x = rng.normal(0, 1, 9)
    assert adaptive._jackknife(x, lambda some: float(some.mean())) == pytest.approx(x.std(ddof=1) / 3)


@pytest.mark.parametrize("score", scores.LABEL_SCORES)
def test_errors_of_decisions(score: str) -> None:
    found, variances = [], []
    for _ in range(400):
        logp = np.log([0.5, 0.3, 0.1]) + 0.2 * rng.normal(0, 1, (8, 3))
        found.append(scores.decide(logp).scores()[score])
        variances.append(adaptive.decision_error(score, logp) ** 2)
    assert 0.7 < float(np.mean(variances) / np.var(found)) < 1.6


def test_stages_end_with_the_most() -> None:
    assert {most: adaptive.stages(most) for most in (1, 2, 4, 5, 8, 64)} == {
        1: [1], 2: [2], 4: [4], 5: [4, 5], 8: [4, 8], 64: [4, 8, 16, 32, 64],
    }  # fmt: skip


def student(t: float, dof: int) -> float:
    """P(T ≤ t), by the density summed in small steps."""
    constant = math.gamma((dof + 1) / 2) / (math.sqrt(dof * math.pi) * math.gamma(dof / 2))
    step = t / 20_000
    return 0.5 + sum(constant * (1 + ((i + 0.5) * step) ** 2 / dof) ** (-(dof + 1) / 2) * step for i in range(20_000))


def test_quantiles_are_students() -> None:
    for draws, t in adaptive._QUANTILES.items():
        assert student(t, draws - 1) == pytest.approx(0.975, abs=1e-5)


def test_clear_is_far_from_the_threshold() -> None:
    rule = Rule("mi_mean", 0.5, False)
    assert adaptive.is_clear(rule, 0.9, 0.1, 4) and adaptive.is_clear(rule, 0.1, 0.1, 4)
    assert not adaptive.is_clear(rule, 0.8, 0.1, 4) and adaptive.is_clear(rule, 0.8, 0.1, 8)
    assert not adaptive.is_clear(rule, 0.9, math.nan, 4) and not adaptive.is_clear(rule, 0.5, 0.0, 4)


@pytest.mark.parametrize("score", ["nll_ln", "mi_mean", "aleatoric"])
def test_an_early_end_seldom_decides_otherwise_than_many_draws(score: str) -> None:
    truth = float(np.mean([answer(64, 0.3)[0][score] for _ in range(20)]))
    early = wrong = 0
    for factor in (0.2, 0.8, 0.95, 1.05, 1.2, 5.0):
        rule = Rule(score, factor * truth, False)
        for _ in range(150):
            told, logp, entropy = answer(4, 0.3)
            if adaptive.is_clear(rule, told[score], adaptive.sequence_error(score, told, logp, entropy), 4):
                early += 1
                wrong += rule.abstains(told) != (factor < 1)
    assert early > 100 and wrong < 0.08 * 900  # 5 %, and what 900 trials leave to chance
