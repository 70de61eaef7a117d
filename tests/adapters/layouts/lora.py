"""PEFT's LoRA: `<module>.lora_A.weight` and `.lora_B.weight`, as `LoraModel` of peft 0.21 saves them.

With `lora_bias` there is `.lora_B.bias`, and with `use_dora` `.lora_magnitude_vector`, which are lengths.
"""

import torch

from .. import checkpoints
from ..checkpoints import BASE
from .draw import PREFIX, draw, targeted


def make_config(**changes):
    return checkpoints.make_config(**changes)


def make_tensors(config=None, base=BASE, dtype=torch.float32, seed=0):
    config = config or make_config()
    shapes = {}
    for module in targeted(config, base):
        d_in, d_out = base.linears[module]
        rank, place = config.get("rank_pattern", {}).get(module, config["r"]), PREFIX + module
        shapes |= {f"{place}.lora_A.weight": (rank, d_in), f"{place}.lora_B.weight": (d_out, rank)}
        if config.get("lora_bias"):
            shapes[f"{place}.lora_B.bias"] = (d_out,)
        if config.get("use_dora"):
            shapes[f"{place}.lora_magnitude_vector"] = (d_out,)
    tensors = draw(shapes, dtype, seed)
    return {name: 1 + t.abs() if name.endswith("_vector") else t for name, t in tensors.items()}


def delta(config, tensors, module, x):
    """α/r · B A x"""
    a, b = (tensors[f"{PREFIX}{module}.lora_{factor}.weight"].double() for factor in "AB")
    return config["lora_alpha"] / len(a) * x.double() @ a.T @ b.T
