"""ABMLL: LoRA meta-learned over tasks, with a posterior over the weights themselves (arXiv 2508.14285).

    ΔW = s·B·A + S ⊙ ε        S = form(B_σ·A_σ + c)        ε_oi ~ N(0, 1)        y_t = (W0 + ΔW) x_t

A [r, d_in] and B [d_out, r] are the mean of one task, A_σ [V, d_in] and B_σ [d_out, V] its standard deviations, which a
constant c is added to; form is the identity, softplus or exp. Lowered: the LoRA of the mean, and a posterior of kind
`hierarchical`. A draw has the mean's r ranks and q·(V + 1) more (`posterior/families.py`).

No code or checkpoint of the authors is public. What the paper leaves open, and is a reading here: "I" in σ = BA + cI is
a one in every place, as W is not square; the mean has LoRA's scale and σ has none; and inference draws ε once. The
format is ours: an adapter_config.json with `peft_type: "ABMLL"`, PEFT's LoRA fields and

    sigma_rank      V; r by default
    sigma_offset    c
    sigma_form      "linear" (default), "softplus" or "exp"; only draws of the first are made

with tensors `lora_A.weight`, `lora_B.weight`, `lora_A_sigma.weight` and `lora_B_sigma.weight`: one adapted task's. What
is shared by all tasks, and adapts to new ones, is no part of it.
"""

from dataclasses import dataclass

import torch

from loramux_adapters.abilities import OUR_READING, OURS, Abilities, Layout
from loramux_adapters.base_model import BaseModel
from loramux_adapters.files import AdapterFolder
from loramux_adapters.lowered import LoweredAdapter, LoweredSite
from loramux_adapters.methods.lora import CONFIG_FILE, peft_config
from loramux_adapters.peft import experts, fields
from loramux_adapters.peft.lora_sites import FACTORS, LoraSites, read_lora_sites
from loramux_adapters.peft.sites import Part
from loramux_adapters.peft.tensors import PREFIX
from loramux_adapters.variance import Variance, VarianceForm, VarianceKind
from loramux_adapters.verify import verify

_LAYOUT = {
    **FACTORS,
    "std_a": Part(PREFIX + "{module}.lora_A_sigma.weight", "VI"),
    "std_b": Part(PREFIX + "{module}.lora_B_sigma.weight", "OV"),
}
_FIELDS = frozenset({"sigma_rank", "sigma_offset", "sigma_form"})


@dataclass(frozen=True)
class AbmllCheckpoint:
    lora: LoraSites
    offset: float
    form: VarianceForm


class Abmll:
    """ABMLL in the format that this module defines."""

    name = "abmll"
    abilities = Abilities(
        (Layout("ABMLL", OURS, ("ABMLL",), keys=r".+\.lora_[AB]_sigma\..+"),),
        exact=OUR_READING,
        posterior=VarianceKind.HIERARCHICAL,
    )

    def detect(self, folder: AdapterFolder) -> bool:
        return peft_config(folder).get("peft_type") in self.abilities.types

    def read(self, folder: AdapterFolder, base: BaseModel) -> AbmllCheckpoint:
        raw = folder.read_json(CONFIG_FILE)
        offset = fields.number(raw, "sigma_offset")
        form = fields.choice(raw, "sigma_form", VarianceForm, VarianceForm.LINEAR)
        rank = None if raw.get("sigma_rank") is None else experts.count(raw, "sigma_rank", "Give the rank of σ.")
        lora = read_lora_sites(
            folder, base, raw, _FIELDS, _LAYOUT, lambda module, r: {"V": r if rank is None else rank}
        )
        return AbmllCheckpoint(lora, offset, form)

    def lower(self, checkpoint: AbmllCheckpoint, base: BaseModel) -> LoweredAdapter:
        sites, lora = {}, checkpoint.lora
        for module, part in lora.sites.modules.items():
            (a,), (b,), (std_a,), (std_b,) = (part[name] for name in ("a", "b", "std_a", "std_b"))
            tensors = {"std_a": std_a, "std_b": std_b.T.contiguous(), "offset": torch.tensor([checkpoint.offset])}
            variance = Variance(VarianceKind.HIERARCHICAL, tensors, form=checkpoint.form)
            sites[module] = LoweredSite(a, b.T.contiguous(), lora.scale(module, len(a)), variance=variance)
        return LoweredAdapter(self.name, sites, lora.sites.warnings)

    def verify(self, adapter: LoweredAdapter, base: BaseModel) -> None:
        verify(adapter, base)
