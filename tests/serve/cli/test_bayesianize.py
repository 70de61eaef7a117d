"""`loramux adapters bayesianize` and `mean`: what they write is what the library makes, and nothing is overwritten."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from loramux.cli.adapters import main
from loramux_adapters import BaseModel, lower
from loramux_adapters.native import digest_of
from loramux_adapters.posterior.tfb import tfb

CONFIG = LlamaConfig(
    hidden_size=32,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=2,
    intermediate_size=48,
    vocab_size=50,
)
Q = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base with a tokeniser of whole words, a LoRA for it, and texts."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("bayesianize")
    AutoModelForCausalLM.from_config(CONFIG).save_pretrained(folder / "base")
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(50)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0").save_pretrained(folder / "base")
    (folder / "lora").mkdir()
    factors = {"A": torch.randn(4, 32), "B": torch.randn(32, 4)}
    named = {f"base_model.model.{Q}.lora_{name}.weight": factor for name, factor in factors.items()}
    save_file(named, folder / "lora/adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}
    (folder / "lora/adapter_config.json").write_text(json.dumps(config))
    lines = [{"text": "w1 w2 w3 w4 w5 w6"}, {"text": "w9 w8 w7"}]
    (folder / "texts.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


def run(place: Path, command: str, source: str, out: Path, *options: str) -> int:
    return main([command, str(place / source), "--base", str(place / "base"), "--out", str(out), *options])


def test_with_a_sigma_it_is_tfb_s(place: Path, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "out.safetensors"
    assert run(place, "bayesianize", "lora", out, "--sigma", "0.5", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    base = BaseModel.from_pretrained(place / "base")
    assert digest_of(lower(out, base)) == digest_of(tfb(lower(place / "lora", base), base, 0.5))
    assert (found["sigma_q"], found["posterior"], found["search"]) == (0.5, "diagonal_a", None)
    assert found["bytes"] == 4 * (3 * 4 * 32 + 4)
    assert found["draw_bytes"] == 4 * (4 * 32 + 4)  # B is the mean's
    assert main(["check", str(out), "--base", str(place / "base")]) == 0
    assert "posterior diagonal_a at 1 sites; 528 B a draw" in capsys.readouterr().out


def test_on_texts_it_finds_one(place: Path, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "out.safetensors"
    options = ("--anchors", str(place / "texts.jsonl"), "--change", "0.05", "--samples", "2", "--steps", "4")
    assert run(place, "bayesianize", "lora", out, *options) == 0
    told = capsys.readouterr()
    assert "2 texts, 9 tokens" in told.err and told.err.count("σ_q") == 4
    assert "nats" in told.out and lower(out, BaseModel.from_pretrained(place / "base")).bayesian
    assert run(place, "bayesianize", "lora", out, *options) == 1
    assert "--force" in capsys.readouterr().err
    assert run(place, "bayesianize", "lora", out, *options, "--force") == 0


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (("--sigma", "1e9"), "σ_q"),
        (("--anchors", "nowhere.jsonl"), "nowhere"),
        (("--sigma", "0.1", "--samples", "0"), "samples"),
    ],
)
def test_refusals(options: tuple[str, ...], word: str, place: Path, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "out.safetensors"
    assert run(place, "bayesianize", "lora", out, *options) == 1
    assert word in capsys.readouterr().err and not out.exists()


@pytest.mark.parametrize("options", [(), ("--sigma", "0"), ("--sigma", "x"), ("--sigma", "1", "--anchors", "x")])
def test_malformed_command_lines(options: tuple[str, ...], place: Path, tmp_path: Path, capsys: Any) -> None:
    with pytest.raises(SystemExit) as stop:
        run(place, "bayesianize", "lora", tmp_path / "out.safetensors", *options)
    assert stop.value.code == 2 and capsys.readouterr().err


def test_a_bayesian_adapter_is_not_made_one_again(place: Path, tmp_path: Path, capsys: Any) -> None:
    first = tmp_path / "first.safetensors"
    assert run(place, "bayesianize", "lora", first, "--sigma", "0.5") == 0
    assert main(["bayesianize", str(first), "--base", str(place / "base"), "--out", str(tmp_path / "x.safetensors"),
                 "--sigma", "0.5"]) == 1  # fmt: skip
    assert "variance" in capsys.readouterr().err


def test_the_mean_is_written_as_a_native_file_and_as_a_peft_folder(place: Path, tmp_path: Path, capsys: Any) -> None:
    bayesian, base = tmp_path / "bayesian.safetensors", BaseModel.from_pretrained(place / "base")
    assert run(place, "bayesianize", "lora", bayesian, "--sigma", "0.5") == 0
    expected = lower(bayesian, base).mean
    for out in (tmp_path / "mean.safetensors", tmp_path / "mean"):
        command = ["mean", str(bayesian), "--base", str(place / "base"), "--out", str(out)]
        assert main(command) == 0
        assert "diagonal_a, left out" in capsys.readouterr().out
        found = lower(out, base)
        assert not found.bayesian and digest_of(found) == digest_of(expected)
        assert main(command) == 1 and main([*command, "--force"]) == 0
