"""ABMLL: the mean is the LoRA of μ, draws are S ⊙ ε with ε of random signs' products, from the formula."""

import numpy as np
import pytest

from loramux_adapters import AdapterError, draw, lower

from ..checkpoints import BASE, write_adapter
from ..layouts.abmll import SIGMA_RANK, make_config, make_tensors
from ..layouts.draw import PREFIX
from ..posterior.reference import SKETCHES
from .refusals import assert_refused, drop, poison, put
from .sampled import assert_sampled, matrix

Q = "model.layers.0.self_attn.q_proj"
SITE = PREFIX + Q


@pytest.mark.parametrize("changes", [{}, {"sigma_rank": None}, {"sigma_offset": 0}, {"sigma_offset": -0.02}])
def test_mean_and_draws_are_the_formula_s(changes, reference, tmp_path):
    tiny = reference("llama")
    config = make_config(**changes)
    tensors = make_tensors(config, tiny.base)

    def weight(module, numbers):
        parts = (f"{PREFIX}{module}.lora_{name}.weight" for name in ("A", "B", "A_sigma", "B_sigma"))
        a, b, sigma_a, sigma_b = (matrix(tensors, name) for name in parts)
        mean = config["lora_alpha"] / config["r"] * b @ a
        if numbers is None:
            return mean
        epsilon = sum(
            np.outer(
                numbers.signs(module, "sketch_out", k, len(b)), numbers.signs(module, "sketch_in", k, a.shape[1])
            )
            for k in range(SKETCHES)
        ) / np.sqrt(SKETCHES)  # fmt: skip
        return mean + (sigma_b @ sigma_a + config["sigma_offset"]) * epsilon

    adapter = assert_sampled(tmp_path, config, tensors, tiny, weight)
    assert adapter.posterior == "hierarchical"


def test_a_draw_has_more_ranks_and_the_mean_has_not(tmp_path):
    adapter = lower(write_adapter(tmp_path, make_config(), make_tensors()), BASE)
    assert adapter.rank == 4
    assert draw(adapter, digest="", seed=0, sample=0).rank == 4 + SKETCHES * (SIGMA_RANK + 1)


@pytest.mark.parametrize("form", ["softplus", "exp"])
def test_another_form_is_kept_and_not_drawn(form, tmp_path):
    adapter = lower(write_adapter(tmp_path, make_config(sigma_form=form), make_tensors()), BASE)
    assert adapter.sites[Q].variance.form == form
    with pytest.raises(AdapterError) as refusal:
        draw(adapter, digest="", seed=0, sample=0)
    assert refusal.value.code == "adapter_unsupported_feature"


@pytest.mark.parametrize(
    ("config", "spoil", "code", "field"),
    [
        ({}, drop(f"{SITE}.lora_A_sigma.weight"), "adapter_missing_tensor", f"{SITE}.lora_A_sigma.weight"),
        ({}, put(f"{SITE}.lora_B_sigma.weight", 3, 24), "adapter_shape_mismatch", f"{SITE}.lora_B_sigma.weight"),
        ({}, poison(f"{SITE}.lora_A_sigma.weight"), "adapter_not_finite", f"{Q}.variance.std_a"),
        ({"sigma_rank": 4}, None, "adapter_shape_mismatch", None),
        ({"sigma_rank": -3}, None, "adapter_config_invalid", "sigma_rank"),
        ({"sigma_offset": None}, None, "adapter_config_invalid", "sigma_offset"),
        ({"sigma_offset": "0"}, None, "adapter_config_invalid", "sigma_offset"),
        ({"sigma_offset": 1e300}, None, "adapter_config_invalid", "sigma_offset"),
        ({"sigma_form": ["linear"]}, None, "adapter_config_invalid", "sigma_form"),
    ],
)
def test_refusals(config, spoil, code, field, tmp_path):
    assert_refused(tmp_path, make_config(**config), make_tensors(), spoil, code, field)
