"""h_TR = x_TI @ A_RIᵀ, per token with the A of that token's adapter.

T tokens · I inputs · R rows of A: the adapter's rank rows, all slices of the site stacked, and behind them the router
rows of its mixtures, whose sums are logits. Where such a router reads LayerNorm(x), mean and variance of x over I
follow: here x is at hand. Sums are float32 (float64 for float64 weights). Rows of h without an adapter, and columns
beyond these, are left as they were allocated.
"""

from __future__ import annotations

import torch
from torch import Tensor

from loramux_kernels.ops.library import register
from loramux_kernels.sites import accumulator, lookup

PLANE_ROWS = 768
"""Rows of h beyond T on CUDA, for partial sums over pieces of I: piece s of token t lies in row s·T + t.

At most 16 pieces for T ≤ 16, 8 for T ≤ 64, 4 for T ≤ 256, else one: T·pieces ≤ T + 768 for every T, so that the
shape needs no branch on T."""


def h_shape(tokens: int, rows: int, device: torch.device) -> tuple[int, int]:
    """Shape of h for x of `tokens` rows at a site whose `width` is `rows`."""
    return tokens + (PLANE_ROWS if device.type == "cuda" else 0), rows


def _allocate(x: Tensor, site: Tensor, rows: int) -> Tensor:
    return x.new_empty(h_shape(x.shape[0], rows, x.device), dtype=accumulator(x.dtype))


def _run(x: Tensor, site: Tensor, rows: int) -> Tensor:
    h = _allocate(x, site, rows)
    bound = lookup(site)
    if bound.plan.active:
        if x.dim() != 2 or x.shape[1] != bound.spec.d_in or x.stride(1) != 1 or x.dtype != bound.dtype:
            raise ValueError(f"site {bound.spec.name}: x is {tuple(x.shape)} {x.dtype}")
        if rows != bound.width or bound.plan.tokens > x.shape[0]:
            raise ValueError(
                f"site {bound.spec.name}: {rows} columns of h and {x.shape[0]} tokens, "
                f"the pool has {bound.width} and plans {bound.plan.tokens}"
            )
        bound.backend.shrink(bound, x, h)
    return h


register("shrink(Tensor x, Tensor site, int rows) -> Tensor", _run, _allocate)


def shrink(x: Tensor, site: Tensor, rows: int) -> Tensor:
    """h [T + P, rows] of x [..., I]: leading axes are flattened into T; P extra rows are scratch of the kernels.

    `site` is `pool.site_ids[i]`: a CPU tensor, because an int would make torch.compile trace every layer anew.
    `rows` is `pool.h_width(i)`, equal for all sites with as many slices.
    """
    flat = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    return torch.ops.loramux.shrink(flat, site, rows)  # type: ignore[no-any-return]
