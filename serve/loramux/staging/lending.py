"""Which B an adapter need not bring, because another that lies in the pool has the same."""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from torch import Tensor

from loramux_adapters import AdapterError, LoweredAdapter, open_artefact

logger = logging.getLogger(__name__)


def borrowable(adapter: LoweredAdapter, lender: str) -> frozenset[str]:
    """The modules whose B is that of the artefact `lender`, bit for bit; none if that cannot be read.

    Compared and not concluded from what the two are to each other: both files are read from the page cache, and what
    is served would be wrong without a sign if the conclusion were.
    """
    try:
        sites = open_artefact(Path(lender)).sites
    except (AdapterError, OSError):
        logger.warning("an adapter shares nothing: %s cannot be read", lender)
        return frozenset()
    return frozenset(
        module
        for module, site in adapter.sites.items()
        if site.rank and module in sites and same_bits(site.b, sites[module].b)
    )


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Equal numbers are not enough: 0.0 and −0.0 are."""
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    return torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))
