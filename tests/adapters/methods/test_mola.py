"""MoLA's own layout: what is lowered equals the formula, and what cannot be applied is refused by name."""

import pytest
import torch

from loramux_adapters import AdapterError, lower
from loramux_adapters.artefact import digest_of
from loramux_adapters.files import AdapterFolder
from loramux_adapters.methods import METHODS

from ..checkpoints import BASE, write_adapter
from ..form import site_delta
from ..layouts.mola import EXPERTS, RANKS, TOP_K, delta, make_config, make_tensors
from .formula import EXACT, assert_one_adapter, assert_sites
from .refusals import assert_pickle_refused, assert_refused, drop, put

MODULES = [module for module in BASE.linears if module.endswith(("q_proj", "down_proj"))]
ROUTER = "base_model.model.model.layers.1.self_attn.q_proj.router.router.weight"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_every_site_computes_the_formula(tmp_path, dtype):
    tensors = make_tensors(dtype=dtype)
    adapter = lower(write_adapter(tmp_path, make_config(), tensors), BASE)
    assert adapter.method == "mola" and set(adapter.sites) == set(MODULES)
    for module, site in adapter.sites.items():
        layer = int(module.split(".")[2])
        count = EXPERTS[layer]
        x = torch.randn(20, BASE.linears[module][0], generator=torch.Generator().manual_seed(1))
        expected = delta(make_config(), tensors, module, x)
        assert site.rank == count * RANKS[layer] and adapter.gates[site.gate].experts == count
        assert site.a.dtype == site.b.dtype == adapter.gates[site.gate].weights.dtype == dtype
        # A dense gate, or another k, is another function.
        other = site_delta(site, {site.gate: one_expert(adapter.gates[site.gate])}, x)
        assert (other - expected).abs().max() > 0.1 * expected.abs().max()
    assert_sites(adapter, delta, make_config(), tensors, EXACT)


def one_expert(gate):
    return type(gate)(gate.weights, select=gate.select, k=1, norm=gate.norm)


def test_all_spellings_mean_the_same(tmp_path):
    raw = make_tensors(expert="lora_{factor}.default_{e}")
    bare = {name.removeprefix("base_model.model."): tensor for name, tensor in raw.items()}
    listed = make_config(number_experts=EXPERTS, r=RANKS + [9] * 30, top_k=TOP_K + [2] * 30)
    saved = make_tensors()
    assert_one_adapter(tmp_path, (make_config(), saved), (make_config(), raw), (make_config(), bare), (listed, raw))


def test_hilo_is_mola_with_lists(tmp_path):
    """Experts, rank and k by layer: the same adapter as with `peft_type: LORA`, whether r is a list or a number."""
    config = make_config(peft_type="HILO", number_experts=EXPERTS)
    folder = write_adapter(tmp_path / "hilo", config, make_tensors())
    assert [method.name for method in METHODS if method.detect(AdapterFolder(folder))] == ["mola"]
    adapter = lower(folder, BASE)
    assert digest_of(adapter) == digest_of(lower(write_adapter(tmp_path / "mola", make_config(), make_tensors()), BASE))
    for module, site in adapter.sites.items():
        layer = int(module.split(".")[2])
        assert adapter.gates[site.gate].k == TOP_K[layer] and site.rank == EXPERTS[layer] * RANKS[layer]
    same = make_config(peft_type="HILO", r=4)
    first = {name: tensor for name, tensor in make_tensors().items() if "layers.0." in name}
    same["target_modules"] = r".*layers\.0\..*(q|down)_proj"
    assert lower(write_adapter(tmp_path / "number", same, first), BASE).method == "mola"


def test_one_number_for_all_layers(tmp_path):
    tensors = {name: tensor for name, tensor in make_tensors().items() if "layers.0." in name}
    config = make_config(r=4, top_k=1, number_experts=2, target_modules=r".*layers\.0\..*(q|down)_proj")
    adapter = lower(write_adapter(tmp_path, config, tensors), BASE)
    assert {gate.k for gate in adapter.gates.values()} == {1} and set(adapter.ranks.values()) == {8}


SITE = ROUTER.removesuffix(".router.router.weight")
A2 = f"{SITE}.lora_A_2.weight"
LAST_DOWN = "base_model.model.model.layers.1.mlp.down_proj.lora_B_4.weight"


@pytest.mark.parametrize(
    ("config", "spoil", "code", "field"),
    [
        ({}, drop(ROUTER), "adapter_missing_tensor", ROUTER),
        ({}, drop(f"{SITE}.lora_A_4.weight"), "adapter_missing_tensor", f"{SITE}.lora_A_4.weight"),
        ({}, drop(f"{SITE}.lora_B_0.weight"), "adapter_missing_tensor", f"{SITE}.lora_B_0.weight"),
        ({}, drop(A2, f"{SITE}.lora_B_2.weight"), "adapter_missing_tensor", A2),
        ({}, put(ROUTER, 5, 23), "adapter_shape_mismatch", ROUTER),
        ({}, put(ROUTER, 5), "adapter_shape_mismatch", ROUTER),
        ({}, put(ROUTER, 0, 24), "adapter_shape_mismatch", ROUTER),
        ({}, put(ROUTER, 4, 24), "adapter_unknown_tensor", f"{SITE}.lora_B_4.weight"),
        ({}, put(ROUTER, 6, 24), "adapter_missing_tensor", f"{SITE}.lora_A_5.weight"),
        ({"number_experts": [2, 4]}, None, "adapter_unknown_tensor", LAST_DOWN),
        ({"number_experts": 10**12}, None, "adapter_missing_tensor", None),
        ({"number_experts": 0}, None, "adapter_config_invalid", "number_experts"),
        ({"r": [4, 4]}, None, "adapter_shape_mismatch", None),
        ({"r": [4]}, None, "adapter_config_invalid", "r"),
        ({"r": [4, "3"]}, None, "adapter_config_invalid", "r"),
        ({"top_k": ...}, None, "adapter_config_invalid", "top_k"),
        ({"top_k": 3}, None, "adapter_config_invalid", "top_k"),
        ({"top_k": [2, 0]}, None, "adapter_config_invalid", "top_k"),
        ({"top_k": [2]}, None, "adapter_config_invalid", "top_k"),
        ({"top_k": [3, 2]}, None, "adapter_config_invalid", "top_k"),
        ({"peft_type": "HILO", "top_k": [2, 6]}, None, "adapter_config_invalid", "top_k"),
        ({"top_k": True}, None, "adapter_config_invalid", "top_k"),
        ({"use_rslora": True}, None, "adapter_unsupported_feature", "use_rslora"),
        ({"rank_pattern": {"q_proj": 3}}, None, "adapter_unsupported_feature", "rank_pattern"),
        ({"expert_dropout": 0.1}, None, "adapter_unsupported_feature", "expert_dropout"),
        ({"bias": "all"}, None, "adapter_unsupported_feature", "bias"),
        ({"target_modules": ["q_proj"]}, None, "adapter_unknown_tensor", None),
        ({"target_modules": ["q_proj", "k_proj", "down_proj"]}, None, "adapter_missing_tensor", None),
        ({}, put(f"{SITE}.lora_C_0.weight", 1), "adapter_unknown_tensor", f"{SITE}.lora_C_0.weight"),
        ({}, put(f"{SITE}.lora_A.default_0.weight", 3, 24), "adapter_unknown_tensor", f"{SITE}.lora_A_0.weight"),
        ({}, put(f"{SITE}.lora_A.other_0.weight", 3, 24), "adapter_unknown_tensor", f"{SITE}.lora_A.other_0.weight"),
        ({}, put(ROUTER, 5, 24, dtype=torch.float64), "adapter_unsupported_feature", ROUTER),
    ],
)  # fmt: skip
def test_wrong_variants_are_refused(tmp_path, config, spoil, code, field):
    assert_refused(tmp_path, make_config(**config), make_tensors(), spoil, code, field)


def test_another_base_is_recognised(tmp_path):
    tensors = {name.replace("layers", "blocks"): tensor for name, tensor in make_tensors().items()}
    with pytest.raises(AdapterError) as refusal:
        lower(write_adapter(tmp_path, make_config(), tensors), BASE)
    assert refusal.value.code == "adapter_wrong_base"


def test_the_pickle_it_saves_is_refused_with_the_command(tmp_path):
    assert_pickle_refused(tmp_path, make_config(), make_tensors())
