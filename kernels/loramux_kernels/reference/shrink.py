"""h_t = A x_t with the A of token t's adapter: its rank rows, then its router rows; then mean and variance of x_t,
where such a router reads LayerNorm(x_t)."""

from __future__ import annotations

import torch
from torch import Tensor

from loramux_kernels.sites import Site


def shrink(site: Site, x: Tensor, h: Tensor) -> None:
    """Write the rows of h whose tokens have an adapter at this site."""
    for t, slot in enumerate(site.plan.token_slots.tolist()):
        weights = site.slots[slot] if slot >= 0 else None
        if weights is not None:
            a = weights.a.to(h.dtype)
            parts = a.shape[0], weights.bands, a.shape[1] // weights.bands
            sums = torch.einsum("rbi,bi->br", a.view(parts), x[t].to(h.dtype).view(parts[1:]))
            h[t, : sums.numel()] = sums.flatten()
            if weights.moments is not None:
                mean = x[t].to(h.dtype).mean()
                h[t, weights.moments] = torch.stack([mean, (x[t].to(h.dtype) - mean).square().mean()])
