"""Static memory of a pool's decode steps: what the shrink hands over to the expand (source/handoff.cuh)."""

from __future__ import annotations

from weakref import WeakKeyDictionary

import torch

from loramux_kernels.plan import SMALL_STEP, Plan

MAX_SLICES = 4
"""Of a site."""
MAX_RANK = 256
"""Rank rows of one slice."""
_ROWS, _LANES, _VECTOR = 16, 32, 16
"""Rank rows of a block; lanes of a warp; bytes of a lane's left operand for a block."""
_HANDOFF = 32 + 4 * _ROWS + 4 * (MAX_RANK // _ROWS)
"""Bytes of one handoff."""


class Scratch:
    """`handoff` and `left`: one entry per slice of each tile. `finished`: units of each tile, zero between launches."""

    def __init__(self, plan: Plan, device: torch.device) -> None:
        tiles = plan.tiles(SMALL_STEP).programs
        entries = tiles * MAX_SLICES
        self.handoff = torch.zeros(entries * _HANDOFF, dtype=torch.uint8, device=device)
        self.left = torch.zeros(entries * (MAX_RANK // _ROWS) * _LANES * _VECTOR, dtype=torch.uint8, device=device)
        self.finished = torch.zeros(tiles, dtype=torch.int32, device=device)

    @property
    def nbytes(self) -> int:
        return self.handoff.nbytes + self.left.nbytes + self.finished.nbytes


_of_plan: WeakKeyDictionary[Plan, Scratch] = WeakKeyDictionary()


def scratch(plan: Plan, device: torch.device) -> Scratch:
    """The plan's, made when first asked for: before any graph is captured."""
    found = _of_plan.get(plan)
    if found is None:
        found = _of_plan[plan] = Scratch(plan, device)
    return found
