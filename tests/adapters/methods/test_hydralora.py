"""HydraLoRA's own layout: what is lowered equals the formula with A stored once; the rest is refused by name."""

import pytest
import torch

from loramux_adapters import lower

from ..checkpoints import BASE, write_adapter
from ..form import site_delta
from ..layouts.hydralora import ALPHA, NUMBER, RANK, delta, make_config, make_tensors
from .formula import EXACT, assert_one_adapter, assert_sites
from .refusals import assert_refused, drop, put

MODULES = [module for module in BASE.linears if module.endswith(("up_proj", "down_proj"))]
SITE = "base_model.model.model.layers.0.mlp.up_proj"
ROUTER = f"{SITE}.lora_route.weight"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_site_computes_the_formula(tmp_path, dtype):
    tensors = make_tensors(dtype=dtype)
    adapter = lower(write_adapter(tmp_path, make_config(), tensors), BASE)
    assert adapter.method == "hydralora" and set(adapter.sites) == set(MODULES)
    for module, site in adapter.sites.items():
        d_in, d_out = BASE.linears[module]
        assert site.a.shape == (RANK, d_in) and site.b.shape == (NUMBER * RANK, d_out)
    assert_sites(adapter, delta, make_config(), tensors, EXACT)


def test_the_prefix_may_be_missing(tmp_path):
    tensors = make_tensors()
    bare = {name.removeprefix("base_model.model."): tensor for name, tensor in tensors.items()}
    assert_one_adapter(tmp_path, (make_config(), tensors), (make_config(), bare))


def test_one_head_is_served(tmp_path):
    tensors = {
        name: tensor for name, tensor in make_tensors().items() if "lora_B1" not in name and "lora_B2" not in name
    }
    tensors |= {name: tensor[:1].clone() for name, tensor in tensors.items() if "lora_route" in name}
    adapter = lower(write_adapter(tmp_path, make_config(lora_nums=1), tensors), BASE)
    module = MODULES[0]
    x = torch.randn(5, BASE.linears[module][0])
    place = f"base_model.model.{module}"
    plain = (
        ALPHA
        / RANK
        * x.double()
        @ (tensors[f"{place}.lora_B0.weight"].double() @ tensors[f"{place}.lora_A.weight"].double()).T
    )
    torch.testing.assert_close(site_delta(adapter.sites[module], adapter.gates, x), plain)


@pytest.mark.parametrize(
    ("config", "spoil", "code", "field"),
    [
        ({}, drop(ROUTER), "adapter_missing_tensor", ROUTER),
        ({}, drop(f"{SITE}.lora_A.weight"), "adapter_missing_tensor", f"{SITE}.lora_A.weight"),
        ({}, drop(f"{SITE}.lora_B1.weight"), "adapter_missing_tensor", f"{SITE}.lora_B1.weight"),
        ({"lora_nums": 4}, None, "adapter_missing_tensor", None),
        ({"lora_nums": 2}, None, "adapter_unknown_tensor", None),
        ({"lora_nums": "3"}, None, "adapter_config_invalid", "lora_nums"),
        ({"r": 8}, None, "adapter_shape_mismatch", None),
        ({"r": None}, None, "adapter_config_invalid", "r"),
        ({}, put(ROUTER, NUMBER, 40), "adapter_shape_mismatch", ROUTER),
        ({}, put(ROUTER, NUMBER + 1, 24), "adapter_shape_mismatch", ROUTER),
        ({}, put(f"{SITE}.lora_A0.weight", RANK, 24), "adapter_unknown_tensor", f"{SITE}.lora_A0.weight"),
        ({}, put(f"{SITE}.lora_B00.weight", 40, RANK), "adapter_unknown_tensor", f"{SITE}.lora_B00.weight"),
        ({}, put(f"{SITE}.lora_B.weight", 40, RANK), "adapter_unknown_tensor", f"{SITE}.lora_B.weight"),
        ({}, put(f"{SITE}.lora_B2.weight", 40, RANK + 1), "adapter_shape_mismatch", f"{SITE}.lora_B2.weight"),
        ({"enable_lora": [True, False]}, None, "adapter_unsupported_feature", "enable_lora"),
        ({"use_rslora": True}, None, "adapter_unsupported_feature", "use_rslora"),
        ({"bias": "lora_only"}, None, "adapter_unsupported_feature", "bias"),
        ({"modules_to_save": ["lm_head"]}, None, "adapter_unsupported_feature", "modules_to_save"),
        ({"top_k": 2}, None, "adapter_unsupported_feature", "top_k"),
    ],
)
def test_wrong_variants_are_refused(tmp_path, config, spoil, code, field):
    assert_refused(tmp_path, make_config(**config), make_tensors(), spoil, code, field)
