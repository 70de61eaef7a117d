"""Arrow: the logits of PEFT's own Arrow, prototypes that are singular vectors, and what is refused."""

from copy import deepcopy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import ArrowConfig, LoraConfig, create_arrow_model, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig

from loramux_adapters import AdapterError, BaseModel, LoweredAdapter, LoweredSite, lower
from loramux_adapters.compose.arrow import arrow, prototype

from ..checkpoints import BASE, make_config, make_tensors, write_adapter
from ..form import logits, site_delta
from ..mixture_reference import mixture_delta

CONFIG = LlamaConfig(
    hidden_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=96,
    vocab_size=61,
)
TOKENS = torch.randint(0, 61, (2, 9), generator=torch.Generator().manual_seed(1))
# Powers of two, so that our float32 scale and PEFT's float64 one are the same number.
ALPHAS = [8, 16, 4, 32]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIG).eval()


@pytest.fixture(scope="module")
def folders(model, tmp_path_factory):
    """Four LoRAs that PEFT made and saved, with random factors."""
    paths = []
    for i, alpha in enumerate(ALPHAS):
        torch.manual_seed(10 + i)
        config = LoraConfig(target_modules=["q_proj", "v_proj", "down_proj"], r=4, lora_alpha=alpha)
        adapted = get_peft_model(deepcopy(model), config)
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.data = torch.randn(parameter.shape).mul_(0.3)
        paths.append(tmp_path_factory.mktemp("lora"))
        adapted.save_pretrained(paths[-1])
    return paths


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("top_k", [1, 2, 3])
@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_logits_are_those_of_peft_with_its_prototypes(model, folders, top_k, temperature):
    """PEFT's power iteration has no seed and does not converge, so both use what it found."""
    config = ArrowConfig(top_k=top_k, router_temperature=temperature)
    routed = create_arrow_model(deepcopy(model), [str(path) for path in folders], config).double().eval()
    with torch.no_grad():
        expected = routed(TOKENS).logits
    prototypes = {
        name: module.lora_arrow["arrow_router"].prototypes
        for name, module in routed.base_model.model.named_modules()
        if "arrow_router" in getattr(module, "lora_arrow", {})
    }
    base = BaseModel.from_module(model, "tiny")
    adapters = {path.name: lower(path, base) for path in folders}

    composed = arrow(list(adapters.items()), top_k=top_k, temperature=temperature, base=base, prototypes=prototypes)
    assert len(composed.sites) == 6 and set(composed.sites) == set(prototypes)
    size = expected.abs().max()
    assert (logits(model, composed, TOKENS) - expected).abs().max() < 1e-9 * size
    # Not so with one expert more, or with none at all.
    other = arrow(list(adapters.items()), top_k=top_k + 1, temperature=temperature, base=base, prototypes=prototypes)
    assert (logits(model, other, TOKENS) - expected).abs().max() > 1e-4 * size
    assert (logits(model, LoweredAdapter("lora", {}), TOKENS) - expected).abs().max() > 1e-3 * size


def random_site(generator, rank, d_in, d_out, scale=0.5):
    a, b = (torch.randn(rank, width, generator=generator) for width in (d_in, d_out))
    return LoweredSite(a, b, torch.full((rank,), scale))


@settings(max_examples=60, deadline=None)
@given(
    rank=st.integers(1, 20),
    d_in=st.integers(1, 24),
    d_out=st.integers(1, 24),
    scale=st.sampled_from([0.5, -2.0, 1e-3]),
    seed=st.integers(0, 10_000),
)
def test_prototypes_are_singular_vectors_of_the_dense_delta(rank, d_in, d_out, scale, seed):
    site = random_site(torch.Generator().manual_seed(seed), rank, d_in, d_out, scale)
    dense = site.b.double().T @ site.a.double()
    _, values, right = torch.linalg.svd(dense)
    found = prototype(site)
    assert abs(found.norm() - 1) < 1e-9
    # Up to sign, and as exactly as the gap to the second singular value lets it be known.
    gap = (values[0] - values[1]) / values[0] if len(values) > 1 else torch.tensor(1.0)
    assert min((found - right[0]).norm(), (found + right[0]).norm()) < 1e-11 / gap
    assert abs((dense @ found).norm() - values[0]) < 1e-9 * values[0]
    assert found[found.abs().argmax()] > 0


def test_prototypes_do_not_depend_on_how_the_delta_is_factored():
    generator = torch.Generator().manual_seed(0)
    site = random_site(generator, 4, 24, 40)
    mix = torch.randn(4, 4, generator=generator, dtype=torch.float64)
    turned = LoweredSite(mix @ site.a.double(), torch.linalg.inv(mix).T @ site.b.double(), site.scale)
    rescaled = LoweredSite(
        site.a, site.b * torch.tensor([[1.0], [2], [4], [8]]), site.scale / torch.tensor([1.0, 2, 4, 8])
    )
    for other in (turned, rescaled):
        torch.testing.assert_close(prototype(other), prototype(site), rtol=0, atol=1e-9)


def test_every_site_computes_the_formula_with_unequal_ranks(tmp_path):
    """Adapters of other ranks and other modules: an expert that is not there scores zero and adds nothing."""
    targets = [("q_proj", "down_proj"), ("q_proj",), ("q_proj", "up_proj")]
    adapters, tensors = {}, []
    for i, (rank, names) in enumerate(zip((2, 7, 3), targets, strict=True)):
        ranks = dict.fromkeys(BASE.linears, rank)
        tensors.append(make_tensors(targets=names, ranks=ranks, seed=i))
        config = make_config(r=rank, lora_alpha=rank * 2, target_modules=list(names))
        adapters[f"adapter {i}"] = lower(write_adapter(tmp_path / str(i), config, tensors[-1]), BASE)
    composed = arrow(list(adapters.items()), top_k=2, base=BASE)
    assert set(composed.sites) == {m for m in BASE.linears if m.endswith(("q_proj", "down_proj", "up_proj"))}
    for module, site in composed.sites.items():
        d_in, d_out = BASE.linears[module]
        x = torch.randn(20, d_in, generator=torch.Generator().manual_seed(1))
        key = f"base_model.model.{module}.lora_{{}}.weight"
        a = [part.get(key.format("A"), torch.zeros(1, d_in)) for part in tensors]
        b = [part.get(key.format("B"), torch.zeros(d_out, 1)) for part in tensors]
        router = torch.stack(
            [torch.linalg.svd(up.double() @ down.double()).Vh[0] for down, up in zip(a, b, strict=True)]
        )
        present = torch.tensor([key.format("A") in part for part in tensors])
        # |v·x|: the reference scores without the absolute value, so it gets each token with the signs of its own.
        for token in x.double():
            signs = (router @ token).sign() * present
            expected = mixture_delta(token[None], router * signs[:, None], a, b, [2.0] * 3, k=2)
            found = site_delta(site, composed.gates, token[None])
            # The prototypes are kept in float32.
            assert (found - expected).abs().max() < 1e-5 * expected.abs().max()
        assert composed.gates[site.gate].experts == 3


def test_a_delta_of_zero_has_no_prototype():
    site = LoweredSite(torch.ones(2, 24), torch.zeros(2, 12), torch.ones(2))
    assert prototype(site).eq(0).all()


def plain(**changes):
    site = random_site(torch.Generator().manual_seed(0), 2, 24, 24)
    fields = {"a": site.a, "b": site.b, "scale": site.scale} | changes
    return LoweredAdapter("lora", {"model.layers.0.self_attn.q_proj": LoweredSite(**fields)})


@pytest.mark.parametrize(
    ("adapters", "options", "code", "field"),
    [
        ([plain()], {"top_k": 2}, "adapter_config_invalid", "top_k"),
        ([plain()], {"top_k": 0}, "adapter_config_invalid", "top_k"),
        ([], {"top_k": 1}, "adapter_config_invalid", "top_k"),
        ([plain()], {"top_k": 1, "temperature": 0.0}, "adapter_config_invalid", "temperature"),
        ([plain()], {"top_k": 1, "temperature": float("nan")}, "adapter_config_invalid", "temperature"),
        ([plain(), plain(magnitude=torch.ones(24))], {"top_k": 1}, "adapter_unsupported_feature", "1"),
        ([plain(bias=torch.ones(24))], {"top_k": 1}, "adapter_unsupported_feature", "0"),
        ([plain(scale=torch.zeros(2))], {"top_k": 1}, "adapter_no_effect", None),
        (
            [plain()],
            {"top_k": 1, "prototypes": {"model.layers.0.self_attn.q_proj": torch.ones(2, 24)}},
            "adapter_shape_mismatch",
            "model.layers.0.self_attn.q_proj",
        ),
    ],
)
def test_what_cannot_be_composed_is_refused(adapters, options, code, field):
    with pytest.raises(AdapterError) as refusal:
        arrow([(str(i), adapter) for i, adapter in enumerate(adapters)], base=BASE, **options)
    assert (refusal.value.code, refusal.value.field) == (code, field)


def test_a_mixture_is_no_expert():
    once = arrow([("a", plain()), ("b", plain())], top_k=1, base=BASE)
    with pytest.raises(AdapterError) as refusal:
        arrow([("mixture", once)], top_k=1, base=BASE)
    assert (refusal.value.code, refusal.value.field) == ("adapter_unsupported_feature", "mixture")
