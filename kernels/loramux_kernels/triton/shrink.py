# mypy: disable-error-code="import-untyped, import-not-found, no-untyped-def, untyped-decorator"
"""h_TR = x_TI @ A_RIᵀ in one launch: grid (tiles of tokens, lanes of rows of A, pieces of I).

T tokens · I inputs · R rows of A of the tile's adapter, its rank rows and behind them its router rows. Piece s writes
row s·T + t of h; the expand kernel adds the pieces in order, so that the sum is the same in every run, and no atomics
and no zeroed memory are needed.

Where a router reads LayerNorm(x), the tile's first program reads its x twice more, for mean and variance, and leaves
them behind the sums of the first piece.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from loramux_kernels import sites
from loramux_kernels.plan import TILE_FIELDS
from loramux_kernels.sites import Site
from loramux_kernels.triton.config import INTERPRETED, config, units

BANDS_AT = tl.constexpr(sites.BANDS_AT)
MOMENTS_AT = tl.constexpr(sites.MOMENTS_AT)

# Sizes are never specialised: a size that happens to be 1 would compile a new kernel, perhaps inside a capture.
_SIZES = ["x_units", "i_units", "piece_blocks", "table_stride", "h_stride", "tokens"]


@triton.jit
def _moments(x_rows, mt, size_i, out, BT: tl.constexpr, BI: tl.constexpr, EVEN: tl.constexpr):
    """Mean and variance of x of each token to `out` [BT] and the element behind it: the squares around the mean, as
    those of x less the mean's would cancel where it is large."""
    mean = tl.zeros((BT,), tl.float32)
    variance = tl.zeros((BT,), tl.float32)
    for second in range(2):
        total = tl.zeros((BT, BI), tl.float32)
        for i0 in range(0, size_i, BI):
            i = i0 + tl.arange(0, BI)
            if EVEN:
                v = tl.load(x_rows + i[None, :], mask=mt[:, None], other=0.0).to(tl.float32)
                off = v - mean[:, None]
            else:
                mi = i < size_i
                v = tl.load(x_rows + i[None, :], mask=mt[:, None] & mi[None, :], other=0.0).to(tl.float32)
                off = tl.where(mi[None, :], v - mean[:, None], 0.0)
            total += tl.where(second != 0, off * off, v)
        if second != 0:
            variance = tl.sum(total, 1) / size_i
        else:
            mean = tl.sum(total, 1) / size_i
    tl.store(out, mean, mask=mt)
    tl.store(out + 1, variance, mask=mt)


@triton.jit(do_not_specialize=_SIZES)
def shrink_kernel(
    x,
    x_units,
    weights,
    i_units,
    piece_blocks,
    table,
    table_stride,
    tile_table,
    token_ids,
    h,
    h_stride,
    tokens,
    FIELDS: tl.constexpr,
    UNIT: tl.constexpr,
    LANES: tl.constexpr,
    BT: tl.constexpr,
    BR: tl.constexpr,
    BI: tl.constexpr,
    EVEN: tl.constexpr,
    UPCAST: tl.constexpr,
):
    tile = tile_table + tl.program_id(0) * FIELDS
    slot = tl.load(tile)
    if slot < 0:
        return
    row = table + slot.to(tl.int64) * table_stride
    rows = tl.load(row + 3).to(tl.int32)
    first_r = tl.program_id(1) * BR
    if first_r >= tl.cdiv(rows, BR) * BR * tl.load(row + BANDS_AT).to(tl.int32):
        return
    start = tl.load(tile + 1)
    it = tl.arange(0, BT)
    mt = it < tl.load(tile + 2)
    t = tl.load(token_ids + start + it, mask=mt, other=0).to(tl.int64)
    split = tl.program_id(2)
    size_i = i_units * UNIT
    # A whole number of blocks, in a form that shows the compiler the alignment.
    first_i = split * piece_blocks * BI
    last_i = tl.minimum(first_i + piece_blocks * BI, size_i)
    a = weights + tl.multiple_of(tl.load(row), UNIT)
    x_rows = x + t[:, None] * (x_units * UNIT)
    # What the piece has of each band; of the others it leaves zeros.
    bands = tl.load(row + BANDS_AT).to(tl.int32)
    in_band = size_i // bands
    padded = tl.cdiv(rows, BR) * BR
    for r0 in range(first_r, bands * padded, LANES * BR):
        band = r0 // padded
        begin = tl.multiple_of(tl.maximum(first_i, band * in_band), BI)
        end = tl.minimum(last_i, (band + 1) * in_band)
        r = r0 - band * padded + tl.arange(0, BR)
        mr = r < rows
        acc = tl.zeros((BT, BR), tl.float32)
        for i0 in range(begin, end, BI):
            i = i0 + tl.arange(0, BI)
            if EVEN:
                w = tl.load(a + r[None, :] * size_i + i[:, None], mask=mr[None, :], other=0.0)
                v = tl.load(x_rows + i[None, :], mask=mt[:, None], other=0.0)
            else:
                mi = i < size_i
                w = tl.load(a + r[None, :] * size_i + i[:, None], mask=mr[None, :] & mi[:, None], other=0.0)
                v = tl.load(x_rows + i[None, :], mask=mt[:, None] & mi[None, :], other=0.0)
            if UPCAST:
                w = w.to(tl.float32)
                v = v.to(tl.float32)
            acc = tl.dot(v, w, acc, input_precision="ieee")
        out = h + (split * tokens + t[:, None]) * h_stride + band * rows + r[None, :]
        tl.store(out, acc, mask=mt[:, None] & mr[None, :])
    if (tl.program_id(1) == 0) & (split == 0) & (tl.load(row + MOMENTS_AT) != 0):
        _moments(x_rows, mt, size_i, h + t * h_stride + rows, BT, BI, EVEN)


def arguments(site: Site, x: Tensor, h: Tensor) -> tuple[tuple[int, int, int], dict[str, Any]]:
    """Grid and arguments of the launch."""
    tokens, size_i = x.shape
    c = config(site, tokens, h.shape[0])
    # The stride of an axis of length 1 is arbitrary.
    stride = x.stride(0) if tokens > 1 else size_i
    unit = units(stride, size_i)
    blocks = -(-size_i // c.shrink_i)
    tiles = site.plan.tiles(tokens)
    return (tiles.programs, c.shrink_lanes, c.splits), {
        "x": x,
        "x_units": stride // unit,
        "weights": site.weights,
        "i_units": size_i // unit,
        "piece_blocks": -(-blocks // c.splits),
        "table": site.table,
        "table_stride": site.table.stride(0),
        "tile_table": tiles.tiles,
        "token_ids": tiles.tokens,
        "h": h,
        "h_stride": h.shape[1],
        "tokens": tokens,
        "FIELDS": TILE_FIELDS,
        "UNIT": unit,
        "LANES": c.shrink_lanes,
        "BT": c.tile,
        "BR": c.shrink_r,
        "BI": c.shrink_i,
        "EVEN": size_i % c.shrink_i == 0,
        "UPCAST": INTERPRETED,
        "num_warps": c.shrink_warps,
        "num_stages": c.shrink_stages,
        "enable_fp_fusion": True,
    }


def shrink(site: Site, x: Tensor, h: Tensor) -> None:
    """Write the rows of h, in all planes, whose tokens have an adapter at this site."""
    if x.shape[0]:
        grid, kwargs = arguments(site, x, h)
        shrink_kernel[grid](**kwargs)
