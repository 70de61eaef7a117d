"""Sites in training compute the one form, and their gradients are those of it."""

from typing import Any

import pytest
import torch

from loramux_adapters.train import Site

from ..compact.tiny import CONFIG
from . import recipes

TOKENS = torch.randint(0, CONFIG.vocab_size, (4, 7), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def model() -> Any:
    return recipes.make_base()


@pytest.mark.parametrize("kind", recipes.KINDS)
def test_training_begins_at_the_base(model: Any, kind: str) -> None:
    adapter = recipes.make(kind, model, moved=False)
    with torch.no_grad():
        before = model(TOKENS).logits
        with adapter.attached(model):
            assert torch.equal(model(TOKENS).logits, before)


@pytest.mark.parametrize("kind", recipes.KINDS)
def test_gradients_against_finite_differences(model: Any, kind: str) -> None:
    """Of every parameter of a site, at a draw of its weights."""
    site: Site = recipes.make(kind, model).sites[recipes.MODULES[0]].double()
    if kind == "blob-mixture":
        # The selection of top-k jumps, so experts must not be nearly equal; large routers see to it.
        site.router.data *= 5  # type: ignore[union-attr]
    site.redraw(2, torch.Generator().manual_seed(3))
    x = torch.randn(4, 3, CONFIG.hidden_size, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    weights = torch.randn(4, 3, CONFIG.hidden_size, dtype=torch.float64, generator=torch.Generator().manual_seed(5))

    def value() -> torch.Tensor:
        return (site.delta(x) * weights).sum()

    value().backward()  # type: ignore[no-untyped-call]
    step = 1e-6
    for name, parameter in site.named_parameters():
        assert parameter.grad is not None, name
        flat, found = parameter.data.view(-1), parameter.grad.view(-1)
        for i in range(0, len(flat), max(1, len(flat) // 7)):
            kept = float(flat[i])
            with torch.no_grad():
                flat[i] = kept + step
                above = value()
                flat[i] = kept - step
                below = value()
            flat[i] = kept
            assert float(found[i]) == pytest.approx(float(above - below) / (2 * step), rel=1e-5, abs=1e-7), name


def test_a_batch_that_draws_do_not_divide(model: Any) -> None:
    site = recipes.make("blob", model).sites[recipes.MODULES[0]]
    site.redraw(3, torch.Generator())
    with pytest.raises(ValueError, match="4 sequences cannot be divided among 3 draws"):
        site.delta(torch.zeros(4, 1, CONFIG.hidden_size))
