"""A threshold that keeps the share of wrong answers among those that are given below a bound.

    risk(t) = P(wrong | u ≤ t)      u: a score that is large where an answer is not sure

Of the k items below t, e are wrong. Clopper and Pearson's bound is the p with P(Binomial(k, p) ≤ e) = δ: the risk is
below it with a probability of 1 − δ. J thresholds are tried, each with δ / J; how many, and how many items each lets
through, depends on n alone, so that the threshold returned is good with 1 − δ however it was chosen. With no error at
all k must be ln δ / ln(1 − risk) at least: 29 for 0.1 and δ = 0.05. Sources: Clopper and Pearson 1934; Bates et al.
2021 (arXiv 2101.02703).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from loramux.uncertainty.scores import Array

_MOST = 10  # thresholds that are tried
_STEPS = 60


@dataclass(frozen=True)
class Threshold:
    """Answers with u ≤ `value` are given; infinite: all of them. `errors` of `accepted` items, risk ≤ `bound`."""

    value: float
    accepted: int
    errors: int
    bound: float


def upper_bound(errors: int, n: int, delta: float) -> float:
    """Clopper and Pearson's: the largest p under which so few errors in n are not less likely than δ."""
    if errors >= n:
        return 1.0
    low, high = 0.0, 1.0
    for _ in range(_STEPS):
        middle = (low + high) / 2
        low, high = (middle, high) if _cumulative(errors, n, middle) > delta else (low, middle)
    return high


def find(u: Array, right: np.ndarray, *, risk: float, delta: float) -> Threshold | None:
    """The one of those tried that gives most answers with risk(t) ≤ `risk`; None if there is none."""
    order = np.argsort(u, kind="stable")
    u, errors = u[order], np.cumsum(~right[order])
    n = len(u)
    tries = max(1, min(_MOST, n // _least(risk, delta)))
    for j in range(tries, 0, -1):
        k = -(-n * j // tries)
        while 0 < k < n and u[k - 1] == u[k]:
            k -= 1  # a threshold does not part equal scores
        if k and (bound := upper_bound(int(errors[k - 1]), k, delta / tries)) <= risk:
            # Below the next score, not at the last one that passes: given the next, those before it are drawn alike.
            value = math.inf if k == n else float(np.nextafter(u[k], -math.inf))
            return Threshold(value, k, int(errors[k - 1]), bound)
    return None


def _least(risk: float, delta: float) -> int:
    return math.ceil(math.log(delta) / math.log1p(-risk))


def _cumulative(errors: int, n: int, p: float) -> float:
    """P(Binomial(n, p) ≤ errors), 0 < p < 1."""
    i = np.arange(errors)
    log_choose = np.concatenate([[0.0], np.cumsum(np.log((n - i) / (i + 1)))])
    i = np.arange(errors + 1)
    return float(np.exp(log_choose + i * math.log(p) + (n - i) * math.log1p(-p)).sum())
