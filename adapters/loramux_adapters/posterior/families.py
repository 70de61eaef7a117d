"""What each kind of posterior makes of a site in one draw; the laws are in `loramux_adapters.variance`.

Sums are made in float32, one product and one addition at a time so that they are the same on every machine, and rounded
once, to the dtype of what they replace.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch

from loramux_adapters.lowered import LoweredSite
from loramux_adapters.posterior.noise import WHOLE_ADAPTER, Noise, Stream
from loramux_adapters.variance import Variance, VarianceKind

SKETCHES = 4
"""q of the sketch of HIERARCHICAL. Any q gives the right variances and covariances, and outputs that are sums of q·d_in
signs, so nearly normal; but the squares of two outputs are correlated by up to 1/q. It costs q ranks for every rank of
the standard deviation."""


def draw_site(module: str, site: LoweredSite, variance: Variance, noise: Noise) -> LoweredSite:
    """The site of one draw, without a posterior. It was verified, and so was the number of the sample."""
    return replace(_LAWS[variance.kind](module, site, variance, noise), variance=None)


def ranks_added(variance: Variance) -> int:
    """How many ranks a draw may have more than the mean."""
    if variance.kind is not VarianceKind.HIERARCHICAL:
        return 0
    return SKETCHES * (len(variance.tensors["std_a"]) + 1)


def keeps_b(variance: Variance) -> bool:
    """Whether every draw has the mean's B, bit for bit."""
    return variance.kind in _OF_A


def _diagonal(module: str, site: LoweredSite, variance: Variance, noise: Noise) -> LoweredSite:
    changed: dict[str, Any] = {
        name: _plus(getattr(site, name), _scaled(variance.tensors[sigma], module, stream, noise))
        for name, sigma, stream in _FACTORS
        if sigma in variance.tensors
    }
    return replace(site, **changed)


def _rank_diagonal(module: str, site: LoweredSite, variance: Variance, noise: Noise) -> LoweredSite:
    deviation = _scaled(variance.tensors["sigma_scale"][None], module, Stream.SCALE, noise)
    return replace(site, scale=_plus(site.scale, deviation[0]))


def _low_rank_diagonal(module: str, site: LoweredSite, variance: Variance, noise: Noise) -> LoweredSite:
    changed: dict[str, Any] = {}
    for name, sigma, stream in _FACTORS:
        deviation = _scaled(variance.tensors[sigma], module, stream, noise)
        directions = variance.tensors[f"low_rank_{name}"]
        lengths = noise.normals(WHOLE_ADAPTER, Stream.DEVIATIONS, range(1), range(len(directions)))[0]
        for length, direction in zip(lengths, directions, strict=True):
            deviation = deviation + length * direction.float()
        changed[name] = _plus(getattr(site, name), deviation)
    return replace(site, **changed)


def _ensemble(module: str, site: LoweredSite, variance: Variance, noise: Noise) -> LoweredSite:
    a, b, scale = (variance.tensors[f"member_{name}"][noise.sample] for name in ("a", "b", "scale"))
    return replace(site, a=a, b=b, scale=scale.float())


def _dropout(module: str, site: LoweredSite, variance: Variance, noise: Noise) -> LoweredSite:
    assert variance.rate is not None
    kept = noise.kept(module, variance.rate, range(site.a.shape[1]))
    return replace(site, a=(site.a.float() * kept / (1 - variance.rate)).to(site.a.dtype))


def _hierarchical(module: str, site: LoweredSite, variance: Variance, noise: Noise) -> LoweredSite:
    """S ⊙ ε with ε = q^-½ Σ_k u_k v_kᵀ of random signs is q^-½ Σ_k diag(u_k) S diag(v_k): ranks like any others.

    Var and Cov of ΔW·x over draws are those of independent normals: E ε = 0 and E ε_oi ε_pj is 1 where o = p and i = j,
    else 0.
    """
    std_a, std_b, offset = (variance.tensors[name].float() for name in ("std_a", "std_b", "offset"))
    std_a = torch.cat([std_a, torch.ones(1, std_a.shape[1])])
    std_b = torch.cat([std_b, offset.expand(1, std_b.shape[1])])
    live = (std_a != 0).any(dim=1) & (std_b != 0).any(dim=1)
    std_a, std_b = std_a[live], std_b[live]
    if not len(std_a):
        return site
    a, b = [], []
    for k in range(SKETCHES):
        a.append(std_a * noise.signs(module, Stream.SKETCH_IN, k, range(std_a.shape[1])))
        b.append(std_b * noise.signs(module, Stream.SKETCH_OUT, k, range(std_b.shape[1])))
    added = SKETCHES * len(std_a)
    rows = torch.arange(len(site.a), len(site.a) + added, dtype=torch.int32)
    return replace(
        site,
        a=torch.cat([site.a, *(part.to(site.a.dtype) for part in a)]),
        b=torch.cat([site.b, *(part.to(site.b.dtype) for part in b)]),
        scale=torch.cat([site.scale.float(), torch.full((added,), SKETCHES**-0.5)]),
        arow=None if site.arow is None else torch.cat([site.arow, rows]),
    )


def _scaled(sigma: torch.Tensor, module: str, stream: Stream, noise: Noise) -> torch.Tensor:
    """σ ⊙ z in float32."""
    rows, columns = sigma.shape
    return sigma.float() * noise.normals(module, stream, range(rows), range(columns))


def _plus(mean: torch.Tensor, deviation: torch.Tensor) -> torch.Tensor:
    # Where nothing is added, -0.0 stays -0.0.
    return torch.where(deviation == 0, mean.float(), mean.float() + deviation).to(mean.dtype)


_FACTORS = (("a", "sigma_a", Stream.A), ("b", "sigma_b", Stream.B))
_OF_A = frozenset({VarianceKind.DIAGONAL_A, VarianceKind.RANK_DIAGONAL, VarianceKind.DROPOUT})
"""Which kinds leave B as it is."""
_LAWS: Mapping[VarianceKind, Callable[[str, LoweredSite, Variance, Noise], LoweredSite]] = {
    VarianceKind.DIAGONAL_A: _diagonal,
    VarianceKind.DIAGONAL_AB: _diagonal,
    VarianceKind.RANK_DIAGONAL: _rank_diagonal,
    VarianceKind.LOW_RANK_DIAGONAL: _low_rank_diagonal,
    VarianceKind.ENSEMBLE: _ensemble,
    VarianceKind.DROPOUT: _dropout,
    VarianceKind.HIERARCHICAL: _hierarchical,
}
