"""SWAG-LoRA: the buffers that `SWAG` of fortuinlab/swag-lora at 82a188b registers beside each factor (`SWAG.py`).

`train.py` saves its state dict, where PEFT's model is `base`; the base model's own tensors and the last weights are
left out, as `loramux_adapters.methods.swag` says. The config is ours, with the names of `conf/method/swag.yaml`.
"""

import torch

from ..checkpoints import BASE
from . import lora
from .draw import PREFIX, targeted

MODELS, MOST = 9, 5


def make_config(**changes):
    return lora.make_config(peft_type="SWAG", n_models=MODELS, swag_max_num_models=MOST) | changes


def make_tensors(config=None, base=BASE, dtype=torch.float32, seed=0):
    """Moments of weights that really were collected, as `collect_model` does."""
    config = config or make_config()
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for module in targeted(config, base):
        (d_in, d_out), rank = base.linears[module], config["r"]
        for factor, shape in (("A", (rank, d_in)), ("B", (d_out, rank))):
            place = f"base.{PREFIX}{module}.lora_{factor}.default.weight"
            centre, mean, square, rows = torch.randn(shape, generator=generator), 0.0, 0.0, []
            for n in range(config["n_models"]):
                weight = centre + 0.1 * torch.randn(shape, generator=generator)
                mean, square = (mean * n + weight) / (n + 1), (square * n + weight**2) / (n + 1)
                rows = [*rows, (weight - mean).flatten()][-config["swag_max_num_models"] :]
            tensors |= {f"{place}_mean": mean.to(dtype), f"{place}_sq_mean": square.to(dtype)}
            if config.get("swag_cov_mat", True):
                tensors[f"{place}_cov_mat_sqrt"] = torch.stack(rows).to(dtype)
    return tensors


def delta(config, tensors, module, x):
    """The mean's: α/r · B A x"""
    a, b = (tensors[f"base.{PREFIX}{module}.lora_{factor}.default.weight_mean"].double() for factor in "AB")
    return config["lora_alpha"] / config["r"] * x.double() @ a.T @ b.T
