"""LoraHub: LoRAs of other tasks, added with weights that were found without gradients (arXiv 2307.13269).

    A = Σ_i w_i A_i        B = Σ_i w_i B_i        y_t = W0 x_t + s · B · A · x_t

A_i [r, d_in], B_i [d_out, r]: the same r and the same modules everywhere. Factors are added, not products, so B·A has
terms of different LoRAs: it is one LoRA of rank r, and not their weighted sum. That is what its code does
(sail-sg/lorahub, `lorahub/algorithm.py` read at 2bc1c5a), with the scale of the first LoRA; all must have one.

Its code keeps the weights in memory only, so the format is ours: an adapter_config.json with `peft_type: "LORAHUB"` and

    adapters   names of folders inside the adapter's, PEFT LoRAs
    weights    w, a list as long

The sums are made in float64 and stored in float32.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from loramux_adapters.abilities import OURS, Abilities, Layout
from loramux_adapters.base_model import BaseModel
from loramux_adapters.errors import AdapterConfigInvalid, AdapterMissingTensor, AdapterShapeMismatch, shown
from loramux_adapters.files import AdapterFolder
from loramux_adapters.lowered import LoweredAdapter, LoweredSite
from loramux_adapters.methods.lora import CONFIG_FILE, peft_config
from loramux_adapters.methods.lora_parts import name_warnings, read_loras, read_weights
from loramux_adapters.peft import checks
from loramux_adapters.verify import verify


@dataclass(frozen=True)
class LoraHubCheckpoint:
    parts: Mapping[str, LoweredAdapter]
    weights: tuple[float, ...]


class LoraHub:
    """LORAHUB in the format that this module defines."""

    name = "lorahub"
    abilities = Abilities((Layout("LoraHub", OURS, ("LORAHUB",)),))

    def detect(self, folder: AdapterFolder) -> bool:
        return peft_config(folder).get("peft_type") in self.abilities.types

    def read(self, folder: AdapterFolder, base: BaseModel) -> LoraHubCheckpoint:
        raw = folder.read_json(CONFIG_FILE)
        checks.check_folder(folder)
        parts = read_loras(folder, raw, base)
        _check_alike(parts)
        return LoraHubCheckpoint(parts, read_weights(raw, len(parts)))

    def lower(self, checkpoint: LoraHubCheckpoint, base: BaseModel) -> LoweredAdapter:
        parts = list(checkpoint.parts.values())
        sites = {}
        for module, first in parts[0].sites.items():
            a = _mix([part.sites[module].a for part in parts], checkpoint.weights)
            b = _mix([part.sites[module].b for part in parts], checkpoint.weights)
            sites[module] = LoweredSite(a, b, first.scale)
        return LoweredAdapter(self.name, sites, name_warnings(checkpoint.parts))

    def verify(self, adapter: LoweredAdapter, base: BaseModel) -> None:
        verify(adapter, base)


def _mix(factors: Sequence[torch.Tensor], weights: Sequence[float]) -> torch.Tensor:
    total = torch.zeros_like(factors[0], dtype=torch.float64)
    for factor, weight in zip(factors, weights, strict=True):
        total += weight * factor.double()
    return total.float()


def _check_alike(parts: Mapping[str, LoweredAdapter]) -> None:
    """The same modules, ranks and scales as the first. Raises an AdapterError that names the folder."""
    first_name, first = next(iter(parts.items()))
    for name, part in parts.items():
        if different := sorted(first.sites.keys() ^ part.sites.keys()):
            raise AdapterMissingTensor(
                f"Only one of the adapters {shown(first_name)} and {shown(name)} has {shown(different[0])}.",
                hint="LoraHub needs LoRAs of the same modules.",
                field=name,
            )
        for module, site in part.sites.items():
            reference = first.sites[module]
            if site.rank != reference.rank:
                raise AdapterShapeMismatch(
                    f"The adapter {shown(name)} has rank {site.rank} at {shown(module)}, {shown(first_name)} has "
                    f"{reference.rank}.",
                    hint="LoraHub adds factors, which needs equal ranks.",
                    field=name,
                )
            if not torch.equal(site.scale, reference.scale):
                raise AdapterConfigInvalid(
                    f"The adapters {shown(first_name)} and {shown(name)} have different scales at {shown(module)}.",
                    hint="LoraHub applies the first one's to all: give all the same lora_alpha, or scale B to match.",
                    field=name,
                )
