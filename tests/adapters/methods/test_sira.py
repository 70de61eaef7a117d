"""SiRA in our format equals its formula, a capacity is kept and not served, and the rest is refused by name.

No layout of the authors is public: names and fields are those that `loramux_adapters.methods.sira` defines.
"""

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loramux_adapters import BaseModel, check_servable, lower
from loramux_adapters.errors import AdapterUnsupportedFeature
from loramux_adapters.files import AdapterFolder
from loramux_adapters.gate import Capacity
from loramux_adapters.methods import METHODS

from ..checkpoints import BASE, write_adapter
from ..form import logits, site_delta
from ..hooks import hooked_logits
from .refusals import assert_refused, drop, poison, put

TARGETS = ("k_proj", "up_proj")
RANK, NUMBER, TOP_K, ALPHA = 3, 4, 2, 12
SITE = "base_model.model.model.layers.0.self_attn.k_proj"
ROUTER, B1 = f"{SITE}.lora_gating.weight", f"{SITE}.lora_B.1.weight"


def make_config(**changes):
    config = {
        "peft_type": "SIRA",
        "base_model_name_or_path": "somebody/tiny",
        "r": RANK,
        "lora_alpha": ALPHA,
        "target_modules": list(TARGETS),
        "num_experts": NUMBER,
        "top_k": TOP_K,
    }
    return config | changes


def make_tensors(config, base=BASE, seed=0):
    generator = torch.Generator().manual_seed(seed)
    rank, number, tensors = config["r"], config["num_experts"], {}
    for module, (d_in, d_out) in base.linears.items():
        if module.endswith(TARGETS):
            shapes = {"lora_gating": (number, d_in)}
            for e in range(number):
                shapes |= {f"lora_A.{e}": (rank, d_in), f"lora_B.{e}": (d_out, rank)}
            for name, shape in shapes.items():
                value = torch.randn(shape, generator=generator) / shape[-1] ** 0.5
                tensors[f"base_model.model.{module}.{name}.weight"] = value
    return tensors


def delta(config, tensors, module, x):
    place, s = f"base_model.model.{module}", config["lora_alpha"] / config["r"]
    p = torch.softmax(x.double() @ tensors[f"{place}.lora_gating.weight"].double().T, 1)
    kept = p >= p.topk(config["top_k"]).values[:, -1:]
    g = p * kept
    if config.get("gate_norm", "renorm") == "renorm":
        g = g / g.sum(1, keepdim=True)
    total = 0
    for e in range(config["num_experts"]):
        a, b = (tensors[f"{place}.lora_{factor}.{e}.weight"].double() for factor in "AB")
        total = total + g[:, e : e + 1] * s * (x.double() @ a.T @ b.T)
    return total


@pytest.mark.parametrize("norm", ["renorm", "softmax"])
def test_logits_are_those_of_the_formula(tmp_path, reference, norm):
    tiny = reference("llama")
    config = make_config(gate_norm=norm)
    tensors = make_tensors(config, tiny.base)
    adapter = lower(write_adapter(tmp_path, config, tensors), tiny.base)
    check_servable(adapter)
    deltas = {module: partial(delta, config, tensors, module) for module in adapter.sites}
    expected = hooked_logits(tiny.model, deltas, tiny.tokens)
    assert len(deltas) == 4 and adapter.method == "sira"
    assert (expected - tiny.base_logits()).abs().max() > 1e-3
    assert (logits(tiny.model, adapter, tiny.tokens) - expected).abs().max() < 1e-10


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 6), st.integers(1, 8), st.integers(1, 20), st.integers(1, 20), st.integers(0, 999), st.data())
def test_any_shape(tmp_path_factory, rank, number, d_in, d_out, seed, data):
    base = BaseModel("tiny", {"model.layers.0.self_attn.k_proj": (d_in, d_out)})
    config = make_config(r=rank, num_experts=number, top_k=data.draw(st.integers(1, number)))
    tensors = make_tensors(config, base, seed)
    adapter = lower(write_adapter(tmp_path_factory.mktemp("sira"), config, tensors), base)
    ((module, site),) = adapter.sites.items()
    x = torch.randn(5, d_in, generator=torch.Generator().manual_seed(seed + 1))
    expected = delta(config, tensors, module, x)
    torch.testing.assert_close(site_delta(site, adapter.gates, x), expected, rtol=1e-6, atol=1e-9)


def test_exactly_one_method_claims_the_folder(tmp_path):
    folder = AdapterFolder(write_adapter(tmp_path, make_config(), make_tensors(make_config())))
    assert [method.name for method in METHODS if method.detect(folder)] == ["sira"]


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
