"""SiRA. No layout of the authors is public: names and fields are those of `loramux_adapters.methods.sira`."""

import torch

from ..checkpoints import BASE
from .draw import PREFIX, draw, given, targeted

RANK, NUMBER, TOP_K, ALPHA = 3, 4, 2, 12


def make_config(**changes):
    config = {
        "peft_type": "SIRA",
        "base_model_name_or_path": "somebody/tiny",
        "r": RANK,
        "lora_alpha": ALPHA,
        "target_modules": ["k_proj", "up_proj"],
        "num_experts": NUMBER,
        "top_k": TOP_K,
    }
    return given(**config | changes)


def make_tensors(config=None, base=BASE, dtype=torch.float32, seed=0):
    config = config or make_config()
    rank, number, shapes = config["r"], config["num_experts"], {}
    for module in targeted(config, base):
        (d_in, d_out), place = base.linears[module], PREFIX + module
        shapes[f"{place}.lora_gating.weight"] = (number, d_in)
        for e in range(number):
            shapes |= {f"{place}.lora_A.{e}.weight": (rank, d_in), f"{place}.lora_B.{e}.weight": (d_out, rank)}
    return draw(shapes, dtype, seed)


def delta(config, tensors, module, x):
    """x: one sequence, from its first token on."""
    place, s = PREFIX + module, config["lora_alpha"] / config["r"]
    p = torch.softmax(x.double() @ tensors[f"{place}.lora_gating.weight"].double().T, 1)
    kept = p >= p.topk(config["top_k"]).values[:, -1:]
    g = p * kept
    if config.get("gate_norm", "renorm") == "renorm":
        g = g / g.sum(1, keepdim=True)
    if (capacity := config.get("capacity")) is not None:
        for e in range(config["num_experts"]):
            tokens = 0
            for t in range(len(x)):
                if kept[t, e]:
                    tokens += 1
                    if tokens > capacity:
                        g[t, e] = 0
    total = 0
    for e in range(config["num_experts"]):
        a, b = (tensors[f"{place}.lora_{factor}.{e}.weight"].double() for factor in "AB")
        total = total + g[:, e : e + 1] * s * (x.double() @ a.T @ b.T)
    return total
