"""MoE-PEFT's layouts: MOLA and LORAMOE equal the formula, and what cannot be applied is refused by name."""

import pytest

from loramux_adapters import AdapterError, lower
from loramux_adapters.gate import Select

from ..checkpoints import BASE, write_adapter
from ..layouts.moe_peft import NUMBER, RANK, delta, make_config, make_tensors
from .formula import assert_one_adapter, assert_sites
from .refusals import assert_pickle_refused, assert_refused, drop, put

TARGETS = ("q_proj", "down_proj")
MODULES = [module for module in BASE.linears if module.endswith(TARGETS)]


@pytest.mark.parametrize("kind", ["MOLA", "LORAMOE"])
@pytest.mark.parametrize("rslora", [False, True])
def test_every_site_computes_the_formula(tmp_path, kind, rslora):
    config = make_config(kind, **{"use_rslora": True} if rslora else {})
    tensors = make_tensors(config)
    adapter = lower(write_adapter(tmp_path, config, tensors), BASE)
    assert set(adapter.sites) == set(MODULES)
    for module, site in adapter.sites.items():
        if kind == "LORAMOE" and ".self_attn." in module:
            assert site.gate is None
        else:
            assert adapter.gates[site.gate].select is (Select.TOP_K if kind == "MOLA" else Select.ALL)
    assert_sites(adapter, delta, config, tensors)


def test_a_training_config_means_the_same(tmp_path):
    """Targets as a map, and the fields that only training reads."""
    targets = {"q_proj": True, "k_proj": False, "down_proj": True}
    extra = {
        "name": "x",
        "task_name": "casual",
        "router_init_range": 5.0,
        "router_aux_loss_coef": 0.001,
        "router_loss": True,
    }
    config = make_config(target_modules=targets, lora_init="gaussian", **extra)
    assert_one_adapter(tmp_path, (make_config(), make_tensors()), (config, make_tensors()))


SITE = "mola.layers.1.self_attn.q_proj"
MLP = "loramoe.layers.0.mlp.down_proj"
ATTENTION = "loramoe.layers.0.self_attn.q_proj"
GATE, ATTENTION_A = f"{SITE}.moe_gate.weight", f"{ATTENTION}.lora_A.weight"
EXPERT_3, EXPERT_5 = f"{SITE}.experts.3.lora_B.weight", f"{SITE}.experts.5.lora_B.weight"
ATTENTION_GATE = f"{ATTENTION}.moe_gate.weight"
BIAS, MIXLORA = f"{SITE}.experts.0.lora_A.bias", "mixlora.layers.0.mlp.moe_gate.weight"


@pytest.mark.parametrize(
    ("kind", "config", "spoil", "code", "field"),
    [
        ("MOLA", {}, put(MIXLORA, 5, 24), "adapter_unsupported_feature", MIXLORA),
        ("MOLA", {}, drop(GATE), "adapter_missing_tensor", GATE),
        ("MOLA", {}, drop(EXPERT_3), "adapter_missing_tensor", EXPERT_3),
        ("MOLA", {}, put(EXPERT_5, 24, 4), "adapter_unknown_tensor", EXPERT_5),
        ("MOLA", {}, put(GATE, NUMBER, 23), "adapter_shape_mismatch", GATE),
        ("MOLA", {}, put(GATE, NUMBER - 1, 24), "adapter_shape_mismatch", GATE),
        ("MOLA", {}, put(f"{SITE}.lora_A.weight", RANK, 24), "adapter_unknown_tensor", f"{SITE}.lora_A.weight"),
        ("MOLA", {}, put(BIAS, RANK), "adapter_unsupported_feature", BIAS),
        ("MOLA", {}, put("classifier", 2, 24), "adapter_unsupported_feature", "classifier"),
        ("MOLA", {"r": 8}, None, "adapter_shape_mismatch", None),
        ("MOLA", {"r": [4, 4]}, None, "adapter_config_invalid", "r"),
        ("MOLA", {"num_experts": 6}, None, "adapter_missing_tensor", None),
        ("MOLA", {"num_experts": 10**15}, None, "adapter_missing_tensor", None),
        ("MOLA", {"num_experts": None}, None, "adapter_config_invalid", "num_experts"),
        ("MOLA", {"top_k": None}, None, "adapter_config_invalid", "top_k"),
        ("MOLA", {"top_k": 6}, None, "adapter_config_invalid", "top_k"),
        ("MOLA", {"routing_strategy": "mixlora"}, None, "adapter_unsupported_feature", "routing_strategy"),
        ("MOLA", {"use_dora": True}, None, "adapter_unsupported_feature", "use_dora"),
        ("MOLA", {"alpha_pattern": {"q_proj": 1}}, None, "adapter_unsupported_feature", "alpha_pattern"),
        ("MOLA", {"target_modules": ["q_proj"]}, None, "adapter_unknown_tensor", None),
        ("LORAMOE", {"top_k": 2}, None, "adapter_unsupported_feature", "top_k"),
        ("LORAMOE", {}, drop(f"{MLP}.moe_gate.weight"), "adapter_missing_tensor", f"{MLP}.moe_gate.weight"),
        ("LORAMOE", {}, drop(f"{ATTENTION}.lora_B.weight"), "adapter_missing_tensor", f"{ATTENTION}.lora_B.weight"),
        ("LORAMOE", {}, put(ATTENTION_A, 5, 24), "adapter_shape_mismatch", ATTENTION_A),
        ("LORAMOE", {}, put(f"{MLP}.lora_A.weight", 4, 40), "adapter_unknown_tensor", f"{MLP}.lora_A.weight"),
        ("LORAMOE", {}, put(ATTENTION_GATE, 5, 24), "adapter_unsupported_feature", ATTENTION_GATE),
        ("LORAMOE", {}, put(f"{ATTENTION}.experts.0.lora_A.weight", 4, 24), "adapter_missing_tensor", None),
    ],
)  # fmt: skip
def test_wrong_variants_are_refused(tmp_path, kind, config, spoil, code, field):
    assert_refused(tmp_path, make_config(kind, **config), make_tensors(make_config(kind)), spoil, code, field)


def test_an_empty_file_is_refused(tmp_path):
    with pytest.raises(AdapterError) as refusal:
        lower(write_adapter(tmp_path, make_config(), {}), BASE)
    assert refusal.value.code == "adapter_missing_tensor"


def test_the_pickle_it_saves_is_refused_with_the_command(tmp_path):
    assert_pickle_refused(tmp_path, make_config(), make_tensors())
