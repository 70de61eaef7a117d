"""Every field of adapter_config.json is used, known to be harmless, or refused by its name."""

from dataclasses import fields

import peft
import pytest

from loramux_adapters import AdapterError
from loramux_adapters.peft import config as module
from loramux_adapters.peft.config import parse_config

from ..checkpoints import make_config

UNSUPPORTED = [
    ("bias", "all"),
    ("bias", "lora_only"),
    ("lora_bias", True),
    ("use_dora", True),
    ("use_qalora", True),
    ("use_bdlora", {"nblocks": 2}),
    ("arrow_config", {"top_k": 3}),
    ("kasa_config", {"a": 1}),
    ("monteclora_config", {"num_samples": 8}),
    ("velora_config", {"num_groups": 64}),
    ("megatron_config", {"hidden_size": 8}),
    ("modules_to_save", ["lm_head"]),
    ("trainable_token_indices", [0]),
    ("trainable_token_indices", {"embed_tokens": [0]}),
    ("target_parameters", ["mlp.experts.gate_up_proj"]),
    ("layer_replication", [[0, 1]]),
    ("alora_invocation_tokens", [1]),
    ("init_lora_weights", "pissa"),
    ("init_lora_weights", "pissa_niter_16"),
    ("init_lora_weights", "OLoRA"),
    ("init_lora_weights", "corda"),
    ("init_lora_weights", "lora_ga"),
    ("init_lora_weights", "loftq"),
    ("init_lora_weights", "somebody's"),
    ("init_lora_weights", 3),
    ("enable_lora", [True, False]),
    ("a_field_of_the_future", 0.5),
    ("a_field_of_the_future", 0),
]

INVALID = [
    *(("r", value) for value in (0, -1, True, 8.0, "8", None, [8])),
    *(("lora_alpha", value) for value in ("16", None, True, 1e31, -1e31, [1])),
    ("use_rslora", "true"),
    ("use_rslora", 1),
    *(("rank_pattern", value) for value in ({"q_proj": 0}, {"q_proj": True}, {"q_proj": 2.0}, [4], "q_proj")),
    *(("alpha_pattern", value) for value in ({"q_proj": None}, {"q_proj": "1"}, [4])),
    *(("target_modules", value) for value in (None, [], "", [3], [""], {"q_proj": 1}, 7)),
    *(("exclude_modules", value) for value in ([3], {"q_proj": 1}, 7)),
    *(("layers_to_transform", value) for value in ("1", [1.0], [True], -1, {"a": 1})),
    ("layers_pattern", "layers"),
    ("layers_pattern", 7),
    ("base_model_name_or_path", 7),
]

HARMLESS = [
    {
        "inference_mode": True,
        "lora_dropout": 0.3,
        "revision": "main",
        "task_type": "CAUSAL_LM",
        "peft_version": "0.7",
    },
    {"auto_mapping": {"base_model_class": "LlamaForCausalLM"}, "runtime_config": {"ephemeral_gpu_offload": False}},
    {"init_lora_weights": "eva", "eva_config": {"rho": 2.0}},
    {"init_lora_weights": True, "corda_config": {"corda_method": "ipm"}, "loftq_config": {"loftq_bits": 4}},
    {"use_dora": None, "lora_bias": False, "modules_to_save": [], "layer_replication": None, "bias": "none"},
    {"enable_lora": None, "merge_weights": False, "qalora_group_size": 16, "megatron_core": "megatron.core"},
    {"fan_in_fan_out": True, "ensure_weight_tying": False, "base_model_name_or_path": None, "lora_alpha": 0.5},
]


@pytest.mark.parametrize(("field", "value"), UNSUPPORTED)
def test_unsupported(field, value):
    with pytest.raises(AdapterError) as refusal:
        parse_config(make_config(**{field: value}))
    assert (refusal.value.code, refusal.value.field) == ("adapter_unsupported_feature", field)
    assert field in refusal.value.message and refusal.value.hint


@pytest.mark.parametrize(("field", "value"), INVALID)
def test_invalid(field, value):
    with pytest.raises(AdapterError) as refusal:
        parse_config(make_config(**{field: value}))
    assert (refusal.value.code, refusal.value.field) == ("adapter_config_invalid", field)


@pytest.mark.parametrize("field", ["r", "lora_alpha", "target_modules"])
def test_required(field):
    config = make_config()
    del config[field]
    with pytest.raises(AdapterError) as refusal:
        parse_config(config)
    assert (refusal.value.code, refusal.value.field) == ("adapter_config_invalid", field)


def test_layers_with_a_pattern_are_refused_as_in_peft():
    fields = {"target_modules": ".*q_proj", "layers_to_transform": [1]}
    with pytest.raises(ValueError, match="layers_to_transform"):
        peft.LoraConfig(**fields)
    with pytest.raises(AdapterError) as refusal:
        parse_config(make_config(**fields))
    assert (refusal.value.code, refusal.value.field) == ("adapter_config_invalid", "layers_to_transform")


@pytest.mark.parametrize("fields", HARMLESS)
def test_harmless(fields):
    parsed, plain = parse_config(make_config(**fields)), parse_config(make_config())
    assert (parsed.r, parsed.target_modules) == (plain.r, plain.target_modules)


def test_every_field_of_the_installed_peft_is_accounted_for():
    known = module._USED | module._HARMLESS | module._REFUSED.keys()
    assert {field.name for field in fields(peft.LoraConfig)} <= known
    assert not module._USED & module._HARMLESS and not module._REFUSED.keys() & (module._USED | module._HARMLESS)


def test_the_default_config_of_the_installed_peft_is_accepted():
    raw = peft.LoraConfig(target_modules=["q_proj"]).to_dict() | {"target_modules": ["q_proj"]}
    assert parse_config(raw).scale(8, 8) == 1
