"""MALoRA: experts whose A's lie in one shared subspace (arXiv 2410.22782).

    A_e = P_e · S         g = the k largest of softmax(W_g x_t), divided by their sum; 0 elsewhere
    y_t = W0 x_t + Σ_e g_e · (α/r) · B_e · P_e · S · x_t

S [s, d_in] for all experts, P_e [r, s], B_e [d_out, r], W_g [E, d_in]. Lowered as experts (P_e S, B_e) of rank r or as
experts (S, B_e P_e) of rank s over one stored S: whichever has the smaller rank, and the second if equal, for it keeps
fewer rows. The product is made in float64 and stored in float32, the other factor as it is in the file.

No code of the authors is public, and only the paper's abstract and a figure's caption were available: the gate's k and
norm, the scale and the attach points are the most likely reading (a third party's implementation, godofwar1007/MALoRA
read at d240572, has the same product and leaves the scale free). The format is ours: an adapter_config.json with
`peft_type: "MALORA"`, PEFT's LoRA fields with r the rank of P_e and B_e, and

    shared_rank          s, required
    num_experts, top_k   required
    gate_norm            "renorm" (default) as above, or "softmax": not divided by their sum

with tensors `lora_S.weight`, `lora_P.{e}.weight`, `lora_B.{e}.weight`, `lora_gating.weight`.
"""

from dataclasses import dataclass

import torch

from loramux_adapters.abilities import OUR_READING, OURS, Abilities, Layout
from loramux_adapters.base_model import BaseModel
from loramux_adapters.files import AdapterFolder
from loramux_adapters.fold import check_lowered_size
from loramux_adapters.gate import Gate, Norm, Select
from loramux_adapters.lowered import LoweredAdapter
from loramux_adapters.methods.lora import CONFIG_FILE, peft_config
from loramux_adapters.mixture import token_site
from loramux_adapters.peft import checks, experts
from loramux_adapters.peft.sites import Part, Sites, Tensors, read_sites
from loramux_adapters.peft.tensors import PREFIX
from loramux_adapters.verify import verify

_LAYOUT = {
    "s": Part(PREFIX + "{module}.lora_S.weight", "SI"),
    "p": Part(PREFIX + "{module}.lora_P.{index}.weight", "RS"),
    "b": Part(PREFIX + "{module}.lora_B.{index}.weight", "OR"),
    "router": Part(PREFIX + "{module}.lora_gating.weight", "EI"),
}
_OWN_FIELDS = frozenset({"shared_rank", "num_experts", "top_k", "gate_norm"})
_HINT = "Give it as it was in training."


@dataclass(frozen=True)
class MaloraCheckpoint:
    sites: Sites
    rank: int
    shared_rank: int
    alpha: float
    top_k: int
    norm: Norm


class Malora:
    """MALoRA in the format that this module defines."""

    name = "malora"
    abilities = Abilities(
        (Layout("MALoRA", OURS, ("MALORA",), keys=r".+\.(lora_gating\.weight|lora_S\.weight|lora_P\.\d+\.weight)"),),
        exact=OUR_READING,
        router="token",
    )

    def detect(self, folder: AdapterFolder) -> bool:
        return peft_config(folder).get("peft_type") in self.abilities.types

    def read(self, folder: AdapterFolder, base: BaseModel) -> MaloraCheckpoint:
        raw = folder.read_json(CONFIG_FILE)
        rank, shared = experts.count(raw, "r", _HINT), experts.count(raw, "shared_rank", _HINT)
        number, top_k = experts.count(raw, "num_experts", _HINT), experts.count(raw, "top_k", _HINT)
        experts.check_top_k(top_k, number, "every site")
        config = experts.parse_shared_fields(raw, _OWN_FIELDS, rank)
        sizes = {"R": rank, "S": shared, "E": number}
        sites = read_sites(folder, base, config, _LAYOUT, sizes, count=number)
        check_lowered_size(dict.fromkeys(sites.modules, number * min(rank, shared)), base, folder.max_bytes)
        return MaloraCheckpoint(sites, rank, shared, config.lora_alpha, top_k, experts.gate_norm(raw))

    def lower(self, checkpoint: MaloraCheckpoint, base: BaseModel) -> LoweredAdapter:
        sites, gates = {}, {}
        for module, part in checkpoint.sites.modules.items():
            a, b = _folded(part, share_rows=checkpoint.shared_rank <= checkpoint.rank)
            scale = checks.rank_scale(module, b[0].shape[1], checkpoint.alpha, checkpoint.alpha / checkpoint.rank)
            sites[module] = token_site(a, b, [scale] * len(b), gate=module)
            gates[module] = Gate(part["router"][0], select=Select.TOP_K, k=checkpoint.top_k, norm=checkpoint.norm)
        return LoweredAdapter(self.name, sites, checkpoint.sites.warnings, gates=gates)

    def verify(self, adapter: LoweredAdapter, base: BaseModel) -> None:
        verify(adapter, base)


def _folded(part: Tensors, share_rows: bool) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
    """The experts' A's, or their one shared A, and their B's."""
    if share_rows:
        return part["s"], tuple((b.double() @ p.double()).float() for b, p in zip(part["b"], part["p"], strict=True))
    return tuple((p.double() @ part["s"][0].double()).float() for p in part["p"]), part["b"]
