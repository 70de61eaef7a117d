"""y_T,slice j ← mag_O ⊙ y_T,slice j + (gate(l)_T,expert(R) ⊙ scale_R ⊙ h_TR)[:, rows of slice j] @ B_RO + bias_O.

One gate and one product per adapter and slice.
"""

from __future__ import annotations

import functools

from torch import Tensor

from loramux_kernels.cpu.capacity import accepted
from loramux_kernels.cpu.gate import gate, normalised
from loramux_kernels.sites import Site


def expand(site: Site, y: Tensor, h: Tensor) -> None:
    """Change the rows of y whose tokens have an adapter at this site."""
    for slot, tokens in site.plan.groups:
        weights = site.slots[slot]
        if weights is None:
            continue
        rows = h[:, : weights.columns if weights.moments is None else weights.moments.stop]
        rows = rows[tokens] if isinstance(tokens, slice) else rows.index_select(0, tokens)
        scaled = rows[:, : weights.scale.shape[0]] * weights.scale
        for part in weights.live:
            h_part, b = scaled[:, part.rows], part.b.to(h.dtype)
            if part.gate is not None:
                logits = rows[:, part.gate.logits]
                if part.gate.sums is not None:
                    logits = normalised(part.gate.rule, logits, rows[:, weights.moments], part.gate.sums)
                if site.trace.on:
                    site.trace.put(site.first_gate + part.index, tokens, logits)
                accept = None
                if part.gate.counts is not None:
                    places = site.plan.sequences.places[tokens]
                    accept = functools.partial(
                        accepted, capacity=part.gate.rule.capacity, counts=part.gate.counts, places=places
                    )
                g = gate(part.gate.rule, logits, accept)
                h_part = h_part * g.index_select(1, part.gate.expert)
            if y.dtype != h.dtype or part.mag is not None or part.bias is not None:
                total = y[tokens, part.cols].to(h.dtype)
                if part.mag is not None:
                    total = total * part.mag
                total = total + h_part @ b
                if part.bias is not None:
                    total += part.bias
                y[tokens, part.cols] = total.to(y.dtype)
            elif isinstance(tokens, slice):
                y[tokens, part.cols].addmm_(h_part, b)
            else:
                y[:, part.cols].index_add_(0, tokens, h_part @ b)
