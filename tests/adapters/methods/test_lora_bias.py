"""LoRA with a bias on B, with trained biases of the base's layers, and with both: lowered, it gives PEFT's logits.

PEFT writes the files of the first tests; those of the others repeat its names, `<module>.lora_B.bias` among them.
"""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loramux_adapters import AdapterError, lower, unserved
from loramux_adapters.files import AdapterFolder
from loramux_adapters.methods import METHODS
from loramux_adapters.native import write_native

from .. import checkpoints
from ..checkpoints import BASE, RANK, write_adapter
from ..form import site_delta
from .refusals import assert_refused, drop, put

CASES = {
    "plain": {"target_modules": ["q_proj", "down_proj"]},
    "rslora": {"target_modules": ["q_proj", "v_proj"], "r": 6, "lora_alpha": 9, "use_rslora": True},
    "patterns": {
        "target_modules": ["q_proj", "k_proj", "up_proj"],
        "rank_pattern": {"k_proj": 5, "up_proj": 7},
        "alpha_pattern": {"k_proj": 3, "up_proj": -2},
    },
    "bfloat16": {"target_modules": "all-linear", "dtype": torch.bfloat16},
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_logits_are_those_of_peft(options, kind, reference, tmp_path):
    """Llama's layers have no bias of their own, GPT-2's have one."""
    tiny = reference(kind)
    if kind == "gpt2":
        options = options | {"target_modules": ["c_attn", "mlp.c_proj"], "rank_pattern": {}, "alpha_pattern": {}}
    folder = tiny.save(tmp_path, lora_bias=True, **options)
    adapter = lower(folder, tiny.base)
    tiny.assert_same(adapter, tiny.library_logits(folder))
    assert all(site.bias is not None and site.bias.any() for site in adapter.sites.values())
    assert not any("pattern" in warning for warning in adapter.warnings)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("lora_bias", [False, True])
@pytest.mark.parametrize(
    ("kind", "bias", "targets"),
    [
        ("qwen2", "lora_only", ["q_proj", "o_proj"]),
        ("qwen2", "all", ["q_proj", "k_proj", "v_proj"]),
        ("gpt2", "lora_only", ["c_attn", "mlp.c_proj"]),
    ],
)
def test_logits_with_trained_biases_are_those_of_peft(kind, bias, targets, lora_bias, reference, tmp_path):
    tiny = reference(kind)
    folder = tiny.save(tmp_path, bias=bias, lora_bias=lora_bias, target_modules=targets)
    adapter = lower(folder, tiny.base)
    assert adapter.method == "lora_bias" and not unserved(adapter)
    assert not any("no bias" in warning for warning in adapter.warnings)
    tiny.assert_same(adapter, tiny.library_logits(folder))


MODULES = [module for module in BASE.linears if module.endswith(("q_proj", "down_proj"))]
SITE = f"base_model.model.{MODULES[0]}"
BIAS = f"{SITE}.lora_B.bias"


def make_config(**changes):
    return checkpoints.make_config(**{"lora_bias": True} | changes)


def make_tensors(ranks=None, dtype=torch.float32, seed=0):
    tensors = checkpoints.make_tensors(ranks=ranks, dtype=dtype, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    for module in MODULES:
        bias = torch.randn(BASE.linears[module][1], generator=generator).to(dtype)
        tensors[f"base_model.model.{module}.lora_B.bias"] = bias
    return tensors


@settings(max_examples=20, deadline=None)
@given(
    ranks=st.lists(st.integers(1, 40), min_size=len(MODULES), max_size=len(MODULES)),
    alpha=st.floats(-64, 64).filter(lambda alpha: abs(alpha) > 1e-3),
    rslora=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_the_bias_is_scaled_like_the_rest(tmp_path_factory, ranks, alpha, rslora, seed):
    by_module = dict(zip(MODULES, ranks, strict=True))
    tensors = make_tensors(by_module, seed=seed)
    config = make_config(rank_pattern=by_module, lora_alpha=alpha, use_rslora=rslora)
    adapter = lower(write_adapter(tmp_path_factory.mktemp("adapter"), config, tensors), BASE)
    assert adapter.ranks == by_module
    for module, site in adapter.sites.items():
        a, b, bias = (
            tensors[f"base_model.model.{module}.lora_{name}"].double() for name in ("A.weight", "B.weight", "B.bias")
        )
        x = torch.randn(3, a.shape[1], dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        expected = alpha / len(a) ** (0.5 if rslora else 1) * (x @ a.T @ b.T + bias)
        torch.testing.assert_close(site_delta(site, {}, x), expected, rtol=1e-6, atol=1e-5 * max(1, abs(alpha)))


def test_it_is_kept_in_the_native_format(tmp_path):
    adapter = lower(write_adapter(tmp_path / "peft", make_config(), make_tensors()), BASE)
    again = lower(write_native(tmp_path / "native.safetensors", adapter, BASE.name), BASE)
    for module, site in adapter.sites.items():
        assert torch.equal(site.bias, again.sites[module].bias)


def biased(folder):
    """The base with a bias at every layer, and its numbers."""
    weights = {f"{m}.bias": torch.randn(d_out) for m, (_, d_out) in BASE.linears.items()}
    return replace(checkpoints.with_weights(folder, tensors=weights), biased=frozenset(BASE.linears)), weights


@pytest.mark.parametrize("name", ["base_layer.bias", "bias"])
@pytest.mark.parametrize("beta", [True, False])
def test_a_trained_bias_replaces_the_bases_own(tmp_path, name, beta):
    """Under the name that PEFT gives it today, and under the one from before it had base layers."""
    base, weights = biased(tmp_path / "base")
    tensors = {k: v for k, v in make_tensors().items() if beta or not k.endswith("B.bias")}
    trained = torch.randn(24)
    tensors[f"{SITE}.{name}"] = trained
    config = make_config(bias="lora_only", lora_bias=beta)
    adapter = lower(write_adapter(tmp_path / "adapter", config, tensors), base)
    change = trained - weights[f"{MODULES[0]}.bias"]
    if beta:
        change += 2 * tensors[BIAS]
    torch.testing.assert_close(adapter.sites[MODULES[0]].bias, change)
    assert [warning for warning in adapter.warnings if "no bias" in warning] == [
        f"bias is 'lora_only', but the file has no bias for '{MODULES[1]}' ({len(MODULES) - 1} such): "
        "the base's own are used, as PEFT does."
    ]
    other = adapter.sites[MODULES[1]].bias
    assert other is None if not beta else torch.equal(other, 2 * tensors[f"base_model.model.{MODULES[1]}.lora_B.bias"])


@pytest.mark.parametrize("name", [f"{SITE}.base_layer.bias", f"{SITE}.bias"])
def test_a_bias_where_the_base_has_none_or_none_that_can_be_read(tmp_path, name):
    tensors, config = make_tensors() | {name: torch.ones(24)}, make_config(bias="all")
    path = write_adapter(tmp_path / "adapter", config, tensors)
    with pytest.raises(AdapterError) as refusal:
        lower(path, BASE)
    assert (refusal.value.code, refusal.value.field) == ("adapter_unknown_tensor", f"{SITE}.base_layer.bias")
    with pytest.raises(AdapterError) as refusal:
        lower(path, replace(BASE, biased=frozenset(BASE.linears)))
    assert (refusal.value.code, refusal.value.field) == ("adapter_unsupported_feature", f"{MODULES[0]}.bias")


def test_exactly_one_method_claims_the_folder(tmp_path):
    folder = AdapterFolder(write_adapter(tmp_path, make_config(), make_tensors()))
    assert [method.name for method in METHODS if method.detect(folder)] == ["lora_bias"]


@pytest.mark.parametrize(
    ("config", "spoil", "code", "field"),
    [
        ({}, drop(BIAS), "adapter_missing_tensor", BIAS),
        ({}, drop(f"{SITE}.lora_B.weight"), "adapter_missing_tensor", f"{SITE}.lora_B.weight"),
        ({}, put(BIAS, 23), "adapter_shape_mismatch", BIAS),
        ({}, put(BIAS, 24, 1), "adapter_shape_mismatch", BIAS),
        ({}, put(BIAS, 24, value=float("nan")), "adapter_not_finite", f"{MODULES[0]}.bias"),
        ({}, put(BIAS, 24, value=3e38), "adapter_not_finite", f"{MODULES[0]}.bias"),
        ({}, put(BIAS, 24, dtype=torch.float64), "adapter_unsupported_feature", BIAS),
        ({}, put(f"{SITE}.lora_A.bias", RANK), "adapter_unsupported_feature", f"{SITE}.lora_A.bias"),
        ({}, put(f"{SITE}.base_layer.bias", 24), "adapter_unsupported_feature", f"{SITE}.base_layer.bias"),
        ({"lora_bias": "yes"}, None, "adapter_config_invalid", "lora_bias"),
        ({"lora_bias": False}, None, "adapter_unsupported_feature", None),
        ({"bias": "some"}, None, "adapter_config_invalid", "bias"),
        ({"bias": "all"}, put(f"{SITE}.base_layer.bias", 23), "adapter_shape_mismatch", f"{SITE}.base_layer.bias"),
        ({"bias": "all"}, put("base_model.model.model.norm.bias", 24), "adapter_unsupported_feature",
         "base_model.model.model.norm.bias"),
        ({"bias": "all"}, put("base_model.model.model.layers.0.mlp.up_proj.bias", 40), "adapter_unsupported_feature",
         "base_model.model.model.layers.0.mlp.up_proj.bias"),
        ({"init_lora_weights": "pissa"}, None, "adapter_unsupported_feature", "init_lora_weights"),
        ({"r": 8}, None, "adapter_shape_mismatch", None),
        ({"r": None}, None, "adapter_config_invalid", "r"),
        ({"rank_pattern": {"q_proj": 3}}, None, "adapter_shape_mismatch", None),
        ({"unknown": 1}, None, "adapter_unsupported_feature", "unknown"),
    ],
)  # fmt: skip
def test_wrong_variants_are_refused(tmp_path, config, spoil, code, field):
    assert_refused(tmp_path, make_config() | config, make_tensors(), spoil, code, field)
