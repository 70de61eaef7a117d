"""y_t[slice j] ← mag ⊙ y_t[slice j] + Bᵀ (g ⊙ scale ⊙ h_t)[rows of slice j] + bias, with token t's adapter.

g: the gate of each rank row's expert, from the logits that follow the rank rows in h_t; 1 without a gate. A gate with
a capacity also goes by what earlier tokens of the sequence selected, and keeps that up to date (`sequences.py`).
mag is 1 and bias 0 where the slice has none.
"""

from __future__ import annotations

from torch import Tensor

from loramux_kernels.reference.gate import gate, normalised
from loramux_kernels.sites import Site


def expand(site: Site, y: Tensor, h: Tensor) -> None:
    """Change the rows of y whose tokens have an adapter at this site."""
    places = site.plan.sequences.places.tolist()
    counted: dict[int, Tensor] = {}  # by slice, over the tokens of one request
    for t, slot in enumerate(site.plan.token_slots.tolist()):
        weights = site.slots[slot] if slot >= 0 else None
        if weights is None:
            continue
        for part in weights.live:
            scaled = weights.scale[part.rows] * h[t, part.rows]
            if part.gate is not None:
                logits = h[t, part.gate.logits]
                if part.gate.sums is not None:
                    logits = normalised(part.gate.rule, logits, h[t, weights.moments], part.gate.sums)
                if site.trace.on:
                    site.trace.put(site.first_gate + part.index, slice(t, t + 1), logits[None])
                if part.gate.counts is None:
                    g = gate(part.gate.rule, logits)
                else:
                    earlier, read, write = places[t]
                    if earlier == 0:
                        counted[part.index] = part.gate.counts[read] * (read >= 0)
                    g = gate(part.gate.rule, logits, counted[part.index])
                    if write >= 0:
                        part.gate.counts[write] = counted[part.index]
                scaled = scaled * g[part.gate.expert.long()]
            total = y[t, part.cols].to(h.dtype)
            if part.mag is not None:
                total = part.mag * total
            total = total + scaled @ part.b.to(h.dtype)
            if part.bias is not None:
                total = total + part.bias
            y[t, part.cols] = total.to(y.dtype)
