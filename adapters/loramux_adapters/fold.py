"""Folding what a checkpoint multiplies, or stores once, into the plain form: a, b and a scale per rank.

A factor per rank goes into `scale`. One per output goes into b, in float32: exact for factors of 16 bits, which have at
most 24 significant bits together, and rounded once for others.
"""

from collections.abc import Mapping

import torch

from loramux_adapters.base_model import BaseModel
from loramux_adapters.errors import AdapterTooLarge, shown
from loramux_adapters.peft import checks


def scales(module: str, values: torch.Tensor, alpha: float, factor: float) -> torch.Tensor:
    """factor · values [rank], rounded once to float32. Raises like `checks.rank_scale`, whose `alpha` this is."""
    checks.rank_scale(module, 1, alpha, factor)
    return (values.double() * factor).float()


def fold_outputs(b: torch.Tensor, outputs: torch.Tensor) -> torch.Tensor:
    """outputs ⊙ B in float32, [d_out, rank] like B, with a factor for each output."""
    return (b.double() * outputs.double()[:, None]).float()


def check_lowered_size(ranks: Mapping[str, int], base: BaseModel, limit: int) -> None:
    """Refuse what would be larger than `limit` bytes once lowered, before any of it is made.

    For checkpoints that are far smaller than what they mean. `ranks`: rank of each module.
    """
    nbytes = sum(4 * rank * sum(base.linears[module]) for module, rank in ranks.items())
    if nbytes > limit:
        largest = max(ranks, key=lambda module: ranks[module])
        raise AdapterTooLarge(
            f"In the form that is served the adapter has {nbytes} bytes (rank {ranks[largest]} at {shown(largest)}); "
            f"the limit is {limit}.",
            hint="Train it with a lower rank or fewer modules, or raise the limit.",
        )
