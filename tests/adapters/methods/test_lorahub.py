"""LoraHub: PEFT with the state_dict that LoraHub's code makes gives the same logits; the rest is refused by name.

`get_final_weights` in sail-sg/lorahub's `lorahub/algorithm.py`, at 2bc1c5a, adds weighted state_dicts key by key, and
`lorahub_learning` puts the sum into the first adapter. The config is ours.
"""

import json
from copy import deepcopy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict

from loramux_adapters import BaseModel, check_servable, lower
from loramux_adapters.files import AdapterFolder
from loramux_adapters.methods import METHODS

from ..checkpoints import BASE, make_config, make_tensors, write_adapter
from ..form import logits, site_delta
from .refusals import assert_refused

TARGETS = ["q_proj", "down_proj"]


def write_hub(folder, weights, parts, **config):
    for name, (part, tensors) in parts.items():
        write_adapter(folder / name, part, tensors)
    hub = {"peft_type": "LORAHUB", "adapters": list(parts), "weights": weights} | config
    (folder / "adapter_config.json").write_text(json.dumps(hub))
    return folder


def three(**last):
    parts = {name: (make_config(), make_tensors(seed=seed)) for seed, name in enumerate("abc")}
    return parts | {"c": (make_config(**last), parts["c"][1])}


def test_logits_are_those_of_its_own_steps_in_peft(tmp_path, reference):
    tiny, weights = reference("llama"), [0.7, -1.2, 0.25]
    generator = torch.Generator().manual_seed(3)
    for name in "abc":
        tiny.save(tmp_path / name, r=4, lora_alpha=8, target_modules=TARGETS)
        # `save` draws the same numbers each time.
        tensors = {
            f"base_model.model.{module}.lora_{factor}.weight": torch.randn(shape, generator=generator) * 0.3
            for module, (d_in, d_out) in tiny.base.linears.items()
            if module.endswith(tuple(TARGETS))
            for factor, shape in (("A", (4, d_in)), ("B", (d_out, 4)))
        }
        write_adapter(tmp_path / name, json.loads((tmp_path / name / "adapter_config.json").read_text()), tensors)
    (tmp_path / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORAHUB", "adapters": list("abc"), "weights": weights})
    )
    adapter = lower(tmp_path, tiny.base)
    check_servable(adapter)

    cache = []
    for name in "abc":
        loaded = PeftModel.from_pretrained(deepcopy(tiny.model), tmp_path / name, autocast_adapter_dtype=False)
        cache.append(get_peft_model_state_dict(loaded.double()))
    first = (
        PeftModel.from_pretrained(deepcopy(tiny.model), tmp_path / "a", autocast_adapter_dtype=False).double().eval()
    )
    mixed = {key: sum(w * part[key] for w, part in zip(weights, cache, strict=True)) for key in cache[0]}
    set_peft_model_state_dict(first, mixed)
    with torch.no_grad():
        expected = first(tiny.tokens).logits
    assert adapter.method == "lorahub" and set(adapter.ranks.values()) == {4}
    # The sums are stored in float32.
    assert (logits(tiny.model, adapter, tiny.tokens) - expected).abs().max() < 1e-5
    assert (expected - tiny.base_logits()).abs().max() > 1e-2


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.floats(-1.5, 1.5), min_size=1, max_size=5).filter(lambda weights: any(abs(w) > 0.1 for w in weights)),
    st.integers(1, 5), st.integers(1, 20), st.integers(1, 20), st.sampled_from([torch.float32, torch.bfloat16]),
)  # fmt: skip
def test_any_shape(tmp_path_factory, weights, rank, d_in, d_out, dtype):
    base = BaseModel("tiny", {"model.layers.0.self_attn.q_proj": (d_in, d_out)})
    module = "model.layers.0.self_attn.q_proj"
    config = make_config(r=rank, target_modules=["q_proj"])
    parts = {
        str(i): (config, make_tensors(base, ranks={module: rank}, dtype=dtype, seed=i)) for i in range(len(weights))
    }
    adapter = lower(write_hub(tmp_path_factory.mktemp("hub"), weights, parts), base)
    x = torch.randn(5, d_in, generator=torch.Generator().manual_seed(1))
    a, b = (
        sum(
            w * t[f"base_model.model.{module}.lora_{f}.weight"].double()
            for w, (_, t) in zip(weights, parts.values(), strict=True)
        )
        for f in "AB"
    )
    expected = 8 / rank * (x.double() @ a.T) @ b.T
    tolerance = 1e-5 * max(1.0, float(expected.abs().max()))
    torch.testing.assert_close(site_delta(adapter.sites[module], {}, x), expected, rtol=1e-5, atol=tolerance)


def test_it_is_not_the_weighted_sum_of_products(tmp_path):
    """Which the chain of the same folders is: that would be another function."""
    hub = lower(write_hub(tmp_path / "hub", [0.5, 0.5, 1], three()), BASE)
    chain = write_hub(tmp_path / "chain", [0.5, 0.5, 1], three(), peft_type="CHAIN")
    module, x = "model.layers.0.self_attn.q_proj", torch.randn(3, 24)
    mixed, summed = (site_delta(adapter.sites[module], {}, x) for adapter in (hub, lower(chain, BASE)))
    assert (mixed - summed).abs().max() > 0.1


def test_exactly_one_method_claims_the_folder(tmp_path):
    folder = AdapterFolder(write_hub(tmp_path, [1, 1, 1], three()))
    assert [method.name for method in METHODS if method.detect(folder)] == ["lorahub"]


@pytest.mark.parametrize(
    ("parts", "config", "code", "field"),
    [
        (three(), {"weights": None}, "adapter_config_invalid", "weights"),
        (three(), {"weights": [1, 2]}, "adapter_config_invalid", "weights"),
        (three(), {"weights": [1, 2, True]}, "adapter_config_invalid", "weights"),
        (three(), {"weights": [0, 0, 0]}, "adapter_no_effect", None),
        (three(), {"weights": [1, 1, 1e9]}, "adapter_config_invalid", "weights"),
        (three(), {"adapters": None}, "adapter_config_invalid", "adapters"),
        (three(), {"adapters": ["a", "b", "../c"]}, "adapter_unsafe_file", "../c"),
        (three(), {"lora_alpha": 8}, "adapter_unsupported_feature", "lora_alpha"),
        (three(lora_alpha=4), {}, "adapter_config_invalid", "c"),
        (three(peft_type="VERA"), {}, "adapter_unsupported_feature", "c"),
        (
            three() | {"b": (make_config(r=3), make_tensors(ranks=dict.fromkeys(BASE.linears, 3)))}, {},
            "adapter_shape_mismatch", "b",
        ),
        (
            three() | {"b": (make_config(target_modules=["q_proj"]), make_tensors(targets=("q_proj",)))}, {},
            "adapter_missing_tensor", "b",
        ),
    ],
)  # fmt: skip
def test_wrong_variants_are_refused(tmp_path, parts, config, code, field):
    def write(folder, config, tensors):
        return write_hub(folder, parts=parts, **{"weights": [1, 1, 1]} | config)

    assert_refused(tmp_path, config, {}, None, code, field, write=write)
