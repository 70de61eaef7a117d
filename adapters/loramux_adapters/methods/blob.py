"""BLoB: Bayesian LoRA by backpropagation, a normal posterior over A (arXiv 2406.11675).

    A ~ N(M, diag(σ²))        y_t = W0 x_t + s·B·A·x_t        s = α/r, or α/√r with `use_rslora`

M [r, d_in], σ [r, d_in], B [d_out, r]. Lowered: the LoRA of M and B, which answers ordinary requests, and σ as a
posterior of kind `diagonal_a`.

Read in Wang-ML-Lab/bayesian-peft at bc6a4a7 (`modelwrappers/blob.py`), whose `save_pretrained` leaves a PEFT LoRA with
`<module>.lora_A_rho` [r, d_in] beside `lora_A.weight`, which is M; and in SRI-CSL/BayesAdapt at 3843000
(`lorawrappers/blob.py`), whose state dict has `<module>.lora_A.default.lora_A_rho`. How σ is made of ρ depends on an
option of the command line that no file keeps, `--bayes-eps`:

    bayes_eps ≥ 0 (0.05 by default; always in BayesAdapt)    σ = ρ²
    bayes_eps < 0                                            σ = log(1 + exp ρ)

So `bayes_eps` must be added to adapter_config.json; without it the adapter is refused. Both evaluate with other signs
of the noise for every token (flip-out); here a draw is one A for all tokens, which is the posterior's own law.
"""

from dataclasses import dataclass

import torch

from loramux_adapters.abilities import Abilities, Layout
from loramux_adapters.base_model import BaseModel
from loramux_adapters.files import AdapterFolder
from loramux_adapters.lowered import LoweredAdapter, LoweredSite
from loramux_adapters.methods.lora import CONFIG_FILE, Variant, variant
from loramux_adapters.peft import fields
from loramux_adapters.peft.lora_sites import FACTORS, LoraSites, read_lora_sites
from loramux_adapters.peft.sites import Part, plain_name
from loramux_adapters.peft.tensors import PREFIX
from loramux_adapters.variance import Variance, VarianceKind
from loramux_adapters.verify import verify

_LAYOUT = {**FACTORS, "rho": Part(PREFIX + "{module}.lora_A_rho", "RI")}


@dataclass(frozen=True)
class BlobCheckpoint:
    lora: LoraSites
    squared: bool


class Blob:
    """PEFT's LORA with `lora_A_rho` beside A, and `bayes_eps` added to its config."""

    name = "blob"
    abilities = Abilities(
        (
            Layout(
                "BLoB",
                "Wang-ML-Lab/bayesian-peft and SRI-CSL/BayesAdapt",
                ("LORA",),
                when="with `bayes_eps` added",
                keys=r".+\.lora_A_rho(\.[^.]+)?",
            ),
        ),
        posterior=VarianceKind.DIAGONAL_A,
    )

    def detect(self, folder: AdapterFolder) -> bool:
        return variant(folder) is Variant.BLOB

    def read(self, folder: AdapterFolder, base: BaseModel) -> BlobCheckpoint:
        raw = folder.read_json(CONFIG_FILE)
        squared = fields.number(raw, "bayes_eps") >= 0
        lora = read_lora_sites(folder, base, raw, {"bayes_eps"}, _LAYOUT, normalise=_plain_name)
        return BlobCheckpoint(lora, squared)

    def lower(self, checkpoint: BlobCheckpoint, base: BaseModel) -> LoweredAdapter:
        sites, lora = {}, checkpoint.lora
        negative = []
        for module, part in lora.sites.modules.items():
            (a,), (b,), (rho,) = part["a"], part["b"], part["rho"]
            negative.append(float((rho < 0).double().mean()))
            sigma = rho.float().square() if checkpoint.squared else torch.nn.functional.softplus(rho.double()).float()
            variance = Variance(VarianceKind.DIAGONAL_A, {"sigma_a": sigma})
            sites[module] = LoweredSite(a, b.T.contiguous(), lora.scale(module, len(a)), variance=variance)
        warnings = lora.sites.warnings
        if checkpoint.squared and sum(negative) > len(negative) / 2:
            warnings += (
                "Most of lora_A_rho is negative, as where σ = log(1 + exp ρ); bayes_eps says σ = ρ². Was it below 0?",
            )
        return LoweredAdapter(self.name, sites, warnings)

    def verify(self, adapter: LoweredAdapter, base: BaseModel) -> None:
        verify(adapter, base)


def _plain_name(name: str, _: object) -> str:
    return plain_name(name).replace(".lora_A.lora_A_rho", ".lora_A_rho")
