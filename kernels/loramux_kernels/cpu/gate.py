"""g_TE = gate(l_TE) for all tokens of an adapter at once; g_TG where experts are grouped."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from loramux_kernels.gates import TokenGate


def normalised(rule: TokenGate, logits: Tensor, moments: Tensor, sums: Tensor) -> Tensor:
    """W LayerNorm(x) [T, E] from `logits` W x, mean and variance of x as `moments` [T, 2], and the `sums_E` of W."""
    mean, variance = moments[:, :1], moments[:, 1:]
    assert rule.layer_norm_eps is not None
    return (logits - mean * sums) / (variance + rule.layer_norm_eps).sqrt()


def probabilities(rule: TokenGate, logits: Tensor) -> Tensor:
    """`p_TE`: what the gate selects from. A logit of the threshold is left out."""
    scores = logits[:, : rule.experts]
    return torch.softmax((scores.abs() if rule.absolute else scores) / rule.temperature, 1)


def gate(rule: TokenGate, logits: Tensor, accept: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    """Weight of each expert or group for these logits, a row per token; dtype of the logits. Definition: `gates.py`.

    `accept`: for a gate with a capacity, which of the selections `s_TE` the experts still take; without it, all.
    """
    g, selected = _expert_weights(rule, logits)
    if accept is not None:
        g = g * accept(selected)
    return g @ members(rule.groups, rule.experts).to(g) if rule.groups else g


@functools.lru_cache(maxsize=4096)
def members(groups: tuple[int, ...], experts: int) -> Tensor:
    """1 where expert e is in the group, `m_EG`."""
    return torch.tensor([[group >> e & 1 for group in groups] for e in range(experts)], dtype=torch.float32)


def _expert_weights(rule: TokenGate, logits: Tensor) -> tuple[Tensor, Tensor]:
    """`g_TE` before groups, and whether each is selected."""
    p = probabilities(rule, logits)
    if rule.select == "all":
        selected = torch.ones_like(p, dtype=torch.bool)
    elif rule.select == "threshold":
        selected = p >= rule.threshold
    elif rule.select == "adaptive":
        tau = rule.threshold * torch.sigmoid(logits[:, rule.experts :] + rule.bias)
        selected = p >= tau
        p = p - tau
    else:
        # [T, E, E]: whether expert e' (last axis) comes before expert e.
        mine, other = p.unsqueeze(2), p.unsqueeze(1)
        lower_index = torch.ones(rule.experts, rule.experts, dtype=torch.bool, device=p.device).tril(-1)
        before = (other > mine) | ((other == mine) & lower_index)
        selected = before.sum(2) < rule.k if rule.select == "top_k" else (before * other).sum(2) < rule.p
    if rule.one:
        return selected.to(p.dtype), selected
    g = p * selected
    if rule.renormalise:
        total = g.sum(1, keepdim=True)
        g = g / torch.where(total > 0, total + rule.eps, 1)
    return g, selected
