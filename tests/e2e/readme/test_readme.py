"""What the README says is true: its code runs, its commands work, its numbers are the measured ones.

With LORAMUX_TEST_URL the code runs against that server (CI starts one by `make serve`), else against the fixture's.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest

from loramux.config import parse

ROOT = Path(__file__).parents[3]
README = (ROOT / "README.md").read_text()


def _block(language: str, containing: str) -> str:
    blocks = re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    (found,) = [block for block in blocks if containing in block]
    return str(found)


@pytest.fixture
def url(request: pytest.FixtureRequest) -> str:
    given = os.environ.get("LORAMUX_TEST_URL")
    return given or str(request.getfixturevalue("server").url)


def _run(*blocks: str) -> list[str]:
    """Lines that the blocks print, one after the other in one interpreter."""
    written, names = io.StringIO(), dict[str, Any]()
    with contextlib.redirect_stdout(written):
        for block in blocks:
            exec(compile(block, "README.md", "exec"), names)
    return written.getvalue().strip().splitlines()


@pytest.mark.engine
def test_openai_snippets(url: str) -> None:
    first, second = _block("python", "OpenAI("), _block("python", "extra_body")
    base, adapter, models, mail, story = _run(first.replace("http://127.0.0.1:8000", url), second)
    assert base.split()[0] == "smollm2-135m-instruct" and "sarcastic" not in base.split()[1].lower()
    assert adapter.split() == ["sarcasm", "sarcastic"]
    assert {"smollm2-135m-instruct", "spam", "sarcasm", "news", "desk"} <= set(re.findall(r"[\w.-]+", models))
    assert mail.split()[0] == "spam" and story.split()[0] == "sport"
    by_mail, by_story = (
        {name: float(weight) for name, weight in re.findall(r"(\w+) (\d\.\d+)", line)} for line in (mail, story)
    )
    assert sum(by_mail.values()) == pytest.approx(1, abs=0.02)
    assert by_mail["spam"] > by_story["spam"] + 0.02 and by_story["news"] > by_mail["news"] + 0.02


@pytest.mark.engine
def test_load_curl(server: Any, spare_adapters: Path) -> None:
    command = _block("sh", "load_lora_adapter").split("\n", 1)[1]
    command = command.replace("localhost:8000", server.url).replace(
        "/srv/adapters/mine", str(spare_adapters / "spare0")
    )
    answer = json.loads(subprocess.run(command, shell=True, capture_output=True, check=True).stdout)
    assert answer["model"]["id"] == "mine" and answer["model"]["adapter"]["state"] == "resident"
    assert httpx.post(f"{server.url}/v1/unload_lora_adapter", json={"lora_name": "mine"}).status_code == 200


@pytest.mark.engine
def test_dry_run_checks_and_plans(spare_adapters: Path, tmp_path: Path) -> None:
    command = _block("sh", "--dry-run").split("#")[0].split()
    assert command[:3] == ["loramux", "serve", "BASE"]
    arguments = [
        text.replace("BASE", "smollm2-135m-instruct").replace("./mine", str(spare_adapters / "spare0"))
        for text in command[1:]
    ]
    result = subprocess.run([sys.executable, "-m", "loramux", *arguments], capture_output=True, text=True, check=True)
    assert "memory plan" in result.stdout and "mine" in result.stdout
    (tmp_path / "adapter_config.json").write_text("{}")
    arguments[-2] = f"mine={tmp_path}"
    refused = subprocess.run([sys.executable, "-m", "loramux", *arguments], capture_output=True, text=True)
    assert refused.returncode == 1 and "Not started: mine" in refused.stdout


def test_adapter_commands(tmp_path: Path) -> None:
    check, *making = (line.split()[1:] for line in _block("sh", "adapters compose").strip().splitlines())
    commands = [check]
    for arguments in making:
        made = str(tmp_path / arguments[-1])
        commands += [[*arguments[:-1], made], ["adapters", "show", made]]
    for arguments in commands:
        command = [sys.executable, "-m", "loramux", *arguments]
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert result.returncode == 0, result.stdout + result.stderr


def test_yaml_is_understood(tmp_path: Path) -> None:
    (tmp_path / "loramux.yaml").write_text(_block("yaml", "adapter-memory"))
    config = parse(["-c", str(tmp_path / "loramux.yaml")])
    assert config.base == "smollm2-135m-instruct" and config.adapters == {"mine": Path("/srv/adapters/mine")}
    assert config.adapter_dirs == (Path("adapters/examples"),) and config.adapter_memory == 2 * 2**30
    assert config.engine_args == ("--max-model-len", "2048")


def _rows(columns: int, first: str) -> list[list[str]]:
    """Cells of the README's table rows of so many columns whose first cell matches."""
    rows = [line.strip("| ").split(" | ") for line in README.splitlines() if line.startswith("| ")]
    return [cells for cells in rows if len(cells) == columns and re.fullmatch(first, cells[0])]


def test_example_accuracies_are_the_measured_ones() -> None:
    results = json.loads((ROOT / "adapters" / "examples" / "results.json").read_text())
    (desk,) = (row["tasks"] for row in results.values() if "tasks" in row)
    margin = float(re.search(r"at least (\d+) points", README)[1]) / 100  # type: ignore[index]
    told = {cells[0].strip("`"): cells[-2:] for cells in _rows(5, r"`\w+`")}
    assert told.keys() == desk.keys()
    for task, cells in told.items():
        assert f"{desk[task]['generated']:.0%} ({task})" in README
        base, adapter = results[task]["base"]["held_out"], results[task]["adapter"]["held_out"]
        assert cells == [f"{scores['generated']:.0%} / {scores['ranked']:.0%}" for scores in (base, adapter)]
        assert adapter["ranked"] >= base["ranked"] + margin and base["n"] == adapter["n"] == 400


def test_what_loads_cost_is_what_was_measured() -> None:
    with (ROOT / "tests" / "benchmarks" / "results" / "engine_loads.csv").open() as file:
        alone, beside = [row for row in csv.DictReader(file) if row["engine"] == "loramux"][-2:]
    assert alone["loads"] == "0"
    assert f"is {alone['p99_ms']} ms, and\n{beside['p99_ms']} ms while {beside['loads']} other adapters" in README


def test_speeds_are_the_measured_ones() -> None:
    """The newest measurement of loramux, all of it, beside the newest of the stock engine on the same card."""
    newest: dict[tuple[str, str, int, int], dict[str, str]] = {}
    with (ROOT / "tests" / "benchmarks" / "results" / "engine_decode.csv").open() as file:
        for row in sorted(csv.DictReader(file), key=lambda row: row["date"]):
            if (row["prompt"], row["output"]) == ("128", "128"):
                newest[row["engine"], row["kind"], int(row["requests"]), int(row["adapters"])] = row
    ours = {case: row for case, row in newest.items() if case[0] == "loramux"}
    latest = max(row["date"] for row in ours.values())
    ours = {case: row for case, row in ours.items() if row["date"] == latest}
    told = {}
    for requests, adapters, *cells in _rows(6, r"\d+"):
        count, kind = adapters.split()
        told["loramux", kind, int(requests), int(count)] = cells
    assert told.keys() == {case for case in ours if case[1] != "base"}
    for (engine, kind, requests, adapters), cells in told.items():
        row, base = ours[engine, kind, requests, adapters], ours[engine, "base", requests, 0]
        stock = newest.get(("stock", kind, requests, adapters))
        assert {row["device"], base["device"], (stock or row)["device"]} == {"NVIDIA H100 80GB HBM3"}
        assert float(row["share_of_base"]) == pytest.approx(float(base["seconds"]) / float(row["seconds"]), abs=1e-3)
        assert cells == [
            f"{int(base['tokens_per_s']):,}",
            f"{int(row['tokens_per_s']):,}",
            f"{float(row['share_of_base']):.0%}",
            f"{float(stock['share_of_base']):.0%}" if stock else "cannot",
        ]
