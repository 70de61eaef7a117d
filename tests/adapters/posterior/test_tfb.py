"""TFB: the mean stays what it was, σ is the paper's, every expert is taken apart on its own; and what is refused."""

from dataclasses import replace

import pytest
import torch

from loramux_adapters import AdapterError, Carry, FfnMixture, LoweredAdapter, draw, lower, unserved, write_native
from loramux_adapters.lowered import CarryKind
from loramux_adapters.native import digest_of
from loramux_adapters.posterior.tfb import tfb

from ..checkpoints import BASE
from ..form import site_delta
from ..natives import DOWN, UP, Q, make_gate, make_mixture, make_site
from .posteriors import make_bayesian

SIGMA = 0.02


def plain(scale=2.0, dtype=torch.float32):
    site = make_site()
    site = replace(site, a=site.a.to(dtype), b=site.b.to(dtype), scale=torch.full((4,), scale))
    return LoweredAdapter("lora", {Q: site, UP: make_site(UP, 2)})


def shared_mixture():
    """Two experts that share rows of A, as HydraLoRA's do."""
    rows = torch.tensor([0, 1, 0, 1], dtype=torch.int32)
    site = make_site(gate="g", expert=torch.tensor([0, 0, 1, 1], dtype=torch.int32), arow=rows)
    return LoweredAdapter("hydralora", {Q: replace(site, a=site.a[:2])}, gates={"g": make_gate()})


def interleaved():
    """Experts whose ranks lie between each other's."""
    site = make_site(gate="g", expert=torch.tensor([1, 0, 1, 0], dtype=torch.int32))
    return LoweredAdapter("mola", {Q: site}, gates={"g": make_gate()})


def block_diagonal():
    """Two blocks: packed without what is outside of them, its Vᵀ·A would be another."""
    site = make_site()
    a, b = (t * torch.block_diag(*[t.new_ones(t.shape[0] // 2, t.shape[1] // 2)] * 2) for t in (site.a, site.b))
    return LoweredAdapter("melora", {Q: replace(site, a=a, b=b, bands=2)})


ADAPTERS = {
    "plain": plain(),
    "negative scale": plain(-0.5),
    "bfloat16": plain(dtype=torch.bfloat16),
    "mixture": make_mixture(),
    "shared A": shared_mixture(),
    "interleaved": interleaved(),
    "block-diagonal": block_diagonal(),
    "wide": LoweredAdapter("lora", {Q: make_site(rank=40), UP: make_site(UP)}),
    "bias": LoweredAdapter("lora_bias", {Q: make_site(bias=torch.ones(24))}),
}


@pytest.mark.parametrize("adapter", ADAPTERS.values(), ids=ADAPTERS)
def test_the_mean_computes_what_it_did(adapter, tmp_path):
    result = tfb(adapter, BASE, SIGMA)
    assert result.posterior == "diagonal_a" and not unserved(result)
    for module, site in adapter.sites.items():
        x = torch.randn(5, site.a.shape[1], dtype=torch.float64, generator=torch.Generator().manual_seed(3))
        expected = site_delta(site, adapter.gates, x)
        found = site_delta(result.mean.sites[module], adapter.gates, x)
        assert (found - expected).abs().max() < 1e-5 * expected.abs().max()
    path = write_native(tmp_path / "file.safetensors", result, BASE.name)
    assert digest_of(lower(path, BASE)) == digest_of(result)


def test_sigma_is_sigma_q_over_the_singular_value():
    site = tfb(plain(), BASE, SIGMA).sites[Q]
    _, d, _ = torch.linalg.svd(plain().sites[Q].b.double().T, full_matrices=False)
    expected = (SIGMA / (d + 1e-6))[:, None].expand(4, 24)
    torch.testing.assert_close(site.variance.tensors["sigma_a"].double(), expected, rtol=1e-6, atol=0)
    gram = site.b.double() @ site.b.double().T
    torch.testing.assert_close(gram, torch.diag(d**2), rtol=1e-5, atol=1e-5)


def test_noise_of_every_rank_moves_the_output_alike():
    """Var of ΔW·x over draws is s²·σ_q²·‖x‖² in each of r directions and 0 in the others: its trace is r times that."""
    adapter = tfb(plain(), BASE, SIGMA)
    x = torch.randn(24, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    outputs = []
    for sample in range(400):
        site = draw(adapter, digest="d", seed=0, sample=sample).sites[Q]
        outputs.append((site.scale.double() * (site.a.double() @ x)) @ site.b.double())
    trace = torch.stack(outputs).var(dim=0).sum()
    expected = 4 * 2.0**2 * SIGMA**2 * x.square().sum()
    # A sum of r = 4 scaled χ² of 399 degrees: a relative deviation of √(2 / (4 · 399)).
    assert abs(trace / expected - 1) < 5 * (2 / (4 * 399)) ** 0.5


def test_an_expert_s_decomposition_is_its_own():
    result, original = tfb(interleaved(), BASE, SIGMA).sites[Q], interleaved().sites[Q]
    assert result.expert.tolist() == [0, 0, 1, 1]
    for expert in (0, 1):
        own = original.expert == expert
        b = original.b[own].double() * original.scale[own, None].double()
        values = torch.linalg.svdvals(b.T)
        sigma = result.variance.tensors["sigma_a"][result.expert == expert, 0].double()
        torch.testing.assert_close(sigma, SIGMA / (values + 1e-6), rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("adapter", "field"),
    [
        (make_bayesian("diagonal_a"), f"sites.{Q}.variance"),
        (LoweredAdapter("dora", {Q: make_site(magnitude=torch.ones(24))}), f"sites.{Q}.magnitude"),
        (LoweredAdapter("x", {Q: make_site(), UP: make_site(UP, carry=Carry(Q, CarryKind.PREV_U))}),
         f"sites.{UP}.carry"),
        (replace(make_mixture(), ffn={"mlp": FfnMixture("q", UP, DOWN)}), "mlp"),
    ],
)  # fmt: skip
def test_what_it_does_not_know_is_refused(adapter, field):
    with pytest.raises(AdapterError) as refusal:
        tfb(adapter, BASE, SIGMA)
    assert (refusal.value.code, refusal.value.field) == ("adapter_unsupported_feature", field)


@pytest.mark.parametrize("sigma", [0, -1, float("nan"), float("inf"), 1e7])
def test_a_sigma_that_is_none_is_refused(sigma):
    with pytest.raises(AdapterError) as refusal:
        tfb(plain(), BASE, sigma)
    assert (refusal.value.code, refusal.value.field) == ("adapter_config_invalid", "sigma_q")
