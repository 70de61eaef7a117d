"""VeRA: the lowered form gives the logits that PEFT gives, with the projections in the file or drawn again.

PEFT writes the files of the first tests; those of the others repeat its names.
"""

import json
from copy import deepcopy

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loramux_adapters import AdapterError, lower, open_artefact, prepare
from loramux_adapters.methods.vera import _OWN_FIELDS

from ..checkpoints import BASE, write_adapter
from ..form import site_delta
from ..layouts.vera import RANK, make_config, make_tensors
from .formula import assert_one_adapter
from .refusals import assert_refused, drop, put

CASES = {
    "saved": {},
    "drawn again": {"save_projection": False},
    "another seed": {"save_projection": False, "projection_prng_key": 11},
    "one width": {"target_modules": ["q_proj"], "save_projection": False},
    "all-linear": {"target_modules": "all-linear", "save_projection": False},
    "pattern": {"target_modules": r".*\.1\..*(k|up)_proj", "save_projection": False},
    "one layer": {"layers_to_transform": [0], "save_projection": False},
    "dropout": {"vera_dropout": 0.3, "d_initial": 1.0},
    "rank 1": {"r": 1, "save_projection": False},
    "bfloat16 vectors": {"dtype": torch.bfloat16},
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_logits_are_those_of_peft(options, reference, tmp_path):
    tiny = reference("llama")
    fields = {"r": 8, "target_modules": ["q_proj", "k_proj", "down_proj"]} | options
    dtype = fields.pop("dtype", torch.float32)
    folder = tiny.save_config(tmp_path, peft.VeraConfig(**fields), dtype)
    adapter = lower(folder, tiny.base)
    tiny.assert_same(adapter, tiny.library_logits(folder))
    assert set(adapter.ranks.values()) == {fields["r"]}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("save_projection", [True, False])
def test_logits_are_those_of_peft_on_transposed_layers(save_projection, reference, tmp_path):
    tiny = reference("gpt2")
    config = peft.VeraConfig(r=5, target_modules=["c_attn", "mlp.c_proj"], save_projection=save_projection)
    folder = tiny.save_config(tmp_path, config)
    tiny.assert_same(lower(folder, tiny.base), tiny.library_logits(folder))


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_projections_are_drawn_bit_for_bit(dtype, reference, tmp_path):
    """As PEFT draws them for a base in that dtype."""
    tiny = reference("llama")
    model = deepcopy(tiny.model).to(getattr(torch, dtype))
    config = peft.VeraConfig(r=8, target_modules=["q_proj", "down_proj"], save_projection=False, projection_prng_key=3)
    adapted = peft.get_peft_model(model, config)
    for name, parameter in adapted.named_parameters():
        if "vera_lambda_" in name:
            parameter.data.fill_(1)
    adapted.save_pretrained(tmp_path)
    change_config(tmp_path, projection_dtype=dtype)
    adapter = lower(tmp_path, tiny.base)
    a, b = adapted.base_model.vera_A["default"], adapted.base_model.vera_B["default"]
    for module, site in adapter.sites.items():
        d_in, d_out = tiny.base.linears[module]
        assert torch.equal(site.a.float(), a[:, :d_in].float()) and torch.equal(site.b, b[:d_out].float().T)
    (warning,) = adapter.warnings
    assert f"projection_prng_key 3 as {dtype}" in warning


def change_config(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_every_field_of_the_installed_peft_is_accounted_for():
    """Those beside VeRA's own are LoRA's, with LoRA's meaning."""
    added = set(peft.VeraConfig.__dataclass_fields__) - set(peft.LoraConfig.__dataclass_fields__)
    assert added | {"r", "projection_dtype"} == _OWN_FIELDS


MODULES = [module for module in BASE.linears if module.endswith(("k_proj", "down_proj"))]
SITE = f"base_model.model.{MODULES[0]}"
WIDEST_IN, WIDEST_OUT = 40, 24


@settings(max_examples=20, deadline=None)
@given(rank=st.integers(1, 300), half=st.sampled_from([None, torch.bfloat16, torch.float16]), seed=st.integers(0, 1000))
def test_any_rank_gives_the_dense_delta(tmp_path_factory, rank, half, seed):
    config = make_config(r=rank)
    tensors = make_tensors(config, dtype=half or torch.float32, seed=seed)
    adapter = lower(write_adapter(tmp_path_factory.mktemp("adapter"), config, tensors), BASE)
    a, b = tensors["base_model.vera_A"].double(), tensors["base_model.vera_B"].double()
    for module, site in adapter.sites.items():
        d_in, d_out = BASE.linears[module]
        outer, inner = (tensors[f"base_model.model.{module}.vera_lambda_{side}"].double() for side in "bd")
        # Exact unless a product was rounded to float32.
        close = {"rtol": 1e-12, "atol": 1e-12} if half else {"rtol": 1e-5, "atol": 1e-5}
        x = torch.randn(3, d_in, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        expected = outer * (inner * (x @ a[:, :d_in].T) @ b[:d_out].T)
        torch.testing.assert_close(site_delta(site, {}, x), expected, **close)


def test_all_spellings_mean_the_same(tmp_path):
    tensors = make_tensors()
    assert_one_adapter(
        tmp_path,
        (make_config(), tensors),
        (make_config(), {f"{name}.default": tensor for name, tensor in tensors.items()}),
        (make_config(), {name.removeprefix("base_model.model."): tensor for name, tensor in tensors.items()}),
    )


def test_sites_of_one_width_share_rows_until_they_are_written(tmp_path):
    folder = write_adapter(tmp_path / "adapter", make_config(), make_tensors())
    adapter = lower(folder, BASE)
    pointers = {site.a.data_ptr() for site in adapter.sites.values()}
    assert len(adapter.sites) == 4 and len(pointers) == 2
    opened = open_artefact(prepare(folder, BASE, tmp_path / "cache").path)
    for module, site in adapter.sites.items():
        assert torch.equal(site.a, opened.sites[module].a) and torch.equal(site.b, opened.sites[module].b)


def test_what_is_too_large_when_it_is_lowered_is_refused(tmp_path):
    config = make_config(r=1000)
    folder = write_adapter(tmp_path, config, make_tensors(config))
    nbytes = sum(4 * 1000 * sum(BASE.linears[module]) for module in MODULES)
    lower(folder, BASE, max_bytes=nbytes)
    with pytest.raises(AdapterError) as refusal:
        lower(folder, BASE, max_bytes=nbytes - 1)
    assert refusal.value.code == "adapter_too_large" and "rank 1000" in refusal.value.message


A, B = "base_model.vera_A", "base_model.vera_B"
LAMBDA_B, LAMBDA_D = f"{SITE}.vera_lambda_b", f"{SITE}.vera_lambda_d"
NAN = float("nan")
DRAWN = {"save_projection": False}


@pytest.mark.parametrize(
    ("config", "spoil", "code", "field"),
    [
        ({}, drop(LAMBDA_B), "adapter_missing_tensor", LAMBDA_B),
        ({}, drop(LAMBDA_D), "adapter_missing_tensor", LAMBDA_D),
        ({}, drop(A), "adapter_missing_tensor", A),
        ({}, drop(B), "adapter_missing_tensor", B),
        ({}, put(LAMBDA_B, 13), "adapter_shape_mismatch", LAMBDA_B),
        ({}, put(LAMBDA_B, 12, 1), "adapter_shape_mismatch", LAMBDA_B),
        ({}, put(LAMBDA_D, RANK + 1), "adapter_shape_mismatch", LAMBDA_D),
        ({}, put(A, RANK, WIDEST_IN + 1), "adapter_shape_mismatch", A),
        ({}, put(A, RANK + 1, WIDEST_IN), "adapter_shape_mismatch", A),
        ({}, put(B, WIDEST_OUT, RANK + 1), "adapter_shape_mismatch", B),
        ({}, put(LAMBDA_D, RANK, value=NAN), "adapter_not_finite", f"{MODULES[0]}.scale"),
        ({}, put(LAMBDA_B, 12, value=NAN), "adapter_not_finite", f"{MODULES[0]}.B"),
        ({}, put(A, RANK, WIDEST_IN, value=NAN), "adapter_not_finite", None),
        ({}, put(LAMBDA_B, 12, dtype=torch.float64), "adapter_unsupported_feature", LAMBDA_B),
        ({}, put(f"{SITE}.vera_lambda_c", 1), "adapter_unknown_tensor", f"{SITE}.vera_lambda_c"),
        ({}, put("base_model.vera_C", 1), "adapter_unknown_tensor", "base_model.vera_C"),
        ({}, put(f"{A}.default", RANK, WIDEST_IN), "adapter_unknown_tensor", f"{A}.default"),
        ({"r": 8}, None, "adapter_shape_mismatch", None),
        ({"r": ...}, None, "adapter_config_invalid", "r"),
        (DRAWN, None, "adapter_unknown_tensor", A),
        ({"save_projection": 1}, None, "adapter_config_invalid", "save_projection"),
        ({"projection_prng_key": "0"}, None, "adapter_config_invalid", "projection_prng_key"),
        ({"projection_prng_key": 1 << 64}, None, "adapter_config_invalid", "projection_prng_key"),
        ({"projection_prng_key": None}, None, "adapter_config_invalid", "projection_prng_key"),
        ({"projection_dtype": "float32"}, None, "adapter_config_invalid", "projection_dtype"),
        (DRAWN | {"projection_dtype": "int8"}, drop(A, B), "adapter_config_invalid", "projection_dtype"),
        (DRAWN | {"projection_dtype": []}, drop(A, B), "adapter_config_invalid", "projection_dtype"),
        ({"lora_alpha": 16}, None, "adapter_unsupported_feature", "lora_alpha"),
        ({"rank_pattern": {"k_proj": 3}}, None, "adapter_unsupported_feature", "rank_pattern"),
        ({"exclude_modules": ["q_proj"]}, None, "adapter_unsupported_feature", "exclude_modules"),
        ({"bias": "vera_only"}, None, "adapter_unsupported_feature", "bias"),
        ({"modules_to_save": ["lm_head"]}, None, "adapter_unsupported_feature", "modules_to_save"),
        ({"unknown": 1}, None, "adapter_unsupported_feature", "unknown"),
        ({"target_modules": ["k_proj", "down_proj", "up_proj"]}, None, "adapter_missing_tensor", None),
        ({"target_modules": ["k_proj"]}, None, "adapter_unknown_tensor", None),
    ],
)  # fmt: skip
def test_wrong_variants_are_refused(tmp_path, config, spoil, code, field):
    assert_refused(tmp_path, make_config(**config), make_tensors(), spoil, code, field)


def test_another_base_is_recognised(tmp_path):
    tensors = {name: torch.ones([2 * n if n != RANK else n for n in t.shape]) for name, t in make_tensors().items()}
    with pytest.raises(AdapterError) as refusal:
        lower(write_adapter(tmp_path, make_config(), tensors), BASE)
    assert refusal.value.code == "adapter_wrong_base"
