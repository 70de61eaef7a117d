"""One sample of every layout that is known, and what it must refuse. A new layout is a new row of SAMPLES.

Each generator says in its docstring where its names and fields come from.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from .. import checkpoints
from ..checkpoints import BASE, write_adapter
from . import (
    abmll,
    adalora,
    blob,
    chain,
    dora,
    dora_dynamic,
    folders,
    hydralora,
    ivon,
    lora,
    malora,
    mcdropout,
    melora,
    moe_peft,
    moelora,
    mola,
    mole,
    monteclora,
    multilora,
    phatgoose,
    recognised,
    reslora,
    scalabl,
    sira,
    swag,
    vera,
)
from .draw import Tensors

CONFIG = "adapter_config.json"


@dataclass(frozen=True)
class Sample:
    """An adapter of one layout for the tiny base.

    method, layout  which of METHODS claims it, and what `loramux adapters check` calls it
    config, make    its config, and what makes its tensors of that; None: it has none
    read, served    whether it is lowered, and whether `prepare` takes it
    file            the config's name
    rank, alpha     the fields that give the rank and the scale; None: there is none
    rslora          whether `use_rslora` is a field of this code base
    foreign         settings of other gates or scales; each alone must be refused by its name
    spare           names of tensors that may be absent: repeated, or not read
    parts           LoRAs in folders of its own, by name
    """

    method: str
    layout: str
    config: Mapping[str, Any]
    make: Callable[..., Tensors] | None = None
    read: bool = True
    served: bool = True
    file: str = CONFIG
    rank: str | None = "r"
    alpha: str | None = "lora_alpha"
    rslora: bool = False
    foreign: Mapping[str, Any] = field(default_factory=dict)
    spare: tuple[str, ...] = ()
    parts: tuple[str, ...] = ()

    def tensors(self) -> Tensors:
        return self.make(self.config, BASE) if self.make else {}

    def write(self, folder: Path, config: Mapping[str, Any] | None = None, tensors: Tensors | None = None) -> Path:
        """The folder as its code base leaves it, with another config or other tensors where they are given."""
        for seed, part in enumerate(self.parts):
            write_adapter(folder / part, tensors=checkpoints.make_tensors(seed=seed))
        folder.mkdir(parents=True, exist_ok=True)
        if self.make:
            write_adapter(folder, {}, self.tensors() if tensors is None else tensors)
            (folder / CONFIG).unlink()
        (folder / self.file).write_text(json.dumps(dict(self.config if config is None else config)))
        return folder


def _sample(
    method: str, layout: str, module: ModuleType, *, config: Mapping[str, Any] | None = None, **rest: Any
) -> Sample:
    return Sample(method, layout, module.make_config(**(config or {})), module.make_tensors, **rest)


# A gate of another kind, in the words of other code bases: refused by all that have a gate.
_SPARSE = {"routing_strategy": "switch", "threshold": 0.3, "gate_norm": "sigmoid"}
_SELECTED = {**_SPARSE, "top_k": 99}
_REPEATED = (".moe_layer.",)
_TWICE = tuple(f".lora{factor}.{e}.weight" for factor in "AB" for e in range(moelora.NUMBER))

SAMPLES = (
    _sample("lora", "LoRA, rsLoRA (PEFT)", lora, rslora=True, foreign={"alpha_pattern": {"q_proj": "8"}}),
    _sample("lora_bias", "LoRA with biases (PEFT)", lora, config={"lora_bias": True}, rslora=True),
    _sample("dora", "DoRA (NVlabs/DoRA)", dora, foreign={"Wdecompose_target_modules": ["o_proj"], "use_dora": True}),
    _sample("dora", "DoRA (PEFT)", lora, config={"use_dora": True}, rslora=True, foreign={"lora_bias": True}),
    _sample("blob", "BLoB (Wang-ML-Lab/bayesian-peft and SRI-CSL/BayesAdapt)", blob, rslora=True,
            foreign={"lora_bias": True, "bayes_eps": "0.05", "bayes_beta": 0.2}),
    _sample("monteclora", "MonteCLoRA (PEFT)", monteclora, rslora=True, spare=("lora_monteclora_sampler",),
            foreign={"lora_bias": True}),
    _sample("ivon", "IVON-LoRA (loramux)", ivon, rslora=True, foreign={"ess": 0, "weight_decay": -1, "hess_init": 1}),
    _sample("scalabl", "ScalaBL (SRI-CSL/BayesAdapt)", scalabl, rslora=True, spare=("log_p_",), foreign={"beta": 1}),
    _sample("swag", "SWAG-LoRA (fortuinlab/swag-lora)", swag, rslora=True,
            foreign={"swag_sample_scale": 0, "n_models": 0, "swag_max_num_models": 1, "swag_cov_mat": "yes"}),
    _sample("mcdropout", "MC-dropout (loramux)", mcdropout, rslora=True, foreign={"lora_dropout": 1}),
    _sample("abmll", "ABMLL (loramux)", abmll, rslora=True, foreign={"sigma_form": "square", "sigma_rank": 0}),
    _sample("adalora", "AdaLoRA (PEFT)", adalora, rank="init_r", foreign={"alpha_pattern": {"q_proj": 8}}),
    _sample("vera", "VeRA (PEFT)", vera, alpha=None, foreign={"lora_alpha": 8}),
    _sample("melora", "MELoRA (ChasonShi/MELoRA)", melora, rank=None, foreign={"r": 4, "top_k": 2}),
    _sample("multilora", "MultiLoRA (pUmpKin-Co/MTL-LoRA)", multilora, foreign={"tunable_scaler": True}),
    _sample(
        "dora_dynamic",
        "DoRA with dynamic rank (MIkumikumi0116/DoRA)",
        dora_dynamic,
        rank="adaptive_lora_start_rank",
        foreign={"r": 4},
        spare=("finally_mask_dict.",),
    ),
    _sample("mola", "MoLA (GCYZSL/MoLA)", mola, rank=None, foreign=_SELECTED),
    _sample(
        "mola", "HILO (loramux)", mola, config={"peft_type": "HILO", "number_experts": mola.EXPERTS}, rank=None,
        foreign=_SELECTED,
    ),
    _sample("hydralora", "HydraLoRA (Clin0212/HydraLoRA)", hydralora, foreign={**_SPARSE, "top_k": 2}),
    _sample("moe_peft", "MoLA (TUDB-Labs/MoE-PEFT)", moe_peft, rslora=True, foreign=_SELECTED),
    _sample(
        "moe_peft", "LoRAMoE (TUDB-Labs/MoE-PEFT)", moe_peft, config={"kind": "LORAMOE"}, rslora=True,
        foreign={**_SPARSE, "top_k": 2},
    ),
    _sample(
        "mole", "MoLE (zefang-liu/AdaMoLE)", mole, config={"top_k": 2}, rank="lora_rank", spare=_REPEATED,
        foreign={"top_k": 99, "r": 4, "max_threshold": 0.5, "gate_norm": "sigmoid"},
    ),
    _sample(
        "mole", "MoLE (zefang-liu/AdaMoLE)", mole, config={"threshold": 0.2}, rank="lora_rank", spare=_REPEATED,
        foreign={"threshold": 2},
    ),
    _sample(
        "mole", "AdaMoLE (zefang-liu/AdaMoLE)", mole, config={"peft_type": "ADAMOLE"}, rank="lora_rank",
        spare=_REPEATED, foreign={"threshold": 0.2, "top_k": 2, "max_threshold": 2},
    ),
    _sample("sira", "SiRA (loramux)", sira, foreign={**_SELECTED, "capacity": "auto"}),
    _sample("sira", "SiRA (loramux)", sira, config={"capacity": 2}, foreign={"capacity": 2.5}),
    _sample("malora", "MALoRA (loramux)", malora, foreign=_SELECTED),
    _sample(
        "moelora", "MOELoRA (liuqidong07/MOELoRA-peft)", moelora, config={"task_id": 2},
        foreign={**_SPARSE, "task_id": 9}, spare=(*_TWICE, "proj.lora_task_embedding.", "proj.lora_gate."),
    ),
    _sample(
        "moelora", "MOELoRA (liuqidong07/MOELoRA-peft)", moelora, config={"peft_type": "MMOELORA"}, served=False,
        spare=_TWICE,
    ),
    _sample(
        "phatgoose", "PHATGOOSE (r-three/phatgoose)", phatgoose, rank="d_bottleneck", alpha=None,
        foreign={"lora_alpha": 16, "score_type": "cosine", "router_type": "hash", "topk_value": 99},
    ),
    _sample("chain", "XGBLoRA (loramux)", chain, rslora=True, foreign={"weights": [1]}),
    _sample("chain", "RAC-LoRA (loramux)", chain, config={"peft_type": "RACLORA"}, rslora=True),
    _sample("chain", "COLA (loramux)", chain, config={"peft_type": "COLA"}, rslora=True),
    Sample(
        "chain", "chain of LoRAs (loramux)", folders.make_config(peft_type="CHAIN"), rank=None, alpha=None,
        parts=("first", "second"), foreign={"lora_alpha": 8, "weights": ["1", 1]},
    ),
    Sample(
        "ensemble", "LoRA ensemble (loramux)", {"peft_type": "ENSEMBLE", "adapters": ["first", "second"]}, rank=None,
        alpha=None, parts=("first", "second"), foreign={"lora_alpha": 8, "weights": [1, 1]},
    ),
    Sample(
        "lorahub", "LoraHub (loramux)", folders.make_config(), rank=None, alpha=None, parts=("first", "second"),
        foreign={"lora_alpha": 8, "weights": [1]},
    ),
    _sample(
        "reslora", "ResLoRA (microsoft/LMOps)", reslora, file=reslora.CONFIG_FILE, rank="rank", foreign={"top_k": 2},
    ),
    _sample(
        "reslora", "ResLoRA (microsoft/LMOps)", reslora, config={"res_flag": 3}, file=reslora.CONFIG_FILE, rank="rank",
        served=False, foreign={"merge_flag": 4},
    ),
    _sample("mixlora", recognised.MIXLORA, moe_peft, config=recognised.MIXLORA_FIELDS, read=False, served=False),
    Sample("xlora", "X-LoRA (PEFT)", recognised.xlora_config(), lora.make_tensors, read=False, served=False),
    Sample("xlora", "X-LoRA (EricLBuehler/xlora)", {}, read=False, served=False, file="xlora_config.json"),
    Sample("milora", "MiLoRA, MiDoRA (loramux)", {"peft_type": "MILORA"}, read=False, served=False),
    Sample("mttl", "Arrow and others (microsoft/mttl)", {}, read=False, served=False, file="mttl_config.json"),
)  # fmt: skip
