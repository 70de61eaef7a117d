"""`loramux adapters extract` writes what `extract` finds, says what is lost, and overwrites nothing."""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from loramux.cli.adapters import main as adapters
from loramux.cli.extract import main
from loramux_adapters import BaseModel, lower, unserved
from loramux_adapters.applied import applied

CONFIG = LlamaConfig(
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=2,
    intermediate_size=48,
    vocab_size=50,
    tie_word_embeddings=True,
)
CHANGED = "model.layers.1.mlp.up_proj"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A base, and the same with a product of rank 3 merged into one layer, as transformers saves them."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("models")
    base = AutoModelForCausalLM.from_config(CONFIG).eval()
    base.save_pretrained(folder / "base")
    merged = deepcopy(base)
    with torch.no_grad():
        merged.get_submodule(CHANGED).weight += torch.randn(48, 3) @ torch.randn(3, 32) / 8
    merged.save_pretrained(folder / "merged")
    return {"folder": folder, "base": base, "merged": merged}


@pytest.fixture
def run(models: dict[str, Any], tmp_path: Path) -> Any:
    folder = models["folder"]

    def call(*options: str, merged: str = "merged", base: str = "base") -> int:
        out = str(tmp_path / "out.safetensors")
        return main([str(folder / merged), "--base", str(folder / base), "--out", out, *options])

    return call


def test_the_adapter_on_the_base_is_the_merged_model(
    run: Any, models: dict[str, Any], tmp_path: Path, capsys: Any
) -> None:
    assert run("--error", "1e-4", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["modules"].keys() == {CHANGED} and found["unchanged"] == 13
    assert found["modules"][CHANGED]["rank"] == 3 and 0 < found["error"]["max"] < 1e-5
    adapter = lower(tmp_path / "out.safetensors", BaseModel.from_pretrained(models["folder"] / "base"))
    assert not unserved(adapter) and adapter.nbytes() == found["bytes"]
    tokens = torch.arange(12)[None]
    with torch.no_grad(), applied(models["base"], adapter):
        answer = models["base"](tokens).logits
    with torch.no_grad():
        torch.testing.assert_close(answer, models["merged"](tokens).logits, rtol=1e-4, atol=1e-4)


def test_check_states_the_errors(run: Any, models: dict[str, Any], tmp_path: Path, capsys: Any) -> None:
    assert run("--rank", "2") == 0
    lines = capsys.readouterr().out
    assert CHANGED in lines and "2..2" in lines and "13 layers are the base's own" in lines
    assert adapters(["check", str(tmp_path / "out.safetensors"), "--base", str(models["folder"] / "base")]) == 0
    said = capsys.readouterr().out
    assert "Extracted from merged weights" in said and "Error of model.layers.*.mlp.up_proj by layer: 1 0." in said


def test_nothing_is_overwritten_without_force(run: Any, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "out.safetensors"
    out.write_bytes(b"mine")
    assert run("--rank", "1") == 1
    assert "--force" in capsys.readouterr().err and out.read_bytes() == b"mine"
    assert run("--rank", "1", "--force") == 0


@pytest.mark.parametrize(
    ("options", "folders", "words"),
    [
        (["--rank", "0"], {}, "rank"),
        (["--error", "2"], {}, "error"),
        (["--error", "1e-4", "--max-rank", "2"], {}, "higher rank"),
        (["--rank", "1"], {"merged": "nowhere"}, "not on this machine"),
        (["--rank", "1"], {"base": "nowhere"}, "nowhere"),
        (["--rank", "1"], {"merged": "base"}, "weights are those of base"),
        (["--rank", "1", "--out", "/nowhere/x.safetensors"], {}, "/nowhere"),
    ],
)
def test_refusals(
    run: Any, tmp_path: Path, capsys: Any, options: list[str], folders: dict[str, str], words: str
) -> None:
    assert run(*options, **folders) == 1
    captured = capsys.readouterr()
    assert words in captured.err and captured.out == "" and not (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize(
    "argv",
    [["x"], ["x", "--base", "y", "--out", "z.safetensors"], ["x", "--base", "y", "--out", "z.bin", "--rank", "1"],
     ["x", "--base", "y", "--out", "z.safetensors", "--rank", "1", "--error", "0.1"]],
)  # fmt: skip
def test_wrong_arguments_show_the_usage(argv: list[str]) -> None:
    with pytest.raises(SystemExit) as exit_status:
        adapters(["extract", *argv])
    assert exit_status.value.code == 2
