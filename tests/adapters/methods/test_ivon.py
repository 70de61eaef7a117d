"""IVON: mean and draws are the formula's, from a vector taken apart as the method's docstring says."""

import numpy as np
import pytest
import torch

from ..layouts.draw import PREFIX, given
from ..layouts.ivon import make_config, make_tensors
from .refusals import assert_refused, drop, poison, put
from .sampled import assert_sampled, matrix

SITE = f"{PREFIX}model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(("ess", "weight_decay"), [(1e3, 1e-3), (40, 0)])
def test_mean_and_draws_are_the_formula_s(ess, weight_decay, reference, tmp_path):
    tiny = reference("llama")
    config = make_config(ess=ess, weight_decay=weight_decay)
    tensors = make_tensors(config, tiny.base)

    def weight(module, numbers):
        a, b = (matrix(tensors, f"{PREFIX}{module}.lora_{factor}.weight") for factor in "AB")
        if numbers is not None:
            for factor, name in ((a, "a"), (b, "b")):
                hess = matrix(tensors, f"{PREFIX}{module}.lora_{name.upper()}.hess")
                # b's numbers are those of Bᵀ, which is how it is kept.
                z = numbers.normals(module, name, *(factor.shape if name == "a" else factor.T.shape))
                factor += (z if name == "a" else z.T) / np.sqrt(ess * (hess + weight_decay))
        return config["lora_alpha"] / config["r"] * b @ a

    assert assert_sampled(tmp_path, config, tensors, tiny, weight).posterior == "diagonal_ab"


def test_the_docstring_s_lines_take_the_optimiser_apart():
    """The optimiser's vector has all numbers in the order of the parameters that it was given."""
    from loramux_adapters.methods import ivon

    lines = [line[4:] for line in ivon.__doc__.splitlines() if line.startswith("    ")]
    begin = next(i for i, line in enumerate(lines) if line.startswith("group, begin"))
    model = torch.nn.ModuleDict({"q": torch.nn.ModuleDict({})})
    for factor, shape in (("lora_A", (3, 2)), ("lora_B", (2, 5))):
        model["q"][factor] = torch.nn.ModuleDict({"default": torch.nn.Linear(*shape, bias=False)})
    model["q"]["frozen"] = torch.nn.Linear(4, 4).requires_grad_(False)

    class optimizer:
        param_groups = ({"hess": torch.arange(16.0)},)

    tensors = {}
    exec("\n".join(lines[begin : begin + 6]), {"optimizer": optimizer, "model": model, "tensors": tensors})
    assert tensors.keys() == {"q.lora_A.hess", "q.lora_B.hess"}
    assert torch.equal(tensors["q.lora_A.hess"], torch.arange(6.0).view(2, 3))
    assert torch.equal(tensors["q.lora_B.hess"], torch.arange(6.0, 16.0).view(5, 2))


A, B = f"{SITE}.lora_A.hess", f"{SITE}.lora_B.hess"


@pytest.mark.parametrize(
    ("config", "spoil", "code", "field"),
    [
        ({}, drop(A), "adapter_missing_tensor", A),
        ({}, drop(B), "adapter_missing_tensor", B),
        ({}, put(B, 4, 24), "adapter_shape_mismatch", B),
        ({}, put(A, 96), "adapter_shape_mismatch", A),
        ({}, poison(A), "adapter_not_finite", None),
        ({}, put(A, 4, 24, value=-1.0), "adapter_config_invalid", A),
        ({}, put(B, 24, 4, value=-1e-3), "adapter_config_invalid", B),
        ({"ess": ...}, None, "adapter_config_invalid", "ess"),
        ({"ess": float("1e31")}, None, "adapter_config_invalid", "ess"),
        ({"weight_decay": ...}, None, "adapter_config_invalid", "weight_decay"),
        ({"weight_decay": -1e-6}, None, "adapter_config_invalid", "weight_decay"),
    ],
)
def test_refusals(config, spoil, code, field, tmp_path):
    assert_refused(tmp_path, given(**make_config(**config)), make_tensors(), spoil, code, field)
