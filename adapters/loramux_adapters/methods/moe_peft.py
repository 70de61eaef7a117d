"""Mixtures of LoRA experts as MoE-PEFT saves them: MoLA (arXiv 2402.08562) and LoRAMoE (arXiv 2312.09979).

    p = softmax(W_g x_t) in float32
    MOLA      g = the k largest of p, divided by their sum       at every site
    LORAMOE   g = p                                              at MLP sites; attention sites hold a plain LoRA
    y_t = W0 x_t + Σ_e g_e · s · B_e · A_e · x_t                  s = α/r, or α/√r with `use_rslora`

A_e [r, d_in], B_e [d_out, r], W_g [E, d_in], a router per site that reads the site's own input.

Names, read in TUDB-Labs/MoE-PEFT at 40f8cb7 and later, with P = `mola` or `loramoe`:
`P.layers.{i}.{self_attn|mlp}.{proj}.moe_gate.weight`, `….experts.{e}.lora_A.weight`, `….experts.{e}.lora_B.weight`, and
`….lora_A.weight`, `….lora_B.weight` for a plain LoRA. `layers.{i}` is `model.layers.{i}` of the base.

Its MIXLORA is another kind, see `recognised.py`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from loramux_adapters.abilities import Abilities, Layout
from loramux_adapters.base_model import BaseModel
from loramux_adapters.errors import AdapterUnsupportedFeature, shown
from loramux_adapters.files import AdapterFolder
from loramux_adapters.gate import Gate, Norm, Select
from loramux_adapters.lowered import LoweredAdapter, LoweredSite
from loramux_adapters.methods.lora import CONFIG_FILE, peft_config
from loramux_adapters.mixture import token_site
from loramux_adapters.peft import checks, experts
from loramux_adapters.peft.config import LoraConfig
from loramux_adapters.peft.targets import Targets
from loramux_adapters.peft.tensors import WEIGHTS_FILE, Pair, pair_factors
from loramux_adapters.verify import verify
from loramux_adapters.weights import WeightsFile, open_weights

_BASE = "model."  # what the base puts before `layers`
# `name`, `task_name`: labels. The others concern initialisation and losses.
_OWN_FIELDS = frozenset(
    {
        "num_experts", "routing_strategy", "name", "task_name", "lora_init", "router_init_range",
        "router_aux_loss_coef", "router_loss",
    }
)  # fmt: skip
_HINT = "Give it as it was in training."


@dataclass(frozen=True)
class MoePeftCheckpoint:
    """`plain` holds the sites without a router: A [r, d_in], B [d_out, r]. `top_k` is None for a dense gate."""

    config: LoraConfig
    top_k: int | None
    mixtures: Mapping[str, experts.Mixture]
    plain: Mapping[str, tuple[torch.Tensor, torch.Tensor]]
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class _Names:
    mixtures: Mapping[str, experts.MixtureNames]
    plain: Mapping[str, Pair]

    def firsts(self) -> dict[str, Pair]:
        return {module: part.experts[0] for module, part in self.mixtures.items()} | dict(self.plain)


class MoePeft:
    """MoE-PEFT's MOLA and LORAMOE."""

    name = "moe_peft"
    abilities = Abilities(
        (
            Layout("MoLA", "TUDB-Labs/MoE-PEFT", ("MOLA",), keys=r"mola\..+"),
            Layout("LoRAMoE", "TUDB-Labs/MoE-PEFT", ("LORAMOE",), keys=r"loramoe\..+"),
        ),
        router="token",
    )

    def detect(self, folder: AdapterFolder) -> bool:
        return peft_config(folder).get("peft_type") in self.abilities.types

    def read(self, folder: AdapterFolder, base: BaseModel) -> MoePeftCheckpoint:
        raw = folder.read_json(CONFIG_FILE)
        kind = str(raw["peft_type"])
        _check_kind(raw, kind)
        number = experts.count(raw, "num_experts", _HINT)
        top_k = experts.count(raw, "top_k", _HINT) if kind == "MOLA" else None
        experts.check_top_k(top_k or 1, number, "every site")
        config = _parse_config(raw, kind)
        checks.check_folder(folder)
        targets = Targets(config)
        with open_weights(folder, WEIGHTS_FILE) as weights:
            names = _find(weights, kind.lower(), number)
            checks.check_modules(names.firsts(), targets, base, config.base_model)
            ranks = dict.fromkeys(names.firsts(), config.r)
            if names.plain:
                checks.check_shapes(names.plain, weights.tensors, ranks, base, config.base_model)
            experts.check_mixtures(names.mixtures, weights, ranks, base, config.base_model)
            mixtures = {module: experts.read_mixture(part, weights) for module, part in sorted(names.mixtures.items())}
            plain = {
                module: (weights.read(pair.a), weights.read(pair.b)) for module, pair in sorted(names.plain.items())
            }
        warnings = checks.collect_warnings(folder, config.base_model, targets, base)
        return MoePeftCheckpoint(config, top_k, mixtures, plain, warnings)

    def lower(self, checkpoint: MoePeftCheckpoint, base: BaseModel) -> LoweredAdapter:
        config, k = checkpoint.config, checkpoint.top_k
        factor = config.scale(config.r, config.lora_alpha)
        sites, gates = {}, {}
        for module, part in checkpoint.mixtures.items():
            scale = checks.rank_scale(module, config.r, config.lora_alpha, factor)
            sites[module] = token_site(part.a, part.b, [scale] * len(part.b), gate=module)
            select, norm = (Select.ALL, Norm.SOFTMAX) if k is None else (Select.TOP_K, Norm.RENORM)
            gates[module] = Gate(part.router, select=select, k=k, norm=norm)
        for module, (a, b) in checkpoint.plain.items():
            scale = checks.rank_scale(module, config.r, config.lora_alpha, factor)
            sites[module] = LoweredSite(a, b.T.contiguous(), scale)
        return LoweredAdapter(self.name, sites, checkpoint.warnings, gates=gates)

    def verify(self, adapter: LoweredAdapter, base: BaseModel) -> None:
        verify(adapter, base)


def _check_kind(raw: Mapping[str, Any], kind: str) -> None:
    if raw.get("routing_strategy", kind.lower()) != kind.lower():
        raise AdapterUnsupportedFeature(
            f"adapter_config.json: routing_strategy is {shown(raw['routing_strategy'])}, not {kind.lower()}.",
            hint="Only the routing that belongs to peft_type is known.",
            field="routing_strategy",
        )


def _parse_config(raw: Mapping[str, Any], kind: str) -> LoraConfig:
    targets = raw.get("target_modules")
    if isinstance(targets, dict):
        # As in its training configs: module name -> whether it is adapted.
        targets = [name for name, chosen in targets.items() if chosen]
    own = _OWN_FIELDS | ({"top_k"} if kind == "MOLA" else set())
    absent = set(experts.LATER_FIELDS) - {"use_rslora"}
    return experts.parse_shared_fields(
        dict(raw) | {"target_modules": targets}, own, experts.count(raw, "r", _HINT), sorted(absent)
    )


def _find(weights: WeightsFile, prefix: str, number: int) -> _Names:
    """Tensors by the base's module names."""
    mixture = experts.Layout(
        a=prefix + ".{module}.experts.{expert}.lora_A.weight",
        b=prefix + ".{module}.experts.{expert}.lora_B.weight",
        router=prefix + ".{module}.moe_gate.weight",
    )
    for name in weights.tensors:
        if name == "classifier":
            raise AdapterUnsupportedFeature(
                "Tensor 'classifier' is a classification head, which cannot answer with tokens.",
                hint="Train the adapter on the causal task.",
                field=name,
            )
    unrouted = {name for name in weights.tensors if prefix == "loramoe" and ".self_attn." in name}
    routed = experts.group(weights.tensors.keys() - unrouted, mixture, str)
    plain = {_BASE + module.removeprefix(f"{prefix}."): pair for module, pair in pair_factors(unrouted).items()}
    mixtures = {_BASE + module: experts.resolve(found, mixture, module, number) for module, found in routed.items()}
    return _Names(mixtures, plain)
