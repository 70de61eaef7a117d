"""HydraLoRA: one A, several B, and a softmax over them for every token (arXiv 2404.19245).

    g = softmax(W_r x_t) in float32
    y_t = W0 x_t + (α/r) · Σ_i g_i · B_i · A · x_t

A [r, d_in], B_i [d_out, r], W_r [N, d_in]. Lowered with A stored once: rank row j of expert i reads row j of A.

The layers are those of the authors' code (Clin0212/HydraLoRA, read at 5c08a78): `lora_A`, `lora_B{i}`, `lora_route`,
and the config field `lora_nums`. That its files put `base_model.model.` before the module's name, as PEFT of that
time did, could not be confirmed from its source; names without it are read too.
"""

from dataclasses import dataclass

from loramux_adapters.abilities import Abilities, Layout
from loramux_adapters.base_model import BaseModel
from loramux_adapters.files import AdapterFolder
from loramux_adapters.gate import Gate, Norm, Select
from loramux_adapters.lowered import LoweredAdapter
from loramux_adapters.methods.lora import CONFIG_FILE, peft_config
from loramux_adapters.mixture import token_site
from loramux_adapters.peft import checks, experts
from loramux_adapters.peft.sites import Part, Sites, read_sites
from loramux_adapters.peft.tensors import PREFIX
from loramux_adapters.verify import verify

_LAYOUT = {
    "a": Part(PREFIX + "{module}.lora_A.weight", "RI"),
    "b": Part(PREFIX + "{module}.lora_B{index}.weight", "OR"),
    "router": Part(PREFIX + "{module}.lora_route.weight", "EI"),
}
# Beside `lora_nums`: weights of a training loss, and a switch that its forward pass does not read.
_OWN_FIELDS = frozenset({"lora_nums", "blc_alpha", "blc_weight", "merge_weights"})
_HINT = "Give it as it was in training."


@dataclass(frozen=True)
class HydraLoraCheckpoint:
    sites: Sites
    rank: int
    alpha: float


class HydraLora:
    """The layout of HydraLoRA's authors."""

    name = "hydralora"
    abilities = Abilities(
        (
            Layout(
                "HydraLoRA",
                "Clin0212/HydraLoRA",
                ("LORA",),
                when="with `lora_nums`",
                keys=r".+\.(lora_route|lora_B\d+)\.weight",
            ),
        ),
        router="token",
    )

    def detect(self, folder: AdapterFolder) -> bool:
        raw = peft_config(folder)
        return raw.get("peft_type") == "LORA" and bool(raw.get("lora_nums"))

    def read(self, folder: AdapterFolder, base: BaseModel) -> HydraLoraCheckpoint:
        raw = folder.read_json(CONFIG_FILE)
        rank, number = experts.count(raw, "r", _HINT), experts.count(raw, "lora_nums", _HINT)
        config = experts.parse_shared_fields(raw, _OWN_FIELDS, rank)
        sites = read_sites(folder, base, config, _LAYOUT, {"R": rank, "E": number}, count=number)
        return HydraLoraCheckpoint(sites, rank, config.lora_alpha)

    def lower(self, checkpoint: HydraLoraCheckpoint, base: BaseModel) -> LoweredAdapter:
        sites, gates = {}, {}
        for module, part in checkpoint.sites.modules.items():
            scale = checks.rank_scale(module, checkpoint.rank, checkpoint.alpha, checkpoint.alpha / checkpoint.rank)
            sites[module] = token_site(part["a"], part["b"], [scale] * len(part["b"]), gate=module)
            gates[module] = Gate(part["router"][0], select=Select.ALL, norm=Norm.SOFTMAX)
        return LoweredAdapter(self.name, sites, checkpoint.sites.warnings, gates=gates)

    def verify(self, adapter: LoweredAdapter, base: BaseModel) -> None:
        verify(adapter, base)
