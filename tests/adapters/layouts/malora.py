"""MALoRA. No layout of the authors is public: names and fields are those of `loramux_adapters.methods.malora`."""

import torch

from ..checkpoints import BASE
from .draw import PREFIX, draw, given, targeted

RANK, SHARED, NUMBER, TOP_K, ALPHA = 4, 6, 3, 2, 8


def make_config(**changes):
    config = {
        "peft_type": "MALORA",
        "base_model_name_or_path": "somebody/tiny",
        "r": RANK,
        "shared_rank": SHARED,
        "lora_alpha": ALPHA,
        "target_modules": ["q_proj", "up_proj"],
        "num_experts": NUMBER,
        "top_k": TOP_K,
    }
    return given(**config | changes)


def make_tensors(config=None, base=BASE, dtype=torch.float32, seed=0):
    config = config or make_config()
    rank, shared, number, shapes = config["r"], config["shared_rank"], config["num_experts"], {}
    for module in targeted(config, base):
        (d_in, d_out), place = base.linears[module], PREFIX + module
        shapes |= {f"{place}.lora_S.weight": (shared, d_in), f"{place}.lora_gating.weight": (number, d_in)}
        for e in range(number):
            shapes |= {f"{place}.lora_P.{e}.weight": (rank, shared), f"{place}.lora_B.{e}.weight": (d_out, rank)}
    return draw(shapes, dtype, seed)


def delta(config, tensors, module, x):
    def part(name):
        return tensors[f"{PREFIX}{module}.{name}.weight"].double()

    x = x.double()
    best, chosen = (x @ part("lora_gating").T).topk(config["top_k"])
    g = torch.zeros(len(x), config["num_experts"], dtype=torch.float64).scatter(1, chosen, best.softmax(1))
    shared, s = x @ part("lora_S").T, config["lora_alpha"] / config["r"]
    rows = [s * (shared @ part(f"lora_P.{e}").T) @ part(f"lora_B.{e}").T for e in range(config["num_experts"])]
    return sum(g[:, e : e + 1] * row for e, row in enumerate(rows))
