"""What routers did, against plain torch hooks in float64; and from reports of served traffic."""

from functools import partial
from typing import Any

import pytest
import torch

from loramux_adapters import AdapterError, LoweredAdapter
from loramux_adapters.compact.options import Similarity
from loramux_adapters.compact.statistics import RouterStatistics, from_texts, from_traffic

from ..form import gate_values
from ..hooks import hooked
from .mixtures import Q, dense, mixture

TEXTS = [torch.arange(12)[torch.randperm(12, generator=torch.Generator().manual_seed(i))][: 5 + i] for i in range(4)]


def cosines(products: torch.Tensor) -> torch.Tensor:
    return products / products.diagonal().sqrt()[:, None] / products.diagonal().sqrt()


def seen(model: Any, adapter: LoweredAdapter) -> dict[str, torch.Tensor]:
    """Inputs of the sites with the adapter in place: layer 0's is the base model's own."""
    inputs: dict[str, list[torch.Tensor]] = {module: [] for module in adapter.sites}

    def delta(name: str, x: torch.Tensor) -> torch.Tensor:
        site, x = adapter.sites[name], x.double()
        inputs[name].append(x)
        assert site.gate is not None
        g = gate_values(adapter.gates[site.gate], x)
        return torch.stack([g[:, e : e + 1] * (x @ dense(site, [e], site).T) for e in range(g.shape[1])]).sum(0)

    with hooked(model, {name: partial(delta, name) for name in adapter.sites}), torch.no_grad():
        for ids in TEXTS:
            model(ids[None])
    return {name: torch.cat(parts) for name, parts in inputs.items()}


def test_from_texts(model: Any) -> None:
    adapter = mixture((2, 3, 1, 2))
    found = from_texts(model, adapter, TEXTS)
    assert found.keys() == adapter.gates.keys()
    for module, x in seen(model, adapter).items():
        site = adapter.sites[module]
        gate, statistics = adapter.gates[site.gate], found[site.gate]
        assert len(x) == sum(map(len, TEXTS))
        usage = gate_values(gate, x).mean(0)
        torch.testing.assert_close(statistics.usage, usage / usage.sum(), rtol=1e-4, atol=1e-6)
        scores = x @ gate.weights.double().T
        logits = statistics.similarity(Similarity.LOGITS)
        torch.testing.assert_close(logits, cosines(scores.T @ scores), rtol=1e-4, atol=1e-5)
        outputs = torch.stack([(x @ dense(site, [e], site).T).flatten() for e in range(4)])
        found_outputs = statistics.similarity(Similarity.OUTPUTS)
        torch.testing.assert_close(found_outputs, cosines(outputs @ outputs.T), rtol=1e-4, atol=1e-5)


def test_sites_of_one_router_count_together(model: Any) -> None:
    adapter = mixture((2, 1))
    q = adapter.sites[Q]
    same_width = {"model.layers.0.self_attn.q_proj": q, "model.layers.1.self_attn.q_proj": q}
    shared = LoweredAdapter("mola", same_width, gates={"g0": adapter.gates["g0"]})
    (both,) = from_texts(model, shared, TEXTS).values()
    parts = [LoweredAdapter("mola", {m: s}, gates=shared.gates) for m, s in same_width.items()]
    first = from_texts(model, parts[0], TEXTS)["g0"]
    assert abs(float(both.usage.sum()) - 1) < 1e-12
    assert (both.outputs.diagonal() > first.outputs.diagonal()).all()


def test_from_traffic_every_router_gets_the_same_usage() -> None:
    adapter = mixture((2, 3, 1))
    found = from_traffic(adapter, [6.0, 1.0, 3.0])
    for module, site in adapter.sites.items():
        statistics = found[site.gate or ""]
        torch.testing.assert_close(statistics.usage, torch.tensor([0.6, 0.1, 0.3], dtype=torch.float64))
        matrices = torch.stack([dense(adapter.sites[module], [e], site).flatten() for e in range(3)])
        torch.testing.assert_close(statistics.similarity(Similarity.OUTPUTS), cosines(matrices @ matrices.T))
        with pytest.raises(AdapterError) as refusal:
            statistics.similarity(Similarity.LOGITS)
        assert refusal.value.field == "similarity"


def test_an_expert_that_adds_nothing_is_like_no_other() -> None:
    outputs = torch.zeros(3, 3, dtype=torch.float64)
    outputs[0, 0] = outputs[1, 1] = outputs[0, 1] = outputs[1, 0] = 2.0
    similarity = RouterStatistics(torch.ones(3), outputs).similarity(Similarity.OUTPUTS)
    torch.testing.assert_close(similarity, torch.tensor([[1.0, 1, 0], [1, 1, 0], [0, 0, 0]], dtype=torch.float64))


def test_reports_of_another_adapter_and_no_texts_are_refused(model: Any) -> None:
    adapter = mixture((2, 3, 1))
    for call, field in (
        (lambda: from_traffic(adapter, [1.0, 1.0]), "traffic"),
        (lambda: from_texts(model, adapter, []), "calibration"),
    ):
        with pytest.raises(AdapterError) as refusal:
            call()
        assert (refusal.value.code, refusal.value.field) == ("adapter_config_invalid", field)
