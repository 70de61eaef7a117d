"""From what S draws of the weights say to scores. All of it in float64; entropies in nats.

    p_s,t     = p(· | x, y_<t, w_s)      draw s, token t of n       p̄_t = mean_s p_s,t
    total     = H[p̄_t]                   all there is to wonder about
    aleatoric = mean_s H[p_s,t]          what is left when the weights are known
    epistemic = total − aleatoric        = I(y_t; w), what the weights do not agree on; 0 if all draws are equal

From S draws the last is too small by about (S − 1)/S, so it is given times S/(S − 1), or scores of 4 draws could not
be compared to those of 16; total is aleatoric plus that. Both are there as they are, too (`raw`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[np.float64]]

#: Of a scored answer, by their names in requests and answers.
SEQUENCE_SCORES = (
    "total",
    "aleatoric",
    "epistemic",
    "mi_mean",
    "mi_max",
    "mi_top10",
    "nll_ln",
    "rmi_seq",
    "sd_logp",
    "confidence",
)
#: Of a decision between labels.
LABEL_SCORES = ("total", "aleatoric", "epistemic", "confidence", "label_mass")
#: Of an answer that was read once, as it was written.
FAST_SCORES = ("total", "entropy_max", "nll_ln", "confidence")


@dataclass(frozen=True, eq=False)
class Split:
    """An uncertainty and its two parts, for each of n tokens (or for one decision)."""

    total_raw: Array
    aleatoric: Array
    draws: Array  # how many there were

    @property
    def epistemic_raw(self) -> Array:
        # A difference of numbers of order 1: what rounding leaves below 0 is none.
        return np.maximum(self.total_raw - self.aleatoric, 0.0)

    @property
    def epistemic(self) -> Array:
        corrected: Array = self.epistemic_raw * self.draws / np.maximum(self.draws - 1, 1)  # 0 of a single draw
        return corrected

    @property
    def total(self) -> Array:
        return self.aleatoric + self.epistemic


def split(total: Array, entropies: Array) -> Split:
    """H[p̄_t] of n tokens, [n], and H[p_s,t], [S, n], NaN where a draw has not read a token. Two draws at least."""
    draws = (~np.isnan(entropies)).sum(0).astype(np.float64)
    return Split(np.asarray(total, np.float64), np.nanmean(entropies, 0), draws)


def sequence_scores(tokens: Split, logp: Array) -> dict[str, float]:
    """Scores of an answer y of n tokens, from log p_s(y_t | x, y_<t), [S, n], of draws that have read all of it.

    total, aleatoric, epistemic     means over the tokens, per token
    mi_mean = epistemic             mi_max: of the largest token; mi_top10: mean of the largest tenth of them
    log p̄(y|x) = logsumexp_s Σ_t log p_s(y_t) − log S     one w for the whole answer (Bayesian model average)
    nll_ln     = −log p̄(y|x) / n                          confidence = exp(−nll_ln)
    rmi_seq    = (log p̄(y|x) − mean_s log p_s(y|x)) / n   ≥ 0
    sd_logp    = standard deviation over s of log p_s(y|x)
    """
    logps = logp.sum(1)
    n = logp.shape[1]
    log_mean = log_mean_exp(logps)
    mi = np.sort(tokens.epistemic)[::-1]
    nll = -float(log_mean) / n
    return {
        "total": float(tokens.total.mean()),
        "aleatoric": float(tokens.aleatoric.mean()),
        "epistemic": float(mi.mean()),
        "mi_mean": float(mi.mean()),
        "mi_max": float(mi[0]),
        "mi_top10": float(mi[: -(-n // 10)].mean()),
        "nll_ln": nll,
        "rmi_seq": max(float(log_mean - logps.mean()) / n, 0.0),
        "sd_logp": float(logps.std(ddof=1)),
        "confidence": float(np.exp(-nll)),
    }


@dataclass(frozen=True, eq=False)
class Decision:
    """A predictive distribution over K labels: `mean` [K], its standard deviation over the draws, and their split."""

    mean: Array
    deviation: Array
    parts: Split
    label_mass: float

    @property
    def predicted(self) -> int:
        return int(self.mean.argmax())

    def scores(self) -> dict[str, float]:
        """`confidence` is the probability of the predicted label, `label_mass` that of all labels together."""
        return {
            "total": float(self.parts.total[0]),
            "aleatoric": float(self.parts.aleatoric[0]),
            "epistemic": float(self.parts.epistemic[0]),
            "confidence": float(self.mean[self.predicted]),
            "label_mass": self.label_mass,
        }


def decide(logp: Array) -> Decision:
    """From log p_s(label | x), [S, K]; of one row there is no deviation and nothing epistemic.

    P_s = softmax over the labels of log p_s      P = mean_s P_s      label_mass = mean_s Σ_labels p_s(label | x)
    """
    logp = np.asarray(logp, np.float64)
    top = logp.max(1, keepdims=True)
    mass = np.exp(logp - top)
    p = mass / mass.sum(1, keepdims=True)
    mean = p.mean(0)
    parts = Split(entropy(mean)[None], entropy(p).mean(0, keepdims=True), np.array([float(len(p))]))
    deviation = p.std(0, ddof=1) if len(p) > 1 else np.zeros_like(mean)
    return Decision(mean, deviation, parts, float((mass.sum(1) * np.exp(top[:, 0])).mean()))


def fast_scores(entropies: Sequence[float], logp: Sequence[float]) -> dict[str, float]:
    """Scores of an answer by one set of weights: H[p_t] and log p(y_t) of its tokens.

    total = mean_t H[p_t]    entropy_max = max_t H[p_t]    nll_ln = −mean_t log p(y_t)    confidence = exp(−nll_ln)
    """
    nll = -float(np.mean(logp))
    return {
        "total": float(np.mean(entropies)),
        "entropy_max": float(np.max(entropies)),
        "nll_ln": nll,
        "confidence": float(np.exp(-nll)),
    }


def entropy(p: Array) -> Array:
    """H[p] over the last axis; 0 log 0 = 0."""
    result: Array = -(p * np.log(p, out=np.zeros_like(p), where=p > 0)).sum(-1)
    return result


def log_mean_exp(values: Array) -> float:
    """log mean exp, which neither overflows nor ends at log 0."""
    top = values.max()
    return float(top + np.log(np.exp(values - top).mean()))
