"""The arrays of one adapter at one site, as views of the memory that its layout describes.

That memory is the pool's arena, or any other: what is laid out elsewhere is copied into the arena byte by byte.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from loramux_kernels.errors import WrongShape
from loramux_kernels.gates import TokenGate, check_experts
from loramux_kernels.layout import WORD, Layout

if TYPE_CHECKING:
    from loramux_kernels.sites import SiteSpec


NOTHING_LENT: Mapping[int, int] = MappingProxyType({})


@dataclass(frozen=True)
class SliceGate:
    """A slice's gate, the columns of h (and rows of A) that hold its router, its int32 `expert_R` (or group), of a gate
    with a capacity the int32 `counts_NE` that steps keep (`sequences.py`), and of a router that reads LayerNorm(x) the
    `sums_E` of its rows in the dtype of sums."""

    rule: TokenGate
    logits: slice
    expert: Tensor
    counts: Tensor | None = None
    sums: Tensor | None = None


@dataclass(frozen=True)
class SliceWeights:
    """Slice `index` of an adapter at a site: rows of h and A, columns of y, B transposed `b_RO`, and where it has
    them float32 `mag_O` and `bias_O`. `borrows`: that B is another adapter's, and only read."""

    index: int
    rows: slice
    cols: slice
    b: Tensor
    gate: SliceGate | None = None
    mag: Tensor | None = None
    bias: Tensor | None = None
    borrows: bool = False

    @property
    def rank(self) -> int:
        return self.b.shape[0]

    def band(self, i: int, weights: SlotWeights) -> SliceWeights:
        """What of this slice belongs to band `i` of all those of `weights`."""
        if weights.bands == 1:
            return self
        shift, width = i * weights.a.shape[0], self.b.shape[1] // weights.bands
        mine, begin = slice(i * width, (i + 1) * width), self.cols.start + i * width
        return SliceWeights(
            self.index,
            slice(self.rows.start + shift, self.rows.stop + shift),
            slice(begin, begin + width),
            self.b[:, mine],
            None,
            None if self.mag is None else self.mag[mine],
            None if self.bias is None else self.bias[mine],
        )


@dataclass(frozen=True)
class SlotWeights:
    """One adapter at one site: `a` (the R rank rows, a row for one of every band, then router rows) with I columns,
    float32 `scale_R`, its slices in order, how many bands it has (`layout.py`), and where a router reads LayerNorm(x)
    the columns of h for mean and variance of x."""

    a: Tensor
    scale: Tensor
    slices: tuple[SliceWeights, ...]
    bands: int = 1
    moments: slice | None = None
    live: tuple[SliceWeights, ...] = field(init=False)
    """The slices that change anything, band by band."""

    def __post_init__(self) -> None:
        live = (s for s in self.slices if s.rank or s.mag is not None or s.bias is not None)
        object.__setattr__(self, "live", tuple(s.band(i, self) for s in live for i in range(self.bands)))

    @property
    def columns(self) -> int:
        """How many of h are read."""
        return self.scale.shape[0] + sum(s.gate.rule.logits for s in self.slices if s.gate)

    def fill(
        self,
        index: int,
        module: str,
        a: Tensor,
        b: Tensor | None,
        scale: Tensor,
        *,
        router: Tensor | None = None,
        expert: Tensor | None = None,
        mag: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> int:
        """Copy the arrays of slice `index`, whose linear is `module`, converting dtypes; returns bytes copied.

        With bands, `a`, `b` and `scale` are given as without, zeros outside of the blocks, and packed here. `b` is None
        where the slice borrows it.

        Raises WrongShape, or ValueError for an array too many or too few, for experts that do not exist and for
        anything outside of the bands, before it copies anything.
        """
        part = self.slices[index]
        copies = {
            "a": (a, self.a[part.rows]),
            "scale": (scale, self.scale[part.rows]),
        }
        if self.bands > 1:
            scales = self.scale.view(self.bands, -1)[:, part.rows]
            if scale.shape != (scales.numel(),):
                raise WrongShape(module, "scale", tuple(scale.shape), (scales.numel(),))
            rows = self.a[part.rows]
            copies = {
                "a": (_packed(module, "a", a, rows, self.bands), rows),
                "scale": (scale.view(scales.shape), scales),
            }
            if b is not None and not part.borrows:
                b = _packed(module, "b", b, part.b, self.bands)
        for name, tensor, target in (
            ("b", b, None if part.borrows else part.b),
            ("router", router, self.a[part.gate.logits] if part.gate else None),
            ("expert", expert, part.gate.expert if part.gate else None),
            ("mag", mag, part.mag),
            ("bias", bias, part.bias),
        ):
            if tensor is not None and target is not None:
                copies[name] = (tensor, target)
            elif tensor is not None or target is not None:
                raise ValueError(f"module {module}: {name} reserved: {target is not None}, given: {tensor is not None}")
        for name, (tensor, target) in copies.items():
            if tensor.shape != target.shape:
                raise WrongShape(module, name, tuple(tensor.shape), tuple(target.shape))
        if part.gate is not None and expert is not None:
            check_experts(module, expert, part.gate.rule.weights)
        for tensor, target in copies.values():
            target.copy_(tensor, non_blocking=tensor.is_pinned())
        if part.gate is not None and part.gate.sums is not None:
            part.gate.sums.copy_(self.a[part.gate.logits].sum(1, dtype=torch.float64))
        return sum(target.nbytes for _, target in copies.values())


@dataclass(frozen=True)
class Memory:
    """The same bytes as the pool's dtype, as float32 and as int32."""

    weights: Tensor
    floats: Tensor
    ints: Tensor

    @classmethod
    def of(cls, memory: Tensor, dtype: torch.dtype) -> Memory:
        return cls(memory.view(dtype), memory.view(torch.float32), memory.view(torch.int32))

    def at(self, site: SiteSpec, offset: int, layout: Layout, lent: Mapping[int, int] = NOTHING_LENT) -> SlotWeights:
        """The arrays of an adapter at `site`, whose extent begins at byte `offset`.

        `lent`: slice -> where the B that it borrows begins, in bytes. Where nothing is said about it, its B is a
        tensor without memory (device "meta").
        """
        item, d_in = self.weights.itemsize, site.d_in
        a = self.weights.as_strided((layout.rows, d_in), (d_in, 1), offset // item)
        scale = _words(self.floats, offset + layout.scale, layout.rank_rows)
        slices: list[SliceWeights] = []
        row = col = 0
        for j, (part, d_out) in enumerate(zip(layout.parts, site.d_outs, strict=True)):
            rank, own = part.rank // layout.bands, layout.b[j]
            at = lent.get(j) if own is None else offset + own
            if at is None:
                b = torch.empty(rank, d_out, dtype=self.weights.dtype, device="meta")
            else:
                b = self.weights.as_strided((rank, d_out), (d_out, 1), at // item)
            gate = None
            if part.gate:
                first = layout.logits[j]
                expert = _words(self.ints, offset + layout.expert + row * WORD, rank)
                counts = None
                if (counts_at := layout.counts[j]) is not None:
                    shape = layout.count_rows, part.gate.experts
                    counts = _words(self.ints, offset + counts_at, math.prod(shape)).view(shape)
                sums = None
                if (sums_at := layout.sums[j]) is not None:
                    sums_of = self.weights if item > WORD else self.floats
                    sums = sums_of.as_strided((part.gate.logits,), (1,), (offset + sums_at) // sums_of.itemsize)
                gate = SliceGate(part.gate, slice(first, first + part.gate.logits), expert, counts, sums)
            mag, bias = (
                None if at is None else _words(self.floats, offset + at, d_out)
                for at in (layout.mag[j], layout.bias[j])
            )
            rows, cols = slice(row, row + rank), slice(col, col + d_out)
            slices.append(SliceWeights(j, rows, cols, b, gate, mag, bias, part.borrows))
            row, col = rows.stop, cols.stop
        return SlotWeights(a, scale, tuple(slices), layout.bands, layout.moments)


def _packed(module: str, name: str, full: Tensor, target: Tensor, bands: int) -> Tensor:
    """The blocks of a block-diagonal matrix [n R, n C] side by side, [R, n C], as `target`. Raises WrongShape, or
    ValueError where there is anything else in it."""
    rows, columns = target.shape
    if full.shape != (bands * rows, columns):
        raise WrongShape(module, name, tuple(full.shape), (bands * rows, columns))
    blocks = blocks_of(full, bands)
    if blocks is None:
        raise ValueError(f"module {module}: {name} is not zero outside of its {bands} bands")
    return blocks.movedim(2, 1).reshape(rows, columns)


def blocks_of(full: Tensor, bands: int) -> Tensor | None:
    """The blocks of a block-diagonal matrix [n R, n C] as [R, C, n]; None if it is not zero outside of them."""
    rows, columns = (size // bands for size in full.shape)
    blocks = full.reshape(bands, rows, bands, columns).diagonal(dim1=0, dim2=2)
    return blocks if blocks.count_nonzero() == full.count_nonzero() else None


def _words(words: Tensor, offset: int, count: int) -> Tensor:
    return words.as_strided((count,), (1,), offset // WORD)
