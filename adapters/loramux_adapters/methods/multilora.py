"""MultiLoRA: a sum of n LoRAs, each output of each scaled by a learned number (arXiv 2311.11501).

    y_t = W0 x_t + α/r · Σ_i s_i ⊙ (B_i · A_i · x_t)

A_i [r, d_in], B_i [d_out, r], s_i [d_out], i = 0 … n-1. Lowered to one LoRA of rank n·r: a = the A_i below each
other, b = the (s_i ⊙ B_i)ᵀ below each other in float32, scale = α/r.

The authors' code is not public. The tensors are those of a re-implementation, pUmpKin-Co/MTL-LoRA read at 7848a70
(`src/adapter/multilora.py`): stacked parameters `<module>.lora_A` [n, r, d_in], `<module>.lora_B` [n, d_out, r] and
`<module>.lora_scaling` [n, d_out], as it saves them in final_checkpoint.pt, with or without `module.` in front. It
was not found whether the paper's s_i is a vector, as there, or one number; the latter is the same number d_out times
over. It saves no config: write an adapter_config.json with `peft_type: "MULTILORA"`, `lora_num` = n, and `r`,
`lora_alpha` and `target_modules` as in PEFT.
"""

from dataclasses import dataclass

from loramux_adapters.abilities import Abilities, Layout
from loramux_adapters.base_model import BaseModel
from loramux_adapters.files import AdapterFolder
from loramux_adapters.fold import fold_outputs
from loramux_adapters.lowered import LoweredAdapter
from loramux_adapters.methods.lora import CONFIG_FILE, peft_config
from loramux_adapters.mixture import summed_site
from loramux_adapters.peft import checks, experts
from loramux_adapters.peft.sites import Part, Sites, read_sites
from loramux_adapters.verify import verify

_LAYOUT = {
    "a": Part("{module}.lora_A", "NRI"),
    "b": Part("{module}.lora_B", "NOR"),
    "s": Part("{module}.lora_scaling", "NO"),
}
# The second only says whether evaluation adds the same ΔW to the base's weights first.
_OWN_FIELDS = frozenset({"lora_num", "merge_weights"})
_HINT = "Give it as it was in training."


@dataclass(frozen=True)
class MultiLoraCheckpoint:
    sites: Sites
    rank: int
    alpha: float


class MultiLora:
    """The tensors of MTL-LoRA's MultiLoRA, in the folder that this module defines."""

    name = "multilora"
    abilities = Abilities(
        (
            Layout(
                "MultiLoRA",
                "pUmpKin-Co/MTL-LoRA",
                ("MULTILORA",),
                when="(our config beside its tensors)",
                keys=r".+\.lora_scaling",
            ),
        )
    )

    def detect(self, folder: AdapterFolder) -> bool:
        return peft_config(folder).get("peft_type") in self.abilities.types

    def read(self, folder: AdapterFolder, base: BaseModel) -> MultiLoraCheckpoint:
        raw = folder.read_json(CONFIG_FILE)
        rank, number = experts.count(raw, "r", _HINT), experts.count(raw, "lora_num", _HINT)
        config = experts.parse_shared_fields(raw, _OWN_FIELDS, rank)
        sizes = {"R": rank, "N": number}
        sites = read_sites(folder, base, config, _LAYOUT, sizes, count=1, normalise=_normalise)
        return MultiLoraCheckpoint(sites, rank, config.lora_alpha)

    def lower(self, checkpoint: MultiLoraCheckpoint, base: BaseModel) -> LoweredAdapter:
        sites = {}
        for module, part in checkpoint.sites.modules.items():
            (a,), (b,), (s,) = part["a"], part["b"], part["s"]
            folded = [fold_outputs(up, outputs) for up, outputs in zip(b, s, strict=True)]
            scale = checks.rank_scale(module, checkpoint.rank, checkpoint.alpha, checkpoint.alpha / checkpoint.rank)
            sites[module] = summed_site(a.unbind(), folded, [scale] * len(folded))
        return LoweredAdapter(self.name, sites, checkpoint.sites.warnings)

    def verify(self, adapter: LoweredAdapter, base: BaseModel) -> None:
        verify(adapter, base)


def _normalise(name: str) -> str:
    """Without the prefix of the wrapper for several devices."""
    return name.removeprefix("module.")
