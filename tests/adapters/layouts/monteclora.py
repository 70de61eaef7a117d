"""MonteCLoRA: PEFT's LoRA and the state of `MontecloraSampler`, as `LoraModel` of peft 0.21 saves them.

`test_monteclora.py` lets PEFT write one.
"""

import torch

from ..checkpoints import BASE
from . import lora
from .draw import PREFIX, targeted

SAMPLES = 3


def make_config(**changes):
    config = {"num_samples": SAMPLES, "use_entropy": True, "dirichlet_prior": 1.0, "sample_scaler": 3e-4}
    return lora.make_config(monteclora_config=config | {"kl_loss_weight": 1e-5, "buffer_size": 10}) | changes


def make_tensors(config=None, base=BASE, dtype=torch.float32, seed=0):
    config = config or make_config()
    tensors, rank = lora.make_tensors(config, base, dtype, seed), config["r"]
    for module in targeted(config, base):
        shapes = {"std_prior": (rank,), "gaussian_var_prior": (rank, rank), "expert_weights_prior": (SAMPLES,)}
        for name, shape in (shapes | {"expert_weights": (SAMPLES,)}).items():
            tensors[f"{PREFIX}{module}.lora_monteclora_sampler.{name}"] = torch.ones(shape, dtype=dtype)
    return tensors
