"""ResLoRA: the names that microsoft/LMOps writes, `save_checkpoint` in `reslora/myloralib/reslora.py` at c7b5576; the
fields are those of `ResLoraConfig` in `config.py`.
"""

import re

import torch

from ..checkpoints import BASE
from .draw import draw, given

RANK, ALPHA = 4, 8
CONFIG_FILE = "reslora_config.json"
# What the letters of its target_modules stand for in a Llama.
TARGETS = {"q": ("q_proj",), "k": ("k_proj",), "v": ("v_proj",), "o": ("o_proj",), "f": ("up_proj", "down_proj")}


def make_config(**changes):
    config = {
        "rank": RANK,
        "lora_alpha": ALPHA,
        "lora_dropout": 0.05,
        "start_index": 0,
        "target_modules": "q.f",
        "lora_num": 1,
        "merge_weights": True,
        "res_flag": 2,
        "merge_flag": 0,
        "pre_num": -1,
        "merge_4_len": 100,
    }
    return given(**config | changes)


def targets_of(config):
    return tuple(name for letter in config["target_modules"].split(".") for name in TARGETS[letter])


def make_tensors(config=None, base=BASE, dtype=torch.float32, seed=0):
    config = config or make_config()
    shapes, rank = {}, config["rank"]
    for module, (d_in, d_out) in base.linears.items():
        for i in range(config["start_index"] + 1) if module.endswith(targets_of(config)) else ():
            shapes |= {f"{module}.loras.{i}.lora_A": (rank, d_in), f"{module}.loras.{i}.lora_B": (d_out, rank)}
    return draw(shapes, dtype, seed)


def delta(config, tensors, module, x):
    """With block shortcuts, where all layers of a kind are linked: the sum over this layer's LoRAs and those of the
    `pre_num` layers before it, all on the input of this one.
    """
    layer, most = int(re.search(r"layers\.(\d+)\.", module)[1]), config["pre_num"]
    total = 0
    for n in range(layer, -1 if most == -1 else max(-1, layer - most - 1), -1):
        place = module.replace(f"layers.{layer}.", f"layers.{n}.")
        for i in range(config["start_index"] + 1):
            a, b = (tensors[f"{place}.loras.{i}.lora_{factor}"].double() for factor in "AB")
            total = total + config["lora_alpha"] / config["rank"] * (x.double() @ a.T @ b.T)
    return total
