"""What the tests of the ops share: both ops of a site on a copy of y, and equality to the bit."""

from __future__ import annotations

import torch
from torch import Tensor

import loramux_kernels as lk
from loramux_kernels import AdapterPool

BITS = {
    torch.float64: torch.int64,
    torch.float32: torch.int32,
    torch.bfloat16: torch.int16,
    torch.float16: torch.int16,
}


def same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.view(BITS[a.dtype]), b.view(BITS[b.dtype]))


def apply(pool: AdapterPool, index: int, x: Tensor, y: Tensor) -> Tensor:
    """A copy of y with the site's adapters added."""
    y = y.clone()
    lk.expand(y, lk.shrink(x, pool.site_ids[index], pool.h_width(index)), pool.site_ids[index])
    return y
