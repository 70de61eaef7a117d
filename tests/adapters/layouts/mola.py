"""MoLA: names of GCYZSL/MoLA at 4c7324d: `router.router` and `lora_A.default_{e}` in `src/mola_lora_hacked.py`.

When it saves, `get_peft_model_state_dict_moe` in `src/mola_peft_model_hacked.py` takes `.default` out of them. `top_k`,
which it does not save, is added. HILO has no public layout and is read as this one.
"""

import torch

from ..checkpoints import BASE
from ..mixture_reference import mixture_delta
from .draw import PREFIX, draw, given, targeted

# By layer.
RANKS, EXPERTS, TOP_K, ALPHA = [4, 3], [2, 5], [2, 3], 12


def make_config(**changes):
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": "somebody/tiny",
        "r": RANKS,
        "lora_alpha": ALPHA,
        "lora_dropout": 0.05,
        "target_modules": ["q_proj", "down_proj"],
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "layers_pattern": None,
        "layers_to_transform": None,
        "modules_to_save": None,
        "revision": None,
        "task_type": "CAUSAL_LM",
        "top_k": TOP_K,
    }
    return given(**config | changes)


def of_layer(config, field, module):
    """A number of the config for the module's layer; EXPERTS where the config does not say how many."""
    value = config.get(field) or EXPERTS
    return value[int(module.split(".")[2])] if isinstance(value, list) else value


def make_tensors(config=None, base=BASE, dtype=torch.float32, seed=0, expert="lora_{factor}_{e}"):
    config = config or make_config()
    shapes = {}
    for module in targeted(config, base):
        (d_in, d_out), place = base.linears[module], PREFIX + module
        rank, number = of_layer(config, "r", module), of_layer(config, "number_experts", module)
        shapes[f"{place}.router.router.weight"] = (number, d_in)
        for e in range(number):
            shapes[f"{place}.{expert.format(factor='A', e=e)}.weight"] = (rank, d_in)
            shapes[f"{place}.{expert.format(factor='B', e=e)}.weight"] = (d_out, rank)
    return draw(shapes, dtype, seed)


def delta(config, tensors, module, x):
    place, number = PREFIX + module, of_layer(config, "number_experts", module)
    return mixture_delta(
        x,
        tensors[f"{place}.router.router.weight"],
        [tensors[f"{place}.lora_A_{e}.weight"] for e in range(number)],
        [tensors[f"{place}.lora_B_{e}.weight"] for e in range(number)],
        [config["lora_alpha"] / of_layer(config, "r", module)] * number,
        of_layer(config, "top_k", module),
    )
