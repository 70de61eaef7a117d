"""What a Bayesian adapter's posterior is: its family, what a draw takes, and what may be wrong with it."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from loramux_adapters.artefact import Artefact, open_artefact
from loramux_adapters.lowered import LoweredAdapter, LoweredSite
from loramux_adapters.posterior.draw import samples
from loramux_adapters.posterior.families import keeps_b, ranks_added

# Half a unit in the last place of a number near 1 in bfloat16: what is smaller is rounded away.
_BFLOAT16 = 2.0**-8


@dataclass(frozen=True)
class Posterior:
    """`posterior_of`'s answer.

    family      the kind of posterior, `VarianceKind`'s words; several, for different sites, are joined by "+"
    sites       how many sites have one
    parameters  numbers that it is made of, the mean's not counted
    samples     how many different draws there are, None without a limit
    draw_bytes  bytes of the tensors that one draw has of its own, in the dtypes that they are stored in, at most; B,
                where no draw changes it, is its mean's
    draw_rank   the largest rank that a draw may have at a site
    warnings    what makes draws less than they should be
    """

    family: str
    sites: int
    parameters: int
    samples: int | None
    draw_bytes: int
    draw_rank: int
    warnings: tuple[str, ...]


def is_bayesian(adapter: Artefact | LoweredAdapter) -> bool:
    return adapter.summary.bayesian if isinstance(adapter, Artefact) else adapter.bayesian


def posterior_of(adapter: Artefact | LoweredAdapter) -> Posterior | None:
    """The adapter's posterior, None if it has none. Reads every mean and standard deviation: keep the answer.

    Raises AdapterNotFound or AdapterCorrupt for an artefact that is lost or damaged.
    """
    if not is_bayesian(adapter):
        return None
    if isinstance(adapter, Artefact):
        adapter = open_artefact(adapter.path)
    sites = {module: site for module, site in adapter.sites.items() if site.variance is not None}
    variances = [site.variance for site in sites.values() if site.variance is not None]
    return Posterior(
        family=adapter.posterior or "",
        sites=len(sites),
        parameters=sum(tensor.numel() for variance in variances for tensor in variance.tensors.values()),
        samples=samples(adapter),
        draw_bytes=adapter.mean.nbytes()
        + sum(_bytes_added(site) for site in sites.values())
        - sum(adapter.sites[module].b.nbytes for module in kept_b(adapter)),
        draw_rank=max(drawn_ranks(adapter).values()),
        warnings=tuple(_warnings(sites)),
    )


def drawn_ranks(adapter: LoweredAdapter) -> dict[str, int]:
    """The ranks of a draw, at most."""
    return {module: site.rank + _added(site) for module, site in adapter.sites.items()}


def kept_b(adapter: LoweredAdapter) -> frozenset[str]:
    """The modules that have ranks, and in every draw the mean's B, bit for bit."""
    return frozenset(
        module
        for module, site in adapter.sites.items()
        if site.rank and (site.variance is None or keeps_b(site.variance))
    )


def _added(site: LoweredSite) -> int:
    return 0 if site.variance is None else ranks_added(site.variance)


def _bytes_added(site: LoweredSite) -> int:
    row = site.a[0].nbytes + site.b[0].nbytes + site.scale.dtype.itemsize
    return _added(site) * (row + (0 if site.arow is None else site.arow.dtype.itemsize))


def _warnings(sites: Mapping[str, LoweredSite]) -> Iterator[str]:
    ratios = [ratio for site in sites.values() for ratio in _ratios(site)]
    swallowed = [ratio for ratio in ratios if ratio < _BFLOAT16]
    if swallowed:
        yield (
            f"bfloat16 would swallow the noise at {len(swallowed)} of {len(ratios)} factors: the median of σ/|mean| is "
            f"as low as {min(swallowed):.2g}, below 2⁻⁸. Store and serve it in float32, or its draws are hardly any."
        )


def _ratios(site: LoweredSite) -> Iterator[float]:
    """Medians of σ/|mean| of the site's factors."""
    assert site.variance is not None
    for name, factor in (("sigma_a", site.a), ("sigma_b", site.b)):
        if (sigma := site.variance.tensors.get(name)) is not None:
            ratio = sigma.float() / factor.float().abs()
            yield float(torch.nanmedian(ratio))
