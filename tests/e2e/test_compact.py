"""An eight-expert mixture of the demo tasks, compacted to four: it answers as the tool said, and takes its bytes."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from loramux.cli.compact import main as compact_command
from loramux_adapters import BaseModel, lower
from loramux_adapters.compact import Options, compact
from loramux_adapters.compact.texts import Task, read_tasks
from loramux_adapters.compose.arrow import arrow
from loramux_adapters.native import write_native

from .conftest import EXAMPLES, Engine
from .hugging_face import encode

pytestmark = pytest.mark.engine

# Beside the three adapters five of lower rank made of them, so that there is something to merge.
SMALLER = (("spam", 3), ("sarcasm", 3), ("news", 3), ("spam", 2), ("news", 2))
TEXTS = 3  # of each task


@pytest.fixture(scope="module")
def eight(tmp_path_factory: pytest.TempPathFactory, base_model: BaseModel) -> Path:
    adapters = {name: lower(EXAMPLES / name, base_model) for name in ("spam", "sarcasm", "news")}
    for name, rank in SMALLER:
        adapters[f"{name}-{rank}"] = compact(adapters[name], base_model, Options(rank=rank)).after
    path = tmp_path_factory.mktemp("eight") / "eight.safetensors"
    return write_native(path, arrow(list(adapters.items()), base=base_model, top_k=4), base_model.name)


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tasks = json.loads((EXAMPLES / "prompts.json").read_text())
    for task in tasks.values():
        del task["examples"][TEXTS:]
    path = tmp_path_factory.mktemp("texts") / "labelled.json"
    path.write_text(json.dumps(tasks))
    return path


@pytest.fixture(scope="module")
def calibration(labelled: Path) -> Path:
    messages = [task.message(text) for task in read_tasks(labelled) for text, _ in task.examples]
    lines = [json.dumps({"messages": [{"role": "user", "content": message}]}) for message in messages]
    path = labelled.with_name("calibration.jsonl")
    path.write_text("\n".join(lines))
    return path


def right_answers(engine: Engine, base_path: Path, adapter: Path, task: Task) -> int:
    tokenizer: Any = engine.llm.get_tokenizer()
    prompts = encode(base_path, tuple(task.message(text) for text, _ in task.examples))
    answers = engine.greedy([(ids, adapter) for ids in prompts], tokens=4)
    words = [re.match(r"\W*(\w*)", tokenizer.decode(ids)) for ids, _ in answers]
    return sum(
        word is not None and word[1].lower() == label for word, (_, label) in zip(words, task.examples, strict=True)
    )


def resident_bytes(engine: Engine, adapter: Path) -> int:
    """What the adapter takes as it becomes resident, for all of the test."""
    used = engine.rpc("loramux_stats")["used_bytes"]
    engine.adapter(adapter)
    return int(engine.rpc("loramux_stats")["used_bytes"] - used)


def test_eight_experts_as_four(
    engine: Engine, eight: Path, labelled: Path, calibration: Path, base_path: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    out = tmp_path / "four.safetensors"
    texts = ["--calibration", str(calibration), "--labelled", str(labelled)]
    argv = [str(eight), "--experts", "4", "--base", str(base_path), "--out", str(out), "--json", *texts]
    assert compact_command(argv) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["before"]["experts"], said["after"]["experts"]) == (8, 4)
    for adapter, which in ((eight, "before"), (out, "after")):
        assert resident_bytes(engine, adapter) == said[which]["pool_bytes"]["float32"]

    for task, quality in zip(read_tasks(labelled), said["quality"], strict=True):
        before, after = (right_answers(engine, base_path, adapter, task) for adapter in (eight, out))
        assert before == quality["right"][0], task.name
        assert after >= quality["right"][1], task.name
    assert said["after"]["pool_bytes"]["float32"] < 0.7 * said["before"]["pool_bytes"]["float32"]
