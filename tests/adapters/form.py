"""The one form, evaluated in float64 from its equations, for tests that compare a lowered adapter with a reference."""

from copy import deepcopy
from typing import Any

import torch

from loramux_adapters import LoweredAdapter
from loramux_adapters.gate import Gate, GateKind, GateSource, GateValue, Norm, PostMap, PreMap, Select
from loramux_adapters.lowered import LoweredSite

from .hooks import Change, changed


def gate_values(gate: Gate, x: torch.Tensor) -> torch.Tensor:
    """g [tokens, E'] of a token gate on the input x [tokens, d_in] of a sequence; with a map g' and behind it g."""
    assert (gate.kind, gate.source) == (GateKind.TOKEN, GateSource.SITE_INPUT)
    assert gate.hidden == ()
    x = x.double()
    if gate.pre is PreMap.LAYER_NORM:
        x = (x - x.mean(1, keepdim=True)) / (x.var(1, keepdim=True, correction=0) + gate.pre_eps).sqrt()
    else:
        assert gate.pre is PreMap.NONE
    scores = x @ gate.weights.double().T
    if gate.bias is not None:
        scores = scores + gate.bias.double()
    scores = (scores.abs() if gate.post is PostMap.ABS else scores) / gate.temperature
    probability = torch.softmax(scores, dim=1)
    chosen = torch.ones_like(scores, dtype=torch.bool)
    if gate.select is Select.TOP_K:
        # A stable sort keeps equals in order, so the lowest expert comes first.
        best = scores.sort(dim=1, descending=True, stable=True).indices[:, : gate.k]
        chosen = torch.zeros_like(chosen).scatter(1, best, True)
    elif gate.select is Select.THRESHOLD:
        chosen = probability >= gate.threshold
    elif gate.select is Select.ADAPTIVE:
        tau = gate.tau_max * torch.sigmoid(x @ gate.adaptive_weight.double() + gate.adaptive_bias.double())
        probability = (probability - tau[:, None]).clamp(min=0)
        chosen = probability > 0
    else:
        assert gate.select is Select.ALL
    values = (scores if gate.norm is Norm.NONE else probability) * chosen
    if gate.norm is Norm.RENORM:
        total = values.sum(dim=1, keepdim=True) + gate.eps
        values = torch.where(total > 0, values / total, 0.0)
    if gate.value is GateValue.ONE:
        values = chosen.double()
    if gate.capacity is not None:
        for e in range(gate.scored):
            values[chosen[:, e].nonzero()[gate.capacity.tokens :, 0], e] = 0
    if gate.expert_map is None:
        return values
    groups = torch.zeros(len(x), gate.experts, dtype=torch.float64).index_add(1, gate.expert_map.long(), values)
    return torch.cat([groups, values], dim=1)


def site_delta(site: LoweredSite, gates: Any, x: torch.Tensor) -> torch.Tensor:
    """What the site adds to magnitude ⊙ (W0 x): [tokens, d_out] for x [tokens, d_in]."""
    assert site.carry is None and site.variance is None
    shrunk = x.double() @ site.a.double().T
    rows = torch.arange(site.rank) if site.arow is None else site.arow.long()
    weight = site.scale.double().expand(len(x), -1)
    if site.gate is not None:
        expert = torch.zeros(site.rank, dtype=torch.long) if site.expert is None else site.expert.long()
        weight = weight * gate_values(gates[site.gate], x)[:, expert]
    delta = (shrunk[:, rows] * weight) @ site.b.double()
    return delta if site.bias is None else delta + site.bias.double()


def logits(model: torch.nn.Module, adapter: LoweredAdapter, tokens: torch.Tensor) -> torch.Tensor:
    """Logits of the base model in float64 with the adapter's sites added to its layers."""
    model = deepcopy(model).double()

    def change(name: str, site: LoweredSite) -> Change:
        own = model.get_submodule(name).bias
        own = 0 if own is None else own

        def replace(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            if site.magnitude is not None:
                y = site.magnitude.double() * (y - own) + own
            return y + site_delta(site, adapter.gates, x)

        return replace

    with changed(model, {name: change(name, site) for name, site in adapter.sites.items()}), torch.no_grad():
        return model(tokens).logits
