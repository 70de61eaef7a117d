"""Sets of labels that hold the right one with a probability of 1 − α at least (split conformal prediction).

    lac   s(x, y) = 1 − P(y|x)                                    the smallest sets on average
    aps   s(x, y) = Σ_{k: P(k|x) ≥ P(y|x)} P(k|x)                 sets that grow where the labels are alike

    set(x) = {y: s(x, y) ≤ q}      q = the ⌈(n + 1)(1 − α)⌉-th smallest of n calibration scores s(x_i, y_i), or ∞

The guarantee is over calibration items and the new one together, drawn alike, and for any P: nothing is fitted. The
most probable label is always in the set, which only adds to it. Sources: Sadinle, Lei and Wasserman 2019; Romano,
Sesia and Candès 2020; Angelopoulos and Bates, arXiv 2107.07511.
"""

from __future__ import annotations

import math
from enum import StrEnum

import numpy as np

from loramux.uncertainty.scores import Array


class Sets(StrEnum):
    LAC = "lac"
    APS = "aps"


def nonconformity(p: Array, sets: Sets) -> Array:
    """s(x, y) of every label, [..., K], from P(y|x), [..., K]."""
    if sets is Sets.LAC:
        result: Array = 1 - p
        return result
    result = np.zeros_like(p)
    for k in range(p.shape[-1]):  # not all pairs at once: that is n K² numbers
        one = p[..., k : k + 1]
        result += (one >= p) * one
    return result


def limit(scores: Array, alpha: float) -> float:
    """q from the scores of the calibration items' right labels, [n]; infinite if n is too small for this α."""
    # Rounded: (n + 1)(1 − α) may be a whole number that floats miss by their last bit.
    rank = math.ceil(round((len(scores) + 1) * (1 - alpha), 9))
    return float(np.sort(scores)[rank - 1]) if rank <= len(scores) else math.inf


def prediction_set(p: Array, limit: float, sets: Sets) -> list[int]:
    """The places of the labels in the set, [K] probabilities given, most probable first."""
    inside = nonconformity(p, sets) <= limit
    inside[p.argmax()] = True
    return [int(k) for k in np.argsort(-p, kind="stable") if inside[k]]
