# mypy: disable-error-code="import-untyped, import-not-found, no-untyped-def, untyped-decorator"
"""Which experts of a gate with a capacity still take each token of a tile. Definition: `gates.py`, `sequences.py`."""

from __future__ import annotations

import triton
import triton.language as tl

from loramux_kernels import sequences
from loramux_kernels.triton.gate import CAPACITY_AT, choose, logits

PLACE_FIELDS = tl.constexpr(sequences.PLACE_FIELDS)


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b)


@triton.jit
def room(
    rule,
    experts,
    count,
    counts,
    places,
    token_ids,
    tile,
    h,
    h_stride,
    first_logit,
    plane,
    moments,
    sums,
    keep,
    SPLITS: tl.constexpr,
    BT: tl.constexpr,
    EXPERTS: tl.constexpr,
):
    """Whether fewer than the capacity's tokens before each in its sequence selected each expert, [BT, EXPERTS].

    `count`: logits of a token · `h` … `sums`: as of `logits` · `counts`: rows of `experts` numbers · `keep`:
    whether to leave there what the next step goes on from.
    """
    capacity = tl.load(rule + CAPACITY_AT).to(tl.int32)
    start = tl.load(tile + 1)
    tokens = tl.load(tile + 2)
    it = tl.arange(0, BT)
    e = tl.arange(0, EXPERTS)
    mt = it < tokens
    place = places + tl.load(token_ids + start + it, mask=mt, other=0) * PLACE_FIELDS
    earlier = tl.load(place, mask=mt, other=0)
    read = tl.load(place + 1, mask=mt, other=-1)
    # The tile's first token may go on with a request of earlier tiles: those of its tokens are counted here once more,
    # until no expert has room. The last round is the tile's own.
    ahead = tl.sum(tl.where(it == 0, earlier, 0), 0)
    first_read = tl.sum(tl.where(it == 0, read, 0), 0) + tl.zeros_like(e)
    before_tile = tl.load(counts + first_read * experts + e, mask=(e < experts) & (first_read >= 0), other=0)
    chosen = tl.zeros((BT, EXPERTS), tl.int32)
    for first in range(-tl.cdiv(ahead, BT) * BT, 1, BT):
        before_tile += tl.sum(chosen, 0)
        if (first == 0) | (tl.min(tl.where(e < experts, before_tile, capacity), 0) < capacity):
            there = (first + it >= -ahead) & (first + it < tokens)
            ids = tl.load(token_ids + start + first + it, mask=there, other=0).to(tl.int64)
            rows = h + ids[:, None] * h_stride
            scores = logits(rule, count, rows, first_logit, plane, moments, sums, there, SPLITS, BT, EXPERTS)
            selected, _ = choose(rule, experts, scores, BT, EXPERTS)
            chosen = (selected & there[:, None]).to(tl.int32)
    within = tl.cumsum(chosen, 0) - chosen
    # Sums only grow: the largest among those where requests began is that where the token's own did.
    before = within - tl.associative_scan(tl.where((earlier == 0)[:, None], within, 0), 0, _larger)
    real = (e < experts)[None, :]
    carried = tl.load(counts + read[:, None] * experts + e[None, :], mask=real & (read >= 0)[:, None], other=0)
    # Only the request of the tile's first token can have begun before the tile.
    before += tl.where((it - earlier <= 0)[:, None] & (ahead > 0), before_tile[None, :], carried)
    if keep:
        write = tl.load(place + 2, mask=mt, other=-1)
        tl.store(counts + write[:, None] * experts + e[None, :], before + chosen, mask=real & (write >= 0)[:, None])
    return before < capacity
