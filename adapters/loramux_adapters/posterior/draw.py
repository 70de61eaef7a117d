"""One draw of the weights of a Bayesian adapter: a plain adapter, whose weights are the same for every token.

What each kind of posterior does is in `loramux_adapters.variance`. Sums are made in float32 and rounded once, to the
dtype of what they replace. Routers, magnitudes, biases and carries are the mean's own.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch

from loramux_adapters.errors import AdapterConfigInvalid, AdapterNotFinite, AdapterUnsupportedFeature, shown
from loramux_adapters.lowered import LoweredAdapter, LoweredSite
from loramux_adapters.posterior.noise import Noise, Stream
from loramux_adapters.variance import Variance, VarianceKind

MAX_SEED = (1 << 63) - 1
MAX_SAMPLE = (1 << 31) - 1


def draw(adapter: LoweredAdapter, *, digest: str, seed: int, sample: int) -> LoweredAdapter:
    """The adapter of one weight draw, without a posterior, at the same sites.

    It depends on `digest` (the artefact's), `seed` and `sample` alone: always the same for the same three. Where every
    σ is 0 it is the mean, bit for bit.

    Raises AdapterUnsupportedFeature for an adapter without a posterior, AdapterConfigInvalid for a seed or a sample
    that there is not, and AdapterNotFinite for weights beyond the range of their dtype.
    """
    if not adapter.bayesian:
        raise AdapterUnsupportedFeature(
            "The adapter has no posterior to draw from.",
            hint="Use a Bayesian adapter, or make it one: loramux adapters bayesianize.",
            field="variance",
        )
    _check("seed", seed, MAX_SEED)
    _check("sample", sample, MAX_SAMPLE)
    noise = Noise(digest, seed, sample)
    sites = {
        module: site if site.variance is None else _draw_site(module, site, site.variance, noise)
        for module, site in adapter.sites.items()
    }
    return replace(adapter, sites=sites)


def _draw_site(module: str, site: LoweredSite, variance: Variance, noise: Noise) -> LoweredSite:
    drawn = replace(_DRAWS[variance.kind](module, site, variance.tensors, noise), variance=None)
    for name, tensor in (("A", drawn.a), ("B", drawn.b), ("scale", drawn.scale)):
        if not bool(torch.isfinite(tensor).all()):
            raise AdapterNotFinite(
                f"A draw of {shown(module)}.{name} is beyond the range of {str(tensor.dtype).removeprefix('torch.')}.",
                hint="Its standard deviations are too large: use an earlier checkpoint, or save it in float32.",
                field=f"{module}.{name}",
            )
    return drawn


def _diagonal_a(module: str, site: LoweredSite, tensors: Mapping[str, torch.Tensor], noise: Noise) -> LoweredSite:
    return replace(site, a=_added(site.a, _scaled(tensors["sigma_a"], module, Stream.A, noise)))


def _scaled(sigma: torch.Tensor, module: str, stream: Stream, noise: Noise) -> torch.Tensor:
    """σ ⊙ z in float32."""
    rows, columns = sigma.shape
    return sigma.float() * noise.normals(module, stream, range(rows), range(columns))


def _added(mean: torch.Tensor, deviation: torch.Tensor) -> torch.Tensor:
    # Where nothing is added, -0.0 stays -0.0.
    return torch.where(deviation == 0, mean.float(), mean.float() + deviation).to(mean.dtype)


_DRAWS: Mapping[VarianceKind, Callable[[str, LoweredSite, Mapping[str, torch.Tensor], Noise], LoweredSite]] = {
    VarianceKind.DIAGONAL_A: _diagonal_a,
}


def _check(field: str, value: int, largest: int) -> None:
    if type(value) is not int or not 0 <= value <= largest:
        raise AdapterConfigInvalid(
            f"The {field} of a draw is {shown(value)}.", hint=f"Give a whole number, 0 to {largest}.", field=field
        )
