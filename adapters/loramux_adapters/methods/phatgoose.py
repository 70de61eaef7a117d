"""PHATGOOSE: LoRAs that were trained apart, each with a gate vector, mixed per token (arXiv 2402.05859).

    l_e = LN(v_e) · LN(x_t) / √d_in      p = softmax(l)      S = the k largest      g = p on S / (Σ_S p + 1e-6)
    y_t = W0 x_t + Σ_e g_e · s · B_e · A_e · x_t              s = 1/r; 1 without `divide_by_d_bottleneck`

LN without affine part, its eps 1e-5. `layer1__e` [d_in, r] is A_eᵀ, `layer2__e` [r, d_out] is B_eᵀ,
`expert_embeddings__e` [d_in] is v_e. Lowered with w_e = LN(v_e)/√d_in, made in float64 and stored in float32, for the
router. With mean μ_t and variance σ²_t of x_t over its inputs

    l_e = (w_e · x_t − μ_t Σ_i w_ei) / √(σ²_t + 1e-5)

so that w_e · x_t is one more row of the shrink, as in other mixtures. Σ_i w_ei is 0 but for the rounding of w to the
dtype that is served, which counts where |μ| is large: the data plane sums the rows up as it stores them.

Names are those of the authors' code (r-three/phatgoose, read at 1d23ac4): `<module>._addons.expert_lora.layer1__{e}`,
`<module>._addons.router.expert_embeddings__{e}`. Its files are pickles without a config (its settings are in gin
files), so the adapter_config.json is ours: `peft_type: "PHATGOOSE"`, PEFT's `target_modules`, and under their names in
gin

    d_bottleneck             r, required
    num_experts              E, required
    topk_value               k, 2 by default as in the paper
    divide_by_d_bottleneck   true by default as in all of its published settings
    epsilon                  1e-6 by default
    normalize_topk, scaling_scores, score_type, router_norm_type, router_type
                             only true, true, "original", "layer_norm", "smear": the paper's

The embedding tables that its files hold too have to be left out.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import layer_norm

from loramux_adapters.abilities import Abilities, Layout
from loramux_adapters.base_model import BaseModel
from loramux_adapters.errors import AdapterConfigInvalid, AdapterUnsupportedFeature, shown
from loramux_adapters.files import AdapterFolder
from loramux_adapters.gate import Gate, Norm, PreMap, Select
from loramux_adapters.lowered import LoweredAdapter
from loramux_adapters.methods.lora import CONFIG_FILE, peft_config
from loramux_adapters.mixture import token_site
from loramux_adapters.peft import checks, experts
from loramux_adapters.peft.sites import Part, Sites, Tensors, read_sites
from loramux_adapters.verify import verify

_LAYOUT = {
    "a": Part("{module}._addons.expert_lora.layer1__{index}", "IR"),
    "b": Part("{module}._addons.expert_lora.layer2__{index}", "RO"),
    "router": Part("{module}._addons.router.expert_embeddings__{index}", "I"),
}
# Settings of its code under which the equation above does not hold.
_FIXED = {
    "normalize_topk": True,
    "scaling_scores": True,
    "score_type": "original",
    "router_norm_type": "layer_norm",
    "router_type": "smear",
}
_OWN_FIELDS = frozenset({"d_bottleneck", "num_experts", "topk_value", "divide_by_d_bottleneck", "epsilon", *_FIXED})
_LAYER_NORM_EPS = 1e-5
_HINT = "Give it as it was in training."


@dataclass(frozen=True)
class PhatgooseCheckpoint:
    sites: Sites
    rank: int
    alpha: float
    top_k: int
    eps: float


class Phatgoose:
    """PHATGOOSE's tensors with a config that this module defines."""

    name = "phatgoose"
    abilities = Abilities(
        (
            Layout(
                "PHATGOOSE",
                "r-three/phatgoose",
                ("PHATGOOSE",),
                when="(our config beside its tensors)",
                keys=r".+\.(layer[12]|expert_embeddings)__\d+",
            ),
        ),
        router="token",
    )

    def detect(self, folder: AdapterFolder) -> bool:
        return peft_config(folder).get("peft_type") in self.abilities.types

    def read(self, folder: AdapterFolder, base: BaseModel) -> PhatgooseCheckpoint:
        raw = {"topk_value": 2, "divide_by_d_bottleneck": True, "epsilon": 1e-6} | folder.read_json(CONFIG_FILE)
        _check_settings(raw)
        rank, number = experts.count(raw, "d_bottleneck", _HINT), experts.count(raw, "num_experts", _HINT)
        top_k = experts.count(raw, "topk_value", _HINT)
        experts.check_top_k(top_k, number, "every site", field="topk_value")
        # Its scale as PEFT's alpha: there is no other.
        alpha = 1 if raw["divide_by_d_bottleneck"] else rank
        config = experts.parse_shared_fields({"lora_alpha": alpha} | raw, _OWN_FIELDS, rank)
        if config.lora_alpha != alpha:
            raise AdapterUnsupportedFeature(
                f"adapter_config.json: lora_alpha is {config.lora_alpha:g}, which this code base does not have.",
                hint="Its scale is 1/r, or 1 with divide_by_d_bottleneck false: remove the field.",
                field="lora_alpha",
            )
        sizes = {"R": rank, "E": number}
        sites = read_sites(folder, base, config, _LAYOUT, sizes, count=number, normalise=str)
        return PhatgooseCheckpoint(sites, rank, alpha, top_k, raw["epsilon"])

    def lower(self, checkpoint: PhatgooseCheckpoint, base: BaseModel) -> LoweredAdapter:
        sites, gates = {}, {}
        for module, part in checkpoint.sites.modules.items():
            a, b = ([tensor.T for tensor in part[key]] for key in "ab")
            scale = checks.rank_scale(module, checkpoint.rank, checkpoint.alpha, checkpoint.alpha / checkpoint.rank)
            sites[module] = token_site(a, b, [scale] * len(b), gate=module)
            gates[module] = Gate(
                _router(part),
                pre=PreMap.LAYER_NORM,
                pre_eps=_LAYER_NORM_EPS,
                select=Select.TOP_K,
                k=checkpoint.top_k,
                norm=Norm.RENORM,
                eps=checkpoint.eps,
            )
        return LoweredAdapter(self.name, sites, checkpoint.sites.warnings, gates=gates)

    def verify(self, adapter: LoweredAdapter, base: BaseModel) -> None:
        verify(adapter, base)


def _router(part: Tensors) -> torch.Tensor:
    vectors = torch.stack([vector.double() for vector in part["router"]])
    d_in = vectors.shape[1]
    router: torch.Tensor = layer_norm(vectors, (d_in,), eps=_LAYER_NORM_EPS) / math.sqrt(d_in)
    return router.float()


def _check_settings(raw: Mapping[str, Any]) -> None:
    for name, value in _FIXED.items():
        if name in raw and raw[name] != value:
            raise AdapterUnsupportedFeature(
                f"adapter_config.json: {name} is {shown(raw[name])}.",
                hint=f"Only PHATGOOSE's own router is known: {name} {shown(value)}.",
                field=name,
            )
    for name, valid in (
        ("divide_by_d_bottleneck", isinstance(raw["divide_by_d_bottleneck"], bool)),
        ("epsilon", type(raw["epsilon"]) is float and 0 <= raw["epsilon"] < 1),
    ):
        if not valid:
            raise AdapterConfigInvalid(
                f"adapter_config.json: {name} is {shown(raw[name])}.",
                hint="The first is true or false, the second at least 0.0 and below 1.",
                field=name,
            )
