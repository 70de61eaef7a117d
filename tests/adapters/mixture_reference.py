"""Mixtures of LoRA experts written from their formula: a loop over tokens, and in it one over experts, in float64."""

import math
from collections.abc import Sequence

import torch


def expert_weights(scores: Sequence[float], k: int | None = None) -> list[float]:
    """softmax over the k best scores (all without k), zero elsewhere; of equals, the first is better."""
    order = sorted(range(len(scores)), key=lambda e: (-scores[e], e))
    chosen = order[: len(scores) if k is None else k]
    largest = max(scores[e] for e in chosen)
    total = math.fsum(math.exp(scores[e] - largest) for e in chosen)
    return [math.exp(scores[e] - largest) / total if e in chosen else 0.0 for e in range(len(scores))]


def mixture_delta(
    x: torch.Tensor,
    router: torch.Tensor,
    a: Sequence[torch.Tensor],
    b: Sequence[torch.Tensor],
    scales: Sequence[float],
    k: int | None = None,
) -> torch.Tensor:
    """Σ_e g_e(x_t) · s_e · B_e · (A_e · x_t) for every row x_t of x: [tokens, d_out]."""
    rows = []
    for token in x.double():
        weights = expert_weights((router.double() @ token).tolist(), k)
        delta = torch.zeros(b[0].shape[0], dtype=torch.float64)
        for weight, down, up, scale in zip(weights, a, b, scales, strict=True):
            delta += weight * scale * (up.double() @ (down.double() @ token))
        rows.append(delta)
    return torch.stack(rows)
