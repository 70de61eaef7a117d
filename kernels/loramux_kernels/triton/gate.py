# mypy: disable-error-code="import-untyped, import-not-found, no-untyped-def, untyped-decorator"
"""g_TE = gate(l_TE) in registers, for one tile of tokens. Definition: `gates.py`."""

from __future__ import annotations

import triton
import triton.language as tl

from loramux_kernels import gates

ABSOLUTE = tl.constexpr(gates.ABSOLUTE)
RENORMALISE = tl.constexpr(gates.RENORMALISE)
ONE = tl.constexpr(gates.ONE)
GROUPED = tl.constexpr(gates.GROUPED)
ADAPTIVE = tl.constexpr(gates.ADAPTIVE)
LAYER_NORM = tl.constexpr(gates.LAYER_NORM)
CAPACITY_AT = tl.constexpr(gates.CAPACITY_AT)
GROUPS_AT = tl.constexpr(gates.GROUPS_AT)
GROUPS_PER_WORD = tl.constexpr(gates.GROUPS_PER_WORD)


@triton.jit
def _real(bits):
    return tl.load(bits).to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def logit_count(rule, experts):
    """One per expert, and one for an adaptive threshold."""
    return experts + ((tl.load(rule + 1).to(tl.int32) & ADAPTIVE) != 0).to(tl.int32)


@triton.jit
def logits(
    rule, count, h_rows, first, plane, moments, sums, mt, SPLITS: tl.constexpr, BT: tl.constexpr, EXPERTS: tl.constexpr
):
    """Router logits [BT, EXPERTS], zero beyond `count`.

    `rule`: `TokenGate.packed` in the table · `h_rows` [BT, 1]: where each token's row of h begins · `first`: column of
    the first logit · `plane`: elements between the pieces of a logit · `mt` [BT]: which tokens there are. Only read for
    a router of LayerNorm(x): `moments`, column of mean and variance of x, and `sums` of the router's rows.
    """
    e = tl.arange(0, EXPERTS)[None, :]
    # What the shrink did not write may hold anything: it is replaced, never multiplied.
    live = mt[:, None] & (e < count)
    scores = tl.zeros((BT, EXPERTS), tl.float32)
    for split in tl.static_range(SPLITS):
        scores += tl.load(h_rows + first + split * plane + e, mask=live, other=0.0)
    # Without a branch, and loaded as often as there are logits: either else takes the kernel registers. Nothing is read
    # for other routers.
    normed = (tl.load(rule + 1).to(tl.int32) & LAYER_NORM) != 0
    there = e < tl.where(normed, count, 0)
    mean = tl.load(h_rows + moments + 0 * e, mask=mt[:, None] & there, other=0.0)
    variance = tl.load(h_rows + moments + 1 + 0 * e, mask=mt[:, None] & there, other=1.0)
    scores -= mean * tl.load(sums + e, mask=there, other=0.0)
    scores *= tl.where(normed, tl.rsqrt(variance + _real(rule + 7)), 1.0)
    return scores


@triton.jit
def choose(rule, experts, scores, BT: tl.constexpr, EXPERTS: tl.constexpr):
    """Which experts each token selects, and their weights before they are divided, [BT, EXPERTS].

    `rule`: `TokenGate.packed` in the table.
    """
    k = tl.load(rule).to(tl.int32)
    flags = tl.load(rule + 1).to(tl.int32)
    p_sum, threshold, temperature = _real(rule + 2), _real(rule + 3), _real(rule + 5)
    e = tl.arange(0, EXPERTS)[None, :]
    real = e < experts
    # What p must reach, and what is taken off it.
    least = tl.zeros((BT, 1), tl.float32) + threshold
    taken_off = tl.zeros((BT, 1), tl.float32)
    if (flags & ADAPTIVE) != 0:
        own = tl.sum(tl.where(e == experts, scores, 0.0), 1)[:, None] + _real(rule + 6)
        # One quotient: a product would be fused with what it is taken off, and differ from what p was compared with.
        least = tl.div_rn(least, 1.0 + tl.exp(-own))
        taken_off = least
    scores = tl.where((flags & ABSOLUTE) != 0, tl.abs(scores), scores)
    scores = tl.where(real, tl.div_rn(scores, temperature), -float("inf"))
    p = tl.exp(scores - tl.max(scores, 1)[:, None])
    # Rounded as on the host: ten equal scores reach a threshold of 0.1.
    p = tl.div_rn(p, tl.sum(p, 1)[:, None])
    # How many experts come before each, and their probability together.
    place = tl.zeros((BT, EXPERTS), tl.int32)
    mass = tl.zeros((BT, EXPERTS), tl.float32)
    for other in range(experts):
        p_other = tl.sum(tl.where(e == other, p, 0.0), 1)[:, None]
        before = (p_other > p) | ((p_other == p) & (other < e))
        place += before.to(tl.int32)
        mass += tl.where(before, p_other, 0.0)
    return real & (place < k) & (mass < p_sum) & (p >= least), p - taken_off


@triton.jit
def gate(rule, experts, scores, free, BT: tl.constexpr, EXPERTS: tl.constexpr):
    """Weights [BT, EXPERTS] of experts, or of groups, and zeros. `free` [BT, EXPERTS]: which experts take the token."""
    flags = tl.load(rule + 1).to(tl.int32)
    e = tl.arange(0, EXPERTS)[None, :]
    selected, p = choose(rule, experts, scores, BT, EXPERTS)
    g = tl.where(selected, p, 0.0)
    total = tl.sum(g, 1)[:, None]
    divisor = tl.where(((flags & RENORMALISE) != 0) & (total > 0), total + _real(rule + 4), 1.0)
    g = tl.where((flags & ONE) != 0, selected.to(tl.float32), g / divisor)
    g = tl.where(free, g, 0.0)
    if (flags & GROUPED) != 0:
        group = tl.arange(0, EXPERTS)
        experts_of = tl.load(rule + GROUPS_AT + group // GROUPS_PER_WORD) >> (group % GROUPS_PER_WORD * 16)
        total_of = tl.zeros((BT, EXPERTS), tl.float32)
        for expert in range(experts):
            g_expert = tl.sum(tl.where(e == expert, g, 0.0), 1)[:, None]
            total_of += tl.where(((experts_of >> expert) & 1)[None, :] != 0, g_expert, 0.0)
        g = total_of
    return g
