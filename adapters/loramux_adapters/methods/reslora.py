"""ResLoRA: LoRAs with shortcuts to those of the layers before (arXiv 2402.18039).

    n counts the layers of one kind of linear (all q_proj, …); u_n = A_n x_n; s = α/r; j = 1 … m, while there are layers
    res_flag 0   y = W0 x_n + s·B_n u_n                                      a plain LoRA
    1, input     y = W0 x_n + s·B_n A_n (x_n + x_{n−1})                      x_n + x_n where nothing comes before
    2, block     y = W0 x_n + s·B_n u_n + s·Σ_j B_{n−j} A_{n−j} x_n
    3, middle    y = W0 x_n + s·B_n (u_n + Σ_j u_{n−j})

A_n [r, d_in], B_n [d_out, r], m = `pre_num` (−1: all). Layers are linked while their widths are equal. Block shortcuts
are stacked ranks, so they are served exactly. The others carry numbers from one layer to a later one: that is lowered
as a site's `carry`, and not run by the data plane yet. Several LoRAs at one layer (`loras.0`, `loras.1`, …) add up.

When it evaluates, its code replaces input and middle shortcuts by an approximation unless `merge_flag` is 0, with
factors that it measured in training and does not save. That is refused; with the field set to 0 what was trained is
lowered.

Names and fields are those of the authors' code (microsoft/LMOps, `reslora/myloralib` read at c7b5576, 36cbfba and
bf95608): `<module>.loras.{i}.lora_A`, `reslora_config.json`. `target_modules` is letters, `q.k.v.o.f.g`, that stand for
the names below as in a Llama; a layer is chosen if its name contains one. Its `pytorch_model_lora.bin` is a pickle and
has to be converted to adapter_model.safetensors.
"""

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

from loramux_adapters.abilities import Abilities, Layout
from loramux_adapters.base_model import BaseModel
from loramux_adapters.description import Fields
from loramux_adapters.errors import AdapterConfigInvalid, AdapterUnsupportedFeature, shown
from loramux_adapters.files import AdapterFolder
from loramux_adapters.fold import check_lowered_size
from loramux_adapters.lowered import Carry, CarryKind, LoweredAdapter, LoweredSite
from loramux_adapters.methods.lora import CONFIG_FILE
from loramux_adapters.mixture import summed_site
from loramux_adapters.peft import checks
from loramux_adapters.peft.config import parse_config
from loramux_adapters.peft.sites import Part, Sites, read_sites
from loramux_adapters.verify import verify

RESLORA_CONFIG = "reslora_config.json"
_LAYOUT = {
    "a": Part("{module}.loras.{index}.lora_A", "RI"),
    "b": Part("{module}.loras.{index}.lora_B", "OR"),
}
_TARGETS = {
    "q": ("q_proj",),
    "k": ("k_proj",),
    "v": ("v_proj",),
    "o": ("o_proj",),
    "f": ("up_proj", "down_proj"),
    "g": ("gate_proj",),
}
_PLAIN, _INPUT, _BLOCK, _MIDDLE = range(4)
# Dropout, whether training merged for a while, how many forwards its averages are of.
_TRAINING_FIELDS = ("lora_dropout", "merge_weights", "merge_4_len")


@dataclass(frozen=True)
class ResLoraCheckpoint:
    """`chains`: the modules of one kind that are linked, in the order of the layers; `depth`: m."""

    sites: Sites
    chains: Sequence[Sequence[str]]
    rank: int
    alpha: float
    shortcut: int
    depth: int


@dataclass(frozen=True)
class _Config:
    rank: int
    alpha: float
    shortcut: int
    depth: int
    saved: int  # the most LoRAs that a layer can have
    targets: tuple[str, ...]


class ResLora:
    """ResLoRA's own layout."""

    name = "reslora"
    abilities = Abilities(
        (Layout("ResLoRA", "microsoft/LMOps", files=(RESLORA_CONFIG,), keys=r".+\.loras\.\d+\.lora_[AB]"),),
        serve="block shortcuts, `res_flag` 2, or none; the carry of the others is not run yet",
    )

    def detect(self, folder: AdapterFolder) -> bool:
        return folder.only is None and folder.has(RESLORA_CONFIG) and not folder.has(CONFIG_FILE)

    def read(self, folder: AdapterFolder, base: BaseModel) -> ResLoraCheckpoint:
        own = _parse(folder.read_json(RESLORA_CONFIG))
        groups = [[module for module in base.linears if name in module.lower()] for name in own.targets]
        chosen = [module for group in groups for module in group]
        # PEFT's rules, with every module by its full name.
        config = parse_config({"r": own.rank, "lora_alpha": own.alpha, "target_modules": chosen or list(own.targets)})
        sites = read_sites(folder, base, config, _LAYOUT, {"R": own.rank}, count=None, normalise=str)
        for module, indices in sites.indices.items():
            if len(indices) > own.saved:
                raise _invalid(
                    "start_index", f"lets a layer have {own.saved} LoRAs; {shown(module)} has {len(indices)}"
                )
        chains = [chain for group in groups for chain in _linked(group, base)]
        if own.shortcut == _BLOCK:
            ranks = {
                module: own.rank * len(sites.indices[module]) * (1 + min(place, own.depth))
                for chain in chains
                for place, module in enumerate(chain)
            }
            check_lowered_size(ranks, base, folder.max_bytes)
        return ResLoraCheckpoint(sites, chains, own.rank, own.alpha, own.shortcut, own.depth)

    def lower(self, checkpoint: ResLoraCheckpoint, base: BaseModel) -> LoweredAdapter:
        sites = {}
        for chain in checkpoint.chains:
            for place, module in enumerate(chain):
                # The nearest first.
                before = chain[:place][::-1][: checkpoint.depth]
                sites[module] = _site(checkpoint, module, before, first=place == 0, nearest=chain[place - 1])
        return LoweredAdapter(self.name, dict(sorted(sites.items())), checkpoint.sites.warnings)

    def verify(self, adapter: LoweredAdapter, base: BaseModel) -> None:
        verify(adapter, base)


def _site(
    checkpoint: ResLoraCheckpoint, module: str, before: Sequence[str], *, first: bool, nearest: str
) -> LoweredSite:
    shortcut, modules = checkpoint.shortcut, checkpoint.sites.modules
    stacked = [modules[module], *(modules[other] for other in before if shortcut == _BLOCK)]
    a = [factor for part in stacked for factor in part["a"]]
    b = [factor for part in stacked for factor in part["b"]]
    scale = checks.rank_scale(module, checkpoint.rank, checkpoint.alpha, checkpoint.alpha / checkpoint.rank)
    site = summed_site(a, b, [scale] * len(b))
    if shortcut == _INPUT:
        if first:
            return replace(site, scale=2 * site.scale)
        return replace(site, carry=Carry(nearest, CarryKind.AHEAD_ROWS))
    if shortcut == _MIDDLE and before:
        return replace(site, carry=Carry(before[0], CarryKind.PREV_U, len(before)))
    return site


def _linked(group: Sequence[str], base: BaseModel) -> Iterator[list[str]]:
    """The layers of one kind, cut where the widths change."""
    for _, chain in groupby(group, key=lambda module: base.linears[module]):
        yield list(chain)


def _parse(raw: Mapping[str, Any]) -> _Config:
    with Fields({name: value for name, value in raw.items() if name not in _TRAINING_FIELDS}) as fields:
        rank, alpha = fields.integer("rank"), fields.number("lora_alpha")
        shortcut, merging, depth = (
            fields.integer("res_flag"),
            fields.integer("merge_flag", 0),
            fields.integer("pre_num", 0),
        )
        number, last = fields.integer("lora_num", 1), fields.integer("start_index", 0)
        letters = fields.text("target_modules").lower().split(".")
    for field, valid, rule in (
        ("rank", rank > 0, "must be above 0"),
        ("res_flag", _PLAIN <= shortcut <= _MIDDLE, "must be 0 to 3"),
        ("pre_num", depth >= -1, "must be at least -1"),
        (
            "target_modules",
            set(letters) <= _TARGETS.keys(),
            f"must be letters of {', '.join(_TARGETS)} with dots between",
        ),
    ):
        if not valid:
            raise _invalid(field, rule)
    if merging != 0 and shortcut in (_INPUT, _MIDDLE):
        raise AdapterUnsupportedFeature(
            f"reslora_config.json: merge_flag is {merging}: when it evaluates, ResLoRA's code approximates, with "
            "factors from training, which it does not save.",
            hint="Set merge_flag to 0 for what was trained, without the approximation.",
            field="merge_flag",
        )
    targets = tuple(name for letter in dict.fromkeys(letters) for name in _TARGETS[letter])
    # -100: none was begun. A file whose LoRAs were added up has fewer of them than that.
    return _Config(rank, alpha, shortcut, sys.maxsize if depth == -1 else depth, max(1, min(number, last + 1)), targets)


def _invalid(field: str, rule: str) -> AdapterConfigInvalid:
    return AdapterConfigInvalid(
        f"reslora_config.json: {field} {rule}.", hint="Correct it as it was in training.", field=field
    )
