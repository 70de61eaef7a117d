"""What an adapter's layout in a pool depends on: the sites, the dtype, the largest rank and step; no memory.

Whoever has a pool's geometry, in whatever process, can lay an adapter out as that pool wants it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

import torch

from loramux_kernels.errors import RankTooLarge, UnknownModule
from loramux_kernels.gates import TokenGate
from loramux_kernels.layout import Layout, Part
from loramux_kernels.sites import SiteSpec

NO_GATES: Mapping[str, TokenGate] = MappingProxyType({})
NO_BANDS: Mapping[str, int] = MappingProxyType({})

BAND_UNIT = 128
"""Inputs and outputs that kernels on a device take at a time, at most: bands begin where they do."""
BAND_BLOCKS, BLOCK = 16, 16
"""How many blocks of rank rows of all bands of a slice they can hold, and rows of a block."""

Layouts = Mapping[int, Layout]
"""Site index -> layout there, of the sites that an adapter touches, ascending. Equal layouts are one object."""


@dataclass(frozen=True)
class Geometry:
    """The sites of a pool in order. `count_rows`: rows of counts of a gate with a capacity (`sequences.py`). `tiled`:
    whether kernels on a device will read what is laid out.

    Raises ValueError if a module appears in two sites.
    """

    sites: tuple[SiteSpec, ...]
    dtype: torch.dtype
    max_rank: int
    count_rows: int
    tiled: bool = False
    _where: dict[str, tuple[int, int]] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        where = {m: (i, j) for i, spec in enumerate(self.sites) for j, m in enumerate(spec.modules)}
        if len(where) != sum(len(spec.modules) for spec in self.sites):
            raise ValueError("a module appears in two sites")
        object.__setattr__(self, "_where", where)

    def find(self, module: str) -> tuple[int, int]:
        """Index of the site that serves `module`, and of the slice there. Raises UnknownModule."""
        try:
            return self._where[module]
        except KeyError:
            raise UnknownModule(module) from None

    def layouts(
        self,
        ranks: Mapping[str, int],
        gates: Mapping[str, TokenGate] = NO_GATES,
        *,
        mag: Collection[str] = (),
        bias: Collection[str] = (),
        borrowed: Collection[str] = (),
        bands: Mapping[str, int] = NO_BANDS,
    ) -> Layouts:
        """How an adapter with these ranks per module lies at each site; arguments as of `AdapterPool.reserve`.

        Raises UnknownModule, RankTooLarge, or ValueError for a gate, or a B that is borrowed, without rank, and for a
        rank that bands do not divide.
        """
        by_site: dict[int, list[Part]] = {}
        for module in dict.fromkeys((*ranks, *gates, *mag, *bias, *borrowed)):
            i, j = self.find(module)
            rank = ranks.get(module, 0)
            part = Part(rank, gates.get(module), module in mag, module in bias, module in borrowed)
            if part.rank > self.max_rank:
                raise RankTooLarge(module, part.rank, self.max_rank)
            if part.rank < 0:
                raise ValueError(f"module {module}: rank {part.rank}")
            if part.gate and not part.rank:
                raise ValueError(f"module {module}: a gate, but no rank")
            if part.borrows and not part.rank:
                raise ValueError(f"module {module}: a B to borrow, but no rank")
            if part.rank % bands.get(module, 1):
                raise ValueError(f"module {module}: rank {part.rank}, which {bands[module]} bands do not divide")
            if part != Part():
                by_site.setdefault(i, [Part()] * len(self.sites[i].d_outs))[j] = part
        # Most layers are alike: one object for all of them makes the whole small to send and quick to make.
        made: dict[tuple[int, tuple[int, ...], tuple[Part, ...], int], Layout] = {}
        found = {}
        for i in sorted(by_site):
            spec = self.sites[i]
            parts = tuple(by_site[i])
            key = (spec.d_in, spec.d_outs, parts, self._bands(spec, parts, bands))
            if key not in made:
                made[key] = Layout.of(*key[:3], self.dtype.itemsize, self.count_rows, key[3])
            found[i] = made[key]
        return found

    def _bands(self, spec: SiteSpec, parts: tuple[Part, ...], bands: Mapping[str, int]) -> int:
        """The number of bands that all of a site's slices share, if they can be packed; else 1, zeros and all."""
        (n, *others) = {bands.get(m, 1) for m, part in zip(spec.modules, parts, strict=True) if part.rank} or {1}
        unit = n * BAND_UNIT if self.tiled else n
        widths = [spec.d_in, *(d for d, part in zip(spec.d_outs, parts, strict=True) if part != Part())]
        if others or any(part.gate for part in parts) or any(width % unit for width in widths):
            return 1
        most = max(part.rank for part in parts) // n
        return 1 if self.tiled and n * -(-most // BLOCK) > BAND_BLOCKS else n
