"""MultiLoRA: the lowered form gives the logits of a sum over LoRAs, written with plain hooks."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loramux_adapters import AdapterError, BaseModel, lower

from ..checkpoints import BASE, write_adapter
from ..layouts.multilora import NUMBER, RANK, delta, make_config, make_tensors
from .formula import assert_logits, assert_one_adapter, assert_sites
from .refusals import assert_refused, drop, put

TARGETS = ("q_proj", "down_proj")
MODULES = [module for module in BASE.linears if module.endswith(TARGETS)]
SITE = MODULES[0]


@pytest.mark.parametrize("number", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_are_those_of_the_formula(number, dtype, reference, tmp_path):
    tiny = reference("llama")
    config = make_config(lora_num=number)
    tensors = make_tensors(config, tiny.base, dtype)
    adapter = lower(write_adapter(tmp_path, config, tensors), tiny.base)
    assert_logits(tiny, adapter, delta, config, tensors)
    assert set(adapter.ranks.values()) == {number * RANK}


@settings(max_examples=20, deadline=None)
@given(
    rank=st.integers(1, 12),
    number=st.integers(1, 8),
    d_in=st.integers(1, 40),
    d_out=st.integers(1, 40),
    alpha=st.floats(-64, 64).filter(lambda alpha: abs(alpha) > 1e-3),
    half=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_any_shape_gives_the_sum(tmp_path_factory, rank, number, d_in, d_out, alpha, half, seed):
    base = BaseModel("one", {"layers.0.q_proj": (d_in, d_out)})
    config = make_config(r=rank, lora_num=number, lora_alpha=alpha)
    tensors = make_tensors(config, base, torch.bfloat16 if half else torch.float32, seed)
    adapter = lower(write_adapter(tmp_path_factory.mktemp("adapter"), config, tensors), base)
    assert_sites(adapter, delta, config, tensors, seed=seed)
    site = adapter.sites["layers.0.q_proj"]
    # The product of two numbers of 16 bits is a float32: only the scale was rounded.
    exact = torch.einsum("noi,no->nio", *(tensors[f"layers.0.q_proj.{n}"].double() for n in ("lora_B", "lora_scaling")))
    assert not half or torch.equal(site.b.double(), exact.flatten(0, 1))


def test_the_prefix_of_several_devices_means_nothing(tmp_path):
    tensors = make_tensors()
    wrapped = {f"module.{name}": tensor for name, tensor in tensors.items()}
    assert_one_adapter(tmp_path, (make_config(), tensors), (make_config(), wrapped))


def test_as_it_starts_it_has_no_effect(tmp_path):
    """Training begins with lora_scaling at zero."""
    tensors = {name: t * ("scaling" not in name) for name, t in make_tensors().items()}
    with pytest.raises(AdapterError) as refusal:
        lower(write_adapter(tmp_path, make_config(), tensors), BASE)
    assert refusal.value.code == "adapter_no_effect"


A, B, S = f"{SITE}.lora_A", f"{SITE}.lora_B", f"{SITE}.lora_scaling"
NAN = float("nan")


@pytest.mark.parametrize(
    ("config", "spoil", "code", "field"),
    [
        ({}, drop(A), "adapter_missing_tensor", A),
        ({}, drop(B), "adapter_missing_tensor", B),
        ({}, drop(S), "adapter_missing_tensor", S),
        ({}, put(A, NUMBER, RANK, 23), "adapter_shape_mismatch", A),
        ({}, put(A, NUMBER * RANK, 24), "adapter_shape_mismatch", A),
        ({}, put(B, NUMBER + 1, 24, RANK), "adapter_shape_mismatch", B),
        ({}, put(S, NUMBER), "adapter_shape_mismatch", S),
        ({}, put(S, NUMBER, 25), "adapter_shape_mismatch", S),
        ({}, put(S, NUMBER, 24, value=NAN), "adapter_not_finite", f"{SITE}.B"),
        ({}, put(S, NUMBER, 24, value=3e38), "adapter_not_finite", f"{SITE}.B"),
        ({}, put(S, NUMBER, 24, dtype=torch.float64), "adapter_unsupported_feature", S),
        ({}, put(f"{SITE}.lora_scaler", 1), "adapter_unknown_tensor", f"{SITE}.lora_scaler"),
        ({}, put(f"{SITE}.lora_A.weight", RANK, 24), "adapter_unknown_tensor", f"{SITE}.lora_A.weight"),
        ({}, put(f"module.{A}", NUMBER, RANK, 24), "adapter_unknown_tensor", None),
        ({"lora_num": 2}, None, "adapter_shape_mismatch", None),
        ({"lora_num": ...}, None, "adapter_config_invalid", "lora_num"),
        ({"lora_num": 3.0}, None, "adapter_config_invalid", "lora_num"),
        ({"r": 8}, None, "adapter_shape_mismatch", None),
        ({"r": ...}, None, "adapter_config_invalid", "r"),
        ({"lora_alpha": ...}, None, "adapter_config_invalid", "lora_alpha"),
        ({"tunable_scaler": True}, None, "adapter_unsupported_feature", "tunable_scaler"),
        ({"use_rslora": True}, None, "adapter_unsupported_feature", "use_rslora"),
        ({"bias": "all"}, None, "adapter_unsupported_feature", "bias"),
        ({"target_modules": ["q_proj"]}, None, "adapter_unknown_tensor", None),
        ({"target_modules": ["q_proj", "down_proj", "k_proj"]}, None, "adapter_missing_tensor", None),
    ],
)  # fmt: skip
def test_wrong_variants_are_refused(tmp_path, config, spoil, code, field):
    assert_refused(tmp_path, make_config(**config), make_tensors(), spoil, code, field)


def test_another_base_is_recognised(tmp_path):
    base = BaseModel("other", {module: (2 * d_in, 2 * d_out) for module, (d_in, d_out) in BASE.linears.items()})
    with pytest.raises(AdapterError) as refusal:
        lower(write_adapter(tmp_path, make_config(), make_tensors(base=base)), BASE)
    assert refusal.value.code == "adapter_wrong_base"
