"""With a capacity, answers are alike whole, in chunks, with the prompt in the cache, alone, batched and preempted.

On the real base, in float32, against plain torch hooks over the whole sequence (`served_methods.py`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from loramux_adapters import BaseModel

from ..adapters.hooks import Delta, hooked
from ..adapters.layouts import sira
from .conftest import Engine
from .hugging_face import TOKENS, TOLERANCE, Answer, assert_equal, difference, encode, greedy_after, load
from .served_methods import Row, _row

pytestmark = pytest.mark.engine

# Some experts are full within the prompt, some during the answer, some never.
CAPACITY = 40
LIMITED, FREE, PLAIN = "limited", "free", "plain"
ROWS: Mapping[str, Row] = {
    LIMITED: _row("sira", sira, lora_alpha=0.4, capacity=CAPACITY),
    FREE: _row("sira", sira, lora_alpha=0.4),
    PLAIN: _row("sira", sira, lora_alpha=0.3, num_experts=1, top_k=1, target_modules=["q_proj"]),
}
PROMPTS = ("Explain how rain forms, step by step. " * 9, "List three uses of copper in a modern house. " * 8)


class Counting(Engine):
    """An engine with so little memory for keys and values that it has to preempt, and who was."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args, num_gpu_blocks_override=12)
        self.preempted: list[str] = []
        scheduler = self.llm.llm_engine.engine_core.engine_core.scheduler
        preempt = scheduler._preempt_request

        def noted(request: Any, *args: Any, **kwargs: Any) -> None:
            self.preempted.append(request.request_id)
            preempt(request, *args, **kwargs)

        scheduler._preempt_request = noted


@pytest.fixture(scope="module")
def engine(base_path: Path, base_model: BaseModel) -> Iterator[Counting]:
    yield Counting(base_path, base_model)


@pytest.fixture(scope="module")
def prompts(base_path: Path) -> list[list[int]]:
    return encode(base_path, PROMPTS)


@pytest.fixture(scope="module")
def made(
    base_model: BaseModel, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[Path, Mapping[str, Delta]]]:
    folder = tmp_path_factory.mktemp("capacity")
    return {name: row.make(folder / name, base_model, 5) for name, row in ROWS.items()}


@pytest.fixture(scope="module")
def alone(engine: Counting, made: Any, prompts: list[list[int]]) -> list[Answer]:
    """What it answers to each prompt when nobody else is there: the prompt is one step, or two."""
    return [engine.greedy([(prompt, made[LIMITED][0])])[0] for prompt in prompts]


def test_alone_equals_the_reference(base_path: Path, made: Any, prompts: list[list[int]], alone: list[Answer]) -> None:
    model = load(base_path, torch.float64)
    for prompt, answer in zip(prompts, alone, strict=True):
        with hooked(model, made[LIMITED][1]):
            assert_equal(answer, greedy_after(model, prompt, answer[0]), "alone")
        with hooked(model, made[FREE][1]):
            assert difference(answer, greedy_after(model, prompt, answer[0])) > 10 * TOLERANCE, "no limit was reached"


def test_in_chunks_beside_others(engine: Counting, made: Any, prompts: list[list[int]], alone: list[Answer]) -> None:
    """Several prompts share the tokens of a step, so that most are cut somewhere."""
    order = [(1, PLAIN), (0, LIMITED), (0, FREE), (1, LIMITED), (0, None)]
    answers = engine.greedy([(prompts[i], made[name][0] if name else None) for i, name in order])
    for (i, name), answer in zip(order, answers, strict=True):
        if name == LIMITED:
            assert_equal(answer, alone[i], "beside others")


def test_after_the_same_prompt(engine: Counting, made: Any, prompts: list[list[int]], alone: list[Answer]) -> None:
    """Its prompt is in the cache by now, and that of another adapter is read from there."""
    from vllm import SamplingParams

    asked = SamplingParams(temperature=0, max_tokens=1)
    prompt = {"prompt_token_ids": prompts[0] * 2}
    cached = []
    for name in (FREE, LIMITED):
        for _ in range(2):
            adapter = engine.adapter(made[name][0])
            (output,) = engine.llm.generate([prompt], asked, lora_request=adapter, use_tqdm=False)
        cached.append(output.num_cached_tokens)
    assert cached[0] > 0 and cached[1] == 0
    assert_equal(engine.greedy([(prompts[0], made[LIMITED][0])])[0], alone[0], "again")


def test_preempted(engine: Counting, made: Any, prompts: list[list[int]], alone: list[Answer]) -> None:
    """Too many at a time for the memory: some begin anew after they had answered in part."""
    engine.preempted.clear()
    rows = [(i % 2, LIMITED) for i in range(10)]
    answers = engine.greedy([(prompts[i], made[name][0]) for i, name in rows])
    assert engine.preempted
    for (i, _), answer in zip(rows, answers, strict=True):
        assert len(answer[0]) == TOKENS
        assert_equal(answer, alone[i], "preempted")


def test_several_answers_to_one_prompt(engine: Counting, made: Any, prompts: list[list[int]], alone: Any) -> None:
    """Each is a sequence of its own, with counts of its own."""
    from vllm import SamplingParams

    asked = SamplingParams(n=3, temperature=1, top_k=1, max_tokens=TOKENS, ignore_eos=True)
    adapter = engine.adapter(made[LIMITED][0])
    (output,) = engine.llm.generate([{"prompt_token_ids": prompts[0]}], asked, lora_request=adapter, use_tqdm=False)
    for choice in output.outputs:
        assert list(choice.token_ids) == alone[0][0]
