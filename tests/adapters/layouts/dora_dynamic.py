"""DoRA with dynamic rank: names of `Adaptive_Lora_Linear` in MIkumikumi0116/DoRA at 235e21f (`Finetune_Utils.py`).

They have the prefix of its `Model_Wrapper_Base`, whose attribute `model` is the whole model; the mask is
`finally_mask_dict` of its `prune_state_dict.pt`, by names without that prefix. The config is ours.
"""

import torch

from ..checkpoints import BASE
from .draw import draw, given, targeted

START, ALPHA = 6, 8


def make_config(**changes):
    config = {
        "peft_type": "ADAPTIVE_LORA",
        "adaptive_lora_start_rank": START,
        "adaptive_lora_end_avg_rank": 4,
        "lora_alpha": ALPHA,
        "lora_dropout": 0.1,
        "target_modules": ["q_proj", "down_proj"],
        "base_model_name_or_path": "somebody/tiny",
    }
    return given(**config | changes)


def make_tensors(config=None, base=BASE, dtype=torch.float32, seed=0, masks=True):
    """Of every module some scalers are 0, and of the last one all; the mask names them and one more."""
    config = config or make_config()
    modules, start, found = targeted(config, base), config["adaptive_lora_start_rank"], {}
    for place, module in enumerate(modules):
        d_in, d_out = base.linears[module]
        names = ("lora_a_linear.weight", "lora_scaler", "lora_b_linear.weight")
        shapes = dict(zip(names, ((start, d_in), (start,), (d_out, start)), strict=True))
        pruned = torch.arange(start) < (start if module == modules[-1] else place % start)
        for name, tensor in draw(shapes, dtype, seed + place).items():
            found[f"model.{module}.{name}"] = tensor.masked_fill(pruned, 0) if name == "lora_scaler" else tensor
        if masks:
            found[f"finally_mask_dict.{module}"] = (pruned | (torch.arange(start) == start - 1)).float()
    return found


def delta(config, tensors, module, x):
    """dropout off; a_linear, times the scaler, b_linear, times alpha / start rank. The mask sets the scaler to 0."""
    names = ("lora_a_linear.weight", "lora_scaler", "lora_b_linear.weight")
    a, c, b = (tensors[f"model.{module}.{name}"].double() for name in names)
    mask = tensors.get(f"finally_mask_dict.{module}")
    if mask is not None:
        c = c.masked_fill(mask.bool(), 0)
    hidden = torch.nn.functional.linear(x.double(), a) * c
    return torch.nn.functional.linear(hidden, b) * (config["lora_alpha"] / a.shape[0])
