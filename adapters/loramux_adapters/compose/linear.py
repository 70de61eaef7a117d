"""A weighted sum of plain adapters, exactly:

    ΔW = Σ_i w_i ΔW_i = Σ_i B_i · diag(w_i s_i) · A_i        bias = Σ_i w_i bias_i

The rank rows of all are set side by side, so ranks add up; w_i goes into the scales, rounded once to float32. That is
PEFT's `add_weighted_adapter(combination_type="cat")`; LoraHub (`methods/lorahub.py`) sums factors instead, which is
another adapter.
"""

from collections.abc import Sequence

import torch

from loramux_adapters.base_model import BaseModel
from loramux_adapters.compose.plain import check_plain
from loramux_adapters.lowered import LoweredAdapter, LoweredSite
from loramux_adapters.verify import verify

METHOD = "linear"
_NOT_PLAIN = ("gate", "magnitude", "carry", "variance")
_HINT = "Weighted sums are of adapters that are one matrix per layer. Ask for this one alone, as `model`."


def linear(parts: Sequence[tuple[str, LoweredAdapter, float]], *, base: BaseModel) -> LoweredAdapter:
    """The weighted sum of plain adapters: name, adapter, weight; names are for messages and not in the result.

    Raises AdapterUnsupportedFeature for an adapter that is not plain, and what `verify` raises for the result.
    """
    for name, adapter, _ in parts:
        check_plain(name, adapter, _HINT, _NOT_PLAIN)
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
