"""Chains of LoRAs in one file. No public code saves the links (RAC-LoRA, COLA, XGBLoRA): names and fields are ours,
`loramux_adapters.methods.chain`.
"""

import torch

from ..checkpoints import BASE
from .draw import PREFIX, draw, given, targeted

RANK, LENGTH, ALPHA = 2, 4, 6


def make_config(**changes):
    config = {"peft_type": "XGBLORA", "r": RANK, "lora_alpha": ALPHA, "length": LENGTH}
    return given(**config | {"target_modules": ["q_proj", "k_proj", "down_proj"]} | changes)


def make_tensors(config=None, base=BASE, dtype=torch.float32, seed=0):
    """Every link trains two of three layers, as XGBLoRA's rounds do."""
    config = config or make_config()
    modules, rank, shapes = targeted(config, base), config["r"], {}
    for link in range(config["length"]):
        for i, module in enumerate(modules):
            if (i + link) % 3 == 0 and len(modules) > 1:
                continue
            d_in, d_out = base.linears[module]
            shapes[f"{PREFIX}{module}.lora_A.{link}.weight"] = (rank, d_in)
            shapes[f"{PREFIX}{module}.lora_B.{link}.weight"] = (d_out, rank)
    return draw(shapes, dtype, seed)


def delta(config, tensors, module, x):
    """The sum over the links that have this module, times alpha / r and the link's weight."""
    total = 0
    for link in range(config["length"]):
        weight = (config.get("weights") or [1] * config["length"])[link]
        a, b = (tensors.get(f"{PREFIX}{module}.lora_{factor}.{link}.weight") for factor in "AB")
        if a is not None:
            total = total + config["lora_alpha"] / config["r"] * weight * (x.double() @ a.double().T) @ b.double().T
    return total
