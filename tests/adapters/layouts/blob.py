"""BLoB: PEFT's LoRA and `<module>.lora_A_rho`, as its authors' code saves it (Wang-ML-Lab/bayesian-peft at bc6a4a7).

`modelwrappers/blob.py` puts a ParameterDict `lora_A_rho` into PEFT's layers, and `run/main.py` calls `save_pretrained`,
which takes `.default` out; `test_blob.py` does the same with the installed PEFT. `bayes_eps` is what users add.
"""

import torch

from ..checkpoints import BASE
from . import lora
from .draw import PREFIX, targeted

delta = lora.delta  # of the mean


def make_config(**changes):
    return lora.make_config(bayes_eps=0.05) | changes


def make_tensors(config=None, base=BASE, dtype=torch.float32, seed=0):
    config = config or make_config()
    tensors = lora.make_tensors(config, base, dtype, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    for module in targeted(config, base):
        like = tensors[f"{PREFIX}{module}.lora_A.weight"]
        rho = 0.05 * (1 + torch.rand(like.shape, generator=generator))
        tensors[f"{PREFIX}{module}.lora_A_rho"] = rho.to(dtype)
    return tensors
