"""MultiLoRA: the lowered form gives the logits of a sum over LoRAs, written here with plain hooks.

The names are those of `MultiLoRALinear` in pUmpKin-Co/MTL-LoRA at 7848a70 (`src/adapter/multilora.py`), in a raw
state_dict; its training script puts `module.` in front when DeepSpeed wraps the model. The config is ours.
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

TARGETS = ("q_proj", "down_proj")
RANK, NUMBER, ALPHA = 4, 3, 16
MODULES = [module for module in BASE.linears if module.endswith(TARGETS)]
SITE = MODULES[0]


def make_config(**changes):
    config = {
        "peft_type": "MULTILORA",
        "r": RANK,
        "lora_alpha": ALPHA,
        "lora_num": NUMBER,
        "lora_dropout": 0.05,
        "target_modules": list(TARGETS),
        "base_model_name_or_path": "somebody/tiny",
    } | changes
    return {name: value for name, value in config.items() if value is not ...}


def make_tensors(base=BASE, rank=RANK, number=NUMBER, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for module, (d_in, d_out) in base.linears.items():
        if module.endswith(TARGETS):
            shapes = {
                "lora_A": (number, rank, d_in),
                "lora_B": (number, d_out, rank),
                "lora_scaling": (number, d_out),
            }
            for name, shape in shapes.items():
                tensors[f"{module}.{name}"] = torch.randn(shape, generator=generator).to(dtype)
    return tensors


def deltas(base, tensors, alpha=ALPHA):
    """Σ_i (x A_iᵀ B_iᵀ) ⊙ s_i, times alpha / r."""
    found = {}
    for module in base.linears:
        if not module.endswith(TARGETS):
            continue

        def delta(x, module=module):
            a, b, s = (tensors[f"{module}.{name}"].double() for name in ("lora_A", "lora_B", "lora_scaling"))
            total = torch.zeros(*x.shape[:-1], b.shape[1], dtype=torch.float64)
            for i in range(len(a)):
                total += (x.double() @ a[i].T @ b[i].T) * s[i]
            return total * (alpha / a.shape[1])

        found[module] = delta
    return found


@pytest.mark.parametrize("number", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_are_those_of_the_formula(number, dtype, reference, tmp_path):
    tiny = reference("llama")
    tensors = make_tensors(tiny.base, number=number, dtype=dtype)
    adapter = lower(write_adapter(tmp_path, make_config(lora_num=number), tensors), tiny.base)
    tiny.assert_same(adapter, hooked_logits(tiny.model, deltas(tiny.base, tensors), tiny.tokens))
    assert set(adapter.ranks.values()) == {number * RANK}


@settings(max_examples=20, deadline=None)
@given(
    rank=st.integers(1, 12),
    number=st.integers(1, 8),
    d_in=st.integers(1, 40),
    d_out=st.integers(1, 40),
    alpha=st.floats(-64, 64).filter(lambda alpha: abs(alpha) > 1e-3),
    half=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_any_shape_gives_the_sum(tmp_path_factory, rank, number, d_in, d_out, alpha, half, seed):
    base = BaseModel("one", {"layers.0.q_proj": (d_in, d_out)})
    tensors = make_tensors(base, rank, number, torch.bfloat16 if half else torch.float32, seed)
    config = make_config(r=rank, lora_num=number, lora_alpha=alpha)
    adapter = lower(write_adapter(tmp_path_factory.mktemp("adapter"), config, tensors), base)
    x = torch.randn(3, d_in, generator=torch.Generator().manual_seed(seed))
    expected = deltas(base, tensors, alpha)["layers.0.q_proj"](x)
    site = adapter.sites["layers.0.q_proj"]
    close = {"rtol": 1e-6, "atol": 1e-5 * max(1, abs(alpha))}
    torch.testing.assert_close(site_delta(site, {}, x), expected, **close)
    # The product of two numbers of 16 bits is a float32: only the scale was rounded.
    exact = torch.einsum("noi,no->nio", *(tensors[f"layers.0.q_proj.{n}"].double() for n in ("lora_B", "lora_scaling")))
    assert not half or torch.equal(site.b.double(), exact.flatten(0, 1))


def test_exactly_one_method_claims_the_folder(tmp_path):
    folder = AdapterFolder(write_adapter(tmp_path, make_config(), make_tensors()))
    assert [method.name for method in METHODS if method.detect(folder)] == ["multilora"]


def test_the_prefix_of_several_devices_means_nothing(tmp_path):
    tensors = make_tensors()
    wrapped = {f"module.{name}": tensor for name, tensor in tensors.items()}
    digests = {
        digest_of(lower(write_adapter(tmp_path / name, make_config(), content), BASE))
        for name, content in (("plain", tensors), ("wrapped", wrapped))
    }
    assert len(digests) == 1


def test_as_it_starts_it_has_no_effect(tmp_path):
    """Training begins with lora_scaling at zero."""
    tensors = {name: t * ("scaling" not in name) for name, t in make_tensors().items()}
    with pytest.raises(AdapterError) as refusal:
        lower(write_adapter(tmp_path, make_config(), tensors), BASE)
    assert refusal.value.code == "adapter_no_effect"


A, B, S = f"{SITE}.lora_A", f"{SITE}.lora_B", f"{SITE}.lora_scaling"
NAN = float("nan")


@pytest.mark.parametrize(
    ("config", "spoil", "code", "field"),
    [
        ({}, drop(A), "adapter_missing_tensor", A),
        ({}, drop(B), "adapter_missing_tensor", B),
        ({}, drop(S), "adapter_missing_tensor", S),
        ({}, put(A, NUMBER, RANK, 23), "adapter_shape_mismatch", A),
        ({}, put(A, NUMBER * RANK, 24), "adapter_shape_mismatch", A),
        ({}, put(B, NUMBER + 1, 24, RANK), "adapter_shape_mismatch", B),
        ({}, put(S, NUMBER), "adapter_shape_mismatch", S),
        ({}, put(S, NUMBER, 25), "adapter_shape_mismatch", S),
        ({}, put(S, NUMBER, 24, value=NAN), "adapter_not_finite", f"{SITE}.B"),
        ({}, put(S, NUMBER, 24, value=3e38), "adapter_not_finite", f"{SITE}.B"),
        ({}, put(S, NUMBER, 24, dtype=torch.float64), "adapter_unsupported_feature", S),
        ({}, put(f"{SITE}.lora_scaler", 1), "adapter_unknown_tensor", f"{SITE}.lora_scaler"),
        ({}, put(f"{SITE}.lora_A.weight", RANK, 24), "adapter_unknown_tensor", f"{SITE}.lora_A.weight"),
        ({}, put(f"module.{A}", NUMBER, RANK, 24), "adapter_unknown_tensor", None),
        ({"lora_num": 2}, None, "adapter_shape_mismatch", None),
        ({"lora_num": ...}, None, "adapter_config_invalid", "lora_num"),
        ({"lora_num": 3.0}, None, "adapter_config_invalid", "lora_num"),
        ({"r": 8}, None, "adapter_shape_mismatch", None),
        ({"r": ...}, None, "adapter_config_invalid", "r"),
        ({"lora_alpha": ...}, None, "adapter_config_invalid", "lora_alpha"),
        ({"lora_alpha": 1e-60}, None, "adapter_config_invalid", "lora_alpha"),
        ({"tunable_scaler": True}, None, "adapter_unsupported_feature", "tunable_scaler"),
        ({"use_rslora": True}, None, "adapter_unsupported_feature", "use_rslora"),
        ({"bias": "all"}, None, "adapter_unsupported_feature", "bias"),
        ({"target_modules": ["q_proj"]}, None, "adapter_unknown_tensor", None),
        ({"target_modules": ["q_proj", "down_proj", "k_proj"]}, None, "adapter_missing_tensor", None),
    ],
)  # fmt: skip
def test_wrong_variants_are_refused(tmp_path, config, spoil, code, field):
    assert_refused(tmp_path, make_config(**config), make_tensors(), spoil, code, field)


def test_another_base_is_recognised(tmp_path):
    base = BaseModel("other", {module: (2 * d_in, 2 * d_out) for module, (d_in, d_out) in BASE.linears.items()})
    with pytest.raises(AdapterError) as refusal:
        lower(write_adapter(tmp_path, make_config(), make_tensors(base)), BASE)
    assert refusal.value.code == "adapter_wrong_base"
