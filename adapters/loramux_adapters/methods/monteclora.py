"""MonteCLoRA as PEFT saves it: a LoRA whose A was perturbed at random in training (arXiv 2411.04358).

    y_t = W0 x_t + s·B·A·x_t        s = α/r, or α/√r with `use_rslora`

PEFT (0.21, `tuners/lora/monteclora.py`) keeps the sampler's state beside the factors,
`<module>.lora_monteclora_sampler.std_prior` [r], `.expert_weights_prior` [N], `.gaussian_var_prior` [r, r] and
`.expert_weights` [N] with N = `monteclora_config.num_samples`. It samples in training only: at inference it computes a
plain LoRA, and so does this. The sampler's tensors are checked and left out, and a warning says so.
"""

from collections.abc import Mapping
from typing import Any

from loramux_adapters.abilities import Abilities, Layout
from loramux_adapters.base_model import BaseModel
from loramux_adapters.errors import AdapterConfigInvalid, shown
from loramux_adapters.files import AdapterFolder
from loramux_adapters.lowered import LoweredAdapter, LoweredSite
from loramux_adapters.methods.lora import CONFIG_FILE, Variant, variant
from loramux_adapters.peft import experts
from loramux_adapters.peft.config import refuse_unknown
from loramux_adapters.peft.lora_sites import FACTORS, LoraSites, read_lora_sites
from loramux_adapters.peft.sites import Part
from loramux_adapters.peft.tensors import PREFIX
from loramux_adapters.verify import verify

_SAMPLER = {
    name: Part(f"{PREFIX}{{module}}.lora_monteclora_sampler.{name}", axes, optional=True)
    for name, axes in {
        "std_prior": "R",
        "expert_weights_prior": "N",
        "gaussian_var_prior": "RR",
        "expert_weights": "N",
    }.items()
}
_SAMPLER_FIELDS = frozenset(
    {"num_samples", "use_entropy", "dirichlet_prior", "sample_scaler", "kl_loss_weight", "buffer_size"}
)


class MonteClora:
    """PEFT's LORA with `monteclora_config`."""

    name = "monteclora"
    abilities = Abilities(
        (
            Layout(
                "MonteCLoRA",
                "PEFT",
                ("LORA",),
                when="with `monteclora_config`",
                keys=r".+\.lora_monteclora_sampler\..+",
            ),
        )
    )

    def detect(self, folder: AdapterFolder) -> bool:
        return variant(folder) is Variant.MONTECLORA

    def read(self, folder: AdapterFolder, base: BaseModel) -> LoraSites:
        raw = folder.read_json(CONFIG_FILE)
        number = _samples(raw["monteclora_config"])
        return read_lora_sites(
            folder, base, raw, {"monteclora_config"}, {**FACTORS, **_SAMPLER}, lambda module, rank: {"N": number}
        )

    def lower(self, checkpoint: LoraSites, base: BaseModel) -> LoweredAdapter:
        sites = {}
        for module, part in checkpoint.sites.modules.items():
            (a,), (b,) = part["a"], part["b"]
            sites[module] = LoweredSite(a, b.T.contiguous(), checkpoint.scale(module, len(a)))
        left_out = sum(name in part for part in checkpoint.sites.modules.values() for name in _SAMPLER)
        warning = (
            f"MonteCLoRA samples in training only: {left_out} tensors of its sampler are left out, and a plain LoRA is "
            "served, as in PEFT."
        )
        return LoweredAdapter(self.name, sites, (*checkpoint.sites.warnings, warning))

    def verify(self, adapter: LoweredAdapter, base: BaseModel) -> None:
        verify(adapter, base)


def _samples(config: Any) -> int:
    if not isinstance(config, Mapping):
        raise AdapterConfigInvalid(
            f"adapter_config.json: monteclora_config is {shown(config)}, not an object.",
            hint="Save the adapter again with PEFT.",
            field="monteclora_config",
        )
    refuse_unknown(config, _SAMPLER_FIELDS)
    return experts.count(config, "num_samples", "Give it as it was in training.")
