"""A sigmoid from a score to the probability of being right.

    p(x) = 1 / (1 + exp(−(a z + b)))      z = (x − centre) / scale
    a, b = argmin Σ_i −t_i log p(x_i) − (1 − t_i) log(1 − p(x_i))
    t_i  = (n₁ + 1) / (n₁ + 2) of the n₁ right answers, 1 / (n₀ + 2) of the n₀ wrong ones

The targets, and not 1 and 0, keep a finite and p off the ends where a score tells right from wrong without an error.
Newton's method with halved steps. Sources: Platt 1999; Lin, Lin and Weng 2007.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from loramux.uncertainty.scores import Array

_STEPS = 100
_RIDGE = 1e-12  # the second derivatives vanish where all is decided
_ENOUGH = 1e-10  # of the largest derivative, per item


@dataclass(frozen=True)
class Sigmoid:
    """`a` and `b` belong to the standardised score z."""

    a: float
    b: float
    centre: float
    scale: float

    def __call__(self, x: Array) -> Array:
        return _sigmoid(self.a * (x - self.centre) / self.scale + self.b)


def fit(x: Array, right: np.ndarray) -> Sigmoid:
    """From n scores and whether each answer was right, [n] each; both kinds must be there."""
    ones = int(right.sum())
    target = np.where(right, (ones + 1) / (ones + 2), 1 / (len(right) - ones + 2))
    centre = float(x.mean())
    scale = float(np.abs(x - centre).max()) or 1.0  # unlike a deviation, it does not overflow
    design = np.stack([(x - centre) / scale, np.ones(len(x))], 1)
    at = np.array([0.0, np.log(target.mean() / (1 - target.mean()))])
    loss = _loss(design @ at, target)
    for _ in range(_STEPS):
        p = _sigmoid(design @ at)
        slope = design.T @ (p - target)
        if np.abs(slope).max() <= _ENOUGH * len(x):
            break
        curvature = (design * (p * (1 - p))[:, None]).T @ design + _RIDGE * np.eye(2)
        step = np.linalg.solve(curvature, slope)
        while (new := _loss(design @ (at - step), target)) > loss and np.abs(step).max() > _ENOUGH:
            step = step / 2
        if new > loss:
            break
        at, loss = at - step, new
    return Sigmoid(float(at[0]), float(at[1]), centre, scale)


def _loss(logits: Array, target: Array) -> float:
    return float((np.logaddexp(0.0, logits) - target * logits).sum())


def _sigmoid(logits: Array) -> Array:
    result: Array = np.exp(-np.logaddexp(0.0, -logits))
    return result
