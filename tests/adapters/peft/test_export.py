"""A plain adapter written as a PEFT folder: PEFT loads it and computes the same, and reading it gives it back."""

import json

import pytest
import torch

from loramux_adapters import AdapterError, LoweredAdapter, lower
from loramux_adapters.native import digest_of
from loramux_adapters.peft.export import write_peft

from ..checkpoints import BASE, make_config, make_tensors, write_adapter
from ..form import logits
from ..layouts import blob, scalabl
from ..methods.conftest import Reference
from ..natives import UP, Q, make_mixture, make_site


@pytest.mark.parametrize(
    "config",
    [
        make_config(),
        make_config(lora_alpha=-3, use_rslora=True),
        make_config(rank_pattern={"k_proj": 7, "0.mlp.up_proj": 1}, target_modules=["q_proj", "k_proj", "up_proj"]),
        make_config(alpha_pattern={"q_proj": 0.3}),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_was_written_is_what_is_read(config, dtype, tmp_path):
    ranks = {module: 7 for module in BASE.linears if "k_proj" in module} | {"model.layers.0.mlp.up_proj": 1}
    tensors = make_tensors(targets=tuple(config["target_modules"]), ranks=ranks, dtype=dtype)
    adapter = lower(write_adapter(tmp_path / "source", config, tensors), BASE)
    write_peft(tmp_path / "copy", adapter, BASE.name)
    again = lower(tmp_path / "copy", BASE)
    assert digest_of(again) == digest_of(adapter) and again.warnings == ()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("layout", [blob, scalabl])
def test_peft_computes_the_mean_of_a_bayesian_adapter(layout, tmp_path):
    """ScalaBL's ranks have scales of their own, which go into B."""
    tiny = Reference("llama")
    config = layout.make_config(target_modules=["q_proj", "v_proj", "down_proj"])
    adapter = lower(write_adapter(tmp_path / "source", config, layout.make_tensors(config, tiny.base)), tiny.base)
    write_peft(tmp_path / "mean", adapter.mean, "tiny")
    expected = logits(tiny.model, adapter.mean, tiny.tokens)
    torch.testing.assert_close(tiny.library_logits(tmp_path / "mean"), expected, rtol=1e-6, atol=1e-6)
    assert json.loads((tmp_path / "mean/adapter_config.json").read_text())["r"] == 4


@pytest.mark.parametrize(
    "adapter",
    [
        make_mixture(),
        LoweredAdapter("x", {Q: make_site(bias=torch.ones(24))}),
        LoweredAdapter("x", {Q: make_site(magnitude=torch.ones(24)), UP: make_site(UP)}),
    ],
)
def test_what_is_no_plain_lora_is_refused(adapter, tmp_path):
    with pytest.raises(AdapterError) as refusal:
        write_peft(tmp_path / "out", adapter, "tiny")
    assert refusal.value.code == "adapter_unsupported_feature" and "native" in refusal.value.hint
    assert not (tmp_path / "out").exists()
