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

Layouts = Mapping[int, Layout]
"""Site index -> layout there, of the sites that an adapter touches, ascending. Equal layouts are one object."""


@dataclass(frozen=True)
class Geometry:
    """The sites of a pool in order. `count_rows`: rows of counts of a gate with a capacity (`sequences.py`).

    Raises ValueError if a module appears in two sites.
    """

    sites: tuple[SiteSpec, ...]
    dtype: torch.dtype
    max_rank: int
    count_rows: int
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
    ) -> Layouts:
        """How an adapter with these ranks per module lies at each site; arguments as of `AdapterPool.reserve`.

        Raises UnknownModule, RankTooLarge, or ValueError for a gate, or a B that is borrowed, without rank.
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
            if part != Part():
                by_site.setdefault(i, [Part()] * len(self.sites[i].d_outs))[j] = part
        # Most layers are alike: one object for all of them makes the whole small to send and quick to make.
        made: dict[tuple[int, tuple[int, ...], tuple[Part, ...]], Layout] = {}
        found = {}
        for i in sorted(by_site):
            spec = self.sites[i]
            key = (spec.d_in, spec.d_outs, tuple(by_site[i]))
            if key not in made:
                made[key] = Layout.of(*key, self.dtype.itemsize, self.count_rows)
            found[i] = made[key]
        return found
