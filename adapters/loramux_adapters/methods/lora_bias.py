"""LoRA with a bias on B, PEFT's `lora_bias` (LoRA: arXiv 2106.09685).

    y_t = W0 x_t + s · (B · A · x_t + β)        s = α/r, or α/√r with `use_rslora`

A [r, d_in], B [d_out, r], β [d_out]: `lora_B.bias` beside PEFT's other names. β is scaled like the rest, so it lowers
to bias = s·β in float32 beside the plain a, b and scale. Whether the base's layer has a bias itself does not matter.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from loramux_adapters.abilities import Abilities
from loramux_adapters.base_model import BaseModel
from loramux_adapters.errors import AdapterConfigInvalid, shown
from loramux_adapters.files import AdapterFolder
from loramux_adapters.fold import scales
from loramux_adapters.lowered import LoweredAdapter, LoweredSite
from loramux_adapters.methods.lora import CONFIG_FILE, peft_config
from loramux_adapters.peft import checks, experts
from loramux_adapters.peft.config import LoraConfig
from loramux_adapters.peft.sites import Part, Sites, read_sites
from loramux_adapters.peft.targets import Targets
from loramux_adapters.peft.tensors import PREFIX
from loramux_adapters.verify import verify

_LAYOUT = {
    "a": Part(PREFIX + "{module}.lora_A.weight", "RI"),
    "b": Part(PREFIX + "{module}.lora_B.weight", "OR"),
    "bias": Part(PREFIX + "{module}.lora_B.bias", "O"),
}


@dataclass(frozen=True)
class LoraBiasCheckpoint:
    config: LoraConfig
    sites: Sites
    alphas: Mapping[str, float]


class LoraBias:
    """PEFT's LORA with `lora_bias`."""

    name = "lora_bias"
    abilities = Abilities(read="a PEFT folder with peft_type LORA and lora_bias", serve="not yet: the output bias")

    def detect(self, folder: AdapterFolder) -> bool:
        raw = peft_config(folder)
        return raw.get("peft_type") == "LORA" and bool(raw.get("lora_bias"))

    def read(self, folder: AdapterFolder, base: BaseModel) -> LoraBiasCheckpoint:
        raw = folder.read_json(CONFIG_FILE)
        if raw["lora_bias"] is not True:
            raise AdapterConfigInvalid(
                f"adapter_config.json: lora_bias must be true or false, not {shown(raw['lora_bias'])}.",
                hint="Correct the field as it was in training.",
                field="lora_bias",
            )
        # PEFT refuses the two together.
        config = experts.parse_shared_fields(raw, {"lora_bias"}, raw.get("r", 0), absent=("use_dora",))
        targets = Targets(config)
        modules = targets.select(base.linears)
        ranks = {module: targets.rank(module) for module in modules}
        alphas = {module: targets.alpha(module) for module in modules}
        sites = read_sites(
            folder, base, config, _LAYOUT, lambda module, _: {"R": ranks[module]}, count=1, targets=targets
        )
        return LoraBiasCheckpoint(config, sites, alphas)

    def lower(self, checkpoint: LoraBiasCheckpoint, base: BaseModel) -> LoweredAdapter:
        sites = {}
        for module, part in checkpoint.sites.modules.items():
            (a,), (b,), (bias,) = part["a"], part["b"], part["bias"]
            alpha = checkpoint.alphas[module]
            factor = checkpoint.config.scale(len(a), alpha)
            scale = checks.rank_scale(module, len(a), alpha, factor)
            sites[module] = LoweredSite(a, b.T.contiguous(), scale, bias=scales(module, bias, alpha, factor))
        return LoweredAdapter(self.name, sites, checkpoint.sites.warnings)

    def verify(self, adapter: LoweredAdapter, base: BaseModel) -> None:
        verify(adapter, base)
