"""Chains of LoRAs, each trained on top of the ones before: COLA (arXiv 2401.04151), RAC-LoRA (2410.08305) and the
boosters of XGBLoRA.

    y_t = W0 x_t + Σ_τ w_τ · s_τ · B_τ · A_τ · x_t            s = α/r, or what the link's own config says

A link may leave out layers (XGBLoRA trains a random few in each round). Lowered by stacking the ranks of all links.

In training each link is merged into the base model before the next begins; what is read here are the links, kept. Of
merged weights alone `loramux adapters extract` makes an adapter (`extract.py`). No public code saves links (RAC-LoRA's,
hammoudhasan/RACLora read at 52899e3, is for MNIST and multiplies by α, not α/r: give α·r as `lora_alpha`), so the
format is ours: an adapter_config.json with `peft_type` "CHAIN", or "COLA", "RACLORA" or "XGBLORA", which mean the
same, and either

    adapters    names of folders inside the adapter's, PEFT LoRAs of any rank, in order
    weights     w, a list as long; 1 by default

or PEFT's LoRA fields, and all links in one file as `<module>.lora_A.{τ}.weight` [r, d_in] and `lora_B.{τ}.weight`
[d_out, r], with

    length      how many links there are; τ is counted from 0
    weights     as above
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from loramux_adapters.abilities import OURS, Abilities, Layout
from loramux_adapters.base_model import BaseModel
from loramux_adapters.errors import AdapterConfigInvalid, shown
from loramux_adapters.files import AdapterFolder
from loramux_adapters.lowered import LoweredAdapter
from loramux_adapters.methods.lora import CONFIG_FILE, peft_config
from loramux_adapters.methods.lora_parts import name_warnings, read_loras, read_weights
from loramux_adapters.mixture import summed_site
from loramux_adapters.peft import checks, experts
from loramux_adapters.peft.sites import Part, read_sites
from loramux_adapters.peft.tensors import PREFIX
from loramux_adapters.verify import verify

_LAYOUT = {
    "a": Part(PREFIX + "{module}.lora_A.{index}.weight", "RI"),
    "b": Part(PREFIX + "{module}.lora_B.{index}.weight", "OR"),
}
_HINT = "Give it as it was in training."


@dataclass(frozen=True)
class Link:
    """One LoRA at one site: A [r, d_in], B [d_out, r], the scale of each rank [r] with the link's weight in it."""

    a: torch.Tensor
    b: torch.Tensor
    scale: torch.Tensor


@dataclass(frozen=True)
class ChainCheckpoint:
    modules: Mapping[str, Sequence[Link]]
    warnings: tuple[str, ...]


class Chain:
    """CHAIN, COLA, RACLORA and XGBLORA in the format that this module defines."""

    name = "chain"
    abilities = Abilities(
        (
            Layout("chain of LoRAs", OURS, ("CHAIN",)),
            Layout("COLA", OURS, ("COLA",)),
            Layout("RAC-LoRA", OURS, ("RACLORA",)),
            Layout("XGBLoRA", OURS, ("XGBLORA",)),
        )
    )

    def detect(self, folder: AdapterFolder) -> bool:
        return peft_config(folder).get("peft_type") in self.abilities.types

    def read(self, folder: AdapterFolder, base: BaseModel) -> ChainCheckpoint:
        raw = folder.read_json(CONFIG_FILE)
        if ("adapters" in raw) == ("length" in raw):
            raise AdapterConfigInvalid(
                "adapter_config.json: give either adapters or length.",
                hint="adapters names the links' folders; length is their number if all are in one file.",
                field="adapters",
            )
        return _read_folders(folder, raw, base) if "adapters" in raw else _read_file(folder, raw, base)

    def lower(self, checkpoint: ChainCheckpoint, base: BaseModel) -> LoweredAdapter:
        sites = {
            module: summed_site(*zip(*((link.a, link.b, link.scale) for link in links), strict=True))
            for module, links in checkpoint.modules.items()
        }
        return LoweredAdapter(self.name, sites, checkpoint.warnings)

    def verify(self, adapter: LoweredAdapter, base: BaseModel) -> None:
        verify(adapter, base)


def _read_folders(folder: AdapterFolder, raw: Mapping[str, Any], base: BaseModel) -> ChainCheckpoint:
    checks.check_folder(folder)
    parts = read_loras(folder, raw, base)
    modules: dict[str, list[Link]] = {}
    for weight, part in zip(read_weights(raw, len(parts), default=1.0), parts.values(), strict=True):
        for module, site in part.sites.items():
            modules.setdefault(module, []).append(Link(site.a, site.b.T, _weighted(module, site.scale, weight)))
    return ChainCheckpoint(dict(sorted(modules.items())), name_warnings(parts))


def _read_file(folder: AdapterFolder, raw: Mapping[str, Any], base: BaseModel) -> ChainCheckpoint:
    rank, length = experts.count(raw, "r", _HINT), experts.count(raw, "length", _HINT)
    config = experts.parse_shared_fields(raw, {"length", "weights"}, rank, absent=("rank_pattern", "alpha_pattern"))
    sites = read_sites(folder, base, config, _LAYOUT, {"R": rank}, count=length, sparse=True)
    weights = read_weights(raw, length, default=1.0)
    modules = {}
    for module, part in sites.modules.items():
        scale = checks.rank_scale(module, rank, config.lora_alpha, config.scale(rank, config.lora_alpha))
        modules[module] = [
            Link(a, b, _weighted(module, scale, weights[index]))
            for index, a, b in zip(sites.indices[module], part["a"], part["b"], strict=True)
        ]
    return ChainCheckpoint(modules, sites.warnings)


def _weighted(module: str, scale: torch.Tensor, weight: float) -> torch.Tensor:
    product = (scale.double() * weight).float()
    if weight and bool((product == 0).any()) and bool((scale != 0).all()):
        raise AdapterConfigInvalid(
            f"The weight {weight} makes the scale of {shown(module)} too small for float32.",
            hint="Check weights and lora_alpha.",
            field="weights",
        )
    return product
