"""MELoRA: n small LoRAs side by side, each from one part of the input to one part of the output (arXiv 2402.17263).

    y_t = W0 x_t + concat_i( α_i/r_i · B_i · A_i · x_t[i·w : (i+1)·w] )        w = d_in // n

A_i [r_i, w], B_i [d_out/n, r_i], i = 0 … n-1: a block-diagonal ΔW of rank Σ r_i. Lowered to one LoRA of that rank,
with zeros outside of the blocks: a [Σ r_i, d_in], b [Σ r_i, d_out]. Where all r_i are equal and n divides d_in, that
form says `bands: n`, and the data plane packs row j of every block into one row: the bytes and the work of a LoRA of
rank r_i. Its kernels on a GPU can do so where blocks are multiples of 128 wide on both sides, in all the layers that
the engine fuses. Elsewhere the zeros are served, n times the blocks' bytes and work, and warnings say in how many
layers. The lowered file has the zeros in any case; its size is checked against the limit for files.

Read in ChasonShi/MELoRA at 4ebb8b4 (`peft-0.5.0/src/peft/tuners/melora.py`): names `lora_A.{i}.weight`,
`lora_B.{i}.weight`; config `peft_type: MELORA` with lists `r` and `lora_alpha` of length n. Its forward pass does not
read `mode`. Where n does not divide d_in, the inputs beyond n·w are read by none of them; where it does not divide
d_out, or an r_i is 0, the code fails: refused.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from loramux_adapters.abilities import Abilities, Layout
from loramux_adapters.base_model import BaseModel
from loramux_adapters.errors import AdapterConfigInvalid, AdapterError, shown
from loramux_adapters.files import AdapterFolder
from loramux_adapters.fold import check_lowered_size
from loramux_adapters.lowered import LoweredAdapter, LoweredSite
from loramux_adapters.methods.lora import CONFIG_FILE, peft_config
from loramux_adapters.mixture import summed_site
from loramux_adapters.peft import checks, experts
from loramux_adapters.peft.sites import Part, Sites, read_sites
from loramux_adapters.peft.targets import Targets
from loramux_adapters.peft.tensors import PREFIX
from loramux_adapters.verify import verify
from loramux_kernels import BAND_UNIT

_LAYOUT = {
    "a": Part(PREFIX + "{module}.lora_A.{index}.weight", "RI"),
    "b": Part(PREFIX + "{module}.lora_B.{index}.weight", "OR"),
}
_OWN_FIELDS = frozenset({"r", "mode"})
_HINT = "Give it as it was in training: a list with a number for each of the small LoRAs."


@dataclass(frozen=True)
class MeloraCheckpoint:
    sites: Sites
    alphas: tuple[float, ...]


class Melora:
    """The layout of MELoRA's authors."""

    name = "melora"
    abilities = Abilities((Layout("MELoRA", "ChasonShi/MELoRA", ("MELORA",)),))

    def detect(self, folder: AdapterFolder) -> bool:
        return peft_config(folder).get("peft_type") in self.abilities.types

    def read(self, folder: AdapterFolder, base: BaseModel) -> MeloraCheckpoint:
        raw = folder.read_json(CONFIG_FILE)
        ranks, alphas = _ranks(raw), _alphas(raw)
        if len(alphas) != len(ranks):
            raise _invalid("lora_alpha", f"has {len(alphas)} numbers, but r has {len(ranks)}")
        config = experts.parse_shared_fields(dict(raw) | {"lora_alpha": 1}, _OWN_FIELDS, sum(ranks))
        targets, number = Targets(config), len(ranks)
        for module in sorted(targets.select(base.linears)):
            d_in, d_out = base.linears[module]
            if d_in < number or d_out % number != 0:
                raise _invalid("r", f"has {number} numbers, which do not divide {shown(module)} ({d_in} to {d_out})")

        def sizes(module: str, index: int) -> Mapping[str, int]:
            d_in, d_out = base.linears[module]
            return {"R": ranks[index], "I": d_in // number, "O": d_out // number}

        sites = read_sites(folder, base, config, _LAYOUT, sizes, count=number, targets=targets)
        check_lowered_size(dict.fromkeys(sites.modules, sum(ranks)), base, folder.max_bytes)
        return MeloraCheckpoint(sites, alphas)

    def lower(self, checkpoint: MeloraCheckpoint, base: BaseModel) -> LoweredAdapter:
        sites = {}
        for module, part in checkpoint.sites.modules.items():
            scale = [
                checks.rank_scale(module, len(a), alpha, alpha / len(a))
                for a, alpha in zip(part["a"], checkpoint.alphas, strict=True)
            ]
            d_in, d_out = base.linears[module]
            b = [block.T for block in _placed([block.T for block in part["b"]], d_out)]
            alike = len({len(a) for a in part["a"]}) == 1 and d_in % len(part["a"]) == 0
            site = summed_site(_placed(part["a"], d_in), b, scale)
            sites[module] = replace(site, bands=len(part["a"]) if alike else 1)
        return LoweredAdapter(self.name, sites, (*checkpoint.sites.warnings, *_cost(checkpoint, sites)))

    def verify(self, adapter: LoweredAdapter, base: BaseModel) -> None:
        verify(adapter, base)


def _cost(checkpoint: MeloraCheckpoint, sites: Mapping[str, LoweredSite]) -> Iterator[str]:
    """What the zeros take, where they cannot be left out."""
    if (number := len(checkpoint.alphas)) == 1:
        return
    whole = [module for module, site in sites.items() if site.bands == 1]
    narrow = [
        module
        for module, site in sites.items()
        if site.bands > 1 and any(factor.shape[1] % (number * BAND_UNIT) for factor in (site.a, site.b))
    ]
    for modules, where in ((whole, ""), (narrow, "On a GPU, ")):
        blocks = sum(block.nbytes for m in modules for key in "ab" for block in checkpoint.sites.modules[m][key])
        nbytes = sum(sites[m].a.nbytes + sites[m].b.nbytes for m in modules)
        if modules:
            yield (
                f"{where}MELoRA's {number} blocks of {len(modules)} layers are served with the zeros outside of them: "
                f"{nbytes} bytes instead of {blocks}, and {number} times the work."
            )


def _placed(blocks: Sequence[torch.Tensor], width: int) -> list[torch.Tensor]:
    """Each block [r_i, w] in its own w columns of `width`, right of the one before, and zeros in the others."""
    w = blocks[0].shape[1]
    return [torch.nn.functional.pad(block, (i * w, width - (i + 1) * w)) for i, block in enumerate(blocks)]


def _ranks(raw: Mapping[str, Any]) -> tuple[int, ...]:
    value = raw.get("r")
    if isinstance(value, list) and value and all(type(rank) is int and rank > 0 for rank in value):
        return tuple(value)
    raise _invalid("r", f"must be a list of whole numbers above 0, not {shown(value)}")


def _alphas(raw: Mapping[str, Any]) -> tuple[float, ...]:
    value = raw.get("lora_alpha")
    if isinstance(value, list) and all(type(alpha) in (int, float) and abs(alpha) <= 1e30 for alpha in value):
        return tuple(float(alpha) for alpha in value)
    raise _invalid("lora_alpha", f"must be a list of numbers of sensible size, not {shown(value)}")


def _invalid(field: str, what: str) -> AdapterError:
    return AdapterConfigInvalid(f"adapter_config.json: {field} {what}.", hint=_HINT, field=field)
