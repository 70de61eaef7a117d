"""g_E = gate(l_E) of one token, step by step as `gates.py` defines it."""

from __future__ import annotations

import torch
from torch import Tensor

from loramux_kernels.gates import TokenGate


def gate(rule: TokenGate, logits: Tensor) -> Tensor:
    """Weight of each expert, or of each group, for a token with these `logits` [E], in their dtype."""
    scores = (logits.abs() if rule.absolute else logits) / rule.temperature
    p = torch.softmax(scores, 0)
    ranked = sorted(range(rule.experts), key=lambda e: (-float(p[e]), e))
    if rule.select == "top_k":
        ranked = ranked[: rule.k]
    elif rule.select == "top_p":
        ranked = [e for place, e in enumerate(ranked) if p[ranked[:place]].sum() < rule.p]
    elif rule.select == "threshold":
        ranked = [e for e in ranked if p[e] >= rule.threshold]
    g = torch.zeros_like(p)
    if ranked:
        total = p[ranked].sum() + rule.eps if rule.renormalise else 1
        g[ranked] = torch.ones_like(p[ranked]) if rule.one else p[ranked] / total
    if not rule.groups:
        return g
    return torch.stack([g[[e for e in range(rule.experts) if group >> e & 1]].sum() for group in rule.groups])
