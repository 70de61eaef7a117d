"""Several PEFT LoRAs in folders of their own: a chain adds them, LoraHub adds their factors.

The folders hold what PEFT writes (see `lora.py`). The config beside them is ours, as nothing public keeps the links of
a chain or the weights of LoraHub (`loramux_adapters.methods.chain`, `.lorahub`).
"""

import torch

from ..checkpoints import BASE
from . import lora
from .draw import PREFIX

WEIGHTS = [0.5, -1.25]


def make_config(**changes):
    return {"peft_type": "LORAHUB", "adapters": ["first", "second"], "weights": WEIGHTS} | changes


def make_parts(config, part, base=BASE, dtype=torch.float32, seed=0):
    """Folder -> its tensors; `part` is the config of each."""
    return {name: lora.make_tensors(part, base, dtype, seed + i) for i, name in enumerate(config["adapters"])}


def delta(config, part, parts, module, x):
    """CHAIN: s · Σ_i w_i B_i A_i x.  LORAHUB: s · (Σ_i w_i B_i) (Σ_i w_i A_i) x.  ENSEMBLE: the first one's."""
    if config["peft_type"] == "ENSEMBLE":
        return lora.delta(part, next(iter(parts.values())), module, x)
    a, b = (
        [tensors[f"{PREFIX}{module}.lora_{factor}.weight"].double() for tensors in parts.values()] for factor in "AB"
    )
    w, s, x = config["weights"], part["lora_alpha"] / part["r"], x.double()
    if config["peft_type"] == "LORAHUB":
        mixed_a, mixed_b = (sum(v * factor for v, factor in zip(w, factors, strict=True)) for factors in (a, b))
        return s * x @ mixed_a.T @ mixed_b.T
    return s * sum(v * (x @ down.T @ up.T) for v, down, up in zip(w, a, b, strict=True))
