"""Every method that is served, alone and in one batch, answers what an implementation that is not ours computes.

On the real base, in float32. `served_methods.py` has the adapters and the references; a new method is a row there.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from loramux_adapters import BaseModel
from loramux_adapters.detect import find_method
from loramux_adapters.files import AdapterFolder
from loramux_adapters.methods import METHODS

from ..adapters.hooks import hooked
from . import peft_adapters
from .hugging_face import TOKENS, TOLERANCE, Answer, assert_equal, difference, encode, greedy_after, load
from .served_methods import PEFT_ROWS, ROWS

pytestmark = pytest.mark.engine

NAMES = (*PEFT_ROWS, *ROWS)
PROMPTS = (
    "Explain how rain forms.",
    "List three uses of copper.",
    "Write a line about a lighthouse.",
    "Why do cats purr?",
)


@dataclass(frozen=True)
class Served:
    """An adapter, its prompt, what the engine answered when it ran alone, and what the reference says to that."""

    source: Path
    prompt: list[int]
    alone: Answer
    expected: Answer


@pytest.fixture(scope="module")
def prompts(base_path: Path) -> list[list[int]]:
    return encode(base_path, PROMPTS)


@pytest.fixture(scope="module")
def served(
    engine: Any, base_path: Path, base_model: BaseModel, prompts: Any, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Served]]:
    folder = tmp_path_factory.mktemp("methods")
    single, double = load(base_path, torch.float32), load(base_path, torch.float64)
    made = {}

    def ask(i: int, source: Path) -> tuple[list[int], Answer]:
        prompt = prompts[i % len(prompts)]
        return prompt, engine.greedy([(prompt, source)])[0]

    for i, name in enumerate(NAMES):
        if name in ROWS:
            source, deltas = ROWS[name].make(folder / name, base_model, i)
            prompt, alone = ask(i, source)
            with hooked(double, deltas) as model:
                expected = greedy_after(model, prompt, alone[0])
        else:
            options, std = PEFT_ROWS[name]
            model = peft_adapters.make(single, folder / name, options, std=std, seed=i)
            prompt, alone = ask(i, source := folder / name)
            expected = greedy_after(model, prompt, alone[0])
            single = model.unload()
        made[name] = Served(source, prompt, alone, expected)
    yield made


@pytest.mark.parametrize("name", NAMES)
def test_alone_equals_the_reference(served: dict[str, Served], name: str) -> None:
    assert len(served[name].alone[0]) == TOKENS
    assert_equal(served[name].alone, served[name].expected, name)


def test_every_adapter_changes_the_answer(engine: Any, served: dict[str, Served]) -> None:
    """Otherwise equality would prove nothing."""
    base = engine.greedy([(row.prompt, None) for row in served.values()])
    for (name, row), plain in zip(served.items(), base, strict=True):
        assert difference(row.alone, plain) > 10 * TOLERANCE, name


def test_all_in_one_batch_equal_the_references(engine: Any, served: dict[str, Served]) -> None:
    """With two rows of the base among them, in another order than they were loaded."""
    base = served["lora"].prompt
    rows = [(name, row.prompt, row.source, row.expected) for name, row in served.items()]
    rows += [("base", base, None, engine.greedy([(base, None)])[0])] * 2
    random.Random(0).shuffle(rows)
    answers = engine.greedy([(prompt, source) for _, prompt, source, _ in rows])
    for (name, _, _, expected), answer in zip(rows, answers, strict=True):
        assert_equal(answer, expected, f"{name} in a mixed batch")


def test_a_cached_prefix_changes_nothing(engine: Any, served: dict[str, Served], prompts: Any) -> None:
    """One long prompt for all, twice: the second time most of it comes from each adapter's own cache, or nothing where
    tokens are counted."""
    from vllm import SamplingParams

    prompt = [token for ids in prompts for token in ids]  # longer than a block of the cache
    asked = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True, logprobs=0)
    requests = [engine.adapter(row.source) for row in served.values()]
    first, again = (
        engine.llm.generate(
            [{"prompt_token_ids": prompt}] * len(requests), asked, lora_request=requests, use_tqdm=False
        )
        for _ in range(2)
    )
    for name, one, other in zip(served, first, again, strict=True):
        counted = "capacity" in name
        assert other.num_cached_tokens == 0 if counted else other.num_cached_tokens > len(prompt) / 2, name
        assert one.num_cached_tokens < len(prompt) / 2, name
        a, b = (
            [(token, step[token].logprob) for token, step in zip(o.token_ids, o.logprobs, strict=True)]
            for o in (one.outputs[0], other.outputs[0])
        )
        assert [token for token, _ in a] == [token for token, _ in b], name
        assert max(abs(p - q) for (_, p), (_, q) in zip(a, b, strict=True)) < TOLERANCE, name


def test_every_method_that_is_served_has_a_row(served: dict[str, Served]) -> None:
    methods = {name: find_method(AdapterFolder(row.source)).name for name, row in served.items()}
    assert all(methods[name] == row.method for name, row in ROWS.items())
    assert set(methods.values()) == {method.name for method in METHODS if method.abilities.serve}
