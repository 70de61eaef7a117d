"""Arrow: a router over several LoRAs that needs no training (arXiv 2405.11157).

    v_e = top right singular vector of ΔW_e = B_e · diag(s_e) · A_e           prototype of adapter e at this site
    l_e = |v_e · x_t| / T      S = the k largest      g = softmax(l) over S, 0 elsewhere
    y_t = W0 x_t + Σ_e g_e(x_t) · ΔW_e · x_t

v_e is found exactly, in float64, without forming ΔW_e [d_out, d_in]: with Aᵀ = Q·R and B·diag(s) = P·U, the right
singular vectors of ΔW are Q times those of the r × r matrix U·Rᵀ. Its sign does not matter and is fixed; a ΔW_e that is
zero has no direction and gets v_e = 0.

The result is what PEFT's `create_arrow_model` computes, with two differences. PEFT approximates v_e by 15 steps of an
unseeded power iteration; give its vectors as `prototypes` to compare. PEFT refuses adapters whose ranks or target
modules differ; here an adapter that does not touch a site is an expert without rank rows there, with v_e = 0, as PEFT
treats one whose B is zero: it takes its share of g and adds nothing.
"""

from collections.abc import Mapping, Sequence

import torch

from loramux_adapters.base_model import BaseModel
from loramux_adapters.compose.plain import check_plain
from loramux_adapters.errors import AdapterConfigInvalid, AdapterShapeMismatch, shown
from loramux_adapters.gate import Gate, Norm, PostMap, Select
from loramux_adapters.lowered import LoweredAdapter, LoweredSite
from loramux_adapters.verify import verify

METHOD = "arrow"


def arrow(
    adapters: Sequence[tuple[str, LoweredAdapter]],
    *,
    base: BaseModel,
    top_k: int = 3,
    temperature: float = 1.0,
    prototypes: Mapping[str, torch.Tensor] | None = None,
) -> LoweredAdapter:
    """Compose plain LoRAs, checked on `base`: name and adapter each, and the e-th is expert e at every site.

    Names are for messages.

    prototypes  module -> [E, d_in] to use instead of the singular vectors, for every site

    Raises AdapterConfigInvalid for top_k or temperature, AdapterUnsupportedFeature for an adapter that is not a plain
    LoRA, and what `verify` raises for the result.
    """
    _check_options(len(adapters), top_k, temperature)
    for name, adapter in adapters:
        check_plain(name, adapter, hint="Arrow routes over plain LoRAs only.")
    sites, gates = {}, {}
    for module in sorted({module for _, adapter in adapters for module in adapter.sites}):
        parts = [adapter.sites.get(module) for _, adapter in adapters]
        d_in = base.linears[module][0]
        router = _prototypes(parts, d_in) if prototypes is None else prototypes[module]
        if router.shape != (len(adapters), d_in):
            raise AdapterShapeMismatch(
                f"The prototypes for {shown(module)} have shape {tuple(router.shape)}, not {(len(adapters), d_in)}.",
                hint="Give a row per adapter, as wide as the input of the layer.",
                field=module,
            )
        sites[module] = _stack(parts, gate=module)
        gates[module] = Gate(
            router, post=PostMap.ABS, temperature=temperature, select=Select.TOP_K, k=top_k, norm=Norm.RENORM
        )
    warnings = [f"{name}: {warning}" for name, adapter in adapters for warning in adapter.warnings]
    composed = LoweredAdapter(METHOD, sites, tuple(warnings), gates=gates)
    verify(composed, base)
    return composed


def prototype(site: LoweredSite) -> torch.Tensor:
    """The top right singular vector of the site's ΔW, [d_in] float64; its largest component is positive."""
    q, r = torch.linalg.qr(site.expanded_a.double().T)
    u = torch.linalg.qr(site.b.double().T * site.scale.double(), mode="r").R
    _, values, right = torch.linalg.svd(u @ r.T)
    vector: torch.Tensor = q @ right[0]
    if values[0] == 0:
        return torch.zeros_like(vector)
    return vector * vector[vector.abs().argmax()].sign()


def _prototypes(parts: list[LoweredSite | None], d_in: int) -> torch.Tensor:
    rows = [torch.zeros(d_in, dtype=torch.float64) if part is None else prototype(part) for part in parts]
    return torch.stack(rows).float()


def _stack(parts: list[LoweredSite | None], gate: str) -> LoweredSite:
    """The rank rows of those that touch the site, each marked with its place among all adapters."""
    present = [(expert, part) for expert, part in enumerate(parts) if part is not None]
    return LoweredSite(
        a=torch.cat([part.expanded_a for _, part in present]),
        b=torch.cat([part.b for _, part in present]),
        scale=torch.cat([part.scale for _, part in present]),
        gate=gate,
        expert=torch.cat([torch.full((part.rank,), expert, dtype=torch.int32) for expert, part in present]),
    )


def _check_options(experts: int, top_k: int, temperature: float) -> None:
    if not 1 <= top_k <= experts:
        raise AdapterConfigInvalid(
            f"top_k is {top_k} with {experts} adapters.",
            hint="Choose at least one and at most as many as there are adapters.",
            field="top_k",
        )
    if not 0 < temperature < float("inf"):
        raise AdapterConfigInvalid(
            f"The temperature is {temperature}.", hint="Give a positive number; 1 is usual.", field="temperature"
        )
