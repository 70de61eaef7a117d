"""h_TR = x_TI @ A_RIᵀ, one product per adapter of the step. Router rows are more rows of A; mean and variance of x
follow where one of these reads LayerNorm(x)."""

from __future__ import annotations

import torch
from torch import Tensor

from loramux_kernels.sites import Site


def shrink(site: Site, x: Tensor, h: Tensor) -> None:
    """Write the rows of h whose tokens have an adapter at this site."""
    for slot, tokens in site.plan.groups:
        weights = site.slots[slot]
        if weights is None:
            continue
        # A low-precision product would round h; converting costs little beside reading the weights.
        a = weights.a.to(h.dtype)
        rows = (x[tokens] if isinstance(tokens, slice) else x.index_select(0, tokens)).to(h.dtype)
        width = a.shape[1] // weights.bands
        for i in range(weights.bands):
            inputs, columns = slice(i * width, (i + 1) * width), slice(i * a.shape[0], (i + 1) * a.shape[0])
            if isinstance(tokens, slice):
                torch.mm(rows[:, inputs], a[:, inputs].t(), out=h[tokens, columns])
            else:
                h[:, columns].index_copy_(0, tokens, rows[:, inputs] @ a[:, inputs].t())
        if weights.moments is not None:
            variance, mean = torch.var_mean(rows, 1, correction=0)
            h[tokens, weights.moments] = torch.stack([mean, variance], 1)
