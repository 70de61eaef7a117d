"""An adapter in the one form -> what the pool takes: gates as launch parameters, routers and experts as arrays.

The form multiplies W0 x alone; the pool multiplies all that the base layer computed. Where that has a bias b0 in it,
the adapter's bias gives back what is lost: + (1 − magnitude) ⊙ b0.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from loramux_adapters import Gate, LoweredAdapter, LoweredSite
from loramux_adapters.gate import GateValue, Norm, PostMap
from loramux_kernels import TokenGate


@dataclass(frozen=True, eq=False)
class PoolArrays:
    """Arguments of `AdapterPool.write` for one module."""

    a: torch.Tensor
    b: torch.Tensor
    scale: torch.Tensor
    router: torch.Tensor | None = None
    expert: torch.Tensor | None = None
    mag: torch.Tensor | None = None
    bias: torch.Tensor | None = None


BaseBiases = Mapping[str, torch.Tensor]
"""Module -> the bias b0 [d_out] that its base layer adds to its output, float32 on the host."""


def reservation(adapter: LoweredAdapter, base: BaseBiases) -> dict[str, Any]:
    """Arguments of `AdapterPool.reserve` and `bytes_for`. The adapter passed `check_servable`."""
    sites = adapter.sites
    return {
        "ranks": adapter.ranks,
        "gates": {m: _token_gate(adapter.gates[site.gate]) for m, site in sites.items() if site.gate is not None},
        "mag": {m for m, site in sites.items() if site.magnitude is not None},
        "bias": {m for m, site in sites.items() if site.shifts(m in base)},
    }


def pool_arrays(
    site: LoweredSite, gates: Mapping[str, Gate], base_bias: torch.Tensor | None, dtype: torch.dtype, pin: bool
) -> PoolArrays:
    """Copies in the pool's dtypes: off the mapped file, whose page faults would stall a step."""

    def staged(tensor: torch.Tensor, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(tensor.shape, dtype=dtype, pin_memory=pin).copy_(tensor)

    router = expert = mag = bias = None
    if site.gate is not None:
        router = staged(gates[site.gate].weights)
        expert = site.expert if site.expert is not None else torch.zeros(site.rank, dtype=torch.int32)
    if site.magnitude is not None:
        mag = staged(site.magnitude, torch.float32)
    if site.shifts(base_bias is not None):
        bias = staged(_bias(site, base_bias), torch.float32)
    return PoolArrays(staged(site.expanded_a), staged(site.b), site.scale, router, expert, mag, bias)


def _bias(site: LoweredSite, base_bias: torch.Tensor | None) -> torch.Tensor:
    total = torch.zeros(site.b.shape[1], dtype=torch.float64) if site.bias is None else site.bias.double()
    if site.magnitude is None or base_bias is None:
        return total
    return total + (1 - site.magnitude.double()) * base_bias.double()


def _token_gate(gate: Gate) -> TokenGate:
    return TokenGate(
        experts=gate.experts,
        select=gate.select.value,  # type: ignore[arg-type]
        k=gate.k or 0,
        p=gate.p if gate.p is not None else 1.0,
        threshold=gate.threshold or 0.0,
        renormalise=gate.norm is Norm.RENORM,
        eps=gate.eps,
        temperature=gate.temperature,
        absolute=gate.post is PostMap.ABS,
        one=gate.value is GateValue.ONE,
    )
