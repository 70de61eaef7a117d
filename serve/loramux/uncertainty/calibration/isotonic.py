"""The monotone function of a score that comes closest to being right or wrong.

    f = argmin Σ_i (f(x_i) − y_i)²      over f that do not rise with x, which is large where an answer is not sure

Pool adjacent violators: items of one score are one, neighbours that rise are replaced by their mean until none do.
Between two scores f is the line between them, outside of all it is the nearest. Source: Zadrozny and Elkan 2002.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from loramux.uncertainty.scores import Array


@dataclass(frozen=True, eq=False)
class Steps:
    """f at its corners: `x` rises, `y` does not."""

    x: Array
    y: Array

    def __call__(self, x: Array) -> Array:
        result: Array = np.interp(x, self.x, self.y)
        return result


def fit(x: Array, right: np.ndarray) -> Steps:
    """From n scores and whether each answer was right, [n] each."""
    values, place = np.unique(x, return_inverse=True)
    blocks: list[tuple[float, float, int, int]] = []  # mean, items, first and last distinct score; from the left
    for i, (total, items) in enumerate(zip(np.bincount(place, right), np.bincount(place), strict=True)):
        mean, first, weight = float(total / items), i, float(items)
        while blocks and blocks[-1][0] <= mean:
            other, others, first, _ = blocks.pop()
            mean = (other * others + mean * weight) / (others + weight)
            weight += others
        blocks.append((mean, weight, first, i))
    corners = [(values[i], mean) for mean, _, *ends in blocks for i in dict.fromkeys(ends)]
    return Steps(np.array([x for x, _ in corners]), np.array([y for _, y in corners]))
