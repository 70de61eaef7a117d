"""Sums, routers and tasks in the request, through `loramux serve` and the openai client, equal hooks on Hugging Face's
model. Nothing of loramux is in the hooks: they are the formulas over the tensors of the parts' files.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from safetensors.torch import load_file

from loramux_adapters import BaseModel

from ..adapters.checkpoints import write_adapter
from ..adapters.hooks import Delta, hooked
from ..adapters.layouts import moelora
from ..adapters.layouts.draw import targeted
from .conftest import EXAMPLES
from .hugging_face import (
    TOKENS,
    TOLERANCE,
    Answer,
    assert_equal,
    difference,
    encode,
    generate,
    greedy_after,
    load,
    lora_deltas,
)

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


def _complete(
    client: openai.OpenAI, prompt: list[int], parts: list[Any], model: str = BASE, router: Any = None
) -> Answer:
    body: dict[str, Any] = {"ignore_eos": True, "return_token_ids": True}
    if parts:
        body["adapters"] = parts
    if router:
        body["router"] = router
    answer = client.completions.create(
        model=model, prompt=prompt, temperature=0, max_tokens=TOKENS, logprobs=1, extra_body=body
    )
    assert answer.model == model
    choice: Any = answer.choices[0]
    return choice.token_ids, choice.logprobs.token_logprobs


def _sum(folders: Path) -> dict[str, Delta]:
    """Σ_i w_i · 2 · B_i A_i x, from the files of the parts."""
    parts = [(weight, lora_deltas(folders / f"spare{i}", scale=2)) for i, weight in enumerate(PARTS.values())]

    def delta(module: str, x: torch.Tensor) -> torch.Tensor:
        return torch.stack([weight * added[module](x) for weight, added in parts]).sum(0)

    return {module: partial(delta, module) for module in parts[0][1]}


def test_the_sum_equals_hooks(client: Any, base_path: Path, spare_adapters: Path) -> None:
    (prompt,) = encode(base_path, ("List three uses of copper.",))
    with hooked(load(base_path, torch.float32), _sum(spare_adapters)) as model:
        expected = generate(model, prompt)
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


def _factors(folder: Path) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Module -> A and s·B, in float64."""
    config = json.loads((folder / "adapter_config.json").read_text())
    assert not config.get("use_rslora")
    tensors = load_file(folder / "adapter_model.safetensors")
    return {
        key.removeprefix("base_model.model.").removesuffix(".lora_A.weight"): (
            a.double(),
            config["lora_alpha"] / config["r"] * tensors[key.replace("lora_A", "lora_B")].double(),
        )
        for key, a in tensors.items()
        if key.endswith("lora_A.weight")
    }


def _arrow(folders: list[Path], top_k: int, temperature: float) -> dict[str, Delta]:
    """y += Σ_e g_e ΔW_e x; g = softmax(|v_e · x| / T) over the k largest, v_e = top right singular vector of ΔW_e."""
    parts = [_factors(folder) for folder in folders]
    deltas: dict[str, Delta] = {}
    for module in sorted({module for part in parts for module in part}):
        experts = [part.get(module) for part in parts]
        heads = torch.zeros(len(parts), next(e[0].shape[1] for e in experts if e is not None), dtype=torch.float64)
        for e, factors in enumerate(experts):
            if factors is not None:
                heads[e] = torch.linalg.svd(factors[1] @ factors[0], full_matrices=False).Vh[0]

        def delta(x: torch.Tensor, experts: Any = experts, heads: torch.Tensor = heads) -> torch.Tensor:
            x = x.double()
            scores, chosen = ((x @ heads.T).abs() / temperature).topk(top_k, -1)
            g = torch.zeros(len(x), len(heads), dtype=x.dtype).scatter(-1, chosen, torch.softmax(scores, -1))
            added = [g[:, e, None] * (x @ f[0].T @ f[1].T) for e, f in enumerate(experts) if f is not None]
            return torch.stack(added).sum(0)

        deltas[module] = delta
    return deltas


ROUTED = ("part0", "spam", "part1")  # of other ranks, on other layers
ROUTERS: tuple[dict[str, Any], ...] = (
    {"type": "arrow", "top_k": 2, "temperature": 0.5},
    {"type": "arrow", "top_k": 1},
    {"type": "arrow"},
)


def test_routers_equal_arrows_formula_alone_and_in_one_batch_with_others(
    client: openai.OpenAI, base_path: Path, spare_adapters: Path, tasks: Any
) -> None:
    (prompt, other) = encode(base_path, ("Write a line about a lighthouse.", "Explain how rain forms."))
    folders = [spare_adapters / "spare0", EXAMPLES / "spam", spare_adapters / "spare1"]
    formulas = [_arrow(folders, router.get("top_k", 3), router.get("temperature", 1.0)) for router in ROUTERS]
    model = load(base_path, torch.float64)
    parts, sums = list(ROUTED), [{"name": name, "weight": weight} for name, weight in PARTS.items()]
    alone = [_complete(client, prompt, parts, router=router) for router in ROUTERS]
    again = [_complete(client, prompt, parts[::-1], router=router) for router in ROUTERS]  # with a cached prefix
    others: list[tuple[Any, ...]] = [
        (other, [], BASE), (other, [], "desk"), (other, [], "part1"), (other, [], "med"), (other, sums, BASE),
    ]  # fmt: skip
    expected = [_complete(client, *request) for request in others]
    batch = [*((prompt, parts, BASE, router) for router in ROUTERS), *others]
    with ThreadPoolExecutor(len(batch)) as pool:
        together = list(pool.map(lambda request: _complete(client, *request), batch))
    for router, deltas, *answers in zip(ROUTERS, formulas, alone, again, together, strict=False):
        with hooked(model, deltas):
            formula = greedy_after(model, prompt, answers[0][0])
        for answer, how in zip(answers, ("alone", "in another order", "in a batch"), strict=True):
            assert_equal(answer, formula, f"{router}, {how}")
    for request, one, batched in zip(others, expected, together[len(ROUTERS) :], strict=True):
        assert_equal(batched, one, f"{request[2]} beside routers")
    plain = _complete(client, prompt, [])
    for one, two in combinations([plain, *alone], 2):
        assert difference(one, two) > 10 * TOLERANCE  # KV blocks are shared with nobody


def test_routing_tells_of_the_parts_as_they_were_named(client: openai.OpenAI) -> None:
    told = []
    for parts in (list(ROUTED), list(ROUTED[::-1])):
        body = {"adapters": parts, "router": ROUTERS[0], "routing": True}
        answer: Any = client.completions.create(model=BASE, prompt="A headline.", max_tokens=4, extra_body=body)
        assert answer.model == BASE and answer.routing["adapter"].startswith("+composed@")
        told.append(dict(zip(parts, [expert["selected"] for expert in answer.routing["experts"]], strict=True)))
        assert [expert["expert"] for expert in answer.routing["experts"]] == [0, 1, 2]
    assert told[0].keys() == set(ROUTED) and sum(told[0].values()) == pytest.approx(2)


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
        for router in (None, "arrow"):
            with pytest.raises(error) as caught:
                client.completions.create(model=BASE, prompt="Hello", extra_body={"adapters": parts, "router": router})
            assert "adapters" in str(caught.value.param)  # type: ignore[attr-defined]
    for wish, param in (
        ({"adapters": ["part0", "part1"], "router": {"type": "arrow", "top_k": 3}}, "router.top_k"),
        ({"adapters": ["part0"], "router": "arrow"}, "adapters"),
        ({"router": "arrow"}, "adapters"),
    ):
        with pytest.raises(openai.BadRequestError) as refused:
            client.completions.create(model=BASE, prompt="Hello", extra_body=wish)
        assert refused.value.param == param  # type: ignore[attr-defined]
