"""IVON-LoRA in our format (`loramux_adapters.methods.ivon`): PEFT's LoRA and the optimiser's Hessian of each factor.

team-approx-bayes/ivon-lora at 043ce23 saves the means alone. `test_ivon.py` takes the vector of `IVON` apart as the
method's docstring says.
"""

import torch

from ..checkpoints import BASE
from . import lora

delta = lora.delta  # of the mean


def make_config(**changes):
    return lora.make_config(peft_type="IVON", ess=1e3, weight_decay=1e-3) | changes


def make_tensors(config=None, base=BASE, dtype=torch.float32, seed=0):
    tensors = lora.make_tensors(config or make_config(), base, dtype, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    for name, factor in list(tensors.items()):
        hess = 3e-4 + 0.1 * torch.rand(factor.shape, generator=generator)
        tensors[name.replace(".weight", ".hess")] = hess.to(dtype)
    return tensors
