"""PHATGOOSE: the names that r-three/phatgoose at 1d23ac4 saves, which `scripts/concatenate.py` and
`scripts/manipulations.py` spell: `Router` and `FFNExperts` of `src/models/addons/moe.py` under the names that
`colm/models/t5xl/moe_lora_rank16_a2.gin` gives them. Its base is a T5; here the names of a decoder stand before
`._addons`. The config is ours.
"""

import torch
from torch.nn.functional import layer_norm

from ..checkpoints import BASE
from .draw import draw, given, targeted

RANK, NUMBER = 4, 5


def make_config(**changes):
    config = {
        "peft_type": "PHATGOOSE",
        "base_model_name_or_path": "somebody/tiny",
        "target_modules": ["q_proj", "down_proj"],
        "d_bottleneck": RANK,
        "num_experts": NUMBER,
    }
    return given(**config | changes)


def make_tensors(config=None, base=BASE, dtype=torch.float32, seed=0):
    config = config or make_config()
    shapes, rank = {}, config["d_bottleneck"]
    for module in targeted(config, base):
        (d_in, d_out), place = base.linears[module], f"{module}._addons"
        for e in range(config["num_experts"]):
            shapes[f"{place}.expert_lora.layer1__{e}"] = (d_in, rank)
            shapes[f"{place}.expert_lora.layer2__{e}"] = (rank, d_out)
            shapes[f"{place}.router.expert_embeddings__{e}"] = (d_in,)
    return draw(shapes, dtype, seed)


def delta(config, tensors, module, x):
    """As its forward pass has it: scores of two LayerNorms, softmax over all, the best, divided by their sum + eps."""
    place, number, width = f"{module}._addons", config["num_experts"], x.shape[1]
    vectors = torch.stack([tensors[f"{place}.router.expert_embeddings__{e}"].double() for e in range(number)])
    scores = layer_norm(x.double(), (width,)) @ layer_norm(vectors, (width,)).T * (1 / width) ** 0.5
    best, chosen = torch.softmax(scores, 1).topk(config.get("topk_value", 2))
    best = best / (best.sum(1, keepdim=True) + config.get("epsilon", 1e-6))
    g = torch.zeros_like(scores).scatter(1, chosen, best)
    total = 0
    for e in range(number):
        middle = x.double() @ tensors[f"{place}.expert_lora.layer1__{e}"].double()
        total = total + g[:, e : e + 1] * (middle @ tensors[f"{place}.expert_lora.layer2__{e}"].double())
    return total / config["d_bottleneck"] if config.get("divide_by_d_bottleneck", True) else total
