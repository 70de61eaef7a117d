"""Plain LoRA as PEFT saves it (LoRA: arXiv 2106.09685; rsLoRA: arXiv 2312.03732).

    y_t = W0 x_t + s·B·A·x_t        s = α/r, or α/√r with `use_rslora`

A [r, d_in] and B [d_out, r] are stored like this for nn.Linear and for GPT-2's transposed Conv1D alike; r and α may
differ per module. Lowered: a = A, b = Bᵀ, scale = s in every rank.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any

import torch

from loramux_adapters.abilities import Abilities, Layout
from loramux_adapters.base_model import BaseModel
from loramux_adapters.files import AdapterFolder
from loramux_adapters.lowered import LoweredAdapter, LoweredSite
from loramux_adapters.peft import checks
from loramux_adapters.peft.config import LoraConfig, parse_config
from loramux_adapters.peft.targets import Targets
from loramux_adapters.peft.tensors import WEIGHTS_FILE, pair_factors
from loramux_adapters.verify import verify
from loramux_adapters.weights import open_weights

CONFIG_FILE = "adapter_config.json"


@dataclass(frozen=True)
class LoraModule:
    """One module's part of the checkpoint: A [r, d_in], B [d_out, r]."""

    a: torch.Tensor
    b: torch.Tensor
    alpha: float


@dataclass(frozen=True)
class LoraCheckpoint:
    config: LoraConfig
    modules: Mapping[str, LoraModule]
    warnings: tuple[str, ...]


class Lora:
    """PEFT's LORA without variants."""

    name = "lora"
    abilities = Abilities((Layout("LoRA, rsLoRA", "PEFT", ("LORA",)),), write=True)

    def detect(self, folder: AdapterFolder) -> bool:
        return variant(folder) is Variant.PLAIN

    def read(self, folder: AdapterFolder, base: BaseModel) -> LoraCheckpoint:
        config = parse_config(folder.read_json(CONFIG_FILE))
        checks.check_folder(folder)
        targets = Targets(config)
        with open_weights(folder, WEIGHTS_FILE) as weights:
            pairs = pair_factors(weights.tensors)
            checks.check_modules(pairs, targets, base, config.base_model)
            ranks = {module: targets.rank(module) for module in pairs}
            checks.check_shapes(pairs, weights.tensors, ranks, base, config.base_model)
            for pair in pairs.values():
                weights.check_dtype(pair.a)
                weights.check_dtype(pair.b)
            modules = {
                module: LoraModule(weights.read(pair.a), weights.read(pair.b), targets.alpha(module))
                for module, pair in sorted(pairs.items())
            }
        return LoraCheckpoint(config, modules, checks.collect_warnings(folder, config.base_model, targets, base))

    def lower(self, checkpoint: LoraCheckpoint, base: BaseModel) -> LoweredAdapter:
        sites = {}
        for module, part in checkpoint.modules.items():
            rank = part.a.shape[0]
            scale = checks.rank_scale(module, rank, part.alpha, checkpoint.config.scale(rank, part.alpha))
            sites[module] = LoweredSite(part.a, part.b.T.contiguous(), scale)
        return LoweredAdapter(self.name, sites, checkpoint.warnings)

    def verify(self, adapter: LoweredAdapter, base: BaseModel) -> None:
        verify(adapter, base)


class Variant(Enum):
    """The methods that PEFT's peft_type LORA stands for."""

    PLAIN = auto()
    DORA = auto()
    BIAS = auto()
    BLOB = auto()
    MONTECLORA = auto()


def variant(folder: AdapterFolder) -> Variant | None:
    """Which of PEFT's LoRAs the folder holds; None if it is something else."""
    config = peft_config(folder)
    # Forks of PEFT keep its type for their mixtures of experts; these fields tell them apart.
    fork = isinstance(config.get("r"), list) or config.get("lora_nums") or config.get("number_experts")
    if config.get("peft_type") != "LORA" or fork:
        return None
    if config.get("use_dora"):
        return Variant.DORA
    if config.get("bayes_eps") is not None:
        return Variant.BLOB
    if config.get("monteclora_config"):
        return Variant.MONTECLORA
    return (
        Variant.BIAS if config.get("lora_bias") or config.get("bias", "none") not in ("none", None) else Variant.PLAIN
    )


def peft_config(folder: AdapterFolder) -> dict[str, Any]:
    """The folder's adapter_config.json; empty for a single file or without it: none of PEFT's or its forks' layouts."""
    return folder.read_json(CONFIG_FILE) if folder.only is None and folder.has(CONFIG_FILE) else {}
