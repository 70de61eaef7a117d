"""MonteCLoRA: what PEFT computes with it, which is a plain LoRA; its sampler is checked, left out and mentioned."""

import peft
import pytest

from loramux_adapters import lower, posterior_of
from loramux_adapters.methods.monteclora import _SAMPLER, _SAMPLER_FIELDS

from ..layouts.draw import PREFIX
from ..layouts.monteclora import make_config, make_tensors
from .formula import assert_one_adapter
from .refusals import assert_refused, put

SITE = f"{PREFIX}model.layers.0.self_attn.q_proj.lora_monteclora_sampler"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("options", [{}, {"use_rslora": True, "r": 6, "rank_pattern": {"v_proj": 3}}])
def test_logits_are_those_of_peft(options, reference, tmp_path):
    tiny = reference("llama")
    config = peft.MontecloraConfig(num_samples=3)
    folder = tiny.save(tmp_path, monteclora_config=config, target_modules=["q_proj", "v_proj"], **options)
    adapter = lower(folder, tiny.base)
    assert adapter.method == "monteclora" and posterior_of(adapter) is None
    assert any(f"{4 * len(_SAMPLER)} tensors of its sampler are left out" in warning for warning in adapter.warnings)
    tiny.assert_same(adapter, tiny.library_logits(folder))


def test_every_field_of_the_installed_peft_is_accounted_for():
    assert set(peft.MontecloraConfig.__dataclass_fields__) == _SAMPLER_FIELDS


def test_the_sampler_plays_no_part(tmp_path):
    """It may be there or not, and its numbers do not matter; but as factors are told by names, so is a method."""
    tensors = make_tensors()
    factors = {name: tensor for name, tensor in tensors.items() if "sampler" not in name}
    others = {n: 2 * t if "sampler" in n else t for n, t in tensors.items()}
    assert_one_adapter(tmp_path, *((make_config(), content) for content in (tensors, factors, others)))


@pytest.mark.parametrize(
    ("config", "spoil", "code", "field"),
    [
        ({}, put(f"{SITE}.std_prior", 3), "adapter_shape_mismatch", f"{SITE}.std_prior"),
        ({}, put(f"{SITE}.gaussian_var_prior", 4), "adapter_shape_mismatch", f"{SITE}.gaussian_var_prior"),
        ({}, put(f"{SITE}.other", 4), "adapter_unsupported_feature", f"{SITE}.other"),
        ({"monteclora_config": True}, None, "adapter_config_invalid", "monteclora_config"),
        ({"monteclora_config": {"num_samples": 4}}, None, "adapter_shape_mismatch", None),
        ({"monteclora_config": {"num_samples": "3"}}, None, "adapter_config_invalid", "num_samples"),
        ({"monteclora_config": {"num_samples": 3, "at_inference": True}}, None, "adapter_unsupported_feature", None),
        ({"monteclora_config": None}, None, "adapter_unsupported_feature", None),
        ({"use_dora": True}, None, "adapter_unsupported_feature", "monteclora_config"),
    ],
)
def test_refusals(config, spoil, code, field, tmp_path):
    assert_refused(tmp_path, make_config(**config), make_tensors(), spoil, code, field)
