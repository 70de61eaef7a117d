"""AdaLoRA: the lowered form gives the logits that PEFT gives, pruned or not; what cannot be applied is refused.

PEFT writes the files of the first test; those of the others repeat its names.
"""

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loramux_adapters import AdapterError, lower
from loramux_adapters.methods.adalora import _OWN_FIELDS

from ..checkpoints import BASE, write_adapter
from ..form import site_delta
from ..layouts.adalora import INIT_R, make_config, make_tensors
from .formula import assert_one_adapter
from .refusals import assert_refused, drop, put

MODULES = [module for module in BASE.linears if module.endswith(("q_proj", "down_proj"))]
SITE = f"base_model.model.{MODULES[0]}"


def flags(*left):
    return [rank in left for rank in range(INIT_R)]


def pattern(*by_module):
    """rank_pattern for q_proj and down_proj of two layers."""
    modules = ("0.self_attn.q_proj", "0.mlp.down_proj", "1.self_attn.q_proj", "1.mlp.down_proj")
    return {f"model.layers.{module}.lora_E": left for module, left in zip(modules, by_module, strict=True)}


PRUNED = pattern(flags(0, 2, 5), flags(), flags(*range(INIT_R)), flags(4))
CASES = {
    "whole": {},
    "rank_pattern": {"rank_pattern": PRUNED},
    "alpha": {"lora_alpha": 32, "rank_pattern": PRUNED},
    "alpha 0": {"lora_alpha": 0},
    "alpha 0, rank_pattern": {"lora_alpha": 0, "rank_pattern": PRUNED},
    "negative alpha, rank_pattern": {"lora_alpha": -4, "rank_pattern": PRUNED},
    "r is not read": {"r": 3},
    "exclude_modules": {"target_modules": "all-linear", "exclude_modules": ["k_proj", "mlp.up_proj"]},
    "layers_to_transform": {"layers_to_transform": [1]},
    "bfloat16": {"dtype": torch.bfloat16},
    "float16": {"dtype": torch.float16, "rank_pattern": PRUNED},
    "rank above a width": {"init_r": 70},
}


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning")
@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_logits_are_those_of_peft(options, reference, tmp_path):
    tiny = reference("llama")
    fields = {"init_r": INIT_R, "target_r": 3, "total_step": 10, "target_modules": ["q_proj", "down_proj"]} | options
    dtype = fields.pop("dtype", torch.float32)
    folder = tiny.save_config(tmp_path, peft.AdaLoraConfig(**fields), dtype)
    adapter = lower(folder, tiny.base)
    tiny.assert_same(adapter, tiny.library_logits(folder))
    if "rank_pattern" in options:
        assert adapter.ranks == {key.removesuffix(".lora_E"): sum(left) for key, left in PRUNED.items() if any(left)}
        assert all(site.a.dtype == site.b.dtype == dtype for site in adapter.sites.values())


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning")
def test_logits_are_those_of_peft_on_transposed_layers(reference, tmp_path):
    tiny = reference("gpt2")
    config = peft.AdaLoraConfig(init_r=4, target_r=2, total_step=10, target_modules=["c_attn", "mlp.c_proj"])
    folder = tiny.save_config(tmp_path, config)
    tiny.assert_same(lower(folder, tiny.base), tiny.library_logits(folder))


def test_every_field_of_the_installed_peft_is_accounted_for():
    added = set(peft.AdaLoraConfig.__dataclass_fields__) - set(peft.LoraConfig.__dataclass_fields__)
    assert added | {"rank_pattern", "r"} == _OWN_FIELDS


@settings(max_examples=20, deadline=None)
@given(
    left=st.lists(st.lists(st.booleans(), min_size=INIT_R, max_size=INIT_R), min_size=4, max_size=4).filter(
        lambda left: any(map(any, left))
    ),
    alpha=st.sampled_from([-1, 0, 0.5, 3, 64]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    seed=st.integers(0, 1000),
)
def test_the_divisor_stays_the_initial_rank(tmp_path_factory, left, alpha, dtype, seed):
    ranks = {module: sum(flags) for module, flags in zip(MODULES, left, strict=True)}
    rank_pattern = {f"{module}.lora_E": flags for module, flags in zip(MODULES, left, strict=True)}
    config = make_config(rank_pattern=rank_pattern, lora_alpha=alpha)
    tensors = make_tensors(config, dtype=dtype, seed=seed)
    adapter = lower(write_adapter(tmp_path_factory.mktemp("adapter"), config, tensors), BASE)
    assert adapter.ranks == {module: rank for module, rank in ranks.items() if rank}
    for module, site in adapter.sites.items():
        a, e, b = (tensors[f"base_model.model.{module}.lora_{name}"].double() for name in "AEB")
        scale = (alpha if alpha > 0 else ranks[module]) / (INIT_R + 1e-5)
        x = torch.randn(3, a.shape[1], dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        expected = scale * (x @ a.T * e[:, 0]) @ b.T
        # scale · E is rounded to float32 once, and so is scale: twice half a unit in the last place of every term.
        terms = abs(scale) * (x.abs() @ a.abs().T * e[:, 0].abs()) @ b.abs().T
        assert ((site_delta(site, {}, x) - expected).abs() <= 2 * 2**-24 * terms).all()


def test_all_spellings_mean_the_same(tmp_path):
    rank_pattern = {f"{module}.lora_E": [True] * INIT_R for module in MODULES}
    tensors = make_tensors()
    named = {f"{key}.default": left for key, left in rank_pattern.items()}
    assert_one_adapter(
        tmp_path,
        (make_config(rank_pattern=rank_pattern), tensors),
        (make_config(rank_pattern=named), {f"{name}.default": tensor for name, tensor in tensors.items()}),
        (make_config(), {name.removeprefix("base_model.model."): tensor for name, tensor in tensors.items()}),
    )


def test_nothing_left_anywhere_has_no_effect(tmp_path):
    config = make_config(rank_pattern={f"{module}.lora_E": flags() for module in MODULES})
    with pytest.raises(AdapterError) as refusal:
        lower(write_adapter(tmp_path, config, make_tensors(config)), BASE)
    assert refusal.value.code == "adapter_no_effect"


KEY = f"{MODULES[0]}.lora_E"


@pytest.mark.parametrize(
    ("config", "spoil", "code", "field"),
    [
        ({}, drop(f"{SITE}.lora_E"), "adapter_missing_tensor", f"{SITE}.lora_E"),
        ({}, drop(f"{SITE}.lora_A"), "adapter_missing_tensor", f"{SITE}.lora_A"),
        ({}, drop(f"{SITE}.lora_B"), "adapter_missing_tensor", f"{SITE}.lora_B"),
        ({}, put(f"{SITE}.lora_E", INIT_R), "adapter_shape_mismatch", f"{SITE}.lora_E"),
        ({}, put(f"{SITE}.lora_E", INIT_R + 1, 1), "adapter_shape_mismatch", f"{SITE}.lora_E"),
        ({}, put(f"{SITE}.lora_A", INIT_R, 23), "adapter_shape_mismatch", f"{SITE}.lora_A"),
        ({}, put(f"{SITE}.lora_E", INIT_R, 1, value=float("nan")), "adapter_not_finite", f"{MODULES[0]}.scale"),
        ({}, put(f"{SITE}.lora_E", INIT_R, 1, dtype=torch.float64), "adapter_unsupported_feature", f"{SITE}.lora_E"),
        ({}, put(f"{SITE}.ranknum", 1), "adapter_unknown_tensor", f"{SITE}.ranknum"),
        ({}, put(f"{SITE}.lora_A.weight", INIT_R, 24), "adapter_unknown_tensor", f"{SITE}.lora_A.weight"),
        ({}, put(f"{SITE}.lora_A.default", INIT_R, 24), "adapter_unknown_tensor", f"{SITE}.lora_A.default"),
        ({"init_r": 8}, None, "adapter_shape_mismatch", None),
        ({"init_r": ...}, None, "adapter_config_invalid", "init_r"),
        ({"init_r": True}, None, "adapter_config_invalid", "init_r"),
        ({"rank_pattern": {KEY: flags(0, 1)}}, None, "adapter_shape_mismatch", f"{SITE}.lora_A"),
        ({"rank_pattern": {KEY: [True] * 3}}, None, "adapter_config_invalid", "rank_pattern"),
        ({"rank_pattern": {KEY: [1] * INIT_R}}, None, "adapter_config_invalid", "rank_pattern"),
        ({"rank_pattern": {KEY: 6}}, None, "adapter_config_invalid", "rank_pattern"),
        ({"rank_pattern": [KEY]}, None, "adapter_config_invalid", "rank_pattern"),
        ({"rank_pattern": {"q_proj": 3}}, None, "adapter_config_invalid", "rank_pattern"),
        ({"rank_pattern": {"x.lora_E": [True] * INIT_R}}, None, "adapter_config_invalid", "rank_pattern"),
        ({"rank_pattern": dict.fromkeys((KEY, f"{KEY}.default"), flags())}, None, "adapter_config_invalid", None),
        ({"use_rslora": True}, None, "adapter_unsupported_feature", "use_rslora"),
        ({"alpha_pattern": {"q_proj": 3}}, None, "adapter_unsupported_feature", "alpha_pattern"),
        ({"lora_bias": True}, None, "adapter_unsupported_feature", "lora_bias"),
        ({"use_dora": True}, None, "adapter_unsupported_feature", "use_dora"),
        ({"bias": "lora_only"}, None, "adapter_unsupported_feature", "bias"),
        ({"unknown": 1}, None, "adapter_unsupported_feature", "unknown"),
        ({"target_modules": ["q_proj"]}, None, "adapter_unknown_tensor", None),
    ],
)  # fmt: skip
def test_wrong_variants_are_refused(tmp_path, config, spoil, code, field):
    assert_refused(tmp_path, make_config(**config), make_tensors(), spoil, code, field)
