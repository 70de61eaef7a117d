"""A site: one linear of one layer. What it is, and where a running pool keeps its weights.

Axes: T tokens · I inputs · O outputs of one slice · R rank rows of one adapter at the site, all slices stacked ·
E experts of one slice.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from loramux_kernels.gates import GATE_FIELDS, MAX_EXPERTS
from loramux_kernels.layout import WORD, Layout

if TYPE_CHECKING:
    from loramux_kernels.backends import Backend
    from loramux_kernels.plan import Plan
    from loramux_kernels.trace import Trace
    from loramux_kernels.weights import Memory, SlotWeights

TABLE_HEAD = 7
MOMENTS_AT, BANDS_AT = 5, 6
RULE_AT = 5
MAG_AT, BIAS_AT, COUNTS_AT, SUMS_AT = range(RULE_AT + GATE_FIELDS, RULE_AT + GATE_FIELDS + 4)
TABLE_PART = SUMS_AT + 1
"""Columns of a site's table before the slices, of each slice, and where some of these are (`Site`)."""

MOMENT_COLUMNS = 8
"""Of h, behind those of the rows of A: two are used (`Layout.moments`), and a whole sector of memory leaves rows of h
where they were."""


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


class Site:
    """A site inside a pool: what a backend reads when the op runs.

    `weights`, `floats` and `ints` are the same arena seen as the pool's dtype, as float32 and as int32. `table`
    (device, int64 [slots, TABLE_HEAD + TABLE_PART·slices]) holds, per slot: offset of A in `weights`, of scale in
    `floats` and of expert in `ints`, rows of A, whether a slice has a capacity, whether a router reads LayerNorm(x),
    and the number of bands (`layout.py`); then per slice the first rank row, the rank (rows of A and B), the offset of
    B in `weights`, the number of experts (0: no gate), the first router row, the gate as `TokenGate.packed`, and the
    offsets of mag and bias in `floats`, of counts in `ints` and of sums in `floats`, plus one (0: none). Zeros where
    the adapter leaves the site alone. Slice j is gate `first_gate` + j of `trace`.

    `rows`: of A at most. `width`: columns of h.
    """

    def __init__(
        self,
        spec: SiteSpec,
        *,
        max_rank: int,
        slots: int,
        arena: Memory,
        table: Tensor,
        plan: Plan,
        trace: Trace,
        first_gate: int,
        backend: Backend,
    ) -> None:
        self.spec = spec
        self.max_rank = max_rank
        self.rows = (max_rank + MAX_EXPERTS) * len(spec.d_outs)
        self.width = self.rows + MOMENT_COLUMNS
        self.dtype = arena.weights.dtype
        self.weights, self.floats, self.ints = arena.weights, arena.floats, arena.ints
        self.table = table
        self.plan = plan
        self.trace = trace
        self.first_gate = first_gate
        self.backend = backend
        self.slots: list[SlotWeights | None] = [None] * slots
        self.id = torch.tensor(next(_ids), dtype=torch.int64)
        _sites[int(self.id)] = self

    def table_row(self, offset: int, layout: Layout, lent: Mapping[int, int]) -> list[int]:
        """What `table` holds for an adapter whose extent begins at byte `offset`; `lent` as of `Memory.at`."""
        item = self.dtype.itemsize
        row = [offset // item, (offset + layout.scale) // WORD, (offset + layout.expert) // WORD, layout.rows]
        row += [int(layout.limited), int(layout.moments is not None), layout.bands]
        first = 0
        for j, part in enumerate(layout.parts):
            rank, own = part.rank // layout.bands, layout.b[j]
            row += [first, rank, (lent[j] if own is None else offset + own) // item]
            row += [part.gate.experts, layout.logits[j], *part.gate.packed()] if part.gate else [0] * (2 + GATE_FIELDS)
            words = layout.mag[j], layout.bias[j], layout.counts[j], layout.sums[j]
            row += [0 if at is None else (offset + at) // WORD + 1 for at in words]
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
