"""y_t[slice j] += Bᵀ (g ⊙ scale ⊙ h_t)[rows of slice j] with the weights of token t's adapter.

g: the gate of each rank row's expert, from the logits that follow the rank rows in h_t; 1 without a gate.
"""

from __future__ import annotations

from torch import Tensor

from loramux_kernels.reference.gate import gate
from loramux_kernels.sites import Site


def expand(site: Site, y: Tensor, h: Tensor) -> None:
    """Add to the rows of y whose tokens have an adapter at this site."""
    for t, slot in enumerate(site.plan.token_slots.tolist()):
        weights = site.slots[slot] if slot >= 0 else None
        if weights is None:
            continue
        for part in weights.live:
            scaled = weights.scale[part.rows] * h[t, part.rows]
            if part.gate is not None:
                logits = h[t, part.gate.logits]
                if site.trace.on:
                    site.trace.put(site.first_gate + part.index, slice(t, t + 1), logits[None])
                scaled = scaled * gate(part.gate.rule, logits)[part.gate.expert.long()]
            delta = scaled @ part.b.to(h.dtype)
            y[t, part.cols] = (y[t, part.cols].to(h.dtype) + delta).to(y.dtype)
