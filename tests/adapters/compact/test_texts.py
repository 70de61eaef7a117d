"""Files for compaction: what is read, and what is refused by its line or field."""

import json
from pathlib import Path
from typing import Any

import pytest

from loramux_adapters import AdapterError
from loramux_adapters.compact import texts
from loramux_adapters.compact.texts import read_calibration, read_tasks, read_traffic


def write(path: Path, *lines: Any) -> Path:
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return path


def refused(read: Any, *arguments: Any) -> str | None:
    with pytest.raises(AdapterError) as refusal:
        read(*arguments)
    assert refusal.value.code == "adapter_config_invalid" and refusal.value.hint
    return refusal.value.field


def test_calibration_lines_are_texts_or_chats(tmp_path: Path, tokenizer: Any) -> None:
    chat = {"messages": [{"role": "user", "content": "rain one"}]}
    path = write(tmp_path / "c.jsonl", {"text": "sun snow"}, "", chat, {"text": ""})
    found = [ids.tolist() for ids in read_calibration(path, tokenizer)]
    words = [tokenizer.convert_ids_to_tokens(ids) for ids in found]
    assert words == [["sun", "snow"], ["user", "rain", "one", "<end>", "assistant"]]


def test_long_texts_are_cut(tmp_path: Path, tokenizer: Any) -> None:
    path = write(tmp_path / "c.jsonl", {"text": "sun " * 5000})
    assert [len(ids) for ids in read_calibration(path, tokenizer)] == [texts.MAX_TOKENS]


@pytest.mark.parametrize(
    "line",
    ["{", "[]", "null", {}, {"text": 1}, {"text": "a", "messages": []}, {"messages": [{"who": "user"}]},
     {"messages": [1]}],
)  # fmt: skip
def test_calibration_lines_that_are_neither(tmp_path: Path, tokenizer: Any, line: Any) -> None:
    path = write(tmp_path / "c.jsonl", {"text": "sun"}, line)
    assert refused(read_calibration, path, tokenizer) == "c.jsonl:2"


def test_files_that_are_not_there_or_no_text(tmp_path: Path, tokenizer: Any, monkeypatch: Any) -> None:
    assert refused(read_calibration, tmp_path / "none", tokenizer) == "none"
    assert refused(read_calibration, tmp_path, tokenizer) == tmp_path.name
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    assert refused(read_tasks, tmp_path / "binary") == "binary"
    monkeypatch.setattr(texts, "MAX_FILE_BYTES", 3)
    assert refused(read_tasks, write(tmp_path / "large", "1234")) == "large"


def report(decisions: int, *weights: float) -> dict[str, Any]:
    return {"decisions": decisions, "experts": [{"expert": e, "weight": w} for e, w in enumerate(weights)]}


def test_traffic_is_weighted_by_its_decisions(tmp_path: Path) -> None:
    answer = {"id": "x", "choices": [], "routing": report(30, 0.5, 0.5)}
    path = write(tmp_path / "t.jsonl", answer, {"routing": None}, report(10, 1.0, 0.0))
    assert read_traffic(path) == [25.0, 15.0]


@pytest.mark.parametrize(
    "line",
    [{"routing": 3}, {"routing": {}}, {"choices": []}, {"decisions": 1, "experts": []}, report(0, 1.0),
     report(1, -1.0, 2.0), report(1, 1.0, float("nan")), report(1, 1.0),
     # Numbers that JSON has and floats have not, and a sum that they have not.
     report(float("inf"), 0.5, 0.5), report(10**400, 0.5, 0.5), report(1, 10**400, 0), report(2, 1e308, 0)],
)  # fmt: skip
def test_traffic_that_is_none(tmp_path: Path, line: Any) -> None:
    assert refused(read_traffic, write(tmp_path / "t.jsonl", report(1, 0.5, 0.5), line)) == "t.jsonl:2"


def test_traffic_without_a_report(tmp_path: Path) -> None:
    assert refused(read_traffic, write(tmp_path / "t.jsonl", {"routing": None})) == "t.jsonl"


def test_the_examples_own_texts_are_tasks() -> None:
    tasks = read_tasks(Path(__file__).parents[3] / "adapters/examples/prompts.json")
    assert [(task.name, len(task.examples)) for task in tasks] == [("spam", 10), ("sarcasm", 10), ("news", 10)]
    assert tasks[0].message("x").startswith("Is this e-mail") and tasks[0].message("x").endswith(".\n\nx")


EXAMPLE = {"text": "rain", "label": "yes"}


@pytest.mark.parametrize(
    ("content", "field"),
    [
        ([], "l.json"),
        ({}, "l.json"),
        ({"a": 1}, "a.instruction"),
        ({"a": {"instruction": "x"}}, "a.examples"),
        ({"a": {"instruction": "x", "examples": []}}, "a.examples"),
        ({"a": {"instruction": 1, "examples": [EXAMPLE]}}, "a.instruction"),
        ({"a": {"instruction": "x", "examples": [EXAMPLE, {"text": "y"}]}}, "a.examples.1.label"),
        ({"a": {"instruction": "x", "examples": ["y"]}}, "a.examples.0.text"),
        ({"a": {"instruction": "x", "examples": [EXAMPLE | {"label": " "}]}}, "a.examples.0.label"),
    ],
)
def test_tasks_that_are_none(tmp_path: Path, content: Any, field: str) -> None:
    assert refused(read_tasks, write(tmp_path / "l.json", content)) == field
