"""g_TE = gate(l_TE) for all tokens of an adapter at once."""

from __future__ import annotations

import torch
from torch import Tensor

from loramux_kernels.gates import TokenGate


def probabilities(rule: TokenGate, logits: Tensor) -> Tensor:
    """`p_TE`: what the gate selects from."""
    return torch.softmax((logits.abs() if rule.absolute else logits) / rule.temperature, 1)


def gate(rule: TokenGate, logits: Tensor) -> Tensor:
    """Weight of each expert, `g_TE`, for `logits_TE`; dtype of the logits. Definition: `gates.py`."""
    p = probabilities(rule, logits)
    if rule.select == "all":
        selected = torch.ones_like(p, dtype=torch.bool)
    elif rule.select == "threshold":
        selected = p >= rule.threshold
    else:
        # [T, E, E]: whether expert e' (last axis) comes before expert e.
        mine, other = p.unsqueeze(2), p.unsqueeze(1)
        lower_index = torch.ones(rule.experts, rule.experts, dtype=torch.bool, device=p.device).tril(-1)
        before = (other > mine) | ((other == mine) & lower_index)
        selected = before.sum(2) < rule.k if rule.select == "top_k" else (before * other).sum(2) < rule.p
    if rule.one:
        return selected.to(p.dtype)
    g = p * selected
    if rule.renormalise:
        total = g.sum(1, keepdim=True)
        g = g / torch.where(total > 0, total + rule.eps, 1)
    return g
