"""One request as several calls: their outputs one stream, their seeds apart, the first error the end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from types import SimpleNamespace
from typing import Any

import pytest
from vllm import SamplingParams
from vllm.sampling_params import RequestOutputKind

from loramux.engine.fan_out import Written, fan_out


class Engine:
    """Writes three tokens per call, which tell the call; `errors` by request."""

    def __init__(self) -> None:
        self.params: dict[str, Any] = {}
        self.options: dict[str, Any] = {}
        self.errors: dict[str, Exception] = {}
        self.open = 0

    async def generate(self, prompt: Any, params: Any, request_id: str, **options: Any) -> AsyncGenerator[Any, None]:
        self.params[request_id], self.options[request_id] = params, options
        self.open += 1
        try:
            tokens = [ord(request_id[-1])] * 3
            for place in range(3):
                await asyncio.sleep(0)
                if request_id in self.errors and place == 1:
                    raise self.errors[request_id]
                last = place == 2
                if params.output_kind is RequestOutputKind.DELTA:
                    yield output(tokens[place : place + 1], last)
                elif last:
                    yield output(tokens, last)
        finally:
            self.open -= 1


def output(tokens: list[int], last: bool) -> SimpleNamespace:
    logprobs = [{token: SimpleNamespace(logprob=-0.5), 0: SimpleNamespace(logprob=-9.0)} for token in tokens]
    choice = SimpleNamespace(
        index=0, token_ids=tokens, text="".join(map(chr, tokens)), finish_reason="stop" if last else None
    )
    choice.logprobs = logprobs
    return SimpleNamespace(outputs=[choice], finished=last)


def calls(n: int) -> list[tuple[str, dict[str, Any]]]:
    return [(f"r-{i}", {"lora_request": f"draw {i}"}) for i in range(n)]


async def run(engine: Engine, params: SamplingParams, **options: Any) -> tuple[list[Any], Written, list[int]]:
    written, ended, outputs = Written(params), [], []
    async for one in fan_out(engine.generate, "prompt", params, calls(3), **options):
        outputs.append(one)
        ended += written.add(one)
    return outputs, written, ended


@pytest.mark.parametrize("kind", [RequestOutputKind.DELTA, RequestOutputKind.FINAL_ONLY])
async def test_choices_are_the_calls(kind: RequestOutputKind) -> None:
    engine = Engine()
    outputs, written, ended = await run(engine, SamplingParams(n=3, output_kind=kind))
    assert written.tokens == {i: [ord(str(i))] * 3 for i in range(3)}
    assert written.texts == {i: str(i) * 3 for i in range(3)}
    assert written.logp == {i: [-0.5] * 3 for i in range(3)}
    assert sorted(ended) == [0, 1, 2]
    assert [one.finished for one in outputs] == [False] * (len(outputs) - 1) + [True]
    assert len(outputs) == (9 if kind is RequestOutputKind.DELTA else 1)
    assert {one["lora_request"] for one in engine.options.values()} == {"draw 0", "draw 1", "draw 2"}
    assert engine.open == 0


async def test_parameters_of_one_choice() -> None:
    engine, params = Engine(), SamplingParams(n=3, seed=7, temperature=0.9, extra_args={"a": 1})
    given = calls(3)
    given[1][1]["extra_args"] = {"b": 2}
    async for _ in fan_out(engine.generate, "prompt", params, given):
        pass
    assert [(one.n, one.seed) for one in engine.params.values()] == [(1, 7), (1, 8), (1, 9)]
    assert engine.params["r-1"].extra_args == {"a": 1, "b": 2} and engine.params["r-0"].extra_args == {"a": 1}
    assert params.n == 3 and params.seed == 7 and params.extra_args == {"a": 1}
    assert "extra_args" not in engine.options["r-1"]


async def test_greedy() -> None:
    engine = Engine()
    await run(engine, SamplingParams(n=3, temperature=1.0, top_p=0.5, top_k=7), greedy=True)
    expected = SamplingParams(temperature=0)
    for one in engine.params.values():
        for name in ("temperature", "top_p", "top_k", "min_p"):
            assert getattr(one, name) == getattr(expected, name)


@pytest.mark.parametrize("kind", [RequestOutputKind.DELTA, RequestOutputKind.FINAL_ONLY])
async def test_the_first_error_ends_all(kind: RequestOutputKind) -> None:
    engine = Engine()
    engine.errors["r-1"] = ValueError("no")
    with pytest.raises(ValueError, match="no"):
        await run(engine, SamplingParams(n=3, output_kind=kind))
    assert engine.open == 0


async def test_who_leaves_ends_all() -> None:
    engine = Engine()
    stream = fan_out(engine.generate, "prompt", SamplingParams(n=3, output_kind=RequestOutputKind.DELTA), calls(3))
    await anext(stream)
    assert engine.open
    await stream.aclose()
    assert engine.open == 0
