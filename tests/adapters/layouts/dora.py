"""DoRA as its authors save it: names of `Linear` and fields of `DoraConfig` in NVlabs/DoRA at bd3ed6f.

Both are in `commonsense_reasoning/peft/src/peft/tuners/dora.py`; where `visual_instruction_tuning` (at 7393fa6) saves,
`get_peft_model_state_dict` takes `.default` out. PEFT's own DoRA is in `lora.py`.
"""

import torch

from ..checkpoints import BASE
from . import lora
from .draw import given

RANK, ALPHA = 4, 8


def make_config(**changes):
    config = {
        "peft_type": "DORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "somebody/tiny",
        "inference_mode": True,
        "r": RANK,
        "target_modules": ["q_proj", "down_proj"],
        "lora_alpha": ALPHA,
        "lora_dropout": 0.05,
        "dora_simple": True,
        "Wdecompose_target_modules": None,
        "merge_weights": False,
        "fan_in_fan_out": False,
        "enable_lora": None,
        "bias": "none",
        "modules_to_save": None,
    }
    return given(**config | changes)


def make_tensors(config=None, base=BASE, dtype=torch.float32, seed=0):
    peft = lora.make_tensors({**(config or make_config()), "use_dora": True}, base, dtype, seed)
    return {
        name.replace("lora_magnitude_vector", "weight_m_wdecomp.weight"): t[:, None] if t.ndim == 1 else t
        for name, t in peft.items()
    }
