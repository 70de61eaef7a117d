"""Ensembles: LoRAs trained apart from each other, whose predictions are averaged (arXiv 2310.00035).

    member s:  y_t = W0 x_t + s_s·B_s·A_s·x_t

A draw is a member, sample s the s-th; there are as many as members. Ordinary requests are answered by the first one: a
mean of predictions is no adapter, and a mean of factors is no member's. Lowered: the first member, and all of them as a
posterior of kind `ensemble`. Ranks that differ are filled up with zeros; where a member does not adapt a module, all.

Members are whole PEFT LoRAs, so the format is ours: an adapter_config.json with `peft_type: "ENSEMBLE"` and

    adapters   names of folders inside the adapter's, PEFT LoRAs, in order
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from loramux_adapters.abilities import OURS, Abilities, Layout
from loramux_adapters.base_model import BaseModel
from loramux_adapters.files import AdapterFolder
from loramux_adapters.fold import check_lowered_size
from loramux_adapters.lowered import LoweredAdapter, LoweredSite
from loramux_adapters.methods.lora import CONFIG_FILE, peft_config
from loramux_adapters.methods.lora_parts import name_warnings, read_loras
from loramux_adapters.peft import checks, experts
from loramux_adapters.variance import Variance, VarianceKind
from loramux_adapters.verify import verify


@dataclass(frozen=True)
class EnsembleCheckpoint:
    """The members by folder, and the rank that each module has in all of them."""

    members: Mapping[str, LoweredAdapter]
    ranks: Mapping[str, int]


class Ensemble:
    """ENSEMBLE in the format that this module defines."""

    name = "ensemble"
    abilities = Abilities((Layout("LoRA ensemble", OURS, ("ENSEMBLE",)),), posterior=VarianceKind.ENSEMBLE)

    def detect(self, folder: AdapterFolder) -> bool:
        return peft_config(folder).get("peft_type") in self.abilities.types

    def read(self, folder: AdapterFolder, base: BaseModel) -> EnsembleCheckpoint:
        raw = folder.read_json(CONFIG_FILE)
        checks.check_folder(folder)
        experts.refuse_absent(raw, ("weights",))
        members = read_loras(folder, raw, base)
        ranks: dict[str, int] = {}
        for member in members.values():
            for module, rank in member.ranks.items():
                ranks[module] = max(rank, ranks.get(module, 0))
        check_lowered_size(
            {module: (1 + len(members)) * rank for module, rank in ranks.items()}, base, folder.max_bytes
        )
        return EnsembleCheckpoint(members, ranks)

    def lower(self, checkpoint: EnsembleCheckpoint, base: BaseModel) -> LoweredAdapter:
        members = list(checkpoint.members.values())
        sites = {
            module: _site([member.sites.get(module) for member in members], rank, base.linears[module])
            for module, rank in sorted(checkpoint.ranks.items())
        }
        return LoweredAdapter(self.name, sites, name_warnings(checkpoint.members))

    def verify(self, adapter: LoweredAdapter, base: BaseModel) -> None:
        verify(adapter, base)


def _site(members: Sequence[LoweredSite | None], rank: int, widths: tuple[int, int]) -> LoweredSite:
    d_in, d_out = widths
    nothing = LoweredSite(torch.zeros(0, d_in), torch.zeros(0, d_out), torch.zeros(0))
    present = [nothing if member is None else member for member in members]
    tensors = {
        "member_a": _stack([member.a for member in present], rank),
        "member_b": _stack([member.b for member in present], rank),
        "member_scale": _stack([member.scale for member in present], rank),
    }
    a, b, scale = (tensor[0].clone() for tensor in tensors.values())
    return LoweredSite(a, b, scale, variance=Variance(VarianceKind.ENSEMBLE, tensors))


def _stack(factors: Sequence[torch.Tensor], rank: int) -> torch.Tensor:
    """[members, rank, …] in the dtype that holds all of them exactly."""
    filled = [torch.cat([factor, factor.new_zeros(rank - len(factor), *factor.shape[1:])]) for factor in factors]
    dtype = filled[0].dtype
    for factor in filled[1:]:
        dtype = torch.promote_types(dtype, factor.dtype)
    return torch.stack([factor.to(dtype) for factor in filled])
