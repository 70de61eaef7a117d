"""MoLE and AdaMoLE: the names that zefang-liu/AdaMoLE at 3b05d4a saves. `get_peft_model_state_dict` of its
`src/utils/save_and_load.py` keeps what has `lora_` in its name and takes `.default` out, of the modules that
`src/mole/layer.py` and `src/adamole/layer.py` build; `moe_layer` holds the same factors again. The fields are those of
its `MoleConfig` and `AdaMoleConfig`.
"""

import torch

from ..checkpoints import BASE
from .draw import PREFIX, draw, given, targeted

TARGETS = ("q_proj", "down_proj")
RANK, NUMBER, ALPHA = 4, 5, 16
GATES = {
    "top_k": {"top_k": 2},
    "threshold": {"threshold": 0.25},
    "adaptive": {"peft_type": "ADAMOLE", "max_threshold": None},
}


def make_config(**changes):
    config = {
        "peft_type": "MOLE",
        "auto_mapping": None,
        "base_model_name_or_path": "somebody/tiny",
        "revision": None,
        "task_type": "CAUSAL_LM",
        "inference_mode": True,
        "lora_rank": RANK,
        "lora_alpha": ALPHA,
        "lora_dropout": 0.05,
        "bias": "none",
        "target_modules": list(TARGETS),
        "init_lora_weights": True,
        "num_experts": NUMBER,
    }
    return given(**config | changes)


def make_tensors(config=None, base=BASE, dtype=torch.float32, seed=0):
    config = config or make_config()
    rank, number, shapes = config["lora_rank"], config["num_experts"], {}
    for module in targeted(config, base):
        (d_in, d_out), place = base.linears[module], PREFIX + module
        shapes[f"{place}.lora_gating.weight"] = (number, d_in)
        for e in range(number):
            shapes |= {f"{place}.lora_A.{e}.weight": (rank, d_in), f"{place}.lora_B.{e}.weight": (d_out, rank)}
        if config["peft_type"] == "ADAMOLE":
            shapes |= {f"{place}.lora_threshold.weight": (1, d_in), f"{place}.lora_threshold.bias": (1,)}
    tensors = draw(shapes, dtype, seed)
    for name, tensor in list(tensors.items()):
        module, _, rest = name.partition(".lora_")
        factor, _, expert = rest.removesuffix(".weight").partition(".")
        if factor in "AB":
            tensors[f"{module}.moe_layer.experts.{expert}.lora_{factor}.weight"] = tensor.clone()
    return tensors


def delta(config, tensors, module, x):
    """Token by token, as the paper's equations have it."""
    place = PREFIX + module
    router, number, rows = tensors[f"{place}.lora_gating.weight"].double(), config["num_experts"], []
    factors = [[tensors[f"{place}.lora_{factor}.{e}.weight"].double() for factor in "AB"] for e in range(number)]
    for token in x.double():
        p = torch.softmax(router @ token, 0).tolist()
        if config["peft_type"] == "ADAMOLE":
            most = config.get("max_threshold") or 1 / number
            (w,), (b,) = (tensors[f"{place}.lora_threshold.{part}"].double() for part in ("weight", "bias"))
            logit = w @ token + b
            weights = [max(value - most / (1 + float(torch.exp(-logit))), 0) for value in p]
        elif config.get("top_k"):
            best = sorted(range(number), key=lambda e, p=p: -p[e])[: config["top_k"]]
            weights = [value if e in best else 0 for e, value in enumerate(p)]
        else:
            weights = [value if value >= config["threshold"] else 0 for value in p]
        row = torch.zeros(len(factors[0][1]), dtype=torch.float64)
        for (a, b), weight in zip(factors, weights, strict=True):
            if weight:
                row += weight / sum(weights) * config["lora_alpha"] / config["lora_rank"] * (b @ (a @ token))
        rows.append(row)
    return torch.stack(rows)
