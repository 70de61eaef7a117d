"""How many draws an abstention needs: few first, and more only while the decision is not clear.

4 draws read, then 8, 16, … up to the most; it ends where a two-sided 95 % interval around the score, Student's with
S − 1 degrees of freedom, leaves the threshold out. Not 2 first: with one degree of freedom the interval is so wide that
nothing would ever be clear. The score is that of the draws which read, its bias taken off by their number.

    se of a score that is known draw by draw      jackknife: √((S − 1)/S · Σ_s (f_(−s) − mean f_(−s))²)
    se of what is epistemic in an answer          ≤ √(2/(S − 1)) of it

The second is a bound: for small noise the bias-corrected score is a quadratic form Σ_i λ_i χ²_i/(S − 1) of Gaussian
draws, λ ≥ 0, whose relative variance is 2/(S − 1) · Σ λ²/(Σ λ)². Which it is cannot be told without the probabilities
of every draw over the vocabulary, which the worker only sums.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from loramux.uncertainty.abstain import Rule
from loramux.uncertainty.scores import Array, decide, log_mean_exp

#: The 97.5 % quantiles of Student's distribution for the draws after which it may end.
_QUANTILES = {4: 3.1824, 8: 2.3646, 16: 2.1314, 32: 2.0395}
_EPISTEMIC = frozenset({"epistemic", "mi_mean", "mi_max", "mi_top10"})


def stages(most: int) -> list[int]:
    """How many draws have read at each stage; `most` at the last."""
    return [*(n for n in _QUANTILES if n < most), most]


def is_clear(rule: Rule, score: float, error: float, draws: int) -> bool:
    """Whether more draws are unlikely to lead to another decision."""
    return math.isfinite(error) and abs(score - rule.value) > _QUANTILES[draws] * error


def sequence_error(score: str, told: Mapping[str, Any], logp: Array, entropy: Array) -> float:
    """se of a score of an answer; from log p_s(y_t) and H[p_s,t], [S, n] each, and what was told of them."""
    draws, n = logp.shape
    aleatoric = float(entropy.mean(1).std(ddof=1) / math.sqrt(draws))
    if score in _EPISTEMIC or score == "total":
        epistemic = math.sqrt(2 / (draws - 1)) * float(told["epistemic" if score == "total" else score])
        return epistemic + aleatoric if score == "total" else epistemic  # the two may err together
    if score == "aleatoric":
        return aleatoric
    functions: dict[str, Callable[[Array], float]] = {
        "nll_ln": lambda logps: -log_mean_exp(logps) / n,
        "confidence": lambda logps: math.exp(log_mean_exp(logps) / n),
        "rmi_seq": lambda logps: float(log_mean_exp(logps) - logps.mean()) / n,
        "sd_logp": lambda logps: float(logps.std(ddof=1)),
    }
    return _jackknife(logp.sum(1), functions[score])


def decision_error(score: str, logp: Array) -> float:
    """se of a score of a decision, from log p_s(label), [S, K]."""
    return _jackknife(logp, lambda some: decide(some).scores()[score])


def _jackknife(draws: Array, function: Callable[[Array], float]) -> float:
    values: Sequence[float] = [function(np.delete(draws, s, 0)) for s in range(len(draws))]
    return math.sqrt((len(draws) - 1) * float(np.var(values)))
