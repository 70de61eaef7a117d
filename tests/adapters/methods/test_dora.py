"""DoRA (weight-decomposed): lowered, it gives PEFT's logits, which PEFT computes from the base's whole weights.

PEFT writes the files of the first tests; those of the others repeat its names, `<module>.lora_magnitude_vector` among
them, over a base whose weights are random.
"""

import json
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from loramux_adapters import AdapterError, lower, open_artefact, prepare, unserved
from loramux_adapters.base_weights import BaseWeights
from loramux_adapters.files import AdapterFolder
from loramux_adapters.methods import METHODS
from loramux_adapters.native import digest_of, write_native

from .. import checkpoints
from ..checkpoints import RANK, write_adapter
from ..layouts import dora as layout
from .formula import assert_one_adapter
from .refusals import assert_refused, drop, put

CASES = {
    "plain": {"target_modules": ["q_proj", "down_proj"]},
    "rslora": {"target_modules": ["q_proj", "v_proj"], "r": 6, "lora_alpha": 9, "use_rslora": True},
    "patterns": {
        "target_modules": ["q_proj", "k_proj", "up_proj"],
        "rank_pattern": {"k_proj": 5, "up_proj": 7},
        "alpha_pattern": {"k_proj": 3, "up_proj": -2},
    },
    "dropout": {"target_modules": ["v_proj", "o_proj"], "lora_dropout": 0.3},
    "bfloat16": {"target_modules": "all-linear", "dtype": torch.bfloat16},
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("kind", "options"),
    [*(("llama", options) for options in CASES.values()), ("qwen2", CASES["rslora"]), ("gpt2", CASES["rslora"])],
    ids=[*CASES, "qwen2", "gpt2"],
)
def test_logits_are_those_of_peft(options, kind, reference, tmp_path):
    """Llama's layers have no bias, Qwen2's q, k and v have one, and all of GPT-2's, whose weights lie across."""
    tiny = reference(kind)
    if kind == "gpt2":
        options = options | {"target_modules": ["c_attn", "mlp.c_proj"]}
    folder = tiny.save(tmp_path, use_dora=True, **options)
    adapter = lower(folder, tiny.base)
    assert adapter.method == "dora" and not unserved(adapter)
    tiny.assert_same(adapter, tiny.library_logits(folder))
    assert all((site.magnitude - 1).abs().max() > 0.1 for site in adapter.sites.values())


MODULES = [module for module in checkpoints.BASE.linears if module.endswith(("q_proj", "down_proj"))]
SITE = f"base_model.model.{MODULES[0]}"
MAGNITUDE = f"{SITE}.lora_magnitude_vector"


def make_config(**changes):
    return checkpoints.make_config(**{"use_dora": True} | changes)


def make_tensors(ranks=None, dtype=torch.float32, seed=0):
    tensors = checkpoints.make_tensors(ranks=ranks, dtype=dtype, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    for module in MODULES:
        m = torch.rand(checkpoints.BASE.linears[module][1], generator=generator) + 0.1
        tensors[f"base_model.model.{module}.lora_magnitude_vector"] = m.to(dtype)
    return tensors


@pytest.fixture
def base(tmp_path):
    return checkpoints.with_weights(tmp_path / "base")


@settings(max_examples=6, deadline=None)
@given(
    ranks=st.lists(st.integers(1, 40), min_size=len(MODULES), max_size=len(MODULES)),
    alpha=st.floats(-64, 64).filter(lambda alpha: abs(alpha) > 1e-3),
    rslora=st.booleans(),
    elements=st.sampled_from([1, 50, 1 << 22]),
    seed=st.integers(0, 1000),
)
def test_rows_get_the_length_of_the_magnitude(tmp_path_factory, ranks, alpha, rslora, elements, seed):
    """The definition: each row of magnitude ⊙ W0 + Σ scale·b·a has the length m, with blocks of W0 of any size."""
    folder, by_module = tmp_path_factory.mktemp("dora"), dict(zip(MODULES, ranks, strict=True))
    base = checkpoints.with_weights(folder / "base", seed=seed)
    tensors = make_tensors(by_module, seed=seed)
    config = make_config(rank_pattern=by_module, lora_alpha=alpha, use_rslora=rslora)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("loramux_adapters.base_weights.BLOCK_ELEMENTS", elements)
        adapter = lower(write_adapter(folder / "adapter", config, tensors), base)
        weights = {module: torch.cat(list(base.row_blocks(module))) for module in MODULES}
    assert adapter.ranks == by_module
    for module, site in adapter.sites.items():
        whole = site.magnitude.double()[:, None] * weights[module]
        whole += (site.b.double() * site.scale.double()[:, None]).T @ site.a.double()
        m = tensors[f"base_model.model.{module}.lora_magnitude_vector"].double()
        torch.testing.assert_close(whole.norm(dim=1), m, rtol=2e-6, atol=0)


def test_nothing_but_the_adapters_modules_is_read(tmp_path, monkeypatch):
    read = []
    blocks = BaseWeights.row_blocks
    monkeypatch.setattr(BaseWeights, "row_blocks", lambda self, m, *rest: read.append(m) or blocks(self, m, *rest))
    lower(write_adapter(tmp_path / "adapter", make_config(), make_tensors()), checkpoints.with_weights(tmp_path / "b"))
    assert read == sorted(MODULES)


@pytest.mark.parametrize("spell", ["{}.default.weight", "{}.default", "{}.weight"])
def test_the_name_in_a_raw_state_dict(tmp_path, base, spell):
    plain, tensors = make_tensors(), make_tensors()
    tensors = {spell.format(k) if k.endswith("vector") else k: v for k, v in tensors.items()}
    one, other = (
        lower(write_adapter(tmp_path / str(i), make_config(), t), base) for i, t in enumerate((plain, tensors))
    )
    assert all(torch.equal(site.magnitude, other.sites[module].magnitude) for module, site in one.sites.items())


@pytest.mark.parametrize("spell", ["{}.weight_m_wdecomp.weight", "{}.weight_m_wdecomp.default.weight"])
@pytest.mark.parametrize("simple", [True, False])
def test_the_authors_file_with_the_same_numbers_is_the_same_adapter(tmp_path, base, spell, simple):
    """`dora_simple` only keeps the length out of the gradient."""
    config = layout.make_config(dora_simple=simple)
    tensors = layout.make_tensors(config)
    peft = {name.replace("weight_m_wdecomp.weight", "lora_magnitude_vector"): t for name, t in tensors.items()}
    peft = {name: t.flatten() if name.endswith("vector") else t for name, t in peft.items()}
    theirs = {name.replace(".weight_m_wdecomp.weight", spell.format("")): t for name, t in tensors.items()}
    same = make_config(r=layout.RANK, lora_alpha=layout.ALPHA)
    assert_one_adapter(tmp_path, (same, peft), (config, theirs), base=base)


def test_it_survives_the_artefact_and_the_native_format(tmp_path, base):
    folder = write_adapter(tmp_path / "adapter", make_config(), make_tensors())
    adapter, artefact = lower(folder, base), prepare(folder, base, tmp_path / "cache")
    native = lower(write_native(tmp_path / "native.safetensors", adapter, base.name), checkpoints.BASE)
    assert artefact.summary.method == "dora" and artefact.summary.nbytes == adapter.nbytes()
    for other in (open_artefact(artefact.path), native):
        for module, site in adapter.sites.items():
            assert torch.equal(site.magnitude, other.sites[module].magnitude)


def test_exactly_one_method_claims_the_folder(tmp_path):
    folder = AdapterFolder(write_adapter(tmp_path, make_config(), make_tensors()))
    assert [method.name for method in METHODS if method.detect(folder)] == ["dora"]


def refuse(folder, base, config=None, tensors=None):
    with pytest.raises(AdapterError) as refusal:
        lower(write_adapter(folder / "adapter", config or make_config(), tensors or make_tensors()), base)
    assert refusal.value.hint
    return refusal.value.code, refusal.value.field


@pytest.mark.parametrize(
    ("config", "spoil", "code", "field"),
    [
        ({}, drop(MAGNITUDE), "adapter_missing_tensor", MAGNITUDE),
        ({}, drop(f"{SITE}.lora_B.weight"), "adapter_missing_tensor", f"{SITE}.lora_B.weight"),
        ({}, put(MAGNITUDE, 23), "adapter_shape_mismatch", MAGNITUDE),
        ({}, put(MAGNITUDE, 24, 1), "adapter_shape_mismatch", MAGNITUDE),
        ({}, put(MAGNITUDE, 24, value=0.0), "adapter_config_invalid", MAGNITUDE),
        ({}, put(MAGNITUDE, 24, value=-1.0), "adapter_config_invalid", MAGNITUDE),
        ({}, put(MAGNITUDE, 24, value=float("nan")), "adapter_not_finite", MAGNITUDE),
        ({}, put(MAGNITUDE, 24, value=float("inf")), "adapter_not_finite", MAGNITUDE),
        ({}, put(MAGNITUDE, 24, value=1e-45), "adapter_config_invalid", f"{MODULES[0]}.magnitude"),
        ({}, put(MAGNITUDE, 24, dtype=torch.float64), "adapter_unsupported_feature", MAGNITUDE),
        ({}, put(f"{SITE}.lora_A.weight", RANK, 24, value=float("nan")), "adapter_not_finite", f"{MODULES[0]}.A"),
        ({}, put(f"{SITE}.lora_B.bias", 24), "adapter_unsupported_feature", f"{SITE}.lora_B.bias"),
        ({"use_dora": "yes"}, None, "adapter_config_invalid", "use_dora"),
        ({"use_dora": False}, None, "adapter_unsupported_feature", None),
        ({"lora_bias": True}, None, "adapter_unsupported_feature", "lora_bias"),
        ({"bias": "lora_only"}, None, "adapter_unsupported_feature", "bias"),
        ({"init_lora_weights": "pissa"}, None, "adapter_unsupported_feature", "init_lora_weights"),
        ({"rank_pattern": {"q_proj": 3}}, None, "adapter_shape_mismatch", None),
        ({"r": None}, None, "adapter_config_invalid", "r"),
        ({"unknown": 1}, None, "adapter_unsupported_feature", "unknown"),
    ],
)  # fmt: skip
def test_wrong_variants_are_refused(tmp_path, base, config, spoil, code, field):
    assert_refused(tmp_path, make_config() | config, make_tensors(), spoil, code, field, base=base)


WEIGHT = f"{MODULES[0]}.weight"


def test_a_base_whose_weights_are_not_at_hand(tmp_path):
    assert refuse(tmp_path, checkpoints.BASE) == ("adapter_unsupported_feature", f"{min(MODULES)}.weight")
    empty = replace(checkpoints.BASE, weights=BaseWeights(tmp_path))
    assert refuse(tmp_path, empty) == ("adapter_unsupported_feature", "model.safetensors")


@pytest.mark.parametrize(
    "weight",
    [None, torch.ones(24, 23), torch.ones(24, 24, dtype=torch.int8), torch.ones(24, 24).to(torch.float8_e4m3fn)],
)
def test_a_base_without_that_weight(tmp_path, weight):
    tensors = {f"{m}.weight": torch.randn(w[::-1]) for m, w in checkpoints.BASE.linears.items()} | {WEIGHT: weight}
    base = checkpoints.with_weights(tmp_path / "base", tensors={k: v for k, v in tensors.items() if v is not None})
    assert refuse(tmp_path, base) == ("adapter_unsupported_feature", WEIGHT)


@pytest.mark.parametrize("cancelled", [True, False])
def test_a_row_without_length_is_refused(tmp_path, cancelled):
    """W0 + s·B·A has a zero row, or W0 has one that the adapter leaves alone."""
    tensors, base = make_tensors(), checkpoints.with_weights(tmp_path / "base")
    weights = {f"{m}.weight": torch.cat(list(base.row_blocks(m))) for m in base.linears}
    if cancelled:
        delta = 2 * tensors[f"{SITE}.lora_B.weight"] @ tensors[f"{SITE}.lora_A.weight"]
        weights[WEIGHT][5] = -delta.double()[5]
    else:
        weights[WEIGHT][5] = 0
        tensors[f"{SITE}.lora_B.weight"][5] = 0
    base = checkpoints.with_weights(tmp_path / "base", tensors={k: v.float() for k, v in weights.items()})
    assert refuse(tmp_path, base, tensors=tensors) == ("adapter_not_finite", MAGNITUDE)


def test_the_base_files_may_be_several(tmp_path):
    one = checkpoints.with_weights(tmp_path / "one")
    tensors = {f"{m}.weight": torch.cat(list(one.row_blocks(m))).float() for m in one.linears}
    names = {name: f"model-{i % 2}.safetensors" for i, name in enumerate(tensors)}
    (tmp_path / "two").mkdir()
    for file in set(names.values()):
        save_file({k: v for k, v in tensors.items() if names[k] == file}, tmp_path / "two" / file)
    (tmp_path / "two" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    two = replace(checkpoints.BASE, weights=BaseWeights(tmp_path / "two"))
    source = write_adapter(tmp_path / "adapter", make_config(), make_tensors())
    assert digest_of(lower(source, one)) == digest_of(lower(source, two))
