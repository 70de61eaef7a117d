"""DoRA with dynamic rank: the lowered form gives the logits of the authors' layer, written here with plain hooks.

The names are those of `Adaptive_Lora_Linear` in MIkumikumi0116/DoRA at 235e21f (`Finetune_Utils.py`), with the prefix
of its `Model_Wrapper_Base`, whose attribute `model` is the whole model; the mask is `finally_mask_dict` of its
`prune_state_dict.pt`, by names without that prefix.
"""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from loramux_adapters import AdapterError, lower
from loramux_adapters.artefact import digest_of
from loramux_adapters.files import AdapterFolder
from loramux_adapters.methods import METHODS

from ..checkpoints import BASE, write_adapter
from ..form import site_delta
from ..hooks import hooked_logits
from .refusals import assert_refused, drop, put

START = 6
TARGETS = ("q_proj", "down_proj")


def modules_of(base):
    return [module for module in base.linears if module.endswith(TARGETS)]


MODULES = modules_of(BASE)
SITE = f"model.{MODULES[0]}"


def make_config(**changes):
    config = {
        "peft_type": "ADAPTIVE_LORA",
        "adaptive_lora_start_rank": START,
        "adaptive_lora_end_avg_rank": 4,
        "lora_alpha": 8,
        "lora_dropout": 0.1,
        "target_modules": list(TARGETS),
        "base_model_name_or_path": "somebody/tiny",
    } | changes
    return {name: value for name, value in config.items() if value is not ...}


def make_tensors(base=BASE, dtype=torch.float32, seed=0, masks=True):
    """Of every module some scalers are 0, and of the last one all; the mask names them and one more."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    modules = modules_of(base)
    for place, module in enumerate(modules):
        d_in, d_out = base.linears[module]
        a, b = (torch.randn(shape, generator=generator).to(dtype) for shape in ((START, d_in), (d_out, START)))
        c = torch.randn(START, generator=generator)
        pruned = torch.arange(START) < (START if module == modules[-1] else place)
        c[pruned] = 0
        tensors[f"model.{module}.lora_a_linear.weight"] = a
        tensors[f"model.{module}.lora_scaler"] = c.to(dtype)
        tensors[f"model.{module}.lora_b_linear.weight"] = b
        if masks:
            tensors[f"finally_mask_dict.{module}"] = (pruned | (torch.arange(START) == START - 1)).float()
    return tensors


def deltas(base, tensors, alpha=8):
    """dropout off; a_linear, times the scaler, b_linear, times alpha / start rank. The mask sets the scaler to 0."""
    found = {}
    for module in modules_of(base):
        a, c, b = (
            tensors[f"model.{module}.{name}"].double()
            for name in ("lora_a_linear.weight", "lora_scaler", "lora_b_linear.weight")
        )
        mask = tensors.get(f"finally_mask_dict.{module}")
        if mask is not None:
            c = c.masked_fill(mask.bool(), 0)

        def delta(x, a=a, c=c, b=b):
            hidden = torch.nn.functional.linear(x.double(), a) * c
            return torch.nn.functional.linear(hidden, b) * (alpha / a.shape[0])

        found[module] = delta
    return found


@pytest.mark.parametrize("masks", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_are_those_of_the_formula(dtype, masks, reference, tmp_path):
    tiny = reference("llama")
    tensors = make_tensors(tiny.base, dtype, masks=masks)
    adapter = lower(write_adapter(tmp_path, make_config(), tensors), tiny.base)
    tiny.assert_same(adapter, hooked_logits(tiny.model, deltas(tiny.base, tensors), tiny.tokens))
    assert len(set(adapter.ranks.values())) == len(adapter.sites) == len(modules_of(tiny.base)) - 1


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
    folder = write_adapter(tmp_path_factory.mktemp("adapter"), make_config(lora_alpha=alpha), tensors)
    adapter = lower(folder, BASE)
    assert adapter.ranks == {module: sum(kept) for module, kept in zip(MODULES, keep, strict=True) if any(kept)}
    for module, site in adapter.sites.items():
        x = torch.randn(3, BASE.linears[module][0], generator=torch.Generator().manual_seed(seed))
        expected = deltas(BASE, tensors, alpha)[module](x)
        torch.testing.assert_close(site_delta(site, {}, x), expected, rtol=1e-6, atol=1e-5 * abs(alpha))


def test_exactly_one_method_claims_the_folder(tmp_path):
    folder = AdapterFolder(write_adapter(tmp_path, make_config(), make_tensors()))
    assert [method.name for method in METHODS if method.detect(folder)] == ["dora_dynamic"]


def test_the_wrappers_prefix_may_be_missing(tmp_path):
    tensors = make_tensors()
    bare = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    digests = {
        digest_of(lower(write_adapter(tmp_path / name, make_config(), content), BASE))
        for name, content in (("full", tensors), ("bare", bare))
    }
    assert len(digests) == 1


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
        ({"lora_alpha": 1e-60}, None, "adapter_config_invalid", "lora_alpha"),
    ],
)  # fmt: skip
def test_wrong_variants_are_refused(tmp_path, config, spoil, code, field):
    assert_refused(tmp_path, make_config(**config), make_tensors(), spoil, code, field)


def test_everything_pruned_has_no_effect(tmp_path):
    tensors = {name: t * ("scaler" not in name) for name, t in make_tensors().items()}
    with pytest.raises(AdapterError) as refusal:
        lower(write_adapter(tmp_path, make_config(), tensors), BASE)
    assert refusal.value.code == "adapter_no_effect"
