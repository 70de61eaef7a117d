"""PEFT's AdaLoRA: `<module>.lora_A`, `.lora_E`, `.lora_B` without `.weight`, as `AdaLoraModel` of peft 0.21 saves them.

`rank_pattern` is what its RankAllocator puts into the config: `<module>.lora_E` -> which of the first ranks are left.
"""

import torch

from ..checkpoints import BASE
from .draw import PREFIX, draw, given, targeted

INIT_R, ALPHA = 6, 8


def make_config(**changes):
    config = {
        "peft_type": "ADALORA",
        "init_r": INIT_R,
        "r": 8,
        "target_r": 3,
        "total_step": 10,
        "lora_alpha": ALPHA,
        "target_modules": ["q_proj", "down_proj"],
        "rank_pattern": None,
        "base_model_name_or_path": "somebody/tiny",
    }
    return given(**config | changes)


def make_tensors(config=None, base=BASE, dtype=torch.float32, seed=0):
    config = config or make_config()
    shapes = {}
    for module in targeted(config, base):
        (d_in, d_out), place = base.linears[module], PREFIX + module
        left = (config["rank_pattern"] or {}).get(f"{module}.lora_E")
        rank = config["init_r"] if left is None else sum(left)
        shapes |= {f"{place}.lora_A": (rank, d_in), f"{place}.lora_E": (rank, 1), f"{place}.lora_B": (d_out, rank)}
    return draw(shapes, dtype, seed)
