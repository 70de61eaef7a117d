"""MELoRA: the lowered form gives the logits of the authors' layer, written with plain hooks."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loramux_adapters import AdapterError, BaseModel, lower
from loramux_adapters.footprint import pool_bytes

from ..checkpoints import BASE, write_adapter
from ..layouts.melora import ALPHAS, RANKS, delta, make_config, make_tensors
from .formula import assert_logits, assert_one_adapter, assert_sites
from .refusals import assert_refused, drop, put

TARGETS = ("q_proj", "up_proj")
MODULES = [module for module in BASE.linears if module.endswith(TARGETS)]
SITE = f"base_model.model.{MODULES[0]}"


@pytest.mark.parametrize("ranks", [RANKS, [3, 3], [5]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_are_those_of_the_formula(ranks, dtype, reference, tmp_path):
    tiny = reference("llama")
    alphas = ALPHAS[: len(ranks)]
    config = make_config(r=ranks, lora_alpha=alphas)
    tensors = make_tensors(config, tiny.base, dtype)
    adapter = lower(write_adapter(tmp_path, config, tensors), tiny.base)
    assert_logits(tiny, adapter, delta, config, tensors)
    assert set(adapter.ranks.values()) == {sum(ranks)}
    assert all(site.a.dtype == site.b.dtype == dtype for site in adapter.sites.values())


@pytest.mark.parametrize(
    ("ranks", "width", "bands", "where"),
    [
        ([3], 24, 1, None),
        ([3] * 4, 512, 4, None),
        # Blocks that kernels on a GPU cannot pack; of unequal ranks, nobody can.
        ([3] * 2, 384, 2, "On a GPU, "),
        ([3, 3, 6, 3], 512, 1, ""),
    ],
)
def test_the_cost_of_the_zeros_is_said_where_they_are_served(ranks, width, bands, where, tmp_path):
    """Where n divides both widths, n times the blocks' bytes."""
    number, base = len(ranks), BaseModel("one", {"layers.0.q_proj": (width, 512)})
    config = make_config(r=ranks, lora_alpha=[6] * number)
    tensors = make_tensors(config, base)
    blocks = sum(tensor.nbytes for tensor in tensors.values())
    adapter = lower(write_adapter(tmp_path, config, tensors), base)
    (site,) = adapter.sites.values()
    assert site.bands == bands and site.a.nbytes + site.b.nbytes == number * blocks
    said = [warning for warning in adapter.warnings if "MELoRA" in warning]
    cost = f"{number * blocks} bytes instead of {blocks}, and {number} times the work."
    assert len(said) == (where is not None)
    assert all(warning.startswith(f"{where}MELoRA's") and warning.endswith(cost) for warning in said)


@pytest.mark.parametrize("tiled", [False, True])
def test_the_pool_takes_the_bytes_of_one_block(tiled, tmp_path):
    """Those of a LoRA of a block's rank, and a scale for each rank row of all blocks."""
    base = BaseModel("one", {"layers.0.q_proj": (512, 1024)})
    config = make_config(r=[4] * 4, lora_alpha=[6] * 4)
    adapter = lower(write_adapter(tmp_path, config, make_tensors(config, base)), base)
    assert pool_bytes(adapter, base, torch.float32, tiled=tiled) == 4 * (512 + 1024) * 4 + 128


def test_logits_are_those_of_the_formula_on_transposed_layers(reference, tmp_path):
    tiny = reference("gpt2")
    config = make_config(r=[2, 3], lora_alpha=[4, 5], target_modules=["c_attn"], fan_in_fan_out=True)
    tensors = make_tensors(config, tiny.base)
    adapter = lower(write_adapter(tmp_path, config, tensors), tiny.base)
    assert_logits(tiny, adapter, delta, config, tensors)


@settings(max_examples=20, deadline=None)
@given(
    ranks=st.lists(st.integers(1, 9), min_size=1, max_size=8),
    width=st.integers(1, 9),
    beyond=st.integers(0, 7),
    height=st.integers(1, 9),
    seed=st.integers(0, 1000),
)
def test_any_shape_gives_the_blocks_one_after_the_other(tmp_path_factory, ranks, width, beyond, height, seed):
    """`beyond`: inputs that are left where n does not divide d_in. No small LoRA reads them."""
    n = len(ranks)
    d_in = n * width + beyond % n
    base = BaseModel("one", {"layers.0.q_proj": (d_in, n * height)})
    alphas = torch.randn(n, generator=torch.Generator().manual_seed(seed)).tolist()
    config = make_config(r=ranks, lora_alpha=alphas)
    tensors = make_tensors(config, base, seed=seed)
    adapter = lower(write_adapter(tmp_path_factory.mktemp("adapter"), config, tensors), base)
    assert_sites(adapter, delta, config, tensors, seed=seed)


def test_the_prefix_may_be_missing(tmp_path):
    tensors = make_tensors()
    bare = {name.removeprefix("base_model.model."): tensor for name, tensor in tensors.items()}
    assert_one_adapter(tmp_path, (make_config(), tensors), (make_config(), bare))


def test_what_is_too_large_when_it_is_lowered_is_refused(tmp_path):
    folder = write_adapter(tmp_path, make_config(), make_tensors())
    nbytes = sum(4 * sum(RANKS) * sum(BASE.linears[module]) for module in MODULES)
    lower(folder, BASE, max_bytes=nbytes)
    with pytest.raises(AdapterError) as refusal:
        lower(folder, BASE, max_bytes=nbytes - 1)
    assert refusal.value.code == "adapter_too_large"


def name(part, i):
    return f"{SITE}.lora_{part}.{i}.weight"


@pytest.mark.parametrize(
    ("config", "spoil", "code", "field"),
    [
        ({}, drop(name("A", 2)), "adapter_missing_tensor", name("A", 2)),
        ({}, drop(name("B", 0)), "adapter_missing_tensor", name("B", 0)),
        ({}, put(name("A", 0), 2, 7), "adapter_shape_mismatch", name("A", 0)),
        ({}, put(name("A", 0), 2, 24), "adapter_shape_mismatch", name("A", 0)),
        ({}, put(name("B", 3), 6, 4), "adapter_shape_mismatch", name("B", 3)),
        ({}, put(name("A", 4), 2, 6), "adapter_unknown_tensor", name("A", 4)),
        ({}, put(name("A", "00"), 2, 6), "adapter_unknown_tensor", name("A", "00")),
        ({}, put(f"{SITE}.lora_A.weight", 2, 24), "adapter_unknown_tensor", f"{SITE}.lora_A.weight"),
        ({}, put(name("A", 0), 2, 6, value=float("nan")), "adapter_not_finite", f"{MODULES[0]}.A"),
        ({}, put(name("A", 0), 2, 6, dtype=torch.float64), "adapter_unsupported_feature", name("A", 0)),
        ({"r": [2, 4, 1]}, None, "adapter_config_invalid", "lora_alpha"),
        ({"r": [2, 4, 1], "lora_alpha": [1, 1, 1]}, None, "adapter_config_invalid", "r"),
        ({"r": [2, 4], "lora_alpha": [1, 1]}, None, "adapter_unknown_tensor", None),
        ({"r": [2] * 5, "lora_alpha": [1] * 5}, None, "adapter_config_invalid", "r"),
        ({"r": [1] * 100_000, "lora_alpha": [1] * 100_000}, None, "adapter_config_invalid", "r"),
        ({"r": [2, 4, 2, 3]}, None, "adapter_shape_mismatch", None),
        ({"r": [2, 4, 0, 3]}, None, "adapter_config_invalid", "r"),
        ({"r": [2, 4, True, 3]}, None, "adapter_config_invalid", "r"),
        ({"r": 8}, None, "adapter_config_invalid", "r"),
        ({"r": []}, None, "adapter_config_invalid", "r"),
        ({"r": ...}, None, "adapter_config_invalid", "r"),
        ({"lora_alpha": 16}, None, "adapter_config_invalid", "lora_alpha"),
        ({"lora_alpha": [16] * 5}, None, "adapter_config_invalid", "lora_alpha"),
        ({"lora_alpha": [16, 16, 16, "16"]}, None, "adapter_config_invalid", "lora_alpha"),
        ({"lora_alpha": [16, 16, 16, 1e31]}, None, "adapter_config_invalid", "lora_alpha"),
        ({"lora_alpha": [16, 16, 16, 1e-60]}, None, "adapter_config_invalid", "lora_alpha"),
        ({"use_rslora": True}, None, "adapter_unsupported_feature", "use_rslora"),
        ({"bias": "all"}, None, "adapter_unsupported_feature", "bias"),
        ({"modules_to_save": ["lm_head"]}, None, "adapter_unsupported_feature", "modules_to_save"),
        ({"unknown": 1}, None, "adapter_unsupported_feature", "unknown"),
        ({"target_modules": ["q_proj"]}, None, "adapter_unknown_tensor", None),
        ({"target_modules": ["q_proj", "up_proj", "k_proj"]}, None, "adapter_missing_tensor", None),
    ],
)  # fmt: skip
def test_wrong_variants_are_refused(tmp_path, config, spoil, code, field):
    assert_refused(tmp_path, make_config(**config), make_tensors(), spoil, code, field)
