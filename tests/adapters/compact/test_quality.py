"""Scores of labelled texts equal those of whole forward passes without a cache."""

import copy
import math
from typing import Any

import torch
from tokenizers import decoders

from loramux_adapters import LoweredAdapter
from loramux_adapters.applied import applied
from loramux_adapters.compact.quality import NEW_TOKENS, score
from loramux_adapters.compact.texts import Task

from ..natives import UP, make_site

TASKS = [
    Task("weather", "which one", (("rain", "sun"), ("sun", "no"), ("snow wind", "sun"))),
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
    assert 0 < found[0].right < 3, "or what is compared below has nothing to tell"
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


def test_the_first_word_decides_whatever_its_case_and_what_follows(model: Any, tokenizer: Any) -> None:
    """Labels are what this model happens to answer, with the adapter and without."""
    (prompt,) = tokenizer(["user one rain <end> assistant"], add_special_tokens=False)["input_ids"]

    def words() -> list[str]:
        with torch.no_grad():
            return str(tokenizer.decode(greedy(model, prompt, tokenizer.eos_token_id))).split()

    base = words()[0]
    with applied(model, ADAPTER):
        first, second, *_ = words()
    assert len({base, first, second}) == 3 and base.isalpha() and first.isalpha()

    def right(*labels: str) -> int:
        task = Task("t", "one", tuple(("rain", label) for label in labels))
        return score(model, tokenizer, ADAPTER, [task])[0].right

    assert right(first, first.upper(), second) == 2
    assert right(base, second, f"{first} {second}", first[:-1]) == 0


def test_a_word_of_several_tokens_is_what_greedy_decoding_gives(model: Any, tokenizer: Any) -> None:
    """The label that was scored before must not be in the cache that decoding goes on from."""
    joined = copy.deepcopy(tokenizer)
    joined.backend_tokenizer.decoder = decoders.Fuse()
    (prompt,) = tokenizer(["user one rain <end> assistant"], add_special_tokens=False)["input_ids"]
    with applied(model, ADAPTER), torch.no_grad():
        answer = joined.decode(greedy(model, prompt, tokenizer.eos_token_id))
    assert len(answer) > len("assistant") and answer.isalpha()
    (quality,) = score(model, joined, ADAPTER, [Task("t", "one", (("rain", answer), ("rain", answer + "yes")))])
    assert quality.right == 1
