"""An adapter applied by hooks computes what the form's equations say."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from loramux_adapters import LoweredAdapter
from loramux_adapters.applied import applied
from loramux_adapters.gate import Select

from .compact.mixtures import mixture
from .compact.tiny import CONFIG, make_model
from .form import logits
from .natives import UP, make_site

TOKENS = torch.randint(0, CONFIG.vocab_size, (2, 7), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def model() -> Any:
    return make_model()


def grouped(adapter: LoweredAdapter) -> LoweredAdapter:
    """Experts 0 and 2 share rows; what was expert 2's is now its own beside them."""
    map_ = torch.tensor([0, 1, 0], dtype=torch.int32)
    sites = {
        module: replace(site, expert=torch.where(site.expert == 2, 4, site.expert).int())
        for module, site in adapter.sites.items()
    }
    return replace(adapter, sites=sites, gates={n: replace(g, expert_map=map_) for n, g in adapter.gates.items()})


def thresholded(adapter: LoweredAdapter) -> LoweredAdapter:
    """Each token has a threshold of its own, as in AdaMoLE."""
    gates = {
        name: replace(
            gate,
            select=Select.ADAPTIVE,
            k=None,
            adaptive_weight=gate.weights.sum(0) / 2,
            adaptive_bias=torch.ones(1),
            tau_max=0.6,
        )
        for name, gate in adapter.gates.items()
    }
    return replace(adapter, gates=gates)


@pytest.mark.parametrize(
    "adapter",
    [
        mixture((2, 3, 1)),
        grouped(mixture((2, 3, 1))),
        thresholded(mixture((2, 3, 1))),
        LoweredAdapter("lora", {UP: make_site(UP, bias=torch.ones(40))}),
    ],
    ids=["mixture", "grouped", "thresholded", "plain"],
)
def test_logits(model: Any, adapter: LoweredAdapter) -> None:
    inputs: dict[str, int] = {}
    with torch.no_grad():
        before = model(TOKENS).logits
        with applied(model, adapter, lambda module, x: inputs.update({module: len(x)})):
            found = model(TOKENS).logits
        assert torch.equal(model(TOKENS).logits, before), "the hooks are gone again"
    wanted = logits(model, adapter, TOKENS)
    assert (found.double() - wanted).abs().max() < 1e-4 * wanted.abs().max()
    assert (before.double() - wanted).abs().max() > 1e-2 * wanted.abs().max()
    assert inputs == dict.fromkeys(adapter.sites, TOKENS.numel())


def test_a_magnitude_leaves_the_base_bias_alone() -> None:
    layer = torch.nn.Linear(24, 40)
    model = torch.nn.ModuleDict({"layer": layer})
    site = make_site(UP, magnitude=torch.full((40,), 3.0))
    x = torch.randn(5, 24, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), applied(model, LoweredAdapter("dora", {"layer": site})):
        found = layer(x)
    delta = x @ site.a.T * site.scale @ site.b
    torch.testing.assert_close(found, 3 * (x @ layer.weight.T) + layer.bias + delta, rtol=1e-4, atol=1e-4)
