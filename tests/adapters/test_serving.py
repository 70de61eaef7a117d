"""What the data plane is said to run, and that everything else is named."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings

from loramux_adapters import (
    AdapterUnsupportedFeature,
    Carry,
    FfnMixture,
    LoweredAdapter,
    Variance,
    check_servable,
    unserved,
)
from loramux_adapters.gate import (
    Capacity,
    GateKind,
    GateSource,
    GateValue,
    Norm,
    Pooling,
    PostMap,
    PreMap,
    Select,
)
from loramux_adapters.lowered import CarryKind, LoweredSite
from loramux_adapters.tasks import at_task
from loramux_adapters.variance import VarianceKind
from loramux_adapters.verify import verify

from .checkpoints import BASE
from .natives import DOWN, UP, Q, adapters, make_gate, make_mixture, make_site

TABLE: Any = {"kind": GateKind.TASK, "source": GateSource.NONE, "task": 1}
ADAPTIVE: Any = {
    "select": Select.ADAPTIVE,
    "adaptive_weight": torch.ones(24),
    "adaptive_bias": torch.ones(1),
    "tau_max": 0.5,
}


@pytest.mark.parametrize(
    "gate",
    [
        make_gate(),
        make_gate(16),
        make_gate(select=Select.TOP_K, k=2, post=PostMap.ABS, temperature=0.5),
        make_gate(select=Select.TOP_P, p=0.5, norm=Norm.SOFTMAX),
        make_gate(select=Select.THRESHOLD, threshold=0.5, value=GateValue.ONE),
        make_gate(15, **ADAPTIVE),
        make_gate(eps=1e-6),
        make_gate(pre=PreMap.LAYER_NORM),
        make_gate(15, pre=PreMap.LAYER_NORM, **ADAPTIVE),
        make_gate(expert_map=torch.arange(2, dtype=torch.int32)),
        make_gate(3, expert_map=torch.tensor([0, 1, 0], dtype=torch.int32)),
        make_gate(3, 20, **TABLE),
        make_gate(3, 2, norm=Norm.SOFTMAX, temperature=0.5, **TABLE),
    ],
)
def test_served(gate: Any) -> None:
    adapter = make_mixture()
    adapter = replace(adapter, gates={**adapter.gates, "q": gate})
    assert unserved(adapter) == []
    check_servable(adapter)


@pytest.mark.parametrize(
    ("gate", "field"),
    [
        (make_gate(17), "weights"),
        (make_gate(kind=GateKind.PROMPT, source=GateSource.LAYER_INPUT, pool=Pooling.MEAN), "kind"),
        (make_gate(source=GateSource.FFN_INPUT), "source"),
        (make_gate(pre=PreMap.RATIONAL, rational=torch.ones(12)), "pre"),
        (make_gate(16, **ADAPTIVE), "weights"),
        (make_gate(norm=Norm.NONE), "norm"),
        (make_gate(bias=torch.ones(2)), "bias"),
        (make_gate(hidden=((torch.ones(24, 24), torch.ones(24)),)), "hidden"),
        (make_gate(**TABLE | {"task": None}), "task"),
        (make_gate(select=Select.TOP_K, k=1, **TABLE), "select"),
        (make_gate(post=PostMap.ABS, **TABLE), "post"),
        (make_gate(norm=Norm.NONE, **TABLE), "norm"),
        (make_gate(eps=1e-6, **TABLE), "eps"),
        (make_gate(value=GateValue.ONE, **TABLE), "value"),
        (make_gate(3, 2, expert_map=torch.arange(2, dtype=torch.int32), **TABLE), "expert_map"),
        (make_gate(capacity=Capacity(4), **TABLE), "capacity"),
    ],
)
def test_unserved_gates(gate: Any, field: str) -> None:
    adapter = make_mixture()
    adapter = replace(adapter, gates={**adapter.gates, "q": gate})
    assert unserved(adapter)[0].startswith(f"gates.q.{field}: ") and at_task(adapter) is adapter
    with pytest.raises(AdapterUnsupportedFeature) as refusal:
        check_servable(adapter)
    assert refusal.value.field == f"gates.q.{field}"


@pytest.mark.parametrize(
    "changes",
    [
        {"magnitude": torch.ones(1, 24)},
        {"carry": Carry(UP, CarryKind.AHEAD_ROWS)},
    ],
)
def test_unserved_sites(changes: dict[str, Any]) -> None:
    (name,) = changes
    adapter = LoweredAdapter("x", {Q: make_site(**changes), UP: make_site(UP)})
    assert [obstacle.partition(": ")[0] for obstacle in unserved(adapter)] == [f"sites.{Q}.{name}"]


def test_the_mean_of_a_bayesian_adapter_is_served() -> None:
    assert unserved(LoweredAdapter("x", {Q: make_site(variance=Variance(VarianceKind.DROPOUT, rate=0.1))})) == []


def test_outputs_are_served() -> None:
    magnitude, bias = torch.full((24,), 2.0), torch.ones(24)
    outputs = LoweredSite(torch.empty(0, 24), torch.empty(0, 24), torch.empty(0), magnitude=magnitude)
    adapter = LoweredAdapter(
        "x", {Q: make_site(magnitude=magnitude, bias=bias), "model.layers.1.self_attn.q_proj": outputs}
    )
    verify(adapter, BASE)
    assert unserved(adapter) == []


def test_groups_and_single_experts_are_counted_where_they_are_used() -> None:
    """Nine experts in one group and each with rows of its own: ten weights. Eight groups of sixteen: 24."""

    def mixture(experts: int, groups: int, rows: int) -> LoweredAdapter:
        gate = make_gate(experts, expert_map=torch.arange(experts, dtype=torch.int32) * groups // experts)
        site = make_site(Q, rows, gate="q", expert=torch.arange(rows, dtype=torch.int32))
        return LoweredAdapter("x", {Q: site}, gates={"q": gate})

    assert unserved(mixture(9, 1, 10)) == []
    assert unserved(mixture(16, 8, 16)) == []
    (obstacle,) = unserved(mixture(16, 8, 24))
    assert obstacle.startswith(f"sites.{Q}.expert: 24 ")


def test_unserved_blocks() -> None:
    adapter = replace(make_mixture(), ffn={"mlp": FfnMixture("q", UP, DOWN)})
    assert [obstacle.partition(": ")[0] for obstacle in unserved(adapter)] == ["ffn.mlp"]


@settings(max_examples=60, deadline=None)
@given(adapters())
def test_what_is_refused_is_what_is_listed(adapter: LoweredAdapter) -> None:
    listed = unserved(adapter)
    if not listed:
        check_servable(adapter)
        assert not adapter.ffn
        return
    with pytest.raises(AdapterUnsupportedFeature) as refusal:
        check_servable(adapter)
    assert listed[0].startswith(f"{refusal.value.field}: ")
