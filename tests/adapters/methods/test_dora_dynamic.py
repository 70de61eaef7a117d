"""DoRA with dynamic rank: the lowered form gives the logits of the authors' layer, written with plain hooks."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from loramux_adapters import AdapterError, lower

from ..checkpoints import BASE, write_adapter
from ..layouts.dora_dynamic import START, delta, make_config, make_tensors
from ..layouts.draw import targeted
from .formula import assert_logits, assert_one_adapter, assert_sites
from .refusals import assert_refused, drop, put

MODULES = targeted(make_config(), BASE)
SITE = f"model.{MODULES[0]}"


@pytest.mark.parametrize("masks", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_are_those_of_the_formula(dtype, masks, reference, tmp_path):
    tiny = reference("llama")
    config = make_config()
    tensors = make_tensors(config, tiny.base, dtype, masks=masks)
    adapter = lower(write_adapter(tmp_path, config, tensors), tiny.base)
    assert_logits(tiny, adapter, delta, config, tensors)
    assert len(set(adapter.ranks.values())) == len(adapter.sites) == len(targeted(config, tiny.base)) - 1


def test_pruned_ranks_are_gone(tmp_path):
    tensors = make_tensors()
    masked = lower(write_adapter(tmp_path / "masked", make_config(), tensors), BASE)
    assert [masked.ranks.get(module) for module in MODULES] == [5, 4, 3, None]
    bare = {name: tensor for name, tensor in tensors.items() if "mask" not in name}
    zeros = lower(write_adapter(tmp_path / "zeros", make_config(), bare), BASE)
    assert [zeros.ranks.get(module) for module in MODULES] == [6, 5, 4, None]
    assert masked.warnings == () and "4 modules have no mask" in zeros.warnings[0]


@settings(max_examples=20, deadline=None)
@given(
    keep=st.lists(st.lists(st.booleans(), min_size=START, max_size=START), min_size=4, max_size=4).filter(
        lambda keep: any(map(any, keep))
    ),
    alpha=st.floats(-64, 64).filter(lambda alpha: abs(alpha) > 1e-3),
    seed=st.integers(0, 1000),
)
def test_any_mask_gives_the_dense_delta(tmp_path_factory, keep, alpha, seed):
    tensors = make_tensors(seed=seed, masks=False)
    for module, kept in zip(MODULES, keep, strict=True):
        tensors[f"model.{module}.lora_scaler"] = torch.randn(START, generator=torch.Generator().manual_seed(seed))
        tensors[f"finally_mask_dict.{module}"] = 1 - torch.tensor(kept).float()
    config = make_config(lora_alpha=alpha)
    folder = write_adapter(tmp_path_factory.mktemp("adapter"), config, tensors)
    adapter = lower(folder, BASE)
    assert adapter.ranks == {module: sum(kept) for module, kept in zip(MODULES, keep, strict=True) if any(kept)}
    assert_sites(adapter, delta, config, tensors, seed=seed)


def test_the_wrappers_prefix_may_be_missing(tmp_path):
    tensors = make_tensors()
    bare = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    assert_one_adapter(tmp_path, (make_config(), tensors), (make_config(), bare))


def test_the_command_of_the_hint_extracts_the_adapter(tmp_path, monkeypatch):
    """From a checkpoint of the authors' code: all of the model, and the mask in a pickle."""
    tensors = make_tensors()
    adapter = {name: tensor for name, tensor in tensors.items() if "lora_" in name}
    masks = {
        name.removeprefix("finally_mask_dict."): tensor.bool() for name, tensor in tensors.items() if "mask" in name
    }
    whole = adapter | {f"{SITE}.linear.weight": torch.ones(24, 24), "model.lm_head.weight": torch.ones(3, 24)}
    save_file(whole, tmp_path / "model.safetensors")
    torch.save({"sensitivity_score_dict": {}, "finally_mask_dict": masks}, tmp_path / "prune_state_dict.pt")
    (tmp_path / "adapter_config.json").write_text(json.dumps(make_config()))

    save_file(whole, tmp_path / "adapter_model.safetensors")
    with pytest.raises(AdapterError) as refusal:
        lower(tmp_path, BASE)
    assert refusal.value.code == "adapter_unsupported_feature"
    save_file(adapter, tmp_path / "adapter_model.safetensors")
    with pytest.raises(AdapterError) as refusal:
        lower(tmp_path, BASE)
    assert (refusal.value.code, refusal.value.field) == ("adapter_unsafe_file", "prune_state_dict.pt")

    monkeypatch.chdir(tmp_path)
    command = refusal.value.hint.partition('python -c "')[2].removesuffix('"')
    exec(command, {})
    extracted = load_file(tmp_path / "adapter_model.safetensors")
    assert extracted.keys() == tensors.keys()
    assert len(lower(tmp_path, BASE).sites) == 3


def spoil_pruned_row(tensors):
    tensors[f"model.{MODULES[1]}.lora_a_linear.weight"][0, 0] = float("inf")


A, C, B = f"{SITE}.lora_a_linear.weight", f"{SITE}.lora_scaler", f"{SITE}.lora_b_linear.weight"
MASK = f"finally_mask_dict.{MODULES[0]}"


@pytest.mark.parametrize(
    ("config", "spoil", "code", "field"),
    [
        ({}, drop(A), "adapter_missing_tensor", f"{MODULES[0]}.lora_a_linear.weight"),
        ({}, drop(C), "adapter_missing_tensor", f"{MODULES[0]}.lora_scaler"),
        ({}, drop(B), "adapter_missing_tensor", f"{MODULES[0]}.lora_b_linear.weight"),
        ({}, put(C, START, 1), "adapter_shape_mismatch", C),
        ({}, put(C, START - 1), "adapter_shape_mismatch", C),
        ({}, put(A, START, 23), "adapter_shape_mismatch", A),
        ({}, put(MASK, START - 1), "adapter_shape_mismatch", MASK),
        ({}, put(MASK, START, value=0.5), "adapter_config_invalid", MASK),
        ({}, put(MASK, START, dtype=torch.bool), "adapter_unsupported_feature", MASK),
        ({}, put(f"finally_mask_dict.{MODULES[0]}x", START), "adapter_missing_tensor", None),
        ({}, put(C, START, value=float("nan")), "adapter_not_finite", f"{MODULES[0]}.scale"),
        ({}, spoil_pruned_row, "adapter_not_finite", f"{MODULES[1]}.A"),
        ({}, put(f"{SITE}.linear.weight", 24, 24), "adapter_unsupported_feature", f"{SITE}.linear.weight"),
        ({}, put(f"{SITE}.lora_scaling", START), "adapter_unknown_tensor", f"{SITE}.lora_scaling"),
        ({}, put(f"{MODULES[0]}.lora_scaler", START), "adapter_unknown_tensor", None),
        ({"adaptive_lora_start_rank": 8}, None, "adapter_shape_mismatch", None),
        ({"adaptive_lora_start_rank": ...}, None, "adapter_config_invalid", "adaptive_lora_start_rank"),
        ({"adaptive_lora_start_rank": "12"}, None, "adapter_config_invalid", "adaptive_lora_start_rank"),
        ({"r": 4}, None, "adapter_unsupported_feature", "r"),
        ({"lora_alpha": ...}, None, "adapter_config_invalid", "lora_alpha"),
        ({"use_rslora": True}, None, "adapter_unsupported_feature", "use_rslora"),
        ({"rank_pattern": {"q_proj": 2}}, None, "adapter_unsupported_feature", "rank_pattern"),
        ({"fixed_lora_rank": 4}, None, "adapter_unsupported_feature", "fixed_lora_rank"),
        ({"target_modules": ["q_proj"]}, None, "adapter_unknown_tensor", None),
    ],
)  # fmt: skip
def test_wrong_variants_are_refused(tmp_path, config, spoil, code, field):
    assert_refused(tmp_path, make_config(**config), make_tensors(), spoil, code, field)


def test_everything_pruned_has_no_effect(tmp_path):
    tensors = {name: t * ("scaler" not in name) for name, t in make_tensors().items()}
    with pytest.raises(AdapterError) as refusal:
        lower(write_adapter(tmp_path, make_config(), tensors), BASE)
    assert refusal.value.code == "adapter_no_effect"
