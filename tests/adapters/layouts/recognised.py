"""Configs of kinds that are recognised and refused.

X-LoRA: `XLoraConfig` of peft 0.21; EricLBuehler/xlora writes `xlora_config.json` instead. MixLoRA: `export` in
`moe_peft/adapters/mixlora/config.py` of TUDB-Labs/MoE-PEFT at 0ffabd2. mttl: `mttl_config.json` and `mttl_weights.bin`
of `mttl/models/base_model.py` in microsoft/mttl. MiLoRA has no public layout.
"""

from ..checkpoints import make_config

MIXLORA = "MixLoRA, MixDoRA (TUDB-Labs/MixLoRA and MoE-PEFT)"
MIXLORA_FIELDS = {"kind": "MIXLORA", "act_fn": "silu", "expert_lora": {"r": 8, "lora_alpha": 16, "use_dora": True}}


def xlora_config():
    fields = {"hidden_size": 24, "adapters": {"first": "./first"}, "xlora_depth": 1, "top_k_lora": None}
    return make_config(peft_type="XLORA", layerwise_scalings=False, softmax_temperature=1.0, **fields)
