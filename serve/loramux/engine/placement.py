"""An adapter in the one form -> what the pool takes: gates as launch parameters, routers and experts as arrays."""

from __future__ import annotations

from dataclasses import dataclass

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


def token_gates(adapter: LoweredAdapter) -> dict[str, TokenGate]:
    """Module -> its gate, for modules that have one. The adapter passed `check_servable`."""
    return {m: _token_gate(adapter.gates[site.gate]) for m, site in adapter.sites.items() if site.gate is not None}


def pool_arrays(site: LoweredSite, gates: dict[str, Gate], dtype: torch.dtype, pin: bool) -> PoolArrays:
    """Copies in the pool's dtype: off the mapped file, whose page faults would stall a step."""

    def staged(tensor: torch.Tensor) -> torch.Tensor:
        return torch.empty(tensor.shape, dtype=dtype, pin_memory=pin).copy_(tensor)

    a, b = staged(site.expanded_a), staged(site.b)
    if site.gate is None:
        return PoolArrays(a, b, site.scale)
    expert = site.expert if site.expert is not None else torch.zeros(site.rank, dtype=torch.int32)
    return PoolArrays(a, b, site.scale, staged(gates[site.gate].weights), expert)


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
