"""Every kind of posterior: a draw is what its formula says of the same numbers, and many draws have its moments."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from loramux_adapters import AdapterError, LoweredAdapter, Variance, draw, posterior_of
from loramux_adapters.native import digest_of
from loramux_adapters.posterior.families import SKETCHES
from loramux_adapters.variance import VarianceForm, VarianceKind
from loramux_adapters.verify import verify

from ..checkpoints import BASE
from ..natives import DOWN, UP, Q, make_gate, make_mixture, make_site, same
from .posteriors import FREE, make_bayesian, make_variance
from .reference import Reference

DRAWS = 600
every = pytest.mark.parametrize("kind", VarianceKind)


def delta(site):
    """ΔW [d_out, d_in] of a site without gate, in float64."""
    return ((site.b.double().T * site.scale.double()) @ site.expanded_a.double()).numpy()


def drawn(adapter, sample=0):
    return draw(adapter, digest="abc", seed=7, sample=sample)


@every
@pytest.mark.parametrize("sample", [0, 3])
def test_a_draw_is_the_formula_s(kind, sample):
    adapter = make_bayesian(kind)
    verify(adapter, BASE)
    result = drawn(adapter, sample)
    verify(result, BASE)
    assert not result.bayesian and same(result.sites[UP], adapter.sites[UP])
    for module in (Q, DOWN):
        expected = Reference("abc", 7, sample).delta(module, adapter.sites[module])
        # Each factor is rounded to float32 a few times, each product of both once for each.
        np.testing.assert_allclose(delta(result.sites[module]), expected, rtol=1e-5, atol=1e-5)
        assert np.abs(expected - delta(replace(adapter.sites[module], variance=None))).max() > 0.1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", [k for k in VarianceKind if k is not VarianceKind.ENSEMBLE])  # members have their own
def test_a_draw_keeps_the_dtype(kind, dtype):
    adapter = make_bayesian(kind, dtype=dtype)
    result = drawn(adapter, 1)
    unit = torch.finfo(dtype).eps
    for module in (Q, DOWN):
        assert result.sites[module].a.dtype == result.sites[module].b.dtype == dtype
        expected = Reference("abc", 7, 1).delta(module, adapter.sites[module])
        assert np.abs(delta(result.sites[module]) - expected).max() < 8 * unit * np.abs(expected).max()


@pytest.mark.parametrize("kind", [k for k in VarianceKind if k not in (VarianceKind.ENSEMBLE, VarianceKind.DROPOUT)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_deviation_a_draw_is_the_mean_bit_for_bit(kind, dtype):
    adapter = make_bayesian(kind, scale=0.0, dtype=dtype)
    adapter.sites[Q].a[0, 0] = -0.0
    assert digest_of(drawn(adapter, 5)) == digest_of(adapter.mean) and same(drawn(adapter, 5), adapter.mean)


def law(kind, site, x, other):
    """E and Var of ΔW x, and Cov(ΔW x, ΔW x'), per output over draws: from the formula, in float64."""
    a, b, s = site.a.double(), site.b.double(), site.scale.double()
    t = {name: tensor.double() for name, tensor in site.variance.tensors.items()}
    mean = (a @ x * s) @ b

    def covariance(p, q):
        """p and q: both tokens, as inputs."""
        up, uq = a @ p, a @ q
        if kind is VarianceKind.HIERARCHICAL:
            std = t["std_b"].T @ t["std_a"] + t["offset"]
            return (std**2) @ (p * q)
        if kind is VarianceKind.RANK_DIAGONAL:
            return (t["sigma_scale"] ** 2 * up * uq) @ b**2
        if kind is VarianceKind.DROPOUT:
            rate = site.variance.rate
            return rate / (1 - rate) * ((b.T * s) @ a) ** 2 @ (p * q)
        shared = (t["sigma_a"] ** 2) @ (p * q)  # Cov(ε p, ε q) of a rank
        if kind is VarianceKind.DIAGONAL_A:
            return (s**2 * shared) @ b**2
        assert kind is VarianceKind.DIAGONAL_AB  # a and b are independent
        return (s**2 * shared) @ (b**2 + t["sigma_b"] ** 2) + (s**2 * up * uq) @ t["sigma_b"] ** 2

    return mean, covariance(x, x), covariance(x, other)


@pytest.mark.parametrize(
    "kind", [k for k in VarianceKind if k not in (VarianceKind.ENSEMBLE, VarianceKind.LOW_RANK_DIAGONAL)]
)
def test_two_tokens_have_the_moments_of_one_shared_weight(kind):
    """Mean and variance of a token's output, and the covariance of two tokens' outputs, per output over n draws.

    Bounds are 6 standard errors, estimated from the draws themselves; 24 outputs are compared.
    """
    site = make_site(rank=2)
    site = replace(site, variance=make_variance(kind, site))
    adapter = LoweredAdapter("x", {Q: site})
    x, other = torch.randn(2, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    other = x + 0.5 * other
    deltas = [torch.from_numpy(delta(drawn(adapter, sample).sites[Q])) for sample in range(DRAWS)]
    y, z = torch.stack([d @ x for d in deltas]), torch.stack([d @ other for d in deltas])
    mean, variance, covariance = law(kind, site, x, other)
    assert ((y.mean(0) - mean).abs() < 6 * variance.sqrt() / DRAWS**0.5).all()
    expected_z = law(kind, site, other, x)[0]
    for values, expected in (((y - mean) ** 2, variance), ((y - mean) * (z - expected_z), covariance)):
        error = values.std(0) / DRAWS**0.5
        assert ((values.mean(0) - expected).abs() < 6 * error).all()
        assert (expected.abs() > 6 * error).any(), "independent noise of each token would pass too"


def test_the_moments_of_a_low_rank_posterior_are_shared_by_all_sites():
    """Cov(A_q[i], A_down[j]) = Σ_k L_q[k, i] L_down[k, j]: the z_k are one set for the whole adapter."""
    adapter = make_bayesian(VarianceKind.LOW_RANK_DIAGONAL)
    results = [drawn(adapter, sample) for sample in range(DRAWS)]
    parts = {}
    for module in (Q, DOWN):
        site = adapter.sites[module]
        for name in "ab":
            deviations = torch.stack([getattr(r.sites[module], name) - getattr(site, name) for r in results])[:, 0, :8]
            parts[module, name] = deviations.double(), site.variance.tensors[f"low_rank_{name}"][:, 0, :8].double()
    for one, (first, low) in parts.items():
        for other, (second, other_low) in parts.items():
            products = first[:, :, None] * second[:, None, :]
            expected = low.T @ other_low
            if one == other:
                module, name = one
                sigma = adapter.sites[module].variance.tensors[f"sigma_{name}"][0, :8].double()
                expected = expected + torch.diag(sigma**2)
            assert ((products.mean(0) - expected).abs() < 6 * products.std(0) / DRAWS**0.5).all()


def test_a_draw_of_an_ensemble_is_its_member():
    adapter = make_bayesian(VarianceKind.ENSEMBLE)
    members = adapter.sites[Q].variance.tensors
    for sample in range(FREE["S"]):
        site = drawn(adapter, sample).sites[Q]
        assert same(site.a, members["member_a"][sample]) and same(site.scale, members["member_scale"][sample])
        assert same(site.b, members["member_b"][sample])
        assert same(site, draw(adapter, digest="abc", seed=99, sample=sample).sites[Q])
    with pytest.raises(AdapterError) as refusal:
        drawn(adapter, FREE["S"])
    assert (refusal.value.code, refusal.value.field) == ("adapter_config_invalid", "sample")
    assert "0 to 3" in refusal.value.hint


def test_a_mask_is_one_for_all_ranks_and_tokens():
    site = drawn(make_bayesian(VarianceKind.DROPOUT)).sites[Q]
    original = make_bayesian(VarianceKind.DROPOUT).sites[Q].a
    dropped = (site.a == 0).all(dim=0)
    assert 0 < dropped.sum() < 24
    torch.testing.assert_close(site.a[:, ~dropped], original[:, ~dropped] / 0.75)


@pytest.mark.parametrize("kind", [k for k in VarianceKind if k is not VarianceKind.HIERARCHICAL])
def test_every_expert_of_a_mixture_is_drawn_and_no_router(kind):
    adapter = make_mixture()
    sites = {
        module: replace(site, variance=make_variance(kind, site)) if site.gate else site
        for module, site in adapter.sites.items()
    }
    adapter = replace(adapter, sites=sites)
    verify(adapter, BASE)
    result = drawn(adapter)
    assert same(dict(result.gates), dict(adapter.gates))
    for module in (Q, DOWN):
        before, after = adapter.sites[module], result.sites[module]
        assert same((after.gate, after.expert), (before.gate, before.expert))
        own = (after.b * after.scale[:, None])[:, :, None] * after.a[:, None, :]
        for rank, old in enumerate((before.b * before.scale[:, None])[:, :, None] * before.a[:, None, :]):
            assert not torch.equal(own[rank], old), "an expert's rank that is the same in every draw"


OF_A = {VarianceKind.DIAGONAL_A, VarianceKind.RANK_DIAGONAL, VarianceKind.DROPOUT}


def test_what_a_draw_takes_is_known_before():
    for kind in VarianceKind:
        adapter = make_bayesian(kind)
        posterior, result = posterior_of(adapter), drawn(adapter)
        mine = [site for m, site in result.sites.items() if torch.equal(site.b, adapter.sites[m].b)]
        assert len(mine) == (3 if kind in OF_A else 1)  # one site has no posterior
        own = result.nbytes() - sum(site.b.nbytes for site in mine)
        assert (posterior.draw_bytes, posterior.draw_rank) == (own, result.rank)
        assert posterior.family == kind.value and posterior.sites == 2
        assert posterior.samples == (FREE["S"] if kind is VarianceKind.ENSEMBLE else None)
    assert posterior_of(make_bayesian(VarianceKind.HIERARCHICAL)).draw_rank == 5 + SKETCHES * (FREE["V"] + 1)


@pytest.mark.parametrize("form", [VarianceForm.SOFTPLUS, VarianceForm.EXP])
def test_deviations_without_a_low_rank_are_not_drawn(form):
    adapter = make_bayesian(VarianceKind.HIERARCHICAL)
    site = adapter.sites[Q]
    sites = {**adapter.sites, Q: replace(site, variance=replace(site.variance, form=form))}
    with pytest.raises(AdapterError) as refusal:
        drawn(replace(adapter, sites=sites))
    assert (refusal.value.code, refusal.value.field) == ("adapter_unsupported_feature", f"sites.{Q}.variance.form")


def test_several_kinds_are_named_together():
    adapter = make_bayesian(VarianceKind.DIAGONAL_A)
    gate = make_gate()
    site = make_site(UP, gate="g", variance=Variance(VarianceKind.DROPOUT, rate=0.5))
    adapter = replace(adapter, sites={**adapter.sites, UP: site}, gates={"g": gate})
    verify(adapter, BASE)
    assert adapter.posterior == posterior_of(adapter).family == "diagonal_a+dropout"
