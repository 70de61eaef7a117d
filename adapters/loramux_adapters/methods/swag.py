"""SWAG-LoRA: mean and covariance of the weights along the last steps of training (arXiv 2405.03425).

    θ = mean + √c·σ ⊙ z + √(c/(K_max − 1)) · Σ_k z_k D_k        σ² = max(sq_mean − mean², 1e-30)

θ are A [r, d_in] and B [d_out, r] of all modules, and z_k one set of numbers for all of them; D_k are deviations from
the mean, K of them. y_t = W0 x_t + s·B·A·x_t. Lowered: the LoRA of the means, and a posterior of kind
`low_rank_diagonal`, or `diagonal_ab` without the deviations.

Read in fortuinlab/swag-lora at 82a188b (`SWAG.py`, `sample_fullrank`). It saves the state dict of its module as
`swag_model.pt`, with the base model in it and no config. Of that, adapter_model.safetensors needs the tensors whose
names end in `_mean`, `_sq_mean` and, with covariance, `_cov_mat_sqrt` [K, numbers of the factor], as they are: for
example `base.base_model.model.<module>.lora_A.default.weight_sq_mean`. The config is PEFT's LoRA with
`peft_type: "SWAG"` and, by the names of its options,

    n_models            how many weights were collected, the state dict's `n_models`
    swag_max_num_models K_max, 5 by default there; K is the smaller of both
    swag_cov_mat        whether there are deviations; true by default
    swag_sample_scale   c, which is chosen when it is evaluated: 1 by default, 0.5 in the paper of SWAG
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from loramux_adapters.abilities import Abilities, Layout
from loramux_adapters.base_model import BaseModel
from loramux_adapters.errors import AdapterConfigInvalid, shown
from loramux_adapters.files import AdapterFolder
from loramux_adapters.lowered import LoweredAdapter, LoweredSite
from loramux_adapters.methods.lora import CONFIG_FILE, peft_config
from loramux_adapters.peft import experts, fields
from loramux_adapters.peft.lora_sites import LoraSites, read_lora_sites
from loramux_adapters.peft.sites import Part, plain_name
from loramux_adapters.peft.tensors import PREFIX
from loramux_adapters.variance import Variance, VarianceKind
from loramux_adapters.verify import verify

_FACTORS = (("a", "A", "RI", "M"), ("b", "B", "OR", "N"))  # M and N: how many numbers a factor has
_MOMENTS = {
    f"{key}_{moment}": Part(f"{PREFIX}{{module}}.lora_{name}.weight_{moment}", axes)
    for key, name, axes, _ in _FACTORS
    for moment in ("mean", "sq_mean")
}
_DEVIATIONS = {
    f"{key}_cov": Part(f"{PREFIX}{{module}}.lora_{name}.weight_cov_mat_sqrt", f"K{count}")
    for key, name, _, count in _FACTORS
}
_FIELDS = frozenset({"n_models", "swag_max_num_models", "swag_cov_mat", "swag_sample_scale"})
_HINT = "Give it as it was in training."
_LEAST_VARIANCE = 1e-30


@dataclass(frozen=True)
class SwagCheckpoint:
    lora: LoraSites
    scale: float
    most: int


class Swag:
    """SWAG's moments of LoRA factors, with PEFT's config."""

    name = "swag"
    abilities = Abilities(
        (
            Layout(
                "SWAG-LoRA",
                "fortuinlab/swag-lora",
                ("SWAG",),
                when="(our config beside its tensors)",
                keys=r".+\.lora_[AB]\.([^.]+\.)?weight_(mean|sq_mean|cov_mat_sqrt)",
            ),
        ),
        posterior=VarianceKind.LOW_RANK_DIAGONAL,
    )

    def detect(self, folder: AdapterFolder) -> bool:
        return peft_config(folder).get("peft_type") in self.abilities.types

    def read(self, folder: AdapterFolder, base: BaseModel) -> SwagCheckpoint:
        raw = folder.read_json(CONFIG_FILE)
        models, most, covariance = _collected(raw)
        scale = fields.number(raw, "swag_sample_scale", above=0, default=1.0)

        def sizes(module: str, rank: int) -> Mapping[str, int]:
            d_in, d_out = base.linears[module]
            return {"K": min(models, most), "M": rank * d_in, "N": rank * d_out}

        layout = _MOMENTS | (_DEVIATIONS if covariance else {})
        lora = read_lora_sites(folder, base, raw, _FIELDS, layout, sizes, normalise=_plain_name)
        return SwagCheckpoint(lora, scale, most)

    def lower(self, checkpoint: SwagCheckpoint, base: BaseModel) -> LoweredAdapter:
        sites, lora = {}, checkpoint.lora
        for module, part in lora.sites.modules.items():
            (a,), (b,) = part["a_mean"], part["b_mean"]
            tensors = {}
            for key, mean in (("a", a), ("b", b)):
                spread = (part[f"{key}_sq_mean"][0].double() - mean.double().square()).clamp(min=_LEAST_VARIANCE)
                tensors[f"sigma_{key}"] = (checkpoint.scale * spread).sqrt().float()
                if f"{key}_cov" in part:
                    factor = (checkpoint.scale / (checkpoint.most - 1)) ** 0.5
                    deviations = part[f"{key}_cov"][0].double() * factor
                    tensors[f"low_rank_{key}"] = deviations.float().view(-1, *mean.shape)
            # B is kept transposed, and so is what belongs to it.
            tensors = {name: t.mT.contiguous() if name.endswith("b") else t for name, t in tensors.items()}
            kind = VarianceKind.LOW_RANK_DIAGONAL if "low_rank_a" in tensors else VarianceKind.DIAGONAL_AB
            variance = Variance(kind, tensors)
            sites[module] = LoweredSite(a, b.T.contiguous(), lora.scale(module, len(a)), variance=variance)
        return LoweredAdapter(self.name, sites, lora.sites.warnings)

    def verify(self, adapter: LoweredAdapter, base: BaseModel) -> None:
        verify(adapter, base)


def _plain_name(name: str, _: object) -> str:
    return plain_name(name.removeprefix("base."))


def _collected(raw: Mapping[str, Any]) -> tuple[int, int, bool]:
    """How many weights were collected, how many deviations are kept at most, and whether any are."""
    models, most = experts.count(raw, "n_models", _HINT), experts.count(raw, "swag_max_num_models", _HINT)
    covariance = fields.flag(raw, "swag_cov_mat", default=True)
    if covariance and most < 2:
        raise AdapterConfigInvalid(
            f"adapter_config.json: swag_max_num_models is {shown(most)}, and one less is divided by.",
            hint="Give it as it was in training, or swag_cov_mat false.",
            field="swag_max_num_models",
        )
    return models, most, covariance
