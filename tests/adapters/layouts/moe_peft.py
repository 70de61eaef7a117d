"""MoE-PEFT: the names that `get_lora_layer_weight` in TUDB-Labs/MoE-PEFT's `moe_peft/model.py` writes.

The config is what `export` in `moe_peft/adapters/{mola,loramoe,mixlora}/config.py` and `save_adapter_weight` in
`moe_peft/trainer.py` write.
"""

import torch

from ..checkpoints import BASE
from ..mixture_reference import mixture_delta
from .draw import draw, given, targeted

RANK, NUMBER, TOP_K, ALPHA = 4, 5, 2, 12


def make_config(kind="MOLA", **changes):
    config = {
        "bias": "none",
        "peft_type": kind,
        "r": RANK,
        "lora_alpha": ALPHA,
        "lora_dropout": 0.05,
        "target_modules": ["q_proj", "down_proj"],
        "routing_strategy": kind.lower(),
        "num_experts": NUMBER,
        "base_model_name_or_path": "somebody/tiny",
        "task_type": "CAUSAL_LM",
    }
    return given(**config | ({"top_k": TOP_K} if kind != "LORAMOE" else {}) | changes)


def place(module, kind="MOLA"):
    return f"{kind.lower()}.{module.removeprefix('model.')}"


def make_tensors(config=None, base=BASE, dtype=torch.float32, seed=0):
    config = config or make_config()
    kind, rank, found = config["peft_type"], config["r"], {}
    for module in targeted(config, base):
        d_in, d_out = base.linears[module]
        shapes = {"lora_A": (rank, d_in), "lora_B": (d_out, rank)}
        if kind == "MOLA" or ".mlp." in module:
            number = config["num_experts"]
            shapes = {f"experts.{e}.{name}": shape for e in range(number) for name, shape in shapes.items()}
            # MixLoRA's one router belongs to the block.
            router = module if kind != "MIXLORA" else module.rpartition(".")[0]
            found[f"{place(router, kind)}.moe_gate.weight"] = (number, d_in)
        found |= {f"{place(module, kind)}.{name}.weight": shape for name, shape in shapes.items()}
    return draw(found, dtype, seed)


def delta(config, tensors, module, x):
    """A top-k or dense mixture; LoRAMoE's attention layers have a plain LoRA."""
    kind, s = config["peft_type"], config["lora_alpha"] / config["r"] ** (0.5 if config.get("use_rslora") else 1)
    at, number = place(module, kind), config["num_experts"]
    if f"{at}.moe_gate.weight" not in tensors:
        a, b = (tensors[f"{at}.lora_{factor}.weight"].double() for factor in "AB")
        return s * x.double() @ (b @ a).T
    return mixture_delta(
        x,
        tensors[f"{at}.moe_gate.weight"],
        [tensors[f"{at}.experts.{e}.lora_A.weight"] for e in range(number)],
        [tensors[f"{at}.experts.{e}.lora_B.weight"] for e in range(number)],
        [s] * number,
        config.get("top_k"),
    )
