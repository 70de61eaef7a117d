"""BLoB: the mean is what PEFT loads, draws are the formula's, and σ is what the code makes of ρ; else it is refused."""

from copy import deepcopy

import numpy as np
import peft
import pytest
import torch
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file

from loramux_adapters import AdapterError, lower, posterior_of

from ..checkpoints import BASE, write_adapter
from ..layouts.blob import make_config, make_tensors
from ..layouts.draw import PREFIX
from .formula import assert_one_adapter
from .refusals import assert_refused, drop, poison, put
from .sampled import assert_sampled, matrix

Q = "model.layers.0.self_attn.q_proj"
SITE = PREFIX + Q
RHO = f"{SITE}.lora_A_rho"


def sigma(rho, eps):
    return np.log1p(np.exp(rho)) if eps < 0 else rho**2


@pytest.mark.parametrize("eps", [0.05, 0, -1])
@pytest.mark.parametrize("changes", [{}, {"use_rslora": True, "lora_alpha": 3}])
def test_mean_and_draws_are_the_formula_s(eps, changes, reference, tmp_path):
    tiny = reference("llama")
    config = make_config(bayes_eps=eps, **changes)
    tensors = make_tensors(config, tiny.base)
    for name in (name for name in tensors if name.endswith("rho")):
        tensors[name] = tensors[name] * 10 if eps >= 0 else tensors[name] - 2
    scale = config["lora_alpha"] / config["r"] ** (0.5 if "use_rslora" in changes else 1)

    def weight(module, numbers):
        a, b = (matrix(tensors, f"{PREFIX}{module}.lora_{factor}.weight") for factor in "AB")
        if numbers is not None:
            rho = matrix(tensors, f"{PREFIX}{module}.lora_A_rho")
            a = a + sigma(rho, eps) * numbers.normals(module, "a", *a.shape)
        return scale * b @ a

    adapter = assert_sampled(tmp_path, config, tensors, tiny, weight)
    assert adapter.posterior == "diagonal_a" and not any("bayes_eps" in warning for warning in adapter.warnings)


@pytest.mark.filterwarnings("ignore")
def test_files_as_the_authors_code_leaves_them(reference, tmp_path):
    """A ParameterDict in PEFT's layers, and PEFT's `save_pretrained`; PEFT loads the mean, and so does this."""
    tiny = reference("llama")
    torch.manual_seed(3)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"])
    model = peft.get_peft_model(deepcopy(tiny.model), config)
    for module in model.modules():
        if isinstance(module, LoraLayer):
            shape = module.lora_A["default"].weight.shape
            module.lora_A_rho = torch.nn.ParameterDict({"default": torch.nn.Parameter(0.2 + torch.rand(shape))})
            torch.nn.init.normal_(module.lora_B["default"].weight)
    model.save_pretrained(tmp_path)
    assert {name.rpartition("_proj.")[2] for name in load_file(tmp_path / "adapter_model.safetensors")} == {
        "lora_A.weight", "lora_B.weight", "lora_A_rho"
    }  # fmt: skip
    with pytest.raises(AdapterError) as refusal:
        lower(tmp_path, tiny.base)
    assert refusal.value.code == "adapter_unsupported_feature" and "lora_A_rho" in refusal.value.field
    assert "Was bayes_eps in training 0 or above" in refusal.value.hint and "BLoB" in refusal.value.message
    path = tmp_path / "adapter_config.json"
    path.write_text(path.read_text().replace("{", '{"bayes_eps": 0.05,', 1))
    adapter = lower(tmp_path, tiny.base)
    path.write_text(path.read_text().replace('{"bayes_eps": 0.05,', "{", 1))
    assert posterior_of(adapter).sites == len(adapter.sites) == 4
    tiny.assert_same(adapter.mean, tiny.library_logits(tmp_path))


def test_all_spellings_mean_the_same(tmp_path):
    tensors = make_tensors()
    spellings = {
        "plain": tensors,
        "state dict": {
            name.replace(".weight", ".default.weight").replace("_rho", "_rho.default"): tensor
            for name, tensor in tensors.items()
        },
        "BayesAdapt": {
            name.replace(".weight", ".default.weight").replace(".lora_A_rho", ".lora_A.default.lora_A_rho"): tensor
            for name, tensor in tensors.items()
        },
        "bare": {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items()},
    }
    assert {name.rpartition("q_proj.")[2] for name in spellings["BayesAdapt"] if "q_proj" in name} == {
        "lora_A.default.weight", "lora_B.default.weight", "lora_A.default.lora_A_rho"
    }  # fmt: skip
    assert_one_adapter(tmp_path, *((make_config(), content) for content in spellings.values()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sigma_is_not_rounded_to_the_dtype_of_rho(dtype, tmp_path):
    tensors = make_tensors(dtype=dtype)
    site = lower(write_adapter(tmp_path, make_config(), tensors), BASE).sites[Q]
    assert site.a.dtype == dtype
    assert torch.equal(site.variance.tensors["sigma_a"], tensors[RHO].float() ** 2)


def test_rho_that_looks_like_the_other_map_is_told(tmp_path):
    tensors = make_tensors()
    for name in tensors:
        if name.endswith("rho"):
            tensors[name] = tensors[name] - 2
    (warning,) = [w for w in lower(write_adapter(tmp_path, make_config(), tensors), BASE).warnings if "bayes_eps" in w]
    assert "Was it below 0?" in warning


@pytest.mark.parametrize(
    ("config", "spoil", "code", "field"),
    [
        ({}, drop(RHO), "adapter_missing_tensor", RHO),
        ({}, put(RHO, 4), "adapter_shape_mismatch", RHO),
        ({}, put(RHO, 24, 4), "adapter_shape_mismatch", RHO),
        ({}, poison(RHO), "adapter_not_finite", f"{Q}.variance.sigma_a"),
        ({}, put(RHO, 4, 24, value=1e30), "adapter_not_finite", f"{Q}.variance.sigma_a"),
        ({}, put(RHO, 4, 24, dtype=torch.float64), "adapter_unsupported_feature", RHO),
        ({}, put(f"{SITE}.lora_B_rho", 24, 4), "adapter_unknown_tensor", f"{SITE}.lora_B_rho"),
        ({"bayes_eps": None}, None, "adapter_unsupported_feature", f"{PREFIX}model.layers.0.mlp.down_proj.lora_A_rho"),
        ({"bayes_eps": "0.05"}, None, "adapter_config_invalid", "bayes_eps"),
        ({"bayes_eps": True}, None, "adapter_config_invalid", "bayes_eps"),
        ({"bayes_eps": [0.05]}, None, "adapter_config_invalid", "bayes_eps"),
        ({"use_dora": True}, None, "adapter_unsupported_feature", "bayes_eps"),
    ],
)
def test_refusals(config, spoil, code, field, tmp_path):
    assert_refused(tmp_path, make_config(**config), make_tensors(), spoil, code, field)


def test_the_authors_own_targets_with_the_head_are_refused(reference, tmp_path):
    """Their scripts train q_proj, v_proj and lm_head, which other adapters cannot share."""
    tiny = reference("llama")
    config = make_config(target_modules=["q_proj", "v_proj", "lm_head"])
    tensors = make_tensors(config, tiny.base)
    for name, shape in (("A.weight", (4, 64)), ("B.weight", (61, 4)), ("A_rho", (4, 64))):
        tensors[f"{PREFIX}lm_head.lora_{name}"] = torch.ones(shape)
    with pytest.raises(AdapterError) as refusal:
        lower(write_adapter(tmp_path, config, tensors), tiny.base)
    assert refusal.value.code == "adapter_unsupported_feature" and "lm_head" in refusal.value.message
