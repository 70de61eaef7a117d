"""MC-dropout: the mean is PEFT's LoRA, a draw one mask for all tokens."""

import pytest

from ..layouts.draw import PREFIX
from ..layouts.mcdropout import make_config, make_tensors
from .refusals import assert_refused
from .sampled import assert_sampled, matrix


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_mean_and_draws_are_the_formula_s(rate, reference, tmp_path):
    tiny = reference("llama")
    config = make_config(lora_dropout=rate)
    tensors = make_tensors(config, tiny.base)

    def weight(module, numbers):
        a, b = (matrix(tensors, f"{PREFIX}{module}.lora_{factor}.weight") for factor in "AB")
        if numbers is not None:
            kept = numbers.words(module, "inputs", 1, a.shape[1])[0] >= round(rate * 2**32)
            a = a * kept / (1 - rate)
        return config["lora_alpha"] / config["r"] * b @ a

    assert assert_sampled(tmp_path, config, tensors, tiny, weight).posterior == "dropout"


@pytest.mark.parametrize("rate", [0, 1, -0.1, None, "0.1", True])
def test_a_rate_that_drops_nothing_or_all_is_refused(rate, tmp_path):
    config = make_config(lora_dropout=rate)
    assert_refused(tmp_path, config, make_tensors(), None, "adapter_config_invalid", "lora_dropout")
