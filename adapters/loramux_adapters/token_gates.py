"""What an adapter is to the data plane: room to reserve, and a gate's rule per site.

Per site, because each site tells which of the gate's weights it uses.
"""

from collections.abc import Container
from typing import Any

import torch

from loramux_adapters.gate import Gate, GateValue, Norm, PostMap, PreMap
from loramux_adapters.lowered import LoweredAdapter, LoweredSite
from loramux_kernels import TokenGate


def reservation(adapter: LoweredAdapter, biased: Container[str]) -> dict[str, Any]:
    """Arguments of `AdapterPool.reserve` and `bytes_for`; `biased`: the base's layers with a bias in their output.

    The adapter passed `check_servable`.
    """
    sites = adapter.sites
    return {
        "ranks": adapter.ranks,
        "gates": token_gates(adapter),
        "mag": {m for m, site in sites.items() if site.magnitude is not None},
        "bias": {m for m, site in sites.items() if site.shifts(m in biased)},
        "bands": {m: site.bands for m, site in sites.items() if site.bands > 1},
    }


def token_gates(adapter: LoweredAdapter) -> dict[str, TokenGate]:
    """Module -> its gate, for modules that have one. The adapter passed `check_servable`."""
    return {
        module: token_gate(adapter.gates[site.gate], site)
        for module, site in adapter.sites.items()
        if site.gate is not None
    }


def token_gate(gate: Gate, site: LoweredSite) -> TokenGate:
    """The rule by which tokens weight the site's rank rows."""
    return TokenGate(
        experts=gate.scored,
        select=gate.select.value,
        k=gate.k or 0,
        p=gate.p if gate.p is not None else 1.0,
        threshold=gate.threshold or gate.tau_max or 0.0,
        bias=0.0 if gate.adaptive_bias is None else float(gate.adaptive_bias),
        renormalise=gate.norm is Norm.RENORM,
        eps=gate.eps,
        temperature=gate.temperature,
        absolute=gate.post is PostMap.ABS,
        one=gate.value is GateValue.ONE,
        groups=tuple(_members(gate)[index] for index in used_weights(gate, site))
        if gate.expert_map is not None
        else (),
        capacity=gate.capacity.tokens if gate.capacity is not None else 0,
        layer_norm_eps=gate.pre_eps if gate.pre is PreMap.LAYER_NORM else None,
    )


def router_rows(gate: Gate) -> torch.Tensor:
    """[E, d_src], or [E + 1, d_src] with the row that gives an adaptive threshold: a row for each of its logits.

    Those of LayerNorm(x) are less their mean, which counts for nothing there: what is left loses less in rounding.
    """
    rows = gate.weights
    if gate.adaptive_weight is not None:
        rows = torch.cat([rows, gate.adaptive_weight[None]])
    if gate.pre is PreMap.LAYER_NORM:
        rows = rows.double()
        rows = rows - rows.mean(1, keepdim=True)
    return rows


def row_owners(gate: Gate, site: LoweredSite) -> torch.Tensor:
    """[R] int32: which expert, or which of the token gate's groups, each rank row belongs to."""
    expert = site.expert if site.expert is not None else torch.zeros(site.rank, dtype=torch.int32)
    if gate.expert_map is None:
        return expert
    used = torch.tensor(used_weights(gate, site), dtype=torch.int32)
    return torch.searchsorted(used, expert).int()


def used_weights(gate: Gate, site: LoweredSite) -> list[int]:
    """Which weights some rank row of the site takes, ascending; of a gate without a map all that it gives."""
    if gate.expert_map is None:
        return list(range(gate.weights_given))
    return [0] if site.expert is None else torch.unique(site.expert).tolist()


def _members(gate: Gate) -> list[int]:
    """The experts of each weight, as a set of bits: those of the groups, then each expert alone."""
    assert gate.expert_map is not None
    groups = [0] * gate.experts
    for expert, group in enumerate(gate.expert_map.tolist()):
        groups[group] |= 1 << expert
    return groups + [1 << expert for expert in range(gate.scored)]
