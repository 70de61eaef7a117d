"""MC-dropout: dropout on a LoRA's input, kept at inference (arXiv 1506.02142).

    y_t = W0 x_t + s·B·A·(m ⊙ x_t) / (1 − p)        m_i ~ Bernoulli(1 − p)        s = α/r, or α/√r with `use_rslora`

A [r, d_in], B [d_out, r]. A mask is one weight draw, A·diag(m)/(1 − p), and so one for all tokens of all sequences that
use the draw; each module has its own. Where code drops out for each token anew (Wang-ML-Lab/bayesian-peft and
SRI-CSL/BayesAdapt, `mcdropout.py`), single tokens have the same law, but not two of them.

The files are PEFT's of any LoRA that was trained with dropout. That it is meant to be sampled is said by
`peft_type: "MCDROPOUT"` in its config; p is PEFT's `lora_dropout`. Lowered: the LoRA, and a posterior of kind
`dropout`.
"""

from dataclasses import dataclass

from loramux_adapters.abilities import OURS, Abilities, Layout
from loramux_adapters.base_model import BaseModel
from loramux_adapters.files import AdapterFolder
from loramux_adapters.lowered import LoweredAdapter, LoweredSite
from loramux_adapters.methods.lora import CONFIG_FILE, peft_config
from loramux_adapters.peft import fields
from loramux_adapters.peft.lora_sites import FACTORS, LoraSites, read_lora_sites
from loramux_adapters.variance import Variance, VarianceKind
from loramux_adapters.verify import verify


@dataclass(frozen=True)
class McDropoutCheckpoint:
    lora: LoraSites
    rate: float


class McDropout:
    """PEFT's LoRA that is to be sampled by dropout."""

    name = "mcdropout"
    abilities = Abilities((Layout("MC-dropout", OURS, ("MCDROPOUT",)),), posterior=VarianceKind.DROPOUT)

    def detect(self, folder: AdapterFolder) -> bool:
        return peft_config(folder).get("peft_type") in self.abilities.types

    def read(self, folder: AdapterFolder, base: BaseModel) -> McDropoutCheckpoint:
        raw = folder.read_json(CONFIG_FILE)
        rate = fields.number(raw, "lora_dropout", above=0, below=1)
        return McDropoutCheckpoint(read_lora_sites(folder, base, raw, (), FACTORS), rate)

    def lower(self, checkpoint: McDropoutCheckpoint, base: BaseModel) -> LoweredAdapter:
        sites, lora = {}, checkpoint.lora
        for module, part in lora.sites.modules.items():
            (a,), (b,) = part["a"], part["b"]
            variance = Variance(VarianceKind.DROPOUT, rate=checkpoint.rate)
            sites[module] = LoweredSite(a, b.T.contiguous(), lora.scale(module, len(a)), variance=variance)
        return LoweredAdapter(self.name, sites, lora.sites.warnings)

    def verify(self, adapter: LoweredAdapter, base: BaseModel) -> None:
        verify(adapter, base)
