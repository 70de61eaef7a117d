"""`loramux adapters compose arrow` writes what `arrow` composes, and says why when it cannot."""

import json

import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig

from loramux.cli.compose import main
from loramux_adapters import BaseModel, lower
from loramux_adapters.compose.arrow import arrow
from loramux_adapters.native import digest_of

CONFIG = LlamaConfig(
    hidden_size=32,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=2,
    intermediate_size=48,
    vocab_size=11,
)


@pytest.fixture
def base(tmp_path):
    CONFIG.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def loras(tmp_path):
    generator = torch.Generator().manual_seed(0)
    paths = []
    for i in range(3):
        paths.append(tmp_path / f"lora{i}")
        paths[-1].mkdir()
        config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
        (paths[-1] / "adapter_config.json").write_text(json.dumps(config))
        key = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"
        factors = {"A": (2, 32), "B": (32, 2)}
        tensors = {key.format(name): torch.randn(shape, generator=generator) for name, shape in factors.items()}
        save_file(tensors, paths[-1] / "adapter_model.safetensors")
    return paths


def run(base, loras, out, *options):
    named = [f"n{i}={path}" for i, path in enumerate(loras)]
    return main(["arrow", *named, "--base", str(base), "--out", str(out), *options])


def test_the_file_holds_the_composed_adapter(base, loras, tmp_path, capsys):
    out = tmp_path / "out.safetensors"
    assert run(base, loras, out, "--top-k", "2", "--temperature", "0.5") == 0
    model = BaseModel.from_pretrained(base)
    expected = arrow([(f"n{i}", lower(p, model)) for i, p in enumerate(loras)], base=model, top_k=2, temperature=0.5)
    assert digest_of(lower(out, model)) == digest_of(expected)
    said = capsys.readouterr().out
    assert "n0, n1, n2" in said and "1, rank 6" in said


def test_as_json(base, loras, tmp_path, capsys):
    out = tmp_path / "out.safetensors"
    assert run(base, loras, out, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["out"], found["method"], found["experts"]) == (str(out), "arrow", ["n0", "n1", "n2"])
    assert found["ranks"] == {"model.layers.0.self_attn.q_proj": 6} and found["bytes"] > 0


def test_nothing_is_overwritten_without_force(base, loras, tmp_path, capsys):
    out = tmp_path / "out.safetensors"
    out.write_bytes(b"mine")
    assert run(base, loras, out) == 1
    assert "--force" in capsys.readouterr().err and out.read_bytes() == b"mine"
    assert run(base, loras, out, "--force") == 0 and out.read_bytes() != b"mine"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--top-k", "4"], "top_k"),
        (["--temperature", "0"], "temperature"),
        (["--base", "/nowhere"], "/nowhere"),
        (["--out", "/nowhere/x.safetensors"], "/nowhere"),
    ],
)
def test_refusals_are_one_line_and_what_to_do(base, loras, tmp_path, capsys, options, words):
    assert run(base, loras, tmp_path / "out.safetensors", *options) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith("loramux adapters compose: ") and captured.out == ""
    assert words in captured.err and captured.err.count("\n") <= 2
    assert not (tmp_path / "out.safetensors").exists()


def test_names_must_differ(base, loras, tmp_path, capsys):
    twice = [f"same={path}" for path in loras]
    assert main(["arrow", *twice, "--base", str(base), "--out", str(tmp_path / "out.safetensors")]) == 1
    assert "same" in capsys.readouterr().err


@pytest.mark.parametrize(
    "argv", [["arrow", "path"], ["arrow", "n=", "--out", "x.safetensors"], ["arrow", "n=p", "--out", "x.bin"]]
)
def test_wrong_arguments_show_the_usage(argv):
    with pytest.raises(SystemExit) as exit_status:
        main(argv)
    assert exit_status.value.code == 2
