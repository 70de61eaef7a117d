"""MultiLoRA: names of `MultiLoRALinear` in pUmpKin-Co/MTL-LoRA at 7848a70 (`src/adapter/multilora.py`), in a raw
state_dict; its training script puts `module.` in front when DeepSpeed wraps the model. The config is ours.
"""

import torch

from ..checkpoints import BASE
from .draw import draw, given, targeted

RANK, NUMBER, ALPHA = 4, 3, 16


def make_config(**changes):
    config = {
        "peft_type": "MULTILORA",
        "r": RANK,
        "lora_alpha": ALPHA,
        "lora_num": NUMBER,
        "lora_dropout": 0.05,
        "target_modules": ["q_proj", "down_proj"],
        "base_model_name_or_path": "somebody/tiny",
    }
    return given(**config | changes)


def make_tensors(config=None, base=BASE, dtype=torch.float32, seed=0):
    config = config or make_config()
    shapes, number, rank = {}, config["lora_num"], config["r"]
    for module in targeted(config, base):
        d_in, d_out = base.linears[module]
        shapes |= {f"{module}.lora_A": (number, rank, d_in), f"{module}.lora_B": (number, d_out, rank)}
        shapes[f"{module}.lora_scaling"] = (number, d_out)
    return draw(shapes, dtype, seed)


def delta(config, tensors, module, x):
    """Σ_i (x A_iᵀ B_iᵀ) ⊙ s_i, times alpha / r."""
    a, b, s = (tensors[f"{module}.{name}"].double() for name in ("lora_A", "lora_B", "lora_scaling"))
    total = torch.zeros(*x.shape[:-1], b.shape[1], dtype=torch.float64)
    for i in range(len(a)):
        total += (x.double() @ a[i].T @ b[i].T) * s[i]
    return total * (config["lora_alpha"] / a.shape[1])
