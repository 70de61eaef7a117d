"""Draws are samples of the posterior: their moments, what they leave alone, and that they are always the same ones."""

from dataclasses import replace

import pytest
import torch

from loramux_adapters import AdapterError, LoweredAdapter, Variance, draw
from loramux_adapters.artefact import digest_of
from loramux_adapters.variance import VarianceKind

from ..natives import DOWN, UP, Q, make_mixture, make_site, same

DRAWS = 2000


def diagonal(rank=4, width=24, sigma=None, seed=3):
    generator = torch.Generator().manual_seed(seed)
    sigma = torch.rand(rank, width, generator=generator) if sigma is None else torch.full((rank, width), sigma)
    return Variance(VarianceKind.DIAGONAL_A, {"sigma_a": sigma})


def blob(dtype=torch.float32, **fields):
    """A posterior at one site and none at another."""
    site = make_site(variance=diagonal(), **fields)
    return LoweredAdapter("x", {Q: replace(site, a=site.a.to(dtype), b=site.b.to(dtype)), UP: make_site(UP)})


def drawn(adapter, sample=0, seed=0, digest="d"):
    return draw(adapter, digest=digest, seed=seed, sample=sample)


def test_it_is_the_same_whenever_it_is_asked_for():
    assert same(drawn(blob(), 3), drawn(blob(), 3))
    others = [drawn(blob(), 3), drawn(blob(), 4), drawn(blob(), 3, seed=1), drawn(blob(), 3, digest="e")]
    assert len({digest_of(other) for other in others}) == 4


def test_other_modules_do_not_matter():
    """The same at a site whether others are there, were there before, or have other posteriors."""
    alone = LoweredAdapter("x", {Q: blob().sites[Q]})
    more = LoweredAdapter("x", {DOWN: make_site(DOWN, variance=diagonal(4, 40)), Q: blob().sites[Q]})
    assert same(drawn(alone).sites[Q], drawn(more).sites[Q])


def test_only_what_is_random_changes():
    adapter = make_mixture()
    sites = {Q: replace(adapter.sites[Q], variance=diagonal()), DOWN: adapter.sites[DOWN], UP: adapter.sites[UP]}
    result = drawn(replace(adapter, sites=sites))
    assert same(dict(result.gates), dict(adapter.gates)) and not result.bayesian
    assert same(result.sites[DOWN], adapter.sites[DOWN]) and same(result.sites[UP], adapter.sites[UP])
    assert same(replace(result.sites[Q], a=adapter.sites[Q].a), adapter.sites[Q])
    assert (result.sites[Q].a != adapter.sites[Q].a).all()  # the ranks of every expert


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_without_deviation_it_is_the_mean_bit_for_bit(dtype):
    a = make_site().a.to(dtype)
    a[0, 0] = -0.0
    adapter = LoweredAdapter("x", {Q: replace(make_site(), a=a, variance=diagonal(sigma=0.0))})
    assert same(drawn(adapter), adapter.mean)
    assert digest_of(drawn(adapter)) == digest_of(adapter.mean)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_it_is_rounded_once(dtype):
    """float32 numbers, cast: the same as a float32 adapter of these numbers, rounded at the end."""
    adapter = blob(dtype)
    site = adapter.sites[Q]
    exact = drawn(replace(adapter, sites={**adapter.sites, Q: replace(site, a=site.a.float())}))
    assert torch.equal(drawn(adapter).sites[Q].a, exact.sites[Q].a.to(dtype))


def test_mean_and_variance_are_the_posterior_s():
    """Over n draws a mean is within 5 of its standard errors σ/√n, a variance within 5 of σ²·√(2/n)."""
    adapter = blob()
    site = adapter.sites[Q]
    deviations = torch.stack([drawn(adapter, sample).sites[Q].a - site.a for sample in range(DRAWS)]).double()
    sigma = site.variance.tensors["sigma_a"].double()
    assert (deviations.mean(0).abs() <= 5 * sigma / DRAWS**0.5).all()
    assert ((deviations.square().mean(0) - sigma**2).abs() <= 5 * sigma**2 * (2 / DRAWS) ** 0.5).all()


def test_two_tokens_see_one_weight():
    """Cov(ε·x, ε·x') = Σ_i σ_i² x_i x'_i for one rank; noise of each token's own would make it 0."""
    site = make_site(rank=1, variance=diagonal(1))
    x, other = torch.randn(2, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    adapter = LoweredAdapter("x", {Q: site})
    noise = torch.stack([(drawn(adapter, sample).sites[Q].a - site.a)[0] for sample in range(DRAWS)]).double()
    u, v = noise @ x, noise @ other
    squares = site.variance.tensors["sigma_a"][0].double() ** 2
    expected, var_u, var_v = (squares * x * other).sum(), (squares * x**2).sum(), (squares * other**2).sum()
    error = ((var_u * var_v + expected**2) / DRAWS) ** 0.5  # of the mean of a product of two normals
    assert abs((u * v).mean() - expected) < 5 * error
    assert expected.abs() > 10 * error, "the test could not tell shared noise from independent"


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"sample": -1}, "sample"),
        ({"sample": 1 << 31}, "sample"),
        ({"sample": True}, "sample"),
        ({"sample": 0.5}, "sample"),
        ({"seed": -1}, "seed"),
        ({"seed": 1 << 63}, "seed"),
        ({"seed": None}, "seed"),
    ],
)
def test_numbers_out_of_range_are_refused(options, field):
    with pytest.raises(AdapterError) as refusal:
        drawn(blob(), **options)
    assert (refusal.value.code, refusal.value.field) == ("adapter_config_invalid", field)
    assert refusal.value.hint


def test_an_adapter_without_posterior_is_refused():
    with pytest.raises(AdapterError) as refusal:
        drawn(make_mixture())
    assert (refusal.value.code, refusal.value.field) == ("adapter_unsupported_feature", "variance")
    assert "bayesianize" in refusal.value.hint


def test_a_draw_beyond_its_dtype_is_refused():
    site = make_site(variance=diagonal(sigma=1e6))
    with pytest.raises(AdapterError) as refusal:
        drawn(LoweredAdapter("x", {Q: replace(site, a=site.a.half())}))
    assert (refusal.value.code, refusal.value.field) == ("adapter_not_finite", f"{Q}.A")
