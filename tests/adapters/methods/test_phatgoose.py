"""PHATGOOSE's tensors equal its formula, are served, and what cannot be applied is refused by name."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loramux_adapters import BaseModel, lower, unserved
from loramux_adapters.applied import AppliedSite
from loramux_adapters.token_gates import token_gates

from ..checkpoints import BASE, write_adapter
from ..layouts.phatgoose import RANK, delta, make_config, make_tensors
from .formula import ROUNDED, assert_logits, assert_sites
from .refusals import assert_refused, drop, poison, put

SITE = "model.layers.0.mlp.down_proj._addons"
A2, V2 = f"{SITE}.expert_lora.layer1__2", f"{SITE}.router.expert_embeddings__2"


@pytest.mark.parametrize(
    ("options", "dtype"),
    [
        ({}, torch.float32),
        ({}, torch.bfloat16),
        ({"topk_value": 3, "divide_by_d_bottleneck": False, "epsilon": 0.01}, torch.float32),
    ],
)
def test_logits_are_those_of_the_formula(tmp_path, reference, options, dtype):
    tiny = reference("llama")
    config = make_config(**options)
    tensors = make_tensors(config, tiny.base, dtype)
    adapter = lower(write_adapter(tmp_path, config, tensors), tiny.base)
    assert len(adapter.sites) == 4 and adapter.method == "phatgoose"
    # The router is stored in float32.
    assert_logits(tiny, adapter, delta, config, tensors)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 5), st.integers(1, 6), st.integers(2, 20), st.integers(1, 20), st.integers(0, 999), st.data())
def test_any_shape(tmp_path_factory, rank, number, d_in, d_out, seed, data):
    base = BaseModel("tiny", {"model.layers.0.self_attn.q_proj": (d_in, d_out)})
    config = make_config(d_bottleneck=rank, num_experts=number, topk_value=data.draw(st.integers(1, number)))
    tensors = make_tensors(config, base, seed=seed)
    adapter = lower(write_adapter(tmp_path_factory.mktemp("phatgoose"), config, tensors), base)
    assert_sites(adapter, delta, config, tensors, 10 * ROUNDED, seed)


def test_it_is_served_with_the_layer_norm_of_its_formula(tmp_path):
    adapter = lower(write_adapter(tmp_path, make_config(), make_tensors(make_config())), BASE)
    assert unserved(adapter) == []
    assert {rule.layer_norm_eps for rule in token_gates(adapter).values()} == {1e-5}


@pytest.mark.parametrize("mean", [0.0, 100.0])
def test_measured_without_a_server_it_is_the_formula(tmp_path, mean):
    """Where x is far from zero, too: the mean drops out."""
    config = make_config()
    tensors = make_tensors(config)
    adapter = lower(write_adapter(tmp_path, config, tensors), BASE)
    for module, site in adapter.sites.items():
        x = mean + torch.randn(9, site.a.shape[1], generator=torch.Generator().manual_seed(1))
        found = AppliedSite(site, adapter.gates[site.gate]).delta(x)
        torch.testing.assert_close(found.double(), delta(config, tensors, module, x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("config", "spoil", "code", "field"),
    [
        ({"d_bottleneck": None}, None, "adapter_config_invalid", "d_bottleneck"),
        ({"d_bottleneck": 5}, None, "adapter_shape_mismatch", None),
        ({"num_experts": None}, None, "adapter_config_invalid", "num_experts"),
        ({"num_experts": 6}, None, "adapter_missing_tensor", None),
        ({"num_experts": 4}, None, "adapter_unknown_tensor", None),
        ({"topk_value": 6}, None, "adapter_config_invalid", "topk_value"),
        ({"topk_value": None}, None, "adapter_config_invalid", "topk_value"),
        ({"epsilon": "small"}, None, "adapter_config_invalid", "epsilon"),
        ({"epsilon": -1e-6}, None, "adapter_config_invalid", "epsilon"),
        ({"divide_by_d_bottleneck": 1}, None, "adapter_config_invalid", "divide_by_d_bottleneck"),
        ({"lora_alpha": 16}, None, "adapter_unsupported_feature", "lora_alpha"),
        ({"score_type": "cosine"}, None, "adapter_unsupported_feature", "score_type"),
        ({"normalize_topk": False}, None, "adapter_unsupported_feature", "normalize_topk"),
        ({"use_input_gate": True}, None, "adapter_unsupported_feature", "use_input_gate"),
        ({"target_modules": None}, None, "adapter_config_invalid", "target_modules"),
        ({}, drop(V2), "adapter_missing_tensor", V2),
        ({}, drop(A2), "adapter_missing_tensor", A2),
        ({}, put(V2, 24), "adapter_shape_mismatch", V2),
        ({}, put(A2, RANK, 40), "adapter_shape_mismatch", A2),
        ({}, put("encoder.embed_tokens.weight", 61, 24), "adapter_unsupported_feature", "encoder.embed_tokens.weight"),
        ({}, put(f"{SITE}.expert_lora.expert_input_gate", 40), "adapter_unknown_tensor", None),
        ({}, poison(V2), "adapter_not_finite", None),
    ],
)
def test_wrong_variants_are_refused(tmp_path, config, spoil, code, field):
    assert_refused(tmp_path, make_config(**config), make_tensors(make_config()), spoil, code, field)
