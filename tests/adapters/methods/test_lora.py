"""Plain LoRA: the lowered form gives the logits that PEFT gives, for every feature that is served."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from loramux_adapters import AdapterError, lower
from loramux_adapters.artefact import digest_of

from ..checkpoints import BASE, make_config, make_tensors, write_adapter
from ..form import logits

LLAMA = {
    "plain": {"target_modules": ["q_proj", "down_proj"]},
    "inexact scale": {"target_modules": ["k_proj", "o_proj"], "r": 3, "lora_alpha": 16},
    "rank 1": {"target_modules": ["up_proj"], "r": 1},
    "rank above both widths": {"target_modules": ["k_proj"], "r": 80},
    "negative alpha": {"target_modules": ["v_proj"], "lora_alpha": -4},
    "rslora": {"target_modules": ["q_proj", "v_proj"], "r": 6, "lora_alpha": 9, "use_rslora": True},
    "dropout": {"target_modules": ["q_proj"], "lora_dropout": 0.2},
    "rank_pattern by suffix": {"target_modules": ["q_proj", "v_proj"], "rank_pattern": {"v_proj": 3}},
    "rank_pattern by name": {
        "target_modules": ["q_proj"],
        "rank_pattern": {"model.layers.1.self_attn.q_proj": 5},
    },
    "rank_pattern by pattern": {
        "target_modules": "all-linear",
        "rank_pattern": {r"^model\.layers\.0\..*": 2, "mlp.*proj": 5, "self_attn.[qk]_proj": 3},
    },
    "alpha_pattern": {
        "target_modules": ["q_proj", "gate_proj"],
        "alpha_pattern": {"layers.1.self_attn.q_proj": 32, "gate_proj": 0.5},
    },
    "rank and alpha patterns, rslora": {
        "target_modules": ["q_proj", "k_proj", "up_proj"],
        "use_rslora": True,
        "rank_pattern": {"k_proj": 5, "up_proj": 7},
        "alpha_pattern": {"k_proj": 3, ".*1.mlp.up_proj": 11},
    },
    "target by longer suffix": {"target_modules": ["self_attn.q_proj", "mlp.up_proj"]},
    "target by full name": {"target_modules": ["model.layers.0.self_attn.q_proj"]},
    "target by pattern": {"target_modules": r".*layers\.[1-9]\d*\.(self_attn|mlp)\.(q|down)_proj"},
    "all-linear": {"target_modules": "all-linear"},
    "all-linear, list excluded": {"target_modules": "All-Linear", "exclude_modules": ["k_proj", "mlp.up_proj"]},
    "pattern excluded": {"target_modules": ["q_proj", "k_proj"], "exclude_modules": r".*\.0\..*q_proj"},
    "one layer": {"target_modules": ["q_proj"], "layers_to_transform": 1},
    "list of layers": {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [0]},
    "layers_pattern": {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": "layers"},
    "layers_pattern list": {
        "target_modules": ["q_proj"],
        "layers_to_transform": [1],
        "layers_pattern": ["blocks", "layers"],
    },
    "bfloat16": {"target_modules": ["q_proj", "down_proj"], "dtype": torch.bfloat16},
    "float16": {"target_modules": ["q_proj", "down_proj"], "dtype": torch.float16},
    "gaussian": {"target_modules": ["q_proj"], "init_lora_weights": "gaussian"},
    "no init": {"target_modules": ["q_proj"], "init_lora_weights": False},
    "orthogonal": {"target_modules": ["q_proj"], "init_lora_weights": "orthogonal"},
    "mica": {"target_modules": ["q_proj"], "init_lora_weights": "mica"},
    "causal lm": {"target_modules": ["q_proj"], "task_type": "CAUSAL_LM"},
}
GPT2 = {
    "conv1d": {"target_modules": ["c_attn"], "fan_in_fan_out": True},
    "conv1d, flag forgotten": {"target_modules": ["c_attn", "mlp.c_proj"]},
    "all-linear": {"target_modules": "all-linear", "fan_in_fan_out": True, "rank_pattern": {"c_fc": 3}},
    "layers": {"target_modules": ["c_fc"], "layers_to_transform": [1], "layers_pattern": "h"},
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    ("kind", "options"),
    [pytest.param("llama", options, id=f"llama: {name}") for name, options in LLAMA.items()]
    + [pytest.param("gpt2", options, id=f"gpt2: {name}") for name, options in GPT2.items()],
)
def test_logits_are_those_of_peft(kind, options, reference, tmp_path):
    tiny = reference(kind)
    adapter = lower(tiny.save(tmp_path, **options), tiny.base)
    expected = tiny.peft_logits(tmp_path, adapter)
    scale = expected.abs().max()
    assert (logits(tiny.model, adapter, tiny.tokens) - expected).abs().max() < 1e-9 * scale
    # Otherwise the test would pass without any adapter.
    assert (tiny.base_logits() - expected).abs().max() > 1e-3 * scale


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_only_a_converted_pissa_adapter_is_served(reference, tmp_path):
    tiny = reference("llama")
    options = {"target_modules": ["q_proj"], "init_lora_weights": "pissa", "r": 4}
    model = get_peft_model(reference("llama").model.__class__(tiny.model.config).eval(), LoraConfig(**options))
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(tmp_path / "initial")
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3))
    model.save_pretrained(tmp_path / "converted", path_initial_model_for_weight_conversion=tmp_path / "initial")
    model.peft_config["default"].init_lora_weights = "pissa"
    model.save_pretrained(tmp_path / "as trained")

    adapter = lower(tmp_path / "converted", tiny.base)
    expected = tiny.peft_logits(tmp_path / "converted", adapter)
    assert (logits(tiny.model, adapter, tiny.tokens) - expected).abs().max() < 1e-9 * expected.abs().max()
    with pytest.raises(AdapterError) as refusal:
        lower(tmp_path / "as trained", tiny.base)
    assert (refusal.value.code, refusal.value.field) == ("adapter_unsupported_feature", "init_lora_weights")
    assert "path_initial_model_for_weight_conversion" in refusal.value.hint


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"trainable_token_indices": [1, 2]}, "trainable_token_indices"),
        ({"layer_replication": [(0, 2), (1, 2)]}, "layer_replication"),
        ({"alora_invocation_tokens": [3, 4]}, "alora_invocation_tokens"),
        ({"init_lora_weights": "olora"}, "init_lora_weights"),
        ({"init_lora_weights": "pissa_niter_2"}, "init_lora_weights"),
    ],
)
def test_what_peft_can_save_and_we_cannot_serve(options, field, reference, tmp_path):
    tiny = reference("llama")
    tiny.save(tmp_path, **{"target_modules": ["q_proj"]} | options)
    with pytest.raises(AdapterError) as refusal:
        lower(tmp_path, tiny.base)
    assert (refusal.value.code, refusal.value.field) == ("adapter_unsupported_feature", field)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
def test_embeddings_and_head_are_refused_by_their_tensors(target, reference, tmp_path):
    tiny = reference("llama")
    tiny.save(tmp_path, target_modules=["q_proj", target])
    with pytest.raises(AdapterError) as refusal:
        lower(tmp_path, tiny.base)
    assert refusal.value.code == "adapter_unsupported_feature"
    assert target in (refusal.value.field or "")


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_all_spellings_of_a_key_mean_the_same(kind, reference, tmp_path):
    tiny = reference(kind)
    plain = tiny.save(tmp_path / "plain", target_modules="all-linear", fan_in_fan_out=kind == "gpt2")
    digest = digest_of(lower(plain, tiny.base))
    spellings = {
        "infix": lambda key: key.replace(".weight", ".default.weight"),
        "bare": lambda key: key.removeprefix("base_model.model."),
        "both": lambda key: key.removeprefix("base_model.model.").replace(".weight", ".my-adapter.weight"),
    }
    for name, spell in spellings.items():
        shutil.copytree(plain, tmp_path / name)
        weights = tmp_path / name / "adapter_model.safetensors"
        save_file({spell(key): tensor for key, tensor in load_file(weights).items()}, weights)
        assert digest_of(lower(tmp_path / name, tiny.base)) == digest


MODULES = sorted(name for name in BASE.linears if name.endswith(("q_proj", "down_proj")))


@settings(max_examples=40, deadline=None)
@given(
    ranks=st.lists(st.integers(1, 70), min_size=len(MODULES), max_size=len(MODULES)),
    alphas=st.lists(st.floats(-64, 64).filter(lambda a: abs(a) > 1e-3), min_size=len(MODULES), max_size=len(MODULES)),
    rslora=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    seed=st.integers(0, 1000),
)
def test_any_ranks_and_alphas_give_the_dense_delta(tmp_path_factory, ranks, alphas, rslora, dtype, seed):
    folder = tmp_path_factory.mktemp("adapter")
    by_module = dict(zip(MODULES, ranks, strict=True))
    tensors = make_tensors(ranks=by_module, dtype=dtype, seed=seed)
    config = make_config(
        rank_pattern=by_module, alpha_pattern=dict(zip(MODULES, alphas, strict=True)), use_rslora=rslora
    )
    adapter = lower(write_adapter(folder, config, tensors), BASE)
    assert adapter.ranks == by_module and adapter.rank == max(ranks)
    assert adapter.nbytes() == sum(t.nbytes for t in tensors.values()) + 4 * sum(ranks)
    for module, alpha in zip(MODULES, alphas, strict=True):
        site = adapter.sites[module]
        a = tensors[f"base_model.model.{module}.lora_A.weight"].double()
        b = tensors[f"base_model.model.{module}.lora_B.weight"].double()
        scale = alpha / len(a) ** (0.5 if rslora else 1)
        lowered = torch.einsum("ri,ro,r->oi", site.a.double(), site.b.double(), site.scale.double())
        # The scale is kept in float32: half a unit in its last place.
        torch.testing.assert_close(lowered, scale * b @ a, rtol=2**-23, atol=1e-12)
        assert site.a.dtype == site.b.dtype == dtype and site.b.is_contiguous()


def test_warnings_say_what_was_not_used(tmp_path):
    alphas = {"v_proj": 3, "down_proj": 4, "mlp.down_proj": 5}
    config = make_config(base_model_name_or_path="somebody/other", alpha_pattern=alphas)
    write_adapter(tmp_path, config)
    (tmp_path / "tokenizer.json").write_text("{}")
    warnings = lower(tmp_path, BASE).warnings
    words = ["somebody/other", "'v_proj'", "'mlp.down_proj'", "disagree", "tokenizer.json"]
    for word, text in zip(words, warnings, strict=True):
        assert word in text


def test_some_modules_without_effect_are_fine(tmp_path):
    tensors = make_tensors()
    first = next(key for key in tensors if "lora_B" in key)
    tensors[first] = torch.zeros_like(tensors[first])
    assert len(lower(write_adapter(tmp_path, None, tensors), BASE).sites) == 4


def test_config_as_transformers_writes_it(reference, tmp_path):
    """transformers' own save_pretrained of a model with an adapter added to it."""
    tiny = reference("llama")
    model = tiny.model.__class__(tiny.model.config)
    model.add_adapter(LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    model.save_pretrained(tmp_path)
    assert json.loads((Path(tmp_path) / "adapter_config.json").read_text())["peft_type"] == "LORA"
    assert len(lower(tmp_path, tiny.base).sites) == 2
