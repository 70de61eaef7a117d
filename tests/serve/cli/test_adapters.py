"""`loramux adapters`: the same facts for people and programs, a refusal with all its parts, and no vLLM."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig

from loramux.cli import main
from loramux_adapters import Gate, LoweredAdapter, LoweredSite, write_native
from loramux_adapters.gate import Select
from loramux_adapters.methods import METHODS
from loramux_adapters.native import digest_of

CONFIG = LlamaConfig(
    hidden_size=64,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=96,
    vocab_size=9,
)
SITE = "model.layers.{}.self_attn.q_proj"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    CONFIG.save_pretrained(tmp_path / "tiny-llama")
    return tmp_path / "tiny-llama"


def make_adapter(**fields: Any) -> LoweredAdapter:
    """Ranks 2, 2 and 4 in layers 0 to 2, top 1 of two experts."""
    torch.manual_seed(0)
    sites = {}
    for layer, rank in enumerate((2, 2, 4)):
        expert = torch.arange(rank, dtype=torch.int32) % 2
        sites[SITE.format(layer)] = LoweredSite(
            torch.randn(rank, 64), torch.randn(rank, 64), torch.ones(rank), gate="g", expert=expert, **fields
        )
    return LoweredAdapter("mola", sites, ("mind the gap",), {"g": Gate(torch.randn(2, 64), select=Select.TOP_K, k=1)})


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write_native(tmp_path / "mixture.safetensors", make_adapter(), "tiny-llama")


def run(capsys: pytest.CaptureFixture[str], *argv: object) -> tuple[int, str]:
    status = main(["adapters", *map(str, argv)])
    return status, capsys.readouterr().out


def test_check_for_a_person(base: Path, path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out = run(capsys, "check", path, "--base", base)
    rows = {line[:10].strip(): line[10:] for line in out.splitlines()}
    assert status == 0
    assert rows == {
        "method": "mola",
        "layout": "native (loramux)",
        "base": "fits tiny-llama",
        "sites": "3",
        "experts": "2",
        "ranks": "2..4, layers 0-1: 2, layer 2: 4",
        "size": f"{(8 * 128 + 8 + 8 + 128) * 4 / 1024:.2f} KiB, float32",
        "gates": "1 × token, top_k 1 of 2 experts",
        "posterior": "no",
        "digest": digest_of(make_adapter())[:16],
        "servable": "yes",
        "warning": "mind the gap",
    }


def test_check_for_a_program(base: Path, path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out = run(capsys, "check", path, "--base", base, "--json")
    found = json.loads(out)
    assert (status, found["servable"], found["unserved"]) == (0, True, [])
    assert found["ranks"] == {SITE.format(layer): rank for layer, rank in enumerate((2, 2, 4))}
    assert found["base"] == {"made_for": None, "checked_on": "tiny-llama"}
    assert found["gates"] == {"g": {"select": "top_k", "k": 1}} and found["experts"] == 2


def test_magnitudes_and_biases_are_counted(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter = make_adapter(magnitude=torch.ones(64))
    sites = dict(adapter.sites)
    sites[SITE.format(1)] = replace(sites[SITE.format(1)], bias=torch.ones(64))
    path = write_native(tmp_path / "dora.safetensors", replace(adapter, sites=sites), "tiny-llama")
    status, out = run(capsys, "check", path, "--base", base)
    assert status == 0 and "outputs   scaled at 3 sites, shifted at 1\n" in out
    status, out = run(capsys, "check", path, "--base", base, "--json")
    assert (json.loads(out)["magnitudes"], json.loads(out)["biases"]) == (3, 1)


def test_what_cannot_be_served_is_named_and_shown(base: Path, tmp_path: Path, capsys: Any) -> None:
    adapter = make_adapter(magnitude=torch.ones(2, 64))
    path = write_native(tmp_path / "dora.safetensors", adapter, "tiny-llama")
    status, out = run(capsys, "check", path, "--base", base)
    field = f"sites.{SITE.format(0)}.magnitude"
    assert status == 1 and f"servable  no: {field}: " in out
    status, out = run(capsys, "show", path, "--json")
    assert status == 0
    assert [obstacle.partition(": ")[0] for obstacle in json.loads(out)["unserved"]] == [
        f"sites.{SITE.format(layer)}.magnitude" for layer in range(3)
    ]


def test_show_needs_no_base_for_a_native_file(path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_args: object, **_kwargs: object) -> None:
        raise AssertionError("a base was looked for")

    monkeypatch.setattr("loramux.cli.base.prepare_base", fail)
    status, out = run(capsys, "show", path)
    assert status == 0 and "tiny-llama (not checked)" in out


def test_show_still_checks_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter = make_adapter()
    sites = {name: replace(site, scale=site.scale * float("nan")) for name, site in adapter.sites.items()}
    path = write_native(tmp_path / "nan.safetensors", replace(adapter, sites=sites), "tiny-llama")
    status, out = run(capsys, "show", path)
    assert status == 1 and "adapter_not_finite" in out


def test_a_refusal_has_all_its_parts(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = {name.replace("layers", "blocks"): site for name, site in make_adapter().sites.items()}
    path = write_native(tmp_path / "x.safetensors", replace(make_adapter(), sites=other), "tiny-llama")
    status, out = run(capsys, "check", path, "--base", base, "--json")
    error = json.loads(out)["error"]
    assert (status, error["code"], error["field"]) == (
        1,
        "adapter_wrong_base",
        SITE.format(0).replace("layers", "blocks"),
    )
    status, out = run(capsys, "check", path, "--base", base)
    assert status == 1
    assert all(error[part] in out for part in ("code", "field", "message", "hint"))


def test_a_base_that_is_not_there(path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["adapters", "check", str(path), "--base", str(tmp_path)]) == 1
    assert "config.json" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("config", "layout"),
    [
        ({"peft_type": "LORA", "r": "eight"}, "LoRA, rsLoRA (PEFT)"),
        ({"peft_type": "XLORA"}, "X-LoRA (PEFT)"),
        ({"peft_type": "ADAMOLE"}, "AdaMoLE (zefang-liu/AdaMoLE)"),
        ({"peft_type": "LOHA"}, None),
    ],
)
def test_what_is_refused_is_named_too(config: Any, layout: str | None, base: Path, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter/adapter_config.json").write_text(json.dumps(config))
    status, out = run(capsys, "check", tmp_path / "adapter", "--base", base, "--json")
    assert status == 1 and json.loads(out)["layout"] == layout
    status, out = run(capsys, "check", tmp_path / "adapter", "--base", base)
    assert out.startswith("refused" if layout is None else f"layout    {layout}\nrefused")


def test_every_method_is_listed(capsys: pytest.CaptureFixture[str]) -> None:
    """A table, and under it the layouts of each and what does not fit into it."""
    status, out = run(capsys, "methods")
    table, *details = out.strip().split("\n\n")
    assert status == 0
    assert [line.split()[0] for line in table.splitlines()] == ["method", *(method.name for method in METHODS)]
    assert [text.splitlines()[0] for text in details] == [method.name for method in METHODS]
    for method, text in zip(METHODS, details, strict=True):
        assert all(str(layout) in text for layout in method.abilities.layouts) and method.abilities.why in text
    listed = json.loads(run(capsys, "methods", "--json")[1])
    assert [row["name"] for row in listed] == [method.name for method in METHODS]
    assert [row["serve"] for row in listed] == [method.abilities.serve for method in METHODS]
    assert {layout["origin"] for row in listed for layout in row["layouts"]} > {"PEFT", "loramux"}


def test_it_runs_without_vllm_and_a_gpu(base: Path, path: Path) -> None:
    code = (
        "import sys\nsys.modules['vllm'] = None\nfrom loramux.cli import main\n"
        f"status = main(['adapters', 'check', {str(path)!r}, '--base', {str(base)!r}])\n"
        "import torch\nassert not torch.cuda.is_initialized()\nsys.exit(status)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "servable  yes" in done.stdout
