"""MOELoRA: the names that liuqidong07/MOELoRA-peft at 949c8c5 and ccb426d saves. `MMOELoraLinear`, `MMOELinearA`,
`Expert` (whose `weight` is its `mlp`'s once more) and `Gate` in `src/MLoRA/peft/tuners/mmoelora.py`,
`PeftModelForCausalLMShared` in `peft_model.py` (the gate of the whole model), and `get_peft_model_state_dict`, which
takes `.default` out.
"""

import torch

from ..checkpoints import BASE
from .draw import PREFIX, draw, given, targeted

RANK, NUMBER, TASKS, WIDTH, ALPHA = 8, 4, 3, 5, 16
EMBEDDING, GATE = "lora_task_embedding.weight", "lora_gate.GateL.weight"


def make_config(**changes):
    config = {
        "peft_type": "MMOELORAS",
        "task_type": "CAUSAL_LMS",
        "base_model_name_or_path": "somebody/tiny",
        "inference_mode": True,
        "r": RANK,
        "lora_alpha": ALPHA,
        "lora_dropout": 0.1,
        "fan_in_fan_out": False,
        "bias": "none",
        "modules_to_save": None,
        "init_lora_weights": True,
        "target_modules": ["q_proj", "k_proj"],
        "task_num": TASKS,
        "task_embedding_dim": WIDTH,
        "expert_num": NUMBER,
    }
    return given(**config | changes)


def make_tensors(config=None, base=BASE, dtype=torch.float32, seed=0):
    config = config or make_config()
    number, rank = config["expert_num"], config["r"] // config["expert_num"]
    table = {EMBEDDING: (config["task_num"] + 1, config["task_embedding_dim"])}
    table[GATE] = (number, config["task_embedding_dim"])
    shapes = dict(table) if config["peft_type"] == "MMOELORAS" else {}
    for module in targeted(config, base):
        (d_in, d_out), place = base.linears[module], PREFIX + module
        shapes |= {f"{place}.{name}": shape for name, shape in table.items()}
        for e in range(number):
            shapes[f"{place}.lora_A.loraA.{e}.mlp.weight"] = (rank, d_in)
            shapes[f"{place}.lora_B.loraB.{e}.mlp.weight"] = (d_out, rank)
    tensors = draw(shapes, dtype, seed)
    return tensors | {name.replace(".mlp.", "."): t.clone() for name, t in tensors.items() if ".mlp." in name}


def delta(config, tensors, module, x):
    """The config's `task_id` chooses the weights of the experts."""
    place = PREFIX + module
    prefix = "" if config["peft_type"] == "MMOELORAS" else f"{place}."
    g = torch.softmax(tensors[prefix + GATE].double() @ tensors[prefix + EMBEDDING][config["task_id"]].double(), 0)
    total = 0
    for e in range(config["expert_num"]):
        down = x.double() @ tensors[f"{place}.lora_A.loraA.{e}.mlp.weight"].double().T
        up = down @ tensors[f"{place}.lora_B.loraB.{e}.mlp.weight"].double().T
        total = total + up * (config["lora_alpha"] / config["r"]) * g[e]
    return total
