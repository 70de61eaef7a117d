"""SiRA: sparse mixture of LoRA experts, top-k with a limit on the tokens of each expert (arXiv 2311.09179).

    p = softmax(W_g x_t)      S = the k largest      g = p on S, divided by its sum there; 0 elsewhere
    y_t = W0 x_t + Σ_e g_e · (α/r) · B_e · A_e · x_t

A_e [r, d_in], B_e [d_out, r], W_g [E, d_in], a router per site. With a capacity C, an expert counts the tokens of a
sequence that chose it, in position order, and the C+1st and later ones lose its term; the other g_e stay as they are.

No code or checkpoint of the authors is public, and the paper's text was not available: where it attaches, whether g is
normalised, what C is at inference and what becomes of dropped tokens is not known here. The format is therefore ours:
an adapter_config.json with `peft_type: "SIRA"`, PEFT's LoRA fields and

    num_experts, top_k   required
    gate_norm            "renorm" (default) as above, or "softmax": p as it is
    capacity             null (default, no limit: training's limit balances load) or C, the tokens of each expert in one
                         sequence, prompt and answer together, at each router. An absolute number: what training derives
                         it from, a factor times k · tokens / E over a batch perhaps, is unknown when an answer begins

with tensors named like AdaMoLE's: `lora_A.{e}.weight`, `lora_B.{e}.weight`, `lora_gating.weight`. Expert dropout is for
training only.
"""

from dataclasses import dataclass

from loramux_adapters.abilities import OUR_READING, OURS, Abilities, Layout
from loramux_adapters.base_model import BaseModel
from loramux_adapters.files import AdapterFolder
from loramux_adapters.gate import Capacity, Gate, Norm, Select
from loramux_adapters.lowered import LoweredAdapter
from loramux_adapters.methods.lora import CONFIG_FILE, peft_config
from loramux_adapters.mixture import token_site
from loramux_adapters.peft import checks, experts
from loramux_adapters.peft.sites import Part, Sites, read_sites
from loramux_adapters.peft.tensors import PREFIX
from loramux_adapters.verify import verify

_LAYOUT = {
    "a": Part(PREFIX + "{module}.lora_A.{index}.weight", "RI"),
    "b": Part(PREFIX + "{module}.lora_B.{index}.weight", "OR"),
    "router": Part(PREFIX + "{module}.lora_gating.weight", "EI"),
}
_OWN_FIELDS = frozenset({"num_experts", "top_k", "gate_norm", "capacity", "expert_dropout"})
_HINT = "Give it as it was in training."


@dataclass(frozen=True)
class SiraCheckpoint:
    sites: Sites
    rank: int
    alpha: float
    top_k: int
    norm: Norm
    capacity: Capacity | None


class Sira:
    """SiRA in the format that this module defines."""

    name = "sira"
    abilities = Abilities(
        (Layout("SiRA", OURS, ("SIRA",), keys=r".+\.lora_gating\..+"),),
        exact=OUR_READING,
        router="token",
        prefix_cache="without `capacity`; with one every prompt is computed",
    )

    def detect(self, folder: AdapterFolder) -> bool:
        return peft_config(folder).get("peft_type") in self.abilities.types

    def read(self, folder: AdapterFolder, base: BaseModel) -> SiraCheckpoint:
        raw = folder.read_json(CONFIG_FILE)
        rank, number = experts.count(raw, "r", _HINT), experts.count(raw, "num_experts", _HINT)
        top_k, norm = experts.count(raw, "top_k", _HINT), experts.gate_norm(raw)
        experts.check_top_k(top_k, number, "every site")
        limit = (
            None if raw.get("capacity") is None else Capacity(experts.count(raw, "capacity", "Give a number or null."))
        )
        config = experts.parse_shared_fields(raw, _OWN_FIELDS, rank)
        sites = read_sites(folder, base, config, _LAYOUT, {"R": rank, "E": number}, count=number)
        return SiraCheckpoint(sites, rank, config.lora_alpha, top_k, norm, limit)

    def lower(self, checkpoint: SiraCheckpoint, base: BaseModel) -> LoweredAdapter:
        sites, gates = {}, {}
        for module, part in checkpoint.sites.modules.items():
            scale = checks.rank_scale(module, checkpoint.rank, checkpoint.alpha, checkpoint.alpha / checkpoint.rank)
            sites[module] = token_site(part["a"], part["b"], [scale] * len(part["b"]), gate=module)
            gates[module] = Gate(
                part["router"][0],
                select=Select.TOP_K,
                k=checkpoint.top_k,
                norm=checkpoint.norm,
                capacity=checkpoint.capacity,
            )
        return LoweredAdapter(self.name, sites, checkpoint.sites.warnings, gates=gates)

    def verify(self, adapter: LoweredAdapter, base: BaseModel) -> None:
        verify(adapter, base)
