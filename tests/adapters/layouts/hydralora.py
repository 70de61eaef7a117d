"""HydraLoRA: names of the `Linear` layer in Clin0212/HydraLoRA at 5c08a78, `HydraLoRA/peft/tuners/lora.py`; the prefix
`base_model.model.` is PEFT's.
"""

import torch

from ..checkpoints import BASE
from ..mixture_reference import mixture_delta
from .draw import PREFIX, draw, given, targeted

RANK, NUMBER, ALPHA = 4, 3, 32


def make_config(**changes):
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": "somebody/tiny",
        "task_type": "CAUSAL_LM",
        "inference_mode": True,
        "r": RANK,
        "target_modules": ["up_proj", "down_proj"],
        "lora_alpha": ALPHA,
        "lora_nums": NUMBER,
        "blc_alpha": 0.0,
        "blc_weight": 0.0,
        "lora_dropout": 0.05,
        "merge_weights": False,
        "fan_in_fan_out": False,
        "enable_lora": None,
        "bias": "none",
        "modules_to_save": None,
    }
    return given(**config | changes)


def make_tensors(config=None, base=BASE, dtype=torch.float32, seed=0):
    config = config or make_config()
    rank, number, shapes = config["r"], config["lora_nums"], {}
    for module in targeted(config, base):
        (d_in, d_out), place = base.linears[module], PREFIX + module
        shapes |= {f"{place}.lora_A.weight": (rank, d_in), f"{place}.lora_route.weight": (number, d_in)}
        shapes |= {f"{place}.lora_B{i}.weight": (d_out, rank) for i in range(number)}
    return draw(shapes, dtype, seed)


def delta(config, tensors, module, x):
    place, number = PREFIX + module, config["lora_nums"]
    return mixture_delta(
        x,
        tensors[f"{place}.lora_route.weight"],
        [tensors[f"{place}.lora_A.weight"]] * number,
        [tensors[f"{place}.lora_B{i}.weight"] for i in range(number)],
        [config["lora_alpha"] / config["r"]] * number,
    )
