"""Ensembles: every draw is a member as PEFT loads it, ordinary requests get the first one."""

import json

import pytest
import torch

from loramux_adapters import AdapterError, draw, lower, posterior_of, prepare

from ..checkpoints import BASE, make_config, make_tensors, write_adapter
from ..form import logits

NAMES = ["first", "second", "third"]


def write(folder, names=NAMES, **changes):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "ENSEMBLE", "adapters": names} | changes))
    return folder


def drawn(adapter, sample):
    return draw(adapter, digest="d", seed=0, sample=sample)


@pytest.mark.filterwarnings("ignore")
def test_members_are_peft_s(reference, tmp_path):
    """Also with other ranks, scales, dtypes and modules."""
    tiny = reference("llama")
    options = [
        {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]},
        {"r": 2, "lora_alpha": 3, "target_modules": ["q_proj", "down_proj"], "dtype": torch.bfloat16},
        {"r": 6, "use_rslora": True, "target_modules": ["q_proj", "v_proj"], "rank_pattern": {"v_proj": 1}},
    ]
    for name, option in zip(NAMES, options, strict=True):
        tiny.save(tmp_path / name, **option)
    adapter = lower(write(tmp_path), tiny.base)
    assert posterior_of(adapter).samples == 3 and adapter.posterior == "ensemble"
    assert prepare(tmp_path, tiny.base, tmp_path / "cache").summary.bayesian
    expected = [tiny.library_logits(tmp_path / name) for name in NAMES]
    for sample, member in enumerate(expected):
        tiny.assert_same(drawn(adapter, sample), member)
    tiny.assert_same(adapter.mean, expected[0])
    one, other = (logits(tiny.model, each, tiny.tokens) for each in (adapter.mean, drawn(adapter, 0)))
    assert torch.equal(one, other)
    with pytest.raises(AdapterError) as refusal:
        drawn(adapter, 3)
    assert refusal.value.field == "sample"


def test_a_member_is_kept_in_its_own_dtype(tmp_path):
    for seed, name in enumerate(NAMES):
        write_adapter(tmp_path / name, make_config(), make_tensors(dtype=torch.bfloat16, seed=seed))
    adapter = lower(write(tmp_path), BASE)
    alone = lower(tmp_path / "third", BASE)
    for module, site in drawn(adapter, 2).sites.items():
        for name in ("a", "b", "scale"):
            mine, own = getattr(site, name), getattr(alone.sites[module], name)
            assert mine.dtype == own.dtype and torch.equal(mine, own)


@pytest.mark.parametrize(
    ("changes", "code", "field"),
    [
        ({"adapters": []}, "adapter_config_invalid", "adapters"),
        ({"adapters": ["first", "first"]}, "adapter_config_invalid", "adapters"),
        ({"adapters": ["first", "../first"]}, "adapter_unsafe_file", "../first"),
        ({"adapters": ["first", "nowhere"]}, "adapter_not_found", None),
        ({"weights": [1, 2, 3]}, "adapter_unsupported_feature", "weights"),
        ({"temperature": 2}, "adapter_unsupported_feature", "temperature"),
    ],
)
def test_refusals(changes, code, field, tmp_path):
    for name in NAMES:
        write_adapter(tmp_path / name)
    with pytest.raises(AdapterError) as refusal:
        lower(write(tmp_path, **changes), BASE)
    assert refusal.value.code == code and (field is None or refusal.value.field == field)


def test_members_that_would_be_huge_when_filled_up_are_refused(tmp_path):
    """Many of rank 1 and one of rank 4 at every module."""
    for i, name in enumerate(NAMES):
        ranks = dict.fromkeys(BASE.linears, 64 if i == 0 else 1)
        config = make_config(rank_pattern=ranks)
        write_adapter(tmp_path / name, config, make_tensors(ranks=ranks))
    size = sum((tmp_path / name / "adapter_model.safetensors").stat().st_size for name in NAMES)
    with pytest.raises(AdapterError) as refusal:
        lower(write(tmp_path), BASE, max_bytes=2 * size)
    assert refusal.value.code == "adapter_too_large"
    lower(tmp_path, BASE, max_bytes=5 * size)
