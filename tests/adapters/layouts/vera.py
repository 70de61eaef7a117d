"""PEFT's VeRA: `<module>.vera_lambda_b`, `.vera_lambda_d`, and `base_model.vera_A`, `base_model.vera_B` for all.

As `VeraModel` of peft 0.21 saves them.
"""

import torch

from ..checkpoints import BASE
from .draw import PREFIX, draw, given, targeted

RANK = 6


def make_config(**changes):
    config = {
        "peft_type": "VERA",
        "r": RANK,
        "target_modules": ["k_proj", "down_proj"],
        "save_projection": True,
        "projection_prng_key": 0,
        "bias": "none",
        "base_model_name_or_path": "somebody/tiny",
    }
    return given(**config | changes)


def make_tensors(config=None, base=BASE, dtype=torch.float32, seed=0):
    config = config or make_config()
    rank, modules = config["r"], targeted(config, base)
    widest = [max(base.linears[module][axis] for module in modules) for axis in (0, 1)]
    shapes = {"base_model.vera_A": (rank, widest[0]), "base_model.vera_B": (widest[1], rank)}
    for module in modules:
        shapes[f"{PREFIX}{module}.vera_lambda_b"] = (base.linears[module][1],)
        shapes[f"{PREFIX}{module}.vera_lambda_d"] = (rank,)
    return draw(shapes, dtype, seed)
