"""Training on a tiny model lowers the loss, and what is written computes what was trained."""

from pathlib import Path
from typing import Any

import pytest
import torch

from loramux_adapters import AdapterUnsupportedFeature, BaseModel, draw, lower, prepare, write_native
from loramux_adapters.native import digest_of
from loramux_adapters.posterior.families import SKETCHES
from loramux_adapters.posterior.noise import Noise, Stream
from loramux_adapters.train import Options, TrainableAdapter, abmll, adapt, blob, fit, meta_fit

from ..compact.tiny import CONFIG
from ..form import logits
from . import recipes

TOKENS = torch.randint(0, CONFIG.vocab_size, (8, 6), generator=torch.Generator().manual_seed(1))
SEED, SAMPLE = 3, 2


@pytest.fixture(scope="module")
def model() -> Any:
    return recipes.make_base()


def answers(model: Any, right: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(model(TOKENS).logits[:, -1], right)


def written(adapter: TrainableAdapter[Any], path: Path) -> Path:
    if next(iter(adapter.sites.values())).router is None:
        adapter.save_peft(path / "peft", "tiny")
        return path / "peft"
    return write_native(path / "mixture.safetensors", adapter.lowered(), "tiny")


def imposed(adapter: TrainableAdapter[Any], digest: str) -> None:
    """Make the sites compute with the numbers of the draw that is served."""
    noise = Noise(digest, SEED, SAMPLE)
    for module, site in adapter.sites.items():
        (ranks, d_in), d_out = site.a.shape, site.b.shape[1]
        if isinstance(site, blob.BlobSite):
            normals = noise.normals(module, Stream.A, range(ranks), range(d_in)).to(site.a)
            site.flips = blob.Flips(normals, torch.ones(1, d_in).to(site.a))
        else:
            planes = range(SKETCHES)
            v = torch.stack([noise.signs(module, Stream.SKETCH_IN, k, range(d_in)) for k in planes])
            u = torch.stack([noise.signs(module, Stream.SKETCH_OUT, k, range(d_out)) for k in planes])
            site.sketch = abmll.Sketch(v[None].to(site.a), u[None].to(site.a))


@pytest.mark.parametrize("kind", recipes.KINDS)
def test_what_is_read_back_computes_what_was_trained(model: Any, tmp_path: Path, kind: str) -> None:
    """Its mean and a draw, in float64 after what a file holds was rounded to float32; and it can be served."""
    adapter = recipes.make(kind, model)
    base = BaseModel.from_module(model, "tiny")
    read = lower(written(adapter, tmp_path), base)
    assert digest_of(read) == digest_of(adapter.lowered())
    prepare(written(adapter, tmp_path), base, tmp_path / "cache")

    exact = recipes.make_base().double()
    adapter.double()
    with adapter.attached(exact):
        torch.testing.assert_close(exact(TOKENS).logits, logits(model, read.mean, TOKENS))
    if kind in recipes.BAYESIAN:
        digest = digest_of(read)
        imposed(adapter, digest)
        with adapter.attached(exact):
            found = exact(TOKENS).logits
        wanted = logits(model, draw(read, digest=digest, seed=SEED, sample=SAMPLE), TOKENS)
        # A draw's sums are rounded to float32 once, as its file has them.
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
        assert (wanted - logits(model, read.mean, TOKENS)).abs().max() > 1e-3


def test_a_mixture_is_no_peft_adapter(model: Any, tmp_path: Path) -> None:
    with pytest.raises(AdapterUnsupportedFeature, match="no PEFT adapter"):
        recipes.make("mixture", model).save_peft(tmp_path, "tiny")


def test_a_layer_that_the_base_does_not_have(model: Any) -> None:
    make_site, shape = recipes.KINDS["blob"]
    with pytest.raises(AdapterUnsupportedFeature, match=r"no linear layer model\.layers\.9\.x"):
        TrainableAdapter.create(BaseModel.from_module(model, "tiny"), ["model.layers.9.x"], make_site, shape, 0)


@pytest.mark.parametrize("kind", ["lora", "mixture", "blob", "blob-mixture"])
def test_fit_lowers_the_loss(model: Any, kind: str) -> None:
    adapter = recipes.make(kind, model, moved=False)
    right = torch.arange(8) % CONFIG.vocab_size
    penalty = blob.penalty(adapter, texts=800, weight=0.1, warm_up=5) if kind.startswith("blob") else None
    before = {name: parameter.detach().clone() for name, parameter in adapter.named_parameters()}
    losses = fit(model, adapter, lambda: answers(model, right), Options(60, 3e-2, draws=2), penalty)
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])
    for name, parameter in adapter.named_parameters():
        assert not torch.equal(parameter, before[name]), name
    with adapter.attached(model), torch.no_grad():
        assert float(answers(model, right)) < 0.5 * losses[0]
        assert torch.equal(model(TOKENS).logits, model(TOKENS).logits), "the mean is left, which is not drawn"


def test_the_penalty_draws_the_posterior_to_the_prior(model: Any) -> None:
    """Without a likelihood, q becomes N(0, σ_p²) and costs nothing."""
    adapter = recipes.make("blob", model)
    penalty = blob.penalty(adapter, texts=1, prior=0.2)
    before = float(penalty(0).detach())
    fit(model, adapter, lambda: torch.zeros(()), Options(400, 2e-2), penalty)
    assert float(penalty(0).detach()) < 0.01 * before
    for site in adapter.sites.values():
        torch.testing.assert_close(site.sigma, torch.full_like(site.a, 0.2), rtol=0.1, atol=0.0)


def test_abmll_learns_to_adapt(model: Any) -> None:
    """Tasks that differ in which of two words is right: after meta-learning, adapting ends at a lower loss."""
    generator = torch.Generator().manual_seed(0)

    def make_task() -> abmll.Task:
        right = torch.where(torch.rand(8, generator=generator) < 0.5, 3, 5)
        loss = lambda: answers(model, right)  # noqa: E731
        return abmll.Task(8, loss, loss)

    inner, weights = Options(3, 1e-2, warm_up=0, draws=2), abmll.Weights(beta=1e-6, gamma=1e-8)
    shared = recipes.make("abmll", model, moved=False)
    unseen = make_task()

    def adapted() -> float:
        own = adapt(model, shared, unseen.support, 8, inner, weights)
        with own.attached(model), torch.no_grad():
            return float(unseen.query())

    before = adapted()
    kept = {name: parameter.detach().clone() for name, parameter in shared.named_parameters()}
    adapted()
    assert all(torch.equal(parameter, kept[name]) for name, parameter in shared.named_parameters())
    losses = meta_fit(model, shared, [make_task() for _ in range(6)], Options(40, 2e-2, draws=2), inner, weights)
    assert all(not torch.equal(parameter, kept[name]) for name, parameter in shared.named_parameters())
    assert sum(losses[-10:]) < sum(losses[:10])
    assert adapted() < 0.7 * before


def test_adapting_stays_at_what_is_shared_if_told_to(model: Any) -> None:
    """β weighs how far φ may be from θ: with more of it, it is less far."""
    right = torch.arange(8) % CONFIG.vocab_size
    shared = recipes.make("abmll", model)

    def distance(beta: float) -> float:
        own = adapt(
            model, shared, lambda: answers(model, right), 8, Options(20, 1e-2, warm_up=0), abmll.Weights(beta=beta)
        )
        return sum(float((site.mean - shared.sites[module].mean).detach().norm()) for module, site in own.sites.items())

    assert distance(1.0) < 0.2 * distance(0.0)
