"""One draw of the weights of a Bayesian adapter: a plain adapter, whose weights are the same for every token.

Every site's ranks are drawn, those of every expert of a mixture too; routers, magnitudes, biases and carries are the
mean's own.
"""

from dataclasses import replace

from loramux_adapters.errors import (
    AdapterConfigInvalid,
    AdapterNotFinite,
    AdapterUnsupportedFeature,
    shown,
)
from loramux_adapters.lowered import LoweredAdapter, LoweredSite
from loramux_adapters.posterior.families import draw_site
from loramux_adapters.posterior.noise import Noise
from loramux_adapters.variance import VarianceForm, VarianceKind
from loramux_adapters.verify import all_finite

MAX_SEED = (1 << 63) - 1
MAX_SAMPLE = (1 << 31) - 1


def draw(adapter: LoweredAdapter, *, digest: str, seed: int, sample: int) -> LoweredAdapter:
    """The adapter of one weight draw, without a posterior, at the same sites.

    It depends on `digest` (the artefact's), `seed` and `sample` alone: always the same for the same three. Of an
    ensemble it is the member `sample`, whatever the seed. Where every σ is 0 it is the mean, bit for bit.

    Raises AdapterUnsupportedFeature for an adapter without a posterior, or with one that cannot be drawn from;
    AdapterConfigInvalid for a seed or a sample that there is not; and AdapterNotFinite for weights beyond the range of
    their dtype.
    """
    if not adapter.bayesian:
        raise AdapterUnsupportedFeature(
            "The adapter has no posterior to draw from.",
            hint="Use a Bayesian adapter, or make it one: loramux adapters bayesianize.",
            field="variance",
        )
    for module, site in adapter.sites.items():
        _check_drawable(module, site)
    _check_number("seed", seed, MAX_SEED)
    members = samples(adapter)
    _check_number("sample", sample, MAX_SAMPLE if members is None else members - 1)
    noise = Noise(digest, seed, sample)
    sites = {
        module: site if site.variance is None else _checked(module, draw_site(module, site, site.variance, noise))
        for module, site in adapter.sites.items()
    }
    return replace(adapter, sites=sites)


def samples(adapter: LoweredAdapter) -> int | None:
    """How many draws there are: the members of an ensemble; None for other posteriors, which have no end of them."""
    return min(
        (
            len(site.variance.tensors["member_a"])
            for site in adapter.sites.values()
            if site.variance is not None and site.variance.kind is VarianceKind.ENSEMBLE
        ),
        default=None,
    )


def _check_drawable(module: str, site: LoweredSite) -> None:
    if site.variance is not None and site.variance.form is not VarianceForm.LINEAR:
        raise AdapterUnsupportedFeature(
            f"{shown(module)}: standard deviations that are {site.variance.form} of a product have no low rank, so a "
            "draw of them is no adapter.",
            hint="Its mean is served. To draw from it, train it with a linear form.",
            field=f"sites.{module}.variance.form",
        )


def _checked(module: str, site: LoweredSite) -> LoweredSite:
    for name, tensor in (("A", site.a), ("B", site.b), ("scale", site.scale)):
        if not all_finite(tensor):
            raise AdapterNotFinite(
                f"A draw of {shown(module)}.{name} is beyond the range of {str(tensor.dtype).removeprefix('torch.')}.",
                hint="Its standard deviations are too large: use an earlier checkpoint, or save it in float32.",
                field=f"{module}.{name}",
            )
    return site


def _check_number(field: str, value: int, largest: int) -> None:
    if type(value) is not int or not 0 <= value <= largest:
        raise AdapterConfigInvalid(
            f"The {field} of a draw is {shown(value)}.", hint=f"Give a whole number, 0 to {largest}.", field=field
        )
