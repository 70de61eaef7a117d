"""One temperature for the probabilities of a decision.

    P_T(k) ∝ P(k)^(1/T)      T = argmin Σ_i −log P_T(y_i)      over n decisions between K labels

With β = 1/T the sum is convex in β: its derivative Σ_i (E_β[log P_i] − log P_i(y_i)) is monotone, and its root is found
by bisection. Source: Guo et al. 2017 (arXiv 1706.04599).
"""

from __future__ import annotations

import numpy as np

from loramux.uncertainty.scores import Array

#: T and 1/T at most: labels that are all right, or all wrong, have no best temperature.
MAX_TEMPERATURE = 100.0
_TINY = 1e-30  # of a label that no draw thinks of
_STEPS = 100  # halvings of log β: to the last bit of a float64


def fit(p: Array, right: np.ndarray) -> float:
    """T from P, [n, K], and the place of the right label of each, [n]."""
    logits = np.log(np.maximum(p, _TINY))
    chosen = logits[np.arange(len(right)), right]

    def slope(log_beta: float) -> float:
        return float(((_softmax(np.exp(log_beta) * logits) * logits).sum(1) - chosen).sum())

    low, high = -np.log(MAX_TEMPERATURE), np.log(MAX_TEMPERATURE)
    for _ in range(_STEPS):
        middle = (low + high) / 2
        low, high = (low, middle) if slope(middle) > 0 else (middle, high)
    return float(np.exp(-(low + high) / 2))


def apply(p: Array, temperature: float) -> Array:
    """P_T, of the shape of P; labels lie on the last axis."""
    return _softmax(np.log(np.maximum(p, _TINY)) / temperature)


def _softmax(logits: Array) -> Array:
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    result: Array = weights / weights.sum(-1, keepdims=True)
    return result
