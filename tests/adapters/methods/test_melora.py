"""MELoRA: the lowered form gives the logits of the authors' layer, written here with plain hooks.

The names and fields are those of `MELoraConfig` and `Linear` in ChasonShi/MELoRA at 4ebb8b4
(`peft-0.5.0/src/peft/tuners/melora.py`); the prefix `base_model.model.` is PEFT's.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loramux_adapters import AdapterError, BaseModel, lower
from loramux_adapters.artefact import digest_of
from loramux_adapters.files import AdapterFolder
from loramux_adapters.methods import METHODS

from ..checkpoints import BASE, write_adapter
from ..form import site_delta
from ..hooks import hooked_logits
from .refusals import assert_refused, drop, put

TARGETS = ("q_proj", "up_proj")
RANKS, ALPHAS = [2, 4, 1, 3], [16, 8, -1, 0.5]
MODULES = [module for module in BASE.linears if module.endswith(TARGETS)]
SITE = f"base_model.model.{MODULES[0]}"


def make_config(**changes):
    config = {
        "peft_type": "MELORA",
        "auto_mapping": None,
        "base_model_name_or_path": "somebody/tiny",
        "revision": None,
        "task_type": "CAUSAL_LM",
        "inference_mode": True,
        "r": RANKS,
        "target_modules": list(TARGETS),
        "lora_alpha": ALPHAS,
        "lora_dropout": 0.05,
        "fan_in_fan_out": False,
        "bias": "none",
        "mode": "melora",
        "modules_to_save": None,
        "init_lora_weights": True,
        "layers_to_transform": None,
        "layers_pattern": None,
    } | changes
    return {name: value for name, value in config.items() if value is not ...}


def make_tensors(base=BASE, ranks=RANKS, targets=TARGETS, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for module, (d_in, d_out) in base.linears.items():
        for i, rank in enumerate(ranks) if module.endswith(targets) else ():
            for name, shape in (("A", (rank, d_in // len(ranks))), ("B", (d_out // len(ranks), rank))):
                tensors[f"base_model.model.{module}.lora_{name}.{i}.weight"] = torch.randn(
                    shape, generator=generator
                ).to(dtype)
    return tensors


def deltas(base, tensors, ranks=RANKS, alphas=ALPHAS, targets=TARGETS):
    """Each small LoRA reads the next d_in // n inputs; their outputs are put one after the other."""
    found = {}
    for module in base.linears:
        if not module.endswith(targets):
            continue

        def delta(x, module=module):
            outputs, width = [], x.shape[-1] // len(ranks)
            for i, (rank, alpha) in enumerate(zip(ranks, alphas, strict=True)):
                a, b = (tensors[f"base_model.model.{module}.lora_{name}.{i}.weight"].double() for name in "AB")
                part = x.double()[..., i * width : (i + 1) * width]
                outputs.append(part @ a.T @ b.T * (alpha / rank))
            return torch.cat(outputs, dim=-1)

        found[module] = delta
    return found


@pytest.mark.parametrize("ranks", [RANKS, [3, 3], [5]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_are_those_of_the_formula(ranks, dtype, reference, tmp_path):
    tiny = reference("llama")
    alphas = ALPHAS[: len(ranks)]
    tensors = make_tensors(tiny.base, ranks, dtype=dtype)
    config = make_config(r=ranks, lora_alpha=alphas)
    adapter = lower(write_adapter(tmp_path, config, tensors), tiny.base)
    tiny.assert_same(adapter, hooked_logits(tiny.model, deltas(tiny.base, tensors, ranks, alphas), tiny.tokens))
    assert set(adapter.ranks.values()) == {sum(ranks)}
    assert all(site.a.dtype == site.b.dtype == dtype for site in adapter.sites.values())


def test_logits_are_those_of_the_formula_on_transposed_layers(reference, tmp_path):
    tiny = reference("gpt2")
    targets = ("c_attn",)
    tensors = make_tensors(tiny.base, [2, 3], targets)
    config = make_config(r=[2, 3], lora_alpha=[4, 5], target_modules=["c_attn"], fan_in_fan_out=True)
    adapter = lower(write_adapter(tmp_path, config, tensors), tiny.base)
    tiny.assert_same(
        adapter, hooked_logits(tiny.model, deltas(tiny.base, tensors, [2, 3], [4, 5], targets), tiny.tokens)
    )


@settings(max_examples=20, deadline=None)
@given(
    ranks=st.lists(st.integers(1, 9), min_size=1, max_size=8),
    width=st.integers(1, 9),
    beyond=st.integers(0, 7),
    height=st.integers(1, 9),
    seed=st.integers(0, 1000),
)
def test_any_shape_gives_the_blocks_one_after_the_other(tmp_path_factory, ranks, width, beyond, height, seed):
    """`beyond`: inputs that are left where n does not divide d_in. No small LoRA reads them."""
    n = len(ranks)
    d_in = n * width + beyond % n
    base = BaseModel("one", {"layers.0.q_proj": (d_in, n * height)})
    alphas = torch.randn(n, generator=torch.Generator().manual_seed(seed)).tolist()
    tensors = make_tensors(base, ranks, seed=seed)
    config = make_config(r=ranks, lora_alpha=alphas)
    adapter = lower(write_adapter(tmp_path_factory.mktemp("adapter"), config, tensors), base)
    x = torch.randn(3, d_in, generator=torch.Generator().manual_seed(seed))
    expected = deltas(base, tensors, ranks, alphas)["layers.0.q_proj"](x)
    torch.testing.assert_close(site_delta(adapter.sites["layers.0.q_proj"], {}, x), expected, rtol=1e-6, atol=1e-5)


def test_exactly_one_method_claims_the_folder(tmp_path):
    folder = AdapterFolder(write_adapter(tmp_path, make_config(), make_tensors()))
    assert [method.name for method in METHODS if method.detect(folder)] == ["melora"]


def test_the_prefix_may_be_missing(tmp_path):
    tensors = make_tensors()
    bare = {name.removeprefix("base_model.model."): tensor for name, tensor in tensors.items()}
    digests = {
        digest_of(lower(write_adapter(tmp_path / name, make_config(), content), BASE))
        for name, content in (("full", tensors), ("bare", bare))
    }
    assert len(digests) == 1


def test_what_is_too_large_when_it_is_lowered_is_refused(tmp_path):
    folder = write_adapter(tmp_path, make_config(), make_tensors())
    nbytes = sum(4 * sum(RANKS) * sum(BASE.linears[module]) for module in MODULES)
    lower(folder, BASE, max_bytes=nbytes)
    with pytest.raises(AdapterError) as refusal:
        lower(folder, BASE, max_bytes=nbytes - 1)
    assert refusal.value.code == "adapter_too_large"


def name(part, i):
    return f"{SITE}.lora_{part}.{i}.weight"


@pytest.mark.parametrize(
    ("config", "spoil", "code", "field"),
    [
        ({}, drop(name("A", 2)), "adapter_missing_tensor", name("A", 2)),
        ({}, drop(name("B", 0)), "adapter_missing_tensor", name("B", 0)),
        ({}, put(name("A", 0), 2, 7), "adapter_shape_mismatch", name("A", 0)),
        ({}, put(name("A", 0), 2, 24), "adapter_shape_mismatch", name("A", 0)),
        ({}, put(name("B", 3), 6, 4), "adapter_shape_mismatch", name("B", 3)),
        ({}, put(name("A", 4), 2, 6), "adapter_unknown_tensor", name("A", 4)),
        ({}, put(name("A", "00"), 2, 6), "adapter_unknown_tensor", name("A", "00")),
        ({}, put(f"{SITE}.lora_A.weight", 2, 24), "adapter_unknown_tensor", f"{SITE}.lora_A.weight"),
        ({}, put(name("A", 0), 2, 6, value=float("nan")), "adapter_not_finite", f"{MODULES[0]}.A"),
        ({}, put(name("A", 0), 2, 6, dtype=torch.float64), "adapter_unsupported_feature", name("A", 0)),
        ({"r": [2, 4, 1]}, None, "adapter_config_invalid", "lora_alpha"),
        ({"r": [2, 4, 1], "lora_alpha": [1, 1, 1]}, None, "adapter_config_invalid", "r"),
        ({"r": [2, 4], "lora_alpha": [1, 1]}, None, "adapter_unknown_tensor", None),
        ({"r": [2] * 5, "lora_alpha": [1] * 5}, None, "adapter_config_invalid", "r"),
        ({"r": [1] * 100_000, "lora_alpha": [1] * 100_000}, None, "adapter_config_invalid", "r"),
        ({"r": [2, 4, 2, 3]}, None, "adapter_shape_mismatch", None),
        ({"r": [2, 4, 0, 3]}, None, "adapter_config_invalid", "r"),
        ({"r": [2, 4, True, 3]}, None, "adapter_config_invalid", "r"),
        ({"r": 8}, None, "adapter_config_invalid", "r"),
        ({"r": []}, None, "adapter_config_invalid", "r"),
        ({"r": ...}, None, "adapter_config_invalid", "r"),
        ({"lora_alpha": 16}, None, "adapter_config_invalid", "lora_alpha"),
        ({"lora_alpha": [16] * 5}, None, "adapter_config_invalid", "lora_alpha"),
        ({"lora_alpha": [16, 16, 16, "16"]}, None, "adapter_config_invalid", "lora_alpha"),
        ({"lora_alpha": [16, 16, 16, 1e31]}, None, "adapter_config_invalid", "lora_alpha"),
        ({"lora_alpha": [16, 16, 16, 1e-60]}, None, "adapter_config_invalid", "lora_alpha"),
        ({"use_rslora": True}, None, "adapter_unsupported_feature", "use_rslora"),
        ({"bias": "all"}, None, "adapter_unsupported_feature", "bias"),
        ({"modules_to_save": ["lm_head"]}, None, "adapter_unsupported_feature", "modules_to_save"),
        ({"unknown": 1}, None, "adapter_unsupported_feature", "unknown"),
        ({"target_modules": ["q_proj"]}, None, "adapter_unknown_tensor", None),
        ({"target_modules": ["q_proj", "up_proj", "k_proj"]}, None, "adapter_missing_tensor", None),
    ],
)  # fmt: skip
def test_wrong_variants_are_refused(tmp_path, config, spoil, code, field):
    assert_refused(tmp_path, make_config(**config), make_tensors(), spoil, code, field)
