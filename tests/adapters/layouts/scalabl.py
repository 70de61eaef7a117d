"""ScalaBL: the names of `ScalaBLLinear` in SRI-CSL/BayesAdapt at 3843000 (`lorawrappers/scalabl.py`).

`Trainer.save_model` keeps what has `lora_` in its name of the wrapped PEFT model's state dict, so the adapter's name is
left in. It writes no adapter_config.json: that is ours.
"""

import torch

from ..checkpoints import BASE
from . import lora
from .draw import PREFIX, draw, targeted


def make_config(**changes):
    return lora.make_config(peft_type="SCALABL") | changes


def make_tensors(config=None, base=BASE, dtype=torch.float32, seed=0):
    config = config or make_config()
    shapes = {}
    for module in targeted(config, base):
        (d_in, d_out), rank, place = base.linears[module], config["r"], PREFIX + module
        shapes |= {f"{place}.lora_A.default.{name}": (rank,) for name in ("log_s", "log_s_sigma")}
        shapes |= {f"{place}.lora_A.default.{name}": (rank,) for name in ("log_p_mu", "log_p_sigma")}
        shapes |= {f"{place}.lora_A.default.Vh": (rank, d_in), f"{place}.lora_B.default.weight": (d_out, rank)}
    return draw(shapes, dtype, seed)


def delta(config, tensors, module, x):
    """The mean's: α/r · B diag(exp log_s) V x"""
    place = f"{PREFIX}{module}.lora_A.default"
    v, log_s = tensors[f"{place}.Vh"].double(), tensors[f"{place}.log_s"].double()
    b = tensors[f"{PREFIX}{module}.lora_B.default.weight"].double()
    return config["lora_alpha"] / config["r"] * (x.double() @ v.T * log_s.exp()) @ b.T
