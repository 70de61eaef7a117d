"""ScalaBL: mean and draws are the formula's; V and B are kept as they are."""

import numpy as np
import pytest
import torch

from loramux_adapters import lower

from ..checkpoints import BASE, write_adapter
from ..layouts.draw import PREFIX
from ..layouts.scalabl import make_config, make_tensors
from .refusals import assert_refused, drop, poison, put
from .sampled import assert_sampled, matrix

Q = "model.layers.0.self_attn.q_proj"
SITE = f"{PREFIX}{Q}.lora_A.default"


@pytest.mark.parametrize("alpha", [8, -3])
def test_mean_and_draws_are_the_formula_s(alpha, reference, tmp_path):
    tiny = reference("llama")
    config = make_config(lora_alpha=alpha)
    tensors = make_tensors(config, tiny.base)
    scale = alpha / config["r"]

    def weight(module, numbers):
        place = f"{PREFIX}{module}.lora_A.default"
        v, b = matrix(tensors, f"{place}.Vh"), matrix(tensors, f"{PREFIX}{module}.lora_B.default.weight")
        e = np.exp(matrix(tensors, f"{place}.log_s"))
        if numbers is not None:
            # The deviation is of scale · e, so a negative scale turns its sign.
            z = np.sign(scale) * numbers.normals(module, "scale", 1, len(e))[0]
            e = e + np.exp(matrix(tensors, f"{place}.log_s_sigma")) * z
        return scale * b @ np.diag(e) @ v

    assert assert_sampled(tmp_path, config, tensors, tiny, weight).posterior == "rank_diagonal"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_factors_are_not_rounded(dtype, tmp_path):
    tensors = make_tensors(dtype=dtype)
    site = lower(write_adapter(tmp_path, make_config(), tensors), BASE).sites[Q]
    assert torch.equal(site.a, tensors[f"{SITE}.Vh"]) and site.scale.dtype == torch.float32
    assert torch.equal(site.b, tensors[f"{PREFIX}{Q}.lora_B.default.weight"].T)


@pytest.mark.parametrize(
    ("spoil", "code", "field"),
    [
        (drop(f"{SITE}.log_s"), "adapter_missing_tensor", f"{PREFIX}{Q}.lora_A.log_s"),
        (drop(f"{SITE}.log_s_sigma"), "adapter_missing_tensor", f"{PREFIX}{Q}.lora_A.log_s_sigma"),
        (drop(f"{SITE}.log_p_mu", f"{SITE}.log_p_sigma"), None, None),
        (put(f"{SITE}.log_s_sigma", 4, 24), "adapter_shape_mismatch", f"{SITE}.log_s_sigma"),
        (poison(f"{SITE}.log_s_sigma"), "adapter_not_finite", f"{Q}.variance.sigma_scale"),
        (put(f"{SITE}.log_s_sigma", 4, value=200.0), "adapter_not_finite", f"{Q}.variance.sigma_scale"),
        (put(f"{SITE}.log_s", 4, value=200.0), "adapter_not_finite", f"{Q}.scale"),
        (put(f"{SITE}.weight", 4, 24), "adapter_unknown_tensor", f"{SITE}.weight"),
    ],
)
def test_refusals(spoil, code, field, tmp_path):
    tensors = make_tensors()
    if code is None:
        spoil(tensors)
        lower(write_adapter(tmp_path, make_config(), tensors), BASE)
        return
    assert_refused(tmp_path, make_config(), tensors, spoil, code, field)
