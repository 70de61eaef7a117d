"""Weighted sums in the request, through `loramux serve` and the openai client, equal hooks on Hugging Face's model."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from safetensors.torch import load_file

from loramux_adapters import BaseModel

from ..adapters.checkpoints import write_adapter
from ..adapters.layouts import moelora
from ..adapters.layouts.draw import targeted
from .hugging_face import TOKENS, TOLERANCE, Answer, assert_equal, difference, encode, generate, greedy_after, load
from .served_methods import hooked

pytestmark = pytest.mark.engine

PARTS = {"part0": 0.7, "part1": -0.4}
BASE = "smollm2-135m-instruct"


@pytest.fixture(scope="module")
def client(server: Any, spare_adapters: Path) -> Any:
    for i, name in enumerate(PARTS):
        answer = server.post(
            "/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(spare_adapters / f"spare{i}")}
        )
        assert answer.status_code == 200, answer.text
    yield openai.OpenAI(base_url=f"{server.url}/v1", api_key="EMPTY", max_retries=0)
    for name in PARTS:
        server.post("/v1/unload_lora_adapter", {"lora_name": name})


def _ask(client: openai.OpenAI, prompt: list[int], parts: dict[str, float], model: str = BASE) -> Answer:
    return _complete(client, prompt, [{"name": name, "weight": weight} for name, weight in parts.items()], model)


def _complete(client: openai.OpenAI, prompt: list[int], parts: list[dict[str, Any]], model: str = BASE) -> Answer:
    body: dict[str, Any] = {"ignore_eos": True, "return_token_ids": True}
    if parts:
        body["adapters"] = parts
    answer = client.completions.create(
        model=model, prompt=prompt, temperature=0, max_tokens=TOKENS, logprobs=1, extra_body=body
    )
    assert answer.model == model
    choice: Any = answer.choices[0]
    return choice.token_ids, choice.logprobs.token_logprobs


def _hooked(base_path: Path, folders: Path) -> Any:
    """y += Σ_i w_i · 2 · B_i A_i x, from the files of the parts."""
    model = load(base_path, torch.float32)
    for i, weight in enumerate(PARTS.values()):
        tensors = load_file(folders / f"spare{i}" / "adapter_model.safetensors")
        for key in [key for key in tensors if key.endswith("lora_A.weight")]:
            a, b = tensors[key], tensors[key.replace("lora_A", "lora_B")]
            module = model.get_submodule(key.removeprefix("base_model.model.").removesuffix(".lora_A.weight"))
            module.register_forward_hook(lambda _, args, y, a=a, b=b, w=weight: y + w * 2.0 * (args[0] @ a.T) @ b.T)
    return model


def test_the_sum_equals_hooks(client: Any, base_path: Path, spare_adapters: Path) -> None:
    (prompt,) = encode(base_path, ("List three uses of copper.",))
    expected = generate(_hooked(base_path, spare_adapters), prompt)
    others = [_ask(client, prompt, {}), *(_ask(client, prompt, {}, name) for name in PARTS)]
    for parts in (PARTS, dict(reversed(PARTS.items()))):  # the second time with a cached prefix
        assert_equal(_ask(client, prompt, parts), expected, "the sum")
    # Blocks of the KV cache are shared with nobody: not with the parts, nor with other weights.
    swapped = _ask(client, prompt, {"part0": -0.4, "part1": 0.7})
    for other in (*others, swapped):
        assert difference(other, expected) > 10 * TOLERANCE
    assert _ask(client, prompt, {})[0] == others[0][0]


@pytest.fixture(scope="module")
def tasks(server: Any, base_model: BaseModel, spare_adapters: Path) -> Iterator[Any]:
    """A MOELoRA called `med` is served; what it adds for each of its tasks, by the formula of its paper."""
    config = moelora.make_config(lora_alpha=0.8, task_id=2)
    tensors = moelora.make_tensors(config, base_model, seed=5)
    write_adapter(spare_adapters / "med", config, tensors)
    answer = server.post("/v1/load_lora_adapter", {"lora_name": "med", "lora_path": str(spare_adapters / "med")})
    assert answer.status_code == 200, answer.text
    modules = targeted(config, base_model)
    yield [
        {module: partial(moelora.delta, config | {"task_id": task}, tensors, module) for module in modules}
        for task in range(moelora.TASKS + 1)
    ]
    server.post("/v1/unload_lora_adapter", {"lora_name": "med"})


def test_a_task_is_chosen_in_the_request(client: openai.OpenAI, base_path: Path, tasks: Any) -> None:
    (prompt,) = encode(base_path, ("Why do cats purr?",))
    model = load(base_path, torch.float64)
    default = _complete(client, prompt, [], "med")
    answers = [_complete(client, prompt, [{"name": "med", "task": task}]) for task in range(len(tasks))]
    answers.append(_complete(client, prompt, [{"name": "med"}]))
    for deltas, answer in zip((*tasks, tasks[2]), answers, strict=True):
        with hooked(model, deltas):
            assert_equal(answer, greedy_after(model, prompt, answer[0]), "a task")
    assert_equal(default, answers[2], "the default task")
    for answer in (answers[0], answers[1], answers[3]):
        assert difference(answer, default) > 10 * TOLERANCE


def test_a_stream_is_called_what_was_written(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(
        model=BASE,
        messages=[{"role": "user", "content": "Name a river."}],
        max_tokens=4,
        stream=True,
        extra_body={"adapters": [{"name": "part0"}]},
    )
    assert {chunk.model for chunk in stream} == {BASE}


def test_errors_reach_the_client(client: openai.OpenAI) -> None:
    for parts, error in (
        ([{"name": "part0"}, {"name": "parts1"}], openai.NotFoundError),
        ([{"name": "part0", "weight": "1"}], openai.BadRequestError),
        ([{"name": "part0"}, {"name": "desk"}], openai.BadRequestError),  # a mixture
    ):
        with pytest.raises(error) as caught:
            client.completions.create(model=BASE, prompt="Hello", extra_body={"adapters": parts})
        assert "adapters" in str(caught.value.param)  # type: ignore[attr-defined]
