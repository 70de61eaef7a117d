"""One request made several calls of an engine, and their outputs one stream: a choice each."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from copy import copy
from typing import Any

from vllm.sampling_params import RequestOutputKind

from loramux.metrics.instrument import Generate


class Written:
    """What each choice has written so far, whether outputs carry all of it or what is new."""

    def __init__(self, params: Any) -> None:
        self._delta = params.output_kind is RequestOutputKind.DELTA
        self.tokens: dict[int, list[int]] = {}
        self.texts: dict[int, str] = {}
        self.logp: dict[int, list[float]] = {}  # of the tokens, where outputs have them

    def add(self, output: Any) -> list[int]:
        """The choices that end with this output."""
        for choice in output.outputs:
            i = choice.index
            if not self._delta:
                for known in (self.tokens, self.texts, self.logp):
                    known.pop(i, None)
            self.tokens.setdefault(i, []).extend(choice.token_ids)
            if choice.logprobs is not None:
                pairs = zip(choice.token_ids, choice.logprobs, strict=False)
                self.logp.setdefault(i, []).extend(step[token].logprob for token, step in pairs)
            self.texts[i] = self.texts.get(i, "") + choice.text
        return [choice.index for choice in output.outputs if choice.finish_reason is not None]


async def fan_out(
    generate: Generate,
    prompt: Any,
    params: Any,
    calls: Sequence[tuple[str, dict[str, Any]]],
    *,
    greedy: bool = False,
) -> AsyncGenerator[Any, None]:
    """Call `generate` once per (request id, options), with `params` for one choice; output i becomes choice i.

    `extra_args` among the options are added to those of the parameters.
    As of one request with n choices: streamed outputs pass as they come, the others as one at the end. With a seed,
    choice i has seed + i. The first error ends all.
    """
    queue: asyncio.Queue[tuple[int, Any]] = asyncio.Queue()

    async def call(index: int, request_id: str, options: dict[str, Any]) -> None:
        try:
            stream = generate(prompt, _of_one(params, index, greedy, options), request_id, **options)
            async with aclosing(stream):
                async for output in stream:
                    queue.put_nowait((index, output))
        except Exception as error:
            queue.put_nowait((index, error))

    streamed = params.output_kind is RequestOutputKind.DELTA
    tasks = [asyncio.ensure_future(call(i, *one)) for i, one in enumerate(calls)]
    running, output = len(tasks), None
    finals: dict[int, Any] = {}
    try:
        while running:
            index, output = await queue.get()
            if isinstance(output, Exception):
                raise output
            running -= output.finished
            output.finished = not running
            for choice in output.outputs:
                choice.index = index
                finals[index] = choice
            if streamed:
                yield output
        if not streamed and output is not None:
            output.outputs = [choice for _, choice in sorted(finals.items())]
            yield output
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _of_one(params: Any, index: int, greedy: bool, options: dict[str, Any]) -> Any:
    one = copy(params)
    one.n = 1
    if one.seed is not None:
        one.seed += index
    if greedy:  # as vLLM sets it for a temperature of 0
        one.temperature, one.top_p, one.top_k, one.min_p = 0.0, 1.0, 0, 0.0
    if (extra := options.pop("extra_args", None)) is not None:
        one.extra_args = {**(one.extra_args or {}), **extra}
    return one
