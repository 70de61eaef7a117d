"""A weighted sum of plain adapters, exactly:

    ΔW = Σ_i w_i ΔW_i = Σ_i B_i · diag(w_i s_i) · A_i        bias = Σ_i w_i bias_i

The rank rows of all are set side by side, so ranks add up; w_i goes into the scales, rounded once to float32. That is
PEFT's `add_weighted_adapter(combination_type="cat")`; LoraHub (`methods/lorahub.py`) sums factors instead, which is
another adapter.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from loramux_adapters.artefact import Artefact, open_artefact
from loramux_adapters.base_model import BaseModel
from loramux_adapters.compose.plain import check_plain
from loramux_adapters.errors import AdapterTooLarge, shown
from loramux_adapters.lowered import LoweredAdapter, LoweredSite
from loramux_adapters.prepare import keep
from loramux_adapters.verify import verify

METHOD = "linear"
_NOT_PLAIN = ("gate", "magnitude", "carry", "variance")
_HINT = "Weighted sums are of adapters that are one matrix per layer. Ask for this one alone, as `model`."


@dataclass(frozen=True)
class Part:
    """A prepared adapter, its weight, and which of its tasks if it has some; `name` is for messages."""

    name: str
    artefact: Artefact
    weight: float
    task: int | None = None  # none: the default one


def compose(parts: Sequence[Part], *, base: BaseModel, cache: Path, max_rank: int) -> Artefact:
    """Keep the weighted sum of prepared adapters in `cache`, like `prepare`.

    Raises AdapterTooLarge if a module's ranks add up to more than `max_rank`, what `linear` raises, AdapterCorrupt or
    AdapterNotFound for a part whose artefact is damaged or lost, and OSError for the cache.
    """
    _check_ranks(parts, max_rank)
    adapters = [(part.name, open_artefact(part.artefact.path, part.task), part.weight) for part in parts]
    return keep(linear(adapters, base=base), base, cache)


def linear(parts: Sequence[tuple[str, LoweredAdapter, float]], *, base: BaseModel) -> LoweredAdapter:
    """The weighted sum of plain adapters: name, adapter, weight; names are for messages and not in the result.

    Raises AdapterUnsupportedFeature for an adapter that is not plain, and what `verify` raises for the result.
    """
    for name, adapter, _ in parts:
        check_plain(name, adapter, _NOT_PLAIN, hint=_HINT)
    sites = {
        module: _sum([(adapter.sites[module], weight) for _, adapter, weight in parts if module in adapter.sites])
        for module in sorted({module for _, adapter, _ in parts for module in adapter.sites})
    }
    composed = LoweredAdapter(METHOD, sites)
    verify(composed, base)
    return composed


def _sum(sites: Sequence[tuple[LoweredSite, float]]) -> LoweredSite:
    biases = [weight * site.bias.double() for site, weight in sites if site.bias is not None]
    return LoweredSite(
        a=torch.cat([site.expanded_a for site, _ in sites]),
        b=torch.cat([site.b for site, _ in sites]),
        scale=torch.cat([(weight * site.scale.double()).float() for site, weight in sites]),
        bias=torch.stack(biases).sum(0).float() if biases else None,
    )


def _check_ranks(parts: Sequence[Part], max_rank: int) -> None:
    ranks: Counter[str] = Counter()
    for part in parts:
        ranks.update(part.artefact.summary.ranks)
    module = max(sorted(ranks), key=ranks.__getitem__, default="")
    if ranks[module] > max_rank:
        each = " + ".join(str(part.artefact.summary.ranks.get(module, 0)) for part in parts)
        raise AdapterTooLarge(
            f"The ranks at {shown(module)} add up to {ranks[module]} ({each}); the largest that is served is "
            f"{max_rank}.",
            hint="Leave a part out, recompress one (loramux adapters compact), or start the server with a larger "
            "--max-lora-rank.",
        )
