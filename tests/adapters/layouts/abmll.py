"""ABMLL has no public code: names and fields are ours (`loramux_adapters.methods.abmll`)."""

import torch

from ..checkpoints import BASE
from . import lora
from .draw import PREFIX, draw, targeted

SIGMA_RANK = 3

delta = lora.delta  # of the mean


def make_config(**changes):
    return lora.make_config(peft_type="ABMLL", sigma_rank=SIGMA_RANK, sigma_offset=0.01) | changes


def make_tensors(config=None, base=BASE, dtype=torch.float32, seed=0):
    config = config or make_config()
    tensors, shapes = lora.make_tensors(config, base, dtype, seed), {}
    for module in targeted(config, base):
        (d_in, d_out), rank, place = base.linears[module], config["sigma_rank"] or config["r"], PREFIX + module
        shapes |= {f"{place}.lora_A_sigma.weight": (rank, d_in), f"{place}.lora_B_sigma.weight": (d_out, rank)}
    return tensors | {name: 0.1 * tensor for name, tensor in draw(shapes, dtype, seed + 1).items()}
