"""MALoRA in our format equals its formula whichever side is folded, and the rest is refused by name."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loramux_adapters import AdapterError, BaseModel, check_servable, lower

from ..checkpoints import write_adapter
from ..layouts.malora import NUMBER, RANK, SHARED, delta, make_config, make_tensors
from .formula import ROUNDED, assert_logits, assert_sites
from .refusals import assert_refused, drop, poison, put

SITE = "base_model.model.model.layers.0.self_attn.q_proj"
S, P1, ROUTER = f"{SITE}.lora_S.weight", f"{SITE}.lora_P.1.weight", f"{SITE}.lora_gating.weight"


@pytest.mark.parametrize("shared", [2, RANK, SHARED])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_are_those_of_the_formula(tmp_path, reference, shared, dtype):
    tiny = reference("llama")
    config = make_config(shared_rank=shared)
    tensors = make_tensors(config, tiny.base, dtype)
    adapter = lower(write_adapter(tmp_path, config, tensors), tiny.base)
    check_servable(adapter)
    for site in adapter.sites.values():
        # The cheaper lowering: rank s over shared rows, or rank r for every expert.
        assert site.rank == NUMBER * min(shared, RANK)
        assert len(site.a) == (shared if shared <= RANK else NUMBER * RANK)
    assert len(adapter.sites) == 4 and adapter.method == "malora"
    # One factor is a product that is stored in float32.
    assert_logits(tiny, adapter, delta, config, tensors)


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 6), st.integers(1, 6), st.integers(1, 6), st.integers(1, 20), st.integers(1, 20),
    st.integers(0, 999), st.data(),
)  # fmt: skip
def test_any_shape(tmp_path_factory, rank, shared, number, d_in, d_out, seed, data):
    base = BaseModel("tiny", {"model.layers.0.self_attn.q_proj": (d_in, d_out)})
    k = data.draw(st.integers(1, number))
    config = make_config(r=rank, shared_rank=shared, num_experts=number, top_k=k)
    tensors = make_tensors(config, base, seed=seed)
    adapter = lower(write_adapter(tmp_path_factory.mktemp("malora"), config, tensors), base)
    assert_sites(adapter, delta, config, tensors, 10 * ROUNDED, seed)


def test_what_grows_too_much_when_it_is_multiplied_is_refused(tmp_path):
    base = BaseModel("wide", {"model.layers.0.self_attn.q_proj": (400, 4)})
    config = make_config(num_experts=50)
    folder = write_adapter(tmp_path, config, make_tensors(config, base))
    size = (folder / "adapter_model.safetensors").stat().st_size
    assert lower(folder, base, max_bytes=5 * size).rank == 200
    with pytest.raises(AdapterError) as refusal:
        lower(folder, base, max_bytes=2 * size)
    assert refusal.value.code == "adapter_too_large"


@pytest.mark.parametrize(
    ("config", "spoil", "code", "field"),
    [
        ({"shared_rank": None}, None, "adapter_config_invalid", "shared_rank"),
        ({"shared_rank": 5}, None, "adapter_shape_mismatch", None),
        ({"r": 5}, None, "adapter_shape_mismatch", None),
        ({"num_experts": 4}, None, "adapter_missing_tensor", None),
        ({"num_experts": 2}, None, "adapter_unknown_tensor", None),
        ({"top_k": 4}, None, "adapter_config_invalid", "top_k"),
        ({"gate_norm": None}, None, "adapter_config_invalid", "gate_norm"),
        ({"use_dora": True}, None, "adapter_unsupported_feature", "use_dora"),
        ({}, drop(S), "adapter_missing_tensor", S),
        ({}, drop(P1), "adapter_missing_tensor", P1),
        ({}, drop(ROUTER), "adapter_missing_tensor", ROUTER),
        ({}, put(S, SHARED, 25), "adapter_shape_mismatch", S),
        ({}, put(P1, SHARED, RANK), "adapter_shape_mismatch", P1),
        ({}, put(f"{SITE}.lora_A.0.weight", RANK, 24), "adapter_unknown_tensor", f"{SITE}.lora_A.0.weight"),
        ({}, poison(P1), "adapter_not_finite", None),
        ({}, poison(S), "adapter_not_finite", None),
    ],
)
def test_wrong_variants_are_refused(tmp_path, config, spoil, code, field):
    assert_refused(tmp_path, make_config(**config), make_tensors(make_config()), spoil, code, field)
