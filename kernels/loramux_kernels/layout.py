"""Where the arrays of one adapter at one site lie in its extent of the arena.

    A of all slices [R / n, I], routers behind it, a row per logit · scale [R] · expert [R], with a router only ·
    per slice B [r / n, O], mag [O], bias [O], sums of its router's rows [E] ·
    per slice with a capacity its counts [N, E]

Every array begins on an `arena.ALIGNMENT` boundary; scale, mag, bias and sums are float32 (sums float64 beside float64
weights), expert and counts int32. Only routers that read LayerNorm(x) have sums: of their rows as they are stored,
whatever rounding made of them.
Counts are no weights: steps write them (`sequences.py`). A slice may borrow its B: then it lies in another adapter's
extent, at the same slice of the same site.

n is 1, or the number of *bands* of an adapter whose A and B are block-diagonal: the i-th R/n of its rank rows are zero
but in the i-th I/n of the inputs and the i-th O/n of the outputs. A row of the arrays then holds one rank row of every
band, side by side, and there are no zeros. In h and in scale, band follows band.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from loramux_kernels.arena import aligned
from loramux_kernels.gates import TokenGate

WORD = 4
"""Bytes of a float32 or int32."""


class Part(NamedTuple):
    """What an adapter brings to one slice of a site: rank rows of all its experts, their gate, whether its outputs
    have a multiplier of their own for the base linear's part, and a bias, and whether B is another adapter's."""

    rank: int = 0
    gate: TokenGate | None = None
    mag: bool = False
    bias: bool = False
    borrows: bool = False


@dataclass(frozen=True)
class Layout:
    """Byte offsets inside one extent; None where a slice has no such array."""

    parts: tuple[Part, ...]
    scale: int
    expert: int
    b: tuple[int | None, ...]
    mag: tuple[int | None, ...]
    bias: tuple[int | None, ...]
    sums: tuple[int | None, ...]
    counts: tuple[int | None, ...]
    count_rows: int
    bands: int
    nbytes: int

    @classmethod
    def of(
        cls, d_in: int, d_outs: Sequence[int], parts: tuple[Part, ...], itemsize: int, count_rows: int, bands: int = 1
    ) -> Layout:
        """`count_rows`: N, of a slice with a capacity. `bands`: n, which divides every size and rank."""
        rank_rows, router_rows = sum(p.rank for p in parts), sum(p.gate.logits for p in parts if p.gate)
        scale = aligned((rank_rows // bands + router_rows) * d_in * itemsize)
        expert = scale + aligned(rank_rows * WORD)
        end = expert + (aligned(rank_rows * WORD) if router_rows else 0)
        b: list[int | None] = []
        mag: list[int | None] = []
        bias: list[int | None] = []
        sums: list[int | None] = []
        for part, d_out in zip(parts, d_outs, strict=True):
            b.append(None if part.borrows else end)
            end += 0 if part.borrows else aligned(part.rank // bands * d_out * itemsize)
            for has, offsets in ((part.mag, mag), (part.bias, bias)):
                offsets.append(end if has else None)
                end += aligned(d_out * WORD) if has else 0
            normed = part.gate is not None and part.gate.layer_norm_eps is not None
            sums.append(end if normed else None)
            end += aligned(part.gate.logits * max(itemsize, WORD)) if part.gate is not None and normed else 0
        counts: list[int | None] = []
        for part in parts:
            limited = part.gate is not None and part.gate.capacity > 0
            counts.append(end if limited else None)
            end += aligned(count_rows * part.gate.experts * WORD) if part.gate is not None and limited else 0
        per_slice = tuple(b), tuple(mag), tuple(bias), tuple(sums), tuple(counts)
        return cls(parts, scale, expert, *per_slice, count_rows, bands, end)

    # Cached, for the many sites that share a layout.

    @cached_property
    def present(self) -> frozenset[int]:
        """The slices that the adapter changes."""
        return frozenset(j for j, part in enumerate(self.parts) if part != Part())

    @cached_property
    def borrowed(self) -> frozenset[int]:
        """The slices whose B is another adapter's."""
        return frozenset(j for j, part in enumerate(self.parts) if part.borrows)

    @cached_property
    def rank_rows(self) -> int:
        return sum(p.rank for p in self.parts)

    @cached_property
    def rows(self) -> int:
        """Rows of A in use: rank rows, one of each band, and router rows."""
        return self.rank_rows // self.bands + sum(p.gate.logits for p in self.parts if p.gate)

    @cached_property
    def limited(self) -> bool:
        """Whether a slice has a gate with a capacity."""
        return any(at is not None for at in self.counts)

    @cached_property
    def moments(self) -> slice | None:
        """Where h has mean and variance of x, behind the sums of all rows; None if no router reads LayerNorm(x)."""
        return slice(self.rows, self.rows + 2) if any(at is not None for at in self.sums) else None

    @cached_property
    def logits(self) -> tuple[int, ...]:
        """First router row of each slice, where its logits begin in h."""
        counts = (p.gate.logits if p.gate else 0 for p in self.parts[:-1])
        return tuple(itertools.accumulate(counts, initial=self.rank_rows))
