"""IVON-LoRA: a normal posterior over A and B from the optimiser IVON (arXiv 2411.04421).

    A ~ N(M_A, diag(σ_A²))   B ~ N(M_B, diag(σ_B²))   σ = 1 / √(ess · (h + δ))   y_t = W0 x_t + s·B·A·x_t

h is the optimiser's estimate of the Hessian, a number for every weight; ess its effective sample size; δ its weight
decay (`ivon/_ivon.py` of ivon-opt 0.1.3). team-approx-bayes/ivon-lora (read at 043ce23) saves the means alone, as a
PEFT LoRA. So the format is ours: PEFT's files with `peft_type: "IVON"` and

    ess, weight_decay   as they were in training; both in the config
    <module>.lora_A.hess [r, d_in], <module>.lora_B.hess [d_out, r]      h, beside `lora_A.weight` and `lora_B.weight`

The optimiser keeps h in one vector, in the order of its parameters. This takes it apart:

    group, begin = optimizer.param_groups[0], 0
    for name, p in model.named_parameters():       # the model whose parameters the optimiser was given
        if p.requires_grad:                        # the order in which it was
            h = group["hess"][begin : begin + p.numel()].view(p.shape)
            tensors[name.replace(".default.weight", ".hess")] = h.clone()
            begin += p.numel()

Lowered: the LoRA of the means, and a posterior of kind `diagonal_ab`.
"""

from dataclasses import dataclass

import torch

from loramux_adapters.abilities import OURS, Abilities, Layout
from loramux_adapters.base_model import BaseModel
from loramux_adapters.errors import AdapterConfigInvalid, shown
from loramux_adapters.files import AdapterFolder
from loramux_adapters.lowered import LoweredAdapter, LoweredSite
from loramux_adapters.methods.lora import CONFIG_FILE, peft_config
from loramux_adapters.peft import fields
from loramux_adapters.peft.lora_sites import FACTORS, LoraSites, read_lora_sites
from loramux_adapters.peft.sites import Part
from loramux_adapters.peft.tensors import PREFIX
from loramux_adapters.variance import Variance, VarianceKind
from loramux_adapters.verify import verify

_LAYOUT = {
    **FACTORS,
    "hess_a": Part(PREFIX + "{module}.lora_A.hess", "RI"),
    "hess_b": Part(PREFIX + "{module}.lora_B.hess", "OR"),
}
_FIELDS = frozenset({"ess", "weight_decay"})


@dataclass(frozen=True)
class IvonCheckpoint:
    lora: LoraSites
    ess: float
    weight_decay: float


class Ivon:
    """IVON in the format that this module defines."""

    name = "ivon"
    abilities = Abilities(
        (Layout("IVON-LoRA", OURS, ("IVON",), keys=r".+\.lora_[AB]\.([^.]+\.)?hess"),),
        posterior=VarianceKind.DIAGONAL_AB,
    )

    def detect(self, folder: AdapterFolder) -> bool:
        return peft_config(folder).get("peft_type") in self.abilities.types

    def read(self, folder: AdapterFolder, base: BaseModel) -> IvonCheckpoint:
        raw = folder.read_json(CONFIG_FILE)
        ess = fields.number(raw, "ess", above=0)
        weight_decay = fields.number(raw, "weight_decay", least=0)
        return IvonCheckpoint(read_lora_sites(folder, base, raw, _FIELDS, _LAYOUT), ess, weight_decay)

    def lower(self, checkpoint: IvonCheckpoint, base: BaseModel) -> LoweredAdapter:
        sites, lora = {}, checkpoint.lora
        for module, part in lora.sites.modules.items():
            (a,), (b,) = part["a"], part["b"]
            sigmas = {
                "sigma_a": _sigma(_LAYOUT["hess_a"].template.format(module=module), part["hess_a"][0], checkpoint),
                "sigma_b": _sigma(_LAYOUT["hess_b"].template.format(module=module), part["hess_b"][0], checkpoint).T,
            }
            variance = Variance(VarianceKind.DIAGONAL_AB, {name: sigma.contiguous() for name, sigma in sigmas.items()})
            sites[module] = LoweredSite(a, b.T.contiguous(), lora.scale(module, len(a)), variance=variance)
        return LoweredAdapter(self.name, sites, lora.sites.warnings)

    def verify(self, adapter: LoweredAdapter, base: BaseModel) -> None:
        verify(adapter, base)


def _sigma(name: str, hess: torch.Tensor, checkpoint: IvonCheckpoint) -> torch.Tensor:
    precision = checkpoint.ess * (hess.double() + checkpoint.weight_decay)
    if bool((precision <= 0).any()):
        raise AdapterConfigInvalid(
            f"Tensor {shown(name)} and weight_decay give a variance that is not positive: 1 / "
            f"{float(precision.min()):g}.",
            hint="h + weight_decay is above 0 in IVON: save both of one and the same step.",
            field=name,
        )
    return precision.rsqrt().float()
