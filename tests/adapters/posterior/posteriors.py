"""A posterior of every kind, at sites of the tiny base."""

import torch

from loramux_adapters import LoweredAdapter, LoweredSite, Variance
from loramux_adapters.variance import SHAPES, STANDARD_DEVIATIONS, VarianceKind

from ..natives import DOWN, UP, Q, make_site

FREE = {"K": 3, "S": 4, "V": 2, "1": 1}


def make_variance(kind, site, scale=0.3, seed=11):
    generator = torch.Generator().manual_seed(seed)
    axes = FREE | {"Ra": site.a.shape[0], "I": site.a.shape[1], "R": site.rank, "O": site.b.shape[1]}
    tensors = {
        name: scale * torch.randn([axes[letter] for letter in letters], generator=generator)
        for name, letters in SHAPES[kind].items()
    }
    tensors |= {name: tensors[name].abs() for name in STANDARD_DEVIATIONS if name in tensors}
    return Variance(kind, tensors, rate=0.25 if kind is VarianceKind.DROPOUT else None)


def make_bayesian(kind, scale=0.3, dtype=torch.float32, **fields):
    """A posterior at two sites, one of them with rows of A that ranks share, and a plain site."""
    shared = torch.tensor([0, 1, 1, 0, 2], dtype=torch.int32)
    sites = {Q: make_site(**fields), DOWN: make_site(DOWN, 5, seed=1), UP: make_site(UP)}
    sites[DOWN] = LoweredSite(sites[DOWN].a[:3], sites[DOWN].b, sites[DOWN].scale, arow=shared)
    for seed, module in enumerate((Q, DOWN)):
        site = sites[module]
        site = LoweredSite(**vars(site) | {"a": site.a.to(dtype), "b": site.b.to(dtype)})
        sites[module] = LoweredSite(**vars(site) | {"variance": make_variance(kind, site, scale, seed)})
    return LoweredAdapter("x", sites)
