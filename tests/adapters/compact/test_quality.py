"""Scores of labelled texts equal those of whole forward passes without a cache."""

import math
from typing import Any

import torch

from loramux_adapters import LoweredAdapter
from loramux_adapters.applied import applied
from loramux_adapters.compact.quality import NEW_TOKENS, score
from loramux_adapters.compact.texts import Task

from ..natives import UP, make_site

TASKS = [
    Task("weather", "which one", (("rain", "yes"), ("sun", "no"), ("snow wind", "no"))),
    Task("two words", "one", (("wind", "yes no"),)),
]
ADAPTER = LoweredAdapter("lora", {UP: make_site(UP)})


def greedy(model: Any, ids: list[int], end: int) -> list[int]:
    found: list[int] = []
    while len(found) < NEW_TOKENS and end not in found:
        found.append(int(model(torch.tensor([ids + found])).logits[0, -1].argmax()))
    return found


def test_scores(model: Any, tokenizer: Any) -> None:
    found = score(model, tokenizer, ADAPTER, TASKS)
    assert [(quality.task, quality.n) for quality in found] == [("weather", 3), ("two words", 1)]
    with applied(model, ADAPTER), torch.no_grad():
        for quality, task in zip(found, TASKS, strict=True):
            right, nats = 0, []
            for text, label in task.examples:
                prompt = tokenizer.encode(f"user {task.message(text)} <end> assistant", add_special_tokens=False)
                answer = [*tokenizer.encode(label, add_special_tokens=False), tokenizer.eos_token_id]
                logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
                nats.append(-float(torch.log_softmax(logits, -1)[range(len(answer)), answer].sum()))
                words = tokenizer.decode(greedy(model, prompt, tokenizer.eos_token_id)).split()
                right += words[:1] == label.split()
            assert quality.right == right
            assert math.isclose(quality.nats, sum(nats) / len(nats), rel_tol=1e-4)


def test_a_right_answer_is_seen(model: Any, tokenizer: Any) -> None:
    """The labels that this model happens to give."""
    with applied(model, ADAPTER), torch.no_grad():
        prompt = tokenizer.encode("user one rain <end> assistant", add_special_tokens=False)
        first = tokenizer.decode([int(model(torch.tensor([prompt])).logits[0, -1].argmax())])
    (quality,) = score(model, tokenizer, ADAPTER, [Task("t", "one", (("rain", first.upper()), ("rain", "other")))])
    expected = 0 if first.startswith("<") else 1
    assert quality.right == expected
