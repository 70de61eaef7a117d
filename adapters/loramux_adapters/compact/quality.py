"""What an adapter answers to labelled texts, as the examples are scored (adapters/examples/score.py).

right   greedy decoding of at most four tokens; right when the first word is the label, whatever its case
nats    −log P(label and end of turn | prompt), the mean over texts: moves before answers change
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from loramux_adapters.applied import applied
from loramux_adapters.compact.texts import Task, chat_ids
from loramux_adapters.lowered import LoweredAdapter

NEW_TOKENS = 4


@dataclass(frozen=True)
class Quality:
    """One task's: `right` of `n` texts."""

    task: str
    n: int
    right: int
    nats: float


def score(model: Any, tokenizer: Any, adapter: LoweredAdapter, tasks: Sequence[Task]) -> list[Quality]:
    """The adapter on its base model, a float32 transformers model."""
    with applied(model, adapter), torch.inference_mode():
        return [_score_task(model, tokenizer, task) for task in tasks]


def _score_task(model: Any, tokenizer: Any, task: Task) -> Quality:
    right, nats = 0, 0.0
    for text, label in task.examples:
        prompt = chat_ids(tokenizer, [{"role": "user", "content": task.message(text)}], task.name)
        output = model(input_ids=torch.tensor([prompt]), use_cache=True, logits_to_keep=1)
        answer = [*tokenizer.encode(label, add_special_tokens=False), tokenizer.eos_token_id]
        nats -= _log_probability(model, output, answer)
        output.past_key_values.crop(len(prompt))
        word = re.match(r"\W*(\w*)", tokenizer.decode(_greedy(model, output, tokenizer.eos_token_id)))
        right += word is not None and word[1].lower() == label.lower()
    return Quality(task.name, len(task.examples), right, nats / len(task.examples))


def _log_probability(model: Any, prompt: Any, answer: list[int]) -> float:
    """log P(answer | prompt), from the model's output for the prompt; its cache grows by the answer."""
    logits = prompt.logits
    if len(answer) > 1:
        output = model(input_ids=torch.tensor([answer[:-1]]), past_key_values=prompt.past_key_values, use_cache=True)
        logits = torch.cat([logits, output.logits], dim=1)
    log_p = torch.log_softmax(logits[0].float(), -1)
    return float(log_p[torch.arange(len(answer)), torch.tensor(answer)].sum())


def _greedy(model: Any, prompt: Any, end: int | None) -> list[int]:
    """The likeliest tokens, one after the other, without the model's own sampling settings."""
    tokens = [int(prompt.logits[0, -1].argmax())]
    while len(tokens) < NEW_TOKENS and tokens[-1] != end:
        step = model(input_ids=torch.tensor([tokens[-1:]]), past_key_values=prompt.past_key_values, use_cache=True)
        tokens.append(int(step.logits[0, -1].argmax()))
    return tokens[:-1] if tokens[-1] == end else tokens
