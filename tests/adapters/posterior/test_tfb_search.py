"""The search for σ_q on a tiny model: what it finds is within the bound, and more is not."""

from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from loramux_adapters import AdapterError, BaseModel, LoweredAdapter, draw
from loramux_adapters.applied import applied
from loramux_adapters.gate import Capacity
from loramux_adapters.native import digest_of
from loramux_adapters.posterior.tfb import tfb
from loramux_adapters.posterior.tfb_search import Options, search

from ..natives import make_gate, make_site

CONFIG = LlamaConfig(
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=2,
    intermediate_size=48,
    vocab_size=50,
)


@pytest.fixture(scope="module")
def tiny():
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIG).eval()
    for parameter in model.parameters():
        parameter.data *= 8 if parameter.ndim == 2 else 1
    base = BaseModel.from_pretrained(CONFIG, name="tiny")
    sites = {module: make_site(module, 2, base, seed) for seed, module in enumerate(base.linears) if "mlp" in module}
    return model, LoweredAdapter("lora", sites), base


TEXTS = [torch.randint(0, 50, (n,), generator=torch.Generator().manual_seed(n)) for n in (1, 9, 14, 2)]


def nll(model, adapters):
    """Per token of the texts, of the mean of the predictions, in float64."""
    chosen = []
    for text in TEXTS:
        mean = 0
        for adapter in adapters:
            with torch.no_grad(), applied(model, adapter):
                mean = mean + torch.softmax(model(text[None]).logits[0].double(), -1) / len(adapters)
        chosen += [float(mean[t, text[t + 1]].log()) for t in range(len(text) - 1)]
    return -sum(chosen) / len(chosen)


def test_what_is_found_is_within_the_bound_and_more_is_not(tiny):
    model, adapter, base = tiny
    options = Options(change=0.01, samples=3, steps=9)
    told = []
    found = search(model, adapter, base, TEXTS, options, on_step=lambda *step: told.append(step))
    assert tuple(told) == found.tried and len(told) == 9

    def at(sigma):
        bayesian = tfb(adapter, base, sigma)
        return nll(model, [draw(bayesian, digest=digest_of(adapter), seed=0, sample=s) for s in range(3)])

    before = nll(model, [adapter])
    assert found.before == pytest.approx(before, rel=1e-5) and found.after == pytest.approx(at(found.sigma_q), rel=1e-5)
    assert abs(found.after - before) <= 0.01 * before
    beyond = min(sigma for sigma, value in found.tried if abs(value - before) > 0.01 * before)
    assert found.sigma_q < beyond < 1.05 * found.sigma_q


def test_more_change_allows_more_noise(tiny):
    sigmas = [search(*tiny, TEXTS, Options(change=c, samples=2, steps=6)).sigma_q for c in (0.001, 0.01, 0.1)]
    assert sigmas == sorted(sigmas) and sigmas[0] < sigmas[-1]


def test_it_is_refused_where_no_noise_is_little_enough(tiny):
    with pytest.raises(AdapterError) as refusal:
        search(*tiny, TEXTS, Options(change=1e-12, samples=1, steps=3))
    assert (refusal.value.code, refusal.value.field) == ("adapter_unsupported_feature", "change")


def test_an_adapter_whose_tokens_would_have_to_be_counted_is_refused(tiny):
    model, adapter, base = tiny
    module, site = next(iter(adapter.sites.items()))
    gate = make_gate(2, site.a.shape[1], capacity=Capacity(3))
    site = replace(site, gate="g", expert=torch.tensor([0, 1], dtype=torch.int32))
    with pytest.raises(AdapterError) as refusal:
        search(model, replace(adapter, sites={module: site}, gates={"g": gate}), base, TEXTS, Options())
    assert (refusal.value.code, refusal.value.field) == ("adapter_unsupported_feature", "capacity")


def test_texts_without_a_token_to_predict_are_refused(tiny):
    with pytest.raises(AdapterError) as refusal:
        search(*tiny, TEXTS[:1], Options())
    assert (refusal.value.code, refusal.value.field) == ("adapter_config_invalid", "texts")


@pytest.mark.parametrize(
    ("field", "value"),
    [("change", 0), ("change", 1.5), ("change", float("nan")), ("samples", 0), ("samples", 10**6), ("steps", 0)],
)
def test_options_that_are_none_are_refused(field, value):
    with pytest.raises(AdapterError) as refusal:
        Options(**{field: value})
    assert (refusal.value.code, refusal.value.field) == ("adapter_config_invalid", field)
