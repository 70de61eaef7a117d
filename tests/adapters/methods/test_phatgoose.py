"""PHATGOOSE's tensors equal its formula, are not served yet, and what cannot be applied is refused by name.

The names are those that r-three/phatgoose at 1d23ac4 saves, which `scripts/concatenate.py` and
`scripts/manipulations.py` spell: `Router` and `FFNExperts` of `src/models/addons/moe.py` under the names that
`colm/models/t5xl/moe_lora_rank16_a2.gin` gives them. Its base is a T5; here the names of a decoder stand before
`._addons`. The config is ours.
"""

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import layer_norm

from loramux_adapters import BaseModel, lower, unserved
from loramux_adapters.files import AdapterFolder
from loramux_adapters.methods import METHODS

from ..checkpoints import BASE, write_adapter
from ..form import logits, site_delta
from ..hooks import hooked_logits
from .refusals import assert_refused, drop, poison, put

TARGETS = ("q_proj", "down_proj")
RANK, NUMBER = 4, 5
SITE = "model.layers.0.mlp.down_proj._addons"
A2, V2 = f"{SITE}.expert_lora.layer1__2", f"{SITE}.router.expert_embeddings__2"


def make_config(**changes):
    config = {
        "peft_type": "PHATGOOSE",
        "base_model_name_or_path": "somebody/tiny",
        "target_modules": list(TARGETS),
        "d_bottleneck": RANK,
        "num_experts": NUMBER,
    }
    return config | changes


def make_tensors(config, base=BASE, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    tensors, rank = {}, config["d_bottleneck"]
    for module, (d_in, d_out) in base.linears.items():
        for e in range(config["num_experts"]) if module.endswith(TARGETS) else ():
            shapes = {"expert_lora.layer1": (d_in, rank), "expert_lora.layer2": (rank, d_out)}
            shapes["router.expert_embeddings"] = (d_in,)
            for name, shape in shapes.items():
                tensors[f"{module}._addons.{name}__{e}"] = torch.randn(shape, generator=generator).to(dtype)
    return tensors


def delta(config, tensors, module, x):
    """As its forward pass has it: scores of two LayerNorms, softmax over all, the best, divided by their sum + eps."""
    place, number, width = f"{module}._addons", config["num_experts"], x.shape[1]
    vectors = torch.stack([tensors[f"{place}.router.expert_embeddings__{e}"].double() for e in range(number)])
    scores = layer_norm(x.double(), (width,)) @ layer_norm(vectors, (width,)).T * (1 / width) ** 0.5
    best, chosen = torch.softmax(scores, 1).topk(config.get("topk_value", 2))
    best = best / (best.sum(1, keepdim=True) + config.get("epsilon", 1e-6))
    g = torch.zeros_like(scores).scatter(1, chosen, best)
    total = 0
    for e in range(number):
        middle = x.double() @ tensors[f"{place}.expert_lora.layer1__{e}"].double()
        total = total + g[:, e : e + 1] * (middle @ tensors[f"{place}.expert_lora.layer2__{e}"].double())
    return total / config["d_bottleneck"] if config.get("divide_by_d_bottleneck", True) else total


@pytest.mark.parametrize(
    ("options", "dtype"),
    [
        ({}, torch.float32),
        ({}, torch.bfloat16),
        ({"topk_value": 3, "divide_by_d_bottleneck": False, "epsilon": 0.01}, torch.float32),
    ],
)
def test_logits_are_those_of_the_formula(tmp_path, reference, options, dtype):
    tiny = reference("llama")
    config = make_config(**options)
    tensors = make_tensors(config, tiny.base, dtype)
    adapter = lower(write_adapter(tmp_path, config, tensors), tiny.base)
    deltas = {module: partial(delta, config, tensors, module) for module in adapter.sites}
    expected = hooked_logits(tiny.model, deltas, tiny.tokens)
    moved = (expected - tiny.base_logits()).abs().max()
    assert len(deltas) == 4 and adapter.method == "phatgoose" and moved > 1e-3
    # The router is stored in float32.
    assert (logits(tiny.model, adapter, tiny.tokens) - expected).abs().max() < 1e-6 * moved


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 5), st.integers(1, 6), st.integers(2, 20), st.integers(1, 20), st.integers(0, 999), st.data())
def test_any_shape(tmp_path_factory, rank, number, d_in, d_out, seed, data):
    base = BaseModel("tiny", {"model.layers.0.self_attn.q_proj": (d_in, d_out)})
    config = make_config(d_bottleneck=rank, num_experts=number, topk_value=data.draw(st.integers(1, number)))
    tensors = make_tensors(config, base, seed=seed)
    adapter = lower(write_adapter(tmp_path_factory.mktemp("phatgoose"), config, tensors), base)
    ((module, site),) = adapter.sites.items()
    x = torch.randn(5, d_in, generator=torch.Generator().manual_seed(seed + 1))
    expected = delta(config, tensors, module, x)
    tolerance = 1e-5 * float(expected.abs().max())
    torch.testing.assert_close(site_delta(site, adapter.gates, x), expected, rtol=1e-5, atol=tolerance)


def test_only_the_layer_norm_keeps_it_from_being_served(tmp_path):
    adapter = lower(write_adapter(tmp_path, make_config(), make_tensors(make_config())), BASE)
    assert {obstacle.split(": ")[0].rpartition(".")[2] for obstacle in unserved(adapter)} == {"pre"}


def test_exactly_one_method_claims_the_folder(tmp_path):
    folder = AdapterFolder(write_adapter(tmp_path, make_config(), make_tensors(make_config())))
    assert [method.name for method in METHODS if method.detect(folder)] == ["phatgoose"]


@pytest.mark.parametrize(
    ("config", "spoil", "code", "field"),
    [
        ({"d_bottleneck": None}, None, "adapter_config_invalid", "d_bottleneck"),
        ({"d_bottleneck": 5}, None, "adapter_shape_mismatch", None),
        ({"num_experts": None}, None, "adapter_config_invalid", "num_experts"),
        ({"num_experts": 6}, None, "adapter_missing_tensor", None),
        ({"num_experts": 4}, None, "adapter_unknown_tensor", None),
        ({"topk_value": 6}, None, "adapter_config_invalid", "topk_value"),
        ({"topk_value": None}, None, "adapter_config_invalid", "topk_value"),
        ({"epsilon": "small"}, None, "adapter_config_invalid", "epsilon"),
        ({"epsilon": -1e-6}, None, "adapter_config_invalid", "epsilon"),
        ({"divide_by_d_bottleneck": 1}, None, "adapter_config_invalid", "divide_by_d_bottleneck"),
        ({"lora_alpha": 16}, None, "adapter_unsupported_feature", "lora_alpha"),
        ({"score_type": "cosine"}, None, "adapter_unsupported_feature", "score_type"),
        ({"normalize_topk": False}, None, "adapter_unsupported_feature", "normalize_topk"),
        ({"use_input_gate": True}, None, "adapter_unsupported_feature", "use_input_gate"),
        ({"target_modules": None}, None, "adapter_config_invalid", "target_modules"),
        ({}, drop(V2), "adapter_missing_tensor", V2),
        ({}, drop(A2), "adapter_missing_tensor", A2),
        ({}, put(V2, 24), "adapter_shape_mismatch", V2),
        ({}, put(A2, RANK, 40), "adapter_shape_mismatch", A2),
        ({}, put("encoder.embed_tokens.weight", 61, 24), "adapter_unsupported_feature", "encoder.embed_tokens.weight"),
        ({}, put(f"{SITE}.expert_lora.expert_input_gate", 40), "adapter_unknown_tensor", None),
        ({}, poison(V2), "adapter_not_finite", None),
    ],
)
def test_wrong_variants_are_refused(tmp_path, config, spoil, code, field):
    assert_refused(tmp_path, make_config(**config), make_tensors(make_config()), spoil, code, field)
