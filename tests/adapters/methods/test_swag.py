"""SWAG: mean and draws are the formula's, with one set of deviations' lengths for all factors; and it is refused where
what was collected is not what the config says."""

import numpy as np
import pytest

from loramux_adapters import lower

from ..checkpoints import BASE, write_adapter
from ..layouts.draw import PREFIX
from ..layouts.swag import MOST, make_config, make_tensors
from .refusals import assert_refused, drop, poison, put
from .sampled import assert_sampled, matrix

Q = "model.layers.0.self_attn.q_proj"
SITE = f"base.{PREFIX}{Q}.lora_A.default.weight"


@pytest.mark.parametrize("covariance", [True, False])
@pytest.mark.parametrize("changes", [{}, {"swag_sample_scale": 0.5}, {"n_models": 3}])
def test_mean_and_draws_are_the_formula_s(covariance, changes, reference, tmp_path):
    tiny = reference("llama")
    config = make_config(swag_cov_mat=covariance, **changes)
    tensors = make_tensors(config, tiny.base)
    c = changes.get("swag_sample_scale", 1)

    def weight(module, numbers):
        factors = {}
        for name in "AB":
            place = f"base.{PREFIX}{module}.lora_{name}.default.weight"
            mean = matrix(tensors, f"{place}_mean")
            factors[name] = mean
            if numbers is None:
                continue
            variance = np.maximum(matrix(tensors, f"{place}_sq_mean") - mean**2, 1e-30)
            z = numbers.normals(module, name.lower(), *(mean if name == "A" else mean.T).shape)
            factors[name] = mean + np.sqrt(c * variance) * (z if name == "A" else z.T)
            if covariance:
                deviations = matrix(tensors, f"{place}_cov_mat_sqrt")
                lengths = numbers.normals("", "deviations", 1, len(deviations))[0]
                factors[name] += np.sqrt(c / (MOST - 1)) * (lengths @ deviations).reshape(mean.shape)
        return config["lora_alpha"] / config["r"] * factors["B"] @ factors["A"]

    adapter = assert_sampled(tmp_path, config, tensors, tiny, weight)
    assert adapter.posterior == ("low_rank_diagonal" if covariance else "diagonal_ab")


def test_a_variance_below_zero_is_the_least_one(tmp_path):
    """Rounding can make sq_mean − mean² negative; the code clamps it."""
    tensors = make_tensors()
    tensors[f"{SITE}_sq_mean"].zero_()
    sigma = lower(write_adapter(tmp_path, make_config(), tensors), BASE).sites[Q].variance.tensors["sigma_a"]
    assert (sigma == np.float32(1e-15)).all()


@pytest.mark.parametrize(
    ("config", "spoil", "code", "field"),
    [
        ({}, drop(f"{SITE}_sq_mean"), "adapter_missing_tensor", None),
        ({}, drop(f"{SITE}_cov_mat_sqrt"), "adapter_missing_tensor", None),
        ({}, put(f"{SITE}_cov_mat_sqrt", 5, 95), "adapter_shape_mismatch", f"{SITE}_cov_mat_sqrt"),
        ({}, poison(f"{SITE}_sq_mean"), "adapter_not_finite", f"{Q}.variance.sigma_a"),
        ({}, poison(f"{SITE}_cov_mat_sqrt"), "adapter_not_finite", f"{Q}.variance.low_rank_a"),
        ({}, put(SITE, 4, 24), "adapter_unknown_tensor", SITE),
        ({}, put("n_models", 1), "adapter_unknown_tensor", "n_models"),
        ({"n_models": 3}, None, "adapter_shape_mismatch", None),
        ({"swag_max_num_models": 4}, None, "adapter_shape_mismatch", None),
        ({"swag_cov_mat": False}, None, "adapter_unknown_tensor", None),
        ({"swag_cov_mat": 1}, None, "adapter_config_invalid", "swag_cov_mat"),
        ({"swag_sample_scale": -1}, None, "adapter_config_invalid", "swag_sample_scale"),
        ({"n_models": None}, None, "adapter_config_invalid", "n_models"),
    ],
)
def test_refusals(config, spoil, code, field, tmp_path):
    assert_refused(tmp_path, make_config(**config), make_tensors(), spoil, code, field)
