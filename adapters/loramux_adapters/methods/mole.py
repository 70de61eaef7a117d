"""MoLE and AdaMoLE: mixtures of LoRA experts whose number of active experts is fixed or adapts (arXiv 2405.00361).

    p = softmax(W_g x_t)
    MOLE     g = the k largest of p, divided by their sum             with `top_k`
             g = p where p ≥ threshold, divided by their sum          with `threshold`; 0 if there is none
    ADAMOLE  w = max(p − τ, 0), g = w / Σ w                           τ = τ_max · σ(w_τ · x_t + b_τ); 0 if w is
    y_t = W0 x_t + Σ_e g_e · (α/r) · B_e · A_e · x_t

A_e [r, d_in], B_e [d_out, r], W_g [E, d_in], w_τ [1, d_in], b_τ [1]; a router per site that reads the site's own input.
τ_max is `max_threshold`, 1/E if that is null. w_τ is one more row of the router where it is served, so that E is at
most 15 for ADAMOLE and 16 for MOLE.

Names and fields are those of the authors' code (zefang-liu/AdaMoLE, read at 3b05d4a): `lora_A.{e}.weight`,
`lora_B.{e}.weight`, `lora_gating.weight`, `lora_threshold.{weight,bias}`, `lora_rank`, `num_experts`. Its files repeat
each factor as `moe_layer.experts.{e}.lora_{A,B}.weight`, which must agree. They are pickles and have to be converted.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from loramux_adapters.abilities import Abilities, Layout
from loramux_adapters.base_model import BaseModel
from loramux_adapters.errors import AdapterConfigInvalid, AdapterUnsupportedFeature, shown
from loramux_adapters.files import AdapterFolder
from loramux_adapters.gate import Gate, Norm, Select
from loramux_adapters.lowered import LoweredAdapter
from loramux_adapters.methods.lora import CONFIG_FILE, peft_config
from loramux_adapters.mixture import token_site
from loramux_adapters.peft import checks, experts
from loramux_adapters.peft.sites import Part, Sites, Tensors, read_sites
from loramux_adapters.peft.tensors import PREFIX
from loramux_adapters.verify import verify

_MOLE = {
    "a": Part(PREFIX + "{module}.lora_A.{index}.weight", "RI"),
    "b": Part(PREFIX + "{module}.lora_B.{index}.weight", "OR"),
    "router": Part(PREFIX + "{module}.lora_gating.weight", "EI"),
    "a again": Part(PREFIX + "{module}.moe_layer.experts.{index}.lora_A.weight", "RI", copy_of="a"),
    "b again": Part(PREFIX + "{module}.moe_layer.experts.{index}.lora_B.weight", "OR", copy_of="b"),
}
_ADAMOLE = _MOLE | {
    "threshold": Part(PREFIX + "{module}.lora_threshold.weight", "1I"),
    "threshold_bias": Part(PREFIX + "{module}.lora_threshold.bias", "1"),
}
_OWN_FIELDS = {"MOLE": ("top_k", "threshold"), "ADAMOLE": ("max_threshold",)}
_HINT = "Give it as it was in training."


@dataclass(frozen=True)
class MoleCheckpoint:
    """`selection`: the fields of the gate that choose experts."""

    sites: Sites
    rank: int
    alpha: float
    selection: Mapping[str, Any]


class Mole:
    """MOLE and ADAMOLE."""

    name = "mole"
    abilities = Abilities(
        (
            Layout("MoLE", "zefang-liu/AdaMoLE", ("MOLE",), keys=r".+\.(lora_gating|moe_layer)\..+"),
            Layout("AdaMoLE", "zefang-liu/AdaMoLE", ("ADAMOLE",), keys=r".+\.lora_threshold\..+"),
        ),
        router="token",
    )

    def detect(self, folder: AdapterFolder) -> bool:
        return peft_config(folder).get("peft_type") in self.abilities.types

    def read(self, folder: AdapterFolder, base: BaseModel) -> MoleCheckpoint:
        raw = folder.read_json(CONFIG_FILE)
        kind = str(raw["peft_type"])
        rank, number = experts.count(raw, "lora_rank", _HINT), experts.count(raw, "num_experts", _HINT)
        if "r" in raw:
            raise AdapterUnsupportedFeature(
                f"adapter_config.json: r is {shown(raw['r'])}, which this code base calls lora_rank.",
                hint="Remove the one that was not used in training.",
                field="r",
            )
        selection = _selection(raw, kind, number)
        config = experts.parse_shared_fields(raw, {"lora_rank", "num_experts", *_OWN_FIELDS[kind]}, rank)
        layout = _MOLE if kind == "MOLE" else _ADAMOLE
        sites = read_sites(folder, base, config, layout, {"R": rank, "E": number}, count=number)
        return MoleCheckpoint(sites, rank, config.lora_alpha, selection)

    def lower(self, checkpoint: MoleCheckpoint, base: BaseModel) -> LoweredAdapter:
        sites, gates = {}, {}
        for module, part in checkpoint.sites.modules.items():
            scale = checks.rank_scale(module, checkpoint.rank, checkpoint.alpha, checkpoint.alpha / checkpoint.rank)
            sites[module] = token_site(part["a"], part["b"], [scale] * len(part["b"]), gate=module)
            gates[module] = Gate(part["router"][0], norm=Norm.RENORM, **checkpoint.selection, **_threshold(part))
        return LoweredAdapter(self.name, sites, checkpoint.sites.warnings, gates=gates)

    def verify(self, adapter: LoweredAdapter, base: BaseModel) -> None:
        verify(adapter, base)


def _selection(raw: Mapping[str, Any], kind: str, number: int) -> dict[str, Any]:
    if kind == "ADAMOLE":
        tau_max = 1 / number if raw.get("max_threshold") is None else experts.share(raw, "max_threshold", _HINT)
        return {"select": Select.ADAPTIVE, "tau_max": tau_max}
    top_k, threshold = raw.get("top_k"), raw.get("threshold")
    if (top_k is None) == (threshold is None):
        raise AdapterConfigInvalid(
            f"adapter_config.json: top_k is {shown(top_k)} and threshold {shown(threshold)}.",
            hint="Give just one of them, as it was in training.",
            field="top_k",
        )
    if top_k is None:
        return {"select": Select.THRESHOLD, "threshold": experts.share(raw, "threshold", _HINT)}
    k = experts.count(raw, "top_k", _HINT)
    experts.check_top_k(k, number, "every site")
    return {"select": Select.TOP_K, "k": k}


def _threshold(part: Tensors) -> dict[str, Any]:
    if "threshold" not in part:
        return {}
    return {"adaptive_weight": part["threshold"][0][0], "adaptive_bias": part["threshold_bias"][0]}
