"""How good confidences are: c_i, the probability of being right that was told, and y_i, whether the answer was.

ece     = Σ_b n_b/n · |mean_b y − mean_b c|      15 bins of equal width
brier   = mean (c − y)²
auroc   = P(c_i > c_j) + ½ P(c_i = c_j)          i right, j wrong; None if all are of one kind
risk at coverage γ = share of wrong answers among the ⌈γ n⌉ of the largest confidence
"""

from __future__ import annotations

import math

import numpy as np

from loramux.uncertainty.scores import Array

_BINS = 15


def ece(confidence: Array, right: np.ndarray) -> float:
    """Expected calibration error of n confidences in [0, 1]."""
    bins = np.minimum((confidence * _BINS).astype(np.int64), _BINS - 1)
    gaps = np.bincount(bins, right - confidence, minlength=_BINS)
    return float(np.abs(gaps).sum() / len(right))


def brier(confidence: Array, right: np.ndarray) -> float:
    return float(np.square(confidence - right).mean())


def auroc(sure: Array, right: np.ndarray) -> float | None:
    """Of any score that is large where an answer is sure."""
    _, place, counts = np.unique(sure, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[place]  # equal scores share the mean of their ranks
    ones = int(right.sum())
    pairs = ones * (len(right) - ones)
    return float((ranks[right].sum() - ones * (ones + 1) / 2) / pairs) if pairs else None


def risk_at_coverage(sure: Array, right: np.ndarray, coverage: float) -> float:
    """As `auroc`; of equal scores, the later ones count as less sure."""
    kept = np.argsort(-sure, kind="stable")[: max(1, math.ceil(coverage * len(right)))]
    return float(1 - right[kept].mean())
