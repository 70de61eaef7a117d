"""Adapters that PEFT makes on the Hugging Face model: PEFT's own forward is the reference, and the file is PEFT's."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

# Methods of PEFT beside plain LoRA: options of its config class, and the deviation of what starts as zero.
OTHERS: dict[str, tuple[dict[str, Any], float]] = {
    "adalora": (
        {
            "peft": "AdaLoraConfig",
            "init_r": 10,
            "target_r": 6,
            "total_step": 100,
            "lora_alpha": 20,
            "target_modules": ["q_proj", "up_proj"],
        },
        0.3,  # of three factors
    ),
    "vera": ({"peft": "VeraConfig", "r": 48, "target_modules": ["q_proj", "v_proj"]}, 1.0),
    "dora": ({"r": 6, "lora_alpha": 12, "target_modules": "all-linear", "use_dora": True}, 0.02),
    "monteclora": (
        {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"], "monteclora_config": {"num_samples": 2}},
        0.02,
    ),
    "lora_bias": (
        {
            "r": 8,
            "lora_alpha": 16,
            "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj"],
            "lora_bias": True,
        },
        0.02,
    ),
}
TRAINED = ("lora_", "vera_lambda")
ZERO_AT_FIRST = ("lora_B", "lora_E", "vera_lambda_b")


def make(model: Any, folder: Path, options: Mapping[str, Any], *, std: float, seed: int) -> Any:
    """Save an adapter whose factors are all random, those that start as zero with deviation `std`.

    options  fields of LoraConfig, or of the config class that `peft` names; `dtype` is that of the file
    Returns PEFT's model, which holds what the file holds: `unload()` gives the base back.
    """
    import peft

    options = dict(options)
    dtype = options.pop("dtype", torch.float32)
    torch.manual_seed(seed)
    config = getattr(peft, options.pop("peft", "LoraConfig"))
    adapted = peft.get_peft_model(model, config(task_type="CAUSAL_LM", **options))
    for name, parameter in adapted.named_parameters():
        if any(part in name for part in ZERO_AT_FIRST):
            torch.nn.init.normal_(parameter, std=std)
        if "magnitude" in name:
            parameter.data *= 1 + 0.05 * torch.randn(parameter.shape)  # from the length of the base's rows
        if any(part in name for part in TRAINED):
            parameter.data = parameter.data.to(dtype).to(torch.float32)
    if dtype is torch.float32:
        adapted.save_pretrained(folder)
    else:
        weights = {k: v.to(dtype) for k, v in adapted.state_dict().items() if "lora_" in k}
        adapted.save_pretrained(folder, state_dict=weights)
    return adapted.eval()
