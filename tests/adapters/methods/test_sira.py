"""SiRA in our format equals its formula, with a capacity and without, and the rest is refused by name."""

from functools import partial

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loramux_adapters import BaseModel, check_servable, lower
from loramux_adapters.artefact import digest_of, is_limited, write_artefact
from loramux_adapters.gate import Capacity

from ..checkpoints import BASE, write_adapter
from ..form import logits
from ..hooks import hooked_logits
from ..layouts.sira import NUMBER, delta, make_config, make_tensors
from .formula import assert_sites
from .refusals import assert_refused, drop, poison, put

SITE = "base_model.model.model.layers.0.self_attn.k_proj"
ROUTER, B1 = f"{SITE}.lora_gating.weight", f"{SITE}.lora_B.1.weight"


@pytest.mark.parametrize("norm", ["renorm", "softmax"])
@pytest.mark.parametrize("capacity", [None, 1, 3])
def test_logits_are_those_of_the_formula(tmp_path, reference, norm, capacity):
    tiny = reference("llama")
    config = make_config(gate_norm=norm, capacity=capacity)
    tensors = make_tensors(config, tiny.base)
    adapter = lower(write_adapter(tmp_path, config, tensors), tiny.base)
    check_servable(adapter)
    assert adapter.limited == (capacity is not None)
    deltas = {module: partial(delta, config, tensors, module) for module in adapter.sites}
    tokens = tiny.tokens[:1]
    expected = hooked_logits(tiny.model, deltas, tokens)
    assert len(deltas) == 4 and adapter.method == "sira"
    assert (expected - tiny.base_logits()[:1]).abs().max() > 1e-3
    assert (logits(tiny.model, adapter, tokens) - expected).abs().max() < 1e-10
    unlimited = {m: partial(delta, config | {"capacity": None}, tensors, m) for m in adapter.sites}
    assert ((hooked_logits(tiny.model, unlimited, tokens) - expected).abs().max() > 1e-3) == adapter.limited


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 6), st.integers(1, 8), st.integers(1, 20), st.integers(1, 20), st.integers(0, 999), st.data())
def test_any_shape(tmp_path_factory, rank, number, d_in, d_out, seed, data):
    base = BaseModel("tiny", {"model.layers.0.self_attn.k_proj": (d_in, d_out)})
    limit = data.draw(st.none() | st.integers(1, 6))
    config = make_config(r=rank, num_experts=number, top_k=data.draw(st.integers(1, number)), capacity=limit)
    tensors = make_tensors(config, base, seed=seed)
    adapter = lower(write_adapter(tmp_path_factory.mktemp("sira"), config, tensors), base)
    assert_sites(adapter, delta, config, tensors, seed=seed)


def test_a_capacity_is_each_routers(tmp_path):
    config = make_config(capacity=7, expert_dropout=0.3)
    adapter = lower(write_adapter(tmp_path, config, make_tensors(config)), BASE)
    assert {gate.capacity for gate in adapter.gates.values()} == {Capacity(7)}
    assert is_limited(write_artefact(adapter, "base", digest_of(adapter), tmp_path))


@pytest.mark.parametrize(
    ("config", "spoil", "code", "field"),
    [
        ({"num_experts": None}, None, "adapter_config_invalid", "num_experts"),
        ({"num_experts": 5}, None, "adapter_missing_tensor", None),
        ({"num_experts": 3}, None, "adapter_unknown_tensor", None),
        ({"top_k": None}, None, "adapter_config_invalid", "top_k"),
        ({"top_k": 5}, None, "adapter_config_invalid", "top_k"),
        ({"gate_norm": "sigmoid"}, None, "adapter_config_invalid", "gate_norm"),
        ({"capacity": 0}, None, "adapter_config_invalid", "capacity"),
        ({"capacity": {"tokens": 3}}, None, "adapter_config_invalid", "capacity"),
        ({"r": 4}, None, "adapter_shape_mismatch", None),
        ({"alpha_pattern": {"k_proj": 3}}, None, "adapter_unsupported_feature", "alpha_pattern"),
        ({"router": "hash"}, None, "adapter_unsupported_feature", "router"),
        ({"target_modules": ["k_proj"]}, None, "adapter_unknown_tensor", None),
        ({}, drop(ROUTER), "adapter_missing_tensor", ROUTER),
        ({}, drop(B1), "adapter_missing_tensor", B1),
        ({}, put(ROUTER, NUMBER, 12), "adapter_shape_mismatch", ROUTER),
        ({}, put(f"{SITE}.lora_threshold.weight", 1, 24), "adapter_unknown_tensor", f"{SITE}.lora_threshold.weight"),
        ({}, poison(B1), "adapter_not_finite", None),
    ],
)
def test_wrong_variants_are_refused(tmp_path, config, spoil, code, field):
    assert_refused(tmp_path, make_config(**config), make_tensors(make_config()), spoil, code, field)
