"""ScalaBL: a normal posterior over one number per rank (arXiv 2506.21408).

    A = diag(e)·V   e_j ~ N(exp(log_s_j), exp(log_s_sigma_j)²)   y_t = W0 x_t + s·B·A·x_t   s = α/r, or α/√r

V [r, d_in], log_s [r], log_s_sigma [r], B [d_out, r]. Lowered without rounding V or B: a = V, b = Bᵀ,
scale = s·exp(log_s), and a posterior of kind `rank_diagonal` with sigma_scale = |s|·exp(log_s_sigma).

Read in SRI-CSL/BayesAdapt at 3843000 (`lorawrappers/scalabl.py`). It saves the state dict of the wrapped PEFT model as
`state_dict.pt` and no config, so one has to be written: PEFT's LoRA fields with `peft_type: "SCALABL"`, and the tensors
as they are, in adapter_model.safetensors: `<module>.lora_A.default.Vh`, `.log_s`, `.log_s_sigma` and
`lora_B.default.weight`. Its prior, `log_p_mu` and `log_p_sigma`, may stay in the file and plays no part. It evaluates
with one e for each forward pass; here there is one for each draw.
"""

from loramux_adapters.abilities import Abilities, Layout
from loramux_adapters.base_model import BaseModel
from loramux_adapters.files import AdapterFolder
from loramux_adapters.fold import scales
from loramux_adapters.lowered import LoweredAdapter, LoweredSite
from loramux_adapters.methods.lora import CONFIG_FILE, peft_config
from loramux_adapters.peft.lora_sites import FACTOR_B, LoraSites, read_lora_sites
from loramux_adapters.peft.sites import Part
from loramux_adapters.peft.tensors import PREFIX
from loramux_adapters.variance import Variance, VarianceKind
from loramux_adapters.verify import verify

_LAYOUT = {
    "v": Part(PREFIX + "{module}.lora_A.Vh", "RI"),
    "log_s": Part(PREFIX + "{module}.lora_A.log_s", "R"),
    "log_sigma": Part(PREFIX + "{module}.lora_A.log_s_sigma", "R"),
    "prior_mean": Part(PREFIX + "{module}.lora_A.log_p_mu", "R", optional=True),
    "prior_sigma": Part(PREFIX + "{module}.lora_A.log_p_sigma", "R", optional=True),
    "b": FACTOR_B,
}


class Scalabl:
    """ScalaBL's tensors, with PEFT's config."""

    name = "scalabl"
    abilities = Abilities(
        (
            Layout(
                "ScalaBL",
                "SRI-CSL/BayesAdapt",
                ("SCALABL",),
                when="(our config beside its tensors)",
                keys=r".+\.lora_A\.([^.]+\.)?(Vh|log_s|log_s_sigma)",
            ),
        ),
        posterior=VarianceKind.RANK_DIAGONAL,
    )

    def detect(self, folder: AdapterFolder) -> bool:
        return peft_config(folder).get("peft_type") in self.abilities.types

    def read(self, folder: AdapterFolder, base: BaseModel) -> LoraSites:
        return read_lora_sites(folder, base, folder.read_json(CONFIG_FILE), (), _LAYOUT)

    def lower(self, checkpoint: LoraSites, base: BaseModel) -> LoweredAdapter:
        sites = {}
        for module, part in checkpoint.sites.modules.items():
            (v,), (log_s,), (log_sigma,), (b,) = (part[name] for name in ("v", "log_s", "log_sigma", "b"))
            alpha, factor = checkpoint.alphas[module], checkpoint.factor(module, len(v))
            sigma = scales(module, log_sigma.double().exp(), alpha, abs(factor))
            variance = Variance(VarianceKind.RANK_DIAGONAL, {"sigma_scale": sigma})
            scale = scales(module, log_s.double().exp(), alpha, factor)
            sites[module] = LoweredSite(v, b.T.contiguous(), scale, variance=variance)
        return LoweredAdapter(self.name, sites, checkpoint.sites.warnings)

    def verify(self, adapter: LoweredAdapter, base: BaseModel) -> None:
        verify(adapter, base)
