"""MELoRA: names and fields of `MELoraConfig` and `Linear` in ChasonShi/MELoRA at 4ebb8b4
(`peft-0.5.0/src/peft/tuners/melora.py`); the prefix `base_model.model.` is PEFT's.
"""

import torch

from ..checkpoints import BASE
from .draw import PREFIX, draw, given, targeted

RANKS, ALPHAS = [2, 4, 1, 3], [16, 8, -1, 0.5]


def make_config(**changes):
    config = {
        "peft_type": "MELORA",
        "auto_mapping": None,
        "base_model_name_or_path": "somebody/tiny",
        "revision": None,
        "task_type": "CAUSAL_LM",
        "inference_mode": True,
        "r": RANKS,
        "target_modules": ["q_proj", "up_proj"],
        "lora_alpha": ALPHAS,
        "lora_dropout": 0.05,
        "fan_in_fan_out": False,
        "bias": "none",
        "mode": "melora",
        "modules_to_save": None,
        "init_lora_weights": True,
        "layers_to_transform": None,
        "layers_pattern": None,
    }
    return given(**config | changes)


def make_tensors(config=None, base=BASE, dtype=torch.float32, seed=0):
    config = config or make_config()
    shapes, ranks = {}, config["r"]
    for module in targeted(config, base):
        d_in, d_out = base.linears[module]
        for i, rank in enumerate(ranks):
            shapes[f"{PREFIX}{module}.lora_A.{i}.weight"] = (rank, d_in // len(ranks))
            shapes[f"{PREFIX}{module}.lora_B.{i}.weight"] = (d_out // len(ranks), rank)
    return draw(shapes, dtype, seed)


def delta(config, tensors, module, x):
    """Each small LoRA reads the next d_in // n inputs; their outputs are put one after the other."""
    ranks, outputs = config["r"], []
    width = x.shape[-1] // len(ranks)
    for i, (rank, alpha) in enumerate(zip(ranks, config["lora_alpha"], strict=True)):
        a, b = (tensors[f"{PREFIX}{module}.lora_{name}.{i}.weight"].double() for name in "AB")
        part = x.double()[..., i * width : (i + 1) * width]
        outputs.append(part @ a.T @ b.T * (alpha / rank))
    return torch.cat(outputs, dim=-1)
