# mypy: disable-error-code="import-untyped, import-not-found, no-untyped-def, untyped-decorator"
"""y_T,slice j ← mag_O ⊙ y_T,slice j + (gate(l)_T,expert(R) ⊙ scale_R ⊙ h_TR)[:, rows of slice j] @ B_RO + bias_O in one
launch.

T tokens · R rank rows of slice j · O outputs. Grid (tiles of tokens, blocks of O); blocks of all slices share it. A
program owns its block of y for all rank rows: y is read once, changed in float32 and rounded once. A tile of a
mixture computes its gate first, and reads no row of B whose gate is zero for all its tokens. mag and bias are read
where the table has them; nothing else of the kernel changes for them.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from loramux_kernels import sites
from loramux_kernels.gates import MAX_EXPERTS
from loramux_kernels.plan import TILE_FIELDS
from loramux_kernels.sites import TABLE_HEAD, TABLE_PART, Site
from loramux_kernels.trace import TRACE_TOKENS
from loramux_kernels.triton.capacity import room
from loramux_kernels.triton.config import INTERPRETED, config, units
from loramux_kernels.triton.gate import gate, logit_count, logits

RULE_AT = tl.constexpr(sites.RULE_AT)
BANDS_AT = tl.constexpr(sites.BANDS_AT)
MAG_AT = tl.constexpr(sites.MAG_AT)
BIAS_AT = tl.constexpr(sites.BIAS_AT)
COUNTS_AT = tl.constexpr(sites.COUNTS_AT)
SUMS_AT = tl.constexpr(sites.SUMS_AT)

_SIZES = ["table_stride", "h_stride", "y_units", "tokens", "first_gate"]


@triton.jit
def _scaled(h_rows, plane, scales, r, mt, mr, SPLITS: tl.constexpr, BT: tl.constexpr, BR: tl.constexpr):
    # Rows and columns that the shrink did not write may hold anything: they are replaced, never multiplied.
    live = mt[:, None] & mr[None, :]
    total = tl.zeros((BT, BR), tl.float32)
    for split in tl.static_range(SPLITS):
        total += tl.load(h_rows + split * plane + r[None, :], mask=live, other=0.0)
    return total * tl.load(scales + r, mask=mr, other=0.0)[None, :]


@triton.jit
def _outputs(y, t, y_stride, first_y, o):
    return y + t[:, None] * y_stride + (first_y + o)[None, :]


@triton.jit
def _product(acc, scaled, w, UPCAST: tl.constexpr):
    if UPCAST:
        w = w.to(tl.float32)
    else:
        scaled = scaled.to(w.dtype)
    return tl.dot(scaled, w, acc, input_precision="ieee")


@triton.jit(do_not_specialize=_SIZES)
def expand_kernel(
    h,
    h_stride,
    weights,
    floats,
    ints,
    table,
    table_stride,
    tile_table,
    token_ids,
    block_table,
    y,
    y_units,
    tokens,
    trace,
    trace_flag,
    first_gate,
    places,
    FIELDS: tl.constexpr,
    HEAD: tl.constexpr,
    PART: tl.constexpr,
    EXPERTS: tl.constexpr,
    TRACED: tl.constexpr,
    UNIT: tl.constexpr,
    SPLITS: tl.constexpr,
    BT: tl.constexpr,
    BR: tl.constexpr,
    BO: tl.constexpr,
    UPCAST: tl.constexpr,
):
    tile = tile_table + tl.program_id(0) * FIELDS
    slot = tl.load(tile)
    if slot < 0:
        return
    block = block_table + tl.program_id(1) * 4
    row = table + slot.to(tl.int64) * table_stride
    part = row + HEAD + PART * tl.load(block)
    rank = tl.load(part + 1).to(tl.int32)
    if (rank == 0) & (tl.load(part + MAG_AT) == 0) & (tl.load(part + BIAS_AT) == 0):
        return
    first_o = tl.multiple_of(tl.load(block + 1), BO)
    size_o = tl.load(block + 2) * UNIT
    first_y = tl.load(block + 3) * UNIT
    start = tl.load(tile + 1)
    it = tl.arange(0, BT)
    mt = it < tl.load(tile + 2)
    t = tl.load(token_ids + start + it, mask=mt, other=0).to(tl.int64)
    o = first_o + tl.arange(0, BO)
    mo = o < size_o
    first_r = tl.load(part)
    b = weights + tl.multiple_of(tl.load(part + 2), UNIT)
    scales = floats + tl.load(row + 1) + first_r
    h_rows = h + t[:, None] * h_stride
    plane = tokens.to(tl.int64) * h_stride
    acc = tl.zeros((BT, BO), tl.float32)
    experts = tl.load(part + 3).to(tl.int32)
    if experts == 0:
        # Outputs of a band have columns of h and scales of their own.
        band = first_o * tl.load(row + BANDS_AT).to(tl.int32) // size_o
        own_r = band * tl.load(row + 3)
        if UNIT > 1:
            before = tl.load(_outputs(y, t, y_units * UNIT, first_y, o), mask=mt[:, None] & mo[None, :], other=0.0)
        for r0 in range(0, rank, BR):
            r = r0 + tl.arange(0, BR)
            mr = r < rank
            w = tl.load(b + r[:, None] * size_o + o[None, :], mask=mr[:, None] & mo[None, :], other=0.0)
            scaled = _scaled(h_rows + first_r + own_r, plane, scales + own_r, r, mt, mr, SPLITS, BT, BR)
            acc = _product(acc, scaled, w, UPCAST)
    else:
        count = logit_count(part + RULE_AT, experts)
        first_logit = tl.load(part + 4)
        moments = tl.load(row + 3)
        sums = floats + tl.load(part + SUMS_AT) - 1
        scores = logits(part + RULE_AT, count, h_rows, first_logit, plane, moments, sums, mt, SPLITS, BT, EXPERTS)
        if (first_o == 0) & (tl.load(trace_flag) != 0):
            e = tl.arange(0, EXPERTS)[None, :]
            kept = trace + (first_gate + tl.load(block)).to(tl.int64) * (TRACED * EXPERTS) + t[:, None] * EXPERTS + e
            tl.store(kept, scores, mask=(mt & (t < TRACED))[:, None] & (e < count))
        free = tl.full((BT, EXPERTS), 1, tl.int1)
        counts_at = tl.load(part + COUNTS_AT)
        if counts_at != 0:
            free = room(
                part + RULE_AT,
                experts,
                count,
                ints + counts_at - 1,
                places,
                token_ids,
                tile,
                h,
                h_stride,
                first_logit,
                plane,
                moments,
                sums,
                first_o == 0,
                SPLITS,
                BT,
                EXPERTS,
            )
        g = gate(part + RULE_AT, experts, scores, free, BT, EXPERTS)
        if UNIT > 1:
            before = tl.load(_outputs(y, t, y_units * UNIT, first_y, o), mask=mt[:, None] & mo[None, :], other=0.0)
        # What any token of the tile takes of each expert: rows of B that none takes are not read.
        taken = tl.max(tl.where(mt[:, None], g, 0.0), 0)
        expert_of = ints + tl.load(row + 2) + first_r
        for r0 in range(0, rank, BR):
            r = r0 + tl.arange(0, BR)
            expert = tl.load(expert_of + r, mask=r < rank, other=0)
            mr = (r < rank) & (tl.gather(taken, expert, 0) > 0)
            if tl.max(mr.to(tl.int32), 0) > 0:
                w = tl.load(b + r[:, None] * size_o + o[None, :], mask=mr[:, None] & mo[None, :], other=0.0)
                scaled = _scaled(h_rows + first_r, plane, scales, r, mt, mr, SPLITS, BT, BR)
                scaled *= tl.gather(g, tl.broadcast_to(expert[None, :], (BT, BR)), 1)
                acc = _product(acc, scaled, w, UPCAST)
    # Anew: over the gate of a mixture there are no registers to keep these in.
    o = first_o + tl.arange(0, BO)
    mo = o < tl.load(block + 2) * UNIT
    out = _outputs(y, t, y_units * UNIT, first_y, o)
    mask = mt[:, None] & mo[None, :]
    if UNIT == 1:
        # Rows that begin anywhere need an address and a mask per element, which leave no registers to keep y in.
        before = tl.load(out, mask=mask, other=0.0)
    total = before.to(tl.float32)
    mag_at = tl.load(part + MAG_AT)
    bias_at = tl.load(part + BIAS_AT)
    if mag_at != 0:
        total *= tl.load(floats + tl.multiple_of(mag_at - 1, UNIT) + o, mask=mo, other=0.0)[None, :]
    total += acc
    if bias_at != 0:
        total += tl.load(floats + tl.multiple_of(bias_at - 1, UNIT) + o, mask=mo, other=0.0)[None, :]
    tl.store(out, total.to(y.dtype.element_ty), mask=mask)


@functools.cache
def _blocks(d_outs: tuple[int, ...], length: int, unit: int, device: torch.device) -> Tensor:
    """int32 [blocks, 4]: slice, first output within it, then in `unit`s its outputs and its first column of y."""
    rows, column = [], 0
    for j, d_out in enumerate(d_outs):
        rows += [(j, o, d_out // unit, column // unit) for o in range(0, d_out, length)]
        column += d_out
    return torch.tensor(rows, dtype=torch.int32, device=device)


def arguments(site: Site, y: Tensor, h: Tensor) -> tuple[tuple[int, int], dict[str, Any]]:
    """Grid and arguments of the launch."""
    tokens, width = y.shape
    c = config(site, tokens, h.shape[0])
    stride = y.stride(0) if tokens > 1 else width
    unit = units(stride, *site.spec.d_outs)
    blocks = _blocks(site.spec.d_outs, c.expand_o, unit, y.device)
    tiles = site.plan.tiles(tokens)
    return (tiles.programs, blocks.shape[0]), {
        "h": h,
        "h_stride": h.shape[1],
        "weights": site.weights,
        "floats": site.floats,
        "ints": site.ints,
        "table": site.table,
        "table_stride": site.table.stride(0),
        "tile_table": tiles.tiles,
        "token_ids": tiles.tokens,
        "block_table": blocks,
        "y": y,
        "y_units": stride // unit,
        "tokens": tokens,
        "trace": site.trace.buffer,
        "trace_flag": site.trace.flag,
        "first_gate": site.first_gate,
        "places": site.plan.sequences.buffer,
        "FIELDS": TILE_FIELDS,
        "HEAD": TABLE_HEAD,
        "PART": TABLE_PART,
        "EXPERTS": MAX_EXPERTS,
        "TRACED": TRACE_TOKENS,
        "UNIT": unit,
        "SPLITS": c.splits,
        "BT": c.tile,
        "BR": c.expand_r,
        "BO": c.expand_o,
        "UPCAST": INTERPRETED,
        "num_warps": c.expand_warps,
        "num_stages": c.expand_stages,
        "enable_fp_fusion": True,
    }


def expand(site: Site, y: Tensor, h: Tensor) -> None:
    """Change the rows of y whose tokens have an adapter at this site."""
    if y.shape[0]:
        grid, kwargs = arguments(site, y, h)
        expand_kernel[grid](**kwargs)
