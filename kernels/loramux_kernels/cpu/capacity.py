"""Which selections of a gate with a capacity its experts still take, for all tokens of an adapter at once."""

from __future__ import annotations

import torch
from torch import Tensor


def accepted(selected: Tensor, capacity: int, counts: Tensor, places: Tensor) -> Tensor:
    """`a_TE`: whether fewer than `capacity` earlier tokens of the sequence selected the expert.

    `selected_TE` of tokens in the order of the step, whole requests of it, with their `places_T3` (`sequences.py`).
    Leaves what the next step goes on from in `counts_NE`.
    """
    earlier_in_step, read, write = places.unbind(1)
    chosen = selected.to(counts.dtype)
    before = chosen.cumsum(0, dtype=counts.dtype) - chosen
    begin = torch.arange(len(places)) - earlier_in_step
    carried = torch.where((read >= 0)[:, None], counts[read.clamp(min=0)], 0)
    earlier = before - before[begin] + carried
    last = write >= 0
    counts[write[last]] = earlier[last] + chosen[last]
    return earlier < capacity
