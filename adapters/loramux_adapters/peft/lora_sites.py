"""PEFT's LoRA with more tensors at each module than its two factors: what methods that add to LoRA share."""

from collections.abc import Callable, Collection, Container, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from loramux_adapters.base_model import BaseModel
from loramux_adapters.files import AdapterFolder
from loramux_adapters.peft import checks, experts
from loramux_adapters.peft.config import LoraConfig
from loramux_adapters.peft.sites import Layout, Part, Sites, plain_name, read_sites
from loramux_adapters.peft.targets import Targets
from loramux_adapters.peft.tensors import PREFIX

FACTOR_A = Part(PREFIX + "{module}.lora_A.weight", "RI")
FACTOR_B = Part(PREFIX + "{module}.lora_B.weight", "OR")
FACTORS: Layout = {"a": FACTOR_A, "b": FACTOR_B}


@dataclass(frozen=True)
class LoraSites:
    """A checkpoint's tensors, and the alpha of each module that its config targets."""

    config: LoraConfig
    sites: Sites
    alphas: Mapping[str, float]

    def factor(self, module: str, rank: int) -> float:
        """s: α/r or α/√r."""
        return self.config.scale(rank, self.alphas[module])

    def scale(self, module: str, rank: int) -> torch.Tensor:
        """s for each rank, float32. Raises AdapterConfigInvalid if it is too small for that."""
        return checks.rank_scale(module, rank, self.alphas[module], self.factor(module, rank))


def read_lora_sites(
    folder: AdapterFolder,
    base: BaseModel,
    raw: Mapping[str, Any],
    own: Collection[str],
    layout: Layout,
    sizes: Callable[[str, int], Mapping[str, int]] = lambda module, rank: {},
    normalise: Callable[[str, Container[str]], str] = lambda name, adapted: plain_name(name),
) -> LoraSites:
    """Read the folder by PEFT's rules for LoRA.

    raw        its config, of which `own` fields are the caller's
    layout     the tensors of a module; R is its rank
    sizes      lengths of the layout's other letters at a module of this rank
    normalise  spells a tensor's name as the layout does; told the modules that the config targets, too
    """
    config = experts.parse_shared_fields(raw, own, raw.get("r", 0), absent=())
    targets = Targets(config)
    ranks, alphas = targets.resolve(base.linears)
    sites = read_sites(
        folder,
        base,
        config,
        layout,
        lambda module, _: {"R": ranks[module], **sizes(module, ranks[module])},
        count=1,
        targets=targets,
        normalise=lambda name: normalise(name, ranks),
    )
    return LoraSites(config, sites, alphas)
