"""A whole adapter: what is exact stays exact, what is lost is what is said, and what cannot be is refused by field."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from loramux_adapters import AdapterError, LoweredAdapter, unserved
from loramux_adapters.applied import applied
from loramux_adapters.compact import Options, RouterStatistics, compact
from loramux_adapters.compact.measure import output_errors
from loramux_adapters.compact.options import Grouping, Similarity
from loramux_adapters.compact.report import module_errors
from loramux_adapters.compact.statistics import from_texts
from loramux_adapters.footprint import pool_bytes
from loramux_adapters.gate import Capacity
from loramux_adapters.native import digest_of

from ..checkpoints import BASE
from ..form import logits, site_delta
from ..natives import UP, make_gate, make_site
from .mixtures import DOWN, Draw, Q, mixture

TEXTS = [torch.arange(12)[torch.randperm(12, generator=torch.Generator().manual_seed(i))][: 5 + i] for i in range(4)]
TOKENS = torch.randint(0, 12, (2, 9), generator=torch.Generator().manual_seed(3))


def twins(copies: int = 2) -> LoweredAdapter:
    """Four different experts, each so many times, with routers that tell the copies apart."""
    adapter = mixture((2, 1, 3, 2), k=3)
    sites = {}
    for module, site in adapter.sites.items():
        assert site.expert is not None
        fields = {name: torch.cat([getattr(site, name)] * copies) for name in ("a", "b", "scale")}
        sites[module] = replace(site, expert=torch.cat([site.expert + 4 * i for i in range(copies)]), **fields)
    gates = {
        name: replace(gate, weights=Draw(i)(4 * copies, gate.weights.shape[1]))
        for i, (name, gate) in enumerate(adapter.gates.items())
    }
    return replace(adapter, sites=sites, gates=gates)


def test_equal_experts_are_merged_without_any_loss(model: Any) -> None:
    adapter = twins()
    statistics = from_texts(model, adapter, TEXTS)
    result = compact(adapter, BASE, Options(experts=4, even=True), statistics)
    for gate in result.after.gates.values():
        assert gate.expert_map is not None and gate.expert_map.tolist() == [0, 1, 2, 3, 0, 1, 2, 3]
        assert (gate.scored, gate.experts) == (8, 4)
    assert {m: s.rank for m, s in result.after.sites.items()} == dict.fromkeys(adapter.sites, 8)
    assert all(error.weights == error.worst_expert == 0 for error in module_errors(result).values())
    before, after = (logits(model, each, TOKENS) for each in (adapter, result.after))
    assert (before - after).abs().max() < 1e-12 * before.abs().max()
    assert unserved(result.after) == [] and result.after.method == "mola/compact"


def test_options_that_reduce_nothing_change_nothing(model: Any) -> None:
    adapter = mixture((2, 3, 1))
    statistics = from_texts(model, adapter, TEXTS)
    result = compact(adapter, BASE, Options(experts=3), statistics)
    assert all(result.after.sites[module] is site for module, site in adapter.sites.items())
    assert digest_of(replace(result.after, method=adapter.method)) == digest_of(adapter)


@pytest.mark.parametrize(
    "options",
    [
        Options(experts=2),
        Options(experts=2, residual=1),
        Options(experts=2, grouping=Grouping.MC_SMOE, similarity=Similarity.LOGITS),
        Options(rank=1),
        Options(error=0.4),
        Options(experts=2, error=0.4),
    ],
    ids=str,
)
def test_errors_are_those_of_the_new_adapter(model: Any, options: Options) -> None:
    adapter = mixture((2, 3, 1, 2), k=2)
    statistics = from_texts(model, adapter, TEXTS)
    result = compact(adapter, BASE, options, statistics)
    outputs = output_errors(model, adapter, result.after, TEXTS)
    x = {}

    def keep(module: str, inputs: torch.Tensor) -> None:
        x.setdefault(module, []).append(inputs.double())

    with applied(model, adapter, keep), torch.no_grad():
        for ids in TEXTS:
            model(ids[None])
    for module, error in module_errors(result, outputs).items():
        inputs = torch.cat(x[module])
        old = site_delta(adapter.sites[module], adapter.gates, inputs)
        new = site_delta(result.after.sites[module], result.after.gates, inputs)
        assert error.outputs is not None
        assert abs(error.outputs - float((new - old).norm() / old.norm())) < 1e-4
        assert error.weights <= error.worst_expert * (1 + 1e-9)
        if options.error is not None:
            assert error.worst_expert <= options.error * (1 + 1e-9)


def test_what_is_merged_takes_less_memory(model: Any) -> None:
    adapter = mixture((2, 3, 1, 2), dtype=torch.bfloat16)
    result = compact(adapter, BASE, Options(experts=2, even=True), from_texts(model, adapter, TEXTS))
    for dtype in (torch.bfloat16, torch.float32):
        assert pool_bytes(result.after, BASE, dtype) < pool_bytes(adapter, BASE, dtype)


def test_a_site_that_adds_nothing_goes_with_its_router() -> None:
    adapter = mixture((2, 1))
    empty = replace(adapter.sites[DOWN], b=torch.zeros_like(adapter.sites[DOWN].b))
    result = compact(replace(adapter, sites={**adapter.sites, DOWN: empty}), BASE, Options(error=0.5))
    assert list(result.after.sites) == [Q] and list(result.after.gates) == ["g0"]


def plain(**fields: Any) -> LoweredAdapter:
    return LoweredAdapter("lora", {UP: make_site(UP, **fields)})


def mapped() -> LoweredAdapter:
    adapter = mixture((2, 1))
    zeros = torch.zeros(2, dtype=torch.int32)
    return replace(adapter, gates={name: replace(gate, expert_map=zeros) for name, gate in adapter.gates.items()})


def limited() -> LoweredAdapter:
    adapter = mixture((2, 1))
    return replace(adapter, gates={n: replace(g, capacity=Capacity(3)) for n, g in adapter.gates.items()})


def statistics_of(adapter: LoweredAdapter) -> dict[str, RouterStatistics]:
    return {
        name: RouterStatistics(torch.full((gate.scored,), 1 / gate.scored).double(), torch.eye(gate.scored).double())
        for name, gate in adapter.gates.items()
    }


@pytest.mark.parametrize(
    ("adapter", "options", "known", "field"),
    [
        (plain(), Options(experts=1), True, "experts"),
        (mixture((2, 1)), Options(experts=3), True, "experts"),
        (mixture((2, 1)), Options(experts=1), False, "calibration"),
        (mapped(), Options(experts=1), True, "gates.g0.expert_map"),
        (limited(), Options(rank=1), True, "gates.g0.capacity"),
        (plain(magnitude=torch.ones(1, 40)), Options(rank=1), True, f"sites.{UP}.magnitude"),
        (LoweredAdapter("mola", {Q: make_site(Q, gate="q")}, gates={"q": make_gate(17)}), Options(rank=1), True,
         "gates.q.weights"),
        # Eight groups and sixteen residuals are more weights than the data plane has.
        (mixture((2,) * 16), Options(experts=8, even=True, residual=1), True, f"sites.{Q}.expert"),
    ],
)  # fmt: skip
def test_refusals(adapter: LoweredAdapter, options: Options, known: bool, field: str) -> None:
    with pytest.raises(AdapterError) as refusal:
        compact(adapter, BASE, options, statistics_of(adapter) if known else None)
    assert refusal.value.field == field and refusal.value.hint


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({}, "experts"),
        ({"experts": 0}, "experts"),
        ({"rank": 0}, "rank"),
        ({"error": 0.0}, "error"),
        ({"error": 1.0}, "error"),
        ({"error": float("nan")}, "error"),
        ({"rank": 2, "error": 0.1}, "error"),
        ({"experts": 2, "residual": -1}, "residual"),
        ({"experts": 2, "residual": 1, "error": 0.1}, "residual"),
        ({"rank": 2, "residual": 1}, "residual"),
        ({"rank": 2, "even": True}, "even"),
        ({"experts": 2, "similarity": Similarity.LOGITS}, "similarity"),
    ],
)
def test_options_that_make_no_sense(fields: dict[str, Any], field: str) -> None:
    with pytest.raises(AdapterError) as refusal:
        Options(**fields)
    assert (refusal.value.code, refusal.value.field) == ("adapter_config_invalid", field)
