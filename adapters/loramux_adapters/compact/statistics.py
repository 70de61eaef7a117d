"""What a mixture's routers do: how much of each expert tokens take, and which experts are alike.

    usage[e]       = mean over tokens of g_e, divided by the sum over experts
    outputs[e, e'] = mean over tokens of ⟨ΔW_e x, ΔW_e' x⟩, summed over the router's sites
    logits[e, e']  = mean over tokens of l_e · l_e'

The second needs no output: with u = A x it is the sum over rank rows j of e and j' of e' of (mean of u_j u_j') ·
(B Bᵀ)_jj' with scaled B. Where no token was seen, x has mean square 1 in every direction: then it is ⟨ΔW_e, ΔW_e'⟩_F.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from loramux_adapters.applied import AppliedSite, applied
from loramux_adapters.compact.options import Similarity
from loramux_adapters.errors import AdapterConfigInvalid
from loramux_adapters.lowered import LoweredAdapter, LoweredSite


@dataclass(frozen=True, eq=False)
class RouterStatistics:
    """One router's: usage [E], outputs [E, E], and logits [E, E] unless only usage was observed."""

    usage: torch.Tensor
    outputs: torch.Tensor
    logits: torch.Tensor | None = None

    def similarity(self, kind: Similarity) -> torch.Tensor:
        """Cosines [E, E]; an expert that adds nothing is like no other."""
        products = self.outputs if kind is Similarity.OUTPUTS else self.logits
        if products is None:
            raise AdapterConfigInvalid(
                "Usage alone does not tell which experts score alike.",
                hint="Choose similarity outputs, or give calibration texts.",
                field="similarity",
            )
        lengths = products.diagonal().clamp(min=0).sqrt()
        return products / (lengths[:, None] * lengths).clamp(min=torch.finfo(products.dtype).tiny)


def from_texts(model: Any, adapter: LoweredAdapter, texts: Iterable[torch.Tensor]) -> dict[str, RouterStatistics]:
    """By gate, from token ids [n] of each text, run through the base model with the adapter as it routes itself.

    Raises AdapterConfigInvalid when there is no text.
    """
    watched = {module: _Watched(adapter, site) for module, site in adapter.sites.items() if site.gate is not None}

    def observe(module: str, x: torch.Tensor) -> None:
        if module in watched:
            watched[module].add(x)

    tokens = 0
    with applied(model, adapter, observe), torch.inference_mode():
        for ids in texts:
            model(input_ids=ids[None], use_cache=False, logits_to_keep=1)
            tokens += len(ids)
    if not tokens:
        raise AdapterConfigInvalid(
            "There is no text to calibrate with.",
            hint="Give some that are like the adapter's use.",
            field="calibration",
        )
    found = {}
    for name in adapter.gates:
        parts = [watched[module] for module, site in adapter.sites.items() if site.gate == name]
        usage = torch.stack([part.weights for part in parts]).sum(0)
        outputs = torch.stack([part.outputs() for part in parts]).sum(0)
        logits = torch.stack([part.logits for part in parts]).sum(0)
        found[name] = RouterStatistics(_shares(usage), outputs / tokens, logits / tokens)
    return found


def from_traffic(adapter: LoweredAdapter, weights: Sequence[float]) -> dict[str, RouterStatistics]:
    """By gate, from the weight that each expert had in served answers, summed over all routers.

    The server's reports do not tell routers apart, so every router gets the same usage. Raises AdapterConfigInvalid
    unless all routers have as many experts as there are weights.
    """
    for name, gate in sorted(adapter.gates.items()):
        if gate.scored != len(weights):
            raise AdapterConfigInvalid(
                f"The reports are about {len(weights)} experts, and the router {name} has {gate.scored}.",
                hint="Give reports of this adapter; where routers differ in size, give calibration texts.",
                field="traffic",
            )
    found = {}
    for name in adapter.gates:
        sites = [site for site in adapter.sites.values() if site.gate == name]
        outputs = torch.stack([_products(site, adapter, _gram(site.expanded_a)) for site in sites]).sum(0)
        found[name] = RouterStatistics(_shares(torch.tensor(weights, dtype=torch.float64)), outputs)
    return found


def usage_of(statistics: Mapping[str, RouterStatistics]) -> dict[str, torch.Tensor]:
    return {name: found.usage for name, found in statistics.items()}


class _Watched:
    """Sums over the tokens that one site has seen."""

    def __init__(self, adapter: LoweredAdapter, site: LoweredSite) -> None:
        assert site.gate is not None
        gate = adapter.gates[site.gate]
        self._adapter, self._site, self._ready = adapter, site, AppliedSite(site, gate)
        self._moment = torch.zeros(site.rank, site.rank, dtype=torch.float64)
        self.weights = torch.zeros(gate.scored, dtype=torch.float64)
        self.logits = torch.zeros(gate.scored, gate.scored, dtype=torch.float64)

    def add(self, x: torch.Tensor) -> None:
        self._moment += _gram(self._ready.shrunk(x).T)
        self.weights += self._ready.expert_weights(x).double().sum(0)
        self.logits += _gram(self._ready.scores(x).T)

    def outputs(self) -> torch.Tensor:
        return _products(self._site, self._adapter, self._moment)


def _products(site: LoweredSite, adapter: LoweredAdapter, moment: torch.Tensor) -> torch.Tensor:
    """Σ_jj' over the rank rows of each two experts, [E, E], of moment_jj' · ⟨b_j, b_j'⟩."""
    assert site.gate is not None
    scored = adapter.gates[site.gate].scored
    expert = torch.zeros(site.rank, dtype=torch.long) if site.expert is None else site.expert.long()
    rows = torch.nn.functional.one_hot(expert, scored).double()
    return rows.T @ (moment * _gram(site.b.double() * site.scale.double()[:, None])) @ rows


def _gram(rows: torch.Tensor) -> torch.Tensor:
    rows = rows.double()
    return rows @ rows.T


def _shares(weights: torch.Tensor) -> torch.Tensor:
    total = weights.sum()
    return weights / total if total > 0 else torch.full_like(weights, 1 / len(weights))
