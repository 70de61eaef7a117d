"""How a score was spread when it was calibrated, and how far what comes now is from that.

    psi = Σ_b (a_b − e_b) · ln(a_b / e_b)      e: shares of the calibration items in b, a: of recent answers

The bins end at the deciles of the calibration items; half an item more in each keeps shares off 0. Below 0.1 nothing
has changed that could be seen, above 0.25 much has, as the rule of thumb has it (credit scoring; Siddiqi 2006). Without
any change its mean is about (bins − 1) · (1/n + 1/m), of n items and m recent answers: 0.09 of ten bins, many items and
100 answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from loramux.uncertainty.scores import Array

_BINS = 10


@dataclass(frozen=True)
class Histogram:
    """`edges` rise; an item on an edge lies above it. `counts` has one more."""

    edges: tuple[float, ...]
    counts: tuple[int, ...]

    @classmethod
    def of(cls, x: Array) -> Histogram:
        """Equal scores may leave fewer bins."""
        edges = np.unique(np.quantile(x, np.arange(1, _BINS) / _BINS))
        return cls(tuple(map(float, edges)), tuple(map(int, _counts(x, edges))))

    def psi(self, recent: Sequence[float]) -> float:
        """Population stability index; 0 for the same shares."""
        expected = _shares(np.array(self.counts, np.float64))
        actual = _shares(_counts(np.array(recent, np.float64), np.array(self.edges)).astype(np.float64))
        return float(((actual - expected) * np.log(actual / expected)).sum())


def _counts(x: Array, edges: Array) -> np.ndarray:
    return np.bincount(np.searchsorted(edges, x, side="right"), minlength=len(edges) + 1)


def _shares(counts: Array) -> Array:
    result: Array = (counts + 0.5) / (counts + 0.5).sum()
    return result
