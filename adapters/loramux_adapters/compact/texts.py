"""The files that compaction reads: calibration texts, answers of served traffic, labelled texts."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from loramux_adapters.errors import AdapterConfigInvalid, shown

MAX_FILE_BYTES = 256 << 20
MAX_TOKENS = 1024
"""Of one calibration text; the rest is left out."""


@dataclass(frozen=True)
class Task:
    """Texts that are answered with one of few labels, all after the same instruction."""

    name: str
    instruction: str
    examples: tuple[tuple[str, str], ...]

    def message(self, text: str) -> str:
        """The user's message: instruction, blank line, text."""
        return f"{self.instruction}\n\n{text}"


def read_calibration(path: Path, tokenizer: Any) -> list[torch.Tensor]:
    """Token ids of every line: `{"text": "…"}` as it is, or `{"messages": […]}` in the model's chat template.

    Raises AdapterConfigInvalid naming the line.
    """
    texts = []
    for place, line in _lines(path):
        messages, text = line.get("messages"), line.get("text")
        if isinstance(text, str) == isinstance(messages, list):
            raise _invalid(place, "holds neither a text nor messages", '{"text": "…"} or {"messages": [{"role", …}]}')
        if isinstance(messages, list) and not all(map(_is_message, messages)):
            raise _invalid(place, "has messages without role and content", '{"role": "user", "content": "…"} each')
        ids = tokenizer(text).input_ids if isinstance(text, str) else chat_ids(tokenizer, messages, place)
        if ids:
            texts.append(torch.tensor(ids[:MAX_TOKENS]))
    return texts


def chat_ids(tokenizer: Any, messages: Any, place: str) -> list[int]:
    """A prompt's tokens, as the server builds it."""
    try:
        prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # templates are programs, and raise what they like
        raise _invalid(
            place, f"does not fit the model's chat template ({str(error)[:120]})", "roles and contents"
        ) from error
    return list(tokenizer.encode(prompt, add_special_tokens=False))


def _is_message(value: Any) -> bool:
    return isinstance(value, Mapping) and all(isinstance(value.get(field), str) for field in ("role", "content"))


def read_traffic(path: Path) -> list[float]:
    """Weight of each expert, summed over decisions, from lines that are answers with `routing`, or just that.

    Raises AdapterConfigInvalid naming the line.
    """
    sums: list[float] = []
    for place, line in _lines(path):
        report = line.get("routing", line)
        if report is None:  # an answer of another model
            continue
        try:
            decisions = int(report["decisions"])
            weights = [float(expert["weight"]) * decisions for expert in report["experts"]]
        except (TypeError, KeyError, ValueError, OverflowError) as error:
            raise _invalid(place, "holds no routing report", 'an answer to a request with "routing": true') from error
        if len(weights) != len(sums or weights) or not weights:
            raise _invalid(place, f"is about {len(weights)} experts, not {len(sums)}", "reports of one adapter")
        sums = [a + b for a, b in zip(sums or [0.0] * len(weights), weights, strict=True)]
        if decisions < 1 or not all(weight >= 0 for weight in weights) or not all(map(math.isfinite, sums)):
            raise _invalid(place, "has weights that are none", "the report as the server wrote it")
    if not sums:
        raise AdapterConfigInvalid(
            f"There is no routing report in {shown(path.name)}.", hint='Ask with "routing": true.', field=path.name
        )
    return sums


def read_tasks(path: Path) -> list[Task]:
    """Labelled texts: an object of tasks, each with `instruction` and `examples` of `text` and `label`.

    This is the format of adapters/examples/prompts.json; other fields are not looked at. Raises AdapterConfigInvalid
    naming the field.
    """
    tasks = _parsed(_read(path), path.name)
    if not isinstance(tasks, dict) or not tasks:
        raise _invalid(path.name, "is no object of tasks", '{"name": {"instruction", "examples"}}')
    return [_task(name, task) for name, task in tasks.items()]


def _task(name: str, task: Any) -> Task:
    instruction = _field(task, "instruction", str, name)
    examples = _field(task, "examples", list, name)
    if not examples:
        raise _invalid(f"{name}.examples", "is empty", "at least one text with its label")
    pairs = []
    for i, example in enumerate(examples):
        place = f"{name}.examples.{i}"
        text, label = _field(example, "text", str, place), _field(example, "label", str, place)
        if not label.strip():
            raise _invalid(f"{place}.label", "is empty", "the word that is the right answer")
        pairs.append((text, label.strip()))
    return Task(name, instruction, tuple(pairs))


def _field(of: Any, name: str, kind: type, place: str) -> Any:
    value = of.get(name) if isinstance(of, Mapping) else None
    if not isinstance(value, kind):
        raise _invalid(f"{place}.{name}", "is missing or of another type", f"a {'text' if kind is str else 'list'}")
    return value


def _lines(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for number, line in enumerate(_read(path).splitlines(), start=1):
        if line.strip():
            place = f"{path.name}:{number}"
            parsed = _parsed(line, place)
            if not isinstance(parsed, dict):
                raise _invalid(place, "is no JSON object", "one object per line")
            yield place, parsed


def _read(path: Path) -> str:
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise _invalid(path.name, f"is larger than {MAX_FILE_BYTES >> 20} MiB", "a sample of it")
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise _invalid(path.name, f"cannot be read ({error})", "a text file in UTF-8") from error


def _parsed(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _invalid(place, f"is no JSON ({error})", "JSON") from error


def _invalid(place: str, what: str, wanted: str) -> AdapterConfigInvalid:
    return AdapterConfigInvalid(f"{shown(place)} {what}.", hint=f"It must be {wanted}.", field=place)


def token_count(texts: Sequence[torch.Tensor]) -> int:
    return sum(len(ids) for ids in texts)
