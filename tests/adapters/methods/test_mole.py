"""MoLE and AdaMoLE equal the loops of their paper, and what cannot be applied is refused by name."""

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loramux_adapters import BaseModel, check_servable, lower
from loramux_adapters.applied import AppliedSite
from loramux_adapters.artefact import digest_of
from loramux_adapters.errors import AdapterUnsupportedFeature
from loramux_adapters.files import unsafe_pickle
from loramux_adapters.token_gates import router_rows, row_owners, token_gate
from loramux_kernels.cpu.gate import gate as kernel_gate

from ..checkpoints import BASE, write_adapter
from ..form import site_delta
from ..layouts.mole import GATES, NUMBER, RANK, delta, make_config, make_tensors
from .formula import EXACT, assert_logits, assert_one_adapter, assert_sites
from .refusals import assert_refused, drop, poison, put

SITE = "base_model.model.model.layers.1.self_attn.q_proj"


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_are_those_of_the_formula(tmp_path, reference, gate, dtype):
    tiny = reference("llama")
    config = make_config(**GATES[gate])
    tensors = make_tensors(config, tiny.base, dtype)
    adapter = lower(write_adapter(tmp_path, config, tensors), tiny.base)
    assert len(adapter.sites) == 4 and adapter.method == "mole"
    assert_logits(tiny, adapter, delta, config, tensors, EXACT)


@settings(max_examples=30, deadline=None)
@given(
    st.sampled_from(sorted(GATES)),
    st.integers(1, 6),
    st.integers(2, 6),
    st.integers(1, 20),
    st.integers(1, 20),
    st.integers(0, 999),
)
def test_any_shape(tmp_path_factory, gate, rank, number, d_in, d_out, seed):
    base = BaseModel("tiny", {"model.layers.0.self_attn.q_proj": (d_in, d_out)})
    config = make_config(lora_rank=rank, num_experts=number, **GATES[gate])
    tensors = make_tensors(config, base, seed=seed)
    adapter = lower(write_adapter(tmp_path_factory.mktemp("mole"), config, tensors), base)
    assert set(adapter.ranks.values()) == {rank * number}
    assert_sites(adapter, delta, config, tensors, seed=seed)


def test_all_spellings_mean_the_same(tmp_path):
    config = make_config(**GATES["adaptive"])
    tensors = make_tensors(config)
    raw = {
        name.replace("lora_A.", "lora_A.default.", 1).replace("lora_gating.", "lora_gating.default."): tensor
        for name, tensor in tensors.items()
        if "moe_layer" not in name
    }
    bare = {name.removeprefix("base_model.model."): tensor for name, tensor in tensors.items()}
    stated = make_config(**GATES["adaptive"] | {"max_threshold": 1 / NUMBER})
    assert_one_adapter(tmp_path, (config, tensors), (config, raw), (config, bare), (stated, tensors))


@pytest.mark.parametrize("gate", GATES)
def test_the_data_plane_computes_the_formula(tmp_path, gate):
    """In its own gate and with its own router, and in float64: `tests/kernels` holds its kernels to that."""
    config = make_config(**GATES[gate])
    tensors = make_tensors(config)
    adapter = lower(write_adapter(tmp_path, config, tensors), BASE)
    check_servable(adapter)
    for module, site in adapter.sites.items():
        rule = adapter.gates[site.gate]
        x = torch.randn(20, site.a.shape[1], generator=torch.Generator().manual_seed(1)).double()
        g = kernel_gate(token_gate(rule, site), x @ router_rows(rule).double().T)[:, row_owners(rule, site).long()]
        found = (x @ site.a.double().T * site.scale.double() * g) @ site.b.double()
        torch.testing.assert_close(found, delta(config, tensors, module, x), rtol=1e-9, atol=1e-10)


def test_a_threshold_of_its_own_is_one_expert_less(tmp_path):
    for number, served in ((15, True), (16, False)):
        config = make_config(**GATES["adaptive"], num_experts=number)
        adapter = lower(write_adapter(tmp_path / str(number), config, make_tensors(config)), BASE)
        if served:
            check_servable(adapter)
            continue
        with pytest.raises(AdapterUnsupportedFeature, match="16 experts are more than 15") as refusal:
            check_servable(adapter)
        assert (refusal.value.field or "").endswith(".weights")


def test_a_token_below_its_threshold_gets_nothing(tmp_path):
    """τ_max may be above 1/E: then a token may reach it with no expert."""
    config = make_config(**GATES["adaptive"] | {"max_threshold": 1.0})
    tensors = make_tensors(config)
    for name, tensor in tensors.items():
        if name.endswith("lora_threshold.bias"):
            tensor.fill_(50)
    adapter = lower(write_adapter(tmp_path, config, tensors), BASE)
    for module, site in adapter.sites.items():
        x = torch.randn(5, site.a.shape[1], generator=torch.Generator().manual_seed(1))
        assert not site_delta(site, adapter.gates, x).any() and not delta(config, tensors, module, x).any()
        assert not AppliedSite(site, adapter.gates[site.gate]).delta(x).any()


def test_the_command_of_the_hint_converts_the_pickle_that_it_saves(tmp_path, monkeypatch):
    """Its file holds every factor twice, in one memory, which safetensors does not write."""
    config = make_config(top_k=2)
    tensors = make_tensors(config)
    folder = write_adapter(tmp_path, config, tensors)
    again = r"moe_layer\.experts\.(\d+)\.(lora_[AB])"
    shared = {name: tensors[re.sub(again, r"\2.\1", name)] for name in tensors}
    torch.save(shared, folder / "adapter_model.bin")
    expected = digest_of(lower(folder, BASE))
    (folder / "adapter_model.safetensors").unlink()
    monkeypatch.chdir(folder)
    hint = unsafe_pickle("adapter_model.bin").hint
    exec(hint[hint.index('-c "') + 4 : -1])
    assert digest_of(lower(folder, BASE)) == expected


A2, COPY = f"{SITE}.lora_A.2.weight", f"{SITE}.moe_layer.experts.2.lora_A.weight"
ROUTER, TAU = f"{SITE}.lora_gating.weight", f"{SITE}.lora_threshold.weight"


@pytest.mark.parametrize(
    ("config", "spoil", "code", "field"),
    [
        ({}, None, "adapter_config_invalid", "top_k"),
        ({"top_k": 2, "threshold": 0.1}, None, "adapter_config_invalid", "top_k"),
        ({"top_k": 6}, None, "adapter_config_invalid", "top_k"),
        ({"threshold": 1.5}, None, "adapter_config_invalid", "threshold"),
        ({"threshold": True}, None, "adapter_config_invalid", "threshold"),
        ({"top_k": 2, "lora_rank": None}, None, "adapter_config_invalid", "lora_rank"),
        ({"top_k": 2, "lora_rank": 5}, None, "adapter_shape_mismatch", None),
        ({"top_k": 2, "r": 8}, None, "adapter_unsupported_feature", "r"),
        ({"top_k": 2, "num_experts": 6}, None, "adapter_missing_tensor", None),
        ({"top_k": 2, "num_experts": 10**12}, None, "adapter_missing_tensor", None),
        ({"top_k": 2, "num_experts": 4}, None, "adapter_unknown_tensor", None),
        ({"top_k": 2, "max_threshold": 0.1}, None, "adapter_unsupported_feature", "max_threshold"),
        ({"top_k": 2, "use_rslora": True}, None, "adapter_unsupported_feature", "use_rslora"),
        ({"top_k": 2, "bias": "all"}, None, "adapter_unsupported_feature", "bias"),
        ({"top_k": 2, "target_modules": ["q_proj"]}, None, "adapter_unknown_tensor", None),
        ({"top_k": 2}, drop(ROUTER), "adapter_missing_tensor", ROUTER),
        ({"top_k": 2}, drop(A2), "adapter_missing_tensor", A2),
        ({"top_k": 2}, put(ROUTER, NUMBER, 23), "adapter_shape_mismatch", ROUTER),
        ({"top_k": 2}, put(ROUTER, NUMBER - 1, 24), "adapter_shape_mismatch", ROUTER),
        ({"top_k": 2}, put(A2, 24, RANK), "adapter_shape_mismatch", A2),
        ({"top_k": 2}, put(A2, RANK, 24, dtype=torch.float64), "adapter_unsupported_feature", A2),
        ({"top_k": 2}, put(COPY, RANK, 24), "adapter_unknown_tensor", COPY),
        ({"top_k": 2}, put(COPY, RANK, 24, dtype=torch.float16), "adapter_unknown_tensor", COPY),
        ({"top_k": 2}, put(f"{SITE}.lora_A.02.weight", RANK, 24), "adapter_unknown_tensor", f"{SITE}.lora_A.02.weight"),
        ({"top_k": 2}, put(TAU, 1, 24), "adapter_unknown_tensor", TAU),
        ({"top_k": 2}, poison(ROUTER), "adapter_not_finite", None),
        (GATES["adaptive"], drop(TAU), "adapter_missing_tensor", TAU),
        (GATES["adaptive"], put(TAU, 24), "adapter_shape_mismatch", TAU),
        (GATES["adaptive"] | {"top_k": 2}, None, "adapter_unsupported_feature", "top_k"),
        (GATES["adaptive"] | {"max_threshold": 0}, None, "adapter_config_invalid", "max_threshold"),
        (GATES["adaptive"], poison(f"{SITE}.lora_threshold.bias"), "adapter_not_finite", None),
    ],
)  # fmt: skip
def test_wrong_variants_are_refused(tmp_path, config, spoil, code, field):
    tensors = make_tensors(make_config(peft_type=config.get("peft_type", "MOLE")))
    assert_refused(tmp_path, make_config(**config), tensors, spoil, code, field)
