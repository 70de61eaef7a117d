"""Draws in the cache: files like any prepared adapter's; and what a prepared Bayesian adapter says of itself."""

from dataclasses import replace

import pytest
import torch

from loramux_adapters import (
    AdapterError,
    LoweredAdapter,
    Variance,
    draw,
    is_bayesian,
    open_artefact,
    posterior_of,
    prepare,
    prepare_draw,
    write_native,
)
from loramux_adapters.variance import VarianceKind

from ..checkpoints import BASE
from ..natives import UP, Q, make_site, same


@pytest.fixture
def artefact(tmp_path):
    sigma = torch.full((4, 24), 0.1)
    site = make_site(variance=Variance(VarianceKind.DIAGONAL_A, {"sigma_a": sigma}))
    adapter = LoweredAdapter("blob", {Q: site, UP: make_site(UP)}, ("a warning",))
    return prepare(write_native(tmp_path / "source.safetensors", adapter, BASE.name), BASE, tmp_path / "cache")


def test_what_is_prepared_is_the_mean_with_its_posterior(artefact):
    adapter = open_artefact(artefact.path)
    summary = artefact.summary
    assert summary.bayesian and summary.posterior == "diagonal_a" and is_bayesian(artefact) and is_bayesian(adapter)
    assert summary.nbytes == adapter.mean.nbytes() == adapter.nbytes() - 4 * 24 * 4
    posterior = posterior_of(artefact)
    assert posterior == posterior_of(adapter)
    assert (posterior.family, posterior.sites, posterior.parameters, posterior.samples) == ("diagonal_a", 1, 96, None)
    assert posterior.warnings == () and posterior.draw_rank == 4


def test_a_plain_adapter_has_no_posterior(artefact, tmp_path):
    plain = open_artefact(artefact.path).mean
    prepared = prepare(write_native(tmp_path / "plain.safetensors", plain, BASE.name), BASE, tmp_path / "cache")
    assert prepared.summary.posterior is None and not is_bayesian(prepared)
    assert posterior_of(prepared) is None and posterior_of(plain) is None


def test_a_draw_is_an_artefact_like_any(artefact, tmp_path):
    cache = tmp_path / "other"
    made = prepare_draw(artefact, cache, seed=1, sample=2)
    expected = draw(open_artefact(artefact.path), digest=artefact.digest, seed=1, sample=2)
    assert same(dict(open_artefact(made.path).sites), dict(expected.sites))
    assert made.path == cache / f"{made.digest}.safetensors"
    assert not made.summary.bayesian and made.summary.base == BASE.name and made.summary.warnings == ("a warning",)
    b = sum(site.b.nbytes for site in expected.sites.values())  # of both sites the mean's
    assert made.summary.nbytes == posterior_of(artefact).draw_bytes + b
    # What was made already is used again; what was damaged is made again.
    written = made.path.stat().st_mtime_ns
    assert prepare_draw(artefact, cache, seed=1, sample=2) == made and made.path.stat().st_mtime_ns == written
    made.path.write_bytes(b"damaged")
    assert prepare_draw(artefact, cache, seed=1, sample=2) == made and same(
        dict(open_artefact(made.path).sites), dict(expected.sites)
    )
    assert prepare_draw(artefact, cache, seed=1, sample=3).digest != made.digest


def test_a_refused_draw_leaves_nothing(artefact, tmp_path):
    with pytest.raises(AdapterError):
        prepare_draw(artefact, tmp_path / "other", seed=0, sample=-1)
    assert not (tmp_path / "other").exists()


def test_noise_that_bfloat16_would_swallow_is_told():
    sigma = torch.full((4, 24), 0.1)
    site = make_site(variance=Variance(VarianceKind.DIAGONAL_A, {"sigma_a": sigma}))
    for scale, told in ((1, False), (10, False), (1000, True)):
        adapter = LoweredAdapter("x", {Q: replace(site, a=torch.full((4, 24), 0.1 * scale)), UP: make_site(UP)})
        warnings = posterior_of(adapter).warnings
        assert bool(warnings) == told and all("bfloat16 would swallow the noise" in warning for warning in warnings)
