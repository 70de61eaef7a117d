"""A site: one linear of one layer. What it is, and where a running pool keeps its weights.

Axes: T tokens · I inputs · O outputs of one slice · R rank rows of one adapter at the site, all slices stacked ·
E experts of one slice.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import TYPE_CHECKING
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from loramux_kernels.arena import aligned
from loramux_kernels.gates import GATE_FIELDS, MAX_EXPERTS, TokenGate

if TYPE_CHECKING:
    from loramux_kernels.backends import Backend
    from loramux_kernels.plan import Plan
    from loramux_kernels.trace import Trace

SCALE_BYTES = EXPERT_BYTES = 4
TABLE_HEAD = 4
TABLE_PART = 5 + GATE_FIELDS
"""Columns of a site's table before the slices, and of each slice."""


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """dtype of sums and of the shrink's output: float32, or float64 for float64 weights."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@dataclass(frozen=True)
class SiteSpec:
    """One linear. A fused projection (q, k, v or gate, up) is one site whose slices share the input x.

    `modules` names the unfused linear of each slice, `d_outs` its outputs; slices follow each other in y's columns.
    """

    name: str
    modules: tuple[str, ...]
    d_in: int
    d_outs: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.modules or len(self.modules) != len(self.d_outs):
            raise ValueError(f"site {self.name}: {len(self.modules)} modules for {len(self.d_outs)} slices")
        if self.d_in < 1 or min(self.d_outs) < 1:
            raise ValueError(f"site {self.name}: sizes must be positive")


@dataclass(frozen=True)
class SliceGate:
    """A slice's gate, the columns of h (and rows of A) that hold its router, and its int32 `expert_R`."""

    rule: TokenGate
    logits: slice
    expert: Tensor


@dataclass(frozen=True)
class SliceWeights:
    """Slice `index` of an adapter at a site: rows of h and A, columns of y, and B transposed `b_RO`."""

    index: int
    rows: slice
    cols: slice
    b: Tensor
    gate: SliceGate | None = None

    @property
    def rank(self) -> int:
        return self.b.shape[0]


@dataclass(frozen=True)
class SlotWeights:
    """One adapter at one site, as views of the arena: `a` (the R rank rows, then router rows) with I columns,
    float32 `scale_R`, and its slices in order."""

    a: Tensor
    scale: Tensor
    slices: tuple[SliceWeights, ...]
    live: tuple[SliceWeights, ...] = field(init=False)
    """The slices with rank > 0."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "live", tuple(s for s in self.slices if s.rank))


@dataclass(frozen=True)
class Layout:
    """Byte offsets, inside one extent, of an adapter's arrays at one site.

    A of all slices with the routers' rows behind it, then scale, then (only with a gate) expert, then B of each slice.
    """

    ranks: tuple[int, ...]
    gates: tuple[TokenGate | None, ...]
    scale: int
    expert: int
    b: tuple[int, ...]
    nbytes: int

    @classmethod
    def of(cls, spec: SiteSpec, ranks: tuple[int, ...], gates: tuple[TokenGate | None, ...], itemsize: int) -> Layout:
        rank_rows, router_rows = sum(ranks), sum(g.experts for g in gates if g)
        scale = aligned((rank_rows + router_rows) * spec.d_in * itemsize)
        expert = scale + aligned(rank_rows * SCALE_BYTES)
        end = expert + (aligned(rank_rows * EXPERT_BYTES) if router_rows else 0)
        b = []
        for rank, d_out in zip(ranks, spec.d_outs, strict=True):
            b.append(end)
            end += aligned(rank * d_out * itemsize)
        return cls(ranks, gates, scale, expert, tuple(b), end)

    @property
    def rows(self) -> int:
        """Rows of A in use: rank rows and router rows."""
        return sum(self.ranks) + sum(g.experts for g in self.gates if g)

    @property
    def logits(self) -> tuple[int, ...]:
        """First router row of each slice, where its logits begin in h."""
        counts = (g.experts if g else 0 for g in self.gates[:-1])
        return tuple(itertools.accumulate(counts, initial=sum(self.ranks)))


class Site:
    """A site inside a pool: what a backend reads when the op runs.

    `weights`, `floats` and `ints` are the same arena seen as the pool's dtype, as float32 and as int32. `table`
    (device, int64 [slots, TABLE_HEAD + TABLE_PART·slices]) holds, per slot: offset of A in `weights`, of scale in
    `floats` and of expert in `ints`, rows of A; then per slice the first rank row, the rank, the offset of B in
    `weights`, the number of experts (0: no gate), the first router row, and the gate as `TokenGate.packed`. Zeros
    where the adapter leaves the site alone. Slice j is gate `first_gate` + j of `trace`.
    """

    def __init__(
        self,
        spec: SiteSpec,
        *,
        max_rank: int,
        slots: int,
        arena: Tensor,
        dtype: torch.dtype,
        table: Tensor,
        plan: Plan,
        trace: Trace,
        first_gate: int,
        backend: Backend,
    ) -> None:
        self.spec = spec
        self.max_rank = max_rank
        self.rows = (max_rank + MAX_EXPERTS) * len(spec.d_outs)
        self.dtype = dtype
        self.weights = arena.view(dtype)
        self.floats = arena.view(torch.float32)
        self.ints = arena.view(torch.int32)
        self.table = table
        self.plan = plan
        self.trace = trace
        self.first_gate = first_gate
        self.backend = backend
        self.slots: list[SlotWeights | None] = [None] * slots
        self.id = torch.tensor(next(_ids), dtype=torch.int64)
        _sites[int(self.id)] = self

    def views(self, offset: int, layout: Layout) -> SlotWeights:
        """The arrays of an adapter whose extent begins at byte `offset`."""
        item, total, d_in = self.dtype.itemsize, sum(layout.ranks), self.spec.d_in
        a = self.weights.as_strided((layout.rows, d_in), (d_in, 1), offset // item)
        scale = self.floats.as_strided((total,), (1,), (offset + layout.scale) // SCALE_BYTES)
        experts = (offset + layout.expert) // EXPERT_BYTES
        slices: list[SliceWeights] = []
        row = col = 0
        for rank, d_out, at, rule, first in zip(
            layout.ranks, self.spec.d_outs, layout.b, layout.gates, layout.logits, strict=True
        ):
            b = self.weights.as_strided((rank, d_out), (d_out, 1), (offset + at) // item if rank else 0)
            gate = None
            if rule:
                expert = self.ints.as_strided((rank,), (1,), experts + row)
                gate = SliceGate(rule, slice(first, first + rule.experts), expert)
            slices.append(SliceWeights(len(slices), slice(row, row + rank), slice(col, col + d_out), b, gate))
            row, col = row + rank, col + d_out
        return SlotWeights(a, scale, tuple(slices))

    def table_row(self, offset: int, layout: Layout) -> list[int]:
        """What `table` holds for that adapter."""
        item = self.dtype.itemsize
        scale, expert = (offset + layout.scale) // SCALE_BYTES, (offset + layout.expert) // EXPERT_BYTES
        row = [offset // item, scale, expert, layout.rows]
        first = 0
        for rank, at, gate, logits in zip(layout.ranks, layout.b, layout.gates, layout.logits, strict=True):
            row += [first, rank, (offset + at) // item]
            row += [gate.experts, logits, *gate.packed()] if gate else [0] * (TABLE_PART - 3)
            first += rank
        return row


_ids = itertools.count()
# The ops receive an id; a pool that nobody holds any more takes its sites, and the arena behind them, with it.
_sites: WeakValueDictionary[int, Site] = WeakValueDictionary()


def lookup(site_id: Tensor) -> Site:
    """The live site of that id. LookupError if its pool is gone."""
    site = _sites.get(int(site_id))
    if site is None:
        raise LookupError(f"site {int(site_id)} belongs to no live pool")
    return site
