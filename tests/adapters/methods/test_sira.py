"""SiRA in our format equals its formula, a capacity is kept and not served, and the rest is refused by name."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loramux_adapters import BaseModel, check_servable, lower
from loramux_adapters.errors import AdapterUnsupportedFeature
from loramux_adapters.gate import Capacity

from ..checkpoints import BASE, write_adapter
from ..layouts.sira import NUMBER, delta, make_config, make_tensors
from .formula import EXACT, assert_logits, assert_sites
from .refusals import assert_refused, drop, poison, put

SITE = "base_model.model.model.layers.0.self_attn.k_proj"
ROUTER, B1 = f"{SITE}.lora_gating.weight", f"{SITE}.lora_B.1.weight"


@pytest.mark.parametrize("norm", ["renorm", "softmax"])
def test_logits_are_those_of_the_formula(tmp_path, reference, norm):
    tiny = reference("llama")
    config = make_config(gate_norm=norm)
    tensors = make_tensors(config, tiny.base)
    adapter = lower(write_adapter(tmp_path, config, tensors), tiny.base)
    check_servable(adapter)
    assert len(adapter.sites) == 4 and adapter.method == "sira"
    assert_logits(tiny, adapter, delta, config, tensors, EXACT)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 6), st.integers(1, 8), st.integers(1, 20), st.integers(1, 20), st.integers(0, 999), st.data())
def test_any_shape(tmp_path_factory, rank, number, d_in, d_out, seed, data):
    base = BaseModel("tiny", {"model.layers.0.self_attn.k_proj": (d_in, d_out)})
    config = make_config(r=rank, num_experts=number, top_k=data.draw(st.integers(1, number)))
    tensors = make_tensors(config, base, seed=seed)
    adapter = lower(write_adapter(tmp_path_factory.mktemp("sira"), config, tensors), base)
    assert_sites(adapter, delta, config, tensors, seed=seed)


def test_a_capacity_is_kept_but_not_served(tmp_path):
    config = make_config(capacity=7, expert_dropout=0.3)
    adapter = lower(write_adapter(tmp_path, config, make_tensors(config)), BASE)
    assert {gate.capacity for gate in adapter.gates.values()} == {Capacity(7)}
    with pytest.raises(AdapterUnsupportedFeature) as refusal:
        check_servable(adapter)
    assert (refusal.value.field or "").endswith(".capacity")


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
