"""Block sizes by length of the step."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

from loramux_kernels.plan import LARGE_TILE, SMALL_STEP, SMALL_TILE
from loramux_kernels.sites import Site

ALIGNED = 16
"""Elements. Sizes and strides that are multiples of it are passed as a count of such units, which tells the
compiler that rows begin on a vector boundary without compiling anew for each size."""

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Triton's interpreter multiplies the raw bits of bfloat16 in `tl.dot`: there, operands are converted first."""

# (tokens at most, pieces of I). Few tokens give few tiles: the rest of the device works on other pieces of I.
# tokens · pieces stays within tokens + PLANE_ROWS.
_SPLITS = ((16, 16), (64, 8), (256, 4), (768, 2))


@dataclass(frozen=True)
class Config:
    """Launch parameters of both kernels of a site; letters as in the kernels."""

    splits: int
    tile: int
    shrink_r: int
    shrink_i: int
    shrink_lanes: int
    shrink_warps: int
    shrink_stages: int
    expand_r: int
    expand_o: int
    expand_warps: int
    expand_stages: int


def config(site: Site, tokens: int, h_rows: int) -> Config:
    """Parameters for a step padded to `tokens`, with an h of `h_rows` rows. Shrink and expand must get the same."""
    small = tokens <= SMALL_STEP
    regular = units(site.spec.d_in, *site.spec.d_outs) == ALIGNED
    # float32 products run on the ordinary cores and keep whole operand blocks in registers; rows that begin
    # anywhere need an address and a mask per element. Larger blocks than these spill.
    wide = regular and site.dtype != torch.float32
    block_i = (128 if small else 64) if wide else 32
    block_r = 32 if regular and not small else 16
    slices = len(site.spec.d_outs)
    pieces = next((n for limit, n in _SPLITS if tokens <= limit), 1)
    pieces = min(pieces, -(-site.spec.d_in // block_i))
    if tokens * pieces > h_rows:
        pieces = 1
    return Config(
        splits=pieces,
        tile=SMALL_TILE if small else LARGE_TILE,
        shrink_r=block_r,
        shrink_i=block_i,
        # A program walks over its lane's rank blocks, so that short adapters leave few programs without work.
        shrink_lanes=min(-(-site.rows // block_r), slices * (2 if small else 1)),
        shrink_warps=4,
        shrink_stages=3 if regular else 1,
        expand_r=16,
        expand_o=128 if wide else 64,
        expand_warps=4 if small else 8,
        expand_stages=1,
    )


def units(*sizes: int) -> int:
    """ALIGNED if it divides all sizes, else 1."""
    return ALIGNED if all(size % ALIGNED == 0 for size in sizes) else 1
