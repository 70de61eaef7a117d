"""Chains of LoRAs, in folders or in one file, equal the base with every link merged; the rest is refused by name.

The folders are what PEFT writes.
"""

import json
from copy import deepcopy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel

from loramux_adapters import AdapterError, BaseModel, check_servable, lower

from ..checkpoints import BASE, make_config, make_tensors, write_adapter
from ..form import logits
from ..layouts.chain import RANK, delta
from ..layouts.chain import make_config as file_config
from ..layouts.chain import make_tensors as file_tensors
from .formula import EXACT, assert_logits, assert_sites
from .refusals import assert_refused, drop, poison, put

SITE = "base_model.model.model.layers.0.self_attn.q_proj"


def write_chain(folder, parts, **config):
    """parts: folder name -> (config, tensors) of a PEFT LoRA."""
    for name, (part, tensors) in parts.items():
        write_adapter(folder / name, part, tensors)
    chain = {"peft_type": "CHAIN", "adapters": list(parts)} | config
    (folder / "adapter_config.json").write_text(json.dumps(chain))
    return folder


def two_links(**config):
    second = make_config(r=3, target_modules=["q_proj", "up_proj"], use_rslora=True)
    ranks = dict.fromkeys(BASE.linears, 3)
    return {
        "first": (make_config(**config), make_tensors()),
        "second": (second, make_tensors(targets=("q_proj", "up_proj"), ranks=ranks, seed=1)),
    }


@pytest.mark.parametrize("kind", ["CHAIN", "COLA", "RACLORA", "XGBLORA"])
def test_folders_give_the_logits_of_peft_with_every_link_merged(tmp_path, reference, kind):
    tiny = reference("llama")
    options = {
        "a": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"]},
        "b": {"r": 2, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "use_rslora": True},
        "c": {"r": 1, "lora_alpha": 1, "target_modules": ["down_proj"], "layers_to_transform": [1]},
    }
    model = deepcopy(tiny.model).double()
    for name, part in options.items():
        tiny.save(tmp_path / name, **part)
        model = PeftModel.from_pretrained(model, tmp_path / name, autocast_adapter_dtype=False).double()
        model = model.merge_and_unload()
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": kind, "adapters": list(options)}))
    adapter = lower(tmp_path, tiny.base)
    check_servable(adapter)
    assert adapter.method == "chain" and adapter.ranks["model.layers.1.mlp.down_proj"] == 5
    with torch.no_grad():
        expected = model(tiny.tokens).logits
    # The second link's scale is no float32 number.
    assert (logits(tiny.model, adapter, tiny.tokens) - expected).abs().max() < 1e-5
    assert (expected - tiny.base_logits()).abs().max() > 1e-1


@pytest.mark.parametrize("weights", [None, [1, 0.5, -2, 0]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_file_has_the_logits_of_the_sum(tmp_path, reference, weights, dtype):
    tiny = reference("llama")
    config = file_config(weights=weights)
    tensors = file_tensors(config, tiny.base, dtype)
    adapter = lower(write_adapter(tmp_path, config, tensors), tiny.base)
    check_servable(adapter)
    assert len(adapter.sites) == 6 and len(set(adapter.ranks.values())) > 1
    assert_logits(tiny, adapter, delta, config, tensors, EXACT)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 5), st.integers(1, 6), st.integers(1, 20), st.integers(1, 20), st.integers(0, 999))
def test_any_shape(tmp_path_factory, rank, length, d_in, d_out, seed):
    base = BaseModel("tiny", {"model.layers.0.self_attn.q_proj": (d_in, d_out)})
    config = file_config(r=rank, length=length, target_modules=["q_proj"])
    tensors = file_tensors(config, base, seed=seed)
    adapter = lower(write_adapter(tmp_path_factory.mktemp("chain"), config, tensors), base)
    assert set(adapter.ranks.values()) == {rank * length}
    assert_sites(adapter, delta, config, tensors, seed=seed)


def test_weights_of_folders_multiply_their_scale(tmp_path):
    plain = lower(write_chain(tmp_path / "plain", two_links()), BASE)
    weighted = lower(write_chain(tmp_path / "weighted", two_links(), weights=[2, 0.5]), BASE)
    for module, site in plain.sites.items():
        factors = [2.0] * 4 * module.endswith(("q_proj", "down_proj")) + [0.5] * 3 * module.endswith(
            ("q_proj", "up_proj")
        )
        assert torch.equal(weighted.sites[module].scale, site.scale * torch.tensor(factors))


def test_a_link_of_the_hub_cache_may_lead_to_its_blobs(tmp_path):
    snapshot, blobs = tmp_path / "models--x--y/snapshots/0123", tmp_path / "models--x--y/blobs"
    write_chain(snapshot, two_links())
    blobs.mkdir()
    (snapshot / "first/adapter_model.safetensors").rename(blobs / "hash")
    (snapshot / "first/adapter_model.safetensors").symlink_to("../../../blobs/hash")
    assert len(lower(snapshot, BASE).sites) == 6
    (blobs / "hash").rename(tmp_path / "outside")
    (snapshot / "first/adapter_model.safetensors").unlink()
    (snapshot / "first/adapter_model.safetensors").symlink_to("../../../../outside")
    with pytest.raises(AdapterError) as refusal:
        lower(snapshot, BASE)
    assert refusal.value.code == "adapter_unsafe_file"


def test_the_links_are_measured_together(tmp_path):
    folder = write_chain(tmp_path, two_links())
    sizes = [(folder / name / "adapter_model.safetensors").stat().st_size for name in ("first", "second")]
    lower(folder, BASE, max_bytes=sum(sizes))
    with pytest.raises(AdapterError) as refusal:
        lower(folder, BASE, max_bytes=sum(sizes) - 1)
    assert (refusal.value.code, refusal.value.field) == ("adapter_too_large", "second")


@pytest.mark.parametrize(
    ("config", "code", "field"),
    [
        ({"adapters": []}, "adapter_config_invalid", "adapters"),
        ({"adapters": "first"}, "adapter_config_invalid", "adapters"),
        ({"adapters": ["first", "first"]}, "adapter_config_invalid", "adapters"),
        ({"adapters": ["first", 2]}, "adapter_config_invalid", "adapters"),
        ({"adapters": ["third"]}, "adapter_not_found", None),
        ({"adapters": ["first/../second"]}, "adapter_unsafe_file", "first/../second"),
        ({"adapters": [".."]}, "adapter_unsafe_file", ".."),
        ({"adapters": ["."]}, "adapter_unsafe_file", "."),
        ({"adapters": ["/etc"]}, "adapter_unsafe_file", "/etc"),
        ({"adapters": ["dora"]}, "adapter_unsupported_feature", "dora"),
        ({"adapters": ["mixture"]}, "adapter_unsupported_feature", "mixture"),
        ({"weights": [1]}, "adapter_config_invalid", "weights"),
        ({"weights": [1, "2"]}, "adapter_config_invalid", "weights"),
        ({"weights": [1, 1e-60]}, "adapter_config_invalid", "weights"),
        ({"weights": [0, 0]}, "adapter_no_effect", None),
        ({"length": 2}, "adapter_config_invalid", "adapters"),
        ({"r": 4}, "adapter_unsupported_feature", "r"),
    ],
)
def test_wrong_folders_are_refused(tmp_path, config, code, field):
    def write(folder, config, tensors):
        write_adapter(folder / "dora", make_config(use_dora=True))
        write_adapter(folder / "mixture", make_config(number_experts=2))
        return write_chain(folder, two_links(), **config)

    assert_refused(tmp_path, config, {}, None, code, field, write=write)


A1 = f"{SITE}.lora_A.1.weight"
ONE_LINK = [f"base_model.model.{m}.lora_{f}.3.weight" for m in BASE.linears for f in "AB"]


@pytest.mark.parametrize(
    ("config", "spoil", "code", "field"),
    [
        ({"length": None}, None, "adapter_config_invalid", "length"),
        ({"length": 3}, None, "adapter_unknown_tensor", None),
        ({"length": 5}, None, "adapter_missing_tensor", "4"),
        ({"r": 3}, None, "adapter_shape_mismatch", None),
        ({"weights": [1, 2]}, None, "adapter_config_invalid", "weights"),
        ({"rank_pattern": {"q_proj": 2}}, None, "adapter_unsupported_feature", "rank_pattern"),
        ({"target_modules": ["q_proj"]}, None, "adapter_unknown_tensor", None),
        ({}, lambda tensors: [tensors.pop(name, None) for name in ONE_LINK], "adapter_missing_tensor", "3"),
        ({}, drop(A1), "adapter_missing_tensor", A1),
        ({}, put(A1, RANK, 23), "adapter_shape_mismatch", A1),
        ({}, put(f"{SITE}.lora_A.weight", RANK, 24), "adapter_unknown_tensor", f"{SITE}.lora_A.weight"),
        ({}, poison(A1), "adapter_not_finite", None),
    ],
)
def test_wrong_files_are_refused(tmp_path, config, spoil, code, field):
    assert_refused(tmp_path, file_config(**config), file_tensors(), spoil, code, field)
