"""TFB: a posterior for a LoRA that has none, without training (arXiv 2412.05723).

    B = U·diag(d)·Vᵀ        B' = U·diag(d)        A' = Vᵀ·A        A'_kj ~ N(A'_kj, (σ_q / (d_k + 1e-6))²)

B'·A' = B·A, so the mean computes what it did, up to rounding to float32. Noise in rank k then moves the output by σ_q
whatever d_k is: every direction of B has the same deviation, which is the paper's choice among the posteriors of low
rank. σ_q is one number for the adapter, found by `tfb_search.py` or given.

Read in Wang-ML-Lab/bayesian-peft at bc6a4a7 (`modelwrappers/tfblora.py`), where d is of B alone, without LoRA's scale,
as here. Of a mixture every expert's B is taken apart; an A that experts share becomes one of each expert's own. Where
the scales of one expert's ranks differ, they are multiplied into B first.
"""

from dataclasses import replace

import torch

from loramux_adapters.base_model import BaseModel
from loramux_adapters.errors import AdapterConfigInvalid, AdapterUnsupportedFeature, shown
from loramux_adapters.lowered import LoweredAdapter, LoweredSite
from loramux_adapters.variance import Variance, VarianceKind
from loramux_adapters.verify import verify

_EPSILON = 1e-6
_LARGEST = 1e6


def tfb(adapter: LoweredAdapter, base: BaseModel, sigma_q: float) -> LoweredAdapter:
    """The adapter with a posterior of kind `diagonal_a` at every site that has ranks.

    Raises AdapterConfigInvalid unless σ_q is above 0 and of sensible size, AdapterUnsupportedFeature for an adapter
    that is Bayesian already or has magnitudes, carries or feed-forward mixtures, and what `verify` raises for the
    result.
    """
    if not 0 < sigma_q <= _LARGEST:
        raise AdapterConfigInvalid(
            f"σ_q is {sigma_q}.", hint=f"Give a number above 0 and at most {_LARGEST:g}.", field="sigma_q"
        )
    check_plain_sites(adapter)
    sites = {module: _site(site, sigma_q) if site.rank else site for module, site in adapter.sites.items()}
    result = replace(adapter, sites=sites)
    verify(result, base)
    return result


def check_plain_sites(adapter: LoweredAdapter) -> None:
    """Raises AdapterUnsupportedFeature for what B has more in it, or beside it, than TFB knows of."""
    if adapter.ffn:
        raise _unsupported(next(iter(adapter.ffn)), "a mixture of feed-forward blocks")
    for module, site in adapter.sites.items():
        for field in ("variance", "magnitude", "carry"):
            if getattr(site, field) is not None:
                raise _unsupported(f"sites.{module}.{field}", f"a {field}")


def _site(site: LoweredSite, sigma_q: float) -> LoweredSite:
    owner = torch.zeros(site.rank, dtype=torch.int32) if site.expert is None else site.expert
    a, b, scale, sigma, expert = [], [], [], [], []
    for one in torch.unique(owner):
        ranks = owner == one
        rows, columns, scales = site.expanded_a[ranks].double(), site.b[ranks].double(), site.scale[ranks].double()
        if bool((scales != scales[0]).any()):
            columns, scales = columns * scales[:, None], torch.ones_like(scales)
        u, d, vt = torch.linalg.svd(columns.T, full_matrices=False)
        a.append(vt @ rows)
        b.append((u * d).T)
        scale.append(scales[: len(d)])
        sigma.append((sigma_q / (d + _EPSILON))[:, None].expand(-1, rows.shape[1]))
        expert.append(one.expand(len(d)))
    return replace(
        site,
        a=torch.cat(a).float(),
        b=torch.cat(b).float(),
        scale=torch.cat(scale).float(),
        expert=None if site.expert is None else torch.cat(expert),
        arow=None,
        variance=Variance(VarianceKind.DIAGONAL_A, {"sigma_a": torch.cat(sigma).float()}),
        bands=1,  # Vᵀ mixes the ranks of all blocks
    )


def _unsupported(field: str, what: str) -> AdapterUnsupportedFeature:
    return AdapterUnsupportedFeature(
        f"{shown(field)}: the adapter has {what}, and TFB takes apart the B of a LoRA.",
        hint="Use a LoRA, or a mixture of LoRAs, without it.",
        field=field,
    )
