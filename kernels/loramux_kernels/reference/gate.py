"""g_E = gate(l_E) of one token, step by step as `gates.py` defines it."""

from __future__ import annotations

import torch
from torch import Tensor

from loramux_kernels.gates import TokenGate


def normalised(rule: TokenGate, logits: Tensor, moments: Tensor, sums: Tensor) -> Tensor:
    """W LayerNorm(x) of one token from its `logits` W x, mean and variance of x, and the sums of the rows of W."""
    mean, variance = moments[0], moments[1]
    assert rule.layer_norm_eps is not None
    return (logits - mean * sums) / (variance + rule.layer_norm_eps).sqrt()


def gate(rule: TokenGate, logits: Tensor, counts: Tensor | None = None) -> Tensor:
    """Weight of each expert, or of each group, for a token with these `logits`, in their dtype.

    `counts_E!`: how many earlier tokens of its sequence selected each expert; this token is added. Without it there is
    no capacity.
    """
    scores = logits[: rule.experts]
    scores = (scores.abs() if rule.absolute else scores) / rule.temperature
    p = torch.softmax(scores, 0)
    ranked = sorted(range(rule.experts), key=lambda e: (-float(p[e]), e))
    if rule.select == "top_k":
        ranked = ranked[: rule.k]
    elif rule.select == "top_p":
        ranked = [e for place, e in enumerate(ranked) if p[ranked[:place]].sum() < rule.p]
    elif rule.select == "threshold":
        ranked = [e for e in ranked if p[e] >= rule.threshold]
    elif rule.select == "adaptive":
        tau = rule.threshold * torch.sigmoid(logits[rule.experts] + rule.bias)
        ranked = [e for e in ranked if p[e] >= tau]
        p = p - tau
    g = torch.zeros_like(p)
    if rule.one:
        g[ranked] = 1
    # Experts just at their threshold are selected and weigh nothing.
    elif (total := p[ranked].sum()) > 0:
        g[ranked] = p[ranked] / (total + rule.eps if rule.renormalise else 1)
    if counts is not None:
        g[counts >= rule.capacity] = 0
        counts[ranked] += 1
    if not rule.groups:
        return g
    return torch.stack([g[[e for e in range(rule.experts) if group >> e & 1]].sum() for group in rule.groups])
