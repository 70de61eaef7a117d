"""`loramux adapters compact` writes what `compact` makes, says what it cost, and overwrites nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from loramux.cli.adapters import main as adapters
from loramux.cli.compact import main
from loramux_adapters import BaseModel, LoweredAdapter, LoweredSite, lower, unserved
from loramux_adapters.native import write_native

from ...adapters.checkpoints import write_adapter
from ...adapters.compact.mixtures import mixture
from ...adapters.compact.tiny import CONFIG, make_model, make_tokenizer
from ...adapters.layouts import moelora

LABELLED = {"weather": {"instruction": "which", "examples": [{"text": "rain", "label": "yes"}]}}


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "tiny"
    make_model().save_pretrained(path)
    make_tokenizer().save_pretrained(path)
    return path


@pytest.fixture
def files(tmp_path: Path, base: Path) -> Path:
    """A folder with a mixture of four experts, a plain LoRA, and texts of every kind."""
    experts = mixture((3, 3, 3, 3))
    write_native(tmp_path / "mixture.safetensors", experts, "tiny")
    plain = {name: LoweredSite(site.a[:6], site.b[:6], site.scale[:6]) for name, site in experts.sites.items()}
    write_native(tmp_path / "plain.safetensors", LoweredAdapter("lora", plain), "tiny")
    chat = {"messages": [{"role": "user", "content": "rain"}]}
    (tmp_path / "texts.jsonl").write_text(json.dumps({"text": "rain sun yes"}) + "\n" + json.dumps(chat))
    used = [{"expert": e, "weight": w} for e, w in enumerate((0.4, 0.3, 0.2, 0.1))]
    (tmp_path / "traffic.jsonl").write_text(json.dumps({"routing": {"decisions": 8, "experts": used}}))
    (tmp_path / "labelled.json").write_text(json.dumps(LABELLED))
    return tmp_path


def run(files: Path, base: Path, name: str, *options: str) -> int:
    out = files / "out.safetensors"
    return main([str(files / f"{name}.safetensors"), "--out", str(out), "--base", str(base), *options])


def report(capsys: Any) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_a_mixture_with_everything_measured(files: Path, base: Path, capsys: Any) -> None:
    texts = ("--calibration", str(files / "texts.jsonl"), "--labelled", str(files / "labelled.json"))
    assert run(files, base, "mixture", "--experts", "2", "--even", *texts, "--json") == 0
    found = report(capsys)
    written = lower(files / "out.safetensors", BaseModel.from_pretrained(base))
    assert unserved(written) == [] and written.method == "mola/compact"
    assert (found["before"]["experts"], found["after"]["experts"]) == (4, 2)
    assert found["after"]["rank_rows"] == sum(written.ranks.values()) < found["before"]["rank_rows"] == 24
    assert found["after"]["file_bytes"] == written.nbytes() < found["before"]["file_bytes"]
    assert all(found["after"]["pool_bytes"][d] < found["before"]["pool_bytes"][d] for d in ("bfloat16", "float32"))
    assert found["modules"].keys() == written.sites.keys()
    worst = max(found["modules"].values(), key=lambda module: module["weights"])
    assert found["error"]["weights"]["max"] == worst["weights"] > 0
    assert all(0 < module["outputs"] < 2 for module in found["modules"].values())
    assert found["calibration_tokens"] == 3 + 4
    (task,) = found["quality"]
    assert (task["task"], task["n"], len(task["right"]), len(task["nats"])) == ("weather", 1, 2, 2)
    assert any("compacted from" in warning for warning in written.warnings)
    assert adapters(["check", str(files / "out.safetensors"), "--base", str(base)]) == 0
    assert "of 4 experts in 2 groups" in capsys.readouterr().out


def test_served_traffic_tells_what_is_used(files: Path, base: Path, capsys: Any) -> None:
    assert run(files, base, "mixture", "--experts", "3", "--even", "--traffic", str(files / "traffic.jsonl")) == 0
    lines = capsys.readouterr().out
    assert "4 -> 3 in the mean" in lines and "of outputs" not in lines and "quality" not in lines


def test_a_plain_lora_to_a_bound(files: Path, base: Path, capsys: Any) -> None:
    assert run(files, base, "plain", "--error", "0.5", "--json") == 0
    found = report(capsys)
    assert 0 < found["error"]["weights"]["max"] <= 0.5
    assert found["after"]["rank_rows"] < found["before"]["rank_rows"] == 12


def test_one_task_of_several_is_a_plain_lora_to_be_cut(files: Path, base: Path, capsys: Any) -> None:
    config = moelora.make_config(task_id=2)
    table = lower(write_adapter(files / "tasks", config, moelora.make_tensors(config)), BaseModel.from_pretrained(base))
    write_native(files / "tasks.safetensors", table, "tiny")
    assert run(files, base, "tasks", "--rank", "2", "--json") == 0
    assert report(capsys)["before"]["rank_rows"] == sum(table.ranks.values())
    written = lower(files / "out.safetensors", BaseModel.from_pretrained(base))
    assert not written.gates and set(written.ranks.values()) == {2}


def test_what_saves_nothing_loses_nothing(files: Path, base: Path, capsys: Any) -> None:
    assert run(files, base, "plain", "--rank", "64", "--json") == 0
    found = report(capsys)
    assert found["error"]["weights"]["max"] == 0 and found["before"] == found["after"]
    assert lower(files / "out.safetensors", BaseModel.from_pretrained(base)).warnings == ()


def test_nothing_is_overwritten_without_force(files: Path, base: Path, capsys: Any) -> None:
    out = files / "out.safetensors"
    out.write_bytes(b"mine")
    assert run(files, base, "plain", "--rank", "1") == 1
    assert "--force" in capsys.readouterr().err and out.read_bytes() == b"mine"
    assert run(files, base, "plain", "--rank", "1", "--force") == 0
    assert out.stat().st_size > 100


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("mixture", [], "Give experts"),
        ("mixture", ["--experts", "2"], "calibration texts"),
        ("mixture", ["--experts", "9", "--calibration", "texts.jsonl"], "at most 4"),
        ("plain", ["--experts", "2"], "no mixture"),
        ("plain", ["--rank", "0"], "rank"),
        ("plain", ["--error", "1.5"], "error"),
        ("plain", ["--rank", "1", "--base", "/nowhere"], "/nowhere"),
        ("plain", ["--rank", "1", "--out", "/nowhere/x.safetensors"], "/nowhere"),
        ("nothing", ["--rank", "1"], "nothing"),
        ("mixture", ["--experts", "2", "--calibration", "labelled.json"], "labelled.json:1"),
        ("mixture", ["--experts", "2", "--traffic", "texts.jsonl"], "texts.jsonl:1"),
        ("plain", ["--rank", "1", "--labelled", "texts.jsonl"], "texts.jsonl"),
        ("plain", ["--rank", "1", "--calibration", "none.jsonl"], "none.jsonl"),
    ],
)
def test_refusals(
    files: Path, base: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch, name: str, options: list[str], words: str
) -> None:
    monkeypatch.chdir(files)
    assert run(files, base, name, *options) == 1
    captured = capsys.readouterr()
    assert words in captured.err and captured.err.splitlines()[-1].strip() and captured.out == ""
    assert not (files / "out.safetensors").exists()


def test_a_base_without_weights_can_be_compacted_on_but_not_run(files: Path, base: Path, capsys: Any) -> None:
    bare = files / "bare"
    CONFIG.save_pretrained(bare)
    assert run(files, bare, "plain", "--rank", "1") == 0
    texts = ("--calibration", str(files / "texts.jsonl"), "--force")
    assert run(files, bare, "plain", "--rank", "1", *texts) == 1
    assert "bare cannot be run here" in capsys.readouterr().err


@pytest.mark.parametrize(
    "argv",
    [["x"], ["x", "--out", "y.bin"], ["x", "--out", "y.safetensors", "--experts", "many"],
     ["x", "--out", "y.safetensors", "--calibration", "a", "--traffic", "b"]],
)  # fmt: skip
def test_wrong_arguments_show_the_usage(argv: list[str]) -> None:
    with pytest.raises(SystemExit) as exit_status:
        adapters(["compact", *argv])
    assert exit_status.value.code == 2
