"""An adapter in the one form -> the arrays that the pool takes.

The form multiplies W0 x alone; the pool multiplies all that the base layer computed. Where that has a bias b0 in it,
the adapter's bias gives back what is lost: + (1 − magnitude) ⊙ b0.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from loramux_adapters import Gate, LoweredSite
from loramux_adapters.token_gates import router_rows, row_owners


@dataclass(frozen=True, eq=False)
class PoolArrays:
    """Arguments of `SlotWeights.fill` for one module."""

    a: torch.Tensor
    b: torch.Tensor | None
    scale: torch.Tensor
    router: torch.Tensor | None = None
    expert: torch.Tensor | None = None
    mag: torch.Tensor | None = None
    bias: torch.Tensor | None = None


BaseBiases = Mapping[str, torch.Tensor]
"""Module -> the bias b0 [d_out] that its base layer adds to its output, float32 on the host."""


def pool_arrays(site: LoweredSite, gates: Mapping[str, Gate], base_bias: torch.Tensor | None) -> PoolArrays:
    """In the dtypes of the file: who fills the pool's arrays with them converts."""
    router = expert = bias = None
    if site.gate is not None:
        gate = gates[site.gate]
        router, expert = router_rows(gate), row_owners(gate, site)
    if site.shifts(base_bias is not None):
        bias = _bias(site, base_bias)
    return PoolArrays(site.expanded_a, site.b, site.scale, router, expert, site.magnitude, bias)


def _bias(site: LoweredSite, base_bias: torch.Tensor | None) -> torch.Tensor:
    total = torch.zeros(site.b.shape[1], dtype=torch.float64) if site.bias is None else site.bias.double()
    if site.magnitude is None or base_bias is None:
        return total
    return total + (1 - site.magnitude.double()) * base_bias.double()
