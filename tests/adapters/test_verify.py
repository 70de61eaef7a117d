"""Every rule of the form, broken one at a time; the round-trip test checks that sound adapters pass."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from loramux_adapters import AdapterError, Carry, FfnMixture, LoweredAdapter, Variance
from loramux_adapters.gate import (
    Capacity,
    GateKind,
    GateSource,
    Norm,
    Pooling,
    PreMap,
    Select,
)
from loramux_adapters.lowered import CarryKind, LoweredSite
from loramux_adapters.variance import VarianceForm, VarianceKind
from loramux_adapters.verify import verify

from .checkpoints import BASE
from .natives import DOWN, UP, Q, make_gate, make_mixture, make_site


def ints(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def refused(adapter: LoweredAdapter) -> tuple[str, str | None]:
    with pytest.raises(AdapterError) as refusal:
        verify(adapter, BASE)
    assert refusal.value.hint
    return refusal.value.code, refusal.value.field


INVALID, SHAPE = "adapter_config_invalid", "adapter_shape_mismatch"
LAYER = {"kind": GateKind.PROMPT, "source": GateSource.LAYER_INPUT}
ADAPTIVE: Any = {"adaptive_weight": torch.ones(24), "adaptive_bias": torch.ones(1)}
TASK = {"kind": GateKind.TASK, "source": GateSource.NONE}


@pytest.mark.parametrize(
    ("gate", "code", "field"),
    [
        (make_gate(2, 23), SHAPE, "gate:q.weights"),
        (make_gate(0), SHAPE, "gate:q.weights"),
        (replace(make_gate(), weights=torch.ones(24)), SHAPE, "gate:q.weights"),
        (make_gate(bias=torch.ones(3)), SHAPE, "gate:q.bias"),
        (make_gate(2, 5, hidden=((torch.ones(24), torch.ones(5)),)), SHAPE, "gate:q.hidden.0.weight"),
        (make_gate(2, 5, hidden=((torch.ones(5, 24), torch.ones(4)),)), SHAPE, "gate:q.hidden.0.bias"),
        (make_gate(2, 4, hidden=((torch.ones(5, 24), torch.ones(5)),)), SHAPE, "gate:q.weights"),
        (make_gate(select=Select.TOP_K), INVALID, "gates.q.k"),
        (make_gate(select=Select.TOP_K, k=0), INVALID, "gates.q.k"),
        (make_gate(select=Select.TOP_K, k=3), INVALID, "gates.q.k"),
        (make_gate(k=1), INVALID, "gates.q.k"),
        (make_gate(select=Select.TOP_P, p=0.0), INVALID, "gates.q.p"),
        (make_gate(select=Select.TOP_P, p=1.1), INVALID, "gates.q.p"),
        (make_gate(select=Select.TOP_P, p=float("nan")), INVALID, "gates.q.p"),
        (make_gate(select=Select.THRESHOLD), INVALID, "gates.q.threshold"),
        (make_gate(select=Select.THRESHOLD, threshold=float("inf")), INVALID, "gates.q.threshold"),
        (make_gate(select=Select.ADAPTIVE), INVALID, "gates.q.adaptive_weight"),
        # What float32 makes infinite, or zero.
        (make_gate(select=Select.ADAPTIVE, **ADAPTIVE, tau_max=1e39), INVALID, "gates.q.tau_max"),
        (make_gate(select=Select.THRESHOLD, threshold=-1e39), INVALID, "gates.q.threshold"),
        (make_gate(temperature=1e-60), INVALID, "gates.q.temperature"),
        (make_gate(temperature=0.0), INVALID, "gates.q.temperature"),
        (make_gate(temperature=float("nan")), INVALID, "gates.q.temperature"),
        (make_gate(eps=-1.0), INVALID, "gates.q.eps"),
        (make_gate(eps=1e-6, norm=Norm.SOFTMAX), INVALID, "gates.q.eps"),
        (make_gate(pre=PreMap.RATIONAL), INVALID, "gates.q.rational"),
        (make_gate(pre=PreMap.RATIONAL, rational=torch.ones(11)), SHAPE, "gate:q.rational"),
        (make_gate(pre=PreMap.LAYER_NORM, pre_eps=0.0), INVALID, "gates.q.pre_eps"),
        (make_gate(capacity=Capacity(-1)), INVALID, "gates.q.capacity.tokens"),
        (make_gate(source=GateSource.BASE_HIDDEN), INVALID, "gates.q.source"),
        (make_gate(**LAYER), INVALID, "gates.q.pool"),
        (make_gate(**LAYER, pool=Pooling.ATTENTION), INVALID, "gates.q.pool_weight"),
        (make_gate(**TASK, bias=torch.ones(24)), INVALID, "gates.q.bias"),
        (make_gate(expert_map=ints(0)), SHAPE, "gate:q.expert_map"),
        (make_gate(expert_map=ints(1, 0)), INVALID, "gates.q.expert_map"),
        (make_gate(expert_map=ints(0, 2)), INVALID, "gates.q.expert_map"),
        (make_gate(expert_map=ints(0, -1)), INVALID, "gates.q.expert_map"),
        (replace(make_gate(), weights=torch.full((2, 24), float("nan"))), "adapter_not_finite", "gate:q.weights"),
    ],
)  # fmt: skip
def test_gates(gate: Any, code: str, field: str) -> None:
    adapter = make_mixture()
    assert refused(replace(adapter, gates={**adapter.gates, "q": gate})) == (code, field)


def test_an_index_may_name_a_group_or_one_expert_of_a_map() -> None:
    def mixture(last: int) -> LoweredAdapter:
        gate = make_gate(3, expert_map=ints(0, 0, 1))
        return LoweredAdapter("x", {Q: make_site(gate="q", expert=ints(0, 1, 2, last))}, gates={"q": gate})

    verify(mixture(4), BASE)
    assert refused(mixture(5)) == (INVALID, f"{Q}.expert")


HIERARCHICAL = Variance(
    VarianceKind.HIERARCHICAL, {"std_a": torch.ones(1, 24), "std_b": torch.ones(1, 24), "offset": torch.ones(1)}
)


def test_bands() -> None:
    def plain(n: int) -> LoweredAdapter:
        site = make_site()
        mask = torch.block_diag(*[torch.ones(2, 12)] * 2)
        return LoweredAdapter("x", {Q: replace(site, a=site.a * mask, b=site.b * mask, bands=n)})

    for n in (1, 2):
        verify(plain(n), BASE)
    for n in (3, 0, -2):
        assert refused(plain(n)) == (INVALID, f"sites.{Q}.bands")
    assert refused(plain(4)) == (INVALID, f"{Q}.A")
    whole = LoweredAdapter("x", {Q: replace(plain(2).sites[Q], b=torch.ones(4, 24))})
    assert refused(whole) == (INVALID, f"{Q}.B")


def with_site(**changes: Any) -> LoweredAdapter:
    adapter = make_mixture()
    return replace(adapter, sites={**adapter.sites, Q: replace(adapter.sites[Q], **changes)})


@pytest.mark.parametrize(
    ("changes", "code", "field"),
    [
        ({"a": torch.ones(3, 24)}, SHAPE, f"{Q}.A"),
        ({"a": torch.ones(96)}, SHAPE, f"{Q}.A"),
        ({"bands": 2}, INVALID, f"sites.{Q}.bands"),  # beside a gate
        ({"b": torch.ones(3, 24)}, SHAPE, f"{Q}.A"),
        ({"b": torch.ones(0, 24)}, SHAPE, f"{Q}.B"),
        ({"b": torch.ones(4, 25)}, SHAPE, Q),
        ({"scale": torch.ones(3)}, SHAPE, f"{Q}.scale"),
        ({"expert": ints(0, 1)}, SHAPE, f"{Q}.expert"),
        ({"expert": ints(0, 1, 1, 2)}, INVALID, f"{Q}.expert"),
        ({"expert": ints(0, 1, -1, 1)}, INVALID, f"{Q}.expert"),
        ({"gate": None}, INVALID, f"{Q}.expert"),
        ({"gate": "nowhere"}, INVALID, f"sites.{Q}.gate"),
        ({"gate": "down"}, SHAPE, "gate:down.weights"),
        ({"arow": ints(0, 1, 2, 4)}, INVALID, f"{Q}.arow"),
        ({"arow": ints(0, 1, 2, 2)}, INVALID, f"{Q}.arow"),
        ({"magnitude": torch.ones(23)}, SHAPE, f"{Q}.magnitude"),
        ({"magnitude": torch.ones(3, 24)}, SHAPE, f"{Q}.magnitude"),
        ({"magnitude": torch.ones(0, 24)}, SHAPE, f"{Q}.magnitude"),
        ({"magnitude": torch.zeros(24)}, INVALID, f"{Q}.magnitude"),
        ({"magnitude": -torch.ones(2, 24)}, INVALID, f"{Q}.magnitude"),
        ({"magnitude": torch.full((24,), float("nan"))}, "adapter_not_finite", f"{Q}.magnitude"),
        ({"bias": torch.ones(1)}, SHAPE, f"{Q}.bias"),
        ({"bias": torch.full((24,), float("inf"))}, "adapter_not_finite", f"{Q}.bias"),
        ({"carry": Carry("nowhere", CarryKind.PREV_U)}, INVALID, f"sites.{Q}.carry.source"),
        ({"carry": Carry(Q, CarryKind.PREV_U)}, INVALID, f"sites.{Q}.carry.source"),
        ({"carry": Carry(UP, CarryKind.PREV_U)}, SHAPE, f"{UP}.A"),
        ({"carry": Carry(DOWN, CarryKind.AHEAD_ROWS)}, SHAPE, f"{DOWN}.A"),
        ({"carry": Carry(UP, CarryKind.AHEAD_ROWS, 2)}, INVALID, f"sites.{Q}.carry.depth"),
        ({"carry": Carry(UP, CarryKind.PREV_U, 0)}, INVALID, f"sites.{Q}.carry.depth"),
        ({"variance": Variance(VarianceKind.DIAGONAL_A)}, INVALID, f"sites.{Q}.variance.kind"),
        ({"variance": Variance(VarianceKind.DIAGONAL_A, {"sigma_a": torch.ones(24, 4)})}, SHAPE,
         f"{Q}.variance.sigma_a"),
        ({"variance": Variance(VarianceKind.DIAGONAL_A, {"sigma_a": -torch.eye(4, 24)})}, INVALID,
         f"{Q}.variance.sigma_a"),
        ({"variance": Variance(VarianceKind.DIAGONAL_A, {"sigma_a": torch.full((4, 24), float("nan"))})},
         "adapter_not_finite", f"{Q}.variance.sigma_a"),
        ({"variance": Variance(VarianceKind.RANK_DIAGONAL, {"sigma_scale": torch.tensor([1, 0, 1, -1e-30])})}, INVALID,
         f"{Q}.variance.sigma_scale"),
        ({"variance": Variance(VarianceKind.ENSEMBLE, {"member_a": torch.ones(2, 4, 24),
          "member_b": torch.ones(3, 4, 24), "member_scale": torch.ones(2, 4)})}, SHAPE, f"{Q}.variance.member_b"),
        ({"variance": HIERARCHICAL}, INVALID, f"sites.{Q}.variance.kind"),
        ({"gate": None, "expert": None, "carry": Carry(UP, CarryKind.AHEAD_ROWS), "variance": HIERARCHICAL}, INVALID,
         f"sites.{Q}.variance.kind"),
        ({"variance": Variance(VarianceKind.DROPOUT)}, INVALID, f"sites.{Q}.variance.rate"),
        ({"variance": Variance(VarianceKind.DROPOUT, rate=1.0)}, INVALID, f"sites.{Q}.variance.rate"),
        ({"variance": Variance(VarianceKind.DROPOUT, rate=0.5, form=VarianceForm.EXP)}, INVALID,
         f"sites.{Q}.variance.form"),
    ],
)  # fmt: skip
def test_sites(changes: dict[str, Any], code: str, field: str) -> None:
    assert refused(with_site(**changes)) == (code, field)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({}, "A"),
        ({"bias": torch.ones(24), "gate": "q"}, "A"),
        ({"bias": torch.ones(24), "arow": ints()}, "A"),
        ({"bias": torch.ones(24), "scale": torch.ones(1)}, "scale"),
        ({"bias": torch.ones(24), "a": torch.empty(0, 24, 1)}, "A"),
        ({"bias": torch.ones(24), "a": torch.ones(1, 24)}, "B"),
    ],
)
def test_a_site_without_rank(changes: dict[str, Any], field: str) -> None:
    """It has a magnitude or a bias, and nothing of what ranks have."""
    site = LoweredSite(torch.empty(0, 24), torch.empty(0, 24), torch.empty(0))
    verify(LoweredAdapter("x", {Q: replace(site, bias=torch.ones(24)), UP: make_site(UP)}), BASE)
    gates = {"q": make_gate()} if "gate" in changes else {}
    adapter = LoweredAdapter("x", {Q: replace(site, **changes), UP: make_site(UP)}, gates=gates)
    assert refused(adapter) == (SHAPE, f"{Q}.{field}")


def test_carries_in_a_circle() -> None:
    """Each names the other as the earlier one: refused for any depth that walks the circle."""
    up = {"rank": 4, "carry": Carry(Q, CarryKind.PREV_U)}
    sites = {Q: make_site(carry=Carry(UP, CarryKind.PREV_U, 2)), UP: make_site(UP, **up)}
    assert refused(LoweredAdapter("reslora", sites)) == (INVALID, f"sites.{Q}.carry.source")


def test_a_gate_without_sites() -> None:
    adapter = make_mixture()
    gates = {**adapter.gates, "idle": make_gate()}
    assert refused(replace(adapter, gates=gates)) == ("adapter_unknown_tensor", "gates.idle")


def test_feed_forward_mixtures() -> None:
    gate = make_gate(source=GateSource.FFN_INPUT)
    sites = {UP: make_site(UP, gate="f"), DOWN: make_site(DOWN, gate="f")}
    sound = LoweredAdapter("mixlora", sites, gates={"f": gate}, ffn={"mlp": FfnMixture("f", UP, DOWN)})
    verify(sound, BASE)
    other = replace(sound, gates={"f": make_gate()}, sites={UP: sites[UP]}, ffn={"mlp": FfnMixture("f", UP, UP)})
    assert refused(other) == (INVALID, "ffn.mlp.gate")
    assert refused(replace(sound, ffn={"mlp": FfnMixture("f", UP, Q)})) == (INVALID, "ffn.mlp")
    narrow = replace(sound, gates={"f": make_gate(2, 23, source=GateSource.FFN_INPUT)})
    assert refused(narrow) == (SHAPE, "gate:f.weights")


@pytest.mark.parametrize(
    "without",
    [{"scale": torch.zeros(4)}, {"a": torch.zeros(4, 24)}, {"b": torch.zeros(4, 24)},
     {"a": torch.eye(24)[:2] * torch.tensor([[0.0], [1.0]]), "arow": ints(0, 0, 1, 1),
      "b": torch.eye(24)[:4] * torch.tensor([[1.0], [1.0], [0.0], [0.0]])}],
)  # fmt: skip
def test_no_effect(without: dict[str, Any]) -> None:
    """Also through `arow`: the rows that are read meet only zeros."""
    site = replace(make_site(), **without)
    assert refused(LoweredAdapter("lora", {Q: site})) == ("adapter_no_effect", None)
    verify(LoweredAdapter("lora", {Q: replace(site, bias=torch.ones(24))}), BASE)


def test_an_adapter_without_sites() -> None:
    assert refused(LoweredAdapter("lora", {})) == ("adapter_no_effect", None)


def test_modules_that_the_base_lacks() -> None:
    site = make_site()
    assert refused(LoweredAdapter("lora", {"transformer.h.0": site}))[0] == "adapter_wrong_base"
    assert refused(LoweredAdapter("lora", {Q: site, "model.layers.9": site}))[0] == "adapter_unknown_tensor"
    assert refused(LoweredAdapter("lora", {Q: site, "lm_head": site}))[0] == "adapter_unsupported_feature"
    assert refused(LoweredAdapter("lora", {DOWN: site}))[0] == "adapter_wrong_base"
