"""MoLA: a mixture of LoRA experts at every site, more of them in higher layers (arXiv 2402.08562).

    p = softmax(W_g x_t) in float32      S = the k largest      g_e = p_e / Σ_{S} p on S, 0 elsewhere
    y_t = W0 x_t + Σ_e g_e · (α/r) · B_e · A_e · x_t

A_e [r, d_in], B_e [d_out, r], W_g [E, d_in]; r, E and k may differ per layer, and every site has its own router.

The tensors are those of the authors' code (GCYZSL/MoLA, read at 4c7324d): `<module>.lora_A_{e}.weight`,
`<module>.lora_B_{e}.weight`, `<module>.router.router.weight`; `lora_A.default_{e}` where a raw state_dict was saved.
Its adapter_config.json is PEFT's with `r` as a list over layers. It holds neither the number of experts, which the
routers show, nor k: `top_k` must be added by hand, a number or a list over layers. `number_experts` may be added: it is
checked.

HILO (arXiv 2502.03884) lets the rank and k differ per layer as well as the number of experts, and compares itself with
MoLA. It published no code and no layout; what its gate computes and the scale are read as MoLA's, the most likely
reading, with r, number_experts and top_k as lists over layers. `peft_type: "HILO"` says that it is meant.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from loramux_adapters.abilities import OURS, Abilities, Layout
from loramux_adapters.base_model import BaseModel
from loramux_adapters.errors import AdapterShapeMismatch, shown
from loramux_adapters.files import AdapterFolder
from loramux_adapters.gate import Gate, Norm, Select
from loramux_adapters.lowered import LoweredAdapter
from loramux_adapters.methods.lora import CONFIG_FILE, peft_config
from loramux_adapters.mixture import token_site
from loramux_adapters.peft import checks, experts
from loramux_adapters.peft.targets import Targets
from loramux_adapters.peft.tensors import PREFIX, WEIGHTS_FILE
from loramux_adapters.verify import verify
from loramux_adapters.weights import TensorInfo, open_weights

_LAYOUT = experts.Layout(
    a=PREFIX + "{module}.lora_A_{expert}.weight",
    b=PREFIX + "{module}.lora_B_{expert}.weight",
    router=PREFIX + "{module}.router.router.weight",
)
_OWN_FIELDS = frozenset({"r", "top_k", "number_experts"})
_RANK_HINT = "Give the rank as it was in training: a number, or a list with one for each layer."
_TOP_K_HINT = "Add it as it was in training (this code base does not save it; its own default is 2)."
_EXPERTS_HINT = "Give the number of experts as it was in training, or leave the field out."


@dataclass(frozen=True)
class MolaModule:
    """One site: its experts and router, k, and the scale's α."""

    mixture: experts.Mixture
    top_k: int
    alpha: float


@dataclass(frozen=True)
class MolaCheckpoint:
    modules: Mapping[str, MolaModule]
    warnings: tuple[str, ...]


class Mola:
    """The layout of MoLA's authors."""

    name = "mola"
    abilities = Abilities(
        (
            Layout(
                "MoLA",
                "GCYZSL/MoLA",
                ("LORA",),
                when="with a list `r`, or `number_experts`; `top_k` must be added",
                keys=r".+\.(router\.router|lora_[AB](\.default)?_\d+)\.weight",
            ),
            Layout("HILO", OURS, ("HILO",), when="(read as MoLA with lists over layers)"),
        ),
        router="token",
    )

    def detect(self, folder: AdapterFolder) -> bool:
        raw = peft_config(folder)
        marked = isinstance(raw.get("r"), list) or bool(raw.get("number_experts"))
        return raw.get("peft_type") == "HILO" or (raw.get("peft_type") == "LORA" and marked)

    def read(self, folder: AdapterFolder, base: BaseModel) -> MolaCheckpoint:
        raw = folder.read_json(CONFIG_FILE)
        # Which layer needs which rank is known only with the tensors' names; the shared fields need none.
        config = experts.parse_shared_fields(raw, _OWN_FIELDS, rank=1)
        checks.check_folder(folder)
        targets = Targets(config)
        with open_weights(folder, WEIGHTS_FILE) as weights:
            found = experts.group(weights.tensors, _LAYOUT, _normalise)
            names = {
                module: experts.resolve(part, _LAYOUT, module, _count_experts(raw, module, part, weights.tensors))
                for module, part in found.items()
            }
            pairs = {module: part.experts[0] for module, part in names.items()}
            checks.check_modules(pairs, targets, base, config.base_model)
            ranks = {module: experts.per_layer(raw, "r", experts.layer_of(module), _RANK_HINT) for module in names}
            experts.check_mixtures(names, weights, ranks, base, config.base_model)
            top_k = {module: _top_k(raw, module, len(part.experts)) for module, part in names.items()}
            modules = {
                module: MolaModule(experts.read_mixture(part, weights), top_k[module], config.lora_alpha)
                for module, part in sorted(names.items())
            }
        return MolaCheckpoint(modules, checks.collect_warnings(folder, config.base_model, targets, base))

    def lower(self, checkpoint: MolaCheckpoint, base: BaseModel) -> LoweredAdapter:
        sites, gates = {}, {}
        for module, part in checkpoint.modules.items():
            rank = part.mixture.a[0].shape[0]
            scale = checks.rank_scale(module, rank, part.alpha, part.alpha / rank)
            sites[module] = token_site(part.mixture.a, part.mixture.b, [scale] * len(part.mixture.b), gate=module)
            gates[module] = Gate(part.mixture.router, select=Select.TOP_K, k=part.top_k, norm=Norm.RENORM)
        return LoweredAdapter(self.name, sites, checkpoint.warnings, gates=gates)

    def verify(self, adapter: LoweredAdapter, base: BaseModel) -> None:
        verify(adapter, base)


def _normalise(name: str) -> str:
    return experts.with_prefix(name).replace(".lora_A.default_", ".lora_A_").replace(".lora_B.default_", ".lora_B_")


def _count_experts(raw: Mapping[str, Any], module: str, found: experts.Found, tensors: Mapping[str, TensorInfo]) -> int:
    """The config's number if it has one; else a row of the router is an expert."""
    if raw.get("number_experts") is not None:
        return experts.per_layer(raw, "number_experts", experts.layer_of(module), _EXPERTS_HINT)
    if not found.router:
        return max(*found.a, *found.b, 0, 0) + 1  # `resolve` refuses it for the missing router
    shape = tensors[found.router[0]].shape
    if len(shape) != 2 or 0 in shape:
        raise AdapterShapeMismatch(
            f"The router {shown(found.router[0])} has shape {shape}, not [experts, d_in].",
            hint="Save the adapter again: a router needs a row per expert, as wide as the input of its layer.",
            field=found.router[0],
        )
    return shape[0]


def _top_k(raw: Mapping[str, Any], module: str, count: int) -> int:
    k = experts.per_layer(raw, "top_k", experts.layer_of(module), _TOP_K_HINT)
    experts.check_top_k(k, count, shown(module))
    return k
